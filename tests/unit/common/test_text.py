"""Pieces of messages: which known word was probably meant, and what is said where none was."""

from __future__ import annotations

import pytest

from cast_ray.common.text import MAX_NAMED, nearest

KEYS = ["seed", "loss.lambda_pxl", "loss.lambda_semi", "stages.adapt.lr", "stages.refine.lr", "student.encoder.name"]
MANY = [f"{part}.field{i}" for part in ("data", "loss") for i in range(MAX_NAMED)]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("loss.lambda_pxI", "'loss.lambda_pxl'"),
        ("sed", "'seed'"),
        ("lambda_semy", "'loss.lambda_semi'"),
        ("lr", "'stages.adapt.lr' or 'stages.refine.lr'"),
        ("encoder.name", "'student.encoder.name'"),
    ],
)
def test_the_word_that_was_meant(word: str, meant: str) -> None:
    assert nearest(word, KEYS) == f": did you mean {meant}?"


@pytest.mark.parametrize("word", ["storage", "rows", "scale", "", "x", "banana", "preset"])
def test_no_guess_where_nothing_is_near(word: str) -> None:
    assert nearest(word, KEYS) == f": expected one of {', '.join(KEYS)}"


def test_many_names_are_told_by_their_first_parts() -> None:
    assert nearest("zzz", MANY) == ": expected one of data.*, loss.*"
    plain = [f"{chr(97 + i) * 9}" for i in range(MAX_NAMED + 3)]
    assert nearest("9", plain) == f": expected one of {', '.join(plain[:MAX_NAMED])} and 3 more"
    assert nearest("student/maskap", ["student/mask_ap", "student/ap50"]) == ": did you mean 'student/mask_ap'?"
