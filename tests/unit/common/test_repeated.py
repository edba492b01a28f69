"""A look from time to time: it ends when it has seen enough, and with its block."""

from __future__ import annotations

import threading

from cast_ray.common.repeated import repeated


def test_it_looks_until_it_has_seen_enough() -> None:
    seen, enough = [0], threading.Event()

    def look() -> bool:
        seen[0] += 1
        if seen[0] == 3:
            enough.set()
        return enough.is_set()

    with repeated(look, 0.001):
        assert enough.wait(30)
    assert seen == [3]


def test_it_ends_with_its_block() -> None:
    before = threading.active_count()
    with repeated(lambda: False, 0.001):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
