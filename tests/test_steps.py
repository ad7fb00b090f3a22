"""The step that all use, and what is told of each: steps.jsonl, TensorBoard, a NaN, a kill in mid-epoch."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import (
    EPOCHS,
    FREEZE,
    STEPS,
    SWITCH,
    TOTAL_STEPS,
    argv,
    assert_same,
    assert_same_run,
    events,
    get_error,
    get_steps,
    no_figures,  # noqa: F401 (a fixture)
    resume,
    run,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed import checkpoint as dcp

import train
from config.cli import parse_config
from data.datasets import DATASETS
from data.device import normalise
from model import checkpoint
from model.optim import get_lr, get_optimizer_state
from start import build_loaders

PHASES = {2: "full", 20: "warmup", 32: "lora"}  # a step, counted from 0, in the middle of an epoch: its phase


# ---- steps.jsonl


def test_every_step_once(reference):
    steps, epochs = get_steps(reference), events(reference, "epoch")
    assert [record["step"] for record in steps] == list(range(1, TOTAL_STEPS + 1))
    assert [record["epoch"] for record in steps] == [n for n in range(1, EPOCHS + 1) for _ in range(STEPS)]
    assert all(list(record) == ["step", "epoch", "loss", "grad_norm", "lr"] for record in steps)
    for record in steps:
        lr = get_lr(record["step"] - 1, peak=1e-3, warmup_steps=STEPS, total_steps=TOTAL_STEPS)
        assert record["lr"] == lr
    for epoch in epochs:
        own = [record for record in steps if record["epoch"] == epoch["epoch"]]
        total = 0.0
        for record in own:
            total += record["loss"]
        assert total / STEPS == epoch["train_loss"]
        assert epoch["lr"] == own[-1]["lr"]
    assert all(0 < record["grad_norm"] < 100 for record in steps)


def test_step_losses_are_the_epochs_parts(reference, baseline):
    for epoch in events(reference, "epoch"):
        assert len(epoch["step_losses"]) == STEPS
        assert np.mean(epoch["step_losses"]) == pytest.approx(epoch["train_loss"], rel=1e-5)
        own = [record["loss"] for record in get_steps(reference) if record["epoch"] == epoch["epoch"]]
        assert own == pytest.approx(epoch["step_losses"], rel=1e-5)
    full = [epoch["step_losses"] for epoch in events(baseline, "epoch")]
    assert full[:3] == [epoch["step_losses"] for epoch in events(reference, "epoch")][:3]
    assert full[0] != full[1]


def test_the_first_step_by_hand(small, tmp_path):
    """Its loss and the norm of its gradient, from the loader's first batch."""
    still = "--dropout 0 --drop_path 0 --mixup 0 --grad_clip 0.01".split()
    cfg, _ = parse_config(train.Config, argv(small, tmp_path, *still))
    loader, data = build_loaders(cfg)[0], DATASETS[cfg.dataset]
    images, labels = next(loader.epoch(0))
    loader.close()
    model = train.build_model(cfg, "full", None, torch.device("cpu"))
    model.init_weights(cfg.seed)
    loss = F.cross_entropy(model.train()(normalise(images, data.mean, data.std)), labels)
    loss.backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))

    run(small, tmp_path, *still, "--max_steps", 1)
    (record,) = get_steps(tmp_path)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 0.01  # before it is clipped
    assert record["lr"] == pytest.approx(1e-3 / STEPS)


def test_steps_in_tensorboard(reference):
    tb = EventAccumulator(str(reference / "tb"), size_guidance={"scalars": 0})
    tb.Reload()
    for name in ("loss", "grad_norm", "lr"):
        shown = tb.Scalars(f"step/{name}")
        assert [scalar.step for scalar in shown] == list(range(1, TOTAL_STEPS + 1))
        values = [record[name] for record in get_steps(reference)]
        assert [scalar.value for scalar in shown] == pytest.approx(values, rel=1e-6)


# ---- one step for the loop and for compilation's dry run


def test_the_loop_and_the_dry_run_take_train_step(small, tmp_path, monkeypatch):
    calls, train_step = [], train.train_step

    def recording(cfg, model, optimizer, batches, step, lr, failed):
        skip = bool(failed)
        before = [p.detach().clone() for p in model.parameters()] if skip else []
        result = train_step(cfg, model, optimizer, batches, step, lr, failed)
        unchanged = all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
        calls.append((step, lr, skip, unchanged))
        return result

    monkeypatch.setattr(train, "train_step", recording)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: None)
    flags = "--compile True --switch_epoch 2 --lora_warmup_epochs 1 --epochs 4".split()
    run(small, tmp_path, *flags)
    dry = [call for call in calls if call[2]]
    assert dry == [(0, 0.0, True, True)] * 3  # in each phase once, without a trace in the model
    assert [i for i, call in enumerate(calls) if call[2]] == [0, 2 * STEPS + 1, 3 * STEPS + 2]
    taken = [(step, lr) for step, lr, skip, _ in calls if not skip]
    assert taken == [(record["step"] - 1, record["lr"]) for record in get_steps(tmp_path)]
    assert [step for step, _ in taken] == list(range(4 * STEPS))
    # to the bit what a run without the dry run computes, which leaves no trace in the optimiser either
    plain = tmp_path / "plain"
    run(small, plain, *flags, "--compile", "False")
    assert (plain / "steps.jsonl").read_bytes() == (tmp_path / "steps.jsonl").read_bytes()
    assert_same(weights(plain), weights(tmp_path))


# ---- stops in mid-epoch


class Killed(BaseException):
    """What no `except` of the run's may take for an error."""


def kill_after(monkeypatch, step):
    """Let the run end, as by a SIGKILL, when it begins the step after so many."""
    train_step = train.train_step

    def killed(cfg, model, optimizer, batches, number, *rest):
        if number == step:
            raise Killed
        return train_step(cfg, model, optimizer, batches, number, *rest)

    monkeypatch.setattr(train, "train_step", killed)


@pytest.mark.parametrize("step", [STEPS + 3, SWITCH * STEPS + 2, FREEZE * STEPS + 4])
def test_killed_in_mid_epoch_the_steps_are_cut_back(small, reference, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, step)
        train.main(argv(small, tmp_path))
    whole = (reference / "steps.jsonl").read_text().splitlines(keepends=True)
    assert (tmp_path / "steps.jsonl").read_text() == "".join(whole[:step])  # nothing waits in a buffer
    meta = checkpoint.read_meta(checkpoint.latest(tmp_path))
    saved = step // STEPS * STEPS
    assert meta["state"]["steps_bytes"] == len("".join(whole[:saved])) and saved < step
    assert resume(tmp_path, "--max_steps", saved + 1) == 0  # in two goes
    assert [record["step"] for record in get_steps(tmp_path)] == list(range(1, saved + 2))
    assert resume(tmp_path, "--max_steps", None) == 0
    assert_same_run(tmp_path, reference)
    tb = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0})
    tb.Reload()
    # each step once: none lost, none doubled
    assert [scalar.step for scalar in tb.Scalars("step/loss")] == list(range(1, TOTAL_STEPS + 1))


AUGMENTED = "--image_size 35 --cutmix 1 --random_erasing 0.25 --color_jitter 0.4 --rand_augment 5".split()


def test_with_everything_random_a_resumed_run_is_the_same(small, tmp_path, capsys):
    """Stopped in mid-epoch in two phases, and then with another number of workers."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    short = (
        "--train_samples 60 --epochs 4 --switch_epoch 2 --lora_warmup_epochs 1 --lr_warmup_steps 3".split()
    )
    flags = [*AUGMENTED, *short]  # 3 steps an epoch
    run(small, whole, *flags)
    assert weights(whole)["model.pos_embed"].shape == (1, 26, 64)  # 5 × 5 patches and the class token
    run(small, stopped, *flags, "--max_steps", 4)
    assert resume(stopped, "--max_steps", 8) == 0
    capsys.readouterr()
    for start in (
        ["--run_dir", stopped, "--resume", True],
        ["--run_dir", tmp_path / "fork", "--fork", stopped],
    ):
        assert train.main([str(flag) for flag in [*start, "--image_size", 28]]) == 2
        assert "was trained with image_size = 35, it can't go on with 28" in get_error(capsys)
    assert resume(stopped, "--max_steps", None, "--num_workers", 2) == 0
    assert_same_run(stopped, whole)


def test_each_augmentation_is_another_first_step(small, tmp_path):
    norms = set()  # of the gradient: the first loss is always log 10, the head is zero
    for i in range(0, len(AUGMENTED) + 1, 2):  # each is left out once, and none in the end
        flags = AUGMENTED[:i] + AUGMENTED[i + 2 :]
        run(small, tmp_path / str(i), *flags, "--max_steps", 1)
        norms.add(get_steps(tmp_path / str(i))[0]["grad_norm"])
    assert len(norms) == len(AUGMENTED) // 2 + 1


# ---- numbers that are not finite


@pytest.mark.parametrize("step", PHASES)
def test_non_finite_stops_before_the_step(small, reference, tmp_path, capsys, monkeypatch, step):
    captured = {}
    build_optimizer, build_model, mix = train.build_optimizer, train.build_model, train.mix

    def building(*args):
        captured["model"] = build_model(*args)
        return captured["model"]

    def building_optimizer(*args):
        captured["optimizer"] = build_optimizer(*args)
        return captured["optimizer"]

    def poisoned(images, *rest):
        number = rest[-1]
        return mix(images * torch.nan if number == step else images, *rest)

    run(small, tmp_path / "clean", "--max_steps", step)
    expected = weights(tmp_path / "clean")
    capsys.readouterr()

    monkeypatch.setattr(train, "build_model", building)
    monkeypatch.setattr(train, "build_on_meta", lambda *args: None)  # it builds, too
    monkeypatch.setattr(train, "count_flops", lambda *args: 1)
    monkeypatch.setattr(train, "build_optimizer", building_optimizer)
    monkeypatch.setattr(train, "mix", poisoned)
    assert train.main(argv(small, tmp_path / "run")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    where = f"at step {step + 1}, epoch {step // STEPS + 1}, phase {PHASES[step]}"
    assert error.startswith("error: ") and f"non-finite loss or gradient norm {where}" in error
    assert error.endswith(f"last checkpoint: {checkpoint.latest(tmp_path / 'run')}")
    # weights and moments are those before the step, to the bit
    model = captured["model"]
    now = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, state in get_optimizer_state(model, captured["optimizer"]).items():
        now |= {f"optimizer.{name}.{key}": tensor for key, tensor in state.items()}
    assert_same(now, expected)
    # everything before it is there, and the step itself, for which JSON has no number
    lines = (tmp_path / "run" / "steps.jsonl").read_text().splitlines(keepends=True)
    assert lines[:-1] == (reference / "steps.jsonl").read_text().splitlines(keepends=True)[:step]
    assert json.loads(lines[-1])["step"] == step + 1 and json.loads(lines[-1])["loss"] is None


def test_weights_that_overflow_in_an_epochs_last_step(small, tmp_path, capsys):
    flags = "--lr 1e38 --lr_warmup_steps 0 --grad_clip 0 --batch_size 120".split()
    assert train.main(argv(small, tmp_path / "run", *flags)) == 1
    assert "epoch 1: the weight norms of ['q'" in capsys.readouterr().err


def test_loss_that_overflows_is_caught_too(small, tmp_path, capsys):
    flags = "--lr 1e38 --lr_warmup_steps 0 --grad_clip 0".split()
    assert train.main(argv(small, tmp_path / "run", *flags)) == 1
    assert "non-finite loss or gradient norm at step" in capsys.readouterr().err


def test_full_disk_stops_the_run_and_keeps_the_checkpoint(small, reference, tmp_path, capsys, monkeypatch):
    run_dir, save = tmp_path / "run", dcp.save

    def disk_full(tensors, checkpoint_id, **kw):
        if "step_00000030" in str(checkpoint_id):
            raise OSError(28, "No space left on device")
        return save(tensors, checkpoint_id=checkpoint_id, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(dcp, "save", disk_full)
        assert train.main(argv(small, run_dir)) == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert checkpoint.latest(run_dir).name == "step_00000024"
    run(small, run_dir, "--resume", True)
    assert_same_run(run_dir, reference)
