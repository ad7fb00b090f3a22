"""model/optim.py, model/checkpoint.py, and what monitor counts: schedule, decay, optimiser state, saving, FLOPs."""

import copy
import math
import resource

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from lora.inject import add_lora, freeze_base, init_adapters, match_families
from model import checkpoint
from model.optim import build_optimizer, get_lr, get_optimizer_state, set_optimizer_state
from model.variants import LORA_FAMILIES, VARIANTS
from model.vit import VisionTransformer
from monitor.log import phase_table
from monitor.perf import count_flops

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is.*")
KEYS = {"exp_avg", "exp_avg_sq", "step"}


@pytest.fixture(autouse=True)
def small_variant(monkeypatch):
    monkeypatch.setitem(VARIANTS, "small", dict(embed_dim=12, depth=2, num_heads=2, patch_size=4))
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
    """Insertion: the base keeps moments and counts, adapters start fresh. Freeze: they keep theirs, the base's go."""
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


@pytest.mark.parametrize("steps_before", [0, 2])
def test_found_inf_skips_weights_moments_and_count(steps_before):
    """train.py stops before a non-finite step on the device, without a sync: it sets optimizer.found_inf."""
    model = build()
    optimizer = build_optimizer(model, 0.1)
    for i in range(steps_before):
        step(model, optimizer, seed=i)
    before = snapshot(model, optimizer)
    optimizer.found_inf = torch.tensor(1.0)
    step(model, optimizer, seed=7)
    weights, state = snapshot(model, optimizer)
    assert equal(weights, before[0])
    if steps_before:
        assert equal(state, before[1])
    else:
        assert all(not t.any() for s in state.values() for t in s.values())  # made, and empty
    optimizer.found_inf = torch.tensor(0.0)  # control: the same step is taken without it
    step(model, optimizer, seed=7)
    weights, state = snapshot(model, optimizer)
    assert not equal(weights, before[0]) and {s["step"].item() for s in state.values()} == {steps_before + 1}


def test_found_inf_keeps_non_finite_gradients_out():
    model = build()
    optimizer = build_optimizer(model, 0.1)
    step(model, optimizer)
    before = snapshot(model, optimizer)
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert equal(snapshot(model, optimizer), before)


# ---- checkpoints


def trained(**kwargs):
    model = build(**kwargs)
    optimizer = build_optimizer(model, 0.1)
    for i in range(2):
        step(model, optimizer, seed=i)
    return model, optimizer


@pytest.mark.parametrize("kwargs", [dict(), dict(lora=True), dict(lora=True, freeze=True)])
def test_checkpoint_roundtrip_to_the_bit(tmp_path, kwargs):
    model, optimizer = trained(**kwargs)
    path = checkpoint.save(tmp_path, model, optimizer, {"step": 2, "state": {"epoch": 1}}, pinned=False)
    assert path == tmp_path / "checkpoints/step_00000002" == checkpoint.latest(tmp_path)
    assert checkpoint.read_meta(path) == {"step": 2, "state": {"epoch": 1}, "pinned": False}
    other = build(**kwargs)
    other.init_weights(5)
    other_optimizer = build_optimizer(other, 0.1)
    assert not equal(snapshot(other, other_optimizer), snapshot(model, optimizer))
    checkpoint.load(path, other, other_optimizer)
    assert equal(snapshot(other, other_optimizer), snapshot(model, optimizer))
    step(model, optimizer, seed=9)
    step(other, other_optimizer, seed=9)
    assert equal(snapshot(other, other_optimizer), snapshot(model, optimizer))


def test_checkpoint_before_the_adapters_have_stepped(tmp_path):
    """Saved right after the insertion: the adapters have no state yet, and start fresh after loading too."""
    full, optimizer = trained()
    model = build(lora=True)
    fresh = build_optimizer(model, 0.1)
    set_optimizer_state(model, fresh, get_optimizer_state(full, optimizer))
    path = checkpoint.save(tmp_path, model, fresh, {"step": 2}, pinned=True)
    other = build(lora=True)
    other_optimizer = build_optimizer(other, 0.1)
    checkpoint.load(path, other, other_optimizer)
    assert equal(snapshot(other, other_optimizer), snapshot(model, fresh))
    assert not ADAPTERS & set(get_optimizer_state(other, other_optimizer))


def names(tmp_path):
    return sorted(p.name for p in (tmp_path / "checkpoints").iterdir())


def test_latest_moves_and_old_ones_are_pruned(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, 0.1)
    for number in (1, 2, 3, 10, 11):
        checkpoint.save(tmp_path, model, optimizer, {"step": number}, pinned=number in (2, 10))
        assert checkpoint.latest(tmp_path).name == f"step_{number:08d}"
    assert names(tmp_path) == [
        "latest",
        "step_00000002",
        "step_00000010",
        "step_00000011",
    ]  # 1 and 3 went, 2 is pinned
    checkpoint.save(tmp_path, model, optimizer, {"step": 12}, pinned=False)
    checkpoint.save(tmp_path, model, optimizer, {"step": 13}, pinned=False)
    assert names(tmp_path) == ["latest", "step_00000002", "step_00000010", "step_00000012", "step_00000013"]


def test_what_a_killed_save_left_is_ignored_and_removed(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, 0.1)
    checkpoint.save(tmp_path, model, optimizer, {"step": 1}, pinned=False)
    folder = tmp_path / "checkpoints"
    for stale in ("step_00000002.tmp", "step_00000003"):  # killed while writing; before `latest` moved
        (folder / stale).mkdir()
        (folder / stale / "junk").write_text("x")
    assert checkpoint.latest(tmp_path).name == "step_00000001"
    (folder / "step_00000003/meta.json").write_text('{"pinned": false}')
    for number in (2, 3):
        saved = checkpoint.save(tmp_path, model, optimizer, {"step": number}, pinned=False)
        assert not (saved / "junk").exists()
        checkpoint.load(checkpoint.latest(tmp_path), nn.Linear(2, 2), build_optimizer(nn.Linear(2, 2), 0.1))
    assert names(tmp_path) == ["latest", "step_00000002", "step_00000003"]


@pytest.mark.parametrize(
    "other",
    [nn.Linear(2, 3), nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2))],
    ids=["rows", "columns", "name"],
)
def test_missing_or_misshapen_weight_raises(tmp_path, other):
    model = nn.Linear(2, 2)
    path = checkpoint.save(tmp_path, model, build_optimizer(model, 0.1), {"step": 1}, pinned=False)
    with pytest.raises(OSError, match="can't load .*step_00000001"):
        checkpoint.load(path, other, build_optimizer(other, 0.1))


def test_failed_save_leaves_the_one_before(tmp_path, monkeypatch):
    model, optimizer = trained()
    expected = snapshot(model, optimizer)
    checkpoint.save(tmp_path, model, optimizer, {"step": 2}, pinned=False)

    def disk_full(tensors, checkpoint_id, storage_writer):
        checkpoint_id.mkdir()
        (checkpoint_id / "__0_0.distcp").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    step(model, optimizer, seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(dcp, "save", disk_full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(tmp_path, model, optimizer, {"step": 3}, pinned=False)
    assert checkpoint.latest(tmp_path).name == "step_00000002"
    other = build()
    other_optimizer = build_optimizer(other, 0.1)
    checkpoint.load(checkpoint.latest(tmp_path), other, other_optimizer)
    assert equal(snapshot(other, other_optimizer), expected)
    checkpoint.save(tmp_path, model, optimizer, {"step": 3}, pinned=False)  # there is room again
    assert names(tmp_path) == ["latest", "step_00000002", "step_00000003"]


def test_a_full_disk_is_an_oserror(tmp_path):
    """The real thing, by a limit on file sizes: DCP turns what its writer raises into a BaseException of its own."""
    model = nn.Linear(200, 200)
    optimizer = build_optimizer(model, 0.1)
    checkpoint.save(tmp_path, model, optimizer, {"step": 1}, pinned=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # the weight alone has 160,000 bytes
    try:
        with pytest.raises(OSError, match="step_00000002"):
            checkpoint.save(tmp_path, model, optimizer, {"step": 2}, pinned=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.latest(tmp_path).name == "step_00000001"


def test_a_roll_back_by_hand_does_not_lose_the_new_checkpoint(tmp_path):
    model = nn.Linear(2, 2)
    for number in (5, 20, 30):
        checkpoint.save(tmp_path, model, build_optimizer(model, 0.1), {"step": number}, pinned=True)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000005")
    checkpoint.save(tmp_path, model, build_optimizer(model, 0.1), {"step": 6}, pinned=False)
    assert checkpoint.latest(tmp_path).name == "step_00000006" and checkpoint.latest(tmp_path).is_dir()


def test_a_half_deleted_checkpoint_does_not_stop_the_next_saves(tmp_path):
    model = nn.Linear(2, 2)
    half, mine = tmp_path / "checkpoints" / "step_00000001", tmp_path / "checkpoints" / "step_00000001_mine"
    half.mkdir(parents=True)
    mine.mkdir()
    for number in (2, 3, 4):
        checkpoint.save(tmp_path, model, build_optimizer(model, 0.1), {"step": number}, pinned=False)
    assert names(tmp_path) == [
        "latest",
        "step_00000001",
        "step_00000001_mine",
        "step_00000003",
        "step_00000004",
    ]


# ---- monitor's arithmetic


def test_count_flops_of_linears():
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 3)), torch.empty(5, 7)
    first, second = (
        2 * 5 * 7 * 11,
        2 * 5 * 11 * 3,
    )  # a multiplication and an addition for each of N · in · out
    # the first layer: forward and weight gradient (the images need none); the second: also its input's gradient
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
