"""Images that are made up: to try a cluster, a model's size or a step's speed without any data."""

from collections.abc import Iterator

import numpy as np
import torch

from data.batch import empty_batch, to_batch
from data.datasets import LoaderOptions
from data.order import SYNTHETIC, count_batches, get_epoch_indices, get_generator, get_indices

POOL = 64  # different images; of 224 pixels they take 10 MB
SIZES = {"train": 65_536, "val": 64}  # images of an epoch, unless train_samples says otherwise


class SyntheticLoader:
    """A Loader (data/loader.py) without files, augmentation or workers.

    Image i is noise number i % POOL, its label that number modulo the classes, so a model can learn them by
    heart.
    """

    backend = "synthetic"
    classes = None
    notes = ()

    def __init__(self, options: LoaderOptions) -> None:
        self.options = options
        self.train, self.batch_size = options.train, options.batch_size
        self.num_classes = options.num_classes
        self.num_samples = options.num_samples or max(SIZES[options.split], options.world_size)
        self.indices = get_indices(
            self.num_samples, options.train, options.batch_size, None, options.world_size
        )
        side = options.spec.image_size
        generator = get_generator(SYNTHETIC, 0, 0)
        self.images = generator.integers(0, 256, (POOL, side, side, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return count_batches(self.num_samples, self.train, self.batch_size, self.options.world_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See Loader.epoch."""
        o = self.options
        order = get_epoch_indices(
            self.indices, o.train, o.batch_size, o.seed, epoch, start_batch, o.world_rank, o.world_size
        )
        return self._iterate(order % POOL, len(self) - start_batch)

    def _iterate(self, order: np.ndarray, num_batches: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for first in range(0, num_batches * self.batch_size, self.batch_size):
            numbers = order[first : first + self.batch_size]
            if len(numbers):
                yield to_batch(self.images[numbers], numbers % self.num_classes, self.batch_size)
            else:
                yield empty_batch(self.batch_size, self.options.spec.image_size)

    def close(self) -> None:
        """Nothing to end."""
