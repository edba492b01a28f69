"""Record tables by reference: in the object store, one copy a node that all tasks there read in place, or here.

A stage that runs without Ray (`worker/rerun.py`) holds its tables itself. Streams tell by them where to read images.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

import pyarrow as pa
import ray

from cast_ray.contracts.records import pieces_of
from cast_ray.runtime.store.artifacts import ArtifactStore

Records: TypeAlias = ray.ObjectRef | pa.Table
"""A table in the object store, or one that this process holds."""


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


def is_held_here(records: Records) -> bool:
    """Returns whether this process holds a table itself, so that it can be read without Ray."""
    return isinstance(records, pa.Table)


def table_of(records: Records) -> pa.Table:
    """Returns the table: fetched from the object store, unless this process holds it."""
    return records if is_held_here(records) else fetched(records)


@lru_cache(maxsize=16)
def fetched(ref: ray.ObjectRef) -> Any:
    """Returns an object of Ray's object store, which this process keeps: tables are read in place, functions unpickled
    once."""
    return ray.get(ref)


def record_at(records: Records, index: int) -> dict[str, Any]:
    """Returns one record as Python values."""
    return table_of(records).slice(int(index), 1).to_pylist()[0]
