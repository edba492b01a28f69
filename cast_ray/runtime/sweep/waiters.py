"""Rows that wait for the broker's answer, and who of them is served first, without Ray."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from cast_ray.runtime.sweep.leases import LEASE_TIMEOUT_S, REPLACED, Answer, Leases, Limits, Need


@dataclass(eq=False)
class Waiter:
    """A driver process that waits."""

    owner: str
    needs: list[Need]
    order: int
    instance: str = ""
    """The driver process that waits."""
    seen: float = 0.0
    """When that process was last heard of."""
    granted: asyncio.Event = field(default_factory=asyncio.Event)
    answer: Answer | None = None

    @property
    def steps_left(self) -> int:
        return sum(need.steps for need in self.needs)

    def tell(self, answer: Answer) -> None:
        """Ends the waiting."""
        self.answer = answer
        self.granted.set()


class Waiters:
    """Those that wait. `now` is the time of the caller's monotonic clock.

    Args:
        leases, limits: the sweep's.
    """

    def __init__(self, leases: Leases, limits: Limits):
        self.leases, self.limits = leases, limits
        self.all: list[Waiter] = []

    def add(self, waiter: Waiter) -> None:
        """Has a driver wait, again where it has been answered before."""
        waiter.answer, waiter.granted = None, asyncio.Event()
        self.all.append(waiter)

    def remove(self, waiter: Waiter) -> None:
        """Has a driver wait no more, if it does."""
        if waiter in self.all:
            self.all.remove(waiter)

    def replace(self, owner: str) -> None:
        """Tells the processes that wait for a row that another one has come in their place."""
        for waiter in [w for w in self.all if w.owner == owner]:
            self.all.remove(waiter)
            waiter.tell(REPLACED)

    def heard_of(self, owner: str, instance: str, now: float) -> None:
        """A driver process is alive."""
        for waiter in self.all:
            if waiter.owner == owner and waiter.instance == instance:
                waiter.seen = now

    def serve(self, now: float) -> None:
        """Answers those for whom there is something; the one with the most work left goes first."""
        stop = self.limits.reason(now)
        alive = [w for w in self.all if now - w.seen <= LEASE_TIMEOUT_S]  # others are likely dead
        for waiter in sorted(alive, key=lambda w: (-w.steps_left, w.order)):
            answer = self.leases.grant(waiter.owner, waiter.needs, now) if stop is None else self._stopped(waiter, stop)
            if answer is not None:
                self.all.remove(waiter)
                waiter.tell(answer)

    def _stopped(self, waiter: Waiter, reason: str) -> Answer:
        done = [n.fingerprint for n in waiter.needs if n.fingerprint in self.leases.done]
        return {"run": [], "done": done} | ({"stop": reason} if len(done) < len(waiter.needs) else {})
