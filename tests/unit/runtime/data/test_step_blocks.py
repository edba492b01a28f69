"""Plans of training streams without Ray: blocks, groups that fill a teacher's pass, which teacher labels which step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from cast_ray.plan.graph import Stage
from cast_ray.recipe import DataConfig
from cast_ray.runtime.data.images import Images
from cast_ray.runtime.data.training_stream import SampleRules, StepSchedule, step_blocks
from cast_ray.runtime.worker.online import OnlineLabels, version_of, versions_from


@pytest.mark.parametrize(("num_steps", "max_size"), [(1, 1), (1, 8), (7, 1), (7, 2), (100, 8), (1000, 32)])
def test_blocks_cover_the_steps_in_order_and_grow(num_steps: int, max_size: int) -> None:
    blocks = step_blocks(0, num_steps, max_size)
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(num_steps))
    sizes = [stop - start for start, stop in blocks]
    assert sizes[0] == 1 and max(sizes) <= max_size
    assert all(after <= 2 * before for before, after in pairwise(sizes))


@pytest.mark.parametrize("window", [1, 3, 4, 10])
@pytest.mark.parametrize("start_step", [0, 1, 6, 9])
def test_no_block_waits_for_weights_that_come_from_its_own_steps(window: int, start_step: int) -> None:
    """A block is handed on as a whole, so what its last step needs must be published before its first."""
    blocks = step_blocks(start_step, 40, 8, window)
    assert [start_step + row for start, stop in blocks for row in range(start, stop)] == list(range(start_step, 40))
    for start, stop in blocks:
        published_after = version_of(start_step + stop - 1, window) * window
        assert published_after <= start_step + start


def plan_of(share: int, batch: int, refresh_steps: int, first_step: int = 0, steps: int = 40) -> StepSchedule:
    stage = Stage("label", "label", {"batch": batch, "data": {"image_px": [8, 8]}}, {}, "f")
    none: Any = None
    images = Images(none, np.arange(4), np.arange(9), ())
    slots = np.zeros((steps, share), dtype=np.int64)
    online = OnlineLabels(stage, (), None, refresh_steps) if batch else None
    return StepSchedule(images, DataConfig(), 0, slots, slots, first_step, (0, 0), SampleRules(strong=False), online)


@pytest.mark.parametrize(
    ("share", "batch", "sizes"), [(2, 0, [1] * 6), (2, 8, [4, 2]), (3, 8, [3, 3]), (8, 8, [1] * 6), (9, 8, [1] * 6)]
)
def test_steps_are_read_together_until_a_pass_is_full(share: int, batch: int, sizes: list[int]) -> None:
    groups = list(plan_of(share, batch, refresh_steps=0).groups(5, 11))
    assert [row for group in groups for row in group] == list(range(5, 11))
    assert [len(group) for group in groups] == sizes


def test_a_group_has_one_teacher() -> None:
    plan = plan_of(1, 8, refresh_steps=5, first_step=7)
    groups = list(plan.groups(0, 20))
    assert [row for group in groups for row in group] == list(range(20))
    for group in groups:
        assert len({version_of(7 + row, 5) for row in group}) == 1


def test_a_window_is_labelled_by_weights_one_window_older_than_its_start() -> None:
    assert [version_of(step, 3) for step in range(13)] == [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert {version_of(step, 0) for step in range(100)} == {0}


@pytest.mark.parametrize("refresh_steps", [1, 3, 10])
def test_no_label_waits_for_a_step_that_waits_for_it(refresh_steps: int) -> None:
    """Weights of version v exist after step v * N, so steps up to there must need older ones only."""
    for step in range(50):
        published = version_of(step, refresh_steps) * refresh_steps
        assert published <= max(0, step - refresh_steps)


@pytest.mark.parametrize("start", range(0, 40, 3))
def test_a_resumed_stage_publishes_what_its_next_steps_need(start: int) -> None:
    kept = {0, *versions_from(start, 5)}
    for step in range(start, 60):
        if step % 5 == 0 and step > start:
            kept.add(step // 5)  # published when that many steps are done
        assert version_of(step, 5) in kept
