"""What both loaders share: counter-based random numbers, the order of an epoch, the augmentations, and, on the device,
normalise and mixup.

An augmentation is one numba function over a batch, f(images, out, indices, seed, epoch, *args): it writes the augmented
(B, H, W, C) uint8 `images` into `out`, drawing only from random_bits(seed, epoch, indices[i], draw). Hence the result
does not depend on workers, ranks, or where an interrupted epoch went on. The two loaders call the same function.
This file must import without FFCV: data/folder.py is what remains where FFCV cannot run.
"""
import functools
import os
from dataclasses import replace

import numpy as np
import torch
from numba import njit, prange

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ORDER, SUBSET, MIXUP = 1, 2, 3  # purposes, so that no two of numpy's streams coincide
SHIFT_Y, SHIFT_X, FLIP = 0, 1, 2  # draws: each random decision about an image has a number of its own


@njit(cache=True, nogil=True)
def splitmix64(state):
    """The output of splitmix64 (Steele, Lea, Flood 2014; constants of Vigna's C version) at `state`, both uint64."""
    z = state + GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(cache=True, nogil=True)
def random_bits(seed, epoch, index, draw):
    """64 random bits, a pure function of four non-negative integers; `.py_func` takes arrays of indices as well."""
    key = splitmix64(splitmix64(splitmix64(np.uint64(seed)) ^ np.uint64(epoch)) ^ np.uint64(index))
    return splitmix64(key + np.uint64(draw) * GOLDEN)  # draws 0, 1, 2 … of one image: one splitmix64 stream


@njit(cache=True, nogil=True)
def random_uniform(seed, epoch, index, draw):
    """A float64 in [0, 1), as random_bits."""
    return (random_bits(seed, epoch, index, draw) >> np.uint64(11)) * 2.0**-53


@njit(cache=True, nogil=True, parallel=True)
def random_shift(images, out, indices, seed, epoch, pad):
    """Shift each image by -pad … pad pixels in both directions (pad with black, crop back at random)."""
    height, width, channels = images.shape[1:]
    places = np.uint64(2 * pad + 1)
    for i in prange(len(images)):
        dy = np.int64(random_bits(seed, epoch, indices[i], SHIFT_Y) % places) - pad
        dx = np.int64(random_bits(seed, epoch, indices[i], SHIFT_X) % places) - pad
        for y in range(height):  # plain loops: slice assignment runs as fast but takes numba 5 s to compile
            for x in range(width):
                inside = 0 <= y - dy < height and 0 <= x - dx < width
                for c in range(channels):
                    out[i, y, x, c] = images[i, y - dy, x - dx, c] if inside else 0


@njit(cache=True, nogil=True, parallel=True)
def random_flip(images, out, indices, seed, epoch):
    """Mirror each image left to right with probability 1/2."""
    height, width, channels = images.shape[1:]
    for i in prange(len(images)):
        flip = random_bits(seed, epoch, indices[i], FLIP) >> np.uint64(63)
        for y in range(height):
            for x in range(width):
                source = width - 1 - x if flip else x
                for c in range(channels):
                    out[i, y, x, c] = images[i, y, source, c]


def build_ffcv_operation(function, args, seed, epoch):
    """An augmentation as an FFCV Operation. `epoch`: int64 array (1,), read at every batch.

    The operation is called from Python (jit_mode False) because what an FFCV-jitted one closes over is frozen when it is
    compiled, the epoch included, and because numba cannot cache closures on disk. FFCV's graph never returns from
    compiling a jitted operation behind one like this, so put decoders first and these after them.
    """
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.operation import Operation

    class Augmentation(Operation):
        def declare_state_and_memory(self, previous_state):
            state = replace(previous_state, jit_mode=False)
            return state, AllocationQuery(previous_state.shape, previous_state.dtype)

        def generate_code(self):
            def augment(images, out, indices):
                function(images, out, indices, seed, int(epoch[0]), *args)
                return out

            augment.with_indices = True
            return augment

    return Augmentation()


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


@functools.lru_cache
def _get_constants(mean, std, device):
    # as (x - 255·mean) · 1/(255·std); cached, because a tensor made from Python numbers waits for the device
    to_tensor = lambda values: torch.tensor(values, dtype=torch.float64).float().view(1, 3, 1, 1).to(device)
    return to_tensor([255 * m for m in mean]), to_tensor([1 / (255 * s) for s in std])


def normalise(images, mean, std, dtype=torch.float32):
    """(images / 255 - mean) / std, computed in fp32: uint8 (B, 3, H, W) -> `dtype`, same device and memory format.

    mean, std: tuples of three, in units of the full range. No host sync after the first call on a device.
    """
    offset, scale = _get_constants(tuple(mean), tuple(std), images.device)
    return ((images - offset) * scale).to(dtype)


def mixup(images, labels, alpha, seed, step):
    """mixup (Zhang et al. 2018, arXiv:1710.09412): each image with its mirror in the batch, one λ ~ Beta(alpha, alpha).

    images: float (B, ...); labels: (B,). Returns (λ·images + (1-λ)·flipped, labels_b, λ): the loss is
    λ·loss(labels) + (1-λ)·loss(labels_b). λ is a Python float, a pure function of (seed, step): nothing waits for the
    device. alpha = 0 returns images, labels, 1.0.
    """
    if alpha == 0:
        return images, labels, 1.0
    lam = float(get_generator(MIXUP, seed, step).beta(alpha, alpha))
    return torch.lerp(images.flip(0), images, lam), labels.flip(0), lam
