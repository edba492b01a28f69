"""From teacher predictions to pseudo-labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from cast_ray.contracts.instance import Instance
from cast_ray.contracts.records import Category
from cast_ray.models.segmenter import build_segmenter
from cast_ray.recipe import EncoderConfig, ModelConfig, PseudoConfig
from cast_ray.teachers.expert import ExpertTeacher
from cast_ray.teachers.pseudo_labels import pseudo_labels


def instance(label: int, score: float, left: int, right: int, mask_quality: float = 0.9) -> Instance:
    mask = np.zeros((10, 20), np.uint8)
    mask[:, left:right] = 1
    return {
        "label": label,
        "score": score,
        "rle": coco_mask.encode(np.asfortranarray(mask))["counts"],
        "size": [10, 20],
        "mask_quality": mask_quality,
    }


def columns(found: Instance) -> list[int]:
    mask = coco_mask.decode({"size": found["size"], "counts": found["rle"]})
    return np.flatnonzero(mask.all(0)).tolist()


def test_masks_are_painted_in_falling_score_order_across_classes():
    labels = pseudo_labels([instance(1, 0.5, 0, 10), instance(0, 0.9, 6, 14)], PseudoConfig())
    assert [i["label"] for i in labels] == [0, 1]
    assert columns(labels[0]) == list(range(6, 14))
    assert columns(labels[1]) == list(range(6))


def test_two_instances_of_one_class_stay_two():
    labels = pseudo_labels([instance(1, 0.5, 0, 5), instance(1, 0.6, 5, 9)], PseudoConfig())
    assert sorted(len(columns(i)) for i in labels) == [4, 5]


def test_detector_order_paints_as_the_detector_returns():
    found = [instance(1, 0.5, 0, 10), instance(0, 0.9, 6, 14), instance(2, 0.2, 0, 20), instance(2, 0.7, 6, 20)]
    labels = pseudo_labels(found, PseudoConfig(order="detector"))
    assert [i["label"] for i in labels] == [1, 0, 2]  # as they came, not by score
    assert [columns(i) for i in labels] == [list(range(10)), list(range(10, 14)), list(range(14, 20))]
    first = pseudo_labels(found, PseudoConfig(order="detector", max_per_image=1))
    assert [(i["label"], i["score"]) for i in first] == [(1, 0.5)]
    doubled = [instance(0, 0.5, 0, 10), instance(1, 0.8, 0, 10)]
    assert [i["label"] for i in pseudo_labels(doubled, PseudoConfig(order="detector"))] == [0]
    assert [i["label"] for i in pseudo_labels(doubled, PseudoConfig(order="score"))] == [1]


def test_equal_scores_stay_in_the_detectors_order():
    found = [instance(2, 0.5, 0, 6), instance(0, 0.5, 4, 10), instance(1, 0.5, 8, 14)]
    assert [i["label"] for i in pseudo_labels(found, PseudoConfig())] == [2, 0, 1]


def test_masks_of_low_quality_are_dropped_where_asked():
    found = [instance(0, 0.9, 0, 6, mask_quality=0.4), instance(1, 0.5, 4, 10, mask_quality=0.7)]
    (label,) = pseudo_labels(found, PseudoConfig(mask_quality_threshold=0.7))
    assert label["label"] == 1 and columns(label) == list(range(4, 10))  # it takes no pixels either
    assert len(pseudo_labels(found, PseudoConfig(mask_quality_threshold=0.4))) == 2
    for bare in found:  # a teacher without such an estimate
        del bare["mask_quality"]
    assert len(pseudo_labels(found, PseudoConfig())) == 2


def test_ids_are_never_merged_across_classes():
    """The released ADE20K painter numbers instances from 1 in each class: the first ones of two classes become one."""
    found = [instance(label, 0.9 - 0.1 * k, 4 * k, 4 * k + 4) for k, label in enumerate((0, 0, 3, 3, 7))]
    for painting in (True, False):
        labels = pseudo_labels(found, PseudoConfig(non_overlapping=painting))
        assert [(i["label"], columns(i)) for i in labels] == [
            (label, list(range(4 * k, 4 * k + 4))) for k, label in enumerate((0, 0, 3, 3, 7))
        ]


def test_the_minimum_area_holds_without_painting_too():
    found = [instance(0, 0.9, 0, 1), instance(1, 0.8, 0, 2)]  # 10 and 20 pixels
    for painting in (True, False):
        config = PseudoConfig(min_area_px=12, non_overlapping=painting)
        assert [i["label"] for i in pseudo_labels(found, config)] == [1]


def test_low_scores_are_dropped_and_the_limit_keeps_the_best():
    found = [instance(0, 0.3, 0, 4), instance(0, 0.31, 4, 8), instance(1, 0.8, 8, 12), instance(2, 0.6, 12, 16)]
    config = PseudoConfig(score_threshold=0.3, max_per_image=2)
    assert [i["score"] for i in pseudo_labels(found, config)] == [0.8, 0.6]
    assert len(pseudo_labels(found, PseudoConfig(score_threshold=0.3))) == 3


def test_a_sliver_is_dropped_and_leaves_its_pixels_free():
    found = [instance(0, 0.9, 0, 10), instance(1, 0.8, 0, 11), instance(2, 0.7, 10, 14)]
    labels = pseudo_labels(found, PseudoConfig(min_area_px=12))
    assert [i["label"] for i in labels] == [0, 2]
    assert columns(labels[1]) == [10, 11, 12, 13]


def test_a_mask_with_two_classes_keeps_the_better_with_and_without_painting():
    found = [instance(0, 0.5, 0, 10), instance(1, 0.8, 0, 10), instance(2, 0.4, 5, 12)]
    for painting in (True, False):
        labels = pseudo_labels(found, PseudoConfig(non_overlapping=painting))
        assert [i["label"] for i in labels] == [1, 2]
        assert columns(labels[1]) == list(range(10 if painting else 5, 12))


def test_what_others_left_over_of_a_mask_is_no_label_where_its_share_is_asked_for():
    """A near-duplicate (IoU .9) of a better label would become a sliver of 12 pixels beside it."""
    found = [instance(0, 0.9, 0, 12), instance(0, 0.8, 0, 14), instance(1, 0.7, 8, 20)]
    shares = [round(i["visible_share"], 4) for i in pseudo_labels(found, PseudoConfig())]
    assert shares == [1.0, round(2 / 14, 4), round(6 / 12, 4)]
    labels = pseudo_labels(found, PseudoConfig(min_visible_share=0.5))
    assert [i["label"] for i in labels] == [0, 1]
    assert columns(labels[1]) == list(range(12, 20))  # the pixels of the dropped one are free for those behind it
    assert [i["label"] for i in pseudo_labels(found, PseudoConfig(min_visible_share=0.7))] == [0]
    whole = pseudo_labels(found, PseudoConfig(min_visible_share=0.5, non_overlapping=False))
    assert [i["visible_share"] for i in whole] == [1.0] * 3  # nothing is painted over


def test_masks_that_overlap_a_better_one_of_their_class_are_suppressed_before_painting():
    found = [instance(0, 0.7, 0, 14), instance(0, 0.9, 0, 12), instance(1, 0.8, 0, 13), instance(0, 0.6, 12, 20)]
    labels = pseudo_labels(found, PseudoConfig(nms_iou=0.7, min_area_px=1, order="detector"))
    assert [(i["label"], i["score"], i["num_suppressed"]) for i in labels] == [(0, 0.9, 1), (1, 0.8, 0), (0, 0.6, 0)]
    assert len(pseudo_labels(found, PseudoConfig(nms_iou=0.9, min_area_px=1))) == 4  # IoU of the first two: 12 / 14
    alone = pseudo_labels(found, PseudoConfig(nms_iou=0.7, min_area_px=1, score_threshold=0.75))
    assert [i["num_suppressed"] for i in alone] == [0, 0]  # what is not trusted counts nowhere


def paint_slowly(found: list[Instance], config: PseudoConfig) -> list[tuple[int, float, list[tuple[int, int]]]]:
    """The labelling rule pixel by pixel: (label, score, pixels) of each label."""

    def pixels(one: Instance) -> set[tuple[int, int]]:
        mask = coco_mask.decode({"size": one["size"], "counts": one["rle"]})
        return {(int(y), int(x)) for y, x in zip(*np.nonzero(mask))}

    left = [i for i in found if i["score"] > config.score_threshold]
    if config.nms_iou < 1:
        stay: list[Instance] = []
        for one in sorted(left, key=lambda i: -i["score"]):
            mine = pixels(one)
            rivals = [pixels(other) for other in stay if other["label"] == one["label"]]
            if all(len(mine & other) < config.nms_iou * len(mine | other) for other in rivals):
                stay.append(one)
        left = [one for one in left if any(one is other for other in stay)]
    if config.order == "score":
        left = sorted(left, key=lambda i: -i["score"])
    taken: set[tuple[int, int]] = set()
    labels = []
    for one in left:
        mine = pixels(one)
        visible = mine - taken
        big_enough = len(visible) >= max(1, config.min_area_px)
        if big_enough and len(visible) / len(mine) >= config.min_visible_share and len(labels) < config.max_per_image:
            taken |= visible
            labels.append((one["label"], one["score"], sorted(visible)))
    return labels


@pytest.mark.parametrize("order", ["score", "detector"])
@pytest.mark.parametrize(("share", "iou"), [(0.0, 1.0), (0.5, 1.0), (0.0, 0.6), (0.5, 0.6), (1.0, 0.3)])
def test_labels_are_those_of_painting_pixel_by_pixel(order: Any, share: float, iou: float):
    rng = np.random.default_rng(7)
    config = PseudoConfig(order=order, min_visible_share=share, nms_iou=iou, max_per_image=8, score_threshold=0.2)
    for _ in range(20):
        found: list[Instance] = []
        for _ in range(14):
            left, top = rng.integers(0, 14), rng.integers(0, 6)
            mask = np.zeros((10, 20), np.uint8)
            mask[top : top + rng.integers(3, 6), left : left + rng.integers(3, 8)] = 1
            rle = coco_mask.encode(np.asfortranarray(mask))["counts"]
            found.append({"label": int(rng.integers(2)), "score": float(rng.random()), "rle": rle, "size": [10, 20]})
        labels = pseudo_labels(found, config)
        painted = [coco_mask.decode({"size": i["size"], "counts": i["rle"]}) for i in labels]
        pixels = [[(int(y), int(x)) for y, x in zip(*np.nonzero(mask))] for mask in painted]
        assert [(i["label"], i["score"], p) for i, p in zip(labels, pixels)] == paint_slowly(found, config)


def test_the_expert_teacher_predicts_at_image_size_without_training_state():
    config = ModelConfig(
        encoder=EncoderConfig(name="conv", widths=(8, 8, 8, 8), stem_stride=2),
        hidden_dim=16,
        num_queries=4,
        num_layers=1,
    )
    teacher = ExpertTeacher(build_segmenter(config, 3, 0).train(), [Category(i, str(i)) for i in range(3)], (32, 32))
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    found = teacher.predict(images, [(64, 48), (32, 32)], [(32, 24), (32, 32)], 6)
    assert not teacher.segmenter.training
    assert len(found) == 2 and all(0 < len(f) <= 6 for f in found)
    assert {tuple(i["size"]) for i in found[0]} == {(64, 48)}
    alone = teacher.predict(images[1:], max_detections=6)[0]
    assert [i["rle"] for i in found[1]] == [i["rle"] for i in alone]
    assert isinstance(pseudo_labels(found[0], PseudoConfig(score_threshold=0.0)), list)
