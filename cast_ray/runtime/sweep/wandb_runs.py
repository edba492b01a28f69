"""Weights & Biases: one run for each row and seed, kept in the run's folder, with the whole recipe as its config."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ray.air.integrations.wandb import WandbLoggerCallback

from cast_ray.runtime.sweep.tracked_row import RowOf

OFFLINE = "offline-run-*"
"""Folders that W&B makes of runs which it could not, or should not, send at once."""


class WandbRuns(WandbLoggerCallback):
    """Ray's own callback, which alone would name runs after Tune's trials and keep them in Tune's temporary folder.

    Args:
        row_of: name of a trial -> its row.
        options: arguments of `WandbLoggerCallback`.
    """

    def __init__(self, row_of: RowOf, **options: Any):
        super().__init__(excludes=["curve"], **options)
        self.row_of = row_of

    def log_trial_start(self, trial: Any) -> None:
        row = self.row_of(trial.config["row"])
        self.kwargs = {"name": row.name, "config": {"table": row.table, "row": row.row, **row.recipe}}
        if not os.environ.get("WANDB_DIR"):  # which the user has chosen
            Path(row.folder).mkdir(parents=True, exist_ok=True)
            self.kwargs["dir"] = str(Path(row.folder).resolve())
        super().log_trial_start(trial)


def sync_commands(folders: Iterable[str]) -> list[str]:
    """The shell commands that send what lies offline in these run folders, and was not sent before."""
    own = os.environ.get("WANDB_DIR")
    commands = []
    for folder in dict.fromkeys([own] if own else folders):
        place = Path(folder) / "wandb"
        if any(not list(run.glob("*.synced")) for run in place.glob(OFFLINE)):
            commands.append(f"wandb sync {shlex.quote(str(place))}/{OFFLINE}")
    return commands
