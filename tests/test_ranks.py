"""lora/ranks.py: Algorithm 2 against tables worked by hand and the paper's pseudo-code, worked exactly."""

import math
import random
from fractions import Fraction

import pytest

from errors import UserError
from lora.ranks import assign_ranks, budget_ranks, count_parameters, uniform_ranks

NAN, INF = float("nan"), float("inf")


def test_several_families_by_hand():
    changes = {
        # min 0.1, span 0.9: v = 0, 1/3, 2/3, 1, 1/6; v·4 = 0, 1.33, 2.67, 4, 0.67; ⌈·⌉ − 1 = 0 (v = 0), 1, 2,
        # 3, 0
        "q": [0.1, 0.4, 0.7, 1.0, 0.25],
        # min 5, span 80: v = 0, 0.9, 1, 0.1, 0.3; v·4 = 0, 3.6, 4, 0.4, 1.2; index 0, 3, 3, 0, 1
        # (each family has its own min and max)
        "fc1": [5.0, 77.0, 85.0, 13.0, 29.0],
    }
    assert assign_ranks(changes, 8, 64) == {"q": [8, 16, 32, 64, 8], "fc1": [8, 64, 64, 8, 16]}


def test_negative_changes_count_by_magnitude():
    # magnitudes 2, 0.5, 1, 1.5: min 0.5, span 1.5: v = 1, 0, 1/3, 2/3; v·4 = 4, 0, 1.33, 2.67; index 3, 0, 1,
    # 2
    assert assign_ranks({"k": [-2.0, 0.5, -1.0, 1.5]}, 8, 64) == {"k": [64, 8, 16, 32]}
    # the formula as printed, signed, would give the layer that changed most the lowest rank
    assert transcription([Fraction(c) for c in (-2.0, 0.5, -1.0, 1.5)], 8, 64, magnitude=False)[0] == 8


@pytest.mark.parametrize(
    "changes", [[0.7], [-0.7], [0.0], [0.3, 0.3, 0.3], [0.3, -0.3], [0.0, 0.0], [0.1 + 0.2, 0.3]]
)
def test_single_layer_and_equal_layers_get_rank_min(changes):
    assert assign_ranks({"q": changes}, 4, 32) == {
        "q": [4] * len(changes)
    }  # 0/0; the last: equal up to rounding


def test_equal_rank_min_and_max():
    assert assign_ranks({"q": [0.1, 0.5, 0.9]}, 16, 16) == {"q": [16, 16, 16]}  # |R| = 1: every index is 0


def test_two_ranks():
    # |R| = 2: v = 0, 0.5, 0.75, 1; v·2 = 0, 1, 1.5, 2; index 0, 0, 1, 1
    assert assign_ranks({"q": [0.0, 2.0, 3.0, 4.0]}, 1, 2) == {"q": [1, 1, 2, 2]}


def test_bucket_edges_belong_to_the_lower_bucket():
    # v = 0, 1/4, 2/4, 3/4, 1, so v·4 = 0, 1, 2, 3, 4 without rounding; index 0 (v = 0), 0, 1, 2, 3
    assert assign_ranks({"q": [0.0, 1.0, 2.0, 3.0, 4.0]}, 8, 64) == {"q": [8, 8, 16, 32, 64]}
    assert assign_ranks({"q": [0.0, 1.0000001, 2.0, 3.0, 4.0]}, 8, 64) == {
        "q": [8, 16, 16, 32, 64]
    }  # just above one


@pytest.mark.parametrize("scale", [0.1, 0.01, 0.7, 1.1])
def test_bucket_edges_survive_rounding(scale):
    """The same edges where binary fractions put v·4 a hair above an integer: a bare ceil takes the next
    rank."""
    changes = [scale * i for i in (1, 2, 3, 4, 5)]
    assert assign_ranks({"q": changes}, 8, 64) == {"q": [8, 8, 16, 32, 64]}


def test_rounding_control():
    bare = [(c - 0.1) / (0.5 - 0.1) * 4 for c in (0.1, 0.2, 0.30000000000000004, 0.4, 0.5)]
    assert [math.ceil(v) for v in bare] != [0, 1, 2, 3, 4]  # so the test above is not vacuous


@pytest.mark.parametrize("low, high", [(3, 64), (8, 48), (0, 8), (-8, 8), (6, 6)])
def test_ranks_that_are_not_powers_of_two(low, high):
    with pytest.raises(ValueError, match="powers of two"):
        assign_ranks({"q": [0.1, 0.2]}, low, high)


def test_rank_min_above_rank_max():
    with pytest.raises(ValueError, match="rank_min 16 is above rank_max 8"):
        assign_ranks({"q": [0.1, 0.2]}, 16, 8)


@pytest.mark.parametrize("bad", [[], [0.1, NAN], [NAN], [0.1, INF], [-INF, 0.1], [NAN, NAN]])
def test_bad_changes_name_the_family(bad):
    with pytest.raises(ValueError, match="fc2"):
        assign_ranks({"q": [0.1, 0.2], "fc2": bad}, 8, 64)


def transcription(changes, rank_min, rank_max, magnitude=True):
    """Algorithm 2 line by line, in exact arithmetic."""
    R = []
    while not R or R[-1] < rank_max:
        R.append(rank_min if not R else R[-1] * 2)
    deltas = [abs(c) if magnitude else c for c in changes]
    ranks = []
    low, span = min(deltas), max(deltas) - min(deltas)
    for delta in deltas:
        v = (delta - low) / span if span else Fraction(0)
        ranks.append(R[math.ceil(v * len(R)) - 1 if v else 0])
    return ranks


@pytest.mark.parametrize("seed", range(20))
def test_random_inputs_against_the_transcription(seed):
    rng = random.Random(seed)
    for _ in range(50):
        count = rng.randint(1, 24)
        low = rng.randint(0, 5)
        rank_min, rank_max = 2**low, 2 ** rng.randint(low, 7)
        # whole numbers hit the buckets' edges all the time, floats never
        draw = (lambda: rng.randint(-16, 16) / 64) if rng.random() < 0.5 else (lambda: rng.gauss(0, 1))
        changes = {family: [draw() for _ in range(count)] for family in ("q", "fc1")}
        expected = {
            family: transcription(list(map(Fraction, layers)), rank_min, rank_max)
            for family, layers in changes.items()
        }
        got = assign_ranks(changes, rank_min, rank_max)
        assert got == expected
        assert all(type(r) is int and rank_min <= r <= rank_max for ranks in got.values() for r in ranks)


# ---- the rules to compare Algorithm 2 with

CHANGES = {"q": [1.0, -2.0, 4.0], "fc1": [0.5, 0.25, 3.0]}
COSTS = {"q": [2, 2, 2], "fc1": [5, 5, 5]}  # parameters a rank adds


def test_count_parameters_by_hand():
    assert count_parameters({"q": [4, 8, 16], "fc1": [4, 4, 8]}, COSTS) == 2 * 28 + 5 * 16


@pytest.mark.parametrize(
    "rank_min, budget, rank",
    [
        (4, 84, 4),
        (4, 167, 4),  # 7 is paid for
        (4, 168, 8),
        (4, 251, 8),  # 11, and 12 costs 252
        (4, 252, 12),
        (4, 10**6, 32),
        (8, 335, 8),
        (8, 336, 16),
        (16, 336, 16),
        (16, 503, 16),  # 23
        (16, 504, 24),  # a multiple of 8, though not of rank_min
        (2, 42 + 41, 2),
        (2, 42 + 42, 4),
        (1, 63, 3),
    ],
)
def test_uniform_by_hand(rank_min, budget, rank):
    """One more rank everywhere costs 21; a budget for more than rank_max is not spent."""
    assert uniform_ranks(CHANGES, COSTS, budget, rank_min, 32) == {"q": [rank] * 3, "fc1": [rank] * 3}


def is_aligned(ranks, rank_min):
    """Multiples of 8, or of rank_min where that is below 8."""
    return all(rank % min(8, rank_min) == 0 for layers in ranks.values() for rank in layers)


@pytest.mark.parametrize("rule", [uniform_ranks, budget_ranks])
def test_ranks_are_of_lengths_that_gpus_read_fast(rule):
    rng = random.Random(0)
    for _ in range(300):
        low = rng.randint(0, 5)
        rank_min, rank_max = 2**low, 2 ** rng.randint(low, 7)
        budget = rng.randint(21 * rank_min, 25 * rank_max)
        ranks = rule(CHANGES, COSTS, budget, rank_min, rank_max)
        assert is_aligned(ranks, rank_min) and count_parameters(ranks, COSTS) <= budget
        assert all(rank_min <= rank <= rank_max for layers in ranks.values() for rank in layers)
    # control: what a budget pays for to the last parameter
    assert not is_aligned({"q": [13]}, 8) and not is_aligned({"q": [6]}, 4) and is_aligned({"q": [6]}, 2)


@pytest.mark.parametrize(
    "budget, expected",
    [
        (84, {"q": [4, 4, 4], "fc1": [4, 4, 4]}),
        (91, {"q": [4, 4, 4], "fc1": [4, 4, 4]}),  # the first step, q's last layer to 8 at λ = 2/4, costs 8
        (92, {"q": [4, 4, 8], "fc1": [4, 4, 4]}),
        (
            111,
            {"q": [4, 4, 8], "fc1": [4, 4, 4]},
        ),  # the next is fc1's last to 8 at λ = 2/3, 20; nothing cheaper goes before it
        (112, {"q": [4, 4, 8], "fc1": [4, 4, 8]}),
        (120, {"q": [4, 4, 12], "fc1": [4, 4, 8]}),  # 3/4
        # λ = 1: 4·⌊change⌋ = 4, 8, 16 and 4 (clipped), 4, 12
        (2 * 28 + 5 * 20, {"q": [4, 8, 16], "fc1": [4, 4, 12]}),
        (10**6, {"q": [32] * 3, "fc1": [32] * 3}),
    ],
)
def test_budget_by_hand(budget, expected):
    ranks = budget_ranks(CHANGES, COSTS, budget, 4, 32)
    assert ranks == expected
    assert count_parameters(ranks, COSTS) <= budget


def test_budget_gives_equal_changes_equal_ranks_level_by_level():
    for change in (0.0, -1.5):
        changes = {"q": [change] * 3, "fc1": [change] * 3}
        assert budget_ranks(changes, COSTS, 2 * 84, 4, 32) == {"q": [8] * 3, "fc1": [8] * 3}
    one_still = budget_ranks({"q": [0.0, 1.0, 1.0]}, {"q": [2, 2, 2]}, 2 * (4 + 32 + 32), 4, 32)
    assert one_still == {"q": [4, 32, 32]}  # a layer at rest gets more only when no other can


@pytest.mark.parametrize("rule", [uniform_ranks, budget_ranks])
def test_a_budget_below_rank_min_everywhere(rule):
    assert rule(CHANGES, COSTS, 84, 4, 32)
    with pytest.raises(UserError, match="a budget of 83 parameters is not enough for rank_min 4"):
        rule(CHANGES, COSTS, 83, 4, 32)


@pytest.mark.parametrize("seed", range(20))
def test_budget_is_the_largest_proportion_that_fits(seed):
    """rank = rank_min · clip(⌊λ·|change|⌋, 1, 8) for the largest λ whose adapters fit."""
    rng = random.Random(seed)
    changes = {family: [rng.uniform(-3, 3) for _ in range(5)] for family in ("q", "fc1")}
    costs = {"q": [2] * 5, "fc1": [5] * 5}
    budget = rng.randrange(4 * 35, 32 * 35)
    at = lambda scale: {
        f: [4 * min(max(int(scale * abs(c)), 1), 8) for c in layers] for f, layers in changes.items()
    }
    scales = sorted(
        n / abs(c) * (1 + 1e-12) for layers in changes.values() for c in layers for n in range(1, 9)
    )
    fits = [at(scale) for scale in scales if count_parameters(at(scale), costs) <= budget]
    ranks = budget_ranks(changes, costs, budget, 4, 32)
    assert count_parameters(ranks, costs) <= budget and ranks == fits[-1]
