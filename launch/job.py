"""What runs as every process of a job, whatever started it: environment, signals, checkpoint and requeue.
Takes train.py's arguments.

    srun python launch/job.py config/debug.py                    Slurm, in a batch script of your own
    torchrun --nproc_per_node 4 launch/job.py config/debug.py    one node; several with --rdzv_endpoint
    mpiexec -n 8 --ppn 4 python launch/job.py config/debug.py    PBS (PALS, MPICH), Open MPI

A job always goes on from what is on disk (--resume True): with a preset, an empty run_dir starts fresh.
Nothing large is imported here before signals are safe: importing torch takes as long as some notices of
preemption.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: train.py is one up

from errors import UserError
from launch.logs import get_job_id

MAX_REQUEUES = 50
LOCAL_REQUEUE = 144  # the exit status on which submitit's local executor starts a job again

# Who sets which variables: world rank, world size, rank on this node, processes on this node. The first
# launcher whose variables are complete counts: Open MPI starts its processes with srun, and srun may set
# PMI's.
# fmt: off
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
                 "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "PALS": ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "submitit": ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS",
                 "SUBMITIT_LOCAL_LOCALID", "SUBMITIT_LOCAL_NTASKS"),
}
# fmt: on
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # of a time limit or a preemption to come

# ----------------------------------------------------------------------------------------------------
# the environment


def get_environment(env: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables, from what this process's launcher set; {} for a process that no launcher started.

    Raises UserError where nodes have different numbers of tasks, and where nothing says which node is the
    first.
    """
    launcher = get_launcher(env)
    if launcher is None:
        return {}
    world_rank, world_size, local_rank, local_size = (env[name] for name in LAUNCHERS[launcher])
    if launcher == "srun":  # "2(x16)"
        if not re.fullmatch(r"\d+(\(x\d+\))?", local_size):
            raise UserError(f"the nodes have different numbers of tasks, {local_size}: use --ntasks-per-node")
        local_size = local_size.split("(")[0]
    cores = max(1, len(os.sched_getaffinity(0)) // int(local_size))
    return {
        "RANK": world_rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_size,
        "MASTER_ADDR": env.get("MASTER_ADDR") or get_first_host(env, launcher, world_size == local_size),
        "MASTER_PORT": env.get("MASTER_PORT") or str(get_port(env)),
        "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS") or env.get("SLURM_CPUS_PER_TASK") or str(cores),
    }


def get_launcher(env: Mapping[str, str]) -> str | None:
    for launcher, names in LAUNCHERS.items():
        if all(name in env for name in names):
            return launcher
    return None


def get_port(env: Mapping[str, str]) -> int:
    """Below the ports that systems hand out by themselves (from 32768). Another one for the next job, which
    may be on the same node, and for the next start, because the last one's store may still be there.
    """
    job = env.get("SLURM_JOB_ID") or env.get("PBS_JOBID") or env.get("SUBMITIT_LOCAL_JOB_ID") or "9500"
    number = int(re.search(r"\d+", job)[0]) + 1009 * int(env.get("SLURM_RESTART_COUNT", 0))
    return 20_000 + number % 12_000


def get_first_host(env: Mapping[str, str], launcher: str, one_node: bool) -> str:
    """The node of process 0. Raises UserError where nothing says it."""
    if launcher == "srun":
        return get_first_name(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"])
    if one_node:
        return "127.0.0.1"
    if "PBS_NODEFILE" in env and Path(env["PBS_NODEFILE"]).exists():
        return Path(env["PBS_NODEFILE"]).read_text().split()[0]
    raise UserError(
        f"{launcher} says nothing about the first node: "
        "export MASTER_ADDR=$(head -n 1 $PBS_NODEFILE) before mpiexec"
    )


def get_first_name(nodes: str) -> str:
    """nid001 of Slurm's "nid[001-004,007],login1". Of a step's nodes: a step may have fewer than its job."""
    pattern = r"(?P<prefix>[^,\[]+)(\[(?P<number>[^,\-\]]+)[^\]]*\])?(?P<suffix>[^,\[]*)"
    first = re.match(pattern, nodes)
    return first["prefix"] + (first["number"] or "") + first["suffix"]


# ----------------------------------------------------------------------------------------------------
# the run


def run(argv: list[str]) -> int:
    """train.py's main as this process of the job: the process's exit status (see there). A run that was told
    to stop has saved by then on every process; process 0 requeues the job, and the others leave with 0,
    because srun ends a job on the first other status.
    """
    signals = []  # what comes before train.py can heed it, and what comes then
    for number in WARNINGS:
        signal.signal(number, lambda number, frame: signals.append(number))
    # SIGCONT comes with every SIGTERM of Slurm's; submitit's handler logs, which is not reentrant.
    signal.signal(signal.SIGCONT, signal.SIG_IGN)
    try:
        os.environ.update(get_environment(os.environ))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    world_rank, world_size = int(os.environ.get("RANK", 0)), os.environ.get("WORLD_SIZE", 1)
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    start = os.environ.get("SLURM_RESTART_COUNT", 0)
    print(f"rank {world_rank} of {world_size} on {host}: start {start}", flush=True)
    try:
        import train

        status = train.main([*argv, "--resume", "True"], signals)
        if status == os.EX_TEMPFAIL and is_scheduled():
            status = requeue(signals) if world_rank == 0 else 0
            end_at_once(status)  # nothing to tell submitit: the job isn't over
    except Exception as error:  # a bug
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    # The run is over and a warning says nothing any more. But the interpreter's end takes handlers away, and
    # a warning that came then would kill this process: a failed job.
    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN)
    return status


def is_scheduled() -> bool:
    return "SLURM_JOB_ID" in os.environ or "SUBMITIT_LOCAL_JOB_ID" in os.environ


def end_at_once(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def requeue(signals: list[int]) -> int:
    """Ask Slurm to start this job again, up to PRELORA_MAX_REQUEUES times; every start counts, those after a
    node's failure too.

    Returns the exit status, should the process live to use it. Only a running job: one that is being
    cancelled stays so, one that Slurm is requeueing by itself needs nothing. submitit's local executor starts
    a job again too, 5 times, but not after a SIGTERM.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return os.EX_TEMPFAIL if signal.SIGTERM in signals else LOCAL_REQUEUE
    job = get_job_id(os.environ)
    limit = int(os.environ.get("PRELORA_MAX_REQUEUES", MAX_REQUEUES))
    shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True)
    state = re.search(r"JobState=(\w+)", shown.stdout)
    restarts = re.search(r"Restarts=(\d+)", shown.stdout)
    if not state or not restarts:
        reason = shown.stderr.strip() or "scontrol does not know it"
    elif state[1] != "RUNNING":
        print(f"job {job} is saved; not requeued from here, Slurm has it as {state[1]}", flush=True)
        return os.EX_TEMPFAIL
    elif int(restarts[1]) >= limit:
        reason = f"it was started again {restarts[1]} times (--max_requeues {limit})"
    else:
        print(f"requeueing job {job}, start {int(restarts[1]) + 1}", flush=True)
        asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        if not asked.returncode:
            return os.EX_TEMPFAIL
        reason = asked.stderr.strip()
    print(f"error: job {job} is saved but not requeued: {reason}", file=sys.stderr, flush=True)
    return os.EX_TEMPFAIL


class Job:
    """What submitit starts as every process. Ends the process itself where the run did not end well."""

    def __init__(self, argv: list[str]):
        self.argv = argv

    def __call__(self) -> None:
        status = run(self.argv)
        if status:
            leave(status)


def leave(status: int) -> None:
    """End the process; at once after a failure on several, because a communicator waits for processes that
    never come.
    """
    if status and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        end_at_once(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(run(sys.argv[1:]))
