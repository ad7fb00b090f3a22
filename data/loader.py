"""build_loader: a data set's batches by any of three loaders, and prefetch: their way to the GPU."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from data.datasets import DATASETS, LoaderOptions, get_spec
from errors import UserError

Batch = tuple[torch.Tensor, torch.Tensor]  # images uint8 (B, 3, H, W) channels_last, labels int64 (B,)


class Loader(Protocol):
    """What all loaders are: one process's batches of one split."""

    backend: str  # "ffcv", "folder" or "synthetic"
    train: bool
    batch_size: int  # of this process
    num_samples: int  # images of an epoch, of all processes and of the subset if there is one
    num_classes: int
    classes: list[str] | None  # their names, where they are known
    notes: Sequence[str]  # what a person should know of the files, in sentences

    def __len__(self) -> int:
        """Batches of an epoch, as many in every process: training drops what fills none, evaluation pads."""

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, on the CPU, pinned where CUDA is.

        Training: whole batches, shuffled and augmented, a pure function of (seed, epoch) whatever the number
        of workers. Evaluation: each image once and in one process only, in file order; the rows that the last
        batch lacks are black with label -1. start_batch leaves out the first batches, the others are the same
        to the bit. Raises DataError on a damaged image; a bug in an augmentation or a data set comes out as
        the exception that it raised.
        """

    def close(self) -> None:
        """End a running epoch, and its thread or processes."""


def build_loader(
    backend: str,
    dataset: str,
    data_dir: str | Path,
    split: str,
    batch_size: int,
    seed: int,
    num_workers: int | None = None,
    num_samples: int | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    rand_augment_magnitude: int = 0,
    color_jitter: float = 0.0,
    world_rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """The loader of `split` ("train" or "val") of a data set in DATASETS.

    backend: "ffcv" reads data_dir/{split}.beton, "folder" the raw files in data_dir; both yield the same
    batches where the .beton holds the same pixels, to the bit but for RandAugment's Rotate. "synthetic" makes
    images of that size up and reads nothing. num_samples: train on a random subset. batch_size is one
    process's: the batches of all processes together are the micro-batch. image_size: pixels, see get_spec.
    With both, color_jitter comes after RandAugment.

    Raises UserError: no data (with how to make it), a damaged .beton, no FFCV (with what to install),
    numbers that don't fit together.
    """
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset!r}: expected one of {', '.join(DATASETS)}")
    if split not in ("train", "val"):
        raise UserError(f"unknown split {split!r}: expected train or val")
    # Imported here, because each of them brings libraries that the others can do without.
    if backend == "ffcv":
        from data.ffcv import FFCVLoader as LoaderClass
    elif backend == "folder":
        from data.folder import FolderLoader as LoaderClass
    elif backend == "synthetic":
        from data.synthetic import SyntheticLoader as LoaderClass
    else:
        raise UserError(f"unknown loader {backend!r}: expected ffcv, folder or synthetic")
    spec = get_spec(dataset, image_size)
    augmentations = ()
    if split == "train":
        augmentations = spec.augmentations
        if rand_augment_magnitude > 0:
            augmentations += (("rand_augment", 2, rand_augment_magnitude),)
        if color_jitter > 0:
            augmentations += (("color_jitter", color_jitter),)
    options = LoaderOptions(
        dataset=dataset,
        spec=spec,
        data_dir=str(data_dir),
        split=split,
        batch_size=batch_size,
        seed=seed,
        num_workers=num_workers,
        num_samples=num_samples,
        num_classes=num_classes or spec.num_classes,
        augmentations=augmentations,
        world_rank=world_rank,
        world_size=world_size,
    )
    return LoaderClass(options)


def build_black_batch(batch_size: int, image_size: int, device: torch.device) -> Batch:
    """Black images with label 0, as a loader's batch on `device`."""
    images = torch.zeros(batch_size, image_size, image_size, 3, dtype=torch.uint8, device=device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    return images.permute(0, 3, 1, 2), labels


def prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, on `device`.

    On a GPU the next batch is copied there while the model works on this one, from pinned memory and on a
    stream of its own: only the work that needs it waits for the copy. The host waits for the loader one batch
    ahead.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def load() -> list[torch.Tensor]:
        with torch.cuda.stream(stream):
            return [tensor.to(device, non_blocking=True) for tensor in next(batches, ())]

    with contextlib.closing(batches):
        ahead = load()
        while ahead:
            torch.cuda.current_stream(device).wait_stream(stream)
            for tensor in ahead:
                # Without this the tensor's memory could serve the next copy while the model still reads it.
                tensor.record_stream(torch.cuda.current_stream(device))
            batch, ahead = ahead, load()
            yield batch
