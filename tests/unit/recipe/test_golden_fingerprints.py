"""Fingerprints are pinned: the store is content-addressed, so that a changed one recomputes every user's stage.

Where a change is meant (a stage's code changes its result, a field enters its identity), raise its STAGE_VERSION, run
`python tests/unit/recipe/test_golden_fingerprints.py`, which rewrites tests/data/fingerprints.json; the diff then names
every stage that users will compute again. A failure that nobody meant is a fault of the change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cast_ray.plan.ablation import load_table
from cast_ray.plan.graph import DataHashes, plan
from cast_ray.recipe import SCALES, build_recipe, preset_names

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "fingerprints.json"
CONTENT = "c" * 64
FOUNDATION = "f" * 20
HASHES = DataHashes(extra="e" * 64, label_list="a" * 64, unlabelled_list="b" * 64)
OVERRIDES: dict[str, dict[str, Any]] = {
    "released": {"contrastive": "released"},
    "released student": {"student": "released"},
    "all of released": {"variant": "released"},
    "bfloat16": {"runtime.amp": "bf16"},
    "a GPU": {"runtime.use_gpu": True},
    "online": {"labels.mode": "online"},
    "refreshed": {"labels.mode": "online", "labels.refresh_steps": 100},
    "seeds": {"seed": 3, "init_seed": 1, "order_seed": 2, "data.split_seed": 0},
    "per-class": {"data.label_family": "per-class", "data.min_per_class": 2},
    "lists": {"data.label_family": "list", "data.label_list": "l.txt", "data.unlabelled_list": "u.txt"},
    "score weights": {"loss.pseudo_weighting": "score"},
    "cityscapes' AP": {"evaluation.metric": "cityscapes"},
    "teacher not adapted": {"stages.use_adapt": False},
}


def fingerprints() -> dict[str, dict[str, str]]:
    """Case -> name of a stage or an evaluation's role -> artifact key."""
    cases = {
        f"{preset} {scale}": (build_recipe(preset, scale), DataHashes())
        for preset in preset_names()
        for scale in SCALES
    }
    losses = load_table("losses")
    cases |= {f"losses {row}": (losses.row_recipe(row, "shapes", "demo"), DataHashes()) for row in losses.rows}
    cases |= {name: (build_recipe("shapes", "demo", overrides), HASHES) for name, overrides in OVERRIDES.items()}
    return {
        name: {
            role: stage.key
            for role, stage in plan(
                recipe, CONTENT, hashes=hashes, foundation=FOUNDATION if recipe.needs_foundation else None
            ).roles.items()
        }
        for name, (recipe, hashes) in cases.items()
    }


def test_no_fingerprint_moves_by_accident() -> None:
    expected: dict[str, dict[str, str]] = json.loads(GOLDEN.read_text())
    actual = fingerprints()
    assert actual.keys() == expected.keys()
    moved = [
        f"{case}: {role}"
        for case, roles in expected.items()
        for role in roles | actual[case]
        if actual[case].get(role) != roles.get(role)
    ]
    assert not moved, f"stages with another fingerprint than before: {moved}; meant? {__doc__}"


@pytest.mark.parametrize("kind", ["train", "label", "evaluate"])
def test_every_kind_of_stage_is_pinned(kind: str) -> None:
    keys = {key for roles in json.loads(GOLDEN.read_text()).values() for key in roles.values()}
    assert len({key for key in keys if key.startswith(f"{kind}-")}) >= 20


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(fingerprints(), indent=1, ensure_ascii=False) + "\n")
