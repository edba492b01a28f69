"""The whole path on a real Ray: four rows, shared stages once, a second run from the store, one stage again."""

from __future__ import annotations

import json
import math
import socket
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cast_ray.cli.main import main
from cast_ray.contracts.manifest import DatasetManifest
from cast_ray.contracts.records import Category, ClassMap
from cast_ray.evaluation.label_audit import audit_images, summarise_audit
from cast_ray.plan.ablation import load_table
from cast_ray.plan.graph import artifact_key, plan
from cast_ray.recipe import Recipe
from cast_ray.runtime.store.artifacts import ArtifactStore

pytestmark = pytest.mark.timeout(1800)

ROWS = tuple(load_table("losses").rows)
# A step of two images costs 0.03 s; with fewer of them the teacher's masks are empty and there is nothing to distil.
STEPS = {"pretrain": 40, "adapt": 10, "selftrain": 10, "distill": 20, "refine": 4}
NUM_SLOTS = 2
SETTINGS = [
    *(f"stages.{stage}.steps={steps}" for stage, steps in STEPS.items()),
    *(f"stages.{stage}.batch_labelled=2" for stage in STEPS),
    *(f"stages.{stage}.batch_unlabelled=2" for stage in ("selftrain", "distill")),
    "data.shapes.num_source=8",
    "data.shapes.num_train=16",
    "data.shapes.num_val=6",
    "student.num_layers=1",
    "teacher.num_layers=1",
    "stages.pretrain.ema=0.9",
    "pseudo.score_threshold=0.01",  # nor is it sure of anything
    f"runtime.max_concurrent_stages={NUM_SLOTS}",
]
ARGUMENTS = [part for setting in SETTINGS for part in ("--set", setting)]


@dataclass
class Outcome:
    """What one run of the command left."""

    code: int
    output: str
    results: dict[str, dict[str, Any]]
    committed: dict[str, float]
    """Key of every artifact in the store -> when it was committed."""


def outcome_of(folder: Path, sweep: Any) -> Outcome:
    code = sweep.finish()
    runs = folder / "runs" / "losses-shapes-smoke"
    results = {}
    for row in ROWS:
        path = runs / f"losses__{row}__s0" / "result.json"
        results[row] = json.loads(path.read_text()) if path.is_file() else {}
    paths = (folder / "storage/artifacts").glob("*/manifest.json")
    manifests = {path.parent.name: json.loads(path.read_text()) for path in paths}
    return Outcome(code, sweep.output, results, {key: m["committed"] for key, m in manifests.items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def first(folder: Path, start_sweep: Any) -> Outcome:
    return outcome_of(folder, start_sweep(folder, *ARGUMENTS))


@pytest.fixture(scope="module")
def second(folder: Path, first: Outcome, start_sweep: Any) -> Outcome:
    assert first.code == 0, first.output
    return outcome_of(folder, start_sweep(folder, *ARGUMENTS))


def stage(result: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [s for s in result["stages"] if s["name"] == name]
    return found


def evaluation_of(store: ArtifactStore, result: dict[str, Any], name: str) -> dict[str, Any]:
    """The evaluate stage of one of a row's models."""
    model = stage(result, name)["fingerprint"]
    evaluations = [s for s in result["stages"] if s["kind"] == "evaluate"]
    (found,) = [
        s for s in evaluations if store.manifest(artifact_key("evaluate", s["fingerprint"])).parents == {"model": model}
    ]
    return found


def test_the_command_succeeds_and_shows_its_plan_first(first: Outcome) -> None:
    assert first.code == 0, first.output
    before_ray = first.output.partition("Ray ")[0]
    assert "4: sup, sup+semi, sup+pxl, sup+semi+pxl" in before_ray
    assert "16 train + 8 source, 6 val, 4 classes" in before_ray
    assert "started here" in first.output


def test_every_row_has_its_result(first: Outcome) -> None:
    for row, result in first.results.items():
        assert (result["table"], result["row"], result["seed"]) == ("losses", row, 0)
        assert result["status"] == "done" and result["error"] is None
        assert result["seconds"] > 0 and result["device_hours"] >= 0 and result["started"]
        assert "ablate.py losses" in result["command"] and result["code_version"] and result["hardware"]["num_cpus"]
        machines = [tuple(node["node"] for node in stage["computed_on"]) for stage in result["stages"]]
        assert set(machines) == {(socket.gethostname(),)}  # of every stage; the node has no label with its type
        assert Recipe.model_validate(result["recipe"]).stages.distill.steps == STEPS["distill"]
        dataset = result["dataset"]
        assert (dataset["num_train"], dataset["num_val"], dataset["num_source"]) == (16, 6, 8)
        assert dataset["num_labelled"] == 4 and dataset["num_unlabelled"] == (0 if row == "sup" else 12)
        for role in ("zero_shot", "teacher", "student", "refined"):
            for metric in ("mask_ap", "ap50"):
                value = result["metrics"][f"{role}/{metric}"]
                assert math.isfinite(value) and 0 <= value <= 100
            assert result["metrics"][f"{role}/num_images"] == 6
        for name in ("pretrain", "adapt", "distill", "refine"):
            last = result["curves"][name][-1]
            assert last["step"] == STEPS[name] and math.isfinite(last["loss"])
        assert result["diagnostics"]["refine"] == []
        assert bool(result["diagnostics"]["distill"]) == ("pxl" in row)


def test_rows_ran_the_stages_of_their_plan(first: Outcome) -> None:
    for row, result in first.results.items():
        wanted = plan(Recipe.model_validate(result["recipe"]), result["dataset"]["content_hash"], row=row)
        assert [(s["name"], s["fingerprint"], s["steps"]) for s in result["stages"]] == [
            (s.name, s.fingerprint, s.steps) for s in wanted.stages
        ]


def test_shared_stages_ran_once(first: Outcome) -> None:
    ran = Counter(s["fingerprint"] for result in first.results.values() for s in result["stages"] if not s["reused"])
    everything = {s["fingerprint"] for result in first.results.values() for s in result["stages"]}
    assert set(ran) == everything and set(ran.values()) == {1}
    stored = {key.rpartition("-")[2] for key in first.committed if not key.startswith("dataset-")}
    assert stored == everything
    assert sum(not stage(result, "pretrain")["reused"] for result in first.results.values()) == 1


def test_rows_share_their_worker_groups(folder: Path, first: Outcome) -> None:
    """A group serves one row after the other: no more are started than run at a time, and nothing of them is left."""
    paths = (folder / "storage/artifacts" / key / "manifest.json" for key in first.committed)
    stages = [m for m in (json.loads(path.read_text()) for path in paths) if m["kind"] != "dataset"]
    starts = {m["owner"] for m in stages if m["startup_seconds"] > 0}
    assert 1 <= len(starts) <= NUM_SLOTS < len({m["owner"] for m in stages}), [
        (m["stage"], m["owner"], m["startup_seconds"]) for m in stages
    ]
    assert not list((folder / "storage/train").iterdir()) and not list((folder / "storage/checkpoints").glob("*"))


def test_the_report_names_every_row(folder: Path, first: Outcome) -> None:
    runs = folder / "runs" / "losses-shapes-smoke"
    page = (runs / "report.md").read_text()
    assert all(row in page for row in ROWS)
    summary = (runs / "report.json").read_text()
    assert json.loads(summary) and all(f'"{row}"' in summary for row in ROWS)
    assert any(path.suffix == ".png" for path in runs.iterdir())
    assert all(row in first.output.partition("Ray ")[2] for row in ROWS)


def test_labels_are_of_every_unlabelled_image_in_the_plans_order(folder: Path, first: Outcome) -> None:
    store = ArtifactStore(str(folder / "storage"))
    result = first.results["sup+semi"]
    for name in ("label-adapted", "label-teacher"):
        key = artifact_key("label", stage(result, name)["fingerprint"])
        labels = store.read_table(key, "labels")
        assert sorted(labels.column("position").to_pylist()) == list(range(12))
        assert len(set(labels.column("image_id").to_pylist())) == 12
        assert sum(map(len, labels.column("instances").to_pylist())) > 0


def test_labels_are_audited_against_the_hidden_truth(folder: Path, first: Outcome) -> None:
    store = ArtifactStore(str(folder / "storage"))
    result = first.results["sup+semi"]
    assert first.results["sup"]["pseudo_labels"] == {}
    assert list(result["pseudo_labels"]) == ["label-adapted", "label-teacher"]
    (dataset,) = (key for key in first.committed if key.startswith("dataset-"))
    hidden = {row["image_id"]: row for row in store.read_table(dataset, "train.parquet").to_pylist()}
    manifest = store.manifest(dataset)
    assert isinstance(manifest, DatasetManifest)
    classes = ClassMap([Category(c.id, c.name) for c in manifest.categories])
    for name, audit in result["pseudo_labels"].items():
        key = artifact_key("label", stage(result, name)["fingerprint"])
        labels = store.read_table(key, "labels").sort_by("position").to_pylist()
        whole = audit_images([hidden[row["image_id"]] for row in labels], labels, classes)
        assert audit == summarise_audit(whole, classes)
        assert (audit["num_images"], audit["num_labels"]) == (12, sum(len(row["instances"]) for row in labels))


def test_stored_stages_run_again_without_ray_and_give_the_same(
    folder: Path, first: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    """What workers of Ray Train made in the sweep, made in this process: losses, labels and metrics."""
    storage = folder / "storage"
    before = {path: path.stat().st_mtime_ns for path in storage.rglob("*") if path.is_file()}
    result = first.results["sup+semi+pxl"]
    store = ArtifactStore(str(storage))
    teachers = evaluation_of(store, result, "selftrain")["fingerprint"]
    said = (
        "the curve is equal to the stored one",
        "equal to the stored ones",
        "the metrics are equal to the stored ones",
    )
    for kind, fingerprint, words in (
        ("train", stage(result, "distill")["fingerprint"], said[0]),
        ("train", stage(result, "selftrain")["fingerprint"], said[0]),
        ("label", stage(result, "label-teacher")["fingerprint"], said[1]),
        ("evaluate", teachers, said[2]),
    ):
        code = main(["store", "run", artifact_key(kind, fingerprint), "--storage", str(storage)])
        output = "".join(capsys.readouterr())
        assert code == 0 and words in output, output
    assert {path: path.stat().st_mtime_ns for path in storage.rglob("*") if path.is_file()} == before


def test_a_second_run_needs_no_ray(first: Outcome, second: Outcome) -> None:
    assert second.code == 0, second.output
    assert "started here" not in second.output and "Ray " not in second.output
    assert second.committed == first.committed
    assert {row: r["metrics"] for row, r in second.results.items()} == {
        row: r["metrics"] for row, r in first.results.items()
    }


def test_a_lost_artifact_is_made_again_and_nothing_else(folder: Path, second: Outcome, start_sweep: Any) -> None:
    store = ArtifactStore(str(folder / "storage"))
    sup = second.results["sup"]
    distill = artifact_key("train", stage(sup, "distill")["fingerprint"])
    evaluation = artifact_key("evaluate", evaluation_of(store, sup, "distill")["fingerprint"])
    weights = store.read_bytes(distill, "model.safetensors")
    for key in (distill, evaluation):
        (folder / "storage/artifacts" / key / "manifest.json").unlink()
    (folder / "storage/artifacts" / distill / "model.safetensors").write_bytes(b"half of it")
    third = outcome_of(folder, start_sweep(folder, *ARGUMENTS))
    assert third.code == 0, third.output
    assert "started here" in third.output
    again = {key for key in third.committed if third.committed[key] != second.committed.get(key)}
    assert again == {distill, evaluation}
    assert store.read_bytes(distill, "model.safetensors") == weights
    assert third.results["sup"]["metrics"] == sup["metrics"]
    assert {s["fingerprint"] for s in third.results["sup"]["stages"] if not s["reused"]} == {
        distill.rpartition("-")[2],
        evaluation.rpartition("-")[2],
    }
