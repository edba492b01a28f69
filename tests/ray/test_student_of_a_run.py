"""A student of another kind through a whole sweep, then used straight from its row: predicted with and taken out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cast_ray.cli import export, predict
from cast_ray.runtime.store.models import open_student

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SETTINGS = {
    "data.shapes.num_source": "8",
    "data.shapes.num_train": "16",
    "data.shapes.num_val": "6",
    "stages.use_adapt": "false",
    "teacher.num_layers": "1",
    **{f"stages.{stage}.batch_labelled": "2" for stage in ("pretrain", "distill", "refine")},
    "stages.distill.batch_unlabelled": "2",
    "student.encoder.name": "vit",
    "student.encoder.widths": "[8, 16, 32, 64]",
    "student.head": "eomt",
    "student.num_layers": "2",
    "student.proposals": "false",
    "contrastive.feature_stride": "8",
    "stages.distill.accumulate": "2",
    "stages.distill.layer_decay": "0.8",
    "runtime.gradient_checkpointing": "true",
}


@pytest.fixture(scope="module")
def run(start_sweep: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    pairs = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    sweep = start_sweep(folder, "--rows", "sup+semi+pxl", "--name", "r", *pairs)
    assert sweep.finish() == 0, sweep.output
    return folder


def test_the_row_names_its_student(run: Path) -> None:
    student, result = open_student(str(run / "runs" / "r" / "sup+semi+pxl"))
    assert result is not None and result.is_done and result.dataset is not None
    assert student.segmenter.config.head == "eomt" and student.class_names == list(result.dataset.classes)
    assert student.segmenter.head.probs == [0.0, 0.0]  # annealed: no masks inside the encoder any more
    assert student.image_px == (64, 64)


def test_predict_and_export_take_the_row(run: Path, tmp_path: Path) -> None:
    row = run / "runs" / "r" / "sup+semi+pxl"
    photos = next((run / "storage" / "datasets").glob("shapes-*")) / "val"
    assert photos.is_dir() or (photos := photos.parent)
    out = tmp_path / "out"
    assert predict.main([str(photos), "--student", str(row), "--out", str(out), "--threshold", "0"]) == 0
    images = json.loads((out / "images.json").read_text())["images"]
    assert images and len(list((out / "overlays").rglob("*.png"))) == len(images)
    assert export.main(["--student", str(row), "--out", str(tmp_path / "student")]) == 0
    card = (tmp_path / "student" / "README.md").read_text()
    assert "refined student" in card and "row `sup+semi+pxl` of table `losses`" in card
    taken, _ = open_student(str(tmp_path / "student"))
    kept, _ = open_student(str(row))
    assert all((a == b).all() for a, b in zip(taken.state_dict().values(), kept.state_dict().values(), strict=True))
