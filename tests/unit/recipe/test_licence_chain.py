"""What a student inherits: from a teacher that it learns from, from the weights it starts from and from its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cast_ray.plan.graph import DataHashes, plan
from cast_ray.recipe import build_recipe
from cast_ray.recipe.licence_chain import (
    LicenceChain,
    by_rows,
    chain_of_plain_recipe,
    licence_chain,
    readme_licence,
    warnings_of,
)
from cast_ray.recipe.licences import UNKNOWN

DINO, SAM = "openmmlab-community/mm_grounding_dino_large_all", "facebook/sam2.1-hiera-large"
MASK2FORMER = "facebook/mask2former-swin-large-coco-instance"


def chain(preset: str = "coco", scale: str = "full", **overrides: Any) -> LicenceChain:
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    root = {} if preset == "shapes" else {"data.root": "/nowhere"}
    return licence_chain(build_recipe(preset, scale, root | given))


def labels(found: LicenceChain) -> list[tuple[str, str, str]]:
    return [(source.role, source.name, source.licence.label) for source in found.sources]


def test_drawn_scenes_and_models_from_scratch_are_free_all_the_way() -> None:
    found = chain("shapes", "demo")
    assert labels(found) == [("data", "shapes", "Apache-2.0")]
    assert found.strictest.label == "Apache-2.0" and found.verdict == "commercial use allowed"
    assert warnings_of([("sup", found)]) == []


def test_the_papers_models_inherit_from_both_checkpoints_of_the_teacher() -> None:
    found = chain("cityscapes")
    assert labels(found) == [
        ("teacher", DINO, "Apache-2.0"),
        ("teacher", SAM, "Apache-2.0"),
        ("encoder", "facebook/dinov2-small", "Apache-2.0"),
        ("data", "cityscapes", "Cityscapes licence agreement"),
    ]
    assert found.verdict == "no commercial use"
    (warning,) = warnings_of([("CAST", found)])
    assert "data cityscapes: Cityscapes licence agreement, no commercial use (https://" in warning


def test_the_default_mask2former_teacher_forbids_commercial_use() -> None:
    found = chain(teacher__kind="mask2former", data__licence="CC0-1.0")
    assert found.sources[0].name == MASK2FORMER and found.strictest.id == "CC-BY-NC-4.0"
    (warning,) = warnings_of([("CAST", found)])
    assert warning == (
        f"the student inherits the terms of teacher {MASK2FORMER}: CC-BY-NC-4.0, no commercial use "
        "(https://creativecommons.org/licenses/by-nc/4.0/)."
    )


def test_a_student_without_pseudo_labels_owes_its_teacher_nothing() -> None:
    found = chain(teacher__kind="mask2former", loss__lambda_semi=0, data__licence="CC-BY-4.0")
    assert [source.role for source in found.sources] == ["encoder", "data"]
    assert found.verdict == "commercial use allowed"


def test_the_members_of_an_ensemble_all_count() -> None:
    found = chain(teacher__kind="ensemble", stages__use_adapt=False)
    assert [s.name for s in found.sources if s.role == "teacher"] == [DINO, SAM, "facebook/sam3"]
    assert "SAM License, commercial use with conditions" in warnings_of([("CAST", found)])[0]


@pytest.mark.parametrize(
    ("encoder", "name"),
    [
        ({"name": "dinov3-s", "checkpoint": "hub"}, "facebook/dinov3-vits16-pretrain-lvd1689m"),
        ({"name": "dinov2-s", "checkpoint": "facebook/dinov2-base"}, "facebook/dinov2-base"),
        ({"name": "dinov2-s", "checkpoint": ""}, None),
    ],
)
def test_the_encoder_counts_where_it_starts_from_published_weights(encoder: dict[str, str], name: str | None) -> None:
    given = {f"student__encoder__{key}": value for key, value in encoder.items()}
    found = chain(loss__lambda_semi=0, **given)
    assert [source.name for source in found.sources if source.role == "encoder"] == ([name] if name else [])


def test_an_expert_passes_on_the_weights_it_starts_from() -> None:
    given = {"teacher.encoder.name": "resnet50", "teacher.encoder.checkpoint": "hub", "teacher.decoder": "dpt"}
    found = licence_chain(build_recipe("shapes", "demo", given))
    assert ("teacher's encoder", "microsoft/resnet-50", "Apache-2.0") in labels(found)


def test_a_whole_published_model_stands_in_the_place_of_its_encoder() -> None:
    given = {"student": "mask2former-swin-t", "student.encoder.checkpoint": "hub", "loss.lambda_semi": 0}
    found = licence_chain(build_recipe("shapes", "demo", given))
    weights = "facebook/mask2former-swin-tiny-coco-instance"
    assert labels(found)[0] == ("start weights", weights, "CC-BY-NC-4.0") and len(found.sources) == 2
    assert found.strictest.id == "CC-BY-NC-4.0" and weights in warnings_of([("sup", found)])[0]
    expert = licence_chain(build_recipe("shapes", "demo", {"teacher.checkpoint": "me/mine"}))
    assert labels(expert)[0] == ("teacher's start weights", "me/mine", "unknown")


def test_what_is_the_users_own_is_unknown_until_something_says_it(tmp_path: Path) -> None:
    own = tmp_path / "teacher"
    own.mkdir()
    given = {"stages__foundation": str(own), "student__encoder__checkpoint": "me/mine"}
    found = chain(**given)
    assert labels(found) == [
        ("teacher", str(own), "unknown"),
        ("encoder", "me/mine", "unknown"),
        ("data", "/nowhere", "unknown"),
    ]
    assert found.verdict == "commercial use unknown" and warnings_of([("CAST", found)]) == []
    said = chain(
        **given, checkpoint_licences=[f"{own}=MIT", "me/mine = CC-BY-NC-4.0"], data__licence="ours, for us alone"
    )
    assert [source.licence.label for source in said.sources] == ["MIT", "CC-BY-NC-4.0", "ours, for us alone"]
    assert {source.stated_by for source in said.sources} == {"the recipe"}


def test_a_preset_for_one_dataset_says_how_to_name_it() -> None:
    found = chain("nuclei").sources[-1]
    assert found.licence == UNKNOWN
    assert found.note == "If it is 2018 Data Science Bowl (BBBC038) (CC0-1.0), say so: data.licence=nuclei."
    said = chain("nuclei", data__licence="nuclei").sources[-1]
    assert said.licence.label == "CC0-1.0" and said.stated_by.startswith("https://") and said.checked


def test_extra_images_from_elsewhere_are_a_source_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\n# Photos\n")
    found = chain("cityscapes", data__unlabelled_pool="extra", data__extra_image_dir=str(tmp_path))
    assert labels(found)[-1] == ("extra images", str(tmp_path), "CC-BY-SA-4.0")


@pytest.mark.parametrize(
    ("readme", "label", "commercial"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# A model\n", "Apache-2.0", "yes"),
        ("---\r\nlicense: cc-by-nc-4.0\r\n---\r\n", "CC-BY-NC-4.0", "no"),
        (
            "---\nlicense: other\nlicense_name: sam-license\nlicense_link: https://example.org/l\n---\n",
            "sam-license",
            "unknown",
        ),
        ("---\nlicense: [mit, cc-by-nc-4.0]\n---\n", "MIT and CC-BY-NC-4.0", "no"),
        ("---\nlicense: [mit]\n---\n", "MIT", "yes"),
    ],
)
def test_a_folder_in_the_hubs_format_carries_its_licence(
    tmp_path: Path, readme: str, label: str, commercial: str
) -> None:
    (tmp_path / "README.md").write_bytes(readme.encode())
    found = readme_licence(str(tmp_path))
    assert found is not None and (found.label, found.commercial) == (label, commercial)
    data = chain(data__root=str(tmp_path), loss__lambda_semi=0).sources[-1]
    assert (data.licence.label, data.stated_by) == (label, "README.md of the folder")
    teacher = chain(stages__foundation=str(tmp_path)).sources[0]
    assert (teacher.role, teacher.licence.label) == ("teacher", label)


@pytest.mark.parametrize(
    "readme", ["# No header\n", "---\nlicense:\n---\n", "---\n: : [\n---\n", "---\n- a\n---\n", "---\nlicense: mit\n"]
)
def test_a_readme_without_a_licence_says_nothing(tmp_path: Path, readme: str) -> None:
    (tmp_path / "README.md").write_text(readme)
    assert readme_licence(str(tmp_path)) is None
    assert readme_licence("s3://bucket/model") is None and readme_licence("") is None


def test_rows_that_inherit_the_same_are_told_together() -> None:
    free = chain(data__licence="CC0-1.0", loss__lambda_semi=0)
    bound = chain(data__licence="CC0-1.0", teacher__kind="mask2former")
    rows = [("sup", free), ("semi", bound), ("semi+pxl", bound)]
    assert by_rows([("sup", free)]) == [free.text]
    assert by_rows(rows) == [f"sup: {free.text}", f"semi, semi+pxl: {bound.text}"]
    (warning,) = warnings_of(rows)
    assert warning.startswith(f"the students of semi, semi+pxl inherit the terms of teacher {MASK2FORMER}: ")


def test_a_chain_survives_a_file() -> None:
    found = chain("cityscapes")
    assert LicenceChain.of_plain(json.loads(json.dumps(found.plain()))) == found
    with pytest.raises(ValueError, match="licences: cannot be read"):
        LicenceChain.of_plain([{"role": "teacher"}])


@pytest.mark.parametrize(
    ("root", "name"),
    [("/home/me/secret/cells", "cells"), ("s3://bucket/cells/", "cells"), ("../cells", "cells"), ("a/b", "a/b")],
)
def test_paths_of_this_machine_are_not_published(root: str, name: str) -> None:
    found = chain(data__root=root, data__licence="MIT")
    assert found.sources[-1].name == root and found.published().sources[-1].name == name
    assert [source.name for source in found.published().sources[:-1]] == [s.name for s in found.sources[:-1]]


def test_a_result_of_another_version_is_unknown_and_no_error() -> None:
    recipe = build_recipe("cityscapes", "full", {"data.root": "/nowhere"})
    assert chain_of_plain_recipe(recipe.model_dump(mode="json")) == licence_chain(recipe)
    older = {key: value for key, value in recipe.model_dump(mode="json").items() if key != "checkpoint_licences"}
    older["data"].pop("licence")
    assert chain_of_plain_recipe(older) == licence_chain(recipe)
    assert chain_of_plain_recipe(older | {"students": 2}) is None
    assert chain_of_plain_recipe({key: value for key, value in older.items() if key != "data"}) is None
    assert chain_of_plain_recipe({"preset": "coco", "scale": "full"}) is None


@pytest.mark.parametrize("value", ["models/mine", "=MIT", "models/mine="])
def test_a_checkpoints_licence_is_name_and_licence(value: str) -> None:
    with pytest.raises(ValueError, match=r"checkpoint_licences: expected NAME=LICENCE, .*" + value):
        build_recipe("shapes", "demo", {"checkpoint_licences": [value]})


def test_what_is_said_of_licences_changes_no_fingerprint() -> None:
    def fingerprints(**overrides: Any) -> list[str]:
        recipe = build_recipe("cityscapes", "full", overrides)
        return [stage.fingerprint for stage in plan(recipe, "h", foundation="f", hashes=DataHashes()).stages]

    said = {"data.licence": "CC0-1.0", "checkpoint_licences": ["facebook/sam3=MIT"]}
    assert fingerprints(**said) == fingerprints()
