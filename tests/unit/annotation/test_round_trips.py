"""`cast-ray annotate`: there and back, what a person changed, and exports that are not as they should be."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import annotation_scenes
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from cast_ray.cli.main import main
from cast_ray.data.reading.reader import load
from cast_ray.recipe import build_recipe

TOOLS = ("coco", "cvat", "label-studio", "yolo")
BY_LIBRARIES = Path(__file__).parents[2] / "data/annotation_tools"
EDITED = {"with a changed mask": 1, "of a changed class": 1, "added": 1, "deleted": 1}


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    return annotation_scenes.write_labels(tmp_path)


def export(labels: Path, tool: str, *options: str) -> Path:
    out = labels.parent / f"to-{tool}"
    assert main(["annotate", "export", str(labels), "--to", tool, "--out", str(out), *options]) == 0
    return out


def bring(export: Path, against: Path, *options: str) -> tuple[int, Path]:
    out = against.parent / "back"
    return main(["annotate", "import", str(export), "--against", str(against), "--out", str(out), *options]), out


def counts(back: Path) -> dict[str, int]:
    report = json.loads((back / "import.json").read_text())
    return {kind: number for kind, number in report["counts"].items() if number}


def dataset(back: Path) -> dict[str, Any]:
    return json.loads((back / "instances.json").read_text())


def mask_of(annotation: dict[str, Any]) -> np.ndarray:
    return coco_mask.decode(annotation["segmentation"]).astype(bool)


def untouched(out: Path, tool: str) -> Path:
    """What a tool exports where nobody has changed anything, after its documentation."""
    if tool == "cvat":
        return out / "cvat.zip"
    if tool == "label-studio":
        tasks = json.loads((out / "tasks.json").read_text())
        for number, task in enumerate(tasks):
            result = task["predictions"][0]["result"]
            task |= {"id": number, "annotations": [{"id": number, "result": result, "was_cancelled": False}]}
        (out / "export.json").write_text(json.dumps(tasks))
        return out / "export.json"
    return out


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("shapes", ["masks", "polygons"])
def test_what_nobody_changed_comes_back_as_it_was(
    labels: Path, tool: str, shapes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if (tool, shapes) == ("yolo", "masks"):
        assert main(["annotate", "export", str(labels), "--to", tool, "--shapes", shapes, "--out", "x"]) == 2
        assert "hold polygons only" in capsys.readouterr().err
        return
    out = export(labels, tool, "--shapes", shapes)
    assert ("as polygons: " in capsys.readouterr().out) == (shapes == "polygons")
    code, back = bring(untouched(out, tool), out)
    assert code == 0
    assert counts(back) == {"unchanged": 5}
    before, after = json.loads((labels / "instances.json").read_text()), dataset(back)
    assert after["categories"] == before["categories"]
    assert after["images"] == before["images"]
    facts = ("id", "image_id", "category_id", "segmentation")
    assert [[a[f] for f in facts] for a in after["annotations"]] == [
        [a[f] for f in facts] for a in before["annotations"]
    ]
    for name in annotation_scenes.SIZES:
        assert (back / "images" / name).read_bytes() == (labels.parent / "photos" / name).read_bytes()


@pytest.mark.parametrize("tool", ["cvat", "label-studio", "yolo"])
def test_what_the_libraries_of_the_tools_wrote_is_counted_and_read(
    labels: Path, tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = export(labels, tool)
    place = BY_LIBRARIES / tool
    code, back = bring(place / "export.json" if tool == "label-studio" else place, out)
    assert code == 0
    # supervision draws polygons with their outline, which is a pixel wider
    kind = "with an outline within 1 pixel" if tool == "yolo" else "unchanged"
    assert counts(back) == {kind: 2, **EDITED}
    assert "cast-ray ablate main --preset coco --set data.root=" in capsys.readouterr().out
    by_id = {a["id"]: a for a in dataset(back)["annotations"]}
    assert sorted(by_id) == [1, 2, 4, 5, 6]
    assert (by_id[4]["category_id"], by_id[6]["category_id"], by_id[6]["image_id"]) == (3, 18, 12)
    if tool != "yolo":
        assert mask_of(by_id[6]).sum() == 10 * 14
        assert (mask_of(by_id[1]) == annotation_scenes.masks()[0][2]).all()
    assert mask_of(by_id[5])[14:30, 22:43].all()  # supervision loses the last row and column
    recipe = build_recipe("coco", "smoke", {"data.root": str(back), "data.label_fraction": 1, "data.val_fraction": 0.5})
    assert sum(table.num_rows for table in (load(recipe.data)[0].train, load(recipe.data)[0].val)) == 3


def test_chosen_images_and_photos_without_labels(labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = labels.parent / "chosen.txt"
    chosen.write_text(f"a.png\n\n{labels.parent / 'photos/c.png'}\n")
    out = export(labels, "coco", "--images", str(chosen))
    assert [i["name"] for i in json.loads((out / "exported.json").read_text())["images"]] == ["sub/a.png", "c.png"]
    chosen.write_text("b.pmg\n")
    command = ["annotate", "export", str(labels), "--to", "coco", "--out", "x", "--images", str(chosen)]
    assert main(command) == 2
    assert "line 1: 'b.pmg' is not in the label file: did you mean 'b.png'?" in capsys.readouterr().err
    photos, new = str(labels.parent / "photos"), str(labels.parent / "new")
    assert main(["annotate", "export", photos, "--classes", "cat", "--to", "label-studio", "--out", new]) == 0
    assert "3 images with 0 objects" in capsys.readouterr().out


def test_photos_that_are_not_there_or_of_another_size(labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move(labels.parent / "photos", labels.parent / "moved")
    command = ["annotate", "export", str(labels), "--to", "coco", "--out", str(labels.parent / "x")]
    assert main(command) == 2
    assert "3 of 3 photos cannot be used" in (error := capsys.readouterr().err) and "--photos" in error
    assert not (labels.parent / "x").exists()
    assert main([*command, "--photos", str(labels.parent / "moved")]) == 0
    shutil.copy(labels.parent / "moved/c.png", labels.parent / "moved/b.png")
    assert main([*command[:-1], str(labels.parent / "y"), "--photos", str(labels.parent / "moved")]) == 2
    assert "b.png" in capsys.readouterr().err


def test_regions_are_kept_though_no_tool_is_shown_them(labels: Path) -> None:
    document = json.loads((labels / "instances.json").read_text())
    document["annotations"][2]["iscrowd"] = 1
    (labels / "instances.json").write_text(json.dumps(document))
    out = export(labels, "cvat")
    _, back = bring(out / "cvat.zip", out)
    assert counts(back) == {"unchanged": 4}
    (region,) = [a for a in dataset(back)["annotations"] if a["iscrowd"]]
    assert (mask_of(region) == annotation_scenes.masks()[2][2]).all()


def test_images_of_equal_names_without_suffix_stay_apart(labels: Path) -> None:
    document = json.loads((labels / "instances.json").read_text())
    shutil.move(labels.parent / "photos/c.png", labels.parent / "photos/b.PNG")
    document["images"][2]["file_name"] = "b.PNG"
    (labels / "instances.json").write_text(json.dumps(document))
    for tool in ("yolo", "cvat"):
        out = export(labels, tool)
        _, back = bring(untouched(out, tool), out)
        assert counts(back) == {"unchanged": 5}
        assert [i["id"] for i in dataset(back)["images"]] == [7, 9, 12]
        shutil.rmtree(back)


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], Path]:
    """A CVAT export in which `change` has edited the COCO document."""

    def edit(out: Path) -> Path:
        with zipfile.ZipFile(out / "cvat.zip") as file:
            document = json.loads(file.read("annotations/instances_default.json"))
        change(document)
        (out / "export/annotations").mkdir(parents=True)
        (out / "export/annotations/instances_default.json").write_text(json.dumps(document))
        return out / "export"

    return edit


def set_(part: str, index: int, **values: Any) -> Callable[[Path], Path]:
    return edited(lambda document: document[part][index].update(values))


BAD = {
    "a renamed image": (
        set_("images", 1, file_name="bb.png"),
        "image 'bb.png' was not exported: did you mean 'b.png'?",
    ),
    "an image of another size": (set_("images", 1, width=50), "image 'b.png' is 50 x 33 pixels: expected 47 x 33"),
    "an image twice": (set_("images", 1, file_name="sub/a.png"), "image 'sub/a.png' is there for the second time"),
    "a polygon outside": (
        set_("annotations", 3, segmentation=[[90, 90, 95, 90, 95, 95]]),
        "annotation 4 of image 'b.png': polygon covers no pixel",
    ),
    "an annotation without a mask": (set_("annotations", 3, segmentation=[]), "annotation 4 of image 'b.png': no segm"),
    "an annotation of no image": (set_("annotations", 3, image_id=99), "annotation 4: image_id is 99: no such image"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_named_and_nothing_is_lost(
    labels: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, words = BAD[name]
    out = export(labels, "cvat")
    came = edit(out)
    code, back = bring(came, out)
    error = capsys.readouterr().err
    assert code == 2
    assert words in error and "Nothing was written" in error and error.count("\n") == 1
    assert not back.exists()
    code, back = bring(came, out, "--skip-bad")
    assert code == 0
    assert words in capsys.readouterr().err
    report = json.loads((back / "import.json").read_text())
    assert any(words in fault for fault in report["faults"])
    again = (back / "not_imported.txt").read_text().split() if (back / "not_imported.txt").exists() else []
    assert sorted([*report["images"], *again]) == sorted(annotation_scenes.SIZES)


def test_a_polygon_that_reaches_outside_is_cut_off_and_counted(
    labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = export(labels, "cvat")
    came = set_("annotations", 4, segmentation=[[25, 20, 60, 20, 60, 31, 25, 31]])(out)
    code, back = bring(came, out)
    assert code == 0
    assert "1 objects reach outside their image and were cut off" in capsys.readouterr().out
    assert mask_of(dataset(back)["annotations"][4]).sum() == (47 - 25) * 11


def test_a_class_that_was_added_is_kept_and_named(labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(document: dict[str, Any]) -> None:
        document["categories"].append({"id": 40, "name": "Dog"})
        document["annotations"][0]["category_id"] = 40

    out = export(labels, "cvat")
    code, back = bring(edited(change)(out), out)
    assert code == 0
    error = capsys.readouterr().err
    assert "class 'Dog' was added in the tool (1 objects): did you mean 'dog'?" in error
    assert dataset(back)["categories"][-1] == {"id": 19, "name": "Dog"}
    assert dataset(back)["annotations"][0]["category_id"] == 19
    assert counts(back) == {"unchanged": 4, "of a changed class": 1}


def test_images_without_an_answer_are_not_taken_for_empty_ones(
    labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = export(labels, "label-studio")
    tasks = json.loads(untouched(out, "label-studio").read_text())
    tasks[0]["annotations"] = []
    tasks[1]["annotations"][0]["was_cancelled"] = True
    (out / "export.json").write_text(json.dumps(tasks))
    code, back = bring(out / "export.json", out)
    assert code == 0
    assert "1 images imported, 2 not finished by a person" in capsys.readouterr().out
    assert (back / "not_imported.txt").read_text() == "sub/a.png\nb.png\n"
    assert counts(back) == {}
    shutil.rmtree(back)
    out = export(labels, "yolo")
    (out / "labels/train/b.txt").unlink()
    bring(out, out)
    assert "2 images imported, 1 not in the export" in capsys.readouterr().out


WHOLE = {
    "no folder": (lambda out: out / "nothing", "no such file or folder"),
    "a folder of something else": (lambda out: out.parent / "photos", "no export of an annotation tool"),
    "half a zip file": (lambda out: cut(out / "cvat.zip", 0.5), "the file is not whole"),
    "half a JSON file": (
        lambda out: cut(set_("images", 0)(out) / "annotations/instances_default.json", 0.5),
        "not JSON",
    ),
}


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


@pytest.mark.parametrize("name", WHOLE)
def test_an_export_that_cannot_be_read_is_one_line(labels: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    place, words = WHOLE[name]
    out = export(labels, "cvat")
    code, back = bring(place(out), out)
    error = capsys.readouterr().err
    assert (code, back.exists(), error.count("\n")) == (2, False, 1)
    assert words in error


def test_a_folder_that_holds_something_is_not_written_over(labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = export(labels, "coco")
    assert main(["annotate", "export", str(labels), "--to", "yolo", "--out", str(out)]) == 2
    assert "expected a new folder" in capsys.readouterr().err
    assert main(["annotate", "import", str(out), "--against", str(labels), "--out", str(out / "x")]) == 2
    assert "exported.json" in capsys.readouterr().err
