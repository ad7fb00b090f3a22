"""The study: the paper's experiments and their controls on Fashion-MNIST, in under two hours on 2 CPU cores.

    python study.py              trains what is still missing under runs/study, then writes the report
    python study.py --report     writes the report only: figures to docs/study/, tables between the marks in
                                 docs/study.md

One process a core, one thread each. Every arm is train.py with a preset and flags. Arms that differ only
after the switch are forked from the baseline of the same seed, whose epochs up to there count as theirs.
Stopped, it goes on where it stood.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats

import replay
import train
from benchmarks.choices import repeat_noise
from benchmarks.contenders import build_contender
from config.checks import check_config
from config.cli import load_preset, parse_flags, typed_config
from errors import UserError
from files import read_json, write_json
from lora.ranks import Ranks
from monitor.log import Run, find_first_switch, get_stage, load_run
from monitor.plot import plot_runs
from start import count_base, get_static_ranks

ROOT, RUNS, DOC = Path(__file__).parent, Path("runs/study"), Path("docs/study.md")
MARKS = ("<!-- written by study.py -->", "<!-- end -->")


@dataclass
class Arm:
    name: str  # its runs are runs/study/<name>-<seed>
    preset: str
    flags: tuple[str, ...] = ()
    seeds: int = 3
    fork: bool = True  # from the baseline of its seed, where its own switch is due
    text: str = ""  # in the table


MAIN = "best"  # the arm whose time the equal-time control gets
REST = ("--lora_trainable", "adapters+rest")
RANK_32 = ("--rank_min", "32")
# fmt: off
BASELINE = Arm("baseline", "study_baseline", seeds=5, fork=False, text="baseline, all parameters")
FORKS = [
    Arm("prelora", "study", seeds=5, text="PreLoRA: Exp2, w = 2, adapters alone"),
    Arm("rest", "study", REST, seeds=5, text="PreLoRA, adapters and head, norms, embeddings"),
    Arm("exp1", "study_exp1", text="Exp1, relaxed"),
    Arm("exp3", "study_exp3", text="Exp3, strict"),
    Arm("best", "study_exp3", ("--lora_warmup_epochs", "1"), seeds=5,
        text="PreLoRA, best setting: Exp3, w = 1"),
    Arm("warmup1", "study_warmup1", text="w = 1"),
    Arm("warmup4", "study_warmup4", text="w = 4"),
    Arm("rank32", "study", RANK_32, text="rank 32 for all"),
    Arm("rest32", "study", RANK_32 + REST, text="rank 32 for all, adapters and the rest"),
    Arm("fixed", "study", ("--switch_epoch", "6"), text="switch fixed at a quarter"),
    Arm("uniform", "study", ("--rank_rule", "uniform"), text="one rank for all, as many parameters"),
    Arm("budget", "study", ("--rank_rule", "budget"),
        text="ranks in proportion to change, as many parameters"),
    Arm("reset", "study", ("--optimizer_at_switch", "reset"), text="fresh AdamW at both switches"),
]
STATIC = Arm("static_lora", "study_static_lora", fork=False, text="static LoRA from epoch 0")
EQUAL_TIME = Arm("equal_time", "study_baseline", seeds=5, fork=False,
                 text="all parameters, in PreLoRA's time")
# fmt: on
ARMS = [BASELINE, EQUAL_TIME, *FORKS, STATIC]
# In figures 4 to 7.
DRAWN = "baseline equal_time prelora exp1 exp3 warmup1 warmup4 static_lora".split()
ANY = ("num_workers", "fork")  # fields in which a run may differ from what is asked for


# ------------------------------------------------------------------------------------------------------------
# training


def build_command(arm: Arm, seed: int, *more: str) -> tuple[Path, int, list[str]]:
    """(run directory, epochs, train.py's arguments) of one run. Raises UserError if another run stands in its
    place."""
    run_dir = get_run_dir(arm, seed)
    flags = ["--seed", str(seed), "--run_dir", str(run_dir), *arm.flags, *more]
    if arm.fork:
        flags += ["--fork", str(get_run_dir(BASELINE, seed))]
    preset = f"config/{arm.preset}.py"
    cfg = parse_flags(flags, load_preset(train.Config, preset))
    check_config(cfg)
    path = run_dir / "config.json"
    if path.exists():
        stored = vars(typed_config(train.Config, read_json(path), str(path)))
        changed = [name for name, value in vars(cfg).items() if value != stored[name] and name not in ANY]
        if changed:
            names = ", ".join(changed)
            raise UserError(f"{run_dir} was trained with another {names}: remove it, it will be trained anew")
    return run_dir, cfg.epochs, [preset, *flags, "--resume", "True"]


def get_run_dir(arm: Arm, seed: int) -> Path:
    return RUNS / f"{arm.name}-{seed}"


def train_run(run_dir: Path, epochs: int, argv: list[str]) -> None:
    """Train one run, or go on with it, unless it is done. Raises UserError with the last line of its log if
    it fails."""
    if is_done(run_dir, epochs):
        return
    log = RUNS / "logs" / f"{run_dir.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{run_dir} …\n", end="", flush=True)  # in one piece: two threads print
    with open(log, "a") as file:
        process = subprocess.Popen(
            [sys.executable, "train.py", *argv],
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


def is_done(run_dir: Path, epochs: int) -> bool:
    try:
        return load_run(run_dir).epochs[-1]["epoch"] == epochs
    except UserError:  # not begun, or no epoch is finished
        return False


running: set[subprocess.Popen] = set()


def train_all() -> None:
    """Train every run that is missing, stage by stage: a fork needs its baseline, the control in equal time
    needs to know that time. Raises UserError for a run that fails; the others save and end."""

    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        train_stage(pool, [BASELINE, STATIC])
        train_stage(pool, FORKS)
        train_stage(pool, [EQUAL_TIME], "--epochs", str(get_equal_epochs()))


def train_stage(pool: ThreadPoolExecutor, arms: list[Arm], *flags: str) -> None:
    """Train the runs of these arms, one on each of the pool's threads at a time."""
    commands = [build_command(arm, seed, *flags) for arm in arms for seed in range(arm.seeds)]
    waiting = [pool.submit(train_run, *command) for command in commands]
    try:
        for job in waiting:
            job.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):  # they save, and go on next time
            process.terminate()
        raise


# ------------------------------------------------------------------------------------------------------------
# what an epoch takes


def load_arm(arm: Arm) -> list[Run]:
    return [load_run(get_run_dir(arm, seed)) for seed in range(arm.seeds)]


def get_config(arm: Arm, run: Run) -> train.Config:
    return typed_config(train.Config, run.config, arm.name)


def time_epochs(rounds: int = 31) -> dict[str, dict[str, float]]:
    """{arm: {phase: seconds of an epoch's steps}}, for the arm's phases with the ranks of its first run:
    medians of steps that take turns, so that what else the machine does costs all of them the same. (The
    runs' own epoch_seconds, two at a time over an hour, differ by more than the arms.)"""
    torch.set_num_threads(1)
    steps = {}
    for arm in ARMS:
        if arm is not EQUAL_TIME:  # the baseline's steps
            steps |= {(arm.name, phase): step for phase, step in build_steps(arm).items()}
    times = {key: [] for key in steps}
    for _ in range(rounds + 1):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            times[key].append(time.perf_counter() - start)
    cfg = get_config(BASELINE, load_run(get_run_dir(BASELINE, 0)))
    steps_per_epoch = cfg.train_samples // cfg.batch_size
    seconds: dict[str, dict[str, float]] = {arm.name: {} for arm in ARMS}
    for (name, phase), values in times.items():
        seconds[name][phase] = float(np.median(values[1:])) * steps_per_epoch  # the first allocates
    return seconds


def build_steps(arm: Arm) -> dict[str, Callable]:
    """phase -> a function that takes a step of it, for the phases of the arm's first run; the full one is the
    baseline's for all."""
    run = load_run(get_run_dir(arm, 0))
    cfg = get_config(arm, run)
    switch = find_first_switch(run.switches)
    ranks = switch["ranks"] if switch else None
    if cfg.mode == "lora":
        ranks = get_static_ranks(cfg, train.build_net(cfg))
    phases = dict.fromkeys(map(get_stage, run.epochs))
    return {phase: build_step(cfg, phase, ranks) for phase in phases if phase != "full" or arm is BASELINE}


def build_step(cfg: train.Config, phase: str, ranks: Ranks | None) -> Callable[[], None]:
    """A function that takes train.py's own step in that phase, on noise."""
    device = torch.device("cpu")
    batches = repeat_noise(cfg.dataset, cfg.batch_size // cfg.grad_accum_steps, device, cfg.image_size)
    return build_contender(phase, cfg, ranks, device, batches).step


def get_epoch_seconds() -> dict[str, dict[str, float]]:
    """`time_epochs`, measured once and kept in runs/study/seconds.json; the full phase is the baseline's for
    all."""
    path = RUNS / "seconds.json"
    if not path.exists():
        print("timing the phases of all arms side by side …", flush=True)
        write_json(path, time_epochs())
    seconds = read_json(path)
    return {arm.name: seconds.get(arm.name, {}) | {"full": seconds[BASELINE.name]["full"]} for arm in ARMS}


def get_seconds(runs: list[Run], per_epoch: dict[str, float]) -> list[float]:
    """Each run's training time: its epochs of each phase × the seconds of one, and its switches. Not counted,
    and the same for all: reading data, evaluation, saving, starting."""
    seconds = []
    for run in runs:
        switching = sum(switch["seconds"] for switch in run.switches)
        seconds.append(sum(per_epoch[get_stage(record)] for record in run.epochs) + switching)
    return seconds


def get_equal_epochs() -> int:
    """Epochs with all parameters that take as long as PreLoRA's whole run, to the nearest."""
    arm = next(arm for arm in FORKS if arm.name == MAIN)
    per_epoch = get_epoch_seconds()[MAIN]
    return round(np.mean(get_seconds(load_arm(arm), per_epoch)) / per_epoch["full"])


# ------------------------------------------------------------------------------------------------------------
# what came out


def get_interval(values: np.ndarray) -> str:
    """Mean and its 95 % interval, by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{values.mean():+.2f} [{values.mean() - half:+.2f}, {values.mean() + half:+.2f}]"


def get_top1(runs: list[Run]) -> np.ndarray:
    """The last epoch's validation top-1 in % of each run."""
    return np.array([run.epochs[-1]["val_top1"] for run in runs])


def get_table() -> str:
    """The arms beside each other, a row each, in Markdown."""
    titles = ["arm", "seeds", "switch after", "trained in the LoRA phase", "top-1 %", "− baseline [95 %]"]
    titles += ["− equal time [95 %]", "time", "warmup epoch", "LoRA epoch"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    epoch_seconds = get_epoch_seconds()
    lines += [f"| {' | '.join(get_row(arm, epoch_seconds))} |" for arm in ARMS]
    return "\n".join(lines)


def get_row(arm: Arm, epoch_seconds: dict[str, dict[str, float]]) -> list[str]:
    """An arm's cells of the table. Against the control in equal time stands only what takes its time, to half
    an epoch."""
    runs, own = load_arm(arm), epoch_seconds[arm.name]
    baseline, equal = load_arm(BASELINE), load_arm(EQUAL_TIME)
    top1, seconds = get_top1(runs), np.mean(get_seconds(runs, own))
    baseline_seconds = get_seconds(baseline, epoch_seconds[BASELINE.name])[0]
    equal_seconds = get_seconds(equal, epoch_seconds[EQUAL_TIME.name])[0]
    is_near = abs(seconds - equal_seconds) < epoch_seconds[BASELINE.name]["full"] / 2
    against_baseline = against_equal = ""
    if arm is not BASELINE:
        against_baseline = get_interval(top1 - get_top1(baseline)[: len(top1)])
    if is_near and arm is not EQUAL_TIME:
        against_equal = get_interval(top1 - get_top1(equal)[: len(top1)])
    switches = [find_first_switch(run.switches) for run in runs]
    switched = sorted({switch["epoch"] for switch in switches if switch})
    return [
        arm.text,
        str(len(runs)),
        ", ".join(map(str, switched)),
        get_share(arm, runs),
        f"{top1.mean():.2f} ± {top1.std(ddof=1):.2f}",
        against_baseline,
        against_equal,
        f"{seconds:.0f} s, {100 * seconds / baseline_seconds:.1f} %",
        f"{own['warmup'] / own['full']:.2f}" if "warmup" in own else "",
        f"{own['lora'] / own['full']:.2f}" if "lora" in own else "",
    ]


def get_share(arm: Arm, runs: list[Run]) -> str:
    """What is trained in the LoRA phase, in % of the model without adapters; "" without such a phase."""
    trained = [e["trainable_params"] for run in runs for e in run.epochs if e["phase"] == "lora"]
    if not trained:
        return ""
    cfg = get_config(arm, runs[0])
    base, _ = count_base(cfg, train.build_net(cfg))
    return f"{100 * np.mean(trained) / base:.1f} %"


def check_replay() -> str:
    """Whether replay.py, given the baseline's log and an arm's settings, names the epoch and the ranks of
    what the arm's run did."""
    agree, total = 0, 0
    for arm in FORKS:
        for seed, run in enumerate(load_arm(arm)):
            if get_config(arm, run).mode != "prelora":  # it never switches
                continue
            baseline = load_run(get_run_dir(BASELINE, seed))
            told = replay.replay_run(get_config(arm, run), baseline.epochs)
            switch = find_first_switch(run.switches)
            did = (switch["epoch"], switch["ranks"]) if switch else (None, None)
            agree, total = agree + (told == did), total + 1
    return (
        f"Replayed from the baselines' logs, {agree} of {total} forked runs switch at the epoch and with the "
        "ranks that they did."
    )


def get_ttest() -> str:
    """HPT's criterion window by window, in Markdown."""
    lines = ["| epochs | loss, all parameters | loss, PreLoRA | t | p |", "|---|---|---|---|---|"]
    for row in replay.compare_losses(str(RUNS / "baseline-0"), str(RUNS / f"{MAIN}-0"), None):
        losses = f"{row['full']:.4f} | {row['lora']:.4f}"
        lines.append(f"| {row['first']}-{row['last']} | {losses} | {row['t']:.2f} | {row['p']:.3f} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# the report


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


def write_report() -> None:
    """Write the tables between the marks of DOC, and the figures beside it."""
    before, after = read_doc()
    full = get_epoch_seconds()[BASELINE.name]["full"]
    tables = [
        get_table(),
        f"Warmup and LoRA epochs are in units of one with all parameters, {full:.2f} s. {check_replay()}",
        "HPT's criterion, seed 0 (Welch's t-test on the step losses of each window, baseline against "
        f"PreLoRA's best setting):\n\n{get_ttest()}",
    ]
    DOC.write_text(before + MARKS[0] + "\n" + "\n\n".join(tables) + "\n" + MARKS[1] + after)
    print(f"wrote {DOC}")
    out = DOC.with_suffix("")
    out.mkdir(exist_ok=True)
    drawn = [arm for arm in ARMS if arm.name in DRAWN]
    runs = [str(copy_with_seconds(arm, seed)) for arm in drawn for seed in range(arm.seeds)]
    plot_runs(runs, family=None, out=str(out))
    for arm, name in ((FORKS[0].name, "figure1"), (BASELINE.name, "figure3"), (FORKS[0].name, "ranks")):
        shutil.copy(RUNS / "timed" / f"{arm}-0" / "figures" / f"{name}.png", out)


def copy_with_seconds(arm: Arm, seed: int) -> Path:
    """A copy of a run's log for the figures, its epochs' seconds and images/s those measured side by side, as
    in the table."""
    source, seconds = get_run_dir(arm, seed), get_epoch_seconds()[arm.name]
    copy = RUNS / "timed" / source.name
    copy.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "config.json", copy)
    with open(source / "metrics.jsonl") as log, open(copy / "metrics.jsonl", "w") as out:
        for record in map(json.loads, log):
            if record["event"] == "epoch":
                images = record["epoch_seconds"] * record["images_per_second"]
                record["epoch_seconds"] = seconds[get_stage(record)]
                record["images_per_second"] = images / seconds[get_stage(record)]
            out.write(json.dumps(record) + "\n")
    return copy


def main(argv: list[str]) -> int:
    """Exit status: 0; 1 for a run that failed or is missing; 2 for a wrong flag."""
    if argv not in ([], ["--report"]):
        print("error: python study.py [--report]", file=sys.stderr)
        return 2
    os.chdir(ROOT)
    try:
        read_doc()  # before hours of training
        if not argv:
            train_all()
        write_report()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
