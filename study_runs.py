"""The study's arms: what they are, their images, how they are trained, and what a finished run leaves.

Every arm is train.py with a preset and flags. Arms that differ only after the switch are forked from the
baseline of the same seed, whose epochs up to there count as theirs.
"""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import train
from config.checks import check_config
from config.cli import load_preset, parse_flags, typed_config
from data.order import get_indices
from errors import UserError
from files import read_json
from monitor.log import Run, load_run, read_events

RUNS = Path("runs/study")
KEPT = Path("docs/study/runs")  # what finished runs leave
SOURCE, DEV, HELD_OUT = (Path("datasets", f"fashion_mnist{name}") for name in ("", "_dev", "_held_out"))
DEV_IMAGES = 10_000  # the last ones of the training set


@dataclass
class Arm:
    name: str  # its runs are NAME-SEED
    preset: str
    flags: str = ""
    seeds: int = 3
    fork: bool = True  # from the baseline of its seed, where its own switch is due
    text: str = ""  # in the table


# fmt: off
AT_14 = "--switch_epoch 14 --lora_warmup_epochs 1"
COHERENT = "--lora_scaling coherent --lora_alpha"
MATCHED = "--lora_scaling matched --lora_alpha"
BEST_FLAGS = f"{AT_14} {COHERENT} 2 --lora_lr_factor 1"
MAIN = "best"
BASELINE = Arm("baseline", "study_baseline", seeds=5, fork=False, text="baseline, all parameters")
EQUAL = [
    Arm(f"equal{epochs}", "study_baseline", f"--epochs {epochs}", seeds=5, fork=False,
        text=f"all parameters, {epochs} epochs")
    for epochs in range(18, 24)
]
FORKS = [
    Arm(MAIN, "study", BEST_FLAGS, seeds=5, text="**PreLoRA, best setting**: coherent × 2, own decay, after 14, w 1"),
    Arm("authors", "study", "--lora_alpha None", seeds=5, text="the authors' scaling 1: Exp2, w 2"),
    Arm("prelora", "study", seeds=5, text="alpha 64: Exp2, w 2"),
]
STATIC = [
    Arm("static_lora", "study_static_lora", seeds=3, fork=False, text="static LoRA from epoch 0, alpha 64"),
]
# fmt: on
ARMS = [BASELINE, *EQUAL, *FORKS, *STATIC]
DRAWN = "baseline equal23 best authors prelora exp1 exp3 static_lora".split()  # in figures 4 to 7
# Fields in which a run may differ from what is asked for: they shape nothing.
ANY = "num_workers fork keep_every eval_every log_displacement run_dir".split()


# ------------------------------------------------------------------------------------------------------------
# images


def prepare_data() -> None:
    """Write the two sets of images that the study needs besides Fashion-MNIST's own, unless they are there.

    DEV: its training images but the last 10,000, which are its validation set. HELD_OUT: its validation set
    are all other images: of the training set those on which no run trains, and the test set."""
    for folder in (DEV, HELD_OUT):
        if not all((folder / f"{split}.beton").exists() for split in get_splits(folder)):
            write_images(folder)


def get_splits(folder: Path) -> tuple[str, ...]:
    return ("train", "val") if folder == DEV else ("val",)


def write_images(folder: Path) -> None:
    """Raw files as Fashion-MNIST has them, and of these the .beton files."""
    raw = folder / "FashionMNIST/raw"
    raw.mkdir(parents=True, exist_ok=True)
    for kind, header, size in (("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1)):
        train_rows, test_rows = (
            np.fromfile(SOURCE / f"FashionMNIST/raw/{split}-{kind}-ubyte", np.uint8)[header:].reshape(
                -1, size
            )
            for split in ("train", "t10k")
        )
        pool, dev = train_rows[:-DEV_IMAGES], train_rows[-DEV_IMAGES:]
        trained = get_indices(len(pool), True, 1, load_preset(train.Config, "config/study.py").train_samples)
        held_out = np.concatenate([np.delete(pool, trained, axis=0), test_rows])
        with open(SOURCE / f"FashionMNIST/raw/train-{kind}-ubyte", "rb") as file:
            head = file.read(header)
        for split, rows in (("train", pool), ("t10k", dev if folder == DEV else held_out)):
            count = struct.pack(">I", len(rows))  # the header's second number, big-endian
            (raw / f"{split}-{kind}-ubyte").write_bytes(head[:4] + count + head[8:] + rows.tobytes())
    for split in get_splits(folder):
        target = [f"fashion_mnist:{split}", str(folder / f"{split}.beton"), "--root", str(folder)]
        subprocess.run([sys.executable, "-m", "data.beton", *target], check=True)


# ------------------------------------------------------------------------------------------------------------
# training


def get_run_dir(arm: Arm, seed: int) -> Path:
    return RUNS / f"{arm.name}-{seed}"


def get_kept(arm: Arm, seed: int) -> Path:
    return KEPT / f"{arm.name}-{seed}"


def build_command(arm: Arm, seed: int) -> tuple[train.Config, list[str]]:
    """(settings, train.py's arguments) of one run. Raises UserError if another run stands in its place."""
    run_dir = get_run_dir(arm, seed)
    flags = ["--seed", str(seed), "--run_dir", str(run_dir), *arm.flags.split()]
    if arm.fork:
        flags += ["--fork", str(get_run_dir(BASELINE, seed))]
    preset = f"config/{arm.preset}.py"
    cfg = parse_flags(flags, load_preset(train.Config, preset))
    check_config(cfg)
    for folder in (run_dir, get_kept(arm, seed)):
        path = folder / "config.json"
        if path.exists():
            check_same(cfg, typed_config(train.Config, read_json(path), str(path)), folder)
    return cfg, [preset, *flags, "--resume", "True"]


def check_same(cfg: train.Config, stored: train.Config, folder: Path) -> None:
    """Raise UserError where the run in `folder` is not one of these settings."""
    changed = [
        name for name, value in vars(cfg).items() if value != getattr(stored, name) and name not in ANY
    ]
    if changed:
        names = ", ".join(changed)
        raise UserError(f"{folder} was trained with another {names}: remove it, it will be trained anew")


def is_kept(arm: Arm, seed: int) -> bool:
    return (get_kept(arm, seed) / "metrics.jsonl").exists()


def train_run(arm: Arm, seed: int) -> None:
    """Train one run, or go on with it, and keep its log. Raises UserError with the last line of its output if
    it fails."""
    cfg, argv = build_command(arm, seed)
    run_dir = get_run_dir(arm, seed)
    if not is_done(run_dir, cfg.epochs):
        print(f"{run_dir} …\n", end="", flush=True)  # in one piece: two threads print
        call(run_dir.name, "train.py", *argv)
    if not is_kept(arm, seed):
        held_out = ["--data_dir", str(HELD_OUT), "--num_workers", "1"]
        said = call(run_dir.name, "evaluate.py", str(run_dir), *held_out)
        keep_run(arm, seed, json.loads(said.splitlines()[-1]))


def call(name: str, *command: str) -> str:
    """What a command prints, on one thread. Its messages go to runs/study/logs/NAME.log."""
    log = RUNS / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        running.add(process)
        out = process.communicate()[0]
        running.discard(process)
    if process.returncode:
        said = (log.read_text(errors="replace") + out).strip().splitlines() or ["without a word"]
        raise UserError(f"{RUNS / name}: {command[0]} ended with status {process.returncode}: {said[-1]}")
    return out


def is_done(run_dir: Path, epochs: int) -> bool:
    try:
        return load_run(run_dir).epochs[-1]["epoch"] == epochs
    except UserError:  # not begun, or no epoch is finished
        return False


running: set[subprocess.Popen] = set()


def keep_run(arm: Arm, seed: int, held_out: dict) -> None:
    """Write what the report needs of a run's log into docs/study/runs. `held_out`: what evaluate.py says."""
    source, folder = get_run_dir(arm, seed), get_kept(arm, seed)
    wanted = "event epoch step phase frozen_blocks train_loss lr val_loss val_top1 trainable_params".split()
    wanted += "epoch_seconds images_per_second peak_memory_bytes displacement".split()
    if arm is BASELINE or arm.name in DRAWN:
        wanted += ["weight_norms", "adapter_norms"]
    lines = []
    for event in read_events(source / "metrics.jsonl"):
        if event["event"] == "epoch":
            lines.append({key: event[key] for key in wanted if key in event})
        elif event["event"] == "switch":
            lines.append(event)
    last = {key: held_out[key] for key in ("images", "val_top1", "val_loss")}
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "config.json", folder)
    text = "".join(json.dumps(round_floats(line)) + "\n" for line in [*lines, {"event": "held_out", **last}])
    partial = folder / "metrics.tmp"
    partial.write_text(text)
    partial.replace(folder / "metrics.jsonl")  # last, and whole: a run with it is kept


def round_floats(value):
    """The same with six digits of each float."""
    if isinstance(value, dict):
        return {key: round_floats(each) for key, each in value.items()}
    if isinstance(value, list):
        return [round_floats(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def train_all(needs_checkpoints: tuple[int, ...] = ()) -> None:
    """Train every run that is missing, main arms first. A fork needs its baseline's checkpoints, and so do
    other seeds that are named, for `compute_oracle`. Raises UserError for a run that fails; the others save and end."""

    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    missing = [(arm, seed) for arm in ARMS for seed in range(arm.seeds) if not is_kept(arm, seed)]
    seeds = {seed for arm, seed in missing if arm.fork or arm is BASELINE}
    if needs_checkpoints:
        seeds |= set(needs_checkpoints)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        train_stage(pool, [(BASELINE, seed) for seed in sorted(seeds)])
        train_stage(pool, sorted(missing, key=lambda run: run[0] not in (*FORKS[:3], *EQUAL[-3:])))


def train_stage(pool: ThreadPoolExecutor, runs: list[tuple[Arm, int]]) -> None:
    """Train these runs, one on each of the pool's threads at a time."""
    waiting = [pool.submit(train_run, *run) for run in runs]
    try:
        for job in waiting:
            job.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):  # they save, and go on next time
            process.terminate()
        raise


def load_arm(arm: Arm) -> list[Run]:
    return [load_run(get_kept(arm, seed)) for seed in range(arm.seeds)]


def get_config(arm: Arm, run: Run) -> train.Config:
    return typed_config(train.Config, run.config, arm.name)
