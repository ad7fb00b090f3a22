"""What an epoch is: which images, in which order, in which rank's batches; the same in both loaders."""
import os

import numpy as np
import torch

ORDER, SUBSET, MIXUP = 1, 2, 3  # purposes, so that no two of numpy's streams coincide


class DataError(OSError):
    """An image that cannot be read, or a loader's thread or process that failed, in the middle of the work."""


def get_generator(purpose, seed, counter):
    """numpy Generator, a pure function of three non-negative integers."""
    return np.random.Generator(np.random.PCG64([purpose, seed, counter]))


def epoch_order(num_samples, seed, epoch):
    """Permutation of range(num_samples), int64: the order of a training epoch, in both loaders and on every rank."""
    return get_generator(ORDER, seed, epoch).permutation(num_samples).astype(np.int64, copy=False)


def get_indices(total, train, batch_size, num_samples=None, ranks=1):
    """The images a loader uses of `total`: int64 (N,), ascending; with num_samples, a random subset. All ranks' images: which
    are whose is get_epoch_indices' matter.

    Random because the first N of an ImageFolder are one class; a function of `total` only, so that runs with other seeds
    see the same images. Raises ValueError where the numbers do not fit together.
    """
    if num_samples is None:
        indices = np.arange(total, dtype=np.int64)
    elif not train:
        raise ValueError("num_samples restricts training only: evaluation sees every image")
    elif not 1 <= num_samples <= total:
        raise ValueError(f"a training subset of {num_samples} images was asked for: expected 1 to {total}, the images there are")
    else:
        indices = np.sort(get_generator(SUBSET, 0, 0).permutation(total)[:num_samples]).astype(np.int64, copy=False)
    if batch_size < 1 or (train and batch_size * ranks > len(indices)):
        raise ValueError(f"batch_size is {batch_size} on {ranks} rank(s): expected 1 to {len(indices)} in all, the images of an epoch")
    if ranks > len(indices):
        raise ValueError(f"{len(indices)} images are too few for {ranks} ranks")
    return indices


def check_classes(where, classes, num_classes):
    """Raise ValueError for class names (None: not known) that are not num_classes."""
    if classes is not None and len(classes) != num_classes:
        raise ValueError(f"{where} has {len(classes)} classes, expected {num_classes}: say --num_classes {len(classes)}")


def count_batches(num_samples, train, batch_size, ranks=1):
    """Batches of an epoch on each rank: training drops what does not fill the batches of all ranks, evaluation pads."""
    return num_samples // (batch_size * ranks) if train else -(-num_samples // (batch_size * ranks))


def get_epoch_indices(indices, train, batch_size, seed, epoch, start_batch, rank=0, ranks=1):
    """What a rank sees of an epoch from batch `start_batch` on: int64 (n,), whole batches for training.

    Training: the ranks' batches b lie side by side in the epoch's order, so that what is in a step depends on its size
    alone: 4 ranks with batches of 8 and 1 rank with 4 batches of 8 a step see the same batches. Evaluation: every image
    on one rank only, in file order; the last batches of a rank may have fewer images, or none.
    """
    num_batches = count_batches(len(indices), train, batch_size, ranks)
    if not 0 <= start_batch <= num_batches:
        raise ValueError(f"start_batch is {start_batch}: expected 0 to {num_batches}, the batches of an epoch")
    if train:
        indices = indices[epoch_order(len(indices), seed, epoch)][: num_batches * ranks * batch_size]
        return indices.reshape(num_batches, ranks, batch_size)[start_batch:, rank].reshape(-1)
    return indices[rank::ranks][start_batch * batch_size:]


def to_batch(images, labels, batch_size):
    """Copy numpy images (n, H, W, 3) uint8 and labels (n,) into fresh tensors of batch_size rows, pinned where CUDA is.

    Returns images (batch_size, 3, H, W) uint8 channels_last and labels (batch_size,) int64. Rows beyond n are black with
    label -1, so that compiled graphs see one shape.
    """
    pin, n = torch.cuda.is_available(), len(images)
    padded = torch.empty(batch_size, *images.shape[1:], dtype=torch.uint8, pin_memory=pin)  # (B, H, W, 3)
    targets = torch.full((batch_size,), -1, dtype=torch.int64, pin_memory=pin)
    padded.numpy()[:n], padded.numpy()[n:] = images, 0  # numpy: a copy by torch's threads waits for the training loop's
    targets.numpy()[:n] = labels
    return padded.permute(0, 3, 1, 2), targets


def default_workers():
    """The CPUs this process may use, shared with the other ranks on its node (torchrun does not bind them), 16 at most."""
    return max(1, min(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 16))


def empty_batch(batch_size, image_size):
    """Padding alone: for a rank whose images end a batch before another's, because all must go through the model together."""
    return to_batch(np.zeros((0, image_size, image_size, 3), np.uint8), np.zeros(0, np.int64), batch_size)
