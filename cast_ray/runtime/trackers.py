"""Experiment trackers: TensorBoard event files by default, Weights & Biases and MLflow through Ray's own callbacks.

A row's driver reports to Tune what is new in the curves of its stages (`trials.curve_report`): the newest entry as
metrics named `<stage>/<term>`, and under `curve` all entries since the last report, for the event files.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Trackers:
    """Where curves and metrics go.

    tensorboard: table -> local folder of its rows' event files; wandb: project; mlflow: tracking URI.
    """

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

    def callbacks(self) -> list[Any]:
        """Tune callbacks of the trackers that are switched on."""
        callbacks: list[Any] = []
        if self.tensorboard:
            from cast_ray.runtime.tensorboard import TensorBoardCallback

            callbacks.append(TensorBoardCallback(self.tensorboard))
        if self.wandb is not None:
            from ray.air.integrations.wandb import WandbLoggerCallback

            callbacks.append(WandbLoggerCallback(project=self.wandb, group=self.group, excludes=["curve"]))
        if self.mlflow is not None:
            from ray.air.integrations.mlflow import MLflowLoggerCallback

            callbacks.append(MLflowLoggerCallback(tracking_uri=self.mlflow, experiment_name=self.group))
        return callbacks
