"""`python lm.py --study`: does a switch pay on a model that is not a ViT, and do its norms stabilise first?

Every arm is lm.py with flags, three seeds, two runs at a time, each on one thread. A run that is done leaves
a few kB of its log in docs/lm/runs/, which is in git: it is not trained again, there or elsewhere. One that
was killed is begun anew. Controls of equal time come last, because what the arms cost says how long they are.

`lm`, everywhere, is the module lm.py, which is a script when it calls this.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

from config.cli import parse_flags, typed_config
from errors import UserError
from files import read_json, write_json
from lora.ranks import Ranks
from monitor.convergence import find_switch, get_windows, percent_change
from monitor.figures import COLORS, build_epoch_locator, build_figure
from monitor.log import Run, find_first_switch, load_run, pick_events, read_events

ROOT, DOC = Path(__file__).parent, Path("docs/lm.md")
RUNS, KEPT = Path("runs/lm_study"), Path("docs/lm/runs")  # KEPT: what finished runs leave
COSTS = Path("docs/lm/costs.json")
MARKS = ("<!-- written by lm.py --study -->", "<!-- end -->")
SEEDS = (0, 1, 2)
AT_ONCE = 2  # runs
WAY = 90  # % of the way that a quantity goes in a run: by when is that done?


@dataclass(frozen=True)
class Arm:
    name: str  # its runs are NAME-SEED
    flags: str
    text: str  # in the table


AUTHORS = "--lora_scaling authors --lora_lr_factor None"
COHERENT = "--lora_scaling coherent --lora_lr_factor 2.0"
EARLY, LATE = 8, 14
FULL = Arm("full", "--mode full", "all parameters")
# fmt: off
ARMS = [
    FULL,
    Arm("late_authors", f"--switch_epoch {LATE} {AUTHORS}", f"PreLoRA at {LATE}, the authors' scaling 1"),
    Arm("late_coherent", f"--switch_epoch {LATE} {COHERENT}", f"PreLoRA at {LATE}, coherent, from 2 × lr"),
    Arm("early_authors", f"--switch_epoch {EARLY} {AUTHORS}", f"PreLoRA at {EARLY}, the authors' scaling 1"),
    Arm("early_coherent", f"--switch_epoch {EARLY} {COHERENT}", f"PreLoRA at {EARLY}, coherent, from 2 × lr"),
    Arm("static", "--mode lora --lora_scaling matched --lora_alpha 0.5", "static LoRA, matched × 0.5"),
]
# fmt: on


def get_control(epochs: int) -> Arm:
    """All parameters for so many epochs, its learning rates compressed to fit."""
    return Arm(f"equal{epochs}", f"--mode full --epochs {epochs}", f"all parameters, {epochs} epochs")


# ------------------------------------------------------------------------------------------------------------
# runs


def get_kept(arm: Arm, seed: int) -> Path:
    return KEPT / f"{arm.name}-{seed}"


def is_kept(arm: Arm, seed: int) -> bool:
    return (get_kept(arm, seed) / "metrics.jsonl").exists()


def load_arm(arm: Arm) -> list[Run]:
    return [load_run(get_kept(arm, seed)) for seed in SEEDS]


def build_command(lm, arm: Arm, seed: int) -> tuple[object, list[str]]:
    """(settings, lm.py's arguments) of one run. Raises UserError if a kept one has other settings."""
    flags = [*arm.flags.split(), "--seed", str(seed), "--run_dir", str(RUNS / f"{arm.name}-{seed}")]
    cfg = parse_flags(flags, lm.Config(), prog="lm.py")
    lm.check_config(cfg)
    path = get_kept(arm, seed) / "config.json"
    if path.exists():
        stored = typed_config(lm.Config, read_json(path), str(path))
        stored = replace(stored, text_sha256=None)  # at texts `get_text_sha256` looks
        changed = [name for name, value in vars(cfg).items() if value != getattr(stored, name)]
        if changed:
            names = ", ".join(changed)
            raise UserError(f"{path.parent} was trained with another {names}: remove it, to train it anew")
    return cfg, flags


def get_text_sha256() -> str | None:
    """The text of all kept runs, None without any. Raises UserError where they do not share one: bits per
    byte of different texts are never compared."""
    texts: dict[str, str] = {}
    for path in sorted(KEPT.glob("*/config.json")):
        texts.setdefault(read_json(path)["text_sha256"], path.parent.name)
    if len(texts) > 1:
        raise UserError(
            f"the runs {' and '.join(texts.values())} in {KEPT} were trained on different texts, which can't "
            "be compared: remove those of one"
        )
    return next(iter(texts), None)


def check_text(lm) -> str:
    """This Python's text. Raises UserError where kept runs were trained on another one."""
    kept, here = get_text_sha256(), lm.hash_text(lm.read_text())
    if kept not in (None, here):
        raise UserError(
            f"the runs in {KEPT} were trained on another Python's source: take that one, or remove them"
        )
    return here


def train_run(arm: Arm, seed: int, flags: list[str]) -> None:
    """Train one run, from its beginning, and keep its log. Raises UserError with the last line of its output
    if it fails."""
    run_dir = RUNS / f"{arm.name}-{seed}"
    if not is_finished(run_dir):
        shutil.rmtree(run_dir, ignore_errors=True)  # of a run that was killed
        print(f"{run_dir} …\n", end="", flush=True)  # in one piece: two threads print
        call(run_dir, flags)
    keep_run(run_dir, get_kept(arm, seed))


def is_finished(run_dir: Path) -> bool:
    return bool(pick_events(read_events(run_dir / "metrics.jsonl"), "held_out"))


running: set[subprocess.Popen] = set()


def call(run_dir: Path, flags: list[str]) -> None:
    """lm.py on one thread. What it says goes to runs/lm_study/logs."""
    log = RUNS / "logs" / f"{run_dir.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "lm.py", *flags],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        running.add(process)
        status = process.wait()
        running.discard(process)
    if status:
        said = log.read_text(errors="replace").strip().splitlines() or ["without a word"]
        raise UserError(f"{run_dir} ended with status {status}: {said[-1]}")


def keep_run(source: Path, folder: Path) -> None:
    """Write what the report needs of a run's log into `folder`, whole or not at all: figures and norms to six
    digits, without each step's loss."""
    dropped = {"step_losses", "slowest_rank", "mfu", "data_wait_fraction", "hosts", "mesh", "notes"}
    lines = []
    for event in read_events(source / "metrics.jsonl"):
        kept = {key: value for key, value in event.items() if key not in dropped}
        lines.append(json.dumps(round_floats(kept)) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", read_json(source / "config.json"))
    partial = folder / "metrics.tmp"
    partial.write_text("".join(lines))
    partial.replace(folder / "metrics.jsonl")  # last, and whole: a run with it is kept


def round_floats(value: dict) -> dict:
    """The same with six digits of each float."""
    return json.loads(json.dumps(value), parse_float=lambda digits: float(f"{float(digits):.6g}"))


def train_missing(lm, arms: Iterable[Arm], text_sha256: str) -> None:
    """Train every run of these arms that is not kept. Raises UserError for one that fails; the others are
    stopped then, and begin anew next time."""
    waiting = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for seed in SEEDS:
            for arm in arms:
                _, flags = build_command(lm, arm, seed)  # here: tyro is not for several threads
                if not is_kept(arm, seed):
                    flags += ["--text_sha256", text_sha256]
                    waiting.append(pool.submit(train_run, arm, seed, flags))
        try:
            for job in waiting:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            raise


# ------------------------------------------------------------------------------------------------------------
# what an epoch takes


def build_step(lm, cfg, phase: str, ranks: Ranks | None, text: torch.Tensor) -> Callable[[], None]:
    """A function that takes lm.py's own step in that phase, always on the same crops."""
    model = lm.build_model(cfg, phase, ranks)
    optimizer = lm.build_optimizer(model, cfg.weight_decay)
    failed, crops = torch.zeros((), dtype=torch.bool), lm.get_crops(text, cfg, 0)
    return lambda: lm.train_step(cfg, model, optimizer, iter([crops]), cfg.lr, failed)


def measure_costs(lm, rounds: int = 31) -> dict[str, dict[str, float]]:
    """{arm: {phase: its step in full steps}}, with the ranks of the arm's first run: medians of steps that
    take turns, on one core, so that what else the machine does costs all of them the same."""
    torch.set_num_threads(1)
    text, _ = lm.split_text(lm.read_text())
    steps: dict[tuple[str, str], Callable] = {}
    for arm in ARMS:
        run = load_run(get_kept(arm, SEEDS[0]))
        cfg = typed_config(lm.Config, run.config, arm.name)
        ranks = get_run_ranks(lm, cfg, run)
        for phase in dict.fromkeys(record["phase"] for record in run.epochs):
            if phase != "full" or arm is FULL:
                steps[arm.name, phase] = build_step(lm, cfg, phase, ranks, text)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(rounds + 1):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            times[key].append(time.perf_counter() - start)
    medians = {key: float(np.median(values[1:])) for key, values in times.items()}  # the first allocates
    full = medians[FULL.name, "full"]
    costs: dict[str, dict[str, float]] = {arm.name: {"full": 1.0} for arm in ARMS}
    for (name, phase), seconds in medians.items():
        costs[name][phase] = seconds / full
    return costs | {"milliseconds": {"full": 1e3 * full}}


def get_run_ranks(lm, cfg, run: Run) -> Ranks | None:
    """The ranks of a run; None without adapters."""
    if cfg.mode == "lora":
        return lm.get_static_ranks(cfg)
    switch = find_first_switch(run.switches)
    return switch["ranks"] if switch else None


def get_costs(lm) -> dict[str, dict[str, float]]:
    """`measure_costs`', measured once and kept in docs/lm/costs.json. What an arm lacks there is measured
    anew, with all others."""
    if not COSTS.exists() or any(arm.name not in read_json(COSTS) for arm in ARMS):
        print("timing the phases of all arms side by side …", flush=True)
        write_json(COSTS, round_floats(measure_costs(lm)))
    return read_json(COSTS)


def get_full_epochs(run: Run, costs: dict[str, float]) -> float:
    """What a run's epochs cost, in epochs with all parameters. Not counted, and the same for all: reading the
    text, evaluation, starting."""
    return sum(costs[record["phase"]] for record in run.epochs)


def get_equal_epochs(run: Run, costs: dict[str, float]) -> int:
    """Whole epochs with all parameters that take no less time than the run: rounded up, always."""
    return math.ceil(get_full_epochs(run, costs) - 1e-6)


def get_controls(costs: dict[str, dict[str, float]]) -> list[Arm]:
    """The controls of equal time that the arms' runs ask for, longest first."""
    epochs = {get_equal_epochs(run, costs[arm.name]) for arm in ARMS for run in load_arm(arm)}
    own = load_run(get_kept(FULL, SEEDS[0])).config["epochs"]
    return [get_control(count) for count in sorted(epochs - {own}, reverse=True)]


# ------------------------------------------------------------------------------------------------------------
# what came out


def get_bits(arm: Arm) -> np.ndarray:
    """Bits per byte on the held-out text, of each seed."""
    values = []
    for seed in SEEDS:
        final = pick_events(read_events(get_kept(arm, seed) / "metrics.jsonl"), "held_out")[0]
        values.append(final["bits_per_byte"])
    return np.array(values)


def get_interval(values: np.ndarray) -> str:
    """Mean and its 95 % interval, by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{values.mean():+.3f} [{values.mean() - half:+.3f}, {values.mean() + half:+.3f}]"


def get_equal_bits(arm: Arm, costs: dict[str, float]) -> np.ndarray:
    """Of each seed the bits per byte of all parameters trained for no less time than that seed's run took."""
    values = []
    for i, run in enumerate(load_arm(arm)):
        epochs = get_equal_epochs(run, costs)
        control = FULL if epochs == run.config["epochs"] else get_control(epochs)
        values.append(get_bits(control)[i])
    return np.array(values)


def get_row(arm: Arm, costs: dict[str, dict[str, float]]) -> list[str]:
    """An arm's cells of the table; a control's has no control."""
    runs, bits = load_arm(arm), get_bits(arm)
    own = costs.get(arm.name, {"full": 1.0})
    switches = [find_first_switch(run.switches) for run in runs]
    cells = [arm.text, ", ".join(map(str, sorted({switch["epoch"] for switch in switches if switch})))]
    cells += [f"{bits.mean():.3f} ± {bits.std(ddof=1):.3f}"]
    cells += ["" if arm is FULL else get_interval(bits - get_bits(FULL))]
    cells += [f"{np.mean([get_full_epochs(run, own) for run in runs]):.2f}"]
    has_control = arm in ARMS and arm is not FULL
    cells += [get_interval(bits - get_equal_bits(arm, own)) if has_control else ""]
    return [*cells, *(f"{own[phase]:.2f}" if phase in own else "" for phase in ("warmup", "lora"))]


def get_table(costs: dict[str, dict[str, float]], controls: list[Arm]) -> str:
    """The arms beside each other, a row each, in Markdown."""
    titles = ["arm", "switch after", "bits per byte", "− all parameters [95 %]", "cost"]
    titles += ["− equal time [95 %]", "warmup step", "LoRA step"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return "\n".join(lines + [f"| {' | '.join(get_row(arm, costs))} |" for arm in [*ARMS, *controls]])


def get_changes(lm) -> dict[str, np.ndarray]:
    """{family or "loss": |change| in % between consecutive windows}, means over layers and the seeds of all
    parameters."""
    changes: dict[str, list[list[float]]] = {}
    for run in load_arm(FULL):
        windows = get_windows(run.epochs, typed_config(lm.Config, run.config, FULL.name))
        series = {"loss": [window.loss for window in windows]}
        for family in windows[0].norms:
            series[family] = [float(np.mean(window.norms[family])) for window in windows]
        for name, values in series.items():
            steps = [abs(percent_change(new, old)) for old, new in zip(values, values[1:])]
            changes.setdefault(name, []).append(steps)
    return {name: np.mean(values, axis=0) for name, values in changes.items()}


def get_ways() -> dict[str, np.ndarray]:
    """{family or "loss": % of its way from the first epoch to the last that it has gone by each epoch's end},
    means over layers and the seeds of all parameters. Loss: in validation."""
    ways: dict[str, list[np.ndarray]] = {}
    for run in load_arm(FULL):
        series = {"loss": np.array([record["val_loss"] for record in run.epochs])}
        for family in run.epochs[0]["weight_norms"]:
            series[family] = np.array([np.mean(record["weight_norms"][family]) for record in run.epochs])
        for name, values in series.items():
            ways.setdefault(name, []).append(100 * (values - values[0]) / (values[-1] - values[0]))
    return {name: np.mean(values, axis=0) for name, values in ways.items()}


def get_window_table(lm) -> str:
    """How much norms and loss change from window to window, and by when most of it is done, in Markdown."""
    changes, ways = get_changes(lm), get_ways()
    size = load_run(get_kept(FULL, SEEDS[0])).config["window_epochs"]
    ends = [(i + 2) * size for i in range(len(changes["loss"]))]
    titles = ["", *(f"{end - size + 1}–{end}" for end in ends), f"{WAY} % of its way after"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, values in changes.items():
        done = 1 + next(i for i in range(len(ways[name])) if np.all(ways[name][i:] >= WAY))
        cells = [name, *(f"{value:.2f}" for value in values), str(done)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def get_test_switches(lm) -> str:
    """When Algorithm 1 would have switched the runs with all parameters, by lm.py's thresholds."""
    found = []
    for run in load_arm(FULL):
        cfg = replace(typed_config(lm.Config, run.config, FULL.name), mode="prelora")
        found.append(str(find_switch(run.epochs, cfg) or "never"))
    default = lm.Config()
    return (
        f"By lm.py's thresholds (tau {default.tau:g} %, zeta {default.zeta:g} %, "
        f"{default.num_windows} windows) Algorithm 1 passes in them after epoch {', '.join(found)} "
        f"(seeds {', '.join(map(str, SEEDS))})."
    )


# ------------------------------------------------------------------------------------------------------------
# the report


def build_norms_figure(lm) -> Figure:
    """Do the norms stabilise before the loss? Change by window, and share of the way that is gone."""
    figure = build_figure(10, 4.3)
    left, right = figure.subplots(1, 2)
    changes, ways = get_changes(lm), get_ways()
    size = load_run(get_kept(FULL, SEEDS[0])).config["window_epochs"]
    families = [name for name in changes if name != "loss"]
    for name in ["loss", *families]:
        style = {"color": "black", "linestyle": "--", "linewidth": 2}
        if name != "loss":
            style = {"color": COLORS[families.index(name) % len(COLORS)]}
        ends = [(i + 2) * size for i in range(len(changes[name]))]
        left.plot(ends, changes[name], marker="o", markersize=3, label=name, **style)
        right.plot(range(1, 1 + len(ways[name])), ways[name], label=name, **style)
    left.set_yscale("log")
    left.set(title="(a) change against the window before", ylabel="|change| %")
    right.axhline(WAY, color="0.7", linewidth=1)
    right.set(title="(b) way from the first epoch to the last", ylabel="% gone", ylim=(0, 105))
    for axes in (left, right):
        axes.set_xlabel("epoch, all parameters")
        axes.xaxis.set_major_locator(build_epoch_locator())
    right.legend(frameon=False)
    return figure


def build_bits_figure(costs: dict[str, dict[str, float]]) -> Figure:
    """Bits per byte at the epochs' ends by what they have cost, the second half; means over seeds."""
    figure = build_figure(7, 4.3)
    axes = figure.subplots()
    for i, arm in enumerate(ARMS):
        runs = load_arm(arm)
        bits = np.mean([[record["val_loss"] for record in run.epochs] for run in runs], axis=0) / math.log(2)
        spent = np.cumsum([costs[arm.name][record["phase"]] for record in runs[0].epochs])
        style = {"color": "black", "linestyle": "--"} if arm is FULL else {"color": COLORS[i % len(COLORS)]}
        half = len(bits) // 2
        axes.plot(spent[half:], bits[half:], label=arm.text, **style)
    axes.set(xlabel="cost, in epochs with all parameters", ylabel="bits per byte, at the epochs' ends")
    axes.legend(frameon=False, fontsize="small")
    return figure


def read_doc() -> tuple[str, str]:
    """What stands before and behind the marks in DOC. Raises UserError if it has lost them."""
    try:
        text = DOC.read_text()
    except OSError as error:
        raise UserError(f"{DOC} can't be read: {error.strerror}") from None
    if text.count(MARKS[0]) != 1 or text.count(MARKS[1]) != 1:
        raise UserError(f"{DOC} has lost the marks between which the tables go: {' '.join(MARKS)}")
    before, rest = text.split(MARKS[0])
    return before, rest.split(MARKS[1])[1]


def check_trained(arms: list[Arm]) -> None:
    """Raise UserError for arms of which a run is missing."""
    missing = [arm.name for arm in arms if not all(is_kept(arm, seed) for seed in SEEDS)]
    if missing:
        raise UserError(f"runs of {', '.join(missing)} are missing: python lm.py --study trains them")


def write_report(lm) -> None:
    """Write the tables between the marks of DOC, and the figures beside it."""
    before, after = read_doc()
    check_trained(ARMS)
    text_sha256, costs = get_text_sha256(), get_costs(lm)
    controls = get_controls(costs)
    check_trained(controls)
    full = costs["milliseconds"]["full"]
    parts = [
        get_table(costs, controls),
        f"{len(SEEDS)} seeds an arm. Costs are in epochs with all parameters, whose step takes {full:.0f} ms "
        f"here; warmup and LoRA steps are in steps with all parameters. Text: sha256 {text_sha256[:16]}.",
        f"All parameters, |change| in % of each family's norm and of the training loss against the window "
        f"before:\n\n{get_window_table(lm)}",
        get_test_switches(lm),
        "![change of norms and loss by window, and the share of their way that is gone](lm/norms.png)",
        "![bits per byte of the arms by what they have cost](lm/bits.png)",
    ]
    DOC.write_text(before + MARKS[0] + "\n" + "\n\n".join(parts) + "\n" + MARKS[1] + after)
    build_norms_figure(lm).savefig(DOC.with_suffix("") / "norms.png")
    build_bits_figure(costs).savefig(DOC.with_suffix("") / "bits.png")
    print(f"wrote {DOC} and figures beside it")


def run_study(lm) -> None:
    """Train what is missing: the arms, and then the controls that their costs ask for."""

    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    text_sha256 = check_text(lm)
    train_missing(lm, ARMS, text_sha256)
    train_missing(lm, get_controls(get_costs(lm)), text_sha256)


def main(argv: list[str], lm) -> int:
    """Exit status: 0; 1 for a run that failed or is missing; 2 for a wrong flag."""
    if argv not in ([], ["--report"]):
        print("error: python lm.py --study [--report]", file=sys.stderr)
        return 2
    os.chdir(ROOT)
    try:
        read_doc()  # before an hour of training
        if not argv:
            run_study(lm)
        write_report(lm)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        return 130
    return 0
