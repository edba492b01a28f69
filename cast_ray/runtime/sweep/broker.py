"""Single flight over stages: a stage that several rows need runs once, and rows that wait for it hold no resources.

One async actor per sweep holds the leases and the progress board. A row's driver asks for work with everything it still
misses; the broker hands it the stages it may run now, or keeps the call open until something changes. At most `slots`
groups of leases are out at a time; among waiting rows the one with the most work left goes first. A lease lives as long
as its owner's heartbeat. An owner is a row; the process that drives it may be lost and started again, so every driver
process has an instance id, and what an earlier instance has asked for or still says is void. Before a stage is handed
out it is claimed in the store (`claims.py`), because other sweeps, each with a broker of its own, may need it too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cast_ray.common.logs import configure_logging
from cast_ray.contracts.compute_node import ComputeNode
from cast_ray.recipe import RuntimeConfig
from cast_ray.runtime.data.record_tables import load_records
from cast_ray.runtime.metrics import Outlet, SweepMetrics, SweepState
from cast_ray.runtime.placement import give_back, on_demand_share
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.claims import Claims
from cast_ray.runtime.sweep.broker_memory import BrokerMemory, BrokerState
from cast_ray.runtime.sweep.group_pool import GroupPool
from cast_ray.runtime.sweep.leases import REPLACED, Answer, Leases, Limits, Need
from cast_ray.runtime.sweep.notices import Notices
from cast_ray.runtime.sweep.posts import Posts
from cast_ray.runtime.sweep.rooms import Rooms
from cast_ray.runtime.sweep.waiters import Waiter, Waiters

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
FOREIGN_POLL_S = 5.0
MAX_TABLES = 16
TURN_LOOK_S = 0.5
KEEP_EVERY_S = 60.0
"""How often the device-seconds spent are written down; a broker that is lost forgets those since then."""
MAX_CALLS = 10_000
"""Most calls that are open at a time: one for each row that waits, and a few more."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Broker:
    """The actor around `Leases`, and the board where running stages post their progress.

    Args:
        storage, holder: where and in whose name stages are claimed; no holder: there is nobody to agree with.
        by_turns: segments that wait for room may be more than the cluster holds, see `hand_over`.
        sweep: its name in the metrics.
        is_open: rows may still be added while no known one is left, as in a search.
    """

    def __init__(
        self,
        slots: int,
        done: set[str],
        storage: str = "",
        holder: str = "",
        budget_hours: float | None = None,
        keep_going: bool = False,
        by_turns: bool = False,
        sweep: str = "",
        is_open: bool = False,
    ):
        configure_logging()
        self.by_turns = by_turns
        self.id = uuid.uuid4().hex
        self.leases = Leases(slots, done)
        self.limits = Limits(budget_hours, keep_going)
        self.claims = Claims(ArtifactStore(storage), holder) if holder else None
        self.keys: dict[str, str] = {}
        """Fingerprint -> artifact key of every stage that was asked for."""
        self.jobs: dict[str, bytes] = {}
        self.waiters = Waiters(self.leases, self.limits)
        self.groups = GroupPool(self.leases, self.limits, is_open, holder)
        self.instances: dict[str, str] = {}
        """Owner -> the driver process that asked last."""
        self.replaced: set[str] = set()
        """Driver processes in whose place another one has come."""
        self.devices: dict[str, int] = {}
        self.rooms, self.posts = Rooms(), Posts()
        self.notices = Notices(self.posts)
        self.ended: dict[str, str] = {}
        self.fatal: dict[str, str] = {}
        self.tables: dict[tuple[str, tuple[str, ...]], ray.ObjectRef] = {}
        self.admitted: dict[tuple[str, str], bool] = {}
        self.orders = 0
        self.looked = 0.0
        self.metrics = SweepMetrics(sweep)
        self.outlet = Outlet() if ray.is_initialized() else None
        self.num_expected = 0
        """Stages that are to run, as far as is known from the start."""
        self.num_lost = 0
        """Brokers of this sweep that were lost."""
        self.memory = BrokerMemory(self.claims.store, holder) if self.claims is not None else None
        self.keeping, self.kept = asyncio.Lock(), time.monotonic()
        if self.memory is not None and (known := self.memory.recall()) is not None:
            self._remember(*known)
            if ray.is_initialized():
                give_back(holder)  # what the lost worker groups had reserved

    def _remember(self, state: BrokerState, jobs: dict[str, bytes]) -> None:
        """Takes over what the lost broker has written down."""
        assert self.claims is not None
        self.claims.recall()
        self.num_lost = state.num_lost + 1
        self.jobs = jobs
        self.groups.asked |= dict.fromkeys(jobs)
        for fingerprint in state.finished:
            self.leases.finish(fingerprint)
        self.leases.failed |= state.failed
        self.limits.spent_s, self.limits.spent_by = state.device_s, state.device_s_by
        self.limits.outcomes, self.ended = state.outcomes, state.ended
        self.num_expected = state.num_expected
        self.metrics.device_s |= state.stored_device_s
        logger.warning("a broker of this sweep was lost; %d rows are taken over", len(jobs))
        self.notices.add(
            "",
            "the sweep's broker was lost, and all worker groups with it. Another broker has taken over: finished "
            "stages are in the store, the others resume from their last checkpoints",
        )

    async def _keep(self) -> None:
        """Writes down what the next broker has to know, should this one be lost."""
        if self.memory is None:
            return
        async with self.keeping:  # an older state must not be written last
            state = BrokerState(
                num_lost=self.num_lost,
                finished=self.leases.finished,
                device_s=self.limits.spent(time.monotonic()),
                device_s_by=self.limits.spent_by,
                outcomes=self.limits.outcomes,
                ended=self.ended,
                failed=self.leases.failed,
                num_expected=self.num_expected,
                stored_device_s=self.metrics.device_s,
            )
            await asyncio.to_thread(self.memory.keep, state)

    async def load(self, jobs: dict[str, bytes], stored: Sequence[str] = ()) -> None:
        """Keeps what each row's driver is to do, so that a driver fetches its own row and not all of them.

        Args:
            stored: fingerprints of stages of these rows that were found in the store.
        """
        self.jobs |= jobs
        self.groups.asked |= dict.fromkeys(jobs)
        if not self.by_turns:  # on a cluster a host starts beside the driver that asks for it
            self.groups.warm_up(len(self.jobs))
        for fingerprint in stored:
            self.leases.finish(fingerprint)
        if self.memory is not None:
            await asyncio.to_thread(self.memory.keep_rows, jobs)
            await self._keep()

    async def which(self) -> str:
        """Id of this broker; another one that has taken its place has another id."""
        return self.id

    async def expect(self, num_stages: int, device_s: Mapping[str, float]) -> None:
        """Tells the metrics how many stages are to run, and the device-seconds that those in the store have taken."""
        self.num_expected = num_stages
        self.metrics.device_s |= device_s

    async def job(self, name: str) -> bytes:
        return self.jobs[name]

    async def claim(
        self,
        owner: str,
        needs: list[Need],
        devices: int = 1,
        instance: str = "",
        runtime: RuntimeConfig | None = None,
    ) -> Answer:
        """Blocks until `owner` may run something, all its needs are done, or it must stop.

        Args:
            devices: what the owner's workers occupy, also while their group is kept; what else runs for a segment is
                told to `occupy`.
            instance: id of the driver process that asks. What earlier processes of this owner hold or wait for passes
                to it; one of them that is alive all the same is told to stop.
            runtime: what the owner's worker groups need, by which one that is parked is kept for it.
        """
        if instance in self.replaced:
            return REPLACED
        await self._take_over(owner, instance)
        self.orders += 1
        self.keys |= {n.fingerprint: n.key for n in needs}
        self.devices[owner] = devices
        self.groups.asked[owner] = (needs, runtime)
        waiter = Waiter(owner, needs, self.orders, instance, time.monotonic())
        while True:
            answer = await self._turn(waiter)
            self.metrics.took_over(owner, answer["done"])
            if not answer["run"]:
                return answer
            run, done = await self._claim_in_store([n for n in needs if n.fingerprint in answer["run"]])
            if instance in self.replaced:  # while the store was asked; the next process has been granted these stages
                return REPLACED
            self.metrics.took_over(owner, done)
            if run:
                if any(n.alone for n in needs if n.fingerprint in run):  # its labellers need the room of a worker group
                    self.groups.keep_within_slots()
                logger.info("segment granted to %s: %s", owner, ", ".join(self.keys[f] for f in run))
                return {"run": run, "done": answer["done"] + done}
            await self._end_grant(owner)

    async def _take_over(self, owner: str, instance: str) -> None:
        """Makes a driver process the owner's only one: its row's earlier processes are lost, whatever they did."""
        before = self.instances.get(owner)
        self.instances[owner] = instance
        if before is not None and before != instance:
            self.replaced.add(before)
            self.notices.add(owner, "its driver process was lost; another one takes over")
        self.waiters.replace(owner)
        self.posts.last.pop(owner, None)
        if owner in self.leases.heartbeat:  # the process was lost in a segment
            await self._end_grant(owner)
            if before:  # a labelling job's room, which the process reserved itself
                await self.groups.hosts.give_back(before)

    async def _turn(self, waiter: Waiter) -> Answer:
        """Waits for this broker's own grant."""
        self.waiters.add(waiter)
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
            self.waiters.remove(waiter)

    def _serve(self) -> None:
        self.waiters.serve(time.monotonic())

    async def _claim_in_store(self, needs: list[Need]) -> tuple[list[str], list[str]]:
        """Which of the granted stages are this sweep's to run, and which somebody else has finished meanwhile."""
        if self.claims is None:
            return [n.fingerprint for n in needs], []
        taken, others = await asyncio.to_thread(self.claims.take, [n.key for n in needs])
        store = self.claims.store
        # Another sweep's claim may be on a stage that it has finished.
        stored = set(await asyncio.to_thread(lambda: [key for key in (*taken, *others) if store.has(key)]))
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
        self.rooms.found(owner)
        self.rooms.leave(owner)
        self.limits.stop(owner, time.monotonic())
        unfinished = self.leases.release(owner)
        await self.groups.end(owner)
        if self.claims is not None and unfinished:
            await asyncio.to_thread(self.claims.give_back, [self.keys[f] for f in unfinished])

    async def heartbeat(self, owner: str, instance: str = "") -> None:
        """The driver process `instance` of `owner` is alive."""
        if instance in self.replaced:
            return
        now = time.monotonic()
        self.leases.beat(owner, now)
        self.waiters.heard_of(owner, instance, now)
        if now - self.kept > KEEP_EVERY_S:
            self.kept = now
            await self._keep()
        self._show(now)  # last: an error of it must not make a living driver look dead

    async def adopt(self, owner: str, instance: str, needs: list[Need], devices: int) -> None:
        """Leases `owner` the stages that it already runs outside of worker groups: a lost broker has granted them."""
        taken = self.leases.leased.keys() | self.leases.done
        if owner in self.instances or any(need.fingerprint in taken for need in needs):
            return
        now = time.monotonic()
        self.instances[owner] = instance
        self.devices[owner] = devices
        self.keys |= {need.fingerprint: need.key for need in needs}
        self.leases.leased |= dict.fromkeys((need.fingerprint for need in needs), owner)
        self.leases.heartbeat[owner] = now
        self.limits.start(owner, devices, now)

    async def wait_for_room(self, owner: str, what: str, why: str = "") -> None:
        """`owner`'s segment waits for resources of the cluster.

        Args:
            what, why: what it waits for, and the reason, in words. The time is counted from the first call
                since the segment last had room.
        """
        self.groups.close_all()  # their room may be what it waits for
        self.rooms.wait(owner, what, why, time.monotonic())

    async def hand_over(self, owner: str, nodes: Sequence[str]) -> bool:
        """Whether `owner`'s segment may exchange the reservation it holds on these nodes for those it runs in.

        During the exchange its resources are free for a moment. Waiting placement groups of other segments are older
        than those that it is about to make: they would take the resources, exchange them in turn, and so on for ever.
        So on each node only one segment at a time makes the exchange. A segment that is refused releases its own
        reservation and waits for `node_turn`.
        """
        return not self.by_turns or self.rooms.move(owner, nodes, time.monotonic())

    async def handed_over(self, owner: str) -> None:
        """`owner`'s workers have started: what it reserved is its own."""
        if self.rooms.started(owner):
            self.metrics.restarted()
            self.notices.add(owner, "one of its workers was lost; all of them have started again")

    async def node_turn(self, owner: str, nodes: Sequence[str]) -> None:
        """Returns when no other segment is exchanging its reservation on these nodes."""
        while self.rooms.is_moving(set(nodes), owner, time.monotonic()):
            await asyncio.sleep(TURN_LOOK_S)

    async def occupy(self, owner: str, devices: int | None = None) -> bool:
        """`owner`'s segment has found room and counts for the budget; False: nothing may start any more.

        Args:
            devices: that all its processes hold, see `resources.num_devices`; None: those of its workers.
        """
        self.rooms.found(owner)
        now = time.monotonic()
        if self.limits.reason(now) is not None:
            return False
        self.limits.start(owner, self.devices.get(owner, 1) if devices is None else devices, now)
        return True

    async def computes_on(self, owner: str, process: str, node: ComputeNode) -> None:
        """A process of `owner`'s segment has started on a machine; one that is started again takes its place."""
        self.rooms.nodes.setdefault(owner, {})[process] = node

    async def computed_on(self, owner: str) -> list[dict[str, Any]]:
        """The machines that `owner`'s segment runs on, each kind once, as plain data for a manifest."""
        return [node.plain() for node in self.rooms.computed_on(owner)]

    async def vacate(self, owner: str) -> None:
        """`owner`'s segment has given its room back, and waits again or ends."""
        self.rooms.leave(owner)
        self.limits.stop(owner, time.monotonic())

    async def lend(self, owner: str, shape: RuntimeConfig | None, run: str, node: str, instance: str = "") -> Any:
        """Lends the host of a worker group for the segment that `owner` was granted; see `GroupPool.lend`.

        A second call for a segment says that the host was lost. None: the grant has ended meanwhile, because the driver
        was thought to be dead, or its row was stopped.
        """
        if instance in self.replaced:
            return None
        if owner in self.groups.working:
            self.notices.add(owner, "the process that runs its worker group was lost; the group starts again")
        await self.groups.end(owner)
        if instance in self.replaced or owner not in self.leases.heartbeat:
            return None
        return self.groups.lend(owner, shape, self.devices.get(owner, 1), run, node)

    async def take_back(self, owner: str, is_kept: bool, instance: str = "") -> None:
        """`owner`'s segment is over; `is_kept`: its worker group waits for another one."""
        if instance not in self.replaced:
            self.groups.take_back(owner, is_kept)

    async def close_groups(self) -> None:
        """The sweep is over: returns when no worker group is left, and nothing of those that were interrupted."""
        await self.groups.closed()
        if self.claims is not None and self.groups.interrupted:
            await asyncio.to_thread(self.claims.store.forget_interrupted, self.groups.interrupted)

    async def admit(self, owner: str, fingerprint: str) -> bool:
        """Whether the next stage of a segment may start; the same answer to every worker of the group."""
        return self.admitted.setdefault((owner, fingerprint), self.limits.reason(time.monotonic()) is None)

    async def finish(self, fingerprint: str, device_s: float = 0.0) -> None:
        """A stage is committed: by its owner here, which took so many device-seconds, or by another sweep."""
        if (owner := self.leases.leased.get(fingerprint)) is not None:
            self.metrics.finished(owner, fingerprint, device_s)
        self.leases.finish(fingerprint)
        self.posts.reached.pop(fingerprint, None)
        self._serve()
        if self.claims is not None and fingerprint in self.keys:  # a broker that has taken over may not have been asked
            self.claims.finished([self.keys[fingerprint]])
        await self._keep()

    async def settle(self, owner: str, instance: str = "") -> None:
        """`owner`'s segment is over and its worker group is gone: its slot is free."""
        if instance in self.replaced:
            return
        if instance:
            self.instances.setdefault(owner, instance)
        self.posts.last.pop(owner, None)
        await self._end_grant(owner)
        self._serve()

    async def release(self, owner: str, status: str, instance: str = "") -> None:
        """`owner` has ended, done, failed, stopped or pruned, and asks for nothing more."""
        if instance in self.replaced:
            return
        if status in ("done", "failed") and owner not in self.ended:
            self.limits.outcomes.append(status == "done")
        self.ended[owner] = status
        if status == "pruned":  # its process runs until Tune ends it, and finds its worker group gone
            self.replaced.add(instance)
        self.jobs.pop(owner, None)
        self.posts.collect(owner)
        await self.settle(owner)
        self.groups.forget(owner)
        await self._keep()

    async def spent(self, owner: str) -> float:
        """Device-seconds that `owner` has used up."""
        return self.limits.spent_by.get(owner, 0.0)

    async def fail(self, owner: str, fingerprint: str, reason: str) -> None:
        """A stage of `owner`'s segment met an error that a restart would meet again, in this row or in another."""
        logger.info("a stage of %s failed for good: %s", owner, reason.splitlines()[-1])
        self.fatal.setdefault(owner, reason)
        self.leases.failed.setdefault(fingerprint, reason)
        await self._keep()

    async def failure(self, owner: str) -> str | None:
        """The error that ended `owner`'s segment, if one did."""
        return self.fatal.get(owner)

    async def begin(self, owner: str, facts: dict[str, Any]) -> None:
        """A stage of `owner` begins, or resumes; see `post` for the facts."""
        names = ("stage", "fingerprint", "step", "steps", "unit")
        self.notices.begin(owner, *(facts[name] for name in names))
        await self.post(owner, facts)

    async def note(self, owner: str, text: str) -> None:
        """Tells the user what `owner` has lost, in a sentence."""
        self.notices.add(owner, text)

    async def post(self, owner: str, facts: dict[str, Any], entries: Sequence[dict[str, Any]] = ()) -> None:
        """Progress of what `owner` runs.

        Args:
            facts: stage, fingerprint, step, steps, unit; where known the facts of `metrics.OF_POSTS`.
            entries: new entries of the stage's curve.
        """
        now = time.monotonic()
        if self.posts.add(owner, facts, entries, now):
            self.metrics.moved()
        self._show(now)

    async def collect(self, owner: str) -> list[dict[str, Any]]:
        """Curve entries of `owner`'s stages since the last call, each with its stage."""
        return self.posts.collect(owner)

    async def validated(self, owner: str, stage: str, mask_ap: float) -> None:
        """A model of `owner`'s stage was measured."""
        self.metrics.moved()
        self.metrics.validation_ap[owner, stage] = mask_ap

    async def labelled(self, owner: str, stage: str, num_images: int, num_labels: int) -> None:
        """A teacher has labelled images for `owner`'s training stage, with so many instances on them."""
        self.metrics.labelled(owner, stage, num_images, num_labels)

    async def advance(self, owner: str, count: int, num_labels: int = 0) -> None:
        """`count` more images of the labelling job that `owner` runs are done, with so many instances on them."""
        if (stage := self.posts.advance(owner, count, time.monotonic())) is not None:
            self.metrics.labelled(owner, stage, count, num_labels)

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

    async def board(self, num_known: int = 0, num_read: int = 0) -> dict[str, Any]:
        """What a progress display shows: running, waiting and ended rows, stages done, device-seconds spent.

        rooms: owner -> what its segment waits for, why, and for how many seconds by now; running: owners of the
        segments that have room; notices: number, row and text of what was lost; broker: see `which`.

        Args:
            num_known: fingerprints of finished stages that the caller has had: only those after them are sent.
            num_read: number of the last notice that the caller has had.
        """
        now = time.monotonic()
        return {
            "posts": self.posts.shown(now),
            "waiting": [w.owner for w in self.waiters.all],
            "rooms": self.rooms.shown(now),
            "running": list(self.limits.running),
            "ended": self.ended,
            "broker": self.id,
            "notices": self.notices.since(num_read),
            "done": self.leases.finished[num_known:],
            "device_s": self.limits.spent(now),
            "stop": self.limits.reason(now),
        }

    def _show(self, now: float) -> None:
        """Refreshes the metrics, when they are due."""
        if self.outlet is not None and self.metrics.is_due(now):
            self.outlet.show(self.metrics.samples(self._state(now)))

    def _state(self, now: float) -> SweepState:
        rows = Counter(self.ended.values())
        rows |= {"running": len(self.limits.running), "waiting for room": len(self.rooms.waiting)}
        rows["waiting for a stage"] = len(self.waiters.all)
        return SweepState(
            stages=self.leases.counts(set(self.keys), self.limits.running, self.num_expected),
            rows=rows,
            posts=self.posts.last,
            nodes=self.rooms.node_types(),
            claims=len(self.leases.leased) if self.claims is not None else 0,
            room_wait_s=self.rooms.longest_wait_s(now),
            device_s=self.limits.spent(now),
            budget_s=self.limits.budget_s,
        )


def start_broker(*settings: Any, **more: Any) -> Any:
    """Starts a sweep's broker on an on-demand node, where the cluster names some, else on the node of this process:
    where that is lost, the sweep ends anyway.

    Args:
        settings, more: as of `Broker`.
    """
    options: dict[str, Any] = {"max_concurrency": MAX_CALLS}
    if share := on_demand_share(ray.cluster_resources()):
        options["resources"] = share
    else:
        here = ray.get_runtime_context().get_node_id()
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=True)
    return Broker.options(**options).remote(*settings, **more)  # type: ignore[attr-defined]
