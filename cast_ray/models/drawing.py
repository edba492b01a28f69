"""Instances drawn on their image: contour, light fill, class and score."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

FILL_OPACITY = 0.28
DARK = 20


def class_colours(num_classes: int) -> list[tuple[int, int, int]]:
    """One well-separated colour per class: steps of the golden angle round the hue circle, alternating brightness."""
    colours = []
    for i in range(num_classes):
        r, g, b = colorsys.hsv_to_rgb((0.02 + i * 0.618034) % 1.0, (0.95, 0.75)[i // 5 % 2], (1.0, 0.85)[i // 3 % 2])
        colours.append((round(255 * r), round(255 * g), round(255 * b)))
    return colours


def draw_instances(
    picture: Image.Image,
    instances: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
    mask_size: tuple[int, int] | None = None,
) -> Image.Image:
    """A copy of an RGB picture with instances on it, the surest on top.

    Args:
        picture: RGB.
        instances: each with `rle` (COCO compressed counts: bytes, str, or a dict with `counts`), `label` in 0..C-1 and
            optionally `score` in 0..1.
        class_names, colours: C each.
        mask_size: width and height of the masks, where the picture was resized; None: the picture's own.

    Raises:
        ValueError: a label outside the class list, or an RLE of another size.
    """
    pixels = np.asarray(picture).astype(np.float32)
    labels = []
    for instance in sorted(instances, key=lambda i: float(i.get("score", 1.0))):
        label = int(instance["label"])
        if not 0 <= label < len(class_names):
            raise ValueError(f"label {label} outside the {len(class_names)} classes")
        mask = _decode(instance, mask_size or picture.size)
        if mask_size not in (None, picture.size):
            mask = np.asarray(Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST))
        if not mask.any():
            continue
        _draw_mask(pixels, mask, colours[label])
        ys, xs = np.nonzero(mask)
        score = instance.get("score")
        text = class_names[label] + (f" {score:.2f}" if score is not None else "")
        labels.append((text, int(xs.mean()), (int(ys.min()), int(ys.mean()), int(ys.max())), colours[label]))
    drawn = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    _draw_labels(drawn, labels)
    return drawn


def _draw_mask(pixels: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Fill and contour, in place; only the instance's own window is touched, or large pictures would take seconds."""
    from scipy import ndimage  # slow to load, and most commands find their pictures drawn

    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    window = (slice(max(rows[0] - 1, 0), rows[-1] + 2), slice(max(columns[0] - 1, 0), columns[-1] + 2))
    inside, part = mask[window], pixels[window]
    part[inside] += FILL_OPACITY * (np.array(colour, np.float32) - part[inside])
    # one dark pixel outside the coloured edge: the contour shows on any background
    part[ndimage.binary_dilation(inside) & ~inside] = DARK
    # what the picture's edge cuts off has no contour there
    part[inside & ~ndimage.binary_erosion(inside, border_value=1)] = colour


def _decode(instance: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    rle = instance["rle"]
    if isinstance(rle, Mapping):
        height, width = rle.get("size", (size[1], size[0]))
        if (height, width) != (size[1], size[0]):
            raise ValueError(f"an RLE of {height}x{width} on an image of {size[1]}x{size[0]}")
        rle = rle["counts"]
    counts = rle.encode() if isinstance(rle, str) else bytes(rle)
    return coco_mask.decode({"size": [size[1], size[0]], "counts": counts}).astype(bool)


def _draw_labels(
    picture: Image.Image, labels: Sequence[tuple[str, int, tuple[int, int, int], tuple[int, int, int]]]
) -> None:
    """Writes (text, x, top and middle and bottom y, colour) at the middle of its instance, above a small one.

    Where it would cover another label it moves down or up.
    """
    draw = ImageDraw.Draw(picture)
    face = font(12 if picture.width >= 160 else 9)
    taken: list[tuple[int, int, int, int]] = []
    for text, x, (highest, middle, lowest), colour in reversed(labels):  # the surest keeps its place
        left, top, right, bottom = draw.textbbox((0, 0), text, font=face)
        width, height = int(right - left) + 5, int(bottom - top) + 4
        y = middle if lowest - highest > 4 * height else highest - height // 2 - 2
        x0 = min(max(x - width // 2, 0), max(picture.width - width, 0))
        room = max(picture.height - height, 0)
        tries = [min(max(y - height // 2 + sign * k * (height + 1), 0), room) for k in range(12) for sign in (1, -1)]
        boxes = [(x0, y0, x0 + width, y0 + height) for y0 in tries]
        place = next((b for b in boxes if not any(_overlap(b, t) for t in taken)), boxes[0])
        taken.append(place)
        draw.rectangle(place, fill=(DARK, DARK, DARK), outline=colour)
        draw.text((place[0] + 3 - left, place[1] + 2 - top), text, fill=(255, 255, 255), font=face)


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of every picture."""
    return ImageFont.load_default(size_px)
