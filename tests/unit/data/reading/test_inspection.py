"""cast-ray inspect: counts, bad files by name, a picture, one line for what is no dataset."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from coco_folders import annotation, coco_document, image_entry, valid_document, write_coco
from dataset_folders import write_ade20k, write_cityscapes
from PIL import Image

from cast_ray.cli.inspect import main
from cast_ray.data.reading.inspection import choose_samples, facts_of, guess_format
from cast_ray.data.reading.reader import load
from cast_ray.recipe import DataConfig

ROOT = Path(__file__).parents[4]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main([*arguments, "--out", str(tmp_path / "out")])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_facts(tmp_path):
    dataset, _ = load(
        DataConfig(format="cityscapes", root=str(write_cityscapes(tmp_path, num_extra=2)), unlabelled_pool="both")
    )
    train, val, extra = facts_of(dataset)
    assert (train.name, train.num_images, train.num_empty, train.num_objects, train.num_crowds) == (
        "train",
        8,
        0,
        24,
        8,
    )
    assert train.objects_by_class.tolist() == [8, 0, 16, 0, 0, 0, 0, 0] and train.images_by_class.tolist()[2] == 8
    assert train.areas == (24, 0, 0) and train.sizes == {(24, 32): 8}
    assert (val.num_images, val.num_objects) == (4, 12)
    assert (extra.num_images, extra.num_empty, extra.num_objects) == (2, 2, 0)
    first = choose_samples(dataset.train, 3)
    assert first == choose_samples(dataset.train, 8)[:3] and len({r["image_id"] for r in first}) == 3


def test_classes_of_one_name(tmp_path, run):
    categories = [{"id": 0, "name": "fish"}, {"id": 1, "name": "crab"}, {"id": 9, "name": "fish"}]
    images = [{"id": n, "file_name": f"{n}.png", "height": 8, "width": 8} for n in range(3)]
    square = [[1, 1, 6, 1, 6, 6, 1, 6]]
    annotations = [{"id": n, "image_id": n, "category_id": 9, "segmentation": square} for n in range(3)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "data").mkdir()
    (tmp_path / "data/instances.json").write_text(json.dumps(document))
    for image in images:
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / image["file_name"])
    code, out, _ = run(str(tmp_path / "data"))
    assert code == 0 and "fish (id 0)" in out and "fish (id 9)" in out


def test_markup_in_names_is_text(tmp_path, run):
    names = ["[/red]", "[bold]b[/bold]", ":car:"]
    document = coco_document([image_entry(i) for i in range(3)], [annotation(i, i) for i in range(3)], enumerate(names))
    document["annotations"] = [a | {"category_id": i} for i, a in enumerate(document["annotations"])]
    code, out, _ = run(str(write_coco(tmp_path / "data 🙂: [/red] :car:", document)))
    assert code == 0 and f"{tmp_path}/data 🙂: [/red] :car:: coco, 3 classes" in out
    cells = [line.split()[:2] for line in out.splitlines()]
    assert all([str(i), name] in cells for i, name in enumerate(names))


def test_an_image_of_more_objects_than_pycocotools_counts_in_a_call(tmp_path, run):
    """Cell images have hundreds. Sizes are those of the annotations, as in AP by size."""
    size, areas = (40, 60), {1: 2000, 2: 10_000}
    boxes = [[x, y, x + 2, y, x + 2, y + 2, x, y + 2] for x in range(0, 60, 3) for y in range(0, 40, 2)][:375]
    annotations = [
        {"id": n, "image_id": n % 2, "category_id": 1, "segmentation": [box], "area": areas.get(n, 4)}
        for n, box in enumerate([*boxes, *boxes])
    ]
    images = [{"id": n, "file_name": f"{n}.png", "height": size[0], "width": size[1]} for n in range(2)]
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}
    (tmp_path / "data").mkdir()
    (tmp_path / "data/instances.json").write_text(json.dumps(document))
    for image in images:
        Image.new("RGB", size[::-1]).save(tmp_path / "data" / image["file_name"])
    code, out, _ = run(str(tmp_path / "data"))
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    counts = [line[3:8] for line in lines if line[:1] in (["train"], ["val"])]
    assert np.array(counts, dtype=int).sum(0).tolist() == [750, 0, 748, 1, 1]


def test_cityscapes(tmp_path, run):
    root = write_cityscapes(tmp_path / "data")
    path = next(root.glob("leftImg8bit/train/ulm/*"))
    path.write_bytes(path.read_bytes()[:-40])
    code, out, _ = run(str(root))
    assert code == 1  # a run would refuse it
    lines = [line.split() for line in out.splitlines()]
    assert ["train", "7", "0", "21", "7", "21", "0", "0", "32", "x", "24"] in lines
    assert ["26", "car", "14", "7", "8", "4"] in lines and ["31", "train", "0", "0", "0", "0"] in lines
    assert "1 of 12 images and 0 of 55 annotations skipped" in out
    assert f"train image {path.name[:17]} (leftImg8bit/train/ulm/{path.name}): cannot be decoded" in out.replace(
        "\n", ""
    )
    assert "A run would refuse it: " in out and "above data.max_bad_fraction=0.01" in out
    assert json.loads((tmp_path / "out/data_report.json").read_text())["splits"]["train"]["images_skipped"] == 1
    code, out, _ = run(str(root), "--set", "data.max_bad_fraction=0.5")
    assert code == 0 and "1 of 12 images" in out and "A run would refuse it" not in out
    with Image.open(tmp_path / "out/samples.png") as sheet:
        assert sheet.width > 3 * 128 and sheet.height > 6 * 96  # image, objects and ignore regions, six times


def test_ade20k_and_settings(tmp_path, run):
    root = write_ade20k(tmp_path / "data")
    code, out, _ = run(str(root), "--images", "1", "--set", "data.verify=header")
    assert code == 0 and "ade20k, 100 classes" in out and "8 of" not in out
    assert json.loads((tmp_path / "out/data_report.json").read_text())["verify"] == "header"
    assert guess_format(str(root)) == "ade20k" and guess_format(str(tmp_path)) == "coco"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/none"], "error: data.root: {}/none does not exist"),
        (["{}"], "error: {}: no annotation file found"),
        (["{}", "--format", "cityscapes"], "error: {}: no leftImg8bit/train"),
        (
            ["{}", "--set", "loss.lambda_pxl=1"],
            "error: --set loss.lambda_pxl: expected a key of the recipe's data part",
        ),
        (["{}", "--set", "data.verfy=none"], "error: unknown recipe key 'data.verfy': did you mean 'data.verify'?"),
    ],
)
def test_what_is_no_dataset(tmp_path, run, arguments, message):
    code, out, err = run(*(a.format(tmp_path) for a in arguments))
    assert code == 2 and out == "" and err.startswith(message.format(tmp_path)) and err.count("\n") == 1


def test_a_folder_of_unusable_images_only_is_refused_with_the_reason(tmp_path, run):
    root = write_coco(tmp_path / "data", valid_document())
    for path in (root / "images").iterdir():
        path.write_bytes(b"no image")
    code, out, err = run(str(root))
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "no usable image of " in err and ".png): not an image of a known format" in err


def test_as_a_user_types_it(tmp_path):
    root = write_ade20k(tmp_path / "my data")
    command = [sys.executable, "-m", "cast_ray.datasets", "inspect", str(root)]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "inspect/my data/samples.png").is_file()
    loaded = "import sys, cast_ray.cli.inspect; assert not {'ray', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", loaded], env={"PYTHONPATH": str(ROOT)}, check=True)
