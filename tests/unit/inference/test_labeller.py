"""Loading a teacher by the name that a user gives, through the public API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import write_detector, write_sam2

import cast_ray
from cast_ray.contracts.records import Category
from cast_ray.models.segmenter import build_segmenter
from cast_ray.recipe import EncoderConfig, ModelConfig, build_recipe

SIZE = 32


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A saved student of two classes."""
    encoder = EncoderConfig(name="conv", widths=(8, 8, 16, 16), stem_stride=2)
    config = ModelConfig(encoder=encoder, hidden_dim=16, num_queries=5, num_layers=1, feedforward_dim=16)
    made = cast_ray.Student(build_segmenter(config, 2, 0), [Category(5, "disc"), Category(9, "bar")], (SIZE, SIZE))
    made.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def test_a_saved_student_is_a_teacher(student: Path) -> None:
    teacher = cast_ray.load_teacher(str(student))
    assert teacher.class_names == ["disc", "bar"] and not teacher.training
    images = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    (instances,) = teacher.predict(images, [(SIZE, SIZE)], [(SIZE, SIZE)], 5, 0.0)
    assert instances and {"label", "score", "rle"} <= set(instances[0])
    with pytest.raises(ValueError, match="only knows its own classes: disc, bar"):
        cast_ray.load_teacher(str(student), ["cat"])


def test_a_published_kind_is_given_its_classes_by_name(tmp_path: Path) -> None:
    write_detector(tmp_path / "detector", "mm", ("person", "traffic", "light", "dog"))
    write_sam2(tmp_path / "segmenter")
    parts = {f"teacher.grounded_sam.{part}": str(tmp_path / part) for part in ("detector", "segmenter")}
    overrides = {"teacher.kind": "grounded_sam", "stages.use_adapt": False, "teacher.image_px": [64, 64], **parts}
    recipe = build_recipe("coco", "full", overrides)
    for classes in (["person", "dog"], "person, dog", [Category(1, "person"), Category(2, "dog")]):
        teacher = cast_ray.load_teacher("grounded_sam", classes, recipe)
        assert [(c.id, c.name) for c in teacher.categories] == [(1, "person"), (2, "dog")]
    with pytest.raises(ValueError, match="needs the names of the classes to look for"):
        cast_ray.load_teacher("grounded_sam", recipe=recipe)
    with pytest.raises(ValueError, match=r"teacher\.kind of the recipe is grounded_sam: expected sam3"):
        cast_ray.load_teacher("sam3", ["dog"], recipe)
    for none, message in (
        ([], "classes: expected at least one name, got none"),
        (["dog", " "], "classes: expected a name for each class"),
        (["dog", "dog"], "classes: 'dog' is there twice"),
        ([Category(1, "dog"), Category(1, "cat")], "classes: 1 is there twice"),
        (" , ", "expected names with commas"),
    ):
        with pytest.raises(ValueError, match=f"{message}"):
            cast_ray.load_teacher("grounded_sam", none, recipe)
    wrong: Any
    for wrong in ([1, 2], {"dog": 1}, 5):
        with pytest.raises(TypeError, match=r"^classes: expected a list of names or categories, got "):
            cast_ray.load_teacher("grounded_sam", wrong, recipe)


def test_what_is_neither_a_kind_nor_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither a kind .* nor a saved teacher"):
        cast_ray.load_teacher(str(tmp_path / "gone"))
    for empty in ("", "  "):
        with pytest.raises(ValueError, match=r"^source is empty: expected a kind of teacher .*grounded_sam"):
            cast_ray.load_teacher(empty)
        with pytest.raises(ValueError, match=r"^the name of a saved student is empty"):
            cast_ray.Student.from_pretrained(empty)
    wrong: Any
    for wrong in (None, 5, ["grounded_sam"]):
        with pytest.raises(TypeError, match=r"^source: expected a text or a Path, got "):
            cast_ray.load_teacher(wrong)
    for wrong in ("coco", {"teacher": {}}):
        with pytest.raises(TypeError, match=r"^recipe: expected a Recipe, as build_recipe makes it, got "):
            cast_ray.load_teacher("sam3", ["dog"], wrong)
