"""Raw images: any format Pillow reads, trees of class folders, Fashion-MNIST's and ILSVRC2012's own files."""

import contextlib
import gzip
import os
import shlex
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets import FashionMNIST, ImageFolder, imagenet

from data.order import DataError
from errors import UserError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


# ---- one image


@contextlib.contextmanager
def _only_pillow(path: str | Path) -> Iterator[None]:
    """For Pillow's calls and nothing else: its plugins raise what they like on a damaged file.

    OSError, SyntaxError, ValueError, struct.error, … all become a DataError that names the file.
    """
    try:
        yield
    except Exception as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def read_image(path: str | Path) -> Image.Image:
    """A file of any format that Pillow reads as an RGB image. Raises DataError, naming the file.

    It is upright, because EXIF's orientation is applied, and an alpha channel is dropped.
    """
    with _only_pillow(path), Image.open(path) as file:
        image = ImageOps.exif_transpose(file)  # a copy
    if image.mode.startswith("I"):
        image = _drop_lower_bits(image)
    with _only_pillow(path):
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # Pillow warns otherwise
        return image.convert("RGB")


def _drop_lower_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits as one of 8: Pillow would cut off the upper ones."""
    pixels = np.asarray(image)  # (H, W)
    if pixels.max() <= 255:
        return image
    return Image.fromarray((pixels >> 8).clip(0, 255).astype(np.uint8))


# ---- data sets


class ImageTree(ImageFolder):
    """torchvision's ImageFolder of every format that Pillow reads, by read_image.

    `ignored`: files whose names are of no such format. Raises UserError without the folder or without images.
    """

    def __init__(self, root: str | Path) -> None:
        extensions = tuple(Image.registered_extensions())
        self.ignored: list[str] = []

        def is_image(path: str) -> bool:
            if path.lower().endswith(extensions):
                return True
            self.ignored.append(path)
            return False

        if not Path(root).is_dir():
            raise UserError(f"there is no folder {root}: expected {root}/CLASS/IMAGE.jpg")
        try:
            super().__init__(root, loader=read_image, is_valid_file=is_image, allow_empty=True)
        except OSError as error:  # no class folders in it, or one that can't be opened
            raise UserError(str(error)) from None
        if not self.samples:
            raise UserError(f"no images under {root}: expected {root}/CLASS/IMAGE.jpg")
        self.is_valid_file = None  # else it could not be sent to processes

    def empty_classes(self) -> list[str]:
        """Names of the class folders without an image."""
        return [self.classes[label] for label in sorted(set(range(len(self.classes))) - set(self.targets))]


def open_dataset(dataset: str, root: str | Path, split: str) -> ImageTree | FashionMNIST:
    """torchvision's data set of `split` ("train" or "val") under `root`: (PIL image, label), `.classes`.

    Of ImageNet the tree root/split/CLASS/IMAGE. Raises UserError for an unknown name, or where the files are
    not there or damaged.
    """
    if split not in ("train", "val"):
        raise UserError(f"unknown split {split!r}: expected train or val")
    if dataset == "imagenet":
        return ImageTree(Path(root) / split)
    if dataset != "fashion_mnist":
        raise UserError(f"unknown data set {dataset!r}: expected fashion_mnist or imagenet")
    return _open_fashion_mnist(root, split)


def _open_fashion_mnist(root: str | Path, split: str) -> FashionMNIST:
    if not all((Path(root) / "FashionMNIST" / "raw" / name).exists() for name in FILES):
        raise UserError(
            f"no Fashion-MNIST under {root}: make it with "
            f"`python -m data.folder fashion_mnist {shlex.quote(str(root))}`"
        )
    try:  # only torchvision runs in here, which raises ValueError or RuntimeError on a file cut short
        source = FashionMNIST(root, train=split == "train")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"Fashion-MNIST's {split} files under {root} are damaged ({error}): "
            f"delete {root}/FashionMNIST and make it anew"
        ) from None
    images, labels = len(source.data), source.targets
    if len(labels) != images or not 0 <= labels.min() <= labels.max() < len(source.classes):
        raise UserError(
            f"Fashion-MNIST's {split} files under {root} do not belong together: {images} images, "
            f"{len(labels)} labels from {labels.min()} to {labels.max()}"
        )
    return source


# ---- their files


def prepare_fashion_mnist(root: str | Path) -> None:
    """Put Fashion-MNIST's four files into root/FashionMNIST/raw, where torchvision looks.

    A second call does nothing. Raises UserError if neither Debian's package nor the network has them, or the
    disk doesn't take them.
    """
    raw = Path(root) / "FashionMNIST" / "raw"
    if all((raw / name).exists() for name in FILES):
        return
    if all((DEBIAN / f"{name}.gz").exists() for name in FILES):
        try:
            _copy_fashion_mnist(raw)
        except OSError as error:
            raise UserError(str(error)) from None
        return
    try:  # only torchvision runs in here
        FashionMNIST(root, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            "Fashion-MNIST is neither here as Debian's package (apt-get install dataset-fashion-mnist) "
            f"nor can it be downloaded: {error}"
        ) from None


def _copy_fashion_mnist(raw: Path) -> None:
    raw.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        partial = raw / f"{name}.{os.getpid()}.tmp"  # a half-written file must not look like a finished one
        with gzip.open(DEBIAN / f"{name}.gz") as source, open(partial, "wb") as target:
            shutil.copyfileobj(source, target)
        os.replace(partial, raw / name)


def unpack_imagenet(root: Path, split: str) -> None:
    """Make the tree root/split/CLASS/IMAGE from ILSVRC2012's own tars and devkit in `root`, by torchvision.

    torchvision checks their sums. The tree appears under its name only when whole; a second call does
    nothing. Raises UserError where an archive is missing or damaged.
    """
    tree, partial = root / split, root / f"{split}.tmp"
    if tree.is_dir():
        return
    archives = [f"ILSVRC2012_img_{split}.tar"]
    if split == "val":
        archives.append("ILSVRC2012_devkit_t12.tar.gz")
    for name in archives:
        if not (root / name).exists():
            raise UserError(f"neither {tree}/CLASS/IMAGE.jpg is there nor {root / name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:  # only torchvision runs in here, which raises RuntimeError on a wrong sum
        if split == "train":
            imagenet.parse_train_archive(root, folder=partial.name)
        else:
            imagenet.parse_devkit_archive(root)  # says which class each image is of
            imagenet.parse_val_archive(root, folder=partial.name)
        os.replace(partial, tree)
    except (OSError, RuntimeError, tarfile.TarError) as error:
        raise UserError(str(error)) from None
