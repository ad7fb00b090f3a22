"""numba's decorators, for functions that are kept compiled on disk. All of data/ takes them from here.

numba keeps them in __pycache__ beside the source or in the user's cache folder, and raises on import where
neither can be written: a shared installation, a container, no home. Then they go into a folder of this user's
under the system's for temporary files, which this says; so too where NUMBA_CACHE_DIR can't be written.
"""

import os
import stat
import sys
import tempfile
from pathlib import Path

import numba
from numba import njit, prange, types

from errors import UserError

__all__ = ["njit", "prange", "types"]


def ensure_cache() -> None:
    """See above. Raises UserError where there is no folder for temporary files either."""
    asked = os.environ.get("NUMBA_CACHE_DIR")
    why = explain_folder(asked) if asked else ""
    if (asked and not why) or (not asked and has_cache()):
        return
    if not asked:
        here = Path(__file__).parent / "__pycache__"
        why = f"neither {here} nor numba's cache in the home folder can be written"
    try:
        folder = str(make_own_folder())
    except OSError as error:
        raise UserError(
            f"numba can't keep its compiled functions ({error}): set NUMBA_CACHE_DIR to a folder that can be "
            "written"
        ) from None
    os.environ["NUMBA_CACHE_DIR"] = folder  # for processes that this one starts
    numba.config.reload_config()
    if os.environ.get("RANK", "0") == "0":
        chooses = "" if asked else " (NUMBA_CACHE_DIR chooses another)"
        print(f"note: {why}: functions are kept compiled in {folder}{chooses}", file=sys.stderr)


def explain_folder(folder: str) -> str:
    """Why the folder that NUMBA_CACHE_DIR names can't be written; "" where it can."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"NUMBA_CACHE_DIR={folder} can't be written ({error.strerror})"
    return ""


def has_cache() -> bool:
    """Whether numba finds a place by itself for what is compiled in this folder: it says so by raising."""
    try:
        njit(cache=True)(lambda: None)
    except RuntimeError:
        return False
    return True


def make_own_folder() -> Path:
    """A folder that nobody else can write, because numba unpickles what it finds there: the same one each
    time or, if another user has taken its name, a new one."""
    folder = Path(tempfile.gettempdir(), f"prelora-numba-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    found = folder.lstat()
    is_private = found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o077
    if not (is_private and stat.S_ISDIR(found.st_mode)):
        return Path(tempfile.mkdtemp(prefix="prelora-numba-"))
    tempfile.TemporaryFile(dir=folder).close()
    return folder


ensure_cache()
