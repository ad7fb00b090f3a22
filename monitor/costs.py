"""What the phases of several arms cost, as bars: paper Figure 7."""

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from monitor.arms import Arm
from monitor.figures import PHASES, build_figure
from monitor.log import get_stage

WHOLE = "whole run"
THROUGHPUT, MEMORY = 1, 2  # columns


class Row(NamedTuple):
    """One bar of each column."""

    phase: str  # or WHOLE
    arm: Arm
    y: float  # where it stands
    values: np.ndarray  # (seeds, 3): seconds an epoch, images/s, peak GiB


def costs_figure(baseline: Arm, arms: list[Arm]) -> Figure:
    """Paper Figure 7: (a) seconds an epoch, (b) images/s and (c) peak memory in GiB as bars, for every phase
    and the whole run.

    A bar is the mean over seeds (whiskers ± one standard deviation) of a phase's median epoch, in (c) of its
    peak; of the whole run's average (its peak). The × beside it is its ratio to the baseline: to its full
    phase, or its whole run. Beside the lora phase in (b) stands what arithmetic allows, FLOPs per image of
    the baseline over those of that phase: anything above it must come from communication, optimiser, memory
    or precision. Memory saved is gradients and Adam moments of the base: less, the more ranks share them. On
    a CPU (c) is the process's resident set, and bears no comparison.
    """
    every = [baseline, *arms]
    rows = build_rows(every)
    on_cpu = any("cpu" in arm.devices for arm in every)
    titles = ["(a) Time per epoch", "(b) Throughput", "(c) Peak GPU memory"]
    units = ["seconds", "images/s", "GiB (largest of the ranks)"]
    if on_cpu:
        titles[MEMORY] = "(c) Resident set of the process"
        units[MEMORY] = "GiB, on a CPU: says nothing about phases"
    below = rows[-1].y + 1.5
    figure = build_figure(12 + 0.085 * max(len(arm.label) for arm in every), 1.6 + 0.3 * below)
    for column, axes in enumerate(figure.subplots(1, 3, sharey=True, width_ratios=[3, 4, 3])):
        draw_bars(axes, rows, column, baseline, comparable=not (on_cpu and column == MEMORY))
        # There is room for what stands beside the longest bar.
        axes.set(title=titles[column], xlabel=units[column], xlim=(0, 1.9 * axes.dataLim.x1))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    axes.set_yticks([row.y for row in rows], [f"{row.arm.label}, {row.phase}" for row in rows])
    axes.set_ylim(rows[-1].y + 0.7, -0.7)
    figure.supxlabel(get_note(rows, baseline, arms, on_cpu), fontsize="small")
    return figure


def build_rows(arms: list[Arm]) -> list[Row]:
    """The bars from top to bottom: phase by phase the arms that have it, with a gap between phases."""
    costs = [(arm, [get_phase_costs(records) for records in arm.runs]) for arm in arms]
    rows, y = [], 0.0
    for phase in [*PHASES, WHOLE]:
        for arm, runs in costs:
            values = [run[phase] for run in runs if phase in run]
            if values:
                rows.append(Row(phase, arm, y, np.array(values)))
                y += 1
        y = rows[-1].y + 1.5
    return rows


def get_phase_costs(records: list[dict]) -> dict[str, tuple[float, float, float]]:
    """{phase: (seconds an epoch, images/s, peak GiB)} of one run: of a phase the medians, of WHOLE the
    averages.
    """
    costs = {}
    for phase in [*PHASES, WHOLE]:
        chosen = [record for record in records if phase in (get_stage(record), WHOLE)]
        if not chosen:
            continue
        seconds = np.array([record["epoch_seconds"] for record in chosen])
        rates = np.array([record["images_per_second"] for record in chosen])
        peak_gib = max(record["peak_memory_bytes"] for record in chosen) / 2**30
        if phase == WHOLE:
            costs[phase] = seconds.mean(), (rates * seconds).sum() / seconds.sum(), peak_gib
        else:
            costs[phase] = np.median(seconds), np.median(rates), peak_gib
    return costs


def draw_bars(axes: Axes, rows: list[Row], column: int, baseline: Arm, comparable: bool) -> None:
    """One column of bars, each with its value and, where it is `comparable`, its ratio to the baseline's."""
    reference = {row.phase: row.values[:, column].mean() for row in rows if row.arm is baseline}
    whiskers = {"ecolor": "0.5", "capsize": 2}
    for row in rows:
        values = row.values[:, column]
        mean = values.mean()
        spread = values.std(ddof=1) if len(values) > 1 else 0
        color = row.arm.style["color"]
        axes.barh(row.y, mean, xerr=spread or None, color=color, height=0.8, error_kw=whiskers)
        text = f" {mean:,.0f}" if mean >= 100 else f" {mean:#.3g}"
        if comparable and row.arm is not baseline:
            compared = WHOLE if row.phase == WHOLE else "full"
            text += f"  {mean / reference[compared]:.2f}×"
        if column == THROUGHPUT and row.phase == "lora":
            text += get_flops_ratio(baseline, row.arm)
        axes.text(mean + spread, row.y, text, va="center", fontsize="small")


def get_flops_ratio(baseline: Arm, arm: Arm) -> str:
    """What arithmetic alone allows the arm's lora phase, as text; "" where the runs have not counted it."""
    full, lora = baseline.flops.get("full"), arm.flops.get("lora")
    return f" (FLOPs {full / lora:.2f}×)" if full and lora else ""


def get_note(rows: list[Row], baseline: Arm, arms: list[Arm], on_cpu: bool) -> str:
    """What stands below the bars."""
    note = "×: of the baseline's full phase or whole run"
    if baseline.flops.get("full") and any("lora" in arm.flops for arm in arms):
        note += "; FLOPs: what the arithmetic alone allows"
    if any(len(arm.runs) > 1 for arm in [baseline, *arms]):
        note += "; whiskers: ± 1 SD over seeds"
    if not on_cpu and any(row.phase == "lora" for row in rows):
        note += "\nless memory in the lora phase: no gradients and Adam moments of the base"
    return note
