"""The peers' models: Hugging Face's ViT, PEFT's adapters on it, timm's ViT, of the same shape as ours."""

import torch
from torch import Tensor, nn

from errors import UserError
from lora.ranks import Ranks
from model.variants import VARIANTS

# PEFT's module names of our families
PEFT_NAMES = {
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
    "proj": "attention.o_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


class LogitsOnly(nn.Module):
    """A model of Hugging Face's, whose logits come in an object, as a model of images (B, 3, H, W) -> logits
    (B, C)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def build_huggingface(model: str, num_classes: int) -> nn.Module:
    """Hugging Face's ViTForImageClassification of a row of VARIANTS. Raises UserError where transformers is
    not installed."""
    try:
        from transformers import ViTConfig, ViTForImageClassification
    except ImportError:
        raise UserError(
            "peers hf and peft need transformers and peft: pip install -r requirements-dev.txt"
        ) from None
    row = VARIANTS[model]
    config = ViTConfig(
        hidden_size=row["embed_dim"],
        num_hidden_layers=row["depth"],
        num_attention_heads=row["num_heads"],
        intermediate_size=4 * row["embed_dim"],
        patch_size=row["patch_size"],
        num_labels=num_classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return ViTForImageClassification(config)


def add_peft(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Hugging Face's `model` with PEFT's adapters of these ranks on the same Linears as ours; only the
    adapters train, as in PEFT by default. Raises UserError where peft is not installed."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("peer peft needs peft: pip install -r requirements-dev.txt") from None
    pattern = {}
    for family, layer_ranks in ranks.items():
        for layer, rank in enumerate(layer_ranks):
            pattern[f"layers.{layer}.{PEFT_NAMES[family]}"] = rank
    config = LoraConfig(
        r=1,
        lora_alpha=1,
        lora_dropout=0.0,
        bias="none",
        target_modules=[PEFT_NAMES[family] for family in ranks],
        rank_pattern=pattern,
        alpha_pattern=pattern,
    )
    model = get_peft_model(model, config)
    adapted = [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "r")]
    found = sum(module.r["default"] for module in adapted)
    assert found == sum(map(sum, ranks.values())), "PEFT has other ranks"
    return model


def build_timm(model: str, num_classes: int) -> nn.Module:
    """timm's VisionTransformer of a row of VARIANTS, with the same attention kernel as ours."""
    import timm

    row = VARIANTS[model]
    shape = {name: row[name] for name in ("embed_dim", "depth", "num_heads")}
    built = timm.create_model("vit_base_patch16_224", num_classes=num_classes, **shape)
    assert all(block.attn.fused_attn for block in built.blocks)
    return built


def build_peer(title: str, model: str, num_classes: int, ranks: Ranks, device: torch.device) -> nn.Module:
    """A peer with weights, the whole of it given to torch.compile (with static ranks): their way.

    `title`: "timm full", "HF full" or "HF + PEFT"."""
    if title == "timm full":
        built = build_timm(model, num_classes).to(device)
        built.compile()
        return built
    built = build_huggingface(model, num_classes)
    if title == "HF + PEFT":
        built = add_peft(built, ranks)
    built = built.to(device)
    built.compile()
    return LogitsOnly(built)  # outside of what is compiled
