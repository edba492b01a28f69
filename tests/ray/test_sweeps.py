"""Sweeps on a real Ray: limits, failed rows, extension, several tables, two sweeps on one store at once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from cast_ray.report.write import write_report

pytestmark = pytest.mark.timeout(1800)

SETTINGS = [
    *(f"stages.{stage}.steps={steps}" for stage, steps in (("pretrain", 4), ("adapt", 3), ("refine", 2))),
    "stages.distill.steps=6",
    *(f"stages.{stage}.batch_labelled=2" for stage in ("pretrain", "adapt", "distill", "refine")),
    "data.shapes.num_source=8",
    "data.shapes.num_train=16",
    "data.shapes.num_val=6",
    "student.num_layers=1",
    "teacher.num_layers=1",
]
ARGUMENTS = [part for setting in SETTINGS for part in ("--set", setting)]
SUPERVISED = {"loss.lambda_semi": 0, "loss.lambda_pxl": 0}


def write_table(folder: Path, name: str, rows: dict[str, dict[str, Any]]) -> str:
    spec = {"title": name, "metric": "final/mask_ap", "baseline": next(iter(rows)), "rows": rows}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    return str(folder / f"{name}.yaml")


def results(folder: Path, out: str = "runs") -> dict[str, dict[str, Any]]:
    """Name of the row's folder -> its result."""
    return {p.parent.name: json.loads(p.read_text()) for p in (folder / out).glob("*/*/result.json")}


def committed(folder: Path) -> dict[str, float]:
    manifests = [json.loads(p.read_text()) for p in (folder / "storage/artifacts").glob("*/manifest.json")]
    return {m["fingerprint"]: m["committed"] for m in manifests}


def ran(*found: dict[str, dict[str, Any]]) -> Counter[str]:
    """How often each stage was run, over all rows of some runs."""
    stages = [s for results_ in found for result in results_.values() for s in result["stages"]]
    return Counter(s["fingerprint"] for s in stages if not s["reused"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweeps")


@pytest.mark.slow
def test_limits_failures_and_extension(folder: Path, start_sweep: Any, read_events: Any) -> None:
    rows: dict[str, dict[str, Any]] = {
        "good": SUPERVISED,
        "bad": {**SUPERVISED, "stages.distill.lr": 1e30, "stages.distill.clip_norm": 1e30},
    }
    mine = write_table(folder, "mine", rows)

    # A budget that the start of the first worker group uses up.
    stopped = start_sweep(folder, *ARGUMENTS, "--budget-hours", "0.0001", tables=(mine,))
    assert stopped.finish() == 3, stopped.output
    assert "the budget of 0.0001 device-hours is spent" in stopped.output and "Left: 2 rows" in stopped.output
    assert results(folder) == {}

    # One row fails, and the other is done.
    first = start_sweep(folder, *ARGUMENTS, tables=(mine,))
    assert first.finish() == 1, first.output
    found = results(folder)
    good, bad = found["mine__good__s0"], found["mine__bad__s0"]
    assert good["status"] == "done" and bad["status"] == "failed"
    assert bad["error"].startswith("distill: ") and "finite" in bad["error"]
    assert "distill" in Path(bad["log"]).read_text() and "FAILED" in first.output
    assert set(ran(found).values()) == {1}
    for row, stages in (("good", ("pretrain", "adapt", "distill", "refine")), ("bad", ("pretrain", "adapt"))):
        tags = read_events(folder / "runs/mine-shapes-smoke/tensorboard" / f"mine__{row}__s0")
        assert all(tags[f"{stage}/loss"] for stage in stages), (row, tags)
        assert [step for step, _ in tags["adapt/loss"]] == [3] and ("final/mask_ap" in tags) == (row == "good")

    # The failed row is tried again, the good one is not; a seed and a table more add theirs only.
    before = committed(folder)
    other = write_table(folder, "other", {"same": SUPERVISED, "longer": SUPERVISED | {"stages.refine.steps": 4}})
    second = start_sweep(
        folder, *ARGUMENTS, "--seeds", "0", "1", "--rows", "good", "bad", "same", "longer", tables=(mine, other)
    )
    assert second.finish() == 1, second.output
    found = results(folder)
    assert set(found) == {
        *("mine__bad__s0", "mine__bad__s1", "mine__good__s0", "mine__good__s1"),
        *("other__same__s0", "other__same__s1", "other__longer__s0", "other__longer__s1"),
    }
    assert found["mine__good__s0"] == good
    assert found["mine__bad__s0"]["status"] == found["mine__bad__s1"]["status"] == "failed"
    assert found["mine__bad__s0"]["started"] > bad["started"]
    after = committed(folder)
    assert {f: after[f] for f in before} == before
    new = {f for name, result in found.items() for f in {s["fingerprint"] for s in result["stages"]} - set(before)}
    assert new == set(after) - set(before)
    last = {name: r for name, r in found.items() if name not in ("mine__good__s0", "mine__bad__s0")}
    assert set(ran(last)) == new and set(ran(last).values()) == {1}


@pytest.mark.slow
def test_two_sweeps_on_one_store_share_their_stages(tmp_path: Path, start_sweep: Any) -> None:
    """Two commands, each with a Ray of its own, started together: no stage is run twice, none is read half-written."""
    rows = {"short": SUPERVISED, "long": SUPERVISED | {"stages.refine.steps": 4}, "slow": {"loss.lambda_semi": 0}}
    tables = [write_table(tmp_path, name, rows) for name in ("here", "there")]
    sweeps = [start_sweep(tmp_path, *ARGUMENTS, tables=(table,), out=Path(table).stem) for table in tables]
    for sweep in sweeps:
        assert sweep.finish() == 0, sweep.output
    found = [results(tmp_path, name) for name in ("here", "there")]
    assert [len(results_) for results_ in found] == [3, 3]
    everything = {s["fingerprint"] for results_ in found for r in results_.values() for s in r["stages"]}
    assert set(committed(tmp_path)) >= everything
    assert set(ran(*found)) == everything and set(ran(*found).values()) == {1}
    for row in rows:
        assert found[0][f"here__{row}__s0"]["metrics"] == found[1][f"there__{row}__s0"]["metrics"]
    assert not list((tmp_path / "storage/claims").rglob("*.json")) and not list(
        (tmp_path / "storage/claims/stages").iterdir()
    )


@pytest.mark.slow
def test_seeds_are_added_until_rows_are_decided(tmp_path: Path, start_sweep: Any) -> None:
    """First the seeds that a decision takes, then one more; stages stay shared, and the report needs no store."""
    table = write_table(tmp_path, "open", {"base": SUPERVISED, "longer": SUPERVISED | {"stages.refine.steps": 4}})
    arguments = (*ARGUMENTS, "--until", "decided", "--budget-hours", "1", "--max-seeds", "4", "--effect", "0.0001")
    sweep = start_sweep(tmp_path, *arguments, tables=(table,))
    code = sweep.finish()
    found = results(tmp_path)
    seeds = {result["seed"] for result in found.values()}
    assert seeds >= {0, 1, 2} and all(result["status"] == "done" for result in found.values()), sweep.output
    assert set(ran(found).values()) == {1}
    assert sweep.output.count("started here") <= 1 + ("seed 3" in sweep.output)
    run = tmp_path / "runs/open-shapes-smoke"
    assert json.loads((run / "sweep.json").read_text())["effects"] == {"open": 0.0001}
    (decision,) = json.loads((run / "report.json").read_text())["tables"][0]["decisions"]
    assert (decision["row"], decision["num_seeds"]) == ("longer", len(seeds))
    # The same command has nothing to run, and says the same; so does the report without the store.
    (tmp_path / "storage").rename(tmp_path / "elsewhere")
    before = (run / "report.json").read_bytes()
    assert write_report(run).files["json"].read_bytes() == before
    (tmp_path / "elsewhere").rename(tmp_path / "storage")
    again = start_sweep(tmp_path, *arguments, tables=(table,))
    assert again.finish() == code == (3 if decision["answer"] == "undecided" else 0), again.output
    assert "started here" not in again.output and results(tmp_path) == found
