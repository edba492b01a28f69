"""How workers wait for each other and share out blocks, without Ray."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from cast_ray.runtime.data.pictures import PICTURE_SCHEMA, _fit_next, _those_taken
from cast_ray.runtime.worker import meeting as meeting_module
from cast_ray.runtime.worker.meeting import Meeting, Meetings, SharedBlocks


class Host:
    """Stands for the actor that hosts the group."""

    def __init__(self) -> None:
        self.meetings, self.num_asked = Meetings(), 0

    def __getattr__(self, name: str) -> Any:
        method = {"arrive": "arrive", "take_number": "take", "num_taken": "num_taken"}[name]

        def remote(*arguments: Any) -> Any:
            self.num_asked += name == "arrive"
            return getattr(self.meetings, method)(*arguments)

        return SimpleNamespace(remote=remote)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_module.ray, "get", lambda answer: answer)
    monkeypatch.setattr(meeting_module, "FIRST_LOOK_S", 0.001)
    monkeypatch.setattr(meeting_module, "LOOK_S", 0.01)


def of_workers(host: Any, size: int, number: int) -> list[Meeting]:
    """Meetings of a group's workers, whose collective sums to `number`."""

    def world(rank: int) -> Any:
        return SimpleNamespace(
            rank=rank, size=size, device=torch.device("cpu"), all_reduce_sum=lambda tensor: torch.tensor(number)
        )

    return [Meeting(host, world(rank)) for rank in range(size)]


def test_nobody_goes_on_before_all_are_there() -> None:
    host = Host()
    first, second = of_workers(host, 2, 7)
    order: list[str] = []

    def run() -> None:
        for part in ("labelled", "joined"):
            first.wait()
            order.append(part)

    thread = threading.Thread(target=run)
    thread.start()
    while host.num_asked < 5:  # it waits, and asks again
        pass
    assert order == []
    second.wait()
    while host.num_asked < 12:
        pass
    assert order == ["labelled"]  # an arrival at the first meeting is none at the second
    second.wait()
    thread.join(60)
    assert order == ["labelled", "joined"]


def test_those_who_were_lost_are_not_taken_for_those_who_came_in_their_place() -> None:
    host = Host()
    lost = of_workers(host, 2, 7)[1]
    lost.number += 1
    host.meetings.arrive(lost._place(), 1)
    again, _ = of_workers(host, 2, 8)
    thread = threading.Thread(target=again.wait, daemon=True)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    host.meetings.arrive(again._place(), 1)
    thread.join(60)
    assert not thread.is_alive()


def test_one_worker_asks_nobody() -> None:
    host = Host()
    (alone,) = of_workers(host, 1, 7)
    alone.wait()
    assert host.num_asked == 0 and alone.shared_blocks() is None


def test_blocks_go_to_those_who_are_free() -> None:
    """Three go to one stream and one to the other, each once; by rank it would have been two and two."""
    host = Host()
    fast, slow = (SharedBlocks(host, "labels", rank) for rank in range(2))
    blocks = [(0, 4), (4, 8), (8, 12), (12, 15)]

    def fit(start: int, stop: int) -> pa.Table:
        return pa.Table.from_pylist([{"position": i} for i in range(start, stop)], schema=PICTURE_SCHEMA)

    def task(shared: SharedBlocks) -> pa.Table:
        return _fit_next(0, 1, fit=fit, blocks=blocks, handout=shared)

    of_slow = [task(slow)]
    of_fast = [task(fast) for _ in range(3)]
    of_slow += [task(slow) for _ in range(3)]
    of_fast += [task(fast)]
    later = iter([*of_slow, None])  # tasks that find nothing are not waited for
    given = [
        [table["position"].to_pylist() for table in _those_taken(tables, shared)]
        for tables, shared in (
            (iter(of_fast), fast),
            (later, slow),  # type: ignore[arg-type]
        )
    ]
    assert given == [[[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14]], [[0, 1, 2, 3]]]
    assert next(later) is not None
    assert (fast.num_taken(), slow.num_taken()) == (3, 1)
