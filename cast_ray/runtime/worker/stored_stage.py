"""A stage of the store with all that it reads, held in this process: what `rerun` needs to run it again without Ray.

A manifest names a stage's parents. Its dataset is found by the fingerprint, which covers the dataset's content: the
right dataset of the store is the one from which the fingerprint follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa

from cast_ray.contracts.manifest import DatasetManifest, Manifest, TrainManifest
from cast_ray.contracts.records import Category
from cast_ray.data.reading.images import read_image
from cast_ray.plan.graph import Kind, Stage, artifact_key, fingerprint_of, parent_key, stage_fingerprint
from cast_ray.plan.stage_parts import StagePart, TrainPart
from cast_ray.recipe import DataConfig, PseudoConfig, Recipe
from cast_ray.runtime.data.images import Images, images_of
from cast_ray.runtime.data.record_tables import Records, read_records, record_at
from cast_ray.runtime.store.artifact_files import LABELS
from cast_ray.runtime.store.artifacts import ArtifactStore

KINDS = ("train", "label", "evaluate")
"""Kinds of stages that can run again. A dataset is read by the command that needs it."""
RECIPE = Recipe(
    preset="stored",
    scale="full",
    # The stage has ended, so that its bad images and empty labels were accepted.
    data=DataConfig(max_bad_fraction=1.0),
    pseudo=PseudoConfig(on_empty="warn"),
)
"""Settings that a stage's own config lacks, because they change no result."""


@dataclass(frozen=True)
class StoredStage:
    """A committed stage and its inputs.

    images: of a train or label stage, with the pseudo-labels that it reads; val: records of the validation images, of
    an evaluation; note: what speaks against these inputs being the same ones, in a sentence; empty: nothing.
    """

    store: ArtifactStore
    stage: Stage
    manifest: Manifest
    categories: tuple[Category, ...]
    images: Images | None = None
    val: pa.Table | None = None
    note: str = ""


def open_stage(store: ArtifactStore, key: str, dataset_key: str | None = None) -> StoredStage:
    """Reads a stage's manifest and everything that the stage reads, except models.

    Args:
        key: of its artifact.
        dataset_key: artifact of its dataset; None: found by the stage's fingerprint.

    Raises:
        ValueError: it is no stage that runs, it is unfinished, or one of its inputs is not in the store (names which)
            or cannot be read.
    """
    manifest = store.find_manifest(key)
    if manifest is None:
        raise ValueError(f"{key} is unfinished: expected a stage that has been committed")
    stage = _stage(key, manifest)
    for role, parent in stage.parents.items():
        read = parent_key(role, parent)
        if not store.has(read):
            raise ValueError(f"{key} reads {read} ({role}), which is not in the store: `store gc` has removed it")
    dataset_key, dataset, note = _dataset(store, key, stage, dataset_key)
    categories = tuple(Category(c.id, c.name) for c in dataset.categories)

    def tables(*names: str) -> pa.Table:
        return read_records(store, dataset_key, names)

    if stage.kind == "evaluate":
        val = tables("val.parquet")
        _check_first_image(dataset_key, val, np.arange(val.num_rows))
        return StoredStage(store, stage, manifest, categories, val=val, note=note)
    num_source = dataset.num_images.get("source", 0)
    images = images_of(stage, tables, store, dataset.content_hash, num_source, categories)
    if "labels" in stage.parents:
        images = images.with_labels(read_records(store, artifact_key("label", stage.parents["labels"]), (LABELS,)))
    for rows in (images.labelled, images.unlabelled):
        _check_first_image(dataset_key, images.records, rows)
    return StoredStage(store, stage, manifest, categories, images, note=note)


def _stage(key: str, manifest: Manifest) -> Stage:
    """The stage that a manifest is of."""
    if manifest.kind not in KINDS:
        raise ValueError(f"{key} is a {manifest.kind}: expected a stage of kind {', '.join(KINDS)}")
    if "imported_from" in manifest.config:
        raise ValueError(f"{key} was imported ({manifest.config['imported_from']}), nothing ran to make it")
    kind, fingerprint = cast(Kind, manifest.kind), fingerprint_of(key)
    stage = Stage(manifest.stage, kind, manifest.config, manifest.parents, fingerprint, manifest.steps)
    if kind != "train" or "teacher" not in manifest.parents:
        return stage
    assert isinstance(manifest, TrainManifest)
    if manifest.online is None:
        raise ValueError(
            f"{key} labelled its images online, and its manifest, written by an earlier version, does not say how: "
            "expected a stage of this version, or one with labels.mode=offline"
        )
    labels, teacher = manifest.online, {"teacher": manifest.parents["teacher"]}
    online = Stage(labels.stage, "label", labels.config, teacher, labels.fingerprint)
    return Stage(stage.name, kind, stage.config, stage.parents, fingerprint, stage.steps, online)


def _dataset(store: ArtifactStore, key: str, stage: Stage, wanted: str | None) -> tuple[str, DatasetManifest, str]:
    """Key and manifest of a stage's dataset, and what speaks against it."""
    if wanted is not None:
        manifest = store.find_manifest(wanted)
        if not isinstance(manifest, DatasetManifest):
            raise ValueError(f"--data {wanted}: expected the artifact of a dataset, dataset-...")
        note = f"{key} does not follow from {wanted}: its results may differ"
        return wanted, manifest, "" if _is_of(stage, manifest) else note
    keys = [name for name in store.list_names("artifacts") if name.startswith("dataset-")]
    datasets = {k: m for k, m in store.find_manifests(keys).items() if isinstance(m, DatasetManifest)}
    found = {k: m for k, m in datasets.items() if _is_of(stage, m)}
    if not found:
        there = f"it has {', '.join(sorted(datasets))}" if datasets else "it has none"
        raise ValueError(
            f"{key}: no dataset in the store leads to its fingerprint ({there}): `store gc` has removed it, or another "
            "version of the code made the stage; --data DATASET_KEY names one to use all the same"
        )
    newest = max(found, key=lambda k: found[k].committed or 0.0)  # read again from another place: the same content
    return newest, found[newest], ""


def _is_of(stage: Stage, dataset: DatasetManifest) -> bool:
    """Whether a stage was made from a dataset: whether its fingerprint follows from it."""
    parents: Mapping[str, str] = stage.parents
    if stage.online is not None:
        parents = {role: parent for role, parent in parents.items() if role != "teacher"}
        parents = {**parents, "labels": stage.online.fingerprint}
    if stage_fingerprint(stage.kind, stage.config, parents, dataset.content_hash) != stage.fingerprint:
        return False
    if stage.kind == "evaluate" or (stage.kind == "train" and TrainPart.of(stage).is_on_source):
        return True
    part = StagePart(stage.config)
    return not part.reads_extra or part.split.get("extra") == dataset.extra_hash


def _check_first_image(dataset_key: str, records: Records, rows: np.ndarray) -> None:
    """Raises ValueError where the first image cannot be read, as where the folder of the dataset has moved."""
    if not len(rows):
        return
    record = record_at(records, rows[0])
    try:
        read_image(record["uri"], (record["height"], record["width"]))
    except ValueError as error:
        raise ValueError(f"{dataset_key}: an image of it cannot be read: {error}") from None
