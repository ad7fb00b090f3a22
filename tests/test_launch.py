"""Real jobs, on a real Slurm and without one: preempted, killed, requeued, refused."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from slurm_cluster import SlurmCluster, is_installed, wait
from small_runs import assert_same, events, weights, without_times
from test_submit import DEBUG, REPO, RUN, left

from launch import lock, logs, snapshot, submit

slow = pytest.mark.slow
# 20 steps, where nothing has to happen in between: full 1-3, warmup 4, lora 5.
SHORT = "--epochs 5 --lora_warmup_epochs 1".split()


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
    """send(*argv) -> Submitted: `submit.py` with two ranks on each of two nodes, as a user's shell in
    tmp_path would run it.
    """
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
    """torchrun(world_size, *flags): the same run by torchrun, without Slurm and without interruption, made
    once.
    """
    require_slurm(is_installed())  # nothing to compare with
    made = {}

    def make(world_size=4, *flags):
        if (world_size, flags) not in made:
            run_dir = tmp_path_factory.mktemp("torchrun") / "run"
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
            argv = ["config/debug.py", *RUN, "--data_dir", small, "--run_dir", run_dir, *flags]
            command = [sys.executable, *launcher, "train.py", *argv]
            done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            made[world_size, flags] = run_dir
        return made[world_size, flags]

    return make


def assert_same_as(reference, run_dir):
    """Records and the last checkpoint's weights and moments, to the bit."""
    kept = lambda path: [r for r in without_times(events(path)) if r["event"] != "warning"]
    assert kept(run_dir) == kept(reference)
    assert [(s["from"], s["to"]) for s in events(run_dir, "switch")] == [
        ("full", "warmup"),
        ("warmup", "lora"),
    ]
    assert_same(weights(run_dir), weights(reference))


# ---- on Slurm


@slow
@pytest.mark.parametrize("gpus", [1, 2])
def test_two_nodes_give_what_torchrun_gives(send, torchrun, gpus):
    sent = send(*SHORT, "--gpus_per_node", gpus)
    sent.wait()
    assert_same_as(torchrun(2 * gpus, *SHORT), sent.run_dir)
    start, epochs = events(sent.run_dir, "start")[0], events(sent.run_dir, "epoch")
    first, second = sent.nodes()
    assert start["hosts"] == [first] * gpus + [second] * gpus and start["world_size"] == 2 * gpus
    places = {
        1: f"ranks: [0] on {first}, [1] on {second}",
        2: f"ranks: [0, 1] on {first}, [2, 3] on {second}",
    }
    assert places[gpus] in sent.log()
    for slowest in (e["slowest_rank"] for e in epochs):
        assert slowest["host"] == start["hosts"][slowest["rank"]]
        assert 0 <= slowest["data_wait_seconds"] < slowest["step_seconds"]
        assert slowest["step_seconds"] >= slowest["median_step_seconds"] > 0
    last = 2 * gpus - 1
    assert f"rank {last} of {2 * gpus} on {second}: start 0" in sent.log(last)
    assert sent.restarts() == 0 and not logs.get_failures(sent.folder, sent.id)


ONE_EACH = ("--gpus_per_node", 1)  # on each of the two nodes: a start takes half the time
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
    shape, ranks = ((), 4) if fault in ("usr2", "preemption") else (ONE_EACH, 2)
    sent = send(*shape)
    sent.wait_for_epoch(epoch) if epoch else wait(
        lambda: all("start 0" in sent.log(rank) for rank in range(ranks)), 60
    )
    inject(cluster, sent)
    wait(lambda: sent.restarts() == 1, 60)
    sent.wait()
    assert sent.restarts() == 1 and "start 1" in sent.log()
    assert ("requeueing job" in sent.log()) == by_rank_0 and not (sent.run_dir / "lock").exists()
    assert_same_as(torchrun(ranks), sent.run_dir)


PATCHED = """
from config.debug import *
import os
import signal
import time
import errors
import train
_get_lr = train.get_lr
def _patched(step, **schedule):
    {patch}
    return _get_lr(step, **schedule)
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
    sent = send(*ONE_EACH, preset=preset("time.sleep(1.5)"))
    sent.wait_for_epoch(2)
    node = sent.nodes()[1]
    cluster.kill_node(node)
    wait(lambda: sent.restarts() == 1, 90)
    cluster.start_node(node)
    sent.wait(timeout=400)
    assert sent.restarts() == 1 and "requeueing job" not in sent.log()
    assert_same_as(torchrun(2), sent.run_dir)


@slow
def test_a_job_that_is_started_again_gets_its_lock_back(send, cluster, torchrun):
    """On another node, after its process 0 was killed. Until then Slurm says whether the job is there."""
    sent = send(*ONE_EACH)
    sent.wait_for_epoch(2)
    holder = json.loads((sent.run_dir / "lock").read_text())
    assert (holder["job"], holder["restarts"], holder["host"]) == (sent.id, "0", sent.nodes()[0])
    elsewhere = lock.describe_self({}) | {"boot": "another machine's"}
    assert lock.is_alive(holder, elsewhere) is True
    os.kill(holder["pid"], signal.SIGKILL)
    sent.wait("FAILED")
    assert lock.is_alive(holder, elsewhere) is False
    (sent.run_dir / "lock").write_text(json.dumps(holder | {"boot": "another machine's"}))
    cluster(f"scontrol requeue {sent.id}")
    wait(lambda: sent.restarts() == 1, 60)
    sent.wait()
    left_by = f"process {holder['pid']} on {holder['host']} of job {sent.id}"
    assert f"lock was left by {left_by}, which is gone: taken over" in sent.log()
    assert not (sent.run_dir / "lock").exists()
    assert_same_as(torchrun(2), sent.run_dir)


@slow
def test_goes_on_past_its_time_limit(send, preset, torchrun):
    """Two minutes, whose end Slurm announces 30 to 60 seconds before."""
    sent = send("--hours", 2 / 60, *ONE_EACH, preset=preset("time.sleep(2.5)"))
    sent.wait(timeout=500)
    assert sent.restarts() >= 1 and "requeueing job" in sent.log()
    assert_same_as(torchrun(2), sent.run_dir)


@slow
def test_sixteen_nodes_agree(send):
    sent = send("--nodes", 16, "--gpus_per_node", 1, "--max_steps", 1, "--dp_shard", "None")
    sent.wait(timeout=400)
    start = events(sent.run_dir, "start")[0]
    assert start["world_size"] == 16 and len(set(start["hosts"])) == 16
    assert start["mesh"] == {"dp_replicate": 16, "dp_shard": 1}
    meta = json.loads((sent.run_dir / "checkpoints/step_00000001/meta.json").read_text())
    assert meta["state"]["step"] == 1


@slow
def test_an_edit_after_the_submission_reaches_nothing(cluster, send, small, tmp_path, monkeypatch):
    """Neither the first start, which comes after it, nor the one after a requeue; nor does an edit of the
    preset.
    """
    clone = tmp_path / "clone"
    snapshot.take_snapshot(clone)
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
        wait(lambda task=task: cluster.field(task, "Restarts") == "1", 60)
    wait(lambda: {cluster.field(task, "JobState") for task in (b, c)} == {"COMPLETED"}, 240)
    assert [(cluster.field(task, "JobState"), cluster.field(task, "Restarts")) for task in (a, b, c)] == [
        ("CANCELLED", "0"),
        ("COMPLETED", "1"),
        ("COMPLETED", "1"),
    ]
    assert_same(weights(tmp_path / "b"), weights(tmp_path / "c"))


@pytest.mark.parametrize(
    "gpus, fault, says",
    [
        (1, "raise ZeroDivisionError('on purpose')", r"rank 1 on {node}: ZeroDivisionError: on purpose"),
        pytest.param(
            2,
            "raise ZeroDivisionError('on purpose')",
            r"rank 3 on {node}: ZeroDivisionError: on purpose",
            marks=slow,
        ),
        pytest.param(
            2,
            "raise errors.UserError('No space left on device')",
            r"rank 3 on {node}: No space left on device",
            marks=slow,
        ),
        pytest.param(
            2, "os.kill(os.getpid(), signal.SIGKILL)", r"srun: error: {node}: task 3: Killed", marks=slow
        ),
    ],
)
def test_one_failing_rank_ends_the_job(send, preset, gpus, fault, says):
    """The last one, on the second of two nodes: a bug, what a machine refuses, a kill."""
    patch = f"if step == 6 and os.environ['RANK'] == '{2 * gpus - 1}': {fault}"
    sent = send("--wait", "--gpus_per_node", gpus, preset=preset(patch), status=1)
    assert sent.state() == "FAILED" and sent.restarts() == 0
    failures = logs.get_failures(sent.folder, sent.id)
    node = sent.nodes()[1]
    assert re.fullmatch(says.format(node=re.escape(node)), failures[0]), failures
    assert f"failed: {failures[0]}" in sent.printed  # where it was waited for
    assert f"failed: {failures[0]}" in sent.log()
    assert not any("did not join" in line for line in failures[:-1])


@slow
@pytest.mark.parametrize("names", ["ab", "abc"])
def test_an_array_of_presets(send, cluster, tmp_path, monkeypatch, small, capsys, names):
    for name in names:
        text = f"from config.debug import *\nrun_dir = 'runs/{name}'\nseed = {ord(name)}\nmax_steps = 2\n"
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    flags = [*RUN, "--dp_shard", "None", "--data_dir", str(small)]
    shape = "--gpus_per_node 1 --cpus_per_task 1 --wait".split()
    assert submit.main([*shape, *(f"{name}.py" for name in names), *flags]) == 0
    printed = capsys.readouterr().out
    jobs = re.findall(r"^job (\d+)_(\d):", printed, re.MULTILINE)
    assert len({array for array, _ in jobs}) == 1
    assert [task for _, task in jobs] == list("012"[: len(names)])
    for name in names:
        run_dir = tmp_path / "runs" / name
        assert events(run_dir)[0]["event"] == "start" and (run_dir / "checkpoints/latest").exists()
        assert json.loads((run_dir / "config.json").read_text())["seed"] == ord(name)
    assert len(cluster(f"squeue -h -r -t CD -j {jobs[0][0]}").splitlines()) == len(names)


@slow
def test_gpus_as_gres_and_none_at_all(cluster, send, monkeypatch):
    """What each job got, by Slurm, and that its processes ran. In either a process sees no GPU here."""
    monkeypatch.setitem(submit.SITE, "extra", {"gpus-per-node": None, "gres": "gpu:4"})
    short = ("--nodes", 1, "--max_steps", 1)
    by_gres = send(*short, "--gpus_per_node", 2, run_dir="by_gres")
    without = send(*short, "--gpus_per_node", 0, "--tasks_per_node", 2, run_dir="without")
    assert f"job {without.id}: 1 × 2 CPU processes, 1 hours a start" in without.printed
    for sent, gpus in ((by_gres, "gres:gpu:4"), (without, "")):
        sent.wait()
        assert cluster.field(sent.id, "TresPerNode") == gpus
        start = events(sent.run_dir, "start")[0]
        assert (start["world_size"], len(set(start["hosts"]))) == (2, 1)


# ---- what Slurm is asked and told


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


@pytest.mark.parametrize("name", ["run", "b=1:c=2,3 'ä%41'"])
def test_a_run_is_submitted_once_at_a_time(cluster, send, capsys, small, name):
    cluster("scontrol update partitionname=main state=down")
    try:
        first = send(run_dir=name)
        before = left(first.run_dir.parent)
        assert (
            submit.main(["--gpus_per_node", "2", DEBUG, *RUN, "--data_dir", str(small), "--run_dir", name])
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


def test_sbatch_is_asked_and_told_under_the_same_variables(cluster, send, monkeypatch):
    """Those of a job that submit.py is called from are gone, a user's for sbatch stay."""
    monkeypatch.setenv("SBATCH_PARTITION", "high")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("RANK", "3")
    sent = send("--max_steps", "1")
    cluster(f"scancel {sent.id}")
    assert cluster.field(sent.id, "Partition") == "high" and "in partition high" in sent.printed
    assert os.environ["RANK"] == "3"


# ---- without Slurm


@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=slow)])
def test_cluster_local(tmp_path, monkeypatch, capfd, small, preset, gpus):
    """As processes of this machine, two jobs at once: one that is told to stop starts again by itself, one
    that is cancelled ends.
    """
    monkeypatch.chdir(tmp_path)
    targets = {"goes_on": "os.getpid(), signal.SIGUSR2", "ends": "os.getppid(), signal.SIGTERM"}
    for name, target in targets.items():
        once = f"os.environ['RANK'] == '{gpus - 1}' and not os.path.exists('{tmp_path}/{name}')"
        patch = f"if step == 6 and {once}: open('{tmp_path}/{name}', 'w').close(); os.kill({target})"
        preset(patch, name, f"run_dir = 'runs/{name}'\n")
    shape = f"--cluster local --gpus_per_node {gpus} --wait goes_on.py ends.py".split()
    flags = ["--max_steps", "12", "--dp_shard", str(gpus), "--data_dir", str(small)]
    assert submit.main([*shape, *RUN, *flags]) == 1
    printed = capfd.readouterr().out
    first, second = re.findall(r"^job (\d+):", printed, re.MULTILINE)
    assert f"job {first}, {tmp_path}/runs/goes_on: COMPLETED" in printed
    assert f"job {second}, {tmp_path}/runs/ends: FAILED" in printed
    paths = [next((tmp_path / "runs/jobs").glob(f"*/{number}_0_log.out")) for number in (first, second)]
    texts = [path.read_text() for path in paths]
    starts = [len(re.findall(rf"^rank 0 of {gpus} on", text, re.MULTILINE)) for text in texts]
    assert starts == [2, 1]
    assert all("saved at step 7" in text for text in texts) and "SIGTERM" in texts[1]
    assert events(tmp_path / "runs/goes_on", "epoch")[-1]["step"] == 12


def test_cluster_debug(tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    flags = ["--max_steps", "4", "--data_dir", str(small), "--run_dir", "run"]
    shape = "--cluster debug --dp_shard None".split()
    assert submit.main(["--cluster", "debug", DEBUG, *RUN, "--dp_shard", "None", *flags]) == 0
    assert events(tmp_path / "run", "epoch")[-1]["step"] == 4
    # a fork of it, with its settings and not the paper's; one that can't be is refused at once
    assert submit.main([*shape, *"--fork run --run_dir forked --max_steps 8".split()]) == 0
    assert [e["step"] for e in events(tmp_path / "forked", "epoch")] == [4, 8]
    assert events(tmp_path / "forked", "start")[0]["epoch"] == 1
    assert submit.main([*shape, *"--fork run@7 --run_dir other".split()]) == 2
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
    argv = [DEBUG, *RUN, "--max_steps", "1", "--data_dir", small, "--run_dir", "run"]
    for rank in range(2):
        found = dict(zip(names.split(), map(str, (rank, 2, rank, 2))))
        env = os.environ | found | {"PBS_JOBID": f"{os.getpid()}.pbs", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, REPO / "launch/job.py", *argv]
        ranks.append(subprocess.Popen(command, cwd=tmp_path, env=env))
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    assert events(tmp_path / "run", "start")[0]["world_size"] == 2


@slow
def test_smoke_preset(tmp_path):
    """Of another size, but all three phases in 36 steps without any data; with all that timm does to images
    and weights, and on two processes as on one with micro-batches of the same size."""
    shape = "--batch_size 4 --train_samples 16 --compile False --dtype float32".split()
    timms = "--model tiny-debug --image_size 56 --mixup 0.2 --cutmix 1 --random_erasing 0.5 --ema_decay 0.9"
    ways = {
        "plain": [sys.executable, "train.py"],
        "one": [sys.executable, "train.py"],
        "two": ["torchrun", "--standalone", "--nproc_per_node", "2", "train.py"],
    }
    losses = {}
    for name, words in ways.items():
        flags = {
            "plain": "--model Ti/16 --image_size 64",
            "one": f"{timms} --grad_accum_steps 2",
            "two": timms,
        }[name].split()
        flags = ["config/smoke.py", *shape, *flags, "--run_dir", tmp_path / name]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path}
        done = subprocess.run([*words, *flags], cwd=REPO, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        epochs = events(tmp_path / name, "epoch")
        assert [e["phase"] for e in epochs] == ["full"] * 3 + ["warmup"] * 3 + ["lora"] * 3
        assert epochs[-1]["step"] == 36
        keys = ["train_loss", "val_loss"] + ["val_ema_loss"] * (name != "plain")
        losses[name] = torch.tensor([[e[key] for key in keys] for e in epochs])
    torch.testing.assert_close(losses["one"], losses["two"], rtol=1e-3, atol=0)
    assert not torch.allclose(losses["one"][:, 1], losses["one"][:, 2], rtol=1e-4)  # control: averages differ
