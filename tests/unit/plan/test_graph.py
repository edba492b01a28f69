"""The stage graph: which stages a row has, what it shares, and what a fingerprint does and does not depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import create_model

from cast_ray.plan.ablation import load_table
from cast_ray.plan.graph import DataHashes, RowPlan, Stage, artifact_key, input_size_of, plan, plan_sweep
from cast_ray.plan.stage_parts import train_config
from cast_ray.recipe import ModelConfig, Recipe, TrainConfig, build_recipe, recipe_keys
from cast_ray.recipe.part import CHANGES_NO_RESULT, OFF_BY_DEFAULT, marked

HASH = "0" * 64
SUP = ["pretrain", "adapt", "distill", "refine"]
SEMI = ["pretrain", "adapt", "label-adapted", "selftrain", "label-teacher", "distill", "refine"]
PRECISION = ("runtime.amp", "runtime.use_gpu")
ROLES = {"zero_shot", "teacher", "student", "refined"}


def make(overrides: dict[str, Any] | None = None, **options: Any) -> RowPlan:
    return plan(build_recipe("shapes", "smoke", overrides), options.pop("content_hash", HASH), **options)


def rows_of_losses() -> dict[str, RowPlan]:
    table = load_table("losses")
    return {row: plan(table.row_recipe(row, "shapes", "smoke"), HASH, row=row) for row in table.rows}


def work(row: RowPlan) -> list[str]:
    return [s.name for s in row.stages if s.kind != "evaluate"]


def prints(row: RowPlan) -> dict[str, str]:
    """Role -> fingerprint, without `final`, a second name of one of them."""
    return {role: stage.fingerprint for role, stage in row.roles.items() if role != "final"}


def changed(before: RowPlan, after: RowPlan) -> set[str]:
    return {role for role, value in prints(before).items() if prints(after).get(role) != value}


@pytest.fixture(scope="module")
def losses() -> dict[str, RowPlan]:
    return rows_of_losses()


def test_stages_of_the_four_loss_rows(losses: dict[str, RowPlan]) -> None:
    assert {row: work(p) for row, p in losses.items()} == {
        "sup": SUP,
        "sup+semi": SEMI,
        "sup+pxl": SUP,
        "sup+semi+pxl": SEMI,
    }
    for row in losses.values():
        assert [stage.name for stage in row.student_stages] == ["refine", "distill"]
        assert set(row.roles) >= ROLES
        assert [row.roles[name].name for name in work(row)] == work(row)


def test_parents_come_first_and_are_the_methods(losses: dict[str, RowPlan]) -> None:
    row = losses["sup+semi+pxl"]
    roles = prints(row)
    parents = {s.name: s.parents for s in row.stages if s.kind != "evaluate"}
    assert parents == {
        "pretrain": {},
        "adapt": {"init": roles["pretrain"]},
        "label-adapted": {"teacher": roles["adapt"]},
        "selftrain": {"init": roles["pretrain"], "labels": roles["label-adapted"]},  # re-initialised from theta_T0
        "label-teacher": {"teacher": roles["selftrain"]},
        "distill": {"labels": roles["label-teacher"]},
        "refine": {"init": roles["distill"]},
    }
    models = {role: row.roles[role].parents["model"] for role in ROLES}
    assert models == {
        "zero_shot": roles["pretrain"],
        "teacher": roles["selftrain"],
        "student": roles["distill"],
        "refined": roles["refine"],
    }
    for plan_ in losses.values():
        seen: set[str] = set()
        for stage in plan_.stages:
            assert set(stage.parents.values()) <= seen
            seen.add(stage.fingerprint)


def test_lambdas_and_data_of_each_step(losses: dict[str, RowPlan]) -> None:
    def facts(row: str, stage: str) -> tuple[float, float, bool]:
        config = losses[row].roles[stage].config
        return config["loss"]["lambda_semi"], config["loss"]["lambda_pxl"], config["unlabelled"]

    base = build_recipe("shapes").loss
    semi, pxl = base.lambda_semi, base.lambda_pxl
    full = "sup+semi+pxl"
    assert {s: facts(full, s) for s in ("pretrain", "adapt", "selftrain", "distill", "refine")} == {
        "pretrain": (0, 0, False),
        "adapt": (0, pxl, False),
        "selftrain": (1, pxl, True),
        "distill": (semi, pxl, True),
        "refine": (0, 0, False),
    }
    assert facts("sup", "distill") == (0, 0, False)
    assert facts("sup+semi", "distill") == (semi, 0, True)
    assert facts("sup+pxl", "distill") == (0, pxl, True)
    assert {s.config["contrastive"] is None for s in losses["sup+semi"].stages if s.kind == "train"} == {True}


def test_every_row_sees_the_same_labelled_images_and_steps(losses: dict[str, RowPlan]) -> None:
    for stage in ("adapt", "distill", "refine"):
        configs = [row.roles[stage] for row in losses.values()]
        assert len({c.steps for c in configs}) == 1
        assert len({c.config["train"]["batch_labelled"] for c in configs}) == 1


def test_what_the_loss_rows_share(losses: dict[str, RowPlan]) -> None:
    def users(stage: str, row: str) -> set[str]:
        wanted = losses[row].roles[stage].fingerprint
        return {name for name, p in losses.items() if any(s.fingerprint == wanted for s in p.stages)}

    assert users("pretrain", "sup") == users("zero_shot", "sup") == set(losses)
    assert users("adapt", "sup") == {"sup", "sup+semi"}
    assert users("adapt", "sup+pxl") == {"sup+pxl", "sup+semi+pxl"}
    for stage in ("label-adapted", "selftrain", "label-teacher", "distill", "refine"):
        assert users(stage, "sup+semi") == {"sup+semi"}
    assert users("distill", "sup") == {"sup"} and users("distill", "sup+pxl") == {"sup+pxl"}


def test_a_sweep_counts_shared_and_stored_steps(losses: dict[str, RowPlan]) -> None:
    stages = build_recipe("shapes", "smoke").stages
    sweep = plan_sweep(losses.values(), [])
    own = {n: getattr(stages, n).steps for n in ("pretrain", "adapt", "selftrain", "distill", "refine")}
    rows = 4 * (own["pretrain"] + own["adapt"] + own["distill"] + own["refine"]) + 2 * own["selftrain"]
    unique = own["pretrain"] + 2 * own["adapt"] + 2 * own["selftrain"] + 4 * (own["distill"] + own["refine"])
    assert (sweep.steps_from_scratch, sweep.steps_unique, sweep.steps_to_run) == (rows, unique, unique)
    assert len(sweep.unique) == len({s.fingerprint for row in losses.values() for s in row.stages})

    stored = [losses["sup"].roles["pretrain"].fingerprint, losses["sup"].roles["adapt"].fingerprint, "unrelated"]
    again = plan_sweep(losses.values(), stored)
    assert again.stored == set(stored[:2])
    assert again.steps_to_run == unique - own["pretrain"] - own["adapt"]
    assert again.steps_from_scratch == rows
    assert plan_sweep(losses.values(), sweep.unique).steps_to_run == 0


# Recipe field -> another value, and stages of sup+semi+pxl whose artifacts it changes first (children follow).
RESULT_FIELDS = {
    "seed": ("1", {"adapt", "label-adapted", "selftrain", "label-teacher", "distill", "refine"}),
    "init_seed": ("1", {"adapt", "selftrain", "distill", "refine"}),
    "order_seed": ("1", {"adapt", "selftrain", "distill", "refine"}),
    "data.label_fraction": ("0.5", {"adapt", "label-adapted", "selftrain", "label-teacher", "distill", "refine"}),
    "data.label_family": ("per-class", {"adapt", "label-adapted", "selftrain", "label-teacher", "distill", "refine"}),
    "data.split_seed": ("5", {"adapt", "label-adapted", "selftrain", "label-teacher", "distill", "refine"}),
    "data.num_unlabelled": ("9", {"label-adapted", "selftrain", "distill"}),
    "data.unlabelled_fraction": ("0.5", {"label-adapted", "selftrain", "distill"}),
    "data.unlabelled_pool": ("both", {"label-adapted", "selftrain", "distill"}),
    "data.image_px": ("[32, 32]", {"pretrain", "adapt", "distill", "zero_shot"}),
    "data.scale_jitter": ("[0.9, 1.1]", {"pretrain", "adapt", "distill"}),
    "data.flip": ("false", {"pretrain", "adapt", "distill"}),
    "data.color_jitter": ("0.3", {"pretrain", "adapt", "distill"}),
    "data.color": ("ssd", {"pretrain", "adapt", "distill"}),
    "data.train_resize": ("native", {"pretrain", "adapt", "distill"}),
    "data.scale_steps": ("4", {"pretrain", "adapt", "distill"}),
    "data.whole_images": ("true", {"pretrain", "adapt", "distill"}),
    "data.inference_resize": ("[64, 100]", {"pretrain", "adapt", "distill", "zero_shot", "label-teacher", "student"}),
    "data.drop_empty": ("true", {"adapt", "label-adapted", "selftrain", "label-teacher", "distill", "refine"}),
    "teacher.hidden_dim": ("32", {"pretrain", "adapt", "selftrain"}),
    "student.num_queries": ("9", {"distill", "refine"}),
    "student.encoder.widths": ("[8, 16, 32, 64]", {"distill", "refine"}),
    "student.proposals": ("false", {"distill", "refine"}),
    "student.encoder.checkpoint": ("hub", {"distill", "refine"}),
    "student.decoder": ("fpn", {"distill", "refine"}),
    "student.decoder_layers": ("2", {"distill", "refine"}),
    "stages.pretrain.steps": ("9", {"pretrain"}),
    "teacher.local_masks": ("true", {"pretrain", "adapt", "selftrain"}),
    "student.local_masks": ("true", {"distill"}),
    "stages.adapt.lr": ("3e-4", {"adapt"}),
    "stages.selftrain.ema": ("0.9", {"selftrain"}),
    "stages.selftrain.batch_unlabelled": ("4", {"selftrain"}),
    "stages.distill.steps": ("9", {"distill"}),
    "stages.distill.batch_labelled": ("4", {"distill"}),
    "stages.distill.batch_unlabelled": ("4", {"distill"}),
    "stages.distill.schedule": ("poly", {"distill"}),
    "stages.distill.clip_norm": ("0.5", {"distill"}),
    "stages.distill.layer_decay": ("0.8", {"distill"}),
    "stages.refine.weight_decay": ("0.1", {"refine"}),
    "stages.refine.decay_biases": ("true", {"refine"}),
    "loss.lambda_semi": ("0.5", {"distill"}),
    "loss.lambda_pxl": ("0.2", {"adapt", "selftrain", "distill"}),
    "loss.mask_weight": ("4", {"pretrain", "adapt", "selftrain", "distill", "refine"}),
    "loss.num_points": ("64", {"pretrain", "adapt", "selftrain", "distill", "refine"}),
    "loss.exact": ("false", {"pretrain", "adapt", "selftrain", "distill", "refine"}),
    "loss.pseudo_weighting": ("score", {"selftrain", "distill"}),
    "contrastive.sampler": ("uniform", {"adapt", "selftrain", "distill"}),
    "contrastive.temperature": ("0.2", {"adapt", "selftrain", "distill"}),
    "contrastive.kind": ("infonce", {"adapt", "selftrain", "distill"}),
    "contrastive.scope": ("cross-image", {"adapt", "selftrain", "distill"}),
    "contrastive.estimator": ("expectation", {"adapt", "selftrain", "distill"}),
    "contrastive.normalise": ("sum", {"adapt", "selftrain", "distill"}),
    "contrastive.num_negatives": ("7", {"adapt", "selftrain", "distill"}),
    "contrastive.num_anchors": ("null", {"adapt", "selftrain", "distill"}),
    "contrastive.pool_size": ("null", {"adapt", "selftrain", "distill"}),
    "contrastive.replacement": ("false", {"adapt", "selftrain", "distill"}),
    "contrastive.temperature_end": ("0.07", {"adapt", "selftrain", "distill"}),
    "contrastive.temperature_steps": ("100", {"adapt", "selftrain", "distill"}),
    "contrastive.hinge": ("0.5", {"adapt", "selftrain", "distill"}),
    "contrastive.strong_grad": ("false", {"adapt", "selftrain", "distill"}),
    "contrastive.head": ("frozen", {"adapt", "selftrain", "distill"}),
    "contrastive.head_ema": ("0.9", {"adapt", "selftrain", "distill"}),
    "contrastive.feature_stride": ("null", {"adapt", "selftrain", "distill"}),
    "contrastive.projection_dims": ("[8, 8]", {"adapt", "selftrain", "distill"}),
    "contrastive.projection_bias": ("false", {"adapt", "selftrain", "distill"}),
    "contrastive.gather": ("false", {"adapt", "selftrain", "distill"}),
    "pseudo.score_threshold": ("0.5", {"label-adapted", "label-teacher"}),
    "labels.batch": ("4", {"label-adapted", "label-teacher"}),
    "pseudo.mask_quality_threshold": ("0.5", {"label-adapted", "label-teacher"}),
    "pseudo.order": ("detector", {"label-adapted", "label-teacher"}),
    "evaluation.metric": ("cityscapes", {"zero_shot", "teacher", "student", "refined"}),
    "evaluation.max_detections": ("50", {"zero_shot", "teacher", "student", "refined"}),
    "evaluation.num_images": ("5", {"zero_shot", "teacher", "student", "refined"}),
}
# theta_T0 stands for a foundation model: one for all seeds and fractions.
UNTOUCHED = {
    "seed": {"pretrain", "zero_shot"},
    "init_seed": {"pretrain", "zero_shot"},
    "order_seed": {"pretrain", "zero_shot"},
    "data.label_fraction": {"pretrain", "zero_shot"},
    "data.split_seed": {"pretrain", "zero_shot"},
    "data.num_unlabelled": {"pretrain", "adapt", "zero_shot"},
    "data.unlabelled_fraction": {"pretrain", "adapt", "zero_shot"},
    "data.unlabelled_pool": {"pretrain", "adapt", "zero_shot"},
    "teacher.hidden_dim": set(),
    "student.num_queries": {"pretrain", "adapt", "label-adapted", "selftrain", "label-teacher", "teacher"},
    "student.local_masks": {"pretrain", "adapt", "label-adapted", "selftrain", "label-teacher", "teacher"},
    "stages.distill.steps": {"pretrain", "adapt", "label-adapted", "selftrain", "label-teacher", "teacher"},
    "loss.lambda_semi": {"pretrain", "adapt", "label-adapted", "selftrain", "label-teacher", "teacher"},
    "loss.lambda_pxl": {"pretrain", "zero_shot"},
    "contrastive.sampler": {"pretrain", "zero_shot"},
    "loss.pseudo_weighting": {"pretrain", "adapt", "zero_shot", "label-adapted"},
    "stages.refine.weight_decay": {"pretrain", "adapt", "selftrain", "distill", "student", "teacher"},
    "evaluation.metric": {"pretrain", "adapt", "label-adapted", "selftrain", "label-teacher", "distill", "refine"},
    "evaluation.num_images": {"pretrain", "adapt", "label-adapted", "selftrain", "label-teacher", "distill", "refine"},
    "pseudo.score_threshold": {"pretrain", "adapt", "zero_shot"},
    "labels.batch": {"pretrain", "adapt", "zero_shot"},
}


@pytest.mark.parametrize("key", RESULT_FIELDS)
def test_a_field_that_changes_a_result_changes_its_stages(key: str) -> None:
    value, first = RESULT_FIELDS[key]
    before, after = make(), make({key: value})
    different = changed(before, after)
    assert first <= different
    assert not different & UNTOUCHED.get(key, set())
    known = {stage.fingerprint: stage.name for stage in before.stages}
    for stage in before.stages:  # whatever changes, its children change with it
        if any(parent in known and known[parent] in different for parent in stage.parents.values()):
            assert all(stage.fingerprint != s.fingerprint for s in after.stages), stage.name


@pytest.mark.parametrize(
    ("key", "value"),
    [(k, None) for k in recipe_keys() if k.startswith("runtime.") and k not in PRECISION]
    + [
        (f"stages.{s}.{field}", "3")
        for s in ("pretrain", "adapt", "selftrain", "distill", "refine")
        for field in marked(TrainConfig, CHANGES_NO_RESULT)
    ]
    + [("evaluation.batch", "3"), ("evaluation.every_steps", "2")]
    + [("data.root", "/elsewhere"), ("data.max_bad_fraction", "0.5")]
    # what these change is in the hash of the dataset's content
    + [("data.verify", "none"), ("data.max_image_pixels", "9"), ("data.annotations", "a.json"), ("data.image_dir", "b")]
    + [("data.extra_annotations", "c.json"), ("data.extra_image_dir", "d"), ("data.val_fraction", "0.5")]
    + [("data.min_per_class", "3")],  # of another family
)
def test_where_and_how_it_runs_changes_nothing(key: str, value: str | None) -> None:
    others = {
        "runtime.num_workers": "2",
        "runtime.min_workers": "1",
        "runtime.gradient_checkpointing": "true",
        "runtime.cpus_per_worker": "2",
        "runtime.validate_on_gpu": "false",
        "runtime.num_labellers": "3",
        "runtime.cpus_per_labeller": "1.5",
        "runtime.cpus_per_read": "0.7",
        "runtime.reads_per_stream": "4",
        "runtime.stream_memory_mb": "32",
        "runtime.max_concurrent_stages": "5",
        "runtime.max_failures": "9",
        "runtime.worker_selector": "gpu=L4",
        "runtime.labeller_selector": "gpu=H100",
    }
    value = others[key] if value is None else value
    needs = {"runtime.num_labellers": "3"} if key == "runtime.labeller_selector" else {}
    before, after = make(), make({key: value, **needs})
    assert before.recipe != after.recipe
    assert not changed(before, after)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, "off"),
        ({"runtime.amp": "off", "runtime.use_gpu": "true"}, "off"),
        ({"runtime.use_gpu": "true"}, "bf16"),
        ({"runtime.amp": "bf16"}, "bf16"),
        ({"runtime.amp": "bf16", "runtime.use_gpu": "true"}, "bf16"),
        ({"runtime.amp": "fp16"}, "fp16"),
    ],
)
@pytest.mark.parametrize("has_gpu", [False, True])
def test_precision_is_a_part_of_every_stage_whatever_machine_plans(
    fields: dict[str, str], wanted: str, has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("is_available", "is_bf16_supported"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, **__: has_gpu)
    row = make(fields)
    assert {stage.precision for stage in row.stages} == {wanted}
    same = make({} if wanted == "off" else {"runtime.amp": wanted})
    assert prints(row) == prints(same)
    others = [make({"runtime.amp": amp}) for amp in ("off", "bf16", "fp16") if amp != wanted]
    assert all(changed(other, row) == set(prints(row)) for other in others)  # no artifact is shared


def widened(recipe: Any, part: str, mark: Any, **values: Any) -> Any:
    """A recipe whose part has a field more, `switch`, as a later version may add one."""
    path, _, name = part.rpartition(".")
    holder = getattr(recipe, path) if path else recipe
    old = getattr(holder, name)
    kind: Any = create_model("Wider", __base__=type(old), switch=(Annotated[bool, mark], False))
    holder = holder.model_copy(
        update={name: kind(**{field: getattr(old, field) for field in old.model_fields_set}, **values)}
    )
    return recipe.model_copy(update={path: holder}) if path else holder


@pytest.mark.parametrize(
    ("part", "stages"),
    [
        ("student", {"distill", "refine", "student", "refined"}),
        ("contrastive", {"adapt", "selftrain", "distill"}),
        ("evaluation", {"zero_shot", "teacher", "student", "refined"}),
        ("pseudo", {"label-adapted", "label-teacher"}),
        ("loss", {"pretrain", "adapt", "selftrain", "distill", "refine"}),
        ("stages.refine", {"refine", "refined"}),
        ("data", set()),  # whose fields `VIEW_FIELDS` and `split_part` choose
    ],
)
def test_a_marked_field_that_is_added_to_a_part_moves_no_fingerprint_at_its_default(
    part: str, stages: set[str]
) -> None:
    recipe = build_recipe("shapes", "smoke")
    before = plan(recipe, HASH)
    assert changed(before, plan(widened(recipe, part, OFF_BY_DEFAULT), HASH)) == set()
    assert stages <= changed(before, plan(widened(recipe, part, OFF_BY_DEFAULT, switch=True), HASH))
    assert changed(before, plan(widened(recipe, part, CHANGES_NO_RESULT, switch=True), HASH)) == set()
    unmarked = changed(before, plan(widened(recipe, part, None), HASH))
    assert stages <= unmarked and bool(unmarked) == bool(stages)


def test_naming_the_default_seed_changes_nothing() -> None:
    assert prints(make({"seed": "3", "init_seed": "3", "order_seed": "3"})) == prints(make({"seed": "3"}))


def test_the_dataset_is_in_every_fingerprint() -> None:
    before, after = make(), make(content_hash="1" * 64)
    assert changed(before, after) == set(prints(before))


ON_TARGET = {"adapt", "label-adapted", "selftrain", "label-teacher", "distill", "refine"}


@pytest.mark.parametrize(
    ("fields", "first", "second", "stages"),
    [
        ({"data.label_family": "per-class"}, {"data.min_per_class": "1"}, {"data.min_per_class": "2"}, ON_TARGET),
        ({}, {"label_list": "a"}, {"label_list": "b"}, ON_TARGET),
        ({"data.unlabelled_list": "u"}, {"unlabelled_list": "a"}, {"unlabelled_list": "b"}, ON_TARGET - {"adapt"}),
        ({"data.unlabelled_pool": "extra"}, {"extra": "a"}, {"extra": "b"}, ON_TARGET - {"adapt"}),
    ],
)
def test_lists_and_pools_count_by_their_content(
    fields: dict[str, str], first: dict[str, str], second: dict[str, str], stages: set[str]
) -> None:
    def made(values: dict[str, str], file: str) -> RowPlan:
        family = {} if fields.keys() & {"data.label_family", "data.unlabelled_pool"} else {"data.label_family": "list"}
        lists = {"data.label_list": file} if family else {}
        recipe_part = {k: v for k, v in values.items() if k.startswith("data.")}
        hashes = DataHashes(**{k: v for k, v in values.items() if not k.startswith("data.")})
        return make(fields | family | lists | recipe_part, hashes=hashes)

    before, after = made(first, "x.txt"), made(second, "x.txt")
    roles = set(prints(before))
    assert changed(before, after) == stages | {"teacher", "student", "refined"} & roles
    assert not changed(before, made(first, "elsewhere/y.txt"))  # where the list lies does not matter


def test_a_list_is_not_in_stages_without_its_images() -> None:
    supervised = {"loss.lambda_semi": "0", "loss.lambda_pxl": "0", "data.unlabelled_pool": "both"}
    assert not changed(make(supervised, hashes=DataHashes(extra="a")), make(supervised, hashes=DataHashes(extra="b")))


def test_names_of_rows_are_in_none() -> None:
    assert prints(make(row="a")) == prints(make(row="b"))


def test_a_switched_off_term_leaves_no_trace() -> None:
    off = {"loss.lambda_pxl": "0"}
    assert prints(make(off)) == prints(make(off | {"contrastive": "released"}))
    assert prints(make(off)) == prints(make({"contrastive.kind": "none"}))
    assert prints(make(off)) == prints(make({"contrastive.kind": "none", "loss.lambda_pxl": "0.5"}))


def test_online_labels_of_a_frozen_teacher_are_the_same_stages() -> None:
    offline, online = make(), make({"labels.mode": "online"})
    assert work(online) == [name for name in SEMI if not name.startswith("label-")]
    for name, stage in online.roles.items():
        assert stage.fingerprint == offline.roles[name].fingerprint, name
    student, teacher = online.roles["distill"], online.roles["selftrain"]
    assert student.parents == {"teacher": teacher.fingerprint}  # a stored student is found whoever made its labels
    roles = prints(online)
    assert teacher.parents == {"init": roles["pretrain"], "teacher": roles["adapt"]}
    assert student.online == offline.roles["label-teacher"] and teacher.online == offline.roles["label-adapted"]
    assert all(stage.online is None for name, stage in online.roles.items() if name not in ("distill", "selftrain"))


def test_a_refreshed_teacher_is_another_stage() -> None:
    frozen = make({"labels.mode": "online"})
    refreshed = make({"labels.mode": "online", "labels.refresh_steps": "5"})
    assert changed(frozen, refreshed) == {"selftrain", "teacher", "distill", "student", "refine", "refined"}
    assert refreshed.roles["selftrain"].config["refresh_steps"] == 5
    assert "refresh_steps" not in refreshed.roles["distill"].config  # the teacher of 2b is frozen
    with pytest.raises(ValueError, match=r"labels\.refresh_steps is 5: expected labels\.mode=online"):
        make({"labels.refresh_steps": "5"})


def test_the_student_can_be_its_own_teacher() -> None:
    frozen = make({"labels.mode": "online"})
    settings = {"labels.mode": "online", "labels.refresh_steps": "5", "labels.refresh_stages": "[distill]"}
    assert changed(frozen, make(settings)) == {"distill", "student", "refine", "refined"}
    both = make(settings | {"labels.refresh_stages": "[selftrain, distill]"})
    assert [both.roles[name].config["refresh_steps"] for name in ("selftrain", "distill")] == [5, 5]
    assert changed(frozen, make({"labels.mode": "online", "labels.refresh_stages": "[distill]"})) == set()  # off
    assert make({"labels.mode": "online", "labels.refresh_steps": "5", "teacher.kind": "sam3"}, foundation="f")


def test_soft_targets_ask_the_students_labels_for_what_the_teacher_believes() -> None:
    mine = {"label-teacher", "distill", "student", "refine", "refined"}
    soft = make({"loss.soft_targets": "both"})
    assert changed(make(), soft) == mine and changed(make(), make({"loss.soft_targets": "off"})) == set()
    assert soft.roles["label-teacher"].config["soft"] and "soft" not in soft.roles["label-adapted"].config
    masks = make({"loss.soft_targets": "mask"})
    assert changed(soft, masks) == mine - {"label-teacher"}  # the same labels


def test_copy_paste_is_the_students_alone() -> None:
    assert changed(make(), make({"data.copy_paste": "0.5"})) == {"distill", "student", "refine", "refined"}
    assert changed(make(), make({"data.copy_paste": "0"})) == set()


def test_burn_in_is_the_students_alone() -> None:
    students = {"distill", "student", "refine", "refined"}
    assert changed(make(), make({"loss.burn_in_fraction": "0.3"})) == students
    assert changed(make(), make({"loss.burn_in_fraction": "0"})) == set()


def test_an_imported_foundation_takes_the_place_of_pre_training() -> None:
    row = make(foundation="f" * 20)
    assert work(row) == SEMI[1:]
    assert row.roles["zero_shot"].parents == {"model": "f" * 20}
    assert row.roles["adapt"].parents == {"init": "f" * 20}
    assert row.roles["selftrain"].parents["init"] == "f" * 20
    assert changed(row, make(foundation="e" * 20)) == set(prints(row))
    assert "pretrain" not in row.roles


def test_a_dataset_without_source_style_starts_from_scratch() -> None:
    for row in (make(has_source=False), make({"stages.pretrain.steps": "0"})):
        assert work(row) == SEMI[1:] and "zero_shot" not in row.roles
        assert row.roles["adapt"].parents == {}
        assert set(row.roles["selftrain"].parents) == {"labels"}


def test_without_adapt_theta_t0_labels() -> None:
    row = make({"stages.use_adapt": "false"})
    assert work(row) == ["pretrain", "label-teacher", "distill", "refine"]
    assert row.roles["label-teacher"].parents == {"teacher": row.roles["pretrain"].fingerprint}
    assert row.roles["teacher"].fingerprint == row.roles["zero_shot"].fingerprint  # one evaluation, two roles
    with pytest.raises(ValueError, match=r"stages\.use_adapt is false .*nothing can label"):
        make({"stages.use_adapt": "false"}, has_source=False)
    alone = make({"stages.use_adapt": "false", "loss.lambda_semi": "0"}, has_source=False)
    assert work(alone) == ["distill", "refine"] and "teacher" not in alone.roles


def test_without_distill_the_student_sees_labelled_images_only() -> None:
    row = make({"stages.use_distill": "false"})
    assert work(row) == [name for name in SEMI if name != "label-teacher"]
    student = row.roles["distill"]
    assert student.parents == {} and not student.config["unlabelled"] and student.config["contrastive"] is None
    assert student.fingerprint == rows_of_losses()["sup"].roles["distill"].fingerprint


def test_without_refine_the_distilled_student_is_last() -> None:
    for off in ({"stages.use_refine": "false"}, {"stages.refine.steps": "0"}):
        row = make(off)
        assert work(row) == SEMI[:-1] and "refined" not in row.roles


def test_steps_and_keys() -> None:
    row = make()
    stages = row.recipe.stages
    for stage in row.stages:
        assert stage.steps == (getattr(stages, stage.name).steps if stage.kind == "train" else 0)
        assert stage.key == artifact_key(stage.kind, stage.fingerprint) == f"{stage.kind}-{stage.fingerprint}"
    assert len({s.key for s in row.stages}) == len(row.stages)


def test_a_train_stage_gives_its_config_back(losses: dict[str, RowPlan]) -> None:
    recipe: Recipe = losses["sup"].recipe
    stage: Stage = losses["sup"].roles["distill"]
    wanted = recipe.stages.distill.model_copy(update={"batch_unlabelled": 0})
    assert train_config(stage, recipe) == wanted
    semi = losses["sup+semi"]
    config: TrainConfig = train_config(semi.roles["distill"], semi.recipe)
    assert config == semi.recipe.stages.distill


def test_images_of_a_step_stay_equal_as_the_recipe_says() -> None:
    """supervised: 8 labelled images in every row; total: 16 images in every row, all labelled where D_u has no use."""
    sup, pxl = {"loss.lambda_semi": 0, "loss.lambda_pxl": 0}, {"loss.lambda_semi": 0}
    rows: dict[str, dict[str, Any]] = {
        "sup": sup,
        "sup+pxl": pxl,
        "sup+semi": {"loss.lambda_pxl": 0},
        "all": {},
        "no step 2b": {"stages.use_distill": "false"},
    }
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for rule in ("supervised", "total"):
        for name, overrides in rows.items():
            stages = make(overrides | {"stages.images_per_step": rule}).roles
            parts = [stages[s].config["train"] for s in ("distill", "refine")]
            sizes = [(part["batch_labelled"], part.get("batch_unlabelled", 0)) for part in parts]
            found.setdefault(rule, {})[name] = sizes[0]
            assert sizes[1] == (8, 0)  # step 3 has no D_u in any row
    alone = {"sup", "no step 2b"}
    assert found["supervised"] == {name: (8, 0 if name in alone else 8) for name in rows}
    assert found["total"] == {name: (16, 0) if name in alone else (8, 8) for name in rows}


def test_a_published_teacher_sees_native_images_in_every_stage() -> None:
    row = make(GROUNDED | {"data.image_px": "[32, 32]"}, foundation="f" * 20)
    for name in ("zero_shot", "adapt", "label-adapted", "selftrain", "teacher", "label-teacher"):
        assert input_size_of(row.roles[name]).resize == "native", name
    for name in ("adapt", "selftrain"):
        part = row.roles[name].config["data"]
        assert part["whole_images"] and part["train_resize"] == "native" and "image_px" not in part
    assert input_size_of(row.roles["student"]).resize == "fit"
    other = make(GROUNDED, foundation="f" * 20)  # the student's crop is nothing to the teacher
    assert row.roles["selftrain"].fingerprint == other.roles["selftrain"].fingerprint


GROUNDED = {"teacher.kind": "grounded_sam"}
LABELLED = {"label-adapted", "selftrain", "label-teacher", "distill", "refine"}
# Field of a foundation teacher -> another value, stages that it changes first, and some that it does not.
TEACHER_FIELDS: dict[str, tuple[str, set[str], set[str]]] = {
    "teacher.grounded_sam.class_weight": ("2", {"adapt", "selftrain"}, {"zero_shot"}),
    "teacher.grounded_sam.train_segmenter": ("false", {"adapt", "selftrain"}, {"zero_shot"}),
    "teacher.grounded_sam.contrast_masks": ("boxes", {"adapt", "selftrain"}, {"zero_shot"}),
    "teacher.grounded_sam.max_prompted": ("5", {"adapt", "selftrain"}, {"zero_shot"}),
    "teacher.inference.score_threshold": ("0.5", LABELLED, {"adapt", "zero_shot"}),
    "teacher.inference.rank_by": ("product", LABELLED | {"zero_shot", "teacher"}, {"adapt"}),
    "teacher.inference.max_detections": ("50", LABELLED | {"zero_shot", "teacher"}, {"adapt"}),
    "teacher.image_px": ("[96, 96]", LABELLED | {"adapt", "zero_shot", "teacher"}, set()),
}


@pytest.mark.parametrize("key", TEACHER_FIELDS)
def test_a_field_of_a_foundation_teacher_changes_its_stages(key: str) -> None:
    value, first, untouched = TEACHER_FIELDS[key]
    before, after = make(GROUNDED, foundation="f" * 20), make(GROUNDED | {key: value}, foundation="f" * 20)
    different = changed(before, after)
    assert first <= different and not different & untouched


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("teacher.hidden_dim", "32"),  # of an expert
        ("teacher.sam3.max_asked", "3"),
        ("teacher.inference.boxes_at_a_time", "3"),
        ("teacher.sam3.prompts_at_a_time", "3"),
        ("teacher.grounded_sam.detector", "/elsewhere"),  # its content is in theta_T0's fingerprint
        ("pseudo.on_empty", "stop"),
    ],
)
def test_what_a_foundation_teacher_does_not_read_changes_nothing(key: str, value: str) -> None:
    before, after = make(GROUNDED, foundation="f" * 20), make(GROUNDED | {key: value}, foundation="f" * 20)
    assert before.recipe != after.recipe and not changed(before, after)


def test_an_expert_knows_nothing_of_the_other_kinds() -> None:
    before = make()
    for key in ("teacher.inference.rank_by", "teacher.grounded_sam.class_weight", "teacher.prompt.max_tokens"):
        value = {"teacher.inference.rank_by": "product"}.get(key, "9")
        assert not changed(before, make({key: value}))
    model = before.roles["adapt"].config["model"]
    assert (
        ModelConfig(**model) == before.recipe.teacher.segmenter
        and "teacher" not in before.roles["label-teacher"].config
    )


def test_a_foundation_teacher_needs_no_training() -> None:
    row = make(GROUNDED | {"stages.use_adapt": "false"}, foundation="f" * 20)
    assert work(row) == ["label-teacher", "distill", "refine"]
    assert row.roles["label-teacher"].parents == {"teacher": "f" * 20}
    assert row.roles["teacher"] == row.roles["zero_shot"]
    # labels have a threshold, average precision has none
    assert row.roles["label-teacher"].config["teacher"]["inference"]["score_threshold"] == 0.3
    assert row.roles["teacher"].config["teacher"]["inference"]["score_threshold"] == 0
    assert "teacher" not in row.roles["student"].config


def test_a_detector_that_is_not_trained_has_no_contrast() -> None:
    row = make(GROUNDED | {"teacher.grounded_sam.train_detector": "false"}, foundation="f" * 20)
    assert row.roles["adapt"].config["contrastive"] is None and row.roles["selftrain"].config["contrastive"] is None
    assert row.roles["distill"].config["contrastive"] is not None


def test_the_teacher_has_its_own_size() -> None:
    row = make(GROUNDED | {"teacher.image_px": "[96, 128]"}, foundation="f" * 20)
    sizes = {name: input_size_of(stage).crop_px for name, stage in row.roles.items()}
    own = {"zero_shot", "adapt", "label-adapted", "selftrain", "teacher", "label-teacher"}
    assert {name for name, size in sizes.items() if size == (96, 128)} == own


def test_a_foundation_is_given_and_not_made() -> None:
    row = make(foundation="f" * 20)
    assert plan_sweep([row, make()], []).given == {"f" * 20}


def test_what_is_painted_changes_labels_and_all_that_reads_them() -> None:
    readers = {"label-adapted", "selftrain", "teacher", "label-teacher", "distill", "student", "refine", "refined"}
    for key, off, on in (("pseudo.min_visible_share", "0", "0.5"), ("pseudo.nms_iou", "1", "0.7")):
        without = make({"pseudo.min_visible_share": "0", key: off})
        assert changed(without, make({"pseudo.min_visible_share": "0", key: on})) == readers
        assert key.partition(".")[2] not in without.roles["label-teacher"].config["pseudo"]


def test_the_view_of_l_semi_is_the_students_alone() -> None:
    students = {"distill", "student", "refine", "refined"}
    assert changed(make(), make({"loss.semi_view": "strong"})) == students
    assert changed(make(), make({"loss.semi_view": "weak"})) == set()
    assert "semi_view" not in make({"loss.semi_view": "strong"}).roles["selftrain"].config["loss"]
    bare = {"loss.lambda_semi": "0"}
    assert changed(make(bare), make(bare | {"loss.semi_view": "strong"})) == set()


def test_a_loss_term_of_ones_own_belongs_to_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes step 2b and what follows from it, as does each change of its file; its weight alone does nothing."""
    monkeypatch.syspath_prepend(tmp_path)
    for name, factor in (("own_a", 1), ("own_b", 2)):
        (tmp_path / f"{name}.py").write_text(f"def term(output, batch):\n    return {factor} * output, batch\n")
    (tmp_path / "own_c.py").write_text((tmp_path / "own_a.py").read_text())
    plain = make()
    assert changed(plain, make({"loss.extra_weight": 0.3})) == set()
    with_term = make({"loss.extra_term": "own_a:term"})
    assert changed(plain, with_term) == {"distill", "refine", "student", "refined"}
    assert changed(with_term, make({"loss.extra_term": "own_a:term", "loss.extra_weight": 0.3})) >= {"distill"}
    of_a, of_b, of_c = (
        make({"loss.extra_term": f"{n}:term"}).roles["distill"].config["extra_term_code"]
        for n in ("own_a", "own_b", "own_c")
    )
    assert of_a != of_b and of_a == of_c
    for wrong, reason in (("own_d:term", "No module named 'own_d'"), ("own_a:terms", "has no attribute 'terms'")):
        with pytest.raises(ValueError, match=rf"loss.extra_term: .*expected MODULE:NAME.*{reason}"):
            make({"loss.extra_term": wrong})
    (tmp_path / "own_e.py").write_text("def term(output):\n    return output\n")
    for wrong, reason in (
        ("own_e:term", r"called as f\(output, batch\), found term\(output\)"),
        ("os:getcwd", r"called as f\(output, batch\), found getcwd\(\)"),
        ("os:sep", "found a str"),
        ("os:link", "expected a function in a Python file"),
    ):
        with pytest.raises(ValueError, match=rf"loss.extra_term:? .*{reason}"):
            make({"loss.extra_term": wrong})
    with pytest.raises(ValueError, match=r"loss.extra_term: expected MODULE:FUNCTION"):
        make({"loss.extra_term": "own_a"})


def folds_of(row: RowPlan, name: str) -> list[Stage]:
    return [stage for stage in row.stages if stage.name.startswith(f"{name}-fold")]


def test_a_held_precision_adds_teachers_that_have_not_seen_what_they_score(losses: dict[str, RowPlan]) -> None:
    plain, row = make(), make({"pseudo.precision": 0.9, "pseudo.precision_folds": 3})
    assert [stage.name for stage in row.stages if not stage.is_of_fold] == [stage.name for stage in plain.stages]
    assert {role for role in ROLES if prints(plain)[role] == prints(row)[role]} == {"zero_shot"}
    assert prints(row)["adapt"] == prints(plain)["adapt"]
    for labels, teacher, of in (("label-adapted", "adapt", 3), ("label-teacher", "selftrain", 3)):
        scored, trained, stage = folds_of(row, labels), folds_of(row, teacher), row.roles[labels]
        assert stage.held_out == [s.fingerprint for s in scored] and len(scored) == len(trained) == of
        assert [s.parents for s in scored] == [{"teacher": t.fingerprint} for t in trained]
        for index, (label, train) in enumerate(zip(scored, trained)):
            assert train.config["split"]["fold"] == {"index": index, "of": of, "images": "others"}
            assert label.config["split"]["fold"] == {"index": index, "of": of, "images": "held out"}
            own = row.roles[teacher]
            assert train.config | {"split": own.config["split"]} == own.config
            assert train.parents == own.parents and train.step == teacher and train.steps == own.steps
            assert train_config(train, row.recipe) == train_config(own, row.recipe)
            assert "precision" not in label.config["pseudo"]
    assert row.roles["label-teacher"].config["pseudo"]["precision"] == 0.9


def test_rows_of_other_precisions_share_the_folds_and_rows_without_labels_have_none() -> None:
    rows = [make({"pseudo.precision": p, "pseudo.precision_error": e}) for p, e in ((0.8, 0.1), (0.9, 0.05))]
    one, other = ([s.fingerprint for s in row.stages if s.name.startswith("adapt-fold")] for row in rows)
    assert one == other and len(one) == 5
    labels = [{s.name: s.fingerprint for s in row.stages if s.kind == "label"} for row in rows]
    same = {name for name in labels[0] if labels[0][name] == labels[1][name]}
    assert same == {f"label-adapted-fold{k}" for k in range(1, 6)}  # 1c has learnt from other labels
    supervised = make({"pseudo.precision": 0.9, "loss.lambda_semi": 0})
    assert not any(stage.is_of_fold for stage in supervised.stages)


def test_a_teacher_that_is_not_trained_on_the_labelled_images_scores_all_of_them() -> None:
    row = make({"pseudo.precision": 0.9, "stages.use_adapt": False})
    (labels,) = (stage for stage in row.stages if stage.is_of_fold)
    assert labels.name == "label-teacher-fold1" and labels.parents == {"teacher": row.roles["pretrain"].fingerprint}
    assert labels.config["split"]["fold"] == {"index": 0, "of": 1, "images": "held out"}


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"labels.mode": "online"}, r"pseudo\.precision is 0\.9 and labels\.mode online"),
        ({"pseudo.class_thresholds": "balanced"}, r"pseudo\.precision is 0\.9 and pseudo\.class_thresholds balanced"),
        ({"pseudo.precision": 1.0}, r"pseudo\.precision: .*less than 1"),
        ({"pseudo.precision_folds": 1}, r"pseudo\.precision_folds: .*greater than or equal to 2"),
    ],
)
def test_what_does_not_go_with_a_held_precision(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make({"pseudo.precision": 0.9} | overrides)
