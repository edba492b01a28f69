"""Pseudo-labels on a real Ray: the same offline and online, by whom and how often interrupted they are made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from safetensors.torch import save as save_tensors
from stream_scenes import CATEGORIES, DATA, assert_same, write_images

from cast_ray.contracts.records import Batch, Targets
from cast_ray.models.segmenter import build_segmenter
from cast_ray.plan.graph import Stage
from cast_ray.recipe import InputSize, PseudoConfig, Recipe, RuntimeConfig, build_recipe
from cast_ray.runtime.data.images import Images
from cast_ray.runtime.data.pictures import Pictures, read_pictures
from cast_ray.runtime.data.resources import configure_data, stream_bundle
from cast_ray.runtime.data.training_stream import SampleRules, StepShare, training_stream
from cast_ray.runtime.placement import reserve
from cast_ray.runtime.store.artifact_files import LABELS
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.models import load_student, save_model
from cast_ray.runtime.worker.group_host import GroupHost
from cast_ray.runtime.worker.label_job import LabelJob
from cast_ray.runtime.worker.labeller import PseudoLabeller
from cast_ray.runtime.worker.labelling import label_images
from cast_ray.runtime.worker.meeting import SharedBlocks
from cast_ray.runtime.worker.online import Learner, OnlineLabels, start_teachers, teacher_bundles
from cast_ray.teachers.pseudo_labels import paint

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(900)]

NUM_LABELLED, NUM_IMAGES = 4, 45
IMAGE_PX = (32, 32)
RUNTIME = RuntimeConfig(cpus_per_read=0.25, cpus_per_labeller=0.25, num_labellers=1, stream_memory_mb=64)
RECIPE = build_recipe("shapes", "smoke", {"data.max_bad_fraction": 0.0}).model_copy(update={"runtime": RUNTIME})
PSEUDO = PseudoConfig(score_threshold=0.0, min_area_px=1, max_per_image=5, non_overlapping=False)
TEACHER = Stage("adapt", "train", {"data": {"image_px": list(IMAGE_PX)}}, {}, "a" * 20)
BATCH = 4


@ray.remote(num_cpus=0)
class Board:
    """Stands for the broker: counts the images that were labelled."""

    def __init__(self) -> None:
        self.step, self.counts = 0, []

    def begin(self, owner: str, facts: dict[str, Any]) -> None:
        self.step = facts["step"]

    def advance(self, owner: str, count: int, num_labels: int = 0) -> None:
        self.counts.append(count)

    def computes_on(self, *machine: Any) -> None:
        pass

    def labelled(self, *counts: Any) -> None:
        pass

    def wait_for_room(self, owner: str, what: str, why: str) -> None:
        pass

    def occupy(self, owner: str, devices: int) -> bool:
        return True

    def seen(self) -> tuple[int, list[int]]:
        return self.step, self.counts


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return write_images(tmp_path_factory.mktemp("images"), NUM_IMAGES)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    """With a teacher of random weights that is sure of something."""
    store = ArtifactStore(str(tmp_path_factory.mktemp("storage")))
    segmenter = build_segmenter(RECIPE.teacher.segmenter, len(CATEGORIES), seed=0)
    save_model(store, TEACHER, segmenter, CATEGORIES)
    store.commit(TEACHER, {})
    return store


def images_of(table: pa.Table) -> Images:
    everything = np.arange(table.num_rows)
    return Images(ray.put(table), everything[:NUM_LABELLED], everything[NUM_LABELLED:], CATEGORIES)


def job_of(store: ArtifactStore, table: pa.Table, name: str, pseudo: PseudoConfig = PSEUDO, **fields: Any) -> LabelJob:
    config = {"pseudo": pseudo.model_dump(), "data": {"image_px": list(IMAGE_PX)}, "batch": BATCH}
    stage = Stage("label-adapted", "label", config, {"teacher": TEACHER.fingerprint}, name)
    data = RECIPE.data.model_copy(update=fields)
    recipe = RECIPE.model_copy(update={"data": data, "pseudo": pseudo})
    return LabelJob(store, stage, images_of(table), Board.remote(), "row", recipe)  # type: ignore[attr-defined]


def labels_of(job: LabelJob) -> list[dict[str, Any]]:
    return job.store.read_table(job.stage.key, "labels").to_pylist()


@pytest.fixture(scope="module")
def offline(store: ArtifactStore, table: pa.Table) -> LabelJob:
    """Labelled by a job of its own, in one go."""
    job = job_of(store, table, "offline")
    facts = label_images(job)
    assert facts["num_images"] == NUM_IMAGES - NUM_LABELLED and facts["skipped"] == [] and facts["num_found"] == 0
    job.store.commit(job.stage, facts)
    return job


def test_labels_are_the_teachers_for_every_image(offline: LabelJob, store: ArtifactStore, table: pa.Table) -> None:
    rows = labels_of(offline)
    assert [row["position"] for row in rows] == list(range(NUM_IMAGES - NUM_LABELLED))
    assert [row["uri"] for row in rows] == table.column("uri").to_pylist()[NUM_LABELLED:]
    assert sum(len(row["instances"]) for row in rows) > NUM_IMAGES
    assert {i["category_id"] for row in rows for i in row["instances"]} <= {c.id for c in CATEGORIES}
    labeller = PseudoLabeller(store, offline.stage, torch.device("cpu"))
    alone = [labeller.label(picture(table, i))[0] for i in range(NUM_LABELLED, NUM_IMAGES)]
    assert instances(rows) == instances([{"instances": labels} for labels in alone])


def picture(table: pa.Table, index: int) -> Pictures:
    """One image by itself: the rest of the pass is filled up."""
    from cast_ray.data.reading.images import read_image
    from cast_ray.data.views import fit_image

    image = read_image(table.column("uri")[index].as_py())
    pixels, size = fit_image(image, IMAGE_PX)
    return Pictures([0], [pixels], [(image.shape[0], image.shape[1])], [size])


def instances(rows: list[dict[str, Any]]) -> list[list[tuple[int, bytes, float]]]:
    return [[(i["category_id"], i["rle"], float(np.float32(i["score"]))) for i in r["instances"]] for r in rows]


def test_the_workers_that_train_label_the_same(offline: LabelJob, store: ArtifactStore, table: pa.Table) -> None:
    """As two Train workers do (`stage_loop._label`): the one that is free takes a block, here always the second."""
    job = job_of(store, table, "in group")
    labeller = PseudoLabeller(store, job.stage, torch.device("cpu"))
    missing, host = job.missing(job.blocks), GroupHost.remote("test")  # type: ignore[attr-defined]
    num_labelled = {1: 0, 0: 0}
    for rank in num_labelled:
        with reserve([stream_bundle(RUNTIME)]) as group:
            configure_data(group, RUNTIME, 0)
            shared = SharedBlocks(host, "labels", rank)
            for block in read_pictures(
                *(job.images.records, job.images.unlabelled, job.input_size, RUNTIME, missing),
                skip_bad=True,
                handout=shared,
            ):
                job.write(block, labeller.label(block))
                num_labelled[rank] += 1
    assert job.missing(job.blocks) == [] and num_labelled == {1: len(missing), 0: 0}
    job.join()
    job.store.commit(job.stage, {})
    assert labels_of(job) == labels_of(offline)


def test_a_job_goes_on_with_the_blocks_that_are_missing(
    offline: LabelJob, store: ArtifactStore, table: pa.Table
) -> None:
    job = job_of(store, table, "interrupted")
    size = job.blocks[0][1]
    assert len(job.blocks) == 3 and size % BATCH == 0
    whole = label_images(job)
    folder = Path(store.uri(job.folder))
    lost, *kept = sorted(folder.iterdir())
    lost.unlink()
    (folder / "00000000-00000016.parquet.0.partial").write_bytes(b"half of it")
    written = {path: path.stat().st_mtime_ns for path in kept}

    again = job_of(store, table, "interrupted")
    facts = label_images(again)
    assert {path: path.stat().st_mtime_ns for path in kept} == written
    assert facts["num_found"] == NUM_IMAGES - NUM_LABELLED - size and whole["num_found"] == 0
    step, counts = ray.get(again.broker.seen.remote())
    assert step == facts["num_found"] and counts == [size]
    store.commit(again.stage, facts)
    assert labels_of(again) == labels_of(offline)
    again.forget_blocks()
    assert not folder.exists()


def test_images_that_cannot_be_read_are_skipped_by_name(tmp_path: Path, store: ArtifactStore) -> None:
    table = write_images(tmp_path, NUM_IMAGES)
    bad = [tmp_path / "image 9.png", tmp_path / "image 40.png"]
    bad[0].write_bytes(bad[0].read_bytes()[:40])
    bad[1].unlink()
    job = job_of(store, table, "bad images", max_bad_fraction=0.1)
    facts = label_images(job)
    assert [row["uri"] for row in facts["skipped"]] == [str(path) for path in bad]
    assert all(row["uri"] in row["error"] for row in facts["skipped"])
    assert facts["num_images"] == NUM_IMAGES - NUM_LABELLED - 2
    store.commit(job.stage, facts)
    assert not {9 - NUM_LABELLED, 40 - NUM_LABELLED} & {row["position"] for row in labels_of(job)}

    strict = job_of(store, table, "bad images too many", max_bad_fraction=0.01)
    with pytest.raises(ValueError, match=r"2 of 41 images .* data\.max_bad_fraction=0\.01: .*image 9\.png"):
        label_images(strict)
    assert not store.has(strict.stage.key)
    assert len(strict.missing(strict.blocks)) == 0  # nothing is labelled twice when the user has looked at them


def test_balanced_thresholds_give_each_class_what_the_labelled_images_have(
    store: ArtifactStore, table: pa.Table
) -> None:
    """Predictions are painted once all of D_u is predicted, as painting by hand with the thresholds would."""
    pseudo = PSEUDO.model_copy(update={"class_thresholds": "balanced", "max_per_image": 100, "non_overlapping": True})
    job = job_of(store, table, "balanced", pseudo)
    facts = label_images(job)
    store.commit(job.stage, facts)
    labeller = PseudoLabeller(store, job.stage, torch.device("cpu"))
    predicted = [labeller.label(picture(table, i))[0] for i in range(NUM_LABELLED, NUM_IMAGES)]
    num_true = NUM_LABELLED / len(CATEGORIES)  # of each class, an image of D_l has one instance
    for category in CATEGORIES:
        scores = sorted(
            (np.float32(i["score"]) for p in predicted for i in p if i["category_id"] == category.id), reverse=True
        )
        wanted = round(num_true * len(predicted) / NUM_LABELLED)
        assert len(scores) > wanted and facts["class_thresholds"][category.name] == pytest.approx(
            float(scores[wanted - 1])
        )
    ids = {c.id: c.name for c in CATEGORIES}
    for row, candidates in zip(labels_of(job), predicted):
        size = [row["height"], row["width"]]
        sure: Any = [
            i | {"size": size, "score": float(np.float32(i["score"]))}
            for i in candidates
            if np.float32(i["score"]) >= facts["class_thresholds"][ids[i["category_id"]]]
        ]
        wanted_labels = [{k: v for k, v in i.items() if k != "size"} for i in paint(sure, pseudo)]
        assert [(i["category_id"], i["rle"]) for i in row["instances"]] == [
            (i["category_id"], i["rle"]) for i in wanted_labels
        ]
        assert all(i["visible_share"] is not None for i in row["instances"])


def test_a_teacher_that_finds_nothing_stops_its_student(store: ArtifactStore, table: pa.Table) -> None:
    """Offline before it begins, online when it has hardly begun; unless `pseudo.on_empty` is warn."""
    nothing = r"found nothing above pseudo\.score_threshold 1\.0 in {} images"
    job = job_of(store, table, "nothing", PSEUDO.model_copy(update={"score_threshold": 1.0}))
    with pytest.raises(ValueError, match=nothing.format("any of 41")):
        label_images(job)
    with pytest.raises(Exception, match=nothing.format("the first 5[0-9]{2}")):
        Stream(table, 30, job.recipe, batch_unlabelled=20).run(store, read_all, job.stage)

    resigned = job_of(store, table, "resigned", job.recipe.pseudo.model_copy(update={"on_empty": "warn"}))
    assert label_images(resigned)["num_pseudo_labels"] == 0
    batches = Stream(table, 30, resigned.recipe, batch_unlabelled=20).run(store, read_all, resigned.stage)
    assert len(batches) == 30 and not any(len(target.labels) for batch in batches for target in batch.targets[2:])


class Stream:
    """A training stream over D_l and D_u with labels from a table or from teachers, and what it needs while it runs."""

    def __init__(self, table: pa.Table, steps: int, recipe: Recipe = RECIPE, **options: Any):
        self.table, self.steps, self.recipe, self.options = table, steps, recipe, options

    def run(
        self,
        store: ArtifactStore,
        read: Callable[[Any, Any], Any],
        stage: Stage | None,
        refresh_steps: int = 0,
        learner: Learner | None = None,
    ):
        bundles = [stream_bundle(RUNTIME)] + (teacher_bundles(RUNTIME) if stage else [])
        with reserve(bundles) as group:
            configure_data(group, RUNTIME, 0)
            online = None
            teachers = start_teachers(store, self.recipe, CATEGORIES, group, 1) if stage else None
            if stage is not None and teachers is not None:
                online = OnlineLabels(stage, teachers.actors, teachers.versions, refresh_steps, learner)
            options = {"batch_labelled": 2, "batch_unlabelled": 3}
            batches = training_stream(
                self.options.get("images") or images_of(self.table),
                DATA.model_copy(update={"image_px": IMAGE_PX}),
                RUNTIME,
                StepShare(
                    steps=self.steps, seed=1, **options | {k: v for k, v in self.options.items() if k != "images"}
                ),
                SampleRules(strong=False),
                online=online,
            )
            return read(batches, teachers)


def read_all(batches: Any, teachers: Any) -> list[Batch]:
    return list(batches)


def test_online_labels_of_a_frozen_teacher_are_the_offline_ones(
    offline: LabelJob, store: ArtifactStore, table: pa.Table
) -> None:
    labels = ray.put(store.read_table(offline.stage.key, "labels").combine_chunks())
    images = images_of(table)
    with_labels = Images(images.records, images.labelled, images.unlabelled, CATEGORIES, labels)
    read_back = Stream(table, 20, images=with_labels).run(store, read_all, None)
    asked = Stream(table, 20).run(store, read_all, offline.stage)
    assert len(read_back) == len(asked) == 20
    assert sum(len(target.labels) for batch in asked for target in batch.targets[2:]) > 20
    for mine, theirs in zip(asked, read_back):
        assert_same(mine, theirs)
    shares = [
        Stream(table, 20, rank=rank, world_size=2, batch_unlabelled=6).run(store, read_all, offline.stage)
        for rank in range(2)
    ]
    both = Stream(table, 20, batch_unlabelled=6).run(store, read_all, offline.stage)
    for rank, share in enumerate(shares):
        for mine, theirs in zip(share, both):
            assert_same(mine, theirs, [rank, *range(2 + 3 * rank, 5 + 3 * rank)])


def published_weights(store: ArtifactStore, count: int) -> list[bytes]:
    """Weights as of versions 1, 2, ... of the teacher."""
    tensors = load_student(store, TEACHER.key).segmenter.state_dict()
    return [save_tensors({n: t + 0.01 * version for n, t in tensors.items()}) for version in range(1, count + 1)]


def test_a_refreshed_teacher_labels_by_the_step_and_not_by_the_clock(
    offline: LabelJob, store: ArtifactStore, table: pa.Table
) -> None:
    """Windows of 4 steps: the weights published after step 4 label steps 8..11, those after step 8 label 12..15."""
    versions = published_weights(store, 2)

    def train(batches: Any, teachers: Any) -> list[Batch]:
        found = []
        for step in range(16):
            if step in (4, 8):  # after that many steps, before the next batch is asked for
                ray.get(teachers.versions.publish.remote(step // 4, [ray.put(versions[step // 4 - 1])]))
            found.append(next(batches))
        return found

    frozen = Stream(table, 16).run(store, read_all, offline.stage)
    refreshed = Stream(table, 16).run(store, train, offline.stage, refresh_steps=4)
    for step, (mine, theirs) in enumerate(zip(refreshed, frozen)):
        same = all(equal(a, b) for a, b in zip(mine.targets, theirs.targets))
        assert same == (step < 8), step

    def resume(batches: Any, teachers: Any) -> list[Batch]:
        kept = {version + 1: [ray.put(weights)] for version, weights in enumerate(versions)}
        ray.get(teachers.versions.start.remote(kept))
        return list(batches)

    resumed = Stream(table, 16, start_step=10).run(store, resume, offline.stage, refresh_steps=4)
    assert len(resumed) == 6
    for mine, theirs in zip(resumed, refreshed[10:]):
        assert_same(mine, theirs)


def test_a_student_labels_its_own_images_from_the_third_window_on(
    offline: LabelJob, store: ArtifactStore, table: pa.Table
) -> None:
    """Windows of 2 steps; the student is of another architecture and image size than the frozen teacher."""
    model = RECIPE.student.model_copy(update={"num_queries": 5})
    student = build_segmenter(model, len(CATEGORIES), seed=7)
    learner = Learner(model, InputSize("fit", (48, 32)))

    def train(batches: Any, teachers: Any) -> list[Batch]:
        found = []
        for step in range(6):
            if step == 2:
                ray.get(teachers.versions.publish.remote(1, [ray.put(save_tensors(student.state_dict()))]))
            found.append(next(batches))
        return found

    frozen = Stream(table, 6).run(store, read_all, offline.stage)
    refreshed = Stream(table, 6).run(store, train, offline.stage, refresh_steps=2, learner=learner)
    for step, (mine, theirs) in enumerate(zip(refreshed, frozen)):
        assert all(equal(a, b) for a, b in zip(mine.targets, theirs.targets)) == (step < 4), step
    labelled = [t for batch in refreshed[4:] for t in batch.targets[2:]]
    assert any(len(t.labels) for t in labelled) and all(len(t.labels) <= 5 for t in labelled)


def test_two_workers_share_a_refreshed_teacher(offline: LabelJob, store: ArtifactStore, table: pa.Table) -> None:
    """In windows of 2 steps, so that both streams wait for weights most of the time, of one teacher."""
    steps, refresh_steps = 14, 2
    versions = published_weights(store, steps // refresh_steps)

    def publish(teachers: Any, step: int) -> None:
        if step and step % refresh_steps == 0:
            version = step // refresh_steps
            ray.get(teachers.versions.publish.remote(version, [ray.put(versions[version - 1])]))

    def alone(batches: Any, teachers: Any) -> list[Batch]:
        found = []
        for step in range(steps):
            publish(teachers, step)
            found.append(next(batches))
        return found

    whole = Stream(table, steps, batch_unlabelled=6).run(store, alone, offline.stage, refresh_steps)
    with reserve([stream_bundle(RUNTIME)] * 2 + teacher_bundles(RUNTIME)) as group:
        teachers = start_teachers(store, RECIPE, CATEGORIES, group, 2)
        streams, first = [], []
        for rank in range(2):
            configure_data(group, RUNTIME, rank)
            streams.append(
                training_stream(
                    images_of(table),
                    DATA.model_copy(update={"image_px": IMAGE_PX}),
                    RUNTIME,
                    StepShare(2, 6, steps, seed=1, rank=rank, world_size=2),
                    SampleRules(strong=False),
                    online=OnlineLabels(offline.stage, teachers.actors, teachers.versions, refresh_steps),
                )
            )
            first.append(next(streams[-1]))  # type: ignore[call-overload]
        for step in range(steps):
            publish(teachers, step)
            for rank, stream in enumerate(streams):
                mine = next(stream) if step else first[rank]  # type: ignore[call-overload]
                assert_same(mine, whole[step], [rank, *range(2 + 3 * rank, 5 + 3 * rank)])


def equal(mine: Targets, theirs: Targets) -> bool:
    return mine.masks.shape == theirs.masks.shape and torch.equal(mine.masks, theirs.masks)


def test_a_slow_student_holds_its_teachers_back(
    offline: LabelJob, store: ArtifactStore, table: pa.Table, wait_until: Callable[..., None]
) -> None:
    """At most what the stream's tasks and its memory hold is labelled ahead, however long the student takes."""

    @ray.remote(num_cpus=0)
    class Counting:
        def __init__(self) -> None:
            self.images = 0

        def label(
            self, stage: Stage, learner: Any, version: int, weights: Any, asked: Pictures
        ) -> list[list[dict[str, Any]]]:
            self.images += len(asked.positions)
            return [[] for _ in asked.positions]

        def count(self) -> int:
            return self.images

    teacher: Any = Counting.remote()  # type: ignore[attr-defined]
    runtime = RUNTIME.model_copy(update={"stream_memory_mb": 16})
    steps, batch_unlabelled = 400, 4
    large = DATA.model_copy(update={"image_px": (512, 512)})
    with reserve([stream_bundle(runtime)]) as group:
        configure_data(group, runtime, 0)
        batches: Any = training_stream(
            images_of(table),
            large,
            runtime,
            StepShare(2, batch_unlabelled, steps, seed=0),
            SampleRules(strong=True),
            online=OnlineLabels(offline.stage, (teacher,), None, 0),
        )
        next(batches)
        seen = [0, 0]

        def rests() -> bool:
            seen.append(ray.get(teacher.count.remote()))
            return len(seen) > 60 and len(set(seen[-40:])) == 1

        wait_until(rests, "the teachers never rest")
        ahead = seen[-1] // batch_unlabelled
        step_mb = 6 * 512 * 512 * 6 / 2**20
        assert ahead <= 16 / step_mb + 2 * runtime.reads_per_stream + 4 < steps / 10
        batches.close()


def test_the_artifact_is_one_file(offline: LabelJob, store: ArtifactStore) -> None:
    folder = Path(store.artifact(offline.stage.key))
    assert [str(path.relative_to(folder)) for path in folder.rglob("*.parquet")] == [LABELS]
