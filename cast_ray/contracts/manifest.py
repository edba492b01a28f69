"""`manifest.json` of an artifact: which stage it is of, which attempt counts, how long it took and what it holds.

`runtime.store.artifacts` writes it as the last file of an artifact. Facts that all kinds have are fields of `Manifest`,
those of one kind are fields of that kind's class. What else a stage tells is kept among `unknown_fields`.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from cast_ray.contracts.compute_node import ComputeNode
from cast_ray.contracts.document import Document, DocumentPart, Several, parse
from cast_ray.contracts.held_precision import HeldPrecision


class Manifest(Document):
    """What an artifact of any kind is."""

    NAME = "a manifest"
    VERSION = 1

    stage: str
    """Name of the stage in the row that made it; equal stages of other rows may be called differently."""
    kind: str
    """train, label, evaluate or dataset."""
    fingerprint: str = ""
    attempt: str = ""
    """Folder of the files that count; empty in stores of early versions, which have no attempts."""
    files: dict[str, int] = Field(default_factory=dict)
    """Name of each file of that attempt -> bytes; empty in stores of early versions."""
    parents: dict[str, str] = Field(default_factory=dict)
    """Role -> fingerprint of each artifact that it was made from."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The stage's part of the recipe."""
    steps: int = 0
    """Optimiser steps; 0 unless it trains."""
    committed: float | None = None
    """When it was written, by the writer's clock, seconds since 1970."""
    seconds: float | None = None
    """Time of the training, labelling or evaluation itself."""
    stage_seconds: float | None = None
    """Time for which the stage held its devices, without the start of its workers."""
    startup_seconds: float | None = None
    """Time that its workers took to start; 0 where they had run another stage before."""
    images_per_s: float | None = None
    num_workers: int | None = None
    num_devices: int | None = None
    """Devices that it held: those of its workers, of teachers that labelled online and of validation beside training;
    None, in early versions: those of its workers."""
    device: str | None = None
    """Kind of device that it ran on, such as cpu or cuda:0."""
    computed_on: Several[ComputeNode] = ()
    """The kinds of machines of the workers that finished it; empty: not known."""
    owner: str | None = None
    """Name of the trial that made it."""

    @property
    def device_seconds(self) -> float:
        """Time for which it held devices, summed over them; 0 where the manifest does not say it."""
        return (self.stage_seconds or 0.0) * self.known_devices

    @property
    def known_devices(self) -> int:
        """Devices that it held, at least one."""
        return self.num_devices or self.num_workers or 1


class ValidationFacts(DocumentPart):
    """What became of the validations beside a training stage."""

    validated: int = 0
    """Snapshots that were measured."""
    skipped: Several[int] = ()
    """Steps whose snapshot was not measured because validation was behind."""
    failed: dict[str, str] = Field(default_factory=dict)
    """Step -> why its snapshot could not be measured."""


class OnlineLabels(DocumentPart):
    """The label stage that a training stage did not read but made as it went: see `plan.graph.Stage`."""

    stage: str
    """Its name."""
    fingerprint: str
    config: dict[str, Any]
    """Its part of the recipe."""


class TrainManifest(Manifest):
    """The manifest of a trained or imported model."""

    num_labelled: int | None = None
    """Labelled images that it learnt from."""
    num_unlabelled: int | None = None
    resumed_at_step: int | None = None
    """Step of the checkpoint that it was resumed from; None: it ran in one piece."""
    skipped_steps: int | None = None
    """Optimiser steps that were left out because float16 overflowed."""
    validation: ValidationFacts | None = None
    """None: it was not validated while it trained."""
    online: OnlineLabels | None = None
    """None: it read stored labels, or none; or an early version wrote the manifest."""


class SkippedImage(DocumentPart):
    """An image that a labelling stage could not read."""

    position: int | None = None
    """Its place among the unlabelled images of the stage."""
    uri: str | None = None
    error: str
    """Why, with the file's name."""


class LabelManifest(Manifest):
    """The manifest of pseudo-labels."""

    num_images: int | None = None
    """Images that it has labelled."""
    num_pseudo_labels: int | None = None
    """Instances on them."""
    num_found: int | None = None
    """Images whose labels an interrupted run had left."""
    skipped: Several[SkippedImage] = ()
    """Images that it could not read."""
    class_thresholds: dict[str, float] | None = None
    """Name of each class -> its least score, where each class has its own; classes that get no label have none."""
    held_precision: HeldPrecision | None = None
    """How these were chosen, where `pseudo.precision` asks for them; None in manifests of earlier versions."""


class CategoryFacts(DocumentPart):
    """One class of a dataset, see `contracts.records.Category`."""

    id: int
    name: str


class DatasetManifest(Manifest):
    """The manifest of a dataset's record tables."""

    content_hash: str
    """Identity of images and annotations."""
    extra_hash: str = ""
    """Identity of the extra unlabelled pool; empty: there is none."""
    categories: Several[CategoryFacts]
    num_images: dict[str, int]
    """Split -> usable images."""
    has_positions: bool = False
    """Whether it holds the order in which an annotation file lists its images, which label lists may refer to."""


_OF_KIND: dict[str, type[Manifest]] = {"train": TrainManifest, "label": LabelManifest, "dataset": DatasetManifest}


def read_manifest(content: str | bytes, place: str) -> Manifest:
    """Reads a manifest, as an object of its kind's class.

    Args:
        place: path or URI of the file, for error messages.

    Raises:
        NewerDocumentError: a newer build has written it.
        ValueError: it is not a manifest. The message is one line with place and field.
    """
    plain = parse(content, place)
    kind = plain.get("kind") if isinstance(plain, dict) else None
    return manifest_class(str(kind)).of(plain, place)


def manifest_class(kind: str) -> type[Manifest]:
    """The class of a kind's manifests."""
    return _OF_KIND.get(kind, Manifest)
