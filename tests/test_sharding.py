"""bench.py's wire and memory: their bytes against arithmetic on shapes, against processes that really send
and really allocate, and against what they say where the sharding is wrong on purpose."""

import contextlib
import itertools
import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

import train
from benchmarks import fake
from benchmarks.choices import get_ranks
from benchmarks.fake import build_fake, fake_processes, get_black_batch, take_step
from benchmarks.memory import (
    PARTS,
    _FSDPRefType,
    fill_moments,
    largest_fit,
    measure_averages,
    measure_step,
    measure_switch,
)
from benchmarks.wire import WireCounter, count_wire
from launch import distributed
from lora.inject import init_adapters
from model import parallel
from model.optim import build_optimizer
from model.parallel import build_mesh
from model.variants import VARIANTS
from train import Config, build_model

CASES = list(fake.CASES)
TINY = VARIANTS["tiny-debug"] | {"depth": 2}
# in the processes that play those of a run only
with_tiny = mock.patch.dict(VARIANTS, {"tiny/2": TINY, "tiny/3": TINY | {"depth": 3}})


def make_config(model, case, **options):
    dataset = "fashion_mnist" if model.startswith("tiny") else "imagenet"
    options = {"dataset": dataset, "compile": False, **options}
    return Config(model=model, frozen_base=fake.CASES[case][1], **options)


def build_real(cfg, case, choice, shards):
    """On the processes that are really there, with weights."""
    mesh = build_mesh(shards, "cpu", distributed.TIMEOUT)
    model = build_model(cfg, fake.CASES[case][0], get_ranks(choice, cfg.model), "cpu", mesh)
    model.init_weights(0)
    init_adapters(model, 0)
    return model


def build_faked(mode, cfg, case, choice, shards):
    """On process 0 of those that are not there."""
    mesh = build_mesh(shards, "cpu", distributed.TIMEOUT)
    return build_fake(mode, cfg, fake.CASES[case][0], get_ranks(choice, cfg.model), "cpu", mesh)


def repeat_black(cfg, images):
    return itertools.repeat(get_black_batch(cfg, images))


def shard_size(p, shards):
    """Elements of a sharded parameter on one process: a dimension that they don't divide is padded."""
    dim = p.placements[-1].dim
    return p.numel() // p.shape[dim] * math.ceil(p.shape[dim] / shards)


# ------------------------------------------------------------------------------------------------------------
# on the wire


def wire_by_arithmetic(model, shards, copies):
    """Bytes one process sends in a step, from the shapes."""
    gathered = reduced = norms = 0
    shared = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    # of a block's weights, as they are gathered: where W and its adapters both are, in float32
    summed = "blocks.0.attn.qkv.weight" in shared and "blocks.0.attn.qkv.lora_A" in shared
    element = 4 if summed else 2
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):  # others are frozen copies
            size = shard_size(p, shards) * shards
            # a block in forward and again in backward; the root's few in float32 and once
            gathered += size * (2 * element if name.startswith("blocks.") else 4)
            reduced += 4 * size * p.requires_grad
            norms += 4 * p.requires_grad  # a partial norm each
    of_all, world_size = (shards - 1) / shards, shards * copies
    logged = 2 * 8  # loss and hits in float64, summed over all processes
    return {
        "all-gather": gathered * of_all,
        "reduce-scatter": reduced * of_all,
        "all-reduce": 2 * reduced / shards * (copies - 1) / copies
        + 2 * norms * of_all
        + 2 * logged * (world_size - 1) / world_size,
    }


@with_tiny
def fake_wire(model, world_size, asked, by_rows=False):
    """[(counted, by arithmetic)] of each (dp_shard, case, ranks) asked. `by_rows`: sharded along dim 0, as
    FSDP does by itself."""
    fully_shard, out = parallel.fully_shard, []

    def fully_shard_rows(module, shard_placement_fn, **options):
        return fully_shard(module, **options)

    cut = mock.patch.object(parallel, "fully_shard", fully_shard_rows if by_rows else fully_shard)
    with fake_processes(world_size) as mode, cut:
        for shards, case, choice in asked:
            cfg = make_config(model, case)
            built = build_faked(mode, cfg, case, choice, shards)
            with mode:
                counted = count_wire(cfg, built).sent
                out.append((counted, wire_by_arithmetic(built, shards, world_size // shards)))
    assert not dist.is_initialized()
    return out


@with_tiny
def real_wire(model, asked):
    """Counted on models that really are on several processes."""
    distributed.start()
    counts = []
    for shards, case, choice in asked:
        cfg = make_config(model, case)
        built = build_real(cfg, case, choice, shards)
        # of a second step: what is issued once only is no part of it
        take_step(cfg, built, build_optimizer(built, 0), repeat_black(cfg, 1))
        counts.append(count_wire(cfg, built).sent)
    distributed.finish()
    return counts


LARGEST = {16: "all-gather", 4: "reduce-scatter", 1: "all-reduce"}  # dp_shard -> what must be there


def test_wire_is_what_the_shapes_say(on_ranks):
    off_the_wire = (16, "lora, base replicated", "8")
    asked = [(16, "full", "64"), (16, "lora, base sharded", "mixed"), off_the_wire]
    asked += [(4, "lora, base sharded", "64"), (1, "warmup", "64")]
    (rows,) = on_ranks(1, fake_wire, "tiny/2", 16, asked)
    for row, (counted, expected) in zip(asked, rows, strict=True):
        assert counted == pytest.approx(expected), row
        assert counted[LARGEST[row[0]]] > 0, row
    # control: the adapters' own padding is in the count
    (((padded, expected),),) = on_ranks(1, fake_wire, "tiny/2", 16, [off_the_wire], True)
    assert padded == pytest.approx(expected) and sum(padded.values()) > 1.2 * sum(rows[2][0].values())


ALL_BUT_WARMUP = [(2, case, "mixed") for case in CASES if case != "warmup"]


@pytest.mark.parametrize(
    "asked",
    [
        [(2, "lora, base sharded", "mixed"), (1, "warmup", "64")],
        pytest.param(ALL_BUT_WARMUP, marks=pytest.mark.slow),
    ],
)
def test_wire_of_real_processes_is_that_of_fake_ones(on_ranks, asked):
    (faked,) = on_ranks(1, fake_wire, "tiny/2", 2, asked)
    for real in on_ranks(2, real_wire, "tiny/2", asked):
        assert real == [counted for counted, _ in faked]
    for counted, expected in faked:
        assert counted == pytest.approx(expected) and sum(counted.values()) > 0


def send_something_else():
    with fake_processes(4), WireCounter():
        dist.broadcast(torch.zeros(1), 0)


def test_control_an_unforeseen_collective_is_not_passed_over(on_ranks):
    with pytest.raises(AssertionError, match="don't know how many bytes c10d.broadcast_"):
        on_ranks(1, send_something_else)


def step_recorded():
    """What is taken for a step when bytes are counted, and when memory is measured."""
    taken, cfg = [], make_config("tiny-debug", "full")
    record = mock.patch.object(train, "train_step", lambda cfg, model, *args: taken.append(model))
    with fake_processes(2) as mode, record:
        built = build_faked(mode, cfg, "full", "64", 2)
        with mode:
            optimizer = build_optimizer(built, 0)
            counted = count_wire(cfg, built).sent
            measure_step(cfg, built, optimizer, 1)
    return [model is built for model in taken], counted


def test_an_edited_step_is_what_is_counted(on_ranks):
    ((taken, counted),) = on_ranks(1, step_recorded)
    assert taken == [True, True] and not any(counted.values())


@pytest.mark.slow
def test_required_ratios_at_64_ranks(on_ranks):
    lora = "lora, base replicated"
    asked = [(64, "full", "64"), (64, lora, "64"), (64, lora, "mixed"), (64, "lora, base sharded", "64")]
    (rows,) = on_ranks(1, fake_wire, "L/16", 64, asked, timeout=900)
    assert [counted for counted, _ in rows] == [pytest.approx(expected) for _, expected in rows]
    full, uniform, mixed, sharded = (sum(counted.values()) for counted, _ in rows)
    assert uniform <= 0.10 * full and mixed <= 0.05 * full
    assert sharded > 0.5 * full  # control: with the base on the wire neither would hold
    (((padded, _),),) = on_ranks(1, fake_wire, "L/16", 64, asked[2:3], True, timeout=900)
    assert sum(padded.values()) > 0.05 * full  # control: nor with adapters sharded by rows


# ------------------------------------------------------------------------------------------------------------
# memory


def memory_by_arithmetic(model, shards):
    """Bytes of this process's masters, moments and frozen parameters, from the shapes."""
    out = dict.fromkeys(("masters", "moments", "frozen"), 0)
    for p in model.parameters():
        if isinstance(p, DTensor):
            size = shard_size(p, shards)
            out["masters" if p.requires_grad else "frozen"] += 4 * size
            out["moments"] += (8 * size + 4) * p.requires_grad  # two float32, and the count of steps
        else:
            out["frozen"] += 4 * p.numel()
    return out


@with_tiny
def fake_memory(model, world_size, images, asked, options={}, keep_gradients=False):  # noqa: B006, not changed
    """[(measured, by arithmetic)] of each (dp_shard, case) asked."""
    keep = contextlib.nullcontext()
    if keep_gradients:
        keep = mock.patch.object(torch.optim.AdamW, "zero_grad", lambda *args, **kwargs: None)
    out = []
    with fake_processes(world_size) as mode, keep:
        for shards, case in asked:
            cfg = make_config(model, case, **options)
            built = build_faked(mode, cfg, case, "64", shards)
            with mode:
                optimizer = build_optimizer(built, cfg.weight_decay)
                fill_moments(built, optimizer)
                measured = measure_step(cfg, built, optimizer, images)
                out.append((measured, memory_by_arithmetic(built, shards)))
    assert not dist.is_initialized()
    return out


@with_tiny
@torch.backends.mkldnn.flags(enabled=False)  # its copies are inside its operators, where no tracker looks
def real_memory(model, images, cases):
    """The largest sum of a step's allocations less frees, of each case, on real processes, as torch's
    profiler has it from the allocator.

    The least of ten steps: gloo's threads hold what they have sent until they are scheduled, which the peak
    may see or not.
    """
    distributed.start()
    peaks = []
    for case in cases:
        cfg = make_config(model, case, dtype="float32")
        built = build_real(cfg, case, "64", 2)
        optimizer = build_optimizer(built, cfg.weight_decay)
        fill_moments(built, optimizer)

        def batches(cfg=cfg):
            while True:
                yield get_black_batch(cfg, images)

        take_step(cfg, built, optimizer, batches())
        of_steps = []
        for _ in range(10):
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
                take_step(cfg, built, optimizer, batches())
            held = [0]
            for event in prof.profiler.kineto_results.events():
                if event.name() == "[memory]":
                    held.append(held[-1] + event.nbytes())
            of_steps.append(max(held))
        peaks.append(min(of_steps))
    distributed.finish()
    return peaks


@with_tiny
def fake_switch(model, shards, before, after):
    """A switch's peak; by arithmetic its lower limit, the old model with its moments beside the new one, and
    a block's largest weight."""
    cfg, ranks = make_config(model, after), get_ranks("64", model)
    with fake_processes(8) as mode:
        mesh = build_mesh(shards, "cpu", distributed.TIMEOUT)
        old, new = (
            build_fake(mode, cfg, fake.CASES[case][0], ranks, "cpu", mesh) for case in (before, after)
        )
        with mode:
            optimizer = build_optimizer(old, cfg.weight_decay)
            fill_moments(old, optimizer)
        peak = measure_switch(cfg, mode, old, optimizer, fake.CASES[after][0], ranks, mesh)
        old, new = (memory_by_arithmetic(model, shards) for model in (old, new))
    return peak["all"], sum(old.values()) + new["masters"] + new["frozen"], 4 * 4 * TINY["embed_dim"] ** 2


@pytest.mark.parametrize("shards", [1, 8])
@pytest.mark.parametrize("case", CASES)
@with_tiny
def test_averages_are_held_in_shards_by_arithmetic(case, shards):
    """Also those of a frozen base that is whole on each process."""
    cfg = make_config("tiny/2", case)
    with fake_processes(8) as mode:
        built, mesh = (
            build_faked(mode, cfg, case, "8", shards),
            build_mesh(shards, "cpu", distributed.TIMEOUT),
        )
        with mode:
            held = measure_averages(built, mesh)
    expected = 0
    for p in built.parameters():
        rows = math.ceil(p.shape[0] / shards) * (p.numel() // p.shape[0])
        expected += 4 * (shard_size(p, shards) if isinstance(p, DTensor) else rows)
    assert held == expected


def test_memory_is_what_the_shapes_say(on_ranks):
    asked = [(8, case) for case in CASES] + [(1, "full")]
    (rows,) = on_ranks(1, fake_memory, "tiny/2", 8, 256, asked)
    for row, (measured, expected) in zip(asked, rows, strict=True):
        assert {part: measured[part] for part in expected} == expected, row
        assert (expected["frozen"] > 0) == row[1].startswith("lora") and measured["activations"] > 0, row
    # control: gradients that are kept from step to step are in the peak
    (((kept, _),),) = on_ranks(1, fake_memory, "tiny/2", 8, 256, asked[-1:], {}, True)
    assert rows[-1][0]["gradients"] < rows[-1][1]["masters"] <= kept["gradients"]


def test_accumulated_gradients_are_in_the_peak(on_ranks):
    (((once, expected),),) = on_ranks(1, fake_memory, "tiny/2", 8, 256, [(1, "full")])
    options = {"grad_accum_steps": 2, "batch_size": 2 * 8 * 256}
    (((twice, _),),) = on_ranks(1, fake_memory, "tiny/2", 8, 256, [(1, "full")], options)
    held = lambda measured: sum(measured.values())
    assert held(once) + 0.5 * expected["masters"] < held(twice) < held(once) + 1.5 * expected["masters"]


@pytest.mark.parametrize(
    "per_image, fixed, known, fits",
    [
        (7.0, 100.0, 64, 128),
        (7.0, 100.0, 1, 128),
        (300.0, 800.0, 8, 0),
        (100.0, 900.0, 1, 1),
        (1.0, 0.0, 4, 990),
    ],
)
def test_largest_fit(per_image, fixed, known, fits):
    asked = []

    def measure(n):  # bent a little, and in steps, as allocations are
        asked.append(n)
        return fixed + per_image * n + n**0.5 // 3

    assert largest_fit(measure, 1000.0, {known: measure(known)}) == fits
    assert fits + 1 in asked and (fits in asked or not fits)  # both sides
    assert len(set(asked)) == len(asked) < 12


def test_every_byte_is_in_one_part():
    names = [name for part in PARTS.values() for name in part]
    assert sorted(names) == sorted(kind.value for kind in _FSDPRefType)


@pytest.mark.slow
def test_memory_of_real_processes_is_that_of_fake_ones(on_ranks):
    images, cases = 64, ["warmup", "lora, base replicated"]
    asked = [(2, case) for case in cases]
    (faked,) = on_ranks(1, fake_memory, "tiny/2", 2, images, asked, {"dtype": "float32"})
    there_before = ("masters", "moments", "frozen")
    warmup, lora = (
        sum(held for part, held in measured.items() if part not in there_before) for measured, _ in faked
    )
    qkv = 4 * images * 17 * 3 * TINY["embed_dim"]  # of one block
    for real_warmup, real_lora in on_ranks(2, real_memory, "tiny/2", images, cases):
        assert warmup == pytest.approx(real_warmup, rel=0.01)
        # of an operator: dy B and A x of rank 64, or qkv's dy B and a gradient
        inside = 4 * 3 * 64 * (images * 17 + TINY["embed_dim"])
        assert -inside < lora - real_lora < 1.1 * qkv  # as the docstring of benchmarks/fake.py owns


@pytest.mark.slow
def test_activations_are_what_the_blocks_keep(on_ranks):
    """In bfloat16, D features and H heads, for each token: the residual stream twice (4 D each), both norms'
    outputs (2 D each), qkv (6 D), attention's output (2 D), fc1's and gelu's (8 D each); attention's log-sum
    (4 H); both norms' mean and deviation (16)."""

    def activations(model, case, checkpointing="none"):
        options = {"dataset": "imagenet", "activation_checkpointing": checkpointing}
        (((measured, _),),) = on_ranks(1, fake_memory, model, 8, 8, [(8, case)], options)
        return measured["activations"]

    tokens = 8 * ((224 // 7) ** 2 + 1)
    full, checkpointed = activations("tiny/2", "full"), activations("tiny/2", "full", "block")
    kept = tokens * (36 * TINY["embed_dim"] + 4 * TINY["num_heads"] + 16)
    assert activations("tiny/3", "full") - full == pytest.approx(kept, rel=1e-3)
    # nothing is saved in LoRA but the images in bfloat16, which a frozen patch embedding does not keep
    pixels = 2 * 8 * 3 * 224**2
    assert activations("tiny/2", "lora, base replicated") == pytest.approx(full - pixels, rel=5e-3)
    block_input = tokens * 4 * TINY["embed_dim"]  # control: all that another block keeps
    assert activations("tiny/3", "full", "block") - checkpointed == pytest.approx(block_input, rel=1e-2)


@pytest.mark.slow
def test_memory_of_the_paper_s_model(on_ranks):
    """ViT-L/16, 64 images: what plain replication saves, and that full sharding saves nothing."""
    lora = "lora, base replicated"
    asked = [(1, "full"), (1, lora), (64, "full"), (64, lora)]
    (rows,) = on_ranks(1, fake_memory, "L/16", 64, 64, asked, timeout=900)
    for measured, expected in rows:
        assert {part: measured[part] for part in expected} == expected
    tokens = 64 * ((224 // 16) ** 2 + 1)
    kept = tokens * 24 * (36 * 1024 + 4 * 16 + 16)
    summed = 2 * 24 * 12 * 1024**2  # W + B A of all blocks
    for (_, case), (measured, _) in zip(asked, rows, strict=True):
        least = kept + (summed if case == lora else 0)
        assert least < measured["activations"] < least + 0.06 * kept
    full, saving, sharded, saving_sharded = [sum(measured.values()) for measured, _ in rows]
    # of 304 M parameters 12 -> 4 bytes and 2 for W + B A, and 12 for 28 M of adapters
    assert 1.4e9 < full - saving < 1.9e9
    assert saving_sharded > sharded
    # where gradients are kept from micro-batch to micro-batch, 16 -> 4 bytes and again 2
    options = {"grad_accum_steps": 2, "batch_size": 2 * 64 * 64}
    (((full, _), (saving, _)),) = on_ranks(1, fake_memory, "L/16", 64, 64, asked[:2], options, timeout=900)
    assert sum(full.values()) - sum(saving.values()) > 2.3e9


@pytest.mark.parametrize("shards", [8, 1])
@pytest.mark.parametrize("before, after", [("full", "warmup"), ("warmup", "lora, base replicated")])
def test_switch_holds_the_old_and_the_new_and_little_else(on_ranks, shards, before, after):
    ((peak, limit, largest),) = on_ranks(1, fake_switch, "tiny/2", shards, before, after)
    assert limit <= peak <= limit + 3 * largest  # one gathered parameter, or one adapter's whole A and B
