"""The recipe: presets, overrides, and what a wrong key or value is told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cast_ray.plan.graph import plan
from cast_ray.recipe import (
    CONTRASTIVE_PRESETS,
    SCALES,
    Recipe,
    build_recipe,
    parse_overrides,
    preset_names,
    recipe_keys,
)
from cast_ray.recipe.runtime import parse_selector


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_builds_at_every_scale(preset: str, scale: str) -> None:
    recipe = build_recipe(preset, scale)
    assert (recipe.preset, recipe.scale) == (preset, scale)
    assert recipe.data.format == {"nuclei": "coco", "crowded": "shapes"}.get(preset, preset)


@pytest.mark.parametrize("preset", ["cityscapes", "ade20k"])
def test_smoke_needs_no_download(preset: str) -> None:
    recipe = build_recipe(preset, "smoke")
    for model in (recipe.teacher, recipe.student):
        assert model.encoder.checkpoint == "" and model.hidden_dim <= 64
    assert all(getattr(recipe.stages, s).steps <= 4 for s in ("pretrain", "adapt", "selftrain", "distill", "refine"))


@pytest.mark.parametrize("scale", ["demo", "full"])
@pytest.mark.parametrize("preset", ["cityscapes", "ade20k", "coco"])
def test_the_papers_teacher_is_adapted_as_it_says(preset: str, scale: str) -> None:
    recipe = build_recipe(preset, scale)
    teacher, sizes = recipe.teacher, ("tiny", "small") if (preset, scale) == ("coco", "demo") else ("large", "large")
    assert teacher.kind == "grounded_sam" and recipe.stages.use_adapt and recipe.stages.pretrain.steps == 0
    names = teacher.checkpoint_fields().values()
    assert [size in name for size, name in zip(sizes, names, strict=True)] == [True, True]
    for stage in (recipe.stages.adapt, recipe.stages.selftrain):
        assert (stage.lr, stage.weight_decay, stage.clip_norm, stage.encoder_lr_factor) == (5e-5, 0.01, 0.1, 0.1)
        assert stage.lr * teacher.grounded_sam.segmenter_lr_factor == pytest.approx(5e-6)
        assert (stage.batch_labelled + stage.batch_unlabelled * (stage is recipe.stages.selftrain)) == 8
    assert build_recipe(preset, "smoke").teacher.kind == "expert"


def test_scales_differ_in_size_and_not_in_method() -> None:
    smoke, demo, full = (build_recipe("shapes", scale) for scale in SCALES)
    assert smoke.stages.distill.steps < demo.stages.distill.steps < full.stages.distill.steps
    assert smoke.loss == demo.loss == full.loss
    assert smoke.contrastive == demo.contrastive == full.contrastive
    assert smoke.student == demo.student == full.student


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("loss.lambda_pxi", "loss.lambda_pxl"),
        ("stages.distil.steps", "stages.distill.steps"),
        ("runtime.num_worker", "runtime.num_workers"),
        ("data.label_fractions", "data.label_fraction"),
        ("contrastive.samplr", "contrastive.sampler"),
        ("sed", "seed"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ValueError) as error:
        build_recipe("shapes", overrides={key: "1"})
    message = str(error.value)
    assert repr(key) in message and f"did you mean {nearest!r}?" in message and "\n" not in message


@pytest.mark.parametrize("key", ["loss", "stages.distill", "loss.lambda_pxl.more", ""])
def test_only_leaves_can_be_set(key: str) -> None:
    with pytest.raises(ValueError, match="unknown recipe key"):
        build_recipe("shapes", overrides={key: "1"})


@pytest.mark.parametrize("key", ["preset", "scale"])
def test_what_is_chosen_first_is_no_override(key: str) -> None:
    with pytest.raises(
        ValueError, match=f"^{key} is chosen before .*: expected the option --{key}, '{key}' in the `base`"
    ):
        build_recipe("shapes", overrides={key: "full"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss.lambda_pxl", "-1"),
        ("loss.lambda_pxl", "much"),
        ("data.label_fraction", "0"),
        ("data.label_fraction", "1.5"),
        ("data.image_px", "[64]"),
        ("stages.distill.steps", "ten"),
        ("stages.distill.steps", "1.5"),
        ("stages.adapt.ema", "1"),
        ("contrastive.sampler", "random"),
        ("runtime.num_workers", "0"),
        ("seed", ""),
        ("seed", "-1"),
        ("seed", str(2**63)),
        ("init_seed", str(2**64)),
        ("data.shapes.seed", "-1"),
        ("data.split_seed", "1e30"),
        ("seed", "true"),
        ("stages.distill.steps", "true"),
        ("labels.batch", "false"),
        ("data.image_px", "[true, 64]"),
        ("data.train_resize", "[true, 64]"),
        ("loss.lambda_pxl", "inf"),
        ("loss.lambda_pxl", ".nan"),
        ("contrastive.hinge", "nan"),
        ("pseudo.vote_scales", "[1.0, .inf]"),
        ("stages.distill.poly_power", "-.inf"),
    ],
)
def test_a_bad_value_names_its_key_and_itself(key: str, value: str) -> None:
    with pytest.raises(ValueError) as error:
        build_recipe("shapes", overrides={key: value})
    message = str(error.value)
    assert key in message and "got" in message and "\n" not in message


@pytest.mark.parametrize("value", ["true", "inf"])
def test_a_preset_is_as_strict_as_an_override(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "mine.yaml").write_text(f"recipe: {{loss: {{lambda_pxl: {value}}}}}")
    monkeypatch.setattr("cast_ray.recipe.build.resources.files", lambda _: tmp_path)
    preset_names.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"^loss\.lambda_pxl: .*number.*got"):
            build_recipe("mine", "full")
    finally:
        preset_names.cache_clear()


def test_truth_values_stay_where_they_belong() -> None:
    recipe = build_recipe("shapes", overrides={"runtime.use_gpu": "true", "data.flip": False})
    assert recipe.runtime.use_gpu is True and recipe.data.flip is False
    assert build_recipe("shapes", overrides={"seed": str(2**63 - 1)}).seed == 2**63 - 1


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("student.encoder.name", "convnxt", "convnext"),
        ("teacher.decoder", "dtp", "dpt"),
        ("data.format", "coc", "coco"),
    ],
)
def test_names_of_parts_are_checked_with_the_recipe(key: str, value: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: unknown name '{value}' in .*: did you mean '{meant}'"):
        build_recipe("shapes", overrides={key: value})
    assert build_recipe("shapes", overrides={key: "mine.code:name"})


def test_batches_must_fill_the_workers() -> None:
    with pytest.raises(ValueError, match=r"stages\.\w+\.batch_labelled is 8: .*runtime\.num_workers \(3\)"):
        build_recipe("shapes", overrides={"runtime.num_workers": "3"})
    assert build_recipe("shapes", overrides={"runtime.num_workers": "4"}).runtime.num_workers == 4


def elastic(preset: str = "shapes", **settings: str) -> Recipe:
    overrides = {"runtime.num_workers": "8", "runtime.min_workers": "1"}
    return build_recipe(preset, overrides=overrides | {k.replace("__", "."): v for k, v in settings.items()})


def test_workers_of_an_elastic_run_divide_every_batch() -> None:
    assert elastic().worker_counts == [8, 4, 2, 1] and elastic().runtime.least_workers == 1
    assert elastic(runtime__min_workers="3").worker_counts == [8, 4]
    assert (
        elastic(runtime__min_workers="0").worker_counts == [8]
        and not elastic(runtime__min_workers="8").runtime.is_elastic
    )
    with pytest.raises(ValueError, match=r"runtime\.min_workers is 9: expected at most runtime\.num_workers \(8\)"):
        elastic(runtime__min_workers="9")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"student__encoder__name": "swin-t"}, "student.encoder.name=swin-t drops paths"),
        ({"contrastive__gather": "false"}, "contrastive.gather=false takes negatives of the own worker"),
    ],
)
def test_an_elastic_run_whose_workers_would_draw_apart_is_refused(settings: dict[str, str], named: str) -> None:
    with pytest.raises(
        ValueError, match=rf"runtime\.min_workers=1: {re.escape(named)} for each worker apart.*expected"
    ):
        elastic(**settings)
    assert elastic(**settings, runtime__min_workers="0").runtime.num_workers == 8


def test_unknown_preset_and_scale() -> None:
    with pytest.raises(ValueError, match="unknown preset 'shape': did you mean 'shapes'"):
        build_recipe("shape")
    with pytest.raises(ValueError, match="unknown scale 'tiny': expected one of smoke, demo, full"):
        build_recipe("shapes", "tiny")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("loss.lambda_pxl", "1e-3", 1e-3),
        ("loss.lambda_pxl", "0.2", 0.2),
        ("stages.distill.lr", "2E-4", 2e-4),
        ("data.image_px", "[32, 48]", (32, 48)),
        ("data.flip", "false", False),
        ("data.flip", "off", False),
        ("runtime.amp", "off", "off"),
        ("contrastive.hinge", "null", None),
        ("contrastive.hinge", "0.5", 0.5),
        ("contrastive.sampler", "mask", "mask"),
        ("data.root", "", ""),
        ("data.root", "/data/one two", "/data/one two"),
        ("data.num_unlabelled", "12", 12),
        ("seed", "3", 3),
        ("loss.lambda_pxl", 0.2, 0.2),
    ],
)
def test_overrides_are_read_as_yaml_scalars(key: str, text: object, value: object) -> None:
    node: object = build_recipe("shapes", overrides={key: text})
    for part in key.split("."):
        node = getattr(node, part)
    assert node == value and type(node) is type(value)


def test_overrides_are_a_mapping_or_pairs() -> None:
    pairs = ["loss.lambda_pxl=0.2", "student=released"]
    assert build_recipe("shapes", overrides=pairs) == build_recipe(
        "shapes", overrides={"student": "released", "loss.lambda_pxl": 0.2}
    )
    assert build_recipe("shapes", overrides=[]) == build_recipe("shapes", overrides=()) == build_recipe("shapes")
    wrong: Any
    for wrong in ("loss.lambda_pxl=0.2", [("loss.lambda_pxl", 0.2)], {1: 2}, 5, {"seed"}):
        with pytest.raises(TypeError, match=r"^overrides: expected dotted keys .* or a list of 'key=value', got "):
            build_recipe("shapes", overrides=wrong)
    with pytest.raises(ValueError, match="expected key=value"):
        build_recipe("shapes", overrides=["loss.lambda_pxl"])
    for wrong in (5, None, ["shapes"]):
        with pytest.raises(ValueError, match=r"^unknown preset "):
            build_recipe(wrong)


def test_override_pairs() -> None:
    assert parse_overrides(["a.b=1", " c =x=y"]) == {"a.b": "1", "c": "x=y"}
    for pair in ("a.b", "=1", " =1"):
        with pytest.raises(ValueError, match="expected key=value"):
            parse_overrides([pair])


# The method's two columns, field by field.
PAPER = {
    "kind": "cast",
    "sampler": "fusion",
    "scope": "batch",
    "normalise": "l2",
    "hinge": None,
    "strong_grad": True,
    "head": "shared",
    "estimator": "sampled",
    "temperature_end": None,
    "gather": True,  # any pixel of the batch, however many workers share it
}
RELEASED = {
    "kind": "cast",
    "sampler": "class",  # y is F_c only
    "normalise": "sum",
    "scope": "cross-image",
    "estimator": "sampled",
    "num_negatives": 200,
    "replacement": False,
    "temperature": 0.3,
    "temperature_end": 0.07,
    "temperature_steps": 90_000,
    "hinge": 0.5,
    "strong_grad": False,
    "head": "frozen",
    "projection_dims": (128, 128, 128),
    "projection_bias": False,
    "feature_stride": None,  # the coarsest map
    "num_anchors": None,  # all pixels
    "pool_size": None,
    "gather": False,  # the local batch only
}


@pytest.mark.parametrize(("name", "column"), [("paper", PAPER), ("released", RELEASED)])
def test_contrastive_columns_of_the_method(name: str, column: dict[str, object]) -> None:
    recipe = build_recipe("shapes", overrides={"contrastive": name})
    assert {field: getattr(recipe.contrastive, field) for field in column} == column
    assert recipe.loss.lambda_pxl == 0.1
    # A column states all that it differs in: after the other one, it is itself.
    other = {field: value for column in CONTRASTIVE_PRESETS.values() for field, value in column.items()}
    dotted = {f"contrastive.{field}": value for field, value in other.items()}
    assert build_recipe("shapes", overrides=dotted | {"contrastive": name}).contrastive.model_dump(
        include=set(CONTRASTIVE_PRESETS[name])
    ) == recipe.contrastive.model_dump(include=set(CONTRASTIVE_PRESETS[name]))


def test_a_named_column_can_be_changed_after_it() -> None:
    recipe = build_recipe("shapes", overrides={"contrastive": "released", "contrastive.hinge": "null"})
    assert recipe.contrastive.hinge is None and recipe.contrastive.head == "frozen"
    with pytest.raises(ValueError, match="did you mean 'released'"):
        build_recipe("shapes", overrides={"contrastive": "relesed"})


def test_a_single_field_wins_over_a_named_column_in_any_order() -> None:
    for pairs in (["contrastive=released", "contrastive.hinge=0.7"], ["contrastive.hinge=0.7", "contrastive=released"]):
        contrastive = build_recipe("shapes", overrides=parse_overrides(pairs)).contrastive
        assert contrastive.hinge == 0.7 and contrastive.head == "frozen"


@pytest.mark.parametrize("kind", ["supervised", "pc2seg", "infonce"])
def test_hidden_truth_is_for_the_oracle_of_cast_alone(kind: str) -> None:
    with pytest.raises(ValueError) as error:
        build_recipe("shapes", overrides={"contrastive.kind": kind, "contrastive.sampler": "oracle"})
    assert str(error.value).startswith(
        f"contrastive.sampler is oracle with contrastive.kind {kind}: expected kind cast"
    )


def test_named_columns_hold_known_fields_only() -> None:
    leaves = {key.removeprefix("contrastive.") for key in recipe_keys() if key.startswith("contrastive.")}
    for column in CONTRASTIVE_PRESETS.values():
        assert set(column) <= leaves


def test_a_recipe_is_frozen_and_survives_its_own_dump() -> None:
    recipe = build_recipe("coco", "smoke", {"seed": 5})
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.loss.lambda_pxl = 1.0  # type: ignore[misc]
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_the_experts_keys_are_those_of_a_segmenter() -> None:
    recipe = build_recipe("shapes", overrides={"teacher.encoder.widths": "[8, 16, 32, 64]", "teacher.hidden_dim": "32"})
    assert recipe.teacher.kind == "expert" and recipe.teacher.encoder.widths == (8, 16, 32, 64)
    assert recipe.teacher.segmenter.hidden_dim == 32 and not recipe.needs_foundation


def test_words_for_classes_are_set_as_yaml() -> None:
    overrides = {"teacher.kind": "sam3", "teacher.prompt.synonyms": "{rider: [cyclist, motorcyclist]}"}
    recipe = build_recipe("coco", overrides=overrides)
    assert recipe.teacher.prompt.synonyms == {"rider": ("cyclist", "motorcyclist")}
    assert recipe.needs_foundation and hash(recipe.teacher.prompt)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"teacher.kind": "sam2"}, "teacher.kind"),
        ({"teacher.kind": "ensemble"}, "expected use_adapt=false"),
        ({"teacher.kind": "ensemble", "teacher.ensemble.members": "[sam4]"}, "'sam4' is no kind"),
        ({"teacher.kind": "ensemble", "teacher.ensemble.members": "[expert]"}, "'expert' has no checkpoint"),
        ({"teacher.grounded_sam.train_detector": "0", "teacher.grounded_sam.train_segmenter": "0"}, "both false"),
        ({"teacher.grounded_sam.dettector": "x"}, "did you mean 'teacher.grounded_sam.detector'?"),
        ({"teacher.prompt.synonyms": "person"}, "teacher.prompt.synonyms"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        build_recipe("coco", overrides=overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_ensemble_lists_its_members_checkpoints() -> None:
    overrides = {"teacher.kind": "ensemble", "stages.use_adapt": "false"}
    overrides |= {"teacher.ensemble.members": "[sam3, grounded_sam, runs/t]"}
    assert build_recipe("coco", "full", overrides).teacher.checkpoint_fields() == {
        "teacher.sam3.checkpoint": "facebook/sam3",
        "teacher.grounded_sam.detector": "openmmlab-community/mm_grounding_dino_large_all",
        "teacher.grounded_sam.segmenter": "facebook/sam2.1-hiera-large",
        "teacher.ensemble.members[2]": "runs/t",
    }


@pytest.mark.parametrize(
    ("text", "selector"),
    [
        ("", {}),
        ("ray.io/accelerator-type=L4", {"ray.io/accelerator-type": "L4"}),
        ("market=!spot, zone=in(a-1,b_2.c),x=!in(y)", {"market": "!spot", "zone": "in(a-1,b_2.c)", "x": "!in(y)"}),
    ],
)
def test_label_selectors(text: str, selector: dict[str, str]) -> None:
    recipe = build_recipe("shapes", overrides={"runtime.worker_selector": text})
    assert parse_selector(recipe.runtime.worker_selector) == selector


@pytest.mark.parametrize("text", ["L4", "a=", "=b", "a=in()", "a=in(b", "a=b;c=d", "a=b,,c=d"])
def test_what_is_no_label_selector(text: str) -> None:
    with pytest.raises(ValueError, match=r"runtime\.worker_selector.*no label selector: expected for example ray\.io/"):
        build_recipe("shapes", overrides={"runtime.worker_selector": text})


def test_labellers_that_are_selected_must_exist() -> None:
    selected = {"runtime.labeller_selector": "gpu=big"}
    with pytest.raises(ValueError, match=r"runtime\.labeller_selector.*runtime\.num_labellers"):
        build_recipe("shapes", overrides=selected)
    for more in ({"runtime.num_labellers": "1"}, {"labels.mode": "online"}):
        assert build_recipe("shapes", overrides=selected | more).runtime.labeller_selector == "gpu=big"


def test_selectors_change_no_fingerprint() -> None:
    selectors = {"runtime.worker_selector": "a=b", "runtime.labeller_selector": "a=c"}
    recipes = [build_recipe("shapes", overrides={"runtime.num_labellers": "1", **more}) for more in ({}, selectors)]
    plain, selected = ([stage.fingerprint for stage in plan(recipe, "0" * 64, row="row").stages] for recipe in recipes)
    assert plain == selected
