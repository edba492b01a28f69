"""A teacher that takes the weights of the model in training: of every kind that trains, and of a student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from teacher_scenes import CATEGORIES, CROP, random_images
from tiny_checkpoints import write_detector, write_mask_transformer, write_sam2, write_sam3
from training_scenes import MODEL, make_batch

from cast_ray.engine.loop import RunSettings, TrainHooks, train
from cast_ray.engine.objective import Objective
from cast_ray.engine.world import World
from cast_ray.models.segmenter import build_segmenter
from cast_ray.plan.graph import Stage
from cast_ray.recipe import InputSize, LossConfig, PseudoConfig, TeacherConfig, TrainConfig
from cast_ray.runtime.data.pictures import Pictures
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.models import save_model
from cast_ray.runtime.worker.labeller import PseudoLabeller
from cast_ray.runtime.worker.online import Learner, OnlineLabels
from cast_ray.teachers.expert import ExpertTeacher
from cast_ray.teachers.grounded_sam import GroundedSamTeacher
from cast_ray.teachers.mask_transformer import MaskTransformerTeacher
from cast_ray.teachers.protocol import Teacher
from cast_ray.teachers.sam3 import Sam3Teacher

NO_THRESHOLD = {"inference": {"score_threshold": 0.0}}
PSEUDO = PseudoConfig(score_threshold=0.0, min_area_px=1)
TEACHER = Stage("selftrain", "train", {"data": {"image_px": list(CROP)}}, {}, "a" * 20)
FROZEN = {"grounded_sam": ("text_encoder", "vision_encoder"), "sam3": ("text_encoder", "geometry_encoder")}


def expert(folder: Path) -> Teacher:
    return ExpertTeacher(build_segmenter(MODEL, len(CATEGORIES), seed=0), CATEGORIES, CROP)


def mask2former(folder: Path) -> Teacher:
    checkpoint = write_mask_transformer(folder, "mask2former", tuple(c.name for c in CATEGORIES))
    config = TeacherConfig(kind="mask2former")
    return MaskTransformerTeacher.load({"teacher.mask_transformer.checkpoint": checkpoint}, config, CATEGORIES, CROP)


def grounded_sam(folder: Path) -> Teacher:
    words = tuple(word for category in CATEGORIES for word in category.name.split())
    folders = {
        "teacher.grounded_sam.detector": write_detector(folder / "detector", "mm", words),
        "teacher.grounded_sam.segmenter": write_sam2(folder / "segmenter"),
    }
    return GroundedSamTeacher.load(folders, TeacherConfig(kind="grounded_sam", **NO_THRESHOLD), CATEGORIES, CROP)


def sam3(folder: Path) -> Teacher:
    config = TeacherConfig(kind="sam3", **NO_THRESHOLD)
    return Sam3Teacher.load({"teacher.sam3.checkpoint": write_sam3(folder)}, config, CATEGORIES, CROP)


def trained(teacher: Teacher, steps: int) -> list[bytes]:
    """Trains in place; the weights that were published after every second step but the last."""
    published: list[bytes] = []

    def publish(step: int, weights: dict[str, torch.Tensor]) -> None:
        published.append(save_tensors({name: t.detach().cpu().contiguous() for name, t in weights.items()}))

    network, terms = teacher.for_training(None)
    proposals = isinstance(teacher, ExpertTeacher)
    train(
        network,
        Objective(LossConfig(lambda_semi=1.0, num_points=64), None, criterion=terms, proposals=proposals),
        (make_batch((2, 3), 1, seed=0) for _ in range(steps)),
        TrainConfig(steps=steps, lr=1e-2, ema=0.5, schedule="constant"),
        RunSettings("f", 0, World(), hooks=TrainHooks(on_refresh=publish, refresh_every_steps=2)),
    )
    return published


def labeller_of(store: ArtifactStore) -> PseudoLabeller:
    config = {"pseudo": PSEUDO.model_dump(), "data": {"image_px": list(CROP)}, "batch": 2}
    stage = Stage("label-adapted", "label", config, {"teacher": TEACHER.fingerprint}, "b" * 20)
    return PseudoLabeller(store, stage, torch.device("cpu"))


@pytest.mark.parametrize("make", [expert, mask2former, grounded_sam, sam3])
def test_a_labeller_takes_the_average_of_the_teacher_in_training(make: Callable[[Path], Teacher], tmp_path: Path):
    teacher = make(tmp_path / "checkpoint").eval()
    store = ArtifactStore(str(tmp_path / "storage"))
    model = teacher.segmenter if isinstance(teacher, ExpertTeacher) else teacher
    save_model(store, TEACHER, model, tuple(CATEGORIES))
    store.commit(TEACHER, {})
    images = random_images()
    before = teacher.predict(images, max_detections=20)

    (published,) = trained(teacher, steps=3)
    labeller = labeller_of(store)
    assert labeller.teacher.predict(images, max_detections=20) == before
    labeller.load(published)
    after_two_steps = make(tmp_path / "checkpoint").eval()
    assert trained(after_two_steps, steps=2) == []  # handed on as it is then
    after_two_steps.eval()
    found, wanted = (t.predict(images, max_detections=20) for t in (labeller.teacher, after_two_steps))
    assert found == wanted and found != before
    names = list(load_tensors(published))
    assert names and not any(part in name for part in FROZEN.get(teacher.kind, ()) for name in names)


def test_a_labeller_becomes_the_student_that_it_labels_for(tmp_path: Path) -> None:
    """Of another architecture and image size than the teacher that labelled before."""
    store = ArtifactStore(str(tmp_path))
    teacher = expert(tmp_path)
    assert isinstance(teacher, ExpertTeacher)
    save_model(store, TEACHER, teacher.segmenter, tuple(CATEGORIES))
    store.commit(TEACHER, {})
    config = MODEL.model_copy(update={"hidden_dim": 32, "num_queries": 5})
    student = build_segmenter(config, len(CATEGORIES), seed=3)
    labeller = labeller_of(store)
    labeller.become(config, InputSize("fit", (32, 48)))
    labeller.load(save_tensors(student.state_dict()))
    pixels = random_images(2, (32, 48)).numpy()
    labels = labeller.label(Pictures([0, 1], list(pixels), [(64, 96)] * 2, [(32, 48)] * 2))
    alone = ExpertTeacher(student, CATEGORIES, (32, 48)).predict(torch.from_numpy(pixels), [(64, 96)] * 2)
    assert len(labels) == 2 and all(len(mine) > 0 for mine in labels)
    for mine, found in zip(labels, alone):
        scores = {round(float(np.float32(i["score"])), 4) for i in found}
        assert {round(float(np.float32(i["score"])), 4) for i in mine} <= scores
    online = OnlineLabels(
        Stage("label-teacher", "label", {"data": {"image_px": [48, 64]}, "batch": 2}, {}, "f"),
        (),
        None,
        4,
        Learner(config, InputSize("fit", (32, 48))),
    )
    assert [online.input_size_of(version).crop_px for version in (0, 1, 7)] == [(48, 64), (32, 48), (32, 48)]
