"""Validation beside training, and evaluation on one worker and on two, through the command."""

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

STEPS = {"pretrain": 4, "adapt": 2, "distill": 7, "refine": 2}
SETTINGS = [
    *(f"stages.{stage}.steps={steps}" for stage, steps in STEPS.items()),
    *(f"stages.{stage}.batch_labelled=2" for stage in STEPS),
    "data.shapes.num_source=8",
    "data.shapes.num_train=16",
    "data.shapes.num_val=7",
    "teacher.num_layers=1",
]
RUN = "runs/losses-shapes-smoke/losses__sup__s0"


class Outcome:
    def __init__(self, folder: Path, start_sweep: Any, *more: str, options: tuple[str, ...] = ()):
        pairs = [part for setting in (*SETTINGS, *more) for part in ("--set", setting)]
        sweep = start_sweep(folder, "--rows", "sup", *options, *pairs)
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


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, start_sweep: Any) -> Outcome:
    return Outcome(tmp_path_factory.mktemp("plain"), start_sweep)


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory, start_sweep: Any) -> Outcome:
    return Outcome(tmp_path_factory.mktemp("validated"), start_sweep, "evaluation.every_steps=2")


def test_validation_changes_no_weight_and_no_fingerprint(plain: Outcome, validated: Outcome) -> None:
    assert list(plain.stages("train")) == list(validated.stages("train"))
    for _, key in plain.stages("train"):
        wanted = plain.store.read_bytes(key, "model.safetensors")
        assert validated.store.read_bytes(key, "model.safetensors") == wanted
    assert plain.result["metrics"] == validated.result["metrics"]


def test_its_points_are_in_the_curves(plain: Outcome, validated: Outcome) -> None:
    roles = {"pretrain": "zero_shot", "distill": "student"}
    for name, steps in STEPS.items():
        curve = validated.result["curves"][name]
        points = {e["step"]: e["val/mask_ap"] for e in curve if "val/mask_ap" in e}
        inside = list(range(2, steps, 2))
        assert list(points) == ([*inside, steps] if inside else [])
        assert all(0 <= ap <= 100 for ap in points.values())
        if name in roles:  # the last point is the stage's own evaluation
            assert points[steps] == validated.result["metrics"][f"{roles[name]}/mask_ap"]
        assert [e for e in curve if "loss" in e][-1]["step"] == steps
        assert not any("val/mask_ap" in e for e in plain.result["curves"][name])
        manifest = validated.store.manifest(dict(validated.stages("train"))[name])
        if inside:
            assert isinstance(manifest, TrainManifest)
            assert manifest.validation == ValidationFacts(validated=len(inside), skipped=(), failed={})
    assert not list((validated.folder / "storage" / "validations").glob("*"))


@pytest.mark.slow
def test_two_workers_measure_what_one_does(plain: Outcome, start_sweep: Any) -> None:
    before = {}
    for _, key in plain.stages("evaluate"):
        before[key] = [plain.store.read_bytes(key, f) for f in ("metrics.json", "results.json", "matches.npz")]
        (plain.folder / "storage/artifacts" / key / "manifest.json").unlink()
    again = Outcome(plain.folder, start_sweep, "runtime.num_workers=2")
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
    changes = ("evaluation.metric=cityscapes", "evaluation.every_steps=2", "runtime.num_workers=2")
    again = Outcome(plain.folder, start_sweep, *changes, options=("--num-cpus", "4"))
    ran = [s["name"] for s in again.result["stages"] if not s["reused"]]
    assert sorted(ran) == ["distill"] + ["evaluate"] * 4
    manifest = again.store.manifest(distill)
    assert isinstance(manifest, TrainManifest)
    assert manifest.validation == ValidationFacts(validated=3, skipped=(), failed={})
    assert [e["step"] for e in again.result["curves"]["distill"] if "val/mask_ap" in e or "loss" in e] == [2, 4, 6, 7]
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
