"""monitor/convergence.py and monitor/norms.py: Algorithm 1 by hand, windows, resume, warnings; norms without a ViT."""

import json
import math

import pytest
import torch
from torch import nn

from lora.inject import add_lora, init_adapters
from monitor.convergence import ConvergenceMonitor, failure_signs, partial_convergence_test, percent_change, rank_signs
from monitor.norms import adapter_norms, weight_norms

NAN, INF = float("nan"), float("inf")
FLAT = [10.0, 10.0, 10.0]


# tau 0.5, zeta 2.5 throughout
@pytest.mark.parametrize("norms, losses, passes", [
    ({"q": [100, 100.4, 100.8]}, [2, 1.98, 1.95], True),  # q +0.4, +0.398; loss −1, −1.515
    ({"q": [200, 201, 202.005]}, FLAT, True),  # +0.5 and 1.005 / 201 = +0.5: equality passes
    ({"q": [200, 201.002, 202]}, FLAT, False),  # +0.501
    ({"q": [200, 199, 198.005]}, FLAT, True),  # −0.5 and −0.995 / 199 = −0.5
    ({"q": [200, 198.998, 198.9]}, FLAT, False),  # −0.501: a shrinking norm moves as well
    ({"q": FLAT}, [40, 41, 42.025], True),  # loss +2.5, +2.5
    ({"q": FLAT}, [40, 39, 38.025], True),  # loss −2.5, −2.5
    ({"q": FLAT}, [40, 38.999, 38.9], False),  # loss −2.5025: fails alone
    ({"q": FLAT, "k": [100, 100.6, 100.6], "v": FLAT}, FLAT, False),  # k fails alone, only in the earlier pair
    ({"q": FLAT, "k": [100, 100, 100.6], "v": FLAT}, FLAT, False),  # … and only in the later pair
    ({"q": FLAT}, [2, 1.9, 1.9], False),  # loss −5, only in the earlier pair
    ({"q": [100, 100.4, 100.8, 101.2]}, [1] * 4, True),  # each step < 0.5, first to last +1.2: pairs are what counts
    ({"q": [0, 0, 0]}, FLAT, True),  # 0 / 0 is no change
    ({"q": [0, 1e-9, 1e-9]}, FLAT, False),  # from 0 to something is an infinite one
])
def test_algorithm_1_by_hand(norms, losses, passes):
    assert partial_convergence_test(norms, losses, tau=0.5, zeta=2.5) is passes


def test_equality_survives_rounding():
    assert percent_change(1.1, 1.0) > 10  # 10.000000000000009: a bare ≤ would fail on it
    assert partial_convergence_test({"q": [1.0, 1.1]}, [1.0, 1.1], tau=10, zeta=10)
    assert not partial_convergence_test({"q": [1.0, 1.1 + 1e-7]}, [1.0, 1.1], tau=10, zeta=10)


@pytest.mark.parametrize("norms, losses", [
    ({"q": [1.0]}, [1.0]), ({"q": []}, []), ({}, FLAT), ({"q": [1.0, 1.0]}, FLAT),
    ({"q": FLAT, "k": FLAT + [1.0]}, FLAT)])
def test_too_few_or_uneven_windows(norms, losses):
    with pytest.raises(ValueError, match="at least two windows"):
        partial_convergence_test(norms, losses, 0.5, 2.5)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("norms, losses", [
    ({"q": [1, 2, "bad"]}, FLAT),  # the first pair has failed already
    ({"q": [1, 2, 3], "k": ["bad", 1, 1]}, FLAT),  # so has the first family
    ({"q": FLAT}, [1, 2, "bad"]),
    ({"q": FLAT}, ["bad", 1, 1]),
    ({"q": ["bad"] * 3}, [1, 2, 3]),
])
def test_not_finite_is_an_error_wherever_it_stands(norms, losses, bad):
    put = lambda values: [bad if v == "bad" else v for v in values]
    with pytest.raises(ValueError, match="not finite"):
        partial_convergence_test({family: put(values) for family, values in norms.items()}, put(losses), 0.5, 2.5)


def feed(monitor, norms, losses=None):
    """Epoch numbers (from 1) at which the monitor says yes; one family with two layers, the second twice the first."""
    losses = losses or [1.0] * len(norms)
    return [epoch for epoch, (n, loss) in enumerate(zip(norms, losses), 1) if monitor.update({"q": [n, 2 * n]}, loss)]


@pytest.mark.parametrize("k, m, epochs, expected", [
    (3, 3, 8, []),  # windows not yet full
    (3, 3, 9, [9]),
    (3, 3, 14, [9, 12]),  # tested at a window's end only, although everything is constant
    (2, 1, 4, [2, 3, 4]),
    (2, 4, 16, [8, 12, 16]),
])
def test_windows_are_disjoint_and_tested_at_their_end(k, m, epochs, expected):
    assert feed(ConvergenceMonitor(0.5, 2.5, k, m), [10.0] * epochs) == expected


def test_only_the_last_windows_count():
    # window means (m = 2) 10, 15, 15, 15: the first pair moves by 50 %; k = 2 sees (15, 15) at epoch 6, k = 3 at 8
    norms = [10.0, 10.0, 15.0, 15.0, 15.0, 15.0, 15.0, 15.0]
    assert feed(ConvergenceMonitor(0.5, 2.5, 2, 2), norms) == [6, 8]
    assert feed(ConvergenceMonitor(0.5, 2.5, 3, 2), norms) == [8]


def test_windows_average_their_epochs():
    # the epochs alternate by 20 %, their means (9 + 11) / 2 don't move
    assert feed(ConvergenceMonitor(0.0, 0.0, 2, 2), [9.0, 11.0, 11.0, 9.0], [1.0, 3.0, 3.0, 1.0]) == [4]
    # loss 2 → 2.2, +10 %
    assert feed(ConvergenceMonitor(0.5, 2.5, 2, 2), [9.0, 11.0, 11.0, 9.0], [1.0, 3.0, 3.0, 1.4]) == []


@pytest.mark.parametrize("skip, expected", [(0, [4, 6, 8]), (0.5, [6, 8]), (2, [6, 8]), (2.1, [8]), (4, [8]), (5, [])])
def test_windows_that_overlap_the_lr_warmup_do_not_count(skip, expected):
    # m = 2: windows begin at 0, 2, 4, 6 and two that begin at `skip` or later are needed
    assert feed(ConvergenceMonitor(0.5, 2.5, 2, 2, skip_epochs=skip), [10.0] * 8) == expected


def test_changes_per_layer_by_hand():
    monitor = ConvergenceMonitor(0.5, 2.5, num_windows=2, window_epochs=2)
    for layers in ([7, 7], [7, 7], [9, 40], [11, 40], [12, 39], [13, 37]):  # means (7, 7), (10, 40), (12.5, 38)
        monitor.update({"q": layers, "fc1": [5.0]}, 1.0)
    assert monitor.changes() == {"q": [25.0, -5.0], "fc1": [0.0]}  # 2.5 / 10, −2 / 40
    monitor.update({"q": [99, 99], "fc1": [99.0]}, 1.0)  # a window under way is not looked at
    assert monitor.changes() == {"q": [25.0, -5.0], "fc1": [0.0]}


def test_family_mean_is_over_layers():
    # layers 10 → 11 and 30 → 29: both move, their mean does not; Algorithm 1 tests the mean, 2 gets the layers
    monitor = ConvergenceMonitor(0.5, 2.5, 2, 1)
    assert not monitor.update({"q": [10, 30]}, 1.0) and monitor.update({"q": [11, 29]}, 1.0)
    assert monitor.changes()["q"] == pytest.approx([10, -100 / 30])


@pytest.mark.parametrize("switch_epoch, expected", [(4, [4, 5, 6, 7]), (7, [7])])
def test_switch_epoch_overrides_the_test(switch_epoch, expected):
    # it moves by far too much for the test; 7 is no window's end
    assert feed(ConvergenceMonitor(0.5, 2.5, 3, 2, switch_epoch=switch_epoch), [2.0 ** e for e in range(7)]) == expected
    # nor does the test pass before it
    assert feed(ConvergenceMonitor(0.5, 2.5, 2, 2, switch_epoch=7), [10.0] * 7) == [7]


@pytest.mark.parametrize("kwargs, message", [
    (dict(num_windows=1, window_epochs=3), "num_windows 1"), (dict(num_windows=3, window_epochs=0), "window_epochs 0"),
    (dict(num_windows=3, window_epochs=3, switch_epoch=5), "switch_epoch 5"),
])
def test_monitor_rejects(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ConvergenceMonitor(0.5, 2.5, **kwargs)


@pytest.mark.parametrize("stop", range(13))
def test_resume_through_json_at_every_epoch(stop):
    norms = [5.0, 7.0, 9.0] + [10 + 0.3 / e for e in range(1, 4)] + [10.1 + 1e-3 * e for e in range(7)]
    make = lambda: ConvergenceMonitor(0.5, 2.5, 3, 2, skip_epochs=1)
    whole, first, second = make(), make(), make()
    expected = feed(whole, norms)
    assert 0 < len(expected) < 4  # some yes, some no
    got = feed(first, norms[:stop])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got += [stop + epoch for epoch in feed(second, norms[stop:])]
    assert got == expected and second.changes() == whole.changes() and second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("norms, loss, message", [
    ({"q": [1.0, NAN], "k": [1.0, 1.0]}, 1.0, r"epoch 3: .*'q'"),
    ({"q": [1.0, 1.0], "k": [INF, 1.0]}, 1.0, r"epoch 3: .*'k'"),
    ({"q": [1.0, 1.0], "k": [1.0, 1.0]}, NAN, "epoch 3: the training loss"),
])
def test_not_finite_epoch_is_an_error(norms, loss, message):
    monitor = ConvergenceMonitor(0.5, 2.5, 2, 3)
    feed(monitor, [1.0, 1.0])
    with pytest.raises(FloatingPointError, match=message):
        monitor.update(norms, loss)


def epochs(phases, losses):
    return [{"epoch": i, "phase": phase, "train_loss": loss} for i, (phase, loss) in enumerate(zip(phases, losses), 1)]


def test_loss_spike_after_the_freeze():
    assert "loss spike" in failure_signs(epochs(["full", "warmup", "lora"], [3.0, 2.0, 2.11]), 2, 2.5)[0]  # +5.5 %
    assert failure_signs(epochs(["full", "warmup", "lora"], [3.0, 2.0, 2.09]), 2, 2.5) == []  # +4.5 %
    assert failure_signs(epochs(["full", "warmup", "warmup"], [3.0, 2.0, 3.0]), 2, 2.5) == []  # no freeze here
    assert failure_signs(epochs(["warmup", "lora", "lora"], [2.0, 2.0, 3.0]), 2, 2.5) == []  # not right after it
    assert "loss spike" in failure_signs(epochs(["full", "lora"], [2.0, 3.0]), 2, 2.5)[0]  # frozen without a warmup
    assert failure_signs(epochs(["lora"], [3.0]), 2, 2.5) == []  # static LoRA: no freeze at all


PHASES = ["full", "warmup"] + ["lora"] * 4


@pytest.mark.parametrize("run, baseline, warns", [
    ([3, 2, 2.0, 2.0, 2.0, 1.98], [3, 2, 1.9, 1.9, 1.8, 1.8], True),  # last window 1.99, −0.5 %; 10.6 % above 1.8
    ([3, 2, 2.0, 2.0, 2.0, 1.98], [3, 2, 1.9, 1.9, 1.9, 1.9], False),  # 4.7 % above: near enough
    ([3, 2, 2.3, 2.2, 2.0, 1.98], [3, 2, 1.9, 1.9, 1.8, 1.8], False),  # −11.6 %: still falling, no plateau
    ([3, 2, 2.0, 2.0, 2.0, 1.98], [3, 2, 1.9, 1.9, 1.8], False),  # the baseline ends before: nothing to compare with
    ([3, 2, 2.0, 2.0, 2.0], [3, 2, 1.9, 1.9, 1.8, 1.8], False),  # not at a window's end
])
def test_loss_plateau_above_the_baseline(run, baseline, warns):
    signs = failure_signs(epochs(PHASES, run), 2, 2.5, epochs(["full"] * 6, baseline))
    assert ["plateau above the baseline" in sign for sign in signs] == [True] * warns
    assert failure_signs(epochs(PHASES, run), 2, 2.5) == []  # without a baseline there is nothing to say


def test_rank_signs():
    assert rank_signs({"q": [8, 64], "k": [16, 32]}, 8, 64) == []
    nearly = rank_signs({"q": [64] * 5, "k": [64] * 4 + [8]}, 8, 64)  # 9 of 10
    assert len(nearly) == 1 and "90%" in nearly[0] and "rank_max 64" in nearly[0]
    assert rank_signs({"q": [64] * 4 + [32], "k": [64] * 4 + [8]}, 8, 64) == []  # 8 of 10
    (alike,) = rank_signs({"q": [8, 8], "k": [8, 64]}, 8, 64)
    assert "every layer of q" in alike
    assert rank_signs({"q": [8], "k": [8, 64]}, 8, 64) == []  # a single layer is always alike
    assert rank_signs({"q": [8, 8]}, 8, 8) == []  # one rank was asked for


# ---- norms

def build_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, dim_feedforward=20, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    for p in model.parameters():  # the layers start as copies of one
        nn.init.normal_(p)
    return model, {"up": [(f"layers.{i}.linear1", 0, 1) for i in range(3)],
                   "down": [(f"layers.{i}.linear2", 0, 1) for i in range(3)]}


def build_mlp():
    """One Linear of three row parts, like a fused qkv, and a whole one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 24), nn.GELU(), nn.Linear(24, 6))
    return model, {"a": [("0", 0, 3)], "b": [("0", 1, 3)], "c": [("0", 2, 3)], "out": [("2", 0, 1)]}


@pytest.mark.parametrize("build", [build_encoder, build_mlp])
def test_weight_norms(build):
    model, families = build()
    norms = weight_norms(model, families)
    for family, layers in families.items():
        for got, (name, part, parts) in zip(norms[family], layers, strict=True):
            weight = model.get_submodule(name).weight.detach()
            rows = len(weight) // parts
            assert type(got) is float
            assert got == pytest.approx(torch.linalg.norm(weight[part * rows:(part + 1) * rows]).item(), rel=1e-6)
    everything = [n for layers in norms.values() for n in layers]
    assert len(set(everything)) == len(everything)  # no two alike: a mixed-up slice or layer would show


@pytest.mark.parametrize("build", [build_encoder, build_mlp])
@pytest.mark.parametrize("alpha", [None, 12.0])
def test_adapter_norms(build, alpha):
    model, families = build()
    before = weight_norms(model, families)
    assert adapter_norms(model, families) == {}  # no adapters, no norms
    ranks = {family: [(1, 2, 3, 5)[(i + j) % 4] for j in range(len(families[family]))]
             for i, family in enumerate(families)}
    add_lora(model, families, ranks, alpha)
    init_adapters(model, 0)
    assert adapter_norms(model, families) == {family: [0.0] * len(ranks[family]) for family in families}  # B = 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B" in name:
                p.normal_()
    norms = adapter_norms(model, families)
    for family, layers in families.items():
        for got, rank, (name, part, _) in zip(norms[family], ranks[family], layers, strict=True):
            module = model.get_submodule(name)
            start = sum(module.ranks[:part])
            s = 1.0 if alpha is None else alpha / rank
            BA = s * module.lora_B[str(part)] @ module.lora_A[start:start + rank]
            assert math.isclose(got, torch.linalg.norm(BA).item(), rel_tol=1e-5)
    assert weight_norms(model, families) == before  # of the base alone, whatever the adapters
