"""Experiment trackers: TensorBoard event files by default, Weights & Biases and MLflow through Ray's own callbacks.

A row's driver reports to Tune what is new in the curves of its stages (`trials.curve_report`): the newest entry as
metrics named `<stage>/<term>`, and under `curve` all entries since the last report, for the event files.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
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

    def callbacks(self, on_failure: Callable[[str], None] = lambda message: None) -> list[Any]:
        """Tune callbacks of the trackers that are switched on.

        A tracker that cannot be set up (no login, no server) ends the command before anything runs; one that fails
        later is switched off, and the sweep goes on without it.

        Args:
            on_failure: is told, once, which tracker was switched off and why.
        """
        from cast_ray.runtime.callbacks import GuardedCallback, TensorBoardCallback

        callbacks: dict[str, Any] = {}
        if self.tensorboard:
            callbacks["TensorBoard"] = TensorBoardCallback(self.tensorboard)
        if self.wandb is not None:
            from ray.air.integrations.wandb import WandbLoggerCallback

            callbacks["Weights & Biases"] = WandbLoggerCallback(
                project=self.wandb, group=self.group, excludes=["curve"]
            )
        if self.mlflow is not None:
            from ray.air.integrations.mlflow import MLflowLoggerCallback

            callbacks["MLflow"] = MLflowLoggerCallback(tracking_uri=self.mlflow, experiment_name=self.group)
        return [GuardedCallback(name, callback, on_failure) for name, callback in callbacks.items()]
