"""One drawn scene of the embedded experiment: four shapes that overlap, in a source or a target style."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

SCENE_PX = 64
DRAWING_VERSION = 1
"""Part of the manifest: raise it with any change to what is drawn."""

CATEGORIES: tuple[tuple[int, str], ...] = ((1, "disc"), (2, "triangle"), (4, "square"), (7, "cross"))
HUE_SIGMA = 0.1
MIN_VISIBLE_PX = 12
_ROWS, _COLUMNS = np.mgrid[0:SCENE_PX, 0:SCENE_PX].astype(np.float64) + 0.5


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


def draw_scene(style: Style, seed: np.random.SeedSequence) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draws one scene.

    Later shapes cover earlier ones; an instance of which fewer than `MIN_VISIBLE_PX` stay visible is not listed.

    Args:
        style: a value of `STYLES`.
        seed: the scene depends on nothing else.

    Returns:
        uint8 [64, 64, 3] RGB, and for each instance its category id and the bool [64, 64] mask of its visible part.
    """
    rng = np.random.default_rng(seed)
    canvas = _background(style, rng)
    num_instances = int(rng.integers(2, 6))
    owner = np.full((SCENE_PX, SCENE_PX), -1, dtype=np.int8)
    kinds = rng.integers(0, len(CATEGORIES), num_instances)
    centre = rng.uniform(10, SCENE_PX - 10, 2)
    for index, kind in enumerate(kinds):
        radius = rng.uniform(7, 15)
        if index and rng.random() < 0.4:  # near the one before: occlusion in most scenes
            centre = np.clip(centre + rng.normal(0, 9, 2), 6, SCENE_PX - 6)
        else:
            centre = rng.uniform(8, SCENE_PX - 8, 2)
        distance, across, along = _signed_distance(int(kind), centre, radius, rng)
        coverage = np.clip(0.5 - distance, 0, 1)[:, :, None]  # one pixel of anti-aliasing
        colour = _fill(int(kind), style, across, along, rng)
        canvas = canvas * (1 - coverage) + colour * coverage
        owner[distance < 0] = index
    canvas = _light(canvas, style, rng)
    canvas += rng.normal(0, rng.uniform(*style.noise_sigma), canvas.shape)
    image = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    visible = [(CATEGORIES[kind][0], owner == index) for index, kind in enumerate(kinds)]
    return image, [(category, mask) for category, mask in visible if mask.sum() >= MIN_VISIBLE_PX]


def _signed_distance(
    kind: int, centre: np.ndarray, radius: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance to the shape's outline in pixels (negative inside), and coordinates along the shape's own axes."""
    turn = rng.uniform(0, 2 * np.pi)
    y, x = _ROWS - centre[0], _COLUMNS - centre[1]
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


def _fill(kind: int, style: Style, across: np.ndarray, along: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    hue = kind / len(CATEGORIES) + style.hue_shift + rng.normal(0, HUE_SIGMA)
    colour = np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.5, 0.95), rng.uniform(0.55, 0.95)))
    fill = np.broadcast_to(colour, (SCENE_PX, SCENE_PX, 3))
    if rng.random() >= style.texture_probability:
        return fill
    if rng.random() < 0.6:
        texture = np.sin(2 * np.pi * across / rng.uniform(3.5, 8) + rng.uniform(0, 2 * np.pi))
        if rng.random() < 0.5:
            texture = texture * np.sin(2 * np.pi * along / rng.uniform(3.5, 8))
    else:
        texture = _clouds(16, rng)
    return fill * (1 + style.texture_strength * texture[:, :, None])


def _background(style: Style, rng: np.random.Generator) -> np.ndarray:
    ends = np.array([colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.3), rng.uniform(0.25, 0.75)) for _ in range(2)])
    share = _ramp(rng)[:, :, None]
    canvas = ends[0] * (1 - share) + ends[1] * share
    if style.background_strength:
        canvas = canvas + style.background_strength * _clouds(8, rng)[:, :, None]
    return canvas


def _light(canvas: np.ndarray, style: Style, rng: np.random.Generator) -> np.ndarray:
    return canvas * (1 + style.light_strength * (_ramp(rng)[:, :, None] * 2 - 1.2)) if style.light_strength else canvas


def _ramp(rng: np.random.Generator) -> np.ndarray:
    """A linear gradient from 0 to 1 across the scene in a random direction."""
    turn = rng.uniform(0, 2 * np.pi)
    ramp = np.cos(turn) * _COLUMNS + np.sin(turn) * _ROWS
    return (ramp - ramp.min()) / (ramp.max() - ramp.min())


def _clouds(cells: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise in about -1..1 with so many cells a side."""
    grid = rng.uniform(-1, 1, (cells + 1, cells + 1))
    position = (np.arange(SCENE_PX) + 0.5) * cells / SCENE_PX
    low, share = position.astype(int), position % 1
    rows = grid[low] * (1 - share)[:, None] + grid[low + 1] * share[:, None]
    return rows[:, low] * (1 - share) + rows[:, low + 1] * share
