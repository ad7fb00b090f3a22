"""Images that are made up: to try a cluster, a model's size or a step's speed without any data."""

import numpy as np

from data.loader import DATASETS
from data.order import count_batches, empty_batch, get_epoch_indices, get_generator, get_indices, to_batch

SYNTHETIC = 4  # purpose of the random numbers, beside those of data/order.py
POOL = 64  # different images; of 224 pixels they take 10 MB
SIZES = {"train": 65_536, "val": 64}  # images of an epoch, unless train_samples says otherwise


class SyntheticLoader:
    """The interface of FFCVLoader (see there) without files, augmentation or workers: image i is noise number i % POOL, its label that
    number modulo the classes, so a model can learn them by heart."""

    backend, classes = "synthetic", None

    def __init__(self, dataset, data_dir, split, batch_size, seed, num_workers, num_samples, num_classes, augmentations, rank, ranks):
        self.train, self.batch_size, self.seed, self.num_classes = split == "train", batch_size, seed, num_classes
        total = num_samples or max(SIZES[split], ranks)
        self.indices, self.num_samples = get_indices(total, self.train, batch_size, None, ranks), total
        self.rank, self.ranks, self.image_size = rank, ranks, DATASETS[dataset].image_size
        self.images = get_generator(SYNTHETIC, 0, 0).integers(0, 256, (POOL, self.image_size, self.image_size, 3), dtype=np.uint8)

    def __len__(self):
        return count_batches(self.num_samples, self.train, self.batch_size, self.ranks)

    def epoch(self, epoch, start_batch=0):
        """Iterator of (images, labels), as FFCVLoader.epoch."""
        order = get_epoch_indices(self.indices, self.train, self.batch_size, self.seed, epoch, start_batch, self.rank, self.ranks)
        return self._iterate(order % POOL, len(self) - start_batch)

    def _iterate(self, order, num_batches):
        for first in range(0, num_batches * self.batch_size, self.batch_size):
            numbers = order[first: first + self.batch_size]
            if len(numbers):
                yield to_batch(self.images[numbers], numbers % self.num_classes, self.batch_size)
            else:
                yield empty_batch(self.batch_size, self.image_size)

    def close(self):
        """Nothing to end."""
