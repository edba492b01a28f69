"""Checkpoints that are missing, incomplete or of another kind, and their identity."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from teacher_scenes import CATEGORIES, CROP
from tiny_checkpoints import write_detector, write_sam2
from transformers import Sam2Model

from cast_ray.models import checkpoints
from cast_ray.models.checkpoints import content_hash, find_checkpoint, load_model
from cast_ray.recipe import TeacherConfig
from cast_ray.teachers.box_segmenter import MODELS
from cast_ray.teachers.detector import TextDetector
from cast_ray.teachers.grounded_sam import DETECTOR, SEGMENTER, GroundedSamTeacher
from cast_ray.teachers.protocol import load_teacher, save_teacher


@pytest.fixture(scope="module")
def sam2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sam2(tmp_path_factory.mktemp("sam2"))


@pytest.fixture
def copied(sam2: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sam2, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "teacher.x is empty"),
        ("/nowhere/at/all", "teacher.x: no folder '/nowhere/at/all'"),
        ("./nowhere", "teacher.x: no folder './nowhere'"),
        ("some/hub-name", "teacher.x: 'some/hub-name' is no folder here"),
    ],
)
def test_a_missing_checkpoint_names_field_and_folder(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_checkpoint(source, "teacher.x", download=False)


def test_a_folder_without_a_model(copied: Path) -> None:
    assert find_checkpoint(str(copied), "f") == copied
    (copied / "model.safetensors").rename(copied / "gone")
    with pytest.raises(ValueError, match=r"f: no weights in '.*copy'"):
        find_checkpoint(str(copied), "f")
    (copied / "config.json").unlink()
    with pytest.raises(ValueError, match=r"f: no model in '.*copy': config.json is missing"):
        find_checkpoint(str(copied), "f")


def test_weights_that_are_missing_are_not_drawn_at_random(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    del weights["mask_decoder.iou_token.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"f: '.*copy' lacks 1 weights of its model: mask_decoder.iou_token.weight"):
        load_model(MODELS, copied, "f")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 40), "the weights cannot be loaded"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
            "'bert': expected sam2 or sam2_video",
        ),
        (lambda f: _edit(f, "mask_decoder_config", {"iou_head_hidden_dim": 16}), "the weights cannot be loaded"),
    ],
)
def test_a_broken_checkpoint_is_one_line(copied: Path, change, message: str) -> None:
    change(copied)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(MODELS, copied, "teacher.grounded_sam.segmenter")
    assert "teacher.grounded_sam.segmenter" in str(caught.value) and "\n" not in str(caught.value)


def _edit(folder: Path, section: str, values: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[section] |= values
    (folder / "config.json").write_text(json.dumps(config))


def test_more_than_the_memory_holds(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_free_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"f: .* GiB of weights do not fit into the 0\.0 GiB that are free"):
        load_model(MODELS, copied, "f")


def test_half_precision_weights_are_widened(copied: Path) -> None:
    Sam2Model.from_pretrained(copied).half().save_pretrained(copied)
    assert {p.dtype.itemsize for p in load_model(MODELS, copied, "f").parameters()} == {4}


def test_identity_is_the_content(sam2: Path, copied: Path) -> None:
    assert content_hash([sam2]) == content_hash([copied])
    (copied / "README.md").write_text("a card")
    (copied / "preprocessor_config.json").touch()
    assert content_hash([sam2]) == content_hash([copied])
    weights = load_file(copied / "model.safetensors")
    weights["no_memory_embedding"] = weights["no_memory_embedding"] + 1e-3
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert content_hash([sam2]) != content_hash([copied])


def test_a_detector_with_another_tokenizer(tmp_path: Path) -> None:
    folder = write_detector(tmp_path)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["."], vocabulary["model"]["vocab"]["[unused1013]"] = 1013, 1012
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match=r"expected BERT's \(101, 102, 1012\)"):
        TextDetector.load(folder, DETECTOR)


def test_a_folder_that_is_no_teacher(tmp_path: Path, sam2: Path) -> None:
    with pytest.raises(ValueError, match=r"no saved teacher in '.*': teacher.json is missing"):
        load_teacher(tmp_path)
    folders = {DETECTOR: write_detector(tmp_path / "detector"), SEGMENTER: sam2}
    teacher = GroundedSamTeacher.load(folders, TeacherConfig(kind="grounded_sam"), CATEGORIES, CROP)
    save_teacher(teacher, tmp_path / "saved")
    card = json.loads((tmp_path / "saved" / "teacher.json").read_text())
    card["config"]["grounded_sam"]["surprise"] = 1
    (tmp_path / "saved" / "teacher.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"teacher\.json: not a saved teacher"):
        load_teacher(tmp_path / "saved")
