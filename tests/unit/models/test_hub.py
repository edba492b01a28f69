"""A student for others: what its card says in the hub's own form, what it inherits, and its way to the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import LocalTokenNotFoundError
from tiny_students import make_student

from cast_ray.cli import export
from cast_ray.contracts.records import Category
from cast_ray.contracts.row_result import RowResult
from cast_ray.models import student as student_module
from cast_ray.models.student import CARD, CONFIG, WEIGHTS, Student
from cast_ray.recipe import build_recipe
from cast_ray.recipe.licence_chain import licence_chain, readme_licence

METRICS = {"teacher/mask_ap": 51.24, "student/mask_ap": 40.0, "refined/mask_ap": 42.504, "refined/ap50": 63.0}


def make() -> Student:
    return make_student((Category(3, "disc"), Category(7, "box")))


def result_of(preset: str, metrics: dict[str, float] = METRICS, **overrides: Any) -> RowResult:
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    recipe = build_recipe(preset, "full", ({} if preset == "shapes" else {"data.root": "/nowhere"}) | given)
    plain = {"table": "losses", "row": "CAST", "seed": 2, "status": "done", "metrics": metrics}
    return RowResult.of(plain | {"recipe": recipe.model_dump(mode="json")}, "result.json")


def card_of(result: RowResult | None) -> ModelCard:
    """The card as the hub's own library reads it, which refuses a header that is not one."""
    return ModelCard(make().files(result)[CARD].decode())


def test_the_header_of_the_card_is_the_hubs() -> None:
    card = card_of(result_of("cityscapes"))
    fields = card.data.to_dict()
    assert fields["library_name"] == "cast_ray" and fields["pipeline_tag"] == "image-segmentation"
    assert "instance-segmentation" in fields["tags"] and fields["datasets"] == ["cityscapes"]
    assert fields["base_model"] == ["facebook/dinov2-small"] and fields["metrics"] == ["mask_ap", "ap50"]
    assert fields["license"] == "other" and fields["license_name"] == "cityscapes-licence-agreement"
    assert fields["license_link"] == "https://www.cityscapes-dataset.com/license/"
    assert isinstance(card.data, ModelCardData)
    measured = card.data.eval_results or []
    assert {(each.metric_type, each.metric_value) for each in measured} == {("mask_ap", 42.5), ("ap50", 63.0)}
    first = measured[0]
    assert (first.dataset_type, first.dataset_name, first.metric_name) == (
        "cityscapes",
        "Cityscapes",
        "Cityscapes AP of masks",
    )
    assert first.dataset_split == "validation" and first.task_type == "image-segmentation"


@pytest.mark.parametrize(
    ("preset", "overrides", "fields"),
    [
        ("shapes", {}, {"license": "apache-2.0"}),
        ("coco", {"teacher__kind": "mask2former"}, {"license": "cc-by-nc-4.0"}),
        ("coco", {}, {"license": "unknown"}),
        ("coco", {"data__licence": "CC0-1.0"}, {"license": "apache-2.0"}),
        ("coco", {"data__licence": "GPL-3.0-only"}, {"license": "gpl-3.0"}),
        ("coco", {"data__licence": "Only for us!"}, {"license": "other", "license_name": "only-for-us"}),
        (
            "coco",
            {"teacher__kind": "sam3", "data__licence": "MIT"},
            {
                "license": "other",
                "license_name": "sam-license",
                "license_link": "https://github.com/facebookresearch/sam3/blob/main/LICENSE",
            },
        ),
    ],
)
def test_the_card_names_the_strictest_licence(preset: str, overrides: dict[str, Any], fields: dict[str, str]) -> None:
    found = card_of(result_of(preset, **overrides)).data.to_dict()
    assert {key: value for key, value in found.items() if key.startswith("license")} == fields


def test_the_card_shows_the_whole_chain() -> None:
    text = card_of(result_of("coco", teacher__kind="mask2former", data__licence="nuclei")).text
    for part in (
        "| teacher facebook/mask2former-swin-large-coco-instance | "
        "[CC-BY-NC-4.0](https://creativecommons.org/licenses/by-nc/4.0/) | no | https://github.com/",
        "| encoder facebook/dinov2-small | [Apache-2.0](https://www.apache.org/licenses/LICENSE-2.0) | yes | ",
        "| data nowhere | [CC0-1.0](",
        "Taken together: no commercial use.",
        "no legal advice",
    ):
        assert part in text, part


def test_a_card_without_a_result_knows_neither_licence_nor_numbers() -> None:
    card = card_of(None)
    fields = card.data.to_dict()
    assert fields["license"] == "unknown" and not {"model-index", "metrics", "datasets", "model_name"} & set(fields)
    assert "Nothing is known of the licences" in card.text


def test_a_teacher_alone_is_not_the_students_number() -> None:
    assert "model-index" not in card_of(result_of("shapes", {"teacher/mask_ap": 3.0})).data.to_dict()


def test_a_saved_student_keeps_what_it_inherits_and_its_card(tmp_path: Path) -> None:
    result = result_of("cityscapes")
    make().save_pretrained(tmp_path / "first", result)
    again = Student.from_pretrained(tmp_path / "first")
    assert again.licences is not None and again.licences.verdict == "no commercial use"
    again.save_pretrained(tmp_path / "second")
    for name in (CONFIG, CARD):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    licence = readme_licence(str(tmp_path / "second"))
    assert licence is not None and licence.label == "cityscapes-licence-agreement"
    taught = licence_chain(build_recipe("shapes", "full", {"stages.foundation": str(tmp_path / "second")}))
    assert [source.licence.label for source in taught.sources] == ["cityscapes-licence-agreement", "Apache-2.0"]


def test_a_config_with_broken_licences_is_one_line(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"licences": [{"role": "teacher"}]}))
    with pytest.raises(ValueError, match=r"config\.json: cannot be read: licences: ") as error:
        Student.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


class LocalHub(HfApi):
    """Stands in for `HfApi`: repositories are folders."""

    def __init__(self, root: Path, error: Exception | None = None, token: str | None = None):
        self.root, self.error, self.token = root, error, token
        self.made: list[dict[str, Any]] = []

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.made.append({"repo_id": repo_id, **options})
        (self.root / repo_id).mkdir(parents=True, exist_ok=options["exist_ok"])

    def upload_folder(self, *, repo_id: str, folder_path: Any, commit_message: Any = "", **options: Any) -> Any:
        assert commit_message and not options
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"https://hub.example/{repo_id}/commit/1"


def test_a_student_is_uploaded_as_it_is_saved(tmp_path: Path) -> None:
    hub, student = LocalHub(tmp_path / "hub"), make()
    result = result_of("shapes")
    assert student.push_to_hub("me/scenes", result, private=True, api=hub) == "https://hub.example/me/scenes/commit/1"
    assert hub.made == [{"repo_id": "me/scenes", "repo_type": "model", "private": True, "exist_ok": True}]
    folder = tmp_path / "hub" / "me" / "scenes"
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, CARD}
    again = Student.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), student.state_dict().values()))
    card = ModelCard.load(folder / CARD)
    assert 'Student.from_pretrained("me/scenes")' in card.text and "THIS_FOLDER" not in card.text
    assert card.data.to_dict()["model-index"][0]["name"] == "scenes"
    student.push_to_hub("me/scenes", result, api=hub)  # a second time: a new commit of the same repository


@pytest.mark.parametrize("repo_id", ["", "scenes", "me/", "a/b/c", "me/..", "me/sce nes"])
def test_a_name_that_no_repository_can_have(repo_id: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected OWNER/NAME") as error:
        make().push_to_hub(repo_id, api=LocalHub(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error", [LocalTokenNotFoundError("Token is required\nsee the docs"), httpx.ConnectError("no route to host")]
)
def test_what_the_hub_refuses_is_one_line(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as found:
        make().push_to_hub("me/scenes", api=LocalHub(tmp_path, error))
    first = str(error).splitlines()[0]
    assert str(found.value).startswith(
        f"hub repository 'me/scenes': {first} (expected a token with write access in $HF"
    )
    assert "\n" not in str(found.value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(student_module, "HfApi", lambda token=None: LocalHub(tmp_path / "hub", token=token))
    return tmp_path / "hub"


def test_export_uploads_a_saved_student(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make().save_pretrained(tmp_path / "student", result_of("shapes"))
    arguments = ["--student", str(tmp_path / "student"), "--push-to-hub", "me/scenes"]
    assert export.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        "uploaded: https://hub.example/me/scenes/commit/1",
        "licences: data shapes: Apache-2.0",
        "          together: commercial use allowed",
    ]
    card = (hub / "me" / "scenes" / CARD).read_text()
    assert "| refined student (step 3) | 42.5 | 63.0 |" in card and "--student me/scenes" in card
    assert export.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / CARD).is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --out FOLDER, --out FILE.onnx, --out FILE.xml or --push-to-hub OWNER/NAME"),
        (["--push-to-hub", "scenes"], "hub repository 'scenes': expected OWNER/NAME"),
        (["--push-to-hub", "me/scenes", "--out", "a.onnx"], "--push-to-hub me/scenes: expected --out FOLDER with it"),
        (["--private", "--out", "folder"], "--private: expected --push-to-hub OWNER/NAME with it"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make().save_pretrained(tmp_path / "student")
    assert export.main(["--student", str(tmp_path / "student"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}") and not hub.exists()
