"""What the parts of `bench.py gpu` have in common: how they say what they found, and how they time."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor


@dataclass
class Check:
    """What a part is told, and how it says what it found: row by row, so that nothing is lost with it."""

    device: torch.device
    tiny: bool  # a dry run: sizes for a CPU
    scratch: Path  # of this part alone
    reference: Path  # a folder of benchmarks/gpu_reference.py's, or where one is to be made
    figures: dict  # what earlier parts measured, by name; a part adds to its own copy through `figure`
    pipe: Connection | None = None

    def say(self, what: str, figure: str, holds: bool | None = None) -> None:
        """A line of the table. `holds`: whether a figure that must hold does; None where there is nothing to
        hold."""
        print(f"{what}: {figure}{'' if holds is not False else '  FAILED'}", flush=True)
        if self.pipe:
            self.pipe.send(("row", {"what": what, "figure": figure, "holds": holds}))

    def figure(self, name: str, value) -> None:
        """A number for report.json, and for the parts after this one."""
        self.figures[name] = value
        if self.pipe:
            self.pipe.send(("figure", (name, value)))


def wait_for(device: torch.device) -> None:
    """Until everything issued to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Inside, Python collects no garbage: all generations together take it a third of a second or more, which
    would fall on whatever is being timed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def time_calls(device: torch.device, call: Callable[[], object], in_a_row: int = 1, rounds: int = 5) -> float:
    """Seconds of a `call` on the device, the median of `rounds`, each of so many calls in a row.

    In a row, because a GPU's queue must not run empty: a single call between two waits would be timed with
    the host's way to it.
    """
    seconds = []
    with without_garbage_collection():
        for _ in range(rounds):
            if device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(in_a_row):
                    call()
                end.record()
                torch.cuda.synchronize(device)
                seconds.append(begin.elapsed_time(end) / 1000 / in_a_row)
            else:
                began = time.perf_counter()
                for _ in range(in_a_row):
                    call()
                seconds.append((time.perf_counter() - began) / in_a_row)
    return statistics.median(seconds)


def get_error(found: Tensor, right: Tensor) -> float:
    """‖found − right‖ / ‖right‖, in float64 on the CPU; infinite where something is not finite."""
    found, right = found.detach().double().cpu(), right.detach().double().cpu()
    error = float((found - right).norm() / right.norm().clamp(min=1e-300))
    return error if error == error else float("inf")
