"""The sweep in one picture: unlabelled images, their hidden ground truth, the teacher's pseudo-labels, the student."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from cast_ray.common.files import write_atomically
from cast_ray.contracts.instance import Instances
from cast_ray.contracts.records import ClassMap, instances_of, take_rows
from cast_ray.data.reading.images import read_image
from cast_ray.plan.graph import RowPlan
from cast_ray.plan.stage_parts import LabelPart
from cast_ray.report.overlays import contact_sheet
from cast_ray.runtime.data.splits import stored_split
from cast_ray.runtime.sweep.row_results import SweepContext
from cast_ray.runtime.sweep.run import Sweep

NUM_IMAGES = 5
MIN_SCORE = 0.3


def draw_samples(sweep: Sweep, path: Path) -> bool:
    """Writes the contact sheet of the last finished row that used pseudo-labels; False when there is none.

    The picture is kept in the store by the student it shows, so a repeated command does not load the model again.
    """
    context, store = sweep.context, sweep.context.store
    for row in reversed(sweep.rows):
        student = row.student_stages[0]
        labels = row.roles.get("label-teacher")
        if labels is not None and store.has(student.key) and store.has(labels.key):
            break
    else:
        return False
    cached = f"pictures/{student.fingerprint}.png"
    picture = store.find_bytes(cached)
    if picture is None:
        picture = _draw(context, row, labels.key, student.key)
        store.write_bytes(cached, picture)
    write_atomically(path, picture)
    return True


def _draw(context: SweepContext, row: RowPlan, labels_key: str, student_key: str) -> bytes:
    store = context.store
    classes = ClassMap(context.categories)
    train = store.read_table(context.dataset_key, "train.parquet")
    part = LabelPart.of(row.roles["label-teacher"]).split
    unlabelled = stored_split(store, context.content_hash, part).unlabelled
    positions = np.flatnonzero(unlabelled < train.num_rows)[:NUM_IMAGES]
    if len(positions):
        records = take_rows(train, unlabelled[positions]).to_pylist()
        truth = [("ground truth (hidden)", [_drawable(r, classes, scores=False) for r in records])]
    else:  # all of D_u is the extra pool, whose ground truth nobody knows
        positions = np.arange(min(NUM_IMAGES, len(unlabelled)))
        extra = store.read_table(context.dataset_key, "extra.parquet")
        records, truth = take_rows(extra, unlabelled[positions] - train.num_rows).to_pylist(), []
    labels = store.read_table(labels_key, "labels")
    labels = labels.filter(pa.compute.is_in(labels.column("position"), value_set=pa.array(positions)))
    pseudo = {r["position"]: r for r in labels.to_pylist()}
    images = [read_image(record["uri"], (record["height"], record["width"])) for record in records]
    columns: list[tuple[str, Sequence[Sequence[Mapping[str, Any]]]]] = [
        *truth,
        ("pseudo-labels", [_drawable(pseudo[p], classes, scores=True) for p in positions.tolist()]),
        ("student", _predict(context, student_key, images)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        return contact_sheet(images, columns, classes.names(), Path(folder) / "samples.png").read_bytes()


def _drawable(record: dict[str, Any], classes: ClassMap, *, scores: bool) -> list[dict[str, Any]]:
    return [
        {"rle": i["rle"], "label": classes.label(i["category_id"])} | ({"score": i["score"]} if scores else {})
        for i in instances_of(record)
    ]


def _predict(context: SweepContext, key: str, images: list[np.ndarray]) -> list[Instances]:
    from cast_ray.data.views import fit_image
    from cast_ray.models.postprocess import predict_in_groups
    from cast_ray.runtime.store.models import load_teacher

    student = load_teacher(context.store, key)
    fitted = [fit_image(image, student.input_size) for image in images]
    sizes = [(image.shape[0], image.shape[1]) for image in images]
    inside = [size for _, size in fitted]
    return predict_in_groups(
        student.predict, [pixels for pixels, _ in fitted], sizes, inside, None, min_score=MIN_SCORE
    )
