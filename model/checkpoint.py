"""Checkpoints of a run: its tensors (model/tensors.py) and meta.json for all that a person may want to read.

Every process writes its own shards and reads what it needs of them: a checkpoint loads on any number of
processes.

    RUN/checkpoints/step_00001234/   one fresh directory per save, complete or absent: written as *.tmp, then
                                     renamed; what stands there under that name is *.old for that moment
    RUN/checkpoints/latest           the name of the newest one, replaced atomically after the rename

Each has the checksums of its files (model/tensors.py). What finds a checkpoint looks at meta.json, the index
and the lengths of the others, and passes over a damaged one. A file of tensors is checked by those who load
from it, and damage there stops them, with the way back to the checkpoint before: that much reading is done
once, and a storage that changes bytes wants to be looked at before training goes on.

A checkpoint is whole, or it names in its state, as "base", the whole one beside it from which what is frozen
is read: {"checkpoint": its name, "id": the random "id" in its meta.json}. So a LoRA phase writes its base
once.

The index of the tensors, `.metadata`, is a pickle: load only your own runs. To share weights, export them to
safetensors.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from errors import SharedError, UserError
from files import explain_no_run, is_run, read_json, write_json
from model.optim import get_adapters, get_optimizer_state, set_optimizer_state
from model.tensors import (
    CHECKSUMS,
    INDEX,
    Damaged,
    check_file,
    get_checksum,
    get_stored,
    read_checksums,
    read_index,
    read_tensors,
    write_tensors,
)

META = "meta.json"
META_KEYS = {"state", "config", "train_images"}  # what those who go on from a checkpoint read of its meta

# ---- writing and reading


def save(
    run_dir: Path,
    model: nn.Module,
    optimizer: Optimizer,
    meta: dict,
    pinned: bool,
    besides: dict[str, Tensor] | None = None,
) -> Path:
    """Write model, optimiser, tensors `besides` (Ema.get_tensors, say; by names of their own) and `meta` as
    step_<meta["state"]["step"]>, move `latest` to it, prune the others.

    Where meta["state"] names a base, frozen parameters and their averages are left out. All processes
    together. The last two intact checkpoints are kept, every `pinned` one, the bases of all these, and a
    whole one of the lora phase, which the next ones may name. Raises SharedError where the disk refuses (it
    is full, say), with `latest` still at the checkpoint before.
    """
    state = meta["state"]
    final = run_dir / "checkpoints" / f"step_{state['step']:08d}"
    tmp = final.with_suffix(".tmp")
    tensors = get_tensors(model, optimizer) | (besides or {})
    if state.get("base"):
        for name in get_frozen(model):
            del tensors[f"model.{name}"]
            tensors.pop(f"ema.{name}", None)
    elif state.get("phase") == "lora":
        pinned = True
    on_process_0(remove_unfinished, final.parent)
    checksums = write_tensors(tmp, tensors, str(final))
    on_process_0(complete, tmp, final, meta | {"pinned": pinned}, checksums)
    return final


def get_frozen(model: nn.Module) -> set[str]:
    """Names of the parameters that a base holds for all later checkpoints: frozen, and no adapter's."""
    adapters = get_adapters(model)
    return {name for name, p in model.named_parameters() if not p.requires_grad and p not in adapters}


def get_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """All that a whole checkpoint holds: `model.NAME` and `optimizer.NAME.KEY`, the optimiser's own tensors.

    Raises TypeError for a state that is no tensor (None apart, which says that there is none) and ValueError
    for a key with a dot, which could not be told from a name when it is read: neither would be loaded.
    """
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for name, state in get_optimizer_state(model, optimizer).items():
        for key, value in state.items():
            where = f"the optimiser's state {key!r} of {name}"
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"{where} is a {type(value).__name__}: only tensors can be saved")
            if "." in key:
                raise ValueError(f"{where} can't be saved: its name has a dot")
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def load(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Restore weights and optimiser state in place, by name. What there is of the state, the file says.

    Parameters whose state the checkpoint lacks (an adapter that has not stepped yet) start fresh, states of
    what is not trained are left in the file. Raises SharedError for a weight that is missing or has another
    shape, a damaged file, with the way back to the checkpoint before it, or a base that is not there as
    `get_base` wants it.
    """
    load_weights(path, model)
    parameters, state, flat = dict(model.named_parameters()), {}, {}
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for full_name, stored in on_process_0(get_stored, path, "optimizer.").items():
        name, _, key = full_name.rpartition(".")
        p = parameters.get(name)
        if p is None or p not in groups:
            continue
        state.setdefault(name, {})[key] = build_state(key, stored, p, groups[p])
        flat[f"optimizer.{full_name}"] = state[name][key]
    if flat:
        read(path, flat)
    set_optimizer_state(model, optimizer, state)


def build_state(key: str, stored: TensorStorageMetadata, p: nn.Parameter, group: dict[str, Any]) -> Tensor:
    """An empty tensor for a state of parameter `p`, as the optimiser would have made it.

    Of the parameter's shape it is sharded as the parameter is, of another shape (a count of steps) it is
    plain. torch's optimisers count on the host, unless they are fused or capturable.
    """
    dtype = stored.properties.dtype
    if stored.size == p.shape:
        return torch.zeros_like(p.detach(), dtype=dtype)
    on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
    return torch.zeros(stored.size, dtype=dtype, device="cpu" if on_host else p.device)


def load_weights(path: Path, model: nn.Module) -> None:
    """Restore weights alone, in place, by name, in the model's own precision. Raises as `load` does."""
    own = {f"model.{name}": t for name, t in model.state_dict().items()}
    base = on_process_0(get_base, path)
    if base is not None:
        # What is trained has to be in the checkpoint itself: a warmup's has older adapters.
        elsewhere = get_frozen(model) - on_process_0(get_stored, path, "model.").keys()
        read(base, {f"model.{name}": own.pop(f"model.{name}") for name in elsewhere})
    read(path, own)


def read(path: Path, tensors: dict[str, Tensor]) -> None:
    """`read_tensors` of a checkpoint: of a damaged file it also says how to go back to the checkpoint
    before."""
    try:
        read_tensors(path, tensors)
    except Damaged as error:
        raise SharedError(f"{error}; {describe_way_back(path)}") from None


def describe_way_back(path: Path) -> str:
    """How a run goes on without its checkpoint at `path` and what came after it."""
    folder, name = path.resolve().parent, path.resolve().stem
    older = [d.name for d in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", d.name) and d.name < name]
    if not older:
        return "there is no checkpoint before it"
    return (
        f"the checkpoint before it is {max(older)}: with that name written into {folder / 'latest'} "
        "--resume True goes on from there"
    )


def on_process_0(function: Callable, *args):
    """Call `function` on process 0 while the others wait, and return its result on all of them.

    For what one process alone does to files, or looks for among them. What it raises reaches the others at
    once. A UserError or an OSError is a SharedError on every process. Anything else is a bug: it goes on as
    it is on process 0, the others raise a RuntimeError that names it.
    """
    result, mistake, bug = None, None, None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = function(*args)
        except (UserError, OSError) as e:
            mistake = str(e)
        except BaseException as e:  # a bug, or Ctrl-C
            bug = e
    described = None if bug is None else f"{type(bug).__name__}: {bug}"
    if dist.is_initialized():
        outcome = [result, mistake, described]
        dist.broadcast_object_list(outcome, src=0)
        result, mistake, described = outcome
    if mistake is not None:
        raise SharedError(mistake)
    if bug is not None:
        raise bug
    if described is not None:
        raise RuntimeError(f"process 0 failed in {function.__name__}: {described}")
    return result


# ---- directories


def remove_unfinished(folder: Path) -> None:
    for leftover in folder.glob("step_*.tmp"):  # of a killed process or a full disk
        shutil.rmtree(leftover)
    for old in folder.glob("step_*.old"):
        if old.with_suffix("").exists():
            shutil.rmtree(old)


def complete(tmp: Path, final: Path, meta: dict, checksums: dict[str, str]) -> None:
    """Every process's shards are in `tmp`, and have these checksums: make it the newest checkpoint, and only
    then delete older ones."""
    write_json(tmp / META, meta | {"id": secrets.token_hex(8)})
    for name in (META, INDEX):
        checksums[name] = get_checksum(tmp / name)
    write_json(tmp / CHECKSUMS, {"crc32": checksums})
    old = final.with_suffix(".old")
    if final.exists():
        # It was saved on a signal before the epoch's evaluation, or is damaged, or from before a roll-back.
        # `find` looks at *.old, too, should a kill come here.
        os.replace(final, old)
    os.replace(tmp, final)
    link = final.parent / "latest"
    link.with_suffix(".tmp").write_text(final.name)
    os.replace(link.with_suffix(".tmp"), link)
    shutil.rmtree(old, ignore_errors=True)
    prune(final)


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. Raises UserError where `latest` can't be read."""
    link = run_dir / "checkpoints" / "latest"
    if not link.exists():
        return None
    try:
        return link.parent / link.read_text(errors="replace").strip()
    except OSError as e:
        raise UserError(f"{link} can't be read: {e.strerror}") from None


def find(run_dir: Path) -> tuple[Path | None, dict | None, list[str]]:
    """The checkpoint to go on from: the newest one, or the one before it where its files are missing or cut.

    Returns (path, meta, warnings about those passed over); (None, None, []) if there is none yet. Raises
    UserError if there are some and all are damaged; and where an intact one has lost its base, because the
    one before it may lie a whole phase back.
    """
    folder, warnings = run_dir / "checkpoints", []
    candidates = [d for d in folder.glob("step_*") if re.fullmatch(r"step_\d{8}(\.old)?", d.name)]
    candidates.sort(key=lambda d: (d.stem, not d.suffix), reverse=True)  # of one step, the *.old last
    newest = latest(run_dir)
    if newest and newest.name in [d.stem for d in candidates]:
        # It may point back, after a roll-back by hand.
        candidates = [d for d in candidates if d.stem <= newest.name]
    elif newest or candidates:  # what stands under its final name is complete
        warnings.append(f"{folder}/latest is missing or names no checkpoint: taking the newest there is")
    for path in candidates:
        try:
            meta = verify(path)
        except UserError as e:
            warnings.append(f"passed over a damaged checkpoint: {e}")
        else:
            get_base(path, meta)
            return path, meta, warnings
    if warnings:
        raise UserError(f"no intact checkpoint in {folder}: {warnings[-1]}")
    return None, None, []


def resolve(target: Path) -> tuple[Path, dict, list[str]]:
    """What `find` returns, for a run directory or for the directory of one checkpoint.

    Raises UserError if it is neither, or damaged, or has lost its base.
    """
    if re.fullmatch(r"step_\d{8}(\.old)?", target.resolve().name):
        if not target.is_dir():
            raise UserError(f"no checkpoint {target}: {explain_checkpoints(target.parent)}")
        found = target, verify(target), []
    else:
        found = find(target)
    path, meta, _ = found
    if path is None and not is_run(target):
        raise UserError(f"{explain_no_run(target)} (or a checkpoint, RUN/checkpoints/step_00001234)")
    if path is None:
        raise UserError(f"{target} has no checkpoint yet")
    check_meta(path, meta)
    get_base(path, meta)
    return found


def explain_checkpoints(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))
    return f"there are {', '.join(names)}" if names else f"{folder} holds none"


def check_meta(path: Path, meta: dict) -> None:
    """Raise UserError if the meta of checkpoint `path` lacks one of META_KEYS."""
    if not meta.keys() >= META_KEYS:
        raise UserError(f"{path}/meta.json is damaged: keys are missing")


def get_named(path: Path, meta: dict) -> dict | None:
    """The "base" that the checkpoint at `path` names, None where it is whole. Raises UserError for what is no
    checkpoint's name and id."""
    state = meta.get("state")
    base = state.get("base") if isinstance(state, dict) else None  # else read_state says what is wrong
    if base is None:
        return None
    if not isinstance(base, dict) or base.keys() != {"checkpoint", "id"}:
        raise UserError(f"{path}/meta.json is damaged: its base is {base!r}")
    if not re.fullmatch(r"step_\d{8}", str(base["checkpoint"])):
        raise UserError(f"{path}/meta.json is damaged: its base is {base!r}")
    return base


def get_base(path: Path, meta: dict | None = None) -> Path | None:
    """The checkpoint from which the frozen weights of the one at `path` are read; None where that is whole.

    Raises UserError where the base is missing, damaged, or another than the one named.
    """
    named = get_named(path, read_meta(path) if meta is None else meta)
    if named is None:
        return None
    name, token = named["checkpoint"], named["id"]
    base = path.resolve().parent / name
    needs = f"{path} holds only what the LoRA phase trains: it needs {name} (id {token}) of its run beside it"
    if not base.exists():
        raise UserError(f"{needs}, which is missing")
    try:
        found = verify(base)
    except UserError as e:
        raise UserError(f"{needs}, which is damaged: {e}") from None
    if found.get("id") != token:
        raise UserError(f"{needs}, and the one there is another (id {found.get('id')})")
    if get_named(base, found):
        raise UserError(f"{needs}, and the one there is not whole itself")
    return base


def find_whole(run_dir: Path, step: int) -> dict | None:
    """The name and id of a run's checkpoint of that step, as a "base" for later ones; None where there is
    none, or it is damaged, or not whole."""
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    try:
        meta = verify(path)
        whole = get_named(path, meta) is None
    except UserError:
        return None
    return {"checkpoint": path.name, "id": meta["id"]} if whole and "id" in meta else None


def kept(run_dir: Path) -> list[tuple[Path, dict]]:
    """The complete checkpoints of a run up to its latest, oldest first, with their meta.

    Left out: those of a past that the run was rolled back from, and those whose meta.json is damaged.
    """
    found, newest = [], latest(run_dir)
    if newest is None:
        return found
    for path in sorted((run_dir / "checkpoints").glob("step_*")):
        if not re.fullmatch(r"step_\d{8}", path.name) or path.name > newest.name:
            continue
        with contextlib.suppress(UserError):
            meta = read_meta(path)
            check_meta(path, meta)
            found.append((path, meta))
    return found


def verify(path: Path) -> dict:
    """The meta of a checkpoint whose files are all there and as long as DCP's index says, or a UserError.

    Of the files of tensors lengths only: reading hundreds of gigabytes on one process to check their bits is
    no start of a job. Those who load them check what they read.
    """
    meta, checksums = read_meta(path), read_checksums(path)
    try:
        index = read_index(path)
    except UserError:
        raise
    except Exception as e:  # a file that is missing, another version's classes
        raise UserError(f"{path / INDEX}: {e or type(e).__name__}") from None
    needed: dict[str, int] = {}
    for item in index.storage_data.values():
        needed[item.relative_path] = max(needed.get(item.relative_path, 0), item.offset + item.length)
    for name, size in needed.items():
        try:
            there = (path / name).stat().st_size
        except FileNotFoundError:
            raise UserError(f"{path / name} is missing") from None
        except OSError as e:
            raise UserError(f"{path / name} can't be read: {e.strerror}") from None
        if name not in checksums:
            raise UserError(f"{path / CHECKSUMS} is damaged: it has no {name}")
        if there < size:
            raise UserError(f"{path / name} is cut short: {there} of {size} bytes")
    return meta


def read_meta(path: Path) -> dict:
    """A checkpoint's meta.json: what `save` was given as `meta`, `pinned` and `id`. Raises UserError if it is
    damaged."""
    meta = read_json(path / META)
    check_file(path, META)
    return meta


def prune(newest: Path) -> None:
    """Delete what is older than the last two intact ones, `newest` being the last, and neither pinned nor the
    base of one that stays.

    Left alone are later steps (of a run rolled back by hand) until training comes by them again, and a
    checkpoint whose meta.json can't be read.
    """
    named = [d for d in newest.parent.iterdir() if re.fullmatch(r"step_\d{8}", d.name)]
    intact, bases = 0, set()
    for old in sorted(named, reverse=True):  # a base is older than what names it
        try:
            meta = read_meta(old)
            base = get_named(old, meta)
        except UserError:
            continue
        keep = meta.get("pinned", True) or old.name in bases or old.name > newest.name
        if intact < 2 and old.name <= newest.name:
            keep = True
            with contextlib.suppress(UserError):  # nor does one count whose base is another by now
                verify(old)
                get_base(old)
                intact += 1
        if keep and base:
            bases.add(base["checkpoint"])
        if not keep:
            # First, so that a kill in mid-deletion leaves no half checkpoint under that name.
            os.replace(old, old.with_suffix(".tmp"))
            shutil.rmtree(old.with_suffix(".tmp"))
