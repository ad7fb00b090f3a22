"""FolderLoader: raw images by torchvision, Pillow and timm, where FFCV cannot run; the same batches.

python -m data.folder fashion_mnist DIR     # prepares the raw files: from Debian's package, else by download
"""

import argparse
import atexit
import multiprocessing
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    center_crop,
    resize,
    resized_crop,
)

from data.augment import get_choice, get_flip, get_jitters, get_random_crop, get_shift
from data.batch import empty_batch, to_batch
from data.children import FORK, become_child, signals_held
from data.datasets import LoaderOptions
from data.images import ImageTree, open_dataset, prepare_fashion_mnist
from data.order import (
    DataError,
    check_classes,
    count_batches,
    get_epoch_indices,
    get_indices,
    get_num_workers,
)
from data.randaugment import BRIGHTNESS, COLOR, CONTRAST, GREY, OPERATIONS, get_arguments
from errors import UserError, exit_with
from files import expand_home

# ---- augmentations, each what data/augment.py's of that name is, on one Pillow image


def shift(image: Image.Image, seed: int, epoch: int, index: int, pad: int) -> Image.Image:
    down, right = get_shift(seed, epoch, index, pad)
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, -right, 0, 1, -down))


def flip(image: Image.Image, seed: int, epoch: int, index: int) -> Image.Image:
    return ImageOps.mirror(image) if get_flip(seed, epoch, index) else image


def timm_rand_augment(
    image: Image.Image, seed: int, epoch: int, index: int, layers: int, magnitude: float
) -> Image.Image:
    """RandAugment by timm's own operations."""
    arguments = get_arguments(magnitude)
    options = {"fillcolor": (GREY,) * 3, "resample": Image.Resampling.BILINEAR}
    for layer in range(layers):
        operation, sign = get_choice(seed, epoch, index, layer)
        name, argument = OPERATIONS[operation], sign * arguments[operation]
        if name == "Posterize" and argument < 1:
            image = Image.new("RGB", image.size)  # no bits are kept; Pillow refuses to
        elif LEVEL_TO_ARG[name] is None:
            image = NAME_TO_OP[name](image, **options)
        elif name in ("Posterize", "Solarize", "SolarizeAdd"):
            image = NAME_TO_OP[name](image, int(argument), **options)
        else:
            image = NAME_TO_OP[name](image, argument, **options)
    return image


ADJUSTMENTS = {BRIGHTNESS: adjust_brightness, CONTRAST: adjust_contrast, COLOR: adjust_saturation}


def torchvision_color_jitter(
    image: Image.Image, seed: int, epoch: int, index: int, amount: float
) -> Image.Image:
    """Colour jitter by torchvision's own operations."""
    operations, factors = get_jitters(np.array([index]), seed, epoch, amount)
    for operation, factor in zip(operations[0].tolist(), factors[0].tolist()):
        image = ADJUSTMENTS[operation](image, factor)
    return image


AUGMENTATIONS = {
    "shift": shift,
    "flip": flip,
    "rand_augment": timm_rand_augment,
    "color_jitter": torchvision_color_jitter,
}  # f(image, seed, epoch, index, *args)


# ---- the loader

WAY_OUT = (
    "replace or remove the file, or train from a .beton, where data.beton --skip_bad leaves out such files"
)


class EpochImages(Dataset):
    """An epoch's images, (uint8 (S, S, 3), label), cropped, resized and augmented."""

    def __init__(self, source: Dataset, options: LoaderOptions, epoch: int) -> None:
        self.source, self.options, self.epoch = source, options, epoch

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[np.ndarray | DataError, int]:
        try:
            image, label = self.source[index]
        except DataError as error:
            error = DataError(f"{error}; {WAY_OUT}")
            return error, index  # for the main process to raise: on its way an exception collects tracebacks
        spec, key = self.options.spec, (self.options.seed, self.epoch, index)
        side = [spec.image_size] * 2
        image = image.convert("RGB")
        if self.options.train and spec.min_area:
            image = resized_crop(
                image, *get_random_crop(image.height, image.width, spec.min_area, *key), side
            )
        elif image.size != tuple(side) or spec.short_side != spec.image_size:
            image = center_crop(resize(image, spec.short_side), side)
        for name, *args in self.options.augmentations:
            image = AUGMENTATIONS[name](image, *key, *args)
        return np.array(image), label


def _collate(samples: list[tuple]) -> tuple[np.ndarray, np.ndarray] | DataError:
    images, labels = zip(*samples)
    for image in images:
        if isinstance(image, DataError):
            return image
    return np.stack(images), np.array(labels)  # (n, S, S, 3), (n,)


def _init_worker(worker: int) -> None:
    become_child()


def _start_workers(loader: DataLoader) -> Iterator[Any]:
    """iter(loader). torch's own workers look for their parent every five seconds, and only between images."""
    with signals_held():
        return iter(loader)


def _stop_workers(batches: Iterator[Any]) -> None:
    """End what _start_workers began, now: while a traceback holds `batches`, torch leaves the workers alone.

    Collected as garbage later, torch no longer reaches them, and waits for each a while.
    """
    if hasattr(batches, "_shutdown_workers"):  # with num_workers = 0 there are none
        batches._shutdown_workers()


_epochs = weakref.WeakSet()  # iterators that may not have come to their end


@atexit.register
def _close_epochs() -> None:
    """End the workers of epochs that a traceback broke off, and those that Ctrl-C met as they were started.

    Python's own exit sends SIGTERM to such processes, which ours ignore, and then waits for them for ever.
    """
    for epoch in list(_epochs):
        epoch.close()
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class FolderLoader:
    """A Loader (data/loader.py) that reads raw images. Two epochs may run at a time."""

    backend = "folder"

    def __init__(self, options: LoaderOptions) -> None:
        self.options = o = options
        self.train, self.batch_size, self.num_classes = o.train, o.batch_size, o.num_classes
        self.source = open_dataset(o.dataset, o.data_dir, o.split)
        self.classes = list(self.source.classes)
        check_classes(f"{o.split} of {o.data_dir}", self.classes, o.num_classes, self.source.targets)
        self.notes = self.source.describe_rest() if isinstance(self.source, ImageTree) else []
        self.indices = get_indices(len(self.source), o.train, o.batch_size, o.num_samples, o.world_size)
        self.num_samples = len(self.indices)
        self.num_workers = get_num_workers(o.num_workers, least=0)
        # Compile now and once, not in the first batch and in every process.
        image = Image.new("RGB", (o.spec.image_size,) * 2)
        get_random_crop(*image.size, 0.5, o.seed, 0, 0)
        for name, *args in o.augmentations:
            AUGMENTATIONS[name](image, o.seed, 0, 0, *args)

    def __len__(self) -> int:
        return count_batches(self.num_samples, self.train, self.batch_size, self.options.world_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See Loader.epoch."""
        o = self.options
        order = get_epoch_indices(
            self.indices, o.train, o.batch_size, o.seed, epoch, start_batch, o.world_rank, o.world_size
        )
        batches = self._iterate(order, epoch, len(self) - start_batch)
        _epochs.add(batches)
        return batches

    def _iterate(
        self, order: np.ndarray, epoch: int, num_batches: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batches = [order[i : i + self.batch_size].tolist() for i in range(0, len(order), self.batch_size)]
        loader = DataLoader(
            EpochImages(self.source, self.options, epoch),
            batch_sampler=batches,
            collate_fn=_collate,
            num_workers=self.num_workers,
            multiprocessing_context=FORK if self.num_workers else None,  # torch takes none without workers
            worker_init_fn=_init_worker,
            generator=torch.Generator(),  # else it draws from the global one, which dropout uses
        )
        loaded = _start_workers(loader)
        try:
            for batch in loaded:
                if isinstance(batch, DataError):
                    raise batch
                yield to_batch(*batch, self.batch_size)
        except RuntimeError as error:
            # torch's words for a worker that was killed or left. What is raised in one stays as it is.
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise DataError(f"a loader process failed: {error}") from error
        finally:
            _stop_workers(loaded)
        for _ in range(num_batches - len(batches)):
            yield empty_batch(self.batch_size, self.options.spec.image_size)

    def close(self) -> None:
        """Nothing: an epoch's workers end with its iterator."""


def main(argv: list[str]) -> int:
    """Exit status: 0; 1 with one line on stderr if there are no files; 2, by argparse, for wrong flags."""
    parser = argparse.ArgumentParser(
        prog="data.folder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", choices=["fashion_mnist"])
    parser.add_argument("dir", help="where to: DIR/FashionMNIST/raw/*-ubyte")
    arguments = parser.parse_args(argv)
    try:
        prepare_fashion_mnist(expand_home(arguments.dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
