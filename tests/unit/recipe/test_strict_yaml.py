"""YAML that users write: keys that are there twice are refused, names stay names, values are what they look like."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from cast_ray.plan.ablation import load_table, table_names
from cast_ray.plan.search import load_search
from cast_ray.recipe import build, build_recipe, parse_overrides, preset_names
from cast_ray.recipe.strict_yaml import NotYamlError, read_yaml

TABLE = """\
title: t
metric: student/mask_ap
baseline: a
rows:
  a: {}
  b: {loss.lambda_pxl: 0.2}
"""
SEARCH = """\
title: t
objectives: {student/mask_ap: max}
space:
  loss.lambda_pxl: {low: 0.1, high: 0.2}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TABLE + "  a: {loss.lambda_pxl: 0.1}\n", "line 7: key 'a' is there twice, first on line 5"),
        (TABLE + "title: another\n", "line 7: key 'title' is there twice, first on line 1"),
        (TABLE + "  c: {loss.lambda_pxl: 1, loss.lambda_pxl: 2}\n", "line 7: key 'loss.lambda_pxl' is there twice"),
        (TABLE + "  0.1: {}\n  '0.1': {}\n", "line 8: key '0.1' is there twice"),
        (TABLE + "grid:\n  x: {few: {}, few: {}}\n", "line 8: key 'few' is there twice"),
        (TABLE + "  [a, b]: {}\n", "line 7: expected a name as the key"),
    ],
)
def test_a_key_that_is_there_twice_in_a_table_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_table(write(tmp_path, text))
    assert "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_that_is_there_twice_in_a_search_is_named_with_its_line(tmp_path: Path) -> None:
    twice = SEARCH + "  loss.lambda_pxl: {low: 0.5, high: 0.9}\n"
    with pytest.raises(ValueError, match=r"mine.yaml: line 5: key 'loss.lambda_pxl' is there twice, first on line 4"):
        load_search(write(tmp_path, twice))


def test_a_key_that_is_there_twice_in_a_value_of_set_is_refused() -> None:
    overrides = parse_overrides(["teacher.prompt.synonyms={person: [rider], person: [man]}"])
    with pytest.raises(ValueError, match=r"teacher.prompt.synonyms: line 1: key 'person' is there twice"):
        build_recipe("coco", overrides=overrides)


def test_a_key_that_is_there_twice_in_a_preset_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "mine.yaml").write_text("recipe:\n  data: {}\n  data: {flip: false}\n")
    monkeypatch.setattr(build.resources, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=r"mine.yaml: line 3: key 'data' is there twice, first on line 2"):
        build._preset.__wrapped__("mine")


def test_the_yaml_that_ships_has_no_key_twice() -> None:
    for name in preset_names():
        build_recipe(name)
    for name in table_names():
        load_table(name)


@pytest.mark.parametrize("name", ["no", "yes", "off", "0.1", "0.10", "1e-3", "12:30", "2024-01-01", "null", "~", "007"])
def test_a_row_is_called_what_is_written(tmp_path: Path, name: str) -> None:
    text = f"""\
title: {name}
metric: student/mask_ap
baseline: {name}
rows:
  {name}: {{}}
  other: {{loss.lambda_pxl: 0.2}}
grid:
  x:
    {name}: {{}}
"""
    if name in ("null", "~"):
        text = text.replace(f"title: {name}", "title: t").replace(f"baseline: {name}", f"baseline: '{name}, {name}'")
    else:
        text = text.replace(f"baseline: {name}", f"baseline: {name}, {name}")
    assert list(load_table(write(tmp_path, text)).rows) == [f"{name}, {name}", f"other, {name}"]
    alone = TABLE.replace("  a: {}", f"  {name}: {{}}").replace("baseline: a", f"baseline: {name}")
    if name not in ("null", "~"):
        assert load_table(write(tmp_path, alone)).baseline == name


@pytest.mark.parametrize("values", ["[0.1, 0.1]", "[0.10000001, 0.10000002]"])
def test_two_points_of_a_grid_with_one_name_are_refused(tmp_path: Path, values: str) -> None:
    text = TABLE.replace("baseline: a", "baseline: a, lambda_semi=0.1") + f"grid:\n  loss.lambda_semi: {values}\n"
    with pytest.raises(ValueError, match=r"grid: two rows are called 'a, lambda_semi=0.1'"):
        load_table(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("no", "no"),
        ("True", True),
        ("false", False),
        ("1e-3", 0.001),
        ("-1.5E+2", -150.0),
        (".5", 0.5),
        ("12", 12),
        ("1_000", 1000),
        ("0x1f", 31),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("{1: [no, 2]}", {"1": ["no", 2]}),
        (".inf", math.inf),
        ("'1'", "1"),
    ],
)
def test_values_are_what_they_look_like(text: str, value: Any) -> None:
    found = read_yaml(text)
    assert found == value and type(found) is type(value)


def test_merged_keys_may_be_repeated() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}"
    assert read_yaml(text) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 3, "y": 4}}


def test_what_is_no_yaml_is_told_apart() -> None:
    with pytest.raises(NotYamlError, match="not YAML"):
        read_yaml("a: [")
