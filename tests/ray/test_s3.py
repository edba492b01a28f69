"""A sweep whose storage is an object store: everything that works on a folder works there, with few requests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs
from s3_server import BUCKET, S3Server

from cast_ray.plan.graph import fingerprint_of

pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).parents[2]
STORAGE, RUNS = f"s3://{BUCKET}/storage", f"s3://{BUCKET}/runs"
RESULT = "losses__sup+semi__s0/result.json"
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
    *("--rows", "sup+semi"),
    *(part for setting in SETTINGS for part in ("--set", setting)),
]
MAX_REQUESTS, MAX_REQUESTS_STORED = 900, 180
"""The latter with results and report that are sent to the object store, too."""


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
    sweep = start_sweep(folder, *ARGUMENTS, "--storage", STORAGE)
    assert sweep.finish() == 0, sweep.output
    result = json.loads((folder / "runs/losses-shapes-smoke" / RESULT).read_text())
    print(dict(server.requests), server.paths.most_common(60))
    return result | {"requests": server.requests.total(), "output": sweep.output}


def read_bytes(server: S3Server, uri: str) -> bytes:
    with server.filesystem().open_input_file(uri.removeprefix("s3://")) as file:
        return file.read()


def names(server: S3Server, folder: str) -> list[str]:
    found = server.filesystem().get_file_info(
        fs.FileSelector(f"{BUCKET}/{folder}", recursive=True, allow_not_found=True)
    )
    return [info.path for info in found if info.is_file]


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_sweep_runs_with_few_requests(server: S3Server, folder: Path, first: dict[str, Any]) -> None:
    assert first["status"] == "done" and first["metrics"]
    assert not (folder / "storage").exists()  # nothing was written beside the object store
    assert first["requests"] <= MAX_REQUESTS


def test_the_second_run_reuses_what_is_stored_and_leaves_its_report_there(
    server: S3Server, tmp_path: Path, first: dict[str, Any], start_sweep: Any
) -> None:
    server.reset()
    sweep = start_sweep(tmp_path, *ARGUMENTS, "--storage", STORAGE, "--out", RUNS)
    assert sweep.finish() == 0 and "started here" not in sweep.output, sweep.output
    print(dict(server.requests), server.paths.most_common(30))
    assert server.requests.total() <= MAX_REQUESTS_STORED
    assert list(tmp_path.iterdir()) == []
    place = f"{RUNS}/losses-shapes-smoke"
    again = json.loads(read_bytes(server, f"{place}/{RESULT}"))
    assert again["metrics"] == first["metrics"] and read_bytes(server, f"{place}/report.html")
    assert f"Report: {place}/report.html" in sweep.output
    assert f"Fetch it to your machine: cast-ray report {place} --out losses-shapes-smoke" in sweep.output
    run("-m", "cast_ray", "report", place, "--out", str(tmp_path / "copy"))
    assert (tmp_path / "copy/report.md").read_bytes() == read_bytes(server, f"{place}/report.md")


def test_the_report_and_the_student_are_read_from_there(
    server: S3Server, folder: Path, first: dict[str, Any], tmp_path: Path
) -> None:
    run("-m", "cast_ray", "report", str(folder / "runs/losses-shapes-smoke"))
    # The store has the results, too; a command that was killed has left no more.
    assert f"Report: {STORAGE}/runs/losses-shapes-smoke/report.html" in run(
        "-m", "cast_ray", "report", f"{STORAGE}/runs/losses-shapes-smoke"
    )
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


@pytest.mark.slow
def test_two_commands_at_once_resume_one_that_was_killed(
    server: S3Server, first: dict[str, Any], start_sweep: Any, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    """Another store: every stage is run again, once, and the numbers are those of the undisturbed sweep."""
    storage = f"s3://{BUCKET}/second"
    killed = start_sweep(tmp_path, *ARGUMENTS, "--storage", storage)

    def manifests() -> list[str]:
        return [name for name in names(server, "second/artifacts") if name.endswith("manifest.json")]

    wait_until(lambda: any("/train-" in name for name in manifests()), f"nothing was trained: {killed.output}")
    killed.kill()
    wait_until(lambda: not killed.processes(), f"processes left behind: {killed.processes()}", 120)
    before = set(manifests())
    assert len(before) < len(first["stages"]) and names(server, "second/claims")

    sweeps = {
        name: start_sweep(tmp_path, *ARGUMENTS, "--storage", storage, "--out", RUNS, "--name", name)
        for name in ("one", "two")
    }
    ran: Counter[str] = Counter()
    for name, sweep in sweeps.items():
        assert sweep.finish() == 0, sweep.output
        result = json.loads(read_bytes(server, f"{RUNS}/{name}/{RESULT}"))
        assert result["metrics"] == first["metrics"]
        ran.update(stage["fingerprint"] for stage in result["stages"] if not stage["reused"])
    assert before <= set(manifests()) and set(ran.values()) == {1}
    kept = {fingerprint_of(name.split("/")[-2]) for name in before}
    assert ran.keys().isdisjoint(kept) and len(ran) == len(first["stages"]) - len(kept & stages_of(first))

    run("-m", "cast_ray", "store", "gc", "--yes", "--storage", storage)
    for folder in ("labels", "refresh", "validations", "claims", "train", "checkpoints"):
        assert names(server, f"second/{folder}") == [], folder


def stages_of(result: dict[str, Any]) -> set[str]:
    return {stage["fingerprint"] for stage in result["stages"]}
