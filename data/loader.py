"""Batches for training and evaluation: FFCV made deterministic, resumable in mid-epoch, and loud when it fails."""
import os
import queue
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.augment import (build_ffcv_operation, count_batches, default_workers, empty_batch, get_epoch_indices, get_indices, random_flip,
                          random_shift, to_batch)
from data.beton import check_beton, import_ffcv


class DatasetSpec(NamedTuple):
    """What a data set is."""

    image_size: int  # pixels, height and width
    num_classes: int
    mean: tuple  # of each channel, for normalise
    std: tuple
    augmentations: tuple  # of training, in order, in both backends: (function of data/augment.py, its arguments …)


DATASETS = {
    # mean and std as in the ViT papers' own preprocessing, pixels to [-1, 1]
    "fashion_mnist": DatasetSpec(28, 10, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), ((random_shift, 1), (random_flip,))),
}


class FFCVLoader:
    """This rank's batches of a .beton file; a training epoch's are a pure function of (seed, epoch), whatever the number of workers.

    Attributes: num_samples (of an epoch on all ranks, so of the subset if num_samples restricts it), num_classes, batch_size (of
    a rank), backend.
    Raises FileNotFoundError without the file, ValueError on a damaged one or numbers that do not fit together.
    """

    backend = "ffcv"

    def __init__(self, dataset, data_dir, split, batch_size, seed, num_workers=None, num_samples=None, augmentations=(), rank=0,
                 ranks=1):
        path = Path(data_dir) / f"{split}.beton"
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there: make it with "
                                    f"`python -m data.beton {dataset}:{split} {path} --root {data_dir}`")
        self.indices = get_indices(check_beton(path), split == "train", batch_size, num_samples, ranks)
        self.rank, self.ranks, self.image_size = rank, ranks, DATASETS[dataset].image_size
        self.path, self.train, self.batch_size, self.seed = path, split == "train", batch_size, seed
        self.num_samples, self.num_classes = len(self.indices), DATASETS[dataset].num_classes
        cpus = len(os.sched_getaffinity(0))
        num_workers = default_workers() if num_workers is None else num_workers
        if not 1 <= num_workers <= cpus:
            raise ValueError(f"num_workers is {num_workers}: expected 1 to {cpus}, the CPUs this process may use")

        self._ffcv = ffcv = import_ffcv()
        self._epoch, self._thread = np.zeros(1, dtype=np.int64), None
        operations = [build_ffcv_operation(function, args, seed, self._epoch) for function, *args in augmentations]
        pipelines = {
            "image": [ffcv.fields.decoders.SimpleRGBImageDecoder(), *(operations if self.train else [])],
            "label": [ffcv.fields.decoders.IntDecoder()],
        }
        # seed: without one FFCV draws it from numpy's global generator; the order is ours all the same
        self._loader = ffcv.Loader(str(path), batch_size, num_workers, os_cache=True, seed=0, pipelines=pipelines)
        labels = self._loader.reader.metadata["f1"]
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(f"{path}: labels go from {labels.min()} to {labels.max()}, "
                             f"but {dataset} has {self.num_classes} classes")

    def __len__(self):
        """Batches of an epoch, the same number on every rank: training drops what does not fill them, evaluation pads."""
        return count_batches(self.num_samples, self.train, self.batch_size, self.ranks)

    def epoch(self, epoch, start_batch=0):
        """Iterator of (images uint8 (B, 3, H, W) channels_last, labels int64 (B,)), CPU tensors, pinned where CUDA is.

        Training: shuffled and augmented, whole batches. Evaluation: each image once and on one rank only, in file order; missing
        rows of the last batch are black with label -1. start_batch leaves out the first batches, bit-identical from there on.
        Starting an epoch ends the one before it. Raises RuntimeError when FFCV's thread fails.
        """
        self.close()
        order = get_epoch_indices(self.indices, self.train, self.batch_size, self.seed, epoch, start_batch, self.rank, self.ranks)
        self._epoch[0] = epoch
        self._thread = _start_thread(self._ffcv, self._loader, order)
        return self._iterate(self._thread, -(-len(order) // self.batch_size), len(self) - start_batch)

    def _iterate(self, thread, num_filled, num_batches):
        try:
            for _ in range(num_filled):
                result = next(thread, None)
                if result is None:
                    reason = repr(thread.error) if thread.error else "it was closed"
                    raise RuntimeError(f"{self.path}: the epoch ended early: {reason}") from thread.error
                images, labels = result
                # FFCV reuses its buffers a few batches on. A copy is safe to keep and takes 0.1 ms at 28×28; at 224×224
                # it is 40 MB a batch: there, copy to the device straight from FFCV's own (pinned) buffers instead.
                yield to_batch(images, labels[:, 0], self.batch_size)
            for _ in range(num_batches - num_filled):
                yield empty_batch(self.batch_size, self.image_size)
        finally:
            _stop_thread(thread)

    def close(self):
        """End a running epoch and its thread (which FFCV would leak, with its buffers)."""
        if self._thread is not None:
            _stop_thread(self._thread)
            self._thread = None


def _start_thread(ffcv, loader, order):
    class EpochThread(ffcv.loader.epoch_iterator.EpochIterator):
        """FFCV's own dies silently on an exception, and the main thread waits for its next batch for ever."""

        error = None

        def run(self):
            try:
                super().run()
            except BaseException as error:
                self.error = error
                self.output_queue.put(None)

    return EpochThread(loader, order)


def _stop_thread(thread):
    thread.iter_ixes = iter(())  # its next batch is its last
    while thread.is_alive():
        try:
            thread.output_queue.get(timeout=0.05)  # it may be waiting for room in the queue
        except queue.Empty:
            pass
    if thread.output_queue.empty():
        thread.output_queue.put(None)  # so that an iterator somebody kept ends instead of waiting


def build_loader(backend, dataset, data_dir, split, batch_size, seed, num_workers=None, num_samples=None, rank=0, ranks=1):
    """The loader of `split` ("train" or "val") of a data set of DATASETS: backend "ffcv" reads data_dir/{split}.beton,
    "folder" the raw files in data_dir; both yield the same batches, to the bit. num_samples: train on a random subset.
    batch_size is one rank's: the ranks' batches together are the micro-batch.

    Raises FileNotFoundError (no data: how to make it), RuntimeError (no FFCV: what to install), ValueError (arguments).
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}: expected one of {', '.join(DATASETS)}")
    if split not in ("train", "val"):
        raise ValueError(f"unknown split {split!r}: expected train or val")
    if backend == "ffcv":
        Loader = FFCVLoader
    elif backend == "folder":
        from data.folder import FolderLoader as Loader
    else:
        raise ValueError(f"unknown loader {backend!r}: expected ffcv or folder")
    return Loader(dataset, data_dir, split, batch_size, seed, num_workers, num_samples, DATASETS[dataset].augmentations, rank, ranks)
