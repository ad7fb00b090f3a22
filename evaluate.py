"""Top-1, top-5 and loss over the whole validation set, each image once, on any number of ranks.

    python evaluate.py runs/debug                                    a run's newest checkpoint, whatever its phase
    python evaluate.py runs/debug/checkpoints/step_00001250          one of its checkpoints
    python evaluate.py runs/debug --merged True                      with the adapters merged into the base, as an export has it
    torchrun --nproc_per_node 4 evaluate.py runs/vit_l16_in1k --data_dir /data/imagenet
    python evaluate.py timm:vit_base_patch16_224.augreg_in1k --dataset imagenet --data_dir /data/imagenet
    python evaluate.py FILE.safetensors --dataset fashion_mnist --data_dir datasets/fashion_mnist

With adapters: also how far the logits of the merged model are from those of the unmerged one, both in float32. The last line is JSON.
A checkpoint's index is a pickle: take RUN from nobody you don't trust. safetensors hold none.
"""

import copy
import dataclasses
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import train
from data.datasets import DATASETS
from data.device import normalise
from data.loader import prefetch
from errors import SharedError
from launch import distributed, failures
from lora.inject import merge_lora
from lora.kernels import separate_products
from model import checkpoint
from model.pretrained import copy_weights, find_variant, load_pretrained
from model.sources import TIMM, read_pretrained


@dataclass
class Evaluation:
    """None: as in the run."""

    merged: bool = False  # merge the adapters into the base first, in float32
    data_dir: str | None = None  # holds val.beton, or the raw files
    loader: Literal["ffcv", "folder", "synthetic"] | None = None
    num_workers: int | None = None
    batch_size: int = 256  # images of a rank's forward pass
    dtype: Literal["float32", "bfloat16"] | None = (
        None  # of the compute; None = the run's, float32 with merged
    )
    dataset: str | None = None  # of weights that are no run's: a row of data/datasets.py's DATASETS
    num_classes: int | None = None  # of a tree of one's own, for weights that are no run's


def load_checkpoint(path: Path, meta: dict, **changes) -> tuple[train.Config, train.State]:
    """Config, with `changes` and without what only training needs, and State of a checkpoint. Raises ValueError if its meta is damaged, or
    for changes out of range."""
    cfg = train.typed_config(dict(meta["config"]), f"{path}/meta.json")
    cfg = dataclasses.replace(
        cfg,
        compile=False,
        activation_checkpointing="none",
        rand_augment=0,
        stage_dir=None,
        baseline=None,
        **changes,
    )
    train.check_config(cfg)
    return cfg, train.read_state(meta, path)


def build_checkpoint(
    cfg: train.Config, s: train.State, path: Path, device: torch.device | str = "cpu"
) -> torch.nn.Module:
    """The model of a checkpoint, whole on this rank, in evaluation mode. With cfg.dtype float32 all of it is float32, and a base stored
    in bfloat16 has just those values. On all ranks together. Raises OSError for damaged files."""
    model = train.build_model(cfg, s.phase, s.ranks, device)
    checkpoint.load_weights(path, model)
    return model.eval()


def read_weights(source: str, asked: Evaluation) -> tuple[train.Config, dict, list[str]]:
    """(Config that builds it, weights, notes) of timm:NAME or FILE.safetensors. Raises ValueError or OSError."""
    found = (
        None if source.startswith(TIMM) else read_pretrained(source)
    )  # a file's mistakes first, a download last
    if not asked.dataset:
        raise ValueError(
            f"{source} is not a run: say what to evaluate it on, --dataset {' or '.join(DATASETS)}"
        )
    if asked.dataset not in DATASETS:
        raise ValueError(f"unknown dataset {asked.dataset!r}, there are: {', '.join(DATASETS)}")
    found = found or read_pretrained(source)
    data = DATASETS[asked.dataset]
    given = {name: getattr(asked, name) for name in ("data_dir", "loader") if getattr(asked, name)}
    cfg = train.Config(
        model=find_variant(found, source),
        dataset=asked.dataset,
        num_classes=asked.num_classes,
        num_workers=asked.num_workers,
        layer_norm_eps=found.layer_norm_eps or 1e-6,
        dtype=asked.dtype or "float32",
        compile=False,
        **{"data_dir": f"datasets/{asked.dataset}", **given},
    )
    train.check_config(cfg)
    head, here = found.weights.get("head.weight"), cfg.num_classes or data.num_classes
    classes = len(head) if head is not None and head.ndim else 0
    if classes != here:
        raise ValueError(
            f"{source} {f'is for {classes} classes' if classes else 'has no head'}, the data has {here} classes"
        )
    weights, notes = load_pretrained(source, train.build_on_meta(cfg), data.mean, data.std)
    return cfg, weights, notes


@torch.no_grad()
def compare_merged(cfg: train.Config, model, merged, loader, device: torch.device) -> tuple[float, float]:
    """(largest difference of the two models' logits, largest logit) over the validation set, on all ranks."""
    data, worst = DATASETS[cfg.dataset], torch.zeros(2, device=device)
    for images, labels in prefetch(loader.epoch(0), device):
        images = normalise(images, data.mean, data.std)
        with separate_products():  # where fp32 on a CPU would have it multiply by a sum of its own
            logits = model(images)[labels >= 0]
        others = merged(images)[labels >= 0]
        if len(logits):
            worst = torch.maximum(worst, torch.stack([(logits - others).abs().max(), logits.abs().max()]))
    return tuple(distributed.max_over_processes(value, device) for value in worst.tolist())


def evaluate(target: str, asked: Evaluation, device: torch.device) -> dict:
    """What the last line says. All ranks together. Raises ValueError, OSError or RuntimeError, in one sentence, for what can't be read."""
    rank, ranks, weights = distributed.get_world_rank(), distributed.get_world_size(), {}
    flags = {
        name: getattr(asked, name)
        for name in ("data_dir", "loader", "num_workers", "dtype")
        if getattr(asked, name) is not None
    }
    if target.startswith(TIMM) or Path(target).suffix == ".safetensors" or Path(target).is_file():

        def read():
            cfg, found, notes = read_weights(target, asked)
            weights.update(found)
            return cfg, train.State(), None, notes

        cfg, s, path, notes = checkpoint.on_process_0(read)
    else:

        def read():
            if (weights_file := Path(target, "model.safetensors")).is_file():
                raise ValueError(f"{target} is no run, it holds weights: give {weights_file}")
            return checkpoint.resolve(Path(target))

        path, meta, notes = checkpoint.on_process_0(read)
        if asked.dataset or asked.num_classes:
            raise ValueError(
                "dataset and num_classes are the run's own: these flags are for weights that are no run's"
            )
        cfg, s = load_checkpoint(path, meta, **flags)
        if asked.merged and not asked.dtype:
            cfg = dataclasses.replace(cfg, dtype="float32")
    for note in notes if rank == 0 else ():
        print(note)
    with distributed.together():
        loader = train.build_loader(
            cfg.loader,
            cfg.dataset,
            cfg.data_dir,
            "val",
            asked.batch_size,
            cfg.seed,
            cfg.num_workers,
            None,
            cfg.num_classes,
            0,
            rank,
            ranks,
        )
    exact = dataclasses.replace(cfg, dtype="float32")
    has_adapters = s.phase != "full"
    if path:
        model = build_checkpoint(exact if asked.merged else cfg, s, path, device)
    else:
        model = train.build_model(cfg, "full", None, device)
        copy_weights(model, weights)
    difference = None
    if has_adapters:
        unmerged = (
            model if asked.merged or cfg.dtype == "float32" else build_checkpoint(exact, s, path, device)
        )
        merged = merge_lora(copy.deepcopy(unmerged))
        difference, largest = compare_merged(cfg, unmerged, merged, loader, device)
        model = merged if asked.merged else model
    result = train.evaluate(cfg, model, loader, device)
    loader.close()
    return {
        "target": target,
        "checkpoint": path and path.name,
        "model": cfg.model,
        "phase": path and s.phase,
        "epoch": path and s.epoch,
        "step": path and s.step,
        "merged": asked.merged and has_adapters,
        "dtype": cfg.dtype,
        "ranks": ranks,
        "images": loader.num_samples,
        **result,
        **({"merge_difference": difference, "largest_logit": largest} if has_adapters else {}),
    }


def main(argv: list[str]) -> int:
    """Exit status: 0; 2 for what can't be read or evaluated; 1 if another rank is lost."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: so it is
    target = argv[0] if argv and not argv[0].startswith("-") else None
    try:
        device = distributed.start()
        with distributed.together():
            if not target and "--help" not in argv:
                raise ValueError(
                    "evaluate what? python evaluate.py RUN, or RUN/checkpoints/step_00001234, timm:NAME, FILE.safetensors; "
                    "flags come after it"
                )
            asked = train.parse_flags(
                argv[1:] if target else ["--help"], Evaluation(), prog="evaluate.py", description=__doc__
            )
            if asked.batch_size < 1:
                raise ValueError(f"batch_size must be above 0, not {asked.batch_size}")
        result = evaluate(target, asked, device)
    except (ValueError, OSError) as e:
        everywhere = isinstance(e, (ValueError, SharedError))  # not a damaged image, which one rank has met
        if distributed.get_world_rank() == 0 or not everywhere:
            print(f"error: {e}", file=sys.stderr)
        if everywhere:
            distributed.finish()
        return 2
    except RuntimeError as e:
        if not failures.is_lost_process(e):
            raise
        print(f"error: {e}", file=sys.stderr)
        return 1
    if distributed.get_world_rank() == 0:
        where = (
            f"{result['checkpoint']}, epoch {result['epoch']}, phase {result['phase']}, "
            if result["checkpoint"]
            else ""
        )
        print(
            f"{target}: {where}{result['images']:,} images{', adapters merged' if result['merged'] else ''}\n"
            f"top-1 {result['val_top1']:.2f} %, top-5 {result['val_top5']:.2f} %, loss {result['val_loss']:.4f}"
        )
        if "merge_difference" in result:
            print(
                f"merged and unmerged logits differ by {result['merge_difference']:.1e} at most, "
                f"the largest is {result['largest_logit']:.1f}"
            )
        print(json.dumps(result))
    distributed.finish()
    return 0


if __name__ == "__main__":
    distributed.exit(main, sys.argv[1:])
