"""A sweep's dataset: read once, found again while nothing changes, refused in one line, its splits chosen ahead."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_folders import object_maps, polygon_of, write_cityscapes, write_mask_files, write_yolo, yolo_line
from PIL import Image, ImageOps
from rich.console import Console

from cast_ray.data.reading.reader import in_threads, load
from cast_ray.plan.graph import DataHashes, split_part
from cast_ray.recipe import Recipe, build_recipe
from cast_ray.runtime.data import dataset as dataset_module
from cast_ray.runtime.data.dataset import StoredDataset, read_dataset
from cast_ray.runtime.data.splits import store_splits, stored_split
from cast_ray.runtime.store.artifacts import ArtifactStore


class Reader:
    """`read_dataset` on one storage path; counts the images it really reads."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.store = ArtifactStore(str(folder / "storage"))
        self.folder = folder
        self.num_read = 0
        monkeypatch.setattr(dataset_module, "in_threads", self.count)

    def count(self, make: Any, blocks: Any) -> Any:
        self.num_read += sum(block.num_rows for block in blocks)
        return in_threads(make, blocks)

    def recipes(self, *rows: dict[str, Any], root: str = "data") -> list[Recipe]:
        base = {"data.root": str(self.folder / root)}
        return [build_recipe("cityscapes", "smoke", base | row) for row in rows or ({},)]

    def __call__(self, *rows: dict[str, Any], root: str = "data") -> StoredDataset:
        self.output = io.StringIO()
        console = Console(file=self.output, width=200)
        return read_dataset(self.recipes(*rows, root=root), self.store, console, ["runs/test"], self.no_ray)

    def no_ray(self) -> Any:
        raise AssertionError("Ray was asked for a handful of images")

    def report(self) -> dict[str, Any]:
        return json.loads(self.store.find_bytes("runs/test/data_report.json") or b"null")


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    write_cityscapes(tmp_path / "data", num_extra=3)
    return Reader(tmp_path, monkeypatch)


def test_the_store_holds_what_load_reads(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "IMAGES_PER_PART", 3)
    found = reader({"data.unlabelled_pool": "both"})
    whole, report = load(reader.recipes({"data.unlabelled_pool": "both"})[0].data)
    assert found.num_images == {"train": 8, "val": 4, "extra": 3} and not found.has_source
    assert (found.content_hash, found.extra_hash) == (whole.content_hash, whole.extra_hash)
    assert found.categories == whole.categories and found.report == report == reader.report()
    for name in ("train", "val", "extra"):
        stored = reader.store.read_table(found.key, f"{name}.parquet")
        assert stored.equals(getattr(whole, name)), name
    facts = found.facts()
    assert (facts.num_train, facts.num_val, facts.num_source, facts.num_extra) == (8, 4, 0, 3)
    assert facts.skipped == 0 and facts.classes[0] == "person"


def test_it_is_read_once(reader: Reader) -> None:
    first = reader()
    assert reader.num_read == 12
    again = reader({"data.label_fraction": "0.5"}, {"data.image_px": "[32, 64]"})
    assert reader.num_read == 12 and again == first
    assert reader({"data.verify": "none"}).content_hash != first.content_hash
    assert reader.num_read == 24  # another promise about the same files
    assert reader({"data.unlabelled_pool": "extra"}).content_hash == first.content_hash
    assert reader.num_read == 24 + 15


def test_it_is_read_again_when_a_file_changes(reader: Reader) -> None:
    first = reader()
    path = next((reader.folder / "data/gtFine/train/ulm").glob("*_instanceIds.png"))
    content = path.read_bytes()
    path.write_bytes(content)
    second = reader()
    assert reader.num_read == 24 and second.key != first.key and second.content_hash == first.content_hash
    path.unlink()
    third = reader({"data.max_bad_fraction": "0.5"})
    assert third.num_images["train"] == 7 and third.content_hash != first.content_hash
    path.write_bytes(content)
    write_cityscapes(reader.folder / "data", num_train=10)
    assert reader().num_images["train"] == 10


def test_pixels_that_change_behind_the_same_size_and_time_are_seen(reader: Reader) -> None:
    """As rsync -t and cp -p leave a file: as many bytes, and written when the old one was."""
    folder = reader.folder / "data"
    for path in folder.rglob("*_leftImg8bit.png"):
        path.rename(bmp := path.with_suffix(".bmp"))
        with Image.open(bmp) as image:
            image.save(bmp)
    first = reader()
    path = next((folder / "leftImg8bit/val/lindau").iterdir())
    status = path.stat()
    with Image.open(path) as image:
        ImageOps.invert(image).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    second = reader()
    assert reader.num_read == 24 and second.content_hash != first.content_hash


def test_label_files_and_mask_files_that_change_are_seen(tmp_path: Path) -> None:
    console, store = Console(file=io.StringIO()), ArtifactStore(str(tmp_path / "storage"))
    masks = write_mask_files(tmp_path / "masks", object_maps(4))
    line = yolo_line(0, polygon_of(2, 3, 10, 12))
    yolo = write_yolo(tmp_path / "yolo", {f"a{i}": line for i in range(4)})
    (yolo / "data.yaml").write_text("train: images/train\nnames: [cat]\n")
    changed = {"mask_files": next((masks / "cell0/masks").iterdir()), "yolo": yolo / "labels/train/a0.txt"}
    for kind, root in (("mask_files", masks), ("yolo", yolo)):
        recipe = build_recipe("coco", "full", {"data.root": str(root), "data.format": kind})

        def read(recipe: Recipe = recipe) -> str:
            return read_dataset([recipe], store, console, ["runs/a"], pytest.fail).key

        key = read()
        assert read() == key
        changed[kind].unlink()
        assert read() != key


def test_a_copy_elsewhere_is_the_same_dataset_in_another_place(reader: Reader) -> None:
    first = reader()
    (reader.folder / "data").rename(reader.folder / "moved")
    second = reader(root="moved")
    assert second.content_hash == first.content_hash and second.key != first.key
    uris = reader.store.read_table(second.key, "train.parquet", columns=["uri"]).column("uri").to_pylist()
    assert all(str(reader.folder / "moved") in uri for uri in uris)
    with pytest.raises(ValueError, match=r"data\.root: .*data does not exist"):
        reader()


def test_a_refused_dataset_leaves_its_report(reader: Reader) -> None:
    for path in list((reader.folder / "data/leftImg8bit/train/ulm").iterdir())[:2]:
        path.write_bytes(path.read_bytes()[:-50])
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"\(train: gtFine/train\): 2 of 8 images skipped, above data\.max_bad_fraction"
        ) as error:
            reader()
        assert "\n" not in str(error.value) and "runs/test/data_report.json)" in str(error.value)
    assert reader.report()["statement"] == "2 of 12 images and 0 of 50 annotations skipped"
    assert {s["reason"].split(" (")[0] for s in reader.report()["skipped"]} == {"cannot be decoded"}

    assert reader.num_read == 12
    accepted = reader({"data.max_bad_fraction": "0.25"})
    assert accepted.num_images["train"] == 6 and accepted.facts().skipped == 2
    assert "2 of 12 images and 0 of 50 annotations skipped (data_report.json), first: image" in reader.output.getvalue()
    assert reader.num_read == 12  # another limit needs no other read


def test_one_dataset_for_all_rows(reader: Reader) -> None:
    with pytest.raises(ValueError, match=r"data\.verify is 'full' in one row and 'header' in another: expected one"):
        reader({}, {"data.verify": "header"})
    assert reader({}, {"data.unlabelled_pool": "both"}).num_images["extra"] == 3


def test_drawn_scenes_are_drawn_and_not_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"data.shapes.num_source": 8, "data.shapes.num_train": 12, "data.shapes.num_val": 4}
    reader = Reader(tmp_path, monkeypatch)
    recipe = build_recipe("shapes", "smoke", sizes)
    found = read_dataset([recipe], reader.store, Console(file=io.StringIO()), ["runs/test"], reader.no_ray)
    assert found.num_images == {"train": 12, "val": 4, "source": 8} and found.has_source and reader.num_read == 0


def part(recipe: Recipe, dataset: StoredDataset, unlabelled: bool) -> dict[str, Any]:
    return split_part(recipe, dataset.hashes(recipe.data), unlabelled=unlabelled)


def test_a_field_at_its_default_does_not_make_a_stored_dataset_be_read_again(tmp_path: Path) -> None:
    recipe = build_recipe("coco", "full", {"data.root": str(tmp_path)})
    part = dataset_module._read_part(recipe.data)
    assert "crowds" not in part and {"format", "root", "verify", "max_image_pixels", "val_fraction"} <= part.keys()
    other = dataset_module._read_part(recipe.data.model_copy(update={"crowds": "objects"}))
    assert other == part | {"crowds": "objects"}


def test_splits_are_stored_for_every_recipe(reader: Reader) -> None:
    rows = [{"data.label_fraction": "0.25"}, {"data.label_fraction": "0.5", "data.unlabelled_pool": "both"}]
    recipes, dataset = reader.recipes(*rows), reader(*rows)
    store_splits(dataset, recipes, reader.store)
    for recipe, labelled, unlabelled in ((recipes[0], 2, 6), (recipes[1], 4, 7)):
        chosen = stored_split(reader.store, dataset.content_hash, part(recipe, dataset, True))
        assert (len(chosen.labelled), len(chosen.unlabelled)) == (labelled, unlabelled)
        assert chosen.facts["num_labelled"] == labelled and chosen.facts["family"] == "nested"
        alone = stored_split(reader.store, dataset.content_hash, part(recipe, dataset, False))
        assert len(alone.unlabelled) == 0
        np.testing.assert_array_equal(alone.labelled, chosen.labelled)
    assert chosen.unlabelled.max() >= 8 and chosen.facts["num_extra"] == 3


def test_splits_of_classes_and_lists(reader: Reader) -> None:
    (reader.folder / "list.txt").write_text("aachen_000004_000019_gtFine_instanceIds.png\n")
    rows = [
        {"data.label_family": "per-class", "data.label_fraction": "0.5", "data.min_per_class": "4"},
        {"data.label_family": "list", "data.label_list": str(reader.folder / "list.txt")},
    ]
    recipes, dataset = reader.recipes(*rows), reader(*rows)
    store_splits(dataset, recipes, reader.store)
    classes, listed = (stored_split(reader.store, dataset.content_hash, part(r, dataset, True)) for r in recipes)
    assert len(classes.labelled) == 4 and classes.facts["min_per_class"] == 4
    ids = reader.store.read_table(dataset.key, "train.parquet").column("image_id").take(listed.labelled).to_pylist()
    assert ids == ['"aachen_000004_000019"']
    assert dataset.hashes(recipes[1].data) == DataHashes(label_list=listed.facts["label_list_sha256"])


def test_a_pool_of_known_images_is_told_and_leaves_none(reader: Reader) -> None:
    shutil.copytree(reader.folder / "data/leftImg8bit", reader.folder / "copies")
    row = {"data.extra_image_dir": str(reader.folder / "copies"), "data.unlabelled_pool": "extra"}
    dataset = reader(row)
    note = "12 of 15 images of the extra pool are training or validation images (the same bytes; the first: "
    assert dataset.num_images["extra"] == 3 and note in reader.output.getvalue()
    assert dataset.facts().notes[0].startswith(note) and reader.report()["copies"]["pool_left_out"] == 12
    store_splits(dataset, reader.recipes(row), reader.store)
    shutil.rmtree(reader.folder / "copies/train_extra")
    with pytest.raises(ValueError, match="leaves 0 unlabelled images: expected at least 1 per worker"):
        store_splits(reader(row), reader.recipes(row), reader.store)


def test_training_images_that_are_copies_leave_the_unlabelled(reader: Reader) -> None:
    images, maps = reader.folder / "data/leftImg8bit/", reader.folder / "data/gtFine"
    frame = "lindau/lindau_000000_000019"
    shutil.copyfile(images / f"val/{frame}_leftImg8bit.png", images / "train/ulm/ulm_000001_000019_leftImg8bit.png")
    shutil.copyfile(
        maps / f"val/{frame}_gtFine_instanceIds.png", maps / "train/ulm/ulm_000001_000019_gtFine_instanceIds.png"
    )
    row = {"data.label_fraction": "0.25"}
    dataset = reader(row)
    assert len(dataset.warnings) == 1 and dataset.warnings[0].startswith(
        "1 of 4 validation images are training images too (the same bytes; the first: "
    )
    store_splits(dataset, reader.recipes(row), reader.store)
    chosen = stored_split(reader.store, dataset.content_hash, part(reader.recipes(row)[0], dataset, True))
    assert (len(chosen.labelled), len(chosen.unlabelled), chosen.facts["num_copies"]) == (2, 5, 1)
    alone = stored_split(reader.store, dataset.content_hash, part(reader.recipes(row)[0], dataset, False))
    assert "num_copies" not in alone.facts

    for kind in ("leftImg8bit", "gtFine"):  # training and validation images are the same
        shutil.rmtree(reader.folder / f"data/{kind}/val")
        (reader.folder / f"data/{kind}/val").symlink_to("train")
    for fields in ({}, {"data.verify": "none"}):
        dataset = reader(row | fields)
        assert dataset.warnings[0].startswith("8 of 8 validation images are training images too")
        with pytest.raises(
            ValueError, match=r"leaves 0 unlabelled images \(6 more are copies of labelled or validation"
        ):
            store_splits(dataset, reader.recipes(row | fields), reader.store)
        supervised = row | fields | {"loss.lambda_semi": "0", "loss.lambda_pxl": "0"}
        store_splits(dataset, reader.recipes(supervised), reader.store)


def test_too_few_images_are_refused(reader: Reader) -> None:
    for row, message in (
        ({"data.label_fraction": "0.01"}, "gives 0 labelled images: expected at least 1 per worker"),
        ({"data.label_fraction": "1"}, r"leaves 0 unlabelled images: .* or data\.unlabelled_pool=both"),
        ({"data.label_family": "list", "data.label_list": "none.txt"}, "none.txt: cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            store_splits(reader(row), reader.recipes(row), reader.store)
    everything = {"data.label_fraction": "1", "data.unlabelled_pool": "both"}
    store_splits(reader(everything), reader.recipes(everything), reader.store)
    supervised = {"data.label_fraction": "1", "loss.lambda_semi": "0", "loss.lambda_pxl": "0"}
    store_splits(reader(supervised), reader.recipes(supervised), reader.store)
