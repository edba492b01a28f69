"""Matches: AP of whole datasets and of samples of their images, joining, and the stored form."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from evaluation_scenes import CATEGORIES, coco_document, random_scenes, referee, referee_numbers

from cast_ray.contracts.records import ClassMap, encode_image_id
from cast_ray.evaluation.coco_ap import coco_metrics, match_coco, match_results
from cast_ray.evaluation.detections import ResultsByImage, Truth, tie_order
from cast_ray.evaluation.matches import DetectionMatches, join, load_matches

IDS = (12, 3, 40, 7, 8, 25)


def repeated(table: pa.Table, results: list[dict[str, Any]], counts: np.ndarray) -> tuple[pa.Table, list[dict]]:
    """Each image followed by its copies, in the order of the ids, which is that of pycocotools."""
    rows, copies = [], []
    for place in np.argsort(tie_order(table.column("image_id").to_pylist())):
        record = table.slice(place, 1).to_pylist()[0]
        for _ in range(counts[place]):
            image_id = len(rows) + 1
            rows.append(record | {"image_id": encode_image_id(image_id)})
            mine = [r for r in results if encode_image_id(r["image_id"]) == record["image_id"]]
            copies += [r | {"image_id": image_id} for r in mine]
    return pa.Table.from_pylist(rows, schema=table.schema), copies


@pytest.mark.parametrize("tied_scores", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_ap_of_a_sample_is_that_of_the_repeated_dataset(seed: int, tied_scores: bool) -> None:
    table, results = random_scenes(seed, IDS, tied_scores=tied_scores)
    matches = match_results(table, results, CATEGORIES)
    rng = np.random.default_rng(seed)
    for counts in (np.ones(len(IDS), dtype=int), *(rng.integers(0, 4, len(IDS)) for _ in range(4))):
        sample, copies = repeated(table, results, counts)
        if not copies:
            continue
        wanted = referee_numbers(referee(coco_document(sample), copies))["mask_ap"]
        assert matches.mask_ap(counts) == wanted  # to the last bit
    assert matches.mask_ap() == matches.mask_ap(np.ones(len(IDS), dtype=int))
    assert matches.mask_ap() == coco_metrics(matches, CATEGORIES)["mask_ap"]


def test_the_tied_scenes_need_the_copies_interleaved() -> None:
    table, results = random_scenes(0, IDS, tied_scores=True)
    assert any(rows.order_matters for rows in match_results(table, results, CATEGORIES).ranking(0).classes)
    table, results = random_scenes(0, IDS)
    assert not any(rows.order_matters for rows in match_results(table, results, CATEGORIES).ranking(0).classes)


def test_nothing_to_find_is_nan() -> None:
    table, results = random_scenes(1, IDS)
    matches = match_results(table, results, CATEGORIES)
    assert np.isnan(matches.mask_ap(np.zeros(len(IDS), dtype=int)))


@pytest.mark.parametrize("counts", [np.ones(5, dtype=int), np.ones(6), -np.ones(6, dtype=int)])
def test_other_counts_are_refused(counts: np.ndarray) -> None:
    table, results = random_scenes(1, IDS)
    with pytest.raises(ValueError, match=r"image_counts is .* expected counts from 0 up of 6 images"):
        match_results(table, results, CATEGORIES).mask_ap(counts)


def columns(matches: DetectionMatches) -> list[np.ndarray]:
    return [getattr(matches, n) for n in ("image", "label", "score", "matched", "ignored", "num_truth")]


def assert_same(a: DetectionMatches, b: DetectionMatches) -> None:
    assert a.metric == b.metric
    for x, y in zip(columns(a), columns(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("tied_scores", [False, True])
def test_workers_with_every_other_image_join_to_the_whole(tied_scores: bool) -> None:
    table, results = random_scenes(2, IDS, tied_scores=tied_scores)
    whole = match_results(table, results, CATEGORIES)
    truth = [Truth.of(row, ClassMap(CATEGORIES)) for row in table.to_pylist()]
    found = ResultsByImage(table, results, CATEGORIES)
    mine = [np.arange(len(IDS))[rank::2] for rank in range(2)]
    parts = [match_coco([truth[i] for i in rows], [found[i] for i in rows], len(CATEGORIES)) for rows in mine]
    assert_same(join(parts, mine, tie_order(table.column("image_id").to_pylist())), whole)


@pytest.mark.parametrize("single", [False, True])
def test_what_is_saved_is_loaded(tmp_path: Path, single: bool) -> None:
    table, results = random_scenes(3, IDS)
    if single:
        results = [r | {"score": float(np.float32(r["score"]))} for r in results]
    matches = match_results(table, results, CATEGORIES)
    matches.save(tmp_path / "matches.npz")
    assert_same(load_matches(tmp_path / "matches.npz"), matches)
    assert_same(load_matches(matches.to_bytes()), matches)
    with (tmp_path / "matches.npz").open("rb") as file:
        assert_same(load_matches(file), matches)
    with np.load(tmp_path / "matches.npz") as arrays:
        assert arrays["score"].dtype == (np.float32 if single else np.float64)


def test_another_file_is_refused(tmp_path: Path) -> None:
    table, results = random_scenes(3, IDS)
    whole = match_results(table, results, CATEGORIES).to_bytes()
    arrays = dict(np.load(io.BytesIO(whole)))
    (tmp_path / "other.npz").write_bytes(b"not a zip")
    (tmp_path / "pickled.npz").write_bytes(pickle.dumps({"score": 1}))
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder.npz").mkdir()
    np.savez(tmp_path / "arrays.npz", score=np.zeros(2))
    np.savez(tmp_path / "objects.npz", **arrays | {"score": np.array([{}, []], dtype=object)})
    np.savez(tmp_path / "short.npz", **arrays | {"label": arrays["label"][:-1]})
    np.savez(tmp_path / "metric.npz", **arrays | {"metric": np.array("mine")})
    np.save(tmp_path / "one.npy", np.zeros(2))
    (tmp_path / "result.json").write_text("{}")
    for name, found in {
        "other.npz": "another kind of file",
        "pickled.npz": "another kind of file",
        "one.npy": "another kind of file",
        "result.json": "another kind of file",
        "cut.npz": "another kind of file, or a part of one",
        "folder.npz": "what cannot be read: Is a directory",
        "arrays.npz": "an archive without image, label, matched, ignored, num_truth, metric",
        "objects.npz": "other arrays",
        "short.npz": "arrays that do not belong together",
        "metric.npz": "arrays that do not belong together",
        "missing.npz": "no file",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}: expected a file of matches, as .*, found {found}") as error:
            load_matches(tmp_path / name)
        assert "pickle" not in str(error.value).replace(name, "") and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^matches: expected a file of matches"):
        load_matches(b"")
