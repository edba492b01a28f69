"""Measuring a model on the validation images: each worker matches its share as it goes, the first joins the rest.

A worker holds one batch of images and about 20 bytes for every detection. Results go to a file line by line: those of
the first worker to one of its own machine, those of the others to the store.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext
from itertools import chain
from typing import Any

import numpy as np

from cast_ray.engine.world import World
from cast_ray.evaluation.coco_results import results_document, results_lines
from cast_ray.evaluation.matches import join, load_matches
from cast_ray.evaluation.measures import metrics_of
from cast_ray.plan.graph import Stage, input_size_of
from cast_ray.runtime.store.artifact_files import MATCHES, METRICS, RESULTS
from cast_ray.runtime.store.models import load_labeller
from cast_ray.runtime.worker.measuring import ValidationSet, measure
from cast_ray.runtime.worker.meeting import Meeting
from cast_ray.runtime.worker.segment import Segment

POST_EVERY_S = 1.0


def evaluate_stage(segment: Segment, stage: Stage, world: World, meeting: Meeting) -> dict[str, Any]:
    """An evaluate stage on this worker; the first one writes the artifact's metrics, matches and results."""
    store = segment.store
    images = ValidationSet.of(segment, input_size_of(stage))
    teacher = load_labeller(store, stage, "model", world.device)
    share = [np.arange(images.num_images)[rank :: world.size] for rank in range(world.size)]
    began = time.monotonic()
    post = {"stage": "evaluate", "fingerprint": stage.fingerprint, "steps": len(share[world.rank]), "unit": "image"}
    posted = 0.0
    with ExitStack() as files:
        # The first worker's own part is nobody else's business: it stays on its machine.
        own = files.enter_context(tempfile.TemporaryFile(prefix="cast_ray-results-")) if world.rank == 0 else None

        def on_batch(done: int, results: Iterator[dict[str, Any]]) -> None:
            nonlocal posted
            file.write(results_lines(results))
            if world.rank == 0 and time.monotonic() - posted > POST_EVERY_S:
                posted = time.monotonic()
                rate = done * world.size / max(posted - began, 1e-9)
                segment.broker.post.remote(segment.owner, post | {"step": done, "images_per_s": rate})

        with nullcontext(own) if own is not None else store.open_to_add(stage, _part("results", world.rank)) as file:
            matches = measure(teacher, images, share[world.rank], world.device, on_batch)
        seconds = time.monotonic() - began
        if own is None:
            store.add(stage, _part("matches", world.rank), matches.to_bytes())
        meeting.wait()
        if own is None:
            return {}
        others = [load_matches(store.read_bytes(stage.key, _part("matches", r))) for r in range(1, world.size)]
        matches = join([matches, *others], share, images.tie_order())
        store.add(stage, MATCHES, matches.to_bytes())
        metrics = metrics_of(matches, teacher.categories)
        store.add(stage, METRICS, json.dumps(metrics).encode())
        if metrics["mask_ap"] is not None:
            segment.broker.validated.remote(segment.owner, stage.name, metrics["mask_ap"])
        own.seek(0)
        _write_results(segment, stage, own, world.size)
    return {"seconds": seconds, "images_per_s": images.num_images / max(seconds, 1e-9)}


def _write_results(segment: Segment, stage: Stage, own: Iterable[bytes], num_workers: int) -> None:
    """The workers' parts as one file for pycocotools' `loadRes`, without holding them; the parts in the store go.

    Args:
        own: lines of the first worker.
    """
    store = segment.store
    parts = [_part("results", rank) for rank in range(1, num_workers)]
    with ExitStack() as files:
        others = (line for part in parts for line in files.enter_context(store.read_stream(stage, part)))
        with store.open_to_add(stage, RESULTS) as file:
            for piece in results_document(chain(own, others)):
                file.write(piece)
    for part in [*parts, *(_part("matches", rank) for rank in range(1, num_workers))]:
        store.discard(stage, part)


def _part(name: str, rank: int) -> str:
    """Name of what a worker leaves for the first one."""
    return f"{name}-{rank:03d}"
