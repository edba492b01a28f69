"""TensorBoard event files: one folder a row, its stages' curves against their own steps, its metrics at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from tensorboardX import SummaryWriter


class TensorBoardCallback(tune.Callback):
    """Writes what the rows' drivers report to Tune.

    Args:
        folders: table -> folder of its rows.
    """

    def __init__(self, folders: Mapping[str, str]):
        self.folders = folders
        self.open: dict[str, EventWriter] = {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any) -> None:
        row = trial.config["row"]
        if row not in self.open:
            table = next(table for table in self.folders if row.startswith(f"{table}__"))
            self.open[row] = EventWriter(Path(self.folders[table]) / row)
        if "curve" in result:
            self.open[row].write_curve(result["stage"], result["curve"])
        else:
            self.open[row].write_metrics(result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._close(trial)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._close(trial)

    def _close(self, trial: Any) -> None:
        if (writer := self.open.pop(trial.config["row"], None)) is not None:
            writer.close()


class EventWriter:
    """One row's TensorBoard event file."""

    def __init__(self, folder: Path):
        self.writer = SummaryWriter(str(folder), flush_secs=10)

    def write_curve(self, stage: str, entries: Sequence[Mapping[str, Any]]) -> None:
        for entry in entries:
            for name, value in entry.items():
                if name != "step" and isinstance(value, int | float):
                    self.writer.add_scalar(f"{stage}/{name}", value, entry["step"])

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if "/" in name and isinstance(value, int | float):
                self.writer.add_scalar(name, value, 0)

    def close(self) -> None:
        self.writer.close()


def write_finished(folder: Path, result: Mapping[str, Any]) -> None:
    """The event file of a row that was answered from the store."""
    writer = EventWriter(folder)
    for stage, entries in (result.get("curves") or {}).items():
        writer.write_curve(stage, entries)
    writer.write_metrics(result["metrics"])
    writer.close()
