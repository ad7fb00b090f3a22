"""From the bytes of a .beton to images of one size, in numba: JPEG by libturbojpeg, crop, Pillow's resize.

FFCV's own decoders ignore the decoder's return code (a damaged JPEG comes out black), draw crops from a
generator that nobody can seed, and resize as OpenCV does. These say which image is damaged, take their crops
as numbers, and give what Pillow gives, bilinear.

Nothing compiled here calls what is compiled elsewhere: numba's cache on disk would not notice a change there.
"""

import ctypes
import math

import llvmlite.binding
import numpy as np

from data.compiled import njit, prange, types

RAW = 1  # how a .beton holds an image; else JPEG
TJPF_RGB = 0  # of turbojpeg.h
PRECISION = 22  # bits of a resize weight after the point, as in Pillow's Resample.c

# By name, so that what calls them can be cached on disk. All take and return what C's int, unsigned long and
# pointers are.
_init = types.ExternalFunction("tjInitDecompress", types.intp())
_header = types.ExternalFunction(
    "tjDecompressHeader3",
    types.int32(types.intp, types.CPointer(types.uint8), types.uint64, *[types.CPointer(types.int32)] * 4),
)
_decompress = types.ExternalFunction(
    "tjDecompress2",
    types.int32(
        types.intp, types.CPointer(types.uint8), types.uint64, types.CPointer(types.uint8), *[types.int32] * 5
    ),
)
_destroy = types.ExternalFunction("tjDestroy", types.int32(types.intp))


def load_turbojpeg(library: str) -> None:
    """Let the compiled code find libturbojpeg's functions by a shared library that is linked with it."""
    library = ctypes.CDLL(library)
    for name in ("tjInitDecompress", "tjDecompressHeader3", "tjDecompress2", "tjDestroy"):
        llvmlite.binding.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)


@njit(cache=True, nogil=True)
def decode_jpeg(data: np.ndarray, out: np.ndarray) -> bool:
    """uint8 (n,), not writeable -> out, uint8 (H, W, 3). Returns whether that is a sound JPEG of this size.

    Decoded as Pillow does (no fast DCT). Not writeable, as a mapped file is: with a second signature beside
    that one, numba's inference for decode_batch never ends.
    """
    handle = _init()
    size = np.empty(4, np.int32)  # width, height, subsampling, colour space
    failed = _header(
        handle, data.ctypes, data.size, size[0:].ctypes, size[1:].ctypes, size[2:].ctypes, size[3:].ctypes
    )
    sound = False
    if failed == 0 and size[0] == out.shape[1] and size[1] == out.shape[0]:
        failed = _decompress(
            handle, data.ctypes, data.size, out.ctypes, out.shape[1], 0, out.shape[0], TJPF_RGB, 0
        )
        sound = failed == 0
    _destroy(handle)
    return sound


@njit(cache=True, nogil=True)
def get_weights(
    size: int, new_size: int, first: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pillow's bilinear resize from `size` to `new_size` pixels, for new pixels first … first + count - 1.

    Returns where each begins in the source, of how many pixels it is made (int64 (count,) both), and their
    weights, int32 (count, most), of 2^PRECISION in all.
    """
    scale = size / new_size
    support = max(scale, 1.0)  # a triangle over as many pixels as one new pixel covers, both sides
    starts, counts = np.empty(count, np.int64), np.empty(count, np.int64)
    weights = np.zeros((count, math.ceil(support) * 2 + 1), np.int32)
    for i in range(count):
        centre = (first + i + 0.5) * scale
        starts[i] = max(int(centre - support + 0.5), 0)
        counts[i] = min(int(centre + support + 0.5), size) - starts[i]
        shares = np.empty(counts[i])
        for k in range(counts[i]):
            shares[k] = max(1.0 - abs((k + starts[i] - centre + 0.5) / support), 0.0)
        total = 0.0
        for k in range(counts[i]):
            total += shares[k]
        for k in range(counts[i]):
            weights[i, k] = int(0.5 + shares[k] / total * (1 << PRECISION))
    return starts, counts, weights


@njit(cache=True, nogil=True)
def resize_across(
    image: np.ndarray, out: np.ndarray, starts: np.ndarray, counts: np.ndarray, weights: np.ndarray
) -> None:
    """uint8 (H, w, 3) -> out, uint8 (H, W, 3), both contiguous.

    Unsigned numbers index flat rows, because for signed ones numba looks at each whether it counts from the
    end.
    """
    half, one, two, three = np.int32(1 << (PRECISION - 1)), np.uint64(1), np.uint64(2), np.uint64(3)
    for y in range(out.shape[0]):
        row, out_row = image[y].reshape(-1), out[y].reshape(-1)
        for x in range(out.shape[1]):
            red = green = blue = half
            source, target, shares = np.uint64(3 * starts[x]), np.uint64(3 * x), weights[x]
            for k in range(np.uint64(counts[x])):
                red += row[source] * shares[k]
                green += row[source + one] * shares[k]
                blue += row[source + two] * shares[k]
                source += three
            out_row[target] = red >> PRECISION
            out_row[target + one] = green >> PRECISION
            out_row[target + two] = blue >> PRECISION


@njit(cache=True, nogil=True)
def resize_down(
    image: np.ndarray, out: np.ndarray, starts: np.ndarray, counts: np.ndarray, weights: np.ndarray
) -> None:
    """uint8 (h, W, 3) -> out, uint8 (H, W, 3), both contiguous. Whole rows are added up, that is SIMD."""
    rows, out_rows = image.reshape(image.shape[0], -1), out.reshape(out.shape[0], -1)
    total = np.empty(rows.shape[1], np.int32)
    for y in range(len(out_rows)):
        total[:] = 1 << (PRECISION - 1)
        for k in range(counts[y]):
            row, weight = rows[starts[y] + k], weights[y, k]
            for x in range(len(total)):
                total[x] += np.int32(row[x]) * weight
        for x in range(len(total)):
            out_rows[y, x] = total[x] >> PRECISION


@njit(cache=True, nogil=True)
def resize(image: np.ndarray, out: np.ndarray, height: int, width: int, top: int, left: int) -> None:
    """Window [top: top + H, left: left + W] of `image` resized to (height, width).

    uint8 (h, w, 3) -> out, uint8 (H, W, 3), contiguous. What Image.resize((width, height), BILINEAR) followed
    by that crop gives, to the bit: one direction after the other, rounded in between, across first unless the
    height shrinks by more than twice what the width does (Pillow 13; older ones: 100 times).
    """
    x_starts, x_counts, x_weights = get_weights(image.shape[1], width, left, out.shape[1])
    y_starts, y_counts, y_weights = get_weights(image.shape[0], height, top, out.shape[0])
    shrinks = image.shape[0] - height
    if shrinks > 0 and shrinks > 2 * (image.shape[1] - width):
        between = np.empty((out.shape[0], image.shape[1], 3), np.uint8)
        resize_down(image, between, y_starts, y_counts, y_weights)
        resize_across(between, out, x_starts, x_counts, x_weights)
    else:
        first, last = y_starts[0], y_starts[-1] + y_counts[-1]
        between = np.empty((last - first, out.shape[1], 3), np.uint8)
        resize_across(image[first:last], between, x_starts, x_counts, x_weights)
        resize_down(between, out, y_starts - first, y_counts, y_weights)


@njit(cache=True, nogil=True)
def crop_and_resize(image: np.ndarray, out: np.ndarray, crop: np.ndarray, short_side: int) -> None:
    """uint8 (h, w, 3) -> out, uint8 (S, S, 3).

    crop: int64 (4,), top, left, height and width of what is resized to that; with a height of 0 torchvision's
    Resize(short_side) and CenterCrop(S).
    """
    (height, width), side = image.shape[:2], out.shape[0]
    if crop[2] > 0:
        part = image[crop[0] : crop[0] + crop[2], crop[1] : crop[1] + crop[3]]
        resize(np.ascontiguousarray(part), out, side, side, 0, 0)
    elif height == width == short_side == side:
        out[:] = image
    else:
        h = short_side if height <= width else int(short_side * height / width)
        w = short_side if width <= height else int(short_side * width / height)
        resize(image, out, h, w, int(round((h - side) / 2)), int(round((w - side) / 2)))


@njit(cache=True, nogil=True, parallel=True)
def decode_batch(
    file: np.ndarray,
    samples: np.ndarray,
    indices: np.ndarray,
    out: np.ndarray,
    sound: np.ndarray,
    crops: np.ndarray,
    short_side: int,
) -> None:
    """Images `indices` of a mapped .beton -> out, uint8 (B, S, S, 3).

    samples: what data/beton.py's read_samples returns.
    `sound`, bool (B,), says which could be decoded. crops: int64 (B, 4), see crop_and_resize.
    """
    for i in prange(len(indices)):
        sample = samples[indices[i]]
        data = file[sample[0] : sample[0] + sample[1]]
        mode, height, width = sample[2], sample[3], sample[4]
        if mode == RAW:
            crop_and_resize(data.reshape(height, width, 3), out[i], crops[i], short_side)
            sound[i] = True
        else:
            image = np.empty((height, width, 3), np.uint8)
            sound[i] = decode_jpeg(data, image)
            crop_and_resize(image, out[i], crops[i], short_side)
