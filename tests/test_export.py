"""Weights that leave and enter: evaluate.py, export.py against timm, transformers and PEFT, --init_from, and
every file that is refused."""

import contextlib
import copy
import dataclasses
import fcntl
import io
import itertools
import json
import os
import pickle
import resource
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import small_runs
import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from small_runs import REPO, events, no_figures  # noqa: F401 (a fixture)

import evaluate
import export
import formats
import train
from config.checks import check_config
from config.cli import typed_config
from data import synthetic
from data.datasets import DATASETS
from data.device import normalise
from data.images import FILES, open_dataset, prepare_fashion_mnist
from data.loader import build_loader
from data.order import DataError
from errors import UserError
from lora import kernels
from lora.inject import merge_lora, use_reference
from model import checkpoint, pretrained, sources
from model.huggingface import from_huggingface, to_huggingface
from model.vit import VisionTransformer

# 2 steps an epoch: full 1-3 (the test decides), warmup 4-5, lora 6-7. A high learning rate, so that adapters
# and head matter.
RUN = (
    "--loader folder --num_workers 0 --train_samples 32 --epochs 7 --batch_size 16 --lr 1e-2 "
    "--lr_warmup_steps 2 --dtype float32 --compile False --tau 90 --zeta 90 --num_windows 2 "
    "--window_epochs 1 --lora_warmup_epochs 2 --rank_min 4 --rank_max 32 --keep_every 1 --eval_every 7"
).split()
BF16 = (
    "--dtype bfloat16 --residual_dtype bfloat16 --lora_alpha 16 --lora_scaling rslora "
    "--target_modules q v fc2 --lora_trainable adapters+rest"
).split()
ENDS = {"full": 6, "warmup": 10, "lora": 14}  # the last step of each phase
STATIC = "--mode lora --epochs 2 --eval_every 1".split()
DATA = DATASETS["fashion_mnist"]
ZERO = 1e-30  # a learning rate that leaves every weight as it is
# One step on images without files, from other weights.
ONE_STEP = (
    "--loader synthetic --train_samples 64 --batch_size 16 --dtype float32 --compile False --epochs 9 "
    f"--max_steps 1 --lr {ZERO} --lr_warmup_steps 0 --rank_max 32"
).split()


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """The first 64 + 130 images of Fashion-MNIST."""
    source, raw = REPO / "datasets/fashion_mnist", tmp_path_factory.mktemp("fashion") / "FashionMNIST" / "raw"
    if not (source / "FashionMNIST/raw" / FILES[-1]).exists():
        source = tmp_path_factory.mktemp("all")
        prepare_fashion_mnist(source)
    raw.mkdir(parents=True)
    for name in FILES:
        n, data = 64 if "train" in name else 130, (source / "FashionMNIST/raw" / name).read_bytes()
        header, size = (16, 28 * 28) if "images" in name else (8, 1)
        (raw / name).write_bytes(data[:4] + n.to_bytes(4, "big") + data[8:header] + data[header:][: n * size])
    return raw.parent.parent


class Runs(dict):
    """name -> run directory of a finished run through all three phases, made when first asked for."""

    FLAGS = {
        "plain": [],
        "bf16": BF16,
        "alpha": [*STATIC, "--lora_scaling", "alpha", "--lora_alpha", "6", "--layer_norm_eps", "1e-12"],
        "static": STATIC,
        "lowest": ["--freeze_blocks", "2"],
        "control": ["--mode", "full", "--freeze_blocks", "2", "--switch_epoch", "3"],
    }

    def __init__(self, data, folder):
        self.data, self.folder = data, folder

    def __missing__(self, name):
        self[name] = self.folder / name
        assert (
            train.main([*RUN, "--data_dir", str(self.data), "--run_dir", str(self[name]), *self.FLAGS[name]])
            == 0
        )
        return self[name]

    def at(self, name, phase):
        """The last checkpoint of a phase; without one, of the run."""
        if phase is None:
            return checkpoint.latest(self[name])
        return self[name] / f"checkpoints/step_{ENDS[phase]:08d}"


@pytest.fixture(scope="module")
def runs(fashion, tmp_path_factory):
    return Runs(fashion, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def images(fashion):
    """Real images, uint8 (24, 28, 28, 3)."""
    source = open_dataset("fashion_mnist", fashion, "val")
    return [source[i][0].convert("RGB") for i in range(24)]


def to_input(images):
    return normalise(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), DATA.mean, DATA.std)


@torch.no_grad()
def trained_logits(path, images):
    """What the run's own model computes in float32, adapters unmerged, its weights read back."""
    meta = checkpoint.read_meta(path)
    in_float32 = dict(dtype="float32", residual_dtype="float32", compile=False)
    cfg = dataclasses.replace(typed_config(train.Config, meta["config"], ""), **in_float32)
    model = train.build_model(cfg, meta["state"]["phase"], meta["state"]["ranks"], "cpu").eval()
    model.load_state_dict(stored(path), strict=True)
    return model(to_input(images))


def stored(path):
    """The model's tensors in a checkpoint, in the types they lie there in."""
    tensors = small_runs.weights(None, path)
    return {key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")}


def is_adapter(name):
    return ".lora_" in name


def get_notes(run_dir):
    """What a run said at its start."""
    return events(run_dir, "start")[0]["notes"]


def merged_by_hand(path):
    """{name: W + s·B·A} from the tensors of a checkpoint, in float64."""
    meta, tensors = checkpoint.read_meta(path), stored(path)
    alpha, rslora, ranks = (
        meta["config"]["lora_alpha"],
        meta["config"]["lora_scaling"] == "rslora",
        meta["state"]["ranks"],
    )
    out = {name: t.double() for name, t in tensors.items() if not is_adapter(name)}
    if meta["state"]["phase"] == "full":
        return out
    for i in range(4):
        for linear, families in (
            ("attn.qkv", "qkv"),
            ("attn.proj", ["proj"]),
            ("mlp.fc1", ["fc1"]),
            ("mlp.fc2", ["fc2"]),
        ):
            start = 0
            for part, family in enumerate(families):
                if family in ranks and ranks[family][i]:
                    r, name = ranks[family][i], f"blocks.{i}.{linear}"
                    s = 1 if alpha is None else alpha / (r**0.5 if rslora else r)
                    A, B = tensors[f"{name}.lora_A"][start : start + r], tensors[f"{name}.lora_B.{part}"]
                    out[f"{name}.weight"].chunk(len(families))[part].add_(s * B.double() @ A.double())
                    start += r
    return out


def assert_close(got, expected):
    assert (
        expected.abs().max() > 0.1 and (expected[0] - expected[1]).abs().max() > 1e-2
    )  # they depend on the image
    assert (got - expected).abs().max() <= 1e-5 * max(1, expected.abs().max().item())


def run_main(main, argv, capsys):
    """(status, stdout, stderr)"""
    capsys.readouterr()
    status = main([str(a) for a in argv])
    done = capsys.readouterr()
    return status, done.out, done.err


def make(target, out, *flags, format="timm"):
    assert export.main([str(target), "--format", format, "--out", str(out), *map(str, flags)]) == 0
    return out


# ---- out: timm, transformers, PEFT


@pytest.mark.parametrize(
    "run, phase",
    [
        ("plain", "full"),
        ("plain", "warmup"),
        ("plain", "lora"),
        ("bf16", "lora"),
        ("static", None),
        ("lowest", "warmup"),
        ("lowest", "lora"),
    ],
)
def test_timm_computes_what_was_trained(runs, images, tmp_path, run, phase):
    path = runs.at(run, phase)
    out = make(path, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    model = timm.create_model(
        config["architecture"], num_classes=config["num_classes"], **config["model_args"]
    ).eval()
    model.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    expected = trained_logits(path, images)
    with torch.no_grad():
        assert_close(model(to_input(images)), expected)
        by_name = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        transform = timm.data.create_transform(
            **timm.data.resolve_data_config({}, model=by_name)
        )  # from the files to the logits
        assert_close(by_name(torch.stack([transform(image) for image in images])), expected)
    exact = merged_by_hand(path)
    assert exact.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor.double(), exact[name], rtol=1e-6, atol=1e-7)
    if phase != "full":  # control: without the adapters it would be another function
        base = {name: tensor.float() for name, tensor in stored(path).items() if not is_adapter(name)}
        model.load_state_dict(base)
        with torch.no_grad():
            assert (model(to_input(images)) - expected).abs().max() > 1e-2
    card = (out / "README.md").read_text()
    assert (
        f"phase {phase or 'lora'}" in card
        and "license:  # yours" in card
        and str(runs.data) not in card
        and str(runs[run]) not in card
    )
    assert {t.dtype for t in stored(path).values()} == {torch.float32}  # of the freeze, in bfloat16 too
    assert "base precision: float32 throughout" in card
    assert ("Trained as static LoRA" if run == "static" else "Trained with PreLoRA") in card and (
        "are no adapters yet" in card
    ) == (phase == "full")
    assert "32 training images of 28 pixels" in card and "on 32 validation images" in card
    assert config["label_names"][0] == "T-shirt/top" and sorted(os.listdir(out)) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode


def change_meta(path, **config):
    """The checkpoint's stored config, changed by hand."""
    meta = checkpoint.read_meta(path)
    small_runs.write_meta(path, meta | {"config": meta["config"] | config})
    return path


@pytest.fixture
def checkpoint_alone(runs, tmp_path):
    """A checkpoint of the lora phase and its base, without the run around them."""
    folder = tmp_path / "alone/checkpoints"
    shutil.copytree(runs.at("plain", "warmup"), folder / "step_00000010")
    return Path(shutil.copytree(runs.at("plain", "lora"), folder / "step_00000014"))


def test_a_card_says_what_is_known(runs, checkpoint_alone, tmp_path, monkeypatch):
    def card(target, *flags):
        text = (make(target, tmp_path / "out", *flags) / "README.md").read_text()
        shutil.rmtree(tmp_path / "out")
        return text

    logged = f"top-1 {events(runs['plain'], 'epoch')[-1]['val_top1']:.2f} %"
    (tmp_path / "link").symlink_to(runs.at("plain", "lora"))
    monkeypatch.chdir(runs.at("plain", "lora").parent)
    for target in (runs["plain"], tmp_path / "link", "step_00000014"):  # the log is found
        text = card(target)
        assert "full: epochs 1 to 3; warmup: epochs 4 to 5; lora: epochs 6 to 7" in text and logged in text
    assert "not evaluated" in card(runs.at("plain", "warmup"))
    assert "on 130 validation images" in card(runs["plain"], "--images", 500)  # all there are
    assert "the run's log was not beside the checkpoint" in card(checkpoint_alone) and logged not in card(
        checkpoint_alone
    )
    (tmp_path / "alone/metrics.jsonl").write_text("no JSON\n{}\n")
    assert "the run's log was damaged" in card(checkpoint_alone)
    text = card(
        change_meta(
            checkpoint_alone,
            num_classes=10,
            init_from="/secret/weights.safetensors",
            fresh_head=True,
            rand_augment=3,
        )
    )
    assert "# ViT tiny-debug on an image folder of 10 classes" in text and '"rand_augment": 3' in text
    assert (
        "started from: the weights of weights.safetensors, with a fresh head" in text
        and "/secret" not in text
    )
    text = card(change_meta(checkpoint_alone, init_from=None, fresh_head=False, fork="/secret/runs/first@3"))
    assert (
        "started from: a checkpoint of another run, first, whose own beginning" in text
        and "/secret" not in text
    )


def test_what_only_training_needs_is_left_out(runs, checkpoint_alone, tmp_path, capsys):
    """The compiler's choice of what to recompute, and augmentation, which synthetic images have none of."""
    change_meta(checkpoint_alone, compile=True, activation_checkpointing="selective", rand_augment=5)
    for main, flags in ((evaluate.main, []), (export.main, ["--format", "timm", "--out", tmp_path / "out"])):
        status, _, err = run_main(main, [checkpoint_alone, "--loader", "synthetic", *flags], capsys)
        assert status == 0, err
    cfg = train.Config(activation_checkpointing="selective", rank_rule="budget", rank_budget=0.2)
    check_config(cfg)  # counts the base
    assert train.build_on_meta(cfg).grad_checkpointing is False
    with pytest.raises(
        ValueError, match="selective"
    ):  # control: such a model can't be built without the compiler
        train.build_model(dataclasses.replace(cfg, compile=False), "full", None, "meta")


def test_the_trained_model_is_not_compared_with_a_sum_of_its_own(runs, tmp_path, monkeypatch, capsys):
    """An adapter is multiplied as W + B A, which would agree with a merged weight whatever B A is."""
    used = []
    add = kernels.add_product
    monkeypatch.setattr(kernels, "add_product", lambda *args: used.append(1) or add(*args))
    path, x = runs.at("plain", "lora"), torch.randn(32, 3, 28, 28)
    cfg, s = evaluate.load_checkpoint(path, checkpoint.read_meta(path))
    model = evaluate.build_checkpoint(cfg, s, path)
    with torch.no_grad():
        plain = model(x)
        assert used  # control
        used.clear()
        by_definition = use_reference(copy.deepcopy(model))(x)
        torch.testing.assert_close(by_definition, plain, rtol=0, atol=1e-5 * plain.abs().max().item())
        assert not used
        merged = merge_lora(copy.deepcopy(model))
        export.check_logits(model, merged, x, "timm")
        loader = build_loader("folder", "fashion_mnist", str(runs.data), "val", 130, 0, 0)
        with contextlib.closing(loader):
            evaluate.compare_merged(cfg, model, merged, loader.epoch(0), torch.device("cpu"))
        assert not used


@pytest.mark.slow
def test_half_recomputed_by_the_compilers_choice(tmp_path, capsys):
    argv = [
        *RUN,
        "--loader",
        "synthetic",
        "--train_samples",
        64,
        "--epochs",
        9,
        "--max_steps",
        1,
        "--run_dir",
        tmp_path / "run",
        "--compile",
        True,
        "--activation_checkpointing",
        "selective",
    ]
    assert run_main(train.main, argv, capsys)[0] == 0
    assert run_main(evaluate.main, [tmp_path / "run"], capsys)[0] == 0


def test_a_bf16_runs_base_is_exported_as_the_freeze_left_it(runs, tmp_path):
    frozen = stored(runs.at("bf16", "warmup"))["blocks.0.attn.proj.weight"]  # no adapter there
    assert frozen.dtype == torch.float32 and not torch.equal(frozen, frozen.bfloat16().float())
    exported = load_file(make(runs.at("bf16", "lora"), tmp_path / "out") / "model.safetensors")
    assert all(t.dtype == torch.float32 for t in exported.values())
    assert torch.equal(exported["blocks.0.attn.proj.weight"], frozen)
    assert not torch.equal(
        exported["blocks.0.mlp.fc2.weight"], exported["blocks.0.mlp.fc2.weight"].bfloat16().float()
    )  # merged in float32


@pytest.mark.parametrize(
    "run, phase",
    [("plain", "full"), ("plain", "warmup"), ("plain", "lora"), ("bf16", "lora"), ("alpha", None)],
)
def test_transformers_computes_what_was_trained(runs, images, tmp_path, run, phase):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    path = runs.at(run, phase)
    out = make(path, tmp_path / "out", format="hf")
    model, report = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    inputs = AutoImageProcessor.from_pretrained(out)(images, return_tensors="pt")[
        "pixel_values"
    ]  # from the files to the logits
    torch.testing.assert_close(inputs, to_input(images), rtol=0, atol=1e-6)
    with torch.no_grad():
        assert_close(model.eval()(pixel_values=inputs).logits, trained_logits(path, images))
    assert (
        model.config.layer_norm_eps == (1e-12 if run == "alpha" else 1e-6)
        and model.config.id2label[9] == "Ankle boot"
    )
    assert "vit.encoder.layer.0.attention.attention.query.weight" in load_file(
        out / "model.safetensors"
    )  # what all versions read


@pytest.mark.parametrize(
    "run, phase",
    [
        ("plain", "warmup"),
        ("plain", "lora"),
        ("bf16", "lora"),
        ("alpha", None),
        ("static", None),
        ("lowest", "lora"),
    ],
)
def test_peft_computes_what_was_trained(runs, images, tmp_path, run, phase):
    from peft import PeftModel
    from transformers import ViTForImageClassification

    path = runs.at(run, phase)
    out = make(path, tmp_path / "out", "--adapters_only", True, format="hf")
    base = ViTForImageClassification.from_pretrained(out / "base").eval()
    expected, x = trained_logits(path, images), to_input(images)
    with torch.no_grad():
        alone = base(pixel_values=x).logits
        model = PeftModel.from_pretrained(base, out).eval()
        assert_close(model(pixel_values=x).logits, expected)
        assert (alone - expected).abs().max() > 1e-2  # the base is without them
        assert_close(model.merge_and_unload()(pixel_values=x).logits, expected)
    config, state = json.loads((out / "adapter_config.json").read_text()), checkpoint.read_meta(path)
    ranks, cfg = state["state"]["ranks"], state["config"]
    named = {
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "proj": "attention.o_proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    expected_ranks = {
        f"vit.layers.{i}.{named[family]}": r
        for family, layers in ranks.items()
        for i, r in enumerate(layers)
        if r
    }
    assert (len(expected_ranks) < sum(map(len, ranks.values()))) == (run == "lowest")
    assert config["rank_pattern"] == expected_ranks and config["use_rslora"] == (run == "bf16")
    assert config["alpha_pattern"] == {name: cfg["lora_alpha"] or r for name, r in expected_ranks.items()}
    assert sorted(config["target_modules"]) == sorted(expected_ranks)
    card = (out / "README.md").read_text()
    assert "transformers 5's modules" in card and ("0 for no adapter" in card) == (run == "lowest")


def test_names_of_huggingface_and_back():
    model = VisionTransformer("tiny-debug", 28, 10)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=256,
        image_size=28,
        patch_size=7,
        num_labels=10,
    )
    named = to_huggingface(model.state_dict())
    assert {name: t.shape for name, t in named.items()} == {
        name: t.shape for name, t in ViTForImageClassification(config).state_dict().items()
    }
    back = from_huggingface(named)
    assert back.keys() == model.state_dict().keys() and all(
        torch.equal(t, back[name]) for name, t in model.state_dict().items()
    )
    for name in ("blocks.0.attn.qkv.lora_A", "blocks.0.attn.qkv.lora_B.0", "fc_norm.weight"):
        with pytest.raises(KeyError, match=name):
            to_huggingface({name: torch.zeros(3)})


# ---- a wrong export is refused, and leaves nothing


def merge_too_much(model):
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            p.data.mul_(1.1)
    return merge_lora(model)


def swap_q_and_k(state_dict):
    named = to_huggingface(state_dict)
    swap = {"q_proj": "k_proj", "k_proj": "q_proj"}
    return {".".join(swap.get(word, word) for word in name.split(".")): t for name, t in named.items()}


def nudge(write):
    def writing(weights, path):
        name = next(name for name in weights if name.endswith(("mlp.fc1.weight", "lora_B.weight")))
        write(weights | {name: weights[name] + 1e-3}, path)

    return writing


@pytest.mark.parametrize(
    "flags, module, name, wrong",
    [
        (["--format", "timm"], export, "merge_lora", merge_too_much),
        (["--format", "timm"], formats, "write_weights", nudge(formats.write_weights)),
        (["--format", "hf"], formats, "to_huggingface", swap_q_and_k),
        (
            ["--format", "hf", "--adapters_only", "True"],
            formats,
            "write_weights",
            nudge(formats.write_weights),
        ),
    ],
)
def test_control_a_wrong_weight_is_refused(runs, tmp_path, monkeypatch, capsys, flags, module, name, wrong):
    monkeypatch.setattr(module, name, wrong)
    status, _, err = run_main(
        export.main, [runs.at("plain", "lora"), *flags, "--out", tmp_path / "out"], capsys
    )
    assert status == 2 and "does not compute what was trained" in err and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "flags", [["--format", "timm"], ["--format", "hf"], ["--format", "hf", "--adapters_only", "True"]]
)
def test_a_full_disk_leaves_nothing(runs, tmp_path, capsys, flags):
    """The real thing, by a limit on file sizes."""
    run_dir = runs.at("plain", "lora")  # trained before the disk is full
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        status, _, err = run_main(
            export.main, [run_dir, *flags, "--out", tmp_path / "new/folder/out"], capsys
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (
        status == 2
        and "File too large" in err
        and str(tmp_path / "new/folder/out") in err
        and os.listdir(tmp_path) == []
    )


def test_what_a_killed_export_left_is_removed(runs, tmp_path):
    """A hidden folder whose file nobody holds; the one of an export that goes on stays."""
    dead, alive = [tmp_path / f".out.{socket.gethostname()}.{name}" for name in ("dead", "alive")]
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half of it")
        folder.with_name(f"{folder.name}.tmp").touch()
    with open(alive.with_name(f"{alive.name}.tmp")) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        make(runs.at("plain", "lora"), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [alive.name, f"{alive.name}.tmp", "out"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "for whom, where to"),
        (["--format", "onnx"], "format"),
        (["--format", "timm"], "where to"),
        (["--format", "timm", "--adapters_only", "True", "--out", "OUT"], "--format hf"),
        (
            ["--format", "hf", "--adapters_only", "True", "--out", "OUT", "FULL"],
            "in its full phase: it has no adapters to export",
        ),
        (
            ["--format", "timm", "--out", "OUT", "ALPHA"],
            "timm's ViT has layer_norm_eps 1e-6, this model 1e-12",
        ),
        (["--format", "timm", "--out", "FILLED"], "already there and not empty"),
        (["--format", "timm", "--out", "FILE"], "already there and not empty"),
        (["--format", "timm", "--out", "BELOW"], "can't write "),
        (["--format", "timm", "--out", "OUT", "NOWHERE"], "no run directory"),
        (["--format", "timm", "--out", "OUT", "--data_dir", "/nowhere"], "no Fashion-MNIST under /nowhere"),
        (["--format", "timm", "--out", "OUT", "--images", "0"], "images must be above 0"),
        (["FIRST", "--format", "timm", "--out", "OUT"], "the run first"),
        (["--format", "timm", "--out", "OUT", "--licence", "MIT"], "unknown flag --licence"),
    ],
)
def test_mistakes_of_export(runs, tmp_path, capsys, flags, words):
    places = {
        "OUT": tmp_path / "out",
        "FILLED": tmp_path / "filled",
        "FILE": tmp_path / "filled/kept",
        "BELOW": tmp_path / "filled/kept/out",
        "FULL": runs.at("plain", "full"),
        "ALPHA": runs["alpha"] if "ALPHA" in flags else None,
        "NOWHERE": tmp_path / "nowhere",
    }
    places["FILLED"].mkdir()
    places["FILE"].write_text("mine")
    target = next((places[word] for word in flags if word in ("FULL", "ALPHA", "NOWHERE")), runs["plain"])
    argv = [places.get(word, word) for word in flags if word not in ("FULL", "ALPHA", "NOWHERE", "FIRST")]
    status, _, err = run_main(export.main, [*argv, target] if "FIRST" in flags else [target, *argv], capsys)
    assert status == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1, err
    assert (
        sorted(p.name for p in tmp_path.rglob("*")) == ["filled", "kept"]
        and places["FILE"].read_text() == "mine"
    )


@pytest.mark.parametrize("missing", ["transformers", "peft"])
def test_a_library_that_is_not_there(runs, tmp_path, monkeypatch, capsys, missing):
    find_spec = export.importlib.util.find_spec
    monkeypatch.setattr(
        export.importlib.util, "find_spec", lambda name, *a: None if name == missing else find_spec(name, *a)
    )
    argv = [runs["plain"], "--format", "hf", "--adapters_only", "True", "--out", tmp_path / "out"]
    status, _, err = run_main(export.main, argv, capsys)
    assert (
        status == 2 and err.startswith(f"error: {missing} is not installed") and "requirements-dev.txt" in err
    )
    assert os.listdir(tmp_path) == []


def test_an_empty_folder_may_be_there(runs, tmp_path):
    (tmp_path / "out").mkdir()
    assert (make(runs.at("plain", "full"), tmp_path / "out") / "model.safetensors").exists() and os.listdir(
        tmp_path
    ) == ["out"]


def test_a_link_to_an_empty_folder_stays_a_link(runs, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    make(runs.at("plain", "full"), tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "real/model.safetensors").exists()
    assert sorted(os.listdir(tmp_path)) == ["out", "real"]


def damage(run_dir):
    """Cut the newest checkpoint short."""
    return damage_shard(checkpoint.latest(run_dir))


def damage_shard(path):
    """Cut the checkpoint's largest file short."""
    file = max(path.glob("*.distcp"), key=lambda f: f.stat().st_size)
    with open(file, "r+b") as f:
        f.truncate(file.stat().st_size - 100)
    return path


def test_a_damaged_checkpoint_is_passed_over_or_refused(runs, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(runs["plain"], run_dir)
    newest = damage(run_dir)
    status, out, err = run_main(evaluate.main, [run_dir], capsys)
    assert (
        status == 0
        and "passed over a damaged checkpoint" in out
        and json.loads(out.splitlines()[-1])["step"] == 12
    )
    for main, flags in ((evaluate.main, []), (export.main, ["--format", "timm", "--out", tmp_path / "out"])):
        status, _, err = run_main(main, [newest, *flags], capsys)
        assert status == 2 and "is cut short" in err and err.count("\n") == 1
    status, out, _ = run_main(export.main, [run_dir, "--format", "timm", "--out", tmp_path / "out"], capsys)
    assert status == 0 and "passed over" in out and "step_00000012" in out


@pytest.mark.parametrize("damage", ["missing", "cut", "another"])
def test_a_checkpoint_whose_base_is_not_right_is_refused(runs, checkpoint_alone, tmp_path, capsys, damage):
    """Copied out alone, or beside another run's of the same step."""
    logged = events(runs["plain"], "epoch")[-1]["val_loss"]
    got = json.loads(run_main(evaluate.main, [checkpoint_alone], capsys)[1].splitlines()[-1])
    assert got["val_loss"] == pytest.approx(logged, rel=1e-6)  # control: with its base it is all there
    base = checkpoint_alone.with_name("step_00000010")
    if damage == "cut":
        damage_shard(base)
    else:
        shutil.rmtree(base)
    if damage == "another":
        shutil.copytree(runs.at("bf16", "warmup"), base)
    for main, flags in ((evaluate.main, []), (export.main, ["--format", "timm", "--out", tmp_path / "out"])):
        status, _, err = run_main(main, [checkpoint_alone, *flags], capsys)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
        needed = "holds only what the LoRA phase trains: it needs step_00000010 (id "
        assert f"{checkpoint_alone} {needed}" in err
    assert not (tmp_path / "out").exists()


# ---- evaluate


def evaluate_on_rank(argv):
    """(status, stdout, stderr) of evaluate.py on this rank."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = evaluate.main([str(a) for a in argv])
    return status, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    "run, phase", [("plain", "full"), ("plain", "warmup"), ("bf16", "lora"), ("lowest", "lora")]
)
def test_evaluate_says_what_training_did(runs, capsys, on_ranks, run, phase):
    """130 images, so that no batch is full and the ranks have different numbers of them."""
    path = runs.at(run, phase)
    status, out, err = run_main(evaluate.main, [path], capsys)
    assert status == 0, err
    got = json.loads(out.splitlines()[-1])
    assert (got["images"], got["phase"], got["step"], got["ranks"]) == (130, phase, ENDS[phase], 1)
    assert f"top-1 {got['val_top1']:.2f} %" in out
    if phase == "lora":  # the run evaluated there
        logged = events(runs[run], "epoch")[-1]
        assert [got[key] for key in ("val_loss", "val_top1", "val_top5")] == pytest.approx(
            [logged[key] for key in ("val_loss", "val_top1", "val_top5")], rel=1e-3
        )
    else:
        logits = trained_all(path, runs.data)
        hits = logits[0].topk(5).indices == logits[1][:, None]
        expected = [
            torch.nn.functional.cross_entropy(*logits).item(),
            hits[:, 0].float().mean().item() * 100,
            hits.sum().item() / 1.3,
        ]
        assert [got[key] for key in ("val_loss", "val_top1", "val_top5")] == pytest.approx(expected, rel=1e-5)
    assert ("merge_difference" in got) == (phase != "full")
    answers = on_ranks(2, evaluate_on_rank, [path, "--batch_size", 32])
    assert [answer[0] for answer in answers] == [0, 0] and answers[1][1] == ""  # rank 0 alone speaks
    two = json.loads(answers[0][1].splitlines()[-1])
    assert two["ranks"] == 2 and two["images"] == 130
    for key in ("val_loss", "val_top1", "val_top5"):
        assert two[key] == pytest.approx(got[key], rel=1e-3 if run == "bf16" else 1e-6)


def test_a_control_with_frozen_blocks_is_evaluated_and_exported(runs, images, tmp_path, capsys):
    path = runs.at("control", None)
    assert checkpoint.read_meta(path)["state"]["frozen_blocks"] == 2
    status, out, err = run_main(evaluate.main, [path], capsys)
    assert status == 0, err
    got, logged = json.loads(out.splitlines()[-1]), events(runs["control"], "epoch")[-1]
    assert got["phase"] == "full"
    for key in ("val_loss", "val_top1", "val_top5"):
        assert got[key] == pytest.approx(logged[key], rel=1e-5)
    for format in ("timm", "hf"):  # each compares its logits with the trained model's
        card = (make(path, tmp_path / format, format=format) / "README.md").read_text()
        assert "with the lowest 2 blocks and the embeddings frozen" in card
    card = (make(runs.at("control", "full"), tmp_path / "before") / "README.md").read_text()
    assert "with all parameters from beginning to end" in card  # the control


def trained_all(path, data):
    source = open_dataset("fashion_mnist", data, "val")
    return trained_logits(path, [source[i][0].convert("RGB") for i in range(130)]), source.targets[:130]


def test_merged_and_unmerged(runs, capsys, monkeypatch):
    path = runs.at("bf16", "lora")
    as_trained, merged = [
        json.loads(
            run_main(evaluate.main, [path, "--dtype", "float32", "--merged", flag], capsys)[1].splitlines()[
                -1
            ]
        )
        for flag in ("False", "True")
    ]
    assert (
        merged["merged"]
        and not as_trained["merged"]
        and merged["val_loss"] == pytest.approx(as_trained["val_loss"], rel=1e-5)
    )
    assert (
        0
        < as_trained["merge_difference"]
        == merged["merge_difference"]
        <= 1e-5 * max(1, merged["largest_logit"])
    )
    logits, labels = trained_all(path, runs.data)
    assert merged["val_loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5
    )
    assert merged["largest_logit"] == pytest.approx(logits.abs().max().item(), rel=1e-5)
    monkeypatch.setattr(evaluate, "merge_lora", merge_too_much)  # control: a merge that is wrong is seen
    wrong = json.loads(run_main(evaluate.main, [path, "--merged", "True"], capsys)[1].splitlines()[-1])
    assert (
        wrong["merge_difference"] > 1e-3 and wrong["dtype"] == "float32"
    )  # merged: in float32, a run in bfloat16 too
    plain = json.loads(run_main(evaluate.main, [path], capsys)[1].splitlines()[-1])
    assert plain["dtype"] == "bfloat16"  # control


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "evaluate what?"),
        (["NOWHERE"], "no run directory"),
        (["RUN", "--data_dir", "/nowhere"], "no Fashion-MNIST under /nowhere"),
        (["RUN", "--dataset", "imagenet"], "dataset, image_size and num_classes are the run's own"),
        (["RUN", "--image_size", "35"], "dataset, image_size and num_classes are the run's own"),
        (["RUN", "--batch_size", "0"], "batch_size must be above 0"),
        (["RUN", "--merge", "True"], "unknown flag --merge, did you mean merged?"),
        (["--merged", "True", "RUN"], "flags come after it"),
        (["PICKLE"], "is a pickle"),
        (["PICKLE", "--dataset", "imagenet"], "is a pickle"),
        (["EXPORT"], "is no run, it holds weights: give "),
        (["EXPORT", "--dataset", "fashion_mnist"], "is no run, it holds weights: give "),
        (["STATE"], "/meta.json is damaged, or of another version: its state has mood besides"),
        (["timm:nope", "--dataset", "imagenet"], "timm has no model nope"),
        (["timm:vit_tiny_patch16_224"], "say what to evaluate it on, --dataset fashion_mnist or imagenet"),
        (
            ["timm:vit_tiny_patch16_224", "--dataset", "imagenet", "--merged", "True"],
            "merged is for a run's adapters: timm:vit_tiny_patch16_224 holds weights, which have none",
        ),
        (["/nowhere/x.safetensors", "--dataset", "imagenet"], "/nowhere/x.safetensors is not there"),
    ],
)
def test_mistakes_of_evaluate(runs, checkpoint_alone, tmp_path, capsys, argv, words):
    places = {
        "RUN": runs["plain"],
        "NOWHERE": tmp_path / "nowhere",
        "PICKLE": tmp_path / "w.pt",
        "EXPORT": tmp_path / "export",
        "STATE": checkpoint_alone,
    }
    torch.save({"a": torch.zeros(3)}, places["PICKLE"])
    places["EXPORT"].mkdir()
    save_file({"a": torch.zeros(3)}, places["EXPORT"] / "model.safetensors")
    meta = checkpoint.read_meta(checkpoint_alone)
    small_runs.write_meta(checkpoint_alone, meta | {"state": meta["state"] | {"mood": 1}})
    status, _, err = run_main(evaluate.main, [places.get(word, word) for word in argv], capsys)
    assert status == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1, err


def test_a_mistake_on_two_ranks_is_said_once(on_ranks, tmp_path):
    answers = on_ranks(2, evaluate_on_rank, [tmp_path / "nowhere"])
    assert [a[0] for a in answers] == [2, 2] and [a[2].count("error: ") for a in answers] == [1, 0]


def lose_an_image(loader):
    """Have the loader of the last process raise in the middle of an epoch."""
    if dist.is_initialized() and dist.get_rank() == 0:
        return loader
    whole = loader.epoch

    def epoch(number):
        yield from itertools.islice(whole(number), 1)
        raise DataError("images/3.png cannot be read as an image")

    loader.epoch = epoch
    return loader


def evaluate_damaged(argv):
    """evaluate_on_rank, where the last process meets a damaged image; and what a process does as it ends."""
    build = evaluate.build_loader
    evaluate.build_loader = lambda *args, **options: lose_an_image(build(*args, **options))
    try:
        return evaluate_on_rank(argv)
    finally:
        evaluate.build_loader = build
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_damaged_image_is_one_line(runs, on_ranks):
    """Of each process: the others lose the one that has met it."""
    message = "error: images/3.png cannot be read as an image\n"
    argv = [runs.at("plain", "full"), "--batch_size", 32]
    assert evaluate_damaged(argv) == (2, "", message)
    lost, met = on_ranks(2, evaluate_damaged, argv)
    assert met == (2, "", message)
    assert lost[0] == 1 and lost[2].startswith("error: ") and lost[2].count("\n") == 1, lost


@pytest.mark.parametrize("main, module", [(evaluate.main, evaluate), (export.main, export)])
def test_a_bug_is_a_traceback(runs, tmp_path, monkeypatch, main, module):
    """What an edited loader raises is not taken for a mistake of the user's."""

    def build(*args, **options):
        first, second = 1, 2, 3
        return first or second

    monkeypatch.setattr(module, "build_loader", build)
    flags = ["--format", "timm", "--out", str(tmp_path / "out")] if module is export else []
    with pytest.raises(ValueError, match="too many values to unpack"):
        main([str(runs.at("plain", "full")), *flags])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("format", ["timm", "hf"])
def test_evaluate_an_export(runs, tmp_path, capsys, format):
    out = make(runs["plain"], tmp_path / "out", format=format)
    results = [
        json.loads(run_main(evaluate.main, argv, capsys)[1].splitlines()[-1])
        for argv in (
            [runs["plain"]],
            [
                out / "model.safetensors",
                "--dataset",
                "fashion_mnist",
                "--data_dir",
                runs.data,
                "--loader",
                "folder",
            ],
        )
    ]
    for key in ("val_loss", "val_top1", "val_top5", "images"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-5)


@pytest.fixture
def deit(tmp_path, monkeypatch):
    """timm's deit_tiny_patch16_224 with random weights, from a file instead of the hub."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    save_file(model.state_dict(), tmp_path / "deit.safetensors")
    get = timm.models.get_pretrained_cfg
    monkeypatch.setattr(
        timm.models,
        "get_pretrained_cfg",
        lambda name: dataclasses.replace(get(name), file=str(tmp_path / "deit.safetensors")),
    )
    return model


def test_evaluate_timms_own(deit, monkeypatch, capsys):
    """DeiT's images are normalised by ImageNet's mean and standard deviation, ours by 0.5."""
    monkeypatch.setitem(synthetic.SIZES, "val", 8)
    argv = [
        "timm:deit_tiny_patch16_224.fb_in1k",
        "--dataset",
        "imagenet",
        "--loader",
        "synthetic",
        "--batch_size",
        "4",
    ]
    status, out, err = run_main(evaluate.main, argv, capsys)
    assert status == 0, err
    got = json.loads(out.splitlines()[-1])
    assert (
        got["model"] == "Ti/16"
        and got["images"] == 8
        and "the difference is in the patch embedding now" in out
    )
    loader = build_loader("synthetic", "imagenet", "", "val", 4, 0)
    assert deit.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    loss = {"theirs": 0, "ours": 0}
    with torch.no_grad():
        for batch, labels in loader.epoch(0):
            for kind, mean, std in (
                ("theirs", deit.pretrained_cfg["mean"], deit.pretrained_cfg["std"]),
                ("ours", (0.5,) * 3, (0.5,) * 3),
            ):
                loss[kind] += (
                    torch.nn.functional.cross_entropy(deit(normalise(batch, mean, std)), labels).item() / 2
                )
    assert got["val_loss"] == pytest.approx(loss["theirs"], rel=1e-5)
    assert abs(loss["ours"] - loss["theirs"]) > 1e-4 * loss["theirs"]  # control: the normalisation matters


# ---- in: what a file may be


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_files_that_are_no_safetensors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = {"a": torch.randn(10, 10), "b": torch.randn(3)}
    save_file(good, "good.safetensors")
    read = sources.read_safetensors(Path("good.safetensors"))
    assert all(torch.equal(read[name], t) for name, t in good.items())
    whole = Path("good.safetensors").read_bytes()
    torch.save({"a": Bomb()}, "zip.safetensors")
    torch.save({"a": Bomb()}, "legacy.safetensors", _use_new_zipfile_serialization=False)
    torch.save(good, "weights.pt")
    Path("plain.safetensors").write_bytes(pickle.dumps(Bomb()))
    Path("cut.safetensors").write_bytes(whole[:-10])
    Path("cut_header.safetensors").write_bytes(whole[:20])
    Path("empty.safetensors").write_bytes(b"")
    Path("lfs.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n"
    )
    Path("folder.safetensors").mkdir()
    for name, words in [
        ("zip", "is a pickle"),
        ("legacy", "is a pickle"),
        ("plain", "is a pickle"),
        ("weights.pt", "is a pickle"),
        ("cut", "is cut short or damaged"),
        ("cut_header", "is cut short or damaged"),
        ("empty", "is no safetensors file"),
        ("lfs", "is no safetensors file"),
        ("folder", "is no file"),
        ("gone", "is not there"),
    ]:
        path = Path(name if "." in name else f"{name}.safetensors")
        with pytest.raises(UserError) as error:
            sources.read_safetensors(path)
        assert str(error.value).startswith(f"{path} {words}") and "\n" not in str(error.value)
        status, _, err = run_main(
            train.main,
            [
                "--run_dir",
                "run",
                "--loader",
                "synthetic",
                "--dtype",
                "float32",
                "--batch_size",
                "16",
                "--init_from",
                path,
            ],
            capsys,
        )
        assert (
            status == 2
            and words in err
            and err.startswith("error: ")
            and err.count("\n") == 1
            and not Path("run").exists()
        )
    save_file(good, "folder.safetensors/model.safetensors")
    with pytest.raises(
        UserError, match="is no file, it holds weights: give folder.safetensors/model.safetensors"
    ):
        sources.read_safetensors(Path("folder.safetensors"))
    assert not Path("exploded").exists()
    pickle.loads(Path("plain.safetensors").read_bytes())
    assert Path("exploded").exists()  # control: it would have


def build(variant="tiny-debug", size=28, classes=10, seed=0, **options):
    torch.manual_seed(seed)
    model = VisionTransformer(variant, size, classes, **options).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.1).add_("norm" in name and name.endswith("weight"))
    return model


def save_with_config(weights, path, **model_args):
    """tiny-debug's weights, and beside them a config.json that says of images of what size they are."""
    save_file(weights, path)
    args = dict(embed_dim=64, depth=4, num_heads=2, patch_size=7) | model_args
    config = {"architecture": "vit_tiny_patch16_224", "model_args": args}
    config["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3}
    path.with_name("config.json").write_text(json.dumps(config))


def without(name):
    return lambda weights: {key: t for key, t in weights.items() if key != name}


@pytest.mark.parametrize(
    "weights, words",
    [
        (
            build("small-study").state_dict(),
            "is a ViT of width 320, 3 blocks, patches of 14, this model of width 64, 4 blocks, patches of 7",
        ),
        (build(classes=7).state_dict(), "is for 7 classes, this model for 10: --fresh_head True"),
        (
            without("head.bias")(without("head.weight")(build().state_dict())),
            "has no head: --fresh_head True starts with a new one, for 10 classes",
        ),
        (without("norm.bias")(build().state_dict()), "is not a ViT of this kind: it has no norm.bias"),
        (without("cls_token")(build().state_dict()), "is not a ViT of this kind: it has no cls_token"),
        (
            build().state_dict() | {"fc_norm.weight": torch.zeros(64)},
            "it has a parameter that this model hasn't, fc_norm.weight",
        ),
        (
            build().state_dict() | {"pos_embed": torch.zeros(1, 16, 64)},
            "positions of 15 patches, this model's are 4 × 4",
        ),
        (
            build().state_dict() | {"patch_embed.proj.weight": torch.zeros(64, 1, 7, 7)},
            "patch_embed.proj.weight has shape (64, 1, 7, 7)",
        ),
        (
            to_huggingface(build().state_dict()) | {"vit.embeddings.mask_token": torch.zeros(1)},
            "not a parameter of a Hugging Face",
        ),
        (
            {"layer1.0.conv1.weight": torch.zeros(3)},
            "is not a ViT of this kind: it has no blocks.0.attn.proj.bias",
        ),
        (without("head.bias")(build().state_dict()), "has half a head: --fresh_head True"),
        (
            build().state_dict() | {"head.weight": torch.zeros(10, 32)},
            "the head's weight and bias have shapes (10, 32) and (10,), this model's (10, 64)",
        ),
        (
            build().state_dict() | {"head.bias": torch.zeros(9)},
            "the head's weight and bias have shapes (10, 64) and (9,)",
        ),
        (build().state_dict() | {"head.weight": torch.zeros(())}, "head.weight has shape ()"),
        (build().state_dict() | {"cls_token": torch.zeros(())}, "cls_token has shape ()"),
        (
            build().state_dict() | {"pos_embed": torch.zeros(17, 64)},
            "pos_embed has shape (17, 64), this model's (1, 17, 64)",
        ),
        (
            without("vit.layers.1.attention.k_proj.weight")(to_huggingface(build().state_dict())),
            "w.safetensors: blocks.1.attn.qkv.weight is of q, k and v, and they are not all there",
        ),
        (
            without("vit.layers.1.attention.q_proj.bias")(to_huggingface(build().state_dict())),
            "blocks.1.attn.qkv.bias is of q, k and v",
        ),
    ],
)
def test_weights_of_another_model(tmp_path, capsys, weights, words):
    save_file(weights, tmp_path / "w.safetensors")
    argv = [
        "--run_dir",
        tmp_path / "run",
        "--loader",
        "synthetic",
        "--dtype",
        "float32",
        "--batch_size",
        "16",
        "--init_from",
        tmp_path / "w.safetensors",
    ]
    status, _, err = run_main(train.main, argv, capsys)
    assert status == 2 and words in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_what_lies_beside_a_file_is_heeded(tmp_path):
    model, mean, std = build(layer_norm_eps=1e-12), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours, path = (
        VisionTransformer("tiny-debug", 28, 10, layer_norm_eps=1e-12).eval(),
        tmp_path / "model.safetensors",
    )
    pixels = torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8)

    def load(weights, **files):
        for name in ("config", "preprocessor_config"):
            (tmp_path / f"{name}.json").unlink(missing_ok=True)
            if name in files:
                (tmp_path / f"{name}.json").write_text(json.dumps(files[name]))
        save_file(weights, path)
        found, notes = pretrained.load_pretrained(str(path), ours, DATA.mean, DATA.std)
        ours.load_state_dict(found)
        with torch.no_grad():
            return [ours(normalise(pixels, DATA.mean, DATA.std)), " ".join(notes)]

    with torch.no_grad():
        theirs, plain = model(normalise(pixels, mean, std)), model(normalise(pixels, DATA.mean, DATA.std))
    assert (theirs - plain).abs().max() > 1e-2
    named = to_huggingface(model.state_dict())
    hf = {"model_type": "vit", "num_attention_heads": 2, "layer_norm_eps": 1e-12}
    timms = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 10,
        "pretrained_cfg": {"mean": mean, "std": std},
        "model_args": {"img_size": 28, "patch_size": 7, "embed_dim": 64, "depth": 4, "num_heads": 2},
    }
    for expected, words, weights, files in [
        (
            theirs,
            "patch embedding",
            named,
            dict(config=hf, preprocessor_config={"image_mean": mean, "image_std": std}),
        ),
        (plain, "it does not say how", named, dict(config=hf)),
        (plain, "it does not say how", named, {}),
        (plain, "it does not say how", model.state_dict(), {}),
        (
            plain,
            "it does not say how",
            named,
            dict(config=hf, preprocessor_config={"image_mean": None, "image_std": None}),
        ),
        (
            theirs,
            "warning: its layer_norm_eps is 1e-06, this model's 1e-12: --layer_norm_eps 1e-06",
            model.state_dict(),
            dict(config=timms),
        ),
    ]:
        got, notes = load(weights, **files)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert words in notes and ("warning" in notes) == ("warning" in words)
    in21k = {name.removeprefix("vit."): t for name, t in named.items()} | {
        "pooler.dense.weight": torch.zeros(64, 64)
    }
    del (
        in21k["classifier.weight"],
        in21k["classifier.bias"],
    )  # a ViTModel, as google/vit-base-patch16-224-in21k is
    save_file(in21k, path)
    found, notes = pretrained.load_pretrained(str(path), ours, DATA.mean, DATA.std, fresh_head=True)
    assert found.keys() == model.state_dict().keys() - {"head.weight", "head.bias"}
    for weights, files, words in [
        (named, dict(config=hf | {"num_attention_heads": 4}), "has 4 attention heads, this model has 2"),
        (named, dict(config=hf | {"hidden_act": "relu"}), "activation relu"),
        (
            model.state_dict(),
            dict(config=timms | {"model_args": timms["model_args"] | {"num_heads": 4}}),
            "has 4 attention heads",
        ),
        (
            model.state_dict(),
            dict(config=timms | {"architecture": "vit_base_patch16_clip_quickgelu_224"}),
            "is not the plain ViT",
        ),
        (
            model.state_dict(),
            dict(config=timms | {"model_args": {"global_pool": "avg"}}),
            "is not the plain ViT",
        ),
        (
            model.state_dict(),
            dict(config=timms | {"architecture": "resnet18", "model_args": {}}),
            "is not the plain ViT",
        ),
        (model.state_dict(), dict(config=timms | {"architecture": "nope"}), "timm can't build nope"),
        (model.state_dict(), dict(config=[1]), "config.json is damaged"),
        (
            model.state_dict(),
            dict(config=timms | {"model_args": "none"}),
            "config.json is damaged: pretrained_cfg and model_args",
        ),
        (
            model.state_dict(),
            dict(config=timms | {"pretrained_cfg": {"mean": 0.5}}),
            "config.json is damaged: mean is 0.5",
        ),
        (
            model.state_dict(),
            dict(config=timms | {"pretrained_cfg": {"std": [1, 1, 0]}}),
            "config.json is damaged: std is",
        ),
        (
            named,
            dict(config=hf | {"layer_norm_eps": "small"}),
            "config.json is damaged: layer_norm_eps is 'small', not a number above 0",
        ),
        (
            named,
            dict(preprocessor_config={"image_mean": [0.5]}),
            "preprocessor_config.json is damaged: image_mean",
        ),
    ]:
        with pytest.raises(UserError, match=words):
            load(weights, **files)


def test_timms_weights_come_as_safetensors_or_not_at_all(monkeypatch, tmp_path):
    import huggingface_hub

    with pytest.raises(UserError, match="Invalid pretrained tag"):
        sources.read_timm("vit_tiny_patch16_224.nope")
    with pytest.raises(UserError, match="vit_base_patch16_clip_quickgelu_224 is not the plain ViT"):
        sources.read_timm("vit_base_patch16_clip_quickgelu_224")
    get = timm.models.get_pretrained_cfg
    with monkeypatch.context() as patch:
        patch.setattr(
            timm.models, "get_pretrained_cfg", lambda name: dataclasses.replace(get(name), hf_hub_id=None)
        )
        with pytest.raises(UserError, match="timm has no weights for vit_tiny_patch16_224"):
            sources.read_timm("vit_tiny_patch16_224")
    asked = []

    def download(repo, name):
        asked.append((repo, name))
        raise ConnectionError("[Errno -2] Name or service\nnot known")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(
        UserError,
        match="can't get vit_tiny_patch16_224 from the Hugging Face hub: .* Name or service not known",
    ):
        sources.read_timm("vit_tiny_patch16_224")
    assert asked == [("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "model.safetensors")]


def test_positions_are_interpolated_as_timm_does(tmp_path):
    from timm.layers import resample_abs_pos_embed

    for size in (14, 42, 63):
        weights = build(size=size).state_dict()
        fitted, notes = pretrained.fit_weights(weights, build(), "w", grid=(size // 7, size // 7))
        expected = resample_abs_pos_embed(weights["pos_embed"], [4, 4], num_prefix_tokens=1)
        assert (
            torch.equal(fitted["pos_embed"], expected)
            and f"from {size // 7} × {size // 7} to 4 × 4" in notes[0]
        )
    same, notes = pretrained.fit_weights(build().state_dict(), build(), "w")
    assert torch.equal(same["pos_embed"], build().pos_embed) and not notes


# ---- in: training from it


def start(tmp_path, source, *flags, run_dir="run", preset=(), status=0):
    """train.py from weights, one step that changes nothing; what it saved."""
    argv = [
        *preset,
        "--run_dir",
        tmp_path / run_dir,
        *ONE_STEP,
        "--init_from",
        source,
        *flags,
    ]
    assert train.main([str(a) for a in argv]) == status
    return stored(checkpoint.latest(tmp_path / run_dir)) if status == 0 else None


@pytest.mark.parametrize("format", ["timm", "hf"])
def test_a_run_starts_from_an_export(runs, tmp_path, monkeypatch, format):
    out = make(runs["plain"], tmp_path / "out", format=format)
    monkeypatch.chdir(tmp_path)
    got, expected = start(tmp_path, "out/model.safetensors"), load_file(out / "model.safetensors")
    expected = from_huggingface(expected) if format == "hf" else expected
    assert got.keys() == expected.keys() and all(torch.equal(t, got[name]) for name, t in expected.items())
    notes = get_notes(tmp_path / "run")
    assert not notes if format == "timm" else not any("warning" in note for note in notes), notes
    assert json.loads((tmp_path / "run/config.json").read_text())["init_from"] == str(
        out / "model.safetensors"
    )  # absolute


def test_other_image_size_other_classes_and_static_lora(tmp_path, capsys):
    source = build(size=42, classes=7)
    save_with_config(source.state_dict(), tmp_path / "w.safetensors", img_size=42)
    start(tmp_path, tmp_path / "w.safetensors", status=2)
    assert (
        "is for 7 classes, this model for 10: --fresh_head True" in capsys.readouterr().err
        and not (tmp_path / "run").exists()
    )
    for run_dir, flags in (("run", []), ("lora", ["--mode", "lora", "--dtype", "bfloat16"])):
        got = start(tmp_path, tmp_path / "w.safetensors", "--fresh_head", True, *flags, run_dir=run_dir)
        for name, t in source.state_dict().items():
            if name not in ("head.weight", "head.bias", "pos_embed"):
                assert torch.equal(got[name], t.to(got[name].dtype)), name
        assert got["head.weight"].shape == (10, 64) and got["head.weight"].abs().max() < 1e-20
        expected = pretrained.interpolate_positions(source.pos_embed.detach(), (6, 6), 4)
        torch.testing.assert_close(got["pos_embed"], expected, rtol=0, atol=0)
        notes = "\n".join(get_notes(tmp_path / run_dir))
        assert (
            "positions interpolated from 6 × 6 to 4 × 4" in notes
            and "fresh head for 10 classes instead of its own for 7" in notes
        )
    assert got["blocks.0.attn.qkv.lora_B.0"].abs().max() < 1e-20
    assert got["blocks.0.attn.qkv.lora_A"].any()


def test_a_run_of_another_image_size_out_and_in_again(tmp_path, capsys):
    """Its positions are fitted to the size, and the evaluation, both exports and their cards have it."""
    torch.manual_seed(0)
    weights = {name: torch.randn_like(t) / 10 for name, t in build().state_dict().items()}
    save_with_config(weights, tmp_path / "w.safetensors", img_size=28)
    got = start(tmp_path, tmp_path / "w.safetensors", "--image_size", 42)
    expected = pretrained.interpolate_positions(weights["pos_embed"], (4, 4), 6)
    torch.testing.assert_close(got["pos_embed"], expected, rtol=0, atol=0)
    assert "positions interpolated from 4 × 4 to 6 × 6" in "\n".join(get_notes(tmp_path / "run"))

    out = make(tmp_path / "run", tmp_path / "timm")
    config = json.loads((out / "config.json").read_text())
    assert config["model_args"]["img_size"] == 42 and config["pretrained_cfg"]["input_size"] == [3, 42, 42]
    assert "training images of 42 pixels" in (out / "README.md").read_text()
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert torch.equal(model.pos_embed, expected)
    hf = make(tmp_path / "run", tmp_path / "hf", format="hf")
    assert json.loads((hf / "config.json").read_text())["image_size"] == 42

    on = ["--dataset", "fashion_mnist", "--loader", "synthetic", "--image_size"]
    results = []
    for argv in (
        [tmp_path / "run"],
        [out / "model.safetensors", *on, 42],
        [out / "model.safetensors", *on, 28],
    ):
        status, said, err = run_main(evaluate.main, argv, capsys)
        assert status == 0, err
        results.append(json.loads(said.splitlines()[-1])["val_loss"])
    assert (
        results[0] == pytest.approx(results[1], rel=1e-5) and abs(results[2] - results[0]) > 1e-3
    )  # control

    back = start(tmp_path, out / "model.safetensors", "--image_size", 42, run_dir="back")
    assert torch.equal(back["pos_embed"], expected)


def test_a_resumed_run_has_its_own_weights(tmp_path, capsys):
    save_file(build().state_dict(), tmp_path / "w.safetensors")
    save_file(build(seed=1).state_dict(), tmp_path / "other.safetensors")
    first = start(tmp_path, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").unlink()  # no longer needed

    def resume(*flags):
        argv = ["--run_dir", tmp_path / "run", "--resume", True, "--max_steps", 2, *flags]
        return run_main(train.main, argv, capsys)

    status, _, err = resume("--init_from", tmp_path / "other.safetensors")
    assert (
        status == 2
        and f"was trained with init_from = {tmp_path}/w.safetensors, it can't go on with {tmp_path}/other"
        in err
    )
    assert resume("--fresh_head", True)[0] == 2
    assert resume("--init_from", tmp_path / "w.safetensors")[0] == 0
    again = stored(checkpoint.latest(tmp_path / "run"))
    assert again.keys() == first.keys() and all(torch.equal(t, again[name]) for name, t in first.items())
    assert checkpoint.latest(tmp_path / "run").name == "step_00000002"


def test_an_empty_run_dir_starts_from_weights_under_resume_too(tmp_path):
    save_file(build().state_dict(), tmp_path / "w.safetensors")
    preset = [small_runs.get_empty_preset(tmp_path)]
    started = start(tmp_path, tmp_path / "w.safetensors", "--resume", True, preset=preset)
    assert torch.equal(started["pos_embed"], build().pos_embed)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--init_from", ""], "init_from is empty"),
        (["--init_from", "timm:"], "init_from must name a model of timm's"),
        (["--init_from", "timm:nope"], "timm has no model nope"),
        (["--fresh_head", "True"], "without them every head is fresh"),
        (
            ["--init_from", "x.safetensors", "--fork", "RUN"],
            "fork starts from a run's checkpoint and init_from from other weights: choose one",
        ),
        (
            ["--init_from", "timm:deit_tiny_patch16_224", "--dataset", "fashion_mnist", "--model", "Ti/16"],
            "can't be cut into Ti/16's patches of 16",
        ),
    ],
)
def test_mistakes_of_init_from(runs, tmp_path, capsys, flags, words):
    argv = [
        "--run_dir",
        tmp_path / "run",
        "--loader",
        "synthetic",
        "--dtype",
        "float32",
        "--batch_size",
        "16",
    ]
    status, _, err = run_main(
        train.main, argv + [runs["plain"] if word == "RUN" else word for word in flags], capsys
    )
    assert status == 2 and words in err and err.count("\n") == 1 and not (tmp_path / "run").exists(), err


def test_a_fork_of_a_run_that_started_from_weights(tmp_path, capsys):
    save_file(build().state_dict(), tmp_path / "w.safetensors")
    start(tmp_path, tmp_path / "w.safetensors", "--max_steps", 4, "--lr_warmup_steps", 1, "--keep_every", 1)
    (tmp_path / "w.safetensors").unlink()
    argv = ["--fork", tmp_path / "run", "--run_dir", tmp_path / "fork", "--max_steps", 5]
    status, _, err = run_main(train.main, argv, capsys)
    assert status == 0, err
    assert torch.equal(stored(checkpoint.latest(tmp_path / "fork"))["pos_embed"], build().pos_embed)


def train_on_rank(argv):
    """(status, stderr) of train.py on this process. Its log takes over the file descriptor itself."""
    console = os.dup(2)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 2)
        try:
            status = train.main([str(a) for a in argv])
        finally:
            sys.stderr.flush()
            os.dup2(console, 2)
            os.close(console)
        file.seek(0)
        return status, file.read()


@pytest.mark.parametrize("flags", [["--dp_shard", "2"], ["--dp_shard", "1", "--mode", "lora"]])
def test_on_two_ranks_from_rank_0s_file(on_ranks, tmp_path, flags):
    save_file(build().state_dict(), tmp_path / "w.safetensors")
    argv = [
        "--run_dir",
        tmp_path / "run",
        *ONE_STEP,
        "--init_from",
        tmp_path / "w.safetensors",
        *flags,
    ]
    assert [status for status, _ in on_ranks(2, train_on_rank, argv)] == [0, 0]
    got = stored(checkpoint.latest(tmp_path / "run"))
    assert all(torch.equal(got[name], t) for name, t in build().state_dict().items())
    (tmp_path / "w.safetensors").write_bytes(b"no")
    argv[1] = tmp_path / "second"
    answers = on_ranks(2, train_on_rank, argv)
    assert (
        [status for status, _ in answers] == [2, 2]
        and "is no safetensors file" in answers[0][1]
        and not argv[1].exists()
    )


def test_submit_takes_the_file_along(tmp_path, monkeypatch, capsys):
    from launch import submit

    monkeypatch.chdir(tmp_path)
    save_file(build().state_dict(), "w.safetensors")
    argv = [
        "--dry_run",
        "--gpus_per_node",
        "1",
        str(REPO / "config/debug.py"),
        "--loader",
        "synthetic",
        "--run_dir",
        "run",
    ]
    _, (run,) = submit.parse([*argv, "--init_from", "w.safetensors"])
    asked = run.get_argv(None)
    assert asked[-2:] == ["--init_from", str(tmp_path / "w.safetensors")]
    assert (
        submit.main([*argv, "--init_from", "w.safetensors"]) == 0 and "warning" not in capsys.readouterr().err
    )
    assert submit.main([*argv, "--init_from", "gone.safetensors"]) == 0
    assert f"warning: {tmp_path}/gone.safetensors is not there" in capsys.readouterr().err
    _, (run,) = submit.parse([*argv, "--init_from", "timm:deit_tiny_patch16_224"])
    assert run.get_argv(None)[-1] == "timm:deit_tiny_patch16_224"


# ---- full size


@pytest.mark.slow
def test_the_papers_model(tmp_path):
    """ViT-L/16 at 224 with adapters of rank 64 that matter, as a checkpoint of its lora phase in bfloat16; in
    timm under its own name, and as Hugging Face's."""
    run_dir = tmp_path / "run"
    data = "--dataset imagenet --loader synthetic --train_samples 2 --batch_size 2"
    flags = f"--model L/16 {data} --epochs 9 --max_steps 1 --lr 1e-3 --lr_warmup_steps 0 --mode lora"
    assert train.main([*flags.split(), "--compile", "False", "--run_dir", str(run_dir)]) == 0
    for format in ("timm", "hf"):
        out = make(run_dir, tmp_path / format, "--images", 4, format=format)
        config = json.loads((out / "config.json").read_text())
        assert config.get("architecture", "vit_large_patch16_224") == "vit_large_patch16_224"
        assert sum(t.numel() for t in load_file(out / "model.safetensors").values()) == 304_326_632
