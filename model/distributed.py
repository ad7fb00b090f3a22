"""The processes of a run: how they start, agree, heed a signal, and what is said when one of them is lost.

torchrun, srun or mpiexec start one process per GPU and set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
With one process no process group exists and everything here is a no-op.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=10)  # until a collective that some rank has not joined ends the run
PATIENCE = timedelta(hours=2)  # of ranks that wait for another on their node to copy files
REQUEUE = (
    os.EX_TEMPFAIL
)  # 75, the exit status of a run that was told to stop and wants to go on: "temporary failure, try again"


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def get_host() -> str:
    """This node's name: Slurm's, where it has one, because that is the name its commands take."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


# ---------------------------------------------------------------------------------------------------------------------------------
# start and end


def start() -> torch.device:
    """Join the other processes of the run, if there are any. Returns this one's device: cuda:LOCAL_RANK, or the CPU.

    Raises ValueError or RuntimeError for a launcher's environment that is incomplete, a LOCAL_RANK without a GPU, ranks that
    don't come.
    """
    cuda, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK {local_rank} has no GPU: this node has {torch.cuda.device_count()}, start so many processes on it"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives remembered
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    # gloo for what lies on the CPU: agreement, checkpoints' plans
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    return device


def finish() -> None:
    """Leave together. Only for a run that ended well: after an error another rank may never come."""
    if dist.is_initialized():
        dist.barrier()  # or the exit of one sometimes aborts another
        dist.destroy_process_group()


def exit(main: Callable[[list[str]], int], argv: list[str]) -> None:
    """Run `main` and leave with its status. After a failure on several ranks at once: a communicator that waits for a rank that never
    comes would keep the process."""
    try:
        status = main(argv)
    except Exception:
        traceback.print_exc()
        status = 1
    if status and dist.is_initialized():
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@contextlib.contextmanager
def rank_log(run_dir: Path):
    """RUN/logs/rank_0003.log: what rank 3 prints (rank 0 keeps the console) and, of every rank, where it ran and how it failed.

    Yields log(text, console=True), which writes a line, with the traceback of the exception being handled, to this rank's log and
    without it to the console. With one process there is the console only. NCCL's watchdog, if a collective times out, writes
    the flight recorder of every rank beside it, as flight_recorder_RANK for `torchfrtrace`.
    """
    if get_world_size() == 1:
        yield lambda text, console=True: print(text, file=sys.stderr)
        return
    rank, path = get_rank(), run_dir / "logs" / f"rank_{get_rank():04d}.log"
    path.parent.mkdir(exist_ok=True)
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str((path.parent / "flight_recorder_").absolute()))
    redirected = [(fd, os.dup(fd)) for fd in (1, 2)] if rank else []
    with open(path, "ab", buffering=0) as file, os.fdopen(os.dup(2), "w") as stderr:

        def log(text: str, console: bool = True) -> None:
            where = traceback.format_exc() if sys.exc_info()[0] else ""
            with contextlib.suppress(OSError):  # a full disk, which the console must hear of
                file.write(f"{time.strftime('%F %T')} rank {rank}: {text}\n{where}".encode(errors="replace"))
            if console:
                print(f"rank {rank}: {text}" if rank else text, file=stderr, flush=True)

        log(f"starts on {get_host()}, pid {os.getpid()}, {get_world_size()} ranks", console=False)
        faulthandler.enable(file)
        try:
            sys.stdout.flush(), sys.stderr.flush()
            for fd, _ in redirected:
                os.dup2(file.fileno(), fd)
            yield log
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for fd, original in redirected:
                os.dup2(original, fd)
                os.close(original)
            faulthandler.enable()


# ---------------------------------------------------------------------------------------------------------------------------------
# agreement


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place; on a GPU nothing waits."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks(value: float, device: torch.device) -> float:
    """The largest of the ranks' values, on every rank. A sync."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def gather(value) -> list:
    """Every rank's value (pickled), in the order of ranks, on every rank."""
    values = [value] * get_world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def agree(error: str | None) -> str | None:
    """The first rank's error, on every rank, or None if no rank has one: so that all of them stop, or none."""
    if not dist.is_initialized():
        return error
    errors = gather(error and f"{error} (on {get_host()})")
    bad = [rank for rank, e in enumerate(errors) if e]
    if not bad:
        return None
    return error if len(bad) == len(errors) and error else f"rank {bad[0]}: {errors[bad[0]]}"


@contextlib.contextmanager
def together():
    """What one rank raises in here (ValueError, OSError, RuntimeError) is raised on all of them at the end, as a ValueError. No
    collectives inside: a rank that failed would not join."""
    error = None
    try:
        yield
    except (ValueError, OSError, RuntimeError) as e:
        error = str(e)
    if error := agree(error):
        raise ValueError(error)


class SharedError(OSError):
    """An OSError that every rank raises, whichever met it."""


def on_rank_0(function: Callable, *args):
    """Call `function` on rank 0 while the others wait; every rank gets its result, or its ValueError, or its OSError as a SharedError."""
    outcome = [None, None]  # result, error
    if get_rank() == 0:
        try:
            outcome[0] = function(*args)
        except (ValueError, OSError) as e:
            outcome[1] = ValueError(str(e)) if isinstance(e, ValueError) else SharedError(str(e))
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1]:
        raise outcome[1]
    return outcome[0]


def once_per_node(function: Callable, *args) -> None:
    """Call `function` on one rank of each node while the others wait, for PATIENCE if need be: they look into the store, because a
    collective would time out. What one raises is raised on every rank, as a ValueError; a DistError where one never comes back."""
    error, key, deadline = (
        None,
        f"once_per_node/{function.__name__}",
        time.monotonic() + PATIENCE.total_seconds(),
    )
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            function(*args)
        except Exception as e:  # whatever it is, the others must hear of it
            error = str(e) if isinstance(e, (ValueError, OSError)) else repr(e)
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
        ready = store.add(key, 1)
        while ready % get_world_size():  # a second call would count on from here
            if time.monotonic() > deadline:
                done = f"{ready % get_world_size()} of {get_world_size()} ranks"
                raise dist.DistError(f"only {done} were through with {function.__name__} after {PATIENCE}")
            time.sleep(0.2)
            ready = store.add(key, 0)
    if error := agree(error):
        raise ValueError(error)


class StopRequest:
    """SIGTERM (a scheduler's, or torchrun's when another process failed), SIGUSR1 or SIGUSR2 (a warning before a time limit): inside
    `with` the handler only remembers it, in `received`. Training looks at it between steps, and all ranks stop after the same one.

    `received`: a launcher's list, to which a handler of its own has added what came before.
    """

    def __init__(self, received: list[int] | None = None):
        self.received = [] if received is None else received

    def __enter__(self):
        self.previous = {
            number: signal.signal(number, self.handle)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
        }
        return self

    def __exit__(self, *exc_info):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, frame) -> None:
        self.received.append(number)

    @property
    def signal(self) -> str | None:
        """The first one's name."""
        return signal.Signals(self.received[0]).name if self.received else None

    def on_any_rank(self, device: torch.device) -> bool:
        """Whether any rank was told to stop. A sync, and on several ranks a collective."""
        return bool(max_over_ranks(bool(self.received), device))


# ---------------------------------------------------------------------------------------------------------------------------------
# failure


def is_lost_rank(error: BaseException) -> bool:
    """Whether an exception comes from a collective that another rank left or never joined (gloo's are plain RuntimeErrors)."""
    return (
        isinstance(error, dist.DistError)
        or isinstance(error, RuntimeError)
        and "gloo/transport" in str(error)
    )


def explain_lost_rank(run_dir: Path, error: BaseException, patience: float = 5.0) -> tuple[str, bool]:
    """One sentence: which collective this rank was in, by torch's flight recorder, and which ranks never came or are gone; and
    whether this rank is the first to find out, the one to say it.

    Each rank that ends here says so in the store; whoever has not after `patience` seconds is the one that hangs or died. Of the
    collective's own ranks, if one of them has not: others may be waiting, in groups of theirs, for ranks that are ending here.
    The recorder goes to RUN/logs/flight_recorder_RANK.json.
    """
    from torch._C._distributed_c10d import _dump_fr_trace_json

    rank, where, members = get_rank(), "a collective", range(get_world_size())
    recorded = _dump_fr_trace_json(True, False)
    with contextlib.suppress(OSError):
        (run_dir / "logs" / f"flight_recorder_{rank}.json").write_bytes(recorded)
    entries = json.loads(recorded).get("entries")
    if entries:
        last = entries[-1]
        where = (
            f"{last['profiling_name']} number {last['collective_seq_id']} of group {last['process_group'][1]}, "
            f"shape {last['input_sizes']}"
        )
        for group, name in dist.distributed_c10d._world.pg_names.items():
            if name == last["process_group"][0]:
                members = dist.get_process_group_ranks(group)
    missing, first = [], True
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"stuck/{rank}", where)
        first = store.add("stuck", 1) == 1
        deadline = time.monotonic() + patience
        while missing := [r for r in range(get_world_size()) if not store.check([f"stuck/{r}"])]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
    except (RuntimeError, OSError):
        missing = missing or [0]  # it keeps the store, unless torchrun does
    missing = [r for r in missing if r in members] or missing
    who = (
        f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        if missing
        else "no rank (all of them gave up waiting)"
    )
    return f"error: {who} did not join {where}: {str(error).splitlines()[0][:200]}", first
