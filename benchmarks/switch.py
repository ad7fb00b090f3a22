"""python bench.py switch: how long a run stands still at each switch, and what it compiles; what the monitor costs at an epoch's end."""

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Literal
from unittest import mock

import torch
from torch._dynamo.utils import calculate_time_spent, counters

import train
from benchmarks.sharding import Model
from benchmarks.step import Contender, Ranks, choose, describe_device
from data.datasets import DATASETS
from lora.inject import match_families
from model.optim import build_optimizer
from model.variants import LORA_FAMILIES
from monitor.convergence import switch_due
from monitor.norms import adapter_norms, weight_norms
from monitor.perf import count_flops
from train import Config, build_model, compile_graphs, switch_phase

IMAGENET = 1_281_167
# The same run with its blocks compiled otherwise.
WAYS = {
    "block": "by block, ranks dynamic (this repo)",
    "static": "by block, static ranks",
    "whole": "whole model",
}


def time_monitor(net: torch.nn.Module, wanted: dict[str, list[int]]) -> float:
    """Seconds that norms and convergence test take at an epoch's end, with six windows behind them; the median of ten."""
    families, seconds = match_families(net, LORA_FAMILIES, tuple(wanted)), []
    cfg, epochs = Config(lr_warmup_steps=0, target_modules=tuple(wanted)), []
    for epoch in range(6 * Config.window_epochs + 10):
        start = time.perf_counter()
        norms = weight_norms(net, families)
        adapter_norms(net, families)
        epochs.append(
            {"epoch": epoch + 1, "step": epoch + 1, "train_loss": 1 / (1 + epoch), "weight_norms": norms}
        )
        switch_due(epochs, cfg)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[-10:])


def run_phases(model: str, ranks: Ranks, dtype: str, batch_size: int, way: str) -> list[dict]:
    """full, warmup, lora in this process, with the compile cache that TORCHINDUCTOR_CACHE_DIR names. One record a phase: seconds until its
    first step, of them torch.compile's own, graphs, and the median step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg, wanted = (
        Config(model=model, dataset="imagenet", dtype=dtype, batch_size=batch_size, compile=True),
        choose(ranks, model),
    )
    size, records = DATASETS[cfg.dataset].image_size, []
    images = torch.randn(batch_size, 3, size, size, device=device).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def build(cfg, phase, ranks, device, mesh=None):
        if way != "whole" or not cfg.compile:
            return build_model(cfg, phase, ranks, device, mesh)
        built = build_model(Config(**(vars(cfg) | {"compile": False})), phase, ranks, device, mesh)
        built.compile(fullgraph=True)
        return built

    unmarked = (
        mock.patch.object(train, "mark_ranks_dynamic", lambda block: None)
        if way != "block"
        else mock.patch.dict({})
    )
    with unmarked, mock.patch.object(train, "build_model", build):
        net = optimizer = None
        for phase in ("full", "warmup", "lora"):
            start, compiling = time.perf_counter(), calculate_time_spent()["total_wall_time"]
            if net is None:
                net = build(cfg, phase, None, device)
                net.init_weights(0)
                optimizer = build_optimizer(net, cfg.weight_decay)
            else:
                net, optimizer = switch_phase(cfg, net, optimizer, phase, wanted)
                gc.collect()
            torch._dynamo.config.recompile_limit = 256
            compiled = compile_graphs(cfg, net, device)
            on_meta = build_model(
                Config(**(vars(cfg) | {"compile": False, "dtype": "float32"})), phase, wanted, "meta"
            )  # for MFU, as train.py does
            count_flops(on_meta, torch.empty(1, 3, size, size, device="meta"))
            stall = time.perf_counter() - start
            contender = Contender.__new__(Contender)
            contender.cfg, contender.device, contender.model, contender.optimizer = (
                cfg,
                device,
                net.train(),
                optimizer,
            )
            steps = []
            for _ in range(4):
                before = time.perf_counter()
                contender.step(images, labels)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                steps.append(time.perf_counter() - before)
            records.append(
                {
                    "phase": phase,
                    "stall": stall,
                    "compiling": calculate_time_spent()["total_wall_time"] - compiling,
                    "graphs": compiled["graphs_compiled"] + compiled["eval_graphs_compiled"],
                    "training_graphs": compiled["graphs_compiled"],
                    "step": statistics.median(steps[1:]),
                    "monitor": time_monitor(net, wanted),
                }
            )
    return records


def switch(
    model: Model = "S/16",
    ranks: Ranks = "mixed",
    dtype: Literal["float32", "bfloat16"] | None = None,
    batch_size: int = 16,
    ways: tuple[Literal["block", "static", "whole"], ...] = tuple(WAYS),
) -> dict:
    """What a run waits for at each switch (model rebuilt, weights and moments moved, compiled, FLOPs counted), with an empty compile cache and
    with the one that the run before left; beside the same with the whole model compiled, and with a graph for every combination of ranks.

    beyond: the stall less torch.compile's own time, in steps of that phase: compilation ends in one training and one evaluation batch. Each
    run in a process of its own. full: the start, where weights are drawn besides. Prints it, and as its last line a JSON object.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    dtype = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    print(
        f"ViT-{model}, {batch_size} images, {dtype}, ranks {ranks}, {describe_device()}: seconds until a phase's first step",
        flush=True,
    )
    out = {}
    for way in ways:
        with tempfile.TemporaryDirectory() as cache:
            for temperature in ("cold", "warm"):
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.switch", model, ranks, dtype, str(batch_size), way],
                    env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
                    stdout=subprocess.PIPE,
                    text=True,
                )
                if done.returncode:
                    raise RuntimeError(f"the run compiled {WAYS[way]} failed, see above")
                out[f"{way}, {temperature}"] = records = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"\n{f'{WAYS[way]}, {temperature} cache':52}{'stall':>8}{'compile':>9}{'graphs':>8}{'step':>8}{'beyond, steps':>15}"
                )
                for r in records:
                    print(
                        f"  {r['phase']:50}{r['stall']:8.2f}{r['compiling']:9.2f}{r['graphs']:8}{r['step']:8.3f}"
                        f"{(r['stall'] - r['compiling']) / r['step']:15.2f}",
                        flush=True,
                    )
    first = next(iter(out.values()))
    seconds, epoch = max(r["monitor"] for r in first), IMAGENET / batch_size * first[0]["step"]
    out["monitor"] = {
        "seconds": seconds,
        "of_epoch": seconds / epoch,
        "of_epoch_on_64": seconds / (epoch / 64),
    }
    print(
        f"\nmonitor, at an epoch's end: {1e3 * seconds:.0f} ms, {100 * seconds / epoch:.6f} % of {IMAGENET:,} images at this speed, "
        f"{100 * seconds / epoch * 64:.4f} % on 64 such devices"
    )
    print(json.dumps(out))
    return out


if __name__ == "__main__":
    model, ranks, dtype, batch_size, way = sys.argv[1:]
    print(json.dumps(run_phases(model, ranks, dtype, int(batch_size), way)))
