"""What a sweep's user is told of losses, in sentences: which row lost what, and from which step it resumes."""

from __future__ import annotations

from collections import deque

from cast_ray.runtime.sweep.posts import Posts

MAX_NOTICES = 200


class Notices:
    """Sentences about losses, numbered from 1 on, kept until a display has asked for them.

    Args:
        posts: what running stages have told of their progress.
    """

    def __init__(self, posts: Posts):
        self.posts = posts
        self.number = 0
        self.kept: deque[tuple[int, str, str]] = deque(maxlen=MAX_NOTICES)

    def add(self, owner: str, text: str) -> None:
        """Tells something of a row; an empty `owner`: of the whole sweep."""
        self.number += 1
        self.kept.append((self.number, owner, text))

    def begin(self, owner: str, stage: str, fingerprint: str, step: int, steps: int, unit: str) -> None:
        """A stage begins at a step; this is told only where it has been further, or is not at its first step."""
        reached = self.posts.reached.get(fingerprint)
        if not step and not reached:
            return
        lost = ""
        if reached is not None:
            lost = f"; {reached - step} that were done are lost" if reached > step else "; nothing is lost"
        self.add(owner, f"{stage} resumes after {step} of {steps} {unit}s{lost}")

    def since(self, number: int) -> list[tuple[int, str, str]]:
        """Number, row and text of what was added after a number."""
        return [notice for notice in self.kept if notice[0] > number]
