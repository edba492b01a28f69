"""The process that owns a worker group, so that the group outlives the row that it was started for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray

from cast_ray.common.logs import configure_logging
from cast_ray.runtime.worker.meeting import Meetings
from cast_ray.runtime.worker.segment import Segment
from cast_ray.runtime.worker.shape import devices_of, shape_of

if TYPE_CHECKING:
    from cast_ray.runtime.worker.group import WorkerGroup


@ray.remote(num_cpus=0, max_restarts=0)
class GroupHost:
    """Runs segments, one at a time, in a worker group that it starts, keeps while it suits, and ends.

    The sweep's broker lends it to one row after the other, and kills it when a row is lost or stopped: the group then
    ends with it, because Train's controller and the workers are its descendants.

    Args:
        holder: in whose name it reserves room, see `placement.give_back`.
    """

    def __init__(self, holder: str):
        import cast_ray.runtime.worker.group  # noqa: F401  only here: the broker, which starts hosts, needs no Ray Train

        configure_logging()
        self.holder = holder
        self.meetings = Meetings()
        self.group: WorkerGroup | None = None

    async def run(self, segment: Segment) -> bool:
        """Runs a segment, in the group that is up or in a new one; see `WorkerGroup.run`."""
        if self.group is not None and not self.group.suits(segment):
            await self.close()
        if self.group is None:
            from cast_ray.runtime.worker.group import WorkerGroup

            self.group = WorkerGroup(segment, ray.get_runtime_context().current_actor, self.holder)
        elif not await segment.broker.occupy.remote(segment.owner, devices_of(segment, self.group.num_workers)):
            return True  # nothing may start any more: the group stays as it is until it is closed
        is_kept = False
        try:
            is_kept = await self.group.run(segment)
            return is_kept
        finally:
            if not is_kept:
                self.group = None

    async def take(self, after: int, rank: int, worker: Any = None) -> tuple[int, Segment] | None:
        """Gives a worker the next segment, see `Mailbox.take`.

        Args:
            worker: handle of the worker's actor.
        """
        if self.group is None or self.group.is_leaving:
            return None
        if after == 0:
            self.group.joined(rank, worker)
        return await self.group.mailbox.take(after)

    async def leave(self) -> None:
        """The workers have saved what they had and end: one of their nodes will be taken away, or there is room for
        more of them. The group moves."""
        if self.group is not None and self.group.has_more_room:
            self.group.leave("there is room for more workers")
        elif self.group is not None:
            self.group.leave("a node that it runs on is being drained")

    async def has_more_room(self) -> bool:
        """Whether the group could have more workers, see `runtime.min_workers`."""
        return self.group is not None and self.group.has_more_room

    async def arrive(self, place: str, rank: int) -> int:
        """See `Meetings.arrive`."""
        return self.meetings.arrive(place, rank)

    async def take_number(self, place: str, rank: int, count: int) -> int | None:
        """See `Meetings.take`."""
        return self.meetings.take(place, rank, count)

    async def num_taken(self, place: str, rank: int) -> int:
        """See `Meetings.num_taken`."""
        return self.meetings.num_taken(place, rank)

    async def finish(self, number: int) -> None:
        """Notes that the workers have run a segment to its end."""
        if self.group is not None:
            await self.group.mailbox.finish(number)

    async def close(self) -> None:
        """Ends the group that is kept; returns when its room is given back."""
        group, self.group = self.group, None
        if group is not None:
            await group.close()


def run_segment(segment: Segment, instance: str) -> None:
    """Runs a segment in a worker group that the broker lends; returns when its stages are committed, no further one
    may start, or the row's grant has ended.

    A host that is lost, with its node or alone, is replaced as often as workers would be.

    Args:
        instance: id of the driver process.

    Raises:
        SegmentFailed, ray.train.TrainingFailedError: see `WorkerGroup.run`.
        ray.exceptions.RayActorError: hosts were lost more often than `runtime.max_failures`.
    """
    broker, node = segment.broker, ray.get_runtime_context().get_node_id()
    num_lost = 0
    while True:
        host: Any
        host = ray.get(broker.lend.remote(segment.owner, shape_of(segment), segment.run_name, node, instance))
        if host is None:
            return
        try:
            is_kept = ray.get(host.run.remote(segment))
        except ray.exceptions.RayActorError:
            if num_lost >= segment.recipe.runtime.max_failures:
                raise
            num_lost += 1
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        else:
            ray.get(broker.take_back.remote(segment.owner, is_kept, instance))
            return
