"""`cast-ray export` to files for other runtimes: what is written, checked, refused and left alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cast_ray.cli import export, predict
from cast_ray.contracts.records import Category
from cast_ray.inference.exported import ExportedStudent
from cast_ray.models import export as export_module
from cast_ray.models.segmenter import build_segmenter
from cast_ray.models.student import Student
from cast_ray.recipe import EncoderConfig, ModelConfig

onnxruntime = pytest.importorskip("onnxruntime", reason="optional extra `export`")

ROOT = Path(__file__).parents[3]
SIZE, NUM = (32, 48), 6
SIZES = [(40, 60), (64, 32), (20, 20), (33, 97)]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved student with random weights, whose scores and masks are spread."""
    config = ModelConfig(
        encoder=EncoderConfig(name="conv", widths=(8, 16, 16, 16), stem_stride=2),
        hidden_dim=16, num_queries=5, num_layers=1, num_heads=2, feedforward_dim=16, decoder_layers=1, proposals=False,
    )  # fmt: skip
    segmenter = build_segmenter(config, 2, seed=1)
    with torch.no_grad():
        for parameter in segmenter.head.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    folder = tmp_path_factory.mktemp("saved") / "student"
    Student(segmenter, [Category(5, "disc"), Category(9, "bar")], SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes, whose truth is the file that `predict` writes for them."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / "photos" / f"{i}.png")
    command = [str(folder / "photos"), "--student", str(student), "--threshold", "0", "--no-overlays"]
    assert predict.main([*command, "--max-detections", str(NUM), "--out", str(folder / "found")]) == 0
    for name in ("found.json", "val.json"):
        shutil.copy(folder / "found" / "images.json", folder / "photos" / name)
    return folder / "photos"


@pytest.fixture(autouse=True)
def _one_graph(student: Path, graphs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph, which takes most of the time, is made once: it is the same in every test here."""
    make = export_module._graph

    def graph(*arguments: Any) -> Any:
        if not graphs:
            graphs["made"] = make(*arguments)
        return graphs["made"]

    monkeypatch.setattr(export_module, "_graph", graph)


@pytest.fixture(scope="module")
def graphs() -> dict[str, Any]:
    return {}


def run(*arguments: object) -> int:
    return export.main([str(a) for a in (*arguments, "--max-detections", NUM)])


def checks(data: Path) -> tuple[object, ...]:
    settings = ("annotations=found.json", "val_annotations=val.json", "image_dir=.", "val_image_dir=.")
    return ("--check", data, "--format", "coco", *(f"--set=data.{setting}" for setting in settings))


def test_every_precision_is_run_on_the_validation_images(
    student: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(student, folder)
    for precision, most in (("fp32", 0.01), ("fp16", 5.0), ("int8", 60.0)):
        calibrate = ("--calibrate", data) if precision == "int8" else ()
        out = folder / f"{precision}.onnx"
        options = ("--precision", precision, *calibrate, "--max-drop", most)
        assert run("--student", folder, "--out", out, *options, *checks(data)) == 0, capsys.readouterr().err
        assert "AP" in capsys.readouterr().out
    exports = json.loads((folder / "export.json").read_text())["exports"]
    assert exports.keys() == {"fp32.onnx", "fp16.onnx", "int8.onnx"}
    card = (folder / "README.md").read_text()
    assert card.count("## Exported files") == 1 and card.index("## Exported files") < card.index("## Use")
    for name, facts in exports.items():
        check = facts["check"]
        assert facts["bytes"] == (folder / name).stat().st_size and check["images"] == len(SIZES)
        assert check["reference_ap"] == pytest.approx(100, abs=0.01)
        assert check["difference"] == pytest.approx(check["mask_ap"] - check["reference_ap"], abs=2e-3)
        low, high = check["interval"]
        assert low <= check["difference"] <= high
        assert check["latency_ms"] > 0 and check["images_per_s"] > 0 and "no GPU" in check["device"]
        assert check["runtime"].startswith("onnxruntime ")
        assert f"| `{name}` | onnx | {facts['precision']} |" in card
    assert exports["fp32.onnx"]["check"]["mask_ap"] == pytest.approx(100, abs=0.01)
    sizes = [exports[f"{precision}.onnx"]["bytes"] for precision in ("fp32", "fp16", "int8")]
    assert sizes[1] < sizes[0]
    facts = ExportedStudent(folder / "int8.onnx").facts
    assert facts["precision"] == "int8" and facts["category_ids"] == [5, 9] and facts["score_threshold"] == 0.3
    assert facts["preprocessing"]["image_mean"] and facts["class_names"] == ["disc", "bar"]


def test_a_file_that_finds_too_little_replaces_nothing(
    student: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.onnx"
    assert run("--student", student, "--out", out, *checks(data)) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"s.onnx", "export.json"}
    monkeypatch.setattr(ExportedStudent, "predict", lambda self, images, *rest: [[] for _ in images])
    assert run("--student", student, "--out", out, *checks(data), "--max-drop", "0.5") == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "the exported file's AP falls by 100.00, from 100.00 to 0.00: expected at most --max-drop 0.5" in error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_example_without_cast_ray_finds_what_predict_finds(student: Path, data: Path, tmp_path: Path) -> None:
    script = ROOT / "examples" / "exported_student.py"
    assert "import cast_ray" not in script.read_text() and "from cast_ray" not in script.read_text()
    assert run("--student", student, "--out", tmp_path / "s.onnx") == 0
    document = json.loads((data / "found.json").read_text())
    for image in document["images"]:
        command = [sys.executable, "-I", str(script), str(tmp_path / "s.onnx"), str(data / image["file_name"])]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        names = {c["id"]: c["name"] for c in document["categories"]}
        wanted = [a for a in document["annotations"] if a["image_id"] == image["id"] and a["score"] >= 0.3]
        assert len(printed) == len(wanted) > 0
        for line, a in zip(printed, sorted(wanted, key=lambda a: -a["score"])):
            name, score = line.split()[:2]
            assert name == names[a["category_id"]] and float(score) == pytest.approx(a["score"], abs=5e-3)
            (area,) = re.findall(r"(\d+) px", line)
            assert int(area) == pytest.approx(a["area"], rel=0.02, abs=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "s.onnx", "--precision", "int8"], "--precision int8: expected --calibrate IMAGES with it"),
        (["--out", "s.onnx", "--calibrate", "x"], "--calibrate: expected --precision int8 with it"),
        (["--out", "s", "--precision", "fp16"], "--precision fp16: expected --out FILE.onnx or FILE.xml with it"),
        (["--out", "s", "--check"], "--check: expected --out FILE.onnx or FILE.xml with it"),
        (["--out", "s.onnx", "--max-drop", "1"], "--max-drop 1.0: expected --check with it"),
        (["--out", "s.onnx", "--to", "openvino"], "--to openvino: expected --out FILE.xml with it"),
        (["--out", "s.onnx", "--check"], "--check: {student} is no row of a run"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert export.main(["--student", str(student), *arguments]) == 2
    assert f"error: {message.format(student=student)}" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_the_facts_of_something_else_stay(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "export.json").write_text('{"mine": 1}')
    assert run("--student", student, "--out", tmp_path / "s.onnx") == 2
    assert "holds something other than facts of `cast-ray export` (export.json)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["export.json"]


def test_a_class_that_the_data_lacks_is_named(
    student: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((data / "found.json").read_text())
    document["categories"][1]["name"] = "rod"
    shutil.copytree(data, tmp_path / "data")
    for name in ("found.json", "val.json"):
        (tmp_path / "data" / name).write_text(json.dumps(document))
    assert run("--student", student, "--out", tmp_path / "s.onnx", *checks(tmp_path / "data")) == 2
    assert "the validation images have no class bar: expected those of the student" in capsys.readouterr().err
    assert not (tmp_path / "s.onnx").exists()


def test_openvino_finds_what_the_student_finds(student: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="optional extra `openvino`")
    out = tmp_path / "s.xml"
    assert run("--student", student, "--out", out, "--to", "openvino", *checks(data)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "s.bin", "s.xml"]
    exported = ExportedStudent(out)
    assert exported.facts["class_names"] == ["disc", "bar"] and exported.facts["precision"] == "fp32"
