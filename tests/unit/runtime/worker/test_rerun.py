"""Stored stages run again in this process: what they give, what is left untouched, which inputs are missed."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from cast_ray.cli.main import main
from cast_ray.cli.options import EXIT_BAD_INPUT, EXIT_FAILED
from cast_ray.contracts.manifest import LabelManifest, read_manifest
from cast_ray.engine.objective import Objective
from cast_ray.engine.world import CPU
from cast_ray.plan.graph import RowPlan, Stage, stage_fingerprint
from cast_ray.recipe import build_recipe
from cast_ray.runtime.data.images import images_of
from cast_ray.runtime.data.record_tables import read_records
from cast_ray.runtime.data.splits import stored_split
from cast_ray.runtime.store.artifact_files import CURVES, LABELS, METRICS
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.models import save_model
from cast_ray.runtime.sweep.planner import RowPlanner
from cast_ray.runtime.sweep.row_results import SweepContext
from cast_ray.runtime.worker import rerun
from cast_ray.runtime.worker.stage_loop import _online_facts
from cast_ray.runtime.worker.stored_stage import StoredStage

OLD_STORE = Path(__file__).parents[3] / "data" / "old_store"
STEPS = {"pretrain": 30, "adapt": 2, "selftrain": 12, "distill": 11, "refine": 0}
SETTINGS = {
    **{f"stages.{stage}.steps": str(steps) for stage, steps in STEPS.items()},
    **{f"stages.{stage}.batch_labelled": "2" for stage in STEPS},
    **{f"stages.{stage}.batch_unlabelled": "2" for stage in ("selftrain", "distill")},
    "data.shapes.num_source": "8",
    "data.shapes.num_train": "12",
    "data.shapes.num_val": "4",
    "data.label_fraction": "0.3",
    "student.num_layers": "1",
    "teacher.num_layers": "1",
    "loss.num_points": "64",
    "stages.pretrain.ema": "0.9",
    "pseudo.score_threshold": "0.01",
}


def planned(storage: Path, **overrides: str) -> tuple[SweepContext, RowPlan]:
    recipe = build_recipe("shapes", "smoke", SETTINGS | {k.replace("__", "."): v for k, v in overrides.items()})
    console = Console(file=io.StringIO())
    planner = RowPlanner({"run": [recipe]}, ArtifactStore(str(storage)), console, lambda: pytest.fail("Ray is started"))
    return planner.plan(recipe, table="t", run="run", row="r")


def run_stage(context: SweepContext, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes and commits a stage as a worker does, in this process."""
    store, dataset = context.store, context.dataset

    def tables(*names: str) -> pa.Table:
        return read_records(store, context.dataset_key, names)

    images = None
    if stage.kind != "evaluate":
        num_source = dataset.num_source or 0
        images = images_of(stage, tables, store, context.content_hash, num_source, context.categories)
        if "labels" in stage.parents:
            images = images.with_labels(read_records(store, f"label-{stage.parents['labels']}", (LABELS,)))
    none: Any = None
    inputs = StoredStage(store, stage, none, context.categories, images, tables("val.parquet"))
    facts: dict[str, Any] = {"num_workers": 1, "device": "cpu", "owner": "t__r__s0"}
    if stage.kind == "train":
        models = []
        real = rerun.train_stage
        with monkeypatch.context() as patch:
            patch.setattr(rerun, "train_stage", lambda *a, **k: models.append(real(*a, **k)) or models[-1])
            result = rerun.train_again(inputs, CPU)
        save_model(store, stage, models[0][0], context.categories)
        store.add(stage, CURVES, json.dumps({"curve": result.curve, "diagnostics": []}).encode())
        facts |= _online_facts(stage)
    elif stage.kind == "label":
        table, found = rerun.label_again(inputs, CPU)
        sink = io.BytesIO()
        pa.parquet.write_table(table, sink)
        store.add(stage, LABELS, sink.getvalue())
        facts |= found
    else:
        store.add(stage, METRICS, json.dumps(rerun.measure_again(inputs, CPU)).encode())
    store.commit(stage, facts)


def made(storage: Path, **overrides: str) -> tuple[SweepContext, dict[str, Stage]]:
    """A store with all stages of a row but the student's evaluation; the stages by name."""
    context, row = planned(storage, **overrides)
    with pytest.MonkeyPatch.context() as patch:
        for stage in row.stages:
            if stage.kind != "evaluate" or stage is row.roles["teacher"]:
                run_stage(context, stage, patch)
    return context, {stage.name: stage for stage in row.stages} | {"evaluate": row.roles["teacher"]}


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepContext, dict[str, Stage]]:
    return made(tmp_path_factory.mktemp("offline") / "storage")


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepContext, dict[str, Stage]]:
    """Labels made as it goes, by a teacher that is refreshed twice."""
    refreshed = {"labels__refresh_steps": "3", "labels__refresh_stages": "[selftrain, distill]"}
    return made(tmp_path_factory.mktemp("online") / "storage", labels__mode="online", **refreshed)


@pytest.fixture
def damaged(offline: tuple[SweepContext, dict[str, Stage]], tmp_path: Path) -> tuple[Path, dict[str, Stage]]:
    """A copy of the store, to take something away from."""
    shutil.copytree(offline[0].store.storage, tmp_path / "storage")
    return tmp_path / "storage", offline[1]


@pytest.fixture
def store_run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def call(storage: str | Path, key: str, *more: str) -> tuple[int, str]:
        code = main(["store", "run", key, "--storage", str(storage), *more])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def files(storage: str) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in Path(storage).rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["pretrain", "selftrain", "distill"])
def test_a_train_stage_gives_its_curve_again(offline: Any, name: str, store_run: Callable[..., Any]) -> None:
    context, stages = offline
    before = files(context.store.storage)
    code, output = store_run(context.store.storage, stages[name].key)
    assert code == 0, output
    assert f"ran {STEPS[name]} of {STEPS[name]} steps" in output and "the curve is equal to the stored one" in output
    assert files(context.store.storage) == before


@pytest.mark.parametrize("name", ["selftrain", "distill"])
def test_online_labels_of_a_refreshed_teacher_are_made_again(
    online: Any, name: str, store_run: Callable[..., Any]
) -> None:
    context, stages = online
    assert stages[name].online is not None and stages[name].config["refresh_steps"] == 3
    before = files(context.store.storage)
    code, output = store_run(context.store.storage, stages[name].key)
    assert code == 0 and "the curve is equal" in output, output
    assert context.store.read_json(stages[name].key, CURVES)["curve"][-1]["semi/mask"] > 0
    assert files(context.store.storage) == before


def test_labels_and_metrics_are_made_again(offline: Any, store_run: Callable[..., Any]) -> None:
    context, stages = offline
    before = files(context.store.storage)
    code, output = store_run(context.store.storage, stages["label-adapted"].key)
    count = context.store.manifest(stages["label-adapted"].key).num_pseudo_labels
    assert code == 0 and count > 0, output
    assert f"{count} labels on 8 images: they are equal to the stored ones" in output
    code, output = store_run(context.store.storage, stages["evaluate"].key)
    assert code == 0 and "mask_ap" in output and "the metrics are equal to the stored ones" in output
    assert files(context.store.storage) == before


def test_steps_stop_early(offline: Any, store_run: Callable[..., Any]) -> None:
    context, stages = offline
    code, output = store_run(context.store.storage, stages["pretrain"].key, "--steps", "12")
    assert code == 0 and "ran 12 of 30 steps" in output and "entries compared: 1," in output
    code, output = store_run(context.store.storage, stages["pretrain"].key, "--steps", "2")
    assert code == 0 and "nothing to compare: the stored curve has no entry up to step 2" in output
    code, output = store_run(context.store.storage, stages["evaluate"].key, "--steps", "2")
    assert code == EXIT_BAD_INPUT and "has no steps, expected a train stage" in output


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))


def test_another_outcome_is_an_exit_code_and_names_the_first_step(damaged: Any, store_run: Callable[..., Any]) -> None:
    storage, stages = damaged
    (curves,) = (storage / "artifacts" / stages["pretrain"].key).glob("*/curves.json")
    rewrite(curves, lambda plain: plain["curve"][1].update(loss=1.5))
    code, output = store_run(storage, stages["pretrain"].key, "--steps", "20")
    assert code == EXIT_FAILED and "the curve differs from the stored one, first at step 20, loss" in output
    (metrics,) = (storage / "artifacts" / stages["evaluate"].key).glob("*/metrics.json")
    rewrite(metrics, lambda plain: plain.update(mask_ap=99.0))
    code, output = store_run(storage, stages["evaluate"].key)
    assert code == EXIT_FAILED and "mask_ap: stored 99, now " in output


def test_several_workers_are_warned_of(damaged: Any, store_run: Callable[..., Any]) -> None:
    storage, stages = damaged
    rewrite(storage / "artifacts" / stages["adapt"].key / "manifest.json", lambda plain: plain.update(num_workers=2))
    code, output = store_run(storage, stages["adapt"].key)
    assert (
        code == 0 and "(workers: 2, device: cpu)" in output and "Losses differ from those of several workers" in output
    )


def test_an_error_of_the_stage_keeps_its_traceback(
    offline: Any, monkeypatch: pytest.MonkeyPatch, store_run: Callable[..., Any]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("what a debugger is started for")

    monkeypatch.setattr(Objective, "__call__", broken)
    with pytest.raises(ValueError, match="what a debugger is started for") as error:
        store_run(offline[0].store.storage, offline[1]["pretrain"].key)
    assert error.traceback[-1].name == "broken"  # where a debugger stops


def test_missing_inputs_are_named(damaged: Any, store_run: Callable[..., Any]) -> None:
    storage, stages = damaged
    distill, labels, dataset = stages["distill"], stages["label-teacher"], next(storage.glob("artifacts/dataset-*"))

    def refused(key: str, *more: str) -> str:
        code, output = store_run(storage, key, *more)
        (line,) = output.splitlines()
        assert code == EXIT_BAD_INPUT and line.startswith("error: ")
        return line

    assert "is a dataset: expected a stage of kind train, label, evaluate" in refused(dataset.name)
    assert f"--data {labels.key}: expected the artifact of a dataset" in refused(distill.key, "--data", labels.key)
    manifest = storage / "artifacts" / labels.key / "manifest.json"
    content = manifest.read_text()
    manifest.unlink()
    assert f"reads {labels.key} (labels), which is not in the store" in refused(distill.key)
    assert f"{labels.key} is unfinished" in refused(labels.key)
    manifest.write_text(content)
    kept = {path: path.read_bytes() for path in (storage / "splits").iterdir()}
    for path in kept:
        path.unlink()
    assert "splits/" in refused(labels.key) and "is not in the store" in refused(labels.key)


def test_a_missing_image_is_named(damaged: Any, store_run: Callable[..., Any], tmp_path: Path) -> None:
    storage, stages = damaged
    (dataset,) = storage.glob("artifacts/dataset-*")
    (part,) = dataset.glob("*/val.parquet/00000.parquet")
    table = pa.parquet.read_table(part)
    gone = pa.array([str(tmp_path / "gone.png")] * table.num_rows)
    pa.parquet.write_table(table.set_column(table.column_names.index("uri"), "uri", gone), part)
    code, output = store_run(storage, stages["evaluate"].key)
    assert code == EXIT_BAD_INPUT and "gone.png" in output and output.startswith(f"error: {dataset.name}: ")


def test_the_dataset_is_the_one_that_the_fingerprint_was_made_from(
    damaged: Any, store_run: Callable[..., Any], offline: Any
) -> None:
    storage, stages = damaged
    (dataset,) = storage.glob("artifacts/dataset-*")
    other = dataset.with_name("dataset-0123456789abcdef0123")
    shutil.copytree(dataset, other)
    rewrite(other / "manifest.json", lambda plain: plain.update(content_hash="another", committed=9e12))
    code, output = store_run(storage, stages["evaluate"].key)
    assert code == 0, output
    code, output = store_run(storage, stages["evaluate"].key, "--data", other.name)
    assert code == 0 and f"does not follow from {other.name}: its results may differ" in output  # the images are equal
    shutil.rmtree(dataset)
    code, output = store_run(storage, stages["evaluate"].key)
    assert (
        code == EXIT_BAD_INPUT and f"no dataset in the store leads to its fingerprint (it has {other.name})" in output
    )
    assert "--data DATASET_KEY" in output


def test_an_online_stage_of_an_early_version_is_refused(
    online: Any, tmp_path: Path, store_run: Callable[..., Any]
) -> None:
    storage, key = tmp_path / "storage", online[1]["distill"].key
    shutil.copytree(online[0].store.storage, storage)
    rewrite(storage / "artifacts" / key / "manifest.json", lambda plain: plain.pop("online"))
    code, output = store_run(storage, key)
    assert code == EXIT_BAD_INPUT and "labelled its images online" in output and "does not say how" in output


def test_fingerprints_of_an_early_store_follow_from_its_dataset() -> None:
    manifests = [read_manifest(path.read_bytes(), str(path)) for path in OLD_STORE.glob("artifacts/*/manifest.json")]
    (dataset,) = (manifest for manifest in manifests if manifest.kind == "dataset")
    stages = [manifest for manifest in manifests if manifest.kind != "dataset"]
    assert len(stages) == 11
    for m in stages:
        assert stage_fingerprint(m.kind, m.config, m.parents, dataset.plain()["content_hash"]) == m.fingerprint


def test_a_row_that_holds_a_precision_trains_and_labels_its_folds(tmp_path: Path) -> None:
    """All stages, in this process: what each fold's teacher sees, and what the label stages make of their labels."""
    settings = {"pseudo__precision": "0.05", "pseudo__precision_error": "0.4", "pseudo__precision_folds": "2"}
    context, stages = made(tmp_path / "storage", **settings)

    def images(name: str) -> tuple[set[int], list[int]]:
        chosen = stored_split(context.store, context.content_hash, stages[name].config["split"])
        return set(chosen.labelled.tolist()), chosen.unlabelled.tolist()

    labelled, unlabelled = images("label-adapted")
    assert len(labelled) == 4
    for labels, teacher in (("label-adapted", "adapt"), ("label-teacher", "selftrain")):
        for k in (1, 2):
            held_out = set(images(f"{labels}-fold{k}")[1])
            assert len(held_out) == 2 and images(f"{teacher}-fold{k}")[0] == labelled - held_out
        manifest = context.store.manifest(stages[labels].key)
        assert isinstance(manifest, LabelManifest) and manifest.held_precision is not None
        assert manifest.held_precision.num_images == 4 and manifest.held_precision.num_folds == 2
        kept = context.store.read_table(stages[labels].key, LABELS).to_pylist()
        assert len(kept) == len(unlabelled) == manifest.num_images
        least = manifest.class_thresholds
        assert least is not None
        names = {c.id: c.name for c in context.categories}
        assert all(i["score"] >= least[names[i["category_id"]]] for row in kept for i in row["instances"])
    assert images("selftrain-fold1")[1] == unlabelled
