"""Hugging Face's names of a ViT's tensors, there and back: the same tensors, but q, k and v are one here."""

import re

import torch
from torch import Tensor

HF_LAYER = (
    r"vit\.(?:encoder\.layer|layers)\.(\d+)\."  # transformers 4, and so the published files; transformers 5
)

# (pattern of Hugging Face's name, our name); /0, /1, /2 are the row parts q, k, v of the fused qkv.
FROM_HUGGINGFACE = [
    (r"vit\.embeddings\.cls_token",                                          r"cls_token"),
    (r"vit\.embeddings\.position_embeddings",                                r"pos_embed"),
    (r"vit\.embeddings\.patch_embeddings\.projection\.(\w+)",                r"patch_embed.proj.\1"),
    (r"vit\.layernorm\.(\w+)",                                               r"norm.\1"),
    (r"classifier\.(\w+)",                                                   r"head.\1"),
    (HF_LAYER + r"layernorm_before\.(\w+)",                                  r"blocks.\1.norm1.\2"),
    (HF_LAYER + r"layernorm_after\.(\w+)",                                   r"blocks.\1.norm2.\2"),
    (HF_LAYER + r"attention\.(?:attention\.query|q_proj)\.(\w+)",            r"blocks.\1.attn.qkv.\2/0"),
    (HF_LAYER + r"attention\.(?:attention\.key|k_proj)\.(\w+)",              r"blocks.\1.attn.qkv.\2/1"),
    (HF_LAYER + r"attention\.(?:attention\.value|v_proj)\.(\w+)",            r"blocks.\1.attn.qkv.\2/2"),
    (HF_LAYER + r"attention\.(?:output\.dense|o_proj)\.(\w+)",               r"blocks.\1.attn.proj.\2"),
    (HF_LAYER + r"(?:intermediate\.dense|mlp\.fc1)\.(\w+)",                  r"blocks.\1.mlp.fc1.\2"),
    (HF_LAYER + r"(?:output\.dense|mlp\.fc2)\.(\w+)",                        r"blocks.\1.mlp.fc2.\2"),
]  # fmt: skip

# (pattern of our name, the name of transformers 5's module); {} stands for q, k and v.
TO_HUGGINGFACE = [
    (r"(cls_token)",                                       r"vit.embeddings.\1"),
    (r"pos_embed",                                         r"vit.embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(weight|bias)",                  r"vit.embeddings.patch_embeddings.projection.\1"),
    (r"norm\.(weight|bias)",                               r"vit.layernorm.\1"),
    (r"head\.(weight|bias)",                               r"classifier.\1"),
    (r"blocks\.(\d+)\.norm1\.(weight|bias)",               r"vit.layers.\1.layernorm_before.\2"),
    (r"blocks\.(\d+)\.norm2\.(weight|bias)",               r"vit.layers.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)",           r"vit.layers.\1.attention.{}_proj.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)",          r"vit.layers.\1.attention.o_proj.\2"),
    (r"blocks\.(\d+)\.(mlp\.fc[12]\.(?:weight|bias))",     r"vit.layers.\1.\2"),
]  # fmt: skip


def from_huggingface(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a Hugging Face ViTForImageClassification state dict to ours (and timm's), with q, k, v stacked.

    Knows the names of the published files (transformers 4) and of transformers 5's modules. Build the model
    with `layer_norm_eps=1e-12` to get its logits. Raises KeyError on a name it doesn't know, or a q, k or v
    missing.
    """
    out = {}
    for key, tensor in state_dict.items():
        name = translate(key, FROM_HUGGINGFACE)
        if name is None:
            raise KeyError(f"not a parameter of a Hugging Face ViTForImageClassification: {key}")
        out[name] = tensor
    for name in sorted({name.split("/")[0] for name in out if "/" in name}):
        q, k, v = parts = [out.pop(f"{name}/{part}", None) for part in range(3)]
        complete = q is not None and k is not None and v is not None
        if not complete or not q.shape == k.shape == v.shape or not q.ndim:
            raise KeyError(f"{name} is of q, k and v, and they are not all there or not of one shape")
        out[name] = torch.cat(parts)
    return out


def to_huggingface(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of ours, or a part of it, to transformers 5's ViTForImageClassification.

    qkv (3·D, …) is cut into q, k, v, in this order. The inverse of `from_huggingface`. Raises KeyError on a
    name it doesn't know, an adapter's for one.
    """
    out = {}
    for key, tensor in state_dict.items():
        name = translate(key, TO_HUGGINGFACE)
        if name is None:
            raise KeyError(f"not a parameter of this ViT: {key}")
        if "{}" in name:
            for part, rows in zip("qkv", tensor.chunk(3)):
                out[name.format(part)] = rows
        else:
            out[name] = tensor
    return out


def translate(name: str, table: list[tuple[str, str]]) -> str | None:
    """`name` by the first row of `table` whose pattern is the whole of it; None if there is none."""
    for pattern, new in table:
        if match := re.fullmatch(pattern, name):
            return match.expand(new)
    return None
