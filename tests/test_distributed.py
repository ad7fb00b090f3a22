"""launch/distributed.py and launch/failures.py: processes that agree, mistakes and bugs told apart, what is
said of them.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from errors import SharedError, UserError
from launch import distributed, failures

REPO = Path(__file__).resolve().parent.parent

# ---- agreement


def meet(errors, run=distributed.together):
    """What this process raises at the end of `together`, in which it meets errors.get(its world rank): type,
    text, whether its traceback leads to where it was met.
    """
    distributed.start()
    try:
        with run():
            if error := errors.get(distributed.get_world_rank()):
                raise error  # here
    except Exception as raised:
        return type(raised).__name__, str(raised), "# here" in traceback.format_exc()
    finally:
        dist.destroy_process_group()


HOST = distributed.get_host()


def test_a_mistake_of_one_process_is_all_processes(on_ranks):
    expected = ("SharedError", f"rank 1: no data (on {HOST})", False)
    assert on_ranks(2, meet, {1: UserError("no data")}) == [expected] * 2
    both = {0: UserError("no data"), 1: UserError("no data")}
    assert on_ranks(2, meet, both) == [("SharedError", "no data", False)] * 2
    assert on_ranks(2, meet, {}) == [None] * 2


@pytest.mark.parametrize("bug", [KeyError("x"), OSError(13, "Permission denied"), RuntimeError("two\nlines")])
def test_a_bug_of_one_process_keeps_its_traceback_and_ends_the_others(on_ranks, bug):
    """Also where another process has made a mistake at the same time."""
    first_line = str(bug).splitlines()[0]
    for mistakes in ({}, {0: UserError("no data")}):
        first, second = on_ranks(2, meet, {1: bug} | mistakes)
        assert second == (type(bug).__name__, str(bug), True)
        name, text, _ = first
        assert name == "DistError" and text.startswith(
            f"rank 1: {type(bug).__name__}: {first_line} (on {HOST})"
        )
        assert "\n" not in text


def test_one_process_needs_no_agreement():
    with pytest.raises(KeyError):
        with distributed.together():
            {}["x"]
    with pytest.raises(UserError, match="^no data$"):
        with distributed.together():
            raise UserError("no data")
    with pytest.raises(UserError, match="^full$"):
        distributed.once_per_node(raise_, UserError("full"))
    with pytest.raises(OSError, match="^full$"):
        distributed.once_per_node(raise_, OSError("full"))


def raise_(error):
    raise error


def meet_once_per_node(error):
    """Two nodes of one process each; the second meets it."""

    def work():
        if distributed.get_world_rank() == 1:
            raise error  # here

    distributed.start()
    os.environ["LOCAL_RANK"] = "0"
    try:
        distributed.once_per_node(work)
    except Exception as raised:
        return type(raised).__name__, "# here" in traceback.format_exc()
    finally:
        dist.destroy_process_group()


def test_a_bug_on_one_node(on_ranks):
    assert on_ranks(2, meet_once_per_node, KeyError("x")) == [("DistError", False), ("KeyError", True)]
    assert on_ranks(2, meet_once_per_node, UserError("full")) == [("SharedError", False)] * 2


def use_numbers():
    device = distributed.start()
    world_rank = distributed.get_world_rank()
    try:
        total = distributed.sum_over_processes(torch.tensor([1.0, world_rank]))
        largest = distributed.max_over_processes(10.0 * world_rank, device)
        return total.tolist(), largest, distributed.gather(world_rank), distributed.get_world_size()
    finally:
        distributed.finish()


def test_sums_over_processes(on_ranks):
    assert on_ranks(2, use_numbers) == [([2.0, 1.0], 10.0, [0, 1], 2)] * 2


def test_sums_of_one_process():
    tensor = torch.tensor([1.0, 2.0])
    assert distributed.sum_over_processes(tensor) is tensor
    assert distributed.max_over_processes(3.0, torch.device("cpu")) == 3.0
    assert distributed.gather("x") == ["x"] and distributed.agree("no data") == "no data"
    assert (distributed.get_world_rank(), distributed.get_world_size()) == (0, 1)


def test_places_in_words():
    assert distributed.describe_places(["a", "a", "b", "a"]) == "ranks: [0, 1, 3] on a, [2] on b"


# ---- start

PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment, says",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK and MASTER_ADDR and MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE should be a whole number, not 'two'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK should be a whole number, not '-1'"),
        ({"WORLD_SIZE": "2", "RANK": "2", **PLACE}, "RANK 2 should be below WORLD_SIZE 2"),
        ({"WORLD_SIZE": "0", "RANK": "0", **PLACE}, "RANK 0 should be below WORLD_SIZE 0"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "ib0"},
            "MASTER_PORT should be a whole number, not 'ib0'",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"},
            "MASTER_PORT should be 1 to 65535, not 99999",
        ),
    ],
)
def test_an_incomplete_environment_is_a_mistake(monkeypatch, environment, says):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.start().type in ("cpu", "cuda")  # the control: none is needed
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        distributed.start()
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "gpus, visible, world_size, local_rank, says",
    [
        (2, None, 1, 2, "LOCAL_RANK 2 has no GPU: this node has 2, start so many"),
        (2, None, 4, 3, "LOCAL_RANK 3 has no GPU: this node has 2, start so many"),
        (2, "4,5", 4, 2, "this node has 2 that CUDA_VISIBLE_DEVICES=4,5 shows, start so many"),
        # a single process with another one's place: not for --gpus-per-task to explain
        (
            1,
            "3",
            1,
            1,
            "this node has 1 that CUDA_VISIBLE_DEVICES=3 shows, .* unset a LOCAL_RANK that is left",
        ),
        # one GPU for each process, its own by the scheduler's word
        (1, "3", 4, 3, 0),
        (1, None, 4, 3, 0),
        # the controls
        (2, None, 2, 1, 1),
        (1, None, 1, 0, 0),
    ],
)
def test_which_gpu_a_process_takes(monkeypatch, gpus, visible, world_size, local_rank, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if isinstance(says, int):
        assert distributed.choose_device(local_rank, world_size) == torch.device("cuda", says)
        return
    with pytest.raises(UserError, match=says):
        distributed.choose_device(local_rank, world_size)


def take_gpus(uuids):
    """What becomes of processes that have these GPUs."""
    distributed.start()
    try:
        distributed.check_gpus(uuids[distributed.get_world_rank()])
    except UserError as error:
        return type(error).__name__, str(error).split(":")[0]
    finally:
        dist.destroy_process_group()


def test_a_gpu_is_no_two_processes(on_ranks):
    """One GPU that is visible to each of them may be the same for all."""
    assert on_ranks(2, take_gpus, ["GPU-1", "GPU-2"]) == [None, None]
    assert (
        on_ranks(2, take_gpus, ["GPU-1", "GPU-1"]) == [("SharedError", "ranks 0, 1 have one GPU, GPU-1")] * 2
    )


def set_place(monkeypatch, port):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))


def test_a_port_that_is_taken(monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        set_place(monkeypatch, port := other.getsockname()[1])
        says = f"port {port} of {HOST} is taken by another process: export MASTER_PORT=N for all processes"
        with pytest.raises(UserError, match=f"^{says}"):
            distributed.start()
    assert not dist.is_initialized()


def test_a_port_that_is_the_systems(monkeypatch):
    def refuse(*args, **options):
        raise dist.DistNetworkError("The server socket has failed to bind. port: 80, code: -13, name: EACCES")

    set_place(monkeypatch, 80)
    monkeypatch.setattr(dist, "init_process_group", refuse)
    with pytest.raises(UserError, match=f"^port 80 of {HOST} is not open to this user: export MASTER_PORT=N"):
        distributed.start()


def get_free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_processes_that_never_come(monkeypatch, capsys):
    """What is waited for is said once; after that the wait goes on to its end. Ctrl-C is Python's again."""
    set_place(monkeypatch, port := get_free_port())
    monkeypatch.setattr(distributed, "ANNOUNCE", 0.1)
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=1))
    with pytest.raises(UserError, match="the processes did not find each other"):
        distributed.start()
    said = (
        f"rank 0 waits for the rest of 2 processes at 127.0.0.1:{port}: WORLD_SIZE=2 is set here, start the"
    )
    printed = capsys.readouterr().err
    assert printed.startswith(said) and "unset WORLD_SIZE" in printed and printed.count("\n") == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_wait_that_is_over_is_not_announced(monkeypatch, capsys):
    set_place(monkeypatch, 29500)
    with distributed.wait_announced(2):
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    for timer in timers:
        timer.join(distributed.ANNOUNCE / 2)
    assert timers and not any(timer.is_alive() for timer in timers) and capsys.readouterr().err == ""


WAIT = """
from launch import distributed
distributed.ANNOUNCE = 0.1
distributed.start()
"""


def test_ctrl_c_ends_the_wait():
    """WORLD_SIZE is left over in a shell, and this is the only process."""
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
    waiting = subprocess.Popen(
        [sys.executable, "-c", WAIT], cwd=REPO, env=os.environ | place, stderr=subprocess.PIPE, text=True
    )
    said = next(line for line in waiting.stderr if "rank " in line)
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(60) == -signal.SIGINT and said.startswith("rank 1 waits for the rest of 2 processes")
    waiting.stderr.close()


# ---- what is said

PROCESS = """
import sys
from errors import UserError
from launch import distributed, failures

def main(argv):
    try:
        distributed.start()
        with distributed.together():
            if distributed.get_world_rank() == 1:
                raise {error}
    except (UserError, RuntimeError) as error:
        return failures.refuse(error)
    return 0

distributed.exit(main, [])
"""


@pytest.mark.parametrize(
    "error, statuses, says, traces",
    [
        ("KeyError('x')", [1, 1], "error: rank 1: KeyError: 'x' (on ", [False, True]),
        pytest.param(
            "UserError('no data')",
            [2, 2],
            "error: rank 1: no data (on ",
            [False, False],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_processes_that_end(error, statuses, says, traces):
    """Real ones: none is left waiting for the one that has met it."""
    port = get_free_port()
    processes = []
    for world_rank in range(2):
        place = {"RANK": world_rank, "LOCAL_RANK": world_rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        env = os.environ | {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, "-c", PROCESS.format(error=error)]
        processes.append(subprocess.Popen(command, cwd=REPO, env=env, stderr=subprocess.PIPE, text=True))
    printed = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == statuses, printed
    assert printed[0].startswith(says) and printed[0].count("\n") == 1
    assert ["Traceback" in text for text in printed] == traces
    assert traces[1] or printed[1] == ""


def fail_in_log(run_dir, error):
    """What a process's log yields, and whether the error came out."""
    distributed.start()
    run_dir.mkdir(exist_ok=True)
    try:
        with distributed.process_log(run_dir):
            print("hello from the inside")
            raise error
    except type(error):
        return True
    finally:
        dist.destroy_process_group()


def test_a_bug_stands_in_the_processes_logs(on_ranks, tmp_path):
    assert on_ranks(2, fail_in_log, tmp_path / "run", KeyError("x")) == [True, True]
    texts = [(tmp_path / f"run/logs/rank_000{world_rank}.log").read_text() for world_rank in range(2)]
    assert all(f"starts on {HOST}, pid " in text and "2 ranks" in text for text in texts)
    assert all("error: KeyError: 'x'" in text and "in fail_in_log" in text for text in texts)
    assert ["hello from the inside" in text for text in texts] == [False, True]


@pytest.mark.parametrize(
    "error, status, says",
    [
        (FloatingPointError("non-finite loss"), 1, "error: non-finite loss; last checkpoint: None"),
        (SharedError("can't write"), 1, "error: can't write"),
        (UserError("a.jpg cannot be read"), 1, "error: a.jpg cannot be read"),
        (KeyboardInterrupt(), 130, "interrupted: go on with --run_dir 'runs/a b' --resume True"),
    ],
)
def test_a_run_that_has_to_stop_says_why(error, status, says):
    said = []
    assert (
        failures.explain(error, "runs/a b", lambda text, console=True: said.append((text, console))) == status
    )
    assert said == [(says, True)]


def test_a_bug_is_raised_on(capsys):
    for bug in (RuntimeError("shapes"), TypeError("none")):
        with pytest.raises(type(bug)):
            failures.explain(bug, "run", lambda *args, **kwargs: pytest.fail("it was explained"))
        with pytest.raises(type(bug)):
            failures.refuse(bug)
    assert capsys.readouterr().err == ""
    assert failures.refuse(UserError("no data")) == 2 and capsys.readouterr().err == "error: no data\n"
    assert failures.refuse(dist.DistError("rank 1 is gone")) == 1
    assert capsys.readouterr().err == "error: rank 1 is gone\n"


@pytest.mark.parametrize(
    "error, is_lost",
    [
        (dist.DistError("x"), True),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("shapes"), False),
        (ValueError("gloo/transport"), False),
    ],
)
def test_lost_processes_are_told_from_bugs(error, is_lost):
    assert failures.is_lost_process(error) == is_lost
