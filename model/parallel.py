"""How a model is spread over GPUs and compiled: one place, one order."""

import contextlib
import os

import torch
import torch._dynamo.config
import torch._functorch.config  # not there before something else imports it
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from model import distributed


def build_mesh(dp_shard: int | None, device_type: str) -> DeviceMesh | None:
    """The ranks as dp_replicate × dp_shard; None with one process. `dp_shard=None`: shard inside a node, replicate across nodes.

    1 is plain replication, the world size plain FSDP, anything between HSDP. Raises ValueError if it doesn't divide the ranks.
    """
    ranks = distributed.get_world_size()
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    shards = dp_shard or (per_node if ranks % per_node == 0 else ranks)
    if ranks % shards:
        raise ValueError(f"dp_shard {shards} does not divide the {ranks} ranks of this run")
    if ranks == 1:
        return None
    mesh = init_device_mesh(device_type, (ranks // shards, shards), mesh_dim_names=("dp_replicate", "dp_shard"))
    for dim in range(2):
        dist.set_timeout(distributed.TIMEOUT, mesh.get_group(dim))  # a group of some of the ranks starts with torch's own 30 minutes
    return mesh if shards < ranks else mesh["dp_shard"]  # without replicas there is nothing to all-reduce


def parallelize(model: nn.Module, mesh: DeviceMesh | None = None, compile: bool = False, dtype: torch.dtype = torch.float32,
                activation_checkpointing: str = "none", reshard_after_forward: bool = True, replicate_frozen: bool = True) -> nn.Module:
    """Activation checkpointing, then compilation of each block of `model.blocks`, then FSDP2 (fully_shard) of each block and the root.

    Checkpointing: "block" keeps only a block's input and recomputes the rest in backward; "selective" lets the compiler choose what
    to recompute so that half the activations stay.

    Compilation is in place (`block.compile()`), so that no parameter gets an `_orig_mod.` name, and regional: a block is traced once
    and all blocks share the graph. A whole run needs 4 training graphs (full 1, warmup 1, lora 2: the first block's input needs
    no gradient there) and 1 for evaluation in each phase, whatever the depth and the ranks (`lora.inject.mark_ranks_dynamic`).
    The recompile limit counts per code object, so over all blocks and phases; with fullgraph a run that hits it stops,
    without it would silently go on in eager mode.

    FSDP2, with a mesh: float32 shards are the masters, blocks are gathered in `dtype`, gradients reduced in float32. The root's few
    parameters (embeddings, last norm, head) are gathered in float32: the residual stream starts there and stays float32, as
    under autocast on one GPU. With `replicate_frozen` what needs no gradient stays a plain tensor on every rank and goes
    off the wire; never use it on parameters that are trained, they would not be reduced.
    """
    if activation_checkpointing == "selective" and not compile:
        raise ValueError("activation_checkpointing selective is the compiler's choice: it needs --compile True")
    model.grad_checkpointing = activation_checkpointing == "block"
    if compile:
        torch._functorch.config.activation_memory_budget = 0.5 if activation_checkpointing == "selective" else 1.0
        torch._functorch.config.is_non_builtin_to_include = True  # else it would take our operators' products for free
        torch._dynamo.config.recompile_limit = 16
        for block in model.blocks:
            block.compile(fullgraph=True)
    if mesh is None:
        return model
    shards = mesh.size(-1)

    def place(p: nn.Parameter) -> Shard:
        # An A of 8 rows would be padded to one row a rank, 64 of 64: along its input it shards without padding.
        return Shard(1 if p.ndim == 2 and p.shape[0] % shards and p.shape[1] % shards == 0 else 0)

    options = dict(mesh=mesh, shard_placement_fn=place,
                   ignored_params={p for p in model.parameters() if replicate_frozen and not p.requires_grad})
    narrow = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mp_policy=narrow, reshard_after_forward=reshard_after_forward, **options)
    return fully_shard(model, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), reshard_after_forward=False, **options)


@contextlib.contextmanager
def unsharded(module: nn.Module):
    """The module's own FSDP group gathered: `module.parameters()` are then the tensors its forward sees. No-op without FSDP."""
    if isinstance(module, FSDPModule):
        module.unshard()
    yield module
    if isinstance(module, FSDPModule):
        module.reshard()


def reshard(model: nn.Module) -> None:
    """Back to shards, root included. Trap: a forward without backward (evaluation) leaves the root unsharded, its `parameters()`
    are then temporaries, and an optimiser built on them or a requires_grad set on them is lost with the next step."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def to_plain(tensor: Tensor) -> Tensor:
    """A DTensor gathered whole (a collective: every rank must call), a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
