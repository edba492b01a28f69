"""What a sweep's broker writes down in the store, so that the one that Ray starts in its place continues the sweep.

    <storage>/claims/brokers/rows-<number>~<holder>    rows that were left with it, as `Broker.load` was given them
    <storage>/claims/brokers/state~<holder>            what it knew when it last wrote this file

Leases are not written down. Worker groups are descendants of the broker's process and end with it, so nothing runs that
a lease could protect, except labelling jobs, whose drivers announce them (`Broker.adopt`). Every other driver finds its
worker group gone and asks for work again; what was committed meanwhile is found in the store when a stage is claimed.
"""

from __future__ import annotations

import json
import logging
import pickle
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.claims import BROKERS, SEPARATOR

logger = logging.getLogger(__name__)


@dataclass
class BrokerState:
    """What a broker knows that neither the rows' drivers nor the store can tell again.

    num_lost: brokers that this sweep has lost; finished: fingerprints of the stages that were finished since the sweep
    began, in order; device_s, device_s_by: device-seconds spent, and by which row; outcomes, ended: of the rows that
    have ended; failed: fingerprint -> reason of the stages that would fail again; num_expected, stored_device_s: see
    `Broker.expect`.
    """

    num_lost: int = 0
    finished: list[str] = field(default_factory=list)
    device_s: float = 0.0
    device_s_by: dict[str, float] = field(default_factory=dict)
    outcomes: list[bool] = field(default_factory=list)
    ended: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    num_expected: int = 0
    stored_device_s: dict[str, float] = field(default_factory=dict)


class BrokerMemory:
    """The files of one sweep's broker.

    Args:
        holder: in whose name the sweep claims stages.
    """

    def __init__(self, store: ArtifactStore, holder: str):
        self.store, self.suffix = store, f"{SEPARATOR}{holder}"
        self.num_loads = 0

    def _path(self, name: str) -> str:
        return f"{BROKERS}/{name}{self.suffix}"

    def recall(self) -> tuple[BrokerState, dict[str, bytes]] | None:
        """What the broker before this one has written: its state and its rows; None: there was none."""
        written = self.store.find_bytes(self._path("state"))
        if written is None:
            return None
        known = {each.name for each in fields(BrokerState)}
        state = BrokerState(**{name: value for name, value in json.loads(written).items() if name in known})
        rows: dict[str, bytes] = {}
        for name in self.store.list_names(BROKERS):
            if name.startswith("rows-") and name.endswith(self.suffix):
                self.num_loads += 1
                rows |= pickle.loads(self.store.find_bytes(f"{BROKERS}/{name}") or pickle.dumps({}))
        return state, {name: row for name, row in rows.items() if name not in state.ended}

    def keep_rows(self, rows: dict[str, bytes]) -> None:
        """Adds rows to those that are written down."""
        self.num_loads += 1
        self._write(f"rows-{self.num_loads:06d}", pickle.dumps(rows))

    def keep(self, state: BrokerState) -> None:
        """Replaces the state that is written down."""
        self._write("state", json.dumps(asdict(state)).encode())

    def _write(self, name: str, data: Any) -> None:
        try:
            self.store.write_bytes(self._path(name), data)
        except OSError as error:  # the sweep itself needs none of it, unless its broker is lost
            logger.warning("what the sweep's broker knows could not be written down: %s", error)
