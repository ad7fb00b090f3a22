"""The lock on a run: who gets it, who is refused, and what is left by the killed."""

import dataclasses
import errno
import fcntl
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from slurm_cluster import wait
from small_runs import (
    REPO,
    argv,
    events,
    get_empty_preset,
    get_error,
    no_figures,  # noqa: F401 (a fixture)
    resume,
    run,
)

import train
from errors import SharedError, UserError
from files import remove_leftovers, temporary
from launch import lock
from model.checkpoint import on_process_0

OWN = lock.describe_self({})
JOB = dict(scheduler="slurm", cluster="lab", job="12", restarts="1")
ELSEWHERE = dict(host="node2", boot="another")


def get_dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def write_lock(run_dir, **changes):
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "lock").write_text(json.dumps(OWN | {"id": "another"} | changes))


# ---- two processes on one run


def test_a_second_process_is_refused_and_a_killed_ones_run_goes_on(small, tmp_path, capsys):
    run_dir = tmp_path / "run"
    command = [sys.executable, "train.py", *argv(small, run_dir, "--epochs", 200)]
    first = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True)
    try:
        wait((run_dir / "checkpoints/latest").exists, 120)
        before = sorted(path.name for path in run_dir.iterdir())
        assert resume(run_dir) == 2
        said = get_error(capsys)
        assert f"{run_dir} is in use by process {first.pid} on {socket.gethostname()}, since 20" in said
        assert "wait for it or stop it, or choose another --run_dir" in said
        assert sorted(path.name for path in run_dir.iterdir()) == before and "lock" in before
        size = (run_dir / "metrics.jsonl").stat().st_size
        wait(lambda: (run_dir / "metrics.jsonl").stat().st_size > size, 60)  # it goes on
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
    wait(lambda: lock.get_start_time(first.pid) is None, 60)  # ended, though nobody has reaped it yet
    assert (run_dir / "lock").exists()
    done = events(run_dir, "epoch")[-1]["epoch"]
    assert resume(run_dir, "--max_steps", 6 * (done + 2)) == 0
    first.communicate()
    starts = events(run_dir, "start")
    gone = f"process {first.pid} on {socket.gethostname()}, which is gone: taken over"
    assert f"{run_dir}/lock was left by {gone}" in starts[1]["notes"]
    epochs = [record["epoch"] for record in events(run_dir, "epoch")]
    assert epochs == list(range(1, done + 3)) and not (run_dir / "lock").exists()


@pytest.mark.parametrize("flags", [[], ["--resume", "True"]])
def test_a_fresh_start_is_refused_too_and_touches_nothing(small, tmp_path, capsys, flags):
    write_lock(tmp_path / "run", pid=os.getppid(), started=lock.get_start_time(os.getppid()), job="7")
    preset = get_empty_preset(tmp_path)
    assert train.main([preset, *argv(small, tmp_path / "run", *flags)]) == 2
    assert f"is in use by process {os.getppid()} on " in (said := get_error(capsys)) and " of job 7, " in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_run_that_came_while_this_one_waited_is_left_alone(small, tmp_path, monkeypatch, capsys):
    """Between the look at the flags and the lock another start has come and gone."""
    take, run_dir = lock.take, tmp_path / "run"

    def take_late(path):
        monkeypatch.setattr("start.take", take)
        run(small, run_dir, "--max_steps", 6)
        return take(path)

    monkeypatch.setattr("start.take", take_late)
    assert train.main(argv(small, run_dir)) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert len(events(run_dir, "epoch")) == 1


@pytest.mark.parametrize("flags, status", [("--max_steps 3", 0), ("--batch_size 7000", 2)])
def test_it_is_given_back_on_every_way_out(small, tmp_path, flags, status):
    """At the end, and where a start is refused, which leaves no folder behind."""
    assert train.main(argv(small, tmp_path / "above" / "run", *flags.split())) == status
    assert not (tmp_path / "above/run/lock").exists()
    assert (tmp_path / "above").exists() == (status == 0)


def test_it_is_given_back_when_training_fails(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(argv(small, tmp_path / "run"))
    assert not (tmp_path / "run/lock").exists()


def take_on_process_0(run_dir):
    with pytest.raises(SharedError) as refused:
        on_process_0(lock.take, run_dir)
    return str(refused.value)


def test_all_ranks_say_the_same(on_ranks, tmp_path):
    write_lock(tmp_path, pid=os.getpid())
    said = on_ranks(2, in_group, tmp_path)
    assert said[0] == said[1] and f"in use by process {os.getpid()}" in said[0]


def in_group(run_dir):
    from launch import distributed

    distributed.start()
    try:
        return take_on_process_0(run_dir)
    finally:
        distributed.finish()


# ---- whether a holder is alive


@pytest.mark.parametrize(
    "holder, own, alive",
    [
        (dict(), {}, True),
        (dict(pid=None), {}, False),
        (dict(started=OWN["started"] - 1), {}, False),  # its pid is used again
        (dict(JOB, pid=None), JOB, False),  # killed in this very start of this job
        (dict(pid_namespace=1), {}, None),  # another container
        (dict(boot="another", machine="one"), dict(machine="one"), False),  # before a reboot
        (dict(boot="another", machine="two"), dict(machine="one"), None),  # another machine of that name
        (dict(boot="another", machine=None), dict(machine=None), None),  # containers of that name
        (ELSEWHERE, {}, None),
        (dict(JOB, **ELSEWHERE, restarts="0"), JOB, False),  # requeued
        (dict(JOB, **ELSEWHERE), JOB, None),  # another step of it, perhaps beside this one
        (dict(JOB, **ELSEWHERE, cluster="other"), JOB, None),
    ],
)
def test_whether_a_holder_is_alive(monkeypatch, holder, own, alive):
    monkeypatch.setattr(lock, "ask", lambda *command: None)
    if "pid" in holder:
        holder = holder | {"pid": get_dead_pid()}
    assert lock.is_alive(OWN | holder, OWN | own) is alive


def test_another_users_process_that_proc_hides_is_alive(monkeypatch):
    """A /proc mounted with hidepid: no entry, and no signal may be sent."""
    pid = get_dead_pid()
    assert lock.is_alive(OWN | {"pid": pid}, OWN) is False  # control
    monkeypatch.setattr(os, "kill", lambda *args: (_ for _ in ()).throw(PermissionError()))
    assert lock.is_alive(OWN | {"pid": pid}, OWN) is True


def test_a_lock_that_may_not_be_written_says_whose_it_is(tmp_path, monkeypatch):
    write_lock(tmp_path)
    monkeypatch.setattr("builtins.open", lambda *args: deny(*args) if args[1] == "r+b" else open_file(*args))
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        lock.take(tmp_path)


def deny(*args):
    raise PermissionError(errno.EACCES, "Permission denied", *args[:1])


SLURM = "ClusterName             = lab\n"


@pytest.mark.parametrize(
    "scheduler, status, out, error, active",
    [
        ("slurm", 0, "RUNNING\n", "", True),
        ("slurm", 0, "PENDING\n", "", True),
        ("slurm", 0, "", "", False),
        ("slurm", 1, "", "slurm_load_jobs error: Invalid job id specified\n", False),
        ("slurm", 1, "", "slurm_load_jobs error: Unable to contact slurm controller\n", None),
        ("pbs", 0, "12.pbs  run  user  0 R main\n", "", True),
        ("pbs", 35, "", "qstat: 12.pbs Job has finished, use -x or -H to obtain historical", False),
        ("pbs", 153, "", "qstat: Unknown Job Id 12.pbs", False),
        ("pbs", 111, "", "qstat: cannot connect to server pbs (errno=111)", None),
    ],
)
def test_a_job_is_asked_for(tmp_path, monkeypatch, scheduler, status, out, error, active):
    """Both schedulers' commands, played by scripts."""
    name = {"slurm": "squeue", "pbs": "qstat"}[scheduler]
    script = f"#!/bin/sh\nprintf '%s' '{out}'\nprintf '%s' '{error}' >&2\nexit {status}\n"
    for command, text in ((name, script), ("scontrol", f"#!/bin/sh\nprintf '{SLURM}'\n")):
        (tmp_path / command).write_text(text)
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cluster = "lab" if scheduler == "slurm" else None
    holder = OWN | ELSEWHERE | dict(scheduler=scheduler, cluster=cluster, job="12", restarts="0")
    assert lock.is_alive(holder, OWN) is active
    if scheduler == "slurm":
        assert lock.is_alive(holder | {"cluster": "another"}, OWN) is None


def test_no_scheduler_is_no_answer(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert lock.is_active(JOB) is None and lock.is_active({"scheduler": "pbs", "job": "1"}) is None


def test_what_nobody_can_know_is_refused_with_the_way_out(tmp_path):
    write_lock(tmp_path, **ELSEWHERE)
    with pytest.raises(UserError, match=f"still runs: if it is gone, delete {tmp_path}/lock$"):
        lock.take(tmp_path)


def test_a_damaged_lock_is_nobodys(tmp_path):
    (tmp_path / "lock").write_text("")
    with pytest.raises(UserError, match="lock is damaged, so nobody knows whose it is: delete it"):
        lock.take(tmp_path)


def test_a_lock_that_is_anothers_by_now_stays(tmp_path):
    mine = lock.take(tmp_path)
    write_lock(tmp_path)
    mine.close()
    assert (tmp_path / "lock").exists()
    (tmp_path / "lock").unlink()
    mine.close()  # gone already


def refuse_link(*args):
    raise PermissionError(errno.EPERM, "no hard links here")


def test_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse_link)
    mine = lock.take(tmp_path)
    with pytest.raises(UserError, match="in use by"):
        lock.take(tmp_path)
    mine.close()
    assert list(tmp_path.iterdir()) == []


def test_without_hard_links_a_lock_that_is_being_written_is_waited_for(tmp_path, monkeypatch):
    (tmp_path / "lock").touch()
    monkeypatch.setattr(time, "sleep", lambda seconds: write_lock(tmp_path))
    with pytest.raises(UserError, match="in use by"):
        lock.take(tmp_path)


def test_what_the_disk_refuses_leaves_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *args: fill_disk())
    with pytest.raises(OSError, match="No space left"):
        lock.take(tmp_path)
    monkeypatch.setattr(os, "link", refuse_link)
    monkeypatch.setattr(
        "builtins.open", lambda *args: FullFile(*args) if args[1] == "x" else open_file(*args)
    )
    with pytest.raises(OSError, match="No space left"):
        lock.take(tmp_path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def fill_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


class FullFile(io.FileIO):
    write = fill_disk


open_file = open


# ---- the race


def take_at_once(folder, count, begin):
    """Of each of `count` runs, at the same time as the others. What each of these attempts said."""
    said = []
    for number in range(count):
        time.sleep(max(0, begin + number * 0.05 - time.time()))
        try:
            lock.take(folder / str(number))
            said.append("took")
        except UserError as error:
            said.append(str(error))
    return said


def test_of_many_takers_one_has_it(on_ranks, tmp_path):
    """Of a run without a lock, and of one whose holder is gone."""
    ranks, count = 4, 40
    for number in range(count // 2):
        write_lock(tmp_path / str(number), pid=get_dead_pid())
    attempts = on_ranks(ranks, take_at_once, tmp_path, count, time.time() + 1)
    for number, said in enumerate(zip(*attempts)):
        assert said.count("took") == 1, said
        assert all("in use by process" in text for text in said if text != "took")
        assert [path.name for path in (tmp_path / str(number)).iterdir()] == ["lock"]


def test_a_slow_taker_does_not_replace_a_new_holder(tmp_path, monkeypatch):
    """It has seen that the holder is gone, and comes to act after another one has."""
    write_lock(tmp_path, pid=get_dead_pid())
    check_gone, others = lock.check_gone, []

    def check_slowly(*args):
        check_gone(*args)
        monkeypatch.setattr(lock, "check_gone", check_gone)
        others.append(lock.take(tmp_path))

    monkeypatch.setattr(lock, "check_gone", check_slowly)
    with pytest.raises(UserError, match="in use by"):
        lock.take(tmp_path)
    assert json.loads((tmp_path / "lock").read_text())["id"] == others[0].id


# ---- temporaries


def test_what_nobody_holds_is_a_leftover(tmp_path):
    here = tmp_path / f"a.{socket.gethostname()}.0.tmp"
    fresh, old = tmp_path / "a.node2.1.tmp", tmp_path / "a.node2.2.tmp"
    for path in (here, fresh, old, tmp_path / "b.tmp"):
        path.touch()
    os.utime(old, (0, time.time() - 25 * 3600))
    with temporary(tmp_path / "a") as held:
        assert remove_leftovers(tmp_path, "a.*.tmp") == sorted([here, old])
        assert held.exists() and fresh.exists()
    assert not held.exists()


def test_a_leftovers_hunter_that_comes_before_the_lock_gets_a_file_of_its_own(tmp_path, monkeypatch):
    """Between the making of a temporary and its flock another process takes it for a leftover."""
    flock, removed = fcntl.flock, []

    def flock_late(*args):
        monkeypatch.setattr(fcntl, "flock", flock)
        removed.extend(remove_leftovers(tmp_path, "a.*.tmp"))
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    with temporary(tmp_path / "a") as held:
        assert len(removed) == 1 and held.exists() and held not in removed
        assert not remove_leftovers(tmp_path, "a.*.tmp")


def test_a_lock_is_read_by_people(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    mine = lock.take(tmp_path)
    held = json.loads((tmp_path / "lock").read_text())
    assert (held["pid"], held["job"], held["restarts"]) == (os.getpid(), "12", "3")
    assert held["id"] == dataclasses.asdict(mine)["id"]
    mine.close()
