"""A split without one object is said in words, with the likely cause, wherever a user looks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_folders import annotation, coco_document, image_entry, valid_document, write_coco
from dataset_folders import write_cityscapes
from PIL import Image
from report_scenes import result, save
from rich.console import Console

from cast_ray.cli import ablate
from cast_ray.cli.inspect import main as inspect
from cast_ray.common import registry
from cast_ray.contracts.records import decode_image_id
from cast_ray.data.reading.reader import load
from cast_ray.plan.search import SearchSpec
from cast_ray.recipe import DataConfig, build_recipe
from cast_ray.report.results import summarise
from cast_ray.report.run_folder import read_results
from cast_ray.runtime.data.dataset import read_dataset
from cast_ray.runtime.data.splits import store_splits
from cast_ray.runtime.search import run as search
from cast_ray.runtime.store.artifacts import ArtifactStore


def warnings_of(root: Path, **fields: Any) -> list[str]:
    return load(DataConfig(format="coco", root=str(root), **fields))[1]["warnings"]


def write_splits(root: Path, train: dict[str, Any], val: dict[str, Any]) -> Path:
    write_coco(root, train, "annotations/instances_train.json", "train")
    return write_coco(root, val, "annotations/instances_val.json", "val")


def masks_for(num_masked: int, num_images: int) -> dict[str, Any]:
    """So many images, of which the first few have an object each."""
    document = valid_document(num_images)
    return document | {"annotations": document["annotations"][:num_masked]}


def test_a_split_of_crowds_only_is_said_with_the_likely_cause(tmp_path: Path) -> None:
    root = write_splits(tmp_path, valid_document(6, iscrowd=1), valid_document(2))
    (warning,) = warnings_of(root)
    assert warning.startswith("No object in the 6 training images (annotations/instances_train.json): all 6 usable")
    assert "data.crowds=objects" in warning and warning.endswith("Nothing can be learnt from them.")
    report = load(DataConfig(format="coco", root=str(root)))[1]
    counts = {split: (facts["objects"], facts["ignore_regions"]) for split, facts in report["splits"].items()}
    assert counts == {"train": (0, 6), "val": (2, 0)}


@pytest.mark.parametrize(
    ("annotations", "cause"),
    [
        ([], "there is no annotation. Their AP cannot be measured."),
        (
            [annotation(0, 0, segmentation=[])],
            "1 of 1 annotations were skipped: annotation 0 (0.png): no segmentation.",
        ),
        ([annotation(0, 1)], "all 1 annotations belong to images that were skipped."),
        (
            [annotation(0, 0, iscrowd=1), annotation(1, 0, iscrowd=-1)],
            "1 more annotations were skipped: annotation 1 (0.png): iscrowd is -1: expected 0",
        ),
    ],
)
def test_every_way_to_end_without_an_object(tmp_path: Path, annotations: list[dict[str, Any]], cause: str) -> None:
    val = coco_document([image_entry(0), image_entry(1)], annotations)
    root = write_splits(tmp_path, valid_document(), val)
    (root / "val/1.png").write_bytes(b"")
    (warning,) = warnings_of(root, max_bad_fraction=1)
    assert warning.startswith("No object in the 2 validation images (annotations/instances_val.json): ")
    assert cause in warning


def test_held_out_images_and_other_formats_too(tmp_path: Path) -> None:
    train, val = warnings_of(write_coco(tmp_path / "coco", valid_document(6, iscrowd=1)))
    assert "training images (instances.json)" in train and "validation images: all " in val
    train, val = warnings_of(write_coco(tmp_path / "empty", coco_document([image_entry(i) for i in range(6)], [])))
    assert "held out of the training images (data.val_fraction), and there is no annotation." in val
    root = write_cityscapes(tmp_path / "cityscapes", num_extra=2)
    config = DataConfig(format="cityscapes", root=str(root), unlabelled_pool="both")
    assert load(config)[1]["warnings"] == []  # nobody knows what the extra pool holds


def test_images_that_a_file_lists_without_a_mask_are_said_to_be_no_unlabelled_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_coco(tmp_path / "held out", masks_for(12, 40))
    (warning,) = warnings_of(root)
    assert warning == (
        "28 of 40 training and validation images (instances.json) have no mask: they count as images without objects, "
        "not as unlabelled ones. Put unlabelled images into a folder without annotations and name it by "
        "data.extra_image_dir, with data.unlabelled_pool=extra."
    )
    assert inspect([str(root), "--out", str(tmp_path / "out")]) == 0
    assert f"WARNING: {warning}\n" in capsys.readouterr().out
    of_each = warnings_of(write_splits(tmp_path / "two files", masks_for(2, 4), masks_for(1, 3)))
    assert [warning.partition(" have ")[0] for warning in of_each] == [
        "2 of 4 training images (annotations/instances_train.json)",
        "2 of 3 validation images (annotations/instances_val.json)",
    ]
    assert warnings_of(write_splits(tmp_path / "a quarter", masks_for(3, 4), masks_for(3, 3))) == []


def test_a_label_map_without_an_instance_says_that_nothing_is_there(tmp_path: Path) -> None:
    root = write_cityscapes(tmp_path)
    for path in list(root.glob("gtFine/train/*/*_instanceIds.png"))[:-1]:
        with Image.open(path) as label_map:
            Image.fromarray(np.full(label_map.size[::-1], 7, np.uint16)).save(path)  # road, which has no instances
    assert load(DataConfig(format="cityscapes", root=str(root)))[1]["warnings"] == []


def test_what_became_of_the_annotations_of_held_out_images(tmp_path: Path) -> None:
    document = valid_document(8)
    index = registry.lookup("datasets", "coco")
    held = index(DataConfig(format="coco", root=str(write_coco(tmp_path / "whole", document)))).splits["val"]
    ids = {int(decode_image_id(i)) for i in held.column("image_id").to_pylist()}
    bad = [a | {"segmentation": []} if a["image_id"] in ids else a for a in document["annotations"]]
    root = write_coco(tmp_path / "skipped", document | {"annotations": bad})
    (warning,) = warnings_of(root, max_bad_fraction=1)
    count = len([a for a in bad if not a["segmentation"]])
    assert f"(data.val_fraction), and {count} of {count} annotations were skipped: annotation " in warning
    assert "no segmentation. Their AP cannot be measured." in warning and "there is no annotation" not in warning

    crowds = [a | {"iscrowd": 1} if a["image_id"] in ids else a for a in document["annotations"]]
    crowds.append(annotation(99, min(ids), segmentation={}))
    (warning,) = warnings_of(write_coco(tmp_path / "crowds", document | {"annotations": crowds}), max_bad_fraction=1)
    assert f"all {count} usable annotations are ignore regions" in warning
    assert "1 more annotations were skipped: annotation 99 " in warning and "no segmentation." in warning


def test_inspect_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_coco(tmp_path / "data", valid_document(8, iscrowd=1))
    assert inspect([str(root), "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert output.count("WARNING: No object in the ") == 2 and "some tools export every mask with iscrowd 1" in output
    assert len(json.loads((tmp_path / "out/data_report.json").read_text())["warnings"]) == 2


@pytest.mark.parametrize("name", ["data_report.json", "samples.png"])
def test_inspect_replaces_its_own_files_only(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = write_coco(tmp_path / "data", valid_document(8)), tmp_path / "out"
    for _ in range(2):
        assert inspect([str(root), "--out", str(out)]) == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / name).write_text("{}")
    assert inspect([str(root), "--out", str(other)]) == 2
    assert f"{other} holds something other than a report of `cast-ray inspect` ({name}): " in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == [name] and (other / name).read_text() == "{}"


def test_the_plan_says_it_in_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = write_coco(tmp_path / "data", valid_document(8, iscrowd=1))
    arguments = ["main", "--preset", "coco", "--scale", "smoke", "--set", f"data.root={root}"]
    arguments += ["--set", "data.label_fraction=0.5", "--storage", str(tmp_path / "storage"), "--dry-run"]
    assert ablate.main(arguments) == 2  # the preset leaves images without objects out of D_l
    assert "have no object and are left out" in capfd.readouterr().err
    arguments += ["--set", "data.drop_empty=false"]
    for _ in range(2):  # read, and found in the store
        assert ablate.main(arguments) == 0
        assert capfd.readouterr().out.count("WARNING: No object in the ") == 2
    write_splits(tmp_path / "few", masks_for(1, 40), valid_document())
    assert ablate.main([*arguments, "--set", f"data.root={tmp_path / 'few'}", "--set", "data.label_fraction=0.05"]) == 0
    output = capfd.readouterr().out
    assert output.count("WARNING: ") == 2 and "WARNING: No object in the 2 labelled images (data.label_frac" in output
    assert "WARNING: 39 of 40 training images (annotations/instances_train.json) have no mask: they count as" in output


def test_a_search_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_coco(tmp_path / "data", valid_document(8, iscrowd=1))
    monkeypatch.setattr(search, "num_ended", lambda study: 99)  # nothing is left to run
    space = {"loss.lambda_pxl": {"low": 0.01, "high": 1.0}}
    request = search.SearchRequest(
        spec=SearchSpec(name="mine", title="t", objectives={"student/mask_ap": "max"}, space=space, num_trials=1),
        preset="coco",
        scale="smoke",
        overrides={"data.root": str(root), "data.label_fraction": "0.5", "data.drop_empty": "false"},
        seed=0,
        name="mine",
        study=str(tmp_path / "study.journal"),
        storage=str(tmp_path / "storage"),
        address=None,
        num_cpus=None,
    )
    output = io.StringIO()
    search.run_search(request, Console(file=output, width=200))
    assert output.getvalue().count("WARNING: No object in the ") == 2


def test_results_and_report_say_it(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "data", valid_document(8, iscrowd=1))
    recipe = build_recipe("coco", "smoke", {"data.root": str(root)})
    store = ArtifactStore(str(tmp_path / "storage"))
    dataset = read_dataset([recipe], store, Console(file=io.StringIO()), ["runs/test"], lambda: pytest.fail())
    warnings = dataset.facts().warnings
    assert len(warnings) == 2
    rows = [result("sup"), result("sup+semi")]
    for row in rows:
        row["dataset"]["warnings"] = list(warnings)
    notes = summarise(read_results(save(tmp_path / "run", rows))).notes
    assert list(notes[:2]) == [f"WARNING: {warning}" for warning in warnings]


def test_labelled_images_without_an_object_are_said(tmp_path: Path) -> None:
    root = write_splits(tmp_path / "data", masks_for(1, 40), valid_document())
    rows = [{"data.label_fraction": fraction, "data.label_family": "nested"} for fraction in (0.05, 1.0)]
    more = {"loss.lambda_semi": 0, "loss.lambda_pxl": 0, "data.root": str(root), "data.drop_empty": False}
    recipes = [build_recipe("coco", "smoke", more | row) for row in rows]
    store = ArtifactStore(str(tmp_path / "storage"))
    dataset = read_dataset(recipes, store, Console(file=io.StringIO()), ["runs/test"], lambda: pytest.fail())
    (unmasked,) = dataset.warnings
    assert unmasked.startswith("39 of 40 training images")
    (warning,) = store_splits(dataset, recipes, store)
    assert warning.startswith("No object in the 2 labelled images (data.label_fraction=0.05, seed 0): nothing can be")
    row = result("sup")
    row["dataset"]["split"] = {"family": "nested", "fraction": 0.05, "num_extra": 0, "num_with_objects": 0}
    notes = summarise(read_results(save(tmp_path / "run", [row]))).notes
    assert "WARNING: No object in the labelled images of sup: nothing was learnt from them." in notes
