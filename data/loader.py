"""Batches for training and evaluation: FFCV made deterministic, resumable in mid-epoch, and loud when it fails; and their way to
the GPU."""
import contextlib
import fcntl
import os
import queue
import shutil
import socket
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data.augment import build_ffcv_operation, rand_augment, random_flip, random_shift
from data.beton import check_beton, import_ffcv, read_classes, read_samples
from data.decode import build_ffcv_decoder
from data.order import DataError, check_classes, count_batches, default_workers, empty_batch, get_epoch_indices, get_indices, to_batch


class DatasetSpec(NamedTuple):
    """What a data set is, and how its images become batches in both backends."""

    image_size: int  # pixels, height and width
    num_classes: int  # unless Config says otherwise
    mean: tuple  # of each channel, for normalise
    std: tuple
    min_area: float  # training: random crops of this share of the area to all of it, resized to image_size; 0 = as in evaluation
    short_side: int  # evaluation: the shorter side is resized to this, then image_size × image_size cut out of the middle
    augmentations: tuple  # of training, after the crop, in order: (function of data/augment.py, its arguments …)


# mean and std as in the ViT papers' own preprocessing, pixels to [-1, 1]
DATASETS = {
    "fashion_mnist": DatasetSpec(28, 10, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0, 28, ((random_shift, 1), (random_flip,))),
    # or any other tree of class folders, with --num_classes
    "imagenet": DatasetSpec(224, 1000, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.05, 256, ((random_flip,),)),
}


class FFCVLoader:
    """This rank's batches of a .beton file; a training epoch's are a pure function of (seed, epoch), whatever the number of workers.

    Attributes: num_samples (of an epoch on all ranks, so of the subset if num_samples restricts it), num_classes, classes (their
    names, None for a .beton without its .json), batch_size (of a rank), backend.
    Raises FileNotFoundError without the file, ValueError on a damaged one or numbers that do not fit together.
    """

    backend = "ffcv"

    def __init__(self, dataset, data_dir, split, batch_size, seed, num_workers, num_samples, num_classes, augmentations, rank, ranks):
        path, spec = find_beton(dataset, data_dir, split), DATASETS[dataset]
        samples = read_samples(path)
        self.indices = get_indices(len(samples), split == "train", batch_size, num_samples, ranks)
        self.rank, self.ranks, self.image_size = rank, ranks, spec.image_size
        self.path, self.train, self.batch_size, self.seed = path, split == "train", batch_size, seed
        self.num_samples, self.num_classes = len(self.indices), num_classes
        cpus = len(os.sched_getaffinity(0))
        num_workers = default_workers() if num_workers is None else num_workers
        if not 1 <= num_workers <= cpus:
            raise ValueError(f"num_workers is {num_workers}: expected 1 to {cpus}, the CPUs this process may use")
        self.classes = read_classes(path)
        check_classes(path, self.classes, num_classes)
        self._ffcv = ffcv = import_ffcv()
        self._epoch, self._thread = np.zeros(1, dtype=np.int64), None
        min_area = spec.min_area if self.train else 0
        decoder = build_ffcv_decoder(path, samples, spec.image_size, min_area, spec.short_side, seed, self._epoch)
        operations = [build_ffcv_operation(function, args, seed, self._epoch) for function, *args in augmentations]
        pipelines = {"image": [*decoder, *operations], "label": [ffcv.fields.decoders.IntDecoder()]}
        # seed: without one FFCV draws it from numpy's global generator; the order is ours all the same
        self._loader = ffcv.Loader(str(path), batch_size, num_workers, os_cache=True, seed=0, pipelines=pipelines)
        memory = self._loader.memory_manager  # a Python object a sample or more, which only its other manager uses
        memory.sample_to_pages = memory.page_to_samples = memory.ptr_to_size = None
        labels = samples[:, 5]
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"{path}: labels go from {labels.min()} to {labels.max()}, expected {num_classes} classes")

    def __len__(self):
        """Batches of an epoch, the same number on every rank: training drops what does not fill them, evaluation pads."""
        return count_batches(self.num_samples, self.train, self.batch_size, self.ranks)

    def epoch(self, epoch, start_batch=0):
        """Iterator of (images uint8 (B, 3, H, W) channels_last, labels int64 (B,)), CPU tensors, pinned where CUDA is.

        Training: shuffled and augmented, whole batches. Evaluation: each image once and on one rank only, in file order; missing
        rows of the last batch are black with label -1. start_batch leaves out the first batches, bit-identical from there on.
        Starting an epoch ends the one before it. Raises DataError on a damaged image, and when FFCV's thread fails.
        """
        self.close()
        order = get_epoch_indices(self.indices, self.train, self.batch_size, self.seed, epoch, start_batch, self.rank, self.ranks)
        self._epoch[0] = epoch
        self._thread = _start_thread(self._ffcv, self._loader, np.ascontiguousarray(order))  # a stride would be another type to compile
        return self._iterate(self._thread, -(-len(order) // self.batch_size), len(self) - start_batch)

    def _iterate(self, thread, num_filled, num_batches):
        try:
            for _ in range(num_filled):
                batch = next(thread, None)
                if batch is None:
                    reason = thread.error if isinstance(thread.error, DataError) else repr(thread.error or "it was closed")
                    raise DataError(f"{self.path}: the epoch ended early: {reason}") from thread.error
                yield batch
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

        def run_pipeline(self, *args):
            images, labels = super().run_pipeline(*args)
            return to_batch(images, labels[:, 0], loader.batch_size)  # here, because FFCV reuses its buffers a few batches on

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


def stage(dataset, data_dir, stage_dir, show=True):
    """Copy data_dir's .beton files, and the .json beside them, to get_staged_dir(data_dir, stage_dir), unless they are there with the
    same size and time of change. A copy appears under its name only when whole.

    Raises FileNotFoundError or ValueError on missing or damaged files, before anything is copied; OSError, a full disk say.
    """
    target, files = get_staged_dir(data_dir, stage_dir), []
    for split in ("train", "val"):
        path = find_beton(dataset, data_dir, split)
        check_beton(path)
        files += [path, path.with_suffix(".json")]
    target.mkdir(parents=True, exist_ok=True)
    for leftover in target.glob("*.tmp"):  # of a process that was killed, unless one still holds it
        with contextlib.suppress(BlockingIOError, FileNotFoundError), open(leftover, "rb") as file:  # it does, or another was faster
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()

    def identity(path):
        return (path.stat().st_size, int(path.stat().st_mtime)) if path.exists() else None

    files = [file for file in files if identity(file) != identity(target / file.name)]
    total, free = sum(file.stat().st_size for file in files if file.exists()), shutil.disk_usage(target).free
    if total > free:
        raise OSError(f"stage_dir {stage_dir} has {free / 1e9:.1f} GB free, the data needs {total / 1e9:.1f} GB")
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"staging to {target}", disable=not (files and show)) as bar:
        for file in files:
            if not file.exists():  # FFCV's own writer makes no .json
                (target / file.name).unlink(missing_ok=True)
                continue
            partial = target / f"{file.name}.{socket.gethostname()}.{os.getpid()}.tmp"
            try:
                with open(file, "rb") as source, open(partial, "wb") as copy:
                    fcntl.flock(copy, fcntl.LOCK_EX)
                    before = os.fstat(source.fileno())
                    while piece := source.read(1 << 24):
                        copy.write(piece)
                        bar.update(len(piece))
                    after = os.fstat(source.fileno())
                    if (copy.tell(), after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                        raise OSError(f"{file} was changed while it was copied")
                    copy.flush()
                    os.fsync(copy.fileno())  # or a crash could leave a file of the right size and time without its content
                    os.utime(partial, ns=(before.st_atime_ns, before.st_mtime_ns))
                    os.replace(partial, target / file.name)
            finally:
                partial.unlink(missing_ok=True)


def get_staged_dir(data_dir, stage_dir):
    """Where `stage` puts the files of data_dir: its whole path under stage_dir, so that two data sets never meet."""
    return Path(stage_dir, *Path(data_dir).resolve().parts[1:])


def find_beton(dataset, data_dir, split):
    """data_dir/{split}.beton; FileNotFoundError, with the command that makes it, where it is not."""
    path = Path(data_dir) / f"{split}.beton"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: make it with `python -m data.beton {dataset}:{split} {path} --root {data_dir}`")
    return path


def build_loader(backend, dataset, data_dir, split, batch_size, seed, num_workers=None, num_samples=None, num_classes=None,
                 rand_augment_magnitude=0, rank=0, ranks=1):
    """The loader of `split` ("train" or "val") of a data set of DATASETS: backend "ffcv" reads data_dir/{split}.beton,
    "folder" the raw files in data_dir; both yield the same batches, to the bit where the .beton holds the same pixels;
    "synthetic" makes images of that size up and reads nothing.
    num_samples: train on a random subset. batch_size is one rank's: the ranks' batches together are the micro-batch.

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
    elif backend == "synthetic":
        from data.synthetic import SyntheticLoader as Loader
    else:
        raise ValueError(f"unknown loader {backend!r}: expected ffcv, folder or synthetic")
    spec = DATASETS[dataset]
    augmentations = spec.augmentations + ((rand_augment, 2, rand_augment_magnitude),) * (rand_augment_magnitude > 0)
    return Loader(dataset, data_dir, split, batch_size, seed, num_workers, num_samples, num_classes or spec.num_classes,
                  augmentations if split == "train" else (), rank, ranks)


def prefetch(batches, device):
    """An iterator of batches, on `device`. On a GPU the next batch is copied there while the model works on this one, on a stream of
    its own and from pinned memory: only the work that needs it waits for the copy. The host waits for the loader one batch ahead."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def load():
        with torch.cuda.stream(stream):
            return [tensor.to(device, non_blocking=True) for tensor in next(batches, ())]

    with contextlib.closing(batches):
        ahead = load()
        while ahead:
            torch.cuda.current_stream(device).wait_stream(stream)
            for tensor in ahead:
                tensor.record_stream(torch.cuda.current_stream(device))  # or its memory could serve the next copy while it is read
            batch, ahead = ahead, load()
            yield batch
