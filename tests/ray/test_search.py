"""A search on a real Ray: trials share stages, a kill loses nothing, more trials extend it, its best is a table."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from cast_ray.runtime.search.study import open_storage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NAME = "mine-search-shapes-smoke"
SETTINGS = [
    *(f"stages.{stage}.steps={steps}" for stage, steps in (("pretrain", 4), ("adapt", 3), ("refine", 2))),
    "stages.distill.steps=6",
    *(f"stages.{stage}.batch_labelled=2" for stage in ("pretrain", "adapt", "distill", "refine")),
    "data.shapes.num_source=8",
    "data.shapes.num_train=16",
    "data.shapes.num_val=6",
    "student.num_layers=1",
    "teacher.num_layers=1",
    "loss.lambda_pxl=0",
    "loss.lambda_semi=0",
]
SPEC = {
    "title": "Learning rate and layers of the student",
    "objectives": {"student/mask_ap": "max", "student/latency_ms": "min"},
    "samplers": ["random"],
    "num_trials": 2,
    "space": {
        "stages.distill.lr": {"low": 0.0001, "high": 0.01, "log": True},
        "student.num_queries": {"low": 4, "high": 8},
    },
    "start": [{"stages.distill.lr": 0.002, "student.num_queries": 8}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


def study(folder: Path) -> optuna.Study:
    storage = open_storage(str(folder / "runs" / NAME / "study.journal"))
    return optuna.load_study(study_name=f"{NAME}-random", storage=storage)


def states(folder: Path) -> Counter[str]:
    return Counter(t.user_attrs.get("status", t.state.name) for t in study(folder).trials)


def test_a_search_survives_its_end_is_extended_and_leads_to_a_table(
    folder: Path, start_sweep: Any, wait_until: Any
) -> None:
    (folder / "mine.yaml").write_text(yaml.safe_dump(SPEC, sort_keys=False))
    settings = [part for setting in SETTINGS for part in ("--set", setting)]

    def start(*arguments: str) -> Any:
        mine = str(folder / "mine.yaml")
        return start_sweep(folder, *settings, *arguments, tables=(mine,), script="sweeps/search.py")

    # Killed as soon as something is stored: its trials stay RUNNING in the study.
    killed = start()
    artifacts = folder / "storage/artifacts"
    wait_until(lambda: list(artifacts.glob("train-*/manifest.json")) or killed.process.poll() is not None, "no stage")
    assert killed.process.poll() is None, killed.output
    killed.process.send_signal(signal.SIGKILL)
    wait_until(lambda: not killed.processes(), "Ray outlived the command that started it", 180)
    lost = study(folder).get_trials(states=(TrialState.RUNNING,))
    assert lost
    before = {path.parent.name for path in artifacts.glob("*/manifest.json")}

    again = start()
    assert again.finish() == 0, again.output
    assert f"{len(lost)} trials of {NAME}-random were interrupted and are tried again" in again.output
    assert states(folder)["done"] == 2 and not study(folder).get_trials(states=(TrialState.RUNNING,))
    done = study(folder).get_trials(states=(TrialState.COMPLETE,))
    assert SPEC["start"][0] in [t.params for t in done]  # type: ignore[index]
    assert {json.dumps(t.params) for t in lost} <= {json.dumps(t.params) for t in done}
    assert all(t.values[1] > 0 and t.user_attrs["device_s"] > 0 for t in done)

    # Every stage is in the store once; what is shared was run by one trial, what was stored before by none.
    found = [json.loads(path.read_text()) for path in (folder / "storage/runs" / NAME).glob("*/result.json")]
    ran = Counter(s["fingerprint"] for result in found for s in result["stages"] if not s["reused"])
    assert len(found) == 2 and set(ran.values()) == {1}
    assert not {key.rpartition("-")[2] for key in before} & set(ran)
    assert sum(s["name"] == "pretrain" for result in found for s in result["stages"]) == 2

    more = start("--trials", "3")
    assert more.finish() == 0, more.output
    assert (
        states(folder)["done"] == 3
        and "| random | 3 | 3 | 0 | 0 |" in (folder / "runs" / NAME / "report.md").read_text()
    )
    assert (folder / "runs" / NAME / "pareto.png").is_file()
    html = (folder / "runs" / NAME / "report.html").read_text()
    assert "3 of 3 trials" in html and "preset shapes, scale smoke" in html and "num_queries" in html

    finished = start("--trials", "3")
    assert finished.finish() == 0, finished.output
    assert "Ray " not in finished.output and states(folder)["done"] == 3

    best = str(folder / "runs" / NAME / "best.yaml")
    table = start_sweep(folder, *settings, "--dry-run", tables=(best,))
    assert table.finish() == 0, table.output
    (stages,) = [line for line in table.output.splitlines() if line.startswith("  stages ")]
    unique, stored = int(stages.split()[1]), int(stages.split()[5])
    assert 0 < stored < unique  # of the row `base` the student is new
