"""theta_T0 from checkpoints on disk: imported once, trained by a stage, stored, and read back where labels are made."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teacher_scenes import CATEGORIES, random_images
from tiny_checkpoints import write_detector, write_sam2
from training_scenes import batches

from cast_ray.contracts.records import Category
from cast_ray.engine.checkpoint import TrainState
from cast_ray.engine.loop import TrainHooks
from cast_ray.engine.world import World
from cast_ray.plan.graph import RowPlan, Stage, plan
from cast_ray.plan.stage_parts import train_config
from cast_ray.recipe import Recipe, build_recipe
from cast_ray.runtime.store.artifacts import ArtifactStore, committed_fingerprints
from cast_ray.runtime.store.models import import_foundation, load_labeller, load_teacher, save_model
from cast_ray.runtime.worker.train import stage_run, train_stage
from cast_ray.teachers.grounded_sam import GroundedSamTeacher
from cast_ray.teachers.protocol import Teacher
from cast_ray.teachers.protocol import load_teacher as read_teacher

CLASSES = tuple(CATEGORIES)
CPU = torch.device("cpu")
RECIPE = build_recipe("coco", "smoke")  # of how a stage runs
SETTINGS = {
    "teacher.kind": "grounded_sam",
    "data.image_px": "[64, 64]",
    "stages.adapt.steps": "3",
    "stages.selftrain.steps": "4",
    "stages.selftrain.ema": "0.9",
    "contrastive.num_negatives": "4",
    "contrastive.projection_dims": "[8, 8]",
    "contrastive.num_anchors": "16",
    "contrastive.pool_size": "32",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("checkpoints")
    write_detector(home / "detector", "mm", ("person", "traffic", "light", "dog"))
    write_sam2(home / "segmenter")
    return home


def make_recipe(checkpoints: Path, **overrides: Any) -> Recipe:
    folders = {f"teacher.grounded_sam.{part}": str(checkpoints / part) for part in ("detector", "segmenter")}
    return build_recipe("coco", "smoke", SETTINGS | folders | {k.replace("__", "."): v for k, v in overrides.items()})


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


def make_row(recipe: Recipe, foundation: str | None) -> RowPlan:
    return plan(recipe, "h", foundation=foundation, has_source=False)


def run(stage: Stage, teacher: Teacher, steps: int, resume: TrainState | None = None, every: int = 100) -> Any:
    states: list[TrainState] = []
    # A copy, because a state's tensors are the live ones.
    hooks = TrainHooks(on_checkpoint=lambda state: states.append(copy.deepcopy(state)))
    model, _ = train_stage(
        stage,
        batches(resume.step if resume else 0, steps, num_labelled=1),
        train_config(stage, RECIPE).model_copy(update={"checkpoint_every_steps": every}),
        stage_run(stage, World(), resume=resume, hooks=hooks),
        num_classes=3,
        parent=teacher,
    )
    return model, states


def test_checkpoints_are_imported_once(checkpoints: Path, store: ArtifactStore, tmp_path: Path) -> None:
    recipe = make_recipe(checkpoints)
    fingerprint = import_foundation(store, recipe, CLASSES)
    assert fingerprint and store.has(f"train-{fingerprint}")
    committed = store.changed(f"artifacts/train-{fingerprint}/manifest.json")
    moved = Path(shutil.copytree(checkpoints, tmp_path / "moved"))
    assert import_foundation(store, make_recipe(moved), CLASSES) == fingerprint
    assert store.changed(f"artifacts/train-{fingerprint}/manifest.json") == committed


def test_the_fingerprint_is_of_contents_classes_and_words(checkpoints: Path, store: ArtifactStore) -> None:
    recipe = make_recipe(checkpoints)
    prints = {
        import_foundation(store, recipe, CLASSES, dry_run=True),
        import_foundation(store, recipe, CLASSES[:2], dry_run=True),
        import_foundation(
            store, make_recipe(checkpoints, teacher__prompt__synonyms="{dog: [hound]}"), CLASSES, dry_run=True
        ),
        import_foundation(
            store, make_recipe(checkpoints, teacher__grounded_sam__segmenter="a/b"), CLASSES, dry_run=True
        ),
    }
    assert len(prints) == 4 and None not in prints
    assert not committed_fingerprints(store.list_artifacts())
    # how it is trained and read out belongs to the stages that do so
    other = make_recipe(checkpoints, teacher__inference__score_threshold="0.1", teacher__grounded_sam__box_weight="1")
    assert import_foundation(store, other, CLASSES, dry_run=True) in prints
    assert import_foundation(store, build_recipe("coco", "smoke"), CLASSES) is None


def test_a_plan_without_the_hub_takes_checkpoints_by_name(store: ArtifactStore) -> None:
    recipe = build_recipe("coco", "smoke", {"teacher.kind": "grounded_sam"})
    assert import_foundation(store, recipe, CLASSES, dry_run=True)
    with pytest.raises(
        ValueError, match=r"teacher.grounded_sam.detector: 'openmmlab-community/mm_grounding_dino_large_all'"
    ):
        import_foundation(store, recipe, CLASSES)


@pytest.mark.parametrize(
    ("overrides", "classes", "message"),
    [
        (
            {"teacher__grounded_sam__segmenter": "/nowhere"},
            CLASSES,
            r"teacher\.grounded_sam\.segmenter: no folder '/nowhere'",
        ),
        ({"teacher__prompt__synonyms": "{cat: [kitten]}"}, CLASSES, "no class 'cat'"),
        ({}, (Category(1, "犬"),), "no tokens for '犬'"),
        (
            {"teacher__kind": "sam3", "teacher__sam3__checkpoint": "./x"},
            CLASSES,
            r"teacher\.sam3\.checkpoint: no folder",
        ),
    ],
)
def test_what_cannot_be_imported_leaves_nothing(
    checkpoints: Path, store: ArtifactStore, overrides: dict[str, str], classes: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        import_foundation(store, make_recipe(checkpoints, **overrides), classes)
    assert not committed_fingerprints(store.list_artifacts())


def test_stages_train_store_and_read_it_back(checkpoints: Path, store: ArtifactStore) -> None:
    recipe = make_recipe(checkpoints)
    row = make_row(recipe, import_foundation(store, recipe, CLASSES))
    adapt = row.roles["adapt"]
    before = load_labeller(store, row.roles["zero_shot"], "model", CPU)
    teacher = load_teacher(store, f"train-{adapt.parents['init']}", adapt.config["model"], (64, 64))
    model, _ = run(adapt, teacher, 3)
    save_model(store, adapt, model, CLASSES)
    store.commit(adapt, {"seconds": 0.0})
    labels, measured = row.roles["label-adapted"], row.roles["zero_shot"]
    labeller = load_labeller(store, labels, "teacher", CPU)
    assert labeller.config.inference.score_threshold == 0.3 and before.config.inference.score_threshold == 0
    labeller.config = model.config = before.config  # to see past the threshold
    images = random_images(2, (64, 64))
    assert labeller.predict(images) == model.eval().predict(images) != before.predict(images)
    assert measured.config["teacher"]["inference"]["rank_by"] == "detector"


def test_a_stage_resumes_as_if_it_had_not_stopped(checkpoints: Path, store: ArtifactStore) -> None:
    recipe = make_recipe(checkpoints, loss__lambda_pxl="0")
    row = make_row(recipe, import_foundation(store, recipe, CLASSES))
    stage = row.roles["selftrain"]

    def fresh() -> Teacher:
        teacher = load_teacher(store, f"train-{stage.parents['init']}", stage.config["model"], (64, 64))
        return teacher

    whole, states = run(stage, fresh(), 4, every=2)
    torch.manual_seed(5)
    rest, _ = run(stage, fresh(), 4, resume=states[0])
    for (name, a), b in zip(whole.state_dict().items(), rest.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_a_saved_teacher_is_a_foundation(checkpoints: Path, store: ArtifactStore, tmp_path: Path) -> None:
    recipe = make_recipe(checkpoints)
    first = import_foundation(store, recipe, CLASSES)
    saved = store.artifact(f"train-{first}")
    again = make_recipe(checkpoints, stages__foundation=saved, teacher__grounded_sam__detector="/gone")
    second = import_foundation(store, again, CLASSES)
    assert second and second != first
    a, b = (read_teacher(Path(store.artifact(f"train-{f}"))) for f in (first, second))
    assert isinstance(a, GroundedSamTeacher)
    np.testing.assert_equal([x.numpy() for x in a.state_dict().values()], [x.numpy() for x in b.state_dict().values()])
    with pytest.raises(ValueError, match="was made for person, traffic light, dog, the dataset has person"):
        import_foundation(store, again, CLASSES[:1])
    with pytest.raises(ValueError, match=r"holds 'grounded_sam', teacher\.kind is 'sam3'"):
        import_foundation(store, make_recipe(checkpoints, stages__foundation=saved, teacher__kind="sam3"), CLASSES)
