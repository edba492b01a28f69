"""Worker groups without Ray: who is lent which, how long one is parked, and what ends it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray

from cast_ray.recipe import RuntimeConfig
from cast_ray.runtime.sweep import group_pool as pool_module
from cast_ray.runtime.sweep.broker import Broker
from cast_ray.runtime.sweep.group_pool import GroupPool
from cast_ray.runtime.sweep.leases import Leases, Limits, Need

make_broker: Any = Broker.__ray_metadata__.modified_class  # type: ignore[attr-defined]
SMALL, LARGE = RuntimeConfig(), RuntimeConfig(num_workers=2)


def need(name: str, *parents: str, alone: bool = False) -> Need:
    return Need(name, "label" if alone else "train", parents, 1, alone)


class Method:
    """A method of an actor: `await actor.method.remote()`."""

    def __init__(self, call: Any):
        self.remote = call


@dataclass(eq=False)
class Host:
    """Stands for a host's process."""

    name: str
    num_closed: int = 0
    is_lost: bool = False

    @property
    def close(self) -> Method:
        return Method(self._close)

    async def _close(self) -> None:
        await asyncio.sleep(0.01)
        if self.is_lost:
            raise ray.exceptions.ActorDiedError
        self.num_closed += 1


@dataclass
class FakeHosts:
    started: list[Host] = field(default_factory=list)
    nodes: list[str | None] = field(default_factory=list)
    killed: list[Host] = field(default_factory=list)
    holders: dict[str, Host] = field(default_factory=dict)
    given_back: list[str] = field(default_factory=list)

    def start(self, holder: str, node: str | None) -> Host:
        host = self.holders[holder] = Host(f"host {len(self.started)}")
        self.started.append(host)
        self.nodes.append(node)
        return host

    async def kill(self, actor: Host, holder: str) -> None:
        assert self.holders[holder] is actor
        await asyncio.sleep(0)
        self.killed.append(actor)

    async def give_back(self, holder: str) -> None:
        self.given_back.append(holder)


def pool_of(hosts: FakeHosts | None = None, limits: Limits | None = None) -> GroupPool:
    """A pool of a sweep to which rows may still be added."""
    return GroupPool(Leases(9, set()), limits or Limits(None, False), is_open=True, hosts=hosts or FakeHosts())


def test_a_parked_group_is_lent_to_a_segment_of_its_shape() -> None:
    async def scene() -> None:
        hosts = FakeHosts()
        pool = pool_of(hosts)
        first = pool.lend("a", SMALL, 1, "run-a", "n1")
        pool.take_back("a", True)
        assert pool.lend("b", LARGE, 2, "run-b", "n2") is not first  # another shape
        assert pool.lend("c", None, 1, "run-c", "n3") is not first  # a segment that cannot share
        assert pool.lend("d", SMALL, 1, "run-d", "n4") is first
        assert pool.lend("e", SMALL, 1, "run-e", "n5") is not first  # it is at work
        assert hosts.nodes == ["n1", "n2", "n3", "n5"] and pool.parked == []
        pool.take_back("c", False)
        assert pool.parked == [] and pool.lend("f", LARGE, 2, "run-f", "n1") is hosts.started[2]  # its process is kept
        pool.take_back("nobody", True)

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_parked_group_ends_after_some_seconds_and_its_process_serves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        limits = Limits(None, False)
        pool = pool_of(limits=limits)
        host = pool.lend("a", SMALL, 3, "run-a", "n1")
        pool.take_back("a", True)
        first = pool.parked[0].timer
        assert first is not None and first.when() > asyncio.get_running_loop().time()
        assert pool.lend("b", SMALL, 3, "run-b", "n1") is host and first.cancelled()
        monkeypatch.setattr(pool_module, "PARK_S", 0.05)
        pool.take_back("b", True)
        while pool.parked:
            await asyncio.sleep(0.01)
        await pool.closed()
        assert host.num_closed == 1 and limits.parked == {}
        assert 3 * 0.05 <= limits.spent_s < 3 * 60  # of a budget, the time in which it served nobody
        assert pool.lend("c", LARGE, 2, "run-c", "n1") is host
        await pool.closed()
        assert host.num_closed == 1 and pool.working == {}

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_hosts_of_the_first_rows_start_before_they_are_asked_for() -> None:
    async def scene() -> None:
        broker, hosts = broker_of(2)
        await broker.load({"a": b""})
        assert len(hosts.started) == 1
        await broker.load({"b": b"", "c": b""})
        assert hosts.nodes == [None, None]  # no more than slots
        await serve(broker, "a", [need("x")])
        await broker.claim("b", [need("y")], 2, "b", LARGE)
        await broker.lend("b", LARGE, "run-b", "n1", "b")
        assert len(hosts.started) == 2
        await broker.close_groups()

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_what_no_row_will_come_for_ends_at_once() -> None:
    async def scene() -> None:
        pool = pool_of()
        small, large = pool.lend("a", SMALL, 1, "run-a", ""), pool.lend("b", LARGE, 2, "run-b", "")
        pool.take_back("a", True)
        pool.is_open, pool.asked = False, {"c": ([need("x")], LARGE)}
        pool.take_back("b", True)
        assert [group.actor for group in pool.parked] == [large]
        pool.forget("c")
        assert pool.parked == []
        await pool.closed()
        assert small.num_closed == large.num_closed == 1

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_the_oldest_parked_groups_give_way() -> None:
    async def scene() -> None:
        pool = pool_of()
        hosts = [pool.lend(owner, SMALL, 1, owner, "") for owner in "abc"]
        for owner in "abc":
            pool.take_back(owner, True)
        pool.leases.heartbeat, pool.leases.slots = {"d": 0.0}, 3
        pool.keep_within_slots()
        assert [group.actor for group in pool.parked] == hosts[1:]
        pool.leases.slots = 1
        pool.keep_within_slots()
        await pool.closed()
        assert [host.num_closed for host in hosts] == [1, 1, 1]

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_hosts_that_are_lost_are_not_lent_again() -> None:
    async def scene() -> None:
        hosts = FakeHosts()
        pool = pool_of(hosts)
        first = pool.lend("a", SMALL, 1, "run-a", "")
        await pool.end("a")
        second = pool.lend("a", SMALL, 1, "run-b", "")
        assert second is not first and hosts.killed == [first]
        pool.take_back("a", True)
        second.is_lost = True
        await pool.closed()
        assert hosts.killed == [first, second] and pool.idle == [] and pool.interrupted == ["run-a", "run-b"]
        await pool.end("nobody")

    asyncio.run(asyncio.wait_for(scene(), 60))


def broker_of(slots: int, *owners: str, **settings: Any) -> tuple[Any, FakeHosts]:
    """A broker with rows to come, and its hosts."""
    broker = make_broker(slots, set(), **settings)
    broker.groups.asked = dict.fromkeys(owners)
    broker.groups.hosts = FakeHosts()
    return broker, broker.groups.hosts


async def serve(broker: Any, owner: str, needs: list[Need], runtime: RuntimeConfig = SMALL) -> Host:
    """A driver's walk through one segment; returns the host that ran it."""
    answer = await broker.claim(owner, needs, runtime.num_workers, owner, runtime)
    host = await broker.lend(owner, runtime, f"run-{owner}", "node", owner)
    assert await broker.occupy(owner)
    for fingerprint in answer["run"]:
        await broker.finish(fingerprint)
    await broker.take_back(owner, True, owner)
    await broker.settle(owner, owner)
    return host


def test_rows_of_a_sweep_share_their_groups() -> None:
    async def scene() -> None:
        broker, hosts = broker_of(1, "a", "b", "c")
        first = await serve(broker, "a", [need("x")])
        assert (await broker.board())["running"] == [] and len(broker.groups.parked) == 1
        await broker.release("a", "done", "a")
        assert await serve(broker, "b", [need("y")]) is first
        await broker.release("b", "done", "b")
        assert await serve(broker, "c", [need("z")]) is first and len(hosts.started) == 1
        assert broker.groups.parked == []  # the last row has nothing left to run
        await broker.close_groups()
        assert first.num_closed == 1 and hosts.killed == []
        assert broker.limits.running == broker.limits.parked == {}

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_row_that_cannot_come_keeps_no_group() -> None:
    async def scene() -> None:
        broker, _ = broker_of(3, "a", "b", "c", "d")
        await broker.claim("b", [need("y")], 1, "b", SMALL)
        await broker.lend("b", SMALL, "run", "node", "b")  # all it needs runs already
        await broker.claim("c", [need("z")], 2, "c", LARGE)
        await broker.finish("z")
        await broker.fail("nobody", "w", "no memory")
        assert (await broker.claim("d", [need("w")], 1, "d", SMALL))["failed"]
        await serve(broker, "a", [need("x")])
        assert broker.groups.parked == []
        broker.groups.is_open = True  # in a search the next point is proposed when this one is done
        await serve(broker, "a", [need("x2")])
        assert len(broker.groups.parked) == 1
        broker.limits.budget_s = 0.0
        await broker.release("a", "done", "a")
        assert broker.groups.parked == []
        await broker.close_groups()

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_row_that_waits_for_a_stage_keeps_a_group_until_it_has_no_use_for_it() -> None:
    async def scene() -> None:
        broker, _ = broker_of(2, "a", "b", "c")
        await broker.claim("b", [need("y")], 1, "b", SMALL)
        await broker.lend("b", SMALL, "run", "node", "b")
        waits = asyncio.ensure_future(broker.claim("c", [need("y"), need("z", "y")], 1, "c", SMALL))
        await asyncio.sleep(0)
        host = await serve(broker, "a", [need("x")])
        await broker.release("a", "done", "a")
        assert [group.actor for group in broker.groups.parked] == [host]
        await broker.release("c", "failed", "c")
        waits.cancel()
        assert broker.groups.parked == []
        await broker.close_groups()

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_row_that_was_granted_a_segment_is_about_to_come() -> None:
    async def scene() -> None:
        broker, _ = broker_of(2, "a", "b")
        await broker.claim("b", [need("y")], 1, "b", SMALL)
        host = await serve(broker, "a", [need("x")])
        await broker.release("a", "done", "a")  # before the driver of b has had its answer
        assert await broker.lend("b", SMALL, "run", "node", "b") is host

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_parked_groups_give_way_to_who_needs_their_room() -> None:
    async def scene() -> None:
        broker, _ = broker_of(2, *"abcd")
        await serve(broker, "a", [need("x")])
        await broker.claim("b", [need("y")], 2, "b", LARGE)
        await broker.lend("b", LARGE, "run-b", "node", "b")
        assert len(broker.groups.parked) == 1  # two slots, of which one is taken
        await broker.wait_for_room("b", "{CPU 2}")
        assert broker.groups.parked == []
        await broker.take_back("b", False, "b")
        await broker.settle("b", "b")
        for owner, alone in (("c", False), ("d", True)):  # both take a slot: nobody may hold a third one's room
            await serve(broker, "a", [need(f"x {owner}")])
            if owner == "d":
                await broker.claim("c", [need("z")], 2, "c", LARGE)
            await broker.claim(owner, [need(f"of {owner}", alone=alone)], 2, owner, LARGE)
            if not alone:
                await broker.lend(owner, LARGE, "run", "node", owner)
                broker.leases.slots = 1
                await broker.lend(owner, LARGE, "run", "node", owner)
                broker.leases.slots = 2
                await broker.finish(f"of {owner}")
                await broker.settle(owner, owner)
            assert broker.groups.parked == []
        await broker.close_groups()

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_the_group_of_a_lost_driver_ends_with_it() -> None:
    async def scene() -> None:
        broker, hosts = broker_of(1, "a")
        await broker.claim("a", [need("x")], 1, "a1", SMALL)
        first = await broker.lend("a", SMALL, "run", "node", "a1")
        assert await broker.claim("a", [need("x")], 1, "a2", SMALL) == {"run": ["x"], "done": []}
        assert hosts.killed == [first] and hosts.given_back == ["a1"]
        assert await broker.lend("a", SMALL, "run", "node", "a1") is None
        await broker.take_back("a", True, "a1")
        second = await broker.lend("a", SMALL, "run", "node", "a2")
        third = await broker.lend("a", SMALL, "run", "node", "a2")  # the host was lost
        assert hosts.killed == [first, second] and third is hosts.started[2]
        await broker.release("a", "failed", "a2")
        assert hosts.killed[-1] is third
        assert await broker.lend("a", SMALL, "run", "node", "a2") is None

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_pruned_row_is_given_nothing_more() -> None:
    async def scene() -> None:
        broker, hosts = broker_of(1, "a")
        await broker.claim("a", [need("x")], 1, "a1", SMALL)
        host = await broker.lend("a", SMALL, "run", "node", "a1")
        await broker.release("a", "pruned", "a1")
        assert hosts.killed == [host] and await broker.lend("a", SMALL, "run", "node", "a1") is None
        assert (await broker.claim("a", [need("x")], 1, "a1", SMALL))["run"] == []
        await broker.release("a", "stopped", "a1")
        assert (await broker.board())["ended"] == {"a": "pruned"}

    asyncio.run(asyncio.wait_for(scene(), 60))
