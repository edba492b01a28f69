"""The audit of pseudo-labels in a report: tables and a page of the images with most errors."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute

from cast_ray.common.files import write_atomically
from cast_ray.contracts.records import ClassMap, encode_image_id, instances_of
from cast_ray.data.reading.images import read_image
from cast_ray.plan.graph import RowPlan, Stage
from cast_ray.report.label_audit import WORST_SHEET
from cast_ray.report.overlays import contact_sheet
from cast_ray.runtime.sweep.row_results import SweepContext, read_audit

if TYPE_CHECKING:
    import pyarrow.dataset  # loads pandas

NUM_WORST = 6


def worst_cases(context: SweepContext, row: RowPlan, path: Path) -> bool:
    """Writes a page of the images with most errors of a row's last labelling stage: the hidden truth, the labels.

    The page is kept in the store by the labels it shows, so that a repeated command draws nothing again.

    Returns:
        False, and no file, when the row has no labels, no audit of them, or no error in them.
    """
    store = context.store
    stage = row.roles.get("label-teacher") or row.roles.get("label-adapted")
    if stage is None or not store.has(stage.key):
        return False
    cached = f"pictures/{stage.fingerprint}-worst.png"
    page = store.find_bytes(cached)
    if page is None:
        page = _draw_worst(context, stage)
        if page is None:
            return False
        store.write_bytes(cached, page)
    write_atomically(path, page)
    return True


def _draw_worst(context: SweepContext, stage: Stage) -> bytes | None:
    store = context.store
    audit = read_audit(store, stage.key)
    cases = audit.worst[:NUM_WORST] if audit else ()
    if not cases:
        return None
    classes = ClassMap(context.categories)
    positions, ids = [c.position for c in cases], [encode_image_id(c.image_id) for c in cases]
    labels = _rows(store.open_dataset(stage.key, "labels"), "position", positions)
    truth = _rows(store.open_dataset(context.dataset_key, "train.parquet"), "image_id", ids)
    columns = [
        ("ground truth (hidden)", [_drawable(truth[i], classes, scores=False) for i in ids]),
        ("pseudo-labels", [_drawable(labels[p], classes, scores=True) for p in positions]),
    ]
    images = [read_image(truth[i]["uri"]) for i in ids]
    with tempfile.TemporaryDirectory() as folder:
        return contact_sheet(images, columns, classes.names(), Path(folder) / WORST_SHEET).read_bytes()


def _rows(dataset: pyarrow.dataset.Dataset, column: str, values: Sequence[Any]) -> dict[Any, dict[str, Any]]:
    """The few rows with these values, without reading the rest into memory."""
    found = dataset.to_table(filter=pyarrow.compute.field(column).isin(list(values))).to_pylist()
    return {row[column]: row for row in found}


def _drawable(record: dict[str, Any], classes: ClassMap, *, scores: bool) -> list[dict[str, Any]]:
    return [
        {"rle": i["rle"], "label": classes.label(i["category_id"])} | ({"score": i["score"]} if scores else {})
        for i in instances_of(record)
    ]
