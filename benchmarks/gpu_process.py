"""A part of `python bench.py gpu` in a process of its own: what it has said when it ends, fails, hangs or
dies, and that nothing of it lives on."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from benchmarks.gpu_findings import Check

PR_SET_PDEATHSIG = 1  # prctl's name for: a signal to me when my parent is gone


@dataclass
class Part:
    number: int
    title: str
    seconds: int  # its limit on a GPU
    run: Callable[[Check], None]


@dataclass
class Outcome:
    """What is known of a part when it is over."""

    title: str
    status: str = "failed"  # passed; failed: a row does not hold; error; out of time; not begun
    seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)
    figures: dict = field(default_factory=dict)
    error: str | None = None  # its traceback


def enter(run: Callable[[Check], None], check: Check, log: Path) -> None:
    """What the part's process does: leads a process group, prints into `log`, sends what it finds."""
    os.setsid()
    with contextlib.suppress(OSError, AttributeError):  # where there is prctl
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        torch.manual_seed(0)
        run(check)
    except BaseException:
        traceback.print_exc()
        check.pipe.send(("error", traceback.format_exc()[-8000:]))
    sys.stdout.flush()
    sys.stderr.flush()
    check.pipe.close()
    os._exit(0)  # no exit handler of CUDA or of a compiler's pool is waited for


def run_in_process(part: Part, check: Check, limit: float, log: Path) -> Outcome:
    """A part's outcome, after `limit` seconds at the latest; no process that it started is left, also where
    this one is told to end."""
    outcome, began = Outcome(part.title), time.perf_counter()
    receiver, check.pipe = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=enter, args=(part.run, check, log))
    process.start()
    check.pipe.close()
    try:
        in_time = listen(process, receiver, outcome, began + limit)
    finally:
        end(process)
    outcome.seconds = time.perf_counter() - began
    if outcome.error:
        outcome.status = "error"
    elif not in_time:
        outcome.status = "out of time"
    elif process.exitcode:
        outcome.status, outcome.error = "error", f"its process ended with status {process.exitcode}"
    elif any(row["holds"] is False for row in outcome.rows):
        outcome.status = "failed"
    else:
        outcome.status = "passed"
    return outcome


def listen(process: BaseProcess, receiver: Connection, outcome: Outcome, deadline: float) -> bool:
    """Put into `outcome` what the part says. Returns whether it came to its end before the deadline."""
    while time.perf_counter() < deadline:
        if receiver.poll(0.1):
            try:
                kind, message = receiver.recv()
            except EOFError:
                return True
            if kind == "row":
                outcome.rows.append(message)
            elif kind == "figure":
                outcome.figures[message[0]] = message[1]
            else:
                outcome.error = message
        elif not process.is_alive():  # what it has started may hold the pipe open
            return True
    return False


def end(process: BaseProcess) -> None:
    """Kill the part's process and all that it has started: compilers and loaders."""
    process.join(timeout=1)  # it may be about to end
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():
        process.kill()  # before it leads its group
    process.join(timeout=10)  # longer only if it hangs in the driver
