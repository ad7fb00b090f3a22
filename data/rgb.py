"""One image file, of any format that Pillow reads, as an upright RGB image on white."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from data.order import DataError

# Formats whose files' names Pillow knows, and which it cannot open as pictures.
NO_PICTURES = {
    *("BUFR", "GRIB", "HDF5", "WMF"),  # only with a reader of one's own
    "MPEG",  # its size, and no frame of it
    *("PALM", "PDF"),  # only written
    "EPS",  # a program, which Ghostscript runs: what is a picture would depend on the machine
}
# In a PNG of 2 or 4 bits, the transparent grey is one of 0 to 3 or 15; the pixels are made 0 to 255.
GREY_STEPS = {"L;2": 85, "L;4": 17}


def get_extensions() -> tuple[str, ...]:
    """How names of files that Pillow can open as pictures end, lower-case and with the dot."""
    formats = Image.registered_extensions()
    return tuple(extension for extension in formats if formats[extension] not in NO_PICTURES)


def read_image(path: str | Path, trust_images: bool = False) -> Image.Image:
    """A file of any format that Pillow reads as an RGB image.

    It is upright, because EXIF's orientation is applied; what is transparent lies on white; of 16 bits the
    upper 8 are taken. All of this goes by the file's mode, never by what the picture shows.
    trust_images: without Pillow's limits on the size of an image and of a PNG's texts, which are there
    against files made to fill the memory.
    Raises DataError, naming the file, for one that is damaged, beyond those limits, or of numbers of which
    nothing says which is black and which is white.
    """
    limits = _no_limits() if trust_images else contextlib.nullcontext()
    with _only_pillow(path), limits, Image.open(path) as file:
        _mend_transparency(file)
        image = ImageOps.exif_transpose(file)  # a copy
    if image.mode == "F":
        raise DataError(_describe_scale(path, "floats"))
    if image.mode.startswith("I"):
        image = _drop_lower_bits(image, path)
    with _only_pillow(path):
        return _put_on_white(image)


@contextlib.contextmanager
def _only_pillow(path: str | Path) -> Iterator[None]:
    """For Pillow's calls and nothing else: its plugins raise what they like on a damaged file.

    OSError, SyntaxError, ValueError, struct.error, … all become a DataError that names the file.
    """
    try:
        yield
    except Exception as error:
        advice = ""
        if isinstance(error, Image.DecompressionBombError) or "MAX_TEXT" in str(error):
            advice = " (if it is your own: data.beton --trust_images reads it)"
        raise DataError(f"{path} cannot be read as an image: {error}{advice}") from error


@contextlib.contextmanager
def _no_limits() -> Iterator[None]:
    """Let Pillow read images of any size, and PNGs with texts and colour profiles of any length."""
    pixels = Image.MAX_IMAGE_PIXELS
    chunk, memory = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    Image.MAX_IMAGE_PIXELS = None
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = sys.maxsize
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = pixels
        PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = chunk, memory


def _mend_transparency(file: Image.Image) -> None:
    """Give a PNG's transparent grey or colour in the depth of its pixels.

    Pillow gives it in the file's depth and compares it with pixels of 8 bits. (Of 16 bits a colour the
    upper 8 are compared, since Pillow has dropped the lower ones.)
    """
    if file.format != "PNG" or "transparency" not in file.info or not file.tile:
        return
    raw_mode, value = file.tile[0][3], file.info["transparency"]
    if raw_mode in GREY_STEPS:
        file.info["transparency"] = value * GREY_STEPS[raw_mode]
    elif raw_mode == "RGB;16B":
        file.info["transparency"] = tuple(channel >> 8 for channel in value)


def _drop_lower_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """A grey image of 16 bits as one of 8: Pillow would cut off the upper ones.

    Of mode I;16, or of mode I, which has 32, with values that 16 hold. A transparent grey becomes white.
    """
    pixels = np.asarray(image)  # (H, W)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise DataError(_describe_scale(path, f"integers from {pixels.min()} to {pixels.max()}"))
    upper = (pixels >> 8).astype(np.uint8)
    if "transparency" in image.info:
        upper[pixels == image.info["transparency"]] = 255
    return Image.fromarray(upper)


def _describe_scale(path: str | Path, values: str) -> str:
    return (
        f"{path} holds {values}, and nothing says which is black and which is white: convert it, by "
        "Image.fromarray(((pixels - black) / (white - black) * 255).clip(0, 255).astype('uint8')) say"
    )


def _put_on_white(image: Image.Image) -> Image.Image:
    """An image of 8 bits a channel as RGB, with what is transparent in it on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # which Pillow converts into this alone
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
