"""YOLO segmentation, as Ultralytics, Roboflow and CVAT write it: data.yaml and a text file of polygons for each image.

    <root>/data.yaml                  names, train, val: folders of images, or text files that list them
    <root>/images/train/x.jpg
    <root>/labels/train/x.txt         a line for each object: class x0 y0 x1 y1 ..., as shares of width and height

The text file of an image is found as Ultralytics finds it: `labels` in place of the last `images` in its path, else
beside it. An image without a text file holds no object.

Source: docs.ultralytics.com/datasets/segment, and `img2label_paths` there.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from cast_ray.common.text_files import decode_text, read_text
from cast_ray.contracts.records import Category
from cast_ray.data.formats.coco import Progress
from cast_ray.data.formats.instance_maps import instance
from cast_ray.data.formats.segmentations import encode_segmentation
from cast_ray.data.reading.data_report import LARGE_SHARE, SPLIT_NAMES
from cast_ray.data.reading.images import read_content
from cast_ray.data.reading.index import INDEX_SCHEMA, DatasetIndex, ReadOutcome, hold_out, index_extra, index_table
from cast_ray.data.reading.listing import Listing, open_listing
from cast_ray.data.reading.photos import images_below
from cast_ray.recipe import DataConfig
from cast_ray.recipe.strict_yaml import NotYamlError, read_yaml

YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_VAL_KEYS = ("val", "valid", "validation")
_BOX = 5  # numbers in a line of YOLO's detection format
_FARTHEST = 2  # sizes of the image; a larger number is a coordinate in pixels


def index(config: DataConfig, progress: Progress | None = None) -> DatasetIndex:
    """Lists the images and their text files; neither is read.

    `data.annotations` names the YAML file where it is not called data.yaml.

    Raises:
        ValueError: one line naming the file and the field: no YAML file, no classes, a folder of images that is
            missing, or no text file at all.
    """
    listing = open_listing(config.root, "a YOLO dataset (data.yaml)")
    file = find_yaml(listing, config.annotations)
    document = _read_document(listing, file)
    categories = _categories(document.get("names"), file)
    tables, sources, warnings = {}, {}, []
    for split, keys in (("train", ("train",)), ("val", _VAL_KEYS)):
        key = next((k for k in keys if document.get(k)), None)
        if key is None and split == "train":
            raise ValueError(f"{file}: 'train' is missing: expected a folder of images, or a text file that lists them")
        if key is not None and not (split == "val" and document[key] == document["train"]):
            tables[split] = _images(listing, file, document, key, split)
            sources[split] = f"{file}: {key}"
            warnings += _without_labels(tables[split], split)
    if "val" not in tables:
        tables = hold_out(tables["train"], config, sources["train"])
    extra, left_out = index_extra(listing, config, "a YOLO dataset")
    return DatasetIndex(
        tables | extra,
        categories,
        listing,
        sources=sources,
        left_out=left_out,
        read_instances=partial(read_labels, num_classes=len(categories)),
        warnings=warnings,
    )


def find_yaml(listing: Listing, given: str = "") -> str:
    """Returns the path of the YAML file. Raises ValueError where there is none."""
    if given:
        if listing.file(given) is None:
            raise ValueError(f"data.annotations: {given} is not a file below {listing.root}")
        return given
    found = next((name for name in listing.files("") if name.lower() in YAML_NAMES), None)
    if found is None:
        raise ValueError(f"{listing.root}: no {YAML_NAMES[0]} found: name the YAML file by data.annotations")
    return found


def read_names(listing: Listing, file: str) -> list[str]:
    """Returns the names of the classes 0, 1, ... of a YAML file. Raises ValueError with one line that names it."""
    return [category.name for category in _categories(_read_document(listing, file).get("names"), file)]


def read_labels(uri: str, image_hw: tuple[int, int], num_classes: int) -> ReadOutcome:
    """Reads the text file of one image.

    Args:
        uri: of the text file; an empty one says that the image holds no object.
        image_hw: height and width of the image, pixels.
        num_classes: a class is 0..num_classes-1.

    Returns:
        The instances, and (line number, reason) of the lines that cannot be used.

    Raises:
        ValueError: it is not a text file.
        OSError: the file store failed.
    """
    instances, unknown, seen = [], [], set()
    for number, line in enumerate(decode_text(read_content(uri), posixpath.basename(uri)).splitlines(), start=1):
        words = tuple(line.split())
        if not words:
            continue
        try:
            if words in seen:
                raise ValueError("repeats another line")
            seen.add(words)
            instances.append(_read_line(words, image_hw, num_classes))
        except ValueError as error:
            unknown.append((f"line {number}", str(error)))
    return instances, unknown


def _read_line(words: tuple[str, ...], image_hw: tuple[int, int], num_classes: int) -> dict[str, Any]:
    try:
        label, *shares = (float(word) for word in words)
    except ValueError:
        raise ValueError("it holds something that is not a number") from None
    if not label.is_integer() or not 0 <= label < num_classes:
        raise ValueError(f"class {words[0]}: expected 0..{num_classes - 1}, as data.yaml names them")
    if len(words) == _BOX:
        raise ValueError("a box and no polygon (YOLO's detection format): expected class x0 y0 x1 y1 x2 y2 ...")
    if not np.isfinite(shares).all() or (shares and max(map(abs, shares)) > _FARTHEST):
        raise ValueError("a coordinate is no share of the image: expected 0 to 1")
    height, width = image_hw
    points = [share * (height if place % 2 else width) for place, share in enumerate(shares)]
    return instance(int(label), encode_segmentation([points], height, width))


def _read_document(listing: Listing, file: str) -> dict[str, Any]:
    try:
        document = read_yaml(read_text(listing.uri(file), file))
    except NotYamlError as error:
        raise ValueError(f"{file}: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{file}: not a YOLO dataset: expected names, train and val")
    return document


def _categories(names: Any, file: str) -> tuple[Category, ...]:
    """The classes 0, 1, ...: `names` is a list, or a mapping of these numbers."""
    if isinstance(names, dict):
        numbers = [str(n) for n in range(len(names))]
        if sorted(names) != sorted(numbers):
            raise ValueError(f"{file}: 'names' has the keys {', '.join(map(str, names))[:80]}: expected 0, 1, 2, ...")
        names = [names[number] for number in numbers]
    if not isinstance(names, list) or not names or not all(isinstance(name, str | int | float) for name in names):
        raise ValueError(f"{file}: 'names' is {str(names)[:40]}: expected the names of the classes")
    return tuple(Category(number, str(name)) for number, name in enumerate(names))


def _images(listing: Listing, file: str, document: dict[str, Any], key: str, split: str) -> pa.Table:
    entries = document[key] if isinstance(document[key], list) else [document[key]]
    prefix = str(document.get("path") or "")
    rows: list[tuple[str, str, str | None]] = []
    for entry in entries:
        if not isinstance(entry, str) or (place := _below_root(listing, prefix, entry)) is None:
            raise ValueError(f"{file}: {key!r} names {str(entry)[:80]}: no such folder or list below {listing.root}")
        for name, path in _listed(listing, place, prefix, file):
            labels = _labels_of(path)
            rows.append((name, path, labels if listing.file(labels) is not None else None))
    if not rows:
        raise ValueError(f"{file}: {key!r} names {', '.join(entries)}, where there is no image")
    if not any(labels for _, _, labels in rows):
        raise ValueError(
            f"{file}: {key!r}: no image has a text file of polygons: looked for {_labels_of(rows[0][1])} and the like"
        )
    if len({name for name, _, _ in rows}) < len(rows):  # folders with equal names below them
        rows = [(path, path, labels) for _, path, labels in rows]
    table = index_table(listing, split, list(dict.fromkeys(rows)))
    instances: list[list[dict[str, Any]] | None] = [None if uri else [] for uri in table.column("mask_uri").to_pylist()]
    column = table.schema.get_field_index("instances")
    return table.set_column(column, INDEX_SCHEMA.field(column), pa.array(instances, INDEX_SCHEMA.field(column).type))


def _listed(listing: Listing, place: str, prefix: str, file: str) -> Iterator[tuple[str, str]]:
    """(image id, path below root) of the images in a folder, or in a text file that lists them."""
    if listing.file(place) is None:
        for path in images_below(listing, place).paths:
            yield path.removeprefix(f"{place}/"), path
        return
    for number, line in enumerate(read_text(listing.uri(place), place).splitlines(), start=1):
        if not line.strip():
            continue
        found = _below_root(listing, prefix, line.strip())
        if found is None or listing.file(found) is None:
            raise ValueError(f"{place}, line {number}: {line.strip()[:80]}: no such image below {listing.root}")
        yield found, found


def _below_root(listing: Listing, prefix: str, entry: str) -> str | None:
    """The path below root that an entry means.

    The entry may be relative to `path` of the YAML file, to the file itself or to the folder above it (Roboflow), or
    hold folders of another machine: leading parts are passed over until a file or folder is found.
    """
    parts = [p for p in f"{prefix}/{entry}".replace("\\", "/").split("/") if p not in ("", ".", "..")]
    for start in range(len(parts)):
        path = "/".join(parts[start:])
        if listing.file(path) is not None or parts[-1] in listing.folders(posixpath.dirname(path)):
            return path
    return "" if not parts else None


def _labels_of(image: str) -> str:
    """Path of the text file of an image."""
    before, images, after = f"/{image}".rpartition("/images/")
    path = f"{before}/labels/{after}" if images else f"/{image}"
    return f"{posixpath.splitext(path)[0]}.txt".removeprefix("/")


def _without_labels(table: pa.Table, split: str) -> list[str]:
    count = table.column("mask_uri").null_count
    if count <= LARGE_SHARE * table.num_rows:
        return []
    return [
        f"{count:,} of {table.num_rows:,} {SPLIT_NAMES[split]} images have no text file of polygons: they count as "
        "images without objects, not as unlabelled ones. Put unlabelled images into a folder of their own and name it "
        "by data.extra_image_dir, with data.unlabelled_pool=extra."
    ]
