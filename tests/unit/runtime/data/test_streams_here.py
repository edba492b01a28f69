"""Streams of tables that this process holds: read without Ray, and the same as those of Ray Data (tests/ray)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from stream_scenes import CATEGORIES, DATA, assert_same, loop, write_images

from cast_ray.recipe import InputSize, RuntimeConfig
from cast_ray.runtime.data.images import Images
from cast_ray.runtime.data.pictures import read_pictures
from cast_ray.runtime.data.training_stream import SampleRules, StepShare, training_stream

NUM_IMAGES, NUM_LABELLED, STEPS = 11, 5, 9
SIZES = {"batch_labelled": 3, "batch_unlabelled": 2}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pa.Table:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("Ray is asked")

    for name in ("init", "put", "get"):
        monkeypatch.setattr(ray, name, refuse)
    return write_images(tmp_path, NUM_IMAGES)


@pytest.mark.parametrize("start", [0, 4])
def test_training_steps_are_the_loop_in_order(table: pa.Table, start: int) -> None:
    everything, labels = np.arange(NUM_IMAGES), table.slice(NUM_LABELLED)
    images = Images(table, everything[:NUM_LABELLED], everything[NUM_LABELLED:], CATEGORIES)
    # The last image could not be labelled: D_u is without it.
    positions = pa.array(range(NUM_IMAGES - NUM_LABELLED - 1))
    images = images.with_labels(labels.slice(0, len(positions)).append_column("position", positions))
    share = StepShare(steps=STEPS, seed=5, start_step=start, **SIZES)
    found = list(training_stream(images, DATA, RuntimeConfig(), share, SampleRules(strong=True)))
    truth = labels.column("instances").to_pylist()[:-1]
    lists = everything[:NUM_LABELLED], everything[NUM_LABELLED:-1]
    wanted = loop(table, *lists, truth, DATA, steps=STEPS, seed=5, **SIZES)[start:]
    assert len(found) == len(wanted) == STEPS - start
    for mine, theirs in zip(found, wanted):
        assert_same(mine, theirs)


def test_pictures_come_in_blocks_with_the_bad_ones_named(table: pa.Table) -> None:
    uris = table.column("uri").to_pylist()
    Path(uris[6]).write_bytes(b"no image")
    rows, size = np.array([8, 6, 0, 3]), InputSize("fit", (12, 16))
    blocks = list(read_pictures(table, rows, size, RuntimeConfig(), [(0, 2), (2, 4)], skip_bad=True))
    assert [block.positions for block in blocks] == [[0], [2, 3]]
    assert [int(pixels.max()) for block in blocks for pixels in block.pixels] == [8, 0, 3]
    ((position, reason),) = blocks[0].bad
    assert position == 1 and uris[6] in reason
    with pytest.raises(ValueError, match=r"image 6\.png"):
        list(read_pictures(table, rows, size, RuntimeConfig()))
