"""Image data sets as FFCV's .beton files: writing them, and checking them before anything maps them into memory.

    python -m data.beton /data/flowers/train flowers/train.beton            a tree of CLASS/IMAGE files, of any format Pillow reads
    python -m data.beton imagenet:train imagenet/train.beton --root /data/imagenet     ILSVRC2012: its tars and devkit, or the tree
    python -m data.beton imagenet:val imagenet/val.beton --root /data/imagenet         … as torchvision unpacks them, 150 GB in --root
    python -m data.beton fashion_mnist:train datasets/fashion_mnist/train.beton
"""
import argparse
import ctypes
import json
import multiprocessing
import os
import queue
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.order import DataError

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
    # No pipeline of ours touches the GPU. Its streams would, from a thread whose device is the first GPU, whatever this rank's is.
    ffcv.loader.epoch_iterator.IS_CUDA = False
    return ffcv


def read_samples(path):
    """Check that a .beton of images and labels is whole, reading no image data, and return its samples: int64 (N, 6), of each
    the place and the size of its data in the file, JPEG or RAW, height, width, label.

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
    metadata = np.fromfile(path, METADATA, num_samples, offset=metadata_start)
    allocations = np.fromfile(path, ALLOCATION, num_samples, offset=table)
    allocations = allocations[np.argsort(allocations["sample_id"])]
    images, starts, sizes = metadata["image"], allocations["ptr"], allocations["size"]
    require((starts >= data_start).all() and (starts <= table).all() and (sizes <= table - starts).all(),
            "its allocation table points outside of the data")
    require((allocations["sample_id"] == np.arange(num_samples)).all() and (starts == images["data_ptr"]).all(),
            "its metadata and its allocation table contradict each other")
    pixels = images["width"].astype(np.uint64) * images["height"] * np.uint64(3)
    require((pixels > 0).all() and ((images["mode"] == JPEG) | (images["mode"] == RAW) & (sizes == pixels)).all(),
            "the size of an image and that of its data contradict each other")
    columns = (starts, sizes, images["mode"], images["height"], images["width"], metadata["label"])
    return np.stack([column.astype(np.int64) for column in columns], axis=1)


def check_beton(path):
    """The number of samples of a whole .beton; raises ValueError on a damaged one, as read_samples."""
    return len(read_samples(path))


def read_classes(path):
    """The class names that write_beton put beside a .beton, or None where there is no such file. Raises ValueError on a damaged one."""
    index = Path(path).with_suffix(".json")
    try:
        return list(json.loads(index.read_text())["classes"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is damaged ({error!r}): write {path} anew") from error


class _Pixels:
    """What goes into a .beton: items (uint8 (H, W, 3) array, label), of at most max_resolution pixels a side."""

    def __init__(self, source, max_resolution):
        self.source, self.max_resolution = source, max_resolution

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        image, label = self.source[index]
        image = image.convert("RGB")
        if max(image.size) > self.max_resolution:
            image.thumbnail((self.max_resolution,) * 2, Image.Resampling.LANCZOS)
        return np.array(image), int(label)


def _run_worker(errors, *args):
    try:
        _work(*args)
    except BaseException as error:
        errors.put(f"{type(error).__name__}: {error}" if not isinstance(error, DataError) else str(error))
        sys.exit(1)


def _work(todo, metadata_memory, metadata_type, fields, allocator, done, results, dataset, skip_bad):
    """A worker process: FFCV's own, except that it can go on behind a bad image."""
    from ffcv.writer import handle_sample

    metadata, bad = np.frombuffer(metadata_memory.buf, metadata_type), []
    with allocator:
        while (chunk := todo.get()) is not None:
            for index in chunk:
                try:
                    sample = dataset[index]
                except DataError as error:
                    if not skip_bad:
                        raise DataError(f"{error} (--skip_bad leaves out such files)") from error
                    bad.append((index, str(error)))
                    continue
                handle_sample(sample, index, metadata_type.names, metadata, allocator, fields)
            with done.get_lock():
                done.value += len(chunk)
    results.put((allocator.allocations, bad))


def _write(partial, path, dataset, workers, mode, quality, skip_bad):
    """Write all of `dataset` to `partial`, which is to become `path`; return the bad images that were left out, {index: reason}."""
    ffcv = import_ffcv()

    class Writer(ffcv.writer.DatasetWriter):
        """FFCV's own waits for ever for a worker that failed or was killed; this one ends with the worker's error."""

        def write(self):
            self.num_samples = len(dataset)
            self.prepare()
            todo, allocations = multiprocessing.Queue(), multiprocessing.Queue()
            errors, done = multiprocessing.SimpleQueue(), multiprocessing.Value(ctypes.c_uint64, 0)
            step = max(1, min(100, len(dataset) // self.num_workers))
            for start in range(0, len(dataset), step):
                todo.put(range(start, min(start + step, len(dataset))))
            for _ in range(self.num_workers):
                todo.put(None)
            allocator = ffcv.writer.MemoryAllocator(self.fname, self.data_region_start, self.page_size)
            args = (errors, todo, self.metadata_sm, self.metadata_type, self.fields, allocator, done, allocations, dataset, skip_bad)
            processes = [multiprocessing.Process(target=_run_worker, args=args, daemon=True) for _ in range(self.num_workers)]
            results = []
            try:
                for process in processes:
                    process.start()
                with tqdm(total=len(dataset), unit=" images", mininterval=1) as bar:
                    while len(results) < len(processes):
                        try:
                            results.append(allocations.get(timeout=0.1))
                        except queue.Empty:
                            if any(process.exitcode for process in processes):
                                reason = "a worker was killed" if errors.empty() else errors.get()
                                raise RuntimeError(f"{path}: {reason}")
                        bar.update(done.value - bar.n)
                bad = dict(row for _, rows in results for row in rows)
                self.finish([row for rows, _ in results for row in rows], bad)
            finally:
                for process in processes:
                    if process.is_alive() and len(results) < len(processes):
                        process.kill()
                todo.cancel_join_thread()  # after a failure nobody reads it, and exit would wait for that
                self.metadata_sm.unlink()
                self.metadata_sm.close()
            return bad

        def finish(self, allocations, bad):
            """Metadata without the bad images, the allocation table behind the data, and the header again, now with the table's place."""
            good = np.setdiff1d(np.arange(len(dataset)), list(bad))
            if len(good) == 0:
                raise RuntimeError(f"{path}: none of {len(dataset)} images can be read, the first: {bad[0]}")
            table = np.array(allocations, dtype=ALLOCATION)
            table["sample_id"] = np.searchsorted(good, table["sample_id"])
            metadata = np.frombuffer(self.metadata_sm.buf, self.metadata_type, len(dataset)).copy()  # or an error here would keep it mapped
            with open(self.fname, "r+b") as file:
                file.seek(self.metadata_start)
                file.write(metadata[good].tobytes())
                self.header["num_samples"], self.header["alloc_table_ptr"] = len(good), file.seek(0, os.SEEK_END)
                file.write(table.tobytes())
                file.seek(0)
                file.write(self.header.tobytes())
                file.flush()
                os.fsync(file.fileno())  # a full disk, or quota, may show only here

    fields = {"image": ffcv.fields.RGBImageField(write_mode=mode, jpeg_quality=quality), "label": ffcv.fields.IntField()}
    largest = 1 << max(23, (3 * dataset.max_resolution**2 - 1).bit_length())  # an image must fit into a page
    return Writer(str(partial), fields, page_size=largest, num_workers=workers).write()


def _verify(path, dataset, bad, mode, quality):
    """Read the structure and up to 1000 images back, and compare them with what they should be."""
    from ffcv.fields.rgb_image import encode_jpeg

    good, samples = np.setdiff1d(np.arange(len(dataset)), list(bad)), read_samples(path)
    if len(samples) != len(good):
        raise RuntimeError(f"{path}: {len(samples)} samples were written of {len(good)}")
    for place in np.linspace(0, len(good) - 1, min(1000, len(good))).astype(int):
        image, label = dataset[good[place]]
        expected = image.tobytes() if mode == "raw" else encode_jpeg(image, quality).tobytes()
        start, size, _, *shape_and_label = samples[place].tolist()
        if np.fromfile(path, np.uint8, size, offset=start).tobytes() != expected or shape_and_label != [*image.shape[:2], label]:
            raise RuntimeError(f"{path}: sample {place} reads back as something else than what was written")


def write_beton(source, path, workers=None, mode="raw", max_resolution=500, quality=90, skip_bad=False):
    """Write a torchvision data set of items (PIL image, label), with `.classes`, as a .beton, a .json beside it.

    mode: raw pixels (read 2 to 3 × as fast, 5 × as large) or jpg of `quality`. Images with a side above max_resolution are made smaller.
    skip_bad: leave out images that cannot be read, and list them in OUT.skipped.txt, instead of stopping at the first.
    The .beton appears under its name only when whole and read back; the .json holds num_samples, the class names and the arguments.
    Returns {index: reason} of what was left out. Raises RuntimeError, naming the cause, if a worker fails, dies, or wrote something
    else than it was given; ValueError on arguments.
    """
    path, dataset = Path(path), _Pixels(source, max_resolution)
    if path.suffix != ".beton":
        raise ValueError(f"{path}: expected a name that ends in .beton")
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if len(dataset) == 0 or workers < 1:
        raise ValueError(f"{path}: {len(dataset)} images and {workers} workers, expected at least one of each")
    if not 1 <= max_resolution <= 4000:  # 48 MB, which every worker holds as a page
        raise ValueError(f"max_resolution must be 1 to 4000, not {max_resolution}")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be 1 to 100, not {quality}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    index, report = path.with_suffix(".json"), path.with_suffix(".skipped.txt")
    new_index = path.with_name(f"{path.stem}.json.{os.getpid()}.tmp")
    try:
        bad = _write(partial, path, dataset, min(workers, len(dataset)), mode, quality, skip_bad)
        _verify(partial, dataset, bad, mode, quality)
        new_index.write_text(json.dumps({"num_samples": len(dataset) - len(bad), "classes": list(source.classes), "mode": mode,
                                     "max_resolution": max_resolution, "quality": quality, "skipped": len(bad)}, indent=2) + "\n")
        os.replace(partial, path)
        os.replace(new_index, index)
        report.unlink(missing_ok=True)
        if bad:
            report.write_text("".join(f"{bad[i]}\n" for i in sorted(bad)), errors="surrogateescape")
    finally:
        partial.unlink(missing_ok=True)
        new_index.unlink(missing_ok=True)
    return bad


def main(argv):
    """Exit status: 0; 1 with one line on stderr for whatever went wrong; 2, by argparse, for wrong flags."""
    from data.folder import ImageTree, open_dataset, unpack_imagenet  # here: loaders, which import this file, do without

    parser = argparse.ArgumentParser(prog="data.beton", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="a folder of class folders of images; or imagenet:train, imagenet:val, "
                                                      "fashion_mnist:train, fashion_mnist:val in --root")
    parser.add_argument("path", metavar="OUT.beton", help="with OUT.json beside it: number of samples, class names")
    parser.add_argument("--root", help="where a named data set lies (default: datasets/NAME)")
    parser.add_argument("--mode", choices=["jpg", "raw"], help="how images are kept (default: jpg; fashion_mnist: raw)")
    parser.add_argument("--max_resolution", type=int, default=500, help="larger images are made smaller: pixels of the longer side")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    parser.add_argument("--workers", type=int, help="processes (default: the CPUs there are)")
    parser.add_argument("--skip_bad", action="store_true", help="leave out files that cannot be read, listed in OUT.skipped.txt, and keep "
                                                                "classes without images, instead of stopping at the first")
    args = parser.parse_args(argv)
    name, _, split = args.source.partition(":")
    try:
        if name in ("imagenet", "fashion_mnist") and split:
            root = Path(args.root or f"datasets/{name}")
            if name == "imagenet" and split in ("train", "val"):
                unpack_imagenet(root, split)
            source = open_dataset(name, root, split)
        else:
            if args.root:
                raise ValueError(f"--root belongs to a named data set, imagenet:train say, not to the folder {args.source}")
            source = ImageTree(args.source)
        if isinstance(source, ImageTree):
            if source.ignored:
                print(f"{len(source.ignored)} files have names of no image format and are left alone, {source.ignored[0]} among them",
                      file=sys.stderr)
            if (empty := source.empty_classes()) and not args.skip_bad:
                raise ValueError(f"{source.root}: class folders without images: {', '.join(empty)} "
                                 "(--skip_bad keeps them as empty classes)")
        mode = args.mode or ("raw" if name == "fashion_mnist" else "jpg")
        bad = write_beton(source, args.path, args.workers, mode, args.max_resolution, args.quality, args.skip_bad)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if bad:
        print(f"{len(bad)} of {len(source)} images were left out: {Path(args.path).with_suffix('.skipped.txt')}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: told to stop"))  # so that nothing half-written stays behind
    sys.exit(main(sys.argv[1:]))
