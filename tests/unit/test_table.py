"""Ablation tables: the ones that ship, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cast_ray.recipe import build_recipe
from cast_ray.stages.table import Table, load_table, table_names

GOOD: dict[str, Any] = {
    "title": "t",
    "metric": "student/mask_ap",
    "baseline": "a",
    "rows": {"a": {}, "b": {"loss.lambda_pxl": 0.2}},
}


def write(folder: Path, spec: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(spec if isinstance(spec, str) else yaml.safe_dump(spec))
    return path


def test_the_shipped_tables_load() -> None:
    assert {"losses", "negatives", "margins"} <= set(table_names())
    for name in table_names():
        assert load_table(name).name == name


def test_rows_of_losses_switch_the_terms() -> None:
    table = load_table("losses")
    base = build_recipe("shapes").loss
    terms = {
        row: (loss.lambda_semi, loss.lambda_pxl)
        for row in table.rows
        for loss in [table.row_recipe(row, "shapes").loss]
    }
    assert terms == {
        "sup": (0, 0),
        "sup+semi": (base.lambda_semi, 0),
        "sup+pxl": (0, base.lambda_pxl),
        "sup+semi+pxl": (base.lambda_semi, base.lambda_pxl),
    }
    assert base.lambda_semi > 0 and base.lambda_pxl > 0


def test_rows_of_the_other_tables_reach_the_recipe() -> None:
    negatives, margins = load_table("negatives"), load_table("margins")
    for row in negatives.rows:
        assert negatives.row_recipe(row, "shapes").contrastive.sampler == row
    for row in margins.rows:
        assert margins.row_recipe(row, "coco").loss.lambda_pxl == float(row)


def test_rows_of_student_are_encoders_and_decoders() -> None:
    table = load_table("student")
    found = {
        row: (m.encoder.name, m.head if m.head == "eomt" else m.decoder)
        for row in table.rows
        for m in [table.row_recipe(row, "cityscapes", "full").student]
    }
    assert found["dinov2-s"] == ("dinov2-s", "dpt") and found["fpn"] == ("dinov2-s", "fpn")
    assert found["resnet50"] == ("resnet50", "dpt") and found["eomt"] == ("dinov2-s", "eomt")
    assert len(set(found.values())) == len(table.rows)
    assert table.paper_values()["student/mask_ap"] == {"dinov2-s": 30.7, "resnet50": 25.5, "sam2-s": 22.1, "fpn": 28.9}


def test_paper_values_stand_beside_our_metrics() -> None:
    assert load_table("losses").paper_values() == {
        "teacher/mask_ap": {"sup": 28.7, "sup+semi": 29.7, "sup+pxl": 29.6, "sup+semi+pxl": 30.5},
        "student/mask_ap": {"sup": 21.1, "sup+semi": 30.7, "sup+pxl": 27.5, "sup+semi+pxl": 32.2},
    }
    negatives = load_table("negatives").paper_values()
    assert negatives["student/ap50"]["fusion"] == 56.5 and "oracle" not in negatives["student/ap50"]
    assert load_table("margins").paper_values() == {
        "distill/margin": {"0.01": 0.55, "0.1": 0.59, "0.2": 0.64, "0.5": 0.69}
    }


def test_the_row_comes_after_the_users_overrides() -> None:
    recipe = load_table("losses").row_recipe(
        "sup", "shapes", scale="smoke", seed=3, overrides={"loss.lambda_pxl": "0.5", "stages.distill.steps": "2"}
    )
    assert (recipe.loss.lambda_pxl, recipe.stages.distill.steps, recipe.seed, recipe.scale) == (0, 2, 3, "smoke")


def test_a_rows_column_comes_after_the_users_fields() -> None:
    table = Table(name="x", title="x", metric="m", baseline="a", rows={"a": {"contrastive": "released"}, "b": {}})
    mine = {"contrastive": "paper", "contrastive.hinge": "0.7"}
    assert table.row_recipe("a", "shapes", overrides=mine).contrastive.hinge == 0.5
    assert table.row_recipe("b", "shapes", overrides=mine).contrastive.hinge == 0.7


def test_a_table_of_ones_own_loads_from_its_path(tmp_path: Path) -> None:
    table = load_table(write(tmp_path, GOOD))
    assert table.name == "mine" and table.seeds == (0,) and table.paper_values() == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baselin": "a"}, "unknown key 'baselin': did you mean 'baseline'"),
        ({"baseline": "bb"}, "baseline 'bb' is not a row: did you mean 'b'"),
        ({"rows": {"a": {"loss.lambda_pxI": 1}}}, "row 'a': unknown recipe key .* did you mean 'loss.lambda_pxl'"),
        ({"rows": {"a": {"loss.lambda_pxl": -1}}}, "row 'a': loss.lambda_pxl: .*greater than or equal to 0"),
        ({"paper": "loses"}, "paper: unknown table 'loses': did you mean 'losses'"),
        ({"paper": "losses", "paper_columns": {"studentap": "x"}}, "no column 'studentap'.*did you mean 'student_ap'"),
        ({"paper_columns": {"student_ap": "x"}}, "paper_columns without paper"),
        ({"seeds": [1, 1]}, "seeds: expected different ones"),
        ({"seeds": []}, "seeds: .*at least 1"),
        ({"rows": {}}, "rows: .*at least 1"),
    ],
)
def test_a_wrong_table_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_table(write(tmp_path, {**GOOD, **change}))
    assert "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("- a", "expected a mapping"), ("a: [", "not YAML"), ("", "got NoneType")]
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_table(write(tmp_path, text))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="title is missing"):
        load_table(write(tmp_path, {k: v for k, v in GOOD.items() if k != "title"}))


def test_unknown_names_are_told_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown table 'loses': did you mean 'losses'"):
        load_table("loses")
    with pytest.raises(ValueError, match="no table file"):
        load_table(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"unknown row 'sup\+sem'.*did you mean 'sup\+semi'"):
        load_table("losses").row_recipe("sup+sem", "shapes")


def test_a_table_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Table(name="x", **GOOD).title = "other"  # type: ignore[misc]
