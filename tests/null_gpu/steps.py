"""What a step of each phase holds, and how long the host takes for it: train.py's own step, on the null GPU.
Prints one JSON object.

    python -m tests.null_gpu.steps --model L/16 --images 64 --compile    (on it: see build.py)

With `--world_size N` this is process 0 of N, of which the others do not exist, as in benchmarks/fake.py: the
device is asked for what FSDP needs, and nothing is sent.
"""

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time

import torch
from torch.distributed.device_mesh import DeviceMesh

import train
from benchmarks.choices import get_ranks, repeat_noise
from benchmarks.fake import fake_processes
from launch import distributed
from model import parallel
from model.optim import build_optimizer
from model.variants import VARIANTS


def measure(cfg: train.Config, phase: str, mesh: DeviceMesh | None, images: int, steps: int) -> dict:
    """Bytes at the peak of a step, and the host's milliseconds: the median of `steps`, and the least."""
    device = torch.device("cuda", 0)
    model = train.build_model(cfg, phase, get_ranks("mixed", cfg.model), device, mesh).train()
    optimizer = build_optimizer(model, cfg.weight_decay)
    batches = repeat_noise(cfg.dataset, images, device)
    failed = torch.zeros((), dtype=torch.bool, device=device)
    take_step = lambda: train.train_step(cfg, model, optimizer, batches, 0, 0.0, failed)
    take_step()  # compiles, and makes Adam's moments
    take_step()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    resident, milliseconds = torch.cuda.memory_allocated(), []
    for _ in range(steps):
        began = time.perf_counter()
        take_step()
        milliseconds.append(1e3 * (time.perf_counter() - began))
    peak = torch.cuda.max_memory_allocated()
    times = {"milliseconds": statistics.median(milliseconds), "least_milliseconds": min(milliseconds)}
    return {"peak": peak, "resident": resident, **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=VARIANTS, default="L/16")
    parser.add_argument("--images", type=int, default=64, help="on each process")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--world_size", type=int, default=1)
    parser.add_argument("--dp_shard", type=int)
    parser.add_argument("--steps", type=int, default=7)
    options = parser.parse_args()
    parallel.set_up_device(torch.device("cuda", 0), VARIANTS[options.model]["embed_dim"])
    cfg = train.Config(
        model=options.model,
        dataset="imagenet",
        dtype="bfloat16",
        compile=options.compile,
        batch_size=options.images * options.world_size,
    )
    others = fake_processes(options.world_size) if options.world_size > 1 else contextlib.nullcontext()
    measured = {}
    with others:
        mesh = parallel.build_mesh(options.dp_shard, "cuda", distributed.TIMEOUT)
        for phase in ("full", "warmup", "lora"):
            measured[phase] = measure(cfg, phase, mesh, options.images, options.steps)
            gc.collect()  # FSDP and compiled blocks stand in reference cycles
            print(phase, measured[phase], file=sys.stderr, flush=True)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
