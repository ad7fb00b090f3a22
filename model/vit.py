"""Vision Transformer (Dosovitskiy et al. 2010.11929) with timm's parameter names.

Class token, learned positions, pre-norm blocks, fused qkv, SDPA attention, dropout where AugReg has it,
stochastic depth. A state dict of timm's `vit_*_patch16_224` loads as it is, one of Hugging Face's
`ViTForImageClassification` after `from_huggingface` (model/huggingface.py).
"""

import math
import zlib

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from model.variants import VARIANTS


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        # Cut before the heads are told apart: backward then writes the gradients of q, k, v side by side
        # once, not twice.
        parts = self.qkv(x).chunk(3, dim=-1)  # 3 × (B, N, D)
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.num_heads) for part in parts)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, D/H)
        return self.proj_drop(self.proj(rearrange(x, "b h n d -> b n (h d)")))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 1603.09382): drops a residual branch for a whole sample with probability
    p.

    The probability grows from block to block. As a Python float it would be baked into the compiled block,
    one graph a block; in a buffer one graph serves them all.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.register_buffer("keep_prob", torch.empty(()), persistent=False)
        self.init_buffers()

    def init_buffers(self) -> None:
        self.keep_prob.fill_(1 - self.p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], 1, 1, device=x.device) < self.keep_prob  # (B, 1, 1)
        return x * (keep / self.keep_prob).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """In float32 whatever the compute type, also where FSDP hands it its weights in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )


class Block(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, layer_norm_eps: float, dropout: float, drop_path: float | None
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=layer_norm_eps)
        self.attn = Attention(dim, num_heads, dropout)
        self.norm2 = LayerNorm(dim, eps=layer_norm_eps)
        self.mlp = Mlp(dim, 4 * dim, dropout)
        self.drop_path = nn.Identity() if drop_path is None else DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """ViT classifier: (B, 3, H, W) float images -> (B, num_classes) logits.

    Args: `variant` a row of VARIANTS; `image_size` in pixels, a multiple of the patch size; `layer_norm_eps`
    1e-6 as in timm and JAX, 1e-12 as in Hugging Face; `dropout` after the positions, the attention's output
    and both MLP layers; `drop_path` the rate of the last block, rising linearly from 0 at the first;
    `residual_dtype` of the stream that the blocks read and add to: bfloat16 halves its memory traffic, and
    goes with products in bfloat16 (autocast), else a block's sum is float32 again.

    Built on the meta device (`with torch.device("meta")`) it holds no memory. Trap: `to_empty` then leaves
    weights *and non-persistent buffers* as garbage, and loading a state dict restores the weights only.
    `model.parallel.materialise` takes `to_empty`'s place and sets the buffers; `init_weights` sets the
    weights.

    Raises KeyError for an unknown variant, ValueError for an image size that the patch size doesn't divide.
    """

    def __init__(
        self,
        variant: str,
        image_size: int,
        num_classes: int,
        in_chans: int = 3,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_norm_eps: float = 1e-6,
        residual_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        row = VARIANTS[variant]
        dim, depth, patch_size = row["embed_dim"], row["depth"], row["patch_size"]
        if image_size % patch_size:
            raise ValueError(
                f"image size {image_size} is not a multiple of {variant}'s patch size {patch_size}"
            )
        num_patches = (image_size // patch_size) ** 2
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, num_patches + 1, dim))
        self.pos_drop = nn.Dropout(dropout)
        rates = [drop_path * i / max(depth - 1, 1) if drop_path else None for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(dim, row["num_heads"], layer_norm_eps, dropout, rate) for rate in rates
        )
        self.norm = LayerNorm(dim, eps=layer_norm_eps)
        self.head = nn.Linear(dim, num_classes)
        self.residual_dtype = residual_dtype
        self.grad_checkpointing = False  # keep only the blocks' inputs, recompute in backward

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)  # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1+N, D)
        x = self.pos_drop(x + self.pos_embed).to(self.residual_dtype)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(self.norm(x[:, 0]))  # (B, num_classes)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """The JAX ViT's initialisation, which the AugReg recipe assumes.

        From google-research/vision_transformer, models_vit.py: xavier-uniform kernels (q, k, v each on its
        own), MLP biases N(0, 1e-6), LeCun-normal patches, positions N(0, 0.02), zero class token and zero
        head. Each tensor draws from a generator of (seed, its name): the same whatever the build order.
        """
        for name, parameter in self.named_parameters():
            # In float32 and whole: a shard gets its part of the same numbers.
            p = torch.empty(parameter.shape, device=parameter.device)
            rng = torch.Generator(p.device).manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            if name in ("cls_token", "head.weight") or name.endswith("bias"):
                p.zero_()
                if ".mlp." in name:
                    p.normal_(std=1e-6, generator=rng)
            elif "norm" in name:
                p.fill_(1.0)
            elif name == "pos_embed":
                p.normal_(std=0.02, generator=rng)
            elif name == "patch_embed.proj.weight":
                # 0.8796 is the standard deviation of a unit normal cut at ±2.
                std = math.sqrt(1 / p[0].numel()) / 0.87962566103423978
                nn.init.trunc_normal_(p, std=std, a=-2 * std, b=2 * std, generator=rng)
            else:
                parts = p.chunk(3) if name.endswith("qkv.weight") else [p]
                for part in parts:
                    nn.init.xavier_uniform_(part, generator=rng)
            if isinstance(parameter, DTensor):  # no traffic: every process has the whole of it
                p = distribute_tensor(p, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(p)
