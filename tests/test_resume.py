"""What a run on several ranks survives: kills, signals, damaged checkpoints, full disks, NaN, ranks that hang
or die, bad input."""

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import multiprocessing
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import zlib
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from small_runs import REPO, assert_same, events, get_empty_preset, weights, without_times
from test_parallel import PLAIN, watching

import start
import train
from launch import distributed
from model import checkpoint
from model.optim import get_optimizer_state
from model.parallel import reshard, to_plain
from model.variants import VARIANTS
from monitor import logger

# 4 steps an epoch, 20 in all: full 1-3 (the test decides), warmup 4, lora 5.
RUN = [*PLAIN, "--epochs", "5", "--lora_warmup_epochs", "1"]
RANDOM = (
    "--dropout 0.1 --drop_path 0.1 --mixup 0.2 --cutmix 1 --random_erasing 0.25 --color_jitter 0.4".split()
)
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
        (raw / file.name).write_bytes(
            data[:4] + n.to_bytes(4, "big") + data[8:header] + data[header:][: n * size]
        )
    return raw.parent.parent


# ---- train.py as one rank, watched


def go(argv, fault=contextlib.nullcontext, *fault_args):
    """train.py on this rank: its status and console, every step's loss, the images of every micro-batch."""
    images = []
    with lean(), watching() as seen, recording(images), fault(*fault_args) as extra:
        with captured() as console:
            try:
                status = train.main([str(a) for a in argv])
            except Exception:
                traceback.print_exc()
                status = 1
            if dist.is_initialized():  # it failed: a process would end here
                dist.destroy_process_group()
    return {
        "status": status,
        "console": console[0],
        "losses": seen["losses"],
        "images": images,
        "extra": extra,
    }


@contextlib.contextmanager
def lean():
    """Two blocks, no figures, no FLOPs: what takes time and matters to none of these tests."""
    with (
        mock.patch.dict(VARIANTS["tiny-debug"], depth=2),
        mock.patch.object(train, "count_flops", lambda *a: 0),
        mock.patch.object(logger, "change_heatmap"),
        mock.patch.object(logger, "rank_heatmap"),
        mock.patch.object(logger.SummaryWriter, "add_figure"),
    ):
        yield


@contextlib.contextmanager
def recording(images):
    build_loader = start.build_loader

    def building(*args, **kw):
        loader = build_loader(*args, **kw)
        if loader.train:
            loader.epoch = lambda *a, original=loader.epoch, **kw: watched(original(*a, **kw))
        return loader

    def watched(batches):
        with contextlib.closing(batches):
            for batch, labels in batches:
                images.append(
                    [
                        (zlib.crc32(image.contiguous().numpy()), int(label))
                        for image, label in zip(batch, labels)
                    ]
                )
                yield batch, labels

    with mock.patch.object(start, "build_loader", building):
        yield


@contextlib.contextmanager
def captured():
    """What goes to the console; through a pipe, which a full disk doesn't concern."""
    kept, text, (read, write) = [(fd, os.dup(fd)) for fd in (1, 2)], [], os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 2**20)
    for fd, _ in kept:
        os.dup2(write, fd)
    try:
        yield text
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        for fd, copy in kept:
            os.dup2(copy, fd)
            os.close(copy)
        os.close(write)
        with open(read, errors="replace") as console:
            text.append(console.read())


def images_of(ranks):
    """What the ranks saw, in the run's order: micro-batch by micro-batch, rank by rank."""
    return [
        image
        for micro_batches in zip(*(r["images"] for r in ranks), strict=True)
        for batch in micro_batches
        for image in batch
    ]


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


class Launcher:
    """Forks the ranks of a run from a process that has imported all it needs: real processes, with real exit
    statuses, in a moment."""

    def __init__(self):
        self.pipe, there = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=launch, args=(there,))
        self.process.start()

    def ask(self, *message):
        self.pipe.send(message)
        return self.pipe.recv()

    def start(self, ranks, folder, argv, *fault):
        """Start train.py; rank 1 prints to folder/console_1. Returns the pids, each also the number of a
        process group."""
        folder.mkdir(exist_ok=True)
        return self.ask(
            "start",
            [torchrun_environment(ranks, rank) for rank in range(ranks)],
            folder,
            [str(a) for a in argv],
            fault,
        )

    def statuses(self, pids):
        """Exit statuses, None of those that run, -9 of those killed."""
        return self.ask("statuses", pids)

    def wait(self, pids, timeout=120):
        deadline = time.monotonic() + timeout
        while None in (statuses := self.statuses(pids)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return statuses

    def kill(self, pids, number=signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)

    def close(self):
        self.pipe.close()
        self.process.join()


def torchrun_environment(ranks, rank, port={}):  # noqa: B006 (it is to be remembered)
    if rank == 0:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port[0] = s.getsockname()[1]
    return {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port[0]),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }


def launch(pipe):
    torch.set_num_threads(1)
    running, ended = set(), {}
    while True:
        try:
            what, *args = pipe.recv()
        except EOFError:
            for pid in running:
                os.killpg(pid, signal.SIGKILL)
            return
        if what == "start":
            pids = [fork(environment, *args[1:]) for environment in args[0]]
            running |= set(pids)
            pipe.send(pids)
        else:
            for pid in list(running):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    running.remove(pid)
                    ended[pid] = os.waitstatus_to_exitcode(status)
            pipe.send([ended.get(pid) for pid in args[0]])


def fork(environment, folder, argv, fault):
    if pid := os.fork():
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return pid
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphans where the tests are interrupted
    os.environ.update(environment)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # as in any process that was not spawned: for the loader's workers
    console = os.open(folder / f"console_{environment['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(console, 1), os.dup2(console, 2)
    try:
        function, *args = fault or (contextlib.nullcontext,)
        with lean(), function(*args):
            distributed.exit(train.main, argv)
    except SystemExit as e:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(e.code)
    except BaseException:
        traceback.print_exc()
    os._exit(99)


@pytest.fixture(scope="module")
def launcher():
    launcher = Launcher()
    yield launcher
    launcher.close()


# ---- faults: context managers that both ways of starting enter


@contextlib.contextmanager
def before_step(rank, step, do, *args):
    """On one rank, do(*args) as optimiser step `step`, counted from 0, begins."""
    get_lr, todo = train.get_lr, [do]

    def watched(at, **rest):
        if at == step and todo:
            todo.pop()(*args)
        return get_lr(at, **rest)

    with mock.patch.object(train, "get_lr", watched if int(os.environ["RANK"]) == rank else get_lr):
        yield


# ---- resume


@pytest.mark.parametrize(
    "point", [p if p in ("full", "freeze") else pytest.param(p, marks=slow) for p in POINTS]
)
def test_resumed_on_as_many_ranks_is_the_same_to_the_bit(runs, whole, tmp_path, point):
    reference, seen = whole(2, *RANDOM)
    step = POINTS[point]
    before = runs(2, tmp_path / "run", *RANDOM, "--max_steps", step)
    after = runs(2, tmp_path / "run", "--resume", True, "--max_steps", None)
    for a, b, c in zip(before, after, seen):
        assert len(a["losses"]) == step and a["losses"] + b["losses"] == c["losses"]
    assert images_of(before) + images_of(after) == images_of(seen)
    assert_same_run(tmp_path / "run", reference)


@slow
def test_resumed_compiled_in_bfloat16_is_the_same_to_the_bit(runs, tmp_path):
    flags = [*RANDOM, "--compile", True, "--dtype", "bfloat16", "--mode", "lora", "--epochs", 3]
    whole = runs(2, tmp_path / "whole", *flags)
    runs(2, tmp_path / "run", *flags, "--max_steps", 6)
    assert (
        runs(2, tmp_path / "run", *flags, "--resume", True, "--max_steps", None)[1]["losses"]
        == whole[1]["losses"][6:]
    )
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    "point, ranks",
    [(p, r) if (p, r) == ("full", 1) else pytest.param(p, r, marks=slow) for p in POINTS for r in (1, 4)],
)
def test_resumed_on_another_number_of_ranks_goes_on_within_rounding(runs, whole, tmp_path, point, ranks):
    reference, seen = whole(2)
    step, losses = POINTS[point], seen[0]["losses"]
    before = runs(2, tmp_path / "run", "--max_steps", step)
    after = runs(ranks, tmp_path / "run", "--resume", True, "--max_steps", None)
    assert images_of(before) + images_of(after) == images_of(seen)
    assert all(r["losses"] == after[0]["losses"] for r in after) and len(after[0]["losses"]) == 20 - step
    assert (
        after[0]["losses"][0]
        == pytest.approx(losses[step], rel=1e-6)
        != pytest.approx(losses[step - 1], rel=1e-6)
    )
    assert after[0]["losses"] == pytest.approx(losses[step:], rel=1e-4)
    assert [e["epoch"] for e in events(tmp_path / "run", "epoch")] == [1, 2, 3, 4, 5]
    assert events(tmp_path / "run", "switch")[0]["ranks"] == events(reference, "switch")[0]["ranks"]


def test_forked_on_two_ranks_is_the_same_to_the_bit(runs, whole, tmp_path):
    reference, seen = whole(2, *RANDOM)
    forked = runs(2, tmp_path / "run", *RANDOM, "--fork", reference)  # at its switch
    for a, b in zip(forked, seen):
        assert a["losses"] == b["losses"][12:] and len(a["losses"]) == 8
    assert_same_run(tmp_path / "run", reference)
    bad = runs(2, tmp_path / "bad", "--fork", f"{reference}@2", status=2)
    assert (
        "keeps no checkpoint of epoch 2" in bad[0]["console"]
        and bad[0]["console"].count("error:") == 1
        and not bad[1]["console"]
    )


def test_the_same_micro_batches_and_draws_however_they_are_divided(runs, tmp_path):
    """With everything random on: dropout and mixup are drawn by a micro-batch's number."""
    seen = {
        (ranks, accum): runs(
            ranks, tmp_path / f"{ranks}x{accum}", *RANDOM, "--grad_accum_steps", accum, "--max_steps", 5
        )
        for ranks, accum in [(4, 1), (2, 2), (1, 4), (2, 1)]
    }
    losses = {key: ranks[0]["losses"] for key, ranks in seen.items()}
    assert losses[2, 2] == pytest.approx(losses[1, 4], rel=1e-5) and losses[4, 1] == pytest.approx(
        losses[1, 4], rel=1e-5
    )
    assert losses[2, 1] != pytest.approx(losses[1, 4], rel=1e-5)  # the control: micro-batches of 8, not 4
    images = images_of(seen[1, 4])
    assert len(set(images)) > 64 and all(
        images_of(ranks) == images for ranks in seen.values()
    )  # in two epochs, augmented anew


# ---- a save that is killed, at every point


class Killed(BaseException):
    pass


def save_killed_at(point, save):
    """Run `save`, and leave everything as SIGKILL would at its `point`-th change to the disk, that change
    half made; whether it came."""
    left = [point]

    def cut(function, half):
        def cutting(*args, **kw):
            if left[0] == 0:
                half(*args, **kw)
                raise Killed
            left[0] -= 1
            return function(*args, **kw)

        return cutting

    def half_removed(path, **kw):
        for file in sorted(Path(path).glob("*"))[:1]:
            file.unlink()

    def half_saved(tensors, checkpoint_id, **kw):
        checkpoint_id.mkdir()
        (checkpoint_id / "__0_0.distcp").write_bytes(b"PK")

    nothing = lambda *args, **kw: None
    with (
        mock.patch.object(os, "replace", cut(os.replace, nothing)),
        mock.patch.object(dcp, "save", cut(dcp.save, half_saved)),
        mock.patch.object(shutil, "rmtree", cut(shutil.rmtree, half_removed)),
        mock.patch.object(
            Path,
            "write_text",
            cut(Path.write_text, lambda path, text: path.open("w").write(text[: len(text) // 2])),
        ),
    ):
        try:
            save()
        except Killed:
            return True
    return False


def steps_in(run_dir):
    return sorted(int(d.name[5:]) for d in (run_dir / "checkpoints").glob("step_????????"))


@pytest.mark.parametrize(
    "first, then, kept",
    [
        ([1, 2, 3], 4, [3, 4]),
        ([1, 2, 3], 3, [2, 3]),  # an epoch's end, after a signal had saved its last step
        ([1, 2, 3, "damaged"], 3, [2, 3]),  # resumed from 2
        ([1, 2, 3, "damaged"], 4, [2, 3, 4]),  # two intact ones stay
        ([1, 2, 3, 4, "back to 2"], 3, [2, 3, 4]),
    ],
)
def test_no_moment_of_a_save_loses_the_last_complete_checkpoint(tmp_path, first, then, kept):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    save = lambda run_dir, step, mark: checkpoint.save(
        run_dir, model, optimizer, {"state": {"step": step}, "mark": mark}, pinned=False
    )
    start = tmp_path / "start"
    for step in first:
        if step == "damaged":
            (checkpoint.latest(start) / "__0_0.distcp").write_bytes(b"")
        elif step == "back to 2":
            (start / "checkpoints/latest").write_text("step_00000002")
        else:
            save(start, step, "old")
            if step == 2:
                two = shutil.copytree(start / "checkpoints/step_00000002", tmp_path / "two")
    if 4 in first:
        shutil.copytree(two, start / "checkpoints/step_00000002")  # kept by hand, to go back to
    before, _, _ = checkpoint.find(start)
    for point in range(99):
        run_dir = shutil.copytree(start, tmp_path / f"{point}")
        killed = save_killed_at(point, partial(save, run_dir, then, "new"))
        found, meta, _ = checkpoint.find(run_dir)
        assert found and (meta["state"]["step"], meta["mark"]) in [
            (int(before.name[5:]), "old"),
            (then, "new"),
        ], point
        if not killed:
            break
        save(run_dir, then, "again")  # what the resumed run will do
        assert (
            checkpoint.find(run_dir)[1]["mark"] == "again"
            and checkpoint.latest(run_dir).name == f"step_{then:08d}"
        )
        assert steps_in(run_dir) == kept
        assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {
            "latest",
            *(f"step_{s:08d}" for s in kept),
        }
    assert point > 3 and meta["mark"] == "new"


# ---- damaged checkpoints


def cut(file):
    file.write_bytes(file.read_bytes()[:-9])


DAMAGES = {  # to the newest checkpoint, of step 10; latest is checked for itself
    "meta.json cut": lambda step: cut(step / "meta.json"),
    "meta.json missing": lambda step: (step / "meta.json").unlink(),
    "meta.json empty": lambda step: (step / "meta.json").write_text(""),
    ".metadata cut": lambda step: cut(step / ".metadata"),
    ".metadata empty": lambda step: (step / ".metadata").write_bytes(b""),
    ".metadata missing": lambda step: (step / ".metadata").unlink(),
    "shard cut": lambda step: cut(step / "__0_0.distcp"),
    "shard empty": lambda step: (step / "__0_0.distcp").write_bytes(b""),
    "shard missing": lambda step: (step / "__0_0.distcp").unlink(),
    "all missing": lambda step: [file.unlink() for file in step.iterdir()],
}
LATEST = {
    "missing": lambda link: link.unlink(),
    "empty": lambda link: link.write_text(""),
    "garbage": lambda link: link.write_bytes(b"\xff\x00\n/"),
    "beyond": lambda link: link.write_text("step_00000099"),
    "before": lambda link: link.write_text("step_00000001"),
}


@pytest.fixture(scope="module")
def stopped(runs, tmp_path_factory):
    """One rank, stopped in mid-epoch: checkpoints of steps 8 and 10."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    runs(1, run_dir, *RANDOM, "--max_steps", 10)
    assert steps_in(run_dir) == [8, 10]
    return run_dir


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(stopped, tmp_path, damage):
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    assert checkpoint.find(run_dir)[0].name == "step_00000010"
    DAMAGES[damage](run_dir / "checkpoints/step_00000010")
    found, meta, warnings = checkpoint.find(run_dir)
    assert found.name == "step_00000008" and meta["state"]["step"] == 8
    assert (
        len(warnings) == 1
        and "passed over a damaged checkpoint" in warnings[0]
        and "step_00000010" in warnings[0]
        and "\n" not in warnings[0]
    )


@pytest.mark.parametrize("damage", LATEST)
def test_a_damaged_latest_is_no_fresh_start(stopped, tmp_path, damage):
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    LATEST[damage](run_dir / "checkpoints/latest")
    found, meta, warnings = checkpoint.find(run_dir)
    assert (
        found.name == "step_00000010"
        and len(warnings) == 1
        and f"{run_dir}/checkpoints/latest" in warnings[0]
    )
    shutil.rmtree(found.with_name("step_00000010")), shutil.rmtree(found.with_name("step_00000008"))
    if damage != "missing":
        with pytest.raises(ValueError, match="no intact checkpoint"):
            checkpoint.find(run_dir)


@pytest.mark.parametrize("damage", ["meta.json cut", ".metadata cut", "shard cut", "latest"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(runs, whole, stopped, tmp_path, damage):
    reference, seen = whole(1, *RANDOM)
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    if damage == "latest":
        LATEST["before"](run_dir / "checkpoints/latest")
    else:
        DAMAGES[damage](run_dir / "checkpoints/step_00000010")
    (after,) = runs(1, run_dir, "--resume", True, "--max_steps", 12)
    assert after["losses"] == seen[0]["losses"][10 if damage == "latest" else 8 : 12]
    (warning,) = events(run_dir, "warning")
    assert after["console"].count(f"warning: {warning['message']}\n") == 1 and warning["step"] == 12 - len(
        after["losses"]
    )
    step = "checkpoints/step_00000012"
    assert_same(weights(run_dir, run_dir / step), weights(reference, reference / step))


def test_two_ranks_go_on_from_the_checkpoint_before_one_that_lacks_a_ranks_shards(runs, whole, tmp_path):
    reference, _ = whole(2, *RANDOM)
    run_dir = tmp_path / "run"
    runs(2, run_dir, *RANDOM, "--max_steps", 10)
    (run_dir / "checkpoints/step_00000010/__1_0.distcp").unlink()
    first, second = runs(2, run_dir, "--resume", True, "--max_steps", None)
    assert "__1_0.distcp is missing" in first["console"] and second["console"] == ""
    assert [w["step"] for w in events(run_dir, "warning")][0] == 8
    assert_same_run(run_dir, reference)


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_checkpoints_damaged_is_one_error_and_nothing_is_deleted(runs, stopped, tmp_path, ranks):
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    cut(run_dir / "checkpoints/step_00000008/.metadata")
    cut(run_dir / "checkpoints/step_00000010/__0_0.distcp")
    before = files_of(run_dir)
    first, *others = runs(ranks, run_dir, "--resume", True, status=2)
    assert (
        first["console"].startswith(f"error: no intact checkpoint in {run_dir}/checkpoints: ")
        and first["console"].count("\n") == 1
    )
    assert [r["console"] for r in others] == [""] * (ranks - 1)
    assert files_of(run_dir) == before


# ---- full disks


@contextlib.contextmanager
def full_disk(rank, step, what):
    """From the save of `step` on, one rank's files can't grow beyond 100 bytes, as on a full disk: its shards
    or, after them, meta.json.

    Python ignores SIGXFSZ, so a write beyond the limit fails with an OSError, and really so: nothing is
    mocked."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save, write_json = checkpoint.save, checkpoint.write_json
    fill = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))

    def saving(run_dir, model, optimizer, meta, *others):
        if what == "shards" and meta["state"]["step"] == step:
            fill()
        return save(run_dir, model, optimizer, meta, *others)

    def writing(path, value):
        if what == "meta.json" and path.name == what and value["state"]["step"] == step:
            fill()
        return write_json(path, value)

    if int(os.environ["RANK"]) != rank:
        yield
        return
    with mock.patch.object(checkpoint, "save", saving), mock.patch.object(checkpoint, "write_json", writing):
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "rank, what", [(1, "shards"), pytest.param(0, "shards", marks=slow), (0, "meta.json")]
)
def test_a_full_disk_stops_all_ranks_and_keeps_the_checkpoint_before(runs, whole, tmp_path, rank, what):
    reference, _ = whole(2, *RANDOM)
    run_dir = tmp_path / "run"
    first, second = runs(2, run_dir, *RANDOM, fault=(full_disk, rank, 8, what), status=1)
    errors = [line for line in first["console"].splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and "File too large" in errors[0], first[
        "console"
    ]
    assert "Traceback" not in first["console"] and second["console"] == ""
    assert "File too large" in (run_dir / f"logs/rank_000{1 - rank}.log").read_text()
    assert checkpoint.find(run_dir)[0].name == "step_00000004" and steps_in(run_dir) == [4]
    runs(2, run_dir, "--resume", True)
    assert_same_run(run_dir, reference)
    assert not list(run_dir.glob("checkpoints/*.tmp"))


def test_a_disk_that_is_full_for_everything(runs, whole, tmp_path):
    """Checkpoints, logs, metrics and TensorBoard on one small disk: the console, at least, is told."""
    reference, _ = whole(2, *RANDOM)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        first, second = runs(2, disk / "run", *RANDOM, status=1)
        errors = [line for line in first["console"].splitlines() if "rror" in line]
        assert (
            len(errors) == 1 and errors[0].startswith("error: ") and "No space left on device" in errors[0]
        ), first["console"]
        assert "Traceback" not in first["console"] and second["console"] == ""
        step = checkpoint.find(disk / "run")[1]["state"]["step"]
        assert steps_in(disk / "run")[-1] == step < 20 and "No space" not in "".join(
            map(str, events(disk / "run"))
        )
        subprocess.run(["mount", "-o", "remount,size=30m", disk], check=True)
        runs(2, disk / "run", "--resume", True)
        assert_same_run(disk / "run", reference)
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- NaN on one rank


@contextlib.contextmanager
def poisoned(rank, step):
    """On one rank, NaN images from optimiser step `step` on; yields the weights and the optimiser's state in
    memory, at the end."""
    build_optimizer, normalise, finish = train.build_optimizer, train.normalise, dist.destroy_process_group
    memory, current = {}, []

    def building(model, *rest):
        current[:] = model, build_optimizer(model, *rest)
        return current[1]

    def normalising(images, *rest):
        images = normalise(images, *rest)
        return images * torch.nan if bad[0] and torch.is_grad_enabled() else images

    def finishing():  # while all ranks are still there
        reshard(current[0])
        memory.update(
            {f"model.{name}": to_plain(t.detach()).clone() for name, t in current[0].state_dict().items()}
        )
        for name, state in get_optimizer_state(*current).items():
            memory.update({f"optimizer.{name}.{key}": to_plain(t).clone() for key, t in state.items()})
        finish()

    bad = [False]
    with (
        before_step(rank, step, lambda: bad.__setitem__(0, True)),
        mock.patch.object(train, "build_optimizer", building),
        mock.patch.object(train, "normalise", normalising),
        mock.patch.object(dist, "destroy_process_group", finishing),
    ):
        yield memory


@pytest.mark.parametrize(
    "step, mesh",
    [
        (18, ""),
        *(
            pytest.param(*case, marks=slow)
            for case in [
                (6, ""),
                (14, ""),
                (14, "--dp_shard 1"),
                (18, "--dp_shard 1"),
                (18, "--frozen_base shard"),
            ]
        ),
    ],
)
def test_a_nan_on_one_rank_stops_all_before_the_step(runs, tmp_path, step, mesh):
    flags = [*RANDOM, *mesh.split()]
    clean = runs(2, tmp_path / "clean", *flags, "--max_steps", step)
    seen = runs(2, tmp_path / "run", *flags, fault=(poisoned, 1, step), status=1)
    first, second = seen
    (error,) = [line for line in first["console"].splitlines() if "error" in line]
    last = tmp_path / f"run/checkpoints/step_{step // 4 * 4:08d}"
    assert error.startswith(
        f"error: non-finite loss or gradient norm at step {step + 1}, epoch {step // 4 + 1}, "
    ) and error.endswith(f" {last}")
    assert (
        second["console"] == "" and error.split(", ")[1] in (tmp_path / "run/logs/rank_0001.log").read_text()
    )
    assert first["losses"][:-1] == clean[0]["losses"]
    for rank in seen:
        assert_same(rank["extra"], weights(tmp_path / "clean"))
    assert checkpoint.find(tmp_path / "run")[0] == last
    runs(2, tmp_path / "run", "--resume", True, "--max_steps", step)  # without the NaN it goes on from there
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "clean"))


# ---- signals


def signalled(rank, step, number):
    return before_step(rank, step, os.kill, os.getpid(), number)


@pytest.mark.parametrize(
    "number, step",
    [
        (signal.SIGTERM, 5),
        (signal.SIGUSR2, 11),
        pytest.param(signal.SIGUSR1, 13, marks=slow),
        pytest.param(signal.SIGUSR2, 18, marks=slow),
        pytest.param(signal.SIGTERM, 19, marks=slow),
    ],
)
def test_a_signal_on_one_rank_saves_the_same_step_on_all(runs, whole, tmp_path, number, step):
    """In mid-epoch; at the last step of the epoch that ends in the switch; at the very last step."""
    reference, seen = whole(2, *RANDOM)
    run_dir = tmp_path / "run"
    before = runs(2, run_dir, *RANDOM, fault=(signalled, 1, step, number), status=distributed.REQUEUE)
    assert [len(r["losses"]) for r in before] == [step + 1] * 2
    meta = checkpoint.find(run_dir)[1]
    assert (
        meta["state"]["step"] == step + 1
        and meta["state"]["epoch"] == step // 4
        and meta["state"]["epoch_step"] == step % 4 + 1
    )
    assert (
        f"another rank was told to stop: saved at step {step + 1}, go on with --resume True"
        in before[0]["console"]
    )
    assert "error" not in before[0]["console"]
    after = runs(2, run_dir, "--resume", True)
    assert images_of(before) + images_of(after) == images_of(seen)
    assert_same_run(run_dir, reference)


@pytest.mark.parametrize("step", [9, 11])
def test_a_signal_to_a_single_process(runs, whole, tmp_path, step):
    reference, _ = whole(1, *RANDOM)
    (first,) = runs(
        1, tmp_path / "run", *RANDOM, fault=(signalled, 0, step, signal.SIGTERM), status=distributed.REQUEUE
    )
    assert f"SIGTERM: saved at step {step + 1}, go on with --resume True" in first["console"]
    runs(1, tmp_path / "run", "--resume", True)
    assert_same_run(tmp_path / "run", reference)


@slow
def test_a_signal_with_ffcv(on_ranks, small, tmp_path):
    """At an epoch's last step: the resumed epoch has no batch left."""
    pytest.importorskip("ffcv")
    runs = Runs(on_ranks, small)
    flags = [*RANDOM, "--loader", "ffcv", "--num_workers", 1]
    whole = runs(2, tmp_path / "whole", *flags)
    before = runs(
        2, tmp_path / "run", *flags, fault=(signalled, 1, 11, signal.SIGTERM), status=distributed.REQUEUE
    )
    after = runs(2, tmp_path / "run", "--resume", True)
    assert images_of(before) + images_of(after) == images_of(whole)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@slow
def test_a_signal_that_came_before_training_is_heeded():
    early = []
    with distributed.StopRequest(early) as stop:
        assert not stop.on_any_process(torch.device("cpu"))
    with distributed.StopRequest([signal.SIGUSR2]) as stop:
        assert stop.on_any_process(torch.device("cpu")) and stop.signal == "SIGUSR2"


@pytest.mark.parametrize("held", [True, False])
def test_a_signal_to_all_processes_spares_the_compilers(held):
    """As a phase is entered, its step, which compiles, starts a compiler; as that runs, a signal reaches the
    whole process group."""
    program = f"""
import contextlib, signal, subprocess, torch, train
from launch import distributed
from start import State
if not {held}:  # the control
    distributed.stop_signals_held = contextlib.nullcontext
received = []
for number in distributed.StopRequest.SIGNALS:
    signal.signal(number, lambda number, frame: received.append(number))
compiler = "kill -TERM 0; kill -USR1 0; kill -USR2 0; echo compiled"
train.train_step = lambda *args: subprocess.run(["sh", "-c", compiler], check=True)
train.evaluate = lambda *args: None
model = torch.nn.Linear(1, 1)
train.compile_phase(train.Config(), State(), model, torch.optim.SGD(model.parameters()), torch.device("cpu"))
assert sorted(received) == sorted(distributed.StopRequest.SIGNALS)
"""
    options = {"cwd": REPO, "start_new_session": True, "capture_output": True, "text": True}
    ended = subprocess.run([sys.executable, "-c", program], timeout=120, **options)
    if held:
        assert (ended.returncode, ended.stdout) == (0, "compiled\n"), ended.stderr
    else:
        assert ended.returncode == 1 and "died with <Signals.SIGTERM: 15>" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR2, marks=slow)])
def test_a_signal_to_all_processes_of_a_rank_spares_its_loader_workers(
    launcher, whole, tmp_path, tiny, number
):
    reference, _ = whole(2, *RANDOM)
    run_dir = tmp_path / "run"
    argv = [*RUN, *RANDOM, "--data_dir", tiny, "--run_dir", run_dir, "--num_workers", 2]
    pids = launcher.start(2, tmp_path, argv, slowed, 0.15)
    while (
        not (run_dir / "metrics.jsonl").exists()
        or len(events(run_dir, "epoch")) < 2
        or len(processes_of(pids[1])) < 3
    ):
        assert None in launcher.statuses(pids), (tmp_path / "console_0").read_text()
        time.sleep(0.1)
    launcher.kill(pids[1:], number)
    assert launcher.wait(pids) == [distributed.REQUEUE] * 2, [
        (tmp_path / f"console_{rank}").read_text() for rank in range(2)
    ]
    assert processes_of(pids[0]) == processes_of(pids[1]) == []
    assert (
        "rror" not in (run_dir / "logs/rank_0001.log").read_text()
        and 8 < checkpoint.find(run_dir)[1]["state"]["step"] < 20
    )
    assert launcher.wait(launcher.start(2, tmp_path, [*argv, "--resume", True])) == [0, 0]
    assert_same_run(run_dir, reference)


@contextlib.contextmanager
def slowed(seconds):
    """Every step takes longer: time for what happens in the middle of an epoch."""
    get_lr = train.get_lr
    with mock.patch.object(train, "get_lr", lambda *a, **kw: time.sleep(seconds) or get_lr(*a, **kw)):
        yield


def processes_of(group):
    """Living processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            _, _, fields = stat.read_text().rpartition(") ")
            if int(fields.split()[2]) == group and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


# ---- ranks that hang or die


@contextlib.contextmanager
def impatient(rank, step, do, *args):
    """before_step, where collectives wait no longer than 10 seconds."""
    with mock.patch.object(distributed, "TIMEOUT", timedelta(seconds=10)), before_step(rank, step, do, *args):
        yield


@pytest.mark.parametrize(
    "ranks, rank, flags, do",
    [
        (2, 1, "", os._exit),
        pytest.param(2, 1, "", time.sleep, marks=slow),
        pytest.param(2, 0, "", os._exit, marks=slow),
        pytest.param(2, 0, "", time.sleep, marks=slow),
        pytest.param(4, 3, "--dp_shard 2", time.sleep, marks=slow),
        pytest.param(4, 3, "--dp_shard 2", os._exit, marks=slow),
    ],
)
def test_a_rank_that_hangs_or_dies_ends_the_run_and_is_named(
    launcher, tmp_path, tiny, ranks, rank, flags, do
):
    run_dir = tmp_path / "run"
    pids = launcher.start(
        ranks,
        tmp_path,
        [*RUN, "--data_dir", tiny, "--run_dir", run_dir, *flags.split()],
        impatient,
        rank,
        5,
        do,
        99,
    )
    others = [r for r in range(ranks) if r != rank]
    try:
        launcher.wait([pids[r] for r in others])
        statuses = launcher.statuses(pids)
    finally:
        launcher.kill(pids)
    consoles = [(tmp_path / f"console_{r}").read_text() for r in range(ranks)]
    assert statuses == [
        99 if r == rank and do is os._exit else None if r == rank else 1 for r in range(ranks)
    ], "\n".join(consoles)
    errors = [line for console in consoles for line in console.splitlines() if "error" in line]
    assert len(errors) == 1 and re.search(
        rf"error: rank {rank} did not join gloo:\w+ number \d+ of group .*, shape \[", errors[0]
    ), consoles
    assert not any("Traceback" in console for console in consoles)
    for r in others:
        assert (run_dir / f"logs/flight_recorder_{r}.json").stat().st_size > 100
        log = (run_dir / f"logs/rank_000{r}.log").read_text()
        assert f"rank {rank} did not join" in log and "Traceback" in log
    assert checkpoint.find(run_dir)[0].name == "step_00000004"


@contextlib.contextmanager
def dying_in(rank, name):
    """One rank dies as it calls a function."""
    function = pkgutil.resolve_name(name)
    with mock.patch(
        name, lambda *a, **kw: os._exit(99) if int(os.environ["RANK"]) == rank else function(*a, **kw)
    ):
        yield


@slow
@pytest.mark.parametrize(
    "rank, name",
    [
        (1, "torch.distributed.checkpoint.save"),
        (0, "model.checkpoint.complete"),
        (1, "train.evaluate"),
        (1, "train.switch_phase"),
        (1, "start.build_loader"),
        (0, "model.checkpoint.find"),
    ],
)
def test_a_rank_that_dies_outside_of_a_step(launcher, tmp_path, tiny, rank, name):
    preset = get_empty_preset(tmp_path)
    argv = [preset, *RUN, "--data_dir", tiny, "--run_dir", tmp_path / "run", "--resume", True]
    statuses = launcher.wait(launcher.start(2, tmp_path, argv, dying_in, rank, name))
    consoles = [(tmp_path / f"console_{r}").read_text() for r in range(2)]
    assert statuses == [99 if r == rank else 1 for r in range(2)], consoles
    errors = [line for line in consoles[1 - rank].splitlines() if "error" in line]
    assert len(errors) == 1 and "Traceback" not in consoles[1 - rank] and "error" not in consoles[rank], (
        consoles
    )
    early = name in ("start.build_loader", "model.checkpoint.find")
    left = sorted(path.name for path in tmp_path.glob("run/*"))
    if early:
        assert left == (["lock"] if rank == 0 else [])  # a process 0 that dies can't give it back
    else:
        assert left and f"error: rank {rank} did not join " in errors[0], errors


# ---- bad input


@contextlib.contextmanager
def without_data(rank):
    build_loader = start.build_loader

    def building(loader, dataset, data_dir, *rest, **kw):
        where = "nowhere" if int(os.environ["RANK"]) == rank else data_dir
        return build_loader(loader, dataset, where, *rest, **kw)

    with mock.patch.object(start, "build_loader", building):
        yield


@pytest.mark.parametrize(
    "flags, fault, reason",
    [
        ("--batch_size 15", (), "batch_size 15 is not divisible by 2 ranks × grad_accum_steps 1"),
        ("--dp_shard 3", (), "dp_shard 3 does not divide the 2 ranks of this run"),
        ("--data_dir nowhere", (), "no Fashion-MNIST under nowhere"),
        ("", (without_data, 0), "rank 0: no Fashion-MNIST under nowhere"),
        ("", (without_data, 1), "rank 1: no Fashion-MNIST under nowhere"),
        ("--learning_rate 1", (), "unknown flag --learning_rate"),
        ("--lr_warmup_steps 99", (), "lr_warmup_steps 99 leaves nothing of the 20 steps"),
        ("--num_workers 99", (), "num_workers is 99"),
        ("--run_dir /proc/nowhere", (), "/proc/nowhere"),
    ],
)
def test_bad_input_is_one_line_of_rank_0(runs, tmp_path, flags, fault, reason):
    first, second = runs(2, tmp_path / "run", *flags.split(), fault=fault, status=2)
    assert (
        first["console"].startswith("error: ")
        and reason in first["console"]
        and first["console"].count("\n") == 1
    )
    assert second["console"] == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("", "already holds a run: continue it with --resume True or choose another --run_dir"),
        ("--resume True --seed 1", "was trained with seed = 0, it can't go on with 1"),
        (
            "--resume True --lora_scaling alpha --lora_alpha 8 --batch_size 32",
            "was trained with batch_size = 16, it can't go on with 32",
        ),
        ("--resume True --train_samples 63", "was trained with train_samples = 64, it can't go on with 63"),
        ("--resume True --dp_shard 3", "dp_shard 3 does not divide the 2 ranks"),
        ("--resume True --epochs 2", "is past the end of 2 epochs"),
    ],
)
def test_a_run_that_is_there_is_left_alone(runs, stopped, tmp_path, flags, reason):
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    before = files_of(run_dir)
    first, second = runs(2, run_dir, *flags.split(), status=2)
    assert (
        first["console"].startswith("error: ")
        and reason in first["console"]
        and first["console"].count("\n") == 1
    )
    assert second["console"] == "" and files_of(run_dir) == before


# ---- what a checkpoint says


def test_meta_json_says_where_a_run_stands(runs, tmp_path):
    run_dir = tmp_path / "run"
    runs(2, run_dir, "--max_steps", 14, "--grad_accum_steps", 2)
    meta = json.loads((run_dir / "checkpoints/step_00000014/meta.json").read_text())
    state, ranks = meta["state"], json.loads((run_dir / "ranks.json").read_text())
    assert (state["phase"], state["ranks"], state["step"]) == ("warmup", ranks, 14)
    assert (state["epoch"], state["epoch_step"]) == (3, 2)
    assert meta.keys() == {"state", "config", "train_images", "pinned", "id"} and meta["train_images"] == 64
    assert meta["config"].keys() == {f.name for f in dataclasses.fields(train.Config)}
    assert meta["config"]["batch_size"] == 16
    started = events(run_dir, "start")[0]
    assert started["versions"]["torch"] == torch.__version__ and started["world_size"] == 2
    assert {"python", "cuda"} <= started["versions"].keys()
    epochs = events(run_dir, "epoch")
    assert len(epochs) == 3 and "monitor" not in meta  # the log is its state
    assert state["metrics_bytes"] == (run_dir / "metrics.jsonl").stat().st_size
    assert state["steps_bytes"] == (run_dir / "steps.jsonl").stat().st_size


# ---- kills


def after_a_kill(run_dir):
    """(step of the last complete checkpoint, whether a save was under way), having checked what must be
    there: saves come every 4 steps, those of 12 and 16 stay, and so do the last two."""
    found, meta, warnings = checkpoint.find(run_dir)
    last, steps, folder = meta["state"]["step"] if found else 0, steps_in(run_dir), run_dir / "checkpoints"
    assert {step for step in (last, last - 4, 12, 16) if 0 < step <= last} <= set(steps) and (
        found is None or found == checkpoint.latest(run_dir)
    )
    assert warnings == [] and all(
        checkpoint.verify(folder / f"step_{step:08d}")["state"]["step"] == step for step in steps
    )
    return last, bool(list(folder.glob("step_*.tmp"))) or last < max(steps, default=0)


@slow
def test_twenty_kills(launcher, tiny, tmp_path):
    """At random moments of the run, every other one in a save. Nothing complete is lost, and what comes out
    is the same to the bit."""
    preset = get_empty_preset(tmp_path)
    argv = [preset, *RUN, *RANDOM, "--data_dir", tiny, "--resume", True, "--run_dir"]
    reference, start = tmp_path / "reference", time.monotonic()
    assert launcher.wait(launcher.start(2, tmp_path, [*argv, reference])) == [0, 0]
    seconds, draw, kills, in_save, number = time.monotonic() - start, random.Random(0), 0, 0, 0
    while kills < 20:
        run_dir, before, number, statuses = tmp_path / f"run{number}", 0, number + 1, [-9]
        while statuses != [0, 0]:
            started, saves, moment = time.time(), set(), None
            pids = launcher.start(2, tmp_path, [*argv, run_dir])
            while kills < 20 and launcher.statuses(pids) == [None, None]:
                now = time.time()
                if kills % 2:  # as the next save begins or the one after it, or shortly after
                    saves |= {p.name for p in run_dir.glob("checkpoints/step_*.tmp") if modified(p) > started}
                    if len(saves) > kills // 2 % 2 and moment is None:
                        moment = now + draw.choice([0, 0.03, 0.15]) * draw.random()
                elif moment is None and modified(run_dir / "logs/rank_0001.log") > started:
                    moment = now + draw.uniform(0, seconds / 2)
                if moment and now >= moment:
                    launcher.kill(pids)
                    break
                time.sleep(0.003)
            statuses = launcher.wait(pids)
            last, saving = after_a_kill(run_dir)
            met_the_end = sorted(statuses) == [-9, 0] and last == 20  # one process had left already
            assert statuses in ([0, 0], [-9, -9]) or met_the_end, (tmp_path / "console_0").read_text()
            assert last >= before
            before = last
            if statuses == [-9, -9]:
                kills, in_save = kills + 1, in_save + saving
        assert_same_run(run_dir, reference)
    print(f"{kills} kills, {in_save} of them in a save, {number} runs of {seconds:.1f} s")
    assert in_save >= 5


def modified(path):
    try:
        return path.stat().st_mtime
    except OSError:
        return 0


@slow
def test_killed_and_told_to_stop_under_torchrun(tiny, tmp_path):
    run_dir, torchrun = (
        tmp_path / "run",
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "train.py"],
    )
    preset = get_empty_preset(tmp_path)
    argv = [preset, *RUN, *RANDOM, "--data_dir", str(tiny), "--resume", "True", "--run_dir"]

    def start(path):
        return subprocess.Popen(
            [*torchrun, *argv, str(path)],
            cwd=REPO,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(condition):
        while not condition():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.003)

    def pid_of(rank):
        return int(re.findall(r"pid (\d+)", (run_dir / f"logs/rank_000{rank}.log").read_text())[-1])

    process = start(tmp_path / "reference")
    assert process.wait() == 0, process.stderr.read()

    process = start(run_dir)  # everything at once, in the first save
    wait_for(lambda: list(run_dir.glob("checkpoints/step_*.tmp")))
    for pid in (process.pid, pid_of(0), pid_of(1)):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    first, _ = after_a_kill(run_dir)

    process = start(run_dir)  # one rank, in the middle of an epoch: torchrun ends the other
    wait_for(lambda: len(events(run_dir, "epoch")) > 1)
    os.kill(pid_of(1), signal.SIGKILL)
    assert process.wait() == 1 and not Path(f"/proc/{pid_of(0)}").exists()
    second, _ = after_a_kill(run_dir)
    assert second >= max(first, 4)

    process = start(run_dir)  # torchrun hands SIGTERM on
    wait_for(lambda: len(events(run_dir, "epoch")) > 2)
    process.send_signal(signal.SIGTERM)
    assert (
        process.wait() != 0
        and "rror" not in (run_dir / "logs/rank_0001.log").read_text().split("starts on")[-1]
    )
    third = checkpoint.find(run_dir)[1]["state"]["step"]
    assert third >= 12 and checkpoint.read_meta(checkpoint.latest(run_dir))["state"]["epoch_step"] == (
        third % 4 or 4
    )

    process = start(run_dir)
    assert process.wait() == 0, process.stderr.read()
    assert_same_run(run_dir, tmp_path / "reference")
