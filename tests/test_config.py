"""Presets, flags, and the mistakes in them: one line each, before any work; a bug is a traceback."""

import dataclasses
import subprocess
import sys

import pytest
from small_runs import (
    REPO,
    argv,
    get_error,
    no_figures,  # noqa: F401 (a fixture)
    run,
)

import data.device
import data.folder
import train
from config.checks import check_config
from config.cli import load_preset, parse_config, typed_config
from errors import UserError
from launch import distributed


@pytest.mark.parametrize(
    "bad, reason",
    [
        ("--learning_rate 1", "unknown flag --learning_rate"),
        ("--epoch 1", "unknown flag --epoch, did you mean epochs?"),
        ("--epochs many", "--epochs"),
        ("--epochs 1.5", "--epochs"),
        ("--compile", "--compile"),
        ("--mode lra", "--mode"),
        ("stray", "no such preset: stray"),
        ("--rank_min 32 --rank_max 8", "rank_min 32 is above rank_max 8"),
        ("--rank_min 6", "rank_min must be a power of two, not 6"),
        ("--rank_max 0", "rank_max must be a power of two, not 0"),
        ("--mode full --rank_min 6", "rank_min must be a power of two, not 6"),
        ("--rank_min 1 --compile True", "rank_min 1 can't be compiled"),
        ("--rank_max 128", "rank_max 128 is above tiny-debug's width 64"),
        ("--grad_accum_steps 3", "batch_size 20 is not divisible by grad_accum_steps 3"),
        ("--lr 0", "lr must be above 0"),
        ("--lr nan", "lr must be a finite number"),
        ("--max_steps 0", "max_steps must be above 0 or None, not 0"),
        ("--mixup -1", "mixup must not be negative"),
        ("--cutmix -1", "cutmix must not be negative"),
        ("--color_jitter -0.4", "color_jitter must not be negative"),
        ("--random_erasing 1", "random_erasing must be in [0, 1)"),
        ("--image_size 0", "image_size must be above 0 or None, not 0"),
        ("--image_size 32", "patches of 7: --image_size 35 would do"),
        ("--image_size 3", "patches of 7: --image_size 7 would do"),
        ("--dropout 1.0", "dropout must be in [0, 1)"),
        ("--num_windows 1", "num_windows must be at least 2"),
        ("--switch_epoch 1", "before two windows"),
        ("--switch_epoch 7", "not before the last epoch"),
        ("--mode full --switch_epoch 4", "no meaning with mode full"),
        ("--mode lora --switch_epoch 4 --freeze_blocks 1", "no meaning with mode lora"),
        ("--freeze_blocks -1", "freeze_blocks must not be negative"),
        ("--freeze_blocks 4", "freeze_blocks 4 is not below the 4 blocks of tiny-debug"),
        ("--mode full --freeze_blocks 1", "freeze_blocks needs, with mode full, --switch_epoch"),
        ("--mode full --freeze_blocks 1 --switch_epoch 7", "not before the last epoch"),
        ("--freeze_blocks 1 --switch_epoch 1", "before two windows"),
        ("--model L/16", "can't be cut into L/16's patches of 16: --image_size 32 would do"),
        ("--lr_warmup_steps 42", "leaves nothing of the 42 steps"),
        ("--seed 18446744073709551616", "seed must be below"),
        ("--num_workers 999", "num_workers is 999"),
        ("--train_samples 601", "601"),
        ("--model XL/2", "unknown model 'XL/2', there are: tiny-debug"),
        ("--dataset cifar", "unknown dataset 'cifar'"),
        ("--target_modules q qq", "unknown target module 'qq'"),
        ("--target_modules q q", "target_modules must name each family once"),
        ("--batch_size 601", "601"),
        (
            "--profile True --batch_size 60 --lr_warmup_steps 1",
            "profile needs epochs of 3 steps and more, 120 images are 2",
        ),
        ("--baseline nowhere", "no run directory nowhere"),
        ("--eval_every 0", "eval_every must be above 0"),
        ("--lora_scaling rslora", "needs --lora_alpha"),
        ("--rank_budget 0.1", "rank_budget is for rank_rule uniform or budget"),
        ("--rank_rule budget --rank_budget 0.001", "not enough for rank_min 4 in every layer"),
        ("--data_dir nowhere", "nowhere"),
        ("--data_dir nowhere --loader ffcv --num_workers 1", "nowhere"),
        ("--fresh_head True", "fresh_head is for the weights of init_from"),
        ("--loader synthetic --rand_augment 9", "synthetic images are not augmented"),
        ("--loader synthetic --color_jitter 0.4", "loader synthetic goes with color_jitter 0"),
        ("--stage_dir here", "it needs --loader ffcv"),
        ("--activation_checkpointing selective", "it needs --compile True"),
        ("--residual_dtype bfloat16 --dtype float32", "it needs --dtype bfloat16"),
    ],
)
def test_bad_input_is_one_line_before_any_work(small, tmp_path, capsys, bad, reason):
    args = [bad] if bad == "stray" else argv(small, tmp_path / "run", *bad.split())
    assert train.main(args) == 2
    assert reason in get_error(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["run_dir", "fork", "init_from", "stage_dir"])
def test_an_empty_path_is_no_path(small, tmp_path, capsys, name):
    assert train.main([*argv(small, tmp_path / "run"), f"--{name}", ""]) == 2
    assert get_error(capsys) == f"error: {name} is empty\n"


def test_bad_input_from_a_shell(small, tmp_path):
    command = [sys.executable, "train.py", *argv(small, tmp_path / "run", "--lora_rank", 8)]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown flag --lora_rank, did you mean lora_")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "text, reason",
    [
        ("learning_rate = 1", "unknown key 'learning_rate'"),
        ("epoch = 3", "unknown key 'epoch', did you mean epochs?"),
        ("epochs = 'ten'", "epochs = 'ten' should be int"),
        ("epochs = True", "epochs = True should be int"),
        ("compile = 1", "compile = 1 should be bool"),
        ("mode = 'lra'", "mode = 'lra' should be"),
        ("target_modules = 'q'", "target_modules = 'q' should be"),
        ("lr = 0", "lr must be above 0"),
        ("rank_min = 32\nrank_max = 8", "rank_min 32 is above"),
        ("epochs = ", "SyntaxError"),
        ("epochs = 1 / 0", "ZeroDivisionError"),
        ("from config.nosuch import *", "No module named 'config.nosuch'"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os as lr", "should be float"),
    ],
)
def test_bad_preset(tmp_path, capsys, text, reason):
    (tmp_path / "preset.py").write_text(text)
    assert train.main([str(tmp_path / "preset.py"), "--run_dir", str(tmp_path / "run")]) == 2
    assert reason in get_error(capsys)


def test_presets(tmp_path):
    (tmp_path / "preset.py").write_text(
        "import math\nfrom config.debug import *\nlr = 1\n_half = 2\nepochs = 20 // _half\n"
        "target_modules = ['q', 'v']\n"
    )
    flags = ["--epochs", "12", "--run_dir", str(tmp_path / "run"), "--lora_alpha", "None"]
    cfg, notes = parse_config(train.Config, [str(tmp_path / "preset.py"), *flags])
    assert (cfg.lr, cfg.epochs, cfg.target_modules, cfg.lora_alpha) == (1.0, 12, ("q", "v"), None)
    assert cfg.tau == load_preset(train.Config, "config/debug.py").tau and notes == []
    for preset in REPO.glob("config/*.py"):
        if preset.stem not in ("cli", "checks", "ranges"):  # the machinery, which stands beside them
            check_config(load_preset(train.Config, preset))


def test_types_of_stored_values():
    cfg = typed_config(train.Config, {"lr": 1, "target_modules": ["q"], "lora_alpha": None}, "here")
    assert cfg.lr == 1.0 and type(cfg.lr) is float and cfg.target_modules == ("q",)
    with pytest.raises(UserError, match="^here: lora_alpha = 'x' should be"):
        typed_config(train.Config, {"lora_alpha": "x"}, "here")


def test_help_lists_every_field_with_its_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stop.value.code == 0
    source = (REPO / "train.py").read_text().splitlines()
    for field in dataclasses.fields(train.Config):
        assert f"--{field.name} " in text
        line = next(line for line in source if line.startswith(f"    {field.name}: "))
        assert line.partition("  # ")[2].strip()[:25] in text, field.name


def test_unusable_run_dir(small, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        assert train.main(argv(small, run_dir)) == 2
        assert str(tmp_path / "file") in get_error(capsys)


# ---- mistakes and bugs told apart


def plant_in_a_loader(monkeypatch):
    def mistyped(samples):
        images, labels, names = zip(*samples)  # samples are pairs

    monkeypatch.setattr(data.folder, "_collate", mistyped)
    return mistyped


def plant_in_an_augmentation(monkeypatch):
    def mistyped(image, seed, epoch, index, pad):
        top, left = image.size, pad, index
        return image.crop((left, top))

    monkeypatch.setitem(data.folder.AUGMENTATIONS, "shift", mistyped)
    return mistyped


def plant_in_the_step(monkeypatch):
    def mistyped(cfg, model, optimizer, batches, step, lr, failed):
        images, labels, names = next(batches)  # batches are pairs

    monkeypatch.setattr(train, "train_step", mistyped)
    return mistyped


def plant_in_the_mixup(monkeypatch):
    def mistyped(images, *rest):
        batch, height, width = images.shape

    monkeypatch.setattr(train, "mix", mistyped)
    return mistyped


@pytest.mark.parametrize(
    "plant", [plant_in_a_loader, plant_in_an_augmentation, plant_in_the_step, plant_in_the_mixup]
)
def test_a_typo_in_edited_code_is_a_traceback_with_its_line(small, tmp_path, capsys, monkeypatch, plant):
    """Not a sentence: `error: too many values to unpack` and no file would be a riddle."""
    planted = plant(monkeypatch).__code__
    with pytest.raises(SystemExit) as stop:
        distributed.exit(train.main, argv(small, tmp_path / "run"))
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert f'File "{planted.co_filename}", line {planted.co_firstlineno + 1}, in mistyped' in err
    assert "ValueError: " in err and "values to unpack" in err
    assert "error: " not in [line[:7] for line in err.splitlines()]


def test_a_typo_from_a_shell(small, tmp_path):
    """A copy of the code, with a third name in the line of train.py that takes a batch."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in REPO.iterdir():
        (copy / path.name).symlink_to(path)
    source, line = (REPO / "train.py").read_text(), "images, labels = next(batches)"
    assert source.count(line) == 1
    (copy / "train.py").unlink()
    (copy / "train.py").write_text(source.replace(line, "images, labels, names = next(batches)"))
    number = source[: source.index(line)].count("\n") + 1
    command = [sys.executable, "train.py", *argv(small, tmp_path / "run")]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert result.returncode == 1
    assert f'train.py", line {number}, in train_step' in result.stderr
    assert result.stderr.endswith("ValueError: not enough values to unpack (expected 3, got 2)\n")


def test_a_mistake_met_in_training_is_one_line(small, tmp_path, capsys, monkeypatch):
    def refused(*args):
        raise UserError("t10k-images is cut short")

    monkeypatch.setattr(train, "train_step", refused)
    assert train.main(argv(small, tmp_path / "run")) == 1
    err = capsys.readouterr().err
    assert err.endswith("error: t10k-images is cut short\n") and "Traceback" not in err


def test_a_bug_before_work_is_a_traceback_too(small, tmp_path, monkeypatch):
    monkeypatch.setattr(data.folder.FolderLoader, "__init__", lambda self, options: [].pop())
    with pytest.raises(IndexError):
        train.main(argv(small, tmp_path / "run"))
    monkeypatch.undo()
    run(small, tmp_path / "run", "--max_steps", 1)  # the control: nothing was left behind
