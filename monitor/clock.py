"""What an epoch of training costs a process, kept out of the loop's sight: time, waiting for data, memory, a
trace."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from monitor.perf import Stopwatch, TimedIterator, peak_memory, reset_peak_memory, start_trace


class EpochClock:
    """Runs from its making to `close`, over an epoch or what is left of it after a resume.

    `s`: the run's State, whose epoch_seconds and epoch_waited it counts on from. `batches`: to be taken from
    the clock's own `batches`. `trace`: where to write a Kineto trace of two steps, None for no trace."""

    def __init__(self, s, model: nn.Module, batches: Iterator, device: torch.device, trace: Path | None):
        self.batches = TimedIterator(batches)
        self.waited_before, self.steps, self.device = s.epoch_waited, 0, device
        self.forward = Stopwatch(device)
        self.watching = contextlib.ExitStack()
        self.watching.enter_context(self.forward.watch(model))
        self.tracer = start_trace(trace) if trace else None
        reset_peak_memory(device)
        self.began = time.perf_counter()
        self.seconds_before = s.epoch_seconds

    def step(self) -> None:
        """A step has been taken."""
        self.steps += 1
        if self.tracer:
            self.tracer.step()

    @property
    def seconds(self) -> float:
        """Of the epoch's training, before the resume too."""
        return self.seconds_before + time.perf_counter() - self.began

    def images_per_second(self, batch_size: int) -> float:
        return self.steps * batch_size / (time.perf_counter() - self.began)

    def close(self) -> tuple[float, float]:
        """End the epoch's batches and the measuring. Returns the epoch's (seconds, seconds waited for
        data)."""
        self.batches.close()
        self.watching.close()
        if self.tracer:
            self.tracer.stop()
            self.tracer = None
        return self.seconds, self.waited_before + self.batches.waited

    @property
    def own_costs(self) -> dict[str, float]:
        """Of this process alone, a step on average: seconds up to the end of its forward pass, and of them
        waiting for data; and its peak memory in bytes. A sync."""
        steps = max(1, self.steps)  # none after a stop at the epoch's last one
        return {
            "step_seconds": (self.batches.waited + self.forward.seconds()) / steps,
            "data_wait_seconds": self.batches.waited / steps,
            "peak_memory_bytes": peak_memory(self.device),
        }
