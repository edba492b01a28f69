"""A sweep with online labels from the command line: the same student as offline; a refreshed teacher as another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cast_ray.cli.main import main
from cast_ray.plan.graph import artifact_key
from cast_ray.runtime.store.artifacts import ArtifactStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = {"pretrain": 30, "adapt": 4, "selftrain": 9, "distill": 5, "refine": 0}
SETTINGS = [
    *(f"stages.{stage}.steps={steps}" for stage, steps in STEPS.items()),
    *(f"stages.{stage}.batch_labelled=2" for stage in STEPS),
    *(f"stages.{stage}.batch_unlabelled=2" for stage in ("selftrain", "distill")),
    *(f"stages.{stage}.checkpoint_every_steps={2 if stage == 'selftrain' else 1000}" for stage in STEPS),
    "data.shapes.num_source=8",
    "data.shapes.num_train=16",
    "data.shapes.num_val=4",
    "student.num_layers=1",
    "teacher.num_layers=1",
    "stages.pretrain.ema=0.9",
    "pseudo.score_threshold=0.01",  # the teacher is sure of nothing
]


def arguments(*more: str) -> list[str]:
    return ["--rows", "sup+semi", *(part for setting in (*SETTINGS, *more) for part in ("--set", setting))]


def stages(folder: Path) -> dict[str, dict[str, Any]]:
    """Manifest of every committed train and label stage, by name."""
    paths = (folder / "storage/artifacts").glob("*/manifest.json")
    found = [json.loads(path.read_text()) for path in paths if not path.parent.name.startswith(("eval", "dataset"))]
    return {manifest["stage"]: manifest for manifest in found}


def weights(folder: Path, stage: str) -> bytes:
    store = ArtifactStore(str(folder / "storage"))
    return store.read_bytes(artifact_key("train", stages(folder)[stage]["fingerprint"]), "model.safetensors")


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory, start_sweep: Any) -> Path:
    folder = tmp_path_factory.mktemp("offline")
    sweep = start_sweep(folder, *arguments())
    assert sweep.finish() == 0, sweep.output
    return folder


def test_online_labels_give_the_offline_student(tmp_path: Path, offline: Path, start_sweep: Any) -> None:
    """Also when snapshots are measured beside it: then one group holds streams, validation and teachers."""
    options = ("--num-cpus", "4")  # the group takes 2.3
    sweep = start_sweep(tmp_path, *options, *arguments("labels.mode=online", "evaluation.every_steps=3"))
    assert sweep.finish() == 0, sweep.output
    made = stages(tmp_path)
    assert set(stages(offline)) == {*made, "label-adapted", "label-teacher"}
    for stage in ("selftrain", "distill"):
        assert made[stage]["fingerprint"] == stages(offline)[stage]["fingerprint"]
        assert weights(tmp_path, stage) == weights(offline, stage), stage
        assert "semi/mask" in curve(tmp_path, made[stage])
        inside = len(range(3, STEPS[stage], 3))
        assert made[stage]["validation"] == {"validated": inside, "skipped": [], "failed": {}}
    again = start_sweep(offline, *arguments("labels.mode=online"))  # found in the store, whoever made their labels
    assert again.finish() == 0 and "Ray " not in again.output, again.output


def curve(folder: Path, manifest: dict[str, Any]) -> dict[str, float]:
    """The last entry of a stage's curve; its loss on pseudo-labels is above 0, or nothing was compared."""
    store = ArtifactStore(str(folder / "storage"))
    entry = store.read_json(artifact_key("train", manifest["fingerprint"]), "curves.json")["curve"][-1]
    assert entry["semi/mask"] > 0
    return entry


def test_a_refreshed_teacher_survives_a_kill(tmp_path: Path, offline: Path, start_sweep: Any, wait_until: Any) -> None:
    """In 1c and in 2b, where the student takes the place of theta_T''."""
    stages_of = "labels.refresh_stages=[selftrain, distill]"
    refreshed = arguments("labels.mode=online", "labels.refresh_steps=2", stages_of)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    sweep = start_sweep(killed, *refreshed)
    notes = killed / "storage/checkpoints"
    wait_until(
        lambda: (
            any(json.loads(note.read_text())["step"] >= 6 for note in notes.glob("*.json"))
            or sweep.process.poll() is not None
        ),
        "no checkpoint was noted",
    )
    assert sweep.process.poll() is None, sweep.output
    for process in sweep.processes():
        sweep.kill_process(process)
    wait_until(lambda: not sweep.processes(), "Ray outlived the command that started it", 180)
    if "selftrain" not in stages(killed):
        (folder,) = (killed / "storage/refresh").iterdir()
        assert 2 <= len(list(folder.glob("*.safetensors"))) <= 4  # what a resume may need
    again = start_sweep(killed, *refreshed)
    assert again.finish() == 0, again.output
    assert (stages(killed)["selftrain"]["resumed_at_step"] or STEPS["selftrain"]) >= 6

    uninterrupted = start_sweep(whole, *refreshed)
    assert uninterrupted.finish() == 0, uninterrupted.output
    for stage in ("selftrain", "distill"):
        assert weights(killed, stage) == weights(whole, stage), stage
    assert weights(whole, "adapt") == weights(offline, "adapt")
    assert weights(whole, "selftrain") != weights(offline, "selftrain")
    assert stages(whole)["selftrain"]["fingerprint"] != stages(offline)["selftrain"]["fingerprint"]
    for stage in ("selftrain", "distill"):  # again in this process, with teachers of its own
        key = artifact_key("train", stages(whole)[stage]["fingerprint"])
        assert main(["store", "run", key, "--storage", str(whole / "storage")]) == 0, stage
    for folder in (killed, whole):
        refresh = folder / "storage/refresh"
        assert not refresh.exists() or not list(refresh.iterdir())
