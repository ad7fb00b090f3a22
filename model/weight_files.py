"""Files of weights that come from elsewhere: safetensors, whole or in shards, with the names that a ViT's
tensors have without what wrapped the model when they were saved.

Nothing here opens a pickle, which can run code. What can't be read is refused by name, with the way out.
"""

import re
from pathlib import Path
from shlex import quote

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from errors import UserError
from files import read_json

INDEX = ".safetensors.index.json"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
# What torch.compile, checkpoint_wrapper and FSDP put into names, at whatever depth.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
HF_CLASS_TOKENS = ("vit.embeddings.cls_token", "embeddings.cls_token")  # of a classifier, of a bare ViTModel
ADAPTER_NAME = re.compile(r"\.(lora_|base_layer\.|ia3_|lokr_|loha_|hada_|oft_|vera_lambda_)")
MERGE = (
    "merge it into its base with PEFT, PeftModel.from_pretrained(base, FOLDER).merge_and_unload(), "
    "and save that"
)


def read_weights(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors by name in float32, what was done to their names, in sentences) of FILE.safetensors, or of the
    shards that FILE.safetensors.index.json names.

    Raises UserError for what can't be read, a shard without the others, an adapter without its base, what is
    not floating point, and names under a prefix that not all of them have.
    """
    check_whole(path)
    tensors = read_shards(path) if path.name.endswith(INDEX) else read_safetensors(path)
    check_no_adapter(path, tensors)
    check_floating(path, tensors)
    tensors, notes = strip_names(path, tensors)
    return {name: tensor.float() for name, tensor in tensors.items()}, notes


# ---- what is in a file


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """A file's tensors by name, on the CPU.

    Raises UserError for a file that is missing, can't be read or is cut short, for pickled content under
    whatever name, and for what is no safetensors file at all.
    """
    if not path.exists():
        raise UserError(f"{path} is not there")
    if not path.is_file():
        raise UserError(f"{path} is no file{describe_folder(path)}")
    if path.suffix in PICKLES:
        raise pickled(path)
    try:
        return load_file(path)
    except OSError as e:
        raise UserError(f"{path} can't be read: {e.strerror or e}") from None
    except SafetensorError as e:
        reason = str(e).removeprefix("Error while deserializing header: ")
    with open(path, "rb") as file:
        start = file.read(9)
    # After the fact: the first byte of an intact file, part of a length, may be the same as a pickle's. A zip
    # file, a pickle's protocol, the brace that begins safetensors' JSON.
    if start.startswith(b"PK") or start[:1] == b"\x80":
        raise pickled(path)
    what = "is cut short or damaged" if start[8:] == b"{" else "is no safetensors file"
    raise UserError(f"{path} {what}: {reason}")


def pickled(path: Path) -> UserError:
    return UserError(
        f"{path} is a pickle, as .pt and .bin files are, which can run code when it is opened: only "
        "safetensors are read here; convert one that you trust, safetensors.torch.save_file("
        f"torch.load({path.name!r}, weights_only=True), {path.with_suffix('.safetensors').name!r})"
    )


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors that an index assigns to the safetensors files beside it.

    Raises UserError for an index that is damaged or names a file in another folder, and for a shard that is
    missing or lacks a tensor.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} is damaged: it has no weight_map from tensors to files")
    for file in weight_map.values():
        beside = isinstance(file, str) and Path(file).name == file != ".."
        if not beside:
            raise UserError(f"{index} names {file!r}: its shards must be files beside it")
    tensors = {}
    for file in sorted(set(weight_map.values())):
        shard = read_safetensors(index.with_name(file))
        for name in [name for name, where in weight_map.items() if where == file]:
            if name not in shard:
                raise UserError(f"{index.with_name(file)} has no {name}, which {index.name} says it has")
            tensors[name] = shard[name]
    return tensors


def describe_folder(folder: Path) -> str:
    """What to give instead of `folder`, as the end of a sentence; "" where nothing in it is known."""
    run = get_run(folder)
    if run:
        return (
            f", it is a run's: --fork {quote(str(run))} goes on from it, "
            f"python export.py {quote(str(folder))} --format timm --out DIR writes its weights"
        )
    for name in ("model.safetensors", f"model{INDEX}"):
        if (folder / name).is_file():
            return f", it holds weights: give {folder / name}"
    if (folder / "adapter_config.json").is_file():
        return f", it holds an adapter without its base: {MERGE}"
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES)
    if pickles:
        return f", and its {pickles[0]} is a pickle: only safetensors are read here"
    return ""


def get_run(folder: Path) -> Path | None:
    """The run directory that `folder` is, or to which it belongs as a checkpoint, or None."""
    if (folder / "checkpoints").is_dir():
        return folder
    if (folder / "meta.json").is_file() and folder.resolve().parent.name == "checkpoints":
        return folder.resolve().parent.parent
    return None


# ---- what the tensors are


def check_whole(path: Path) -> None:
    """Raise UserError for one shard of several."""
    shard = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", path.name)
    if shard and int(shard[3]) > 1:
        raise UserError(
            f"{path} is one shard of {int(shard[3])}: give {shard[1]}{INDEX}, which names them all"
        )


def check_no_adapter(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise UserError for an adapter of PEFT's, alone or beside its base, whose weights are not the
    model's."""
    found = [name for name in tensors if ADAPTER_NAME.search(name)]
    if found or path.name == "adapter_model.safetensors":
        what = f" ({found[0]})" if found else ""
        raise UserError(f"{path} holds an adapter{what}, not a model's weights: {MERGE}")


def check_floating(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise UserError for weights that are not floating point: quantised ones mean nothing without their
    scales.

    Single numbers are left to those who know the names: a count of batches is no weight. float8 passes: as
    numbers of that type the weights are what they are, and scales beside them are names that no ViT has.
    """
    wrong = [name for name, tensor in tensors.items() if tensor.ndim and not tensor.is_floating_point()]
    if wrong:
        dtype = str(tensors[wrong[0]].dtype).removeprefix("torch.")
        others = f" and {len(wrong) - 1} others" if len(wrong) > 1 else ""
        raise UserError(
            f"{path} holds {wrong[0]}{others} as {dtype}, which is not floating point: quantised weights "
            "can't be read, save the model's own in float32, bfloat16 or float16"
        )


def strip_names(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors by the names that the ViT itself gives them, what was done, in sentences).

    Left out are wrappers' parts of names, and a prefix that all of them have (`module.`, `model.`, …). Raises
    UserError where only some have the class token's prefix, or there are several class tokens.
    """
    notes, plain = [], {}
    for name, tensor in tensors.items():
        new = name
        for wrapper in WRAPPERS:
            new = new.replace(wrapper, "")
        plain[new] = tensor
    used = [wrapper for wrapper in WRAPPERS if any(wrapper in name for name in tensors)]
    if used:
        notes.append(f"its names are taken without {' and '.join(used)}")
    if len(plain) < len(tensors):
        raise UserError(f"{path} holds some tensors twice, with {used[0]} in their names and without")
    tokens = sorted(name for name in plain if name.split(".")[-1] == "cls_token")
    if len(tokens) > 1:
        raise UserError(f"{path} holds more than one ViT ({', '.join(tokens)}): save one of them alone")
    prefix = get_prefix(tokens[0]) if tokens else ""
    outside = [name for name in plain if not name.startswith(prefix)]
    if outside:
        raise UserError(
            f"{path} has a ViT under {prefix} and {outside[0]} outside: save the model's own state dict"
        )
    if prefix:
        notes.append(f"its names are taken without {prefix}, with which all of them begin")
    return {name.removeprefix(prefix): tensor for name, tensor in plain.items()}, notes


def get_prefix(token: str) -> str:
    """What stands before the ViT's own name of its class token, timm's or Hugging Face's."""
    for own in (*HF_CLASS_TOKENS, "cls_token"):
        if token == own or token.endswith(f".{own}"):
            return token.removesuffix(own)
    return ""
