"""How a model is spread over GPUs and compiled: one place, one order."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch._dynamo.config
import torch._functorch.config  # not there before something else imports it
import torch._inductor.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from errors import UserError

NARROW = 192  # width of a model below which one thread is as fast as two, see set_up_device
RUNNING_STATS = {"running_mean", "running_var", "num_batches_tracked"}  # torch's norms reset these alone
# torch 2.11 has this under a private name only.
set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout


def build_mesh(dp_shard: int | None, device_type: str, timeout: timedelta) -> DeviceMesh | None:
    """The processes as dp_replicate × dp_shard; None with one process.

    `dp_shard` is the number of processes that share one copy of the masters: 1 is plain replication, all of
    them plain FSDP, anything between HSDP; None shards inside a node and replicates across nodes. A
    collective of the mesh that some process has not joined ends the run after `timeout`. Raises UserError if
    `dp_shard` doesn't divide the processes.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    shards = dp_shard
    if shards is None:
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        shards = per_node if world_size % per_node == 0 else world_size
    if world_size % shards:
        raise UserError(f"dp_shard {shards} does not divide the {world_size} ranks of this run")
    if world_size == 1:
        return None
    replicas = world_size // shards
    mesh = init_device_mesh(device_type, (replicas, shards), mesh_dim_names=("dp_replicate", "dp_shard"))
    for dim in range(2):
        # A group of some of the processes starts with torch's own 30 minutes.
        set_timeout(timeout, mesh.get_group(dim))
    return mesh if replicas > 1 else mesh["dp_shard"]  # without replicas there is nothing to all-reduce


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    compile: bool = False,
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: str = "none",
    reshard_after_forward: bool = True,
    replicate_frozen: bool = True,
) -> nn.Module:
    """Activation checkpointing, then compilation of each of `model.blocks`, then FSDP2 of each block and the
    root.

    Checkpointing: "block" keeps only a block's input and recomputes the rest in backward; "selective" lets
    the compiler choose what to recompute so that half the activations stay.

    Compilation is in place (`block.compile()`), so that no parameter gets an `_orig_mod.` name, and regional:
    a block is traced once and all blocks share the graph. A whole run needs 4 training graphs (full 1, warmup
    1, lora 2: the first block's input needs no gradient there) and 1 for evaluation in each phase, whatever
    the depth and the ranks (`lora.inject.mark_ranks_dynamic`). Blocks that are frozen whole need one more of
    each in their phase, without a backward. The recompile limit counts per code object, so
    over all blocks and phases; with fullgraph a run that hits it stops, without it would silently go on in
    eager mode.

    FSDP2 (fully_shard), with a mesh: float32 shards are the masters, blocks are gathered in `dtype`,
    gradients reduced in float32. The root's few parameters (embeddings, last norm, head) are gathered in
    float32: the residual stream starts there, as under autocast on one GPU. With
    `replicate_frozen` what needs no gradient stays a plain tensor on every process and goes off the wire;
    never use it on parameters that are trained, they would not be reduced.
    """
    if activation_checkpointing == "selective" and not compile:
        raise ValueError(
            "activation_checkpointing selective is the compiler's choice: it needs --compile True"
        )
    model.grad_checkpointing = activation_checkpointing == "block"
    if compile:
        compile_blocks(model, half_the_activations=activation_checkpointing == "selective")
    if mesh is None:
        return model
    shards = mesh.size(-1)

    def place(p: nn.Parameter) -> Shard:
        # An A of 8 rows would be padded to one row a process, 64 of 64: along its input it shards without
        # padding.
        rows_divide, columns_divide = p.shape[0] % shards == 0, p.shape[-1] % shards == 0
        by_columns = p.ndim == 2 and columns_divide and not rows_divide
        return Shard(1 if by_columns else 0)

    ignored = {p for p in model.parameters() if replicate_frozen and not p.requires_grad}
    options = {"mesh": mesh, "shard_placement_fn": place, "ignored_params": ignored}
    narrow = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in model.blocks:
        fully_shard(block, mp_policy=narrow, reshard_after_forward=reshard_after_forward, **options)
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    return fully_shard(model, mp_policy=wide, reshard_after_forward=False, **options)


def compile_blocks(model: nn.Module, half_the_activations: bool) -> None:
    """Have each of `model.blocks` compiled at its first call, with the settings of torch that this needs."""
    torch._functorch.config.activation_memory_budget = 0.5 if half_the_activations else 1.0
    # Without this the products in our own operators would count for nothing.
    torch._functorch.config.is_non_builtin_to_include = True
    torch._dynamo.config.recompile_limit = 16
    # Our Triton kernels launched as the compiler's own are, in C++ instead of Python.
    torch._inductor.config.static_launch_user_defined_triton_kernels = True
    for block in model.blocks:
        block.compile(fullgraph=True)


def materialise(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Give a model that was built on the meta device its memory, and every buffer its value.

    The weights are garbage still. `to_empty` leaves buffers as garbage, too, and a state dict brings back the
    persistent ones only. Here a module's own method `init_buffers()` sets them; torch's norms (BatchNorm and
    its kin) start their statistics anew. Raises TypeError for a module that has buffers and neither.
    """
    model.to_empty(device=device)
    for name, module in model.named_modules():
        unset = {key for key, _ in module.named_buffers(recurse=False)}
        if hasattr(module, "reset_running_stats"):
            module.reset_running_stats()
            unset -= RUNNING_STATS
        if hasattr(module, "init_buffers"):
            module.init_buffers()
            unset = set()
        if unset:
            where, kind = name or "the model", type(module).__name__
            names = ", ".join(sorted(unset))
            raise TypeError(
                f"{where}, a {kind}, has buffers that nobody sets after the meta device: {names}. "
                f"Give {kind} a method init_buffers() that does"
            )
    return model


# ---- one step


def sync_gradients(model: nn.Module, yes: bool) -> None:
    """Whether the next backward averages gradients over the processes: a step's last micro-batch does."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(yes)


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Scale the gradients of what `optimizer` trains, on all processes, to a global norm of at most
    `max_norm`, 0 for no limit; no host waits.

    Returns the norm before that, 0-d and plain. All processes together.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return to_plain(nn.utils.clip_grad_norm_(parameters, max_norm or math.inf))


# ---- sharded and whole


def compile_graphs(
    compiled: bool,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_once: Callable[[], object],
    evaluate_once: Callable[[], object],
) -> dict[str, float]:
    """Let two steps that are taken for their graphs' sake compile them, if the model is `compiled` at all.

    Returns how long that took and how many graphs were compiled, on this process. That no weight changes is
    the steps' own affair. Buffers are afterwards what they were before (a BatchNorm's statistics, say), and
    states that the optimiser made for a first step, which was none, are gone.
    """
    stats = torch._dynamo.utils.counters["stats"]
    began, before = time.perf_counter(), stats["unique_graphs"]
    training = before
    if compiled:
        buffers = [buffer.clone() for buffer in model.buffers()]
        stepped = set(optimizer.state)
        train_once()
        training = stats["unique_graphs"]
        evaluate_once()
        for buffer, value in zip(model.buffers(), buffers):
            buffer.copy_(value)
        for p in set(optimizer.state) - stepped:
            del optimizer.state[p]
    return {
        "seconds": time.perf_counter() - began,
        "graphs_compiled": training - before,
        "eval_graphs_compiled": stats["unique_graphs"] - training,
    }


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Matrix products in bfloat16 inside, where that is the compute type."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def set_up_device(device: torch.device, width: int) -> None:
    """How this process computes, in one place: TF32 on a GPU; on a CPU the number of threads for a model's
    width.

    Narrow models get one OpenMP thread, because several would mostly wait for each other.

    A parallel region of such a model takes microseconds. As soon as another process wants a core, one thread
    of the region is late, and all others spin for it. An explicit OMP_NUM_THREADS decides otherwise.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    elif "OMP_NUM_THREADS" not in os.environ and width < NARROW:
        torch.set_num_threads(1)


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Inside, a GPU's products and convolutions in float32 are TF32's ("high") or not ("highest")."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextlib.contextmanager
def unsharded(module: nn.Module) -> Iterator[nn.Module]:
    """The module's own FSDP group gathered: `parameters()` are then what its forward sees. No-op without
    FSDP."""
    if isinstance(module, FSDPModule):
        module.unshard()
    yield module
    if isinstance(module, FSDPModule):
        module.reshard()


def reshard(model: nn.Module) -> None:
    """Back to shards, root included.

    Trap: a forward without backward (evaluation) leaves the root unsharded, its `parameters()` are then
    temporaries, and an optimiser built on them or a requires_grad set on them is lost with the next step.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def copy_over(weight: Tensor, target: Tensor) -> None:
    """Copy a tensor into a parameter of the same name, on the same mesh: another phase's, say.

    Sharded, each process copies its own shards; where the target is whole, all processes gather it together.
    """
    is_sharded = isinstance(target, DTensor)
    target.copy_(weight if is_sharded else to_plain(weight))


def to_plain(tensor: Tensor) -> Tensor:
    """A DTensor gathered whole (a collective: every process must call), a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
