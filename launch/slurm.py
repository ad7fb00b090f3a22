"""Jobs, by submitit: what Slurm is told and asked, how they are submitted, and what becomes of them.

`launch`, `run` and `site` are launch/submit.py's Launch, Run and SITE.
"""

import contextlib
import getpass
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import SlurmExecutor

from errors import UserError
from launch.job import Job
from launch.logs import get_failures
from launch.snapshot import take_snapshot
from monitor.log import load_run, phase_table

# of a job that goes on
ACTIVE = {
    "PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "SIGNALING", "STAGE_OUT",
    "RESIZING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT",
}  # fmt: skip

# sbatch's options that are not SITE's extra's to set, and what does.
DECIDED = {
    "nodes": "--nodes", "ntasks": "--tasks_per_node", "ntasks_per_node": "--tasks_per_node",
    "cpus_per_task": "--cpus_per_task", "time": "--hours", "partition": "--partition",
    "account": "--account", "qos": "--qos", "constraint": "--constraint", "exclude": "--exclude",
    "signal": 'SITE["signal_seconds"]', "array": "the number of presets", "output": "--folder",
    "error": "--folder", "open_mode": "--folder", "comment": "--run_dir",
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------
# the batch script


def build_executor(launch, runs: list, folder: Path, site: Mapping) -> submitit.AutoExecutor:
    """submitit's executor with everything this launch says; `folder` gets its logs and holds the snapshot,
    `code`.
    """
    if launch.cluster == "slurm":  # whether there is a Slurm was asked before; a dry run needs none
        SlurmExecutor.affinity = classmethod(lambda cls: 2)
    executor = submitit.AutoExecutor(
        folder, cluster=launch.cluster, slurm_max_num_timeout=launch.max_requeues
    )
    minutes = math.ceil(launch.hours * 60)
    options = {}
    if launch.cluster == "slurm":
        options = get_options(launch, site["extra"])
    executor.update_parameters(
        name=Path(runs[0].cfg.run_dir).name if len(runs) == 1 else "prelora",
        nodes=launch.nodes,
        tasks_per_node=launch.processes_per_node,
        cpus_per_task=launch.cpus_per_task,
        timeout_min=minutes,
        stderr_to_stdout=True,
        slurm_partition=launch.partition,
        slurm_account=launch.account,
        slurm_qos=launch.qos,
        slurm_constraint=launch.constraint,
        slurm_exclude=launch.exclude,
        slurm_signal_delay_s=min(site["signal_seconds"], minutes * 15),
        slurm_comment=get_comment(runs),
        slurm_additional_parameters=options,
        slurm_srun_args=get_srun_args(launch.cpus_per_task),
        slurm_setup=get_setup(launch, folder, site),
        slurm_teardown=get_teardown(folder),
    )
    parameters = executor._executor.parameters
    if launch.cluster == "slurm" and "wckey" not in options:
        parameters["wckey"] = None  # or submitit has one of its own
    if launch.cluster == "local":
        parameters |= get_local_gpus(launch)
    return executor


def get_options(launch, extra: Mapping) -> dict:
    """sbatch's options that SITE's extra may change, without those that it drops (with None or False). Named
    with _ for -, as submitit names them. Raises UserError for one that a flag decides, and for fewer GPUs
    than --gpus_per_node.
    """
    options = {"requeue": True, "wckey": "submitit", "gpus_per_node": launch.gpus_per_node or None}
    for name, value in extra.items():
        name = name.lstrip("-").replace("-", "_")
        if name in DECIDED:
            raise UserError(f"SITE's extra can't have {name}: {DECIDED[name]} decides it")
        if isinstance(value, str):
            value = value.replace("{gpus_per_node}", str(launch.gpus_per_node))
        if name in ("gres", "gpus_per_node") and isinstance(value, str | int):
            value = get_gres(launch, name, str(value))
        elif "gpu" in name and not launch.gpus_per_node:
            value = None
        options[name] = value
    return {name: value for name, value in options.items() if value is not None and value is not False}


def get_gres(launch, name: str, value: str) -> str | None:
    """The value of --gres or --gpus-per-node for this launch: without GPUs if it has none, None if nothing is
    left then. Raises UserError for fewer of them than --gpus_per_node.
    """
    others, gpus, count = [], [], 0
    for item in value.split(","):  # gpu, gpu:4, gpu:a100:4, lscratch:100
        words = item.split(":")
        if name == "gres" and words[0] != "gpu":
            others.append(item)
            continue
        gpus.append(item)
        count += int(words[-1]) if words[-1].isdecimal() else 1
    if not launch.gpus_per_node:
        return ",".join(others) or None
    if gpus and count < launch.gpus_per_node:
        raise UserError(
            f"SITE's extra has {name} {value}, {count} GPUs a node, but --gpus_per_node is "
            f"{launch.gpus_per_node}: let them agree"
        )
    return value


def get_local_gpus(launch) -> dict:
    """submitit's local executor's parameters of the GPUs that the job sees: those of CUDA_VISIBLE_DEVICES,
    where that is set. It would take the machine's first ones by itself.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = {"gpus_per_node": launch.gpus_per_node}
    if visible is not None:
        gpus["visible_gpus"] = visible.split(",")
    return gpus


def get_srun_args(cpus_per_task: int) -> list[str]:
    """One process that fails ends all. sh: a signal that comes before Python has a handler must not kill the
    process.
    """
    shell = ["sh", "-c", 'trap "" USR1 USR2; exec "$@"', "sh"]
    return ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus_per_task}", *shell]


def get_setup(launch, folder: Path, site: Mapping) -> list[str]:
    """The script's lines before srun."""
    environment = site["environment"] | launch.variables | {"PRELORA_MAX_REQUEUES": launch.max_requeues}
    return [
        *(f"module load {module}" for module in site["modules"]),
        *(f"export {name}={shlex.quote(str(value))}" for name, value in environment.items()),
        f"cd {shlex.quote(str(folder / 'code'))}",
        'export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"',
    ]


def get_teardown(folder: Path) -> list[str]:
    """The script's lines after srun: who failed, and srun's status."""
    program = "import sys; from launch.logs import print_failures; print_failures(sys.argv[1])"
    report = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} {shlex.quote(str(folder))}"
    return ["status=$?", f"[ $status = 0 ] || {report}", "exit $status"]


def get_script(executor: submitit.AutoExecutor, count: int) -> str:
    """The batch script that submitit will write for so many runs."""
    slurm = executor._executor
    parameters = slurm.parameters
    if count > 1:
        slurm.parameters = parameters | {"map_count": count}
    text = slurm._make_submission_file_text(slurm._submitit_command_str, "")
    slurm.parameters = parameters
    return text


# ----------------------------------------------------------------------------------------------------
# asking Slurm


def ask(*command: str, text: str | None = None) -> subprocess.CompletedProcess:
    """Run one of Slurm's commands. Raises UserError where it can't be run."""
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"can't run {command[0]}: {error.strerror}") from None


def check_with_slurm(launch, runs: list, script: str) -> str:
    """What sbatch --test-only answers: when and where the job would start. Raises UserError with the reason
    why it never would, and where another job of this user's is waiting or running on the same run.
    """
    check_queue(runs)
    asked = ask("sbatch", "--test-only", text=script)
    answer = (asked.stderr.strip().splitlines() or ["no answer"])[-1].split("sbatch: ")[-1]
    if asked.returncode:
        raise UserError(get_refusal(launch, answer))
    return answer


def get_comment(runs: list) -> str:
    """A job's comment, which names its runs: their real paths as in a URL, because a name may have any
    character, and sbatch and squeue have their own ideas of most."""
    paths = [os.fsencode(os.path.realpath(run.cfg.run_dir)) for run in runs]
    return ":".join(map(urllib.parse.quote, paths))


def check_queue(runs: list) -> None:
    """Raise UserError for a run that is in the queue already: a job's comment names its runs."""
    queue = ask("squeue", "-h", "-u", getpass.getuser(), "-o", "%i|%k").stdout.splitlines()
    for line in queue:
        job, comment = line.split("|", 1)
        for run in runs:
            if get_comment([run]) in comment.split(":"):
                raise UserError(
                    f"job {job} is already waiting or running on {run.cfg.run_dir}: scancel {job}, "
                    "or choose another --run_dir"
                )


def get_refusal(launch, answer: str) -> str:
    """Why sbatch said no, in a sentence: from the partitions there are, else in its own words."""
    shown = ask("sinfo", "-h", "-o", "%P %D").stdout.splitlines()
    sizes, default = {}, None  # nodes of each partition
    for line in shown:
        name, size = line.split()
        if name.endswith("*"):
            name = default = name.rstrip("*")
        sizes[name] = int(size)
    asked = launch.partition or default
    if asked in sizes and launch.nodes > sizes[asked]:
        return f"partition {asked} has {sizes[asked]} nodes, not {launch.nodes}"
    known = f" (partitions: {', '.join(sizes)})" if sizes else ""
    return f"Slurm refuses the job: {answer.split(': ')[-1]}{known}"


# ----------------------------------------------------------------------------------------------------
# the submission


@contextlib.contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Without the variables of a job that this may be called from; those that a user or a site sets for
    sbatch stay.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or name.startswith("SBATCH_")
    }
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield


def submit_runs(launch, runs: list, folder: Path, site: Mapping) -> list[submitit.Job]:
    """Make `folder` with the snapshot and submit. Raises UserError for what the machine or Slurm refuses.
    Leaves nothing behind then.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    code, is_handed_over = folder / "code", False
    try:
        print(f"code: {take_snapshot(code)} files in {code}")
        executor = build_executor(launch, runs, folder, site)
        jobs = [Job(run.get_argv(code)) for run in runs]
        environment = contextlib.nullcontext()
        if launch.cluster == "local":
            environment = in_snapshot(code, site)
        with environment:
            is_handed_over = True
            return hand_over(executor, jobs)
    except BaseException as error:
        if is_handed_over and not isinstance(error, Exception):
            raise  # at Ctrl-C Slurm may have taken them already, and they need their code
        shutil.rmtree(folder, ignore_errors=True)
        for path in created[1:]:
            with contextlib.suppress(OSError):  # somebody else has put something there
                path.rmdir()
        raise


@contextlib.contextmanager
def in_snapshot(code: Path, site: Mapping) -> Iterator[None]:
    """What the batch script does before srun. submitit's local executor would do it in a shell, which would
    stand between us and the job and not pass signals on.
    """
    search_path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
    variables = {name: str(value) for name, value in site["environment"].items()}
    with contextlib.chdir(code), submitit.helpers.environment_variables(PYTHONPATH=search_path, **variables):
        yield


def hand_over(executor: submitit.AutoExecutor, jobs: list[Job]) -> list[submitit.Job]:
    try:
        return executor.submit_array(jobs)  # one job is no array
    except (FailedJobError, OSError) as error:  # sbatch's refusal; a full disk
        raise UserError(" ".join(str(error).split())) from None


# ----------------------------------------------------------------------------------------------------
# after the submission


def follow(jobs: list[submitit.Job], runs: list, folder: Path) -> int:
    """Wait for the jobs, say what changes and how each ended. Returns 0 if all did well, else 1."""
    states: dict[str, str] = {}
    while not states or set(states.values()) & ACTIVE:
        time.sleep(2)
        for job, state in get_states(jobs).items():
            if states.get(job) != state:
                print(f"{time.strftime('%F %T')} job {job}: {state}", flush=True)
                states[job] = state
    for job, run in zip(jobs, runs):
        report(job, run, folder, states[job.job_id])
    return int(set(states.values()) != {"COMPLETED"})


def report(job: submitit.Job, run, folder: Path, state: str) -> None:
    """Print how a job ended: who failed, and what the run came to."""
    run_dir = run.cfg.run_dir
    print(f"\njob {job.job_id}, {run_dir}: {state}")
    if state != "COMPLETED":
        for line in get_failures(folder, job.job_id):
            print(f"failed: {line}")
        print(f"logs: {folder}/{job.job_id}_*_log.out, {run_dir}/logs")
    with contextlib.suppress(UserError):  # it has not come so far
        print(phase_table(load_run(run_dir).epochs))


def get_states(jobs: list[submitit.Job]) -> dict[str, str]:
    """Each job's state in Slurm's words; UNKNOWN if it has been forgotten. {} while Slurm does not answer."""
    if isinstance(jobs[0], submitit.LocalJob):
        return {job.job_id: get_local_state(job) for job in jobs}
    numbers = ",".join(dict.fromkeys(job.job_id.split("_")[0] for job in jobs))
    shown = ask("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T", "-j", numbers)
    if shown.returncode and "Invalid job id" not in shown.stderr:
        return {}
    states = dict(line.split("|") for line in shown.stdout.split())
    return {job.job_id: states.get(job.job_id, "UNKNOWN") for job in jobs}


def get_local_state(job: submitit.LocalJob) -> str:
    """COMPLETED where every process has left a result."""
    has_ended_well = all(task.paths.result_pickle.exists() for task in job._sub_jobs or [job])
    if not job.done():
        return "RUNNING"
    return "COMPLETED" if has_ended_well else "FAILED"
