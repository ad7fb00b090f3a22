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
from PIL import Image, ImageOps
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import FashionMNIST, ImageFolder, imagenet
from torchvision.transforms.functional import center_crop, resize, resized_crop

from data.augment import (GREY, OPERATIONS, get_arguments, get_choice, get_flip, get_random_crop, get_shift, rand_augment, random_flip,
                          random_shift)
from data.loader import DATASETS
from data.order import DataError, check_classes, count_batches, default_workers, empty_batch, get_epoch_indices, get_indices, to_batch

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


def read_image(path):
    """A file of any format that Pillow reads as an RGB image, upright: EXIF's orientation is applied, an alpha channel dropped.
    Raises DataError, naming the file."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") and (pixels := np.asarray(image)).max() > 255:  # 16 bits: Pillow would cut off the upper
                image = Image.fromarray((pixels >> 8).clip(0, 255).astype(np.uint8))
            elif image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # Pillow warns otherwise
            return image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise what they like: OSError, SyntaxError, ValueError, struct.error, …
        raise DataError(f"{path} cannot be read as an image: {error}") from error


class ImageTree(ImageFolder):
    """torchvision's ImageFolder of every format that Pillow reads, by read_image. `ignored`: files with names of no such format."""

    def __init__(self, root):
        extensions, self.ignored = tuple(Image.registered_extensions()), []

        def is_image(path):
            if not path.lower().endswith(extensions):
                self.ignored.append(path)
            return path.lower().endswith(extensions)

        if not Path(root).is_dir():
            raise FileNotFoundError(f"there is no folder {root}: expected {root}/CLASS/IMAGE.jpg")
        super().__init__(root, loader=read_image, is_valid_file=is_image, allow_empty=True)
        if not self.samples:
            raise FileNotFoundError(f"no images under {root}: expected {root}/CLASS/IMAGE.jpg")
        self.is_valid_file = None  # else it could not be sent to processes

    def empty_classes(self):
        """Names of the class folders without an image."""
        return [self.classes[label] for label in sorted(set(range(len(self.classes))) - set(self.targets))]


def open_dataset(dataset, root, split):
    """The torchvision data set of `split` ("train" or "val") under `root`: items (PIL image, label), `.classes`.

    Of ImageNet the tree root/split/CLASS/IMAGE. Raises ValueError for an unknown name, FileNotFoundError where the files are not there.
    """
    if split not in ("train", "val"):
        raise ValueError(f"unknown split {split!r}: expected train or val")
    if dataset == "imagenet":
        return ImageTree(Path(root) / split)
    if dataset != "fashion_mnist":
        raise ValueError(f"unknown data set {dataset!r}: expected fashion_mnist or imagenet")
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


def unpack_imagenet(root, split):
    """Make the tree root/split/CLASS/IMAGE from ILSVRC2012's own tars and devkit in `root`, by torchvision, which checks their
    sums. It appears under its name only when whole; a second call does nothing. Raises FileNotFoundError or RuntimeError."""
    tree, partial = root / split, root / f"{split}.tmp"
    if tree.is_dir():
        return
    for name in (f"ILSVRC2012_img_{split}.tar", *["ILSVRC2012_devkit_t12.tar.gz"] * (split == "val")):
        if not (root / name).exists():
            raise FileNotFoundError(f"neither {tree}/CLASS/IMAGE.jpg is there nor {root / name}")
    shutil.rmtree(partial, ignore_errors=True)
    if split == "train":
        imagenet.parse_train_archive(root, folder=partial.name)
    else:
        imagenet.parse_devkit_archive(root)  # says which class each image is of
        imagenet.parse_val_archive(root, folder=partial.name)
    os.replace(partial, tree)


# ---------------------------------------------------------------------------------------------------------------------------------
# the loader

def shift(image, seed, epoch, index, pad):
    """random_shift of one Pillow image; the next two are random_flip and rand_augment, that one by timm's own operations."""
    down, right = get_shift(seed, epoch, index, pad)
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, -right, 0, 1, -down))


def flip(image, seed, epoch, index):
    return ImageOps.mirror(image) if get_flip(seed, epoch, index) else image


def timm_rand_augment(image, seed, epoch, index, layers, magnitude):
    arguments = get_arguments(magnitude)
    for layer in range(layers):
        operation, sign = get_choice(seed, epoch, index, layer)
        name, argument = OPERATIONS[operation], sign * arguments[operation]
        if name == "Posterize" and argument < 1:
            image = Image.new("RGB", image.size)  # no bits are kept; Pillow refuses to
        else:
            argument = int(argument) if name in ("Posterize", "Solarize", "SolarizeAdd") else argument
            arguments_of_timm = () if LEVEL_TO_ARG[name] is None else (argument,)
            image = NAME_TO_OP[name](image, *arguments_of_timm, fillcolor=(GREY,) * 3, resample=Image.Resampling.BILINEAR)
    return image


PILLOW = {random_shift: shift, random_flip: flip, rand_augment: timm_rand_augment}  # of each augmentation, on one image


class EpochImages(Dataset):
    """An epoch's images, (uint8 (S, S, 3), label), cropped and resized by torchvision and augmented by Pillow and timm."""

    def __init__(self, source, spec, train, seed, epoch, augmentations):
        self.source, self.spec, self.train, self.seed, self.epoch, self.augmentations = source, spec, train, seed, epoch, augmentations

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        side, key = [self.spec.image_size] * 2, (self.seed, self.epoch, index)
        try:
            image, label = self.source[index]
        except DataError as error:
            return error, index  # for the main process to raise: on its way an exception would collect tracebacks
        image = image.convert("RGB")
        if self.train and self.spec.min_area:
            image = resized_crop(image, *get_random_crop(image.height, image.width, self.spec.min_area, *key), side)
        elif image.size != tuple(side) or self.spec.short_side != side[0]:
            image = center_crop(resize(image, self.spec.short_side), side)
        for function, *args in self.augmentations:
            image = PILLOW[function](image, *key, *args)
        return np.array(image), label


def _collate(samples):
    images, labels = zip(*samples)
    for image in images:
        if isinstance(image, DataError):
            return image
    return np.stack(images), np.array(labels)  # (n, S, S, 3), (n,)


# Meant for the main process, which saves and then ends its workers; a scheduler sends them to every process of the job.
FOR_MAIN_PROCESS = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2


def _init_worker(worker):
    for number in FOR_MAIN_PROCESS:
        signal.signal(number, signal.SIG_IGN)  # and forget it, if it came since the fork
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_MAIN_PROCESS)


def _start_workers(loader):
    """iter(loader). The workers are born with the signals blocked: one that came before _init_worker would end them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_MAIN_PROCESS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class FolderLoader:
    """The interface of FFCVLoader (see there), read by torchvision: its batches to the bit where the .beton holds the same pixels."""

    backend = "folder"

    def __init__(self, dataset, data_dir, split, batch_size, seed, num_workers, num_samples, num_classes, augmentations, rank, ranks):
        self.source, self.spec, self.num_classes = open_dataset(dataset, data_dir, split), DATASETS[dataset], num_classes
        self.classes = list(self.source.classes)
        check_classes(f"{split} of {data_dir}", self.classes, num_classes)
        self.train, self.batch_size, self.seed, self.augmentations = split == "train", batch_size, seed, augmentations
        self.indices = get_indices(len(self.source), self.train, batch_size, num_samples, ranks)
        self.rank, self.ranks, self.image_size = rank, ranks, self.spec.image_size
        self.num_samples = len(self.indices)
        cpus = len(os.sched_getaffinity(0))
        self.num_workers = default_workers() if num_workers is None else num_workers
        if not 0 <= self.num_workers <= cpus:
            raise ValueError(f"num_workers is {num_workers}: expected 0 to {cpus}, the CPUs this process may use")
        image = Image.new("RGB", (self.image_size,) * 2)  # compile now and once, not in the first batch and in every process
        get_random_crop(*image.size, 0.5, seed, 0, 0)
        for function, *args in augmentations:
            PILLOW[function](image, seed, 0, 0, *args)

    def __len__(self):
        return count_batches(self.num_samples, self.train, self.batch_size, self.ranks)

    def epoch(self, epoch, start_batch=0):
        """Iterator of (images, labels), as FFCVLoader.epoch, except that two may run at a time."""
        order = get_epoch_indices(self.indices, self.train, self.batch_size, self.seed, epoch, start_batch, self.rank, self.ranks)
        return self._iterate(order, epoch, len(self) - start_batch)

    def _iterate(self, order, epoch, num_batches):
        batches = [order[i: i + self.batch_size].tolist() for i in range(0, len(order), self.batch_size)]
        images = EpochImages(self.source, self.spec, self.train, self.seed, epoch, self.augmentations)
        loader = DataLoader(images, batch_sampler=batches, collate_fn=_collate, num_workers=self.num_workers, worker_init_fn=_init_worker,
                            generator=torch.Generator())  # else it draws from the global one, which dropout uses
        try:
            for batch in _start_workers(loader):
                if isinstance(batch, DataError):
                    raise batch
                yield to_batch(*batch, self.batch_size)
        except RuntimeError as error:  # "DataLoader worker (pid 17) is killed by signal: …"
            raise DataError(f"a loader process failed: {error}") from error
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
