"""Ray Tune: every row and seed is a trial whose driver walks the row's stages, holding no training resources."""

from __future__ import annotations

import threading
import time
import traceback
from typing import Any

import numpy as np
import ray
from ray import tune

from cast_ray.datasets.fractions import split
from cast_ray.recipe import DataConfig
from cast_ray.runtime.broker import HEARTBEAT_S, Need, broker_for
from cast_ray.runtime.labelling import LabelJob, count_labels, label_images, nothing_found
from cast_ray.runtime.results import SweepContext, assemble_result, row_name
from cast_ray.runtime.streams import Images, load_records
from cast_ray.runtime.workers import Segment, run_segment
from cast_ray.stages.graph import RowPlan, Stage, artifact_key

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
        self.tables: dict[tuple[str, str], ray.ObjectRef] = {}
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
            needs = [Need(s.fingerprint, s.kind, tuple(s.parents.values()), s.steps) for s in stages.values()]
            answer = ray.get(self.broker.claim.remote(self.name, needs))
            for fingerprint in answer["done"]:
                stages.pop(fingerprint)
            segment = [stages[f] for f in answer["run"]]
            if not segment:
                continue
            if segment[0].kind == "label":
                self._label(segment[0])
            else:
                self._train(segment)
            self.ran.update(s.fingerprint for s in segment)
            ray.get(self.broker.settle.remote(self.name))

    def _train(self, stages: list[Stage]) -> None:
        segment = Segment(
            owner=self.name,
            stages=stages,
            recipe=self.row.recipe,
            store=self.store,
            broker=self.broker,
            categories=self.context.categories,
            images={s.name: self._images(s) for s in stages if s.kind == "train"},
            val=self._table("val.parquet"),
            num_val=self.context.dataset["num_val"],
            requested=time.time(),
        )
        run_segment(segment, f"{self.name}-{stages[0].fingerprint[:8]}")

    def _label(self, stage: Stage) -> None:
        began = time.monotonic()
        runtime = self.row.recipe.runtime
        images = self._images(stage)
        total = len(images.unlabelled)
        post = {"stage": stage.name, "fingerprint": stage.fingerprint, "step": 0, "steps": total, "unit": "image"}
        self.broker.post.remote(self.name, post)
        job = LabelJob(self.store, stage, images, self.broker, self.name, runtime.amp)
        num_images = label_images(job, runtime)
        num_labels = count_labels(self.store, stage)
        if num_labels == 0 and self.row.recipe.pseudo.on_empty == "stop":
            raise ValueError(nothing_found(stage, self.row.recipe, num_images, self.context.categories))
        seconds = time.monotonic() - began
        facts = {"seconds": seconds, "stage_seconds": seconds, "images_per_s": num_images / seconds}
        facts |= {"num_pseudo_labels": num_labels}
        self.store.commit(stage, facts | {"num_images": num_images, "num_workers": runtime.num_labellers})
        ray.get(self.broker.finish.remote(stage.fingerprint))

    def _table(self, name: str, key: str | None = None) -> ray.ObjectRef:
        key = key or self.context.dataset_key
        if (key, name) not in self.tables:
            self.tables[key, name] = load_records.remote(self.store, key, name)
        return self.tables[key, name]

    def _images(self, stage: Stage) -> Images:
        """D_l and D_u of a stage, by reference."""
        if stage.config.get("source"):
            everything = np.arange(self.context.dataset["num_source"])
            return Images(self._table("source.parquet"), everything, everything[:0], self.context.categories)
        data = DataConfig(**self.row.recipe.data.model_dump() | stage.config["data"])
        ids = self.store.read_table(self.context.dataset_key, "train.parquet", columns=["image_id"])
        labelled, unlabelled = split(
            ids, data.label_fraction, stage.config["seed"], data.num_unlabelled, self.row.recipe.runtime.num_workers
        )
        wanted = stage.kind == "label" or stage.config["unlabelled"]
        labels = None
        if "labels" in stage.parents:
            labels = self._table("labels", artifact_key("label", stage.parents["labels"]))
        return Images(
            self._table("train.parquet"),
            labelled,
            unlabelled if wanted else unlabelled[:0],
            self.context.categories,
            labels,
        )

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
