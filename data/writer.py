"""FFCV's writer of .beton files, made to end when a worker fails, is killed or meets a bad image."""

import contextlib
import ctypes
import os
import queue
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.children import FORK, become_child, describe_kill, signals_held
from data.import_ffcv import import_ffcv
from data.order import DataError
from errors import UserError


class Written(NamedTuple):
    """What became of a data set's images."""

    skipped: dict[int, str]  # index of what was left out -> reason
    single_colour: list[int]  # indices, in order, of images that are one single colour


class Pixels:
    """What goes into a .beton: items (uint8 (H, W, 3), label), of at most max_resolution pixels a side."""

    def __init__(self, source: Sequence, max_resolution: int) -> None:
        self.source, self.max_resolution = source, max_resolution

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image, label = self.source[index]
        image = image.convert("RGB")
        if max(image.size) > self.max_resolution:
            image.thumbnail((self.max_resolution,) * 2, Image.Resampling.LANCZOS)
        return np.array(image), int(label)


def is_single_colour(pixels: np.ndarray) -> bool:
    """Whether all pixels of an image, uint8 (H, W, 3), are the same."""
    values = pixels.reshape(-1)
    return bool((values[3:] == values[:-3]).all())


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """For what writes files, and nothing else: a full disk or a folder without permission is a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(str(error)) from None


# ---- a worker process


def _run_worker(errors: Any, *args) -> None:
    """_work(*args). What ends it goes into `errors`: (whether it is a user's mistake, the text to show)."""
    become_child()
    try:
        _work(*args)
    except UserError as error:
        errors.put((True, str(error)))
        sys.exit(1)
    except Exception:
        errors.put((False, traceback.format_exc()))
        sys.exit(1)


def _work(
    todo: Any,
    metadata_memory: Any,
    metadata_type: np.dtype,
    fields: dict,
    allocator: Any,
    done: Any,
    results: Any,
    dataset: Pixels,
    skip_bad: bool,
) -> None:
    """FFCV's own worker, except that it can go on behind a bad image."""
    from ffcv.writer import handle_sample

    metadata = np.frombuffer(metadata_memory.buf, metadata_type)
    bad, single_colour = [], []
    with disk_errors():
        allocator.__enter__()  # opens the file
    while (chunk := todo.get()) is not None:
        for index in chunk:
            try:
                sample = dataset[index]
            except DataError as error:
                if not skip_bad:
                    raise DataError(f"{error} (--skip_bad leaves out such files)") from error
                bad.append((index, str(error)))
                continue
            if is_single_colour(sample[0]):
                single_colour.append(index)
            with disk_errors():
                handle_sample(sample, index, metadata_type.names, metadata, allocator, fields)
        with done.get_lock():
            done.value += len(chunk)
    with disk_errors():
        allocator.__exit__(None, None, None)  # writes the last page
    results.put((allocator.allocations, bad, single_colour))


# ---- the main process


def write_samples(
    partial: Path, path: Path, dataset: Pixels, workers: int, mode: str, quality: int, skip_bad: bool
) -> Written:
    """Write all of `dataset` to `partial`, which is to become `path`.

    Leaves out bad images, with skip_bad. Raises UserError for a bad image without skip_bad, a killed worker,
    a full disk or /dev/shm; RuntimeError with a worker's traceback for a bug in it.
    """
    ffcv = import_ffcv()
    fields = {
        "image": ffcv.fields.RGBImageField(write_mode=mode, jpeg_quality=quality),
        "label": ffcv.fields.IntField(),
    }
    largest = 1 << max(23, (3 * dataset.max_resolution**2 - 1).bit_length())  # an image must fit into a page
    writer = ffcv.writer.DatasetWriter(str(partial), fields, page_size=largest, num_workers=workers)
    writer.num_samples = len(dataset)
    with disk_errors():
        writer.prepare()
    try:
        _check_shared_memory(writer.metadata_sm.size)
        allocations, written = _run_workers(writer, path, dataset, skip_bad)
        good = np.setdiff1d(np.arange(len(dataset)), list(written.skipped))
        if len(good) == 0:
            raise UserError(
                f"{path}: none of {len(dataset)} images can be read, the first: {written.skipped[0]}"
            )
        table = np.array(allocations, dtype=ffcv.types.ALLOC_TABLE_TYPE)
        table["sample_id"] = np.searchsorted(good, table["sample_id"])
        # A copy, because an error would keep the shared memory mapped.
        metadata = np.frombuffer(writer.metadata_sm.buf, writer.metadata_type, len(dataset)).copy()
        with disk_errors():
            _finish(writer, metadata[good], table)
    finally:
        writer.metadata_sm.unlink()
        writer.metadata_sm.close()
    return written


def _check_shared_memory(size: int) -> None:
    """Raise UserError where /dev/shm has no room for so many bytes, which are taken as they are written:
    what writes beyond that is killed."""
    free = shutil.disk_usage("/dev/shm").free
    if free < size:
        raise UserError(
            f"/dev/shm has {free / 1e6:,.0f} MB free, the metadata of the images needs {size / 1e6:,.0f} MB: "
            "give the container more (docker run --shm-size=1g)"
        )


def _run_workers(writer: Any, path: Path, dataset: Pixels, skip_bad: bool) -> tuple[list[tuple], Written]:
    """Have worker processes write all images; the allocation table's rows, and what became of the images.

    FFCV's own DatasetWriter waits for ever for a worker that failed or was killed.
    """
    from ffcv.writer import MemoryAllocator

    todo, results = FORK.Queue(), FORK.Queue()
    errors, done = FORK.SimpleQueue(), FORK.Value(ctypes.c_uint64, 0)
    step = max(1, min(100, len(dataset) // writer.num_workers))
    for start in range(0, len(dataset), step):
        todo.put(range(start, min(start + step, len(dataset))))
    for _ in range(writer.num_workers):
        todo.put(None)
    allocator = MemoryAllocator(writer.fname, writer.data_region_start, writer.page_size)
    metadata = writer.metadata_sm, writer.metadata_type
    args = (errors, todo, *metadata, writer.fields, allocator, done, results, dataset, skip_bad)
    processes = [FORK.Process(target=_run_worker, args=args, daemon=True) for _ in range(writer.num_workers)]
    try:
        with signals_held():
            for process in processes:
                process.start()
        answers = _wait(path, processes, results, errors, done, len(dataset))
    except BaseException:
        for process in processes:
            if process.is_alive():
                process.kill()
        raise
    finally:
        todo.cancel_join_thread()  # after a failure nobody reads it, and exit would wait for that
    allocations = [row for rows, _, _ in answers for row in rows]
    skipped = dict(row for _, rows, _ in answers for row in rows)
    return allocations, Written(skipped, sorted(index for *_, indices in answers for index in indices))


def _wait(path: Path, processes: list, results: Any, errors: Any, done: Any, total: int) -> list[tuple]:
    """What each worker puts into `results`, shown as progress. Raises for the first that ends otherwise."""
    answers = []
    with tqdm(total=total, unit=" images", mininterval=1) as bar:
        while len(answers) < len(processes):
            try:
                answers.append(results.get(timeout=0.1))
            except queue.Empty:
                if failed := [process.exitcode for process in processes if process.exitcode]:
                    _raise_worker_error(path, errors, failed[0])
            bar.update(done.value - bar.n)
    return answers


def _raise_worker_error(path: Path, errors: Any, exitcode: int) -> None:
    if exitcode < 0:
        raise UserError(f"{path}: a worker {describe_kill(exitcode)}")
    if errors.empty():
        raise RuntimeError(f"{path}: a worker left with status {exitcode}")
    mistake, text = errors.get()
    if mistake:
        raise UserError(f"{path}: {text}")
    raise RuntimeError(f"{path}: a worker failed:\n\n{text}")


def _finish(writer: Any, metadata: np.ndarray, table: np.ndarray) -> None:
    """Write the metadata, the allocation table behind the data, and the header with its place."""
    with open(writer.fname, "r+b") as file:
        file.seek(writer.metadata_start)
        file.write(metadata.tobytes())
        writer.header["num_samples"] = len(metadata)
        writer.header["alloc_table_ptr"] = file.seek(0, os.SEEK_END)
        file.write(table.tobytes())
        file.seek(0)
        file.write(writer.header.tobytes())
        file.flush()
        os.fsync(file.fileno())  # a full disk, or quota, may show only here
