"""LoRA as verbs on a model: match_families, add_lora, init_adapters, freeze_base, freeze, merge_lora.

Any nn.Module with Linears will do.

Traps: a Linear whose weight somebody reads without calling it never runs its adapter. nn.MultiheadAttention
does that to its out_proj (refused below, it is a subclass of Linear), nn.TransformerEncoder to linear1 and
linear2 on its inference fast path (call `torch.backends.mha.set_fastpath_enabled(False)`).
"""

from fnmatch import fnmatchcase

import torch
from torch import nn

from lora.layers import LoRALinear, PlainLoRALinear, check_ranks
from lora.onednn import OneDNNLinear

# family -> (name of the Linear, row part, number of row parts) of each layer
Families = dict[str, list[tuple[str, int, int]]]


def match_families(
    model: nn.Module, table: dict[str, tuple[str, int, int]], wanted: tuple[str, ...]
) -> Families:
    """Resolve `table` (family -> name pattern, row part, row parts) into Linears of `model`, in its order.

    Raises ValueError naming the family that the table doesn't have or that matches no Linear: a family that
    silently matched nothing would leave its layers untrained.
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
    scaling_rule: str = "alpha",
) -> nn.Module:
    """Give every layer of every family in `ranks` an adapter of its rank, in place; none for rank 0.

    `ranks[family]` has one rank a layer, in the order of `families[family]`; `init_adapters` then sets the
    adapters' values. `alpha` and `scaling_rule` are those of lora/layers.py's `get_scaling`. The base's
    parameters stay the same objects under the same names, and a Linear whose parts all have rank 0 stays as
    it is. Raises ValueError, before anything is changed, if a family is unknown, empty or has another number
    of layers than ranks, a name is no plain nn.Linear (a subclass may compute something else), a row part is
    named twice, or a rank is negative or doesn't fit its Linear.
    """
    modules = dict(model.named_modules())
    plan = plan_ranks(modules, families, ranks)
    for name, row_ranks in plan.items():
        check_ranks(modules[name].in_features, modules[name].out_features, row_ranks, where=f"{name}: ")
    for name, row_ranks in plan.items():
        if any(row_ranks):
            model.set_submodule(name, LoRALinear.from_linear(modules[name], row_ranks, alpha, scaling_rule))
    return model


def plan_ranks(
    modules: dict[str, nn.Module], families: Families, ranks: dict[str, list[int]]
) -> dict[str, list[int]]:
    """Name of each Linear to adapt -> rank of each of its row parts, 0 for none. Raises as `add_lora`."""
    plan: dict[str, list[int]] = {}
    taken: set[tuple[str, int]] = set()
    for family, layer_ranks in ranks.items():
        layers = families.get(family)
        if not layers:
            raise ValueError(f"family {family!r} matches no Linear of the model")
        if len(layers) != len(layer_ranks):
            raise ValueError(f"family {family!r} has {len(layers)} layers but {len(layer_ranks)} ranks")
        for (name, part, parts), rank in zip(layers, layer_ranks):
            kind = type(modules.get(name))
            if kind not in (nn.Linear, OneDNNLinear):
                raise ValueError(f"family {family!r}: {name} is a {kind.__name__}, not a plain nn.Linear")
            if not 0 <= part < parts:
                raise ValueError(f"family {family!r}: {name} has no row part {part} of {parts}")
            if rank < 0:
                raise ValueError(f"family {family!r}: rank {rank} for {name} is below 0")
            row_ranks = plan.setdefault(name, [0] * parts)
            if len(row_ranks) != parts or (name, part) in taken:
                what = f"row part {part} of {parts} of {name}"
                raise ValueError(f"family {family!r}: {what} is already taken or cut otherwise")
            row_ranks[part] = rank
            taken.add((name, part))
    return plan


def drop_ranks(
    ranks: dict[str, list[int]], families: Families, names: tuple[str, ...]
) -> dict[str, list[int]]:
    """`ranks` with 0, for no adapter, in the layers whose Linear one of the patterns `names` matches."""
    dropped: dict[str, list[int]] = {}
    for family, layer_ranks in ranks.items():
        dropped[family] = []
        for (name, _, _), rank in zip(families[family], layer_ranks, strict=True):
            matches = any(fnmatchcase(name, pattern) for pattern in names)
            dropped[family].append(0 if matches else rank)
    return dropped


def rank_costs(model: nn.Module, families: Families) -> dict[str, list[int]]:
    """Parameters that one more rank adds to each layer's adapter, in + out / parts."""
    costs: dict[str, list[int]] = {}
    for family, layers in families.items():
        costs[family] = []
        for name, _, parts in layers:
            linear = model.get_submodule(name)
            costs[family].append(linear.in_features + linear.out_features // parts)
    return costs


def init_adapters(model: nn.Module, seed: int) -> None:
    """Set all adapters afresh, each from (seed, its name), so that the function is the base's.

    Call it once the model has memory and the base's weights are in place (drawn, loaded or copied), because
    an adapter may start from W, as `LoRALinear.init_adapters` says. It overwrites every adapter of the model:
    adapters that have been trained are loaded after it, or without it.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            module.init_adapters(seed, name)


def merge_lora(model: nn.Module) -> nn.Module:
    """Replace every LoRALinear by a plain Linear with W + s·B·A, in place. A second call changes nothing."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.merged())
    return model


def use_reference(model: nn.Module) -> nn.Module:
    """Have every LoRALinear compute W x + s·B·(A x) as it is written, slowly, in place.

    For comparisons with a merged weight: the fast operator multiplies by W + s·B·A and would agree with it
    whatever B·A is.
    """
    for module in model.modules():
        if type(module) is LoRALinear:
            module.__class__ = PlainLoRALinear
    return model


def get_adapter_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are an adapter's: each module that has `adapter_parameters()` is asked."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        if hasattr(module, "adapter_parameters"):
            names |= {f"{prefix}.{name}" if prefix else name for name in module.adapter_parameters()}
    return names


def freeze_base(model: nn.Module, keep: tuple[str, ...] = ()) -> nn.Module:
    """Make the adapters the only trainable parameters, in place, and drop every other gradient.

    What is an adapter the modules say themselves, see `get_adapter_names`. `keep`: name patterns that stay
    trainable besides (the head, norms and embeddings in static LoRA). The base stays in the precision that it
    has: an adapter's B A is added to it in every step. Raises ValueError for a pattern that matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{pattern!r} matches no parameter of the model")
    adapters = get_adapter_names(model)
    for name, p in model.named_parameters():
        kept = any(fnmatchcase(name, pattern) for pattern in keep)
        p.requires_grad = kept or name in adapters
        if not p.requires_grad:
            p.grad = None
    return model


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> nn.Module:
    """Make the parameters whose names match one of `patterns` need no gradient, in place, and drop theirs.

    No others are touched, and no value is. Raises ValueError, before anything is changed, for a pattern that
    matches nothing.
    """
    parameters = dict(model.named_parameters())
    frozen: set[str] = set()
    for pattern in patterns:
        matching = {name for name in parameters if fnmatchcase(name, pattern)}
        if not matching:
            raise ValueError(f"{pattern!r} matches no parameter of the model")
        frozen |= matching
    for name in frozen:
        parameters[name].requires_grad, parameters[name].grad = False, None
    return model


def mark_ranks_dynamic(model: nn.Module) -> None:
    """Tell torch.compile that ranks vary, so that one graph serves every layer.

    Call it before the first forward of a block.

    mark_dynamic on a Parameter is silently ignored unless dynamo's force_parameter_static_shapes is off. A
    dimension of size 1 can't be dynamic in torch.compile: layers of rank 1 get graphs of their own.
    """
    torch._dynamo.config.force_parameter_static_shapes = False
    for module in model.modules():
        if not isinstance(module, LoRALinear):
            continue
        # Each tensor with its dimension of ranks.
        of_rank = [(module.lora_A, 0), *((B, 1) for B in module.lora_B.values())]
        if module.scaling is not None:
            of_rank.append((module.scaling, 0))
        for tensor, dim in of_rank:
            if tensor.shape[dim] > 1:
                torch._dynamo.mark_dynamic(tensor, dim)
