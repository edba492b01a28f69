"""Any folder in COCO format (images + instances JSON) as record tables."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from cast_ray.datasets.paths import absolute, is_uri, join, read_bytes, resolve
from cast_ray.datasets.segmentations import encode_segmentation
from cast_ray.recipe import DataConfig
from cast_ray.records import INSTANCE_TYPE, RECORD_SCHEMA, Category, DatasetSplits, encode_image_id

MAX_IMAGE_PIXELS = 178_956_970
_TRAIN_NAMES = (
    "instances.json",
    "annotations.json",
    "annotations/instances_train*.json",
    "annotations/instances.json",
    "instances_train*.json",
    "train/_annotations.coco.json",
    "annotations/*.json",
)
_VAL_NAMES = ("annotations/instances_val*.json", "instances_val*.json", "valid/_annotations.coco.json")
_OTHER_TASKS = ("captions_*", "person_keypoints_*", "panoptic_*", "stuff_*", "*_val*", "val*", "*_test*", "test*")


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
    _check_folder(root, config.root)
    train_file = _annotation_file(root, config.annotations, "data.annotations", _TRAIN_NAMES)
    val_file = _annotation_file(root, config.val_annotations, "data.val_annotations", _VAL_NAMES, required=False)
    if train_file is None:
        raise AssertionError("a required annotation file was neither found nor refused")
    bad = config.max_bad_fraction
    if val_file is None or val_file == train_file:
        whole = read_annotations(root, train_file, _image_dirs(config.image_dir, train_file, "train"), bad)
        train, val = _hold_out(whole.table, config.val_fraction, train_file)
        parts = [whole]
    else:
        first = read_annotations(root, train_file, _image_dirs(config.image_dir, train_file, "train"), bad)
        second = read_annotations(root, val_file, _image_dirs(config.val_image_dir, val_file, "val"), bad)
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
        image_dirs: folders relative to root that may hold the images; the one that holds most of them is taken.
        max_bad_fraction: the share of unusable images, or of unusable annotations, that is still accepted.

    Raises:
        ValueError: see `load`.
    """
    document, sha256 = _read_document(root, annotation_file)
    categories = _read_categories(document["categories"], annotation_file)
    images, annotations = document["images"], document["annotations"]
    _check_references(images, annotations, categories, annotation_file)
    found, skipped = _find_images(root, images, image_dirs, annotation_file)
    row_of = {images[index]["id"]: row for row, (index, _, _) in enumerate(found)}
    shapes = [(images[index]["height"], images[index]["width"]) for index, _, _ in found]
    _check_bad(skipped, "images", len(images), max_bad_fraction, annotation_file)
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
    _check_bad(skipped[bad_images:], "annotations", len(annotations), max_bad_fraction, annotation_file)
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


def _check_folder(root: str, given: str) -> None:
    filesystem, path = resolve(root)
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise ValueError(f"data.root: {given} cannot be read ({_first_line(error)})") from None
    if info.type != fs.FileType.Directory:
        what = "is a file" if info.type == fs.FileType.File else "does not exist"
        raise ValueError(f"data.root: {given} {what}: expected the folder of a COCO-format dataset")


def _annotation_file(root: str, given: str, key: str, names: Sequence[str], required: bool = True) -> str | None:
    filesystem, base = resolve(root)
    if given:
        target, path = resolve(given if is_uri(given) else join(root, given))
        if target.get_file_info(path).type != fs.FileType.File:
            raise ValueError(f"{key}: {given} is not a file below {root}")
        return given
    listed: dict[str, list[str]] = {}
    for pattern in names:
        folder, name = posixpath.split(pattern)
        if folder not in listed:
            selector = fs.FileSelector(posixpath.join(base, folder), allow_not_found=True)
            listed[folder] = [f.base_name for f in filesystem.get_file_info(selector) if f.is_file]
        matches = sorted(n for n in listed[folder] if fnmatch(n, name))
        if name == "*.json":
            matches = [n for n in matches if not any(fnmatch(n, other) for other in _OTHER_TASKS)]
        if len(matches) > 1:
            raise ValueError(f"{root}: several annotation files fit ({', '.join(matches[:4])}): name one by {key}")
        if matches:
            return posixpath.join(folder, matches[0])
    if required:
        raise ValueError(f"{root}: no annotation file found (looked for {', '.join(names)}): name it by {key}")
    return None


def _image_dirs(given: str, annotation_file: str, split: str) -> list[str]:
    if given:
        return [given]
    beside = "" if is_uri(annotation_file) else posixpath.dirname(annotation_file)
    return list(dict.fromkeys([f"{split}*", "images", f"images/{split}*", "", beside]))


def _read_document(root: str, file: str) -> tuple[dict[str, Any], str]:
    try:
        content = read_bytes(file if is_uri(file) else join(root, file))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({_first_line(error)})") from None
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({_first_line(error)})") from None
    if not isinstance(document, dict):
        raise ValueError(f"{file}: not COCO: expected an object with images, annotations, categories, got a list")
    for name in ("images", "annotations", "categories"):
        value = document.get(name)
        if not isinstance(value, list):
            got = f"of type {type(value).__name__}" if name in document else "missing"
            raise ValueError(f"{file}: not COCO: {name!r} is {got}: expected a list")
        for index, entry in enumerate(value):
            if not isinstance(entry, dict):
                raise ValueError(f"{file}: not COCO: {name}[{index}] is of type {type(entry).__name__}")
    if not document["images"]:
        raise ValueError(f"{file}: 'images' is empty: expected at least one image")
    return document, sha256


def _read_categories(entries: list[dict[str, Any]], file: str) -> tuple[Category, ...]:
    if not entries:
        raise ValueError(f"{file}: 'categories' is empty: expected at least one class")
    categories: dict[int, Category] = {}
    for index, entry in enumerate(entries):
        identifier, name = entry.get("id"), entry.get("name")
        if type(identifier) is not int or not -(2**63) <= identifier < 2**63:
            raise ValueError(f"{file}: categories[{index}].id is {identifier!r}: expected a 64-bit integer")
        if not isinstance(name, str):
            raise ValueError(f"{file}: categories[{index}].name is {name!r}: expected a string")
        if identifier in categories:
            raise ValueError(f"{file}: categories[{index}].id is {identifier} for the second time")
        categories[identifier] = Category(identifier, name)
    return tuple(categories.values())


def _check_references(
    images: list[dict[str, Any]], annotations: list[dict[str, Any]], categories: Iterable[Category], file: str
) -> None:
    image_ids = set()
    for index, image in enumerate(images):
        identifier = image.get("id")
        if type(identifier) not in (int, str):
            raise ValueError(f"{file}: images[{index}].id is {identifier!r}: expected an integer or a string")
        if identifier in image_ids:
            raise ValueError(f"{file}: images[{index}].id is {identifier!r} for the second time")
        image_ids.add(identifier)
    category_ids = {category.id for category in categories}
    for index, annotation in enumerate(annotations):
        for name, known in (("image_id", image_ids), ("category_id", category_ids)):
            value = annotation.get(name)
            if type(value) not in (int, str) or value not in known:
                kind = name.removesuffix("_id")
                got = f"is {value!r}" if name in annotation else "is missing"
                raise ValueError(
                    f"{file}: annotations[{index}].{name} {got} (annotation id {annotation.get('id')!r}): "
                    f"no such {kind}"
                )


def _find_images(
    root: str, images: list[dict[str, Any]], image_dirs: Sequence[str], file: str
) -> tuple[list[tuple[int, str, int]], list[dict[str, str]]]:
    """(index in the file, path below root, bytes) of every usable image, and the others with their reason."""
    names = [image.get("file_name") for image in images]
    folder, files = _list_images(root, names, image_dirs)
    found, skipped = [], []
    for index, (image, name) in enumerate(zip(images, names)):
        size = 0
        path = ""
        reason = _bad_size(image)
        if not isinstance(name, str) or not name or "\0" in name:
            reason = f"file_name is {name!r}: expected a string"
        elif not reason:
            path = posixpath.normpath(posixpath.join(folder, name))
            if posixpath.isabs(name) or is_uri(name) or path == ".." or path.startswith("../"):
                reason = "file_name leaves the dataset's folder"
            elif path not in files:
                reason = "the file is missing"
            elif not (size := files[path]):
                reason = "the file is empty"
        if reason:
            skipped.append({"kind": "image", "id": str(image["id"]), "file": str(name), "reason": reason})
        else:
            found.append((index, path, size))
    if not found:
        raise ValueError(f"{file}: no usable image of {len(images)}: {_reasons(skipped)}")
    return found, skipped


def _bad_size(image: dict[str, Any]) -> str:
    for name in ("height", "width"):
        if type(image.get(name)) is not int or image[name] < 1:
            return f"{name} is {str(image.get(name))[:40]}: expected a number of pixels"
    if image["height"] * image["width"] > MAX_IMAGE_PIXELS:
        return f"{image['width']} x {image['height']} pixels, at most {MAX_IMAGE_PIXELS} are read"
    return ""


def _list_images(root: str, names: list[Any], image_dirs: Sequence[str]) -> tuple[str, dict[str, int]]:
    """The folder below root that the file names are relative to, and path below root -> bytes of what lies there.

    Folders are listed once instead of asking for each file: 118,000 requests to an object store would take an hour.
    """
    filesystem, base = resolve(root)
    base = base.rstrip("/")
    usable = [n for n in names if isinstance(n, str) and n and "\0" not in n and not posixpath.isabs(n)]
    probe = usable[:: max(1, len(usable) // 16)][:16]
    folders = [f for pattern in image_dirs for f in _expand(filesystem, base, pattern)]
    best, hits = folders[0] if folders else "", -1
    for folder in folders:
        paths = [posixpath.normpath(posixpath.join(base, folder, name)) for name in probe]
        score = sum(info.is_file for info in filesystem.get_file_info(paths)) if paths else 0
        if score > hits:
            best, hits = folder, score
    wanted = {posixpath.normpath(posixpath.join(best, posixpath.dirname(name))) for name in usable}
    files: dict[str, int] = {}
    for folder in sorted(wanted):
        if folder == ".." or folder.startswith(("../", "/")):
            continue
        selector = fs.FileSelector(posixpath.normpath(posixpath.join(base, folder)), allow_not_found=True)
        for info in filesystem.get_file_info(selector):
            if info.is_file:
                files[posixpath.normpath(posixpath.join(folder, info.base_name))] = info.size
    return best, files


def _expand(filesystem: fs.FileSystem, base: str, pattern: str) -> list[str]:
    if "*" not in pattern:
        return [pattern]
    folder, name = posixpath.split(pattern)
    selector = fs.FileSelector(posixpath.join(base, folder), allow_not_found=True)
    listed = filesystem.get_file_info(selector)
    found = sorted(i.base_name for i in listed if i.type == fs.FileType.Directory and fnmatch(i.base_name, name))
    return [posixpath.join(folder, n) for n in found]


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


def _check_bad(skipped: list[dict[str, str]], kind: str, total: int, max_bad_fraction: float, file: str) -> None:
    if len(skipped) > max_bad_fraction * total:
        raise ValueError(
            f"{file}: {len(skipped)} of {total} {kind} skipped, above data.max_bad_fraction={max_bad_fraction}: "
            f"{_reasons(skipped)}"
        )


def _reasons(skipped: list[dict[str, str]]) -> str:
    return "; ".join(f"{s['kind']} {s['id']} ({s['file'][:80]}): {s['reason']}" for s in skipped[:3])


def _content_hash(parts: Sequence[AnnotatedImages]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.annotation_sha256.encode())
        digest.update(json.dumps(sorted(part.sizes)).encode())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
