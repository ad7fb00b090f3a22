"""train.py as a user runs it: real argv, real files, the three phases, kills and resumes, bad input."""

import dataclasses
import gc
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import train
from lora.inject import get_adapter_names, init_adapters, match_families
from model import checkpoint
from model.optim import build_optimizer, get_optimizer_state
from model.vit import LORA_FAMILIES, VARIANTS

REPO = Path(__file__).parent.parent
TIMES = ("seconds", "epoch_seconds", "images_per_second", "data_wait_fraction", "slowest_rank", "peak_memory_bytes", "mfu")
# 12 steps an epoch. Windows of one epoch; the first overlaps the warmup of the learning rate, so that the loose test passes after
# epoch 3: full 1-3, warmup 4-6, lora 7-9. Everything random is on.
SMALL = ("--loader folder --num_workers 0 --epochs 9 --batch_size 50 --lr_warmup_steps 12 --dtype float32 --compile False --dropout 0.1 "
         "--drop_path 0.1 --mixup 0.2 --tau 90 --zeta 90 --num_windows 2 --window_epochs 1 --lora_warmup_epochs 3 --rank_min 4 "
         "--rank_max 32").split()




def argv(small, run_dir, *more):
    return [*SMALL, "--data_dir", str(small), "--run_dir", str(run_dir), *map(str, more)]


def run(small, run_dir, *more):
    assert train.main(argv(small, run_dir, *more)) == 0
    return events(run_dir)


def events(run_dir, *kinds):
    records = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if not kinds or r["event"] in kinds]


def without_times(records):
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records if r["event"] != "start"]


def weights(run_dir, path=None):
    """All tensors of a checkpoint (the latest): model and optimiser."""
    path = path or checkpoint.latest(Path(run_dir))
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {key: torch.empty(m.size, dtype=m.properties.dtype) for key, m in saved.items()}
    dcp.load(tensors, checkpoint_id=path)
    return tensors


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """TensorBoard's heat maps take a second an epoch; the reference run and those from a shell draw them."""
    monkeypatch.setattr(SummaryWriter, "add_figure", lambda *args: None)


@pytest.fixture(scope="module")
def reference(small, tmp_path_factory):
    """The uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    run(small, run_dir)
    return run_dir


# ---- the three phases

def test_three_phases(reference):
    epochs, switches = events(reference, "epoch"), events(reference, "switch")
    assert [e["phase"] for e in epochs] == ["full"] * 3 + ["warmup"] * 3 + ["lora"] * 3
    assert [e["epoch"] for e in epochs] == list(range(1, 10)) and [e["step"] for e in epochs] == list(range(12, 109, 12))
    assert [(s["epoch"], s["from"], s["to"]) for s in switches] == [(3, "full", "warmup"), (6, "warmup", "lora")]
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    keys = ("epoch step phase train_loss train_top1 val_loss val_top1 val_top5 epoch_seconds images_per_second data_wait_fraction slowest_rank mfu "
            "peak_memory_bytes trainable_params lr weight_norms adapter_norms").split()
    assert all(set(keys) <= e.keys() for e in epochs)

    ranks = json.loads((reference / "ranks.json").read_text())
    assert ranks == switches[0]["ranks"] == switches[1]["ranks"]
    assert list(ranks) == list(LORA_FAMILIES) and all(len(layers) == 4 for layers in ranks.values())
    d, sizes = 64, {"q": (64, 64), "k": (64, 64), "v": (64, 64), "proj": (64, 64), "fc1": (64, 256), "fc2": (256, 64)}
    adapters = sum(r * sum(sizes[family]) for family, layers in ranks.items() for r in layers)
    full = (3 * 49 * d + d) + d + 17 * d + 4 * (12 * d * d + 13 * d) + 2 * d + 10 * d + 10  # patches, class, positions, blocks, norm, head
    assert [e["trainable_params"] for e in epochs] == [full] * 3 + [full + adapters] * 3 + [adapters] * 3

    assert all(not e["adapter_norms"] for e in epochs[:3])
    assert all(min(norms) > 0 for e in epochs[3:] for norms in e["adapter_norms"].values())
    assert epochs[5]["weight_norms"] == epochs[6]["weight_norms"] == epochs[8]["weight_norms"] != epochs[4]["weight_norms"]
    assert epochs[7]["adapter_norms"] != epochs[8]["adapter_norms"]

    # kept: the switch's, the freeze's, the last two; and the switch's holds the phase before, whole
    kept = sorted(d.name for d in (reference / "checkpoints").glob("step_*"))
    assert kept == ["step_00000036", "step_00000072", "step_00000096", "step_00000108"]
    switch = weights(reference, reference / "checkpoints/step_00000036")
    assert "optimizer.blocks.0.attn.qkv.weight.exp_avg" in switch and not any("lora" in key for key in switch)
    freeze = weights(reference, reference / "checkpoints/step_00000072")
    assert "optimizer.blocks.0.attn.qkv.weight.exp_avg" in freeze and "optimizer.blocks.0.attn.qkv.lora_B.2.exp_avg" in freeze
    last = weights(reference)
    assert {key.split(".", 1)[1].rsplit(".", 1)[0] for key in last if key.startswith("optimizer.")} == {
        key.split(".", 1)[1] for key in last if key.startswith("model.") and ".lora_" in key}  # nothing of the base is left
    assert torch.equal(last["model.blocks.0.attn.qkv.weight"], freeze["model.blocks.0.attn.qkv.weight"])
    assert not torch.equal(last["model.blocks.0.attn.qkv.lora_A"], freeze["model.blocks.0.attn.qkv.lora_A"])


def test_run_directory(reference):
    config = json.loads((reference / "config.json").read_text())
    assert config.keys() == {f.name for f in dataclasses.fields(train.Config)}
    assert list((reference / "tb").glob("events.*"))
    tb = EventAccumulator(str(reference / "tb"), size_guidance={"images": 0})
    tb.Reload()
    tags = tb.Tags()
    assert {"train/loss", "val/top1", "perf/images_per_second", "lora/trainable_params"} <= set(tags["scalars"])
    assert {f"norm/{family}" for family in LORA_FAMILIES} <= set(tags["scalars"])
    assert {"norm_change/layer_by_epoch", "lora/ranks"} <= set(tags["images"])
    epochs = events(reference, "epoch")
    assert [s.step for s in tb.Scalars("norm/q")] == [e["step"] for e in epochs]
    assert tb.Scalars("norm/q")[0].value == pytest.approx(np.mean(epochs[0]["weight_norms"]["q"]))


def test_two_runs_are_identical(small, reference, tmp_path):
    run(small, tmp_path / "again")
    assert without_times(events(tmp_path / "again")) == without_times(events(reference))
    assert_same(weights(tmp_path / "again"), weights(reference))
    run(small, tmp_path / "other", "--seed", 1, "--max_steps", 12)  # the control
    assert events(tmp_path / "other", "epoch")[0]["train_loss"] != events(reference, "epoch")[0]["train_loss"]


def test_modes(small, tmp_path):
    full = run(small, tmp_path / "full", "--mode", "full", "--epochs", 5)
    assert [e["phase"] for e in full if e["event"] == "epoch"] == ["full"] * 5 and not any(e["event"] == "switch" for e in full)

    lora = run(small, tmp_path / "lora", "--mode", "lora", "--epochs", 4)
    assert [e["phase"] for e in lora if e["event"] == "epoch"] == ["lora"] * 4
    assert json.loads((tmp_path / "lora/ranks.json").read_text()) == {family: [32] * 4 for family in LORA_FAMILIES}
    assert lora[-1]["train_loss"] < lora[1]["train_loss"] - 0.005  # head, norms and embeddings train too, so it learns
    stepped = {key.split(".", 1)[1].rsplit(".", 1)[0] for key in weights(tmp_path / "lora") if key.startswith("optimizer.")}
    assert {"head.weight", "norm.bias", "blocks.3.norm2.weight", "pos_embed", "cls_token", "patch_embed.proj.weight"} <= stepped
    assert not any("qkv.weight" in name or "mlp.fc1.bias" in name for name in stepped)

    fixed = run(small, tmp_path / "fixed", "--switch_epoch", 4, "--tau", 1e-6, "--epochs", 5)
    assert [e["epoch"] for e in fixed if e["event"] == "switch"] == [4]
    none = run(small, tmp_path / "none", "--tau", 1e-6, "--epochs", 4)  # the control: the test alone would not have switched
    assert not any(e["event"] == "switch" for e in none)

    at_once = run(small, tmp_path / "at_once", "--lora_warmup_epochs", 0, "--epochs", 5)
    assert [e["phase"] for e in at_once if e["event"] == "epoch"] == ["full"] * 3 + ["lora"] * 2


def test_gradient_accumulation_is_the_same_step(small, tmp_path):
    still = "--dropout 0 --drop_path 0 --mixup 0 --epochs 5".split()
    one = run(small, tmp_path / "one", *still)
    two = run(small, tmp_path / "two", *still, "--grad_accum_steps", 2)
    losses = [[e["train_loss"] for e in events_ if e["event"] == "epoch"] for events_ in (one, two)]
    assert losses[1][:3] == pytest.approx(losses[0][:3], rel=1e-5)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # fresh adapters: Adam divides gradients near 0 by their size
    assert [e["phase"] for e in two if e["event"] == "epoch"][-1] == "warmup"  # it crossed a switch


def test_bfloat16(small, tmp_path):
    run(small, tmp_path, "--dtype", "bfloat16", "--switch_epoch", 2, "--lora_warmup_epochs", 1, "--epochs", 5)
    last, freeze = weights(tmp_path), weights(tmp_path, tmp_path / "checkpoints/step_00000036")
    for name in ("blocks.0.attn.qkv.weight", "blocks.3.mlp.fc2.bias", "patch_embed.proj.weight"):
        assert freeze[f"model.{name}"].dtype == torch.float32  # the base of the freeze stays whole
        assert torch.equal(last[f"model.{name}"], freeze[f"model.{name}"].bfloat16())  # later a copy, cast once
    assert last["model.blocks.0.attn.qkv.lora_A"].dtype == last["model.pos_embed"].dtype == torch.float32
    epochs = events(tmp_path, "epoch")
    assert epochs[-1]["weight_norms"] == epochs[2]["weight_norms"]  # of the float32 weights, not of the copy
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]


# ---- the switches, one at a time

def phase_config(**changes):
    return train.Config(dtype="float32", compile=False, rank_min=4, rank_max=16, dropout=0.1, **changes)


def trained(phase="full", steps=2):
    cfg = phase_config()
    ranks = {family: [4, 8, 16, 4] for family in LORA_FAMILIES}
    model = train.build_model(cfg, phase, None if phase == "full" else ranks, "cpu")
    model.init_weights(0)
    torch.nn.init.normal_(model.head.weight)
    init_adapters(model, 0)
    optimizer = build_optimizer(model, 0.1)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    for _ in range(steps):
        model(torch.randn(4, 3, 28, 28)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return cfg, model, optimizer, ranks


def test_insertion_leaves_function_and_moments_unchanged():
    cfg, model, optimizer, ranks = trained("full")
    images = torch.randn(4, 3, 28, 28)
    before, state = model.eval()(images), get_optimizer_state(model, optimizer)
    new, new_optimizer = train.switch_phase(cfg, model, optimizer, "warmup", ranks)
    assert torch.equal(new.eval()(images), before)
    new_state = get_optimizer_state(new, new_optimizer)
    assert new_state.keys() == state.keys()  # the adapters start fresh
    assert all(torch.equal(new_state[name][key], state[name][key]) for name in state for key in state[name])
    assert {n for n, p in new.named_parameters() if p.requires_grad} == {n for n, _ in new.named_parameters()}
    with torch.no_grad():
        new.blocks[0].attn.qkv.lora_B["1"].normal_()
    assert not torch.equal(new(images), before)  # the control


@pytest.mark.parametrize("lora_trainable", ["adapters", "adapters+rest"])
def test_freeze_frees_the_base(lora_trainable):
    cfg, model, optimizer, ranks = trained("warmup")
    cfg = dataclasses.replace(cfg, lora_trainable=lora_trainable)
    images = torch.randn(4, 3, 28, 28)
    before, state = model.eval()(images), get_optimizer_state(model, optimizer)
    moments = {name: weakref.ref(s["exp_avg"]) for name, s in state.items()}
    adapter_state = {name: s["exp_avg"].clone() for name, s in state.items() if name in get_adapter_names(model)}
    new, new_optimizer = train.switch_phase(cfg, model, optimizer, "lora", ranks)
    assert torch.equal(new.eval()(images), before)
    del model, optimizer, state
    gc.collect()
    trainable = {name for name, p in new.named_parameters() if p.requires_grad}
    rest = {"head", "norm", "patch_embed", "cls_token", "pos_embed"} if lora_trainable == "adapters+rest" else set()
    assert trainable == {name for name, _ in new.named_parameters()
                         if name in get_adapter_names(new) or name.split(".")[0] in rest or rest and ".norm" in name}
    assert {name for name, moment in moments.items() if moment() is not None} == trainable  # the base's are gone from memory
    new_state = get_optimizer_state(new, new_optimizer)
    assert all(torch.equal(new_state[name]["exp_avg"], kept) for name, kept in adapter_state.items())
    new.train()(images).square().mean().backward()
    assert {name for name, p in new.named_parameters() if p.grad is not None} == trainable


def test_the_old_model_is_gone_before_the_new_phase_starts(small, tmp_path, monkeypatch):
    """In a compiled run, whose blocks stand in reference cycles: without the collection in train.py they stay for many steps."""
    compile_block, switch_phase, compile_graphs = torch.nn.Module.compile, train.switch_phase, train.compile_graphs
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile_block(self, **kw, backend="eager"))
    old, alive = {}, []

    def switching(cfg, model, *rest):
        old.update({name: weakref.ref(p) for name, p in model.named_parameters()})
        return switch_phase(cfg, model, *rest)

    def entering(*args):
        alive.append(sum(p() is not None for p in old.values()))
        return compile_graphs(*args)
    monkeypatch.setattr(train, "switch_phase", switching)
    monkeypatch.setattr(train, "compile_graphs", entering)
    torch._dynamo.reset()
    run(small, tmp_path / "run", "--compile", True, "--epochs", 7)
    assert len(old) > 50 and alive == [0, 0, 0]
    monkeypatch.setattr(train.gc, "collect", lambda: 0)  # the control
    alive.clear()
    run(small, tmp_path / "control", "--compile", True, "--epochs", 4)
    assert alive[1] > 0


# ---- graphs

def count_graphs(small, run_dir, monkeypatch, depth, backend="inductor"):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setitem(VARIANTS, "tiny-debug", dict(VARIANTS["tiny-debug"], depth=depth))
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile_block(self, **kw, backend=backend))
    records = run(small, run_dir, "--compile", True)
    ranks = [r for layers in json.loads((run_dir / "ranks.json").read_text()).values() for r in layers]
    assert len(set(ranks)) > 2  # or there would be nothing to see
    return [r for r in records if r["event"] in ("start", "switch")], torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("depth, backend", [(4, "inductor"), (3, "eager"), (7, "eager")])
def test_four_training_graphs_in_all(small, tmp_path, monkeypatch, depth, backend):
    phases, total = count_graphs(small, tmp_path / "run", monkeypatch, depth, backend)
    assert [p["graphs_compiled"] for p in phases] == [1, 1, 2]
    assert [p["eval_graphs_compiled"] for p in phases] == [1, 1, 1]
    assert total == 7  # and none later, in the epochs


def test_control_static_ranks_need_more_graphs(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "mark_ranks_dynamic", lambda model: None)
    phases, _ = count_graphs(small, tmp_path / "run", monkeypatch, 4, "eager")
    assert phases[1]["graphs_compiled"] > 1 and sum(p["graphs_compiled"] for p in phases) > 4


# ---- kills and resumes

def kill_in(phase, command, run_dir):
    """Start a run and SIGKILL it once its first epoch of `phase` is logged: it is saving then, or in the next epoch."""
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and f'"phase": "{phase}"' in "".join(
            line for line in metrics.read_text().splitlines() if '"event": "epoch"' in line)):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(events_of_a_killed_run(metrics)) < 9


def events_of_a_killed_run(metrics):
    return [line for line in metrics.read_text().splitlines() if '"event": "epoch"' in line]


@pytest.mark.parametrize("phase", ["full", "warmup", "lora"])
def test_killed_and_resumed_is_the_same_to_the_bit(small, reference, tmp_path, phase):
    run_dir = tmp_path / "run"
    command = [sys.executable, "train.py", *argv(small, run_dir)]
    kill_in(phase, command, run_dir)
    subprocess.run([*command, "--resume", "True"], cwd=REPO, check=True, capture_output=True)
    assert without_times(events(run_dir)) == without_times(events(reference))
    assert_same(weights(run_dir), weights(reference))


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["full", "warmup", "lora"])
def test_killed_and_resumed_compiled_with_ffcv(small, tmp_path, phase):
    pytest.importorskip("ffcv")
    command = [sys.executable, "train.py", *argv(small, tmp_path / "run", "--compile", True, "--loader", "ffcv", "--num_workers", 1)]
    whole = [tmp_path / "whole" if arg == str(tmp_path / "run") else arg for arg in command]
    subprocess.run(whole, cwd=REPO, check=True, capture_output=True)
    kill_in(phase, command, tmp_path / "run")
    subprocess.run([*command, "--resume", "True"], cwd=REPO, check=True, capture_output=True)
    assert without_times(events(tmp_path / "run")) == without_times(events(tmp_path / "whole"))
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_stop_in_mid_epoch_and_go_on(small, reference, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert train.main(argv(small, run_dir, "--max_steps", 5)) == 0
    assert "stopped at step 5" in capsys.readouterr().out
    for steps in (30, 36, 70):  # in mid-epoch, at the switch, in mid-warmup
        run(small, run_dir, "--max_steps", steps, "--resume", True)
        assert checkpoint.read_meta(checkpoint.latest(run_dir))["step"] == steps
        assert train.main(["--run_dir", str(run_dir), "--resume", "True"]) == 0  # nothing to do, and it says how to go on
        assert "--max_steps None goes on to 108" in capsys.readouterr().out
    run(small, run_dir, "--max_steps", None, "--resume", True)
    assert without_times(events(run_dir)) == without_times(events(reference))
    assert_same(weights(run_dir), weights(reference))
    tb = EventAccumulator(str(run_dir / "tb"))
    tb.Reload()
    assert [s.step for s in tb.Scalars("train/loss")] == list(range(12, 109, 12))  # each epoch once: none lost, none doubled


def test_extended_after_its_last_epoch_in_warmup(small, reference, tmp_path):
    """A run that ends with a phase goes on with the next one. (Its schedule was shorter, so it isn't the reference run.)"""
    run(small, tmp_path, "--epochs", 6)
    run(small, tmp_path, "--epochs", 7, "--resume", True)
    assert [e["phase"] for e in events(tmp_path, "epoch")] == ["full"] * 3 + ["warmup"] * 3 + ["lora"]


def test_resume(small, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run(small, run_dir, "--epochs", 3, "--resume", True)  # an empty run_dir starts fresh
    capsys.readouterr()
    assert train.main(argv(small, run_dir)) == 2
    assert capsys.readouterr().err == f"error: {run_dir} already holds a run: continue it with --resume True or choose another --run_dir\n"
    # a preset may say it too
    (tmp_path / "preset.py").write_text(f"resume = True\nrun_dir = {str(run_dir)!r}\n")
    assert train.main([str(tmp_path / "preset.py")]) == 0
    assert "is done: 36 steps" in capsys.readouterr().out and len(events(run_dir, "epoch")) == 3
    # the stored config is taken, what the command line says explicitly is laid over it and logged
    assert train.main(["--run_dir", str(run_dir), "--resume", "True", "--tau", "70", "--epochs", "4"]) == 0
    out = capsys.readouterr()
    assert "resume: tau = 70.0 overrides the stored 90.0" in out.err
    assert len(events(run_dir, "epoch")) == 4 and json.loads((run_dir / "config.json").read_text())["tau"] == 70
    # finished: nothing is trained, the table is printed
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert train.main(["--run_dir", str(run_dir), "--resume", "True"]) == 0
    assert "full" in capsys.readouterr().out and (run_dir / "metrics.jsonl").read_bytes() == before
    # another model, data set, order: refused
    for flag, value in (("seed", 5), ("batch_size", 60), ("mode", "full"), ("train_samples", 300), ("window_epochs", 2), ("rank_max", 16)):
        assert train.main(["--run_dir", str(run_dir), "--resume", "True", f"--{flag}", str(value)]) == 2
        assert f"was trained with {flag} =" in capsys.readouterr().err
    assert train.main(["--run_dir", str(run_dir), "--resume", "True", "--epochs", "3"]) == 2
    assert "is past the end of 3 epochs" in capsys.readouterr().err
    for name, text in (("config.json", "{"), ("config.json", "[]"), ("config.json", '{"epochs": "nine"}'), ("config.json", '{"epoch": 9}'),
                       ("checkpoints/step_00000048/meta.json", "{}"), ("metrics.jsonl", "")):
        whole = (run_dir / name).read_text()
        (run_dir / name).write_text(text)
        assert train.main(["--run_dir", str(run_dir), "--resume", "True", "--epochs", "5"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and str(run_dir / name) in err
        (run_dir / name).write_text(whole)
    for split in ("train", "t10k"):  # a data set of another size under the same name
        for kind in ("images-idx3", "labels-idx1"):
            name = Path("FashionMNIST/raw") / f"{split}-{kind}-ubyte"
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((small / name.parent / f"t10k-{kind}-ubyte").read_bytes())
    assert train.main(["--run_dir", str(run_dir), "--resume", "True", "--data_dir", str(tmp_path)]) == 2
    assert "was trained on 600 images" in capsys.readouterr().err


def test_killed_before_the_first_checkpoint_starts_over(small, reference, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text((reference / "config.json").read_text())
    (run_dir / "metrics.jsonl").write_text('{"event": "start"}\n{"event": "ep')
    run(small, run_dir, "--resume", True, "--max_steps", 12, "--epochs", 9)
    assert without_times(events(run_dir, "epoch")) == without_times(events(reference, "epoch")[:1])


# ---- the ablations' options, and forks

def test_profile(small, reference, tmp_path):
    """A trace of two steps of each phase; the run is the same, and without the flag there is none."""
    assert without_times(run(small, tmp_path / "run", "--profile", "True")) == without_times(events(reference))
    assert not (reference / "profile").exists()  # control
    assert {p.name for p in (tmp_path / "run" / "profile").iterdir()} == {"full.json", "warmup.json", "lora.json"}
    for phase, adapters in (("full", False), ("warmup", True), ("lora", True)):
        names = [event.get("name", "") for event in json.loads((tmp_path / "run" / "profile" / f"{phase}.json").read_text())["traceEvents"]]
        assert sum(name.startswith("ProfilerStep#") for name in names) == 2
        assert sum("Optimizer.step" in name for name in names) == 2
        assert any("prelora::lora_linear" in name for name in names) == adapters


@pytest.fixture(scope="module")
def baseline(small, tmp_path_factory):
    """Full training with every epoch's checkpoint kept."""
    run_dir = tmp_path_factory.mktemp("baseline") / "full"
    run(small, run_dir, "--mode", "full", "--keep_every", 1, "--eval_every", 4)
    return run_dir


FORK = ("--mode", "prelora", "--fork")  # the rest is as in the source


def test_evaluated_every_so_many_epochs(baseline):
    assert [e["epoch"] for e in events(baseline, "epoch") if e["val_top1"] is not None] == [4, 8, 9]  # and the last
    assert [e["epoch"] for e in events(baseline, "epoch") if e["val_loss"] is not None] == [4, 8, 9]


def test_step_losses_are_the_epochs_parts(reference, baseline):
    for e in events(reference, "epoch"):
        assert len(e["step_losses"]) == 12 and np.mean(e["step_losses"]) == pytest.approx(e["train_loss"], rel=1e-5)
    full = [e["step_losses"] for e in events(baseline, "epoch")]
    assert full[:3] == [e["step_losses"] for e in events(reference, "epoch")][:3] and full[0] != full[1]


@pytest.mark.parametrize("epoch", ["", "@3", "@1"])
def test_a_fork_is_the_uninterrupted_run_to_the_bit(small, reference, baseline, tmp_path, epoch):
    """The reference's settings, its full phase shared with the baseline up to the switch (found by itself, or named), or in part."""
    records = run(small, tmp_path / "fork", *FORK, f"{baseline}{epoch}")
    start = int(epoch[1:] or 3)
    assert [(r["epoch"], r["phase"]) for r in records if r["event"] == "start"] == [(start, "full")]
    drop = lambda records: [{k: v for k, v in r.items() if not k.startswith("val_")} for r in without_times(records)]
    assert drop(records) == drop(events(reference))  # the baseline was evaluated every fourth epoch only
    assert [r for r in records if r["event"] == "epoch"][:start] == events(baseline, "epoch")[:start]  # their times too
    assert_same(weights(tmp_path / "fork"), weights(reference))
    tb = EventAccumulator(str(tmp_path / "fork" / "tb"))
    tb.Reload()
    assert [s.step for s in tb.Scalars("train/loss")] == list(range(12, 109, 12))


def test_a_fork_decides_by_its_own_settings(small, baseline, tmp_path):
    """Other windows, families and rules than the source's: what counts is the logged norms."""
    run_dir = tmp_path / "fork"
    assert train.main(["--fork", str(baseline), "--run_dir", str(run_dir), "--mode", "prelora", "--tau", "90", "--zeta", "90", "--num_windows",
                       "2", "--window_epochs", "2", "--lora_warmup_epochs", "0", "--target_modules", "fc2", "q", "--epochs", "8"]) == 0
    config, epochs = json.loads((run_dir / "config.json").read_text()), events(run_dir, "epoch")
    assert config["batch_size"] == 50 and config["fork"] == str(baseline)  # without a preset the source's settings are taken
    assert [e["phase"] for e in epochs] == ["full"] * 6 + ["lora"] * 2  # windows 3-4 and 5-6: the first overlaps the warmup
    assert all(list(e["weight_norms"]) == ["fc2", "q"] for e in epochs)
    norms = [e["weight_norms"] for e in events(baseline, "epoch")]
    mean = lambda family, first: np.mean([norms[first][family], norms[first + 1][family]], axis=0)
    by_hand = {family: (100 * (mean(family, 4) / mean(family, 2) - 1)).tolist() for family in ("fc2", "q")}
    assert epochs[-1]["adapter_norms"].keys() == {"fc2", "q"}
    assert json.loads((run_dir / "ranks.json").read_text()) == train.assign_ranks(by_hand, 4, 32)


def test_a_fork_can_be_killed_and_resumed(small, reference, baseline, tmp_path):
    run_dir = tmp_path / "fork"
    run(small, run_dir, *FORK, f"{baseline}@3", "--max_steps", 40)
    run(small, run_dir, *FORK, f"{baseline}@3", "--max_steps", None, "--resume", True)
    assert_same(weights(run_dir), weights(reference))
    assert [e["epoch"] for e in events(run_dir, "epoch")] == list(range(1, 10))
    killed = tmp_path / "killed"  # before its first checkpoint: it starts over, from the fork
    killed.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (killed / name).write_bytes((run_dir / name).read_bytes())
    run(small, killed, "--resume", True, "--max_steps", 37)
    assert events(killed, "start")[0]["epoch"] == 3


def test_forks_after_the_switch(small, reference, tmp_path, capsys):
    """From a PreLoRA run: what lies ahead may differ, what was done may not."""
    longer = run(small, tmp_path / "longer", "--fork", f"{reference}@6", "--lora_warmup_epochs", 5, "--lora_trainable", "adapters+rest")
    assert [r["epoch"] for r in longer if r["event"] == "switch"] == [3, 8]
    assert longer[-1]["trainable_params"] > events(reference, "epoch")[-1]["trainable_params"]
    later = run(small, tmp_path / "later", "--fork", str(reference), "--switch_epoch", 5, "--epochs", 6)
    assert [(r["epoch"], r["phase"]) for r in later if r["event"] == "start"] == [(3, "full")]  # not what came after its own switch
    assert [r["epoch"] for r in later if r["event"] == "switch"] == [5]
    capsys.readouterr()
    for flags, reason in (("--tau 1e-6", "comes after a switch at epoch 3, these settings switch later"),
                          ("--switch_epoch 2", "comes after a switch at epoch 3, these settings switch after epoch 2"),
                          ("--lora_warmup_epochs 2", "3 epochs into its warmup, which lora_warmup_epochs = 2 would have ended"),
                          ("--rank_max 16", "trained with rank_max = 32"), ("--mode full", "trained with mode = prelora")):
        assert train.main(argv(small, tmp_path / "bad", "--fork", f"{reference}@6", *flags.split())) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and reason in err and err.count("\n") == 1


@pytest.mark.parametrize("fork, flags, reason", [
    ("nowhere", "", "no run nowhere to fork from"),
    ("{}@abc", "", "full@abc to fork from (--fork RUN, or RUN@epoch with a whole number)"),
    ("", "", "fork is empty"),
    ("{}@99", "", "keeps no checkpoint of epoch 99; it keeps those of 1, 2, 3"),
    ("{}@4", "", "keeps no checkpoint of epoch 4 that these settings share: they switch after epoch 3; it keeps"),
    ("{}@9", "--mode full", "of epoch 9 that these settings share: they end after epoch 9"),
    ("{}@3", "--max_steps 36", "of epoch 3 that these settings share: they end after epoch 3"),
    ("{}", "--model Ti/16 --rank_max 64", "patches of 16"),
    ("{}", "--batch_size 60", "trained with batch_size = 50, it can't go on with 60"),
    ("{}", "--train_samples 300", "trained with train_samples = None"),
    ("{}", "--mode lora", "is in its full phase, mode lora has none"),
])
def test_bad_forks_are_one_line(small, baseline, tmp_path, capsys, fork, flags, reason):
    assert train.main(argv(small, tmp_path / "run", *FORK, fork.format(baseline), *flags.split())) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and reason in err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def source(baseline, tmp_path):
    """A copy of the baseline, to damage."""
    return Path(shutil.copytree(baseline, tmp_path / "source", symlinks=True))


def test_a_fork_of_a_damaged_run_is_one_line(small, source, tmp_path, capsys):
    metrics = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    damaged = [("metrics.jsonl", "".join(metrics[:3]), "does not hold the epochs 1 to 3"),  # the start and two epochs
               ("metrics.jsonl", "".join(metrics[:2] + metrics[3:]), "does not hold the epochs 1 to 3"),
               ("metrics.jsonl", "".join(metrics).replace('"weight_norms"', '"norms"'), "has no weight norms of q, k, v"),
               ("metrics.jsonl", re.sub(r'"train_loss": [0-9.]+', '"train_loss": NaN', "".join(metrics)), "training loss are not finite"),
               ("checkpoints/step_00000036/meta.json", "{}", "keeps no checkpoint of epoch 3;"),
               ("checkpoints/latest", "step_00000024", "keeps no checkpoint of epoch 3;")]  # rolled back by hand: what came later is gone
    for name, text, reason in damaged:
        whole = (source / name).read_text()
        (source / name).write_text(text)
        assert train.main(argv(small, tmp_path / "run", *FORK, f"{source}@3")) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and reason in err, err
        (source / name).write_text(whole)
    assert not (tmp_path / "run").exists()


def test_a_fork_says_what_is_different_and_outlives_its_source(small, source, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run(small, run_dir, *FORK, f"{source}@2", "--seed", 7, "--max_steps", 25)
    notes = events(run_dir, "start")[0]["notes"]
    assert f"fork: seed = 7, {source} had 0" in notes and f"fork: mode = prelora, {source} had full" in notes and len(notes) == 2
    assert "fork: seed = 7" in capsys.readouterr().err
    shutil.rmtree(source)
    assert train.main(["--fork", f"{source}@2", "--run_dir", str(run_dir), "--resume", "True", "--max_steps", "36"]) == 0
    assert [e["epoch"] for e in events(run_dir, "epoch")] == [1, 2, 3]


@pytest.mark.parametrize("kept", ["keep", "reset"])
def test_optimizer_at_switch(small, baseline, tmp_path, kept):
    """Step counts of the moments: the base's after the warmup, the adapters' after the LoRA phase's first epoch."""
    run(small, tmp_path / "run", *FORK, f"{baseline}@3", "--optimizer_at_switch", kept, "--lora_warmup_epochs", 2, "--epochs", 6)
    freeze, last = weights(tmp_path / "run", tmp_path / "run/checkpoints/step_00000060"), weights(tmp_path / "run")
    steps = lambda saved, name: saved[f"optimizer.{name}.step"].item()
    assert steps(freeze, "blocks.0.attn.qkv.weight") == {"keep": 60, "reset": 24}[kept]
    assert steps(freeze, "blocks.0.attn.qkv.lora_A") == 24
    assert steps(last, "blocks.0.attn.qkv.lora_A") == {"keep": 36, "reset": 12}[kept]


def test_lora_rewarm_steps(small, reference, baseline, tmp_path):
    rewarmed = run(small, tmp_path / "run", *FORK, f"{baseline}@3", "--lora_rewarm_steps", 16, "--max_steps", 80)
    run(small, tmp_path / "run", "--resume", True, "--max_steps", None)  # in mid-rewarm
    plain, rewarmed = ([e["lr"] for e in events(d, "epoch")] for d in (reference, tmp_path / "run"))
    assert rewarmed[:6] == plain[:6] and rewarmed[7:] == plain[7:]
    assert rewarmed[6] == pytest.approx(plain[6] * 12 / 16)  # the epoch's last step is the 12th since the freeze


def test_rank_rules_use_what_minmax_uses(small, baseline, tmp_path):
    minmax, *others = [run(small, tmp_path / rule, *FORK, f"{baseline}@3", "--rank_rule", rule, "--max_steps", 37)[-1]["ranks"]
                       for rule in ("minmax", "uniform", "budget")]
    costs = {family: [5 * 64 if "fc" in family else 2 * 64] * 4 for family in LORA_FAMILIES}
    budget = train.count_parameters(minmax, costs)
    for ranks in others:
        assert 0.9 * budget < train.count_parameters(ranks, costs) <= budget and ranks != minmax
    assert len({r for layers in others[0].values() for r in layers}) == 1 < len({r for layers in others[1].values() for r in layers})
    share = run(small, tmp_path / "share", *FORK, f"{baseline}@3", "--rank_rule", "budget", "--rank_budget", 0.1, "--max_steps", 37)
    base = events(baseline, "epoch")[0]["trainable_params"]
    assert 0.09 * base < train.count_parameters(share[-1]["ranks"], costs) <= 0.1 * base


def test_lora_scaling_reaches_the_adapters():
    cfg = phase_config(lora_alpha=16.0, lora_scaling="rslora")
    model = train.build_model(cfg, "warmup", {"fc1": [4] * 4}, "cpu")
    assert torch.equal(model.blocks[0].mlp.fc1.scaling, torch.full((4, 1), 8.0))  # 16 / √4
    model = train.build_model(dataclasses.replace(cfg, lora_scaling="alpha"), "warmup", {"fc1": [4] * 4}, "cpu")
    assert torch.equal(model.blocks[0].mlp.fc1.scaling, torch.full((4, 1), 4.0))  # 16 / 4


# ---- failing well

@pytest.mark.parametrize("bad, reason", [
    ("--learning_rate 1", "unknown flag --learning_rate"),
    ("--epoch 1", "unknown flag --epoch, did you mean epochs?"),
    ("--epochs many", "--epochs"),
    ("--epochs 1.5", "--epochs"),
    ("--compile", "--compile"),
    ("--mode lra", "--mode"),
    ("stray", "no such preset: stray"),
    ("--rank_min 32 --rank_max 8", "rank_min 32 is above rank_max 8"),
    ("--rank_min 6", "rank_min must be a power of two, not 6"),
    ("--rank_min 1 --compile True", "rank_min 1 can't be compiled"),
    ("--rank_max 128", "rank_max 128 is above tiny-debug's width 64"),
    ("--grad_accum_steps 3", "batch_size 50 is not divisible by grad_accum_steps 3"),
    ("--lr 0", "lr must be above 0"),
    ("--lr nan", "lr must be a finite number"),
    ("--dropout 1.0", "dropout must be in [0, 1)"),
    ("--num_windows 1", "num_windows must be at least 2"),
    ("--switch_epoch 1", "before two windows"),
    ("--switch_epoch 9", "not before the last epoch"),
    ("--mode full --switch_epoch 4", "no meaning with mode full"),
    ("--model L/16", "can't be cut into L/16's patches of 16"),
    ("--lr_warmup_steps 108", "leaves nothing of the 108 steps"),
    ("--seed 18446744073709551616", "seed must be below"),
    ("--num_workers 999", "num_workers is 999"),
    ("--train_samples 601", "601"),
    ("--model XL/2", "unknown model 'XL/2', there are: tiny-debug"),
    ("--dataset cifar", "unknown dataset 'cifar'"),
    ("--target_modules q qq", "unknown target module 'qq'"),
    ("--target_modules q q", "target_modules must name each family once"),
    ("--batch_size 601", "601"),
    ("--profile True --batch_size 300 --lr_warmup_steps 1", "profile needs epochs of 3 steps and more, 600 images are 2"),
    ("--baseline nowhere", "no run directory nowhere"),
    ("--eval_every 0", "eval_every must be above 0"),
    ("--lora_scaling rslora", "needs --lora_alpha"),
    ("--rank_budget 0.1", "rank_budget is for rank_rule uniform or budget"),
    ("--rank_rule budget --rank_budget 0.001", "not enough for rank_min 4 in every layer"),
    ("--data_dir nowhere", "nowhere"),
    ("--data_dir nowhere --loader ffcv --num_workers 1", "nowhere"),
])
def test_bad_input_is_one_line_before_any_work(small, tmp_path, capsys, bad, reason):
    args = [bad] if bad == "stray" else argv(small, tmp_path / "run", *bad.split())
    assert train.main(args) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and reason in err and not out
    assert not (tmp_path / "run").exists()


def test_bad_input_from_a_shell(small, tmp_path):
    result = subprocess.run([sys.executable, "train.py", *argv(small, tmp_path / "run", "--lora_rank", 8)], cwd=REPO,
                            capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: unknown flag --lora_rank, did you mean lora_")
    assert result.stderr.count("\n") == 1


def test_a_compiled_run_from_a_shell(small, tmp_path):
    """In a process that has imported nothing else, as this one has; torchvision, behind the folder loader, imports much of torch."""
    pytest.importorskip("ffcv")
    command = [sys.executable, "train.py", *argv(small, tmp_path / "run", "--compile", True, "--loader", "ffcv", "--num_workers", 1,
                                                 "--max_steps", 1)]
    assert "stopped at step 1" in subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.parametrize("text, reason", [
    ("learning_rate = 1", "unknown key 'learning_rate'"),
    ("epoch = 3", "unknown key 'epoch', did you mean epochs?"),
    ("epochs = 'ten'", "epochs = 'ten' should be int"),
    ("epochs = True", "epochs = True should be int"),
    ("compile = 1", "compile = 1 should be bool"),
    ("mode = 'lra'", "mode = 'lra' should be"),
    ("target_modules = 'q'", "target_modules = 'q' should be"),
    ("lr = 0", "lr must be above 0"),
    ("rank_min = 32\nrank_max = 8", "rank_min 32 is above"),
    ("epochs = ", "SyntaxError"),
    ("epochs = 1 / 0", "ZeroDivisionError"),
    ("from config.nosuch import *", "No module named 'config.nosuch'"),
    ("raise SystemExit(0)", "SystemExit"),
    ("import os as lr", "should be float"),
])
def test_bad_preset(tmp_path, capsys, text, reason):
    (tmp_path / "preset.py").write_text(text)
    assert train.main([str(tmp_path / "preset.py"), "--run_dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and reason in err


def test_presets(tmp_path):
    (tmp_path / "preset.py").write_text(
        "import math\nfrom config.debug import *\nlr = 1\n_half = 2\nepochs = 20 // _half\ntarget_modules = ['q', 'v']\n")
    cfg, _ = train.parse_config([str(tmp_path / "preset.py"), "--epochs", "12", "--run_dir", str(tmp_path / "run"), "--lora_alpha", "None"])
    assert (cfg.lr, cfg.epochs, cfg.target_modules, cfg.lora_alpha) == (1.0, 12, ("q", "v"), None)
    assert cfg.tau == train.load_preset("config/debug.py").tau
    for preset in REPO.glob("config/*.py"):
        train.check_config(train.load_preset(preset))


def test_help_lists_every_field_with_its_comment(capsys):
    with pytest.raises(SystemExit) as e:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert e.value.code == 0
    source = (REPO / "train.py").read_text()
    for field in dataclasses.fields(train.Config):
        assert f"--{field.name} " in text
        line = next(l for l in source.splitlines() if l.startswith(f"    {field.name}: "))
        assert line.partition("  # ")[2].strip()[:25] in text, field.name


@pytest.mark.parametrize("step", [5, 50, 80])  # in each phase
def test_non_finite_stops_before_the_step(small, tmp_path, capsys, monkeypatch, step):
    captured = {}
    switch_phase, build, mixup = train.switch_phase, train.build_optimizer, train.mixup
    monkeypatch.setattr(train, "build_optimizer", lambda *a: captured.setdefault("optimizer", build(*a)))
    monkeypatch.setattr(train, "switch_phase", lambda *a: captured.update(zip(("model", "optimizer"), switch_phase(*a))) or
                        (captured["model"], captured["optimizer"]))
    run(small, tmp_path / "clean", "--max_steps", step)
    expected = weights(tmp_path / "clean")
    captured.clear()
    capsys.readouterr()

    def poisoned(images, labels, alpha, seed, number):
        return mixup(images * torch.nan if number == step else images, labels, alpha, seed, number)
    monkeypatch.setattr(train, "mixup", poisoned)
    assert train.main(argv(small, tmp_path / "run")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    phase = "full" if step < 36 else "warmup" if step < 72 else "lora"
    assert f"non-finite loss or gradient norm at step {step + 1}, epoch {step // 12 + 1}, phase {phase}" in error
    trained = [p for group in captured["optimizer"].param_groups for p in group["params"]]
    by_sum = sorted(float(p.detach().double().sum()) for p in trained)
    if step >= 36:  # the model of a later phase is in hand: weights and moments are those before the step, to the bit
        model = captured["model"]
        assert_same({f"model.{k}": v for k, v in model.state_dict().items()}, {k: v for k, v in expected.items() if k.startswith("model.")})
        state = get_optimizer_state(model, captured["optimizer"])
        assert all(torch.equal(t, expected[f"optimizer.{n}.{k}"]) for n, s in state.items() for k, t in s.items())
    else:
        assert by_sum == sorted(float(v.double().sum()) for k, v in expected.items() if k.startswith("model."))


def test_unusable_run_dir(small, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        assert train.main(argv(small, run_dir)) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and str(tmp_path / "file") in err


def test_weights_that_overflow_in_an_epochs_last_step(small, tmp_path, capsys):
    assert train.main(argv(small, tmp_path / "run", "--lr", 1e38, "--lr_warmup_steps", 0, "--grad_clip", 0, "--batch_size", 600)) == 1
    assert "epoch 1: the weight norms of ['q'" in capsys.readouterr().err


def test_loss_that_overflows_is_caught_too(small, tmp_path, capsys):
    assert train.main(argv(small, tmp_path / "run", "--lr", 1e38, "--lr_warmup_steps", 0, "--grad_clip", 0)) == 1
    assert "non-finite loss or gradient norm at step" in capsys.readouterr().err


def test_full_disk_stops_the_run_and_keeps_the_checkpoint(small, reference, tmp_path, capsys, monkeypatch):
    run_dir, save = tmp_path / "run", dcp.save

    def disk_full(tensors, checkpoint_id, **kw):
        if "step_00000060" in str(checkpoint_id):
            raise OSError(28, "No space left on device")
        return save(tensors, checkpoint_id=checkpoint_id, **kw)
    monkeypatch.setattr(dcp, "save", disk_full)
    assert train.main(argv(small, run_dir)) == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert checkpoint.latest(run_dir).name == "step_00000048"
    monkeypatch.undo()
    run(small, run_dir, "--resume", True)
    assert_same(weights(run_dir), weights(reference))


def test_static_lora_keeps_the_rest_trainable_names():
    model = train.build_model(phase_config(mode="lora"), "lora", {"q": [4] * 4}, "cpu")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "head.weight" in names and "blocks.0.norm1.weight" in names and "blocks.0.mlp.fc1.weight" not in names
    assert match_families(model, LORA_FAMILIES, ("q",))["q"][3] == ("blocks.3.attn.qkv", 0, 3)


# ---- the main job

@pytest.mark.slow
def test_debug_preset_switches_by_the_test_and_learns(tmp_path):
    if not Path("datasets/fashion_mnist/val.beton").exists():
        pytest.skip("no Fashion-MNIST: make data")
    for command in (["train.py", "config/debug.py", "--run_dir", str(tmp_path)], ["-m", "monitor.plot", str(tmp_path)]):
        result = subprocess.run([sys.executable, *command], cwd=REPO, check=True, capture_output=True, text=True)
    epochs, (switch, freeze) = events(tmp_path, "epoch"), events(tmp_path, "switch")
    assert json.loads((tmp_path / "config.json").read_text())["switch_epoch"] is None
    assert 8 < switch["epoch"] == freeze["epoch"] - 2 < 16  # it failed at least once, and left epochs to train the adapters alone
    assert epochs[-1]["val_top1"] >= 80 and epochs[-1]["phase"] == "lora"
    assert epochs[-1]["val_loss"] < epochs[freeze["epoch"] - 1]["val_loss"]  # the adapters alone still learn
    assert {p.name for p in (tmp_path / "figures").iterdir()} >= {"figure1.png", "figure3.png"} and "tensorboard" in result.stdout


# ---- on a GPU (not run without one)

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_three_phases_without_a_sync_in_the_hot_loop(small, tmp_path, monkeypatch, dtype):
    get_lr = train.get_lr

    def watched(step, *rest):  # called as each step begins; the loop looks at the device every 20 steps and at an epoch's end
        torch.cuda.set_sync_debug_mode("error" if step % 12 in range(2, 7) and (step + 1) % 20 else "default")
        return get_lr(step, *rest)
    monkeypatch.setattr(train, "get_lr", watched)
    records = run(small, tmp_path / "run", "--compile", True, "--dtype", dtype)
    phases = [r for r in records if r["event"] in ("start", "switch")]
    assert [p["graphs_compiled"] for p in phases] == [1, 1, 2]
    epochs = [r for r in records if r["event"] == "epoch"]
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"] and epochs[-1]["peak_memory_bytes"] > 0
