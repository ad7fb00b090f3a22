"""study_method.py: gains, regrets and tables of made-up runs, by hand."""

import json

import numpy as np
import pytest

import study_method
import study_runs
from config.cli import load_preset, parse_flags
from errors import UserError
from model.optim import get_lr
from train import Config

COSTS = {"full": 1.0, "warmup": 1.2, "lora": 0.8}
RULES = {
    "minmax": {"parameters": [1000] * 3, "share": [0.5] * 3, "top1": [70.0] * 3},
    "spectrum": {"parameters": [999, 998, 997], "share": [0.6, 0.7, 0.8], "top1": [71.0, 72.0, 73.0]},
    "oracle": {"parameters": [1000] * 3, "share": [0.9] * 3, "top1": [75.0] * 3},
}


def get_full_loss(epoch):
    return 0.2 + 0.6 / epoch


def write_kept(arm, seed, top1):
    """A made-up run: its loss falls as 1 / epoch, and its adapters end 2 · left² above that."""
    flags = ["--seed", str(seed), *arm.flags.split()]
    cfg = parse_flags(flags, load_preset(Config, f"config/{arm.preset}.py"))
    switch = cfg.switch_epoch or cfg.epochs
    left = get_full_loss(min(switch + 1, cfg.epochs)) - (get_full_loss(23) + get_full_loss(24)) / 2
    lines = []
    for epoch in range(1, cfg.epochs + 1):
        phase = "full" if epoch <= switch else "warmup" if epoch == switch + 1 else "lora"
        loss = get_full_loss(epoch) + (2 * left**2 if phase == "lora" else 0)
        norms = {family: [1.0 + 1 / epoch, 2.0] for family in cfg.target_modules}
        line = {"event": "epoch", "epoch": epoch, "step": 93 * epoch, "phase": phase, "train_loss": loss}
        lr = get_lr(93 * epoch - 1, 3e-4, 93, 93 * cfg.epochs)
        lines.append(line | {"lr": lr, "frozen_blocks": 0, "weight_norms": norms, "val_top1": top1})
    lines.append({"event": "held_out", "val_top1": top1})
    folder = study_runs.get_kept(arm, seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(vars(cfg)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def fabricated(tmp_path, monkeypatch):
    """Seed s adds s points to all; a switch after e epochs ends at 80 + e / 10, all parameters at 82 less
    half a point for each epoch that is missing to 24."""
    monkeypatch.setattr(study_runs, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(study_method, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(study_method, "DOC", tmp_path / "method.md")
    for seed in range(study_method.SEEDS):
        for epoch, arm in study_method.SWITCHED.items():
            write_kept(arm, seed, 80 + seed + epoch / 10)
        for missing, arm in enumerate((study_runs.BASELINE, *study_runs.EQUAL)):
            write_kept(arm, seed, 82 + seed - missing / 2)
    for arm in study_runs.OF_RULES:
        for seed in range(arm.seeds):
            write_kept(arm, seed, 81 + seed + seed / 10)
    (tmp_path / "kept/rules.json").write_text(json.dumps(RULES))
    return tmp_path


def test_the_windows_are_all_of_them():
    assert list(study_method.SWITCHED) == list(range(4, 24, 2))
    assert all(arm.seeds == study_method.SEEDS for arm in study_method.SWITCHED.values())


def test_gains_by_hand(fabricated):
    """After 14: 14 + 1.2 + 9 · 0.8 = 22.4 epochs, worth 82 - 0.8; after 4: 20.4, given 21."""
    assert study_method.get_equal(0, 22.4) == pytest.approx(81.2)
    gains = study_method.get_gains(COSTS)
    assert gains[14] == pytest.approx([81.4 - 81.2] * 5)
    assert gains[4] == pytest.approx([80.4 - 80.5] * 5)
    assert gains[22] == pytest.approx([82.2 - 82.0] * 5)


def test_shortfalls_are_what_the_adapters_left(fabricated):
    shortfalls = study_method.get_shortfalls()
    assert list(shortfalls) == list(range(4, 20, 2))
    for values in shortfalls.values():
        assert values == pytest.approx([2.0] * 5)


def test_a_rule_gains_what_its_windows_do_and_nothing_where_it_never_switches():
    gains = {12: np.array([1.0, 2.0, 3.0]), 14: np.array([-1.0, 0.5, 4.0])}
    assert study_method.get_rule_gains(gains, [12, None, 14]).tolist() == [1.0, 0.0, 4.0]
    with pytest.raises(UserError, match="after epoch 13, and no arm"):
        study_method.get_rule_gains(gains, [12, 13, 14])


def test_regrets_by_hand(monkeypatch):
    """The best fixed window is 14, with 1 on average; each seed's own best are 1, 2 and, never, 0."""
    monkeypatch.setattr(study_method, "SEEDS", 3)
    gains = {12: np.array([1.0, 0.0, -1.0]), 14: np.array([0.5, 2.0, -1.0])}
    table = study_method.get_rule_table(gains, {"one": [12, None, 14], "never": [None] * 3})
    one, never = table.splitlines()[2:]
    assert one.startswith("| one | 12, never, 14 | +0.00 [-2.48, +2.48] | +0.50 [") and one.endswith(
        "| 1.00 |"
    )
    assert never.startswith("| never | never, never, never | +0.00 [+0.00, +0.00] | +0.50 [")


def test_report(fabricated):
    marks = [mark.format(what) for what in ("when to switch", "which ranks") for mark in study_method.MARKS]
    (fabricated / "method.md").write_text(f"a\n{marks[0]}\nold\n{marks[1]}\nb\n{marks[2]}{marks[3]}\nc\n")
    study_method.write_report(COSTS)
    text = (fabricated / "method.md").read_text()
    assert text.startswith("a\n") and "\nb\n" in text and text.endswith("\nc\n") and "old" not in text
    assert "| 14 | 83.40 | 22.40 | +0.20 [+0.20, +0.20] | 2.00 (2.00 to 2.00) |" in text
    assert "| never | 84.00 | 24.00 | 0 |  |" in text
    rows = [line for line in text.splitlines() if line.startswith("| forecast, calibrated by")]
    assert len(rows) == len(study_method.FORKED_AT)
    assert "| spectrum, of the last window | 998 | 70.0 | 72.00 | 83.20 | -0.20 [" in text
    assert "| minmax (Algorithm 2) | 1,000 | 50.0 | 70.00 | 83.40 |  |" in text
    assert "| the spectrum of the rest itself | 1,000 | 90.0 | 75.00 |  |  |" in text
    assert sorted(path.name for path in (fabricated / "method").iterdir()) == ["ranks.png", "switch.png"]
    study_method.write_report(COSTS)
    assert (fabricated / "method.md").read_text() == text  # a second one replaces the first


def test_a_lost_page_is_one_sentence(fabricated):
    (fabricated / "method.md").write_text("no marks")
    with pytest.raises(UserError, match="has lost the marks"):
        study_method.write_report(COSTS)
