"""What a user gets for wrong input: one line that names the file or the field, exit code 2, and no Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from PIL import Image

from cast_ray.cli import ablate
from cast_ray.contracts.records import Category
from cast_ray.models.segmenter import build_segmenter
from cast_ray.models.student import Student
from cast_ray.recipe import build_recipe
from cast_ray.runtime.sweep import run as sweep_module

NUM_IMAGES = 24
SQUARE = [[2, 1, 6, 1, 6, 4, 2, 4]]
TINY_SHAPES = ["data.shapes.num_source=8", "data.shapes.num_train=12", "data.shapes.num_val=4"]


def document() -> dict[str, Any]:
    """A small good instances JSON with gaps in its category ids."""
    images = [{"id": i, "file_name": f"{i}.png", "height": 8, "width": 10} for i in range(NUM_IMAGES)]
    annotations = [
        {"id": 100 + i, "image_id": i, "category_id": (3, 9)[i % 2], "segmentation": SQUARE, "iscrowd": 0}
        for i in range(NUM_IMAGES)
    ]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}],
    }


def write_dataset(folder: Path, spec: Any = None, text: str | None = None) -> Path:
    (folder / "images").mkdir(parents=True)
    for i in range(NUM_IMAGES):
        Image.new("RGB", (10, 8), (i, i, i)).save(folder / "images" / f"{i}.png")
    (folder / "instances.json").write_text(json.dumps(document() if spec is None else spec) if text is None else text)
    return folder


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, which must refuse, and returns the one line it leaves on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAST_RAY_STORAGE", raising=False)
    monkeypatch.setattr(sweep_module, "connect", lambda *_: pytest.fail("Ray was started"))

    def call(*arguments: str, storage: str | None = None) -> str:
        code = ablate.main([*arguments, "--storage", storage or str(tmp_path / "storage"), "--address", "local"])
        lines = capfd.readouterr().err.strip().splitlines()
        assert code == 2
        assert not ray.is_initialized()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return call


def coco(root: Path, *settings: str) -> list[str]:
    pairs = [f"data.root={root}", *settings]
    return ["losses", "--preset", "coco", "--scale", "smoke", *(part for pair in pairs for part in ("--set", pair))]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["loses"], ["unknown table 'loses'", "'losses'"]),
        (["no/such.yaml"], ["no/such.yaml"]),
        (["losses", "--preset", "shape"], ["unknown preset 'shape'", "'shapes'"]),
        (["losses", "--scale", "small"], ["unknown scale 'small'", "smoke, demo, full"]),
        (["losses", "--rows", "sup", "sup+semy"], ["unknown row 'sup+semy'", "'sup+semi'"]),
        (["losses", "--set", "loss.lamda_pxl=1"], ["unknown recipe key 'loss.lamda_pxl'", "'loss.lambda_pxl'"]),
        (["losses", "--set", "loss.lambda_pxl"], ["--set 'loss.lambda_pxl'", "key=value"]),
        (["losses", "--set", "loss.lambda_pxl=-1"], ["loss.lambda_pxl", "got -1"]),
        (["losses", "--set", "runtime.num_workers=3"], ["batch_labelled", "runtime.num_workers (3)"]),
        (["losses", "--set", "contrastive=relased"], ["contrastive='relased'", "'released'"]),
    ],
)
def test_names_and_values(refused: Callable[..., str], tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    line = refused(*arguments)
    assert all(word in line for word in words), line
    assert not (tmp_path / "storage").exists()


def test_a_table_of_ones_own_that_is_wrong(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("title: t\nmetric: student/mask_ap\nbaseline: a\nrows: {a: {loss.lambda_semy: 1}}\n")
    line = refused(str(path))
    assert str(path) in line and "row 'a'" in line and "'loss.lambda_semi'" in line
    path.write_text("rows: [")
    assert f"{path}: not YAML" in refused(str(path))


def test_no_dataset_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refused(*coco(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(*coco(tmp_path / "file"))
    assert "data.root" in refused("losses", "--preset", "coco", "--scale", "smoke")


def test_a_folder_without_annotations(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data")
    (folder / "instances.json").unlink()
    line = refused(*coco(folder))
    assert str(folder) in line and "data.annotations" in line
    assert "missing.json" in refused(*coco(folder, "data.annotations=missing.json"))


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in document().items() if k != key}


def with_annotation(**fields: Any) -> dict[str, Any]:
    spec = document()
    spec["annotations"][5] |= fields
    return spec


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ([1, 2], ["COCO"]),
        (without("images"), ["images"]),
        (without("annotations"), ["annotations"]),
        (without("categories"), ["categories"]),
        (with_annotation(category_id=4), ["category_id", "4", "105"]),
        (with_annotation(image_id=999), ["image_id", "999", "105"]),
        (document() | {"images": document()["images"] + document()["images"][:1]}, ["images", "0"]),
    ],
    ids=["a list", "no images", "no annotations", "no categories", "category id", "image id", "repeated id"],
)
def test_a_document_that_is_not_coco(refused: Callable[..., str], tmp_path: Path, spec: Any, words: list[str]) -> None:
    line = refused(*coco(write_dataset(tmp_path / "data", spec)))
    assert "instances.json" in line and all(word in line for word in words), line


@pytest.mark.parametrize("text", ["", "not json", '{"images": [', "\x00\x01"])
def test_a_file_that_is_not_json(refused: Callable[..., str], tmp_path: Path, text: str) -> None:
    assert "instances.json" in refused(*coco(write_dataset(tmp_path / "data", text=text)))


def test_images_that_are_missing(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data")
    for i in range(NUM_IMAGES):
        (folder / "images" / f"{i}.png").unlink()
    assert "instances.json" in refused(*coco(folder))


@pytest.mark.parametrize(
    "settings",
    [
        ["data.label_fraction=0.01"],
        ["data.label_fraction=0.05", "runtime.num_workers=2"],
    ],
)
def test_fewer_labelled_images_than_workers(refused: Callable[..., str], tmp_path: Path, settings: list[str]) -> None:
    line = refused(*coco(write_dataset(tmp_path / "data"), *settings))
    assert "label fraction" in line and "per worker" in line


def test_no_unlabelled_images_left(refused: Callable[..., str], tmp_path: Path) -> None:
    line = refused(*coco(write_dataset(tmp_path / "data"), "data.label_fraction=1"))
    assert "data.label_fraction" in line and "0 unlabelled" in line


@pytest.mark.parametrize("below", ["storage", "file://"])
def test_storage_that_cannot_be_written(refused: Callable[..., str], tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("a file, no folder")
    path = f"{tmp_path}/file/storage"
    line = refused("losses", "--scale", "smoke", storage=f"file://{path}" if below == "file://" else path)
    assert path in line and "cannot be written" in line


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved teacher of the smoke recipe, trained on two classes that the drawn scenes do not have."""
    folder = tmp_path_factory.mktemp("teacher")
    segmenter = build_segmenter(build_recipe("shapes", "smoke").teacher, 2, seed=0)
    Student(segmenter, [Category(1, "person"), Category(2, "rider")], (64, 64)).save_pretrained(folder)
    return folder


def foundation(folder: Path) -> list[str]:
    pairs = [f"stages.foundation={folder}", *TINY_SHAPES]
    return ["losses", "--scale", "smoke", *(part for pair in pairs for part in ("--set", pair))]


def test_a_teacher_of_another_class_list(refused: Callable[..., str], teacher: Path) -> None:
    line = refused(*foundation(teacher))
    assert "stages.foundation" in line and str(teacher) in line and "person, rider" in line and "disc" in line


def test_a_teacher_that_is_none(refused: Callable[..., str], tmp_path: Path) -> None:
    line = refused(*foundation(tmp_path / "nobody"))
    assert "stages.foundation" in line and "nobody" in line


def test_arguments_of_the_wrong_type(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        ablate.main(["losses", "--seeds", "one"])
    assert error.value.code == 2 and "--seeds" in capsys.readouterr().err
