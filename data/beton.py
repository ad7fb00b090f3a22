"""Image data sets as FFCV's .beton files: writing them, and checking them before anything maps them.

A tree of CLASS/IMAGE files, of any format Pillow reads:
    python -m data.beton /data/flowers/train flowers/train.beton
One tree, split into train.beton and val.beton of the folder `flowers`:
    python -m data.beton /data/flowers flowers --split 0.9/0.1
ILSVRC2012 from its tars and devkit in --root, or from the tree as torchvision unpacks them there, 150 GB:
    python -m data.beton imagenet:train imagenet/train.beton --root /data/imagenet
    python -m data.beton imagenet:val imagenet/val.beton --root /data/imagenet
Fashion-MNIST:
    python -m data.beton fashion_mnist:train datasets/fashion_mnist/train.beton
"""

import argparse
import contextlib
import glob
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.import_ffcv import import_ffcv
from data.order import find_empty, list_some
from data.writer import Pixels, Written, disk_errors, write_samples
from errors import UserError
from files import expand_home, remove_leftovers, temporary

# The layout of a .beton, version 2 (ffcv/types.py): header, field descriptors, metadata, pages of data,
# allocation table.
VERSION = 2
# fmt: off
HEADER = np.dtype([("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"),
                   ("alloc_table_ptr", "<u8")], align=True)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
# fields of type 2 (RGBImageField) and 1 (IntField)
METADATA = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
# fmt: on
JPEG, RAW = 0, 1  # of IMAGE["mode"]; FFCV copies raw pixels without a look at the size of its target


# ---- reading


def read_samples(path: str | Path) -> np.ndarray:
    """Check that a .beton of images and labels is whole, reading no image data, and return its samples.

    int64 (N, 6), of each the place and the size of its data in the file, JPEG or RAW, height, width, label.
    Before an FFCV Loader is built this is needed: on a damaged file that one hangs, crashes, or yields black
    images. Raises UserError, one sentence naming the file: missing, empty, cut anywhere, not a .beton, of
    another version, without (all of) its allocation table, or with images that lie outside of it.
    """
    _require(os.path.isfile(path), path, "there is no such file")
    try:
        num_fields, num_samples, table = _read_header(path)
        data_start = HEADER.itemsize + num_fields * FIELD.itemsize + num_samples * METADATA.itemsize
        _check_sizes(path, os.path.getsize(path), num_samples, data_start, table)
        metadata = np.fromfile(
            path, METADATA, num_samples, offset=data_start - num_samples * METADATA.itemsize
        )
        allocations = np.fromfile(path, ALLOCATION, num_samples, offset=table)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    allocations = allocations[np.argsort(allocations["sample_id"])]
    _check_allocations(path, metadata["image"], allocations, data_start, table)
    images, starts, sizes = metadata["image"], allocations["ptr"], allocations["size"]
    columns = (starts, sizes, images["mode"], images["height"], images["width"], metadata["label"])
    return np.stack([column.astype(np.int64) for column in columns], axis=1)


def _require(fine: bool, path: str | Path, message: str) -> None:
    if not fine:
        raise UserError(f"{path}: {message}")


def _read_header(path: str | Path) -> tuple[int, int, int]:
    """(number of fields, number of samples, place of the allocation table) of a .beton's header."""
    size = os.path.getsize(path)
    _require(size > 0, path, "the file is empty")
    _require(size >= HEADER.itemsize, path, f"not a .beton file, {size} bytes are less than a header")
    header = np.fromfile(path, HEADER, 1)[0]
    version, num_fields, page_size, num_samples, table = (int(value) for value in header)
    power_of_two = page_size >= 1 << 21 and page_size & (page_size - 1) == 0
    plausible = power_of_two and 1 <= num_fields < 256
    _require(plausible, path, "not a .beton file, its first bytes are no header of one")
    message = f"a .beton of version {version}, but version {VERSION} is what can be read"
    _require(version == VERSION, path, message)
    fields_end = HEADER.itemsize + num_fields * FIELD.itemsize
    _require(size >= fields_end, path, "cut short, it ends within its field descriptors")
    fields = [
        (int(field["type_id"]), bytes(field["name"]).rstrip(b"\0").decode("latin1"))
        for field in np.fromfile(path, FIELD, num_fields, offset=HEADER.itemsize)
    ]
    expected = [(2, "image"), (1, "label")]
    _require(fields == expected, path, f"its fields are {fields}, not an RGB image and an integer label")
    _require(num_samples > 0, path, "it has no samples")
    _require(table > 0, path, "it has no allocation table, so its writer did not finish")
    return num_fields, num_samples, table


def _check_sizes(path: str | Path, size: int, num_samples: int, data_start: int, table: int) -> None:
    """That the file has its metadata, and behind its data an allocation table of num_samples rows."""
    _require(size >= data_start, path, f"cut short, its metadata ends before sample {num_samples}")
    message = f"cut short, it has {size} bytes and its allocation table would start at {table}"
    _require(size >= table, path, message)
    expected = num_samples * ALLOCATION.itemsize
    message = f"cut or written to, its allocation table has {size - table} bytes, not {expected}"
    _require(size - table == expected, path, message)


def _check_allocations(
    path: str | Path, images: np.ndarray, allocations: np.ndarray, data_start: int, table: int
) -> None:
    """That every image lies in the data, where its metadata and the table say, as large as it must be."""
    starts, sizes = allocations["ptr"], allocations["size"]
    inside = (starts >= data_start) & (starts <= table) & (sizes <= table - starts)
    _require(inside.all(), path, "its allocation table points outside of the data")
    agree = (allocations["sample_id"] == np.arange(len(images))) & (starts == images["data_ptr"])
    _require(agree.all(), path, "its metadata and its allocation table contradict each other")
    pixels = images["width"].astype(np.uint64) * images["height"] * np.uint64(3)
    raw = (images["mode"] == RAW) & (sizes == pixels)
    fits = (pixels > 0) & ((images["mode"] == JPEG) | raw)
    _require(fits.all(), path, "the size of an image and that of its data contradict each other")


def check_beton(path: str | Path) -> int:
    """The number of samples of a whole .beton. Raises UserError on a damaged one, as read_samples."""
    return len(read_samples(path))


class About(NamedTuple):
    """What write_beton put beside a .beton."""

    classes: list[str] | None = None
    max_resolution: int | None = None  # of the images, pixels a side


def read_about(path: str | Path) -> About:
    """What the .json beside a .beton says; nothing where there is no such file. Raises UserError on a damaged
    one."""
    index = Path(path).with_suffix(".json")
    try:
        about = json.loads(index.read_text())
        return About(list(about["classes"]), about.get("max_resolution"))
    except FileNotFoundError:
        return About()
    except OSError as error:
        raise UserError(f"{index} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is damaged ({error!r}): write {path} anew") from None


def find_beton(dataset: str, data_dir: str | Path, split: str) -> Path:
    """data_dir/{split}.beton. Raises UserError, with the command that makes it, where it is not."""
    path = Path(data_dir) / f"{split}.beton"
    if not path.exists():
        words = ["python", "-m", "data.beton", f"{dataset}:{split}", str(path), "--root", str(data_dir)]
        command = shlex.join(words)
        raise UserError(f"{path} is not there: make it with `{command}`")
    return path


# ---- writing


def write_beton(
    source: Sequence,
    path: str | Path,
    workers: int | None = None,
    mode: str = "raw",
    max_resolution: int = 500,
    quality: int = 90,
    skip_bad: bool = False,
) -> Written:
    """Write a torchvision data set of items (PIL image, label), with `.classes`: a .beton, a .json beside it.

    mode: raw pixels (read 2 to 3 × as fast, 5 × as large) or jpg of `quality`. Images with a side above
    max_resolution are made smaller. skip_bad: leave out images that cannot be read, and list them in
    OUT.skipped.txt, instead of stopping at the first. The .beton appears under its name only when whole and
    read back; the .json holds num_samples, the class names and the arguments.

    Returns what became of the images. Raises UserError on arguments, a bad image, a worker that was killed, a
    full disk, or a file that reads back as something else; RuntimeError with a worker's traceback.
    """
    return write_betons({Path(path): source}, workers, mode, max_resolution, quality, skip_bad)[0]


def write_betons(
    sources: dict[Path, Sequence],
    workers: int | None,
    mode: str,
    max_resolution: int,
    quality: int,
    skip_bad: bool,
) -> list[Written]:
    """write_beton for each path of `sources`: all of them appear, once the last is written, or none does."""
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    for path, source in sources.items():
        _check_arguments(path, len(source), workers, max_resolution, quality)
        with disk_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
    names = [name for path in sources for name in (path, path.with_suffix(".json"))]
    for name in names:
        for leftover in remove_leftovers(name.parent, f"{glob.escape(name.name)}.*.tmp"):
            print(f"removed {leftover}, which a process that was killed had left", file=sys.stderr)
    written = []
    with _temporaries(*names) as temporaries:
        partials = dict(zip(names, temporaries))
        for path, source in sources.items():
            partial, dataset = partials[path], Pixels(source, max_resolution)
            processes = min(workers, len(dataset))
            written.append(write_samples(partial, path, dataset, processes, mode, quality, skip_bad))
            bad = written[-1].skipped
            _verify(partial, dataset, bad, mode, quality)
            index = {
                "num_samples": len(dataset) - len(bad),
                "classes": list(source.classes),
                "mode": mode,
                "max_resolution": max_resolution,
                "quality": quality,
                "skipped": len(bad),
            }
            with disk_errors():
                partials[path.with_suffix(".json")].write_text(json.dumps(index, indent=2) + "\n")
        with disk_errors():
            for name in names:
                os.replace(partials[name], name)
            for path, what in zip(sources, written):
                _report(path.with_suffix(".skipped.txt"), what.skipped)
    return written


@contextlib.contextmanager
def _temporaries(*paths: Path) -> Iterator[list[Path]]:
    """`temporary` of each of the paths. Raises UserError where the disk refuses to make one."""
    with contextlib.ExitStack() as stack:
        with disk_errors():
            partials = [stack.enter_context(temporary(path)) for path in paths]
        yield partials


def _check_arguments(path: Path, images: int, workers: int, max_resolution: int, quality: int) -> None:
    _require(path.suffix == ".beton", path, "expected a name that ends in .beton")
    message = f"{images} images and {workers} workers, expected at least one of each"
    _require(images > 0 and workers > 0, path, message)
    if not 1 <= max_resolution <= 4000:  # 48 MB, which every worker holds as a page
        raise UserError(f"max_resolution must be 1 to 4000, not {max_resolution}")
    if not 1 <= quality <= 100:
        raise UserError(f"quality must be 1 to 100, not {quality}")


def _verify(path: Path, dataset: Pixels, bad: dict[int, str], mode: str, quality: int) -> None:
    """Read the structure and up to 1000 images back, and compare them with what they should be."""
    import_ffcv()
    from ffcv.fields.rgb_image import encode_jpeg

    good, samples = np.setdiff1d(np.arange(len(dataset)), list(bad)), read_samples(path)
    if len(samples) != len(good):
        raise UserError(f"{path}: {len(samples)} samples were written of {len(good)}")
    for place in np.linspace(0, len(good) - 1, min(1000, len(good))).astype(int):
        image, label = dataset[good[place]]
        expected = image.tobytes() if mode == "raw" else encode_jpeg(image, quality).tobytes()
        start, size, _, height, width, stored_label = samples[place].tolist()
        stored = np.fromfile(path, np.uint8, size, offset=start).tobytes()
        if stored != expected or (height, width, stored_label) != (*image.shape[:2], label):
            raise UserError(f"{path}: sample {place} reads back as something else than what was written")


def _report(path: Path, bad: dict[int, str]) -> None:
    """The list of the images that were left out, or no such file."""
    path.unlink(missing_ok=True)
    if bad:
        path.write_text("".join(f"{bad[i]}\n" for i in sorted(bad)), errors="surrogateescape")


# ---- the command


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="data.beton", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a folder of class folders of images; or imagenet:train, imagenet:val, "
        "fashion_mnist:train, fashion_mnist:val in --root",
    )
    out = "OUT.beton, with OUT.json beside it: number of samples, class names; with --split a folder"
    parser.add_argument("path", metavar="OUT", help=out)
    parser.add_argument("--root", help="where a named data set lies (default: datasets/NAME)")
    modes = "how images are kept (default: jpg; fashion_mnist: raw)"
    parser.add_argument("--mode", choices=["jpg", "raw"], help=modes)
    smaller = "larger images are made smaller: pixels of the longer side"
    parser.add_argument("--max_resolution", type=int, default=500, help=smaller)
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    parser.add_argument("--workers", type=int, help="processes (default: the CPUs there are)")
    skip = (
        "leave out files that cannot be read, listed in OUT.skipped.txt, and keep classes without images, "
        "instead of stopping at the first"
    )
    parser.add_argument("--skip_bad", action="store_true", help=skip)
    trust = "read images of any size and PNGs with texts of any length, which someone else's may abuse"
    parser.add_argument("--trust_images", action="store_true", help=trust)
    split = (
        "write train.beton and val.beton into the folder OUT, with these shares of the images; a hash of its "
        "path in the tree says where an image goes, whatever the other images are"
    )
    parser.add_argument("--split", metavar="0.9/0.1", help=split)
    return parser.parse_args(argv)


def open_source(source: str, root: str | None, skip_bad: bool, trust_images: bool) -> Sequence:
    """The data set that SRC and --root name.

    Raises UserError where it isn't there or, without skip_bad, has classes without images.
    """
    options = {"allow_empty": skip_bad, "trust_images": trust_images}
    # Here, because importing torchvision takes seconds.
    from data.images import ImageTree, open_dataset, unpack_imagenet

    name, _, split = source.partition(":")
    if name in ("imagenet", "fashion_mnist") and split:
        folder = Path(root or f"datasets/{name}")
        if name == "imagenet" and split in ("train", "val"):
            unpack_imagenet(folder, split)
        images = open_dataset(name, folder, split, **options)
    elif root:
        raise UserError(f"--root belongs to a named data set, imagenet:train say, not to the folder {source}")
    else:
        images = ImageTree(source, **options)
    if isinstance(images, ImageTree):
        for sentence in images.describe_rest():
            print(sentence, file=sys.stderr)
    return images


def parse_split(split: str) -> Fraction:
    """The training share of --split TRAIN/VAL. Raises UserError for shares that don't add up to 1."""
    try:
        shares = [Fraction(share) for share in split.split("/")]
    except ValueError:
        shares = []
    if len(shares) != 2 or min(shares) <= 0 or sum(shares) != 1:
        raise UserError(f"--split {split}: expected two shares above 0 that add up to 1, 0.9/0.1 say")
    return shares[0]


def choose_files(source: Sequence, path: Path, share: Fraction | None) -> dict[Path, Sequence]:
    """Which file each part of `source` is written to: OUT.beton or, split, the two in the folder OUT."""
    if share is None:
        return {path: source}
    from data.images import ImageTree, split_tree

    if not isinstance(source, ImageTree):
        raise UserError("--split is for a folder of class folders: fashion_mnist has a train and a val")
    return {path / f"{part}.beton": images for part, images in split_tree(source, share).items()}


def describe(path: Path, source: Sequence, written: Written) -> list[str]:
    """What a person should know of the .beton that was written, in sentences."""
    sentences, skipped, flat = [], written.skipped, written.single_colour
    if skipped:
        report = path.with_suffix(".skipped.txt")
        sentences.append(f"{len(skipped)} of {len(source)} images were left out: {report}")
    if empty := find_empty(source.classes, np.delete(np.asarray(source.targets), list(skipped))):
        sentences.append(f"{path}: no image is of these classes: {list_some(empty)}")
    if flat:
        first = source.samples[flat[0]][0] if hasattr(source, "samples") else f"number {flat[0]}"
        sentences.append(
            f"{path}: {len(flat)} of {len(source)} images are one single colour, the first {first}"
        )
    return sentences


def main(argv: list[str]) -> int:
    """Exit status: 0; 1 with one line on stderr for a user's mistake; 2, by argparse, for wrong flags; 130
    for Ctrl-C."""
    args = parse_arguments(argv)
    mode = args.mode or ("raw" if args.source.startswith("fashion_mnist:") else "jpg")
    try:
        args.source, args.path = expand_home(args.source), Path(expand_home(args.path))
        args.root = args.root and expand_home(args.root)
        share = None if args.split is None else parse_split(args.split)
        if share and args.path.suffix == ".beton":
            raise UserError(f"with --split OUT is a folder, for train.beton and val.beton: not {args.path}")
        source = open_source(args.source, args.root, args.skip_bad, args.trust_images)
        files = choose_files(source, args.path, share)
        written = write_betons(files, args.workers, mode, args.max_resolution, args.quality, args.skip_bad)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing is written", file=sys.stderr)
        return 130
    for (path, part), what in zip(files.items(), written):
        for sentence in describe(path, part, what):
            print(sentence, file=sys.stderr)
    return 0


if __name__ == "__main__":
    # So that nothing half-written stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: told to stop"))
    sys.exit(main(sys.argv[1:]))
