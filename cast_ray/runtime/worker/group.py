"""Ray Train: consecutive stages of a row run in one worker group.

Starting a worker group costs more than a small stage, so a *segment* - train, label and evaluate stages whose inputs
exist or are made by the segment itself - shares one. Each stage is committed to the store as soon as it is done, so
rows that wait for it go on while the segment does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError
from ray.util.placement_group import PlacementGroup

from cast_ray.common.paths import in_few_requests
from cast_ray.runtime.data.block_source import warm_up_readers
from cast_ray.runtime.data.resources import segment_bundles, stream_bundle, worker_bundle
from cast_ray.runtime.placement import NODE_LABEL, nodes_of, reserve
from cast_ray.runtime.ray_internals import is_lost_at_start, is_startup_timeout
from cast_ray.runtime.worker.online import Teachers, start_teachers, teacher_bundles
from cast_ray.runtime.worker.segment import Segment, SegmentFailed
from cast_ray.runtime.worker.validation import validation_bundles

TAKEN_S = 10.0
"""Seconds after which a reservation that was seen to have room, and is not placed, counts as taken by somebody else."""
START_TIMEOUT, START_TIMEOUT_S = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20"
"""The same for Train's own reservation, also when it starts its workers again after one was lost with its node."""


def run_segment(segment: Segment) -> None:
    """Runs a segment's stages through a TorchTrainer; returns when all are committed, or no further one may start.

    Workers that die are restarted up to `runtime.max_failures` times; a stage then continues from its last checkpoint.
    Those that die while their group starts are counted apart, up to the same number.

    Raises:
        SegmentFailed: a stage raised an error that restarts cannot mend; not retried.
        ray.train.TrainingFailedError: the workers failed more often than that.
    """
    runtime, broker = segment.recipe.runtime, segment.broker
    # A name of its own: an interrupted run of the same stages may still be going down.
    run_name = f"{segment.stages[0].fingerprint[:8]}-{segment.store.attempt}"
    streams = [stream_bundle(runtime)] * runtime.num_workers
    beside = validation_bundles(segment.recipe, segment.stages)
    online = any(stage.online for stage in segment.stages)
    teachers = teacher_bundles(runtime) if online else []
    homes = segment_bundles(runtime, beside, teachers)
    num_lost = 0
    is_over = False
    while not is_over:
        nodes = _find_room(segment, homes)
        worker_nodes, others = nodes[: runtime.num_workers], nodes[runtime.num_workers :]
        beside_nodes, teacher_nodes = others[: bool(beside)] * len(beside), others[bool(beside) :]
        try:
            with reserve([*streams, *beside, *teachers], nodes=[*worker_nodes, *beside_nodes, *teacher_nodes]) as group:
                if not group.wait(TAKEN_S):
                    continue
                if not ray.get(broker.occupy.remote(segment.owner)):
                    return
                started = None
                if online:
                    num_others = len(streams) + len(beside)
                    started = start_teachers(segment.store, segment.recipe, segment.categories, group, num_others)
                is_over = _fit(segment, run_name, group, worker_nodes, started)
        except ControllerError as error:
            if not is_lost_at_start(error.controller_failure) or num_lost >= runtime.max_failures:
                raise
            num_lost += 1
        finally:
            ray.get(broker.vacate.remote(segment.owner))
    if reason := ray.get(broker.failure.remote(segment.owner)):
        raise SegmentFailed(reason)
    segment.store.forget_run(run_name, [s.fingerprint for s in segment.stages])


def _find_room(segment: Segment, homes: Sequence[Mapping[str, float]]) -> list[str]:
    """Waits until all that a segment reserves has room at once; returns the node of each bundle.

    The streams' group and Train's are reserved one after the other. Two segments could each hold a part and wait for
    the rest for ever; so nobody asks for a part before the whole fits, segments of one sweep take turns on a node while
    they ask (`Broker.hand_over`), and one that another sweep overtakes all the same gives its part back.
    """
    say = partial(segment.broker.wait_for_room.remote, segment.owner)
    while True:
        with reserve(homes, say=say) as whole:
            nodes = nodes_of(whole)
            if ray.get(segment.broker.hand_over.remote(segment.owner, nodes)):
                return nodes
        ray.get(segment.broker.node_turn.remote(segment.owner, nodes))


def _fit(
    segment: Segment, run_name: str, group: PlacementGroup, worker_nodes: list[str], teachers: Teachers | None
) -> bool:
    """Runs the worker group; False when it could not start because its resources were taken meanwhile.

    Raises:
        ControllerError: it failed for another reason.
    """
    runtime = segment.recipe.runtime
    os.environ.setdefault(START_TIMEOUT, START_TIMEOUT_S)
    trainer = _trainer_class(runtime.num_workers)(
        _run_stages,
        train_loop_config={"segment": segment, "group": group, "worker_nodes": worker_nodes, "teachers": teachers},
        scaling_config=ScalingConfig(
            num_workers=runtime.num_workers,
            use_gpu=runtime.use_gpu,
            resources_per_worker=worker_bundle(runtime),
            label_selector=[{NODE_LABEL: node} for node in worker_nodes],  # type: ignore[call-arg]
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


def _trainer_class(num_workers: int) -> Any:
    """Returns the trainer that sets up torch's process group; for one worker, which has nobody to talk to, its base
    class: the row's driver and Train's controller then start without importing torch."""
    if num_workers == 1:
        return DataParallelTrainer
    from ray.train.torch import TorchTrainer

    return TorchTrainer


def _run_stages(config: dict[str, Any]) -> None:
    """The loop of one worker. The processes that will read its images start up while it imports torch itself."""
    warm_up_readers(config["segment"].recipe.runtime)
    from cast_ray.runtime.worker.stage_loop import run_stages

    run_stages(config["segment"], config["group"], config["worker_nodes"], config["teachers"])
