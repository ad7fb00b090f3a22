"""GPUs, by their makers' data sheets: what `bench.py estimate` and `bench.py roofline` calculate with."""

from dataclasses import dataclass

import torch

from monitor.perf import PEAK_FLOPS


@dataclass(frozen=True)
class Device:
    peak_flops: float  # dense bfloat16
    memory_bandwidth: float  # bytes/s
    gpus_per_node: int
    node_link: float  # bytes/s that a GPU sends to the others of its node
    network: float  # bytes/s that a node sends to other nodes, all its GPUs together


# NVIDIA's data sheets: A100 40GB SXM 1,555 GB/s, 80GB SXM 2,039 GB/s, both NVLink 600 GB/s in two directions;
# H100 SXM 3.35 TB/s, H200 SXM 4.8 TB/s, both NVLink 900 GB/s. Nodes: a100-40gb as Polaris', 4 GPUs and 2
# Slingshot 11 ports of 200 Gbit/s (ALCF's user guide); the others as DGX: 8 GPUs with a port each, of 200
# (A100) and 400 Gbit/s (H100, H200).
DEVICES = {
    "a100-40gb": Device(PEAK_FLOPS["A100"]["bfloat16"], 1555e9, 4, 300e9, 2 * 25e9),
    "a100-80gb": Device(PEAK_FLOPS["A100"]["bfloat16"], 2039e9, 8, 300e9, 8 * 25e9),
    "h100": Device(PEAK_FLOPS["H100"]["bfloat16"], 3350e9, 8, 450e9, 8 * 50e9),
    "h200": Device(PEAK_FLOPS["H200"]["bfloat16"], 4800e9, 8, 450e9, 8 * 50e9),
}
# Words in the names of GPUs that are slower than the DEVICES they are named like.
SLOWER = {"pcie", "nvl", "mig"}


def find_device(name: str) -> str | None:
    """The one of DEVICES that a GPU of this name is, as CUDA has it; None for any other."""
    words = {*name.lower().replace("-", " ").split()}
    if words & SLOWER:
        return None
    return next((device for device in DEVICES if words.issuperset(device.split("-"))), None)


def find_own_device() -> str | None:
    """The one of DEVICES that this machine's GPU is; None for any other, and without one."""
    return find_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
