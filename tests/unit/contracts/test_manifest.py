"""Manifests: each kind's fields, round trip, stores of earlier and newer builds, files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cast_ray.contracts.document import UNVERSIONED, NewerDocumentError
from cast_ray.contracts.manifest import (
    DatasetManifest,
    LabelManifest,
    Manifest,
    TrainManifest,
    ValidationFacts,
    read_manifest,
)
from cast_ray.plan.graph import Stage
from cast_ray.runtime.store.artifacts import ArtifactStore

OLD = Path(__file__).parents[2] / "data" / "old_store" / "artifacts"
"""Artifacts of the build before manifests had a schema version, without weights, tables and pictures."""
MANIFESTS = sorted(OLD.glob("*/manifest.json"))
TRAIN = Stage("distill", "train", {"model": {}}, {"labels": "a"}, "f" * 20, steps=4)
LABEL = Stage("label-teacher", "label", {"pseudo": {}}, {"teacher": "b"}, "e" * 20)


def read(path: Path) -> Manifest:
    return read_manifest(path.read_bytes(), str(path))


def test_every_manifest_of_an_earlier_build_is_read() -> None:
    kinds = {"train": TrainManifest, "label": LabelManifest, "dataset": DatasetManifest, "evaluate": Manifest}
    seen = set()
    for path in MANIFESTS:
        manifest, plain = read(path), json.loads(path.read_text())
        assert type(manifest) is kinds[manifest.kind] and manifest.schema_version == UNVERSIONED
        assert path.parent.name == f"{manifest.kind}-{manifest.fingerprint}"
        assert json.loads(manifest.to_json()) == plain and not manifest.unknown_fields, manifest.unknown_fields
        seen.add(manifest.kind)
    assert seen == set(kinds) and len(MANIFESTS) == 12


def test_fields_of_each_kind() -> None:
    by_stage = {manifest.stage: manifest for manifest in map(read, MANIFESTS)}
    distill, labels, dataset = by_stage["distill"], by_stage["label-teacher"], by_stage["dataset"]
    assert isinstance(distill, TrainManifest) and (distill.steps, distill.num_labelled) == (8, 12)
    assert (distill.resumed_at_step, distill.skipped_steps, distill.validation) == (None, 0, None)
    assert distill.parents == {"labels": labels.fingerprint} and distill.device == "cpu"
    assert distill.device_seconds == distill.stage_seconds
    assert isinstance(labels, LabelManifest) and (labels.num_images, labels.num_pseudo_labels) == (36, 0)
    assert labels.skipped == () and labels.class_thresholds is None
    assert isinstance(dataset, DatasetManifest) and dataset.num_images == {"train": 48, "val": 16, "source": 64}
    assert [(c.id, c.name) for c in dataset.categories][2] == (4, "square") and not dataset.has_positions


def test_a_committed_manifest_says_its_version_and_keeps_other_facts(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    validation = {"validated": 3, "skipped": [7], "failed": {"5": "no memory"}}
    store.commit(TRAIN, {"seconds": 1.5, "resumed_at_step": None, "validation": validation, "tokens": [1, 2]})
    plain = json.loads((tmp_path / "artifacts" / TRAIN.key / "manifest.json").read_text())
    assert plain["schema_version"] == TrainManifest.VERSION and plain["resumed_at_step"] is None
    assert plain["validation"] == validation and plain["tokens"] == [1, 2] and "skipped_steps" not in plain
    manifest = ArtifactStore(str(tmp_path)).manifest(TRAIN.key)
    assert isinstance(manifest, TrainManifest) and manifest.unknown_fields == {"tokens": [1, 2]}
    assert manifest.validation == ValidationFacts.of(validation, "")


def test_devices_beside_the_workers_count() -> None:
    plain = {"stage": "distill", "kind": "train", "stage_seconds": 10.0, "num_workers": 2}
    assert read_manifest(json.dumps(plain), "manifest.json").device_seconds == 20.0
    assert read_manifest(json.dumps(plain | {"num_devices": 5}), "manifest.json").device_seconds == 50.0


def test_a_manifest_of_the_first_stores_has_no_attempt() -> None:
    manifest = read_manifest('{"stage": "distill", "kind": "train"}', "manifest.json")
    assert (manifest.attempt, manifest.parents, manifest.steps, manifest.device_seconds) == ("", {}, 0, 0.0)


WRONG: list[tuple[Any, str]] = [
    ([], "expected a mapping, got list"),
    ({"kind": "train"}, "no stage"),
    ({"stage": "a", "kind": ["train"]}, "kind is list, expected str"),
    ({"stage": "a", "kind": "train", "steps": 1.5}, "steps is float, expected int"),
    ({"stage": "a", "kind": "train", "parents": {"init": 3}}, "parents.init is int, expected str"),
    ({"stage": "a", "kind": "train", "validation": {"skipped": ["x"]}}, "validation.skipped[0] is str, expected int"),
    ({"stage": "a", "kind": "label", "num_images": {"train": 3}}, "num_images is dict, expected int"),
    ({"stage": "a", "kind": "label", "skipped": [{"position": 1}]}, "no skipped[0].error"),
    ({"stage": "a", "kind": "dataset", "content_hash": "x"}, "no categories, num_images"),
]


@pytest.mark.parametrize(("plain", "message"), WRONG)
def test_a_wrong_field_is_named_in_one_line(tmp_path: Path, plain: Any, message: str) -> None:
    store = ArtifactStore(str(tmp_path))
    store.write_json(f"artifacts/{TRAIN.key}/manifest.json", plain)
    place = f"{tmp_path}/artifacts/{TRAIN.key}/manifest.json"
    with pytest.raises(ValueError) as error:
        store.manifest(TRAIN.key)
    assert str(error.value) == f"{place}: not a manifest: {message}"
    assert store.readable_manifest(TRAIN.key) is None  # in an overview it hides no other


def test_a_newer_manifest_is_refused_with_its_version(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    store.commit(LABEL, {"num_images": 3})
    newer = json.loads(store.manifest(LABEL.key).to_json()) | {"schema_version": LabelManifest.VERSION + 1}
    store.write_json(f"artifacts/{LABEL.key}/manifest.json", newer)
    another = ArtifactStore(str(tmp_path))  # that has not written it, and so knows nothing of it
    with pytest.raises(NewerDocumentError, match=r"manifest.json: schema_version is 2, expected at most 1: .* wrote"):
        another.manifest(LABEL.key)
    assert another.has(LABEL.key)  # so that this build does not make it again
