"""Single flight over stages: a stage that several rows need runs once, and who waits for it holds nothing.

One async actor per sweep holds the leases and the progress board. A row's driver asks for work with everything it still
misses; the broker hands it the stages it may run now, or keeps the call open until something changes. At most `slots`
groups of leases are out at a time; among waiting rows the one with the most work left goes first. A lease lives as long
as its owner's heartbeat. Before a stage is handed out it is claimed in the store (`claims.py`), because other sweeps,
each with a broker of its own, may need it too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from cast_ray.common.logs import configure_logging
from cast_ray.plan.graph import artifact_key
from cast_ray.runtime.data.record_tables import load_records
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.claims import Claims

logger = logging.getLogger(__name__)

LEASE_TIMEOUT_S = 30.0
HEARTBEAT_S = 5.0
FOREIGN_POLL_S = 5.0
MAX_TABLES = 16
MAX_CALLS = 10_000
"""Calls open at a time: one for each row that waits, and some."""
MAX_ENTRIES = 500
"""Curve entries kept for a row whose driver does not collect them."""
FAILURES_BEFORE_STOP = 3

Answer = dict[str, Any]
"""run: fingerprints to run now; done: those that need not run; where set, failed: why the row cannot end; stop: why
nothing is started any more."""


@dataclass
class Need:
    """One missing stage as a row's driver names it to the broker."""

    fingerprint: str
    kind: str
    parents: tuple[str, ...]
    steps: int
    alone: bool = False
    """A job of its own, outside the worker group of what comes before and after."""

    @property
    def key(self) -> str:
        return artifact_key(self.kind, self.fingerprint)


@dataclass
class _Waiter:
    owner: str
    needs: list[Need]
    order: int
    granted: asyncio.Event = field(default_factory=asyncio.Event)
    answer: Answer | None = None

    @property
    def steps_left(self) -> int:
        return sum(n.steps for n in self.needs)


class Leases:
    """The broker's bookkeeping, without Ray: who runs what, what is done, who goes next."""

    def __init__(self, slots: int, done: set[str]):
        self.slots = slots
        self.done = set(done)
        self.finished: list[str] = []
        """What was added to `done` since the start, in order."""
        self.leased: dict[str, str] = {}
        self.foreign: set[str] = set()
        """Fingerprints of the stages that another sweep makes."""
        self.failed: dict[str, str] = {}
        """Fingerprint -> reason of the stages that would fail again."""
        self.heartbeat: dict[str, float] = {}
        """Owners that hold a slot: from a grant until they settle, also after their last stage is committed."""

    def free_slot(self) -> bool:
        return len(self.heartbeat) < self.slots

    def beat(self, owner: str, now: float) -> None:
        if owner in self.heartbeat:
            self.heartbeat[owner] = now

    def expire(self, now: float) -> list[str]:
        """Owners whose heartbeat stopped; to be released."""
        return [o for o, last in self.heartbeat.items() if now - last > LEASE_TIMEOUT_S]

    def release(self, owner: str) -> list[str]:
        """Ends an owner's grant; returns the fingerprints that it did not finish."""
        unfinished = [f for f, o in self.leased.items() if o == owner]
        for fingerprint in unfinished:
            del self.leased[fingerprint]
        self.heartbeat.pop(owner, None)
        return unfinished

    def finish(self, fingerprint: str) -> None:
        if fingerprint not in self.done:
            self.done.add(fingerprint)
            self.finished.append(fingerprint)
        self.leased.pop(fingerprint, None)
        self.foreign.discard(fingerprint)

    def grant(self, owner: str, needs: list[Need], now: float) -> Answer | None:
        """What `owner` may run now, or None when it has to wait.

        Stages whose parents are done, or granted just before, form one segment (one worker group); one that runs alone
        is a segment of its own. Stages that finished meanwhile come back under "done".
        """
        missing = [n for n in needs if n.fingerprint not in self.done]
        finished = [n.fingerprint for n in needs if n.fingerprint in self.done]
        if reasons := [self.failed[n.fingerprint] for n in missing if n.fingerprint in self.failed]:
            return {"run": [], "done": finished, "failed": reasons[0]}
        if not missing:
            return {"run": [], "done": finished}
        if not self.free_slot():
            return None
        segment: list[str] = []
        for need in missing:
            if need.fingerprint in self.leased or need.fingerprint in self.foreign:
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


class Limits:
    """When a sweep stops starting stages: its device-hours are spent, or everything fails.

    Args:
        budget_hours: device-hours, counted from a grant until its worker group is gone; None: no limit.
        keep_going: go on though the first FAILURES_BEFORE_STOP rows that ended have all failed.
    """

    def __init__(self, budget_hours: float | None, keep_going: bool):
        self.budget_s = None if budget_hours is None else budget_hours * 3600
        self.keep_going = keep_going
        self.spent_s = 0.0
        self.spent_by: dict[str, float] = {}
        self.running: dict[str, tuple[float, int]] = {}
        self.outcomes: list[bool] = []

    def start(self, owner: str, devices: int, now: float) -> None:
        self.running[owner] = (now, devices)

    def stop(self, owner: str, now: float) -> None:
        since, devices = self.running.pop(owner, (now, 0))
        self.spent_s += (now - since) * devices
        self.spent_by[owner] = self.spent_by.get(owner, 0.0) + (now - since) * devices

    def spent(self, now: float) -> float:
        """Device-seconds up to now."""
        return self.spent_s + sum((now - since) * devices for since, devices in self.running.values())

    def reason(self, now: float) -> str | None:
        """Why nothing more may start; None: go on."""
        if self.budget_s is not None and self.spent(now) >= self.budget_s:
            return f"the budget of {self.budget_s / 3600:g} device-hours is spent"
        if not self.keep_going and len(self.outcomes) >= FAILURES_BEFORE_STOP and not any(self.outcomes):
            return f"the first {len(self.outcomes)} rows failed (--keep-going starts the others all the same)"
        return None


@ray.remote(num_cpus=0, max_restarts=0)
class Broker:
    """The actor around `Leases`, and the board where running stages post their progress.

    Args:
        storage, holder: where and in whose name stages are claimed; no holder: there is nobody to agree with.
    """

    def __init__(
        self,
        slots: int,
        done: set[str],
        storage: str = "",
        holder: str = "",
        budget_hours: float | None = None,
        keep_going: bool = False,
    ):
        configure_logging()
        self.leases = Leases(slots, done)
        self.limits = Limits(budget_hours, keep_going)
        self.claims = Claims(ArtifactStore(storage), holder) if holder else None
        self.keys: dict[str, str] = {}
        """Fingerprint -> artifact key of every stage that was asked for."""
        self.jobs: dict[str, bytes] = {}
        self.waiting: list[_Waiter] = []
        self.posts: dict[str, dict[str, Any]] = {}
        self.entries: dict[str, deque[dict[str, Any]]] = {}
        self.ended: dict[str, str] = {}
        self.fatal: dict[str, str] = {}
        self.tables: dict[tuple[str, tuple[str, ...]], ray.ObjectRef] = {}
        self.admitted: dict[tuple[str, str], bool] = {}
        self.orders = 0
        self.looked = 0.0

    async def load(self, jobs: dict[str, bytes], stored: Sequence[str] = ()) -> None:
        """Keeps what each row's driver is to do, so that a driver fetches its own row and not all of them.

        Args:
            stored: fingerprints of stages of these rows that were found in the store.
        """
        self.jobs |= jobs
        for fingerprint in stored:
            self.leases.finish(fingerprint)

    async def job(self, name: str) -> bytes:
        return self.jobs[name]

    async def claim(self, owner: str, needs: list[Need], devices: int = 1) -> Answer:
        """Blocks until `owner` may run something, all its needs are done, or it may not go on.

        Args:
            devices: what the owner's worker group occupies, for the budget.
        """
        if owner in self.leases.heartbeat:  # its driver was lost in a segment, and this is the next one
            await self._end_grant(owner)
        self.orders += 1
        self.keys |= {n.fingerprint: n.key for n in needs}
        waiter = _Waiter(owner, needs, self.orders)
        while True:
            answer = await self._turn(waiter)
            if not answer["run"]:
                return answer
            self.limits.start(owner, devices, time.monotonic())
            run, done = await self._claim_in_store([n for n in needs if n.fingerprint in answer["run"]])
            if run:
                logger.info("segment granted to %s: %s", owner, ", ".join(self.keys[f] for f in run))
                return {"run": run, "done": answer["done"] + done}
            await self._end_grant(owner)

    async def _turn(self, waiter: _Waiter) -> Answer:
        """Waits for this broker's own grant."""
        waiter.answer, waiter.granted = None, asyncio.Event()
        self.waiting.append(waiter)
        try:
            while True:
                self._serve()
                if waiter.answer is not None:
                    return waiter.answer
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(waiter.granted.wait(), HEARTBEAT_S)
                if waiter.answer is not None:
                    return waiter.answer
                for owner in self.leases.expire(time.monotonic()):
                    await self._end_grant(owner)
                await self._look_at_foreign()
        finally:
            if waiter in self.waiting:
                self.waiting.remove(waiter)

    def _serve(self) -> None:
        now = time.monotonic()
        stop = self.limits.reason(now)
        for waiter in sorted(self.waiting, key=lambda w: (-w.steps_left, w.order)):
            answer = self.leases.grant(waiter.owner, waiter.needs, now) if stop is None else self._stopped(waiter, stop)
            if answer is not None:
                waiter.answer = answer
                self.waiting.remove(waiter)
                waiter.granted.set()

    def _stopped(self, waiter: _Waiter, reason: str) -> Answer:
        done = [n.fingerprint for n in waiter.needs if n.fingerprint in self.leases.done]
        return {"run": [], "done": done} | ({"stop": reason} if len(done) < len(waiter.needs) else {})

    async def _claim_in_store(self, needs: list[Need]) -> tuple[list[str], list[str]]:
        """Which of the granted stages are this sweep's to run, and which somebody else has finished meanwhile."""
        if self.claims is None:
            return [n.fingerprint for n in needs], []
        taken, others = await asyncio.to_thread(self.claims.take, [n.key for n in needs])
        store = self.claims.store
        stored = set(await asyncio.to_thread(lambda: [key for key in taken if store.has(key)]))
        run, done = [], []
        for need in needs:
            if need.key in stored:
                done.append(need.fingerprint)
                await self.finish(need.fingerprint)
            elif need.key in taken:
                run.append(need.fingerprint)
            else:
                self.leases.leased.pop(need.fingerprint, None)
                if need.key in others:
                    self.leases.foreign.add(need.fingerprint)
        return run, done

    async def _look_at_foreign(self) -> None:
        """Stages that other sweeps make: which of them are finished, and which have been given up."""
        now = time.monotonic()
        if self.claims is None or not self.leases.foreign or now - self.looked < FOREIGN_POLL_S:
            return
        self.looked = now
        others = await asyncio.to_thread(self.claims.others)
        for fingerprint in list(self.leases.foreign):
            if await asyncio.to_thread(self.claims.store.has, self.keys[fingerprint]):
                self.leases.finish(fingerprint)
            elif self.keys[fingerprint] not in others:
                self.leases.foreign.discard(fingerprint)

    async def _end_grant(self, owner: str) -> None:
        self.limits.stop(owner, time.monotonic())
        unfinished = self.leases.release(owner)
        if self.claims is not None and unfinished:
            await asyncio.to_thread(self.claims.give_back, [self.keys[f] for f in unfinished])

    async def heartbeat(self, owner: str) -> None:
        self.leases.beat(owner, time.monotonic())

    async def admit(self, owner: str, fingerprint: str) -> bool:
        """Whether the next stage of a segment may start; the same answer to every worker of the group."""
        return self.admitted.setdefault((owner, fingerprint), self.limits.reason(time.monotonic()) is None)

    async def finish(self, fingerprint: str) -> None:
        """A stage's artifact is committed."""
        self.leases.finish(fingerprint)
        self._serve()
        if self.claims is not None:
            await asyncio.to_thread(self.claims.give_back, [self.keys[fingerprint]])

    async def settle(self, owner: str) -> None:
        """`owner`'s segment is over and its worker group is gone: its slot is free."""
        self.posts.pop(owner, None)
        await self._end_grant(owner)
        self._serve()

    async def release(self, owner: str, status: str) -> None:
        """`owner` has ended, done, failed, stopped or pruned, and asks for nothing more."""
        self.ended[owner] = status
        if status in ("done", "failed"):
            self.limits.outcomes.append(status == "done")
        self.jobs.pop(owner, None)
        self.entries.pop(owner, None)
        await self.settle(owner)

    async def spent(self, owner: str) -> float:
        """Device-seconds that `owner` has used up."""
        return self.limits.spent_by.get(owner, 0.0)

    async def fail(self, owner: str, fingerprint: str, reason: str) -> None:
        """A stage of `owner`'s segment met an error that a restart would meet again, in this row or in another."""
        logger.info("a stage of %s failed for good: %s", owner, reason.splitlines()[-1])
        self.fatal.setdefault(owner, reason)
        self.leases.failed.setdefault(fingerprint, reason)

    async def failure(self, owner: str) -> str | None:
        """The error that ended `owner`'s segment, if one did."""
        return self.fatal.get(owner)

    async def post(self, owner: str, facts: dict[str, Any], entries: Sequence[dict[str, Any]] = ()) -> None:
        """Progress of what `owner` runs.

        Args:
            facts: stage, fingerprint, step, steps, unit; where known loss and images_per_s.
            entries: new entries of the stage's curve.
        """
        before = self.posts.get(owner)
        if before is not None and before["fingerprint"] == facts["fingerprint"]:
            self.posts[owner] = before | facts
        else:
            self.posts[owner] = facts | {"first_step": facts["step"], "since": time.monotonic()}
        if entries:
            kept = self.entries.setdefault(owner, deque(maxlen=MAX_ENTRIES))
            kept.extend({"stage": facts["stage"], **entry} for entry in entries)

    async def collect(self, owner: str) -> list[dict[str, Any]]:
        """Curve entries of `owner`'s stages since the last call, each with its stage."""
        return list(self.entries.pop(owner, ()))

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

    async def board(self, num_known: int = 0) -> dict[str, Any]:
        """What a progress display shows: running, waiting and ended rows, stages done, device-seconds spent.

        Args:
            num_known: fingerprints of finished stages that the caller has had: only those after them are sent.
        """
        now = time.monotonic()
        return {
            "posts": {owner: post | {"stage_s": now - post["since"]} for owner, post in self.posts.items()},
            "waiting": [w.owner for w in self.waiting],
            "ended": self.ended,
            "done": self.leases.finished[num_known:],
            "device_s": self.limits.spent(now),
            "stop": self.limits.reason(now),
        }
