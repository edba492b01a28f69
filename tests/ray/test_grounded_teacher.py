"""A teacher from checkpoints through the command: it labels without training, and is adapted, on a real Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import write_detector, write_sam2

from cast_ray.plan.graph import artifact_key
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.models import open_teacher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STAGES = ("adapt", "selftrain", "distill", "refine")
SETTINGS = {
    "teacher.kind": "grounded_sam",
    "teacher.inference.max_detections": 4,
    "teacher.inference.score_threshold": 0.0,
    "pseudo.score_threshold": 0.0,
    "data.shapes.num_source": 8,
    "data.shapes.num_train": 16,
    "data.shapes.num_val": 4,
    **{f"stages.{name}.steps": 2 for name in STAGES},
    **{f"stages.{name}.batch_labelled": 2 for name in STAGES},
    "stages.selftrain.batch_unlabelled": 2,
    "stages.distill.batch_unlabelled": 2,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, start_sweep: Any) -> dict[str, dict[str, Any]]:
    """Row -> result.json, and under `store` the storage path."""
    home = tmp_path_factory.mktemp("grounded")
    folders = {"detector": write_detector(home / "detector"), "segmenter": write_sam2(home / "segmenter")}
    settings = SETTINGS | {f"teacher.grounded_sam.{name}": folder for name, folder in folders.items()}
    arguments = ["--rows", "zero-shot labels", "CAST"]
    for key, value in settings.items():
        arguments += ["--set", f"{key}={value}"]
    sweep = start_sweep(home, *arguments, tables=("main",))
    assert sweep.finish() == 0, sweep.output[-3000:]
    found = {p.parent.name.split("__")[1]: json.loads(p.read_text()) for p in home.glob("runs/*/*/result.json")}
    return found | {"home": {"path": str(home), "output": sweep.output}}


def manifests(results: dict[str, Any], row: str) -> dict[str, Any]:
    store = ArtifactStore(results["home"]["path"] + "/storage")
    stages = [s for s in results[row]["stages"] if s["kind"] != "evaluate"]
    return {s["name"]: store.find_manifest(artifact_key(s["kind"], s["fingerprint"])) for s in stages}


def test_both_rows_end_with_a_student(results: dict[str, Any]) -> None:
    for row in ("zero-shot labels", "CAST"):
        assert results[row]["status"] == "done", results[row].get("error")
        assert {"zero_shot/mask_ap", "teacher/mask_ap", "student/mask_ap"} <= results[row]["metrics"].keys()
    # Without adaptation the teacher is what its checkpoints are; with it, both rows began there.
    zero_shot = {row: results[row]["metrics"]["zero_shot/mask_ap"] for row in ("zero-shot labels", "CAST")}
    assert zero_shot["zero-shot labels"] == zero_shot["CAST"]
    assert results["zero-shot labels"]["metrics"]["teacher/mask_ap"] == zero_shot["CAST"]


def test_each_teacher_labels_every_image(results: dict[str, Any]) -> None:
    zero_shot, adapted = manifests(results, "zero-shot labels"), manifests(results, "CAST")
    assert set(zero_shot) == {"label-teacher", "distill", "refine"}
    for manifest in (zero_shot["label-teacher"], adapted["label-adapted"], adapted["label-teacher"]):
        assert manifest.num_images == results["CAST"]["dataset"]["num_unlabelled"] > 0
        assert manifest.num_pseudo_labels > 0 and manifest.skipped == ()
    parents = {m.parents["teacher"] for m in (zero_shot["label-teacher"], adapted["label-teacher"])}
    assert len(parents) == 2 and adapted["adapt"].parents["init"] in parents


def test_the_adapted_teacher_can_be_used_again(results: dict[str, Any]) -> None:
    (row,) = Path(results["home"]["path"]).glob("runs/*/main__CAST__s0")
    with open_teacher(str(row), {}, None, None) as teacher:
        assert teacher.kind == "grounded_sam" and len(teacher.class_names) > 1
