"""python bench.py step: a training step of each phase beside Hugging Face's ViT, PEFT on it, timm's ViT, and the arithmetic limit."""

import contextlib
import ctypes
import gc
import json
import os
import random
import statistics
import time
from typing import Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sharding import Model, mixed_ranks
from data.datasets import DATASETS
from lora import kernels, onednn
from lora.inject import init_adapters
from lora.layers import LoRALinear
from model.optim import build_optimizer
from model.variants import LORA_FAMILIES, VARIANTS
from monitor.perf import Stopwatch, count_flops, peak_flops
from train import Config, autocast, build_model

Ranks = Literal["mixed", "8", "16", "32", "64"]
MODES = ("eager", "compiled")
# title -> phase whose arithmetic it does
CONTENDERS = {
    "full": "full",
    "warmup": "warmup",
    "lora": "lora",
    "HF full": "full",
    "HF + PEFT": "lora",
    "timm full": "full",
}
PEERS = {"hf": ("HF full",), "peft": ("HF + PEFT",), "timm": ("timm full",)}


def choose(ranks: Ranks, model: str) -> dict[str, list[int]]:
    return (
        mixed_ranks(model)
        if ranks == "mixed"
        else {family: [int(ranks)] * VARIANTS[model]["depth"] for family in LORA_FAMILIES}
    )


def keep_memory() -> None:
    """Let glibc keep what is freed, instead of giving every activation above 32 MB back to the system and asking for zeroed pages again
    in the next step: that costs each contender a different time, none of it arithmetic's. A GPU's allocator keeps memory anyway."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # no glibc
        return
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def describe_device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = (
        [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        if os.path.exists("/proc/cpuinfo")
        else []
    )
    return f"{torch.get_num_threads()} threads of {names[0] if names else 'a CPU'}"


def build_huggingface(model: str, num_classes: int) -> nn.Module:
    try:
        from transformers import ViTConfig, ViTForImageClassification
    except ImportError:
        raise ValueError(
            "peers hf and peft need transformers and peft: pip install -r requirements-dev.txt"
        ) from None
    row = VARIANTS[model]
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=row["embed_dim"],
            num_hidden_layers=row["depth"],
            num_attention_heads=row["num_heads"],
            intermediate_size=4 * row["embed_dim"],
            patch_size=row["patch_size"],
            num_labels=num_classes,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
    )


def add_peft(model: nn.Module, ranks: dict[str, list[int]]) -> nn.Module:
    """PEFT's adapters of the same ranks on the same Linears; only these train, as in PEFT by default."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("peer peft needs peft: pip install -r requirements-dev.txt") from None
    names = {
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "proj": "attention.o_proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    pattern = {
        f"layers.{i}.{names[family]}": rank
        for family, layer_ranks in ranks.items()
        for i, rank in enumerate(layer_ranks)
    }
    model = get_peft_model(
        model,
        LoraConfig(
            r=1,
            lora_alpha=1,
            lora_dropout=0.0,
            bias="none",
            target_modules=[names[f] for f in ranks],
            rank_pattern=pattern,
            alpha_pattern=pattern,
        ),
    )
    found = sum(
        module.r["default"]
        for module in model.modules()
        if hasattr(module, "r") and hasattr(module, "lora_A")
    )
    assert found == sum(map(sum, ranks.values())), "PEFT has other ranks"
    return model


def build(title: str, cfg: Config, ranks: dict[str, list[int]], device: torch.device) -> nn.Module:
    """A contender with weights, its blocks (ours) or the whole of it (theirs, with static ranks: their way) given to torch.compile."""
    num_classes = DATASETS[cfg.dataset].num_classes
    torch.manual_seed(0)
    if title in ("full", "warmup", "lora"):
        model = build_model(cfg, title, ranks, device)
        model.init_weights(0)
        init_adapters(model, 0)
    elif title == "timm full":
        import timm

        row = VARIANTS[cfg.model]
        model = timm.create_model(
            "vit_base_patch16_224",
            num_classes=num_classes,
            embed_dim=row["embed_dim"],
            depth=row["depth"],
            num_heads=row["num_heads"],
        ).to(device)
        assert all(block.attn.fused_attn for block in model.blocks)  # the same attention kernel
        model.compile()
    else:
        model = build_huggingface(cfg.model, num_classes)
        model = (add_peft(model, ranks) if title == "HF + PEFT" else model).to(device)
        model.compile()
    return model.train()


class Contender:
    """A model, its optimiser and `step`, with the rest of train.py's step: cross-entropy, backward, clip, fused AdamW over what trains."""

    def __init__(self, title: str, cfg: Config, ranks: dict[str, list[int]], device: torch.device):
        self.cfg, self.device, self.model = cfg, device, build(title, cfg, ranks, device)
        if title in ("full", "warmup", "lora"):
            self.optimizer = build_optimizer(self.model, cfg.weight_decay)
        else:
            self.optimizer = torch.optim.AdamW(
                [p for p in self.model.parameters() if p.requires_grad], fused=True
            )
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        with autocast(self.cfg, self.device):
            logits = self.model(images)
        F.cross_entropy(
            getattr(logits, "logits", logits).float(), labels
        ).backward()  # Hugging Face's come in an object
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def resident_bytes(self) -> int:
        tensors = [
            *self.model.parameters(),
            *(t for state in self.optimizer.state.values() for t in state.values()),
        ]
        return sum(t.numel() * t.element_size() for t in tensors)


def peak_of_step(contender: Contender, images: torch.Tensor, labels: torch.Tensor) -> int:
    """Bytes: weights and moments, and the most that a step allocates on top. On a CPU from the allocator by torch's profiler."""
    if contender.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.step(images, labels)
        return contender.resident_bytes() + torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        contender.step(images, labels)
    held = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return contender.resident_bytes() + peak


def addmm_shapes(out, a, b, **kwargs) -> int:  # torch's counter knows addmm, not addmm_
    return 2 * a[0] * a[1] * b[1]


def count_spared(model: nn.Module, rows: int) -> int:
    """FLOPs that `model`'s LoRALinears, on `rows` rows each, spare of those torch counts for them: see lora.kernels.merges.

    Both sides are counted: torch's by the formulas of the operators, what is done by going through them product by product.
    """
    total, first = 0, True
    for module in model.modules():
        if not isinstance(module, LoRALinear):
            continue
        meta = lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta")
        x, dy = (
            torch.empty(rows, module.in_features, device="meta"),
            torch.empty(rows, module.out_features, device="meta"),
        )
        A, Bs = meta(module.lora_A), [meta(B) for B in module.lora_B.values()]
        x, dy = x.to(A.dtype), dy.to(A.dtype)
        frozen, where, parts = (
            not module.weight.requires_grad,
            [int(part) for part in module.lora_B],
            len(module.ranks),
        )
        need = [
            not (first and frozen),
            not frozen,
            not frozen and module.bias is not None,
            True,
        ]  # below the first adapter nothing trains
        weight, counts = meta(module.weight).to(A.dtype), []
        operators = kernels.prepare, kernels.lora_linear, kernels.lora_linear_backward
        for prepare, forward, back in operators, [op._init_fn for op in operators]:
            with FlopCounterMode(
                display=False, custom_mapping={torch.ops.aten.addmm_: addmm_shapes}
            ) as counter:
                prepared = prepare(x, weight, A, Bs, where, parts, False)
                forward(x, weight, None, A, Bs, prepared, where, parts, False)
                back(dy, x, weight, A, prepared, Bs, where, parts, *need, False)
            counts.append(counter.get_total_flops())
        total, first = total + counts[0] - counts[1], False
    return total


def count_phase(
    cfg: Config, phase: str, ranks: dict[str, list[int]], batch_size: int, device: torch.device
) -> tuple[int, int]:
    """FLOPs of an image in a step of the phase: by LoRA's formulas, and as they are done on `device` at this batch size."""
    on_meta = build_model(
        Config(model=cfg.model, dataset=cfg.dataset, compile=False, dtype="float32"), phase, ranks, "meta"
    )
    size = DATASETS[cfg.dataset].image_size
    flops = count_flops(on_meta, torch.empty(1, 3, size, size, device="meta"))
    merged = cfg.dtype == "float32" and device.type == "cpu"
    tokens = (size // VARIANTS[cfg.model]["patch_size"]) ** 2 + 1
    return flops, flops - (count_spared(on_meta, batch_size * tokens) // batch_size if merged else 0)


@contextlib.contextmanager
def without_onednn():
    """Inside, this repo's float32 products are torch's own, MKL's, as the peers' are always. torch.backends.mkldnn.flags would take
    oneDNN from everybody's convolutions, too."""
    with mock.patch.object(onednn, "takes", lambda tensor: False):
        yield


def take_turns(
    contenders: dict[str, Contender],
    runs: list[tuple[str, str]],
    rounds: int,
    images: torch.Tensor,
    labels: torch.Tensor,
) -> tuple[dict, dict]:
    """Seconds of each of `rounds` steps of every (mode, title) of `runs`, and bytes at its peak."""
    times, memory, stances = {}, {}, {"eager": "force_eager", "compiled": "default"}
    for mode, title in runs:
        with torch.compiler.set_stance(stances[mode]):
            for _ in range(3):  # compiles; the first step makes the moments
                contenders[title].step(images, labels)
            memory[mode, title] = peak_of_step(contenders[title], images, labels)
        times[mode, title] = []
    gc.collect()
    gc.disable()  # its pauses would fall on whoever is there
    for _ in range(rounds):
        for mode, title in random.sample(runs, len(runs)):
            watch = Stopwatch(images.device)
            with torch.compiler.set_stance(stances[mode]):
                watch.start()
                contenders[title].step(images, labels)
                watch.stop()
            times[mode, title].append(watch.seconds())
    gc.enable()
    return times, memory


def step(
    model: Model = "S/16",
    ranks: Ranks = "mixed",
    dtype: Literal["float32", "bfloat16"] | None = None,
    peers: tuple[Literal["hf", "peft", "timm"], ...] = ("hf", "peft", "timm"),
    modes: tuple[Literal["eager", "compiled"], ...] = MODES,
    batch_size: int | None = None,
    rounds: int = 9,
    keep_memory: bool = True,
    onednn: bool = True,
) -> dict:
    """A step (forward, backward, clip, optimiser) of each phase, beside the peers'. One batch in memory, everything in turn in one process, in
    another order every round; medians.

    ranks: of the adapters; mixed: 8 to 64 over layers and families. dtype: None = float32 on a CPU, bfloat16 on a GPU. Compiled: ours by
    block, theirs whole (`model.compile()`); the same models, run eagerly, are the eager ones. keep_memory: on a CPU let glibc keep freed
    memory. onednn: without it this repo's float32 products are torch's own, too, and what then is left of a lead is not the library's.
    The limit of a phase is the full phase's time by the ratio of FLOPs, counted by torch with attention and without elementwise work and
    optimiser; as done: without the products that lora.kernels.merges spares. best: the fastest round, where neighbours are loud; the ratios are
    of medians. Prints all of it, and as its last line one JSON object, ratios > 1 where this repo is faster.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if batch_size is None:
        batch_size = 128 if device.type == "cuda" else 16 if VARIANTS[model]["embed_dim"] > 384 else 32
    if batch_size < 1 or rounds < 1:
        raise ValueError(f"batch_size and rounds must be at least 1, not {batch_size} and {rounds}")
    if VARIANTS[model]["patch_size"] != 16:
        raise ValueError(
            f"the peers have patches of 16 pixels: {', '.join(m for m in VARIANTS if VARIANTS[m]['patch_size'] == 16)}, not {model}"
        )
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif keep_memory:
        globals()["keep_memory"]()
    if not onednn and (device.type, dtype) != ("cpu", "float32"):
        raise ValueError("--no_onednn is of float32 on a CPU")
    cfg = Config(model=model, dataset="imagenet", dtype=dtype, compile=True)
    wanted, chosen = (
        choose(ranks, model),
        [t for t in CONTENDERS if t in ("full", "warmup", "lora") or any(t in PEERS[p] for p in peers)],
    )
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, 224, 224, generator=rng).to(
        device, memory_format=torch.channels_last
    )  # (B, 3, 224, 224)
    labels = torch.randint(1000, (batch_size,), generator=rng).to(device)
    where = describe_device()
    print(
        f"ViT-{model}, {batch_size} images of 197 tokens, {dtype}, ranks {ranks}, {where}, medians of {rounds} rounds"
        + ("" if onednn else ", all by torch's own float32 products"),
        flush=True,
    )

    runs = [(mode, title) for mode in modes for title in chosen]
    with contextlib.nullcontext() if onednn else without_onednn():
        times, memory = take_turns(
            {title: Contender(title, cfg, wanted, device) for title in chosen}, runs, rounds, images, labels
        )
    best = {key: min(seconds) for key, seconds in times.items()}
    times = {key: statistics.median(seconds) for key, seconds in times.items()}
    flops = {
        phase: count_phase(cfg, phase, wanted, batch_size, device) for phase in ("full", "warmup", "lora")
    }

    peak, out = peak_flops(device, dtype), {}
    for mode in modes:
        seconds = {title: times[mode, title] for title in chosen}
        print(
            f"\n{mode:12}{'ms':>9}{'best':>9}{'images/s':>10}{'GFLOP/s':>9}{'MFU':>7}{'memory GiB':>12}{'full / it':>11}{'limit':>8}{'of it':>7}"
            f"{'limit, as done':>16}{'of it':>7}"
        )
        for title, phase in CONTENDERS.items():
            if title in seconds:
                rate = flops[phase][0] * batch_size / seconds[title]
                base = seconds.get("HF full") if title == "HF + PEFT" else seconds["full"]
                speedup = base / seconds[title] if base else float("nan")
                limits = [
                    flops["full"][0] / f for f in (flops[phase] if title in flops else flops[phase][:1])
                ]
                print(
                    f"{title:12}{seconds[title] * 1e3:9.1f}{best[mode, title] * 1e3:9.1f}{batch_size / seconds[title]:10.1f}{rate / 1e9:9.0f}"
                    f"{f'{100 * rate / peak:.1f} %' if peak else '-':>7}{memory[mode, title] / 2**30:12.2f}"
                    + (
                        f"{speedup:11.3f}{limits[0]:8.3f}{speedup / limits[0]:7.3f}"
                        if phase != "full"
                        else ""
                    )
                    + (
                        f"{limits[-1]:16.3f}{speedup / limits[-1]:7.3f}"
                        if phase != "full" and len(limits) > 1
                        else ""
                    )
                )
        ours_vs = lambda title, ours: seconds[title] / seconds[ours] if title in seconds else None
        lora, warmup = seconds["full"] / seconds["lora"], seconds["full"] / seconds["warmup"]
        limit, done = [[flops["full"][0] / flops[phase][i] for phase in ("lora", "warmup")] for i in (0, 1)]
        out[mode] = {
            "lora_vs_peft": ours_vs("HF + PEFT", "lora"),
            "full_vs_timm": ours_vs("timm full", "full"),
            "full_vs_hf": ours_vs("HF full", "full"),
            "peft_vs_hf": seconds["HF full"] / seconds["HF + PEFT"]
            if {"HF full", "HF + PEFT"} <= seconds.keys()
            else None,
            "lora_vs_full": lora,
            "lora_limit": limit[0],
            "limit_fraction": lora / limit[0],
            "lora_limit_as_done": done[0],
            "limit_fraction_as_done": lora / done[0],
            "warmup_vs_full": warmup,
            "warmup_limit": limit[1],
            "warmup_fraction": warmup / limit[1],
            "warmup_fraction_as_done": warmup / done[1],
            "milliseconds": {title: 1e3 * s for title, s in seconds.items()},
            "best_milliseconds": {title: 1e3 * best[mode, title] for title in chosen},
            "memory_bytes": {title: memory[mode, title] for title in chosen},
        }
        shown = {
            "vs HF + PEFT": "lora_vs_peft",
            "full vs timm": "full_vs_timm",
            "full vs HF": "full_vs_hf",
            "HF + PEFT against HF full": "peft_vs_hf",
        }
        print("; ".join(f"{name} {out[mode][key]:.3f} ×" for name, key in shown.items() if out[mode][key]))
    # the contract's keys: compiled, as one trains
    result = {
        "model": model,
        "batch_size": batch_size,
        "dtype": dtype,
        "ranks": ranks,
        "device": where,
        "rounds": rounds,
        "onednn": onednn,
        **out[modes[-1] if "compiled" not in modes else "compiled"],
        **({"eager": out["eager"]} if {*modes} == {*MODES} else {}),
    }
    print(json.dumps({key: value for key, value in result.items() if value is not None}))
    return result
