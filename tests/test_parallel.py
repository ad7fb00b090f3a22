"""Several processes, with gloo on the CPU: one's numbers, the same weights on all, graphs, mesh, switch."""

import contextlib
import json
import os
import time
import zlib
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import train
from errors import UserError
from launch import distributed
from lora import ranks
from model import checkpoint, parallel
from model.parallel import build_mesh, clip_gradients, materialise, parallelize, sync_gradients, to_plain
from model.variants import LORA_FAMILIES, VARIANTS
from model.vit import VisionTransformer

# 4 steps an epoch, 36 in all: full 1-3, warmup 4-6, lora 7-9. Nothing random that differs between processes.
PLAIN = (
    "--loader folder --num_workers 0 --train_samples 64 --epochs 9 --batch_size 16 --lr 1e-3 "
    "--lr_warmup_steps 4 --dtype float32 --compile False --tau 90 --zeta 90 --num_windows 2 "
    "--window_epochs 1 --lora_warmup_epochs 3 --rank_min 4 --rank_max 32"
).split()


@contextmanager
def watching():
    """Record, while train.main runs: every step's loss, and the whole weights at every phase's end."""
    seen = {"losses": [], "weights": {}}
    train_step, save = train.train_step, checkpoint.save

    def stepping(cfg, model, optimizer, batches, step, lr, failed):
        in_dry_run = failed.item()  # compilation's step on black images is none of the run's
        result = train_step(cfg, model, optimizer, batches, step, lr, failed)
        if not in_dry_run:
            seen["losses"].append(result[0].item())
        return result

    def saving(run_dir, model, optimizer, meta, pinned, averages):
        if pinned or meta["state"]["epoch"] == 9:
            seen["weights"][meta["state"]["phase"]] = {
                name: to_plain(t).cpu().clone() for name, t in model.state_dict().items()
            }
        return save(run_dir, model, optimizer, meta, pinned, averages)

    with (
        mock.patch.object(train, "train_step", stepping),
        mock.patch.object(checkpoint, "save", saving),
    ):
        yield seen


def run_main(argv, parallelize=None):
    """train.py on this process, with two blocks: what `watching` saw, and the epochs' records."""
    two_blocks = mock.patch.dict(VARIANTS["tiny-debug"], depth=2)
    with two_blocks, watching() as seen, contextlib.ExitStack() as stack:
        if parallelize:  # the control: moments of what is no longer sharded can't be kept
            stack.enter_context(mock.patch.object(parallel, "parallelize", parallelize))
            stack.enter_context(mock.patch.object(train, "set_optimizer_state", lambda *args: None))
        seen["status"] = train.main([str(a) for a in argv])
    assert seen["status"] == 0
    metrics = Path(argv[argv.index("--run_dir") + 1], "metrics.jsonl").read_text().splitlines()
    seen["epochs"] = [e for e in map(json.loads, metrics) if e["event"] == "epoch"]
    return seen


@pytest.fixture(scope="module")
def go(on_ranks, small, tmp_path_factory):
    """go(ranks, "--flag value …") -> what each rank saw of a run of all phases, in go.run_dir."""

    def go(ranks, flags="", parallelize=None, **environment):
        go.run_dir = tmp_path_factory.mktemp("parallel") / "run"
        return on_ranks(
            ranks,
            run_main,
            [*PLAIN, "--data_dir", small, "--run_dir", go.run_dir, *flags.split()],
            parallelize,
            **environment,
        )

    return go


@pytest.fixture(scope="module")
def one_rank(go):
    return go(1)[0]


def assert_same_numbers(seen, reference, rel=1e-5):
    assert len(reference["losses"]) == 36 and list(reference["weights"]) == ["full", "warmup", "lora"]
    for rank in seen:
        assert rank["losses"] == pytest.approx(reference["losses"], rel=rel)
        for phase, weights in reference["weights"].items():
            mine = rank["weights"][phase]
            assert mine.keys() == weights.keys()
            assert [
                n for n in weights if not torch.equal(mine[n], seen[0]["weights"][phase][n])
            ] == []  # to the bit on all ranks
            assert [n for n in weights if not torch.allclose(mine[n], weights[n], atol=1e-4)] == []
    for mine, theirs in zip(seen[0]["epochs"], reference["epochs"], strict=True):
        assert (
            mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=rel)
            and mine["trainable_params"] == theirs["trainable_params"]
        )
        for norms in ("weight_norms", "adapter_norms"):
            assert mine[norms] == {
                family: pytest.approx(layers, rel=1e-3) for family, layers in theirs[norms].items()
            }


slow = pytest.mark.slow
LOWEST = "--freeze_blocks 1"
CONTROL = f"{LOWEST} --mode full --switch_epoch 4"


@pytest.fixture(scope="module")
def frozen_on_one(go):
    """What one rank sees with the lower of two blocks frozen: of PreLoRA, and of its control."""
    return {flags: go(1, flags)[0] for flags in (LOWEST, CONTROL)}


@pytest.mark.parametrize("flags", [LOWEST, CONTROL])
@pytest.mark.parametrize("how", [
    "",
    "--frozen_base shard",
    "--grad_accum_steps 2 --activation_checkpointing block --reshard_after_forward False",
    pytest.param("--dp_shard 1", marks=slow),
    pytest.param("--frozen_base shard --reshard_after_forward False", marks=slow),
])  # fmt: skip
def test_the_lower_block_frozen_on_two_ranks(go, frozen_on_one, flags, how):
    reference = frozen_on_one[flags]
    seen = go(2, f"{flags} {how}")
    assert [e["frozen_blocks"] for e in reference["epochs"]].count(1) == (5 if flags is CONTROL else 3)
    for rank in seen:
        assert rank["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        for phase, weights in reference["weights"].items():
            mine = rank["weights"][phase]
            assert mine.keys() == weights.keys()
            assert [n for n in weights if not torch.equal(mine[n], seen[0]["weights"][phase][n])] == []
            assert [n for n in weights if not torch.allclose(mine[n], weights[n], atol=1e-4)] == []
    for mine, theirs in zip(seen[0]["epochs"], reference["epochs"], strict=True):
        assert mine["trainable_params"] == theirs["trainable_params"]
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-5)
        for family, layers in theirs["adapter_norms"].items():
            assert mine["adapter_norms"][family] == pytest.approx(layers, rel=1e-3)


@pytest.mark.parametrize(
    "ranks, flags, per_node",
    [
        (2, "", 2),
        pytest.param(4, "", 2, marks=slow),
        (2, "--frozen_base shard --reshard_after_forward False", 2),
        (2, "--grad_accum_steps 2 --activation_checkpointing block --lora_trainable adapters+rest", 2),
        pytest.param(4, "", 4, marks=slow),
        pytest.param(4, "--dp_shard 1", 4, marks=slow),
    ],
)
def test_same_numbers_on_any_number_of_ranks(go, one_rank, ranks, flags, per_node):
    reference = go(1, "--lora_trainable adapters+rest")[0] if "adapters+rest" in flags else one_rank
    assert_same_numbers(go(ranks, flags, LOCAL_WORLD_SIZE=per_node), reference)
    log = (go.run_dir / "metrics.jsonl").read_text().splitlines()
    mesh = next(record["mesh"] for record in map(json.loads, log) if record["event"] == "start")
    shards = 1 if "dp_shard" in flags else per_node  # by default a node
    assert mesh == (
        {"dp_shard": ranks} if shards == ranks else {"dp_replicate": ranks // shards, "dp_shard": shards}
    )


def unreduced(model, *args, parallelize=parallelize):
    """In the LoRA phase the adapters, too, are left out of FSDP, as if frozen: nobody averages them."""
    adapters = [p for p in model.parameters() if p.requires_grad and not model.head.weight.requires_grad]
    for p in adapters:
        p.requires_grad = False
    parallelize(model, *args)
    for p in adapters:
        p.requires_grad = True
    return model


def test_control_gradients_that_are_not_averaged_are_caught(go, one_rank):
    seen = go(2, parallelize=unreduced)
    with pytest.raises(AssertionError):
        assert_same_numbers(seen, one_rank)
    for phase in ("full", "warmup"):
        assert all(torch.equal(a, b) for a, b in zip(*(rank["weights"][phase].values() for rank in seen)))
    different = {
        n for n, t in seen[0]["weights"]["lora"].items() if not torch.equal(t, seen[1]["weights"]["lora"][n])
    }
    assert different == {n for n in seen[0]["weights"]["lora"] if ".lora_" in n}


@slow
def test_bfloat16(go):
    """On one rank by autocast, on several with blocks gathered in bfloat16: the same, to rounding."""
    flags = "--train_samples 32 --lr_warmup_steps 2"  # bfloat16 is slow on a CPU
    one, two = go(1, f"{flags} --dtype bfloat16")[0], go(2, f"{flags} --dtype bfloat16")
    assert len(one["losses"]) == 18 and two[0]["losses"] == two[1]["losses"] == pytest.approx(
        one["losses"], rel=3e-3
    )
    exact = go(1, flags)[0]["losses"]
    assert one["losses"] != exact == pytest.approx(one["losses"], rel=3e-3)
    assert {t.dtype for t in two[0]["weights"]["lora"].values()} == {torch.float32}  # the frozen base's, too


@slow
@pytest.mark.parametrize("flags", [LOWEST, CONTROL])
def test_bfloat16_with_the_lower_block_frozen(go, flags):
    flags += " --train_samples 32 --lr_warmup_steps 2 --dtype bfloat16"
    one, two = go(1, flags)[0], go(2, flags)
    assert two[0]["losses"] == two[1]["losses"] == pytest.approx(one["losses"], rel=3e-3)


# ---- graphs


def run_compiled(argv, depth, backend, dynamic):
    """The graphs of each phase, and those of the whole run, with random ranks."""
    compile_block, rng = torch.nn.Module.compile, torch.Generator().manual_seed(0)
    draw = lambda changes, low, high: {
        f: [4 << int(torch.randint(4, (), generator=rng)) for _ in layers] for f, layers in changes.items()
    }
    with (
        mock.patch.dict(VARIANTS, {"tiny-debug": dict(VARIANTS["tiny-debug"], depth=depth)}),
        mock.patch.object(ranks, "assign_ranks", draw),
        mock.patch.object(
            torch.nn.Module, "compile", lambda self, **kw: compile_block(self, **kw, backend=backend)
        ),
        mock.patch.object(
            train, "mark_ranks_dynamic", train.mark_ranks_dynamic if dynamic else lambda block: None
        ),
    ):
        assert train.main([str(a) for a in argv]) == 0
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def count_graphs(on_ranks, small, run_dir, depth, backend, dynamic=True, flags=""):
    argv = [
        *PLAIN,
        "--data_dir",
        small,
        "--run_dir",
        run_dir,
        "--compile",
        True,
        "--dropout",
        0.1,
        "--drop_path",
        0.1,
        "--train_samples",
        16,
        "--lr_warmup_steps",
        1,
        *flags.split(),
    ]
    totals = on_ranks(2, run_compiled, argv, depth, backend, dynamic)
    phases = [
        e
        for e in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        if e["event"] in ("start", "switch")
    ]
    return [p["graphs_compiled"] for p in phases], [p["eval_graphs_compiled"] for p in phases], totals


@pytest.mark.parametrize(
    "depth, backend, flags",
    [
        pytest.param(4, "eager", "", marks=slow),
        pytest.param(4, "inductor", "", marks=slow),
        pytest.param(12, "eager", "", marks=slow),
        pytest.param(4, "eager", "--activation_checkpointing block", marks=slow),
    ],
)
def test_four_training_graphs_in_all(on_ranks, small, tmp_path, depth, backend, flags):
    training, evaluation, totals = count_graphs(
        on_ranks, small, tmp_path / "run", depth, backend, flags=flags
    )
    assert training == [1, 1, 2] and evaluation == [1, 1, 1]
    assert totals == [7, 7]  # none later, in the epochs, and none outside the blocks


@slow
@pytest.mark.parametrize("flags", [
    "--freeze_blocks 2",
    "--freeze_blocks 2 --frozen_base shard --lora_trainable adapters+rest",
    "--freeze_blocks 2 --mode full --switch_epoch 4",
    "--freeze_blocks 2 --mode full --switch_epoch 4 --frozen_base shard",
])  # fmt: skip
def test_one_training_graph_more_with_frozen_blocks(on_ranks, small, tmp_path, flags):
    training, evaluation, totals = count_graphs(on_ranks, small, tmp_path / "run", 4, "eager", flags=flags)
    assert training[0] == 1 and max(training[1:]) <= 3
    assert totals == [sum(training) + sum(evaluation)] * 2  # none later


@slow
def test_control_static_ranks_need_more_graphs(on_ranks, small, tmp_path):
    training, _, _ = count_graphs(on_ranks, small, tmp_path / "run", 3, "eager", dynamic=False)
    assert sum(training) > 4


# ---- from the meta device


@contextmanager
def full_of_garbage():
    """What to_empty leaves, made to show."""
    to_empty = nn.Module.to_empty

    def filling(model, *, device, recurse=True):
        to_empty(model, device=device, recurse=recurse)
        with torch.no_grad():
            for t in [*model.parameters(), *model.buffers()]:
                t.fill_(float("nan") if t.is_floating_point() else 99)
        return model

    with mock.patch.object(nn.Module, "to_empty", filling):
        yield


class Table(nn.Module):
    """A buffer that no state dict has, with a child that has one as well."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.empty(3), persistent=False)
        self.register_buffer("nothing", None)
        self.inner = nn.BatchNorm1d(3)
        self.init_buffers()

    def init_buffers(self):
        self.table.copy_(torch.arange(3))

    def forward(self, x):
        return self.inner(x) + self.table


class ScaledNorm(nn.BatchNorm2d):
    """A norm with a buffer besides its statistics."""

    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("scale", torch.ones(()))


class SetScaledNorm(ScaledNorm):
    def init_buffers(self):
        self.scale.fill_(1)


def build_conv_net(norm):
    """(B, 3, 8, 8) -> (B, 3)."""
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.BatchNorm2d(4, track_running_stats=False))
    body = nn.Sequential(nn.Conv2d(4, 3, 3), nn.InstanceNorm2d(3, track_running_stats=True), nn.Flatten(1))
    return nn.Sequential(stem, body, nn.Linear(48, 3), Table())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, SetScaledNorm])
def test_every_buffer_has_its_value_on_leaving_the_meta_device(norm):
    direct = build_conv_net(norm)
    with torch.device("meta"):
        on_meta = build_conv_net(norm)
    with full_of_garbage():
        model = materialise(on_meta, "cpu")
    expected = dict(direct.named_buffers())
    assert {
        "0.1.running_var",
        "1.1.running_mean",
        "3.table",
        "3.inner.num_batches_tracked",
    } <= expected.keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected.pop(name)), name
    assert not expected
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.1)
    if norm is not nn.SyncBatchNorm:  # whose forward is for GPUs
        assert model.eval()(torch.zeros(2, 3, 8, 8)).isfinite().all()


def test_control_to_empty_leaves_garbage_in_buffers():
    with full_of_garbage():
        model = nn.Sequential(nn.BatchNorm2d(2), Table()).to("meta").to_empty(device="cpu")
    assert (
        model[0].running_mean.isnan().all()
        and model[0].num_batches_tracked == 99
        and model[1].table.isnan().all()
    )


def test_a_module_that_says_nothing_of_its_buffers_is_named():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("sines", torch.zeros(3), persistent=False)

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Positions()))
    with pytest.raises(
        TypeError, match=r"^1\.0, a Positions, has buffers .*: sines\. Give Positions a method"
    ):
        materialise(model, "cpu")
    with pytest.raises(TypeError, match="^the model, a Positions, has buffers"):
        materialise(model[1][0], "cpu")
    with pytest.raises(TypeError, match="^1, a ScaledNorm, has buffers .*: scale"):
        materialise(nn.Sequential(nn.Linear(2, 2), ScaledNorm(2)).to("meta"), "cpu")


# ---- one step


def clip_and_sync(shards):
    """(norm, clipped gradients, whether there are any after each backward, gradients), by us and by torch."""
    dist.init_process_group("gloo")
    mesh = build_mesh(shards, "cpu", timedelta(minutes=1))
    seen = []
    for clip in (
        lambda model, most: clip_gradients(torch.optim.SGD(model.parameters()), most),
        lambda model, most: to_plain(nn.utils.clip_grad_norm_(list(model.parameters()), most)),
    ):
        with torch.device("meta"):
            model = VisionTransformer("tiny-debug", 28, 10)
        materialise(parallelize(model, mesh), "cpu").init_weights(0)
        images = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(dist.get_rank()))
        waiting = []
        for last in (False, True):
            sync_gradients(model, last)
            (model(images)[:, 0]).sum().backward()
            waiting.append([p.grad is not None for p in model.parameters()])
        gradients = [to_plain(p.grad).clone() for p in model.parameters()]
        norm = clip(model, 0.5)
        seen.append((norm, [to_plain(p.grad) for p in model.parameters()], waiting, gradients))
    dist.barrier()
    dist.destroy_process_group()
    return seen


def test_gradients_are_synchronised_when_told_and_clipped_as_torch_does(on_ranks):
    for ours, torchs in on_ranks(2, clip_and_sync, 2):
        norm, clipped, (unsynchronised, synchronised), gradients = ours
        assert type(norm) is torch.Tensor and norm.shape == () and norm > 0.5 and torch.equal(norm, torchs[0])
        assert all(torch.equal(a, b) for a, b in zip(clipped, torchs[1], strict=True))
        assert not any(unsynchronised) and all(synchronised)
        whole = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        assert torch.allclose(norm, whole) and torch.allclose(
            clipped[-1], gradients[-1] * 0.5 / norm, rtol=1e-4
        )


def test_clip_gradients_of_a_plain_model():
    model = nn.Linear(3, 3)
    sync_gradients(model, False)  # nothing to tell
    model.bias.requires_grad = False  # without a gradient
    for max_norm, scale in ((0, 1), (10, 1), (0.3, 0.1)):
        model.weight.grad = torch.ones(3, 3)
        norm = clip_gradients(torch.optim.SGD(model.parameters()), max_norm)
        assert norm == 3 and torch.allclose(model.weight.grad, torch.full((3, 3), float(scale)))


def get_timeouts():
    """Of the mesh's two groups, and of one that nobody gave another."""
    distributed.start()
    try:
        mesh = build_mesh(1, "cpu", timedelta(seconds=77))
        groups = [mesh.get_group(0), mesh.get_group(1), dist.new_group()]
        return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    finally:
        distributed.finish()


def test_the_groups_of_a_mesh_wait_as_long_as_they_are_told(on_ranks):
    for replicas, shards, untold in on_ranks(2, get_timeouts):
        assert replicas == shards == timedelta(seconds=77) != untold


def test_build_mesh_of_one_process():
    assert build_mesh(None, "cpu", timedelta(1)) is None and build_mesh(1, "cpu", timedelta(1)) is None
    with pytest.raises(UserError, match="dp_shard 2 does not divide the 1 ranks of this run"):
        build_mesh(2, "cpu", timedelta(1))


# ---- activation checkpointing


def saved_bytes_and_gradients(activation_checkpointing, compile, phase):
    torch.manual_seed(0)
    dropout = 0.0 if compile else 0.1  # a compiled block's masks depend on its graph
    cfg = train.Config(
        dtype="float32", dropout=dropout, compile=compile, activation_checkpointing=activation_checkpointing
    )
    torch._dynamo.reset()
    model = train.build_model(cfg, phase, {family: [8, 16, 4, 8] for family in LORA_FAMILIES}, "cpu")
    model.init_weights(0)
    train.init_adapters(model, 0)
    torch.nn.init.normal_(model.head.weight)
    saved, images = {}, torch.randn(32, 3, 28, 28)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        if t.untyped_storage().data_ptr() not in parameters:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    torch.manual_seed(zlib.crc32(b"(0, 0)"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model.train()(images).square().mean()
    loss.backward()
    return sum(saved.values()), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("phase", ["full", "lora"])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=slow)])
def test_activation_checkpointing_saves_memory_and_changes_no_gradient(compile, phase):
    none, expected = saved_bytes_and_gradients("none", compile, phase)
    for mode, least, most in [("block", 0, 0.3), ("selective", 0.3, 0.7)] if compile else [("block", 0, 0.3)]:
        some, gradients = saved_bytes_and_gradients(mode, compile, phase)
        print(mode, some / none)
        assert least * none < some < most * none
        assert all(torch.allclose(gradients[n], expected[n], rtol=1e-4, atol=1e-7) for n in expected)


def run_with_a_slow_rank(argv, slow):
    """One rank sleeps, in the loader or in the forward pass."""
    mine = int(os.environ["RANK"]) == slow[0]
    prefetch, forward = train.prefetch, VisionTransformer.forward

    def fetching(batches, device):
        for batch in prefetch(batches, device):
            time.sleep(0.2 * (mine and slow[1] == "data"))
            yield batch

    def computing(*args):
        time.sleep(0.2 * (mine and slow[1] == "forward"))
        return forward(*args)

    in_forward = mock.patch.object(VisionTransformer, "forward", computing)
    with mock.patch.object(train, "prefetch", fetching), in_forward:
        return run_main(argv)["epochs"]


@pytest.mark.parametrize("slow", [(1, "data"), pytest.param((0, "forward"), marks=slow)])
def test_the_slow_rank_is_named(on_ranks, small, tmp_path, slow):
    epochs = on_ranks(
        2,
        run_with_a_slow_rank,
        [*PLAIN, "--data_dir", small, "--run_dir", tmp_path / "run", "--epochs", 2, "--dp_shard", 1],
        slow,
    )
    for slowest in (e["slowest_rank"] for e in epochs[0]):
        assert (
            slowest["rank"] == slow[0]
            and slowest["host"] == distributed.get_host()
            and slowest["step_seconds"] > 0.2
        )
        assert (slowest["data_wait_seconds"] > 0.2) == (slow[1] == "data")


# ---- GPUs


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nccl(go):
    """The path of a real run: NCCL, bfloat16, compiled, both switches; beside one GPU."""
    flags = "--dtype bfloat16 --compile True --activation_checkpointing selective"
    one, two = go(1, flags)[0], go(2, flags)
    phases = [
        e
        for e in map(json.loads, (go.run_dir / "metrics.jsonl").read_text().splitlines())
        if e["event"] in ("start", "switch")
    ]
    assert [p["graphs_compiled"] for p in phases] == [1, 1, 2] and [
        p["eval_graphs_compiled"] for p in phases
    ] == [1, 1, 1]
    assert two[0]["losses"] == two[1]["losses"] == pytest.approx(one["losses"], rel=1e-2)
    for phase, weights in two[0]["weights"].items():
        assert [n for n in weights if not torch.equal(two[1]["weights"][phase][n], weights[n])] == []
