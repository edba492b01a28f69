"""Any folder in COCO format (images + instances JSON), as record tables whose images are not read yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cast_ray.contracts.records import INSTANCE_TYPE, MAX_CHUNK_BYTES, Category, encode_image_id
from cast_ray.data.formats.coco_document import (
    EXTRA_NAMES,
    TRAIN_NAMES,
    VAL_NAMES,
    annotated_area,
    find_annotation_file,
    is_crowd,
    placeholder_of,
    printable,
    read_categories,
    read_document,
    references_of,
    resolve,
    usable_images,
)
from cast_ray.data.formats.segmentations import encode_segmentation
from cast_ray.data.reading.image_files import FoundImage, find_images, image_dirs_of
from cast_ray.data.reading.index import INDEX_SCHEMA, DatasetIndex, HeldOut, Skipped, describe, hold_out, index_pool
from cast_ray.data.reading.listing import Listing, open_listing
from cast_ray.recipe import DataConfig

Progress = Callable[[int, int], None]
EXTRA_FOLDERS = "unlabel*"
ALL_IGNORED_HINT = (
    "A region of many objects has iscrowd 1, a single object has iscrowd 0, but some tools export every mask with "
    "iscrowd 1 (CVAT, datumaro, supervision): set data.crowds=objects if the annotations are single objects."
)
_SUSPECT_SHARE = 0.02
"""Share of annotations above which ignore regions that look like single objects are worth a warning.

COCO has one region of many objects for a class in an image, and no attributes.
"""


@dataclass(frozen=True)
class AnnotatedImages:
    """One annotation file as read: `table` follows INDEX_SCHEMA; the others as in DatasetIndex.

    skipped_by_image: image id -> those of `skipped` that are its annotations. num_suspect: ignore regions that look
    like single objects: the image has another one of the class, or they have the `attributes` of annotation tools.
    placeholder: id of a category that is only the name of a project, see `coco_document.placeholder_of`.
    """

    file: str
    table: pa.Table
    categories: tuple[Category, ...]
    num_annotations: int
    skipped: list[Skipped]
    annotated: tuple[str, ...] | None
    left_out: Mapping[str, int] = field(default_factory=dict)
    skipped_by_image: Mapping[str, list[Skipped]] = field(default_factory=dict)
    num_suspect: int = 0
    placeholder: int | None = None


def index(config: DataConfig, progress: Progress | None = None) -> DatasetIndex:
    """Reads the annotation files of a COCO-format folder and looks the images up.

    The pixels are not read: image sizes are the annotation file's. Unusable images and annotations are left out and
    listed in `skipped`. Without a validation file, the images whose sha256(image id) lies in the lowest `val_fraction`
    are held out, so the choice survives added images. Where the recipe uses an extra pool of unlabelled images, it is
    the images of `extra_annotations` (COCO's image_info_unlabeled2017.json) or all images below `extra_image_dir`.

    Args:
        config: `root` is a local folder or a pyarrow.fs URI; empty `annotations`, `image_dir` and their validation
            and extra twins are found by their usual names.
        progress: called with (annotations read, annotations in the file).

    Raises:
        ValueError: one line naming the file and the field: folder or file missing, not JSON, not COCO, one id for two
            images, or no usable image.
    """
    listing = open_listing(config.root, "a COCO-format dataset")
    train_file = find_annotation_file(listing, config.annotations, "data.annotations", TRAIN_NAMES)
    val_file = find_annotation_file(listing, config.val_annotations, "data.val_annotations", VAL_NAMES)
    if train_file is None:
        looked_for = ", ".join(TRAIN_NAMES)
        raise ValueError(
            f"{listing.root}: no annotation file found (looked for {looked_for}): name it by data.annotations"
        )
    read = _Reader(listing, config, progress)
    first = read.annotations(train_file, image_dirs_of(config.image_dir, train_file, "train"), "train")
    splits, parts = {"train": first.table}, {"train": first}
    held_out = None
    if val_file is None or val_file == train_file:
        if first.table.num_rows < 2:
            bad = [s for s in first.skipped if s["kind"] == "image"]
            reasons = f" ({len(bad)} skipped: {describe(bad)})" if bad else ""
            raise ValueError(
                f"{train_file}: {first.table.num_rows} usable image{reasons}: expected at least 2, one of them for "
                "validation (or data.val_annotations)"
            )
        splits = hold_out(first.table, config, train_file)
        held_out = _annotations_of(splits["val"], first.skipped_by_image)
    else:
        parts["val"] = read.annotations(val_file, image_dirs_of(config.val_image_dir, val_file, "val"), "val")
        _check_same_categories(first.categories, parts["val"].categories, train_file, val_file)
        splits["val"] = parts["val"].table
    if config.unlabelled_pool != "rest":
        parts["extra"] = read.extra()
        splits["extra"] = parts["extra"].table
    annotated = [part for split, part in parts.items() if split != "extra"]
    placeholders = {part.placeholder for part in annotated}  # an image of either file may be of the class after all
    return DatasetIndex(
        splits=splits,
        categories=tuple(c for c in first.categories if placeholders != {c.id}),
        listing=listing,
        skipped=[s for part in parts.values() for s in part.skipped],
        num_annotations={split: part.num_annotations for split, part in parts.items()},
        sources={split: part.file for split, part in parts.items()},
        annotated=first.annotated,
        all_ignored_hint=ALL_IGNORED_HINT,
        left_out=parts["extra"].left_out if "extra" in parts else {},
        held_out=held_out,
        warnings=[warning for part in annotated if (warning := _suspect_crowds(part))],
    )


def read_annotations(
    listing: Listing,
    annotation_file: str,
    image_dirs: Sequence[str],
    config: DataConfig,
    split: str = "train",
    progress: Progress | None = None,
) -> AnnotatedImages:
    """Reads one COCO annotation file and looks its images up.

    Args:
        listing: files of the dataset's folder; no image outside it is taken.
        annotation_file: relative to it, or an absolute path or URI.
        image_dirs: see `find_images`.
        config: `max_image_pixels`.
        split: train, val, source or extra.

    Raises:
        ValueError: see `index`.
    """
    return _Reader(listing, config, progress).annotations(annotation_file, image_dirs, split)


class _Reader:
    def __init__(self, listing: Listing, config: DataConfig, progress: Progress | None):
        self.listing, self.config, self.progress = listing, config, progress

    def annotations(self, file: str, image_dirs: Sequence[str], split: str) -> AnnotatedImages:
        document = read_document(self.listing.uri(file), file)
        categories = read_categories(document["categories"], file)
        annotations = document["annotations"]
        images, found, skipped = self._images(document["images"], image_dirs, split, file)
        instances, bad_annotations, by_image, num_suspect = self._instances(
            images, found, annotations, categories, split, file
        )
        return AnnotatedImages(
            file,
            _image_table(self.listing, found, instances, split),
            categories,
            len(annotations),
            skipped + bad_annotations,
            _annotated_ids(images, annotations, self.config.crowds),
            skipped_by_image=by_image,
            num_suspect=num_suspect,
            placeholder=placeholder_of(document),
        )

    def _images(
        self, entries: list[dict[str, Any]], image_dirs: Sequence[str], split: str, file: str
    ) -> tuple[dict[int | str, dict[str, Any]], list[FoundImage], list[Skipped]]:
        """Returns entries of an annotation file by id, those whose file can be used, and what is left out of either."""
        images, skipped = usable_images(entries, split, file)
        found, missing = find_images(self.listing, images, image_dirs, self.config.max_image_pixels, split, file)
        skipped += missing
        if not found:
            raise ValueError(f"{file}: no usable image of {len(entries)}: {describe(skipped)}")
        return {image["id"]: image for image in images}, found, skipped

    def extra(self) -> AnnotatedImages:
        """The extra pool of unlabelled images: of an annotation file's `images`, or of a folder."""
        config, listing, key = self.config, self.listing, "data.extra_annotations"
        file = None
        if config.extra_annotations or not config.extra_image_dir:
            file = find_annotation_file(listing, config.extra_annotations, key, EXTRA_NAMES)
        if file is None:
            folders = [config.extra_image_dir] if config.extra_image_dir else listing.folders("", EXTRA_FOLDERS)
            if not folders:
                raise ValueError(
                    f"{listing.root}: no extra unlabelled images (looked for {', '.join(EXTRA_NAMES)} and a folder "
                    f"{EXTRA_FOLDERS}): name them by {key} or data.extra_image_dir, or set data.unlabelled_pool=rest"
                )
            table, left_out = index_pool(listing, folders[0])
            return AnnotatedImages(folders[0], table, (), 0, [], None, left_out)
        entries = read_document(listing.uri(file), file, ["images"])["images"]
        dirs = image_dirs_of(config.extra_image_dir, file, "unlabel")
        _, found, skipped = self._images(entries, dirs, "extra", file)
        unknown = pa.nulls(len(found), INDEX_SCHEMA.field("instances").type)
        return AnnotatedImages(file, _image_table(listing, found, unknown, "extra"), (), 0, skipped, None)

    def _instances(
        self,
        images: dict[int | str, dict[str, Any]],
        found: list[FoundImage],
        annotations: list[dict[str, Any]],
        categories: tuple[Category, ...],
        split: str,
        file: str,
    ) -> tuple[pa.Array, list[Skipped], dict[str, list[Skipped]], int]:
        """Instances of each image; the annotations that are skipped; the same by the id of their image, if known; and
        the number of ignore regions that look like single objects."""
        row_of = {image.id: row for row, image in enumerate(found)}
        category_ids = {category.id for category in categories}
        rows, labels, rles, crowds, areas, skipped = [], [], [], [], [], []
        by_image: dict[str, list[Skipped]] = {}
        seen: dict[Any, list[dict[str, Any]]] = {}
        regions: dict[tuple[int, int], list[bool]] = {}  # image and class -> whether each has attributes
        for number, annotation in enumerate(annotations):
            if self.progress and number % 1000 == 0:
                self.progress(number, len(annotations))
            try:
                image_id, category_id = references_of(annotation, images, category_ids)
                _check_new(annotation, (image_id, category_id), seen)
                row = row_of.get(image_id)
                if row is None:
                    continue  # its image is listed as skipped
                crowd = is_crowd(annotation) and self.config.crowds == "ignore"
                image = found[row]
                rles.append(encode_segmentation(annotation.get("segmentation"), image.height, image.width))
            except ValueError as reason:
                known = resolve(annotation.get("image_id"), images)
                name = file if known is None else printable(images[known].get("file_name"))
                facts = {"id": printable(annotation.get("id"))[:40], "file": name, "reason": str(reason)}
                skipped.append({"split": split, "kind": "annotation", **facts})
                if known is not None:
                    by_image.setdefault(encode_image_id(known), []).append(skipped[-1])
                continue
            rows.append(row)
            labels.append(category_id)
            crowds.append(crowd)
            areas.append(annotated_area(annotation))
            if crowd:
                regions.setdefault((row, category_id), []).append(isinstance(annotation.get("attributes"), dict))
        num_suspect = sum(len(alike) if len(alike) > 1 else sum(alike) for alike in regions.values())
        return _instance_lists(len(found), rows, labels, rles, crowds, areas), skipped, by_image, num_suspect


def _check_new(
    annotation: dict[str, Any], references: tuple[int | str, int], seen: dict[Any, list[dict[str, Any]]]
) -> None:
    """Raises ValueError for the exact repetition of an annotation; ids alone mean nothing, files merge badly."""
    identifier = annotation.get("id")
    if type(identifier) not in (int, str):
        return
    # some files number all their annotations 0: then few stand beside each other here
    before = seen.setdefault((identifier, *references), [])
    if annotation in before:
        raise ValueError("repeats an annotation of the same id")
    before.append(annotation)


def _suspect_crowds(part: AnnotatedImages) -> str:
    """Says that some of a file's objects may be lost as ignore regions; empty where nothing looks like it, or where all
    are ignore regions, which the data report says."""
    crowds = pc.struct_field(pc.list_flatten(part.table.column("instances")), "is_crowd")
    total, num_crowds = len(crowds), pc.sum(crowds).as_py() or 0
    if num_crowds == total or part.num_suspect <= _SUSPECT_SHARE * total:
        return ""
    return (
        f"{num_crowds:,} of {total:,} annotations in {part.file} have iscrowd 1 and are ignore regions, and they look "
        "like single objects: the file may be an export of CVAT, datumaro or supervision, which write masks with "
        "iscrowd 1. Set data.crowds=objects if they are single objects."
    )


def _is_object(annotation: dict[str, Any], crowds: str) -> bool:
    try:
        return crowds == "objects" or not is_crowd(annotation)
    except ValueError:
        return False


def _image_table(listing: Listing, found: list[FoundImage], instances: pa.Array, split: str) -> pa.Table:
    return pa.Table.from_arrays(
        [
            pa.array([encode_image_id(image.id) for image in found], pa.string()),
            pa.array([listing.uri(image.path) for image in found], pa.string()),
            pa.array([image.height for image in found], pa.int32()),
            pa.array([image.width for image in found], pa.int32()),
            instances,
            pa.array([split] * len(found), pa.string()),
            pa.array([image.path for image in found], pa.string()),
            pa.array([image.num_bytes for image in found], pa.int64()),
            pa.nulls(len(found), pa.string()),
        ],
        schema=INDEX_SCHEMA,
    )


def _annotated_ids(
    images: dict[int | str, dict[str, Any]], annotations: list[dict[str, Any]], crowds: str
) -> tuple[str, ...] | None:
    """Ids of the images with at least one object that is no crowd, in rising order; None where ids have no order.

    This is the list that detectron2 trains on, in which published label lists count positions.
    """
    with_objects = {resolve(a.get("image_id"), images) for a in annotations if _is_object(a, crowds)}
    chosen = [identifier for identifier in images if identifier in with_objects]
    if len({type(i) for i in chosen}) > 1:
        return None
    return tuple(encode_image_id(i) for i in sorted(chosen))


def _instance_lists(
    num_images: int,
    rows: list[int],
    category_ids: list[int],
    rles: list[bytes],
    crowds: list[bool],
    areas: list[float | None],
) -> pa.ChunkedArray:
    """Instances grouped by image, in the file's order within an image, without a Python object for each.

    They come in chunks of whole images with at most about MAX_CHUNK_BYTES of masks each.
    """
    row = np.array(rows, dtype=np.int64)
    order = np.argsort(row, kind="stable")
    ends = np.cumsum(np.bincount(row, minlength=num_images))
    sizes = np.array([len(rles[i]) for i in order], dtype=np.int64)
    held = np.concatenate([[0], np.cumsum(sizes)])[ends] // MAX_CHUNK_BYTES  # chunk of each image, by its last mask
    chunks, first = [], 0
    for images in np.split(np.arange(num_images), np.flatnonzero(np.diff(held)) + 1):
        chosen = order[first : ends[images[-1]]] if len(images) else order[:0]
        columns = [
            pa.array([category_ids[i] for i in chosen], pa.int64()),
            pa.array([rles[i] for i in chosen], pa.binary()),
            pa.array(np.ones(len(chosen), dtype=np.float32)),
            pa.array([crowds[i] for i in chosen], pa.bool_()),
            pa.array([areas[i] for i in chosen], pa.float64()),
        ]
        offsets = pa.array(np.concatenate([[0], ends[images] - first]).astype(np.int32))
        instances = pa.StructArray.from_arrays(columns, fields=list(INSTANCE_TYPE))
        chunks.append(pa.ListArray.from_arrays(offsets, instances))
        first += len(chosen)
    return pa.chunked_array(chunks)


def _annotations_of(images: pa.Table, skipped_by_image: Mapping[str, Sequence[Skipped]]) -> HeldOut:
    """The annotations of held-out images: the usable ones, which are instances by now, and the skipped ones."""
    skipped = [s for image_id in images.column("image_id").to_pylist() for s in skipped_by_image.get(image_id, ())]
    num_usable = pc.sum(pc.list_value_length(images.column("instances"))).as_py() or 0
    return HeldOut(num_usable + len(skipped), skipped)


def _check_same_categories(
    train: tuple[Category, ...], val: tuple[Category, ...], train_file: str, val_file: str
) -> None:
    for category in sorted(set(train) ^ set(val), key=lambda c: c.id):
        where, other = (train_file, val_file) if category in train else (val_file, train_file)
        raise ValueError(
            f"{where}: category {category.id} ({category.name!r}) is not in {other}: expected equal classes"
        )
