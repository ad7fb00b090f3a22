"""What can be found wrong with a run before it is submitted. No torch, unless weights or raw files are looked
at.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from config.checks import check_data
from data.beton import find_beton, read_about, read_samples
from data.datasets import DATASETS
from data.order import check_classes, get_indices
from errors import UserError


def check_run(cfg, world_size: int) -> None:
    """Raise UserError for data that is missing, damaged, or too small for this schedule, without building the
    loaders, and for a run to fork from or weights to start from that aren't there or don't fit. (timm's are
    downloaded now, where there is a network.)
    """
    if cfg.fork or cfg.init_from:
        check_start(cfg)
    if cfg.loader == "synthetic":
        return
    images, classes = {}, {}
    micro_batch = cfg.batch_size // (cfg.grad_accum_steps * world_size)
    for split in ("train", "val"):
        is_train = split == "train"
        labels, classes[split] = look_at(cfg, split)
        expected = cfg.num_classes or DATASETS[cfg.dataset].num_classes
        check_classes(f"{split} of {cfg.data_dir}", classes[split], expected, labels)
        subset = cfg.train_samples if is_train else None
        images[split] = len(get_indices(len(labels), is_train, micro_batch, subset, world_size))
    check_data(cfg, images["train"], classes["train"], classes["val"])


def check_start(cfg) -> None:
    """Raise UserError for a run to fork from, or weights to start from, that aren't there or don't fit: for a
    run that starts fresh.
    """
    import start  # this needs torch
    import train
    from model import checkpoint

    if cfg.resume and checkpoint.latest(Path(cfg.run_dir)):
        return
    if cfg.fork:
        start.find_fork(cfg)
    if cfg.init_from:
        start.load_init(cfg, train.build_net(cfg))


def look_at(cfg, split: str) -> tuple[Sequence[int], list[str] | None]:
    """(labels of the images, names of the classes or None) of the data, from a .beton's header or the list of
    a folder's files.
    """
    if cfg.loader == "ffcv":
        path = find_beton(cfg.dataset, cfg.data_dir, split)
        return read_samples(path)[:, 5], read_about(path).classes
    from data.images import open_dataset  # torchvision's: this needs torch

    source = open_dataset(cfg.dataset, cfg.data_dir, split)
    return source.targets, list(source.classes)


def check_writable(folder: Path) -> None:
    """Raise UserError if nothing could be written there or, where it doesn't exist yet, in what exists above
    it.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(f"can't write to {folder}: {existing}: {error.strerror}") from None
