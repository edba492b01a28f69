"""Thresholds that were chosen so that pseudo-labels hold a precision, as manifests and results keep them.

`evaluation.precision_thresholds` chooses them and says what is promised, and with which bound.
"""

from __future__ import annotations

from cast_ray.contracts.document import DocumentPart, Several

FOLD = "-fold"
"""Stands in the name of a stage before the number of the fold of D_l that its teacher is not trained on."""


def is_of_fold(stage: str) -> bool:
    """Returns whether the stage of this name is there only to choose the thresholds of another one."""
    return FOLD in stage


class GroupPrecision(DocumentPart):
    """One class, or several classes that are too small for a threshold of their own."""

    classes: Several[str]
    """Names of the classes."""
    threshold: float | None = None
    """Least score of a label; None: the precision could not be shown, and the classes are left unlabelled."""
    num_labels: int
    """Labels of D_l that reach the threshold; without one, of any score."""
    num_right: int
    """Those of them that are right at mask IoU 0.5."""
    bound: float
    """Lower confidence bound of the precision, 0..1."""
    num_images: int
    """Images of D_l with a label of these classes of any score."""

    @property
    def share_right(self) -> float | None:
        """Precision on D_l, 0..1: an estimate, from labels by teachers that were not trained on their images."""
        return self.num_right / self.num_labels if self.num_labels else None


class HeldPrecision(DocumentPart):
    """The thresholds of one label stage."""

    precision: float
    """The precision that was promised, 0..1."""
    error: float
    """Probability of each group that its precision is lower all the same."""
    num_images: int
    """Images of D_l."""
    num_folds: int
    """Teachers that labelled them, each a part that it was not trained on; 1: a teacher that was not trained on D_l."""
    groups: Several[GroupPrecision]

    @property
    def left_out(self) -> list[str]:
        """Names of the classes that are left unlabelled."""
        return [name for group in self.groups if group.threshold is None for name in group.classes]
