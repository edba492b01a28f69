"""What the thresholds of a saved teacher are chosen on: labels of labelled images, kept by the row that trained it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from cast_ray.common.paths import absolute, join, read_bytes
from cast_ray.contracts.held_precision import HeldPrecision
from cast_ray.evaluation.matches import DetectionMatches, load_matches
from cast_ray.evaluation.precision_thresholds import GroupThreshold, precision_thresholds, thresholds_of_classes
from cast_ray.plan.reads import TEACHER_STAGES
from cast_ray.recipe import PseudoConfig
from cast_ray.runtime.store.artifact_files import CALIBRATION
from cast_ray.runtime.store.models import follow_row

LABELS_OF_TEACHER = "label-teacher"
"""The label stage whose teacher is the one that a row is asked for."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Labels of labelled images by teachers that were not trained on them, matched to the truth.

    pseudo: how these labels were made, without thresholds by class; inference: settings of the teacher at that; held:
    what the row itself asked for; dataset: what the images are called.
    """

    matches: DetectionMatches
    pseudo: PseudoConfig
    inference: Mapping[str, Any]
    held: HeldPrecision
    dataset: str

    def groups(self, precision: float, error: float) -> list[GroupThreshold]:
        """Returns thresholds that hold a precision, see `precision_thresholds`.

        Raises:
            ValueError: no class is shown to hold it; says what comes nearest.
        """
        groups = precision_thresholds(self.matches, precision, error)
        if all(group.threshold is None for group in groups):
            best = max(groups, key=lambda group: group.bound)
            raise ValueError(
                f"--precision {precision:g}: no class is shown to hold it on {self.what()}; the nearest has "
                f"{best.num_right} of {best.num_labels} labels right (lower bound {best.bound:.2f}). Ask for less, "
                "raise --precision-error, or label more images"
            )
        return groups

    def what(self) -> str:
        """Returns in words which images the teacher was calibrated on, and how."""
        folds = self.held.num_folds
        how = f"by {folds} teachers, each trained on the others" if folds > 1 else "that it was not trained on"
        return f"{self.held.num_images} labelled images of {self.dataset}, scored {how}"


def find_calibration(source: str) -> Calibration:
    """Reads what a row's teacher was calibrated on.

    Args:
        source: `runs/<name>/<row>`, a row whose recipe has `pseudo.precision`.

    Raises:
        ValueError: it is no such row, or its file is not there or cannot be read.
    """
    expected = "expected a row runs/<name>/<row> whose recipe has pseudo.precision: such a row keeps what its teacher "
    expected += "was calibrated on"
    try:
        _, result = follow_row(source, "teacher", TEACHER_STAGES)
    except ValueError as error:
        raise ValueError(f"--precision with --teacher {source}: {error}; {expected}") from None
    stage = None if result is None else result.stage(LABELS_OF_TEACHER)
    if result is None or stage is None or stage.held_precision is None:
        raise ValueError(f"--precision with --teacher {source}: {expected}")
    file = join(absolute(stage.artifact), CALIBRATION)
    try:
        matches = load_matches(read_bytes(file))
        pseudo = PseudoConfig(**{**result.setting("pseudo"), "precision": None})
    except (OSError, ValidationError, TypeError) as error:
        raise ValueError(
            f"--precision with --teacher {source}: {file} or its settings cannot be read: {error}"
        ) from None
    inference = result.setting("teacher.inference") or {}
    name = result.setting("data.root") or result.setting("preset") or "an unknown dataset"
    return Calibration(matches, pseudo, inference, stage.held_precision, str(name))


def threshold_lines(groups: list[GroupThreshold], names: list[str]) -> list[str]:
    """Returns a line of words for each group: its classes, their threshold and what it was chosen on."""
    lines = []
    for group in groups:
        classes = ", ".join(names[label] for label in group.labels)
        right = f"{group.num_right} of {group.num_labels} labels right, lower bound {group.bound:.2f}"
        if group.threshold is None:
            lines.append(f"{classes}: left unlabelled ({right})")
        else:
            lines.append(f"{classes}: score {group.threshold:.2f} or more ({right})")
    return lines


def least_scores(groups: list[GroupThreshold]) -> dict[int, float]:
    """Returns class label -> least score, of the classes that are labelled."""
    return {label: least for label, least in thresholds_of_classes(groups).items() if least is not None}
