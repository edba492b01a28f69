"""Which stages read D_u: the rule and the graph agree for every combination of the settings that it depends on."""

from __future__ import annotations

from itertools import product

import pytest

from cast_ray.plan.graph import plan
from cast_ray.plan.reads import needs_unlabelled
from cast_ray.plan.stage_parts import TrainPart
from cast_ray.recipe import build_recipe

CHOICES = {
    "loss.lambda_semi": ("0", "1"),
    "loss.lambda_pxl": ("0", "0.1"),
    "contrastive.kind": ("none", "cast"),
    "stages.use_adapt": ("false", "true"),
    "stages.use_distill": ("false", "true"),
}


@pytest.mark.parametrize("values", list(product(*CHOICES.values())))
def test_the_rule_is_what_the_graph_does(values: tuple[str, ...]) -> None:
    recipe = build_recipe("shapes", "smoke", dict(zip(CHOICES, values)))
    stages = plan(recipe, "h").stages
    trained = [TrainPart.of(stage) for stage in stages if stage.kind == "train"]
    reads = [part.batch_unlabelled > 0 for part in trained]
    assert reads == [part.config["unlabelled"] for part in trained]
    labels = any(stage.kind == "label" for stage in stages)
    assert needs_unlabelled(recipe) == (any(reads) or labels)


def test_a_contrastive_loss_of_the_teacher_alone_reads_no_unlabelled_image() -> None:
    settings = {"loss.lambda_semi": "0", "stages.use_distill": "false"}
    recipe = build_recipe("shapes", "smoke", settings)
    adapt = TrainPart.of(plan(recipe, "h").roles["adapt"])
    assert adapt.contrastive is not None and not needs_unlabelled(recipe)
