"""An exponential moving average (EMA) of the weights, beside them on the device, through all phases.

After every optimiser step e <- d e + (1 - d) w, of each trained parameter w, in float32: the arithmetic of
timm.utils.ModelEmaV3, whose --model-ema-decay is d. It averages over about 1 / (1 - d) steps.

The averages begin as the weights do, adapters' at the switch that puts them in. From the freeze on the base
is constant, W, and its averages tend towards it by a closed form: n steps after the freeze e = W + d^n
(e0 - W). So e0, the average at the freeze, is kept as it was, and the LoRA phase's steps touch the adapters
alone. Buffers are not averaged: with the averages a model has the buffers of its last step (a BatchNorm's
statistics, say), as with timm's exclude_buffers.

Sharded parameters have sharded averages. An update sends nothing, waits for nothing, and moves 12 bytes a
parameter of this process's shards (it reads e and w and writes e) where AdamW moves 28. They take 4 bytes a
parameter; of a base that is frozen and whole on every process, each still holds its shard of e0 alone.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from model.checkpoint import get_base, on_process_0, read
from model.parallel import copy_over, reshard
from model.tensors import get_stored


class Ema:
    """The averages of a model's parameters. With `decay` 0 there are none, and nothing here does anything.

    `mesh`: that over which the model is sharded, None for one process.
    """

    def __init__(self, model: nn.Module, decay: float, mesh: DeviceMesh | None = None):
        self.decay, self.mesh = decay, mesh
        self.averages: dict[str, Tensor] = {}  # of what is frozen, as it was when it was frozen: e0
        self.trained: dict[str, nn.Parameter] = {}
        self.share = 0.0  # d^n, what is left of e0 - W; 0 where no e0 is kept
        self.follow(model)

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Average what `model`, the next phase's, trains: parameters that are new join with their values."""
        if not self.decay:
            return
        reshard(model)
        frozen_so_far = self.averages.keys() - self.trained.keys()
        self.trained = {}
        for name, p in model.named_parameters():
            if name in frozen_so_far:  # n begins anew here, for all that is frozen
                self.averages[name] = self.get_frozen_average(name, get_part(p, self.averages[name]))
            if p.requires_grad:
                self.trained[name] = p
                self.averages.setdefault(name, p.detach().clone())
        self.share = 1.0 if self.averages.keys() - self.trained.keys() else 0.0

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights after an optimiser step. (A step that was skipped ends the
        run before anything is saved.)"""
        if not self.decay:
            return
        # FSDP may replace a parameter's local tensor, so that it is asked for anew.
        averages = [get_local(self.averages[name]) for name in self.trained]
        weights = [get_local(p) for p in self.trained.values()]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)
        self.share *= self.decay

    def get_frozen_average(self, name: str, weights: Tensor) -> Tensor:
        """The average of a frozen parameter as it is now. `weights`: the parameter, placed as its average."""
        return torch.lerp(weights, self.averages[name], self.share)

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> dict[str, Tensor]:
        """The averages in the place of the weights. Returns copies of these, by name, placed as the averages.

        A frozen parameter without an average keeps its value. All processes together: shards of what is whole
        in the model are gathered, one parameter at a time.
        """
        reshard(model)
        weights = {}
        for name, p in model.named_parameters():
            if name in self.averages:
                average = self.averages[name]
                weights[name] = get_part(p, average)
                if name not in self.trained:
                    average = self.get_frozen_average(name, weights[name])
                copy_over(average, p)
        return weights

    @contextlib.contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` has the averages; afterwards its weights again, to the bit. No graph is compiled
        for it.

        After an exception the averages stay there: a process that fails alone would wait for the others.
        """
        weights = self.put_into(model)
        yield
        reshard(model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in weights:
                    copy_over(weights[name], p)

    # ---- in a checkpoint: ema.NAME, and ema_share

    def get_tensors(self) -> dict[str, Tensor]:
        """What `checkpoint.save` is to write besides: `ema.NAME` of each average, and ema_share."""
        if not self.decay:
            return {}
        averages = {f"ema.{name}": tensor for name, tensor in self.averages.items()}
        return averages | {"ema_share": torch.tensor(self.share, dtype=torch.float64)}

    def load(self, path: Path, model: nn.Module) -> bool:
        """Go on with the averages of the checkpoint at `path`, whose weights `model` has. Returns whether it
        has any: if not, they begin at these weights.

        Those of a frozen base are read from where the base is. All processes together. Raises SharedError as
        `checkpoint.load` does.
        """
        if not self.decay or not on_process_0(get_stored, path, "ema."):
            return False
        share = torch.zeros((), dtype=torch.float64)
        trained = {f"ema.{name}": self.averages[name] for name in self.trained}
        read(path, trained | {"ema_share": share})
        self.share = share.item()
        if not self.share:  # nothing of an e0 is left, or there never was one
            return True
        frozen = {name: p for name, p in model.named_parameters() if name not in self.trained}
        for where in filter(None, (path, on_process_0(get_base, path))):
            stored = on_process_0(get_stored, where, "ema.")
            there = [name for name in frozen if name in stored and name not in self.averages]
            self.averages |= {name: self.shard(frozen[name]) for name in there}
            if there:
                read(where, {f"ema.{name}": self.averages[name] for name in there})
        return True

    def shard(self, p: nn.Parameter) -> Tensor:
        """A copy of a parameter, of which each process has a shard where there is a mesh."""
        if self.mesh is None or isinstance(p, DTensor):
            return p.detach().clone()
        placements = [Replicate()] * (self.mesh.ndim - 1) + [Shard(0)]
        return distribute_tensor(p.detach(), self.mesh, placements, src_data_rank=None).clone()


def get_local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor, a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def get_part(p: nn.Parameter, like: Tensor) -> Tensor:
    """A copy of a parameter that is placed as `like`, without traffic: sharded or whole."""
    weights = p.detach()
    if isinstance(like, DTensor) and not isinstance(weights, DTensor):
        weights = distribute_tensor(weights, like.device_mesh, like.placements, src_data_rank=None)
    return weights.clone()
