"""What a run on several ranks survives: kills, signals, damaged checkpoints, full disks, NaN, ranks that hang or die, bad input."""

import contextlib
import json
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
import zlib
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import train
from model import checkpoint, distributed
from model.vit import VARIANTS
from monitor import logger
from test_parallel import PLAIN, watching
from test_train import assert_same, events, weights, without_times

# 4 steps an epoch, 20 in all: full 1-3 (the test decides), warmup 4, lora 5.
RUN = [*PLAIN, "--epochs", "5", "--lora_warmup_epochs", "1"]
RANDOM = "--dropout 0.1 --drop_path 0.1 --mixup 0.2".split()
POINTS = {"full": 6, "switch": 12, "warmup": 14, "freeze": 16, "lora": 18}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(small, tmp_path_factory):
    """64 + 18 of the images."""
    raw = tmp_path_factory.mktemp("tiny") / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (small / "FashionMNIST" / "raw").iterdir():
        n, data = 64 if "train" in file.name else 18, file.read_bytes()
        header, size = (16, 28 * 28) if "images" in file.name else (8, 1)
        (raw / file.name).write_bytes(data[:4] + n.to_bytes(4, "big") + data[8:header] + data[header:][:n * size])
    return raw.parent.parent


# ---- train.py as one rank, watched

def go(argv, fault=contextlib.nullcontext, *fault_args):
    """train.py on this rank: its status and console, every step's loss, the images of every micro-batch."""
    images = []
    with lean(), watching() as seen, recording(images), tempfile.TemporaryFile("w+") as console, fault(*fault_args) as extra:
        with redirected(console):
            try:
                status = train.main([str(a) for a in argv])
            except Exception:
                traceback.print_exc()
                status = 1
            if dist.is_initialized():  # it failed: a process would end here
                dist.destroy_process_group()
        console.seek(0)
        return {"status": status, "console": console.read(), "losses": seen["losses"], "images": images, "extra": extra}


@contextlib.contextmanager
def lean():
    """Two blocks, no figures, no FLOPs: what takes time and matters to none of these tests."""
    with mock.patch.dict(VARIANTS["tiny-debug"], depth=2), mock.patch.object(train, "count_flops", lambda *a: 0), \
            mock.patch.object(logger, "change_heatmap"), mock.patch.object(logger, "rank_heatmap"):
        yield


@contextlib.contextmanager
def recording(images):
    build_loader = train.build_loader

    def building(*args):
        loader = build_loader(*args)
        if loader.train:
            loader.epoch = lambda *a, original=loader.epoch, **kw: watched(original(*a, **kw))
        return loader

    def watched(batches):
        with contextlib.closing(batches):
            for batch, labels in batches:
                images.append([(zlib.crc32(image.contiguous().numpy()), int(label)) for image, label in zip(batch, labels)])
                yield batch, labels
    with mock.patch.object(train, "build_loader", building):
        yield


@contextlib.contextmanager
def redirected(file):
    kept = [(fd, os.dup(fd)) for fd in (1, 2)]
    for fd, _ in kept:
        os.dup2(file.fileno(), fd)
    try:
        yield
    finally:
        for fd, copy in kept:
            os.dup2(copy, fd)
            os.close(copy)


def images_of(ranks):
    """What the ranks saw, in the run's order: micro-batch by micro-batch, rank by rank."""
    return [image for micro_batches in zip(*(r["images"] for r in ranks), strict=True) for batch in micro_batches for image in batch]


class Runs:
    """train.py on some ranks of the pool, with one data set."""

    def __init__(self, on_ranks, data):
        self.on_ranks, self.data = on_ranks, data

    def __call__(self, ranks, run_dir, *flags, fault=(), status=0):
        argv = [*RUN, "--data_dir", self.data, "--run_dir", run_dir, *flags]
        seen = self.on_ranks(ranks, go, argv, *fault)
        assert [r["status"] for r in seen] == [status] * ranks, "\n".join(r["console"] for r in seen)
        return seen


@pytest.fixture(scope="module")
def runs(on_ranks, tiny):
    return Runs(on_ranks, tiny)


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """whole(ranks, *flags): the uninterrupted run, made once, as (run_dir, what its ranks saw)."""
    made = {}

    def make(ranks, *flags):
        if (ranks, flags) not in made:
            run_dir = tmp_path_factory.mktemp("whole") / "run"
            made[ranks, flags] = run_dir, runs(ranks, run_dir, *flags)
        return made[ranks, flags]
    return make


def assert_same_run(run_dir, reference):
    """Every record but the warnings, and the last checkpoint."""
    kept = lambda path: [r for r in without_times(events(path)) if r["event"] != "warning"]
    assert kept(run_dir) == kept(reference)
    assert_same(weights(run_dir), weights(reference))


# ---- resume

@pytest.mark.parametrize("point", [p if p in ("full", "freeze") else pytest.param(p, marks=slow) for p in POINTS])
def test_resumed_on_as_many_ranks_is_the_same_to_the_bit(runs, whole, tmp_path, point):
    reference, seen = whole(2, *RANDOM)
    step = POINTS[point]
    before = runs(2, tmp_path / "run", *RANDOM, "--max_steps", step)
    after = runs(2, tmp_path / "run", "--resume", True, "--max_steps", None)
    for a, b, c in zip(before, after, seen):
        assert len(a["losses"]) == step and a["losses"] + b["losses"] == c["losses"]
    assert images_of(before) + images_of(after) == images_of(seen)
    assert_same_run(tmp_path / "run", reference)
