"""Top-1, top-5 and loss over the whole validation set, each image once, on any number of processes.

    python evaluate.py runs/debug                           a run's newest checkpoint, whatever its phase
    python evaluate.py runs/debug/checkpoints/step_00001250 one of its checkpoints
    python evaluate.py runs/debug --merged True             adapters merged into the base, as an export has it
    python evaluate.py runs/debug --ema True                the moving average of its weights (ema_decay)
    torchrun --nproc_per_node 4 evaluate.py runs/vit_l16_in1k --data_dir /data/imagenet
    python evaluate.py timm:vit_base_patch16_224.augreg_in1k --dataset imagenet --data_dir /data/imagenet
    python evaluate.py FILE.safetensors --dataset fashion_mnist --data_dir datasets/fashion_mnist

With adapters: also how far the logits of the merged model are from those of the unmerged one, both in
float32. The last line is JSON; a number that is not finite stands there as null, and the exit status is 1.
A checkpoint's index is a pickle: take RUN from nobody you don't trust. safetensors hold none.
"""

import copy
import dataclasses
import json
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import train
from config.checks import check_config
from config.cli import parse_flags, typed_config
from config.ranges import NonNegativeInt, PositiveInt, check_ranges
from data.datasets import DATASETS, get_spec
from data.device import normalise
from data.loader import Loader, build_loader, prefetch
from data.order import DataError
from errors import SharedError, UserError
from files import PathStr, expand_home
from launch import distributed, failures
from lora.inject import merge_lora, use_reference
from model import checkpoint, parallel
from model.checkpoint import on_process_0
from model.ema import Ema
from model.pretrained import copy_weights, find_variant, load_pretrained
from model.sources import TIMM, is_source, read_pretrained
from model.variants import VARIANTS
from model.weight_files import describe_folder, get_run
from monitor.logger import get_json_values
from start import State, read_state


@dataclass
class Evaluation:
    """None: as in the run."""

    merged: bool = False  # merge the adapters into the base first, in float32
    ema: bool = False  # the moving average of the weights, of a run with ema_decay
    data_dir: PathStr | None = None  # holds val.beton, or the raw files
    loader: Literal["ffcv", "folder", "synthetic"] | None = None
    num_workers: NonNegativeInt | None = None
    batch_size: PositiveInt = 256  # images of a process's forward pass
    dtype: Literal["float32", "bfloat16"] | None = None  # None = the run's, float32 with merged
    dataset: str | None = None  # of weights that are no run's: a row of data/datasets.py's DATASETS
    image_size: PositiveInt | None = None  # pixels, for weights that are no run's; None = the dataset's
    num_classes: PositiveInt | None = None  # of a tree of one's own, for weights that are no run's


# ------------------------------------------------------------------------------------------------------------
# a run's checkpoint, or weights that are no run's


def load_checkpoint(path: Path, meta: dict, **changes) -> tuple[train.Config, State]:
    """The Config of a checkpoint, with `changes` and without what only training needs, and its State.

    Raises UserError if its meta is damaged, or for changes out of range.
    """
    cfg = typed_config(train.Config, meta["config"], f"{path}/meta.json")
    without = dict(compile=False, activation_checkpointing="none", rand_augment=0, color_jitter=0.0)
    cfg = dataclasses.replace(cfg, stage_dir=None, baseline=None, **without, **changes)
    if cfg.dtype == "float32":
        cfg.residual_dtype = "float32"
    check_config(cfg)
    return cfg, read_state(meta, path)


def build_checkpoint(
    cfg: train.Config, s: State, path: Path, device: torch.device | str = "cpu", ema: bool = False
) -> nn.Module:
    """The model of a checkpoint, whole on this process, in evaluation mode; `ema`: with the averages of its
    weights in their place. All processes together.

    Raises UserError for damaged files, and where there are no averages.
    """
    model = train.build_model(cfg, s.phase, s.ranks, device, None, s.frozen_blocks)
    checkpoint.load_weights(path, model)
    if ema:
        averages = Ema(model, cfg.ema_decay)
        if not averages.load(path, model):
            raise SharedError(
                f"{path} has no averages of the weights (its run had ema_decay 0): leave out --ema"
            )
        averages.put_into(model)
    return model.eval()


def read_target(
    target: str, asked: Evaluation, weights: dict[str, Tensor]
) -> tuple[train.Config, State, Path | None, list[str]]:
    """(Config that builds the model, State, its checkpoint, notes), for one process to call.

    Of weights that are no run's the checkpoint is None, and they are put into `weights`. Raises UserError, or
    OSError, for what can't be read.
    """
    if is_source(target):
        if asked.merged:
            raise UserError(f"merged is for a run's adapters: {target} holds weights, which have none")
        if asked.ema:
            raise UserError(f"{target} is no run, it has no averages of its weights: leave out --ema")
        cfg, found, notes = read_weights(target, asked)
        weights.update(found)
        return cfg, State(), None, notes
    if Path(target).is_dir() and not get_run(Path(target)):
        inside = describe_folder(Path(target))
        if inside:
            raise UserError(f"{target} is no run{inside}")
    path, meta, notes = checkpoint.resolve(Path(target))
    if asked.dataset or asked.image_size or asked.num_classes:
        raise UserError(
            "dataset, image_size and num_classes are the run's own: these flags are for weights that are no "
            "run's"
        )
    changes = {}
    for name in ("data_dir", "loader", "num_workers", "dtype"):
        if getattr(asked, name) is not None:
            changes[name] = getattr(asked, name)
    if asked.merged:
        changes.setdefault("dtype", "float32")
    cfg, s = load_checkpoint(path, meta, **changes)
    return cfg, s, path, notes


def read_weights(source: str, asked: Evaluation) -> tuple[train.Config, dict[str, Tensor], list[str]]:
    """(Config that builds the model, weights, notes) of timm:NAME or FILE.safetensors. Raises UserError."""
    found = None
    if not source.startswith(TIMM):  # a file's mistakes come first, a download last
        found = read_pretrained(source)
    if not asked.dataset:
        raise UserError(
            f"{source} is not a run: say what to evaluate it on, --dataset {' or '.join(DATASETS)}"
        )
    if asked.dataset not in DATASETS:
        raise UserError(f"unknown dataset {asked.dataset!r}, there are: {', '.join(DATASETS)}")
    if found is None:
        found = read_pretrained(source)
    data = get_spec(asked.dataset, asked.image_size)
    cfg = train.Config(
        model=find_variant(found, source),
        dataset=asked.dataset,
        data_dir=asked.data_dir or f"datasets/{asked.dataset}",
        loader=asked.loader or "ffcv",
        num_workers=asked.num_workers,
        image_size=asked.image_size,
        num_classes=asked.num_classes,
        layer_norm_eps=found.layer_norm_eps or 1e-6,
        dtype=asked.dtype or "float32",
        compile=False,
    )
    check_config(cfg)
    check_classes(source, found.weights.get("head.weight"), cfg.num_classes or data.num_classes)
    weights, notes = load_pretrained(source, train.build_on_meta(cfg), data.mean, data.std)
    return cfg, weights, notes


def check_classes(source: str, head: Tensor | None, num_classes: int) -> None:
    """Raise UserError unless `head` (C, D) is for the data's number of classes."""
    if head is None or head.ndim == 0 or len(head) == 0:
        raise UserError(f"{source} has no head, the data has {num_classes} classes")
    if len(head) != num_classes:
        raise UserError(f"{source} is for {len(head)} classes, the data has {num_classes} classes")


# ------------------------------------------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def compare_merged(
    cfg: train.Config, model: nn.Module, merged: nn.Module, batches: Iterator, device: torch.device
) -> dict[str, float]:
    """The largest difference of the two models' logits, and the largest logit, of all processes' batches.

    In float32 without TF32, `model`'s adapters by their plain definition: its own operator multiplies by a
    sum W + B A, which would agree with a merged weight whatever B A is."""
    model = use_reference(copy.deepcopy(model))
    data, worst = get_spec(cfg.dataset, cfg.image_size), torch.zeros(2, device=device)
    for images, labels in prefetch(batches, device):
        images = normalise(images, data.mean, data.std)
        with parallel.matmul_precision("highest"):
            logits = model(images)[labels >= 0]  # (N, C)
            others = merged(images)[labels >= 0]
        if len(logits):
            worst = torch.maximum(worst, torch.stack([(logits - others).abs().max(), logits.abs().max()]))
    difference, largest = [distributed.max_over_processes(value, device) for value in worst.tolist()]
    return {"merge_difference": difference, "largest_logit": largest}


def evaluate(target: str, asked: Evaluation, device: torch.device) -> dict:
    """What the last line says. All processes together.

    Raises UserError for what can't be read: a SharedError, which every process has, but for the DataError of
    a damaged image, which is one process's own.
    """
    world_rank, world_size = distributed.get_world_rank(), distributed.get_world_size()
    weights: dict[str, Tensor] = {}  # on process 0
    cfg, s, path, notes = on_process_0(read_target, target, asked, weights)
    if world_rank == 0:
        for note in notes:
            print(note)
    parallel.set_up_device(device, VARIANTS[cfg.model]["embed_dim"])
    with distributed.together():
        loader = build_loader(
            cfg.loader,
            cfg.dataset,
            cfg.data_dir,
            "val",
            batch_size=asked.batch_size,
            seed=cfg.seed,
            num_workers=cfg.num_workers,
            num_classes=cfg.num_classes,
            image_size=cfg.image_size,
            world_rank=world_rank,
            world_size=world_size,
        )
    if world_rank == 0:
        for note in loader.notes:
            print(note)
    with closing(loader):
        if path is None:
            model = train.build_model(cfg, "full", None, device)
            copy_weights(model, weights)
            metrics = train.evaluate(cfg, model, loader.epoch(0), device)
        else:
            metrics = evaluate_checkpoint(cfg, s, path, asked, loader, device)
    return {
        "target": target,
        "checkpoint": path and path.name,
        "model": cfg.model,
        "phase": path and s.phase,
        "epoch": path and s.epoch,
        "step": path and s.step,
        "merged": asked.merged and s.phase != "full",
        "ema": asked.ema,
        "dtype": cfg.dtype,
        "ranks": world_size,
        "images": loader.num_samples,
        **metrics,
    }


def evaluate_checkpoint(
    cfg: train.Config, s: State, path: Path, asked: Evaluation, loader: Loader, device: torch.device
) -> dict[str, float]:
    """Loss, top-1 and top-5 of a checkpoint's model, merged and averaged as `asked`; with adapters, also what
    merging changes."""
    exact, merge = dataclasses.replace(cfg, dtype="float32", residual_dtype="float32"), asked.merged
    model = build_checkpoint(exact if merge else cfg, s, path, device, asked.ema)
    if s.phase == "full":
        return train.evaluate(cfg, model, loader.epoch(0), device)
    unmerged = model
    if not merge and cfg.dtype != "float32":
        unmerged = build_checkpoint(exact, s, path, device, asked.ema)
    merged = merge_lora(copy.deepcopy(unmerged))
    differences = compare_merged(cfg, unmerged, merged, loader.epoch(0), device)
    return train.evaluate(cfg, merged if merge else model, loader.epoch(0), device) | differences


def print_result(result: dict) -> None:
    """A few lines for a person, then the line of JSON."""
    where, how = "", ""
    if result["checkpoint"]:
        where = f"{result['checkpoint']}, epoch {result['epoch']}, phase {result['phase']}, "
    if result["ema"]:
        how = ", weights averaged"
    if result["merged"]:
        how += ", adapters merged"
    print(f"{result['target']}: {where}{result['images']:,} images{how}")
    print(
        f"top-1 {result['val_top1']:.2f} %, top-5 {result['val_top5']:.2f} %, loss {result['val_loss']:.4f}"
    )
    if "merge_difference" in result:
        print(
            f"merged and unmerged logits differ by {result['merge_difference']:.1e} at most, "
            f"the largest is {result['largest_logit']:.1f}"
        )
    print(json.dumps(get_json_values(result), allow_nan=False))


# ------------------------------------------------------------------------------------------------------------
# the command


def parse(argv: list[str]) -> tuple[str, Evaluation]:
    """TARGET [--flag value …] -> (target, flags). Raises UserError."""
    has_target = bool(argv) and not argv[0].startswith("-")
    if not has_target and {"--help", "-h"}.isdisjoint(argv):
        raise UserError(
            "evaluate what? python evaluate.py RUN, or RUN/checkpoints/step_00001234, timm:NAME, "
            "FILE.safetensors; flags come after it"
        )
    flags = argv[1:] if has_target else ["--help"]
    asked = parse_flags(flags, Evaluation(), prog="evaluate.py", description=__doc__)
    check_ranges(asked)
    return expand_home(argv[0]), asked


def main(argv: list[str]) -> int:
    """Exit status: 0; 2 for what can't be read or evaluated; 1 if another process is lost, or a metric is not
    finite."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: so it is
    try:
        device = distributed.start()
        with distributed.together():
            target, asked = parse(argv)
        result = evaluate(target, asked, device)
    except DataError as error:  # a damaged image, which this process alone has met: the others lose it
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (UserError, RuntimeError) as error:
        return failures.refuse(error)
    lost = [name for name, value in result.items() if isinstance(value, float) and not math.isfinite(value)]
    if distributed.get_world_rank() == 0:
        print_result(result)
        if lost:
            print(f"error: {target} gives a {', '.join(lost)} that is not finite", file=sys.stderr)
    distributed.finish()
    return 1 if lost else 0


if __name__ == "__main__":
    distributed.exit(main, sys.argv[1:])
