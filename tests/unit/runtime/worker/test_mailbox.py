"""How workers are handed segments: all the same one, new processes the one that is not finished."""

from __future__ import annotations

import asyncio
from typing import Any

from cast_ray.runtime.worker.mailbox import Mailbox


async def waiting(*calls: Any) -> list[asyncio.Task]:
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in tasks)
    return tasks


def test_every_worker_takes_the_same_segments_in_turn() -> None:
    async def scene() -> None:
        mailbox = Mailbox()
        first, second = "first", "second"
        takes = await waiting(mailbox.take(0), mailbox.take(0))
        number = await mailbox.put(first)  # type: ignore[arg-type]
        assert [await take for take in takes] == [(1, first), (1, first)]
        (over, next_of_rank_1) = await waiting(mailbox.finished(number), mailbox.take(1))
        await mailbox.finish(number)
        await over
        assert await mailbox.put(second) == 2  # type: ignore[arg-type]
        assert await next_of_rank_1 == await mailbox.take(1) == (2, second)

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_workers_that_were_started_again_take_what_is_not_finished() -> None:
    async def scene() -> None:
        mailbox = Mailbox()
        for name in ("first", "second"):
            number = await mailbox.put(name)  # type: ignore[arg-type]
            assert await mailbox.take(0) == (number, name)
            if name == "first":
                await mailbox.finish(number)
        assert await mailbox.take(0) == (2, "second")
        await mailbox.finish(1)  # of a process that is gone
        assert await mailbox.take(0) == (2, "second")
        await mailbox.finish(2)
        (take,) = await waiting(mailbox.take(0))
        await mailbox.close()
        assert await take is None

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_closed_mailbox_ends_its_workers() -> None:
    async def scene() -> None:
        mailbox = Mailbox()
        (take,) = await waiting(mailbox.take(3))
        await mailbox.close()
        assert await take is None and await mailbox.take(0) is None

    asyncio.run(asyncio.wait_for(scene(), 60))
