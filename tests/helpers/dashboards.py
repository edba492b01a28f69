"""The queries of cluster/grafana and the alerts of cluster/prometheus, for the tests that evaluate them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from cast_ray.runtime import metrics
from cast_ray.runtime.metrics import Metric

CLUSTER = Path(__file__).parents[2] / "cluster"
BOARD, RULES = CLUSTER / "grafana" / "cast_ray.json", CLUSTER / "prometheus" / "rules.yml"


def metrics_by_name() -> dict[str, Metric]:
    """Every metric by its name in Prometheus, as Ray exports it."""
    found = [metric for metric in vars(metrics).values() if isinstance(metric, Metric)]
    names = [f"ray_{metric.name}{'_total' if metric.kind == 'counter' else ''}" for metric in found]
    assert len(set(names)) == len(names)
    return dict(zip(names, found))


def board() -> dict[str, Any]:
    return json.loads(BOARD.read_text())


def board_queries() -> dict[str, str]:
    """Panel and letter of each query of the board -> the query, with all sweeps chosen and a price of 1."""
    return {
        f"{panel['title']} {target['refId']}": target["expr"].replace("$sweep", ".*").replace("$price", "1")
        for panel in board()["panels"]
        for target in panel["targets"]
    }


def alerts() -> dict[str, dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}
