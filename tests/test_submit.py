"""launch/submit.py without a cluster: what is refused, what is written, and that it starts without torch."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from config.checks import check_data
from config.cli import load_preset
from data.beton import find_beton
from data.images import open_dataset
from errors import UserError
from launch import snapshot, submit

REPO = Path(__file__).resolve().parent.parent
DEBUG = str(REPO / "config/debug.py")
# 4 steps an epoch, 48 in all: full 1-3 (the test decides), warmup 4-6, lora 7-12. Everything random is on.
RUN = (
    "--loader folder --num_workers 0 --train_samples 64 --epochs 12 --batch_size 16 --lr 1e-3 "
    "--lr_warmup_steps 4 --compile False --dropout 0.1 --mixup 0.2 --tau 90 --zeta 90 --num_windows 2 "
    "--window_epochs 1 --lora_warmup_epochs 3 --dp_shard 2"
).split()
LOCAL = "--cluster local --gpus_per_node 1".split()


def left(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


# ---- refused

BAD = {
    "--nodes 0": "nodes must be above 0, not 0",
    "--gpus_per_node -1": "gpus_per_node must not be negative, not -1",
    "--gpus_per_node 0 --tasks_per_node 0": "tasks_per_node must be above 0, not 0",
    "--gpus_per_node 2 --tasks_per_node 4": "tasks_per_node 4 is for nodes without GPUs (--gpus_per_node 0)",
    "--cpus_per_task 0": "cpus_per_task must be above 0, not 0",
    "--hours 0": "hours must be above 0, not 0",
    "--hours nan": "hours must be above 0, not nan",
    "--max_requeues -1": "max_requeues must not be negative, not -1",
    "--nodes two": "two",
    "--node 2": "unknown flag --node, did you mean nodes?",
    "--lrr 2": "unknown flag --lrr, did you mean lr?",
    "--lr fast": "fast",
    "-p gpu": "-p is neither a flag nor a preset",
    "--gres gpu:4": "unknown flag --gres (sbatch's own options: SITE['extra'] in launch/submit.py)",
    "--config config/x.py": "unknown flag --config: a preset stands first and has no flag, launch/submit.py",
    "--no_compile": "unknown flag --no_compile: say --compile False (sbatch's own",
    "--mail-type FAIL": "unknown flag --mail-type (sbatch's own",
    "--partion gpu": "unknown flag --partion, did you mean partition? (sbatch's own",
    "-nodes 2": "-nodes is no flag: say --nodes",
    "lr=2": "lr=2 is no flag: say --lr=2",
    "--resume": "--resume needs a value: --resume True",
    "--resume --hours 1": "--resume needs a value: --resume True",
    "--wait=true": "--wait takes True or False, not true: --wait True",
    "--wait stray": "stray is neither a flag nor a preset",
    "config/nope.py": "no such preset: config/nope.py",
    "--cluster local --nodes 2": "--cluster local has one node, not 2",
    "--cluster local --partition gpu": "--partition says nothing to --cluster local: leave it out",
    "--cluster local --max_requeues 3": "--max_requeues says nothing to --cluster local: leave it out",
    "--cluster debug --hours 2": "--hours says nothing to --cluster debug: leave it out",
    "--cluster debug --gpus_per_node 0 --tasks_per_node 2": "--cluster debug runs one preset in this one",
    "--gpus_per_node 0 --tasks_per_node 5": "batch_size 96 can't be divided over 5 CPU processes",
    "--nodes 5 --gpus_per_node 3": "batch_size 96 can't be divided over 15 GPUs",
    "--epochs 1 --lr_warmup_steps 6": "lr_warmup_steps 6 leaves nothing of the 6 steps of 1 epochs",
    "--batch_size 960 --gpus_per_node 4": "batch_size is 240 on 4 rank(s): expected 1 to 600 in all",
    "--num_classes 9": "has 10 classes, expected 9: say --num_classes 10",
    "--train_samples 601": "a training subset of 601 images was asked for",
    "--cluster debug --gpus_per_node=2": "--cluster debug runs one preset in this one process",
    "--cluster debug --data_dir nowhere": "work/nowhere: make it with",
    "--grad_accum_steps 2 --gpus_per_node 32": (
        "batch_size 96 can't be divided over 32 GPUs × 2 accumulation steps"
    ),
    "--data_dir nowhere": "work/nowhere: make it with",
    "--data_dir nowhere --loader ffcv": "nowhere/train.beton is not there: make it with",
    "--folder /dev/null/jobs": "can't write to /dev/null/jobs",
    "--run_dir /proc/run": "can't write to /proc/run",
    "--run_dir taken": "taken already holds a run",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, small, flags):
    # a Slurm, which would be asked last
    monkeypatch.setattr(submit.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(submit, "check_with_slurm", lambda *args: pytest.fail("Slurm was asked"))
    (tmp_path / "work/taken/checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    before = left(tmp_path)
    words = flags.split()
    preset = [] if any(word.endswith(".py") for word in words) else [DEBUG]
    data = ["--loader", "folder", "--data_dir", str(small), "--train_samples", "None", "--epochs", "50"]
    assert submit.main([*preset, *data, "--gpus_per_node", "1", *words]) == 2
    printed = capsys.readouterr()
    assert BAD[flags] in printed.err
    assert printed.err.startswith("error: ") and len(printed.err.splitlines()) == 1
    assert left(tmp_path) == before


def test_a_bug_is_no_mistake(tmp_path, monkeypatch, capsys):
    """A mistake is one line and status 2; a bug ends with its traceback, whatever its type."""
    monkeypatch.chdir(tmp_path)
    argv = [*LOCAL, DEBUG, "--loader", "synthetic"]
    for bug in (ValueError, RuntimeError, OSError):
        monkeypatch.setattr(submit, "check_run", lambda *args, bug=bug: raise_(bug("a bug")))
        with pytest.raises(bug, match="a bug"):
            submit.main(argv)
    capsys.readouterr()
    monkeypatch.setattr(submit, "check_run", lambda *args: raise_(UserError("a mistake")))
    assert submit.main(argv) == 2
    assert capsys.readouterr().err == "error: a mistake\n"


def raise_(error):
    raise error


@pytest.mark.parametrize(
    "changes, images, classes, says",
    [
        ({}, 95, None, "batch_size 96 is above the 95 training images"),
        ({"profile": True}, 200, None, "profile needs epochs of 3 steps and more, 200 images are 2 of"),
        (
            {"lr_warmup_steps": 36},
            200,
            None,
            "lr_warmup_steps 36 leaves nothing of the 36 steps of 18 epochs",
        ),
        (
            {"lr_warmup_steps": 35},
            200,
            ["a", "c"],
            "do not have the same classes: only train has b; only val has c",
        ),
        ({"lr_warmup_steps": 35}, 200, ["b", "a"], "'a' in one stands where 'b' does in the other"),
        ({"lr_warmup_steps": 35}, 200, ["a", "b"], None),
        ({"lr_warmup_steps": 35}, 200, None, None),
    ],
)
def test_a_schedule_fits_its_data(changes, images, classes, says):
    cfg = dataclasses.replace(load_preset(submit.Config, DEBUG), **changes)
    if says is None:
        check_data(cfg, images, ["a", "b"], classes)
        return
    with pytest.raises(UserError) as refused:
        check_data(cfg, images, ["a", "b"], classes)
    assert says in str(refused.value)


def test_no_slurm_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(submit.shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert submit.main(["--nodes", "16"]) == 2
    assert "there is no Slurm here (no sbatch)" in capsys.readouterr().err and left(tmp_path) == []


# ---- what is written


def test_dry_run_prints_what_would_be_submitted_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    """With nothing but the number of nodes: the paper's run. Without Slurm; without data, which it says."""
    monkeypatch.setattr(submit.shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    flags = ["--partition", "gpu", "--hours", "2.5", "--qos", "high q"]
    assert submit.main(["--nodes", "16", "--dry_run", *flags]) == 0
    printed = capsys.readouterr()
    run_dir = f"{tmp_path}/runs/vit_l16_in1k"
    assert f"{run_dir}: 4096 images a step = 64 GPUs × 1 accumulation step × 64 images" in printed.out
    options = (
        "--nodes=16 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8 --time=150 --partition=gpu "
        "--requeue --signal=USR2@300 --open-mode=append"
    ).split()
    for line in [*options, "--qos='high q'", f"--comment={run_dir}"]:
        assert f"#SBATCH {line}\n" in printed.out
    assert "--kill-on-bad-exit=1" in printed.out and "--array" not in printed.out
    config = json.loads(printed.out[printed.out.index("\n{\n") :])
    assert (config["model"], config["epochs"]) == ("L/16", 300)
    assert config["data_dir"] == f"{tmp_path}/datasets/imagenet"
    assert printed.err.startswith("warning: ") and "datasets/imagenet/train.beton is not there" in printed.err
    assert left(tmp_path) == []


def get_options(monkeypatch, capsys, extra, *flags):
    """The #SBATCH lines of a dry run at a site with this `extra`, its script, and the process's count."""
    monkeypatch.setitem(submit.SITE, "extra", extra)
    assert submit.main(["--nodes", "2", "--dry_run", DEBUG, "--loader", "synthetic", *flags]) == 0
    script = capsys.readouterr().out
    return {
        line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")
    }, script


PLAIN = {"--gpus-per-node=4", "--ntasks-per-node=4", "--wckey=submitit", "--requeue"}


@pytest.mark.parametrize(
    "extra, flags, changed",
    [
        ({}, "", PLAIN),
        ({"gpus_per_node": None}, "", PLAIN - {"--gpus-per-node=4"}),
        ({"gpus-per-node": None}, "", PLAIN - {"--gpus-per-node=4"}),
        ({"--gpus-per-node": "a100:4"}, "", PLAIN - {"--gpus-per-node=4"} | {"--gpus-per-node=a100:4"}),
        (
            {"gpus_per_node": None, "gres": "gpu:a100:4,lscratch:9", "wckey": None},
            "",
            {"--gres=gpu:a100:4,lscratch:9", "--ntasks-per-node=4", "--requeue"},
        ),
        (
            {"gres": "gpu:a100:{gpus_per_node}", "gpus_per_node": None},
            "--gpus_per_node 2",
            {"--gres=gpu:a100:2", "--ntasks-per-node=2", "--wckey=submitit", "--requeue"},
        ),
        (
            {"gpus_per_node": "a100:2,h100:2"},
            "",
            PLAIN - {"--gpus-per-node=4"} | {"--gpus-per-node=a100:2,h100:2"},
        ),
        (
            {"wckey": "mine", "mail_type": "FAIL", "exclusive": False, "requeue": None, "mem": 0},
            "",
            {"--wckey=mine", "--mail-type=FAIL", "--mem=0", "--gpus-per-node=4", "--ntasks-per-node=4"},
        ),
        # without GPUs nothing asks for one
        ({}, "--gpus_per_node 0", {"--ntasks-per-node=1", "--wckey=submitit", "--requeue"}),
        (
            {"gres": "gpu:a100:4,lscratch:9", "gpus-per-task": 1, "mem_per_gpu": "60G", "exclusive": True},
            "--gpus_per_node 0 --tasks_per_node 3",
            {"--gres=lscratch:9", "--ntasks-per-node=3", "--wckey=submitit", "--requeue", "--exclusive"},
        ),
    ],
)
def test_what_a_site_changes_of_sbatchs_options(tmp_path, monkeypatch, capsys, extra, flags, changed):
    monkeypatch.chdir(tmp_path)
    options, script = get_options(monkeypatch, capsys, extra, *flags.split())
    fixed = ("comment", "cpus-per-task", "job-name", "nodes", "open-mode", "output", "signal", "time")
    assert {option for option in options if not option.startswith(tuple(f"--{x}=" for x in fixed))} == changed
    assert ("export CUDA_VISIBLE_DEVICES=''\n" in script) == ("--gpus_per_node 0" in flags)
    assert "None" not in "".join(options)


def test_the_local_executor_gets_no_sbatch_options(tmp_path, monkeypatch):
    """It sees the GPUs that this shell sees: without CUDA_VISIBLE_DEVICES the first ones."""
    extra = {"gpus_per_node": None, "gres": "gpu:a100:4"}

    def get_parameters(flags):
        launch = submit.parse_flags(["--cluster", "local", *flags.split()], submit.Launch())
        run = submit.Run(None, [], submit.Config(run_dir="run"))
        executor = submit.build_executor(launch, [run], tmp_path / "jobs", submit.SITE | {"extra": extra})
        names = ("tasks_per_node", "gpus_per_node", "visible_gpus")
        return [executor._executor.parameters.get(name) for name in names]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert get_parameters("--gpus_per_node 2") == [2, 2, None]
    assert get_parameters("--gpus_per_node 0 --tasks_per_node 3") == [3, 0, None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,MIG-7")
    assert get_parameters("--gpus_per_node 2") == [2, 2, ["3", "MIG-7"]]


@pytest.mark.parametrize(
    "extra, says",
    [
        ({"gres": "gpu:a100:2"}, "SITE's extra has gres gpu:a100:2, 2 GPUs a node, but --gpus_per_node is 4"),
        (
            {"gpus-per-node": "a100"},
            "SITE's extra has gpus_per_node a100, 1 GPUs a node, but --gpus_per_node",
        ),
        ({"ntasks-per-node": 1}, "SITE's extra can't have ntasks_per_node: --tasks_per_node decides it"),
        (
            {"gres": "gpu:a100:1,gpu:h100:2"},
            "gres gpu:a100:1,gpu:h100:2, 3 GPUs a node, but --gpus_per_node is 4",
        ),
        ({"time": "1:00"}, "SITE's extra can't have time: --hours decides it"),
        # with another one the next submission would not find this one's runs
        ({"comment": "project=abc"}, "SITE's extra can't have comment: --run_dir decides it"),
    ],
)
def test_what_a_site_cannot_change(tmp_path, monkeypatch, capsys, extra, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(submit.SITE, "extra", extra)
    assert submit.main(["--nodes", "2", "--dry_run"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and says in printed and len(printed.splitlines()) == 1
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
        (2, "--gpus_per_node 0", "2 CPU processes × 16 accumulation steps × 128 images"),
        (2, "--gpus_per_node 0 --tasks_per_node 8", "16 CPU processes × 2 accumulation steps × 128 images"),
        (2, "--image_size 384", "8 GPUs × 16 accumulation steps × 32 images"),
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


def test_a_resumed_run_accumulates_for_the_gpus_it_has_now(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stored = dataclasses.asdict(load_preset(submit.Config, REPO / submit.PAPER))
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps(stored | {"grad_accum_steps": 4, "run_dir": "run"}))
    argv = "--nodes 16 --dry_run --run_dir run --resume True".split()
    for preset in ([], [str(REPO / submit.PAPER)]):
        assert submit.main([*preset, *argv]) == 0
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


def test_a_snapshot_is_code(tmp_path, monkeypatch, capsys, small):
    """Here the repository has 300 MB of something that git doesn't ignore."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repo").mkdir()
    subprocess.run(["git", "init", "-q", "repo"], check=True)
    with open("repo/weights.bin", "wb") as file:
        file.truncate(300_000_000)
    monkeypatch.setattr(snapshot, "ROOT", tmp_path / "repo")
    argv = [*LOCAL, DEBUG, *RUN, "--dp_shard", "1", "--data_dir", str(small)]
    assert submit.main(argv) == 2
    says = (
        "a snapshot of the code would have 300 MB, weights.bin the most: put what is not code in .gitignore"
    )
    assert says in capsys.readouterr().err
    assert not Path("runs").exists()
    shutil.rmtree("repo/.git")
    assert submit.main(argv) == 2
    assert "git can't list the files" in capsys.readouterr().err and not Path("runs").exists()
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no git
    assert submit.main(argv) == 2
    assert "git can't list the files" in capsys.readouterr().err and not Path("runs").exists()


def test_a_disk_that_takes_no_snapshot(tmp_path, monkeypatch, capsys, small):
    """Full, say: one sentence, and what was copied before is gone."""
    monkeypatch.chdir(tmp_path)
    copied = []

    def copy2(source, target, original=shutil.copy2):
        if len(copied) == 3:
            raise OSError(28, "No space left on device", str(target))
        copied.append(original(source, target))

    monkeypatch.setattr(snapshot.shutil, "copy2", copy2)
    assert submit.main([*LOCAL, DEBUG, *RUN, "--dp_shard", "1", "--data_dir", str(small)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: can't copy ") and printed.endswith(": No space left on device\n")
    assert len(copied) == 3 and not Path("runs").exists()


def test_ctrl_c_leaves_no_snapshot_unless_slurm_may_need_it(tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    argv = [*LOCAL, DEBUG, *RUN, "--dp_shard", "1", "--data_dir", str(small)]

    def press(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(snapshot.shutil, "copy2", press)
        with pytest.raises(KeyboardInterrupt):
            submit.main(argv)
    assert not Path("runs").exists()
    monkeypatch.setattr("launch.slurm.hand_over", press)
    with pytest.raises(KeyboardInterrupt):
        submit.main(argv)
    assert len(list(Path("runs/jobs").glob("*/code/train.py"))) == 1


def test_printed_commands_can_be_pasted(tmp_path):
    """Also where a folder's name has a space."""
    launch, job = submit.Launch(nodes=2), submit.submitit.Job(tmp_path / "jobs", "7")
    run = submit.Run(None, [], submit.Config(run_dir=str(tmp_path / "my run")))
    text = submit.describe_job(launch, job, run, tmp_path / "my jobs")
    _, follow, tensorboard, _ = map(shlex.split, text.splitlines())
    assert follow == ["follow", "tail", "-F", str(tmp_path / "my jobs/7_0_log.out")]
    assert tensorboard == ["tensorboard", "--logdir", str(tmp_path / "my run/tb")]
    data = tmp_path / "my data"
    for look, words in (
        (find_beton, ["data.beton", "fashion_mnist:val", str(data / "val.beton"), "--root", str(data)]),
        (open_dataset, ["data.folder", "fashion_mnist", str(data)]),
    ):
        with pytest.raises(UserError) as refused:
            look("fashion_mnist", data, "val")
        command = str(refused.value).split("`")[1]
        assert shlex.split(command) == ["python", "-m", *words]


def test_bad_presets_of_an_array(tmp_path, monkeypatch, capsys, small):
    monkeypatch.chdir(tmp_path)
    Path("other.py").write_text("from config.debug import *\n")
    assert submit.main([DEBUG, "other.py", "--dry_run", "--gpus_per_node", "1"]) == 2
    assert "have the same run_dir" in capsys.readouterr().err


# ---- how it starts

PROBE = """
import sys
from launch import submit
status = submit.main(sys.argv[1:])
heavy = {"torch", "torchvision", "matplotlib", "numba", "ffcv", "tensorboard"}
print("imported:", *sorted(heavy & sys.modules.keys()), file=sys.stderr)
sys.exit(status)
"""


def probe(folder, *argv):
    """(exit status, standard error without its last line, the large packages that were imported) of a dry
    run.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "--dry_run", *map(str, argv)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    *said, last = done.stderr.splitlines()
    assert last.startswith("imported:"), done.stderr
    return done.returncode, said, last.split()[1:]


def test_a_dry_run_imports_no_torch(tmp_path):
    """Of the paper's run, whose data isn't here, which is said."""
    status, said, imported = probe(tmp_path, "--nodes", 16)
    assert status == 0 and len(said) == 1 and "train.beton is not there" in said[0]
    assert imported == []


def test_what_is_not_there_is_not_resumed(tmp_path):
    """It would be the paper's 300 epochs, from the beginning. With a preset it starts, and says so; a fork
    has its source's settings to start with."""
    resume = ["--resume", "True", "--run_dir", "runs/typo"]
    reason = (
        "nothing to resume: no run directory runs/typo: there is no folder runs (a preset, config/x.py, would"
    )
    status, said, imported = probe(tmp_path, "--nodes", 16, *resume, "--init_from", "timm:vit")
    assert (status, imported) == (2, []) and len(said) == 1 and said[0].startswith(f"error: {reason}")
    argv = ["--dry_run", "--nodes", 16, "--run_dir", tmp_path / "runs/typo", "--resume", "True"]
    for preset, fork in ((REPO / submit.PAPER, []), (None, ["--fork", tmp_path / "source"])):
        stored = dataclasses.asdict(load_preset(submit.Config, REPO / submit.PAPER))
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source/config.json").write_text(json.dumps(stored))
        words = [preset] if preset else []
        _, (run,) = submit.parse([str(word) for word in [*words, *argv, *fork]])
        assert run.cfg.epochs == 300 and not (tmp_path / "runs").exists()


def test_a_dry_run_reads_a_beton_without_torch(tmp_path, small):
    """The mistakes are found all the same. The control: torchvision's data sets need torch, and the probe
    sees it.
    """
    if not (small / "train.beton").exists():
        pytest.skip("FFCV, which writes .beton files, is not here")
    flags = [DEBUG, "--gpus_per_node", 1, "--data_dir", small, "--train_samples", "None", "--epochs"]
    assert probe(tmp_path, *flags, 50) == (0, [], [])
    status, said, imported = probe(tmp_path, *flags, 1, "--lr_warmup_steps", 6)
    assert (status, imported) == (0, []) and "leaves nothing of the 6 steps of 1 epochs" in said[0]
    status, said, imported = probe(tmp_path, *flags, 50, "--loader", "folder")
    assert (status, said) == (0, []) and {"torch", "torchvision"} <= set(imported)
