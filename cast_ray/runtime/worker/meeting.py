"""How the workers of a group wait for each other, however long that takes, and share out work as each gets free.

A worker that waits in a collective of torch for more than 1,800 s (the default of NCCL and gloo) ends the whole group.
Workers on unequal GPUs may well be that far apart after labelling, and so may the first worker be while it joins what
all have labelled. So they ask the group's host every few seconds, and meet in a collective only when all are there.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from cast_ray.engine.world import World

FIRST_LOOK_S, LOOK_S = 0.1, 5.0


class Meetings:
    """The host's side: who has arrived where, and what was shared out to whom."""

    def __init__(self) -> None:
        self.arrived: dict[str, set[int]] = {}
        self.taken: dict[str, Counter[int]] = {}

    def arrive(self, place: str, rank: int) -> int:
        """Notes that a worker has arrived, and returns how many have; may be called again."""
        self.arrived.setdefault(place, set()).add(rank)
        return len(self.arrived[place])

    def take(self, place: str, rank: int, count: int) -> int | None:
        """Gives a worker the next of the numbers 0 to `count` - 1; None: all are given out."""
        taken = self.taken.setdefault(place, Counter())
        if (number := taken.total()) == count:
            return None
        taken[rank] += 1
        return number

    def num_taken(self, place: str, rank: int) -> int:
        """How many numbers a worker was given."""
        return self.taken.get(place, Counter())[rank]


@dataclass(frozen=True)
class SharedBlocks:
    """Shares blocks out among the workers' streams, see `pictures.Handout`; each of their tasks is sent a copy.

    host: handle of the group's host; place: name of the handout.
    """

    host: Any
    place: str
    rank: int

    def take(self, count: int) -> int | None:
        """See `Meetings.take`."""
        return ray.get(self.host.take_number.remote(self.place, self.rank, count))

    def num_taken(self) -> int:
        """How many blocks the tasks of this worker have taken."""
        return ray.get(self.host.num_taken.remote(self.place, self.rank))


class Meeting:
    """A worker's side.

    Args:
        host: handle of the group's host.
        world: the group's workers, which must all make their meeting at about the same time.
    """

    def __init__(self, host: Any, world: World):
        import torch

        self.host, self.world = host, world
        # Of these workers alone: those before them, which were lost, may have arrived anywhere.
        own = torch.tensor(secrets.randbits(48) if world.rank == 0 else 0, device=world.device)
        self.id = int(world.all_reduce_sum(own))
        self.number = 0

    def wait(self) -> None:
        """Returns when every worker has called it as often as this one."""
        self.number += 1
        if self.world.size == 1:
            return
        look_s = FIRST_LOOK_S
        while ray.get(self.host.arrive.remote(self._place(), self.world.rank)) < self.world.size:
            time.sleep(look_s)
            look_s = min(2 * look_s, LOOK_S)

    def shared_blocks(self) -> SharedBlocks | None:
        """For blocks that the workers share out until they next wait; None where there is one worker."""
        return SharedBlocks(self.host, self._place(), self.world.rank) if self.world.size > 1 else None

    def _place(self) -> str:
        return f"{self.id}-{self.number}"
