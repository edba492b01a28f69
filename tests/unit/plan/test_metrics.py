"""Metrics by name: what a row's result can hold, what it cannot, and what a recipe leaves out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cast_ray.contracts.records import Category
from cast_ray.evaluation.cityscapes_ap import cityscapes_metrics
from cast_ray.evaluation.coco_ap import AREAS, coco_metrics
from cast_ray.evaluation.matches import DetectionMatches, Metric
from cast_ray.losses.contrastive.pixels import NUM_STATISTICS, diagnose
from cast_ray.plan.ablation import Table, load_table, table_names
from cast_ray.plan.graph import plan
from cast_ray.plan.metrics import (
    DIAGNOSTICS,
    OF_BOTH_KINDS,
    OF_COCO,
    ROLES,
    check_metric,
    check_objective,
    why_missing,
)
from cast_ray.plan.search import SearchSpec
from cast_ray.recipe import build_recipe
from cast_ray.report import metrics as report_metrics

SEARCH: dict[str, Any] = {"name": "s", "title": "t", "objectives": {"refined/mask_ap": "max"}}


def test_names_are_those_that_evaluations_and_diagnostics_write() -> None:
    one = np.zeros(1)
    truth = np.ones((1, 1, len(AREAS)), dtype=np.uint16)
    numbers = {}
    kinds: list[tuple[Metric, Any]] = [("coco", coco_metrics), ("cityscapes", cityscapes_metrics)]
    for kind, metrics_of in kinds:
        bits = np.zeros((1, len(AREAS)), dtype=np.uint16)
        matches = DetectionMatches(kind, one.astype(np.int32), one.astype(np.int16), one, bits, bits, truth)
        measured = metrics_of(matches, [Category(1, "a")])
        numbers[kind] = {name for name, value in measured.items() if value is None or isinstance(value, int | float)}
    assert numbers == {"coco": {*OF_BOTH_KINDS, *OF_COCO}, "cityscapes": set(OF_BOTH_KINDS)}
    assert list(diagnose(torch.ones(2 + NUM_STATISTICS), 0.1)) and set(diagnose(torch.ones(11), 0.1)) == {*DIAGNOSTICS}
    row = plan(build_recipe("shapes"), "0" * 64)
    assert {role for role, stage in row.roles.items() if stage.kind == "evaluate"} == {*ROLES}
    assert set(report_metrics.ROLES) == {*ROLES}
    assert {*OF_BOTH_KINDS, *OF_COCO} <= {*report_metrics.MEASURES, "num_images", "num_detections"}


@pytest.mark.parametrize("name", ["student/mask_ap", "zero_shot/ar_10", "distill/fnr", "final/per_class/traffic light"])
def test_a_metric_of_a_result(name: str) -> None:
    check_metric(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("student/maskap", "unknown metric 'student/maskap': did you mean 'student/mask_ap'?"),
        ("studnet/ap50", "did you mean 'student/ap50'?"),
        ("distill/margins", "did you mean 'distill/margin'?"),
        ("mask_ap", "unknown metric 'mask_ap'"),
        ("pretrain/margin", "unknown metric 'pretrain/margin'"),
        ("student/per_class/", "unknown metric 'student/per_class/'"),
        ("student/per_class", "unknown metric 'student/per_class'"),
        ("student/latency_ms", "measured by searches alone"),
        ("", "unknown metric ''"),
    ],
)
def test_no_metric_of_a_result(name: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_metric(name)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["student/per_class/car", "distill/margin", "student/latency", "val/mask_ap"])
def test_no_objective_of_a_search(name: str) -> None:
    check_objective("student/latency_ms")
    with pytest.raises(ValueError, match=f"^unknown metric '{name}'"):
        check_objective(name)


@pytest.mark.parametrize(
    ("metric", "changes", "reason"),
    [
        ("refined/mask_ap", {"stages.use_refine": False}, "stages.use_refine is false"),
        ("refined/ap50", {"stages.refine.steps": 0}, "stages.refine.steps is 0"),
        ("student/ap_small", {"evaluation.metric": "cityscapes"}, "cityscapes, which has no ap_small"),
        ("student/ap50", {"evaluation.metric": "cityscapes"}, ""),
        ("zero_shot/mask_ap", {"stages.pretrain.steps": 0}, "nothing gives a row such a teacher"),
        ("teacher/mask_ap", {"stages.pretrain.steps": 0}, ""),
        ("distill/margin", {"loss.lambda_pxl": 0}, "distill has no pixel contrast"),
        ("selftrain/fnr", {"loss.lambda_semi": 0}, "selftrain has no pixel contrast"),
        ("adapt/fnr", {"loss.lambda_semi": 0}, ""),
        ("final/mask_ap", {"stages.use_refine": False}, ""),
        ("student/per_class/car", {}, ""),
    ],
)
def test_what_a_recipe_leaves_out(metric: str, changes: dict[str, Any], reason: str) -> None:
    found = why_missing(metric, build_recipe("shapes", overrides=changes))
    assert found.startswith(reason) or reason in found
    assert bool(found) == bool(reason)


def test_tables_that_ship_measure_what_they_compare() -> None:
    for name in table_names():
        table = load_table(name)
        table.check_measured(table.row_recipe(row) for row in table.rows)


def test_a_table_whose_metric_no_row_has_is_refused() -> None:
    rows = {"a": {"stages.use_refine": False}, "b": {}}
    table = Table(name="t", title="t", metric="refined/mask_ap", baseline="a", rows=rows)
    table.check_measured([table.row_recipe("a"), table.row_recipe("b")])  # one has it
    with pytest.raises(ValueError, match=r"no row will have its metric refined/mask_ap: stages\.use_refine is false"):
        table.check_measured([table.row_recipe("a")])


def test_a_search_whose_trials_would_end_without_an_objective_is_refused() -> None:
    space = {"stages.use_refine": {"choices": [True, False]}}
    with pytest.raises(ValueError, match=r"space, stages\.use_refine: a trial would end without its objective refined"):
        SearchSpec(**SEARCH, space=space)
    spec = SearchSpec(**SEARCH, space={"loss.lambda_pxl": {"low": 0, "high": 1}})
    with pytest.raises(ValueError, match=r"refined/mask_ap: stages\.refine\.steps is 0"):
        spec.recipe({}, "shapes", "demo", 0, {"stages.refine.steps": 0})
