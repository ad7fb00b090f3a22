"""Submitting: what is refused, what is written, and real jobs on a real Slurm, preempted, killed and requeued."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, is_installed, wait
from small_runs import REPO, assert_same, events, weights, without_times
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

import train
from launch import job, submit

slow = pytest.mark.slow
# 4 steps an epoch, 48 in all: full 1-3 (the test decides), warmup 4-6, lora 7-12. Everything random is on.
RUN = (
    "--loader folder --num_workers 0 --train_samples 64 --epochs 12 --batch_size 16 --lr 1e-3 --lr_warmup_steps 4 --compile False "
    "--dropout 0.1 --mixup 0.2 --tau 90 --zeta 90 --num_windows 2 --window_epochs 1 --lora_warmup_epochs 3 --dp_shard 2"
).split()
DEBUG = str(REPO / "config/debug.py")


def require_slurm(installed):
    if not installed and "SLURM_REQUIRED" in os.environ:
        pytest.fail("SLURM_REQUIRED is set, but there is no slurmctld, slurmd, munged or sbatch: make slurm")
    if not installed:
        pytest.skip("no Slurm here: make slurm")


def test_ci_fails_where_others_skip(monkeypatch):
    monkeypatch.delenv("SLURM_REQUIRED", raising=False)
    with pytest.raises(pytest.skip.Exception):
        require_slurm(False)
    monkeypatch.setenv("SLURM_REQUIRED", "1")
    with pytest.raises(pytest.fail.Exception):
        require_slurm(False)


@pytest.fixture(scope="module")
def cluster():
    require_slurm(is_installed())
    os.environ["OMP_NUM_THREADS"] = "1"
    cluster = SlurmCluster(16)
    yield cluster
    cluster.close()


class Submitted:
    """A job that submit.py made, and its run."""

    def __init__(self, cluster, printed, run_dir):
        self.cluster, self.printed, self.run_dir = cluster, printed, run_dir
        self.id = re.search(r"^job (\d+):", printed, re.MULTILINE)[1]
        self.folder = Path(re.search(r"tail -F (.*)/", printed)[1])

    def state(self):
        return self.cluster.field(self.id, "JobState")

    def restarts(self):
        return int(self.cluster.field(self.id, "Restarts"))

    def nodes(self):
        return self.cluster(f"scontrol show hostnames {self.cluster.field(self.id, 'NodeList')}").split()

    def log(self, rank=0):
        path = self.folder / f"{self.id}_{rank}_log.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for_epoch(self, epoch, timeout=120):
        """Until the run has finished it, since the job's last start."""

        def reached():
            with contextlib.suppress(FileNotFoundError, ValueError):
                return any(e["epoch"] >= epoch for e in events(self.run_dir, "epoch"))

        try:
            wait(reached, timeout)
        except TimeoutError:
            pytest.fail(f"{self.state()}: {self.log()[-3000:]}")

    def wait(self, state="COMPLETED", timeout=240):
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        try:
            wait(lambda: self.state() in ended, timeout)
        except TimeoutError:
            pytest.fail(f"still {self.state()}: {self.log()[-3000:]}")
        assert self.state() == state, self.log()[-3000:]


@pytest.fixture
def send(cluster, small, tmp_path, monkeypatch, capsys):
    """send(*argv) -> Submitted: `submit.py` with two ranks on each of two nodes, as a user's shell in tmp_path would run it."""
    monkeypatch.chdir(tmp_path)

    def send(*argv, run_dir="run", preset=DEBUG, status=0):
        flags = [*RUN, "--data_dir", str(small), "--run_dir", run_dir]
        shape = "--nodes 2 --gpus_per_node 2 --cpus_per_task 1 --hours 1".split()
        assert submit.main([*shape, preset, *flags, *map(str, argv)]) == status, capsys.readouterr().err
        return Submitted(cluster, capsys.readouterr().out, tmp_path / run_dir)

    yield send
    cluster("scancel -f --state=RUNNING; scancel -f --state=PENDING")


@pytest.fixture(scope="module")
def torchrun(small, tmp_path_factory):
    """The same run without Slurm and without interruption: torchrun with 4 ranks."""
    require_slurm(is_installed())  # nothing to compare with
    run_dir = tmp_path_factory.mktemp("torchrun") / "run"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "4",
            "train.py",
            "config/debug.py",
            *RUN,
            "--data_dir",
            small,
            "--run_dir",
            run_dir,
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return run_dir


def assert_same_as(torchrun, run_dir):
    """Records and the last checkpoint's weights and moments, to the bit."""
    kept = lambda path: [r for r in without_times(events(path)) if r["event"] != "warning"]
    assert kept(run_dir) == kept(torchrun)
    assert [(s["from"], s["to"]) for s in events(run_dir, "switch")] == [
        ("full", "warmup"),
        ("warmup", "lora"),
    ]
    assert_same(weights(run_dir), weights(torchrun))


# ---- on Slurm


def test_two_nodes_give_what_torchrun_gives(send, torchrun):
    sent = send()
    sent.wait()
    assert_same_as(torchrun, sent.run_dir)
    start, epochs = events(sent.run_dir, "start")[0], events(sent.run_dir, "epoch")
    first, second = sent.nodes()
    assert start["hosts"] == [first, first, second, second] and start["world_size"] == 4
    assert f"ranks: [0, 1] on {first}, [2, 3] on {second}" in sent.log()
    for slowest in (e["slowest_rank"] for e in epochs):
        assert slowest["host"] == start["hosts"][slowest["rank"]]
        assert (
            0 <= slowest["data_wait_seconds"] < slowest["step_seconds"] >= slowest["median_step_seconds"] > 0
        )
    assert f"rank 3 of 4 on {second}: start 0" in sent.log(3)
    assert sent.restarts() == 0 and not job.get_failures(sent.folder, sent.id)


FAULTS = {  # epoch after which it comes, and what comes; whether rank 0 requeues the job, or Slurm by itself
    "usr2 while importing": (0, lambda c, j: c(f"scancel --signal=USR2 {j.id}"), True),
    "usr2": (2, lambda c, j: c(f"scancel --signal=USR2 {j.id}"), True),
    "preemption": (
        4,
        lambda c, j: c(f"sbatch -p high --exclusive -w {','.join(j.nodes())} -t 1 --wrap 'sleep 3'"),
        True,
    ),
    "requeue": (6, lambda c, j: c(f"scontrol requeue {j.id}"), False),
    "node down": (
        7,
        lambda c, j: c(f"scontrol update nodename={j.nodes()[1]} state=down reason=test"),
        False,
    ),
}


@slow
@pytest.mark.parametrize("fault", FAULTS)
def test_goes_on_by_itself(send, cluster, torchrun, fault):
    epoch, inject, by_rank_0 = FAULTS[fault]
    sent = send()
    sent.wait_for_epoch(epoch) if epoch else wait(
        lambda: all("start 0" in sent.log(rank) for rank in range(4)), 60
    )
    inject(cluster, sent)
    wait(lambda: sent.restarts() == 1, 60)
    sent.wait()
    assert sent.restarts() == 1 and "start 1" in sent.log()
    assert ("requeueing job" in sent.log()) == by_rank_0
    assert_same_as(torchrun, sent.run_dir)


PATCHED = """
from config.debug import *
import os
import signal
import time
import train
_get_lr = train.get_lr
def _patched(step, *rest):
    {patch}
    return _get_lr(step, *rest)
if "RANK" in os.environ:
    train.get_lr = _patched
"""


@pytest.fixture
def preset(tmp_path):
    """preset(patch): the debug preset and, on every rank, a line of code in each step."""

    def preset(patch, name="patched", more=""):
        (tmp_path / f"{name}.py").write_text(PATCHED.format(patch=patch) + more)
        return str(tmp_path / f"{name}.py")

    return preset


@slow
def test_goes_on_when_slurmd_dies(send, cluster, preset, torchrun):
    """What Slurm sees of a node that lost its power or its network; it takes half a minute to."""
    sent = send(preset=preset("time.sleep(1.5)"))
    sent.wait_for_epoch(2)
    node = sent.nodes()[1]
    cluster.kill_node(node)
    wait(lambda: sent.restarts() == 1, 90)
    cluster.start_node(node)
    sent.wait(timeout=400)
    assert sent.restarts() == 1 and "requeueing job" not in sent.log()
    assert_same_as(torchrun, sent.run_dir)


@slow
def test_goes_on_past_its_time_limit(send, preset, torchrun):
    """Two minutes, whose end Slurm announces 30 to 60 seconds before."""
    sent = send("--hours", 2 / 60, preset=preset("time.sleep(2.5)"))
    sent.wait(timeout=500)
    assert sent.restarts() >= 1 and "requeueing job" in sent.log()
    assert_same_as(torchrun, sent.run_dir)


@slow
def test_sixteen_nodes_agree(send):
    sent = send("--nodes", 16, "--gpus_per_node", 1, "--max_steps", 1, "--dp_shard", "None")
    sent.wait(timeout=400)
    start = events(sent.run_dir, "start")[0]
    assert start["world_size"] == 16 and len(set(start["hosts"])) == 16
    meta = json.loads((sent.run_dir / "checkpoints/step_00000001/meta.json").read_text())
    assert meta["step"] == 1 and meta["mesh"] == {"dp_replicate": 16, "dp_shard": 1}


@slow
def test_an_edit_after_the_submission_reaches_nothing(cluster, send, small, tmp_path, monkeypatch):
    """Neither the first start, which comes after it, nor the one after a requeue; nor does an edit of the preset."""
    clone = tmp_path / "clone"
    submit.take_snapshot(clone)
    subprocess.run(["git", "init", "-q", clone], check=True)
    (clone / "config/mine.py").write_text("from config.debug import *\nepochs = 12\n")  # not tracked
    cluster("scontrol update partitionname=main state=down")  # the job waits
    printed = subprocess.run(
        [
            sys.executable,
            "launch/submit.py",
            "--nodes",
            "2",
            "--gpus_per_node",
            "2",
            "--cpus_per_task",
            "1",
            "config/mine.py",
            *RUN,
            "--max_steps",
            "16",
            "--data_dir",
            small,
            "--run_dir",
            tmp_path / "run",
        ],
        cwd=clone,
        capture_output=True,
        text=True,
    )
    assert printed.returncode == 0, printed.stderr
    sent = Submitted(cluster, printed.stdout, tmp_path / "run")
    for name in ("train.py", "launch/job.py", "model/vit.py", "config/mine.py", "config/debug.py"):
        (clone / name).write_text("raise RuntimeError('edited')\n")
    cluster("scontrol update partitionname=main state=up")
    sent.wait_for_epoch(2)
    cluster(f"scontrol requeue {sent.id}")
    sent.wait()
    assert sent.restarts() == 1 and events(sent.run_dir)[-1]["step"] == 16 and "edited" not in sent.log()


@slow
def test_cancelled_stays_cancelled(send, cluster):
    """scancel sends SIGTERM: the run saves, and no rank requeues it."""
    sent = send()
    sent.wait_for_epoch(2)
    cluster(f"scancel {sent.id}")
    wait(lambda: f"job {sent.id} is saved; not requeued from here" in sent.log(), 30)
    sent.wait("CANCELLED")
    saved = int(re.search(r"SIGTERM: saved at step (\d+)", sent.log())[1])
    assert (sent.run_dir / "checkpoints/latest").read_text().strip() == f"step_{saved:08d}"
    time.sleep(3)
    assert sent.state() == "CANCELLED" and sent.restarts() == 0


@slow
def test_tasks_of_an_array_are_requeued_and_cancelled_one_by_one(
    cluster, tmp_path, monkeypatch, small, capsys
):
    """The last one has the array's own number as its job id, which Slurm takes for all of them."""
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        (tmp_path / f"{name}.py").write_text(f"from config.debug import *\nrun_dir = '{name}'\n")
    assert (
        submit.main(
            [*"--gpus_per_node 2 --cpus_per_task 1 a.py b.py c.py".split(), *RUN, "--data_dir", str(small)]
        )
        == 0
    )
    array = re.search(r"^job (\d+)_0:", capsys.readouterr().out, re.MULTILINE)[1]
    a, b, c = [f"{array}_{i}" for i in range(3)]
    assert array in [cluster.field(task, "JobId") for task in (a, b, c)]
    wait(lambda: all((tmp_path / name / "metrics.jsonl").exists() for name in "abc"), 180)
    cluster(f"scancel {a}")
    wait(lambda: cluster.field(a, "JobState") == "CANCELLED", 60)
    for task in (b, c):
        cluster(f"scancel --signal=USR2 {task}")
        wait(lambda: cluster.field(task, "Restarts") == "1", 60)
    wait(lambda: {cluster.field(task, "JobState") for task in (b, c)} == {"COMPLETED"}, 240)
    assert [(cluster.field(task, "JobState"), cluster.field(task, "Restarts")) for task in (a, b, c)] == [
        ("CANCELLED", "0"),
        ("COMPLETED", "1"),
        ("COMPLETED", "1"),
    ]
    assert_same(weights(tmp_path / "b"), weights(tmp_path / "c"))


@pytest.mark.parametrize(
    "fault, says",
    [
        ("raise ZeroDivisionError('on purpose')", r"rank 3 on {node}: ZeroDivisionError: on purpose"),
        pytest.param(
            "raise OSError('No space left on device')",
            r"rank 3 on {node}: No space left on device",
            marks=slow,
        ),
        pytest.param(
            "os.kill(os.getpid(), signal.SIGKILL)", r"srun: error: {node}: task 3: Killed", marks=slow
        ),
    ],
)
def test_one_failing_rank_ends_the_job(send, preset, fault, says):
    sent = send("--wait", preset=preset(f"if step == 6 and os.environ['RANK'] == '3': {fault}"), status=1)
    assert sent.state() == "FAILED" and sent.restarts() == 0
    failures = job.get_failures(sent.folder, sent.id)
    node = sent.nodes()[1]
    assert re.fullmatch(says.format(node=re.escape(node)), failures[0]), failures
    assert (
        f"failed: {failures[0]}" in sent.printed and f"failed: {failures[0]}" in sent.log()
    )  # where it was waited for, and in the log
    assert not any("did not join" in line for line in failures[:-1])


def test_an_array_of_three_presets(send, cluster, tmp_path, monkeypatch, small, capsys):
    for name in "abc":
        (tmp_path / f"{name}.py").write_text(
            f"from config.debug import *\nrun_dir = 'runs/{name}'\nseed = {ord(name)}\nmax_steps = 2\n"
        )
    monkeypatch.chdir(tmp_path)
    flags = [*RUN, "--dp_shard", "None", "--data_dir", str(small)]
    shape = "--gpus_per_node 1 --cpus_per_task 1 --wait".split()
    assert submit.main([*shape, "a.py", "b.py", "c.py", *flags]) == 0
    printed = capsys.readouterr().out
    jobs = re.findall(r"^job (\d+)_(\d):", printed, re.MULTILINE)
    assert len({array for array, _ in jobs}) == 1 and [task for _, task in jobs] == list("012")
    for name in "abc":
        assert (
            events(tmp_path / "runs" / name)[0]["event"] == "start"
            and (tmp_path / "runs" / name / "checkpoints/latest").exists()
        )
        assert json.loads((tmp_path / "runs" / name / "config.json").read_text())["seed"] == ord(name)
    assert len(cluster(f"squeue -h -r -t CD -j {jobs[0][0]}").splitlines()) == 3


# ---- refused


def left(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


BAD = {
    "--nodes 0": "nodes must be above 0, not 0",
    "--gpus_per_node 0": "gpus_per_node must be above 0, not 0",
    "--cpus_per_task 0": "cpus_per_task must be above 0, not 0",
    "--hours 0": "hours must be above 0, not 0",
    "--hours nan": "hours must be above 0, not nan",
    "--max_requeues -1": "max_requeues must not be negative, not -1",
    "--nodes two": "two",
    "--node 2": "unknown flag --node, did you mean nodes?",
    "--lrr 2": "unknown flag --lrr, did you mean lr?",
    "--lr fast": "fast",
    "-p gpu": "-p is neither a flag nor a preset",
    "--wait stray": "stray is neither a flag nor a preset",
    "config/nope.py": "no such preset: config/nope.py",
    "--cluster local --nodes 2": "--cluster local has one node, not 2",
    "--nodes 5 --gpus_per_node 3": "batch_size 96 can't be divided over 15 GPUs",
    "--epochs 1": "lr_warmup_steps 125 leaves nothing of the 6 steps of 1 epochs",
    "--batch_size 960 --gpus_per_node 4": "batch_size is 240 on 4 rank(s): expected 1 to 600 in all",
    "--num_classes 9": "has 10 classes, expected 9: say --num_classes 10",
    "--train_samples 601": "a training subset of 601 images was asked for",
    "--cluster debug --gpus_per_node=2": "--cluster debug runs one preset in this one process",
    "--cluster debug --data_dir nowhere": "work/nowhere: make it with",
    "--grad_accum_steps 2 --gpus_per_node 32": "batch_size 96 can't be divided over 32 GPUs × 2 accumulation steps",
    "--data_dir nowhere": "work/nowhere: make it with",
    "--data_dir nowhere --loader ffcv": "nowhere/train.beton is not there: make it with",
    "--folder /dev/null/jobs": "can't write to /dev/null/jobs",
    "--run_dir /proc/run": "can't write to /proc/run",
    "--run_dir taken": "taken already holds a run",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, small, flags):
    monkeypatch.setattr(
        submit.shutil, "which", lambda name: f"/usr/bin/{name}"
    )  # a Slurm that would be asked last
    monkeypatch.setattr(submit, "check_with_slurm", lambda *args: pytest.fail("Slurm was asked"))
    (tmp_path / "work/taken/checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    before = left(tmp_path)
    words = flags.split()
    preset = [] if any(word.endswith(".py") for word in words) else [DEBUG]
    assert (
        submit.main(
            [
                *preset,
                "--loader",
                "folder",
                "--data_dir",
                str(small),
                "--gpus_per_node",
                "1",
                "--epochs",
                "50",
                "--train_samples",
                "None",
                *words,
            ]
        )
        == 2
    )
    printed = capsys.readouterr()
    assert (
        BAD[flags] in printed.err and printed.err.startswith("error: ") and len(printed.err.splitlines()) == 1
    )
    assert left(tmp_path) == before


def test_no_slurm_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(submit.shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert submit.main(["--nodes", "16"]) == 2
    assert "there is no Slurm here (no sbatch)" in capsys.readouterr().err and left(tmp_path) == []


@pytest.mark.parametrize(
    "flags, says",
    [
        (
            "--partition nope",
            "Slurm refuses the job: Invalid partition name specified (partitions: main, high)",
        ),
        ("--nodes 17", "partition main has 16 nodes, not 17"),
        ("--nodes 34 --partition high", "partition high has 16 nodes, not 34"),
        ("--gpus_per_node 8", "Slurm refuses the job: Requested node configuration is not available"),
        ("--exclude nid001", "Slurm refuses the job: Invalid node name specified"),
        ("--constraint h100", "Slurm refuses the job: Invalid feature specification"),
    ],
)
def test_slurm_refuses_what_it_has_not(cluster, tmp_path, monkeypatch, capsys, small, flags, says):
    monkeypatch.chdir(tmp_path)
    assert (
        submit.main(
            [
                DEBUG,
                *RUN,
                "--data_dir",
                str(small),
                "--gpus_per_node",
                "1",
                "--dp_shard",
                "1",
                "--batch_size",
                "272",
                "--train_samples",
                "600",
                *flags.split(),
            ]
        )
        == 2
    )
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1 and f"error: {says}" in printed
    assert left(tmp_path) == []


def test_a_run_is_submitted_once_at_a_time(cluster, send, capsys, small):
    cluster("scontrol update partitionname=main state=down")
    try:
        first = send()
        before = left(first.run_dir.parent)
        assert (
            submit.main(["--gpus_per_node", "2", DEBUG, *RUN, "--data_dir", str(small), "--run_dir", "run"])
            == 2
        )
        assert (
            f"job {first.id} is already waiting or running on {first.run_dir}: scancel {first.id}"
            in capsys.readouterr().err
        )
        assert left(first.run_dir.parent) == before
    finally:
        cluster("scontrol update partitionname=main state=up")


def test_sbatch_that_fails_leaves_nothing(cluster, tmp_path, monkeypatch, capsys, small):
    """Between the question and the submission everything may change."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit, "check_with_slurm", lambda *args: "it would start")
    flags = [
        *RUN,
        "--data_dir",
        str(small),
        "--run_dir",
        "run",
        "--nodes",
        "17",
        "--gpus_per_node",
        "1",
        "--batch_size",
        "68",
        "--dp_shard",
        "1",
        "--train_samples",
        "600",
    ]
    assert submit.main([DEBUG, *flags]) == 2
    assert (
        "error: sbatch: error: Batch job submission failed: " in capsys.readouterr().err
        and left(tmp_path) == []
    )


# ---- what is written


def test_dry_run_prints_what_would_be_submitted_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    """With nothing but the number of nodes: the paper's run. Without Slurm, and without data, which it says."""
    monkeypatch.setattr(submit.shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert (
        submit.main(["--nodes", "16", "--dry_run", "--partition", "gpu", "--hours", "2.5", "--qos", "high q"])
        == 0
    )
    printed = capsys.readouterr()
    assert (
        f"{tmp_path}/runs/vit_l16_in1k: 4096 images a step = 64 GPUs × 1 accumulation step × 64 images"
        in printed.out
    )
    for line in (
        "--nodes=16",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=8",
        "--time=150",
        "--partition=gpu",
        "--requeue",
        "--qos='high q'",
        "--signal=USR2@300",
        "--open-mode=append",
        f"--comment={tmp_path}/runs/vit_l16_in1k",
    ):
        assert f"#SBATCH {line}\n" in printed.out
    assert "--kill-on-bad-exit=1" in printed.out and "--array" not in printed.out
    config = json.loads(printed.out[printed.out.index("\n{\n") :])
    assert (config["model"], config["epochs"], config["data_dir"]) == (
        "L/16",
        300,
        f"{tmp_path}/datasets/imagenet",
    )
    assert printed.err.startswith("warning: ") and "datasets/imagenet/train.beton is not there" in printed.err
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "nodes, flags, expected",
    [
        (16, "", "64 GPUs × 1 accumulation step × 64 images"),
        (4, "", "16 GPUs × 2 accumulation steps × 128 images"),
        (2, "", "8 GPUs × 4 accumulation steps × 128 images"),
        (1, "", "4 GPUs × 8 accumulation steps × 128 images"),
        (2, "--grad_accum_steps 8", "8 GPUs × 8 accumulation steps × 64 images"),
        (2, "--activation_checkpointing block", "8 GPUs × 1 accumulation step × 512 images"),
        (3, "--batch_size 4092", "12 GPUs × 11 accumulation steps × 31 images"),
    ],
)
def test_the_batch_stays_whatever_the_nodes(tmp_path, monkeypatch, capsys, nodes, flags, expected):
    monkeypatch.chdir(tmp_path)
    assert submit.main(["--nodes", str(nodes), "--dry_run", "--dtype", "bfloat16", *flags.split()]) == 0
    assert f"images a step = {expected}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("--nodes 2 config/a.py --lr 1", (["--nodes", "2"], ["config/a.py"], ["--lr", "1"])),
        (
            "config/a.py --nodes=2 b.py --lr=1 c.py",
            (["--nodes=2"], ["config/a.py", "b.py", "c.py"], ["--lr=1"]),
        ),
        (
            "--target_modules q k v a.py --dry_run b.py",
            (["--dry_run", "True"], ["a.py", "b.py"], ["--target_modules", "q", "k", "v"]),
        ),
        (
            "--dry-run False --wait --resume True",
            (["--dry-run", "False", "--wait", "True"], [], ["--resume", "True"]),
        ),
        ("--baseline runs/x.py --nodes 1", (["--nodes", "1"], [], ["--baseline", "runs/x.py"])),
    ],
)
def test_flags_find_their_way(argv, expected):
    assert submit.split_argv(argv.split()) == expected


def test_the_script_is_the_one_that_slurm_gets(send, cluster, capsys, monkeypatch):
    scripts = []
    monkeypatch.setattr(
        submit,
        "get_script",
        lambda *args, original=submit.get_script: scripts.append(original(*args)) or scripts[-1],
    )
    cluster("scontrol update partitionname=main state=down")
    try:
        sent = send()
    finally:
        cluster(f"scancel {sent.id}; scontrol update partitionname=main state=up")
    assert (sent.folder / f"{sent.id}_submission.sh").read_text() == scripts[0]


def test_a_resumed_run_accumulates_for_the_gpus_it_has_now(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stored = dataclasses.asdict(train.load_preset(str(REPO / submit.PAPER))) | {
        "grad_accum_steps": 4,
        "run_dir": "run",
    }
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps(stored))
    for flags in ("", str(REPO / submit.PAPER)):
        assert (
            submit.main(
                [*flags.split(), "--nodes", "16", "--dry_run", "--run_dir", "run", "--resume", "True"]
            )
            == 0
        )
        assert "64 GPUs × 1 accumulation step × 64 images" in capsys.readouterr().out


def test_presets_from_elsewhere_are_copied_each_time(tmp_path, monkeypatch, small, capsys):
    """Also where their path climbs out of the repository."""
    monkeypatch.chdir(tmp_path)
    climbing = REPO / os.path.relpath(tmp_path / "mine.py", REPO)
    for seed in (1, 2):
        (tmp_path / "mine.py").write_text(f"from config.debug import *\nseed = {seed}\n")
        _, (run,) = submit.parse(["--dry_run", "--gpus_per_node", "1", str(climbing)])
        code = tmp_path / f"jobs/{seed}/code"
        preset = Path(run.get_argv(code)[0])
        assert preset.is_relative_to(code) and f"seed = {seed}" in preset.read_text()
    assert left(tmp_path / "jobs/1") != [] and not list((tmp_path / "jobs").glob("*.py"))
    _, (run,) = submit.parse(["--dry_run", "--gpus_per_node", "1", DEBUG])
    assert run.get_argv(code)[0] == str(code / "config/debug.py")


def test_sbatch_is_asked_and_told_under_the_same_variables(cluster, send, monkeypatch):
    """Those of a job that submit.py is called from are gone, a user's for sbatch stay."""
    monkeypatch.setenv("SBATCH_PARTITION", "high")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("RANK", "3")
    sent = send("--max_steps", "1")
    cluster(f"scancel {sent.id}")
    assert cluster.field(sent.id, "Partition") == "high" and "in partition high" in sent.printed
    assert os.environ["RANK"] == "3"


def test_a_snapshot_is_code(tmp_path, monkeypatch, capsys, small):
    """Here the repository has 300 MB of something that git doesn't ignore."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repo").mkdir()
    subprocess.run(["git", "init", "-q", "repo"], check=True)
    with open("repo/weights.bin", "wb") as file:
        file.truncate(300_000_000)
    monkeypatch.setattr(submit, "ROOT", tmp_path / "repo")
    assert (
        submit.main(
            [
                "--cluster",
                "local",
                "--gpus_per_node",
                "1",
                DEBUG,
                *RUN,
                "--dp_shard",
                "1",
                "--data_dir",
                str(small),
            ]
        )
        == 2
    )
    assert (
        "a snapshot of the code would have 300 MB, weights.bin the most: put what is not code in .gitignore"
        in capsys.readouterr().err
    )
    assert not Path("runs").exists()
    shutil.rmtree("repo/.git")
    assert (
        submit.main(
            [
                "--cluster",
                "local",
                "--gpus_per_node",
                "1",
                DEBUG,
                *RUN,
                "--dp_shard",
                "1",
                "--data_dir",
                str(small),
            ]
        )
        == 2
    )
    assert "git can't list the files" in capsys.readouterr().err and not Path("runs").exists()


def test_bad_presets_of_an_array(tmp_path, monkeypatch, capsys, small):
    monkeypatch.chdir(tmp_path)
    Path("other.py").write_text("from config.debug import *\n")
    assert submit.main([DEBUG, "other.py", "--dry_run", "--gpus_per_node", "1"]) == 2
    assert "have the same run_dir" in capsys.readouterr().err


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
    with pytest.raises(ValueError, match="PALS says nothing about the first node: export MASTER_ADDR"):
        job.get_environment(MPI)
    with pytest.raises(ValueError, match=r"different numbers of tasks, 2,1: use --ntasks-per-node"):
        job.get_environment(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2,1"})


# ---- a rank's end

SCONTROL = """#!/bin/sh
[ "$1" = show ] && { echo "JobId=7 JobState=%(state)s Reason=None Requeue=1 Restarts=%(restarts)d BatchFlag=1"; exit 0; }
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
        "rank 0 of 3 on n1: start 0\nerror: an old one\nrank 0 of 3 on n1: start 1\n 5%|bar\rerror: rank 2 did not join broadcast\n"
        " 6%|barsrun: error: n2: task 2: Killed\nsrun: Terminating StepId=9.0\nsrun: error: n1: task 0: Killed\n"
    )
    (tmp_path / "9_1_log.out").write_text(
        "rank 1 of 3 on n1: start 1\nTraceback\n  raise x\nValueError: x\nrank 1: error: ValueError: x\n"
    )
    (tmp_path / "9_2_log.out").write_text("rank 2 of 3 on n2: start 1\n")
    (tmp_path / "8_0_log.out").write_text(
        "rank 0 of 1 on n1: start 0\nsrun: error: n1: task 0: Exited with exit code 2\n"
    )
    (tmp_path / "99_0_log.out").write_text("rank 0 of 3 on n1: start 0\nerror: another job's\n")
    assert job.get_failures(tmp_path, "9") == [
        "rank 1 on n1: ValueError: x",
        "srun: error: n2: task 2: Killed",
        "rank 0 on n1: rank 2 did not join broadcast",
    ]
    assert job.get_failures(tmp_path, "8") == ["srun: error: n1: task 0: Exited with exit code 2"]


# ---- without Slurm


def test_cluster_local(tmp_path, monkeypatch, capfd, small, preset):
    """As processes of this machine, two jobs at once: one that is told to stop starts again by itself, one that is cancelled ends."""
    monkeypatch.chdir(tmp_path)
    for name, target in (
        ("goes_on", "os.getpid(), signal.SIGUSR2"),
        ("ends", "os.getppid(), signal.SIGTERM"),
    ):
        once = f"os.environ['RANK'] == '1' and not os.path.exists('{tmp_path}/{name}')"
        preset(
            f"if step == 6 and {once}: open('{tmp_path}/{name}', 'w').close(); os.kill({target})",
            name,
            f"run_dir = 'runs/{name}'\n",
        )
    assert (
        submit.main(
            [
                "--cluster",
                "local",
                "--gpus_per_node",
                "2",
                "--wait",
                "goes_on.py",
                "ends.py",
                *RUN,
                "--max_steps",
                "12",
                "--data_dir",
                str(small),
            ]
        )
        == 1
    )
    printed = capfd.readouterr().out
    first, second = re.findall(r"^job (\d+):", printed, re.MULTILINE)
    assert (
        f"job {first}, {tmp_path}/runs/goes_on: COMPLETED" in printed
        and f"job {second}, {tmp_path}/runs/ends: FAILED" in printed
    )
    logs = [
        next((tmp_path / "runs/jobs").glob(f"*/{job_id}_0_log.out")).read_text() for job_id in (first, second)
    ]
    assert [len(re.findall(r"^rank 0 of 2 on", log, re.MULTILINE)) for log in logs] == [2, 1]
    assert all("saved at step 7" in log for log in logs) and "SIGTERM" in logs[1]
    assert events(tmp_path / "runs/goes_on", "epoch")[-1]["step"] == 12


def test_cluster_debug(tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    assert (
        submit.main(
            [
                "--cluster",
                "debug",
                DEBUG,
                *RUN,
                "--dp_shard",
                "None",
                "--max_steps",
                "4",
                "--data_dir",
                str(small),
                "--run_dir",
                "run",
            ]
        )
        == 0
    )
    assert events(tmp_path / "run", "epoch")[-1]["step"] == 4
    # a fork of it, with its settings and not the paper's; one that can't be is refused at once
    assert (
        submit.main(
            [
                "--cluster",
                "debug",
                "--dp_shard",
                "None",
                "--fork",
                "run",
                "--run_dir",
                "forked",
                "--max_steps",
                "8",
            ]
        )
        == 0
    )
    assert [e["step"] for e in events(tmp_path / "forked", "epoch")] == [4, 8] and events(
        tmp_path / "forked", "start"
    )[0]["epoch"] == 1
    assert (
        submit.main(["--cluster", "debug", "--dp_shard", "None", "--fork", "run@7", "--run_dir", "other"])
        == 2
    )
    assert not (tmp_path / "other").exists()


@slow
@pytest.mark.parametrize(
    "names",
    [
        "PMI_RANK PMI_SIZE PMI_LOCAL_RANK PMI_LOCAL_SIZE",
        "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE",
    ],
)
def test_ranks_that_mpiexec_starts(tmp_path, small, names):
    """Two processes with the variables its ranks find."""
    ranks = []
    for rank in range(2):
        env = (
            os.environ
            | dict(zip(names.split(), map(str, (rank, 2, rank, 2))))
            | {"PBS_JOBID": f"{os.getpid()}.pbs", "OMP_NUM_THREADS": "1"}
        )
        ranks.append(
            subprocess.Popen(
                [
                    sys.executable,
                    REPO / "launch/job.py",
                    DEBUG,
                    *RUN,
                    "--max_steps",
                    "1",
                    "--data_dir",
                    small,
                    "--run_dir",
                    "run",
                ],
                cwd=tmp_path,
                env=env,
            )
        )
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    assert events(tmp_path / "run", "start")[0]["world_size"] == 2


@slow
def test_smoke_preset(tmp_path):
    """Of another size, but all three phases in 36 steps without any data."""
    done = subprocess.run(
        [
            sys.executable,
            "train.py",
            "config/smoke.py",
            "--model",
            "Ti/16",
            "--batch_size",
            "4",
            "--train_samples",
            "16",
            "--run_dir",
            tmp_path / "run",
            "--compile",
            "False",
            "--dtype",
            "float32",
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    epochs = events(tmp_path / "run", "epoch")
    assert [e["phase"] for e in epochs] == ["full"] * 3 + ["warmup"] * 3 + ["lora"] * 3 and epochs[-1][
        "step"
    ] == 36
