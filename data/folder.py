"""torchvision's data sets and DataLoader with the interface and the batches of data/loader.py, where FFCV cannot run.

python -m data.folder fashion_mnist DIR     # prepares the raw files: from Debian's package, else torchvision's download
"""
import argparse
import gzip
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import FashionMNIST

from data.augment import count_batches, default_workers, empty_batch, get_epoch_indices, get_indices, to_batch

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def prepare_fashion_mnist(root):
    """Put Fashion-MNIST's four files into root/FashionMNIST/raw, where torchvision looks. A second call does nothing.

    Raises RuntimeError if neither Debian's package nor the network has them.
    """
    raw = Path(root) / "FashionMNIST" / "raw"
    if all((raw / name).exists() for name in FILES):
        return
    if all((DEBIAN / f"{name}.gz").exists() for name in FILES):
        raw.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            partial = raw / f"{name}.{os.getpid()}.tmp"  # a half-written file must not look like a finished one
            with gzip.open(DEBIAN / f"{name}.gz") as source, open(partial, "wb") as target:
                shutil.copyfileobj(source, target)
            os.replace(partial, raw / name)
        return
    try:
        FashionMNIST(root, download=True)
    except (OSError, RuntimeError) as error:
        raise RuntimeError("Fashion-MNIST is neither here as Debian's package (apt-get install dataset-fashion-mnist) "
                           f"nor can it be downloaded: {error}") from error


def open_dataset(dataset, root, split):
    """The torchvision data set of `split` ("train" or "val") under `root`: items (PIL image, label), `.classes`.

    Raises ValueError for an unknown name, FileNotFoundError where the files are not there.
    """
    if dataset != "fashion_mnist":
        raise ValueError(f"unknown data set {dataset!r}: expected fashion_mnist")
    if split not in ("train", "val"):
        raise ValueError(f"unknown split {split!r}: expected train or val")
    if not all((Path(root) / "FashionMNIST" / "raw" / name).exists() for name in FILES):
        raise FileNotFoundError(f"no Fashion-MNIST under {root}: make it with "
                                f"`python -m data.folder fashion_mnist {root}`")
    try:
        source = FashionMNIST(root, train=split == "train")
    except (ValueError, RuntimeError) as error:  # a file cut short
        raise ValueError(f"Fashion-MNIST's {split} files under {root} are damaged ({error}): "
                         f"delete {root}/FashionMNIST and make it anew") from error
    labels = source.targets
    if len(labels) != len(source.data) or not 0 <= labels.min() <= labels.max() < len(source.classes):
        raise ValueError(f"Fashion-MNIST's {split} files under {root} do not belong together: {len(source.data)} images, "
                         f"{len(labels)} labels from {labels.min()} to {labels.max()}")
    return source


class RGBImages(Dataset):
    """A torchvision data set with items (uint8 (H, W, 3) array, int): what a .beton holds and the augmentations take."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        image, label = self.source[index]
        return np.array(image.convert("RGB")), int(label)


def _collate(samples):
    images, labels = zip(*samples)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)  # (n, H, W, 3), (n,)


def _init_worker(worker):
    # Meant for the main process, which saves and then ends its workers; a scheduler sends them to every process of the job.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class FolderLoader:
    """The interface of FFCVLoader (see there) and its batches to the bit, read by torchvision."""

    backend = "folder"

    def __init__(self, dataset, data_dir, split, batch_size, seed, num_workers=None, num_samples=None, augmentations=(), rank=0,
                 ranks=1):
        source = open_dataset(dataset, data_dir, split)
        self.images, self.num_classes = RGBImages(source), len(source.classes)
        self.train, self.batch_size, self.seed = split == "train", batch_size, seed
        self.indices = get_indices(len(source), self.train, batch_size, num_samples, ranks)
        self.rank, self.ranks, self.image_size = rank, ranks, self.images[0][0].shape[0]
        self.num_samples = len(self.indices)
        cpus = len(os.sched_getaffinity(0))
        self.num_workers = default_workers() if num_workers is None else num_workers
        if not 0 <= self.num_workers <= cpus:
            raise ValueError(f"num_workers is {num_workers}: expected 0 to {cpus}, the CPUs this process may use")
        self.augmentations = augmentations if self.train else ()

    def __len__(self):
        return count_batches(self.num_samples, self.train, self.batch_size, self.ranks)

    def epoch(self, epoch, start_batch=0):
        """Iterator of (images, labels), as FFCVLoader.epoch, except that two may run at a time."""
        order = get_epoch_indices(self.indices, self.train, self.batch_size, self.seed, epoch, start_batch, self.rank, self.ranks)
        return self._iterate(order, epoch, len(self) - start_batch)

    def _iterate(self, order, epoch, num_batches):
        batches = [order[i: i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        loader = DataLoader(self.images, batch_sampler=[indices.tolist() for indices in batches], collate_fn=_collate,
                            num_workers=self.num_workers, worker_init_fn=_init_worker,
                            generator=torch.Generator())  # else it draws from the global one, which dropout uses
        for indices, (images, labels) in zip(batches, loader):
            images = images.numpy()
            for function, *args in self.augmentations:  # here, not in the workers: numba's threads do not survive a fork
                augmented = np.empty_like(images)
                function(images, augmented, indices, self.seed, epoch, *args)
                images = augmented
            yield to_batch(images, labels.numpy(), self.batch_size)
        for _ in range(num_batches - len(batches)):
            yield empty_batch(self.batch_size, self.image_size)

    def close(self):
        """Nothing: an epoch's workers end with its iterator."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["fashion_mnist"])
    parser.add_argument("dir", help="where to: DIR/FashionMNIST/raw/*-ubyte")
    arguments = parser.parse_args()
    try:
        prepare_fashion_mnist(arguments.dir)
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
