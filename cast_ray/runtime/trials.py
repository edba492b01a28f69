"""Ray Tune: every row and seed is a trial whose driver walks the row's stages, holding no training resources."""

from __future__ import annotations

import threading
import time
import traceback
from typing import Any

import numpy as np
import ray
from ray import tune

from cast_ray.runtime.audit import audit_labels
from cast_ray.runtime.broker import HEARTBEAT_S, Need, broker_for
from cast_ray.runtime.label_splits import stored_split
from cast_ray.runtime.labelling import LabelJob, label_images
from cast_ray.runtime.results import SweepContext, assemble_result, row_name
from cast_ray.runtime.streams import Images
from cast_ray.runtime.workers import Segment, run_segment
from cast_ray.stages.graph import RowPlan, Stage

DRIVER_CPUS = 0.01
"""Of a row's driver, which only waits; Tune refuses 0."""


def run_trials(context: SweepContext, rows: list[RowPlan], max_drivers: int) -> None:
    """Runs all rows through Tune; a row that fails leaves its reason in its result.json and the others go on."""
    by_name = {row_name(context.table, row): row for row in rows}
    trainable = tune.with_resources(tune.with_parameters(_run_row, context=context, rows=by_name), {"CPU": DRIVER_CPUS})
    tuner = tune.Tuner(
        trainable,
        param_space={"row": tune.grid_search(list(by_name))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=max_drivers, reuse_actors=True, trial_dirname_creator=_trial_dirname
        ),
        run_config=tune.RunConfig(
            name=f"{context.name}-{int(time.time())}", storage_path=context.store.uri("tune"), verbose=0
        ),
    )
    tuner.fit()


def _trial_dirname(trial: Any) -> str:
    return str(trial.config["row"])


def _run_row(config: dict[str, Any], context: SweepContext, rows: dict[str, RowPlan]) -> None:
    """Driver of one trial: claims, runs and commits stages until the row has all of them, then writes its result."""
    name = config["row"]
    row = rows[name]
    began, started = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    driver = _RowDriver(context, row, name)
    error, log = None, None
    try:
        driver.run()
    except Exception as reason:
        error = _one_line(reason)
        log = driver.write_log(traceback.format_exc())
    finally:
        driver.close()
    outcome = {"status": "failed" if error else "done", "error": error, "log": log, "started": started}
    result = assemble_result(context, row, driver.ran) | outcome | {"seconds": time.monotonic() - began}
    context.store.write_json(context.result_path(row), result)
    tune.report({"status": result["status"], **result["metrics"]})


class _RowDriver:
    def __init__(self, context: SweepContext, row: RowPlan, name: str):
        self.context, self.row, self.name = context, row, name
        self.store = context.store
        self.broker = broker_for(self.store.storage, context.slots, set())
        self.ran: set[str] = set()
        self.stopped = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self.stopped.wait(HEARTBEAT_S):
            self.broker.heartbeat.remote(self.name)

    def close(self) -> None:
        self.stopped.set()
        ray.get(self.broker.release.remote(self.name))

    def run(self) -> None:
        stages = {s.fingerprint: s for s in self.row.stages}
        while stages:
            needs = [self._need(stage) for stage in stages.values()]
            answer = ray.get(self.broker.claim.remote(self.name, needs))
            for fingerprint in answer["done"]:
                stages.pop(fingerprint)
            segment = [stages[f] for f in answer["run"]]
            if not segment:
                continue
            if self._alone(segment[0]):
                self._label(segment[0])
            else:
                self._train(segment)
            self.ran.update(s.fingerprint for s in segment)
            ray.get(self.broker.settle.remote(self.name))

    def _alone(self, stage: Stage) -> bool:
        return stage.kind == "label" and self.row.recipe.runtime.num_labellers > 0

    def _need(self, stage: Stage) -> Need:
        return Need(stage.fingerprint, stage.kind, tuple(stage.parents.values()), stage.steps, self._alone(stage))

    def _train(self, stages: list[Stage]) -> None:
        segment = Segment(
            owner=self.name,
            stages=stages,
            recipe=self.row.recipe,
            store=self.store,
            broker=self.broker,
            categories=self.context.categories,
            images={s.name: self._images(s) for s in stages if s.kind != "evaluate"},
            val=self._table("val.parquet"),
            num_val=self.context.dataset["num_val"],
            requested=time.time(),
        )
        run_segment(segment, f"{self.name}-{stages[0].fingerprint[:8]}")

    def _label(self, stage: Stage) -> None:
        began = time.monotonic()
        recipe, images = self.row.recipe, self._images(stage)
        job = LabelJob(self.store, stage, images, self.broker, self.name, recipe.data.max_bad_fraction)
        facts = label_images(job, recipe.runtime)
        audit_labels(self.store, stage, images, recipe.runtime)
        facts |= {"stage_seconds": time.monotonic() - began, "num_workers": recipe.runtime.num_labellers}
        self.store.commit(stage, facts)
        job.forget_blocks()
        ray.get(self.broker.finish.remote(stage.fingerprint))

    def _table(self, *names: str) -> ray.ObjectRef:
        return ray.get(self.broker.table.remote(self.store, self.context.dataset_key, names))[0]

    def _images(self, stage: Stage) -> Images:
        """D_l and D_u of a stage, by reference: all that a driver holds of a dataset is 8 bytes an image."""
        if stage.config.get("source"):
            everything = np.arange(self.context.dataset["num_source"])
            return Images(self._table("source.parquet"), everything, everything[:0], self.context.categories)
        chosen = stored_split(self.store, self.context.dataset["content_hash"], stage.config["split"])
        with_extra = stage.config["split"].get("pool", "rest") != "rest"
        records = self._table("train.parquet", *(["extra.parquet"] if with_extra else []))
        return Images(records, chosen.labelled, chosen.unlabelled, self.context.categories)

    def write_log(self, text: str) -> str:
        path = f"{self.context.runs_path}/{self.name}/error.log"
        self.store.write_bytes(path, text.encode())
        return self.store.uri(path)


def _one_line(error: BaseException) -> str:
    """The cause of a failure, past Ray's wrappers, on one line."""
    cause = error
    while isinstance(cause, (ray.exceptions.RayTaskError, ray.train.TrainingFailedError)):
        inner = getattr(cause, "cause", None)
        if isinstance(cause, ray.train.TrainingFailedError):
            failures = getattr(cause, "worker_failures", {})
            inner = next(iter(failures.values()), None)
        if inner is None or inner is cause:
            break
        cause = inner
    text = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {text[-1]}"
