"""Algorithm 2 of PreLoRA (arXiv 2509.21619): a rank for every layer of every family, by how much its weights still change."""

import math
from collections.abc import Sequence


def assign_ranks(changes: dict[str, Sequence[float]], rank_min: int, rank_max: int) -> dict[str, list[int]]:
    """Algorithm 2. `changes[family][layer]` is the change in % of the layer's weight norm between the last two windows.

    Per family: |changes| min-max normalised to v in [0, 1], i = ⌈v·|R|⌉ − 1 (0 where v = 0), rank = R[i] with
    R = [rank_min, 2·rank_min, …, rank_max]. The paper's formula is signed, its rationale ("substantial change → higher rank")
    is about magnitude: we take the absolute value. All layers equal (0/0) or a single layer: rank_min.
    Returns one rank a layer. Raises ValueError for ranks that are not powers of two, rank_min > rank_max, an empty family, or
    a change that is not finite.
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
            raise ValueError(f"the weight norm changes of family {family} are empty or not finite: {list(signed)}")
        magnitude = [abs(c) for c in signed]
        low, high = min(magnitude), max(magnitude)
        if high - low <= 1e-12 * high:  # all layers equal, up to rounding
            ranks[family] = [rank_min] * len(magnitude)
            continue
        # 1e-9: a v on a bucket's edge belongs to the lower bucket, also where rounding put it a hair above
        index = [max(math.ceil((c - low) / (high - low) * steps - 1e-9) - 1, 0) for c in magnitude]
        ranks[family] = [rank_min << i for i in index]
    return ranks
