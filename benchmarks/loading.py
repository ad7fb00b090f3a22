"""python bench.py data: images/s of FFCV, beside torchvision's DataLoader on the same images."""

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform as timm_rand_augment
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from data.beton import read_samples, write_beton
from data.decode import decode_jpeg
from data.device import normalise
from data.images import ImageTree
from data.loader import build_loader
from data.order import default_workers
from errors import UserError
from files import expand_home

HALF = (0.5, 0.5, 0.5)  # mean and standard deviation
AUGMENTED = ", RandAugment"  # behind the names of the runs with it


def make_photos(folder: Path, count: int) -> None:
    """A tree of `count` JPEGs that cost what ImageNet's do: 500 × 375, 120 kB; noise whose spectrum falls as
    photographs' does."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500))
    frequency[0, 0] = 1
    for i in range(count):
        noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(3, 375, 500))) / frequency**1.05, s=(375, 500))
        noise = noise + noise.mean(axis=0)  # channels agree more than not
        pixels = (noise / noise.std() * 55 + 120).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        path = folder / f"class_{i % 4}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)


def torchvision_batches(
    folder: Path, batch_size: int, num_workers: int, rand_augment: int
) -> torch.utils.data.DataLoader:
    """The loader one would write without this repo: normalised float32 batches (B, 3, 224, 224) and
    labels."""
    steps = [T.RandomResizedCrop(224, (0.05, 1.0)), T.RandomHorizontalFlip()]
    if rand_augment:
        policy = f"rand-m{rand_augment}-mmax{rand_augment}-p1.0-n2"
        steps.append(timm_rand_augment(policy, {"img_mean": (128,) * 3}))
    steps += [T.ToTensor(), T.Normalize(HALF, HALF)]
    return torch.utils.data.DataLoader(
        ImageFolder(str(folder), T.Compose(steps)),
        batch_size,
        shuffle=True,
        num_workers=num_workers,
        drop_last=True,
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
    )


@dataclass
class Contest:
    """The same images in the forms that the loaders read, and how many workers and images a batch has."""

    scratch: Path
    classes: int
    num_workers: int
    batch_size: int

    def __post_init__(self):
        beton = self.scratch / "jpg" / "train.beton"
        self.samples = read_samples(beton)  # rows of start, size, …, height, width, label
        self.file = np.memmap(beton, np.uint8, "r")

    def write_jpegs(self) -> None:
        """Write what the .beton holds (quality 90, at most 500 pixels a side) as the files that torchvision
        reads."""
        for i, (start, size, _, _, _, label) in enumerate(self.samples.tolist()):
            path = self.scratch / "same" / str(label) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.file[start : start + size].tobytes())

    def build_ours(self, mode: str, rand_augment: int) -> Callable[[int], int]:
        """A function of the epoch's number that goes through its batches, and counts its images."""
        loader = build_loader(
            "ffcv",
            "imagenet",
            self.scratch / mode,
            "train",
            self.batch_size,
            0,
            self.num_workers,
            num_classes=self.classes,
            rand_augment_magnitude=rand_augment,
        )
        return lambda epoch: sum(len(normalise(images, HALF, HALF)) for images, _ in loader.epoch(epoch))

    def build_theirs(self, rand_augment: int) -> Callable[[int], int]:
        """The same by torchvision's."""
        folder = self.scratch / "same"
        loader = torchvision_batches(folder, self.batch_size, self.num_workers, rand_augment)
        return lambda epoch: sum(len(images) for images, _ in loader)

    def decode(self, epoch: int) -> int:
        """Decode all images on as many threads, and nothing else. Returns how many."""
        numba.set_num_threads(self.num_workers)
        return decode_all(self.file, self.samples)


def time_epochs(runs: dict[str, Callable[[int], int]], rounds: int) -> dict[str, float]:
    """Images/s of each: the median of `rounds` epochs after a first one, in another order every round."""
    rates = {name: [] for name in runs}
    for epoch in range(rounds + 1):
        for name in random.sample(list(runs), len(runs)):  # each behind another one every time
            start = time.perf_counter()
            seen = runs[name](epoch)
            if epoch:  # the first of each warms up
                rates[name].append(seen / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def data(
    images: str | None = None,
    num_workers: int | None = None,
    count: int = 768,
    batch_size: int = 32,
    rounds: int = 5,
    rand_augment: int = 15,
) -> dict[str, float]:
    """Images/s of a training epoch, to normalised float32 batches of 224 × 224, and how many times
    torchvision's DataLoader's that is.

    images: a tree of CLASS/IMAGE; None = photo-like noise, made for the occasion. num_workers: threads of
    FFCV, processes of torchvision; None = one per core. count: images of an epoch. batch_size: float32
    batches above 32 MB are fresh memory from the system each time, which costs a CPU more than normalising (a
    GPU does that itself). All take turns, in another order every round, `rounds` times; medians. Limit: JPEG
    decoding alone, by the same libturbojpeg on the same threads. Returns {row: images/s}, and prints it.
    """
    num_workers = num_workers or default_workers()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        tree = Path(expand_home(images)) if images else scratch / "photos"
        if images is None:
            make_photos(tree, count)
        source = ImageTree(tree)
        source.samples = source.samples[:: max(1, len(source.samples) // count)][:count]
        if len(source) < batch_size:
            raise UserError(f"{tree} has {len(source)} images, fewer than a batch of {batch_size}")
        for mode in ("jpg", "raw"):
            write_beton(source, scratch / mode / "train.beton", mode=mode)
        contest = Contest(scratch, len(source.classes), num_workers, batch_size)
        contest.write_jpegs()
        runs = {
            "torchvision, JPEG": contest.build_theirs(0),
            "FFCV, JPEG": contest.build_ours("jpg", 0),
            "FFCV, raw": contest.build_ours("raw", 0),
            f"torchvision, JPEG{AUGMENTED}": contest.build_theirs(rand_augment),
            f"FFCV, JPEG{AUGMENTED}": contest.build_ours("jpg", rand_augment),
            f"FFCV, raw{AUGMENTED}": contest.build_ours("raw", rand_augment),
            "limit: JPEG decoding alone": contest.decode,
        }
        rates = time_epochs(runs, rounds)
    megabytes = contest.samples[:, 1].mean() / 1e6
    print(f"{len(source)} images of {megabytes:.3f} MB on average, {num_workers} workers, ", end="")
    print(f"batches of {batch_size}, RandAugment(2, {rand_augment}), medians of {rounds} epochs each\n")
    print(f"{'':34}{'images/s':>10}{'× torchvision':>15}")
    for name, rate in rates.items():
        peer = "torchvision, JPEG"
        if name.endswith(AUGMENTED):
            peer += AUGMENTED
        print(f"{name:34}{rate:10.0f}{rate / rates[peer]:15.2f}")
    return rates


@numba.njit(nogil=True, parallel=True)  # no cache: it would not notice a change of decode_jpeg
def decode_all(file: np.ndarray, samples: np.ndarray) -> int:
    """Decode every image of a .beton's `file`, on numba's threads. Returns how many there are."""
    for i in numba.prange(len(samples)):
        image = np.empty((samples[i, 3], samples[i, 4], 3), np.uint8)
        decode_jpeg(file[samples[i, 0] : samples[i, 0] + samples[i, 1]], image)
    return len(samples)
