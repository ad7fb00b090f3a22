"""The paper's figures from a run's own logs:

    python -m monitor.plot RUN [RUN ...] [--family q] [--out DIR]

writes RUN/figures/figure1.png (norms and loss), figure3.png (one family, every layer), heatmap.png (norm
changes) and, where the run has adapters, ranks.png, where it has log_displacement, displacement.png; of a
single run into DIR, where one is given. Several runs are compared too, seeds of one experiment as mean and
band: figure4.png (loss, time, accuracy), figure5.png and figure6.png (warmup windows), figure7.png (time,
images/s, memory), in DIR.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from matplotlib.figure import Figure

from errors import UserError, exit_with
from files import expand_home
from monitor.arms import get_common_parent, group_runs
from monitor.compare import compare
from monitor.figures import (
    change_heatmap,
    displacement_figure,
    family_figure,
    get_family,
    norms_figure,
    rank_heatmap,
)
from monitor.log import get_ranks, pick_events, read_run


def main(argv: list[str]) -> None:
    """The command of the module's docstring. A run that can't be read is one line and exit status 1, nothing
    written.
    """
    args = parse_args(argv)
    try:
        plot_runs(args.runs, args.family, args.out)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def plot_runs(runs: list[str], family: str | None, out: str | None) -> None:
    """Read all runs, then draw each and, if there are several, compare them. Raises UserError, before
    anything is written, for a run that can't be read, has no such family, or whose folder can't be made.
    """
    # A run that is named twice is no second seed.
    paths = list({os.path.realpath(run): Path(run) for run in map(expand_home, runs)}.values())
    loaded = [(path, *read_run(path)) for path in paths]
    drawings = [get_drawing(path, events, family) for path, _, events in loaded]
    folders = [path / "figures" for path in paths]
    if len(paths) == 1:
        if out:
            folders = [Path(expand_home(out))]
    else:
        shared = Path(expand_home(out)) if out else get_common_parent(paths) / "figures"
        make_folder(shared)
    for folder in folders:
        make_folder(folder)
    for path, drawing, folder in zip(paths, drawings, folders):
        write_figures(draw_run(*drawing), folder)
        print(f"TensorBoard: tensorboard --logdir {shlex.quote(str(path / 'tb'))}")
    if len(paths) > 1:
        write_comparison(loaded, family, shared)


def make_folder(path: Path) -> None:
    """Raises UserError where that can't be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't make the folder {path}: {error.strerror}") from None


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m monitor.plot",
        description="Write the paper's figures of each run, and of several runs compared.",
    )
    seeds = "run directory; seeds of one experiment are found by their config.json"
    family = "family of figure3.png and figure6.png (default: q, or else the run's first)"
    out = (
        "where a single run's figures go (default: RUN/figures); of several runs, where figure4.png … "
        "figure7.png go (default: figures/ in the runs' common parent), each run's own go to its RUN/figures"
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help=seeds)
    parser.add_argument("--family", help=family)
    parser.add_argument("--out", metavar="DIR", help=out)
    return parser.parse_args(argv)


def get_drawing(run: Path, events: list[dict], family: str | None) -> tuple:
    """What `draw_run` takes of a run: epochs, switches, family, ranks. Raises UserError for a family it does
    not have.
    """
    epochs, switches = pick_events(events, "epoch"), pick_events(events, "switch")
    return epochs, switches, get_family(epochs, family), get_ranks(run, switches)


def draw_run(epochs: list[dict], switches: list[dict], family: str, ranks: dict | None) -> dict[str, Figure]:
    """The figures of one run by name."""
    figures = {
        "figure1": norms_figure(epochs, switches),
        "figure3": family_figure(epochs, switches, family),
        "heatmap": change_heatmap(epochs),
    }
    if ranks:
        figures["ranks"] = rank_heatmap(ranks)
    if any("displacement" in record for record in epochs):
        figures["displacement"] = displacement_figure(epochs, switches)
    return figures


def write_comparison(runs: list[tuple[Path, dict, list[dict]]], family: str | None, out: Path) -> None:
    """Say which runs are which arm's, and write the comparison figures. runs: (directory, config, events) of
    each.
    """
    baseline, arms = group_runs(runs)
    for arm in [baseline, *arms] if baseline else arms:
        lasts = [records[-1]["epoch"] for records in arm.runs]
        role = " (baseline)" if arm is baseline else ""
        rest = f" that all of them have, up to {max(lasts)}" if max(lasts) > min(lasts) else ""
        print(f"arm {arm.label}{role}: runs {len(lasts)}, epochs {min(lasts)}{rest}")
    write_figures(compare(baseline, arms, family), out)


def write_figures(figures: dict[str, Figure | str], folder: Path) -> None:
    """Write each figure as NAME.png; a text in a figure's place says why there is none.

    Raises UserError for a file that can't be written.
    """
    for name, figure in figures.items():
        if isinstance(figure, str):
            print(f"{name}.png skipped: {figure}")
        else:
            path = folder / f"{name}.png"
            try:
                figure.savefig(path)
            except OSError as error:
                raise UserError(f"{path} can't be written: {error.strerror}") from None
            print(f"wrote {path}")


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
