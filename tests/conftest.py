"""Fixtures that several test files use: small data, and processes that play the ranks of a run."""

import multiprocessing
import os
import re
import socket
import traceback

import numpy as np
import pytest
import torch
from small_runs import run
from torch.utils.tensorboard import SummaryWriter

from data.beton import write_beton
from data.images import open_dataset
from data.import_ffcv import import_ffcv
from errors import UserError


def asks_for_gpu(expression):
    """Whether pytest's -m is `gpu`, or has it in it, but for `not gpu`."""
    return re.search(r"(?<!not )\bgpu\b", expression) is not None


def pytest_configure(config):
    """Hide the GPUs from this process and its children unless -m asks for tests that need one: the others
    play several ranks on CPUs, and a machine with one GPU has none for the second rank."""
    if not asks_for_gpu(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch looks at it once, when it is first asked for a GPU


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            reason = "needs a CUDA device, which tests see with -m gpu only"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """600 + 130 images in Fashion-MNIST's files, to be learned: class c is a bright square at place c."""
    root, rng = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, n in (("train", 600), ("t10k", 130)):
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        images = rng.integers(0, 120, (n, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels):
            image[4 + label // 5 * 12 :][:8, label % 5 * 5 :][:, :6] += 100
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(s.to_bytes(4, "big") for s in array.shape)
            (raw / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())
    try:
        import_ffcv()
    except UserError:  # FFCV's libraries are not there: only the tests that need it are skipped
        return root
    for split in ("train", "val"):
        write_beton(open_dataset("fashion_mnist", root, split), root / f"{split}.beton", workers=1)
    return root


@pytest.fixture(scope="session")
def reference(small, tmp_path_factory):
    """The uninterrupted run, through three phases."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    run(small, run_dir)
    return run_dir


@pytest.fixture(scope="session")
def baseline(small, tmp_path_factory):
    """Full training with every epoch's checkpoint kept."""
    run_dir = tmp_path_factory.mktemp("baseline") / "full"
    run(small, run_dir, "--mode", "full", "--keep_every", 1, "--eval_every", 3)
    return run_dir


@pytest.fixture(scope="session")
def lowest_frozen(small, tmp_path_factory):
    """The reference run but for its two lowest blocks of four, which get no adapters and are frozen whole."""
    run_dir = tmp_path_factory.mktemp("lowest_frozen") / "run"
    run(small, run_dir, "--freeze_blocks", 2)
    return run_dir


@pytest.fixture(scope="session")
def control(small, tmp_path_factory):
    """Its control: all parameters, and from epoch 4 on those above the two lowest blocks."""
    run_dir = tmp_path_factory.mktemp("control") / "full"
    flags = "--mode full --freeze_blocks 2 --switch_epoch 3 --window_epochs 3 --keep_every 1".split()
    run(small, run_dir, *flags)
    return run_dir


class RankPool:
    """Processes that play ranks and stay, because importing torch takes longer than most tests."""

    def __init__(self):
        self.workers = []

    def __call__(self, ranks, function, *args, timeout=240, **environment):
        """[function(*args) of each rank], run with the environment torchrun would set. `function`: at the top
        of a test module.

        Raises AssertionError with the first failing rank's traceback; who dies or hangs is replaced.
        """
        while len(self.workers) < ranks:
            here, there = multiprocessing.Pipe()
            process = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        environment = {
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            **environment,
        }
        for rank, (_, pipe) in enumerate(self.workers[:ranks]):
            pipe.send(
                (
                    function,
                    args,
                    {k: str(v) for k, v in environment.items()}
                    | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
            )
        results, failed = [], []
        for rank, (_, pipe) in enumerate(self.workers[:ranks]):
            try:
                ok, value = pipe.recv() if pipe.poll(timeout) else (False, "did not answer in time")
            except EOFError:
                ok, value = False, "died"
            results.append(value)
            if not ok:
                failed.append(f"rank {rank}: {value}")
                timeout = 10  # for the others, which may wait for this one
        if failed:
            self.close()
            raise AssertionError("\n".join(failed))
        return results

    def close(self):
        for process, _ in self.workers:
            process.kill()
            process.join()
        self.workers = []


def serve(pipe):
    torch.set_num_threads(1)
    SummaryWriter.add_figure = lambda *args: None  # half a second each, and the reference run draws them
    while True:
        function, args, environment = pipe.recv()
        os.environ.update(environment)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


@pytest.fixture(scope="session")
def on_ranks():
    pool = RankPool()
    yield pool
    pool.close()
