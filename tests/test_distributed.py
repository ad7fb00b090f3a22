"""launch/distributed.py and launch/failures.py: processes that agree, mistakes and bugs told apart, what is
said of them.
"""

import os
import socket
import subprocess
import sys
import traceback
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


@pytest.mark.parametrize(
    "environment, says",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK and MASTER_ADDR and MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE should be a whole number, not 'two'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK should be a whole number, not '-1'"),
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


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="LOCAL_RANK 2 has no GPU: this node has 2"):
        distributed.start()


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
        (KeyboardInterrupt(), 130, "interrupted: go on with --run_dir run --resume True"),
    ],
)
def test_a_run_that_has_to_stop_says_why(error, status, says):
    said = []
    assert failures.explain(error, "run", lambda text, console=True: said.append((text, console))) == status
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
