"""From a label file to the files of an annotation tool."""

from __future__ import annotations

import os
import posixpath
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np

from cast_ray.annotation.coco_files import write_coco, write_cvat
from cast_ray.annotation.exported import Exported, ExportedImage, ExportedObject, tool_names, write_exported
from cast_ray.annotation.label_studio import LOCAL_FILES, write_label_studio
from cast_ray.annotation.outlines import iou, outline
from cast_ray.annotation.yolo_files import write_yolo
from cast_ray.common.files import PARTIAL
from cast_ray.common.paths import absolute, is_uri
from cast_ray.common.text import first_of, nearest
from cast_ray.common.text_files import parse_json, read_text
from cast_ray.contracts.records import Category
from cast_ray.data.formats.coco_document import is_crowd, read_categories, read_document, references_of, usable_images
from cast_ray.data.formats.segmentations import encode_segmentation
from cast_ray.data.reading.images import ImageError, check_image
from cast_ray.data.reading.listing import child
from cast_ray.data.reading.photos import IMAGES, INSTANCES, find_photos
from cast_ray.inference.result_files import shared_folder

Tool = Literal["coco", "cvat", "label-studio", "yolo"]
Shapes = Literal["masks", "polygons"]
TOOLS: tuple[Tool, ...] = get_args(Tool)
MAX_NAMED = 3


class Write(Protocol):
    """Writes the files of a tool into a folder."""

    def __call__(self, folder: Path, exported: Exported, copies_images: bool) -> None: ...


class Lost(NamedTuple):
    """What the conversion to polygons has lost: objects, those that are not exact, their mean and least IoU."""

    num_objects: int
    num_inexact: int
    mean_iou: float
    least_iou: float


@dataclass(frozen=True)
class Labels:
    """A label file, or photos without labels: the folder of the photos, the classes, and the images."""

    folder: str
    categories: tuple[Category, ...]
    images: tuple[ExportedImage, ...]


def read_labels(source: str, photos: str) -> Labels:
    """Reads what `label` or `predict` wrote, or any other COCO file.

    Args:
        source: the output folder of `label` or `predict`, or a COCO file.
        photos: folder that the file's names are relative to; empty: the one that the file names.

    Raises:
        ValueError: the file cannot be read, something in it cannot be used, or it names no folder of photos.
    """
    file = source
    if not source.endswith(".json"):
        present = [name for name in (INSTANCES, IMAGES) if os.path.exists(os.path.join(source, name))]
        if not present:
            raise ValueError(f"{source}: expected a COCO file, or a folder with {INSTANCES} or {IMAGES}")
        file = os.path.join(source, present[0])
    document = read_document(absolute(file), file)
    folder = photos or _folder_of(file)
    categories = read_categories(document["categories"], file)
    known = {c.id for c in categories}
    entries, repeated = usable_images(document["images"], "train", file)
    if repeated:
        raise ValueError(f"{file}: image {repeated[0]['id']}: {repeated[0]['reason']}")
    objects: dict[Any, list[ExportedObject]] = {entry["id"]: [] for entry in entries}
    regions: dict[Any, list[tuple[int, bytes]]] = {entry["id"]: [] for entry in entries}
    by_id = {entry["id"]: entry for entry in entries}
    for number, annotation in enumerate(document["annotations"], 1):
        try:
            image_id, category_id = references_of(annotation, by_id, known)
            size = (by_id[image_id]["height"], by_id[image_id]["width"])
            rle = encode_segmentation(annotation.get("segmentation"), *size)
            is_region = is_crowd(annotation)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{file}: annotation {annotation.get('id')!r}: {error} (see `cast-ray inspect`)") from None
        if is_region:
            regions[image_id].append((category_id, rle))
        else:
            score = annotation.get("score")
            objects[image_id].append(ExportedObject(number, category_id, rle, rle, score))
    names = tool_names([str(entry["file_name"]) for entry in entries])
    images = tuple(
        ExportedImage(
            entry["id"],
            entry["file_name"],
            name,
            photo_uri(folder, entry["file_name"]),
            entry["height"],
            entry["width"],
            tuple(objects[entry["id"]]),
            tuple(regions[entry["id"]]),
        )
        for entry, name in zip(entries, names)
    )
    return Labels(folder, categories, images)


def list_labels(source: str, categories: Sequence[Category]) -> Labels:
    """Lists the photos of a folder, which have no labels yet.

    Raises:
        ValueError: there is no image, or one that cannot be read.
    """
    paths = [absolute(path) for path in find_photos([source]).paths]
    folder = shared_folder(paths)
    file_names = [path[len(folder) :].lstrip("/") for path in paths]
    images = []
    for number, (path, file_name, name) in enumerate(zip(paths, file_names, tool_names(file_names)), 1):
        try:
            height, width = check_image(path, None, decode=False)[0]
        except ImageError as error:
            raise ValueError(f"{path}: {error.reason}") from None
        images.append(ExportedImage(number, file_name, name, path, height, width))
    return Labels(folder, tuple(categories), tuple(images))


def _folder_of(file: str) -> str:
    document = parse_json(read_text(file, file), file)
    folder = (document.get("info") or {}).get("folder")
    if not isinstance(folder, str):
        raise ValueError(f"{file} does not say which folder its file names are relative to: name it by --photos")
    return folder


def photo_uri(folder: str, file_name: str) -> str:
    """Returns where a photo is: the name itself, if it is a whole path."""
    if is_uri(file_name) or posixpath.isabs(file_name) or not folder:
        return absolute(file_name)
    return child(absolute(folder), file_name)


def choose(labels: Labels, file: str) -> Labels:
    """Returns the images that a list names.

    Args:
        file: text file with a name of the label file, or a path that ends with one, in each line.

    Raises:
        ValueError: an empty list, or a line that names no image or more than one.
    """
    by_name = {image.file_name: image for image in labels.images}
    by_uri = {image.uri: image for image in labels.images}
    by_last = Counter(posixpath.basename(image.file_name) for image in labels.images)
    unique = {
        posixpath.basename(i.file_name): i for i in labels.images if by_last[posixpath.basename(i.file_name)] == 1
    }
    chosen: dict[str, ExportedImage] = {}
    for number, line in enumerate(read_text(file, f"--images {file}").splitlines(), 1):
        name = line.strip()
        if not name:
            continue
        image = by_name.get(name) or by_uri.get(absolute(name)) or unique.get(posixpath.basename(name))
        if image is None:
            raise ValueError(
                f"--images {file}, line {number}: {name!r} is not in the label file{nearest(name, list(by_name))}"
            )
        chosen[image.file_name] = image
    if not chosen:
        raise ValueError(f"--images {file}: names no image")
    return replace(labels, images=tuple(chosen.values()))


def export(
    labels: Labels, tool: Tool, shapes: Shapes | None, out: Path, *, copies_images: bool, url_prefix: str = LOCAL_FILES
) -> tuple[Exported, Lost | None]:
    """Writes the files of a tool, and `exported.json`, into a new folder, which is there whole or not at all.

    Args:
        shapes: of the objects; None: what loses least, masks except for YOLO.
        out: the folder; it must be missing or empty.
        copies_images: whether the photos are written too; Label Studio reads them from where they are.
        url_prefix: of the photos, for Label Studio.

    Returns:
        What was exported, and what polygons have lost (None: masks were written, which lose nothing).

    Raises:
        ValueError: the folder holds something, photos are missing or of another size, or YOLO is asked for masks.
    """
    shapes = shapes or ("polygons" if tool == "yolo" else "masks")
    if tool == "yolo" and shapes == "masks":
        raise ValueError("--shapes masks: YOLO's text files hold polygons only: expected --shapes polygons")
    _check_photos(labels.images)
    images = _in_one_folder(labels.images) if tool == "yolo" else labels.images
    lost = None
    if shapes == "polygons":
        images, lost = _with_polygons(images, is_one=tool in ("yolo", "label-studio"))
    exported = Exported(tool, absolute(labels.folder) if labels.folder else "", labels.categories, images)
    writers: dict[Tool, Write] = {"coco": write_coco, "cvat": write_cvat, "yolo": write_yolo}
    with new_folder(out) as partial_folder:
        if tool == "label-studio":
            write_label_studio(partial_folder, exported, url_prefix)
        else:
            writers[tool](partial_folder, exported, copies_images)
        write_exported(partial_folder, exported)
    return exported, lost


def _in_one_folder(images: Sequence[ExportedImage]) -> tuple[ExportedImage, ...]:
    """Gives images names without folders, which some readers of YOLO do not enter; not where two would be equal."""
    flat = [image.name.replace("/", "_") for image in images]
    stems = {posixpath.splitext(name)[0] for name in flat}
    return tuple(replace(i, name=n) for i, n in zip(images, flat)) if len(stems) == len(images) else tuple(images)


def _check_photos(images: Sequence[ExportedImage]) -> None:
    """Raises ValueError where photos cannot be read or have other sizes than the label file says."""
    bad = []
    for image in images:
        try:
            check_image(image.uri, (image.height, image.width), decode=False)
        except ImageError as error:
            bad.append(f"{image.uri}: {error.reason}")
        except OSError as error:
            bad.append(f"{image.uri}: {error.strerror or error}")
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(images)} photos cannot be used ({first_of(bad, MAX_NAMED)}): if they lie in another "
            "folder, name it by --photos"
        )


def _with_polygons(images: Sequence[ExportedImage], is_one: bool) -> tuple[tuple[ExportedImage, ...], Lost]:
    converted, ious = [], [1.0]
    for image in images:
        objects = []
        for each in image.objects:
            polygons, shown = outline(each.rle, image.height, image.width, is_one=is_one)
            objects.append(replace(each, polygons=polygons, shown=shown))
            ious.append(iou(each.rle, shown, image.height, image.width))
        converted.append(replace(image, objects=tuple(objects)))
    values = np.array(ious[1:] or ious)
    return tuple(converted), Lost(len(ious) - 1, int((values < 1).sum()), float(values.mean()), float(values.min()))


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Gives a folder to write to, which becomes `out` when the block ends without an error.

    Raises:
        ValueError: `out` is there and holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} holds something: expected a new folder, or an empty one")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=".", suffix=PARTIAL))
    folder.chmod(0o755)
    try:
        yield folder
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
