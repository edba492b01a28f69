"""The command that labels a folder with a teacher, in one process."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from teacher_scenes import CATEGORIES
from tiny_checkpoints import write_detector, write_mask_transformer, write_sam2
from tiny_students import make_student

from cast_ray.cli import label
from cast_ray.cli.options import EXIT_BAD_INPUT, EXIT_FAILED
from cast_ray.contracts.held_precision import HeldPrecision
from cast_ray.contracts.records import Category
from cast_ray.contracts.row_result import RowResult, StageRecord
from cast_ray.data.reading.reader import load
from cast_ray.evaluation.matches import DetectionMatches
from cast_ray.inference.calibration import find_calibration
from cast_ray.models.segmenter import build_segmenter
from cast_ray.models.student import Student
from cast_ray.recipe import DataConfig, EncoderConfig, ModelConfig, TeacherConfig
from cast_ray.runtime.store.artifact_files import CALIBRATION
from cast_ray.teachers.grounded_sam import DETECTOR, SEGMENTER, GroundedSamTeacher
from cast_ray.teachers.protocol import save_teacher


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("checkpoints")
    write_detector(home / "detector", "mm", ("person", "traffic", "light", "dog"))
    write_sam2(home / "segmenter")
    write_mask_transformer(home / "m2f", "mask2former", ("person", "sky", "dog"))
    return home


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images of different size and mode, and a file that is none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size, mode in (("a.png", (40, 60), "RGB"), ("b.jpg", (64, 50), "L"), ("more/c.png", (20, 20), "RGBA")):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not a photo")
    return folder


def grounded(checkpoints: Path) -> list[str]:
    parts = [f"teacher.grounded_sam.{part}={checkpoints / part}" for part in ("detector", "segmenter")]
    return ["--teacher", "grounded_sam", *(a for p in [*parts, "teacher.image_px=[64,64]"] for a in ("--set", p))]


def run(*arguments: object) -> int:
    return label.main([str(a) for a in arguments])


def test_a_folder_becomes_a_coco_dataset(
    checkpoints: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ("--classes", "person, traffic light", "--threshold", 0, "--batch", 2, "--set", "pseudo.min_area_px=1")
    assert run(photos, *grounded(checkpoints), *options, "--out", out) == 0
    written = capsys.readouterr()
    assert "3 of 4 images, " in written.out and f"skipped {photos}/broken.jpg" in written.err
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(out / "instances.json"))
    assert [c["name"] for c in coco.loadCats([1, 2])] == ["person", "traffic light"]
    assert {i["file_name"] for i in coco.dataset["images"]} == {"a.png", "b.jpg", "more/c.png"}
    assert len(coco.dataset["annotations"]) == len({a["id"] for a in coco.dataset["annotations"]}) > 0
    for image in coco.dataset["images"]:
        found = coco.loadAnns(coco.getAnnIds(image["id"]))
        masks = [coco.annToMask(a) for a in found]
        assert np.sum(masks, axis=0).max(initial=0) <= 1  # painted: no pixel belongs to two
        for annotation, mask in zip(found, masks):
            assert mask.shape == (image["height"], image["width"]) and mask.sum() == annotation["area"]
            assert annotation["bbox"] == list(coco_mask.toBbox(annotation["segmentation"]))
            assert 0 <= annotation["score"] <= 1 and annotation["iscrowd"] == 0
    drawn = sorted(p.relative_to(out / "overlays").as_posix() for p in (out / "overlays").rglob("*.png"))
    assert drawn == ["a.png", "b.png", "more/c.png"]
    # and the sweep's own reader takes it
    splits, report = load(DataConfig(format="coco", root=str(photos), annotations=str(out / "instances.json")))
    assert splits.train.num_rows + splits.val.num_rows == 3 and len(splits.categories) == 2 and not report["skipped"]


def test_a_saved_teacher_labels_its_classes_or_others(checkpoints: Path, photos: Path, tmp_path: Path) -> None:
    folders = {DETECTOR: checkpoints / "detector", SEGMENTER: checkpoints / "segmenter"}
    save_teacher(
        GroundedSamTeacher.load(folders, TeacherConfig(kind="grounded_sam"), CATEGORIES, (64, 64)), tmp_path / "teacher"
    )
    options = ("--teacher", tmp_path / "teacher", "--threshold", 0, "--no-overlays")
    assert run(photos, *options, "--out", tmp_path / "own") == 0
    own = json.loads((tmp_path / "own/instances.json").read_text())
    assert [(c["id"], c["name"]) for c in own["categories"]] == [(c.id, c.name) for c in CATEGORIES]
    (tmp_path / "names.txt").write_text("dog\n\ntraffic light\n")
    assert run(photos, *options, "--classes", tmp_path / "names.txt", "--out", tmp_path / "others") == 0
    others = json.loads((tmp_path / "others/instances.json").read_text())
    assert others["categories"] == [{"id": 1, "name": "dog"}, {"id": 2, "name": "traffic light"}]
    assert not (tmp_path / "own/overlays").exists()


def test_a_student_is_a_teacher_too(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = EncoderConfig(name="conv", widths=(8, 8, 16, 16), stem_stride=2)
    model = ModelConfig(encoder=encoder, hidden_dim=16, num_queries=5, num_layers=1, feedforward_dim=16)
    Student(build_segmenter(model, 1, 0), [Category(4, "disc")], (32, 48)).save_pretrained(tmp_path / "student")
    options = ("--teacher", tmp_path / "student", "--threshold", 0, "--out", tmp_path / "out")
    assert run(photos, *options) == 0
    assert json.loads((tmp_path / "out/instances.json").read_text())["categories"] == [{"id": 4, "name": "disc"}]
    assert run(photos, *options, "--classes", "person") == 2
    assert "only knows its own classes: disc" in capsys.readouterr().err


def test_nothing_found_is_said_loudly(
    checkpoints: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--classes", "person,dog", "--threshold", 0.999, "--out", tmp_path / "out")
    assert run(photos, *grounded(checkpoints), *options) == 1
    written = capsys.readouterr()
    assert "0 labels (none)" in written.out
    assert "asked for person, dog above --threshold 0.999" in written.err and "teacher.prompt.synonyms" in written.err
    assert json.loads((tmp_path / "out/instances.json").read_text())["annotations"] == []


def test_a_mask_transformer_labels(
    checkpoints: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoints / "m2f" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    checkpoint = f"teacher.mask_transformer.checkpoint={checkpoints / 'm2f'}"
    options = ("--set", checkpoint, "--set", "teacher.image_px=[64,64]", "--threshold", 0, "--out", tmp_path / "out")
    assert run(photos, "--teacher", "mask2former", "--classes", "dog,person", *options) == 0
    said = f"the labels come from teacher {checkpoints / 'm2f'}: CC-BY-NC-4.0, no commercial use (https://"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "grounded_sam"], "needs --classes: name the classes to look for"),
        (["--teacher", "nobody/here/at/all"], "nobody/here/at/all': teacher.json is missing"),
        (
            ["--teacher", "sam4", "--classes", "dog"],
            f"neither a kind ({', '.join(label.PUBLISHED)}) nor a saved teacher: ",
        ),
        (["--teacher", "expert"], "teacher 'expert': neither a kind (mask2former, grounded_sam, sam3, ensemble) nor "),
        (["--teacher", "grounded_sam", "--classes", "dog", "--set", "student.num_queries=3"], "a key of `teacher`"),
        (["--teacher", "grounded_sam", "--classes", "dog, dog"], "'dog' is there twice"),
        (["--teacher", "grounded_sam", "--classes", " , "], "expected names with commas"),
        (["--teacher", "grounded_sam", "--classes", "none.txt"], "'none.txt': cannot be read"),
        (
            ["--teacher", "grounded_sam", "--classes", "dog", "--set", "teacher.grounded_sam.detector=./gone"],
            "teacher.grounded_sam.detector: no folder './gone'",
        ),
    ],
)
def test_wrong_input_is_one_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(photos, *arguments, "--out", tmp_path / "out") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_help_says_what_classes_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    assert "JSON list of names" in " ".join(capsys.readouterr().out.split())


def test_markup_in_names_of_classes_is_text(
    checkpoints: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.json").write_text(json.dumps(["dog[/red]", ":car:"]))
    options = ("--classes", tmp_path / "names.json", "--threshold", 0.999, "--out", tmp_path / "out")
    assert run(photos, *grounded(checkpoints), *options) == EXIT_FAILED
    assert "asked for dog[/red], :car: above --threshold 0.999" in capsys.readouterr().err


def test_a_teacher_can_be_asked_mirrored_too(
    checkpoints: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[np.ndarray] = []
    real = GroundedSamTeacher.find

    def watched(self: GroundedSamTeacher, images: torch.Tensor, *arguments: Any) -> Any:
        asked.append(images.numpy())
        return real(self, images, *arguments)

    monkeypatch.setattr(GroundedSamTeacher, "find", watched)
    where = [photos / "a.png", "--out", tmp_path / "out", "--classes", "person, dog", "--threshold", "0"]
    assert run(*where, *grounded(checkpoints), "--set", "pseudo.vote_flip=true") in (0, EXIT_FAILED)
    straight, mirrored = asked
    height = round(40 * 64 / 60)  # 40 x 60 fitted to 64 x 64
    assert np.array_equal(straight[0, :, :height], mirrored[0, :, :height, ::-1])


NUM_CALIBRATED = 200


def calibrated_row(folder: Path, scores: tuple[float, float], right_from: float = 0.0) -> Path:
    """A row of a run whose teacher, of random weights, was calibrated: `dog` is right half of the time.

    Args:
        scores: range of the scores of its labels of labelled images, one of each class on each.
        right_from: least score at which `cat` is right.
    """
    categories = (Category(4, "dog"), Category(9, "cat"))
    teacher, labels = folder / "store" / "teacher", folder / "store" / "labels"
    make_student(categories).save_pretrained(teacher)
    labels.mkdir(parents=True)
    rng = np.random.default_rng(0)
    image = np.tile(np.arange(NUM_CALIBRATED), 2).astype(np.int32)
    score = np.sort(rng.uniform(*scores, (2, NUM_CALIBRATED)))[:, ::-1].ravel()
    label = np.repeat([0, 1], NUM_CALIBRATED).astype(np.int16)
    is_right = np.where(label == 0, np.arange(len(label)) % 2 == 0, score >= right_from)
    matched = is_right.astype(np.uint16)[:, None]
    truth = np.ones((NUM_CALIBRATED, 2, 1), dtype=np.uint16)
    DetectionMatches("coco", image, label, score, matched, np.zeros_like(matched), truth).save(labels / CALIBRATION)
    held = HeldPrecision(precision=0.8, error=0.1, num_images=NUM_CALIBRATED, num_folds=5, groups=())
    result = RowResult(
        table="t",
        row="mine",
        seed=0,
        status="done",
        recipe={
            "preset": "shapes",
            "pseudo": {"score_threshold": 0.0, "min_area_px": 1, "non_overlapping": False, "precision": 0.8},
            "teacher": {"inference": {}},
        },
        stages=(
            StageRecord(name="selftrain", kind="train", fingerprint="s", artifact=str(teacher)),
            StageRecord(name="label-teacher", kind="label", fingerprint="l", artifact=str(labels), held_precision=held),
        ),
    )
    row = folder / "runs" / "mine" / "t__mine__s0"
    row.mkdir(parents=True)
    (row / "result.json").write_text(result.to_json())
    return row.parent / "mine"


def annotations_in(out: Path) -> list[tuple[int, int, float]]:
    content = json.loads((out / "instances.json").read_text())
    return sorted((a["image_id"], a["category_id"], a["score"]) for a in content["annotations"])


def test_a_precision_takes_the_thresholds_of_the_calibration(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = calibrated_row(tmp_path / "first", (0.0, 1.0))
    rules = ("--set", "pseudo.min_area_px=1", "--set", "pseudo.non_overlapping=false", "--no-overlays")
    assert run(photos, "--teacher", row, "--threshold", 0, *rules, "--out", tmp_path / "all") == 0
    everything = annotations_in(tmp_path / "all")
    assert {category for _, category, _ in everything} == {9}  # these weights never say dog
    middle = float(np.median([score for *_, score in everything]))
    row = calibrated_row(tmp_path / "second", (0.0, 1.0), right_from=middle)
    capsys.readouterr()
    code = run(photos, "--teacher", row, "--precision", 0.9, "--no-overlays", "--out", tmp_path / "sure")
    told = capsys.readouterr().err
    assert "calibrated on 200 labelled images of shapes, scored by 5 teachers, each trained on the others" in told
    assert "Precision 0.9 at mask IoU 0.5 holds with probability 0.9" in told
    dog, cat = find_calibration(str(row)).groups(0.9, 0.1)
    assert dog.threshold is None and "dog: left unlabelled (100 of 200 labels right" in told
    assert cat.threshold is not None and f"cat: score {cat.threshold:.2f} or more ({cat.num_right} of " in told
    sure = annotations_in(tmp_path / "sure")
    assert sure == [found for found in everything if found[2] >= cat.threshold] and sure and code == 0


def test_photos_whose_scores_differ_are_warned_about(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = tmp_path / "more"
    more.mkdir()
    for number in range(12):
        shade = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(shade).save(more / f"{number}.png")
    row = calibrated_row(tmp_path, (0.999, 1.0))  # random weights are never so sure
    run(more, "--teacher", row, "--precision", 0.5, "--no-overlays", "--out", tmp_path / "out")
    told = capsys.readouterr().err
    assert "warning: the scores are lower on the whole than those of the images that the thresholds were chosen" in told
    assert "12 against 200 images: distance 1.00" in told and "label some of them" in told


@pytest.mark.parametrize(
    "options, message",
    [
        (["--precision", "0.999"], "no class is shown to hold it on 200 labelled images of shapes"),
        (["--precision", "0.9", "--threshold", "0.5"], "--precision and --threshold: "),
        (["--precision", "0.9", "--classes", "dog"], "--precision and --classes: "),
        (["--precision", "0.9", "--set", "pseudo.min_area_px=3"], "--precision and --set pseudo.min_area_px: "),
        (["--set", "pseudo.precision=0.9"], "a saved teacher's thresholds are chosen by --precision"),
    ],
)
def test_what_does_not_go_with_a_precision_is_one_line(
    options: list[str], message: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = calibrated_row(tmp_path, (0.0, 1.0))
    assert run(photos, "--teacher", row, *options, "--out", tmp_path / "out") == EXIT_BAD_INPUT
    told = capsys.readouterr().err
    assert message in told and len(told.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "instances.json").exists()


@pytest.mark.parametrize("teacher", ["grounded_sam", "TEACHER", "RUNS"])
def test_a_precision_needs_a_row_that_was_calibrated(
    teacher: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = calibrated_row(tmp_path, (0.0, 1.0))
    named = {"TEACHER": str(tmp_path / "store" / "teacher"), "RUNS": str(row.parent)}.get(teacher, teacher)
    assert run(photos, "--teacher", named, "--precision", 0.9, "--out", tmp_path / "out") == EXIT_BAD_INPUT
    assert "expected a row runs/<name>/<row> whose recipe has pseudo.precision" in capsys.readouterr().err
