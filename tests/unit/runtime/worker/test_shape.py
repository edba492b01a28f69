"""What a segment's worker group must share with others, and how many devices it holds for the budget."""

from __future__ import annotations

from typing import Any

import pytest

from cast_ray.plan.graph import plan
from cast_ray.recipe import build_recipe
from cast_ray.runtime.worker.segment import Segment
from cast_ray.runtime.worker.shape import devices_of, shape_of

ONLINE = {"labels.mode": "online", "runtime.num_labellers": "2"}
VALIDATED = {"evaluation.every_steps": "2"}
ON_GPU = {"runtime.use_gpu": "true"}


def segment(settings: dict[str, str], *names: str) -> Segment:
    """The named stages of a row with these settings."""
    recipe = build_recipe("shapes", "smoke", overrides=settings)
    stages = [stage for stage in plan(recipe, "0" * 64).stages if stage.name in names]
    assert len(stages) == len(names)
    parts: Any = {"store": None, "broker": None, "categories": (), "images": {}, "val": None}
    return Segment(owner="row", sweep="run", stages=stages, recipe=recipe, num_val=0, requested=0.0, **parts)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1),
        ({"runtime.num_workers": "2"}, 2),
        (ONLINE, 3),
        (VALIDATED, 2),
        (ONLINE | VALIDATED | {"runtime.num_workers": "2"}, 5),
        (ON_GPU | ONLINE | VALIDATED, 4),
        # The validator computes on CPUs, and GPUs are what is paid for.
        (ON_GPU | ONLINE | VALIDATED | {"runtime.validate_on_gpu": "false"}, 3),
    ],
)
def test_devices_of_teachers_and_of_validation_count(settings: dict[str, str], expected: int) -> None:
    assert devices_of(segment(settings, "distill")) == expected


def test_stages_that_need_neither_hold_the_workers_devices_alone() -> None:
    supervised = segment(ONLINE | ON_GPU, "pretrain")
    assert devices_of(supervised) == 1 and shape_of(supervised) == supervised.recipe.runtime
    both = segment(ONLINE | ON_GPU, "pretrain", "distill")
    assert devices_of(both) == 3 and shape_of(both) is None  # teachers belong to the group, whichever stage needs them
