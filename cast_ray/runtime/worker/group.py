"""Ray Train: consecutive stages of a row run in one worker group.

Starting a worker group costs more than a small stage, so a *segment* - train, label and evaluate stages whose inputs
exist or are made by the segment itself - shares one. Each stage is committed to the store as soon as it is done, so
rows that wait for it go on while the segment does.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError
from ray.util.placement_group import PlacementGroup

from cast_ray.common.paths import in_few_requests
from cast_ray.runtime.data.resources import reserve, stream_bundle, worker_bundle
from cast_ray.runtime.ray_internals import is_startup_timeout
from cast_ray.runtime.worker.online import Teachers, start_teachers, teacher_bundles
from cast_ray.runtime.worker.segment import Segment, SegmentFailed
from cast_ray.runtime.worker.validation import validation_bundles

ROOM_LOOK_S = 30.0


def run_segment(segment: Segment) -> None:
    """Runs a segment's stages through a TorchTrainer; returns when all are committed, or no further one may start.

    Workers that die are restarted up to `runtime.max_failures` times; a stage then continues from its last checkpoint.

    Raises:
        SegmentFailed: a stage raised an error that restarts cannot mend; not retried.
        ray.train.TrainingFailedError: the workers failed more often than that.
    """
    runtime = segment.recipe.runtime
    # A name of its own: an interrupted run of the same stages may still be going down.
    run_name = f"{segment.stages[0].fingerprint[:8]}-{segment.store.attempt}"
    reads = [stream_bundle(runtime)] * runtime.num_workers
    beside = validation_bundles(segment.recipe, segment.stages)
    online = any(stage.online for stage in segment.stages)
    bundles = [*reads, *beside, *(teacher_bundles(runtime) if online else [])]
    is_over = False
    while not is_over:
        _wait_for_room([*bundles, *[worker_bundle(runtime)] * runtime.num_workers])
        with reserve(bundles) as group:
            num_others = len(reads) + len(beside)
            teachers = None
            if online:
                teachers = start_teachers(segment.store, segment.recipe, segment.categories, group, num_others)
            is_over = _fit(segment, run_name, group, teachers)
    if reason := ray.get(segment.broker.failure.remote(segment.owner)):
        raise SegmentFailed(reason)
    segment.store.forget_run(run_name, [s.fingerprint for s in segment.stages])


def _wait_for_room(bundles: list[dict[str, float]]) -> None:
    """Returns when all that a segment reserves would fit at once.

    The streams' group and Train's are reserved one after the other. Two sweeps on one cluster could each hold a part
    and wait for the rest for ever; so nobody asks for a part before the whole fits, and who is overtaken all the same
    gives its part back (see `_fit`).
    """
    whole = ray.util.placement_group(bundles, strategy="PACK")
    try:
        while not whole.wait(ROOM_LOOK_S):
            pass
    finally:
        ray.util.remove_placement_group(whole)


def _fit(segment: Segment, run_name: str, group: PlacementGroup, teachers: Teachers | None) -> bool:
    """Runs the worker group; False when it could not start because its resources were taken meanwhile."""
    from ray.train.torch import TorchTrainer  # imports torch, which a row's driver does without until it trains

    runtime = segment.recipe.runtime
    trainer = TorchTrainer(
        _run_stages,
        train_loop_config={"segment": segment, "group": group, "teachers": teachers},
        scaling_config=ScalingConfig(
            num_workers=runtime.num_workers,
            use_gpu=runtime.use_gpu,
            resources_per_worker=worker_bundle(runtime),
        ),
        run_config=RunConfig(
            name=run_name,
            storage_path=in_few_requests(segment.store.uri("train")),
            failure_config=FailureConfig(max_failures=runtime.max_failures, controller_failure_limit=0),  # type: ignore[call-arg]
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        trainer.fit()
    except ControllerError as error:
        if not is_startup_timeout(error.controller_failure):
            raise
        return False
    return True


def _run_stages(config: dict[str, Any]) -> None:
    """The loop of one worker."""
    from cast_ray.runtime.worker.stage_loop import run_stages

    run_stages(config["segment"], config["group"], config["teachers"])
