"""Contact sheets: each image beside its ground truth, its pseudo-labels and the student's answer, as one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from cast_ray.models.drawing import class_colours, draw_instances, font
from cast_ray.report.markup import one_line

CONTACT_SHEET = "samples.png"
"""Where a run folder keeps its sheet; the report shows a file of this name."""
GAP_PX = 6
HEADER_PX = 26
MAX_CELL_PX = 420
MAX_LEGEND = 12
PAPER = (250, 250, 250)
INK = (25, 25, 25)


def contact_sheet(
    images: Sequence[np.ndarray],
    columns: Sequence[tuple[str, Sequence[Sequence[Mapping[str, Any]]]]],
    class_names: Sequence[str],
    path: str | Path,
    upscale: int = 4,
) -> Path:
    """Writes one PNG with a row per image: the image, then one panel per column with its instances drawn on it.

    Args:
        images: uint8 [H, W, 3] each, sizes may differ.
        columns: (title, per image its instances); an instance has `rle` (COCO compressed counts at the image's height
            x width: bytes, str, or a dict with `counts`), `label` in 0..C-1 and optionally `score` in 0..1.
        class_names: C names.
        path: PNG to write.
        upscale: whole factor for small images; lowered where a panel would pass 420 px, and larger images shrink to it.

    Returns:
        the path.

    Raises:
        ValueError: no image, a column of another length, a label outside the class list, or an RLE of another size.
    """
    if not images:
        raise ValueError("contact sheet: expected at least one image, got none")
    for title, per_image in columns:
        if len(per_image) != len(images):
            raise ValueError(f"contact sheet: column {title!r} has {len(per_image)} entries for {len(images)} images")
    panels = [
        draw_panels(image, [per_image[i] for _, per_image in columns], class_names, upscale)
        for i, image in enumerate(images)
    ]
    sheet = _assemble(panels, ["image", *(title for title, _ in columns)])
    drawn = {int(instance["label"]) for _, per_image in columns for each in per_image for instance in each}
    # eighty classes would bury the few that are on the sheet
    shown = range(len(class_names)) if len(class_names) <= MAX_LEGEND else sorted(drawn)
    colours = class_colours(len(class_names))
    _draw_legend(sheet, [one_line(class_names[i]) for i in shown], [colours[i] for i in shown]).save(path)
    return Path(path)


def draw_panels(
    image: np.ndarray,
    answers: Sequence[Sequence[Mapping[str, Any]]],
    class_names: Sequence[str],
    upscale: int = 4,
    max_px: int = MAX_CELL_PX,
) -> list[Image.Image]:
    """The image, then once more for each answer with its instances drawn on it; see `contact_sheet`."""
    base = Image.fromarray(np.ascontiguousarray(image)).convert("RGB")
    size = _panel_size(base.size, upscale, max_px)
    # nearest: a 64 px image stays what the model saw, instead of a blur
    plain = base.resize(size, Image.Resampling.NEAREST if size[0] >= base.size[0] else Image.Resampling.LANCZOS)
    colours = class_colours(len(class_names))
    return [plain, *(draw_instances(plain, instances, class_names, colours, base.size) for instances in answers)]


def _panel_size(size: tuple[int, int], upscale: int, max_px: int) -> tuple[int, int]:
    longest = max(size)
    factor = max(1, min(upscale, max_px // longest)) if longest <= max_px else max_px / longest
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _assemble(panels: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    column_width = max(p.width for row in panels for p in row)
    row_heights = [max(p.height for p in row) for row in panels]
    width = GAP_PX + len(titles) * (column_width + GAP_PX)
    sheet = Image.new("RGB", (width, HEADER_PX + sum(h + GAP_PX for h in row_heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles):
        draw.text((GAP_PX + i * (column_width + GAP_PX), 6), title, fill=INK, font=font(14))
    y = HEADER_PX
    for row, height in zip(panels, row_heights):
        for i, panel in enumerate(row):
            sheet.paste(panel, (GAP_PX + i * (column_width + GAP_PX), y))
        y += height + GAP_PX
    return sheet


def _draw_legend(
    sheet: Image.Image, class_names: Sequence[str], colours: Sequence[tuple[int, int, int]]
) -> Image.Image:
    """The sheet with the classes' colours below, wrapped into lines."""
    small, line_px = font(12), 20
    entries, x, y = [], GAP_PX, sheet.height
    for name, colour in zip(class_names, colours):
        entry_px = 20 + int(small.getlength(name)) + 12
        if x + entry_px > sheet.width and x > GAP_PX:
            x, y = GAP_PX, y + line_px
        entries.append((name, colour, x, y))
        x += entry_px
    full = Image.new("RGB", (sheet.width, (entries[-1][3] if entries else sheet.height) + line_px + 4), PAPER)
    full.paste(sheet)
    draw = ImageDraw.Draw(full)
    for name, colour, left, top in entries:
        draw.rectangle((left, top + 2, left + 13, top + 15), fill=colour, outline=INK)
        draw.text((left + 19, top + 2), name, fill=INK, font=small)
    return full
