"""COCO annotation files on their way to a tool and back: plain ones, and those of CVAT."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from cast_ray.annotation.exported import Exported, ExportedImage, ExportedObject
from cast_ray.annotation.returned import Returned, ReturnedImage, check_size, noted, reaches_outside
from cast_ray.contracts.records import mask_areas, rle_runs
from cast_ray.data.formats.coco_document import (
    is_crowd,
    read_categories,
    read_document,
    references_of,
    usable_images,
    whole_number,
)
from cast_ray.data.formats.segmentations import encode_segmentation
from cast_ray.data.reading.images import read_content
from cast_ray.data.reading.photos import INSTANCES

CVAT_ZIP, CVAT_LABELS = "cvat.zip", "cvat_labels.json"
_CVAT_INSTANCES, _CVAT_IMAGES = "annotations/instances_default.json", "images/default"


def write_coco(folder: Path, exported: Exported, copies_images: bool) -> None:
    """Writes `instances.json` with scores, and the photos in `images`."""
    (folder / INSTANCES).write_text(json.dumps(coco_document(exported)))
    for image in exported.images if copies_images else ():
        path = folder / "images" / image.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read_content(image.uri))


def write_cvat(folder: Path, exported: Exported, copies_images: bool) -> None:
    """Writes `cvat.zip`, which CVAT imports as "COCO 1.0", and `cvat_labels.json` for its raw editor of labels.

    Masks are uncompressed RLE with `iscrowd` 1, as CVAT's own exports have them: its COCO library turns masks with
    `iscrowd` 0 into polygons when it writes them.

    Source: docs.cvat.ai, "COCO" in the list of formats, and "Raw" in that of the label constructor.
    """
    document = coco_document(exported)
    for entry in document["annotations"]:
        entry.pop("score", None)
        if isinstance(entry["segmentation"], dict):
            entry["iscrowd"] = 1
            entry["segmentation"]["counts"] = rle_runs(entry["segmentation"]["counts"].encode()).tolist()
    with zipfile.ZipFile(folder / CVAT_ZIP, "w") as file:
        file.writestr(_CVAT_INSTANCES, json.dumps(document), zipfile.ZIP_DEFLATED)
        for image in exported.images if copies_images else ():
            file.writestr(f"{_CVAT_IMAGES}/{image.name}", read_content(image.uri))
    labels = [{"name": name, "type": "any", "attributes": []} for name in exported.names().values()]
    (folder / CVAT_LABELS).write_text(json.dumps(labels, indent=1))


def coco_document(exported: Exported) -> dict[str, Any]:
    """Returns images, annotations and classes as COCO has them; images and annotations count from 1.

    Ids of images may be texts in the label file, which most tools cannot read.
    """
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for number, image in enumerate(exported.images, 1):
        size = {"height": image.height, "width": image.width}
        images.append({"id": number, "file_name": image.name, **size})
        for each in image.objects:
            facts = {"id": len(annotations) + 1, "image_id": number, "category_id": each.category_id}
            score = {} if each.score is None else {"score": each.score}
            annotations.append(facts | annotation_fields(each, image) | score)
    names = exported.names().items()
    categories = [{"id": number, "name": name, "supercategory": ""} for number, name in names]
    return {"licenses": [], "info": {}, "categories": categories, "images": images, "annotations": annotations}


def annotation_fields(each: ExportedObject, image: ExportedImage) -> dict[str, Any]:
    """Returns segmentation, area, box and `iscrowd` of an object."""
    rle = {"size": [image.height, image.width], "counts": each.shown}
    segmentation: Any = each.polygons or {"size": [image.height, image.width], "counts": each.shown.decode()}
    area, box = float(mask_areas([rle])[0]), coco_mask.toBbox(rle).tolist()  # type: ignore[list-item]
    return {"segmentation": segmentation, "area": area, "bbox": box, "iscrowd": 0}


def read_coco(uri: str, file: str, exported: Exported, returned: Returned) -> None:
    """Reads an annotation file that a tool exported.

    `iscrowd` is not looked at: the objects that went out were single ones, and CVAT, datumaro and supervision give
    every mask `iscrowd` 1.

    Args:
        uri: where the file is.
        file: its name in messages.
        returned: what is read is added to it.

    Raises:
        ValueError: it is no COCO file.
    """
    document = read_document(uri, file)
    names = {c.id: c.name for c in read_categories(document["categories"], file)}
    returned.classes |= dict.fromkeys(names.values())
    entries, repeated = usable_images(document["images"], "train", file)
    returned.faults += [f"{file}: image {each['id']} ({each['file']}): {each['reason']}" for each in repeated]
    images: dict[int | str, ReturnedImage | None] = {}
    for entry in entries:
        place = f"{file}: images, id {entry['id']!r}"
        images[entry["id"]] = None
        with noted(returned.faults, place):
            name = entry.get("file_name")
            if not isinstance(name, str) or not name:
                raise ValueError(f"file_name is {name!r}: expected the name of an image")
            to = images[entry["id"]] = returned.add_image(exported.find(name), place)
            with noted(to.faults, place):
                check_size(to.image, whole_number(entry.get("height")), whole_number(entry.get("width")))
            if to.faults:
                images[entry["id"]] = None
    for entry in document["annotations"]:
        faults, place = returned.faults, f"{file}: annotation {entry.get('id')!r}"
        with noted(faults, place):
            image_id, category_id = references_of(entry, images, names)
            to_image = images[image_id]
            if to_image is None:
                continue  # the fault of its image is named already
            image = to_image.image
            with noted(to_image.faults, f"{place} of image {image.name!r}"):
                is_crowd(entry)
                segmentation = entry.get("segmentation")
                rle = encode_segmentation(segmentation, image.height, image.width)
                if isinstance(segmentation, list):
                    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
                    returned.num_cut += reaches_outside(polygons, image.height, image.width)
                returned.add_object(to_image, names[category_id], rle)
