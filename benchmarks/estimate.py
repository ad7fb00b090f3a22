"""python bench.py estimate: what an epoch of each phase would take on many GPUs, by arithmetic. Nothing here
was measured."""

import dataclasses
from typing import Literal

from benchmarks.choices import IMAGENET, Model, RankChoice, get_ranks
from benchmarks.contenders import PHASES
from benchmarks.devices import DEVICES, Device
from benchmarks.fake import CASES, build_fake, fake_processes
from benchmarks.flops import count_phases
from benchmarks.roofline import BANDWIDTH_SHARE, MATMUL_SHARE, get_step_seconds
from benchmarks.wire import count_wire
from errors import UserError
from launch import distributed
from lora.ranks import Ranks
from model.parallel import build_mesh
from train import Config, build_on_meta

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


def count_trained(cfg: Config, phase: str, ranks: Ranks) -> int:
    """Parameters that the phase trains."""
    return sum(p.numel() for p in build_on_meta(cfg, phase, ranks).parameters() if p.requires_grad)


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
  compute: by FLOPs alone, at {100 * mfu:.0f} % of {peak} a GPU, in every phase alike (--mfu)
  GFLOP an image, counted by torch, forward and backward with attention: {counted}
  the roofline below, which has the bytes of every kernel as well, is no part of the seconds of an epoch
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

    mfu: of the device's peak while it computes, the same in all phases; assumed. images: of an epoch. Beside
    it the limit of a phase by its FLOPs, and the roofline of one GPU's step (bench.py roofline). Returns
    {(sharding, title of CASES): {compute, optimizer, wire, overlap, serial}}, seconds an epoch, and prints it
    with all that it assumes.
    """
    kind = DEVICES[device]
    check_arguments(gpus, kind, batch_size, mfu, images)
    wanted, steps, out = get_ranks(ranks, model), images // batch_size, {}
    cfg = Config(model=model, dataset="imagenet", dtype="bfloat16", compile=False, batch_size=batch_size)
    flops = count_phases(cfg, wanted, batch_size // gpus)
    trained = {phase: count_trained(cfg, phase, wanted) for phase in PHASES}
    roof = get_step_seconds(cfg, wanted, batch_size // gpus, device)
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
    print_limits(device, batch_size // gpus, flops, roof)
    return out


def print_limits(device: str, images: int, flops: dict[str, int], roof: dict[str, float]) -> None:
    """How fast a phase can be at most. `flops`: of an image, by phase; `roof`: seconds of a step of `images`
    on one GPU, by phase."""
    shares = f"{100 * MATMUL_SHARE:.0f} % of its FLOP/s or {100 * BANDWIDTH_SHARE:.0f} % of its bandwidth"
    print(f"\nat most, by FLOPs and by the roofline: a step of {images} images on one GPU, each kernel at")
    print(f"{shares}; counted, not measured (bench.py roofline --device {device})")
    print(f"{'':8}{'GFLOP an image':>16}{'full / it':>11}{'roofline ms':>13}{'full / it':>11}")
    for phase in PHASES:
        by_flops, by_roof = flops["full"] / flops[phase], roof["full"] / roof[phase]
        print(f"{phase:8}{flops[phase] / 1e9:16.1f}{by_flops:11.2f}{1e3 * roof[phase]:13.1f}{by_roof:11.2f}")
    print(
        "The authors' 305 / 92 is more than either allows: their full phase was slower than their baseline."
    )


def get_row(title: str, row: dict[str, float], full: dict[str, float], logged: str) -> str:
    """A line of the table. `full`: the full phase's row; `logged`: what the authors' logs say."""
    seconds = f"{row['compute']:9.1f}{row['optimizer']:11.2f}{row['wire']:8.1f}"
    sums = f"{row['overlap']:9.1f}{row['serial']:8.1f}{full['overlap'] / row['overlap']:11.2f}"
    return f"{title:34}{seconds}{sums}   {logged}".rstrip()
