"""Augmentation: counter-based random numbers, what is drawn for an image, and the functions on batches.

An augmentation is one function over a batch, f(images, out, indices, seed, epoch, *args): it writes the
augmented uint8 (B, H, W, C) `images` into `out`, drawing from random_bits(seed, epoch, indices[i], draw)
only. Hence the result does not depend on workers, processes, or where an interrupted epoch went on. What is
drawn for an image is a function of its own, get_…, which data/folder.py calls as well: it does the same with
Pillow, image by image.
"""

import itertools
import math

import numpy as np

from data.compiled import njit, prange
from data.randaugment import (
    BRIGHTNESS,
    COLOR,
    CONTRAST,
    OPERATIONS,
    SIGNED,
    apply_operations,
    get_arguments,
)

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Draws: each random decision about an image has a number of its own.
SHIFT_Y, SHIFT_X, FLIP, CROP, RANDAUGMENT, JITTER = 0, 1, 2, 16, 64, 96
IS_SIGNED = np.isin(OPERATIONS, SIGNED)  # (15,)


@njit(cache=True, nogil=True)
def splitmix64(state: int) -> np.uint64:
    """splitmix64's output at `state`, both uint64 (Steele, Lea, Flood 2014; constants of Vigna's C code)."""
    z = state + GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(cache=True, nogil=True)
def random_bits(seed: int, epoch: int, index: int, draw: int) -> np.uint64:
    """64 random bits, a pure function of four non-negative integers; `.py_func` takes index arrays, too."""
    key = splitmix64(splitmix64(splitmix64(np.uint64(seed)) ^ np.uint64(epoch)) ^ np.uint64(index))
    return splitmix64(key + np.uint64(draw) * GOLDEN)  # draws 0, 1, 2 … of one image: one splitmix64 stream


@njit(cache=True, nogil=True)
def random_uniform(seed: int, epoch: int, index: int, draw: int) -> float:
    """A float64 in [0, 1), as random_bits."""
    return (random_bits(seed, epoch, index, draw) >> np.uint64(11)) * 2.0**-53


# ---- crop


@njit(cache=True, nogil=True)
def get_random_crop(
    height: int, width: int, min_area: float, seed: int, epoch: int, index: int
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the inception crop: min_area to 1 of the area, 3:4 to 4:3.

    As torchvision's RandomResizedCrop.get_params: ten attempts, then the largest crop in the middle.
    """
    low, high = math.log(3 / 4), math.log(4 / 3)
    for attempt in range(10):
        draw = CROP + 4 * attempt
        area = height * width * (min_area + (1 - min_area) * random_uniform(seed, epoch, index, draw))
        aspect = math.exp(low + (high - low) * random_uniform(seed, epoch, index, draw + 1))
        w, h = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            top = int(random_uniform(seed, epoch, index, draw + 2) * (height - h + 1))
            left = int(random_uniform(seed, epoch, index, draw + 3) * (width - w + 1))
            return top, left, h, w
    h, w = height, width
    if width / height < 3 / 4:
        h = int(round(width / (3 / 4)))
    elif width / height > 4 / 3:
        w = int(round(height * (4 / 3)))
    return (height - h) // 2, (width - w) // 2, h, w


@njit(cache=True, nogil=True)
def get_random_crops(
    samples: np.ndarray, indices: np.ndarray, crops: np.ndarray, min_area: float, seed: int, epoch: int
) -> None:
    """get_random_crop for images `indices` of data/beton.py's `samples` -> crops, int64 (B, 4)."""
    for i in range(len(indices)):
        sample = samples[indices[i]]
        top, left, h, w = get_random_crop(sample[3], sample[4], min_area, seed, epoch, indices[i])
        crops[i, 0], crops[i, 1], crops[i, 2], crops[i, 3] = top, left, h, w


# ---- shift and flip


@njit(cache=True, nogil=True)
def get_shift(seed: int, epoch: int, index: int, pad: int) -> tuple[int, int]:
    """(down, right), each -pad … pad: how far random_shift moves an image."""
    places = np.uint64(2 * pad + 1)
    down = np.int64(random_bits(seed, epoch, index, SHIFT_Y) % places) - pad
    right = np.int64(random_bits(seed, epoch, index, SHIFT_X) % places) - pad
    return down, right


@njit(cache=True, nogil=True)
def get_flip(seed: int, epoch: int, index: int) -> bool:
    """Whether random_flip mirrors an image."""
    return random_bits(seed, epoch, index, FLIP) >> np.uint64(63) == 1


@njit(cache=True, nogil=True, parallel=True)
def random_shift(
    images: np.ndarray, out: np.ndarray, indices: np.ndarray, seed: int, epoch: int, pad: int
) -> None:
    """Shift each image by -pad … pad pixels in both directions (pad with black, crop back at random)."""
    height, width, channels = images.shape[1:]
    for i in prange(len(images)):
        dy, dx = get_shift(seed, epoch, indices[i], pad)
        for y in range(height):  # plain loops: slice assignment runs as fast but takes numba 5 s to compile
            for x in range(width):
                inside = 0 <= y - dy < height and 0 <= x - dx < width
                for c in range(channels):
                    out[i, y, x, c] = images[i, y - dy, x - dx, c] if inside else 0


@njit(cache=True, nogil=True, parallel=True)
def random_flip(images: np.ndarray, out: np.ndarray, indices: np.ndarray, seed: int, epoch: int) -> None:
    """Mirror each image left to right with probability 1/2."""
    height, width, channels = images.shape[1:]
    for i in prange(len(images)):
        if get_flip(seed, epoch, indices[i]):
            for y in range(height):
                for x in range(width):
                    for c in range(channels):
                        out[i, y, x, c] = images[i, y, width - 1 - x, c]
        else:
            image, copy = images[i].reshape(-1), out[i].reshape(-1)
            for j in range(len(image)):
                copy[j] = image[j]


# ---- RandAugment


@njit(cache=True, nogil=True)
def draw_operation(seed: int, epoch: int, index: int, layer: int, num_operations: int) -> tuple[int, int]:
    """(0 … num_operations - 1, 0 or 1): the number of an operation, and whether its argument is negated."""
    draw = RANDAUGMENT + 2 * layer
    operation = np.int64(random_bits(seed, epoch, index, draw) % np.uint64(num_operations))
    return operation, np.int64(random_bits(seed, epoch, index, draw + 1) >> np.uint64(63))


@njit(cache=True, nogil=True)
def draw_operations(
    indices: np.ndarray,
    operations: np.ndarray,
    negated: np.ndarray,
    seed: int,
    epoch: int,
    num_operations: int,
) -> None:
    """draw_operation for images `indices` -> operations, negated: int64 (B, layers)."""
    for i in range(len(indices)):
        for layer in range(operations.shape[1]):
            drawn = draw_operation(seed, epoch, indices[i], layer, num_operations)
            operations[i, layer], negated[i, layer] = drawn


def get_choice(seed: int, epoch: int, index: int, layer: int) -> tuple[int, int]:
    """(number of the operation, sign of its argument): what RandAugment does to an image, layer by layer."""
    operation, negated = draw_operation(seed, epoch, index, layer, len(OPERATIONS))
    return operation, -1 if negated and IS_SIGNED[operation] else 1


def rand_augment(
    images: np.ndarray,
    out: np.ndarray,
    indices: np.ndarray,
    seed: int,
    epoch: int,
    layers: int,
    magnitude: float,
) -> None:
    """RandAugment(layers, magnitude): so many of OPERATIONS on each image, one after the other.

    They are drawn with replacement, and none is left out at random, as in AugReg; timm does that to half of
    them unless told `p1.0`.
    """
    operations = np.empty((len(indices), layers), np.int64)
    negated = np.empty_like(operations)
    draw_operations(indices, operations, negated, seed, epoch, len(OPERATIONS))
    signs = np.where((negated == 1) & IS_SIGNED[operations], -1, 1)  # (B, layers)
    apply_operations(images, out, operations, signs * get_arguments(magnitude)[operations])


# ---- colour jitter

JITTERED = np.array([BRIGHTNESS, CONTRAST, COLOR])  # torchvision's brightness, contrast, saturation
ORDERS = np.array(list(itertools.permutations(range(len(JITTERED)))))  # (6, 3)


@njit(cache=True, nogil=True)
def draw_jitters(
    indices: np.ndarray, orders: np.ndarray, shares: np.ndarray, seed: int, epoch: int, num_orders: int
) -> None:
    """Random numbers of images `indices` -> orders, int64 (B,) below num_orders; shares, (B, 3) in [0, 1)."""
    for i in range(len(indices)):
        orders[i] = np.int64(random_bits(seed, epoch, indices[i], JITTER) % np.uint64(num_orders))
        for k in range(shares.shape[1]):
            shares[i, k] = random_uniform(seed, epoch, indices[i], JITTER + 1 + k)


def get_jitters(indices: np.ndarray, seed: int, epoch: int, amount: float) -> tuple[np.ndarray, np.ndarray]:
    """What colour jitter does to images `indices`, one after the other: numbers in OPERATIONS, int64 (B, 3),
    and their factors, float64 (B, 3).

    As torchvision's ColorJitter(amount, amount, amount): JITTERED in a random order, each by a factor of its
    own, uniform in 1 ± amount and not below 0.
    """
    orders, shares = np.empty(len(indices), np.int64), np.empty((len(indices), len(JITTERED)))
    draw_jitters(indices, orders, shares, seed, epoch, len(ORDERS))
    lowest, highest = max(0.0, 1.0 - amount), 1.0 + amount
    factors = lowest + (highest - lowest) * shares  # (B, 3), in the order of JITTERED
    order = ORDERS[orders]  # (B, 3)
    return JITTERED[order], np.take_along_axis(factors, order, axis=1)


def color_jitter(
    images: np.ndarray, out: np.ndarray, indices: np.ndarray, seed: int, epoch: int, amount: float
) -> None:
    """Brightness, contrast and saturation changed at random, no hue: timm's --color-jitter of one number."""
    apply_operations(images, out, *get_jitters(indices, seed, epoch, amount))
