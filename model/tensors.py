"""A folder of tensors by name, written and read by torch.distributed.checkpoint (DCP): each process its own
shards; and the checksums of its files.

CHECKSUMS has the CRC-32 of every other file of the folder, in hexadecimal: {"crc32": {file name: checksum}}.
Each process computes those of the files that it has written, and checks a file before it reads anything of
it. That sees what a disk or a network has changed, not what somebody has changed on purpose. Of the checksums
that Python comes with CRC-32 is the fastest: 4 GB/s on one core of an AMD EPYC (SHA-256 1.7, BLAKE2b 0.9).

What goes wrong there reaches every process wrapped in a BaseException of DCP's own, Ctrl-C and bugs included;
here it becomes what it was.
"""

import contextlib
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from errors import SharedError, UserError
from files import read_json

CHECKSUMS = "checksums.json"
INDEX = ".metadata"  # DCP's own name for it
BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError)  # for these no disk is to blame


class Damaged(SharedError):
    """A file is not what was written."""


def write_tensors(path: Path, tensors: dict[str, Tensor], what: str) -> dict[str, str]:
    """Write `tensors` into the new folder `path`. Returns the checksum of each of its files but the index, by
    name, of all processes. All processes together.

    Raises SharedError, which says that `what` can't be written, where the disk refuses; RuntimeError for a
    bug.
    """
    writer = Writer(path)
    try:
        with quietly():
            dcp.save(tensors, checkpoint_id=path, storage_writer=writer)
    except CheckpointException as e:
        cause = get_cause(e)
        if isinstance(cause, BUGS):
            raise RuntimeError(f"a bug in writing {what}: {type(cause).__name__}: {cause}") from cause
        raise explain(cause, f"can't write {what}") from None
    except OSError as e:  # of this process alone
        raise UserError(f"can't write {what}: {e}") from None
    every = [writer.checksums]
    if dist.is_initialized():
        every = [{}] * dist.get_world_size()
        dist.all_gather_object(every, writer.checksums)
    return {name: checksum for checksums in every for name, checksum in checksums.items()}


def read_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place from the folder `path`, by their names in it. All processes together.

    Raises SharedError for a name that is missing or has another shape there, Damaged for a file that any
    process reads and whose checksum is wrong.
    """
    try:
        with quietly():
            dcp.load(tensors, storage_reader=Reader(path))
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
    names. Raises Damaged as `read_index`."""
    stored = read_index(path).state_dict_metadata
    return {name.removeprefix(prefix): info for name, info in stored.items() if name.startswith(prefix)}


class Writer(dcp.FileSystemWriter):
    """Raises the first cause of a failure: on its way to other processes an exception loses its causes, "no
    space left" among them."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.checksums: dict[str, str] = {}  # of the files that this process has written, by name

    def write_data(self, *args):
        try:
            written = super().write_data(*args)
            for name in {result.storage_data.relative_path for result in written.value()}:
                self.checksums[name] = get_checksum(Path(self.path, name))
        except Exception as e:
            raise first_cause(e) from None
        return written


class Reader(dcp.FileSystemReader):
    """Checks each file before it reads from it, the index before it unpickles it."""

    # With a parameter called kwargs DCP would ask anew, for an index of this process's own: there is none.
    def read_metadata(self, *args, **options) -> Metadata:
        check_file(Path(self.path), INDEX)
        return super().read_metadata(*args, **options)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner):
        for name in sorted({self.storage_data[item.storage_index].relative_path for item in plan.items}):
            check_file(Path(self.path), name)
        return super().read_data(plan, planner)


def read_index(path: Path) -> Metadata:
    """What DCP has noted of the tensors in the folder `path`. Raises Damaged where that is not what was
    written."""
    return Reader(path).read_metadata()


# ---- checksums


def get_checksum(path: Path) -> str:
    """The CRC-32 of a file, eight hexadecimal digits."""
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"


def read_checksums(folder: Path) -> dict[str, str]:
    """The checksums of a folder's files by name. Raises UserError where they are missing or damaged."""
    if folder.is_dir() and not (folder / CHECKSUMS).exists():
        raise UserError(f"{folder / CHECKSUMS} is missing: nobody knows whether its files are as written")
    checksums = read_json(folder / CHECKSUMS).get("crc32")
    if not isinstance(checksums, dict):
        raise UserError(f"{folder / CHECKSUMS} is damaged: it has no crc32")
    return checksums


def check_file(folder: Path, name: str) -> None:
    """Raise Damaged unless the file `name` of `folder` has the checksum that was noted when it was
    written."""
    noted, found = read_checksums(folder).get(name), get_checksum(folder / name)
    if found != noted:
        raise Damaged(
            f"{folder / name} is damaged, it is not what was written: its CRC-32 is {found}, "
            f"{CHECKSUMS} has {noted}"
        )


# ---- causes


def get_cause(e: CheckpointException) -> BaseException:
    """What went wrong first, on the first of the processes that failed."""
    return first_cause(next(iter(e.failures.values()))[0])


def first_cause(e: BaseException) -> BaseException:
    while e.__context__:
        e = e.__context__
    return e


def explain(cause: BaseException, what: str) -> BaseException:
    """The SharedError of one line to raise for `cause`; Ctrl-C and Damaged stay what they are."""
    if isinstance(cause, (KeyboardInterrupt, Damaged)):
        return cause
    return SharedError(f"{what}: {str(cause) or type(cause).__name__}")
