"""Experiment trackers: TensorBoard event files by default, Weights & Biases and MLflow through Ray's own callbacks.

A row's driver reports to Tune what is new in the curves of its stages (`trials.curve_report`): the newest entry as
metrics named `<stage>/<term>`, and under `curve` all entries since the last report, for the event files.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

HOOKS = (
    *("on_step_begin", "on_step_end", "on_trial_start", "on_trial_restore", "on_trial_save", "on_trial_result"),
    *("on_trial_complete", "on_trial_recover", "on_trial_error", "on_checkpoint", "on_experiment_end"),
)
"""What Tune calls of a callback while it runs."""


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
        callbacks: dict[str, Any] = {}
        if self.tensorboard:
            from cast_ray.runtime.tensorboard import TensorBoardCallback

            callbacks["TensorBoard"] = TensorBoardCallback(self.tensorboard)
        if self.wandb is not None:
            from ray.air.integrations.wandb import WandbLoggerCallback

            callbacks["Weights & Biases"] = WandbLoggerCallback(
                project=self.wandb, group=self.group, excludes=["curve"]
            )
        if self.mlflow is not None:
            from ray.air.integrations.mlflow import MLflowLoggerCallback

            callbacks["MLflow"] = MLflowLoggerCallback(tracking_uri=self.mlflow, experiment_name=self.group)
        return [_guarded(name, callback, on_failure) for name, callback in callbacks.items()]


def _guarded(name: str, callback: Any, on_failure: Callable[[str], None]) -> Any:
    """The callback, switched off by its first error: in Tune's own loop any error of a callback ends all trials."""
    failed = False

    def guard(hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal failed
            if failed:
                return None
            try:
                return hook(*args, **kwargs)
            except Exception as error:
                failed = True
                on_failure(f"{name} is switched off, the sweep goes on: {type(error).__name__}: {error}")
                return None

        return call

    for hook in HOOKS:
        if hasattr(callback, hook):
            setattr(callback, hook, guard(getattr(callback, hook)))
    return callback
