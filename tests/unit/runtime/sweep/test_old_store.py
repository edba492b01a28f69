"""A store of the build before documents had a schema version: its artifacts are found, and make the same result."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from report_scenes import result
from rich.console import Console

from cast_ray.contracts.document import NewerDocumentError
from cast_ray.contracts.row_result import RowResult
from cast_ray.plan.ablation import load_table
from cast_ray.plan.graph import RowPlan, plan_sweep
from cast_ray.runtime.store.artifacts import ArtifactStore, committed_fingerprints
from cast_ray.runtime.store.pruning import find_prunable
from cast_ray.runtime.sweep.planner import RowPlanner
from cast_ray.runtime.sweep.row_results import (
    SweepContext,
    is_current,
    read_result,
    result_from_store,
    write_result,
)

OLD = Path(__file__).parents[3] / "data" / "old_store"
"""What `ablate.py losses --preset shapes --scale smoke --rows sup+semi` of that build left, as text: manifests, curves,
metrics, audits and the result, without weights, tables and pictures."""


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepContext, RowPlan]:
    """The same row as this build plans it, on a copy of the old store."""
    storage = tmp_path_factory.mktemp("old") / "storage"
    shutil.copytree(OLD, storage)
    recipe = load_table("losses").row_recipe("sup+semi", "shapes", "smoke", 0)
    run, console = "losses-shapes-smoke", Console(file=io.StringIO())
    planner = RowPlanner({run: [recipe]}, ArtifactStore(str(storage)), console, lambda: pytest.fail("Ray is started"))
    return planner.plan(recipe, table="losses", run=run, row="sup+semi")


def old_result() -> RowResult:
    path = OLD / "runs" / "losses-shapes-smoke" / "losses__sup+semi__s0" / "result.json"
    return RowResult.read(path.read_bytes(), str(path))


def test_nothing_is_left_to_run(planned: tuple[SweepContext, RowPlan]) -> None:
    context, row = planned
    whole = plan_sweep([row], committed_fingerprints(context.store.list_artifacts()))
    assert (len(whole.to_run), whole.steps_to_run) == (0, 0)
    old = {manifest.parent.name for manifest in (OLD / "artifacts").glob("*/manifest.json")}
    assert {stage.key for stage in row.stages} == {key for key in old if not key.startswith("dataset-")}
    for stage in row.stages:
        manifest = context.store.manifest(stage.key)
        assert (manifest.stage, manifest.kind, manifest.parents) == (stage.name, stage.kind, stage.parents)
        assert json.loads(json.dumps(stage.config)) == manifest.config and manifest.steps == stage.steps


def test_the_same_result_is_assembled(planned: tuple[SweepContext, RowPlan]) -> None:
    context, row = planned
    made, old = result_from_store(context, row), old_result()
    assert made.schema_version == RowResult.VERSION
    assert old.metrics and made.metrics == old.metrics
    for name in ("table", "row", "seed", "status", "per_class", "evaluations", "curves", "diagnostics", "given"):
        assert getattr(made, name) == getattr(old, name), name
    assert made.pseudo_labels == old.pseudo_labels and made.device_hours == pytest.approx(old.device_hours)
    assert made.dataset is not None and old.dataset is not None
    assert made.dataset.split == old.dataset.split and made.dataset.content_hash == old.dataset.content_hash
    counts = ("num_labelled", "num_unlabelled", "num_train", "num_val", "num_source", "num_extra")
    assert all(getattr(made.dataset, count) == getattr(old.dataset, count) for count in counts)
    elsewhere = {"artifact": "", "reused": False, "resumed_at_step": None, "skipped_steps": None}
    for mine, theirs in zip(made.stages, old.stages, strict=True):
        assert mine.reused and mine.artifact.endswith(theirs.artifact.removeprefix("storage"))
        assert mine.model_copy(update=elsewhere) == theirs.model_copy(update=elsewhere)
    assert RowResult.read(made.to_json(), "result.json") == made


def test_the_old_result_stands_and_keeps_its_artifacts(planned: tuple[SweepContext, RowPlan]) -> None:
    context, row = planned
    assert is_current(read_result(context, row), row)
    unused = {artifact.key for artifact in find_prunable(context.store, unused=True).artifacts}
    assert not unused & {stage.key for stage in row.stages}


def test_a_newer_result_is_neither_read_nor_replaced(planned: tuple[SweepContext, RowPlan]) -> None:
    context, row = planned
    path, before = context.result_path(row), context.store.find_bytes(context.result_path(row))
    newer = result("sup+semi") | {"schema_version": RowResult.VERSION + 1}
    try:
        context.store.write_json(path, newer)
        for read in (lambda: read_result(context, row), lambda: find_prunable(context.store, unused=True)):
            with pytest.raises(ValueError, match=r"result.json: .*schema_version is 2, expected at most 1") as error:
                read()
            assert "\n" not in str(error.value)
        with pytest.raises(NewerDocumentError):
            read_result(context, row)
        context.store.write_bytes(path, b'{"table": "losses"}')
        assert read_result(context, row) is None  # not a result at all: it is made again
        write_result(context, row, result_from_store(context, row))
        assert is_current(read_result(context, row), row)
    finally:
        context.store.write_bytes(path, before or b"")


def test_the_checked_in_store_names_no_machine() -> None:
    texts = [path.read_text() for path in OLD.rglob("*.json")]
    assert sum(map(len, texts)) < 60_000 and not any("/tmp" in text or "/home" in text for text in texts)
