"""One drawn scene of the embedded experiment: shapes in a source or a target style, scattered or crowded."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

DRAWING_VERSION = 1
"""Part of the manifest: raise it with any change to what is drawn."""

CATEGORIES: tuple[tuple[int, str], ...] = ((1, "disc"), (2, "triangle"), (4, "square"), (7, "cross"))


@dataclass(frozen=True)
class Layout:
    """What a scene holds and how it lies there; lengths in pixels, hues in turns, ranges without their upper end."""

    scene_px: int
    categories: tuple[tuple[int, str], ...]
    num_instances: tuple[int, int]
    radius_px: tuple[float, float]
    hue_sigma: float
    min_visible_px: int
    """An instance of which less stays visible is not listed."""
    is_touching: bool = False
    """Each shape touches one before it; else most lie anywhere and some near the one before."""


LAYOUTS = {
    "scattered": Layout(64, CATEGORIES, (2, 6), (7, 15), 0.1, 12),
    # Few large objects of one class and colour that touch: much of an image is the object that a pixel lies in, and
    # neither class nor colour tells two of them apart.
    "crowded": Layout(128, CATEGORIES[:1], (4, 7), (26, 38), 0.02, 48, is_touching=True),
}


@dataclass(frozen=True)
class Style:
    """Appearance of a scene; hues in turns, the rest as shares of full intensity."""

    hue_shift: float
    texture_probability: float
    texture_strength: float
    background_strength: float
    light_strength: float
    noise_sigma: tuple[float, float]


STYLES = {
    "source": Style(0.08, 0.4, 0.18, 0.0, 0.0, (0.0, 0.015)),
    "target": Style(0.0, 1.0, 0.38, 0.14, 0.4, (0.03, 0.08)),
}


def draw_scene(
    style: Style, seed: np.random.SeedSequence, layout: Layout = LAYOUTS["scattered"]
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draws one scene of H x W = `layout.scene_px` squared. Later shapes cover earlier ones.

    Args:
        style: a value of `STYLES`.
        seed: with style and layout, all that the scene depends on.
        layout: a value of `LAYOUTS`.

    Returns:
        uint8 [H, W, 3] RGB, and for each instance its category id and the bool [H, W] mask of its visible part.
    """
    rng = np.random.default_rng(seed)
    size = layout.scene_px
    canvas = _background(style, size, rng)
    num_instances = int(rng.integers(*layout.num_instances))
    owner = np.full((size, size), -1, dtype=np.int8)
    kinds = rng.integers(0, len(layout.categories), num_instances)
    centre = rng.uniform(10, size - 10, 2)
    placed: list[tuple[np.ndarray, float]] = []
    for index, kind in enumerate(kinds):
        radius = rng.uniform(*layout.radius_px)
        if layout.is_touching:
            centre = _beside_one(placed, radius, size, rng)
        elif index and rng.random() < 0.4:  # near the one before: occlusion in most scenes
            centre = np.clip(centre + rng.normal(0, 9, 2), 6, size - 6)
        else:
            centre = rng.uniform(8, size - 8, 2)
        placed.append((centre, radius))
        distance, across, along = _signed_distance(int(kind), centre, radius, size, rng)
        coverage = np.clip(0.5 - distance, 0, 1)[:, :, None]  # one pixel of anti-aliasing
        colour = _fill(int(kind), style, layout, across, along, rng)
        canvas = canvas * (1 - coverage) + colour * coverage
        owner[distance < 0] = index
    canvas = _light(canvas, style, rng)
    canvas += rng.normal(0, rng.uniform(*style.noise_sigma), canvas.shape)
    image = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    visible = [(layout.categories[kind][0], owner == index) for index, kind in enumerate(kinds)]
    return image, [(category, mask) for category, mask in visible if mask.sum() >= layout.min_visible_px]


@cache
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the centres of all pixels, [size, size] each."""
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float64) + 0.5
    return rows, columns


def _beside_one(
    placed: Sequence[tuple[np.ndarray, float]], radius: float, size: int, rng: np.random.Generator
) -> np.ndarray:
    """A centre from which a shape overlaps an earlier one a little; of several tries the one with most free room."""
    if not placed:
        return rng.uniform(0.3 * size, 0.7 * size, 2)
    best, best_room = np.zeros(2), -np.inf
    for _ in range(12):
        centre, other = placed[int(rng.integers(len(placed)))]
        turn = rng.uniform(0, 2 * np.pi)
        tried = centre + rng.uniform(0.8, 0.95) * (radius + other) * np.array([np.cos(turn), np.sin(turn)])
        tried = np.clip(tried, 0.5 * radius, size - 0.5 * radius)
        room = min(float(np.hypot(*(tried - at))) / (radius + its) for at, its in placed)
        if room > best_room:
            best, best_room = tried, room
    return best


def _signed_distance(
    kind: int, centre: np.ndarray, radius: float, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance to the shape's outline in pixels (negative inside), and coordinates along the shape's own axes."""
    turn = rng.uniform(0, 2 * np.pi)
    rows, columns = _grid(size)
    y, x = rows - centre[0], columns - centre[1]
    u, v = np.cos(turn) * x + np.sin(turn) * y, -np.sin(turn) * x + np.cos(turn) * y
    name = CATEGORIES[kind][1]
    if name == "disc":
        distance = np.hypot(u, v) - radius
    elif name == "square":
        distance = np.maximum(np.abs(u), np.abs(v)) - 0.85 * radius
    elif name == "triangle":
        slope = np.sqrt(3) / 2
        distance = np.maximum(-v, np.maximum(slope * u + v / 2, -slope * u + v / 2)) - 0.6 * radius
    else:
        arm = 0.36 * radius
        long, short = np.maximum(np.abs(u), np.abs(v)) - radius, np.minimum(np.abs(u), np.abs(v)) - arm
        distance = np.maximum(long, short)
    return distance, u, v


def _fill(
    kind: int, style: Style, layout: Layout, across: np.ndarray, along: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    hue = kind / len(CATEGORIES) + style.hue_shift + rng.normal(0, layout.hue_sigma)
    colour = np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.5, 0.95), rng.uniform(0.55, 0.95)))
    fill = np.broadcast_to(colour, (*across.shape, 3))
    if rng.random() >= style.texture_probability:
        return fill
    if rng.random() < 0.6:
        texture = np.sin(2 * np.pi * across / rng.uniform(3.5, 8) + rng.uniform(0, 2 * np.pi))
        if rng.random() < 0.5:
            texture = texture * np.sin(2 * np.pi * along / rng.uniform(3.5, 8))
    else:
        texture = _clouds(16, len(across), rng)
    return fill * (1 + style.texture_strength * texture[:, :, None])


def _background(style: Style, size: int, rng: np.random.Generator) -> np.ndarray:
    ends = np.array([colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.3), rng.uniform(0.25, 0.75)) for _ in range(2)])
    share = _ramp(size, rng)[:, :, None]
    canvas = ends[0] * (1 - share) + ends[1] * share
    if style.background_strength:
        canvas = canvas + style.background_strength * _clouds(8, size, rng)[:, :, None]
    return canvas


def _light(canvas: np.ndarray, style: Style, rng: np.random.Generator) -> np.ndarray:
    if not style.light_strength:
        return canvas
    return canvas * (1 + style.light_strength * (_ramp(len(canvas), rng)[:, :, None] * 2 - 1.2))


def _ramp(size: int, rng: np.random.Generator) -> np.ndarray:
    """A linear gradient from 0 to 1 across the scene in a random direction."""
    turn = rng.uniform(0, 2 * np.pi)
    rows, columns = _grid(size)
    ramp = np.cos(turn) * columns + np.sin(turn) * rows
    return (ramp - ramp.min()) / (ramp.max() - ramp.min())


def _clouds(cells: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise in about -1..1 with so many cells a side."""
    grid = rng.uniform(-1, 1, (cells + 1, cells + 1))
    position = (np.arange(size) + 0.5) * cells / size
    low, share = position.astype(int), position % 1
    rows = grid[low] * (1 - share)[:, None] + grid[low + 1] * share[:, None]
    return rows[:, low] * (1 - share) + rows[:, low + 1] * share
