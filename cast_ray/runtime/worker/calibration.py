"""Labels of D_l by teachers that were not trained on their images, on which a label stage chooses its thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cast_ray.contracts.held_precision import GroupPrecision, HeldPrecision
from cast_ray.contracts.records import ClassMap
from cast_ray.data.splits.folds import fold_rows
from cast_ray.evaluation.label_audit import match_labels
from cast_ray.evaluation.matches import DetectionMatches, join
from cast_ray.evaluation.precision_thresholds import GroupThreshold
from cast_ray.plan.graph import Stage, artifact_key
from cast_ray.recipe import PseudoConfig
from cast_ray.runtime.data.images import Images
from cast_ray.runtime.data.record_tables import record_at
from cast_ray.runtime.store.artifact_files import LABELS
from cast_ray.runtime.store.artifacts import ArtifactStore

IMAGES_AT_ONCE = 64


def calibration_matches(store: ArtifactStore, stage: Stage, images: Images) -> DetectionMatches:
    """Returns the labels of all folds of D_l, matched to the truth; image i is `images.labelled[i]`.

    Images that no teacher could read have no label.

    Args:
        store: holds the label stages of the folds.
        stage: label stage whose parents these are.
        images: of that stage.
    """
    classes, folds = ClassMap(images.categories), stage.held_out
    parts = [match_labels([], [], classes)]
    rows = [np.arange(0)]
    for index, fingerprint in enumerate(folds):
        places = fold_rows(len(images.labelled), index, len(folds))
        for batch in store.read_table(artifact_key("label", fingerprint), LABELS).to_batches(IMAGES_AT_ONCE):
            labels = batch.to_pylist()
            mine = places[[row["position"] for row in labels]]
            truth = [record_at(images.records, images.labelled[place]) for place in mine]
            parts.append(match_labels(truth, labels, classes))
            rows.append(mine)
    return join(parts, rows, num_images=len(images.labelled))


def held_precision(
    groups: Sequence[GroupThreshold], names: Sequence[str], pseudo: PseudoConfig, num_images: int, num_folds: int
) -> HeldPrecision:
    """Returns what a manifest says of thresholds that hold a precision.

    Args:
        names: of the classes, by label.
        num_images: |D_l|.
        num_folds: teachers that labelled D_l.
    """
    assert pseudo.precision is not None
    return HeldPrecision(
        precision=pseudo.precision,
        error=pseudo.precision_error,
        num_images=num_images,
        num_folds=num_folds,
        groups=tuple(
            GroupPrecision(
                classes=tuple(names[label] for label in group.labels),
                threshold=group.threshold,
                num_labels=group.num_labels,
                num_right=group.num_right,
                bound=group.bound,
                num_images=group.num_images,
            )
            for group in groups
        ),
    )
