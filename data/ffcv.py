"""FFCVLoader: FFCV made deterministic, resumable in mid-epoch, and loud when it fails."""

import queue
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch

from data.augment import color_jitter, get_random_crops, rand_augment, random_flip, random_shift
from data.batch import empty_batch, to_batch
from data.beton import find_beton, read_about, read_samples
from data.datasets import LoaderOptions
from data.decode import decode_batch, load_turbojpeg
from data.import_ffcv import import_ffcv
from data.order import (
    DataError,
    check_classes,
    count_batches,
    get_epoch_indices,
    get_indices,
    get_num_workers,
)
from errors import UserError

# DatasetSpec's augmentations: f(images, out, indices, seed, epoch, *args), see data/augment.py
AUGMENTATIONS = {
    "shift": random_shift,
    "flip": random_flip,
    "rand_augment": rand_augment,
    "color_jitter": color_jitter,
}


class FFCVLoader:
    """A Loader (data/loader.py) that reads a .beton file. Starting an epoch ends the one before it.

    Raises UserError without the file, on a damaged one, or on numbers that don't fit together.
    """

    backend = "ffcv"

    def __init__(self, options: LoaderOptions) -> None:
        self.options = o = options
        self.train, self.batch_size, self.num_classes = o.train, o.batch_size, o.num_classes
        self.path = find_beton(o.dataset, o.data_dir, o.split)
        samples = read_samples(self.path)
        self.indices = get_indices(len(samples), o.train, o.batch_size, o.num_samples, o.world_size)
        self.num_samples = len(self.indices)
        num_workers = get_num_workers(o.num_workers, least=1)
        self.classes, largest = read_about(self.path)
        self.notes = []
        if largest and largest < o.spec.short_side:
            self.notes.append(
                f"{self.path} holds images of {largest} pixels a side at most, which are enlarged: "
                f"evaluation at {o.spec.image_size} takes them at {o.spec.short_side} "
                "(data.beton --max_resolution)"
            )
        labels = samples[:, 5]
        check_classes(self.path, self.classes, o.num_classes, labels)
        if labels.min() < 0 or labels.max() >= o.num_classes:
            raise UserError(
                f"{self.path}: labels go from {labels.min()} to {labels.max()}, "
                f"expected {o.num_classes} classes"
            )
        self._ffcv = import_ffcv()
        self._epoch = np.zeros(1, dtype=np.int64)  # read by the pipeline at every batch
        self._thread = None
        self._loader = self._build(samples, num_workers)

    def _build(self, samples: np.ndarray, num_workers: int) -> Any:
        """FFCV's own loader of our pipeline."""
        seed = self.options.seed
        pipeline = build_decoder(self.path, samples, self.options, self._epoch)
        for name, *args in self.options.augmentations:
            pipeline.append(build_augmentation(AUGMENTATIONS[name], args, seed, self._epoch))
        pipelines = {"image": pipeline, "label": [self._ffcv.fields.decoders.IntDecoder()]}
        # Without a seed FFCV draws one from numpy's global generator; the order is ours all the same.
        loader = self._ffcv.Loader(
            str(self.path), self.batch_size, num_workers, os_cache=True, seed=0, pipelines=pipelines
        )
        # A Python object a sample or more, which only FFCV's other memory manager uses.
        memory = loader.memory_manager
        memory.sample_to_pages = memory.page_to_samples = memory.ptr_to_size = None
        return loader

    def __len__(self) -> int:
        return count_batches(self.num_samples, self.train, self.batch_size, self.options.world_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See Loader.epoch."""
        self.close()
        o = self.options
        order = get_epoch_indices(
            self.indices, o.train, o.batch_size, o.seed, epoch, start_batch, o.world_rank, o.world_size
        )
        self._epoch[0] = epoch
        order = np.ascontiguousarray(order)  # a stride would be another type to compile
        self._thread = _start_thread(self._ffcv, self._loader, order)
        return self._iterate(self._thread, -(-len(order) // self.batch_size), len(self) - start_batch)

    def _iterate(
        self, thread: Any, num_filled: int, num_batches: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        try:
            for _ in range(num_filled):
                batch = next(thread, None)
                if batch is None:
                    self._raise_error(thread.error)
                yield batch
            for _ in range(num_batches - num_filled):
                yield empty_batch(self.batch_size, self.options.spec.image_size)
        finally:
            _stop_thread(thread)

    def _raise_error(self, error: BaseException | None) -> None:
        """Raise what ended the thread: a bug as it is, its own traceback with it."""
        if isinstance(error, DataError):
            raise DataError(f"{self.path}: the epoch ended early: {error}") from None
        if error is not None:
            raise error
        raise RuntimeError(f"{self.path}: the epoch ended early: it was closed")

    def close(self) -> None:
        """End a running epoch and its thread (which FFCV would leak, with its buffers)."""
        if self._thread is not None:
            _stop_thread(self._thread)
            self._thread = None


# ---- FFCV's thread


def _start_thread(ffcv: ModuleType, loader: Any, order: np.ndarray) -> Any:
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    class EpochThread(ffcv.loader.epoch_iterator.EpochIterator):
        """FFCV's own dies silently on an exception, and the main thread waits for its next batch for ever."""

        error = None

        def run(self) -> None:
            try:
                if device is not None:
                    # A thread begins with the first GPU as its own. Pinning a batch would set up CUDA there,
                    # hundreds of MB for every process of the node.
                    torch.cuda.set_device(device)
                super().run()
            except BaseException as error:
                self.error = error
                self.output_queue.put(None)

        def run_pipeline(self, *args) -> tuple[torch.Tensor, torch.Tensor]:
            images, labels = super().run_pipeline(*args)
            # Copied here, because FFCV reuses its buffers a few batches on.
            return to_batch(images, labels[:, 0], loader.batch_size)

    return EpochThread(loader, order)


def _stop_thread(thread: Any) -> None:
    thread.iter_ixes = iter(())  # its next batch is its last
    while thread.is_alive():
        try:
            thread.output_queue.get(timeout=0.05)  # it may be waiting for room in the queue
        except queue.Empty:
            pass
    if thread.output_queue.empty():
        thread.output_queue.put(None)  # so that an iterator somebody kept ends instead of waiting


# ---- FFCV's operations
# They are called from Python (jit_mode False) because what an FFCV-jitted one closes
# over is frozen when it is compiled, the epoch included, and because numba cannot cache closures on disk.
# FFCV's graph never returns from compiling a jitted operation behind one like these, so decoders come first
# and augmentations after them.


def build_decoder(path: Any, samples: np.ndarray, options: LoaderOptions, epoch: np.ndarray) -> list:
    """decode_batch as the beginning of an FFCV pipeline. `epoch`: int64 array (1,), read at every batch.

    The pipeline raises DataError on a damaged image. Two operations: FFCV wants a jitted decoder of its own
    kind in front, so that one only hands on, and the next decodes.
    """
    import_ffcv()
    import ffcv._libffcv
    from ffcv.fields.decoders import SimpleRGBImageDecoder
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.operation import Operation

    load_turbojpeg(ffcv._libffcv.__file__)
    file = np.memmap(path, np.uint8, "r")
    spec = options.spec
    min_area = spec.min_area if options.train else 0
    shape = (spec.image_size, spec.image_size, 3)

    def decode(_, out, indices):
        sound = np.empty(len(indices), np.bool_)
        crops = np.zeros((len(indices), 4), np.int64)
        if min_area:
            get_random_crops(samples, indices, crops, min_area, options.seed, int(epoch[0]))
        decode_batch(file, samples, indices, out, sound, crops, spec.short_side)
        if not sound.all():
            raise DataError(f"image {indices[~sound][0]} is a damaged JPEG, make the file anew")
        return out

    decode.with_indices = True
    # Compiled now, not in the first batch.
    decode(None, np.empty((0, *shape), np.uint8), np.empty(0, np.int64))

    class HandOn(SimpleRGBImageDecoder):
        def declare_state_and_memory(self, previous_state):
            return replace(previous_state, shape=(), dtype=np.dtype(np.int64)), None

        def generate_code(self):
            return lambda indices, memory, metadata, storage_state: indices

    class Decode(Operation):
        def declare_state_and_memory(self, previous_state):
            dtype = np.dtype(np.uint8)
            state = replace(previous_state, jit_mode=False, shape=shape, dtype=dtype)
            return state, AllocationQuery(shape, dtype)

        def generate_code(self):
            return decode

    return [HandOn(), Decode()]


def build_augmentation(function: Callable, args: list, seed: int, epoch: np.ndarray) -> Any:
    """An augmentation as an FFCV operation. `epoch`: int64 array (1,), read at every batch."""
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.operation import Operation

    nothing = np.empty((0, 1, 1, 3), np.uint8)
    function(nothing, nothing, np.empty(0, np.int64), seed, 0, *args)  # compile now, not in the first batch

    def augment(images, out, indices):
        function(images, out, indices, seed, int(epoch[0]), *args)
        return out

    augment.with_indices = True

    class Augmentation(Operation):
        def declare_state_and_memory(self, previous_state):
            state = replace(previous_state, jit_mode=False)
            return state, AllocationQuery(previous_state.shape, previous_state.dtype)

        def generate_code(self):
            return augment

    return Augmentation()
