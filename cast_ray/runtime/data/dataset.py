"""A sweep's dataset: read and checked image by image once, then kept in the store as record tables.

    <storage>/datasets/<what was asked for>.json    the folders it was found in, to see whether they have changed
    <storage>/artifacts/dataset-<key>/              record tables in parts, data_report.json

Fingerprints hold the hash of the content, not the key: a dataset that is read again from another disk, or with other
settings and the same outcome, is the same dataset.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from rich.console import Console
from rich.text import Text

from cast_ray.common.digest import digest_of
from cast_ray.common.paths import absolute
from cast_ray.common.text import first_line
from cast_ray.contracts.manifest import DatasetManifest
from cast_ray.contracts.records import MAX_CHUNK_BYTES, Category, class_names
from cast_ray.contracts.row_result import DatasetFacts
from cast_ray.data.reading.copies import Copies
from cast_ray.data.reading.data_report import REPORT_FILE, check_report
from cast_ray.data.reading.index import DatasetIndex, describe
from cast_ray.data.reading.listing import state_of
from cast_ray.data.reading.progress import track
from cast_ray.data.reading.reader import MakeRows, Reading, Run, in_threads, read_index
from cast_ray.data.splits.fractions import LabelSource, label_index, mark_copies
from cast_ray.data.splits.label_lists import LabelList, forms_of_skipped, read_list
from cast_ray.plan.graph import DataHashes, Stage, fingerprint_of
from cast_ray.recipe import DataConfig, Recipe
from cast_ray.recipe.part import OFF_BY_DEFAULT, identity_of, marked
from cast_ray.runtime.cluster import Cluster
from cast_ray.runtime.store.artifacts import ArtifactStore, LostFilesError

READER_VERSION = 2
"""Raise it when readers find other records in the same files: stored tables are then read again."""
IN_THIS_PROCESS = 2000
"""Images that are read before Ray is asked: fewer take less time than its start."""
IMAGES_PER_PART = 4096
ANNOTATED_FILE = "annotated.json"
LABEL_INDEX = "label_index"
"""Table of what a choice of labelled images reads: small enough for the driver, which the records are not."""

READ_FIELDS = frozenset(
    {"format", "root", "annotations", "val_annotations", "val_fraction", "image_dir", "val_image_dir", "crowds"}
    | {"extra_annotations", "extra_image_dir", "verify", "max_image_pixels", "max_bad_fraction", "shapes"}
)
"""Fields of DataConfig that decide which records are read; the rest chooses among them or crops them."""


@dataclass(frozen=True)
class StoredDataset:
    """A dataset in the store: all that a sweep needs to know before it asks for records.

    num_images: usable ones by split (train, val, source, extra); report: see `data_report.json`.
    """

    key: str
    content_hash: str
    extra_hash: str
    categories: tuple[Category, ...]
    num_images: dict[str, int]
    report: dict[str, Any]
    annotated: tuple[str, ...] | None = None
    _lists: dict[str, LabelList] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.key)

    @property
    def has_source(self) -> bool:
        return "source" in self.num_images

    @property
    def warnings(self) -> list[str]:
        """Splits without one object, a sentence each (see `data_report`)."""
        return self.report.get("warnings", [])

    def facts(self) -> DatasetFacts:
        """What every result says about the data."""
        num_train, num_val, num_source, num_extra = (
            self.num_images.get(split, 0) for split in ("train", "val", "source", "extra")
        )
        return DatasetFacts(
            artifact=self.key,
            content_hash=self.content_hash,
            num_train=num_train,
            num_val=num_val,
            num_source=num_source,
            num_extra=num_extra,
            skipped=len(self.report["skipped"]),
            skipped_statement=self.report["statement"],
            warnings=tuple(self.warnings),
            notes=tuple(self.report.get("notes", ())),
            classes=tuple(class_names(self.categories)),
        )

    def hashes(self, data: DataConfig) -> DataHashes:
        """Identity of the pool and lists that a recipe's data part names.

        Raises:
            ValueError: a list cannot be read.
        """
        lists = [self._list(file).sha256 if file else "" for file in (data.label_list, data.unlabelled_list)]
        return DataHashes(self.extra_hash if data.unlabelled_pool != "rest" else "", *lists)

    def source_of(self, data: DataConfig, store: ArtifactStore) -> LabelSource:
        """What the choice of labelled images reads beside the records."""
        extra: list[str] = []
        if data.unlabelled_pool != "rest":
            extra = store.read_table(self.key, "extra.parquet", columns=["image_id"]).column(0).to_pylist()
        return LabelSource(
            label_list=self._list(data.label_list) if data.label_list else None,
            unlabelled_list=self._list(data.unlabelled_list) if data.unlabelled_list else None,
            annotated=self.annotated,
            unusable=forms_of_skipped(self.report["skipped"]),
            extra_ids=extra,
        )

    def _list(self, file: str) -> LabelList:
        if file not in self._lists:
            self._lists[file] = read_list(file)
        return self._lists[file]


def read_dataset(
    recipes: Iterable[Recipe],
    store: ArtifactStore,
    console: Console,
    run_paths: Sequence[str],
    connect: Callable[[], Cluster],
) -> StoredDataset:
    """The dataset that all recipes of a sweep share: from the store where it was read before and has not changed.

    Args:
        run_paths: folders of the runs below the storage path; they get `data_report.json`, also when the dataset is
            refused.
        connect: starts or joins Ray; called for datasets of many images, which is given back when they are read.

    Raises:
        ValueError: the dataset is missing, not of its format, or too much of it is unusable (one line that names the
            file or field), or two recipes ask for different datasets.
    """
    data = _shared_part(recipes)
    if data.format == "shapes":
        data = _draw(data, store, console)
    asked = digest_of([READER_VERSION, _read_part(data)])
    report_paths = [f"{run_path}/{REPORT_FILE}" for run_path in run_paths]
    dataset = _find(data, asked, store) or _read(data, asked, store, console, report_paths, connect)
    _check(dataset.report, data, store, report_paths)
    for note in dataset.report.get("notes", []):
        console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if skipped := dataset.report["skipped"]:
        words = f" ({REPORT_FILE}), first: {describe(skipped, 1)}"
        console.print(Text.assemble((dataset.report["statement"], "yellow"), words))
    return dataset


def _shared_part(recipes: Iterable[Recipe]) -> DataConfig:
    """The data part of the recipes, with the extra pool where any of them uses it."""
    parts = [recipe.data for recipe in recipes]
    for part in parts:
        for name in sorted(READ_FIELDS):
            if getattr(part, name) != getattr(parts[0], name):
                raise ValueError(
                    f"data.{name} is {getattr(parts[0], name)!r} in one row and {getattr(part, name)!r} in another: "
                    "expected one dataset for all rows of a table"
                )
    wants_extra = any(part.unlabelled_pool != "rest" for part in parts)
    nested = {"label_family": "nested", "label_list": "", "unlabelled_list": ""}
    return parts[0].model_copy(update=nested | {"unlabelled_pool": "both" if wants_extra else "rest"})


def _draw(data: DataConfig, store: ArtifactStore, console: Console) -> DataConfig:
    from cast_ray.data.formats.shapes import draw

    shapes = data.shapes
    kind = "shapes" if shapes.layout == "scattered" else shapes.layout
    folder = f"{kind}-{shapes.num_source}-{shapes.num_train}-{shapes.num_val}-s{shapes.seed}"
    data = data.model_copy(update={"root": data.root or store.uri("datasets", folder)})
    with track(console, "drawing scenes") as progress:
        try:
            draw(data.root, shapes, progress=progress)
        except OSError as error:
            raise ValueError(f"data.root: scenes cannot be drawn into {data.root}: {first_line(error)}") from None
    return data


def _read_part(data: DataConfig) -> dict[str, Any]:
    # Without fields at their default: a field that is new does not make stored datasets be read again.
    off = set(marked(DataConfig, OFF_BY_DEFAULT)) - identity_of(data).keys()
    part = data.model_dump(include=set(READ_FIELDS) - {"max_bad_fraction"} - off)
    part |= {"shapes": identity_of(data.shapes)}
    return part | {"root": absolute(data.root), "extra": data.unlabelled_pool != "rest"}


def _find(data: DataConfig, asked: str, store: ArtifactStore) -> StoredDataset | None:
    """The dataset as read before, if nothing in its folders has changed since."""
    note = store.find_bytes(f"datasets/{asked}.json")
    if note is None:
        return None
    key = _stage(asked, state_of(absolute(data.root), json.loads(note)["folders"])).key
    if not store.has(key):
        return None
    return _stored(store, key)


def _check(report: dict[str, Any], data: DataConfig, store: ArtifactStore, report_paths: Sequence[str]) -> None:
    """Writes `data_report.json`, then refuses a dataset that is too bad."""
    for path in report_paths:
        store.write_json(path, report)
    try:
        check_report(report, data.max_bad_fraction)
    except ValueError as error:
        raise ValueError(f"{error} (all of them: {store.uri(report_paths[0])})") from None


def _stored(store: ArtifactStore, key: str) -> StoredDataset:
    manifest = store.manifest(key)
    assert isinstance(manifest, DatasetManifest)
    return StoredDataset(
        key=key,
        content_hash=manifest.content_hash,
        extra_hash=manifest.extra_hash,
        categories=tuple(Category(c.id, c.name) for c in manifest.categories),
        num_images=manifest.num_images,
        report=store.read_json(key, REPORT_FILE),
        annotated=tuple(store.read_json(key, ANNOTATED_FILE)) if manifest.has_positions else None,
    )


def _read(
    data: DataConfig,
    asked: str,
    store: ArtifactStore,
    console: Console,
    report_paths: Sequence[str],
    connect: Callable[[], Cluster],
) -> StoredDataset:
    """Reads every file once and commits the records, however few are usable: another limit needs no other read."""
    with track(console, "reading annotations") as progress:
        index = read_index(data, progress)
    stage = _stage(asked, index.listing.state())
    reading = Reading(index, data)
    _check(reading.report(), data, store, report_paths)  # before images are read for nothing
    parts = _Parts(store, stage)
    total = sum(table.num_rows for table in index.splits.values())
    with track(console, "reading images") as progress, _readers(total, index, connect, console) as run:
        for split, table in reading.tables(run, progress):
            parts.add(split, table)
    parts.close(reading.copies)
    store.add(stage, REPORT_FILE, json.dumps(reading.report(), indent=1).encode())
    if index.annotated is not None:
        store.add(stage, ANNOTATED_FILE, json.dumps(index.annotated).encode())
    facts = {
        "content_hash": reading.content_hash,
        "extra_hash": reading.extra_hash,
        "categories": [vars(c) for c in index.categories],
        "num_images": {split: parts.num_rows.get(split, 0) for split in index.splits},
        "has_positions": index.annotated is not None,
    }
    try:
        store.commit(stage, facts)
    except LostFilesError as error:
        raise ValueError(str(error)) from None
    store.write_json(f"datasets/{asked}.json", {"folders": index.listing.seen})
    return _stored(store, stage.key)


def _stage(asked: str, state: str) -> Stage:
    key = hashlib.sha256(f"{asked} {state}".encode()).hexdigest()[:20]
    return Stage("dataset", "dataset", {}, {}, key)


class _Parts:
    """Record tables on their way into the store, a Parquet file for every few thousand images."""

    def __init__(self, store: ArtifactStore, stage: Stage):
        self.store, self.stage = store, stage
        self.num_rows: dict[str, int] = {}
        self.num_parts: dict[str, int] = {}
        self.pending: dict[str, list[pa.Table]] = {}
        self.label_index: list[pa.Table] = []

    def add(self, split: str, table: pa.Table) -> None:
        pending = self.pending.setdefault(split, [])
        pending.append(table)
        self.num_rows[split] = self.num_rows.get(split, 0) + table.num_rows
        if sum(t.num_rows for t in pending) >= IMAGES_PER_PART or sum(t.nbytes for t in pending) >= MAX_CHUNK_BYTES:
            self._write(split)

    def close(self, copies: Copies) -> None:
        """Writes what is left, and the label index, which needs to know all images that are there twice."""
        for split in list(self.pending):
            self._write(split)
        index, same_as = pa.concat_tables(self.label_index), copies.same_as
        if len(same_as) == index.num_rows:  # not of drawn scenes, which are not read
            index = mark_copies(index, same_as, copies.in_val)
        self._add(LABEL_INDEX, 0, index)

    def _write(self, split: str) -> None:
        part = self.num_parts[split] = self.num_parts.get(split, -1) + 1
        records = pa.concat_tables(self.pending.pop(split))
        self._add(split, part, records)
        if split == "train":
            self.label_index.append(label_index(records))

    def _add(self, name: str, part: int, table: pa.Table) -> None:
        buffer = io.BytesIO()
        pa.parquet.write_table(table, buffer)
        # readers take a folder's files in the order of their names
        self.store.add(self.stage, f"{name}.parquet/{part:05d}.parquet", buffer.getvalue())


@contextmanager
def _readers(total: int, index: DatasetIndex, connect: Callable[[], Cluster], console: Console) -> Iterator[Run]:
    """Where the files are read: in this process, or by Ray Data on all of the cluster."""
    if total <= IN_THIS_PROCESS or index.content_hash:
        yield in_threads
        return
    cluster = connect()
    import ray

    from cast_ray.runtime.placement import reserve

    try:
        if cluster.is_local:
            yield partial(_on_ray, num_tasks=max(1, int(cluster.resources.get("CPU", 1))))
        else:
            # As many as Ray Data finds CPUs for, now and later; it looks for some only once a node has one.
            with reserve([{"CPU": 1.0}], say=partial(_say_waiting, console)):
                pass
            yield partial(_on_ray, num_tasks=None)
    finally:
        ray.shutdown()


def _say_waiting(console: Console, what: str, why: str) -> None:
    console.print(f"reading images waits for a node with {what}" + (f" ({why})" if why else ""), markup=False)


def _on_ray(make: MakeRows, blocks: list[pa.Table], *, num_tasks: int | None) -> Iterator[pa.Table]:
    import ray.data

    from cast_ray.runtime.data.block_source import BlockSource

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    ends = list(accumulate(block.num_rows for block in blocks))
    rows = partial(_read_rows, make=make, plan=pa.concat_tables(blocks))
    dataset = ray.data.read_datasource(
        BlockSource(list(zip([0, *ends], ends)), ray.put(rows)),
        num_cpus=1,
        concurrency=num_tasks,
        override_num_blocks=len(blocks),
    )
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def _read_rows(start: int, stop: int, *, make: MakeRows, plan: pa.Table) -> pa.Table:
    return make(plan.slice(start, stop - start))
