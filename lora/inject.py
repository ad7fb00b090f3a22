"""LoRA as verbs on a model: match_families, add_lora, merge_lora, freeze_base. Any nn.Module with Linears will do.

Traps: a Linear whose weight somebody reads without calling it never runs its adapter. nn.MultiheadAttention does that to its
out_proj (refused below, it is a subclass of Linear), nn.TransformerEncoder to linear1 and linear2 on its inference fast path
(call `torch.backends.mha.set_fastpath_enabled(False)`).
"""

from fnmatch import fnmatchcase

import torch
from torch import nn

from lora.layers import LoRALinear

Families = dict[
    str, list[tuple[str, int, int]]
]  # family -> [(name of the Linear, row part, number of row parts) per layer]


def match_families(
    model: nn.Module, table: dict[str, tuple[str, int, int]], wanted: tuple[str, ...]
) -> Families:
    """Resolve `table` (family -> name pattern, row part, row parts) into the Linears of `model`, in the model's order.

    Raises ValueError naming the family that the table doesn't have or that matches no Linear: a family that silently matched
    nothing would leave its layers untrained.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    families = {}
    for family in wanted:
        if family not in table:
            raise ValueError(f"unknown target module {family!r}, there are: {', '.join(table)}")
        pattern, part, parts = table[family]
        families[family] = [(name, part, parts) for name in linears if fnmatchcase(name, pattern)]
        if not families[family]:
            raise ValueError(f"target module {family!r} ({pattern}) matches no Linear of the model")
    return families


def add_lora(
    model: nn.Module,
    families: Families,
    ranks: dict[str, list[int]],
    alpha: float | None = None,
    rslora: bool = False,
) -> nn.Module:
    """Give every layer of every family in `ranks` an adapter of its rank, in place; call `init_adapters` once it has memory.

    `ranks[family]` has one rank a layer, in the order of `families[family]`. The base's parameters stay the same objects under
    the same names. Raises ValueError, before anything is changed, if a family is unknown, empty or has another number of
    layers than ranks, a name is no plain nn.Linear (a subclass says itself that it is one: `is_plain_linear = True`), a row part
    is named twice, or a rank doesn't fit its Linear. On a CPU in float32 an adapter multiplies by oneDNN, where available: on a
    Linear that doesn't, the function at insertion is the base's to float32's rounding instead of to the bit.
    """
    modules = dict(model.named_modules())
    plan: dict[str, list[int]] = {}  # name of the Linear -> rank of each row part
    for family, layer_ranks in ranks.items():
        layers = families.get(family)
        if not layers:
            raise ValueError(f"family {family!r} matches no Linear of the model")
        if len(layers) != len(layer_ranks):
            raise ValueError(f"family {family!r} has {len(layers)} layers but {len(layer_ranks)} ranks")
        for (name, part, parts), rank in zip(layers, layer_ranks):
            kind = type(modules.get(name))
            if kind is not nn.Linear and not vars(kind).get("is_plain_linear"):
                raise ValueError(f"family {family!r}: {name} is a {kind.__name__}, not a plain nn.Linear")
            if not 0 <= part < parts:
                raise ValueError(f"family {family!r}: {name} has no row part {part} of {parts}")
            if rank < 1:
                raise ValueError(f"family {family!r}: rank {rank} for {name} is below 1")
            row_ranks = plan.setdefault(name, [0] * parts)
            if len(row_ranks) != parts or row_ranks[part]:
                raise ValueError(
                    f"family {family!r}: row part {part} of {parts} of {name} is already taken or cut otherwise"
                )
            row_ranks[part] = rank
    new = {}
    for name, row_ranks in plan.items():
        try:
            new[name] = LoRALinear.from_linear(modules[name], row_ranks, alpha, rslora)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
    for name, module in new.items():
        model.set_submodule(name, module)
    return model


def rank_costs(model: nn.Module, families: Families) -> dict[str, list[int]]:
    """Parameters that one more rank adds to each layer's adapter, in + out / parts."""
    sizes = lambda linear, parts: linear.in_features + linear.out_features // parts
    return {
        family: [sizes(model.get_submodule(name), parts) for name, _, parts in layers]
        for family, layers in families.items()
    }


def init_adapters(model: nn.Module, seed: int) -> None:
    """Fresh adapters: A Kaiming-uniform(√5) drawn from (seed, name), B = 0. The function of the model is its base's."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            module.init_adapters(seed, name)


def merge_lora(model: nn.Module) -> nn.Module:
    """Replace every LoRALinear by a plain Linear with W + s·B·A (in float32), in place. A second call changes nothing."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.merged())
    return model


def freeze_base(model: nn.Module, keep: tuple[str, ...] = (), dtype: torch.dtype | None = None) -> nn.Module:
    """Make the adapters the only trainable parameters, in place, and drop every other gradient.

    `keep`: name patterns that stay trainable besides (the head, norms and embeddings in static LoRA). `dtype`: cast the frozen
    Linears and Convs to it once, instead of autocast doing so every step; they need no float32 master any more.
    Raises ValueError for a pattern that matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{pattern!r} matches no parameter of the model")
    for prefix, module in model.named_modules():
        for key, p in module.named_parameters(prefix, recurse=False):
            p.requires_grad = is_adapter(key) or any(fnmatchcase(key, pattern) for pattern in keep)
            if not p.requires_grad:
                p.grad = None
                if dtype is not None and isinstance(module, (nn.Linear, nn.Conv2d)):
                    p.data = p.data.to(dtype)
    return model


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is an adapter's: blocks.0.attn.qkv.lora_A, blocks.0.attn.qkv.lora_B.1."""
    return ".lora_A" in f".{name}" or ".lora_B." in f".{name}"


def mark_ranks_dynamic(model: nn.Module) -> None:
    """Tell torch.compile that ranks vary, so that one graph serves every layer; call it before the first forward of a block.

    mark_dynamic on a Parameter is silently ignored unless dynamo's force_parameter_static_shapes is off. A dimension of size 1
    can't be dynamic in torch.compile: layers of rank 1 get graphs of their own.
    """
    torch._dynamo.config.force_parameter_static_shapes = False
    for module in model.modules():
        if isinstance(module, LoRALinear):
            for tensor, dim in [
                (module.lora_A, 0),
                (module.scaling, 0),
                *((B, 1) for B in module.lora_B.values()),
            ]:
                if tensor is not None and tensor.shape[dim] > 1:
                    torch._dynamo.mark_dynamic(tensor, dim)
