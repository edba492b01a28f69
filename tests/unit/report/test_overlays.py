"""Contact sheets of images with the masks of truth, teacher and student on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from cast_ray.models.drawing import class_colours
from cast_ray.report.overlays import contact_sheet


def rle_of(mask: np.ndarray) -> bytes:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]


def disc(size: int, y: int, x: int, radius: int) -> np.ndarray:
    ys, xs = np.mgrid[:size, :size]
    return (ys - y) ** 2 + (xs - x) ** 2 <= radius**2


def test_contact_sheet_draws_each_class_in_its_colour(tmp_path: Path) -> None:
    image = np.full((64, 64, 3), 128, np.uint8)
    truth = [{"rle": rle_of(disc(64, 20, 20, 12)), "label": 0}, {"rle": rle_of(disc(64, 45, 45, 12)), "label": 1}]
    guess = [{"rle": {"size": [64, 64], "counts": rle_of(disc(64, 20, 20, 12)).decode()}, "label": 1, "score": 0.87}]
    path = contact_sheet(
        [image, image],
        [("ground truth", [truth, truth]), ("student", [guess, []])],
        ["disc", "cross"],
        tmp_path / "s.png",
    )
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[1] == 3 * 256 + 4 * 6
    first, second = class_colours(2)

    def holds(panel: int, colour: tuple[int, int, int], row: int = 0) -> bool:
        area = sheet[26 + row * 262 : 26 + row * 262 + 256, 6 + panel * 262 : 6 + panel * 262 + 256]
        return bool((area == colour).all(-1).any())

    assert not holds(0, first) and not holds(0, second)
    assert holds(1, first) and holds(1, second)
    assert not holds(2, first) and holds(2, second)
    assert not holds(2, second, row=1)


def test_contact_sheet_shrinks_photographs(tmp_path: Path) -> None:
    photo = np.zeros((480, 640, 3), np.uint8)
    mask = np.zeros((480, 640), bool)
    mask[100:200, 100:300] = True
    path = contact_sheet(
        [photo],
        [("truth", [[{"rle": rle_of(mask), "label": 70, "score": 1.0}]])],
        [f"c{i}" for i in range(80)],
        tmp_path / "s.png",
    )
    assert Image.open(path).width == 2 * 420 + 3 * 6


def test_colours_of_many_classes_differ() -> None:
    assert len(set(class_colours(80))) == 80


def test_contact_sheet_refuses_what_does_not_fit(tmp_path: Path) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    mask = rle_of(np.ones((8, 8)))
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([], [], ["a"], tmp_path / "s.png")
    with pytest.raises(ValueError, match="'truth' has 2 entries for 1 images"):
        contact_sheet([image], [("truth", [[], []])], ["a"], tmp_path / "s.png")
    with pytest.raises(ValueError, match="label 3 outside the 1 classes"):
        contact_sheet([image], [("truth", [[{"rle": mask, "label": 3}]])], ["a"], tmp_path / "s.png")
    with pytest.raises(ValueError, match="RLE of 9x8 on an image of 8x8"):
        bad = {"rle": {"size": [9, 8], "counts": mask}, "label": 0}
        contact_sheet([image], [("truth", [[bad]])], ["a"], tmp_path / "s.png")
