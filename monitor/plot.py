"""The paper's figures from a run's own logs:

    python -m monitor.plot RUN [RUN ...] [--family q]

writes RUN/figures/figure1.png (norms and loss), figure3.png (one family, every layer), heatmap.png (norm changes) and,
where the run has adapters, ranks.png. The builders return a matplotlib Figure and touch no file and no pyplot state, so
the logger can call them every epoch. Epochs on every x axis are completed epochs: a switch "at N" came after epoch N.
"""
import argparse
import json
import shlex
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

# Okabe & Ito's colour-blind safe palette; yellow and black last, the one faint on white, the other used for switch lines
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442"]
DASHES = ["-", "--", ":"]  # a ninth family starts the colours again, dashed
PHASES = {"full": "#F0F0F0", "warmup": "#FDEBD0", "lora": "#E3F0FA"}  # background tints, in order


def load_run(run_dir):
    """Read a run directory's config.json and metrics.jsonl → (config, epoch records, switch records), in file order.

    The last line of a killed run may be torn; it is skipped with a printed note. Other events are passed over.
    Raises ValueError, one line, for a missing directory or config, a damaged file, or a run without a finished epoch.
    """
    run_dir = Path(run_dir)
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
    epochs = [event for event in events if event.get("event") == "epoch"]
    if not epochs:
        raise ValueError(f"{run_dir} has no finished epoch")
    return config, epochs, [event for event in events if event.get("event") == "switch"]


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
    parser = argparse.ArgumentParser(prog="python -m monitor.plot", description="Write the paper's figures to RUN/figures/.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
    parser.add_argument("--family", help="family of figure3.png (default: q, or else the run's first)")
    args = parser.parse_args(argv)
    try:
        loaded = [(Path(run), *load_run(run)[1:]) for run in args.runs]
        families = [_get_family(epochs, args.family) for _, epochs, _ in loaded]
        ranks = [_get_ranks(run, switches) for run, _, switches in loaded]
    except (ValueError, OSError) as error:  # all runs are read before any is drawn; a ValueError of the drawing is a bug
        raise SystemExit(f"error: {error}") from None
    for (run, epochs, switches), family, run_ranks in zip(loaded, families, ranks):
        figures = {"figure1": norms_figure(epochs, switches), "figure3": family_figure(epochs, switches, family),
                   "heatmap": change_heatmap(epochs)}
        if run_ranks:
            figures["ranks"] = rank_heatmap(run_ranks)
        folder = run / "figures"
        folder.mkdir(exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png")
            print(f"wrote {folder / name}.png")
        print(f"TensorBoard: tensorboard --logdir {shlex.quote(str(run / 'tb'))}")


if __name__ == "__main__":
    main()
