"""python bench.py wire: what each process of many sends in a step, phase by phase.
How: benchmarks/fake.py."""

import itertools
import time
from typing import Literal

import torch.distributed as dist
from torch import nn
from torch.distributed._tools.fake_collectives import CollectiveOp, sync_ops
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.choices import Model, get_ranks
from benchmarks.fake import CASES, build_fake, each_mesh, fake_processes, get_black_batch, take_step
from model.optim import build_optimizer
from train import Config

NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")  # of collectives


class WireCounter(TorchDispatchMode):
    """While active, adds up the bytes this process sends, in `sent` by collective, in `by_group` by the
    processes they go round, from the collectives themselves as they are issued.

    A ring of n processes sends S (n - 1) / n for an all-gather or a reduce-scatter of S bytes in all, twice
    that for an all-reduce. For any backend, and real tensors too. Raises ValueError on a collective that is
    none of the three.
    """

    def __init__(self):
        super().__init__()
        self.sent = {"all-gather": 0.0, "reduce-scatter": 0.0, "all-reduce": 0.0}
        self.by_group: dict[tuple[int, ...], float] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let it become local ops and collectives first
        out = func(*args, **kwargs)
        silent = func in sync_ops or func.__name__.startswith("_wrap_tensor")
        if func.namespace in NAMESPACES and not silent:
            self.count(func, out, args, kwargs)
        return out

    def count(self, func, out, args: tuple, kwargs: dict) -> None:
        name = func.__name__.replace("_", "")
        kind = next((kind for kind in self.sent if kind.replace("-", "") in name), None)
        if kind is None:
            raise ValueError(f"don't know how many bytes {func} sends")
        group = CollectiveOp.get_process_group(func, args)
        n, members = group.size(), tuple(dist.get_process_group_ranks(group))
        # what is gathered, or is to be scattered
        whole = CollectiveOp.get_comm_tensor_size(func, out, args, kwargs)
        sent = whole * (n - 1) / n
        if kind == "all-reduce":
            sent *= 2
        self.sent[kind] += sent
        self.by_group[members] = self.by_group.get(members, 0.0) + sent


def count_wire(cfg: Config, model: nn.Module) -> WireCounter:
    """What this process sends in one step of `model`. The step is taken, with learning rate 0."""
    batches = itertools.repeat(get_black_batch(cfg, 1))  # how many images doesn't matter
    optimizer = build_optimizer(model, cfg.weight_decay)
    with WireCounter() as counter:
        take_step(cfg, model, optimizer, batches)
    return counter


def get_choices(phase: str) -> tuple[str, ...]:
    """The ranks to compare: the most that the paper's range allows, and mixed. In the full phase one will
    do: there are no adapters yet."""
    return ("64",) if phase == "full" else ("64", "mixed")


def wire(
    model: Model = "L/16",
    world_size: int = 64,
    dp_shard: int | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> dict[tuple, dict[str, float]]:
    """Bytes each process sends per optimiser step, in each phase, beside the full phase on the same mesh.

    dp_shard: processes that share one copy of the masters; None = all of them, 4, and 1.
    Returns {(dp_shard, title of CASES, "64" or "mixed"): bytes by collective}, and prints it.
    """
    start, sent = time.perf_counter(), {}
    print(
        f"ViT-{model}, {world_size} processes, {dtype}: MB (1e6 bytes) that each process sends in a step. "
        "mixed: ranks of 8, 16, 32, 64 over layers and families"
    )
    with fake_processes(world_size) as mode:
        for heading, shards, mesh in each_mesh(world_size, dp_shard):
            columns = (
                f"{'all-gather':>12}{'reduce-scatter':>16}{'all-reduce':>12}{'total':>10}{'of full':>10}"
            )
            print(f"\n{heading:40}{columns}")
            for title, (phase, frozen_base) in CASES.items():
                for choice in get_choices(phase):
                    options = dict(dtype=dtype, compile=False, frozen_base=frozen_base)
                    cfg = Config(model=model, dataset="imagenet", **options)
                    sharded = build_fake(mode, cfg, phase, get_ranks(choice, model), "cpu", mesh)
                    with mode:
                        row = count_wire(cfg, sharded).sent
                    sent[shards, title, choice] = row
                    name = title if phase == "full" else f"{title}, ranks {choice}"
                    print(format_row(name, row, sent[shards, "full", "64"]), flush=True)
    print(f"\ncounted in {time.perf_counter() - start:.0f} s")
    return sent


def format_row(name: str, row: dict[str, float], full: dict[str, float]) -> str:
    """A line of the table: MB by collective and in all, and the share of the full phase's."""
    gathered, scattered, reduced = (
        row[kind] / 1e6 for kind in ("all-gather", "reduce-scatter", "all-reduce")
    )
    total, of_full = sum(row.values()), sum(row.values()) / sum(full.values())
    return f"{name:40}{gathered:12.1f}{scattered:16.1f}{reduced:12.1f}{total / 1e6:10.1f}{of_full:10.3f}"
