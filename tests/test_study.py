"""study.py's arithmetic, and its report from made-up runs."""

import json
from pathlib import Path

import numpy as np
import pytest

import study
import train
from config.cli import load_preset
from errors import UserError
from monitor.log import Run, load_run


def test_every_arm_is_a_run_that_train_accepts(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RUNS", tmp_path)
    seen = set()
    for arm in study.ARMS:
        for seed in range(arm.seeds):
            run_dir, epochs, argv = study.build_command(arm, seed)
            assert epochs == 24 and ("--fork" in argv) == arm.fork
            seen.add(run_dir)
    assert len(seen) == sum(arm.seeds for arm in study.ARMS)  # none shares a directory
    main = {arm.name: arm.seeds for arm in study.ARMS if arm.name in ("baseline", "equal_time", study.MAIN)}
    assert len(main) == 3 and min(main.values()) >= 5 and min(arm.seeds for arm in study.ARMS) >= 3


def records(phases, seconds, top1=80.0, switches=()):
    """Epochs of the given phases and times, and switches that took half a second each."""
    epochs = []
    for i, (phase, epoch_seconds) in enumerate(zip(phases, seconds), 1):
        record = {"event": "epoch", "epoch": i, "step": 93 * i, "phase": phase, "lr": 0.1}
        record |= {"epoch_seconds": epoch_seconds, "images_per_second": 100.0, "peak_memory_bytes": 2**30}
        record |= {"weight_norms": {"q": [1.0]}, "adapter_norms": {}, "trainable_params": 10}
        record |= {"train_loss": 1 / i, "step_losses": [1 / i] * 93, "train_top1": 50.0}
        record |= {"val_loss": 1.0, "val_top1": top1, "val_top5": 99.0}
        epochs.append(record)
    of_switch = {"event": "switch", "ranks": {}, "seconds": 0.5}
    return Run({}, epochs, [of_switch | {"epoch": e, "from": f, "to": t} for e, f, t in switches])


def test_seconds_by_hand():
    switches = [(2, "full", "warmup"), (3, "warmup", "lora")]
    prelora = records(["full", "full", "warmup", "lora", "lora"], [1] * 5, switches=switches)
    full = records(["full"] * 3, [1] * 3)
    per_epoch = {"full": 10.0, "warmup": 12.0, "lora": 7.0}
    assert study.get_seconds([prelora, full], per_epoch) == [2 * 10 + 12 + 2 * 7 + 2 * 0.5, 30]


def test_interval_by_hand():
    """Mean 2, standard error 1/√3, t(0.975, 2) = 4.3027."""
    assert study.get_interval(np.array([1.0, 2.0, 3.0])) == "+2.00 [-0.48, +4.48]"


def write_run(run_dir, arm, seed, preset):
    """A made-up run of the arm: one point of top-1 more with each seed, one less with adapters."""
    phases, switches = ["full"] * 24, []
    if arm is study.EQUAL_TIME:
        phases = ["full"] * 23
    if preset.mode != "full":
        phases = ["full"] * 14 + ["warmup"] * 2 + ["lora"] * 8
        # the one that did as replay says: equal means of windows 6, 7 and 8 (w = 2)
        at = 16 if (arm.name, seed) == (study.MAIN, 0) else 15
        switches = [(at, "full", "warmup"), (16, "warmup", "lora")]
    seconds = [10.0 if phase == "full" else 8.0 for phase in phases]
    _, epochs, switches = records(phases, seconds, 80 + seed - (preset.mode != "full"), switches)
    for e in epochs:  # they come to rest after epoch 10; each layer in its own way
        norms = {family: [1.0, 2.0 + max(0, 10 - e["epoch"]), 3.0] for family in preset.target_modules}
        e |= {"train_loss": 1.0, "weight_norms": norms}
        e["adapter_norms"] = {} if e["phase"] == "full" else norms
    for s in switches:
        layer_ranks = [4, 4, 4] if s["from"] == "full" else [4, 8, 32]
        s["ranks"] = {family: layer_ranks for family in preset.target_modules}
    config = vars(preset) | {"seed": seed, "run_dir": str(run_dir), "epochs": len(phases)}
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps(config))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in epochs + switches))


@pytest.fixture
def fabricated(tmp_path, monkeypatch):
    """Every arm's runs, as files."""
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(study, "DOC", tmp_path / "study.md")
    seconds = {arm.name: {"warmup": 11.0, "lora": 8.0} for arm in study.ARMS}
    seconds["baseline"] = {"full": 10.0}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "seconds.json").write_text(json.dumps(seconds))  # measured before
    for arm in study.ARMS:
        preset = load_preset(train.Config, f"config/{arm.preset}.py")
        for seed in range(arm.seeds):
            write_run(tmp_path / "runs" / f"{arm.name}-{seed}", arm, seed, preset)
    return tmp_path


def test_report(fabricated, monkeypatch, capsys):
    drawn = []

    def draw(runs, family, out):
        drawn.append((runs, family, out))
        for run in runs:
            figures = Path(run) / "figures"
            figures.mkdir(exist_ok=True)
            for name in ("figure1", "figure3", "ranks"):
                (figures / f"{name}.png").write_text(run)

    monkeypatch.setattr(study, "plot_runs", draw)
    (fabricated / "study.md").write_text(f"before\n{study.MARKS[0]}\nold\n{study.MARKS[1]}\nafter\n")
    assert study.main(["--report"]) == 0
    text = (fabricated / "study.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    prelora = next(line for line in text.splitlines() if line.startswith("| PreLoRA"))
    # 14 + 2 · 1.1 + 8 · 0.8 epochs' time and two switches, one point below the baseline in every seed
    cells = [cell.strip() for cell in prelora.split("|")]
    assert cells[2:6] == ["5", "15", "0.0 %", "81.00 ± 1.58"]
    assert cells[6:8] == ["-1.00 [-1.00, -1.00]", "-1.00 [-1.00, -1.00]"]
    assert "227 s, 94.6 % | 1.10 | 0.80 |" in prelora
    assert study.get_equal_epochs() == 23
    runs, family, out = drawn[0]
    assert len(runs) == sum(arm.seeds for arm in study.ARMS if arm.name in study.DRAWN)
    assert family is None and out == str(fabricated / "study")
    figures = sorted(path.name for path in (fabricated / "study").iterdir())
    assert figures == ["figure1.png", "figure3.png", "ranks.png"]
    # what is drawn: the same, but for the times
    _, epochs, switches = load_run(fabricated / f"runs/timed/{study.FORKS[0].name}-0")
    assert [e["epoch_seconds"] for e in epochs] == [10.0] * 14 + [11.0] * 2 + [8.0] * 8 and len(switches) == 2
    assert epochs[0]["images_per_second"] == 100.0  # 1000 images in 10 s
    assert epochs[-1]["images_per_second"] == 100.0  # 800 in 8 s
    assert f"1 of {sum(arm.seeds for arm in study.FORKS)} forked runs" in text
    study.write_report()
    assert (fabricated / "study.md").read_text() == text  # a second one replaces the first


def test_another_run_in_its_place_is_refused(fabricated):
    arm = study.FORKS[0]
    study.build_command(arm, 0)
    changed = json.loads((fabricated / f"runs/{arm.name}-0/config.json").read_text()) | {"tau": 0.9}
    (fabricated / f"runs/{arm.name}-0/config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="trained with another tau: remove it"):
        study.build_command(arm, 0)


def test_a_failing_run_ends_the_study_with_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RUNS", tmp_path)
    with pytest.raises(UserError, match="run-0 ended with status 2: error: no such preset: nowhere.py"):
        study.train_run(tmp_path / "run-0", 24, ["nowhere.py"])
    assert not study.running


def test_a_missing_run_or_flag_is_one_line(fabricated, capsys):
    (fabricated / "runs" / "exp1-2" / "metrics.jsonl").unlink()
    (fabricated / "study.md").write_text(f"{study.MARKS[0]}\n{study.MARKS[1]}")
    assert study.main(["--report"]) == 1
    assert "exp1-2 has no finished epoch" in capsys.readouterr().err
    assert study.main(["--reprot"]) == 2


def test_phases_are_timed_side_by_side(fabricated, monkeypatch):
    monkeypatch.setattr(study, "ARMS", [study.BASELINE, study.EQUAL_TIME, study.FORKS[0], study.STATIC])
    seconds = study.time_epochs(rounds=1)
    assert {name: list(phases) for name, phases in seconds.items()} == {
        "baseline": ["full"],
        "equal_time": [],
        study.FORKS[0].name: ["warmup", "lora"],
        "static_lora": ["warmup", "lora"],
    }
    assert all(value > 0 for phases in seconds.values() for value in phases.values())


def test_a_lost_page_is_one_line(fabricated, capsys):
    assert study.main(["--report"]) == 1
    assert "study.md can't be read" in capsys.readouterr().err
    (fabricated / "study.md").write_text("no marks")
    assert study.main(["--report"]) == 1
    assert "has lost the marks" in capsys.readouterr().err


def test_a_bug_is_no_sentence(fabricated, monkeypatch):
    def has_a_bug(*args):
        raise ValueError("too many values to unpack (expected 2)")

    (fabricated / "study.md").write_text("".join(study.MARKS))
    monkeypatch.setattr(study, "get_table", has_a_bug)
    with pytest.raises(ValueError, match="too many values"):
        study.main(["--report"])


def test_an_edited_step_is_what_is_timed(monkeypatch):
    taken = []
    monkeypatch.setattr(train, "train_step", lambda cfg, *args: taken.append(cfg))
    cfg = load_preset(train.Config, "config/study.py")
    study.build_step(cfg, "full", None)()
    assert taken == [cfg]
