"""Where a run begins: fresh, resumed, forked from another run, or from weights; and everything that can be
found wrong before work.

`begin` is called by train.py once, on all processes together. What it finds wrong is a UserError, and then no
file is left that was not there."""

import contextlib
import dataclasses
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from config.checks import check_data
from config.cli import check_empty, split_fork, typed_config
from data.datasets import get_spec
from data.loader import Loader, build_loader
from data.staging import get_staged_dir, stage
from errors import SharedError, UserError
from files import write_json
from launch.distributed import (
    describe_places,
    gather,
    get_host,
    get_world_rank,
    get_world_size,
    once_per_node,
    together,
)
from launch.lock import Lock, take
from lora.inject import drop_ranks, match_families, rank_costs
from lora.ranks import Ranks, Spectrum, choose_ranks
from model import checkpoint
from model.checkpoint import on_process_0
from model.compiler import check_compiler
from model.mean import WeightMean
from model.optim import get_lr
from model.pretrained import load_pretrained
from model.tensors import get_stored
from model.variants import LORA_FAMILIES, get_lowest
from monitor.clock import EpochClock
from monitor.convergence import (
    CHANGEABLE,
    find_spectrum,
    find_switch,
    get_changes,
    get_mean_position,
    switch_due,
)
from monitor.displacement import Displacement
from monitor.log import (
    check_logs,
    get_freeze_step,
    get_stage,
    load_run,
    phase_table,
    pick_events,
    read_events_until,
)
from monitor.logger import RunLogger
from monitor.norms import Families

# A run goes on with these as they were: its past depends on them.
FIXED = "model dataset image_size num_classes init_from fresh_head mode seed batch_size train_samples".split()
FIXED += ["target_modules", "window_epochs"]
# A fork shares its source's past: the same model, images and steps.
SHARED = "model dataset image_size num_classes batch_size train_samples".split()
# Once there are adapters: their ranks and their scaling.
ADAPTERS = "target_modules rank_min rank_max rank_rule rank_budget lora_alpha lora_scaling".split()
ADAPTERS += ["freeze_blocks"]
# What the learning rate of a step depends on, besides the step; and what it does after the freeze.
SCHEDULE = "epochs lr lr_warmup_steps lr_schedule lr_decay_share".split()
SCHEDULE_OF_LORA = "lora_lr_factor lora_rewarm_steps".split()
# What a window of log_displacement depends on.
WINDOW = ["log_displacement", *SCHEDULE, "weight_decay", "window_epochs", "target_modules"]
# What a fork may have different without a word: they shape nothing.
UNSAID = "run_dir resume fork max_steps keep_every eval_every profile log_displacement".split()


@dataclass
class State:
    """Where a run stands; every checkpoint's meta.json holds it. When to switch is not in it: the log says
    that."""

    phase: str = "full"  # full, warmup or lora
    ranks: dict[str, list[int]] | None = None  # family -> rank of each layer, with adapters; 0: none
    base: dict[str, str] | None = None  # lora: "checkpoint", "id" of this run's that has the frozen base
    frozen_blocks: int = 0  # of the lowest, which need no gradient, nor does what lies below them
    epoch: int = 0  # completed
    step: int = 0  # optimiser steps taken
    epoch_step: int = 0  # of them in the epoch under way
    epoch_loss: float = 0.0  # summed over those steps
    epoch_hits: float = 0.0
    epoch_seconds: float = 0.0  # their training time
    epoch_waited: float = 0.0  # of it, waiting for data
    metrics_bytes: int = 0  # length of metrics.jsonl
    steps_bytes: int = 0  # length of steps.jsonl

    def is_in(self, phase: str, frozen_blocks: int) -> bool:
        """Whether the model is the one of this phase with so many frozen blocks, and not to be rebuilt."""
        return (self.phase, self.frozen_blocks) == (phase, frozen_blocks)

    def begin_epoch(self) -> None:
        self.epoch_step, self.epoch_loss, self.epoch_hits = 0, 0.0, 0.0
        self.epoch_seconds, self.epoch_waited = 0.0, 0.0


@dataclass
class Start:
    """Where a run begins, and its data."""

    state: State = field(default_factory=State)
    checkpoint: Path | None = None  # whose weights and optimiser state are loaded; None: a fresh start
    meta: dict | None = None  # that checkpoint's meta.json
    forked: bool = False  # the checkpoint is another run's
    records: list[dict] = field(default_factory=list)  # of a fork: the epochs and switches that it shares
    weights: dict[str, Tensor] = field(default_factory=dict)  # of init_from, on process 0
    notes: list[str] = field(default_factory=list)  # what a person should know: overrides, differences
    passed_over: list[str] = field(default_factory=list)  # damaged checkpoints, in sentences
    hosts: list[str] = field(default_factory=list)  # of each process
    baseline: list[dict] | None = None  # epoch records of the run to warn of a plateau above
    lock: Lock | None = None  # on the run, on process 0
    train_loader: Loader | None = None
    val_loader: Loader | None = None
    log: RunLogger | None = None
    clock: EpochClock | None = None  # of the epoch under way, whose batches an exception would leave open

    def take_weights(self) -> dict[str, Tensor]:
        """`weights`, which are forgotten here: a copy of the model for the length of a run would be too
        much."""
        weights, self.weights = self.weights, {}
        return weights

    def close(self) -> None:
        """Close what is open, the lock last, whatever goes wrong on the way."""
        with contextlib.ExitStack() as stack:
            for opened in (self.lock, self.log, self.val_loader, self.train_loader, self.clock):  # backwards
                if opened is not None:
                    stack.callback(opened.close)


def begin(cfg, net: nn.Module, notes: list[str]) -> Start:
    """Take the run's lock, find where the run of `cfg` begins, and make its folder. `net`: its model without
    adapters, on meta. `notes`: to put first.

    All processes together. Raises UserError on all of them where another process works on the run, for a
    machine that can't compile what `cfg` wants compiled, data that is missing, damaged or too small for a
    batch, a schedule that ends in its warmup, and a checkpoint that is damaged or of another run than `cfg`
    describes. The lock is given back then."""
    start = Start(notes=list(notes), hosts=gather(get_host()))
    lock = on_process_0(take, Path(cfg.run_dir))
    start.notes += lock.notes
    if get_world_rank() == 0:
        start.lock = lock
    try:
        find_start(cfg, net, start)
    except BaseException:
        start.close()
        raise
    return start


def find_start(cfg, net: nn.Module, start: Start) -> None:
    """`begin`, once the run is locked: fills `start` in."""
    with together():
        check_empty(cfg)  # again: another process may have come and gone before the lock was taken
    if cfg.baseline:
        start.baseline = on_process_0(load_run, cfg.baseline).epochs
    if cfg.resume:
        start.checkpoint, start.meta, start.passed_over = on_process_0(checkpoint.find, Path(cfg.run_dir))
    if cfg.fork and not start.checkpoint:
        start.checkpoint, start.meta, start.records, differences = on_process_0(find_fork, cfg)
        start.forked, start.notes = True, start.notes + differences
    with together():
        start.notes += check_compiler(cfg.compile, cfg.mode != "full")
    if cfg.stage_dir:
        once_per_node(stage, cfg.dataset, cfg.data_dir, cfg.stage_dir, get_world_rank() == 0)
    with together():
        start.train_loader, start.val_loader = build_loaders(cfg)
        start.notes += [*start.train_loader.notes, *start.val_loader.notes]
        images = start.train_loader.num_samples
        if start.checkpoint:
            start.state = read_state(start.meta, start.checkpoint)
            check_checkpoint(cfg, start, images)
            start.notes += get_ema_notes(cfg, start) + get_displacement_notes(cfg, start)
        elif cfg.mode == "lora":
            start.state.phase, start.state.frozen_blocks = "lora", cfg.freeze_blocks
            start.state.ranks = get_static_ranks(cfg, net)
        check_data(cfg, images, start.train_loader.classes, start.val_loader.classes)
        if cfg.mode == "prelora":
            check_budget(cfg, net)
            check_next_switch(cfg, start, net)
        if cfg.init_from and not start.checkpoint and get_world_rank() == 0:
            start.weights, remarks = load_init(cfg, net)
            start.notes += remarks
    with together():  # now that no process has found anything wrong
        make_run_folder(Path(cfg.run_dir))


def make_run_folder(run_dir: Path) -> None:
    """Make the run's folder, and the processes' logs' where there are several. Raises UserError if that can't
    be done, or nothing can be written there."""
    try:
        folder = run_dir / "logs" if get_world_size() > 1 else run_dir
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=run_dir).close()
    except OSError as error:
        raise UserError(str(error)) from None


def open_log(cfg, start: Start, last_step: int) -> RunLogger:
    """The run's log, cut back to where its state stands, with what is known before the first step. Every
    process has its epoch records, because from these each of them decides the phase."""
    s, run_dir, first = start.state, Path(cfg.run_dir), get_world_rank() == 0
    log = start.log = RunLogger(run_dir, s.step, last_step, s.metrics_bytes, s.steps_bytes, enabled=first)
    log.epochs = on_process_0(list, log.epochs)
    if not start.forked and [record.get("epoch") for record in log.epochs] != list(range(1, s.epoch + 1)):
        raise SharedError(f"{run_dir}/metrics.jsonl is damaged: it does not hold the epochs 1 to {s.epoch}")
    if first:
        write_json(run_dir / "config.json", vars(cfg) | {"resume": False})
        (run_dir / "ranks.json").unlink(missing_ok=True)  # of epochs after the checkpoint, perhaps
        if s.ranks:
            write_json(run_dir / "ranks.json", s.ranks)
    for record in start.records:
        log.copy(record)
    if start.checkpoint:
        start.notes += describe_schedule(cfg, start, log.epochs)
    if len(start.hosts) > 1:
        log.message(describe_places(start.hosts))
    for note in start.notes:
        log.message(note)
    for sentence in start.passed_over:
        log.warning(s.epoch, s.step, sentence)
    return log


def say_done(cfg, s: State, total_steps: int) -> bool:
    """Say, on process 0, that there is nothing left to train. Returns True: the run has ended."""
    table = "no epoch is finished yet"
    if s.epoch:
        table = phase_table(on_process_0(load_run, cfg.run_dir).epochs)
    if get_world_rank() == 0:
        longer = f", --max_steps None goes on to {total_steps}" if s.step < total_steps else ""
        print(f"{cfg.run_dir} is done: {s.step} steps{longer}\n{table}")
    return True


# ------------------------------------------------------------------------------------------------------------
# data


def build_loaders(cfg) -> tuple[Loader, Loader]:
    """The loaders of training and validation, which yield this process's share of the micro-batches."""
    world_size = get_world_size()
    if cfg.batch_size % (cfg.grad_accum_steps * world_size):
        raise UserError(
            f"batch_size {cfg.batch_size} is not divisible by {world_size} ranks × grad_accum_steps "
            f"{cfg.grad_accum_steps}"
        )
    data_dir = get_staged_dir(cfg.data_dir, cfg.stage_dir) if cfg.stage_dir else cfg.data_dir
    loaders = []
    for split, num_samples in (("train", cfg.train_samples), ("val", None)):
        loader = build_loader(
            cfg.loader,
            cfg.dataset,
            data_dir,
            split,
            batch_size=cfg.batch_size // (cfg.grad_accum_steps * world_size),
            seed=cfg.seed,
            num_workers=cfg.num_workers,
            num_samples=num_samples,
            num_classes=cfg.num_classes,
            image_size=cfg.image_size,
            rand_augment_magnitude=cfg.rand_augment,
            color_jitter=cfg.color_jitter,
            world_rank=get_world_rank(),
            world_size=world_size,
        )
        loaders.append(loader)
    return loaders[0], loaders[1]


def count_base(cfg, net: nn.Module) -> tuple[int, dict[str, list[int]]]:
    """Parameters of `net`, a model without adapters, and what one more rank adds to each layer of each
    family."""
    costs = rank_costs(net, match_families(net, LORA_FAMILIES, cfg.target_modules))
    return sum(p.numel() for p in net.parameters()), costs


def decide_ranks(cfg, net: nn.Module, epochs: list[dict]) -> Ranks:
    """Each layer's rank by `cfg.rank_rule`, from the epoch records of a full phase; 0 in the lowest
    `cfg.freeze_blocks` blocks, whose layers take part in the rule as all others do."""
    base, costs = count_base(cfg, net)
    spectrum = None if explain_spectrum(cfg, net, epochs) else get_spectrum(cfg, epochs)
    return drop_lowest(cfg, net, choose_ranks(cfg, get_changes(epochs, cfg), base, costs, spectrum))


def get_spectrum(cfg, epochs: list[dict]) -> Spectrum | None:
    """What `rank_rule` spectrum goes by, from the epoch records of a full phase; None where they have none,
    or with another rule."""
    found = find_spectrum(epochs, cfg) if cfg.rank_rule == "spectrum" else None
    return found[1] if found else None


def explain_spectrum(cfg, net: nn.Module, epochs: list[dict]) -> str:
    """Why `rank_rule` spectrum can't go by these epoch records of a full phase, in a sentence; "" if it can,
    or with another rule."""
    if cfg.rank_rule != "spectrum":
        return ""
    found = find_spectrum(epochs, cfg)
    if not found:
        return (
            f"rank_rule spectrum finds no spectrum in the log up to epoch {len(epochs)}: choose another "
            "rank_rule, or a log with a window that was trained with log_displacement True from its start "
            "to its end, under the same settings"
        )
    epoch, spectrum = found
    for family, layers in match_families(net, LORA_FAMILIES, cfg.target_modules).items():
        for (name, _, parts), values in zip(layers, spectrum[family]):
            rows, columns = net.get_submodule(name).weight.shape
            if len(values) < min(cfg.rank_max, rows // parts, columns):
                lower = 1 << (max(len(values), 1).bit_length() - 1)
                return (
                    f"rank_rule spectrum needs {cfg.rank_max} singular values of each layer for rank_max "
                    f"{cfg.rank_max}, the newest in the log, of epoch {epoch}, are {len(values)}: rank_max "
                    f"{lower} can be had, or another rank_rule"
                )
    return ""


def check_spectrum(cfg, net: nn.Module, epochs: list[dict]) -> None:
    """Raise UserError where `rank_rule` spectrum can't go by these epoch records."""
    if why := explain_spectrum(cfg, net, epochs):
        raise UserError(why)


def spectrum_signs(cfg, net: nn.Module, epochs: list[dict]) -> list[str]:
    """A warning, as a sentence, where the switch after these epochs had to do without a spectrum."""
    why = explain_spectrum(cfg, net, epochs)
    return [f"the ranks are those of rank_rule budget: {why}"] if why else []


def get_static_ranks(cfg, net: nn.Module) -> Ranks:
    """The ranks of static LoRA: rank_max, and 0 in the lowest `cfg.freeze_blocks` blocks."""
    _, costs = count_base(cfg, net)
    return drop_lowest(cfg, net, {family: [cfg.rank_max] * len(layers) for family, layers in costs.items()})


def drop_lowest(cfg, net: nn.Module, ranks: Ranks) -> Ranks:
    """`ranks` with 0, for no adapter, in the lowest `cfg.freeze_blocks` blocks."""
    families = match_families(net, LORA_FAMILIES, cfg.target_modules)
    return drop_ranks(ranks, families, get_lowest(cfg.freeze_blocks))


def check_budget(cfg, net: nn.Module) -> None:
    """Raise UserError, long before the switch, for a rank_budget that does not pay for rank_min in every
    layer."""
    base, costs = count_base(cfg, net)
    unchanged = {family: [0.0] * len(layers) for family, layers in costs.items()}
    choose_ranks(cfg, unchanged, base, costs)


def load_init(cfg, net: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """The weights that `cfg.init_from` names, made to fit `net` (on meta will do) and this run's images, and
    what was done to them. Raises UserError where they can't be had or don't fit."""
    data = get_spec(cfg.dataset, cfg.image_size)
    weights, notes = load_pretrained(cfg.init_from, net, data.mean, data.std, cfg.fresh_head)
    return weights, [f"init_from: {note}" for note in notes]


# ------------------------------------------------------------------------------------------------------------
# a run that goes on


def get_config(cfg, path: Path, meta: dict):
    """The config with which the checkpoint at `path` was trained, of the same class as `cfg`."""
    return typed_config(type(cfg), meta["config"], f"{path}/meta.json")


def get_meta(cfg, s: State, images: int) -> dict:
    """What a checkpoint's meta.json says of a run that trains on so many images, for `read_state`."""
    return {"state": dataclasses.asdict(s), "config": vars(cfg), "train_images": images}


def read_state(meta: dict, path: Path) -> State:
    """The State in the meta of the checkpoint at `path`. Raises UserError if the meta is damaged."""
    checkpoint.check_meta(path, meta)
    state, names = meta["state"], {field.name for field in dataclasses.fields(State)}
    if not isinstance(state, dict):
        raise UserError(f"{path}/meta.json is damaged: its state is {state!r}")
    if state.keys() != names:
        lacking, unknown = sorted(names - state.keys()), sorted(state.keys() - names)
        what = f"has no {', '.join(lacking)}" if lacking else f"has {', '.join(unknown)} besides"
        raise UserError(f"{path}/meta.json is damaged, or of another version: its state {what}")
    for name in ("frozen_blocks", "epoch", "step", "epoch_step", "metrics_bytes", "steps_bytes"):
        if type(state[name]) is not int or state[name] < 0:
            raise UserError(f"{path}/meta.json is damaged: {name} is {state[name]!r}")
    if state["phase"] not in ("full", "warmup", "lora") or (state["phase"] == "full") != (not state["ranks"]):
        raise UserError(
            f"{path}/meta.json is damaged: phase {state['phase']!r} with ranks {state['ranks']!r}"
        )
    if checkpoint.get_named(path, meta) and state["phase"] != "lora":
        raise UserError(f"{path}/meta.json is damaged: phase {state['phase']!r} with a frozen base")
    return State(**state)


def choose_base(cfg, s: State, steps: int, frozen_at: int | None) -> dict[str, str] | None:
    """The base that the checkpoint after the next `steps` steps names. None: that checkpoint is whole.

    Where a lora phase has no base yet, it is this run's checkpoint at s.step: the freeze's or, where the run
    had none there (mode lora, a fork), the first one of the phase. With `freeze_mean` the one at the freeze's
    step, `frozen_at`, has other weights. With no steps left the next checkpoint has the same step and takes
    that one's place, so it can't name it.
    """
    if s.phase != "lora" or s.base or not steps:
        return s.base
    if cfg.freeze_mean and s.step == frozen_at:
        return None
    return on_process_0(checkpoint.find_whole, Path(cfg.run_dir), s.step)


def get_ema_notes(cfg, start: Start) -> list[str]:
    """What becomes of the averages of the weights, where a run goes on with them and had none, or the
    reverse."""
    before = get_config(cfg, start.checkpoint, start.meta).ema_decay
    if cfg.ema_decay and not before:
        return [f"ema_decay: {start.checkpoint} has no averages of the weights, they start from its weights"]
    if before and not cfg.ema_decay:
        return [f"ema_decay 0: the averages of the weights in {start.checkpoint} are dropped"]
    return []


def begin_mean(cfg, start: Start, model: nn.Module, epochs: list[dict]) -> WeightMean:
    """What freeze_mean has of its mean where the run begins: the checkpoint's, or, where that has none and is
    an epoch's end, that epoch's weights if they count. `epochs`: the records so far."""
    mean = WeightMean()
    if not cfg.freeze_mean or not start.checkpoint:
        return mean
    taken = mean.load(start.checkpoint, model)
    if not taken and not start.state.epoch_step:
        mean.end_epoch(model, get_mean_position(epochs, cfg))
    return mean


def watch_layers(cfg, start: Start, model: nn.Module, families: Families) -> Displacement:
    """What log_displacement follows the layers of `model` with, from where the run begins; off, it does
    nothing.

    It goes on with the checkpoint's window. Without a checkpoint, or where `get_displacement_notes` says that
    it can't, it begins with the next window. All processes together."""
    s = start.state
    watched = families if cfg.log_displacement else {}
    displacement = Displacement(model, watched, cfg.window_epochs, cfg.weight_decay, cfg.rank_max)
    taken = False
    if watched and start.checkpoint and not get_displacement_notes(cfg, start):
        stored = on_process_0(get_stored, start.checkpoint, "displacement.")
        taken = displacement.load(stored, partial(checkpoint.read, start.checkpoint), model)
    if not taken and s.epoch % cfg.window_epochs == 0 and not s.epoch_step:
        displacement.begin(model, s.step)
    return displacement


def get_displacement_notes(cfg, start: Start) -> list[str]:
    """Why a run that goes on can't go on with its checkpoint's window of log_displacement, if so: there is
    none, or some of its steps had other learning rates or another decay than `cfg` says, or layers are
    new."""
    if not cfg.log_displacement:
        return []
    path, s, old = start.checkpoint, start.state, get_config(cfg, start.checkpoint, start.meta)
    names = WINDOW + SCHEDULE_OF_LORA if s.phase == "lora" else WINDOW
    changed = [name for name in names if getattr(cfg, name) != getattr(old, name)]
    if not changed:
        return []
    first = get_first_window(cfg, s)
    was = ", ".join(f"{name} {getattr(old, name)}" for name in changed)
    return [
        f"log_displacement: {path} has {was}: no window that began before it is reported, the first one "
        f"begins after epoch {first}"
    ]


def get_first_window(cfg, s: State) -> int:
    """The epoch after which the first window begins that is not under way in `s`."""
    first = s.epoch + -s.epoch % cfg.window_epochs
    if s.epoch_step and first == s.epoch:
        first += cfg.window_epochs
    return first


def check_next_switch(cfg, start: Start, net: nn.Module) -> None:
    """Raise UserError for a run with `rank_rule` spectrum that goes on in its full phase and is certain to
    switch without one: at once, or at a switch_epoch before a window has been measured.

    Not where it goes on with what it had: then it has been asked before, or has said at its own switch that
    it had none, and must not end there."""
    s = start.state
    if cfg.rank_rule != "spectrum" or not start.checkpoint or s.phase != "full":
        return
    old = get_config(cfg, start.checkpoint, start.meta)
    asked = ["rank_rule", "rank_max", *CHANGEABLE, *WINDOW]
    if not start.forked and all(getattr(cfg, name) == getattr(old, name) for name in asked):
        return
    records = start.records
    if not start.forked:
        records = read_events_until(Path(cfg.run_dir, "metrics.jsonl"), s.metrics_bytes)
    epochs = pick_events(records, "epoch")
    measured = get_first_window(cfg, s) + cfg.window_epochs  # by then there is one
    if not get_displacement_notes(cfg, start):
        measured = s.epoch - s.epoch % cfg.window_epochs + cfg.window_epochs  # the one under way goes on
    try:
        # A forecast whose costs are still to be timed is made after that, in train.py.
        is_timed = cfg.switch_rule != "forecast" or (cfg.warmup_cost and cfg.lora_cost)
        is_due = not s.epoch_step and is_timed and switch_due(epochs, cfg, get_rates)
    except FloatingPointError as error:
        raise UserError(f"{start.checkpoint}: {error}") from None
    is_too_early = cfg.switch_epoch is not None and cfg.switch_epoch < measured
    if is_due or is_too_early:
        check_spectrum(cfg, net, epochs)


def check_same(cfg, old, names: list[str], where: Path) -> None:
    """Raise UserError for the first field in `names` in which `cfg` differs from what the checkpoint at
    `where` was trained with."""
    for name in names:
        before, now = getattr(old, name), getattr(cfg, name)
        if before != now:
            raise UserError(f"{where} was trained with {name} = {before}, it can't go on with {now}")


def check_checkpoint(cfg, start: Start, images: int) -> None:
    """Raise UserError for a checkpoint of other data or another run than `cfg` describes, or whose run has
    lost its logs."""
    path, meta, s = start.checkpoint, start.meta, start.state
    fixed = FIXED
    if s.ranks:  # and what the lora phase trains
        fixed = FIXED + ADAPTERS + ["lora_trainable", "freeze_mean"]
    elif s.frozen_blocks:  # within the full phase
        fixed = FIXED + ["freeze_blocks"]
    if not start.forked:  # what a fork shares was looked at when it was found
        check_same(cfg, get_config(cfg, path, meta), fixed, path)
    if meta["train_images"] != images:
        raise UserError(f"{path} was trained on {meta['train_images']} images, {cfg.data_dir} gives {images}")
    total_steps = images // cfg.batch_size * cfg.epochs
    if s.step > total_steps:
        raise UserError(f"{path} is past the end of {cfg.epochs} epochs, {total_steps} steps")
    if start.forked:  # its own logs are yet to be written, and its own checkpoints
        s.metrics_bytes, s.steps_bytes, s.base = 0, 0, None
    else:
        check_logs(cfg.run_dir, s.metrics_bytes, s.steps_bytes, path)
        check_past(cfg, start)


def check_past(cfg, start: Start) -> None:
    """Raise UserError where a run that goes on has a new switch_epoch or lora_warmup_epochs under which its
    past would have been another: its log would no longer say what its settings do."""
    path, s, old = start.checkpoint, start.state, get_config(cfg, start.checkpoint, start.meta)
    events = read_events_until(Path(cfg.run_dir, "metrics.jsonl"), s.metrics_bytes)
    epochs = pick_events(events, "epoch")
    if cfg.switch_epoch not in (None, old.switch_epoch):
        next_end = s.epoch + 1 if s.epoch_step else s.epoch
        full = sum(get_stage(epoch) == "full" for epoch in epochs)
        if (s.phase != "full" or s.frozen_blocks) and cfg.switch_epoch != full:
            raise UserError(
                f"{path} has switched after epoch {full}, switch_epoch can't be {cfg.switch_epoch}"
            )
        if s.phase == "full" and not s.frozen_blocks and cfg.switch_epoch < next_end:
            raise UserError(
                f"switch_epoch {cfg.switch_epoch} is in the past of {path}: --switch_epoch {next_end} is the "
                "first that is not"
            )
    if cfg.lora_warmup_epochs != old.lora_warmup_epochs and cfg.mode == "prelora":
        check_warmup(cfg, path, s, epochs)


def check_warmup(cfg, path: Path, s: State, epochs: list[dict]) -> None:
    """Raise UserError if `cfg` would not have ended the warmup when the checkpoint at `path` did, or would
    have ended it before."""
    done = sum(epoch["phase"] == "warmup" and epoch["epoch"] <= s.epoch for epoch in epochs)
    if s.phase == "lora" and done != cfg.lora_warmup_epochs:
        raise UserError(
            f"{path} comes after a warmup of {done} epochs, lora_warmup_epochs can't be "
            f"{cfg.lora_warmup_epochs}"
        )
    begun = done + 1 if s.epoch_step else done
    if s.phase == "warmup" and begun > cfg.lora_warmup_epochs:
        raise UserError(
            f"{path} is {begun} epochs into its warmup, which lora_warmup_epochs = {cfg.lora_warmup_epochs} "
            "would have ended"
        )


def get_schedule(cfg, total_steps: int) -> dict:
    """The arguments of `get_lr` that a run's settings give."""
    return dict(
        peak=cfg.lr,
        warmup_steps=cfg.lr_warmup_steps,
        total_steps=total_steps,
        schedule=cfg.lr_schedule,
        decay_share=cfg.lr_decay_share,
        rewarm_steps=cfg.lora_rewarm_steps,
        lora_factor=cfg.lora_lr_factor,
    )


def get_rates(cfg, total_steps: int) -> list[float]:
    """The learning rate of each step of a run of so many steps with all parameters."""
    schedule = get_schedule(cfg, total_steps)
    return [get_lr(step, **schedule) for step in range(total_steps)]


def describe_schedule(cfg, start: Start, epochs: list[dict]) -> list[str]:
    """A sentence on the learning rate, where a step that is left has another than it would have had by the
    checkpoint's settings. `epochs`: the records so far. (The rise after the freeze, lora_rewarm_steps, comes
    on top of it.)"""
    old, s = get_config(cfg, start.checkpoint, start.meta), start.state
    warmed_up = sum(epoch["phase"] == "warmup" for epoch in epochs)
    is_frozen = s.phase == "lora" or (s.phase == "warmup" and warmed_up >= cfg.lora_warmup_epochs)
    also = {"rewarm_steps": 0, "frozen_at": get_freeze_step(epochs) if is_frozen else None}
    steps_per_epoch = start.meta["train_images"] // cfg.batch_size
    total_steps = cfg.epochs * steps_per_epoch
    before = get_schedule(old, old.epochs * steps_per_epoch) | also
    after = get_schedule(cfg, total_steps) | also
    if all(get_lr(step, **before) == get_lr(step, **after) for step in range(s.step, total_steps)):
        return []
    step = s.step
    last, following = get_lr(step - 1, **before), get_lr(step, **after)
    kind = "fork" if start.forked else "resume"
    return [
        f"{kind}: the learning rate was {last:.4g} at step {step} and goes on at {following:.4g}; the "
        f"schedule of {cfg.epochs} epochs ends at step {cfg.epochs * steps_per_epoch}"
    ]


# ------------------------------------------------------------------------------------------------------------
# a run that is forked from another


def find_fork(cfg) -> tuple[Path, dict, list[dict], list[str]]:
    """The checkpoint of another run that `cfg.fork` names, its meta, the epochs and switches up to there, for
    the fork's own log, and what `cfg` has different, in sentences.

    In the full phase everything the switch depends on may differ: the log alone says when a switch is due,
    and train.py asks it with `cfg`. Later the switch and the adapters must be those the run has. Without an
    epoch: the newest checkpoint of the full phase before which `cfg` would not have switched. Raises
    UserError where there is no such checkpoint, or it is of another model, data or batch."""
    run, asked = split_fork(cfg.fork)
    kept = {}  # epoch -> (path, meta) of the checkpoints of whole epochs
    for path, meta in checkpoint.kept(Path(run)):
        s = read_state(meta, path)
        if not s.epoch_step:
            kept[s.epoch] = (path, meta)
    # The log after the checkpoints: a run that is under way has logged what it has saved.
    _, epochs, switches = load_run(run)
    if not kept:
        raise UserError(f"{run} keeps no checkpoint of a whole epoch")
    for path, meta in kept.values():
        check_same(cfg, get_config(cfg, path, meta), SHARED, path)
    due = get_own_switch(cfg, run, epochs)
    at = choose_epoch(cfg, run, asked, kept, due)
    path, meta = kept[at]
    checkpoint.verify(path)
    checkpoint.get_base(path, meta)
    check_fork(cfg, path, meta, epochs, switches, due)
    old = get_config(cfg, path, meta)
    records = get_shared_records(cfg, old, run, epochs, switches, at)
    notes = []
    for name, value in vars(cfg).items():
        if value != getattr(old, name) and name not in UNSAID:
            notes.append(f"fork: {name} = {value}, {run} had {getattr(old, name)}")
    return path, meta, records, notes


def get_own_switch(cfg, run: str, epochs: list[dict]) -> int | None:
    """After which epoch of `run` a run of `cfg` would have switched, or with mode full frozen blocks; None:
    not by the end of its full phase."""
    full = [epoch for epoch in epochs if get_stage(epoch) == "full"]
    if cfg.mode == "full":
        return cfg.switch_epoch
    if cfg.mode == "lora":
        return None
    try:
        return find_switch(full, cfg, get_rates)
    except FloatingPointError as error:
        raise UserError(f"{run}: {error}") from None


def choose_epoch(
    cfg, run: str, asked: int | None, kept: dict[int, tuple[Path, dict]], due: int | None
) -> int:
    """The epoch to fork at: the one `asked` for, or the newest kept one that `cfg` can share. Raises
    UserError where there is none."""
    steps_per_epoch = next(meta["train_images"] // cfg.batch_size for _, meta in kept.values())
    last = cfg.epochs - 1  # that leaves something to train
    if cfg.max_steps:
        last = min(last, (cfg.max_steps - 1) // steps_per_epoch)

    def is_usable(epoch: int) -> bool:
        full = is_full(kept[epoch][1]["state"])
        if epoch > last or (full and due is not None and epoch > due):
            return False
        return full or asked is not None or cfg.mode == "lora"

    usable = [epoch for epoch in kept if is_usable(epoch)]
    at = max(usable, default=None) if asked is None else asked
    if at in usable:
        return at
    why = ""
    if asked is None or asked in kept:
        switches_first = due and (asked is None or asked <= last)
        does = "freeze blocks" if cfg.mode == "full" else "switch"
        end = f"{does} after epoch {due}" if switches_first else f"end after epoch {last + 1}"
        why = f" that these settings share: they {end}"
    what = "no checkpoint" if at is None else f"no checkpoint of epoch {at}"
    there = ", ".join(map(str, sorted(kept)))
    raise UserError(f"{run} keeps {what}{why}; it keeps those of {there} (see --keep_every)")


def is_full(state: dict) -> bool:
    """Whether a checkpoint's `state` is one in which all parameters are trained and there are no others."""
    return state["phase"] == "full" and not state.get("frozen_blocks")


def check_fork(
    cfg, path: Path, meta: dict, epochs: list[dict], switches: list[dict], due: int | None
) -> None:
    """Raise UserError where a run of `cfg` would not have come by the checkpoint at `path`."""
    state = meta["state"]
    if state["phase"] == "full" and cfg.mode == "lora":
        raise UserError(f"{path} is in its full phase, mode lora has none")
    if is_full(state):
        return
    shared = ["mode", "freeze_blocks"]
    if state["ranks"]:
        shared += ADAPTERS
    if state["phase"] == "lora":
        shared += ["lora_trainable", "freeze_mean"]
    check_same(cfg, get_config(cfg, path, meta), shared, path)
    switched = next((switch["epoch"] for switch in switches if switch["from"] == "full"), None)
    if cfg.mode != "lora" and due != switched:
        told = f"after epoch {due}" if due else "later"
        raise UserError(
            f"{path} comes after a switch at epoch {switched}, these settings switch {told}: "
            f"--switch_epoch {switched} shares it"
        )
    if cfg.mode == "prelora":
        check_warmup(cfg, path, read_state(meta, path), epochs)


def get_shared_records(cfg, old, run: str, epochs: list[dict], switches: list[dict], at: int) -> list[dict]:
    """The epochs and switches of `run`, whose config is `old`, up to epoch `at`, in order, with the norms of
    cfg's target modules alone, and without spectra of windows that are not cfg's."""

    def only_targets(norms: dict) -> dict:
        return {family: norms[family] for family in cfg.target_modules if family in norms}

    shared = []
    for epoch in epochs:
        if epoch["epoch"] <= at:
            norms = {key: only_targets(epoch[key]) for key in ("weight_norms", "adapter_norms")}
            if "displacement" in epoch:
                kinds = epoch["displacement"].items()
                norms["displacement"] = {kind: only_targets(layers) for kind, layers in kinds}
            if "spectrum" in epoch:
                norms["spectrum"] = only_targets(epoch["spectrum"])
            shared.append(epoch | norms)
            if old.window_epochs != cfg.window_epochs:
                shared[-1].pop("spectrum", None)
    if [epoch["epoch"] for epoch in shared] != list(range(1, at + 1)):
        raise UserError(f"{run}/metrics.jsonl is damaged: it does not hold the epochs 1 to {at}")
    shared += [switch for switch in switches if switch["epoch"] < at]
    return sorted(shared, key=lambda record: (record["epoch"], record["event"] == "switch"))
