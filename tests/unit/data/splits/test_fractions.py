"""Label fractions: nested, stable, with every class, refused when too small."""

import numpy as np
import pyarrow as pa
import pytest

from cast_ray.contracts.records import RECORD_SCHEMA
from cast_ray.data.splits.fractions import LabelSource, label_index, split
from cast_ray.recipe import DataConfig

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 1.0)


def _records(ids, classes_of=lambda i: ()):
    def instance(category, is_crowd=False):
        return {"category_id": category, "rle": b"", "score": 1.0, "is_crowd": is_crowd}

    rows = [
        {
            "image_id": str(i),
            "uri": f"{i}.png",
            "height": 4,
            "width": 4,
            "instances": [instance(c) if c > 0 else instance(-c, True) for c in classes_of(i)],
        }
        for i in ids
    ]
    return pa.Table.from_pylist(rows, schema=RECORD_SCHEMA)


def _split(records, fraction, seed=0, source=None, min_labelled=1, **fields):
    config = DataConfig(label_fraction=fraction, **fields)
    return split(label_index(records), config, seed, source or LabelSource(), min_labelled)


def test_sizes_and_disjoint():
    chosen = _split(_records(range(500)), 0.04)
    assert len(chosen.labelled) == 20 and len(chosen.unlabelled) == 480
    assert sorted([*chosen.labelled, *chosen.unlabelled]) == list(range(500))
    assert chosen.labelled.dtype == chosen.unlabelled.dtype == np.int64
    assert chosen.facts == {
        **{"family": "nested", "fraction": 0.04, "seed": 0},
        **{"num_labelled": 20, "num_with_objects": 0, "num_unlabelled": 480, "num_extra": 0},
    }


def test_images_without_objects_leave_the_labelled_ones_and_stay_unlabelled():
    """Images 0, 4, 8, ... are empty, 1, 5, ... show crowds alone; D_u keeps such images, whose truth is hidden."""
    records = _records(range(400), lambda i: ((), (-1,), (1,), (1, -2))[i % 4])
    whole, chosen = (_split(records, 0.25, drop_empty=drop) for drop in (False, True))
    kept = [i for i in whole.labelled.tolist() if i % 4 >= 2]
    assert chosen.labelled.tolist() == kept and 30 < len(kept) < 70
    np.testing.assert_array_equal(chosen.unlabelled, whole.unlabelled)
    assert {i % 4 for i in chosen.unlabelled.tolist()} == {0, 1, 2, 3}
    assert chosen.facts["num_labelled"] == len(kept) and chosen.facts["num_empty"] == 100 - len(kept)
    assert chosen.facts["fraction"] == 0.25 and "num_empty" not in whole.facts
    with pytest.raises(ValueError, match=r"of which 1 have no object .* or data\.drop_empty=false"):
        _split(_records(range(10)), 0.1, drop_empty=True)


@pytest.mark.parametrize("family", ["nested", "per-class"])
def test_smaller_fractions_are_inside_larger_ones(family):
    records = _records(range(1000), lambda i: (i % 5 + 1,))
    previous: set[int] = set()
    for fraction in FRACTIONS:
        chosen = _split(records, fraction, 3, label_family=family)
        labelled = set(chosen.labelled.tolist())
        assert len(labelled) == round(1000 * fraction) and previous < labelled
        assert len(chosen.unlabelled) == 1000 - len(labelled)
        previous = labelled


def test_row_order_does_not_matter_and_seed_does():
    ids = list(range(100))
    forward = _split(_records(ids), 0.2, 1).labelled
    backward = _split(_records(ids[::-1]), 0.2, 1).labelled
    assert forward.tolist() == [99 - i for i in backward.tolist()]
    assert set(forward.tolist()) != set(_split(_records(ids), 0.2, 2).labelled.tolist())
    fixed = _split(_records(ids), 0.2, 2, split_seed=1)
    assert fixed.labelled.tolist() == forward.tolist() and fixed.facts["seed"] == 1


def test_an_added_image_moves_one_place_at_most():
    before = set(_split(_records(range(100)), 0.1).labelled.tolist())
    after = set(_split(_records(range(101)), 0.1).labelled.tolist())
    assert len(before - after) <= 1


def test_unlabelled_images_are_shared_by_fractions():
    records = _records(range(100))
    small, large = (_split(records, f, num_unlabelled=40).unlabelled for f in (0.05, 0.3))
    assert len(small) == 40 and small.tolist() == large.tolist()
    assert len(_split(records, 0.3, num_unlabelled=0).unlabelled) == 0
    assert len(_split(records, 0.9, num_unlabelled=40).unlabelled) == 10
    half, quarter = (_split(records, 0.2, unlabelled_fraction=f).unlabelled.tolist() for f in (0.5, 0.25))
    assert len(half) == 40 and len(quarter) == 20 and set(quarter) < set(half)


def test_too_few_labelled_images():
    message = r"label fraction 0.001 of 128 images gives 0 labelled images: expected at least 1 per worker \(2\)"
    with pytest.raises(ValueError, match=message):
        _split(_records(range(128)), 0.001, min_labelled=2)
    assert len(_split(_records(range(128)), 0.016, min_labelled=2).labelled) == 2
    for fraction in (0.0, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="label_fraction"):
            _split(_records(range(8)), fraction)


def test_per_class_brings_every_class_to_k_images():
    rng = np.random.default_rng(0)
    # class 1 in every image, 2 in 40, 3 in 6, 4 in one; 5 only as a crowd
    holders = {2: set(range(0, 400, 10)), 3: set(range(5, 300, 50)), 4: {123}, -5: set(rng.choice(400, 50).tolist())}
    records = _records(range(400), lambda i: [1] + [c for c, images in holders.items() if i in images])
    plain = _split(records, 0.05).labelled
    for k in (1, 3):
        chosen = _split(records, 0.05, label_family="per-class", min_per_class=k)
        labelled = set(chosen.labelled.tolist())
        assert len(labelled) == len(plain) == 20 and chosen.facts["min_per_class"] == k
        assert len(labelled & holders[2]) >= k and len(labelled & holders[3]) >= k and 123 in labelled
    assert 123 not in plain  # or the test would show nothing
    # what the classes do not ask for is the nested family's choice
    assert len(set(plain.tolist()) & labelled) >= 20 - 7


def test_per_class_refuses_what_does_not_fit():
    records = _records(range(100), lambda i: (i % 50 + 1,))
    with pytest.raises(ValueError, match=r"data\.min_per_class=1 of 50 classes needs 50 labelled images.*gives 10"):
        _split(records, 0.1, label_family="per-class")
    assert len(_split(records, 0.5, label_family="per-class").labelled) == 50


def test_the_extra_pool():
    records = _records(range(100))
    source = LabelSource(extra_ids=[str(i) for i in range(1000, 1040)])
    rest = _split(records, 0.1, source=source)
    assert len(rest.unlabelled) == 90 and rest.unlabelled.max() < 100
    extra = _split(records, 0.1, source=source, unlabelled_pool="extra")
    assert sorted(extra.unlabelled.tolist()) == list(range(100, 140)) and extra.facts["num_extra"] == 40
    both = _split(records, 0.1, source=source, unlabelled_pool="both")
    assert set(both.unlabelled.tolist()) == {*rest.unlabelled.tolist(), *extra.unlabelled.tolist()}
    limited = _split(records, 0.1, source=source, unlabelled_pool="both", num_unlabelled=50)
    assert 5 < limited.facts["num_extra"] < 30  # a share of both, not one after the other
    assert rest.labelled.tolist() == extra.labelled.tolist() == both.labelled.tolist()
    everything = _split(records, 1.0, source=source, unlabelled_pool="both")
    assert (len(everything.labelled), len(everything.unlabelled)) == (100, 40)
