"""From index to records: every image once, bad ones by name, nothing lost, one hash wherever the files lie."""

import json
import shutil
import sys

import numpy as np
import pyarrow as pa
import pytest
from dataset_folders import HEIGHT, WIDTH, random_image, write_cityscapes
from PIL import Image

from cast_ray.data.formats.cityscapes import index
from cast_ray.data.reading.images import ImageError, check_image, read_image, read_map
from cast_ray.data.reading.reader import IMAGES_PER_BLOCK, Reading, in_threads, load
from cast_ray.recipe import DataConfig

SQUARE = [[2, 1, 6, 1, 6, 4, 2, 4]]


def _coco(root, count=8, **fields):
    root.mkdir(exist_ok=True)
    images = [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(count)]
    annotations = [{"id": i, "image_id": i, "category_id": 1, "segmentation": SQUARE} for i in range(count)]
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    (root / "instances.json").write_text(json.dumps(document | fields))
    rng = np.random.default_rng(0)
    for i in range(count):
        random_image(rng).save(root / f"{i}.png")
    return root


def _load(root, **fields):
    return load(DataConfig(format="coco", root=str(root), **fields))


def test_images_are_checked_against_their_annotation(tmp_path):
    root = _coco(tmp_path, 20)
    content = (root / "2.png").read_bytes()
    (root / "2.png").write_bytes(content[:-60])
    random_image(np.random.default_rng(1), WIDTH, HEIGHT).save(root / "3.png", exif=_exif(6))
    (root / "4.png").write_bytes(b"")
    (root / "5.png").write_text("<html>404</html>")
    expected = {"full": {"2", "3", "4", "5"}, "header": {"3", "4", "5"}, "none": {"4"}}
    for verify, bad in expected.items():
        dataset, report = _load(root, verify=verify, max_bad_fraction=0.9)
        assert {s["id"] for s in report["skipped"]} == bad, verify
        assert dataset.train.num_rows + dataset.val.num_rows == 20 - len(bad)
        assert all(s["kind"] == "image" and s["file"] == f"{s['id']}.png" for s in report["skipped"])
    reasons = {s["id"]: s["reason"] for s in _load(root, max_bad_fraction=0.9)[1]["skipped"]}
    assert reasons["2"].startswith("cannot be decoded") and reasons["5"] == "not an image of a known format"
    assert reasons["3"] == (
        "24 x 32 pixels: expected 32 x 24 (its EXIF orientation is not applied: annotations are in the coordinates of "
        "the stored pixels)"
    )
    with pytest.raises(ValueError, match=r"images skipped, above data\.max_bad_fraction=0\.01: image") as error:
        _load(root)
    assert "\n" not in str(error.value)


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_the_limit_of_pixels_is_a_setting(tmp_path):
    root = _coco(tmp_path)
    with pytest.raises(ValueError, match=r"32 x 24 pixels, at most 767 are read \(data\.max_image_pixels\)"):
        _load(root, max_image_pixels=767)
    assert _load(root, max_image_pixels=768)[1]["skipped"] == []
    path = str(root / "0.png")
    with pytest.raises(ImageError, match="at most 767"):
        check_image(path, None, 767, decode=True)
    # a record's size has passed the limit: readers hold the file to it instead
    assert read_image(path, (HEIGHT, WIDTH), max_pixels=1).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(ImageError, match=r"0\.png: 32 x 24 pixels: expected 9 x 9"):
        read_image(path, (9, 9))


def test_header_of_large_files(tmp_path):
    """The size may stand behind more bytes than a header read takes at first."""
    image = random_image(np.random.default_rng(0))
    image.save(tmp_path / "a.jpg", icc_profile=bytes(400_000))
    image.save(tmp_path / "b.tif", tiffinfo={270: "x" * 400_000})
    for name in ("a.jpg", "b.tif"):
        assert (tmp_path / name).stat().st_size > 1 << 18
        assert check_image(str(tmp_path / name), None, decode=False) == ((HEIGHT, WIDTH), b"")
    with pytest.raises(ImageError, match="label map of mode CMYK"):
        image.convert("CMYK").save(tmp_path / "c.tif")
        read_map(str(tmp_path / "c.tif"), (HEIGHT, WIDTH))


def test_content_hash_is_of_the_content(tmp_path):
    root = _coco(tmp_path / "a")
    first, _ = _load(root)
    shutil.copytree(root, tmp_path / "b")
    for fields in ({}, {"verify": "none"}, {"verify": "header"}):
        here, there = (_load(folder, **fields)[0] for folder in (root, tmp_path / "b"))
        assert here.content_hash == there.content_hash and here.train.column("uri") != there.train.column("uri")
        assert (here.content_hash == first.content_hash) == (not fields)  # sizes are no content
    (root / "7.png").write_bytes(b"")  # a skipped image is another dataset
    assert _load(root, max_bad_fraction=0.5)[0].content_hash != first.content_hash


def test_threads_and_blocks_change_nothing(tmp_path, monkeypatch):
    root = write_cityscapes(tmp_path, num_train=IMAGES_PER_BLOCK + 9)
    config = DataConfig(format="cityscapes", root=str(root))
    hashes, ids = set(), set()
    for cpus in (1, 3):
        monkeypatch.setattr("os.cpu_count", lambda cpus=cpus: cpus)
        dataset, _ = load(config)
        hashes.add(dataset.content_hash)
        ids.add(tuple(dataset.train.column("image_id").to_pylist()))
    assert len(hashes) == len(ids) == 1 and len(ids.pop()) == IMAGES_PER_BLOCK + 9


@pytest.mark.parametrize("fault", ["lost block", "lost row", "swapped", "repeated"])
def test_images_that_a_run_loses_are_missed(tmp_path, fault):
    config = DataConfig(format="cityscapes", root=str(write_cityscapes(tmp_path)))

    def run(make, blocks):
        tables = [make(block) for block in blocks]
        if fault == "lost block":
            tables.pop()
        elif fault == "lost row":
            tables[0] = tables[0].slice(1)
        elif fault == "swapped":
            tables[0] = tables[0].take(pa.array([1, 0, *range(2, tables[0].num_rows)]))
        else:
            tables.append(tables[-1])
        yield from tables

    reading = Reading(index(config), config)
    with pytest.raises(RuntimeError, match="reading the dataset"):
        list(reading.tables(run))


def test_progress_counts_images(tmp_path):
    config = DataConfig(format="cityscapes", root=str(write_cityscapes(tmp_path)))
    seen = []
    list(Reading(index(config), config).tables(in_threads, lambda done, total: seen.append((done, total))))
    assert seen == [(8, 12), (12, 12)]


def test_the_extra_pool_of_a_coco_folder(tmp_path):
    root = _coco(tmp_path)
    with pytest.raises(ValueError, match=r"no extra unlabelled images .*data\.extra_annotations"):
        _load(root, unlabelled_pool="both")
    (root / "unlabeled2017/sub").mkdir(parents=True)
    rng = np.random.default_rng(3)
    for name in ("u1.jpg", "sub/u2.png"):
        random_image(rng, 10, 12).save(root / "unlabeled2017" / name)
    (root / "unlabeled2017/notes.txt").write_text("")
    dataset, _ = _load(root, unlabelled_pool="both")
    assert [(r["image_id"], r["height"], r["width"], r["instances"]) for r in dataset.extra.to_pylist()] == [
        ('"sub/u2.png"', 10, 12, None),
        ('"u1.jpg"', 10, 12, None),
    ]
    (root / "annotations").mkdir()
    info = {"images": [{"id": 900, "file_name": "u1.jpg", "height": 10, "width": 12}], "info": {}, "categories": []}
    (root / "annotations/image_info_unlabeled2017.json").write_text(json.dumps(info))
    listed, _ = _load(root, unlabelled_pool="extra")
    assert listed.extra.column("image_id").to_pylist() == ["900"] and listed.content_hash == dataset.content_hash
    own, _ = _load(root, unlabelled_pool="extra", extra_image_dir="unlabeled2017/sub")
    assert own.extra.column("image_id").to_pylist() == ['"u2.png"']
    # training and validation images are no unlabelled ones
    everything, _ = _load(root, unlabelled_pool="extra", extra_image_dir=str(root))
    assert len(everything.extra) == 2


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("return config", "expected a DatasetIndex back, got DataConfig$"),
        ("return None", "expected a DatasetIndex back, got NoneType$"),
        ("return DatasetIndex({}, (), None)", "no split train and val in its DatasetIndex$"),
        ("return config.predictions", r"the reader failed: AttributeError: .*own_reader\.py, line 5|main\.py, line"),
        ("raise ValueError('data.root: no such folder')", "^data.root: no such folder$"),
    ],
)
def test_a_reader_of_ones_own_that_is_none(tmp_path, monkeypatch, code, message):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_reader", raising=False)
    lines = ["from cast_ray.data.reading.index import DatasetIndex", "", "", "def index(config, progress=None):"]
    (tmp_path / "own_reader.py").write_text("\n".join([*lines, f"    {code}", ""]))
    with pytest.raises(ValueError, match=message) as error:
        load(DataConfig(format="own_reader:index", root=str(tmp_path)))
    assert "\n" not in str(error.value)
    for name in ("os:getcwd", "os:nothing"):
        with pytest.raises(ValueError, match=f"^data.format: '{name}': expected "):
            load(DataConfig(format=name, root=str(tmp_path)))
