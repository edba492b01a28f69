"""Any folder in COCO format (images + instances JSON) as record tables."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from cast_ray.datasets.coco_document import (
    TRAIN_NAMES,
    VAL_NAMES,
    check_folder,
    check_references,
    find_annotation_file,
    read_categories,
    read_document,
)
from cast_ray.datasets.image_files import check_bad, find_images, image_dirs_of
from cast_ray.datasets.paths import absolute, is_uri, join
from cast_ray.datasets.segmentations import encode_segmentation
from cast_ray.recipe import DataConfig
from cast_ray.records import INSTANCE_TYPE, RECORD_SCHEMA, Category, DatasetSplits, encode_image_id


@dataclass
class AnnotatedImages:
    """One annotation file as read: `table` follows RECORD_SCHEMA; `sizes` are the (name, bytes) of its image files."""

    table: pa.Table
    categories: tuple[Category, ...]
    annotation_sha256: str
    sizes: list[tuple[str, int]]
    skipped: list[dict[str, str]] = field(default_factory=list)


def load(config: DataConfig) -> DatasetSplits:
    """Reads a COCO-format folder.

    The pixels are not read: image sizes are the annotation file's, files are only looked up. Unusable images and
    annotations are left out and listed in `skipped` as {kind, id, file, reason}. Without a validation file, the images
    whose sha256(image id) lies in the lowest `val_fraction` are held out, so the choice survives added images.

    Args:
        config: `root` is a local folder or a pyarrow.fs URI; empty `annotations`, `image_dir` and their validation
            twins are found by their usual names.

    Raises:
        ValueError: one line naming the file and the field: folder or file missing, not JSON, not COCO, repeated ids,
            an annotation without its image or category, no usable image, or more than `max_bad_fraction` unusable.
    """
    if not config.root:
        raise ValueError("data.root is empty: expected the folder of a COCO-format dataset (--set data.root=DIR)")
    root = absolute(config.root)
    check_folder(root, config.root)
    train_file = find_annotation_file(root, config.annotations, "data.annotations", TRAIN_NAMES)
    val_file = find_annotation_file(root, config.val_annotations, "data.val_annotations", VAL_NAMES)
    if train_file is None:
        looked_for = ", ".join(TRAIN_NAMES)
        raise ValueError(f"{root}: no annotation file found (looked for {looked_for}): name it by data.annotations")
    bad = config.max_bad_fraction
    if val_file is None or val_file == train_file:
        whole = read_annotations(root, train_file, image_dirs_of(config.image_dir, train_file, "train"), bad)
        train, val = _hold_out(whole.table, config.val_fraction, train_file)
        parts = [whole]
    else:
        first = read_annotations(root, train_file, image_dirs_of(config.image_dir, train_file, "train"), bad)
        second = read_annotations(root, val_file, image_dirs_of(config.val_image_dir, val_file, "val"), bad)
        _check_same_categories(first.categories, second.categories, train_file, val_file)
        train, val, parts = first.table, second.table, [first, second]
    return DatasetSplits(
        train=train,
        val=val,
        source=None,
        categories=parts[0].categories,
        content_hash=_content_hash(parts),
        skipped=tuple(s for part in parts for s in part.skipped),
    )


def read_annotations(
    root: str, annotation_file: str, image_dirs: Sequence[str], max_bad_fraction: float
) -> AnnotatedImages:
    """Reads one COCO annotation file and looks its images up.

    Args:
        root: folder of the dataset; no image outside it is taken.
        annotation_file: relative to root, or an absolute path or URI.
        image_dirs: folders relative to root that may hold the images; the one that holds most of them is taken. A
            single absolute path or URI stands for the root of the images.
        max_bad_fraction: the share of unusable images, or of unusable annotations, that is still accepted.

    Raises:
        ValueError: see `load`.
    """
    document, sha256 = read_document(root, annotation_file)
    categories = read_categories(document["categories"], annotation_file)
    images, annotations = document["images"], document["annotations"]
    check_references(images, annotations, categories, annotation_file)
    if len(image_dirs) == 1 and (posixpath.isabs(image_dirs[0]) or is_uri(image_dirs[0])):
        root, image_dirs = image_dirs[0], [""]
    found, skipped = find_images(root, images, image_dirs, annotation_file)
    row_of = {images[index]["id"]: row for row, (index, _, _) in enumerate(found)}
    shapes = [(images[index]["height"], images[index]["width"]) for index, _, _ in found]
    check_bad(skipped, "images", len(images), max_bad_fraction, annotation_file)
    bad_images = len(skipped)

    rows, category_ids, rles, crowds = [], [], [], []
    for annotation in annotations:
        row = row_of.get(annotation["image_id"])
        if row is None:
            continue  # its image is listed as skipped
        try:
            rles.append(encode_segmentation(annotation.get("segmentation"), *shapes[row]))
        except ValueError as reason:
            file = str(images[found[row][0]]["file_name"])
            skipped.append({"kind": "annotation", "id": str(annotation.get("id")), "file": file, "reason": str(reason)})
            continue
        rows.append(row)
        category_ids.append(annotation["category_id"])
        crowds.append(bool(annotation.get("iscrowd", 0)))
    check_bad(skipped[bad_images:], "annotations", len(annotations), max_bad_fraction, annotation_file)
    table = pa.Table.from_arrays(
        [
            pa.array([encode_image_id(images[index]["id"]) for index, _, _ in found], pa.string()),
            pa.array([join(root, path) for _, path, _ in found], pa.string()),
            pa.array([height for height, _ in shapes], pa.int32()),
            pa.array([width for _, width in shapes], pa.int32()),
            _instance_lists(len(found), rows, category_ids, rles, crowds),
        ],
        schema=RECORD_SCHEMA,
    )
    sizes = [(path, size) for _, path, size in found]
    return AnnotatedImages(table, categories, sha256, sizes, skipped)


def _instance_lists(
    num_images: int, rows: list[int], category_ids: list[int], rles: list[bytes], crowds: list[bool]
) -> pa.Array:
    """Instances grouped by image, in the file's order within an image, without a Python object for each."""
    row = np.array(rows, dtype=np.int64)
    order = pa.array(np.argsort(row, kind="stable"))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=num_images))]).astype(np.int32)
    columns = [
        pa.array(category_ids, pa.int64()),
        pa.array(rles, pa.binary()),
        pa.array(np.ones(len(row), dtype=np.float32)),
        pa.array(crowds, pa.bool_()),
    ]
    instances = pa.StructArray.from_arrays([c.take(order) for c in columns], fields=list(INSTANCE_TYPE))
    return pa.ListArray.from_arrays(pa.array(offsets), instances)


def _hold_out(table: pa.Table, val_fraction: float, file: str) -> tuple[pa.Table, pa.Table]:
    if table.num_rows < 2:
        raise ValueError(f"{file}: {table.num_rows} usable image: expected at least 2, one of them for validation")
    digests = [hashlib.sha256(i.encode()).digest()[:8] for i in table.column("image_id").to_pylist()]
    place = np.array([int.from_bytes(d, "big") / 2**64 for d in digests])
    held = place < val_fraction
    held[place.argmin()] = True
    held[place.argmax()] = False
    return table.filter(pa.array(~held)), table.filter(pa.array(held))


def _check_same_categories(
    train: tuple[Category, ...], val: tuple[Category, ...], train_file: str, val_file: str
) -> None:
    for category in sorted(set(train) ^ set(val), key=lambda c: c.id):
        where, other = (train_file, val_file) if category in train else (val_file, train_file)
        raise ValueError(
            f"{where}: category {category.id} ({category.name!r}) is not in {other}: expected equal classes"
        )


def _content_hash(parts: Sequence[AnnotatedImages]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.annotation_sha256.encode())
        digest.update(json.dumps(sorted(part.sizes)).encode())
    return digest.hexdigest()
