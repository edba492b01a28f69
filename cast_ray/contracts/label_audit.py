"""The audit of a labelling stage as it is stored: how good its pseudo-labels were against the hidden ground truth.

`evaluation.label_audit.summarise_audit` makes it and says how each number is measured. Percent unless said otherwise;
None where nothing is counted.
"""

from __future__ import annotations

from pydantic import Field

from cast_ray.contracts.document import DocumentPart, Several


class LabelRates(DocumentPart):
    """Pseudo-labels of one group: all of them, one class, or one range of sizes."""

    num_labels: int
    """Pseudo-labels that count, which are those outside ignore regions."""
    num_objects: int
    """Objects of the hidden ground truth."""
    precision: float | None = None
    """Share of the pseudo-labels that are right, at IoU 0.5."""
    recall: float | None = None
    """Share of the objects that have a pseudo-label, at IoU 0.5."""
    ap: float | None = None
    """COCO AP, by the scores of the pseudo-labels."""
    ap50: float | None = None
    """COCO AP at IoU 0.5. Ranges of sizes have none."""


class Calibration(DocumentPart):
    """How far scores can be trusted, in equal bins of the score, each number 0..1."""

    score: Several[float | None]
    """Mean score of each bin; None where the bin is empty."""
    precision: Several[float | None]
    """Share of right pseudo-labels of each bin; None where the bin is empty."""
    ece: float | None = None
    """Expected calibration error: mean distance of the two, weighted by count."""


class MeanShare(DocumentPart):
    """A share per image, over the images with objects."""

    mean: float | None = None


class Coverage(DocumentPart):
    """How much of the images the pseudo-labels cover."""

    objects: MeanShare
    """Share of an image's objects that have a pseudo-label."""
    pixels: MeanShare
    """Share of an image's object pixels that are labelled."""
    pixel_precision: float | None = None
    """Share of the labelled pixels that lie on objects."""
    labels_per_image: float
    """Mean number of pseudo-labels."""
    images_without_label: int
    """Images with objects and without any pseudo-label."""


class VisibleGroup(DocumentPart):
    """Pseudo-labels that keep less, or at least, half of their mask after painting."""

    num_labels: int
    precision: float | None = None


class Visibility(DocumentPart):
    """Whether left-overs, which are labels that others have mostly painted over, are worse than the other labels."""

    left_overs: VisibleGroup
    """Labels that keep less than half of their mask."""
    others: VisibleGroup
    """Labels that keep at least half of it."""


class WorstImage(DocumentPart):
    """One of the images with most errors."""

    position: int
    """Its place among the unlabelled images of the stage."""
    image_id: int | str
    """The dataset's own id."""


class LabelAudit(LabelRates):
    """The audit of one labelling stage."""

    NAME = "an audit of pseudo-labels"

    num_images: int
    """Images whose hidden ground truth is known."""
    per_class: dict[str, LabelRates] = Field(default_factory=dict)
    """Name of each class -> its pseudo-labels."""
    by_size: dict[str, LabelRates] = Field(default_factory=dict)
    """small, medium and large -> pseudo-labels of that size."""
    errors: dict[str, int] = Field(default_factory=dict)
    """Kind of error -> number of wrong pseudo-labels."""
    errors_per_class: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Name of each class -> kind of error -> number of wrong pseudo-labels."""
    calibration: Calibration
    coverage: Coverage
    visibility: Visibility | None = None
    """None where the labels do not say how much of their mask they keep, and in results of earlier versions."""
    num_suppressed: int | None = None
    """Predictions that better ones of their class suppressed before painting; None in results of earlier versions."""
    worst: Several[WorstImage] = ()
    """The images with most errors, worst first."""
