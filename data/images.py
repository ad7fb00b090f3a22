"""Raw images: trees of class folders, Fashion-MNIST's and ILSVRC2012's own files."""

import copy
import functools
import gzip
import hashlib
import os
import shutil
import tarfile
from fractions import Fraction as Ratio
from pathlib import Path
from shlex import quote

from torchvision.datasets import DatasetFolder, FashionMNIST, imagenet

from data.order import find_empty, list_some
from data.rgb import get_extensions, read_image
from errors import UserError
from files import remove_leftovers, temporary

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
# Folders that macOS's archives, Synology's storage and Windows put among a user's own.
LEFT_BY_SYSTEMS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information"}
FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


# ---- trees of class folders


class ImageTree(DatasetFolder):
    """torchvision's data set of a tree of class folders, of every format that Pillow reads, by read_image.

    Left alone and listed are `loose`, images beside the class folders, and `ignored`: files whose names are
    of no such format, hidden files and folders, and those that systems leave there.
    trust_images: see read_image. allow_empty: also class folders without images.
    Raises UserError without the folder or without images, for a folder that lies within itself by a link, and
    for classes without images.
    """

    def __init__(self, root: str | Path, allow_empty: bool = False, trust_images: bool = False) -> None:
        self.ignored: list[str] = []
        self.loose: list[str] = []
        if not Path(root).is_dir():
            raise UserError(f"there is no folder {root}: expected {root}/CLASS/IMAGE.jpg")
        try:
            loader = functools.partial(read_image, trust_images=trust_images)
            super().__init__(root, loader, get_extensions(), allow_empty=True)
        except OSError as error:  # a folder that can't be opened
            raise UserError(str(error)) from None
        self.ignored.sort()
        if not self.samples:
            raise UserError(_explain_no_images(self))
        empty = find_empty(self.classes, self.targets)
        if empty and not allow_empty:
            raise UserError(
                f"{root}: class folders without images: {list_some(empty)}: remove them or fill them "
                "(data.beton --skip_bad keeps them as empty classes)"
            )

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """torchvision's method: the names of the class folders, and the label of each."""
        folders, files = self._list(directory)
        extensions = get_extensions()
        for path in files:
            is_image = path.lower().endswith(extensions)
            (self.loose if is_image else self.ignored).append(path)
        classes = [os.path.basename(folder) for folder in folders]
        return classes, {name: label for label, name in enumerate(classes)}

    def make_dataset(
        self, directory: str, class_to_idx: dict[str, int], extensions: tuple[str, ...], **_
    ) -> list[tuple[str, int]]:
        """torchvision's method, in its order: (path, label) of every image of the class folders."""
        samples, above = [], _get_real_parents(directory)
        for name, label in class_to_idx.items():
            for path in self._find_files(os.path.join(directory, name), above):
                if path.lower().endswith(extensions):
                    samples.append((path, label))
                else:
                    self.ignored.append(path)
        return samples

    def _find_files(self, top: str, above: frozenset[Path]) -> list[str]:
        """All files below the folder `top`, through links to folders as well, folder by folder.

        above: the real paths of all folders that it lies in.
        """
        found, todo = [], [(top, above)]
        while todo:
            folder, above = todo.pop()
            real = Path(os.path.realpath(folder))
            if real in above:
                raise UserError(f"{folder} is a link to {real}, a folder that it lies in itself: remove it")
            folders, files = self._list(folder)
            found.append((folder, files))
            above = above | {real, *real.parents}
            todo += [(inner, above) for inner in folders]
        return [path for _, files in sorted(found) for path in files]

    def _list(self, folder: str) -> tuple[list[str], list[str]]:
        """(folders, files) in `folder`, sorted. Its hidden entries go to `ignored`."""
        folders, files = [], []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in LEFT_BY_SYSTEMS:
                    self.ignored.append(entry.path)
                elif _is_folder(entry):
                    folders.append(entry.path)
                else:
                    files.append(entry.path)
        return sorted(folders), sorted(files)

    def describe_rest(self) -> list[str]:
        """What of the tree is left alone, in sentences."""
        sentences = []
        if self.ignored:
            sentences.append(
                f"{self.root}: left alone, hidden or with a name of no image format: "
                f"{len(self.ignored)} files or folders, the first {self.ignored[0]}"
            )
        if self.loose:
            sentences.append(
                f"{self.root}: left alone, beside the class folders and in none of them: "
                f"{len(self.loose)} images, the first {self.loose[0]}"
            )
        return sentences


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: a file, which can't be read
        return False


def _get_real_parents(folder: str | Path) -> frozenset[Path]:
    """The real paths of a folder and of all that it lies in, as its path says and as it really does."""
    above, absolute = set(), Path(folder).absolute()
    for parent in (absolute, *absolute.parents):
        real = Path(os.path.realpath(parent))
        above |= {real, *real.parents}
    return frozenset(above)


def _explain_no_images(tree: ImageTree) -> str:
    """Why there is nothing in `tree`, as far as it can be seen, and the way out."""
    root = tree.root
    tars = [path for path in tree.ignored if path.lower().endswith(".tar")]
    if tree.loose:
        first = tree.loose[0]
        what = f"{root} holds {len(tree.loose)} images, the first {first}, and no class folders with images"
        if os.path.basename(first).startswith("ILSVRC2012_val_"):
            archives = "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, which knows their classes,"
            return f"{what}: {_unpack_anew(root, 'val', archives)}"
        return f"{what}: put those of each class into a folder of its name, {root}/CLASS/IMAGE.jpg"
    if tars:
        return (
            f"{root} holds {len(tars)} .tar files, the first {tars[0]}, and no images: unpack each into a "
            f"folder of its own, {root}/CLASS/IMAGE.jpg, or, where they are ILSVRC2012's, "
            f"{_unpack_anew(root, 'train', 'ILSVRC2012_img_train.tar')}"
        )
    return f"no images under {root}: expected {root}/CLASS/IMAGE.jpg"


def _unpack_anew(root: str | Path, split: str, archives: str) -> str:
    above = os.path.dirname(os.path.abspath(root))
    command = f"python -m data.beton imagenet:{split} {split}.beton --root {quote(above)}"
    return f"move {root} away, put {archives} into {above} and run `{command}`, which unpacks them"


def split_tree(tree: ImageTree, share: Ratio) -> dict[str, ImageTree]:
    """{"train": about `share` of the images, "val": the others}, each with all classes.

    Where an image goes is a hash of its path within the tree, as in TensorFlow's image_retraining: images
    that are added or removed move no other, nor does the tree's place; a larger share only takes from val.
    Raises UserError where one of the two gets no image.
    """
    samples = {"train": [], "val": []}
    limit = int(share * 2**64)
    for path, label in tree.samples:
        name = os.fsencode(os.path.relpath(path, tree.root))
        number = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")  # below 2**64
        samples["train" if number < limit else "val"].append((path, label))
    parts = {}
    for part, chosen in samples.items():
        if not chosen:
            raise UserError(f"{tree.root}: with these shares {part} gets none of {len(tree)} images")
        parts[part] = copy.copy(tree)
        parts[part].samples, parts[part].targets = chosen, [label for _, label in chosen]
    return parts


# ---- data sets


def open_dataset(dataset: str, root: str | Path, split: str, **options) -> ImageTree | FashionMNIST:
    """torchvision's data set of `split` ("train" or "val") under `root`: (PIL image, label), `.classes`.

    Of ImageNet the tree root/split/CLASS/IMAGE, with ImageTree's `options`. Raises UserError for an unknown
    name, or where the files are not there or damaged.
    """
    if split not in ("train", "val"):
        raise UserError(f"unknown split {split!r}: expected train or val")
    if dataset == "imagenet":
        return ImageTree(Path(root) / split, **options)
    if dataset != "fashion_mnist":
        raise UserError(f"unknown data set {dataset!r}: expected fashion_mnist or imagenet")
    return _open_fashion_mnist(root, split)


def _open_fashion_mnist(root: str | Path, split: str) -> FashionMNIST:
    if not all((Path(root) / "FashionMNIST" / "raw" / name).exists() for name in FILES):
        raise UserError(
            f"no Fashion-MNIST under {root}: make it with "
            f"`python -m data.folder fashion_mnist {quote(str(root))}`"
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
    remove_leftovers(raw, "*-ubyte.*.tmp")
    for name in FILES:
        with temporary(raw / name) as partial:  # a half-written file must not look like a finished one
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
