"""Whether a run's schedule and its data go together. No torch: a dry run of launch/submit.py asks this."""

from errors import UserError


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


def check_same_classes(data_dir: str, classes: list[str], val_classes: list[str]) -> None:
    """For as many classes, name by name: their numbers alone, which labels are, would fit."""
    for here, there in zip(classes, val_classes):
        if here != there:
            raise UserError(
                f"train and val of {data_dir} do not have the same classes: {here!r} in one stands "
                f"where {there!r} does in the other"
            )
