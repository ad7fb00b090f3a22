"""The processes of a run: how they start, agree on what to do, and heed a signal.

torchrun, srun or mpiexec start one process per GPU and set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT. With one process no process group exists, and everything here is a no-op.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from errors import SharedError, UserError

TIMEOUT = timedelta(minutes=10)  # until a collective that some process has not joined ends the run
ANNOUNCE = 10.0  # seconds until a process that waits for the others at its start says so
PATIENCE = timedelta(hours=2)  # of processes that wait for another one on their node to copy files
REQUEUE = os.EX_TEMPFAIL  # 75, "temporary failure, try again": a run that was told to stop and wants to go on


def get_world_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def get_host() -> str:
    """This node's name: Slurm's, where it has one, because that is the name its commands take."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def describe_places(hosts: list[str]) -> str:
    """Which processes run where, in words. `hosts`: of each process, in the order of world ranks."""
    places = []
    for host in dict.fromkeys(hosts):
        world_ranks = [world_rank for world_rank, other in enumerate(hosts) if other == host]
        places.append(f"{world_ranks} on {host}")
    return "ranks: " + ", ".join(places)


# ----------------------------------------------------------------------------------------------------
# start and end


def start() -> torch.device:
    """Join the other processes of the run, if there are any. Returns this one's device: a GPU, or the CPU.

    Raises UserError for a launcher's environment that is incomplete, a LOCAL_RANK without a GPU, a GPU of two
    processes, a port that is taken, processes that do not come.
    """
    world_size = get_number("WORLD_SIZE", 1)
    device = choose_device(get_number("LOCAL_RANK", 0), world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        return device
    check_environment(world_size)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that the flight recorder remembers
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"  # gloo for what lies on the CPU: agreement, checkpoints' plans
    try:
        with wait_announced(world_size):
            dist.init_process_group(backend, timeout=TIMEOUT)
    except dist.DistError as error:  # the store's or the network's
        raise UserError(explain_no_start(error)) from None
    if device.type == "cuda":
        check_gpus(str(torch.cuda.get_device_properties(device).uuid))
    return device


def choose_device(local_rank: int, world_size: int) -> torch.device:
    """cuda:LOCAL_RANK; cuda:0 for one of several processes that sees a single GPU, its own (Slurm's
    --gpus-per-task); or the CPU. Raises UserError for a LOCAL_RANK without a GPU.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if gpus == 1 and world_size > 1:
        return torch.device("cuda", 0)  # check_gpus looks whether it is another process's as well
    if local_rank < gpus:
        return torch.device("cuda", local_rank)
    visible = ""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        visible = f" that CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} shows"
    raise UserError(
        f"LOCAL_RANK {local_rank} has no GPU: this node has {gpus}{visible}, start so many processes on it, "
        "let each of them see all GPUs of its node (Slurm: --gpus-per-node, not --gpus-per-task), "
        "or unset a LOCAL_RANK that is left over"
    )


def check_gpus(uuid: str) -> None:
    """Raise UserError, on every process, if two processes have the same GPU, where NCCL would refuse to
    start. `uuid`: of this process's.
    """
    uuids = gather(uuid)
    for gpu in dict.fromkeys(uuids):
        world_ranks = [world_rank for world_rank, other in enumerate(uuids) if other == gpu]
        if len(world_ranks) > 1:
            raise SharedError(
                f"ranks {', '.join(map(str, world_ranks))} have one GPU, {gpu}: start one process for each "
                "GPU, and unset CUDA_VISIBLE_DEVICES, or have the launcher set it to another one for each"
            )


def check_environment(world_size: int) -> None:
    """Raise UserError for variables that several processes need and that are missing or out of range."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {' and '.join(missing)} is not set: "
            "start the processes with torchrun or launch/job.py, or unset WORLD_SIZE for a single one"
        )
    world_rank, port = get_number("RANK", 0), get_number("MASTER_PORT", 0)
    if world_rank >= world_size:
        raise UserError(f"RANK {world_rank} should be below WORLD_SIZE {world_size}")
    if not 0 < port < 65536:
        raise UserError(f"MASTER_PORT should be 1 to 65535, not {port}")


@contextlib.contextmanager
def wait_announced(world_size: int) -> Iterator[None]:
    """Around the wait for the other processes: after ANNOUNCE seconds this one says on standard error what it
    waits for, and Ctrl-C ends it at once, because no handler of Python's runs until the wait is over.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    text = (
        f"rank {get_number('RANK', 0)} waits for the rest of {world_size} processes at {place}: WORLD_SIZE="
        f"{world_size} is set here, start the others, or unset WORLD_SIZE to have one process alone"
    )
    timer = threading.Timer(ANNOUNCE, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, handler)


def explain_no_start(error: dist.DistError) -> str:
    """Why the processes did not find each other, in a sentence."""
    port = os.environ["MASTER_PORT"]
    refusals = {"EADDRINUSE": "taken by another process", "EACCES": "not open to this user"}
    for code, reason in refusals.items():
        if code in str(error):
            return (
                f"port {port} of {get_host()} is {reason}: export MASTER_PORT=N for all processes of the "
                "run, with a free port N of 1024 to 32767"
            )
    return f"the processes did not find each other: {get_first_line(error)}"


def get_number(name: str, default: int) -> int:
    """A whole number from the environment. Raises UserError for something else."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name} should be a whole number, not {text!r}")
    return int(text)


def finish() -> None:
    """Leave together. Only for a run that ended well: after an error another process may never come."""
    if dist.is_initialized():
        dist.barrier()  # or the exit of one sometimes aborts another
        dist.destroy_process_group()


def exit(main: Callable[[list[str]], int], argv: list[str]) -> None:
    """Run `main` and leave with its status; with 1, and the traceback, after an exception, which is a bug.

    After a failure on several processes at once: a communicator that waits for a process that never comes
    would keep this one.
    """
    try:
        status = main(argv)
    except KeyboardInterrupt:  # before training, or at its very end
        print("interrupted", file=sys.stderr)
        status = 130
    except Exception:
        traceback.print_exc()
        status = 1
    if status and dist.is_initialized():
        flush()
        os._exit(status)
    sys.exit(status)


def flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


# ----------------------------------------------------------------------------------------------------
# what a process prints


@contextlib.contextmanager
def process_log(run_dir: Path) -> Iterator[Callable[..., None]]:
    """RUN/logs/rank_0003.log: what process 3 prints (process 0 keeps the console) and, of every process,
    where it ran and how it failed.

    Yields log(text, console=True), which writes a line, with the traceback of the exception being handled, to
    this process's log and without the traceback to the console. With one process there is the console only.
    If a collective times out, NCCL's watchdog writes the flight recorder of every process into the same
    folder, as flight_recorder_RANK for `torchfrtrace`.
    """
    if get_world_size() == 1:
        yield lambda text, console=True: print(text, file=sys.stderr)
        return
    world_rank = get_world_rank()
    path = run_dir / "logs" / f"rank_{world_rank:04d}.log"
    path.parent.mkdir(exist_ok=True)
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str((path.parent / "flight_recorder_").absolute()))
    with open(path, "ab", buffering=0) as file, os.fdopen(os.dup(2), "w") as console_file:

        def log(text: str, console: bool = True) -> None:
            trace = traceback.format_exc() if sys.exc_info()[0] else ""
            line = f"{time.strftime('%F %T')} rank {world_rank}: {text}\n{trace}"
            with contextlib.suppress(OSError):  # a full disk, which the console must hear of
                file.write(line.encode(errors="replace"))
            if console:
                prefix = f"rank {world_rank}: " if world_rank else ""
                print(f"{prefix}{text}", file=console_file, flush=True)

        log(f"starts on {get_host()}, pid {os.getpid()}, {get_world_size()} ranks", console=False)
        faulthandler.enable(file)
        try:
            if world_rank == 0:
                yield log
            else:
                with output_to(file.fileno()):
                    yield log
        except Exception as error:  # a bug: its traceback goes to the console as the process ends
            log(f"error: {type(error).__name__}: {error}", console=False)
            raise
        finally:
            faulthandler.enable()


@contextlib.contextmanager
def output_to(target: int) -> Iterator[None]:
    """Inside, what this process and its libraries print goes to the file descriptor `target`."""
    flush()
    originals = {fd: os.dup(fd) for fd in (1, 2)}
    for fd in originals:
        os.dup2(target, fd)
    try:
        yield
    finally:
        flush()
        for fd, original in originals.items():
            os.dup2(original, fd)
            os.close(original)


# ----------------------------------------------------------------------------------------------------
# sums over the processes


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes, in place; on a GPU nothing waits."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def max_over_processes(value: float, device: torch.device) -> float:
    """The largest of the processes' values, on every process. A sync."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def gather(value) -> list:
    """Every process's value (pickled), in the order of world ranks, on every process."""
    values = [value] * get_world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


# ----------------------------------------------------------------------------------------------------
# agreement


def agree(error: str | None) -> str | None:
    """The first process's error, on every process, or None if no process has one: so that all of them stop,
    or none.

    Where not all of them have one, it says whose it is.
    """
    if not dist.is_initialized():
        return error
    errors = gather(f"{error} (on {get_host()})" if error else None)
    bad = [world_rank for world_rank, other in enumerate(errors) if other]
    if not bad:
        return None
    if len(bad) == len(errors):
        return error
    return f"rank {bad[0]}: {errors[bad[0]]}"


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Whatever one process raises in here ends the block on all of them. No collectives inside: a process
    that failed would not join.

    A UserError of one process is raised on every process, as a SharedError with the first one's text. Any
    other exception is a bug: the process that met it raises it on, with its traceback, and the others, which
    would wait for it for ever, raise a DistError of one line that names it.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    raise_together(error)


def raise_together(error: Exception | None) -> None:
    """End `together`: all processes call this, each with the exception that it met, or None."""
    bug, sentence = None, None
    if isinstance(error, UserError):
        sentence = str(error)
    elif error is not None:
        bug = f"{type(error).__name__}: {get_first_line(error)}"
    first_bug = agree(bug)
    if bug:
        raise error
    if first_bug:
        raise dist.DistError(f"{first_bug} is a bug, its traceback is that process's")
    shared = agree(sentence)
    if shared:
        raise SharedError(shared) from None


def get_first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def once_per_node(function: Callable, *args) -> None:
    """Call `function` on one process of each node while the others wait, for PATIENCE if need be: they look
    into the store, because a collective would time out. What it raises, `together` says. A DistError where a
    process never comes back.
    """
    error = None
    if get_number("LOCAL_RANK", 0) == 0:
        try:
            function(*args)
        except Exception as raised:  # whatever it is, the others must hear of it
            error = raised
    if dist.is_initialized():
        wait_for_all(f"once_per_node/{function.__name__}")
    raise_together(error)


def wait_for_all(what: str) -> None:
    """Wait until every process has come here, for PATIENCE at most. Raises DistError after that."""
    store = dist.distributed_c10d._get_default_store()
    world_size = get_world_size()
    deadline = time.monotonic() + PATIENCE.total_seconds()
    ready = store.add(what, 1)
    while ready % world_size:  # a second call with the same name counts on from here
        if time.monotonic() > deadline:
            raise dist.DistError(
                f"only {ready % world_size} of {world_size} ranks were through with {what} after {PATIENCE}"
            )
        time.sleep(0.2)
        ready = store.add(what, 0)


# ----------------------------------------------------------------------------------------------------
# signals


class StopRequest:
    """SIGTERM (a scheduler's, or torchrun's when another process failed), SIGUSR1 or SIGUSR2 (a warning
    before a time limit): inside `with` the handler only remembers it, in `received`. Training looks at it
    between steps, and all processes stop after the same step.

    `received`: a launcher's list, to which a handler of its own has added what came before.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self, received: list[int] | None = None):
        self.received = [] if received is None else received

    def __enter__(self):
        self.previous = {number: signal.signal(number, self.handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exc_info):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, frame) -> None:
        self.received.append(number)

    @property
    def signal(self) -> str | None:
        """The name of the first one that came, if one did."""
        return signal.Signals(self.received[0]).name if self.received else None

    def on_any_process(self, device: torch.device) -> bool:
        """Whether any process was told to stop. A sync, and with several processes a collective."""
        return bool(max_over_processes(bool(self.received), device))


@contextlib.contextmanager
def stop_signals_held() -> Iterator[None]:
    """Inside, StopRequest's signals wait, for this process and, what matters, for those that it starts.

    Slurm, and timeout(1), send a signal to every process of a job: it would kill the compilers that inductor
    has started, and with them the run, which has a handler and would have saved (before torch 2.14 a run with
    Triton waits for the dead ones for ever). They are born with the signals blocked, and stay so; the run
    hears of a signal when the block ends. The price, from 2.14 on: Triton's compilers, which torch ends by a
    SIGTERM, make a run's end 10 s longer if it comes within a minute of the last compilation.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
