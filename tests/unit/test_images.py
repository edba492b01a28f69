"""read_image: every mode a dataset may hold, and files that are no images."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cast_ray.datasets.images import read_image
from cast_ray.datasets.paths import join


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


def test_cmyk_keeps_its_colours(tmp_path):
    red = Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK")
    read = read_image(_save(tmp_path / "a.jpg", red, quality=100))
    assert np.abs(read.astype(int) - [200, 30, 30]).max() < 6


def test_exif_rotation_is_not_applied(tmp_path, rgb):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(_save(tmp_path / "a.jpg", Image.fromarray(rgb), exif=exif)).shape == rgb.shape


def _png(width, height, data=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


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
