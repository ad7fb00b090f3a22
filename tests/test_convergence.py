"""monitor/convergence.py and monitor/norms.py: Algorithm 1 by hand, windows, warnings; norms of no ViT."""

import math
import random
import subprocess
import sys
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from errors import UserError
from lora.inject import add_lora, init_adapters
from monitor.convergence import (
    failure_signs,
    find_own_switch,
    find_switch,
    get_changes,
    get_spans,
    get_windows,
    partial_convergence_test,
    percent_change,
    rank_signs,
    switch_due,
)
from monitor.norms import adapter_norms, weight_norms

ROOT = Path(__file__).parent.parent
NAN, INF = float("nan"), float("inf")
STEPS = 10  # per epoch
FLAT = [10.0, 10.0, 10.0]


# tau 0.5, zeta 2.5 throughout
@pytest.mark.parametrize(
    "norms, losses, passes",
    [
        ({"q": [100, 100.4, 100.8]}, [2, 1.98, 1.95], True),  # q +0.4, +0.398; loss −1, −1.515
        ({"q": [200, 201, 202.005]}, FLAT, True),  # +0.5 and 1.005 / 201 = +0.5: equality passes
        ({"q": [200, 201.002, 202]}, FLAT, False),  # +0.501
        ({"q": [200, 199, 198.005]}, FLAT, True),  # −0.5 and −0.995 / 199 = −0.5
        ({"q": [200, 198.998, 198.9]}, FLAT, False),  # −0.501: a shrinking norm moves as well
        ({"q": FLAT}, [40, 41, 42.025], True),  # loss +2.5, +2.5
        ({"q": FLAT}, [40, 39, 38.025], True),  # loss −2.5, −2.5
        ({"q": FLAT}, [40, 38.999, 38.9], False),  # loss −2.5025: fails alone
        ({"q": FLAT, "k": [100, 100.6, 100.6], "v": FLAT}, FLAT, False),  # k alone, only in the earlier pair
        ({"q": FLAT, "k": [100, 100, 100.6], "v": FLAT}, FLAT, False),  # … and only in the later pair
        ({"q": FLAT}, [2, 1.9, 1.9], False),  # loss −5, only in the earlier pair
        ({"q": [100, 100.4, 100.8, 101.2]}, [1] * 4, True),  # first to last +1.2, but pairs are what counts
        ({"q": [0, 0, 0]}, FLAT, True),  # 0 / 0 is no change
        ({"q": [0, 1e-9, 1e-9]}, FLAT, False),  # from 0 to something is an infinite one
    ],
)
def test_algorithm_1_by_hand(norms, losses, passes):
    assert partial_convergence_test(norms, losses, tau=0.5, zeta=2.5) is passes


def test_equality_survives_rounding():
    assert percent_change(1.1, 1.0) > 10  # 10.000000000000009: a bare ≤ would fail on it
    assert partial_convergence_test({"q": [1.0, 1.1]}, [1.0, 1.1], tau=10, zeta=10)
    assert not partial_convergence_test({"q": [1.0, 1.1 + 1e-7]}, [1.0, 1.1], tau=10, zeta=10)


@pytest.mark.parametrize(
    "norms, losses",
    [
        ({"q": [1.0]}, [1.0]),
        ({"q": []}, []),
        ({}, FLAT),
        ({"q": [1.0, 1.0]}, FLAT),
        ({"q": FLAT, "k": FLAT + [1.0]}, FLAT),
    ],
)
def test_too_few_or_uneven_windows(norms, losses):
    with pytest.raises(ValueError, match="at least two windows"):
        partial_convergence_test(norms, losses, 0.5, 2.5)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "norms, losses",
    [
        ({"q": [1, 2, "bad"]}, FLAT),  # the first pair has failed already
        ({"q": [1, 2, 3], "k": ["bad", 1, 1]}, FLAT),  # so has the first family
        ({"q": FLAT}, [1, 2, "bad"]),
        ({"q": FLAT}, ["bad", 1, 1]),
        ({"q": ["bad"] * 3}, [1, 2, 3]),
    ],
)
def test_not_finite_is_an_error_wherever_it_stands(norms, losses, bad):
    put = lambda values: [bad if v == "bad" else v for v in values]
    with pytest.raises(ValueError, match="not finite"):
        partial_convergence_test(
            {family: put(values) for family, values in norms.items()}, put(losses), 0.5, 2.5
        )


def transcribed_algorithm_1(norms, losses, tau, zeta):
    """The paper's pseudo-code, line by line: it fails on a change above a threshold. Without the rounding's
    1e-9.
    """
    for t in range(1, len(losses)):
        for means in norms.values():
            delta_w = (means[t] - means[t - 1]) / means[t - 1] * 100
            if abs(delta_w) > tau:
                return False
        delta_l = (losses[t] - losses[t - 1]) / losses[t - 1] * 100
        if abs(delta_l) > zeta:
            return False
    return True


def test_algorithm_1_as_transcribed_from_the_paper():
    draw, passed = random.Random(0), 0
    for _ in range(2000):
        windows = draw.randint(2, 4)
        norms = {family: [10 + draw.uniform(0, 0.1) for _ in range(windows)] for family in "qk"}
        losses = [2 + draw.uniform(0, 0.1) for _ in range(windows)]
        expected = transcribed_algorithm_1(norms, losses, 0.5, 2.5)
        assert partial_convergence_test(norms, losses, 0.5, 2.5) is expected
        passed += expected
    assert 200 < passed < 1800  # some pass, some do not


# ---- the switch as a function of the log


def settings(k=3, m=3, tau=0.5, zeta=2.5, switch_epoch=None, warmup_epochs=0, families=("q",)):
    """What of Config the switch depends on."""
    return SimpleNamespace(
        num_windows=k,
        window_epochs=m,
        tau=tau,
        zeta=zeta,
        switch_epoch=switch_epoch,
        mode="prelora",
        lr_warmup_steps=warmup_epochs * STEPS,
        target_modules=families,
    )


def log(norms, losses=None):
    """Epoch records: {family: [per layer]} each, or one norm for a family q whose second layer has twice the
    first's.
    """
    losses = losses or [1.0] * len(norms)
    records = []
    for epoch, (norm, loss) in enumerate(zip(norms, losses), 1):
        layers = norm if isinstance(norm, dict) else {"q": [norm, 2 * norm]}
        records.append({"epoch": epoch, "step": epoch * STEPS, "train_loss": loss, "weight_norms": layers})
    return records


def get_due(epochs, cfg):
    """After how many of these epochs the switch is due."""
    due = [n for n in range(1, len(epochs) + 1) if switch_due(epochs[:n], cfg)]
    assert find_switch(epochs, cfg) == (due[0] if due else None)
    return due


@pytest.mark.parametrize("k, m, epochs, expected", [
    (3, 3, 8, []),  # windows not yet full
    (3, 3, 9, [9]),
    (3, 3, 14, [9, 12]),  # tested at a window's end only, although everything is constant
    (2, 1, 4, [2, 3, 4]),
    (2, 4, 16, [8, 12, 16]),
])  # fmt: skip
def test_windows_are_disjoint_and_tested_at_their_end(k, m, epochs, expected):
    assert get_due(log([10.0] * epochs), settings(k, m)) == expected


def test_only_the_last_windows_count():
    # window means (m = 2) 10, 15, 15, 15: the first pair moves by 50 %; k = 2 sees (15, 15) at epoch 6, k = 3
    # at 8
    norms = [10.0, 10.0, 15.0, 15.0, 15.0, 15.0, 15.0, 15.0]
    assert get_due(log(norms), settings(2, 2)) == [6, 8]
    assert get_due(log(norms), settings(3, 2)) == [8]


def test_windows_average_their_epochs():
    # the epochs alternate by 20 %, their means (9 + 11) / 2 don't move
    norms = [9.0, 11.0, 11.0, 9.0]
    assert get_due(log(norms, [1.0, 3.0, 3.0, 1.0]), settings(2, 2, tau=0.0, zeta=0.0)) == [4]
    # loss 2 → 2.2, +10 %
    assert get_due(log(norms, [1.0, 3.0, 3.0, 1.4]), settings(2, 2)) == []


def test_windows_by_hand():
    windows = get_windows(log([1.0, 3.0, 5.0, 6.0, 7.0], [4.0, 5.0, 1.0, 2.0, 9.0]), settings(2, 2))
    # The fifth epoch fills none.
    assert windows == [(0, {"q": [2.0, 4.0]}, 4.5), (2, {"q": [5.5, 11.0]}, 1.5)]
    assert get_windows([], settings()) == [] and not switch_due([], settings())


@pytest.mark.parametrize(
    "warmup, expected", [(0, [4, 6, 8]), (0.5, [6, 8]), (2, [6, 8]), (2.1, [8]), (4, [8]), (5, [])]
)
def test_windows_that_overlap_the_lr_warmup_do_not_count(warmup, expected):
    # m = 2: windows begin at 0, 2, 4, 6 and two that begin at `warmup` or later are needed
    assert get_due(log([10.0] * 8), settings(2, 2, warmup_epochs=warmup)) == expected


def test_changes_per_layer_by_hand():
    # means (7, 7), (10, 40), (12.5, 38)
    layers = [[7, 7], [7, 7], [9, 40], [11, 40], [12, 39], [13, 37]]
    epochs = log([{"q": norms, "fc1": [5.0]} for norms in layers] + [{"q": [99, 99], "fc1": [99.0]}])
    cfg = settings(2, 2, families=("q", "fc1"))
    assert get_changes(epochs[:6], cfg) == {"q": [25.0, -5.0], "fc1": [0.0]}  # 2.5 / 10, −2 / 40
    # A window under way is not looked at.
    assert get_changes(epochs, cfg) == {"q": [25.0, -5.0], "fc1": [0.0]}
    # Of the families asked for.
    assert get_changes(epochs, settings(2, 2, families=("fc1",))) == {"fc1": [0.0]}
    with pytest.raises(ValueError, match="3 epochs hold no two full windows of 2"):
        get_changes(epochs[:3], cfg)


def test_family_mean_is_over_layers():
    # layers 10 → 11 and 30 → 29: both move, their mean does not; Algorithm 1 tests the mean, 2 gets the
    # layers
    epochs = log([{"q": [10, 30]}, {"q": [11, 29]}])
    assert get_due(epochs, settings(2, 1)) == [2]
    assert get_changes(epochs, settings(2, 1))["q"] == pytest.approx([10, -100 / 30])


@pytest.mark.parametrize("switch_epoch, expected", [(4, [4, 5, 6, 7]), (7, [7])])
def test_switch_epoch_overrides_the_test(switch_epoch, expected):
    # it moves by far too much for the test; 7 is no window's end
    moving = log([2.0**e for e in range(7)])
    assert get_due(moving, settings(3, 2, switch_epoch=switch_epoch)) == expected
    # nor does the test pass before it
    assert get_due(log([10.0] * 7), settings(2, 2, switch_epoch=7)) == [7]


@pytest.mark.parametrize("kwargs, message", [
    (dict(k=1, m=3), "num_windows 1"),
    (dict(k=3, m=0), "window_epochs 0"),
    (dict(k=3, m=3, switch_epoch=5), "switch_epoch 5"),
])  # fmt: skip
@pytest.mark.parametrize("function", [get_windows, switch_due, find_switch, get_changes])
def test_settings_without_two_windows_are_rejected(function, kwargs, message):
    with pytest.raises(ValueError, match=message):
        function(log([10.0] * 9), settings(**kwargs))


@pytest.mark.parametrize("norms, loss, message", [
    ({"q": [1.0, NAN], "k": [1.0, 1.0]}, 1.0, r"epoch 3: .*'q'"),
    ({"q": [1.0, 1.0], "k": [INF, 1.0]}, 1.0, r"epoch 3: .*'k'"),
    ({"q": [1.0, 1.0], "k": [1.0, 1.0]}, NAN, "epoch 3: the training loss"),
])  # fmt: skip
@pytest.mark.parametrize("function", [get_windows, switch_due, find_switch, get_changes])
def test_not_finite_epoch_is_an_error(function, norms, loss, message):
    epochs = log([{"q": [1.0, 1.0], "k": [1.0, 1.0]}] * 2 + [norms], [1.0, 1.0, loss])
    with pytest.raises(FloatingPointError, match=message):
        function(epochs, settings(2, 3, families=("q", "k")))


def test_a_log_that_cannot_be_used_is_the_users_error():
    epochs = log([{"q": [1.0], "k": [1.0]}] * 4)
    for function in (get_windows, switch_due, find_switch, get_changes):
        with pytest.raises(UserError, match="epoch 1 of the log has no weight norms of v, fc1"):
            function(epochs, settings(2, 2, families=("q", "v", "fc1")))
        with pytest.raises(UserError, match="it does not hold the epochs 1 to 4"):
            function(epochs[:2] + epochs[3:], settings(2, 2))
        with pytest.raises(UserError, match="it does not hold the epochs 1 to 2"):
            function(epochs[1:], settings(2, 2))


def test_what_comes_after_the_switch_does_not_matter():
    epochs = log([10.0] * 6 + [NAN])
    assert find_switch(epochs, settings(2, 2)) == 4
    with pytest.raises(FloatingPointError):  # the control: before it does
        find_switch(epochs, settings(4, 2))


STRICT, LOOSE = {"tau": 0.1, "zeta": 0.1}, {"tau": 5.0, "zeta": 5.0}


@pytest.mark.parametrize(
    "starts, switch",
    [
        ([(0, 0, STRICT)], None),
        ([(0, 0, LOOSE)], 2),
        ([(0, 0, STRICT), (4, 0, LOOSE)], 4),  # who trains epoch 5 judges the end of epoch 4
        ([(0, 0, STRICT), (4, 3, LOOSE)], 5),  # within epoch 5: that was judged already
        ([(0, 0, LOOSE), (2, 0, STRICT)], None),
        ([(0, 0, STRICT), (4, 0, LOOSE), (4, 0, STRICT)], None),  # the first of these two trained nothing
        ([(0, 0, STRICT), (3, 0, STRICT), (5, 0, LOOSE), (6, 1, STRICT)], 5),
        ([(5, 0, LOOSE)], 5),  # a fork: before it nothing was due
    ],
)
def test_a_run_whose_settings_change_is_judged_by_those_it_had(starts, switch):
    epochs = log([10 * 1.01**n for n in range(8)])
    events = [{"event": "start", "epoch": 0}, *epochs]  # one of another version says nothing
    for epoch, epoch_step, changed in starts:
        events.append(
            {"event": "start", "epoch": epoch, "epoch_step": epoch_step, "switch_settings": changed}
        )
    cfg = vars(settings(2, 1))
    cfg = make_dataclass("Settings", cfg)(**cfg)
    assert find_own_switch(epochs, cfg, get_spans(events)) == switch
    assert find_own_switch(epochs[:1], cfg, get_spans(events)) is None


class OldMonitor:
    """What decided before the log did: it was fed an epoch at a time and remembered the windows. Kept as it
    was.
    """

    def __init__(self, tau, zeta, num_windows, window_epochs, skip_epochs, switch_epoch):
        self.tau, self.zeta, self.num_windows, self.window_epochs = tau, zeta, num_windows, window_epochs
        self.skip_epochs, self.switch_epoch = skip_epochs, switch_epoch
        self.epoch, self.current, self.windows = 0, [], []

    def update(self, norms, loss):
        self.current.append({"norms": norms, "loss": loss})
        self.epoch += 1
        window_full = len(self.current) == self.window_epochs
        if window_full:
            mean = lambda values: math.fsum(values) / len(values)
            layers = {
                f: [mean(epochs) for epochs in zip(*(e["norms"][f] for e in self.current))] for f in norms
            }
            loss = mean([e["loss"] for e in self.current])
            start = self.epoch - self.window_epochs
            self.windows.append({"norms": layers, "loss": loss, "start": start})
            self.windows = self.windows[-self.num_windows :]
            self.current = []
        if self.switch_epoch is not None:
            return self.epoch >= self.switch_epoch
        valid = [w for w in self.windows if w["start"] >= self.skip_epochs]
        if not window_full or len(valid) < self.num_windows:
            return False
        means = {f: [sum(w["norms"][f]) / len(w["norms"][f]) for w in valid] for f in norms}
        return partial_convergence_test(means, [w["loss"] for w in valid], self.tau, self.zeta)

    def changes(self):
        old, new = self.windows[-2:]
        pairs = {f: zip(layers, old["norms"][f]) for f, layers in new["norms"].items()}
        return {f: [percent_change(n, o) for n, o in layers] for f, layers in pairs.items()}


def test_the_log_decides_as_the_monitor_with_a_memory_did():
    """On random logs: due after the same epochs, and the same changes to the bit."""
    draw, due_by_test, never = random.Random(0), 0, 0
    for _ in range(150):
        m, k, families = (
            draw.randint(1, 4),
            draw.randint(2, 4),
            draw.sample(["q", "k", "v", "fc1"], draw.randint(1, 4)),
        )
        switch_epoch = draw.choice([None, None, None, 2 * m, 2 * m + draw.randint(0, 9)])
        cfg = settings(
            k, m, 10 ** draw.uniform(-1.5, 1), 10 ** draw.uniform(-0.5, 1.5), switch_epoch, families=families
        )
        cfg.lr_warmup_steps = draw.choice([0, 5, 10, 23, 40])
        settling = draw.uniform(1, 8)
        norms, losses = [], []
        for epoch in range(24):
            age = 1 - math.exp(-epoch / settling)
            norms.append(
                {
                    f: [4 + i + 3 * age + 0.01 * draw.random() for i in range(3)]
                    for f in ("q", "k", "v", "fc1")
                }
            )
            losses.append(2 - age + 0.02 * draw.random())
        epochs = log(norms, losses)
        old = OldMonitor(cfg.tau, cfg.zeta, k, m, cfg.lr_warmup_steps / STEPS, switch_epoch)
        due = []
        for epoch in epochs:
            if old.update({f: epoch["weight_norms"][f] for f in families}, epoch["train_loss"]):
                due.append(epoch["epoch"])
            if len(old.windows) >= 2:
                assert get_changes(epochs[: epoch["epoch"]], cfg) == old.changes()
        assert get_due(epochs, cfg) == due
        due_by_test += bool(due) and switch_epoch is None
        never += not due
    assert due_by_test > 30 and never > 15


def test_reading_a_log_and_deciding_need_no_heavy_library():
    heavy = "{'torch', 'matplotlib', 'numpy'} & sys.modules.keys()"
    code = f"import sys, monitor.log, monitor.convergence\nprint({heavy})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# ---- signs of a bad switch


def epochs(phases, losses):
    return [
        {"epoch": i, "phase": phase, "train_loss": loss}
        for i, (phase, loss) in enumerate(zip(phases, losses), 1)
    ]


def test_loss_spike_after_the_freeze():
    # +5.5 %
    assert "loss spike" in failure_signs(epochs(["full", "warmup", "lora"], [3.0, 2.0, 2.11]), 2, 2.5)[0]
    assert failure_signs(epochs(["full", "warmup", "lora"], [3.0, 2.0, 2.09]), 2, 2.5) == []  # +4.5 %
    # No freeze here.
    assert failure_signs(epochs(["full", "warmup", "warmup"], [3.0, 2.0, 3.0]), 2, 2.5) == []
    # Not right after it.
    assert failure_signs(epochs(["warmup", "lora", "lora"], [2.0, 2.0, 3.0]), 2, 2.5) == []
    # Frozen without a warmup.
    assert "loss spike" in failure_signs(epochs(["full", "lora"], [2.0, 3.0]), 2, 2.5)[0]
    assert failure_signs(epochs(["lora"], [3.0]), 2, 2.5) == []  # static LoRA: no freeze at all


PHASES = ["full", "warmup"] + ["lora"] * 4


@pytest.mark.parametrize("run, baseline, warns", [
    ([3, 2, 2.0, 2.0, 2.0, 1.98], [3, 2, 1.9, 1.9, 1.8, 1.8], True),  # last window 1.99: −0.5 %, 10.6 % above
    ([3, 2, 2.0, 2.0, 2.0, 1.98], [3, 2, 1.9, 1.9, 1.9, 1.9], False),  # 4.7 % above: near enough
    ([3, 2, 2.3, 2.2, 2.0, 1.98], [3, 2, 1.9, 1.9, 1.8, 1.8], False),  # −11.6 %: still falling, no plateau
    ([3, 2, 2.0, 2.0, 2.0, 1.98], [3, 2, 1.9, 1.9, 1.8], False),  # the baseline ends before
    ([3, 2, 2.0, 2.0, 2.0], [3, 2, 1.9, 1.9, 1.8, 1.8], False),  # not at a window's end
])  # fmt: skip
def test_loss_plateau_above_the_baseline(run, baseline, warns):
    signs = failure_signs(epochs(PHASES, run), 2, 2.5, epochs(["full"] * 6, baseline))
    assert ["plateau above the baseline" in sign for sign in signs] == [True] * warns
    assert failure_signs(epochs(PHASES, run), 2, 2.5) == []  # without a baseline there is nothing to say


def get_rank_signs(ranks, rank_min, rank_max):
    return rank_signs(SimpleNamespace(rank_min=rank_min, rank_max=rank_max, rank_rule="minmax"), ranks)


def test_rank_signs():
    assert get_rank_signs({"q": [8, 64], "k": [16, 32]}, 8, 64) == []
    nearly = get_rank_signs({"q": [64] * 5, "k": [64] * 4 + [8]}, 8, 64)  # 9 of 10
    assert len(nearly) == 1 and "90%" in nearly[0] and "rank_max 64" in nearly[0]
    assert get_rank_signs({"q": [64] * 4 + [32], "k": [64] * 4 + [8]}, 8, 64) == []  # 8 of 10
    (alike,) = get_rank_signs({"q": [8, 8], "k": [8, 64]}, 8, 64)
    assert "every layer of q" in alike
    assert get_rank_signs({"q": [8], "k": [8, 64]}, 8, 64) == []  # a single layer is always alike
    assert get_rank_signs({"q": [8, 8]}, 8, 8) == []  # one rank was asked for
    # 0 is no adapter: neither counted, nor is it known whether a layer without one changed most
    assert get_rank_signs({"q": [0, 8, 8], "k": [0, 8, 64]}, 8, 64) == []
    (at_max,) = get_rank_signs({"q": [0] * 9 + [64] * 9}, 8, 64)
    assert at_max.startswith("100%")


# ---- norms


def build_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, dim_feedforward=20, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    for p in model.parameters():  # the layers start as copies of one
        nn.init.normal_(p)
    return model, {
        "up": [(f"layers.{i}.linear1", 0, 1) for i in range(3)],
        "down": [(f"layers.{i}.linear2", 0, 1) for i in range(3)],
    }


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
            assert got == pytest.approx(
                torch.linalg.norm(weight[part * rows : (part + 1) * rows]).item(), rel=1e-6
            )
    everything = [n for layers in norms.values() for n in layers]
    assert len(set(everything)) == len(everything)  # no two alike: a mixed-up slice or layer would show


@pytest.mark.parametrize("build", [build_encoder, build_mlp])
@pytest.mark.parametrize("alpha", [None, 12.0])
def test_adapter_norms(build, alpha):
    model, families = build()
    before = weight_norms(model, families)
    assert adapter_norms(model, families) == {}  # no adapters, no norms
    ranks = {
        family: [(1, 2, 3, 5)[(i + j) % 4] for j in range(len(families[family]))]
        for i, family in enumerate(families)
    }
    add_lora(model, families, ranks, alpha)
    init_adapters(model, 0)
    # B = 0
    assert adapter_norms(model, families) == {family: [0.0] * len(ranks[family]) for family in families}
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
            BA = s * module.lora_B[str(part)] @ module.lora_A[start : start + rank]
            assert math.isclose(got, torch.linalg.norm(BA).item(), rel_tol=1e-5)
    assert weight_norms(model, families) == before  # of the base alone, whatever the adapters


def test_a_layer_without_an_adapter_has_an_adapters_norm_of_0():
    """Whether its Linear is plain, or has adapters in other row parts; a family without any has no norms."""
    model, families = build_encoder()
    some, none = list(families)[:2]
    layers = len(families[some])
    add_lora(model, families, {some: [0] + [4] * (layers - 1), none: [0] * len(families[none])})
    init_adapters(model, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B" in name:
                p.normal_()
    norms = adapter_norms(model, families)
    assert norms.keys() == {some} and layers > 1
    assert norms[some][0] == 0.0 and min(norms[some][1:]) > 0


def test_mode_full_needs_no_two_windows():
    """Its switch_epoch freezes blocks, for which no ranks are asked."""
    cfg = settings(2, 3, switch_epoch=1)
    with pytest.raises(ValueError, match="switch_epoch 1"):
        switch_due(log([10.0]), cfg)
    cfg.mode = "full"
    assert switch_due(log([10.0]), cfg) and not switch_due([], cfg)
