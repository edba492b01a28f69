"""From an index to records: every label map and image file read once, in parallel, bad ones set aside."""

from __future__ import annotations

import hashlib
import os
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cast_ray.common import registry
from cast_ray.common.text import first_line
from cast_ray.contracts.records import RECORD_SCHEMA, Category, DatasetSplits, decode_image_id
from cast_ray.data.reading.copies import Copies, blind_spot, identity_of
from cast_ray.data.reading.data_report import Contents, check_report, data_report
from cast_ray.data.reading.images import ImageError, check_image, read_map
from cast_ray.data.reading.index import DatasetIndex, DecodeMap, ReadInstances, ReadOutcome, Skipped
from cast_ray.data.reading.photos import describe_left_out
from cast_ray.recipe import DataConfig

IMAGES_PER_BLOCK = 32

_SKIPPED = pa.struct([(name, pa.string()) for name in ("kind", "id", "file", "reason")])
READ_SCHEMA = pa.schema(
    [
        *RECORD_SCHEMA,
        ("split", pa.string()),
        ("usable", pa.bool_()),
        ("digest", pa.binary()),  # of everything about the image that can change a result
        ("identity", pa.binary()),  # see `copies`
        ("num_annotations", pa.int64()),  # found in its label map
        ("skipped", pa.list_(_SKIPPED)),
    ]
)

MakeRows = Callable[[pa.Table], pa.Table]
Run = Callable[[MakeRows, list[pa.Table]], Iterator[pa.Table]]
"""Applies a function to blocks and yields what it returns, in order, cut and joined as it likes."""


def read_rows(rows: pa.Table, *, read_instances: ReadInstances | None, verify: str, max_pixels: int) -> pa.Table:
    """Reads a few images of an index: INDEX_SCHEMA -> READ_SCHEMA, a row for each, the unusable ones marked.

    Args:
        rows: images of one split.
        read_instances: reads what lies at a `mask_uri`, where the format has them.
        verify: see DataConfig; an image whose size is not known is opened whatever it says.
        max_pixels: larger images are unusable.

    Raises:
        OSError: the file store failed, which says nothing about the images.
    """
    return pa.Table.from_pylist(
        [_read_row(r, read_instances, verify, max_pixels) for r in rows.to_pylist()], READ_SCHEMA
    )


def _read_row(
    row: dict[str, Any], read_instances: ReadInstances | None, verify: str, max_pixels: int
) -> dict[str, Any]:
    image_hw = (row["height"], row["width"]) if row["height"] is not None else None
    skipped: list[dict[str, str]] = []
    num_annotations = 0
    usable = True
    content = b""
    try:
        if row["num_bytes"] == 0:
            raise ImageError(row["uri"], "the file is empty")
        if verify != "none" or image_hw is None:
            image_hw, content = check_image(row["uri"], image_hw, max_pixels, decode=verify == "full")
        if row["mask_uri"] is not None:
            assert read_instances is not None and image_hw is not None
            try:
                row["instances"], unknown = read_instances(row["mask_uri"], image_hw)
            except ImageError:
                raise
            except ValueError as error:
                raise ImageError(row["mask_uri"], str(error)) from None
            num_annotations = len(row["instances"]) + len(unknown)
            skipped += [{"kind": "annotation", "id": i, "file": row["file"], "reason": reason} for i, reason in unknown]
        row["height"], row["width"] = image_hw
    except ImageError as error:
        usable = False
        skipped = [
            {"kind": "image", "id": str(decode_image_id(row["image_id"])), "file": row["file"], "reason": error.reason}
        ]
    result = {name: row[name] for name in (*RECORD_SCHEMA.names, "split")}
    facts = {"usable": usable, "num_annotations": num_annotations, "skipped": skipped}
    if not usable:
        return result | facts | {"digest": None, "identity": None}
    return result | facts | {"digest": _digest(row, content), "identity": identity_of(content, row["uri"])}


def _read_map(uri: str, image_hw: tuple[int, int], decode_map: DecodeMap) -> ReadOutcome:
    try:
        return decode_map(read_map(uri, image_hw))
    except ImageError as error:
        raise ImageError(uri, f"its label map: {error.reason}") from None
    except ValueError as error:
        raise ImageError(uri, f"its label map: {error}") from None


def _digest(row: dict[str, Any], content: bytes) -> bytes:
    """Identity of an image and its instances, wherever the file lies: copies of a dataset on other disks are one.

    Args:
        content: sha256 of the file; b"" where it was not read whole: then the number of its bytes stands for it.
    """
    facts = [row["image_id"], content or row["num_bytes"], row["height"], row["width"]]
    instances = row["instances"]
    if instances is not None:
        facts += [(i["category_id"], i["is_crowd"], i["rle"], i["area"]) for i in instances]
    return hashlib.sha256(repr((facts, instances is None)).encode()).digest()


def in_threads(make: MakeRows, blocks: list[pa.Table]) -> Iterator[pa.Table]:
    """Runs blocks in this process; Pillow's decoders release the interpreter lock."""
    num_threads = min(16, os.cpu_count() or 1)
    if num_threads == 1:
        yield from map(make, blocks)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        ahead: deque[Future[pa.Table]] = deque()  # bounded: what was read and not yet taken is in memory
        for block in blocks:
            ahead.append(pool.submit(make, block))
            if len(ahead) > 2 * num_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class Reading:
    """One pass over an index.

    Iterate `tables` to the end; then `skipped`, `num_images`, `num_annotations`, `contents` and the hashes are
    complete.
    """

    def __init__(self, index: DatasetIndex, config: DataConfig):
        self.index, self.config = index, config
        self.skipped: list[Skipped] = list(index.skipped)
        self.num_images = {split: index.num_images(split) for split in index.splits}
        self.num_annotations = {split: index.num_annotations.get(split, 0) for split in index.splits}
        self.contents: dict[str, Contents] = {}
        self._ignored_classes: dict[str, set[int]] = {split: set() for split in index.splits}
        self.copies = Copies(by_content=config.verify == "full")
        self._digests = {split: hashlib.sha256() for split in index.splits}

    def tables(
        self, run: Run = in_threads, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[str, pa.Table]]:
        """(split, records) in the order of the index, unusable images left out.

        Args:
            run: where the blocks are read.
            progress: called with (images read, images in all).

        Raises:
            RuntimeError: `run` lost or reordered images.
            OSError: the file store failed.
        """
        index = self.index
        assert "extra" not in list(index.splits)[:-1], "copies of all other images are left out of it"
        if index.content_hash:  # drawn here and hashed then
            for split, table in index.splits.items():
                yield split, self._count(split, table.select(RECORD_SCHEMA.names).cast(RECORD_SCHEMA))
            return
        make = partial(
            read_rows,
            read_instances=partial(_read_map, decode_map=index.decode_map)
            if index.decode_map
            else index.read_instances,
            verify=self.config.verify,
            max_pixels=self.config.max_image_pixels,
        )
        blocks = [
            table.slice(start, IMAGES_PER_BLOCK)
            for table in index.splits.values()
            for start in range(0, table.num_rows, IMAGES_PER_BLOCK)
        ]
        total, done = sum(block.num_rows for block in blocks), 0
        expected = (i for block in blocks for i in zip(*(block.column(n).to_pylist() for n in ("split", "image_id"))))
        for table in run(make, blocks):
            for row in zip(*(table.column(name).to_pylist() for name in ("split", "image_id"))):
                if row != next(expected, None):
                    raise RuntimeError(f"reading the dataset: image {row[1]} of {row[0]} is missing or out of order")
            done += table.num_rows
            if progress:
                progress(done, total)
            for split in dict.fromkeys(table.column("split").to_pylist()):
                yield split, self._take(split, table.filter(pc.equal(table.column("split"), split)))
        if done != total:
            raise RuntimeError(f"reading the dataset: {total} images went in, {done} came out")

    def _take(self, split: str, table: pa.Table) -> pa.Table:
        self.num_annotations[split] += pc.sum(table.column("num_annotations")).as_py()
        for entries in table.column("skipped").to_pylist():
            self.skipped += [{"split": split, **entry} for entry in entries]
        table = table.filter(table.column("usable"))
        names = ("identity", "uri")
        table = table.filter(pa.array(self.copies.add(split, *(table.column(name).to_pylist() for name in names))))
        for digest in table.column("digest").to_pylist():
            self._digests[split].update(digest)
        return self._count(split, table.select(RECORD_SCHEMA.names))

    def _count(self, split: str, records: pa.Table) -> pa.Table:
        instances = records.column("instances")
        if instances.null_count < len(instances):  # null: nobody knows what an image of the extra pool holds
            num_ignored = pc.sum(pc.struct_field(pc.list_flatten(instances), "is_crowd")).as_py() or 0
            num_objects = (pc.sum(pc.list_value_length(instances)).as_py() or 0) - num_ignored
            # A label map without an instance says that nothing is there; an annotation file may just not say what is.
            is_listed = self.index.decode_map is None and self.index.read_instances is None
            num_unmasked = pc.sum(pc.equal(pc.list_value_length(instances), 0)).as_py() or 0 if is_listed else 0
            before = self.contents.get(split, Contents(0, 0))
            counts = (num_objects, num_ignored, num_unmasked)
            self.contents[split] = Contents(*(old + new for old, new in zip(before, counts)))
            if not self.contents[split].num_objects:
                ids = pc.unique(pc.struct_field(pc.list_flatten(instances), "category_id")).to_pylist()
                self._ignored_classes[split] |= set(ids) & {category.id for category in self.index.categories}
        return records

    def _refusals(self) -> list[str]:
        """Why the dataset cannot be meant as it is, a sentence for each split that says so."""
        if self.index.refuse_ignored is None:
            return []
        return [
            f"{self.config.root} ({split}: {self.index.sources.get(split, '')}): no object in "
            f"{self.num_images[split]:,} images: {self.index.refuse_ignored(sorted(self._ignored_classes[split]))}"
            for split, held in self.contents.items()
            if not held.num_objects and self._ignored_classes[split]
        ]

    @property
    def content_hash(self) -> str:
        """Identity of all images and annotations but the extra pool's: sha256, the same wherever the files lie."""
        if self.index.content_hash:
            return self.index.content_hash
        parts = [(split, digest.hexdigest()) for split, digest in self._digests.items() if split != "extra"]
        parts += [("copies", copies)] if (copies := self.copies.digest()) else []
        return hashlib.sha256(repr((parts, self.index.categories)).encode()).hexdigest()

    @property
    def extra_hash(self) -> str:
        """Identity of the extra pool; empty without one."""
        return self._digests["extra"].hexdigest() if "extra" in self._digests else ""

    def report(self) -> dict[str, Any]:
        """What `data_report.json` says of it; before anything was read, of what the index skipped."""
        report = data_report(
            self.config,
            self.num_images,
            self.num_annotations,
            self.skipped,
            self.index.sources,
            self.contents,
            self.index.all_ignored_hint,
            self.index.held_out,
        )
        notes = [*self.copies.notes(), "" if self.index.content_hash else blind_spot(self.config.verify)]
        if self.index.left_out:
            notes.append(f"Left out of the extra pool's folder: {describe_left_out(self.index.left_out)}.")
        report["warnings"] += [*self.index.warnings, *self.copies.warnings()]
        return report | {
            "notes": [note for note in notes if note],
            "refusals": self._refusals(),
            "copies": self.copies.counts(),
            "left_out": dict(self.index.left_out),
        }


def read_index(config: DataConfig, progress: Callable[[int, int], None] | None = None) -> DatasetIndex:
    """Lists a dataset by the reader of its format, which may be a user's own.

    Raises:
        ValueError: one line naming the file or field: the dataset is missing or not of its format, or the format names
            something that is no reader, or fails.
    """
    try:
        read = registry.lookup("datasets", config.format)
    except ValueError as error:
        raise ValueError(f"data.format: {error}") from None
    try:
        index = read(config, progress)
    except (ValueError, OSError):
        raise
    except Exception as error:
        if ":" not in config.format:
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {first_line(error)} ({place.filename}, line {place.lineno})"
        raise ValueError(f"data.format {config.format!r}: the reader failed: {reason}") from error
    if not isinstance(index, DatasetIndex):
        raise ValueError(f"data.format {config.format!r}: expected a DatasetIndex back, got {type(index).__name__}")
    if missing := {"train", "val"} - index.splits.keys():
        raise ValueError(f"data.format {config.format!r}: no split {' and '.join(sorted(missing))} in its DatasetIndex")
    return index


def load(
    config: DataConfig, progress: Callable[[int, int], None] | None = None
) -> tuple[DatasetSplits, dict[str, Any]]:
    """A whole dataset in memory, read in this process, and what `data_report.json` says of it.

    Raises:
        ValueError: one line naming the file or field: the dataset is missing, not of its format, or too much of it is
            unusable.
    """
    index = read_index(config)
    reading = Reading(index, config)
    check_report(reading.report(), config.max_bad_fraction)
    tables: dict[str, list[pa.Table]] = {split: [RECORD_SCHEMA.empty_table()] for split in index.splits}
    for split, table in reading.tables(progress=progress):
        tables[split].append(table)
    report = reading.report()
    check_report(report, config.max_bad_fraction)
    splits = {split: pa.concat_tables(parts) for split, parts in tables.items()}
    dataset = DatasetSplits(
        train=splits["train"],
        val=splits["val"],
        source=splits.get("source"),
        extra=splits.get("extra"),
        categories=index.categories,
        content_hash=reading.content_hash,
        extra_hash=reading.extra_hash,
        skipped=tuple(reading.skipped),
        annotated=index.annotated,
    )
    return dataset, report


def load_images(config: DataConfig, split: str, num_images: int | None = None) -> tuple[pa.Table, tuple[Category, ...]]:
    """Reads the first images of one split alone, without a look at the files of the others.

    Args:
        config: of the dataset.
        split: train, val, or another one that the dataset has.
        num_images: so many; None: all.

    Returns:
        RECORD_SCHEMA rows without the unusable images, and the dataset's classes.

    Raises:
        ValueError: see `load`; here only the chosen images count.
    """
    index = read_index(config)
    chosen = index.splits[split].slice(0, num_images)
    names = set(chosen.column("file").to_pylist()) if num_images is not None else None
    skipped = [s for s in index.skipped if s["split"] == split and (names is None or s["file"] in names)]
    reading = Reading(replace(index, splits={split: chosen}, skipped=skipped, held_out=None), config)
    tables = [RECORD_SCHEMA.empty_table(), *(table for _, table in reading.tables())]
    check_report(reading.report(), config.max_bad_fraction)
    return pa.concat_tables(tables), index.categories
