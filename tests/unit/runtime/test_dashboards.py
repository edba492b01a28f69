"""The board and the alerts of cluster/ ask for metrics that exist, by labels that these have, and alerts fire."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from dashboards import RULES, alerts, board, board_queries, metrics_by_name

BY_NAME = metrics_by_name()
QUERIES = board_queries() | {name: rule["expr"] for name, rule in alerts().items()}
NOW_MIN = 30
"""Minute at which alerts are looked at."""
CALM = [
    ('ray_cast_ray_device_seconds{sweep="calm"}', "0+10x60"),
    ('ray_cast_ray_budget_device_seconds{sweep="calm"}', "3600x60"),
    ('ray_cast_ray_stages{sweep="calm",state="done"}', "20x60"),
    ('ray_cast_ray_stages{sweep="calm",state="failed"}', "1x60"),
    ('ray_cast_ray_progress_timestamp_seconds{sweep="calm"}', "0+60x60"),
    ('ray_cast_ray_worker_group_restarts_total{sweep="calm"}', "1x60"),
    ('ray_cast_ray_store_errors_total{operation="read_bytes"}', "3x60"),
]
"""A sweep with which all is well: series and their value of each minute."""
TROUBLE = {
    "CastRayNoProgress": [('ray_cast_ray_progress_timestamp_seconds{sweep="bad"}', "60x60")],
    "CastRayBudgetNearlySpent": [
        ('ray_cast_ray_device_seconds{sweep="bad"}', "0+115x60"),
        ('ray_cast_ray_budget_device_seconds{sweep="bad"}', "3600x60"),
    ],
    "CastRayStagesFail": [
        ('ray_cast_ray_stages{sweep="bad",state="done"}', "4x60"),
        ('ray_cast_ray_stages{sweep="bad",state="failed"}', "1x60"),
    ],
    "CastRayWorkersRestartOften": [('ray_cast_ray_worker_group_restarts_total{sweep="bad"}', "0+1x60")],
    "CastRayStoreErrors": [('ray_cast_ray_store_errors_total{operation="write_bytes"}', "0+9x60")],
}


@pytest.mark.parametrize(("name", "query"), list(QUERIES.items()), ids=list(QUERIES))
def test_a_query_names_metrics_and_labels_that_exist(name: str, query: str) -> None:
    asked = re.findall(r"(ray_\w+)(?:\{([^}]*)\})?", query)
    assert asked and all(metric in BY_NAME for metric, _ in asked), asked
    tags = set(BY_NAME[asked[0][0]].tags)
    for metric, matchers in asked:
        assert set(re.findall(r"(\w+)\s*=", matchers)) <= set(BY_NAME[metric].tags)
    by = {label.strip() for labels in re.findall(r"by \(([^)]*)\)", query) for label in labels.split(",")}
    assert by <= tags, f"{by - tags} of {name}"


def test_legends_name_labels_that_the_query_keeps() -> None:
    for panel in board()["panels"]:
        for target in panel["targets"]:
            by = {
                label.strip() for found in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in found.split(",")
            }
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= by, panel["title"]


def test_every_metric_is_on_the_board() -> None:
    text = " ".join(board_queries().values())
    assert [name for name in BY_NAME if name not in text] == []


def test_panels_lie_side_by_side_and_say_what_they_show() -> None:
    panels = board()["panels"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(panels) and all(x + 8 <= 24 for x, _ in places)
    assert all(panel["description"] and panel["title"] for panel in panels)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_alerts_fire_for_trouble_and_are_silent_otherwise(tmp_path: Path) -> None:
    assert set(TROUBLE) == set(alerts())
    series = [*CALM, *(pair for pairs in TROUBLE.values() for pair in pairs)]
    value = {"input_series": [{"series": name, "values": values} for name, values in series], "interval": "1m"}
    checks = []
    for name, pairs in TROUBLE.items():
        label = re.search(r"(sweep|operation)=\"(\w+)\"", pairs[0][0])
        assert label is not None
        firing = {"exp_labels": {"severity": "warning", label[1]: label[2]}}
        checks.append({"eval_time": f"{NOW_MIN}m", "alertname": name, "exp_alerts": [firing]})
    # The words of an alert hold values, and promtool compares them, too.
    bare = [{key: part for key, part in rule.items() if key != "annotations"} for rule in alerts().values()]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "bare", "rules": bare}]}))
    test = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [value | {"alert_rule_test": checks}]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    for command in (["check", "rules", str(RULES)], ["test", "rules", "test.yml"]):
        done = subprocess.run(["promtool", *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
