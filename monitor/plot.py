"""The paper's figures from a run's own logs:

    python -m monitor.plot RUN [RUN ...] [--family q] [--out DIR]

writes RUN/figures/figure1.png (norms and loss), figure3.png (one family, every layer), heatmap.png (norm changes) and,
where the run has adapters, ranks.png. Several runs are compared too, seeds of one experiment as mean and band: figure4.png
(loss, time, accuracy), figure5.png and figure6.png (warmup windows), figure7.png (time, images/s, memory), in DIR.

The builders return a matplotlib Figure and touch no file and no pyplot state, so the logger can call them every epoch.
Epochs on every x axis are completed epochs: a switch "at N" came after epoch N.
"""
import argparse
import json
import math
import os
import re
import shlex
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

# Okabe & Ito's colour-blind safe palette; yellow and black last, the one faint on white, the other used for switch lines
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442"]
DASHES = ["-", "--", ":"]  # a ninth family starts the colours again, dashed
PHASES = {"full": "#F0F0F0", "warmup": "#FDEBD0", "lora": "#E3F0FA"}  # background tints, in order
SWITCHES = {"switch": "--", "freeze": ":"}  # lines where several arms are compared
# Config fields that make no other experiment: runs that differ in these alone are seeds of one arm
IGNORED = {"run_dir", "resume", "seed", "max_steps", "keep_every", "eval_every", "baseline", "fork", "loader", "num_workers", "stage_dir",
           "fresh_head"}


class Arm(NamedTuple):
    """One experiment: runs that differ in nothing but the seed (and IGNORED)."""
    label: str
    config: dict
    runs: list  # the epoch records of each
    style: dict  # of its lines
    devices: set  # that its runs were on: cpu, cuda
    flops: dict  # phase → FLOPs per image


def load_run(run_dir):
    """Read a run directory's config.json and metrics.jsonl → (config, epoch records, switch records), in file order.

    The last line of a killed run may be torn; it is skipped with a printed note. Other events are passed over.
    Raises ValueError, one line, for a missing directory or config, a damaged file, or a run without a finished epoch.
    """
    config, events = _read_run(Path(run_dir))
    return config, _pick(events, "epoch"), _pick(events, "switch")


def group_runs(runs):
    """Sort runs into arms: [(directory, config, events)] → (baseline or None, the other arms in order of their first runs).

    Runs are seeds of one arm when their configs are equal but for IGNORED; a field that is None is as one that is absent
    (runs older than a field lack it). The baseline is the arm with mode "full", of several the one with most epochs. A label
    is what the names of an arm's directories begin with, or their parent's name for names like seed0.
    """
    groups = {}
    for run, config, events in runs:
        groups.setdefault(_experiment(config), []).append((Path(os.path.abspath(run)), config, events))
    groups = list(groups.values())
    labels = [_label([run for run, _, _ in group]) for group in groups]
    top = _common_parent([run for run, _, _ in runs])
    arms = []
    for group, label in zip(groups, labels):
        if labels.count(label) > 1:
            label = os.path.relpath(group[0][0], top)
        events = [event for _, _, events in group for event in events]
        flops = {event.get("to") or event.get("phase"): event["flops_per_image"] for event in events if "flops_per_image" in event}
        devices = {event.get("device") for event in _pick(events, "start")}
        arms.append(Arm(label, group[0][1], [_pick(events, "epoch") for _, _, events in group], {}, devices, flops))
    full = [arm for arm in arms if arm.config.get("mode") == "full"]
    baseline = max(full, key=lambda arm: max(map(len, arm.runs)), default=None)
    arms = [arm for arm in arms if arm is not baseline]
    for i, arm in enumerate(arms):  # six colours: black is the baseline's, yellow too faint
        arm.style.update(color=COLORS[i % 6], linestyle=DASHES[i // 6 % len(DASHES)])
    if baseline:
        baseline.style.update(color="black", linestyle="-")
    return baseline, arms


def find_window_arms(arms):
    """The largest set of arms whose configs are equal but for lora_warmup_epochs (and IGNORED), labelled "w = 5" and in its
    order; [] when no two are."""
    groups = {}
    for arm in arms:
        if arm.config.get("mode") not in ("full", "lora") and "lora_warmup_epochs" in arm.config:
            groups.setdefault(_experiment(arm.config, "lora_warmup_epochs"), []).append(arm)
    best = sorted(max(groups.values(), key=len, default=[]), key=lambda arm: arm.config["lora_warmup_epochs"])
    return [arm._replace(label=f"w = {arm.config['lora_warmup_epochs']}") for arm in best] if len(best) > 1 else []


def _read_run(run_dir):
    """(config, events): all of metrics.jsonl. See `load_run`, which says what it raises."""
    if not run_dir.is_dir():
        raise ValueError(f"no run directory {run_dir}")
    config = _read_json(run_dir / "config.json")
    metrics = run_dir / "metrics.jsonl"
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.exists() else ""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    events = []
    for number, line in lines:
        try:
            event = json.loads(line)
            if not isinstance(event, dict):  # a torn `12.5` is valid JSON
                raise ValueError
            events.append(event)
        except ValueError:
            if number != lines[-1][0]:
                raise ValueError(f"{metrics}: line {number} is not a JSON object") from None
            print(f"note: {metrics}: skipped a torn last line")
    if not _pick(events, "epoch"):
        raise ValueError(f"{run_dir} has no finished epoch")
    return config, events


def _pick(events, kind):
    return [event for event in events if event.get("event") == kind]


def _experiment(config, *ignored):
    """What tells two experiments apart, as a string."""
    return json.dumps({k: v for k, v in config.items() if v is not None and k not in {*IGNORED, *ignored}}, sort_keys=True)


def _label(runs):
    names = [run.name for run in runs]
    if all(re.fullmatch(r"(s|seed)?[-_.]?\d+", name) for name in names):  # study/exp1/seed0
        names = [run.parent.name for run in runs]
    label = os.path.commonprefix(names)
    if len(set(names)) > 1:  # the prefix may end in what they share of a seed: exp1-seed1 of exp1-seed10 and exp1-seed11
        label = re.sub(r"(^|[-_.])(s|seed)?[-_.]?\d*$", "", label)
    return label or names[0]


def _common_parent(runs):
    return Path(os.path.commonpath([os.path.abspath(Path(run).parent) for run in runs]))


def norms_figure(epochs, switches):
    """Paper Figure 1: (a) ‖W‖_F per family, mean over its layers, and (b) training cross-entropy in nats, over epochs.

    epochs, switches: records as `load_run` gives them, at least one epoch; weight_norms {family: [layers]}.
    """
    figure = _figure(10, 4.3)
    left, right = figure.subplots(1, 2)
    x = [record["epoch"] for record in epochs]
    lines = []
    for i, family in enumerate(epochs[0]["weight_norms"]):
        mean = _norms(epochs, family).mean(axis=1)  # (epochs,)
        style = {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}
        lines += left.plot(x, mean, label=family, **style, **_marker(x))
    right.plot(x, [record["train_loss"] for record in epochs], color="#404040", **_marker(x))
    left.set(ylabel="weight norm $\\|W\\|_F$, layer mean")
    right.set(ylabel="training cross-entropy (nats)")
    _finish(left, epochs, switches, "(a) Weight norm per family")
    _finish(right, epochs, switches, "(b) Training loss")
    # below the axes and outside them: wherever the curves go, the legend covers none
    seen = [phase for phase in PHASES if any(record["phase"] == phase for record in epochs)]
    handles = lines + [Patch(color=PHASES[phase], label=f"{phase} phase") for phase in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 9), frameon=False)
    return figure


def family_figure(epochs, switches, family):
    """Paper Figure 3: ‖W‖_F of one family, a line for every layer, coloured by depth (layer 0 is next to the input).

    ValueError for a family the records do not have.
    """
    norms = _norms(epochs, _get_family(epochs, family))  # (epochs, layers)
    layers = norms.shape[1]
    colors = colormaps["viridis"](np.linspace(0, 0.88, layers))  # viridis' last yellows are faint on white
    figure = _figure(7, 4.3)
    axes = figure.subplots()
    x = [record["epoch"] for record in epochs]
    for layer in range(layers):
        axes.plot(x, norms[:, layer], color=colors[layer], label=f"layer {layer}", **_marker(x))
    axes.set(ylabel="weight norm $\\|W\\|_F$")
    _finish(axes, epochs, switches, f"Weight norm of {family}, per layer")
    norm = BoundaryNorm(np.arange(layers + 1) - 0.5, layers)
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(colors)), ax=axes, label="layer")
    bar.set_ticks(_thinned(layers))
    bar.minorticks_off()
    return figure


def change_heatmap(epochs):
    """Layer × epoch heat map of the norm's change against the epoch before, in %, one panel per family.

    Each panel's image is (layers, epochs − 1). One colour scale for all, cut at the 95th percentile of |change|: the
    first epochs change tens of times more than those the convergence test is about. White is no change, grey undefined.
    """
    families = list(epochs[0]["weight_norms"])
    if len(epochs) < 2:
        figure = _figure(5, 1.5)
        figure.text(0.5, 0.5, "norm change: needs two finished epochs", ha="center", va="center")
        return figure
    changes = {}
    for family in families:
        norms = _norms(epochs, family)
        before = np.where(norms[:-1] == 0, np.nan, norms[:-1])
        changes[family] = ((norms[1:] - norms[:-1]) / before * 100).T  # (layers, epochs - 1)
    sizes = np.nan_to_num(np.abs(np.concatenate([change.ravel() for change in changes.values()])))
    limit = np.percentile(sizes, 95) or sizes.max() or 1.0  # a frozen base has not changed at all
    columns = min(len(families), 2)
    rows = -(-len(families) // columns)
    figure = _figure(5 * columns, 1 + 1.9 * rows)
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    first, last = epochs[1]["epoch"] - 0.5, epochs[-1]["epoch"] + 0.5
    cmap = colormaps["RdBu_r"].with_extremes(bad="0.6")
    for axes, family in zip(grid.flat, families):
        layers = len(changes[family])
        image = axes.imshow(changes[family], cmap=cmap, vmin=-limit, vmax=limit, aspect="auto", origin="lower",
                            interpolation="nearest", extent=(first, last, -0.5, layers - 0.5))
        for _, start, _ in _phase_spans(epochs)[1:]:  # a column is a whole epoch, so the border is half an epoch on
            axes.axvline(start + 0.5, color="black", linestyle="--", linewidth=0.8)
        axes.set_title(family)
        axes.set_yticks(_thinned(layers, most=6))
        axes.xaxis.set_major_locator(_epoch_ticks())
        axes.xaxis.set_tick_params(labelbottom=True)
    for axes in grid.flat[len(families):]:  # an odd number of families
        axes.remove()
    figure.supxlabel("epoch" + (" (dashed: phase change)" if len(_phase_spans(epochs)) > 1 else ""), fontsize="medium")
    figure.supylabel("layer", fontsize="medium")
    extend = "both" if sizes.max() > limit else "neither"
    figure.colorbar(image, ax=figure.axes, label="change of $\\|W\\|_F$ (% per epoch)", extend=extend, aspect=30)
    return figure


def rank_heatmap(ranks):
    """Family × layer heat map of the assigned ranks (Algorithm 2), each written in its cell; colour is log2 of the rank.

    ranks: {family: [one rank a layer]}; a family with fewer layers than the longest leaves its last cells blank.
    """
    layers = max(map(len, ranks.values()))
    table = np.full((len(ranks), layers), np.nan)
    for row, values in enumerate(ranks.values()):
        table[row, :len(values)] = values
    levels = np.log2(np.maximum(table, 1))
    low, high = np.nanmin(levels) - 1, np.nanmax(levels) + 0.5  # not from white: the lowest rank must be seen as a cell
    figure = _figure(max(4.5, 1.5 + 0.4 * layers), 1.4 + 0.4 * len(ranks))
    axes = figure.subplots()
    axes.pcolormesh(np.arange(layers + 1) - 0.5, np.arange(len(ranks) + 1) - 0.5, levels, cmap="Blues", vmin=low, vmax=high,
                    edgecolors="white", linewidth=1)
    for row, column in np.argwhere(~np.isnan(table)):
        dark = (levels[row, column] - low) / (high - low) > 0.55
        axes.text(column, row, f"{table[row, column]:.0f}", ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(_thinned(layers, most=24))
    axes.set_yticks(range(len(ranks)), list(ranks))
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="layer", ylabel="family", title="Assigned LoRA rank")
    return figure


def arms_figure(baseline, arms):
    """Paper Figure 4: arms against the baseline over epochs, from shortly before the first switch (till then most are alike):
    (a) training cross-entropy in nats, (b) training time saved so far, (c) training and (d) validation top-1 in %.

    (b): what the baseline's seeds took on average less what the arm took (below 0: it took longer), in s, min or h, training
    only: no evaluation, saving or switch. (d) has the evaluated epochs and is left out where there is none.
    """
    longest = max(sum(seconds) for seconds in map(_field("epoch_seconds"), baseline.runs))
    unit, size = ("h", 3600) if longest > 36000 else ("min", 60) if longest > 600 else ("s", 1)
    saved = _against(baseline, lambda records: np.cumsum(_field("epoch_seconds")(records)) / size, lambda base, own: base - own)
    return _compare([baseline, *arms], [
        ("(a) Training loss", "cross-entropy (nats)", _field("train_loss")),
        ("(b) Cumulative training time saved", f"against the baseline ({unit})", saved),
        ("(c) Training accuracy", "top-1 (%)", _field("train_top1")),
        ("(d) Validation accuracy", "top-1 (%)", _field("val_top1"))])


def windows_figure(baseline, arms):
    """Paper Figure 5: arms that differ in their warmup window (of `find_window_arms`) and the baseline, from shortly before the
    switch: (a) training cross-entropy in nats, (b) epoch speed-up: the baseline's seconds for that epoch, mean of its seeds,
    over the arm's. An arm's window stands between two vertical lines of its colour.
    """
    return _compare([baseline, *arms], [
        ("(a) Training loss", "cross-entropy (nats)", _field("train_loss")),
        ("(b) Epoch speed-up", "epoch time, baseline's / arm's (×)",
         _against(baseline, _field("epoch_seconds"), lambda base, own: base / own))])


def window_norms_figure(arms, family):
    """Paper Figure 6: (a) ‖W‖_F of the base weights and (b) ‖s·B·A‖_F of the adapters, layer mean of one family, for the arms of
    `find_window_arms` (one at least in its warmup) from an epoch before the switch to one after the last freeze. Every run's
    epochs count from its own switch: seeds that switch at different epochs have no window in common.
    """
    aligned, end = [], 0
    for arm in arms:
        runs = []
        for records in arm.runs:
            for phase, switch, last in _phase_spans(records)[1:2]:
                runs.append([{**record, "epoch": record["epoch"] - switch} for record in records])
                end = max(end, last - switch if phase == "warmup" else 0)  # w = 0 has no window
        aligned += [arm._replace(runs=runs)] if runs else []

    def norms(field):
        return lambda records: [np.mean(r[field][family]) if r[field] else None for r in records]  # no adapters in phase full

    return _compare(aligned, [
        (f"(a) Base weights of {family}", "weight norm $\\|W\\|_F$, layer mean", norms("weight_norms")),
        (f"(b) Adapters of {family}", "adapter norm $\\|sBA\\|_F$, layer mean", norms("adapter_norms")),
    ], start=-1, end=end + 1, xlabel="epochs since the switch")


def costs_figure(baseline, arms):
    """Paper Figure 7: (a) seconds an epoch, (b) images/s and (c) peak memory in GiB as bars, for every phase and the whole run.

    A bar is the mean over seeds (whiskers ± one standard deviation) of a phase's median epoch, in (c) of its peak; of the whole
    run's average (its peak). The × beside it is its ratio to the baseline: to its full phase, or its whole run. Beside the lora
    phase in (b) stands what arithmetic allows, FLOPs per image of the baseline over those of that phase: anything above it must
    come from communication, optimiser, memory or precision. Memory saved is gradients and Adam moments of the base: less, the
    more ranks share them. On a CPU (c) is the process's resident set, and bears no comparison.
    """
    costs = [(arm, [_phase_costs(records) for records in arm.runs]) for arm in [baseline, *arms]]
    rows, y = [], 0.0
    for phase in [*PHASES, "whole run"]:
        for arm, runs in costs:
            if values := [run[phase] for run in runs if phase in run]:  # (seeds, 3)
                rows.append((phase, arm, y, np.array(values)))
                y += 1
        y = rows[-1][2] + 1.5
    cpu, flops = any("cpu" in arm.devices for arm, _ in costs), baseline.flops.get("full")
    titles = [("(a) Time per epoch", "seconds"), ("(b) Throughput", "images/s"), ("(c) Peak GPU memory", "GiB (largest of the ranks)")]
    if cpu:
        titles[2] = "(c) Resident set of the process", "GiB, on a CPU: says nothing about phases"
    figure = _figure(12 + 0.085 * max(len(arm.label) for arm, _ in costs), 1.6 + 0.3 * y)
    reference = {}
    for column, (axes, (title, unit)) in enumerate(zip(figure.subplots(1, 3, sharey=True, width_ratios=[3, 4, 3]), titles)):
        for phase, arm, y, values in rows:
            mean, spread = values[:, column].mean(), values[:, column].std(ddof=1) if len(values) > 1 else 0
            axes.barh(y, mean, xerr=spread or None, color=arm.style["color"], height=0.8, error_kw={"ecolor": "0.5", "capsize": 2})
            text = f" {mean:,.0f}" if mean >= 100 else f" {mean:#.3g}"
            if arm is baseline:
                reference[phase] = mean
            elif not (cpu and column == 2):
                text += f"  {mean / reference['whole run' if phase == 'whole run' else 'full']:.2f}×"
            if column == 1 and phase == "lora" and flops and phase in arm.flops:
                text += f" (FLOPs {flops / arm.flops[phase]:.2f}×)"
            axes.text(mean + spread, y, text, va="center", fontsize="small")
        axes.set(title=title, xlabel=unit, xlim=(0, 1.9 * axes.dataLim.x1))  # room for what stands beside the longest bar
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    axes.set_yticks([y for _, _, y, _ in rows], [f"{arm.label}, {phase}" for phase, arm, _, _ in rows])
    axes.set_ylim(rows[-1][2] + 0.7, -0.7)
    note = "×: of the baseline's full phase or whole run"
    note += "; FLOPs: what the arithmetic alone allows" * (bool(flops) and any("lora" in arm.flops for arm in arms))
    note += "; whiskers: ± 1 SD over seeds" * any(len(runs) > 1 for _, runs in costs)
    if not cpu and any(phase == "lora" for phase, *_ in rows):
        note += "\nless memory in the lora phase: no gradients and Adam moments of the base"
    figure.supxlabel(note, fontsize="small")
    return figure


def compare(baseline, arms, family=None):
    """The comparison figures by name; where one can't be drawn, the reason in its place. family: as `--family`."""
    windows = find_window_arms(arms)
    reached = any(r["phase"] == "warmup" for arm in windows for records in arm.runs for r in records)
    alone = "no run has mode full, the baseline" if not baseline else "" if arms else "there is nothing beside the baseline"
    apart = "no two arms differ in lora_warmup_epochs alone" if not windows else "" if reached else "no arm has reached its warmup"
    return {"figure4": alone or arms_figure(baseline, arms),
            "figure5": alone or apart or windows_figure(baseline, windows),
            "figure6": apart or window_norms_figure(windows, _get_family(windows[0].runs[0], family)),
            "figure7": alone or costs_figure(baseline, arms)}


def _field(name):
    return lambda records: [record[name] for record in records]


def _series(arm, values, start=0, end=math.inf):
    """Epochs (epochs,) for which every run of the arm has a value, and the values (runs, epochs): a mean over fewer seeds at
    some epochs would jump there. values: records → one value a record, None for none."""
    tables = [{r["epoch"]: value for r, value in zip(records, values(records)) if value is not None and start <= r["epoch"] <= end}
              for records in arm.runs]
    x = sorted(set.intersection(*map(set, tables)))
    return x, np.array([[table[epoch] for epoch in x] for table in tables])


def _against(baseline, values, combine):
    """combine(the baseline's mean over its seeds, the arm's own) at every epoch, to be used as values for `_series`."""
    x, y = _series(baseline, values)
    base = dict(zip(x, y.mean(axis=0)))
    return lambda records: [combine(base[r["epoch"]], own) if r["epoch"] in base else None for r, own in zip(records, values(records))]


def _get_start(arms):
    """The epoch shortly before the first switch, and before the end of the shortest run; 1 where nothing switches."""
    spans = [_phase_spans(records) for arm in arms for records in arm.runs]
    switches, lasts = [s[1][1] for s in spans if len(s) > 1], [s[-1][2] for s in spans]
    return max(1, min(switches + lasts) - max(2, max(lasts) // 20)) if switches else 1


def _switch_lines(arms):
    """{(epoch, mean over an arm's seeds; "switch" or "freeze"): the arm's colour}, grey where arms share it."""
    lines = {}
    for arm in arms:
        for name, phase in [("switch", "warmup"), ("freeze", "lora")]:
            starts = [start for records in arm.runs for to, start, _ in _phase_spans(records)[1:] if to == phase]
            if starts:
                line = float(np.mean(starts)), name
                lines[line] = "0.4" if line in lines else arm.style["color"]
    return lines


def _compare(arms, panels, start=None, end=math.inf, xlabel="epoch"):
    """A panel for each (title, y label, values as for `_series`) that has some from epoch start to end: every arm's mean over
    its seeds, a band of ± one standard deviation, and its switches. start: None is shortly before the first switch."""
    start = _get_start(arms) if start is None else start
    panels = [panel for panel in panels if any(_series(arm, panel[2], start, end)[0] for arm in arms)]
    rows, lines = -(-len(panels) // 2), _switch_lines(arms)
    figure = _figure(10, 0.9 + 3.4 * rows)
    grid = figure.subplots(rows, 2, sharex=True, squeeze=False)
    for axes, (title, label, values) in zip(grid.flat, panels):
        for arm in arms:
            x, y = _series(arm, values, start, end)
            if x:
                mean, gaps = y.mean(axis=0), x[-1] - x[0] >= len(x)  # gaps: evaluated once in a while
                axes.plot(x, mean, label=arm.label, **arm.style, **_marker(x) | ({"marker": "o"} if gaps else {}))
            if x and len(y) > 1:
                spread = y.std(axis=0, ddof=1)
                axes.fill_between(x, mean - spread, mean + spread, color=arm.style["color"], alpha=0.2, linewidth=0)
        for (epoch, name), color in lines.items():
            axes.axvline(epoch, color=color, linestyle=SWITCHES[name], linewidth=1, label="_switch")
        axes.set(title=title, xlabel=xlabel, ylabel=label)
        axes.xaxis.set_major_locator(_epoch_ticks())
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(panels):]:
        axes.remove()
    handles = [Line2D([], [], **arm.style, label=arm.label + (f" ({len(arm.runs)} seeds)" if len(arm.runs) > 1 else "")) for arm in arms]
    if any(len(arm.runs) > 1 for arm in arms):
        handles.append(Patch(color="0.8", label="mean ± 1 SD over seeds"))
    handles += [Line2D([], [], color="0.4", linestyle=SWITCHES[name], linewidth=1, label=name)
                for name in SWITCHES if any(name == line[1] for line in lines)]
    columns = int(12 * figure.get_figwidth() / (8 + max(len(handle.get_label()) for handle in handles)))  # 12 letters an inch
    figure.legend(handles=handles, loc="outside lower center", ncols=min(max(columns, 1), len(handles)), frameon=False)
    return figure


def _phase_costs(records):
    """{phase, or "whole run": (seconds an epoch, images/s, peak GiB)} of one run."""
    costs = {}
    for phase in [*PHASES, "whole run"]:
        of = [record for record in records if phase in (record["phase"], "whole run")]
        if of:
            seconds, rates, peaks = (np.array(_field(name)(of)) for name in ("epoch_seconds", "images_per_second", "peak_memory_bytes"))
            average = seconds.mean(), (rates * seconds).sum() / seconds.sum()
            costs[phase] = *(average if phase == "whole run" else (np.median(seconds), np.median(rates))), peaks.max() / 2**30
    return costs


def _figure(width, height):
    """A Figure of width × height inches at 150 dpi with a canvas of its own: pyplot would keep every one alive."""
    figure = Figure((width, height), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.04)
    FigureCanvasAgg(figure)
    return figure


def _norms(epochs, family):
    return np.array([record["weight_norms"][family] for record in epochs], dtype=float)  # (epochs, layers)


def _marker(x):
    return {"linewidth": 1.5, "marker": "o" if len(x) <= 40 else None, "markersize": 3}  # one epoch is no line


def _thinned(count, most=12):
    return range(0, count, -(-count // most))


def _epoch_ticks():
    return MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])


def _phase_spans(epochs):
    """[(phase, completed epochs at its start, at its end)], from the epoch records alone."""
    spans = []
    for phase, group in groupby(epochs, key=lambda record: record["phase"]):
        last = list(group)[-1]["epoch"]
        spans.append((phase, spans[-1][2] if spans else epochs[0]["epoch"] - 1, last))
    return spans


def _finish(axes, epochs, switches, title):
    """What every plot over epochs shares: phases shaded, switches marked, whole epochs on the x axis."""
    first, last = epochs[0]["epoch"], epochs[-1]["epoch"]
    margin = max(0.02 * (last - first), 0.2)
    left, right = min([first, *(s["epoch"] for s in switches)]) - margin, last + margin
    spans = _phase_spans(epochs)
    for i, (phase, start, end) in enumerate(spans):
        start, end = left if i == 0 else start, right if i == len(spans) - 1 else end
        axes.axvspan(start, end, color=PHASES.get(phase, "white"), linewidth=0, zorder=0)
    for switch in switches:
        into_lora = switch["to"] == "lora"
        axes.axvline(switch["epoch"], color="black", linestyle="--", linewidth=1, label="_switch")
        # above the axes, one to the left of its line and one to the right: a short warmup must not make them collide
        name = "switch" if not into_lora else "freeze" if switch["from"] == "warmup" else "switch and freeze"
        axes.text(switch["epoch"], 1.01, f"{name}, epoch {switch['epoch']}", fontsize="small", va="bottom",
                  ha="left" if into_lora else "right", transform=axes.get_xaxis_transform())
    axes.set_xlim(left, right)
    axes.set_xlabel("epoch")
    axes.set_title(title, pad=20 if switches else None)
    axes.xaxis.set_major_locator(_epoch_ticks())
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.spines[["top", "right"]].set_visible(False)


def _get_family(epochs, family=None):
    """`family` if the records have it (or else ValueError); None is q, or else their first."""
    families = list(epochs[0]["weight_norms"])
    if family is None:
        return "q" if "q" in families else families[0]
    if family not in families:
        raise ValueError(f"no family {family!r} in this run, which has {' '.join(families)}")
    return family


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except ValueError:
        raise ValueError(f"{path} is not valid JSON") from None


def _get_ranks(run_dir, switches):
    """The ranks of the last switch that names some, else those of ranks.json (a run in mode=lora), else None."""
    for switch in reversed(switches):
        if switch.get("ranks"):
            return switch["ranks"]
    path = Path(run_dir) / "ranks.json"
    return _read_json(path) or None if path.exists() else None


def main(argv=None):
    """The command of the module's docstring. A run that cannot be read is one line and exit status 1, nothing written."""
    parser = argparse.ArgumentParser(prog="python -m monitor.plot",
                                     description="Write the paper's figures to RUN/figures/, of several runs compared to DIR.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory; seeds of one experiment are found by their config.json")
    parser.add_argument("--family", help="family of figure3.png and figure6.png (default: q, or else the run's first)")
    parser.add_argument("--out", metavar="DIR", help="where figure4.png … figure7.png go (default: figures/ in the runs' common parent)")
    args = parser.parse_args(argv)
    runs = list({os.path.realpath(run): Path(run) for run in args.runs}.values())  # a run named twice is no second seed
    try:
        loaded = [(run, *_read_run(run)) for run in runs]
        epochs = [_pick(events, "epoch") for _, _, events in loaded]
        switches = [_pick(events, "switch") for _, _, events in loaded]
        families = [_get_family(records, args.family) for records in epochs]
        ranks = [_get_ranks(*run) for run in zip(runs, switches)]
        out = Path(args.out) if args.out else _common_parent(runs) / "figures"
        for folder in [*([out] if len(runs) > 1 else []), *(run / "figures" for run in runs)]:
            folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:  # all runs are read before any is drawn; a ValueError of the drawing is a bug
        raise SystemExit(f"error: {error}") from None
    for run, run_epochs, run_switches, family, run_ranks in zip(runs, epochs, switches, families, ranks):
        figures = {"figure1": norms_figure(run_epochs, run_switches), "figure3": family_figure(run_epochs, run_switches, family),
                   "heatmap": change_heatmap(run_epochs)}
        if run_ranks:
            figures["ranks"] = rank_heatmap(run_ranks)
        _write(figures, run / "figures")
        print(f"TensorBoard: tensorboard --logdir {shlex.quote(str(run / 'tb'))}")
    if len(runs) > 1:
        baseline, arms = group_runs(loaded)
        for arm in [baseline, *arms] if baseline else arms:
            lasts = [records[-1]["epoch"] for records in arm.runs]
            print(f"arm {arm.label}{' (baseline)' * (arm is baseline)}: runs {len(lasts)}, epochs {min(lasts)}"
                  + (f" that all of them have, up to {max(lasts)}" if max(lasts) > min(lasts) else ""))
        _write(compare(baseline, arms, args.family), out)
    elif args.out:
        print("figure4.png to figure7.png skipped: a single run has nothing beside it")


def _write(figures, folder):
    for name, figure in figures.items():
        if isinstance(figure, str):
            print(f"{name}.png skipped: {figure}")
        else:
            figure.savefig(folder / f"{name}.png")
            print(f"wrote {folder / name}.png")


if __name__ == "__main__":
    main()
