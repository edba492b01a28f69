"""The name of a segment's run in Ray Train, which the dashboard's API lists."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cast_ray.recipe import build_recipe
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.worker.segment import Segment


def segment(stages: list[str], sweep: str = "losses-shapes-smoke", owner: str = "losses__sup+semi__s0") -> Segment:
    named: Any = [SimpleNamespace(name=name) for name in stages]
    store = ArtifactStore("/tmp/none", "0123abcd")
    return Segment(owner, sweep, named, build_recipe("shapes"), store, None, (), {}, None, 0, 0.0)


@pytest.mark.parametrize(
    ("stages", "part"), [(["refine"], "refine"), (["adapt", "label", "evaluate_student"], "adapt-to-evaluate_student")]
)
def test_a_run_is_named_after_sweep_row_stages_and_attempt(stages: list[str], part: str) -> None:
    assert segment(stages).run_name == f"losses-shapes-smoke__losses__sup+semi__s0__{part}__0123abcd"


def test_every_attempt_has_a_name_of_its_own() -> None:
    one = segment(["adapt"])
    other = Segment(**(vars(one) | {"store": one.store.new_attempt()}))
    assert one.run_name != other.run_name


def test_the_name_is_one_that_every_storage_takes_as_a_folder() -> None:
    name = segment(["adapt"], sweep="a b/é" + "x" * 300, owner="t__" + "y" * 300 + " 1__s12").run_name
    assert len(name) <= 200 and name.endswith("y-1__s12__adapt__0123abcd")
    assert not set(name) & set(" /é")
