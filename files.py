"""JSON files of a run directory: whole or absent, and a sentence where one is damaged."""

import json
import os
from pathlib import Path

from errors import UserError


def write_json(path: Path, value) -> None:
    """Write JSON through a temporary name, so that a killed process leaves the old file or the new one.

    Raises UserError, naming the file, where the disk refuses.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        partial.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(partial, path)
    except OSError as error:
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
