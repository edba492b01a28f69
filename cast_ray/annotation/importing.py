"""From the files of an annotation tool back to labelled data, with what a person changed in them."""

from __future__ import annotations

import json
import posixpath
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from cast_ray.annotation.changes import KINDS, Kept, compare
from cast_ray.annotation.coco_files import read_coco
from cast_ray.annotation.exported import EXPORTED, Exported, ExportedImage, is_relative
from cast_ray.annotation.exporting import new_folder, photo_uri
from cast_ray.annotation.label_studio import read_tasks
from cast_ray.annotation.returned import Returned
from cast_ray.annotation.yolo_files import read_yolo
from cast_ray.common.text import first_line, first_of, nearest
from cast_ray.common.text_files import parse_json, read_text
from cast_ray.common.version import VERSION
from cast_ray.contracts.records import mask_areas
from cast_ray.data.formats.yolo import YAML_NAMES
from cast_ray.data.reading.image_files import name_key
from cast_ray.data.reading.images import ImageError, check_image, read_content
from cast_ray.data.reading.listing import Listing
from cast_ray.data.reading.photos import INSTANCES

REPORT, AGAIN = "import.json", "not_imported.txt"
MAX_FAULTS = 3
_READ_SUFFIXES = (".json", ".txt", *(".yaml", ".yml"))
_MAX_UNPACKED_BYTES = 8 << 30
_NOT_ANNOTATIONS = (EXPORTED, "cvat_labels.json", "notes.json", "info.json")


@dataclass
class Imported:
    """What was imported.

    counts: of each of `changes.KINDS`, over all images. new_classes: name -> number of objects. not_returned,
    unfinished: file names of images without an answer. faults: what was left out, with its reason; left_out: file names
    of the images that were left out for it. num_cut: objects that were cut off at the border of their image.
    """

    counts: Counter[str] = field(default_factory=Counter)
    images: dict[str, Counter[str]] = field(default_factory=dict)
    new_classes: Counter[str] = field(default_factory=Counter)
    not_returned: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    num_cut: int = 0

    def summary(self) -> list[str]:
        """Returns what happened, one sentence a line."""
        missing = [
            f"{len(names)} {words}"
            for names, words in (
                (self.not_returned, "not in the export"),
                (self.unfinished, "not finished by a person"),
                (self.left_out, "left out for a fault"),
            )
            if names
        ]
        lines = [f"{len(self.images)} images imported{', ' if missing else ''}{', '.join(missing)}"]
        lines.append("objects: " + ", ".join(f"{self.counts[kind]} {kind}" for kind in KINDS if self.counts[kind]))
        if self.num_cut:
            lines.append(f"{self.num_cut} objects reach outside their image and were cut off at its border")
        return lines


def read_returned(place: str, exported: Exported) -> Returned:
    """Reads what a tool exported: a zip file, a folder, or a JSON file. Its format is recognised by its contents.

    Raises:
        ValueError: nothing is there that one of the tools writes, or a file of it cannot be read as a whole.
    """
    returned = Returned()
    with _unpacked(place) as path:
        if path.is_file():
            _read_json(str(path), place, exported, returned)
            return returned
        listing = Listing(str(path))
        yaml_file = next((name for name in listing.files("") if name.lower() in YAML_NAMES), None)
        if yaml_file:
            read_yolo(listing, yaml_file, exported, returned)
            return returned
        folders = ("", "annotations", "train", "result")
        files = [posixpath.join(f, n) for f in folders if not f or f in listing.folders("") for n in listing.files(f)]
        files = [f for f in files if f.lower().endswith(".json") and posixpath.basename(f) not in _NOT_ANNOTATIONS]
        if not files:
            raise ValueError(
                f"{place}: no export of an annotation tool: expected a COCO or Label Studio .json file, or YOLO's "
                f"{YAML_NAMES[0]}, in it or in its folder annotations"
            )
        for file in files:
            _read_json(listing.uri(file), file, exported, returned)
    return returned


def _read_json(uri: str, file: str, exported: Exported, returned: Returned) -> None:
    document = parse_json(read_text(uri, file), file)
    if isinstance(document, list):
        read_tasks(document, file, exported, returned)
    else:
        read_coco(uri, file, exported, returned)


@contextmanager
def _unpacked(place: str) -> Iterator[Path]:
    """Gives a path as it is; of a zip file, a temporary folder with its text files."""
    path = Path(place).expanduser()
    if not path.exists():
        raise ValueError(f"{place}: no such file or folder")
    if path.is_dir() or not zipfile.is_zipfile(path):
        if path.is_file() and path.suffix.lower() != ".json":
            raise ValueError(f"{place}: not a .zip or .json file, or the file is not whole")
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="cast-ray-") as folder:
        try:
            with zipfile.ZipFile(path) as file:
                members = [m for m in file.infolist() if m.filename.lower().endswith(_READ_SUFFIXES)]
                if sum(member.file_size for member in members) > _MAX_UNPACKED_BYTES:
                    raise ValueError(f"{place}: its text files are larger than {_MAX_UNPACKED_BYTES >> 30} GiB")
                file.extractall(folder, members)
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise ValueError(f"{place}: the zip file is not whole ({first_line(error)})") from None
        inside = [entry for entry in Path(folder).iterdir()]
        yield inside[0] if len(inside) == 1 and inside[0].is_dir() and inside[0].name != "annotations" else Path(folder)


def import_returned(exported: Exported, returned: Returned, photos: str, out: Path, *, skip_bad: bool) -> Imported:
    """Writes the images that came back, with their labels, as a COCO dataset: `instances.json` and `images`.

    Ids and names of images, ids of classes and of known objects are those of the label file. `import.json` says what
    changed in each image; `not_imported.txt` lists the others, as `annotate export --images` takes it.

    Args:
        photos: folder of the photos; empty: where they were when they were exported.
        out: a new folder, which is there whole or not at all.
        skip_bad: leaves out images with something that cannot be used, instead of stopping.

    Raises:
        ValueError: something cannot be used, or no image came back; nothing is written then.
    """
    faults = returned.faults + [fault for each in returned.images.values() for fault in each.faults]
    if faults and not skip_bad:
        raise ValueError(
            f"{first_of(faults, MAX_FAULTS)}. Nothing was written. Correct it in the tool and export again, or leave "
            "these images out by --skip-bad"
        )
    good = {name: each for name, each in returned.images.items() if not each.faults}
    if not good:
        raise ValueError(f"no image of the {len(exported.images)} that were exported came back with usable labels")
    names = exported.names()
    done = Imported(faults=faults, num_cut=returned.num_cut)
    kept: dict[str, list[Kept]] = {}
    for image in exported.images:
        if image.name in good:
            kept[image.name], counts = compare(image, good[image.name].objects, names)
            done.images[image.file_name] = counts
            done.counts += counts
        elif image.name in returned.images:
            done.left_out.append(image.file_name)
        elif image.name in returned.unfinished:
            done.unfinished.append(image.file_name)
        else:
            done.not_returned.append(image.file_name)
    category_ids = {name: category_id for category_id, name in names.items()}
    for name in returned.classes:
        if name not in category_ids:
            category_ids[name] = max(category_ids.values()) + 1
            done.new_classes[name] = 0
    for each in (each for objects in kept.values() for each in objects):
        if each.class_name in done.new_classes:
            done.new_classes[each.class_name] += 1
    with new_folder(out) as folder:
        _write_dataset(folder, exported, kept, category_ids, photos)
        (folder / REPORT).write_text(json.dumps(_report(done), indent=1))
        again = [*done.not_returned, *done.unfinished, *done.left_out]
        if again:
            (folder / AGAIN).write_text("".join(f"{name}\n" for name in again))
    return done


def new_class_words(exported: Exported, done: Imported) -> list[str]:
    """Returns a warning about each class that was not exported."""
    known = list(exported.names().values())
    return [
        f"class {name!r} was added in the tool ({count} objects){hint}. Images that were not searched for it count as "
        "having none."
        for name, count in done.new_classes.items()
        for hint in (nearest(name, known) if name_key(name) in map(name_key, known) else "",)
    ]


def _write_dataset(
    folder: Path, exported: Exported, kept: dict[str, list[Kept]], category_ids: dict[str, int], photos: str
) -> None:
    by_id = {c.id: c.name for c in exported.categories}
    images, annotations = [], list[dict[str, Any]]()
    number = max((each.id for image in exported.images for each in image.objects), default=0)
    for image in (image for image in exported.images if image.name in kept):
        file_name = image.file_name if is_relative(image.file_name) else image.name
        images.append({"id": image.id, "file_name": file_name, "height": image.height, "width": image.width})
        _copy_photo(image, photos, folder / "images" / file_name)
        for each in kept[image.name]:
            number += each.before is None
            facts = {"id": each.before.id if each.before else number, "category_id": category_ids[each.class_name]}
            annotations.append(facts | _coco_fields(image, each.rle, 0))
        for category_id, rle in image.regions:
            number += 1
            annotations.append({"id": number, "category_id": category_id} | _coco_fields(image, rle, 1))
    document = {
        "info": {"description": "cast_ray annotate import", "version": VERSION},
        "categories": [{"id": number, "name": by_id.get(number, name)} for name, number in category_ids.items()],
        "images": images,
        "annotations": annotations,
    }
    (folder / INSTANCES).write_text(json.dumps(document))


def _coco_fields(image: ExportedImage, rle: bytes, iscrowd: int) -> dict[str, Any]:
    mask = {"size": [image.height, image.width], "counts": rle}
    return {
        "image_id": image.id,
        "segmentation": {"size": [image.height, image.width], "counts": rle.decode()},
        "bbox": coco_mask.toBbox(mask).tolist(),  # type: ignore[arg-type]
        "area": int(mask_areas([mask])[0]),  # type: ignore[list-item]
        "iscrowd": iscrowd,
    }


def _copy_photo(image: ExportedImage, photos: str, path: Path) -> None:
    uri = photo_uri(photos, image.file_name) if photos else image.uri
    try:
        check_image(uri, (image.height, image.width), decode=False)
        content = read_content(uri)
    except (ImageError, OSError) as error:
        reason = error.reason if isinstance(error, ImageError) else first_line(error)
        raise ValueError(f"{uri}: {reason}: if the photos lie in another folder now, name it by --photos") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _report(done: Imported) -> dict[str, Any]:
    return {
        "version": VERSION,
        "counts": {kind: done.counts[kind] for kind in KINDS},
        "new_classes": dict(done.new_classes),
        "cut_off": done.num_cut,
        "images": {name: dict(counts) for name, counts in done.images.items()},
        "not_returned": done.not_returned,
        "unfinished": done.unfinished,
        "left_out": done.left_out,
        "faults": done.faults,
    }
