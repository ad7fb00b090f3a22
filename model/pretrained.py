"""Weights that come from elsewhere: safetensors with timm's or Hugging Face's names, made to fit a model. Nothing here opens a pickle,
which can run code.

    timm:NAME          timm's pretrained weights, from the Hugging Face hub or its cache
    FILE.safetensors   timm's names or a Hugging Face ViT's; what config.json and preprocessor_config.json beside it say is heeded
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from model import distributed
from model.checkpoint import read_json
from model.vit import VARIANTS, from_huggingface

TIMM = "timm:"


class Pretrained(NamedTuple):
    """Weights by timm's names, float32, and what no shape tells; None where the source doesn't say."""
    weights: dict[str, Tensor]
    num_heads: int | None = None
    layer_norm_eps: float | None = None
    mean: tuple | None = None  # of the images they were trained on
    std: tuple | None = None


# ---------------------------------------------------------------------------------------------------------------------------------
# reading

def read_pretrained(source: str) -> Pretrained:
    """The weights of timm:NAME or FILE.safetensors. Raises ValueError or OSError, in one sentence, where they can't be had or are of
    a model whose function isn't that of model/vit.py."""
    return read_timm(source.removeprefix(TIMM)) if source.startswith(TIMM) else read_file(Path(source))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """A file's tensors by name, on the CPU. Raises FileNotFoundError; ValueError for pickled content under whatever name, a file that is
    cut short, and what is no safetensors file at all; OSError."""
    pickled = f"{path} is a pickle, as .pt and .bin files are, which can run code when it is opened: only safetensors are read here"
    if not path.is_file():
        inside = ": give its model.safetensors" if (path / "model.safetensors").is_file() else ""
        raise FileNotFoundError(f"{path} is not there" if not path.exists() else f"{path} is no file{inside}")
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise ValueError(pickled)
    try:
        return load_file(path)
    except SafetensorError as e:
        with open(path, "rb") as file:
            start = file.read(9)
        # After the fact: the first byte of an intact file, part of a length, may be the same. zip, pickle's protocols, JSON's brace.
        if start.startswith(b"PK") or start[:1] == b"\x80":
            raise ValueError(pickled) from None
        what = "is cut short or damaged" if start[8:] == b"{" else "is no safetensors file"
        raise ValueError(f"{path} {what}: {str(e).removeprefix('Error while deserializing header: ')}") from None


def read_file(path: Path) -> Pretrained:
    """FILE.safetensors, with what lies beside it. A ViTModel of Hugging Face, without a head, will do; its pooler is left out."""
    weights = {name: tensor.float() for name, tensor in read_safetensors(path).items()}
    beside = [path.with_name("config.json"), path.with_name("preprocessor_config.json")]
    config, processor = [read_json(file) if file.exists() else {} for file in beside]
    if "embeddings.cls_token" in weights:
        weights = {f"vit.{name}": tensor for name, tensor in weights.items()}
    if any(name.startswith("vit.") for name in weights):
        try:
            weights = from_huggingface({name: tensor for name, tensor in weights.items() if not name.startswith("vit.pooler.")})
        except KeyError as e:
            raise ValueError(f"{path}: {e.args[0]}") from None
        config = config if config.get("model_type") == "vit" else {}  # else it belongs to something else
        if config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"{path} is of a model with activation {config['hidden_act']}, this one's is gelu")
        images = processor if processor.get("do_normalize", True) else {}
        return Pretrained(weights, read_number(config, "num_attention_heads", beside[0]),
                          read_number(config, "layer_norm_eps", beside[0]) or 1e-12,  # Hugging Face's default
                          *[read_channels(images, key, beside[1]) for key in ("image_mean", "image_std")])
    if "architecture" not in config:
        return Pretrained(weights)
    images, args = config.get("pretrained_cfg") or config, config.get("model_args") or {}
    if not isinstance(images, dict) or not isinstance(args, dict):
        raise ValueError(f"{beside[0]} is damaged: pretrained_cfg and model_args are no JSON objects")
    return Pretrained(weights, *describe_timm(config["architecture"], **args),
                      *[read_channels(images, key, beside[0]) for key in ("mean", "std")])


def read_number(config: dict, key: str, path: Path) -> float | None:
    value = config.get(key)
    if value is not None and (type(value) not in (int, float) or not value > 0):
        raise ValueError(f"{path} is damaged: {key} is {value!r}, not a number above 0")
    return value


def read_channels(config: dict, key: str, path: Path) -> tuple | None:
    """The numbers of the three channels."""
    values = config.get(key)
    ok = isinstance(values, list) and len(values) == 3 and all(type(v) in (int, float) and ("std" not in key or v > 0) for v in values)
    if values is not None and not ok:
        raise ValueError(f"{path} is damaged: {key} is {values!r}, not the numbers of three channels")
    return None if values is None else tuple(values)


def read_timm(name: str) -> Pretrained:
    """timm's pretrained weights NAME, MODEL or MODEL.TAG, if the hub has them as safetensors."""
    import timm
    from huggingface_hub import hf_hub_download
    from timm.models import get_pretrained_cfg
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name}")
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as e:
        raise ValueError(f"timm: {e}") from None
    known = describe_timm(name)
    if cfg and cfg.file:
        path = cfg.file
    elif cfg and cfg.hf_hub_id:
        try:
            path = hf_hub_download(cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors")
        except Exception as e:  # of the network, the hub, its cache or its libraries
            raise OSError(f"can't get {name} from the Hugging Face hub: {' '.join(str(e).split())}") from None
    else:
        raise ValueError(f"timm has no weights for {name}")
    weights = {key: tensor.float() for key, tensor in read_safetensors(Path(path)).items()}
    return Pretrained(weights, *known, tuple(cfg.mean), tuple(cfg.std))


def describe_timm(name: str, **model_args) -> tuple[int, float]:
    """(num_heads, layer_norm_eps) of a timm model. Raises ValueError if it computes something else than model/vit.py, which the names and
    shapes of its weights need not show."""
    import timm
    from timm.models.vision_transformer import Block
    from timm.models.vision_transformer import VisionTransformer as TimmViT
    try:
        with torch.device("meta"):
            model = timm.create_model(name, **model_args)
    except Exception as e:  # an unknown name, arguments of another version: timm raises what comes
        raise ValueError(f"timm can't build {name}: {' '.join(str(e).split())}") from None
    block = model.blocks[0] if type(model) is TimmViT else None
    if type(block) is not Block or type(block.mlp.act) is not nn.GELU or model.global_pool != "token" or model.no_embed_class:
        raise ValueError(f"timm's {name} is not the plain ViT of model/vit.py: class token, pre-norm blocks, GELU")
    return block.attn.num_heads, block.norm1.eps


def build_timm(folder: Path) -> nn.Module:
    """The timm model that a folder's config.json and model.safetensors describe, in evaluation mode. Raises ValueError or OSError, and
    RuntimeError where the weights are not exactly the model's."""
    import timm
    config = read_json(folder / "config.json")
    model = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
    model.load_state_dict(read_safetensors(folder / "model.safetensors"), strict=True)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------------------
# fitting

def load_pretrained(source: str, model: nn.Module, mean: tuple, std: tuple,
                    fresh_head: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """(weights, notes): those of `source`, for `model` (on meta will do) and images normalised by `mean` and `std`, and what was done to
    make them fit, in sentences. Raises ValueError or OSError, in one sentence, where they can't be had or don't fit."""
    found = read_pretrained(source)
    weights, notes = fit_weights(found.weights, model, source, fresh_head)
    heads, eps = model.blocks[0].attn.num_heads, model.norm.eps
    if found.num_heads not in (None, heads):
        raise ValueError(f"{source} has {found.num_heads} attention heads, this model has {heads}")
    if found.layer_norm_eps not in (None, eps):
        notes.append(f"warning: its layer_norm_eps is {found.layer_norm_eps:g}, this model's {eps:g}: "
                     f"--layer_norm_eps {found.layer_norm_eps:g} keeps its function")
    if found.mean is None or found.std is None:
        notes.append(f"it does not say how its images were normalised: taken as here, mean {mean}, std {std}")
    elif (found.mean, found.std) != (tuple(mean), tuple(std)):
        weights = renormalise(weights, found.mean, found.std, mean, std)
        notes.append(f"its images were normalised by mean {found.mean}, std {found.std}: the difference is in the patch embedding now")
    return weights, notes


def fit_weights(weights: dict[str, Tensor], model: nn.Module, source: str, fresh_head: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """(weights, notes): by name and shape those of `model`, or ValueError saying what differs.

    Positions of another image size are interpolated, as timm does. `fresh_head`: the weights' head, if any, is left out.
    """
    shapes, weights, notes = {name: p.shape for name, p in model.named_parameters()}, dict(weights), []
    for name in sorted(weights.keys() & shapes.keys()):
        if weights[name].ndim != len(shapes[name]):
            raise ValueError(f"{source}: {name} has shape {tuple(weights[name].shape)}, this model's {tuple(shapes[name])}")
    classes, head = shapes["head.weight"][0], [weights.pop(name) for name in ("head.weight", "head.bias") if name in weights]
    body = {name for name in shapes if not name.startswith("head.")}
    here, there = describe(shapes), describe({name: t.shape for name, t in weights.items()})
    if there and here != there:
        raise ValueError(f"{source} is a ViT of {there}, this model of {here}")
    for names, what in ((body - weights.keys(), "has no"), (weights.keys() - body, "has a parameter that this model hasn't,")):
        if names:
            raise ValueError(f"{source} is not a ViT of this kind: it {what} {min(names)}")
    old, new = weights["pos_embed"].shape, shapes["pos_embed"]  # (1, 1 + grid², D)
    if old != new:
        grids = [math.isqrt(max(shape[1] - 1, 0)) for shape in (old, new)]
        if old[2] != new[2] or grids[0] ** 2 + 1 != old[1]:
            raise ValueError(f"{source}: pos_embed of shape {tuple(old)} is not of a class token and a square of patches")
        weights["pos_embed"] = interpolate_positions(weights["pos_embed"], grids[1])
        notes.append(f"positions interpolated from {grids[0]} × {grids[0]} to {grids[1]} × {grids[1]}")
    for name in sorted(body):
        if weights[name].shape != shapes[name]:
            raise ValueError(f"{source}: {name} has shape {tuple(weights[name].shape)}, this model's {tuple(shapes[name])}")
    if fresh_head:
        notes.append(f"a fresh head for {classes} classes" + (f" instead of its own for {len(head[0])}" if head else ""))
    elif len(head) < 2:
        raise ValueError(f"{source} has {'half a' if head else 'no'} head: --fresh_head True starts with a new one, for {classes} classes")
    elif len(head[0]) != classes:
        raise ValueError(f"{source} is for {len(head[0])} classes, this model for {classes}: --fresh_head True starts with a new head")
    elif (found := [tuple(t.shape) for t in head]) != (here := [tuple(shapes[name]) for name in ("head.weight", "head.bias")]):
        raise ValueError(f"{source}: the head's weight and bias have shapes {found[0]} and {found[1]}, this model's {here[0]} and {here[1]}")
    else:
        weights |= {"head.weight": head[0], "head.bias": head[1]}
    return weights, notes


def describe(shapes: dict[str, tuple]) -> str | None:
    """What tells one ViT from another, by its parameters' shapes; None if it is no ViT."""
    if not all(shapes.get(name) for name in ("cls_token", "patch_embed.proj.weight")):  # absent, or of no dimension
        return None
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    return f"width {shapes['cls_token'][-1]}, {depth} blocks, patches of {shapes['patch_embed.proj.weight'][-1]}"


def find_variant(found: Pretrained, source: str) -> str:
    """The row of VARIANTS that weights are of. Raises ValueError if there is none."""
    kind = describe({name: t.shape for name, t in found.weights.items()})
    for name, row in VARIANTS.items():
        if kind == f"width {row['embed_dim']}, {row['depth']} blocks, patches of {row['patch_size']}" and \
                found.num_heads in (None, row["num_heads"]):
            return name
    raise ValueError(f"{source} is of none of the models here: {', '.join(VARIANTS)}")


def interpolate_positions(positions: Tensor, grid: int) -> Tensor:
    """(1, 1 + N, D) -> (1, 1 + grid², D): the class token's stays, the others' square is resized, bicubic with antialiasing, as timm's
    resample_abs_pos_embed does."""
    cls, patches = positions[:, :1].float(), positions[:, 1:].float()
    side = math.isqrt(patches.shape[1])
    patches = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)


def renormalise(weights: dict[str, Tensor], mean: tuple, std: tuple, new_mean: tuple, new_std: tuple) -> dict[str, Tensor]:
    """Weights for images normalised by `new_mean` and `new_std` that do what `weights` do for `mean` and `std` (each of three, in units of
    the full range): a pixel x there is x · new_std / std + (new_mean - mean) / std here, which the patch embedding takes in. Exact: it pads
    nothing."""
    mean, std, new_mean, new_std = [torch.tensor(values, dtype=torch.float64) for values in (mean, std, new_mean, new_std)]
    weight, bias = weights["patch_embed.proj.weight"].double(), weights["patch_embed.proj.bias"].double()  # (D, 3, P, P), (D,)
    bias = bias + weight.sum(dim=(2, 3)) @ ((new_mean - mean) / std)
    weight = weight * (new_std / std)[:, None, None]
    return weights | {"patch_embed.proj.weight": weight.float(), "patch_embed.proj.bias": bias.float()}


@torch.no_grad()
def copy_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put rank 0's `weights` into the model on every rank, whole or sharded; the other ranks' don't count. Parameters that are not among
    them keep their values. All ranks together: each parameter is sent to all, one at a time."""
    for name in distributed.on_rank_0(list, weights):
        p = model.get_parameter(name)
        tensor = torch.empty(p.shape, device=p.device)
        if distributed.get_rank() == 0:
            tensor.copy_(weights[name])
        if dist.is_initialized():
            dist.broadcast(tensor, src=0)
        p.copy_(distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else tensor)
