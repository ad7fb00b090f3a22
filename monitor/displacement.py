"""How far a window of epochs moves each layer, and whether in the direction of the window before.

A norm tells little of the steps behind it: weight decay shrinks it whatever the gradients say, and a step
across W leaves it as it is. Here, per layer and per window of `window_epochs` epochs, is what the updates
alone have done:

    D = W_end - prod(1 - lr * weight_decay) * W_start                 the product over the window's steps
    rho = ‖D‖_F / (sqrt(rows * columns) * sqrt(sum of the steps' lr²))
    cosine = <D, D of the window before> / (‖D‖ ‖D of the window before‖)

AdamW moves each weight by about lr a step. If its directions are independent from step to step rho is about
1, if they all agree it is the root of the number of steps, if they cancel it tends to 0; and so with the
cosine from one window to the next.

In the phases that train base weights these are "base", all of them. Where they are frozen it is the product
of the adapters, "adapters": P = s·B·A in the place of W, and the product's decay squared, because both of its
factors decay. The normalisation is the same, so that the adapters' rho over the base's is the share of a full
step that they take.

Of the base's D the largest singular values are measured, too (monitor/spectrum.py): what an adapter of each
rank could have done of the window's work, by which `rank_rule spectrum` gives the ranks.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from monitor.norms import Families, get_product_norm
from monitor.spectrum import get_singular_values

EVERY = 16  # of the D before, these columns are kept


class Displacement:
    """Follows a model's layers, window by window. With no `families` it does nothing and holds nothing.

    Memory, of the base weights that are trained: one float32 copy of this process's shards, as they were at
    the window's start; and every 16th column of the D before. So the base's cosine is an estimate, the cosine
    of columns 0, 16, 32, … of both; rho is of all columns. Of the adapters: their factors at the start of the
    window and of the one before, from which norms and cosine follow, of all columns, by rank × rank products;
    the (out, in) product is never formed.

    State is sharded as the weights are. Of a base weight only sums over each row travel; adapters' factors
    are gathered one layer at a time, as for their norms. Only at a window's end anything is computed.

    `num_singular_values`: how many of each layer are measured; 0: none. What they take besides, for the time
    of one layer, and what travels for them: monitor/spectrum.py.

    A window is measured only if its start was seen. `first_step` is the step after which the window under way
    began, None if that was not seen.
    """

    def __init__(
        self,
        model: nn.Module,
        families: Families,
        window_epochs: int,
        weight_decay: float,
        num_singular_values: int = 0,
    ):
        self.families, self.window_epochs, self.weight_decay = families, window_epochs, weight_decay
        self.num_singular_values = num_singular_values
        self.start: dict[str, Tensor] = {}  # what is watched, as it was at the window's start
        self.before: dict[str, Tensor] = {}  # base: columns of the D before; adapters: the start before
        self.first_step: int | None = None
        self.step_before = 0  # the window before began after it
        self.names = list(self.get_watched(model))

    # ---- windows

    def begin(self, model: nn.Module, step: int) -> None:
        """A window begins with the weights that `model` has now, after `step` steps of the run."""
        if not self.families:
            return
        watched = self.get_watched(model)
        self.names, self.first_step = list(watched), step
        self.start = {name: copy(tensor) for name, tensor in watched.items()}
        self.before = {name: tensor for name, tensor in self.before.items() if name in watched}

    def follow(self, model: nn.Module, step: int) -> None:
        """Go on with `model`, the next phase's. If it trains the same layers the window goes on, too.

        If not (the base is frozen, or its lowest blocks are) the window under way ends unreported and one
        begins here, which ends where the other would have ended.
        """
        if list(self.get_watched(model)) == self.names:
            return
        if self.first_step != step:  # in the middle of a window: the one before is not next to the new one
            self.before = {}
        self.begin(model, step)

    @torch.no_grad()
    def end_epoch(self, model: nn.Module, epoch: int, step: int, lr_at: Callable[[int], float]) -> dict:
        """What the epoch's record gets: {"displacement": {"base" or "adapters": {family: {"rho": [each
        layer's], "cosine": [each layer's]}}}} where a window ends that was seen from its start, else {}. Of
        the base also {"spectrum": {family: [each layer's largest singular values of D, descending]}}.

        `epoch`, `step`: completed. `lr_at(step)`: the learning rate of a step of the run, from 0. A layer
        that is frozen or has no adapter has rho 0 and singular values of 0; a cosine is None for it, and
        where there is no window before. All processes together.
        """
        if not self.families or epoch % self.window_epochs:
            return {}
        if self.first_step is None:
            self.begin(model, step)
            return {}
        learning_rates = [lr_at(i) for i in range(self.first_step, step)]
        spectra: dict[tuple[str, int], Tensor] = {}
        if self.is_of_base():
            kind, (products, spectra) = "base", self.measure_base(model, self.get_decay(learning_rates))
        else:
            rates_before = [lr_at(i) for i in range(self.step_before, self.first_step)]
            decays = self.get_decay(learning_rates) ** 2, self.get_decay(rates_before) ** 2
            kind, products = "adapters", self.measure_adapters(model, *decays)
        self.step_before, self.first_step = self.first_step, step
        measured = get_measures(model, self.families, products, math.hypot(*learning_rates))
        record: dict = {"displacement": {kind: measured}}
        if self.is_of_base() and self.num_singular_values:
            record["spectrum"] = get_spectrum(model, self.families, spectra, self.num_singular_values)
        return record

    def get_decay(self, learning_rates: list[float]) -> float:
        """What is left of a weight after steps at these learning rates that do nothing but decay."""
        return math.prod(1 - lr * self.weight_decay for lr in learning_rates)

    def measure_base(
        self, model: nn.Module, decay: float
    ) -> tuple[dict[tuple[str, int], Tensor], dict[tuple[str, int], Tensor]]:
        """(Linear, row part) -> ‖D‖²; ‖D‖², ‖D before‖² and <D, D before> of the columns that are kept; and
        (Linear, row part) -> the largest singular values of D. The next window begins here: the copies are
        the weights now, and the columns this window's."""
        products, spectra = {}, {}
        for key, start in self.start.items():
            name = key.removeprefix("base.")
            weight = model.get_submodule(name).weight  # (out, in)
            D = start.mul_(-decay).add_(weight)  # in the copy's place
            columns = take_columns(D)  # (out, in / 16)
            before = self.before.get(key, torch.zeros_like(columns))
            rows = [sum_rows(D, D), sum_rows(columns, columns), sum_rows(before, before)]
            rows.append(sum_rows(columns, before))  # (out,) each
            for part, parts in get_parts(self.families, name):
                products[name, part] = torch.stack([row.chunk(parts)[part].sum() for row in rows])
                if self.num_singular_values:
                    spectra[name, part] = get_singular_values(D, part, parts, self.num_singular_values)
            self.before[key] = columns
            start.copy_(weight)
        return products, spectra

    def measure_adapters(
        self, model: nn.Module, decay: float, decay_before: float
    ) -> dict[tuple[str, int], Tensor]:
        """(Linear, row part) -> ‖D‖² twice, ‖D before‖² and <D, D before> of the adapters' products. The next
        window begins here.

        In float64, because ‖D‖² is a small difference of large inner products."""
        products = {}
        now = {key: copy(tensor) for key, tensor in self.get_watched(model).items()}
        for name, part, _ in get_layers(self.families):
            keys = [f"adapters.{name}.{part}.{factor}" for factor in "BA"]
            if keys[0] not in now:
                continue
            D = subtract(gather(now, keys), decay, gather(self.start, keys))
            square = get_product_norm(*D).square()
            products[name, part] = torch.stack([square, square, *torch.zeros_like(square).expand(2)])
            if keys[0] in self.before:
                D_before = subtract(gather(self.start, keys), decay_before, gather(self.before, keys))
                products[name, part][2] = get_product_norm(*D_before).square()
                products[name, part][3] = get_inner_product(D, D_before)
        self.before, self.start = self.start, now
        return products

    # ---- what is watched

    def is_of_base(self) -> bool:
        return any(name.startswith("base.") for name in self.names)

    @torch.no_grad()
    def get_watched(self, model: nn.Module) -> dict[str, Tensor]:
        """The base weights that are trained, as base.LINEAR; without any the adapters' factors, as
        adapters.LINEAR.PART.B, s·B (rows, rank), and .A (rank, in), placed as their copies are."""
        names = dict.fromkeys(name for name, _, _ in get_layers(self.families))
        weights = {f"base.{name}": model.get_submodule(name).weight for name in names}
        trained = {key: weight for key, weight in weights.items() if weight.requires_grad}
        if trained:
            return trained
        factors = {}
        for name, part, _ in get_layers(self.families):
            module = model.get_submodule(name)
            if not hasattr(module, "adapter"):
                continue
            B, A = module.adapter(part)
            if A.numel():
                factors[f"adapters.{name}.{part}.B"] = shard_like(B, module, dim=0)
                factors[f"adapters.{name}.{part}.A"] = shard_like(A, module, dim=1)
        return factors

    # ---- in a checkpoint: displacement.start.NAME, displacement.before.NAME, displacement.steps

    def get_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint is to hold besides. Nothing where the start of the window under way was not
        seen."""
        if self.first_step is None:
            return {}
        tensors = {f"displacement.start.{name}": tensor for name, tensor in self.start.items()}
        tensors |= {f"displacement.before.{name}": tensor for name, tensor in self.before.items()}
        steps = torch.tensor([self.step_before, self.first_step], dtype=torch.int64)
        return tensors | {"displacement.steps": steps}

    @torch.no_grad()
    def load(
        self, stored: Iterable[str], read: Callable[[dict[str, Tensor]], None], model: nn.Module
    ) -> bool:
        """Go on with the window that a checkpoint has under way, whose weights `model` has. Returns whether
        it has one of all that is watched.

        `stored`: names in the checkpoint without their first "displacement."; `read` fills tensors in place
        by their whole names. All processes together.
        """
        watched = self.get_watched(model)
        if not watched or any(f"start.{name}" not in stored for name in watched):
            return False
        self.start = {name: copy(tensor) for name, tensor in watched.items()}
        there = [name for name in watched if f"before.{name}" in stored]
        if self.is_of_base():
            self.before = {name: take_columns(self.start[name]) for name in there}
        else:
            self.before = {name: self.start[name].clone() for name in there}
        self.first_step = 0
        tensors = self.get_tensors()
        read(tensors)
        self.step_before, self.first_step = tensors["displacement.steps"].tolist()
        return True


def get_layers(families: Families) -> list[tuple[str, int, int]]:
    """(Linear, row part, row parts) of all layers of all families."""
    return [layer for layers in families.values() for layer in layers]


def get_parts(families: Families, name: str) -> list[tuple[int, int]]:
    """(row part, row parts) of the layers that are parts of this Linear."""
    return [(part, parts) for other, part, parts in get_layers(families) if other == name]


def get_measures(
    model: nn.Module, families: Families, products: dict[tuple[str, int], Tensor], step_length: float
) -> dict[str, dict[str, list]]:
    """{family: {"rho", "cosine"}} of each layer from its `products`, by one sync. `step_length`: the root of
    the summed lr²."""
    numbers = {}
    if products:
        numbers = dict(zip(products, torch.stack(list(products.values())).tolist()))
    measures: dict[str, dict[str, list]] = {}
    for family, layers in families.items():
        measures[family] = {"rho": [], "cosine": []}
        for name, part, parts in layers:
            square, own, before, inner = numbers.get((name, part), (0.0, 0.0, 0.0, 0.0))
            size = model.get_submodule(name).weight.numel() / parts
            lengths = math.sqrt(own) * math.sqrt(before)
            measures[family]["rho"].append(math.sqrt(square) / (math.sqrt(size) * step_length))
            measures[family]["cosine"].append(inner / lengths if lengths else None)
    return measures


def get_spectrum(
    model: nn.Module, families: Families, spectra: dict[tuple[str, int], Tensor], count: int
) -> dict[str, list[list[float]]]:
    """{family: [the largest `count` singular values of each layer]}, with six digits; all 0 for a layer that
    has none in `spectra`, because it is frozen."""
    spectrum: dict[str, list[list[float]]] = {}
    for family, layers in families.items():
        spectrum[family] = []
        for name, part, parts in layers:
            rows, columns = model.get_submodule(name).weight.shape
            values = [0.0] * min(count, rows // parts, columns)
            if (name, part) in spectra:
                values = spectra[name, part].tolist()
            spectrum[family].append([float(f"{value:.6g}") for value in values])
    return spectrum


# ---- tensors, whole or sharded


def copy(tensor: Tensor) -> Tensor:
    """In float32, placed as it is."""
    return tensor.detach().clone().float()


def take_columns(D: Tensor) -> Tensor:
    """A copy of columns 0, 16, 32, … of (out, in). What is sharded by columns is sharded by rows afterwards,
    because these columns are not cut evenly."""
    if isinstance(D, DTensor):
        D = D.redistribute(placements=[Shard(0) if p.is_shard() else p for p in D.placements])
    return D[:, ::EVERY].clone(memory_format=torch.contiguous_format)


def sum_rows(X: Tensor, Y: Tensor) -> Tensor:
    """<X, Y> of each row, (out,), the same on every process: of shards, these sums alone travel."""
    return to_plain((X * Y).sum(dim=1))


def shard_like(factor: Tensor, module: nn.Module, dim: int) -> Tensor:
    """A factor that is whole on every process, of which each has a shard where the module's parameters are
    sharded."""
    for p in module.parameters():
        if isinstance(p, DTensor):
            placements = [Replicate()] * (p.device_mesh.ndim - 1) + [Shard(dim)]
            # A copy, for a view of the whole would keep it.
            return distribute_tensor(factor.detach(), p.device_mesh, placements, src_data_rank=None).clone()
    return factor


def to_plain(tensor: Tensor) -> Tensor:
    """A DTensor gathered whole (a collective: every process must call), a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---- products that are kept as (B, A)


def gather(factors: dict[str, Tensor], keys: list[str]) -> tuple[Tensor, Tensor]:
    """(B, A) of one layer, (rows, rank) and (rank, in), whole and in float64."""
    B, A = (to_plain(factors[key]).double() for key in keys)
    return B, A


def subtract(
    left: tuple[Tensor, Tensor], share: float, right: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """left - share * right, of twice the rank."""
    (B, A), (B_right, A_right) = left, right
    return torch.cat([B, -share * B_right], dim=1), torch.cat([A, A_right])


def get_inner_product(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    """<B A, B' A'> = <Bᵀ B', A A'ᵀ>."""
    (B, A), (B_right, A_right) = left, right
    return ((B.T @ B_right) * (A @ A_right.T)).sum()
