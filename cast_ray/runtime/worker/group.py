"""Ray Train: consecutive stages of a row run in one worker group, and so do further segments of the same shape.

Starting a worker group costs more than a small stage, so a *segment* - train, label and evaluate stages whose inputs
exist or are made by the segment itself - shares one. Each stage is committed to the store as soon as it is done, so
rows that wait for it continue while the segment runs. When a segment is done, the group may be kept for the next row's:
its workers take segment after segment from a mailbox until that is closed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError
from ray.util.placement_group import PlacementGroup

from cast_ray.common.repeated import repeated
from cast_ray.recipe import RuntimeConfig
from cast_ray.runtime.data.block_source import warm_up_readers
from cast_ray.runtime.data.resources import segment_bundles, segment_selectors, stream_bundle, worker_bundle
from cast_ray.runtime.placement import NODE_LABEL, is_broken, nodes_of, reserve
from cast_ray.runtime.ray_internals import is_lost_at_start, is_startup_timeout
from cast_ray.runtime.worker.mailbox import Mailbox
from cast_ray.runtime.worker.online import Teachers, start_teachers, teacher_bundles
from cast_ray.runtime.worker.segment import Segment, SegmentFailed
from cast_ray.runtime.worker.shape import devices_of, shape_of
from cast_ray.runtime.worker.train_storage import train_storage
from cast_ray.runtime.worker.validation import validation_bundles

TAKEN_S = 10.0
"""Seconds after which a reservation that was seen to have room, and is not placed, counts as taken by somebody else."""
ROOM_LOOK_S = 5.0
"""How often the host of a group looks whether all nodes of its reservation are there."""
MORE_LOOK_S, MORE_ROOM_S = 60.0, 10.0
"""How often an elastic run looks for room for more workers, and for how long each time."""
START_TIMEOUT, START_TIMEOUT_S = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20"
"""The same for Train's own reservation, also when it starts its workers again after one was lost with its node."""


class WorkerGroup:
    """A worker group with its room, from the search for room on until the room is given back.

    Args:
        first: segment that it is started for.
        host: handle of the actor that holds this object, for the workers.
        holder: in whose name its room is reserved.
    """

    def __init__(self, first: Segment, host: Any, holder: str):
        self.host, self.holder = host, holder
        self.shape = shape_of(first)
        self.mailbox = Mailbox()
        self.segment: Segment | None = first
        """What it runs now; None while it is kept for the next one."""
        self.num_starts = 0
        """Times its workers have started; from the second on some were lost before."""
        self.workers: dict[int, Any] = {}
        """Rank -> handle of the worker that was started last."""
        self.is_leaving = False
        """Whether its workers are to end and it moves to other nodes, because one of its nodes is lost or will be."""
        self.num_workers = first.recipe.runtime.num_workers
        """How many workers it has now, or had last."""
        self.has_more_room = False
        """Whether its workers are to save what they have, so that it starts again with more of them."""
        self.store = first.store
        self.run_name = first.run_name
        self.serving = asyncio.ensure_future(asyncio.to_thread(self._serve))

    def suits(self, segment: Segment) -> bool:
        """Whether it can run another segment. Lost workers count against it: `runtime.max_failures` bounds the losses
        of a group, and no row is to pay for those of the row before."""
        is_whole = not self.serving.done() and self.num_starts <= 1 and not self.is_leaving
        return is_whole and self.shape == shape_of(segment) is not None

    async def run(self, segment: Segment) -> bool:
        """Runs a segment; returns when its stages are committed, or no further one may start.

        Workers that die are restarted up to `runtime.max_failures` times; a stage then continues from its last
        checkpoint. Those that die while their group starts are counted apart, up to the same number.

        Returns:
            Whether the group is kept: its workers wait for the next segment. Otherwise it has ended.

        Raises:
            SegmentFailed: a stage raised an error that restarts cannot mend; not retried.
            ray.train.TrainingFailedError: the workers failed more often than that.
        """
        self.segment = segment
        number = await self.mailbox.put(segment)
        finished = asyncio.ensure_future(self.mailbox.finished(number))
        await asyncio.wait({self.serving, finished}, return_when=asyncio.FIRST_COMPLETED)
        is_finished = finished.done()
        finished.cancel()
        is_kept = is_finished and self.suits(segment)
        if not is_kept:
            await self.mailbox.close()
            await self.serving
            if reason := await segment.broker.failure.remote(segment.owner):
                raise SegmentFailed(reason)
        await asyncio.to_thread(self._forget_checkpoints, segment, is_finished)
        if not is_kept:
            await asyncio.to_thread(self.store.forget_run, self.run_name)
        self.segment = None
        return is_kept

    def _forget_checkpoints(self, segment: Segment, is_finished: bool) -> None:
        stages = segment.stages if is_finished else [s for s in segment.stages if segment.store.has(s.key)]
        trained = [stage.fingerprint for stage in stages if stage.kind == "train"]  # the others write no checkpoint
        segment.store.forget_checkpoints(trained, but=self.run_name)

    async def close(self) -> None:
        """Ends a group that is kept, and returns when its room is given back."""
        assert self.segment is None
        await self.mailbox.close()
        await asyncio.wait({self.serving})
        self.serving.exception()  # of workers lost while nobody used them; looked at, or asyncio would complain
        await asyncio.to_thread(self.store.forget_run, self.run_name)

    def _serve(self) -> None:
        """Finds room and runs the group in it until its mailbox is closed; again where the room was taken meanwhile."""
        num_lost = 0
        is_over = False
        while not is_over and (segment := self.segment) is not None:
            broker = segment.broker
            beside = validation_bundles(segment.recipe, segment.stages)
            online = any(stage.online for stage in segment.stages)
            teachers = teacher_bundles(segment.recipe.runtime) if online else []
            runtime, nodes = self._settle(segment, beside, teachers)
            streams = [stream_bundle(runtime)] * runtime.num_workers
            worker_nodes, others = nodes[: runtime.num_workers], nodes[runtime.num_workers :]
            places = [*worker_nodes, *others[: bool(beside)] * len(beside), *others[bool(beside) :]]
            try:
                with reserve([*streams, *beside, *teachers], nodes=places, holder=self.holder) as group:
                    if not group.wait(TAKEN_S):
                        continue
                    if not ray.get(broker.occupy.remote(segment.owner, devices_of(segment, self.num_workers))):
                        return
                    started = None
                    if online:
                        num_others = len(streams) + len(beside)
                        started = start_teachers(
                            *(segment.store, segment.recipe, segment.categories, group, num_others),
                            broker=broker,
                            owner=segment.owner,
                        )
                    is_over = self._fit(runtime, group, worker_nodes, started)
            except ControllerError as error:
                if self.is_leaving:
                    continue
                if not is_lost_at_start(error.controller_failure) or num_lost >= runtime.max_failures:
                    raise
                num_lost += 1
            except TrainingFailedError:
                if not self.is_leaving:
                    raise
            finally:
                if (served := self.segment) is not None:
                    ray.get(served.broker.vacate.remote(served.owner))

    def _settle(
        self, segment: Segment, beside: list[dict[str, float]], teachers: list[dict[str, float]]
    ) -> tuple[RuntimeConfig, list[str]]:
        """Finds room for the group; of an elastic run for as many workers as can be placed now.

        The groups of more workers that stay pending for a moment also tell an autoscaler that they are wanted.

        Returns:
            the settings with the number of workers that it has, and the node of each bundle.
        """
        *larger, last = segment.recipe.worker_counts
        for count in (*larger, last):
            runtime = segment.recipe.runtime.model_copy(update={"num_workers": count})
            homes = segment_bundles(runtime, beside, teachers)
            selectors = segment_selectors(runtime, beside, teachers)
            patience_s = None if count == last else MORE_ROOM_S
            nodes = _find_room(segment, homes, selectors, self.holder, patience_s)
            if nodes is not None:
                break
        assert nodes is not None  # nothing bounds the wait for the last
        self.num_workers, self.has_more_room = runtime.num_workers, False
        if segment.recipe.runtime.is_elastic:
            most = segment.recipe.runtime.num_workers
            segment.broker.note.remote(segment.owner, f"its worker group has {self.num_workers} of {most} workers")
        return runtime, nodes

    def _fit(
        self, runtime: RuntimeConfig, group: PlacementGroup, worker_nodes: list[str], teachers: Teachers | None
    ) -> bool:
        """Runs the worker group; False when it could not start because its resources were taken meanwhile, or when it
        has to move.

        Raises:
            ControllerError: it failed for another reason.
        """
        os.environ.setdefault(START_TIMEOUT, START_TIMEOUT_S)
        place = {"host": self.host, "group": group, "worker_nodes": worker_nodes, "teachers": teachers}
        trainer = _trainer_class(runtime.num_workers)(
            _run_worker,
            train_loop_config={"runtime": runtime, "place": place},
            scaling_config=ScalingConfig(
                num_workers=runtime.num_workers,
                use_gpu=runtime.use_gpu,
                resources_per_worker=worker_bundle(runtime),
                label_selector=[{NODE_LABEL: node} for node in worker_nodes],  # type: ignore[call-arg]
            ),
            run_config=RunConfig(
                name=self.run_name,
                **train_storage(self.store.uri("train")),
                failure_config=FailureConfig(max_failures=runtime.max_failures, controller_failure_limit=0),  # type: ignore[call-arg]
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )
        self.is_leaving = False
        try:
            with (
                repeated(partial(self._is_broken, group), ROOM_LOOK_S),
                repeated(self._look_for_more_room, MORE_LOOK_S),
            ):
                trainer.fit()
        except ControllerError as error:
            if not is_startup_timeout(error.controller_failure):
                raise
            return False
        return not self.is_leaving

    def _is_broken(self, group: PlacementGroup) -> bool:
        """Whether a node of the reservation is lost, be it one of the workers' or not; ends the workers if so.

        Each bundle is pinned to its node, so Ray can place a lost one nowhere else: actors in it (teachers, validation)
        would stay pending for ever, and workers that wait for them would wait as long.
        """
        if not is_broken(group):
            return False
        self.leave("a node that it runs on was lost")
        for worker in list(self.workers.values()):
            ray.kill(worker)
        return True

    def _look_for_more_room(self) -> bool:
        """Looks whether an elastic run could have more workers; True: it is to start again, or has all it may have."""
        segment = self.segment
        more = [] if segment is None else [n for n in segment.recipe.worker_counts if n > self.num_workers]
        for count in more:
            assert segment is not None
            added = segment.recipe.runtime.model_copy(update={"num_workers": count - self.num_workers})
            bundles, selectors = segment_bundles(added, [], []), segment_selectors(added, [], [])
            with reserve(bundles, selectors=selectors, holder=self.holder) as room:
                if room.wait(MORE_ROOM_S):
                    self.has_more_room = True
                    return True
        return segment is not None and not more

    def joined(self, rank: int, worker: Any) -> None:
        """A worker has started, or has been started again."""
        self.workers[rank] = worker
        self.num_starts += rank == 0

    def leave(self, why: str) -> None:
        """Has the group move: its workers are given nothing any more, and their segment resumes in other room."""
        self.is_leaving = True
        if (segment := self.segment) is not None:
            segment.broker.note.remote(segment.owner, f"{why}; its worker group moves to other nodes")


def _find_room(
    segment: Segment,
    homes: Sequence[Mapping[str, float]],
    selectors: Sequence[Mapping[str, str]] | None = None,
    holder: str = "",
    patience_s: float | None = None,
) -> list[str] | None:
    """Waits until all that a segment reserves has room at once; returns the node of each bundle.

    The streams' group and Train's are reserved one after the other. Two segments could each hold a part and wait for
    the rest for ever; so nobody asks for a part before the whole fits, segments of one sweep take turns on a node while
    they ask (`Broker.hand_over`), and one that another sweep overtakes all the same gives its part back.

    Args:
        patience_s: seconds after which it gives up and returns None; None: never.
    """
    say = partial(segment.broker.wait_for_room.remote, segment.owner) if patience_s is None else None
    while True:
        with reserve(homes, selectors=selectors, say=say, holder=holder) as whole:
            if patience_s is not None and not whole.wait(patience_s):
                return None
            nodes = nodes_of(whole)
            if ray.get(segment.broker.hand_over.remote(segment.owner, nodes)):
                return nodes
        ray.get(segment.broker.node_turn.remote(segment.owner, nodes))


def _trainer_class(num_workers: int) -> Any:
    """Returns the trainer that sets up torch's process group; for one worker, which has nobody to talk to, its base
    class: the group's host and Train's controller then start without importing torch."""
    if num_workers == 1:
        return DataParallelTrainer
    from ray.train.torch import TorchTrainer

    return TorchTrainer


def _run_worker(config: dict[str, Any]) -> None:
    """The loop of one worker. The processes that will read its images start up while it imports torch itself."""
    warm_up_readers(config["runtime"])
    from cast_ray.runtime.worker.stage_loop import serve_segments

    serve_segments(config["runtime"], **config["place"])
