"""Record tables in the object store: one copy a node, read in place by all tasks there."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pyarrow as pa
import ray

from cast_ray.contracts.records import pieces_of
from cast_ray.runtime.store.artifacts import ArtifactStore


def read_records(store: ArtifactStore, key: str, names: tuple[str, ...]) -> pa.Table:
    """Reads record tables, one after the other, as one.

    It comes in few large chunks, because looking a record up costs time for each chunk.
    """
    return pa.concat_tables([piece for name in names for piece in pieces_of(store.read_table(key, name))])


# Not inside the placement group of whoever asks for it, which may hold nothing but a driver.
@ray.remote(num_cpus=0.01, scheduling_strategy="DEFAULT")
def load_records(store: ArtifactStore, key: str, names: tuple[str, ...]) -> pa.Table:
    """Puts record tables into the object store, see `read_records`, past the memory of who asks for them."""
    return read_records(store, key, names)


@lru_cache(maxsize=16)
def fetched(ref: ray.ObjectRef) -> Any:
    """An object of the store inside a Data task or actor: tables are zero-copy, functions unpickled once."""
    return ray.get(ref)


def record_at(ref: ray.ObjectRef, index: int) -> dict[str, Any]:
    """One record as Python values, inside a Data task or actor."""
    return fetched(ref).slice(int(index), 1).to_pylist()[0]
