"""LabelMe: a JSON file beside each annotated image, or in another folder.

    <root>[/train]/x.jpg
    <root>[/train]/x.json     imagePath, imageHeight, imageWidth, shapes: label, points, shape_type, group_id, mask

Shapes of one label and `group_id` are the parts of one object. The classes are the labels in the order of labels.txt,
if LabelMe's file of this name lies in `root`, else all labels in alphabetical order. A shape `__ignore__` is an ignore
region. Images without a JSON file are unlabelled ones.

Source: labelme 6, `labelme/_label_file.py`, `labelme/utils/shape.py` and `examples/instance_segmentation`.
"""

from __future__ import annotations

import base64
import io
import json
import math
import posixpath
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pycocotools import mask as mask_utils

from cast_ray.common.text_files import decode_text, parse_json, read_text
from cast_ray.contracts.records import Category
from cast_ray.data.formats.coco import Progress
from cast_ray.data.formats.coco_document import shown
from cast_ray.data.formats.instance_maps import instance
from cast_ray.data.formats.segmentations import encode_mask, encode_segmentation
from cast_ray.data.reading.images import IMAGE_SUFFIXES, ImageError, read_content
from cast_ray.data.reading.index import (
    TRAIN_FOLDERS,
    VAL_FOLDERS,
    DatasetIndex,
    ReadOutcome,
    Skipped,
    hold_out,
    index_extra,
    index_table,
)
from cast_ray.data.reading.listing import Listing, open_listing
from cast_ray.data.reading.photos import images_below
from cast_ray.recipe import DataConfig

LABELS_FILE = "labels.txt"
_IGNORE, _BACKGROUND = "__ignore__", "_background_"
_IGNORE_ID = 0  # of no class
_NUM_READERS = 16
_MIN_CIRCLE_POINTS = 12


def index(config: DataConfig, progress: Progress | None = None) -> DatasetIndex:
    """Lists the images that have a JSON file and reads from these files which labels there are.

    Raises:
        ValueError: one line naming the folder or file: no JSON file of LabelMe, or no label.
    """
    listing = open_listing(config.root, "images and LabelMe JSON files")
    tables, skipped, sources, labels = {}, list[Skipped](), {}, set[str]()
    val = next((f for f in ([config.val_image_dir] if config.val_image_dir else VAL_FOLDERS) if _jsons(listing, f)), "")
    train = next((f for f in ([config.image_dir] if config.image_dir else TRAIN_FOLDERS) if _jsons(listing, f)), None)
    if train is None:
        raise ValueError(
            f"{posixpath.join(listing.root, config.image_dir)}: no JSON file found: expected images with LabelMe's "
            "JSON files beside them"
        )
    if config.val_image_dir and not val:
        raise ValueError(f"data.val_image_dir: no JSON file in {config.val_image_dir} below {listing.root}")
    unlabelled: list[str] = []
    for split, folder in (("train", train), ("val", val)):
        if split == "val" and not val:
            continue
        rows, bad, seen = _rows(listing, folder, [val] if split == "train" and val else [], split)
        skipped += bad
        labels |= seen
        sources[split] = folder or listing.root
        tables[split] = index_table(listing, split, rows)
        if split == "train":
            annotated = {path for _, path, _ in rows} | {s["file"] for s in bad}
            found = images_below(listing, folder, [val] if val else []).paths
            unlabelled = [path for path in found if path not in annotated]
    categories = _categories(listing, labels)
    if not val:
        tables = hold_out(tables["train"], config, sources["train"])
    warnings: list[str] = []
    left_out: Mapping[str, int] = {}
    extra: dict[str, pa.Table] = {}
    if unlabelled and not config.extra_image_dir:
        if config.unlabelled_pool == "rest":
            warnings.append(
                f"{len(unlabelled):,} images in {sources['train']} have no JSON file and are left out. "
                "data.unlabelled_pool=both learns from them as unlabelled images."
            )
        else:
            extra = {"extra": index_table(listing, "extra", [(path, path, None) for path in unlabelled])}
    else:
        extra, left_out = index_extra(listing, config, "a LabelMe folder without images that lack a JSON file")
    return DatasetIndex(
        tables | extra,
        categories,
        listing,
        skipped,
        sources=sources,
        left_out=left_out,
        read_instances=partial(read_shapes, ids={c.name: c.id for c in categories}),
        warnings=warnings,
    )


def is_layout(listing: Listing, folder: str) -> bool:
    """Returns whether a folder holds an image with a JSON file of the same name that LabelMe wrote."""
    stems = {posixpath.splitext(n)[0]: n for n in listing.files(folder) if n.lower().endswith(IMAGE_SUFFIXES)}
    paired = next((n for n in listing.files(folder, "*.json") if n.removesuffix(".json") in stems), None)
    if paired is None:
        return False
    file = posixpath.join(folder, paired)
    try:
        return _is_labelme(parse_json(read_text(listing.uri(file), file), file))
    except ValueError:
        return False


def read_shapes(uri: str, image_hw: tuple[int, int], ids: Mapping[str, int]) -> ReadOutcome:
    """Reads the JSON file of one image.

    Args:
        uri: of the JSON file.
        image_hw: height and width of the image, pixels.
        ids: label -> id of its class.

    Returns:
        The instances, and (number of the shape, reason) of the shapes that cannot be used.

    Raises:
        ValueError: it is no JSON file of LabelMe, or of an image of another size.
        OSError: the file store failed.
    """
    name = posixpath.basename(uri)
    document = parse_json(decode_text(read_content(uri), name), name)
    if not _is_labelme(document):
        raise ValueError(f"{name}: not LabelMe: expected an object with shapes and imagePath")
    height, width = image_hw
    size = (document.get("imageHeight") or height, document.get("imageWidth") or width)
    if size != image_hw:
        raise ValueError(
            f"{name} is of an image of {size[1]} x {size[0]} pixels: expected {width} x {height} (LabelMe applies the "
            "EXIF orientation, which is not applied here)"
        )
    parts: dict[Any, list[bytes]] = {}
    unknown = []
    for number, shape in enumerate(document["shapes"]):
        try:
            label, rle = _read_shape(shape, ids, height, width)
        except ValueError as error:
            unknown.append((f"shapes[{number}]", str(error)))
            continue
        group = shape.get("group_id")
        parts.setdefault((label, number if group is None else f"group {group}"), []).append(rle)
    instances = []
    for (label, _), rles in parts.items():
        merged = mask_utils.merge([{"size": [height, width], "counts": rle} for rle in rles])["counts"]
        is_ignored = label == _IGNORE
        instances.append(instance(_IGNORE_ID if is_ignored else ids[label], merged, is_crowd=is_ignored))
    return instances, unknown


def _read_shape(shape: Any, ids: Mapping[str, int], height: int, width: int) -> tuple[str, bytes]:
    if not isinstance(shape, dict):
        raise ValueError(f"of type {type(shape).__name__}: expected an object")
    label, kind, points = shape.get("label"), shape.get("shape_type") or "polygon", shape.get("points")
    if not isinstance(label, str) or (label != _IGNORE and label not in ids):
        raise ValueError(f"label {shown(label)}: no such class in {LABELS_FILE}")
    try:
        corners = np.array(points, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError("points hold something that is not a number") from None
    if corners.ndim != 2 or corners.shape[1] != 2:
        raise ValueError("points: expected a list of [x, y]")
    if kind == "mask":
        return label, _read_mask(shape.get("mask"), corners, height, width)
    return label, encode_segmentation([_outline(kind, corners).ravel().tolist()], height, width)


def _outline(kind: str, corners: np.ndarray) -> np.ndarray:
    """The polygon of a shape, float64 [n, 2]."""
    if kind in ("polygon", "oriented_rectangle"):
        return corners
    if kind not in ("rectangle", "circle"):
        raise ValueError(f"shape_type {shown(kind)} has no area: expected polygon, rectangle, circle or mask")
    if len(corners) != 2:
        raise ValueError(f"{kind} of {len(corners)} points: expected 2")
    if kind == "rectangle":
        (x0, y0), (x1, y1) = corners
        return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    radius = float(np.hypot(*(corners[1] - corners[0])))
    # as labelme2coco.py: the outline leaves the circle by at most one pixel
    count = max(int(math.pi / math.acos(1 - 1 / radius)), _MIN_CIRCLE_POINTS) if radius > 1 else _MIN_CIRCLE_POINTS
    angles = np.arange(count) * 2 * math.pi / count
    return corners[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _read_mask(encoded: Any, corners: np.ndarray, height: int, width: int) -> bytes:
    """A shape of type mask: a PNG in base64, which lies in the box between two corners, the last pixels included."""
    try:
        content = base64.b64decode(encoded, validate=True)
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            pixels = np.asarray(image) != 0
    except Exception:  # decoders fail on hostile bytes with anything
        raise ValueError("mask: expected a PNG in base64") from None
    if len(corners) != 2 or not np.isfinite(corners).all():
        raise ValueError("mask: expected points of its two corners")
    (x0, y0), (x1, y1) = corners.astype(np.int64).tolist()
    if pixels.shape != (y1 - y0 + 1, x1 - x0 + 1):
        raise ValueError(
            f"mask of {pixels.shape[1]} x {pixels.shape[0]} pixels: expected {x1 - x0 + 1} x {y1 - y0 + 1}, as its "
            "points say"
        )
    mask = np.zeros((height, width), dtype=bool)
    top, left = max(y0, 0), max(x0, 0)
    inside = pixels[top - y0 : max(height - y0, 0), left - x0 : max(width - x0, 0)]
    mask[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    if not mask.any():
        raise ValueError("mask covers no pixel of the image")
    return encode_mask(mask)


def _jsons(listing: Listing, folder: str, exclude: Sequence[str] = ()) -> list[str]:
    return [posixpath.join(f, n) for f in listing.walk(folder, exclude) for n in listing.files(f, "*.json")]


def _is_labelme(document: Any) -> bool:
    return (
        isinstance(document, dict)
        and isinstance(document.get("shapes"), list)
        and isinstance(document.get("imagePath"), str)
    )


def _rows(
    listing: Listing, folder: str, exclude: Sequence[str], split: str
) -> tuple[list[tuple[str, str, str]], list[Skipped], set[str]]:
    """(image id, path of the image, path of its JSON file) of each file, what cannot be used, and all labels.

    JSON files that are not LabelMe's are passed over.
    """
    files = _jsons(listing, folder, exclude)
    rows, skipped, labels = [], [], set[str]()
    taken: dict[str, str] = {}
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for file, (found, reason) in zip(files, pool.map(partial(_look, listing), files)):
            if found is None and not reason:
                continue
            name, seen = found or ("", set[str]())
            image = _image_of(listing, file, name) if found else ""
            if not reason and not image:
                reason = f"its image is missing: {file} names {name[:80]}"
            elif not reason and image in taken:
                reason = f"{taken[image]} is of the same image: expected one JSON file for each"
            if reason:
                facts = {"id": posixpath.basename(file), "file": image or file, "reason": reason}
                skipped.append({"split": split, "kind": "image", **facts})
                continue
            taken[image] = file
            labels |= seen
            rows.append((image.removeprefix(f"{folder}/") if folder else image, image, file))
    if not rows:
        reasons = f" ({skipped[0]['reason']})" if skipped else ""
        raise ValueError(f"{folder or listing.root}: no usable JSON file of LabelMe among {len(files)}{reasons}")
    return rows, skipped, labels


def _look(listing: Listing, file: str) -> tuple[tuple[str, set[str]] | None, str]:
    """(imagePath, labels) of a JSON file, None of one that is not LabelMe's; and why it cannot be read."""
    try:
        document = json.loads(decode_text(read_content(listing.uri(file)), file))
    except ImageError as error:
        return None, error.reason
    except (ValueError, RecursionError):
        return None, "its JSON file cannot be read: it is cut off or not JSON"
    if not _is_labelme(document):
        return None, ""
    labels = {shape["label"] for shape in document["shapes"] if isinstance(shape, dict) and _is_label(shape)}
    return (document["imagePath"], labels), ""


def _is_label(shape: dict[str, Any]) -> bool:
    return isinstance(shape.get("label"), str) and shape["label"] not in ("", _IGNORE, _BACKGROUND)


def _image_of(listing: Listing, file: str, name: str) -> str:
    """Path of the image that a JSON file names, or of the only one beside it that has its name; empty: there is none.

    LabelMe keeps the path that the image had when it was annotated.
    """
    folder, own = posixpath.split(file)
    name = name.replace("\\", "/")
    path = posixpath.normpath(posixpath.join(folder, name))
    if not posixpath.isabs(name) and not path.startswith("..") and listing.file(path) is not None:
        return path
    beside = [n for n in listing.files(folder) if posixpath.splitext(n)[0] == own.removesuffix(".json") and n != own]
    images = [n for n in beside if n.lower().endswith(IMAGE_SUFFIXES)]
    if len(images) != 1 and posixpath.basename(name) in listing.files(folder):
        images = [posixpath.basename(name)]
    return posixpath.join(folder, images[0]) if len(images) == 1 else ""


def _categories(listing: Listing, labels: set[str]) -> tuple[Category, ...]:
    names = sorted(labels)
    if listing.file(LABELS_FILE) is not None:
        lines = [line.strip() for line in read_text(listing.uri(LABELS_FILE), LABELS_FILE).splitlines()]
        listed = [line for line in dict.fromkeys(lines) if line not in ("", _IGNORE, _BACKGROUND)]
        if missing := sorted(labels - set(listed)):
            raise ValueError(f"{LABELS_FILE}: the label {missing[0]!r} of a JSON file is not in it")
        names = listed
    if not names:
        raise ValueError(f"{listing.root}: the JSON files hold no label: expected at least one class")
    return tuple(Category(number, name) for number, name in enumerate(names, start=1))
