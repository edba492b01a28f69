"""Hand-made results of a small losses table, for the tests of reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

ROWS = ("sup", "sup+semi", "sup+pxl", "sup+semi+pxl")
STUDENT = {"sup": 13.5, "sup+semi": 15.8, "sup+pxl": 13.4, "sup+semi+pxl": 15.9}


def result(row: str, seed: int = 0, ap: float | None = None, **changes: Any) -> dict[str, Any]:
    student = STUDENT[row] + 0.3 * seed if ap is None else ap
    metrics = {"zero_shot/mask_ap": 21.5, "zero_shot/ap50": 40.0, "teacher/mask_ap": 23.3, "teacher/ap50": 42.0}
    metrics |= {"student/mask_ap": student, "student/ap50": 2 * student}
    metrics |= {"refined/mask_ap": student + 0.5, "refined/ap50": 2 * student + 0.5}
    full = {
        "table": "losses",
        "row": row,
        "seed": seed,
        "status": "done",
        "error": None,
        "log": None,
        "recipe": {"preset": "shapes", "scale": "demo", "seed": seed},
        "command": "python sweeps/ablate.py losses --preset shapes",
        "code_version": "0.1.0",
        "started": f"2026-01-0{seed + 1}T10:0{ROWS.index(row)}:00",
        "seconds": 100.0 + 10 * ROWS.index(row),
        "device_hours": 0.1,
        "hardware": {"cpu": "Test CPU", "num_cpus": 2, "gpu": None, "memory_gb": 24.0},
        "dataset": {
            "content_hash": "abc",
            "num_labelled": 20,
            "num_unlabelled": 0 if row == "sup" else 480,
            "num_val": 200,
            "classes": ["disc", "triangle", "square", "cross"],
            "skipped": 0,
        },
        "stages": [
            stage("pretrain", f"shared-{seed}", 1000, reused=row != "sup"),
            stage("label", f"label-{seed}", 0, kind="label", reused=row != "sup"),
            stage("distill", f"{row}-{seed}", 400),
        ],
        "metrics": metrics,
        "diagnostics": {"distill": [{"step": s, "margin": 0.1 + s / 1000, "fnr": 0.2} for s in (0, 20, 40)]},
        "curves": {"distill": [{"step": s, "loss": 3.0 - s / 40} for s in (0, 20, 40)]},
    }
    return full | changes


def stage(name: str, fingerprint: str, steps: int, kind: str = "train", reused: bool = False) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "fingerprint": fingerprint,
        "artifact": f"file:///storage/{fingerprint}",
        "reused": reused,
        "seconds": 1.0 if reused else 50.0,
        "stage_seconds": 72.0,
        "num_workers": 1,
        "steps": steps,
        "images_per_s": 80.0,
    }


def empty_audit() -> dict[str, Any]:
    """The audit of a labelling stage that found nothing on three images."""
    coverage = {"objects": {"mean": 0.0}, "pixels": {"mean": 0.0}, "labels_per_image": 0.0, "images_without_label": 3}
    calibration = {"score": [], "precision": [], "ece": None}
    counts = {"num_images": 3, "num_labels": 0, "num_objects": 9}
    return counts | {"calibration": calibration, "coverage": coverage}


def failed(row: str, seed: int = 0) -> dict[str, Any]:
    error = "Traceback (most recent call last):\n  File x\nValueError: loss is NaN at step 17\n"
    return result(
        row, seed, status="failed", error=error, log="runs/x/losses__sup+pxl__s0/log.txt", metrics={}, stages=[]
    )


def save(run_dir: Path, results: list[dict[str, Any]]) -> Path:
    """Writes results as a sweep leaves them."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for r in results:
        folder = run_dir / f"{r['table']}__{r['row']}__s{r['seed']}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(r))
    return run_dir


class ImageScores:
    """Per-image data whose AP is the mean of a score an image: simple enough to know every interval by heart."""

    def __init__(self, scores: np.ndarray):
        self.scores = scores
        self.num_calls = 0

    @property
    def num_images(self) -> int:
        return len(self.scores)

    def mask_ap(self, image_counts: np.ndarray | None = None) -> float:
        self.num_calls += 1
        counts = np.ones(self.num_images, np.int64) if image_counts is None else image_counts
        assert counts.shape == self.scores.shape
        return float(self.scores @ counts / counts.sum())
