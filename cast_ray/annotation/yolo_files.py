"""YOLO's polygons on their way to a tool and back, see `data/formats/yolo.py`."""

from __future__ import annotations

import posixpath
from pathlib import Path

import yaml

from cast_ray.annotation.exported import Exported
from cast_ray.annotation.returned import MAX_OUTSIDE_PX, Returned, noted
from cast_ray.common.text_files import decode_text
from cast_ray.data.formats.yolo import YAML_NAMES, read_labels, read_names
from cast_ray.data.reading.images import read_content
from cast_ray.data.reading.listing import Listing

_DIGITS = 6


def write_yolo(folder: Path, exported: Exported, copies_images: bool) -> None:
    """Writes `data.yaml`, the photos in `images/train`, and a text file for each of them in `labels/train`.

    An image without objects has an empty text file, which says that somebody has looked at it.
    """
    names = exported.names()
    document = {"path": ".", "train": "images/train", "val": "images/train", "names": dict(enumerate(names.values()))}
    (folder / YAML_NAMES[0]).write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    numbers = {category_id: number for number, category_id in enumerate(names)}
    for image in exported.images:
        lines = []
        for each in image.objects:
            (points,) = each.polygons
            shares = (p / (image.height if i % 2 else image.width) for i, p in enumerate(points))
            lines.append(" ".join([str(numbers[each.category_id]), *(f"{share:.{_DIGITS}f}" for share in shares)]))
        labels = folder / "labels/train" / f"{posixpath.splitext(image.name)[0]}.txt"
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.write_text("".join(f"{line}\n" for line in lines))
        if copies_images:
            path = folder / "images/train" / image.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read_content(image.uri))


def read_yolo(listing: Listing, yaml_file: str, exported: Exported, returned: Returned) -> None:
    """Reads the text files below `labels`; an image without one has not come back.

    Args:
        listing: the tool's export.
        yaml_file: the file of classes in it.
        returned: what is read is added to it.

    Raises:
        ValueError: the YAML file cannot be used, or there is no text file.
    """
    names = read_names(listing, yaml_file)
    returned.classes |= dict.fromkeys(names)
    files = [f"{place}/{n}" for place in listing.walk("labels") for n in listing.files(place, "*.txt")]
    if not files:
        raise ValueError(f"{listing.root}: no text file below labels: expected one for each image")
    stems = {posixpath.splitext(image.name)[0]: image.name for image in exported.images}
    for file in sorted(files):
        with noted(returned.faults, file):
            stem = posixpath.splitext(file)[0].removeprefix("labels/")
            ends = (stem.split("/", start)[-1] for start in range(stem.count("/") + 1))
            image = exported.find(next((stems[end] for end in ends if end in stems), f"{posixpath.basename(stem)}.txt"))
            to = returned.add_image(image, file)
            image_hw = (image.height, image.width)
            instances, unknown = read_labels(listing.uri(file), image_hw, len(names))
            to.faults += [f"{file}, {place}: {reason} (image {image.name!r})" for place, reason in unknown]
            for each in instances:
                returned.add_object(to, names[each["category_id"]], each["rle"])
            if not unknown:
                lines = decode_text(read_content(listing.uri(file)), file).splitlines()
                shares = [[float(word) for word in line.split()[1:]] for line in lines if line.strip()]
                outside = MAX_OUTSIDE_PX / max(image_hw)
                returned.num_cut += sum(min(each) < -outside or max(each) > 1 + outside for each in shares)
