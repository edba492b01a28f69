"""Cityscapes: the layout and the encoding as downloaded."""

import shutil

import numpy as np
import pytest
from dataset_folders import HEIGHT, WIDTH, cityscapes_map, write_cityscapes, write_png
from PIL import Image
from pycocotools import mask as mask_utils

from cast_ray.contracts.records import RECORD_SCHEMA, decode_image_id
from cast_ray.data.formats.cityscapes import CATEGORIES, VOID_IDS, decode_map, frame_name
from cast_ray.data.reading.reader import load
from cast_ray.recipe import DataConfig


def _load(root, **fields):
    return load(DataConfig(format="cityscapes", root=str(root), **fields))


@pytest.fixture
def root(tmp_path):
    return write_cityscapes(tmp_path)


def _mask_file(root, row):
    city = decode_image_id(row["image_id"]).split("_")[0]
    return root / f"gtFine/train/{city}/{decode_image_id(row['image_id'])}_gtFine_instanceIds.png"


def test_images_and_instances(root):
    dataset, report = _load(root)
    assert (dataset.train.num_rows, dataset.val.num_rows, dataset.extra) == (8, 4, None)
    assert dataset.train.schema.equals(RECORD_SCHEMA)
    assert [(c.id, c.name) for c in dataset.categories] == [
        *[(24, "person"), (25, "rider"), (26, "car"), (27, "truck")],
        *[(28, "bus"), (31, "train"), (32, "motorcycle"), (33, "bicycle")],
    ]
    assert report["statement"] == "0 of 12 images and 0 of 60 annotations skipped"
    for row in dataset.train.to_pylist():
        assert row["uri"].endswith("_leftImg8bit.png") and (row["height"], row["width"]) == (HEIGHT, WIDTH)
        values = np.asarray(Image.open(_mask_file(root, row)))
        found = {(i["category_id"], i["is_crowd"]): i for i in row["instances"]}
        assert len(row["instances"]) == 5 and set(found) == {(1, True), (24, False), (26, False), (33, True)}
        for value, instance in zip((1, 33, 24000, 26000, 26001), row["instances"]):  # values rising
            assert instance["category_id"] == (value if value < 1000 else value // 1000)
            mask = mask_utils.decode({"size": [HEIGHT, WIDTH], "counts": instance["rle"]})
            np.testing.assert_array_equal(mask, values == value)


def test_groups_and_void_are_ignore_regions_and_other_labels_nothing():
    values = np.arange(34, dtype=np.uint16).reshape(2, 17)
    instances, unknown = decode_map(values)
    things, void = {c.id for c in CATEGORIES}, {0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30}
    assert {i["category_id"] for i in instances} == things | void == things | VOID_IDS and not things & void
    assert all(i["is_crowd"] for i in instances) and unknown == []
    instances, unknown = decode_map(np.array([[24000, 24999, 29001, 30000, 33001]], dtype=np.uint16))
    assert [(i["category_id"], i["is_crowd"]) for i in instances] == [(24, False), (24, False), (33, False)]
    assert unknown == []


def test_unknown_values_are_named():
    _, unknown = decode_map(np.array([[255, 999, 7001, 40000, 26000]], dtype=np.uint16))
    assert [value for value, _ in unknown] == ["255", "999", "7001", "40000"]
    assert unknown[0][1] == "pixel value 255: no label of Cityscapes"


def test_sixteen_bits_survive(root):
    values = cityscapes_map(np.random.default_rng(5))
    values[0, 0] = 33_042
    path = next(root.glob("gtFine/train/ulm/*_instanceIds.png"))
    write_png(path, values)
    assert Image.open(path).mode == "I;16"
    dataset, _ = _load(root)
    (row,) = [r for r in dataset.train.to_pylist() if path.name.startswith(decode_image_id(r["image_id"]))]
    (bicycle,) = [i for i in row["instances"] if i["category_id"] == 33 and not i["is_crowd"]]
    assert mask_utils.area({"size": [HEIGHT, WIDTH], "counts": bicycle["rle"]}) == 1


def test_the_extra_images_are_a_pool_without_truth(tmp_path):
    root = write_cityscapes(tmp_path, num_extra=3)
    assert _load(root)[0].extra is None
    dataset, report = _load(root, unlabelled_pool="both")
    rows = dataset.extra.to_pylist()
    assert [decode_image_id(r["image_id"]) for r in rows] == [f"augsburg_{i:06d}_000019" for i in range(3)]
    assert all(r["instances"] is None and (r["height"], r["width"]) == (HEIGHT, WIDTH) for r in rows)
    assert report["splits"]["extra"]["images"] == 3
    assert dataset.content_hash == _load(root)[0].content_hash and dataset.extra_hash
    with pytest.raises(
        ValueError,
        match=r"no image below leftImg8bit/train_extra in .*: expected a folder of images in data\.extra_image_dir",
    ):
        _load(write_cityscapes(tmp_path / "without"), unlabelled_pool="both")


@pytest.mark.parametrize("split", ["train", "val"])
def test_label_ids_under_the_name_of_instance_ids_are_refused(tmp_path, split):
    root = write_cityscapes(tmp_path)
    for path in root.glob(f"gtFine/{split}/*/*_instanceIds.png"):
        values = np.asarray(Image.open(path))
        write_png(path, np.where(values >= 1000, values // 1000, values).astype(np.uint8))
    for fields in ({}, {"max_bad_fraction": 1.0}):
        with pytest.raises(ValueError) as error:
            _load(root, **fields)
        assert f"({split}: gtFine/{split}): no object in " in str(error.value) and "\n" not in str(error.value)
        assert "by their label ids alone (24, 26, 33)" in str(error.value)
        assert "expected 1000 * class + instance (24000, 24001, ...)" in str(error.value)


def test_a_split_without_any_of_the_classes_is_no_mistake_of_the_format(root):
    for path in root.glob("gtFine/val/*/*_instanceIds.png"):
        write_png(path, np.full((HEIGHT, WIDTH), 3, np.uint16))
    _, report = _load(root)
    assert report["warnings"][0].startswith("No object in the 4 validation images (gtFine/val)")


def test_what_other_programs_leave_in_the_folders_is_passed_over(root):
    expected = _load(root)[0].content_hash
    for path in list(root.glob("*/train/*/*_000019_*.png")):
        (path.parent / f"._{path.name}").write_bytes(b"AppleDouble")
    for name in (".ipynb_checkpoints", "@eaDir"):
        for kind in ("leftImg8bit", "gtFine"):
            shutil.copytree(root / f"{kind}/train/ulm", root / f"{kind}/train/{name}")
    dataset, report = _load(root)
    assert dataset.content_hash == expected and report["skipped"] == []


def test_frame_names():
    for name in ("_leftImg8bit.png", "_gtFine_instanceIds.png", "_gtFine_polygons.json", "_gtCoarse_labelIds.png"):
        assert frame_name(f"train/ulm/ulm_000005_000019{name}") == "ulm_000005_000019"
    assert frame_name("ulm_000005_000019") == "ulm_000005_000019" and frame_name("a.b.png") == "a.b"


def test_what_is_wrong_is_listed(root):
    frames = sorted(root.glob("gtFine/train/aachen/*_instanceIds.png"))
    frames[0].unlink()
    frames[1].write_bytes(b"")
    write_png(frames[2], np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    write_png(frames[3], np.zeros((HEIGHT, WIDTH - 1), np.uint16))
    ulm = sorted(root.glob("gtFine/train/ulm/*_instanceIds.png"))
    write_png(ulm[0], np.full((HEIGHT, WIDTH), 65_535, np.uint16))
    sorted(root.glob("leftImg8bit/train/ulm/*"))[1].unlink()
    dataset, report = _load(root, max_bad_fraction=0.9)
    assert dataset.train.num_rows == 3
    reasons = {s["id"]: (s["kind"], s["reason"]) for s in report["skipped"]}
    assert reasons == {
        "aachen_000000_000019": ("image", "its label map is missing"),
        "aachen_000002_000019": ("image", "its label map: the file is empty"),
        "aachen_000004_000019": ("image", "its label map: label map of 3 channels: expected 16-bit grey"),
        "aachen_000006_000019": ("image", "its label map: 31 x 24 pixels: expected 32 x 24"),
        "ulm_000003_000019": ("image", "its image is missing"),
        "65535": ("annotation", "pixel value 65535: no label of Cityscapes"),
    }
    assert report["splits"]["train"] == {
        "source": "gtFine/train",
        **{"images": 8, "images_skipped": 5},
        **{"annotations": 11, "annotations_skipped": 1},
        **{"objects": 6, "ignore_regions": 4},
    }
    with pytest.raises(
        ValueError, match=r"\(train: gtFine/train\): 2 of 8 images skipped, above data\.max_bad_fraction=0\.01"
    ):
        _load(root)


def test_folders_that_are_not_cityscapes(tmp_path, root):
    with pytest.raises(ValueError, match="expected the folder of Cityscapes"):
        _load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no leftImg8bit/train/<city>/.*expected Cityscapes as downloaded"):
        _load(tmp_path / "empty")
    for path in root.glob("gtFine/val/*/*_instanceIds.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no gtFine/val/<city>/\*_gtFine_instanceIds\.png"):
        _load(root)


def test_truncated_images_are_found_by_decoding_only(root):
    path = next(root.glob("leftImg8bit/train/ulm/*"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 40])
    for verify, num_skipped in (("full", 1), ("header", 0), ("none", 0)):
        _, report = _load(root, max_bad_fraction=0.5, verify=verify)
        assert report["splits"]["train"]["images_skipped"] == num_skipped, verify
