"""SAM3 as a teacher: equal to transformers' post-processing, trained, saved, reloaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from teacher_scenes import CATEGORIES, CONTRAST, CROP, changed, random_images, run_steps
from tiny_checkpoints import write_sam3
from training_scenes import make_batch
from transformers import AutoProcessor, Sam3Model

from cast_ray.recipe import TeacherConfig
from cast_ray.teachers.protocol import load_teacher, save_teacher
from cast_ray.teachers.sam3 import CHECKPOINT, Sam3Teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sam3(tmp_path_factory.mktemp("sam3"))


def make_teacher(folder: Path, **changes: Any) -> Sam3Teacher:
    config = TeacherConfig(**{"kind": "sam3", "inference": {"score_threshold": 0.0}, **changes})
    return Sam3Teacher.load({CHECKPOINT: folder}, config, CATEGORIES, CROP).eval()  # type: ignore[return-value]


def test_finds_what_transformers_finds(folder: Path) -> None:
    image = random_images(1)[0]
    processor = AutoProcessor.from_pretrained(folder)
    model = Sam3Model.from_pretrained(folder).eval()
    found = make_teacher(folder).predict(image[None], [(30, 40)], None, 30)[0]
    for label, category in enumerate(CATEGORIES):
        inputs = processor(images=image, text=category.name, return_tensors="pt")
        with torch.no_grad():
            out = model(**{k: v for k, v in inputs.items() if k != "original_sizes"})
        theirs = processor.image_processor.post_process_instance_segmentation(
            out, threshold=0.0, mask_threshold=0.5, target_sizes=[(30, 40)]
        )[0]
        order = theirs["scores"].argsort(descending=True)
        mine = [i for i in found if i["label"] == label]
        assert len(mine) == 10
        np.testing.assert_allclose([i["score"] for i in mine], theirs["scores"][order], rtol=2e-2)
        masks = [coco_mask.decode({"size": i["size"], "counts": i["rle"]}) for i in mine]
        agree = [np.mean(m == t.numpy()) for m, t in zip(masks, theirs["masks"][order])]
        assert np.mean(agree) > 0.97  # transformers thresholds resized probabilities, here resized logits


def test_parts_of_the_pairs_change_nothing(folder: Path) -> None:
    sizes = [(48, 64), (31, 22)]
    a = make_teacher(folder).predict(random_images(), sizes)
    b = make_teacher(folder, sam3={"prompts_at_a_time": 1}).predict(random_images(), sizes)
    for mine, other in zip(a, b):
        np.testing.assert_allclose([i["score"] for i in mine], [i["score"] for i in other], rtol=1e-4)
        assert [i["label"] for i in mine] == [i["label"] for i in other]


@pytest.mark.parametrize("rank_by", ["detector", "segmenter", "product"])
def test_a_least_score_leaves_out_what_lies_below_it(folder: Path, rank_by: str) -> None:
    teacher = make_teacher(folder, inference={"score_threshold": 0.0, "rank_by": rank_by})
    everything = teacher.predict(random_images())
    least = float(np.median([i["score"] for found in everything for i in found]))
    kept = [[i for i in found if i["score"] >= least] for found in everything]
    found = teacher.predict(random_images(), min_score=least)
    for mine, wanted in zip(found, kept):
        assert [(i["label"], i["rle"]) for i in mine] == [(i["label"], i["rle"]) for i in wanted]
        np.testing.assert_allclose([i["score"] for i in mine], [i["score"] for i in wanted], rtol=1e-6)
    assert teacher.predict(random_images(), min_score=1.1) == [[], []]


def test_synonyms_of_a_class_do_not_find_an_instance_twice(folder: Path) -> None:
    teacher = make_teacher(folder, prompt={"synonyms": {"dog": ["dog", "hound"]}})
    found = [i for i in teacher.predict(random_images(1))[0] if i["label"] == 2]
    rles = [{"size": i["size"], "counts": i["rle"]} for i in found]
    overlap = coco_mask.iou(rles, rles, [0] * len(rles)) - np.eye(len(rles))
    assert len(found) > 0 and overlap.max() < 0.6


@pytest.mark.parametrize("contrastive", [None, CONTRAST])
def test_the_loss_falls_on_a_fixed_batch(folder: Path, contrastive: Any) -> None:
    teacher = make_teacher(folder)
    before = copy.deepcopy(teacher.state_dict())
    losses = run_steps(teacher, contrastive, steps=40)
    assert np.isfinite(losses).all() and losses[-1] < 0.8 * losses[0]
    names = changed(before, teacher.state_dict())
    assert not any("text_encoder" in n or "geometry_encoder" in n for n in names)
    assert any("vision_encoder.backbone" in n for n in names) and any("detr_decoder.box_head" in n for n in names)


def test_a_step_asks_for_the_classes_of_its_images_first(folder: Path) -> None:
    teacher = make_teacher(folder, sam3={"max_asked": 2})
    network, terms = teacher.for_training(CONTRAST)
    batch = make_batch((2, 1), 2, seed=0)
    batch.targets[0].labels[:], batch.targets[1].labels[:] = 2, 0
    output = network(batch.weak, batch.strong, batch.targets)
    assert output.predictions.auxiliary["asked"].tolist() == [[0, 2], [0, 2]]
    found = terms(output, batch.targets)
    # an image counts its instances, and 1 for each class that it does not show
    assert found["class"][1].tolist() == [3, 2] and found["mask_dice"][1].tolist() == [2, 1]


def test_saved_and_reloaded_it_predicts_identically(folder: Path, tmp_path: Path) -> None:
    teacher = make_teacher(folder)
    run_steps(teacher, CONTRAST, steps=2)
    save_teacher(teacher.eval(), tmp_path)
    assert load_teacher(tmp_path).predict(random_images()) == teacher.predict(random_images())
