"""Part 6 of `python bench.py gpu`: from files to the GPU, while a step runs."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import train
from benchmarks.choices import get_ranks, repeat_noise
from benchmarks.contenders import Contender, build_contender
from benchmarks.gpu_findings import Check, Span, trace, wait_for, without_garbage_collection
from benchmarks.gpu_step import classify
from benchmarks.loading import make_photos
from data.loader import Batch, Loader, build_loader, prefetch
from data.order import default_workers
from model import parallel
from model.variants import VARIANTS


def check_loader(check: Check) -> None:
    """Photographs from files to the GPU while a step runs: do they arrive as the loader made them? How long a
    fed step takes beside one on a batch in memory and beside the loader alone, and which share of the copies
    runs beside kernels, is said and does not have to hold.

    The step is one that keeps a GPU busy: where the host is the slower one, as in a small eager step, there
    is no kernel left to hide a copy behind."""
    images, model = (4, "Ti/16") if check.tiny else (64, "L/16")
    batches = 4 * default_workers() + 40  # an epoch lasts longer than anything that is timed
    photos = check.scratch / "photos"
    make_photos(photos / "train", min(64, images * batches))
    multiply(photos / "train", images * batches)
    cfg = train.Config(
        model=model, dataset="imagenet", batch_size=images, dtype="bfloat16", compile=not check.tiny
    )
    parallel.set_up_device(check.device, VARIANTS[model]["embed_dim"])
    resident = repeat_noise("imagenet", images, check.device)
    contender = build_contender("full", cfg, get_ranks("8", model), check.device, resident)
    in_memory = time_steps(contender, check.tiny)
    check.say(f"{model}, {images} images: a step on a batch in memory", f"{1e3 * in_memory:.1f} ms")
    for backend in ("folder", "synthetic"):  # no .beton is needed; the second's host has nothing to do
        options = dict(num_classes=4, num_samples=images * batches)
        loader = build_loader(backend, "imagenet", photos, "train", images, seed=0, **options)
        check_batches(check, loader)
        measure_overlap(check, contender, loader, in_memory)
        loader.close()


def multiply(folder: Path, count: int) -> None:
    """More names for the photographs of a tree, until there are `count`: an epoch should last longer than its
    loader takes to start."""
    photos = sorted(folder.rglob("*.jpg"))
    for i in range(len(photos), count):
        source = photos[i % len(photos)]
        source.with_name(f"{i}_{source.name}").hardlink_to(source)


def check_batches(check: Check, loader: Loader) -> None:
    """Whether what arrives on the device is what the loader made."""
    count = min(6, len(loader))
    arriving = prefetch(loader.epoch(1), check.device)
    arrived = [(images.cpu(), labels.cpu()) for images, labels in itertools.islice(arriving, count)]
    arriving.close()
    making = loader.epoch(1)
    same = len(arrived) == count
    for (images, labels), (right, right_labels) in zip(arrived, making):
        same = same and torch.equal(images, right) and torch.equal(labels, right_labels)
    making.close()
    check.say(f"{loader.backend}: batches on the device", "as made" if same else "not as made", same)


def repeat(loader: Loader) -> Iterator[Batch]:
    """Epoch after epoch, without end."""
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def time_steps(contender: Contender, tiny: bool) -> float:
    """Seconds of a step, on average over many in a row, the batches they wait for included."""
    steps = 4 if tiny else 30
    for _ in range(2):
        contender.step()
    wait_for(contender.device)
    with without_garbage_collection():
        began = time.perf_counter()
        for _ in range(steps):
            contender.step()
        wait_for(contender.device)
        return (time.perf_counter() - began) / steps


def time_loading(loader: Loader) -> float:
    """Seconds of a batch by the loader alone, on average, once its workers have come into step: each begins
    with several batches, and they all arrive at once."""
    workers = default_workers()
    batches = repeat(loader)
    for _ in range(2 * workers + 1):
        next(batches)
    began = time.perf_counter()
    for _ in range(2 * workers):
        next(batches)
    seconds = time.perf_counter() - began
    batches.close()
    return seconds / (2 * workers)


def measure_overlap(check: Check, contender: Contender, loader: Loader, in_memory: float) -> None:
    """ms of a step that is fed by `loader`, beside the step's and the loader's own; and the share of the
    copies' time in which a kernel runs, too."""
    loading = time_loading(loader)
    resident, contender.batches = contender.batches, prefetch(repeat(loader), check.device)
    fed = time_steps(contender, check.tiny)
    check.say(
        f"{loader.backend}: loading alone, a step fed by it",
        f"{1e3 * loading:.1f}, {1e3 * fed:.1f} ms: {fed / max(in_memory, loading):.2f} × the larger of both",
    )
    copies, hidden = get_hidden(trace(check.device, contender.step, calls=4))
    share = f"{100 * hidden / copies:.0f} % of {copies / 4e3:.2f} ms a step" if copies else "no copy"
    holds = copies > 0 if check.device.type == "cuda" else None
    check.say(f"{loader.backend}: copies to the GPU beside kernels", share, holds)
    contender.batches.close()
    contender.batches = resident


def get_hidden(spans: list[Span]) -> tuple[float, float]:
    """(µs of copies from the host, µs of them in which a kernel runs, too)."""
    copies = [span for span in spans if "HtoD" in span[0]]
    kernels = [span for span in spans if classify(span[0]) != "copies"]
    hidden = 0.0
    for _, begin, end in copies:  # kernels of one stream don't overlap each other
        hidden += sum(max(0.0, min(end, stop) - max(begin, start)) for _, start, stop in kernels)
    return sum(end - begin for _, begin, end in copies), hidden
