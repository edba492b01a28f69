"""Training streams on a real Ray, against a loop over the same plan."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from stream_scenes import CATEGORIES, DATA, STILL, assert_same, loop, write_images

from cast_ray.contracts.records import Batch
from cast_ray.recipe import InputSize, RuntimeConfig
from cast_ray.runtime import ray_internals
from cast_ray.runtime.data.images import Images
from cast_ray.runtime.data.pictures import read_pictures
from cast_ray.runtime.data.resources import configure_data, stream_bundle
from cast_ray.runtime.data.training_stream import SampleRules, StepShare, training_stream
from cast_ray.runtime.placement import reserve
from cast_ray.runtime.ray_internals import PacedLoop

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(600)]

NUM_LABELLED, NUM_IMAGES = 3, 14
SIZES = {"batch_labelled": 4, "batch_unlabelled": 2}
RUNTIME = RuntimeConfig(cpus_per_read=0.25, stream_memory_mb=64)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return write_images(tmp_path_factory.mktemp("images"), NUM_IMAGES)


def images_of(table: pa.Table, labels: bool = True) -> Images:
    everything = np.arange(table.num_rows)
    pseudo = ray.put(table.slice(NUM_LABELLED).combine_chunks()) if labels else None
    return Images(ray.put(table), everything[:NUM_LABELLED], everything[NUM_LABELLED:], CATEGORIES, pseudo)


@contextmanager
def stream(images: Images, steps: int, data: Any = DATA, runtime: RuntimeConfig = RUNTIME, **options: Any):
    names = {field.name for field in fields(StepShare)}
    share = {"seed": 5, **SIZES} | {name: value for name, value in options.items() if name in names}
    rules = {"strong": True} | {name: value for name, value in options.items() if name not in names}
    with reserve([stream_bundle(runtime)]) as group:
        configure_data(group, runtime, 0)
        yield training_stream(images, data, runtime, StepShare(steps=steps, **share), SampleRules(**rules))


def read(*arguments: Any, **options: Any) -> list[Batch]:
    with stream(*arguments, **options) as batches:
        return list(batches)


@pytest.fixture(scope="module")
def wanted(table: pa.Table) -> list[Batch]:
    labels = table.slice(NUM_LABELLED).column("instances").to_pylist()
    everything = np.arange(NUM_IMAGES)
    return loop(table, everything[:NUM_LABELLED], everything[NUM_LABELLED:], labels, DATA, steps=11, seed=5, **SIZES)


def test_a_stream_is_the_loop_in_order(table: pa.Table, wanted: list[Batch]) -> None:
    found = read(images_of(table), 11)
    assert len(found) == len(wanted) == 11
    for mine, theirs in zip(found, wanted):
        assert mine.num_labelled == 4
        assert_same(mine, theirs)


def test_pseudo_labels_on_the_strong_view_ask_for_it_of_d_u_alone(table: pa.Table, wanted: list[Batch]) -> None:
    found = read(images_of(table), 11, strong=False, strong_unlabelled=True)
    assert len(found) == 11
    for mine, theirs in zip(found, wanted):
        assert torch.equal(mine.weak, theirs.weak) and torch.equal(mine.strong[4:], theirs.strong[4:])
        assert torch.equal(mine.strong[:4], mine.weak[:4])
        assert bool((mine.truth_instance == -1).all())  # that L_pxl alone reads
    assert sum(not torch.equal(mine.strong[4:], mine.weak[4:]) for mine in found) > 5  # some are too dark to differ


def test_instances_are_pasted_the_same_however_many_workers_there_are(table: pa.Table, wanted: list[Batch]) -> None:
    """Of 4 + 2 images a step about half; the others, and the order of all, are those of a stream without."""
    found = read(images_of(table), 11, copy_paste=0.5)
    pasted = [
        not torch.equal(a, b) or len(mine.targets[i].labels) != len(theirs.targets[i].labels)
        for mine, theirs in zip(found, wanted)
        for i, (a, b) in enumerate(zip(mine.weak, theirs.weak))
    ]
    assert 10 < sum(pasted) < 50  # of 66, where an image is chosen and an instance of its source too
    for rank in range(2):
        share = read(images_of(table), 11, copy_paste=0.5, rank=rank, world_size=2)
        for mine, theirs in zip(share, found):
            assert_same(mine, theirs, [2 * rank, 2 * rank + 1, 4 + rank])


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_share_one_workers_steps(table: pa.Table, wanted: list[Batch], rank: int) -> None:
    found = read(images_of(table), 11, rank=rank, world_size=2)
    assert len(found) == 11  # as many as the other's, whatever the sizes of D_l and D_u
    for mine, theirs in zip(found, wanted):
        assert mine.num_labelled == 2
        assert_same(mine, theirs, [2 * rank, 2 * rank + 1, 4 + rank])


@pytest.mark.parametrize("start", [1, 5, 10])
def test_a_resumed_stream_goes_on_within_an_epoch(table: pa.Table, wanted: list[Batch], start: int) -> None:
    found = read(images_of(table), 11, start_step=start)
    assert len(found) == 11 - start
    for mine, theirs in zip(found, wanted[start:]):
        assert_same(mine, theirs)


def test_nothing_is_left_to_stream_after_the_last_step(table: pa.Table) -> None:
    assert read(images_of(table), 11, start_step=11) == []


def test_every_image_once_an_epoch_and_the_short_side_cycles(table: pa.Table) -> None:
    """Images are told by their grey level; an epoch of D_u is 11 images, of D_l 3."""
    found = read(images_of(table, labels=False), 33, data=STILL)
    drawn = np.array([batch.weak[:, 0, 0, 0].numpy() for batch in found])
    labelled, unlabelled = drawn[:, :4].ravel(), drawn[:, 4:].ravel()
    epochs_of_u = unlabelled.reshape(-1, NUM_IMAGES - NUM_LABELLED)
    epochs_of_l = labelled.reshape(-1, NUM_LABELLED)
    for epoch in epochs_of_u:
        assert sorted(epoch) == list(range(NUM_LABELLED, NUM_IMAGES))
    for epoch in epochs_of_l:
        assert sorted(epoch) == list(range(NUM_LABELLED))
    assert len({tuple(epoch) for epoch in epochs_of_u}) == len(epochs_of_u)
    assert all(not len(target.labels) for batch in found for target in batch.targets[4:])


def test_a_long_plan_goes_on_through_several_executions(
    table: pa.Table, wanted: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cast_ray.runtime.data.training_stream.MAX_TASKS_PER_EXECUTION", 2)
    found = read(images_of(table), 11)
    assert len(found) == 11
    for mine, theirs in zip(found, wanted):
        assert_same(mine, theirs)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        (b"", "the file is empty"),
        (b"GIF89a or not", "not an image"),
        ("other size", "pixels"),
    ],
    ids=["missing", "empty", "not an image", "other size"],
)
def test_a_bad_image_ends_the_stream_by_name(tmp_path: Path, content: Any, reason: str) -> None:
    table = write_images(tmp_path, NUM_IMAGES)
    bad = tmp_path / "image 9.png"
    bad.unlink()
    if content == "other size":
        shutil.copy(tmp_path / "image 1.png", bad)
        table = table.set_column(2, "height", pa.array([24] * 9 + [25] + [24] * 4, pa.int32()))
    elif content is not None:
        bad.write_bytes(content)
    with pytest.raises(ValueError) as error:  # what `stage_loop.FATAL` tells from a lost process
        read(images_of(table), 11)
    assert str(bad) in str(error.value) and reason in str(error.value)
    with pytest.raises(ValueError, match=r"image 9\.png"), reserve([stream_bundle(RUNTIME)]) as group:
        configure_data(group, RUNTIME, 0)
        list(read_pictures(ray.put(table), np.arange(NUM_IMAGES), InputSize("fit", (24, 32)), RUNTIME))


def test_a_stream_ahead_of_its_consumer_does_not_spin(
    table: pa.Table, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    """While nothing is taken, every turn of the scheduling loop ends in a pause."""
    loops: list[PacedLoop] = []

    class Watched(PacedLoop):
        def __init__(self) -> None:
            super().__init__()
            loops.append(self)

    monkeypatch.setattr(ray_internals, "PacedLoop", Watched)
    small = RuntimeConfig(cpus_per_read=0.25, stream_memory_mb=16)
    big = STILL.model_copy(update={"image_px": (512, 512)})
    with stream(images_of(table), 400, data=big, runtime=small) as batches:
        next(batches)
        (paced,) = loops
        wait_until(lambda: paced.pauses >= 20, "the stream never came to rest")
        turns, pauses = paced.turns, paced.pauses
        wait_until(lambda: paced.pauses >= pauses + 30, "the stream does not rest")
        assert paced.turns - turns <= (paced.pauses - pauses) + 5
        assert next(batches) is not None
        batches.close()


@ray.remote(num_cpus=0.01)
def consume(table: pa.Table, seed: int, started: Any) -> tuple[list[int], int]:
    """One trial's stream in a process of its own: levels of the first pixels, and streams that were open at a time."""
    steps = 40
    with stream(images_of(table), steps, data=STILL, seed=seed) as batches:
        levels = [int(next(batches).weak[0, 0, 0, 0])]
        others = ray.get(started.arrive.remote())
        levels += [int(batch.weak[0, 0, 0, 0]) for batch in batches]
    return levels, others


@ray.remote(num_cpus=0)
class Meeting:
    """Waits until so many streams have given a batch while none has ended."""

    def __init__(self, size: int):
        import asyncio

        self.size, self.count, self.all = size, 0, asyncio.Event()

    async def arrive(self) -> int:
        self.count += 1
        if self.count == self.size:
            self.all.set()
        await self.all.wait()
        return self.count


def test_four_trials_do_not_starve_each_other(table: pa.Table) -> None:
    """On 3 logical CPUs: without groups of their own, shares of idle CPUs round down to 0 and all wait for ever."""
    meeting = Meeting.remote(4)  # type: ignore[attr-defined]
    stored = ray.put(table)
    found = ray.get([consume.remote(stored, seed, meeting) for seed in range(4)], timeout=500)
    assert [others for _, others in found] == [4] * 4
    assert all(len(levels) == 40 for levels, _ in found)
    assert len({tuple(levels) for levels, _ in found}) == 4


def test_more_streams_than_fit_take_turns(table: pa.Table) -> None:
    """Bundles of 1 CPU: three run, the others wait for their group and not in the middle of a stream."""
    wide = RuntimeConfig(cpus_per_read=0.5, stream_memory_mb=64)

    @ray.remote(num_cpus=0.01)
    def one(records: pa.Table, seed: int) -> int:
        return len(read(images_of(records), 10, runtime=wide, seed=seed))

    stored = ray.put(table)
    assert ray.get([one.remote(stored, seed) for seed in range(5)], timeout=500) == [10] * 5
