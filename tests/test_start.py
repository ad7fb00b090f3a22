"""Where a run begins: killed and resumed, stopped and gone on, forked from another, and what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from slurm_cluster import wait
from small_runs import (
    EPOCHS,
    FREEZE,
    REPO,
    STEPS,
    SWITCH,
    TOTAL_STEPS,
    argv,
    assert_same,
    assert_same_run,
    events,
    flip,
    get_empty_preset,
    get_error,
    get_steps,
    no_figures,  # noqa: F401 (a fixture)
    resume,
    run,
    saved_at,
    weights,
    without_times,
    write_meta,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import start
import train
from config.cli import typed_config
from errors import UserError
from lora.ranks import assign_ranks, count_parameters
from model import checkpoint
from model.optim import get_lr
from model.variants import LORA_FAMILIES, LORA_REST
from start import count_base

slow = pytest.mark.slow


def get_epoch_steps_in_tensorboard(run_dir) -> list[int]:
    tb = EventAccumulator(str(run_dir / "tb"))
    tb.Reload()
    return [scalar.step for scalar in tb.Scalars("train/loss")]


EACH_EPOCH_ONCE = list(range(STEPS, TOTAL_STEPS + 1, STEPS))

# ---- kills and resumes


def get_epochs_of_a_killed_run(run_dir) -> list[str]:
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        return []
    return [line for line in metrics.read_text().splitlines() if '"event": "epoch"' in line]


def kill_in(phase, command, run_dir):
    """Start a run and SIGKILL it once its first epoch of `phase` is logged: it is saving then, or in the next
    epoch."""
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while f'"phase": "{phase}"' not in "".join(get_epochs_of_a_killed_run(run_dir)):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(get_epochs_of_a_killed_run(run_dir)) < EPOCHS


@pytest.mark.parametrize(
    "phase", [pytest.param("full", marks=slow), "warmup", pytest.param("lora", marks=slow)]
)
def test_killed_and_resumed_is_the_same_to_the_bit(small, reference, tmp_path, phase):
    run_dir = tmp_path / "run"
    kill_in(phase, [sys.executable, "train.py", *argv(small, run_dir)], run_dir)
    run(small, run_dir, "--resume", True)
    assert_same_run(run_dir, reference)


@slow
@pytest.mark.parametrize("phase", ["full", "warmup", "lora"])
def test_killed_and_resumed_compiled_with_ffcv(small, tmp_path, phase):
    pytest.importorskip("ffcv")
    flags = "--compile True --loader ffcv --num_workers 1".split()
    whole, cut = (
        [sys.executable, "train.py", *argv(small, tmp_path / name, *flags)] for name in ("whole", "cut")
    )
    subprocess.run(whole, cwd=REPO, check=True, capture_output=True)
    kill_in(phase, cut, tmp_path / "cut")
    subprocess.run([*cut, "--resume", "True"], cwd=REPO, check=True, capture_output=True)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_stop_in_mid_epoch_and_go_on(small, reference, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert train.main(argv(small, run_dir, "--max_steps", 5)) == 0
    assert "stopped at step 5" in capsys.readouterr().out
    # in mid-epoch, at the switch, in mid-warmup, at the freeze, one step after it
    for steps in (15, SWITCH * STEPS, 27, FREEZE * STEPS, FREEZE * STEPS + 1):
        run(small, run_dir, "--max_steps", steps, "--resume", True)
        assert checkpoint.read_meta(checkpoint.latest(run_dir))["state"]["step"] == steps
        assert resume(run_dir) == 0  # nothing to do, and it says how to go on
        assert f"--max_steps None goes on to {TOTAL_STEPS}" in capsys.readouterr().out
    run(small, run_dir, "--max_steps", None, "--resume", True)
    assert_same_run(run_dir, reference)
    assert get_epoch_steps_in_tensorboard(run_dir) == EACH_EPOCH_ONCE  # none lost, none doubled


def test_extended_after_its_last_epoch_in_warmup(small, tmp_path):
    """A run that ends with a phase goes on with the next one. (Its schedule was shorter, so it isn't the
    reference run.)"""
    run(small, tmp_path, "--epochs", FREEZE)
    run(small, tmp_path, "--epochs", FREEZE + 1, "--resume", True)
    phases = [epoch["phase"] for epoch in events(tmp_path, "epoch")]
    assert phases == ["full"] * 3 + ["warmup"] * 2 + ["lora"]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A run of three epochs that began with --resume True in a folder that was not there."""
    folder = tmp_path_factory.mktemp("finished")
    run_dir, preset = folder / "run", get_empty_preset(folder)
    assert train.main([preset, *argv(small, run_dir, "--epochs", 3, "--resume", True)]) == 0
    return run_dir


def test_a_run_that_is_there_is_left_alone(small, finished, capsys):
    assert train.main(argv(small, finished)) == 2
    reason = f"{finished} already holds a run: continue it with --resume True or choose another --run_dir"
    assert get_error(capsys) == f"error: {reason}\n"


def test_a_finished_run_prints_its_table_and_trains_nothing(finished, tmp_path, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    # a preset may say it too
    (tmp_path / "preset.py").write_text(f"resume = True\nrun_dir = {str(finished)!r}\n")
    for args in ([str(tmp_path / "preset.py")], ["--run_dir", str(finished), "--resume", "True"]):
        assert train.main(args) == 0
        out = capsys.readouterr().out
        assert f"is done: {3 * STEPS} steps" in out and "full" in out
    assert (finished / "metrics.jsonl").read_bytes() == before and len(events(finished, "epoch")) == 3


@pytest.fixture
def longer(finished, tmp_path):
    """A copy of it, to go on with."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_resumed_run_takes_the_stored_config_and_explicit_flags(longer, capsys):
    assert resume(longer, "--tau", 70, "--epochs", 4) == 0
    said = capsys.readouterr().err
    assert "resume: tau = 70.0 overrides the stored 90.0" in said
    # after the cosine's end: from its last step to where a cosine of four epochs is by then
    lrs = [step["lr"] for step in get_steps(longer)[17:19]]
    note = (
        f"resume: the learning rate was {lrs[0]:.4g} at step 18 and goes on at {lrs[1]:.4g}; the schedule of "
        "4 epochs ends at step 24"
    )
    assert note in said and note in events(longer, "start")[-1]["notes"] and lrs[1] > 10 * lrs[0]
    assert len(events(longer, "epoch")) == 4 and json.loads((longer / "config.json").read_text())["tau"] == 70
    # another model, data set, order: refused
    changed = "seed 5, batch_size 60, mode full, train_samples 110, window_epochs 2, rank_max 16".split(", ")
    for flag in changed:
        name, value = flag.split()
        assert resume(longer, f"--{name}", value) == 2
        assert f"was trained with {name} =" in get_error(capsys)
    assert resume(longer, "--epochs", 3) == 2
    assert "is past the end of 3 epochs" in get_error(capsys)


def test_the_learning_rate_is_said_where_the_schedule_is_another(small, baseline, tmp_path, capsys):
    """Of a fork too, and not where nothing changes it."""
    run_dir, fork = tmp_path / "run", [*FORK, f"{baseline}@2"]
    for i, flags in enumerate((["--epochs", 9], ["--epochs", 9], ["--epochs", 9, "--lr", 1e-4])):
        source = ["--resume", True] if i else fork
        run(small, run_dir, *source, *flags, "--max_steps", 2 * STEPS + 1 + i)
        lrs = [step["lr"] for step in [*get_steps(baseline)[: 2 * STEPS], *get_steps(run_dir)]]
        said = capsys.readouterr().err
        kind, step = ("resume" if i else "fork"), 2 * STEPS + i
        before, after = (f"{lr:.4g}" for lr in lrs[step - 1 : step + 1])
        note = f"{kind}: the learning rate was {before} at step {step} and goes on at {after};"
        assert (note in said) == (i != 1), said
    assert "the schedule of 9 epochs ends at step 54" in said and lrs[-1] < lrs[-2] / 5


PAST = [
    (
        SWITCH,
        "--switch_epoch 2",
        "switch_epoch 2 is in the past of {}: --switch_epoch 3 is the first that is not",
    ),
    (4, "--switch_epoch 5", "{} has switched after epoch 3, switch_epoch can't be 5"),
    (
        4,
        "--lora_warmup_epochs 0",
        "{} is 1 epochs into its warmup, which lora_warmup_epochs = 0 would have ended",
    ),
    (EPOCHS, "--switch_epoch 4", "{} has switched after epoch 3, switch_epoch can't be 4"),
    (EPOCHS, "--lora_warmup_epochs 3", "{} comes after a warmup of 2 epochs, lora_warmup_epochs can't be 3"),
]


@pytest.mark.parametrize("at, flags, reason", PAST)
def test_what_a_run_has_behind_it_cannot_be_changed(
    small, reference, four, tmp_path, capsys, at, flags, reason
):
    """Nothing is touched; what fits the past is taken."""
    run_dir = Path(shutil.copytree(four if at == 4 else reference, tmp_path / "run"))
    (run_dir / "checkpoints/latest").write_text(f"step_{at * STEPS:08d}")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert resume(run_dir, *flags.split()) == 2
    assert reason.format(checkpoint.latest(run_dir)) in get_error(capsys)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def four(small, tmp_path_factory):
    """The reference run's first four epochs: one of them in the warmup."""
    run_dir = tmp_path_factory.mktemp("four") / "run"
    run(small, run_dir, "--max_steps", 4 * STEPS)
    return run_dir


def test_what_fits_the_past_is_taken(reference, four, tmp_path, capsys):
    """The control: the epochs at which the run did switch, by name; a warmup that ends just now."""
    finished = Path(shutil.copytree(reference, tmp_path / "finished"))
    assert resume(finished, "--switch_epoch", SWITCH, "--lora_warmup_epochs", 2) == 0
    at_the_switch = Path(shutil.copytree(reference, tmp_path / "at_the_switch"))
    (at_the_switch / "checkpoints/latest").write_text(f"step_{SWITCH * STEPS:08d}")
    flags = ["--switch_epoch", SWITCH, "--max_steps", SWITCH * STEPS + 1]
    assert resume(at_the_switch, *flags) == 0
    assert [record["epoch"] for record in events(at_the_switch, "switch")] == [SWITCH]
    warmed = Path(shutil.copytree(four, tmp_path / "warmed"))
    assert resume(warmed, "--lora_warmup_epochs", 1, "--max_steps", 4 * STEPS + 1) == 0
    assert [record["epoch"] for record in events(warmed, "switch")] == [SWITCH, 4]


def test_a_fork_after_the_freeze_has_its_warmup(small, reference, tmp_path, capsys):
    fork = [*FORK, f"{reference}@6", "--lora_warmup_epochs", 1]
    assert train.main(argv(small, tmp_path / "run", *fork)) == 2
    assert "comes after a warmup of 2 epochs, lora_warmup_epochs can't be 1" in get_error(capsys)


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"epochs": "nine"}'),
        ("config.json", '{"epoch": 9}'),
        ("checkpoints/step_00000018/meta.json", "{}"),
        ("metrics.jsonl", ""),
        ("steps.jsonl", ""),
    ],
)
def test_a_damaged_file_is_named(longer, capsys, name, text):
    if name.endswith("meta.json"):
        write_meta((longer / name).parent, json.loads(text))  # else it would be passed over
    else:
        (longer / name).write_text(text)
    assert resume(longer, "--epochs", 5) == 2
    assert str(longer / name) in get_error(capsys)


def test_a_missing_log_is_named(longer, capsys):
    (longer / "steps.jsonl").unlink()
    assert resume(longer, "--epochs", 5) == 2
    assert f"{longer}/steps.jsonl is missing" in get_error(capsys)


def test_a_data_set_of_another_size_under_the_same_name(small, tmp_path, capsys):
    run(small, tmp_path / "run", "--train_samples", None, "--batch_size", 100, "--max_steps", 1)
    for split in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            name = Path("FashionMNIST/raw") / f"{split}-{kind}-ubyte"
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((small / name.parent / f"t10k-{kind}-ubyte").read_bytes())
    capsys.readouterr()
    assert resume(tmp_path / "run", "--data_dir", tmp_path) == 2
    assert "was trained on 600 images" in get_error(capsys)


def test_killed_before_the_first_checkpoint_starts_over(small, reference, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text((reference / "config.json").read_text())
    (run_dir / "metrics.jsonl").write_text('{"event": "start"}\n{"event": "ep')
    (run_dir / "steps.jsonl").write_text('{"step": 1, "epoch": 1, "lo')
    run(small, run_dir, "--resume", True, "--max_steps", STEPS)
    assert without_times(events(run_dir, "epoch")) == without_times(events(reference, "epoch")[:1])
    assert get_steps(run_dir) == get_steps(reference)[:STEPS]


# ---- forks

FORK = ("--mode", "prelora", "--fork")  # the rest is as in the source


@pytest.mark.parametrize("epoch", ["", pytest.param("@3", marks=slow), "@1"])
def test_a_fork_is_the_uninterrupted_run_to_the_bit(small, reference, baseline, tmp_path, epoch):
    """The reference's settings, its full phase shared with the baseline up to the switch (found by itself, or
    named), or in part."""
    run_dir = tmp_path / "fork"
    records = run(small, run_dir, *FORK, f"{baseline}{epoch}")
    start = int(epoch[1:] or SWITCH)
    assert [(r["epoch"], r["phase"]) for r in records if r["event"] == "start"] == [(start, "full")]

    def without_evaluation(records):  # the baseline was evaluated every third epoch only
        return [
            {key: value for key, value in record.items() if not key.startswith("val_")}
            for record in without_times(records)
        ]

    assert without_evaluation(records) == without_evaluation(events(reference))
    epochs = [record for record in records if record["event"] == "epoch"]
    assert epochs[:start] == events(baseline, "epoch")[:start]  # their times too
    assert_same(weights(run_dir), weights(reference))
    assert get_steps(run_dir) == get_steps(reference)[start * STEPS :]  # its own ones
    assert get_epoch_steps_in_tensorboard(run_dir) == EACH_EPOCH_ONCE


def test_a_fork_decides_by_its_own_settings(small, baseline, tmp_path):
    """Other windows, families and rules than the source's: what counts is the logged norms."""
    run_dir = tmp_path / "fork"
    flags = (
        "--mode prelora --tau 90 --zeta 90 --num_windows 2 --window_epochs 2 --lora_warmup_epochs 0 "
        "--target_modules fc2 q --epochs 8"
    ).split()
    assert train.main(["--fork", str(baseline), "--run_dir", str(run_dir), *flags]) == 0
    config, epochs = json.loads((run_dir / "config.json").read_text()), events(run_dir, "epoch")
    # without a preset the source's settings are taken
    assert config["batch_size"] == 20 and config["fork"] == str(baseline)
    # windows 3-4 and 5-6: the first overlaps the learning rate's warmup
    assert [epoch["phase"] for epoch in epochs] == ["full"] * 6 + ["lora"] * 2
    assert all(list(epoch["weight_norms"]) == ["fc2", "q"] for epoch in epochs)
    norms = [epoch["weight_norms"] for epoch in events(baseline, "epoch")]
    by_hand = {}
    for family in ("fc2", "q"):
        before, last = (np.mean([norms[first][family], norms[first + 1][family]], axis=0) for first in (2, 4))
        by_hand[family] = (100 * (last / before - 1)).tolist()
    assert epochs[-1]["adapter_norms"].keys() == {"fc2", "q"}
    assert json.loads((run_dir / "ranks.json").read_text()) == assign_ranks(by_hand, 4, 32)


def test_a_fork_can_be_killed_and_resumed(small, reference, baseline, tmp_path):
    run_dir = tmp_path / "fork"
    run(small, run_dir, *FORK, f"{baseline}@3", "--max_steps", 20)
    run(small, run_dir, *FORK, f"{baseline}@3", "--max_steps", None, "--resume", True)
    assert_same(weights(run_dir), weights(reference))
    assert [epoch["epoch"] for epoch in events(run_dir, "epoch")] == list(range(1, EPOCHS + 1))
    assert get_steps(run_dir) == get_steps(reference)[SWITCH * STEPS :]
    killed = tmp_path / "killed"  # before its first checkpoint: it starts over, from the fork
    killed.mkdir()
    for name in ("config.json", "metrics.jsonl", "steps.jsonl"):
        (killed / name).write_bytes((run_dir / name).read_bytes())
    run(small, killed, "--resume", True, "--max_steps", SWITCH * STEPS + 1)
    assert events(killed, "start")[0]["epoch"] == SWITCH


def test_forks_after_the_switch(small, reference, tmp_path, capsys):
    """From a PreLoRA run: what lies ahead may differ, what was done may not."""
    flags = "--lora_warmup_epochs 3 --lora_trainable adapters+rest".split()
    longer = run(small, tmp_path / "longer", "--fork", f"{reference}@{FREEZE}", *flags)
    assert [record["epoch"] for record in longer if record["event"] == "switch"] == [3, 6]
    assert longer[-1]["trainable_params"] > events(reference, "epoch")[-1]["trainable_params"]
    flags = "--switch_epoch 5 --epochs 6".split()
    later = run(small, tmp_path / "later", "--fork", str(reference), *flags)
    # not what came after its own switch
    starts = [(record["epoch"], record["phase"]) for record in later if record["event"] == "start"]
    assert starts == [(SWITCH, "full")]
    assert [record["epoch"] for record in later if record["event"] == "switch"] == [5]
    capsys.readouterr()
    for flags, reason in (
        ("--tau 1e-6", "comes after a switch at epoch 3, these settings switch later"),
        ("--switch_epoch 2", "comes after a switch at epoch 3, these settings switch after epoch 2"),
        ("--lora_warmup_epochs 1", "2 epochs into its warmup, which lora_warmup_epochs = 1 would have ended"),
        ("--rank_max 16", "trained with rank_max = 32"),
        ("--mode full", "trained with mode = prelora"),
    ):
        fork = f"{reference}@{FREEZE}"
        assert train.main(argv(small, tmp_path / "bad", "--fork", fork, *flags.split())) == 2
        assert reason in get_error(capsys)


@pytest.mark.parametrize(
    "fork, flags, reason",
    [
        ("nowhere", "", "fork: no run directory nowhere: there is no run in . (--fork RUN,"),
        ("{}@abc", "", "are full (--fork RUN, or RUN@epoch with a whole number)"),
        ("", "", "fork is empty"),
        ("{}@99", "", "keeps no checkpoint of epoch 99; it keeps those of 1, 2, 3"),
        (
            "{}@4",
            "",
            "keeps no checkpoint of epoch 4 that these settings share: they switch after epoch 3; it keeps",
        ),
        ("{}@7", "--mode full", "of epoch 7 that these settings share: they end after epoch 7"),
        ("{}@3", "--max_steps 18", "of epoch 3 that these settings share: they end after epoch 3"),
        ("{}", "--model Ti/16 --rank_max 64", "patches of 16"),
        ("{}", "--batch_size 60", "trained with batch_size = 20, it can't go on with 60"),
        ("{}", "--train_samples 110", "trained with train_samples = 120"),
        ("{}", "--mode lora", "is in its full phase, mode lora has none"),
    ],
)
def test_bad_forks_are_one_line(small, baseline, tmp_path, capsys, fork, flags, reason):
    assert train.main(argv(small, tmp_path / "run", *FORK, fork.format(baseline), *flags.split())) == 2
    assert reason in get_error(capsys)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def source(baseline, tmp_path):
    """A copy of the baseline, to damage."""
    return Path(shutil.copytree(baseline, tmp_path / "source", symlinks=True))


def test_a_fork_of_a_damaged_run_is_one_line(small, source, tmp_path, capsys):
    metrics = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    unnamed = "".join(metrics).replace('"weight_norms"', '"norms"')
    not_a_number = re.sub(r'"train_loss": [0-9.]+', '"train_loss": NaN', "".join(metrics))
    damaged = [
        # the start and two epochs
        ("metrics.jsonl", "".join(metrics[:3]), "does not hold the epochs 1 to 3"),
        ("metrics.jsonl", "".join(metrics[:2] + metrics[3:]), "line 3 has epoch 3 after epoch 1"),
        ("metrics.jsonl", unnamed, "has no weight norms of q, k, v"),
        ("metrics.jsonl", not_a_number, "training loss is not finite"),
        ("checkpoints/step_00000018/meta.json", "{}", "keeps no checkpoint of epoch 3;"),
        # rolled back by hand: what came later is gone
        ("checkpoints/latest", "step_00000012", "keeps no checkpoint of epoch 3;"),
    ]
    for name, text, reason in damaged:
        whole = (source / name).read_text()
        (source / name).write_text(text)
        assert train.main(argv(small, tmp_path / "run", *FORK, f"{source}@3")) == 2
        assert reason in get_error(capsys)
        (source / name).write_text(whole)
    assert not (tmp_path / "run").exists()


def test_a_fork_says_what_is_different_and_outlives_its_source(small, source, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run(small, run_dir, *FORK, f"{source}@2", "--seed", 7, "--max_steps", 13)
    notes = events(run_dir, "start")[0]["notes"]
    assert sorted(notes) == [
        f"fork: mode = prelora, {source} had full",
        f"fork: seed = 7, {source} had 0",
    ]
    assert "fork: seed = 7" in capsys.readouterr().err
    shutil.rmtree(source)
    assert resume(run_dir, "--fork", f"{source}@2", "--max_steps", 18) == 0
    assert [epoch["epoch"] for epoch in events(run_dir, "epoch")] == [1, 2, 3]


# ---- the lora phase's checkpoints, and the base that they name


def get_state(run_dir, step) -> dict:
    return checkpoint.read_meta(run_dir / f"checkpoints/step_{step:08d}")["state"]


def get_base_step(run_dir, step) -> int | None:
    """The step of the base that the checkpoint of `step` needs, once that base is found to be right; None:
    that checkpoint is whole."""
    base = checkpoint.get_base(run_dir / f"checkpoints/step_{step:08d}")
    assert (base is None) == (get_state(run_dir, step)["base"] is None)
    return base and int(base.name[5:])


def get_steps_of_checkpoints(run_dir) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*"))


def assert_holds(run_dir, step, trained) -> None:
    """The checkpoint itself holds these parameters and their moments, and nothing else."""
    path = run_dir / f"checkpoints/step_{step:08d}"
    moments = {f"{name}.{key}" for name in trained for key in ("exp_avg", "exp_avg_sq", "step")}
    assert checkpoint.get_stored(path, "model.").keys() == trained
    assert checkpoint.get_stored(path, "optimizer.").keys() == moments


def get_parameters(run_dir, step, rest) -> tuple[set[str], set[str]]:
    """(all, trained) parameters of the lora phase that the checkpoint of `step` is in, by their names."""
    cfg = train.Config(dtype="float32", compile=False)
    model = train.build_model(cfg, "warmup", get_state(run_dir, step)["ranks"], "meta")
    names = {name for name, _ in model.named_parameters()}
    of_rest = {name for name in names if any(fnmatchcase(name, pattern) for pattern in LORA_REST)}
    assert "head.weight" in of_rest and "blocks.0.norm1.bias" in of_rest
    return names, {name for name in names if ".lora_" in name} | (of_rest if rest else set())


def test_a_lora_phase_saves_its_adapters(small, reference):
    names, trained = get_parameters(reference, 42, rest=False)
    assert len(trained) < len(names)
    freeze = reference / "checkpoints/step_00000030"
    assert checkpoint.get_stored(freeze, "model.").keys() == names and get_base_step(reference, 30) is None
    for step in (36, 42):
        assert get_base_step(reference, step) == 30
        assert_holds(reference, step, trained)
    ids = {checkpoint.read_meta(path)["id"] for path in (reference / "checkpoints").glob("step_*")}
    assert len(ids) == 4


def test_without_a_warmup_the_base_is_of_the_full_phase(small, baseline, tmp_path):
    flags = ["--lora_warmup_epochs", 0, "--keep_every", 0]  # the baseline keeps all
    run(small, tmp_path / "run", *FORK, f"{baseline}@2", *flags)
    assert get_state(tmp_path / "run", 18)["phase"] == "full"
    assert get_steps_of_checkpoints(tmp_path / "run") == [18, 36, 42]  # it is four epochs old in the end
    assert [get_base_step(tmp_path / "run", step) for step in (18, 36, 42)] == [None, 18, 18]
    assert_holds(tmp_path / "run", 42, get_parameters(tmp_path / "run", 42, rest=False)[1])


def test_static_lora_saves_its_base_once(small, tmp_path):
    """With its first checkpoint, in mid-epoch here; and what it goes on to is the uninterrupted run."""
    flags = ["--mode", "lora", "--epochs", 4]
    run(small, tmp_path / "run", *flags, "--max_steps", 4)
    run(small, tmp_path / "run", "--resume", True, "--epochs", 4, "--mode", "lora", "--max_steps", None)
    assert get_steps_of_checkpoints(tmp_path / "run") == [4, 18, 24]
    assert [get_base_step(tmp_path / "run", step) for step in (4, 18, 24)] == [None, 4, 4]
    names, trained = get_parameters(tmp_path / "run", 24, rest=True)
    assert_holds(tmp_path / "run", 24, trained)
    assert checkpoint.get_stored(tmp_path / "run/checkpoints/step_00000004", "model.").keys() == names
    run(small, tmp_path / "whole", *flags)
    assert get_steps_of_checkpoints(tmp_path / "whole") == [6, 18, 24]
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_base_that_is_saved_anew_is_not_named_before(small, tmp_path, monkeypatch):
    """Stopped by a signal at an epoch's last step, which is saved again once the epoch is evaluated."""
    stop = train.distributed.StopRequest.on_any_process
    asked = []
    monkeypatch.setattr(
        train.distributed.StopRequest,
        "on_any_process",
        lambda self, device: asked.append(1) or len(asked) == STEPS or stop(self, device),
    )
    flags = argv(small, tmp_path, "--mode", "lora")
    assert train.main(flags) == 75
    before = get_state(tmp_path, STEPS)
    assert (before["epoch"], before["epoch_step"], before["base"]) == (0, STEPS, None)
    run(small, tmp_path, "--mode", "lora", "--resume", True, "--max_steps", STEPS + 1)
    assert get_state(tmp_path, STEPS)["epoch"] == 1
    assert [get_base_step(tmp_path, step) for step in (STEPS, STEPS + 1)] == [None, STEPS]


def test_a_base_that_nobody_pinned_is_kept(small, reference, tmp_path):
    """The freeze comes where new settings say so, at a checkpoint that was an ordinary one."""
    run_dir = tmp_path / "run"
    flags = ["--fork", f"{reference}@{SWITCH}", "--lora_warmup_epochs", 3, "--max_steps", 30]
    run(small, run_dir, *flags, "--epochs", 9)
    assert not checkpoint.read_meta(run_dir / "checkpoints/step_00000030")["pinned"]
    assert resume(run_dir, "--lora_warmup_epochs", 2, "--max_steps", None) == 0
    assert [epoch["phase"] for epoch in events(run_dir, "epoch")][4:] == ["warmup"] + ["lora"] * 4
    assert get_steps_of_checkpoints(run_dir) == [30, 48, 54]
    assert get_base_step(run_dir, 54) == 30


def test_a_fork_of_a_lora_phase_has_a_base_of_its_own(small, reference, tmp_path):
    run_dir = tmp_path / "fork"
    run(small, run_dir, "--fork", f"{reference}@6", "--max_steps", 38)
    assert get_base_step(run_dir, 38) is None
    run(small, run_dir, "--fork", f"{reference}@6", "--resume", True, "--max_steps", None)
    assert get_base_step(run_dir, 42) == 38
    assert_holds(run_dir, 42, get_parameters(run_dir, 42, rest=False)[1])
    assert_same(weights(run_dir), weights(reference))
    rest = tmp_path / "rest"  # one of the freeze's, with a head that goes on
    flags = "--lora_trainable adapters+rest".split()
    run(small, rest, "--fork", f"{reference}@{FREEZE}", *flags)
    assert [get_base_step(rest, step) for step in (36, 42)] == [None, 36]
    assert_holds(rest, 42, get_parameters(rest, 42, rest=True)[1])


@pytest.mark.parametrize("damage", ["missing", "cut", "another"])
def test_a_base_that_is_not_right_is_one_line(small, reference, tmp_path, capsys, damage):
    run_dir = shutil.copytree(reference, tmp_path / "run")
    base = run_dir / "checkpoints/step_00000030"
    if damage == "missing":
        shutil.rmtree(base)
    if damage == "cut":
        shard = max(base.glob("*.distcp"), key=lambda file: file.stat().st_size)
        shard.write_bytes(shard.read_bytes()[:-9])
    if damage == "another":  # of the same settings
        run(small, tmp_path / "other", "--max_steps", 30)
        shutil.rmtree(base)
        shutil.copytree(tmp_path / "other/checkpoints/step_00000030", base)
        capsys.readouterr()
    files = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    fork = argv(small, tmp_path / "fork", "--fork", f"{run_dir}@6")
    for command in (["--run_dir", str(run_dir), "--resume", "True", "--epochs", "8"], fork):
        assert train.main(command) == 2
        said = get_error(capsys)
        assert "holds only what the LoRA phase trains: it needs step_00000030 (id " in said
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == files
    assert not (tmp_path / "fork").exists()


def test_flipped_bytes_stop_a_run_before_it_touches_anything(small, reference, tmp_path, capsys):
    """Resumed, the logs are not cut back; forked, what is left does not bar the next start. The way back that
    is told is a way back."""
    run_dir = shutil.copytree(reference, tmp_path / "run")
    newest = checkpoint.latest(run_dir)
    file = flip(newest, "optimizer.blocks.0.attn.qkv.lora_A.exp_avg")
    files = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert resume(run_dir, "--epochs", EPOCHS + 1) == 1
    said = get_error(capsys)
    assert f"{file} is damaged, it is not what was written" in said
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == files
    before = said.split("the checkpoint before it is ")[1].split(":")[0]
    (run_dir / "checkpoints/latest").write_text(before)
    assert resume(run_dir) == 0
    assert_same_run(run_dir, reference)
    flip(newest.with_name(f"step_{SWITCH * STEPS:08d}"), "model.blocks.0.attn.qkv.weight")
    fork = argv(small, tmp_path / "fork", "--fork", f"{run_dir}@{SWITCH}", "--max_steps", SWITCH * STEPS + 1)
    capsys.readouterr()
    assert train.main(fork) == 1 and "is damaged, it is not what was written" in get_error(capsys)
    flip(newest.with_name(f"step_{SWITCH * STEPS:08d}"), "model.blocks.0.attn.qkv.weight")
    assert train.main(fork) == 0  # control


def test_a_meta_of_another_version_is_named(small, reference, tmp_path, capsys):
    run_dir = shutil.copytree(reference, tmp_path / "run")
    for path in (run_dir / "checkpoints").glob("step_*"):
        meta = checkpoint.read_meta(path)
        del meta["state"]["base"], meta["id"]
        write_meta(path, meta)
    for command in (
        ["--run_dir", str(run_dir), "--resume", "True", "--epochs", "8"],
        argv(small, tmp_path / "fork", "--fork", run_dir),
    ):
        assert train.main(command) == 2
        assert "meta.json is damaged, or of another version: its state has no base" in get_error(capsys)


# ---- the ablations' options, on forks


@pytest.mark.parametrize("kept", ["keep", "reset"])
def test_optimizer_at_switch(small, baseline, tmp_path, kept):
    """Step counts of the moments: the base's after the warmup, the adapters' after the LoRA phase's first
    epoch."""
    flags = ["--optimizer_at_switch", kept, "--epochs", FREEZE + 1]
    run(small, tmp_path / "run", *FORK, f"{baseline}@3", *flags)
    freeze, last = saved_at(tmp_path / "run", FREEZE * STEPS), weights(tmp_path / "run")
    steps = lambda saved, name: saved[f"optimizer.{name}.step"].item()
    assert steps(freeze, "blocks.0.attn.qkv.weight") == {"keep": 5 * STEPS, "reset": 2 * STEPS}[kept]
    assert steps(freeze, "blocks.0.attn.qkv.lora_A") == 2 * STEPS
    assert steps(last, "blocks.0.attn.qkv.lora_A") == {"keep": 3 * STEPS, "reset": STEPS}[kept]


def test_lora_rewarm_steps(small, reference, baseline, tmp_path):
    run_dir = tmp_path / "run"
    flags = ["--lora_rewarm_steps", 8, "--max_steps", FREEZE * STEPS + 2]
    run(small, run_dir, *FORK, f"{baseline}@3", *flags)
    run(small, run_dir, "--resume", True, "--max_steps", None)  # in mid-rewarm
    plain, rewarmed = ([epoch["lr"] for epoch in events(d, "epoch")] for d in (reference, run_dir))
    assert rewarmed[:FREEZE] == plain[:FREEZE] and rewarmed[FREEZE + 1 :] == plain[FREEZE + 1 :]
    # the epoch's last step is the 6th since the freeze
    assert rewarmed[FREEZE] == pytest.approx(plain[FREEZE] * 6 / 8)
    lrs = [[record["lr"] for record in get_steps(d)][-2 * STEPS :] for d in (reference, run_dir)]
    factors = [now / before for before, now in zip(*lrs)]
    assert factors == pytest.approx([n / 8 for n in range(1, 9)] + [1.0] * 4)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_lora_phases_own_decay(small, baseline, tmp_path, schedule):
    """Resumed in the middle of it, and logged step by step as the pure function says."""
    flags = ["--lr_schedule", schedule, "--lora_lr_factor", 2.0, "--lr_decay_share", 0.5]
    run(small, tmp_path / "run", *flags, "--max_steps", FREEZE * STEPS + 4)
    run(small, tmp_path / "run", "--resume", True, "--max_steps", None)
    run(small, tmp_path / "whole", *flags)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    lrs = [record["lr"] for record in get_steps(tmp_path / "run")]
    frozen = FREEZE * STEPS
    settings = dict(peak=1e-3, warmup_steps=6, total_steps=TOTAL_STEPS, schedule=schedule, decay_share=0.5)
    assert lrs[:frozen] == [get_lr(step, **settings) for step in range(frozen)]
    expected = [2 * get_lr(frozen, **settings) * (12 - step) / 12 for step in range(12)]
    assert lrs[frozen:] == pytest.approx(expected)
    # The control: the schedule alone is another.
    assert lrs[frozen:] != pytest.approx([get_lr(step, **settings) for step in range(frozen, TOTAL_STEPS)])


def test_a_schedule_that_changes_no_rate_is_not_said(small, tmp_path, capsys):
    """lr_decay_share is wsd's, and lora_lr_factor comes after the freeze; at the freeze it is said."""
    run_dir = tmp_path / "run"
    run(small, run_dir, "--max_steps", 3)
    assert resume(run_dir, "--max_steps", FREEZE * STEPS, "--lr_decay_share", 0.7) == 0
    assert "learning rate was" not in capsys.readouterr().err
    assert resume(run_dir, "--max_steps", None, "--lora_lr_factor", 3.0) == 0
    lrs = [record["lr"] for record in get_steps(run_dir)][FREEZE * STEPS - 1 :][:2]
    assert f"was {lrs[0]:.4g} at step 30 and goes on at {lrs[1]:.4g}" in capsys.readouterr().err
    assert lrs[1] > 2 * lrs[0]


def test_another_factor_within_the_lora_phase_is_said(small, tmp_path, capsys):
    run(small, tmp_path / "run", "--lora_lr_factor", 2.0, "--max_steps", FREEZE * STEPS + 4)
    assert resume(tmp_path / "run", "--max_steps", None, "--lora_lr_factor", 4.0) == 0
    lrs = [record["lr"] for record in get_steps(tmp_path / "run")][FREEZE * STEPS + 3 :][:2]
    assert f"was {lrs[0]:.4g} at step 34 and goes on at {lrs[1]:.4g}" in capsys.readouterr().err
    assert lrs[1] == pytest.approx(2 * lrs[0] * 8 / 9)


def test_rank_rules_use_what_minmax_uses(small, baseline, tmp_path):
    def choose(name, *flags):
        flags = [*flags, "--max_steps", SWITCH * STEPS + 1]
        return run(small, tmp_path / name, *FORK, f"{baseline}@3", *flags)[-1]["ranks"]

    minmax, uniform, budget = (choose(rule, "--rank_rule", rule) for rule in ("minmax", "uniform", "budget"))
    costs = {family: [5 * 64 if "fc" in family else 2 * 64] * 4 for family in LORA_FAMILIES}
    cfg = train.Config(dtype="float32", compile=False)
    base = events(baseline, "epoch")[0]["trainable_params"]
    assert count_base(cfg, train.build_net(cfg)) == (base, costs)
    allowed = count_parameters(minmax, costs)
    assert 0.9 * allowed < count_parameters(budget, costs) <= allowed and budget != minmax
    next_uniform = {family: [rank + 4 for rank in layers] for family, layers in uniform.items()}
    assert count_parameters(uniform, costs) <= allowed < count_parameters(next_uniform, costs)
    count_different = lambda ranks: len({rank for layers in ranks.values() for rank in layers})
    assert count_different(uniform) == 1 < count_different(budget)
    share = choose("share", "--rank_rule", "budget", "--rank_budget", 0.1)
    assert 0.09 * base < count_parameters(share, costs) <= 0.1 * base


@pytest.mark.slow
def test_ctrl_c_reaches_the_workers_too_and_ends_the_run(small, tmp_path):
    """A terminal sends it to every process of the group: the run says so, and no process is left for long."""
    run_dir = tmp_path / "run"
    flags = ["--num_workers", 2, "--epochs", 60, "--eval_every", 60]
    command = [sys.executable, "train.py", *argv(small, run_dir, *flags)]
    process = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait((run_dir / "checkpoints/latest").exists, 120)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)  # and until no worker holds the pipe
    assert process.returncode == 130 and "interrupted: go on with" in said
    # Met as it starts its workers, torch's loader complains at its end that it is half made.
    ours = said.split("Exception ignored in: <function _MultiProcessingDataLoaderIter.__del__")[0]
    assert "Traceback" not in ours
    # A process closes its pipes a moment before it is gone.
    wait(lambda: not is_there(process.pid), 20)


def is_there(group):
    """Whether any process of the group is, also one that has ended and that nobody has reaped."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("step"),
        lambda state: state.update(phase="foo"),
        lambda state: state.update(step="x"),
        lambda state: state.update(phase="warmup", ranks=None),
        lambda state: state.update(more=1),
        lambda state: state.pop("base"),
        lambda state: state.update(base="step_00000030"),
        lambda state: state.update(base={"checkpoint": "../step_00000030", "id": "0"}),
        lambda state: state.update(phase="warmup"),  # with a base
    ],
)
def test_a_state_that_is_not_whole_is_no_start(reference, damage):
    path = checkpoint.latest(reference)
    meta = checkpoint.read_meta(path)
    assert start.read_state(meta, path).phase == "lora"  # the control
    damage(meta["state"])
    with pytest.raises(UserError, match="meta.json is damaged"):
        start.read_state(meta, path)


def test_a_log_that_lost_an_epoch_changes_nothing(small, reference, tmp_path, capsys):
    run_dir = shutil.copytree(reference, tmp_path / "run")
    log = run_dir / "metrics.jsonl"
    log.write_text(log.read_text().replace('"event": "epoch"', '"event": "other"', 1))
    config = (run_dir / "config.json").read_text()
    assert resume(run_dir, "--epochs", 9, "--lr", 9) == 1
    assert "does not hold the epochs 1 to 7" in capsys.readouterr().err
    assert (run_dir / "config.json").read_text() == config


@pytest.mark.parametrize("phase, epoch_step, due", [("full", 0, True), ("full", 3, False)])
def test_a_run_resumed_within_an_epoch_ends_it_in_its_phase(reference, phase, epoch_step, due):
    """Whatever new settings say: an epoch has one phase."""
    cfg = typed_config(train.Config, json.loads((reference / "config.json").read_text()), "stored")
    epochs = [epoch for epoch in events(reference, "epoch") if epoch["phase"] == "full"]
    s = start.State(phase=phase, epoch=3, epoch_step=epoch_step)
    assert (train.get_next_phase(cfg, s, epochs)[0] == "warmup") == due


# ---- the lowest blocks frozen


@pytest.mark.parametrize("steps", [
    SWITCH * STEPS,  # at the switch, before it is made
    SWITCH * STEPS + 2,  # in the warmup
    pytest.param(FREEZE * STEPS, marks=slow),
    FREEZE * STEPS + 3,  # in mid-epoch, once blocks are frozen
])  # fmt: skip
def test_resumed_with_frozen_blocks_to_the_bit(small, lowest_frozen, tmp_path, steps):
    run(small, tmp_path / "run", "--freeze_blocks", 2, "--max_steps", steps)
    assert resume(tmp_path / "run", "--max_steps", None) == 0
    assert_same_run(tmp_path / "run", lowest_frozen)


CONTROL = "--mode full --freeze_blocks 2 --switch_epoch 3 --window_epochs 3 --keep_every 1".split()


@pytest.mark.parametrize("steps", [3 * STEPS, 3 * STEPS + 2])
def test_the_control_resumed_to_the_bit(small, control, tmp_path, steps):
    """At the freeze, before it is made, and in mid-epoch after it."""
    run(small, tmp_path / "run", *CONTROL, "--max_steps", steps)
    assert resume(tmp_path / "run", "--max_steps", None) == 0
    assert_same_run(tmp_path / "run", control)


def test_static_lora_with_frozen_blocks_resumed_to_the_bit(small, tmp_path):
    flags = "--mode lora --freeze_blocks 1 --epochs 2".split()
    whole = run(small, tmp_path / "whole", *flags)
    ranks = json.loads((tmp_path / "whole" / "ranks.json").read_text())
    assert ranks == {family: [0, 32, 32, 32] for family in LORA_FAMILIES}
    assert [e["frozen_blocks"] for e in whole if e["event"] in ("start", "epoch")] == [1] * 3
    run(small, tmp_path / "cut", *flags, "--max_steps", STEPS + 2)
    assert resume(tmp_path / "cut", "--max_steps", None) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    "source, at", [("lowest_frozen", "warmup"), ("lowest_frozen", "lora"), ("control", "full")]
)
def test_freeze_blocks_stays_once_it_has_shaped_the_model(request, tmp_path, capsys, source, at):
    run_dir = Path(shutil.copytree(request.getfixturevalue(source), tmp_path / "run"))
    if at == "warmup":
        (run_dir / "checkpoints/latest").write_text(f"step_{FREEZE * STEPS:08d}")
    before = (run_dir / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    for blocks in (1, 3):
        assert resume(run_dir, "--freeze_blocks", blocks, "--epochs", 8) == 2
        error = get_error(capsys)
        assert f"was trained with freeze_blocks = 2, it can't go on with {blocks}" in error
    assert (run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("source", ["lowest_frozen", "control"])
def test_before_that_freeze_blocks_is_an_override_that_is_logged(request, tmp_path, capsys, source):
    run_dir = Path(shutil.copytree(request.getfixturevalue(source), tmp_path / "run"))
    (run_dir / "checkpoints/latest").write_text(f"step_{SWITCH * STEPS:08d}")
    flags = "--freeze_blocks", 1, "--max_steps", SWITCH * STEPS + 1
    assert resume(run_dir, *flags) == 0
    assert "resume: freeze_blocks = 1 overrides the stored 2" in capsys.readouterr().err
    switch = events(run_dir, "switch")[-1]
    if source == "control":
        assert switch["frozen_blocks"] == 1
    else:
        assert all(layers[0] == 0 < layers[1] for layers in switch["ranks"].values())


def test_forks_of_the_control(small, control, reference, baseline, tmp_path, capsys):
    """Before its freeze it is a baseline like any other; after it only its like can go on."""
    last = "--max_steps", SWITCH * STEPS + 1
    prelora = "--mode prelora --freeze_blocks 0 --switch_epoch None".split()
    run(small, tmp_path / "prelora", "--fork", f"{control}@3", *prelora, *last)
    (switch,) = events(tmp_path / "prelora", "switch")
    assert (switch["epoch"], switch["from"], switch["to"]) == (SWITCH, "full", "warmup")
    assert switch["ranks"] == events(reference, "switch")[0]["ranks"]
    # the newest that settings share which freeze nothing, or do so elsewhere
    full = "--mode full --window_epochs 3 --freeze_blocks 0 --switch_epoch None".split()
    run(small, tmp_path / "full", "--fork", control, *full, *last)
    assert events(tmp_path / "full", "start")[0]["epoch"] == 3 and not events(tmp_path / "full", "switch")
    run(small, tmp_path / "same", "--fork", f"{control}@5", *CONTROL)
    assert_same(weights(tmp_path / "same"), weights(control))
    assert events(tmp_path / "same", "switch") == events(control, "switch")
    again = run(small, tmp_path / "again", "--fork", baseline, *CONTROL)  # where its own freeze is due
    assert [r["epoch"] for r in again if r["event"] == "start"] == [3]
    assert_same(weights(tmp_path / "again"), weights(control))
    capsys.readouterr()
    full = "--mode full --window_epochs 3 --freeze_blocks"
    prelora, whole = f"{prelora[0]} {prelora[1]} --switch_epoch None", f"{full} 0 --switch_epoch None"
    for fork, flags, reason in (
        (f"{control}@5", prelora, "was trained with mode = full, it can't go on with prelora"),
        (f"{control}@5", f"{full} 1 --switch_epoch 3", "was trained with freeze_blocks = 2"),
        (
            f"{control}@5",
            f"{full} 2 --switch_epoch 2",
            "after a switch at epoch 3, these settings switch after epoch 2",
        ),
        (f"{control}@5", whole, "was trained with freeze_blocks = 2"),
        (f"{baseline}@5", f"{full} 2 --switch_epoch 3", "share: they freeze blocks after epoch 3"),
    ):
        assert train.main(argv(small, tmp_path / "bad", "--fork", fork, *flags.split())) == 2
        assert reason in get_error(capsys)


def test_forks_of_a_run_with_frozen_blocks(small, lowest_frozen, reference, tmp_path, capsys):
    run(small, tmp_path / "same", "--fork", f"{lowest_frozen}@{FREEZE}", "--freeze_blocks", 2)
    assert_same(weights(tmp_path / "same"), weights(lowest_frozen))
    run(small, tmp_path / "other", "--fork", f"{reference}@{SWITCH}", "--freeze_blocks", 2)
    assert_same(weights(tmp_path / "other"), weights(lowest_frozen))
    capsys.readouterr()
    fork = f"{lowest_frozen}@{FREEZE}"
    assert train.main(argv(small, tmp_path / "bad", "--fork", fork, "--freeze_blocks", 1)) == 2
    assert "was trained with freeze_blocks = 2, it can't go on with 1" in get_error(capsys)
