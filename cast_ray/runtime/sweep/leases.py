"""The broker's bookkeeping, without Ray: which row runs what, what is done, which row is next, and when to stop."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from cast_ray.plan.graph import artifact_key

LEASE_TIMEOUT_S = 30.0
FAILURES_BEFORE_STOP = 3

Answer = dict[str, Any]
"""run: fingerprints to run now; done: those that need not run; where set, failed: why the row cannot end; stop: why
nothing is started any more."""
REPLACED: Answer = {"run": [], "done": [], "stop": "another process drives this row now"}


@dataclass
class Need:
    """One missing stage as a row's driver names it to the broker."""

    fingerprint: str
    kind: str
    parents: tuple[str, ...]
    steps: int
    alone: bool = False
    """Whether the stage runs as a separate job, outside the worker group of the stages before and after it."""

    @property
    def key(self) -> str:
        return artifact_key(self.kind, self.fingerprint)


class Leases:
    """Knows which row runs what, what is done, and which row is next."""

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

    def counts(self, asked: set[str], running: Container[str], num_expected: int) -> dict[str, int]:
        """State -> number of stages; those that are done count from the start of the sweep.

        Args:
            asked: fingerprints that rows have asked for.
            running: owners whose segments have room.
            num_expected: stages that are to run, as far as was known from the start; rows may not have asked for all.
        """
        done, failed = len(self.finished), len(self.failed)
        active = {fingerprint for fingerprint, owner in self.leased.items() if owner in running}
        left = max(len(asked - self.done - self.failed.keys()), num_expected - done - failed)
        return {"waiting": left - len(active), "running": len(active), "done": done, "failed": failed}

    def free_slot(self) -> bool:
        return len(self.heartbeat) < self.slots

    def beat(self, owner: str, now: float) -> None:
        if owner in self.heartbeat:
            self.heartbeat[owner] = now

    def expire(self, now: float) -> list[str]:
        """Returns the owners whose heartbeat has stopped and whose leases are to be released."""
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
        budget_hours: device-hours, counted from when a stage's resources are found until its worker group is gone: what
            waits for room costs nothing, a group that is parked for the next row does; None: no limit.
        keep_going: continue even if the first FAILURES_BEFORE_STOP rows that ended have all failed.
    """

    def __init__(self, budget_hours: float | None, keep_going: bool):
        self.budget_s = None if budget_hours is None else budget_hours * 3600
        self.keep_going = keep_going
        self.spent_s = 0.0
        self.spent_by: dict[str, float] = {}
        self.running: dict[str, tuple[float, int]] = {}
        self.parked: dict[str, tuple[float, int]] = {}
        """Worker groups that wait for their next segment: since when, and how many devices they hold."""
        self.outcomes: list[bool] = []

    def start(self, owner: str, devices: int, now: float) -> None:
        self.stop(owner, now)
        self.running[owner] = (now, devices)

    def stop(self, owner: str, now: float) -> None:
        since, devices = self.running.pop(owner, (now, 0))
        self.spent_s += (now - since) * devices
        self.spent_by[owner] = self.spent_by.get(owner, 0.0) + (now - since) * devices

    def park(self, group: str, devices: int, now: float) -> None:
        """A worker group begins to hold devices without an owner."""
        self.parked[group] = (now, devices)

    def unpark(self, group: str, now: float) -> None:
        since, devices = self.parked.pop(group, (now, 0))
        self.spent_s += (now - since) * devices

    def spent(self, now: float) -> float:
        """Device-seconds up to now."""
        holding = (*self.running.values(), *self.parked.values())
        return self.spent_s + sum((now - since) * devices for since, devices in holding)

    def reason(self, now: float) -> str | None:
        """Returns the reason why no further stage may start; None if stages may start."""
        if self.budget_s is not None and self.spent(now) >= self.budget_s:
            return f"the budget of {self.budget_s / 3600:g} device-hours is spent"
        if not self.keep_going and len(self.outcomes) >= FAILURES_BEFORE_STOP and not any(self.outcomes):
            return f"the first {len(self.outcomes)} rows failed (--keep-going starts the others nevertheless)"
        return None
