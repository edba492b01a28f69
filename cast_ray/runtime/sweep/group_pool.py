"""Worker groups that outlive the segment they were started for: which one serves whom, and when it ends.

Starting a worker group takes longer than many segments. So a group whose segment is done is parked for some seconds,
with its room, and lent to the next row whose segment needs the same runtime settings. It ends early when another
segment waits for room or for its slot, when no row is left that could use it, and when the sweep may start nothing
more. A group of a row that was lost or stopped is killed: nobody waits for its workers any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cast_ray.recipe import RuntimeConfig
from cast_ray.runtime.placement import give_back
from cast_ray.runtime.sweep.leases import Leases, Limits, Need
from cast_ray.runtime.worker.group_host import GroupHost

logger = logging.getLogger(__name__)

PARK_S = 10.0
"""Seconds for which a parked group keeps its room: about what starting another one takes."""
DEATH_S = 10.0


class Hosts(Protocol):
    """Starts and ends the processes that own worker groups."""

    def start(self, holder: str, node: str | None) -> Any:
        """Starts a host on a node, or where that one is full or gone on another; None: anywhere."""

    async def kill(self, actor: Any, holder: str) -> None:
        """Ends a host with its workers, and gives back what was reserved in its name."""

    async def give_back(self, holder: str) -> None:
        """Gives back what was reserved in the name of a process that is gone."""


class RayHosts:
    """Hosts that are actors of Ray."""

    def start(self, holder: str, node: str | None) -> Any:
        near = "DEFAULT" if node is None else NodeAffinitySchedulingStrategy(node, soft=True)
        return GroupHost.options(scheduling_strategy=near).remote(holder)  # type: ignore[attr-defined]

    async def kill(self, actor: Any, holder: str) -> None:
        ray.kill(actor)
        deadline = time.monotonic() + DEATH_S
        with contextlib.suppress(ray.exceptions.RayActorError):  # raised once it is dead and can reserve nothing more
            while time.monotonic() < deadline:
                await actor.__ray_ready__.remote()
                await asyncio.sleep(0.1)
        await self.give_back(holder)

    async def give_back(self, holder: str) -> None:
        await asyncio.to_thread(give_back, holder)


@dataclass(eq=False)
class LentGroup:
    """A host and the worker group in it.

    run: name of the group's run in Ray Train; shape: what it was started with; None: no group is up, or one for a
    single segment.
    """

    actor: Any
    holder: str
    run: str = ""
    shape: RuntimeConfig | None = None
    devices: int = 0
    timer: asyncio.TimerHandle | None = None
    """Ends it when it has been parked for long enough."""


@dataclass
class GroupPool:
    """The worker groups of one sweep. All methods belong to one event loop.

    Args:
        leases: the sweep's: they tell which rows may still come for a group, and how many slots are taken.
        limits: where the time of parked groups is counted.
        is_open: rows may still be added when no known one is left.
        sweep: part of the name in which hosts reserve room, the same for all of them.
    """

    leases: Leases
    limits: Limits
    is_open: bool = False
    sweep: str = ""
    asked: dict[str, tuple[list[Need], RuntimeConfig | None] | None] = field(default_factory=dict)
    """Owner -> what it asked for last and what its groups need, of the rows that have not ended; None: it has not asked
    yet."""
    hosts: Hosts = field(default_factory=RayHosts)
    working: dict[str, LentGroup] = field(default_factory=dict)
    """Owner -> the group that runs its segment."""
    parked: list[LentGroup] = field(default_factory=list)
    """The one that was parked last is the last."""
    idle: list[LentGroup] = field(default_factory=list)
    """Hosts without a group."""
    interrupted: list[str] = field(default_factory=list)
    """Runs of Ray Train that were ended in the middle."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """Groups that are being ended."""

    def warm_up(self, num_rows: int) -> None:
        """Starts the hosts of so many rows, no more than there are slots, while the drivers of these rows start too."""
        num_hosts = min(num_rows, self.leases.slots)
        while len(self.idle) + len(self.working) + len(self.parked) + len(self.tasks) < num_hosts:
            self.idle.append(self._start(None))

    def _start(self, node: str | None) -> LentGroup:
        holder = f"{self.sweep}/{uuid.uuid4().hex}" if self.sweep else uuid.uuid4().hex
        return LentGroup(self.hosts.start(holder, node), holder)

    def lend(self, owner: str, shape: RuntimeConfig | None, devices: int, run: str, node: str) -> Any:
        """Lends the host of a group: a parked one of the same shape where there is one.

        Args:
            shape: that the owner's segment needs; None: a group that no other segment can use.
            run: name that a new group's run in Ray Train would have.
            node: where a new host starts.
        """
        alike = [group for group in self.parked if shape is not None and group.shape == shape]
        if alike:
            group = alike[-1]
            self._unpark(group)
            self.limits.unpark(group.holder, time.monotonic())
            logger.info("the worker group of %s continues with a segment of %s", group.run, owner)
        else:
            group = self.idle.pop() if self.idle else self._start(node)
            group.run, group.shape, group.devices = run, shape, devices
        self.working[owner] = group
        self.keep_within_slots()
        return group.actor

    def take_back(self, owner: str, is_kept: bool) -> None:
        """Takes a host back whose segment is over.

        Args:
            is_kept: its worker group is still up.
        """
        group = self.working.pop(owner, None)
        if group is None:
            return
        if not is_kept or group.shape is None:
            self.idle.append(group)
            return
        now = time.monotonic()
        self.limits.stop(owner, now)
        self.limits.park(group.holder, group.devices, now)
        self.parked.append(group)
        group.timer = asyncio.get_running_loop().call_later(PARK_S, self.close, group)
        self._close_unwanted()

    def forget(self, owner: str) -> None:
        """A row has ended and comes no more."""
        self.asked.pop(owner, None)
        self._close_unwanted()

    def close(self, group: LentGroup) -> None:
        """Ends a parked group; its room is free some moments later."""
        self._unpark(group)
        task = asyncio.ensure_future(self._close(group))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _unpark(self, group: LentGroup) -> None:
        self.parked.remove(group)
        if group.timer is not None:
            group.timer.cancel()

    def close_all(self) -> None:
        """Ends every parked group."""
        for group in list(self.parked):
            self.close(group)

    def _close_unwanted(self) -> None:
        for group in list(self.parked):
            if not self._is_wanted(group.shape):
                self.close(group)

    def _is_wanted(self, shape: RuntimeConfig | None) -> bool:
        """Whether a row may still come for a worker group of this shape."""
        if self.limits.reason(time.monotonic()) is not None:
            return False
        return self.is_open or any(self._may_come(owner, shape) for owner in self.asked)

    def _may_come(self, owner: str, shape: RuntimeConfig | None) -> bool:
        if (asked := self.asked[owner]) is None:
            return True
        needs, runtime = asked
        left = [n.fingerprint for n in needs if n.fingerprint not in self.leases.done and not n.alone]
        if runtime != shape or any(fingerprint in self.leases.failed for fingerprint in left):
            return False
        served = {f for f, by in self.leases.leased.items() if by == owner and owner in self.working}
        return not served.issuperset(left)

    def keep_within_slots(self) -> None:
        """Ends those parked first where slots are taken: a parked group holds the room of one."""
        while self.parked and len(self.parked) + len(self.leases.heartbeat) > self.leases.slots:
            self.close(self.parked[0])

    async def end(self, owner: str) -> None:
        """Ends the group that works for an owner, if one does: its row is lost or stopped."""
        if (group := self.working.pop(owner, None)) is not None:
            self.interrupted.append(group.run)
            await self.hosts.kill(group.actor, group.holder)

    async def closed(self) -> None:
        """Ends all groups; returns when the last of them has given its room back."""
        for owner in list(self.working):  # its driver was lost for good
            await self.end(owner)
        self.close_all()
        while self.tasks:
            await asyncio.wait(self.tasks)

    async def _close(self, group: LentGroup) -> None:
        try:
            await group.actor.close.remote()
            self.idle.append(group)
        except ray.exceptions.RayError:  # the host is lost, and its group with it
            self.interrupted.append(group.run)
            await self.hosts.kill(group.actor, group.holder)
        finally:
            self.limits.unpark(group.holder, time.monotonic())
