"""FLOPs of an image in a training step of a phase, as they are done."""

import torch

from benchmarks.contenders import PHASES
from data.datasets import get_spec
from lora.inject import use_reference
from lora.ranks import Ranks
from monitor.perf import count_flops
from train import Config, build_on_meta


def count_phases(cfg: Config, ranks: Ranks, batch_size: int) -> dict[str, int]:
    """{phase: FLOPs of an image} in micro-batches of `batch_size`, for whose images W + B A is made once."""
    images = get_meta_images(cfg, batch_size)
    return {phase: count_flops(build_on_meta(cfg, phase, ranks), images) for phase in PHASES}


def count_by_formula(cfg: Config, ranks: Ranks) -> int:
    """FLOPs of an image in the LoRA phase where adapters are computed as LoRA defines them, W x + B (A x): as
    PEFT does."""
    return count_flops(use_reference(build_on_meta(cfg, "lora", ranks)), get_meta_images(cfg, 1))


def get_meta_images(cfg: Config, batch_size: int) -> torch.Tensor:
    """Images (B, 3, H, W) of the data set on the meta device, without numbers."""
    size = get_spec(cfg.dataset, cfg.image_size).image_size
    return torch.empty(batch_size, 3, size, size, device="meta")
