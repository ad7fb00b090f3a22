"""python bench.py estimate: what an epoch of each phase would take on many GPUs, by arithmetic. Nothing here
was measured."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.choices import IMAGENET, Model, RankChoice, get_ranks
from benchmarks.contenders import PHASES
from benchmarks.fake import CASES, build_fake, fake_processes
from benchmarks.wire import count_wire
from data.datasets import DATASETS
from errors import UserError
from launch import distributed
from lora.ranks import Ranks
from model.parallel import build_mesh
from monitor.perf import PEAK_FLOPS, count_flops
from train import Config, build_on_meta


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
# Seconds an epoch, the authors' logs.
AUTHORS = {
    "full": "baseline 175, their own full phase ≈ 305",
    "lora, base replicated": "≈ 92",
}


# ------------------------------------------------------------------------------------------------------------
# seconds


def wire_seconds(by_group: dict[tuple[int, ...], float], device: Device) -> float:
    """Seconds for what a process sends.

    A ring inside a node runs over its links. One across nodes leaves each node once and so has the node's
    whole network, shared with the rings of the node's other GPUs, if it doesn't hold these, too.
    """
    total, per_node = 0.0, device.gpus_per_node
    for members, sent in by_group.items():
        own_node = members[0] // per_node
        here = sum(member // per_node == own_node for member in members)
        if here == len(members):
            total += sent / device.node_link
        else:
            total += sent / (device.network * here / per_node)
    return total


def optimizer_seconds(trained: int, shards: int, device: Device) -> float:
    """AdamW's traffic on a process's shard: reads weight, gradient and two moments, writes three of them,
    float32: 28 bytes a parameter."""
    return 28 * trained / shards / device.memory_bandwidth


def count_phases(cfg: Config, ranks: Ranks) -> tuple[dict[str, int], dict[str, int]]:
    """FLOPs of an image, and parameters that are trained, both by phase."""
    size = DATASETS[cfg.dataset].image_size
    flops, trained = {}, {}
    for phase in PHASES:
        model = build_on_meta(cfg, phase, ranks)
        flops[phase] = count_flops(model, torch.empty(1, 3, size, size, device="meta"))
        trained[phase] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return flops, trained


# ------------------------------------------------------------------------------------------------------------
# the command


def check_arguments(gpus: int, kind: Device, batch_size: int, mfu: float, images: int) -> None:
    """Raise UserError for what can't be estimated."""
    if gpus < 2 or (gpus > kind.gpus_per_node and gpus % kind.gpus_per_node):
        raise UserError(f"gpus must be 2 or more and fill nodes of {kind.gpus_per_node}, not {gpus}")
    if not 0 < mfu <= 1:
        raise UserError(f"mfu must be above 0 and at most 1, not {mfu}")
    if batch_size < 1 or batch_size % gpus:
        raise UserError(f"batch_size {batch_size} is not divisible by {gpus} GPUs")
    if images < batch_size:
        raise UserError(f"{images} images are less than a batch of {batch_size}")


def describe_assumptions(
    kind: Device, gpus: int, batch_size: int, images: int, mfu: float, flops: dict[str, int]
) -> str:
    """All that the estimate takes for granted. `flops`: of an image, by phase."""
    node, steps, each = min(kind.gpus_per_node, gpus), images // batch_size, batch_size // gpus
    counted = ", ".join(f"{phase} {count / 1e9:.1f}" for phase, count in flops.items())
    peak, bandwidth = f"{kind.peak_flops / 1e12:.0f} TFLOP/s", f"{kind.memory_bandwidth / 1e9:.0f} GB/s"
    link, network = f"{kind.node_link / 1e9:.0f} GB/s", f"{kind.network / 1e9:.0f} GB/s"
    return f"""assumed
  {steps} steps of {batch_size} images, {each} on a GPU ({images:,} images an epoch)
  not counted: evaluation, checkpoints, waiting for data
  {peak} a GPU, of which {100 * mfu:.0f} % while computing, in every phase alike (--mfu)
  GFLOP an image, counted by torch, forward and backward with attention: {counted}
  bytes on the wire as counted from FSDP2's collectives (bench.py wire), rings at the full speed of their
  links, no latency, no stragglers: {link} a GPU inside nodes of {node}, {network} a node between them
  AdamW: 28 bytes a trained parameter of the process's shard at {bandwidth}, never overlapped
  overlap: all communication behind computation, or the reverse; none: one after the other. A real run lies
  between."""


def estimate(
    gpus: int = 64,
    device: Literal[*DEVICES] = "a100-40gb",
    model: Model = "L/16",
    batch_size: int = 4096,
    ranks: RankChoice = "mixed",
    mfu: float = 0.45,
    images: int = IMAGENET,
) -> dict[tuple[str, str], dict[str, float]]:
    """Seconds an epoch (training steps alone) of each phase, on `gpus` of a kind, bfloat16: for plain
    replication and HSDP inside a node, frozen base on and off the wire, with and without overlap of
    communication and computation.

    mfu: of the device's peak while it computes, the same in all phases; assumed. images: of an epoch. Returns
    {(sharding, title of CASES): {compute, optimizer, wire, overlap, serial}}, seconds an epoch, and prints it
    with all that it assumes.
    """
    kind = DEVICES[device]
    check_arguments(gpus, kind, batch_size, mfu, images)
    wanted, steps, out = get_ranks(ranks, model), images // batch_size, {}
    cfg = Config(model=model, dataset="imagenet", dtype="bfloat16", compile=False, batch_size=batch_size)
    flops, trained = count_phases(cfg, wanted)
    node = min(kind.gpus_per_node, gpus)
    print("ESTIMATE, nothing below was measured: seconds of an epoch, ", end="")
    print(f"ViT-{model} on {gpus} × {device}, bfloat16, adapters {ranks}")
    print(describe_assumptions(kind, gpus, batch_size, images, mfu, flops))
    with fake_processes(gpus) as mode:
        for sharding, shards in {"plain replication": 1, f"HSDP, dp_shard {node}": node}.items():
            mesh = build_mesh(shards, "cpu", distributed.TIMEOUT)
            columns = f"{'compute':>9}{'optimizer':>11}{'wire':>8}{'overlap':>9}{'none':>8}{'full / it':>11}"
            print(f"\n{sharding:34}{columns}   the authors' logs")
            for title, (phase, frozen_base) in CASES.items():
                case = dataclasses.replace(cfg, frozen_base=frozen_base)
                sharded = build_fake(mode, case, phase, wanted, "cpu", mesh)
                with mode:
                    by_group = count_wire(case, sharded).by_group
                row = {
                    "compute": steps * flops[phase] * batch_size / gpus / (kind.peak_flops * mfu),
                    "optimizer": steps * optimizer_seconds(trained[phase], shards, kind),
                    "wire": steps * wire_seconds(by_group, kind),
                }
                row["overlap"] = max(row["compute"], row["wire"]) + row["optimizer"]
                row["serial"] = row["compute"] + row["wire"] + row["optimizer"]
                out[sharding, title] = row
                logged = AUTHORS.get(title, "") if model == "L/16" else ""
                print(get_row(title, row, out[sharding, "full"], logged), flush=True)
    lora, warmup = (flops["full"] / flops[phase] for phase in ("lora", "warmup"))
    print(
        f"\nby its FLOPs the LoRA phase can be at most {lora:.2f} × as fast as full training, warmup "
        f"{warmup:.2f} ×. The authors' 305 / 92 is more than arithmetic\nallows: their full phase was slower "
        "than their own baseline."
    )
    return out


def get_row(title: str, row: dict[str, float], full: dict[str, float], logged: str) -> str:
    """A line of the table. `full`: the full phase's row; `logged`: what the authors' logs say."""
    seconds = f"{row['compute']:9.1f}{row['optimizer']:11.2f}{row['wire']:8.1f}"
    sums = f"{row['overlap']:9.1f}{row['serial']:8.1f}{full['overlap'] / row['overlap']:11.2f}"
    return f"{title:34}{seconds}{sums}   {logged}".rstrip()
