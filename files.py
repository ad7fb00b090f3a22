"""Files that are whole or absent, and a sentence where one is damaged; paths as a person writes them; and
what is said of a path that is no run's."""

import contextlib
import difflib
import fcntl
import json
import os
import secrets
import socket
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from errors import UserError

PATH = "a path"
PathStr = Annotated[str, PATH]  # a dataclass's field that `expand_paths` looks at
ABANDONED = 24 * 3600  # seconds after which another machine's temporary, which nobody holds, is a leftover


def write_json(path: Path, value) -> None:
    """Write JSON through a temporary name, so that a killed process leaves the old file or the new one.

    That name is always the same, so that the next write takes it again: for a file with one writer.

    Raises UserError, naming the file, where the disk refuses.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        partial.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"{path} can't be written: {error.strerror or error}") from None


def read_json(path: Path) -> dict:
    """Raises UserError, naming the file, if it is missing, can't be read or holds no JSON object."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: not a JSON object")
    return value


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """The name of a new, empty file beside `path`, to write and then to rename; what still stands there at
    the end is deleted.

    Inside, this process holds the file by an flock, which ends with the process however that ends: what
    nobody holds is a leftover. Raises OSError where the machine refuses.
    """
    file, partial = hold_new_file(path)
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)
        file.close()


def hold_new_file(path: Path) -> tuple[typing.BinaryIO, Path]:
    """A new file beside `path` with an flock on it, and its name."""
    while True:
        partial = path.with_name(f"{path.name}.{socket.gethostname()}.{secrets.token_hex(4)}.tmp")
        file = open(partial, "xb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: its leftovers stay
            return file, partial
        if partial.exists():
            return file, partial
        file.close()  # `remove_leftovers` of another process came before the lock


def remove_leftovers(folder: Path, pattern: str) -> list[Path]:
    """Delete, and return, the files of that pattern that `temporary` made and nobody holds any more.

    Not all shared file systems tell one machine what another one holds: what another one made must be
    ABANDONED seconds old.
    """
    removed = []
    for leftover in sorted(folder.glob(pattern)):
        # Some process holds it, or was faster to remove it, or it is another user's.
        with contextlib.suppress(OSError), open(leftover, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            age = time.time() - leftover.stat().st_mtime
            if f".{socket.gethostname()}." in leftover.name or age >= ABANDONED:
                leftover.unlink()
                removed.append(leftover)
    return removed


# ---- paths


def expand_home(path: str) -> str:
    """`path` with the home directory for a leading ~ or ~user, which a shell puts in place only where the ~
    begins a word: not in --run_dir=~/x, nor in a preset. Raises UserError where none is known."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(
            f"{path}: no home directory is known for {path.split('/')[0]} (a file's name: ./{path})"
        )
    return expanded


def get_absolute(path: str) -> str:
    """`path` from the root, with a leading ~ as `expand_home` has it. Raises UserError as that does."""
    return os.path.abspath(expand_home(path))


def get_path_names(kind: type) -> list[str]:
    """The fields of a dataclass that are paths: PathStr, or with None, or a tuple of them."""
    names = []
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if any(PATH in getattr(part, "__metadata__", ()) for part in (hint, *typing.get_args(hint))):
            names.append(name)
    return names


def expand_paths(values: object) -> None:
    """`expand_home` on every path in a dataclass instance, in place. Raises UserError, naming the field."""
    for name in get_path_names(type(values)):
        value = getattr(values, name)
        try:
            if isinstance(value, tuple):
                setattr(values, name, tuple(map(expand_home, value)))
            elif value is not None:
                setattr(values, name, expand_home(value))
        except UserError as error:
            raise UserError(f"{name} = {error}") from None


# ---- what is no run


def is_run(folder: str | Path) -> bool:
    """Whether a run has begun in the folder."""
    return any(os.path.isfile(Path(folder, name)) for name in ("metrics.jsonl", "checkpoints/latest"))


def find_run_above(path: str | Path) -> Path | None:
    """The run in whose folder `path` lies, which need not exist; given as `path` is, relative or absolute."""
    for folder in Path(os.path.abspath(path)).parents:
        if is_run(folder):
            return folder if os.path.isabs(path) else Path(os.path.relpath(folder))
    return None


def explain_no_run(path: str | Path) -> str:
    """Why `path` is no run's folder, and which runs there are, similar names first: a sentence."""
    path = Path(path)
    run = find_run_above(path)
    if run:
        return f"{path} lies inside the run {run}: give {run}"
    inside = list_runs(path)
    if inside:
        return f"{path} is no run, it holds the runs {inside}"
    what = f"{path} is no run" if path.exists() else f"no run directory {path}"
    if not path.parent.is_dir():
        return f"{what}: there is no folder {path.parent}"
    beside = list_runs(path.parent, path.name)
    if not beside:
        return f"{what}: there is no run in {path.parent}"
    return f"{what}, the runs in {path.parent} are {beside}"


def list_runs(folder: Path, near: str = "") -> str:
    """The names of the runs in a folder, six at most, those that are spelt like `near` first; "" for none."""
    try:
        names = sorted(path.name for path in folder.iterdir() if is_run(path))
    except OSError:  # there is no such folder, or it may not be read
        return ""
    first = difflib.get_close_matches(near, names, n=6)
    names = first + [name for name in names if name not in first]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more
