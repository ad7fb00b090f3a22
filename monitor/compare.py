"""Figures that compare several arms: curves over epochs (paper Figures 4, 5 and 6) and, in costs.py, bars
(Figure 7).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from monitor.arms import Arm, find_window_arms
from monitor.costs import costs_figure
from monitor.figures import build_epoch_locator, build_figure, get_family, get_marker, get_phase_spans
from monitor.log import FROZEN

SWITCHES = {"switch": "--", "freeze": ":"}  # lines where several arms are compared
Values = Callable[[list[dict]], list]  # epoch records of a run -> one value a record, None for none


class Panel(NamedTuple):
    """One quantity over epochs, for every arm."""

    title: str
    label: str  # of the y axis
    values: Values


def compare(baseline: Arm | None, arms: list[Arm], family: str | None = None) -> dict[str, Figure | str]:
    """The comparison figures by name; where one can't be drawn, the reason in its place.

    family: that of figure 6; None is q, or else the first.
    """
    windows = find_window_arms(arms)
    alone = apart = ""
    if not baseline:
        alone = "no run has mode full, the baseline"
    elif not arms:
        alone = "there is nothing beside the baseline"
    if not windows:
        apart = "no two arms differ in lora_warmup_epochs alone"
    elif not any(
        record["phase"] == "warmup" for arm in windows for records in arm.runs for record in records
    ):
        apart = "no arm has reached its warmup"
    return {
        "figure4": alone or arms_figure(baseline, arms),
        "figure5": alone or apart or windows_figure(baseline, windows),
        "figure6": apart or window_norms_figure(windows, get_family(windows[0].runs[0], family)),
        "figure7": alone or costs_figure(baseline, arms),
    }


def arms_figure(baseline: Arm, arms: list[Arm]) -> Figure:
    """Paper Figure 4: arms against the baseline over epochs, from shortly before the first switch (till then
    most are alike): (a) training cross-entropy in nats, (b) training time saved so far, (c) training and (d)
    validation top-1 in %.

    (b): what the baseline's seeds took on average less what the arm took (below 0: it took longer), in s, min
    or h, training only: no evaluation, saving or switch. (d) has the evaluated epochs and is left out where
    there is none.
    """
    longest = max(sum(seconds) for seconds in map(get_field("epoch_seconds"), baseline.runs))
    unit, size = "s", 1
    if longest > 36000:
        unit, size = "h", 3600
    elif longest > 600:
        unit, size = "min", 60

    def get_elapsed(records: list[dict]) -> np.ndarray:
        return np.cumsum(get_field("epoch_seconds")(records)) / size

    saved = against(baseline, get_elapsed, lambda base, own: base - own)
    panels = [
        Panel("(a) Training loss", "cross-entropy (nats)", get_field("train_loss")),
        Panel("(b) Cumulative training time saved", f"against the baseline ({unit})", saved),
        Panel("(c) Training accuracy", "top-1 (%)", get_field("train_top1")),
        Panel("(d) Validation accuracy", "top-1 (%)", get_field("val_top1")),
    ]
    arms = [baseline, *arms]
    return curves_figure(arms, panels, start=get_start(arms))


def windows_figure(baseline: Arm, arms: list[Arm]) -> Figure:
    """Paper Figure 5: arms that differ in their warmup window (of `find_window_arms`) and the baseline, from
    shortly before the switch: (a) training cross-entropy in nats, (b) epoch speed-up: the baseline's seconds
    for that epoch, mean of its seeds, over the arm's. An arm's window stands between two vertical lines of
    its colour.
    """
    speedup = against(baseline, get_field("epoch_seconds"), lambda base, own: base / own)
    panels = [
        Panel("(a) Training loss", "cross-entropy (nats)", get_field("train_loss")),
        Panel("(b) Epoch speed-up", "epoch time, baseline's / arm's (×)", speedup),
    ]
    arms = [baseline, *arms]
    return curves_figure(arms, panels, start=get_start(arms))


def window_norms_figure(arms: list[Arm], family: str) -> Figure:
    """Paper Figure 6: (a) ‖W‖_F of the base weights and (b) ‖s·B·A‖_F of the adapters, layer mean of one
    family, for the arms of `find_window_arms` (one at least in its warmup) from an epoch before the switch to
    one after the last freeze.

    Every run's epochs count from its own switch: seeds that switch at different epochs have no window in
    common.
    """
    aligned, end = [], 0
    for arm in arms:
        runs = []
        for records in arm.runs:
            spans = get_phase_spans(records)
            if len(spans) < 2:  # this run has not switched
                continue
            phase, switch, last = spans[1]
            runs.append([{**record, "epoch": record["epoch"] - switch} for record in records])
            if phase == "warmup":  # with w = 0 there is none
                end = max(end, last - switch)
        if runs:
            aligned.append(arm._replace(runs=runs))

    def get_means(field: str) -> Values:  # in the full phase there are no adapters
        return lambda records: [np.mean(r[field][family]) if r[field] else None for r in records]

    panels = [
        Panel(
            f"(a) Base weights of {family}", "weight norm $\\|W\\|_F$, layer mean", get_means("weight_norms")
        ),
        Panel(
            f"(b) Adapters of {family}", "adapter norm $\\|sBA\\|_F$, layer mean", get_means("adapter_norms")
        ),
    ]
    return curves_figure(aligned, panels, start=-1, end=end + 1, xlabel="epochs since the switch")


def get_field(name: str) -> Values:
    return lambda records: [record[name] for record in records]


def against(baseline: Arm, values: Values, combine: Callable[[float, float], float]) -> Values:
    """combine(the baseline's mean over its seeds, the run's own) at every epoch that the baseline has."""
    x, y = get_series(baseline, values)
    base = dict(zip(x, y.mean(axis=0)))

    def get_combined(records: list[dict]) -> list:
        pairs = [(base.get(record["epoch"]), own) for record, own in zip(records, values(records))]
        return [None if mean is None else combine(mean, own) for mean, own in pairs]

    return get_combined


def get_series(
    arm: Arm, values: Values, start: float = 0, end: float = math.inf
) -> tuple[list[int], np.ndarray]:
    """Epochs (epochs,) from start to end for which every run of the arm has a value, and the values (runs,
    epochs).

    A mean over fewer seeds at some epochs would jump there.
    """
    tables = []
    for records in arm.runs:
        pairs = [
            (record["epoch"], value) for record, value in zip(records, values(records)) if value is not None
        ]
        tables.append({epoch: value for epoch, value in pairs if start <= epoch <= end})
    x = sorted(set.intersection(*map(set, tables)))
    return x, np.array([[table[epoch] for epoch in x] for table in tables])


def get_start(arms: list[Arm]) -> int:
    """The epoch shortly before the first switch, and before the end of the shortest run; 1 where nothing
    switches.
    """
    spans = [get_phase_spans(records) for arm in arms for records in arm.runs]
    switches = [run_spans[1][1] for run_spans in spans if len(run_spans) > 1]
    lasts = [run_spans[-1][2] for run_spans in spans]
    if not switches:
        return 1
    before = max(2, max(lasts) // 20)
    return max(1, min(switches + lasts) - before)


def get_switch_lines(arms: list[Arm]) -> dict[tuple[float, str], str]:
    """{(epoch, mean over an arm's seeds; "switch" or "freeze"): its colour, or grey if arms share it}."""
    lines = {}
    for arm in arms:
        spans = [span for records in arm.runs for span in get_phase_spans(records)[1:]]
        for name, phases in [("switch", ["warmup"]), ("freeze", ["lora", FROZEN])]:
            starts = [start for to, start, _ in spans if to in phases]
            if starts:
                line = float(np.mean(starts)), name
                lines[line] = "0.4" if line in lines else arm.style["color"]
    return lines


def curves_figure(
    arms: list[Arm], panels: list[Panel], start: int, end: float = math.inf, xlabel: str = "epoch"
) -> Figure:
    """Those of the panels that have a value from epoch start to end: every arm's mean over its seeds, a band
    of ± one standard deviation, and its switches.
    """
    panels = [panel for panel in panels if any(get_series(arm, panel.values, start, end)[0] for arm in arms)]
    rows, lines = -(-len(panels) // 2), get_switch_lines(arms)
    figure = build_figure(10, 0.9 + 3.4 * rows)
    grid = figure.subplots(rows, 2, sharex=True, squeeze=False)
    for axes, panel in zip(grid.flat, panels):
        for arm in arms:
            draw_arm(axes, arm, *get_series(arm, panel.values, start, end))
        for (epoch, name), color in lines.items():
            axes.axvline(epoch, color=color, linestyle=SWITCHES[name], linewidth=1, label="_switch")
        axes.set(title=panel.title, xlabel=xlabel, ylabel=panel.label)
        axes.xaxis.set_major_locator(build_epoch_locator())
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    handles = build_legend(arms, {name for _, name in lines})
    letters = 8 + max(len(handle.get_label()) for handle in handles)
    columns = max(1, int(12 * figure.get_figwidth() / letters))  # 12 letters an inch
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), frameon=False
    )
    return figure


def draw_arm(axes: Axes, arm: Arm, x: list[int], y: np.ndarray) -> None:
    """The curve of an arm and the band of its seeds. x: epochs; y: (runs, epochs)."""
    if not x:
        return
    mean = y.mean(axis=0)
    style = {**arm.style, **get_marker(x)}
    if x[-1] - x[0] >= len(x):  # there are gaps: it was evaluated once in a while
        style["marker"] = "o"
    axes.plot(x, mean, label=arm.label, **style)
    if len(y) > 1:
        spread = y.std(axis=0, ddof=1)
        axes.fill_between(x, mean - spread, mean + spread, color=arm.style["color"], alpha=0.2, linewidth=0)


def build_legend(arms: list[Arm], marked: set[str]) -> list[Line2D | Patch]:
    """The legend's entries: the arms, the band if there is one, the vertical lines that are `marked`."""
    handles: list[Line2D | Patch] = []
    for arm in arms:
        seeds = f" ({len(arm.runs)} seeds)" if len(arm.runs) > 1 else ""
        handles.append(Line2D([], [], **arm.style, label=arm.label + seeds))
    if any(len(arm.runs) > 1 for arm in arms):
        handles.append(Patch(color="0.8", label="mean ± 1 SD over seeds"))
    for name, dashes in SWITCHES.items():
        if name in marked:
            handles.append(Line2D([], [], color="0.4", linestyle=dashes, linewidth=1, label=name))
    return handles
