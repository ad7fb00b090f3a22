"""launch/submit.py without a cluster: what is refused, what is written, and how fast it starts."""

HEAD


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


def test_a_resumed_run_accumulates_for_the_gpus_it_has_now(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stored = dataclasses.asdict(load_preset(submit.Config, str(REPO / submit.PAPER))) | {
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


def test_a_snapshot_is_code(tmp_path, monkeypatch, capsys, small):
    """Here the repository has 300 MB of something that git doesn't ignore."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repo").mkdir()
    subprocess.run(["git", "init", "-q", "repo"], check=True)
    with open("repo/weights.bin", "wb") as file:
        file.truncate(300_000_000)
    monkeypatch.setattr(snapshot, "ROOT", tmp_path / "repo")
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
