"""Label Studio's tasks on their way to the tool and back: predictions out, annotations in.

Source: labelstud.io/guide/predictions and /guide/task_format; label-studio-sdk reads what is written here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from pycocotools import mask as coco_mask

from cast_ray.annotation.brush import decode_brush, encode_brush
from cast_ray.annotation.exported import Exported, ExportedImage, ExportedObject
from cast_ray.annotation.returned import Returned, ReturnedImage, check_size, noted, reaches_outside
from cast_ray.common.version import VERSION
from cast_ray.data.formats.segmentations import encode_mask, encode_segmentation

TASKS, CONFIG = "tasks.json", "label_config.xml"
LOCAL_FILES = "/data/local-files/?d="
"""Where Label Studio serves the files below LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT."""
_FILE_NAME = "file_name"
_KINDS = {"brushlabels": "BrushLabels", "polygonlabels": "PolygonLabels"}
_NOT_AN_AREA = ("choices", "textarea", "rating", "number", "taxonomy", "datetime", "pairwise", "ranker")
"""What is said of a whole image, and of no object in it."""


def write_label_studio(folder: Path, exported: Exported, url_prefix: str) -> None:
    """Writes `tasks.json`, which is imported as it is, and `label_config.xml` for the project's labelling interface.

    Args:
        url_prefix: stands before the quoted name of each image.
    """
    names = exported.names()
    tasks = []
    for image in exported.images:
        results = [_result(each, image, names[each.category_id]) for each in image.objects]
        scores = [each.score for each in image.objects if each.score is not None]
        prediction: dict[str, Any] = {"model_version": f"cast_ray {VERSION}", "result": results}
        if scores:
            prediction["score"] = float(np.mean(scores))
        # Label Studio keeps all of `data`, and may give the image another address
        data = {"image": f"{url_prefix}{quote(image.name)}", _FILE_NAME: image.name}
        tasks.append({"data": data, "predictions": [prediction]})
    (folder / TASKS).write_text(json.dumps(tasks))
    labels = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in names.values())
    controls = (f'  <{tag} name="{kind}" toName="image">\n{labels}  </{tag}>\n' for kind, tag in _KINDS.items())
    text = f'<View>\n  <Image name="image" value="$image" zoom="true"/>\n{"".join(controls)}</View>\n'
    (folder / CONFIG).write_text(text)


def _result(each: ExportedObject, image: ExportedImage, class_name: str) -> dict[str, Any]:
    kind = "polygonlabels" if each.polygons else "brushlabels"
    if each.polygons:
        (flat,) = each.polygons
        points = (np.array(flat).reshape(-1, 2) * 100 / (image.width, image.height)).tolist()
        value: dict[str, Any] = {"points": points, "closed": True}
    else:
        mask = coco_mask.decode({"size": [image.height, image.width], "counts": each.shown}).astype(bool)
        value = {"format": "rle", "rle": encode_brush(mask)}
    score = {} if each.score is None else {"score": each.score}
    return {
        "id": f"object-{each.id}",
        "type": kind,
        "from_name": kind,
        "to_name": "image",
        "original_width": image.width,
        "original_height": image.height,
        "image_rotation": 0,
        "value": {**value, kind: [class_name]},
        **score,
    }


def read_tasks(document: list[Any], file: str, exported: Exported, returned: Returned) -> None:
    """Reads Label Studio's export called JSON.

    A task without an annotation (nobody has submitted one, or it was skipped) is not finished. Of several annotations
    the one marked as ground truth is taken, else the last one.

    Args:
        document: the parsed file.
        file: its name in messages.
        returned: what is read is added to it.
    """
    for number, task in enumerate(document):
        place = f"{file}: task {task.get('id', number) if isinstance(task, dict) else number}"
        with noted(returned.faults, place):
            if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
                raise ValueError("no task with 'data': expected Label Studio's export called JSON (not JSON-MIN)")
            image = _image_of(task["data"], exported)
            annotations = task.get("annotations", [])
            if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
                raise ValueError("'annotations' is no list of objects")
            submitted = [a for a in annotations if not a.get("was_cancelled")]
            if not submitted:
                returned.unfinished.append(image.name)
                continue
            annotation = next((a for a in submitted if a.get("ground_truth")), submitted[-1])
            to = returned.add_image(image, place)
            for result in annotation.get("result", []):
                where = f"{place}, region {result.get('id') if isinstance(result, dict) else result!r}"
                with noted(to.faults, f"{where} of image {image.name!r}"):
                    _read_result(result, to, returned)


def _image_of(data: dict[str, Any], exported: Exported) -> ExportedImage:
    """The image of a task: by the name that was exported with it, else by its address."""
    names = [data[_FILE_NAME]] if isinstance(data.get(_FILE_NAME), str) else []
    names += [value for key, value in data.items() if isinstance(value, str) and key != _FILE_NAME]
    if not names:
        raise ValueError("'data' names no image")
    faults = []
    for name in names:
        try:
            return exported.find(name)
        except ValueError as error:
            faults.append(error)
    raise faults[0]


def _read_result(result: Any, to: ReturnedImage, returned: Returned) -> None:
    if not isinstance(result, dict):
        raise ValueError("no region")
    kind, value, image = result.get("type"), result.get("value"), to.image
    if kind in _NOT_AN_AREA or kind == "relation":
        return
    if kind not in _KINDS or not isinstance(value, dict):
        raise ValueError(f"a region of type {kind!r}: expected {' or '.join(_KINDS)}")
    classes = value.get(kind)
    if not isinstance(classes, list) or len(classes) != 1 or not isinstance(classes[0], str):
        raise ValueError(f"its classes are {classes!r}: expected one")
    check_size(image, result.get("original_height"), result.get("original_width"))
    if result.get("image_rotation"):
        raise ValueError(f"the image is turned by {result['image_rotation']} degrees: expected 0")
    if kind == "brushlabels":
        mask = decode_brush(value.get("rle"), image.height, image.width)
        if not mask.any():
            raise ValueError("the brush covers no pixel")
        rle = encode_mask(mask)
    else:
        points = _points_of(value.get("points"), image)
        rle = encode_segmentation([points], image.height, image.width)
        returned.num_cut += reaches_outside([points], image.height, image.width)
    returned.add_object(to, classes[0], rle)


def _points_of(value: Any, image: ExportedImage) -> list[float]:
    """Points in per cent of the image, as one list of pixels. Raises ValueError for anything else."""
    try:
        points = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError("its points are not pairs of numbers") from None
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError("its points are not pairs of numbers")
    pixels: list[float] = (points * (image.width, image.height) / 100).ravel().tolist()
    return pixels
