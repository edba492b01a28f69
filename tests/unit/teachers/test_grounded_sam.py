"""Text-prompted detector and box-prompted segmenter: equal to transformers' parts, trained, saved, reloaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from teacher_scenes import CATEGORIES, CONTRAST, CROP, changed, random_images, run_steps
from tiny_checkpoints import write_detector, write_sam2
from training_scenes import make_batch
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, Sam2Model, Sam2VideoConfig, Sam2VideoModel

from cast_ray.contracts.instance import rle_of
from cast_ray.contracts.records import Category
from cast_ray.engine.optim import build_optimizer
from cast_ray.models.postprocess import encode_masks
from cast_ray.recipe import ContrastiveConfig, TeacherConfig, TrainConfig
from cast_ray.teachers import grounded_sam
from cast_ray.teachers.grounded_sam import DETECTOR, SEGMENTER, GroundedSamTeacher, box_maps
from cast_ray.teachers.protocol import load_teacher, save_teacher


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("checkpoints")
    words = ("person", "traffic", "light")
    write_detector(home / "gd", "gd", words)
    return {DETECTOR: write_detector(home / "mm", "mm", words), SEGMENTER: write_sam2(home / "sam2"), "gd": home / "gd"}


def make_teacher(folders: dict[str, Path], **changes: Any) -> GroundedSamTeacher:
    config = TeacherConfig(**{"kind": "grounded_sam", "inference": {"score_threshold": 0.0}, **changes})
    return GroundedSamTeacher.load(folders, config, CATEGORIES, CROP).eval()  # type: ignore[return-value]


@pytest.fixture(scope="module")
def teacher(folders: dict[str, Path]) -> GroundedSamTeacher:
    return make_teacher(folders)


@pytest.mark.parametrize("kind", [DETECTOR, "gd"])
def test_the_detector_scores_as_transformers_does(folders: dict[str, Path], kind: str) -> None:
    teacher = make_teacher({**folders, DETECTOR: folders[kind]})
    images = list(random_images())
    processor = AutoProcessor.from_pretrained(folders[kind])
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folders[kind]).eval()
    inputs = processor(images=images, text=[["person", "traffic light", "dog"]] * 2, return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
        found = teacher.detector.detect(images, teacher.prompts(), 3, 0.0, 60)
    token = out.logits.sigmoid()  # [CLS] person . traffic light . d ##o ##g . [SEP]
    scores = torch.stack([token[..., 1], token[..., 3:5].mean(-1), token[..., 6:9].mean(-1)], -1)
    for boxes, theirs in zip(found, scores):
        torch.testing.assert_close(boxes.scores, theirs.flatten().sort(descending=True).values, rtol=1e-4, atol=1e-6)
    best = scores[0, :, 0].argmax()
    mine = found[0].corners[(found[0].labels == 0).nonzero()[0, 0]]
    centre, size = out.pred_boxes[0, best].split(2)
    torch.testing.assert_close(
        mine, torch.cat([centre - size / 2, centre + size / 2]).clamp(0, 1), rtol=1e-4, atol=1e-5
    )


def test_the_segmenter_masks_as_transformers_does(folders: dict[str, Path], teacher: GroundedSamTeacher) -> None:
    images = list(random_images(2, (40, 56)))
    processor, model = AutoProcessor.from_pretrained(folders[SEGMENTER]), Sam2Model.from_pretrained(folders[SEGMENTER])
    boxes = [[[4.0, 5.0, 30.0, 35.0], [0.0, 0.0, 56.0, 40.0]], [[10.0, 10.0, 20.0, 38.0], [1.0, 2.0, 9.0, 9.0]]]
    inputs = processor(images=images, input_boxes=boxes, return_tensors="pt")
    with torch.no_grad():
        out = model.eval()(**{k: v for k, v in inputs.items() if k != "original_sizes"}, multimask_output=False)
        corners = torch.tensor(boxes).flatten(0, 1) / torch.tensor([56.0, 40.0, 56.0, 40.0])
        embeddings = teacher.segmenter.embed(images)
        masks, ious = teacher.segmenter.masks_in_parts(embeddings, torch.tensor([0, 0, 1, 1]), corners, 3)
    # transformers' processor rounds the resized image to whole pixel values
    torch.testing.assert_close(masks, out.pred_masks.flatten(0, 2), rtol=0, atol=5e-3)
    torch.testing.assert_close(ious, out.iou_scores.flatten(), rtol=0, atol=1e-3)


def test_a_sam2_video_checkpoint_loads(folders: dict[str, Path], teacher: GroundedSamTeacher, tmp_path: Path) -> None:
    settings = teacher.segmenter.model.config.to_dict()
    parts = {k: settings[k] for k in ("vision_config", "prompt_encoder_config", "mask_decoder_config")}
    video = Sam2VideoModel(Sam2VideoConfig(**parts, image_size=64))
    video.load_state_dict(teacher.segmenter.model.state_dict(), strict=False)
    video.save_pretrained(tmp_path)
    teacher.segmenter.processor.save_pretrained(tmp_path)
    other = make_teacher({**folders, SEGMENTER: tmp_path})
    for name, tensor in teacher.segmenter.model.state_dict().items():
        assert torch.equal(tensor, other.segmenter.model.state_dict()[name]), name


def test_instances_are_at_the_images_own_size(teacher: GroundedSamTeacher) -> None:
    sizes, resized = [(96, 128), (30, 20)], [(48, 64), (48, 32)]
    found = teacher.predict(random_images(), sizes, resized, 15)
    for instances, size in zip(found, sizes):
        assert 0 < len(instances) <= 15
        scores = [i["score"] for i in instances]
        assert scores == sorted(scores, reverse=True) and all(0 <= s <= 1 for s in scores)
        for i in instances:
            assert coco_mask.decode({"size": i["size"], "counts": i["rle"]}).shape == size == tuple(i["size"])
            assert i["label"] in (0, 1, 2) and 0 <= i["mask_quality"] <= 1
            x0, y0, x1, y1 = i["box"]
            assert 0 <= x0 <= x1 <= size[1] and 0 <= y0 <= y1 <= size[0]


def test_padding_batches_and_chunks_change_nothing(folders: dict[str, Path], teacher: GroundedSamTeacher) -> None:
    sizes = [(48, 64), (40, 30)]
    images = random_images()
    images[1, :, :, 40:] = 0
    together = teacher.predict(images, sizes, [(48, 64), (48, 40)], 10)
    other = make_teacher(folders, inference={"score_threshold": 0.0, "boxes_at_a_time": 1})
    alone = [
        *other.predict(images[:1], sizes[:1], None, 10),
        *other.predict(images[1:, :, :, :40], sizes[1:], None, 10),
    ]
    for a, b in zip(together, alone):
        assert [i["label"] for i in a] == [i["label"] for i in b]
        np.testing.assert_allclose([i["score"] for i in a], [i["score"] for i in b], rtol=1e-4)
        same = [coco_mask.iou([rle_of(x)], [rle_of(y)], [0])[0, 0] for x, y in zip(a, b)]
        assert np.mean(same) > 0.95


def test_the_score_ranks_as_asked(folders: dict[str, Path], teacher: GroundedSamTeacher) -> None:
    images = random_images(1)
    by_box = {i["rle"] + bytes([i["label"]]): i for i in teacher.predict(images)[0]}
    for rank_by in ("segmenter", "product"):
        other = make_teacher(folders, inference={"score_threshold": 0.0, "rank_by": rank_by})
        for i in other.predict(images)[0]:
            before = by_box[i["rle"] + bytes([i["label"]])]
            wanted = i["mask_quality"] * (before["score"] if rank_by == "product" else 1)
            assert i["score"] == pytest.approx(wanted, rel=1e-5)


def test_the_threshold_is_the_detectors(folders: dict[str, Path], teacher: GroundedSamTeacher) -> None:
    scores = [i["score"] for i in teacher.predict(random_images(1))[0]]
    middle = float(np.median(scores))
    strict = make_teacher(folders, inference={"score_threshold": middle})
    assert len(strict.predict(random_images(1))[0]) == sum(s > middle for s in scores)
    nothing = make_teacher(folders, inference={"score_threshold": 1.0})
    assert nothing.predict(random_images(2)) == [[], []]


@pytest.mark.parametrize("rank_by", ["detector", "segmenter", "product"])
def test_a_least_score_leaves_out_what_lies_below_it(
    folders: dict[str, Path], rank_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def counted(masks: torch.Tensor, *arguments: Any) -> Any:
        made.append(len(masks))
        return encode_masks(masks, *arguments)

    monkeypatch.setattr(grounded_sam, "encode_masks", counted)
    teacher = make_teacher(folders, inference={"score_threshold": 0.0, "rank_by": rank_by})
    everything = teacher.predict(random_images())
    least = float(np.median([i["score"] for found in everything for i in found]))
    kept = [[i for i in found if i["score"] >= least] for found in everything]
    assert teacher.predict(random_images(), min_score=least) == kept
    assert sum(made[2:]) < sum(made[:2])
    assert teacher.predict(random_images(), min_score=1.1) == [[], []]


def test_several_prompts_share_one_look_at_the_image(folders: dict[str, Path], teacher: GroundedSamTeacher) -> None:
    split = make_teacher(folders, prompt={"max_tokens": 9})
    assert len(split.prompts()) == 2
    calls = []
    split.detector.model.model.backbone.conv_encoder.register_forward_hook(lambda *_: calls.append(1))
    found = split.predict(random_images(), max_detections=60)
    assert len(calls) == 1
    assert {i["label"] for i in found[0]} == {0, 1, 2}
    # a class alone in its prompt scores there as if nothing else had been asked for
    alone = GroundedSamTeacher.load(folders, split.config, CATEGORIES[2:], CROP)
    only = [i["score"] for i in alone.predict(random_images(), max_detections=60)[0]]
    both = [i["score"] for i in found[0] if i["label"] == 2]
    np.testing.assert_allclose(only[: len(both)], both, rtol=1e-4)


@pytest.mark.parametrize("contrastive", [None, CONTRAST, CONTRAST.model_copy(update={"strong_grad": False})])
def test_the_loss_falls_on_a_fixed_batch(folders: dict[str, Path], contrastive: ContrastiveConfig | None) -> None:
    losses = run_steps(make_teacher(folders), contrastive, steps=40)
    assert np.isfinite(losses).all() and losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("section", "contrastive"),
    [({}, CONTRAST), ({"train_segmenter": False}, CONTRAST), ({"train_detector": False}, None)],
)
def test_only_what_is_trained_changes(folders: dict[str, Path], section: dict[str, Any], contrastive: Any) -> None:
    teacher = make_teacher(folders, grounded_sam=section)
    before = copy.deepcopy(teacher.state_dict())
    run_steps(teacher, contrastive, steps=2)
    names = changed(before, teacher.state_dict())
    assert not any("text_backbone" in n or "vision_encoder" in n for n in names)
    assert any(n.startswith("detector") for n in names) == section.get("train_detector", True)
    assert any(n.startswith("segmenter.model.mask_decoder") for n in names) == section.get("train_segmenter", True)
    if section.get("train_detector", True):  # also what transformers' own loss leaves without a gradient
        assert any("encoder_output_bbox_embed" in n for n in names) and any("conv_encoder" in n for n in names)


def test_contrast_by_boxes_needs_no_segmenter(folders: dict[str, Path]) -> None:
    teacher = make_teacher(folders, grounded_sam={"train_segmenter": False, "contrast_masks": "boxes"})
    teacher.segmenter.model.vision_encoder.register_forward_hook(lambda *_: pytest.fail("the segmenter was run"))
    losses = run_steps(teacher, CONTRAST, steps=10)
    assert np.isfinite(losses).all()


def test_each_part_has_its_rate_and_its_clipping(folders: dict[str, Path]) -> None:
    teacher = make_teacher(folders)
    network, _ = teacher.for_training(CONTRAST)
    optimizer = build_optimizer(network, TrainConfig(lr=5e-5, encoder_lr_factor=0.1))
    rate = {id(p): g["base_lr"] for g in optimizer.param_groups for p in g["params"]}
    model = teacher.detector.model
    assert rate[id(next(model.model.backbone.parameters()))] == pytest.approx(5e-6)
    assert rate[id(model.model.decoder.layers[0].fc1.weight)] == pytest.approx(5e-5)
    assert rate[id(teacher.segmenter.model.mask_decoder.iou_token.weight)] == pytest.approx(5e-6)
    assert not {id(p) for p in model.model.text_backbone.parameters()} & rate.keys()
    detector, segmenter = network.clip_groups()
    assert {id(p) for p in segmenter} == {id(p) for p in teacher.segmenter.parameters()}
    assert {id(p) for p in detector} | {id(p) for p in segmenter} == {id(p) for p in network.parameters()}


def test_a_step_asks_for_the_classes_of_its_images_where_not_all_fit(folders: dict[str, Path]) -> None:
    categories = [Category(i, f"person {letter}") for i, letter in enumerate("abcdefghij")]
    config = TeacherConfig(kind="grounded_sam", prompt={"max_tokens": 12})
    teacher = GroundedSamTeacher.load(folders, config, categories, CROP)
    network, terms = teacher.for_training(CONTRAST)
    batch = make_batch((2, 3), 2, seed=0)
    for target, labels in zip(batch.targets, ([9, 1], [4, 9, 1])):
        target.labels = torch.tensor(labels)
    output = network(batch.weak, batch.strong, batch.targets)
    asked = output.predictions.auxiliary["tokens"][0].any(-1).nonzero().flatten().tolist()
    assert asked == [1, 4, 9]
    for sums, counts in terms(output, batch.targets).values():
        assert sums.isfinite().all() and counts.tolist() == [2, 3]


def test_saved_and_reloaded_it_predicts_identically(folders: dict[str, Path], tmp_path: Path) -> None:
    teacher = make_teacher(folders, prompt={"synonyms": {"person": ["person", "man"]}})
    run_steps(teacher, CONTRAST, steps=2)
    save_teacher(teacher.eval(), tmp_path)
    again = load_teacher(tmp_path)
    assert isinstance(again, GroundedSamTeacher) and again.class_names == teacher.class_names
    assert again.predict(random_images()) == teacher.predict(random_images())
    # each half is a checkpoint of its own for transformers
    AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path / "detector")
    Sam2Model.from_pretrained(tmp_path / "segmenter")
    stricter = load_teacher(tmp_path, {"inference": {"score_threshold": 1.0}})
    assert stricter.predict(random_images(1)) == [[]]


def test_training_in_half_precision_is_finite(folders: dict[str, Path]) -> None:
    teacher = make_teacher(folders)
    network, terms = teacher.for_training(CONTRAST)
    batch = make_batch((2, 3), 1, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(batch.weak, batch.strong, batch.targets)
    assert all(sums.isfinite().all() for sums, _ in terms(output, batch.targets).values())
    teacher.eval().precision = "bf16"
    assert len(teacher.predict(random_images(1))[0]) > 0


def test_boxes_as_masks() -> None:
    maps = box_maps(torch.tensor([[0.25, 0.5, 0.75, 1.0]]), (4, 4))
    assert (maps[0] > 0).int().tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]
