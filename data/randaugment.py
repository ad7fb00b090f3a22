"""RandAugment's operations (Cubuk et al. 2020, arXiv:1909.13719), with timm's names and scale, in numba.

timm's work on Pillow images; each of these is f(image, out, argument) on uint8 (H, W, 3) arrays and repeats
Pillow's arithmetic with its roundings. float32 stands where C has a float. What is drawn for an image is
data/augment.py's matter: numba's cache on disk notices changes only in the file of a compiled function, so
nothing compiled here calls what is compiled there, nor the other way round.
"""

import math

import numpy as np

from data.compiled import njit, prange

# fmt: off
OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color",
    "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)
(
    AUTO_CONTRAST, EQUALIZE, INVERT, ROTATE, POSTERIZE, SOLARIZE, SOLARIZE_ADD, COLOR,
    CONTRAST, BRIGHTNESS, SHARPNESS, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y,
) = range(len(OPERATIONS))
# fmt: on
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")  # to either side, at random
GREY = 128  # what geometric operations fill with: the mean pixel after normalisation with mean 0.5


def get_arguments(magnitude: float) -> np.ndarray:
    """The argument of each of OPERATIONS at a magnitude, float64 (15,).

    They are degrees, bits, thresholds, factors or shares of a side, in the operations' units. 10 is the
    nominal maximum and larger ones go beyond it, as in TF and big_vision; in timm that needs `mmax`, without
    it rand-m15 is rand-m10. Those of SIGNED are negated at random, see data/augment.py's get_choice.
    """
    level = magnitude / 10
    enhance = level * 1.8 + 0.1
    # fmt: off
    return np.array([
        0, 0, 0, level * 30, int(level * 4), min(256, int(level * 256)), min(128, int(level * 110)), enhance,
        enhance, enhance, enhance, level * 0.3, level * 0.3, level * 0.45, level * 0.45,
    ])
    # fmt: on


@njit(cache=True, nogil=True)
def histogram(image: np.ndarray, channel: int) -> np.ndarray:
    counts = np.zeros(256, np.int64)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            counts[image[y, x, channel]] += 1
    return counts


@njit(cache=True, nogil=True)
def look_up(image: np.ndarray, out: np.ndarray, channel: int, table: np.ndarray) -> None:
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            out[y, x, channel] = table[image[y, x, channel]]


@njit(cache=True, nogil=True)
def auto_contrast(image: np.ndarray, out: np.ndarray, _: float) -> None:
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
def equalize(image: np.ndarray, out: np.ndarray, _: float) -> None:
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
def invert(image: np.ndarray, out: np.ndarray, _: float) -> None:
    for channel in range(3):
        look_up(image, out, channel, np.arange(255, -1, -1))


@njit(cache=True, nogil=True)
def posterize(image: np.ndarray, out: np.ndarray, bits: float) -> None:
    """Keep so many of the upper bits."""
    for channel in range(3):
        look_up(image, out, channel, np.arange(256) & ~(2 ** (8 - min(int(bits), 8)) - 1))


@njit(cache=True, nogil=True)
def solarize(image: np.ndarray, out: np.ndarray, threshold: float) -> None:
    """Invert pixels from `threshold` on; 256 changes nothing."""
    values = np.arange(256)
    for channel in range(3):
        look_up(image, out, channel, np.where(values < threshold, values, 255 - values))


@njit(cache=True, nogil=True)
def solarize_add(image: np.ndarray, out: np.ndarray, add: float) -> None:
    """Add to pixels below 128."""
    values = np.arange(256)
    for channel in range(3):
        look_up(image, out, channel, np.where(values < 128, np.minimum(255, values + int(add)), values))


@njit(cache=True, nogil=True)
def blend(degenerate: int, value: int, factor: float) -> np.uint8:
    """Image.blend: degenerate + factor (value - degenerate), in float32, cut off towards 0 and clipped."""
    mixed = np.float32(degenerate) + factor * np.float32(np.int64(value) - np.int64(degenerate))
    return np.uint8(min(max(mixed, np.float32(0)), np.float32(255)))


@njit(cache=True, nogil=True)
def luma(image: np.ndarray, y: int, x: int) -> int:
    """ITU-R 601-2, as Image.convert("L")."""
    return (
        np.int64(image[y, x, 0]) * 19595
        + np.int64(image[y, x, 1]) * 38470
        + np.int64(image[y, x, 2]) * 7471
        + 0x8000
    ) >> 16


@njit(cache=True, nogil=True)
def color(image: np.ndarray, out: np.ndarray, factor: float) -> None:
    """Between grey (0), itself (1) and beyond (ImageEnhance.Color)."""
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            grey = luma(image, y, x)
            for c in range(3):
                out[y, x, c] = blend(grey, image[y, x, c], np.float32(factor))


@njit(cache=True, nogil=True)
def contrast(image: np.ndarray, out: np.ndarray, factor: float) -> None:
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
def brightness(image: np.ndarray, out: np.ndarray, factor: float) -> None:
    """Between black (0), itself (1) and beyond (ImageEnhance.Brightness)."""
    table = np.empty(256, np.int64)
    for i in range(256):
        table[i] = blend(0, i, np.float32(factor))
    for channel in range(3):
        look_up(image, out, channel, table)


@njit(cache=True, nogil=True)
def sharpness(image: np.ndarray, out: np.ndarray, factor: float) -> None:
    """Between smoothed by 3 × 3 (0), itself (1) and beyond (ImageEnhance.Sharpness); the border stays."""
    height, width = image.shape[:2]
    rows, out_rows, factor = image.reshape(height, -1), out.reshape(height, -1), np.float32(factor)
    out_rows[:] = rows
    for y in range(1, height - 1):
        above, row, below = rows[y - 1], rows[y], rows[y + 1]
        for x in range(3, width * 3 - 3):
            ring = (
                np.int32(above[x - 3])
                + np.int32(above[x])
                + np.int32(above[x + 3])
                + np.int32(row[x - 3])
                + np.int32(row[x + 3])
                + np.int32(below[x - 3])
                + np.int32(below[x])
                + np.int32(below[x + 3])
            )
            smooth = (2 * (ring + 5 * np.int32(row[x])) + 13) // 26  # (ring + 5 row) / 13, rounded
            out_rows[y, x] = blend(smooth, row[x], factor)


@njit(cache=True, nogil=True)
def affine(
    image: np.ndarray, out: np.ndarray, a: float, b: float, c: float, d: float, e: float, f: float
) -> None:
    """out[y, x] = image at (x', y') = (a x + b y + c, d x + e y + f), of pixel centres, bilinear.

    GREY where that is outside.
    """
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
def rotate(image: np.ndarray, out: np.ndarray, degrees: float) -> None:
    """Counter-clockwise around the centre (Image.rotate)."""
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    y, x = image.shape[0] / 2, image.shape[1] / 2
    affine(image, out, cos, sin, (cos * -x + sin * -y) + x, -sin, cos, (-sin * -x + cos * -y) + y)


@njit(cache=True, nogil=True)
def apply_operation(operation: int, image: np.ndarray, out: np.ndarray, argument: float) -> None:
    """One of OPERATIONS, by its number, on one image: uint8 (H, W, 3) -> out, which is other memory."""
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
def apply_operations(
    images: np.ndarray, out: np.ndarray, operations: np.ndarray, arguments: np.ndarray
) -> None:
    """operations, arguments: (B, layers); on each image of uint8 (B, H, W, 3) one after the other -> out."""
    for i in prange(len(images)):
        current, other = images[i].copy(), np.empty_like(images[i])
        for layer in range(operations.shape[1]):
            apply_operation(operations[i, layer], current, other, arguments[i, layer])
            current, other = other, current
        out[i] = current
