"""Room on the cluster as the broker keeps it, without Ray: who waits for it, who is taking it up, who runs where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cast_ray.contracts.compute_node import ComputeNode

TURN_S = 120.0
"""Seconds after which a segment that is starting its workers no longer keeps others from its nodes."""


class Rooms:
    """Segments that wait for room, that exchange a reservation for others, and the machines of those that run.

    Every method takes the time of the caller's monotonic clock.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, dict[str, Any]] = {}
        """Owner -> what its segment waits for, why as far as is known, and since when."""
        self.moving: dict[str, tuple[frozenset[str], float]] = {}
        """Owner -> nodes on which its segment is exchanging its reservation for others, and since when."""
        self.nodes: dict[str, dict[str, ComputeNode]] = {}
        """Owner -> process -> machine that it computes on, of those that run the owner's segment."""
        self.running: set[str] = set()
        """Owners whose workers have started."""

    def wait(self, owner: str, what: str, why: str, now: float) -> None:
        """`owner` waits; the time is counted from the first call since it last had room."""
        since = self.waiting[owner]["since"] if owner in self.waiting else now
        self.waiting[owner] = {"what": what, "why": why, "since": since}

    def found(self, owner: str) -> None:
        """`owner` has room."""
        self.waiting.pop(owner, None)

    def is_moving(self, nodes: set[str], owner: str, now: float) -> bool:
        """Whether another segment than `owner`'s exchanges its reservation on one of these nodes."""
        moving = [taken for other, (taken, since) in self.moving.items() if other != owner and now - since < TURN_S]
        return any(nodes & taken for taken in moving)

    def move(self, owner: str, nodes: Sequence[str], now: float) -> bool:
        """Lets `owner` exchange its reservation on these nodes; False: another one is doing so on one of them."""
        if self.is_moving(set(nodes), owner, now):
            return False
        self.moving[owner] = (frozenset(nodes), now)
        return True

    def started(self, owner: str) -> bool:
        """`owner` has exchanged its reservation and its workers run; whether they had done so before in this room."""
        is_restart = owner in self.running
        self.running.add(owner)
        self.moving.pop(owner, None)
        return is_restart

    def leave(self, owner: str) -> None:
        """`owner` has given its room back."""
        self.moving.pop(owner, None)
        self.nodes.pop(owner, None)
        self.running.discard(owner)

    def computed_on(self, owner: str) -> list[ComputeNode]:
        """The machines of `owner`'s segment, each kind once."""
        return list({node.text: node for node in self.nodes.get(owner, {}).values()}.values())

    def node_types(self) -> dict[str, str]:
        """Owner -> types of the nodes that its segment runs on, in words."""
        return {owner: ",".join(sorted({str(n.node) for n in nodes.values()})) for owner, nodes in self.nodes.items()}

    def longest_wait_s(self, now: float) -> float:
        return max((now - room["since"] for room in self.waiting.values()), default=0.0)

    def shown(self, now: float) -> Mapping[str, dict[str, Any]]:
        """Owner -> what it waits for, why, and for how many seconds by now."""
        return {owner: room | {"seconds": now - room["since"]} for owner, room in self.waiting.items()}
