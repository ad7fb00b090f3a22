"""model/optim.py, and what monitor counts: schedule, decay, optimiser state, steps that are skipped,
FLOPs."""

import copy
import math

import pytest
import torch
from torch import nn

from lora.inject import add_lora, freeze_base, init_adapters, match_families
from lora.layers import LoRALinear
from model.optim import (
    apply_update,
    build_optimizer,
    get_lr,
    get_optimizer_state,
    set_optimizer_state,
    split_parameters,
)
from model.variants import LORA_FAMILIES, VARIANTS
from model.vit import VisionTransformer
from monitor.logger import phase_table
from monitor.perf import count_flops

KEYS = {"exp_avg", "exp_avg_sq", "step"}
SMALL = {"embed_dim": 12, "depth": 2, "num_heads": 2, "patch_size": 4}


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices, AdamW for the rest: one optimiser to all who ask, with one state."""

    def __init__(self, model, weight_decay):
        decayed, rest = split_parameters(model)
        matrices = [p for p in decayed if p.ndim == 2]
        others = [p for p in decayed if p.ndim != 2]
        groups = [{"params": others, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.parts = [
            torch.optim.Muon(matrices, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            part.state = self.state

    def step(self):
        for part in self.parts:
            part.step()


def build_other(kind, **options):
    """An optimiser that has build_optimizer's place."""

    def build(model, weight_decay):
        parameters = [p for p in model.parameters() if p.requires_grad]
        return kind(parameters, lr=0.0, weight_decay=weight_decay, **options)

    return build


OPTIMIZERS = {
    "fused AdamW": build_optimizer,
    "AdamW": build_other(torch.optim.AdamW),
    "SGD": build_other(torch.optim.SGD, momentum=0.9),
    "RMSprop": build_other(torch.optim.RMSprop, momentum=0.9),
    "Muon and AdamW": MuonAndAdamW,
}


@pytest.fixture(autouse=True)
def small_variant(monkeypatch):
    monkeypatch.setitem(VARIANTS, "small", SMALL)
    torch.manual_seed(0)


def build(lora=False, freeze=False):
    model = VisionTransformer("small", 8, 5)
    if lora:
        ranks = {"q": [2, 4], "v": [1, 2], "fc1": [4, 4]}
        add_lora(model, match_families(model, LORA_FAMILIES, tuple(ranks)), ranks)
    model.init_weights(0)
    init_adapters(model, 0)
    nn.init.normal_(model.head.weight)  # zero, it would stop every other gradient at first
    return freeze_base(model) if freeze else model


def step(model, optimizer, seed=0, lr=1e-2):
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def snapshot(model, optimizer):
    return copy.deepcopy([model.state_dict(), get_optimizer_state(model, optimizer)])


def equal(a, b):
    """Bit equality of nested dicts and lists of tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, list) else torch.equal(a, b)


# ---- learning rate


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.2),  # 2 · 1/10
        (4, 1.0),
        (9, 2.0),  # the warmup's middle and its last step
        (10, 2.0),  # the cosine starts at the peak
        (35, 2 * 0.5 * (1 + math.sqrt(0.5))),  # a quarter of the cosine's 100 steps: cos 45°
        (60, 1.0),
        (110, 0.0),
        (500, 0.0),  # midpoint, end, beyond it
        (109, 2 * 0.5 * (1 + math.cos(math.pi * 99 / 100))),  # last step taken: 4.9e-4, not yet 0
    ],
)
def test_get_lr(step, expected):
    assert get_lr(step, peak=2.0, warmup_steps=10, total_steps=110) == pytest.approx(expected, abs=1e-12)


def test_get_lr_rises_again_after_the_freeze():
    cosine = [get_lr(s, 2.0, 10, 110) for s in range(110)]
    again = [get_lr(s, 2.0, 10, 110, frozen_at=60, rewarm_steps=4) for s in range(110)]
    assert again[60:64] == pytest.approx([cosine[60 + i] * (i + 1) / 4 for i in range(4)], abs=1e-12)
    assert again[:60] + again[64:] == cosine[:60] + cosine[64:]
    assert [get_lr(s, 2.0, 10, 110, frozen_at=60) for s in range(110)] == cosine  # rewarm_steps 0: not at all


def test_get_lr_without_warmup_and_all_warmup():
    assert get_lr(0, 1.0, 0, 10) == 1.0 and get_lr(5, 1.0, 0, 10) == pytest.approx(0.5)
    assert [get_lr(s, 1.0, 4, 4) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.2),  # the warmup
        (9, 2.0),
        (10, 2.0),  # stable, up to the last fifth of 110 steps
        (88, 2.0),
        (99, 1.0),  # half of 22 steps on
        (109, 2 / 22),
        (110, 0.0),
        (500, 0.0),
    ],
)
def test_get_lr_wsd(step, expected):
    lr = get_lr(step, 2.0, 10, 110, "wsd", 0.2)
    assert lr == pytest.approx(expected, abs=1e-12)


def test_get_lr_wsd_without_a_decay_and_all_decay():
    assert [get_lr(s, 1.0, 0, 10, "wsd", 0.0) for s in (0, 9, 10)] == [1.0, 1.0, 0.0]
    assert [get_lr(s, 1.0, 0, 4, "wsd", 1.0) for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_get_lr_of_the_lora_phase(schedule, factor):
    """From k × the rate at the freeze linearly to 0 over what is left; before it nothing is changed."""
    plain = [get_lr(s, 2.0, 10, 110, schedule) for s in range(111)]
    own = [get_lr(s, 2.0, 10, 110, schedule, frozen_at=60, lora_factor=factor) for s in range(111)]
    assert own[60:] == pytest.approx([factor * plain[60] * (110 - s) / 50 for s in range(60, 111)], abs=1e-12)
    full = [get_lr(s, 2.0, 10, 110, schedule, frozen_at=None, lora_factor=factor) for s in range(60)]
    assert full == plain[:60] and own[60] == pytest.approx(factor * plain[60])
    rising = [get_lr(60 + s, 2.0, 10, 110, schedule, 0.2, 60, 4, factor) for s in range(5)]
    assert rising == pytest.approx([own[60 + s] * min((s + 1) / 4, 1) for s in range(5)])


# ---- weight decay and optimiser state


def decay_groups(model):
    names = {p: name for name, p in model.named_parameters()}
    groups = build_optimizer(model, 0.1).param_groups
    found = {d: {names[p] for g in groups if g["weight_decay"] == d for p in g["params"]} for d in (0.1, 0.0)}
    assert sum(len(g["params"]) for g in groups) == len(found[0.1]) + len(found[0.0])  # none twice
    return found[0.1], found[0.0]


LINEARS = [f"blocks.{i}.{name}" for i in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
LINEARS += ["head", "patch_embed.proj"]
NORMS = [f"blocks.{i}.norm{j}" for i in range(2) for j in (1, 2)] + ["norm"]
ADAPTERS = {
    f"blocks.{i}.{name}"
    for i in range(2)
    for name in (
        "attn.qkv.lora_A",
        "attn.qkv.lora_B.0",
        "attn.qkv.lora_B.2",
        "mlp.fc1.lora_A",
        "mlp.fc1.lora_B.0",
    )
}
UNDECAYED = {f"{name}.bias" for name in LINEARS + NORMS} | {f"{name}.weight" for name in NORMS}
UNDECAYED |= {"pos_embed", "cls_token"}


def test_weight_decay_groups():
    decayed = {f"{name}.weight" for name in LINEARS}
    assert decay_groups(build()) == (decayed, UNDECAYED)
    assert decay_groups(build(lora=True)) == (decayed | ADAPTERS, UNDECAYED)
    assert decay_groups(build(lora=True, freeze=True)) == (ADAPTERS, set())


def test_weight_decay_is_multiplied_by_lr():
    model = nn.Linear(2, 2)
    optimizer, before = build_optimizer(model, 0.1), copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.5
    optimizer.step()
    torch.testing.assert_close(model.weight, before.weight * (1 - 0.5 * 0.1))
    assert torch.equal(model.bias, before.bias)


def test_optimizer_state_moves_by_name():
    """Insertion: the base keeps moments and counts, adapters start fresh. Freeze: they keep theirs, the
    base's go."""
    full, warm, lora = build(), build(lora=True), build(lora=True, freeze=True)
    optimizer = build_optimizer(full, 0.1)
    step(full, optimizer)
    state = get_optimizer_state(full, optimizer)
    assert set(state) == {name for name, _ in full.named_parameters()} and all(
        set(s) == KEYS for s in state.values()
    )

    warm_optimizer = build_optimizer(warm, 0.1)
    set_optimizer_state(warm, warm_optimizer, state)
    moved = get_optimizer_state(warm, warm_optimizer)
    assert equal(moved, state)  # all of the base, nothing for the adapters
    assert moved["head.weight"]["exp_avg"] is state["head.weight"]["exp_avg"]  # handed over, not copied
    step(warm, warm_optimizer)
    moved = get_optimizer_state(warm, warm_optimizer)
    assert {name: s["step"].item() for name, s in moved.items()} == {
        name: 1 if name in ADAPTERS else 2 for name, _ in warm.named_parameters()
    }

    lora_optimizer = build_optimizer(lora, 0.1)
    set_optimizer_state(lora, lora_optimizer, moved)
    kept = get_optimizer_state(lora, lora_optimizer)
    assert set(kept) == ADAPTERS and equal(kept, {name: moved[name] for name in ADAPTERS})
    assert len(lora_optimizer.state) == len(ADAPTERS)  # really dropped, not just unseen by name


def test_an_adapter_is_what_its_module_says():
    """By its method, whatever its parameters are called; biases are not decayed, wherever they are."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Parameter(torch.zeros(2, 3)), nn.ParameterDict({"0": torch.zeros(3, 2)})
            self.gate, self.other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3, 3))

        def adapter_parameters(self):
            return {name: p for name, p in self.named_parameters() if name != "other"}

    model = nn.Sequential(Adapted(), nn.Linear(3, 3))
    decayed, rest = split_parameters(model)
    assert [id(p) for p in decayed] == [id(p) for p in (model[0].down, model[0].up["0"], model[1].weight)]
    assert [id(p) for p in rest] == [id(p) for p in (model[0].gate, model[0].other, model[1].bias)]
    del Adapted.adapter_parameters  # control
    assert [id(p) for p in split_parameters(model)[0]] == [id(model[1].weight)]


# ---- steps that are skipped


def fill_gradients(model, seed, value=None):
    draw = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw)
        if value is not None:
            p.grad.fill_(value)


def tensors_of(state):
    return [t for per_parameter in state.values() for t in per_parameter.values() if t is not None]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("gradient", [None, math.nan, math.inf])
def test_a_skipped_step_leaves_weights_moments_and_counts(kind, steps_before, gradient):
    model = build(lora=True)
    optimizer = OPTIMIZERS[kind](model, 0.1)
    for i in range(steps_before):
        fill_gradients(model, i)
        apply_update(optimizer, 1e-2, torch.tensor(False))
    weights, state = snapshot(model, optimizer)
    fill_gradients(model, 7, gradient)
    apply_update(optimizer, 1e-2, torch.tensor(True))
    assert all(p.grad is None for p in model.parameters())
    after, state_after = snapshot(model, optimizer)
    assert equal(after, weights)
    if steps_before:
        assert tensors_of(state) and equal(state_after, state)
    else:
        assert not any(t.any() for t in tensors_of(state_after))  # none, or made and empty
    assert not hasattr(optimizer, "found_inf")  # a step that somebody else takes is not skipped


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("skipped_first", [False, True])
def test_a_step_that_is_not_skipped_is_torchs_own(kind, skipped_first):
    model, plain = build(lora=True), build(lora=True)
    plain.load_state_dict(model.state_dict())
    optimizer, own = OPTIMIZERS[kind](model, 0.1), OPTIMIZERS[kind](plain, 0.1)
    if skipped_first:
        fill_gradients(model, 7, math.nan)
        apply_update(optimizer, 1e-2, torch.tensor(True))
    for i, lr in enumerate((1e-2, 3e-3)):
        fill_gradients(model, i)
        fill_gradients(plain, i)
        before = copy.deepcopy(plain.state_dict())
        apply_update(optimizer, lr, torch.tensor(False))
        for group in own.param_groups:
            group["lr"] = lr
        own.step()
        assert equal(snapshot(model, optimizer), snapshot(plain, own)) and not equal(
            model.state_dict(), before
        )


def test_control_a_step_into_nan_is_seen():
    """Without a look at `skip` RMSprop and Muon step into NaN, and torch's fused AdamW alone skips by
    itself."""
    for kind, skips in (("fused AdamW", True), ("RMSprop", False), ("Muon and AdamW", False)):
        model = build()
        optimizer = OPTIMIZERS[kind](model, 0.1)
        fill_gradients(model, 7, math.nan)
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
        assert model.head.weight.isfinite().all() == skips, kind


# ---- monitor's arithmetic


def test_count_flops_of_linears():
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 3)), torch.empty(5, 7)
    # Of one of the five: a multiplication and an addition for each of in · out.
    first, second = 2 * 7 * 11, 2 * 11 * 3
    # the first layer: forward and weight gradient (the images need none); the second: also its input's
    # gradient
    assert count_flops(model, x) == 2 * first + 3 * second
    model[1].weight.requires_grad = False
    assert count_flops(model, x) == 2 * first + 2 * second
    model[0].requires_grad_(False)
    assert count_flops(model, x) == first + second  # only the last bias learns, and that is no matrix product


def test_count_flops_frozen_base_and_attention():
    with torch.device("meta"):
        models = [build_meta(lora, freeze) for lora, freeze in [(False, False), (True, False), (True, True)]]
        counts = [count_flops(model, torch.empty(1, 3, 8, 8)) for model in models]
    assert counts[2] < counts[0] < counts[1]


def test_what_is_done_once_for_all_images_is_shared_by_them():
    """W + B A of one Linear, and in its backward B' dW and dW A'."""
    with torch.device("meta"):
        model = nn.Sequential(LoRALinear.from_linear(nn.Linear(7, 11), [3]))
        one, four = (count_flops(model, torch.empty(images, 7)) for images in (1, 4))
    assert four == 2 * 2 * 7 * 11 + 3 * (2 * 7 * 11 * 3) // 4 < one


def build_meta(lora, freeze):
    model = VisionTransformer("small", 8, 5)
    if lora:
        add_lora(model, match_families(model, LORA_FAMILIES, ("q", "fc1")), {"q": [1, 1], "fc1": [1, 1]})
    return freeze_base(model) if freeze else model


def test_phase_table():
    def record(phase, seconds, trainable, gib, top1):
        return {
            "phase": phase,
            "epoch_seconds": seconds,
            "images_per_second": 12000 / seconds,
            "trainable_params": trainable,
            "peak_memory_bytes": int(gib * 2**30),
            "val_top1": top1,
        }

    text = phase_table(
        [
            record("full", 10, 1_234_567, 1.5, 70),
            record("full", 8, 1_234_567, 1.25, 75.126),
            record("full", 30, 1_234_567, 1, 80),
            record("lora", 6, 99, 0.5, 81),
        ]
    )
    # medians of 8, 10, 30 seconds and 1500, 1200, 400 images/s; the peak of the phase; the last top-1
    assert text.splitlines() == [
        "phase  epochs  s/epoch  images/s  trainable  peak memory    top-1",
        " full       3     10.0     1,200  1,234,567     1.50 GiB  80.00 %",
        " lora       1      6.0     2,000         99     0.50 GiB  81.00 %",
    ]
