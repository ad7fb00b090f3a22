"""The processes that a loader or the writer starts: they end with their parent, and leave signals to it."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator

PR_SET_PDEATHSIG = 1  # of prctl(2)
# Forked from their parent: Python 3.14's own way forks them from a server, which outlives the parent.
FORK = multiprocessing.get_context("fork")
# Meant for the main process, which saves and then ends its children; a scheduler sends them to every process
# of the job, and a terminal's Ctrl-C does.
FOR_MAIN_PROCESS = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Children that are started in here are born with the signals blocked: before `become_child` one would
    end them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_MAIN_PROCESS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def become_child() -> None:
    """To be called first in a process that FORK has started. The kernel kills it when its parent
    ends, however that ends and whatever this one is in: numba's code, FFCV's, a wait for a queue."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != multiprocessing.parent_process().pid:  # it has ended before that
        os._exit(1)
    for number in FOR_MAIN_PROCESS:
        signal.signal(number, signal.SIG_IGN)  # and forget it, if it came since the fork
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_MAIN_PROCESS)


def describe_kill(exitcode: int) -> str:
    """By which signal a process was killed, and what that may mean. `exitcode`: multiprocessing's, < 0."""
    name = signal.Signals(-exitcode).name
    meanings = {
        "SIGBUS": ": /dev/shm, or the disk, is full",
        "SIGKILL": ": the machine is out of memory, perhaps, or somebody did it",
    }
    return f"was killed by {name}{meanings.get(name, '')}"
