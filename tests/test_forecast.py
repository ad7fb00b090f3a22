"""monitor/forecast.py: the rule by hand, on logs whose law is known, on truncated ones; and in a run."""

import dataclasses
import json
import math
import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from small_runs import SMALL, events, get_error, no_figures, resume, run  # noqa: F401 (a fixture)

import replay
import train
from config.checks import check_config
from errors import UserError
from model.optim import get_lr
from monitor.convergence import find_own_switch, find_switch, get_switch_settings, switch_due
from monitor.forecast import (
    MEMORY,
    LossLaw,
    fit_law,
    get_areas,
    get_logged_rates,
    get_outlook,
    judge,
    measure_shortfall,
)
from monitor.perf import time_phases
from start import get_rates

STEPS, EPOCHS, WARMUP = 20, 24, 20  # an epoch, the run, the learning rate's warmup
LAW = LossLaw(L0=0.2, A=0.03, alpha=0.6, C=0.5)
SETTINGS = dict(
    mode="prelora",
    switch_rule="forecast",
    epochs=EPOCHS,
    window_epochs=2,
    num_windows=3,
    switch_epoch=None,
    lr_warmup_steps=WARMUP,
    lora_warmup_epochs=1,
    warmup_cost=1.25,
    lora_cost=0.75,
    forecast_shortfall=1.0,
    tau=0.5,
    zeta=2.5,
    target_modules=("q",),
)


def get_settings(**changed):
    return SimpleNamespace(**(SETTINGS | changed))


def get_cosine(cfg, total_steps):
    return [get_lr(step, 1e-3, cfg.lr_warmup_steps, total_steps) for step in range(total_steps)]


def get_law_losses(law, rates) -> list[float]:
    """The law's loss after each step, by its definition: a double sum over the falls and what is left of
    them."""
    losses = []
    for end in range(len(rates)):
        S1 = sum(rates[: end + 1])
        S2 = 0.0
        for k in range(WARMUP + 1, end + 1):
            fall = rates[k - 1] - rates[k]
            S2 += fall * sum(MEMORY ** (i - k) for i in range(k, end + 1))
        losses.append(law.L0 + law.A * S1**-law.alpha - law.C * S2)
    return losses


def make_log(losses, rates, count=EPOCHS, noise=0.0) -> list[dict]:
    """Epoch records of a full phase whose steps had these losses."""
    random = np.random.default_rng(0)
    records = []
    for epoch in range(1, count + 1):
        mean = float(np.mean(losses[(epoch - 1) * STEPS : epoch * STEPS]))
        records.append(
            {
                "event": "epoch",
                "epoch": epoch,
                "step": epoch * STEPS,
                "phase": "full",
                "lr": rates[epoch * STEPS - 1],
                "train_loss": mean + noise * float(random.standard_normal()),
                "weight_norms": {"q": [1.0]},
            }
        )
    return records


@pytest.fixture(scope="module")
def rates():
    return get_cosine(get_settings(), EPOCHS * STEPS)


@pytest.fixture(scope="module")
def losses(rates):
    return get_law_losses(LAW, rates)


def test_areas_by_hand():
    """Two steps of warmup; then the rate stays, falls by 1, by 1 again, and rises by 0.5."""
    S1, S2 = get_areas(np.array([1.0, 2.0, 2.0, 1.0, 0.0, 0.5]), warmup_steps=2)
    m = MEMORY
    np.testing.assert_allclose(S1, [1, 3, 5, 6, 6, 6.5])
    falls = [0, 0, 0, 1, 1 + m, -0.5 + m * (1 + m)]
    np.testing.assert_allclose(S2, np.cumsum(falls))


def test_the_areas_are_the_law_s_double_sum(losses, rates):
    S1, S2 = get_areas(np.array(rates), WARMUP)
    mine = [LAW.get_loss(*areas) for areas in zip(S1, S2)]
    np.testing.assert_allclose(mine[WARMUP:], losses[WARMUP:], rtol=1e-12)


def test_logged_rates_by_hand():
    """Those of the settings to the bit; and twice as high at the second epoch's end, where the log has that,
    one and a half times in the middle."""
    rates = np.array([1.0, 2.0, 2.0, 1.0, 0.5, 0.0])
    log = [{"step": 2, "lr": 2.0}, {"step": 4, "lr": 1.0}]
    np.testing.assert_array_equal(get_logged_rates(log, rates), rates[:4])
    log[1]["lr"] = 2.0
    np.testing.assert_allclose(get_logged_rates(log, rates), [1.0, 2.0, 2.0 * 1.5, 2.0])


@pytest.mark.parametrize("warmup", [0, 5, 20, 30])
def test_the_learning_rate_s_warmup_may_end_within_an_epoch(warmup):
    """The law's double sum with another warmup: the expected gain is the law's own at every window."""
    cfg = get_settings(lr_warmup_steps=warmup, forecast_shortfall=10.0)

    def get_true(total_steps):
        S1, S2 = get_areas(np.array(get_cosine(cfg, total_steps)), warmup)
        return LAW.get_loss(S1, S2)

    losses, rates = get_true(EPOCHS * STEPS), get_cosine(cfg, EPOCHS * STEPS)
    for count in (12, 18):
        outlook = get_outlook(make_log(losses, rates, count), cfg, get_cosine)
        left = losses[(count + 1) * STEPS - 1] - losses[-1]
        equal = get_true(round(outlook.equal_epochs * STEPS))[-1]
        assert outlook.gains[-1] == pytest.approx(equal - losses[-1] - 10.0 * left**2, abs=2e-4)


@pytest.mark.parametrize(
    "law", [LAW, LossLaw(0.0, 0.1, 0.3, 0.2), LossLaw(0.5, 0.01, 1.2, 0.0), LossLaw(1.0, 0.0, 0.5, 0.0)]
)
def test_a_fit_finds_the_law_that_made_the_log(law, rates):
    losses = np.array(get_law_losses(law, rates))
    S1, S2 = get_areas(np.array(rates), WARMUP)
    epochs = np.stack([S1, S2, losses])[:, WARMUP:].reshape(3, EPOCHS - 1, STEPS)
    found = fit_law(epochs[0], epochs[1], epochs[2].mean(axis=1))
    assert found.L0 + found.C + found.A >= 0 and min(found) >= 0
    np.testing.assert_allclose(found.get_loss(S1, S2)[WARMUP:], losses[WARMUP:], atol=1e-5)
    if law.A:  # else alpha is anything
        np.testing.assert_allclose(found, law, rtol=0.01, atol=2e-3)


def test_a_fit_never_goes_below_0(rates):
    """A log that rises as the rate falls: no law of this form has that, and the nearest is flat."""
    S1, S2 = (area[WARMUP:].reshape(-1, STEPS) for area in get_areas(np.array(rates), WARMUP))
    rising = np.linspace(0.5, 1.0, EPOCHS - 1)
    found = fit_law(S1, S2, rising)
    assert min(found) >= 0 and found.C == 0
    assert found.get_loss(S1, S2).mean(axis=1) == pytest.approx(rising.mean(), abs=0.01)


def get_truth(losses, count, cfg):
    """(final, switched, equal) after `count` epochs, from the law itself and not from a fit."""
    freeze = count + cfg.lora_warmup_epochs
    final, left = losses[-1], losses[freeze * STEPS - 1] - losses[-1]
    equal_epochs = count + cfg.lora_warmup_epochs * cfg.warmup_cost
    equal_epochs += (cfg.epochs - freeze) * cfg.lora_cost
    equal = get_law_losses(LAW, get_cosine(cfg, round(equal_epochs * STEPS)))[-1]
    return final, final + cfg.forecast_shortfall * left**2, equal_epochs, equal


@pytest.mark.parametrize("count", [10, 12, 16, 20, 22])
def test_the_outlook_on_a_truncated_log_is_the_law_s_own(losses, rates, count):
    cfg = get_settings()
    outlook = get_outlook(make_log(losses, rates, count), cfg, get_cosine)
    final, switched, equal_epochs, equal = get_truth(losses, count, cfg)
    assert outlook.epoch == count and outlook.equal_epochs == equal_epochs
    assert outlook.final == pytest.approx(final, abs=1e-4)
    assert outlook.switched == pytest.approx(switched, abs=1e-4)
    assert outlook.equal == pytest.approx(equal, abs=1e-4)


def test_the_switch_is_where_the_law_puts_it(losses, rates):
    """At the first window's end at which the law itself, unfitted, expects a gain; with enough fits."""
    log = make_log(losses, rates)
    found = {}
    for shortfall in (100.0, 20.0, 10.0, 5.0, 0.0):
        cfg = get_settings(forecast_shortfall=shortfall)
        ends = range(12, EPOCHS, 2)  # the first with fits up to 8, 10 and 12 epochs
        truth = [count for count in ends if get_gain(losses, count, cfg) > 0]
        found[shortfall] = find_switch(log, cfg, get_cosine)
        assert found[shortfall] == (truth[0] if truth else None)
    assert list(found.values()) == [None, 20, 18, 14, 12]


def get_gain(losses, count, cfg):
    _, switched, _, equal = get_truth(losses, count, cfg)
    return equal - switched


def test_a_cheap_lora_phase_switches_earlier_and_a_dear_one_never(losses, rates):
    log = make_log(losses, rates)
    found = [
        find_switch(log, get_settings(lora_cost=cost, forecast_shortfall=10.0), get_cosine)
        for cost in (0.4, 0.75, 1.0)
    ]
    assert found == [12, 18, None]


def test_it_is_due_only_at_a_window_s_end_and_never_before_there_are_enough_fits(losses, rates):
    cfg = get_settings(forecast_shortfall=0.0)
    due = [n for n in range(EPOCHS) if switch_due(make_log(losses, rates, n), cfg, get_cosine)]
    assert due[0] == 12 and all(n % 2 == 0 for n in due)
    verdicts = [get_outlook(make_log(losses, rates, n), cfg, get_cosine).verdict for n in (2, 6, 8, 10)]
    assert verdicts == ["too early"] * 4
    assert get_outlook(make_log(losses, rates, 6), cfg, get_cosine).law is None  # 5 epochs after the warmup


def test_successive_fits_that_disagree_decide_nothing(losses, rates):
    """From epoch 10 on the loss falls more slowly than before: fits up to there expect too much of the
    annealing that is left, and no gain of a switch; later ones expect one. All three must."""
    kinked = make_log(losses, rates)
    for record in kinked[10:]:
        record["train_loss"] += 0.0125 * (record["epoch"] - 10)
    cfg = get_settings(forecast_shortfall=12.0)
    outlooks = {n: get_outlook(kinked[:n], cfg, get_cosine) for n in (12, 14, 16)}
    assert [outlook.verdict for outlook in outlooks.values()] == ["fits disagree", "fits disagree", "switch"]
    assert outlooks[14].gains[0] < 0 < outlooks[14].gains[2]
    assert find_switch(kinked, cfg, get_cosine) == 16
    newest = get_settings(forecast_shortfall=12.0, num_windows=2)  # fewer are to agree: it is less careful
    assert find_switch(kinked, newest, get_cosine) == 14


@pytest.mark.parametrize(
    "gains, verdict",
    [
        ((), "too early"),
        ((0.1, 0.2), "too early"),
        ((0.1, 0.2, 0.3), "switch"),
        ((0.1, 0.0, 0.3), "fits disagree"),
        ((0.1, 0.2, -0.3), "fits disagree"),
        ((-0.1, 0.0, -0.3), "wait"),
    ],
)
def test_verdicts(gains, verdict):
    assert judge(gains, needed=3) == verdict


def test_the_end_of_the_run_is_no_place_to_switch(losses, rates):
    """After the last epoch nothing is left to be gained, nor before it where only the warmup would follow."""
    cfg = get_settings(forecast_shortfall=0.0)
    last = get_outlook(make_log(losses, rates), cfg, get_cosine)
    assert last.equal_epochs == EPOCHS and last.gains[-1] == pytest.approx(0, abs=1e-6)
    assert last.verdict == "wait"
    almost = get_outlook(make_log(losses, rates, 23), get_settings(window_epochs=1), get_cosine)
    assert almost.verdict == "wait"  # its one epoch left is the warmup
    only_warmup = get_settings(forecast_shortfall=0.0, lora_warmup_epochs=2)
    assert get_outlook(make_log(losses, rates, 22), only_warmup, get_cosine).verdict == "wait"
    assert get_outlook(make_log(losses, rates, 20), cfg, get_cosine).verdict == "switch"


def test_a_loss_that_is_not_finite_is_an_error(losses, rates):
    log = make_log(losses, rates, 12)
    log[3]["train_loss"] = math.nan
    with pytest.raises(FloatingPointError, match="epoch 4: the training loss is not finite"):
        get_outlook(log, get_settings(), get_cosine)


def test_settings_that_changed_on_the_way_judge_from_then_on(losses, rates):
    """Spans as a run's starts have them: a shortfall of 100 up to epoch 15's end, none from then on."""

    @dataclasses.dataclass
    class Settings:
        pass

    cfg = dataclasses.make_dataclass("Settings", [*SETTINGS, "lr", "lr_schedule", "lr_decay_share"])(
        **SETTINGS, lr=1e-3, lr_schedule="cosine", lr_decay_share=0.2
    )
    strict = get_switch_settings(dataclasses.replace(cfg, forecast_shortfall=100.0))
    loose = get_switch_settings(dataclasses.replace(cfg, forecast_shortfall=0.0))
    log = make_log(losses, rates)
    assert {"forecast_shortfall", "lora_cost", "epochs", "lr"} <= strict.keys()
    assert find_own_switch(log, cfg, [(0, strict), (15, loose)], get_cosine) == 16
    assert find_own_switch(log, cfg, [(0, strict)], get_cosine) is None
    by_thresholds = dataclasses.replace(cfg, switch_rule="algorithm1")
    assert "forecast_shortfall" not in get_switch_settings(by_thresholds)


# ---- calibration


def get_losses_log(phases: str, losses: list[float]) -> list[dict]:
    names = {"f": "full", "w": "warmup", "l": "lora"}
    return [
        {"event": "epoch", "epoch": i, "phase": names[phase], "train_loss": loss}
        for i, (phase, loss) in enumerate(zip(phases, losses), 1)
    ]


def test_shortfall_by_hand():
    """From 1.0 at the freeze, after epoch 3, all parameters come to 0.6 and the fork to 0.7: 0.1 / 0.4²."""
    full = get_losses_log("fffffff", [2.0, 1.5, 1.0, 0.9, 0.8, 0.7, 0.5])
    fork = get_losses_log("ffwllll", [2.0, 1.5, 1.1, 1.2, 0.9, 0.8, 0.6])
    assert measure_shortfall(fork, full, window_epochs=2) == pytest.approx(0.1 / 0.4**2)
    # Of a fork that stopped an epoch earlier, with windows of one epoch: 0.8 and 0.7 there.
    assert measure_shortfall(fork[:-1], full, window_epochs=1) == pytest.approx(0.1 / 0.3**2)
    lower = get_losses_log("ffwllll", [2.0, 1.5, 1.1, 1.2, 0.9, 0.5, 0.4])
    assert measure_shortfall(lower, full, window_epochs=2) == 0


def test_shortfalls_that_can_t_be_had():
    full = get_losses_log("fffffff", [2.0, 1.5, 1.0, 0.9, 0.8, 0.7, 0.5])
    fork = get_losses_log("ffwllll", [2.0, 1.5, 1.1, 1.2, 0.9, 0.8, 0.6])
    with pytest.raises(ValueError, match="3 epochs after the freeze in common"):
        measure_shortfall(fork[:-1], full, window_epochs=2)
    with pytest.raises(ValueError, match="0 epochs after the freeze in common"):
        measure_shortfall(full, full, window_epochs=2)
    flat = get_losses_log("fffffff", [1.0] * 7)
    with pytest.raises(ValueError, match="all parameters learned nothing after epoch 3"):
        measure_shortfall(fork, flat, window_epochs=2)


# ---- costs


def test_phases_are_timed_one_by_one_and_forgotten():
    taken, alive = [], []

    class Step:
        def __init__(self, phase):
            self.phase = phase
            alive.append(phase)

        def __call__(self):
            taken.append(self.phase)

        def __del__(self):
            alive.remove(self.phase)

    def build_step(phase):
        assert not alive  # the one before is gone
        return Step(phase)

    seconds = time_phases(build_step, torch.device("cpu"))
    assert list(seconds) == ["full", "warmup", "lora"] and min(seconds.values()) > 0
    assert taken == ["full"] * 12 + ["warmup"] * 12 + ["lora"] * 12 and not alive


# ---- in a run

RUN = (
    "--switch_rule forecast --forecast_shortfall 0.0 --lora_warmup_epochs 1 --window_epochs 1 --num_windows 2"
)
RUN = [*RUN.split(), "--epochs", 12, "--lora_cost", 0.1]


@pytest.fixture
def timed(monkeypatch):
    """The phases are timed, but 1.25 and 0.1 is what is found: a busy machine can find anything. A list of
    what was."""
    seconds = []

    def time_twice(*arguments):
        seconds.append(time_phases(*arguments))
        return {"full": 2.0, "warmup": 2.5, "lora": 0.2}

    monkeypatch.setattr(train, "time_phases", time_twice)
    return seconds


def test_a_run_switches_by_the_forecast_and_replay_says_the_same(small, tmp_path, capsys, timed):
    """The costs that are not given are timed before the first step, written where a resume finds them, and
    leave the run as it would have been."""
    run_dir = tmp_path / "run"
    did = run(small, run_dir, *RUN)
    assert len(timed) == 1 and min(timed[0].values()) > 0
    config = json.loads((run_dir / "config.json").read_text())
    assert config["lora_cost"] == 0.1 and config["warmup_cost"] == 1.25
    start = next(record for record in did if record["event"] == "start")
    assert start["switch_settings"]["warmup_cost"] == config["warmup_cost"]
    assert any("forecast: steps cost" in note for note in start["notes"])
    switches = [record for record in did if record["event"] == "switch"]
    assert [switch["to"] for switch in switches] == ["warmup", "lora"]
    assert replay.main([str(run_dir)]) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines()]
    assert [row[7] for row in rows if row and row[0] == "forecast"] == [str(switches[0]["epoch"])]
    assert "the shortfall is 0\n" in said
    assert [row[0] for row in rows if row and row[-1] == "switch"] == [str(switches[0]["epoch"])]

    again = run(small, tmp_path / "again", *RUN, "--warmup_cost", 1.25)
    assert len(timed) == 1  # nothing more
    assert not any("forecast" in note for note in again[0]["notes"])
    losses = [record["train_loss"] for record in did if record["event"] == "epoch"]
    assert losses == [record["train_loss"] for record in again if record["event"] == "epoch"]


def go_on_rank(arguments):
    """train.py on this process, of which each has times of its own."""
    times = {"full": 2.0, "warmup": 2.5, "lora": 0.1}
    if os.environ["RANK"] == "1":
        times = {"full": 1.0, "warmup": 3.0, "lora": 0.1}
    with mock.patch.object(train, "time_phases", lambda *_: times):
        return train.main([str(argument) for argument in arguments])


def test_two_processes_go_by_the_slower_one_s_costs(on_ranks, small, tmp_path):
    """3.0 / 2.0. If they went each by its own they could switch at different epochs, and wait for each
    other."""
    flags = [*SMALL, *RUN, "--data_dir", small, "--run_dir", tmp_path / "run"]
    assert on_ranks(2, go_on_rank, flags) == [0, 0]
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["warmup_cost"] == 1.5 and config["lora_cost"] == 0.1
    assert [event["to"] for event in events(tmp_path / "run", "switch")] == ["warmup", "lora"]


def test_a_resumed_run_keeps_the_costs_that_were_timed(small, tmp_path, timed):
    run_dir = tmp_path / "run"
    run(small, run_dir, *RUN, "--max_steps", 15)
    assert resume(run_dir, "--max_steps", "None") == 0
    assert json.loads((run_dir / "config.json").read_text())["warmup_cost"] == 1.25 and len(timed) == 1
    assert [event["to"] for event in events(run_dir, "switch")] == ["warmup", "lora"]


def test_a_run_whose_forecast_never_expects_a_gain_says_so_at_its_end(small, tmp_path):
    costs = ["--warmup_cost", 2.0, "--lora_cost", 2.0, "--forecast_shortfall", 9.0]
    did = run(small, tmp_path / "run", *RUN, *costs)
    assert not [record for record in did if record["event"] == "switch"]
    warnings = [record["message"] for record in did if record["event"] == "warning"]
    assert any("the forecast expected no gain of a switch" in warning for warning in warnings)


@pytest.fixture(scope="module")
def full(small, tmp_path_factory):
    """A full run of RUN's length, with what a spectrum needs."""
    run_dir = tmp_path_factory.mktemp("forecast") / "full"
    flags = ["--mode", "full", "--epochs", 12, "--window_epochs", 1, "--keep_every", 1]
    run(small, run_dir, *flags, "--log_displacement", "True")
    return run_dir


def test_replay_measures_the_shortfall(small, full, tmp_path, capsys):
    fork, csv = tmp_path / "fork", tmp_path / "x.csv"
    switch = ["--mode", "prelora", "--switch_epoch", 3, "--lora_warmup_epochs", 1, "--window_epochs", 1]
    run(small, fork, "--epochs", 12, "--fork", f"{full}@3", *switch)
    asked = [str(full), "--switch_rule", "forecast", "--calibrate", str(fork), "--csv", str(csv)]
    assert replay.main([*asked, "--warmup_cost", "1.2", "--lora_cost", "0.8"]) == 0
    shortfall = measure_shortfall(events(fork, "epoch"), events(full, "epoch"), 1)
    told = capsys.readouterr().out
    assert f"the shortfall is {round(shortfall, 3):g}\n" in told
    assert (
        "w is 1, steps of warmup and lora phase cost 1.2 and 0.8 full ones" in told
    )  # the fork's, not full's
    assert replay.main([*asked, "--times", str(fork)]) == 2  # whose full epochs another run has timed
    assert "--times RUN, which has trained epochs of all phases itself and is no fork" in get_error(capsys)
    asked[4] = str(full)
    assert replay.main([*asked, "--warmup_cost", "1.2", "--lora_cost", "0.8"]) == 2
    assert "0 epochs after the freeze in common" in get_error(capsys)
    config = json.loads((fork / "config.json").read_text())
    (fork / "config.json").write_text(json.dumps(config | {"seed": 1}))
    asked[4] = str(fork)
    assert replay.main(asked) == 2
    assert "differ in more than the switch: seed is 0 and 1" in get_error(capsys)
    assert (
        replay.main([str(full), "--switch_rule", "forecast", "--lora_cost", "1", "--warmup_cost", "1"]) == 2
    )
    assert "needs --forecast_shortfall" in get_error(capsys)
    assert replay.main([str(full), "--forecast_shortfall", "3"]) == 2
    assert "--forecast_shortfall is the forecast's: it needs --switch_rule forecast" in get_error(capsys)


def test_replay_s_flags_hold_against_the_run_s_own(small, tmp_path, capsys):
    """A run that has switched by a shortfall of 0, judged by one of 1000: table and row say the same."""
    run(small, tmp_path / "run", *RUN, "--warmup_cost", 1.25)
    assert replay.main([str(tmp_path / "run"), "--forecast_shortfall", "1e6"]) == 1
    told = capsys.readouterr().out
    row = next(line for line in told.splitlines() if line.strip().startswith("forecast  "))
    assert "not by" in row and " switch\n" not in told


def test_forks_and_resumes_that_turn_the_forecast_on(small, full, tmp_path, capsys, timed):
    """With ranks by the spectrum, which asks at the start whether a switch is due."""
    costs = ["--warmup_cost", 1.25, "--lora_cost", 0.1]
    spectrum = ["--mode", "prelora", "--rank_rule", "spectrum", "--log_displacement", "True"]
    forked = run(small, tmp_path / "fork", *RUN, *costs, *spectrum, "--fork", f"{full}@5")
    assert [event["epoch"] for event in forked if event["event"] == "switch"] == [8, 9]
    free = [flag for flag in RUN if flag not in ("--lora_cost", 0.1)]
    argv = [
        *SMALL,
        "--data_dir",
        small,
        "--run_dir",
        tmp_path / "no",
        *free,
        *spectrum,
        "--fork",
        f"{full}@5",
    ]
    capsys.readouterr()
    assert train.main([str(argument) for argument in argv]) == 2
    assert "a fork by switch_rule forecast needs --warmup_cost and --lora_cost" in get_error(capsys)

    by_thresholds = ["--epochs", 12, "--window_epochs", 1, "--tau", 1e-9, *spectrum]
    run(small, tmp_path / "run", *by_thresholds, "--max_steps", 36)
    turned_on = ["--switch_rule", "forecast", "--forecast_shortfall", 0, "--lora_warmup_epochs", 1]
    assert resume(tmp_path / "run", *turned_on, "--lora_cost", 0.1, "--max_steps", "None") == 0
    assert len(timed) == 1
    assert [event["to"] for event in events(tmp_path / "run", "switch")] == ["warmup", "lora"]


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"mode": "full"}, "mode full does not ask"),
        ({"mode": "lora"}, "mode lora does not ask"),
        ({"forecast_shortfall": None}, "needs --forecast_shortfall"),
        ({"lr_schedule": "wsd"}, "needs a learning rate that falls all the time"),
        ({"fork": "runs/x", "lora_cost": 1.0}, "a fork by switch_rule forecast needs"),
    ],
)
def test_settings_that_make_no_forecast(changed, said):
    fine = train.Config(switch_rule="forecast", forecast_shortfall=0.0)
    check_config(fine)
    check_config(dataclasses.replace(fine, switch_epoch=12, forecast_shortfall=None))  # which decides itself
    with pytest.raises(UserError, match=said):
        check_config(dataclasses.replace(fine, **changed))


def test_the_rates_are_those_of_the_run():
    cfg = train.Config(lr_schedule="wsd", lr_warmup_steps=10, lr=2e-3)
    rates = get_rates(cfg, 100)
    assert rates == [get_lr(step, 2e-3, 10, 100, "wsd", 0.2) for step in range(100)]
