"""Image data sets as FFCV's .beton files: writing them, and checking them before anything maps them into memory.

python -m data.beton fashion_mnist:train datasets/fashion_mnist/train.beton [--root datasets/fashion_mnist] [--workers 8]
"""
import argparse
import ctypes
import json
import multiprocessing
import os
import queue
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

# The layout of a .beton, version 2 (ffcv/types.py): header, field descriptors, metadata, pages of data, allocation table.
VERSION = 2
HEADER = np.dtype([("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"),
                   ("alloc_table_ptr", "<u8")], align=True)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
METADATA = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)  # fields of type 2 (RGBImageField) and 1 (IntField)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
JPEG, RAW = 0, 1  # of IMAGE["mode"]; FFCV copies raw pixels without a look at the size of its target


def import_ffcv():
    """Import FFCV without its side effects; RuntimeError, with what to install, where it or its libraries are missing.

    FFCV sets torch's number of threads on import, and at each epoch from its own thread, which would slow down a
    training loop on the same CPU and every thread started later: after this it sets numba's only.
    """
    threads = torch.get_num_threads()
    try:
        # Its one numba dictionary is only read from Python, and compiling it would take 5 s of every process's start.
        with mock.patch("numba.typed.Dict", dict):
            import ffcv.fields.decoders
            import ffcv.loader.epoch_iterator
            import ffcv.writer
    except (ImportError, OSError) as error:
        raise RuntimeError(
            f"FFCV cannot be imported ({error}): it needs apt-get install libopencv-imgproc406 libturbojpeg0 to run, "
            "libopencv-dev libturbojpeg0-dev pkg-config g++ to build (pip install --no-deps --use-pep517 ffcv==1.0.2); "
            "or go without it: --loader folder") from error
    finally:
        torch.set_num_threads(threads)
    import numba

    def set_numba_threads(num_threads):
        ffcv.pipeline.compiler.Compiler.num_threads = num_threads
        numba.set_num_threads(num_threads)

    ffcv.pipeline.compiler.Compiler.set_num_threads = set_numba_threads
    return ffcv


def check_beton(path):
    """Check that a .beton of images and labels is whole, and return its number of samples, reading no image data.

    Needed before an FFCV Loader is built: on a damaged file that one hangs, crashes, or yields black images.
    Raises ValueError, one sentence naming the file: missing, empty, cut anywhere, not a .beton, of another version,
    without (all of) its allocation table, or with images that lie outside of it.
    """
    def require(fine, message):
        if not fine:
            raise ValueError(f"{path}: {message}")

    require(os.path.isfile(path), "there is no such file")
    size = os.path.getsize(path)
    require(size > 0, "the file is empty")
    require(size >= HEADER.itemsize, f"not a .beton file, {size} bytes are less than a header")
    version, num_fields, page_size, num_samples, table = (int(value) for value in np.fromfile(path, HEADER, 1)[0])
    require(page_size >= 1 << 21 and page_size & (page_size - 1) == 0 and 1 <= num_fields < 256,
            "not a .beton file, its first bytes are no header of one")
    require(version == VERSION, f"a .beton of version {version}, but version {VERSION} is what can be read")
    metadata_start = HEADER.itemsize + num_fields * FIELD.itemsize
    require(size >= metadata_start, "cut short, it ends within its field descriptors")
    fields = np.fromfile(path, FIELD, num_fields, offset=HEADER.itemsize)
    fields = [(int(field["type_id"]), bytes(field["name"]).rstrip(b"\0").decode("latin1")) for field in fields]
    require(fields == [(2, "image"), (1, "label")], f"its fields are {fields}, not an RGB image and an integer label")
    require(num_samples > 0, "it has no samples")
    require(table > 0, "it has no allocation table, so its writer did not finish")
    data_start = metadata_start + num_samples * METADATA.itemsize
    require(size >= data_start, f"cut short, its metadata ends before sample {num_samples}")
    require(size >= table, f"cut short, it has {size} bytes and its allocation table would start at {table}")
    expected = num_samples * ALLOCATION.itemsize
    require(size - table == expected, f"cut or written to, its allocation table has {size - table} bytes, not {expected}")
    images = np.fromfile(path, METADATA, num_samples, offset=metadata_start)["image"]
    allocations = np.fromfile(path, ALLOCATION, num_samples, offset=table)
    allocations = allocations[np.argsort(allocations["sample_id"])]
    starts, sizes = allocations["ptr"], allocations["size"]
    require((starts >= data_start).all() and (starts <= table).all() and (sizes <= table - starts).all(),
            "its allocation table points outside of the data")
    require((allocations["sample_id"] == np.arange(num_samples)).all() and (starts == images["data_ptr"]).all(),
            "its metadata and its allocation table contradict each other")
    pixels = images["width"].astype(np.uint64) * images["height"] * np.uint64(3)
    require((pixels > 0).all() and ((images["mode"] == JPEG) | (images["mode"] == RAW) & (sizes == pixels)).all(),
            "the size of an image and that of its data contradict each other")
    return num_samples


def _run_worker(errors, work, *args):
    try:
        work(*args)
    except BaseException as error:
        errors.put(f"{type(error).__name__}: {error}")
        sys.exit(1)


def _write(path, dataset, workers):
    ffcv = import_ffcv()

    class Writer(ffcv.writer.DatasetWriter):
        """FFCV's own waits for ever for a worker that failed or was killed; this one ends with the worker's error."""

        def _write_common(self, num_samples, queue_content, work, extra_args):
            self.num_samples = num_samples
            self.prepare()
            todo, allocations = multiprocessing.Queue(), multiprocessing.Queue()
            errors, done = multiprocessing.SimpleQueue(), multiprocessing.Value(ctypes.c_uint64, 0)
            for chunk in [*queue_content, *[None] * self.num_workers]:
                todo.put(chunk)
            allocator = ffcv.writer.MemoryAllocator(self.fname, self.data_region_start, self.page_size)
            args = (errors, work, todo, self.metadata_sm, self.metadata_type, self.fields, allocator, done, allocations)
            processes = [multiprocessing.Process(target=_run_worker, args=(*args, *extra_args), daemon=True)
                         for _ in range(self.num_workers)]
            results = []
            try:
                for process in processes:
                    process.start()
                with tqdm(total=num_samples, unit=" images", mininterval=1) as bar:
                    while len(results) < len(processes):
                        try:
                            results.append(allocations.get(timeout=0.1))
                        except queue.Empty:
                            if any(process.exitcode for process in processes):
                                reason = "it was killed" if errors.empty() else errors.get()
                                raise RuntimeError(f"{path}: a worker failed: {reason}")
                        bar.update(done.value - bar.n)
                self.finalize([allocation for result in results for allocation in result])
            finally:
                for process in processes:
                    if process.is_alive() and len(results) < len(processes):
                        process.kill()
                todo.cancel_join_thread()  # after a failure nobody reads it, and exit would wait for that
                self.metadata_sm.close()
                self.metadata_sm.unlink()

    fields = {"image": ffcv.fields.RGBImageField(write_mode="raw"), "label": ffcv.fields.IntField()}
    chunk = max(1, min(500, len(dataset) // workers))
    Writer(str(path), fields, num_workers=workers).from_indexed_dataset(dataset, chunksize=chunk)


def _verify(path, dataset):
    if check_beton(path) != len(dataset):
        raise RuntimeError(f"{path}: {check_beton(path)} samples were written of {len(dataset)}")
    metadata = np.fromfile(path, METADATA, len(dataset), offset=HEADER.itemsize + 2 * FIELD.itemsize)
    for index in np.linspace(0, len(dataset) - 1, min(100, len(dataset))).astype(int):
        (image, label), written = dataset[index], metadata[index]
        pixels = np.fromfile(path, np.uint8, image.size, offset=int(written["image"]["data_ptr"]))
        if written["label"] != label or not np.array_equal(pixels.reshape(image.shape), image):
            raise RuntimeError(f"{path}: sample {index} reads back as something else than what was written")


def write_beton(source, path, workers=None):
    """Write a torchvision data set of items (PIL image, label), with `.classes`, as a raw .beton, a .json beside it.

    The .beton appears under its name only when whole and read back; the .json holds num_samples and the class names.
    Raises RuntimeError, naming the cause, if a worker fails, dies, or wrote something else than it was given.
    """
    from data.folder import RGBImages  # here: loaders, which import this file, do not need torchvision

    path, dataset = Path(path), RGBImages(source)
    workers = min(len(os.sched_getaffinity(0)), 16) if workers is None else workers
    if len(dataset) == 0 or workers < 1:
        raise ValueError(f"{path}: {len(dataset)} images and {workers} workers, expected at least one of each")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    index = path.with_suffix(".json")
    try:
        _write(partial, dataset, workers)
        _verify(partial, dataset)
        index.write_text(json.dumps({"num_samples": len(dataset), "classes": list(source.classes)}, indent=2) + "\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    from data.folder import open_dataset

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="fashion_mnist:train or fashion_mnist:val")
    parser.add_argument("path", metavar="OUT.beton")
    parser.add_argument("--root", default="datasets/fashion_mnist", help="where python -m data.folder put them")
    parser.add_argument("--workers", type=int, help="processes (default: the CPUs there are, 16 at most)")
    arguments = parser.parse_args()
    try:
        dataset, _, split = arguments.source.partition(":")
        write_beton(open_dataset(dataset, arguments.root, split), arguments.path, arguments.workers)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
