"""What takes train.py's step for `bench.py step` and `bench.py switch`: ours in its three phases, and the
peers."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import train
from benchmarks.peers import build_peer
from data.datasets import DATASETS
from data.loader import Batch
from lora.inject import init_adapters
from lora.ranks import Ranks
from model.optim import build_optimizer
from monitor.log import FROZEN

PHASES = ("full", "warmup", "lora")
# title -> phase whose arithmetic it does
CONTENDERS = {
    "full": "full",
    "warmup": "warmup",
    "lora": "lora",
    "HF full": "full",
    "HF + PEFT": "lora",
    "timm full": "full",
}
LEARNING_RATE = 1e-4


@dataclass
class Contender:
    """A model and its optimiser, which take train.py's own step on `batches`."""

    cfg: train.Config
    model: nn.Module
    optimizer: Optimizer
    batches: Iterator[Batch]
    failed: Tensor  # set by a loss or gradient norm that is not finite; then nothing is updated any more

    def step(self) -> None:
        train.train_step(self.cfg, self.model, self.optimizer, self.batches, 0, LEARNING_RATE, self.failed)

    @property
    def device(self) -> torch.device:
        return self.failed.device

    def resident_bytes(self) -> int:
        """Bytes of the parameters and of the optimiser's state."""
        tensors = list(self.model.parameters())
        for state in self.optimizer.state.values():
            tensors += state.values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def build_contender(
    title: str, cfg: train.Config, ranks: Ranks, device: torch.device, batches: Iterator[Batch]
) -> Contender:
    """A contender with weights, its blocks (ours) or the whole of it (theirs) given to torch.compile.

    The peers' optimiser is fused AdamW over what trains, too. `title`: a key of CONTENDERS, or FROZEN."""
    torch.manual_seed(0)
    if title in PHASES or title == FROZEN:
        phase, frozen_blocks = (title, 0) if title in PHASES else ("full", cfg.freeze_blocks)
        model = train.build_model(cfg, phase, ranks, device, None, frozen_blocks)
        model.init_weights(0)
        init_adapters(model, 0)
        # Behind the zero head of a fresh model a frozen base's adapters would get gradients of zeros only,
        # and a GPU multiplies zeros at less power, so faster.
        nn.init.trunc_normal_(model.head.weight, std=0.02)
        optimizer = build_optimizer(model, cfg.weight_decay)
    else:
        model = build_peer(title, cfg.model, DATASETS[cfg.dataset].num_classes, ranks, device)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
    failed = torch.zeros((), dtype=torch.bool, device=device)
    return Contender(cfg, model.train(), optimizer, batches, failed)
