"""The broker without Ray: single flight, segments, slots, priority, dead owners, limits, other sweeps' stages."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cast_ray.contracts.compute_node import ComputeNode
from cast_ray.plan.graph import Stage
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.claims import Presence
from cast_ray.runtime.sweep import broker as broker_module
from cast_ray.runtime.sweep import rooms as rooms_module
from cast_ray.runtime.sweep.broker import Broker, start_broker
from cast_ray.runtime.sweep.leases import LEASE_TIMEOUT_S, Leases, Limits, Need

PRETRAIN = Need("pre", "train", (), 8)
ADAPT = Need("ada", "train", ("pre",), 6)
LABEL = Need("lab", "label", ("ada",), 0, alone=True)
DISTILL = Need("dis", "train", ("lab",), 8)
REFINE = Need("ref", "train", ("dis",), 4)
EVALUATE = Need("eva", "evaluate", ("ref",), 0)
ADAPT_ALONE = Need("alone", "train", (), 5)
ROW = [PRETRAIN, ADAPT, LABEL, DISTILL, REFINE, EVALUATE]


def finish(leases: Leases, owner: str, answer: dict[str, list[str]] | None) -> None:
    assert answer is not None
    for fingerprint in answer["run"]:
        leases.finish(fingerprint)
    leases.release(owner)


def test_a_row_is_cut_into_segments() -> None:
    leases = Leases(1, set())
    seen = []
    for now in range(3):
        answer = leases.grant("a", ROW, now)
        seen.append(answer)
        finish(leases, "a", answer)
    assert seen == [
        {"run": ["pre", "ada"], "done": []},
        {"run": ["lab"], "done": ["pre", "ada"]},  # a labelling job is a segment of its own
        {"run": ["dis", "ref", "eva"], "done": ["pre", "ada", "lab"]},
    ]
    assert leases.grant("a", ROW, 9) == {"run": [], "done": [n.fingerprint for n in ROW]}


def test_labels_by_the_training_workers_are_part_of_their_segment() -> None:
    row = [PRETRAIN, ADAPT, Need("lab", "label", ("ada",), 0), DISTILL, REFINE, EVALUATE]
    assert Leases(1, set()).grant("a", row, 0) == {"run": [n.fingerprint for n in row], "done": []}


def test_a_stage_in_flight_is_not_given_twice() -> None:
    leases = Leases(4, set())
    first = leases.grant("a", [PRETRAIN], 0)
    assert first == {"run": ["pre"], "done": []}
    assert leases.grant("b", [PRETRAIN], 0) is None
    assert leases.grant("b", ROW, 0) is None  # its children neither
    finish(leases, "a", first)
    assert leases.grant("b", [PRETRAIN], 0) == {"run": [], "done": ["pre"]}


def test_what_does_not_wait_runs_beside_a_stage_in_flight() -> None:
    leases = Leases(4, set())
    leases.grant("a", [PRETRAIN], 0)
    alone = Need("alone", "train", (), 5)
    assert leases.grant("b", [PRETRAIN, ADAPT, alone], 0) == {"run": ["alone"], "done": []}


def test_a_committed_stage_frees_its_children_before_its_segment_is_over() -> None:
    leases = Leases(2, set())
    leases.grant("a", [PRETRAIN, ADAPT], 0)
    leases.finish("pre")
    other = Need("ada2", "train", ("pre",), 6)
    assert leases.grant("b", [PRETRAIN, other], 0) == {"run": ["ada2"], "done": ["pre"]}


def test_without_a_labelling_job_a_row_is_one_segment() -> None:
    leases = Leases(1, set())
    row = [replace(need, alone=False) for need in ROW]
    assert leases.grant("a", row, 0) == {"run": ["pre", "ada", "lab", "dis", "ref", "eva"], "done": []}


def test_a_labelling_job_does_not_join_what_is_before_it() -> None:
    leases = Leases(1, {"ada"})
    train = Need("other", "train", (), 3)
    assert leases.grant("a", [train, LABEL], 0) == {"run": ["other"], "done": []}


def test_stages_found_in_the_store_are_done() -> None:
    leases = Leases(1, {"pre", "ada", "lab"})
    assert leases.grant("a", ROW, 0) == {"run": ["dis", "ref", "eva"], "done": ["pre", "ada", "lab"]}


def test_slots_bound_what_runs_at_a_time() -> None:
    leases = Leases(2, {"done"})
    needs = [[Need(f"n{i}", "train", (), 1)] for i in range(3)]
    answers = [leases.grant(f"o{i}", needs[i], 0) for i in range(3)]
    assert [a is None for a in answers] == [False, False, True]
    assert leases.grant("o2", [Need("done", "train", (), 1)], 0) == {"run": [], "done": ["done"]}  # needs no slot
    leases.finish("n0")
    assert leases.grant("o2", needs[2], 0) is None  # its worker group is still up
    leases.release("o0")
    assert leases.grant("o2", needs[2], 0) == {"run": ["n2"], "done": []}


def test_the_lease_of_a_dead_owner_passes_on() -> None:
    leases = Leases(2, set())
    leases.grant("a", [PRETRAIN, ADAPT], now=0)
    leases.finish("pre")
    leases.beat("a", now=20)
    assert leases.expire(now=20 + LEASE_TIMEOUT_S) == []
    assert leases.grant("b", [PRETRAIN, ADAPT], now=40) is None
    assert leases.expire(now=20 + LEASE_TIMEOUT_S + 1) == ["a"] and leases.release("a") == ["ada"]
    assert leases.grant("b", [PRETRAIN, ADAPT], now=60) == {"run": ["ada"], "done": ["pre"]}
    leases.beat("a", now=100)  # a late heartbeat of the dead gives nothing back
    assert leases.leased == {"ada": "b"} and "a" not in leases.heartbeat


def test_an_owner_that_only_waits_cannot_die() -> None:
    leases = Leases(1, set())
    leases.grant("a", [PRETRAIN], now=0)
    assert leases.grant("b", [PRETRAIN], now=0) is None
    leases.beat("a", now=50)
    assert leases.expire(now=50) == [] and set(leases.heartbeat) == {"a"}


# The actor's class without its Ray wrapper: the same methods on an event loop of ours.
make_broker: Any = Broker.__ray_metadata__.modified_class  # type: ignore[attr-defined]


async def started(*calls: Any) -> list[asyncio.Task]:
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(0)
    return tasks


def test_who_waits_is_told_that_it_is_done() -> None:
    async def scene() -> None:
        broker = make_broker(2, set())
        assert await broker.claim("a", [PRETRAIN]) == {"run": ["pre"], "done": []}
        (waiting,) = await started(broker.claim("b", [PRETRAIN]))
        assert (await broker.board())["waiting"] == ["b"]
        await broker.finish("pre")
        assert await waiting == {"run": [], "done": ["pre"]}
        board = await broker.board()
        assert board["waiting"] == [] and board["done"] == ["pre"]
        assert (await broker.board(1))["done"] == []  # what was sent is not sent again

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_free_slot_goes_to_the_row_with_most_work_left() -> None:
    async def scene() -> None:
        broker = make_broker(1, set())
        await broker.claim("a", [PRETRAIN])
        order: list[str] = []

        async def claim(owner: str, *needs: Need) -> None:
            await broker.claim(owner, list(needs))
            order.append(owner)

        tasks = await started(
            claim("short", Need("s", "train", (), 3)),
            claim("long", Need("l", "train", (), 5), Need("l2", "label", ("l",), 0)),
            claim("as-long", Need("m", "train", (), 5)),
        )
        for owner, ended in (("a", "pre"), ("long", "l"), ("as-long", "m")):
            await broker.finish(ended)
            await broker.settle(owner)
            tasks = list((await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))[1])
        assert order == ["long", "as-long", "short"]

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_row_that_ends_frees_what_it_held() -> None:
    async def scene() -> None:
        broker = make_broker(1, set())
        await broker.claim("a", [PRETRAIN])
        await broker.post("a", {"stage": "pretrain", "fingerprint": "pre", "step": 0, "steps": 8, "unit": "step"})
        (waiting,) = await started(broker.claim("b", [PRETRAIN]))
        await broker.release("a", "failed")  # the stage was not finished, and may succeed in another row
        assert await waiting == {"run": ["pre"], "done": []}
        board = await broker.board()
        assert board["ended"] == {"a": "failed"} and board["posts"] == {}

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_the_board_counts_from_where_a_stage_was_entered() -> None:
    async def scene() -> None:
        broker = make_broker(1, set())
        distill = {"stage": "distill", "fingerprint": "dis", "steps": 60, "unit": "step"}
        await broker.post("a", distill | {"step": 40})
        await broker.post("a", distill | {"step": 50, "loss": 2.0})
        post = (await broker.board())["posts"]["a"]
        assert (post["first_step"], post["step"], post["loss"]) == (40, 50, 2.0) and post["stage_s"] >= 0
        await broker.post("a", {"stage": "label", "fingerprint": "lab", "step": 0, "steps": 9, "unit": "image"})
        await broker.advance("a", 4)
        await broker.advance("nobody", 4)
        post = (await broker.board())["posts"]["a"]
        assert (post["first_step"], post["step"]) == (4, 4) and "loss" not in post  # the labellers' start is no pace
        await broker.advance("a", 3)
        post = (await broker.board())["posts"]["a"]
        assert (post["first_step"], post["step"]) == (4, 7) and post["images_per_s"] > 0

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_stage_that_cannot_succeed_fails_every_row_that_needs_it() -> None:
    async def scene() -> None:
        broker = make_broker(1, set())
        await broker.claim("a", [PRETRAIN])
        (waiting,) = await started(broker.claim("b", ROW))
        await broker.fail("a", "pre", "pretrain: out of memory")
        await broker.settle("a")
        assert await waiting == {"run": [], "done": [], "failed": "pretrain: out of memory"}
        assert await broker.failure("a") == "pretrain: out of memory" and await broker.failure("b") is None
        other = Need("other", "train", (), 1)
        assert await broker.claim("c", [other]) == {"run": ["other"], "done": []}

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_the_next_driver_of_a_lost_row_gets_its_stages_back() -> None:
    async def scene() -> None:
        broker = make_broker(1, set())
        await broker.claim("a", [PRETRAIN, ADAPT])
        await broker.finish("pre")
        assert await broker.claim("a", [PRETRAIN, ADAPT]) == {"run": ["ada"], "done": ["pre"]}

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_driver_that_dies_while_it_waits_is_replaced_by_the_next_one() -> None:
    async def scene() -> None:
        broker = make_broker(1, set())
        await broker.claim("a", [PRETRAIN], 1, "a1")
        (dead,) = await started(broker.claim("b", [ADAPT_ALONE], 1, "b1"))
        (alive,) = await started(broker.claim("b", [ADAPT_ALONE], 1, "b2"))  # Tune has started the row's driver again
        assert (await broker.board())["waiting"] == ["b"]  # once: the dead process waits for nothing
        assert (await dead)["stop"].startswith("another process")
        await broker.finish("pre")
        await broker.settle("a", "a1")
        assert await alive == {"run": ["alone"], "done": []}
        # What the first process still says, should it live on a node that was cut off, changes nothing.
        before = broker.leases.heartbeat["b"]
        await broker.heartbeat("b", "b1")
        await broker.settle("b", "b1")
        await broker.release("b", "failed", "b1")
        assert (await broker.claim("b", [ADAPT_ALONE], 1, "b1"))["run"] == []
        assert broker.leases.heartbeat == {"b": before} and broker.leases.leased == {"alone": "b"}
        assert (await broker.board())["ended"] == {}
        await broker.heartbeat("b", "b2")
        assert broker.leases.heartbeat["b"] > before

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_driver_that_is_silent_is_granted_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose driver died while it waited, and is not started again, must not take the only slot."""
    clock = [1000.0]
    monkeypatch.setattr(broker_module.time, "monotonic", lambda: clock[0])

    async def scene() -> None:
        broker = make_broker(1, set())
        await broker.claim("a", [PRETRAIN], 1, "a1")
        dead, alive = await started(
            broker.claim("b", [Need("long", "train", (), 99)], 1, "b1"), broker.claim("c", [ADAPT_ALONE], 1, "c1")
        )
        clock[0] += LEASE_TIMEOUT_S + 1
        await broker.heartbeat("c", "c1")
        await broker.settle("a", "a1")
        assert await alive == {"run": ["alone"], "done": []} and not dead.done()
        await broker.heartbeat("b", "b1")  # it was only slow
        await broker.settle("c", "c1")
        assert (await dead)["run"] == ["long"]

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_the_budget_counts_what_has_room() -> None:
    async def scene() -> None:
        broker = make_broker(2, set(), budget_hours=1.0)
        await broker.claim("a", [PRETRAIN], 3)
        await broker.wait_for_room("a", "3 x {GPU 1}")
        await asyncio.sleep(0.05)
        await broker.wait_for_room("a", "3 x {GPU 1}", "none is free")
        board = await broker.board()
        room = board["rooms"]["a"]
        assert (room["what"], room["why"]) == ("3 x {GPU 1}", "none is free") and room["seconds"] >= 0.05
        assert board["device_s"] == 0
        assert await broker.occupy("a")
        await asyncio.sleep(0.01)
        board = await broker.board()
        assert board["device_s"] >= 0.03 and board["rooms"] == {}
        await broker.vacate("a")
        broker.limits.spent_s = 3600
        assert not await broker.occupy("a")  # spent while it waited
        broker.limits.spent_s = 0.0
        assert await broker.occupy("a", 5)  # with two teachers, say
        await asyncio.sleep(0.01)
        assert (await broker.board())["device_s"] >= 0.05  # the metric `SPENT` shows the same

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_on_a_node_one_segment_at_a_time_exchanges_its_reservation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "TURN_LOOK_S", 0.01)

    async def scene() -> None:
        broker = make_broker(9, set(), by_turns=True)
        assert await broker.hand_over("a", ["n1", "n2"])
        assert await broker.hand_over("b", ["n3"])  # elsewhere nobody waits for it
        assert not await broker.hand_over("c", ["n2", "n4"])
        (turn,) = await started(broker.node_turn("c", ["n2", "n4"]))
        await asyncio.sleep(0.05)
        assert not turn.done()
        await broker.handed_over("a")
        await turn
        assert await broker.hand_over("c", ["n2", "n4"])
        await broker.settle("c")  # its driver was lost on the way: its row settles, or asks again
        assert await broker.hand_over("d", ["n4"])
        monkeypatch.setattr(rooms_module, "TURN_S", 0.0)
        assert await broker.hand_over("e", ["n3", "n4"])  # nobody keeps others away for ever

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_spent_budget_starts_nothing_more() -> None:
    limits = Limits(budget_hours=2.0, keep_going=False)
    limits.start("a", devices=2, now=0)
    assert limits.reason(now=3599) is None
    assert "budget of 2 device-hours" in (limits.reason(now=3600) or "")  # running stages count
    limits.stop("a", now=1800)
    assert limits.spent(now=9999) == 3600 and limits.reason(now=9999) is None
    limits.stop("never started", now=0)

    async def scene() -> None:
        broker = make_broker(1, {"pre"}, budget_hours=0.0)
        answer = await broker.claim("a", [PRETRAIN, ADAPT])
        assert answer["run"] == [] and answer["done"] == ["pre"] and "budget" in answer["stop"]
        assert await broker.claim("b", [PRETRAIN]) == {"run": [], "done": ["pre"]}  # it needs nothing more
        assert not await broker.admit("a", "ada")
        assert "budget" in (await broker.board())["stop"]

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_every_worker_of_a_group_gets_the_same_answer() -> None:
    async def scene() -> None:
        broker = make_broker(1, set(), budget_hours=1.0)
        assert await broker.admit("a", "ada")
        broker.limits.spent_s = 3600
        assert await broker.admit("a", "ada") and not await broker.admit("a", "dis")

    asyncio.run(asyncio.wait_for(scene(), 60))


@pytest.mark.parametrize(
    ("keep_going", "outcomes", "stops"),
    [
        (False, [False, False], False),  # one failed row never stops the others, nor do two
        (False, [False, False, False], True),
        (False, [False, False, True, False, False, False], False),  # something works
        (True, [False, False, False], False),
    ],
)
def test_when_everything_fails_the_rest_is_not_started(keep_going: bool, outcomes: list[bool], stops: bool) -> None:
    limits = Limits(None, keep_going)
    limits.outcomes = outcomes
    assert (limits.reason(0) is not None) == stops


def test_curve_entries_are_collected_once() -> None:
    async def scene() -> None:
        broker = make_broker(1, set())
        distill = {"stage": "distill", "fingerprint": "dis", "step": 20, "steps": 60, "unit": "step"}
        await broker.post("a", distill, ({"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}))
        assert [(e["stage"], e["step"]) for e in await broker.collect("a")] == [("distill", 10), ("distill", 20)]
        assert await broker.collect("a") == [] == await broker.collect("nobody")

    asyncio.run(asyncio.wait_for(scene(), 60))


def sweep_of(store: ArtifactStore) -> tuple[Any, Presence]:
    """A broker that claims in a store, with the presence that keeps its claims alive."""
    presence = Presence(store, "test")
    presence.__enter__()
    return make_broker(2, set(), store.storage, presence.holder.id), presence


def test_two_sweeps_on_one_store_share_their_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(broker_module, "FOREIGN_POLL_S", 0.05)
    store = ArtifactStore(str(tmp_path))

    async def scene() -> None:
        (first, here), (second, there) = sweep_of(store), sweep_of(store)
        assert await first.claim("a", [PRETRAIN, ADAPT]) == {"run": ["pre", "ada"], "done": []}
        (waiting,) = await started(second.claim("b", [PRETRAIN, ADAPT, DISTILL]))
        alone = Need("alone", "train", (), 1)
        assert await second.claim("c", [alone]) == {"run": ["alone"], "done": []}
        store.commit(Stage("pretrain", "train", {}, {}, "pre"), {})
        await first.finish("pre")
        await first.settle("a")  # it did not get as far as `ada`
        assert await waiting == {"run": ["ada"], "done": ["pre"]}
        for presence in (here, there):
            presence.__exit__()

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_stage_that_was_stored_meanwhile_is_not_run(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    store.commit(Stage("pretrain", "train", {}, {}, "pre"), {})

    async def scene() -> None:
        broker, presence = sweep_of(store)
        assert await broker.claim("a", [PRETRAIN, ADAPT]) == {"run": ["ada"], "done": ["pre"]}
        await broker.finish("ada")
        # Nobody waits for what is finished, whatever the claims still say.
        there, also_present = sweep_of(store)
        store.commit(Stage("adapt", "train", {}, {}, "ada"), {})
        assert await there.claim("b", [PRETRAIN, ADAPT]) == {"run": [], "done": ["pre", "ada"]}
        for each in (presence, also_present):
            each.__exit__()
        assert store.list_names("claims/stages") == []

    asyncio.run(asyncio.wait_for(scene(), 60))


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_segment_crosses_train_and_evaluate(kind: str) -> None:
    leases = Leases(1, set())
    needs = [PRETRAIN, Need("x", kind, ("pre",), 0), Need("y", "train", ("x",), 1)]
    assert leases.grant("a", needs, 0) == {"run": ["pre", "x", "y"], "done": []}


def test_a_segments_machines_are_noted_until_it_gives_its_room_back() -> None:
    a10g, l4 = ComputeNode(node="a10g", cpu="x"), ComputeNode(node="l4", cpu="x")

    async def scene() -> None:
        broker = make_broker(1, set())
        assert await broker.computed_on("a") == []
        for process, node in (("worker 0", a10g), ("worker 1", a10g), ("worker 1", l4), ("worker 2", a10g)):
            await broker.computes_on("a", process, node)  # worker 1 was lost and started again elsewhere
        await broker.computes_on("b", "worker 0", l4)
        assert await broker.computed_on("a") == [a10g.plain(), l4.plain()]  # each kind once, as plain data
        await broker.vacate("a")
        assert await broker.computed_on("a") == [] and await broker.computed_on("b") == [l4.plain()]

    asyncio.run(asyncio.wait_for(scene(), 60))


@pytest.mark.parametrize("has_on_demand", [True, False])
def test_a_broker_lives_where_nodes_are_not_taken_back(has_on_demand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none is named, on the node of the command, which ends the sweep anyway where it is lost."""
    asked: dict[str, Any] = {}

    def options(**given: Any) -> Any:
        asked.update(given)
        return SimpleNamespace(remote=lambda *settings, **more: (settings, more))

    monkeypatch.setattr(broker_module.Broker, "options", options)
    resources = {"CPU": 8.0} | ({"on_demand": 1000.0} if has_on_demand else {})
    monkeypatch.setattr(broker_module.ray, "cluster_resources", lambda: resources)
    here = SimpleNamespace(get_node_id=lambda: "c0" * 28)
    monkeypatch.setattr(broker_module.ray, "get_runtime_context", lambda: here)
    assert start_broker(2, set(), sweep="x") == ((2, set()), {"sweep": "x"})
    if has_on_demand:
        assert asked["resources"] == {"on_demand": 0.001} and "scheduling_strategy" not in asked
    else:
        assert (asked["scheduling_strategy"].node_id, asked["scheduling_strategy"].soft) == ("c0" * 28, True)
