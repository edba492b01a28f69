"""The precision of a stage: who decides it, who refuses it, and that all who use a model compute in the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cast_ray.cli import predict
from cast_ray.contracts.records import Category
from cast_ray.data.views import fit_image
from cast_ray.models.autocast import fastest_precision, require_precision
from cast_ray.models.segmenter import build_segmenter
from cast_ray.models.student import CONFIG, Student
from cast_ray.plan.graph import plan
from cast_ray.recipe import ModelConfig, Precision, RuntimeConfig, build_recipe
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.models import load_labeller, open_teacher, save_model
from cast_ray.runtime.worker.measuring import predict as evaluate

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CATEGORIES = (Category(5, "disc"), Category(9, "bar"))
TINY = {"student.encoder.widths": "[8, 8, 16, 16]", "student.hidden_dim": "16", "student.num_layers": "1"}


@pytest.mark.parametrize(
    ("amp", "use_gpu", "wanted"),
    [
        ("auto", False, "off"),
        ("auto", True, "bf16"),
        ("off", True, "off"),
        ("bf16", False, "bf16"),
        ("fp16", True, "fp16"),
    ],
)
def test_the_recipe_alone_decides(amp: str, use_gpu: bool, wanted: str) -> None:
    assert RuntimeConfig(amp=amp, use_gpu=use_gpu).precision == wanted


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that only emulates bfloat16, which torch counts as support unless it is told not to."""
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")


def test_a_gpu_without_bfloat16_refuses_it_and_names_the_field(old_gpu: None) -> None:
    with pytest.raises(ValueError) as refused:
        require_precision("bf16", GPU, "runtime.amp")
    text = str(refused.value)
    assert all(part in text for part in ("runtime.amp", "Tesla T4 has no bfloat16", "fp16 or off")) and "\n" not in text
    for precision in ("off", "fp16"):
        require_precision(precision, GPU, "runtime.amp")
    require_precision("bf16", CPU, "runtime.amp")
    assert fastest_precision(GPU) == "fp16" and fastest_precision(CPU) == "off"


def test_a_stage_is_refused_before_its_model_is_read(old_gpu: None, tmp_path: Path) -> None:
    row = plan(build_recipe("shapes", "smoke", {"runtime.use_gpu": "true"}), "h")
    with pytest.raises(ValueError, match=r"runtime\.amp"):
        load_labeller(ArtifactStore(str(tmp_path)), row.roles["student"], "model", GPU)


@pytest.mark.parametrize("precision", ["off", "bf16", "fp16"])
def test_predict_and_the_table_compute_alike(precision: Precision, tmp_path: Path) -> None:
    recipe = build_recipe("shapes", "smoke", TINY | {"runtime.amp": precision})
    row = plan(recipe, "h")
    trained, measured = row.roles["distill"], row.roles["student"]
    store = ArtifactStore(str(tmp_path / "store"))
    save_model(store, trained, build_segmenter(ModelConfig(**trained.config["model"]), 2, seed=3), CATEGORIES)
    store.commit(trained, {"seconds": 0.0})

    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    teacher = load_labeller(store, measured, "model", CPU)
    assert teacher.precision == precision
    pixels, inside = fit_image(image, recipe.data.image_px)
    images = torch.from_numpy(pixels)[None]
    (wanted,) = evaluate(teacher, [pixels], [image.shape[:2]], [inside], 100, 1)

    folder = str(store.artifact(trained.key))
    saved = Student.from_pretrained(folder)
    assert saved.precision == precision
    with open_teacher(folder, {}, None, None) as again:
        assert again.precision == precision
    assert (
        predict.main([str(tmp_path / "a.png"), "--student", folder, "--out", str(tmp_path / "o"), "--threshold", "0"])
        == 0
    )
    found = json.loads((tmp_path / "o" / "results.json").read_text())
    assert [r["score"] for r in found] == [i["score"] for i in wanted]
    assert [r["segmentation"]["counts"] for r in found] == [i["rle"].decode() for i in wanted]
    other: Precision = "off" if precision != "off" else "bf16"
    saved.precision = other
    assert [i["score"] for i in saved.predict(images, [image.shape[:2]], [inside])[0]] != [i["score"] for i in wanted]


def test_a_student_saved_before_is_float32_and_a_wrong_precision_is_named(tmp_path: Path) -> None:
    Student(build_segmenter(ModelConfig(), 2, 0), CATEGORIES, (32, 48)).save_pretrained(tmp_path)
    spec = json.loads((tmp_path / CONFIG).read_text())
    assert spec.pop("precision") == "off"
    (tmp_path / CONFIG).write_text(json.dumps(spec))
    assert Student.from_pretrained(tmp_path).precision == "off"
    (tmp_path / CONFIG).write_text(json.dumps(spec | {"precision": "int8"}))
    with pytest.raises(ValueError, match=r"config.json.*precision is 'int8': expected off, bf16 or fp16"):
        Student.from_pretrained(tmp_path)
