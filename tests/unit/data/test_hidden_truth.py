"""The ground truth of D_u is in the record tables: it reaches a training batch for the oracle sampler alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from cast_ray.contracts.records import Batch, Category
from cast_ray.data.batches import from_buffer, to_batch
from cast_ray.data.reading import images as image_files
from cast_ray.recipe import DataConfig
from cast_ray.runtime.data import training_stream
from cast_ray.runtime.data.images import Images

SIZE = 32
DATA = DataConfig(image_px=(SIZE, SIZE), scale_jitter=(1, 1), flip=False)


def instance(category: int, score: float, columns: slice) -> dict[str, Any]:
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8, order="F")
    mask[:, columns] = 1
    return {"category_id": category, "rle": coco_mask.encode(mask)["counts"], "score": score, "is_crowd": False}


def record(*instances: dict[str, Any]) -> dict[str, Any]:
    return {"image_id": "0", "uri": "x", "height": SIZE, "width": SIZE, "instances": list(instances)}


TRUTH = [record(instance(1, 1.0, slice(0, 9))), record(instance(1, 1.0, slice(9, 20)))]
GUESSES = [record(instance(2, 0.5, slice(20, 32)))]


def black(uri: str, image_hw: tuple[int, int], window: tuple[int, int, int, int]) -> np.ndarray:
    """Stands in for `read_image`."""
    return np.zeros((*window[2:], 3), dtype=np.uint8)


def steps(monkeypatch: pytest.MonkeyPatch, *, labels: bool, oracle: bool) -> Batch:
    """One step of one labelled and one unlabelled image, as a Data task makes it."""
    tables = {"records": TRUTH, "labels": GUESSES}
    monkeypatch.setattr(training_stream, "record_at", lambda ref, index: dict(tables[ref][int(index)]))
    monkeypatch.setattr(image_files, "read_image", black)
    images = Images(
        "records",  # type: ignore[arg-type]
        np.array([0]),
        np.array([1]),
        (Category(1, "a"), Category(2, "b")),
        "labels" if labels else None,  # type: ignore[arg-type]
    )
    first = np.zeros((1, 1), dtype=np.int64)  # of D_l and of D_u
    rules = training_stream.SampleRules(strong=True, oracle=oracle)
    plan = training_stream.StepSchedule(images, DATA, 0, first, first, 0, (0, 1), rules, online=None)
    made = training_stream._make_steps(0, 1, plan=plan)
    return to_batch(from_buffer(made.column("batch")[0].as_buffer()))


@pytest.mark.parametrize("labels", [True, False])
def test_the_truth_of_unlabelled_images_stays_hidden(monkeypatch: pytest.MonkeyPatch, labels: bool) -> None:
    batch = steps(monkeypatch, labels=labels, oracle=False)
    assert batch.num_labelled == 1
    assert batch.truth_instance[0].unique().tolist() == [0, 1] and batch.truth_class[0].unique().tolist() == [0, 2]
    assert batch.truth_instance[1].eq(-1).all() and batch.truth_class[1].eq(-1).all()
    labelled, unlabelled = batch.targets
    assert labelled.labels.tolist() == [0] and labelled.weights.tolist() == [1]
    assert unlabelled.labels.tolist() == ([1] if labels else [])
    if labels:
        assert unlabelled.masks[0].any(0).nonzero()[:, 0].tolist() == list(range(20, 32))
        assert unlabelled.weights.tolist() == [0.5]


def test_the_oracle_sees_it_and_the_set_loss_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = steps(monkeypatch, labels=True, oracle=True)
    assert batch.truth_instance[1, :, 9:20].eq(1).all() and batch.truth_instance[1, :, 20:].eq(0).all()
    assert batch.truth_class[1, :, 9:20].eq(0).all()
    assert batch.targets[1].labels.tolist() == [1]  # the teacher's guess
