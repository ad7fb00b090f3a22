"""A rank for every layer of every family, by how much its weights still change.

Algorithm 2 of PreLoRA (arXiv 2509.21619), and three rules to compare it with. These take
`costs[family][layer]`, the parameters that one more rank adds to a layer's adapter, and a `budget` of
parameters. All four give multiples of 8, or of rank_min where that is below 8.
"""

import math
from collections.abc import Sequence

from errors import UserError

Ranks = dict[str, list[int]]  # family -> rank of each layer
Spectrum = dict[str, list[list[float]]]  # family -> singular values of each layer, descending
ALIGNED = 8  # numbers of bfloat16 in 16 bytes: a GPU reads rows of other lengths more slowly


def choose_ranks(
    cfg,
    changes: dict[str, Sequence[float]],
    base: int,
    costs: dict[str, Sequence[int]],
    spectrum: Spectrum | None = None,
) -> Ranks:
    """Each layer's rank by `cfg.rank_rule`: from its weight norm's change in % or, with rule spectrum, from
    the singular values of what the last window did to it. Where these are not known (None) the same budget
    is given out by rule budget.

    `base`: parameters of the model without adapters. uniform, budget and spectrum fill `cfg.rank_budget`'s
    share of them or, without one, what minmax would use, so that rules are compared at equal size. Raises
    UserError for a budget that rank_min everywhere exceeds."""
    ranks = assign_ranks(changes, cfg.rank_min, cfg.rank_max)
    if cfg.rank_rule == "minmax":
        return ranks
    budget = count_parameters(ranks, costs) if cfg.rank_budget is None else int(cfg.rank_budget * base)
    if cfg.rank_rule == "spectrum" and spectrum is not None:
        return spectrum_ranks(spectrum, costs, budget, cfg.rank_min, cfg.rank_max)
    rule = uniform_ranks if cfg.rank_rule == "uniform" else budget_ranks
    return rule(changes, costs, budget, cfg.rank_min, cfg.rank_max)


def assign_ranks(changes: dict[str, Sequence[float]], rank_min: int, rank_max: int) -> Ranks:
    """Algorithm 2: ranks by how much weight norms change.

    `changes[family][layer]` is the change in % of the layer's weight norm between the last two windows.
    Per family: |changes| min-max normalised to v in [0, 1], i = ⌈v·|R|⌉ − 1 (0 where v = 0), rank = R[i] with
    R = [rank_min, 2·rank_min, …, rank_max]. The paper's formula is signed, its rationale ("substantial change
    → higher rank") is about magnitude: we take the absolute value. All layers equal (0/0) or a single layer:
    rank_min. Returns one rank a layer. Raises ValueError for ranks that are not powers of two, rank_min >
    rank_max, an empty family, or a change that is not finite.
    """
    for rank in (rank_min, rank_max):
        if rank < 1 or rank & (rank - 1):
            raise ValueError(f"ranks are powers of two, not {rank}")
    if rank_min > rank_max:
        raise ValueError(f"rank_min {rank_min} is above rank_max {rank_max}")
    steps = (rank_max // rank_min).bit_length()  # |R|
    ranks = {}
    for family, signed in changes.items():
        if not signed or not all(map(math.isfinite, signed)):
            raise ValueError(
                f"the weight norm changes of family {family} are empty or not finite: {list(signed)}"
            )
        magnitude = [abs(c) for c in signed]
        low, high = min(magnitude), max(magnitude)
        if high - low <= 1e-12 * high:  # all layers equal, up to rounding
            ranks[family] = [rank_min] * len(magnitude)
            continue
        # 1e-9: a v on a bucket's edge belongs to the lower bucket, also where rounding put it a hair above
        index = [max(math.ceil((c - low) / (high - low) * steps - 1e-9) - 1, 0) for c in magnitude]
        ranks[family] = [rank_min << i for i in index]
    return ranks


def count_parameters(ranks: dict[str, Sequence[int]], costs: dict[str, Sequence[int]]) -> int:
    """Parameters of all adapters of these ranks."""
    return sum(rank * cost for family in ranks for rank, cost in zip(ranks[family], costs[family]))


def uniform_ranks(
    changes: dict[str, Sequence[float]],
    costs: dict[str, Sequence[int]],
    budget: int,
    rank_min: int,
    rank_max: int,
) -> Ranks:
    """One rank for every layer, the largest of rank_min to rank_max that `budget` pays for among the
    multiples of 8, or of rank_min where that is below 8.

    `changes` only says which layers there are. Raises UserError if the budget does not pay for rank_min.
    """
    multiple = min(ALIGNED, rank_min)  # rank_min is a power of two, so one of its own multiples
    everywhere = {family: [multiple] * len(layers) for family, layers in changes.items()}
    check_budget(changes, costs, budget, rank_min)
    rank = min(budget // count_parameters(everywhere, costs) * multiple, rank_max)
    return {family: [rank] * len(layers) for family, layers in changes.items()}


def budget_ranks(
    changes: dict[str, Sequence[float]],
    costs: dict[str, Sequence[int]],
    budget: int,
    rank_min: int,
    rank_max: int,
) -> Ranks:
    """Ranks in proportion to |change| over all families and layers, as large as `budget` pays for.

    rank = rank_min · clip(⌊λ·|change|⌋, 1, rank_max / rank_min) with the largest λ whose adapters fit:
    multiples of rank_min, so that every layer has some and the rows keep lengths that GPUs read fast. Where
    several layers reach their next multiple at the same λ and the budget does not pay for all, the first
    families in the alphabet get it; layers that did not change at all come last. Raises UserError if the
    budget does not pay for rank_min.
    """
    left = check_budget(changes, costs, budget, rank_min)
    ranks = {family: [rank_min] * len(layers) for family, layers in changes.items()}
    # As λ grows from 0, a layer reaches its next multiple n at λ = n / |change|; equal changes one multiple
    # at a time.
    steps = []  # (λ, n, family, layer)
    for family, layers in changes.items():
        for layer, change in enumerate(layers):
            for n in range(2, rank_max // rank_min + 1):
                steps.append((n / abs(change) if change else math.inf, n, family, layer))
    return fill(ranks, sorted(steps), costs, left, rank_min)


def spectrum_ranks(
    spectrum: Spectrum, costs: dict[str, Sequence[int]], budget: int, rank_min: int, rank_max: int
) -> Ranks:
    """Ranks that capture the most of what `spectrum` is the singular values of, for `budget` parameters.

    The best approximation of rank r captures σ_1² + … + σ_r² of a matrix's squared norm. Every layer has
    rank_min. Then the block of rank_min more that captures the most for each of its parameters is added, of
    all layers of all families, again and again, until the next one is not paid for: multiples of rank_min, so
    that the rows keep lengths that GPUs read fast. No layer gets a block beyond rank_max or its last singular
    value. Of blocks that are worth the same the lower one goes first, then the first family in the alphabet,
    then the first layer. Raises UserError if the budget does not pay for rank_min.
    """
    left = check_budget(spectrum, costs, budget, rank_min)
    blocks = []  # (-worth, block's number, family, layer)
    for family, layers in spectrum.items():
        for layer, values in enumerate(layers):
            for n in range(1, min(rank_max, len(values)) // rank_min):
                captured = math.fsum(value**2 for value in values[n * rank_min : (n + 1) * rank_min])
                blocks.append((-captured / (rank_min * costs[family][layer]), n, family, layer))
    ranks = {family: [rank_min] * len(layers) for family, layers in spectrum.items()}
    # A layer's blocks are worth less and less, so in this order each comes after the one below it.
    return fill(ranks, sorted(blocks), costs, left, rank_min)


def fill(
    ranks: Ranks, blocks: list[tuple], costs: dict[str, Sequence[int]], left: int, rank_min: int
) -> Ranks:
    """`ranks`, which are changed, with rank_min more for the (…, …, family, layer) of each block in turn,
    until the parameters that are `left` do not pay for the next one."""
    for _, _, family, layer in blocks:
        left -= rank_min * costs[family][layer]
        if left < 0:
            break
        ranks[family][layer] += rank_min
    return ranks


def check_budget(
    changes: dict[str, Sequence], costs: dict[str, Sequence[int]], budget: int, rank_min: int
) -> int:
    """Parameters left of `budget` once every layer has rank_min. Raises UserError if it pays for less."""
    least = {family: [rank_min] * len(layers) for family, layers in changes.items()}
    left = budget - count_parameters(least, costs)
    if left < 0:
        raise UserError(
            f"a budget of {budget:,} parameters is not enough for rank_min {rank_min} in every layer"
        )
    return left
