"""Everything that an interrupted stage needs in order to resume as if it had not stopped."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

FILE = "train_state.pt"


@dataclass
class TrainState:
    """A stage after `step` optimiser steps.

    Random numbers are drawn from generators seeded by the stage's seed and the step, and the data plan is a function of
    the step, so the step is also the position of the schedule, the temperature, the data and the random state. Nothing
    here depends on the number of workers: another number of them may continue.
    """

    fingerprint: str
    step: int
    network: dict[str, torch.Tensor]
    average: dict[str, Any] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    curve: list[dict[str, float]] = field(default_factory=list)
    diagnostics: list[dict[str, float]] = field(default_factory=list)
    recent: list[torch.Tensor] = field(default_factory=list)
    """Term means of the steps since the last curve entry, so that the next entry covers them too."""
    seconds: float = 0.0
    num_skipped: int = 0
    """Steps that float16 overflowed in."""

    def save(self, folder: str | Path) -> None:
        torch.save(vars(self), Path(folder) / FILE)

    @classmethod
    def load(cls, folder: str | Path, fingerprint: str) -> TrainState | None:
        """The state in `folder`, or None when it is another stage's."""
        state = cls(**torch.load(Path(folder) / FILE, map_location="cpu", weights_only=True))
        return state if state.fingerprint == fingerprint else None
