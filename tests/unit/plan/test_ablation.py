"""Ablation tables: the ones that ship, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cast_ray.plan.ablation import Table, load_table, table_names
from cast_ray.plan.graph import plan, plan_sweep
from cast_ray.recipe import SCALES, build_recipe, preset_names

GOOD: dict[str, Any] = {
    "title": "t",
    "metric": "student/mask_ap",
    "baseline": "a",
    "rows": {"a": {}, "b": {"loss.lambda_pxl": 0.2}},
}


def write(folder: Path, spec: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(spec if isinstance(spec, str) else yaml.safe_dump(spec, sort_keys=False))
    return path


PAPERS = {"main", "losses", "stages", "negatives", "student", "labels", "margins"}
ASKED_FOR = {"contrast", "unlabeled", "iterations", "refinement", "thresholds", "points", "photos", "semi", "precision"}
ASKED_FOR |= {"diagnosis", "rivals"}
"""Tables that are not in the paper."""


def test_the_shipped_tables_load() -> None:
    assert set(table_names()) == PAPERS | ASKED_FOR
    for name in table_names():
        assert load_table(name).name == name


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("preset", preset_names())
def test_every_table_expands_to_different_rows_for_every_preset_and_scale(preset: str, scale: str) -> None:
    for name in table_names():
        table = load_table(name)
        recipes = [table.row_recipe(row, preset, scale) for row in table.rows]
        plans = [plan(r, "0" * 64, foundation=None if r.stages.pretrain.steps else "f" * 20) for r in recipes]
        assert len({tuple(s.fingerprint for s in p.stages) for p in plans}) == len(plans), name
        assert all("final" in p.roles for p in plans)


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


def test_rows_of_rivals_differ_in_the_method_alone() -> None:
    """One student, one teacher, one choice of D_l, equal steps; only rows without D_u take more labels a step."""
    table = load_table("rivals")
    recipes = {row: table.row_recipe(row, "shapes") for row in table.rows}
    base = recipes["CAST"]
    for recipe in recipes.values():
        assert (recipe.student, recipe.teacher, recipe.stages) == (base.student, base.teacher, base.stages)
        assert recipe.data.model_copy(update={"copy_paste": 0.0}) == base.data
    assert table.paper_values("cityscapes")["final/mask_ap"] == {
        "supervised": 21.1,
        "Guided Distillation": 30.8,
        "CAST": 33.9,
    }
    assert [row for row, r in recipes.items() if r.labels.refresh_stages == ("distill",)] == [
        "mean teacher",
        "Guided Distillation",
    ]


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


def test_the_papers_rows_may_have_other_names_and_several_columns() -> None:
    main = load_table("main")
    cityscapes, ade20k = main.paper_values(), main.paper_values("ade20k")
    assert cityscapes["teacher/mask_ap"]["CAST"] == 30.5 and ade20k["teacher/mask_ap"]["CAST"] == 15.2
    assert cityscapes["student/mask_ap"] == {"supervised": 21.1, "CAST": 32.2}
    assert cityscapes["refined/mask_ap"] == {"CAST": 33.9}
    assert load_table("labels").paper_values()["refined/mask_ap"] == {"5 %": 30.7, "10 %": 33.9, "30 %": 40.4}
    assert load_table("stages").paper_values()["final/mask_ap"]["distill-only"] == 23.8


def test_the_union_of_four_tables_shares_more_than_half_of_its_steps() -> None:
    """Counted on the plan that `ablate.py losses stages negatives labels --preset shapes` prints."""
    tables = [load_table(name) for name in ("losses", "stages", "negatives", "labels")]
    rows = [plan(t.row_recipe(row, "shapes", "demo"), "0" * 64, row=row) for t in tables for row in t.rows]
    alone = 0
    for row in rows:  # each by itself: every stage once
        alone += sum({stage.fingerprint: stage.steps for stage in row.stages}.values())
    together = plan_sweep(rows, [])
    ran = {stage.fingerprint: stage.steps for row in rows for stage in row.stages}
    assert together.steps_unique == sum(ran.values()) and together.steps_from_scratch == alone
    assert together.steps_unique <= 0.45 * alone


def test_base_and_users_overrides_and_rows_in_this_order(tmp_path: Path) -> None:
    base = {"loss.lambda_pxl": 0.3, "loss.lambda_semi": 0.5, "preset": "coco", "scale": "smoke"}
    table = load_table(write(tmp_path, {**GOOD, "base": base}))
    recipe = table.row_recipe("a")
    assert (recipe.preset, recipe.scale, recipe.loss.lambda_pxl, recipe.loss.lambda_semi) == ("coco", "smoke", 0.3, 0.5)
    recipe = table.row_recipe("b", "shapes", "demo", overrides={"loss.lambda_pxl": "0.9", "loss.lambda_semi": "0.9"})
    assert (recipe.preset, recipe.scale, recipe.loss.lambda_pxl, recipe.loss.lambda_semi) == (
        "shapes",
        "demo",
        0.2,
        0.9,
    )


def test_a_factor_multiplies_what_preset_scale_and_user_say(tmp_path: Path) -> None:
    rows: dict[str, dict[str, Any]] = {
        "a": {},
        "b": {"stages.refine.steps": "x0.5", "stages.refine.lr": "x10", "stages.distill.batch_labelled": "x2"},
        "c": {"stages.refine.steps": "x0.001"},
    }
    table = load_table(write(tmp_path, {**GOOD, "rows": rows}))
    cases: list[tuple[str, str, dict[str, str]]] = [
        ("shapes", "demo", {}),
        ("coco", "full", {"stages.refine.steps": "30"}),
    ]
    for preset, scale, overrides in cases:
        a, b, c = (table.row_recipe(row, preset, scale, overrides=overrides).stages for row in "abc")
        assert b.refine.steps == a.refine.steps // 2 and b.refine.lr == pytest.approx(10 * a.refine.lr)
        assert b.distill.batch_labelled == 2 * a.distill.batch_labelled
        assert c.refine.steps == 1  # not none


def test_a_grid_multiplies_the_rows(tmp_path: Path) -> None:
    grid = {
        "loss.lambda_pxl": [0.1, 0.25],
        "labels": {"few": {"data.label_fraction": 0.05}, "many": {"data.label_fraction": 0.3}},
    }
    spec = {**GOOD, "baseline": "a, lambda_pxl=0.1, few", "rows": {"a": {}, "b": {"seed": 3}}, "grid": grid}
    table = load_table(write(tmp_path, spec))
    assert len(table.rows) == 8
    assert table.rows["b, lambda_pxl=0.25, many"] == {"seed": 3, "loss.lambda_pxl": 0.25, "data.label_fraction": 0.3}
    alone = {k: v for k, v in spec.items() if k != "rows"} | {"baseline": "lambda_pxl=0.1, few"}
    assert list(load_table(write(tmp_path, alone)).rows)[:2] == ["lambda_pxl=0.1, few", "lambda_pxl=0.1, many"]


@pytest.mark.parametrize(
    ("baseline", "grid", "row"),
    [
        ("use_refine=true", {"stages.use_refine": [True, False]}, "use_refine=True"),
        ("num_anchors=null", {"contrastive.num_anchors": [None, 100]}, "num_anchors=None"),
        ("lr=1e-3", {"stages.distill.lr": [1e-3, 2e-3]}, "lr=0.001"),
        ("lambda_pxl=0.10", {"loss.lambda_pxl": [0.1, 0.2]}, "lambda_pxl=0.1"),
        ("image_px=[64,64],steps=x1", {"data.image_px": [[64, 64]], "stages.distill.steps": ["x1"]}, None),
        ("sampler=uniform,steps=x1", {"contrastive.sampler": ["uniform"], "stages.distill.steps": ["x1"]}, None),
    ],
)
def test_a_baseline_is_written_as_the_values_of_its_grid(
    tmp_path: Path, baseline: str, grid: dict[str, Any], row: str | None
) -> None:
    spec = {"title": "t", "metric": "student/mask_ap", "baseline": baseline, "grid": grid}
    table = load_table(write(tmp_path, spec))
    assert table.baseline in table.rows and table.baseline == (row or next(iter(table.rows)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("baseline: lr: 1\nrows: {a: {}}", "not YAML: .* needs quotes"),
        ("baseline: %a\nrows: {a: {}}", "not YAML: .* begins with %.* needs quotes"),
    ],
)
def test_a_name_that_needs_quotes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_table(write(tmp_path, f"title: t\nmetric: student/mask_ap\n{text}"))
    cut = "{title: t, metric: student/mask_ap, baseline: a, lr=1, rows: {a: {}}}"
    with pytest.raises(ValueError, match=r"unknown key 'lr=1'.*holds a comma needs quotes"):
        load_table(write(tmp_path, cut))
    with pytest.raises(ValueError, match="expected one of 'a, lambda_pxl=1', 'a, lambda_pxl=2'"):
        load_table(write(tmp_path, {**GOOD, "rows": {"a": {}}, "grid": {"loss.lambda_pxl": [1, 2]}}))


def test_the_row_comes_after_the_users_overrides() -> None:
    recipe = load_table("losses").row_recipe(
        "sup", "shapes", scale="smoke", seed=3, overrides={"loss.lambda_pxl": "0.5", "stages.distill.steps": "2"}
    )
    assert (recipe.loss.lambda_pxl, recipe.stages.distill.steps, recipe.seed, recipe.scale) == (0, 2, 3, "smoke")


def test_a_rows_column_comes_after_the_users_fields() -> None:
    table = Table(
        name="x", title="x", metric="student/mask_ap", baseline="a", rows={"a": {"contrastive": "released"}, "b": {}}
    )
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
        (
            {"paper": "losses", "paper_columns": {"studentap": "student/ap50"}},
            "no column 'studentap'.*did you mean 'student_ap'",
        ),
        ({"paper_columns": {"student_ap": "student/mask_ap"}}, "paper_columns without paper"),
        ({"metric": "student/maskap"}, "metric: unknown metric 'student/maskap': did you mean 'student/mask_ap'"),
        ({"metric": "student/latency_ms"}, "metric: 'student/latency_ms' is measured by searches alone"),
        (
            {"paper": "losses", "paper_columns": {"student_ap": "student/AP"}},
            "paper_columns: unknown metric 'student/AP': did you mean 'student/a",
        ),
        (
            {
                "paper": "losses",
                "paper_columns": {"student_ap": "student/mask_ap"},
                "paper_rows": {"a": {"student/ap": "sup"}},
            },
            "paper_rows: 'a': no paper_columns name metric 'student/ap': did you mean 'student/mask_ap'",
        ),
        ({"seeds": [1, 1]}, "seeds: expected different ones"),
        ({"seeds": []}, "seeds: .*at least 1"),
        ({"seeds": [True]}, "seeds: expected a number, not true or false"),
        ({"seeds": [-1]}, "seeds.0: .*greater than or equal to 0 .*-1"),
        ({"seeds": [2**63]}, "seeds.0: .*less than 9223372036854775808"),
        ({"base": {"loss.lambda_pxl": float("inf")}}, "base: loss.lambda_pxl: .*finite number"),
        ({"rows": {"a": {"loss.lambda_pxl": True}}}, "row 'a': loss.lambda_pxl: expected a number, not true or false"),
        ({"rows": {"a": {"stages.distill.steps": "x" + "9" * 400}}}, "row 'a': stages.distill.steps: .*finite number"),
        ({"grid": {"loss.lambda_pxl": [float("nan")]}, "baseline": "a, lambda_pxl=nan"}, "lambda_pxl: .*finite number"),
        ({"rows": {}}, "rows: .*at least 1"),
        ({"base": {"loss.lambda_pxI": 1}}, "base: unknown recipe key .* did you mean 'loss.lambda_pxl'"),
        ({"base": {"preset": "shape"}}, "base: preset: unknown 'shape': did you mean 'shapes'"),
        ({"rows": {"a": {}, "b/c": {}}}, "row 'b/c': expected a name .* without /"),
        ({"rows": {"a": {}, "": {}}}, "row '': expected a name"),
        ({"grid": {"loss.lambda_pxI": [1]}, "baseline": "a, lambda_pxI=1"}, "lambda_pxI=1'.* unknown recipe key"),
        ({"grid": {"x": {"y": {"loss.lambda": 1}}}, "baseline": "a, y"}, "row 'a, y': unknown recipe key"),
        ({"grid": {"loss.lambda_pxl": 3}}, "grid.loss.lambda_pxl"),
        (
            {"paper": "losses", "paper_columns": {"student_ap": "student/mask_ap"}, "paper_rows": {"z": "sup"}},
            "'z' is not a row",
        ),
        (
            {"paper": "losses", "paper_columns": {"student_ap": "student/mask_ap"}, "paper_rows": {"a": "supp"}},
            "no row 'supp' in 'losses': did you mean 'sup'",
        ),
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
