"""ADE20K: both encodings, one class list."""

import numpy as np
import pytest
from dataset_folders import FULL_CLASSES, HEIGHT, WIDTH, write_ade20k, write_ade20k_full, write_png
from PIL import Image
from pycocotools import mask as mask_utils

from cast_ray.contracts.records import decode_image_id
from cast_ray.data.formats.ade20k import CATEGORIES, decode_challenge, decode_full
from cast_ray.data.reading.reader import load
from cast_ray.recipe import DataConfig


def _load(root, **fields):
    return load(DataConfig(format="ade20k", root=str(root), **fields))


def _decode(instance):
    return mask_utils.decode({"size": [HEIGHT, WIDTH], "counts": instance["rle"]}).astype(bool)


def test_the_hundred_classes():
    assert [c.id for c in CATEGORIES] == list(range(1, 101))
    names = [c.name for c in CATEGORIES]
    assert len(set(names)) == 100 and names[:4] == ["bed", "windowpane", "cabinet", "person"] and names[-1] == "flag"
    assert names[56] == "booth" and names[57] == "television receiver"


def test_the_challenge(tmp_path):
    dataset, report = _load(write_ade20k(tmp_path))
    assert (dataset.train.num_rows, dataset.val.num_rows) == (8, 4)
    assert report["statement"] == "0 of 12 images and 0 of 48 annotations skipped"
    for row in dataset.val.to_pylist():
        stem = decode_image_id(row["image_id"])
        values = np.asarray(Image.open(tmp_path / f"annotations_instance/validation/{stem}.png"))
        assert [i["category_id"] for i in row["instances"]] == [4, 4, 9, 100]
        assert not any(i["is_crowd"] for i in row["instances"])
        for number, instance in enumerate(row["instances"], start=1):
            np.testing.assert_array_equal(_decode(instance), values[..., 1] == number)


def test_the_challenge_beside_scene_parsing(tmp_path):
    write_ade20k(tmp_path / "ADEChallengeData2016")
    write_png(tmp_path / "ADEChallengeData2016/annotations/training/ADE_train_00000001.png", np.zeros((4, 4), np.uint8))
    assert _load(tmp_path)[0].content_hash == _load(tmp_path / "ADEChallengeData2016")[0].content_hash


def test_the_full_dataset(tmp_path):
    dataset, _ = _load(write_ade20k_full(tmp_path))
    assert (dataset.train.num_rows, dataset.val.num_rows) == (6, 2)
    for row in dataset.train.to_pylist():
        values = np.asarray(Image.open(row["uri"].replace(".jpg", "_seg.png")))
        assert sorted(i["category_id"] for i in row["instances"]) == [4, 4, 9]
        for instance in row["instances"]:
            (number,) = set(values[..., 2][_decode(instance)].tolist())
            np.testing.assert_array_equal(_decode(instance), values[..., 2] == number)


def test_one_instance_number_of_two_classes_is_two_instances():
    """The released painter restarts its numbers for each class; they must not be merged across classes."""
    values = np.zeros((4, 6, 3), dtype=np.uint8)
    values[:, :2] = (4, 1, 0)
    values[:, 2:4] = (9, 1, 0)
    assert [i["category_id"] for i in decode_challenge(values)[0]] == [4, 9]
    for column, name in ((0, "person"), (2, "car")):
        values[:, column : column + 2] = (FULL_CLASSES[name] // 256 * 10, FULL_CLASSES[name] % 256, 1)
    assert sorted(i["category_id"] for i in decode_full(values)[0]) == [4, 9]


def test_instances_without_a_class_are_named():
    values = np.zeros((2, 4, 3), dtype=np.uint8)
    values[:, 0], values[:, 1], values[:, 2], values[:, 3] = (0, 3, 0), (101, 4, 0), (5, 0, 0), (5, 6, 0)
    instances, unknown = decode_challenge(values)
    assert [i["category_id"] for i in instances] == [5]
    assert unknown == [("3", "class 0: expected 1..100"), ("4", "class 101: expected 1..100")]
    for decode in (decode_challenge, decode_full):
        with pytest.raises(ValueError, match="expected RGB"):
            decode(values[..., 0])


def test_folders_that_are_not_ade20k(tmp_path):
    with pytest.raises(ValueError, match=r"neither annotations_instance/training .* nor images/ADE/training"):
        _load(tmp_path)
    (tmp_path / "annotations_instance/training").mkdir(parents=True)
    with pytest.raises(ValueError, match="no image with its label map in training"):
        _load(tmp_path)
    write_ade20k(tmp_path)
    with pytest.raises(ValueError, match=r"ADE20K has no extra images: name a folder by data\.extra_image_dir"):
        _load(tmp_path, unlabelled_pool="extra")
    (tmp_path / "annotations_instance/training/ADE_train_00000001.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 8 images skipped.*its label map is missing"):
        _load(tmp_path)
    assert _load(tmp_path, max_bad_fraction=0.2)[0].train.num_rows == 7


def test_a_folder_that_links_to_itself_is_read_once(tmp_path):
    root = write_ade20k_full(tmp_path)
    expected, _ = _load(root)
    training = root / "ADE20K_2021_17_01/images/ADE/training"
    (training / "urban/all").symlink_to(training)
    (training / "home_or_hotel/.ipynb_checkpoints").mkdir()
    dataset, report = _load(root)
    assert dataset.train.equals(expected.train) and report["skipped"] == []
