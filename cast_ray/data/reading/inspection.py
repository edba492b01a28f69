"""What a dataset holds: images and objects by split and class, sizes, and what is wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cast_ray.contracts.records import Category, DatasetSplits, instance_rows, mask_areas, object_areas, take_rows
from cast_ray.data.formats import label_maps, labelme, mask_files, yolo
from cast_ray.data.formats.coco_document import TRAIN_NAMES, find_annotation_file
from cast_ray.data.reading.index import TRAIN_FOLDERS
from cast_ray.data.reading.listing import Listing
from cast_ray.data.splits.fractions import label_index

SMALL_PX, MEDIUM_PX = 32**2, 96**2
"""COCO's borders between small, medium and large objects, pixels of area."""


def guess_format(root: str) -> str:
    """Returns the name of the format that the files and folders below a root look like; coco where they look like none.

    An annotation file in COCO format comes first: folders of masks may lie beside it.
    """
    listing = Listing(root)
    folders = set(listing.folders(""))
    if folders & {"leftImg8bit", "gtFine"}:
        return "cityscapes"
    if folders & {"annotations_instance", "ADEChallengeData2016", "ADE20K_2021_17_01"} or listing.folders("images/ADE"):
        return "ade20k"
    try:
        if find_annotation_file(listing, "", "data.annotations", TRAIN_NAMES) is not None:
            return "coco"
    except ValueError:  # several files fit
        return "coco"
    if any(name.lower() in yolo.YAML_NAMES for name in listing.files("")):
        return "yolo"
    looks_like = {"label_maps": label_maps.is_layout, "mask_files": mask_files.is_layout, "labelme": labelme.is_layout}
    for name, is_layout in looks_like.items():
        if any(is_layout(listing, folder) for folder in (*TRAIN_FOLDERS, "stage1_train")):
            return name
    return "coco"


@dataclass(frozen=True)
class SplitFacts:
    """One split in numbers.

    num_objects: without crowds; num_crowds: ignore regions of a class; by class label 0..C-1: objects [C] and images
    with at least one [C]; areas: objects that are small, medium and large, by their annotated area where there is one
    (see `object_areas`); sizes: (height, width) -> images, the most frequent first.
    """

    name: str
    num_images: int
    num_empty: int
    num_objects: int
    num_crowds: int
    objects_by_class: np.ndarray
    images_by_class: np.ndarray
    areas: tuple[int, int, int]
    sizes: dict[tuple[int, int], int]


def facts_of(dataset: DatasetSplits) -> list[SplitFacts]:
    """The splits that the dataset has, in numbers."""
    splits = {"train": dataset.train, "val": dataset.val, "source": dataset.source, "extra": dataset.extra}
    return [_facts(name, table, dataset.categories) for name, table in splits.items() if table is not None]


def _facts(name: str, table: pa.Table, categories: Sequence[Category]) -> SplitFacts:
    instances = table.column("instances")
    flat, rows = pc.list_flatten(instances), instance_rows(instances)
    crowd = pc.struct_field(flat, "is_crowd").to_numpy()
    label_of = {category.id: label for label, category in enumerate(categories)}
    ids = pc.struct_field(flat, "category_id").to_pylist()
    labels = np.array([label_of.get(c, -1) for c in ids], dtype=np.int64)
    num_crowds = int((crowd & (labels >= 0)).sum())
    labels = labels[~crowd]
    rows = rows[~crowd]
    pairs = np.unique(np.stack([labels, rows], 1), axis=0) if len(rows) else np.empty((0, 2), np.int64)
    areas = object_areas(pc.struct_field(flat, "area").to_pylist(), _mask_areas(table, flat, instance_rows(instances)))[
        ~crowd
    ]
    heights, widths = (table.column(n).to_numpy() for n in ("height", "width"))
    sizes, counts = np.unique(np.stack([heights, widths], 1), axis=0, return_counts=True)
    return SplitFacts(
        name=name,
        num_images=table.num_rows,
        num_empty=table.num_rows - len(np.unique(rows)),
        num_objects=len(rows),
        num_crowds=num_crowds,
        objects_by_class=np.bincount(labels, minlength=len(categories)),
        images_by_class=np.bincount(pairs[:, 0], minlength=len(categories)),
        areas=(
            int((areas < SMALL_PX).sum()),
            int(((areas >= SMALL_PX) & (areas < MEDIUM_PX)).sum()),
            int((areas >= MEDIUM_PX).sum()),
        ),
        sizes={(int(sizes[i, 0]), int(sizes[i, 1])): int(counts[i]) for i in np.argsort(-counts, kind="stable")},
    )


def _mask_areas(table: pa.Table, flat: pa.ChunkedArray, rows: np.ndarray) -> np.ndarray:
    sizes = list(zip(table.column("height").to_pylist(), table.column("width").to_pylist()))
    counts = pc.struct_field(flat, "rle").to_pylist()
    return mask_areas([{"size": sizes[row], "counts": count} for row, count in zip(rows.tolist(), counts)])


def choose_samples(table: pa.Table, count: int) -> list[dict[str, Any]]:
    """A few images for a contact sheet, those with objects first: always the same ones, from all over the split."""
    keys = [hashlib.sha256(i.encode()).digest() for i in table.column("image_id").to_pylist()]
    classes = label_index(table).column("category_ids")
    empty = (pc.list_value_length(classes).to_numpy() == 0).tolist()
    order = sorted(range(table.num_rows), key=lambda row: (empty[row], keys[row]))
    return take_rows(table, order[:count]).to_pylist()
