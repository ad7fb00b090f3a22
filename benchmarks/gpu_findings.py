"""What the parts of `bench.py gpu` have in common: how they say what they found, and how they time."""

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


@dataclass
class Check:
    """What a part is told, and how it says what it found: row by row, so that what it has said is not lost
    with it."""

    device: torch.device
    tiny: bool  # a dry run: sizes for a CPU
    scratch: Path  # of this part alone
    reference: Path  # a folder of benchmarks/gpu_reference.py's, or where one is to be made
    figures: dict  # what earlier parts recorded, by name; `record` adds to this part's own copy
    pipe: Connection | None = None

    def say(self, what: str, text: str, holds: bool | None = None) -> None:
        """A line of the table. `holds`: whether what must hold does; None where there is nothing to hold."""
        print(f"{what}: {text}{'' if holds is not False else '  FAILED'}", flush=True)
        if self.pipe:
            self.pipe.send(("row", {"what": what, "text": text, "holds": holds}))

    def record(self, name: str, value) -> None:
        """A number, or what JSON can hold, for report.json and for the parts after this one."""
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
    """Seconds of a `call` on the device, the median of `rounds`, each of `in_a_row` calls. The caller has
    warmed it up.

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
    return math.inf if math.isnan(error) else error


Span = tuple[str, float, float]  # a kernel's or a copy's name, its begin and its end in µs


def trace(device: torch.device, call: Callable[[], object], calls: int) -> list[Span]:
    """What ran on a GPU in so many calls in a row, by its begin; nothing on a CPU."""
    if device.type != "cuda":
        return []
    wait_for(device)
    with without_garbage_collection(), profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
        wait_for(device)
    spans = []
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            spans.append((event.name, event.time_range.start, event.time_range.end))
    return sorted(spans, key=lambda span: span[1])
