"""What a run costs: FLOPs, MFU, peak memory."""

import resource
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Dense peak FLOP/s of a device by compute type, from NVIDIA's data sheets (SXM); "float32" is TF32, which float32 runs use.
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
    """FLOPs of a forward and backward of `model` on `images` (both on the meta device: nothing is computed), counted by torch.

    What needs no gradient is not counted, so each phase has its own number; attention is.
    """
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return counter.get_total_flops()


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM


def peak_memory(device: torch.device) -> int:
    """Peak bytes since the reset: of CUDA allocations on a GPU, of the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if Path("/proc/self/status").exists():
        line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes, over the whole process


class Stopwatch:
    """Seconds a device spends between `start` and `stop`, summed over many such pairs. On a GPU by CUDA events: nothing waits before
    `seconds` is asked."""

    def __init__(self, device: torch.device):
        self.cuda, self.marks = device.type == "cuda", []

    def start(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    stop = start  # marks come in pairs

    def seconds(self) -> float:
        """A sync."""
        pairs = zip(self.marks[::2], self.marks[1::2])
        if self.cuda:
            torch.cuda.synchronize()
            return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
        return sum(end - begin for begin, end in pairs)
