"""The command is killed in the middle of a stage; the same command resumes and reaches the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cast_ray.plan.graph import artifact_key
from cast_ray.runtime.store.artifacts import ArtifactStore

pytestmark = pytest.mark.timeout(1800)

STEPS, EVERY = 60, 10
SETTINGS = [
    "stages.pretrain.steps=3",
    "stages.adapt.steps=2",
    f"stages.distill.steps={STEPS}",
    f"stages.distill.checkpoint_every_steps={EVERY}",
    "evaluation.every_steps=15",
    "stages.refine.steps=2",
    *(f"stages.{stage}.batch_labelled=2" for stage in ("pretrain", "adapt", "refine")),
    "data.shapes.num_source=8",
    "data.shapes.num_train=16",
    "data.shapes.num_val=6",
    "teacher.num_layers=1",
]
ARGUMENTS = ["--rows", "sup", *(part for setting in SETTINGS for part in ("--set", setting))]
FINISHED_BEFORE = ("pretrain", "adapt")


def manifests(folder: Path) -> dict[str, dict[str, Any]]:
    """Manifest of every committed train stage, by name."""
    found = [json.loads(path.read_text()) for path in (folder / "storage/artifacts").glob("train-*/manifest.json")]
    return {manifest["stage"]: manifest for manifest in found}


def notes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (folder / "storage/checkpoints").glob("*.json")]


def weights(folder: Path, stage: str) -> bytes:
    store = ArtifactStore(str(folder / "storage"))
    return store.read_bytes(artifact_key("train", manifests(folder)[stage]["fingerprint"]), "model.safetensors")


def result(folder: Path) -> dict[str, Any]:
    path = folder / "runs/losses-shapes-smoke/losses__sup__s0/result.json"
    found = json.loads(path.read_text())
    assert found["status"] == "done"
    return found


def points(folder: Path) -> dict[int, float]:
    """Validation beside training: step -> AP."""
    curve = result(folder)["curves"]["distill"]
    return {entry["step"]: entry["val/mask_ap"] for entry in curve if "val/mask_ap" in entry}


def test_a_killed_sweep_goes_on_from_its_last_checkpoint(tmp_path: Path, start_sweep: Any, wait_until: Any) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    sweep = start_sweep(killed, *ARGUMENTS)
    wait_until(lambda: notes(killed) or sweep.process.poll() is not None, "no checkpoint was noted")
    assert sweep.process.poll() is None, sweep.output
    sweep.kill()
    wait_until(lambda: not sweep.processes(), "Ray outlived the command that started it", 180)
    before = manifests(killed)
    assert set(before) == set(FINISHED_BEFORE)  # nothing of the interrupted stage exists
    (note,) = notes(killed)
    assert note["step"] % EVERY == 0 and 0 < note["step"] < STEPS

    again = start_sweep(killed, *ARGUMENTS)
    assert again.finish() == 0, again.output
    after = manifests(killed)
    assert {name: after[name] for name in FINISHED_BEFORE} == before
    assert after["distill"]["resumed_at_step"] >= note["step"]
    assert after["refine"]["resumed_at_step"] is None

    uninterrupted = start_sweep(whole, *ARGUMENTS)
    assert uninterrupted.finish() == 0, uninterrupted.output
    assert manifests(whole)["distill"]["resumed_at_step"] is None
    for stage in (*FINISHED_BEFORE, "distill", "refine"):
        assert manifests(whole)[stage]["fingerprint"] == after[stage]["fingerprint"]
        assert weights(whole, stage) == weights(killed, stage), stage
    assert result(killed)["metrics"] == result(whole)["metrics"]
    # What was measured before the kill is found again; a snapshot that waited then may be lost, none is wrong.
    mine, wanted = points(killed), points(whole)
    assert list(wanted) == [15, 30, 45, STEPS]
    assert mine.items() <= wanted.items()
    assert set(mine) >= {step for step in wanted if step > after["distill"]["resumed_at_step"]}
