"""Reading the logs of a job's processes: who failed, and why. No torch: the batch script and submit.py do
this.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

START = re.compile(r"^rank (\d+) of \d+ on (.+): start \d+$", re.MULTILINE)  # launch/job.py's first line
ERROR = re.compile(r"^(?:rank \d+: )?error: (.*)$", re.MULTILINE)
SRUN_ERROR = re.compile(r"srun: error: \S+: tasks? \d.*$", re.MULTILINE)


def get_job_id(env: Mapping[str, str]) -> str:
    """As submitit names it. Of an array never the plain number: one of the tasks has the array's own, which
    means all of them.
    """
    task = env.get("SLURM_ARRAY_TASK_ID")
    return f"{env['SLURM_ARRAY_JOB_ID']}_{task}" if task else env["SLURM_JOB_ID"]


def get_failures(folder: Path, job: str) -> list[str]:
    """One line for each process of the job that failed, with its node, from the processes' logs since the
    last start: those that say why; srun's word on the first to die, if that was a signal or nobody said
    anything; those that only lost another process.
    """
    errors, killed, lost = [], [], []
    paths = folder.glob(f"{job}_*_log.out")
    for path in sorted(paths, key=get_number):
        text = path.read_text(errors="replace").replace("\r", "\n")
        world_rank, host = str(get_number(path)), "a node that is not known"
        starts = list(START.finditer(text))
        if starts:
            world_rank, host = starts[-1].groups()
            text = text[starts[-1].end() :]
        killed += SRUN_ERROR.findall(text)[:1]  # the rest was killed by srun then
        for error in ERROR.findall(text):
            line = f"rank {world_rank} on {host}: {error}"
            if "did not join" in error:
                lost.append(line)
            else:
                errors.append(line)
    if errors:
        killed = [line for line in killed if "Exited with exit code" not in line]
    return [*errors, *killed, *lost]


def get_number(log: Path) -> int:
    """3 of 1234_3_log.out, a process's log."""
    return int(log.name.split("_")[-2])


def print_failures(folder: str) -> None:
    """For the batch script, after srun."""
    for line in get_failures(Path(folder), get_job_id(os.environ)):
        print(f"failed: {line}")
