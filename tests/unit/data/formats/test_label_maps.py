"""Label maps beside images (Cellpose, StarDist): each value is an object, pixel by pixel."""

from functools import partial

import numpy as np
import pytest
from dataset_folders import HEIGHT, WIDTH, image_of, object_maps, write_cellpose, write_png, write_stardist
from pycocotools import mask as mask_utils

from cast_ray.contracts.records import decode_image_id
from cast_ray.data.reading.inspection import guess_format
from cast_ray.data.reading.reader import load
from cast_ray.recipe import DataConfig

LAYOUTS = {
    "stardist": write_stardist,
    "stardist-png": partial(write_stardist, suffix=".png"),
    "cellpose": write_cellpose,
    "cellpose-cp": partial(write_cellpose, image="", mask="_cp_masks"),
}


def _load(root, **fields):
    return load(DataConfig(format="label_maps", root=str(root), **fields))


def _masks(row):
    size = [row["height"], row["width"]]
    return [mask_utils.decode({"size": size, "counts": i["rle"]}).astype(bool) for i in row["instances"]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_value_is_an_object(tmp_path, layout):
    maps = object_maps()
    LAYOUTS[layout](tmp_path, maps)
    assert guess_format(str(tmp_path)) == "label_maps"
    dataset, report = _load(tmp_path)
    rows = dataset.train.to_pylist() + dataset.val.to_pylist()
    assert {decode_image_id(row["image_id"]) for row in rows} == set(maps) and dataset.val.num_rows >= 1
    assert report["statement"] == "0 of 6 images and 0 of 18 annotations skipped"
    assert [(c.id, c.name) for c in dataset.categories] == [(1, "object")]
    for row in rows:
        values = maps[decode_image_id(row["image_id"])]
        assert (row["height"], row["width"]) == (HEIGHT, WIDTH)
        for value, mask in zip((1, 7, 300), _masks(row), strict=True):
            np.testing.assert_array_equal(mask, values == value)


@pytest.mark.parametrize("write", [write_stardist, write_cellpose])
def test_validation_images_in_a_folder_of_their_own(tmp_path, write):
    write(tmp_path / "train", object_maps(4))
    write(tmp_path / "val", object_maps(2, "other"))
    write(tmp_path / "test", object_maps(3, "hidden"))
    assert guess_format(str(tmp_path)) == "label_maps"
    dataset, _ = _load(tmp_path)
    assert (dataset.train.num_rows, dataset.val.num_rows) == (4, 2)
    named, _ = _load(tmp_path, val_image_dir="test")
    assert (named.train.num_rows, named.val.num_rows) == (4, 3)


def test_an_image_or_a_map_alone_is_named(tmp_path):
    write_stardist(tmp_path, object_maps(4))
    (tmp_path / "masks/cell0.tif").unlink()
    (tmp_path / "images/cell1.tif").unlink()
    _, report = _load(tmp_path, max_bad_fraction=1.0)
    reasons = {s["file"]: s["reason"] for s in report["skipped"]}
    assert reasons == {
        "images/cell0.tif": "its label map is missing",
        "masks/cell1.tif": "its image is missing",
    }


def test_a_mask_of_all_objects_together_is_no_label_map(tmp_path):
    write_stardist(tmp_path, object_maps(4))
    write_png(tmp_path / "masks/cell3.tif", np.where(object_maps()["cell3"] > 0, 255, 0).astype(np.uint8))
    _, report = _load(tmp_path, max_bad_fraction=1.0)
    (skipped,) = report["skipped"]
    assert skipped["file"] == "images/cell3.tif"
    assert skipped["reason"] == (
        "its label map: its only value is 255, a mask of all objects together: expected a number for each object"
    )


def test_a_label_map_of_another_size_and_one_in_colour_are_named(tmp_path):
    write_stardist(tmp_path, object_maps(5))
    write_png(tmp_path / "masks/cell2.tif", np.ones((HEIGHT, WIDTH + 1), dtype=np.uint16))
    write_png(tmp_path / "masks/cell3.tif", image_of("colour"))
    _, report = _load(tmp_path, max_bad_fraction=1.0)
    reasons = sorted(s["reason"] for s in report["skipped"])
    assert reasons[0].startswith("its label map: 3 channels: expected grey")
    assert reasons[1] == "its label map: 33 x 24 pixels: expected 32 x 24"


def test_other_folders_are_refused_in_one_line(tmp_path):
    write_png(tmp_path / "images/a.png", image_of("a"))
    with pytest.raises(ValueError, match="no label map found: expected images/ and masks/"):
        _load(tmp_path)
    write_cellpose(tmp_path / "twice", object_maps(2))
    write_png(tmp_path / "twice/cell0_img.tif", image_of("a"))
    with pytest.raises(ValueError, match=r"twice/cell0_img.png and .*cell0_img.tif have one name"):
        _load(tmp_path, image_dir="twice")
    write_stardist(tmp_path / "pool", object_maps(2))
    with pytest.raises(ValueError, match="a folder of label maps has no extra images"):
        _load(tmp_path, image_dir="pool", unlabelled_pool="extra")
