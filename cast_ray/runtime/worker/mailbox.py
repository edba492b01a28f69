"""How the workers of a group are handed segments: one after the other, the same to each of them."""

from __future__ import annotations

import asyncio

from cast_ray.runtime.worker.segment import Segment


class Mailbox:
    """The segments of one worker group, numbered from 1 on. All methods belong to one event loop."""

    def __init__(self) -> None:
        self.number = 0
        """The number of the segment that was put in last."""
        self.segment: Segment | None = None
        """The segment of this number, until it is finished."""
        self.is_closed = False
        self.changed = asyncio.Condition()

    async def put(self, segment: Segment) -> int:
        """Hands a segment to the workers and returns its number; the one before it must be finished."""
        assert self.segment is None and not self.is_closed
        async with self.changed:
            self.number += 1
            self.segment = segment
            self.changed.notify_all()
        return self.number

    async def take(self, after: int) -> tuple[int, Segment] | None:
        """Waits for the segment that a worker is to run; None: the group ends.

        Args:
            after: number of the segment that the worker has run last; 0: its process is new. Workers that were started
                again are thus given the segment that is not finished, whatever its number.
        """
        async with self.changed:
            await self.changed.wait_for(lambda: self.is_closed or (self.segment is not None and self.number > after))
            return None if self.is_closed or self.segment is None else (self.number, self.segment)

    async def finish(self, number: int) -> None:
        """Notes that every stage of a segment is committed."""
        async with self.changed:
            if number == self.number:
                self.segment = None
                self.changed.notify_all()

    async def finished(self, number: int) -> None:
        """Returns when a segment is finished."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.number > number or self.segment is None)

    async def close(self) -> None:
        """Ends the group: its workers are given nothing more."""
        async with self.changed:
            self.is_closed = True
            self.changed.notify_all()
