"""Frobenius norms of the base weights and of the adapters, per family and layer, of any model.

A model's families are {family: [(module name, row part, number of row parts) of each layer]}: q of layer 3 is
part 0 of 3 of `blocks.3.attn.qkv`.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Families = dict[str, list[tuple[str, int, int]]]


def get_norms(model: nn.Module, families: Families) -> dict[str, dict[str, list[float]]]:
    """Both norms as an epoch record has them."""
    return {"weight_norms": weight_norms(model, families), "adapter_norms": adapter_norms(model, families)}


@torch.no_grad()
def weight_norms(model: nn.Module, families: Families) -> dict[str, list[float]]:
    """‖W‖_F of every layer of every family: the base weight, float32, over its row part.

    Neither bias nor adapter. Squares are summed by row first, so a slice of a fused weight and a shard are
    the same case as a whole one: of a sharded weight only the row sums travel, and the norms are the same on
    every process and for any number of them. Paper §3.1: W^a per layer.
    """
    norms: dict[str, list[Tensor]] = {}
    for family, layers in families.items():
        norms[family] = []
        for name, part, parts in layers:
            rows = model.get_submodule(name).weight.float().square().sum(dim=1)  # (out,)
            if isinstance(rows, DTensor):  # sharded
                rows = rows.full_tensor()
            norms[family].append(rows.chunk(parts)[part].sum().sqrt())
    return to_floats(norms)


@torch.no_grad()
def adapter_norms(model: nn.Module, families: Families) -> dict[str, list[float]]:
    """‖s·B·A‖_F of every layer of every family that has adapters, paper Figure 6b; 0 for a layer without one.

    Adapters are in modules with an `adapter(part)` that gives s·B and A, both empty where the part has none.

    By ‖BA‖² = ⟨BᵀB, AAᵀ⟩: rank × rank products, the (out, in) one is never formed.
    """
    norms: dict[str, list[Tensor]] = {}
    for family, layers in families.items():
        products, adapted = [], False
        for name, part, _ in layers:
            module = model.get_submodule(name)
            if hasattr(module, "adapter"):
                B, A = module.adapter(part)
                products.append(get_product_norm(B.float(), A.float()))
                adapted = adapted or A.numel() > 0
            else:
                products.append(torch.zeros((), device=module.weight.device))
        if adapted:
            norms[family] = products
    return to_floats(norms)


def get_product_norm(B: Tensor, A: Tensor) -> Tensor:
    """‖B·A‖_F of (out, rank) and (rank, in)."""
    return ((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt()


def to_floats(norms: dict[str, list[Tensor]]) -> dict[str, list[float]]:
    """The numbers, by the one sync of an epoch's norms."""
    scalars = [norm for layers in norms.values() for norm in layers]
    if not scalars:
        return {}
    values = iter(torch.stack(scalars).tolist())
    return {family: [next(values) for _ in layers] for family, layers in norms.items()}
