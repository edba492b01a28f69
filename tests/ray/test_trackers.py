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

from cast_ray.recipe import recipe_keys
from cast_ray.runtime.sweep.trackers import Trackers
from cast_ray.runtime.sweep.wandb_runs import sync_commands

pytestmark = pytest.mark.timeout(600)

ROWS = ["losses__sup__s0", "losses__sup+semi__s0"]
# In a process of its own: the trackers' settings must stand before Ray starts, and both keep global state.
SCRIPT = """
import os, sys
import ray
from ray import tune
from cast_ray.runtime.cluster import connect
from cast_ray.recipe import build_recipe
from cast_ray.runtime.sweep.trackers import Trackers
from cast_ray.runtime.sweep.row_driver import curve_report, trial_dirname
from types import SimpleNamespace

folder, *rows = sys.argv[1:]
os.chdir(folder)
os.makedirs(folder + "/a run")
open(folder + "/a run/report.html", "w").write("the report")
open(folder + "/a run/curves.png", "w").write("a figure")

def job_of(name):
    table, row, seed = name.split("__")
    recipe = build_recipe("shapes", "smoke", {"loss.lambda_pxl": 0.25})
    row = SimpleNamespace(row=row, seed=int(seed[1:]), recipe=recipe)
    return SimpleNamespace(context=SimpleNamespace(table=table), row=row)
connect("local", 2)

def run(config):
    for first in (10, 30):
        entries = [{"step": first, "loss": 3.0, "sup/class": 1.0}, {"step": first + 10, "loss": 2.0, "sup/class": 0.5}]
        tune.report(curve_report("distill", entries))
    tune.report({"status": "done", "error": None, "student/mask_ap": 12.5})

trackers = Trackers(
    {"losses": folder + "/a run"},
    {"losses": folder + "/tensorboard"},
    "cast",
    "sqlite:///" + folder + "/mlflow.db",
    "losses-smoke",
)
callbacks = trackers.callbacks(job_of, print)
tune.Tuner(
    tune.with_resources(run, {"CPU": 0.01}),
    param_space={"row": tune.grid_search(rows)},
    tune_config=tune.TuneConfig(trial_dirname_creator=trial_dirname),
    run_config=tune.RunConfig(storage_path=folder + "/tune", callbacks=callbacks, verbose=0),
).fit()
ray.shutdown()
for _ in range(2):  # as by a second command
    trackers.finish(lambda text: print("TOLD", text))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trackers")


@pytest.fixture(scope="module", autouse=True)
def told(folder: Path) -> list[str]:
    """What the trackers say at the end."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_", "MLFLOW_"))}
    environment |= {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), *ROWS], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.removeprefix("TOLD ") for line in done.stdout.splitlines() if line.startswith("TOLD ")]


def test_event_files_have_every_step_of_every_row(folder: Path, read_events: Any) -> None:
    for row in ROWS:
        found = read_events(folder / "tensorboard" / row)
        assert found["distill/loss"] == [(10, 3.0), (20, 2.0), (30, 3.0), (40, 2.0)]
        assert found["distill/sup/class"][1] == (20, 0.5) and found["student/mask_ap"] == [(0, 12.5)]


def test_mlflow_has_a_run_for_each_row(folder: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("losses-smoke")
    runs = client.search_runs([experiment.experiment_id], filter_string="tags.`cast_ray.kind` = 'row'")
    assert {run.info.run_name for run in runs} == {"sup, seed 0", "sup+semi, seed 0"}
    for run in runs:
        assert run.info.status == "FINISHED"
        assert set(run.data.metrics) == {"distill/loss", "distill/sup/class", "student/mask_ap"}
        assert run.data.metrics["student/mask_ap"] == 12.5
        history = client.get_metric_history(run.info.run_id, "distill/loss")
        assert [(m.step, m.value) for m in history] == [(10, 3.0), (20, 2.0), (30, 3.0), (40, 2.0)]
        assert (run.data.params["table"], run.data.params["loss.lambda_pxl"]) == ("losses", "0.25")
        missing = {key for key in recipe_keys() if key not in run.data.params}
        assert not missing, missing


def test_mlflow_keeps_the_report(folder: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("losses-smoke")
    (run,) = client.search_runs([experiment.experiment_id], filter_string="tags.`cast_ray.kind` = 'report'")
    assert (run.info.run_name, run.info.status) == ("a run: report", "FINISHED")
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"report.html", "curves.png"}


def test_a_tracking_server_that_does_not_take_the_report_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr("cast_ray.runtime.sweep.mlflow_runs.log_reports", refuse)
    said: list[str] = []
    Trackers(folders={"losses": "runs/x"}, mlflow="http://tracker").finish(said.append)
    assert said == ["MLflow has not taken the report: the server is gone"]


def test_wandb_keeps_an_offline_run_of_each_row_in_the_runs_folder(folder: Path, told: list[str]) -> None:
    runs = list((folder / "a run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == len(ROWS) and list(folder.rglob("run-*.wandb")) == runs
    content = [path.read_bytes() for path in runs]
    assert all(b"distill/loss" in data and b"student/mask_ap" in data for data in content)
    assert all(any(name in data for data in content) for name in (b"sup, seed 0", b"sup+semi, seed 0"))
    assert all(b"lambda_pxl" in data for data in content)
    command = f"wandb sync '{folder}/a run/wandb'/offline-run-*"
    assert told == [f"W&B runs are kept offline; to send them: {command}"] * 2


def test_runs_that_were_sent_are_not_named_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_DIR", raising=False)
    run = tmp_path / "wandb" / "offline-run-1"
    run.mkdir(parents=True)
    assert sync_commands([str(tmp_path)]) == [f"wandb sync {tmp_path}/wandb/offline-run-*"]
    (run / "run-1.wandb.synced").touch()
    assert sync_commands([str(tmp_path)]) == []
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "mine"))
    (tmp_path / "mine" / "wandb" / "offline-run-2").mkdir(parents=True)
    assert sync_commands([str(tmp_path)]) == [f"wandb sync {tmp_path}/mine/wandb/offline-run-*"]


def test_a_tracker_that_fails_is_switched_off(tmp_path: Path) -> None:
    """Not the sweep: a full disk, a server that is gone."""
    (tmp_path / "file").write_text("where a folder should be")
    told: list[str] = []
    trackers = Trackers(tensorboard={"losses": str(tmp_path / "file")})
    (callback,) = trackers.callbacks(lambda name: None, told.append)
    trial = SimpleNamespace(config={"row": ROWS[0]})
    for _ in range(2):
        callback.on_trial_result(iteration=1, trials=[], trial=trial, result={"student/mask_ap": 1.0})
    callback.on_trial_complete(iteration=1, trials=[], trial=trial)
    assert pickle.loads(pickle.dumps(callback)) is not None  # as Tune does with its settings
    assert len(told) == 1 and told[0].startswith(
        "TensorBoard is switched off, and the sweep continues without it: NotADirectoryError"
    )


def test_a_missing_package_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--wandb: the package 'wandb' is not installed: pip install"):
        Trackers(wandb="cast").check_installed()
    with pytest.raises(ValueError, match="--mlflow"):
        Trackers(mlflow="sqlite:///x.db").check_installed()
    Trackers().check_installed()
