"""Device-hours of a plan: from what earlier stages took, scaled from them, or counted."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest

from cast_ray.contracts.compute_node import UNKNOWN_DEVICE, ComputeNode
from cast_ray.contracts.manifest import Manifest, manifest_class
from cast_ray.plan import cost as cost_module
from cast_ray.plan.cost import ASSUMED_FLOPS, CostModel, Size, cost_of, device_types
from cast_ray.plan.graph import RowPlan, Stage, SweepPlan, plan, plan_sweep
from cast_ray.recipe import build_recipe

SIZE = Size(num_unlabelled=36, num_val=16, image_hw=(64, 64))


def row(overrides: dict[str, Any] | None = None) -> RowPlan:
    return plan(build_recipe("shapes", "smoke", overrides), "0" * 64, row="row")


def sweep(overrides: dict[str, Any] | None = None, stored: Any = ()) -> SweepPlan:
    return plan_sweep([row(overrides)], stored)


def manifest(stage: Stage, seconds: float, **facts: Any) -> Manifest:
    count: dict[str, dict[str, Any]] = {
        "label": {"num_images": 36},
        "evaluate": {"images_per_s": 16 / seconds, "seconds": seconds},
    }
    own = {name: getattr(stage, name) for name in ("kind", "config", "parents", "fingerprint", "steps")}
    common = {"stage": stage.name, "stage_seconds": seconds, "num_workers": 1, "device": "cpu"}
    return manifest_class(stage.kind)(**own | common | count.get(stage.kind, {}) | facts)


def history(plan_: RowPlan, **facts: Any) -> list[Manifest]:
    """Every stage took a second a step, or a tenth of one an image."""
    seconds = {"label": 3.6, "evaluate": 1.6}
    return [manifest(s, seconds.get(s.kind, float(s.steps)), **facts) for s in plan_.stages]


def estimates(plan_: SweepPlan, model: CostModel, **options: Any) -> dict[str, Any]:
    cost = cost_of(plan_, model, lambda stage: SIZE, **options)
    return {s.name: cost.by_stage[s.fingerprint] for s in plan_.unique.values()}


def test_the_same_work_on_other_seeds_is_measured() -> None:
    found = estimates(sweep({"seed": "7"}), CostModel(history(row()), "cpu"))
    assert {e.source for e in found.values()} == {"measured"}
    assert found["distill"].device_s == pytest.approx(8) and found["label-teacher"].device_s == pytest.approx(3.6)
    assert found["evaluate"].device_s == pytest.approx(1.6)


def test_stages_on_unlike_devices_are_never_taken_together() -> None:
    """An estimate for one type of GPU comes from stages that ran on it; an old manifest names none."""
    l4, a100 = ((ComputeNode(gpu=f"NVIDIA {model}"),) for model in ("L4", "A100"))
    slow = history(row(), device="cuda:0", computed_on=l4, committed=1.0)
    fast = history(row({"seed": "9"}), device="cuda:0", computed_on=a100, committed=2.0)
    fast = [m.model_copy(update={"stage_seconds": (m.stage_seconds or 0.0) / 5}) for m in fast]
    assert device_types([*slow, *fast], "cuda") == ["NVIDIA A100", "NVIDIA L4"]  # that of the last stage first
    for model, seconds in (("NVIDIA A100", 8 / 5), ("NVIDIA L4", 8)):
        distill = estimates(sweep({"seed": "7"}), CostModel([*slow, *fast], "cuda", model))["distill"]
        assert distill.source == "measured" and distill.device_s == pytest.approx(seconds)
    assert device_types(history(row()), "cpu") == [UNKNOWN_DEVICE] == device_types(history(row()), "cuda")


def test_other_lengths_are_measured_by_the_step_and_other_batches_scaled_by_the_image() -> None:
    model = CostModel(history(row()), "cpu")
    longer = estimates(sweep({"stages.distill.steps": "80"}), model)["distill"]
    assert (longer.source, longer.device_s) == ("measured", pytest.approx(80))
    wider = estimates(sweep({"stages.distill.batch_labelled": "24"}), model)["distill"]  # 24 + 8 instead of 8 + 8
    # refinement, of the same student, took a second for each 8 images; the median of both is taken
    assert wider.source == "scaled" and 8 * 32 / 16 <= wider.device_s <= 8 * 32 / 8


def test_a_vote_costs_a_pass_for_each_answer_at_its_scale() -> None:
    vote = {"pseudo.vote_flip": "true", "pseudo.vote_scales": "[1.0, 2.0]"}
    scaled = estimates(sweep(vote), CostModel(history(row()), "cpu"))["label-teacher"]
    assert scaled.source == "scaled" and scaled.device_s == pytest.approx(3.6 * 2 * (1 + 4))
    counted = estimates(sweep(vote), CostModel([], "cpu"))["label-teacher"].device_s
    once = estimates(sweep(), CostModel([], "cpu"))["label-teacher"].device_s
    assert counted == pytest.approx(10 * once)
    seen = estimates(sweep(vote | {"seed": "7"}), CostModel(history(row(vote)), "cpu"))["label-teacher"]
    assert (seen.source, seen.device_s) == ("measured", pytest.approx(3.6))


def test_workers_and_their_start_count_as_device_time() -> None:
    twice = CostModel(history(row(), num_workers=2, startup_seconds=4.0), "cpu")
    assert estimates(sweep(), twice)["distill"].device_s == pytest.approx(2 * (8 + 4))


def test_other_devices_do_not_count() -> None:
    model = CostModel(history(row(), device="cuda:0"), "cpu")
    assert {e.source for e in estimates(sweep(), model, count_flops=False).values()} == {"unknown"}
    assert estimates(sweep(), CostModel(history(row(), device="cuda:0"), "cuda"))["distill"].source == "measured"


def test_without_history_operations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = estimates(sweep(), CostModel([], "cpu"))
    assert {e.source for e in found.values()} == {"estimated"} and all(e.device_s > 0 for e in found.values())
    monkeypatch.setitem(ASSUMED_FLOPS, "cpu", ASSUMED_FLOPS["cpu"] * 2)
    again = estimates(sweep(), CostModel([], "cpu"))
    assert again["distill"].device_s == pytest.approx(found["distill"].device_s / 2)
    assert found["pretrain"].device_s > found["refine"].device_s


def test_a_model_that_cannot_be_built_here_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    cost_module._forward_flops.cache_clear()
    monkeypatch.setattr("cast_ray.models.segmenter.outline", Mock(side_effect=OSError("no hub")))
    found = estimates(sweep(), CostModel([], "cpu"))
    cost_module._forward_flops.cache_clear()
    assert {e.source for e in found.values()} == {"unknown"} and all(e.device_s == 0 for e in found.values())


def test_a_plan_adds_up() -> None:
    rows = [row(), row({"loss.lambda_semi": "0", "loss.lambda_pxl": "0"})]
    stored = [rows[0].roles["pretrain"].fingerprint]
    whole = plan_sweep(rows, stored)
    cost = cost_of(whole, CostModel(history(rows[0]) + history(rows[1]), "cpu"), lambda stage: SIZE)
    by_hand = {s.fingerprint: cost.by_stage[s.fingerprint].device_s for r in rows for s in r.stages}
    assert cost.to_run_h * 3600 == pytest.approx(sum(s for f, s in by_hand.items() if f not in stored))
    alone = sum(by_hand[f] for r in rows for f in {s.fingerprint for s in r.stages})
    assert cost.from_scratch_h * 3600 == pytest.approx(alone)
    assert sum(cost.sources.values()) == len(whole.to_run)


FROM_CHECKPOINTS = {"teacher.kind": "grounded_sam"}


def foundation_row(fingerprint: str = "f", **overrides: Any) -> RowPlan:
    recipe = build_recipe("shapes", "smoke", FROM_CHECKPOINTS | overrides)
    return plan(recipe, "0" * 64, row="row", foundation=fingerprint)


def test_teachers_from_checkpoints_are_counted_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []

    def count(model: str, image_px: tuple[int, int]) -> float:
        counted.append(model)
        return 50e12 if "grounded_sam" in model and '"kind"' in model else 25e9

    monkeypatch.setattr(cost_module, "_forward_flops", count)
    found = estimates(plan_sweep([foundation_row()], ()), CostModel([], "cpu"))
    assert {e.source for e in found.values()} == {"estimated"}
    assert found["label-adapted"].device_s == pytest.approx(36 * 50e12 / 25e9)
    assert found["distill"].device_s < found["adapt"].device_s / 100
    assert any("mm_grounding_dino_large_all" in model for model in counted)


def test_zero_shot_labels_are_counted_as_their_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_module, "_forward_flops", lambda model, _: 1e12 * ('"kind"' in model))
    row = foundation_row(**{"stages.use_adapt": "false"})
    found = estimates(plan_sweep([row], ()), CostModel([], "cpu"))
    assert found["label-teacher"].device_s == pytest.approx(36 * 1e12 / 25e9)


def test_time_of_other_checkpoints_does_not_count() -> None:
    config = {"model": foundation_row().recipe.teacher.training_part()}
    imported = Manifest(stage="foundation", kind="train", fingerprint="f", config=config)
    past = CostModel([imported, *history(foundation_row())], "cpu")
    same = estimates(plan_sweep([foundation_row(seed="7")], ()), past, count_flops=False)
    assert {e.source for e in same.values()} == {"measured"}
    other = estimates(plan_sweep([foundation_row("g")], ()), past, count_flops=False)
    assert {other[name].source for name in ("adapt", "selftrain", "label-adapted", "label-teacher")} == {"unknown"}
    assert other["distill"].source == "measured"


def test_a_kind_that_cannot_be_counted_is_unknown() -> None:
    found = estimates(plan_sweep([foundation_row(**{"teacher.kind": "sam3"})], ()), CostModel([], "cpu"))
    assert found["adapt"].source == "unknown" and found["distill"].source == "estimated"


def test_operations_of_whole_images_are_those_of_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A native evaluation costs by the dataset's images, training by the crop; unknown images cost an unknown time."""
    monkeypatch.setattr(cost_module, "_forward_flops", lambda _, size: 25e9 * size[0] * size[1])
    native = sweep({"data.inference_resize": "native", "data.image_px": "[2, 2]"})
    stages = {s.name: s for s in native.unique.values()}
    for image_hw, expected in (((10, 20), 200.0), ((20, 20), 400.0), (None, 0.0)):
        size = Size(num_unlabelled=36, num_val=16, image_hw=image_hw)
        cost = cost_of(native, CostModel([], "cpu"), lambda stage, size=size: size)  # type: ignore[misc]
        of = {name: cost.by_stage[stage.fingerprint] for name, stage in stages.items()}
        assert of["label-teacher"].device_s == pytest.approx(36 * expected)
        assert of["evaluate"].device_s == pytest.approx(16 * expected)
        assert of["label-teacher"].source == ("estimated" if image_hw else "unknown")
        assert of["refine"].device_s == pytest.approx(stages["refine"].steps * 8 * 3 * 4)


def test_time_at_another_size_does_not_count() -> None:
    model = CostModel(history(row()), "cpu")
    native = estimates(sweep({"data.inference_resize": "native"}), model, count_flops=False)
    assert native["label-teacher"].source == native["evaluate"].source == "unknown"
    assert native["distill"].source == "measured"  # the crop is the same


def test_labels_of_a_fold_cost_its_images_alone() -> None:
    size = Size(num_unlabelled=36, num_val=16, image_hw=(64, 64), num_labelled=12)
    folds = plan_sweep([row({"pseudo.precision": 0.9})], ())
    cost = cost_of(folds, CostModel(history(row()), "cpu"), lambda stage: size)
    found = {stage.name: cost.by_stage[stage.fingerprint] for stage in folds.unique.values()}
    assert found["label-adapted"].device_s == pytest.approx(3.6)
    assert found["label-adapted-fold1"].device_s == pytest.approx(0.3)  # 12 images in 5 parts: at most 3
    assert found["adapt-fold5"] == found["adapt"] and found["adapt"].source == "measured"
