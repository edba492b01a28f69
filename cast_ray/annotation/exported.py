"""What was exported to an annotation tool, as `exported.json` keeps it beside the tool's own files."""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cast_ray.common.paths import is_uri
from cast_ray.common.text import nearest
from cast_ray.common.text_files import parse_json, read_text
from cast_ray.common.version import VERSION
from cast_ray.contracts.records import Category, class_names
from cast_ray.data.reading.image_files import name_forms, name_key
from cast_ray.data.reading.photos import output_names

EXPORTED = "exported.json"
_DESCRIPTION = "cast_ray annotate export"


@dataclass(frozen=True)
class ExportedObject:
    """An object as it was pre-drawn.

    id: of the annotation in the label file. rle: its mask, COCO compressed counts. shown: the mask as the tool was
    given it, which is `rle` itself, or what its polygons cover. polygons: in pixels; empty: given as a mask.
    """

    id: int
    category_id: int
    rle: bytes
    shown: bytes
    score: float | None = None
    polygons: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class ExportedImage:
    """An image that was exported.

    id, file_name: as in the label file. name: what it is called in the tool's files. uri: path or URI of the photo.
    regions: ignore regions (`iscrowd` 1), COCO compressed counts by category id, which no tool is shown.
    """

    id: int | str
    file_name: str
    name: str
    uri: str
    height: int
    width: int
    objects: tuple[ExportedObject, ...] = ()
    regions: tuple[tuple[int, bytes], ...] = ()


@dataclass(frozen=True)
class Exported:
    """All that was exported: for which tool, from which folder of photos, the classes and the images."""

    tool: str
    photos: str
    categories: tuple[Category, ...]
    images: tuple[ExportedImage, ...]

    def names(self) -> dict[int, str]:
        """Category id -> the name of the class in the tool, which no other class has."""
        return dict(zip((c.id for c in self.categories), class_names(self.categories)))

    def find(self, name: str) -> ExportedImage:
        """Returns the image that a tool means by a file name, whatever the tool put around the name.

        Raises:
            ValueError: no image was exported under such a name, or several were.
        """
        if name in self._by_name:
            return self._by_name[name]
        for form in name_forms(name):
            parts = [part for part in form.replace("\\", "/").split("/") if part not in ("", ".", "..")]
            for start in range(len(parts)):
                found = self._by_key.get(name_key("/".join(parts[start:])), [])
                if len(found) == 1:
                    return found[0]
        last = posixpath.basename(name.replace("\\", "/"))
        same = [image for image in self.images if name_key(posixpath.basename(image.name)) == name_key(last)]
        if len(same) == 1:
            return same[0]
        if same:
            raise ValueError(f"image {name!r} may be any of {len(same)} exported images, such as {same[0].name!r}")
        raise ValueError(f"image {name!r} was not exported{nearest(name, list(self._by_name))}")

    @cached_property
    def _by_name(self) -> dict[str, ExportedImage]:
        return {image.name: image for image in self.images}

    @cached_property
    def _by_key(self) -> dict[str, list[ExportedImage]]:
        found: dict[str, list[ExportedImage]] = {}
        for image in self.images:
            found.setdefault(name_key(image.name), []).append(image)
        return found


def tool_names(file_names: Sequence[str]) -> list[str]:
    """Names of images in a tool's files: relative, and no two of them equal without suffix, as `a.png` and `a.jpg` are.

    Tools tell images apart by their names without suffix. A name that is fit for that stays as it is.
    """
    stems = Counter(posixpath.splitext(name)[0] for name in file_names)
    if max(stems.values(), default=0) < 2 and all(is_relative(name) for name in file_names):
        return list(file_names)
    return [stem + posixpath.splitext(name)[1] for stem, name in zip(output_names(file_names), file_names)]


def is_relative(name: str) -> bool:
    """Returns whether a file name stays below the folder that it is relative to, on every system."""
    return not is_uri(name) and not posixpath.isabs(name) and ".." not in name.split("/") and "\\" not in name


def write_exported(folder: Path, exported: Exported) -> None:
    """Writes `exported.json`, which is a COCO file with a few more fields."""
    images, annotations = [], []
    for image in exported.images:
        facts = {"id": image.id, "file_name": image.file_name, "height": image.height, "width": image.width}
        images.append(facts | {"name": image.name, "uri": image.uri})
        for each in image.objects:
            entry = _annotation(image, each.id, each.category_id, each.rle, 0)
            if each.score is not None:
                entry["score"] = each.score
            if each.shown != each.rle:
                entry["shown"] = each.shown.decode()
            annotations.append(entry)
        annotations += [_annotation(image, 0, category_id, rle, 1) for category_id, rle in image.regions]
    document = {
        "info": {"description": _DESCRIPTION, "version": VERSION, "tool": exported.tool, "folder": exported.photos},
        "categories": [{"id": c.id, "name": c.name} for c in exported.categories],
        "images": images,
        "annotations": annotations,
    }
    (folder / EXPORTED).write_text(json.dumps(document))


def _annotation(image: ExportedImage, number: int, category_id: int, rle: bytes, iscrowd: int) -> dict[str, Any]:
    segmentation = {"size": [image.height, image.width], "counts": rle.decode()}
    facts = {"id": number, "image_id": image.id, "category_id": category_id}
    return {**facts, "segmentation": segmentation, "iscrowd": iscrowd}


def read_exported(folder: str) -> Exported:
    """Reads what `write_exported` wrote.

    Raises:
        ValueError: the folder holds no such file, or not one of `annotate export`.
    """
    file = posixpath.join(folder, EXPORTED)
    document = parse_json(read_text(file, f"--against {file}"), f"--against {file}")
    info = document.get("info", {}) if isinstance(document, dict) else {}
    if info.get("description") != _DESCRIPTION:
        raise ValueError(
            f"--against {file}: not written by `cast-ray annotate export`: expected the folder of its --out"
        )
    images = {
        entry["id"]: ExportedImage(**{key: entry[key] for key in ("id", "file_name", "name", "uri", "height", "width")})
        for entry in document["images"]
    }
    for entry in document["annotations"]:
        image, rle = images[entry["image_id"]], entry["segmentation"]["counts"].encode()
        if entry["iscrowd"]:
            image = replace(image, regions=(*image.regions, (entry["category_id"], rle)))
        else:
            shown = entry.get("shown", "").encode() or rle
            each = ExportedObject(entry["id"], entry["category_id"], rle, shown, entry.get("score"))
            image = replace(image, objects=(*image.objects, each))
        images[image.id] = image
    categories = tuple(Category(c["id"], c["name"]) for c in document["categories"])
    return Exported(info["tool"], info["folder"], categories, tuple(images.values()))
