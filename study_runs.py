"""The study's arms: what they are, their images, how they are trained, and what a finished run leaves.

Every arm is train.py with a preset and flags. Arms that differ only after the switch are forked from the
baseline of the same seed, whose epochs up to there count as theirs.
"""

import functools
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
import torch
from torch import nn

import evaluate
import train
from config.checks import check_config
from config.cli import load_preset, parse_flags, typed_config
from data.order import get_indices
from errors import UserError
from files import read_json
from lora.inject import merge_lora
from model import checkpoint
from model.optim import get_lr
from monitor.log import Run, load_run, read_events

RUNS = Path("runs/study")
KEPT = Path("docs/study/runs")  # what finished runs leave
SOURCE, DEV = Path("datasets/fashion_mnist"), Path("datasets/fashion_mnist_dev")
DEV_IMAGES = 10_000  # the last ones of the training set


@dataclass
class Arm:
    name: str  # its runs are NAME-SEED
    flags: str = ""
    seeds: int = 3
    preset: str = "study"
    fork: bool = True  # from the baseline of its seed, where its own switch is due
    at: int | None = None  # or after this epoch
    text: str = ""  # in the table


def scaled(rule: str, alpha: float | None, factor: float | None = None) -> str:
    """Flags: the scaling of adapters, and k of the LoRA phase's own decay."""
    return f"--lora_scaling {rule} --lora_alpha {alpha} --lora_lr_factor {factor}"


AT_10, AT_12, AT_14 = (f"--switch_epoch {epoch} --lora_warmup_epochs 1" for epoch in (10, 12, 14))
BEST = scaled("coherent", 1.0, 2.0)
RANK_8 = "--rank_min 8 --rank_max 8"
COSINE = dict(peak=3e-4, warmup_steps=93, total_steps=24 * 93)  # config/study.py's
MAIN = "exp2_best"  # the arm of the figures
# fmt: off
BASELINE = Arm("baseline", seeds=5, preset="study_baseline", fork=False, text="baseline, all parameters")
EQUAL = [
    Arm(f"equal{epochs}", f"--epochs {epochs}", seeds, "study_baseline", fork=False,
        text=f"all parameters, {epochs} epochs")
    for epochs, seeds in ((23, 5), (22, 5), (21, 5))
]
# The learning rates of `best` without its adapters: twice the cosine's rate where it begins, linearly to 0.
OWN_DECAY = "--lr_schedule wsd --lr {} --lr_decay_share {} --epochs {}"
DECAYS = [
    Arm(f"decay{epochs}", OWN_DECAY.format(2 * get_lr((epochs - 9) * 93, **COSINE), 9 / epochs, epochs),
        seeds, "study_baseline", at=epochs - 9,
        text=f"all parameters, {epochs} epochs, the last 9 from 2 × lr to 0")
    for epochs, seeds in ((24, 5), (23, 5), (22, 5), (20, 3), (18, 3))
]
MAIN_FORKS = [
    Arm("best", f"{AT_14} {BEST}", 5, text="PreLoRA at 14: w 1, coherent, own decay from 2 × lr"),
    Arm("best12", f"{AT_12} {BEST}", 5, text="PreLoRA at 12, else the same"),
    Arm("best12_r8", f"{AT_12} {BEST} {RANK_8}", 5, text="PreLoRA at 12, rank 8 for all, else the same"),
    Arm("exp2_best", f"--lora_warmup_epochs 1 {BEST}", 5,
        text="**PreLoRA where Exp2's test says, else the same**"),
    Arm("authors", scaled("authors", None), 5, text="Exp2, w 2, the authors' scaling 1"),
    Arm("prelora", seeds=5, text="Exp2, w 2, alpha 64 (the study before)"),
]
OPTIONS = [
    Arm("best10", f"{AT_10} {BEST}", 5, text="PreLoRA at 10, else the same"),
    Arm("best_mean", f"{AT_14} {BEST} --freeze_mean True",
        text="PreLoRA at 14, frozen at the mean of two epochs"),
    Arm("best_frozen", f"{AT_14} {BEST} --freeze_blocks 1",
        text="PreLoRA at 14, the lowest of three blocks frozen"),
    Arm("frozen_full", "--switch_epoch 14 --freeze_blocks 1", preset="study_baseline",
        text="all parameters, the lowest block frozen at 14"),
]
SWEEP = [
    Arm("alpha1024", f"{AT_14} {scaled('alpha', 1024.0)}",
        text="PreLoRA at 14, the cosine goes on: alpha 1024"),
    Arm("alpha2048", f"{AT_14} {scaled('alpha', 2048.0)}",
        text="PreLoRA at 14, the cosine goes on: alpha 2048"),
    Arm("coherent_k1", f"{AT_14} {scaled('coherent', 1.0, 1.0)}",
        text="PreLoRA at 14, coherent, own decay from lr"),
    Arm("coherent_k3", f"{AT_14} {scaled('coherent', 1.0, 3.0)}",
        text="PreLoRA at 14, coherent, own decay from 3 × lr"),
    Arm("coherent2_k1", f"{AT_14} {scaled('coherent', 2.0, 1.0)}",
        text="PreLoRA at 14, coherent × 2, own decay from lr"),
    Arm("coherent2_k2", f"{AT_14} {scaled('coherent', 2.0, 2.0)}",
        text="PreLoRA at 14, coherent × 2, own decay from 2 × lr"),
]
STATIC = [
    Arm(f"static_{name}", scaling, preset="study_static_lora", fork=False, text=f"static LoRA, {text}")
    for name, scaling, text in (
        ("alpha64", "", "alpha 64"),
        ("matched05", scaled("matched", 0.5), "matched × 0.5"),
    )
]
BEST_ARM = MAIN_FORKS[0]
# The same arm with ranks by the other rules, at minmax's parameters.
RULE_ARMS = {"minmax": BEST_ARM} | {
    rule: Arm(f"best_{rule}", f"{AT_14} {BEST} --rank_rule {rule}", 5,
              text=f"PreLoRA at 14, else the same, ranks by {rule}")
    for rule in ("uniform", "budget", "spectrum")
}
# fmt: on
# docs/method.md's: the arm `best` switched at every other window's end. (10, 12 and 14 stand above.)
WINDOWS = [
    Arm(
        f"best{epoch}",
        f"--switch_epoch {epoch} --lora_warmup_epochs 1 {BEST}",
        5,
        text=f"PreLoRA at {epoch}, else the same",
    )
    for epoch in (4, 6, 8, 16, 18, 20, 22)
]
OF_RULES = [arm for arm in RULE_ARMS.values() if arm is not BEST_ARM]
METHOD_ARMS = [*WINDOWS, *OF_RULES]
FORKS = [*MAIN_FORKS, *OPTIONS, *SWEEP, *METHOD_ARMS]
ARMS = [BASELINE, *EQUAL, *DECAYS, *MAIN_FORKS, *OPTIONS, *STATIC, *SWEEP]
DRAWN = "baseline equal23 best best12 authors exp2_best static_alpha64".split()  # in figures 4 to 7
# Fields in which a run may differ from what is asked for: they shape nothing.
ANY = "num_workers fork keep_every eval_every log_displacement run_dir".split()


# ------------------------------------------------------------------------------------------------------------
# images


def prepare_data() -> None:
    """Write DEV, unless it is there: Fashion-MNIST's training images but the last 10,000, which are its
    validation set. Raises UserError where there is no Fashion-MNIST."""
    if all((DEV / f"{split}.beton").exists() for split in ("train", "val")):
        return
    raw = DEV / "FashionMNIST/raw"
    raw.mkdir(parents=True, exist_ok=True)
    for kind, header, size in KINDS:
        head, rows = read_raw("train", kind, header, size)
        for split, part in (("train", rows[:-DEV_IMAGES]), ("t10k", rows[-DEV_IMAGES:])):
            count = struct.pack(">I", len(part))  # the header's second number, big-endian
            (raw / f"{split}-{kind}-ubyte").write_bytes(head[:4] + count + head[8:] + part.tobytes())
    for split in ("train", "val"):
        target = [f"fashion_mnist:{split}", str(DEV / f"{split}.beton"), "--root", str(DEV)]
        subprocess.run([sys.executable, "-m", "data.beton", *target], check=True)


KINDS = (("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1))  # of Fashion-MNIST's files: header, row, bytes


def read_raw(split: str, kind: str, header: int, size: int) -> tuple[bytes, np.ndarray]:
    """(header, rows (N, size) uint8) of one of Fashion-MNIST's raw files."""
    path = SOURCE / f"FashionMNIST/raw/{split}-{kind}-ubyte"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): `make data` makes it") from None
    return content[:header], np.frombuffer(content, np.uint8, offset=header).reshape(-1, size)


@functools.cache
def load_held_out() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (54,000, 3, 28, 28) uint8 and labels: those of DEV's training set on which no run trains, and
    the 10,000 of the test set."""
    parts = []
    for kind, header, size in KINDS:
        pool = read_raw("train", kind, header, size)[1][:-DEV_IMAGES]
        trained = get_indices(len(pool), True, 1, load_preset(train.Config, "config/study.py").train_samples)
        parts.append(
            np.concatenate([np.delete(pool, trained, axis=0), read_raw("t10k", kind, header, size)[1]])
        )
    images = torch.from_numpy(parts[0]).view(-1, 1, 28, 28).expand(-1, 3, -1, -1)
    return images, torch.from_numpy(parts[1]).view(-1).long()


def evaluate_held_out(cfg: train.Config, model: nn.Module) -> dict[str, float]:
    """val_loss, val_top1 and val_top5 of a model on the held-out images."""
    images, labels = load_held_out()
    batches = ((images[i : i + 500], labels[i : i + 500]) for i in range(0, len(images), 500))
    return train.evaluate(cfg, model, batches, torch.device("cpu"))


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
        source = str(get_run_dir(BASELINE, seed))
        flags += ["--fork", source if arm.at is None else f"{source}@{arm.at}"]
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


def train_run(arm: Arm, seed: int, epochs: int, argv: list[str]) -> None:
    """Train one run, or go on with it, and keep its log. Raises UserError with the last line of its output if
    it fails."""
    run_dir = get_run_dir(arm, seed)
    if not is_done(run_dir, epochs):
        print(f"{run_dir} …\n", end="", flush=True)  # in one piece: two threads print
        call(run_dir, argv)
    if not is_kept(arm, seed):
        path = checkpoint.latest(run_dir)
        own, s = evaluate.load_checkpoint(path, checkpoint.read_meta(path))
        model = merge_lora(evaluate.build_checkpoint(own, s, path))
        keep_run(arm, seed, evaluate_held_out(own, model))


def call(run_dir: Path, argv: list[str]) -> None:
    """train.py on one thread. What it says goes to runs/study/logs."""
    log = RUNS / "logs" / f"{run_dir.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
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
    """By its checkpoint: a run that was killed has logged its last epoch before it could save it."""
    try:
        path, meta, _ = checkpoint.find(run_dir)
    except UserError:
        return False
    return path is not None and meta["state"]["epoch"] == epochs


running: set[subprocess.Popen] = set()


def keep_run(arm: Arm, seed: int, held_out: dict) -> None:
    """Write what the report needs of a run's log into docs/study/runs. `held_out`: `evaluate_held_out`'s."""
    source, folder = get_run_dir(arm, seed), get_kept(arm, seed)
    wanted = "event epoch step phase frozen_blocks train_loss train_top1 lr val_loss val_top1".split()
    wanted += "trainable_params epoch_seconds images_per_second peak_memory_bytes displacement".split()
    if arm is BASELINE:  # a replay and a comparison of rank rules go by it
        wanted.append("spectrum")
    if arm is BASELINE or arm.name in DRAWN:
        wanted += ["weight_norms", "adapter_norms"]
    lines = []
    for event in read_events(source / "metrics.jsonl"):
        if event["event"] == "epoch":
            line = round_floats({key: event[key] for key in wanted if key in event})
            if arm is BASELINE:  # a replay decides by them, to the bit
                line["weight_norms"] = event["weight_norms"]
            lines.append(line)
        elif event["event"] == "switch":
            lines.append(round_floats(event))
    lines.append(round_floats({"event": "held_out", **held_out}))
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "config.json", folder)
    text = "".join(json.dumps(line) + "\n" for line in lines)
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
    other seeds that are named, for `compute_oracle`. Raises UserError for a run that fails; the others save
    and end."""

    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    missing = [
        (arm, seed) for arm in (*ARMS, *METHOD_ARMS) for seed in range(arm.seeds) if not is_kept(arm, seed)
    ]
    seeds = {seed for arm, seed in missing if arm.fork or arm is BASELINE}
    seeds |= set(needs_checkpoints)
    torch.set_num_threads(1)  # of each of the pool's threads, which evaluate, too
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        train_stage(pool, [(BASELINE, seed) for seed in sorted(seeds)])
        train_stage(pool, sorted(missing, key=lambda run: run[0] not in (*DECAYS, *MAIN_FORKS, *EQUAL)))


def train_stage(pool: ThreadPoolExecutor, runs: list[tuple[Arm, int]]) -> None:
    """Train these runs, one on each of the pool's threads at a time."""
    commands = [build_command(arm, seed) for arm, seed in runs]  # here: tyro is not for several threads
    waiting = []
    for (arm, seed), (cfg, argv) in zip(runs, commands):
        waiting.append(pool.submit(train_run, arm, seed, cfg.epochs, argv))
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
