"""The lines of metrics.jsonl and steps.jsonl, put together from what train.py has in hand: a start, a switch,
an epoch, steps.

`s` is the run's State and `cfg` its Config (any objects with these fields will do).
"""

import itertools
import platform

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from monitor.convergence import get_switch_settings
from monitor.logger import RunLogger
from monitor.perf import peak_flops


def get_start_record(cfg, s, start, device: torch.device, mesh: DeviceMesh | None, costs: dict) -> dict:
    """Where a run starts, or goes on, and with what. `start`: the run's Start; `costs`: of the phase."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    return {
        "event": "start",
        "epoch": s.epoch,
        "step": s.step,
        "epoch_step": s.epoch_step,
        "phase": s.phase,
        "frozen_blocks": s.frozen_blocks,
        "switch_settings": get_switch_settings(cfg),
        "device": device.type,
        "world_size": len(start.hosts),
        "hosts": start.hosts,
        "mesh": mesh and dict(zip(mesh.mesh_dim_names, mesh.shape)),
        "notes": start.notes,
        "versions": versions,
        **costs,
    }


def get_switch_record(
    s, previous: str, peak_memory: float, costs: dict, seconds: float, mean_epochs: int
) -> dict:
    """The switch from phase `previous` to that of `s`: from full to full where blocks are frozen in it.
    `peak_memory`: bytes, the largest of the processes'. `mean_epochs`: over how many epochs' ends the weights
    are the mean; 0: over none, they are the last step's."""
    return {
        "event": "switch",
        "epoch": s.epoch,
        "step": s.step,
        "from": previous,
        "to": s.phase,
        "ranks": s.ranks,
        "frozen_blocks": s.frozen_blocks,
        "peak_memory_bytes": int(peak_memory),
        **costs,
        "seconds": seconds,
        "mean_epochs": mean_epochs,
    }


def get_epoch_record(
    cfg, s, device: torch.device, own: list[dict], costs: dict, lr: float, step_losses: list[float]
) -> dict:
    """An epoch that has ended, its norms and its evaluation still to come.

    `own`: each process's EpochClock.own_costs and its "host". `costs`: of the phase. `lr`: of the last step.
    `step_losses`: of each step.
    """
    rate = s.epoch_step * cfg.batch_size / s.epoch_seconds
    # A process's own part of a step, data and forward: up to there it waits for nobody (but for those it
    # shares shards with), so this tells the slow one from those that wait for it.
    slowest = max(range(len(own)), key=lambda world_rank: own[world_rank]["step_seconds"])
    median = sorted(process["step_seconds"] for process in own)[len(own) // 2]
    # To float32 first, in which the losses were computed: with several processes their sum has more digits.
    losses = torch.tensor(step_losses, dtype=torch.float32).tolist()
    limit = peak_flops(device, cfg.dtype)  # of one device, FLOP/s
    mfu = rate * costs["flops_per_image"] / (limit * len(own)) if limit else None
    return {
        "event": "epoch",
        "epoch": s.epoch,
        "step": s.step,
        "phase": s.phase,
        "train_loss": s.epoch_loss / s.epoch_step,
        "train_top1": 100 * (s.epoch_hits / s.epoch_step) / cfg.batch_size,
        "epoch_seconds": s.epoch_seconds,
        "images_per_second": rate,
        "data_wait_fraction": s.epoch_waited / s.epoch_seconds,
        "slowest_rank": {
            "rank": slowest,
            "host": own[slowest]["host"],
            "step_seconds": own[slowest]["step_seconds"],
            "data_wait_seconds": own[slowest]["data_wait_seconds"],
            "median_step_seconds": median,
        },
        "mfu": mfu,
        "peak_memory_bytes": int(max(process["peak_memory_bytes"] for process in own)),
        "trainable_params": costs["trainable_params"],
        "lr": lr,
        "frozen_blocks": s.frozen_blocks,
        "step_losses": [float(f"{loss:.6g}") for loss in losses],
        "weight_norms": {},
        "adapter_norms": {},
        "val_loss": None,
        "val_top1": None,
        "val_top5": None,
    }


def look(s, log: RunLogger, pending: list[tuple[float, Tensor]]) -> None:
    """Add up and log the steps since the last look, and forget them.

    `pending`: of each the learning rate and what train_step returned, (loss, hits, gradient norm, failed).
    Raises FloatingPointError for one that is not finite.
    """
    results = torch.stack([result for _, result in pending]).tolist()  # the host waits here
    steps = itertools.count(s.step - len(pending) + 1)
    records = []
    for step, (lr, _), (loss, hits, norm, failed) in zip(steps, pending, results):
        records.append({"step": step, "epoch": s.epoch + 1, "loss": loss, "grad_norm": norm, "lr": lr})
        if failed:
            log.write_steps(records)
            raise FloatingPointError(
                f"non-finite loss or gradient norm at step {step}, epoch {s.epoch + 1}, phase {s.phase}: "
                "stopped before that optimiser step"
            )
        s.epoch_loss, s.epoch_hits = s.epoch_loss + loss, s.epoch_hits + hits
    log.write_steps(records)
    pending.clear()
