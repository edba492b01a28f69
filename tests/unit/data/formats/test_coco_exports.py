"""COCO files as annotation tools export them: CVAT, datumaro, supervision, Roboflow, Label Studio, LVIS."""

import json
from typing import Any

import pytest
from coco_folders import HEIGHT, WIDTH, annotation, coco_document, image_entry, valid_document, write_coco
from pydantic import ValidationError

from cast_ray.cli.inspect import main as inspect
from cast_ray.contracts.records import decode_image_id
from cast_ray.data.reading.reader import load
from cast_ray.recipe import DataConfig
from cast_ray.recipe.part import identity_of

MASK = {"size": [HEIGHT, WIDTH], "counts": [10, 5, HEIGHT * WIDTH - 15]}
OTHER_MASK = {"size": [HEIGHT, WIDTH], "counts": [30, 5, HEIGHT * WIDTH - 35]}


def _load(root, **fields):
    return load(DataConfig(format="coco", root=str(root), **fields))


def _instances(dataset):
    rows = dataset.train.to_pylist() + dataset.val.to_pylist()
    return {decode_image_id(row["image_id"]): row["instances"] for row in rows}


def cvat_document(count: int = 6) -> dict[str, Any]:
    """An export of CVAT (COCO 1.0): a polygon and a brush mask in each image; datumaro writes the mask with iscrowd 1.

    The fields are those of datumaro's exporter (`datumaro/plugins/data_formats/coco/exporter.py`).
    """
    document = coco_document([image_entry(i, f"day 1/{i}.png") for i in range(count)], [])
    for image in document["images"]:
        image |= {"license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0}
        fields = {"area": 5.0, "bbox": [1.0, 1.0, 4.0, 4.0], "attributes": {"occluded": False}}
        number = 2 * image["id"]
        document["annotations"] += [
            annotation(number + 1, image["id"], iscrowd=0, **fields),
            annotation(number + 2, image["id"], segmentation=MASK, iscrowd=1, **fields),
        ]
    return document


def write_cvat(root, document):
    return write_coco(root, document, "annotations/instances_default.json", "images/default")


def test_masks_with_iscrowd_are_objects_if_the_recipe_says_so(tmp_path):
    root = write_cvat(tmp_path, cvat_document())
    ignored, report = _load(root)
    assert all([i["is_crowd"] for i in each] == [False, True] for each in _instances(ignored).values())
    (warning,) = report["warnings"]
    assert warning.startswith("6 of 12 annotations in annotations/instances_default.json have iscrowd 1 and are ignore")
    assert warning.endswith("Set data.crowds=objects if they are single objects.")
    objects, report = _load(root, crowds="objects")
    assert all([i["is_crowd"] for i in each] == [False, False] for each in _instances(objects).values())
    assert report["warnings"] == [] and report["statement"] == "0 of 6 images and 0 of 12 annotations skipped"
    assert objects.content_hash != ignored.content_hash and len(_instances(objects)) == 6


def test_a_file_of_such_masks_alone_names_the_setting(tmp_path, capsys):
    document = cvat_document()
    document["annotations"] = [a for a in document["annotations"] if a["iscrowd"]]
    root = write_cvat(tmp_path / "cvat", document)
    assert inspect([str(root), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("set data.crowds=objects if the annotations are single objects") == 2
    assert inspect([str(root), "--out", str(tmp_path / "out"), "--set", "data.crowds=objects"]) == 0
    assert "WARNING" not in capsys.readouterr().out
    assert _load(root)[0].annotated == ()
    assert len(_load(root, crowds="objects")[0].annotated) == 6


def test_regions_of_many_objects_as_coco_has_them_are_no_reason_to_warn(tmp_path):
    document = valid_document(10)
    document["annotations"] += [annotation(100 + i, i, segmentation=MASK, iscrowd=1) for i in range(6)]
    assert _load(write_coco(tmp_path / "one", document))[1]["warnings"] == []
    several = [annotation(200 + i, i, segmentation=OTHER_MASK, iscrowd=1) for i in range(6)]
    document = document | {"annotations": [*document["annotations"], *several]}
    (warning,) = _load(write_coco(tmp_path / "several", document))[1]["warnings"]
    assert warning.startswith("12 of 22 annotations in instances.json have iscrowd 1")


def test_rle_alone_means_nothing(tmp_path):
    document = cvat_document()
    for entry in document["annotations"]:
        entry["iscrowd"] = 0
    dataset, report = _load(write_cvat(tmp_path, document))
    assert report["warnings"] == [] and not any(i["is_crowd"] for each in _instances(dataset).values() for i in each)


def test_other_formats_have_no_such_field():
    for name in ("cityscapes", "shapes", "yolo"):
        with pytest.raises(ValidationError, match=rf"data.crowds is objects and data.format {name}: expected"):
            DataConfig(format=name, crowds="objects")
    assert "crowds" not in identity_of(DataConfig(format="coco"))
    assert identity_of(DataConfig(format="coco", crowds="objects"))["crowds"] == "objects"


def roboflow_document(count: int = 6) -> dict[str, Any]:
    """An export of Roboflow (COCO Segmentation): category 0 is the project."""
    document = valid_document(count)
    document["categories"] = [
        {"id": 0, "name": "pets-x1y2", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "pets-x1y2"},
        {"id": 7, "name": "dog", "supercategory": "pets-x1y2"},
    ]
    return document


def test_the_project_of_roboflow_is_no_class(tmp_path):
    for split in ("train", "valid"):
        write_coco(tmp_path, roboflow_document(), f"{split}/_annotations.coco.json", split)
    dataset, report = _load(tmp_path)
    assert [(c.id, c.name) for c in dataset.categories] == [(1, "cat"), (7, "dog")]
    assert {i["category_id"] for i in dataset.train.to_pylist()[0]["instances"]} == {1} and not report["skipped"]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_category_0_that_an_annotation_has_is_a_class(tmp_path, split):
    for name in ("train", "valid"):
        document = roboflow_document()
        if name == split:
            document["annotations"][0]["category_id"] = 0
        write_coco(tmp_path, document, f"{name}/_annotations.coco.json", name)
    assert [c.id for c in _load(tmp_path)[0].categories] == [0, 1, 7]


@pytest.mark.parametrize(
    "change",
    [
        lambda categories: categories[0].update(supercategory="animals"),
        lambda categories: categories[1].update(supercategory="animals"),
        lambda categories: categories[0].pop("supercategory"),
        lambda categories: categories[0].update(id=9),
        lambda categories: categories.__delitem__(slice(1, None)),
    ],
)
def test_other_categories_without_objects_are_classes(tmp_path, change):
    document = roboflow_document()
    change(document["categories"])
    document["annotations"] = [a for a in document["annotations"] if len(document["categories"]) > 1]
    expected = [c["id"] for c in document["categories"]]
    assert [c.id for c in _load(write_coco(tmp_path, document))[0].categories] == expected


LABEL_STUDIO = {
    "with images": {
        0: ("images/1a2b3c4d-a.png", "images/1a2b3c4d-a.png"),
        1: ("images\\5e6f-b.png", "images/5e6f-b.png"),
    },
    "without images": {
        2: ("../../label-studio/data/media/upload/3/0f0f0f0f-c.png", "images/c.png"),
        3: ("http://localhost:8080/data/upload/3/d%20d.png", "images/d d.png"),
        4: ("/data/local-files/?d=photos/e.png", "images/e.png"),
        5: ("https://bucket.example.com/f.png?X-Amz-Signature=0&X-Amz-Expires=9", "images/f.png"),
        6: ("/data/local-files/?d=g.png", "images/g.png"),
    },
}


@pytest.mark.parametrize("export", LABEL_STUDIO)
def test_label_studio(tmp_path, export):
    names = LABEL_STUDIO[export]
    files = coco_document([image_entry(i, place.removeprefix("images/")) for i, (_, place) in names.items()], [])
    write_coco(tmp_path, files, "result.json", "images")
    images = [image_entry(i, name) for i, (name, _) in names.items()]
    document = coco_document(images, [annotation(i, i, i % 2, ignore=0) for i in names], ((0, "cat"), (1, "dog")))
    document["info"] = {"year": 2025, "version": "1.0", "contributor": "Label Studio"}
    (tmp_path / "result.json").write_text(json.dumps(document))
    dataset, report = _load(tmp_path)
    assert report["skipped"] == [] and [(c.id, c.name) for c in dataset.categories] == [(0, "cat"), (1, "dog")]
    uris = {decode_image_id(r["image_id"]): r["uri"] for r in dataset.train.to_pylist() + dataset.val.to_pylist()}
    assert uris == {i: str(tmp_path / place) for i, (_, place) in names.items()}


def test_two_uploads_of_one_name_get_no_file(tmp_path):
    root, document = write_coco(tmp_path, valid_document(4)), valid_document(4)
    document["images"][0]["file_name"] = "1a2b3c4d-3.png"
    document["images"][1]["file_name"] = "5e6f7a8b-3.png"
    (root / "instances.json").write_text(json.dumps(document))
    _, report = _load(root, max_bad_fraction=1.0)
    assert {s["reason"] for s in report["skipped"]} == {
        "the file is missing: the nearest, images/3.png, is that of several images"
    }


def test_lvis_is_refused_by_its_categories_too(tmp_path):
    document = valid_document(4)
    for entry in document["categories"]:
        entry |= {"frequency": "r", "synset": f"{entry['name']}.n.01", "image_count": 3}
    with pytest.raises(ValueError, match=r"instances\.json: LVIS is not supported: .*'frequency'") as error:
        _load(write_coco(tmp_path, document))
    assert "\n" not in str(error.value)
