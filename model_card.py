"""README.md of an export, the model card: what a run's files know of the model. export.py writes it.

Its licence is for whoever publishes the model to fill in. No path and nothing of this machine goes in.
"""

import json
from pathlib import Path

import train
from config.cli import split_fork, typed_config
from data.datasets import get_spec
from errors import UserError
from model.sources import TIMM
from monitor.log import load_run
from start import State

# Not for the recipe: paths, what is this machine's, and what the card says in words.
PRIVATE = "run_dir data_dir stage_dir baseline fork init_from resume num_workers compile".split()

USAGE = {
    "timm": """import json, safetensors.torch, timm
config = json.load(open("config.json"))
model = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
model.load_state_dict(safetensors.torch.load_file("model.safetensors"))
# or: timm.create_model("local-dir:FOLDER", pretrained=True)""",
    "transformers": """from transformers import AutoImageProcessor, ViTForImageClassification
model = ViTForImageClassification.from_pretrained("FOLDER")
processor = AutoImageProcessor.from_pretrained("FOLDER")""",
    "peft": """from peft import PeftModel
from transformers import ViTForImageClassification
base = ViTForImageClassification.from_pretrained("FOLDER/base")
model = PeftModel.from_pretrained(base, "FOLDER")""",
}


def write_card(folder: Path, library: str, path: Path, meta: dict, s: State, images: int, ema: bool) -> None:
    """folder/README.md of the checkpoint at `path`: its meta and State.

    `library`: timm, transformers or peft, whose logits of `images` images are compared. `ema`: the weights
    are averages. Raises OSError.
    """
    cfg = typed_config(train.Config, meta["config"], f"{path}/meta.json")  # as it was trained
    data = f"an image folder of {cfg.num_classes:,} classes" if cfg.num_classes else cfg.dataset
    pixels = get_spec(cfg.dataset, cfg.image_size).image_size
    phases, metrics = describe_metrics(cfg, s, path.resolve().parent.parent, ema)
    recipe = {name: value for name, value in vars(cfg).items() if name not in PRIVATE and value is not None}
    facts = [
        *describe_start(cfg),
        *describe_averages(cfg, ema),
        f"data: {data}, {meta['train_images']:,} training images of {pixels} pixels",
        f"phases: {phases}; exported from step {s.step:,}, epoch {s.epoch} of {cfg.epochs}, phase {s.phase}",
        f"metrics: {metrics}",
        "base precision: float32 throughout",
        f"checked: {library}'s logits are the trained model's, on {images} validation images, in float32",
        "licence: to be filled in by whoever publishes this",
    ]
    header = ["---", f"library_name: {library}", "pipeline_tag: image-classification"]
    header += ["license:  # yours to fill in", "---"]
    sections = [
        "\n".join(header),
        f"# ViT {cfg.model} on {data}",
        describe_training(cfg, s),
        "\n".join(f"- {fact}" for fact in facts),
        *describe_adapters(s, library),
        "## Use",
        f"```python\n{USAGE[library]}\n```",
        "## Recipe",
        f"```json\n{json.dumps(recipe, indent=1)}\n```",
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n")


def describe_training(cfg: train.Config, s: State) -> str:
    """A sentence or two: what this run trained, up to this checkpoint."""
    paper = "PreLoRA (arXiv 2509.21619)"
    if cfg.mode == "full" and s.frozen_blocks:
        return (
            f"Trained with all parameters, and then with the lowest {s.frozen_blocks} blocks and the "
            f"embeddings frozen: a baseline of {paper}."
        )
    if cfg.mode == "full":
        return f"Trained with all parameters from beginning to end: the baseline of {paper}."
    if cfg.mode == "lora" and s.frozen_blocks:
        return (
            "Trained as static LoRA, adapters, head and norms on a base that was frozen from the first step, "
            f"the lowest {s.frozen_blocks} blocks altogether: a baseline of {paper}."
        )
    if cfg.mode == "lora":
        return (
            "Trained as static LoRA, adapters, head, norms and embeddings on a base that was frozen from the "
            f"first step: a baseline of {paper}."
        )
    text = (
        f"Trained with {paper}: first all parameters, then base and LoRA adapters together, then adapters on "
        "a frozen base."
    )
    if s.phase == "full":
        text += " This is a checkpoint of the first phase: there are no adapters yet."
    if s.phase == "warmup":
        text += " This is a checkpoint of the second phase: the base was not frozen yet."
    if s.phase != "full" and cfg.freeze_blocks:
        text += f" The lowest {cfg.freeze_blocks} blocks have no adapters."
    return text


def describe_start(cfg: train.Config) -> list[str]:
    """What the run started from, where that was not an init of its own."""
    if cfg.init_from:
        source = cfg.init_from if cfg.init_from.startswith(TIMM) else Path(cfg.init_from).name
        head = ", with a fresh head" if cfg.fresh_head else ""
        return [f"started from: the weights of {source}{head}"]
    if cfg.fork:
        run, _ = split_fork(cfg.fork)
        name = Path(run).name
        return [f"started from: a checkpoint of another run, {name}, whose own beginning is not told here"]
    return []


def describe_averages(cfg: train.Config, ema: bool) -> list[str]:
    """That the weights are averages, where they are."""
    if not ema:
        return []
    return [f"weights: their exponential moving average over the optimiser steps, decay {cfg.ema_decay:g}"]


def describe_metrics(cfg: train.Config, s: State, run_dir: Path, ema: bool) -> tuple[str, str]:
    """(phases with their epochs, the last evaluation, of the weights or of their averages) by the log of the
    run whose checkpoint this is, if the log is still there."""
    if not (run_dir / "metrics.jsonl").exists():
        return s.phase, "not known, the run's log was not beside the checkpoint"
    try:
        logged = load_run(run_dir).epochs if s.epoch else []
    except UserError:
        return s.phase, "not known, the run's log was damaged"
    epochs = [epoch for epoch in logged if epoch["epoch"] <= s.epoch]
    spans = []
    for phase in ("full", "warmup", "lora"):
        numbers = [epoch["epoch"] for epoch in epochs if epoch["phase"] == phase]
        if numbers:
            spans.append(f"{phase}: epochs {numbers[0]} to {numbers[-1]}")
    phases = "; ".join(spans) or s.phase
    kind = "val_ema" if ema else "val"
    evaluated = [epoch for epoch in epochs if epoch.get(f"{kind}_top1") is not None]
    if not epochs:
        return phases, "no epoch was finished"
    if not evaluated:
        return phases, "not evaluated"
    last = evaluated[-1]
    metrics = (
        f"after epoch {last['epoch']}, on the whole validation set: top-1 {last[f'{kind}_top1']:.2f} %, "
        f"top-5 {last[f'{kind}_top5']:.2f} %, loss {last[f'{kind}_loss']:.4f}"
    )
    if cfg.dtype != "float32":
        metrics += f" (as trained, computed in {cfg.dtype})"
    return phases, metrics


def describe_adapters(s: State, library: str) -> list[str]:
    """Where the adapters are, and a table of their ranks, 0 for none; nothing where there are none."""
    if s.phase == "full":
        return []
    where = "Adapters are merged into the base: W + s·B·A, summed in float32."
    if library == "peft":
        where = (
            "Adapters are separate: the base in `base/` is without them. Their parameters have the names of "
            "transformers 5's modules: transformers 4 names them otherwise and does not find them."
        )
    zero = ", 0 for no adapter" if any(0 in layers for layers in s.ranks.values()) else ""
    table = [f"| family | rank of each layer{zero} |", "|---|---|"]
    for family, layers in s.ranks.items():
        table.append(f"| {family} | {' '.join(map(str, layers))} |")
    return [where, "\n".join(table)]
