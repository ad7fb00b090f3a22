"""What both loaders share: counter-based random numbers, the augmentations, and, on the device, normalise and mixup.

An augmentation is one numba function over a batch, f(images, out, indices, seed, epoch, *args): it writes the augmented
(B, H, W, C) uint8 `images` into `out`, drawing only from random_bits(seed, epoch, indices[i], draw). Hence the result
does not depend on workers, ranks, or where an interrupted epoch went on. What is drawn for an image is a function of its own, get_…,
which data/folder.py calls as well: it does the same with Pillow, image by image, and must import where FFCV cannot run.
"""
import functools
import math
from dataclasses import replace

import numpy as np
import torch
from numba import njit, prange

from data.order import MIXUP, get_generator

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
SHIFT_Y, SHIFT_X, FLIP, CROP, RANDAUGMENT = 0, 1, 2, 16, 64  # draws: each random decision about an image has a number of its own


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


@njit(cache=True, nogil=True)
def get_random_crop(height, width, min_area, seed, epoch, index):
    """(top, left, height, width) of the inception crop: min_area to 1 of the area, 3:4 to 4:3, by torchvision's
    RandomResizedCrop.get_params (ten attempts, then the largest crop in the middle), drawing from random_uniform."""
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
def get_random_crops(samples, indices, crops, min_area, seed, epoch):
    """get_random_crop for images `indices` of data/beton.py's `samples` -> crops, int64 (B, 4)."""
    for i in range(len(indices)):
        sample = samples[indices[i]]
        crops[i, 0], crops[i, 1], crops[i, 2], crops[i, 3] = get_random_crop(sample[3], sample[4], min_area, seed, epoch, indices[i])


@njit(cache=True, nogil=True)
def get_shift(seed, epoch, index, pad):
    """(down, right), each -pad … pad: how far random_shift moves an image."""
    places = np.uint64(2 * pad + 1)
    return (np.int64(random_bits(seed, epoch, index, SHIFT_Y) % places) - pad,
            np.int64(random_bits(seed, epoch, index, SHIFT_X) % places) - pad)


@njit(cache=True, nogil=True)
def get_flip(seed, epoch, index):
    """Whether random_flip mirrors an image."""
    return random_bits(seed, epoch, index, FLIP) >> np.uint64(63) == 1


@njit(cache=True, nogil=True, parallel=True)
def random_shift(images, out, indices, seed, epoch, pad):
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
def random_flip(images, out, indices, seed, epoch):
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


# ---------------------------------------------------------------------------------------------------------------------------------
# RandAugment (Cubuk et al. 2020, arXiv:1909.13719): timm's operations and scale. timm's work on Pillow images; each of these is
# f(image, out, argument) on (H, W, 3) and repeats Pillow's arithmetic with its roundings. float32 stands where C has a float.

OPERATIONS = ("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast", "Brightness",
              "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")  # to either side, at random
(AUTO_CONTRAST, EQUALIZE, INVERT, ROTATE, POSTERIZE, SOLARIZE, SOLARIZE_ADD, COLOR, CONTRAST, BRIGHTNESS, SHARPNESS, SHEAR_X, SHEAR_Y,
 TRANSLATE_X, TRANSLATE_Y) = range(len(OPERATIONS))
GREY = 128  # what geometric operations fill with: the mean pixel after normalisation with mean 0.5


def get_arguments(magnitude):
    """The argument of each of OPERATIONS at a magnitude, float64 (15,): degrees, bits, thresholds, factors, shares of a side.

    10 is the nominal maximum and larger ones go beyond it, as in TF and big_vision; in timm that needs `mmax`, without it
    rand-m15 is rand-m10. Geometric ones are negated at random, see get_choice.
    """
    level = magnitude / 10
    enhance = level * 1.8 + 0.1
    return np.array([0, 0, 0, level * 30, int(level * 4), min(256, int(level * 256)), min(128, int(level * 110)), enhance, enhance,
                     enhance, enhance, level * 0.3, level * 0.3, level * 0.45, level * 0.45])


@njit(cache=True, nogil=True)
def get_choice(seed, epoch, index, layer):
    """(number of the operation, sign of its argument if it is geometric): what RandAugment does to an image, layer by layer."""
    operation = np.int64(random_bits(seed, epoch, index, RANDAUGMENT + 2 * layer) % np.uint64(len(OPERATIONS)))
    negative = random_bits(seed, epoch, index, RANDAUGMENT + 2 * layer + 1) >> np.uint64(63)
    return operation, -1 if negative and (operation == ROTATE or operation >= SHEAR_X) else 1


@njit(cache=True, nogil=True)
def histogram(image, channel):
    counts = np.zeros(256, np.int64)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            counts[image[y, x, channel]] += 1
    return counts


@njit(cache=True, nogil=True)
def look_up(image, out, channel, table):
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            out[y, x, channel] = table[image[y, x, channel]]


@njit(cache=True, nogil=True)
def auto_contrast(image, out, _):
    """Each channel stretched to 0 … 255 (ImageOps.autocontrast)."""
    table = np.empty(256, np.int64)
    for channel in range(3):
        counts = histogram(image, channel)
        low, high = 0, 255
        while low < 255 and counts[low] == 0:
            low += 1
        while high > 0 and counts[high] == 0:
            high -= 1
        for i in range(256):
            if high <= low:
                table[i] = i
            else:
                scale = 255.0 / (high - low)
                table[i] = min(max(int(i * scale + -low * scale), 0), 255)
        look_up(image, out, channel, table)


@njit(cache=True, nogil=True)
def equalize(image, out, _):
    """Each channel's histogram made flat (ImageOps.equalize)."""
    table = np.empty(256, np.int64)
    for channel in range(3):
        counts = histogram(image, channel)
        last = 255
        while counts[last] == 0:
            last -= 1
        step = (image.shape[0] * image.shape[1] - counts[last]) // 255
        total = step // 2
        for i in range(256):
            table[i] = min(total // step, 255) if step else i
            total += counts[i]
        look_up(image, out, channel, table)


@njit(cache=True, nogil=True)
def invert(image, out, _):
    for channel in range(3):
        look_up(image, out, channel, np.arange(255, -1, -1))


@njit(cache=True, nogil=True)
def posterize(image, out, bits):
    """Keep so many of the upper bits."""
    for channel in range(3):
        look_up(image, out, channel, np.arange(256) & ~(2 ** (8 - min(int(bits), 8)) - 1))


@njit(cache=True, nogil=True)
def solarize(image, out, threshold):
    """Invert pixels from `threshold` on; 256 changes nothing."""
    values = np.arange(256)
    for channel in range(3):
        look_up(image, out, channel, np.where(values < threshold, values, 255 - values))


@njit(cache=True, nogil=True)
def solarize_add(image, out, add):
    """Add to pixels below 128."""
    values = np.arange(256)
    for channel in range(3):
        look_up(image, out, channel, np.where(values < 128, np.minimum(255, values + int(add)), values))


@njit(cache=True, nogil=True)
def blend(degenerate, value, factor):
    """Image.blend: degenerate + factor (value - degenerate), in float32, cut off towards 0 and clipped."""
    mixed = np.float32(degenerate) + factor * np.float32(np.int64(value) - np.int64(degenerate))
    return np.uint8(min(max(mixed, np.float32(0)), np.float32(255)))


@njit(cache=True, nogil=True)
def luma(image, y, x):
    """ITU-R 601-2, as Image.convert("L")."""
    return (np.int64(image[y, x, 0]) * 19595 + np.int64(image[y, x, 1]) * 38470 + np.int64(image[y, x, 2]) * 7471 + 0x8000) >> 16


@njit(cache=True, nogil=True)
def color(image, out, factor):
    """Between grey (0), itself (1) and beyond (ImageEnhance.Color)."""
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            grey = luma(image, y, x)
            for c in range(3):
                out[y, x, c] = blend(grey, image[y, x, c], np.float32(factor))


@njit(cache=True, nogil=True)
def contrast(image, out, factor):
    """Between its mean grey (0), itself (1) and beyond (ImageEnhance.Contrast)."""
    total = 0
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            total += luma(image, y, x)
    mean = int(total / (image.shape[0] * image.shape[1]) + 0.5)
    table = np.empty(256, np.int64)
    for i in range(256):
        table[i] = blend(mean, i, np.float32(factor))
    for channel in range(3):
        look_up(image, out, channel, table)


@njit(cache=True, nogil=True)
def brightness(image, out, factor):
    """Between black (0), itself (1) and beyond (ImageEnhance.Brightness)."""
    table = np.empty(256, np.int64)
    for i in range(256):
        table[i] = blend(0, i, np.float32(factor))
    for channel in range(3):
        look_up(image, out, channel, table)


@njit(cache=True, nogil=True)
def sharpness(image, out, factor):
    """Between smoothed by 3 × 3 (0), itself (1) and beyond (ImageEnhance.Sharpness); the border stays as it is."""
    height, width = image.shape[:2]
    rows, out_rows, factor = image.reshape(height, -1), out.reshape(height, -1), np.float32(factor)
    out_rows[:] = rows
    for y in range(1, height - 1):
        above, row, below = rows[y - 1], rows[y], rows[y + 1]
        for x in range(3, width * 3 - 3):
            ring = (np.int32(above[x - 3]) + np.int32(above[x]) + np.int32(above[x + 3]) + np.int32(row[x - 3]) + np.int32(row[x + 3])
                    + np.int32(below[x - 3]) + np.int32(below[x]) + np.int32(below[x + 3]))
            smooth = (2 * (ring + 5 * np.int32(row[x])) + 13) // 26  # (ring + 5 row) / 13, rounded
            out_rows[y, x] = blend(smooth, row[x], factor)


@njit(cache=True, nogil=True)
def affine(image, out, a, b, c, d, e, f):
    """out[y, x] = image at (x', y') = (a x + b y + c, d x + e y + f), of pixel centres, bilinear; GREY where that is outside."""
    height, width = image.shape[:2]
    for y in range(height):
        for x in range(width):
            source_x, source_y = a * (x + 0.5) + b * (y + 0.5) + c, d * (x + 0.5) + e * (y + 0.5) + f
            if source_x < 0 or source_x >= width or source_y < 0 or source_y >= height:
                for channel in range(3):
                    out[y, x, channel] = GREY
                continue
            source_x, source_y = source_x - 0.5, source_y - 0.5
            left, top = math.floor(source_x), math.floor(source_y)
            dx, dy = source_x - left, source_y - top
            x0, x1 = max(left, 0), min(left + 1, width - 1)
            y0, y1 = max(top, 0), min(top + 1, height - 1)
            for channel in range(3):
                value = float(image[y0, x0, channel])
                if dx:  # 0 everywhere for vertical shears and translations: nothing to interpolate
                    value += (float(image[y0, x1, channel]) - value) * dx
                if dy:
                    lower = float(image[y1, x0, channel])
                    lower += (float(image[y1, x1, channel]) - lower) * dx
                    value += (lower - value) * dy
                out[y, x, channel] = np.uint8(value)


@njit(cache=True, nogil=True)
def rotate(image, out, degrees):
    """Counter-clockwise around the centre (Image.rotate)."""
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    y, x = image.shape[0] / 2, image.shape[1] / 2
    affine(image, out, cos, sin, (cos * -x + sin * -y) + x, -sin, cos, (-sin * -x + cos * -y) + y)


@njit(cache=True, nogil=True)
def apply_operation(operation, image, out, argument):
    """One of OPERATIONS, by its number, on one image: uint8 (H, W, 3) -> out, of the same shape and not the same memory."""
    if operation == AUTO_CONTRAST:
        auto_contrast(image, out, argument)
    elif operation == EQUALIZE:
        equalize(image, out, argument)
    elif operation == INVERT:
        invert(image, out, argument)
    elif operation == ROTATE:
        rotate(image, out, argument)
    elif operation == POSTERIZE:
        posterize(image, out, argument)
    elif operation == SOLARIZE:
        solarize(image, out, argument)
    elif operation == SOLARIZE_ADD:
        solarize_add(image, out, argument)
    elif operation == COLOR:
        color(image, out, argument)
    elif operation == CONTRAST:
        contrast(image, out, argument)
    elif operation == BRIGHTNESS:
        brightness(image, out, argument)
    elif operation == SHARPNESS:
        sharpness(image, out, argument)
    elif operation == SHEAR_X:
        affine(image, out, 1.0, argument, 0.0, 0.0, 1.0, 0.0)
    elif operation == SHEAR_Y:
        affine(image, out, 1.0, 0.0, 0.0, argument, 1.0, 0.0)
    elif operation == TRANSLATE_X:
        affine(image, out, 1.0, 0.0, argument * image.shape[1], 0.0, 1.0, 0.0)
    elif operation == TRANSLATE_Y:
        affine(image, out, 1.0, 0.0, 0.0, 0.0, 1.0, argument * image.shape[0])


@njit(cache=True, nogil=True, parallel=True)
def apply_rand_augment(images, out, indices, seed, epoch, layers, arguments):
    for i in prange(len(images)):
        current, other = images[i].copy(), np.empty_like(images[i])
        for layer in range(layers):
            operation, sign = get_choice(seed, epoch, indices[i], layer)
            apply_operation(operation, current, other, sign * arguments[operation])
            current, other = other, current
        out[i] = current


def rand_augment(images, out, indices, seed, epoch, layers, magnitude):
    """RandAugment(layers, magnitude): so many of OPERATIONS, drawn with replacement, on each image, one after the other. None is left
    out at random, as in AugReg; timm does that to half of them unless told `p1.0`."""
    apply_rand_augment(images, out, indices, seed, epoch, layers, get_arguments(magnitude))


def build_ffcv_operation(function, args, seed, epoch):
    """An augmentation as an FFCV Operation. `epoch`: int64 array (1,), read at every batch.

    The operation is called from Python (jit_mode False) because what an FFCV-jitted one closes over is frozen when it is
    compiled, the epoch included, and because numba cannot cache closures on disk. FFCV's graph never returns from
    compiling a jitted operation behind one like this, so put decoders first and these after them.
    """
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.operation import Operation

    nothing = np.empty((0, 1, 1, 3), np.uint8)
    function(nothing, nothing, np.empty(0, np.int64), seed, 0, *args)  # compile now, not in the first batch

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


@functools.lru_cache
def _get_constants(mean, std, device):
    # as (x - 255·mean) · 1/(255·std); cached, because a tensor made from Python numbers waits for the device
    def constant(values):
        if len(set(values)) == 1:
            return values[0]
        return torch.tensor(values, dtype=torch.float64).float().view(1, 3, 1, 1).to(device)
    return constant([255 * m for m in mean]), constant([1 / (255 * s) for s in std])


def normalise(images, mean, std, dtype=torch.float32):
    """(images / 255 - mean) / std, computed in fp32: uint8 (B, 3, H, W) -> `dtype`, same device and memory format.

    mean, std: tuples of three, in units of the full range. No host sync after the first call on a device.
    """
    offset, scale = _get_constants(tuple(mean), tuple(std), images.device)
    return images.float().sub_(offset).mul_(scale).to(dtype)  # in place: on a CPU fresh memory costs more than arithmetic


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
