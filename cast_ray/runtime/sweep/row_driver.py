"""Ray Tune: every row and seed is a trial whose driver walks the row's stages, holding no training resources."""

from __future__ import annotations

import json
import pickle
import tempfile
import threading
import time
import traceback
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray import tune

from cast_ray.contracts.compute_node import ComputeNode
from cast_ray.contracts.row_result import RowResult, Status
from cast_ray.plan.graph import RowPlan, Stage, artifact_key
from cast_ray.plan.search import RUNG_METRIC
from cast_ray.runtime.data.images import Images, images_of
from cast_ray.runtime.placement import on_demand_share
from cast_ray.runtime.store.artifact_files import CURVES
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.sweep.broker import HEARTBEAT_S
from cast_ray.runtime.sweep.leases import Answer, Need
from cast_ray.runtime.sweep.posts import MAX_ENTRIES
from cast_ray.runtime.sweep.row_results import (
    Outcome,
    SweepContext,
    assemble_result,
    find_committed,
    row_name,
    write_result,
)
from cast_ray.runtime.worker.audit import audit_labels
from cast_ray.runtime.worker.group_host import run_segment
from cast_ray.runtime.worker.label_job import LabelJob
from cast_ray.runtime.worker.labelling import label_images
from cast_ray.runtime.worker.segment import Segment, SegmentFailed, SweepStopped

DRIVER_CPUS = 0.01
"""CPUs that a row's driver reserves. It only waits; Tune refuses 0."""
MAX_DRIVER_FAILURES = 3
"""Times that a row's driver is started again after its process or node was lost."""
REPORT_EVERY_S = 2.0
LATENCY_REPEATS = 30
RUNG_STEP = "rung_step"
"""Time of a rung's report: the stage's step, from its checkpoints. It continues where a driver is started again, which
Tune's `training_iteration` does not."""


@dataclass(frozen=True)
class Job:
    """A row to run and what it shares with others.

    rungs_of: a train stage whose validation points are reported to Tune while it runs, for early stopping; measure:
    metrics that are not in the artifacts and are measured at the end (`<role>/latency_ms`).
    """

    context: SweepContext
    row: RowPlan
    rungs_of: str | None = None
    measure: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return row_name(self.context.table, self.row)

    def packed(self) -> bytes:
        return zlib.compress(pickle.dumps(self), level=1)

    @staticmethod
    def unpacked(data: bytes) -> Job:
        return pickle.loads(zlib.decompress(data))


def run_trials(
    name: str,
    store: ArtifactStore,
    jobs: Sequence[Job],
    broker: Any,
    max_drivers: int,
    callbacks: Sequence[Any] = (),
    driver: type[RowDriver] | None = None,
) -> dict[str, str]:
    """Runs all rows through Tune; a row that fails leaves its reason in its result.json and the others continue.

    Args:
        name: name of the sweep.
        callbacks: callbacks of Tune; they see each row's curves while it runs and its metrics at the end.
        driver: another `RowDriver`.

    Returns:
        name -> done, failed or stopped (it was not finished because nothing more may start).
    """
    ray.get(broker.load.remote({job.name: job.packed() for job in jobs}))
    experiment = f"{name}-{int(time.time())}-{store.attempt}"
    with tune_folder() as folder:
        tuner = tune.Tuner(
            make_trainable(broker, record=bool(callbacks), driver=driver),
            param_space={"row": tune.grid_search([job.name for job in jobs])},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=max_drivers, reuse_actors=True, trial_dirname_creator=trial_dirname
            ),
            run_config=tune.RunConfig(
                name=experiment,
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=MAX_DRIVER_FAILURES),
                callbacks=list(callbacks),
            ),
        )
        grid = tuner.fit()
        ray.get(broker.close_groups.remote())
        by_name = {job.name: job for job in jobs}
        outcomes = {}
        for result in (grid[i] for i in range(len(grid))):
            row = (result.config or {})["row"]
            outcomes[row] = (result.metrics or {}).get("status", "failed")
            if result.error is not None:
                outcomes[row] = "failed"
                write_lost(by_name[row], result.error)
    return outcomes


@contextmanager
def tune_folder() -> Iterator[str]:
    """A folder of this machine for Tune's own files, for as long as a sweep runs.

    Tune writes the state of all its trials every few seconds to restore them from. Nothing here does: a sweep resumes
    from the store, where these files would be most of its requests.
    """
    with tempfile.TemporaryDirectory(prefix="cast_ray-tune-", ignore_cleanup_errors=True) as folder:
        yield folder


def make_trainable(broker: Any, record: bool, driver: type[RowDriver] | None = None) -> Any:
    """What Tune runs for each row: its driver, which holds next to nothing; on an on-demand node, where there are."""
    parameters = {"broker": broker, "record": record, "driver": driver or RowDriver}
    resources = {"CPU": DRIVER_CPUS, **on_demand_share(ray.cluster_resources())}
    return tune.with_resources(tune.with_parameters(_run_row, **parameters), resources)


def trial_dirname(trial: Any) -> str:
    return str(trial.config["row"])


def _run_row(config: dict[str, Any], broker: Any, record: bool, driver: type[RowDriver]) -> None:
    """Driver of one trial: claims, runs and commits stages until the row has all of them, then writes its result."""
    job = Job.unpacked(ray.get(broker.job.remote(config["row"])))
    result = run_row(driver(job, broker, record))
    measured_on = {name: node.device for name, node in result.measured_on.items()}
    devices = {"computed_on": sorted(result.hours_by_type), "measured_on": measured_on}
    tune.report({"status": result.status, "error": result.error, **devices, **result.metrics})


def run_row(driver: RowDriver) -> RowResult:
    """Runs one row inside a Tune trial and returns its result; a stopped row's is not written."""
    began, started = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    job = driver.job
    status: Status = "done"
    error, log = None, None
    try:
        if reason := driver.run():
            status, error = "stopped", reason
    except Exception as failure:
        status, error = "failed", one_line(failure)
        log = write_log(job, traceback.format_exc())
    finally:
        driver.close(status)
    outcome = Outcome(status, error, log, started, time.monotonic() - began)
    result = assemble_result(job.context, job.row, driver.ran, outcome)
    if status == "failed":
        driver.record_rest()
    if status == "done" and job.measure:
        measured = {name: measure_metric(job, name) for name in job.measure}
        metrics = result.metrics | {name: value for name, (value, _) in measured.items()}
        measured_on = {name: node for name, (_, node) in measured.items()}
        result = result.model_copy(update={"metrics": metrics, "measured_on": measured_on})
    if status != "stopped":
        write_result(job.context, job.row, result)
    return result


class RowDriver:
    """Walks one row's stages: asks the broker for each in turn and runs what it is given.

    Args:
        record: report the curves of the row's stages to Tune, its own while they grow.
    """

    def __init__(self, job: Job, broker: Any, record: bool = False):
        self.job, self.context, self.row, self.name = job, job.context, job.row, job.name
        self.store = self.context.store
        self.broker = broker
        self.instance = uuid.uuid4().hex
        """Tells this process from one that drove the row before and was lost."""
        self.ran: set[str] = set()
        self.left = {s.fingerprint: s for s in self.row.stages}
        self.granted: set[str] = set()
        self.labels: Stage | None = None
        """The labelling job that this process runs now, without the broker's worker groups."""
        self.stopped = threading.Event()
        self.record = record
        self.reporting = threading.Lock()
        self.rungs: set[str] = set()
        self.recorder = threading.Thread(target=self._record, daemon=True) if record else None
        threading.Thread(target=self._beat, daemon=True).start()
        if self.recorder is not None:
            self.recorder.start()

    def _beat(self) -> None:
        while not self.stopped.wait(HEARTBEAT_S):
            self.broker.heartbeat.remote(self.name, self.instance)
            if (stage := self.labels) is not None:  # a broker that has replaced a lost one does not know of it
                devices = self.row.recipe.runtime.num_labellers
                self.broker.adopt.remote(self.name, self.instance, [self._need(stage)], devices)

    def _record(self) -> None:
        """Reports what is new in the curves of the running stages. Its thread ends before the row's last report."""
        over = False
        while not over:
            over = self.stopped.wait(REPORT_EVERY_S)
            by_stage: dict[str, list[dict[str, Any]]] = {}
            for entry in ray.get(self.broker.collect.remote(self.name)):
                by_stage.setdefault(entry["stage"], []).append(entry)
            for stage, entries in by_stage.items():
                self._report(curve_report(stage, entries))
            self._report_rungs()

    def _report_rungs(self) -> None:
        """Reports the validation points of the stage that early stopping looks at, each once."""
        if self.job.rungs_of is None:
            return
        folder = f"validations/{self.row.roles[self.job.rungs_of].fingerprint}"
        for name in sorted(set(self.store.list_names(folder)) - self.rungs):
            self.rungs.add(name)
            point = json.loads(self.store.find_bytes(f"{folder}/{name}") or b"{}")
            if point.get(RUNG_METRIC) is not None:
                self._report({RUNG_STEP: point["step"], RUNG_METRIC: point[RUNG_METRIC]})

    def _report(self, metrics: dict[str, Any]) -> None:
        try:
            with self.reporting:  # Tune takes one report at a time
                tune.report(metrics)
        except SystemExit:  # Tune's scheduler stops this trial, and kills this process next: its slot is free
            ray.get(self.broker.release.remote(self.name, "pruned", self.instance))
            raise

    def close(self, status: str) -> None:
        self.stopped.set()
        if self.recorder is not None:
            self.recorder.join()
        ray.get(self.broker.release.remote(self.name, status, self.instance))

    def run(self) -> str | None:
        """Runs the row to its end; returns why it was stopped before, if it was.

        Raises:
            SegmentFailed: a stage cannot succeed.
            ray.train.TrainingFailedError: workers were lost more often than `runtime.max_failures`.
        """
        runtime = self.row.recipe.runtime
        while self.left:
            needs = [self._need(stage) for stage in self.left.values()]
            asked = self.broker.claim.remote(self.name, needs, runtime.num_workers, self.instance, runtime)
            answer: Answer = ray.get(asked)
            for fingerprint in answer["done"]:
                self._record_shared(self.left.pop(fingerprint))
            if reason := answer.get("failed"):
                raise SegmentFailed(reason)
            if reason := answer.get("stop"):
                return reason
            if segment := [self.left[f] for f in answer["run"]]:
                self.granted |= set(answer["run"])
                self.run_segment(segment)
                ray.get(self.broker.settle.remote(self.name, self.instance))
        return None

    def _need(self, stage: Stage) -> Need:
        alone = stage.kind == "label" and self.row.recipe.runtime.num_labellers > 0
        return Need(stage.fingerprint, stage.kind, tuple(stage.parents.values()), stage.steps, alone)

    def _record_shared(self, stage: Stage) -> None:
        """Reports the curve of a stage that this row did not run itself."""
        if self.record and stage.kind == "train" and stage.fingerprint not in self.ran:
            curve = self.store.read_json(stage.key, CURVES)["curve"]
            if curve:
                self._report(curve_report(stage.name, curve[:: 1 + len(curve) // MAX_ENTRIES]))

    def record_rest(self) -> None:
        """Reports the curves of what other rows have made meanwhile of a row that failed, as its result has them."""
        for stage in self.left.values():
            if stage.fingerprint not in self.granted and self.store.has(stage.key):
                self._record_shared(stage)

    def run_segment(self, stages: list[Stage]) -> None:
        """Runs stages that were granted together, into a separate folder of the store."""
        store = self.store.new_attempt()
        done = [stage for stage in self.row.stages if stage.fingerprint not in self.left]
        found = find_committed(self.store.storage, done)  # the row's result reads them as well
        store.carry({stage.key: found[stage.fingerprint].manifest for stage in done if stage.fingerprint in found})
        broker_id = self._broker_id()
        try:
            self.execute(stages, store)
        except Exception:
            # Another sweep took them over, while this one was thought to be dead, and has finished them.
            is_stored = all(self.store.has(s.key) for s in stages)
            # A lost broker takes worker groups and record tables with it: no fault of the stages, which are asked for
            # again.
            if not is_stored and self._broker_id() == broker_id:
                raise
        finally:  # of a segment that failed, its first stages may have been committed
            committed = find_committed(self.store.storage, stages)
            self.ran |= {f for f, artifact in committed.items() if artifact.manifest.attempt == store.attempt}

    def _broker_id(self) -> str:
        return ray.get(self.broker.which.remote())

    def execute(self, stages: list[Stage], store: ArtifactStore) -> None:
        """Makes and commits the artifacts of stages that were granted together."""
        if self._need(stages[0]).alone:
            self._label(stages[0], store)
        else:
            self._train(stages, store)

    def _train(self, stages: list[Stage], store: ArtifactStore) -> None:
        run_segment(
            Segment(
                owner=self.name,
                sweep=self.context.name,
                stages=stages,
                recipe=self.row.recipe,
                store=store,
                broker=self.broker,
                categories=self.context.categories,
                images={s.name: self._images(s) for s in stages if s.kind != "evaluate"},
                val=self._table("val.parquet"),
                num_val=self.context.dataset.num_val or 0,
                requested=time.time(),
            ),
            self.instance,
        )

    def _label(self, stage: Stage, store: ArtifactStore) -> None:
        began = time.monotonic()
        recipe, images = self.row.recipe, self._images(stage)
        job = LabelJob(store, stage, images, self.broker, self.name, recipe)
        self.labels = stage
        try:
            facts = label_images(job, self.instance)
        except SweepStopped:
            return
        finally:
            self.labels = None
        audit_labels(store, stage, images, recipe.runtime)
        where = {"num_workers": recipe.runtime.num_labellers, "device": "cuda" if recipe.runtime.use_gpu else "cpu"}
        facts |= {"stage_seconds": time.monotonic() - began, **where, "owner": self.name}
        facts |= {"computed_on": ray.get(self.broker.computed_on.remote(self.name))}
        store.commit(stage, facts)
        job.forget_blocks()
        device_s = facts["stage_seconds"] * recipe.runtime.num_labellers
        ray.get(self.broker.finish.remote(stage.fingerprint, device_s))

    def _table(self, *names: str) -> ray.ObjectRef:
        return ray.get(self.broker.table.remote(self.store, self.context.dataset_key, names))[0]

    def _images(self, stage: Stage) -> Images:
        num_source, content_hash = self.context.dataset.num_source or 0, self.context.content_hash
        return images_of(stage, self._table, self.store, content_hash, num_source, self.context.categories)


def curve_report(stage: str, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What Tune's callbacks are told of a stage: the last entry as metrics, all of them under `curve`."""
    newest = {f"{stage}/{name}": value for name, value in entries[-1].items() if isinstance(value, int | float)}
    return {"stage": stage, "curve": [dict(entry) for entry in entries], **newest}


def measure_metric(job: Job, name: str) -> tuple[float, ComputeNode]:
    """A metric that only the running model can tell: `<role>/latency_ms` of one image on the stages' device. Also the
    machine that it was measured on.

    Raises:
        ValueError: there is no such metric.
    """
    role, _, metric = name.rpartition("/")
    if metric != "latency_ms" or role not in job.row.roles:
        raise ValueError(f"metric {name!r} is not known: expected one of a result, or <role>/latency_ms")
    runtime = job.row.recipe.runtime
    key = artifact_key("train", job.row.roles[role].parents["model"])
    task = measure_latency.options(num_gpus=1 if runtime.use_gpu else 0)
    return ray.get(task.remote(job.context.store, key, job.row.recipe.data.image_px))


@ray.remote(num_cpus=0.01, scheduling_strategy="DEFAULT")
def measure_latency(store: ArtifactStore, key: str, image_px: tuple[int, int]) -> tuple[float, ComputeNode]:
    """Median milliseconds of one image of a training crop's size through a stored model, after a warm-up; one thread on
    a CPU. Also the machine that it was measured on."""
    import torch

    from cast_ray.evaluation.efficiency import measure_seconds
    from cast_ray.models.autocast import autocast
    from cast_ray.runtime.store.models import load_student
    from cast_ray.runtime.this_node import this_node

    torch.set_num_threads(1)
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    student = load_student(store, key).to(device)
    image = torch.zeros(1, 3, *image_px, dtype=torch.uint8, device=device)
    context = partial(autocast, student.precision, device)
    seconds = measure_seconds(lambda: student(image), device, LATENCY_REPEATS, context)
    return 1000 * seconds, this_node(device)


def write_log(job: Job, text: str) -> str:
    """Keeps a row's traceback beside its result; returns where."""
    path = f"{job.context.runs_path}/{job.name}/error.log"
    job.context.store.write_bytes(path, text.encode())
    return job.context.store.uri(path)


def write_lost(job: Job, error: BaseException) -> None:
    """Makes the result of a row whose driver died too often to write one."""
    outcome = Outcome("failed", one_line(error), write_log(job, str(error)))
    write_result(job.context, job.row, assemble_result(job.context, job.row, set(), outcome))


def one_line(error: BaseException) -> str:
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
    if isinstance(cause, SegmentFailed):  # "<stage>: Traceback ...", whose last line names the error
        return f"{text[0].partition(':')[0]}: {text[-1]}"
    return f"{type(cause).__name__}: {text[-1]}"
