"""When would other settings have switched, and with which ranks? From a run's log, without training.

    python replay.py runs/baseline                                        the run's own settings
    python replay.py runs/baseline --tau 0.25 0.5 1 --zeta 1 2.5 5        all combinations, RUN/replay.csv too
    python replay.py runs/baseline --window_epochs 2 3 --times runs/exp2  time saved, by another run's epochs
    python replay.py runs/baseline --switch_rule forecast --calibrate FORK     no thresholds, window by window
    python replay.py --ttest RUN_FULL RUN_LORA                            HPT's criterion on two forks' losses

A run that has switched says nothing of what its weights would have done after that: settings that switch
later need a baseline's log (--mode full).

A run that was resumed with other settings is judged, without flags, as it was itself: each epoch's end by the
settings that it had then, so that what is told is when it did switch. With flags they hold from the first
epoch on, and for those that are not given the run's last.
"""

import csv
import dataclasses
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
from scipy import stats

import train
from config.checks import check_config
from config.cli import parse_flags, typed_config
from config.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat
from errors import UserError, exit_with
from files import PathStr, expand_home
from lora.ranks import Ranks, count_parameters
from monitor.convergence import find_own_switch, find_switch, get_spans
from monitor.forecast import get_outlook, measure_shortfall
from monitor.log import Run, get_stage, load_run, pick_events, read_run
from start import check_spectrum, count_base, decide_ranks, get_rates


@dataclass
class Replay:
    """Lists: every combination is tried. None: as in the run."""

    tau: tuple[float, ...] | None = None  # thresholds on the weight norms' change, in %
    zeta: tuple[float, ...] | None = None  # thresholds on the loss's change, in %
    num_windows: tuple[int, ...] | None = None  # consecutive windows that must agree
    window_epochs: tuple[int, ...] | None = None  # epochs per window; of --ttest a single number
    switch_rule: tuple[Literal["algorithm1", "forecast"], ...] | None = None  # forecast: no thresholds
    rank_rule: tuple[Literal["minmax", "uniform", "budget", "spectrum"], ...] | None = None
    forecast_shortfall: NonNegativeFloat | None = None  # forecast: what adapters leave undelivered
    calibrate: PathStr | None = None  # forecast: measure that by this run, a fork of RUN that has switched
    warmup_cost: PositiveFloat | None = None  # forecast: a warmup step in full ones; None = by --times
    lora_cost: PositiveFloat | None = None  # forecast: a step of the lora phase; None = by --times
    lora_warmup_epochs: NonNegativeInt | None = None  # forecast: w; None = the calibrating fork's, or RUN's
    times: PathStr | None = None  # run with epochs of all phases, for the time saved; None = the run itself
    csv: PathStr | None = None  # where the table goes; None = RUN/replay.csv
    ttest: tuple[PathStr, ...] = ()  # RUN_FULL RUN_LORA: compare their step losses instead


SETTINGS = ("switch_rule", "tau", "zeta", "num_windows", "window_epochs", "rank_rule")
SWITCH_SETTINGS = SETTINGS[:-1]
FORECAST_FLAGS = ("forecast_shortfall", "calibrate", "warmup_cost", "lora_cost", "lora_warmup_epochs")
# What the two runs of --ttest must share.
SHARED = ("text_sha256", "dataset", "image_size", "model", "epochs", "batch_size", "train_samples", "seed")
SHARED += (
    "lr",
    "lr_warmup_steps",
    "lr_schedule",
    "lr_decay_share",
    "rand_augment",
    "color_jitter",
    "random_erasing",
    "mixup",
    "cutmix",
)

# Whose runs are replayed: train.py's, and those of a module that has functions of these names, as lm.py.
TASK = SimpleNamespace(
    Config=train.Config,
    build_net=train.build_net,
    get_rates=get_rates,
    check_config=check_config,
    count_base=count_base,
    decide_ranks=decide_ranks,
)


def replay_run(cfg, epochs: list[dict], spans=(), task=TASK) -> tuple[int | None, Ranks | None]:
    """(epoch of the switch, ranks) under `cfg`, from the epoch records of a full phase; (None, None) if they
    end before it. `spans`: of monitor.convergence.get_spans, where settings were changed on the way.

    What a run with `cfg` would have done, if its full phase was this one: train.py decides by the same
    functions. Raises UserError for records without a family that `cfg` wants, without the spectrum that it
    wants, or with values that are not finite.
    """
    try:
        if spans:
            epoch = find_own_switch(epochs, cfg, spans, task.get_rates)
        else:
            epoch = find_switch(epochs, cfg, task.get_rates)
    except FloatingPointError as error:
        raise UserError(str(error)) from None
    if epoch is None:
        return None, None
    net = task.build_net(cfg)
    check_spectrum(cfg, net, epochs[:epoch])
    return epoch, task.decide_ranks(cfg, net, epochs[:epoch])


def get_phase_seconds(run: str) -> dict[str, float]:
    """Median training seconds of an epoch of each phase in the run; of the full one, before blocks are
    frozen."""
    seconds: dict[str, list[float]] = {}
    for record in load_run(run).epochs:
        seconds.setdefault(get_stage(record), []).append(record["epoch_seconds"])
    return {phase: float(np.median(values)) for phase, values in seconds.items()}


def predict_saving(cfg: train.Config, switch: int, seconds: dict[str, float]) -> float:
    """Share of a full run's training time, in %, that switching after epoch `switch` saves; evaluation and
    the switches are not counted.
    """
    warmup = min(cfg.lora_warmup_epochs, cfg.epochs - switch)
    lora = cfg.epochs - switch - warmup
    spent = switch * seconds["full"] + warmup * seconds.get("warmup", 0) + lora * seconds["lora"]
    return 100 * (1 - spent / (cfg.epochs * seconds["full"]))


def get_timing(cfg: train.Config, run: str, asked: Replay) -> dict[str, float] | None:
    """Seconds of an epoch of each phase, by asked.times or the run itself; None if that has not timed them
    all.

    Raises UserError if asked.times has not.
    """
    seconds = get_phase_seconds(asked.times or run)
    needed = {"full", "lora"}
    if cfg.lora_warmup_epochs:
        needed.add("warmup")
    if needed <= seconds.keys():
        return seconds
    if asked.times:
        raise UserError(f"{asked.times} has timed only: {', '.join(seconds)}")
    return None


def get_settings(cfg: train.Config, asked: Replay) -> list[dict]:
    """Every combination of the settings that are asked for; those that are not are the run's. The forecast
    has no thresholds: of its combinations that differ in them alone there is the first."""
    values = [getattr(asked, name) or (getattr(cfg, name),) for name in SETTINGS]
    combinations = {}
    for combination in itertools.product(*values):
        setting = dict(zip(SETTINGS, combination))
        key = dict(setting)
        if setting["switch_rule"] == "forecast":
            del key["tau"], key["zeta"]
        combinations.setdefault(tuple(key.items()), setting)
    return list(combinations.values())


def add_forecast(
    cfg: train.Config, run: str, asked: Replay, seconds: dict[str, float] | None
) -> train.Config:
    """`cfg` with the shortfall and the costs that a forecast needs: those that are `asked` for, the run's
    own, or measured, by the fork to calibrate with and by `seconds`. Raises UserError for what is not to be
    had."""
    given = {}
    for name in ("forecast_shortfall", "warmup_cost", "lora_cost", "lora_warmup_epochs"):
        given[name] = getattr(cfg, name) if getattr(asked, name) is None else getattr(asked, name)
    if asked.calibrate:
        full, fork = load_run(run), load_run(asked.calibrate)
        check_shared(run, full, asked.calibrate, fork)
        try:
            shortfall = measure_shortfall(fork.epochs, full.epochs, cfg.window_epochs)
        except ValueError as error:
            raise UserError(f"{asked.calibrate} and {run}: {error}") from None
        given["forecast_shortfall"] = round(shortfall, 3)
        if asked.lora_warmup_epochs is None:
            given["lora_warmup_epochs"] = fork.config["lora_warmup_epochs"]
    if seconds and load_run(asked.times or run).config.get("fork"):
        seconds = None  # those of its full epochs are another run's, at another time
    for phase in ("warmup", "lora"):
        if seconds and not given[f"{phase}_cost"] and phase in seconds:
            given[f"{phase}_cost"] = round(seconds[phase] / seconds["full"], 3)
    if given["lora_warmup_epochs"] == 0:
        given["warmup_cost"] = 1.0  # of nothing
    if not (given["warmup_cost"] and given["lora_cost"]):
        raise UserError(
            "the forecast needs what steps of the other phases cost: --warmup_cost and --lora_cost, or "
            "--times RUN, which has trained epochs of all phases itself and is no fork"
        )
    return dataclasses.replace(cfg, **given)


def get_rows(run: str, asked: Replay, task=TASK) -> tuple[list[dict], list[str], str]:
    """A row for every combination of settings, sentences on settings that the run was given on its way, and
    one on those that this log can't answer ("" if there are none).

    `switch_epoch` is None where the log ends before the switch. Raises UserError for a run or settings that
    can't be replayed.
    """
    config, events = read_run(run)
    epochs = pick_events(events, "epoch")
    cfg = typed_config(task.Config, config, f"{run}/config.json")
    of_other_runs = {name: None for name in ("fork", "baseline") if name in config}
    cfg = dataclasses.replace(cfg, mode="prelora", **of_other_runs)
    freezes = config["mode"] == "full"  # then switch_epoch is when blocks are frozen, and no switch
    full = [record for record in epochs if get_stage(record) == "full"]
    if not full:
        raise UserError(f"{run} has no full phase")
    spans = []
    if freezes or any(getattr(asked, name) is not None for name in SWITCH_SETTINGS + FORECAST_FLAGS):
        cfg = dataclasses.replace(cfg, switch_epoch=None)  # now the test decides, not a fixed epoch
    else:
        spans = [(since, settings) for since, settings in get_spans(events) if since <= len(full)]
    if spans:  # what came after the switch, or has judged no epoch yet, has not decided
        cfg = dataclasses.replace(cfg, **spans[-1][1])
    seconds = get_timing(cfg, run, asked)
    base, costs = task.count_base(cfg, task.build_net(cfg))
    if "forecast" in (asked.switch_rule or (cfg.switch_rule,)):
        cfg = add_forecast(cfg, run, asked, seconds)
    elif given := [name for name in FORECAST_FLAGS if getattr(asked, name) is not None]:
        raise UserError(f"--{given[0]} is the forecast's: it needs --switch_rule forecast")
    rows = []
    for setting in get_settings(cfg, asked):
        budget = None if setting["rank_rule"] == "minmax" else cfg.rank_budget
        tried = dataclasses.replace(cfg, **setting, rank_budget=budget)
        task.check_config(tried)
        if tried.rank_rule == "spectrum" and tried.window_epochs != cfg.window_epochs:
            raise UserError(
                f"{run} has the spectra of windows of {cfg.window_epochs} epochs: rank_rule spectrum can't "
                f"be replayed with window_epochs {tried.window_epochs}, choose another --rank_rule for that"
            )
        epoch, ranks = replay_run(tried, full, spans, task)
        row = {**setting, "switch_epoch": epoch}
        if tried.switch_rule == "forecast":
            row["forecast"] = describe_forecast(tried, full, task)
        if epoch is None:
            row["after"] = len(full)
        else:
            params = count_parameters(ranks, costs)
            row["adapter_params"] = params
            row["share"] = 100 * params / base
            row["rank_mean"] = float(np.mean([rank for layers in ranks.values() for rank in layers]))
            row["time_saved"] = predict_saving(tried, epoch, seconds) if seconds else None
            row["ranks"] = ranks
        rows.append(row)
    late = sum(row["switch_epoch"] is None for row in rows)
    if not late or len(full) == len(epochs):  # the log has no switch of its own
        return rows, describe_spans(run, spans), ""
    did = "frozen blocks" if freezes else "switched"
    reason = (
        f"{run} has {did} after epoch {len(full)}: its log can't tell when {late} of these settings "
        "would have, use a baseline's (--mode full)"
    )
    return rows, describe_spans(run, spans), reason


def describe_forecast(cfg, full: list[dict], task=TASK) -> str:
    """What the forecast thought at the end of each window of a full phase, as a table."""
    titles = (
        "after",
        "final loss",
        "if switched",
        "epochs in equal time",
        "their loss",
        "gain by the last fits",
    )
    lines = []
    for count in range(cfg.window_epochs, len(full) + 1, cfg.window_epochs):
        outlook = get_outlook(full[:count], cfg, task.get_rates)
        losses = (outlook.final, outlook.switched, outlook.equal)
        final, switched, equal = ("-" if outlook.law is None else f"{loss:.4f}" for loss in losses)
        gains = " ".join(f"{gain:+.4f}" for gain in outlook.gains) or "-"
        lines.append(
            (str(count), final, switched, f"{outlook.equal_epochs:.1f}", equal, gains, outlook.verdict)
        )
    windows = f"{cfg.num_windows} × {cfg.window_epochs}"
    return (
        f"forecast, windows {windows}: w is {cfg.lora_warmup_epochs}, steps of warmup and lora phase cost "
        f"{cfg.warmup_cost:g} and {cfg.lora_cost:g} full ones, the shortfall is "
        f"{cfg.forecast_shortfall:g}\n{align([(*titles, 'verdict'), *lines])}"
    )


def describe_spans(run: str, spans: list[tuple[int, dict]]) -> list[str]:
    """A sentence for each change of settings in `spans`."""
    sentences = []
    for (_, before), (since, after) in itertools.pairwise(spans):
        # What an older start did not write down, or goes with a new rule, is not known to have changed.
        known = {name: value for name, value in after.items() if name in before}
        changes = [f"{name} {value}" for name, value in known.items() if value != before[name]]
        if changes:
            sentences.append(
                f"{run} has {', '.join(changes)} from the end of epoch {since} on, and was judged so"
            )
    return sentences


def format_table(rows: list[dict]) -> str:
    """The rows as text, ranks per family as lowest-highest."""
    ranks_title = "ranks of the layers, per family"
    titles = (
        "switch rule",
        "tau %",
        "zeta %",
        "windows",
        "rank rule",
        "switch after",
        "adapter parameters",
        "time saved",
        ranks_title,
    )
    table = [titles]
    for row in rows:
        windows = f"{row['num_windows']} × {row['window_epochs']}"
        thresholds = [f"{row['tau']:g}", f"{row['zeta']:g}"]
        if row["switch_rule"] == "forecast":
            thresholds = ["-", "-"]
        cells = [row["switch_rule"], *thresholds, windows, row["rank_rule"]]
        if row["switch_epoch"] is None:
            cells += [f"not by {row['after']}", "-", "-", "-"]
        else:
            saved = "-" if row["time_saved"] is None else f"{row['time_saved']:.1f} %"
            spans = [f"{family} {format_span(layers)}" for family, layers in row["ranks"].items()]
            cells += [str(row["switch_epoch"]), f"{row['adapter_params']:,} ({row['share']:.1f} %)"]
            cells += [saved, " ".join(spans)]
        table.append(tuple(cells))
    return align(table)


def align(table: list[tuple[str, ...]]) -> str:
    """Rows of cells as text, each column but the last right-aligned."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = []
    for line in table:
        cells = [cell.rjust(width) for cell, width in zip(line[:-1], widths)]
        lines.append("  ".join([*cells, line[-1]]))
    return "\n".join(lines)


def format_span(ranks: list[int]) -> str:
    low, high = min(ranks), max(ranks)
    return f"{low}-{high}" if low < high else f"{low}"


def write_csv(path: Path, rows: list[dict]) -> None:
    """All columns of the table, ranks in full as JSON. Raises UserError if the file can't be written."""
    names = [*SETTINGS, "switch_epoch", "adapter_params", "share", "rank_mean", "time_saved", "ranks"]
    try:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, names, extrasaction="ignore", restval="")
            writer.writeheader()
            for row in rows:
                if "ranks" in row:
                    row = {**row, "ranks": json.dumps(row["ranks"])}
                writer.writerow(row)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from None


def compare_losses(run_full: str, run_lora: str, window_epochs: int | None) -> list[dict]:
    """HPT's criterion (Dahal et al. 2025): a two-sample t-test (Welch's) on the step losses of a full and a
    LoRA copy, window by window.

    Windows of `window_epochs` (None: the LoRA run's) from where the two part, that is from the first epoch of
    the LoRA run that isn't in its full phase; a rest that fills no window is left out. Each row: first and
    last epoch, mean losses, t, p. Raises UserError if the runs don't share those epochs or have no step
    losses.
    """
    full, lora = load_run(run_full), load_run(run_lora)
    check_shared(run_full, full, run_lora, lora)
    if window_epochs is not None and window_epochs < 1:
        raise UserError(f"window_epochs must be above 0, not {window_epochs}")
    size = window_epochs or lora.config["window_epochs"]
    full_losses = get_step_losses(full.epochs, ("full",))
    lora_losses = get_step_losses(lora.epochs, ("warmup", "lora"))
    shared = sorted(full_losses.keys() & lora_losses.keys())
    if len(shared) < size:
        raise UserError(
            f"{run_full} in its full phase and {run_lora} after its own share {len(shared)} epochs, "
            f"a window has {size}"
        )
    if not all(full_losses[epoch] and lora_losses[epoch] for epoch in shared):
        raise UserError("these runs were logged without step losses")
    rows = []
    for start in range(0, len(shared) - size + 1, size):
        window = shared[start : start + size]
        a = [loss for epoch in window for loss in full_losses[epoch]]
        b = [loss for epoch in window for loss in lora_losses[epoch]]
        test = stats.ttest_ind(a, b, equal_var=False)
        row = {"first": window[0], "last": window[-1], "full": float(np.mean(a)), "lora": float(np.mean(b))}
        rows.append({**row, "t": float(test.statistic), "p": float(test.pvalue)})
    return rows


def check_shared(run_full: str, full: Run, run_lora: str, lora: Run) -> None:
    """Raise UserError where two runs differ in more than the switch."""
    for name in SHARED:
        here, there = full.config.get(name), lora.config.get(name)  # each task has some of them
        if here != there:
            raise UserError(
                f"{run_full} and {run_lora} differ in more than the switch: {name} is {here} and {there}"
            )


def get_step_losses(epochs: list[dict], phases: tuple[str, ...]) -> dict[int, list[float] | None]:
    """{epoch: its step losses, None if they were not logged}, of the phases' epochs."""
    return {record["epoch"]: record.get("step_losses") for record in epochs if record["phase"] in phases}


def print_losses(rows: list[dict]) -> None:
    print(" epochs  loss full  loss LoRA  difference        t        p")
    for row in rows:
        if row["p"] >= 0.05:
            told = "no difference to be seen: HPT would go on with LoRA"
        elif row["lora"] < row["full"]:
            told = "LoRA is lower"
        else:
            told = "full is lower"
        window, difference = f"{row['first']}-{row['last']}", row["lora"] - row["full"]
        losses = f"{row['full']:9.4f}  {row['lora']:9.4f}  {difference:+10.4f}"
        print(f"{window:>7}  {losses}  {row['t']:7.2f}  {row['p']:7.4f}  {told}")


def main(argv: list[str], task=TASK) -> int:
    """Exit status: 0; 2 for what can't be read or is out of range; 1, after the table, where the log can't
    answer for all settings.
    """
    run = argv[0] if argv and not argv[0].startswith("-") else None
    try:
        run = run and expand_home(run)
        asked = parse_flags(argv[1:] if run else argv, Replay(), prog="replay.py", description=__doc__)
        if asked.ttest:
            if (
                len(asked.ttest) != 2
                or run
                or asked != Replay(ttest=asked.ttest, window_epochs=asked.window_epochs)
            ):
                raise UserError("--ttest takes two runs, RUN_FULL RUN_LORA, and --window_epochs")
            if asked.window_epochs and len(asked.window_epochs) > 1:
                raise UserError(f"--ttest takes one --window_epochs, not {len(asked.window_epochs)}")
            print_losses(
                compare_losses(*asked.ttest, asked.window_epochs[0] if asked.window_epochs else None)
            )
            return 0
        if not run:
            raise UserError("which run? python replay.py RUN, or --ttest RUN_FULL RUN_LORA")
        rows, notes, reason = get_rows(run, asked, task)
        print(format_table(rows))
        for table in dict.fromkeys(row["forecast"] for row in rows if "forecast" in row):
            print(f"\n{table}")
        print("".join(f"{note}\n" for note in notes), end="")
        path = Path(asked.csv or Path(run) / "replay.csv")
        write_csv(path, rows)
        print(f"wrote {path}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
