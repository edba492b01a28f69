"""read_image: every mode a dataset may hold, and files that are no images."""

import hashlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cast_ray.common.paths import join
from cast_ray.data.reading.images import _FORMATS, IMAGE_SUFFIXES, UNREADABLE_SUFFIXES, check_image, read_image


def _save(path, image, **options):
    image.save(path, **options)
    return str(path)


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_rgb_png_is_exact(tmp_path, rgb):
    read = read_image(_save(tmp_path / "a.png", Image.fromarray(rgb)))
    assert read.dtype == np.uint8 and read.flags.writeable
    np.testing.assert_array_equal(read, rgb)


def test_names_with_special_characters(tmp_path, rgb):
    for name in ("a b.png", "what?.png", "50%.png", "100%20.png", "no#1.png", "été 图.png"):
        path = _save(tmp_path / name, Image.fromarray(rgb))
        np.testing.assert_array_equal(read_image(path), rgb)
        np.testing.assert_array_equal(read_image(join(f"file://{tmp_path}", name)), rgb)


def test_grey_becomes_three_equal_channels(tmp_path, rgb):
    read = read_image(_save(tmp_path / "a.png", Image.fromarray(rgb[:, :, 0])))
    np.testing.assert_array_equal(read, np.repeat(rgb[:, :, :1], 3, axis=2))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        read = read_image(_save(tmp_path / name, Image.fromarray(grey)))
        assert read[0, :, 0].tolist() == [0, 1, 128, 255]
        assert read.shape == (1, 4, 3)


def test_palette_and_alpha(tmp_path, rgb):
    palette = Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    np.testing.assert_array_equal(read_image(_save(tmp_path / "p.png", palette)), rgb)
    alpha = np.dstack([rgb, np.full(rgb.shape[:2], 7, np.uint8)])
    np.testing.assert_array_equal(read_image(_save(tmp_path / "rgba.png", Image.fromarray(alpha))), rgb)
    grey_alpha = Image.fromarray(rgb[:, :, 0]).convert("LA")
    np.testing.assert_array_equal(read_image(_save(tmp_path / "la.png", grey_alpha))[:, :, 2], rgb[:, :, 0])
    bits = Image.fromarray(rgb[:, :, 0] > 100)
    np.testing.assert_array_equal(read_image(_save(tmp_path / "1.png", bits))[:, :, 1], 255 * (rgb[:, :, 0] > 100))


def test_sixteen_bits_of_every_kind(tmp_path):
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    expected = [0, 1, 128, 255]
    Image.fromarray(grey.astype(">u2")).save(tmp_path / "big-endian.tif")
    _png_16(tmp_path / "grey.png", 0, grey[:, :, None])
    _png_16(tmp_path / "grey-alpha.png", 4, np.stack([grey, grey[:, ::-1]], 2))
    _png_16(tmp_path / "rgb.png", 2, np.stack([grey] * 3, 2))
    _png_16(tmp_path / "rgba.png", 6, np.stack([grey] * 3 + [grey[:, ::-1]], 2))
    for path in tmp_path.iterdir():
        assert read_image(str(path))[0].tolist() == [[v] * 3 for v in expected], path.name


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_transparent_palette(tmp_path, rgb):
    palette = Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    _save(tmp_path / "p.png", palette, transparency=bytes(range(64)))
    np.testing.assert_array_equal(read_image(str(tmp_path / "p.png")), rgb)


def test_cmyk_keeps_its_colours(tmp_path):
    red = Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK")
    read = read_image(_save(tmp_path / "a.jpg", red, quality=100))
    assert np.abs(read.astype(int) - [200, 30, 30]).max() < 6


def test_exif_rotation_is_not_applied(tmp_path, rgb):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(_save(tmp_path / "a.jpg", Image.fromarray(rgb), exif=exif)).shape == rgb.shape


def _png(width, height, data=b"", *, bits=8, colour=2, extra=b""):
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", zlib.compress(data)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png_16(path, colour, pixels_HWC):
    rows = [b"\0" + row.astype(">u2").tobytes() for row in pixels_HWC]
    path.write_bytes(_png(pixels_HWC.shape[1], pixels_HWC.shape[0], b"".join(rows), bits=16, colour=colour))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_are_named(tmp_path, rgb):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    floats = io.BytesIO()
    Image.fromarray(np.ones((3, 3), np.float32)).save(floats, "TIFF")
    hostile = {
        "empty.jpg": (b"", "empty"),
        "cut.jpg": (whole.getvalue()[:-900], "cannot be decoded"),
        "cut.png": (_png(8, 8, b"\0" * 30), "cannot be decoded"),
        "text.png": (b"<html>404</html>", "not an image"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
        "bomb.png": (_png(60_000, 60_000), "pixels"),
        "large.png": (
            _png(14_000, 14_000),
            r"14000 x 14000 pixels, at most 178956970 are read .data\.max_image_pixels.",
        ),
        "text bomb.png": (
            _png(8, 8, extra=_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 23)))),
            "cannot be decoded",
        ),
        "no pixels.png": (_png(0, 0), "."),
        "jpeg header only.jpg": (whole.getvalue()[:200], "cannot be decoded|not an image"),
        "floats.tif": (floats.getvalue(), "floating-point"),
    }
    for name, (content, reason) in hostile.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=reason) as error:
            read_image(str(path))
        assert str(path) in str(error.value)


def test_max_pixels_and_missing(tmp_path, rgb):
    path = _save(tmp_path / "a.png", Image.fromarray(rgb))
    assert read_image(path, max_pixels=35).shape == (5, 7, 3)
    with pytest.raises(ValueError, match="7 x 5 pixels, at most 34"):
        read_image(path, max_pixels=34)
    for bad in (tmp_path / "none.png", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            read_image(str(bad))
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(f"file://{tmp_path}/none.png")
    with pytest.raises(ValueError, match="nosuch://"):
        read_image("nosuch://a/b.png")


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_suffix_in_the_list_can_be_read(tmp_path, rgb, suffix):
    path = str(tmp_path / f"a{suffix}")
    options: dict[str, Any] = {"format": Image.registered_extensions()[suffix]}
    if suffix == ".mpo":
        options |= {"save_all": True, "append_images": [Image.fromarray(rgb[::-1])]}
    Image.fromarray(rgb).save(path, **options)
    assert read_image(path).shape == rgb.shape
    assert check_image(path, None, decode=False) == (rgb.shape[:2], b"")
    assert check_image(path, None, decode=True) == (
        rgb.shape[:2],
        hashlib.sha256((tmp_path / f"a{suffix}").read_bytes()).digest(),
    )


def test_the_list_has_every_suffix_of_the_formats_that_are_read():
    registered = {suffix for suffix, name in Image.registered_extensions().items() if name in _FORMATS}
    not_photographs = {".pfm", ".avifs"}  # floating-point pixels, which are refused, and films
    assert registered - not_photographs == set(IMAGE_SUFFIXES) - {".mpo"}  # several JPEGs in a file, read as JPEG
    assert not set(UNREADABLE_SUFFIXES) & set(IMAGE_SUFFIXES)
