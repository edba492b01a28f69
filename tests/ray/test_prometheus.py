"""A real Prometheus scrapes a real sweep: every query of the board has an answer, and no alert is broken."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboards import RULES, alerts, board_queries

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: prometheus)"),
]

STEPS = {"pretrain": 60, "adapt": 20, "selftrain": 20, "distill": 60, "refine": 20}
SETTINGS = [
    *(f"stages.{stage}.steps={steps}" for stage, steps in STEPS.items()),
    *(f"stages.{stage}.batch_labelled=2" for stage in STEPS),
    *(f"stages.{stage}.batch_unlabelled=2" for stage in ("selftrain", "distill")),
    *(f"stages.{stage}.checkpoint_every_steps=10" for stage in STEPS),
    "evaluation.every_steps=15",
    "data.shapes.num_source=8",
    "data.shapes.num_train=24",
    "data.shapes.num_val=6",
    "teacher.num_layers=1",
    "student.num_layers=1",
    "stages.pretrain.ema=0.9",
    "pseudo.score_threshold=0.01",
]
ROWS = ("sup", "sup+semi")


@dataclass
class Prometheus:
    """Answers of a server about the time of the sweep."""

    port: int
    began: float
    ended: float = 0.0
    train_runs: set[str] = field(default_factory=set)
    """Names of the runs of Ray Train that the dashboard's API has listed meanwhile."""

    def ask(self, what: str, **parameters: Any) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as response:
            return json.load(response)["data"]

    def series(self, query: str) -> list[tuple[dict[str, str], list[float]]]:
        """(labels, values) of each series that a query gave during the sweep."""
        found = self.ask("query_range", query=query, start=self.began, end=self.ended, step=1)["result"]
        return [(one["metric"], [float(value) for _, value in one["values"]]) for one in found]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A short path: Ray's sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="prom-", ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.fixture(scope="module")
def watched(folder: Path, start_sweep: Any, wait_until: Any) -> Iterator[Prometheus]:
    """A Prometheus that has watched a whole sweep, as docs/cluster.md sets it up."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        server = Prometheus(probe.getsockname()[1], time.time())
    # Ray writes it when it starts; a file that is not there yet is looked for at intervals.
    discovery = {"files": [str(folder / "ray/prom_metrics_service_discovery.json")], "refresh_interval": "1s"}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [discovery]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{server.port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        wait_until(lambda: _answers(server), "Prometheus does not start", 60)
        pairs = [part for setting in SETTINGS for part in ("--set", setting)]
        sweep = start_sweep(
            *(folder, "--rows", *ROWS, "--budget-hours", "1", *pairs),
            variables={"RAY_TMPDIR": str(folder), "RAY_metrics_report_interval_ms": "1000"}
            | {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1"},
        )
        while sweep.process.poll() is None:
            server.train_runs |= train_runs(sweep.output)
            time.sleep(2)
        assert sweep.finish() == 0, sweep.output
        server.ended = time.time()
        yield server
    finally:
        process.terminate()
        process.wait(60)


def train_runs(output: str) -> set[str]:
    """Names of the runs of Ray Train that the dashboard lists whose address a command has printed."""
    found = re.search(r"dashboard (http://\S+)", output)
    token = Path.home() / ".ray" / "auth_token"
    if found is None:
        return set()
    request = urllib.request.Request(f"{found[1]}/api/train/v2/runs/v1")
    if token.is_file():
        request.add_header("Authorization", f"Bearer {token.read_text().strip()}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return {run["name"] for run in json.load(response)["train_runs"]}
    except (urllib.error.URLError, OSError):  # it is not up yet, or no more
        return set()


def _answers(server: Prometheus) -> bool:
    try:
        server.ask("query", query="vector(1)")
    except (urllib.error.URLError, OSError):
        return False
    return True


def test_every_query_of_the_board_returns_data(watched: Prometheus) -> None:
    empty = {panel: query for panel, query in board_queries().items() if not watched.series(query)}
    assert not empty


def test_runs_of_ray_train_are_named_after_sweep_row_and_stages(watched: Prometheus) -> None:
    names = [name.split("__") for name in watched.train_runs]
    assert {(parts[0], parts[1], parts[3]) for parts in names} == {("losses-shapes-smoke", "losses", "s0")}
    assert {parts[2] for parts in names} <= set(ROWS) and "pretrain-to-" in " ".join(parts[4] for parts in names)


def test_series_name_sweep_row_seed_stage_and_node(watched: Prometheus) -> None:
    losses = [labels for labels, _ in watched.series("ray_cast_ray_loss")]
    assert {labels["sweep"] for labels in losses} == {"losses-shapes-smoke"}
    assert {labels["row"] for labels in losses} <= {f"losses__{row}" for row in ROWS}
    assert {labels["seed"] for labels in losses} == {"0"} and {labels["node"] for labels in losses} == {
        socket.gethostname()
    }
    assert {labels["stage"] for labels in losses} >= {"pretrain", "distill", "refine"}


def test_values_are_those_of_the_sweep(watched: Prometheus, folder: Path) -> None:
    by_state = {labels["state"]: values for labels, values in watched.series("ray_cast_ray_stages")}
    assert max(by_state["running"]) >= 1 and max(by_state["failed"]) == 0
    assert by_state["done"] == sorted(by_state["done"]) and by_state["done"][-1] >= 5
    ((_, saved),) = watched.series("ray_cast_ray_saved_device_seconds")
    assert saved[-1] > 0  # both rows start from one teacher
    ((_, budget),) = watched.series("ray_cast_ray_budget_device_seconds")
    assert set(budget) == {3600.0}
    waits = [value for _, values in watched.series("ray_cast_ray_data_wait_ratio") for value in values]
    assert all(0 <= value <= 1.01 for value in waits)
    labels = json.loads(next((folder / "storage/artifacts").glob("label-*/manifest.json")).read_text())
    written = watched.series("ray_cast_ray_pseudo_labels_total")
    assert labels["num_pseudo_labels"] in {values[-1] for _, values in written}


def test_a_stage_that_has_ended_is_shown_no_more(watched: Prometheus) -> None:
    pretrain = watched.series('ray_cast_ray_loss{stage="pretrain"}')
    seen = sum(len(values) for _, values in pretrain)
    assert pretrain and seen < (watched.ended - watched.began) * 0.8


def test_alerts_are_evaluated_and_silent(watched: Prometheus) -> None:
    (group,) = watched.ask("rules")["groups"]
    assert {rule["name"] for rule in group["rules"]} == set(alerts())
    assert all(rule["health"] == "ok" and rule["state"] == "inactive" for rule in group["rules"]), group
