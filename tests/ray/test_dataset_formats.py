"""Cityscapes and ADE20K folders through the command: plan, refusals, the whole path; and the read on a real Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from dataset_folders import write_ade20k, write_ade20k_full, write_cityscapes
from rich.console import Console

from cast_ray.cli import ablate
from cast_ray.data.formats.cityscapes import index
from cast_ray.data.reading.reader import Reading, in_threads
from cast_ray.recipe import DataConfig
from cast_ray.runtime.cluster import Cluster
from cast_ray.runtime.data import dataset as dataset_module
from cast_ray.runtime.sweep import run as sweep_module

WRITERS: dict[str, tuple[Callable[..., Path], int]] = {
    "cityscapes": (write_cityscapes, 8),
    "ade20k": (write_ade20k, 100),
}
"""Preset -> what writes a folder of 8 training and 4 validation images, and the number of classes."""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command, without Ray: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAST_RAY_STORAGE", raising=False)
    monkeypatch.setattr(sweep_module, "connect", lambda *_: pytest.fail("Ray was started"))

    def call(preset: str, root: Path, *settings: str) -> tuple[int, str, str]:
        pairs = [f"data.root={root}", *settings]
        arguments = ["losses", "--preset", preset, "--scale", "smoke", "--dry-run"]
        code = ablate.main([*arguments, *(part for pair in pairs for part in ("--set", pair))])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize("preset", WRITERS)
def test_a_plan_of_every_format(tmp_path: Path, run: Run, preset: str) -> None:
    write, num_classes = WRITERS[preset]
    code, out, err = run(preset, write(tmp_path / "data"))
    assert code == 0, err
    assert "8 train, 4 val" in out and f"{num_classes} classes" in out
    assert "stages " in out and "0 found in the store" in out


def test_a_plan_of_full_ade20k_and_of_extra_images(tmp_path: Path, run: Run) -> None:
    code, out, err = run("ade20k", write_ade20k_full(tmp_path / "full"), "data.label_fraction=0.5")
    assert code == 0 and "6 train, 2 val, 100 classes" in out, err
    root = write_cityscapes(tmp_path / "cs", num_extra=5)
    code, out, err = run("cityscapes", root, "data.unlabelled_pool=both", "data.label_fraction=1")
    assert code == 0 and "8 train + 5 extra, 4 val" in out, err


def cut_short(root: Path) -> None:
    for path in list(root.glob("leftImg8bit/train/*/*.png"))[:3]:
        path.write_bytes(path.read_bytes()[:-60])


def without_masks(root: Path) -> None:
    for path in root.glob("gtFine/train/*/*_instanceIds.png"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (
            cut_short,
            [],
            ["(train: gtFine/train)", "3 of 8 images skipped", "data.max_bad_fraction=0.01", "cannot be decoded"],
        ),
        (without_masks, [], ["no gtFine/train/<city>", "Cityscapes as downloaded"]),
        (None, ["data.max_image_pixels=700"], ["8 of 8 images skipped", "at most 700", "data.max_image_pixels"]),
        (None, ["data.label_fraction=0.01"], ["0 labelled images", "per worker"]),
        (None, ["data.label_family=list"], ["data.label_list is empty"]),
        (
            None,
            ["data.label_family=list", "data.label_list=gone.txt"],
            ["data.label_list", "gone.txt", "cannot be read"],
        ),
        (None, ["data.label_family=per-class", "data.min_per_class=5"], ["data.min_per_class=5", "gives 2"]),
        (None, ["data.unlabelled_pool=both"], ["data.unlabelled_pool", "leftImg8bit/train_extra"]),
        (
            None,
            ["data.unlabelled_pool=both", "contrastive.sampler=oracle"],
            ["contrastive.sampler", "data.unlabelled_pool=rest"],
        ),
    ],
)
def test_refusals_are_one_line(
    tmp_path: Path, run: Run, change: Callable[[Path], None] | None, settings: list[str], words: list[str]
) -> None:
    root = write_cityscapes(tmp_path / "data")
    if change:
        change(root)
    code, _, err = run("cityscapes", root, *settings)
    lines = err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    assert all(word in lines[0] for word in words), lines[0]
    assert not ray.is_initialized()


def test_a_few_bad_files_are_left_out_and_said(tmp_path: Path, run: Run) -> None:
    root = write_cityscapes(tmp_path / "data")
    cut_short(root)
    code, out, err = run("cityscapes", root, "data.max_bad_fraction=0.5", "data.label_fraction=0.5")
    assert code == 0, err
    assert "3 of 12 images and 0 of 45 annotations skipped (data_report.json), first: image" in out
    assert "5 train, 4 val" in out
    report = json.loads((tmp_path / "storage/runs/losses-cityscapes-smoke/data_report.json").read_text())
    assert [s["kind"] for s in report["skipped"]] == ["image"] * 3


@pytest.mark.parametrize("is_local", [True, False])
def test_ray_reads_what_threads_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_local: bool) -> None:
    config = DataConfig(format="cityscapes", root=str(write_cityscapes(tmp_path, num_train=150)), max_bad_fraction=0.5)
    cut_short(tmp_path)
    monkeypatch.setattr(dataset_module, "IN_THIS_PROCESS", 10)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    def connect() -> Cluster:
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        return Cluster("a Ray of this test", {"CPU": 2.0}, is_local=is_local)

    made = index(config)
    outcomes = []
    with dataset_module._readers(154, made, connect, Console()) as run_on_ray:
        assert isinstance(run_on_ray, partial)
        for run in (run_on_ray, in_threads):
            reading = Reading(made, config)
            rows = [(split, row) for split, table in reading.tables(run) for row in table.to_pylist()]
            outcomes.append((rows, reading.content_hash, reading.report()))
    assert not ray.is_initialized()
    assert outcomes[0] == outcomes[1]
    assert len(outcomes[0][0]) == 151 and len(outcomes[0][2]["skipped"]) == 3


def results_of(folder: Path, preset: str) -> dict[str, dict[str, Any]]:
    paths = (folder / f"runs/losses-{preset}-smoke").glob("*/result.json")
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("preset", WRITERS)
def test_the_whole_path(tmp_path: Path, start_sweep: Any, preset: str) -> None:
    extra = {"num_extra": 4} if preset == "cityscapes" else {}
    root = WRITERS[preset][0](tmp_path / "data", num_train=12, **extra)
    bad = next(root.glob("leftImg8bit/train/*/*.png" if extra else "images/training/*.jpg"))
    bad.write_bytes(bad.read_bytes()[:-60])
    settings = [f"data.root={root}", "data.max_bad_fraction=0.5", "pseudo.score_threshold=0.01"]
    settings += ["data.unlabelled_pool=both"] if extra else []
    sweep = start_sweep(
        tmp_path, "--preset", preset, *(p for s in settings for p in ("--set", s)), "--rows", "sup", "sup+semi+pxl"
    )
    assert sweep.finish() == 0, sweep.output
    results = results_of(tmp_path, preset)
    assert len(results) == 2 and all(r["status"] == "done" for r in results.values())
    data = results["losses__sup+semi+pxl__s0"]["dataset"]
    assert (data["num_train"], data["num_val"], data["skipped"], data["num_extra"]) == (11, 4, 1, 4 if extra else 0)
    assert data["split"]["family"] == "nested" and data["split"]["num_labelled"] == data["num_labelled"] == 3
    assert data["num_unlabelled"] == (12 if extra else 8) and data["split"]["num_extra"] == (4 if extra else 0)
    report = json.loads((tmp_path / f"runs/losses-{preset}-smoke/data_report.json").read_text())
    assert [s["id"] for s in report["skipped"]] == [bad.name.removesuffix("_leftImg8bit.png").removesuffix(".jpg")]
    assert "1 of " in sweep.output and (tmp_path / f"runs/losses-{preset}-smoke/samples.png").is_file()
