"""`cast-ray store licences`: from results where they are, from manifests where they are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cast_ray.cli import store as store_command
from cast_ray.plan.graph import RowPlan, Stage, plan
from cast_ray.recipe import Recipe, build_recipe
from cast_ray.recipe.licence_chain import LicenceChain, licence_chain
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.licences import StudentLicences, student_licences

OLD = Path(__file__).parents[3] / "data" / "old_store"
SAM = "facebook/sam2.1-hiera-large"


def recipe_of(**overrides: Any) -> Recipe:
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    return build_recipe("cityscapes", "full", {"data.root": "/nowhere"} | given)


def stored(tmp_path: Path, recipe: Recipe, *, without: tuple[str, ...] = ()) -> tuple[ArtifactStore, RowPlan]:
    """A store that holds a row's stages and the teacher that it was given."""
    store = ArtifactStore(str(tmp_path / "storage"))
    store.check_writable()
    row = plan(recipe, "h", row="CAST", has_source=False, foundation="0" * 20 if recipe.needs_foundation else None)
    imported = {"imported_from": recipe.teacher.checkpoint_fields(), "model": recipe.teacher.training_part()}
    foundation = Stage("foundation", "train", imported, {}, "0" * 20)
    for stage in [*([foundation] if recipe.needs_foundation else []), *row.stages]:
        if stage.name not in without:
            store.commit(stage, {})
    return store, row


def with_result(store: ArtifactStore, row: RowPlan) -> None:
    stages = [{"name": s.name, "kind": s.kind, "fingerprint": s.fingerprint} for s in row.stages]
    result = {"table": "main", "row": "CAST", "seed": 0, "status": "done", "stages": stages}
    result |= {"recipe": row.recipe.model_dump(mode="json")}
    store.write_bytes("runs/main/main__CAST__s0/result.json", json.dumps(result).encode())


def students(store: ArtifactStore) -> dict[str, StudentLicences]:
    return {found.stage: found for found in student_licences(store, store.list_artifacts())}


def texts(chain: LicenceChain) -> list[str]:
    return [source.text for source in chain.sources]


def test_a_result_tells_everything(tmp_path: Path) -> None:
    store, row = stored(tmp_path, recipe_of(data__licence="CC-BY-4.0"))
    with_result(store, row)
    found = students(store)
    assert set(found) == {"distill", "refine"}
    assert {student.rows for student in found.values()} == {("main:CAST",)}
    assert found["refine"].chain == found["distill"].chain == licence_chain(row.recipe)
    assert found["refine"].key == row.student_stages[0].key


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_manifests_tell_teacher_and_encoder(tmp_path: Path, mode: str) -> None:
    store, _ = stored(tmp_path, recipe_of(labels__mode=mode))
    found = students(store)
    for student in found.values():
        assert student.rows == () and texts(student.chain) == [
            "teacher openmmlab-community/mm_grounding_dino_large_all: Apache-2.0",
            f"teacher {SAM}: Apache-2.0",
            "encoder facebook/dinov2-small: Apache-2.0",
            "data unknown: unknown",
        ]
        assert student.chain.verdict == "commercial use unknown"


def test_the_student_of_an_expert_and_one_without_pseudo_labels(tmp_path: Path) -> None:
    expert = {"teacher__kind": "expert", "teacher__encoder__name": "resnet50", "teacher__encoder__checkpoint": "hub"}
    store, _ = stored(tmp_path / "expert", recipe_of(**expert))
    assert "teacher's encoder microsoft/resnet-50: Apache-2.0" in texts(students(store)["refine"].chain)
    store, _ = stored(tmp_path / "alone", recipe_of(loss__lambda_semi=0))
    assert texts(students(store)["refine"].chain) == [
        "encoder facebook/dinov2-small: Apache-2.0",
        "data unknown: unknown",
    ]


@pytest.mark.parametrize("gone", ["label-teacher", "selftrain", "foundation"])
def test_what_is_pruned_is_unknown(tmp_path: Path, gone: str) -> None:
    store, _ = stored(tmp_path, recipe_of(), without=(gone,))
    (teacher, *_) = students(store)["refine"].chain.sources
    assert teacher.text == "teacher unknown: unknown" and "no longer stored" in teacher.note


def test_the_command_prints_what_each_student_inherits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, row = stored(tmp_path, recipe_of(teacher__kind="mask2former"))
    with_result(store, row)
    assert store_command.main(["licences", "--storage", store.storage]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{row.student_stages[0].key}  refine, main:CAST: no commercial use" in lines
    assert "  teacher facebook/mask2former-swin-large-coco-instance: CC-BY-NC-4.0" in lines
    assert lines[-1] == f"2 students in {store.storage}"
    assert store_command.main(["licences", "--json", "--storage", store.storage]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert [each["commercial"] for each in plain] == ["no", "no"]
    assert LicenceChain.of_plain(plain[0]["sources"]) == licence_chain(row.recipe)


def test_a_store_of_an_earlier_version(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "storage")
    store = ArtifactStore(str(tmp_path / "storage"))
    found = students(store)
    assert {student.rows for student in found.values()} == {("losses:sup+semi",)}
    assert {texts(student.chain)[-1] for student in found.values()} == {"data shapes: Apache-2.0"}
    shutil.rmtree(tmp_path / "storage" / "runs")
    assert texts(students(store)["refine"].chain) == ["data unknown: unknown"]
