"""study.py's arithmetic, and its report from made-up runs."""

import json
from pathlib import Path

import numpy as np
import pytest

import study
import train
from monitor import plot
from monitor.log import load_run


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
    base = {
        "event": "epoch",
        "weight_norms": {"q": [1.0]},
        "adapter_norms": {},
        "images_per_second": 100.0,
        "peak_memory_bytes": 2**30,
        "train_top1": 50.0,
        "val_loss": 1.0,
        "val_top1": top1,
        "val_top5": 99.0,
        "lr": 0.1,
        "trainable_params": 10,
    }
    epochs = [
        base
        | {
            "epoch": i,
            "step": 93 * i,
            "phase": p,
            "epoch_seconds": s,
            "train_loss": 1 / i,
            "step_losses": [1 / i] * 93,
        }
        for i, (p, s) in enumerate(zip(phases, seconds), 1)
    ]
    return (
        {},
        epochs,
        [
            {"event": "switch", "epoch": e, "from": f, "to": t, "ranks": {}, "seconds": 0.5}
            for e, f, t in switches
        ],
    )


def test_seconds_by_hand():
    switches = [(2, "full", "warmup"), (3, "warmup", "lora")]
    runs = [
        records(["full", "full", "warmup", "lora", "lora"], [1] * 5, switches=switches),
        records(["full"] * 3, [1] * 3),
    ]
    assert study.get_seconds(runs, {"full": 10.0, "warmup": 12.0, "lora": 7.0}) == [
        2 * 10 + 12 + 2 * 7 + 2 * 0.5,
        30,
    ]


def test_interval_by_hand():
    """Mean 2, standard error 1/√3, t(0.975, 2) = 4.3027."""
    assert study.interval(np.array([1.0, 2.0, 3.0])) == "+2.00 [-0.48, +4.48]"


@pytest.fixture
def fabricated(tmp_path, monkeypatch):
    """Every arm's runs, as files."""
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(study, "DOC", tmp_path / "study.md")
    seconds = {
        arm.name: {"full": 10.0} if arm is study.BASELINE else {"warmup": 11.0, "lora": 8.0}
        for arm in study.ARMS
    }
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "seconds.json").write_text(json.dumps(seconds))  # measured before
    for arm in study.ARMS:
        preset = train.load_preset(f"config/{arm.preset}.py")
        for seed in range(arm.seeds):
            run_dir = tmp_path / "runs" / f"{arm.name}-{seed}"
            run_dir.mkdir(parents=True)
            full = preset.mode == "full"
            phases = (
                ["full"] * (23 if arm is study.EQUAL_TIME else 24)
                if full
                else ["full"] * 14 + ["warmup"] * 2 + ["lora"] * 8
            )
            _, epochs, switches = records(
                phases,
                [10.0 if p == "full" else 8.0 for p in phases],
                80 + seed - (not full),
                () if full else [(14, "full", "warmup"), (16, "warmup", "lora")],
            )
            for e in epochs:  # they come to rest after epoch 10; each layer in its own way
                norms = {
                    family: [1.0, 2.0 + max(0, 10 - e["epoch"]), 3.0] for family in preset.target_modules
                }
                e |= {
                    "train_loss": 1.0,
                    "weight_norms": norms,
                    "adapter_norms": {} if e["phase"] == "full" else norms,
                }
            config = (
                vars(preset)
                | {"seed": seed, "run_dir": str(run_dir)}
                | ({"epochs": 23} if arm.name == "equal_time" else {})
            )
            (run_dir / "config.json").write_text(json.dumps(config))
            ranks = {family: [4, 8, 32] for family in preset.target_modules}
            at = (
                16 if (arm.name, seed) == (study.MAIN, 0) else 15
            )  # the one that did as replay says: equal means of windows 6, 7 and 8 (w = 2)
            switches = [
                s | {"ranks": {family: [4, 4, 4] for family in ranks}, "epoch": at}
                if s["epoch"] == 14
                else s | {"ranks": ranks}
                for s in switches
            ]
            (run_dir / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in epochs + switches))
    return tmp_path


def test_report(fabricated, monkeypatch, capsys):
    drawn = []

    def draw(argv):
        drawn.append(argv)
        for run in argv[:-2]:
            figures = Path(run) / "figures"
            figures.mkdir(exist_ok=True)
            for name in ("figure1", "figure3", "ranks"):
                (figures / f"{name}.png").write_text(run)

    monkeypatch.setattr(plot, "main", draw)
    (fabricated / "study.md").write_text(f"before\n{study.MARKS[0]}\nold\n{study.MARKS[1]}\nafter\n")
    assert study.main(["--report"]) == 0
    text = (fabricated / "study.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    prelora = next(line for line in text.splitlines() if line.startswith("| PreLoRA"))
    # 14 + 2 · 1.1 + 8 · 0.8 epochs' time and two switches, one point below the baseline in every seed
    assert [cell.strip() for cell in prelora.split("|")][2:8] == [
        "5",
        "15",
        "0.0 %",
        "81.00 ± 1.58",
        "-1.00 [-1.00, -1.00]",
        "-1.00 [-1.00, -1.00]",
    ]
    assert "227 s, 94.6 % | 1.10 | 0.80 |" in prelora
    assert study.get_equal_epochs() == 23
    assert len(drawn[0]) == sum(arm.seeds for arm in study.ARMS if arm.name in study.DRAWN) + 2
    assert drawn[0][-2:] == ["--out", str(fabricated / "study")]
    assert sorted(p.name for p in (fabricated / "study").iterdir()) == [
        "figure1.png",
        "figure3.png",
        "ranks.png",
    ]
    _, epochs, switches = load_run(
        fabricated / f"runs/timed/{study.FORKS[0].name}-0"
    )  # what is drawn: the same, but for the times
    assert [e["epoch_seconds"] for e in epochs] == [10.0] * 14 + [11.0] * 2 + [8.0] * 8 and len(switches) == 2
    assert (
        epochs[-1]["images_per_second"] == 100.0 and epochs[0]["images_per_second"] == 100.0
    )  # 1000 images in 10 s; 800 in 8 s
    assert f"1 of {sum(arm.seeds for arm in study.FORKS)} forked runs" in text
    study.write_report()
    assert (fabricated / "study.md").read_text() == text  # a second one replaces the first


def test_another_run_in_its_place_is_refused(fabricated):
    arm = study.FORKS[0]
    study.build_command(arm, 0)
    changed = json.loads((fabricated / f"runs/{arm.name}-0/config.json").read_text()) | {"tau": 0.9}
    (fabricated / f"runs/{arm.name}-0/config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="trained with another tau: remove it"):
        study.build_command(arm, 0)


def test_a_failing_run_ends_the_study_with_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RUNS", tmp_path)
    with pytest.raises(RuntimeError, match="run-0 ended with status 2: error: no such preset: nowhere.py"):
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
