"""The code as it is at the submission: a copy that later edits don't reach, from which every start of a job
runs.
"""

import os
import shutil
import subprocess
from pathlib import Path

from errors import UserError

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 200e6  # more is not code


def take_snapshot(target: Path) -> int:
    """Copy the repository's files, tracked and untracked but not ignored, to `target`. Returns their number.

    Raises UserError where git can't list them, where they are too large to be code, and where they can't be
    copied.
    """
    files = list_files()
    sizes = {name: (ROOT / name).stat().st_size for name in files}
    total = sum(sizes.values())
    if total > MAX_BYTES:
        raise UserError(
            f"a snapshot of the code would have {total / 1e6:,.0f} MB, {max(sizes, key=sizes.get)} the most: "
            "put what is not code in .gitignore"
        )
    kernels = ROOT.glob("data/__pycache__/*.nb[ic]")  # numba's: compiling them takes half a minute
    files += [path.relative_to(ROOT) for path in kernels]
    for name in files:
        copy(ROOT / name, target / name)
    return len(files)


def list_files() -> list[Path]:
    """The repository's files that git doesn't ignore, relative to ROOT."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True)
    except OSError as error:  # no git
        raise UserError(f"git can't list the files of {ROOT} for the snapshot: {error.strerror}") from None
    if listed.returncode:
        reason = listed.stderr.decode(errors="replace").strip()
        raise UserError(f"git can't list the files of {ROOT} for the snapshot: {reason}")
    names = [Path(name) for name in os.fsdecode(listed.stdout).split("\0") if name]
    return [name for name in names if (ROOT / name).is_file()]  # a deleted file is still tracked


def get_preset_in(snapshot: Path, preset: Path) -> Path:
    """Where a preset, given by its absolute path, lies in the snapshot; one from elsewhere, or one that git
    ignores, is put there.
    """
    if preset.is_relative_to(ROOT):
        target = snapshot / preset.relative_to(ROOT)
    else:
        target = snapshot / Path("presets", *preset.parts[1:])
    if not target.exists():
        copy(preset, target)
    return target


def copy(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
    except OSError as error:
        raise UserError(f"can't copy {source} to {target}: {error.strerror}") from None
