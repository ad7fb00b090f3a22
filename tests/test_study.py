"""study.py's arithmetic, and its report from made-up runs."""

import json

import numpy as np
import pytest

import study
import train
from monitor import plot


def test_every_arm_is_a_run_that_train_accepts():
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
    base = {"event": "epoch", "weight_norms": {"q": [1.0]}, "adapter_norms": {}, "images_per_second": 100.0, "peak_memory_bytes": 2**30,
            "train_top1": 50.0, "val_loss": 1.0, "val_top1": top1, "val_top5": 99.0, "lr": 0.1, "trainable_params": 10}
    epochs = [base | {"epoch": i, "step": 93 * i, "phase": p, "epoch_seconds": s, "train_loss": 1 / i, "step_losses": [1 / i] * 93}
              for i, (p, s) in enumerate(zip(phases, seconds), 1)]
    return {}, epochs, [{"event": "switch", "epoch": e, "from": f, "to": t, "ranks": {}, "seconds": 0.5} for e, f, t in switches]


def test_seconds_by_hand():
    """Two seeds; one moment of 90 s in a quarter of the epochs changes nothing."""
    phases = ["full", "full", "warmup", "lora", "lora"]
    switches = [(2, "full", "warmup"), (3, "warmup", "lora")]
    runs = [records(phases, [10, 10, 12, 7, 7], switches=switches), records(phases, [90, 11, 12, 7, 90], switches=switches)]
    assert study.quiet_seconds([e for _, epochs, _ in runs for e in epochs], "lora") == 7
    assert study.get_seconds(runs, 10.0) == [2 * 10 + 12 + 2 * 7 + 2 * 0.5] * 2
    assert study.get_seconds(runs, 20.0) == [2 * 20 + 12 + 2 * 7 + 2 * 0.5] * 2  # the full phase is everybody's


def test_interval_by_hand():
    """Mean 2, standard error 1/√3, t(0.975, 2) = 4.3027."""
    assert study.interval(np.array([1.0, 2.0, 3.0])) == "+2.00 [-0.48, +4.48]"


@pytest.fixture
def fabricated(tmp_path, monkeypatch):
    """Every arm's runs, as files."""
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(study, "DOC", tmp_path / "study.md")
    monkeypatch.setattr(study, "ROOT", study.ROOT)
    for arm in study.ARMS:
        preset = train.load_preset(f"config/{arm.preset}.py")
        for seed in range(arm.seeds):
            run_dir = tmp_path / "runs" / f"{arm.name}-{seed}"
            run_dir.mkdir(parents=True)
            full = preset.mode == "full"
            phases = ["full"] * 24 if full else ["full"] * 14 + ["warmup"] * 2 + ["lora"] * 8
            _, epochs, switches = records(phases, [10.0 if p == "full" else 8.0 for p in phases], 80 + seed - (not full),
                                          () if full else [(14, "full", "warmup"), (16, "warmup", "lora")])
            norms = {family: [1.0, 2.0, 3.0] for family in preset.target_modules}
            for e in epochs:
                e |= {"weight_norms": norms, "adapter_norms": {} if e["phase"] == "full" else norms}
            config = vars(preset) | {"seed": seed, "run_dir": str(run_dir)} | ({"epochs": 23} if arm.name == "equal_time" else {})
            (run_dir / "config.json").write_text(json.dumps(config))
            (run_dir / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in epochs + switches))
    return tmp_path


def test_report(fabricated, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(plot, "main", drawn.append)
    (fabricated / "study.md").write_text(f"before\n{study.MARKS[0]}\nold\n{study.MARKS[1]}\nafter\n")
    assert study.main(["--report"]) == 0
    text = (fabricated / "study.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    prelora = next(line for line in text.splitlines() if line.startswith("| PreLoRA"))
    # 14 + 2 · 0.8 + 8 · 0.8 epochs' time and two switches, one point below the baseline in every seed
    assert [cell.strip() for cell in prelora.split("|")][2:8] == ["5", "14", "0.0 %", "81.00 ± 1.58", "-1.00 [-1.00, -1.00]", "-1.00 [-1.00, -1.00]"]
    assert "221 s, 92.1 %" in prelora
    assert study.get_equal_epochs() == 22
    runs = 0
    for arm in study.ARMS:
        runs += arm.seeds
    assert len(drawn[0]) == runs + 2 and drawn[0][-2:] == ["--out", str(fabricated / "study")]
    # the made-up norms never change, so the switch would have come earlier than in the made-up runs: the check must notice
    assert f"0 of {sum(arm.seeds for arm in study.FORKS)} forked runs" in text
    study.write_report()
    assert (fabricated / "study.md").read_text() == text  # a second one replaces the first


def test_a_missing_run_or_flag_is_one_line(fabricated, capsys):
    (fabricated / "runs" / "exp1-2" / "metrics.jsonl").unlink()
    (fabricated / "study.md").write_text(f"{study.MARKS[0]}\n{study.MARKS[1]}")
    assert study.main(["--report"]) == 1
    assert "exp1-2 has no finished epoch" in capsys.readouterr().err
    assert study.main(["--reprot"]) == 2
