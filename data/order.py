"""What an epoch is: which images, in which order, in which process's batches; the same in all loaders."""

import os
from collections.abc import Iterable, Sequence

import numpy as np

from errors import UserError

ORDER, SUBSET, MIXUP, SYNTHETIC, ERASING = 1, 2, 3, 4, 5  # purposes: no two of numpy's streams coincide


class DataError(UserError):
    """An image that can't be read, or a loader's process that was lost, in the middle of the work."""


def get_generator(purpose: int, seed: int, counter: int) -> np.random.Generator:
    """numpy's generator as a pure function of three non-negative integers."""
    return np.random.Generator(np.random.PCG64([purpose, seed, counter]))


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of range(num_samples), int64: a training epoch's order, in all loaders and processes."""
    return get_generator(ORDER, seed, epoch).permutation(num_samples).astype(np.int64, copy=False)


def get_indices(
    total: int, train: bool, batch_size: int, num_samples: int | None = None, world_size: int = 1
) -> np.ndarray:
    """The images a loader uses of `total`, those of all processes together: int64 (N,), ascending.

    num_samples: a random subset of so many. It is random because the first N of an ImageFolder are one
    class, and a function of `total` only, so that runs with other seeds see the same images.
    Raises UserError where the numbers don't fit together.
    """
    if num_samples is None:
        indices = np.arange(total, dtype=np.int64)
    elif not train:
        raise ValueError("num_samples restricts training only: evaluation sees every image")
    elif not 1 <= num_samples <= total:
        raise UserError(
            f"a training subset of {num_samples} images was asked for: "
            f"expected 1 to {total}, the images there are"
        )
    else:
        subset = get_generator(SUBSET, 0, 0).permutation(total)[:num_samples]
        indices = np.sort(subset).astype(np.int64, copy=False)
    if batch_size < 1 or (train and batch_size * world_size > len(indices)):
        raise UserError(
            f"batch_size is {batch_size} on {world_size} rank(s): "
            f"expected 1 to {len(indices)} in all, the images of an epoch"
        )
    if world_size > len(indices):
        raise UserError(f"{len(indices)} images are too few for {world_size} ranks")
    return indices


def find_empty(classes: Sequence[str], labels: Iterable[int]) -> list[str]:
    """Names of the classes that none of the images' `labels` is of."""
    present = set(np.unique(np.asarray(labels)).tolist())
    return [name for label, name in enumerate(classes) if label not in present]


def list_some(names: Sequence[str], most: int = 10) -> str:
    """The names in a row, and behind the first `most` how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_classes(where: object, classes: list[str] | None, num_classes: int, labels: Iterable[int]) -> None:
    """Raise UserError for class names (None: not known) that are not num_classes.

    It lists them, first those that none of the images' `labels` is of: they may be no classes at all.
    """
    if classes is None or len(classes) == num_classes:
        return
    empty = find_empty(classes, labels)
    names = [f"{name} (no image)" for name in empty] + sorted(set(classes) - set(empty))
    raise UserError(
        f"{where} has {len(classes)} classes, expected {num_classes}: say --num_classes {len(classes)} "
        f"if all of these are meant: {list_some(names)}"
    )


def count_batches(num_samples: int, train: bool, batch_size: int, world_size: int = 1) -> int:
    """Batches of an epoch, as many in every process.

    Training drops the images that don't fill the batches of all processes, evaluation pads.
    """
    images_of_a_step = batch_size * world_size
    return num_samples // images_of_a_step if train else -(-num_samples // images_of_a_step)


def get_epoch_indices(
    indices: np.ndarray,
    train: bool,
    batch_size: int,
    seed: int,
    epoch: int,
    start_batch: int,
    world_rank: int = 0,
    world_size: int = 1,
) -> np.ndarray:
    """What a process sees of an epoch from batch `start_batch` on: int64 (n,), whole batches for training.

    Training: the processes' batches b lie side by side in the epoch's order, so that what is in a step
    depends on its size alone: 4 processes with batches of 8 and one process with 4 batches of 8 a step see
    the same batches. Evaluation: every image in one process only, in file order; the last batches of a
    process may have fewer images, or none.
    """
    num_batches = count_batches(len(indices), train, batch_size, world_size)
    if not 0 <= start_batch <= num_batches:
        raise ValueError(
            f"start_batch is {start_batch}: expected 0 to {num_batches}, the batches of an epoch"
        )
    if train:
        order = indices[epoch_order(len(indices), seed, epoch)]
        order = order[: num_batches * world_size * batch_size].reshape(num_batches, world_size, batch_size)
        return order[start_batch:, world_rank].reshape(-1)
    return indices[world_rank::world_size][start_batch * batch_size :]


def default_workers() -> int:
    """The CPUs this process may use, 16 at most.

    They are shared with the other processes on its node, because torchrun doesn't bind them to CPUs.
    """
    cpus = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(cpus, 16))


def get_num_workers(num_workers: int | None, least: int) -> int:
    """num_workers, or default_workers() for None. Raises UserError beyond the CPUs this process may use."""
    if num_workers is None:
        return default_workers()
    cpus = len(os.sched_getaffinity(0))
    if not least <= num_workers <= cpus:
        raise UserError(
            f"num_workers is {num_workers}: expected {least} to {cpus}, the CPUs this process may use"
        )
    return num_workers
