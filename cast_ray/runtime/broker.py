"""Single flight over stages: a stage that several rows need runs once, and who waits for it holds nothing.

One async actor per storage path holds the leases and the progress board. A row's driver asks for work with
everything it still misses; the broker hands it the stages it may run now, or keeps the call open until something
changes. At most `slots` leases groups are out at a time; among waiting rows the one with the most work left goes first.
A lease lives as long as its owner's heartbeat.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from dataclasses import dataclass, field
from typing import Any

import ray

from cast_ray.runtime.store import ArtifactStore
from cast_ray.runtime.tables import load_records

LEASE_TIMEOUT_S = 30.0
HEARTBEAT_S = 5.0
MAX_TABLES = 16


@dataclass
class Need:
    """One missing stage as a row's driver names it to the broker."""

    fingerprint: str
    kind: str
    parents: tuple[str, ...]
    steps: int
    alone: bool = False
    """A job of its own, outside the worker group of what comes before and after."""


@dataclass
class _Waiter:
    owner: str
    needs: list[Need]
    order: int
    granted: asyncio.Event = field(default_factory=asyncio.Event)
    answer: dict[str, list[str]] | None = None

    @property
    def steps_left(self) -> int:
        return sum(n.steps for n in self.needs)


class Leases:
    """The broker's bookkeeping, without Ray: who runs what, what is done, who goes next."""

    def __init__(self, slots: int, done: set[str]):
        self.slots = slots
        self.done = set(done)
        self.leased: dict[str, str] = {}
        self.heartbeat: dict[str, float] = {}
        """Owners that hold a slot: from a grant until they settle, also after their last stage is committed."""

    def free_slot(self) -> bool:
        return len(self.heartbeat) < self.slots

    def beat(self, owner: str, now: float) -> None:
        if owner in self.heartbeat:
            self.heartbeat[owner] = now

    def expire(self, now: float) -> list[str]:
        """Owners whose heartbeat stopped: their leases are free again."""
        dead = [o for o, last in self.heartbeat.items() if now - last > LEASE_TIMEOUT_S]
        for owner in dead:
            self.release(owner)
        return dead

    def release(self, owner: str) -> None:
        self.leased = {f: o for f, o in self.leased.items() if o != owner}
        self.heartbeat.pop(owner, None)

    def finish(self, fingerprint: str) -> None:
        self.done.add(fingerprint)
        self.leased.pop(fingerprint, None)

    def grant(self, owner: str, needs: list[Need], now: float) -> dict[str, list[str]] | None:
        """What `owner` may run now, or None when it has to wait.

        Stages whose parents are done, or granted just before, form one segment (one worker group), unless they are to
        run alone. Stages that finished meanwhile come back under "done".
        """
        missing = [n for n in needs if n.fingerprint not in self.done]
        finished = [n.fingerprint for n in needs if n.fingerprint in self.done]
        if not missing:
            return {"run": [], "done": finished}
        if not self.free_slot():
            return None
        segment: list[str] = []
        for need in missing:
            if need.fingerprint in self.leased:
                continue
            ready = all(p in self.done or p in segment for p in need.parents)
            if not ready:
                continue
            if need.alone:
                if segment:
                    break
                segment = [need.fingerprint]
                break
            segment.append(need.fingerprint)
        if not segment:
            return None
        for fingerprint in segment:
            self.leased[fingerprint] = owner
        self.heartbeat[owner] = now
        return {"run": segment, "done": finished}


@ray.remote(num_cpus=0, max_restarts=0)
class Broker:
    """The actor around `Leases`, and the board where running stages post their progress."""

    def __init__(self, slots: int, done: set[str]):
        self.leases = Leases(slots, done)
        self.waiting: list[_Waiter] = []
        self.posts: dict[str, dict[str, Any]] = {}
        self.ended: list[str] = []
        self.fatal: dict[str, str] = {}
        self.tables: dict[tuple[str, tuple[str, ...]], ray.ObjectRef] = {}
        self.orders = 0

    async def claim(self, owner: str, needs: list[Need]) -> dict[str, list[str]]:
        """Blocks until `owner` may run something or all its needs are done: {"run": [...], "done": [...]}."""
        self.orders += 1
        waiter = _Waiter(owner, needs, self.orders)
        self.waiting.append(waiter)
        try:
            while waiter.answer is None:
                self._serve()
                if waiter.answer is None:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(waiter.granted.wait(), HEARTBEAT_S)
                    self.leases.expire(time.monotonic())
            return waiter.answer
        finally:
            if waiter in self.waiting:
                self.waiting.remove(waiter)

    def _serve(self) -> None:
        for waiter in sorted(self.waiting, key=lambda w: (-w.steps_left, w.order)):
            answer = self.leases.grant(waiter.owner, waiter.needs, time.monotonic())
            if answer is not None:
                waiter.answer = answer
                self.waiting.remove(waiter)
                waiter.granted.set()

    async def heartbeat(self, owner: str) -> None:
        self.leases.beat(owner, time.monotonic())

    async def finish(self, fingerprint: str) -> None:
        """A stage's artifact is committed."""
        self.leases.finish(fingerprint)
        self._serve()

    async def settle(self, owner: str) -> None:
        """`owner`'s segment is over and its worker group is gone: its slot is free."""
        self.leases.release(owner)
        self.posts.pop(owner, None)
        self._serve()

    async def release(self, owner: str) -> None:
        """`owner` has ended, done or failed, and asks for nothing more."""
        self.ended.append(owner)
        await self.settle(owner)

    async def fail(self, owner: str, reason: str) -> None:
        """`owner`'s segment met an error that a restart would meet again."""
        self.fatal.setdefault(owner, reason)

    async def failure(self, owner: str) -> str | None:
        """The error that ended `owner`'s segment, if one did."""
        return self.fatal.get(owner)

    async def post(self, owner: str, facts: dict[str, Any]) -> None:
        """Progress of what `owner` runs: stage, fingerprint, step, steps, unit; where known loss and images_per_s."""
        before = self.posts.get(owner)
        if before is not None and before["fingerprint"] == facts["fingerprint"]:
            self.posts[owner] = before | facts
        else:
            self.posts[owner] = facts | {"first_step": facts["step"], "since": time.monotonic()}

    async def advance(self, owner: str, count: int) -> None:
        """`count` more images of the labelling job that `owner` runs are done."""
        post = self.posts.get(owner)
        if post is None:
            return
        now = time.monotonic()
        post["step"] += count
        if "images_per_s" in post:
            post["images_per_s"] = (post["step"] - post["first_step"]) / max(now - post["since"], 1e-9)
        else:  # the pace counts from the first images on: what came before was the labellers' start
            post |= {"first_step": post["step"], "since": now, "images_per_s": 0.0}

    async def table(self, store: ArtifactStore, key: str, names: tuple[str, ...]) -> list[ray.ObjectRef]:
        """Record tables of an artifact in the object store, one after the other, loaded once for all who use them.

        Returns:
            The reference in a list, or the caller would be sent the table.
        """
        if (key, names) not in self.tables:
            self.tables[key, names] = load_records.remote(store, key, names)
            for old in list(self.tables)[:-MAX_TABLES]:
                del self.tables[old]  # it lives on as long as anybody else holds it
        return [self.tables[key, names]]

    async def board(self) -> dict[str, Any]:
        """What a progress display shows: running stages, waiting and ended rows, fingerprints done."""
        now = time.monotonic()
        return {
            "posts": {owner: post | {"stage_s": now - post["since"]} for owner, post in self.posts.items()},
            "waiting": [w.owner for w in self.waiting],
            "ended": self.ended,
            "done": self.leases.done,
        }

    async def join(self, slots: int, done: set[str]) -> None:
        """A further driver on the same storage path shares this broker."""
        self.leases.slots = max(self.leases.slots, slots)
        self.leases.done |= done


def broker_for(storage: str, slots: int, done: set[str]) -> Any:
    """The broker of a storage path on this Ray cluster; made when there is none, shared by concurrent drivers."""
    name = "cast_ray-broker-" + hashlib.sha256(storage.encode()).hexdigest()[:12]
    actor = Broker.options(  # type: ignore[attr-defined]
        name=name, namespace="cast_ray", get_if_exists=True
    ).remote(slots, done)
    ray.get(actor.join.remote(slots, done))
    return actor
