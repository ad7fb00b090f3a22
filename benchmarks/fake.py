"""One process of many, without having the others: what `bench.py wire`, `memory` and `estimate` stand on.

Model, phases, sharding and step are train.py's own; the process group is torch's fake one and the tensors are
fake. torch goes through a step of process 0, op by op and collective by collective, but computes nothing and
sends nothing. Counted is what FSDP2 really issues and what torch really allocates: on 2 real processes both
come out the same, except that watching the LoRA phase keeps one gradient of a qkv output alive too long (0.07
of its 11 GiB).

Blocks run eagerly; FSDP treats compiled ones the same, and they keep fewer activations where the compiler
recomputes pointwise work in backward. Dropout and drop path are off. The tensors are a CPU's, because a fake
GPU without a real one has no backward; in `as_on_a_gpu` they take a GPU's way through the step.
"""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.utils.clip_grad
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

import data.device
import train
from data.datasets import get_spec
from data.loader import Batch, build_black_batch
from errors import UserError
from launch import distributed
from lora import kernels, onednn
from model import parallel
from train import build_model

# What is compared: title -> phase, frozen_base
CASES = {
    "full": ("full", "replicate"),
    "warmup": ("warmup", "replicate"),
    "lora, base replicated": ("lora", "replicate"),
    "lora, base sharded": ("lora", "shard"),
}


@contextlib.contextmanager
def fake_processes(world_size: int) -> Iterator[FakeTensorMode]:
    """A process group in which this process is number 0 of `world_size` and the others don't exist. Yields
    the mode for its tensors."""
    if world_size < 2:
        raise UserError(f"world_size must be at least 2, not {world_size}: one rank sends and shards nothing")
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield FakeTensorMode(allow_non_fake_inputs=True)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Fake tensors of a CPU take the same way as a GPU's tensors; and nothing of them stays behind.

    Without Triton, as on a GPU without it, a LoRALinear's products are plain torch's.
    """
    with contextlib.ExitStack() as stack:
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))
        patch(kernels, "uses_triton", lambda tensor: find_spec("triton") is not None)
        patch(onednn, "IS_FASTER", False)
        patch(torch.nn.utils.clip_grad, "_has_foreach_support", lambda *args, **kwargs: True)
        # It is cached, and a fake tensor in the cache would be the next real step's.
        patch(data.device, "_get_constants", data.device._get_constants.__wrapped__)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        yield


def build_fake(mode: FakeTensorMode, *args) -> nn.Module:
    """train.build_model(*args), in `mode` from where it gets its memory on.

    What comes before is on the meta device anyway. In the mode it would take three times as long (each
    parameter is cut into one tensor a process), and `to_empty` refuses parameters that are fake already and
    not sharded, a frozen base's.
    """
    materialise = parallel.materialise
    with _disable_current_modes(), contextlib.ExitStack() as stack:

        def materialise_in_mode(*model_and_device) -> nn.Module:
            stack.enter_context(mode)
            return materialise(*model_and_device)

        with mock.patch.object(parallel, "materialise", materialise_in_mode):
            return build_model(*args)


def each_mesh(world_size: int, dp_shard: int | None) -> Iterator[tuple[str, int, DeviceMesh]]:
    """(title, dp_shard, mesh) of one choice, or of three: one copy of the masters in all, one to 4 processes,
    one to each."""
    choices = [dp_shard] if dp_shard else sorted({world_size, min(4, world_size), 1}, reverse=True)
    for shards in choices:
        kind = f"HSDP, {world_size // shards} copies"
        if shards == 1:
            kind = "plain replication"
        elif shards == world_size:
            kind = "full sharding"
        yield f"{kind} (dp_shard {shards})", shards, parallel.build_mesh(shards, "cpu", distributed.TIMEOUT)


def get_black_batch(cfg: train.Config, images: int) -> Batch:
    """A micro-batch as a loader yields it, of so many black images on the CPU."""
    return build_black_batch(images, get_spec(cfg.dataset, cfg.image_size).image_size, torch.device("cpu"))


def take_step(cfg: train.Config, model: nn.Module, optimizer, batches: Iterator[Batch]) -> None:
    """train.py's own step at learning rate 0. Call it in the mode of `fake_processes`, if it is one of
    those."""
    train.train_step(cfg, model, optimizer, batches, 0, 0.0, torch.zeros((), dtype=torch.bool))
