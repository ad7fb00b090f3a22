"""When to switch: Algorithm 1 of PreLoRA (arXiv 2509.21619) on a run's log, and the signs of a bad switch.

The log is the state: these are functions of epoch records as they stand in metrics.jsonl, and keep nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from errors import UserError


class Settings(Protocol):
    """What the switch depends on: train.Config has these fields."""

    mode: str  # full: there are no ranks, and switch_epoch is when blocks are frozen
    switch_rule: str  # algorithm1, or forecast, which depends on ForecastSettings instead of thresholds
    tau: float  # threshold on the weight norms' change between windows, in %
    zeta: float  # threshold on the training loss's change between windows, in %
    num_windows: int  # consecutive windows that must agree, k in the paper
    window_epochs: int  # epochs per window, m in the paper
    switch_epoch: int | None  # switch after so many epochs instead of by a rule
    lr_warmup_steps: int  # windows that begin in the learning rate's warmup don't count for the test
    target_modules: Sequence[str]  # the families whose norms are looked at


# Those that a run may change when it goes on. Each start's record has them, as "switch_settings".
CHANGEABLE = ("switch_rule", "tau", "zeta", "num_windows", "switch_epoch", "lr_warmup_steps")
# By the forecast it depends on these besides.
FORECAST = "forecast_shortfall warmup_cost lora_cost lora_warmup_epochs epochs".split()
FORECAST += "lr lr_schedule lr_decay_share".split()


GetRates = Callable[..., list[float]]  # see monitor/forecast.py


class Window(NamedTuple):
    """Means over the epochs of a full window."""

    start: int  # epochs that were completed when the window began
    norms: dict[str, list[float]]  # family -> the weight norm of each layer
    loss: float


def percent_change(new: float, old: float) -> float:
    """(new − old) / old · 100; 0 / 0 is no change.

    Raises ValueError for a value that is not finite: an error, not a pass.
    """
    if not (math.isfinite(new) and math.isfinite(old)):
        raise ValueError(f"a weight norm or loss is not finite: {old} -> {new}")
    if old == 0:
        return 0.0 if new == 0 else math.inf
    return (new - old) / old * 100


def partial_convergence_test(
    norms: dict[str, Sequence[float]], losses: Sequence[float], tau: float, zeta: float
) -> bool:
    """Algorithm 1. `norms[family]` holds k window means of the weight norm (over epochs and layers), `losses`
    those of the loss.

    Passes when |ΔW_t^a| ≤ tau and |ΔL_t| ≤ zeta, in %, for every family a and every t = 2..k. Equality passes
    (the paper fails on >), also where rounding put it 1e-9 above.
    Raises ValueError for k < 2, no family, families of another length than the losses, or a value that is not
    finite.
    """
    uneven = any(len(means) != len(losses) for means in norms.values())
    if len(losses) < 2 or not norms or uneven:
        raise ValueError(
            "the partial convergence test needs at least two windows, "
            "the same ones for every family and the loss"
        )
    # Every value is looked at before the answer is given, so that a NaN is an error wherever it stands.
    passes = is_within(losses, zeta)
    for means in norms.values():
        passes = is_within(means, tau) and passes
    return passes


def is_within(series: Sequence[float], limit: float) -> bool:
    """Whether no value differs by more than `limit` % from the one before. Raises as `percent_change`."""
    changes = [abs(percent_change(new, old)) for old, new in zip(series, series[1:])]
    return all(change <= limit * (1 + 1e-9) for change in changes)


def get_windows(epochs: list[dict], cfg: Settings) -> list[Window]:
    """The full windows of a full phase's epoch records, which must be the epochs 1..n in order.

    Windows are disjoint and the first begins before epoch 1; epochs of a window that is not yet full are left
    out. Raises UserError for records that are not the epochs 1..n or lack a family of cfg.target_modules,
    FloatingPointError for a norm or loss that is not finite, ValueError for settings without two windows.
    """
    check_settings(cfg)
    check_order(epochs)
    for record in epochs:
        check_record(record, cfg.target_modules)
    size = cfg.window_epochs
    starts = range(0, len(epochs) - size + 1, size)
    return [build_window(epochs[start : start + size], cfg.target_modules) for start in starts]


def get_switch_settings(cfg: Settings) -> dict:
    """Of what the switch depends on, what a run may change when it goes on."""
    names = [*CHANGEABLE, *FORECAST] if cfg.switch_rule == "forecast" else CHANGEABLE
    return {name: getattr(cfg, name) for name in names}


def switch_due(epochs: list[dict], cfg: Settings, get_rates: GetRates | None = None) -> bool:
    """Whether the switch is due after the last of these records of a full phase: switch_epoch is reached or,
    without one, a window ends just there and Algorithm 1 passes over the last num_windows, or the forecast
    (monitor/forecast.py) says so. Without `get_rates`, which that needs, it is always Algorithm 1.

    A window that begins before the learning rate's warmup has ended does not count. Raises as `get_windows`.
    """
    return is_due_after(epochs, get_windows(epochs, cfg), get_warmup_epochs(epochs, cfg), cfg, get_rates)


def find_switch(
    epochs: list[dict], cfg: Settings, get_rates: GetRates | None = None, first: int = 1
) -> int | None:
    """After how many of these epochs the switch was first due: the smallest n from `first` on for which
    switch_due(epochs[:n], cfg, get_rates) holds. None if it is not due yet. Raises as `get_windows`, but for
    values after the switch.
    """
    check_settings(cfg)
    check_order(epochs)
    warmup_epochs, size = get_warmup_epochs(epochs, cfg), cfg.window_epochs
    windows: list[Window] = []
    for count, record in enumerate(epochs, 1):
        check_record(record, cfg.target_modules)
        if count % size == 0:
            windows.append(build_window(epochs[count - size : count], cfg.target_modules))
        if count >= first and is_due_after(epochs[:count], windows, warmup_epochs, cfg, get_rates):
            return count
    return None


def get_spans(events: list[dict]) -> list[tuple[int, dict]]:
    """(epoch, settings) for each change of CHANGEABLE in a run's events: from that epoch's end on the run was
    judged by those settings.

    An epoch's end is judged by the process that trains the next epoch. So a start after a whole epoch is the
    judge of that epoch's end, and one within an epoch of that epoch's own."""
    spans = []
    for event in events:
        if event.get("event") != "start" or "switch_settings" not in event:
            continue
        since, settings = event["epoch"], event["switch_settings"]
        if event["epoch_step"]:
            since += 1
        spans = [span for span in spans if span[0] < since]
        if not spans or spans[-1][1] != settings:
            spans.append((since, settings))
    return spans


def find_own_switch(
    epochs: list[dict], cfg: Settings, spans: list[tuple[int, dict]], get_rates: GetRates | None = None
) -> int | None:
    """`find_switch` by the settings of `get_spans`, each at the epochs for which it held. `cfg`, a dataclass,
    says the rest. Before the first span, epochs that a fork shares, nothing was due."""
    ends = [since for since, _ in spans[1:]]
    for (since, settings), end in zip(spans, [*ends, len(epochs) + 1]):
        judge = dataclasses.replace(cfg, **settings)
        found = find_switch(epochs[: end - 1], judge, get_rates, first=since)
        if found is not None:
            return found
    return None


def get_mean_position(epochs: list[dict], cfg) -> int:
    """Which of the `window_epochs` epochs before the freeze the last of these records is, from 1: those over
    whose ends `freeze_mean` takes the mean. 0: none of them, or no run that does so.

    The freeze is `lora_warmup_epochs` after the switch. While that has not come, it is the next one that may
    come: at the end of the window under way, or at switch_epoch.
    """
    if not cfg.freeze_mean or cfg.mode != "prelora" or not epochs or epochs[-1]["phase"] == "lora":
        return 0
    count, size = len(epochs), cfg.window_epochs
    if epochs[-1]["phase"] == "warmup":
        switch = sum(epoch["phase"] == "full" for epoch in epochs)
    else:
        switch = cfg.switch_epoch or math.ceil(count / size) * size
    freeze = switch + cfg.lora_warmup_epochs
    return max(count - (freeze - size), 0)


def get_changes(epochs: list[dict], cfg: Settings) -> dict[str, list[float]]:
    """ΔW_k^{a_l}: the change in % of each layer's norm between the last two full windows, Algorithm 2's
    input, as {family: [per layer]}. Raises ValueError where there are no two, and as `get_windows`.
    """
    windows = get_windows(epochs, cfg)
    if len(windows) < 2:
        raise ValueError(f"{len(epochs)} epochs hold no two full windows of {cfg.window_epochs}")
    before, last = windows[-2:]
    changes = {}
    for family, layers in last.norms.items():
        changes[family] = [percent_change(new, old) for new, old in zip(layers, before.norms[family])]
    return changes


def find_spectrum(epochs: list[dict], cfg) -> tuple[int, dict[str, list[list[float]]]] | None:
    """(epoch, {family: [singular values of each layer]}) of cfg's target modules, from the newest of these
    records that has a "spectrum" of all of them: what the window that ended there did to the weights
    (monitor/displacement.py). None where no record has one."""
    for record in reversed(epochs):
        spectrum = record.get("spectrum", {})
        if all(family in spectrum for family in cfg.target_modules):
            return record["epoch"], {family: spectrum[family] for family in cfg.target_modules}
    return None


def is_due_after(
    epochs: list[dict],
    windows: list[Window],
    warmup_epochs: float,
    cfg: Settings,
    get_rates: GetRates | None,
) -> bool:
    """`switch_due` after these epochs, whose full windows are given."""
    if cfg.switch_epoch is not None:
        return len(epochs) >= cfg.switch_epoch
    if not epochs or len(epochs) % cfg.window_epochs != 0:
        return False
    if get_rates is not None and cfg.switch_rule == "forecast":
        # Here, because its fits need scipy, and Algorithm 1 no library at all.
        from monitor.forecast import get_outlook

        return get_outlook(epochs, cfg, get_rates).verdict == "switch"
    counting = [window for window in windows if window.start >= warmup_epochs]
    if len(counting) < cfg.num_windows:
        return False
    tested = counting[-cfg.num_windows :]
    norms = {}
    for family in cfg.target_modules:
        norms[family] = [sum(window.norms[family]) / len(window.norms[family]) for window in tested]
    return partial_convergence_test(norms, [window.loss for window in tested], cfg.tau, cfg.zeta)


def build_window(epochs: list[dict], families: Sequence[str]) -> Window:
    """The window that these epoch records fill."""
    norms = {}
    for family in families:
        by_epoch = [record["weight_norms"][family] for record in epochs]
        norms[family] = [get_mean(layer) for layer in zip(*by_epoch)]
    return Window(epochs[0]["epoch"] - 1, norms, get_mean([record["train_loss"] for record in epochs]))


def get_mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def get_warmup_epochs(epochs: list[dict], cfg: Settings) -> float:
    """The learning rate's warmup in epochs. How many steps an epoch has, the first record tells."""
    if not epochs:
        return 0.0
    steps_per_epoch = epochs[0]["step"] / epochs[0]["epoch"]
    return cfg.lr_warmup_steps / steps_per_epoch


def check_settings(cfg: Settings) -> None:
    """Raise ValueError for fewer than two windows, or a switch_epoch, which ranks come with, before two are
    full."""
    if cfg.num_windows < 2 or cfg.window_epochs < 1:
        raise ValueError(
            f"the test compares windows: num_windows {cfg.num_windows} must be ≥ 2, "
            f"window_epochs {cfg.window_epochs} ≥ 1"
        )
    if cfg.switch_epoch is None or cfg.mode == "full":
        return
    if cfg.switch_epoch < 2 * cfg.window_epochs:
        raise ValueError(
            f"switch_epoch {cfg.switch_epoch} is before two windows of {cfg.window_epochs} epochs are full: "
            "the ranks come from the change between two (lower window_epochs)"
        )


def check_order(epochs: list[dict]) -> None:
    """Raise UserError for records that are not the epochs 1..n."""
    for number, record in enumerate(epochs, 1):
        if record["epoch"] != number:
            raise UserError(
                f"the log is damaged: it does not hold the epochs 1 to {record['epoch']}, in order"
            )


def check_record(record: dict, families: Sequence[str]) -> None:
    """Raise UserError for a record without a family's norms, FloatingPointError for one that isn't finite."""
    norms = record.get("weight_norms", {})
    missing = [family for family in families if family not in norms]
    if missing:
        raise UserError(f"epoch {record['epoch']} of the log has no weight norms of {', '.join(missing)}")
    bad = [family for family in families if not all(map(math.isfinite, norms[family]))]
    if bad:
        raise FloatingPointError(f"epoch {record['epoch']}: the weight norms of {bad} are not finite")
    if not math.isfinite(record["train_loss"]):
        raise FloatingPointError(f"epoch {record['epoch']}: the training loss is not finite")


def get_signs(cfg, s, epochs: list[dict], baseline: list[dict] | None, next_phase: str) -> list[str]:
    """What a person should be warned of at an epoch's end, as sentences.

    `s`: the run's State. `next_phase`: that of the epoch to come. See `failure_signs`.
    """
    signs = failure_signs(epochs, cfg.window_epochs, cfg.zeta, baseline)
    if cfg.mode == "prelora" and s.phase == "full" and s.epoch == cfg.epochs:
        if next_phase == "full":
            what = f"the convergence test did not pass in time: tau {cfg.tau}, zeta {cfg.zeta}"
            if cfg.switch_rule == "forecast":
                what = "the forecast expected no gain of a switch, or its fits did not agree"
            signs.append(f"{what}, windows of {cfg.window_epochs}")
        else:
            signs.append("the switch was due after the last epoch: none is left to train adapters")
    return signs


def failure_signs(
    epochs: list[dict], window_epochs: int, zeta: float, baseline: list[dict] | None = None
) -> list[str]:
    """What the paper's readers look for in the newest of a run's epoch records, as sentences; none is the
    good answer.

    A loss spike right after the freeze: the first LoRA epoch's training loss is more than 5 % above the
    epoch's before. With `baseline` (epoch records of a full run), a loss plateau above it: see
    `find_plateau`.
    """
    signs = []
    now = epochs[-1]
    previous = epochs[-2] if len(epochs) > 1 else now  # the first epoch comes after no freeze
    if now["phase"] == "lora" and previous["phase"] != "lora":
        before, after = previous["train_loss"], now["train_loss"]
        if after > 1.05 * before:
            signs.append(
                f"loss spike right after the freeze: {before:.4f} -> {after:.4f}; the warmup may be too short"
            )
    if baseline:
        lora = [record for record in epochs if record["phase"] == "lora"]
        signs += find_plateau(lora, window_epochs, zeta, baseline)
    return signs


def find_plateau(lora: list[dict], window_epochs: int, zeta: float, baseline: list[dict]) -> list[str]:
    """A sentence if the LoRA phase's loss stands still above the baseline's.

    Its last two windows differ by zeta % at most, while the last is more than 5 % above the baseline's at the
    same epochs. Looked at when a window ends, and where the baseline has all of its epochs.
    """
    if len(lora) < 2 * window_epochs or len(lora) % window_epochs != 0:
        return []
    last, previous = lora[-window_epochs:], lora[-2 * window_epochs : -window_epochs]
    first_epoch, last_epoch = last[0]["epoch"], last[-1]["epoch"]
    same = [record for record in baseline if first_epoch <= record["epoch"] <= last_epoch]
    if len(same) != window_epochs:
        return []
    mean, mean_before, mean_baseline = (
        sum(record["train_loss"] for record in window) / window_epochs for window in (last, previous, same)
    )
    still = abs(percent_change(mean, mean_before)) <= zeta
    if not still or mean <= 1.05 * mean_baseline:
        return []
    return [
        f"loss plateau above the baseline: {mean:.4f} against {mean_baseline:.4f} over epochs "
        f"{first_epoch}-{last_epoch}; the switch may have come too early"
    ]


def rank_signs(cfg, ranks: dict[str, list[int]]) -> list[str]:
    """Warnings about ranks that were just assigned, as sentences.

    Nearly every adapter at rank_max saves nothing; with Algorithm 2 (`rank_rule=minmax`), a family of equal
    layers got rank_min. Of a family with layers of rank 0, which get no adapter whatever their change was,
    the latter can't be told.
    """
    if cfg.rank_min == cfg.rank_max:  # asked for
        return []
    everything = [rank for layers in ranks.values() for rank in layers if rank]
    at_max = sum(rank == cfg.rank_max for rank in everything) / len(everything)
    signs = []
    if at_max >= 0.9:
        signs.append(f"{at_max:.0%} of the layers are at rank_max {cfg.rank_max}: the adapters save little")
    if cfg.rank_rule == "minmax":
        for family, layers in ranks.items():
            if len(layers) > 1 and set(layers) == {cfg.rank_min}:  # else the largest change gets rank_max
                signs.append(f"every layer of {family} changed alike: all at rank {cfg.rank_min}")
    return signs


def mean_signs(cfg, switch: dict) -> list[str]:
    """A warning, as a sentence, where `freeze_mean` has frozen the base at the mean of fewer epochs than it
    should: a run that had no mean was forked or resumed within them. `switch`: its record."""
    if not cfg.freeze_mean or switch["to"] != "lora" or switch["mean_epochs"] == cfg.window_epochs:
        return []
    return [
        f"the base is frozen at the mean of {switch['mean_epochs']} of the last {cfg.window_epochs} epochs: "
        "the run had none before"
    ]
