"""Tune callbacks: TensorBoard's event files, and the guard around every tracker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

from ray import tune

from cast_ray.contracts.row_result import RowResult

HOOKS = (
    *("on_step_begin", "on_step_end", "on_trial_start", "on_trial_restore", "on_trial_save", "on_trial_result"),
    *("on_trial_complete", "on_trial_recover", "on_trial_error", "on_checkpoint", "on_experiment_end"),
)
"""What Tune calls of a callback while it runs."""


class GuardedCallback(tune.Callback):
    """A tracker's callback, switched off by its first error: in Tune's own loop any error of one ends all trials.

    Args:
        on_failure: function that is called once, with a sentence that says that the tracker is switched off and why.
    """

    def __init__(self, name: str, callback: tune.Callback, on_failure: Callable[[str], None]):
        self.name, self.callback, self.on_failure = name, callback, on_failure
        self.is_off = False

    def __reduce__(self) -> Any:
        return tune.Callback, ()  # Tune pickles its settings for a restore that is not used here

    def setup(self, *args: Any, **info: Any) -> None:
        self.callback.setup(*args, **info)

    def _call(self, hook: str, *args: Any, **info: Any) -> None:
        if self.is_off:
            return
        try:
            getattr(self.callback, hook)(*args, **info)
        except Exception as error:
            self.is_off = True
            self.on_failure(
                f"{self.name} is switched off, and the sweep continues without it: {type(error).__name__}: {error}"
            )


for _hook in HOOKS:
    setattr(GuardedCallback, _hook, partialmethod(GuardedCallback._call, _hook))


class TensorBoardCallback(tune.Callback):
    """Writes what the rows' drivers report to Tune: one folder a row, its stages' curves against their own steps.

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
        # tensorboardX imports torch where it is installed: better while the workers start than before they may.
        from tensorboardX import SummaryWriter

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


def write_finished(folder: Path, result: RowResult) -> None:
    """The event file of a row that was answered from the store."""
    writer = EventWriter(folder)
    for stage, entries in result.curves.items():
        writer.write_curve(stage, entries)
    writer.write_metrics(result.metrics)
    writer.close()
