"""The mean of the base's weights at the ends of the last epochs before the freeze: there it is frozen.

A mean of weights along a run is close to where a falling learning rate would take them (LAWA, 2209.14981): it
anneals the base without a step. The base is all that is no adapter: head, norms and embeddings are set to
their means, too, and go on from there where they are trained. Adapters keep their last values.

Sharded weights have sharded means, and nothing is sent. They take 4 bytes a parameter of this process's
shards while there is a mean: in the epochs that count, of each window where the switch may come at its end.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from model.checkpoint import on_process_0, read
from model.optim import get_adapters
from model.parallel import copy_over, reshard
from model.tensors import get_stored


class WeightMean:
    """The mean of a model's parameters, adapters' apart, over `count` epochs' ends."""

    def __init__(self):
        self.count = 0
        self.means: dict[str, Tensor] = {}

    @torch.no_grad()
    def end_epoch(self, model: nn.Module, position: int) -> None:
        """Count the weights at an epoch's end in. `position`: which of the epochs it is, from 1; 0 is none of
        them, and then there is no mean. One that has counted more epochs than that reaches back too far (the
        freeze was put off), and begins anew."""
        if self.count >= position:
            self.count, self.means = 0, {}
        if not position:
            return
        reshard(model)
        self.count += 1
        for name, p in get_base_parameters(model).items():
            if self.count == 1:
                self.means[name] = p.detach().clone()
            else:
                self.means[name].lerp_(p.detach(), 1 / self.count)

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> int:
        """Set the base's weights to the mean, and forget it. Returns over how many epochs' ends it was; with
        0 the weights stay as they are."""
        reshard(model)
        for name, p in get_base_parameters(model).items():
            if name in self.means:
                copy_over(self.means[name], p)
        count, self.count, self.means = self.count, 0, {}
        return count

    # ---- in a checkpoint: mean.NAME, and mean_count

    def get_tensors(self) -> dict[str, Tensor]:
        """What `checkpoint.save` is to write besides."""
        if not self.count:
            return {}
        means = {f"mean.{name}": tensor for name, tensor in self.means.items()}
        return means | {"mean_count": torch.tensor(self.count)}

    def load(self, path: Path, model: nn.Module) -> bool:
        """Go on with the mean of the checkpoint at `path`. Returns whether there is one. All processes
        together. Raises SharedError as `checkpoint.load` does."""
        stored = on_process_0(get_stored, path, "mean.")
        if not stored:
            return False
        self.means = {}
        for name, p in get_base_parameters(model).items():
            if name in stored:
                self.means[name] = torch.empty_like(p.detach())
        count = torch.zeros((), dtype=torch.int64)
        read(path, {f"mean.{name}": tensor for name, tensor in self.means.items()} | {"mean_count": count})
        self.count = int(count)
        return True


def get_base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are no adapter's, by name."""
    adapters = get_adapters(model)
    return {name: p for name, p in model.named_parameters() if p not in adapters}
