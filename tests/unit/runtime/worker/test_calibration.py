"""Thresholds that hold a precision, from the stored labels of folds to the labels of D_u, without Ray and models."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from cast_ray.contracts.instance import RecordLabel
from cast_ray.contracts.manifest import LabelManifest
from cast_ray.contracts.records import RECORD_SCHEMA, Category, encode_image_id
from cast_ray.data.formats.segmentations import encode_mask
from cast_ray.data.splits.folds import fold_rows
from cast_ray.evaluation.matches import load_matches
from cast_ray.plan.graph import Stage
from cast_ray.recipe import PseudoConfig, Recipe, build_recipe
from cast_ray.runtime.data.images import Images
from cast_ray.runtime.data.pictures import Pictures
from cast_ray.runtime.store.artifact_files import CALIBRATION, LABELS
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.worker.label_job import LABEL_SCHEMA, LabelJob

CATEGORIES = (Category(2, "disc"), Category(7, "square"))
NUM_LABELLED, NUM_UNLABELLED, NUM_FOLDS = 60, 10, 3
SIDE = 16


def box(place: int) -> bytes:
    """A mask of one of four places, none of which touches another."""
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    top, left = 8 * (place // 2), 8 * (place % 2)
    mask[top : top + 6, left : left + 6] = True
    return encode_mask(mask)


def record(number: int, instances: Sequence[Any]) -> dict[str, Any]:
    row = [encode_image_id(number), f"{number}.png", SIDE, SIDE, instances]
    return dict(zip(RECORD_SCHEMA.names, row))


def found(category: int, place: int, score: float) -> RecordLabel:
    plain = {"category_id": category, "rle": box(place), "score": score, "is_crowd": False, "area": None}
    of_labels = {"visible_share": 1.0, "num_suppressed": 0, "class_probs": None, "mask_probs": None}
    return cast(RecordLabel, plain | of_labels)


def labels_of(number: int) -> list[RecordLabel]:
    """A disc at place 0 is found surely. Of squares, those with a high score are right and the others are not there."""
    sure = 0.8 + 0.1 * (number % 7) / 7
    return [found(2, 0, 0.9), found(7, 1, sure), found(7, 2, 0.4 + 0.1 * (number % 5) / 5)]


@pytest.fixture
def images() -> Images:
    truth = [found(2, 0, 1.0), found(7, 1, 1.0)]
    table = pa.Table.from_pylist([record(i, truth) for i in range(NUM_LABELLED + NUM_UNLABELLED)], RECORD_SCHEMA)
    order = np.random.default_rng(0).permutation(table.num_rows)
    return Images(table, order[:NUM_LABELLED], order[NUM_LABELLED:], CATEGORIES)


@pytest.fixture
def store(tmp_path: Path, images: Images) -> ArtifactStore:
    """With the labels of each fold; the last image of the first could not be read."""
    store = ArtifactStore(str(tmp_path))
    for index in range(NUM_FOLDS):
        places = fold_rows(NUM_LABELLED, index, NUM_FOLDS)[: -1 if index == 0 else None]
        rows = [
            record(int(images.labelled[place]), labels_of(int(place))) | {"position": position}
            for position, place in enumerate(places)
        ]
        sink = io.BytesIO()
        pa.parquet.write_table(pa.Table.from_pylist(rows, LABEL_SCHEMA), sink)
        fold = Stage(f"label-adapted-fold{index + 1}", "label", {}, {}, f"{index}" * 20)
        store.add(fold, LABELS, sink.getvalue())
        store.commit(fold, {})
    return store


def job_of(store: ArtifactStore, images: Images, precision: float, on_empty: str = "stop") -> LabelJob:
    pseudo = PseudoConfig(precision=precision, score_threshold=0.3, min_area_px=1)
    config = {"pseudo": pseudo.model_dump(), "data": {"image_px": [SIDE, SIDE]}, "batch": 4}
    parents = {"teacher": "t" * 20} | {f"held-out {k + 1}": f"{k}" * 20 for k in range(NUM_FOLDS)}
    recipe: Recipe = build_recipe("shapes", "smoke", {"pseudo.precision": precision, "pseudo.on_empty": on_empty})
    job = LabelJob(store, Stage("label-adapted", "label", config, parents, f"{precision}"), images, None, "row", recipe)
    for start, stop in job.blocks:
        positions = list(range(start, stop))
        none: list[Any] = []
        job.write_block(Pictures(positions, none, none, none), [labels_of(p) for p in positions])
    return job


def test_each_class_keeps_the_labels_above_the_score_at_which_they_are_right(
    store: ArtifactStore, images: Images
) -> None:
    job = job_of(store, images, 0.9)
    facts = job.join()
    store.commit(job.stage, facts)
    manifest = store.manifest(job.stage.key)
    assert isinstance(manifest, LabelManifest) and manifest.held_precision is not None
    held = manifest.held_precision
    assert (held.precision, held.error, held.num_images, held.num_folds) == (0.9, 0.1, NUM_LABELLED, NUM_FOLDS)
    discs, squares = held.groups
    assert discs.classes == ("disc",) and (discs.num_right, discs.num_labels) == (59, 59) and not held.left_out
    assert squares.threshold is not None and 0.45 < squares.threshold <= np.float32(0.8)
    assert squares.num_right == 59 and squares.bound >= 0.9 and squares.share_right is not None
    assert manifest.class_thresholds == {"disc": discs.threshold, "square": squares.threshold}
    rows = store.read_table(job.stage.key, LABELS).to_pylist()
    kept = [[(i["category_id"], i["score"] >= squares.threshold) for i in row["instances"]] for row in rows]
    assert kept == [[(2, True), (7, True)]] * NUM_UNLABELLED and facts["num_pseudo_labels"] == 2 * NUM_UNLABELLED
    assert {i["rle"] for row in rows for i in row["instances"]} == {box(0), box(1)}
    matches = load_matches(store.read_bytes(job.stage.key, CALIBRATION))
    assert matches.num_images == NUM_LABELLED and len(matches.score) == 3 * 59


def test_a_class_for_which_it_cannot_be_shown_is_left_out_and_a_row_without_any_stops(
    store: ArtifactStore, images: Images
) -> None:
    table = images.records.to_pylist()
    for number, row in enumerate(table):  # every sixth square is not there
        row["instances"] = row["instances"][: 1 if number % 6 == 0 else 2]
    records = pa.Table.from_pylist(table, RECORD_SCHEMA)
    fewer = Images(records, images.labelled, images.unlabelled, CATEGORIES)
    job = job_of(store, fewer, 0.95)
    facts = job.join()
    (squares,) = (g for g in facts["held_precision"]["groups"] if g["threshold"] is None)
    assert tuple(squares["classes"]) == ("square",) and squares["bound"] < 0.95
    assert set(facts["class_thresholds"]) == {"disc"} and facts["num_pseudo_labels"] == NUM_UNLABELLED
    nothing = r"no class is shown to hold pseudo\.precision 0\.999 on the 60 images of D_l; disc, square comes nearest"
    with pytest.raises(ValueError, match=nothing):
        job_of(store, fewer, 0.999).join()
    assert job_of(store, fewer, 0.999, on_empty="warn").join()["num_pseudo_labels"] == 0
