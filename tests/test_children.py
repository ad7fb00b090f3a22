"""Processes that are killed, what they leave, and a cache that can't be written."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import wait
from test_beton import photo, save
from test_data import needs_ffcv

from data.beton import main
from data.children import describe_kill

REPO = Path(__file__).parent.parent


def get_children(pid) -> list[int]:
    """The processes that a process has started, but for multiprocessing's own."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            own = b"resource_tracker" in (status.parent / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid and not own:
            found.append(int(status.parent.name))
    return found


def is_there(pid) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---- the writer


@pytest.fixture
def writing(tmp_path):
    """writing() -> a writer at work with two workers, which goes on for a minute, and the workers' pids."""
    save(photo(1500, 1500, 0), tmp_path / "tree/a/0.jpg", quality=90)
    for i in range(1, 4000):
        os.link(tmp_path / "tree/a/0.jpg", tmp_path / f"tree/a/{i}.jpg")
    argv = [sys.executable, "-m", "data.beton", tmp_path / "tree", tmp_path / "out.beton", "--workers", "2"]
    processes = []

    def start():
        process = subprocess.Popen(argv, cwd=REPO, stderr=subprocess.PIPE, text=True, start_new_session=True)
        processes.append(process)
        wait(lambda: len(get_children(process.pid)) == 2 and list(tmp_path.glob("out.beton.*.tmp")), 60)
        wait(lambda: sum(path.stat().st_size for path in tmp_path.glob("out.beton.*.tmp")) > 1 << 24, 60)
        return process, get_children(process.pid)

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


@needs_ffcv
def test_workers_end_with_a_writer_that_is_killed_and_the_next_start_cleans_up(writing, tmp_path, capsys):
    process, workers = writing()
    process.kill()
    wait(lambda: not any(map(is_there, workers)), 30)
    process.communicate()
    left = sorted(tmp_path.glob("out*"))
    assert [path.name.split(".")[:2] for path in left] == [["out", "beton"], ["out", "json"]]
    shutil.rmtree(tmp_path / "tree")
    save(photo(60, 50, 0), tmp_path / "tree/a/0.png")
    assert main([str(tmp_path / "tree"), str(tmp_path / "out.beton"), "--workers", "1"]) == 0
    said = capsys.readouterr().err
    assert all(f"removed {path}, which a process that was killed had left" in said for path in left)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.beton", "out.json"]


@needs_ffcv
def test_a_start_leaves_alone_what_another_writer_holds(writing, tmp_path, capsys):
    writing()
    left = sorted(tmp_path.glob("out*"))
    save(photo(60, 50, 0), tmp_path / "small/a/0.png")
    assert main([str(tmp_path / "small"), str(tmp_path / "out.beton"), "--workers", "1"]) == 0
    assert set(left) < set(tmp_path.glob("out*")) and "removed" not in capsys.readouterr().err


@needs_ffcv
def test_ctrl_c_is_one_line_and_leaves_nothing(writing, tmp_path):
    process, workers = writing()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = process.communicate(timeout=60)[1].replace("\r", "\n").splitlines()
    assert process.returncode == 130 and not any(map(is_there, workers))
    assert [line for line in said if line and "images" not in line] == ["interrupted: nothing is written"]
    assert not list(tmp_path.glob("out*"))


@needs_ffcv
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_the_signal_that_killed_a_worker_is_named(writing, tmp_path, number):
    process, workers = writing()
    os.kill(workers[0], number)
    said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 1
    assert said[-1] == f"error: {tmp_path / 'out.beton'}: a worker {describe_kill(-number)}"
    assert number.name in said[-1] and not list(tmp_path.glob("out*"))


def test_signals_are_explained():
    assert describe_kill(-7) == "was killed by SIGBUS: /dev/shm, or the disk, is full"
    assert describe_kill(-15) == "was killed by SIGTERM"


@needs_ffcv
def test_no_room_in_dev_shm_is_said_before(tmp_path, monkeypatch, capsys):
    save(photo(60, 50, 0), tmp_path / "tree/a/0.png")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1))
    assert main([str(tmp_path / "tree"), str(tmp_path / "out.beton"), "--workers", "1"]) == 1
    assert "error: /dev/shm has 0 MB free, the metadata of the images needs" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


# ---- the loader

LOADER = """
import time
from data.folder import EpochImages
from data.loader import build_loader
EpochImages.__getitem__ = lambda self, index: time.sleep(600)  # in the middle of an image
loader = build_loader("folder", "fashion_mnist", "{}", "train", 8, 0, num_workers=2)
next(loader.epoch(0))
"""


def test_loader_workers_end_with_their_parent(small):
    process = subprocess.Popen([sys.executable, "-c", LOADER.format(small)], cwd=REPO)
    try:
        wait(lambda: len(get_children(process.pid)) == 2, 60)
        time.sleep(0.5)  # and they are past their first lines
        workers = get_children(process.pid)
    finally:
        process.kill()
        process.wait()
    wait(lambda: not any(map(is_there, workers)), 30)


# ---- numba's cache


def test_workers_are_forked_whatever_python_would_do(small):
    """Python 3.14 starts them from a server of its own, which is not their parent."""
    program = (
        "import multiprocessing; multiprocessing.set_start_method('forkserver'); "
        "from data.loader import build_loader; "
        f"loader = build_loader('folder', 'fashion_mnist', {str(small)!r}, 'val', 65, 0, 1); "
        "print(sum(len(labels) for _, labels in loader.epoch(0)))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("130\n", 0), done.stderr


@pytest.fixture
def locked(tmp_path):
    """locked(**environment) -> what a process that compiles has printed, in a copy of the code whose
    __pycache__ can't be made, and without a home."""
    (tmp_path / "code/data").mkdir(parents=True)
    for path in [*REPO.glob("data/*.py"), REPO / "errors.py", REPO / "files.py"]:
        shutil.copy(path, tmp_path / "code" / path.relative_to(REPO))
    (tmp_path / "code/data/__pycache__").touch()
    (tmp_path / "tmp").mkdir()
    program = (
        "import os; from data.augment import splitmix64; splitmix64(1); print(os.environ['NUMBA_CACHE_DIR'])"
    )

    def run(**environment):
        others = ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "RANK")
        variables = {key: value for key, value in os.environ.items() if key not in others}
        variables |= {"HOME": "/proc/none", "TMPDIR": str(tmp_path / "tmp")}
        command = [sys.executable, "-c", program]
        return subprocess.run(
            command, cwd=tmp_path / "code", env=variables | environment, capture_output=True, text=True
        )

    return run


def test_a_cache_that_cannot_be_written_is_a_note(locked, tmp_path):
    own = tmp_path / f"tmp/prelora-numba-{os.getuid()}"
    done = locked()
    assert (done.returncode, done.stdout) == (0, f"{own}\n"), done.stderr
    assert done.stderr.startswith("note: neither ") and done.stderr.count("\n") == 1
    assert own.stat().st_mode & 0o777 == 0o700 and list(own.rglob("*splitmix64*.nbc"))
    again = locked(RANK="1")  # another process, which says nothing
    assert (again.stdout, again.stderr) == (f"{own}\n", "")
    own.chmod(0o777)  # what others may have written there is not read
    other = locked().stdout.strip()
    assert other.startswith(f"{tmp_path}/tmp/prelora-numba-") and other != str(own)


def test_a_cache_of_the_users_own(locked, tmp_path):
    done = locked(NUMBA_CACHE_DIR=str(tmp_path / "mine"))
    assert (done.stdout, done.stderr) == (f"{tmp_path}/mine\n", "")
    done = locked(NUMBA_CACHE_DIR="/proc/none/cache")
    own = tmp_path / f"tmp/prelora-numba-{os.getuid()}"
    assert done.stdout == f"{own}\n" and done.stderr == (
        "note: NUMBA_CACHE_DIR=/proc/none/cache can't be written (No such file or directory): functions are "
        f"kept compiled in {own}\n"
    )
    done = locked(NUMBA_CACHE_DIR="/proc/none/cache", TMPDIR="/proc/none")
    assert done.returncode == 0  # Python then takes /tmp


def test_numba_is_imported_in_one_place():
    files = [path.name for path in REPO.glob("data/*.py") if "from numba import" in path.read_text()]
    assert files == ["compiled.py"]
