"""A saved student: one folder, loaded without Ray and training code, with clear errors and a model card."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_students import TINY, make_student

from cast_ray.cli import export
from cast_ray.contracts.records import Category
from cast_ray.contracts.row_result import RowResult
from cast_ray.models.segmenter import build_segmenter
from cast_ray.models.student import CARD, CONFIG, WEIGHTS, Student
from cast_ray.plan.graph import plan
from cast_ray.recipe import ModelConfig, Recipe, StagesConfig, TeacherConfig, build_recipe
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.models import import_foundation, load_student, open_student, save_model

CATEGORIES = (Category(3, "disc"), Category(7, "büchse"))


def make(seed: int = 0) -> Student:
    return make_student(CATEGORIES, seed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 32, 48), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize("local_masks", [False, True])
def test_what_is_saved_comes_back(folder: Path, local_masks: bool) -> None:
    model = TINY.model_copy(update={"local_masks": local_masks})
    student = Student(build_segmenter(model, 2, 1), CATEGORIES, (32, 48), colours=[(1, 2, 3), (4, 5, 6)]).eval()
    student.save_pretrained(folder)
    again = Student.from_pretrained(folder)
    assert again.categories == CATEGORIES and again.class_names == ["disc", "büchse"]
    assert again.image_px == (32, 48) and again.colours == [(1, 2, 3), (4, 5, 6)]
    assert not again.training and again.segmenter.config == model
    assert again.predict(images(), [(64, 96), (20, 30)], [(32, 48), (32, 48)]) == student.predict(
        images(), [(64, 96), (20, 30)], [(32, 48), (32, 48)]
    )


@pytest.mark.parametrize(
    "files",
    [
        {"README.md": b"my notes"},
        {"config.json": b'{"model_type": "sam2"}', "model.safetensors": b"weights", "README.md": b"a model"},
        {"config.json": b"no JSON", "a": b"", "b": b"", "c": b""},
        {"photo.jpg": b"x"},
    ],
)
def test_the_files_of_something_else_are_never_overwritten(
    folder: Path, tmp_path: Path, files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name, content in files.items():
        (other / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        make().save_pretrained(other)
    one_line(error, f"{other} holds something other than a saved student", sorted(files)[0], "expected an empty folder")
    assert export.main(["--student", str(folder), "--out", str(other)]) == 2
    assert "holds something other than a saved student" in capsys.readouterr().err
    assert export.main(["--student", "gone", "--out", str(other)]) == 2  # before the student is looked for
    assert "holds something other than a saved student" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in other.iterdir()} == files


def test_an_earlier_export_is_replaced(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".git").mkdir(parents=True)  # the clone of an empty repository
    assert export.main(["--student", str(folder), "--out", str(out)]) == 0
    make(1).save_pretrained(folder)
    assert export.main(["--student", str(folder), "--out", str(out)]) == 0
    assert (out / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    (out / WEIGHTS).unlink()  # as after an export that was stopped
    assert export.main(["--student", str(folder), "--out", str(out)]) == 0


def test_the_folder_is_laid_out_as_transformers_has_it(folder: Path) -> None:
    assert (
        {p.name for p in folder.iterdir()}
        == {CONFIG, WEIGHTS, CARD}
        == {"config.json", "model.safetensors", "README.md"}
    )
    config = json.loads((folder / CONFIG).read_text())
    assert config["id2label"] == {"0": "disc", "1": "büchse"}
    assert config["categories"] == [{"id": 3, "name": "disc"}, {"id": 7, "name": "büchse"}]
    assert len(config["colours"]) == 2 and config["image_px"] == [32, 48]
    assert config["preprocessing"]["image_mean"] == [0.5, 0.5, 0.5]
    assert load_file(folder / WEIGHTS).keys() == make().segmenter.state_dict().keys()


def test_loading_leaves_the_random_state_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    Student.from_pretrained(folder)
    assert torch.equal(before, torch.get_rng_state())


def test_loading_and_predicting_need_neither_ray_nor_the_training_code(folder: Path) -> None:
    code = f"""
import sys, torch
from cast_ray.models.student import Student
student = Student.from_pretrained({str(folder)!r})
assert len(student.predict(torch.zeros(1, 3, 32, 48, dtype=torch.uint8))) == 1
parts = ("datasets", "views", "losses", "evaluation", "teachers", "engine", "stages", "runtime", "report")
loaded = [m for m in sys.modules if m.split(".")[0] == "ray" or m.startswith(tuple("cast_ray." + p for p in parts))]
sys.exit(f"loaded: {{loaded}}" if loaded else 0)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def one_line(error: pytest.ExceptionInfo[ValueError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    for part in parts:
        assert part in message


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        Student.from_pretrained(tmp_path / "gone")
    one_line(error, "no saved student in", str(tmp_path / "gone"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError) as error:
        Student.from_pretrained(tmp_path / "empty")
    one_line(error, "no saved student in", "config.json")


def test_weights_missing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError) as error:
        Student.from_pretrained(folder)
    one_line(error, str(folder), WEIGHTS)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (b"{", "not JSON"),
        (b"[]", "model_type is None"),
        (b'{"model_type": "dinov2"}', "model_type is 'dinov2': expected 'cast_ray'"),
        (b'{"model_type": "cast_ray"}', "'model'"),
        (b'{"model_type": "cast_ray", "model": {"hidden": 3}}', "hidden"),
    ],
)
def test_a_config_of_another_kind(folder: Path, config: bytes, part: str) -> None:
    (folder / CONFIG).write_bytes(config)
    with pytest.raises(ValueError) as error:
        Student.from_pretrained(folder)
    one_line(error, f"{folder}/config.json", part)


def test_weights_of_another_architecture(folder: Path) -> None:
    other = build_segmenter(TINY.model_copy(update={"hidden_dim": 32}), 2, 0)
    save_file(other.state_dict(), folder / WEIGHTS)
    with pytest.raises(ValueError) as error:
        Student.from_pretrained(folder)
    one_line(error, f"{folder}/model.safetensors: does not fit config.json", "size mismatch")
    (folder / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(ValueError) as error:
        Student.from_pretrained(folder)
    one_line(error, f"{folder}/model.safetensors: does not fit config.json")


RESULT: dict[str, Any] = {
    "table": "losses",
    "row": "sup+semi",
    "seed": 2,
    "status": "done",
    "command": "python sweeps/ablate.py losses",
    "code_version": "0.1.0+abc",
    "device_hours": 0.25,
    "recipe": {"preset": "shapes", "scale": "demo"},
    "dataset": {"num_val": 200, "num_labelled": 20, "num_unlabelled": 480},
    "metrics": {"teacher/mask_ap": 51.24, "student/mask_ap": 40.0, "student/ap50": 61.25, "refined/mask_ap": 42.5},
}


@pytest.mark.parametrize(("metric", "name"), [("coco", "COCO AP"), ("cityscapes", "Cityscapes AP")])
def test_the_card_names_the_kind_of_ap(tmp_path: Path, metric: str, name: str) -> None:
    plain = RESULT | {"recipe": RESULT["recipe"] | {"evaluation": {"metric": metric}}}
    make().save_pretrained(tmp_path, RowResult.of(plain, "result.json"))
    assert f"\n{name} in percent on 200 validation images" in (tmp_path / CARD).read_text()


def test_the_card_tells_the_measurements(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path, RowResult.of(RESULT, "result.json"))
    card = (tmp_path / CARD).read_text()
    assert card.startswith("---\nlibrary_name: cast_ray\n")
    for part in (
        "| refined student (step 3) | 42.5 |",
        "| distilled student (step 2b) | 40.0 | 61.2 |",
        "| its teacher | 51.2 |",
        "200 validation images",
        "one run with seed 2",
        "row `sup+semi` of table `losses`",
        "0.25 device-hours",
        "2 classes: disc, büchse",
        "conv encoder, dpt decoder, masked-attention head, 5 queries",
    ):
        assert part in card, part


def test_the_card_of_a_model_without_result_says_so(folder: Path) -> None:
    card = (folder / CARD).read_text()
    assert "No measurements" in card and "fitted into 32 x 48 px" in card and "computes in float32" in card


def test_the_precision_of_the_training_is_kept_and_told(tmp_path: Path) -> None:
    student = make()
    student.precision = "bf16"
    student.save_pretrained(tmp_path)
    assert Student.from_pretrained(tmp_path).precision == "bf16"
    assert "computes in bfloat16 (autocast)" in (tmp_path / CARD).read_text()


STAGES = [
    {"name": "selftrain", "kind": "train", "fingerprint": "s", "artifact": "nowhere"},
    {"name": "distill", "kind": "train", "fingerprint": "d", "artifact": "distilled"},
    {"name": "evaluate", "kind": "evaluate", "fingerprint": "e", "artifact": "nowhere"},
]
REFINE = {"name": "refine", "kind": "train", "fingerprint": "r", "artifact": "refined"}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """runs/demo with two rows, the second in two seeds, and the artifacts that they name."""
    for name, seed in (("distilled", 5), ("refined", 6)):
        make(seed).save_pretrained(tmp_path / "artifacts" / name)
    for row, refined in (("losses__sup__s0", True), ("losses__sup+semi__s0", False), ("losses__sup+semi__s1", False)):
        stages = STAGES + (
            [{"name": "refine", "kind": "train", "fingerprint": "r", "artifact": "refined"}] if refined else []
        )
        result = RESULT | {"stages": [s | {"artifact": str(tmp_path / "artifacts" / s["artifact"])} for s in stages]}
        (tmp_path / "runs" / "demo" / row).mkdir(parents=True)
        (tmp_path / "runs" / "demo" / row / "result.json").write_text(json.dumps(result))
    return tmp_path / "runs" / "demo"


def same(a: Student, b: Student) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_row_leads_to_its_last_student(runs: Path) -> None:
    for path in (runs / "losses__sup__s0", runs / "sup"):
        student, result = open_student(str(path))
        assert same(student, make(6)) and result is not None and result.seed == 2
    student, _ = open_student(str(runs / "losses__sup+semi__s1"))
    assert same(student, make(5))


def test_an_artifact_or_a_folder_is_a_student_itself(runs: Path) -> None:
    student, result = open_student(str(runs.parents[1] / "artifacts" / "refined"))
    assert same(student, make(6)) and result is None
    student, _ = open_student(f"file://{runs.parents[1] / 'artifacts' / 'refined'}")
    assert same(student, make(6))


def test_a_path_that_is_no_student_names_the_rows(runs: Path) -> None:
    with pytest.raises(ValueError) as error:
        open_student(str(runs))
    one_line(error, "expected one of its rows: losses__sup+semi__s0, losses__sup+semi__s1, losses__sup__s0")
    with pytest.raises(ValueError) as error:
        open_student(str(runs / "sup+semi"))
    one_line(error, "several seeds", "losses__sup+semi__s1")
    with pytest.raises(ValueError) as error:
        open_student(str(runs / "supp"))
    one_line(error, "no saved student in")
    (runs / "losses__sup__s0" / "result.json").write_text(json.dumps(RESULT | {"stages": STAGES[:1], "error": "lost"}))
    with pytest.raises(ValueError) as error:
        open_student(str(runs / "sup"))
    one_line(error, "has not finished one (lost)")


def test_the_store_keeps_students(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "storage"))
    stage = plan(build_recipe("shapes", "smoke", {"data.image_px": "[32, 48]"}), "h").roles["distill"]
    save_model(store, stage, make().segmenter, CATEGORIES)
    store.commit(stage, {})
    assert load_student(store, stage.key).categories == CATEGORIES and same(load_student(store, stage.key), make())
    student, _ = open_student(store.artifact(stage.key))
    assert student.image_px == (32, 48) and same(student, make())


def test_a_saved_student_can_be_a_foundation(folder: Path, tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "storage"))

    def recipe(model: ModelConfig = TINY) -> Recipe:
        return Recipe(
            preset="shapes",
            scale="smoke",
            teacher=TeacherConfig(**model.model_dump()),
            stages=StagesConfig(foundation=str(folder)),
        )

    fingerprint = import_foundation(store, recipe(), CATEGORIES)
    assert same(load_student(store, f"train-{fingerprint}"), make())
    with pytest.raises(ValueError) as error:
        import_foundation(store, recipe(TINY.model_copy(update={"num_queries": 6})), CATEGORIES)
    one_line(error, "stages.foundation", "is not the recipe's `teacher`")
    with pytest.raises(ValueError) as error:
        import_foundation(store, recipe(), CATEGORIES[:1])
    one_line(error, "stages.foundation", "was trained on disc, büchse, the dataset has disc")
    shutil.rmtree(folder)
    with pytest.raises(ValueError) as error:
        import_foundation(store, recipe(), CATEGORIES)
    one_line(error, "stages.foundation", str(folder))
