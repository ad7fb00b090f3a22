"""The study: the paper's experiments and their controls on Fashion-MNIST, in under two hours on 2 CPU cores.

    python study.py              trains what is still missing under runs/study, then writes the report
    python study.py --report     writes the report only: figures to docs/study/, tables between the marks in docs/study.md

One process a core, one thread each. Every arm is train.py with a preset and flags. Arms that differ only after the switch are forked from the
baseline of the same seed, whose epochs up to there count as theirs. Stopped, it goes on where it stood.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

import replay
import train
from lora.inject import init_adapters
from files import read_json, write_json
from model import checkpoint
from model.optim import build_optimizer
from model.variants import VARIANTS
from monitor import plot
from monitor.log import load_run

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
BASELINE = Arm("baseline", "study_baseline", seeds=5, fork=False, text="baseline, all parameters")
FORKS = [
    Arm("prelora", "study", seeds=5, text="PreLoRA: Exp2, w = 2, adapters alone"),
    Arm(
        "rest",
        "study",
        ("--lora_trainable", "adapters+rest"),
        seeds=5,
        text="PreLoRA, adapters and head, norms, embeddings",
    ),
    Arm("exp1", "study_exp1", text="Exp1, relaxed"),
    Arm("exp3", "study_exp3", text="Exp3, strict"),
    Arm(
        "best",
        "study_exp3",
        ("--lora_warmup_epochs", "1"),
        seeds=5,
        text="PreLoRA, best setting: Exp3, w = 1",
    ),
    Arm("warmup1", "study_warmup1", text="w = 1"),
    Arm("warmup4", "study_warmup4", text="w = 4"),
    Arm("rank32", "study", ("--rank_min", "32"), text="rank 32 for all"),
    Arm(
        "rest32",
        "study",
        ("--rank_min", "32", "--lora_trainable", "adapters+rest"),
        text="rank 32 for all, adapters and the rest",
    ),
    Arm("fixed", "study", ("--switch_epoch", "6"), text="switch fixed at a quarter"),
    Arm("uniform", "study", ("--rank_rule", "uniform"), text="one rank for all, as many parameters"),
    Arm(
        "budget", "study", ("--rank_rule", "budget"), text="ranks in proportion to change, as many parameters"
    ),
    Arm("reset", "study", ("--optimizer_at_switch", "reset"), text="fresh AdamW at both switches"),
]
STATIC = Arm("static_lora", "study_static_lora", fork=False, text="static LoRA from epoch 0")
EQUAL_TIME = Arm(
    "equal_time", "study_baseline", seeds=5, fork=False, text="all parameters, in PreLoRA's time"
)
ARMS = [BASELINE, EQUAL_TIME, *FORKS, STATIC]
DRAWN = (
    "baseline",
    "equal_time",
    "prelora",
    "exp1",
    "exp3",
    "warmup1",
    "warmup4",
    "static_lora",
)  # in figures 4 to 7


# ---------------------------------------------------------------------------------------------------------------------------------
# training


def build_command(arm: Arm, seed: int, *more: str) -> tuple[Path, int, list[str]]:
    """(run directory, epochs, train.py's arguments) of one run. Raises ValueError if another run stands in its place."""
    run_dir = RUNS / f"{arm.name}-{seed}"
    flags = ["--seed", str(seed), "--run_dir", str(run_dir), *arm.flags, *more]
    if arm.fork:
        flags += ["--fork", f"{RUNS}/{BASELINE.name}-{seed}"]
    cfg = train.parse_flags(flags, train.load_preset(f"config/{arm.preset}.py"))
    train.check_config(cfg)
    if (run_dir / "config.json").exists():
        stored = train.typed_config(read_json(run_dir / "config.json"), str(run_dir / "config.json"))
        changed = [
            name
            for name, value in vars(cfg).items()
            if value != getattr(stored, name) and name not in ("num_workers", "fork")
        ]
        if changed:
            raise ValueError(
                f"{run_dir} was trained with another {', '.join(changed)}: remove it, it will be trained anew"
            )
    return run_dir, cfg.epochs, [f"config/{arm.preset}.py", *flags, "--resume", "True"]


def train_run(run_dir: Path, epochs: int, argv: list[str]) -> None:
    """Train one run, or go on with it, unless it is done. Raises RuntimeError with the last line of its log if it fails."""
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
        raise RuntimeError(f"{run_dir} ended with status {status}: {said[-1]}")


def is_done(run_dir: Path, epochs: int) -> bool:
    try:
        return load_run(run_dir)[1][-1]["epoch"] == epochs
    except ValueError:
        return False


running: set[subprocess.Popen] = set()


def train_all() -> None:
    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:

        def stage(*arms_with_flags):
            commands = [
                build_command(arm, seed, *more) for arm, *more in arms_with_flags for seed in range(arm.seeds)
            ]
            waiting = [pool.submit(train_run, *command) for command in commands]
            try:
                for job in waiting:
                    job.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(running):  # they save, and go on next time
                    process.terminate()
                raise

        stage([BASELINE], [STATIC])
        stage(*([arm] for arm in FORKS))
        stage([EQUAL_TIME, "--epochs", str(get_equal_epochs())])


# ---------------------------------------------------------------------------------------------------------------------------------
# what came out


def load_arm(arm: Arm) -> list[tuple[dict, list[dict], list[dict]]]:
    return [load_run(RUNS / f"{arm.name}-{seed}") for seed in range(arm.seeds)]


def time_epochs(rounds: int = 31) -> dict[str, dict[str, float]]:
    """{arm: {phase: seconds of an epoch's steps}}, for the arm's phases with the ranks of its first run: medians of steps that take turns, so that
    what else the machine does costs all of them the same. (The runs' own epoch_seconds, two at a time over an hour, differ by more than the arms.)"""
    steps = {}
    torch.set_num_threads(1)
    for arm in ARMS:
        if arm is EQUAL_TIME:
            continue
        config, epochs, switches = load_run(RUNS / f"{arm.name}-0")
        cfg = train.typed_config(dict(config), arm.name)
        for phase in dict.fromkeys(e["phase"] for e in epochs):
            if phase != "full" or arm is BASELINE:
                ranks = switches[0]["ranks"] if switches else None
                if cfg.mode == "lora":
                    ranks = {
                        family: [cfg.rank_max] * VARIANTS[cfg.model]["depth"] for family in cfg.target_modules
                    }
                steps[arm.name, phase] = build_step(cfg, phase, ranks)
    times = {key: [] for key in steps}
    for _ in range(rounds + 1):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            times[key].append(time.perf_counter() - start)
    per_epoch = cfg.train_samples // cfg.batch_size
    seconds: dict[str, dict[str, float]] = {arm.name: {} for arm in ARMS}
    for (name, phase), values in times.items():
        seconds[name][phase] = float(np.median(values[1:])) * per_epoch  # the first allocates
    return seconds


def build_step(cfg: train.Config, phase: str, ranks: dict[str, list[int]] | None):
    """A function that takes train.py's step in that phase, on noise."""
    model = train.build_model(cfg, phase, ranks, "cpu").train()
    model.init_weights(0)
    init_adapters(model, 0)
    optimizer = build_optimizer(model, cfg.weight_decay)
    size = train.DATASETS[cfg.dataset].image_size
    images, labels = torch.randn(cfg.batch_size, 3, size, size), torch.arange(cfg.batch_size) % 10
    params = [p for p in model.parameters() if p.requires_grad]

    def step():
        F.cross_entropy(model(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def get_epoch_seconds() -> dict[str, dict[str, float]]:
    """`time_epochs`, measured once and kept in runs/study/seconds.json; the full phase is the baseline's for all."""
    path = RUNS / "seconds.json"
    if not path.exists():
        print("timing the phases of all arms side by side …", flush=True)
        write_json(path, time_epochs())
    seconds = read_json(path)
    return {arm.name: seconds.get(arm.name, {}) | {"full": seconds[BASELINE.name]["full"]} for arm in ARMS}


def get_seconds(runs: list[tuple[dict, list[dict], list[dict]]], per_epoch: dict[str, float]) -> list[float]:
    """Each run's training time: its epochs of each phase × the seconds of one, and its switches. Not counted, and the same for all: reading data,
    evaluation, saving, starting."""
    return [
        sum(per_epoch[e["phase"]] for e in epochs) + sum(s["seconds"] for s in switches)
        for _, epochs, switches in runs
    ]


def get_equal_epochs() -> int:
    """Epochs with all parameters that take as long as PreLoRA's whole run, to the nearest."""
    arm, per_epoch = next(arm for arm in FORKS if arm.name == MAIN), get_epoch_seconds()[MAIN]
    return round(np.mean(get_seconds(load_arm(arm), per_epoch)) / per_epoch["full"])


def interval(values: np.ndarray) -> str:
    """Mean and its 95 % interval, by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{values.mean():+.2f} [{values.mean() - half:+.2f}, {values.mean() + half:+.2f}]"


def get_table() -> str:
    epoch_seconds = get_epoch_seconds()
    top1 = lambda runs: np.array([epochs[-1]["val_top1"] for _, epochs, _ in runs])
    baseline, equal = top1(load_arm(BASELINE)), top1(load_arm(EQUAL_TIME))
    baseline_seconds = get_seconds(load_arm(BASELINE), epoch_seconds["baseline"])[0]
    equal_seconds = get_seconds(load_arm(EQUAL_TIME), epoch_seconds["equal_time"])[0]
    lines = [
        "| arm | seeds | switch after | trained in the LoRA phase | top-1 % | − baseline [95 %] | − equal time [95 %] | time | warmup epoch "
        "| LoRA epoch |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:  # against the control only what takes its time, to half an epoch
        runs = load_arm(arm)
        values, seconds = top1(runs), np.mean(get_seconds(runs, epoch_seconds[arm.name]))
        near = abs(seconds - equal_seconds) < epoch_seconds["baseline"]["full"] / 2
        switched = sorted({s["epoch"] for _, _, switches in runs for s in switches if s["from"] == "full"})
        lora = [e for _, epochs, _ in runs for e in epochs if e["phase"] == "lora"]
        base = train.count_base(train.typed_config(dict(runs[0][0]), arm.name))[0]
        share = f"{100 * np.mean([e['trainable_params'] for e in lora]) / base:.1f} %" if lora else ""
        cost = [
            f"{epoch_seconds[arm.name][phase] / epoch_seconds[arm.name]['full']:.2f}"
            if phase in epoch_seconds[arm.name]
            else ""
            for phase in ("warmup", "lora")
        ]
        lines.append(
            f"| {arm.text} | {len(runs)} | {', '.join(map(str, switched))} | {share} | {values.mean():.2f} ± {values.std(ddof=1):.2f} | "
            f"{'' if arm is BASELINE else interval(values - baseline[: len(values)])} | "
            f"{interval(values - equal[: len(values)]) if near and arm is not EQUAL_TIME else ''} | "
            f"{seconds:.0f} s, {100 * seconds / baseline_seconds:.1f} % | {' | '.join(cost)} |"
        )
    return "\n".join(lines)


def check_replay() -> str:
    """Whether replay.py, given the baseline's log and an arm's settings, names the epoch and the ranks of what the arm's run did."""
    agree, total = 0, 0
    for arm in FORKS:
        for seed, (config, _, switches) in enumerate(load_arm(arm)):
            epochs = load_run(RUNS / f"baseline-{seed}")[1]
            told = replay.replay_run(train.typed_config(dict(config), arm.name), epochs)
            did = next(((s["epoch"], s["ranks"]) for s in switches if s["from"] == "full"), (None, None))
            agree, total = agree + (told == did), total + 1
    return f"Replayed from the baselines' logs, {agree} of {total} forked runs switch at the epoch and with the ranks that they did."


def get_ttest() -> str:
    lines = ["| epochs | loss, all parameters | loss, PreLoRA | t | p |", "|---|---|---|---|---|"]
    for row in replay.compare_losses(str(RUNS / "baseline-0"), str(RUNS / f"{MAIN}-0"), None):
        lines.append(
            f"| {row['first']}-{row['last']} | {row['full']:.4f} | {row['lora']:.4f} | {row['t']:.2f} | {row['p']:.3f} |"
        )
    return "\n".join(lines)


def write_report() -> None:
    text = DOC.read_text()
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    full = get_epoch_seconds()[BASELINE.name]["full"]
    tables = [
        get_table(),
        f"Warmup and LoRA epochs are in units of one with all parameters, {full:.2f} s. {check_replay()}",
        f"HPT's criterion, seed 0 (Welch's t-test on the step losses of each window, baseline against PreLoRA's best setting):\n\n{get_ttest()}",
    ]
    DOC.write_text(before + MARKS[0] + "\n" + "\n\n".join(tables) + "\n" + MARKS[1] + after)
    print(f"wrote {DOC}")
    out, runs = (
        DOC.with_suffix(""),
        [copy_with_seconds(arm, seed) for arm in ARMS if arm.name in DRAWN for seed in range(arm.seeds)],
    )
    out.mkdir(exist_ok=True)
    plot.main([*map(str, runs), "--out", str(out)])
    for arm, name in ((FORKS[0].name, "figure1"), (BASELINE.name, "figure3"), (FORKS[0].name, "ranks")):
        shutil.copy(RUNS / "timed" / f"{arm}-0" / "figures" / f"{name}.png", out)


def copy_with_seconds(arm: Arm, seed: int) -> Path:
    """A copy of a run's log for the figures, its epochs' seconds and images/s those measured side by side, as in the table."""
    source, copy, seconds = (
        RUNS / f"{arm.name}-{seed}",
        RUNS / "timed" / f"{arm.name}-{seed}",
        get_epoch_seconds()[arm.name],
    )
    copy.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "config.json", copy)
    with open(source / "metrics.jsonl") as log, open(copy / "metrics.jsonl", "w") as out:
        for record in map(json.loads, log):
            if record["event"] == "epoch":
                images = record["epoch_seconds"] * record["images_per_second"]
                record |= {
                    "epoch_seconds": seconds[record["phase"]],
                    "images_per_second": images / seconds[record["phase"]],
                }
            out.write(json.dumps(record) + "\n")
    return copy


def main(argv: list[str]) -> int:
    """Exit status: 0; 1 for a run that failed or is missing; 2 for a wrong flag."""
    if argv not in ([], ["--report"]):
        print("error: python study.py [--report]", file=sys.stderr)
        return 2
    os.chdir(ROOT)
    try:
        if DOC.read_text().count(MARKS[0]) != 1 or DOC.read_text().count(MARKS[1]) != 1:
            raise ValueError(f"{DOC} has lost the marks between which the tables go: {' '.join(MARKS)}")
        if not argv:
            train_all()
        write_report()
    except (ValueError, OSError, RuntimeError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
