"""replay.py: it says what a run would do, and the run does it."""

import csv
import dataclasses
import json
import math
import shutil
from unittest import mock

import numpy as np
import pytest
from small_runs import events, get_error, no_figures, resume, run  # noqa: F401 (a fixture)

import replay
from errors import UserError
from model import checkpoint
from model.variants import VARIANTS

STEPS = 4  # per epoch; test_train.py's runs have more
SHORT = ["--train_samples", 80, "--lr_warmup_steps", STEPS, "--epochs", 9, "--lora_warmup_epochs", 3]
DATA = [*SHORT, "--mode", "full", "--keep_every", 1, "--eval_every", 9]


@pytest.fixture(scope="module", autouse=True)
def two_blocks():
    with mock.patch.dict(VARIANTS["tiny-debug"], depth=2):
        yield


@pytest.fixture(scope="module")
def baseline(small, two_blocks, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("replay") / "full"
    run(small, run_dir, *DATA)
    return run_dir


def rows_of(run_dir, *flags):
    assert replay.main([str(run_dir), *map(str, flags)]) == 0
    with open(run_dir / "replay.csv") as file:
        return list(csv.DictReader(file))


# Of the rows of 2 zeta × 2 window_epochs × 2 rank_rule, the first four have every pair of them.
@pytest.mark.parametrize("chosen", [(0, 3, 5, 6), pytest.param((1, 2, 4, 7), marks=pytest.mark.slow)])
def test_replay_agrees_with_what_runs_do(small, baseline, tmp_path, capsys, chosen):
    """Thresholds between the changes that were logged, so that the runs switch at different epochs."""
    epochs = events(baseline, "epoch")
    loss = [abs(b["train_loss"] / a["train_loss"] - 1) * 100 for a, b in zip(epochs, epochs[1:])]
    zetas = [sorted(loss[1:])[1] + 1e-3, 90]
    asked = ["--tau", 90, "--zeta", *zetas, "--window_epochs", 1, 2, "--rank_rule", "minmax", "budget"]
    rows = rows_of(baseline, *asked)
    assert len(rows) == 8 and len({row["switch_epoch"] for row in rows}) >= 3
    for minmax, budget in zip(rows[::2], rows[1::2]):  # the rank rule has no say in when
        assert minmax["switch_epoch"] == budget["switch_epoch"]
    for i in chosen:
        row = rows[i]
        flags = [f"--{name}={row[name]}" for name in replay.SETTINGS]
        if row["switch_epoch"]:
            flags += ["--max_steps", STEPS * int(row["switch_epoch"]) + 1]
        fork = [*SHORT, "--mode", "prelora", "--fork", f"{baseline}@2", "--epochs", 9, "--eval_every", 9]
        did = run(small, tmp_path / str(i), *fork, *flags)
        switches = [r for r in did if r["event"] == "switch"]
        expected = [int(row["switch_epoch"])] if row["switch_epoch"] else []
        assert [s["epoch"] for s in switches[:1]] == expected
        if switches:
            assert switches[0]["ranks"] == json.loads(row["ranks"])
            base = epochs[0]["trainable_params"]
            added = switches[0]["trainable_params"] - base
            assert added == int(row["adapter_params"]) == pytest.approx(float(row["share"]) / 100 * base)


LOOSE = {"tau": 90.0, "zeta": 90.0}


@pytest.mark.parametrize(
    "stopped_at, is_flag, switches",
    [(5 * STEPS, True, 5), (5 * STEPS + 1, True, 6), (5 * STEPS + 1, False, 6)],
)
def test_a_resumed_run_does_what_replay_says(
    small, baseline, tmp_path, capsys, stopped_at, is_flag, switches
):
    """Thresholds under which a run would have switched after epoch 3 come after epoch 5, or within 6: by
    flags, or by a start that was killed before it saved (its config is there, its log will be cut)."""
    run_dir, strict = tmp_path / "run", ["--tau", 1e-6, "--zeta", 1e-6]
    fork = [*SHORT, "--mode", "prelora", "--fork", f"{baseline}@4", *strict]
    run(small, run_dir, *fork, "--max_steps", stopped_at)
    assert rows_of(run_dir)[0]["switch_epoch"] == ""
    if is_flag:
        flags = [word for name, value in LOOSE.items() for word in (f"--{name}", value)]
    else:
        flags, path = [], run_dir / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | LOOSE))
    capsys.readouterr()
    assert resume(run_dir, "--switch_epoch", switches - 1) == 2
    assert f"in the past of {checkpoint.latest(run_dir)}: --switch_epoch {switches} is" in get_error(capsys)
    assert resume(run_dir, *flags, "--max_steps", 6 * STEPS + 1) == 0
    (switch,) = events(run_dir, "switch")
    capsys.readouterr()
    (row,) = rows_of(run_dir)
    assert (int(row["switch_epoch"]), json.loads(row["ranks"])) == (switches, switch["ranks"])
    assert switch["epoch"] == switches
    note = f"{run_dir} has tau 90.0, zeta 90.0 from the end of epoch {switches} on, and was judged so"
    assert note in capsys.readouterr().out
    assert resume(run_dir, "--tau", 1, "--max_steps", 6 * STEPS + 2) == 0  # after the switch it has no say
    (row,) = rows_of(run_dir)
    assert (int(row["switch_epoch"]), float(row["tau"])) == (switches, 90)
    capsys.readouterr()
    assert rows_of(run_dir, "--tau", 90, "--zeta", 90)[0]["switch_epoch"] == "3"
    assert "was judged so" not in capsys.readouterr().out


def test_the_switch_by_hand(baseline, tmp_path, capsys):
    """Norms and losses of which one can see what happens: windows of 1, the first in the lr's warmup."""
    lines = [e | {"event": "epoch"} for e in events(baseline, "epoch")]
    norm = [100, 100, 110, 112, 113, 113.1, 113.1, 113.1, 113.1]  # changes in %: 0, 10, 1.8, 0.89, 0.09, 0 …
    loss = [9, 8, 7, 6, 5.9, 5.8, 5.5, 5.4, 5.3]  # -11, -13, -14, -1.7, -1.7, -5.2, -1.8, -1.9
    for e, n, value in zip(lines, norm, loss):
        last = n * 1.001 if e["epoch"] >= 5 else n
        e["weight_norms"] = {family: [n, n] for family in e["weight_norms"]} | {"v": [n, last]}
        e["train_loss"] = value
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text((baseline / "config.json").read_text())
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))
    rows = rows_of(run_dir, "--tau", 1, 2, "--zeta", 2, 15, "--num_windows", 2, 3)
    found = {(float(r["tau"]), float(r["zeta"]), int(r["num_windows"])): r["switch_epoch"] for r in rows}
    # fmt: off
    assert found == {(1, 2, 2): "5", (1, 2, 3): "6", (1, 15, 2): "5", (1, 15, 3): "6",
                     (2, 2, 2): "5", (2, 2, 3): "6", (2, 15, 2): "4", (2, 15, 3): "5"}
    # fmt: on
    never = rows_of(run_dir, "--tau", 1e-6, "--zeta", 1e-6)
    assert never[0]["switch_epoch"] == never[0]["ranks"] == "" and "not by 9" in capsys.readouterr().out
    # Of v's layers the last changed more between epochs 4 and 5.
    expected = {family: [4, 4] for family in lines[0]["weight_norms"]} | {"v": [4, 32]}
    assert json.loads(rows[0]["ranks"]) == expected


def test_past_its_own_switch_a_log_is_refused(small, baseline, tmp_path, capsys):
    switched = tmp_path / "run"
    fork = [*SHORT, "--fork", f"{baseline}@3", "--mode", "prelora", "--switch_epoch", 4, "--epochs", 9]
    run(small, switched, *fork, "--max_steps", 7 * STEPS, "--lora_warmup_epochs", 1)
    capsys.readouterr()
    assert replay.main([str(switched), "--tau", "90", "1e-6"]) == 1
    out, err = capsys.readouterr()
    assert (
        "not by 4" in out
        and err.count("\n") == 1
        and "has switched after epoch 4" in err
        and "use a baseline's" in err
    )
    rows = rows_of(
        switched, "--tau", 90
    )  # before it the log is as good as the baseline's, and it has timed all phases
    assert rows[0]["switch_epoch"] == "3"
    seconds = {}
    for e in events(switched, "epoch"):
        seconds.setdefault(e["phase"], []).append(e["epoch_seconds"])
    full, warmup, lora = (np.median(seconds[phase]) for phase in ("full", "warmup", "lora"))
    spent = 3 * full + warmup + 5 * lora
    assert float(rows[0]["time_saved"]) == pytest.approx(100 * (1 - spent / (9 * full)))
    assert rows_of(baseline, "--tau", 90)[0]["time_saved"] == ""
    assert rows_of(baseline, "--tau", 90, "--times", switched)[0]["time_saved"] != ""


def test_ttest_by_hand(baseline, tmp_path, capsys):
    """Welch's t on losses whose means and variances are plain."""
    copies = {}
    for name, phase, offset in (("full", "full", 0.0), ("lora", "lora", 0.5), ("same", "lora", 0.0)):
        copies[name] = tmp_path / name
        copies[name].mkdir()
        (copies[name] / "config.json").write_text((baseline / "config.json").read_text())
        with open(copies[name] / "metrics.jsonl", "w") as file:
            for e in events(baseline, "epoch"):
                after = e["epoch"] > 4
                losses = [2 + offset * after, 3 + offset * after, 4 + offset * after]
                file.write(
                    json.dumps(e | {"phase": phase if after else "full", "step_losses": losses}) + "\n"
                )
    rows = replay.compare_losses(str(copies["full"]), str(copies["lora"]), 2)
    assert [(r["first"], r["last"]) for r in rows] == [(5, 6), (7, 8)]  # epoch 9 fills no window
    # two samples of 2, 3, 4, 2, 3, 4: variance 0.8, so t = -0.5 / sqrt(2 · 0.8 / 6)
    assert rows[0]["t"] == pytest.approx(-0.5 / math.sqrt(1.6 / 6)) and rows[0]["p"] == pytest.approx(
        0.3559, abs=1e-3
    )
    assert replay.compare_losses(str(copies["full"]), str(copies["same"]), 2)[0]["p"] == 1
    assert replay.main(["--ttest", str(copies["full"]), str(copies["lora"]), "--window_epochs", "5"]) == 0
    assert "    5-9     3.0000     3.5000" in capsys.readouterr().out
    assert (
        replay.main(["--ttest", str(copies["full"]), str(copies["full"])]) == 2
    )  # a full run has no LoRA phase
    assert "share 0 epochs" in capsys.readouterr().err


def test_a_log_with_a_nan_is_the_users_error_and_a_bug_is_not(baseline, monkeypatch):
    cfg = replay.typed_config(replay.train.Config, replay.load_run(baseline).config, "config.json")
    cfg = dataclasses.replace(cfg, mode="prelora")
    epochs = replay.load_run(baseline).epochs
    assert replay.replay_run(cfg, epochs)[0] == 3  # the control
    with pytest.raises(UserError, match="epoch 2: the training loss is not finite"):
        replay.replay_run(cfg, [epochs[0], epochs[1] | {"train_loss": math.nan}])
    monkeypatch.setattr(replay, "find_switch", lambda *args: int("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        replay.main([str(baseline)])


def test_a_log_of_two_writers_is_refused(baseline, tmp_path, capsys):
    shutil.copytree(baseline, tmp_path / "twice")
    path = tmp_path / "twice/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines + lines[-1:]))
    assert replay.main([str(tmp_path / "twice")]) == 2
    assert f"{path}: line {len(lines) + 1} has epoch" in capsys.readouterr().err


def test_a_table_that_cannot_be_written_is_one_line(baseline, tmp_path, capsys):
    assert replay.main([str(baseline), "--csv", str(tmp_path / "absent" / "table.csv")]) == 2
    err = capsys.readouterr().err
    assert err == f"error: {tmp_path / 'absent' / 'table.csv'} can't be written: No such file or directory\n"


@pytest.mark.parametrize("flags, reason", [
    (["nowhere"], "no run directory nowhere"),
    ([], "which run?"),
    (["{}", "--tau", "0"], "tau must be above 0"),
    (["{}", "--num_windows", "1"], "num_windows must be at least 2"),
    (["{}", "--rank_rule", "best"], "rank_rule"),
    (["{}", "--taus", "1"], "unknown flag --taus"),
    (["{}", "--times", "{}"], "has timed only: full"),
    (["--ttest", "{}"], "two runs"),
    (["--ttest", "{}", "{}", "--window_epochs", "2", "3"], "--ttest takes one --window_epochs, not 2"),
])  # fmt: skip
def test_bad_input_is_one_line(baseline, capsys, flags, reason):
    assert replay.main([flag.format(baseline) for flag in flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and reason in err


def test_with_frozen_blocks(small, baseline, tmp_path, capsys):
    """Replay gives the ranks that the run has, zeros included, and takes no freeze for a switch."""
    flags = ["--freeze_blocks", 1, "--max_steps", 3 * STEPS + 1]
    fork = [*SHORT, "--mode", "prelora", "--fork", f"{baseline}@2", "--epochs", 9, "--tau", 90, "--zeta", 90]
    did = run(small, tmp_path / "fork", *fork, *flags)
    switch = next(record for record in did if record["event"] == "switch")
    config, epochs, _ = replay.load_run(tmp_path / "fork")
    cfg = replay.typed_config(replay.train.Config, config, "stored")
    full = [record for record in epochs if record["phase"] == "full"]
    assert replay.replay_run(cfg, full) == (switch["epoch"], switch["ranks"])
    assert all(layers[0] == 0 < layers[1] for layers in switch["ranks"].values())
    # a control's log is a baseline's up to its freeze, and says nothing of what comes after
    control = [*DATA, "--freeze_blocks", 1, "--switch_epoch", 4, "--fork", f"{baseline}@3"]
    run(small, tmp_path / "control", *control)
    capsys.readouterr()
    asked = ["--tau", "90", "--zeta", "90", "--window_epochs", "1", "4"]
    status = replay.main([str(tmp_path / "control"), *asked])
    out, err = capsys.readouterr()
    assert status == 1 and "has frozen blocks after epoch 4" in err and "not by 4" in out
    with open(tmp_path / "control" / "replay.csv") as file:
        rows = list(csv.DictReader(file))
    whole = rows_of(baseline, *asked)
    assert rows[0]["switch_epoch"] == whole[0]["switch_epoch"] and rows[1]["switch_epoch"] == ""
