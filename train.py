"""PreLoRA pre-training: all parameters, then base + adapters, then adapters alone (arXiv 2509.21619).

    python train.py config/debug.py                         one CPU or one GPU, all three phases in minutes
    python train.py config/debug.py --mode full             the baseline
    python train.py config/debug.py --lr 1e-3 --tau 0.25    any field of Config is a flag
    torchrun --nproc_per_node 4 train.py config/debug.py    several GPUs, or CPU processes
    python launch/submit.py --nodes 16 config/x.py          a Slurm cluster
    python train.py --run_dir runs/debug --resume True      go on where the last checkpoint stands, on any number of ranks
    python train.py config/x.py --init_from w.safetensors   start from weights
"""

import contextlib
import dataclasses
import difflib
import gc
import io
import math
import os
import platform
import runpy
import sys
import time
import typing
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from data.augment import mixup, normalise
from data.loader import DATASETS, build_loader, get_staged_dir, prefetch, stage
from lora.inject import add_lora, freeze_base, init_adapters, mark_ranks_dynamic, match_families, rank_costs
from lora.onednn import use_onednn
from lora.ranks import assign_ranks, budget_ranks, count_parameters, uniform_ranks
from model import checkpoint, distributed
from model.optim import build_optimizer, get_lr, get_optimizer_state, set_optimizer_state
from model.parallel import build_mesh, parallelize, reshard, to_plain, unsharded
from model.pretrained import TIMM, copy_weights, load_pretrained
from model.vit import LORA_FAMILIES, LORA_REST, VARIANTS, VisionTransformer
from monitor.convergence import ConvergenceMonitor, failure_signs, rank_signs, replay
from monitor.logger import RunLogger, phase_table
from monitor.norms import adapter_norms, weight_norms
from monitor.perf import Stopwatch, count_flops, peak_flops, peak_memory, reset_peak_memory
from monitor.plot import load_run


@dataclass
class Config:
    # run
    run_dir: str = "runs/default"  # where everything of this run goes
    resume: bool = False  # go on from run_dir's last checkpoint; an empty run_dir starts fresh
    seed: int = 0  # of weights, data order, augmentation, mixup, dropout
    max_steps: int | None = None  # stop (and save) after this many optimiser steps; the schedule stays that of `epochs`
    keep_every: int = 0  # keep the checkpoint of every so many epochs, besides the last two, the switch's and the freeze's; 0 = none
    eval_every: int = 1  # evaluate after every so many epochs, and after the last
    baseline: str | None = None  # run directory of a mode=full run, to warn of a loss plateau above it
    profile: bool = False  # write a Kineto trace of two steps of each phase to run_dir/profile (Perfetto, chrome://tracing), from rank 0
    fork: str | None = None  # start from another run's kept checkpoint: RUN@epoch, or RUN for the latest these settings can share
    init_from: str | None = None  # weights to start from: timm:NAME, or FILE.safetensors with timm's or Hugging Face's names
    fresh_head: bool = False  # init_from: without the head of those weights, which is for other classes
    # data
    dataset: str = "fashion_mnist"  # a row of data/loader.py's DATASETS
    data_dir: str = "datasets/fashion_mnist"  # holds train.beton and val.beton (ffcv) or the raw files (folder)
    loader: Literal["ffcv", "folder", "synthetic"] = "ffcv"  # folder: torchvision, where FFCV's libraries are missing; synthetic: no files
    num_workers: int | None = None  # loader threads or processes; None = one per core this process may use
    num_classes: int | None = None  # None = those of the row; for a tree of one's own
    stage_dir: str | None = None  # copy the .beton files to this folder, on each node's local disk, at the start; None = read them in place
    train_samples: int | None = None  # train on a fixed random subset of so many images; None = all
    # model
    model: str = "tiny-debug"  # a row of model/vit.py's VARIANTS
    layer_norm_eps: float = 1e-6  # timm and JAX 1e-6, Hugging Face 1e-12
    dropout: float = 0.0  # after the positions, attention's output and both MLP layers
    drop_path: float = 0.0  # stochastic depth of the last block, rising linearly from 0
    # optimisation
    epochs: int = 300  # the cosine ends there
    batch_size: int = 4096  # global: images per optimiser step
    grad_accum_steps: int = 1  # micro-batches per optimiser step
    lr: float = 1e-3  # peak
    lr_warmup_steps: int = 10_000  # linear, from 0
    weight_decay: float = 0.1  # in torch's sense, multiplied by lr; Linear and Conv weights and adapters only
    grad_clip: float = 1.0  # global norm; 0 = off
    rand_augment: int = 0  # magnitude M of RandAugment(2, M): two operations on every image; 10 is the nominal maximum; 0 = off
    mixup: float = 0.0  # alpha of Beta(alpha, alpha); 0 = off
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the compute; masters and optimiser stay float32
    compile: bool = True  # torch.compile, one region per block
    activation_checkpointing: Literal["none", "block", "selective"] = "none"  # block: recompute all; selective: half, by the compiler
    # several GPUs
    dp_shard: int | None = None  # ranks that share one copy of the masters (FSDP); None = those of a node; 1 = plain replication
    reshard_after_forward: bool = True  # free a block's gathered weights between forward and backward, and gather them again
    frozen_base: Literal["replicate", "shard"] = "replicate"  # lora phase: a copy of the base on every rank, or gathered every step
    # PreLoRA
    mode: Literal["prelora", "full", "lora"] = "prelora"  # full: the baseline; lora: static LoRA from epoch 0, every rank rank_max
    tau: float = 0.5  # Algorithm 1: threshold on the weight norms' change between windows, in %
    zeta: float = 2.5  # Algorithm 1: threshold on the training loss's change between windows, in %
    num_windows: int = 3  # Algorithm 1: k, consecutive windows that must agree
    window_epochs: int = 3  # Algorithm 1: m, epochs per window
    switch_epoch: int | None = None  # switch after so many epochs instead of by the test
    lora_warmup_epochs: int = 10  # w: epochs in which base and adapters train together
    rank_min: int = 8  # Algorithm 2, a power of two
    rank_max: int = 64  # Algorithm 2, a power of two
    rank_rule: Literal["minmax", "uniform", "budget"] = "minmax"  # Algorithm 2; one rank for all; in proportion to the change
    rank_budget: float | None = None  # uniform, budget: adapters fill this share of the base's parameters; None = what minmax would use
    lora_alpha: float | None = None  # adapters are scaled by alpha / rank; None = alpha is each layer's rank (scaling 1)
    lora_scaling: Literal["alpha", "rslora"] = "alpha"  # rslora: by alpha / sqrt(rank) (arXiv 2312.03732)
    target_modules: tuple[str, ...] = tuple(LORA_FAMILIES)  # the paper's alpha; families of model/vit.py's LORA_FAMILIES
    lora_trainable: Literal["adapters", "adapters+rest"] = "adapters"  # rest: head, norms, embeddings; mode=lora always trains them
    optimizer_at_switch: Literal["keep", "reset"] = "keep"  # keep: moments live on; reset: a fresh AdamW at both switches, as the authors'
    lora_rewarm_steps: int = 0  # after the freeze the learning rate rises from 0 again, to its cosine in so many steps (the authors': 100)

    def __post_init__(self):
        if self.init_from and not self.init_from.startswith(TIMM):  # a resumed run asks whether it is the same file
            self.init_from = os.path.abspath(self.init_from)


def check_config(cfg: Config) -> None:
    """Raise ValueError, in one sentence, for the first field that is out of range or contradicts another."""
    def check(ok: bool, text: str):
        if not ok:
            raise ValueError(text)

    for name, value in vars(cfg).items():
        check(not isinstance(value, float) or math.isfinite(value), f"{name} must be a finite number, not {value}")
    check(cfg.run_dir != "", "run_dir is empty")
    check(cfg.fork != "", "fork is empty")
    check(cfg.init_from not in ("", TIMM), "init_from is empty")
    check(cfg.init_from is None or cfg.fork is None, "fork starts from a run's checkpoint and init_from from other weights: choose one, "
          "--init_from None or --fork None")
    check(cfg.init_from is not None or not cfg.fresh_head, "fresh_head is for the weights of init_from: without them every head is fresh")
    check(cfg.seed < 2**63, f"seed must be below 2**63, not {cfg.seed}")
    for name in ("epochs", "batch_size", "grad_accum_steps", "eval_every", "lr", "window_epochs", "rank_min", "tau", "zeta", "layer_norm_eps"):
        check(getattr(cfg, name) > 0, f"{name} must be above 0, not {getattr(cfg, name)}")
    for name in ("seed", "keep_every", "lr_warmup_steps", "weight_decay", "grad_clip", "rand_augment", "mixup", "lora_warmup_epochs",
                 "lora_rewarm_steps", "num_workers"):
        check(getattr(cfg, name) is None or getattr(cfg, name) >= 0, f"{name} must not be negative, not {getattr(cfg, name)}")
    for name in ("max_steps", "train_samples", "num_classes", "switch_epoch", "rank_budget", "lora_alpha", "dp_shard"):
        check(getattr(cfg, name) is None or getattr(cfg, name) > 0, f"{name} must be above 0 or None, not {getattr(cfg, name)}")
    for name in ("dropout", "drop_path"):
        check(0 <= getattr(cfg, name) < 1, f"{name} must be in [0, 1), not {getattr(cfg, name)}")
    check(cfg.model in VARIANTS, f"unknown model {cfg.model!r}, there are: {', '.join(VARIANTS)}")
    check(cfg.dataset in DATASETS, f"unknown dataset {cfg.dataset!r}, there are: {', '.join(DATASETS)}")
    check(cfg.loader != "synthetic" or not cfg.rand_augment, "synthetic images are not augmented: loader synthetic goes with rand_augment 0")
    check(cfg.stage_dir is None or cfg.loader == "ffcv", "stage_dir is for .beton files: it needs --loader ffcv")
    check(cfg.stage_dir != "", "stage_dir is empty")
    size, patch = DATASETS[cfg.dataset].image_size, VARIANTS[cfg.model]["patch_size"]
    check(size % patch == 0, f"{cfg.dataset}'s images of {size} pixels can't be cut into {cfg.model}'s patches of {patch}")
    check(cfg.batch_size % cfg.grad_accum_steps == 0,
          f"batch_size {cfg.batch_size} is not divisible by grad_accum_steps {cfg.grad_accum_steps}")
    check(cfg.num_windows >= 2, f"num_windows must be at least 2, not {cfg.num_windows}: the test compares consecutive windows")
    check(cfg.rank_min <= cfg.rank_max, f"rank_min {cfg.rank_min} is above rank_max {cfg.rank_max}")
    for name in ("rank_min", "rank_max"):
        check(getattr(cfg, name) & (getattr(cfg, name) - 1) == 0, f"{name} must be a power of two, not {getattr(cfg, name)}")
    check(cfg.rank_min > 1 or not cfg.compile, "rank_min 1 can't be compiled, torch.compile makes a dimension of size 1 a constant: "
          "take 2 or --compile False")
    check(cfg.activation_checkpointing != "selective" or cfg.compile,
          "activation_checkpointing selective is the compiler's choice: it needs --compile True")
    width = VARIANTS[cfg.model]["embed_dim"]
    check(cfg.rank_max <= width, f"rank_max {cfg.rank_max} is above {cfg.model}'s width {width}")
    for family in cfg.target_modules:
        check(family in LORA_FAMILIES, f"unknown target module {family!r}, there are: {', '.join(LORA_FAMILIES)}")
    check(len(set(cfg.target_modules)) == len(cfg.target_modules) > 0, f"target_modules must name each family once: {cfg.target_modules}")
    check(cfg.lora_scaling != "rslora" or cfg.lora_alpha is not None,
          "lora_scaling rslora is lora_alpha / sqrt(rank): it needs --lora_alpha, which as None stands for each layer's rank")
    check(cfg.rank_budget is None or cfg.rank_rule != "minmax", "rank_budget is for rank_rule uniform or budget; minmax has none")
    if cfg.rank_budget is not None:
        choose_ranks(cfg, {family: [0.0] * VARIANTS[cfg.model]["depth"] for family in cfg.target_modules})
    if cfg.switch_epoch is not None:
        check(cfg.mode == "prelora", f"switch_epoch has no meaning with mode {cfg.mode}")
        check(cfg.switch_epoch >= 2 * cfg.window_epochs,
              f"switch_epoch {cfg.switch_epoch} is before two windows of {cfg.window_epochs} epochs are full, which the ranks need")
        check(cfg.switch_epoch < cfg.epochs, f"switch_epoch {cfg.switch_epoch} is not before the last epoch {cfg.epochs}")
    if cfg.baseline is not None:
        load_run(cfg.baseline)


def load_preset(path: str) -> Config:
    """Config's defaults with the preset's assignments over them. Raises ValueError for a missing or failing file, an unknown key, a
    wrong type."""
    if not Path(path).is_file():
        raise ValueError(f"no such preset: {path}")
    try:
        values = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        raise ValueError(f"{path}: {type(e).__name__}: {e}") from None
    names = {f.name for f in dataclasses.fields(Config)}
    return typed_config({key: value for key, value in values.items()
                         if key in names or not key.startswith("_") and not isinstance(value, type(sys))}, path)


def typed_config(values: dict, where: str) -> Config:
    """A Config of `values`. Raises ValueError, saying where, for an unknown key or a wrong type."""
    hints = typing.get_type_hints(Config)
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{where}: unknown key {key!r}{suggest(key, Config)}")
        kind, allowed = typing.get_origin(hints[key]), typing.get_args(hints[key]) or (hints[key],)
        if kind is tuple:
            values[key] = tuple(value) if isinstance(value, list) else value
            ok = type(values[key]) is tuple and all(type(item) is str for item in value)
        elif kind is Literal:
            ok = value in allowed
        else:
            values[key] = float(value) if float in allowed and type(value) is int else value
            ok = type(values[key]) in allowed
        if not ok:
            raise ValueError(f"{where}: {key} = {value!r} should be {hints[key] if typing.get_args(hints[key]) else hints[key].__name__}")
    return Config(**values)


def suggest(key: str, *kinds) -> str:
    """", did you mean …?" with the nearest field of the dataclasses `kinds`, if one is near."""
    close = difflib.get_close_matches(key.lstrip("-"), [f.name for kind in kinds for f in dataclasses.fields(kind)], n=1)
    return f", did you mean {close[0]}?" if close else ""


def parse_flags(argv: list[str], default, prog: str = "train.py", description: str = __doc__):
    """Flags over `default`, a Config or another dataclass, by tyro. Raises ValueError with tyro's reason in one line; --help prints and
    exits."""
    known = {f"--{f.name}" for f in dataclasses.fields(default)}
    for flag in argv:
        name = flag.split("=")[0].replace("-", "_").replace("__", "--", 1)
        if flag.startswith("--") and flag != "--help" and name not in known:
            raise ValueError(f"unknown flag {flag}{suggest(name, default)}")
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(tyro.conf.FlagConversionOff[type(default)], prog=prog, args=argv, default=default, use_underscores=True,
                            description=description)
    except SystemExit as e:
        if not e.code:
            raise
        # a box (or, where the terminal can't draw it, dashes): title, reason, separator, help
        lines = [line.strip("│|╭╮╰╯─ ") for line in errors.getvalue().splitlines()]
        text = "\n".join("" if set(line) == {"-"} else line for line in lines).strip().split("\n", 1)[1].strip()
        reason = text.split("\n\n")[0].split("\n")
        raise ValueError(" ".join(reason)) from None


def parse_config(argv: list[str]) -> tuple[Config, list[str]]:
    """`[preset.py] [--field value …]` -> the Config, checked, and the lines that say what a resumed run changes.

    With --resume True and a run in run_dir, its stored config is taken and only explicit flags are laid over it; with --fork and
    no preset, that of the run it starts from.
    Raises ValueError, in one sentence, for whatever is wrong.
    """
    preset = argv[0] if argv and not argv[0].startswith("-") else None
    flags = argv[1:] if preset else argv
    cfg = parse_flags(flags, load_preset(preset) if preset else Config())
    run_dir, notes = Path(cfg.run_dir), []
    stored = run_dir / "config.json"
    if cfg.fork and not preset and not (cfg.resume and stored.exists()):  # as the other run, but for these flags
        run, _ = split_fork(cfg.fork)
        if not Path(run, "config.json").is_file():
            raise ValueError(f"no run {run} to fork from (--fork RUN, or RUN@epoch with a whole number)")
        source = typed_config(checkpoint.read_json(Path(run, "config.json")), f"{run}/config.json")
        cfg = parse_flags(flags, dataclasses.replace(source, fork=None, init_from=None, fresh_head=False, max_steps=None, resume=False))
        run_dir = Path(cfg.run_dir)
        stored = run_dir / "config.json"
    if cfg.resume and stored.exists():
        old = dataclasses.replace(typed_config(checkpoint.read_json(stored), str(stored)), run_dir=cfg.run_dir, resume=True)
        asked, cfg = cfg, parse_flags(flags, old)
        for name, value in vars(cfg).items():
            if value != getattr(old, name):
                notes.append(f"resume: {name} = {value} overrides the stored {getattr(old, name)}")
            if preset and value != getattr(asked, name):
                notes.append(f"resume: {name} = {value} as stored in {stored}, not {preset}'s {getattr(asked, name)}")
    elif not cfg.resume and any((run_dir / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoints")):
        raise ValueError(f"{run_dir} already holds a run: continue it with --resume True or choose another --run_dir")
    check_config(cfg)
    return cfg, notes


# ---------------------------------------------------------------------------------------------------------------------------------
# building

def build_model(cfg: Config, phase: str, ranks: dict[str, list[int]] | None, device: torch.device | str,
                mesh: DeviceMesh | None = None) -> torch.nn.Module:
    """The ViT of a phase, compiled and sharded over `mesh`, on `device`, its weights not yet set: call `init_weights` or load.
    The only way to build one."""
    data = DATASETS[cfg.dataset]
    with torch.device("meta"):
        model = VisionTransformer(cfg.model, data.image_size, cfg.num_classes or data.num_classes, dropout=cfg.dropout,
                                  drop_path=cfg.drop_path, layer_norm_eps=cfg.layer_norm_eps)
        if phase != "full":  # ranks may be there already, for the switch that is due
            add_lora(model, match_families(model, LORA_FAMILIES, tuple(ranks)), ranks, cfg.lora_alpha, cfg.lora_scaling == "rslora")
    if phase == "lora":
        rest = cfg.mode == "lora" or cfg.lora_trainable == "adapters+rest"
        sharded = mesh is not None and cfg.frozen_base == "shard"  # then gathered in the compute type, from float32 shards
        freeze_base(model, keep=LORA_REST if rest else (), dtype=None if sharded else getattr(torch, cfg.dtype))
    for block in model.blocks:
        use_onednn(block)
    parallelize(model, mesh, cfg.compile, getattr(torch, cfg.dtype), cfg.activation_checkpointing, cfg.reshard_after_forward,
                cfg.frozen_base == "replicate")
    model.to_empty(device=device)
    for module in model.modules():  # to_empty left the buffers as garbage, and no state dict has them
        if hasattr(module, "init_buffers"):
            module.init_buffers()
    for block in model.blocks:
        with unsharded(block):  # what forward sees are the gathered parameters
            mark_ranks_dynamic(block)
    return model


def build_on_meta(cfg: Config, phase: str = "full", ranks: dict[str, list[int]] | None = None) -> torch.nn.Module:
    """A phase's model without its numbers, uncompiled: for its shapes, and to count what it computes."""
    plain = dataclasses.replace(cfg, compile=False, activation_checkpointing="none", dtype="float32")
    return build_model(plain, phase, ranks, "meta")


def switch_phase(cfg: Config, model, optimizer, phase: str, ranks: dict[str, list[int]], mesh: DeviceMesh | None = None):
    """Rebuild the model in its next phase and move weights and optimiser state over, by name. Returns (model, optimizer).

    Insertion: the base keeps its moments and step counts, adapters start fresh with B = 0, so the function is unchanged.
    Freeze: adapters keep theirs, the base's states are dropped with the old optimiser. `optimizer_at_switch=reset`: none is kept.

    Sharded, each rank copies its own shards: same mesh, same cut, no traffic. Only a base that is replicated from here on is
    gathered, one parameter at a time. Moments are handed over, not copied. So at its peak the switch holds old and new weights,
    one gathered parameter, and no gradient or activation: less than a training step.
    """
    reshard(model)
    weights, state = model.state_dict(), get_optimizer_state(model, optimizer)
    new = build_model(cfg, phase, ranks, next(model.parameters()).device, mesh)
    init_adapters(new, cfg.seed)
    with torch.no_grad():
        for name, tensor in new.state_dict().items():
            if name in weights:
                tensor.copy_(weights[name] if isinstance(tensor, DTensor) else to_plain(weights[name]))
    new_optimizer = build_optimizer(new, cfg.weight_decay)
    if cfg.optimizer_at_switch == "keep":
        set_optimizer_state(new, new_optimizer, state)
    return new, new_optimizer


def choose_ranks(cfg: Config, changes: dict[str, list[float]]) -> dict[str, list[int]]:
    """Each layer's rank from its weight norm's change in %, by `cfg.rank_rule`: {family: [rank per layer]}.

    uniform and budget fill `rank_budget`'s share of the base's parameters or, without one, just what minmax would use, so that rules are
    compared at equal size. Raises ValueError for a budget that rank_min everywhere exceeds.
    """
    ranks = assign_ranks(changes, cfg.rank_min, cfg.rank_max)
    if cfg.rank_rule == "minmax":
        return ranks
    base, costs = count_base(cfg)
    budget = count_parameters(ranks, costs) if cfg.rank_budget is None else int(cfg.rank_budget * base)
    rule = {"uniform": uniform_ranks, "budget": budget_ranks}[cfg.rank_rule]
    return rule(changes, costs, budget, cfg.rank_min, cfg.rank_max)


def count_base(cfg: Config) -> tuple[int, dict[str, list[int]]]:
    """Parameters of the model without adapters, and what one more rank adds to each layer's: {family: [per layer]}."""
    model = build_on_meta(cfg)
    return sum(p.numel() for p in model.parameters()), rank_costs(model, match_families(model, LORA_FAMILIES, cfg.target_modules))


def seed_torch(*key: int) -> None:
    """Seed torch for dropout and drop path by (seed, number of the micro-batch in the run): what is drawn depends on nothing that ran
    before, so a resumed run draws the same and no generator state needs saving."""
    torch.manual_seed(zlib.crc32(str(key).encode()))


def compile_graphs(cfg: Config, model, device: torch.device) -> dict:
    """Run one training and one evaluation batch of zeros, so that compilation's stall stands in the switch event and not in an
    epoch's time. Returns how long it took and how many graphs were compiled, on this rank."""
    stats = torch._dynamo.utils.counters["stats"]
    start, before = time.perf_counter(), stats["unique_graphs"]
    if cfg.compile:
        batch_size = cfg.batch_size // (cfg.grad_accum_steps * distributed.get_world_size())
        images = torch.zeros(batch_size, 3, *[DATASETS[cfg.dataset].image_size] * 2, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        with autocast(cfg, device):
            logits = model.train()(images)
        logits.sum().backward()
        training = stats["unique_graphs"]
        with torch.no_grad(), autocast(cfg, device):
            model.eval()(images)
        reshard(model)
        model.zero_grad(set_to_none=True)
    else:
        training = before
    return {"seconds": time.perf_counter() - start, "graphs_compiled": training - before,
            "eval_graphs_compiled": stats["unique_graphs"] - training}


def autocast(cfg: Config, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")


@torch.no_grad()
def evaluate(cfg: Config, model, loader, device: torch.device) -> dict:
    """Loss, top-1 and top-5 in % over the validation set, each image once on one of the ranks; labels of -1 are padding."""
    data, model = DATASETS[cfg.dataset], model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # summed loss, top-1 hits, top-5 hits, images
    for images, labels in prefetch(loader.epoch(0), device):
        with autocast(cfg, device):
            logits = model(normalise(images, data.mean, data.std)).float()  # (B, C)
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (B, 5), a padded row never hits
        totals += torch.stack([F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum"), hits[:, 0].sum(), hits.sum(),
                               (labels >= 0).sum()])
    reshard(model)
    loss, top1, top5, count = distributed.sum_over_ranks(totals).tolist()
    return {"val_loss": loss / count, "val_top1": 100 * top1 / count, "val_top5": 100 * top5 / count}


# ---------------------------------------------------------------------------------------------------------------------------------
# training

@dataclass
class State:
    """Where a run stands; every checkpoint's meta.json holds it. `next_phase` is a switch that is decided but not yet made: the
    checkpoint of a switch thus holds the phase before it, whole, and a resumed run makes the switch itself."""
    phase: str = "full"  # full, warmup or lora
    ranks: dict[str, list[int]] | None = None  # family -> rank of each layer, once assigned
    next_phase: str | None = None
    epoch: int = 0  # completed
    phase_epochs: int = 0  # completed in this phase
    phase_start: int = 0  # the step at which this phase began
    step: int = 0  # optimiser steps taken
    epoch_step: int = 0  # of them in the epoch under way
    epoch_totals: tuple[float, float] = (0.0, 0.0)  # its summed loss and hits
    step_losses: tuple[float, ...] = ()  # of each of its steps
    epoch_seconds: float = 0.0  # its training time
    epoch_waited: float = 0.0  # of it, waiting for data
    base_norms: dict[str, list[float]] | None = None  # of the last epoch; a frozen base keeps them
    metrics_bytes: int = 0  # length of metrics.jsonl


def read_state(meta: dict, path: Path) -> State:
    """The State in the meta of checkpoint `path`. Raises ValueError if it is damaged."""
    try:
        return State(**meta["state"])
    except TypeError as e:
        raise ValueError(f"{path}/meta.json is damaged: {e}") from None


def decide_phase(cfg: Config, s: State, due: ConvergenceMonitor | None) -> None:
    """At the end of an epoch: set s.next_phase if a switch comes next, and s.ranks from the monitor that says one is `due`."""
    s.next_phase = None
    if due:
        s.ranks = choose_ranks(cfg, due.changes())
        s.next_phase = "warmup" if cfg.lora_warmup_epochs else "lora"
    elif s.phase == "warmup" and s.phase_epochs >= cfg.lora_warmup_epochs:
        s.next_phase = "lora"


def build_monitor(cfg: Config, steps_per_epoch: int) -> ConvergenceMonitor:
    return ConvergenceMonitor(cfg.tau, cfg.zeta, cfg.num_windows, cfg.window_epochs, cfg.lr_warmup_steps / steps_per_epoch,
                              cfg.switch_epoch)


ADAPTER_FIELDS = ("target_modules", "rank_min", "rank_max", "rank_rule", "rank_budget", "lora_alpha", "lora_scaling")


def check_same(cfg: Config, old: Config, names: list[str], where: Path) -> None:
    """Raise ValueError for the first field in `names` in which `cfg` differs from what the checkpoint at `where` was trained with."""
    for name in names:
        if getattr(cfg, name) != getattr(old, name):
            raise ValueError(f"{where} was trained with {name} = {getattr(old, name)}, it can't go on with {getattr(cfg, name)}")


def split_fork(fork: str) -> tuple[str, int | None]:
    """RUN@epoch -> (RUN, epoch), RUN -> (RUN, None)."""
    run, _, epoch = fork.rpartition("@")
    return (run, int(epoch)) if run and epoch.isdecimal() and not Path(fork).is_dir() else (fork, None)


def find_fork(cfg: Config) -> tuple[Path, dict, list[str]]:
    """The checkpoint of another run that `cfg.fork` names, its meta made into what a run with `cfg` goes on from, and what `cfg` has different.

    In the full phase everything the switch depends on may differ: the monitor is fed the logged norms anew, and the switch, if it is due, and
    its ranks are `cfg`'s. Later the switch and the adapters must be those the run has. meta["records"]: its epochs and switches up to
    there, for metrics.jsonl. Without an epoch: the newest checkpoint of the full phase before which `cfg` would not have switched.
    Raises ValueError, in one sentence, where there is no such checkpoint or it is of another model, data or batch; OSError.
    """
    run, asked = split_fork(cfg.fork)
    kept = {meta["state"]["epoch"]: (path, meta) for path, meta in checkpoint.kept(Path(run)) if not meta["state"]["epoch_step"]}
    _, epochs, switches = load_run(run)  # after the checkpoints: a run that is under way has logged what it has saved
    if not kept:
        raise ValueError(f"{run} keeps no checkpoint of a whole epoch")
    phases, steps_per_epoch = {}, 0
    for epoch, (path, meta) in kept.items():
        check_same(cfg, typed_config(meta["config"], f"{path}/meta.json"), ["model", "dataset", "num_classes", "batch_size", "train_samples"], path)
        phases[epoch], steps_per_epoch = meta["state"]["phase"], meta["train_images"] // cfg.batch_size
    try:
        full = [e for e in epochs if e["phase"] == "full"]
        due = replay(build_monitor(cfg, steps_per_epoch), full, cfg.target_modules) if cfg.mode == "prelora" and full else None
    except FloatingPointError as e:
        raise ValueError(f"{run}: {e}") from None
    last = min(cfg.epochs - 1, (cfg.max_steps - 1) // steps_per_epoch if cfg.max_steps else cfg.epochs)  # that leaves something to train
    usable = [e for e in kept if e <= last and (phases[e] != "full" or due is None or e <= due)
              and (asked is not None or phases[e] == "full" or cfg.mode == "lora")]
    at = max(usable, default=None) if asked is None else asked
    if at not in usable:
        why = "" if asked is not None and asked not in kept else " that these settings share: they " + (
            f"switch after epoch {due}" if due and (asked is None or asked <= last) else f"end after epoch {last + 1}")
        raise ValueError(f"{run} keeps no checkpoint{'' if at is None else f' of epoch {at}'}{why}; it keeps those of "
                         f"{', '.join(map(str, sorted(kept)))} (see --keep_every)")
    path, meta = kept[at]
    checkpoint.verify(path)
    old, s = typed_config(meta["config"], f"{path}/meta.json"), read_state(meta, path)
    if s.phase == "full" and cfg.mode == "lora":
        raise ValueError(f"{path} is in its full phase, mode lora has none")
    if s.phase != "full":
        check_same(cfg, old, ["mode", *ADAPTER_FIELDS] + (["lora_trainable", "dtype"] if s.phase == "lora" else []), path)
        switched = next((switch["epoch"] for switch in switches if switch["from"] == "full"), None)
        if cfg.mode == "prelora" and due != switched:
            raise ValueError(f"{path} comes after a switch at epoch {switched}, these settings switch {f'after epoch {due}' if due else 'later'}")
    only = lambda norms: {family: norms[family] for family in cfg.target_modules if family in norms}
    records = [e | {"weight_norms": only(e["weight_norms"]), "adapter_norms": only(e["adapter_norms"])} for e in epochs if e["epoch"] <= at]
    if [e["epoch"] for e in records] != list(range(1, at + 1)):
        raise ValueError(f"{run}/metrics.jsonl is damaged: it does not hold the epochs 1 to {at}")
    if s.phase == "full" and cfg.mode == "prelora":
        monitor = build_monitor(cfg, steps_per_epoch)
        passed = replay(monitor, records, cfg.target_modules)
        s.ranks, s.base_norms, meta["monitor"] = None, only(s.base_norms), monitor.state_dict()
        decide_phase(cfg, s, monitor if passed else None)
    elif s.phase == "full":
        s.ranks = s.next_phase = None
    elif s.phase == "warmup" and s.phase_epochs > cfg.lora_warmup_epochs:
        raise ValueError(f"{path} is {s.phase_epochs} epochs into its warmup, which lora_warmup_epochs = {cfg.lora_warmup_epochs} would have ended")
    else:
        decide_phase(cfg, s, None)
    records = sorted(records + [switch for switch in switches if switch["epoch"] < at], key=lambda r: (r["epoch"], r["event"] == "switch"))
    notes = [f"fork: {name} = {value}, {run} had {getattr(old, name)}" for name, value in vars(cfg).items()
             if value != getattr(old, name) and name not in ("run_dir", "resume", "fork", "max_steps", "keep_every", "eval_every", "profile")]
    return path, meta | {"state": dataclasses.asdict(s) | {"metrics_bytes": 0}, "records": records}, notes


def check_data(cfg: Config, images: int, classes: list[str] | None, val_classes: list[str] | None) -> None:
    """Raise ValueError for a batch or a warmup that is too large for so many training images, and for training and validation sets with
    different classes (None: not known)."""
    if None not in (classes, val_classes) and classes != val_classes:
        here, there = next(pair for pair in zip(classes, val_classes) if pair[0] != pair[1])
        raise ValueError(f"train and val of {cfg.data_dir} do not have the same classes: {here!r} in one stands where {there!r} does "
                         "in the other")
    total_steps = images // cfg.batch_size * cfg.epochs
    if not total_steps:
        raise ValueError(f"batch_size {cfg.batch_size} is above the {images} training images")
    if cfg.profile and images // cfg.batch_size < 3:
        raise ValueError(f"profile needs epochs of 3 steps and more, {images} images are {images // cfg.batch_size} of batch_size {cfg.batch_size}")
    if cfg.lr_warmup_steps >= total_steps:
        raise ValueError(f"lr_warmup_steps {cfg.lr_warmup_steps} leaves nothing of the {total_steps} steps of {cfg.epochs} epochs")


def open_run(cfg: Config, last: Path | None, meta: dict | None, passed_over: list[str]):
    """Everything that can be found wrong before work begins, with `checkpoint.find`'s answer.

    Returns (training loader, validation loader), which yield this rank's share of the micro-batches.
    Raises ValueError, OSError or RuntimeError, in one sentence, for data that is missing, damaged or too small for a batch, a
    schedule that ends in its warmup, and a checkpoint that is damaged or of another run than `cfg` describes.
    """
    run_dir, rank, world_size = Path(cfg.run_dir), distributed.get_rank(), distributed.get_world_size()
    if cfg.batch_size % (cfg.grad_accum_steps * world_size):
        raise ValueError(f"batch_size {cfg.batch_size} is not divisible by {world_size} ranks × grad_accum_steps {cfg.grad_accum_steps}")
    batch_size = cfg.batch_size // (cfg.grad_accum_steps * world_size)
    data_dir = get_staged_dir(cfg.data_dir, cfg.stage_dir) if cfg.stage_dir else cfg.data_dir
    train_loader, val_loader = [
        build_loader(cfg.loader, cfg.dataset, data_dir, split, batch_size, cfg.seed, cfg.num_workers, num_samples, cfg.num_classes,
                     cfg.rand_augment, rank, world_size) for split, num_samples in (("train", cfg.train_samples), ("val", None))]
    images = train_loader.num_samples
    if last:
        if not {"state", "monitor", "config", "train_images"} <= meta.keys():
            raise ValueError(f"{last}/meta.json is damaged: keys are missing")
        old, state = typed_config(meta["config"], f"{last}/meta.json"), read_state(meta, last)
        fixed = ["model", "dataset", "num_classes", "init_from", "fresh_head", "mode", "seed", "batch_size", "train_samples",
                 "target_modules", "window_epochs"]
        if state.ranks:  # adapters of these ranks and this scaling, a base in this precision; the freeze's checkpoint is still open
            fixed += [*ADAPTER_FIELDS, "lora_trainable", "dtype"]
        check_same(cfg, old, [] if "records" in meta else fixed, last)  # a fork's were checked when it was found
        if meta["train_images"] != images:
            raise ValueError(f"{last} was trained on {meta['train_images']} images, {cfg.data_dir} gives {images}")
        if state.step > (total_steps := images // cfg.batch_size * cfg.epochs):
            raise ValueError(f"{last} is past the end of {cfg.epochs} epochs, {total_steps} steps")
        metrics = run_dir / "metrics.jsonl"
        if "records" not in meta and (not metrics.exists() or metrics.stat().st_size < state.metrics_bytes):
            raise ValueError(f"{metrics} is missing or shorter than it was when {last} was saved")
    check_data(cfg, images, train_loader.classes, val_loader.classes)
    return train_loader, val_loader


def load_init(cfg: Config) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights that `cfg.init_from` names, made to fit this run's model and data, and what was done to them.
    Raises ValueError or OSError, in one sentence, where they can't be had or don't fit."""
    data = DATASETS[cfg.dataset]
    weights, notes = load_pretrained(cfg.init_from, build_on_meta(cfg), data.mean, data.std, cfg.fresh_head)
    return weights, [f"init_from: {note}" for note in notes]


def train(cfg: Config, device: torch.device, mesh: DeviceMesh | None, stop: distributed.StopRequest, notes: list[str],
          weights: dict[str, torch.Tensor], train_loader, val_loader, last: Path | None, meta: dict | None, passed_over: list[str]) -> bool:
    """One run, from its beginning (rank 0's `weights`, if any, instead of random ones) or from checkpoint `last` with its `meta`, to its
    end. Closes the loaders.

    Returns whether it ended: False if it was told to `stop`, after saving.
    Raises FloatingPointError on a non-finite loss or gradient norm, with weights and optimiser as they were before that step;
    OSError where a checkpoint can't be written, with the one before it intact.
    """
    run_dir, data = Path(cfg.run_dir), DATASETS[cfg.dataset]
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cudnn.allow_tf32 = True
    s = read_state(meta, last) if last else State()
    if not last and cfg.mode == "lora":
        s = State(phase="lora", ranks={family: [cfg.rank_max] * VARIANTS[cfg.model]["depth"] for family in cfg.target_modules})
    steps_per_epoch = train_loader.num_samples // cfg.batch_size
    total_steps = cfg.epochs * steps_per_epoch
    last_step = min(cfg.max_steps or total_steps, total_steps)
    if s.step >= last_step and s.epoch_step < steps_per_epoch:
        if rank == 0:
            print(f"{run_dir} is done: {s.step} steps" + (f", --max_steps None goes on to {total_steps}" if s.step < total_steps else ""))
            print(phase_table(load_run(run_dir)[1]) if s.epoch else "no epoch is finished yet")
        return True
    monitor = build_monitor(cfg, steps_per_epoch)
    if last:
        monitor.load_state_dict(meta["monitor"])
    baseline = load_run(cfg.baseline)[1] if cfg.baseline else None  # its epoch records

    if rank == 0:
        checkpoint.write_json(run_dir / "config.json", vars(cfg) | {"resume": False})
        (run_dir / "ranks.json").unlink(missing_ok=True)  # of epochs after the checkpoint, perhaps
        if s.ranks:
            checkpoint.write_json(run_dir / "ranks.json", s.ranks)
    logger = RunLogger(run_dir, s.step, last_step, s.metrics_bytes, enabled=rank == 0)
    for record in meta["records"] if last and "records" in meta else ():
        logger.copy(record)
    for note in notes:
        logger.message(note)
    for text in passed_over:
        logger.warning(s.epoch, s.step, text)
    if last and "records" in meta and s.next_phase and s.phase == "full":  # decided when the fork was found
        for sign in rank_signs(s.ranks, cfg.rank_min, cfg.rank_max, cfg.rank_rule == "minmax"):
            logger.warning(s.epoch, s.step, sign)

    def current_lr(step: int) -> float:
        frozen_at = s.phase_start if s.phase == "lora" and cfg.mode == "prelora" else None
        return get_lr(step, cfg.lr, cfg.lr_warmup_steps, total_steps, frozen_at, cfg.lora_rewarm_steps)

    def enter_phase() -> dict:
        """What a phase costs, once its model stands: for the start and switch events."""
        return {**compile_graphs(cfg, model, device), "trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "flops_per_image": count_flops(build_on_meta(cfg, s.phase, s.ranks),
                                               torch.empty(1, 3, data.image_size, data.image_size, device="meta"))}

    def save(pinned: bool) -> None:
        s.metrics_bytes = logger.bytes
        reshard(model)
        checkpoint.save(run_dir, model, optimizer, pinned=pinned, meta={
            "step": s.step, "state": dataclasses.asdict(s), "monitor": monitor.state_dict(), "config": vars(cfg),
            "loader": cfg.loader, "train_images": train_loader.num_samples,
            # Nothing here is drawn from a generator that lives on: these three numbers are the whole random state of every rank.
            "order": {"seed": cfg.seed, "epoch": s.epoch, "next_image": s.epoch_step * cfg.batch_size},
            "rng": {"seed": cfg.seed, "step": s.step, "micro_batches_per_step": world_size * cfg.grad_accum_steps},
            "world_size": world_size, "mesh": mesh and {n: mesh.size(i) for i, n in enumerate(mesh.mesh_dim_names)},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}})

    def start_trace(phase: str) -> torch.profiler.profile:
        """Of its next three steps, the first is left out: starting costs time there."""
        path = run_dir / "profile" / f"{phase}.json"
        path.parent.mkdir(exist_ok=True)
        tracer = torch.profiler.profile(schedule=torch.profiler.schedule(wait=0, warmup=1, active=2, repeat=1), record_shapes=True,
                                        on_trace_ready=lambda done: done.export_chrome_trace(str(path)))
        tracer.start()
        return tracer

    traced = set()  # phases
    with contextlib.closing(train_loader), contextlib.closing(val_loader), contextlib.closing(logger):
        model = build_model(cfg, s.phase, s.ranks, device, mesh)
        families = match_families(model, LORA_FAMILIES, cfg.target_modules)
        optimizer = build_optimizer(model, cfg.weight_decay)
        if last:
            checkpoint.load(last, model, optimizer)
        else:
            model.init_weights(cfg.seed)
            init_adapters(model, cfg.seed)
            if cfg.init_from:
                copy_weights(model, weights)
                weights.clear()
        costs = {} if s.next_phase else enter_phase()  # with a switch due, the phase to come is entered below
        logger.bar.unpause()  # compilation is over: time left counts from here
        hosts = distributed.gather(distributed.get_host())
        logger.write({"event": "start", "epoch": s.epoch, "step": s.step, "phase": s.phase, "device": device.type, "world_size": world_size,
                      "hosts": hosts, "notes": notes, **costs})
        if world_size > 1:
            logger.message("ranks: " + ", ".join(f"{[r for r, h in enumerate(hosts) if h == host]} on {host}" for host in dict.fromkeys(hosts)))

        while s.epoch < cfg.epochs:
            if s.next_phase:  # -- the switch: full -> warmup puts the adapters in, warmup -> lora freezes the base
                start = time.perf_counter()
                previous, s.phase, s.next_phase, s.phase_epochs, s.phase_start = s.phase, s.next_phase, None, 0, s.step
                reset_peak_memory(device)
                model, optimizer = switch_phase(cfg, model, optimizer, s.phase, s.ranks, mesh)
                peak = peak_memory(device)
                params = loss = logits = group = None  # these hold the old model, too,
                gc.collect()  # and compiled blocks stand in reference cycles
                costs = enter_phase()
                logger.switch({"event": "switch", "epoch": s.epoch, "step": s.step, "from": previous, "to": s.phase, "ranks": s.ranks,
                               "peak_memory_bytes": int(distributed.max_over_ranks(peak, device)), **costs,
                               "seconds": time.perf_counter() - start})

            # -- one epoch of training
            params = [p for p in model.parameters() if p.requires_grad]
            totals = torch.tensor(s.epoch_totals, dtype=torch.float64, device=device)  # summed loss, hits
            step_losses = torch.zeros(steps_per_epoch, device=device)
            step_losses[:s.epoch_step] = torch.tensor(s.step_losses)
            bad_step = torch.zeros((), dtype=torch.int64, device=device)  # the first with a non-finite loss or gradient norm, from 1
            batches = prefetch(train_loader.epoch(s.epoch, start_batch=s.epoch_step * cfg.grad_accum_steps), device)
            first_step, start, stopped = s.epoch_step, time.perf_counter() - s.epoch_seconds, False
            waited_before, forward = s.epoch_waited, Stopwatch(device)
            reset_peak_memory(device)
            tracer = None
            if cfg.profile and rank == 0 and s.phase not in traced and min(steps_per_epoch - s.epoch_step, last_step - s.step) >= 3:
                tracer = start_trace(s.phase)
                traced.add(s.phase)
            model.train()
            while s.epoch_step < steps_per_epoch and s.step < last_step:
                lr = current_lr(s.step)
                step_totals = torch.zeros_like(totals)
                for micro_step in range(cfg.grad_accum_steps):
                    micro_batch = (s.step * cfg.grad_accum_steps + micro_step) * world_size + rank  # its number in the whole run
                    before = time.perf_counter()
                    images, labels = next(batches)  # (B, 3, H, W) uint8 channels_last, (B,)
                    s.epoch_waited += time.perf_counter() - before
                    seed_torch(cfg.seed, micro_batch)
                    images, other_labels, lam = mixup(normalise(images, data.mean, data.std), labels, cfg.mixup, cfg.seed, micro_batch)
                    if mesh is not None:  # gradients travel once a step
                        model.set_requires_gradient_sync(micro_step == cfg.grad_accum_steps - 1)
                    forward.start()
                    with autocast(cfg, device):
                        logits = model(images).float()  # (B, C)
                    forward.stop()
                    loss = lam * F.cross_entropy(logits, labels) + (1 - lam) * F.cross_entropy(logits, other_labels)
                    (loss / cfg.grad_accum_steps).backward()
                    hits = (logits.argmax(dim=1) == labels).sum()  # under mixup: against the label of the image itself
                    step_totals += torch.stack([loss.detach() / (cfg.grad_accum_steps * world_size), hits])
                distributed.sum_over_ranks(step_totals)
                norm = to_plain(torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip or math.inf))  # of all ranks
                # From the first non-finite step on AdamW skips, on the device, so the host may look at it later than it happens;
                # norm and loss are the sums of all ranks, so a NaN on one stops all.
                finite = torch.isfinite(norm) & torch.isfinite(step_totals[0])
                bad_step += (s.step + 1) * (~finite & (bad_step == 0))
                optimizer.found_inf = (bad_step > 0).float()
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                totals += step_totals
                step_losses[s.epoch_step] = step_totals[0]
                s.step, s.epoch_step = s.step + 1, s.epoch_step + 1
                if tracer:
                    tracer.step()
                logger.advance()
                done = s.epoch_step == steps_per_epoch or s.step == last_step
                if device.type == "cpu" or s.step % 20 == 0 or done:  # once in a while: this is the loop's only sync
                    if bad_step.item():
                        raise FloatingPointError(
                            f"non-finite loss or gradient norm at step {bad_step.item()}, epoch {s.epoch + 1}, phase {s.phase}: "
                            f"stopped before that optimiser step; last checkpoint: {checkpoint.latest(run_dir)}")
                    rate = (s.epoch_step - first_step) * cfg.batch_size / (time.perf_counter() - start - s.epoch_seconds)
                    logger.progress(s.phase, totals[0].item() / s.epoch_step, rate)
                    if stopped := stop.on_any_rank(device):
                        break
            batches.close()
            if tracer:
                tracer.stop()
            s.epoch_seconds = time.perf_counter() - start
            if stopped or s.epoch_step < steps_per_epoch:  # told to, or max_steps in mid-epoch
                s.epoch_totals, s.step_losses = tuple(totals.tolist()), tuple(step_losses[:s.epoch_step].tolist())
                save(pinned=False)
                break

            # -- the epoch's end: measure, log, decide, save
            train_loss, hits = (totals / steps_per_epoch).tolist()
            s.epoch, s.phase_epochs = s.epoch + 1, s.phase_epochs + 1
            if s.phase != "lora" or s.base_norms is None:  # after the freeze they stay: a bfloat16 copy would only blur them
                s.base_norms = weight_norms(model, families)
            rate = steps_per_epoch * cfg.batch_size / s.epoch_seconds
            # A rank's own part of a step, data and forward: up to there it waits for nobody (its shards' ranks apart), so this tells
            # the slow one from those that wait for it.
            steps, waited = max(1, s.epoch_step - first_step), s.epoch_waited - waited_before  # none after a stop at the last one
            own = distributed.gather({"step_seconds": (waited + forward.seconds()) / steps, "data_wait_seconds": waited / steps})
            slowest = max(range(world_size), key=lambda r: own[r]["step_seconds"])
            peak = (peak_flops(device, cfg.dtype) or 0) * world_size
            record = {"event": "epoch", "epoch": s.epoch, "step": s.step, "phase": s.phase, "train_loss": train_loss,
                      "train_top1": 100 * hits / cfg.batch_size, "epoch_seconds": s.epoch_seconds, "images_per_second": rate,
                      "data_wait_fraction": s.epoch_waited / s.epoch_seconds,
                      "slowest_rank": {"rank": slowest, "host": hosts[slowest], **own[slowest],
                                       "median_step_seconds": sorted(o["step_seconds"] for o in own)[world_size // 2]},
                      "mfu": rate * costs["flops_per_image"] / peak if peak else None,
                      "peak_memory_bytes": int(distributed.max_over_ranks(peak_memory(device), device)),
                      "trainable_params": costs["trainable_params"], "lr": current_lr(s.step - 1),
                      "step_losses": [float(f"{loss:.6g}") for loss in step_losses.tolist()],
                      "weight_norms": s.base_norms, "adapter_norms": adapter_norms(model, families),
                      **dict.fromkeys(("val_loss", "val_top1", "val_top5"))}
            if s.epoch % cfg.eval_every == 0 or s.step >= last_step:
                record |= evaluate(cfg, model, val_loader, device)
            logger.epoch(record, heatmap=s.epoch % cfg.window_epochs == 0 or s.epoch == cfg.epochs)
            s.epoch_step, s.epoch_totals, s.step_losses, s.epoch_seconds, s.epoch_waited = 0, (0.0, 0.0), (), 0.0, 0.0
            signs = failure_signs(logger.epochs, cfg.window_epochs, cfg.zeta, baseline)
            due = s.phase == "full" and monitor.update(s.base_norms, train_loss) and cfg.mode == "prelora"
            decide_phase(cfg, s, monitor if due else None)
            if due:
                if rank == 0:
                    checkpoint.write_json(run_dir / "ranks.json", s.ranks)
                signs += rank_signs(s.ranks, cfg.rank_min, cfg.rank_max, cfg.rank_rule == "minmax")
            if s.epoch == cfg.epochs and s.phase == "full" and cfg.mode == "prelora":
                signs.append(f"the convergence test did not pass in time: tau {cfg.tau}, zeta {cfg.zeta}, windows of {cfg.window_epochs}")
            for sign in signs:
                logger.warning(s.epoch, s.step, sign)
            save(pinned=s.next_phase is not None or (cfg.keep_every > 0 and s.epoch % cfg.keep_every == 0))
            if s.step >= last_step:
                break
        if stopped:
            logger.message(f"{stop.signal or 'another rank was told to stop'}: saved at step {s.step}, go on with --resume True")
    if rank == 0:
        print(phase_table(logger.epochs) if logger.epochs else f"stopped at step {s.step}, before the first epoch's end")
    return not stopped


def main(argv: list[str], signals: list[int] | None = None) -> int:
    """Exit status: 0; 2 for a user's mistake, before any work; 1 for a run that had to stop; 75 (EX_TEMPFAIL) for one that a signal
    told to stop, which saved and wants to be started again with --resume True; 130 for Ctrl-C. `signals`: see StopRequest's `received`."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: so it is
    try:
        device = distributed.start()
        with distributed.together():
            cfg, notes = parse_config(argv)
        mesh = build_mesh(cfg.dp_shard, device.type)
        found = distributed.on_rank_0(checkpoint.find, Path(cfg.run_dir)) if cfg.resume else (None, None, [])
        if cfg.fork and not found[0]:
            *found, differences = distributed.on_rank_0(find_fork, cfg)
            found, notes = (*found, []), notes + differences
        if cfg.stage_dir:
            distributed.once_per_node(stage, cfg.dataset, cfg.data_dir, cfg.stage_dir, distributed.get_rank() == 0)
        with distributed.together():
            loaders = open_run(cfg, *found)
            fresh = cfg.init_from and not found[0] and distributed.get_rank() == 0
            weights, remarks = load_init(cfg) if fresh else ({}, [])
        with distributed.together():  # now that no rank has found anything wrong
            Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, RuntimeError) as e:
        lost = distributed.get_world_size() > 1 and distributed.is_lost_rank(e)
        if lost or distributed.get_rank() == 0:
            print(f"error: {e}", file=sys.stderr)
        if lost:
            return 1
        distributed.finish()
        return 2
    with distributed.rank_log(Path(cfg.run_dir)) as log, distributed.StopRequest(signals) as stop:
        try:
            ended = train(cfg, device, mesh, stop, notes + remarks, weights, *loaders, *found)
            distributed.finish()
            return 0 if ended else distributed.REQUEUE
        except (FloatingPointError, distributed.SharedError) as e:  # on every rank
            log(f"error: {e}", console=distributed.get_rank() == 0)
        except KeyboardInterrupt:
            log(f"interrupted: go on with --run_dir {cfg.run_dir} --resume True", console=distributed.get_rank() == 0)
            return 130
        except OSError as e:
            log(f"error: {e}")
        except RuntimeError as e:
            if not distributed.is_lost_rank(e):
                raise
            log(*distributed.explain_lost_rank(Path(cfg.run_dir), e))
        return 1


if __name__ == "__main__":
    distributed.exit(main, sys.argv[1:])
