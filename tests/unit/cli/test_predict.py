"""The command that runs a student over images, in one process."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from evaluation_scenes import coco_document, referee, referee_numbers
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from s3_server import S3Server

from cast_ray.cli import images as images_module
from cast_ray.cli import predict
from cast_ray.cli.options import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED
from cast_ray.common.paths import below, read_bytes, write_bytes
from cast_ray.contracts.records import RECORD_SCHEMA, Category, encode_image_id
from cast_ray.data.views import fit_image
from cast_ray.evaluation.coco_ap import mask_ap
from cast_ray.models.segmenter import build_segmenter
from cast_ray.models.student import Student
from cast_ray.recipe import EncoderConfig, ModelConfig
from cast_ray.runtime.store.artifacts import ArtifactStore

CATEGORIES = [Category(5, "disc"), Category(9, "bar")]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig(
        encoder=EncoderConfig(name="conv", widths=(8, 8, 16, 16), stem_stride=2),
        hidden_dim=16,
        num_queries=5,
        num_layers=1,
        feedforward_dim=16,
    )
    folder = tmp_path_factory.mktemp("student")
    Student(build_segmenter(config, 2, 0), CATEGORIES, (32, 48)).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four images of different size and mode, and two files that are none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size, mode in (
        ("a.png", (40, 60), "RGB"),
        ("b.jpg", (128, 64), "L"),
        ("more/c.png", (20, 20), "RGBA"),
        ("more/d.bmp", (33, 97), "RGB"),
    ):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not a photo")
    (folder / "empty.png").write_bytes(b"")
    return folder


def run(*arguments: object) -> int:
    return predict.main([str(a) for a in arguments])


def test_a_folder_of_photos(student: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(photos, "--student", student, "--out", out, "--threshold", 0, "--batch", 2) == 0
    written = capsys.readouterr()
    assert "4 of 6 images" in written.out
    assert f"skipped {photos}/broken.jpg" in written.err and f"skipped {photos}/empty.png: " in written.err

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(out / "images.json"))
        results = truth.loadRes(str(out / "results.json"))
    assert [c["name"] for c in truth.loadCats([5, 9])] == ["disc", "bar"]
    by_name = {Path(i["file_name"]).name: i for i in truth.dataset["images"]}
    assert by_name.keys() == {"a.png", "b.jpg", "c.png", "d.bmp"}
    assert f"file names in images.json are relative to {photos}\n" in written.out
    # Other tools open the one file: it holds the results as annotations, with what they ask of an annotation.
    listed = json.loads((out / "results.json").read_text())
    assert [{name: a[name] for name in listed[0]} for a in truth.dataset["annotations"]] == listed
    assert [a["id"] for a in truth.dataset["annotations"]] == list(range(1, len(listed) + 1))
    for a in truth.dataset["annotations"]:
        assert a["area"] == coco_mask.area(a["segmentation"]) and a["iscrowd"] == 0
        assert a["bbox"] == coco_mask.toBbox(a["segmentation"]).tolist()
    model = Student.from_pretrained(student)
    for name, entry in by_name.items():
        image = np.array(Image.open(photos / entry["file_name"]).convert("RGB"))
        assert (entry["height"], entry["width"]) == image.shape[:2]
        pixels, inside = fit_image(image, (32, 48))
        (wanted,) = model.predict(torch.from_numpy(pixels)[None], [image.shape[:2]], [inside])
        found = sorted(results.imgToAnns[entry["id"]], key=lambda r: -r["score"])
        assert len(found) == len(wanted) > 0
        assert [r["score"] for r in found] == pytest.approx([i["score"] for i in wanted], rel=1e-4)
        assert {r["category_id"] for r in found} <= {5, 9}
        assert all(coco_mask.area(r["segmentation"]) > 0 for r in found)
        overlay = out / "overlays" / Path(entry["file_name"]).with_suffix(".png")
        drawn = np.asarray(Image.open(overlay))
        assert drawn.shape == image.shape and (drawn != image).any(), name


def test_ap_by_size_of_the_results_file_is_ours(student: Path, photos: Path, tmp_path: Path) -> None:
    """Other tools that read `results.json` sort its detections by the same sizes as our own evaluation."""
    out = tmp_path / "out"
    assert run(photos, "--student", student, "--out", out, "--threshold", 0, "--no-overlays") == 0
    document, results = (json.loads((out / name).read_text()) for name in ("images.json", "results.json"))
    assert all(result.keys() == {"image_id", "category_id", "segmentation", "score"} for result in results)
    records = []
    for image in document["images"]:
        # Every second mask is an object, seen through a shift: what is left over is a false alarm of some size.
        found = [r for r in results if r["image_id"] == image["id"]][::2]
        masks = [np.roll(coco_mask.decode(r["segmentation"]), 1, 0) for r in found]
        rles = [coco_mask.encode(np.asfortranarray(mask))["counts"] for mask in masks]
        truth = [
            {"category_id": r["category_id"], "rle": rle, "score": 1.0, "is_crowd": False}
            for r, rle in zip(found, rles)
        ]
        records.append(image | {"image_id": encode_image_id(image["id"]), "uri": "", "instances": truth})
    ground_truth = pa.Table.from_pylist(records, schema=RECORD_SCHEMA)
    ours = mask_ap(ground_truth, results, CATEGORIES)
    wanted = referee_numbers(referee(coco_document(ground_truth, CATEGORIES), results))
    assert {name: ours[name] for name in wanted} == wanted
    boxes = [r | {"bbox": list(coco_mask.toBbox(r["segmentation"]))} for r in results]
    with_boxes = referee_numbers(referee(coco_document(ground_truth, CATEGORIES), boxes))
    assert with_boxes["ap_small"] != wanted["ap_small"]  # the scene would show it


def test_batches_change_nothing(student: Path, photos: Path, tmp_path: Path) -> None:
    for batch in (1, 4):
        run(photos, "--student", student, "--out", tmp_path / str(batch), "--threshold", 0, "--batch", batch)
    one, four = (json.loads((tmp_path / b / "results.json").read_text()) for b in ("1", "4"))
    assert [r["score"] for r in one] == pytest.approx([r["score"] for r in four], abs=2e-5)


def test_threshold_and_limit(student: Path, photos: Path, tmp_path: Path) -> None:
    options = ("--student", student, "--out", tmp_path / "out", "--no-overlays")
    run(photos / "a.png", *options, "--threshold", 0, "--max-detections", 3)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results) == 3 and not (tmp_path / "out" / "overlays").exists()
    least = sorted(r["score"] for r in results)[1]
    run(photos / "a.png", *options, "--threshold", least - 1e-4, "--max-detections", 3)
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())) == 2
    run(photos / "a.png", *options, "--threshold", 1)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == []


def test_half_precision(student: Path, photos: Path, tmp_path: Path) -> None:
    for amp in ("off", "bf16"):
        run(photos, "--student", student, "--out", tmp_path / amp, "--threshold", 0, "--amp", amp)
    full, half = (json.loads((tmp_path / amp / "results.json").read_text()) for amp in ("off", "bf16"))
    assert len(half) > 0
    assert max(r["score"] for r in half) == pytest.approx(max(r["score"] for r in full), abs=0.05)


def test_only_bad_images(student: Path, photos: Path, tmp_path: Path) -> None:
    assert run(photos / "broken.jpg", "--student", student, "--out", tmp_path / "out") == EXIT_FAILED
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == []


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"images": "gone"}, "no image in 'gone'"),
        ({"--student": "/gone"}, "no saved student in '/gone'"),
        ({"--device": "cuda:9"}, "no GPU here"),
    ],
)
def test_mistakes_are_one_line(
    student: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, part: str
) -> None:
    if "--device" in change and torch.cuda.is_available():
        return
    arguments = {"images": photos, "--student": student, "--out": tmp_path / "out"} | change
    images = arguments.pop("images")
    assert run(images, *(v for pair in arguments.items() for v in pair)) == EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and part in line


def test_what_an_earlier_run_drew_is_not_read(
    student: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = photos / "found"
    assert run(photos / "a.png", photos / "b.jpg", "--student", student, "--out", before, "--threshold", 0) == 0
    assert sorted(path.name for path in (before / "overlays").iterdir()) == ["a.png", "b.png"]
    capsys.readouterr()
    assert run(photos, "--student", student, "--out", tmp_path / "new", "--threshold", 0) == 0
    written = capsys.readouterr()
    assert "4 of 6 images" in written.out and "folders of drawn results (overlays): 1" in written.err


def test_a_picture_that_must_be_converted_is_said_with_its_path_once(
    student: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("raw.HEIC", b"x"), ("b.heic", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic"), ("c.svg", b"<svg/>")):
        (photos / name).write_bytes(content)
        assert run(photos / name, "--student", student, "--out", tmp_path / "out") == EXIT_FAILED
        error = capsys.readouterr().err
        assert error.count(str(photos / name)) == 1, error
        assert f"skipped {photos / name}: " in error and error.rstrip().endswith(": convert it to JPEG or PNG")


def test_markup_in_names_of_classes_and_files_is_text(
    student: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "[red]:car:.jpg").write_bytes(b"x")
    options = ("--student", student, "--out", tmp_path / "[/red]", "--threshold", 0)
    assert run(photos / "[red]:car:.jpg", *options) == EXIT_FAILED
    assert f"skipped {photos}/[red]:car:.jpg: not an image" in capsys.readouterr().err
    assert run(photos / "a.png", *options) == 0
    assert f"results in {tmp_path}/[/red]" in capsys.readouterr().out


def test_what_is_left_out_of_a_folder_is_said(
    student: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "raw.heic").write_bytes(b"x")
    (photos / "._a.png").write_bytes(b"x")
    (photos / "again").symlink_to(photos)
    out = tmp_path / "out"
    assert predict.main([str(photos), "--student", str(student), "--out", str(out), "--no-overlays"]) == 0
    written = capsys.readouterr()
    assert "left out: .heic: 1 (cannot be read: convert to JPEG or PNG), hidden files: 1\n" in written.err
    images = json.loads((out / "images.json").read_text())["images"]
    assert not any("again" in image["file_name"] for image in images)


def test_results_go_to_an_object_store(
    student: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with S3Server() as server:
        place = server.uri("found")
        options = ("--student", student, "--out", place, "--threshold", 0)
        monkeypatch.setattr(images_module, "write_overlay", Mock(side_effect=[None, KeyboardInterrupt]))
        assert run(photos, *options) == EXIT_INTERRUPTED
        (copy,) = tmp_path.glob("cast_ray-results-*")
        assert (copy / "unfinished.jsonl").is_file() and ArtifactStore(place).list_names("") == []
        monkeypatch.undo()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        for is_resumed in (True, False):  # the second time its own results are replaced
            capsys.readouterr()
            assert run(photos, *options) == 0
            written = capsys.readouterr()
            assert f"4 of 6 images; results in {place}" in written.out
            assert ("resumed: 1 of 6 images" in written.err) is is_resumed
            assert not list(tmp_path.glob("cast_ray-results-*"))
        assert sorted(ArtifactStore(place).list_names("")) == ["images.json", "overlays", "results.json"]
        images = json.loads(read_bytes(below(place, "images.json")))["images"]
        assert [image["file_name"] for image in images] == ["a.png", "b.jpg", "more/c.png", "more/d.bmp"]
        foreign = server.uri("foreign")
        write_bytes(below(foreign, "overlays", "a.png"), b"mine")
        assert run(photos, "--student", student, "--out", foreign) == EXIT_BAD_INPUT
        assert f"error: {foreign} holds overlays of something else" in capsys.readouterr().err
