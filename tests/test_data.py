"""data/: the same batches from both loaders, whatever the workers; damaged files, failing threads, bugs."""

import ast
import contextlib
import dataclasses
import graphlib
import gzip
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from data import beton, folder, rgb
from data import images as raw_images
from data.augment import random_bits, random_flip, random_shift, random_uniform, splitmix64
from data.beton import check_beton, write_beton
from data.children import FOR_MAIN_PROCESS
from data.datasets import DATASETS, get_spec
from data.device import normalise
from data.images import FILES, open_dataset, prepare_fashion_mnist
from data.import_ffcv import import_ffcv
from data.loader import build_loader, prefetch
from data.order import DataError, default_workers, epoch_order, get_indices
from errors import UserError

REPO = Path(__file__).parent.parent
TRAIN, VAL, BATCH = (
    600,
    130,
    64,
)  # 9 batches of training with 24 images left over, 3 of evaluation, the last has 2

try:
    import_ffcv()
    missing_ffcv = ""
except UserError as error:
    missing_ffcv = str(error)
needs_ffcv = pytest.mark.skipif(bool(missing_ffcv), reason=missing_ffcv)
BACKENDS = [pytest.param("ffcv", marks=needs_ffcv), "folder"]


def write_idx(path, array):
    shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + shape + array.tobytes())


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder like Fashion-MNIST's with fewer, random images, and the .beton files made from it."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    arrays = {}
    for prefix, split, n in (("train", "train", TRAIN), ("t10k", "val", VAL)):
        images, labels = (
            rng.integers(0, 256, (n, 28, 28), dtype=np.uint8),
            rng.integers(0, 10, n, dtype=np.uint8),
        )
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels)
        arrays[split] = images, labels.astype(np.int64)
    for split in () if missing_ffcv else arrays:
        write_beton(open_dataset("fashion_mnist", root, split), root / f"{split}.beton", workers=2)
    return SimpleNamespace(root=root, **arrays)


def build(data, backend="ffcv", split="train", seed=7, **kwargs):
    return build_loader(backend, "fashion_mnist", data.root, split, BATCH, seed, **kwargs)


@pytest.fixture(scope="session")
def loader(data):
    """One for all tests that only iterate: building costs 2 s of compiling."""
    return build(data)


def within(seconds, function, *args):
    """function(*args), or a failed test where it would hang."""
    result = []

    def call():
        try:
            result.append((function(*args), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, f"still running after {seconds} s"
    if result[0][1] is not None:
        raise result[0][1]
    return result[0][0]


def equal(batches, others):
    batches, others = list(batches), list(others)
    return len(batches) == len(others) and all(
        torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(batches, others)
    )


def epochs_of_ranks(loader, epoch):
    """The batches of each rank, all by the loader of one: to build another one for FFCV takes seconds."""
    for rank in range(loader.options.world_size):
        loader.options = dataclasses.replace(loader.options, world_rank=rank)
        yield list(loader.epoch(epoch))


# ---- random numbers, order, augmentations


def test_splitmix64_reference():
    states = [np.uint64(0), np.uint64(0x9E3779B97F4A7C15), np.uint64(2 * 0x9E3779B97F4A7C15 % 2**64)]
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(splitmix64(state)) for state in states] == expected
    assert splitmix64.py_func(np.array(states)).tolist() == expected  # the same definition, run by numpy


@np.errstate(over="ignore")
def test_random_bits():
    indices = np.arange(20000)
    bits = random_bits.py_func(3, 5, indices, 1)
    assert [random_bits(3, 5, int(i), 1) for i in indices[:50]] == bits[:50].tolist()  # numba and numpy agree
    assert len(np.unique(bits)) == len(bits)
    # Each of the 64 bits is fair, and agrees with that of another key, or of the next image, half the time:
    # 5 sigma.
    for seed, epoch, draw in ((4, 5, 1), (3, 6, 1), (3, 5, 2), (5, 3, 1)):
        other = random_bits.py_func(seed, epoch, indices, draw)
        for values in (other, other ^ bits, other ^ np.roll(other, 1)):
            ones = (values[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).mean(0)
            assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(len(indices))
    uniform = np.array([random_uniform(0, 0, i, 0) for i in range(20000)])
    assert uniform.min() >= 0 and uniform.max() < 1
    assert np.abs(np.histogram(uniform, 10, (0, 1))[0] - 2000).max() < 5 * np.sqrt(2000)


def test_augmentations_are_what_they_say():
    images = np.random.default_rng(0).integers(0, 256, (500, 9, 7, 3), dtype=np.uint8)
    indices, shifted, flipped = np.arange(1000, 1500), np.empty_like(images), np.empty_like(images)
    random_shift(images, shifted, indices, 1, 2, 2)
    random_flip(images, flipped, indices, 1, 2)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    places, flips = set(), 0
    for i in range(500):
        found = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.array_equal(padded[i, y : y + 9, x : x + 7], shifted[i])
        ]
        assert len(found) == 1
        places.update(found)
        mirrored = np.array_equal(flipped[i], images[i, :, ::-1])
        assert mirrored or np.array_equal(flipped[i], images[i])
        flips += mirrored
    assert len(places) == 25 and 200 < flips < 300
    one = np.empty_like(images[:1])
    random_shift(images[7:8], one, indices[7:8], 1, 2, 2)  # its index decides, not its place in a batch
    assert np.array_equal(one[0], shifted[7])


def test_order_and_subset():
    order = epoch_order(1000, 0, 0)
    assert order.dtype == np.int64 and np.array_equal(np.sort(order), np.arange(1000))
    assert np.array_equal(order, epoch_order(1000, 0, 0))
    assert not np.array_equal(order, epoch_order(1000, 0, 1)) and not np.array_equal(
        order, epoch_order(1000, 1, 0)
    )
    subset = get_indices(1000, True, 10, 100)
    assert (
        len(np.unique(subset)) == 100
        and subset.max() > 900
        and set(subset) <= set(get_indices(1000, True, 10, 200))
    )


@pytest.mark.parametrize(
    "split, kwargs",
    [
        ("val", {"num_samples": 100}),
        ("train", {"num_samples": 0}),
        ("train", {"num_samples": TRAIN + 1}),
        ("train", {"num_samples": BATCH - 1}),
    ],
)
def test_numbers_that_do_not_fit(data, split, kwargs):
    with pytest.raises(UserError if split == "train" else ValueError, match="subset|num_samples|batch_size"):
        build(data, "folder", split, **kwargs)


# ---- batches


@needs_ffcv
@pytest.mark.parametrize("epoch", [1, 2])
def test_backends_agree_in_training(data, loader, epoch):
    reference = build(data, "folder", num_workers=2)
    assert (
        (len(loader), loader.num_samples, loader.num_classes)
        == (9, TRAIN, 10)
        == (len(reference), reference.num_samples, reference.num_classes)
    )
    batches = list(loader.epoch(epoch))
    for images, labels in batches:
        assert (
            images.shape == (BATCH, 3, 28, 28) and images.dtype == torch.uint8 and labels.dtype == torch.int64
        )
        assert labels.shape == (BATCH,) and images.is_contiguous(memory_format=torch.channels_last)
    assert equal(batches, reference.epoch(epoch))
    images, labels = data.train
    order = epoch_order(TRAIN, 7, epoch)[:BATCH]
    assert np.array_equal(batches[0][1], labels[order])
    unaugmented = (batches[0][0][:, 0].numpy() == images[order]).all((1, 2)).mean()
    assert 0 < unaugmented < 0.2  # 1/9 · 1/2 expected: the comparison above is not one of plain images


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_sees_each_image_once(data, backend):
    loader = build(data, backend, "val", num_workers=2)
    batches = list(loader.epoch(0))
    assert len(batches) == len(loader) == 3 and all(len(images) == BATCH for images, _ in batches)
    images, labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    assert np.array_equal(images[:VAL].numpy(), np.repeat(data.val[0][:, None], 3, 1))
    assert np.array_equal(labels[:VAL], data.val[1])
    assert (labels[VAL:] == -1).all() and (images[VAL:] == 0).all()
    assert equal(batches, loader.epoch(5))


@needs_ffcv
def test_workers_resume_epochs_and_seeds(data, loader):
    whole = list(loader.epoch(3))
    assert equal(whole, build(data, num_workers=1).epoch(3))  # the session's has all CPUs
    assert equal(whole[4:], loader.epoch(3, start_batch=4)) and list(loader.epoch(3, start_batch=9)) == []
    assert equal(whole[4:], build(data, "folder").epoch(3, start_batch=4))
    assert not equal(whole, loader.epoch(4)) and not equal(whole, build(data, "folder", seed=8).epoch(3))
    with pytest.raises(ValueError, match="start_batch"):
        loader.epoch(3, start_batch=10)


@needs_ffcv
@pytest.mark.parametrize("split", ["train", "val"])
def test_another_size_and_colour_jitter_are_the_same_in_both_loaders(data, split):
    """For any number of workers, and from the middle of an epoch on."""
    flags = dict(split=split, image_size=35, color_jitter=0.4)
    with contextlib.closing(build(data, num_workers=1, **flags)) as loader:
        whole = list(loader.epoch(3))
        assert whole[0][0].shape == (BATCH, 3, 35, 35)
        assert equal(whole, build(data, "folder", num_workers=0, **flags).epoch(3))
        assert equal(whole[2:], build(data, "folder", num_workers=2, **flags).epoch(3, start_batch=2))
        assert equal(whole[2:], loader.epoch(3, start_batch=2))
    plain = build(data, "folder", num_workers=0, **flags | {"color_jitter": 0.0}).epoch(3)
    assert equal(whole, plain) == (split == "val")  # evaluation is not augmented
    own_size = build(data, "folder", num_workers=0, split=split, image_size=28).epoch(3)
    assert equal(own_size, build(data, "folder", num_workers=0, split=split).epoch(3))


def test_the_evaluations_short_side_keeps_its_proportion():
    sizes = {None: (224, 256), 224: (224, 256), 160: (160, 183), 384: (384, 439), 336: (336, 384)}
    for size, expected in sizes.items():
        spec = get_spec("imagenet", size)
        assert (spec.image_size, spec.short_side) == expected
        assert spec._replace(image_size=224, short_side=256) == DATASETS["imagenet"]
    assert get_spec("fashion_mnist", 35).short_side == 35
    loader = build_loader(
        "synthetic", "imagenet", "", "val", 1, 0, image_size=32, world_size=65, world_rank=64
    )
    assert {images.shape for images, _ in loader.epoch(0)} == {(1, 3, 32, 32)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_share_an_epoch(data, backend):
    """The batches of 4 ranks side by side are those of one, augmentations too, also from the middle on."""
    whole = list(build_loader(backend, "fashion_mnist", data.root, "train", 64, 7, 1).epoch(2, start_batch=3))
    ranks = [
        build_loader(backend, "fashion_mnist", data.root, "train", 16, 7, 1, world_rank=rank, world_size=4)
        for rank in range(4)
    ]
    assert [len(loader) for loader in ranks] == [9] * 4 and len(whole) == 6 and ranks[0].num_samples == TRAIN
    for batch, parts in zip(
        whole, zip(*(loader.epoch(2, start_batch=3) for loader in ranks), strict=True), strict=True
    ):
        assert all(torch.equal(torch.cat(part), one) for part, one in zip(zip(*parts), batch))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_size", [32, 20])
def test_ranks_evaluate_each_image_once(data, backend, batch_size):
    """130 images on 4 ranks are 33, 33, 32, 32: with batches of 32 two ranks have nothing in the second."""
    loader = build_loader(backend, "fashion_mnist", data.root, "val", batch_size, 7, 1, world_size=4)
    ranks = list(epochs_of_ranks(loader, 0))
    assert [len(batches) for batches in ranks] == [2] * 4  # all must go through the model together
    assert all(images.shape == (batch_size, 3, 28, 28) for batches in ranks for images, _ in batches)
    seen = [
        (image[0].numpy().tobytes(), int(label))
        for batches in ranks
        for images, labels in batches
        for image, label in zip(images, labels)
        if label >= 0
    ]
    assert len(seen) == VAL and sorted(seen) == sorted(
        (image.tobytes(), int(label)) for image, label in zip(*data.val)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_few_images_for_the_ranks(data, backend):
    with pytest.raises(UserError, match="130 images are too few for 131 ranks"):
        build_loader(backend, "fashion_mnist", data.root, "val", 1, 7, 1, world_size=131)
    with pytest.raises(UserError, match="expected 1 to 600 in all"):
        build_loader(backend, "fashion_mnist", data.root, "train", 301, 7, 1, world_size=2)


def test_synthetic_images_are_the_same_for_any_number_of_ranks():
    def build(split, batch_size, rank=0, ranks=1, dataset="imagenet", **kwargs):
        kwargs |= {"world_rank": rank, "world_size": ranks}
        return build_loader("synthetic", dataset, "no folder", split, batch_size, 7, **kwargs)

    whole = build("train", 32, num_samples=100)
    batches = list(whole.epoch(2))
    assert len(batches) == len(whole) == 3 and whole.num_samples == 100
    assert batches[0][0].shape == (32, 3, 224, 224)
    assert equal(batches[1:], whole.epoch(2, start_batch=1)) and not equal(batches, whole.epoch(3))
    ranks = [build("train", 16, rank, 2, num_samples=100).epoch(2) for rank in range(2)]
    for batch, parts in zip(batches, zip(*ranks, strict=True), strict=True):
        assert all(torch.equal(torch.cat(part), one) for part, one in zip(zip(*parts), batch))
    label_of = {}  # an image always has the same one
    for images, labels in batches:
        for image, label in zip(images, labels):
            assert label_of.setdefault(image.numpy().tobytes(), int(label)) == label
    assert len(set(label_of.values())) == len(label_of) > 20
    seen = [(labels >= 0).sum() for rank in range(3) for _, labels in build("val", 30, rank, 3).epoch(0)]
    assert len(seen) == 3 and sum(seen) == 64
    small = [build("val", 1, rank, 200, "fashion_mnist") for rank in range(200)]  # more ranks than images
    assert sum((labels >= 0).sum() for loader in small for _, labels in loader.epoch(0)) == 200


def test_ranks_of_a_node_share_its_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(12))
    for ranks, workers in [("1", 12), ("4", 3), ("64", 1)]:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert default_workers() == workers


@pytest.mark.parametrize("backend", BACKENDS)
def test_subset(data, backend):
    one, other = (build(data, backend, seed=seed, num_samples=2 * BATCH, num_workers=1) for seed in (0, 1))
    expected = np.sort(data.train[1][get_indices(TRAIN, True, BATCH, 2 * BATCH)])
    for loader, epoch in ((one, 1), (one, 2), (other, 1)):
        labels = np.concatenate([labels for _, labels in loader.epoch(epoch)])
        assert loader.num_samples == len(labels) == 2 * BATCH and np.array_equal(np.sort(labels), expected)
    assert not np.array_equal(expected, np.sort(data.train[1][: 2 * BATCH]))  # not the first of the file


@pytest.mark.parametrize("backend", BACKENDS)
def test_global_generators_are_left_alone(data, backend):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(build(data, backend, num_workers=1).epoch(1))
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(
        before[1], np.random.get_state()[1]
    )


# ---- failures

CORRUPTIONS = {
    "missing": lambda path, header: path.unlink(),
    "empty": lambda path, header: os.truncate(path, 0),
    "cut in the header": lambda path, header: os.truncate(path, 10),
    "not a beton": lambda path, header: path.write_bytes(b"\xff\xd8\xff\xe0 JFIF " * 1000),
    "another version": lambda path, header: overwrite(path, version=3),
    "cut in the descriptors": lambda path, header: os.truncate(path, 1000),
    "cut in the metadata": lambda path, header: os.truncate(path, 3000),
    "cut in half": lambda path, header: os.truncate(path, path.stat().st_size // 2),
    "cut in the table": lambda path, header: os.truncate(path, int(header["alloc_table_ptr"]) + 100),
    "cut by one entry": lambda path, header: os.truncate(path, path.stat().st_size - 24),
    "table cut off": lambda path, header: os.truncate(path, int(header["alloc_table_ptr"])),
    "no table": lambda path, header: overwrite(path, alloc_table_ptr=0),
    "more samples than metadata": lambda path, header: overwrite(path, num_samples=10**9),
    "one sample more": lambda path, header: overwrite(path, num_samples=int(header["num_samples"]) + 1),
    "pointer beyond the file": lambda path, header: overwrite_table(path, header, "ptr", 10**12),
    "size beyond the file": lambda path, header: overwrite_table(path, header, "size", 2**64 - 10),
    "wrong size": lambda path, header: overwrite_table(path, header, "size", 100),
    "wrong sample": lambda path, header: overwrite_table(path, header, "sample_id", 77),
}


def overwrite(path, **changes):
    header = np.memmap(path, beton.HEADER, "r+", shape=1)
    for name, value in changes.items():
        header[name] = value


def overwrite_table(path, header, name, value):
    np.memmap(path, beton.ALLOCATION, "r+", int(header["alloc_table_ptr"]), shape=3)[name][2] = value


@needs_ffcv
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_damaged_beton(data, tmp_path, corruption):
    path = tmp_path / "val.beton"
    shutil.copy(data.root / "val.beton", path)
    assert check_beton(path) == VAL
    CORRUPTIONS[corruption](path, np.fromfile(path, beton.HEADER, 1)[0])
    with pytest.raises(UserError, match="val.beton: [^\n]+$"):
        within(5, check_beton, path)
    with pytest.raises(UserError, match="val.beton"):
        within(5, build_loader, "ffcv", "fashion_mnist", tmp_path, "val", BATCH, 0)


@needs_ffcv
def test_layout_is_ffcvs(data):
    types = import_ffcv().types
    assert (types.CURRENT_VERSION, types.HeaderType) == (beton.VERSION, beton.HEADER)
    assert types.ALLOC_TABLE_TYPE == beton.ALLOCATION
    assert types.FieldDescType.itemsize == beton.FIELD.itemsize
    reader = import_ffcv().reader.Reader(str(data.root / "val.beton"))
    assert reader.metadata_type.itemsize == beton.METADATA.itemsize
    assert np.array_equal(reader.metadata["f1"], data.val[1])


class Images(list):
    """A data set of red images whose item 150 is made by `bad`."""

    classes = ["red"]

    def __init__(self, bad, n=200):
        super().__init__(range(n))
        self.bad = bad

    def __getitem__(self, index):
        return self.bad() if index == 150 else (Image.new("RGB", (28, 28), (255, 0, 0)), 0)


def fail():
    raise OSError("bad file x.jpg")


@needs_ffcv
def test_writer_does_not_wait_for_a_lost_worker(tmp_path):
    killed = Images(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="train.beton: a worker was killed"):
        within(20, write_beton, killed, tmp_path / "train.beton", 2)
    assert list(tmp_path.iterdir()) == []
    write_beton(Images(lambda: (Image.new("L", (28, 28)), 0)), tmp_path / "train.beton", 2)
    assert check_beton(tmp_path / "train.beton") == 200
    index = json.loads((tmp_path / "train.json").read_text())
    assert (index["num_samples"], index["classes"], index["skipped"]) == (200, ["red"], 0)


# ---- mistakes are sentences, bugs are tracebacks


def unpack(*_):
    a, b = 1, 2, 3  # the bug that is planted
    return a, b


def misspell(*_):
    return undefined_name  # noqa: F821


BUGS = [
    (unpack, ValueError, "too many values to unpack"),
    (misspell, NameError, "name 'undefined_name' is not defined"),
]


def show(info):
    """What Python would print of a pytest.raises: the whole traceback."""
    return "".join(traceback.format_exception(info.value))


def names_the_line(text, bug):
    """Whether a traceback's text names this file and a line of the function that has the bug."""
    start = bug.__code__.co_firstlineno
    lines = re.findall(rf'File "{re.escape(__file__)}", line (\d+), in {bug.__name__}\n', text)
    return [int(line) for line in lines] == [start + 1]


@needs_ffcv
@pytest.mark.parametrize("bug, kind, text", BUGS + [(fail, OSError, "bad file x.jpg")])
def test_a_bug_in_a_writers_worker_has_its_traceback(tmp_path, bug, kind, text):
    with pytest.raises(RuntimeError, match="train.beton: a worker failed") as info:
        within(20, write_beton, Images(bug), tmp_path / "train.beton", 2)
    assert not isinstance(info.value, UserError) and f"{kind.__name__}: {text}" in str(info.value)
    assert names_the_line(str(info.value), bug) and list(tmp_path.iterdir()) == []


@needs_ffcv
def test_a_full_disk_in_a_writers_worker_is_a_sentence(tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    with mock.patch("ffcv.memory_allocator.MemoryAllocator.flush_page", full):
        with pytest.raises(UserError, match="train.beton: .Errno 28. No space left on device$"):
            within(20, write_beton, Images(fail, 100), tmp_path / "train.beton", 1)


@needs_ffcv
@pytest.mark.parametrize("bug, kind, text", BUGS)
def test_a_bug_in_ffcvs_thread_comes_out_as_it_is(data, monkeypatch, bug, kind, text):
    from data import ffcv

    broken = threading.Event()

    def augment(images, out, indices, seed, epoch):
        if broken.is_set():
            bug()
        out[:] = images

    monkeypatch.setitem(ffcv.AUGMENTATIONS, "flip", augment)
    loader = build(data, num_workers=1)
    assert len(within(30, list, loader.epoch(1))) == 9  # control
    broken.set()
    with pytest.raises(kind, match=text) as info:
        within(10, list, loader.epoch(2))
    assert not isinstance(info.value, UserError) and names_the_line(show(info), bug)
    broken.clear()
    assert len(within(30, list, loader.epoch(3))) == 9  # and it can go on


@needs_ffcv
def test_a_bug_in_an_augmentation_that_ffcv_is_given_stops_at_once(data, monkeypatch):
    from data import ffcv

    monkeypatch.setitem(ffcv.AUGMENTATIONS, "flip", unpack)
    with pytest.raises(ValueError, match="too many values") as info:
        build(data)
    assert not isinstance(info.value, UserError) and names_the_line(show(info), unpack)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("place", ["augmentation", "data set", "loader"])
def test_a_bug_behind_the_folder_loader_comes_out_as_it_is(data, monkeypatch, num_workers, place):
    bug, kind, text = BUGS[place == "data set"]
    loader = build(data, "folder", num_workers=num_workers, num_samples=2 * BATCH)
    if place == "augmentation":
        monkeypatch.setitem(folder.AUGMENTATIONS, "flip", bug)
    elif place == "data set":
        monkeypatch.setattr(type(loader.source), "__getitem__", bug)
    else:
        monkeypatch.setattr(folder, "to_batch", bug)
    before = set(multiprocessing.active_children())
    with pytest.raises(kind, match=text) as info:
        within(30, list, loader.epoch(1))
    assert not isinstance(info.value, UserError) and names_the_line(show(info), bug)
    assert set(multiprocessing.active_children()) <= before  # though the traceback still holds the iterator


BROKEN_OFF = """
import sys
from data.loader import build_loader
def loop():
    batches = build_loader("folder", "fashion_mnist", sys.argv[1], "train", 64, 0, num_workers=2).epoch(1)
    next(batches)
    a, b = 1, 2, 3
loop()
"""


def test_a_bug_in_the_loop_ends_the_process(data):
    """And is not followed by waiting for ever for the loader's processes."""
    command = [sys.executable, "-c", BROKEN_OFF, data.root]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stderr.rstrip().endswith(
        "too many values to unpack (expected 2)"
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_runtime_error_is_no_lost_worker(data, monkeypatch, num_workers):
    """torch says RuntimeError for both."""

    def bug(*_):
        raise RuntimeError("of somebody's own")

    monkeypatch.setitem(folder.AUGMENTATIONS, "flip", lambda image, *_: image)
    loader = build(data, "folder", num_workers=num_workers, num_samples=2 * BATCH)
    assert len(within(30, list, loader.epoch(1))) == 2  # control
    monkeypatch.setitem(folder.AUGMENTATIONS, "flip", bug)
    with pytest.raises(RuntimeError, match="of somebody's own") as info:
        within(30, list, loader.epoch(1))
    assert not isinstance(info.value, DataError) and names_the_line(show(info), bug)


def test_a_bug_in_reading_is_no_damaged_image(tmp_path, monkeypatch):
    Image.fromarray(np.full((4, 4), 60_000, np.uint16)).save(tmp_path / "deep.png")
    monkeypatch.setattr(rgb, "_drop_lower_bits", unpack)
    with pytest.raises(ValueError, match="too many values") as info:
        rgb.read_image(tmp_path / "deep.png")
    assert not isinstance(info.value, UserError)
    (tmp_path / "deep.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="deep.png cannot be read as an image: [^\n]*$"):
        rgb.read_image(tmp_path / "deep.png")


LIGHT = """
import sys
import data.beton, data.datasets, data.order
heavy = {"torch", "torchvision", "numba", "timm", "ffcv"} & set(sys.modules)
assert not heavy, heavy
import data.decode  # the control
assert "numba" in sys.modules
"""


def test_looking_at_a_beton_needs_no_torch():
    """launch/submit.py does so, before it submits a job."""
    subprocess.run([sys.executable, "-c", LIGHT], cwd=REPO, check=True, timeout=120)


def find_imports(source):
    """Modules of data/ that a source imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "data":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("data."):
            found.add(node.module.removeprefix("data."))
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("data.") for alias in node.names if alias.name.startswith("data.")
            }
    return found


def test_no_module_imports_itself_through_others():
    graph = {path.stem: find_imports(path.read_text()) for path in (REPO / "data").glob("*.py")}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("order") < order.index("beton") < order.index("ffcv") < order.index("loader")
    graph["order"] |= find_imports("def late():\n    import os, data.loader")  # control
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(graph).static_order())


def test_each_loader_has_every_augmentation():
    from data import ffcv

    names = {name for spec in DATASETS.values() for name, *_ in spec.augmentations}
    names |= {"rand_augment", "color_jitter"}
    assert names == set(folder.AUGMENTATIONS) == set(ffcv.AUGMENTATIONS)


@needs_ffcv
def test_leaving_early_leaves_no_thread(loader):
    before = threading.active_count()
    for _ in loader.epoch(1):
        break
    assert threading.active_count() == before
    kept = loader.epoch(1)
    next(kept)
    assert threading.active_count() == before + 1
    loader.epoch(2)
    assert threading.active_count() == before + 1
    with pytest.raises(RuntimeError, match="closed"):
        within(10, list, kept)
    loader.close()
    assert threading.active_count() == before
    assert len(list(loader.epoch(1))) == 9


@needs_ffcv
def test_ffcvs_thread_works_on_its_process_device(data, monkeypatch):
    """Without a GPU: here, too, each thread has a device of its own, the first one when it begins."""
    from data import ffcv

    current, seen = threading.local(), []
    current.device = 3

    def to_batch(images, labels, batch_size):
        seen.append((threading.current_thread() is threading.main_thread(), torch.cuda.current_device()))
        return torch.tensor(images), torch.tensor(labels)

    loader = build(data, num_workers=1)
    monkeypatch.setattr(ffcv, "to_batch", to_batch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "device", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "device", device))
    assert len(within(30, list, loader.epoch(1))) == 9
    assert set(seen) == {(False, 0)}  # control: without CUDA nobody sets a device
    seen.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        epoch = loader.epoch(2)
    assert len(within(30, list, epoch)) == 9
    assert set(seen) == {(False, 3)}


@needs_ffcv
def test_torch_threads_are_left_alone(data):
    program = f"""
import importlib, sys, threading, torch
# Here, and in a thread that starts later: torch's setting is per thread, with a global start value.
def count():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start(); thread.join()
    return torch.get_num_threads(), *found
torch.set_num_threads(3)
from data.loader import build_loader
import data.ffcv
assert "ffcv" not in sys.modules
loader = build_loader("ffcv", "fashion_mnist", {str(data.root)!r}, "train", {BATCH}, 0, num_workers=1)
assert count() == (3, 3), count()
for images, labels in loader.epoch(1):
    assert count() == (3, 3), count()
assert count() == (3, 3), count()
# The control: without import_ffcv, importing it sets one thread.
importlib.reload(sys.modules["ffcv.pipeline.compiler"])
assert count() == (1, 1), count()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=REPO, check=True, timeout=120)


def test_missing_ffcv(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv", None)  # what a failing import looks like from here
    threads = torch.get_num_threads()
    with pytest.raises(UserError, match="libopencv-imgproc406 libturbojpeg0 .*--loader folder"):
        import_ffcv()
    assert torch.get_num_threads() == threads
    assert len(list(build(data, "folder", num_workers=0).epoch(1))) == 9


@pytest.mark.parametrize("number", FOR_MAIN_PROCESS)
def test_a_signal_that_meets_a_worker_at_its_start(data, monkeypatch, number):
    """Between the fork and the moment from which it ignores them."""
    small = {"num_samples": 2 * BATCH}
    reference, initialise = list(build(data, "folder", num_workers=0, **small).epoch(1)), folder._init_worker
    monkeypatch.setattr(
        folder, "_init_worker", lambda worker: (os.kill(os.getpid(), number), initialise(worker))
    )
    loader, before = (
        build(data, "folder", num_workers=2, **small),
        signal.pthread_sigmask(signal.SIG_BLOCK, []),
    )
    assert equal(loader.epoch(1), reference)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    monkeypatch.setattr(folder, "_start_workers", iter)  # the control
    # Without torch's handler, which raises wherever the main thread is: within a queue's lock, if it comes to
    # that, which then is never released.
    torch_s = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with pytest.raises(DataError, match="loader process failed.*exited unexpectedly"):
            list(loader.epoch(1))
    finally:
        signal.signal(signal.SIGCHLD, torch_s)


@pytest.mark.parametrize("backend, module", [("ffcv", "data.beton"), ("folder", "data.folder")])
def test_missing_data(tmp_path, backend, module):
    with pytest.raises(UserError, match=f"python -m {module} .*{tmp_path}"):
        build_loader(backend, "fashion_mnist", tmp_path, "train", BATCH, 0)


@pytest.mark.parametrize(
    "backend, dataset, split",
    [("torch", "fashion_mnist", "train"), ("ffcv", "mnist", "train"), ("ffcv", "fashion_mnist", "test")],
)
def test_unknown_names(tmp_path, backend, dataset, split):
    with pytest.raises(UserError, match="unknown"):
        build_loader(backend, dataset, tmp_path, split, BATCH, 0)


def test_command_line_error_is_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "data.beton",
        "fashion_mnist:val",
        tmp_path / "val.beton",
        "--root",
        tmp_path,
    ]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: no Fashion-MNIST under")


def test_prepare(data, tmp_path, monkeypatch):
    raw, debian = tmp_path / "out" / "FashionMNIST" / "raw", tmp_path / "debian"
    monkeypatch.setattr(raw_images, "DEBIAN", debian)
    monkeypatch.setattr(raw_images.FashionMNIST, "download", lambda self: fail())
    with pytest.raises(UserError, match="dataset-fashion-mnist.*bad file"):  # neither package nor network
        prepare_fashion_mnist(tmp_path / "out")
    debian.mkdir()
    for name in FILES:
        (debian / f"{name}.gz").write_bytes(
            gzip.compress((data.root / "FashionMNIST" / "raw" / name).read_bytes())
        )
    prepare_fashion_mnist(tmp_path / "out")
    assert sorted(path.name for path in raw.iterdir()) == sorted(FILES)
    assert len(open_dataset("fashion_mnist", tmp_path / "out", "val")) == VAL
    shutil.rmtree(debian)
    prepare_fashion_mnist(tmp_path / "out")  # a second time: no source is needed


# ---- on the device


@pytest.mark.parametrize(
    "mean, std", [((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
)
def test_normalise(mean, std):
    from torchvision.transforms.functional import normalize

    images = (
        torch.arange(256, dtype=torch.uint8)
        .repeat(12)
        .view(4, 3, 16, 16)
        .to(memory_format=torch.channels_last)
    )
    result = normalise(images, mean, std)
    torch.testing.assert_close(result, normalize(images.float() / 255, mean, std), rtol=0, atol=1e-6)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(normalise(images, mean, std, torch.bfloat16), result.bfloat16())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_prefetch_hands_on_every_batch(data, device):
    device, loader = torch.device(device), build(data, "folder", num_workers=1)
    moved = list(prefetch(loader.epoch(1), device))
    assert all(
        images.device.type == device.type and images.is_contiguous(memory_format=torch.channels_last)
        for images, _ in moved
    )
    assert equal(loader.epoch(1), [(images.cpu(), labels.cpu()) for images, labels in moved])
    batches = loader.epoch(1)
    ahead = prefetch(batches, device)
    next(ahead)
    ahead.close()  # the loader with it
    assert next(batches, None) is None
