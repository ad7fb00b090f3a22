"""bench.py: its commands run, their figures against arithmetic, and the tools they count with."""

import contextlib
import io
import json
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import bench
import train
from benchmarks import contenders, devices, estimate, flops, report, roofline, step, switch
from benchmarks.choices import get_ranks, repeat_noise
from benchmarks.fake import CASES
from errors import UserError
from lora import layers, onednn
from model.variants import LORA_FAMILIES, VARIANTS
from start import State
from train import Config, build_on_meta

CASES = list(CASES)
CPU = torch.device("cpu")
CONTRACT = {"lora_vs_peft", "full_vs_timm", "full_vs_hf", "lora_vs_full", "lora_limit", "limit_fraction"}


def run_main(argv):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = bench.main(argv.split() if isinstance(argv, str) else argv)
    assert not dist.is_initialized()
    return status, out.getvalue(), err.getvalue()


@pytest.mark.slow
def test_wire_command(on_ranks):
    ((status, out, _),) = on_ranks(1, run_main, "wire --model tiny-debug --world_size 4 --dp_shard 4")
    rows = [line.split() for line in out.splitlines() if line.startswith(CASES[-2])]
    assert status == 0 and len(rows) == 2 and all(0 < float(row[-1]) < 1 for row in rows)


@pytest.mark.slow
def test_memory_command(on_ranks):
    argv = "memory --model tiny-debug --world_size 4 --dp_shard 1 --activation_checkpointing none"
    ((status, out, _),) = on_ranks(1, run_main, argv)
    assert status == 0 and "20 -> 16 GB" in out
    rows = [line for line in out.splitlines() if line.startswith(tuple(CASES))]
    assert len(rows) == len(CASES)
    for row in rows:
        peak, _, *parts = map(float, row[52:].split())
        assert sum(parts) == pytest.approx(peak, abs=0.01) and peak > 0


@pytest.mark.parametrize(
    "argv, reason",
    [
        ("wire --world_size 1", "at least 2"),
        ("memory --dp_shard 3", "does not divide the 64 ranks"),
        ("memory --images 0", "at least 1"),
        ("memory --grad_accum_steps 0", "grad_accum_steps must be at least 1"),
        ("memory --fit 0", "above 0 GiB"),
        ("step --batch_size 0", "at least 1"),
        ("step --model tiny-debug", "patches of 16"),
        ("step --no_onednn --dtype bfloat16", "float32 on a CPU"),
        ("switch --batch_size 0", "at least 1"),
        ("estimate --gpus 1", "2 or more"),
        ("estimate --gpus 6", "fill nodes of 4"),
        ("estimate --mfu 2", "at most 1"),
        ("estimate --batch_size 100", "not divisible by 64"),
        ("estimate --images 5", "less than a batch"),
    ],
)
def test_mistakes_are_one_sentence(on_ranks, argv, reason):
    ((status, _, err),) = on_ranks(1, run_main, argv)
    assert status == 2 and reason in err and err.count("\n") == 1


def test_a_bug_is_no_sentence(monkeypatch):
    def has_a_bug(*args):
        raise ValueError("too many values to unpack (expected 2)")

    monkeypatch.setattr(step, "build_contender", has_a_bug)
    with pytest.raises(ValueError, match="too many values"):
        run_main("step --model Ti/16 --batch_size 1 --rounds 1")


@pytest.mark.slow
def test_data_command():
    pytest.importorskip("ffcv")
    status, out, err = run_main(["data", "--count", "64", "--rounds", "1", "--num_workers", "1"])
    rows = [line.split() for line in out.splitlines() if line.startswith(("FFCV", "torchvision", "limit"))]
    assert status == 0 and len(rows) == 7 and all(float(row[-2]) > 0 for row in rows), err
    assert run_main(["data", "--images", "nowhere"])[0] == 2


# ------------------------------------------------------------------------------------------------------------
# a step


def result_of(out):
    """The JSON object in the last line, as scripts read it."""
    assert out.endswith("}\n"), out
    return json.loads(out.splitlines()[-1])


TI = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 16}
TINY_RANKS = {family: [4] * VARIANTS["tiny-debug"]["depth"] for family in LORA_FAMILIES}
SMALL_RANKS = {"q": [4, 8], "k": [16, 16], "v": [16, 16], "proj": [16, 16], "fc1": [16, 16], "fc2": [16, 16]}


@pytest.fixture
def tiny_step(monkeypatch):
    monkeypatch.setitem(VARIANTS, "Ti/16", TI)  # tyro knows the names


@pytest.mark.parametrize("extra", ["", " --no_onednn"])
def test_step_command(tiny_step, monkeypatch, extra):
    callers, mm = set(), onednn.mm

    def watched(*args):
        callers.add(sys._getframe(1).f_globals["__name__"])
        return mm(*args)

    monkeypatch.setattr(onednn, "mm", watched)
    argv = f"step --model Ti/16 --ranks 8 --batch_size 2 --rounds 2 --modes eager{extra}"
    status, out, err = run_main(argv)
    assert status == 0, err
    assert ", medians of 2 rounds" in out and "in a row" not in out
    # the base's products and the adapters', or, all the while the steps run, nobody's
    fast = extra == "" and onednn.IS_FASTER
    assert callers == ({"lora.onednn", "lora.kernels"} if fast else set())
    result = result_of(out)
    assert CONTRACT <= result.keys() and result["onednn"] == (extra == "")
    assert "roofline" not in result and "roofline" not in out and "as done" not in out
    ms = result["milliseconds"]
    assert set(ms) == set(contenders.CONTENDERS) == set(result["memory_bytes"]) and min(ms.values()) > 0
    assert result["lora_vs_peft"] == pytest.approx(ms["HF + PEFT"] / ms["lora"])
    assert result["full_vs_timm"] == pytest.approx(ms["timm full"] / ms["full"])
    assert result["limit_fraction"] == pytest.approx(ms["full"] / ms["lora"] / result["lora_limit"])
    # Weights, gradients (while they are there) and moments of the peers are ours; a weight's gradient needs
    # oneDNN's copies of its factors.
    ours, theirs = result["memory_bytes"]["full"], result["memory_bytes"]["timm full"]
    assert ours == pytest.approx(theirs, rel=0.15 if extra == "" else 0.05)


def test_step_beside_a_gpu_s_roofline(tiny_step):
    """Our own phases' columns, and in JSON; the same as `bench.py roofline`'s."""
    argv = "step --model Ti/16 --ranks 8 --batch_size 2 --rounds 1 --modes eager --peers peft --device h100"
    status, out, err = run_main(argv)
    assert status == 0, err
    assert "on h100, counted, not measured" in out
    found = result_of(out)["roofline"]
    counted = roofline.roofline("Ti/16", 2, "8", "h100")
    expected = {phase: 1e3 * sum(counted[phase].values()) for phase in contenders.PHASES}
    assert found == {"device": "h100", "milliseconds": pytest.approx(expected)}
    lines = {line[:12].rstrip(): line for line in out.splitlines() if "GiB" not in line}
    title_line = next(line for line in out.splitlines() if "GiB" in line)
    ends = [title_line.index("roofline ms") + len("roofline ms"), len(title_line)]
    for phase in contenders.PHASES:
        ms, ratio = expected[phase], expected["full"] / expected[phase]
        assert lines[phase].split()[-2:] == [f"{ms:.1f}", f"{ratio:.3f}"] and len(lines[phase]) == ends[1]
    assert len(lines["HF + PEFT"]) < ends[0]


@pytest.mark.slow
def test_step_command_compiled(tiny_step):
    status, out, err = run_main("step --model Ti/16 --ranks mixed --batch_size 2 --rounds 1 --peers hf,peft")
    assert status == 0, err
    result = result_of(out)
    assert "full_vs_timm" not in result and result["eager"]["lora_vs_peft"] > 0 and result["lora_vs_peft"] > 0


def build_eager(title, cfg):
    return contenders.build_contender(title, cfg, SMALL_RANKS, CPU, repeat_noise(cfg.dataset, 2, CPU))


def test_contenders_do_the_same_work(tiny_step):
    """Counted by torch on each: the full phase's FLOPs are the peers', and so are the trained parameters. In
    LoRA PEFT multiplies by A and B in turn, and each is what `step` takes it for."""
    cfg = Config(model="Ti/16", dataset="imagenet", dtype="float32")
    counted, trained = {}, {}
    for title in contenders.CONTENDERS:
        with torch.compiler.set_stance("force_eager"):
            contender = build_eager(title, cfg)
            with FlopCounterMode(display=False) as counter:
                contender.step()
        counted[title] = counter.get_total_flops()
        trained[title] = sum(p.numel() for p in contender.model.parameters() if p.requires_grad)
        moments = [state["exp_avg"] for state in contender.optimizer.state.values()]
        assert any(moment.any() for moment in moments), f"{title} multiplies zeros"
    for count in (counted, trained):
        assert count["full"] == count["HF full"] == count["timm full"]
        assert max(count["lora"], count["HF + PEFT"]) < count["warmup"]
    assert trained["lora"] == trained["HF + PEFT"] and counted["lora"] != counted["HF + PEFT"]
    expected = flops.count_phases(cfg, SMALL_RANKS, 2)
    expected["HF + PEFT"] = flops.count_by_formula(cfg, SMALL_RANKS)
    # which torch's counter does not see in the CPU's kernel
    attention = {2 * expected[title] - counted[title] for title in expected}
    assert len(attention) == 1 and attention.pop() > 0


def test_an_edited_step_is_what_is_timed(tiny_step, monkeypatch):
    """Every contender's, ours and the peers'; and the one that compiles a phase's graphs."""
    taken, cfg = [], Config(model="Ti/16", dataset="imagenet", dtype="float32", batch_size=2)
    monkeypatch.setattr(train, "train_step", lambda cfg, model, *args: taken.append(model))
    for title in contenders.CONTENDERS:
        contender = build_eager(title, cfg)
        contender.step()
        assert taken.pop() is contender.model and not taken
    small = Config(model="tiny-debug", dataset="fashion_mnist", dtype="float32", batch_size=2)
    model = train.build_model(small, "full", None, CPU)
    optimizer = train.build_optimizer(model, 0.0)
    with torch.compiler.set_stance("force_eager"):
        train.compile_phase(small, State(), model, optimizer, CPU)
    assert taken == [model]


def test_a_step_whose_update_was_left_out_is_not_timed(tiny_step):
    cfg = Config(model="Ti/16", dataset="imagenet", dtype="float32")
    contender = build_eager("full", cfg)
    with torch.no_grad():
        contender.model.head.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="full: a loss or gradient norm was not finite"):
        step.take_turns({"full": contender}, [("eager", "full")], rounds=1)


class Watch:
    """A Stopwatch whose seconds are the steps that were taken between start and stop."""

    steps = 0

    def __init__(self, device):
        pass

    def start(self):
        self.began = Watch.steps

    def stop(self):
        self.took = Watch.steps - self.began

    def seconds(self):
        return float(self.took)


@pytest.mark.parametrize("kind, in_a_row", [("cuda", step.STEPS_ON_CUDA), ("cpu", 1)])
def test_a_turn_on_a_gpu_is_several_steps_in_a_row(monkeypatch, kind, in_a_row):
    turns = []

    class Counted(Watch):
        def stop(self):
            super().stop()
            turns.append(self.took)

    def take_step():
        Watch.steps += 1

    contender = SimpleNamespace(device=torch.device(kind), step=take_step, failed=False)
    monkeypatch.setattr(step, "Stopwatch", Counted)
    monkeypatch.setattr(step, "peak_of_step", lambda contender: 7)
    times, memory = step.take_turns({"full": contender}, [("eager", "full")], rounds=4)
    assert turns == [in_a_row] * 4 and step.STEPS_ON_CUDA > 1
    # seconds of one step, not of a turn
    assert times == {("eager", "full"): [1.0] * 4} and memory == {("eager", "full"): 7}


@pytest.mark.parametrize("model", step.VARIANTS)
def test_default_batch(model):
    assert step.get_batch_size(model, torch.device("cuda")) == 64
    assert step.get_batch_size(model, CPU) == (16 if model in ("B/16", "L/16") else 32)


def test_commands_compute_as_training_does(tiny_step, monkeypatch, capsys):
    """model.parallel.set_up_device, before a contender is there."""
    seen = []

    def set_up(device, width):
        seen.append((device, width))
        raise UserError("far enough")

    for module, command in (
        (step, lambda: step.step("Ti/16", batch_size=2)),
        (switch, lambda: switch.run_phases("Ti/16", "8", "float32", 2, "block")),
    ):
        monkeypatch.setattr(module, "set_up_device", set_up)
        with pytest.raises(UserError, match="far enough"):
            command()
        assert seen.pop() == (CPU, TI["embed_dim"]) and not seen


def test_w_plus_b_a_is_counted_once_for_all_images(tiny_step):
    """By hand, for each Linear: one product of B and A, in all row parts; in warmup two more, with dW."""
    cfg = Config(model="Ti/16", dataset="imagenet")
    one, eight = (flops.count_phases(cfg, SMALL_RANKS, images) for images in (1, 8))
    products = 0
    for module in build_on_meta(cfg, "warmup", SMALL_RANKS).modules():
        if isinstance(module, layers.LoRALinear):
            products += 2 * module.out_features * module.lora_A.numel()
    difference = {phase: one[phase] - eight[phase] for phase in contenders.PHASES}
    assert difference == {"full": 0, "warmup": 7 * 3 * products // 8, "lora": 7 * products // 8}


def test_a_run_counts_its_own_micro_batch(monkeypatch):
    """What the log has for an image is of a process's micro-batch."""
    small = Config(
        model="tiny-debug", dataset="fashion_mnist", dtype="float32", batch_size=12, grad_accum_steps=3
    )
    model = train.build_model(small, "warmup", TINY_RANKS, CPU)
    optimizer = train.build_optimizer(model, 0.0)
    with torch.compiler.set_stance("force_eager"):
        costs = train.compile_phase(small, State("warmup", TINY_RANKS), model, optimizer, CPU)
    counted = [flops.count_phases(small, TINY_RANKS, images)["warmup"] for images in (4, 12)]
    assert costs["flops_per_image"] == counted[0] != counted[1]


@pytest.mark.parametrize(
    "name, device",
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_devices_by_name(monkeypatch, name, device):
    assert devices.find_device(name) == device
    assert devices.find_own_device() is None  # on a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert devices.find_own_device() == device


@pytest.mark.slow
def test_switch_command():
    status, out, err = run_main("switch --model Ti/16 --ranks mixed --batch_size 2 --ways block")
    assert status == 0, err
    result = result_of(out)
    for temperature in ("cold", "warm"):
        records = result[f"block, {temperature}"]
        assert [r["phase"] for r in records] == ["full", "warmup", "lora"]
        assert [r["training_graphs"] for r in records] == [1, 1, 2]
        assert all(0 < r["compiling"] < r["stall"] for r in records)
    assert 0 < result["monitor"]["of_epoch"] < 0.001


def test_switch_goes_through_the_phases(tiny_step):
    """Without compiling: what the processes of the command do."""
    with torch.compiler.set_stance("force_eager"):
        records = switch.run_phases("Ti/16", "8", "float32", 2, "block")
    assert [r["phase"] for r in records] == ["full", "warmup", "lora"]
    assert all(0 < r["monitor"] and 0 < r["step"] and 0 < r["stall"] for r in records)
    assert [r["graphs"] for r in records] == [0, 0, 0]


@pytest.mark.parametrize("way, blocks, whole", [("block", 2, 0), ("static", 2, 0), ("whole", 0, 1)])
def test_the_ways_to_compile(tiny_step, way, blocks, whole):
    """What is compiled, and for what ranks."""
    with switch.compiled_as(way):
        cfg = Config(model="Ti/16", dataset="imagenet", dtype="float32")
        model = train.build_model(cfg, "warmup", SMALL_RANKS, CPU)
        uncompiled = train.build_on_meta(cfg, "warmup", SMALL_RANKS)
    assert sum(block._compiled_call_impl is not None for block in model.blocks) == blocks
    assert (model._compiled_call_impl is not None) == whole
    assert uncompiled._compiled_call_impl is None
    is_dynamic = hasattr(model.blocks[0].mlp.fc1.lora_A, "_dynamo_dynamic_indices")
    assert is_dynamic == (way == "block")


# ------------------------------------------------------------------------------------------------------------
# the estimate

GPU = "a100-40gb"  # the default
SLOW_NET = estimate.Device(
    peak_flops=1e12, memory_bandwidth=28e9, gpus_per_node=4, node_link=100.0, network=10.0
)


def test_wire_seconds_by_hand():
    node, replicas, everyone, half = (0, 1, 2, 3), (0, 4), tuple(range(8)), (0, 1, 4, 5)
    assert estimate.wire_seconds({node: 200.0}, SLOW_NET) == 2.0  # over the node's links
    assert estimate.wire_seconds({everyone: 200.0}, SLOW_NET) == 20.0  # one ring has the whole network
    assert estimate.wire_seconds({replicas: 200.0}, SLOW_NET) == 80.0  # four share it
    assert estimate.wire_seconds({half: 200.0}, SLOW_NET) == 40.0
    assert estimate.wire_seconds({node: 200.0, everyone: 200.0}, SLOW_NET) == 22.0
    assert estimate.optimizer_seconds(2_000_000_000, 2, SLOW_NET) == 1.0


def run_estimate(gpus):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        rows = estimate.estimate(gpus=gpus, model="Ti/16", batch_size=64, ranks="8", mfu=0.5)
    return rows, out.getvalue()


@mock.patch.dict(VARIANTS, {"Ti/16": TI})
def estimate_twice():
    """Rows and text for 8 GPUs, and for 16 without anything on the wire."""
    free = SimpleNamespace(by_group={})
    with (
        mock.patch.object(estimate, "build_fake"),
        mock.patch.object(estimate, "count_wire", lambda *_: free),
    ):
        more, _ = run_estimate(16)
    return *run_estimate(8), more


def test_estimate(on_ranks, tiny_step):
    ((rows, out, more),) = on_ranks(1, estimate_twice)
    assert out.startswith("ESTIMATE") and "nothing below was measured" in out and "assumed" in out
    steps, net = 1_281_167 // 64, build_on_meta(Config(model="Ti/16", dataset="imagenet"))
    params = sum(p.numel() for p in net.parameters())
    plain = rows["plain replication", "full"]
    assert plain["optimizer"] == pytest.approx(steps * 28 * params / 1555e9, rel=1e-3)
    assert rows["HSDP, dp_shard 4", "full"]["optimizer"] == pytest.approx(plain["optimizer"] / 4, rel=1e-3)
    # an all-reduce of all gradients in float32 round 8 GPUs, over 50 GB/s a node; gathering with oneself
    # costs nothing
    assert plain["wire"] == pytest.approx(steps * 2 * 4 * params * 7 / 8 / 50e9, rel=1e-2)
    for row in rows.values():
        assert max(row["compute"], row["wire"]) <= row["overlap"] <= row["serial"]
        assert row["serial"] == pytest.approx(row["compute"] + row["wire"] + row["optimizer"])
    for sharding in ("plain replication", "HSDP, dp_shard 4"):
        full, warmup, off, on = [rows[sharding, case] for case in CASES]
        assert off["compute"] == on["compute"] < full["compute"] < warmup["compute"]
        assert off["wire"] <= on["wire"] and off["wire"] < full["wire"]
    # beside the limit by FLOPs the roofline of a GPU's micro-batch
    counted = estimate.get_step_seconds(
        Config(model="Ti/16", dataset="imagenet"), get_ranks("8", "Ti/16"), 8, GPU
    )
    for phase, seconds in counted.items():
        last = [line.split() for line in out.splitlines() if line.startswith(f"{phase:8}")][-1]
        assert last[-2:] == [f"{1e3 * seconds:.1f}", f"{counted['full'] / seconds:.2f}"]
    # control: the base does travel
    assert rows["HSDP, dp_shard 4", CASES[2]]["wire"] < rows["HSDP, dp_shard 4", CASES[3]]["wire"]
    # half the images each, whose W + B A is made for fewer
    halves = {key: more[key]["compute"] - rows[key]["compute"] / 2 for key in rows}
    assert all(half == pytest.approx(0) if key[1] == "full" else half > 0 for key, half in halves.items())


# ------------------------------------------------------------------------------------------------------------
# the report

FAKE_BENCH = """
import sys
if "3" in sys.argv:
    sys.exit("error: gpus must fill nodes")
print("usage:", *sys.argv)
"""


def test_report_runs_what_is_asked_and_keeps_the_rest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench.py").write_text(FAKE_BENCH)  # which starts at once
    monkeypatch.setattr(report, "SECTIONS", {"estimate --help": "One.", "wire --help": "Two."})
    out = tmp_path / "docs" / "bench.md"
    report.write_report(str(out))
    both = out.read_text()
    assert both.count("## python bench.py") == 2 and "usage: bench.py estimate" in both
    both = both.replace("usage: bench.py estimate", "as it was").replace("usage: bench.py wire", "as it was")
    out.write_text(both)
    report.write_report(str(out), only=("wire",))
    one, two = out.read_text().split("Two.")
    assert "as it was" in one and "usage: bench.py wire" in two
    monkeypatch.setattr(report, "SECTIONS", {"estimate --gpus 3": "One."})
    with pytest.raises(UserError, match="bench.py estimate --gpus 3 failed:\nerror: gpus must fill nodes"):
        report.write_report(str(out))


@pytest.mark.parametrize("command", bench.COMMANDS)
def test_every_command_has_its_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main([command, "--help"])
    assert stop.value.code == 0 and f"usage: bench.py {command}" in capsys.readouterr().out
