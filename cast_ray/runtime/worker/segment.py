"""A segment: the consecutive stages of a row that one worker group runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import ray

from cast_ray.contracts.records import Category
from cast_ray.plan.graph import Stage
from cast_ray.recipe import Recipe
from cast_ray.runtime.data.images import Images
from cast_ray.runtime.store.artifacts import ArtifactStore

MAX_PART = 80
"""Characters of a run's name that sweep and row each may take: a folder's name has at most 255 bytes."""


@dataclass
class Segment:
    """What one worker group is told to do."""

    owner: str
    sweep: str
    """Name of the run that the row belongs to, for people."""
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
        """Name of the run in Ray Train of a worker group that is started for this segment, shown on the dashboard:
        sweep, row, stages and attempt. The group may serve other rows later.

        Every attempt has a name of its own: an interrupted run of the same stages may still be going down. The name is
        also that of a folder, so its parts are cut to what a file system allows.
        """
        names = dict.fromkeys((self.stages[0].name, self.stages[-1].name))
        parts = [self.sweep[:MAX_PART], self.owner[-MAX_PART:], "-to-".join(names), self.store.attempt]
        return "__".join(re.sub(r"[^\w.+=-]", "-", part, flags=re.ASCII) for part in parts)


class SweepStopped(RuntimeError):
    """Nothing more may start in this sweep; its broker says why when it is asked for the next stage."""


class SegmentFailed(RuntimeError):
    """A stage raised an error that restarting its workers cannot mend; carries the workers' traceback."""
