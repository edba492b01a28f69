"""Files of COCO results: read as columns, by line or whole, they give what their dicts give."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from evaluation_scenes import CATEGORIES, random_scenes

from cast_ray.evaluation import coco_results
from cast_ray.evaluation.coco_ap import match_results
from cast_ray.evaluation.coco_results import read_results, results_document, results_lines

INT_IDS, STRING_IDS = (5, 30, 12, 7, 0, 9, 2**53), ("b", "a 10", "a\n9", "ä", "")


def document_of(results: list[dict[str, Any]]) -> bytes:
    return b"".join(results_document(results_lines(results).splitlines(keepends=True)))


@pytest.mark.parametrize("ids", [INT_IDS, STRING_IDS], ids=["int", "string"])
@pytest.mark.parametrize("block_bytes", [1, 700, 1 << 23])
def test_columns_match_as_the_dicts_do(ids, block_bytes, monkeypatch, tmp_path):
    monkeypatch.setattr(coco_results, "_BLOCK_BYTES", block_bytes)
    ground_truth, results = random_scenes(3, ids, tied_scores=True)
    document = document_of(results)
    assert json.loads(document) == results
    (tmp_path / "results.json").write_bytes(document)
    wanted = match_results(ground_truth, results, CATEGORIES).to_bytes()
    for source in (io.BytesIO(document), str(tmp_path / "results.json"), tmp_path / "results.json"):
        table = read_results(source)
        assert table.num_rows == len(results)
        assert match_results(ground_truth, table, CATEGORIES).to_bytes() == wanted
    # Detections need not stand image by image.
    mixed = sorted(results, key=lambda r: r["score"])
    of_columns = match_results(ground_truth, read_results(io.BytesIO(document_of(mixed))), CATEGORIES)
    assert of_columns.to_bytes() == match_results(ground_truth, mixed, CATEGORIES).to_bytes()


@pytest.mark.parametrize("indent", [None, 1])
def test_results_of_other_tools_are_read_whole(indent):
    """One line, or many lines for one detection; what else they hold does not matter."""
    ground_truth, results = random_scenes(4, INT_IDS)
    text = json.dumps([r | {"id": i, "bbox": [0.0, 1, 2, 3]} for i, r in enumerate(results)], indent=indent)
    table = read_results(io.BytesIO(text.encode()))
    wanted = match_results(ground_truth, results, CATEGORIES).to_bytes()
    assert match_results(ground_truth, table, CATEGORIES).to_bytes() == wanted


@pytest.mark.parametrize("document", [document_of([]), b"[]", b"[\n]"])
def test_no_detection(document):
    ground_truth, _ = random_scenes(0, INT_IDS)
    table = read_results(io.BytesIO(document))
    assert table.num_rows == 0
    assert len(match_results(ground_truth, table, CATEGORIES).image) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 6}, r"results\[1\].image_id is 6"),
        ({"category_id": 4}, r"results\[1\].category_id is 4: expected one of \[2, 5, 9\]"),
        ({"segmentation": {"size": [50], "counts": "0"}}, r"results\[1\].segmentation.size"),
        ({"score": float("nan")}, r"results\[1\].score is nan"),
    ],
)
def test_unusable_results_are_refused_by_number(change, message):
    ground_truth, results = random_scenes(4, INT_IDS)
    results[1] |= change
    for given in (results, read_results(io.BytesIO(document_of(results)))):
        with pytest.raises(ValueError, match=message):
            match_results(ground_truth, given, CATEGORIES)


@pytest.mark.parametrize("content", ['{"a": []}', "[1, 2]", '[{"image_id": 1}]', "[null]", '[\n{"score": 1}\n]', "7"])
def test_other_json_is_refused(content):
    with pytest.raises(ValueError, match="expected COCO results of masks"):
        read_results(io.BytesIO(content.encode()))
