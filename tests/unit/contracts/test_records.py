"""Records: ids survive, labels are contiguous, batches move whole."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pycocotools import mask as coco_mask

from cast_ray.contracts.records import (
    RECORD_SCHEMA,
    Batch,
    Category,
    ClassMap,
    Targets,
    class_names,
    decode_image_id,
    encode_image_id,
    instances_of,
    mask_areas,
    object_areas,
)


@pytest.mark.parametrize("original", [17, "17", "a/b.png", 0, -3, 2**53, 'quo"te', "übung"])
def test_image_ids_keep_their_type(original: int | str) -> None:
    decoded = decode_image_id(encode_image_id(original))
    assert decoded == original and type(decoded) is type(original)


def test_ids_of_different_types_stay_apart() -> None:
    assert encode_image_id(17) != encode_image_id("17")


def test_class_map_is_a_bijection_over_gaps() -> None:
    categories = [Category(7, "seven"), Category(90, "ninety"), Category(1, "one")]
    classes = ClassMap(categories)
    assert len(classes) == 3 and classes.names() == ["seven", "ninety", "one"]
    assert [classes.label(c.id) for c in categories] == [0, 1, 2]
    assert [int(classes.ids[classes.label(c.id)]) for c in categories] == [7, 90, 1]
    with pytest.raises(KeyError):
        classes.label(2)


def test_classes_of_one_name_are_told_apart_by_their_ids() -> None:
    categories = [Category(1, "fish"), Category(2, "crab"), Category(9, "fish")]
    assert class_names(categories) == ClassMap(categories).names() == ["fish (id 1)", "crab", "fish (id 9)"]
    assert class_names(categories[:2]) == ["fish", "crab"] and class_names([]) == []
    # whatever a file calls them
    odd = [Category(9, "fish"), Category(3, "fish"), Category(4, "fish (id 9)"), Category(5, "fish (id 9) (id 4)")]
    assert len(set(class_names(odd))) == 4
    assert len(class_names([odd[0], odd[0]])) == 2  # one category twice: nothing tells it apart, and nothing hangs


@pytest.mark.parametrize("count", [0, 1, 255, 256, 375, 1000])
def test_areas_of_any_number_of_masks(count: int) -> None:
    """pycocotools' own `area` of a list raises above 255 masks (numpy 2) or counts them modulo 256."""
    masks = np.random.default_rng(count).random((9, 7, count)) < 0.4
    rles = coco_mask.encode(np.asfortranarray(masks, dtype=np.uint8))
    found = mask_areas(rles)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, masks.sum((0, 1)))


def test_nothing_else_counts_pixels_by_pycocotools() -> None:
    callers = []
    for path in sorted((Path(__file__).parents[3] / "cast_ray").rglob("*.py")):
        tree = ast.parse(path.read_text())
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "pycocotools"]
        names = {alias.asname or alias.name for n in imports for alias in n.names}
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "area"]
        callers += [path.name for n in calls if isinstance(n.value, ast.Name) and n.value.id in names]
    assert callers == ["records.py"]


def test_the_area_of_the_annotation_goes_before_the_masks() -> None:
    np.testing.assert_array_equal(object_areas([None, 0.0, 7.5], np.array([3.0, 4.0, 5.0])), [3.0, 0.0, 7.5])
    assert object_areas([], np.zeros(0)).shape == (0,)


def instance(is_crowd: bool = False) -> dict[str, object]:
    return {"category_id": 90, "rle": b"\x00ab", "score": 0.5, "is_crowd": is_crowd, "area": None}


def test_records_survive_arrow() -> None:
    rows = [
        {"image_id": "1", "uri": "a.png", "height": 4, "width": 5, "instances": [instance(), instance(True)]},
        {"image_id": '"b"', "uri": "b.png", "height": 4, "width": 5, "instances": []},
    ]
    table = pa.Table.from_pylist(rows, schema=RECORD_SCHEMA)
    assert table.to_pylist() == rows
    assert instances_of(table.to_pylist()[0]) == [instance()]


def test_a_batch_moves_all_its_tensors() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    plane = torch.zeros(2, 4, 4)
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    targets = [Targets(masks, torch.zeros(1), torch.ones(1)), Targets(masks, torch.zeros(1), torch.ones(1), masks[0])]
    batch = Batch(images, images, plane.bool(), targets, 1, plane.short(), plane.short()).to("meta")
    tensors = [batch.weak, batch.strong, batch.valid, batch.truth_instance, batch.truth_class]
    tensors += [t for target in batch.targets for t in (target.masks, target.labels, target.weights)]
    assert all(t.is_meta for t in tensors)
    assert batch.targets[0].ignore is None and batch.targets[1].ignore.is_meta
    assert batch.num_labelled == 1
