"""python bench.py wire, python bench.py memory: what a rank of many sends and holds, phase by phase, without having the ranks.

Model, phases and sharding are train.py's own; the process group is torch's fake one and the tensors are fake.
torch goes through a step of rank 0, op by op and collective by collective, but computes nothing and sends nothing. Counted is what
FSDP2 really issues and what torch really allocates: on 2 real ranks both come out the same, except that watching the LoRA phase keeps one gradient
of a qkv output alive too long (0.07 of its 11 GiB). Blocks run eagerly; FSDP treats compiled ones the same, and they keep fewer
activations where the compiler recomputes pointwise work in backward. Dropout and drop path are off, and LoRA's backward is one op: its inner
temporaries (dy B of one Linear; in float32 A x, too, and oneDNN's copies of a weight gradient's factors) are not seen. The tensors are a CPU's: in
float32 each W + B A counts as kept from forward to backward (lora.kernels.merges), which on a GPU, in TF32, is not made.
"""

import contextlib
import math
import random
import time
from typing import Literal
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fake_collectives import CollectiveOp, sync_ops
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import train
from data.datasets import DATASETS
from launch import distributed
from model.optim import build_optimizer
from model.parallel import build_mesh, to_plain
from model.variants import LORA_FAMILIES, VARIANTS
from train import Config, autocast, build_model, switch_phase

Model = Literal[*VARIANTS]

# What is compared: title -> phase, frozen_base
CASES = {
    "full": ("full", "replicate"),
    "warmup": ("warmup", "replicate"),
    "lora, base replicated": ("lora", "replicate"),
    "lora, base sharded": ("lora", "shard"),
}


# ---------------------------------------------------------------------------------------------------------------------------------
# one rank of many


@contextlib.contextmanager
def fake_ranks(world_size: int):
    """A process group in which this process is rank 0 of `world_size` and the others don't exist. Yields the mode for its tensors."""
    if world_size < 2:
        raise ValueError(
            f"world_size must be at least 2, not {world_size}: one rank sends nothing and shards nothing"
        )
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield FakeTensorMode(allow_non_fake_inputs=True)
    finally:
        dist.destroy_process_group()


def build_fake(mode: FakeTensorMode, *args) -> nn.Module:
    """train.build_model(*args), in `mode` from its `to_empty` on.

    What comes before is on the meta device anyway. In the mode it would take three times as long (each parameter is cut into
    one tensor a rank), and `to_empty` refuses parameters that are fake already and not sharded, a frozen base's.
    """
    to_empty = nn.Module.to_empty
    with _disable_current_modes(), contextlib.ExitStack() as stack:

        def enter_mode(module, **options):
            stack.enter_context(mode)
            return to_empty(module, **options)

        with mock.patch.object(nn.Module, "to_empty", enter_mode):
            return build_model(*args)


def take_step(
    cfg: Config, model: nn.Module, optimizer: torch.optim.Optimizer, images: int, between=lambda: None
) -> None:
    """train.py's step on cfg.grad_accum_steps times `images` black images: forward, backward, clip, update. Its two logged sums are left out,
    16 bytes. `between` is called between micro-batches."""
    device, size = next(model.parameters()).device, DATASETS[cfg.dataset].image_size
    for micro_step in range(cfg.grad_accum_steps):
        if micro_step:
            between()
        model.set_requires_gradient_sync(micro_step == cfg.grad_accum_steps - 1)
        with autocast(cfg, device):
            logits = model(torch.zeros(images, 3, size, size, device=device)).float()  # (B, C)
        F.cross_entropy(logits, torch.zeros(images, dtype=torch.int64, device=device)).backward()
        del logits
    norm = to_plain(
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], cfg.grad_clip)
    )
    optimizer.found_inf = (~torch.isfinite(norm)).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def uniform_ranks(model: str) -> dict[str, list[int]]:
    """family -> 64 for every layer: the most that the paper's range allows."""
    return {family: [64] * VARIANTS[model]["depth"] for family in LORA_FAMILIES}


def mixed_ranks(model: str) -> dict[str, list[int]]:
    """family -> 8, 16, 32 or 64 for every layer, drawn once and for all."""
    rng = random.Random(0)
    return {
        family: [rng.choice((8, 16, 32, 64)) for _ in range(VARIANTS[model]["depth"])]
        for family in LORA_FAMILIES
    }


def each_mesh(world_size: int, dp_shard: int | None):
    """(title, dp_shard, mesh) of one choice, or of three: one copy of the masters in all, one to 4 ranks, one to each."""
    for shards in [dp_shard] if dp_shard else sorted({world_size, min(4, world_size), 1}, reverse=True):
        kind = {1: "plain replication", world_size: "full sharding"}.get(
            shards, f"HSDP, {world_size // shards} copies"
        )
        yield f"{kind} (dp_shard {shards})", shards, build_mesh(shards, "cpu", distributed.TIMEOUT)


# ---------------------------------------------------------------------------------------------------------------------------------
# bytes on the wire


class WireCounter(TorchDispatchMode):
    """While active, adds up the bytes this rank sends, in `sent` by collective, in `by_group` by the ranks they go round, from the
    collectives themselves as they are issued.

    A ring of n ranks sends S (n - 1) / n for an all-gather or a reduce-scatter of S bytes in all, twice that for an all-reduce.
    For any backend, and real tensors too. Raises ValueError on a collective that is none of the three.
    """

    def __init__(self):
        super().__init__()
        self.sent = {"all-gather": 0.0, "reduce-scatter": 0.0, "all-reduce": 0.0}
        self.by_group: dict[tuple[int, ...], float] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # let it become local ops and collectives first
        out = func(*args, **(kwargs or {}))
        silent = func in sync_ops or func.__name__.startswith("_wrap_tensor")
        if (
            func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
            and not silent
        ):
            name = func.__name__.replace("_", "")
            kind = next((kind for kind in self.sent if kind.replace("-", "") in name), None)
            if kind is None:
                raise ValueError(f"don't know how many bytes {func} sends")
            group = CollectiveOp.get_process_group(func, args)
            n, ranks = group.size(), tuple(dist.get_process_group_ranks(group))
            whole = CollectiveOp.get_comm_tensor_size(
                func, out, args, kwargs
            )  # what is gathered, or is to be scattered
            sent = whole * (n - 1) / n * (2 if kind == "all-reduce" else 1)
            self.sent[kind] += sent
            self.by_group[ranks] = self.by_group.get(ranks, 0.0) + sent
        return out


def count_wire(cfg: Config, model: nn.Module) -> WireCounter:
    """What this rank sends in one step of `model`. The step is taken, with learning rate 0."""
    with WireCounter() as counter:
        take_step(cfg, model, build_optimizer(model, cfg.weight_decay), images=1)  # how many doesn't matter
    return counter


def wire(
    model: Model = "L/16",
    world_size: int = 64,
    dp_shard: int | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> dict[tuple, dict[str, float]]:
    """Bytes each rank sends per optimiser step, in each phase, beside the full phase on the same mesh.

    dp_shard: ranks that share one copy of the masters; None = all of them, 4, and 1.
    Returns {(dp_shard, title of CASES, "64" or "mixed"): bytes by collective}, and prints it.
    """
    start, sent = time.perf_counter(), {}
    print(
        f"ViT-{model}, {world_size} ranks, {dtype}: MB (1e6 bytes) that each rank sends in a step. "
        "mixed: ranks of 8, 16, 32, 64 over layers and families"
    )
    with fake_ranks(world_size) as mode:
        for heading, shards, mesh in each_mesh(world_size, dp_shard):
            print(
                f"\n{heading:40}{'all-gather':>12}{'reduce-scatter':>16}{'all-reduce':>12}{'total':>10}{'of full':>10}"
            )
            for title, (phase, frozen_base) in CASES.items():
                for name, ranks in {"64": uniform_ranks(model), "mixed": mixed_ranks(model)}.items():
                    if phase == "full" and name == "mixed":
                        continue
                    cfg = Config(
                        model=model, dataset="imagenet", dtype=dtype, compile=False, frozen_base=frozen_base
                    )
                    sharded = build_fake(
                        mode, cfg, phase, ranks, "cpu", mesh
                    )  # the full phase has no adapters yet
                    with mode:
                        row = sent[shards, title, name] = count_wire(cfg, sharded).sent
                    print(
                        f"{title if phase == 'full' else f'{title}, ranks {name}':40}{row['all-gather'] / 1e6:12.1f}"
                        f"{row['reduce-scatter'] / 1e6:16.1f}{row['all-reduce'] / 1e6:12.1f}{sum(row.values()) / 1e6:10.1f}"
                        f"{sum(row.values()) / sum(sent[shards, 'full', '64'].values()):10.3f}",
                        flush=True,
                    )
    print(f"\ncounted in {time.perf_counter() - start:.0f} s")
    return sent


# ---------------------------------------------------------------------------------------------------------------------------------
# memory of a rank

# What a rank holds, in FSDPMemTracker's words.
PARTS = {
    "masters": ("Sharded Param",),
    "gathered": ("Unsharded Param", "All Gather"),
    "moments": ("OptState",),
    "gradients": ("Sharded Grad", "Unsharded Grad", "Reduce Scatter"),
    "frozen": ("Buffer",),
    "activations": ("Activation", "Temp", "Inputs"),
}

WHY_MEMORY = """
Why less is saved than the paper's 20 -> 16 GB (ViT-L/16, each GPU with its own copy of everything, 64 images): adapters on all six
families need the same saved activations as full training. What is saved is gradients and Adam moments of the base, 16 -> 2 bytes
a parameter where nothing is sharded: 4.9 -> 0.6 GB, the paper's 4 GB. Here
- gradients are freed after each update, and without checkpointing the peak is where backward begins, all activations there and no
  gradients yet: 12 -> 2 bytes. Gradients kept over a step (accumulation, DDP's buckets) make it 16 -> 2;
- sharded over n ranks the 12 are 12 / n: from n = 6 on a frozen base on every rank (2 bytes) takes more than all that full training
  shards. --frozen_base shard takes 4 / n, and gathers the base every step (python bench.py wire);
- activations are most of it: --activation_checkpointing block saves more than any phase does."""


def fill_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Adam's moments, as every step but the first finds them."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure_step(
    cfg: Config, model: nn.Module, optimizer: torch.optim.Optimizer, images: int
) -> dict[str, int]:
    """Bytes that this rank holds at the peak of a step, by PARTS; their sum is the peak. Call it in the mode of `fake_ranks`.

    masters: what is trained, float32, this rank's shards. gathered: parameters whole, for a block's work and the next one's. gradients:
    reduced ones and what is being reduced; a block's own, until then, are among the activations, with autograd's temporaries.
    frozen: what is not trained, replicated or this rank's shards.
    """
    tracker = FSDPMemTracker(model, optimizer)
    with tracker:
        for p in model.parameters():
            if (
                not p.requires_grad
            ):  # else it would pass for a master or, where FSDP ignores it, for an activation
                tracker._update_and_maybe_create_winfos(p, _FSDPRefType.BUFFER)
        take_step(
            cfg, model, optimizer, images, between=tracker.reset_mod_stats
        )  # it stumbles over a second forward
    (peak,) = tracker.get_tracker_snapshot("peak").values()  # one device
    return {part: sum(peak[_FSDPRefType(name)] for name in names) for part, names in PARTS.items()}


def largest_fit(measure, limit: float, known: dict[int, float]) -> int:
    """The largest n with measure(n) <= limit, both sides of it measured; 0 if there is none. `measure` rises, and is nearly affine: the next n is
    where the line through the two nearest known points meets the limit. `known`: {n: measure(n)} of one n or more."""
    known = dict(known)
    while True:
        low = max((n for n, size in known.items() if size <= limit), default=0)
        high = min((n for n, size in known.items() if size > limit), default=None)
        if high == low + 1:
            return low
        (n1, size1), *rest = sorted(known.items(), key=lambda item: abs(item[1] - limit))[:2]
        guess = (
            2 * n1
            if not rest
            else n1 + math.floor((limit - size1) * (rest[0][0] - n1) / (rest[0][1] - size1))
        )
        n = max(guess, low + 1)
        n = min(n, high - 1) if high else n
        known[n] = measure(n)


def measure_switch(
    cfg: Config,
    mode: FakeTensorMode,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    phase: str,
    ranks: dict[str, list[int]],
    mesh: DeviceMesh,
) -> dict[str, int]:
    """Bytes that this rank holds at the peak of train.switch_phase: the old model, its moments, and what the new one adds."""
    tracker = MemTracker()
    tracker.track_external(model, optimizer)

    def build(*args):
        new = build_fake(mode, *args)  # out of the tracker's sight
        tracker.track_external(new)
        return new

    with mode, tracker, mock.patch.object(train, "build_model", build):
        switch_phase(cfg, model, optimizer, phase, ranks, mesh)
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return {"all": peak["Total"]}


def memory(
    model: Model = "L/16",
    world_size: int = 64,
    images: int = 64,
    dp_shard: int | None = None,
    activation_checkpointing: Literal["none", "block"] | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    grad_accum_steps: int = 1,
    fit: float | None = None,
) -> dict[tuple, dict[str, int]]:
    """A rank's memory at the peak of a step, in each phase, every adapter of rank 64, and at the peak of the switches.

    images: of 224 × 224, on each rank, in a micro-batch. dp_shard: ranks that share one copy of the masters; None = all of them, 4, and 1.
    activation_checkpointing: None = both. grad_accum_steps: micro-batches of a step; from 2 on a backward finds the gradients of the one before.
    fit: GiB; measure besides how many images fit in that much. Returns {(dp_shard, checkpointing, title of CASES or of a switch): bytes
    by PARTS or in all; with "fit" behind the title: images}, and prints it.
    """
    for name, value in (("images", images), ("grad_accum_steps", grad_accum_steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if fit is not None and not 0 < fit < math.inf:
        raise ValueError(f"fit must be above 0 GiB, not {fit}")
    start, held, ranks = time.perf_counter(), {}, uniform_ranks(model)
    print(
        f"ViT-{model}, {world_size} ranks, {images} images of 224 × 224 each, {dtype}, ranks 64, {grad_accum_steps} micro-batches a step: "
        f"GiB of a rank at its peak" + (f", and the images that fit in {fit:g} GiB" if fit else "")
    )
    with fake_ranks(world_size) as mode:
        for heading, shards, mesh in each_mesh(world_size, dp_shard):
            for ac in [activation_checkpointing] if activation_checkpointing else ["none", "block"]:
                print(
                    f"\n{f'{heading}, checkpointing {ac}':52}{'peak':>8}{'- full':>8}"
                    + "".join(f"{part:>12}" for part in PARTS)
                    + ("  images that fit" if fit else "")
                )

                def show(title: str, row: dict[str, int]) -> None:
                    held[shards, ac, title] = row
                    saved = sum(row.values()) - sum(held[shards, ac, "full"].values())
                    print(
                        f"{title:52}{sum(row.values()) / 2**30:8.2f}{saved / 2**30:+8.2f}"
                        + "".join(f"{row[part] / 2**30:12.3f}" for part in PARTS if part in row)
                        + (
                            f"{held[shards, ac, title, 'fit']:17}"
                            if (shards, ac, title, "fit") in held
                            else ""
                        ),
                        flush=True,
                    )

                for title, (phase, frozen_base) in CASES.items():
                    cfg = Config(
                        model=model,
                        dataset="imagenet",
                        dtype=dtype,
                        compile=False,
                        frozen_base=frozen_base,
                        activation_checkpointing=ac,
                        grad_accum_steps=grad_accum_steps,
                        batch_size=images * grad_accum_steps * world_size,
                    )
                    sharded = build_fake(mode, cfg, phase, ranks, "cpu", mesh)
                    with mode:
                        optimizer = build_optimizer(sharded, cfg.weight_decay)
                        fill_moments(sharded, optimizer)
                        row = measure_step(cfg, sharded, optimizer, images)
                        if fit:
                            held[shards, ac, title, "fit"] = largest_fit(
                                lambda n: sum(measure_step(cfg, sharded, optimizer, n).values()),
                                fit * 2**30,
                                {images: sum(row.values())},
                            )
                        show(title, row)
                    if ac == "none" and phase != "lora":  # checkpointing changes nothing about it
                        after = {"full": "warmup", "warmup": "lora"}[phase]
                        show(
                            f"  switch to {after}",
                            measure_switch(cfg, mode, sharded, optimizer, after, ranks, mesh),
                        )
    print(f"{WHY_MEMORY}\n\nmeasured in {time.perf_counter() - start:.0f} s")
    return held
