"""Images are found where tools put them and by what tools call them, or the places that were looked in are named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from coco_folders import (
    HEIGHT,
    WIDTH,
    annotation,
    coco_document,
    image_entry,
    valid_document,
    write_coco,
    write_image,
)

from cast_ray.contracts.records import DatasetSplits, decode_image_id
from cast_ray.data.reading.reader import load
from cast_ray.recipe import DataConfig


def read(root: Path, **fields: Any) -> DatasetSplits:
    return load(DataConfig(format="coco", root=str(root), **fields))[0]


def files_of(splits: DatasetSplits) -> dict[Any, str]:
    """Image id -> the file that was taken for it, below the folder `data`."""
    rows = splits.train.to_pylist() + splits.val.to_pylist()
    return {decode_image_id(row["image_id"]): row["uri"].rpartition("/data set/")[2] for row in rows}


def write_names(root: Path, names: Sequence[str], files: Sequence[str], image_dir: str = "images") -> Path:
    """An annotation file with these file names beside image files of other ones."""
    images = [image_entry(i, name) for i, name in enumerate(names)]
    document = coco_document(images, [annotation(i, i) for i in range(len(names))])
    write_coco(root, document | {"images": []})
    (root / "instances.json").write_text(json.dumps(document))
    for file in files:
        write_image(root / image_dir / file)
    return root


NAMES = {
    "back slashes": (["train\\1.png", "train\\b\\2.png"], ["train/1.png", "train/b/2.png"]),
    "percent-encoded": (["a%20b.png", "%C3%A9t%C3%A9.png"], ["a b.png", "été.png"]),
    "percent-encoded on the disk": (["a b.png", "2.png"], ["a%20b.png", "2.png"]),
    "another case": (["IMG_1.JPG", "Sub/2.png"], ["img_1.jpg", "sub/2.PNG"]),
    "another form of accents": (["e\u0301.png", "2.png"], ["\u00e9.png", "2.png"]),
    "a foreign prefix": (["/content/drive/My Drive/ds/1.png", "/content/drive/My Drive/ds/2.png"], ["1.png", "2.png"]),
    "a Windows prefix": (["C:\\Users\\me\\data\\images\\1.png", "C:\\Users\\me\\2.png"], ["1.png", "2.png"]),
    "a relative prefix": (["../../other/1.png", "./data/set/2.png"], ["1.png", "2.png"]),
    "a URL": (["https://host/bucket/1.png", "s3://bucket/b/2.png"], ["1.png", "b/2.png"]),
    "all of it": (["D:\\My%20Data\\Images\\A%20B.PNG", "D:\\My%20Data\\2.png"], ["images/a b.png", "2.png"]),
    "some of them exact": (["1.png", "X\\2.png", "3.png"], ["1.png", "2.png", "3.png"]),
}


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("as_uri", [False, True])
def test_file_names_of_other_machines_are_found(tmp_path: Path, case: str, as_uri: bool) -> None:
    names, files = NAMES[case]
    root = write_names(tmp_path / "data set", names, files)
    given = f"file://{tmp_path}/data%20set" if as_uri else str(root)
    splits = load(DataConfig(format="coco", root=given))[0]
    rows = splits.train.to_pylist() + splits.val.to_pylist()
    assert splits.skipped == () and len(rows) == len(names)
    for row in rows:
        path = unquote(row["uri"].removeprefix("file://")) if as_uri else row["uri"]
        assert path == str(root / "images" / files[int(decode_image_id(row["image_id"]))])


@pytest.mark.parametrize(
    ("names", "files", "reason"),
    [
        (["a/1.png", "b/1.png"], ["1.png"], "the nearest, images/1.png, is that of several images"),
        (["1.png", "old/1.png"], ["1.png"], "the nearest, images/1.png, is that of several images"),
        (["A.png", "2.png"], ["a.png", "a.PNG", "2.png"], "the file is missing in images (another folder is named by"),
    ],
)
def test_a_file_that_fits_several_images_is_nobodys(
    tmp_path: Path, names: list[str], files: list[str], reason: str
) -> None:
    root = write_names(tmp_path / "data set", [*names, "x.png", "y.png"], [*files, "x.png", "y.png"])
    splits = read(root, max_bad_fraction=0.9)
    assert {s["id"] for s in splits.skipped} == {str(i) for i in range(4)} - {str(i) for i in files_of(splits)}
    assert reason in splits.skipped[0]["reason"] and {2, 3} <= files_of(splits).keys()


def test_a_file_outside_the_folder_is_never_taken(tmp_path: Path) -> None:
    write_image(tmp_path / "secret.png")
    names = ["../../secret.png", str(tmp_path / "secret.png"), "x/../../../secret.png", "1.png", "2.png"]
    splits = read(write_names(tmp_path / "data set", names, ["1.png", "2.png"]), max_bad_fraction=0.9)
    assert files_of(splits).keys() == {3, 4}
    reason = "file_name leaves the dataset's folder, and the file is missing in images"
    assert all(s["reason"].startswith(reason) for s in splits.skipped)


@pytest.mark.parametrize(
    ("json_name", "image_dir"),
    [
        ("labels.json", "data"),
        ("train/labels.json", "train/data"),
        ("annotations/instances_default.json", "images/default"),
        ("annotations/instances_Train.json", "images/Train"),
        ("annotations/instances_Train.json", "Train"),
        ("train/_annotations.coco.json", "train/images"),
        ("Annotations.json", "images"),
    ],
)
def test_layouts_of_exports_are_found(tmp_path: Path, json_name: str, image_dir: str) -> None:
    splits = read(write_coco(tmp_path, valid_document(), json_name, image_dir))
    assert splits.train.num_rows + splits.val.num_rows == 6


@pytest.mark.parametrize(
    ("train", "val"),
    [
        (("train/_annotations.coco.json", "train"), ("val/_annotations.coco.json", "val")),
        (("train/_annotations.coco.json", "train"), ("validation/_annotations.coco.json", "validation")),
        (("annotations/instances_Train.json", "images/Train"), ("annotations/instances_Validation.json", "images/Val")),
        (("train/labels.json", "train/data"), ("validation/labels.json", "validation/data")),
    ],
)
def test_validation_files_of_exports_are_found(tmp_path: Path, train: tuple[str, str], val: tuple[str, str]) -> None:
    write_coco(tmp_path, valid_document(5), *train)
    splits = read(write_coco(tmp_path, valid_document(3), *val))
    assert (splits.train.num_rows, splits.val.num_rows) == (5, 3)
    assert all(f"/{val[1]}/" in uri for uri in splits.val.column("uri").to_pylist())


def test_the_exact_name_goes_before_one_in_another_case(tmp_path: Path) -> None:
    write_coco(tmp_path, valid_document(3), "Annotations.json", "Images")
    splits = read(write_coco(tmp_path, valid_document(5), "annotations.json", "images"))
    assert splits.train.num_rows + splits.val.num_rows == 5


def test_the_places_looked_in_are_named(tmp_path: Path) -> None:
    root = write_coco(tmp_path, valid_document(), "instances.json", "elsewhere/deep")
    with pytest.raises(ValueError, match=r"no usable image of 6: image 0 .0\.png.: the file is missing: ") as error:
        read(root)
    places = "looked in train*, images, images/train*, ., data, images/default (name the folder by data.image_dir"
    assert places in str(error.value) and "\n" not in str(error.value)
    assert read(root, image_dir="elsewhere/deep").skipped == ()
    write_coco(tmp_path / "two", valid_document(), "annotations/instances_train.json", "train")
    write_coco(tmp_path / "two", valid_document(), "annotations/instances_val.json", "elsewhere")
    with pytest.raises(ValueError, match=r"looked in val\*, .*\(name the folder by data\.val_image_dir\)"):
        read(tmp_path / "two")


@pytest.mark.parametrize(
    "size", [{}, {"height": None, "width": None}, {"height": -1, "width": -1}, {"height": 0, "width": WIDTH}]
)
def test_an_image_without_a_size_has_that_of_its_file(tmp_path: Path, size: dict[str, Any]) -> None:
    document = valid_document()
    for image in document["images"][:2]:
        del image["height"], image["width"]
        image |= size
    splits = read(write_coco(tmp_path, document))
    assert splits.skipped == ()
    rows = splits.train.to_pylist() + splits.val.to_pylist()
    assert {(row["height"], row["width"], len(row["instances"])) for row in rows} == {(HEIGHT, WIDTH, 1)}
    sized = read(write_coco(tmp_path / "sized", valid_document()))
    assert splits.content_hash == sized.content_hash


def test_a_file_whose_size_cannot_be_read_is_skipped(tmp_path: Path) -> None:
    images = [image_entry(i) for i in range(6)]
    for image in images:
        image["height"] = -1
    images[3]["width"] = WIDTH + 1
    root = write_coco(tmp_path, coco_document(images, [annotation(i, i) for i in range(6)]))
    (root / "images/1.png").write_bytes(b"no image")
    (root / "images/2.png").write_bytes(b"")
    write_image(root / "images/4.png", 400, 300)
    splits = read(root, max_bad_fraction=0.9, max_image_pixels=1000)
    reasons = {s["id"]: s["reason"] for s in splits.skipped}
    assert reasons["1"] == "not an image of a known format" and reasons["2"] == "the file is empty"
    assert reasons["3"] == "10 x 8 pixels: expected the height or width that the annotation file says"
    assert "at most 1000 are read" in reasons["4"] and len(reasons) == 4


def test_numbers_written_as_text_or_floats_are_read(tmp_path: Path) -> None:
    images = [
        image_entry(0.0, "0.png", height="8", width="10"),
        image_entry(1.0, "1.png", height=8.0, width="10.0"),
        image_entry(2, "2.png"),
        image_entry("a", "a.png"),
        image_entry("7", "7.png"),
    ]
    rle = {"size": ["8", 10.0], "counts": [10, 5, 65]}
    annotations = [
        annotation(0, "0", 1.0),
        annotation(1, 1.0, "7"),
        annotation(2, "2.0", 7, rle),
        annotation(3, 7, 1),
        annotation(4, "a", 1),
    ]
    document = coco_document(images, annotations, [("1", "cat"), (7.0, "dog")])
    splits = read(write_coco(tmp_path, document))
    assert splits.skipped == () and [c.id for c in splits.categories] == [1, 7]
    rows = splits.train.to_pylist() + splits.val.to_pylist()
    classes = {r["image_id"]: [i["category_id"] for i in r["instances"]] for r in rows}
    assert classes == {"0": [1], "1": [7], "2": [7], '"a"': [1], '"7"': [1]}
    assert splits.annotated is None  # ids of two types have no order


@pytest.mark.parametrize("identifier", [None, 1.5, True, [1], float("nan")])
def test_no_usable_image_is_never_said_without_a_reason(tmp_path: Path, identifier: Any) -> None:
    document = coco_document([image_entry(identifier, f"{i}.png") for i in range(3)], [])
    with pytest.raises(ValueError, match=r"instances\.json: no usable image of 3: image .*0\.png.: id is ") as error:
        read(write_coco(tmp_path, document), max_bad_fraction=1)
    assert "\n" not in str(error.value)


def test_images_that_are_all_broken_are_named(tmp_path: Path) -> None:
    root = write_coco(tmp_path, valid_document())
    for path in (root / "images").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"no usable image of \d: image \d .images/\d\.png.: not an image"):
        read(root, max_bad_fraction=1)
    (root / "images/0.png").unlink()
    document = valid_document(2)
    with pytest.raises(ValueError, match=r"1 usable image .1 skipped: image 0 .*missing.*: expected at least 2"):
        read(write_coco(tmp_path / "two", document | {"images": [image_entry(0, "x/../../0.png"), image_entry(1)]}))


@pytest.mark.parametrize("field", ["neg_category_ids", "not_exhaustive_category_ids"])
def test_lvis_is_refused_by_name(tmp_path: Path, field: str) -> None:
    document = valid_document()
    document["images"][2] |= {field: []}
    with pytest.raises(ValueError, match=rf"instances\.json: LVIS is not supported: its images .'{field}'") as error:
        read(write_coco(tmp_path, document))
    assert "\n" not in str(error.value)
