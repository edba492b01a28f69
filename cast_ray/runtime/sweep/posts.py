"""What running stages have told of their progress, as the broker keeps it, without Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

MAX_ENTRIES = 500
"""Curve entries kept for a row whose driver does not collect them."""


class Posts:
    """The last post of each owner that runs something, and the entries of curves that nobody has collected yet."""

    def __init__(self) -> None:
        self.last: dict[str, dict[str, Any]] = {}
        """Owner -> the facts of its stage; its pace is counted from `first_step` and `since` (monotonic clock) on."""
        self.entries: dict[str, deque[dict[str, Any]]] = {}
        self.reached: dict[str, int] = {}
        """Fingerprint -> step up to which an unfinished stage has come, also in a process that is lost by now."""

    def add(self, owner: str, facts: dict[str, Any], entries: Sequence[dict[str, Any]], now: float) -> bool:
        """Takes a post, see `Broker.post`; returns whether the stage has got anywhere since the last one."""
        before = self.last.get(owner)
        self.reached[facts["fingerprint"]] = facts["step"]
        is_same = before is not None and before["fingerprint"] == facts["fingerprint"]
        if before is not None and is_same:
            self.last[owner] = before | facts
        else:
            self.last[owner] = facts | {"first_step": facts["step"], "since": now}
        if entries:
            kept = self.entries.setdefault(owner, deque(maxlen=MAX_ENTRIES))
            kept.extend({"stage": facts["stage"], **entry} for entry in entries)
        return before is None or not is_same or before["step"] != facts["step"]

    def advance(self, owner: str, count: int, now: float) -> str | None:
        """Adds `count` images to the labelling job that `owner` runs; returns its stage, None where it runs none."""
        post = self.last.get(owner)
        if post is None:
            return None
        post["step"] += count
        self.reached[post["fingerprint"]] = post["step"]
        if "images_per_s" in post:
            post["images_per_s"] = (post["step"] - post["first_step"]) / max(now - post["since"], 1e-9)
        else:  # the pace counts from the first images on: what came before was the labellers' start
            post |= {"first_step": post["step"], "since": now, "images_per_s": 0.0}
        return str(post["stage"])

    def collect(self, owner: str) -> list[dict[str, Any]]:
        """Curve entries of `owner`'s stages since the last call, each with its stage."""
        return list(self.entries.pop(owner, ()))

    def shown(self, now: float) -> dict[str, dict[str, Any]]:
        """The last posts, with the seconds that each stage has run."""
        return {owner: post | {"stage_s": now - post["since"]} for owner, post in self.last.items()}
