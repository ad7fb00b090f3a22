"""A run's model for timm, transformers or PEFT: weights as safetensors, the library's own config, a model card. What was written is loaded
back by that library, and its logits compared with the trained model's on validation images, before it appears under its name.

    python export.py runs/debug --format timm --out exported/timm      the newest checkpoint, adapters merged into the base
    python export.py runs/debug --format hf --out exported/hf          for ViTForImageClassification.from_pretrained
    python export.py runs/debug/checkpoints/step_00001250 --format hf --out exported/step_1250
    python export.py runs/debug --format hf --adapters_only True --out exported/peft      the frozen base and a PEFT adapter beside it

Nothing is left behind if that fails; of a process that is killed, a hidden folder .OUT.PID.tmp beside DIR. --format hf needs
transformers, --adapters_only peft too: pip install -r requirements-dev.txt
"""

import contextlib
import copy
import dataclasses
import importlib.util
import json
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import train
from data.datasets import DATASETS
from data.device import normalise
from evaluate import build_checkpoint, load_checkpoint
from lora.inject import get_adapter_names, merge_lora
from lora.kernels import separate_products
from lora.layers import LoRALinear
from files import write_json
from model import checkpoint
from model.sources import TIMM, build_timm
from model.huggingface import to_huggingface
from model.variants import VARIANTS
from monitor.log import load_run

TOLERANCE = 1e-5  # of the largest logit, or of 1 where all are smaller
# timm's names for rows of VARIANTS; the others are vit_tiny_patch16_224 with other arguments
ARCHITECTURES = {
    "S/16": "vit_small_patch16_224",
    "B/16": "vit_base_patch16_224",
    "L/16": "vit_large_patch16_224",
}
# not for the card's recipe: paths, this machine, and what it says in words
PRIVATE = (
    "run_dir",
    "data_dir",
    "stage_dir",
    "baseline",
    "fork",
    "init_from",
    "resume",
    "num_workers",
    "compile",
)


@dataclass
class Export:
    format: Literal["timm", "hf"] | None = (
        None  # timm: timm.create_model; hf: transformers' ViTForImageClassification
    )
    out: str | None = None  # folder to make
    adapters_only: bool = False  # format hf: the base without adapters, and a PEFT adapter
    data_dir: str | None = None  # of the validation images; None = the run's
    loader: Literal["ffcv", "folder", "synthetic"] | None = None  # None = the run's
    images: int = 32  # whose logits are compared


# ---------------------------------------------------------------------------------------------------------------------------------
# what is written


def write_weights(weights: dict[str, Tensor], path: Path) -> None:
    """safetensors, float32. Raises SafetensorError, for a full disk too."""
    save_file(
        {name: tensor.detach().float().contiguous() for name, tensor in weights.items()},
        path,
        metadata={"format": "pt"},
    )


def write_timm(cfg: train.Config, model: nn.Module, classes: list[str] | None, folder: Path) -> None:
    """config.json as timm's own export has it, and model.safetensors."""
    data, row = DATASETS[cfg.dataset], VARIANTS[cfg.model]
    size, num_classes = data.image_size, model.head.out_features
    write_json(
        folder / "config.json",
        {
            "architecture": ARCHITECTURES.get(cfg.model, "vit_tiny_patch16_224"),
            "num_classes": num_classes,
            "num_features": row["embed_dim"],
            "global_pool": "token",
            **({"label_names": classes} if classes else {}),
            "model_args": {
                "img_size": size,
                **{name: row[name] for name in ("patch_size", "embed_dim", "depth", "num_heads")},
            },
            "pretrained_cfg": {
                "custom_load": False,
                "input_size": [3, size, size],
                "fixed_input_size": True,
                "interpolation": "bilinear",
                "crop_pct": size / data.short_side,
                "crop_mode": "center",
                "mean": data.mean,
                "std": data.std,
                "num_classes": num_classes,
                "pool_size": None,
                "first_conv": "patch_embed.proj",
                "classifier": "head",
            },
        },
    )
    write_weights(model.state_dict(), folder / "model.safetensors")


def write_huggingface(
    cfg: train.Config, weights: dict[str, Tensor], classes: list[str] | None, folder: Path
) -> None:
    """config.json and model.safetensors by transformers itself, which gives them the names of the published files, that all its versions
    read; preprocessor_config.json of the images as evaluation here sees them, but that transformers cuts out the middle a pixel further up or
    left where an odd number of pixels goes and torchvision rounds the half up. `weights` are merged, or a base without its adapters."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    data, row = DATASETS[cfg.dataset], VARIANTS[cfg.model]
    names = dict(enumerate(classes or [f"LABEL_{i}" for i in range(len(weights["head.weight"]))]))
    config = ViTConfig(
        hidden_size=row["embed_dim"],
        num_hidden_layers=row["depth"],
        num_attention_heads=row["num_heads"],
        intermediate_size=4 * row["embed_dim"],
        image_size=data.image_size,
        patch_size=row["patch_size"],
        hidden_dropout_prob=cfg.dropout,
        layer_norm_eps=cfg.layer_norm_eps,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    model = ViTForImageClassification(config)
    model.load_state_dict(
        to_huggingface({name: tensor.float() for name, tensor in weights.items()}), strict=True
    )
    model.save_pretrained(folder)
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "BitImageProcessor",  # ViT's own can't resize the shorter side and cut out the middle
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": data.short_side},
            "resample": 2,  # bilinear
            "do_center_crop": True,
            "crop_size": {"height": data.image_size, "width": data.image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": data.mean,
            "image_std": data.std,
        },
    )


def write_adapter(cfg: train.Config, model: nn.Module, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors of PEFT: every layer's rank and alpha by the module names of transformers 5."""
    from peft import LoraConfig

    ranks, alphas, weights = {}, {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, LoRALinear):
            continue
        rows = [
            key.removesuffix(".weight") for key in to_huggingface({f"{name}.weight": module.weight})
        ]  # q, k, v, or the whole
        for part, (key, rank) in enumerate(zip(rows, module.ranks)):
            if rank:
                start = sum(module.ranks[:part])
                weights[f"base_model.model.{key}.lora_A.weight"] = module.lora_A[start : start + rank]
                weights[f"base_model.model.{key}.lora_B.weight"] = module.lora_B[str(part)]
                ranks[key], alphas[key] = (
                    rank,
                    rank if module.alpha is None else module.alpha,
                )  # scaled by alpha / rank, so by 1
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(alphas.values()),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=sorted(ranks),
        use_rslora=cfg.lora_scaling == "rslora",
        inference_mode=True,
        base_model_name_or_path="base",
    )
    config.auto_mapping = {
        "base_model_class": "ViTForImageClassification",
        "parent_library": "transformers.models.vit.modeling_vit",
    }
    config.save_pretrained(folder)
    write_weights(weights, folder / "adapter_model.safetensors")


def describe_training(cfg: train.Config, s: train.State) -> str:
    """A sentence or two of the card: what this run trained, up to this checkpoint."""
    paper = "PreLoRA (arXiv 2509.21619)"
    if cfg.mode == "full":
        return f"Trained with all parameters from beginning to end: the baseline of {paper}."
    if cfg.mode == "lora":
        return f"Trained as static LoRA, adapters, head, norms and embeddings on a base that was frozen from the first step: a baseline of {paper}."
    then = {
        "full": "This is a checkpoint of the first phase: there are no adapters yet.",
        "warmup": "This is a checkpoint of the second phase: the base was not frozen yet.",
        "lora": "",
    }[s.phase]
    return f"Trained with {paper}: first all parameters, then base and LoRA adapters together, then adapters on a frozen base. {then}".strip()


def describe_metrics(cfg: train.Config, s: train.State, run_dir: Path) -> tuple[str, str]:
    """(phases with their epochs, the last evaluation) by the log of the run whose checkpoint this is, if it is still there."""
    if not (run_dir / "metrics.jsonl").exists():
        return s.phase, "not known, the run's log was not beside the checkpoint"
    try:
        epochs = [e for e in load_run(run_dir)[1] if e["epoch"] <= s.epoch] if s.epoch else []
    except ValueError:
        return s.phase, "not known, the run's log was damaged"
    spans = [
        (phase, [e["epoch"] for e in epochs if e["phase"] == phase]) for phase in ("full", "warmup", "lora")
    ]
    phases = "; ".join(f"{phase}: epochs {span[0]} to {span[-1]}" for phase, span in spans if span) or s.phase
    evaluated = [e for e in epochs if e["val_top1"] is not None]
    if not evaluated:
        return phases, "not evaluated" if epochs else "no epoch was finished"
    e = evaluated[-1]
    return phases, (
        f"after epoch {e['epoch']}, on the whole validation set: top-1 {e['val_top1']:.2f} %, top-5 {e['val_top5']:.2f} %, "
        f"loss {e['val_loss']:.4f}"
        + (f" (as trained, computed in {cfg.dtype})" if cfg.dtype != "float32" else "")
    )


def write_card(
    meta: dict, s: train.State, path: Path, asked: Export, model: nn.Module, images: int, folder: Path
) -> None:
    """README.md, the model card: what a run's files know of the model, whose logits of `images` images are compared. Its licence is for
    whoever publishes it to fill in."""
    cfg = train.typed_config(dict(meta["config"]), f"{path}/meta.json")  # as it was trained
    phases, metrics = describe_metrics(cfg, s, path.resolve().parent.parent)
    data = f"an image folder of {cfg.num_classes:,} classes" if cfg.num_classes else cfg.dataset
    dtypes = checkpoint.get_stored_dtypes(path)
    adapters = get_adapter_names(model)
    sizes = {name: p.numel() for name, p in model.named_parameters() if name not in adapters}
    rounded = sum(size for name, size in sizes.items() if dtypes[name] == torch.bfloat16)
    base = (
        "float32 throughout"
        if not rounded
        else (
            f"bfloat16 for {rounded:,} of its {sum(sizes.values()):,} parameters, which the freeze rounded to it and training went on with, float32 "
            "for the others; exported are just these values, as float32"
        )
    )
    started = ""
    if cfg.init_from:
        source = cfg.init_from if cfg.init_from.startswith(TIMM) else Path(cfg.init_from).name
        started = (
            f"- started from: the weights of {source}{', with a fresh head' if cfg.fresh_head else ''}\n"
        )
    elif cfg.fork:
        started = f"- started from: a checkpoint of another run, {Path(train.split_fork(cfg.fork)[0]).name}, whose own beginning is not told here\n"
    ranks = (
        "\n".join(f"| {family} | {' '.join(map(str, layers))} |" for family, layers in s.ranks.items())
        if s.phase != "full"
        else ""
    )
    recipe = {name: value for name, value in vars(cfg).items() if name not in PRIVATE and value is not None}
    library = "peft" if asked.adapters_only else {"timm": "timm", "hf": "transformers"}[asked.format]
    usage = {
        "timm": "import json, safetensors.torch, timm\n"
        'config = json.load(open("config.json"))\n'
        'model = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])\n'
        'model.load_state_dict(safetensors.torch.load_file("model.safetensors"))\n'
        '# or: timm.create_model("local-dir:FOLDER", pretrained=True)',
        "transformers": "from transformers import AutoImageProcessor, ViTForImageClassification\n"
        'model = ViTForImageClassification.from_pretrained("FOLDER")\n'
        'processor = AutoImageProcessor.from_pretrained("FOLDER")',
        "peft": "from peft import PeftModel\nfrom transformers import ViTForImageClassification\n"
        'base = ViTForImageClassification.from_pretrained("FOLDER/base")\n'
        'model = PeftModel.from_pretrained(base, "FOLDER")',
    }[library]
    adapters = (
        "Adapters are separate: the base in `base/` is without them. Their parameters have the names of transformers 5's modules: "
        "transformers 4 names them otherwise and does not find them.\n\n"
        if asked.adapters_only
        else "Adapters are merged into the base: W + s·B·A, summed in float32.\n\n"
        if s.phase != "full"
        else ""
    )
    (folder / "README.md").write_text(f"""---
library_name: {library}
pipeline_tag: image-classification
license:  # yours to fill in
---

# ViT {cfg.model} on {data}

{describe_training(cfg, s)}

{started}- data: {data}, {meta["train_images"]:,} training images of {DATASETS[cfg.dataset].image_size} pixels
- phases: {phases}; exported from step {s.step:,}, epoch {s.epoch} of {cfg.epochs}, phase {s.phase}
- metrics: {metrics}
- base precision: {base}
- checked: {library}'s logits are the trained model's, on {images} validation images, in float32
- licence: to be filled in by whoever publishes this

{adapters}{"| family | rank of each layer |" if ranks else ""}{chr(10) + "|---|---|" + chr(10) + ranks + chr(10) if ranks else ""}
## Use

```python
{usage}
```

## Recipe

```json
{json.dumps(recipe, indent=1)}
```
""")


# ---------------------------------------------------------------------------------------------------------------------------------
# and checked


def read_images(cfg: train.Config, count: int) -> tuple[Tensor, list[str] | None]:
    """(validation images (count, 3, H, W) float32, normalised; names of the classes, if known). Raises ValueError, OSError, RuntimeError."""
    loader = train.build_loader(
        cfg.loader,
        cfg.dataset,
        cfg.data_dir,
        "val",
        count,
        cfg.seed,
        0 if cfg.loader == "folder" else 1,
        None,
        cfg.num_classes,
    )
    with contextlib.closing(loader), contextlib.closing(loader.epoch(0)) as batches:
        images, labels = next(batches)
        return normalise(
            images[labels >= 0], DATASETS[cfg.dataset].mean, DATASETS[cfg.dataset].std
        ), loader.classes


def load_back(asked: Export, folder: Path):
    """What computes (N, 3, H, W) images -> (N, C) logits from the files in `folder`, in the library they are for."""
    if asked.format == "timm":
        return build_timm(folder)
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(
        folder / "base" if asked.adapters_only else folder
    ).eval()
    if asked.adapters_only:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder).eval()
    return lambda images: model(pixel_values=images).logits


@torch.no_grad()
def check_logits(model: nn.Module, loaded, images: Tensor, library: str) -> tuple[float, float]:
    """(largest difference, largest logit). Raises ValueError where they differ by more than TOLERANCE."""
    with separate_products():  # not by a sum of its own
        expected = model(images)  # (N, C)
    got = loaded(images)
    largest, difference = expected.abs().max().item(), (got - expected).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, largest):  # nor NaN
        raise ValueError(
            f"{library} does not compute what was trained: the logits of {len(images)} images differ by up to {difference:.2e}, "
            f"the largest is {largest:.2f}; nothing was written"
        )
    return difference, largest


def export(target: str, asked: Export) -> str:
    """Make asked.out from a run or checkpoint; returns what to say. Raises ValueError, OSError or RuntimeError, in one sentence, with
    nothing left behind."""
    out = Path(asked.out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{asked.out} is already there and not empty: choose another --out")
    path, meta, passed_over = checkpoint.resolve(Path(target))
    cfg, s = load_checkpoint(
        path, meta, **{name: getattr(asked, name) for name in ("data_dir", "loader") if getattr(asked, name)}
    )
    if asked.adapters_only and s.phase == "full":
        raise ValueError(f"{path} is in its full phase: it has no adapters to export")
    if asked.format == "timm" and cfg.layer_norm_eps != 1e-6:
        raise ValueError(
            f"timm's ViT has layer_norm_eps 1e-6, this model {cfg.layer_norm_eps:g}: --format hf can say so"
        )
    for text in passed_over:
        print(f"warning: {text}")
    images, classes = read_images(cfg, asked.images)
    model = build_checkpoint(dataclasses.replace(cfg, dtype="float32"), s, path)
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    new_parents = [folder for folder in out.parents if not folder.exists()]
    try:
        partial.mkdir(parents=True)
        if asked.adapters_only:
            adapters = get_adapter_names(model)
            base = {name: tensor for name, tensor in model.state_dict().items() if name not in adapters}
            write_huggingface(cfg, base, classes, partial / "base")
            write_adapter(cfg, model, partial)
        else:
            merged = merge_lora(copy.deepcopy(model))
            if asked.format == "timm":
                write_timm(cfg, merged, classes, partial)
            else:
                write_huggingface(cfg, merged.state_dict(), classes, partial)
        write_card(meta, s, path, asked, model, len(images), partial)
        library = "PEFT" if asked.adapters_only else {"timm": "timm", "hf": "transformers"}[asked.format]
        difference, largest = check_logits(model, load_back(asked, partial), images, library)
        for file in partial.rglob("*.safetensors"):
            file.chmod((partial / "README.md").stat().st_mode)  # safetensors makes them for their owner alone
        os.replace(partial, out)
    except SafetensorError as e:  # transformers' own writing raises it too
        raise OSError(f"can't write {asked.out}: {e}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in new_parents:  # of an export that failed: they are empty
            with contextlib.suppress(OSError):
                folder.rmdir()
    return (
        f"{path}, phase {s.phase}: the logits of {len(images)} validation images in {library} are those of the trained model, within "
        f"{difference:.1e}, the largest is {largest:.2f}\nwrote {asked.out}: "
        + ", ".join(sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()))
    )


def main(argv: list[str]) -> int:
    """Exit status: 0; 2 for what can't be exported, or came out wrong."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: so it is
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of what PEFT calls
    target = argv[0] if argv and not argv[0].startswith("-") else None
    try:
        asked = Export()
        if target or "--help" in argv:
            asked = train.parse_flags(
                argv[1:] if target else ["--help"], Export(), prog="export.py", description=__doc__
            )
        if not target or not asked.format or not asked.out:
            raise ValueError(
                "export what, for whom, where to? python export.py RUN --format timm|hf --out DIR, the run first"
            )
        if asked.images < 1:
            raise ValueError(f"images must be above 0, not {asked.images}")
        if asked.adapters_only and asked.format != "hf":
            raise ValueError("adapters_only is for PEFT, which goes with --format hf")
        for module in ["transformers"] * (asked.format == "hf") + ["peft"] * asked.adapters_only:
            if not importlib.util.find_spec(module):
                raise ValueError(
                    f"{module} is not installed, which checks what was written: pip install -r requirements-dev.txt"
                )
        print(export(target, asked))
    except (ValueError, OSError, RuntimeError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
