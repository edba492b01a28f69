"""Why two stages have different fingerprints, told from their manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cast_ray.cli import store as store_command
from cast_ray.plan.graph import RowPlan, plan
from cast_ray.recipe import build_recipe
from cast_ray.runtime.store.artifacts import ArtifactStore


def row(overrides: dict[str, Any] | None = None, content: str = "0") -> RowPlan:
    return plan(build_recipe("shapes", "smoke", overrides), content * 64)


def diff_of(tmp_path: Path, capsys: pytest.CaptureFixture[str], role: str, *rows: RowPlan) -> list[str]:
    """The reasons that `store diff` prints for one role of two rows whose stages are all stored."""
    store = ArtifactStore(str(tmp_path))
    for each in rows:
        for stage in each.stages:
            store.commit(stage, {})
    names = [each.roles[role].key for each in rows]
    assert store_command.main(["diff", *names, "--storage", str(tmp_path)]) == 0
    first, *reasons = capsys.readouterr().out.splitlines()
    assert all(each.roles[role].fingerprint in first for each in rows)
    return reasons


def test_a_field_is_named_where_it_acts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    longer = row({"stages.distill.steps": 9})
    assert diff_of(tmp_path, capsys, "distill", row(), longer) == ["  train.steps: 8, 9"]
    parents = [each.roles["distill"].fingerprint for each in (row(), longer)]
    assert diff_of(tmp_path, capsys, "refine", row(), longer) == [
        f"  parent init: distill {parents[0]}, distill {parents[1]}",
        "    train.steps: 8, 9",
    ]


def test_a_stage_that_one_lacks_and_data_that_no_manifest_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = diff_of(tmp_path, capsys, "distill", row(), row({"loss.lambda_semi": 0}))
    assert "  loss.lambda_semi: 1.0, 0.0" in reasons
    assert any(line.startswith("  parent labels: label-teacher ") and line.endswith(", nothing") for line in reasons)
    (last,) = diff_of(tmp_path, capsys, "pretrain", row(), row(content="1"))
    assert last.startswith("  the content of the dataset, or the version")
    assert diff_of(tmp_path, capsys, "pretrain", row(), row()) == ["  no difference: both are the same stage"]


def test_a_parent_that_is_gone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = row(), row({"stages.adapt.steps": 7})
    store = ArtifactStore(str(tmp_path))
    for each in rows:
        store.commit(each.roles["label-adapted"], {})
    names = [each.roles["label-adapted"].fingerprint for each in rows]
    assert store_command.main(["diff", *names, "--storage", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(" (not stored)") == 2
    assert store_command.main(["diff", names[0], "f" * 20, "--storage", str(tmp_path)]) == 2
    assert "store diff 'ffffffffffffffffffff': expected one artifact, found none" in capsys.readouterr().err
