"""Published label lists, in the forms in which their authors publish them."""

import hashlib
import json

import pyarrow as pa
import pytest
from dataset_folders import write_cityscapes

from cast_ray.contracts.records import RECORD_SCHEMA, encode_image_id
from cast_ray.data.reading.reader import load
from cast_ray.data.splits.fractions import LabelSource, label_index, split
from cast_ray.data.splits.label_lists import forms_of_skipped, read_list
from cast_ray.recipe import DataConfig


def _records(names):
    rows = [
        {"image_id": encode_image_id(i), "uri": uri, "height": 4, "width": 4, "instances": []}
        for i, uri in names.items()
    ]
    return pa.Table.from_pylist(rows, schema=RECORD_SCHEMA)


def _split(records, file, fraction=0.1, seed=0, annotated=None, unusable=(), **fields):
    config = DataConfig(label_family="list", label_list=str(file), label_fraction=fraction, **fields)
    other = read_list(config.unlabelled_list) if config.unlabelled_list else None
    source = LabelSource(read_list(str(file)), other, annotated, unusable)
    return split(label_index(records), config, seed, source)


def _write(path, text):
    path.write_text(text)
    return path


def test_guided_distillations_cityscapes_list(tmp_path):
    dataset, _ = load(DataConfig(format="cityscapes", root=str(write_cityscapes(tmp_path / "data"))))
    text = "ulm_000003_000019_gtFine_instanceIds.png\naachen_000000_000019_gtFine_instanceIds.png\n"
    chosen = _split(dataset.train, _write(tmp_path / "perc_5.txt", text))
    ids = dataset.train.column("image_id").take(chosen.labelled).to_pylist()
    assert ids == ['"aachen_000000_000019"', '"ulm_000003_000019"'] and len(chosen.unlabelled) == 6
    assert chosen.facts == {
        **{"family": "list", "fraction": 0.25, "seed": 0, "num_labelled": 2, "num_with_objects": 2},
        **{"num_unlabelled": 6, "num_extra": 0},
        "label_list": str(tmp_path / "perc_5.txt"),
        "label_list_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def test_names_of_every_form(tmp_path):
    records = _records(
        {9: "/d/train/000000000009.jpg", "b7": "s3://bucket/d/a%20b.png", 11: "/d/x/c.png", 12: "/d/y/c.png"}
    )
    text = "# comment\n\n  9  \na b.png\r\n/somewhere/else/y/c.png\n"
    assert _split(records, _write(tmp_path / "list.txt", text)).labelled.tolist() == [0, 1, 3]
    for line in ("000000000009.jpg", "train/000000000009.jpg", "000000000009", "9"):
        assert _split(records, _write(tmp_path / "one.txt", line)).labelled.tolist() == [0]
    with pytest.raises(ValueError, match=r"one\.txt: 'c\.png' fits several images: expected the folder"):
        _split(records, _write(tmp_path / "one.txt", "c.png"))


def test_a_list_of_the_unlabelled(tmp_path):
    records = _records({i: f"/d/{i}.jpg" for i in range(10)})
    labelled, unlabelled = _write(tmp_path / "l.txt", "1\n2\n"), _write(tmp_path / "u.txt", "2\n5\n7\n")
    chosen = _split(records, labelled, unlabelled_list=str(unlabelled))
    assert chosen.labelled.tolist() == [1, 2] and sorted(chosen.unlabelled.tolist()) == [5, 7]
    assert chosen.facts["unlabelled_list_sha256"] == hashlib.sha256(unlabelled.read_bytes()).hexdigest()


def test_a_coco_subset(tmp_path):
    records = _records({i: f"/d/{i:012d}.jpg" for i in range(10)})
    subset = {
        "images": [{"id": 3, "file_name": f"{3:012d}.jpg"}, {"id": 8, "file_name": f"{8:012d}.jpg"}],
        "annotations": [],
    }
    file = _write(tmp_path / "instances_train2017_10.json", json.dumps(subset))
    assert _split(records, file).labelled.tolist() == [3, 8]


@pytest.fixture
def positions(tmp_path):
    lists = {"10.0": {"0": [0, 18], "1": [3, 5]}, "5.0": {"1": [7]}}
    return _write(tmp_path / "COCO_supervision.txt", json.dumps(lists))


def test_unbiased_teachers_positions(positions):
    """Positions count images with objects, by rising id; the table holds others too, in another order."""
    records = _records({i: f"/d/{i}.jpg" for i in range(40, 0, -1)})
    annotated = [str(i) for i in range(1, 41, 2)]
    for seed, expected in ((0, {1, 37}), (1, {7, 11})):
        chosen = _split(records, positions, 0.1, seed, annotated)
        assert {40 - row for row in chosen.labelled.tolist()} == expected
        assert chosen.facts["seed"] == seed and chosen.facts["fraction"] == 0.1 and len(chosen.unlabelled) == 38
    assert _split(records, positions, 0.05, 9, annotated, split_seed=1).labelled.tolist() == [40 - 15]


def test_positions_that_do_not_fit(positions):
    records = _records({i: f"/d/{i}.jpg" for i in range(40)})
    annotated = [str(i) for i in range(20)]
    with pytest.raises(ValueError, match=r"no list for data\.label_fraction=0\.2: expected 10\.0, 5\.0 percent"):
        _split(records, positions, 0.2, 0, annotated)
    with pytest.raises(ValueError, match=r"5\.0 percent has no seed 0: expected data\.split_seed 1"):
        _split(records, positions, 0.05, 0, annotated)
    with pytest.raises(ValueError, match=r"2 positions for 10\.0 percent: made for another annotation file"):
        _split(records, positions, 0.1, 0, annotated * 2)
    with pytest.raises(ValueError, match="holds positions, which count the images of a COCO annotation file"):
        _split(records, positions)


def test_positions_count_the_images_of_the_annotation_file(tmp_path):
    """An image that cannot be used keeps its place: the positions of the others do not move."""
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 4, "width": 4} for i in (5, 2, 9, 1, 7)]
    square = [[0, 0, 3, 0, 3, 3, 0, 3]]
    made = [(2, 0), (5, 0), (7, 1), (9, 0), (1, 1), (1, 0)]
    annotations = [
        {"id": n, "image_id": i, "category_id": 1, "iscrowd": crowd, "segmentation": square}
        for n, (i, crowd) in enumerate(made)
    ]
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    _write(tmp_path / "instances.json", json.dumps(document))
    from PIL import Image

    for i in (5, 9, 1, 7):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.jpg")
    config = DataConfig(format="coco", root=str(tmp_path), max_bad_fraction=0.5, val_fraction=0.01)
    dataset, report = load(config)
    assert dataset.annotated == ("1", "2", "5", "9")  # 7 has a crowd only; 2 is missing on disk
    unusable = forms_of_skipped(report["skipped"])
    file = _write(tmp_path / "list.json", json.dumps({"75.0": {"0": [0, 1, 3], "1": [2, 0, 1]}}))
    ids = dataset.train.column("image_id").to_pylist()
    for seed, expected in (("0", {"1", "9"}), ("1", {"1", "5"})):
        wanted = expected & set(ids)
        chosen = _split(dataset.train, file, 0.75, int(seed), dataset.annotated, {*unusable, *(expected - wanted)})
        assert {ids[row] for row in chosen.labelled.tolist()} == wanted


def test_images_that_the_dataset_has_not(tmp_path):
    records = _records({i: f"/d/{i}.jpg" for i in range(10)})
    file = _write(tmp_path / "list.txt", "1.jpg\n98.jpg\n99.jpg\n")
    with pytest.raises(ValueError, match=r"2 of its 3 images are no training images of the dataset: 98\.jpg, 99\.jpg"):
        _split(records, file)
    skipped = [{"split": "train", "kind": "image", "id": "98", "file": "images/98.jpg", "reason": "empty"}]
    skipped.append({"split": "train", "kind": "image", "id": "99", "file": "images/99.jpg", "reason": "empty"})
    assert _split(records, file, unusable=forms_of_skipped(skipped)).labelled.tolist() == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "names no image"),
        (b"# nothing\n", "names no image"),
        (b"\xff\xfe\x00", "not a text file"),
        (b'{"a": ', "not JSON"),
        (b'["a.jpg", 1.5]', "expected names of images, a COCO JSON, or percentage"),
        (b"[]", "expected names of images, a COCO JSON, or percentage"),
        (b'{"10": {"0": [1.5]}}', "expected names of images"),
        (b'{"10": {"0": [-1]}}', "expected names of images"),
        (b'{"images": [{"id": 1}]}', "expected names of images"),
    ],
)
def test_files_that_are_no_lists(tmp_path, content, message):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_list(str(path))
    assert "list.txt" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"data\.label_list: .*gone\.txt: cannot be read"):
        read_list(str(tmp_path / "gone.txt"))


def test_recipe_says_what_a_list_needs():
    with pytest.raises(ValueError, match=r"data\.label_list is empty"):
        DataConfig(label_family="list")
    with pytest.raises(ValueError, match=r"data\.label_list is given: expected data\.label_family=list"):
        DataConfig(label_list="x.txt")
    with pytest.raises(ValueError, match=r"data\.unlabelled_list names D_u"):
        DataConfig(label_family="list", label_list="x", unlabelled_list="y", unlabelled_pool="both")
