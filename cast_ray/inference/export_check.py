"""Proof of an exported file: the file itself is run on validation images, beside the student in PyTorch and float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cast_ray.contracts.compute_node import ComputeNode
from cast_ray.contracts.instance import Instances
from cast_ray.contracts.records import Category, ClassMap
from cast_ray.data.reading.images import read_image
from cast_ray.data.views import fit_image
from cast_ray.evaluation.detections import Detections, Truth, single_precision, tie_order
from cast_ray.evaluation.efficiency import measure_seconds
from cast_ray.evaluation.matches import DetectionMatches, join
from cast_ray.evaluation.measures import match_images
from cast_ray.inference.exported import ExportedStudent
from cast_ray.models.export import INPUTS
from cast_ray.models.postprocess import predict_in_groups
from cast_ray.models.student import Student
from cast_ray.recipe import EvaluationConfig, InputSize
from cast_ray.report.statistics import joint_interval, resampled_ap
from cast_ray.runtime.this_node import cpu_model

REPEATS, BATCH = 10, 4
"""How often latency and throughput are measured, and the images of a batch for the latter."""


def check_export(
    student: Student,
    exported: ExportedStudent,
    records: pa.Table,
    categories: tuple[Category, ...],
    settings: EvaluationConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measures an exported file and the student that it was made of on the same images and device.

    Args:
        student: moved to the file's device; it computes in float32 here.
        exported: the file.
        records: RECORD_SCHEMA rows of the validation images.
        categories: classes of the dataset; those of the student are found by their names.
        settings: which AP, and how many detections of an image.
        progress: called with the number of images done, and of all.

    Returns:
        images, metric; mask_ap and reference_ap in percent; difference, of the file to the reference, and interval, its
        95 % interval (resampled images, the same for both; None: none); device, runtime; latency_ms (median of one
        image), images_per_s (in batches of `batch`), and reference_latency_ms.

    Raises:
        ValueError: the dataset lacks a class of the student, or no image holds an object of its classes.
    """
    classes = ClassMap(_of_student(student, categories))
    student.to(exported.device)
    student.precision = "off"
    ends = [(exported.predict, InputSize.of(exported.image_px)), (student.predict, student.input_size)]
    matches: list[list[DetectionMatches]] = [[], []]
    for done, record in enumerate(records.to_pylist(), 1):
        image = read_image(record["uri"], (record["height"], record["width"]))
        truth = Truth.of(record, classes)
        for parts, (predict, size) in zip(matches, ends):
            (found,) = _predict(predict, image, size, settings.max_detections)
            parts.append(match_images([truth], [Detections.of(single_precision(found))], len(classes), settings))
        progress(done, records.num_rows)
    rows, order = [np.array([i]) for i in range(records.num_rows)], tie_order(records.column("image_id").to_pylist())
    ours, reference = (join(parts, rows, order) for parts in matches)
    ap, reference_ap = ours.mask_ap(), reference.mask_ap()
    if math.isnan(reference_ap):
        raise ValueError(f"none of the {records.num_rows} validation images holds an object of the student's classes")
    pairs = resampled_ap(ours) - resampled_ap(reference)
    interval = joint_interval([ap - reference_ap], pairs[None], np.random.default_rng(1))
    return {
        "images": records.num_rows,
        "metric": settings.metric,
        "mask_ap": round(ap, 3),
        "reference_ap": round(reference_ap, 3),
        "difference": round(ap - reference_ap, 3),
        "interval": None if interval is None else [round(interval.low, 3), round(interval.high, 3)],
        "device": _device_name(exported.device),
        "runtime": exported.runtime,
        **_speed(student, exported),
    }


def _of_student(student: Student, categories: tuple[Category, ...]) -> list[Category]:
    by_name = {category.name: category for category in categories}
    missing = [category.name for category in student.categories if category.name not in by_name]
    if missing:
        raise ValueError(
            f"the validation images have no class {', '.join(missing[:8])}: expected those of the student, "
            f"found {', '.join(list(by_name)[:8])}"
        )
    return [by_name[category.name] for category in student.categories]


def _predict(
    predict: Callable[..., list[Instances]], image: np.ndarray, size: InputSize, max_detections: int
) -> list[Instances]:
    pixels, inside = fit_image(image, size)
    return predict_in_groups(predict, [pixels], [(image.shape[0], image.shape[1])], [inside], max_detections)


def _speed(student: Student, exported: ExportedStudent) -> dict[str, Any]:
    """Times of the whole file, from pixels to masks at the size of its images."""
    size, cpu = exported.image_px, torch.device("cpu")  # the file's outputs are on the CPU, so nothing is left queued
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 3, *size), dtype=np.uint8)
    sides = np.array(size)
    seconds = [
        measure_seconds(lambda n=n: exported.run(dict(zip(INPUTS, (images[:n], sides, sides)))), cpu, REPEATS)  # type: ignore[misc]
        for n in (1, BATCH)
    ]
    one = torch.from_numpy(images[:1])
    reference = measure_seconds(lambda: student.predict(one), cpu, REPEATS)
    return {
        "latency_ms": round(1e3 * seconds[0], 2),
        "images_per_s": round(BATCH / seconds[1], 2),
        "batch": BATCH,
        "reference_latency_ms": round(1e3 * reference, 2),
    }


def _device_name(device: torch.device) -> str:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return ComputeNode(gpu=gpu, cpu=cpu_model()).device
