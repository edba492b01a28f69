"""Windows of image files have the pixels of the whole image, also where the rows below are not decoded."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cast_ray.data.reading.images import ImageError, read_image
from cast_ray.data.reading.partial_decode import first_rows

HEIGHT, WIDTH = 300, 260
WINDOWS = [(0, 0, 40, 50), (16, 3, 64, 257), (100, 0, 101, 260), (131, 77, 1, 1), (0, 0, 300, 260), (280, 9, 20, 30)]

JPEG: dict[str, dict[str, Any]] = {f"jpeg sampling {s}": {"format": "JPEG", "subsampling": s} for s in (0, 1, 2)}
JPEG |= {
    "jpeg restarts": {"format": "JPEG", "restart_marker_rows": 1},
    "jpeg optimised": {"format": "JPEG", "optimize": True, "quality": 50},
    "jpeg exif": {"format": "JPEG", "exif": b"Exif\0\0" + bytes(3000)},
    "jpeg grey": {"format": "JPEG", "mode": "L"},
    "jpeg cmyk": {"format": "JPEG", "mode": "CMYK"},
}
MODES = ("RGB", "RGBA", "L", "P", "1", "I;16")
PNG: dict[str, dict[str, Any]] = {
    f"png {m}": {"format": "PNG", "mode": m} for m in ("RGB", "RGBA", "L", "P", "1", "I;16")
}
WHOLE: dict[str, dict[str, Any]] = {
    "jpeg progressive": {"format": "JPEG", "progressive": True},
    "webp": {"format": "WEBP"},
    "bmp": {"format": "BMP"},
    "tiff": {"format": "TIFF"},
}


def picture() -> np.ndarray:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (10, 9, 3), dtype=np.uint8))
    smooth = np.array(small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.int16)
    return (smooth + rng.integers(-20, 20, smooth.shape)).clip(0, 255).astype(np.uint8)


def encode(options: dict[str, Any]) -> bytes:
    image, options = Image.fromarray(picture()), dict(options)
    mode = options.pop("mode", "RGB")
    if mode == "I;16":
        image = Image.fromarray(picture()[:, :, 0].astype(np.uint16) * 257)
    buffer = io.BytesIO()
    (image if mode == "I;16" else image.convert(mode)).save(buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", [*JPEG, *PNG, *WHOLE])
def test_a_window_has_the_pixels_of_the_whole(name, tmp_path):
    content = encode((JPEG | PNG | WHOLE)[name])
    (tmp_path / "a").write_bytes(content)
    path = str(tmp_path / "a")
    whole = read_image(path)
    for window in WINDOWS:
        top, left, height, width = window
        found = read_image(path, (HEIGHT, WIDTH), window=window)
        assert found.flags.writeable
        np.testing.assert_array_equal(found, whole[top : top + height, left : left + width])


@pytest.mark.parametrize("name", [*JPEG, *PNG])
def test_rows_below_are_left_out(name):
    content = encode((JPEG | PNG)[name])
    upper = first_rows(content, 100)
    assert upper is not None
    with Image.open(io.BytesIO(upper)) as image:
        assert 100 <= image.height <= 144 and image.width == WIDTH
    assert first_rows(content, HEIGHT) is None


@pytest.mark.parametrize("name", WHOLE)
def test_formats_whose_rows_are_not_apart_are_read_whole(name):
    assert first_rows(encode(WHOLE[name]), 100) is None


def test_animated_and_interlaced_png_are_read_whole():
    frames = [Image.fromarray(picture()), Image.fromarray(picture()[::-1])]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="PNG", save_all=True, append_images=frames[1:])
    assert first_rows(buffer.getvalue(), 100) is None
    plain = encode(PNG["png RGB"])
    assert first_rows(plain[:28] + b"\1" + plain[29:], 100) is None


@pytest.mark.parametrize("name", ["jpeg sampling 2", "png RGB"])
def test_any_beginning_of_a_file_is_taken_or_left(name):
    content = encode((JPEG | PNG)[name])
    for length in [*range(0, 700, 7), len(content) // 2]:
        first_rows(content[:length], 100)


@pytest.mark.parametrize("name", ["jpeg sampling 2", "png RGB"])
def test_damage_in_the_window_is_an_error(name, tmp_path):
    content = encode((JPEG | PNG)[name])
    (tmp_path / "a").write_bytes(content[: len(content) // 4])
    with pytest.raises(ImageError, match="cannot be decoded"):
        read_image(str(tmp_path / "a"), (HEIGHT, WIDTH), window=(100, 0, 100, 50))
