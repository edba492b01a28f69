"""LabelMe's JSON files: every shape that has an area, groups, and what stands in the way."""

import base64
import io
import json

import numpy as np
import pytest
from dataset_folders import HEIGHT, WIDTH, image_of, labelme_shape, polygon_of, write_labelme, write_png
from PIL import Image
from pycocotools import mask as mask_utils

from cast_ray.contracts.records import decode_image_id
from cast_ray.data.reading.inspection import guess_format
from cast_ray.data.reading.reader import load
from cast_ray.recipe import DataConfig

CAT, DOG = (2, 3, 10, 12), (14, 5, 30, 20)
SHAPES = [labelme_shape("cat", polygon_of(*CAT)), labelme_shape("dog", [[30, 20], [14, 5]], "rectangle")]


def _load(root, **fields):
    return load(DataConfig(format="labelme", root=str(root), **fields))


def _rows(dataset):
    return {decode_image_id(r["image_id"]): r for r in dataset.train.to_pylist() + dataset.val.to_pylist()}


def _masks(row):
    size = [row["height"], row["width"]]
    return [mask_utils.decode({"size": size, "counts": i["rle"]}).astype(bool) for i in row["instances"]]


def _box(left, top, right, bottom):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def _png(mask):
    stream = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).convert("1").save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _reasons(report):
    return {s["id"]: s["reason"] for s in report["skipped"]}


def test_each_shape_is_an_object(tmp_path):
    write_labelme(tmp_path, {f"a{i}": SHAPES for i in range(4)})
    assert guess_format(str(tmp_path)) == "labelme"
    dataset, report = _load(tmp_path)
    assert report["statement"] == "0 of 4 images and 0 of 8 annotations skipped" and report["warnings"] == []
    assert [(c.id, c.name) for c in dataset.categories] == [(1, "cat"), (2, "dog")]
    rows = _rows(dataset)
    assert set(rows) == {f"a{i}.png" for i in range(4)} and dataset.val.num_rows >= 1
    for row in rows.values():
        assert [i["category_id"] for i in row["instances"]] == [1, 2]
        for box, mask in zip((CAT, DOG), _masks(row), strict=True):
            np.testing.assert_array_equal(mask, _box(*box))


def test_masks_circles_and_groups(tmp_path):
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 2, (6, 9)).astype(bool)
    shapes = [
        labelme_shape("cell", [[20, 10], [28, 15]], "mask", mask=_png(pixels)),
        labelme_shape("cell", [[28, 20], [36, 25]], "mask", mask=_png(pixels)),  # its right part is outside
        labelme_shape("cell", [[8, 8], [8, 13]], "circle"),
        labelme_shape("cell", polygon_of(0, 20, 3, 23), group_id=1),
        labelme_shape("cell", polygon_of(6, 20, 9, 23), group_id=1),
        labelme_shape("__ignore__", polygon_of(12, 0, 20, 4)),
    ]
    write_labelme(tmp_path, {"a": shapes, "b": SHAPES})
    dataset, report = _load(tmp_path)
    assert report["skipped"] == []
    row = _rows(dataset)["a.png"]
    masks = _masks(row)
    assert [i["is_crowd"] for i in row["instances"]] == [False] * 4 + [True]
    inside = np.zeros((HEIGHT, WIDTH), dtype=bool)
    inside[10:16, 20:29] = pixels
    np.testing.assert_array_equal(masks[0], inside)
    inside[:] = False
    inside[20:24, 28:32] = pixels[:4, :4]
    np.testing.assert_array_equal(masks[1], inside)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    circle = np.hypot(x + 0.5 - 8, y + 0.5 - 8) < 5
    assert (masks[2] & circle).sum() / (masks[2] | circle).sum() > 0.9
    np.testing.assert_array_equal(masks[3], _box(0, 20, 3, 23) | _box(6, 20, 9, 23))


def test_shapes_that_cannot_be_used_are_named(tmp_path):
    shapes = [
        labelme_shape("cat", [[1, 1], [5, 5]], "line"),
        labelme_shape("cat", [[1, 1]], "rectangle"),
        labelme_shape("cat", [[1, "x"]]),
        labelme_shape("cat", [[1, 1], [2, 2]]),
        labelme_shape("cat", [[0, 0], [4, 4]], "mask", mask="?"),
        labelme_shape("cat", [[0, 0], [4, 4]], "mask", mask=_png(np.ones((3, 3)))),
        labelme_shape("cat", [[90, 90], [99, 90], [99, 99]]),
        labelme_shape("cat", polygon_of(-9, -9, 9, 9)),
        "text",
    ]
    write_labelme(tmp_path, {"a": shapes, "b": SHAPES})
    dataset, report = _load(tmp_path, max_bad_fraction=1.0)
    reasons = _reasons(report)
    assert reasons["shapes[0]"].startswith("shape_type 'line' has no area: expected polygon, rectangle")
    assert reasons["shapes[1]"] == "rectangle of 1 points: expected 2"
    assert reasons["shapes[2]"] == "points hold something that is not a number"
    assert reasons["shapes[4]"] == "mask: expected a PNG in base64"
    assert reasons["shapes[5]"] == "mask of 3 x 3 pixels: expected 5 x 5, as its points say"
    assert reasons["shapes[6]"] == "polygon covers no pixel of the image"
    assert set(reasons) == {f"shapes[{n}]" for n in (0, 1, 2, 3, 4, 5, 6, 8)}
    (mask,) = _masks(_rows(dataset)["a.png"])
    np.testing.assert_array_equal(mask, _box(0, 0, 9, 9))  # what lies outside is cut off


def test_labels_txt_gives_the_order_of_the_classes(tmp_path):
    write_labelme(tmp_path, {"a": SHAPES, "b": SHAPES[:1]})
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\ndog\nhorse\ncat\n")
    assert [c.name for c in _load(tmp_path)[0].categories] == ["dog", "horse", "cat"]
    (tmp_path / "labels.txt").write_text("dog\n")
    with pytest.raises(ValueError, match=r"labels\.txt: the label 'cat' of a JSON file is not in it"):
        _load(tmp_path)


def test_folders_for_training_and_validation_and_json_in_another_folder(tmp_path):
    write_labelme(tmp_path / "train", {"a": SHAPES, "b": SHAPES})
    write_labelme(tmp_path / "val", {"c": SHAPES})
    (tmp_path / "train/json").mkdir()
    document = json.loads((tmp_path / "train/a.json").read_text())
    (tmp_path / "train/json/a.json").write_text(json.dumps(document | {"imagePath": "..\\a.png"}))
    (tmp_path / "train/a.json").unlink()
    dataset, _ = _load(tmp_path)
    assert (dataset.train.num_rows, dataset.val.num_rows) == (2, 1)
    assert set(_rows(dataset)) == {"a.png", "b.png", "c.png"}


def test_images_without_a_json_file_are_unlabelled(tmp_path):
    write_labelme(tmp_path, {"a": SHAPES, "b": SHAPES})
    write_png(tmp_path / "c.png", image_of("c"))
    dataset, report = _load(tmp_path)
    assert len(_rows(dataset)) == 2 and dataset.extra is None
    (warning,) = report["warnings"]
    assert warning.startswith("1 images in ") and "data.unlabelled_pool=both" in warning
    dataset, report = _load(tmp_path, unlabelled_pool="both")
    assert [decode_image_id(r["image_id"]) for r in dataset.extra.to_pylist()] == ["c.png"]
    assert report["warnings"] == []


def test_bad_files_are_named(tmp_path):
    write_labelme(tmp_path, {name: SHAPES for name in "abcdef"})
    (tmp_path / "c.json").write_text('{"shapes": [')
    (tmp_path / "d.png").unlink()
    document = json.loads((tmp_path / "e.json").read_text())
    (tmp_path / "e.json").write_text(json.dumps(document | {"imageHeight": WIDTH, "imageWidth": HEIGHT}))
    (tmp_path / "notes.json").write_text('{"a": 1}')
    (tmp_path / "g.json").write_text((tmp_path / "f.json").read_text())
    _, report = _load(tmp_path, max_bad_fraction=1.0)
    reasons = _reasons(report)
    assert reasons["c.json"] == "its JSON file cannot be read: it is cut off or not JSON"
    assert reasons["d.json"] == "its image is missing: d.json names d.png"
    assert reasons["e.png"].startswith("e.json is of an image of 24 x 32 pixels: expected 32 x 24")
    assert reasons["g.json"] == "f.json is of the same image: expected one JSON file for each" and len(reasons) == 4


def test_another_folder_is_refused_in_one_line(tmp_path):
    write_png(tmp_path / "a.png", image_of("a"))
    with pytest.raises(ValueError, match="no JSON file found: expected images with LabelMe's JSON files beside them"):
        _load(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="no usable JSON file of LabelMe among 1"):
        _load(tmp_path)
