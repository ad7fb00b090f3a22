"""python bench.py switch: how long a run stands still at each switch, and what it compiles; what the monitor
costs at an epoch's end."""

import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from typing import Literal
from unittest import mock

import torch
from torch import nn
from torch._dynamo.utils import calculate_time_spent

import train
from benchmarks.choices import IMAGENET, Model, RankChoice, describe_device, get_ranks, repeat_noise
from benchmarks.contenders import PHASES, Contender
from errors import UserError
from lora.inject import match_families
from lora.ranks import Ranks
from model.compiler import check_compiler
from model.optim import build_optimizer
from model.parallel import set_up_device
from model.variants import LORA_FAMILIES, VARIANTS
from monitor.convergence import switch_due
from monitor.norms import get_norms
from start import State

# The same run with its blocks compiled otherwise.
WAYS = {
    "block": "by block, ranks dynamic (this repo)",
    "static": "by block, static ranks",
    "whole": "whole model",
}


# ------------------------------------------------------------------------------------------------------------
# the run that is watched, in a process of its own


def time_monitor(model: nn.Module, ranks: Ranks) -> float:
    """Seconds that norms and convergence test take at an epoch's end, with six windows behind them; the
    median of ten."""
    families = match_families(model, LORA_FAMILIES, tuple(ranks))
    cfg = train.Config(lr_warmup_steps=0, target_modules=tuple(ranks))
    epochs, seconds = [], []
    for epoch in range(1, 6 * cfg.window_epochs + 11):
        start = time.perf_counter()
        record = {"epoch": epoch, "step": epoch, "train_loss": 1 / epoch}
        epochs.append(record | get_norms(model, families))
        switch_due(epochs, cfg)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[-10:])


def time_steps(contender: Contender) -> float:
    """Seconds of a step, the median of three after a first one."""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        contender.step()
        if contender.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def compiled_as(way: str) -> ExitStack:
    """Inside, train.build_model compiles in one of WAYS."""
    build_model = train.build_model

    def build_whole(cfg: train.Config, *args) -> nn.Module:
        model = build_model(dataclasses.replace(cfg, compile=False), *args)
        if cfg.compile:
            model.compile(fullgraph=True)
        return model

    patches = ExitStack()
    if way != "block":
        patches.enter_context(mock.patch.object(train, "mark_ranks_dynamic", lambda block: None))
    if way == "whole":
        patches.enter_context(mock.patch.object(train, "build_model", build_whole))
    return patches


def run_phases(model: str, ranks: RankChoice, dtype: str, batch_size: int, way: str) -> list[dict]:
    """full, warmup, lora in this process, with the compile cache that TORCHINDUCTOR_CACHE_DIR names. One
    record a phase: seconds until its first step, of them torch.compile's own, graphs, and the median step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_up_device(device, VARIANTS[model]["embed_dim"])
    cfg = train.Config(model=model, dataset="imagenet", dtype=dtype, batch_size=batch_size)
    wanted = get_ranks(ranks, model)
    batches = repeat_noise(cfg.dataset, batch_size, device)
    failed = torch.zeros((), dtype=torch.bool, device=device)
    records = []
    with compiled_as(way):
        net = optimizer = None
        for phase in PHASES:
            start, compiling = time.perf_counter(), calculate_time_spent()["total_wall_time"]
            if phase == "full":
                net = train.build_model(cfg, phase, None, device)
                net.init_weights(0)
                optimizer = build_optimizer(net, cfg.weight_decay)
            else:
                net, optimizer = train.switch_phase(cfg, net, optimizer, phase, wanted)
                gc.collect()
            torch._dynamo.config.recompile_limit = 256  # static ranks need more than train.py allows
            costs = train.compile_phase(cfg, State(phase, wanted), net, optimizer, device)
            record = {"phase": phase, "stall": time.perf_counter() - start}
            record["compiling"] = calculate_time_spent()["total_wall_time"] - compiling
            record["graphs"] = costs["graphs_compiled"] + costs["eval_graphs_compiled"]
            record["training_graphs"] = costs["graphs_compiled"]
            record["step"] = time_steps(Contender(cfg, net.train(), optimizer, batches, failed))
            record["monitor"] = time_monitor(net, wanted)
            records.append(record)
    return records


# ------------------------------------------------------------------------------------------------------------
# the command


def start_run(arguments: list[str], way: str, cache: str) -> list[dict]:
    """`run_phases` in a process with that folder as its compile cache. Raises UserError if it fails; its
    traceback is on the terminal."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.switch", *arguments, way],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise UserError(f"the run compiled {WAYS[way]} failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def print_records(title: str, records: list[dict]) -> None:
    print(f"\n{title:52}{'stall':>8}{'compile':>9}{'graphs':>8}{'step':>8}{'beyond, steps':>15}")
    for record in records:
        stall, compiling, step = record["stall"], record["compiling"], record["step"]
        beyond = (stall - compiling) / step
        row = (
            f"  {record['phase']:50}{stall:8.2f}{compiling:9.2f}{record['graphs']:8}{step:8.3f}{beyond:15.2f}"
        )
        print(row, flush=True)


def switch(
    model: Model = "S/16",
    ranks: RankChoice = "mixed",
    dtype: Literal["float32", "bfloat16"] | None = None,
    batch_size: int = 16,
    ways: tuple[Literal["block", "static", "whole"], ...] = tuple(WAYS),
) -> dict:
    """What a run waits for at each switch (model rebuilt, weights and moments moved, compiled, FLOPs
    counted), with an empty compile cache and with the one that the run before left; beside the same with the
    whole model compiled, and with a graph for every combination of ranks.

    beyond: the stall less torch.compile's own time, in steps of that phase: compilation ends in one training
    and one evaluation batch. Each run in a process of its own. full: the start, where weights are drawn
    besides. Prints it, and as its last line a JSON object.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    for note in check_compiler(compiled=True, adapters=True):
        print(note)
    dtype = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    what = f"ViT-{model}, {batch_size} images, {dtype}, ranks {ranks}, {describe_device()}"
    print(f"{what}: seconds until a phase's first step", flush=True)
    out = {}
    for way in ways:
        with tempfile.TemporaryDirectory() as cache:
            for temperature in ("cold", "warm"):
                records = start_run([model, ranks, dtype, str(batch_size)], way, cache)
                out[f"{way}, {temperature}"] = records
                print_records(f"{WAYS[way]}, {temperature} cache", records)
    first = next(iter(out.values()))
    seconds = max(record["monitor"] for record in first)
    share = seconds / (IMAGENET / batch_size * first[0]["step"])
    out["monitor"] = {"seconds": seconds, "of_epoch": share, "of_epoch_on_64": 64 * share}
    print(
        f"\nmonitor, at an epoch's end: {1e3 * seconds:.0f} ms, {100 * share:.6f} % of {IMAGENET:,} images "
        f"at this speed, {6400 * share:.4f} % on 64 such devices"
    )
    print(json.dumps(out))
    return out


if __name__ == "__main__":
    model, ranks, dtype, batch_size, way = sys.argv[1:]
    print(json.dumps(run_phases(model, ranks, dtype, int(batch_size), way)))
