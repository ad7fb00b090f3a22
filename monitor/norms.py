"""Frobenius norms of the base weights and of the adapters, per family and layer. Knows no ViT: any model with families."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Families = dict[str, list[tuple[str, int, int]]]  # family -> [(module name, row part, number of row parts) per layer]


def read(norms: dict[str, list[Tensor]]) -> dict[str, list[float]]:
    flat = torch.stack([n for layers in norms.values() for n in layers]).tolist()  # the one sync of an epoch's norms
    return {family: [flat.pop(0) for _ in layers] for family, layers in norms.items()}


@torch.no_grad()
def weight_norms(model: nn.Module, families: Families) -> dict[str, list[float]]:
    """‖W‖_F of every layer of every family: the base weight (no bias, no adapter), float32, over the row part's rows.

    Squares are summed by row first, so a slice of a fused weight and a shard are the same case as a whole one: of a sharded weight
    only the row sums travel, and the norms are the same on every rank and for any number of them. Paper §3.1: W^a per layer.
    """
    norms: dict[str, list[Tensor]] = {}
    for family, layers in families.items():
        rows = [model.get_submodule(name).weight.float().square().sum(dim=1) for name, _, _ in layers]  # (out,) each
        rows = [r.full_tensor() if isinstance(r, DTensor) else r for r in rows]  # gathered, where they are sharded
        norms[family] = [r.chunk(parts)[part].sum().sqrt() for r, (_, part, parts) in zip(rows, layers)]
    return read(norms)


@torch.no_grad()
def adapter_norms(model: nn.Module, families: Families) -> dict[str, list[float]]:
    """‖s·B·A‖_F of every layer of every family that has adapters (modules with an `adapter(part)` giving s·B and A); paper Fig. 6b.

    By ‖BA‖² = ⟨BᵀB, AAᵀ⟩: rank × rank products, the (out, in) one is never formed.
    """
    norms: dict[str, list[Tensor]] = {}
    for family, layers in families.items():
        modules = [(model.get_submodule(name), part) for name, part, _ in layers]
        pairs = [module.adapter(part) for module, part in modules if hasattr(module, "adapter")]
        if len(pairs) == len(layers) and all(A.numel() for _, A in pairs):
            norms[family] = [((B.float().T @ B.float()) * (A.float() @ A.float().T)).sum().clamp_min(0).sqrt() for B, A in pairs]
    return read(norms) if norms else {}
