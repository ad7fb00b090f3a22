"""PreLoRA pre-training: all parameters, then base + adapters, then adapters alone (arXiv 2509.21619).

In this order: configuration, task, build and switch, one step, the loop. This text is also --help's.

    python train.py config/debug.py                         one CPU or one GPU, all three phases in minutes
    python train.py config/debug.py --mode full             the baseline
    python train.py config/debug.py --lr 1e-3 --tau 0.25    any field of Config is a flag
    torchrun --nproc_per_node 4 train.py config/debug.py    several GPUs, or CPU processes
    python launch/submit.py --nodes 16 config/x.py          a Slurm cluster
    python train.py --run_dir runs/debug --resume True      go on from its last checkpoint, on any GPUs
    python train.py config/x.py --init_from w.safetensors   start from weights

A folder holds one run: give each a --run_dir of its own, or go on with --resume True.
"""

import dataclasses
import gc
import itertools
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from config.cli import parse_config
from config.ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, PowerOfTwo
from data.datasets import get_spec
from data.device import erase, mix, normalise
from data.loader import build_black_batch, prefetch
from errors import UserError
from files import PathStr, get_absolute
from launch import distributed, failures
from lora.inject import add_lora, freeze, freeze_base, init_adapters, mark_ranks_dynamic, match_families
from lora.onednn import use_onednn
from lora.ranks import Ranks
from model import checkpoint, parallel
from model.ema import Ema
from model.optim import apply_update, build_optimizer, get_lr, get_optimizer_state, set_optimizer_state
from model.pretrained import copy_weights
from model.variants import LORA_FAMILIES, LORA_REST, VARIANTS, get_lowest
from model.vit import VisionTransformer
from monitor.clock import EpochClock
from monitor.convergence import get_mean_position, get_signs, mean_signs, rank_signs, switch_due
from monitor.log import get_freeze_step
from monitor.logger import RunLogger
from monitor.norms import get_norms
from monitor.perf import count_flops, peak_memory, reset_peak_memory, time_phases
from monitor.records import get_epoch_record, get_start_record, get_switch_record, look
from start import (
    Start,
    State,
    begin,
    begin_mean,
    choose_base,
    decide_ranks,
    get_meta,
    get_rates,
    get_schedule,
    get_static_ranks,
    open_log,
    say_done,
    spectrum_signs,
    watch_layers,
)


@dataclass
class Config:
    # run
    run_dir: PathStr = "runs/default"  # where everything of this run goes
    resume: bool = False  # go on from run_dir's last checkpoint; with a preset, an empty run_dir starts fresh
    seed: NonNegativeInt = 0  # of weights, data order, augmentation, mixup, dropout
    max_steps: PositiveInt | None = None  # stop, and save, after this step; lr still follows epochs
    keep_every: NonNegativeInt = 0  # keep every so many epochs' checkpoint, besides last two and switches'
    eval_every: PositiveInt = 1  # evaluate after every so many epochs, and after the last
    baseline: PathStr | None = None  # run directory of a mode=full run, to warn of a loss plateau above it
    log_displacement: bool = False  # log how far each window moves each layer, without weight decay's part
    profile: bool = False  # a Kineto trace of two steps of each phase, into run_dir/profile
    fork: PathStr | None = None  # start from another run's checkpoint: RUN@epoch; RUN for the latest to share
    init_from: PathStr | None = None  # start from weights: timm:NAME or FILE.safetensors, timm's or HF's
    fresh_head: bool = False  # init_from: without the head of those weights, which is for other classes
    # data
    dataset: str = "fashion_mnist"  # a row of data/datasets.py's DATASETS
    data_dir: PathStr = "datasets/fashion_mnist"  # holds train.beton, val.beton (ffcv) or raw files (folder)
    loader: Literal["ffcv", "folder", "synthetic"] = "ffcv"  # folder: torchvision's; synthetic: no files
    num_workers: NonNegativeInt | None = None  # loader threads or processes; None = one per core at hand
    image_size: PositiveInt | None = None  # pixels, both ways; None = the row's
    num_classes: PositiveInt | None = None  # None = those of the row; for a tree of one's own
    stage_dir: PathStr | None = None  # first copy the .beton files to this folder, on each node's local disk
    train_samples: PositiveInt | None = None  # train on a fixed random subset of so many images; None = all
    # model
    model: str = "tiny-debug"  # a row of model/variants.py's VARIANTS
    layer_norm_eps: PositiveFloat = 1e-6  # timm and JAX 1e-6, Hugging Face 1e-12
    dropout: Fraction = 0.0  # after the positions, attention's output and both MLP layers
    drop_path: Fraction = 0.0  # stochastic depth of the last block, rising linearly from 0
    # optimisation
    epochs: PositiveInt = 300  # the learning rate's schedule ends there
    batch_size: PositiveInt = 4096  # global: images per optimiser step
    grad_accum_steps: PositiveInt = 1  # micro-batches per optimiser step
    lr: PositiveFloat = 1e-3  # peak
    lr_warmup_steps: NonNegativeInt = 10_000  # linear, up to the peak
    lr_schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: stays at the peak, then falls linearly to 0
    lr_decay_share: Fraction = 0.2  # wsd: the last share of all steps, over which it falls
    weight_decay: NonNegativeFloat = 0.1  # torch's, times lr; of Linear and Conv weights and adapters only
    grad_clip: NonNegativeFloat = 1.0  # global norm; 0 = off
    ema_decay: Fraction = 0.0  # of a moving average of the weights, evaluated beside them; 0 = off
    rand_augment: NonNegativeInt = 0  # M of RandAugment(2, M), where 10 is the nominal maximum; 0 = off
    color_jitter: NonNegativeFloat = 0.0  # brightness, contrast, saturation by 1 ± this (timm's); 0 = off
    random_erasing: Fraction = 0.0  # probability of a box of noise in an image (timm's reprob); 0 = off
    cutmix: NonNegativeFloat = 0.0  # alpha, as mixup's; with both, a batch has the one or the other; 0 = off
    mixup: NonNegativeFloat = 0.0  # alpha of Beta(alpha, alpha); 0 = off
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the compute; masters and optimiser stay float32
    residual_dtype: Literal["float32", "bfloat16"] = "float32"  # of the stream between blocks
    compile: bool = True  # torch.compile, one region per block
    activation_checkpointing: Literal["none", "block", "selective"] = "none"  # recompute a block, or half
    # several GPUs
    dp_shard: PositiveInt | None = None  # GPUs that share one copy of the masters; None = those of a node
    reshard_after_forward: bool = True  # free a block's gathered weights between forward and backward
    frozen_base: Literal["replicate", "shard"] = "replicate"  # lora phase: base whole on each GPU, or not
    # PreLoRA
    mode: Literal["prelora", "full", "lora"] = "prelora"  # full: baseline; lora: static LoRA, adapters+rest
    switch_rule: Literal["algorithm1", "forecast"] = "algorithm1"  # forecast: without thresholds
    tau: PositiveFloat = 0.5  # Algorithm 1: threshold on the weight norms' change between windows, in %
    zeta: PositiveFloat = 2.5  # Algorithm 1: threshold on the training loss's change between windows, in %
    num_windows: int = 3  # k, consecutive windows that must agree; forecast: fits up to their ends
    window_epochs: PositiveInt = 3  # m, epochs per window
    forecast_shortfall: NonNegativeFloat | None = None  # forecast: of adapters, by one fork (replay.py)
    warmup_cost: PositiveFloat | None = None  # forecast: a step of the warmup in full ones; None = timed
    lora_cost: PositiveFloat | None = None  # forecast: a step of the lora phase; None = timed at the start
    switch_epoch: PositiveInt | None = None  # switch after so many epochs instead of by a rule
    lora_warmup_epochs: NonNegativeInt = 10  # w: epochs in which base and adapters train together
    rank_min: PowerOfTwo = 8  # smallest rank of a layer (Algorithm 2)
    rank_max: PowerOfTwo = 64  # largest; mode lora: of every layer
    rank_rule: Literal["minmax", "uniform", "budget", "spectrum"] = "minmax"  # of lora/ranks.py
    rank_budget: PositiveFloat | None = None  # other rules: adapters' share of the base; None = minmax's
    lora_scaling: Literal["authors", "alpha", "rslora", "matched", "coherent"] = "authors"  # lora/layers.py
    lora_alpha: PositiveFloat | None = None  # of alpha, rslora; a factor of matched, coherent: None = 1
    target_modules: tuple[str, ...] = tuple(LORA_FAMILIES)  # the Linears of adapters, ranks and the test
    lora_trainable: Literal["adapters", "adapters+rest"] = "adapters"  # rest: head, norms, embeddings
    freeze_blocks: NonNegativeInt = 0  # lowest blocks, and embeddings, frozen: in lora; full: at switch_epoch
    freeze_mean: bool = False  # freeze the base at its mean over the ends of the last window_epochs epochs
    optimizer_at_switch: Literal["keep", "reset"] = "keep"  # reset: fresh at both switches, as the authors'
    lora_lr_factor: PositiveFloat | None = None  # lora phase: from k × the rate there to 0; None = goes on
    lora_rewarm_steps: NonNegativeInt = 0  # after the freeze lr rises from 0 again (the authors': 100 steps)

    def __post_init__(self):
        if self.init_from and not self.init_from.startswith("timm:"):
            self.init_from = get_absolute(self.init_from)  # a resumed run asks whether it is the same file


# ------------------------------------------------------------------------------------------------------------
# the task: what somebody with another model or another loss edits


def build_net(cfg: Config) -> nn.Module:
    """The model without adapters, on the meta device: names and shapes, no numbers yet. It has `blocks`,
    `init_weights(seed)`, and the Linears that model/variants.py's LORA_FAMILIES name."""
    data = get_spec(cfg.dataset, cfg.image_size)
    options = dict(dropout=cfg.dropout, drop_path=cfg.drop_path, layer_norm_eps=cfg.layer_norm_eps)
    options["residual_dtype"] = getattr(torch, cfg.residual_dtype)
    with torch.device("meta"):
        return VisionTransformer(cfg.model, data.image_size, cfg.num_classes or data.num_classes, **options)


def get_loss(cfg: Config, logits: Tensor, targets: list[tuple[Tensor, float]], reduction="mean") -> Tensor:
    """Cross-entropy of logits (B, C), in training and in evaluation. `targets`: labels (B,), -1 for padding,
    and their share; mixing makes two such pairs, whose shares add up to 1."""
    options = dict(ignore_index=-1, reduction=reduction)
    loss = 0.0
    for labels, share in targets:
        loss += share * F.cross_entropy(logits, labels, **options)
    return loss


@torch.no_grad()
def evaluate(
    cfg: Config, model: nn.Module, batches: Iterator, device: torch.device, prefix="val"
) -> dict[str, float]:
    """Loss, top-1 and top-5 in % over the batches of all processes together."""
    data = get_spec(cfg.dataset, cfg.image_size)
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # summed loss, top-1 hits, top-5 hits, images
    for images, labels in prefetch(batches, device):
        with parallel.autocast(device, cfg.dtype):
            logits = model(normalise(images, data.mean, data.std)).float()  # (B, C)
        top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
        hits = top5 == labels[:, None]  # (B, 5), a padded row never hits
        loss = get_loss(cfg, logits, [(labels, 1.0)], reduction="sum")
        totals += torch.stack([loss, hits[:, 0].sum(), hits.sum(), (labels >= 0).sum()])
    parallel.reshard(model)
    loss, top1, top5, count = distributed.sum_over_processes(totals).tolist()
    shares = {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}
    return {f"{prefix}_{name}": value for name, value in shares.items()}


# ------------------------------------------------------------------------------------------------------------
# build and switch


def build_model(
    cfg: Config, phase: str, ranks: Ranks | None, device, mesh: DeviceMesh | None = None, frozen_blocks=0
) -> nn.Module:
    """The model of a phase, compiled, sharded over `mesh`, on `device`; its weights are still to be set.
    There is no other way to build one. `frozen_blocks`: in the full phase; the lora phase has cfg's."""
    model = build_net(cfg)
    if phase != "full":
        families = match_families(model, LORA_FAMILIES, tuple(ranks))
        add_lora(model, families, ranks, cfg.lora_alpha, cfg.lora_scaling)
    if phase == "lora":
        rest = cfg.mode == "lora" or cfg.lora_trainable == "adapters+rest"
        freeze_base(model, keep=LORA_REST if rest else ())
    freeze(model, get_lowest(cfg.freeze_blocks if phase == "lora" else frozen_blocks))
    use_onednn(model.blocks)
    checkpointing, replicate = cfg.activation_checkpointing, cfg.frozen_base == "replicate"
    # W + B A is summed from a W in float32: where it is gathered for that, it is gathered in float32.
    is_summed = phase == "warmup" or (phase == "lora" and not replicate)
    dtype = torch.float32 if is_summed else getattr(torch, cfg.dtype)
    parallel.parallelize(model, mesh, cfg.compile, dtype, checkpointing, cfg.reshard_after_forward, replicate)
    parallel.materialise(model, device)
    for block in model.blocks:
        with parallel.unsharded(block):  # what forward sees are the gathered parameters
            mark_ranks_dynamic(block)
    return model


def build_on_meta(cfg: Config, phase="full", ranks: Ranks | None = None, frozen_blocks=0) -> nn.Module:
    """A phase's model without its numbers, uncompiled: for its shapes, and to count what it computes."""
    plain = dataclasses.replace(cfg, compile=False, activation_checkpointing="none", dtype="float32")
    return build_model(plain, phase, ranks, "meta", None, frozen_blocks)


def switch_phase(
    cfg: Config, model, optimizer, phase: str, ranks: Ranks, mesh: DeviceMesh | None = None, frozen_blocks=0
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Rebuild the model in its next phase, and move weights and optimiser state over by name. Returns both.

    Insertion: the base keeps its moments and step counts, adapters start fresh with B = 0, so the function is
    unchanged. Freeze: the adapters keep theirs, the base's go with the old optimiser. (optimizer_at_switch
    "reset" keeps nothing of the old optimiser.)

    Sharded, each process copies its own shards: same mesh, same cut, no traffic. Only a base that is
    replicated from here on is gathered, one parameter at a time. Moments are handed over, not copied.
    """
    parallel.reshard(model)
    weights, moments = model.state_dict(), get_optimizer_state(model, optimizer)
    new = build_model(cfg, phase, ranks, next(model.parameters()).device, mesh, frozen_blocks)
    tensors = new.state_dict()
    for name in [name for name in tensors if name in weights]:
        parallel.copy_over(weights[name], tensors[name])
    if tensors.keys() - weights.keys():  # adapters, which may start from the weights that are now in place
        init_adapters(new, cfg.seed)
    new_optimizer = build_optimizer(new, cfg.weight_decay)
    if cfg.optimizer_at_switch == "keep":
        set_optimizer_state(new, new_optimizer, moments)
    return new, new_optimizer


def compile_phase(cfg: Config, s: State, model: nn.Module, optimizer, device: torch.device) -> dict:
    """Compile a phase's graphs, so that no epoch's time has the stall in it, and return what the phase costs,
    for the log. A training step and an evaluation of black images compile them, and leave no trace in model
    or optimiser."""
    batch_size = cfg.batch_size // (cfg.grad_accum_steps * distributed.get_world_size())
    images, labels = build_black_batch(batch_size, get_spec(cfg.dataset, cfg.image_size).image_size, device)
    failed = torch.ones((), dtype=torch.bool, device=device)  # so that nothing is updated
    black = itertools.repeat((images, labels))
    train_once = lambda: train_step(cfg, model.train(), optimizer, black, 0, 0.0, failed)
    evaluate_once = lambda: evaluate(cfg, model, ((images, labels) for _ in range(1)), device)
    with distributed.stop_signals_held():  # a scheduler sends them to the compilers, too
        compiled = parallel.compile_graphs(cfg.compile, model, optimizer, train_once, evaluate_once)
    flops = count_flops(build_on_meta(cfg, s.phase, s.ranks, s.frozen_blocks), images.to("meta").float())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {**compiled, "trainable_params": trained, "flops_per_image": flops}


def time_costs(cfg: Config, net: nn.Module, device: torch.device, mesh: DeviceMesh | None) -> None:
    """Set cfg's warmup_cost and lora_cost, for the forecast, from steps on black images at learning rate 0
    with every rank rank_max, which is what adapters cost at most. The slowest process's time counts."""
    ranks = get_static_ranks(cfg, net)
    size = get_spec(cfg.dataset, cfg.image_size).image_size
    micro_batch = cfg.batch_size // (cfg.grad_accum_steps * distributed.get_world_size())
    batches = itertools.repeat(build_black_batch(micro_batch, size, device))
    failed = torch.zeros((), dtype=torch.bool, device=device)

    def build_step(phase: str):
        model = build_model(cfg, phase, None if phase == "full" else ranks, device, mesh)
        model.init_weights(cfg.seed)
        init_adapters(model, cfg.seed)
        optimizer = build_optimizer(model, cfg.weight_decay)
        return lambda: train_step(cfg, model.train(), optimizer, batches, 0, 0.0, failed)

    if distributed.get_world_rank() == 0:
        print("timing a step of each phase, for the forecast", file=sys.stderr)
    with distributed.stop_signals_held():  # a scheduler sends them to the compilers, too
        seconds = time_phases(build_step, device)
    slowest = {phase: distributed.max_over_processes(each, device) for phase, each in seconds.items()}
    cfg.warmup_cost = cfg.warmup_cost or round(slowest["warmup"] / slowest["full"], 3)
    cfg.lora_cost = cfg.lora_cost or round(slowest["lora"] / slowest["full"], 3)


# ------------------------------------------------------------------------------------------------------------
# one step


def train_step(
    cfg: Config, model, optimizer, batches: Iterator, step: int, lr: float, failed: Tensor
) -> Tensor:
    """Optimiser step number `step`, from 0, on the next `grad_accum_steps` micro-batches of `batches`.

    `failed`, a flag on the device, is set by a loss or gradient norm that is not finite, on any process; from
    then on nothing is updated. Returns (loss, top-1 hits, gradient norm, failed) of all processes, float64
    (4,), on the device: nothing here waits for it.
    """
    data, world_size = get_spec(cfg.dataset, cfg.image_size), distributed.get_world_size()
    totals = torch.zeros(2, dtype=torch.float64, device=failed.device)  # loss, hits
    for micro_step in range(cfg.grad_accum_steps):
        images, labels = next(batches)  # (B, 3, H, W) uint8 channels_last, (B,)
        # Everything random is a function of the micro-batch's number in the run: after a resume the same.
        number = (step * cfg.grad_accum_steps + micro_step) * world_size + distributed.get_world_rank()
        torch.manual_seed(zlib.crc32(str((cfg.seed, number)).encode()))  # for dropout and drop path
        images = normalise(images, data.mean, data.std)  # (B, 3, H, W) float32
        images, targets = mix(images, labels, cfg.mixup, cfg.cutmix, cfg.seed, number)
        images = erase(images, cfg.random_erasing, cfg.seed, number)
        parallel.sync_gradients(model, micro_step == cfg.grad_accum_steps - 1)  # they travel once a step
        with parallel.autocast(failed.device, cfg.dtype):
            logits = model(images).float()  # (B, C)
        loss = get_loss(cfg, logits, targets)
        (loss / cfg.grad_accum_steps).backward()
        hits = (logits.argmax(dim=1) == labels).sum()  # mixed: against the label of the image itself
        totals += torch.stack([loss.detach() / (cfg.grad_accum_steps * world_size), hits])
    distributed.sum_over_processes(totals)
    norm = parallel.clip_gradients(optimizer, cfg.grad_clip)  # of all processes
    failed |= ~(torch.isfinite(norm) & torch.isfinite(totals[0]))
    apply_update(optimizer, lr, skip=failed)
    return torch.stack([*totals, norm.double(), failed.double()])


# ------------------------------------------------------------------------------------------------------------
# the loop


def get_next_phase(cfg: Config, s: State, epochs: list[dict]) -> tuple[str, Ranks | None, int]:
    """Phase, ranks, frozen blocks of the next epoch, from the log: Algorithm 1 (monitor/convergence.py) or
    the forecast ends the full phase, Algorithm 2 gives the ranks, lora_warmup_epochs epochs end the
    warmup."""
    phase, ranks, frozen_blocks = s.phase, s.ranks, s.frozen_blocks
    if s.epoch_step:  # resumed within an epoch, which ends in its phase whatever settings are new
        return phase, ranks, frozen_blocks
    # Asked in mode full, too: it raises for norms of nan.
    due = phase == "full" and switch_due(epochs, cfg, get_rates)
    if cfg.switch_rule == "forecast":  # a fit's last digits are another machine's own: all go by process 0
        due = checkpoint.on_process_0(bool, due)
    if due and cfg.mode == "prelora":
        phase, ranks = "warmup", decide_ranks(cfg, build_net(cfg), epochs)
    elif due:  # mode full stays in its phase
        frozen_blocks = cfg.freeze_blocks
    warmed_up = sum(epoch["phase"] == "warmup" for epoch in epochs)
    if phase == "warmup" and warmed_up >= cfg.lora_warmup_epochs:
        phase, frozen_blocks = "lora", cfg.freeze_blocks
    return phase, ranks, frozen_blocks


def train(cfg: Config, start: Start, device: torch.device, mesh: DeviceMesh | None, stop) -> bool:
    """One run, from its `start` to its end. Returns whether it ended: False if told to `stop`, after saving.

    Raises FloatingPointError for a loss or gradient norm that is not finite, with weights and optimiser as
    they were before that step; UserError where a checkpoint can't be written, with the one before it intact.
    """
    s, train_loader = start.state, start.train_loader
    steps_per_epoch = train_loader.num_samples // cfg.batch_size
    total_steps = cfg.epochs * steps_per_epoch
    last_step = min(cfg.max_steps or total_steps, total_steps)
    lr_at = partial(get_lr, **get_schedule(cfg, total_steps))
    # A run that was stopped between an epoch's last step and its evaluation still has that to do.
    if s.step >= last_step and s.epoch_step < steps_per_epoch:
        return say_done(cfg, s, total_steps)
    forecasts = cfg.switch_rule == "forecast" and cfg.switch_epoch is None and s.phase == "full"
    if forecasts and not (cfg.warmup_cost and cfg.lora_cost):
        time_costs(cfg, build_net(cfg), device, mesh)
        start.notes.append(
            f"forecast: steps cost {cfg.warmup_cost} (warmup), {cfg.lora_cost} (lora) full ones"
        )

    model = build_model(cfg, s.phase, s.ranks, device, mesh, s.frozen_blocks)
    optimizer = build_optimizer(model, cfg.weight_decay)
    if start.checkpoint:
        checkpoint.load(start.checkpoint, model, optimizer)
    else:
        model.init_weights(cfg.seed)
        copy_weights(model, start.take_weights())
        init_adapters(model, cfg.seed)
    ema = Ema(model, cfg.ema_decay, mesh)
    if start.checkpoint:
        ema.load(start.checkpoint, model)
    families = match_families(model, LORA_FAMILIES, cfg.target_modules)
    displacement = watch_layers(cfg, start, model, families)
    log = open_log(cfg, start, last_step)  # last, because it cuts the run's logs back to the checkpoint
    mean = begin_mean(cfg, start, model, log.epochs)
    besides = (ema, mean, displacement)  # what a checkpoint has besides model and optimiser
    phase, ranks, frozen_blocks = get_next_phase(cfg, s, log.epochs)
    costs = {}
    if s.is_in(phase, frozen_blocks):  # a phase that is left at once is not compiled
        costs = compile_phase(cfg, s, model, optimizer, device)
    log.write(get_start_record(cfg, s, start, device, mesh, costs))

    look_every = 1 if device.type == "cpu" else 20  # steps: a look at a GPU's results waits for them
    stopped = False
    while s.epoch < cfg.epochs:
        # -- the switch: adapters are put in (warmup), the base is frozen (lora), or blocks are (mode full)
        if not s.is_in(phase, frozen_blocks):
            began, previous = time.perf_counter(), s.phase
            s.phase, s.ranks, s.frozen_blocks = phase, ranks, frozen_blocks
            reset_peak_memory(device)
            mean_epochs = mean.put_into(model) if phase == "lora" else 0
            model, optimizer = switch_phase(cfg, model, optimizer, phase, ranks, mesh, frozen_blocks)
            ema.follow(model)
            displacement.follow(model, s.step)
            gc.collect()  # compiled blocks stand in reference cycles, and hold the old model
            peak_bytes = distributed.max_over_processes(peak_memory(device), device)
            costs = compile_phase(cfg, s, model, optimizer, device)
            seconds = time.perf_counter() - began
            record = get_switch_record(s, previous, peak_bytes, costs, seconds, mean_epochs)
            signs = mean_signs(cfg, record)
            if previous == "full" and ranks:
                signs += rank_signs(cfg, ranks) + spectrum_signs(cfg, build_net(cfg), log.epochs)
            log.switch(record, signs)

        # -- an epoch of training, or what is left of it
        steps = min(steps_per_epoch - s.epoch_step, last_step - s.step)
        frozen_at = get_freeze_step(log.epochs) if s.phase == "lora" else None
        s.base = choose_base(cfg, s, steps, frozen_at)  # a lora phase's checkpoints leave out what is frozen
        batches = prefetch(train_loader.epoch(s.epoch, s.epoch_step * cfg.grad_accum_steps), device)
        trace = log.get_trace_path(s.phase) if cfg.profile and steps >= 3 else None
        clock = start.clock = EpochClock(s, model, batches, device, trace)
        failed = torch.zeros((), dtype=torch.bool, device=device)
        pending = []  # (learning rate, result) of the steps that the host has not looked at
        model.train()
        for i in range(steps):
            lr = lr_at(s.step, frozen_at=frozen_at)
            pending.append((lr, train_step(cfg, model, optimizer, clock.batches, s.step, lr, failed)))
            ema.update()
            s.step, s.epoch_step = s.step + 1, s.epoch_step + 1
            clock.step()
            log.advance()
            if s.step % look_every == 0 or i == steps - 1:  # the loop's only sync
                look(s, log, pending)
                log.progress(s.phase, s.epoch_loss / s.epoch_step, clock.images_per_second(cfg.batch_size))
                stopped = stop.on_any_process(device)
                if stopped:
                    break
        s.epoch_seconds, s.epoch_waited = clock.close()
        if stopped or s.epoch_step < steps_per_epoch:  # told to stop, or max_steps in mid-epoch
            save(cfg, s, log, model, optimizer, besides, train_loader.num_samples, pinned=False)
            break

        # -- the epoch's end: measure, evaluate, decide, save
        s.epoch += 1
        processes = distributed.gather(clock.own_costs | {"host": distributed.get_host()})
        lr = lr_at(s.step - 1, frozen_at=frozen_at)
        record = get_epoch_record(cfg, s, device, processes, costs, lr, log.take_step_losses())
        record |= get_norms(model, families)
        record |= displacement.end_epoch(model, s.epoch, s.step, partial(lr_at, frozen_at=frozen_at))
        if s.epoch % cfg.eval_every == 0 or s.step >= last_step:
            record |= evaluate(cfg, model, start.val_loader.epoch(0), device)
            if cfg.ema_decay:
                with ema.swapped_in(model):
                    record |= evaluate(cfg, model, start.val_loader.epoch(0), device, prefix="val_ema")
        log.epoch(record, heatmap=s.epoch % cfg.window_epochs == 0 or s.epoch == cfg.epochs)
        mean.end_epoch(model, get_mean_position(log.epochs, cfg))
        s.begin_epoch()
        phase, ranks, frozen_blocks = get_next_phase(cfg, s, log.epochs)
        log.decided(s, get_signs(cfg, s, log.epochs, start.baseline, phase), ranks)
        pinned = not s.is_in(phase, frozen_blocks) or (cfg.keep_every > 0 and s.epoch % cfg.keep_every == 0)
        save(cfg, s, log, model, optimizer, besides, train_loader.num_samples, pinned)
        if s.step >= last_step:
            break
    log.end(s.step, stopped, stop.signal)
    return not stopped


def save(
    cfg: Config, s: State, log: RunLogger, model, optimizer, besides: tuple, images: int, pinned: bool
) -> None:
    """A checkpoint, at which the logs will be cut back when a run goes on from it. `besides`: what else has
    tensors to save, see `get_tensors`."""
    s.metrics_bytes, s.steps_bytes = log.metrics_bytes, log.steps_bytes
    parallel.reshard(model)
    tensors = {name: tensor for each in besides for name, tensor in each.get_tensors().items()}
    checkpoint.save(Path(cfg.run_dir), model, optimizer, get_meta(cfg, s, images), pinned, tensors)


def main(argv: list[str], signals: list[int] | None = None) -> int:
    """Exit status: 0; 2 for a user's mistake, before any work; 1 for a run that had to stop; 75 (EX_TEMPFAIL)
    for one that a signal told to stop, which saved and wants to be started again with --resume True; 130 for
    Ctrl-C. `signals`: see StopRequest's `received`."""
    try:
        device = distributed.start()
        with distributed.together():
            cfg, notes = parse_config(Config, argv, __doc__)
        parallel.set_up_device(device, VARIANTS[cfg.model]["embed_dim"])
        mesh = parallel.build_mesh(cfg.dp_shard, device.type, distributed.TIMEOUT)
        start = begin(cfg, build_net(cfg), notes)
    except (UserError, RuntimeError) as error:  # a lost process is a RuntimeError; bugs are raised on
        return failures.refuse(error)
    run_dir = Path(cfg.run_dir)
    with distributed.process_log(run_dir) as say, distributed.StopRequest(signals) as stop:
        try:
            with closing(start):
                ended = train(cfg, start, device, mesh, stop)
            distributed.finish()
        except (UserError, FloatingPointError, RuntimeError, KeyboardInterrupt) as error:
            return failures.explain(error, run_dir, say)
    return 0 if ended else distributed.REQUEUE


if __name__ == "__main__":
    distributed.exit(main, sys.argv[1:])
