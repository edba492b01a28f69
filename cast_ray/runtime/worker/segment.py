"""A segment: the consecutive stages of a row that one worker group runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from cast_ray.contracts.records import Category
from cast_ray.plan.graph import Stage
from cast_ray.recipe import Recipe
from cast_ray.runtime.data.images import Images
from cast_ray.runtime.store.artifacts import ArtifactStore


@dataclass
class Segment:
    """What one worker group is told to do."""

    owner: str
    stages: list[Stage]
    recipe: Recipe
    store: ArtifactStore
    broker: Any
    categories: tuple[Category, ...]
    images: dict[str, Images]
    """Stage name -> its images (train and label stages); pseudo-labels are added when the stage begins."""
    val: ray.ObjectRef | None
    num_val: int
    requested: float
    """When the row's driver asked for the worker group (time.time())."""

    @property
    def run_name(self) -> str:
        """Name of the run in Ray Train of a worker group that is started for this segment.

        Every attempt has one of its own: an interrupted run of the same stages may still be going down.
        """
        return f"{self.stages[0].fingerprint[:8]}-{self.store.attempt}"


class SweepStopped(RuntimeError):
    """Nothing more may start in this sweep; its broker says why when it is asked for the next stage."""


class SegmentFailed(RuntimeError):
    """A stage raised an error that restarting its workers cannot mend; carries the workers' traceback."""
