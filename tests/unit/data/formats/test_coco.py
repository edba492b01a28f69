"""The COCO reader: odd but valid folders are read, hostile ones are refused by file and field."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from coco_folders import HEIGHT, SQUARE, WIDTH
from coco_folders import annotation as _annotation
from coco_folders import coco_document as _document
from coco_folders import image_entry as _image
from coco_folders import valid_document as _valid_document
from coco_folders import write_coco as _write
from PIL import Image
from pycocotools import mask as mask_utils

from cast_ray.contracts.records import RECORD_SCHEMA, decode_image_id
from cast_ray.data.formats.segmentations import encode_mask, encode_segmentation
from cast_ray.data.reading.images import read_image
from cast_ray.data.reading.reader import load
from cast_ray.recipe import DataConfig


def _load(root, **fields):
    return load(DataConfig(format="coco", root=str(root), **fields))[0]


def _rows(splits):
    rows = splits.train.to_pylist() + splits.val.to_pylist()
    return {decode_image_id(row["image_id"]): row for row in rows}


def test_polygons_rle_and_crowds(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[1:4, 2:6] = True
    runs = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel(), [0]])))]))
    counts = [int(r) for r in runs]
    counts.append(HEIGHT * WIDTH - sum(counts))
    compressed = {"size": [HEIGHT, WIDTH], "counts": encode_mask(mask).decode()}
    annotations = [
        _annotation(0, 0, segmentation=SQUARE),
        _annotation(1, 0, segmentation={"size": [HEIGHT, WIDTH], "counts": counts}, iscrowd=1),
        _annotation(2, 0, 7, segmentation=compressed, iscrowd=0),
        _annotation(3, 0, segmentation=SQUARE[0]),
    ]
    row = _rows(_load(_write(tmp_path, _document([_image(0), _image(1)], annotations))))[0]
    for instance in row["instances"]:
        np.testing.assert_array_equal(mask_utils.decode({"size": [HEIGHT, WIDTH], "counts": instance["rle"]}), mask)
        assert instance["score"] == 1
    assert [i["is_crowd"] for i in row["instances"]] == [False, True, False, False]
    assert [i["category_id"] for i in row["instances"]] == [1, 1, 7, 1]
    assert (row["height"], row["width"]) == (HEIGHT, WIDTH)


def test_iscrowd_is_read_in_every_form_that_tools_write(tmp_path):
    values = [0, 0.0, False, None, "0", "0.0", "false", "False", "", 1, 1.0, True, "1", "1.0", "true"]
    annotations = [_annotation(i, 0, iscrowd=value) for i, value in enumerate(values)]
    annotations.append(_annotation("without", 1))
    splits = _load(_write(tmp_path, _document([_image(0), _image(1), _image(2)], annotations)))
    assert splits.skipped == ()
    assert [i["is_crowd"] for i in _rows(splits)[0]["instances"]] == [False] * 9 + [True] * 6
    assert splits.annotated == ("0", "1")


@pytest.mark.parametrize("value", [-1, 2, 0.5, "no", "-1", [0], {}, float("nan")])
def test_an_annotation_of_an_unknown_iscrowd_is_skipped_with_the_reason(tmp_path, value):
    annotations = [_annotation(0, 0, iscrowd=value), _annotation(1, 1)]
    splits = _load(_write(tmp_path, _document([_image(0), _image(1)], annotations)), max_bad_fraction=0.5)
    (skipped,) = splits.skipped
    assert skipped["id"] == "0" and skipped["file"] == "0.png"
    assert skipped["reason"] == f"iscrowd is {value!r}: expected 0 for one object or 1 for a region of many"
    assert splits.annotated == ("1",)


def test_areas_are_the_annotation_files(tmp_path):
    """Not the masks': AP by size follows pycocotools, which takes them as they stand. What is no number is none."""
    areas = [12.5, 0, -1, 10**9, None, "12", True, math.nan, math.inf, 10**400, [3]]
    annotations = [_annotation(n, 0, area=area) for n, area in enumerate(areas)] + [_annotation(99, 0)]
    document = _document([_image(0), _image(1)], annotations)
    splits = _load(_write(tmp_path / "a", document))
    assert [i["area"] for i in _rows(splits)[0]["instances"]] == [12.5, 0, -1, 1e9, *[None] * 8]
    annotations[0]["area"] = 13
    assert _load(_write(tmp_path / "b", document)).content_hash != splits.content_hash


def test_identifiers_of_every_kind(tmp_path):
    identifiers = [0, -3, 2**80, "a17", "17", 17, "été"]
    images = [_image(identifier, f"{n}.png") for n, identifier in enumerate(identifiers)]
    annotations = [_annotation(0, 17, 0), _annotation("x", "17", 9), _annotation(2**70, 2**80, -1)]
    document = _document(images, annotations, ((0, "zero"), (9, "nine"), (-1, "minus")))
    splits = _load(_write(tmp_path, document))
    rows = _rows(splits)
    assert set(rows) == set(identifiers)
    assert [c.id for c in splits.categories] == [0, 9, -1]
    counts = {key: [i["category_id"] for i in row["instances"]] for key, row in rows.items()}
    assert counts == {0: [], -3: [], 2**80: [-1], "a17": [], "17": [9], 17: [0], "été": []}
    assert splits.train.schema.equals(RECORD_SCHEMA) and splits.val.schema.equals(RECORD_SCHEMA)


@pytest.mark.parametrize("as_uri", [False, True])
def test_file_names_of_every_kind(tmp_path, as_uri):
    names = [
        "a b.png",
        "what?.png",
        "no#1.png",
        "50%.png",
        "%20.png",
        "été 图.png",
        "sub/dir/x.png",
        "./y.png",
        "a:b.png",
    ]
    names.append("sub/../z.png")
    root = tmp_path / "data set"
    _write(root, _document([_image(i, n) for i, n in enumerate(names)], []))
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "images/z.png")
    splits = _load(f"file://{tmp_path}/data%20set" if as_uri else root)
    assert splits.skipped == () and len(_rows(splits)) == len(names)
    for row in _rows(splits).values():
        assert read_image(row["uri"]).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(
    ("json_name", "image_dir"),
    [
        ("instances.json", ""),
        ("annotations.json", "images"),
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("annotations/my_labels.json", "images"),
        ("train/_annotations.coco.json", "train"),
    ],
)
def test_usual_layouts_are_found(tmp_path, json_name, image_dir):
    splits = _load(_write(tmp_path, _valid_document(), json_name, image_dir))
    assert splits.train.num_rows + splits.val.num_rows == 6


def test_train_and_val_files(tmp_path):
    _write(tmp_path, _valid_document(5), "annotations/instances_train2017.json", "train2017")
    _write(tmp_path, _valid_document(3), "annotations/instances_val2017.json", "val2017")
    _write(tmp_path, _valid_document(2), "annotations/captions_train2017.json", "other")
    splits = _load(tmp_path)
    assert (splits.train.num_rows, splits.val.num_rows) == (5, 3)
    assert "val2017" in splits.val.to_pylist()[0]["uri"]
    named = _load(
        tmp_path,
        annotations="annotations/instances_val2017.json",
        image_dir="val2017",
        val_annotations="annotations/captions_train2017.json",
        val_image_dir=str(tmp_path / "other"),
    )
    assert (named.train.num_rows, named.val.num_rows) == (3, 2)
    _write(tmp_path, _document([_image(0)], [], ((1, "cat"),)), "annotations/instances_val2017.json", "val2017")
    with pytest.raises(ValueError, match=r"instances_train2017\.json: category 7 \('dog'\) is not in .*val2017"):
        _load(tmp_path)


def test_held_out_images_are_stable(tmp_path):
    held = []
    for count in (40, 60):
        root = _write(tmp_path / str(count), _document([_image(i) for i in range(count)], []))
        held.append({decode_image_id(i) for i in _load(root).val.column("image_id").to_pylist()})
    assert held[0] == {i for i in held[1] if int(i) < 40} and 4 <= len(held[0]) <= 18
    expected = {i for i in range(40) if int.from_bytes(hashlib.sha256(str(i).encode()).digest()[:8], "big") < 2**62}
    assert held[0] == expected
    two = _load(_write(tmp_path / "two", _valid_document(2)))
    assert (two.train.num_rows, two.val.num_rows) == (1, 1)


def test_content_hash_covers_annotations_and_images(tmp_path):
    root = _write(tmp_path, _valid_document())
    first = _load(root).content_hash
    assert _load(root).content_hash == first
    with open(root / "images/3.png", "ab") as file:
        file.write(b"x")
    second = _load(root).content_hash
    (root / "instances.json").write_text(json.dumps(_valid_document(), indent=1))
    assert _load(root).content_hash == second != first  # the same annotations in another form
    document = _valid_document()
    document["annotations"][2]["category_id"] = 7
    (root / "instances.json").write_text(json.dumps(document))
    assert len({first, second, _load(root).content_hash}) == 3


BAD_SEGMENTATIONS = {
    "nan": ([[float("nan"), 1, 6, 1, 6, 4]], "not finite"),
    "infinite": ([[2, 1, float("inf"), 1, 6, 4]], "not finite"),
    "huge": ([[2, 1, 1e9, 1, 6, 4]], "1e\\+09 lies far outside the 10 x 8 image"),
    "beyond float": ([[2, 1, 10**400, 1, 6, 4]], "not a number"),
    "outside": ([[12, 1, 16, 1, 16, 4]], "covers no pixel"),
    "two points": ([[2, 1, 6, 4]], "4 numbers: expected at least 6"),
    "box": ([2, 1, 4, 3], "4 numbers"),
    "empty part": ([[]], "0 numbers"),
    "odd": ([[2, 1, 6, 1, 6, 4, 2]], "7 numbers: expected x, y pairs"),
    "line": ([[2, 1, 4, 1, 6, 1]], "no area"),
    "thin": ([[2.01, 1, 2.02, 1, 2.02, 4]], "covers no pixel"),
    "nested": ([[[2, 1], [6, 1], [6, 4], [2, 4], [2, 3], [2, 2]]], "nested"),
    "nested, few points": ([[[2, 1], [6, 1], [6, 4], [2, 4]]], "nested: expected a flat list x0, y0, x1, y1"),
    "nested in the middle": ([[2, 1, [6, 1], 6, 4, 2]], "nested"),
    "degenerate parts only": ([[2, 1, 6, 4], [2, 1, 6]], "4 numbers: expected at least 6"),
    "lines only": ([[2, 1, 4, 1, 6, 1], [0.1, 0.1, 0.7, 0.7, 0.3, 0.3]], "no area"),
    "words": ([["a", "b", "c", "d", "e", "f"]], "not a number"),
    "part is text": (["2,1,6,1,6,4"], "type str"),
    "missing": ([], "no segmentation"),
    "empty object": ({}, "no segmentation"),
    "text": ("2 1 6 1", "type str"),
    "number": (5, "type int"),
    "wrong size": ({"size": [4, 4], "counts": [80]}, "RLE size is \\[4, 4\\]: expected \\[8, 10\\]"),
    "no size": ({"counts": [80]}, "RLE size is None"),
    "no counts": ({"size": [8, 10]}, "counts are of type NoneType"),
    "short runs": ({"size": [8, 10], "counts": [10, 5]}, "do not add up"),
    "long runs": ({"size": [8, 10], "counts": [10, 2**40]}, "do not add up"),
    "negative runs": ({"size": [8, 10], "counts": [90, -20, 10]}, "do not add up"),
    "overflowing runs": ({"size": [8, 10], "counts": [2**63 - 1, 2**63 - 1, 82]}, "do not add up"),
    "runs of text": ({"size": [8, 10], "counts": ["10", "70"]}, "not a number"),
    "ragged runs": ({"size": [8, 10], "counts": [[1, 2], 3]}, "not a number"),
    "broken runs": ({"size": [8, 10], "counts": [10.5, 69.5]}, "not whole"),
    "no runs": ({"size": [8, 10], "counts": []}, "."),
    "nothing inside": ({"size": [8, 10], "counts": [80]}, "covers no pixel"),
    "empty string": ({"size": [8, 10], "counts": ""}, "empty"),
    "long string": ({"size": [8, 10], "counts": "ooooooooooooo0"}, "longer than any image"),
    "cut string": ({"size": [8, 10], "counts": "oo"}, "cut off"),
    "string too long": ({"size": [8, 10], "counts": "l1d5"}, "do not add up"),
    "odd characters": ({"size": [8, 10], "counts": "a b"}, "outside the format"),
    "not ascii": ({"size": [8, 10], "counts": "é"}, "outside the format"),
}


@pytest.mark.parametrize("name", BAD_SEGMENTATIONS)
def test_bad_segmentations_are_refused_before_pycocotools(name):
    segmentation, reason = BAD_SEGMENTATIONS[name]
    with pytest.raises(ValueError, match=reason):
        encode_segmentation(segmentation, HEIGHT, WIDTH)


def test_bad_annotations_are_skipped_and_listed(tmp_path):
    bad = [a for a, _ in BAD_SEGMENTATIONS.values() if a != [[2, 1, 10**400, 1, 6, 4]]]
    annotations = [_annotation(i, 0, segmentation=s) for i, s in enumerate(bad)]
    annotations += [_annotation("good", 0), {"id": "none", "image_id": 1, "category_id": 1}]
    root = _write(tmp_path, _document([_image(0), _image(1)], annotations))
    splits = _load(root, max_bad_fraction=1)
    assert len(_rows(splits)[0]["instances"]) == 1
    assert len(splits.skipped) == len(bad) + 1
    assert splits.skipped[0] == {
        "split": "train",
        "kind": "annotation",
        "id": "0",
        "file": "0.png",
        "reason": "polygon coordinate is not finite",
    }
    with pytest.raises(ValueError, match=rf"{len(bad) + 1} of {len(bad) + 2} annotations skipped.*not finite"):
        _load(root)


def _drawn_by_pycocotools(polygons, height, width):
    return mask_utils.merge(mask_utils.frPyObjects(polygons, height, width))["counts"]


def test_polygon_past_the_border_is_cut_off():
    rle = encode_segmentation([[-5, -4, 4, -4, 4, 3, -5, 3]], HEIGHT, WIDTH)
    mask = mask_utils.decode({"size": [HEIGHT, WIDTH], "counts": rle})
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[:3, :4] = 1
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("reach", [0.0, 0.3, 5.0, 300.0])
def test_polygons_are_drawn_as_pycocotools_draws_them(reach):
    """Also those far outside the image, those that cross themselves, and several parts."""
    rng = np.random.default_rng(int(reach * 10))
    num_drawn = 0
    for _ in range(150):
        height, width = rng.integers(8, 60, 2).tolist()
        polygons = []
        for _ in range(rng.integers(1, 4)):
            points = rng.uniform(-reach, 1 + reach, (rng.integers(3, 9), 2)) * (width, height)
            polygons.append(np.round(points, rng.integers(0, 3)).ravel().tolist())
        expected = _drawn_by_pycocotools(polygons, height, width)
        try:
            rle = encode_segmentation(polygons, height, width)
        except ValueError as error:
            assert str(error) == "polygon covers no pixel of the image"
            assert mask_utils.area({"size": [height, width], "counts": expected}) == 0
            continue
        num_drawn += 1
        assert rle == expected
    assert num_drawn > 80


def test_a_polygon_that_crosses_itself_is_drawn_though_its_area_cancels():
    eight = [[1, 1, 5, 5, 5, 1, 1, 5]]
    rle = encode_segmentation(eight, HEIGHT, WIDTH)
    assert rle == _drawn_by_pycocotools(eight, HEIGHT, WIDTH)
    assert mask_utils.area({"size": [HEIGHT, WIDTH], "counts": rle}) > 4


@pytest.mark.parametrize("part", [[], [4, 4], [4, 4, 5, 5], [4, 4, 5, 5, 5], [2, 1, 6, 1, 6, 4, 2]])
@pytest.mark.parametrize("first", [True, False])
def test_the_valid_part_beside_a_degenerate_one_is_kept(part, first):
    polygons = [part, *SQUARE] if first else [*SQUARE, part]
    assert encode_segmentation(polygons, HEIGHT, WIDTH) == encode_segmentation(SQUARE, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("polygon", "expected"),
    [
        ([-9e7, -9e7, 9e7, -9e7, 9e7, 9e7, -9e7, 9e7], np.s_[:, :]),
        ([2, 1, 3e7, 1, 3e7, 4, 2, 4], np.s_[1:4, 2:]),
        ([2, 1, 2, 9e7, 6, 9e7, 6, 1], np.s_[1:, 2:6]),
        ([-8e7, 4, 9e7, 4, 9e7, 9e7, 5, 9e7, 5, -9e7, -8e7, -9e7], (np.s_[:4, :5], np.s_[4:, 5:])),
    ],
)
def test_a_polygon_too_long_for_pycocotools_is_cut_first(polygon, expected):
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    for part in expected if isinstance(expected[0], tuple) else (expected,):
        mask[part] = 1
    rle = encode_segmentation([polygon], HEIGHT, WIDTH)
    np.testing.assert_array_equal(mask_utils.decode({"size": [HEIGHT, WIDTH], "counts": rle}), mask)


def test_an_outline_without_end_is_refused():
    zigzag = np.stack([np.tile([-WIDTH, 2 * WIDTH], 600_000), np.tile([0, 1, 2, 3], 300_000)], axis=1)
    with pytest.raises(ValueError, match=r"polygon outline of 3\d,\d+,\d+ pixels: no object of a 10 x 8 image"):
        encode_segmentation([zigzag.ravel().tolist()], HEIGHT, WIDTH)


def test_random_rle_strings_survive_validation():
    rng = np.random.default_rng(0)
    for _ in range(100):
        height, width = rng.integers(1, 90, 2).tolist()
        mask = rng.random((height, width)) < rng.random()
        mask[0, 0] = True
        counts = encode_mask(mask)
        assert encode_segmentation({"size": [height, width], "counts": counts.decode()}, height, width) == counts


def test_bad_images_are_skipped_and_listed(tmp_path):
    images = [_image(i) for i in range(4)] + [
        _image(10, "gone.png"),
        _image(11, "/etc/passwd"),
        _image(12, "../../secret.png"),
        _image(13, "images/../../../x.png"),
        _image(14, "http://host/a.png"),
        _image(15, "a\0b.png"),
        _image(16, "empty.png"),
        _image(17, "17.png", width=-7),
        _image(18, "18.png", height="eight"),
        _image(19, "19.png", height=8.5),
        _image(20, "20.png", height=10**6, width=10**6),
        {"id": 21, "height": 8, "width": 10},
        _image(22, "\ud800.png"),
        _image(23, "sub"),
        _image(24, ".."),
    ]
    document = _document(images, [_annotation(i, image["id"]) for i, image in enumerate(images)])
    (tmp_path / "data").mkdir()
    for part in ("secret.png", "x.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / part)
    writable = {**document, "images": [i for i in images if i["id"] not in (10, 16, 22, 23, 14)]}
    root = _write(tmp_path / "data", writable)
    (root / "instances.json").write_text(json.dumps(document))
    (root / "images/empty.png").write_bytes(b"")
    (root / "images/sub").mkdir()
    splits = _load(root, max_bad_fraction=0.9)
    assert set(_rows(splits)) == {0, 1, 2, 3}
    reasons = {s["id"]: s["reason"] for s in splits.skipped}
    assert all(s["kind"] == "image" for s in splits.skipped) and len(reasons) == 15
    missing = "the file is missing in images (another folder is named by data.image_dir)"
    assert reasons["10"] == reasons["23"] == missing
    assert {reasons[i] for i in ("11", "12", "13", "14")} == {f"file_name leaves the dataset's folder, and {missing}"}
    assert reasons["16"] == "the file is empty"
    assert reasons["17"] == "width is -7: expected a whole number of pixels"
    assert reasons["18"].startswith("height is 'eight':") and reasons["19"].startswith("height is 8.5:")
    assert "at most" in reasons["20"] and all("file_name is" in reasons[i] for i in ("15", "21", "22"))
    with pytest.raises(ValueError, match=r"15 of 18 images skipped.*gone\.png.*missing") as error:
        _load(root)
    assert "\n" not in str(error.value)


def _changed(change):
    document = _valid_document()
    change(document)
    return json.dumps(document).encode()


BAD_FILES = {
    "truncated": (b'{"images": [', "not JSON"),
    "empty": (b"", "not JSON"),
    "binary": (b"\x89PNG\xff\xfe", "not UTF-8 text"),
    "deep": (b"[" * 100_000, "not JSON"),
    "list": (b"[]", "not COCO: expected an object"),
    "captions": (b'{"images": [], "annotations": []}', "'categories' is missing"),
    "images is object": (b'{"images": {}, "annotations": [], "categories": []}', "'images' is of type dict"),
    "no images": (b'{"images": [], "annotations": [], "categories": []}', "'images' is empty"),
    "entry": (b'{"images": [3], "annotations": [], "categories": []}', r"images\[0\] is of type int"),
    "no classes": (_changed(lambda d: d.update(categories=[])), "'categories' is empty"),
    "class id": (_changed(lambda d: d["categories"][1].update(id="seven")), r"categories\[1\]\.id is 'seven'"),
    "class id size": (_changed(lambda d: d["categories"][1].update(id=2**64)), r"categories\[1\]\.id is 1844"),
    "class name": (_changed(lambda d: d["categories"][1].pop("name")), r"categories\[1\]\.name is None"),
    "class name of half a character": (
        _changed(lambda d: d["categories"][1].update(name="\ud800")),
        r"categories\[1\]\.name is '\\ud800': expected a string",
    ),
    "image id of half a character": (
        _changed(lambda d: d["images"][2].update(id="\ud800")),
        r"image \? .2\.png.: id is '\\ud800'",
    ),
    "annotation id of half a character": (
        _changed(lambda d: d["annotations"][4].update(id="\ud800", category_id=3)),
        r"annotation \? .4\.png.: category_id is 3",
    ),
    "class twice": (_changed(lambda d: d["categories"][1].update(id=1)), r"categories\[1\]\.id is 1 for the second"),
    "image id": (_changed(lambda d: d["images"][2].pop("id")), r"image None .2\.png.: id is None"),
    "image id bool": (_changed(lambda d: d["images"][2].update(id=True)), r"image True .2\.png.: id is True"),
    "image twice": (_changed(lambda d: d["images"][2].update(id=1)), r"images\[2\]\.id is 1 for the second"),
    "image repeated": (_changed(lambda d: d["images"].append(d["images"][1])), "image 1 .*repeats an image"),
    "annotation repeated": (
        _changed(lambda d: d["annotations"].append(d["annotations"][1])),
        "annotation 1 .*repeats an annotation",
    ),
    "unknown class": (
        _changed(lambda d: d["annotations"][4].update(category_id=3)),
        r"annotation 4 \(4\.png\): category_id is 3: no such category",
    ),
    "unknown image": (
        _changed(lambda d: d["annotations"][4].update(image_id="x4")),
        r"annotation 4 \(instances\.json\): image_id is 'x4': no such image",
    ),
    "no image": (
        _changed(lambda d: d["annotations"][4].pop("image_id")),
        r"annotation 4 .*image_id is missing: no such image",
    ),
    "list as id": (_changed(lambda d: d["annotations"][4].update(image_id=[1])), r"image_id is \[1\]"),
    "files gone": (_changed(lambda d: [i.update(file_name="x.png") for i in d["images"]]), "no usable image of 6"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_annotation_files_give_one_line(tmp_path, name):
    content, message = BAD_FILES[name]
    root = _write(tmp_path, _valid_document())
    (root / "instances.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        _load(root)
    assert "instances.json" in str(error.value) and "\n" not in str(error.value)


def test_bad_folders_give_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    _write(tmp_path / "one", _valid_document(1))
    _write(tmp_path / "many", _valid_document(), "annotations/instances_train2014.json")
    _write(tmp_path / "many", _valid_document(), "annotations/instances_train2017.json")
    expected = {
        "": "data.root is empty",
        str(tmp_path / "none"): "does not exist",
        str(tmp_path / "file"): "is a file",
        str(tmp_path / "empty"): "no annotation file found",
        str(tmp_path / "one"): "1 usable image: expected at least 2",
        str(tmp_path / "many"): "several annotation files fit .instances_train2014.json, instances_train2017.json",
        "nosuch://bucket/x": "not a path or URI",
        f"file://{tmp_path}/none": "does not exist",
    }
    for root, message in expected.items():
        with pytest.raises(ValueError, match=message) as error:
            _load(root)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"data\.annotations: x\.json is not a file below"):
        _load(tmp_path / "many", annotations="x.json")


def test_real_photographs(coco128: Path):
    splits = _load(coco128)
    assert splits.train.num_rows + splits.val.num_rows == 128 and len(splits.categories) == 80
    row = max(splits.train.to_pylist(), key=lambda r: len(r["instances"]))
    assert read_image(row["uri"]).shape == (row["height"], row["width"], 3)
    rles = [{"size": [row["height"], row["width"]], "counts": i["rle"]} for i in row["instances"]]
    assert mask_utils.area(rles).min() > 0
