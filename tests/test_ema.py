"""model/ema.py: the averages against timm's and against arithmetic; through the phases of a run, saved,
resumed, forked, sharded, evaluated, exported."""

import copy
import json
import math
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from small_runs import (
    EPOCHS,
    FREEZE,
    STEPS,
    TOTAL_STEPS,
    argv,
    assert_same,
    assert_same_run,
    events,
    get_error,
    held,
    no_figures,  # noqa: F401 (a fixture)
    resume,
    rolled_back,
    run,
    saved_at,
    weights,
    without_times,
)
from test_parallel import PLAIN
from test_train import count_graphs
from timm.utils import ModelEmaV3
from torch import nn

import evaluate
import export
import train
from lora.inject import get_adapter_names, merge_lora
from model import checkpoint, parallel
from model.ema import Ema, get_local
from model.variants import VARIANTS

DECAY = 0.95
ON = ["--ema_decay", DECAY]
METRICS = ["loss", "top1", "top5"]
VAL_EMA = [f"val_ema_{name}" for name in METRICS]


# ---- one model, some steps


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.norm, self.head = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.norm(self.base(x)))


def build_net():
    torch.manual_seed(0)
    return Net()


def train_some(net, steps, after_each):
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for step in range(steps):
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(step))
        net.train()(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after_each()


def get_averaged(net, ema):
    """A copy of the model that has the averages."""
    net = copy.deepcopy(net)
    ema.put_into(net)
    return net


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.9998])
def test_the_arithmetic_is_timms(decay):
    net = build_net()
    ema, theirs = Ema(net, decay), ModelEmaV3(net, decay, exclude_buffers=True)
    for _ in range(3):
        train_some(net, 5, lambda: (ema.update(), theirs.update(net)))
        assert_same(dict(get_averaged(net, ema).state_dict()), dict(theirs.module.state_dict()))
    assert int(theirs.module.norm.num_batches_tracked) == 15  # buffers are the last step's in both
    other = ModelEmaV3(net, decay, exclude_buffers=True)  # the control: another start
    assert not torch.equal(other.module.base.weight, ema.averages["base.weight"])


def test_by_hand():
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 1.0)
    ema = Ema(net, 0.75)
    for weight, average in ((3.0, 1.5), (-1.5, 0.75), (0.75, 0.75)):  # 3/4 of the average, 1/4 of the weight
        nn.init.constant_(net.weight, weight)
        ema.update()
        assert ema.averages["weight"].item() == average and net.weight.item() == weight


def test_without_decay_there_is_nothing():
    net = build_net()
    before, ema = copy.deepcopy(dict(net.state_dict())), Ema(net, 0.0)
    ema.update(), ema.follow(net), ema.put_into(net)
    assert not ema.averages and not ema.get_tensors()
    assert_same(dict(net.state_dict()), before)


def test_a_frozen_parameters_average_is_what_stepping_would_give():
    """Frozen one after the other, and one of them trained again: e = W + d^n (e0 - W)."""
    net = build_net()
    ema, theirs = Ema(net, 0.9), ModelEmaV3(net, 0.9, exclude_buffers=True)
    stages = [set(), {"base.weight"}, {"base.weight", "head.bias"}, {"head.bias"}]
    for frozen in stages:
        for name, p in net.named_parameters():
            p.requires_grad = name not in frozen
        ema.follow(net)
        kept = {name: ema.averages[name].clone() for name in frozen}
        train_some(net, 10, lambda: (ema.update(), theirs.update(net)))
        assert ema.trained.keys() == dict(net.named_parameters()).keys() - frozen
        assert_same({name: ema.averages[name] for name in frozen}, kept)  # not touched in the steps
        assert ema.share == pytest.approx(0.9**10 if frozen else 0.0)
        averaged = get_averaged(net, ema)
        for name, p in theirs.module.named_parameters():
            torch.testing.assert_close(averaged.get_parameter(name), p, rtol=1e-5, atol=1e-7)
            assert frozen == set() or not torch.equal(p, net.get_parameter(name))  # or nothing is shown


def test_swapped_in_and_out_to_the_bit():
    net = build_net()
    ema = Ema(net, 0.9)
    train_some(net, 5, ema.update)
    net.base.weight.requires_grad = False
    ema.follow(net)
    train_some(net, 5, ema.update)
    averaged, before = get_averaged(net, ema), copy.deepcopy(dict(net.state_dict()))
    own, places = copy.deepcopy(ema.averages), {name: p.data_ptr() for name, p in net.named_parameters()}
    x = torch.randn(9, 5)
    expected = averaged.eval()(x)
    assert not torch.equal(expected, net.eval()(x))
    with ema.swapped_in(net):
        assert torch.equal(net(x), expected)
        assert_same(dict(net.state_dict()), dict(averaged.state_dict()))
    assert_same(dict(net.state_dict()), before)
    assert_same(ema.averages, own)
    assert places == {name: p.data_ptr() for name, p in net.named_parameters()}  # what a graph was made for


# ---- a run through three phases


class Stepped:
    """The averages by the definition, each of a plain tensor in each step, of a run of train.py."""

    def __init__(self):
        self.averages, self.at = {}, {}

    @contextmanager
    def watching(self):
        train_step, save, follow = train.train_step, checkpoint.save, Ema.follow

        def following(ema, model):
            for name, p in model.named_parameters():
                self.averages.setdefault(name, p.detach().clone())
            follow(ema, model)

        def stepping(cfg, model, *args):
            result = train_step(cfg, model, *args)
            for name, p in model.named_parameters():
                self.averages[name] = DECAY * self.averages[name] + (1 - DECAY) * p.detach()
            return result

        def saving(run_dir, model, optimizer, meta, *rest):
            self.at[meta["state"]["step"]] = dict(self.averages)
            return save(run_dir, model, optimizer, meta, *rest)

        with (
            mock.patch.object(train, "train_step", stepping),
            mock.patch.object(checkpoint, "save", saving),
            mock.patch.object(Ema, "follow", following),
        ):
            yield


@pytest.fixture(scope="module")
def stepped():
    return Stepped()


@pytest.fixture(scope="module")
def averaged(small, tmp_path_factory, stepped):
    """The reference run with averages."""
    run_dir = tmp_path_factory.mktemp("averaged") / "run"
    with stepped.watching():
        run(small, run_dir, *ON, "--keep_every", 1)
    return run_dir


def load(path, ema=True):
    """(Config, model) of a checkpoint, with its averages, or its weights."""
    cfg, s = evaluate.load_checkpoint(path, checkpoint.read_meta(path))
    return cfg, evaluate.build_checkpoint(cfg, s, path, ema=ema)


def get_paths(run_dir):
    return sorted((run_dir / "checkpoints").glob("step_*"))


def test_every_checkpoints_averages_are_the_definitions(averaged, stepped):
    assert len(get_paths(averaged)) == EPOCHS
    for path in get_paths(averaged):
        expected = stepped.at[int(path.name.removeprefix("step_"))]
        _, model = load(path)
        _, raw = load(path, ema=False)
        assert dict(model.named_parameters()).keys() == expected.keys()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-5, atol=1e-6)
        far = max((p - raw.get_parameter(name)).abs().max().item() for name, p in model.named_parameters())
        assert far > 1e-4  # the control: the weights themselves would not do
    tensors = weights(averaged)
    frozen_for = TOTAL_STEPS - FREEZE * STEPS
    assert tensors["ema_share"].item() == pytest.approx(DECAY**frozen_for, rel=1e-12)


def test_averages_change_nothing_else_and_without_them_nothing_is_there(averaged, reference):
    records = without_times(events(averaged))
    for record in records:
        for name in VAL_EMA:
            assert (record.pop(name, None) is None) == (record["event"] != "epoch")
    assert records == without_times(events(reference))
    assert (averaged / "steps.jsonl").read_bytes() == (reference / "steps.jsonl").read_bytes()
    assert_same(without_averages(weights(averaged)), weights(reference))
    assert not any(name.startswith("ema") for path in get_paths(reference) for name in held(path))
    assert not any("ema" in key for record in events(reference) for key in record)


def evaluated(capsys, *arguments):
    """What evaluate.py's last line says."""
    capsys.readouterr()
    assert evaluate.main([str(argument) for argument in arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("epoch", [2, 4, 7])
def test_evaluated_beside_the_weights(averaged, capsys, epoch):
    record = events(averaged, "epoch")[epoch - 1]
    path = get_paths(averaged)[epoch - 1]
    raw, own = evaluated(capsys, path), evaluated(capsys, path, "--ema", True)
    assert (raw["ema"], own["ema"]) == (False, True)
    for name in METRICS:
        assert raw[f"val_{name}"] == pytest.approx(record[f"val_{name}"], rel=1e-5)
        assert own[f"val_{name}"] == pytest.approx(record[f"val_ema_{name}"], rel=1e-5)
    assert not math.isclose(record["val_loss"], record["val_ema_loss"], rel_tol=1e-4)
    merged = evaluated(capsys, path, "--ema", True, "--merged", True)
    assert merged["val_loss"] == pytest.approx(record["val_ema_loss"], rel=1e-5)


def test_in_tensorboard_and_on_the_console(averaged, small, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(averaged / "tb"))
    shown.Reload()
    for name in METRICS:
        values = [event.value for event in shown.Scalars(f"val/ema_{name}")]
        assert values == pytest.approx([epoch[f"val_ema_{name}"] for epoch in events(averaged, "epoch")])
    run(small, tmp_path / "run", *ON, "--epochs", 2, "--eval_every", 2)
    first, second = events(tmp_path / "run", "epoch")
    assert "val_ema_top1" not in first  # not evaluated
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert f"EMA top-1 {second['val_ema_top1']:.2f}" in lines[1] and "EMA" not in lines[0]


@pytest.mark.slow
def test_no_graph_is_compiled_for_them(small, tmp_path, monkeypatch):
    phases, total = count_graphs(small, tmp_path / "run", monkeypatch, 3, "eager", *ON)
    assert total == sum(p["graphs_compiled"] + p["eval_graphs_compiled"] for p in phases) == 7
    assert "val_ema_top1" in events(tmp_path / "run", "epoch")[-1]


# ---- saved and resumed


def test_the_lora_phases_checkpoints_leave_out_the_bases_averages(averaged, reference):
    freeze, *later = [path for path in get_paths(averaged) if int(path.name[-2:]) >= FREEZE * STEPS]
    _, model = load(later[-1])
    adapters = get_adapter_names(model)
    names = {name for name, _ in model.named_parameters()}
    assert {name for name in held(freeze) if name.startswith("ema.")} == {f"ema.{name}" for name in names}
    for path in later:
        assert checkpoint.get_base(path) == freeze
        mine = {f"ema.{name}" for name in adapters}
        assert {name for name in held(path) if name.startswith("ema.")} == mine

    def size(path):
        return sum(file.stat().st_size for file in path.glob("*.distcp"))

    numbers = sum(p.numel() for name, p in model.named_parameters() if name in adapters)
    more = size(later[-1]) - size(reference / "checkpoints" / later[-1].name)
    assert 4 * numbers < more < 4 * numbers + 2000 * len(adapters)  # adapters in float32, and their headers
    base = 4 * sum(p.numel() for name, p in model.named_parameters() if name not in adapters)
    assert size(freeze) - size(reference / "checkpoints" / freeze.name) > base


def test_resumed_in_the_middle_of_each_phase_to_the_bit(small, averaged, tmp_path):
    run_dir = tmp_path / "run"
    run(small, run_dir, *ON, "--keep_every", 1, "--max_steps", 10)  # full
    for step, phase in ((10, "full"), (27, "warmup"), (33, "lora"), (40, "lora"), (None, None)):
        if phase:
            assert resume(run_dir, "--max_steps", step) == 0
            state = checkpoint.read_meta(checkpoint.latest(run_dir))["state"]
            assert (state["step"], state["phase"]) == (step, phase) and state["epoch_step"]
    assert resume(run_dir, "--max_steps", None) == 0
    assert_same_run(run_dir, averaged)


def test_control_a_resume_that_loses_the_averages_is_seen(averaged, tmp_path, monkeypatch):
    run_dir = rolled_back(averaged, tmp_path / "run", 36)
    monkeypatch.setattr(Ema, "load", lambda *args: False)
    assert resume(run_dir) == 0
    now, before = weights(run_dir), weights(averaged)
    lost = {key.split(".")[0] for key in now if not torch.equal(now[key], before[key])}
    assert lost == {"ema", "ema_share"}


def get_notes(run_dir):
    return [note for note in events(run_dir, "start")[-1]["notes"] if note.startswith("ema_decay")]


def test_switched_on_and_off_on_resume(averaged, tmp_path):
    """Each time they begin at the weights; a base's older averages are none of theirs."""
    run_dir = rolled_back(averaged, tmp_path / "run", 36)
    assert resume(run_dir, "--ema_decay", 0, "--max_steps", 38) == 0
    path = checkpoint.latest(run_dir)
    assert get_notes(run_dir) == [
        f"ema_decay 0: the averages of the weights in {run_dir}/checkpoints/step_00000036 are dropped"
    ]
    assert not any(name.startswith("ema") for name in held(path))

    assert resume(run_dir, "--ema_decay", DECAY, "--max_steps", 39) == 0
    assert get_notes(run_dir) == [
        f"ema_decay: {path} has no averages of the weights, they start from its weights"
    ]
    before, after, tensors = saved_at(run_dir, 38), saved_at(run_dir, 39), held(checkpoint.latest(run_dir))
    (_, own), (_, raw) = load(checkpoint.latest(run_dir)), load(checkpoint.latest(run_dir), ema=False)
    adapters = get_adapter_names(own)
    assert "ema.blocks.0.attn.qkv.weight" in held(checkpoint.get_base(path))
    assert tensors["ema_share"].item() == 0
    for name, p in own.named_parameters():
        expected = raw.get_parameter(name).detach()
        if name in adapters:
            expected = torch.lerp(before[f"model.{name}"], after[f"model.{name}"], 1 - DECAY)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-8)
    assert resume(run_dir, "--max_steps", None) == 0
    assert get_notes(run_dir) == []
    assert_same(without_averages(weights(run_dir)), without_averages(weights(averaged)))


def without_averages(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("ema")}


def test_another_decay_on_resume_counts_from_there(averaged, tmp_path):
    """The base's share is a product of both."""
    run_dir = rolled_back(averaged, tmp_path / "run", 36)
    assert resume(run_dir, "--ema_decay", 0.5, "--max_steps", 38) == 0
    share = held(checkpoint.latest(run_dir))["ema_share"].item()
    assert share == pytest.approx(DECAY**6 * 0.5**2, rel=1e-12)


def test_forked_in_the_lora_phase(averaged, tmp_path):
    """The fork's first checkpoint is whole, with the base's averages; in the end all is the source's."""
    run_dir = tmp_path / "fork"
    assert train.main(["--fork", f"{averaged}@6", "--run_dir", str(run_dir), "--max_steps", "39"]) == 0
    first = checkpoint.latest(run_dir)
    assert checkpoint.get_base(first) is None
    freeze = saved_at(averaged, FREEZE * STEPS)
    assert torch.equal(held(first)["ema.norm.weight"], freeze["ema.norm.weight"])
    assert resume(run_dir, "--max_steps", None) == 0
    assert_same(weights(run_dir), weights(averaged))


@pytest.mark.parametrize(
    "flags, share",
    [
        # 3 epochs frozen
        ("--mode full --freeze_blocks 2 --switch_epoch 2 --window_epochs 3 --epochs 5", DECAY ** (3 * STEPS)),
        # its base never moved
        ("--mode lora --epochs 2", 0.0),
    ],
)
def test_in_the_other_modes(small, tmp_path, flags, share):
    run_dir, stepped = tmp_path / "run", Stepped()
    with stepped.watching():
        run(small, run_dir, *ON, *flags.split())
    path = checkpoint.latest(run_dir)
    assert weights(run_dir)["ema_share"].item() == pytest.approx(share, rel=1e-12)
    _, model = load(path)
    expected = stepped.at[int(path.name.removeprefix("step_"))]
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_averages_of_init_from_start_from_its_weights(averaged, small, tmp_path):
    out = tmp_path / "out"
    export.export(str(averaged), export.Export("timm", str(out)))
    still = ["--max_steps", 1, "--lr", 1e-30, "--lr_warmup_steps", 0]
    run(small, tmp_path / "run", *ON, "--init_from", out / "model.safetensors", *still)
    found, saved = load_file(out / "model.safetensors"), weights(tmp_path / "run")
    assert_same({name: saved[f"ema.{name}"] for name in found}, found)


def test_a_step_that_is_not_finite_leaves_the_last_averages_saved(small, averaged, tmp_path, monkeypatch):
    mix = train.mix

    def poisoned(images, labels, mixup, cutmix, seed, number):
        return mix(images * torch.nan if number == 20 else images, labels, mixup, cutmix, seed, number)

    with monkeypatch.context() as patch:
        patch.setattr(train, "mix", poisoned)
        assert train.main(argv(small, tmp_path / "run", *ON)) == 1
    assert checkpoint.latest(tmp_path / "run").name == "step_00000018"
    assert_same(weights(tmp_path / "run"), saved_at(averaged, 18))


# ---- on several processes


def go_on_rank(arguments):
    """train.py on this process, with two blocks: its status, whether weights were the same to the bit before
    and after they were evaluated, and how many numbers of averages it held in the end."""
    swapped_in, seen = Ema.swapped_in, {"restored": True, "held": 0}

    @contextmanager
    def watching(ema, model):
        parallel.reshard(model)
        before = [get_local(p.detach()).clone() for p in model.parameters()]
        with swapped_in(ema, model):
            yield
        after = [get_local(p.detach()) for p in model.parameters()]
        seen["restored"] &= all(map(torch.equal, before, after))
        seen["held"] = sum(get_local(average).numel() for average in ema.averages.values())

    two_blocks = mock.patch.dict(VARIANTS["tiny-debug"], depth=2)
    with two_blocks, mock.patch.object(Ema, "swapped_in", watching):
        seen["status"] = train.main([str(argument) for argument in arguments])
    return seen


@pytest.fixture(scope="module")
def go(on_ranks, small, tmp_path_factory):
    """go(ranks, flag, …) -> the run's directory: 4 steps an epoch, full 1-3, warmup 4, lora 5-6."""

    def go(ranks, *flags, **environment):
        run_dir = tmp_path_factory.mktemp("go") / "run"
        short = ["--epochs", 6, "--lora_warmup_epochs", 1, "--keep_every", 1]
        arguments = [*PLAIN, *short, *ON, "--data_dir", small, "--run_dir", run_dir, *flags]
        go.seen = on_ranks(ranks, go_on_rank, arguments, **environment)
        assert [(seen["status"], seen["restored"]) for seen in go.seen] == [(0, True)] * ranks
        return run_dir

    return go


@pytest.fixture(scope="module")
def on_one(go):
    return go(1)


def get_averages(run_dir, step):
    return {name: t for name, t in saved_at(run_dir, step).items() if name.startswith("ema")}


@pytest.mark.parametrize(
    "ranks, flags, per_node",
    [
        (2, "", 2),
        pytest.param(2, "--frozen_base shard", 2, marks=pytest.mark.slow),
        pytest.param(2, "--dp_shard 1", 2, marks=pytest.mark.slow),
        pytest.param(4, "--freeze_blocks 1", 2, marks=pytest.mark.slow),  # HSDP
    ],
)
def test_the_same_on_several_processes(go, on_one, on_ranks, tmp_path, ranks, flags, per_node):
    reference = go(1, *flags.split()) if "freeze" in flags else on_one
    run_dir = go(ranks, *flags.split(), LOCAL_WORLD_SIZE=per_node)
    for step in (12, 16, 24):  # of each phase the last
        mine, theirs = get_averages(run_dir, step), get_averages(reference, step)
        assert mine.keys() == theirs.keys() and len(theirs) > 30
        assert [n for n in theirs if not torch.allclose(mine[n], theirs[n], atol=1e-4)] == []
        raw, name = saved_at(run_dir, step), "blocks.0.mlp.fc1.weight"
        assert (raw[f"model.{name}"] - mine[f"ema.{name}"]).abs().max() > 1e-3  # or nothing is shown
    for mine, theirs in zip(events(run_dir, "epoch"), events(reference, "epoch"), strict=True):
        for name in VAL_EMA:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5)
        assert mine["val_ema_loss"] != mine["val_loss"]
    # of a base that stands whole on each process, too, a process has its shard
    shards = 1 if "dp_shard" in flags else per_node
    everything = sum(tensor.numel() for tensor in get_averages(run_dir, 24).values())
    for seen in go.seen:
        assert everything / shards == pytest.approx(seen["held"], rel=0.05)

    # resumed in the lora phase: on as many processes to the bit, on one within rounding
    again = rolled_back(run_dir, tmp_path / "again", 20)
    other = rolled_back(run_dir, tmp_path / "other", 20)
    go_on = ["--resume", True, "--run_dir"]
    on_ranks(ranks, go_on_rank, [*go_on, again], LOCAL_WORLD_SIZE=per_node)
    assert_same(weights(again), weights(run_dir))
    assert without_times(events(again, "epoch")) == without_times(events(run_dir, "epoch"))
    assert on_ranks(1, go_on_rank, [*go_on, other])[0]["status"] == 0
    mine, theirs = get_averages(other, 24), get_averages(run_dir, 24)
    assert [n for n in theirs if not torch.allclose(mine[n], theirs[n], atol=1e-4)] == []


# ---- exported


@pytest.mark.parametrize("phase, step", [("full", 12), ("warmup", 24), ("lora", 42)])
def test_an_exports_weights_are_the_averages(averaged, tmp_path, capsys, phase, step):
    path = averaged / f"checkpoints/step_{step:08d}"
    assert export.main([str(path), "--format", "timm", "--ema", "True", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"phase {phase}" in said and "those of the averaged model" in said
    found = load_file(tmp_path / "out/model.safetensors")
    _, model = load(path)
    assert_same(found, dict(merge_lora(model).state_dict()))
    card = (tmp_path / "out/README.md").read_text()
    assert "exponential moving average over the optimiser steps, decay 0.95" in card
    record = events(averaged, "epoch")[step // STEPS - 1]
    assert f"loss {record['val_ema_loss']:.4f}" in card and f"loss {record['val_loss']:.4f}" not in card
    # evaluated as a file it is what the run's log says
    flags = ["--dataset", "fashion_mnist", "--loader", "folder", "--data_dir"]
    file = evaluated(capsys, tmp_path / "out/model.safetensors", *flags, get_data(averaged))
    assert file["val_loss"] == pytest.approx(record["val_ema_loss"], rel=1e-5)
    assert export.main([str(path), "--format", "timm", "--out", str(tmp_path / "raw")]) == 0  # the control
    raw = load_file(tmp_path / "raw/model.safetensors")
    assert any(not torch.equal(raw[name], found[name]) for name in raw)
    assert "moving average" not in (tmp_path / "raw/README.md").read_text()


def get_data(run_dir):
    return json.loads((run_dir / "config.json").read_text())["data_dir"]


def test_an_exported_adapter_goes_with_the_averaged_base(averaged, tmp_path):
    pytest.importorskip("peft")
    asked = export.Export("hf", str(tmp_path / "out"), adapters_only=True, ema=True)
    assert "in PEFT are those of the averaged model" in export.export(str(averaged), asked)
    _, model = load(checkpoint.latest(averaged))
    base = load_file(tmp_path / "out/base/model.safetensors")
    _, raw = load(checkpoint.latest(averaged), ema=False)
    assert torch.equal(base["vit.layernorm.weight"], model.norm.weight)
    assert not torch.equal(model.norm.weight, raw.norm.weight)
    adapter = load_file(tmp_path / "out/adapter_model.safetensors")
    assert any(torch.equal(t, model.blocks[0].mlp.fc1.lora_A) for t in adapter.values())


# ---- refused


def test_without_averages_it_is_one_sentence(reference, averaged, tmp_path, capsys):
    sentence = "has no averages of the weights (its run had ema_decay 0): leave out --ema"
    assert evaluate.main([str(reference), "--ema", "True"]) == 2
    assert sentence in get_error(capsys)
    out = str(tmp_path / "out")
    assert export.main([str(reference), "--format", "timm", "--ema", "True", "--out", out]) == 2
    assert sentence in get_error(capsys)
    assert not (tmp_path / "out").exists()
    export.export(str(averaged), export.Export("timm", out))
    file = f"{out}/model.safetensors"
    capsys.readouterr()
    assert evaluate.main([file, "--dataset", "fashion_mnist", "--ema", "True"]) == 2
    assert "is no run, it has no averages of its weights: leave out --ema" in get_error(capsys)


@pytest.mark.parametrize("decay", [1, -0.1, "nan"])
def test_a_decay_that_is_none(small, tmp_path, capsys, decay):
    assert train.main(argv(small, tmp_path / "run", "--ema_decay", decay)) == 2
    assert "ema_decay must be" in get_error(capsys)
    assert not (tmp_path / "run").exists()
