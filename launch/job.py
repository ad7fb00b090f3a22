"""What runs on every rank of a job, whatever started it: environment, signals, checkpoint and requeue. Takes train.py's arguments.

    srun python launch/job.py config/debug.py                           Slurm, in a batch script of your own (submit.py writes one)
    torchrun --nproc_per_node 4 launch/job.py config/debug.py           one node; several with --nnodes and --rdzv_endpoint
    mpiexec -n 8 --ppn 4 python launch/job.py config/debug.py           PBS (PALS, MPICH), Open MPI

A job always goes on from what is on disk (--resume True): an empty run_dir starts fresh. Nothing is imported here before signals are
safe: importing torch takes as long as some notices of preemption.
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

ROOT = Path(__file__).resolve().parent.parent
MAX_REQUEUES = 50
LOCAL_REQUEUE = 144  # the exit status on which submitit's local executor starts a job again

# Who sets which variables: rank, world size, rank on this node, ranks on this node. The first that is complete counts: Open MPI starts
# its processes with srun, and srun may set PMI's.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "PALS": ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "submitit": (
        "SUBMITIT_LOCAL_GLOBALID",
        "SUBMITIT_LOCAL_NTASKS",
        "SUBMITIT_LOCAL_LOCALID",
        "SUBMITIT_LOCAL_NTASKS",
    ),
}


def get_environment(env: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables, from what this process's launcher set; {} for a process that no launcher started.

    Raises ValueError where nodes have different numbers of tasks, and where nothing says which node is the first.
    """
    launcher = next((name for name, names in LAUNCHERS.items() if all(name in env for name in names)), None)
    if launcher is None:
        return {}
    rank, size, local_rank, local_size = (env[name] for name in LAUNCHERS[launcher])
    if launcher == "srun":  # "2(x16)"
        if not re.fullmatch(r"\d+(\(x\d+\))?", local_size):
            raise ValueError(
                f"the nodes have different numbers of tasks, {local_size}: use --ntasks-per-node"
            )
        local_size = local_size.split("(")[0]
    job = env.get("SLURM_JOB_ID") or env.get("PBS_JOBID") or env.get("SUBMITIT_LOCAL_JOB_ID") or "9500"
    number = int(re.search(r"\d+", job)[0]) + 1009 * int(env.get("SLURM_RESTART_COUNT", 0))
    return {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_size,
        "MASTER_ADDR": env.get("MASTER_ADDR") or get_first_host(env, launcher, one_node=size == local_size),
        # Below the ports that systems hand out by themselves (from 32768); another for the next job, which may be on the same node, and
        # for the next start, because the last one's store may still be there.
        "MASTER_PORT": env.get("MASTER_PORT") or str(20_000 + number % 12_000),
        "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS")
        or env.get("SLURM_CPUS_PER_TASK")
        or str(max(1, len(os.sched_getaffinity(0)) // int(local_size))),
    }


def get_first_host(env: Mapping[str, str], launcher: str, one_node: bool) -> str:
    if launcher == "srun":  # "nid[001-004,007],login1" -> nid001; a step may have fewer nodes than its job
        first = re.match(
            r"([^,\[]+)(\[([^,\-\]]+)[^\]]*\])?([^,\[]*)",
            env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"],
        )
        return first[1] + (first[3] or "") + first[4]
    if one_node:
        return "127.0.0.1"
    if "PBS_NODEFILE" in env and Path(env["PBS_NODEFILE"]).exists():
        return Path(env["PBS_NODEFILE"]).read_text().split()[0]
    raise ValueError(
        f"{launcher} says nothing about the first node: export MASTER_ADDR=$(head -n 1 $PBS_NODEFILE) before mpiexec"
    )


def run(argv: list[str]) -> int:
    """train.py's main as this rank of the job: the exit status of the process (see there). A run that was told to stop has saved by
    then on every rank; rank 0 requeues the job, and the others leave with 0, because srun ends a job on the first other status."""
    signals = []  # what comes before train.py can heed it, and what comes then
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: signals.append(number))
    signal.signal(
        signal.SIGCONT, signal.SIG_IGN
    )  # comes with every SIGTERM of Slurm's; submitit's handler logs, which is not reentrant
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    scheduled = "SLURM_JOB_ID" in os.environ or "SUBMITIT_LOCAL_JOB_ID" in os.environ
    try:
        os.environ.update(get_environment(os.environ))
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    rank = int(os.environ.get("RANK", 0))
    print(
        f"rank {rank} of {os.environ.get('WORLD_SIZE', 1)} on {host}: start {os.environ.get('SLURM_RESTART_COUNT', 0)}",
        flush=True,
    )
    try:
        import train

        status = train.main([*argv, "--resume", "True"], signals)
        if status == os.EX_TEMPFAIL and scheduled:
            status = requeue(signals) if rank == 0 else 0
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)  # nothing to tell submitit: the job isn't over
    except Exception as e:
        traceback.print_exc()
        print(f"error: {type(e).__name__}: {e}", file=sys.stderr)
        return 1
    for number in (
        signal.SIGUSR1,
        signal.SIGUSR2,
    ):  # the run is over: a warning says nothing any more, but the interpreter's end takes
        signal.signal(
            number, signal.SIG_IGN
        )  # handlers away, and one that came then would kill this process: a failed job
    return status


def requeue(signals: list[int]) -> int:
    """Ask Slurm to start this job again, up to PRELORA_MAX_REQUEUES times; every start counts, those after a node's failure too.
    Returns the exit status, should the process live to use it. Only a running job: one that is being cancelled stays so, one that
    Slurm is requeueing by itself needs nothing. submitit's local executor starts a job again too, 5 times, but not after a SIGTERM."""
    if "SLURM_JOB_ID" not in os.environ:
        return os.EX_TEMPFAIL if signal.SIGTERM in signals else LOCAL_REQUEUE
    job, limit = get_job_id(os.environ), int(os.environ.get("PRELORA_MAX_REQUEUES", MAX_REQUEUES))
    shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True)
    state, restarts = re.search(r"JobState=(\w+)", shown.stdout), re.search(r"Restarts=(\d+)", shown.stdout)
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


def get_job_id(env: Mapping[str, str]) -> str:
    """As submitit names it. Of an array never the plain number: one of the tasks has the array's own, which means all of them."""
    task = env.get("SLURM_ARRAY_TASK_ID")
    return f"{env['SLURM_ARRAY_JOB_ID']}_{task}" if task else env["SLURM_JOB_ID"]


class Job:
    """What submitit starts on every rank. Ends the process itself where the run did not end well."""

    def __init__(self, argv: list[str]):
        self.argv = argv

    def __call__(self) -> None:
        if status := run(self.argv):
            leave(status)


def leave(status: int) -> None:
    """End the process; at once after a failure on several ranks, because a communicator waits for ranks that never come."""
    if status and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


# ---------------------------------------------------------------------------------------------------------------------------------
# what went wrong


def get_failures(folder: Path, job: str) -> list[str]:
    """One line for each rank of the job that failed, with its node, from the ranks' logs since the last start: those that say why;
    srun's word on the first to die, if that was a signal or nobody said anything; those that only lost another rank."""
    errors, killed, lost = [], [], []
    for path in sorted(folder.glob(f"{job}_*_log.out"), key=lambda path: int(path.name.split("_")[-2])):
        text = path.read_text(errors="replace").replace("\r", "\n")
        starts = list(re.finditer(r"^rank (\d+) of \d+ on (.+): start \d+$", text, re.MULTILINE))
        rank, host = starts[-1].groups() if starts else (path.name.split("_")[-2], "a node that is not known")
        text = text[starts[-1].end() :] if starts else text
        killed += re.findall(r"srun: error: \S+: tasks? \d.*$", text, re.MULTILINE)[
            :1
        ]  # the rest was killed by srun then
        for error in re.findall(r"^(?:rank \d+: )?error: (.*)$", text, re.MULTILINE):
            (lost if "did not join" in error else errors).append(f"rank {rank} on {host}: {error}")
    return [*errors, *(line for line in killed if "Exited with exit code" not in line or not errors), *lost]


def print_failures(folder: str) -> None:
    """For the batch script, after srun."""
    for line in get_failures(Path(folder), get_job_id(os.environ)):
        print(f"failed: {line}")


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # where train.py is, in place of launch/
    leave(run(sys.argv[1:]))
