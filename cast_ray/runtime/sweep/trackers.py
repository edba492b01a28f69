"""Experiment trackers: TensorBoard event files by default, Weights & Biases and MLflow through Ray's own callbacks.

A row's driver reports to Tune what is new in the curves of its stages (`row_driver.curve_report`): the newest entry as
metrics named `<stage>/<term>`, and under `curve` all entries since the last report, for the event files.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cast_ray.runtime.sweep.tracked_row import TrackedRow

TENSORBOARD = "tensorboard"
"""Folder of the event files inside a run's folder."""


@dataclass(frozen=True)
class Trackers:
    """Which trackers get the curves and metrics of a run.

    folders: table -> folder of its run; tensorboard: table -> local folder of its rows' event files; wandb: project;
    mlflow: tracking URI.
    """

    folders: Mapping[str, str] = field(default_factory=dict)
    tensorboard: Mapping[str, str] = field(default_factory=dict)
    wandb: str | None = None
    mlflow: str | None = None
    group: str = "cast_ray"
    """Name of the sweep: W&B's group, MLflow's experiment."""

    def check_installed(self) -> None:
        """Raises ValueError, before anything runs, when a chosen tracker's package is missing."""
        for flag, wanted, package in (("--wandb", self.wandb, "wandb"), ("--mlflow", self.mlflow, "mlflow")):
            if wanted is not None and importlib.util.find_spec(package) is None:
                raise ValueError(f"{flag}: the package {package!r} is not installed: pip install 'cast_ray[trackers]'")

    def callbacks(self, job_of: Callable[[str], Any], on_failure: Callable[[str], None]) -> list[Any]:
        """Tune callbacks of the trackers that are switched on.

        A tracker that cannot be set up (no login, no server) ends the command before anything runs; one that fails
        later is switched off, and the sweep continues without it.

        Args:
            job_of: name of a trial -> its `row_driver.Job`.
            on_failure: function that is called once, with a sentence that says which tracker was switched off and why.
        """
        from cast_ray.runtime.sweep.callbacks import GuardedCallback, TensorBoardCallback

        def row_of(name: str) -> TrackedRow:
            job = job_of(name)
            recipe, table = job.row.recipe.model_dump(mode="json"), job.context.table
            return TrackedRow(table, job.row.row, job.row.seed, recipe, self.folders.get(table, "."))

        callbacks: dict[str, Any] = {}
        if self.tensorboard:
            callbacks["TensorBoard"] = TensorBoardCallback(self.tensorboard)
        if self.wandb is not None:
            from cast_ray.runtime.sweep.wandb_runs import WandbRuns

            callbacks["Weights & Biases"] = WandbRuns(row_of, project=self.wandb, group=self.group)
        if self.mlflow is not None:
            from cast_ray.runtime.sweep.mlflow_runs import MlflowRuns

            callbacks["MLflow"] = MlflowRuns(row_of, tracking_uri=self.mlflow, experiment_name=self.group)
        return [GuardedCallback(name, callback, on_failure) for name, callback in callbacks.items()]

    def finish(self, tell: Callable[[str], None]) -> None:
        """Hands the written reports to MLflow, and says how to send what W&B has kept on this machine."""
        if self.mlflow is not None:
            from mlflow.exceptions import MlflowException

            from cast_ray.runtime.sweep.mlflow_runs import log_reports

            try:
                log_reports(self.mlflow, self.group, self.folders.values())
            except (MlflowException, OSError) as error:
                tell(f"MLflow has not taken the report: {error}")
        if self.wandb is not None:
            from cast_ray.runtime.sweep.wandb_runs import sync_commands

            for command in sync_commands(self.folders.values()):
                tell(f"W&B runs are kept offline; to send them: {command}")
