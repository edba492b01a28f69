"""One mask file for each object, as in the 2018 Data Science Bowl."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from dataset_folders import HEIGHT, WIDTH, object_maps, write_mask_files, write_png
from PIL import Image
from pycocotools import mask as mask_utils

from cast_ray.contracts.records import decode_image_id
from cast_ray.data.reading.inspection import guess_format
from cast_ray.data.reading.reader import load
from cast_ray.recipe import DataConfig

NUCLEI = os.environ.get("CAST_RAY_NUCLEI", "")


def _load(root, **fields):
    return load(DataConfig(format="mask_files", root=str(root), **fields))


def _rows(dataset):
    return {decode_image_id(r["image_id"]): r for r in dataset.train.to_pylist() + dataset.val.to_pylist()}


def _decode(row):
    size = [row["height"], row["width"]]
    return [mask_utils.decode({"size": size, "counts": i["rle"]}).astype(bool) for i in row["instances"]]


@pytest.mark.parametrize("below", ["", "stage1_train"])
def test_each_file_is_an_object(tmp_path, below):
    maps = object_maps()
    write_mask_files(tmp_path / below, maps)
    assert guess_format(str(tmp_path)) == "mask_files"
    dataset, report = _load(tmp_path)
    rows = _rows(dataset)
    assert set(rows) == set(maps) and dataset.val.num_rows >= 1
    assert report["statement"] == "0 of 6 images and 0 of 18 annotations skipped"
    for name, row in rows.items():
        for value, mask in zip((1, 300, 7), _decode(row), strict=True):  # by file name
            np.testing.assert_array_equal(mask, maps[name] == value)


def test_masks_of_every_mode_may_overlap(tmp_path):
    write_mask_files(tmp_path, object_maps(2))
    masks = tmp_path / "cell0/masks"
    shutil.rmtree(masks)
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[2:9, 3:12] = True
    white = Image.fromarray(mask.astype(np.uint8) * 255)
    (tmp_path / "cell0/masks").mkdir()
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA"):
        white.convert(mode).save(masks / f"{mode}.png")
    row = _rows(_load(tmp_path)[0])["cell0"]
    assert len(row["instances"]) == 6 and all(np.array_equal(found, mask) for found in _decode(row))


def test_what_cannot_be_used_is_named(tmp_path):
    write_mask_files(tmp_path, object_maps(6))
    write_png(tmp_path / "cell0/masks/empty.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    write_png(tmp_path / "cell0/masks/large.png", np.ones((HEIGHT, WIDTH + 1), np.uint8))
    shutil.rmtree(tmp_path / "cell1/masks")
    shutil.rmtree(tmp_path / "cell2/images")
    shutil.rmtree(tmp_path / "cell3/masks")
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(tmp_path / "cell3/a.jpg")
    (tmp_path / "cell3/masks").mkdir()
    (tmp_path / "cell3/a.jpg").rename(tmp_path / "cell3/masks/a.jpg")
    shutil.rmtree(tmp_path / "cell4/masks")
    (tmp_path / "cell4/masks").mkdir()
    dataset, report = _load(tmp_path, max_bad_fraction=1.0)
    assert {s["id"]: s["reason"] for s in report["skipped"]} == {
        "cell1": "it has no folder masks (unlabelled images: data.extra_image_dir)",
        "cell2": "0 images in cell2/images: expected one",
        "cell3": "no mask in cell3/masks: expected files of .png, .tif, .tiff, .bmp, .gif",
        "empty.png": "mask covers no pixel",
        "large.png": "33 x 24 pixels: expected 32 x 24",
    }
    rows = _rows(dataset)
    assert len(rows["cell0"]["instances"]) == 3 and rows["cell4"]["instances"] == []


def test_a_changed_mask_changes_the_dataset(tmp_path):
    write_mask_files(tmp_path, object_maps(3))
    before = _load(tmp_path)[0].content_hash
    path = next((tmp_path / "cell1/masks").iterdir())
    write_png(path, np.full((HEIGHT, WIDTH), 255, np.uint8))
    assert _load(tmp_path)[0].content_hash != before


def test_another_layout_is_refused_in_one_line(tmp_path):
    (tmp_path / "a/images").mkdir(parents=True)
    with pytest.raises(ValueError, match="no masks found: expected <id>/images/") as error:
        _load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not NUCLEI, reason="CAST_RAY_NUCLEI names no folder of real nuclei in COCO format")
def test_real_nuclei_written_back_into_the_layout_are_the_same_objects(tmp_path):
    root = Path(NUCLEI)
    document = json.loads((root / "instances.json").read_text())
    chosen = {image["id"] for image in document["images"][:12]}
    part = {
        "images": [i for i in document["images"] if i["id"] in chosen],
        "annotations": [a for a in document["annotations"] if a["image_id"] in chosen],
        "categories": document["categories"],
    }
    coco = tmp_path / "coco"
    coco.mkdir()
    (coco / "instances.json").write_text(json.dumps(part))
    (coco / "images").symlink_to(root / "images")
    expected, _ = load(DataConfig(format="coco", root=str(coco)))
    names = {image["id"]: Path(image["file_name"]) for image in part["images"]}
    for row in expected.train.to_pylist() + expected.val.to_pylist():
        name = names[decode_image_id(row["image_id"])]
        place = tmp_path / "bowl/stage1_train" / name.stem
        (place / "images").mkdir(parents=True)
        (place / "images" / name.name).symlink_to(row["uri"])
        for number, mask in enumerate(_decode(row)):
            write_png(place / f"masks/{number:04d}.png", mask.astype(np.uint8) * 255)
    found = _rows(_load(tmp_path / "bowl")[0])
    for identifier, row in _rows(expected).items():
        rles = [i["rle"] for i in found[names[identifier].stem]["instances"]]
        assert rles == [i["rle"] for i in row["instances"]]
