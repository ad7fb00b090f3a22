"""python bench.py data: images/s of FFCV, beside torchvision's DataLoader on the same images."""

import random
import statistics
import tempfile
import time
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


def make_photos(folder: Path, count: int) -> None:
    """A tree of `count` JPEGs that cost what ImageNet's do: 500 × 375, 120 kB; noise whose spectrum falls as photographs' does."""
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


def torchvision_batches(folder: Path, batch_size: int, num_workers: int, rand_augment: int):
    """The loader one would write without this repo: normalised float32 batches (B, 3, 224, 224) and labels."""
    extra = (
        [timm_rand_augment(f"rand-m{rand_augment}-mmax{rand_augment}-p1.0-n2", {"img_mean": (128,) * 3})]
        if rand_augment
        else []
    )
    pipeline = T.Compose(
        [
            T.RandomResizedCrop(224, (0.05, 1.0)),
            T.RandomHorizontalFlip(),
            *extra,
            T.ToTensor(),
            T.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )
    return torch.utils.data.DataLoader(
        ImageFolder(str(folder), pipeline),
        batch_size,
        shuffle=True,
        num_workers=num_workers,
        drop_last=True,
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
    )


def data(
    images: str | None = None,
    num_workers: int | None = None,
    count: int = 768,
    batch_size: int = 32,
    rounds: int = 5,
    rand_augment: int = 15,
) -> dict[str, float]:
    """Images/s of a training epoch, to normalised float32 batches of 224 × 224, and how many times torchvision's DataLoader's that is.

    images: a tree of CLASS/IMAGE; None = photo-like noise, made for the occasion. num_workers: threads of FFCV, processes of torchvision;
    None = one per core. count: images of an epoch. batch_size: float32 batches above 32 MB are fresh memory from the system each time,
    which costs a CPU more than normalising (a GPU does that itself). All take turns, in another order every round, `rounds` times;
    medians. Limit: JPEG decoding alone, by the same libturbojpeg on the same threads. Returns {row: images/s}, and prints it.
    """
    num_workers = num_workers or default_workers()
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(images) if images else Path(scratch) / "photos"
        if images is None:
            make_photos(tree, count)
        source = ImageTree(tree)
        source.samples = source.samples[:: max(1, len(source.samples) // count)][:count]
        if len(source) < batch_size:
            raise ValueError(f"{tree} has {len(source)} images, fewer than a batch of {batch_size}")
        same = (
            Path(scratch) / "same"
        )  # torchvision reads what the .beton holds: quality 90, at most 500 pixels
        for mode in ("jpg", "raw"):
            write_beton(source, Path(scratch) / mode / "train.beton", mode=mode)
        samples, file = (
            read_samples(Path(scratch) / "jpg/train.beton"),
            np.memmap(Path(scratch) / "jpg/train.beton", np.uint8, "r"),
        )
        for i, (start, size, _, _, _, label) in enumerate(samples.tolist()):
            path = same / str(label) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file[start : start + size].tobytes())

        def ours(mode, magnitude):
            loader = build_loader(
                "ffcv",
                "imagenet",
                Path(scratch) / mode,
                "train",
                batch_size,
                0,
                num_workers,
                num_classes=len(source.classes),
                rand_augment_magnitude=magnitude,
            )
            return lambda epoch: sum(
                len(normalise(x, (0.5,) * 3, (0.5,) * 3)) for x, _ in loader.epoch(epoch)
            )

        def theirs(magnitude):
            loader = torchvision_batches(same, batch_size, num_workers, magnitude)
            return lambda epoch: sum(len(x) for x, _ in loader)

        def decoding(epoch):
            numba.set_num_threads(num_workers)
            return decode_all(file, samples)

        runs = {
            "torchvision, JPEG": theirs(0),
            "FFCV, JPEG": ours("jpg", 0),
            "FFCV, raw": ours("raw", 0),
            "torchvision, JPEG, RandAugment": theirs(rand_augment),
            "FFCV, JPEG, RandAugment": ours("jpg", rand_augment),
            "FFCV, raw, RandAugment": ours("raw", rand_augment),
            "limit: JPEG decoding alone": decoding,
        }
        rates = {name: [] for name in runs}
        for epoch in range(rounds + 1):
            for name, run in random.sample(
                list(runs.items()), len(runs)
            ):  # each behind another one every time
                start = time.perf_counter()
                seen = run(epoch)
                if epoch:  # the first of each warms up
                    rates[name].append(seen / (time.perf_counter() - start))
        rates = {name: statistics.median(values) for name, values in rates.items()}
    megabytes = samples[:, 1].mean() / 1e6
    print(
        f"{len(source)} images of {megabytes:.3f} MB on average, {num_workers} workers, batches of {batch_size}, "
        f"RandAugment(2, {rand_augment}), medians of {rounds} epochs each\n\n{'':34}{'images/s':>10}{'× torchvision':>15}"
    )
    for name, rate in rates.items():
        peer = rates["torchvision, JPEG" + ", RandAugment" * name.endswith("RandAugment")]
        print(f"{name:34}{rate:10.0f}{rate / peer:15.2f}")
    return rates


@numba.njit(nogil=True, parallel=True)  # no cache: it would not notice a change of decode_jpeg
def decode_all(file, samples):
    for i in numba.prange(len(samples)):
        image = np.empty((samples[i, 3], samples[i, 4], 3), np.uint8)
        decode_jpeg(file[samples[i, 0] : samples[i, 0] + samples[i, 1]], image)
    return len(samples)
