"""PreLoRA on a model that is not a ViT: a byte-level GPT, trained from scratch on Python's own source.

    python lm.py                                       three phases in minutes on 2 cores, into runs/lm
    python lm.py --mode full --run_dir runs/lm_full    the baseline; any field of Config is a flag
    python -m monitor.plot runs/lm                     the same figures as a ViT's
    python lm.py --replay runs/lm_full --tau 1 2       replay.py: when would other settings have switched?
    python lm.py --study                               the arms and their controls: docs/lm.md

Nothing here is a ViT's: adapters, ranks, convergence test, optimiser and logs are the ones that train.py has,
and what they know of this model is the table LM_FAMILIES. An epoch is a fixed number of steps on random crops
of the text, not a pass through it. `images` in logs and figures are sequences here.

Left out on purpose, because a run takes minutes: checkpoints and --resume, several GPUs, torch.compile. A run
that was killed is begun anew in another --run_dir.
"""

import hashlib
import math
import platform
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.cli import parse_flags
from config.ranges import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PowerOfTwo,
    check_ranges,
)
from errors import UserError, exit_with
from files import PathStr, is_run, write_json
from lora.inject import (
    Families,
    add_lora,
    freeze_base,
    get_adapter_names,
    init_adapters,
    match_families,
    rank_costs,
)
from lora.onednn import use_onednn
from lora.ranks import Ranks, choose_ranks
from model.optim import apply_update, build_optimizer, get_lr, get_optimizer_state, set_optimizer_state
from monitor.clock import EpochClock
from monitor.convergence import get_changes, get_signs, rank_signs, switch_due
from monitor.log import get_freeze_step
from monitor.logger import RunLogger
from monitor.norms import get_norms
from monitor.perf import count_flops, peak_memory, reset_peak_memory
from monitor.records import get_epoch_record, get_start_record, get_switch_record, look

BYTES = 256  # the vocabulary
HELD_OUT = 20  # the last twentieth of the text, 5 %, is never trained on
LM_FAMILIES = {  # family -> the Linear's name, row part, number of row parts; in nanoGPT's names
    "q": ("h.*.attn.c_attn", 0, 3),
    "k": ("h.*.attn.c_attn", 1, 3),
    "v": ("h.*.attn.c_attn", 2, 3),
    "attn_proj": ("h.*.attn.c_proj", 0, 1),
    "fc": ("h.*.mlp.c_fc", 0, 1),
    "mlp_proj": ("h.*.mlp.c_proj", 0, 1),
}
LM_REST = ("wte.*", "wpe.*", "h.*.ln_?.*", "ln_f.*", "lm_head.*")  # what static LoRA trains besides adapters


@dataclass
class Config:
    """Fields that train.py's Config has, too, mean the same there."""

    run_dir: PathStr = "runs/lm"  # where everything of this run goes
    seed: NonNegativeInt = 0  # of weights, adapters and crops
    text_sha256: str | None = None  # of the text that it must be; None = this Python's, and filled in
    # model
    context: PositiveInt = 128  # bytes of a sequence
    width: PositiveInt = 320
    layers: PositiveInt = 4
    heads: PositiveInt = 5
    # optimisation
    epochs: PositiveInt = 24  # the learning rate's schedule ends there
    steps_per_epoch: PositiveInt = 32
    batch_size: PositiveInt = 8  # sequences per step
    eval_sequences: PositiveInt = 128  # of the held-out text, at each epoch's end
    final_sequences: PositiveInt = 1024  # of the held-out text, at the run's end
    lr: PositiveFloat = 1e-3  # peak; 5e-4 and 2e-3 end higher
    lr_warmup_steps: NonNegativeInt = 32  # linear, up to the peak
    lr_schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: stays at the peak, then falls linearly to 0
    lr_decay_share: Fraction = 0.2  # wsd: the last share of all steps, over which it falls
    weight_decay: NonNegativeFloat = 0.1  # torch's, times lr; of Linear weights and adapters only
    grad_clip: NonNegativeFloat = 1.0  # global norm; 0 = off
    dtype: Literal["float32"] = "float32"  # of everything
    # PreLoRA. Largest change of a family's norm and of the training loss between windows of 2 epochs, as
    # measured with all parameters:
    #   3-4 -> 5-6: 7.2 %, 4.3 %    -> 7-8: 5.1 %, 2.3 %      -> 9-10: 4.4 %, 4.6 %    -> 11-12: 4.1 %, 4.5 %
    #   -> 13-14: 2.4 %, 5.2 %      -> 15-16: 1.8 %, 3.1 %    -> 17-18: 1.1 %, 2.7 %   -> 19-20: 0.5 %, 4.3 %
    # The loss changes as much late as early, so zeta only keeps the first windows out and tau decides: it
    # passes after 16 epochs.
    mode: Literal["prelora", "full", "lora"] = "prelora"  # full: baseline; lora: static LoRA, adapters+rest
    switch_rule: Literal["algorithm1", "forecast"] = "algorithm1"  # forecast: monitor/forecast.py
    tau: PositiveFloat = 3.0  # Algorithm 1: threshold on the weight norms' change between windows, in %
    zeta: PositiveFloat = 8.0  # Algorithm 1: threshold on the training loss's change between windows, in %
    num_windows: int = 3  # k, consecutive windows that must agree
    window_epochs: PositiveInt = 2  # m, epochs per window
    forecast_shortfall: NonNegativeFloat | None = None  # forecast: of adapters, by one fork
    warmup_cost: PositiveFloat | None = None  # forecast: a step of the warmup in full ones
    lora_cost: PositiveFloat | None = None  # forecast: a step of the lora phase
    switch_epoch: PositiveInt | None = None  # switch after so many epochs instead of by a rule
    lora_warmup_epochs: NonNegativeInt = 1  # w: epochs in which base and adapters train together
    rank_min: PowerOfTwo = 4  # smallest rank of a layer (Algorithm 2)
    rank_max: PowerOfTwo = 32  # largest; mode lora: of every layer
    rank_rule: Literal["minmax", "uniform", "budget"] = "minmax"  # Algorithm 2; one for all; by the change
    rank_budget: PositiveFloat | None = None  # uniform, budget: adapters' share of the base; None = minmax's
    lora_scaling: Literal["authors", "alpha", "rslora", "matched", "coherent"] = "coherent"  # lora/layers.py
    lora_alpha: PositiveFloat | None = None  # of alpha, rslora; a factor of matched, coherent: None = 1
    target_modules: tuple[str, ...] = tuple(LM_FAMILIES)  # the Linears of adapters, ranks and the test
    lora_lr_factor: PositiveFloat | None = 2.0  # lora phase: from k × the rate there to 0; None = goes on
    lora_rewarm_steps: NonNegativeInt = 0  # after the freeze lr rises from 0 again


def check_config(cfg: Config) -> None:
    """Raise UserError, in one sentence, for the first field that is out of range or contradicts another."""
    check_ranges(cfg)
    unknown = [family for family in cfg.target_modules if family not in LM_FAMILIES]
    total_steps = cfg.epochs * cfg.steps_per_epoch
    has_alpha, needs_alpha = cfg.lora_alpha is not None, cfg.lora_scaling in ("alpha", "rslora")
    has_budget, is_minmax = cfg.rank_budget is not None, cfg.rank_rule == "minmax"
    switch = cfg.switch_epoch
    forecasts = cfg.switch_rule == "forecast" and switch is None
    decay_steps = round(cfg.lr_decay_share * total_steps) if cfg.lr_schedule == "wsd" else 0
    knows_too_little = None in (cfg.forecast_shortfall, cfg.warmup_cost, cfg.lora_cost)
    for wrong, sentence in (
        (cfg.run_dir == "", "run_dir is empty"),
        (cfg.width % cfg.heads, f"width {cfg.width} is not divisible by {cfg.heads} heads"),
        (unknown, f"unknown target modules {unknown}, there are: {', '.join(LM_FAMILIES)}"),
        (not cfg.target_modules, "target_modules is empty"),
        (cfg.rank_min > cfg.rank_max, f"rank_min {cfg.rank_min} is above rank_max {cfg.rank_max}"),
        (cfg.rank_max > cfg.width, f"rank_max {cfg.rank_max} is above the width {cfg.width}"),
        (needs_alpha and not has_alpha, f"lora_scaling {cfg.lora_scaling} needs --lora_alpha"),
        (has_alpha and cfg.lora_scaling == "authors", "lora_scaling authors is 1 and has no lora_alpha"),
        (cfg.rank_rule == "spectrum", "rank_rule spectrum needs what train.py logs and lm.py does not"),
        (has_budget and is_minmax, "rank_budget is for rank_rule uniform or budget; minmax has none"),
        (cfg.num_windows < 2, f"num_windows must be at least 2, not {cfg.num_windows}"),
        (forecasts and cfg.mode != "prelora", f"switch_rule forecast has no meaning with mode {cfg.mode}"),
        (
            forecasts and cfg.lr_schedule != "cosine",
            "switch_rule forecast needs --lr_schedule cosine: before wsd's decay no log tells what it brings",
        ),
        (
            forecasts and knows_too_little,
            "switch_rule forecast needs --forecast_shortfall, --warmup_cost and --lora_cost: `python lm.py "
            "--replay BASELINE --switch_rule forecast --calibrate RUN --times RUN` measures them",
        ),
        (switch and cfg.mode != "prelora", f"switch_epoch has no meaning with mode {cfg.mode}"),
        (
            switch and not 2 * cfg.window_epochs <= switch < cfg.epochs,
            f"switch_epoch {switch} is not in {2 * cfg.window_epochs}, two windows, to {cfg.epochs - 1}",
        ),
        (
            cfg.lr_warmup_steps + decay_steps > total_steps,
            f"lr_decay_share {cfg.lr_decay_share} begins within lr_warmup_steps {cfg.lr_warmup_steps}",
        ),
        (
            cfg.lr_warmup_steps >= total_steps,
            f"lr_warmup_steps {cfg.lr_warmup_steps} leaves nothing of {total_steps} steps",
        ),
    ):
        if wrong:
            raise UserError(sentence)


# ------------------------------------------------------------------------------------------------------------
# the text


# Folders without which the text is code that people wrote: installed packages, which differ from machine to
# machine, tests, and tables that a program wrote. lib2to3 and idlelib are not in every Debian's Python.
NOT_READ = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3"}
NOT_READ |= {"encodings", "pydoc_data", "__pycache__"}
MACHINE_MADE = ("_sysconfigdata", "sitecustomize", "usercustomize", "config-")  # names begin so


def read_text(root: str | Path | None = None) -> bytes:
    """The source of Python's standard library (`root`: another folder's), file after file.

    The order is that of a hash of each file's path in there, so that neighbours, and the last 5 %, come from
    all over the library, and it is the same on every machine. Raises UserError where no text is found.
    """
    root = Path(root or sysconfig.get_paths()["stdlib"])
    files = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        made = any(part.startswith(MACHINE_MADE) for part in parts)
        if not made and NOT_READ.isdisjoint(parts):
            files["/".join(parts)] = path
    if not files:
        raise UserError(f"{root} holds no Python source, which is the text to train on")
    order = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    return b"".join(files[name].read_bytes() for name in order)


def hash_text(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def split_text(text: bytes) -> tuple[Tensor, Tensor]:
    """(training text, held-out text), uint8 (bytes,) each: the last 5 % are never trained on."""
    numbers = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    held_out = len(numbers) // HELD_OUT
    return numbers[:-held_out], numbers[-held_out:]


def get_crops(text: Tensor, cfg: Config, step: int) -> tuple[Tensor, Tensor]:
    """Step `step`'s random crops of the text, and of each byte the next one: a function of seed and step."""
    rng = torch.Generator().manual_seed(zlib.crc32(str((cfg.seed, step)).encode()))
    starts = torch.randint(len(text) - cfg.context, (cfg.batch_size,), generator=rng)
    return cut(text, starts, cfg.context)


def cut(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """(bytes, next bytes), int64 (B, T) each, of the sequences that begin at `starts` (B,)."""
    windows = text[starts[:, None] + torch.arange(context + 1)].long()  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


# ------------------------------------------------------------------------------------------------------------
# the model


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=False)  # q, k, v
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, C / heads) each
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(x.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.ln_2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Bytes (B, T) -> logits of the next byte (B, T, 256)."""

    def __init__(self, context: int, width: int, layers: int, heads: int):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(BYTES, width), nn.Embedding(context, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, BYTES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]  # (B, T, C)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """GPT-2's: normal of 0.02, what ends in the residual stream smaller by the root of their number."""
        rng = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                ends_in_stream = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02, generator=rng)
                p.mul_(1 / math.sqrt(2 * len(self.h)) if ends_in_stream else 1.0)


def build_net(cfg: Config, device="meta") -> nn.Module:
    """The model without adapters. On the meta device: names and shapes, no numbers."""
    with torch.device(device):
        return GPT(cfg.context, cfg.width, cfg.layers, cfg.heads)


@torch.no_grad()
def evaluate(cfg: Config, model: nn.Module, text: Tensor, sequences: int) -> dict[str, float]:
    """Loss in nats, top-1 and top-5 of the next byte in %, on so many sequences evenly spaced over a text.
    Each begins without a past: its first prediction has one byte to go by, its last `context` of them."""
    starts = torch.linspace(0, len(text) - cfg.context - 1, sequences).long()
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)  # summed loss, top-1 hits, top-5 hits
    for some in starts.split(cfg.batch_size):
        tokens, targets = cut(text, some, cfg.context)
        logits = model(tokens).flatten(0, 1)  # (B · T, 256)
        hits = logits.topk(5, dim=1).indices == targets.flatten()[:, None]
        loss = F.cross_entropy(logits, targets.flatten(), reduction="sum")
        totals += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
    loss, top1, top5 = (totals / (len(starts) * cfg.context)).tolist()
    return {"val_loss": loss, "val_top1": 100 * top1, "val_top5": 100 * top5}


# ------------------------------------------------------------------------------------------------------------
# the phases


def get_families(cfg: Config, model: nn.Module) -> Families:
    return match_families(model, LM_FAMILIES, cfg.target_modules)


def count_base(cfg: Config, net: nn.Module) -> tuple[int, dict[str, list[int]]]:
    """Parameters of `net`, a model without adapters, and what one more rank adds to each layer of each
    family."""
    return sum(p.numel() for p in net.parameters()), rank_costs(net, get_families(cfg, net))


def decide_ranks(cfg: Config, net: nn.Module, epochs: list[dict]) -> Ranks:
    """Each layer's rank by `cfg.rank_rule`, from the epoch records of a full phase."""
    return choose_ranks(cfg, get_changes(epochs, cfg), *count_base(cfg, net))


def get_static_ranks(cfg: Config) -> Ranks:
    """The ranks of static LoRA: rank_max everywhere."""
    return {family: [cfg.rank_max] * cfg.layers for family in cfg.target_modules}


def enter_phase(cfg: Config, model: nn.Module, phase: str, ranks: Ranks | None) -> nn.Module:
    """Give the model, in place, what a phase has and it lacks: adapters, whose values are still to be set,
    and in `lora` a frozen base."""
    if phase != "full" and not get_adapter_names(model):
        add_lora(model, get_families(cfg, model), ranks, cfg.lora_alpha, cfg.lora_scaling)
    if phase == "lora":
        freeze_base(model, keep=LM_REST if cfg.mode == "lora" else ())
    return model


def build_model(cfg: Config, phase: str, ranks: Ranks | None) -> nn.Module:
    """A phase's model with fresh weights."""
    model = use_onednn(build_net(cfg, "cpu"))
    model.init_weights(cfg.seed)
    enter_phase(cfg, model, phase, ranks)
    init_adapters(model, cfg.seed)
    return model


def switch_phase(cfg: Config, model, optimizer, phase: str, ranks: Ranks) -> torch.optim.Optimizer:
    """Take the model to its next phase, in place. Returns the optimiser of what is trained there: the base
    keeps its moments at the insertion, where adapters start fresh, and the adapters keep theirs at the
    freeze."""
    moments, are_new = get_optimizer_state(model, optimizer), not get_adapter_names(model)
    enter_phase(cfg, model, phase, ranks)
    if are_new:
        init_adapters(model, cfg.seed)
    optimizer = build_optimizer(model, cfg.weight_decay)
    set_optimizer_state(model, optimizer, moments)
    return optimizer


def get_costs(cfg: Config, model: nn.Module, phase: str, ranks: Ranks | None) -> dict[str, int]:
    """What a phase costs, for the log: trainable parameters, and FLOPs of a sequence, counted without
    computing them."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = torch.zeros(cfg.batch_size, cfg.context, dtype=torch.long, device="meta")
    flops = count_flops(enter_phase(cfg, build_net(cfg), phase, ranks), tokens)
    return {"trainable_params": trained, "flops_per_image": flops, "graphs_compiled": 0}


def train_step(cfg: Config, model, optimizer, crops: Iterator, lr: float, failed: Tensor) -> Tensor:
    """One optimiser step on the next of `crops`. Returns (loss, top-1 hits in sequences, gradient norm,
    failed), float64 (4,). `failed`, a flag, is set by what is not finite; from then on nothing is updated."""
    tokens, targets = next(crops)  # (B, T) each
    logits = model(tokens)  # (B, T, 256)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(trained, cfg.grad_clip or math.inf)
    failed |= ~(torch.isfinite(norm) & torch.isfinite(loss.detach()))
    apply_update(optimizer, lr, skip=failed)
    hits = (logits.argmax(dim=-1) == targets).sum() / cfg.context
    return torch.stack([loss.detach().double(), hits.double(), norm.double(), failed.double()])


# ------------------------------------------------------------------------------------------------------------
# the loop


@dataclass
class State:
    """Where a run stands, as monitor/records.py writes it down."""

    phase: str = "full"  # full, warmup or lora
    ranks: Ranks | None = None
    epoch: int = 0  # completed
    step: int = 0  # optimiser steps taken
    epoch_step: int = 0  # of them in the epoch under way
    epoch_loss: float = 0.0  # summed over those steps
    epoch_hits: float = 0.0
    epoch_seconds: float = 0.0
    epoch_waited: float = 0.0
    frozen_blocks: int = 0  # none here

    def begin_epoch(self) -> None:
        self.epoch_step, self.epoch_loss, self.epoch_hits = 0, 0.0, 0.0
        self.epoch_seconds, self.epoch_waited = 0.0, 0.0


def get_schedule(cfg: Config, total_steps: int) -> dict:
    """The arguments of `get_lr` that a run's settings give."""
    schedule = dict(peak=cfg.lr, warmup_steps=cfg.lr_warmup_steps, total_steps=total_steps)
    schedule |= dict(schedule=cfg.lr_schedule, decay_share=cfg.lr_decay_share)
    return schedule | dict(rewarm_steps=cfg.lora_rewarm_steps, lora_factor=cfg.lora_lr_factor)


def get_rates(cfg: Config, total_steps: int) -> list[float]:
    """The learning rate of each step of a run of so many steps with all parameters."""
    return [get_lr(step, **get_schedule(cfg, total_steps)) for step in range(total_steps)]


def get_next_phase(cfg: Config, s: State, epochs: list[dict]) -> tuple[str, Ranks | None]:
    """Phase and ranks of the next epoch, from the log: Algorithm 1 or the forecast ends the full phase,
    Algorithm 2 gives the ranks, `lora_warmup_epochs` epochs end the warmup."""
    phase, ranks = s.phase, s.ranks
    # Asked in mode full, too: it raises for norms of nan.
    due = phase == "full" and switch_due(epochs, cfg, get_rates)
    if due and cfg.mode == "prelora":
        phase, ranks = "warmup", decide_ranks(cfg, build_net(cfg), epochs)
    warmed_up = sum(epoch["phase"] == "warmup" for epoch in epochs)
    if phase == "warmup" and warmed_up >= cfg.lora_warmup_epochs:
        phase = "lora"
    return phase, ranks


def train(cfg: Config, train_text: Tensor, held_out: Tensor, log: RunLogger) -> dict[str, float]:
    """One run. Returns its final evaluation. Raises FloatingPointError for what is not finite."""
    device, host, s = torch.device("cpu"), platform.node(), State()
    if cfg.mode == "lora":
        s.phase, s.ranks = "lora", get_static_ranks(cfg)
        write_json(log.run_dir / "ranks.json", s.ranks)
    model = build_model(cfg, s.phase, s.ranks)
    optimizer = build_optimizer(model, cfg.weight_decay)
    families = get_families(cfg, model)
    lr_at = partial(get_lr, **get_schedule(cfg, cfg.epochs * cfg.steps_per_epoch))
    costs = get_costs(cfg, model, s.phase, s.ranks)
    text = {"sha256": cfg.text_sha256, "train_bytes": len(train_text), "held_out_bytes": len(held_out)}
    start = SimpleNamespace(hosts=[host], notes=[])
    log.write(get_start_record(cfg, s, start, device, None, costs) | {"text": text})
    phase, ranks = s.phase, s.ranks
    while s.epoch < cfg.epochs:
        # -- the switch: adapters are put in (warmup), or the base is frozen (lora)
        if phase != s.phase:
            began, previous = time.perf_counter(), s.phase
            s.phase, s.ranks = phase, ranks
            reset_peak_memory(device)
            optimizer = switch_phase(cfg, model, optimizer, phase, ranks)
            costs = get_costs(cfg, model, phase, ranks)
            seconds = time.perf_counter() - began
            record = get_switch_record(s, previous, peak_memory(device), costs, seconds, 0)
            log.switch(record, rank_signs(cfg, ranks) if previous == "full" else [])

        # -- an epoch of training
        steps = range(s.step, s.step + cfg.steps_per_epoch)
        frozen_at = get_freeze_step(log.epochs) if s.phase == "lora" else None
        crops = (get_crops(train_text, cfg, step) for step in steps)
        clock = EpochClock(s, model, crops, device, None)
        failed = torch.zeros((), dtype=torch.bool)
        model.train()
        for step in steps:
            lr = lr_at(step, frozen_at=frozen_at)
            result = train_step(cfg, model, optimizer, clock.batches, lr, failed)
            s.step, s.epoch_step = s.step + 1, s.epoch_step + 1
            clock.step()
            log.advance()
            look(s, log, [(lr, result)])
            log.progress(s.phase, s.epoch_loss / s.epoch_step, clock.images_per_second(cfg.batch_size))
        s.epoch_seconds, s.epoch_waited = clock.close()

        # -- the epoch's end: measure, evaluate, decide
        s.epoch += 1
        own = [clock.own_costs | {"host": host}]
        record = get_epoch_record(cfg, s, device, own, costs, lr, log.take_step_losses())
        record |= get_norms(model, families) | evaluate(cfg, model, held_out, cfg.eval_sequences)
        log.epoch(record, heatmap=s.epoch == cfg.epochs)
        s.begin_epoch()
        phase, ranks = get_next_phase(cfg, s, log.epochs)
        log.decided(s, get_signs(cfg, s, log.epochs, None, phase), ranks)
    final = evaluate(cfg, model, held_out, cfg.final_sequences)
    final["bits_per_byte"] = final["val_loss"] / math.log(2)
    log.write({"event": "held_out", "sequences": cfg.final_sequences, **final})
    log.end(s.step)
    return final


def begin(argv: list[str]) -> tuple[Config, Tensor, Tensor]:
    """(settings, training text, held-out text). Raises UserError for whatever is wrong, before any work."""
    cfg = parse_flags(argv, Config(), prog="lm.py", description=__doc__)
    check_config(cfg)
    if is_run(cfg.run_dir) or Path(cfg.run_dir, "config.json").exists():
        raise UserError(f"{cfg.run_dir} already holds a run: choose another --run_dir")
    text = read_text()
    found = hash_text(text)
    if cfg.text_sha256 not in (None, found):
        raise UserError(
            f"text_sha256 is {cfg.text_sha256} and this Python's text has {found}: bits per byte of "
            "different texts can't be compared"
        )
    cfg.text_sha256 = found
    train_text, held_out = split_text(text)
    if cfg.context >= len(held_out):
        raise UserError(f"context {cfg.context} is too long for a held-out text of {len(held_out)} bytes")
    try:
        Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir {cfg.run_dir} can't be made: {error.strerror}") from None
    return cfg, train_text, held_out


def main(argv: list[str]) -> int:
    """Exit status: 0; 2 for a user's mistake, before any work; 1 for a run that had to stop."""
    if argv[:1] == ["--replay"]:
        import replay  # which brings train.py, and with it the ViT

        return replay.main(argv[1:], task=sys.modules[__name__])
    if argv[:1] == ["--study"]:
        import lm_study

        return lm_study.main(argv[1:], lm=sys.modules[__name__])
    try:
        cfg, train_text, held_out = begin(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    log = RunLogger(Path(cfg.run_dir), 0, cfg.epochs * cfg.steps_per_epoch)
    try:
        write_json(log.run_dir / "config.json", vars(cfg))
        final = train(cfg, train_text, held_out, log)
    except (UserError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        log.close()
    print(f"{final['bits_per_byte']:.4f} bits per byte on the last 5 % of the text")
    return 0


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])
