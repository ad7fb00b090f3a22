"""python bench.py memory: what a process of many holds at the peak of a step and of a switch, phase by phase.
How: benchmarks/fake.py."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Literal
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

import train
from benchmarks.choices import Model, get_ranks
from benchmarks.contenders import PHASES
from benchmarks.fake import (
    CASES,
    as_on_a_gpu,
    build_fake,
    each_mesh,
    fake_processes,
    get_black_batch,
    take_step,
)
from data.loader import Batch
from errors import UserError
from launch.distributed import TIMEOUT
from lora.ranks import Ranks
from model import parallel
from model.ema import Ema, get_local
from model.optim import build_optimizer
from train import Config

# What a process holds, in FSDPMemTracker's words.
PARTS = {
    "masters": ("Sharded Param",),
    "gathered": ("Unsharded Param", "All Gather"),
    "moments": ("OptState",),
    "gradients": ("Sharded Grad", "Unsharded Grad", "Reduce Scatter"),
    "frozen": ("Buffer",),
    "activations": ("Activation", "Temp", "Inputs"),
}
NEXT = {"full": "warmup", "warmup": "lora"}  # phase -> the one that a switch leads to

WHY_MEMORY = """
Why less is saved than the paper's 20 -> 16 GB (ViT-L/16, each GPU with its own copy of everything, 64
images): adapters on all six families need the same saved activations as full training. What is saved is
gradients and Adam moments of the base, 16 -> 4 bytes a parameter where nothing is sharded: 4.9 -> 1.2 GB, the
paper's 4 GB. Here
- gradients are freed after each update, and without checkpointing the peak is where backward begins, all
  activations there and no gradients yet: 12 -> 4 bytes. Gradients kept over a step (accumulation, DDP's
  buckets) make it 16 -> 4;
- warmup and LoRA keep W + B A from forward to backward, 2 bytes a parameter in bfloat16 (with checkpointing
  one block's);
- sharded over n processes the 12 are 12 / n: from n = 4 on a frozen base on every process (4 bytes) takes
  more than all that full training shards. --frozen_base shard takes 4 / n, and gathers the base every step,
  in float32 (python bench.py wire);
- activations are most of it: --activation_checkpointing block saves more than any phase does."""


# ------------------------------------------------------------------------------------------------------------
# a step, a switch, as many images as fit


def fill_moments(model: nn.Module, optimizer: Optimizer) -> None:
    """Adam's moments, as every step but the first finds them."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure_step(cfg: Config, model: nn.Module, optimizer: Optimizer, images: int) -> dict[str, int]:
    """Bytes that this process holds at the peak of a step, by PARTS; their sum is the peak. Call it in the
    mode of `fake_processes`.

    masters: what is trained, float32, this process's shards. gathered: parameters whole, for a block's work
    and the next one's. gradients: reduced ones and what is being reduced; a block's own, until then, are
    among the activations, with autograd's temporaries and W + B A. frozen: what is not trained, float32,
    replicated or this process's shards. Batches that wait for their turn on the device are not there.
    """
    tracker = FSDPMemTracker(model, optimizer)

    def batches() -> Iterator[Batch]:
        while True:
            yield get_black_batch(cfg, images)
            tracker.reset_mod_stats()  # it stumbles over a second forward

    with tracker:
        for p in model.parameters():
            if not p.requires_grad:  # else it would pass for a master or, ignored by FSDP, for an activation
                tracker._update_and_maybe_create_winfos(p, _FSDPRefType.BUFFER)
        take_step(cfg, model, optimizer, batches())
    (peak,) = tracker.get_tracker_snapshot("peak").values()  # one device
    return {part: sum(peak[_FSDPRefType(name)] for name in names) for part, names in PARTS.items()}


def measure_averages(model: nn.Module, mesh: DeviceMesh) -> int:
    """Bytes of the averages of the weights that this process holds, those of a frozen base as well. A step
    allocates nothing for them."""
    ema = Ema(model, 0.5, mesh)
    averages = [ema.averages.get(name, ema.shard(p)) for name, p in model.named_parameters()]
    return sum(get_local(average).nbytes for average in averages)


def simulate_peaks(cfg: Config, ranks: Ranks) -> dict[str, int]:
    """{phase: bytes at the peak of a step} of one of two processes that each have a copy of everything, with
    `cfg.batch_size` images each, eagerly, on a GPU."""
    cfg = dataclasses.replace(cfg, compile=False, batch_size=2 * cfg.batch_size)
    peaks = {}
    with fake_processes(2) as mode, as_on_a_gpu():
        mesh = parallel.build_mesh(1, "cpu", TIMEOUT)
        for phase in PHASES:
            model = build_fake(mode, cfg, phase, ranks, "cpu", mesh)
            with mode:
                optimizer = build_optimizer(model, cfg.weight_decay)
                fill_moments(model, optimizer)
                peaks[phase] = sum(measure_step(cfg, model, optimizer, cfg.batch_size // 2).values())
    return peaks


def largest_fit(measure: Callable[[int], float], limit: float, known: dict[int, float]) -> int:
    """The largest n with measure(n) <= limit, both sides of it measured; 0 if there is none.

    `measure` rises, and is nearly affine: the next n is where the line through the two nearest known points
    meets the limit. `known`: {n: measure(n)} of one n or more.
    """
    known = dict(known)
    while True:
        low = max((n for n, size in known.items() if size <= limit), default=0)
        high = min((n for n, size in known.items() if size > limit), default=None)
        if high == low + 1:
            return low
        (n1, size1), *others = sorted(known.items(), key=lambda item: abs(item[1] - limit))[:2]
        guess = 2 * n1
        if others:
            n2, size2 = others[0]
            guess = n1 + math.floor((limit - size1) * (n2 - n1) / (size2 - size1))
        n = max(guess, low + 1)
        if high:
            n = min(n, high - 1)
        known[n] = measure(n)


def measure_switch(
    cfg: Config,
    mode: FakeTensorMode,
    model: nn.Module,
    optimizer: Optimizer,
    phase: str,
    ranks: Ranks,
    mesh: DeviceMesh,
) -> dict[str, int]:
    """Bytes that this process holds at the peak of train.switch_phase: the old model, its moments, and what
    the new one adds."""
    tracker = MemTracker()
    tracker.track_external(model, optimizer)

    def build(*args) -> nn.Module:
        new = build_fake(mode, *args)  # out of the tracker's sight
        tracker.track_external(new)
        return new

    with mode, tracker, mock.patch.object(train, "build_model", build):
        train.switch_phase(cfg, model, optimizer, phase, ranks, mesh)
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return {"all": peak["Total"]}


# ------------------------------------------------------------------------------------------------------------
# the command


def memory(
    model: Model = "L/16",
    world_size: int = 64,
    images: int = 64,
    dp_shard: int | None = None,
    activation_checkpointing: Literal["none", "block"] | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    grad_accum_steps: int = 1,
    fit: float | None = None,
    ema: bool = False,
) -> dict[tuple, dict[str, int] | int]:
    """A process's memory on a GPU at the peak of a step, in each phase, every adapter of rank 64, and at the
    peak of the switches.

    images: of 224 × 224, on each process, in a micro-batch. dp_shard: processes that share one copy of the
    masters; None = all of them, 4, and 1. activation_checkpointing: None = both. grad_accum_steps:
    micro-batches of a step; from 2 on a backward finds the gradients of the one before. fit: GiB; measure
    besides how many images fit in that much. ema: with averages of the weights (ema_decay). Returns
    {(dp_shard, checkpointing, title of CASES or of a switch): bytes by PARTS or in all; with "fit" behind the
    title: images}, and prints it.
    """
    check_arguments(images, grad_accum_steps, fit)
    start, held = time.perf_counter(), {}
    what = f"ViT-{model}, {world_size} processes, {images} images of 224 × 224 each, {dtype}, ranks 64"
    also = f", and the images that fit in {fit:g} GiB" if fit else ""
    print(f"{what}, {grad_accum_steps} micro-batches a step: GiB of a process at its peak{also}")
    with fake_processes(world_size) as mode, as_on_a_gpu():
        for heading, shards, mesh in each_mesh(world_size, dp_shard):
            for checkpointing in ("none", "block"):
                if activation_checkpointing not in (None, checkpointing):
                    continue
                cfg = Config(
                    model=model,
                    dataset="imagenet",
                    dtype=dtype,
                    compile=False,
                    activation_checkpointing=checkpointing,
                    grad_accum_steps=grad_accum_steps,
                    batch_size=images * grad_accum_steps * world_size,
                )
                print(get_title_line(f"{heading}, checkpointing {checkpointing}", fit, ema))
                for title, row, fitting in measure_cases(cfg, mode, mesh, images, fit, ema):
                    held[shards, checkpointing, title] = row
                    if fitting is not None:
                        held[shards, checkpointing, title, "fit"] = fitting
                    full = sum(held[shards, checkpointing, "full"].values())
                    print(get_row(title, row, full, fitting), flush=True)
    print(f"{WHY_MEMORY}\n\nmeasured in {time.perf_counter() - start:.0f} s")
    return held


def check_arguments(images: int, grad_accum_steps: int, fit: float | None) -> None:
    """Raise UserError for what can't be measured."""
    for name, value in (("images", images), ("grad_accum_steps", grad_accum_steps)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if fit is not None and not 0 < fit < math.inf:
        raise UserError(f"fit must be above 0 GiB, not {fit}")


def measure_cases(
    cfg: Config, mode: FakeTensorMode, mesh: DeviceMesh, images: int, fit: float | None, ema: bool
) -> Iterator[tuple[str, dict[str, int], int | None]]:
    """(title, bytes by PARTS or in all, images that fit or None) of each of CASES on `mesh` and of each
    switch, as soon as it is measured."""
    ranks = get_ranks("64", cfg.model)
    for title, (phase, frozen_base) in CASES.items():
        case = dataclasses.replace(cfg, frozen_base=frozen_base)
        model = build_fake(mode, case, phase, ranks, "cpu", mesh)
        with mode:
            optimizer = build_optimizer(model, case.weight_decay)
            fill_moments(model, optimizer)
            averages = {"averages": measure_averages(model, mesh)} if ema else {}
            row, fitting = measure_step(case, model, optimizer, images) | averages, None

            def measure(n: int) -> int:
                held = measure_step(case, model, optimizer, n) | averages  # noqa: B023, called right here
                return sum(held.values())

            if fit:
                fitting = largest_fit(measure, fit * 2**30, {images: sum(row.values())})
        yield title, row, fitting
        if cfg.activation_checkpointing == "none" and phase in NEXT:  # checkpointing changes nothing about it
            held = measure_switch(case, mode, model, optimizer, NEXT[phase], ranks, mesh)
            held["all"] += sum(averages.values())
            yield f"  switch to {NEXT[phase]}", held, None


def get_title_line(heading: str, fit: float | None, ema: bool) -> str:
    parts = "".join(f"{part:>12}" for part in [*PARTS, *["averages"] * ema])
    line = f"\n{heading:52}{'peak':>8}{'- full':>8}{parts}"
    return f"{line}  images that fit" if fit else line


def get_row(title: str, row: dict[str, int], full: int, fitting: int | None) -> str:
    """A line of the table: GiB at the peak, that less the full phase's, and the parts."""
    held = sum(row.values())
    parts = "".join(f"{row[part] / 2**30:12.3f}" for part in (*PARTS, "averages") if part in row)
    line = f"{title:52}{held / 2**30:8.2f}{(held - full) / 2**30:+8.2f}{parts}"
    return line if fitting is None else f"{line}{fitting:17}"
