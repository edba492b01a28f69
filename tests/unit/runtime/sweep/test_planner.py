"""What planning refuses before any stage runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from cast_ray.recipe import build_recipe
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.sweep.planner import RowPlanner

SMALL = {"data.shapes.num_source": 8, "data.shapes.num_train": 40, "data.shapes.num_val": 4, "data.label_fraction": 0.2}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("student.encoder.name", "os:getcwd", r"student\.encoder\.name: 'os:getcwd': expected a function"),
        ("teacher.encoder.name", "gone:x", r"teacher\.encoder\.name: 'gone:x': expected MODULE:NAME"),
        ("student.decoder", "os:link", r"student\.decoder: 'os:link': expected a class below .*PixelDecoder"),
        ("student.checkpoint", "/nowhere/model", r"student\.checkpoint: no folder '/nowhere/model'"),
        ("student.checkpoint", "hub", r"student\.checkpoint is 'hub': no published weights are known for encoder"),
        ("teacher.checkpoint", "hub", r"teacher\.checkpoint is 'hub': no published weights are known for encoder"),
        ("loss.extra_term", "os:getcwd", r"loss\.extra_term: 'os:getcwd': expected a function"),
    ],
)
def test_ones_own_code_and_models_are_looked_at_first(tmp_path: Path, key: str, value: str, message: str) -> None:
    recipe = build_recipe("shapes", "smoke", overrides={**SMALL, key: value})

    def connect() -> None:
        raise AssertionError("Ray is not needed")

    store = ArtifactStore(str(tmp_path))
    planner = RowPlanner({"mine": [recipe]}, store, Console(quiet=True), connect)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^losses, row 'a': {message}"):
        planner.plan(recipe, table="losses", run="mine", row="a")


@pytest.mark.parametrize("settings", [{"data.label_fraction": 0.1}, {"pseudo.precision_folds": 9}])
def test_too_few_labelled_images_for_the_folds_are_refused(tmp_path: Path, settings: dict[str, float]) -> None:
    recipe = build_recipe("shapes", "smoke", overrides={**SMALL, "pseudo.precision": 0.9, **settings})
    message = r"pseudo\.precision_folds is [59], and D_l has [48] images: expected an image for each fold"
    with pytest.raises(ValueError, match=message):
        RowPlanner({"mine": [recipe]}, ArtifactStore(str(tmp_path)), Console(quiet=True), lambda: pytest.fail("Ray"))
