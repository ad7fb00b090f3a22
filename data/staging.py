"""Copying .beton files to a node's local disk at the start of a run."""

import os
import shutil
from pathlib import Path

from tqdm import tqdm

from data.beton import check_beton, find_beton
from errors import UserError
from files import remove_leftovers, temporary


def get_staged_dir(data_dir: str | Path, stage_dir: str | Path) -> Path:
    """Where `stage` puts data_dir's files: its whole path under stage_dir, so that no two data sets meet."""
    return Path(stage_dir, *Path(data_dir).resolve().parts[1:])


def stage(dataset: str, data_dir: str | Path, stage_dir: str | Path, show: bool = True) -> None:
    """Copy data_dir's .beton files, and the .json beside them, to get_staged_dir(data_dir, stage_dir).

    Those that are there with the same size and time of change are left alone. A copy appears under its name
    only when whole. show: a progress bar. Raises UserError on missing or damaged files and where they don't
    fit, before anything is copied; and on a disk that doesn't take them.
    """
    target, files = get_staged_dir(data_dir, stage_dir), []
    for split in ("train", "val"):
        path = find_beton(dataset, data_dir, split)
        check_beton(path)
        files += [path, path.with_suffix(".json")]
    try:
        target.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target, "*.tmp")
        files = [file for file in files if _get_identity(file) != _get_identity(target / file.name)]
        total = sum(file.stat().st_size for file in files if file.exists())
        free = shutil.disk_usage(target).free
        if total > free:
            raise UserError(
                f"stage_dir {stage_dir} has {free / 1e9:.1f} GB free, the data needs {total / 1e9:.1f} GB"
            )
        hidden = not (files and show)
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"staging to {target}", disable=hidden) as bar:
            for file in files:
                if file.exists():
                    _copy(file, target, bar)
                else:  # FFCV's own writer makes no .json
                    (target / file.name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(str(error)) from None


def _get_identity(path: Path) -> tuple[int, int] | None:
    """(bytes, second of the last change), None for a file that isn't there."""
    if not path.exists():
        return None
    return path.stat().st_size, int(path.stat().st_mtime)


def _copy(file: Path, target: Path, bar: tqdm) -> None:
    """Copy a file into the folder `target` under a temporary name, and only then under its own."""
    with temporary(target / file.name) as partial, open(file, "rb") as source, open(partial, "wb") as copy:
        before = os.fstat(source.fileno())
        while piece := source.read(1 << 24):
            copy.write(piece)
            bar.update(len(piece))
        after = os.fstat(source.fileno())
        if (copy.tell(), after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise UserError(f"{file} was changed while it was copied")
        copy.flush()
        # Or a crash could leave a file of the right size and time without its content.
        os.fsync(copy.fileno())
        os.utime(partial, ns=(before.st_atime_ns, before.st_mtime_ns))
        os.replace(partial, target / file.name)
