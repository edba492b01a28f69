"""The images of a stage, by reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cast_ray.contracts.records import Category
from cast_ray.runtime.data.record_tables import Records, table_of


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
