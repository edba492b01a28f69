"""Label Studio's run lengths, against what its own SDK writes (`tests/data/annotation_tools`)."""

from __future__ import annotations

import json
from pathlib import Path

import annotation_scenes
import numpy as np
import pytest

from cast_ray.annotation.brush import decode_brush, encode_brush

EXPORT = Path(__file__).parents[2] / "data/annotation_tools/label-studio/export.json"


def regions() -> dict[str, list[int]]:
    tasks = json.loads(EXPORT.read_text())
    results = [result for task in tasks for result in task["annotations"][0]["result"]]
    return {result["id"]: result["value"]["rle"] for result in results}


def test_what_the_sdk_writes_is_read() -> None:
    found, drawn = regions(), annotation_scenes.masks()
    for number in (1, 2, 4):
        _, _, mask = drawn[number - 1]
        assert (decode_brush(found[f"object-{number}"], *mask.shape) == mask).all()


def test_blocks_of_single_values_are_read() -> None:
    """Label Studio's page writes them where values change often; the SDK too, in other sizes of counts."""
    bits = f"{8:032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}" + f"0{0:02b}{3:03b}" + "0" * 24 + "1" * 8
    bits += f"1{1:02b}{3:04b}{0:08b}"
    content = [int(bits[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(bits), 8)]
    assert decode_brush(content, 1, 2).tolist() == [[True, False]]


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (300, 400)])
def test_masks_come_back(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    for mask in (rng.random(size) > 0.5, np.ones(size, bool), np.zeros(size, bool)):
        assert (decode_brush(encode_brush(mask), *size) == mask).all()


@pytest.mark.parametrize(
    ("rle", "reason"),
    [
        ([], "no list of bytes"),
        ([1, 2, 300], "no list of bytes"),
        ("abc", "no list of bytes"),
        (encode_brush(np.ones((4, 6), bool))[:-1], "cut off"),
        (encode_brush(np.ones((6, 6), bool)), "brush RLE of 36 pixels: expected 6 x 4"),
    ],
)
def test_what_is_no_brush_mask_is_named(rle: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_brush(rle, 4, 6)
