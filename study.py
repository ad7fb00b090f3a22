"""The study: the paper's experiments and their controls on Fashion-MNIST, in under two hours on 2 CPU cores.

    python study.py              trains what is still missing under runs/study, then writes the report
    python study.py --report     writes the report only: figures to docs/study/, tables between the marks in docs/study.md

One process a core, one thread each. Every arm is train.py with a preset and flags. Arms that differ only after the switch are forked from the
baseline of the same seed, whose epochs up to there count as theirs. Stopped, it goes on where it stood.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

import replay
import train
from monitor import plot

ROOT, RUNS, DOC = Path(__file__).parent, Path("runs/study"), Path("docs/study.md")
MARKS = ("<!-- written by study.py -->", "<!-- end -->")


@dataclass
class Arm:
    name: str  # its runs are runs/study/<name>-<seed>
    preset: str
    flags: tuple[str, ...] = ()
    seeds: int = 3
    fork: bool = True  # from the baseline of its seed
    text: str = ""  # in the table


MAIN = "prelora"  # the arm whose time the equal-time control gets
BASELINE = Arm("baseline", "study_baseline", seeds=5, fork=False, text="baseline, all parameters")
FORKS = [
    Arm("prelora", "study", seeds=5, text="PreLoRA: Exp2, w = 2"),
    Arm("exp1", "study_exp1", text="Exp1, relaxed"),
    Arm("exp3", "study_exp3", text="Exp3, strict"),
    Arm("warmup1", "study_warmup1", text="w = 1"),
    Arm("warmup4", "study_warmup4", text="w = 4"),
    Arm("fixed", "study", ("--switch_epoch", "6"), text="switch fixed at a quarter"),
    Arm("uniform", "study", ("--rank_rule", "uniform"), text="one rank for all, as many parameters"),
    Arm("budget", "study", ("--rank_rule", "budget"), text="ranks in proportion to change, as many parameters"),
    Arm("rest", "study", ("--lora_trainable", "adapters+rest"), text="adapters and head, norms, embeddings"),
    Arm("reset", "study", ("--optimizer_at_switch", "reset"), text="fresh AdamW at both switches"),
]
STATIC = Arm("static_lora", "study_static_lora", fork=False, text="static LoRA from epoch 0")
EQUAL_TIME = Arm("equal_time", "study_baseline", seeds=5, fork=False, text="all parameters, in PreLoRA's time")
ARMS = [BASELINE, EQUAL_TIME, *FORKS, STATIC]


# ---------------------------------------------------------------------------------------------------------------------------------
# training

def build_command(arm: Arm, seed: int, *more: str) -> tuple[Path, int, list[str]]:
    """(run directory, epochs, train.py's arguments) of one run."""
    run_dir = RUNS / f"{arm.name}-{seed}"
    argv = [f"config/{arm.preset}.py", "--seed", str(seed), "--run_dir", str(run_dir), *arm.flags, *more]
    if arm.fork:
        argv += ["--fork", f"{RUNS}/baseline-{seed}"]
    argv += ["--resume", "True"]
    return run_dir, train.parse_config(argv)[0].epochs, argv


def train_run(run_dir: Path, epochs: int, argv: list[str]) -> None:
    """Train one run, or go on with it, unless it is done. Raises RuntimeError with the last line of its log if it fails."""
    if is_done(run_dir, epochs):
        return
    log = RUNS / "logs" / f"{run_dir.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{run_dir} …", flush=True)
    with open(log, "a") as file:
        status = subprocess.run([sys.executable, "train.py", *argv], stdout=file, stderr=subprocess.STDOUT,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if status:
        raise RuntimeError(f"{run_dir} ended with status {status}: {log.read_text(errors='replace').strip().splitlines()[-1]}")


def is_done(run_dir: Path, epochs: int) -> bool:
    try:
        return plot.load_run(run_dir)[1][-1]["epoch"] == epochs
    except ValueError:
        return False


def train_all() -> None:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        def stage(*arms_with_flags):
            commands = [build_command(arm, seed, *more) for arm, *more in arms_with_flags for seed in range(arm.seeds)]
            waiting = [pool.submit(train_run, *command) for command in commands]
            try:
                for job in waiting:
                    job.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

        stage([BASELINE], [STATIC])
        stage(*([arm] for arm in FORKS))
        stage([EQUAL_TIME, "--epochs", str(get_equal_epochs())])


# ---------------------------------------------------------------------------------------------------------------------------------
# what came out

def load_arm(arm: Arm) -> list[tuple[dict, list[dict], list[dict]]]:
    return [plot.load_run(RUNS / f"{arm.name}-{seed}") for seed in range(arm.seeds)]


def quiet_seconds(records: list[dict], phase: str) -> float:
    """Seconds of an epoch of `phase`: the lower quartile, which what else the machine did in three quarters of the time does not touch."""
    return float(np.percentile([e["epoch_seconds"] for e in records if e["phase"] == phase], 25))


def get_full_seconds() -> float:
    """Of one epoch with all parameters: the same work in every arm, so the same for all."""
    return quiet_seconds([e for _, epochs, _ in load_arm(BASELINE) for e in epochs], "full")


def get_seconds(runs: list[tuple[dict, list[dict], list[dict]]], full_seconds: float) -> list[float]:
    """Each run's training time: its epochs of each phase × the arm's seconds for one, and its switches. Not counted, and the same for all:
    evaluation, saving, starting."""
    every = [e for _, epochs, _ in runs for e in epochs]
    phases = {e["phase"] for e in every}
    seconds = {phase: full_seconds if phase == "full" else quiet_seconds(every, phase) for phase in phases}
    return [sum(seconds[e["phase"]] for e in epochs) + sum(s["seconds"] for s in switches) for _, epochs, switches in runs]


def get_equal_epochs() -> int:
    """Epochs with all parameters that take as long as PreLoRA's whole run, to the nearest."""
    arm = next(arm for arm in FORKS if arm.name == MAIN)
    return round(np.mean(get_seconds(load_arm(arm), get_full_seconds())) / get_full_seconds())


def interval(values: np.ndarray) -> str:
    """Mean and its 95 % interval, by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{values.mean():+.2f} [{values.mean() - half:+.2f}, {values.mean() + half:+.2f}]"


def get_table() -> str:
    full_seconds = get_full_seconds()
    top1 = lambda runs: np.array([epochs[-1]["val_top1"] for _, epochs, _ in runs])
    baseline, equal = top1(load_arm(BASELINE)), top1(load_arm(EQUAL_TIME))
    baseline_seconds = get_seconds(load_arm(BASELINE), full_seconds)[0]
    lines = ["| arm | seeds | switch after | trained in the LoRA phase | top-1 % | − baseline [95 %] | − equal time [95 %] | time | s/epoch in the LoRA phase |",
             "|---|---|---|---|---|---|---|---|---|"]
    for arm in ARMS:
        runs = load_arm(arm)
        values, seconds = top1(runs), np.mean(get_seconds(runs, full_seconds))
        switched = sorted({s["epoch"] for _, _, switches in runs for s in switches if s["from"] == "full"})
        lora = [e for _, epochs, _ in runs for e in epochs if e["phase"] == "lora"]
        base = train.count_base(train.typed_config(dict(runs[0][0]), arm.name))[0]
        share = f"{100 * np.mean([e['trainable_params'] for e in lora]) / base:.1f} %" if lora else ""
        per_epoch = f"{quiet_seconds(lora, 'lora'):.2f}" if lora else ""
        lines.append(f"| {arm.text} | {len(runs)} | {', '.join(map(str, switched))} | {share} | {values.mean():.2f} ± {values.std(ddof=1):.2f} | "
                     f"{'' if arm is BASELINE else interval(values - baseline[:len(values)])} | "
                     f"{'' if arm is EQUAL_TIME else interval(values - equal[:len(values)])} | "
                     f"{seconds:.0f} s, {100 * seconds / baseline_seconds:.1f} % | {per_epoch} |")
    return "\n".join(lines)


def check_replay() -> str:
    """Whether replay.py, given the baseline's log and an arm's settings, names the epoch and the ranks of what the arm's run did."""
    agree, total = 0, 0
    for arm in FORKS:
        for seed, (config, _, switches) in enumerate(load_arm(arm)):
            epochs = plot.load_run(RUNS / f"baseline-{seed}")[1]
            told = replay.replay_run(train.typed_config(dict(config), arm.name), epochs)
            did = next(((s["epoch"], s["ranks"]) for s in switches if s["from"] == "full"), (None, None))
            agree, total = agree + (told == did), total + 1
    return f"Replayed from the baselines' logs, {agree} of {total} forked runs switch at the epoch and with the ranks that they did."


def get_ttest() -> str:
    lines = ["| epochs | loss, all parameters | loss, PreLoRA | t | p |", "|---|---|---|---|---|"]
    for row in replay.compare_losses(str(RUNS / "baseline-0"), str(RUNS / f"{MAIN}-0"), None):
        lines.append(f"| {row['first']}-{row['last']} | {row['full']:.4f} | {row['lora']:.4f} | {row['t']:.2f} | {row['p']:.3f} |")
    return "\n".join(lines)


def write_report() -> None:
    full_seconds = get_full_seconds()
    text = DOC.read_text()
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    tables = [get_table(), f"An epoch with all parameters takes {full_seconds:.2f} s. {check_replay()}",
              f"HPT's criterion, seed 0 (Welch's t-test on the step losses of each window, baseline against PreLoRA):\n\n{get_ttest()}"]
    DOC.write_text(before + MARKS[0] + "\n" + "\n\n".join(tables) + "\n" + MARKS[1] + after)
    print(f"wrote {DOC}")
    out = DOC.with_suffix("")
    out.mkdir(exist_ok=True)
    plot.main([str(RUNS / f"{arm.name}-{seed}") for arm in ARMS for seed in range(arm.seeds)] + ["--out", str(out)])


def main(argv: list[str]) -> int:
    """Exit status: 0; 1 for a run that failed or is missing; 2 for a wrong flag."""
    if argv not in ([], ["--report"]):
        print("error: python study.py [--report]", file=sys.stderr)
        return 2
    os.chdir(ROOT)
    try:
        if not argv:
            train_all()
        write_report()
    except (ValueError, OSError, RuntimeError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
