"""The audit of a labelling stage, from its Parquet files and the hidden ground truth: a few tasks, small answers."""

from __future__ import annotations

import json
from typing import Any

import pyarrow.dataset
import ray

from cast_ray.contracts.records import Category, ClassMap
from cast_ray.evaluation.label_audit import AuditPart, audit_images, join_audits, summarise_audit
from cast_ray.plan.graph import Stage
from cast_ray.recipe import RuntimeConfig
from cast_ray.runtime.data.images import Images
from cast_ray.runtime.data.record_tables import record_at
from cast_ray.runtime.store.artifact_files import AUDIT, LABELS
from cast_ray.runtime.store.artifacts import ArtifactStore

IMAGES_AT_ONCE = 64
TASK_CPUS = 0.01  # as `load_records`: a stage has given its own back, and others may hold the rest


def audit_labels(store: ArtifactStore, stage: Stage, images: Images, runtime: RuntimeConfig) -> None:
    """Compares the pseudo-labels of a labelling stage, not yet committed, with the ground truth that was hidden.

    The labels are divided over as many tasks as label; what they send to each other are arrays of about 30 bytes for
    each label (see `AuditPart`). If there is ground truth, the summary becomes a file of the artifact (see
    `summarise_audit`).
    """
    num_pieces = len(_pieces(store, stage.key))
    num_tasks = max(1, min(runtime.num_labellers or runtime.num_workers, num_pieces))
    shared = ray.put(images)
    parts = [_audit_pieces.remote(store, stage.key, shared, range(i, num_pieces, num_tasks)) for i in range(num_tasks)]
    if (audit := ray.get(_summarise.remote(images.categories, *parts))) is not None:
        store.add(stage, AUDIT, json.dumps(audit).encode())


def _pieces(store: ArtifactStore, key: str) -> list[pyarrow.dataset.Fragment]:
    """The labels in pieces that can be read one by one: the file's row groups."""
    files = store.open_dataset(key, LABELS).get_fragments()
    return [piece for file in files for piece in file.split_by_row_group()]


# Not inside the placement group of the Tune trial that asks, which holds the driver alone.
@ray.remote(num_cpus=TASK_CPUS, scheduling_strategy="DEFAULT")
def _audit_pieces(store: ArtifactStore, key: str, images: Images, chosen: range) -> AuditPart:
    classes = ClassMap(images.categories)
    pieces = _pieces(store, key)
    parts = [audit_images([], [], classes)]
    for index in chosen:
        for batch in pieces[index].to_batches(batch_size=IMAGES_AT_ONCE):
            labels = batch.to_pylist()
            truth = [record_at(images.records, images.unlabelled[row["position"]]) for row in labels]
            parts.append(audit_images(truth, labels, classes))
    return join_audits(parts)


@ray.remote(num_cpus=TASK_CPUS, scheduling_strategy="DEFAULT")
def _summarise(categories: tuple[Category, ...], *parts: AuditPart) -> dict[str, Any] | None:
    return summarise_audit(join_audits(parts), ClassMap(categories))
