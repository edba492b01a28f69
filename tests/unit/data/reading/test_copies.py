"""Images that a dataset holds twice: D_u has no validation image and no labelled one, and the user is told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from coco_folders import valid_document, write_coco
from dataset_folders import random_image, write_ade20k, write_cityscapes
from PIL import Image, ImageOps

from cast_ray.contracts.records import RECORD_SCHEMA, DatasetSplits
from cast_ray.data.reading.copies import Copies, identity_of
from cast_ray.data.reading.reader import load
from cast_ray.data.splits.fractions import label_index, mark_copies, split
from cast_ray.recipe import DataConfig


def write_noise(root: Path) -> Path:
    """A COCO folder of eight images that are all different."""
    return write_coco(root, valid_document(8))


WRITERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "coco": (write_noise, "images"),
    "cityscapes": (write_cityscapes, "leftImg8bit"),
    "ade20k": (write_ade20k, "images"),
}
"""Format -> how a folder of it is written, and where its images are."""


def read(format: str, root: Path, **fields: Any) -> tuple[DatasetSplits, dict[str, Any]]:
    return load(DataConfig(format=format, root=str(root), **fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("verify", ["full", "header", "none"])
@pytest.mark.parametrize("how", ["the folder itself", "linked folder", "linked files", "copied"])
def test_known_images_leave_the_pool(tmp_path: Path, format: str, verify: str, how: str) -> None:
    write, images = WRITERS[format]
    root, pool = write(tmp_path / "data"), tmp_path / "pool"
    if how == "the folder itself":
        pool = root / images
    elif how == "linked folder":
        pool.symlink_to(root / images)
    elif how == "copied":
        shutil.copytree(root / images, pool)
    else:
        pool.mkdir()
        for number, path in enumerate(p for p in (root / images).rglob("*.*g") if p.is_file()):
            (pool / f"{number}{path.suffix}").symlink_to(path)
    own = pool / "new.png"
    random_image(np.random.default_rng(99)).save(own)
    dataset, report = read(format, root, unlabelled_pool="extra", extra_image_dir=str(pool), verify=verify)
    known = dataset.train.num_rows + dataset.val.num_rows
    if how == "copied" and verify != "full":  # and the report says that it cannot know
        assert dataset.extra.num_rows == known + 1 and report["copies"]["pool_left_out"] == 0
        assert f"data.verify={verify}: " in report["notes"][0] and "copies under other names" in report["notes"][0]
        return
    assert dataset.extra.column("uri").to_pylist() == [str(own)]
    assert report["copies"] == {"pool_left_out": known, "val_in_train": 0, "train_repeated": 0}
    same = "the same bytes" if verify == "full" else "the same file"
    assert report["notes"][0].startswith(
        f"{known} of {known + 1} images of the extra pool are training or validation images ({same}; the first: "
    )
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copyfile(own, alone / "new.png")
    again, _ = read(format, root, unlabelled_pool="extra", extra_image_dir=str(alone), verify=verify)
    assert again.extra_hash == dataset.extra_hash and again.content_hash == dataset.content_hash


def test_validation_images_that_are_trained_on_are_told(tmp_path: Path) -> None:
    root = write_noise(tmp_path)
    assert read("coco", root)[1]["warnings"] == []
    shutil.copyfile(root / "instances.json", root / "val.json")
    for verify, same in (("full", "the same bytes"), ("none", "the same file")):
        dataset, report = read("coco", root, annotations="instances.json", val_annotations="val.json", verify=verify)
        assert (dataset.train.num_rows, dataset.val.num_rows, report["copies"]["val_in_train"]) == (8, 8, 8)
        assert report["warnings"] == [
            f"8 of 8 validation images are training images too ({same}; the first: {root}/images/0.png = "
            f"{root}/images/0.png): their AP shows what was memorised. D_u leaves them out, D_l may hold them: take "
            "them out of one of the splits."
        ]


def test_links_between_training_images_are_part_of_the_hash(tmp_path: Path) -> None:
    """Which images D_u leaves out depends on them, and with `verify=none` nothing else in the hash tells."""
    root = write_noise(tmp_path)
    (root / "images/3.png").write_bytes(content := (root / "images/2.png").read_bytes())
    copied = read("coco", root, verify="none")[0]
    (root / "images/3.png").unlink()
    (root / "images/3.png").symlink_to("2.png")
    linked, report = read("coco", root, verify="none")
    assert copied.content_hash != linked.content_hash
    assert report["copies"]["train_repeated"] == 1 and "images repeat another one (the same file)" in report["notes"][0]
    (root / "images/3.png").unlink()
    (root / "images/3.png").write_bytes(content)
    assert read("coco", root)[1]["copies"]["train_repeated"] == 1


def records(count: int) -> pa.Table:
    rows = [{"image_id": str(i), "uri": f"{i}.png", "height": 4, "width": 4, "instances": []} for i in range(count)]
    return label_index(pa.Table.from_pylist(rows, schema=RECORD_SCHEMA))


@pytest.mark.parametrize("pool", ["rest", "extra", "both"])
def test_no_copy_of_a_labelled_or_validation_image_is_unlabelled(pool: str) -> None:
    from cast_ray.data.splits.fractions import LabelSource

    config = DataConfig(label_fraction=0.1, unlabelled_pool=pool)  # type: ignore[arg-type]
    source = LabelSource(extra_ids=[f"x{i}" for i in range(10)])
    plain = split(records(100), config, 0, source)
    first, second = plain.labelled[:2].tolist()
    rest = [row for row in range(100) if row not in plain.labelled.tolist()]
    same_as, in_val = np.arange(100), np.zeros(100, dtype=bool)
    same_as[rest[:3]] = first
    same_as[second] = rest[3]  # the copy comes first in the file
    same_as[rest[5]] = rest[4]  # both unlabelled: they stay
    in_val[[rest[6], first]] = True
    marked = split(mark_copies(records(100), same_as, in_val), config, 0, source)
    np.testing.assert_array_equal(marked.labelled, plain.labelled)
    gone = {rest[i] for i in (0, 1, 2, 3, 6)} if pool != "extra" else set()
    assert marked.unlabelled.tolist() == [row for row in plain.unlabelled.tolist() if row not in gone]
    assert marked.facts == plain.facts | {"num_unlabelled": len(marked.unlabelled)} | (
        {"num_copies": 5} if gone else {}
    )


def test_what_copies_know() -> None:
    one, two, three = (identity_of(bytes([i]) * 32, "") for i in range(3))
    copies = Copies(by_content=True)
    assert copies.add("train", [one, two, one], ["a", "b", "c"]).all() and copies.add("train", [two], ["d"]).all()
    assert copies.add("val", [three, two], ["e", "f"]).all()
    assert copies.add("extra", [three, b"new", one], ["g", "h", "i"]).tolist() == [False, True, False]
    assert copies.same_as.tolist() == [0, 1, 0, 1] and copies.in_val.tolist() == [False, True, False, True]
    assert copies.counts() == {"pool_left_out": 2, "val_in_train": 1, "train_repeated": 2}
    assert copies.digest() and not Copies(by_content=True).digest()
    assert identity_of(b"", "/a") != identity_of(b"", "/b") and len(one) == len(identity_of(b"", "/a"))


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".ppm"])
def test_changed_pixels_change_the_hash(tmp_path: Path, suffix: str) -> None:
    """Formats without compression keep their size whatever the pixels are."""
    root = write_noise(tmp_path / "data")
    document = valid_document(8)
    for entry in document["images"]:
        path = root / "images" / entry["file_name"]
        entry["file_name"] = f"{entry['id']}{suffix}"
        with Image.open(path) as image:
            image.save(path.with_suffix(suffix))
        path.unlink()
    write = {"document": document, "json_name": "instances.json", "image_dir": "nowhere"}
    write_coco(root, **write)
    shutil.rmtree(root / "nowhere")
    pool = tmp_path / "pool"
    pool.mkdir()
    random_image(np.random.default_rng(9)).save(pool / f"x{suffix}")
    fields = {"unlabelled_pool": "extra", "extra_image_dir": str(pool)}
    before = {verify: read("coco", root, verify=verify, **fields) for verify in ("full", "header", "none")}
    sizes = {}
    for path in (root / f"images/0{suffix}", pool / f"x{suffix}"):
        sizes[path] = path.stat().st_size
        with Image.open(path) as image:
            ImageOps.invert(image).save(path)
        assert path.stat().st_size == sizes[path]
    for verify, (dataset, report) in before.items():
        after, _ = read("coco", root, verify=verify, **fields)
        seen = verify == "full"
        assert (after.content_hash != dataset.content_hash) == (after.extra_hash != dataset.extra_hash) == seen
        assert any("a file rewritten with as many bytes" in note for note in report["notes"]) == (not seen)
