"""When would other settings have switched, and with which ranks? Answered from a run's logged norms, without training.

    python replay.py runs/baseline                                              the run's own settings
    python replay.py runs/baseline --tau 0.25 0.5 1 --zeta 1 2.5 5              every combination, as a table and as RUN/replay.csv
    python replay.py runs/baseline --window_epochs 2 3 5 --times runs/exp2      with the time saved, by the epoch times of another run
    python replay.py --ttest RUN_FULL RUN_LORA                                  HPT's criterion on two forks' step losses

A run that has switched says nothing of what its weights would have done after that: settings that switch later need a baseline's log
(--mode full).
"""

import csv
import dataclasses
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import stats

import train
from monitor.convergence import replay
from monitor.plot import load_run


@dataclass
class Replay:
    """Lists: every combination is tried. None: as in the run."""
    tau: tuple[float, ...] | None = None  # thresholds on the weight norms' change, in %
    zeta: tuple[float, ...] | None = None  # thresholds on the loss's change, in %
    num_windows: tuple[int, ...] | None = None  # consecutive windows that must agree
    window_epochs: tuple[int, ...] | None = None  # epochs per window; with --ttest the first is the window of the test
    rank_rule: tuple[Literal["minmax", "uniform", "budget"], ...] | None = None
    times: str | None = None  # run directory with epochs of all three phases, to predict the time saved; None = the run itself
    csv: str | None = None  # where the table goes; None = RUN/replay.csv
    ttest: tuple[str, ...] = ()  # RUN_FULL RUN_LORA: compare their step losses instead


SETTINGS = ("tau", "zeta", "num_windows", "window_epochs", "rank_rule")


def replay_run(cfg: train.Config, epochs: list[dict]) -> tuple[int | None, dict[str, list[int]] | None]:
    """(epoch of the switch, ranks) under `cfg`, from the epoch records of a full phase; (None, None) if they end before it.

    What a run with `cfg` would have done, if its full phase was this one: train.py decides by the same code.
    Raises ValueError for records without a family that `cfg` wants, or with values that are not finite.
    """
    monitor = train.build_monitor(cfg, epochs[0]["step"] // epochs[0]["epoch"])
    try:
        epoch = replay(monitor, epochs, cfg.target_modules)
    except FloatingPointError as e:
        raise ValueError(str(e)) from None
    return epoch, train.choose_ranks(cfg, monitor.changes()) if epoch else None


def get_phase_seconds(run: str) -> dict[str, float]:
    """Median training seconds of an epoch of each phase in the run."""
    seconds: dict[str, list[float]] = {}
    for e in load_run(run)[1]:
        seconds.setdefault(e["phase"], []).append(e["epoch_seconds"])
    return {phase: float(np.median(values)) for phase, values in seconds.items()}


def predict_saving(cfg: train.Config, switch: int, seconds: dict[str, float]) -> float:
    """Share of a full run's training time, in %, that switching after epoch `switch` saves; evaluation and the switches not counted."""
    warmup = min(cfg.lora_warmup_epochs, cfg.epochs - switch)
    spent = switch * seconds["full"] + warmup * seconds.get("warmup", 0) + (cfg.epochs - switch - warmup) * seconds["lora"]
    return 100 * (1 - spent / (cfg.epochs * seconds["full"]))


def get_rows(run: str, asked: Replay) -> tuple[list[dict], str]:
    """A row for every combination of settings, and a sentence on those that this log can't answer ("" if there are none).

    `switch_epoch` is None where the log ends before the switch. Raises ValueError for a run or settings that can't be replayed.
    """
    config, epochs, _ = load_run(run)
    cfg = dataclasses.replace(train.typed_config(config, f"{run}/config.json"), mode="prelora", fork=None, baseline=None)
    if any(getattr(asked, name) for name in SETTINGS[:-1]):  # a run with a fixed switch epoch: now the test decides
        cfg = dataclasses.replace(cfg, switch_epoch=None)
    full = [e for e in epochs if e["phase"] == "full"]
    if not full:
        raise ValueError(f"{run} has no full phase")
    seconds = get_phase_seconds(asked.times or run)
    timed = {"full", "lora"} | ({"warmup"} if cfg.lora_warmup_epochs else set()) <= seconds.keys()
    if asked.times and not timed:
        raise ValueError(f"{asked.times} has timed only: {', '.join(seconds)}")
    base, costs = train.count_base(cfg)
    own = len(full) if len(full) < len(epochs) else None  # its own switch
    rows, late = [], 0
    for values in itertools.product(*(getattr(asked, name) or (getattr(cfg, name),) for name in SETTINGS)):
        setting = dict(zip(SETTINGS, values))
        tried = dataclasses.replace(cfg, **setting, rank_budget=cfg.rank_budget if setting["rank_rule"] != "minmax" else None)
        train.check_config(tried)
        epoch, ranks = replay_run(tried, full)
        row = setting | {"switch_epoch": epoch, "after": len(full) if epoch is None else None}
        if ranks:
            params = train.count_parameters(ranks, costs)
            flat = [rank for layers in ranks.values() for rank in layers]
            row |= {"adapter_params": params, "share": 100 * params / base, "rank_mean": float(np.mean(flat)),
                    "time_saved": predict_saving(tried, epoch, seconds) if timed else None, "ranks": ranks}
        late += epoch is None and own is not None
        rows.append(row)
    reason = (f"{run} has switched after epoch {own}: its log can't tell when {late} of these settings would have, use a baseline's "
              "(--mode full)") if late else ""
    return rows, reason


def format_table(rows: list[dict]) -> str:
    """Ranks per family as lowest-highest."""
    span = lambda layers: f"{min(layers)}-{max(layers)}" if min(layers) < max(layers) else f"{layers[0]}"
    table = [("tau %", "zeta %", "windows", "rank rule", "switch after", "adapter parameters", "time saved", "ranks of the layers, per family")]
    for row in rows:
        cells = [f"{row['tau']:g}", f"{row['zeta']:g}", f"{row['num_windows']} × {row['window_epochs']}", row["rank_rule"]]
        if row["switch_epoch"] is None:
            cells += [f"not by {row['after']}", "-", "-", "-"]
        else:
            saved = "-" if row["time_saved"] is None else f"{row['time_saved']:.1f} %"
            cells += [str(row["switch_epoch"]), f"{row['adapter_params']:,} ({row['share']:.1f} %)", saved,
                      " ".join(f"{family} {span(layers)}" for family, layers in row["ranks"].items())]
        table.append(tuple(cells))
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("  ".join([cell.rjust(width) for cell, width in zip(line[:-1], widths)] + [line[-1]]) for line in table)


def write_csv(path: Path, rows: list[dict]) -> None:
    """All columns of the table, ranks in full as JSON."""
    names = [*SETTINGS, "switch_epoch", "adapter_params", "share", "rank_mean", "time_saved", "ranks"]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow(row | ({"ranks": json.dumps(row["ranks"])} if "ranks" in row else {}))


def compare_losses(run_full: str, run_lora: str, window_epochs: int | None) -> list[dict]:
    """HPT's criterion (Dahal et al. 2025): a two-sample t-test (Welch's) on the step losses of a full and a LoRA copy, window by window.

    Windows of `window_epochs` (None: the LoRA run's) from where the two part, that is from the first epoch of the LoRA run that isn't in
    its full phase; a rest that fills no window is left out. Each row: first and last epoch, mean losses, t, p.
    Raises ValueError if the runs don't share those epochs or have no step losses.
    """
    config, full, _ = load_run(run_full)
    lora_config, lora, _ = load_run(run_lora)
    for name in ("dataset", "model", "epochs", "batch_size", "train_samples", "seed", "lr", "lr_warmup_steps", "rand_augment", "mixup"):
        if config[name] != lora_config[name]:
            raise ValueError(f"{run_full} and {run_lora} differ in more than the switch: {name} is {config[name]} and {lora_config[name]}")
    if window_epochs is not None and window_epochs < 1:
        raise ValueError(f"window_epochs must be above 0, not {window_epochs}")
    size = window_epochs or lora_config["window_epochs"]
    full_losses, lora_losses = [{e["epoch"]: e.get("step_losses") for e in epochs if e["phase"] in phases}
                                for epochs, phases in ((full, ("full",)), (lora, ("warmup", "lora")))]
    shared = sorted(full_losses.keys() & lora_losses.keys())
    if len(shared) < size:
        raise ValueError(f"{run_full} in its full phase and {run_lora} after its own share {len(shared)} epochs, a window has {size}")
    if not all(losses[epoch] for losses in (full_losses, lora_losses) for epoch in shared):
        raise ValueError("these runs were logged without step losses")
    rows = []
    for i in range(0, len(shared) - size + 1, size):
        window = shared[i:i + size]
        a, b = ([loss for epoch in window for loss in losses[epoch]] for losses in (full_losses, lora_losses))
        test = stats.ttest_ind(a, b, equal_var=False)
        rows.append({"first": window[0], "last": window[-1], "full": float(np.mean(a)), "lora": float(np.mean(b)),
                     "t": float(test.statistic), "p": float(test.pvalue)})
    return rows


def main(argv: list[str]) -> int:
    """Exit status: 0; 2 for what can't be read or is out of range; 1, after the table, where the log can't answer for all settings."""
    run = argv[0] if argv and not argv[0].startswith("-") else None
    try:
        asked = train.parse_flags(argv[1:] if run else argv, Replay(), prog="replay.py", description=__doc__)
        if asked.ttest:
            if len(asked.ttest) != 2 or run or asked != Replay(ttest=asked.ttest, window_epochs=asked.window_epochs):
                raise ValueError("--ttest takes two runs, RUN_FULL RUN_LORA, and --window_epochs")
            print(" epochs  loss full  loss LoRA  difference        t        p")
            for row in compare_losses(*asked.ttest, asked.window_epochs[0] if asked.window_epochs else None):
                lower = "LoRA" if row["lora"] < row["full"] else "full"
                told = f"{lower} is lower" if not row["p"] >= 0.05 else "no difference to be seen: HPT would go on with LoRA"
                print(f"{row['first']}-{row['last']}".rjust(7) + f"  {row['full']:9.4f}  {row['lora']:9.4f}  {row['lora'] - row['full']:+10.4f}  "
                      f"{row['t']:7.2f}  {row['p']:7.4f}  {told}")
            return 0
        if not run:
            raise ValueError("which run? python replay.py RUN, or --ttest RUN_FULL RUN_LORA")
        rows, reason = get_rows(run, asked)
        print(format_table(rows))
        path = Path(asked.csv or Path(run) / "replay.csv")
        write_csv(path, rows)
        print(f"wrote {path}")
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    if reason:
        print(f"error: {reason}", file=sys.stderr)
    return int(bool(reason))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
