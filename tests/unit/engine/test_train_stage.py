"""A train stage: what its part of the recipe turns into."""

from __future__ import annotations

import pytest
import torch
from training_scenes import NUM_CLASSES, batches

from cast_ray.engine.world import World
from cast_ray.models.segmenter import Segmenter, build_segmenter
from cast_ray.plan.graph import RowPlan, Stage, plan
from cast_ray.plan.memory import stage_memory
from cast_ray.recipe import TrainConfig, build_recipe
from cast_ray.runtime.worker.train import stage_run, train_stage

TINY = {
    "student.encoder.widths": "[8, 8, 16, 16]",
    "student.hidden_dim": "16",
    "student.num_layers": "1",
    "student.feedforward_dim": "16",
    "loss.num_points": "32",
    "contrastive.num_negatives": "4",
    "contrastive.projection_dims": "[8, 8]",
    "stages.distill.steps": "3",
    "stages.refine.steps": "2",
}


def make_plan(**overrides: str) -> RowPlan:
    return plan(build_recipe("shapes", "smoke", TINY | {k.replace("__", "."): v for k, v in overrides.items()}), "h")


def train(stage: Stage, steps: int, initial: Segmenter | None = None) -> Segmenter:
    segmenter, result = train_stage(
        stage,
        batches(0, steps, num_labelled=1),
        TrainConfig(**{"batch_unlabelled": 0} | stage.config["train"]),
        stage_run(stage, World()),
        num_classes=NUM_CLASSES,
        parent=initial.state_dict() if initial else None,
    )
    assert result.curve[-1]["step"] == steps and isinstance(segmenter, Segmenter)
    return segmenter


def test_the_memory_of_a_stage_follows_its_recipe() -> None:
    def total(stage: str, **overrides: str) -> int:
        row = make_plan(**overrides)
        estimate = stage_memory(row.roles[stage], row.recipe, NUM_CLASSES)
        assert estimate is not None
        return estimate.total

    base = total("distill")
    assert total("refine") < base  # D_l alone, and no strong view
    assert total("distill", loss__lambda_pxl="0") < base
    assert total("distill", runtime__num_workers="4") < base
    assert total("distill", stages__distill__accumulate="4") < base
    assert total("distill", runtime__use_gpu="true") < base  # in half precision there
    assert total("distill", runtime__gradient_checkpointing="true") < base
    assert total("distill", stages__refine__accumulate="4") == base


def same(a: Segmenter, b: Segmenter) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_without_the_contrastive_term_it_is_as_if_never_built() -> None:
    off = train(make_plan(loss__lambda_pxl="0").roles["distill"], 3)
    none = train(make_plan(contrastive__kind="none").roles["distill"], 3)
    released = train(make_plan(loss__lambda_pxl="0", contrastive="released").roles["distill"], 3)
    on = train(make_plan().roles["distill"], 3)
    assert same(off, none) and same(off, released) and not same(off, on)


def test_kind_none_runs_none_of_the_terms_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the contrastive term ran")

    views = []
    real = Segmenter._normalised  # before every pass of the encoder
    monkeypatch.setattr(Segmenter, "_normalised", lambda self, images: views.append(images) or real(self, images))
    monkeypatch.setattr("cast_ray.engine.objective.contrastive_loss", refuse)
    monkeypatch.setattr("cast_ray.models.cast_network.Projector", refuse)
    train(make_plan(contrastive__kind="none").roles["distill"], 3)
    assert len(views) == 3  # one view a step
    with pytest.raises(AssertionError, match="the contrastive term ran"):
        train(make_plan().roles["distill"], 3)


def test_students_with_learnt_queries_train() -> None:
    student = train(make_plan(student__proposals="false").roles["distill"], 3)
    assert not any("proposal" in name for name in student.state_dict())


def test_the_seed_is_the_stages() -> None:
    stage, other = make_plan().roles["distill"], make_plan(seed="1").roles["distill"]
    torch.manual_seed(11)
    one = train(stage, 3)
    torch.manual_seed(12)
    assert same(one, train(stage, 3)) and not same(one, train(other, 3))


def test_refinement_starts_from_the_students_weights() -> None:
    row = make_plan(stages__refine__lr="1e-9", stages__refine__ema="0")
    student = build_segmenter(row.recipe.student, NUM_CLASSES, seed=5)
    refined = train(row.roles["refine"], 2, student)
    for a, b in zip(refined.state_dict().values(), student.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_parent_of_another_shape_is_refused() -> None:
    row = make_plan()
    other = build_segmenter(row.recipe.student.model_copy(update={"hidden_dim": 32}), NUM_CLASSES, seed=0)
    with pytest.raises(ValueError, match="refine: the parent's weights do not fit this model"):
        train(row.roles["refine"], 2, other)
