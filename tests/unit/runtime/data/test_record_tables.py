"""Record tables of any size: masks that take more than 2 GiB, which Arrow cannot join, are looked up in chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from cast_ray.contracts import records
from cast_ray.contracts.records import RECORD_SCHEMA, instance_rows, pieces_of, take_rows
from cast_ray.data.formats import coco
from cast_ray.data.splits.fractions import label_index
from cast_ray.plan.graph import Stage
from cast_ray.runtime.data.record_tables import read_records
from cast_ray.runtime.store.artifacts import ArtifactStore

LABELS = Stage("label-teacher", "label", {}, {}, "a" * 20)
PARTS, RECORDS_PER_PART, MASK_BYTES = 22, 100, 1_000_000
"""2.2 GB of masks."""


def record(number: int, masks: list[bytes]) -> dict[str, Any]:
    instances = [
        {"category_id": number % 3, "rle": mask, "score": 1.0, "is_crowd": False, "area": None} for mask in masks
    ]
    return {"image_id": str(number), "uri": f"{number}.png", "height": 4, "width": 5, "instances": instances}


@pytest.fixture
def table() -> pa.Table:
    """Nine records in three chunks."""
    rows = [record(i, [b"%d" % i] * (i % 4)) for i in range(9)]
    return pa.concat_tables([pa.Table.from_pylist(rows[i : i + 3], schema=RECORD_SCHEMA) for i in (0, 3, 6)])


def test_rows_are_taken_across_chunks_in_the_order_asked_for(table: pa.Table) -> None:
    for rows in ([], [8], [0, 1, 2, 3], [7, 0, 5, 5, 1], list(range(9))):
        assert take_rows(table, rows).equals(table.take(pa.array(rows, pa.int64()))), rows
    assert take_rows(table.slice(2), np.array([0, 6])).to_pylist() == [table.to_pylist()[i] for i in (2, 8)]


def test_pieces_are_whole_chunks_up_to_a_size(table: pa.Table) -> None:
    assert [piece.num_rows for piece in pieces_of(table)] == [9]
    assert [piece.num_rows for piece in pieces_of(table, 1)] == [3, 3, 3]  # a chunk is never cut
    assert pa.concat_tables(pieces_of(table, 1)).equals(table)
    assert [piece.num_rows for piece in pieces_of(table.slice(0, 0))] == [0]


def test_each_instance_knows_its_row(table: pa.Table) -> None:
    assert instance_rows(table.column("instances")).tolist() == [i for i in range(9) for _ in range(i % 4)]
    assert label_index(table).equals(label_index(table.combine_chunks()))


def test_a_table_is_loaded_in_chunks(table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(str(tmp_path))
    for part in range(3):
        with store.open_to_add(LABELS, f"train.parquet/{part:05d}.parquet") as file:
            pa.parquet.write_table(table.slice(3 * part, 3), file)
    store.commit(LABELS, {})
    assert read_records(store, LABELS.key, ("train.parquet",)).column("instances").num_chunks == 1
    monkeypatch.setattr(records, "MAX_CHUNK_BYTES", 100)
    loaded = read_records(store, LABELS.key, ("train.parquet", "train.parquet"))
    assert loaded.column("instances").num_chunks == 6
    assert loaded.slice(13, 1).to_pylist() == table.slice(4, 1).to_pylist()


@pytest.mark.parametrize("limit", [1, 3, 8, 1 << 30])
def test_the_instances_of_an_annotation_file_come_in_chunks(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(coco, "MAX_CHUNK_BYTES", limit)
    rows, masks = [3, 0, 0, 2, 3], [b"aa", b"bbb", b"c", b"dddd", b"e"]
    lists = coco._instance_lists(5, rows, [1, 2, 3, 4, 5], masks, [False] * 5, [None] * 5)
    assert [[i["rle"] for i in image] for image in lists.to_pylist()] == [
        [b"bbb", b"c"],
        [],
        [b"dddd"],
        [b"aa", b"e"],
        [],
    ]
    assert [[i["category_id"] for i in image] for image in lists.to_pylist()] == [[2, 3], [], [4], [1, 5], []]
    assert (lists.num_chunks == 1) == (limit > 11)
    assert coco._instance_lists(0, [], [], [], [], []).to_pylist() == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_more_than_two_gibibytes_of_masks(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    mask = np.random.default_rng(0).integers(48, 112, MASK_BYTES, dtype=np.uint8).tobytes()
    for part in range(PARTS):
        numbers = range(part * RECORDS_PER_PART, (part + 1) * RECORDS_PER_PART)
        rows = [record(i, [b"%08d" % i + mask[8:]]) for i in numbers]
        with store.open_to_add(LABELS, f"train.parquet/{part:05d}.parquet") as file:
            pa.parquet.write_table(pa.Table.from_pylist(rows, schema=RECORD_SCHEMA), file)
    # One file as well, as the labels of a stage are.
    with store.open_to_add(LABELS, "labels.parquet") as file, pa.parquet.ParquetWriter(file, RECORD_SCHEMA) as writer:
        for part in range(PARTS):
            writer.write_table(store.read_table(LABELS.key, f"train.parquet/{part:05d}.parquet"))
    store.commit(LABELS, {})
    for name in ("train.parquet", "labels.parquet"):
        loaded = read_records(store, LABELS.key, (name,))
        assert loaded.num_rows == PARTS * RECORDS_PER_PART and loaded.nbytes > 2**31
        assert loaded.column("instances").num_chunks <= 4
        for row in (0, 1234, loaded.num_rows - 1):
            (found,) = loaded.slice(row, 1).to_pylist()
            assert found["image_id"] == str(row) and found["instances"][0]["rle"][:8] == b"%08d" % row
        taken = take_rows(loaded, [2100, 5])
        assert taken.column("image_id").to_pylist() == ["2100", "5"]
        assert label_index(loaded).num_rows == loaded.num_rows
        del loaded, taken
