"""What a run costs: FLOPs, MFU, peak memory, time on the device, time spent waiting for data, traces."""

import contextlib
import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Dense peak FLOP/s of a device by compute type, from NVIDIA's data sheets (SXM); "float32" is TF32, which
# float32 runs use.
PEAK_FLOPS = {
    "A100": {"bfloat16": 312e12, "float32": 156e12},
    "H100": {"bfloat16": 989e12, "float32": 495e12},
    "H200": {"bfloat16": 989e12, "float32": 495e12},
}


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Peak FLOP/s of the device, None where the table doesn't know it (CPUs)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return next((peaks[dtype] for key, peaks in PEAK_FLOPS.items() if key in name), None)


def count_flops(model: nn.Module, images: torch.Tensor) -> int:
    """FLOPs of an image in a forward and backward of `model` on `images`, a micro-batch (both on the meta
    device: nothing is computed), counted by torch.

    What needs no gradient is not counted, so each phase has its own number; attention is. What is done once
    for all images, as W + B A is, is shared by them: so it depends on how many there are.
    """
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return counter.get_total_flops() // len(images)


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM


def peak_memory(device: torch.device) -> int:
    """Peak bytes since the reset: of CUDA allocations on a GPU, of the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes, over the whole process


class Stopwatch:
    """Seconds a device spends between `start` and `stop`, summed over many such pairs.

    On a GPU by CUDA events: nothing waits before `seconds` is asked.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list = []  # a start, its stop, the next start …

    def start(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    stop = start  # marks come in pairs

    @contextlib.contextmanager
    def watch(self, model: nn.Module) -> Iterator[Self]:
        """While this lasts, every forward of `model` is timed, by hooks that run before and after everybody
        else's.

        `model` itself must not be compiled (its blocks may be): its hooks would be compiled with it.
        """
        before = model.register_forward_pre_hook(lambda *_: self.start(), prepend=True)
        after = model.register_forward_hook(lambda *_: self.stop())
        try:
            yield self
        finally:
            before.remove()
            after.remove()

    def seconds(self) -> float:
        """The sum of all pairs. A sync."""
        pairs = zip(self.marks[::2], self.marks[1::2])
        if self.cuda:
            torch.cuda.synchronize()
            return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
        return sum(end - begin for begin, end in pairs)


def time_phases(build_step: Callable[[str], Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds of a step of each phase, each timed by itself and then forgotten, so that no two models
    take memory at once. `build_step(phase)`: a function that takes a step."""
    seconds = {}
    for phase in ("full", "warmup", "lora"):
        step = build_step(phase)
        watches = []
        for _ in range(3 + 9):  # the first three compile, and allocate
            watch = Stopwatch(device)
            watch.start()
            step()
            watch.stop()
            watches.append(watch)
        seconds[phase] = statistics.median(watch.seconds() for watch in watches[3:])
        del step
        gc.collect()  # compiled blocks stand in reference cycles, and hold the model
    return seconds


class TimedIterator:
    """An iterator of batches that counts the seconds for which its user `waited`."""

    def __init__(self, batches: Iterator):
        self.batches = batches
        self.waited = 0.0

    def __iter__(self) -> Self:
        return self

    def __next__(self):
        before = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - before
        return batch

    def close(self) -> None:
        """Close the iterator itself, a generator."""
        self.batches.close()


def start_trace(path: Path) -> torch.profiler.profile:
    """A profiler that has begun, writing a Kineto trace to `path` when it has seen three of its `step`s.

    Of them the first is left out: starting costs time there. Raises OSError if the folder can't be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tracer = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=2, repeat=1),
        record_shapes=True,
        on_trace_ready=lambda done: done.export_chrome_trace(str(path)),
    )
    tracer.start()
    return tracer
