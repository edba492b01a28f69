"""Image files to RGB pixels, whatever their mode, and label maps as stored; errors name the file."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from cast_ray.common.paths import is_uri, read_bytes
from cast_ray.data.reading.partial_decode import first_rows
from cast_ray.data.reading.recent_files import RECENT_BYTES, RecentFiles, SharedFiles

MAX_PIXELS = 178_956_970
"""Pillow's own limit; more is taken for a decompression bomb unless the recipe says otherwise."""

# EPS and friends run interpreters or open other files: only plain raster formats are tried.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
)
"""What files are called that `read_image` reads, in lower case."""
UNREADABLE_SUFFIXES = (
    *(".heic", ".heif", ".jxl", ".svg", ".psd", ".eps", ".pdf", ".raw", ".dng"),
    *(".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".exr", ".hdr", ".dcm"),
)
"""Pictures that cannot be read here and must be converted first."""
_HEAD_BYTES = 1 << 18
_WORTH_CUTTING_PX = 1 << 16  # below it opening a file twice costs more than the rows that are saved
_MAP_MODES = ("L", "P", "I", "I;16", "I;16B", "RGB", "RGBA")
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)


_recent = RecentFiles(RECENT_BYTES)
shared: SharedFiles | None = None
"""Where the processes of this node share what they have fetched; None: they do not."""


class ImageError(ValueError):
    """A file that cannot be used as an image: `reason` says why, the message also names the file."""

    def __init__(self, uri: str, reason: str):
        super().__init__(uri, reason)
        self.uri, self.reason = uri, reason

    def __str__(self) -> str:
        return f"{self.uri}: {self.reason}"


Window = tuple[int, int, int, int]
"""A rectangle of an image: top, left, height, width in pixels."""


def read_image(
    uri: str,
    image_hw: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    window: Window | None = None,
) -> np.ndarray:
    """Reads one image file, or a window of it, as RGB.

    Grey, palette and CMYK images are converted, an alpha channel is dropped, 16-bit grey is scaled from 0..65535 to
    0..255 (Pillow's own conversion clips it to white). EXIF orientation is not applied: annotations are in the
    coordinates of the stored pixels. Of an animation the first frame is read.

    The bytes of files behind a URI are kept for the next read, see `recent_files`.

    Args:
        uri: local path or any pyarrow.fs URI (s3://, gs://, file://).
        image_hw: (height, width) that the image must have, as its record says; then `max_pixels` is not asked.
        max_pixels: larger images are refused before they are decoded.
        window: the part of the image that is wanted. Its pixels are those of the whole image; what lies below it is not
            decoded where the format allows that, and damage there is then not noticed.

    Returns:
        uint8 [H, W, 3], RGB; H and W of the window, if there is one.

    Raises:
        ImageError (a ValueError): missing, empty, truncated, of another size, too large or not an image.
        OSError: the file store failed (worth another try, which a bad file is not).
    """
    with _opened(uri, image_hw, max_pixels, recent=True) as (image, content):
        return _to_rgb(image) if window is None else _decode_window(image, content, window)


def _decode_window(image: Image.Image, content: bytes, window: Window) -> np.ndarray:
    top, left, height, width = window
    if (height, width) == (image.height, image.width):
        return _to_rgb(image)
    box = (left, top, left + width, top + height)
    fewer = first_rows(content, top + height) if image.width * image.height >= _WORTH_CUTTING_PX else None
    if fewer is not None:
        try:
            with Image.open(io.BytesIO(fewer), formats=_FORMATS) as upper:
                return _to_rgb(upper.crop(box))
        except Exception:  # whatever it is, the whole file decides whether it can be read
            pass
    return _to_rgb(image.crop(box))


def check_image(
    uri: str, image_hw: tuple[int, int] | None, max_pixels: int = MAX_PIXELS, *, decode: bool
) -> tuple[tuple[int, int], bytes]:
    """Checks that `read_image` can read an image file; with `decode` False, only that it begins like one.

    Returns:
        (height, width), and the sha256 of the file's bytes; b"" with `decode` False, where only a part is read.

    Raises:
        ImageError, OSError: as `read_image`.
    """
    with _opened(uri, image_hw, max_pixels, whole=decode) as (image, content):
        if decode:
            _to_rgb(image)
        return (image.height, image.width), hashlib.sha256(content).digest() if decode else b""


def read_map(uri: str, image_hw: tuple[int, int], max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A label map as stored, without any conversion of colours: integer [H, W] or uint8 [H, W, 3 or 4].

    Raises:
        ImageError, OSError: as `read_image`; also for a mode in which no label map is stored.
    """
    with _opened(uri, image_hw, max_pixels) as (image, _):
        if image.mode not in _MAP_MODES:
            raise _Refused(f"a label map of mode {image.mode}: expected 8- or 16-bit grey or RGB")
        return np.asarray(image)


def read_mask(uri: str, image_hw: tuple[int, int], max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The mask of one object: bool [H, W], true where a colour is not black. An alpha channel is passed over.

    Raises:
        ImageError, OSError: as `read_map`.
    """
    with _opened(uri, image_hw, max_pixels) as (image, _):
        if image.mode not in (*_MAP_MODES, "1", "LA"):
            raise _Refused(f"a mask of mode {image.mode}: expected 1-, 8- or 16-bit grey or RGB")
        pixels = np.asarray(image)
        return pixels != 0 if pixels.ndim == 2 else (pixels[..., : 1 if image.mode == "LA" else 3] != 0).any(-1)


@contextmanager
def _opened(
    uri: str, image_hw: tuple[int, int] | None, max_pixels: int, *, whole: bool = True, recent: bool = False
) -> Iterator[tuple[Image.Image, bytes]]:
    """The image before it is decoded, its size checked, and the bytes that were read.

    Whatever goes wrong in the body is laid to the file.
    """
    if image_hw is not None:
        max_pixels = image_hw[0] * image_hw[1]
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own check cannot be told otherwise
    recent = recent and is_uri(uri)
    content = _find_recent(uri) if recent else None
    if content is None:
        content = _read(uri, None if whole else _HEAD_BYTES)
        if recent:
            _recent.put(uri, content)
            if shared is not None:
                shared.put(uri, content)
    if not whole and len(content) == _HEAD_BYTES and not _has_header(content):
        # the size may stand further back: TIFF keeps it anywhere, JPEG behind large EXIF and colour profiles
        content = _read(uri, None)
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            _check_size(image, image_hw, max_pixels)
            yield image, content
    except _Refused as error:
        raise ImageError(uri, str(error)) from None
    except Image.DecompressionBombError as error:
        raise ImageError(uri, f"{error} (data.max_image_pixels)") from None
    except Image.UnidentifiedImageError:
        raise ImageError(uri, f"not an image of a known format{_advice(uri)}") from None
    except Exception as error:  # decoders fail on hostile bytes with anything (SyntaxError, struct.error, ...)
        raise ImageError(uri, f"cannot be decoded ({type(error).__name__}: {error}){_advice(uri)}") from None


def _find_recent(uri: str) -> bytes | None:
    """The bytes of a file that this process, or another one of this node, has read before."""
    content = _recent.get(uri)
    if content is None and shared is not None and (content := shared.get(uri)) is not None:
        _recent.put(uri, content)
    return content


def _advice(uri: str) -> str:
    """What a user can do about a picture that is of none of the formats read here."""
    return ": convert it to JPEG or PNG" if uri.lower().endswith(UNREADABLE_SUFFIXES) else ""


def read_content(uri: str, num_bytes: int | None = None) -> bytes:
    """Reads the bytes of a file of one image, or the first of them.

    Raises:
        ImageError: the file is missing, or is not one.
        OSError: the file store failed.
    """
    try:
        return read_bytes(uri, num_bytes)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ImageError(uri, f"cannot be read ({type(error).__name__})") from None


def _read(uri: str, num_bytes: int | None) -> bytes:
    content = read_content(uri, num_bytes)
    if not content:
        raise ImageError(uri, "the file is empty")
    return content


def _has_header(content: bytes) -> bool:
    try:
        Image.open(io.BytesIO(content), formats=_FORMATS)
    except Exception as error:
        return isinstance(error, Image.DecompressionBombError)
    return True


class _Refused(Exception):
    pass


def _check_size(image: Image.Image, image_hw: tuple[int, int] | None, max_pixels: int) -> None:
    width, height = image.size
    if image_hw is None and width * height > max_pixels:
        raise _Refused(f"{width} x {height} pixels, at most {max_pixels} are read (data.max_image_pixels)")
    if image_hw is None or image_hw == (height, width):
        return
    reason = f"{width} x {height} pixels: expected {image_hw[1]} x {image_hw[0]}"
    if (width, height) == image_hw and image.getexif().get(_ORIENTATION) in _SIDEWAYS:
        reason += " (its EXIF orientation is not applied: annotations are in the coordinates of the stored pixels)"
    raise _Refused(reason)


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise _Refused("floating-point pixels have no known range; expected 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.size and (grey.min() < 0 or grey.max() > 65535):
            raise _Refused(f"grey values {grey.min()}..{grey.max()}; expected 16 bits, 0..65535")
        grey = (grey * 255 + 32767) // 65535
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
