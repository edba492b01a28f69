"""Edits an export of `cast-ray annotate export` as a person would, by the libraries of the annotation tools themselves.

It is run by a Python in which the library is installed: python annotation_tools.py TOOL EXPORTED OUT. The edits of the
scene of `annotation_scenes.py`: object 3 is deleted, object 4 becomes a cat, object 5 grows, and c.png gets a dog.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import numpy as np

ADDED = (slice(5, 15), slice(8, 22))
GROWN = (slice(14, 31), slice(22, 44))


def cvat(exported: Path, out: Path) -> None:
    """Datumaro, of which CVAT uses a fork, reads the zip file and writes COCO."""
    from datumaro import Dataset
    from datumaro.components.annotation import Mask, Polygon

    zipfile.ZipFile(exported / "cvat.zip").extractall(out / "read")
    dataset = Dataset.import_from(str(out / "read"), "coco_instances")
    assert len(dataset) == 3
    labels = {c.name: i for i, c in enumerate(dataset.categories()[next(iter(dataset.categories()))].items)}
    for item in list(dataset):
        height, width = item.media.size
        annotations = [a for a in item.annotations if a.id != 3]
        for a in annotations:
            if a.id == 4:
                a.label = labels["cat"]
        if item.id == "b":
            mask = np.zeros((height, width), bool)
            mask[GROWN] = True
            facts = {"label": labels["cat"], "id": 5, "group": 5, "attributes": {"is_crowd": True}}
            annotations = [a for a in annotations if a.id != 5] + [Mask(mask, **facts)]
        if item.id == "c":
            (y, x) = ADDED
            box = [x.start, y.start, x.stop, y.start, x.stop, y.stop, x.start, y.stop]
            annotations.append(Polygon(box, label=labels["dog"], id=6, group=6))
        dataset.put(item.wrap(annotations=annotations))
    dataset.export(str(out / "export"), "coco_instances", save_media=False)


def label_studio(exported: Path, out: Path) -> None:
    """Label Studio's SDK checks the tasks, and decodes and encodes its brush masks."""
    from label_studio_sdk.converter import brush
    from label_studio_sdk.label_interface import LabelInterface

    interface = LabelInterface((exported / "label_config.xml").read_text())
    tasks = json.loads((exported / "tasks.json").read_text())
    exports = []
    for number, task in enumerate(tasks, 1):
        prediction = task["predictions"][0]
        assert not interface.validate_prediction(prediction, return_errors=True)
        results = []
        for result in prediction["result"]:
            size = (result["original_height"], result["original_width"])
            if result["id"] == "object-3":
                continue
            if result["id"] == "object-4":
                result["value"][result["type"]] = ["cat"]
            if result["type"] == "brushlabels":
                mask = brush.decode_rle(result["value"]["rle"]).reshape(*size, 4)[..., 3]
                if result["id"] == "object-5":
                    mask[GROWN] = 255
                result["value"]["rle"] = brush.mask2rle(mask)
            results.append(result | {"origin": "prediction"})
        if task["data"]["file_name"] == "c.png":
            mask = np.zeros((20, 30), np.uint8)
            mask[ADDED] = 255
            value = {"format": "rle", "rle": brush.mask2rle(mask), "brushlabels": ["dog"]}
            facts = {"id": "new", "type": "brushlabels", "from_name": "brushlabels", "to_name": "image"}
            size_facts = {"original_height": 20, "original_width": 30, "image_rotation": 0}
            results.append(facts | size_facts | {"value": value, "origin": "manual"})
        annotation = {"id": number, "result": results, "was_cancelled": False, "ground_truth": False}
        exports.append({"id": number, "data": task["data"], "annotations": [annotation], "predictions": []})
    (out / "export.json").write_text(json.dumps(exports))


def yolo(exported: Path, out: Path) -> None:
    """Supervision reads the YOLO folder and writes another one."""
    import supervision as sv

    places = {
        "images_directory_path": exported / "images/train",
        "annotations_directory_path": exported / "labels/train",
    }
    dataset = sv.DetectionDataset.from_yolo(
        **{key: str(path) for key, path in places.items()},
        data_yaml_path=str(exported / "data.yaml"),
        force_masks=True,
    )
    annotations = {}
    for path, image, found in dataset:
        name = Path(path).name
        if name == "sub_a.png":
            found = found[:2]
        elif name == "b.png":
            found.class_id[0] = dataset.classes.index("cat")
            found.mask[1][GROWN] = True
        elif name == "c.png":
            mask = np.zeros((1, *image.shape[:2]), bool)
            mask[(0, *ADDED)] = True
            boxes, classes = sv.mask_to_xyxy(mask), np.array([dataset.classes.index("dog")])
            found = sv.Detections(xyxy=boxes, mask=mask, class_id=classes)
        annotations[path] = found
    edited = sv.DetectionDataset(dataset.classes, list(annotations), annotations)
    edited.as_yolo(
        annotations_directory_path=str(out / "export/labels/train"), data_yaml_path=str(out / "export/data.yaml")
    )


if __name__ == "__main__":
    _, tool, *folders = sys.argv
    {"cvat": cvat, "label-studio": label_studio, "yolo": yolo}[tool](*map(Path, folders))
