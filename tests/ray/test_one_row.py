"""One row of a sweep through the command: killed and resumed, validated beside training, evaluated by two workers.

One undisturbed sweep is what all of them are compared with: a sweep costs half a minute of two processor cores.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cast_ray.contracts.manifest import TrainManifest, ValidationFacts
from cast_ray.evaluation.matches import load_matches
from cast_ray.plan.graph import artifact_key
from cast_ray.runtime.store.artifacts import ArtifactStore

pytestmark = pytest.mark.timeout(1200)

STEPS = {"pretrain": 20, "adapt": 2, "distill": 60, "refine": 2}
CHECKPOINT_EVERY, VALIDATE_EVERY = 10, 15
SETTINGS = [
    *(f"stages.{stage}.steps={steps}" for stage, steps in STEPS.items()),
    *(f"stages.{stage}.batch_labelled=2" for stage in STEPS),
    "stages.pretrain.checkpoint_every_steps=100",
    f"stages.distill.checkpoint_every_steps={CHECKPOINT_EVERY}",
    "data.shapes.num_source=8",
    "data.shapes.num_train=16",
    "data.shapes.num_val=7",
    "teacher.num_layers=1",
]
VALIDATED = f"evaluation.every_steps={VALIDATE_EVERY}"
RUN = "runs/losses-shapes-smoke/losses__sup__s0"


def arguments(*more: str) -> list[str]:
    return ["--rows", "sup", *(part for setting in (*SETTINGS, *more) for part in ("--set", setting))]


class Outcome:
    """What a sweep left."""

    def __init__(self, folder: Path, sweep: Any):
        assert sweep.finish() == 0, sweep.output
        self.folder, self.output = folder, sweep.output
        self.store = ArtifactStore(str(folder / "storage"))
        self.result = json.loads((folder / RUN / "result.json").read_text())
        assert self.result["status"] == "done", self.result["error"]

    def stages(self, kind: str) -> Iterator[tuple[str, str]]:
        """(name, artifact) of every stage of a kind; evaluations by the fingerprint of their model."""
        for stage in self.result["stages"]:
            if stage["kind"] == kind:
                yield stage["name"], artifact_key(kind, stage["fingerprint"])

    def manifests(self) -> dict[str, TrainManifest]:
        """Manifest of every trained stage, by name."""
        found = {name: self.store.manifest(key) for name, key in self.stages("train")}
        return {name: manifest for name, manifest in found.items() if isinstance(manifest, TrainManifest)}

    def points(self, stage: str) -> dict[int, float]:
        """Validation beside training: step -> AP."""
        return {e["step"]: e["val/mask_ap"] for e in self.result["curves"][stage] if "val/mask_ap" in e}


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory, start_sweep: Any) -> Outcome:
    """Not disturbed, and validated beside training."""
    folder = tmp_path_factory.mktemp("validated")
    return Outcome(folder, start_sweep(folder, *arguments(VALIDATED)))


def kill_in_distill(folder: Path, sweep: Any, wait_until: Any) -> int:
    """Kills the command once `distill` has noted a checkpoint; returns the checkpoint's step."""

    def notes() -> list[Path]:
        return list((folder / "storage/checkpoints").glob("*.json"))

    wait_until(lambda: notes() or sweep.process.poll() is not None, "no checkpoint was noted")
    assert sweep.process.poll() is None, sweep.output
    sweep.kill()
    wait_until(lambda: not sweep.processes(), "Ray outlived the command that started it", 180)
    committed = [json.loads(p.read_text()) for p in (folder / "storage/artifacts").glob("train-*/manifest.json")]
    assert {m["stage"] for m in committed} == {"pretrain", "adapt"}  # nothing of the interrupted stage exists
    (note,) = notes()
    step: int = json.loads(note.read_text())["step"]
    assert step % CHECKPOINT_EVERY == 0 and 0 < step < STEPS["distill"]
    return step


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, start_sweep: Any, wait_until: Any) -> Outcome:
    """Without validation, killed in the middle of `distill` and started again."""
    folder = tmp_path_factory.mktemp("plain")
    step = kill_in_distill(folder, start_sweep(folder, *arguments()), wait_until)
    before = {p.parent.name: p.read_text() for p in (folder / "storage/artifacts").glob("train-*/manifest.json")}
    outcome = Outcome(folder, start_sweep(folder, *arguments()))
    for key, manifest in before.items():  # what was committed before is not made again
        assert (folder / "storage/artifacts" / key / "manifest.json").read_text() == manifest
    assert (outcome.manifests()["distill"].resumed_at_step or 0) >= step
    assert outcome.manifests()["refine"].resumed_at_step is None
    return outcome


def test_neither_a_kill_nor_validation_changes_a_weight(plain: Outcome, validated: Outcome) -> None:
    assert list(plain.stages("train")) == list(validated.stages("train"))
    assert all(manifest.resumed_at_step is None for manifest in validated.manifests().values())
    for name, key in plain.stages("train"):
        wanted = plain.store.read_bytes(key, "model.safetensors")
        assert validated.store.read_bytes(key, "model.safetensors") == wanted, name
    assert plain.result["metrics"] == validated.result["metrics"]


@pytest.mark.slow
def test_points_from_before_a_kill_are_found_again(
    validated: Outcome, tmp_path: Path, start_sweep: Any, wait_until: Any
) -> None:
    """A snapshot that waited to be measured when the command was killed may be lost; no point is wrong."""
    kill_in_distill(tmp_path, start_sweep(tmp_path, *arguments(VALIDATED)), wait_until)
    again = Outcome(tmp_path, start_sweep(tmp_path, *arguments(VALIDATED)))
    mine, wanted = again.points("distill"), validated.points("distill")
    assert mine.items() <= wanted.items()
    resumed_at = again.manifests()["distill"].resumed_at_step
    assert resumed_at is not None and set(mine) >= {step for step in wanted if step > resumed_at}


def test_its_points_are_in_the_curves(plain: Outcome, validated: Outcome) -> None:
    roles = {"pretrain": "zero_shot", "distill": "student"}
    for name, steps in STEPS.items():
        curve, points = validated.result["curves"][name], validated.points(name)
        inside = list(range(VALIDATE_EVERY, steps, VALIDATE_EVERY))
        assert list(points) == ([*inside, steps] if inside else [])
        assert all(0 <= ap <= 100 for ap in points.values())
        if name in roles:  # the last point is the stage's own evaluation
            assert points[steps] == validated.result["metrics"][f"{roles[name]}/mask_ap"]
        assert [e for e in curve if "loss" in e][-1]["step"] == steps
        assert not any("val/mask_ap" in e for e in plain.result["curves"][name])
        if inside:
            facts = validated.manifests()[name].validation
            assert facts == ValidationFacts(validated=len(inside), skipped=(), failed={})
    assert not list((validated.folder / "storage" / "validations").glob("*"))


@pytest.mark.slow
def test_two_workers_measure_what_one_does(plain: Outcome, start_sweep: Any) -> None:
    before = {}
    for _, key in plain.stages("evaluate"):
        before[key] = [plain.store.read_bytes(key, f) for f in ("metrics.json", "results.json", "matches.npz")]
        (plain.folder / "storage/artifacts" / key / "manifest.json").unlink()
    again = Outcome(plain.folder, start_sweep(plain.folder, *arguments("runtime.num_workers=2")))
    assert [s["kind"] for s in again.result["stages"] if not s["reused"]].count("train") == 0
    for _, key in again.stages("evaluate"):
        metrics, results, matches = before[key]
        assert again.store.manifest(key).num_workers == 2
        assert again.store.read_bytes(key, "metrics.json") == metrics
        lines = again.store.read_bytes(key, "results.json").splitlines()
        assert sorted(line.rstrip(b",") for line in lines) == sorted(line.rstrip(b",") for line in results.splitlines())
        mine, wanted = load_matches(again.store.read_bytes(key, "matches.npz")), load_matches(matches)
        for column in ("image", "label", "score", "matched", "ignored", "num_truth"):
            assert (getattr(mine, column) == getattr(wanted, column)).all(), column
        files = {path.name for path in Path(again.store.artifact(key)).iterdir()}
        assert files == {"metrics.json", "results.json", "matches.npz"}


@pytest.mark.slow
def test_another_metric_is_another_evaluation_of_the_same_models(plain: Outcome, start_sweep: Any) -> None:
    """And a lost stage is trained again, validated beside two workers."""
    distill = dict(plain.stages("train"))["distill"]
    (plain.folder / "storage/artifacts" / distill / "manifest.json").unlink()
    changes = arguments("evaluation.metric=cityscapes", VALIDATED, "runtime.num_workers=2")
    again = Outcome(plain.folder, start_sweep(plain.folder, *changes, "--num-cpus", "4"))
    ran = [s["name"] for s in again.result["stages"] if not s["reused"]]
    assert sorted(ran) == ["distill"] + ["evaluate"] * 4
    assert again.manifests()["distill"].validation == ValidationFacts(validated=3, skipped=(), failed={})
    assert list(again.points("distill")) == [15, 30, 45, 60]
    for _, key in again.stages("evaluate"):
        numbers = again.store.read_json(key, "metrics.json")
        matches = load_matches(again.store.read_bytes(key, "matches.npz"))
        assert numbers["metric"] == matches.metric == "cityscapes"
        assert numbers["mask_ap"] == (None if math.isnan(matches.mask_ap()) else matches.mask_ap())


def test_stored_results_and_matches_give_the_metrics(plain: Outcome) -> None:
    """The results JSON through pycocotools' own reader, against the drawn dataset's own annotation file."""
    (annotations,) = (plain.folder / "storage/datasets").glob("*/**/*val*.json")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
    for role in ("zero_shot", "teacher", "student", "refined"):
        metrics = plain.result["metrics"]
        matches = load_matches(plain.folder / RUN / f"matches-{role}.npz")
        assert matches.num_images == 7 and matches.mask_ap() == metrics[f"{role}/mask_ap"]
    store = ArtifactStore(str(plain.folder / "storage"))  # the newest attempts, whoever made them
    for _, key in plain.stages("evaluate"):
        numbers = store.read_json(key, "metrics.json")
        if not numbers["num_detections"]:
            continue
        path = Path(store.artifact(key)) / "results.json"
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(truth, truth.loadRes(str(path)), "segm")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        assert numbers["metric"] == "coco"
        wanted = [100 * s for s in evaluation.stats]
        names = ("mask_ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar")
        assert [numbers[n] if numbers[n] is not None else -100 for n in names] == pytest.approx(wanted[:9], abs=1e-9)
