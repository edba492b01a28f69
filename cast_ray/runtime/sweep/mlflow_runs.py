"""MLflow: one run for each row and seed with its whole recipe, and one that holds the report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient
from ray.air.integrations.mlflow import MLflowLoggerCallback

from cast_ray.runtime.sweep.tracked_row import RowOf

MAX_BATCH = 100
"""Parameters that a server takes in one request."""
MAX_VALUE = 500
"""Letters of a parameter that every server takes."""
KIND, TABLE, FOLDER = "cast_ray.kind", "cast_ray.table", "cast_ray.folder"
"""Tags of a run: whether it is a row's or a report's; a row's table; the folder that a report is of."""
REPORT_FILES = ("report.*", "*.png")

T = TypeVar("T")


class MlflowRuns(MLflowLoggerCallback):
    """Ray's own callback, which alone would know no parameter but the trial's name and log Tune's bookkeeping.

    Args:
        row_of: name of a trial -> its row.
        options: arguments of `MLflowLoggerCallback`.
    """

    def __init__(self, row_of: RowOf, **options: Any):
        super().__init__(**options)
        self.row_of = row_of

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.tracking_uri)

    def log_trial_start(self, trial: Any) -> None:
        if trial in self._trial_runs:  # its driver was started again
            return
        row = self.row_of(trial.config["row"])
        run = self.mlflow_util.start_run(run_name=row.name, tags={TABLE: row.table, KIND: "row"})
        self._trial_runs[trial] = run.info.run_id
        facts = {"table": row.table, "row": row.row, **_flatten(row.recipe)}
        params = [Param(key, str(value)[:MAX_VALUE]) for key, value in facts.items()]
        for batch in _batches(params):
            self.client.log_batch(run.info.run_id, params=batch)

    def log_trial_result(self, iteration: int, trial: Any, result: Mapping[str, Any]) -> None:
        now = int(1000 * time.time())
        if "curve" in result:  # every entry at its own step
            entries = [
                (f"{result['stage']}/{name}", value, entry["step"])
                for entry in result["curve"]
                for name, value in entry.items()
                if name != "step"
            ]
        else:  # the names of our metrics say of which model they are; those without are Tune's
            entries = [(name, value, 0) for name, value in result.items() if "/" in name]
        metrics = [Metric(name, float(value), now, step) for name, value, step in entries if _is_number(value)]
        for batch in _batches(metrics):
            self.client.log_batch(self._trial_runs[trial], metrics=batch)

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        if trial in self._trial_runs:
            self.client.set_terminated(self._trial_runs[trial], "FAILED" if failed else "FINISHED")


def log_reports(tracking_uri: str, experiment: str, folders: Iterable[str]) -> None:
    """Puts the report of each run folder, with its figures, into an MLflow run `<folder>: report`.

    There is one such run for each folder: a later command writes over what an earlier one left there.

    Raises:
        mlflow.exceptions.MlflowException, OSError: the server does not take them.
    """
    client = MlflowClient(tracking_uri=tracking_uri)
    known = client.get_experiment_by_name(experiment)
    place = known.experiment_id if known is not None else client.create_experiment(experiment)
    before = client.search_runs([place], filter_string=f"tags.`{KIND}` = 'report'")
    runs = {run.data.tags.get(FOLDER): run.info.run_id for run in before}
    for folder in dict.fromkeys(map(Path, folders)):
        files = list(_report_files(folder))
        if not files:
            continue
        name = folder.name
        if name not in runs:
            made = client.create_run(place, run_name=f"{name}: report", tags={FOLDER: name, KIND: "report"})
            runs[name] = made.info.run_id
        for file in files:
            client.log_artifact(runs[name], str(file))
        client.set_terminated(runs[name])


def _report_files(folder: Path) -> Iterable[Path]:
    if (folder / "report.html").is_file():
        for pattern in REPORT_FILES:
            yield from sorted(folder.glob(pattern))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {prefix + key: value}
    return flat


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[i : i + MAX_BATCH] for i in range(0, len(items), MAX_BATCH))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
