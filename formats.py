"""The files of a model for timm, transformers and PEFT, written and loaded back. export.py calls it.

transformers and PEFT are imported where they are needed: timm's format does without them.
"""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

import train
from data.datasets import get_spec
from files import write_json
from lora.layers import LoRALinear
from model.huggingface import to_huggingface
from model.sources import build_timm
from model.variants import VARIANTS

# timm's names for rows of VARIANTS; the others are vit_tiny_patch16_224 with other arguments
ARCHITECTURES = {
    "S/16": "vit_small_patch16_224",
    "B/16": "vit_base_patch16_224",
    "L/16": "vit_large_patch16_224",
}


def write_weights(weights: dict[str, Tensor], path: Path) -> None:
    """safetensors, float32. Raises SafetensorError, for a full disk too."""
    plain = {name: tensor.detach().float().contiguous() for name, tensor in weights.items()}
    save_file(plain, path, metadata={"format": "pt"})


def write_timm(cfg: train.Config, model: nn.Module, classes: list[str] | None, folder: Path) -> None:
    """config.json as timm's own export has it, and model.safetensors."""
    data, row = get_spec(cfg.dataset, cfg.image_size), VARIANTS[cfg.model]
    size, num_classes = data.image_size, model.head.out_features
    config = {
        "architecture": ARCHITECTURES.get(cfg.model, "vit_tiny_patch16_224"),
        "num_classes": num_classes,
        "num_features": row["embed_dim"],
        "global_pool": "token",
    }
    if classes:
        config["label_names"] = classes
    config["model_args"] = {
        "img_size": size,
        "patch_size": row["patch_size"],
        "embed_dim": row["embed_dim"],
        "depth": row["depth"],
        "num_heads": row["num_heads"],
    }
    config["pretrained_cfg"] = {
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
    }
    write_json(folder / "config.json", config)
    write_weights(model.state_dict(), folder / "model.safetensors")


def write_huggingface(
    cfg: train.Config, weights: dict[str, Tensor], classes: list[str] | None, folder: Path
) -> None:
    """config.json and model.safetensors, by transformers itself, which gives the tensors the names of the
    published files, that all its versions read; and preprocessor_config.json. `weights`: merged, or a base
    without its adapters.

    The processor gives the images as evaluation here sees them, but that transformers cuts out the middle a
    pixel further up or left where an odd number of pixels goes and torchvision rounds the half up.
    """
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    data, row = get_spec(cfg.dataset, cfg.image_size), VARIANTS[cfg.model]
    classes = classes or [f"LABEL_{i}" for i in range(len(weights["head.weight"]))]
    config = ViTConfig(
        hidden_size=row["embed_dim"],
        num_hidden_layers=row["depth"],
        num_attention_heads=row["num_heads"],
        intermediate_size=4 * row["embed_dim"],
        image_size=data.image_size,
        patch_size=row["patch_size"],
        hidden_dropout_prob=cfg.dropout,
        layer_norm_eps=cfg.layer_norm_eps,
        id2label=dict(enumerate(classes)),
        label2id={name: i for i, name in enumerate(classes)},
    )
    model = ViTForImageClassification(config)
    named = to_huggingface({name: tensor.float() for name, tensor in weights.items()})
    model.load_state_dict(named, strict=True)
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "BitImageProcessor",  # ViT's own can't cut out the middle of a resized image
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
    }
    write_json(folder / "preprocessor_config.json", processor)


def write_adapter(cfg: train.Config, model: nn.Module, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors of PEFT: every layer's rank and alpha by the module
    names of transformers 5."""
    from peft import LoraConfig

    use_rslora = cfg.lora_scaling == "rslora"
    ranks, alphas, weights = {}, {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, LoRALinear):
            continue
        start = 0  # of the part's rows in lora_A
        # One name a row part: q, k, v, or the whole layer.
        names = to_huggingface({f"{name}.weight": module.weight})
        for part, (full_name, rank) in enumerate(zip(names, module.ranks)):
            if not rank:
                continue
            key = full_name.removesuffix(".weight")
            weights[f"base_model.model.{key}.lora_A.weight"] = module.lora_A[start : start + rank]
            weights[f"base_model.model.{key}.lora_B.weight"] = module.lora_B[str(part)]
            start += rank
            ranks[key] = rank
            # PEFT scales by alpha / rank, or with use_rslora by alpha / √rank.
            alphas[key] = module.alpha if use_rslora else module.get_scaling(rank) * rank
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(alphas.values()),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=sorted(ranks),
        use_rslora=use_rslora,
        inference_mode=True,
        base_model_name_or_path="base",
    )
    config.auto_mapping = {
        "base_model_class": "ViTForImageClassification",
        "parent_library": "transformers.models.vit.modeling_vit",
    }
    config.save_pretrained(folder)
    write_weights(weights, folder / "adapter_model.safetensors")


def load_back(folder: Path, library: str) -> Callable[[Tensor], Tensor]:
    """What computes (N, 3, H, W) images -> (N, C) logits from the files in `folder`, in `library`: timm,
    transformers or peft."""
    if library == "timm":
        return build_timm(folder)
    from transformers import ViTForImageClassification

    if library == "transformers":
        model = ViTForImageClassification.from_pretrained(folder).eval()
    else:
        from peft import PeftModel

        base = ViTForImageClassification.from_pretrained(folder / "base").eval()
        model = PeftModel.from_pretrained(base, folder).eval()
    return lambda images: model(pixel_values=images).logits
