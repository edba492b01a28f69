"""A row's worst and best validation images: chosen and drawn once from the store, then a file of the run folder."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from cast_ray.contracts.records import ClassMap, decode_image_id, instances_of, take_rows
from cast_ray.data.reading.images import read_image
from cast_ray.models.drawing import class_colours
from cast_ray.plan.graph import RowPlan, Stage
from cast_ray.report.overlays import draw_panels
from cast_ray.report.samples import NUM_EACH
from cast_ray.runtime.store.artifact_files import RESULTS
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.sweep.row_results import SweepContext

MIN_SCORE = 0.3
MATCH_IOU = 0.5
UPSCALE, MAX_PX = 3, 320


def image_quality(truth: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> float | None:
    """How well one image is segmented, in percent: sum of IoU of matched pairs / (TP + FP / 2 + FN / 2).

    Detections are matched in falling score order to the object of their class that they overlap most, above IoU .5.

    Args:
        truth, found: instances with `rle` (COCO counts), `size` and `label`; `found` with `score`.

    Returns:
        None for an image with neither objects nor detections.

    Source: panoptic quality (Kirillov et al., 2019). Deviations: masks may overlap.
    """
    if not truth and not found:
        return None
    ranked = sorted(found, key=lambda i: -i["score"])
    overlaps = np.zeros((len(ranked), len(truth)))
    if ranked and truth:
        ious = coco_mask.iou([_rle(i) for i in ranked], [_rle(i) for i in truth], [0] * len(truth))
        same_class = np.array([[f["label"] == t["label"] for t in truth] for f in ranked])
        overlaps = np.asarray(ious) * same_class
    matched, total = 0, 0.0
    for i in range(len(ranked)):
        best = int(overlaps[i].argmax()) if len(truth) else -1
        if best >= 0 and overlaps[i, best] > MATCH_IOU:
            matched += 1
            total += float(overlaps[i, best])
            overlaps[:, best] = 0
    return 100 * total / (matched + (len(ranked) - matched) / 2 + (len(truth) - matched) / 2)


def choose(qualities: Mapping[int, tuple[float, int]], num_each: int = NUM_EACH) -> list[tuple[str, int]]:
    """(`worst` or `best`, image) of those with the lowest and the highest quality, each image once.

    Args:
        qualities: image -> its quality and how many objects it holds; of equal ones the image with more objects counts.
    """
    ranked = sorted(qualities, key=lambda i: (qualities[i][0], -qualities[i][1], i))
    worst = ranked[: min(num_each, len(ranked) // 2)]
    best = sorted(ranked[len(worst) :], key=lambda i: (-qualities[i][0], -qualities[i][1], i))[:num_each]
    return [("worst", i) for i in worst] + [("best", i) for i in best]


def row_samples(context: SweepContext, row: RowPlan) -> bytes | None:
    """`samples.json` of a finished row; None where its evaluation is not in the store.

    Kept in the store under the evaluations it shows, so that a repeated command draws nothing again.
    """
    store = context.store
    student = row.roles.get("refined") or row.roles.get("student")
    teacher = row.roles.get("teacher")
    if student is None or not store.has(student.key):
        return None
    if teacher is not None and not store.has(teacher.key):
        teacher = None
    cached = f"pictures/{student.fingerprint}-{teacher.fingerprint if teacher else 'none'}.json"
    content = store.find_bytes(cached)
    if content is None:
        content = json.dumps(_draw(context, row, student, teacher)).encode()
        store.write_bytes(cached, content)
    return content


def _draw(context: SweepContext, row: RowPlan, student: Stage, teacher: Stage | None) -> dict[str, Any]:
    store, classes = context.store, ClassMap(context.categories)
    val = store.read_table(context.dataset_key, "val.parquet").slice(0, row.recipe.evaluation.num_images)
    ids = [decode_image_id(i) for i in val.column("image_id").to_pylist()]
    found = _detections(store, student, classes)
    qualities = {}
    for i, record in enumerate(val.select(["height", "width", "instances"]).to_pylist()):
        truth = _truth(record, classes)
        quality = image_quality(truth, found.get(ids[i], []))
        if quality is not None:
            qualities[i] = (quality, len(truth))
    chosen = choose(qualities)
    answers = {"student": found} | ({"teacher": _detections(store, teacher, classes)} if teacher else {})
    samples = []
    for (kind, i), record in zip(chosen, take_rows(val, [i for _, i in chosen]).to_pylist()):
        shown = {"ground truth": _truth(record, classes)}
        shown |= {name: answers[name].get(ids[i], []) for name in ("teacher", "student") if name in answers}
        panels = draw_panels(read_image(record["uri"]), list(shown.values()), classes.names(), UPSCALE, MAX_PX)
        samples.append(
            {
                "kind": kind,
                "image_id": str(ids[i]),
                "score": qualities[i][0],
                "panels": [[name, _data_uri(p)] for name, p in zip(["image", *shown], panels)],
            }
        )
    colours = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in class_colours(len(classes))]
    return {"samples": samples, "legend": [list(pair) for pair in zip(classes.names(), colours)]}


def _detections(store: ArtifactStore, evaluation: Stage, classes: ClassMap) -> dict[Any, list[dict[str, Any]]]:
    """Image id -> what a model found there above the score that is shown."""
    from cast_ray.evaluation.coco_results import results_of

    found: dict[Any, list[dict[str, Any]]] = {}
    with store.read_stream(evaluation, RESULTS) as lines:
        for each in results_of(lines):
            if each["score"] > MIN_SCORE:
                instance = {
                    "rle": each["segmentation"]["counts"],
                    "size": each["segmentation"]["size"],
                    "label": classes.label(each["category_id"]),
                    "score": each["score"],
                }
                found.setdefault(each["image_id"], []).append(instance)
    return found


def _truth(record: Mapping[str, Any], classes: ClassMap) -> list[dict[str, Any]]:
    size = [record["height"], record["width"]]
    return [
        {"rle": i["rle"], "size": size, "label": classes.label(i["category_id"])} for i in instances_of(dict(record))
    ]


def _rle(instance: Mapping[str, Any]) -> dict[str, Any]:
    return {"size": list(instance["size"]), "counts": instance["rle"]}


def _data_uri(panel: Image.Image) -> str:
    buffer = io.BytesIO()
    panel.save(buffer, "WEBP", quality=60, method=6)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
