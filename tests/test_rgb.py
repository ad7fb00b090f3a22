"""data/rgb.py: what a file says is what is seen, decided by its mode; and the files that are refused."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from data.order import DataError
from data.rgb import NO_PICTURES, get_extensions, read_image


def write_png(path, depth, colour_type, width, rows, transparent, palette=None):
    """A PNG of any depth: Pillow writes none of 2 bits, and no transparency of 16."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    if palette:
        data += chunk(b"PLTE", palette)
    data += chunk(b"tRNS", transparent)
    data += chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    path.write_bytes(data + chunk(b"IEND", b""))


def clip_art():
    """A bar on nothing, with edges half transparent, RGBA (8, 8). Black everywhere but for its alpha."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 3:5, 3] = 255
    pixels[:, [2, 5], 3] = 128
    return Image.fromarray(pixels)


ON_WHITE = np.full((8, 8), 255)
ON_WHITE[:, 3:5], ON_WHITE[:, [2, 5]] = 0, 127


def save_palette(path):
    clip_art().quantize(4).save(path)


def save_palette_with_alpha(path):
    image = Image.merge("PA", [Image.new("L", (8, 8)), clip_art().getchannel("A")])
    image.putpalette([0, 0, 0] * 4)
    image.save(path)


def save_premultiplied(path, mode):
    """A TIFF whose colours are said to be multiplied by alpha, as black ones are: tag ExtraSamples 2 -> 1."""
    clip_art().convert(mode).save(path)
    unassociated, associated = struct.pack("<HHIH", 338, 3, 1, 2), struct.pack("<HHIH", 338, 3, 1, 1)
    assert path.read_bytes().count(unassociated) == 1
    path.write_bytes(path.read_bytes().replace(unassociated, associated))


# mode as Pillow opens it, and how it is saved
CLIP_ART = {
    "rgba.png": ("RGBA", lambda path: clip_art().save(path)),
    "rgba.webp": ("RGBA", lambda path: clip_art().save(path, lossless=True, exact=True)),
    "rgba.tif": ("RGBA", lambda path: clip_art().save(path)),
    "rgba.tga": ("RGBA", lambda path: clip_art().save(path)),
    "premultiplied.tif": ("RGBA", lambda path: save_premultiplied(path, "RGBA")),
    "la.png": ("LA", lambda path: clip_art().convert("LA").save(path)),
    "premultiplied grey.tif": ("La", lambda path: save_premultiplied(path, "LA")),
    "palette.png": ("P", save_palette),
    "palette with alpha.tif": ("PA", save_palette_with_alpha),
}


@pytest.mark.parametrize("name", CLIP_ART)
def test_what_is_transparent_lies_on_white(tmp_path, name):
    """A drawing in black on nothing, which is all black without its transparency."""
    path, (mode, save) = tmp_path / name, CLIP_ART[name]
    save(path)
    image = np.array(read_image(path)).astype(int)
    assert np.abs(image - ON_WHITE[..., None]).max() <= 1
    with Image.open(path) as file:
        file.load()
        assert file.mode == mode
        if mode != "La":  # control: of which Pillow gives no colours without alpha
            assert len(np.unique(np.array(file.convert("RGBA"))[..., :3])) == 1


ONE_COLOUR_OUT = {  # depth, colour type, width, row, what is transparent -> the row's reds
    "grey 1": (1, 0, 8, b"\xa0", b"\0\1", [255, 0, 255, 0, 0, 0, 0, 0]),
    "grey 2": (2, 0, 4, b"\x1b", b"\0\1", [0, 255, 170, 255]),
    "grey 4": (4, 0, 4, b"\x01\x5f", b"\0\5", [0, 17, 255, 255]),
    "grey 8": (8, 0, 4, b"\x01\x05\x0f\x10", b"\0\5", [1, 255, 15, 16]),
    "grey 16": (16, 0, 2, b"\x01\x05\x0f\xff", b"\1\5", [255, 15]),
    "RGB 8": (8, 2, 2, b"\1\2\3\1\2\4", b"\0\1\0\2\0\3", [255, 1]),
    "RGB 16": (16, 2, 2, b"\1\0\2\0\3\0\1\0\2\0\4\0", b"\1\0\2\0\3\0", [255, 1]),
}


@pytest.mark.parametrize("kind", ONE_COLOUR_OUT)
def test_one_transparent_colour(tmp_path, kind):
    *png, transparent, reds = ONE_COLOUR_OUT[kind]
    depth, colour_type, width, row = png
    write_png(tmp_path / "x.png", depth, colour_type, width, [row], transparent)
    assert np.array(read_image(tmp_path / "x.png"))[0, :, 0].tolist() == reds


def test_what_is_not_transparent_keeps_its_colours(tmp_path):
    """To the bit, although it has an alpha channel, or says which colour would be transparent."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.convert("RGBA").save(tmp_path / "rgba.png")
    pixels[0, 0] = 1, 2, 3
    Image.fromarray(pixels).save(tmp_path / "rgb.png", transparency=(3, 2, 1))
    assert np.array_equal(read_image(tmp_path / "rgba.png"), image)
    assert np.array_equal(read_image(tmp_path / "rgb.png"), pixels)


@pytest.mark.parametrize("largest", [255, 257, 4095, 65535])
def test_16_bits_are_taken_by_their_upper_8(tmp_path, largest):
    """The same whatever the picture shows: a dark one stays dark."""
    ramp = (np.arange(64 * 64).reshape(64, 64) * largest // 4095).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    Image.fromarray(ramp).save(tmp_path / "little.tif")
    Image.fromarray(ramp.astype(">u2")).save(tmp_path / "big.tif")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "32 bits.tif")
    modes = set()
    for path in tmp_path.iterdir():
        with Image.open(path) as file:
            modes.add(file.mode)
        assert np.array_equal(read_image(path), np.repeat(ramp[..., None] >> 8, 3, 2)), path
    assert modes >= {"I;16", "I;16B", "I"}


@pytest.mark.parametrize(
    "name, values, says",
    [
        ("float.tif", np.linspace(0, 1, 64, dtype=np.float32), "float.tif holds floats, "),
        ("nan.tif", np.full(64, np.nan, np.float32), "nan.tif holds floats, "),
        ("large.tif", np.arange(65473, 65537, dtype=np.int32), "holds integers from 65473 to 65536, "),
        ("below.tif", np.arange(-1, 63, dtype=np.int32), "holds integers from -1 to 62, "),
    ],
)
def test_numbers_without_black_and_white_are_refused(tmp_path, name, values, says):
    Image.fromarray(values.reshape(8, 8)).save(tmp_path / name)
    with pytest.raises(DataError, match=f"{tmp_path}/.*{says}.*: convert it, by Image.fromarray"):
        read_image(tmp_path / name)


def add_text(path):
    png = path.read_bytes()
    data = b"iTXtcomment\0\1\0\0\0" + zlib.compress(b" " * (1 << 21))
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    path.write_bytes(png[:33] + chunk + png[33:])


@pytest.mark.parametrize("kind", ["large", "text"])
def test_trusted_images_have_no_limits(tmp_path, monkeypatch, kind):
    path = tmp_path / "own.png"
    clip_art().save(path)
    if kind == "text":
        add_text(path)
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)  # of 64 that are there; twice as many are an error
    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    with pytest.raises(DataError, match=f"{path} cannot be read .*: data.beton --trust_images reads it"):
        read_image(path)
    assert read_image(path, trust_images=True).size == (8, 8)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError) as refused:  # control: another mistake, to which trust is no answer
        read_image(path, trust_images=True)
    assert "--trust_images" not in str(refused.value)
    assert before == (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


def test_formats_without_a_reader_are_no_pictures():
    """Held to Pillow's own tables, whichever version is installed."""
    extensions = get_extensions()
    for extension, name in Image.registered_extensions().items():
        opener = Image.OPEN.get("JPEG" if name == "MPO" else name, [None])[0]
        is_stub = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)
        is_picture = opener is not None and not is_stub and name not in ("MPEG", "EPS")
        assert (extension in extensions) == is_picture == (name not in NO_PICTURES), extension
    assert {".jpg", ".png", ".webp", ".mpo"} < set(extensions)
