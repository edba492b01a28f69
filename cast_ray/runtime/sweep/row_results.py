"""result.json: what a row ran, from which artifacts, with which numbers. Needs the store only, not Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cast_ray.contracts.compute_node import device_type
from cast_ray.contracts.document import NewerDocumentError
from cast_ray.contracts.label_audit import LabelAudit
from cast_ray.contracts.manifest import LabelManifest, Manifest, TrainManifest
from cast_ray.contracts.records import Category
from cast_ray.contracts.row_result import (
    CurvePoint,
    DatasetFacts,
    Hardware,
    Number,
    RowResult,
    SplitFacts,
    StageRecord,
    Status,
)
from cast_ray.plan.graph import RowPlan, Stage, given
from cast_ray.plan.stage_parts import TrainPart
from cast_ray.runtime.data.splits import stored_split
from cast_ray.runtime.store.artifact_files import AUDIT, CURVES, MATCHES, METRICS
from cast_ray.runtime.store.artifacts import ArtifactStore, read_each

MAX_SKIPPED_NAMED = 20


@dataclass(frozen=True)
class SweepContext:
    """What the rows of one table and dataset share; small, sent to each trial."""

    name: str
    """Name of the run: `<table>-<preset>-<scale>` unless the user chose another."""
    table: str
    command: str
    code_version: str
    hardware: Hardware
    store: ArtifactStore
    dataset_key: str
    """Artifact that holds the record tables (train, val and, if the dataset has one, source)."""
    dataset: DatasetFacts
    """See `StoredDataset.facts`."""
    categories: tuple[Category, ...]
    runs_path: str
    """Where result.json files go, below the storage path."""

    @property
    def content_hash(self) -> str:
        """Identity of the dataset's images and annotations."""
        assert self.dataset.content_hash is not None
        return self.dataset.content_hash

    def result_path(self, row: RowPlan) -> str:
        """Path of a row's result.json below the storage path."""
        return f"{self.runs_path}/{row_name(self.table, row)}/result.json"


def row_name(table: str, row: RowPlan) -> str:
    """`<table>__<row>__s<seed>`: name of a row's trial and directory of its result."""
    return f"{table}__{row.row}__s{row.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a row ended: see the fields of these names of `RowResult`."""

    status: Status
    error: str | None = None
    log: str | None = None
    started: str | None = None
    seconds: float | None = None


def read_result(context: SweepContext, row: RowPlan) -> RowResult | None:
    """The row's result.json as last written, done or failed; None when there is none, or one that cannot be read.

    A result that cannot be read is made again from the stages in the store.

    Raises:
        NewerDocumentError: a newer build has written it, which this one must not replace.
    """
    path = context.result_path(row)
    stored = context.store.find_bytes(path)
    try:
        return RowResult.read(stored, context.store.uri(path)) if stored else None
    except NewerDocumentError:
        raise
    except ValueError:
        return None


def write_result(context: SweepContext, row: RowPlan, result: RowResult) -> None:
    """Writes the row's result.json into the store."""
    context.store.write_bytes(context.result_path(row), result.to_json().encode())


def read_audit(store: ArtifactStore, key: str) -> LabelAudit | None:
    """The audit of a labelling stage; None where its images have no ground truth."""
    content = store.find_file(key, AUDIT)
    return LabelAudit.read(content, store.uri("artifacts", key, AUDIT)) if content else None


@dataclass(frozen=True)
class Committed:
    """A committed artifact: its manifest, the folder of its files, and its numbers as they are stored."""

    manifest: Manifest
    folder: str
    numbers: Mapping[str, Any]


@lru_cache(maxsize=64)
def _read_committed(storage: str, key: str) -> Committed:
    """An artifact, which never changes once it is committed.

    Raises:
        FileNotFoundError: it is not (the next call looks again).
    """
    store = ArtifactStore(storage)
    manifest = store.manifest(key)
    numbers = {"train": CURVES, "evaluate": METRICS, "label": AUDIT}.get(manifest.kind)
    found = store.find_file(key, numbers) if numbers else None  # not every labelling stage has an audit
    return Committed(manifest, store.artifact(key), json.loads(found) if found else {})


def find_committed(storage: str, stages: Sequence[Stage]) -> dict[str, Committed]:
    """Fingerprint -> what is committed, of those stages that are; each is read once by a process."""

    def read(stage: Stage) -> Committed | None:
        try:
            return _read_committed(storage, stage.key)
        except FileNotFoundError:
            return None

    found = zip(stages, read_each(read, stages))
    return {stage.fingerprint: artifact for stage, artifact in found if artifact is not None}


def assemble_result(context: SweepContext, row: RowPlan, ran: set[str], outcome: Outcome) -> RowResult:
    """The result of a row from the artifacts in the store.

    Args:
        ran: fingerprints of the stages that this row ran itself; the others it shared.
        outcome: how the row ended.
    """
    committed = find_committed(context.store.storage, row.stages)
    finished = [(stage, committed[stage.fingerprint]) for stage in row.stages if stage.fingerprint in committed]
    own = [artifact.manifest for _, artifact in finished if artifact.manifest.owner == row_name(context.table, row)]
    evaluated = {
        role: (stage, committed[stage.fingerprint].numbers)
        for role, stage in row.roles.items()
        if stage.kind == "evaluate" and stage.fingerprint in committed
    }
    of_row = [(stage, artifact) for stage, artifact in finished if not stage.is_of_fold]
    trained = {stage.name: artifact.numbers for stage, artifact in of_row if stage.kind == "train"}
    labelled = {stage.name: artifact.numbers for stage, artifact in of_row if stage.kind == "label"}
    return RowResult(
        schema_version=RowResult.VERSION,
        table=context.table,
        row=row.row,
        seed=row.seed,
        **vars(outcome),
        recipe=row.recipe.model_dump(mode="json"),
        command=context.command,
        code_version=context.code_version,
        device_hours=sum(manifest.device_seconds for manifest in own) / 3600,  # of this run or one before it
        device_hours_by_type=_hours_by_type(own),
        hardware=context.hardware,
        dataset=_dataset_facts(context, row, committed),
        stages=tuple(_stage_record(stage, artifact, stage.fingerprint not in ran) for stage, artifact in finished),
        given=tuple(sorted(given(row))),
        metrics=_metrics(evaluated),
        per_class={role: numbers["per_class"] for role, (_, numbers) in evaluated.items()},
        evaluations={role: stage.fingerprint for role, (stage, _) in evaluated.items()},
        curves=_curves(row, trained, evaluated.values()),
        diagnostics={name: numbers["diagnostics"] for name, numbers in trained.items()},
        pseudo_labels={name: LabelAudit.of(numbers, AUDIT) for name, numbers in labelled.items() if numbers},
    )


def _hours_by_type(manifests: Iterable[Manifest]) -> dict[str, float]:
    """Model of the devices -> device-hours of these stages."""
    hours: dict[str, float] = {}
    for manifest in manifests:
        if manifest.device_seconds:
            device = device_type(manifest.computed_on)
            hours[device] = hours.get(device, 0.0) + manifest.device_seconds / 3600
    return hours


def _metrics(evaluated: Mapping[str, tuple[Stage, Mapping[str, Any]]]) -> dict[str, Number | None]:
    """`<role>/<measure>` -> value of all evaluations of a row."""
    return {
        f"{role}/{measure}": value
        for role, (_, numbers) in evaluated.items()
        for measure, value in numbers.items()
        if isinstance(value, Number)
    }


def _stage_record(stage: Stage, artifact: Committed, reused: bool) -> StageRecord:
    manifest = artifact.manifest
    return StageRecord(
        name=stage.name,
        kind=stage.kind,
        fingerprint=stage.fingerprint,
        artifact=artifact.folder,
        reused=reused,
        steps=stage.steps,
        num_workers=manifest.num_workers,
        num_devices=manifest.num_devices,
        seconds=manifest.seconds,
        stage_seconds=manifest.stage_seconds,
        startup_seconds=manifest.startup_seconds,
        images_per_s=manifest.images_per_s,
        computed_on=manifest.computed_on,
        **_facts_of_kind(manifest),
    )


def _facts_of_kind(manifest: Manifest) -> dict[str, Any]:
    """Fields of a StageRecord that only stages of the manifest's kind have."""
    if isinstance(manifest, TrainManifest):
        return {"resumed_at_step": manifest.resumed_at_step, "skipped_steps": manifest.skipped_steps}
    if isinstance(manifest, LabelManifest):
        reasons = [image.error for image in manifest.skipped]
        return {
            "num_images": manifest.num_images,
            "num_pseudo_labels": manifest.num_pseudo_labels,
            "num_skipped": len(reasons),
            "skipped": tuple(reasons[:MAX_SKIPPED_NAMED]),
            "held_precision": manifest.held_precision,
        }
    return {}


def _dataset_facts(context: SweepContext, row: RowPlan, committed: Mapping[str, Committed]) -> DatasetFacts:
    """The dataset, with how many labelled and unlabelled images the row's student learns from and how they were
    chosen."""
    student = row.student_stages[-1]  # the stage that the student starts with is the one that may read D_u
    chosen = stored_split(context.store, context.content_hash, TrainPart.of(student).split).facts
    artifact = committed.get(student.fingerprint)
    manifest = artifact.manifest if artifact is not None else None
    counts = (manifest.num_labelled, manifest.num_unlabelled) if isinstance(manifest, TrainManifest) else (None, None)
    changes = {"num_labelled": counts[0], "num_unlabelled": counts[1], "split": SplitFacts(**chosen)}
    return context.dataset.model_copy(update=changes)


def _curves(
    row: RowPlan, trained: Mapping[str, Mapping[str, Any]], evaluated: Iterable[tuple[Stage, Mapping[str, Any]]]
) -> dict[str, tuple[CurvePoint, ...]]:
    """Train stage -> its curve. That of a stage which was validated while it trained ends with its evaluation."""
    curves = {name: tuple(numbers["curve"]) for name, numbers in trained.items()}
    steps = {stage.name: (stage.fingerprint, stage.steps) for stage in row.stages}
    for evaluation, measured in evaluated:
        for name, curve in curves.items():
            fingerprint, last = steps[name]
            is_validated = any("val/mask_ap" in point for point in curve)
            if fingerprint == evaluation.parents["model"] and is_validated and curve[-1]["step"] == last:
                final = {f"val/{k}": measured[k] for k in ("mask_ap", "ap50") if measured[k] is not None}
                curves[name] = (*curve[:-1], curve[-1] | final)
    return curves


def read_matches(context: SweepContext, row: RowPlan) -> Iterator[tuple[str, bytes]]:
    """(role, content of `evaluation.matches.load_matches`' file) of every evaluation of a row that is stored."""
    for role, stage in row.roles.items():
        if stage.kind == "evaluate" and role != "final":  # a second name of one of them
            content = context.store.find_file(stage.key, MATCHES)
            if content is not None:
                yield role, content


def result_from_store(context: SweepContext, row: RowPlan) -> RowResult:
    """Makes the result of a row whose stages are all in the store already."""
    outcome = Outcome("done", started=time.strftime("%Y-%m-%dT%H:%M:%S%z"), seconds=0.0)
    return assemble_result(context, row, set(), outcome)


def is_current(result: RowResult | None, row: RowPlan) -> bool:
    """Whether a stored result is a finished one, made from exactly this row's stages."""
    if result is None or not result.is_done:
        return False
    return {stage.fingerprint for stage in result.stages} == {stage.fingerprint for stage in row.stages}
