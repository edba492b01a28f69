"""Streams of whole images, decoded and resized as a model sees them, to label or to evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray.data

from cast_ray.recipe import InputSize, RuntimeConfig
from cast_ray.runtime.data.block_source import Rows, block_dataset, iter_blocks
from cast_ray.runtime.data.record_tables import Records, is_held_here, record_at

IMAGES_PER_TASK = 16
"""Images of one block that are fitted into a model's crop."""
NATIVE_IMAGES_PER_TASK = 4
"""The same of images of their own size, which may be large: 6 MB each at 1024 x 2048."""
PICTURE_SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("pixels", pa.large_binary()),
        *((f"{of}{side}", pa.int32()) for of in ("", "fit_", "padded_") for side in ("height", "width")),
        ("error", pa.string()),
    ]
)


class Handout(Protocol):
    """Shares blocks out among the streams of several processes: a task takes the next one when it starts."""

    def take(self, count: int) -> int | None:
        """Returns the next number below `count`, which no other task is given; None: all are taken."""

    def num_taken(self) -> int:
        """How many the tasks of this stream have taken."""


@dataclass(frozen=True)
class Pictures:
    """A few images ready for inference, in the order of their positions.

    positions [n]; pixels: n of uint8 [3, H, W], which need not have one size; image_hw, resized_hw: their own sizes and
    those inside the padding, pixels; bad: position and reason (naming the file) of images that could not be read, where
    that was asked for.
    """

    positions: list[int]
    pixels: list[np.ndarray]
    image_hw: list[tuple[int, int]]
    resized_hw: list[tuple[int, int]]
    bad: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def of(cls, block: pa.Table) -> Pictures:
        """The rows of a block of a `picture_dataset`."""
        errors = zip(block.column("position").to_pylist(), block.column("error").to_pylist())
        bad = [(position, error) for position, error in errors if error is not None]
        good = block.filter(pa.compute.is_null(block.column("error"))) if bad else block
        padded, image_hw, resized_hw = (_sizes(good, name) for name in ("padded_", "", "fit_"))
        values = (np.frombuffer(b.as_buffer(), np.uint8) for b in good.column("pixels"))
        pixels = [value.reshape(3, *size) for value, size in zip(values, padded)]
        return cls(good.column("position").to_pylist(), pixels, image_hw, resized_hw, bad)


def _sizes(table: pa.Table, prefix: str) -> list[tuple[int, int]]:
    return list(zip(*(table.column(f"{prefix}{side}").to_pylist() for side in ("height", "width"))))


def picture_dataset(
    records: ray.ObjectRef,
    indices: np.ndarray,
    input_size: InputSize,
    runtime: RuntimeConfig,
    blocks: list[Rows],
    skip_bad: bool = False,
) -> ray.data.Dataset:
    """Images decoded and resized as a model sees them: rows of position (in `indices`), pixels and sizes
    (PICTURE_SCHEMA).

    Args:
        blocks: ranges of positions, each a block.
        skip_bad: an image that cannot be read has its reason in the column `error`; else it ends the stream.
    """
    fit = partial(_fit_images, records=records, indices=indices, input_size=input_size, skip_bad=skip_bad)
    return block_dataset(blocks, ray.put(fit), runtime)


def read_pictures(
    records: Records,
    indices: np.ndarray,
    input_size: InputSize,
    runtime: RuntimeConfig,
    blocks: list[Rows] | None = None,
    skip_bad: bool = False,
    handout: Handout | None = None,
) -> Iterator[Pictures]:
    """Yields images ready for inference, block by block: from a `picture_dataset`, or read in this process where it
    holds the records itself.

    Args:
        blocks: ranges of positions in `indices`, each a block; None: all of them.
        skip_bad: an image that cannot be read is among `Pictures.bad`; else it ends the stream.
        handout: shares the blocks out among several such streams, each of which is given all of them.

    Raises:
        ValueError: an image cannot be read (without `skip_bad`; from a task of Ray Data it comes wrapped by Ray).
    """
    if blocks is None:
        step = images_per_task(input_size)
        blocks = [(start, min(start + step, len(indices))) for start in range(0, len(indices), step)]
    fit = partial(_fit_images, records=records, indices=indices, input_size=input_size, skip_bad=skip_bad)
    if is_held_here(records):
        assert handout is None
        yield from (Pictures.of(fit(*rows)) for rows in blocks)
    elif handout is None:
        yield from map(Pictures.of, iter_blocks(block_dataset(blocks, ray.put(fit), runtime)))
    else:
        take = partial(_fit_next, fit=fit, blocks=blocks, handout=handout)
        tables = iter_blocks(block_dataset(blocks, ray.put(take), runtime))
        yield from map(Pictures.of, _those_taken(tables, handout))


def _fit_next(
    start: int, stop: int, *, fit: Callable[[int, int], pa.Table], blocks: list[Rows], handout: Handout
) -> pa.Table:
    """The next block that no stream has taken, whichever rows the task was planned for; no rows: all are taken."""
    number = handout.take(len(blocks))
    return PICTURE_SCHEMA.empty_table() if number is None else fit(*blocks[number])


def _those_taken(tables: Iterator[pa.Table], handout: Handout) -> Iterator[pa.Table]:
    """The blocks that this stream has taken; it ends with the last one, though tasks that find nothing may be left."""
    num_given, num_taken = 0, None
    for table in tables:
        if table.num_rows:
            num_given += 1
            yield table
        elif num_taken is None:  # all blocks are taken, so this number is final
            num_taken = handout.num_taken()
        if num_given == num_taken:
            return


def images_per_task(input_size: InputSize) -> int:
    """Images of one block of a `picture_dataset`."""
    return IMAGES_PER_TASK if input_size.is_fixed else NATIVE_IMAGES_PER_TASK


def _fit_images(
    start: int, stop: int, *, records: Records, indices: np.ndarray, input_size: InputSize, skip_bad: bool
) -> pa.Table:
    rows = []
    for position in range(start, stop):
        try:
            rows.append(_fit_image(position, record_at(records, indices[position]), input_size))
        except ValueError as error:
            if not skip_bad:
                raise
            rows.append({"position": position, "error": str(error)})
    return pa.Table.from_pylist(rows, schema=PICTURE_SCHEMA)


def _fit_image(position: int, record: dict[str, Any], input_size: InputSize) -> dict[str, Any]:
    from cast_ray.data.reading.images import read_image
    from cast_ray.data.views import fit_image

    image = read_image(record["uri"], (record["height"], record["width"]))
    pixels, (fit_height, fit_width) = fit_image(image, input_size)
    height, width = image.shape[:2]
    return {
        "position": position,
        "pixels": pixels.tobytes(),
        "height": height,
        "width": width,
        "fit_height": fit_height,
        "fit_width": fit_width,
        "padded_height": pixels.shape[1],
        "padded_width": pixels.shape[2],
        "error": None,
    }
