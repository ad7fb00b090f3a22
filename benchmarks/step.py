"""python bench.py step: a training step of each phase beside Hugging Face's ViT, PEFT on it, timm's ViT, the
arithmetic limit and a GPU's roofline.

Every contender takes train.py's own train_step, so that an edited step is what is timed."""

import ctypes
import gc
import json
import random
import statistics
from contextlib import nullcontext
from typing import Literal, NamedTuple
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.choices import Model, RankChoice, describe_device, get_ranks, repeat_noise
from benchmarks.contenders import CONTENDERS, PHASES, Contender, build_contender
from benchmarks.devices import DEVICES, find_own_device
from benchmarks.flops import count_by_formula, count_phases
from benchmarks.roofline import get_step_seconds
from errors import UserError
from lora import onednn as onednn_products
from model.compiler import check_compiler
from model.parallel import set_up_device
from model.variants import VARIANTS
from monitor.perf import Stopwatch, peak_flops
from train import Config

MODES = ("eager", "compiled")
# A turn on a GPU. One step alone would begin with an idle GPU, and the host's time to issue it would count in
# full, which in training goes by while the GPU is at the step before.
STEPS_ON_CUDA = 5
STANCES = {"eager": "force_eager", "compiled": "default"}  # torch.compiler.set_stance's words
PEERS = {"hf": "HF full", "peft": "HF + PEFT", "timm": "timm full"}

Run = tuple[str, str]  # (mode, title)


class Measured(NamedTuple):
    median: dict[Run, float]  # seconds of a step
    best: dict[Run, float]
    memory: dict[Run, int]  # bytes at its peak
    flops: dict[str, int]  # title -> FLOPs of an image, as they are done
    roof: dict[str, float]  # phase -> seconds of a step by the roofline; empty without one


# ------------------------------------------------------------------------------------------------------------
# measuring


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, instead of giving every activation above 32 MB back to the system and
    asking for zeroed pages again in the next step: that costs each contender a different time, none of it
    arithmetic's. A GPU's allocator keeps memory anyway."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # no glibc
        return
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def without_onednn() -> mock._patch:
    """Inside, this repo's float32 products are torch's own, MKL's, as the peers' are always.
    torch.backends.mkldnn.flags would take oneDNN from everybody's convolutions, too."""
    return mock.patch.object(onednn_products, "IS_FASTER", False)


def peak_of_step(contender: Contender) -> int:
    """Bytes: weights and moments, and the most that a step allocates on top. On a CPU from the allocator by
    torch's profiler."""
    if contender.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.step()
        return contender.resident_bytes() + torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        contender.step()
    held = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return contender.resident_bytes() + peak


def get_steps_a_turn(device: torch.device) -> int:
    return STEPS_ON_CUDA if device.type == "cuda" else 1


def take_turns(
    contenders: dict[str, Contender], runs: list[Run], rounds: int
) -> tuple[dict[Run, list[float]], dict[Run, int]]:
    """Seconds of a step in each of `rounds` turns of every (mode, title) of `runs`, and bytes at its peak. A
    turn is one step, on a GPU several in a row.

    Raises FloatingPointError for a contender whose loss or gradients were not finite: its updates were left
    out."""
    times: dict[Run, list[float]] = {}
    memory: dict[Run, int] = {}
    for mode, title in runs:
        with torch.compiler.set_stance(STANCES[mode]):
            for _ in range(3):  # compiles; the first step makes the moments
                contenders[title].step()
            memory[mode, title] = peak_of_step(contenders[title])
        times[mode, title] = []
    gc.collect()
    gc.disable()  # its pauses would fall on whoever is there
    for _ in range(rounds):
        for mode, title in random.sample(runs, len(runs)):
            device = contenders[title].device
            watch, steps = Stopwatch(device), get_steps_a_turn(device)
            with torch.compiler.set_stance(STANCES[mode]):
                watch.start()
                for _ in range(steps):
                    contenders[title].step()
                watch.stop()
            times[mode, title].append(watch.seconds() / steps)
    gc.enable()
    for title, contender in contenders.items():
        if contender.failed:
            raise FloatingPointError(f"{title}: a loss or gradient norm was not finite")
    return times, memory


# ------------------------------------------------------------------------------------------------------------
# what is said


def get_title_line(mode: str, roofed: bool) -> str:
    """`roofed`: with the roofline's columns."""
    columns = (
        f"{'ms':>9}{'best':>9}{'images/s':>10}{'GFLOP/s':>9}{'MFU':>7}{'memory GiB':>12}{'full / it':>11}"
    )
    line = f"{mode:12}{columns}{'limit':>8}{'of it':>7}"
    return f"{line}{'roofline ms':>13}{'full / it':>11}" if roofed else line


def get_row(mode: str, title: str, measured: Measured, batch_size: int, peak: float | None) -> str:
    """A contender's line: its step, and how many times as fast as the full one it is, beside the limit.

    Adapters are compared with the same library's full step; the roofline is our own phases' alone."""
    seconds, best = measured.median[mode, title], measured.best[mode, title]
    images = batch_size / seconds
    rate = images * measured.flops[title]
    mfu = f"{100 * rate / peak:.1f} %" if peak else "-"
    row = f"{title:12}{seconds * 1e3:9.1f}{best * 1e3:9.1f}{images:10.1f}{rate / 1e9:9.0f}{mfu:>7}"
    row += f"{measured.memory[mode, title] / 2**30:12.2f}"
    compared = f"{'':26}"
    if CONTENDERS[title] != "full":
        full = "HF full" if title == "HF + PEFT" else "full"
        speedup = measured.median.get((mode, full), float("nan")) / seconds
        limit = measured.flops["full"] / measured.flops[title]
        compared = f"{speedup:11.3f}{limit:8.3f}{speedup / limit:7.3f}"
    row += compared
    if title in measured.roof:
        roof = measured.roof[title]
        row += f"{1e3 * roof:13.1f}{measured.roof['full'] / roof:11.3f}"
    return row.rstrip()


def get_ratios(mode: str, titles: list[str], measured: Measured) -> dict:
    """The JSON object's figures of one mode: ratios, > 1 where this repo is faster, None without that peer;
    times and bytes of each contender."""
    seconds = {title: measured.median[mode, title] for title in titles}

    def compare(slow: str, fast: str) -> float | None:
        if slow not in seconds or fast not in seconds:
            return None
        return seconds[slow] / seconds[fast]

    flops = measured.flops
    lora_limit, warmup_limit = flops["full"] / flops["lora"], flops["full"] / flops["warmup"]
    lora, warmup = seconds["full"] / seconds["lora"], seconds["full"] / seconds["warmup"]
    return {
        "lora_vs_peft": compare("HF + PEFT", "lora"),
        "full_vs_timm": compare("timm full", "full"),
        "full_vs_hf": compare("HF full", "full"),
        "peft_vs_hf": compare("HF full", "HF + PEFT"),
        "lora_vs_full": lora,
        "lora_limit": lora_limit,
        "limit_fraction": lora / lora_limit,
        "warmup_vs_full": warmup,
        "warmup_limit": warmup_limit,
        "warmup_fraction": warmup / warmup_limit,
        "milliseconds": {title: 1e3 * seconds[title] for title in titles},
        "best_milliseconds": {title: 1e3 * measured.best[mode, title] for title in titles},
        "memory_bytes": {title: measured.memory[mode, title] for title in titles},
    }


SHOWN = {
    "vs HF + PEFT": "lora_vs_peft",
    "full vs timm": "full_vs_timm",
    "full vs HF": "full_vs_hf",
    "HF + PEFT against HF full": "peft_vs_hf",
}


def print_mode(
    mode: str, titles: list[str], measured: Measured, ratios: dict, batch_size: int, peak: float | None
) -> None:
    print(f"\n{get_title_line(mode, bool(measured.roof))}")
    for title in titles:
        print(get_row(mode, title, measured, batch_size, peak))
    print("; ".join(f"{name} {ratios[key]:.3f} ×" for name, key in SHOWN.items() if ratios[key]))


# ------------------------------------------------------------------------------------------------------------
# the command


def check_arguments(model: str, batch_size: int, rounds: int, onednn: bool, device, dtype: str) -> None:
    """Raise UserError for what can't be measured."""
    if batch_size < 1 or rounds < 1:
        raise UserError(f"batch_size and rounds must be at least 1, not {batch_size} and {rounds}")
    fitting = [name for name, row in VARIANTS.items() if row["patch_size"] == 16]
    if model not in fitting:
        raise UserError(f"the peers have patches of 16 pixels: {', '.join(fitting)}, not {model}")
    if not onednn and (device.type, dtype) != ("cpu", "float32"):
        raise UserError("--no_onednn is of float32 on a CPU")


def get_batch_size(model: str, device: torch.device) -> int:
    """As many images as fill a GPU with 40 GB at most, or as a CPU does in seconds.

    All six contenders stay there. Of L/16, the largest, weights and moments take 3.4 GiB in each of the three
    full ones, 3.7 in warmup, 1.5 in LoRA and 1.5 in PEFT: 16.9 in all. Whose turn it is takes up to 11.4 more
    for 64 images and 22.2 for 128 (`python bench.py memory --dp_shard 1 --images 64`), eagerly 0.7 and 1.4 on
    top. So 64 images take 29 of the 37 GiB that 40 GB are, and 128 would take 41.
    """
    if device.type == "cuda":
        return 64
    return 16 if VARIANTS[model]["embed_dim"] > 384 else 32


def step(
    model: Model = "S/16",
    ranks: RankChoice = "mixed",
    dtype: Literal["float32", "bfloat16"] | None = None,
    peers: tuple[Literal["hf", "peft", "timm"], ...] = ("hf", "peft", "timm"),
    modes: tuple[Literal["eager", "compiled"], ...] = MODES,
    batch_size: int | None = None,
    rounds: int = 9,
    keep_memory: bool = True,
    onednn: bool = True,
    device: Literal[*DEVICES] | None = None,
) -> dict:
    """A step (train.py's own: normalise, forward, backward, clip, update) of each phase, beside the peers'.
    One batch in memory, everything in turn in one process, in another order every round; medians. A turn is a
    step; on a GPU it is several, issued without waiting, and divided by their number.

    ranks: of the adapters; mixed: 8 to 64 over layers and families. dtype: None = float32 on a CPU, bfloat16
    on a GPU. Compiled: ours by block, theirs whole (`model.compile()`); the same models, run eagerly, are the
    eager ones. keep_memory: on a CPU let glibc keep freed memory. onednn: without it this repo's float32
    products are torch's own, too, and what then is left of a lead is not the library's.
    The limit of a phase is the full phase's time by the ratio of FLOPs, counted by torch as they are done,
    with attention and without elementwise work and optimiser. device: print besides what the roofline of such
    a GPU allows (bench.py roofline), which is counted and not measured; None = of this GPU, where its data
    sheet is known and dtype is bfloat16.
    best: the fastest round, where neighbours are loud; the ratios are of medians. Prints all of it, and as
    its last line one JSON object, ratios > 1 where this repo is faster.
    """
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if here.type == "cuda" else "float32")
    batch_size = get_batch_size(model, here) if batch_size is None else batch_size
    check_arguments(model, batch_size, rounds, onednn, here, dtype)
    for note in check_compiler("compiled" in modes, adapters=True):
        print(note)
    set_up_device(here, VARIANTS[model]["embed_dim"])
    if here.type == "cpu" and keep_memory:
        keep_freed_memory()
    cfg = Config(model=model, dataset="imagenet", dtype=dtype, batch_size=batch_size)
    wanted, name = get_ranks(ranks, model), describe_device()
    if device is None and dtype == "bfloat16":
        device = find_own_device()
    roof = get_step_seconds(cfg, wanted, batch_size, device) if device else {}
    titles = [*PHASES, *(title for peer, title in PEERS.items() if peer in peers)]
    products = "" if onednn else ", all by torch's own float32 products"
    print(f"ViT-{model}, {batch_size} images of 197 tokens, {dtype}, ranks {ranks}, {name}, ", end="")
    steps = get_steps_a_turn(here)
    turns = "" if steps == 1 else f" of {steps} steps in a row"
    print(f"medians of {rounds} rounds{turns}{products}", flush=True)

    runs = [(mode, title) for mode in modes for title in titles]
    batches = repeat_noise(cfg.dataset, batch_size, here)
    contenders = {title: build_contender(title, cfg, wanted, here, batches) for title in titles}
    with nullcontext() if onednn else without_onednn():
        times, memory = take_turns(contenders, runs, rounds)
    median = {run: statistics.median(seconds) for run, seconds in times.items()}
    best = {run: min(seconds) for run, seconds in times.items()}
    flops = count_phases(cfg, wanted, batch_size)
    flops |= {title: flops["full"] for title in ("HF full", "timm full")}
    flops["HF + PEFT"] = count_by_formula(cfg, wanted)
    measured = Measured(median, best, memory, flops, roof)

    ratios = {mode: get_ratios(mode, titles, measured) for mode in modes}
    for mode in modes:
        print_mode(mode, titles, measured, ratios[mode], batch_size, peak_flops(here, dtype))
    if device:
        print(f"roofline: a step in bfloat16 on {device}, counted, not measured")
    result = {"model": model, "batch_size": batch_size, "dtype": dtype, "ranks": ranks, "device": name}
    result |= {"rounds": rounds, "onednn": onednn}
    result |= ratios["compiled" if "compiled" in modes else modes[-1]]  # the contract's keys: as one trains
    if device:
        result["roofline"] = {"device": device, "milliseconds": {phase: 1e3 * s for phase, s in roof.items()}}
    if {*modes} == {*MODES}:
        result["eager"] = ratios["eager"]
    print(json.dumps({key: value for key, value in result.items() if value is not None}))
    return result
