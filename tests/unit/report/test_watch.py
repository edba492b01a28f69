"""A report that follows a running sweep, from its run folder and from the store it writes to."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from report_scenes import ROWS, result, save
from rich.console import Console

from cast_ray.common.files import write_atomically
from cast_ray.plan.ablation import load_table
from cast_ray.report.run_folder import write_plan
from cast_ray.report.write import fetch_results, rebuild_report, watch_report

EXPECTED = [("losses", row, 0) for row in ROWS[:2]]


@pytest.fixture
def plan(tmp_path: Path) -> tuple[Path, Path]:
    """A run folder whose sweep has begun, and the folder in the store that its results go to."""
    run, store = tmp_path / "runs" / "x", tmp_path / "storage" / "runs" / "x"
    write_plan(run, [load_table("losses")], EXPECTED, str(store))
    return run, store


def test_the_report_follows_results_until_the_last(plan: tuple[Path, Path], wait_until: Callable[..., None]) -> None:
    run, store = plan
    output = io.StringIO()
    page = run / "report.html"
    stopped = threading.Event()
    console = Console(file=output, width=200)
    watching = threading.Thread(target=watch_report, args=(run, console, 0.1, stopped), daemon=True)
    watching.start()
    wait_until(lambda: page.is_file() and "0 of 2 results" in page.read_text(), "a page before the first result", 60)
    assert 'http-equiv="refresh"' in page.read_text()
    save(store, [result("sup")])  # a row has ended: the store has it before the run folder
    wait_until(lambda: "1 of 2 results" in page.read_text(), "a page with the first result", 60)
    (store / "losses__sup+semi__s0").mkdir()
    (store / "losses__sup+semi__s0" / "result.json").write_text('{"table": "los')  # half of a file
    wait_until(lambda: "its result cannot be read" in page.read_text(), "a word on the broken file", 60)
    assert "1 of 2 results" in page.read_text() and watching.is_alive()
    write_atomically(store / "losses__sup+semi__s0" / "result.json", json.dumps(result("sup+semi")))
    watching.join(60)
    ended_by_itself = not watching.is_alive()
    stopped.set()
    assert ended_by_itself
    assert 'http-equiv="refresh"' not in page.read_text() and "15.8" in page.read_text()
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("0 of 2 results: ") and lines[-1].startswith("2 of 2 results: ")


def test_a_watch_can_be_stopped(tmp_path: Path) -> None:
    stopped = threading.Event()
    stopped.set()
    output = io.StringIO()
    assert watch_report(tmp_path / "none", Console(file=output), 5, stopped) is None
    assert "waiting: " in output.getvalue() and "no such folder" in output.getvalue()


def test_results_are_fetched_once_and_again_when_they_change(plan: tuple[Path, Path]) -> None:
    run, store = plan
    assert fetch_results(run) == 0
    save(store, [result("sup")])
    assert fetch_results(run) == 1 and fetch_results(run) == 0
    write_atomically(store / "losses__sup__s0" / "result.json", json.dumps(result("sup", ap=99.0)))
    assert fetch_results(run) == 1
    stored = json.loads((run / "losses__sup__s0" / "result.json").read_text())
    assert stored["metrics"]["student/mask_ap"] == 99.0


def test_a_stopped_sweep_is_reported_with_what_its_store_has(plan: tuple[Path, Path]) -> None:
    run, store = plan
    save(store, [result("sup")])
    (report,) = rebuild_report(run, Console(file=io.StringIO())).reports
    assert (report.num_expected, report.num_pending) == (2, 1)
    output = io.StringIO()
    write_plan(run, [load_table("losses")], EXPECTED, str(run / "sweep.json"))
    (report,) = rebuild_report(run, Console(file=output)).reports
    assert report.num_pending == 1 and "store cannot be read, so the report holds only" in output.getvalue()


def test_a_folder_without_a_plan_has_no_store_to_ask(tmp_path: Path) -> None:
    save(tmp_path, [result("sup")])
    assert fetch_results(tmp_path) == 0
    written = watch_report(tmp_path, Console(file=io.StringIO()), 5)
    assert written is not None and written.is_complete
