"""Files of weights as they come from elsewhere: the grid of their positions, names under a prefix, shards,
adapters, quantised weights, folders; and metrics that are not finite."""

import json
import math
from pathlib import Path
from shlex import quote

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer as TimmViT
from timm.models._hub import save_for_hf
from transformers import ViTConfig, ViTForImageClassification

import evaluate
from data import synthetic
from errors import UserError
from model import sources
from model.huggingface import to_huggingface
from model.pretrained import load_pretrained
from model.vit import VisionTransformer
from model.weight_files import describe_folder

HALF = (0.5, 0.5, 0.5)
ARGS = dict(patch_size=7, embed_dim=64, depth=4, num_heads=2)
ON_NOISE = "--dataset fashion_mnist --loader synthetic --batch_size 8".split()


def build(size=28):
    """The tiny-debug model of square images, 4 × 4 patches, with numbers in it."""
    torch.manual_seed(0)
    model = VisionTransformer("tiny-debug", size, 10).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
    return model


def load(path):
    weights, notes = load_pretrained(str(path), build(), HALF, HALF)
    return weights, "\n".join(notes)


def save(path, tensors, config=None):
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    if config is not None:
        path.with_name("config.json").write_text(json.dumps(config))
    return path


# ---- the grid of the positions


def save_timm(folder, size, where):
    """A timm model of images (height, width) as timm saves it, its size in config.json at `where`."""
    torch.manual_seed(1)
    model = TimmViT(img_size=size, num_classes=10, **ARGS)
    model.pretrained_cfg = {
        "architecture": "vit_tiny_patch16_224",
        "input_size": (3, *size),
        "num_classes": 10,
    }
    model.pretrained_cfg |= {"mean": HALF, "std": HALF}
    sized = {"img_size": list(size)} if where == "model_args" else {}
    save_for_hf(model, folder, model_args=ARGS | sized, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    if where == "model_args":  # alone
        del config["pretrained_cfg"]["input_size"]
    (folder / "config.json").write_text(json.dumps(config))
    return model.pos_embed.detach()


def save_hf(folder, size, image_size):
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=256,
        image_size=size,
        patch_size=7,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    torch.nn.init.normal_(model.vit.embeddings.position_embeddings)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text()) | {"image_size": image_size}
    (folder / "config.json").write_text(json.dumps(written))
    return model.vit.embeddings.position_embeddings.detach()


@pytest.mark.parametrize("size", [(14, 56), (56, 14), (21, 56)])
@pytest.mark.parametrize("where", ["model_args", "pretrained_cfg", "Hugging Face"])
def test_rectangular_positions_are_taken_as_the_config_says(tmp_path, size, where):
    """2 × 8 patches are as many as 4 × 4; 3 × 8 are no square at all."""
    if where == "Hugging Face":
        positions = save_hf(tmp_path, size, list(size))
    else:
        positions = save_timm(tmp_path, size, where)
    grid = [side // 7 for side in size]
    weights, notes = load(tmp_path / "model.safetensors")
    expected = resample_abs_pos_embed(positions, [4, 4], old_size=grid, num_prefix_tokens=1)
    assert torch.equal(weights["pos_embed"], expected) and not torch.equal(
        expected[:, :17], positions[:, :17]
    )
    assert f"positions interpolated from {grid[0]} × {grid[1]} to 4 × 4" in notes and "a square" not in notes


@pytest.mark.parametrize("where", ["model_args", "pretrained_cfg", "Hugging Face"])
def test_control_square_positions_stay_as_they_are(tmp_path, where):
    if where == "Hugging Face":
        positions = save_hf(tmp_path, (28, 28), 28)
    else:
        positions = save_timm(tmp_path, (28, 28), where)
    weights, notes = load(tmp_path / "model.safetensors")
    assert torch.equal(weights["pos_embed"], positions) and "positions" not in notes


def test_a_file_that_does_not_say_its_grid(tmp_path):
    """As many patches as the model has are taken as its own, and that is said; other numbers are refused,
    because each may be this or that: 16 are 4 × 4 and 2 × 8."""
    weights = build().state_dict()
    got, notes = load(save(tmp_path / "w.safetensors", weights))
    assert torch.equal(got["pos_embed"], weights["pos_embed"])
    assert "it does not say its grid of patches: taken as a square, 4 × 4" in notes
    for patches in (24, 25, 36):
        others = weights | {"pos_embed": torch.randn(1, 1 + patches, 64)}
        words = rf"{patches} patches, this model's are 4 × 4, .*: put .*config\.json .*, or .* --image_size"
        with pytest.raises(UserError, match=words):
            load(save(tmp_path / "w.safetensors", others))


@pytest.mark.parametrize("config, words", [
    ({"model_type": "vit", "image_size": [14, 56], "patch_size": 14}, "config says 1 × 4 patches, pos_embed"),
    ({"model_type": "vit", "image_size": [14, 56, 3], "patch_size": 7}, "config.json is damaged: image_size"),
    ({"model_type": "vit", "image_size": "large", "patch_size": 7}, "config.json is damaged: image_size"),
    ({"model_type": "vit", "image_size": 28, "patch_size": 0}, "config.json is damaged: patch_size is 0"),
])  # fmt: skip
def test_a_config_that_contradicts_its_file(tmp_path, config, words):
    path = save(tmp_path / "w.safetensors", to_huggingface(build().state_dict()), config)
    with pytest.raises(UserError, match=words):
        load(path)


def test_timms_own_grid():
    assert sources.describe_timm("vit_tiny_patch16_224")["grid"] == (14, 14)
    assert sources.describe_timm("vit_tiny_patch16_224", img_size=(112, 448))["grid"] == (7, 28)


# ---- names


@pytest.mark.parametrize("names", ["timm", "Hugging Face"])
@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "model.", "state_dict.", "module._orig_mod.", "ema.net."]
)
def test_a_prefix_that_all_names_have_is_left_out(tmp_path, prefix, names):
    weights = build().state_dict()
    named = weights if names == "timm" else to_huggingface(weights)
    got, notes = load(save(tmp_path / "w.safetensors", {prefix + name: t for name, t in named.items()}))
    assert got.keys() == weights.keys() and all(torch.equal(got[name], t) for name, t in weights.items())
    assert "its names are taken without " in notes
    assert "are taken without" not in load(save(tmp_path / "w.safetensors", dict(named)))[1]  # control


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."])
def test_wrapped_blocks(tmp_path, wrapper):
    """As they are called where each block was compiled, checkpointed or sharded for itself."""
    weights = build().state_dict()
    wrapped = {name.replace(".attn.", f".{wrapper}attn."): t for name, t in weights.items()}
    assert wrapped.keys() != weights.keys()
    got, notes = load(save(tmp_path / "w.safetensors", wrapped))
    assert got.keys() == weights.keys() and wrapper in notes


def under(prefix, weights):
    return {prefix + name: t for name, t in weights.items()}


def quantise(weights, dtype):
    """All matrices as `dtype`."""
    return {name: t.to(dtype) if t.ndim == 2 else t for name, t in weights.items()}


WEIGHTS = build().state_dict()
ADAPTER = {"base_model.model.vit.layers.0.attention.q_proj.lora_A.weight": torch.zeros(4, 64)}


@pytest.mark.parametrize("tensors, words", [
    (under("model.", WEIGHTS) | under("ema.", WEIGHTS), "more than one ViT .ema.cls_token, model.cls_token"),
    (under("net.", WEIGHTS) | {"fc.weight": torch.zeros(10, 64)}, "a ViT under net. and fc.weight outside"),
    (WEIGHTS | under("_orig_mod.", WEIGHTS), "holds some tensors twice, with _orig_mod. in their names"),
    (ADAPTER, "holds an adapter .base_model.*lora_A.weight.*: merge it into its base"),
    (WEIGHTS | {"blocks.0.attn.qkv.lora_A": torch.zeros(4, 64)}, "holds an adapter"),
    ({"base_model.model.vit.layers.0.fc1.ia3_l": torch.zeros(1, 64)}, "holds an adapter"),
    (quantise(WEIGHTS, torch.int8), "attn.proj.weight and 16 others as int8, which is not floating"),
    (WEIGHTS | {"head.weight": torch.zeros(10, 64, dtype=torch.uint8)}, "head.weight as uint8, which is not"),
    (WEIGHTS | {"head.bias": torch.zeros(10, dtype=torch.bool)}, "head.bias as bool, which is not"),
    (WEIGHTS | {"head.weight_scale": torch.zeros(1)}, "that this model hasn't, head.weight_scale"),
])  # fmt: skip
def test_names_and_types_that_are_refused(tmp_path, tensors, words):
    path = save(tmp_path / "w.safetensors", {name: t.clone() for name, t in tensors.items()})
    with pytest.raises(UserError, match=words) as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_control_every_floating_type_is_read(tmp_path, dtype):
    tensors = quantise(WEIGHTS, dtype)
    got, _ = load(save(tmp_path / "w.safetensors", tensors))
    assert all(t.dtype == torch.float32 for t in got.values())
    assert all(torch.equal(got[name], t.float()) for name, t in tensors.items())


def test_a_count_of_batches_is_not_what_is_wrong(tmp_path):
    resnet = {"bn1.weight": torch.zeros(3), "bn1.num_batches_tracked": torch.tensor(7)}
    with pytest.raises(UserError, match="is not a ViT of this kind"):
        load(save(tmp_path / "w.safetensors", resnet))


# ---- shards


def save_shards(folder, weights=WEIGHTS, count=3):
    """(index, its weight_map): the weights in `count` files, as transformers and timm write large ones."""
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        names = list(weights)[i::count]
        save_file({name: weights[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index, weight_map


def test_a_sharded_model_is_read_by_its_index(tmp_path):
    index, _ = save_shards(tmp_path)
    got, _ = load(index)
    assert got.keys() == WEIGHTS.keys() and all(torch.equal(got[name], t) for name, t in WEIGHTS.items())
    with pytest.raises(UserError, match="is one shard of 3: give model.safetensors.index.json"):
        load(tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(UserError, match="is no file, it holds weights: give .*/model.safetensors.index.json"):
        load(tmp_path)
    alone, _ = save_shards(tmp_path / "one", count=1)
    assert load(alone.with_name("model-00001-of-00001.safetensors"))[0].keys() == WEIGHTS.keys()  # control
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": ARGS | {"img_size": [14, 56]}})
    )
    assert "interpolated from 2 × 8" in load(index)[1]  # what lies beside an index is heeded, too


@pytest.mark.parametrize("change, words", [
    ({"norm.bias": "../model-00001-of-00003.safetensors"}, "its shards must be files beside it"),
    ({"norm.bias": "/etc/passwd"}, "names '/etc/passwd': its shards must be files beside it"),
    ({"norm.bias": ".."}, "names '..': its shards must be files beside it"),
    ({"norm.bias": 7}, "names 7: its shards must be files beside it"),
    ({"norm.bias": "gone.safetensors"}, "gone.safetensors is not there"),
    ({"norm.bias": "pytorch_model.bin"}, "pytorch_model.bin is a pickle"),
    ({"norm.other": "model-00001-of-00003.safetensors"}, "of-00003.safetensors has no norm.other, which"),
    (None, "is damaged: it has no weight_map"),
])  # fmt: skip
def test_an_index_that_is_wrong(tmp_path, change, words):
    index, weight_map = save_shards(tmp_path / "in")
    (tmp_path / "in/pytorch_model.bin").write_bytes(b"\x80")
    written = {"weight_map": weight_map | change} if change else {"weight_map": []}
    index.write_text(json.dumps(written))
    with pytest.raises(UserError, match=words):
        load(index)


# ---- folders and pickles


def test_what_a_folder_is_said_to_be(baseline, tmp_path):
    run = tmp_path / "a run"
    run.symlink_to(baseline)
    checkpoint = baseline / "checkpoints/step_00000006"
    for folder, of in ((run, run), (checkpoint, baseline)):
        assert describe_folder(folder) == (
            f", it is a run's: --fork {quote(str(of))} goes on from it, "
            f"python export.py {quote(str(folder))} --format timm --out DIR writes its weights"
        )
        with pytest.raises(UserError, match="is no file, it is a run's: --fork "):
            load(folder)
    adapter, pickles = tmp_path / "adapter", tmp_path / "pickles"
    adapter.mkdir()
    pickles.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_file(ADAPTER, adapter / "adapter_model.safetensors")
    (pickles / "pytorch_model.bin").write_bytes(b"\x80")
    for folder, words in (
        (adapter, "it holds an adapter without its base: merge it into its base with PEFT"),
        (pickles, "its pytorch_model.bin is a pickle: only safetensors are read here"),
    ):
        with pytest.raises(UserError, match=words):
            load(folder)
        with pytest.raises(UserError, match=f"{folder} is no run.*{words}"):
            evaluate.read_target(str(folder), evaluate.Evaluation(), {})
    assert describe_folder(tmp_path) == ""  # control


def test_a_pickle_is_refused_with_how_to_convert_it(tmp_path):
    torch.save(WEIGHTS, tmp_path / "w.pth")
    with pytest.raises(UserError) as error:
        load(tmp_path / "w.pth")
    told = str(error.value).split("convert one that you trust, ")[1].removeprefix("safetensors.torch.")
    weights = torch.load(tmp_path / "w.pth", weights_only=True)
    assert told == "save_file(torch.load('w.pth', weights_only=True), 'w.safetensors')"
    assert load(save(tmp_path / "w.safetensors", weights))[0].keys() == WEIGHTS.keys()


# ---- metrics that are not finite


@pytest.mark.parametrize("value, status", [(0.1, 0), (math.nan, 1), (math.inf, 1)])
def test_a_metric_that_is_not_finite_is_null_and_an_error(tmp_path, monkeypatch, capsys, value, status):
    monkeypatch.setitem(synthetic.SIZES, "val", 8)
    weights = WEIGHTS | {"head.bias": torch.full((10,), value)}
    path = save(tmp_path / "w.safetensors", weights)
    assert evaluate.main([str(path), *ON_NOISE]) == status
    out, err = capsys.readouterr()

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    result = json.loads(out.splitlines()[-1], parse_constant=refuse)
    assert (result["val_loss"] is None) == bool(status)
    if status:
        assert err == f"error: {path} gives a val_loss that is not finite\n"
    assert "taken as a square" in out


def test_evaluate_takes_an_index(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(synthetic.SIZES, "val", 8)
    index, _ = save_shards(tmp_path)
    assert evaluate.main([str(index), *ON_NOISE]) == 0
    gone = Path(tmp_path, "gone", index.name)
    assert evaluate.main([str(gone), *ON_NOISE]) == 2 and f"{gone} is missing" in capsys.readouterr().err
