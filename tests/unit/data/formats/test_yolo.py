"""YOLO segmentation as Ultralytics, Roboflow and CVAT write it."""

import numpy as np
import pytest
from dataset_folders import HEIGHT, WIDTH, polygon_of, write_yolo, yolo_line
from pycocotools import mask as mask_utils

from cast_ray.contracts.records import decode_image_id
from cast_ray.data.formats.yolo import read_labels
from cast_ray.data.reading.inspection import guess_format
from cast_ray.data.reading.reader import load
from cast_ray.recipe import DataConfig

CAT, DOG = (2, 3, 10, 12), (14, 5, 30, 20)
LINES = f"{yolo_line(0, polygon_of(*CAT))}\n{yolo_line(1, polygon_of(*DOG))}\n"
NAMES = "names:\n  0: cat\n  1: dog\n"
# data.yaml as each tool writes it, the folders of its images, and the lists of images beside it
TOOLS = {
    "ultralytics": (f"path: ../datasets/pets\ntrain: images/train\nval: images/val\ntest:\n{NAMES}", "images/{split}"),
    "roboflow": (
        "train: ../train/images\nval: ../val/images\ntest: ../test/images\n\nnc: 2\nnames: ['cat', 'dog']\n\n"
        "roboflow:\n  workspace: us\n  project: pets\n  version: 1\n  license: CC BY 4.0\n",
        "{split}/images",
    ),
    "cvat": (f"{NAMES}path: .\ntrain: train.txt\nval: val.txt\n", "images/{split}"),
    "other machine": (
        f"train: C:\\Users\\me\\pets\\images\\train\nval: /home/me/pets/images/val\n{NAMES}",
        "images/{split}",
    ),
}


def _load(root, **fields):
    return load(DataConfig(format="yolo", root=str(root), **fields))


def _rows(dataset):
    return {decode_image_id(r["image_id"]): r for r in dataset.train.to_pylist() + dataset.val.to_pylist()}


def _box(left, top, right, bottom):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.fixture
def root(tmp_path):
    write_yolo(tmp_path, {f"a{i}": LINES for i in range(4)})
    write_yolo(tmp_path, {f"b{i}": LINES for i in range(2)}, split="val")
    (tmp_path / "data.yaml").write_text(TOOLS["ultralytics"][0])
    return tmp_path


@pytest.mark.parametrize("tool", TOOLS)
def test_each_line_is_an_object(tmp_path, tool):
    document, images = TOOLS[tool]
    write_yolo(tmp_path, {f"a{i}": LINES for i in range(4)}, images=images)
    write_yolo(tmp_path, {f"b{i}": LINES for i in range(2)}, "val", images)
    (tmp_path / "data.yaml").write_text(document)
    if tool == "cvat":
        for split, names in (("train", "a0 a1 a2 a3"), ("val", "b0 b1")):
            lines = (f"data/images/{split}/{name}.png\n" for name in names.split())
            (tmp_path / f"{split}.txt").write_text("".join(lines))
    assert guess_format(str(tmp_path)) == "yolo"
    dataset, report = _load(tmp_path)
    assert (dataset.train.num_rows, dataset.val.num_rows) == (4, 2)
    assert [(c.id, c.name) for c in dataset.categories] == [(0, "cat"), (1, "dog")]
    assert report["statement"] == "0 of 6 images and 0 of 12 annotations skipped" and report["warnings"] == []
    for row in _rows(dataset).values():
        assert [i["category_id"] for i in row["instances"]] == [0, 1]
        for box, found in zip((CAT, DOG), row["instances"]):
            mask = mask_utils.decode({"size": [HEIGHT, WIDTH], "counts": found["rle"]})
            np.testing.assert_array_equal(mask, _box(*box))


def test_an_image_without_a_text_file_holds_no_object(root):
    (root / "labels/train/a0.txt").write_text("")
    (root / "labels/train/a1.txt").unlink()
    dataset, report = _load(root)
    rows = _rows(dataset)
    assert rows["a0.png"]["instances"] == rows["a1.png"]["instances"] == [] and report["warnings"] == []
    (root / "labels/train/a2.txt").unlink()
    (warning,) = _load(root)[1]["warnings"]
    assert warning.startswith("2 of 4 training images have no text file of polygons: they count as images without obj")


def test_without_validation_images_some_are_held_out(root):
    (root / "data.yaml").write_text(f"train: images/train\n{NAMES}")
    dataset, _ = _load(root)
    assert dataset.train.num_rows + dataset.val.num_rows == 4 and dataset.val.num_rows >= 1
    (root / "pets.yaml").write_text(f"train: [images/train, images/val]\nval: images/val\n{NAMES}")
    dataset, report = _load(root, annotations="pets.yaml")
    assert (dataset.train.num_rows, dataset.val.num_rows) == (6, 2) and len(report["warnings"]) == 1  # copies


def test_lines_that_cannot_be_used_are_named(tmp_path):
    good = yolo_line(1, polygon_of(*DOG))
    lines = [good, "", "0 0.5 0.5 0.2 0.2", "2 0 0 1 0 1 1", "1.5 0 0 1 0 1 1", good, "0 10 20 30 20 30 40", "0 a b c"]
    lines += ["0 nan 0 1 0 1 1", "0 0 0 1 0", "0 0 0 1 0 1", "0", "0 1.5 1.5 1.9 1.5 1.9 1.9"]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines))
    instances, unknown = read_labels(str(path), (HEIGHT, WIDTH), 2)
    assert len(instances) == 1 and instances[0]["category_id"] == 1
    share = "a coordinate is no share of the image: expected 0 to 1"
    reasons = dict(unknown)
    assert reasons["line 3"].startswith("a box and no polygon (YOLO's detection format)")
    assert reasons["line 4"] == "class 2: expected 0..1, as data.yaml names them"
    assert reasons["line 5"].startswith("class 1.5: expected")
    assert reasons["line 6"] == "repeats another line"
    assert reasons["line 7"] == reasons["line 9"] == share
    assert reasons["line 8"] == "it holds something that is not a number"
    assert {"line 10", "line 11", "line 12", "line 13"} <= reasons.keys() and len(reasons) == 11


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("train: images/train\n", "data.yaml: 'names' is None: expected the names of the classes"),
        (f"val: images/val\n{NAMES}", "data.yaml: 'train' is missing"),
        (f"train: images/nowhere\n{NAMES}", "data.yaml: 'train' names images/nowhere: no such folder or list below"),
        (f"train: labels/train\n{NAMES}", "data.yaml: 'train' names labels/train, where there is no image"),
        ("train: images/train\nnames: {0: cat, 2: dog}\n", "data.yaml: 'names' has the keys 0, 2: expected 0, 1, 2"),
        ("just text", "data.yaml: not a YOLO dataset"),
        ("names: [cat", "data.yaml: not YAML"),
    ],
)
def test_a_bad_yaml_file_is_one_line(root, document, message):
    (root / "data.yaml").write_text(document)
    with pytest.raises(ValueError) as error:
        _load(root)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_folder_of_images_without_any_text_file_is_refused(root):
    for path in (root / "labels/train").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"no image has a text file of polygons: looked for labels/train/a0\.txt"):
        _load(root)


def test_boxes_are_refused_before_training(root):
    for path in (root / "labels/train").iterdir():
        path.write_text("0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(ValueError, match=r"4 of 4 annotations skipped.*a box and no polygon"):
        _load(root)
