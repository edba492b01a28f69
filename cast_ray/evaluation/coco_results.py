"""Detections in COCO results form: one list of JSON, written and read line by line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from cast_ray.contracts.instance import Instance
from cast_ray.contracts.records import Category, decode_image_id


def coco_results(
    image_ids: Sequence[str], found: Sequence[Sequence[Instance]], categories: Sequence[Category]
) -> Iterator[dict[str, Any]]:
    """Detections of a batch in COCO results form, with the dataset's own image and category ids.

    Args:
        image_ids: B record ids (JSON of the dataset's own).
        found: instances of each image, as `predict` returns them.

    Yields:
        One dict a detection: image_id, category_id, segmentation (RLE at the image's own size), score.
    """
    for image_id, instances in zip(image_ids, found, strict=True):
        for i in instances:
            yield {"image_id": decode_image_id(image_id), **coco_result(i, categories)}


def coco_result(instance: Instance, categories: Sequence[Category]) -> dict[str, Any]:
    """One detection in COCO results form, without the image's id.

    There is no `bbox`: beside a mask it would make pycocotools, faster-coco-eval and hotcoco sort the detection by the
    area of its box, which changes the AP of small, medium and large objects.

    Args:
        instance: an instance, as `Teacher.predict` returns it.

    Returns:
        category_id, segmentation (RLE at the image's own size), score (single precision, see `predict`).
    """
    return {
        "category_id": categories[instance["label"]].id,
        "segmentation": {"size": list(instance["size"]), "counts": instance["rle"].decode()},
        "score": float(np.float32(instance["score"])),
    }


def results_lines(results: Iterable[dict[str, Any]]) -> bytes:
    """One line of JSON a detection: what workers write piece by piece; see `results_document`."""
    return b"".join(json.dumps(result).encode() + b"\n" for result in results)


def results_document(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces of the results JSON, one list, of the lines of all workers."""
    yield b"["
    separator = b"\n"
    for line in lines:
        yield separator + line.rstrip(b"\n")
        separator = b",\n"
    yield b"\n]\n"


def results_of(document: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The detections of a results JSON, line by line, as `results_document` writes it: one on each line."""
    for line in document:
        text = line.strip().rstrip(b",")
        if text not in (b"", b"[", b"]"):
            yield json.loads(text)


_BLOCK_BYTES = 1 << 23
_EXPECTED = (
    "expected COCO results of masks, a list of objects with image_id, category_id, segmentation (size and counts) and "
    "score"
)


def result_schema(id_type: pa.DataType) -> pa.Schema:
    """COCO results as columns; what else a result holds is left out.

    Args:
        id_type: of image ids, int64 or string.
    """
    segmentation = pa.struct([("size", pa.list_(pa.int64())), ("counts", pa.binary())])
    columns = [("image_id", id_type), ("category_id", pa.int64()), ("segmentation", segmentation)]
    return pa.schema([*columns, ("score", pa.float64())])


def read_results(source: str | Path | BinaryIO) -> pa.Table:
    """Reads a file of COCO results of masks as columns, at a third of the memory of `json.load`.

    A file that `results_document` wrote, with one detection a line, is read in blocks; any other is loaded whole.

    Returns:
        `result_schema`, in the order of the file; image ids as they are, integers or strings.

    Raises:
        ValueError: the file is no list of results with `image_id`, `category_id`, `segmentation` and `score`.
    """
    if isinstance(source, str | Path):
        with open(source, "rb") as file:
            return read_results(file)
    start = source.tell()
    if source.readline().strip() == b"[":
        try:
            return _complete(_read_lines(source))
        except (pa.ArrowInvalid, json.JSONDecodeError, KeyError, TypeError):  # not one detection a line
            pass
    source.seek(start)
    return _complete(_as_columns(json.load(source)))


def _complete(table: pa.Table) -> pa.Table:
    segmentation = table.column("segmentation")
    columns = {name: table.column(name) for name in ("image_id", "category_id", "segmentation", "score")}
    columns |= {f"segmentation.{name}": pc.struct_field(segmentation, name) for name in ("size", "counts")}
    for name, column in columns.items():
        if column.null_count:
            i = pc.index(pc.is_null(column), True).as_py()
            raise ValueError(f"{_EXPECTED}: results[{i}] has no {name}")
    return table


def _read_lines(source: BinaryIO) -> pa.Table:
    tables: list[pa.Table] = []
    schema = None
    while block := bytearray(source.read(_BLOCK_BYTES)):
        block += source.readline()
        text = np.frombuffer(block, dtype=np.uint8)
        if schema is None:
            first = bytes(block[: block.find(b"\n")]).strip().rstrip(b",")
            is_text = first != b"]" and isinstance(json.loads(first)["image_id"], str)
            schema = result_schema(pa.string() if is_text else pa.int64())
        # The list's own commas and its end become spaces: what is left is one JSON object a line.
        last = np.flatnonzero(text == ord("\n")) - 1
        last = last[(last >= 0) & np.isin(text[last], list(b",]"))]
        text[last] = ord(" ")
        if not block.strip():
            continue
        tables.append(
            pyarrow.json.read_json(
                pa.BufferReader(block),
                read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
                parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
            )
        )
    return pa.concat_tables(tables) if tables else result_schema(pa.int64()).empty_table()


def _as_columns(results: Any) -> pa.Table:
    try:
        is_text = bool(results) and isinstance(results[0]["image_id"], str)
        return pa.Table.from_pylist(results, schema=result_schema(pa.string() if is_text else pa.int64()))
    except (pa.ArrowInvalid, pa.ArrowTypeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{_EXPECTED}: {str(error).splitlines()[0]}") from None
