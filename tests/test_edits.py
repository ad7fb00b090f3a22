"""The edits that docs/edits.md shows, each applied to a copy of the repository and trained for a few steps,
through both switches."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import REPO, weights

EDITS = sorted(path.stem for path in (REPO / "docs/edits").glob("*.diff"))
# 4 steps an epoch: 2 epochs full, 1 warmup, 1 lora
SMALL = (
    "config/debug.py --loader folder --num_workers 0 --train_samples 200 --batch_size 50 --epochs 4 "
    "--lr_warmup_steps 2 --window_epochs 1 --num_windows 2 --lora_warmup_epochs 1 --compile False"
).split()
SWITCH = ["--switch_epoch", "2"]


def copy_repository(target: Path) -> Path:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (REPO / name).is_file() and not name.startswith("docs/study/"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, target / name)
    return target


@pytest.fixture
def edited(tmp_path):
    """A function that applies an edit to a copy of the repository and trains there: (status, what it said,
    events of its log)."""
    code = copy_repository(tmp_path / "code")

    def run(edit, data_dir, *flags):
        if edit:
            subprocess.run(["git", "apply", REPO / f"docs/edits/{edit}.diff"], cwd=code, check=True)
        command = [
            sys.executable,
            "train.py",
            *SMALL,
            "--data_dir",
            str(data_dir),
            "--run_dir",
            str(tmp_path / "run"),
            *flags,
        ]
        done = subprocess.run(command, cwd=code, capture_output=True, text=True)
        log = tmp_path / "run" / "metrics.jsonl"
        events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return done.returncode, done.stderr, events

    return run


def pick(events, kind):
    return [event for event in events if event["event"] == kind]


def test_there_are_seven():
    assert EDITS == ["batchnorm", "dora", "logger", "loss", "muon", "spike", "switch_rule"]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_applies_and_touches_three_files_at_most(edit):
    diff = REPO / f"docs/edits/{edit}.diff"
    subprocess.run(["git", "apply", "--check", diff], cwd=REPO, check=True)
    assert 1 <= diff.read_text().count("\ndiff --git ") + 1 <= 3


@pytest.mark.slow
def test_another_loss(edited, small):
    status, said, events = edited("loss", small, *SWITCH)
    assert status == 0, said
    first = pick(events, "epoch")[0]
    assert (
        3 < first["train_loss"] < 7.2
    )  # 10 classes' binary cross-entropies, 10 log 2 at the start; a softmax's is log 10
    assert [switch["to"] for switch in pick(events, "switch")] == ["warmup", "lora"]


@pytest.mark.slow
@pytest.mark.parametrize("edit, switches", [("switch_rule", [2]), (None, [])])
def test_another_switch_rule(edited, small, edit, switches):
    """Thresholds that Algorithm 1 does not pass, on the norms, but the rule on the loss alone does."""
    flags = ["--tau", "1e-6", "--zeta", "90", "--lr_warmup_steps", "0"]
    status, said, events = edited(edit, small, *flags)
    assert status == 0, said
    assert [switch["epoch"] for switch in pick(events, "switch") if switch["from"] == "full"] == switches


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["False", "True"])
def test_dora(edited, small, tmp_path, compiled):
    status, said, events = edited("dora", small, *SWITCH, "--compile", compiled)
    assert status == 0, said
    tensors = weights(tmp_path / "run")
    lengths = tensors["model.blocks.0.attn.qkv.weight"].norm(dim=1)
    magnitude = tensors["model.blocks.0.attn.qkv.lora_magnitude"]
    assert not torch.equal(magnitude, lengths) and torch.allclose(
        magnitude, lengths, rtol=0.2
    )  # it has been trained
    assert "optimizer.blocks.0.attn.qkv.lora_magnitude.exp_avg" in tensors
    epochs = pick(events, "epoch")
    assert (
        epochs[2]["train_loss"] < 1.2 * epochs[1]["train_loss"]
    )  # the function was unchanged when it came in


@pytest.mark.slow
def test_muon(edited, small, tmp_path):
    status, said, events = edited("muon", small, *SWITCH, "--max_steps", "10")
    assert status == 0, said
    tensors = weights(tmp_path / "run")
    assert "optimizer.blocks.0.mlp.fc1.weight.momentum_buffer" in tensors
    assert (
        "optimizer.pos_embed.exp_avg" in tensors
        and "optimizer.blocks.0.mlp.fc1.weight.exp_avg" not in tensors
    )
    # and it goes on from there, through the freeze
    status, said, events = edited(None, small, "--resume", "True", "--max_steps", "None")
    assert status == 0, said
    assert [switch["to"] for switch in pick(events, "switch")] == ["warmup", "lora"]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["False", "True"])
def test_a_model_that_is_no_vit(edited, small, tmp_path, compiled):
    status, said, events = edited("batchnorm", small, *SWITCH, "--compile", compiled)
    assert status == 0, said
    assert [switch["to"] for switch in pick(events, "switch")] == ["warmup", "lora"]
    tensors = weights(tmp_path / "run")
    assert tensors["model.blocks.0.norm.running_var"].isfinite().all()
    assert tensors["model.blocks.0.norm.num_batches_tracked"] == 16  # the steps, and nothing of the dry runs
    epochs = pick(events, "epoch")
    assert set(epochs[0]["weight_norms"]) == {"fc1", "fc2"} and epochs[-1]["val_loss"] < 3


@pytest.mark.slow
def test_another_logger(edited, small, tmp_path):
    status, said, events = edited("logger", small, *SWITCH)
    assert status == 0, said
    header, *rows = (tmp_path / "run" / "epochs.csv").read_text().splitlines()
    assert header.startswith("epoch,step,train_loss") and [row.split(",")[0] for row in rows] == [
        "1",
        "2",
        "3",
        "4",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("alpha, found", [("1e5", True), ("8", False)])
def test_finding_a_spike_at_the_freeze(edited, small, alpha, found):
    """Adapters that overshoot, once the head has learned something that they can spoil: 40 steps full."""
    flags = "--epochs 12 --switch_epoch 10 --lora_warmup_epochs 0 --lr 5e-3".split()
    status, said, events = edited("spike", small, *flags, "--lora_scaling", "alpha", "--lora_alpha", alpha)
    assert status == 0, said
    spikes = [
        event for event in pick(events, "warning") if "in the epoch before, gradient norm" in event["message"]
    ]
    assert bool(spikes) == found and all(event["step"] > 40 for event in spikes)
