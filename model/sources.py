"""Where weights come from: safetensors with timm's or Hugging Face's names, read with what else their source
says.

Nothing here opens a pickle, which can run code.

    timm:NAME                    timm's pretrained weights, from the Hugging Face hub or its cache
    FILE.safetensors             timm's names or a Hugging Face ViT's; config.json and
                                 preprocessor_config.json beside it are heeded
    FILE.safetensors.index.json  the same in shards
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from errors import UserError
from files import read_json
from model.huggingface import from_huggingface
from model.weight_files import INDEX, read_safetensors, read_weights

TIMM = "timm:"


class Pretrained(NamedTuple):
    """Weights by timm's names, float32, and what no shape tells; None where the source doesn't say."""

    weights: dict[str, Tensor]
    num_heads: int | None = None
    layer_norm_eps: float | None = None
    mean: tuple | None = None  # of the images they were trained on
    std: tuple | None = None
    grid: tuple[int, int] | None = None  # patches in height and width that the positions are of
    notes: tuple[str, ...] = ()  # what was done to their names, in sentences


def is_source(target: str) -> bool:
    """Whether `target` is how weights are named, timm's or a file's, there or not, and not a folder."""
    named = target.startswith(TIMM) or target.endswith((".safetensors", INDEX))
    return named or Path(target).is_file()


def read_pretrained(source: str) -> Pretrained:
    """The weights of timm:NAME, FILE.safetensors or FILE.safetensors.index.json.

    Raises UserError where they can't be had or are of a model whose function isn't that of model/vit.py.
    """
    if source.startswith(TIMM):
        return read_timm(source.removeprefix(TIMM))
    return read_file(Path(source))


def read_file(path: Path) -> Pretrained:
    """FILE.safetensors or its shards' index, with what lies beside it."""
    weights, notes = read_weights(path)
    configs = []
    for beside in (path.with_name("config.json"), path.with_name("preprocessor_config.json")):
        configs.append(read_json(beside) if beside.exists() else {})
    config, processor = configs
    if "embeddings.cls_token" in weights:  # a ViTModel, which has no head
        weights = {f"vit.{name}": tensor for name, tensor in weights.items()}
    if any(name.startswith("vit.") for name in weights):
        found = read_huggingface(path, weights, config, processor)
    elif "architecture" in config:
        found = read_timm_config(path, weights, config)
    else:
        found = Pretrained(weights)
    return found._replace(notes=tuple(notes))


def read_timm_config(path: Path, weights: dict[str, Tensor], config: dict) -> Pretrained:
    """Weights by timm's names, and what the config.json that timm wrote beside them says."""
    where = path.with_name("config.json")
    images, args = config.get("pretrained_cfg") or config, config.get("model_args") or {}
    if not isinstance(images, dict) or not isinstance(args, dict):
        raise UserError(f"{where} is damaged: pretrained_cfg and model_args are no JSON objects")
    overlay = {}
    if "input_size" in images:  # the model's too, where its arguments don't say: timm takes it so
        overlay["input_size"] = images["input_size"]
    described = describe_timm(config["architecture"], pretrained_cfg_overlay=overlay, **args)
    mean, std = read_channels(images, "mean", where), read_channels(images, "std", where)
    return Pretrained(weights, mean=mean, std=std, **described)


def read_huggingface(path: Path, weights: dict[str, Tensor], config: dict, processor: dict) -> Pretrained:
    """Weights by Hugging Face's names, without their pooler, and what the two files beside them say."""
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("vit.pooler.")}
    try:
        weights = from_huggingface(weights)
    except KeyError as e:
        raise UserError(f"{path}: {e.args[0]}") from None
    if config.get("model_type") != "vit":  # it belongs to something else
        config = {}
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{path} is of a model with activation {config['hidden_act']}, this one's is gelu")
    if not processor.get("do_normalize", True):
        processor = {}
    where, where_images = path.with_name("config.json"), path.with_name("preprocessor_config.json")
    image, patch = read_pair(config, "image_size", where), read_pair(config, "patch_size", where)
    grid = None
    if image and patch:
        grid = (image[0] // patch[0], image[1] // patch[1])
    return Pretrained(
        weights,
        num_heads=read_number(config, "num_attention_heads", where),
        layer_norm_eps=read_number(config, "layer_norm_eps", where) or 1e-12,  # Hugging Face's default
        mean=read_channels(processor, "image_mean", where_images),
        std=read_channels(processor, "image_std", where_images),
        grid=grid,
    )


def read_number(config: dict, key: str, path: Path) -> float | None:
    """The number above 0 under `key`, or None. Raises UserError, naming the file, for anything else."""
    value = config.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not value > 0:
        raise UserError(f"{path} is damaged: {key} is {value!r}, not a number above 0")
    return value


def read_pair(config: dict, key: str, path: Path) -> tuple[int, int] | None:
    """The (height, width) under `key`, where one number says both, or None. Raises UserError as
    `read_number`."""
    value = config.get(key)
    if value is None:
        return None
    pair = value if isinstance(value, list) else [value, value]
    if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
        raise UserError(f"{path} is damaged: {key} is {value!r}, not one or two whole numbers above 0")
    return tuple(pair)


def read_channels(config: dict, key: str, path: Path) -> tuple | None:
    """The numbers of the three channels under `key`, deviations above 0, or None. Raises UserError as
    `read_number`."""
    values = config.get(key)
    if values is None:
        return None
    ok = (
        isinstance(values, list) and len(values) == 3 and all(type(value) in (int, float) for value in values)
    )
    if ok and "std" in key:
        ok = all(value > 0 for value in values)
    if not ok:
        raise UserError(f"{path} is damaged: {key} is {values!r}, not the numbers of three channels")
    return tuple(values)


def read_timm(name: str) -> Pretrained:
    """timm's pretrained weights NAME, MODEL or MODEL.TAG, if the hub has them as safetensors. Raises
    UserError."""
    import timm
    from timm.models import get_pretrained_cfg

    if not timm.is_model(name):
        raise UserError(f"timm has no model {name}")
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as e:  # no such tag
        raise UserError(f"timm: {e}") from None
    described = describe_timm(name)
    if cfg and cfg.file:
        path = cfg.file
    elif cfg and cfg.hf_hub_id:
        path = download(name, cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors")
    else:
        raise UserError(f"timm has no weights for {name}")
    weights, notes = read_weights(Path(path))
    return Pretrained(weights, mean=tuple(cfg.mean), std=tuple(cfg.std), notes=tuple(notes), **described)


def download(name: str, repository: str, filename: str) -> str:
    """The path of a file of the Hugging Face hub, fetched or from its cache. Raises UserError."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repository, filename)
    except (
        Exception
    ) as e:  # of the network, the hub, its cache or its libraries: whatever it is, it is not ours
        raise UserError(f"can't get {name} from the Hugging Face hub: {' '.join(str(e).split())}") from None


def describe_timm(name: str, **model_args) -> dict:
    """A timm model's num_heads, layer_norm_eps and grid, by Pretrained's names for them.

    Raises UserError if it computes something else than model/vit.py, which the names and shapes of its
    weights need not show.
    """
    import timm
    from timm.models.vision_transformer import Block
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    try:
        with torch.device("meta"):
            model = timm.create_model(name, **model_args)
    except Exception as e:  # an unknown name, arguments of another version: timm raises what comes
        raise UserError(f"timm can't build {name}: {' '.join(str(e).split())}") from None
    block = model.blocks[0] if type(model) is TimmViT else None
    plain_block = type(block) is Block and type(block.mlp.act) is nn.GELU
    if not plain_block or model.global_pool != "token" or model.no_embed_class:
        raise UserError(
            f"timm's {name} is not the plain ViT of model/vit.py: class token, pre-norm blocks, GELU"
        )
    grid = tuple(model.patch_embed.grid_size)
    return {"num_heads": block.attn.num_heads, "layer_norm_eps": block.norm1.eps, "grid": grid}


def build_timm(folder: Path) -> nn.Module:
    """The timm model that a folder's config.json and model.safetensors describe, in evaluation mode.

    Raises UserError where a file is missing or damaged, RuntimeError where the weights are not exactly the
    model's.
    """
    import timm

    config = read_json(folder / "config.json")
    model = timm.create_model(
        config["architecture"], num_classes=config["num_classes"], **config["model_args"]
    )
    model.load_state_dict(read_safetensors(folder / "model.safetensors"), strict=True)
    return model.eval()
