"""The broker's books of room and progress: turns on nodes, waiting times, machines, posts and paces."""

from __future__ import annotations

from cast_ray.contracts.compute_node import ComputeNode
from cast_ray.runtime.sweep.posts import MAX_ENTRIES, Posts
from cast_ray.runtime.sweep.rooms import TURN_S, Rooms

POST = {"stage": "distill", "fingerprint": "f", "step": 0, "steps": 40, "unit": "step"}


def test_one_segment_at_a_time_exchanges_its_reservation_on_a_node() -> None:
    rooms = Rooms()
    assert rooms.move("a", ["n1", "n2"], 0.0) and rooms.move("b", ["n3"], 0.0)
    assert not rooms.move("c", ["n2", "n4"], 1.0) and rooms.move("a", ["n1"], 1.0)  # its own turn is no obstacle
    assert rooms.move("c", ["n2"], 2.0)  # `a` has left this node
    assert not rooms.move("d", ["n1"], TURN_S) and rooms.move("d", ["n1"], TURN_S + 1.0)  # `a` has taken too long


def test_a_wait_counts_from_its_first_call_until_there_is_room() -> None:
    rooms = Rooms()
    assert rooms.longest_wait_s(5.0) == 0.0
    rooms.wait("a", "{GPU 1}", "", 10.0)
    rooms.wait("a", "{GPU 1}", "no such node", 15.0)
    rooms.wait("b", "{CPU 1}", "", 14.0)
    assert rooms.longest_wait_s(20.0) == 10.0
    assert rooms.shown(20.0)["a"] == {"what": "{GPU 1}", "why": "no such node", "since": 10.0, "seconds": 10.0}
    rooms.found("a")
    rooms.wait("a", "{GPU 1}", "", 30.0)
    assert rooms.longest_wait_s(30.0) == 16.0 and rooms.shown(30.0)["a"]["seconds"] == 0.0


def test_a_second_start_in_the_same_room_is_a_restart() -> None:
    rooms = Rooms()
    assert [rooms.started("a"), rooms.started("b"), rooms.started("a")] == [False, False, True]
    rooms.leave("a")
    assert not rooms.started("a") and rooms.started("b")


def test_node_types_are_named_once_and_forgotten_with_the_room() -> None:
    rooms = Rooms()
    for process, node in enumerate(("l4", "a10g", "l4")):
        rooms.nodes.setdefault("a", {})[str(process)] = ComputeNode(node=node)
    assert rooms.node_types() == {"a": "a10g,l4"}
    rooms.leave("a")
    assert rooms.node_types() == {} and rooms.computed_on("a") == []


def test_a_post_tells_whether_the_stage_has_got_anywhere() -> None:
    posts = Posts()
    assert posts.add("a", POST, (), 0.0)
    assert not posts.add("a", POST | {"loss": 2.0}, (), 1.0)
    assert posts.add("a", POST | {"step": 10}, (), 2.0) and posts.last["a"]["loss"] == 2.0
    assert posts.add("a", POST | {"fingerprint": "g"}, (), 3.0) and "loss" not in posts.last["a"]  # the next stage
    assert posts.shown(5.0)["a"]["stage_s"] == 2.0


def test_the_pace_of_labelling_begins_with_its_first_images() -> None:
    posts = Posts()
    assert posts.advance("a", 8, 0.0) is None
    posts.add("a", POST | {"stage": "label", "steps": 100}, (), 0.0)
    assert posts.advance("a", 10, 50.0) == "label" and posts.last["a"]["images_per_s"] == 0.0
    posts.advance("a", 20, 54.0)
    assert posts.last["a"]["step"] == 30 and posts.last["a"]["images_per_s"] == 5.0


def test_entries_that_nobody_collects_are_bounded() -> None:
    posts = Posts()
    posts.add("a", POST, [{"step": step} for step in range(MAX_ENTRIES + 5)], 0.0)
    kept = posts.collect("a")
    assert len(kept) == MAX_ENTRIES and kept[-1] == {"stage": "distill", "step": MAX_ENTRIES + 4}
    assert posts.collect("a") == []
