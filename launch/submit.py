"""Submit train.py to Slurm: a job that goes on by itself after preemption, a node's failure and its time
limit.

    python launch/submit.py --nodes 16                                         the paper's run, 64 GPUs
    python launch/submit.py --nodes 2 config/smoke.py                          before that: no data, 36 steps
    python launch/submit.py --nodes 16 config/vit_l16_in1k.py --tau 1          presets and flags of train.py's
    python launch/submit.py --nodes 4 config/a.py config/b.py config/c.py      an array, a job for each preset
    python launch/submit.py --nodes 16 --dry_run                               only print what would be done
    python launch/submit.py --cluster local --gpus_per_node 2 config/debug.py  here, without Slurm
"""

import dataclasses
import json
import math
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: train.py is one up

import submitit

from config.cli import explain_unknown, get_meant, load_config_class, load_preset, parse_config, parse_flags
from data.datasets import get_spec
from errors import UserError, exit_with
from files import PathStr, expand_home, get_path_names
from launch.checks import check_run, check_writable
from launch.job import MAX_REQUEUES
from launch.slurm import build_executor, check_with_slurm, follow, get_script, outside_of_jobs, submit_runs
from launch.snapshot import get_preset_in
from model.variants import VARIANTS

ROOT = Path(__file__).resolve().parent.parent
PAPER = "config/vit_l16_in1k.py"
Config = load_config_class()  # train.py's, without torch: a dry run prints its text at once
PATHS = [name for name in get_path_names(Config) if name != "init_from"]  # that is absolute, or no file

# This site. Meant to be edited; flags go before it.
SITE = {
    "partition": None,  # "gpu"
    "account": None,
    "qos": None,
    "constraint": None,  # "a100"
    "gpus_per_node": 4,  # 0: CPUs alone
    "cpus_per_task": 8,  # cores of a node / its GPUs: loader threads, and OpenMP's
    "hours": 24,
    "gpu_memory_gib": 40,  # of a process: larger batches are accumulated from micro-batches that fit
    "signal_seconds": 300,  # before the time limit, to end an evaluation, take a step and save
    "modules": [],  # ["cuda/12.6"]: `module load` in the batch script
    "environment": {},  # {"NCCL_SOCKET_IFNAME": "hsn0"}: of every process
    # Other options of sbatch, spelt with - or _. None drops one that the script has otherwise.
    # {"exclusive": True, "mail-type": "FAIL", "mem": 0, "wckey": None}
    # {"gpus_per_node": "a100:4"}                      GPUs of a type: --gpus-per-node=a100:4
    # {"gpus_per_node": None, "gres": "gpu:a100:4"}    a Slurm that wants them as --gres=gpu:a100:4
    # {"gpus_per_node": None}                          one that gives whole nodes, and knows no such option
    # {gpus_per_node} in a value stands for the flag's number: {"gpus_per_node": "a100:{gpus_per_node}"}
    "extra": {},
}
SITE_SAYS = "sbatch's own options: SITE['extra'] in launch/submit.py"
# Flags that change nothing without Slurm.
FOR_SLURM = ("cpus_per_task", "partition", "account", "qos", "constraint", "exclude", "max_requeues")


@dataclass
class Launch:
    nodes: int = 1
    gpus_per_node: int = SITE["gpus_per_node"]  # one process each; 0: CPUs alone, by gloo
    tasks_per_node: int | None = None  # without GPUs: processes on a node; None = 1
    cpus_per_task: int = SITE["cpus_per_task"]
    hours: float = SITE["hours"]  # time limit of each start
    partition: str | None = SITE["partition"]
    account: str | None = SITE["account"]
    qos: str | None = SITE["qos"]
    constraint: str | None = SITE["constraint"]
    exclude: str | None = None  # nodes to avoid: nid[012-014]
    folder: PathStr = "runs/jobs"  # logs and the snapshot of the code, for each submission; seen by all nodes
    max_requeues: int = MAX_REQUEUES  # starts after the first
    cluster: Literal["slurm", "local", "debug"] = "slurm"  # local: on this machine; debug: here, with pdb
    dry_run: bool = False  # print the batch script and the resolved configuration, submit nothing
    wait: bool = False  # until the jobs end; print what came out, or who failed; exit status 0 if all is well

    @property
    def processes_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        return 1 if self.cluster == "debug" else self.nodes * self.processes_per_node

    @property
    def unit(self) -> str:
        """What a process has, in words."""
        return "GPUs" if self.gpus_per_node else "CPU processes"

    @property
    def variables(self) -> dict[str, str]:
        """Of every process. Not every Slurm hides the GPUs that a job did not ask for."""
        return {} if self.gpus_per_node else {"CUDA_VISIBLE_DEVICES": ""}


@dataclass
class Run:
    """One job: a preset with its flags, resolved."""

    preset: Path | None
    flags: list[str]
    cfg: Any  # a Config

    def get_argv(self, snapshot: Path | None) -> list[str]:
        """train.py's arguments in the job: paths absolute, because it runs in the snapshot; the preset as it
        is there.
        """
        argv = []
        if self.preset:
            argv.append(str(get_preset_in(snapshot, self.preset) if snapshot else self.preset))
        argv += [*self.flags, "--grad_accum_steps", str(self.cfg.grad_accum_steps)]
        for name in (*PATHS, "init_from"):
            if getattr(self.cfg, name) is not None:
                argv += [f"--{name}", getattr(self.cfg, name)]
        return argv


# ----------------------------------------------------------------------------------------------------
# the command line


def split_argv(argv: list[str]) -> tuple[list[str], list[str], list[str]]:
    """(flags of Launch, presets, flags for train.py). A bare --dry_run means --dry_run True. Raises UserError
    for other words.
    """
    own = {field.name: field.type for field in dataclasses.fields(Launch)}
    of_train = {field.name for field in dataclasses.fields(Config)}
    launch, presets, config = [], [], []
    current = None  # the list that the last flag went to
    awaits_value = False  # whether the last flag's first value is to come
    for i, word in enumerate(argv):
        if word.startswith("--"):
            name = word.split("=")[0].lstrip("-").replace("-", "_")
            if name in own or word == "--help":
                current = launch
            elif name in of_train:
                current = config
            else:
                following = next(iter(argv[i + 1 :]), None)
                why = explain_unknown(word, following, "launch/submit.py", Config, Launch)
                raise UserError(f"unknown flag {word}{why} ({SITE_SAYS})")
            current.append(word)
            awaits_value = "=" not in word
            says_nothing = awaits_value and argv[i + 1 : i + 2] not in (["True"], ["False"])
            if own.get(name) is bool and says_nothing:
                current.append("True")
                awaits_value = False
        elif word == "-h":
            launch.append("--help")
        elif awaits_value:
            current.append(word)
            awaits_value = False
        elif word.endswith(".py"):
            presets.append(expand_home(word))
        elif current is config and not word.startswith("-"):  # train.py's flags may have several values
            config.append(word)
        else:
            meant = get_meant(word, Config, Launch)
            says = f"is no flag: say {meant}" if meant else "is neither a flag nor a preset (config/x.py)"
            raise UserError(f"{word} {says}")
    return launch, presets, config


def parse(argv: list[str]) -> tuple[Launch, list[Run]]:
    """Everything that can be known to be wrong before Slurm is asked. Raises UserError."""
    launch_flags, presets, flags = split_argv(argv)
    more = "All other flags, and presets, are train.py's: see python train.py --help"
    launch = parse_flags(launch_flags, Launch(), prog="launch/submit.py", description=f"{__doc__}\n{more}")
    check_launch(launch, presets)
    if not presets and not is_stored(flags):
        presets = [str(ROOT / PAPER)]
    runs = [resolve(launch, preset, flags) for preset in presets or [None]]
    for i, run in enumerate(runs):
        for other in runs[:i]:
            if other.cfg.run_dir == run.cfg.run_dir:
                raise UserError(f"{other.preset} and {run.preset} have the same run_dir {run.cfg.run_dir}")
    return launch, runs


def check_launch(launch: Launch, presets: list[str]) -> None:
    """Raise UserError for numbers that are out of range, and for what a cluster can't do."""
    for name in ("nodes", "tasks_per_node", "cpus_per_task", "hours"):
        value = getattr(launch, name)
        if value is None:
            continue
        if not value > 0 or not math.isfinite(value):  # -t 0 would mean no limit
            raise UserError(f"{name} must be above 0, not {value}")
    for name in ("gpus_per_node", "max_requeues"):
        if getattr(launch, name) < 0:
            raise UserError(f"{name} must not be negative, not {getattr(launch, name)}")
    if launch.gpus_per_node and launch.tasks_per_node not in (None, launch.gpus_per_node):
        raise UserError(
            f"tasks_per_node {launch.tasks_per_node} is for nodes without GPUs (--gpus_per_node 0): "
            f"each of the {launch.gpus_per_node} GPUs has one process"
        )
    if launch.cluster != "slurm" and launch.nodes > 1:
        raise UserError(f"--cluster {launch.cluster} has one node, not {launch.nodes}")
    ignored = {"slurm": (), "local": FOR_SLURM, "debug": (*FOR_SLURM, "hours")}
    for name in ignored[launch.cluster]:
        if getattr(launch, name) != getattr(Launch(), name):
            raise UserError(f"--{name} says nothing to --cluster {launch.cluster}: leave it out")
    if launch.cluster == "debug":
        asks_for_more = launch.gpus_per_node not in (0, 1, SITE["gpus_per_node"])
        if asks_for_more or launch.tasks_per_node not in (None, 1) or len(presets) > 1:
            raise UserError("--cluster debug runs one preset in this one process")
    if launch.cluster == "slurm" and not launch.dry_run and not shutil.which("sbatch"):
        raise UserError(
            "there is no Slurm here (no sbatch): submit from its login node, look with --dry_run, "
            "or run with --cluster local"
        )


def is_stored(flags: list[str]) -> bool:
    """Whether the settings are those of a run to fork, or of this run's own past: it needs no preset. Where
    there is no past, that is found when they are looked for."""
    asked = parse_flags(flags, Config())
    return bool(asked.fork) or asked.resume


def resolve(launch: Launch, preset: str | None, flags: list[str]) -> Run:
    """One preset with flags -> the run, its paths absolute, its batch divided over the GPUs."""
    cfg, notes = parse_config(Config, [preset, *flags] if preset else flags)
    for note in notes:
        print(note)
    for name in PATHS:
        if getattr(cfg, name) is not None:
            cfg = dataclasses.replace(cfg, **{name: os.path.abspath(getattr(cfg, name))})
    is_explicit = any(flag.split("=")[0].replace("-", "_") == "__grad_accum_steps" for flag in flags)
    if not is_explicit:  # a resumed run's own number was for the GPUs it had
        accumulate = load_preset(Config, preset).grad_accum_steps if preset else 1
        cfg = dataclasses.replace(cfg, grad_accum_steps=accumulate)
    steps = divide_batch(cfg, launch, is_explicit)
    cfg = dataclasses.replace(cfg, grad_accum_steps=steps)
    return Run(Path(os.path.abspath(preset)) if preset else None, flags, cfg)


# ----------------------------------------------------------------------------------------------------
# the batch


def get_images_that_fit(cfg, memory_gib: float) -> int:
    """Images of a micro-batch that fit a GPU, roughly.

    A block's bfloat16 activations are 34 bytes per token and unit of width (Korthikanti et al., arXiv
    2205.05198; `bench.py memory` gives 33 for ViT-L/16), and 39 in the warmup phase, with ranks of 64;
    masters, moments and gradients are 16 bytes a parameter, unsharded; a fifth of the memory stays free.
    """
    spec = VARIANTS[cfg.model]
    width, depth = spec["embed_dim"], spec["depth"]
    image_size = get_spec(cfg.dataset, cfg.image_size).image_size
    tokens = (image_size // spec["patch_size"]) ** 2 + 1
    bytes_per_unit = {"none": 39, "selective": 20, "block": 4}[cfg.activation_checkpointing]
    if cfg.dtype != "bfloat16":
        bytes_per_unit *= 2
    state = 16 * 12 * depth * width**2  # a block has 12 width² parameters
    bytes_per_image = bytes_per_unit * tokens * width * depth
    return int((0.8 * memory_gib * 2**30 - state) / bytes_per_image)


def divide_batch(cfg, launch: Launch, is_explicit: bool) -> int:
    """grad_accum_steps for so many processes: the configured number if it was said explicitly, else the
    smallest from it on whose micro-batches fit a GPU. The batch itself never changes. Raises UserError where
    it can't be divided.
    """
    world_size, candidates, fit = launch.world_size, [cfg.grad_accum_steps], math.inf
    if not is_explicit:
        candidates = range(cfg.grad_accum_steps, cfg.batch_size // world_size + 1)
        fit = get_images_that_fit(cfg, SITE["gpu_memory_gib"])
    for steps in candidates:
        micro_batch, rest = divmod(cfg.batch_size, steps * world_size)
        if rest == 0 and micro_batch <= fit:
            return steps
    if cfg.batch_size % (world_size * cfg.grad_accum_steps):
        accumulated = ""
        if cfg.grad_accum_steps > 1:
            accumulated = f" × {cfg.grad_accum_steps} accumulation steps"
        raise UserError(
            f"batch_size {cfg.batch_size} can't be divided over {world_size} {launch.unit}{accumulated}: "
            "choose other --nodes, --gpus_per_node (or --tasks_per_node), or --batch_size"
        )
    raise UserError(
        f"a micro-batch of {cfg.model} would not fit {SITE['gpu_memory_gib']} GiB: "
        "--grad_accum_steps N decides otherwise"
    )


# ----------------------------------------------------------------------------------------------------
# the command


def main(argv: list[str]) -> int:
    """Exit status: 0; 2 for what was wrong before anything was submitted; with --wait 1 if a job failed."""
    try:
        launch, runs = parse(argv)
        stamp = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{os.getpid()}"
        folder = Path(launch.folder).absolute() / stamp
        script = ""
        if launch.cluster == "slurm":
            script = get_script(build_executor(launch, runs, folder, SITE), len(runs))
        for run in runs:
            print(describe_batch(run.cfg, launch))
        if launch.dry_run:
            dry_run(launch, runs, script)
            return 0
        for run in runs:
            check_run(run.cfg, launch.world_size)
        for path in [folder, *(Path(run.cfg.run_dir) for run in runs)]:
            check_writable(path)
        if launch.cluster != "debug":
            with outside_of_jobs():
                if launch.cluster == "slurm":
                    print(check_with_slurm(launch, runs, script))
                jobs = submit_runs(launch, runs, folder, SITE)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if launch.cluster == "debug":
        return run_here(launch, runs[0], folder)
    for job, run in zip(jobs, runs):
        print(describe_job(launch, job, run, folder), flush=True)
    try:
        return follow(jobs, runs, folder) if launch.wait else 0
    except KeyboardInterrupt:
        print("no longer waiting; the jobs go on")
        return 130


def dry_run(launch: Launch, runs: list[Run], script: str) -> None:
    """Print what would be submitted, and warn of what would be refused."""
    print(script)
    for run in runs:
        print(json.dumps(dataclasses.asdict(run.cfg), indent=1))
    for run in runs:
        try:
            check_run(run.cfg, launch.world_size)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)


def run_here(launch: Launch, run: Run, folder: Path) -> int:
    """--cluster debug: in this process, from the working tree."""
    os.environ.update(launch.variables)
    import train  # this needs torch

    job = submitit.AutoExecutor(folder, cluster="debug").submit(
        train.main, [*run.get_argv(None), "--resume", "True"]
    )
    return job.result()


def describe_batch(cfg, launch: Launch) -> str:
    steps, world_size = cfg.grad_accum_steps, launch.world_size
    plural = "s" if steps > 1 else ""
    return (
        f"{cfg.run_dir}: {cfg.batch_size} images a step = {world_size} {launch.unit} × {steps} accumulation "
        f"step{plural} × {cfg.batch_size // (world_size * steps)} images"
    )


def describe_job(launch: Launch, job: submitit.Job, run: Run, folder: Path) -> str:
    cancel = "scancel" if launch.cluster == "slurm" else "kill"
    size = f"{launch.nodes} × {launch.processes_per_node} {launch.unit}, {launch.hours:g} hours a start"
    log, tensorboard = folder / f"{job.job_id}_0_log.out", Path(run.cfg.run_dir, "tb")
    return (
        f"job {job.job_id}: {size}, {run.cfg.run_dir}\n"
        f"  follow  tail -F {shlex.quote(str(log))}\n"
        f"          tensorboard --logdir {shlex.quote(str(tensorboard))}\n"
        f"  cancel  {cancel} {job.job_id}"
    )


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
