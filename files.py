"""Files that are whole or absent, and a sentence where one is damaged."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from errors import UserError

ABANDONED = 24 * 3600  # seconds after which another machine's temporary, which nobody holds, is a leftover


def write_json(path: Path, value) -> None:
    """Write JSON through a temporary name, so that a killed process leaves the old file or the new one.

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
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{secrets.token_hex(4)}.tmp")
    with open(partial, "xb") as file:
        try:
            with contextlib.suppress(OSError):  # a file system without locks: its leftovers stay
                fcntl.flock(file, fcntl.LOCK_EX)
            yield partial
        finally:
            partial.unlink(missing_ok=True)


def remove_leftovers(folder: Path, pattern: str, patience: float = ABANDONED) -> list[Path]:
    """Delete, and return, the files of that pattern that `temporary` made and nobody holds any more.

    Not all shared file systems tell one machine what another one holds: what another one made must be
    `patience` seconds old, 0 for a folder on a local disk.
    """
    removed = []
    for leftover in sorted(folder.glob(pattern)):
        # Some process holds it, or was faster to remove it, or it is another user's.
        with contextlib.suppress(OSError), open(leftover, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            age = time.time() - leftover.stat().st_mtime
            if f".{socket.gethostname()}." in leftover.name or age >= patience:
                leftover.unlink()
                removed.append(leftover)
    return removed
