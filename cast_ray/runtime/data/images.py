"""The images of a stage, by reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import ray.data

from cast_ray.contracts.records import Category


@dataclass(frozen=True)
class Images:
    """The images of a stage, by reference: tables in the object store and the rows that count as D_l and D_u.

    labels: pseudo-labels of D_u, row i belonging to unlabelled[i]; None where no term reads them.
    """

    records: ray.ObjectRef
    labelled: np.ndarray
    unlabelled: np.ndarray
    categories: tuple[Category, ...]
    labels: ray.ObjectRef | None = None
