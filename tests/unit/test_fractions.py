"""Label fractions: nested, stable, refused when too small."""

import numpy as np
import pyarrow as pa
import pytest

from cast_ray.datasets.fractions import split
from cast_ray.records import RECORD_SCHEMA


def _records(ids):
    rows = [{"image_id": str(i), "uri": f"{i}.png", "height": 4, "width": 4, "instances": []} for i in ids]
    return pa.Table.from_pylist(rows, schema=RECORD_SCHEMA)


def test_sizes_and_disjoint():
    labelled, unlabelled = split(_records(range(500)), 0.04, 0, None)
    assert len(labelled) == 20 and len(unlabelled) == 480
    assert sorted([*labelled, *unlabelled]) == list(range(500))
    assert labelled.dtype == unlabelled.dtype == np.int64


def test_smaller_fractions_are_inside_larger_ones():
    records = _records(range(200))
    previous: set[int] = set()
    for fraction in (0.05, 0.1, 0.3, 1.0):
        labelled = set(split(records, fraction, 3, None)[0].tolist())
        assert previous < labelled
        previous = labelled


def test_row_order_does_not_matter_and_seed_does():
    ids = list(range(100))
    forward = split(_records(ids), 0.2, 1, None)[0]
    backward = split(_records(ids[::-1]), 0.2, 1, None)[0]
    assert forward.tolist() == [99 - i for i in backward.tolist()]
    assert set(forward.tolist()) != set(split(_records(ids), 0.2, 2, None)[0].tolist())


def test_an_added_image_moves_one_place_at_most():
    before = set(split(_records(range(100)), 0.1, 0, None)[0].tolist())
    after = set(split(_records(range(101)), 0.1, 0, None)[0].tolist())
    assert len(before - after) <= 1


def test_num_unlabelled_is_shared_by_fractions():
    records = _records(range(100))
    small, large = (split(records, f, 0, 40)[1] for f in (0.05, 0.3))
    assert len(small) == 40 and small.tolist() == large.tolist()
    assert len(split(records, 0.3, 0, 0)[1]) == 0
    assert len(split(records, 0.9, 0, 40)[1]) == 10


def test_too_few_labelled_images():
    message = r"label fraction 0.001 of 128 images gives 0 labelled images: expected at least 1 per worker \(2\)"
    with pytest.raises(ValueError, match=message):
        split(_records(range(128)), 0.001, 0, None, min_labelled=2)
    assert len(split(_records(range(128)), 0.016, 0, None, min_labelled=2)[0]) == 2
    for fraction in (0.0, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="expected above 0"):
            split(_records(range(8)), fraction, 0, None)
