"""Image files to RGB pixels, whatever their mode, with errors that name the file."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from cast_ray.datasets.paths import read_bytes

# EPS and friends run interpreters or open other files: only plain raster formats are tried.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")


def read_image(uri: str, max_pixels: int = 178_956_970) -> np.ndarray:
    """Reads one image file as RGB.

    Grey, palette and CMYK images are converted, an alpha channel is dropped, 16-bit grey is scaled from 0..65535 to
    0..255 (Pillow's own conversion clips it to white). EXIF orientation is not applied: COCO annotations are in the
    coordinates of the stored pixels. Of an animation the first frame is read.

    Args:
        uri: local path or any pyarrow.fs URI (s3://, gs://, file://).
        max_pixels: larger images are refused before they are decoded.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        ValueError: missing, empty, truncated, too large or not an image; the message names the file and the reason.
        OSError: the file store failed (worth another try, which a bad file is not).
    """
    try:
        content = read_bytes(uri)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{uri}: cannot be read ({type(error).__name__})") from None
    if not content:
        raise ValueError(f"{uri}: the file is empty")
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _TooLarge(f"{width} x {height} pixels, at most {max_pixels} are read")
            return _to_rgb(image)
    except _TooLarge as error:
        raise ValueError(f"{uri}: {error}") from None
    except Image.DecompressionBombError as error:  # Pillow's own limit, equal to the default of max_pixels
        raise ValueError(f"{uri}: {error}") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{uri}: not an image of a known format") from None
    except Exception as error:  # decoders fail on hostile bytes with anything (SyntaxError, struct.error, ...)
        raise ValueError(f"{uri}: cannot be decoded ({type(error).__name__}: {error})") from None


class _TooLarge(Exception):
    pass


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; expected 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.size and (grey.min() < 0 or grey.max() > 65535):
            raise ValueError(f"grey values {grey.min()}..{grey.max()}; expected 16 bits, 0..65535")
        grey = (grey * 255 + 32767) // 65535
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
