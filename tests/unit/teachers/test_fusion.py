"""Instances of several teachers as one list, and an ensemble of teachers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from teacher_scenes import CATEGORIES, CONTRAST, CROP, random_images
from tiny_checkpoints import write_mask_transformer, write_sam3

from cast_ray.contracts.instance import Instance, SourcedInstance
from cast_ray.contracts.records import Category
from cast_ray.models.segmenter import build_segmenter
from cast_ray.recipe import EncoderConfig, ModelConfig, TeacherConfig
from cast_ray.teachers.ensemble import EnsembleTeacher
from cast_ray.teachers.expert import ExpertTeacher
from cast_ray.teachers.fusion import group_instances, suppress, vote
from cast_ray.teachers.protocol import load_teacher, save_teacher

SIZE = (20, 30)


def instance(label: int, score: float, box: tuple[int, int, int, int], source: int = 0) -> SourcedInstance:
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))["counts"]
    return {"label": label, "score": score, "rle": rle, "size": list(SIZE), "mask_quality": 0.5, "source": source}


def decode(found: Instance) -> np.ndarray:
    return coco_mask.decode({"size": found["size"], "counts": found["rle"]})


def test_groups_are_of_one_class_and_hold_every_instance_once() -> None:
    mine = [instance(0, 0.9, (0, 0, 10, 10)), instance(0, 0.8, (0, 0, 10, 9)), instance(1, 0.85, (0, 0, 10, 10))]
    mine += [instance(0, 0.3, (20, 10, 30, 20)), instance(0, 0.2, (5, 5, 5, 5))]
    groups = group_instances(mine, 0.6)
    assert [[i["score"] for i in g] for g in groups] == [[0.9, 0.8], [0.85], [0.3], [0.2]]


def test_suppression_is_the_slow_obvious_one() -> None:
    rng = np.random.default_rng(0)
    mine = []
    for score in rng.permutation(40) / 40:
        x, y = int(rng.integers(0, 15)), int(rng.integers(0, 10))
        mine.append(instance(int(rng.integers(2)), float(score), (x, y, x + 12, y + 8)))
    kept: list[SourcedInstance] = []
    for i in sorted(mine, key=lambda i: -i["score"]):
        same = [k for k in kept if k["label"] == i["label"]]
        if all((decode(i) & decode(k)).sum() / (decode(i) | decode(k)).sum() < 0.5 for k in same):
            kept.append(i)
    assert suppress(mine, 0.5) == kept and 2 < len(kept) < 40


def test_a_vote_takes_the_pixels_of_the_majority_and_averages_the_scores() -> None:
    three = [instance(0, s, (0, 0, 10, h), source) for source, (s, h) in enumerate([(0.9, 10), (0.8, 12), (0.7, 12)])]
    (fused,) = vote(three, 0.6, 3)
    assert (decode(fused) == decode(three[1])).all()  # .8 + .7 of the score find rows 10 and 11 inside
    assert fused["score"] == pytest.approx(0.8) and "source" not in fused
    (alone,) = vote(three[:1], 0.6, 3)
    assert alone["score"] == pytest.approx(0.3)


def test_a_source_votes_once_for_an_instance() -> None:
    twice = [
        instance(0, 0.9, (0, 0, 10, 10), 0),
        instance(0, 0.6, (0, 0, 10, 10), 0),
        instance(0, 0.5, (0, 0, 10, 10), 1),
    ]
    (fused,) = vote(twice, 0.6, 2)
    assert fused["score"] == pytest.approx((0.9 + 0.5) / 2)


def test_what_two_sources_agree_on_outranks_what_one_sees() -> None:
    mine = [
        instance(0, 0.95, (0, 0, 5, 5), 0),
        instance(0, 0.7, (10, 0, 20, 10), 0),
        instance(0, 0.7, (10, 0, 20, 10), 1),
    ]
    assert [round(f["score"], 3) for f in vote(mine, 0.6, 2)] == [0.7, 0.475]
    assert vote([], 0.6, 2) == []


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("checkpoints")
    labels = tuple(c.name for c in CATEGORIES)
    return {
        "teacher.sam3.checkpoint": write_sam3(home / "sam3"),
        "teacher.mask_transformer.checkpoint": write_mask_transformer(home / "m2f", "mask2former", labels),
    }


@pytest.mark.parametrize("method", ["vote", "nms"])
def test_an_ensemble_predicts_saves_and_reloads(folders: dict[str, Path], method: str, tmp_path: Path) -> None:
    config = TeacherConfig(
        kind="ensemble",
        ensemble={"members": ("sam3", "mask2former"), "method": method},
        inference={"score_threshold": 0.0},
    )
    assert set(config.checkpoint_fields()) == set(folders)
    teacher = EnsembleTeacher.load(folders, config, CATEGORIES, CROP).eval()
    found = teacher.predict(random_images(), max_detections=12)
    for instances in found:
        assert 0 < len(instances) <= 12
        assert [i["score"] for i in instances] == sorted((i["score"] for i in instances), reverse=True)
        for label in range(3):
            rles = [{"size": i["size"], "counts": i["rle"]} for i in instances if i["label"] == label]
            if method == "nms" and len(rles) > 1:
                assert (coco_mask.iou(rles, rles, [0] * len(rles)) - np.eye(len(rles))).max() < 0.6
    save_teacher(teacher, tmp_path)
    assert load_teacher(tmp_path).predict(random_images(), max_detections=12) == found
    # A least score changes no other instance, though the unsure ones have a voice in a vote.
    least = float(np.median([i["score"] for instances in found for i in instances]))
    surer = teacher.predict(random_images(), max_detections=12, min_score=least)
    for mine, instances in zip(surer, found):
        wanted = [i for i in instances if i["score"] >= least]
        assert [(i["label"], i["rle"]) for i in mine] == [(i["label"], i["rle"]) for i in wanted]


def test_a_saved_teacher_can_be_a_member(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = EncoderConfig(name="conv", widths=(8, 8, 16, 16), stem_stride=2)
    model = ModelConfig(encoder=encoder, hidden_dim=16, num_queries=9, num_layers=2, num_heads=2, feedforward_dim=16)
    expert = ExpertTeacher(build_segmenter(model, 3, seed=0), CATEGORIES, CROP)
    save_teacher(expert, tmp_path / "expert")
    assert load_teacher(tmp_path / "expert").predict(random_images()) == expert.predict(random_images())
    member = str(tmp_path / "expert")
    config = TeacherConfig(kind="ensemble", ensemble={"members": ("sam3", member)}, inference={"score_threshold": 0.0})
    field = "teacher.ensemble.members[1]"
    assert config.checkpoint_fields() == {"teacher.sam3.checkpoint": "facebook/sam3", field: member}
    everything = {**folders, field: Path(member)}
    assert EnsembleTeacher.load(everything, config, CATEGORIES, CROP).eval().predict(random_images(1))[0]
    with pytest.raises(ValueError, match="is for the classes"):
        EnsembleTeacher.load(everything, config, [*CATEGORIES[:2], Category(9, "cat")], CROP)


def test_an_ensemble_says_why_it_is_not_trained(folders: dict[str, Path]) -> None:
    config = TeacherConfig(kind="ensemble", ensemble={"members": ("mask2former",)})
    with pytest.raises(ValueError, match=r"cannot be fine-tuned: set stages\.use_adapt=false"):
        EnsembleTeacher.load(folders, config, CATEGORIES, CROP).for_training(CONTRAST)
