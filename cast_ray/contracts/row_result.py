"""`result.json`: the outcome of one row and seed, what it was made from and with which numbers.

The sweep writes it (`runtime.sweep.row_results`), reports and saved models are made from it. Numbers that depend on
what was trained and measured (losses, metrics, diagnostics) are mappings by name; everything else has a field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from cast_ray.contracts.compute_node import UNKNOWN_DEVICE, ComputeNode
from cast_ray.contracts.document import Document, DocumentPart, Several
from cast_ray.contracts.held_precision import HeldPrecision
from cast_ray.contracts.label_audit import LabelAudit

Status = Literal["done", "failed", "stopped", "unreadable"]
"""stopped: nothing more might start, and the same command continues the row; unreadable: never written, a report's word
for a result whose file cannot be read."""
Number = int | float


def _with_step(point: dict[str, Any]) -> dict[str, Any]:
    step = point.get("step")
    if not isinstance(step, int):
        raise ValueError("a mapping with a whole number `step`")
    return point


CurvePoint = Annotated[dict[str, Any], AfterValidator(_with_step)]
"""Values at one optimiser step, by name; `step` is always one of them."""


def is_finite(value: Any) -> bool:
    """Whether a value of a curve or a metric is a number that can be drawn or averaged."""
    return isinstance(value, int | float) and math.isfinite(value)


class Hardware(DocumentPart):
    """The machine that planned the sweep. What computed its stages is in their `computed_on`."""

    cpu: str | None = None
    """Model of the CPU."""
    num_cpus: int | None = None
    """Cores."""
    gpu: str | None = None
    """Model of its GPU; None: it has none, or nobody looked."""
    memory_gb: float | None = None


class SplitFacts(DocumentPart):
    """How the labelled and unlabelled images of a row were chosen."""

    family: str | None = None
    """Rule by which images keep their labels (`data.label_family`)."""
    fraction: float | None = None
    """Share of the training images that are labelled, 0..1."""
    seed: int | None = None
    num_labelled: int | None = None
    num_with_objects: int | None = None
    """Labelled images with at least one object."""
    num_unlabelled: int | None = None
    num_extra: int = 0
    """Unlabelled images that come from the extra pool."""
    num_copies: int = 0
    """Images that are left out because they are copies of labelled or validation images."""
    num_empty: int = 0
    """Images without objects that were chosen and then left out (`data.drop_empty`)."""
    min_per_class: int | None = None
    """Least number of labelled images of each class, where the family asks for it."""
    label_list: str | None = None
    """File that names the labelled images, where one does."""
    label_list_sha256: str | None = None
    unlabelled_list: str | None = None
    """File that names the unlabelled images, where one does."""
    unlabelled_list_sha256: str | None = None


class DatasetFacts(DocumentPart):
    """The dataset of a row."""

    artifact: str = ""
    """Key of the artifact with its record tables."""
    content_hash: str | None = None
    """Identity of images and annotations."""
    num_train: int | None = None
    """Usable training images, whether their labels are used or hidden."""
    num_val: int | None = None
    num_source: int | None = None
    """Images of the other style that a teacher is pre-trained on."""
    num_extra: int | None = None
    """Images of the extra unlabelled pool."""
    skipped: int = 0
    """Files, images and annotations that were left out."""
    skipped_statement: str | None = None
    """The same as a sentence."""
    warnings: Several[str] = ()
    """A sentence for each split without one object."""
    notes: Several[str] = ()
    """Other sentences about how the dataset was read."""
    classes: Several[str] = ()
    """Names of the classes, each once."""
    num_labelled: int | None = None
    """Labelled images of the row; 0: it uses none."""
    num_unlabelled: int | None = None
    """Unlabelled images of the row; 0: it uses none."""
    split: SplitFacts | None = None
    """How both were chosen."""


class StageRecord(DocumentPart):
    """A stage of a row, finished by this row or by another one that shares it."""

    name: str
    kind: str
    """train, label or evaluate."""
    fingerprint: str
    """Identity of the stage; equal stages of different rows have the same."""
    artifact: str = ""
    """Path or URI of the folder with its files."""
    reused: bool = False
    """Whether the row found it or waited for it, instead of running it."""
    steps: int = 0
    """Optimiser steps; 0 unless it trains."""
    num_workers: int | None = None
    num_devices: int | None = None
    """Devices that it held, see `Manifest.num_devices`."""
    seconds: float | None = None
    """Time of the training, labelling or evaluation itself."""
    stage_seconds: float | None = None
    """Time for which the stage held its devices, without the start of its workers."""
    startup_seconds: float | None = None
    """Time that its workers took to start; 0 where they had run another stage before."""
    images_per_s: float | None = None
    computed_on: Several[ComputeNode] = ()
    """The kinds of machines of the workers that finished it; empty: not known."""
    resumed_at_step: int | None = None
    """Step of the checkpoint that it was resumed from; None: it ran in one piece."""
    skipped_steps: int | None = None
    """Optimiser steps that were left out because float16 overflowed."""
    num_images: int | None = None
    """Images that a labelling stage has labelled."""
    num_pseudo_labels: int | None = None
    """Instances on them."""
    num_skipped: int = 0
    """Images that it could not read."""
    skipped: Several[str] = ()
    """The reasons of the first of them, each with the file's name."""
    held_precision: HeldPrecision | None = None
    """Thresholds by class that hold a precision, of a labelling stage that has them."""


class RowResult(Document):
    """The outcome of one row and seed."""

    NAME = "a result"
    VERSION = 1

    table: str
    row: str
    seed: int
    status: Status
    error: str | None = None
    """Why the row failed or was stopped, in one line; a traceback in results of early versions."""
    log: str | None = None
    """Path or URI of the file with the whole traceback."""
    started: str | None = None
    """When the row's driver started: local time with its offset, ISO 8601."""
    seconds: float | None = None
    """Wall time of the row, waiting for shared stages included; 0 where all was stored."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """The resolved recipe as plain data. Recipes of other versions have other fields, so look one up by `setting`."""
    command: str | None = None
    """The command line that ran it."""
    code_version: str | None = None
    device_hours: float | None = None
    """Device-hours of the stages that this row ran, in this run or in one before it."""
    device_hours_by_type: dict[str, float] = Field(default_factory=dict)
    """The same by the model of the devices (`contracts.compute_node.device_type`); empty: an early version wrote it."""
    hardware: Hardware | None = None
    dataset: DatasetFacts | None = None
    stages: Several[StageRecord] = ()
    """The row's finished stages, parents first."""
    given: Several[str] = ()
    """Fingerprints of imported artifacts that the row builds on."""
    metrics: dict[str, Number | None] = Field(default_factory=dict)
    """`<role>/<measure>` -> value, such as `student/mask_ap` in percent; None: not defined on this data."""
    measured_on: dict[str, ComputeNode] = Field(default_factory=dict)
    """Metric that depends on the machine (`<role>/latency_ms`) -> the one it was measured on."""
    per_class: dict[str, dict[str, Number | None]] = Field(default_factory=dict)
    """Role -> name of each class -> AP in percent; None: no object of it."""
    evaluations: dict[str, str] = Field(default_factory=dict)
    """Role -> fingerprint of the evaluation that its metrics come from."""
    curves: dict[str, Several[CurvePoint]] = Field(default_factory=dict)
    """Train stage -> its losses, learning rate and validation AP over its steps."""
    diagnostics: dict[str, Several[CurvePoint]] = Field(default_factory=dict)
    """Train stage -> statistics of the pixel contrast over its steps."""
    pseudo_labels: dict[str, LabelAudit] = Field(default_factory=dict)
    """Label stage -> the audit of its pseudo-labels, where the ground truth is known."""

    @property
    def is_done(self) -> bool:
        return self.status == "done"

    @property
    def key(self) -> tuple[str, str, int]:
        """(table, row, seed)."""
        return self.table, self.row, self.seed

    @property
    def hours_by_type(self) -> dict[str, float]:
        """Model of the devices -> device-hours of the stages that this row ran."""
        return self.device_hours_by_type or ({UNKNOWN_DEVICE: self.device_hours} if self.device_hours else {})

    def setting(self, key: str) -> Any:
        """The recipe's value of a dotted key, such as `evaluation.metric`; None where it has none."""
        value: Any = self.recipe
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def stage(self, name: str) -> StageRecord | None:
        """The first finished stage of that name."""
        return next((stage for stage in self.stages if stage.name == name), None)
