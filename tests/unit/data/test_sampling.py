"""The sampling plan: whole epochs, resumable at any step, the same images on any number of workers."""

from __future__ import annotations

import numpy as np
import pytest

from cast_ray.data.sampling import epoch_positions, view_seed, worker_slots


@pytest.mark.parametrize("num_images", [1, 2, 7, 20])
def test_every_image_once_an_epoch(num_images: int) -> None:
    epochs = epoch_positions(num_images, 0, 5 * num_images, seed=3).reshape(5, num_images)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(num_images), (5, 1)))


def test_epochs_and_seeds_differ() -> None:
    first, second = epoch_positions(50, 0, 100, seed=0).reshape(2, 50)
    assert (first != second).any()
    assert (first != epoch_positions(50, 0, 50, seed=1)).any()
    np.testing.assert_array_equal(first, epoch_positions(50, 0, 50, seed=0))


def test_the_short_side_cycles_within_a_step() -> None:
    slots = worker_slots(3, 8, 0, 3, seed=0, rank=0, world_size=1)
    assert slots.shape == (3, 8)
    counts = np.bincount(slots.ravel(), minlength=3)
    np.testing.assert_array_equal(counts, [8, 8, 8])


@pytest.mark.parametrize("start", [1, 3, 9, 10])
def test_starting_at_a_step_gives_the_tail(start: int) -> None:
    whole = worker_slots(7, 4, 0, 10, seed=5, rank=1, world_size=2)
    np.testing.assert_array_equal(worker_slots(7, 4, start, 10, seed=5, rank=1, world_size=2), whole[start:])


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_workers_slots_side_by_side_are_one_workers(world_size: int) -> None:
    one = worker_slots(13, 8, 2, 9, seed=1, rank=0, world_size=1)
    parts = [worker_slots(13, 8, 2, 9, seed=1, rank=r, world_size=world_size) for r in range(world_size)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), one)


@pytest.mark.parametrize(("num_images", "batch"), [(0, 8), (5, 0)])
def test_nothing_to_draw_gives_empty_slots(num_images: int, batch: int) -> None:
    assert worker_slots(num_images, batch, 3, 7, seed=0, rank=0, world_size=1).shape == (4, 0)


def test_a_batch_that_does_not_divide_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        worker_slots(5, 3, 0, 1, seed=0, rank=0, world_size=2)


def test_view_seeds_are_distinct_and_not_negative() -> None:
    seeds = [view_seed(s, step, slot) for s in range(3) for step in range(20) for slot in range(16)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert view_seed(1, 2, 3) == view_seed(1, 2, 3)
