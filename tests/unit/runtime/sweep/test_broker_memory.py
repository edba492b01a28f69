"""A broker that is lost and started again, without Ray: what it knows, and what its rows do next."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cast_ray.plan.graph import Stage
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.claims import BROKERS, Presence, dead_claims
from cast_ray.runtime.sweep.broker import Broker
from cast_ray.runtime.sweep.leases import Need


def make_broker(*settings: Any, **more: Any) -> Any:
    """A broker as on a cluster, where it starts no process before a row asks for it."""
    return Broker.__ray_metadata__.modified_class(*settings, **more, by_turns=True)  # type: ignore[attr-defined]


PRETRAIN, ADAPT = Need("pre", "train", (), 8), Need("ada", "train", ("pre",), 6)
LABEL = Need("lab", "label", ("ada",), 0, alone=True)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path))


def test_the_next_broker_continues_the_sweep(store: ArtifactStore) -> None:
    async def scene() -> None:
        with Presence(store, "test") as presence:
            settings = (2, {"dataset"}, store.storage, presence.holder.id)
            lost = make_broker(*settings, budget_hours=2.0)
            await lost.load({"a": b"row a", "b": b"row b"}, ["stored"])
            await lost.load({"c": b"row c"})
            await lost.expect(4, {"stored": 7.0})
            await lost.claim("a", [PRETRAIN, ADAPT], 2, "a1")
            lost.limits.start("a", 2, lost.kept - 100)
            store.commit(Stage("pretrain", "train", {}, {}, "pre"), {})
            await lost.finish("pre")
            await lost.fail("b", "bad", "bad: the loss is not finite")
            await lost.release("b", "failed", "b1")
            store.commit(Stage("adapt", "train", {}, {}, "ada"), {})  # the broker was lost before it was told so

            broker = make_broker(*settings, budget_hours=2.0)
            assert await broker.which() != await lost.which()
            assert await broker.job("a") == b"row a" and await broker.job("c") == b"row c"
            board = await broker.board()
            assert board["done"] == ["stored", "pre"] and board["ended"] == {"b": "failed"}
            assert board["device_s"] >= 200 and broker.limits.outcomes == [False]
            ((_, row, text),) = board["notices"]
            assert row == "" and "broker was lost" in text and "last checkpoints" in text
            assert (await broker.board(0, 1))["notices"] == []
            # Its driver finds the worker group gone and asks again.
            assert await broker.lend("a", None, "run", "node", "a1") is None
            await broker.settle("a", "a1")
            assert await broker.claim("a", [PRETRAIN, ADAPT], 2, "a1") == {"run": [], "done": ["pre", "ada"]}
            failed = await broker.claim("c", [Need("bad", "train", (), 1)], 1, "c1")
            assert failed["failed"] == "bad: the loss is not finite"
            await broker.release("b", "failed", "b1")  # Ray makes calls again that were not answered
            assert broker.limits.outcomes == [False]
        assert store.list_names(BROKERS) == []

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_first_broker_has_lost_nothing_and_a_dead_sweeps_files_are_pruned(store: ArtifactStore) -> None:
    async def scene() -> None:
        broker = make_broker(1, set(), store.storage, "dead")
        await broker.load({"a": b"row"})
        assert (await broker.board())["notices"] == []
        assert set(dead_claims(store, 60)) == {f"{BROKERS}/rows-000001~dead", f"{BROKERS}/state~dead"}

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_labelling_job_outlives_the_broker_that_granted_it(store: ArtifactStore) -> None:
    async def scene() -> None:
        with Presence(store, "test") as presence:
            lost = make_broker(2, {"ada"}, store.storage, presence.holder.id)
            await lost.load({"a": b"", "b": b""})
            assert (await lost.claim("a", [LABEL], 2, "a1"))["run"] == ["lab"]
            await lost.adopt("a", "a1", [LABEL], 2)  # said with every heartbeat, for the case that it is new
            assert lost.leases.leased == {"lab": "a"}

            broker = make_broker(2, {"ada"}, store.storage, presence.holder.id)
            await broker.adopt("a", "a1", [LABEL], 2)
            assert broker.leases.leased == {"lab": "a"} and broker.limits.running["a"][1] == 2
            waiting = asyncio.ensure_future(broker.claim("b", [LABEL], 2, "b1"))
            await asyncio.sleep(0.01)
            assert not waiting.done()  # it is not made twice
            store.commit(Stage("label-adapted", "label", {}, {}, "lab"), {})
            await broker.finish("lab")
            assert await waiting == {"run": [], "done": ["lab"]}
            await broker.settle("a", "a1")
            await broker.adopt("a", "a1", [Need("late", "label", (), 0)], 2)  # from a thread that was overtaken
            assert broker.leases.leased == {} and "a" not in broker.leases.heartbeat

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_store_that_is_out_of_reach_ends_no_sweep(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("503")

    async def scene() -> None:
        broker = make_broker(1, set(), store.storage, "me")
        monkeypatch.setattr(broker.memory.store, "write_bytes", refuse)
        await broker.load({"a": b"row"})
        assert await broker.job("a") == b"row"

    asyncio.run(asyncio.wait_for(scene(), 60))
