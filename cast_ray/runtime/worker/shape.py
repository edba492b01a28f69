"""What a worker group must be started with to run a segment."""

from __future__ import annotations

from cast_ray.recipe import RuntimeConfig
from cast_ray.runtime.worker.segment import Segment
from cast_ray.runtime.worker.validation import validation_bundles


def shape_of(segment: Segment) -> RuntimeConfig | None:
    """Returns the settings that segments must share to run in one worker group.

    None: the segment needs a group that no other one can use, with online teachers or validation beside training, whose
    actors belong to it.
    """
    beside = validation_bundles(segment.recipe, segment.stages)
    is_alone = bool(beside) or any(stage.online for stage in segment.stages)
    return None if is_alone else segment.recipe.runtime
