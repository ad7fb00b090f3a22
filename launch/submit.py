"""Submit train.py to Slurm: a job that goes on by itself after preemption, a node's failure and its time limit.

python launch/submit.py --nodes 16                                             the paper's run, 16 nodes × 4 GPUs
python launch/submit.py --nodes 2 config/smoke.py                              before that: two nodes, no data, 36 steps
python launch/submit.py --nodes 16 config/vit_l16_in1k.py --tau 1 --zeta 5     presets and flags as train.py takes them
python launch/submit.py --nodes 4 config/a.py config/b.py config/c.py          an array, one job for each preset
python launch/submit.py --nodes 16 --dry_run                                   only print the batch script and the configuration
python launch/submit.py --cluster local --gpus_per_node 2 config/debug.py      here, without Slurm
"""

import contextlib
import dataclasses
import getpass
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = (
    str(ROOT) if Path(sys.path[0]).resolve() == ROOT / "launch" else sys.path[0]
)  # run as a script: train.py is one up

import submitit
from submitit.slurm.slurm import SlurmExecutor

from data.beton import check_beton, find_beton, read_classes
from data.datasets import DATASETS
from data.images import open_dataset
from data.order import check_classes, get_indices
from launch.job import MAX_REQUEUES, Job, get_failures
from model import checkpoint
from model.variants import VARIANTS
from monitor.log import load_run, phase_table
import train

PAPER = "config/vit_l16_in1k.py"
PATHS = (
    "run_dir",
    "data_dir",
    "stage_dir",
    "baseline",
    "fork",
)  # fields of Config; init_from, which may name a model, is absolute already

# This site. Meant to be edited; flags go before it.
SITE = {
    "partition": None,  # "gpu"
    "account": None,
    "qos": None,
    "constraint": None,  # "a100"
    "gpus_per_node": 4,
    "cpus_per_task": 8,  # cores of a node / its GPUs: loader threads, and OpenMP's
    "hours": 24,
    "gpu_memory_gib": 40,  # of one GPU: larger batches are accumulated from micro-batches that fit
    "signal_seconds": 300,  # before the time limit, to end an evaluation, take a step and save
    "modules": [],  # ["cuda/12.6"]: `module load` in the batch script
    "environment": {},  # {"NCCL_SOCKET_IFNAME": "hsn0"}: of every rank
    "extra": {},  # other options of sbatch: {"exclusive": True, "mail-type": "FAIL"}
}


@dataclass
class Launch:
    nodes: int = 1
    gpus_per_node: int = SITE["gpus_per_node"]  # one rank each
    cpus_per_task: int = SITE["cpus_per_task"]
    hours: float = SITE["hours"]  # time limit of each start
    partition: str | None = SITE["partition"]
    account: str | None = SITE["account"]
    qos: str | None = SITE["qos"]
    constraint: str | None = SITE["constraint"]
    exclude: str | None = None  # nodes to avoid: nid[012-014]
    folder: str = "runs/jobs"  # logs and the snapshot of the code, a directory per submission; must be seen by all nodes
    max_requeues: int = MAX_REQUEUES  # starts after the first
    cluster: Literal["slurm", "local", "debug"] = (
        "slurm"  # local: processes on this machine; debug: in this process, with pdb
    )
    dry_run: bool = False  # print the batch script and the resolved configuration, submit nothing
    wait: bool = False  # until the jobs end; then print what came out, or which rank failed; exit status 0 if all went well

    @property
    def ranks(self) -> int:
        return 1 if self.cluster == "debug" else self.nodes * self.gpus_per_node


@dataclass
class Run:
    """One job: a preset with its flags, resolved."""

    preset: Path | None
    flags: list[str]
    cfg: train.Config

    def get_argv(self, snapshot: Path | None) -> list[str]:
        """train.py's arguments in the job: paths absolute, because it runs in the snapshot; the preset as it is there."""
        preset = (
            [str(get_preset_in(snapshot, self.preset) if snapshot else self.preset)] if self.preset else []
        )
        flags = ["--grad_accum_steps", str(self.cfg.grad_accum_steps)]
        for name in (*PATHS, "init_from"):
            if getattr(self.cfg, name) is not None:
                flags += [f"--{name}", getattr(self.cfg, name)]
        return [*preset, *self.flags, *flags]


# ---------------------------------------------------------------------------------------------------------------------------------
# the command line


def split_argv(argv: list[str]) -> tuple[list[str], list[str], list[str]]:
    """(flags of Launch, presets, flags for train.py). A bare --dry_run means --dry_run True."""
    fields, of_train = [{f.name: f.type for f in dataclasses.fields(kind)} for kind in (Launch, train.Config)]
    launch, presets, config, current = [], [], [], None
    for i, word in enumerate(argv):
        name = word.split("=")[0].lstrip("-").replace("-", "_")
        if word.startswith("--"):
            if name not in fields and name not in of_train and word != "--help":
                raise ValueError(f"unknown flag {word}{train.suggest(name, train.Config, Launch)}")
            current, fresh = (launch if name in fields or word == "--help" else config), "=" not in word
            current.append(word)
            if fields.get(name) is bool and fresh and argv[i + 1 : i + 2] not in (["True"], ["False"]):
                current.append("True")
                fresh = False
        elif current is not None and fresh:  # a flag's first value; train.py's may have several
            current.append(word)
            fresh = False
        elif word.endswith(".py"):
            presets.append(word)
        elif current is config and current and not word.startswith("-"):
            current.append(word)
        else:
            raise ValueError(f"{word} is neither a flag nor a preset (config/x.py)")
    return launch, presets, config


def parse(argv: list[str]) -> tuple[Launch, list[Run]]:
    """Everything that can be known to be wrong before Slurm is asked. Raises ValueError or OSError, in one sentence."""
    launch_flags, presets, flags = split_argv(argv)
    launch = train.parse_flags(
        launch_flags,
        Launch(),
        prog="launch/submit.py",
        description=f"{__doc__}\nAll other flags, and presets, are train.py's: see python train.py --help",
    )
    for name in ("nodes", "gpus_per_node", "cpus_per_task", "hours"):
        if not getattr(launch, name) > 0 or not math.isfinite(
            getattr(launch, name)
        ):  # -t 0 would mean no limit
            raise ValueError(f"{name} must be above 0, not {getattr(launch, name)}")
    if launch.max_requeues < 0:
        raise ValueError(f"max_requeues must not be negative, not {launch.max_requeues}")
    if launch.cluster != "slurm" and launch.nodes > 1:
        raise ValueError(f"--cluster {launch.cluster} has one node, not {launch.nodes}")
    if launch.cluster == "debug" and (
        launch.gpus_per_node not in (1, SITE["gpus_per_node"]) or len(presets) > 1
    ):
        raise ValueError("--cluster debug runs one preset in this one process")
    if launch.cluster == "slurm" and not launch.dry_run and not shutil.which("sbatch"):
        raise ValueError(
            "there is no Slurm here (no sbatch): submit from its login node, look with --dry_run, or run with --cluster local"
        )
    if not presets:
        asked = train.parse_flags(flags, train.Config())
        if not (
            asked.fork or asked.resume and Path(asked.run_dir, "config.json").exists()
        ):  # else all is stored there
            presets = [str(ROOT / PAPER)]
    runs = [resolve(launch, preset, flags) for preset in presets or [None]]
    for i, run in enumerate(runs):
        for other in runs[:i]:
            if other.cfg.run_dir == run.cfg.run_dir:
                raise ValueError(f"{other.preset} and {run.preset} have the same run_dir {run.cfg.run_dir}")
    return launch, runs


def resolve(launch: Launch, preset: str | None, flags: list[str]) -> Run:
    """One preset with flags -> the run, its paths absolute, its batch divided over the GPUs."""
    cfg, notes = train.parse_config([preset, *flags] if preset else flags)
    for note in notes:
        print(note)
    cfg = dataclasses.replace(
        cfg, **{name: os.path.abspath(getattr(cfg, name)) for name in PATHS if getattr(cfg, name) is not None}
    )
    explicit = any(flag.split("=")[0].replace("-", "_") == "__grad_accum_steps" for flag in flags)
    if not explicit:  # a resumed run's own number was for the GPUs it had
        cfg = dataclasses.replace(
            cfg, grad_accum_steps=train.load_preset(preset).grad_accum_steps if preset else 1
        )
    cfg = dataclasses.replace(cfg, grad_accum_steps=divide_batch(cfg, launch.ranks, explicit))
    return Run(Path(os.path.abspath(preset)) if preset else None, flags, cfg)


def check_data(cfg: train.Config, ranks: int) -> None:
    """Raise OSError or ValueError for data that is missing, damaged, or too small for this schedule, without building the loaders, and for
    a run to fork from or weights to start from that aren't there or don't fit. (timm's are downloaded now, where there is a network.)"""
    fresh = not (cfg.resume and checkpoint.latest(Path(cfg.run_dir)))
    if cfg.fork and fresh:
        train.find_fork(cfg)
    if cfg.init_from and fresh:
        train.load_init(cfg)
    if cfg.loader == "synthetic":
        return
    images, classes = {}, {}
    for split in ("train", "val"):
        if cfg.loader == "ffcv":
            path = find_beton(cfg.dataset, cfg.data_dir, split)
            total, classes[split] = check_beton(path), read_classes(path)
        else:
            source = open_dataset(cfg.dataset, cfg.data_dir, split)
            total, classes[split] = len(source), list(source.classes)
        check_classes(
            f"{split} of {cfg.data_dir}", classes[split], cfg.num_classes or DATASETS[cfg.dataset].num_classes
        )
        micro_batch = cfg.batch_size // (cfg.grad_accum_steps * ranks)
        images[split] = len(
            get_indices(
                total, split == "train", micro_batch, cfg.train_samples if split == "train" else None, ranks
            )
        )
    train.check_data(cfg, images["train"], *classes.values())


def get_images_that_fit(cfg: train.Config, memory_gib: float) -> int:
    """Images of a micro-batch that fit a GPU, roughly: a block's bfloat16 activations are 34 bytes per token and unit of width (Korthikanti
    et al., arXiv 2205.05198; `bench.py memory` gives 33 for ViT-L/16), and 39 in the warmup phase, with ranks of 64; masters, moments and
    gradients 16 bytes a parameter, unsharded; a fifth of the memory stays free."""
    spec = VARIANTS[cfg.model]
    width, depth = spec["embed_dim"], spec["depth"]
    tokens = (DATASETS[cfg.dataset].image_size // spec["patch_size"]) ** 2 + 1
    bytes_per_token = {"none": 39, "selective": 20, "block": 4}[cfg.activation_checkpointing] * (
        1 if cfg.dtype == "bfloat16" else 2
    )
    return int(
        (0.8 * memory_gib * 2**30 - 16 * 12 * depth * width**2) / (bytes_per_token * tokens * width * depth)
    )


def divide_batch(cfg: train.Config, ranks: int, explicit: bool) -> int:
    """grad_accum_steps for so many ranks: the configured number if it was said explicitly, else the smallest from it on whose
    micro-batches fit a GPU. The batch itself never changes. Raises ValueError where it can't be divided."""
    fit = math.inf if explicit else get_images_that_fit(cfg, SITE["gpu_memory_gib"])
    for steps in (
        [cfg.grad_accum_steps] if explicit else range(cfg.grad_accum_steps, cfg.batch_size // ranks + 1)
    ):
        if cfg.batch_size % (steps * ranks) == 0 and cfg.batch_size // (steps * ranks) <= fit:
            return steps
    if cfg.batch_size % (ranks * cfg.grad_accum_steps):
        accumulated = f" × {cfg.grad_accum_steps} accumulation steps" if cfg.grad_accum_steps > 1 else ""
        raise ValueError(
            f"batch_size {cfg.batch_size} can't be divided over {ranks} GPUs{accumulated}: choose other --nodes, --gpus_per_node "
            "or --batch_size"
        )
    raise ValueError(
        f"a micro-batch of {cfg.model} would not fit {SITE['gpu_memory_gib']} GiB: --grad_accum_steps N decides otherwise"
    )


# ---------------------------------------------------------------------------------------------------------------------------------
# Slurm


def build_executor(launch: Launch, runs: list[Run], folder: Path) -> submitit.AutoExecutor:
    """submitit's executor with everything this launch says; `folder` gets its logs and holds the snapshot, `code`."""
    if launch.cluster == "slurm":
        SlurmExecutor.affinity = classmethod(
            lambda cls: 2
        )  # whether there is a Slurm was asked before; a dry run needs none
    executor = submitit.AutoExecutor(
        folder, cluster=launch.cluster, slurm_max_num_timeout=launch.max_requeues
    )
    minutes = math.ceil(launch.hours * 60)
    environment = SITE["environment"] | {"PRELORA_MAX_REQUEUES": launch.max_requeues}
    setup = [
        *(f"module load {module}" for module in SITE["modules"]),
        *(f"export {name}={shlex.quote(str(value))}" for name, value in environment.items()),
        f"cd {shlex.quote(str(folder / 'code'))}",
        'export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"',
    ]
    report = f"{shlex.quote(sys.executable)} -c 'from launch.job import *; print_failures(sys.argv[1])' {shlex.quote(str(folder))}"
    executor.update_parameters(
        name=Path(runs[0].cfg.run_dir).name if len(runs) == 1 else "prelora",
        nodes=launch.nodes,
        tasks_per_node=launch.gpus_per_node,
        gpus_per_node=launch.gpus_per_node,
        cpus_per_task=launch.cpus_per_task,
        timeout_min=minutes,
        stderr_to_stdout=True,
        slurm_partition=launch.partition,
        slurm_account=launch.account,
        slurm_qos=launch.qos,
        slurm_constraint=launch.constraint,
        slurm_exclude=launch.exclude,
        slurm_signal_delay_s=min(SITE["signal_seconds"], minutes * 15),
        slurm_comment=os.pathsep.join(run.cfg.run_dir for run in runs),
        slurm_additional_parameters={"requeue": True, **SITE["extra"]},
        # sh: a signal that comes before Python has a handler must not kill the rank
        slurm_srun_args=[
            "--kill-on-bad-exit=1",
            f"--cpus-per-task={launch.cpus_per_task}",
            "sh",
            "-c",
            'trap "" USR1 USR2; exec "$@"',
            "sh",
        ],
        slurm_setup=setup,
        slurm_teardown=["status=$?", f"[ $status = 0 ] || {report}", "exit $status"],
    )
    return executor


def get_script(executor, count: int) -> str:
    """The batch script that submitit will write."""
    slurm = executor._executor
    parameters = slurm.parameters
    slurm.parameters = parameters | ({"map_count": count} if count > 1 else {})
    text = slurm._make_submission_file_text(slurm._submitit_command_str, "")
    slurm.parameters = parameters
    return text


def check_with_slurm(launch: Launch, runs: list[Run], script: str) -> str:
    """What sbatch --test-only answers: when and where the job would start. Raises ValueError with the reason why it never would, and
    where another job of this user's is waiting or running on the same run."""
    queue = subprocess.run(
        ["squeue", "-h", "-u", getpass.getuser(), "-o", "%i|%k"], capture_output=True, text=True
    ).stdout.splitlines()
    for job, comment in (line.split("|", 1) for line in queue):
        for run in runs:
            if run.cfg.run_dir in comment.split(os.pathsep):
                raise ValueError(
                    f"job {job} is already waiting or running on {run.cfg.run_dir}: scancel {job}, or choose another --run_dir"
                )
    asked = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True)
    answer = (asked.stderr.strip().splitlines() or ["no answer"])[-1].split("sbatch: ")[-1]
    if asked.returncode:
        sizes = dict(
            line.split()
            for line in subprocess.run(
                ["sinfo", "-h", "-o", "%P %D"], capture_output=True, text=True
            ).stdout.splitlines()
        )
        name = next(
            (
                name
                for name in sizes
                if name.rstrip("*") == launch.partition or not launch.partition and name.endswith("*")
            ),
            None,
        )
        if name and launch.nodes > int(sizes[name]):
            raise ValueError(f"partition {name.rstrip('*')} has {sizes[name]} nodes, not {launch.nodes}")
        known = ", ".join(name.rstrip("*") for name in sizes)
        raise ValueError(
            f"Slurm refuses the job: {answer.split(': ')[-1]}" + (f" (partitions: {known})" if known else "")
        )
    return answer


def check_writable(folder: Path) -> None:
    """Raise OSError if nothing could be written there or, where it doesn't exist yet, in what exists above it."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as e:
        raise OSError(f"can't write to {folder}: {existing}: {e.strerror}") from None


def take_snapshot(target: Path) -> int:
    """Copy the repository's files, tracked and untracked but not ignored, so that edits after the submission don't reach the job.
    Returns their number. Raises ValueError where git can't list them, and for more than 200 MB, which is not code."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
    )
    if listed.returncode:
        raise ValueError(
            f"git can't list the files of {ROOT} for the snapshot: {listed.stderr.decode().strip()}"
        )
    files = [Path(name) for name in os.fsdecode(listed.stdout).split("\0") if name]
    files = [name for name in files if (ROOT / name).is_file()]  # a deleted file is still tracked
    sizes = {name: (ROOT / name).stat().st_size for name in files}
    if sum(sizes.values()) > 200e6:
        raise ValueError(
            f"a snapshot of the code would have {sum(sizes.values()) / 1e6:,.0f} MB, {max(sizes, key=sizes.get)} the most: "
            "put what is not code in .gitignore"
        )
    files += [
        path.relative_to(ROOT) for path in ROOT.glob("data/__pycache__/*.nb[ic]")
    ]  # numba's kernels: half a minute
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return len(files)


def get_preset_in(snapshot: Path, preset: Path) -> Path:
    """Where a preset lies in the snapshot; one from elsewhere, or one that git ignores, is put there."""
    inside = preset.is_relative_to(ROOT)
    target = snapshot / (preset.relative_to(ROOT) if inside else Path("presets", *preset.parts[1:]))
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(preset, target)
    return target


@contextlib.contextmanager
def outside_of_jobs():
    """Without the variables of a job that this may be called from; those that a user or a site sets for sbatch stay."""
    own = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or name.startswith("SBATCH_")
    }
    with submitit.helpers.clean_env():
        os.environ.update(own)
        yield


def submit(launch: Launch, runs: list[Run], folder: Path) -> list[submitit.Job]:
    """Make `folder` with the snapshot and submit. Leaves nothing behind if that fails (OSError, ValueError, RuntimeError)."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    code = folder / "code"
    try:
        folder.mkdir(parents=True)
        print(f"code: {take_snapshot(code)} files in {code}")
        executor = build_executor(launch, runs, folder)
        jobs = [Job(run.get_argv(code)) for run in runs]
        if (
            launch.cluster == "local"
        ):  # with its `setup` a shell would stand between us and the job, and not pass signals on
            path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
            with (
                contextlib.chdir(code),
                submitit.helpers.environment_variables(PYTHONPATH=path, **SITE["environment"]),
            ):
                return executor.submit_array(jobs)
        return executor.submit_array(jobs)  # one job is no array
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        for path in created[1:]:
            with contextlib.suppress(OSError):  # somebody else has put something there
                path.rmdir()
        raise


# ---------------------------------------------------------------------------------------------------------------------------------
# after the submission


def follow(jobs: list[submitit.Job], runs: list[Run], folder: Path) -> int:
    """Wait for the jobs, say what changes and how each ended. Returns 0 if all did well, else 1."""
    states: dict[str, str] = {}
    while not states or set(states.values()) & ACTIVE:
        time.sleep(2)
        for job, state in get_states(jobs).items():
            if states.get(job) != state:
                print(f"{time.strftime('%F %T')} job {job}: {state}", flush=True)
                states[job] = state
    for job, run in zip(jobs, runs):
        print(f"\njob {job.job_id}, {run.cfg.run_dir}: {states[job.job_id]}")
        if states[job.job_id] != "COMPLETED":
            for line in get_failures(folder, job.job_id):
                print(f"failed: {line}")
            print(f"logs: {folder}/{job.job_id}_*_log.out, {run.cfg.run_dir}/logs")
        with contextlib.suppress(OSError, ValueError):  # it has not come so far
            print(phase_table(load_run(run.cfg.run_dir)[1]))
    return int(set(states.values()) != {"COMPLETED"})


ACTIVE = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "SUSPENDED",
    "STOPPED",
    "COMPLETING",
    "SIGNALING",
    "STAGE_OUT",
    "RESIZING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
}


def get_states(jobs: list[submitit.Job]) -> dict[str, str]:
    """Each job's state in Slurm's words; UNKNOWN if it has been forgotten. {} while Slurm does not answer."""
    if isinstance(jobs[0], submitit.LocalJob):
        ended = {
            job.job_id: all(task.paths.result_pickle.exists() for task in job._sub_jobs or [job])
            for job in jobs
        }
        return {
            job.job_id: "RUNNING" if not job.done() else "COMPLETED" if ended[job.job_id] else "FAILED"
            for job in jobs
        }
    numbers = ",".join(dict.fromkeys(job.job_id.split("_")[0] for job in jobs))
    shown = subprocess.run(
        ["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T", "-j", numbers], capture_output=True, text=True
    )
    if shown.returncode and "Invalid job id" not in shown.stderr:
        return {}
    states = dict(line.split("|") for line in shown.stdout.split())
    return {job.job_id: states.get(job.job_id, "UNKNOWN") for job in jobs}


def main(argv: list[str]) -> int:
    """Exit status: 0; 2 for what was wrong before anything was submitted; with --wait 1 if a job failed."""
    try:
        launch, runs = parse(argv)
        folder = Path(launch.folder).absolute() / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{os.getpid()}"
        script = (
            get_script(build_executor(launch, runs, folder), len(runs)) if launch.cluster == "slurm" else ""
        )
        for run in runs:
            steps = run.cfg.grad_accum_steps
            print(
                f"{run.cfg.run_dir}: {run.cfg.batch_size} images a step = {launch.ranks} GPUs × {steps} accumulation step{'s' * (steps > 1)} "
                f"× {run.cfg.batch_size // (launch.ranks * steps)} images"
            )
        if launch.dry_run:
            print(script, *(json.dumps(dataclasses.asdict(run.cfg), indent=1) for run in runs), sep="\n")
        for run in runs:
            try:
                check_data(run.cfg, launch.ranks)
            except (ValueError, OSError) as e:
                if not launch.dry_run:
                    raise
                print(f"warning: {e}", file=sys.stderr)
        if launch.dry_run:
            return 0
        for path in [folder, *(Path(run.cfg.run_dir) for run in runs)]:
            check_writable(path)
        if launch.cluster == "debug":  # made here, from the working tree
            job = submitit.AutoExecutor(folder, cluster="debug").submit(
                train.main, [*runs[0].get_argv(None), "--resume", "True"]
            )
            return job.result()
        with outside_of_jobs():
            if launch.cluster == "slurm":
                print(check_with_slurm(launch, runs, script))
            jobs = submit(launch, runs, folder)
    except (ValueError, OSError, RuntimeError) as e:
        print(f"error: {' '.join(str(e).split()) or type(e).__name__}", file=sys.stderr)
        return 2
    for job, run in zip(jobs, runs):
        print(
            f"job {job.job_id}: {launch.nodes} × {launch.gpus_per_node} GPUs, {launch.hours:g} hours a start, {run.cfg.run_dir}\n"
            f"  follow  tail -F {folder}/{job.job_id}_0_log.out\n"
            f"          tensorboard --logdir {run.cfg.run_dir}/tb\n"
            f"  cancel  {'scancel' if launch.cluster == 'slurm' else 'kill'} {job.job_id}",
            flush=True,
        )
    try:
        return follow(jobs, runs, folder) if launch.wait else 0
    except KeyboardInterrupt:
        print("no longer waiting; the jobs go on")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
