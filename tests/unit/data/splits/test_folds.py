"""Folds of D_l: every labelled image is held out once, by a stage whose teacher does not train on it."""

from __future__ import annotations

import numpy as np
import pytest

from cast_ray.data.splits.folds import fold_of, fold_rows
from cast_ray.data.splits.fractions import LabelSplit

CHOSEN = LabelSplit(np.array([9, 4, 7, 1, 12, 3, 8]), np.array([0, 2, 5]), {"num_labelled": 7, "seed": 3})


@pytest.mark.parametrize("num_folds", [1, 2, 3, 7])
def test_each_image_is_held_out_once_and_never_trained_on_there(num_folds: int) -> None:
    held_out: list[int] = []
    for index in range(num_folds):
        trains = fold_of(CHOSEN, {"index": index, "of": num_folds, "images": "others"})
        labels = fold_of(CHOSEN, {"index": index, "of": num_folds, "images": "held out"})
        assert trains.unlabelled.tolist() == [0, 2, 5]  # D_u stays, and so do the places of its pseudo-labels
        assert trains.labelled.tolist() == labels.labelled.tolist()
        assert not set(trains.labelled.tolist()) & set(labels.unlabelled.tolist())
        assert len(trains.labelled) + len(labels.unlabelled) == len(CHOSEN.labelled)
        places = fold_rows(len(CHOSEN.labelled), index, num_folds)
        assert labels.unlabelled.tolist() == CHOSEN.labelled[places].tolist()
        assert labels.facts == {"num_labelled": len(trains.labelled), "num_unlabelled": len(places), "seed": 3}
        held_out += labels.unlabelled.tolist()
    assert sorted(held_out) == sorted(CHOSEN.labelled.tolist())
