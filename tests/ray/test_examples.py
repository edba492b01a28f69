"""The scripts of `examples/` as a user runs them: in their folder, with the installed command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SIZE = 40


def run(*arguments: str, code: int = 0) -> str:
    """Runs Python in the folder of the examples; returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in the format of `own_dataset.py`: bright squares on noise; one image has no mask."""
    root = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        (root / split).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
            mask = np.zeros((SIZE, SIZE), np.uint8)
            for number, (y, x) in enumerate(rng.integers(0, 3, (3, 2)) * 13, 1):
                mask[y : y + 10, x : x + 10] = number
            pixels[mask > 0] += 150
            Image.fromarray(pixels).save(root / split / f"{i}.png")
            Image.fromarray(mask).save(root / split / f"{i}_mask.png")
    Image.fromarray(pixels).save(root / "train" / "alone.png")
    return root


def test_a_dataset_format_of_ones_own_is_inspected(folder: Path, tmp_path: Path) -> None:
    arguments = ("--format", "own_dataset:index", "--out", str(tmp_path / "out"))
    printed = run("-m", "cast_ray", "inspect", str(folder), *arguments, "--set", "data.max_bad_fraction=0.2")
    assert "own_dataset:index, 1 classes" in printed and "its label map is missing" in printed
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert report["skipped"][0]["id"] == "alone"
    gone = run("-m", "cast_ray", "inspect", str(folder), "--format", "own_datasets:index", code=2)
    assert "'own_datasets:index': expected MODULE:NAME that Python can import" in gone and "Traceback" not in gone


@pytest.mark.timeout(1200)
def test_a_format_and_a_loss_of_ones_own_in_a_sweep_and_its_student(folder: Path, tmp_path: Path) -> None:
    settings = [
        "data.format=own_dataset:index",
        f"data.root={folder}",
        "data.image_px=[64, 64]",
        "data.train_resize=fit",
        "data.inference_resize=fit",
        "data.label_fraction=0.5",
        "data.max_bad_fraction=0.2",
        "loss.extra_term=own_loss:uncertainty",
        "loss.extra_weight=0.1",
    ]
    where = ["--out", str(tmp_path / "runs"), "--storage", str(tmp_path / "storage"), "--address", "local"]
    overrides = [part for setting in settings for part in ("--set", setting)]
    what = ["losses", "--preset", "nuclei", "--scale", "smoke", "--rows", "sup"]
    run("-m", "cast_ray", "ablate", *what, *where, *overrides)
    row = tmp_path / "runs" / "losses-nuclei-smoke" / "losses__sup__s0"
    result = json.loads((row / "result.json").read_text())
    assert result["dataset"]["num_val"] == 4 and "student/mask_ap" in result["metrics"]
    curves = result["curves"]
    assert curves["distill"] and all(0 < entry["extra"] < 0.7 for entry in curves["distill"])  # ln 2: of a fair coin
    assert curves["refine"] and not any("extra" in entry for name in ("adapt", "refine") for entry in curves[name])

    printed = run("student.py", str(row), str(folder / "val" / "0.png"))
    assert all(line.startswith("thing ") for line in printed.splitlines())
