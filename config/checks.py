"""What the ranges in Config's types can't say: fields that contradict each other, names that are in no
table."""

from config.ranges import check_ranges
from data.datasets import DATASETS, get_spec
from data.order import list_some
from errors import UserError
from model.variants import LORA_FAMILIES, VARIANTS
from monitor.log import load_run


def check_config(cfg) -> None:
    """Raise UserError, in one sentence, for the first field that is out of range or contradicts another."""
    check_ranges(cfg)
    check_tables(cfg)
    check_start(cfg)
    check_training(cfg)
    if cfg.mode != "full":  # without adapters nothing is asked of them
        check_adapters(cfg)
    check_switch(cfg)
    check_freeze(cfg)
    if cfg.baseline is not None:
        load_run(cfg.baseline)


def require(fine: bool, sentence: str) -> None:
    if not fine:
        raise UserError(sentence)


def check_tables(cfg) -> None:
    require(cfg.model in VARIANTS, f"unknown model {cfg.model!r}, there are: {', '.join(VARIANTS)}")
    require(cfg.dataset in DATASETS, f"unknown dataset {cfg.dataset!r}, there are: {', '.join(DATASETS)}")
    size, patch = get_spec(cfg.dataset, cfg.image_size).image_size, VARIANTS[cfg.model]["patch_size"]
    nearest = max(round(size / patch), 1) * patch
    require(
        size % patch == 0,
        f"{cfg.dataset}'s images of {size} pixels can't be cut into {cfg.model}'s patches of {patch}: "
        f"--image_size {nearest} would do",
    )
    for family in cfg.target_modules:
        require(
            family in LORA_FAMILIES,
            f"unknown target module {family!r}, there are: {', '.join(LORA_FAMILIES)}",
        )
    once = len(set(cfg.target_modules)) == len(cfg.target_modules) > 0
    require(once, f"target_modules must name each family once: {cfg.target_modules}")


def check_start(cfg) -> None:
    for name in ("run_dir", "fork", "init_from", "stage_dir"):
        require(getattr(cfg, name) != "", f"{name} is empty")
    require(cfg.init_from != "timm:", "init_from must name a model of timm's: timm:NAME")
    require(
        cfg.init_from is None or cfg.fork is None,
        "fork starts from a run's checkpoint and init_from from other weights: choose one, "
        "--init_from None or --fork None",
    )
    require(
        cfg.init_from is not None or not cfg.fresh_head,
        "fresh_head is for the weights of init_from: without them every head is fresh",
    )


def check_training(cfg) -> None:
    require(cfg.seed < 2**63, f"seed must be below 2**63, not {cfg.seed}")
    for name in ("rand_augment", "color_jitter"):
        require(
            cfg.loader != "synthetic" or not getattr(cfg, name),
            f"synthetic images are not augmented: loader synthetic goes with {name} 0",
        )
    require(
        cfg.stage_dir is None or cfg.loader == "ffcv",
        "stage_dir is for .beton files: it needs --loader ffcv",
    )
    require(
        cfg.batch_size % cfg.grad_accum_steps == 0,
        f"batch_size {cfg.batch_size} is not divisible by grad_accum_steps {cfg.grad_accum_steps}",
    )
    require(
        cfg.lr_schedule == "cosine" or cfg.lr_decay_share > 0,
        "lr_schedule wsd needs a --lr_decay_share above 0: without one the learning rate never falls",
    )
    require(
        cfg.residual_dtype == "float32" or cfg.dtype == "bfloat16",
        "residual_dtype bfloat16 goes with products in bfloat16: it needs --dtype bfloat16",
    )
    require(
        cfg.activation_checkpointing != "selective" or cfg.compile,
        "activation_checkpointing selective is the compiler's choice: it needs --compile True",
    )


def check_adapters(cfg) -> None:
    width = VARIANTS[cfg.model]["embed_dim"]
    require(cfg.rank_min <= cfg.rank_max, f"rank_min {cfg.rank_min} is above rank_max {cfg.rank_max}")
    require(cfg.rank_max <= width, f"rank_max {cfg.rank_max} is above {cfg.model}'s width {width}")
    require(
        cfg.rank_min > 1 or not cfg.compile,
        "rank_min 1 can't be compiled, torch.compile makes a dimension of size 1 a constant: "
        "take 2 or --compile False",
    )
    require(
        cfg.lora_scaling not in ("alpha", "rslora") or cfg.lora_alpha is not None,
        f"lora_scaling {cfg.lora_scaling} needs --lora_alpha; authors scales by 1, matched and coherent by "
        "the layers' own sizes",
    )
    require(
        cfg.lora_scaling != "authors" or cfg.lora_alpha is None,
        f"lora_scaling authors is 1 and has no alpha: lora_alpha {cfg.lora_alpha} goes with --lora_scaling "
        "alpha, rslora, matched or coherent",
    )
    require(
        cfg.rank_budget is None or cfg.rank_rule != "minmax",
        "rank_budget is for rank_rule uniform, budget or spectrum; minmax has none",
    )
    require(
        cfg.rank_rule != "spectrum" or cfg.log_displacement or cfg.mode == "lora",
        "rank_rule spectrum goes by what log_displacement measures: it needs a run with --log_displacement "
        "True",
    )


def check_switch(cfg) -> None:
    require(
        cfg.num_windows >= 2,
        f"num_windows must be at least 2, not {cfg.num_windows}: the test compares consecutive windows",
    )
    if cfg.switch_epoch is None:
        if cfg.switch_rule == "forecast":
            check_forecast(cfg)
        return
    freezes = cfg.mode == "full" and cfg.freeze_blocks > 0
    require(
        cfg.mode == "prelora" or freezes,
        f"switch_epoch has no meaning with mode {cfg.mode}, unless that is full with freeze_blocks",
    )
    require(
        freezes or cfg.switch_epoch >= 2 * cfg.window_epochs,
        f"switch_epoch {cfg.switch_epoch} is before two windows of {cfg.window_epochs} epochs are full, "
        "which the ranks need",
    )
    require(
        cfg.switch_epoch < cfg.epochs,
        f"switch_epoch {cfg.switch_epoch} is not before the last epoch {cfg.epochs}",
    )


def check_forecast(cfg) -> None:
    require(
        cfg.mode == "prelora",
        f"switch_rule forecast says when adapters are put in, mode {cfg.mode} does not ask: it needs "
        "--switch_rule algorithm1",
    )
    require(
        cfg.forecast_shortfall is not None,
        "switch_rule forecast needs --forecast_shortfall, what adapters leave undelivered: "
        "`python replay.py BASELINE --switch_rule forecast --calibrate FORK` measures it",
    )
    require(
        cfg.lr_schedule == "cosine",
        f"switch_rule forecast needs a learning rate that falls all the time: before lr_schedule "
        f"{cfg.lr_schedule}'s decay begins no log tells what that will bring",
    )
    require(
        cfg.fork is None or (cfg.warmup_cost is not None and cfg.lora_cost is not None),
        "a fork by switch_rule forecast needs --warmup_cost and --lora_cost: it is asked before steps can be "
        "timed where it begins",
    )


def check_freeze(cfg) -> None:
    require(
        not cfg.freeze_mean or cfg.window_epochs > 1,
        "freeze_mean is the mean of window_epochs epochs' ends: with 1 there is nothing to take it of",
    )
    depth = VARIANTS[cfg.model]["depth"]
    require(
        cfg.freeze_blocks < depth,
        f"freeze_blocks {cfg.freeze_blocks} is not below the {depth} blocks of {cfg.model}",
    )
    require(
        cfg.mode != "full" or not cfg.freeze_blocks or cfg.switch_epoch is not None,
        "freeze_blocks needs, with mode full, --switch_epoch: the epoch after which the blocks are frozen",
    )


def check_data(cfg, images: int, classes: list[str] | None, val_classes: list[str] | None) -> None:
    """Raise UserError for a batch or a warmup that is too large for so many training `images`, and for
    training and validation sets with different classes (None: not known).
    """
    if classes is not None and val_classes is not None:
        check_same_classes(cfg.data_dir, classes, val_classes)
    steps_per_epoch = images // cfg.batch_size
    if not steps_per_epoch:
        raise UserError(f"batch_size {cfg.batch_size} is above the {images} training images")
    if cfg.profile and steps_per_epoch < 3:
        raise UserError(
            f"profile needs epochs of 3 steps and more, {images} images are {steps_per_epoch} of batch_size "
            f"{cfg.batch_size}"
        )
    total_steps = steps_per_epoch * cfg.epochs
    if cfg.lr_warmup_steps >= total_steps:
        raise UserError(
            f"lr_warmup_steps {cfg.lr_warmup_steps} leaves nothing of the {total_steps} steps of "
            f"{cfg.epochs} epochs"
        )
    decay_steps = round(cfg.lr_decay_share * total_steps)
    if cfg.lr_schedule == "wsd" and cfg.lr_warmup_steps + decay_steps > total_steps:
        raise UserError(
            f"lr_decay_share {cfg.lr_decay_share} of {total_steps} steps begins within lr_warmup_steps "
            f"{cfg.lr_warmup_steps}"
        )


def check_same_classes(data_dir: str, classes: list[str], val_classes: list[str]) -> None:
    """By name: their numbers alone, which labels are, would fit."""
    only = []
    for split, names, others in (("train", classes, val_classes), ("val", val_classes, classes)):
        if apart := sorted(set(names) - set(others)):
            only.append(f"only {split} has {list_some(apart)}")
    if only:
        raise UserError(f"train and val of {data_dir} do not have the same classes: {'; '.join(only)}")
    for here, there in zip(classes, val_classes):
        if here != there:
            raise UserError(
                f"train and val of {data_dir} do not have the same classes: {here!r} in one stands "
                f"where {there!r} does in the other"
            )
