"""A row and seed as an experiment tracker shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrackedRow:
    """One row and seed as a tracker shows it. folder: of its run, for what a tracker keeps on this machine."""

    table: str
    row: str
    seed: int
    recipe: Mapping[str, Any]
    folder: str

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"


RowOf = Callable[[str], TrackedRow]
"""Name of a trial -> its row."""
