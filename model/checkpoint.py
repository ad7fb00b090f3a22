"""Checkpoints of a run: torch.distributed.checkpoint for the tensors, meta.json for everything a person may want to read.

Every rank writes its own shards and reads what it needs of them, so a checkpoint loads on any number of ranks.

    RUN/checkpoints/step_00001234/   one fresh directory per save, complete or absent: written as *.tmp, then renamed;
                                     one of that name which stands there already is *.old for that moment
    RUN/checkpoints/latest           the name of the newest one, replaced atomically after the rename

DCP's `.metadata` is a pickle: load only your own runs. To share weights, export them to safetensors.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from model.distributed import SharedError, on_rank_0
from model.optim import get_optimizer_state, set_optimizer_state


def save(run_dir: Path, model: nn.Module, optimizer, meta: dict, pinned: bool) -> Path:
    """Write model, optimiser and `meta` as step_<meta["step"]>, move `latest` to it, prune the others. All ranks together.

    The last two intact checkpoints are kept, and every `pinned` one. Raises OSError (disk full, say), on every rank, with
    `latest` still at the checkpoint before.
    """
    final = run_dir / "checkpoints" / f"step_{meta['step']:08d}"
    tmp = final.with_suffix(".tmp")
    on_rank_0(remove_leftovers, final.parent)
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for name, state in get_optimizer_state(model, optimizer).items():
        tensors |= {f"optimizer.{name}.{key}": t for key, t in state.items()}
    try:
        dcp.save(tensors, checkpoint_id=tmp, storage_writer=Writer(tmp))
    except CheckpointException as e:
        raise unwrap(e, f"can't write {final}") from None
    on_rank_0(complete, tmp, final, meta | {"pinned": pinned})
    return final


class Writer(dcp.FileSystemWriter):
    """Raises the first cause of a failure: on its way to the other ranks an exception loses its causes, "no space left" among them."""

    def write_data(self, *args):
        try:
            return super().write_data(*args)
        except Exception as e:
            raise first_cause(e) from None


def remove_leftovers(folder: Path) -> None:
    for leftover in folder.glob("step_*.tmp"):  # of a killed process or a full disk
        shutil.rmtree(leftover)
    for old in folder.glob("step_*.old"):
        if old.with_suffix("").exists():
            shutil.rmtree(old)


def complete(tmp: Path, final: Path, meta: dict) -> None:
    """Every rank's shards are in `tmp`: make it the newest checkpoint, and only then delete older ones."""
    write_json(tmp / "meta.json", meta)
    old = final.with_suffix(".old")
    if final.exists():  # saved on a signal before the epoch's evaluation, or damaged, or from before a roll-back
        os.replace(final, old)  # where `find` looks too, should a kill come here
    os.replace(tmp, final)
    link = final.parent / "latest"
    link.with_suffix(".tmp").write_text(final.name)
    os.replace(link.with_suffix(".tmp"), link)
    shutil.rmtree(old, ignore_errors=True)
    prune(final)


def load(path: Path, model: nn.Module, optimizer) -> None:
    """Restore weights and optimiser state in place, by name. Parameters whose optimiser state the checkpoint lacks (an adapter
    that has not stepped yet) start fresh. Raises OSError for a weight that is missing or has another shape, or a damaged file."""
    load_weights(path, model)
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {}
    for name, p in model.named_parameters():
        keys = [key for key in ("exp_avg", "exp_avg_sq", "step") if f"optimizer.{name}.{key}" in saved]
        if keys and p.requires_grad:
            state[name] = {key: torch.zeros((), device=p.device) if key == "step" else torch.zeros_like(p.detach()) for key in keys}
    flat = {f"optimizer.{name}.{key}": t for name, s in state.items() for key, t in s.items()}
    if flat:
        try:
            dcp.load(flat, checkpoint_id=path)
        except CheckpointException as e:
            raise unwrap(e, f"can't load {path}") from None
    set_optimizer_state(model, optimizer, state)


def load_weights(path: Path, model: nn.Module) -> None:
    """Restore weights alone, in place, by name, each in the model's own precision. Raises OSError as `load` does."""
    try:
        dcp.load({f"model.{name}": t for name, t in model.state_dict().items()}, checkpoint_id=path)
    except CheckpointException as e:
        raise unwrap(e, f"can't load {path}") from None


def get_stored_dtypes(path: Path) -> dict[str, torch.dtype]:
    """The precision in which each of the model's parameters lies in a checkpoint."""
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return {key.removeprefix("model."): m.properties.dtype for key, m in saved.items() if key.startswith("model.")}


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    link = run_dir / "checkpoints" / "latest"
    return link.parent / link.read_text(errors="replace").strip() if link.exists() else None


def find(run_dir: Path) -> tuple[Path | None, dict | None, list[str]]:
    """The checkpoint to go on from: the newest one, or, where its files are missing or cut short, the one before it.

    Returns (path, meta, warnings about those passed over); (None, None, []) if there is none yet. Raises ValueError if there
    are some and all are damaged.
    """
    folder, warnings = run_dir / "checkpoints", []
    candidates = sorted((d for d in folder.glob("step_*") if re.fullmatch(r"step_\d{8}(\.old)?", d.name)),
                        key=lambda d: (d.stem, not d.suffix), reverse=True)
    newest = latest(run_dir)
    if newest and newest.name in [d.stem for d in candidates]:
        candidates = [d for d in candidates if d.stem <= newest.name]  # it may point back, after a roll-back by hand
    elif newest or candidates:  # what stands under its final name is complete
        warnings.append(f"{folder}/latest is missing or names no checkpoint: taking the newest there is")
    for path in candidates:
        try:
            meta = verify(path)
            return path, meta, warnings
        except (ValueError, OSError) as e:
            warnings.append(f"passed over a damaged checkpoint: {e}")
    if warnings:
        raise ValueError(f"no intact checkpoint in {folder}: {warnings[-1]}")
    return None, None, []


def resolve(target: Path) -> tuple[Path, dict, list[str]]:
    """What `find` returns, for a run directory or for the directory of one checkpoint. Raises ValueError or OSError, in one sentence, if it
    is neither, or damaged."""
    if re.fullmatch(r"step_\d{8}(\.old)?", target.resolve().name) and target.is_dir():
        found = target, verify(target), []
    else:
        found = find(target)
    if found[0] is None:
        raise ValueError(f"{target} is neither a run with a checkpoint nor a checkpoint (RUN/checkpoints/step_00001234)")
    if not {"state", "config"} <= found[1].keys():
        raise ValueError(f"{found[0]}/meta.json is damaged: keys are missing")
    return found


def kept(run_dir: Path) -> list[tuple[Path, dict]]:
    """The complete checkpoints of a run up to its latest, oldest first, with their meta. Left out: those of a past that the run was rolled
    back from, and those whose meta.json is damaged."""
    found, newest = [], latest(run_dir)
    for path in sorted((run_dir / "checkpoints").glob("step_*")):
        if re.fullmatch(r"step_\d{8}", path.name) and newest and path.name <= newest.name:
            with contextlib.suppress(ValueError, OSError):
                meta = read_meta(path)
                if {"state", "config", "train_images"} <= meta.keys():
                    found.append((path, meta))
    return found


def verify(path: Path) -> dict:
    """The meta of a checkpoint whose files are all there and as long as DCP's index says. Raises ValueError or OSError otherwise.

    Lengths only: reading hundreds of gigabytes to check their bits is no start of a job.
    """
    meta = read_meta(path)
    try:
        index = dcp.FileSystemReader(path).read_metadata()
    except Exception as e:  # whatever unpickling a damaged file raises
        raise ValueError(f"{path}/.metadata: {e or type(e).__name__}") from None
    needed: dict[str, int] = {}
    for item in index.storage_data.values():
        needed[item.relative_path] = max(needed.get(item.relative_path, 0), item.offset + item.length)
    for name, size in needed.items():
        if not (path / name).exists():
            raise ValueError(f"{path / name} is missing")
        if (path / name).stat().st_size < size:
            raise ValueError(f"{path / name} is cut short: {(path / name).stat().st_size} of {size} bytes")
    return meta


def read_meta(path: Path) -> dict:
    """A checkpoint's meta.json: what `save` was given as `meta`, and `pinned`. Raises ValueError, naming the file, if it is damaged."""
    return read_json(path / "meta.json")


def prune(newest: Path) -> None:
    """Delete what is older than the last two intact ones, `newest` being the last, and not pinned. Later steps (of a run rolled back
    by hand) are left alone until training comes by them again, and so is a checkpoint whose meta.json can't be read."""
    complete = sorted(d for d in newest.parent.iterdir() if re.fullmatch(r"step_\d{8}", d.name) and d.name <= newest.name)
    intact = 0
    for old in reversed(complete):
        try:
            if intact < 2:
                verify(old)
                intact += 1
                continue
            pinned = read_meta(old)["pinned"]
        except (ValueError, OSError):
            pinned = True
        if not pinned:
            os.replace(old, old.with_suffix(".tmp"))  # first, so that a kill in mid-deletion leaves no half checkpoint
            shutil.rmtree(old.with_suffix(".tmp"))


def unwrap(e: CheckpointException, what: str) -> BaseException:
    """DCP wraps whatever went wrong, Ctrl-C included, in a BaseException of its own: the cause as an OSError of one line, on every rank."""
    cause = first_cause(next(iter(e.failures.values()))[0])
    return cause if isinstance(cause, KeyboardInterrupt) else SharedError(f"{what}: {str(cause) or type(cause).__name__}")


def first_cause(e: BaseException) -> BaseException:
    while e.__context__:
        e = e.__context__
    return e


def write_json(path: Path, value) -> None:
    """Write JSON through a temporary name, so that a killed process leaves the old file or the new one."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(tmp, path)


def read_json(path: Path):
    """Raises ValueError, naming the file, if it holds no JSON object."""
    try:
        value = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path} is damaged: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: not a JSON object")
    return value
