"""Trackers on a real Tune: what a row's driver reports arrives in event files, in W&B's offline run and in MLflow."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from cast_ray.runtime.trackers import Trackers

pytestmark = pytest.mark.timeout(600)

ROWS = ["losses__sup__s0", "losses__sup+semi__s0"]
# In a process of its own: the trackers' settings must stand before Ray starts, and both keep global state.
SCRIPT = """
import os, sys
import ray
from ray import tune
from cast_ray.runtime.cluster import connect
from cast_ray.runtime.trackers import Trackers
from cast_ray.runtime.trials import curve_report, trial_dirname

folder, *rows = sys.argv[1:]
connect("local", 2)

def run(config):
    for first in (10, 30):
        entries = [{"step": first, "loss": 3.0, "sup/class": 1.0}, {"step": first + 10, "loss": 2.0, "sup/class": 0.5}]
        tune.report(curve_report("distill", entries))
    tune.report({"status": "done", "error": None, "student/mask_ap": 12.5})

trackers = Trackers({"losses": folder + "/tensorboard"}, "cast", "sqlite:///" + folder + "/mlflow.db", "losses-smoke")
tune.Tuner(
    tune.with_resources(run, {"CPU": 0.01}),
    param_space={"row": tune.grid_search(rows)},
    tune_config=tune.TuneConfig(trial_dirname_creator=trial_dirname),
    run_config=tune.RunConfig(storage_path=folder + "/tune", callbacks=trackers.callbacks(), verbose=0),
).fit()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trackers")


@pytest.fixture(scope="module", autouse=True)
def _run(folder: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_", "MLFLOW_"))}
    environment |= {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), *ROWS], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_event_files_have_every_step_of_every_row(folder: Path, read_events: Any) -> None:
    for row in ROWS:
        found = read_events(folder / "tensorboard" / row)
        assert found["distill/loss"] == [(10, 3.0), (20, 2.0), (30, 3.0), (40, 2.0)]
        assert found["distill/sup/class"][1] == (20, 0.5) and found["student/mask_ap"] == [(0, 12.5)]


def test_mlflow_has_a_run_for_each_row(folder: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("losses-smoke")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.params["row"] for run in runs} == set(ROWS)
    for run in runs:
        assert run.info.status == "FINISHED" and run.data.metrics["student/mask_ap"] == 12.5
        assert [m.value for m in client.get_metric_history(run.info.run_id, "distill/loss")] == [2.0, 2.0]


def test_wandb_has_an_offline_run_for_each_row(folder: Path) -> None:
    runs = list(folder.rglob("offline-run-*/run-*.wandb"))
    assert len(runs) == len(ROWS)
    content = [path.read_bytes() for path in runs]
    assert all(b"distill/loss" in data and b"student/mask_ap" in data for data in content)
    assert all(any(row.encode() in data for data in content) for row in ROWS)


def test_a_tracker_that_fails_is_switched_off(tmp_path: Path) -> None:
    """Not the sweep: a full disk, a server that is gone."""
    (tmp_path / "file").write_text("where a folder should be")
    told: list[str] = []
    (callback,) = Trackers({"losses": str(tmp_path / "file")}).callbacks(told.append)
    trial = SimpleNamespace(config={"row": ROWS[0]})
    for _ in range(2):
        callback.on_trial_result(iteration=1, trials=[], trial=trial, result={"student/mask_ap": 1.0})
    callback.on_trial_complete(iteration=1, trials=[], trial=trial)
    assert pickle.loads(pickle.dumps(callback)) is not None  # as Tune does with its settings
    assert len(told) == 1 and told[0].startswith("TensorBoard is switched off, the sweep goes on: NotADirectoryError")


def test_a_missing_package_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--wandb: the package 'wandb' is not installed: pip install"):
        Trackers(wandb="cast").check_installed()
    with pytest.raises(ValueError, match="--mlflow"):
        Trackers(mlflow="sqlite:///x.db").check_installed()
    Trackers().check_installed()
