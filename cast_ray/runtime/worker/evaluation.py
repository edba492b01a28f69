"""Measuring a model on the validation images: each worker matches its share as it goes, the first joins the rest.

A worker holds one batch of images and some 20 bytes of every detection; results go to the store line by line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from cast_ray.engine.world import World
from cast_ray.evaluation.detections import Detections, Truth, tie_order
from cast_ray.evaluation.matches import Matches, join, load_matches
from cast_ray.evaluation.measures import match_images, metrics_of
from cast_ray.recipe import EvaluationConfig, InputSize, Recipe, RuntimeConfig
from cast_ray.contracts.records import Category, ClassMap
from cast_ray.runtime.store.models import load_labeller
from cast_ray.runtime.sweep.row_results import MATCHES, METRICS, RESULTS
from cast_ray.runtime.data.streams import picture_dataset, pictures
from cast_ray.runtime.data.record_tables import record_at
from cast_ray.runtime.worker.group import Segment
from cast_ray.runtime.worker.predict import coco_results, predict, results_document, results_lines
from cast_ray.plan.graph import Stage, input_size_of
from cast_ray.teachers.protocol import Teacher

POST_EVERY_S = 1.0


@dataclass(frozen=True)
class ValidationSet:
    """The images that models are measured on, by reference, and how; small, sent to workers and actors."""

    records: ray.ObjectRef
    num_images: int
    input_size: InputSize
    categories: tuple[Category, ...]
    settings: EvaluationConfig
    runtime: RuntimeConfig

    @classmethod
    def of(cls, segment: Segment, recipe: Recipe, input_size: InputSize) -> ValidationSet:
        """Of a segment: the first `evaluation.num_images` validation images, at the size that a model sees."""
        assert segment.val is not None
        num_images = min(segment.num_val, recipe.evaluation.num_images or segment.num_val)
        return cls(segment.val, num_images, input_size, segment.categories, recipe.evaluation, recipe.runtime)

    def tie_order(self) -> np.ndarray:
        table: pa.Table = ray.get(self.records)
        return tie_order(table.column("image_id").slice(0, self.num_images).to_pylist())


def measure(
    teacher: Teacher,
    images: ValidationSet,
    rows: np.ndarray,
    device: torch.device,
    on_batch: Callable[[int, Iterator[dict[str, Any]]], None] = lambda count, results: None,
) -> Matches:
    """Matches a model's detections on some validation images.

    Args:
        teacher: a teacher, or a student as one, on `device`.
        rows: int [n], row numbers of the images.
        on_batch: called with the number of images done and the COCO results of each batch.

    Raises:
        RuntimeError: images went missing on the way.
    """
    settings, classes = images.settings, ClassMap(images.categories)
    parts, positions, done = [], [], 0
    for batch in pictures(picture_dataset(images.records, rows, images.input_size, images.runtime)):
        found = predict(
            teacher, batch.pixels, batch.image_hw, batch.resized_hw, settings.max_detections, settings.batch
        )
        records = [record_at(images.records, rows[p]) for p in batch.positions]
        truth = [Truth.of(record, classes) for record in records]
        parts.append(match_images(truth, [Detections.of(f) for f in found], len(classes), settings))
        positions.append(np.array(batch.positions))
        done += len(batch.positions)
        on_batch(done, coco_results([r["image_id"] for r in records], found, images.categories))
    if done != len(rows):
        raise RuntimeError(f"evaluate: {len(rows)} images went in, {done} came out")
    if not parts:  # more workers than images
        parts, positions = [match_images([], [], len(classes), settings)], [np.arange(0)]
    return join(parts, positions)


def evaluate_stage(segment: Segment, stage: Stage, world: World) -> dict[str, Any]:
    """An evaluate stage on this worker; the first one writes the artifact's metrics, matches and results."""
    store = segment.store
    images = ValidationSet.of(segment, segment.recipe, input_size_of(stage))
    teacher = load_labeller(store, stage, "model", world.device)
    share = [np.arange(images.num_images)[rank :: world.size] for rank in range(world.size)]
    began = time.monotonic()
    post = {"stage": "evaluate", "fingerprint": stage.fingerprint, "steps": len(share[world.rank]), "unit": "image"}
    posted = 0.0
    with store.open_to_add(stage, _part("results", world.rank, "jsonl")) as file:

        def on_batch(done: int, results: Iterator[dict[str, Any]]) -> None:
            nonlocal posted
            file.write(results_lines(results))
            if world.rank == 0 and time.monotonic() - posted > POST_EVERY_S:
                posted = time.monotonic()
                rate = done * world.size / max(posted - began, 1e-9)
                segment.broker.post.remote(segment.owner, post | {"step": done, "images_per_s": rate})

        matches = measure(teacher, images, share[world.rank], world.device, on_batch)
    seconds = time.monotonic() - began
    if world.rank > 0:
        store.add(stage, _part("matches", world.rank, "npz"), matches.to_bytes())
    world.barrier()
    if world.rank > 0:
        return {}
    others = [load_matches(store.read_bytes(stage.key, _part("matches", r, "npz"))) for r in range(1, world.size)]
    matches = join([matches, *others], share, images.tie_order())
    store.add(stage, MATCHES, matches.to_bytes())
    store.add(stage, METRICS, json.dumps(metrics_of(matches, teacher.categories)).encode())
    _write_results(segment, stage, world.size)
    return {"seconds": seconds, "images_per_s": images.num_images / max(seconds, 1e-9)}


def _write_results(segment: Segment, stage: Stage, num_parts: int) -> None:
    """The workers' parts as one file for pycocotools' `loadRes`, without holding them; the parts go."""
    store = segment.store
    parts = [_part("results", rank, "jsonl") for rank in range(num_parts)]
    with ExitStack() as files:
        lines = (line for part in parts for line in files.enter_context(store.read_stream(stage, part)))
        with store.open_to_add(stage, RESULTS) as file:
            for piece in results_document(lines):
                file.write(piece)
    for part in [*parts, *(_part("matches", rank, "npz") for rank in range(1, num_parts))]:
        store.discard(stage, part)


def _part(name: str, rank: int, suffix: str) -> str:
    return f"{name}-{rank:03d}.{suffix}"
