"""What a worker group must be started with to run a segment, and how many devices this takes."""

from __future__ import annotations

from cast_ray.recipe import RuntimeConfig
from cast_ray.runtime.data.resources import labeller_bundle, num_devices, num_teachers, worker_bundle
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


def devices_of(segment: Segment, num_workers: int | None = None) -> int:
    """Returns how many devices a segment holds while it runs: of its workers, of the teachers that label online for it,
    and of validation beside its training.

    Args:
        num_workers: that it has now, which an elastic run may change; None: all that it may have.
    """
    runtime = segment.recipe.runtime
    validators = validation_bundles(segment.recipe, segment.stages)[1:]  # the first is a stream's, without a model
    teachers = num_teachers(runtime) if any(stage.online for stage in segment.stages) else 0
    workers = [worker_bundle(runtime)] * (num_workers or runtime.num_workers)
    return num_devices(runtime, [*workers, *validators, *[labeller_bundle(runtime)] * teachers])
