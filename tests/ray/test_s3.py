"""A sweep whose storage is an object store: everything that works on a folder works there, with few requests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs
from s3_server import BUCKET, S3Server

pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).parents[2]
STORAGE = f"s3://{BUCKET}/storage"
STEPS = {"pretrain": 4, "adapt": 2, "selftrain": 2, "distill": 4, "refine": 2}
SETTINGS = [
    *(f"stages.{stage}.steps={steps}" for stage, steps in STEPS.items()),
    *(f"stages.{stage}.batch_labelled=2" for stage in STEPS),
    *(f"stages.{stage}.batch_unlabelled=2" for stage in ("selftrain", "distill")),
    "data.shapes.num_source=8",
    "data.shapes.num_train=16",
    "data.shapes.num_val=6",
    "student.num_layers=1",
    "teacher.num_layers=1",
    "pseudo.on_empty=warn",  # the teacher has learnt nothing in so few steps
]
ARGUMENTS = [
    *("--rows", "sup+semi", "--storage", STORAGE),
    *(part for setting in SETTINGS for part in ("--set", setting)),
]
MAX_REQUESTS, MAX_REQUESTS_STORED = 900, 120


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s3")


@pytest.fixture(scope="module")
def first(server: S3Server, folder: Path, start_sweep: Any) -> dict[str, Any]:
    """The row's result; the requests that it cost are in `requests`."""
    server.reset()
    sweep = start_sweep(folder, *ARGUMENTS)
    assert sweep.finish() == 0, sweep.output
    result = json.loads((folder / "runs/losses-shapes-smoke/losses__sup+semi__s0/result.json").read_text())
    print(dict(server.requests), server.paths.most_common(60))
    return result | {"requests": server.requests.total(), "output": sweep.output}


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_sweep_runs_with_few_requests(server: S3Server, folder: Path, first: dict[str, Any]) -> None:
    assert first["status"] == "done" and first["metrics"]
    assert not (folder / "storage").exists()  # nothing was written beside the object store
    assert first["requests"] <= MAX_REQUESTS


def test_the_second_run_reuses_what_is_stored(
    server: S3Server, folder: Path, first: dict[str, Any], start_sweep: Any
) -> None:
    server.reset()
    sweep = start_sweep(folder, *ARGUMENTS)
    assert sweep.finish() == 0 and "started here" not in sweep.output, sweep.output
    again = json.loads((folder / "runs/losses-shapes-smoke/losses__sup+semi__s0/result.json").read_text())
    assert again["metrics"] == first["metrics"]
    print(dict(server.requests), server.paths.most_common(30))
    assert server.requests.total() <= MAX_REQUESTS_STORED


def test_the_report_and_the_student_are_read_from_there(
    server: S3Server, folder: Path, first: dict[str, Any], tmp_path: Path
) -> None:
    run("-m", "cast_ray", "report", str(folder / "runs/losses-shapes-smoke"))
    (student,) = [s["artifact"] for s in first["stages"] if s["name"] == "distill"]
    assert student.startswith(STORAGE)
    drawn = server.filesystem().get_file_info(fs.FileSelector(f"{BUCKET}/storage/datasets", recursive=True))
    images = [f"s3://{file.path}" for file in drawn if file.extension in ("png", "jpg")][:3]
    run("-m", "cast_ray", "predict", *images, "--student", student, "--out", str(tmp_path), "--device", "cpu")
    assert len(json.loads((tmp_path / "images.json").read_text())["images"]) == len(images) == 3


def test_the_store_is_listed_shown_and_pruned(first: dict[str, Any]) -> None:
    assert "artifacts" in run("-m", "cast_ray", "store", "ls", "--storage", STORAGE)
    (key,) = [s["fingerprint"] for s in first["stages"] if s["name"] == "distill"]
    assert key in run("-m", "cast_ray", "store", "show", key, "--storage", STORAGE)
    assert "pruned" in run("-m", "cast_ray", "store", "gc", "--yes", "--storage", STORAGE)
    assert key in run("-m", "cast_ray", "store", "show", key, "--storage", STORAGE)  # of a result that is there
