"""freeze_mean: which epochs count, the mean by hand, and a base frozen at it: resumed, forked, sharded."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from small_runs import (
    STEPS,
    assert_same,
    assert_same_run,
    events,
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

import train
from model import checkpoint
from model.mean import WeightMean
from model.variants import VARIANTS
from monitor.convergence import get_mean_position

# full 1-4, warmup 5, lora 6-7: the mean is that of the ends of 4 and 5
ON = "--freeze_mean True --window_epochs 2 --switch_epoch 4 --lora_warmup_epochs 1 --keep_every 1".split()
COUNTED = (4 * STEPS, 5 * STEPS)


def get_positions(warmup, size, switch_epoch, phases, **changes):
    settings = dict(freeze_mean=True, mode="prelora", lora_warmup_epochs=warmup, window_epochs=size)
    cfg = SimpleNamespace(**settings, switch_epoch=switch_epoch)
    vars(cfg).update(changes)
    records = [{"phase": phase} for phase in phases]
    return [get_mean_position(records[: n + 1], cfg) for n in range(len(records))]


@pytest.mark.parametrize(
    "warmup, size, switch_epoch, phases, expected",
    [
        # a window that ends without a switch is followed by one that begins anew
        (1, 3, None, "full " * 6 + "warmup lora", [0, 1, 2, 0, 1, 2, 3, 0]),
        (0, 3, None, "full " * 6 + "lora", [1, 2, 3, 1, 2, 3, 0]),
        (3, 3, None, "full " * 3 + "warmup " * 3 + "lora", [0, 0, 0, 1, 2, 3, 0]),
        (5, 2, None, "full " * 2 + "warmup " * 5 + "lora", [0, 0, 0, 0, 0, 1, 2, 0]),
        (1, 3, 5, "full " * 5 + "warmup lora", [0, 0, 0, 1, 2, 3, 0]),  # switch_epoch is no window's end
    ],
)
def test_which_epochs_count(warmup, size, switch_epoch, phases, expected):
    assert get_positions(warmup, size, switch_epoch, phases.split()) == expected
    for off in ({"freeze_mean": False}, {"mode": "full"}):
        assert set(get_positions(warmup, size, switch_epoch, phases.split(), **off)) == {0}


def test_the_mean_by_hand():
    net, mean = nn.Linear(1, 1, bias=False), WeightMean()
    for weight, position, expected in (
        (8.0, 1, 8.0),
        (2.0, 2, 5.0),
        (2.0, 3, 4.0),
        (7.0, 1, 7.0),
        (1.0, 2, 4.0),
    ):
        nn.init.constant_(net.weight, weight)
        mean.end_epoch(net, position)
        assert mean.means["weight"].item() == pytest.approx(expected) and net.weight.item() == weight
    assert mean.put_into(net) == 2 and net.weight.item() == pytest.approx(4.0)
    assert mean.put_into(net) == 0 and net.weight.item() == pytest.approx(4.0) and not mean.get_tensors()
    mean.end_epoch(net, 1)
    mean.end_epoch(net, 0)
    assert not mean.means and not mean.count


def test_a_freeze_that_is_put_off_does_not_reach_back():
    """Third of four epochs, and then third again, because the freeze is an epoch later: the mean begins
    anew."""
    net, mean = nn.Linear(1, 1, bias=False), WeightMean()
    for weight, position in ((8.0, 1), (2.0, 2), (2.0, 3), (5.0, 3), (7.0, 4)):
        nn.init.constant_(net.weight, weight)
        mean.end_epoch(net, position)
    assert mean.count == 2 and mean.means["weight"].item() == 6.0


# ---- a run


@pytest.fixture(scope="module")
def frozen(small, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("frozen") / "run"
    run(small, run_dir, *ON)
    return run_dir


def get_model(tensors):
    """Of a checkpoint's tensors the base's weights, by name."""
    return {n: t for n, t in tensors.items() if n.startswith("model.") and "lora_" not in n}


def get_lora_base(run_dir):
    """The base's weights in the lora phase's first checkpoint, which is whole."""
    return get_model(saved_at(run_dir, 6 * STEPS))


def test_the_base_is_frozen_at_the_mean(frozen):
    first, second = (get_model(saved_at(frozen, step)) for step in COUNTED)
    base = get_lora_base(frozen)
    assert base.keys() == second.keys()
    for name, weight in base.items():
        torch.testing.assert_close(weight, (first[name] + second[name]) / 2, rtol=1e-6, atol=1e-7)
    name = "model.blocks.0.mlp.fc1.weight"
    assert (base[name] - second[name]).abs().max() > 1e-4  # the control: it is not the last weights
    assert [switch["mean_epochs"] for switch in events(frozen, "switch")] == [0, 2]
    norms = events(frozen, "epoch")[-1]["weight_norms"]["fc1"][0]
    assert norms == pytest.approx(base[name].norm().item(), rel=1e-5)


def test_a_checkpoint_has_the_mean_while_there_is_one(frozen):
    names = {
        step: [n for n in saved_at(frozen, step) if n.startswith("mean")] for step in range(6, 43, STEPS)
    }
    assert [bool(held) for held in names.values()] == [False, False, False, True, True, False, False]
    one = saved_at(frozen, COUNTED[0])
    assert one["mean_count"].item() == 1
    numbers = sum(t.numel() for n, t in one.items() if n.startswith("mean."))
    assert numbers == sum(t.numel() for t in get_model(one).values())  # one copy, of the base alone
    assert [base and base["checkpoint"] for base in map(get_base, [frozen] * 2, (36, 42))] == [
        None,
        "step_00000036",
    ]


def get_base(run_dir, step):
    return checkpoint.read_meta(run_dir / f"checkpoints/step_{step:08d}")["state"]["base"]


def test_resumed_around_the_freeze_to_the_bit(small, frozen, tmp_path):
    run_dir = tmp_path / "run"
    run(small, run_dir, *ON, "--max_steps", 21)
    for step in (
        24,
        27,
        30,
        33,
        40,
        None,
    ):  # in mid-epoch, at the switch, in the warmup, at the freeze, after it
        assert resume(run_dir, "--max_steps", step) == 0
    assert_same_run(run_dir, frozen)


def test_control_a_resume_that_loses_the_mean_is_seen(frozen, tmp_path):
    run_dir = rolled_back(frozen, tmp_path / "run", COUNTED[1])
    with mock.patch.object(WeightMean, "load", lambda *args: True):
        assert resume(run_dir) == 0
    assert events(run_dir, "switch")[-1]["mean_epochs"] == 0
    assert not torch.equal(
        weights(run_dir)["model.blocks.0.mlp.fc1.lora_A"], weights(frozen)["model.blocks.0.mlp.fc1.lora_A"]
    )


def test_forks_of_a_run_without_a_mean(small, frozen, baseline, tmp_path):
    """At the first of its epochs a fork is the whole run; later it begins where it can, and says so."""
    run(small, tmp_path / "whole", *ON, "--mode", "prelora", "--fork", f"{baseline}@4")
    assert_same(weights(tmp_path / "whole"), weights(frozen))
    run(
        small,
        tmp_path / "late",
        *ON,
        "--lora_warmup_epochs",
        0,
        "--mode",
        "prelora",
        "--fork",
        f"{baseline}@4",
    )
    assert [switch["mean_epochs"] for switch in events(tmp_path / "late", "switch")] == [1]
    said = [warning["message"] for warning in events(tmp_path / "late", "warning")]
    assert any("frozen at the mean of 1 of the last 2 epochs" in message for message in said)


def test_a_fork_at_the_freeze_that_does_not_want_the_mean(small, frozen, tmp_path):
    """Its checkpoint there has one, and is frozen at the weights of the last step all the same."""
    run(small, tmp_path / "run", *ON, "--freeze_mean", False, "--fork", f"{frozen}@5")
    assert events(tmp_path / "run", "switch")[-1]["mean_epochs"] == 0
    last, base = get_model(saved_at(frozen, COUNTED[1])), get_lora_base(tmp_path / "run")
    assert_same(base, last)


def test_without_it_nothing_is_there(reference):
    assert not any(n.startswith("mean") for step in (18, 30, 36, 42) for n in saved_at(reference, step))
    assert [switch["mean_epochs"] for switch in events(reference, "switch")] == [0, 0]


def test_it_stays_once_the_base_is_frozen(frozen, capsys):
    assert resume(frozen, "--epochs", 9, "--freeze_mean", False) == 2
    assert "was trained with freeze_mean = True" in capsys.readouterr().err


# ---- on several processes


def go_on_rank(arguments):
    with mock.patch.dict(VARIANTS["tiny-debug"], depth=2):
        return train.main([str(argument) for argument in arguments])


OPTIONS = "--lora_scaling coherent --lora_alpha 0.5 --lora_lr_factor 2 --lr_schedule wsd --lr_decay_share 0.5"


@pytest.mark.slow
def test_no_graph_is_compiled_for_it(small, tmp_path, monkeypatch):
    """Nor for the scalings and the schedules."""
    flags = [*ON, *OPTIONS.split(), "--epochs", 7]
    phases, total = count_graphs(small, tmp_path / "run", monkeypatch, 3, "eager", *flags)
    assert total == sum(p["graphs_compiled"] + p["eval_graphs_compiled"] for p in phases) == 7


@pytest.mark.parametrize("flags", ["", OPTIONS, pytest.param("--frozen_base shard", marks=pytest.mark.slow)])
def test_the_same_on_two_processes(on_ranks, small, tmp_path, flags):
    """4 steps an epoch; the sums of gradients round otherwise, so within rounding."""
    runs = {}
    for ranks in (1, 2):
        runs[ranks] = tmp_path / str(ranks)
        arguments = [
            *PLAIN,
            *ON,
            "--epochs",
            7,
            "--data_dir",
            small,
            "--run_dir",
            runs[ranks],
            *flags.split(),
        ]
        assert on_ranks(ranks, go_on_rank, arguments) == [0] * ranks
    mine, theirs = (get_model(saved_at(runs[ranks], 24)) for ranks in (2, 1))
    assert mine.keys() == theirs.keys()
    assert [n for n in theirs if not torch.allclose(mine[n], theirs[n], atol=1e-4)] == []
    first, second = (get_model(saved_at(runs[2], step)) for step in (16, 20))
    for name, weight in mine.items():
        torch.testing.assert_close(weight, (first[name] + second[name]) / 2, rtol=1e-5, atol=1e-6)
    again = rolled_back(runs[2], tmp_path / "again", 20)
    assert on_ranks(2, go_on_rank, ["--resume", True, "--run_dir", again]) == [0, 0]
    assert_same(weights(again), weights(runs[2]))
    assert without_times(events(again, "epoch")) == without_times(events(runs[2], "epoch"))
