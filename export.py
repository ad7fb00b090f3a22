"""A run's model for timm, transformers or PEFT: safetensors, the library's own config, a model card.

What was written is loaded back by that library, and its logits compared with the trained model's on
validation images, before it appears under its name. Adapters are merged into the base, or written beside it:

    python export.py runs/debug --format timm --out exported/timm
    python export.py runs/debug --format hf --out exported/hf      ViTForImageClassification.from_pretrained
    python export.py runs/debug --format hf --adapters_only True --out exported/peft
    python export.py runs/debug/checkpoints/step_00001250 --format hf --out exported/step_1250
    python export.py runs/debug --ema True --format timm --out exported/ema      averaged weights (ema_decay)

Nothing is left behind if that fails; what a killed process leaves, the next export to DIR removes.
--format hf needs transformers, --adapters_only peft too: pip install -r requirements-dev.txt
"""

import contextlib
import copy
import glob
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import train
from config.cli import parse_flags
from config.ranges import PositiveInt, check_ranges
from data.datasets import get_spec
from data.device import normalise
from data.loader import build_loader
from errors import UserError, exit_with
from evaluate import build_checkpoint, load_checkpoint
from files import PathStr, expand_home, remove_leftovers, temporary
from formats import load_back, write_adapter, write_huggingface, write_timm
from launch import failures
from lora.inject import get_adapter_names, merge_lora, use_reference
from model import checkpoint
from model.checkpoint import on_process_0
from model_card import write_card
from start import State

TOLERANCE = 1e-5  # of the largest logit, or of 1 where all are smaller


@dataclass
class Export:
    format: Literal["timm", "hf"] | None = None  # timm: timm.create_model; hf: ViTForImageClassification
    out: PathStr | None = None  # folder to make
    adapters_only: bool = False  # format hf: the base without adapters, and a PEFT adapter
    ema: bool = False  # the moving average of the weights, base and adapters, of a run with ema_decay
    data_dir: PathStr | None = None  # of the validation images; None = the run's
    loader: Literal["ffcv", "folder", "synthetic"] | None = None  # None = the run's
    images: PositiveInt = 32  # whose logits are compared


# ------------------------------------------------------------------------------------------------------------
# what is written


def write_model(
    asked: Export, cfg: train.Config, model: nn.Module, classes: list[str] | None, folder: Path
) -> None:
    """All files of an export but its card."""
    if asked.adapters_only:
        adapters = get_adapter_names(model)
        base = {name: tensor for name, tensor in model.state_dict().items() if name not in adapters}
        write_huggingface(cfg, base, classes, folder / "base")
        write_adapter(cfg, model, folder)
        return
    merged = merge_lora(copy.deepcopy(model))
    if asked.format == "timm":
        write_timm(cfg, merged, classes, folder)
    else:
        write_huggingface(cfg, merged.state_dict(), classes, folder)


@contextlib.contextmanager
def writing(out: str) -> Iterator[None]:
    """Inside, what the disk refuses is a UserError that names the folder asked for."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # SafetensorError: transformers' own writing raises it, too
        raise UserError(f"can't write {out}: {error}") from None


@contextlib.contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """The name of a hidden folder beside `out`. What stands there in the end is deleted, and the parents that
    were made for it, where they are empty. Raises UserError where the disk refuses.

    A file of the folder's name and .tmp is held meanwhile: without one it is a killed process's, and deleted.
    """
    with contextlib.ExitStack() as stack:
        for folder in reversed([folder for folder in out.parents if not folder.exists()]):
            stack.callback(remove_empty, folder)
        with writing(str(out)):
            out.parent.mkdir(parents=True, exist_ok=True)
            for leftover in remove_leftovers(out.parent, f".{glob.escape(out.name)}.*.tmp"):
                shutil.rmtree(leftover.with_suffix(""), ignore_errors=True)
            held = stack.enter_context(temporary(out.with_name(f".{out.name}")))
        partial = held.with_suffix("")
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        yield partial


def remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


# ------------------------------------------------------------------------------------------------------------
# and checked


def read_images(cfg: train.Config, count: int) -> tuple[Tensor, list[str] | None]:
    """The first validation images (N, 3, H, W), N <= count, float32 and normalised; the names of the classes,
    if they are known. Raises UserError."""
    data = get_spec(cfg.dataset, cfg.image_size)
    loader = build_loader(
        cfg.loader,
        cfg.dataset,
        cfg.data_dir,
        "val",
        batch_size=count,
        seed=cfg.seed,
        num_workers=0 if cfg.loader == "folder" else 1,
        num_classes=cfg.num_classes,
        image_size=cfg.image_size,
    )
    with contextlib.closing(loader), contextlib.closing(loader.epoch(0)) as batches:
        images, labels = next(batches)
        return normalise(images[labels >= 0], data.mean, data.std), loader.classes


@torch.no_grad()
def check_logits(
    model: nn.Module, loaded: Callable[[Tensor], Tensor], images: Tensor, library: str
) -> tuple[float, float]:
    """(largest difference, largest logit). Raises UserError where they differ by more than TOLERANCE."""
    expected = use_reference(copy.deepcopy(model))(images)  # (N, C)
    got = loaded(images)  # (N, C)
    largest, difference = expected.abs().max().item(), (got - expected).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, largest):  # nor NaN
        raise UserError(
            f"{library} does not compute what was trained: the logits of {len(images)} images differ by up "
            f"to {difference:.2e}, the largest is {largest:.2f}; nothing was written"
        )
    return difference, largest


# ------------------------------------------------------------------------------------------------------------
# the command


def get_library(asked: Export) -> str:
    """The library that an export is for, by the name of its package."""
    if asked.adapters_only:
        return "peft"
    return "timm" if asked.format == "timm" else "transformers"


def get_folder(out: str) -> Path:
    """The folder to make, absolute. Raises UserError if something is there, or OSError."""
    folder = Path(out).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{out} is already there and not empty: choose another --out")
    return folder


def export(target: str, asked: Export) -> str:
    """Make asked.out from a run or checkpoint; returns what to say. Raises UserError, with nothing left
    behind."""
    with writing(asked.out):
        out = get_folder(asked.out)
    path, meta, passed_over = on_process_0(checkpoint.resolve, Path(target))
    changes = {name: getattr(asked, name) for name in ("data_dir", "loader") if getattr(asked, name)}
    cfg, s = load_checkpoint(path, meta, dtype="float32", **changes)
    check_format(asked, cfg, s, path)
    for text in passed_over:
        print(f"warning: {text}")
    images, classes = read_images(cfg, asked.images)
    model = build_checkpoint(cfg, s, path, ema=asked.ema)
    library = get_library(asked)
    name = "PEFT" if library == "peft" else library
    with unfinished(out) as partial:
        with writing(asked.out):
            partial.mkdir(parents=True)
            write_model(asked, cfg, model, classes, partial)
            write_card(partial, library, path, meta, s, len(images), asked.ema)
        difference, largest = check_logits(model, load_back(partial, library), images, name)
        with writing(asked.out):
            mode = (partial / "README.md").stat().st_mode
            for file in partial.rglob("*.safetensors"):
                file.chmod(mode)  # safetensors makes them for their owner alone
            os.replace(partial, out)
    kind = "averaged" if asked.ema else "trained"
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    return (
        f"{path}, phase {s.phase}: the logits of {len(images)} validation images in {name} are those of the "
        f"{kind} model, within {difference:.1e}, the largest is {largest:.2f}\n"
        f"wrote {asked.out}: {', '.join(files)}"
    )


def check_format(asked: Export, cfg: train.Config, s: State, path: Path) -> None:
    """Raise UserError for a model that the format asked for can't hold."""
    if asked.adapters_only and s.phase == "full":
        raise UserError(f"{path} is in its full phase: it has no adapters to export")
    if asked.format == "timm" and cfg.layer_norm_eps != 1e-6:
        raise UserError(
            f"timm's ViT has layer_norm_eps 1e-6, this model {cfg.layer_norm_eps:g}: --format hf can say so"
        )


def parse(argv: list[str]) -> tuple[str, Export]:
    """RUN --format … --out … -> (run, flags). Raises UserError, for a library that is not installed too."""
    has_target = bool(argv) and not argv[0].startswith("-")
    asked = Export()
    if has_target or "--help" in argv or "-h" in argv:
        flags = argv[1:] if has_target else ["--help"]
        asked = parse_flags(flags, asked, prog="export.py", description=__doc__)
    if not has_target or not asked.format or not asked.out:
        raise UserError(
            "export what, for whom, where to? python export.py RUN --format timm|hf --out DIR, the run first"
        )
    check_ranges(asked)
    if asked.adapters_only and asked.format != "hf":
        raise UserError("adapters_only is for PEFT, which goes with --format hf")
    needed = ["transformers"] if asked.format == "hf" else []
    if asked.adapters_only:
        needed.append("peft")
    for module in needed:
        if not importlib.util.find_spec(module):
            raise UserError(
                f"{module} is not installed, which checks what was written: "
                "pip install -r requirements-dev.txt"
            )
    return expand_home(argv[0]), asked


def main(argv: list[str]) -> int:
    """Exit status: 0; 2 for what can't be exported, or came out wrong."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: so it is
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of what PEFT calls
    try:
        target, asked = parse(argv)
        print(export(target, asked))
    except UserError as error:
        return failures.refuse(error)
    return 0


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
