"""What a user is told of losses: which row, what, and from which step it resumes."""

from __future__ import annotations

import io
from typing import Any

import ray
from rich.console import Console

from cast_ray.plan.graph import plan_sweep
from cast_ray.runtime.sweep.notices import Notices
from cast_ray.runtime.sweep.posts import Posts
from cast_ray.runtime.sweep.progress import ProgressDisplay


def texts(notices: Notices) -> list[str]:
    return [text for _, _, text in notices.since(0)]


def test_a_stage_says_where_it_resumes_and_what_is_lost() -> None:
    posts = Posts()
    notices = Notices(posts)

    def run_to(owner: str, begin: int, end: int, unit: str = "step") -> None:
        facts = {"stage": "distill", "fingerprint": "dis", "step": begin, "steps": 120, "unit": unit}
        notices.begin(owner, *facts.values())  # type: ignore[arg-type]
        posts.add(owner, facts | {"step": end}, (), 0.0)

    run_to("a", 0, 27)
    assert texts(notices) == []  # a stage that begins is nothing to tell of
    run_to("a", 20, 40)
    posts.last.pop("a")  # its driver was lost
    run_to("b", 40, 45)
    run_to("a", 0, 1)
    assert texts(notices) == [
        "distill resumes after 20 of 120 steps; 7 that were done are lost",
        "distill resumes after 40 of 120 steps; nothing is lost",
        "distill resumes after 0 of 120 steps; 45 that were done are lost",
    ]
    assert [(number, row) for number, row, _ in notices.since(1)] == [(2, "b"), (3, "a")]


def test_a_stage_of_an_earlier_command_says_where_it_resumes() -> None:
    notices = Notices(Posts())
    notices.begin("a", "label-adapted", "lab", 320, 636, "image")
    assert texts(notices) == ["label-adapted resumes after 320 of 636 images"]


class Board:
    """A broker of which the display asks for the board."""

    def __init__(self, broker: str, done: list[str], notices: list[tuple[int, str, str]]):
        self.broker, self.done, self.notices = broker, done, notices
        self.board = self

    def remote(self, num_known: int = 0, num_read: int = 0) -> dict[str, Any]:
        new = [notice for notice in self.notices if notice[0] > num_read]
        return {"broker": self.broker, "done": self.done[num_known:], "notices": new}


def test_the_display_prints_each_once_also_of_the_next_broker(monkeypatch: Any) -> None:
    monkeypatch.setattr(ray, "get", lambda board, timeout: board)
    console = Console(file=io.StringIO(), width=160)
    display = ProgressDisplay(console, Board("one", ["x", "y"], [(1, "row", "lost [a]")]), plan_sweep([], []), ["row"])
    for _ in range(2):
        board = display._board()
        assert board is not None and board["done"] == {"x", "y"}
    display.broker = Board("two", ["y", "x", "z"], [(1, "", "the broker was lost")])
    for _ in range(2):
        board = display._board()
        assert board is not None and board["done"] == {"x", "y", "z"}
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said == "0:00  row  lost [a]\n0:00  sweep  the broker was lost\n"
