"""The audit of a labelling stage, from its Parquet files and the hidden ground truth: a few tasks, small answers."""

from __future__ import annotations

from typing import Any

import pyarrow.dataset
import ray

from cast_ray.evaluation.pseudo_labels import AuditPart, audit_images, join_audits, summarise_audit
from cast_ray.recipe import RuntimeConfig
from cast_ray.records import Category, ClassMap
from cast_ray.runtime.store import ArtifactStore
from cast_ray.runtime.streams import Images, record_at
from cast_ray.stages.graph import Stage

IMAGES_AT_ONCE = 64
TASK_CPUS = 0.01  # as `load_records`: a stage has given its own back, and others may hold the rest


def audit_labels(store: ArtifactStore, stage: Stage, images: Images, runtime: RuntimeConfig) -> dict[str, Any] | None:
    """Compares the pseudo-labels of a labelling stage, not yet committed, with the ground truth that was hidden.

    The files are divided over as many tasks as there are labellers; what they send to each other are arrays of some 30
    bytes a label (see `AuditPart`), what comes back here is the summary.

    Returns:
        see `summarise_audit`; None where there is no ground truth.
    """
    num_files = len(list(_labels(store, stage.key).get_fragments()))
    num_tasks = max(1, min(runtime.num_labellers, num_files))
    shared = ray.put(images)
    parts = [_audit_files.remote(store, stage.key, shared, range(i, num_files, num_tasks)) for i in range(num_tasks)]
    return ray.get(_summarise.remote(images.categories, *parts))


def _labels(store: ArtifactStore, key: str) -> pyarrow.dataset.Dataset:
    return store.open_dataset(key, "labels")


# Not inside the placement group of the Tune trial that asks, which holds nothing but the driver.
@ray.remote(num_cpus=TASK_CPUS, scheduling_strategy="DEFAULT")
def _audit_files(store: ArtifactStore, key: str, images: Images, files: range) -> AuditPart:
    classes = ClassMap(images.categories)
    fragments = list(_labels(store, key).get_fragments())
    parts = [audit_images([], [], classes)]
    for file in files:
        for batch in fragments[file].to_batches(batch_size=IMAGES_AT_ONCE):
            labels = batch.to_pylist()
            truth = [record_at(images.records, images.unlabelled[row["position"]]) for row in labels]
            parts.append(audit_images(truth, labels, classes))
    return join_audits(parts)


@ray.remote(num_cpus=TASK_CPUS, scheduling_strategy="DEFAULT")
def _summarise(categories: tuple[Category, ...], *parts: AuditPart) -> dict[str, Any] | None:
    return summarise_audit(join_audits(parts), ClassMap(categories))
