"""The images of a stage, by reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from cast_ray.contracts.records import Category
from cast_ray.plan.graph import Stage
from cast_ray.plan.stage_parts import StagePart, TrainPart
from cast_ray.runtime.data.record_tables import Records, table_of
from cast_ray.runtime.data.splits import stored_split
from cast_ray.runtime.store.artifacts import ArtifactStore


@dataclass(frozen=True)
class Images:
    """The images of a stage, by reference: record tables and the rows of them that count as D_l and D_u.

    labels: pseudo-labels of D_u, row i belonging to unlabelled[i]; None where no term reads them.
    """

    records: Records
    labelled: np.ndarray
    unlabelled: np.ndarray
    categories: tuple[Category, ...]
    labels: Records | None = None

    def with_labels(self, labels: Records) -> Images:
        """Returns the images with pseudo-labels of D_u; those that could not be labelled are left out of it."""
        positions = table_of(labels).column("position").to_numpy()
        return replace(self, unlabelled=self.unlabelled[positions], labels=labels)


def images_of(
    stage: Stage,
    tables: Callable[..., Records],
    store: ArtifactStore,
    content_hash: str,
    num_source: int,
    categories: tuple[Category, ...],
) -> Images:
    """Returns the images of a train or label stage, without pseudo-labels; all that is held of them is 8 bytes each.

    Args:
        tables: given names of the dataset's tables, returns these, one after the other, as one.
        store: holds the choice of D_l and D_u.
        content_hash: identity of the dataset.
        num_source: images of the dataset's source style.
        categories: classes of the dataset.
    """
    if stage.kind == "train" and TrainPart.of(stage).is_on_source:
        everything = np.arange(num_source)
        return Images(tables("source.parquet"), everything, everything[:0], categories)
    part = StagePart(stage.config)
    chosen = stored_split(store, content_hash, part.split)
    records = tables("train.parquet", *(["extra.parquet"] if part.reads_extra else []))
    return Images(records, chosen.labelled, chosen.unlabelled, categories)
