"""launch/job.py and launch/logs.py: a process's environment, its end, and what the logs of a job say."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from errors import UserError
from launch import job, logs

REPO = Path(__file__).resolve().parent.parent

# ---- a rank's environment

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_NODELIST": "nid[003-004]",
    "SLURM_JOB_NODELIST": "nid[001-004]",
    "SLURM_CPUS_PER_TASK": "8",
}
MPI = {
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
    "PMI_LOCAL_RANK": "1",
    "PMI_LOCAL_SIZE": "4",
    "PBS_JOBID": "123.polaris-pbs-01",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}


@pytest.mark.parametrize(
    "env, address, port",
    [
        (SRUN, "nid003", "20123"),
        (
            SRUN | {"SLURM_RESTART_COUNT": "2"},
            "nid003",
            "22141",
        ),  # neither the start before, whose store may still be there, nor job 125
        (SRUN | {"SLURM_JOB_ID": "50273134"}, "nid003", str(20_000 + 50273134 % 12_000)),
        (SRUN | {"SLURM_STEP_NODELIST": "a-1,b[2-3]"}, "a-1", "20123"),
        (SRUN | {"SLURM_STEP_NODELIST": "c[07,09-12]-gpu,d1"}, "c07-gpu", "20123"),
        (SRUN | {"SLURM_STEP_NODELIST": "127.0.0.[11-12]"}, "127.0.0.11", "20123"),
        (
            SRUN | {"PMI_RANK": "0", "PMI_SIZE": "1", "PMI_LOCAL_RANK": "0", "PMI_LOCAL_SIZE": "1"},
            "nid003",
            "20123",
        ),
        (SRUN | {"MASTER_ADDR": "mine", "MASTER_PORT": "1234"}, "mine", "1234"),
        (MPI | {"MASTER_ADDR": "x3001"}, "x3001", "20123"),
        (MPI | {"PBS_NODEFILE": "nodefile"}, "x3002c0s1b0n0", "20123"),
        (
            OPENMPI | {"MASTER_ADDR": "x"} | {k: v for k, v in SRUN.items() if k != "SLURM_PROCID"},
            "x",
            "20123",
        ),
        (
            {
                "PMI_RANK": "5",
                "PMI_SIZE": "8",
                "MPI_LOCALRANKID": "1",
                "MPI_LOCALNRANKS": "4",
                "MASTER_ADDR": "x",
            },
            "x",
            "29500",
        ),
        (
            {
                "RANK": "5",
                "WORLD_SIZE": "8",
                "LOCAL_RANK": "1",
                "LOCAL_WORLD_SIZE": "4",
                "MASTER_ADDR": "x",
                "MASTER_PORT": "7",
            }
            | SRUN,
            "x",
            "7",
        ),
    ],
)
def test_environment_of_every_launcher(tmp_path, monkeypatch, env, address, port):
    monkeypatch.chdir(tmp_path)
    Path("nodefile").write_text("x3002c0s1b0n0\nx3002c0s1b0n0\nx3003\n")
    found = job.get_environment(env)
    assert {
        k: found[k]
        for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    } == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    assert found["OMP_NUM_THREADS"] == (
        "8" if "SLURM_CPUS_PER_TASK" in env else str(max(1, len(os.sched_getaffinity(0)) // 4))
    )


def test_environment_that_is_no_launchers():
    assert job.get_environment({}) == {}
    assert (
        job.get_environment(
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1", "SLURM_LOCALID": "0"}
        )
        == {}
    )  # a batch script
    one_node = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
    assert job.get_environment(one_node)["MASTER_ADDR"] == "127.0.0.1"
    with pytest.raises(UserError, match="PALS says nothing about the first node: export MASTER_ADDR"):
        job.get_environment(MPI)
    with pytest.raises(UserError, match=r"different numbers of tasks, 2,1: use --ntasks-per-node"):
        job.get_environment(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2,1"})


# ---- a rank's end

SCONTROL = """#!/bin/sh
[ "$1" = show ] && {
    echo "JobId=7 JobState=%(state)s Reason=None Requeue=1 Restarts=%(restarts)d BatchFlag=1"
    exit 0
}
[ %(fails)d = 1 ] && { echo "Requested operation is presently disabled for job 7" >&2; exit 1; }
echo "$@" >> asked
"""


@pytest.mark.parametrize(
    "state, restarts, fails, asked, says",
    [
        ("RUNNING", 0, 0, True, ""),
        ("RUNNING", 2, 0, True, ""),
        ("RUNNING", 3, 0, False, "it was started again 3 times (--max_requeues 3)"),
        ("CANCELLED", 0, 0, False, "has it as CANCELLED"),
        ("COMPLETING", 0, 0, False, "has it as COMPLETING"),
        ("PENDING", 1, 0, False, "as PENDING"),
        ("RUNNING", 0, 1, False, "Requested operation is presently disabled"),
    ],
)
def test_only_a_running_job_is_requeued(tmp_path, monkeypatch, capfd, state, restarts, fails, asked, says):
    monkeypatch.chdir(tmp_path)
    Path("scontrol").write_text(SCONTROL % {"state": state, "restarts": restarts, "fails": fails})
    Path("scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PRELORA_MAX_REQUEUES", "3")
    assert job.requeue([signal.SIGTERM]) == 75
    assert Path("asked").exists() == asked and (not asked or Path("asked").read_text() == "requeue 7\n")
    printed = capfd.readouterr()
    assert says in printed.out + printed.err and ("error" in printed.err) == (
        says.startswith(("it was", "Requested"))
    )


def test_what_submitits_local_executor_starts_again(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert (
        job.requeue([signal.SIGUSR2]) == job.LOCAL_REQUEUE == LOCAL_REQUEUE_RETURN_CODE
        and job.requeue([signal.SIGTERM]) == 75
    )


@pytest.mark.parametrize(
    "run, status", [("job.run([])", 0), ("signal.signal(signal.SIGUSR2, lambda *_: None)", -signal.SIGUSR2)]
)
def test_a_warning_after_the_last_step_does_not_kill_the_process(run, status):
    """While the interpreter ends, when handlers are gone already (the second case)."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"""
import os, signal, sys, types
from launch import job
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR2):
        kill(pid, number)
sys.modules["train"] = types.SimpleNamespace(main=lambda *_: 0)
late = Late()
{run}""",
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr


def test_job_ids_are_submitits():
    assert job.get_job_id({"SLURM_JOB_ID": "12"}) == "12"
    assert (
        job.get_job_id({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"})
        == "12_1"
    )


def test_failures_are_those_since_the_last_start(tmp_path):
    (tmp_path / "9_0_log.out").write_text(
        "rank 0 of 3 on n1: start 0\nerror: an old one\nrank 0 of 3 on n1: start 1\n"
        " 5%|bar\rerror: rank 2 did not join broadcast\n"
        " 6%|barsrun: error: n2: task 2: Killed\n"
        "srun: Terminating StepId=9.0\nsrun: error: n1: task 0: Killed\n"
    )
    (tmp_path / "9_1_log.out").write_text(
        "rank 1 of 3 on n1: start 1\nTraceback\n  raise x\nValueError: x\nrank 1: error: ValueError: x\n"
    )
    (tmp_path / "9_2_log.out").write_text("rank 2 of 3 on n2: start 1\n")
    (tmp_path / "8_0_log.out").write_text(
        "rank 0 of 1 on n1: start 0\nsrun: error: n1: task 0: Exited with exit code 2\n"
    )
    (tmp_path / "99_0_log.out").write_text("rank 0 of 3 on n1: start 0\nerror: another job's\n")
    assert logs.get_failures(tmp_path, "9") == [
        "rank 1 on n1: ValueError: x",
        "srun: error: n2: task 2: Killed",
        "rank 0 on n1: rank 2 did not join broadcast",
    ]
    assert logs.get_failures(tmp_path, "8") == ["srun: error: n1: task 0: Exited with exit code 2"]
