"""Device-hours, their cost and latencies are told by the type of the devices, and never mixed without a word."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from report_scenes import result, save
from rich.console import Console

from cast_ray.cli import report as report_command
from cast_ray.contracts.compute_node import UNKNOWN_DEVICE
from cast_ray.plan.prices import ANY, Prices
from cast_ray.report.content import Report
from cast_ray.report.metrics import is_lower_better, label_of
from cast_ray.report.run_folder import read_plan, write_plan
from cast_ray.report.write import rebuild_report

A10G = {"node": "gpu_a10g", "gpu": "NVIDIA A10G", "gpu_driver": "550.54", "cpu": "AMD EPYC"}
L4 = A10G | {"node": "gpu_l4", "gpu": "NVIDIA L4"}
LATENCY = "student/latency_ms"


def on(computed: dict[str, dict[str, Any]], row: str, **changes: Any) -> dict[str, Any]:
    """A row whose stages were computed by these devices, by the stages' names."""
    made = result(row, **changes)
    for stage in made["stages"]:
        if stage["name"] in computed:
            stage["computed_on"] = [computed[stage["name"]]]
    return made


def two_devices(folder: Path, **changes: Any) -> Path:
    """The teacher on an L4, the students on an A10G; each stage took 72 s."""
    split = {"pretrain": L4, "label": L4, "distill": A10G}
    hours = {"device_hours_by_type": {"NVIDIA L4": 0.04, "NVIDIA A10G": 0.02}, "device_hours": 0.06}
    return save(folder, [on(split, "sup", **hours, **changes), on(split, "sup+semi")])


def report_of(run: Path, prices: Prices | None = None) -> Report:
    (report,) = rebuild_report(run, Console(file=io.StringIO()), prices).reports
    return report


def lines_of(run: Path, first: str) -> list[list[str]]:
    """Cells of the lines of report.md whose first cell is this."""
    lines = [line.strip("| ").split(" | ") for line in (run / "report.md").read_text().splitlines() if "|" in line]
    return [cells for cells in lines if cells[0] == first]


def test_hours_of_unlike_devices_are_not_added(tmp_path: Path) -> None:
    run = two_devices(tmp_path)
    report = report_of(run)
    assert {d: (round(h.scratch, 6), round(h.unique, 6)) for d, h in report.device_hours.items()} == {
        "NVIDIA L4": (0.08, 0.04),  # both rows need both
        "NVIDIA A10G": (0.04, 0.04),
    }
    assert report.rows[0].device_hours == {"NVIDIA L4": 0.04, "NVIDIA A10G": 0.02}
    page = (run / "report.md").read_text()
    assert "Hours of unlike devices are not added up." in page
    assert lines_of(run, "NVIDIA L4") == [["NVIDIA L4", "2", "0.08", "0.04", "50", "0.04"]]
    assert "0.04 NVIDIA L4 + 0.02 NVIDIA A10G" in page  # in the line of the result
    (pretrain,) = lines_of(run, "pretrain")
    assert pretrain[:3] == ["pretrain", "all", "NVIDIA L4"]


def test_results_of_one_device_look_as_before(tmp_path: Path) -> None:
    run = save(tmp_path, [result("sup"), result("sup+semi")])
    report = report_of(run)
    assert list(report.device_hours) == [UNKNOWN_DEVICE]  # an early version did not say it
    assert report.rows[0].device_hours == {UNKNOWN_DEVICE: 0.1}
    page = (run / "report.md").read_text()
    assert "unlike devices" not in page and "computed on" not in page


def test_each_device_has_its_price(tmp_path: Path) -> None:
    run = two_devices(tmp_path)
    report_of(run, Prices({"l4": 100.0, "A10G": 1000.0}))
    assert [line[-3:] for line in lines_of(run, "NVIDIA L4")] == [["100.00", "8.00", "4.00"]]
    assert [line[-3:] for line in lines_of(run, "NVIDIA A10G")] == [["1,000.00", "40.00", "40.00"]]
    assert [line[-2:] for line in lines_of(run, "all with a price")] == [["48.00", "44.00"]]
    report_of(run, Prices({"L4": 100.0}))
    assert "No price was named for NVIDIA A10G: the cost leaves their hours out." in (run / "report.md").read_text()
    assert not lines_of(run, "all with a price")


def test_the_prices_of_a_sweep_are_those_of_its_report(tmp_path: Path) -> None:
    run = two_devices(tmp_path)
    write_plan(run, [], [], prices=Prices({ANY: 100.0}))
    write_plan(run, [], [])  # as at the end of the sweep
    assert read_plan(run).prices == Prices({ANY: 100.0})
    assert report_of(run).prices.of("NVIDIA L4") == 100.0
    assert [line[-2:] for line in lines_of(run, "all with a price")] == [["12.00", "8.00"]]


def test_the_command_takes_prices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = two_devices(tmp_path)
    assert report_command.main([str(run), "--price-per-gpu-hour", "L4=100", "A10G=1000"]) == 0
    assert [line[-2:] for line in lines_of(run, "all with a price")] == [["48.00", "44.00"]]
    capsys.readouterr()
    assert report_command.main([str(run), "--price-per-gpu-hour", "L4=1", "l4=2"]) == 2
    assert "expected one price for each model, got L4=1 l4=2" in capsys.readouterr().err


def test_latencies_of_unlike_devices_stand_apart(tmp_path: Path) -> None:
    def measured(row: str, seed: int, ms: float, node: dict[str, Any]) -> dict[str, Any]:
        made = result(row, seed)
        return made | {"metrics": made["metrics"] | {LATENCY: ms}, "measured_on": {LATENCY: node}}

    results = [measured("sup", 0, 7.0, L4), measured("sup", 1, 3.0, A10G), measured("sup+semi", 0, 8.0, L4)]
    run = save(tmp_path / "mixed", results)
    sup, semi = report_of(run).rows[:2]
    cells = {name: cell.mean for name, cell in sup.cells.items() if name.startswith(LATENCY)}
    assert cells == {f"{LATENCY} on NVIDIA L4": 7.0, f"{LATENCY} on NVIDIA A10G": 3.0}
    assert [name for name in semi.cells if name.startswith(LATENCY)] == [f"{LATENCY} on NVIDIA L4"]
    assert "student latency (ms) on NVIDIA L4" in (run / "report.md").read_text()
    assert json.loads((run / "report.json").read_text())["tables"]
    alike = save(tmp_path / "alike", [measured("sup", 0, 7.0, L4), measured("sup", 1, 9.0, L4 | {"node": "other"})])
    assert report_of(alike).rows[0].cells[LATENCY].mean == 8.0


def test_a_metric_of_one_device_keeps_its_words() -> None:
    name = f"{LATENCY} on NVIDIA L4"
    assert label_of(name) == "student latency (ms) on NVIDIA L4" and is_lower_better(name)
    assert label_of("student/per_class/dog on sofa") == "student AP of dog on sofa"
