"""The figures of one run. The builders return a matplotlib Figure and touch no file and no pyplot state, so
the logger can call them every epoch.

Epochs on every x axis are completed epochs: a switch "at N" came after epoch N.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from errors import UserError
from monitor.log import FROZEN, get_stage

# Okabe & Ito's colour-blind safe palette; yellow and black last: the one is faint on white, the other marks
# switches.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442"]
DASHES = ["-", "--", ":"]  # a ninth family starts the colours again, dashed
# Background tints, in order.
PHASES = {"full": "#F0F0F0", FROZEN: "#E8F3EC", "warmup": "#FDEBD0", "lora": "#E3F0FA"}


def norms_figure(epochs: list[dict], switches: list[dict]) -> Figure:
    """Paper Figure 1: (a) ‖W‖_F per family, mean over its layers, and (b) training cross-entropy in nats,
    over epochs.

    epochs, switches: records as `log.load_run` gives them, at least one epoch.
    """
    figure = build_figure(10, 4.3)
    left, right = figure.subplots(1, 2)
    x = [record["epoch"] for record in epochs]
    lines = []
    for i, family in enumerate(epochs[0]["weight_norms"]):
        means = get_norms(epochs, family).mean(axis=1)  # (epochs,)
        color, dashes = COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)]
        lines += left.plot(x, means, label=family, color=color, linestyle=dashes, **get_marker(x))
    right.plot(x, [record["train_loss"] for record in epochs], color="#404040", **get_marker(x))
    left.set(ylabel="weight norm $\\|W\\|_F$, layer mean")
    right.set(ylabel="training cross-entropy (nats)")
    finish_axes(left, epochs, switches, "(a) Weight norm per family")
    finish_axes(right, epochs, switches, "(b) Training loss")
    # The legend stands below the axes and outside them: wherever the curves go, it covers none.
    seen = {get_stage(record) for record in epochs}
    patches = [Patch(color=color, label=f"{phase} phase") for phase, color in PHASES.items() if phase in seen]
    handles = lines + patches
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 9), frameon=False)
    return figure


def family_figure(epochs: list[dict], switches: list[dict], family: str) -> Figure:
    """Paper Figure 3: ‖W‖_F of one family, a line for every layer, coloured by depth (layer 0 is next to the
    input).

    Raises UserError for a family that the records do not have.
    """
    norms = get_norms(epochs, get_family(epochs, family))  # (epochs, layers)
    layers = norms.shape[1]
    colors = colormaps["viridis"](np.linspace(0, 0.88, layers))  # viridis' last yellows are faint on white
    figure = build_figure(7, 4.3)
    axes = figure.subplots()
    x = [record["epoch"] for record in epochs]
    for layer in range(layers):
        axes.plot(x, norms[:, layer], color=colors[layer], label=f"layer {layer}", **get_marker(x))
    axes.set(ylabel="weight norm $\\|W\\|_F$")
    finish_axes(axes, epochs, switches, f"Weight norm of {family}, per layer")
    scale = BoundaryNorm(np.arange(layers + 1) - 0.5, layers)
    bar = figure.colorbar(ScalarMappable(scale, ListedColormap(colors)), ax=axes, label="layer")
    bar.set_ticks(get_ticks(layers))
    bar.minorticks_off()
    return figure


def change_heatmap(epochs: list[dict]) -> Figure:
    """Layer × epoch heat map of the norm's change against the epoch before, in %, one panel per family.

    Each panel's image is (layers, epochs − 1). One colour scale for all, cut at the 95th percentile of
    |change|: the first epochs change tens of times more than those the convergence test is about. White is no
    change, grey undefined.
    """
    families = list(epochs[0]["weight_norms"])
    if len(epochs) < 2:
        figure = build_figure(5, 1.5)
        figure.text(0.5, 0.5, "norm change: needs two finished epochs", ha="center", va="center")
        return figure
    changes = {family: get_norm_changes(epochs, family) for family in families}
    sizes = np.nan_to_num(np.abs(np.concatenate([change.ravel() for change in changes.values()])))
    limit = np.percentile(sizes, 95) or sizes.max() or 1.0  # a frozen base has not changed at all
    columns = min(len(families), 2)
    rows = -(-len(families) // columns)  # rounded up
    figure = build_figure(5 * columns, 1 + 1.9 * rows)
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for axes, family in zip(grid.flat, families):
        image = draw_changes(axes, epochs, changes[family], limit)
        axes.set_title(family)
    for axes in grid.flat[len(families) :]:  # an odd number of families
        axes.remove()
    hint = " (dashed: phase change)" if len(get_phase_spans(epochs)) > 1 else ""
    figure.supxlabel("epoch" + hint, fontsize="medium")
    figure.supylabel("layer", fontsize="medium")
    extend = "both" if sizes.max() > limit else "neither"
    label = "change of $\\|W\\|_F$ (% per epoch)"
    figure.colorbar(image, ax=figure.axes, label=label, extend=extend, aspect=30)
    return figure


def get_norm_changes(epochs: list[dict], family: str) -> np.ndarray:
    """(layers, epochs − 1): the norm's change against the epoch before in %, NaN where it was 0."""
    norms = get_norms(epochs, family)
    before = np.where(norms[:-1] == 0, np.nan, norms[:-1])
    return ((norms[1:] - norms[:-1]) / before * 100).T


def draw_changes(axes: Axes, epochs: list[dict], changes: np.ndarray, limit: float):
    """One panel of `change_heatmap`. Returns its image, from which the colour bar is made."""
    layers = len(changes)
    first, last = epochs[1]["epoch"] - 0.5, epochs[-1]["epoch"] + 0.5
    image = axes.imshow(
        changes,
        cmap=colormaps["RdBu_r"].with_extremes(bad="0.6"),
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(first, last, -0.5, layers - 0.5),
    )
    for _, start, _ in get_phase_spans(epochs)[1:]:
        # A column is a whole epoch, so the border is half an epoch on.
        axes.axvline(start + 0.5, color="black", linestyle="--", linewidth=0.8)
    axes.set_yticks(get_ticks(layers, most=6))
    axes.xaxis.set_major_locator(build_epoch_locator())
    axes.xaxis.set_tick_params(labelbottom=True)
    return image


def rank_heatmap(ranks: dict[str, list[int]]) -> Figure:
    """Family × layer heat map of the assigned ranks (Algorithm 2), each written in its cell; colour is log2
    of the rank, and none for 0, which is no adapter.

    ranks: {family: [one rank a layer]}; a family with fewer layers than the longest leaves its last cells
    blank.
    """
    layers = max(map(len, ranks.values()))
    table = np.full((len(ranks), layers), np.nan)
    for row, values in enumerate(ranks.values()):
        table[row, : len(values)] = values
    levels = np.log2(np.where(table > 0, table, np.nan))
    # The scale does not begin at the lowest rank: white would not be seen as a cell.
    low, high = np.nanmin(levels) - 1, np.nanmax(levels) + 0.5
    figure = build_figure(max(4.5, 1.5 + 0.4 * layers), 1.4 + 0.4 * len(ranks))
    axes = figure.subplots()
    columns, rows = np.arange(layers + 1) - 0.5, np.arange(len(ranks) + 1) - 0.5  # the cells' borders
    axes.pcolormesh(columns, rows, levels, cmap="Blues", vmin=low, vmax=high, edgecolors="white", linewidth=1)
    for row, column in np.argwhere(~np.isnan(table)):
        dark = (levels[row, column] - low) / (high - low) > 0.55
        color = "white" if dark else "black"
        axes.text(column, row, f"{table[row, column]:.0f}", ha="center", va="center", color=color)
    axes.set_xticks(get_ticks(layers, most=24))
    axes.set_yticks(range(len(ranks)), list(ranks))
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="layer", ylabel="family", title="Assigned LoRA rank")
    return figure


def displacement_figure(epochs: list[dict], switches: list[dict]) -> Figure:
    """Each family's rho by window, mean over its layers, and below it the cosine with the window before, of
    those layers that have one (monitor/displacement.py). Of the adapters they are dashed.

    epochs: at least one has a "displacement". A window stands at the epoch with which it ends.
    """
    figure = build_figure(7, 7)
    above, below = figure.subplots(2, 1)
    lines = []
    for kind, dashes in (("base", "-"), ("adapters", "--")):
        ends = [record for record in epochs if kind in record.get("displacement", {})]
        x = [record["epoch"] for record in ends]
        for i, family in enumerate(ends[0]["displacement"][kind] if ends else []):
            layers = [record["displacement"][kind][family] for record in ends]
            label = family if kind == "base" else f"{family}, adapters"
            style = dict(label=label, color=COLORS[i % len(COLORS)], linestyle=dashes, **get_marker(x))
            lines += above.plot(x, [get_mean(layer["rho"]) for layer in layers], **style)
            below.plot(x, [get_mean(layer["cosine"]) for layer in layers], **style)
    above.set(ylabel="$\\rho$, layer mean")
    below.set(ylabel="cosine, layer mean")
    finish_axes(
        above, epochs, switches, "Displacement in a window, without weight decay, over its steps' size"
    )
    finish_axes(below, epochs, switches, "Its cosine with the window before")
    above.set_ylim(bottom=0)
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False)
    return figure


def get_mean(values: list[float | None]) -> float:
    """Of those that are not None; NaN, which is not drawn, where all are."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else float("nan")


def get_family(epochs: list[dict], family: str | None = None) -> str:
    """`family` if the records have it, or else UserError; for None it is q, or else their first."""
    families = list(epochs[0]["weight_norms"])
    if family is None:
        return "q" if "q" in families else families[0]
    if family not in families:
        raise UserError(f"no family {family!r} in this run, which has {' '.join(families)}")
    return family


def get_norms(epochs: list[dict], family: str) -> np.ndarray:
    """(epochs, layers): the weight norms of a family."""
    return np.array([record["weight_norms"][family] for record in epochs], dtype=float)


def get_phase_spans(epochs: list[dict]) -> list[tuple[str, int, int]]:
    """(phase or FROZEN, completed epochs at its start, at its end) of every phase, from the epoch records
    alone."""
    spans = []
    start = epochs[0]["epoch"] - 1
    for phase, records in groupby(epochs, key=get_stage):
        end = list(records)[-1]["epoch"]
        spans.append((phase, start, end))
        start = end
    return spans


def build_figure(width: float, height: float) -> Figure:
    """A Figure of width × height inches at 150 dpi with a canvas of its own: pyplot would keep every one
    alive.
    """
    figure = Figure((width, height), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.04)
    FigureCanvasAgg(figure)
    return figure


def build_epoch_locator() -> MaxNLocator:
    return MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])


def get_marker(x: Sequence[float]) -> dict:
    """How a line over these epochs is drawn: with a marker on each where they are few, for one epoch is no
    line.
    """
    return {"linewidth": 1.5, "marker": "o" if len(x) <= 40 else None, "markersize": 3}


def get_ticks(count: int, most: int = 12) -> range:
    """Of 0..count − 1, evenly, so many that `most` are not exceeded."""
    return range(0, count, -(-count // most))


def finish_axes(axes: Axes, epochs: list[dict], switches: list[dict], title: str) -> None:
    """What every plot over epochs shares: phases shaded, switches marked, whole epochs on the x axis."""
    first, last = epochs[0]["epoch"], epochs[-1]["epoch"]
    margin = max(0.02 * (last - first), 0.2)
    left = min([first, *(switch["epoch"] for switch in switches)]) - margin
    right = last + margin
    spans = get_phase_spans(epochs)
    for i, (phase, start, end) in enumerate(spans):
        start = left if i == 0 else start
        end = right if i == len(spans) - 1 else end
        axes.axvspan(start, end, color=PHASES.get(phase, "white"), linewidth=0, zorder=0)
    for switch in switches:
        mark_switch(axes, switch)
    axes.set_xlim(left, right)
    axes.set_xlabel("epoch")
    axes.set_title(title, pad=20 if switches else None)
    axes.xaxis.set_major_locator(build_epoch_locator())
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.spines[["top", "right"]].set_visible(False)


def mark_switch(axes: Axes, switch: dict) -> None:
    """A dashed line at a switch record's epoch, and above the axes what it is."""
    epoch, freezes = switch["epoch"], switch["to"] != "warmup"
    axes.axvline(epoch, color="black", linestyle="--", linewidth=1, label="_switch")
    if not freezes:
        name = "switch"
    elif (switch["from"], switch["to"]) == ("full", "lora"):
        name = "switch and freeze"
    else:  # of the base, or of blocks within the full phase
        name = "freeze"
    # One name stands to the left of its line and the other to the right: a short warmup must not make them
    # collide.
    side = "left" if freezes else "right"
    above = axes.get_xaxis_transform()
    axes.text(epoch, 1.01, f"{name}, epoch {epoch}", fontsize="small", va="bottom", ha=side, transform=above)
