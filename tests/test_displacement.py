"""monitor/displacement.py: numbers by hand, known displacements, the dense product; a run through its phases,
resumed, forked, on two processes, and its memory."""

import copy
import math
from unittest import mock

import pytest
import torch
from small_runs import (
    STEPS,
    assert_same,
    assert_same_run,
    events,
    get_steps,
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
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

import evaluate
import replay
import train
from launch import distributed
from lora.inject import add_lora, freeze_base, init_adapters, match_families
from model import checkpoint
from model.parallel import build_mesh
from model.variants import LORA_FAMILIES, VARIANTS
from monitor.displacement import Displacement
from monitor.figures import displacement_figure
from monitor.log import load_run
from monitor.plot import draw_run
from start import Start, watch_layers

FUSED = {"q": [("a", 0, 2)], "k": [("a", 1, 2)]}  # two row parts of one Linear


def build_net(rows=2, columns=17, value=1.0):
    net = nn.ModuleDict({"a": nn.Linear(columns, rows, bias=False)})
    nn.init.constant_(net["a"].weight, value)
    return net


def begin(net, families=FUSED, weight_decay=0.1):
    displacement = Displacement(net, families, 1, weight_decay)
    displacement.begin(net, 0)
    return displacement


def move(net, decay, D):
    with torch.no_grad():
        net["a"].weight.mul_(decay).add_(D)


def at(*rates):
    return lambda step: rates[step]


# ---- one weight


def test_by_hand():
    net = build_net()  # (2, 17) of ones, of which columns 0 and 16 are kept
    displacement = begin(net)
    D = torch.zeros(2, 17)
    D[0, 0], D[1, 5] = 2.0, 3.0
    move(net, 0.7 * 0.6, D)  # 1 - 3 * 0.1 and 1 - 4 * 0.1
    assert displacement.end_epoch(net, 1, 2, at(3.0, 4.0)) == {
        "displacement": {
            "base": {
                "q": {"rho": [pytest.approx(2 / (math.sqrt(17) * 5))], "cosine": [None]},
                "k": {"rho": [pytest.approx(3 / (math.sqrt(17) * 5))], "cosine": [None]},
            }
        }
    }
    D[0, 0], D[0, 16] = 3.0, 4.0
    move(net, 0.5, D)
    found = displacement.end_epoch(net, 2, 3, at(3.0, 4.0, 5.0))["displacement"]["base"]
    assert found["q"]["rho"] == [pytest.approx(5 / (math.sqrt(17) * 5))]
    assert found["q"]["cosine"] == [pytest.approx(0.6)]  # of (2, 0) and (3, 4)
    assert found["k"]["cosine"] == [None]  # none of its kept columns has moved


def test_a_known_displacement_beside_any_decay_and_without_it_another_number():
    torch.manual_seed(0)
    rates = [0.1 * (i + 1) for i in range(10)]
    decay = math.prod(1 - 0.2 * lr for lr in rates)
    D = torch.randn(48, 64)
    rhos = {}
    for taken_out in (0.2, 0.0):  # the second is the control
        net = build_net(48, 64)
        nn.init.normal_(net["a"].weight)
        displacement = begin(net, {"fc": [("a", 0, 1)]}, weight_decay=taken_out)
        move(net, decay, D)
        found = displacement.end_epoch(net, 1, 10, rates.__getitem__)
        rhos[taken_out] = found["displacement"]["base"]["fc"]["rho"][0]
    expected = D.norm().item() / (math.sqrt(48 * 64) * math.sqrt(sum(lr * lr for lr in rates)))
    assert rhos[0.2] == pytest.approx(expected, rel=1e-5)
    assert abs(rhos[0.0] / expected - 1) > 0.1


def test_decay_alone_is_no_displacement():
    """Of torch's AdamW itself, whose gradients are zero here."""
    net = build_net(48, 64)
    nn.init.normal_(net["a"].weight)
    displacement, size = begin(net, {"fc": [("a", 0, 1)]}), net["a"].weight.norm().item()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.5, weight_decay=0.1)
    for _ in range(20):
        net["a"].weight.grad = torch.zeros(48, 64)
        optimizer.step()
    assert net["a"].weight.norm().item() < 0.4 * size
    found = displacement.end_epoch(net, 1, 20, lambda step: 0.5)
    assert found["displacement"]["base"]["fc"]["rho"][0] < 1e-6


def test_a_window_whose_start_was_not_seen_is_not_reported():
    net = build_net()
    displacement = Displacement(net, FUSED, 2, 0.1)
    assert displacement.get_tensors() == {}
    assert displacement.end_epoch(net, 1, 1, at(1.0)) == {}  # no window ends
    assert displacement.end_epoch(net, 2, 2, at(1.0, 1.0)) == {} and displacement.get_tensors()
    assert displacement.end_epoch(net, 3, 3, at(1.0, 1.0, 1.0)) == {}
    assert displacement.end_epoch(net, 4, 4, lambda step: 1.0)["displacement"]["base"]["q"]["cosine"] == [
        None
    ]


def test_without_families_there_is_nothing():
    net = build_net()
    before, displacement = net["a"].weight.clone(), begin(net, {})
    displacement.follow(net, 1)
    assert displacement.end_epoch(net, 1, 1, at(1.0)) == {} and displacement.get_tensors() == {}
    assert not displacement.start and torch.equal(before, net["a"].weight)


# ---- frozen layers and adapters


def build_pair():
    torch.manual_seed(0)
    families = {"q": [("0", 0, 2), ("1", 0, 2)], "v": [("0", 1, 2), ("1", 1, 2)]}
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), families


def test_a_frozen_layer_is_at_rest_and_its_copy_is_gone():
    net, families = build_pair()
    displacement = begin(net, families)
    net[0].weight.requires_grad = False
    shaken = copy.deepcopy(net)
    displacement.follow(shaken, 0)  # at the window's start, which stays one
    with torch.no_grad():
        shaken[1].weight.mul_(0.9).add_(torch.ones(32, 32))
    found = displacement.end_epoch(shaken, 1, 1, at(1.0))["displacement"]["base"]
    assert found["q"] == {"rho": [0.0, pytest.approx(1, rel=1e-5)], "cosine": [None, None]}
    assert not any(name.endswith(".0") for name in displacement.get_tensors())
    # one that is frozen in the middle of a window: a shorter one begins there, and has none before
    net[0].weight.requires_grad = True
    displacement = begin(net, families)
    displacement.end_epoch(net, 1, 1, at(1.0))
    net[0].weight.requires_grad = False
    displacement.follow(net, 2)
    assert displacement.first_step == 2 and not displacement.before


def shake(net):
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.9).add_(0.05 * torch.randn_like(p))


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_the_adapters_are_the_dense_product(alpha):
    net, families = build_pair()
    displacement = begin(net, families)
    add_lora(net, families, {"q": [4, 8], "v": [0, 2]}, alpha)
    init_adapters(net, 0)
    displacement.follow(net, 3)  # a warmup: of the base still
    assert displacement.is_of_base()
    freeze_base(net)
    displacement.follow(net, 5)
    assert not displacement.is_of_base() and displacement.first_step == 5

    products, rates, wd = [], [0.0] * 5 + [0.3, 0.4, 0.5, 0.2, 0.1], 0.1
    for epoch, step in ((0, 5), (1, 7), (2, 10)):
        if epoch:
            shake(net)
            found = displacement.end_epoch(net, epoch, step, at(*rates))["displacement"]["adapters"]
        dense = {}
        for family, layers in families.items():
            for layer, (name, part, _) in enumerate(layers):
                B, A = net.get_submodule(name).adapter(part)
                dense[family, layer] = B.detach().double() @ A.detach().double()
        products.append(dense)
    squared = lambda rates: math.prod(1 - lr * wd for lr in rates) ** 2
    for family, layers in families.items():
        for layer in range(len(layers)):
            P0, P1, P2 = (product[family, layer] for product in products)
            D_before, D = P1 - squared(rates[5:7]) * P0, P2 - squared(rates[7:10]) * P1
            rho = D.norm().item() / (math.sqrt(16 * 32) * math.hypot(0.5, 0.2, 0.1))
            assert found[family]["rho"][layer] == pytest.approx(rho, rel=1e-9)
            cosine = None
            if D.norm():
                cosine = pytest.approx(((D * D_before).sum() / (D.norm() * D_before.norm())).item(), abs=1e-9)
            assert found[family]["cosine"][layer] == cosine
    assert (found["v"]["rho"][0], found["v"]["cosine"][0]) == (0.0, None)  # rank 0


# ---- a run: full 1-5, warmup 6-7, lora 8-10; the switch is in the middle of a window, so is the freeze

FLAGS = "--window_epochs 2 --switch_epoch 5 --epochs 10 --keep_every 1".split()
ON = [*FLAGS, "--log_displacement", True]
KINDS = {2: "base", 4: "base", 6: "base", 8: "adapters", 10: "adapters"}


@pytest.fixture(scope="module")
def logged(small, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("logged") / "run"
    run(small, run_dir, *ON)
    return run_dir


def get_logged(run_dir):
    """epoch -> what its record has."""
    records = events(run_dir, "epoch")
    return {record["epoch"]: record["displacement"] for record in records if "displacement" in record}


def get_products(tensors, linear, parts):
    """Products B A of each row part of a Linear, dense."""
    A, done, products = tensors[f"model.{linear}.lora_A"].double(), 0, []
    for part in range(parts):
        B = tensors[f"model.{linear}.lora_B.{part}"].double()
        products.append(B @ A[done : done + B.shape[1]])
        done += B.shape[1]
    return torch.cat(products)


def test_a_runs_numbers_are_those_of_its_checkpoints(logged):
    found = get_logged(logged)
    assert {epoch: list(record) for epoch, record in found.items()} == {
        e: [kind] for e, kind in KINDS.items()
    }
    rates = [record["lr"] for record in get_steps(logged)]
    wd = train.Config().weight_decay
    qkv = "blocks.2.attn.qkv"
    moved = {}
    for kind, first, last in (("base", 2, 4), ("base", 4, 6), ("adapters", 7, 8), ("adapters", 8, 10)):
        own, power = rates[first * STEPS : last * STEPS], 1 if kind == "base" else 2
        decay = math.prod(1 - lr * wd for lr in own) ** power
        W = []
        for epoch in (first, last):
            tensors = saved_at(logged, epoch * STEPS)
            base = tensors[f"model.{qkv}.weight"].double()
            W.append(base if kind == "base" else get_products(tensors, qkv, 3))
        D = (W[1] - decay * W[0]).chunk(3)[2]  # of v
        rho = D.norm().item() / (math.sqrt(D.numel()) * math.hypot(*own))
        assert 0.01 < rho < 5
        assert found[last][kind]["v"]["rho"][2] == pytest.approx(rho, rel=1e-4)
        moved[last] = D[:, ::16] if kind == "base" else D
    for before, last, kind in ((4, 6, "base"), (8, 10, "adapters")):
        a, b = moved[before], moved[last]
        cosine = ((a * b).sum() / (a.norm() * b.norm())).item()
        assert found[last][kind]["v"]["cosine"][2] == pytest.approx(cosine, abs=1e-5)
    assert found[8]["adapters"]["v"]["cosine"] == found[2]["base"]["v"]["cosine"] == [None] * 4


def copies(tensors):
    return {name: tensor for name, tensor in tensors.items() if name.startswith("displacement")}


def test_it_changes_nothing_else_and_off_nothing_is_there(small, logged, tmp_path):
    off = tmp_path / "run"
    run(small, off, *FLAGS)
    records = without_times(events(logged))
    for record in records:
        record.pop("displacement", None)
        record.pop("spectrum", None)
    assert records == without_times(events(off))
    assert (logged / "steps.jsonl").read_bytes() == (off / "steps.jsonl").read_bytes()
    tensors = weights(logged)
    assert_same({name: tensors[name] for name in tensors.keys() - copies(tensors).keys()}, weights(off))
    for path in (off / "checkpoints").glob("step_*"):
        assert not copies(held(path))
    assert not get_logged(off)


@pytest.mark.slow
def test_no_graph_is_compiled_for_it(small, tmp_path, monkeypatch):
    phases, total = count_graphs(small, tmp_path / "run", monkeypatch, 3, "eager", "--log_displacement", True)
    assert total == sum(p["graphs_compiled"] + p["eval_graphs_compiled"] for p in phases) == 7
    assert get_logged(tmp_path / "run").keys() == {1, 2, 3, 4, 5}


def test_resumed_in_the_middle_of_windows_to_the_bit(small, logged, tmp_path):
    run_dir = tmp_path / "run"
    run(small, run_dir, *ON, "--max_steps", 10)  # in the first window
    for step in (32, 45, 57, None):  # across the switch; the adapters' first and second window
        assert resume(run_dir, "--max_steps", step) == 0
        assert get_notes(run_dir) == []
    assert_same_run(run_dir, logged)


def get_notes(run_dir):
    return [note for note in events(run_dir, "start")[-1]["notes"] if note.startswith("log_displacement")]


def test_control_a_resume_that_loses_the_copies_is_seen(logged, tmp_path, monkeypatch):
    run_dir = rolled_back(logged, tmp_path / "run", 30)
    monkeypatch.setattr(Displacement, "load", lambda *args: False)
    assert resume(run_dir) == 0
    assert get_logged(run_dir).keys() == {2, 4, 8, 10} and get_logged(logged).keys() == KINDS.keys()


@pytest.mark.parametrize(
    "step, changed, was, reported",
    [
        (30, ["--lr", 2e-3], "lr 0.001", {2, 4, 8, 10}),  # in mid-window; the adapters' windows are new
        (24, ["--weight_decay", 0.05], "weight_decay 0.1", {2, 4, 6, 8, 10}),  # at a window's start
        (54, ["--lora_rewarm_steps", 3], "lora_rewarm_steps 0", {2, 4, 6, 8}),
        (24, ["--lora_rewarm_steps", 3], None, {2, 4, 6, 8, 10}),  # changes nothing of the window under way
    ],
)
def test_gone_on_with_otherwise(logged, tmp_path, step, changed, was, reported):
    run_dir = rolled_back(logged, tmp_path / "run", step)
    assert resume(run_dir, *changed) == 0
    assert get_logged(run_dir).keys() == reported
    first = {24: 4, 30: 6, 54: 10}[step]
    expected = [] if was is None else [
        f"log_displacement: {run_dir}/checkpoints/step_{step:08d} has {was}: no window that began before it "
        f"is reported, the first one begins after epoch {first}"
    ]  # fmt: skip
    assert get_notes(run_dir) == expected
    if step == 24:
        cosines = get_logged(run_dir)[6]["base"]["q"]["cosine"]
        assert (cosines == [None] * 4) == (was is not None)


def test_switched_on_in_a_fork_and_taken_over_by_one(small, logged, tmp_path):
    off = tmp_path / "off"
    assert train.main(["--fork", f"{logged}@5", "--run_dir", str(off), "--log_displacement", "False"]) == 0
    assert get_logged(off).keys() == {2, 4}  # of the epochs that they share
    on = tmp_path / "on"
    assert train.main(["--fork", f"{off}@7", "--run_dir", str(on), "--log_displacement", "True"]) == 0
    assert get_logged(on).keys() == {2, 4, 8, 10} and get_notes(on)  # the adapters' begin at the freeze
    again = tmp_path / "again"
    assert train.main(["--fork", f"{logged}@9", "--run_dir", str(again)]) == 0
    assert get_logged(again) == get_logged(logged)
    assert_same(weights(again), weights(logged))


@pytest.mark.parametrize(
    "flags, kind, still",
    [
        ("--mode full --freeze_blocks 2 --switch_epoch 2 --epochs 4 --window_epochs 2", "base", 2),
        ("--mode lora --rank_max 4 --freeze_blocks 1 --epochs 2", "adapters", 1),
    ],
)
def test_in_the_other_modes(small, tmp_path, flags, kind, still):
    run(small, tmp_path / "run", *flags.split(), "--log_displacement", True)
    found = get_logged(tmp_path / "run")
    last = found[max(found)][kind]
    assert len(found) == 2 and [list(record) for record in found.values()] == [[kind]] * 2
    for family in last.values():
        assert family["rho"][:still] == [0.0] * still and family["cosine"][:still] == [None] * still
        assert all(rho > 0 for rho in family["rho"][still:]) and None not in family["cosine"][still:]


def test_memory(logged):
    """One copy of the weights that are watched, a 16th of one, and the adapters' twice."""

    def count(path):
        kinds = {"displacement": 0, "watched": 0, "adapters": 0}
        for name, tensor in held(path).items():
            if name.startswith("displacement"):
                kinds["displacement"] += tensor.nbytes
            elif name.startswith("model.blocks.") and tensor.ndim == 2:
                kinds["adapters" if "lora" in name else "watched"] += tensor.nbytes
        return kinds

    full = count(logged / f"checkpoints/step_{5 * STEPS:08d}")
    steps = 16  # bytes
    assert full["displacement"] == full["watched"] * 17 // 16 + steps  # 64 and 256 are divisible by 16
    lora = count(logged / f"checkpoints/step_{9 * STEPS:08d}")
    assert lora["displacement"] == 2 * lora["adapters"] + steps
    net = build_net(3, 17)  # two of its columns are kept
    displacement = begin(net)
    displacement.end_epoch(net, 1, 1, at(1.0))
    assert sum(t.nbytes for t in displacement.get_tensors().values()) == 4 * 3 * (17 + 2) + steps


def test_the_figure(logged):
    records, switches = events(logged, "epoch"), events(logged, "switch")
    figure = displacement_figure(records, switches)
    rho, cosine = figure.axes
    lines = {line.get_label(): line for line in rho.get_lines() if not line.get_label().startswith("_")}
    means = [sum(get_logged(logged)[epoch]["base"]["q"]["rho"]) / 4 for epoch in (2, 4, 6)]
    assert list(lines["q"].get_xdata()) == [2, 4, 6] and list(lines["q"].get_ydata()) == pytest.approx(means)
    dashed = [line for line in rho.get_lines() if list(line.get_xdata()) == [8, 10]]
    assert len(dashed) == 6 == len(lines) - 6 and all(line.get_linestyle() == "--" for line in dashed)
    assert math.isnan(cosine.get_lines()[0].get_ydata()[0])  # no window before
    assert (
        load_run(logged).epochs == records and replay.main([str(logged)]) == 0
    )  # other readers pass it over
    assert "displacement" in draw_run(records, switches, "q", None)
    for record in records:
        record.pop("displacement", None)
    assert "displacement" not in draw_run(records, switches, "q", None)


# ---- on several processes


def displace(mesh, dim):
    """Three windows of a Linear that is sharded along a dimension, rows and columns that 2 does not divide.
    The numbers, and how many of a copy's this process holds."""
    torch.manual_seed(0)
    net = build_net(34, 35)
    place = lambda tensor: distribute_tensor(tensor, mesh, [Shard(dim)]) if mesh else tensor
    net["a"].weight = nn.Parameter(place(torch.randn(34, 35)))
    displacement, found = begin(net), []
    for window in (1, 2):
        D = place(torch.randn(34, 35))
        with torch.no_grad():
            net["a"].weight.mul_(0.9).add_(D)
        found.append(displacement.end_epoch(net, window, window, lambda step: 1.0))
    start = displacement.start["base.a"]
    held = start.to_local().numel() if mesh else start.numel()
    return found, held


def displace_on_rank():
    """By rows and by columns."""
    distributed.start()
    mesh = build_mesh(None, "cpu", distributed.TIMEOUT)
    found = [displace(mesh, dim) for dim in (0, 1)]
    distributed.finish()
    return found


def flatten(value):
    """All numbers in it, with 9 for None."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for inner in value for number in flatten(inner)]
    return [9.0 if value is None else value]


def go_on_rank(arguments):
    """train.py on this process, with two blocks."""
    with mock.patch.dict(VARIANTS["tiny-debug"], depth=2):
        return train.main([str(argument) for argument in arguments])


def test_a_sharded_weight(on_ranks):
    alone, size = displace(None, 0)
    assert 9.0 not in flatten(alone[1]) and size == 34 * 35
    found_on_ranks = on_ranks(2, displace_on_rank)
    for dim, uneven in ((0, 17 * 35), (1, 34 * 18)):
        for both in found_on_ranks:
            found, held_here = both[dim]
            assert flatten(found) == pytest.approx(flatten(alone), rel=1e-6, abs=1e-6)
            assert held_here in (uneven, size - uneven)


def test_a_run_on_two_processes_and_gone_on_with_on_one(on_ranks, small, tmp_path, monkeypatch):
    """4 steps an epoch, windows of 2 epochs, full 1-5, warmup 6-7, lora 8-10."""
    flags = [*PLAIN, *ON, "--lora_warmup_epochs", 2, "--data_dir", small, "--run_dir"]
    both, alone = tmp_path / "both", tmp_path / "alone"
    assert on_ranks(2, go_on_rank, [*flags, both]) == [0, 0]
    assert on_ranks(1, go_on_rank, [*flags, alone]) == [0]
    assert get_logged(both).keys() == get_logged(alone).keys() == KINDS.keys()
    # Measuring is the same to 1e-6, see above; the trained weights themselves differ by rounding.
    assert flatten(get_logged(both)) == pytest.approx(flatten(get_logged(alone)), rel=1e-5, abs=1e-5)

    again = rolled_back(both, tmp_path / "again", 20)
    assert on_ranks(2, go_on_rank, ["--resume", True, "--run_dir", again]) == [0, 0]
    assert get_logged(again) == get_logged(both)
    assert_same(weights(again), weights(both))
    for epoch, kind in ((5, "base"), (9, "adapters")):
        monkeypatch.setitem(VARIANTS["tiny-debug"], "depth", 2)
        rolled = rolled_back(both, tmp_path / kind, 4 * epoch)
        path = checkpoint.latest(rolled)
        assert_same(load_alone(path).get_tensors(), copies(held(path)))  # to the bit
        assert resume(rolled) == 0
        mine, theirs = get_logged(rolled)[epoch + 1][kind], get_logged(both)[epoch + 1][kind]
        assert flatten(mine) == pytest.approx(flatten(theirs), rel=1e-5, abs=1e-5)


def load_alone(path):
    """What follows the checkpoint's model on this process alone."""
    meta = checkpoint.read_meta(path)
    cfg, s = evaluate.load_checkpoint(path, meta)
    model = evaluate.build_checkpoint(cfg, s, path)
    if s.phase == "lora":
        freeze_base(model)
    families = match_families(model, LORA_FAMILIES, cfg.target_modules)
    return watch_layers(cfg, Start(state=s, checkpoint=path, meta=meta), model, families)
