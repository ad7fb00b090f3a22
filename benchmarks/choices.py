"""What several commands have in common: models, adapters' ranks, noise to train on, the device's name."""

import itertools
import os
import random
from collections.abc import Iterator
from typing import Literal

import torch

from data.datasets import get_spec
from data.loader import Batch
from lora.ranks import Ranks
from model.variants import LORA_FAMILIES, VARIANTS

IMAGENET = 1_281_167  # its training images
Model = Literal[*VARIANTS]
RankChoice = Literal["mixed", "8", "16", "32", "64"]


def get_ranks(choice: RankChoice, model: str) -> Ranks:
    """family -> rank of each layer: one for all, or "mixed": 8, 16, 32 or 64, drawn once and for all."""
    depth = VARIANTS[model]["depth"]
    if choice != "mixed":
        return {family: [int(choice)] * depth for family in LORA_FAMILIES}
    rng = random.Random(0)
    return {family: [rng.choice((8, 16, 32, 64)) for _ in range(depth)] for family in LORA_FAMILIES}


def repeat_noise(
    dataset: str, batch_size: int, device: torch.device, image_size: int | None = None
) -> Iterator[Batch]:
    """One batch over and over, as a loader of `dataset` yields them: images uint8 (B, 3, H, W) channels_last,
    labels int64 (B,). `image_size`: as Config's."""
    spec = get_spec(dataset, image_size)
    size, classes = spec.image_size, spec.num_classes
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch_size, size, size, 3), dtype=torch.uint8, generator=rng)
    labels = torch.randint(classes, (batch_size,), generator=rng)
    return itertools.repeat((images.to(device).permute(0, 3, 1, 2), labels.to(device)))


def describe_device() -> str:
    """The GPU's name, or the CPU's and how many threads torch has there."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = "a CPU"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    return f"{torch.get_num_threads()} threads of {name}"
