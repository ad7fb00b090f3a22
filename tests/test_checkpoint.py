"""model/checkpoint.py: to the bit with any optimiser and number of processes; failed saves; process 0 and the
rest."""

import contextlib
import json
import pickle
import re
import resource
import shutil
import traceback
import zlib
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from small_runs import flip, invert, write_meta
from test_optim import ADAPTERS, OPTIMIZERS, SMALL, build, equal, snapshot, step
from torch import nn

from errors import SharedError, UserError
from lora.inject import add_lora, freeze_base, init_adapters, match_families
from model import checkpoint, tensors
from model.optim import apply_update, build_optimizer, get_optimizer_state, set_optimizer_state
from model.parallel import build_mesh, materialise, parallelize, reshard, to_plain
from model.tensors import read_index
from model.variants import LORA_FAMILIES, VARIANTS
from model.vit import VisionTransformer

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is.*")


@pytest.fixture(autouse=True)
def small_variant(monkeypatch):
    monkeypatch.setitem(VARIANTS, "small", SMALL)
    torch.manual_seed(0)


# ---- saving and loading


def trained(**kwargs):
    model = build(**kwargs)
    optimizer = build_optimizer(model, 0.1)
    for i in range(2):
        step(model, optimizer, seed=i)
    return model, optimizer


@pytest.mark.parametrize("kwargs", [dict(), dict(lora=True), dict(lora=True, freeze=True)])
def test_checkpoint_roundtrip_to_the_bit(tmp_path, kwargs):
    model, optimizer = trained(**kwargs)
    path = checkpoint.save(tmp_path, model, optimizer, {"state": {"step": 2}}, pinned=False)
    assert path == tmp_path / "checkpoints/step_00000002" == checkpoint.latest(tmp_path)
    meta = checkpoint.read_meta(path)
    assert meta == {"state": {"step": 2}, "pinned": False, "id": meta["id"]}
    assert re.fullmatch("[0-9a-f]{16}", meta["id"])
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
    path = checkpoint.save(tmp_path, model, fresh, {"state": {"step": 2}}, pinned=True)
    other = build(lora=True)
    other_optimizer = build_optimizer(other, 0.1)
    checkpoint.load(path, other, other_optimizer)
    assert equal(snapshot(other, other_optimizer), snapshot(model, fresh))
    assert not ADAPTERS & set(get_optimizer_state(other, other_optimizer))


# ---- any optimiser, any number of processes


def whole(model, optimizer):
    """Weights and optimiser state, gathered: {name: tensor}."""
    reshard(model)
    found = {name: to_plain(t.detach()).clone() for name, t in model.state_dict().items()}
    for name, state in get_optimizer_state(model, optimizer).items():
        found |= {f"{name}/{key}": to_plain(t).clone() for key, t in state.items() if t is not None}
    return found


def build_small(kind, mesh, seed):
    """A ViT with adapters, all of it trainable, sharded over `mesh`, and an optimiser."""
    ranks = {"q": [2, 4], "v": [1, 2], "fc1": [4, 4]}
    with torch.device("meta"):
        model = VisionTransformer("small", 8, 5)
        add_lora(model, match_families(model, LORA_FAMILIES, tuple(ranks)), ranks)
    materialise(parallelize(model, mesh), "cpu")
    model.init_weights(seed)
    init_adapters(model, seed)
    return model, OPTIMIZERS[kind](model, 0.1)


def train_on(model, optimizer, steps):
    """Steps on images that each process has of its own."""
    process = dist.get_rank() if dist.is_initialized() else 0
    for number in steps:
        draw = torch.Generator().manual_seed(10 * number + process)
        x, y = torch.randn(4, 3, 8, 8, generator=draw), torch.randn(4, 5, generator=draw)
        (model(x) - y).square().mean().backward()
        apply_update(optimizer, 1e-2, torch.tensor(False))


def resumed_and_not(folder, kind, processes, lossy=False):
    """What is in memory after 6 steps, and after 3, a checkpoint and 3 more of another model.

    `lossy`: the checkpoint's optimiser state is not loaded.
    """
    if processes > 1:
        dist.init_process_group("gloo")
    with mock.patch.dict(VARIANTS, {"small": SMALL}):
        mesh = build_mesh(processes, "cpu", timedelta(minutes=1))
        model, optimizer = build_small(kind, mesh, seed=0)
        train_on(model, optimizer, range(3))
        reshard(model)
        path = checkpoint.save(folder, model, optimizer, {"state": {"step": 3}}, pinned=False)
        other, other_optimizer = build_small(kind, mesh, seed=1)
        with mock.patch.object(checkpoint, "set_optimizer_state") if lossy else contextlib.nullcontext():
            checkpoint.load(path, other, other_optimizer)
        loaded = whole(model, optimizer), whole(other, other_optimizer)
        train_on(model, optimizer, range(3, 6))
        train_on(other, other_optimizer, range(3, 6))
        stepped = whole(model, optimizer), whole(other, other_optimizer)
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()
    return loaded, stepped


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_any_optimizers_state_is_saved_and_loaded(on_ranks, tmp_path, kind, processes):
    if processes == 1:
        seen = [resumed_and_not(tmp_path, kind, 1)]
    else:
        seen = on_ranks(processes, resumed_and_not, tmp_path, kind, processes)
    for loaded, stepped in seen:
        assert len(loaded[0]) > 60 and any("/" in name for name in loaded[0])
        assert equal(*loaded) and equal(*stepped) and not equal(loaded[0], stepped[0])


def test_control_a_lost_state_is_seen(tmp_path):
    loaded, stepped = resumed_and_not(tmp_path, "SGD", 1, lossy=True)
    assert not equal(*loaded) and not equal(*stepped)


def test_loaded_state_lies_as_the_optimizers_own(tmp_path):
    """AdamW that is not fused counts its steps on the host; what is narrower than the weights stays so."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    step_on(model, optimizer)
    optimizer.state[model.weight]["exp_avg"] = optimizer.state[model.weight]["exp_avg"].bfloat16()
    path = checkpoint.save(tmp_path, model, optimizer, {"state": {"step": 1}}, pinned=False)
    other = nn.Linear(2, 2).to("meta")
    for fused, device in ((False, "cpu"), (True, "meta")):
        infos = checkpoint.get_stored(path, "optimizer.weight.")
        made = {
            key: checkpoint.build_state(key, info, other.weight, {"fused": fused})
            for key, info in infos.items()
        }
        assert made["step"].device.type == device and made["step"].shape == ()
        assert made["exp_avg"].is_meta and made["exp_avg"].dtype == torch.bfloat16
        assert made["exp_avg_sq"].dtype == torch.float32 and made["exp_avg_sq"].shape == (2, 2)


def step_on(model, optimizer):
    model(torch.ones(1, model.in_features)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_states_that_are_no_tensors(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    step_on(model, optimizer)
    optimizer.state[model.bias]["momentum_buffer"] = None  # there is none
    path = checkpoint.save(tmp_path, model, optimizer, {"state": {"step": 1}}, pinned=False)
    other = nn.Linear(2, 2)
    other_optimizer = torch.optim.SGD(other.parameters(), momentum=0.9)
    checkpoint.load(path, other, other_optimizer)
    assert get_optimizer_state(other, other_optimizer).keys() == {"weight"}
    for key, value in (("count", 3), ("history", [torch.zeros(2)]), ("a.b", torch.zeros(2))):
        optimizer.state[model.bias] = {key: value}
        with pytest.raises((TypeError, ValueError), match=f"the optimiser's state '{key}' of bias"):
            checkpoint.save(tmp_path, model, optimizer, {"state": {"step": 2}}, pinned=False)
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_states_of_what_is_not_trained_stay_in_the_file(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = checkpoint.save(tmp_path, model, optimizer, {"state": {"step": 1}}, pinned=False)
    half = torch.optim.SGD(model[1].parameters(), momentum=0.9)
    with mock.patch.object(checkpoint, "read_tensors", wraps=checkpoint.read_tensors) as read:
        checkpoint.load(path, model, half)
    assert set(half.state) == set(model[1].parameters())
    assert read.call_args.args[1].keys() == {
        "optimizer.1.weight.momentum_buffer",
        "optimizer.1.bias.momentum_buffer",
    }


# ---- what is frozen lies in the base


def build_frozen(mesh=None, seed=0, keep=()):
    """A ViT with adapters on a frozen base, a norm's statistics besides, and its optimiser."""
    ranks = {"q": [2, 4], "v": [1, 2], "fc1": [4, 4]}
    with torch.device("meta"):
        model = VisionTransformer("small", 8, 5)
        model.statistics = nn.BatchNorm1d(3, affine=False)
        add_lora(model, match_families(model, LORA_FAMILIES, tuple(ranks)), ranks)
    freeze_base(model, keep=keep)
    materialise(parallelize(model, mesh), "cpu")
    model.init_weights(seed)
    init_adapters(model, seed)
    with torch.no_grad():
        model.head.weight.fill_(0.1 + seed)  # zero, it would stop every other gradient
    return model, build_optimizer(model, 0.1)


def save_frozen(folder, number, model, optimizer, base=None, pinned=False):
    """A checkpoint of the lora phase: (its path, what later ones name it by)."""
    meta = {"state": {"step": number, "phase": "lora", "base": base}, "config": {}, "train_images": 64}
    path = checkpoint.save(folder, model, optimizer, meta, pinned)
    return path, checkpoint.find_whole(folder, number)


def save_phase(folder, mesh=None):
    """A whole checkpoint of step 1 and one of step 2 that names it; the model and optimiser of step 2."""
    model, optimizer = build_frozen(mesh)
    train_on(model, optimizer, range(1))
    reshard(model)
    _, base = save_frozen(folder, 1, model, optimizer)
    train_on(model, optimizer, range(1, 2))
    reshard(model)
    path, _ = save_frozen(folder, 2, model, optimizer, base)
    return path, model, optimizer


BUFFERS = {f"statistics.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
HEAD = {"head.weight", "head.bias"}


@pytest.mark.parametrize("keep, trained", [((), ADAPTERS), (("head.*",), ADAPTERS | HEAD)])
def test_a_checkpoint_with_a_base_holds_what_is_trained(tmp_path, keep, trained):
    model, optimizer = build_frozen(keep=keep)
    train_on(model, optimizer, range(1))
    everything = set(model.state_dict())
    moments = {f"{name}.{key}" for name in trained for key in ("exp_avg", "exp_avg_sq", "step")}
    first, base = save_frozen(tmp_path, 1, model, optimizer)
    second, _ = save_frozen(tmp_path, 2, model, optimizer, base)
    for path, held in ((first, everything), (second, trained | BUFFERS)):
        assert checkpoint.get_stored(path, "model.").keys() == held
        assert checkpoint.get_stored(path, "optimizer.").keys() == moments
    assert base == {"checkpoint": "step_00000001", "id": checkpoint.read_meta(first)["id"]}
    assert checkpoint.get_base(second) == first.resolve() and checkpoint.get_base(first) is None
    assert checkpoint.find_whole(tmp_path, 2) is None and checkpoint.find_whole(tmp_path, 3) is None
    sizes = [sum(file.stat().st_size for file in path.glob("*.distcp")) for path in (first, second)]
    assert sizes[1] < sizes[0]


def test_an_adapter_that_is_frozen_is_held_nonetheless(tmp_path):
    """A base of the warmup has it as it was, one of the full phase has none."""
    model, optimizer = build_frozen()
    _, base = save_frozen(tmp_path, 1, model, optimizer)
    adapter = model.blocks[0].attn.qkv.lora_A
    adapter.requires_grad = False
    second, _ = save_frozen(tmp_path, 2, model, optimizer, base)
    assert "blocks.0.attn.qkv.lora_A" in checkpoint.get_stored(second, "model.")


def test_frozen_weights_are_read_from_the_base(tmp_path):
    path, model, optimizer = save_phase(tmp_path)
    assert checkpoint.find(tmp_path)[0] == path and checkpoint.resolve(path)[0] == path
    other, other_optimizer = build_frozen(seed=1)
    before = whole(other, other_optimizer)
    with pytest.raises(UserError, match="Missing key"):  # control: its own tensors are not all
        checkpoint.read_tensors(path, {f"model.{name}": t for name, t in other.state_dict().items()})
    assert equal(whole(other, other_optimizer), before)
    checkpoint.load(path, other, other_optimizer)
    assert equal(whole(other, other_optimizer), whole(model, optimizer))
    half = build_frozen(seed=1)[0].to(torch.bfloat16)  # the base in another precision than it lies there
    checkpoint.load_weights(path, half)
    assert all(torch.equal(t, half.state_dict()[name].to(t.dtype)) for name, t in whole_bf16(model).items())


def whole_bf16(model):
    floats = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    return {name: t.bfloat16() for name, t in floats.items()}


def test_a_trained_weight_is_not_taken_from_the_base(tmp_path):
    """A warmup's base has adapters, older ones; and a head, which was trained if the model trains it."""
    path, _, _ = save_phase(tmp_path)
    other, other_optimizer = build_frozen(keep=("head.*",))
    with pytest.raises(UserError, match=r"can't load .*step_00000002: Missing key .*model\.head"):
        checkpoint.load(path, other, other_optimizer)


def replace_base(folder):
    """Another base: the same step and config, another run's."""
    shutil.rmtree(folder / "checkpoints/step_00000001")
    shutil.copytree(folder.parent / "twin/checkpoints/step_00000001", folder / "checkpoints/step_00000001")


def name_base(folder, base):
    path = folder / "checkpoints/step_00000002"
    meta = checkpoint.read_meta(path)
    meta["state"]["base"] = base
    write_meta(path, meta)


def drop_whole(folder):
    """The base names a base itself."""
    path = folder / "checkpoints/step_00000001"
    meta = checkpoint.read_meta(path)
    meta["state"]["base"] = {"checkpoint": "step_00000000", "id": "0"}
    write_meta(path, meta)


def cut(file):
    file.write_bytes(file.read_bytes()[:-9])


NEEDS = r"step_00000002 holds only what the LoRA phase trains: it needs step_00000001 \(id [0-9a-f]{16}\) of "
NEEDS += "its run beside it, "
BASES = {
    "missing": (lambda f: shutil.rmtree(f / "checkpoints/step_00000001"), NEEDS + "which is missing"),
    "cut": (
        lambda f: cut(f / "checkpoints/step_00000001/__0_0.distcp"),
        NEEDS + "which is damaged: .*__0_0.distcp is cut short",
    ),
    "without meta": (
        lambda f: (f / "checkpoints/step_00000001/meta.json").unlink(),
        NEEDS + "which is damaged: .*meta.json is missing",
    ),
    "another": (replace_base, NEEDS + r"and the one there is another \(id [0-9a-f]{16}\)"),
    "not whole": (drop_whole, NEEDS + "and the one there is not whole itself"),
    "a path": (
        lambda f: name_base(f, {"checkpoint": "../../x", "id": "0"}),
        "step_00000002/meta.json is damaged: its base is ",
    ),
    "no id": (lambda f: name_base(f, "step_00000001"), "step_00000002/meta.json is damaged: its base is "),
}


@pytest.mark.parametrize("damage", BASES)
def test_a_base_that_is_not_right_is_one_error(tmp_path, damage):
    """For those who resume, evaluate and load; not the checkpoint before it, which may be a phase back."""
    path, _, _ = save_phase(tmp_path / "run")
    save_phase(tmp_path / "twin")
    other, other_optimizer = build_frozen(seed=1)
    before = whole(other, other_optimizer)
    spoil, words = BASES[damage]
    for read in (lambda: checkpoint.find(tmp_path / "run"), lambda: checkpoint.resolve(path)):
        assert read()[0] == path  # the control
    spoil(tmp_path / "run")
    for read in (
        lambda: checkpoint.find(tmp_path / "run"),
        lambda: checkpoint.resolve(tmp_path / "run"),
        lambda: checkpoint.resolve(path),
        lambda: checkpoint.load(path, other, other_optimizer),
    ):
        with pytest.raises(UserError, match=words) as error:
            read()
        assert "\n" not in str(error.value)
    assert equal(whole(other, other_optimizer), before)


def test_a_checkpoint_that_was_copied_out_alone(tmp_path):
    path, _, _ = save_phase(tmp_path / "run")
    alone = shutil.copytree(path, tmp_path / "alone/step_00000002")
    with pytest.raises(UserError, match=NEEDS + "which is missing"):
        checkpoint.resolve(alone)
    shutil.copytree(path.with_name("step_00000001"), tmp_path / "alone/step_00000001")
    assert checkpoint.resolve(alone)[0] == alone
    (tmp_path / "link").symlink_to(path)
    assert checkpoint.resolve(tmp_path / "link")[0] == tmp_path / "link"


def test_a_damaged_checkpoint_of_the_lora_phase_is_passed_over(tmp_path):
    path, model, optimizer = save_phase(tmp_path)
    third, _ = save_frozen(tmp_path, 3, model, optimizer, checkpoint.find_whole(tmp_path, 1))
    cut(third / "__0_0.distcp")
    found, _, warnings = checkpoint.find(tmp_path)
    assert found == path and len(warnings) == 1 and "step_00000003" in warnings[0]


def test_a_base_outlives_all_that_name_it(tmp_path):
    """The first of a lora phase is pinned. So is a freeze's; one that is not is kept for who names it."""
    model, optimizer = build_frozen()
    _, base = save_frozen(tmp_path, 1, model, optimizer)
    assert checkpoint.read_meta(tmp_path / "checkpoints/step_00000001")["pinned"]
    for number in range(2, 7):
        save_frozen(tmp_path, number, model, optimizer, base)
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000005", "step_00000006"]
    warmup = {"state": {"step": 1, "phase": "warmup", "base": None}}
    for named in (True, False):
        folder = tmp_path / str(named)
        path = checkpoint.save(folder, model, optimizer, warmup, pinned=False)
        assert not checkpoint.read_meta(path)["pinned"]
        base = checkpoint.find_whole(folder, 1)
        other = base if named else save_frozen(folder, 2, model, optimizer)[1]
        for number in range(3, 7):
            save_frozen(folder, number, model, optimizer, other)
        assert ("step_00000001" in names(folder)) == named
        assert checkpoint.find(folder)[0].name == "step_00000006"


def saved_on(folder, processes):
    """What is in memory as `save_phase` saves it, on so many processes."""
    if processes > 1:
        dist.init_process_group("gloo")
    with mock.patch.dict(VARIANTS, {"small": SMALL}):
        _, model, optimizer = save_phase(folder, build_mesh(processes, "cpu", timedelta(minutes=1)))
        saved = whole(model, optimizer)
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()
    return saved


def loaded_on(folder, processes):
    """What so many processes load from there."""
    if processes > 1:
        dist.init_process_group("gloo")
    with mock.patch.dict(VARIANTS, {"small": SMALL}):
        model, optimizer = build_frozen(build_mesh(processes, "cpu", timedelta(minutes=1)), seed=1)
        checkpoint.load(folder / "checkpoints/step_00000002", model, optimizer)
        loaded = whole(model, optimizer)
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()
    return loaded


@pytest.mark.parametrize("savers, loaders", [(2, 2), (2, 1), (1, 2)])
def test_a_base_on_another_number_of_processes(on_ranks, tmp_path, savers, loaders):
    saved = on_ranks(savers, saved_on, tmp_path, savers)[0]
    assert len(saved) > 60 and any("/exp_avg" in name for name in saved)
    for loaded in on_ranks(loaders, loaded_on, tmp_path, loaders):
        assert equal(loaded, saved)


def refused_on(folder):
    """The errors with which processes that load from there are refused."""
    dist.init_process_group("gloo")
    try:
        checkpoint.load_weights(folder / "checkpoints/step_00000002", nn.Linear(2, 2))
    except SharedError as error:
        return str(error)
    finally:
        dist.barrier()
        dist.destroy_process_group()


def test_a_missing_base_is_every_processs_error(on_ranks, tmp_path):
    save_phase(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/step_00000001")
    one, two = on_ranks(2, refused_on, tmp_path)
    assert one == two and re.search(NEEDS + "which is missing", one)


# ---- flipped bytes


def flip_on(folder, processes):
    """What so many processes are told that load from there, and what they have in memory then."""
    if processes > 1:
        dist.init_process_group("gloo")
    try:
        with mock.patch.dict(VARIANTS, {"small": SMALL}):
            model, optimizer = build_frozen(build_mesh(processes, "cpu", timedelta(minutes=1)), seed=1)
            checkpoint.load(folder / "checkpoints/step_00000002", model, optimizer)
        return None
    except SharedError as error:
        return str(error)
    finally:
        if processes > 1:
            dist.barrier()
            dist.destroy_process_group()


ADAPTER, BASE = "blocks.0.attn.qkv.lora_A", "blocks.1.mlp.fc2.weight"


@pytest.mark.parametrize(
    "number, name", [(2, f"model.{ADAPTER}"), (2, f"optimizer.{ADAPTER}.exp_avg"), (1, f"model.{BASE}")]
)
def test_flipped_bytes_are_refused(tmp_path, number, name):
    """Of a weight, of the optimiser's state, of the base: the file is named, and the way back."""
    model, optimizer = build_frozen()
    checkpoint.save(tmp_path, model, optimizer, {"state": {"step": 0}}, pinned=True)
    path, model, optimizer = save_phase(tmp_path)
    damaged, before = path.with_name(f"step_{number:08d}"), f"step_{number - 1:08d}"
    file = flip(damaged, name)
    taken = {name: torch.empty(read_index(damaged).state_dict_metadata[name].size)}
    dcp.load(taken, checkpoint_id=damaged)  # control: DCP itself sees nothing
    other, other_optimizer = build_frozen(seed=1)
    with pytest.raises(SharedError) as error:
        checkpoint.load(path, other, other_optimizer)
    told = str(error.value)
    assert told.startswith(f"{file} is damaged, it is not what was written") and "\n" not in told
    assert f"the checkpoint before it is {before}: with that name written into " in told
    flip(damaged, name)  # back again
    checkpoint.load(path, other, other_optimizer)  # control
    assert equal(whole(other, other_optimizer), whole(model, optimizer))
    (tmp_path / "checkpoints/latest").write_text(before)  # as it was told
    assert checkpoint.find(tmp_path)[0].name == before


def test_only_what_is_read_is_checked(tmp_path):
    """Weights alone, of the base's file and its own."""
    path, model, _ = save_phase(tmp_path)
    with mock.patch.object(tensors, "get_checksum", wraps=tensors.get_checksum) as read:
        checkpoint.load_weights(path, build_frozen(seed=1)[0])
    names = {(call.args[0].parent.name, call.args[0].name) for call in read.call_args_list}
    files = {"meta.json", ".metadata", "__0_0.distcp"}
    assert names == {(step, name) for step in ("step_00000001", "step_00000002") for name in files}


@pytest.mark.parametrize("name", [".metadata", "meta.json", "checksums.json"])
def test_flipped_bytes_of_a_small_file_are_passed_over(tmp_path, monkeypatch, name):
    """Before anything is unpickled; the checkpoint before it is taken, as where a file is cut."""
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, 0.1)
    for number in (1, 2):
        meta = {"state": {"step": number}, "config": {"note": 200 * "x"}, "train_images": 64}
        path = checkpoint.save(tmp_path, model, optimizer, meta, pinned=False)
    assert checkpoint.find(tmp_path)[0] == path  # control
    if name == "meta.json":  # still JSON
        text = (path / name).read_text()
        (path / name).write_text(text.replace('"train_images": 64', '"train_images": 65'))
    else:
        invert(path / name, 40)
    unpickled, load = [], pickle.load
    monkeypatch.setattr(pickle, "load", lambda file: unpickled.append(file.name) or load(file))
    found, _, warnings = checkpoint.find(tmp_path)
    assert found == path.with_name("step_00000001") and len(warnings) == 1
    assert warnings[0].startswith(f"passed over a damaged checkpoint: {path / name} is damaged")
    assert [Path(file).parent.name for file in unpickled] == ["step_00000001"]


def test_a_checkpoint_without_checksums_is_refused(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, 0.1)
    path = checkpoint.save(tmp_path, model, optimizer, {"state": {"step": 1}}, pinned=False)
    every = json.loads((path / "checksums.json").read_text())["crc32"]
    assert every.keys() == {".metadata", "meta.json", "__0_0.distcp"}
    assert every["__0_0.distcp"] == f"{zlib.crc32((path / '__0_0.distcp').read_bytes()):08x}"
    del every["__0_0.distcp"]
    (path / "checksums.json").write_text(json.dumps({"crc32": every}))
    with pytest.raises(UserError, match="checksums.json is damaged: it has no __0_0.distcp"):
        checkpoint.verify(path)
    (path / "checksums.json").unlink()
    for read in (checkpoint.verify, lambda path: checkpoint.load(path, model, optimizer)):
        with pytest.raises(UserError, match="checksums.json is missing"):
            read(path)


@pytest.mark.parametrize("savers, loaders", [(2, 2), (2, 1), (1, 2)])
def test_flipped_bytes_on_another_number_of_processes(on_ranks, tmp_path, savers, loaders):
    """Every process hears of what one of them meets; untouched the same loads."""
    on_ranks(savers, saved_on, tmp_path, savers)
    assert on_ranks(loaders, flip_on, tmp_path, loaders) == [None] * loaders  # control
    files = json.loads((tmp_path / "checkpoints/step_00000002/checksums.json").read_text())["crc32"]
    assert files.keys() == {".metadata", "meta.json", *(f"__{i}_0.distcp" for i in range(savers))}
    file = flip(tmp_path / "checkpoints/step_00000002", f"model.{ADAPTER}")
    told = on_ranks(loaders, flip_on, tmp_path, loaders)
    assert (
        told[0].startswith(f"{file} is damaged, it is not what was written") and told == [told[0]] * loaders
    )


# ---- what process 0 meets, the others hear of


def fail(kind):
    if kind is not None:
        raise kind("what there is to say")
    return {"result": 1}


def on_each(kind):
    """What on_process_0 does on this process: (its result or the exception's name, text, where it was
    raised)."""
    dist.init_process_group("gloo")
    try:
        return checkpoint.on_process_0(fail, kind), None, None
    except BaseException as e:
        return type(e).__name__, str(e), traceback.extract_tb(e.__traceback__)[-1].name
    finally:
        dist.barrier()  # that both come here is what is tested
        dist.destroy_process_group()


@pytest.mark.parametrize("kind, first, second", [
    (None, ({"result": 1}, None), ({"result": 1}, None)),
    (UserError, ("SharedError", "what there is to say"), ("SharedError", "what there is to say")),
    (OSError, ("SharedError", "what there is to say"), ("SharedError", "what there is to say")),
    (KeyError, ("KeyError", "'what there is to say'"),
     ("RuntimeError", "process 0 failed in fail: KeyError: 'what there is to say'")),
    (KeyboardInterrupt, ("KeyboardInterrupt", "what there is to say"),
     ("RuntimeError", "process 0 failed in fail: KeyboardInterrupt: what there is to say")),
])  # fmt: skip
def test_what_process_0_raises_reaches_the_others(on_ranks, kind, first, second):
    seen = on_ranks(2, on_each, kind)
    assert [(what, text) for what, text, _ in seen] == [first, second]
    if kind in (KeyError, KeyboardInterrupt):
        assert seen[0][2] == "fail"  # its own traceback


def test_on_process_0_with_one_process():
    assert checkpoint.on_process_0(fail, None) == {"result": 1}
    for kind, found in ((UserError, SharedError), (OSError, SharedError), (ValueError, ValueError)):
        with pytest.raises(found) as error:
            checkpoint.on_process_0(fail, kind)
        assert type(error.value) is found


# ---- directories


def names(tmp_path):
    return sorted(p.name for p in (tmp_path / "checkpoints").iterdir())


def test_latest_moves_and_old_ones_are_pruned(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, 0.1)
    for number in (1, 2, 3, 10, 11):
        checkpoint.save(tmp_path, model, optimizer, {"state": {"step": number}}, pinned=number in (2, 10))
        assert checkpoint.latest(tmp_path).name == f"step_{number:08d}"
    assert names(tmp_path) == [
        "latest",
        "step_00000002",
        "step_00000010",
        "step_00000011",
    ]  # 1 and 3 went, 2 is pinned
    checkpoint.save(tmp_path, model, optimizer, {"state": {"step": 12}}, pinned=False)
    checkpoint.save(tmp_path, model, optimizer, {"state": {"step": 13}}, pinned=False)
    assert names(tmp_path) == ["latest", "step_00000002", "step_00000010", "step_00000012", "step_00000013"]


def test_what_a_killed_save_left_is_ignored_and_removed(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, 0.1)
    checkpoint.save(tmp_path, model, optimizer, {"state": {"step": 1}}, pinned=False)
    folder = tmp_path / "checkpoints"
    for stale in ("step_00000002.tmp", "step_00000003"):  # killed while writing; before `latest` moved
        (folder / stale).mkdir()
        (folder / stale / "junk").write_text("x")
    assert checkpoint.latest(tmp_path).name == "step_00000001"
    (folder / "step_00000003/meta.json").write_text('{"pinned": false}')
    for number in (2, 3):
        saved = checkpoint.save(tmp_path, model, optimizer, {"state": {"step": number}}, pinned=False)
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
    path = checkpoint.save(tmp_path, model, build_optimizer(model, 0.1), {"state": {"step": 1}}, pinned=False)
    with pytest.raises(UserError, match="can't load .*step_00000001"):
        checkpoint.load(path, other, build_optimizer(other, 0.1))


def test_failed_save_leaves_the_one_before(tmp_path, monkeypatch):
    model, optimizer = trained()
    expected = snapshot(model, optimizer)
    checkpoint.save(tmp_path, model, optimizer, {"state": {"step": 2}}, pinned=False)

    def disk_full(tensors, checkpoint_id, storage_writer):
        checkpoint_id.mkdir()
        (checkpoint_id / "__0_0.distcp").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    step(model, optimizer, seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(dcp, "save", disk_full)
        with pytest.raises(UserError, match="No space left"):
            checkpoint.save(tmp_path, model, optimizer, {"state": {"step": 3}}, pinned=False)
    assert checkpoint.latest(tmp_path).name == "step_00000002"
    other = build()
    other_optimizer = build_optimizer(other, 0.1)
    checkpoint.load(checkpoint.latest(tmp_path), other, other_optimizer)
    assert equal(snapshot(other, other_optimizer), expected)
    checkpoint.save(tmp_path, model, optimizer, {"state": {"step": 3}}, pinned=False)  # there is room again
    assert names(tmp_path) == ["latest", "step_00000002", "step_00000003"]


def test_a_full_disk_is_the_users_to_hear_of(tmp_path):
    """The real thing, by a limit on file sizes: DCP turns what its writer raises into a BaseException of its
    own."""
    model = nn.Linear(200, 200)
    optimizer = build_optimizer(model, 0.1)
    checkpoint.save(tmp_path, model, optimizer, {"state": {"step": 1}}, pinned=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # the weight alone has 160,000 bytes
    try:
        with pytest.raises(SharedError, match="can't write .*step_00000002"):
            checkpoint.save(tmp_path, model, optimizer, {"state": {"step": 2}}, pinned=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.latest(tmp_path).name == "step_00000001"


def test_a_roll_back_by_hand_does_not_lose_the_new_checkpoint(tmp_path):
    model = nn.Linear(2, 2)
    for number in (5, 20, 30):
        checkpoint.save(
            tmp_path, model, build_optimizer(model, 0.1), {"state": {"step": number}}, pinned=True
        )
    (tmp_path / "checkpoints" / "latest").write_text("step_00000005")
    checkpoint.save(tmp_path, model, build_optimizer(model, 0.1), {"state": {"step": 6}}, pinned=False)
    assert checkpoint.latest(tmp_path).name == "step_00000006" and checkpoint.latest(tmp_path).is_dir()


def test_a_half_deleted_checkpoint_does_not_stop_the_next_saves(tmp_path):
    model = nn.Linear(2, 2)
    half, mine = tmp_path / "checkpoints" / "step_00000001", tmp_path / "checkpoints" / "step_00000001_mine"
    half.mkdir(parents=True)
    mine.mkdir()
    for number in (2, 3, 4):
        checkpoint.save(
            tmp_path, model, build_optimizer(model, 0.1), {"state": {"step": number}}, pinned=False
        )
    assert names(tmp_path) == [
        "latest",
        "step_00000001",
        "step_00000001_mine",
        "step_00000003",
        "step_00000004",
    ]


@pytest.mark.parametrize(
    "error, found", [(OSError, SharedError), (RuntimeError, SharedError), (AttributeError, RuntimeError)]
)
def test_a_bug_in_saving_is_no_sentence(tmp_path, monkeypatch, error, found):
    model = nn.Linear(2, 2)

    def write(*args):
        raise error("met in the middle")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", write)
    with pytest.raises(found, match="met in the middle") as raised:
        checkpoint.save(tmp_path, model, build_optimizer(model, 0.1), {"state": {"step": 1}}, pinned=False)
    assert type(raised.value) is found and checkpoint.latest(tmp_path) is None


def test_what_a_checkpoint_must_say(tmp_path):
    """state, config and train_images; nobody asks for a monitor."""
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, 0.1)
    meta = {"state": {"step": 1}, "config": {}, "train_images": 64}
    path = checkpoint.save(tmp_path, model, optimizer, meta, pinned=False)
    written = meta | {"pinned": False, "id": checkpoint.read_meta(path)["id"]}
    assert checkpoint.kept(tmp_path) == [(path, written)]
    assert checkpoint.resolve(tmp_path) == checkpoint.resolve(path) == (path, written, [])
    del meta["train_images"]
    checkpoint.save(tmp_path, model, optimizer, meta | {"state": {"step": 2}}, pinned=False)
    assert [kept for kept, _ in checkpoint.kept(tmp_path)] == [path]
    with pytest.raises(UserError, match="step_00000002/meta.json is damaged: keys are missing"):
        checkpoint.resolve(tmp_path)
    with pytest.raises(UserError, match=f"checkpoints lies inside the run {tmp_path}: give {tmp_path}"):
        checkpoint.resolve(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="step_00000009: there are step_00000001, step_00000002"):
        checkpoint.resolve(tmp_path / "checkpoints/step_00000009")
