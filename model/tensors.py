"""A folder of tensors by name, written and read by torch.distributed.checkpoint (DCP): each process its own
shards.

What goes wrong there reaches every process wrapped in a BaseException of DCP's own, Ctrl-C and bugs included;
here it becomes what it was.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from errors import SharedError, UserError

BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError)  # for these no disk is to blame


def write_tensors(path: Path, tensors: dict[str, Tensor], what: str) -> None:
    """Write `tensors` into the new folder `path`. All processes together.

    Raises SharedError, which says that `what` can't be written, where the disk refuses; RuntimeError for a
    bug.
    """
    try:
        with quietly():
            dcp.save(tensors, checkpoint_id=path, storage_writer=Writer(path))
    except CheckpointException as e:
        cause = get_cause(e)
        if isinstance(cause, BUGS):
            raise RuntimeError(f"a bug in writing {what}: {type(cause).__name__}: {cause}") from cause
        raise explain(cause, f"can't write {what}") from None
    except OSError as e:  # of this process alone
        raise UserError(f"can't write {what}: {e}") from None


def read_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place from the folder `path`, by their names in it. All processes together.

    Raises SharedError for a name that is missing or has another shape there, and a damaged file, of which
    torch may say anything.
    """
    try:
        with quietly():
            dcp.load(tensors, checkpoint_id=path)
    except CheckpointException as e:
        raise explain(get_cause(e), f"can't load {path}") from None


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without DCP's warning that there is one process, where that is so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def get_stored(path: Path, prefix: str) -> dict[str, TensorStorageMetadata]:
    """Shape and precision of the tensors in `path` whose names begin with `prefix`, by the rest of their
    names."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return {name.removeprefix(prefix): info for name, info in stored.items() if name.startswith(prefix)}


class Writer(dcp.FileSystemWriter):
    """Raises the first cause of a failure: on its way to other processes an exception loses its causes, "no
    space left" among them."""

    def write_data(self, *args):
        try:
            return super().write_data(*args)
        except Exception as e:
            raise first_cause(e) from None


def get_cause(e: CheckpointException) -> BaseException:
    """What went wrong first, on the first of the processes that failed."""
    return first_cause(next(iter(e.failures.values()))[0])


def first_cause(e: BaseException) -> BaseException:
    while e.__context__:
        e = e.__context__
    return e


def explain(cause: BaseException, what: str) -> BaseException:
    """The SharedError of one line to raise for `cause`; Ctrl-C stays what it is."""
    if isinstance(cause, KeyboardInterrupt):
        return cause
    return SharedError(f"{what}: {str(cause) or type(cause).__name__}")
