"""Published segmentation models as students: their own logits, training, saving, and checkpoints that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools import mask as coco_mask
from safetensors.torch import load_file, save_file
from tiny_checkpoints import PUBLISHED_SETTINGS, write_mask_transformer
from training_scenes import LOSS, SIZE, make_batch
from transformers import AutoModelForUniversalSegmentation, EomtImageProcessor, Mask2FormerImageProcessor

from cast_ray.contracts.records import Category
from cast_ray.engine.loop import RunSettings, train
from cast_ray.engine.objective import Objective
from cast_ray.engine.world import World
from cast_ray.evaluation.efficiency import count_parameters
from cast_ray.models.cast_network import CastNetwork
from cast_ray.models.export import INPUTS, OUTPUTS, Detector
from cast_ray.models.published import KINDS, check_start, load_start
from cast_ray.models.segmenter import Segmenter, build_segmenter, outline
from cast_ray.models.student import Student
from cast_ray.recipe import ContrastiveConfig, ModelConfig, TeacherConfig, TrainConfig, build_recipe
from cast_ray.recipe.models import PUBLISHED_SEGMENTERS, STUDENT_PRESETS

CATEGORIES = [Category(10 * i, name) for i, name in enumerate("abc")]
LABELS = ("person", "sky", "dog", "traffic light", "bus")
CONTRAST = ContrastiveConfig(num_negatives=4, num_anchors=8, pool_size=16, projection_dims=(8,), feature_stride=16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("published")
    return {kind: write_mask_transformer(home / kind, kind, LABELS) for kind in KINDS}


def settings(kind: str, folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(**PUBLISHED_SETTINGS[kind] | {"checkpoint": str(folder)} | changes)


def images(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_model_is_taken_but_for_the_class_head(folders: dict[str, Path], kind: str) -> None:
    theirs = AutoModelForUniversalSegmentation.from_pretrained(folders[kind]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # so that no initial value hides a weight that was left out
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    shaken = folders[kind].parent / f"{kind}-shaken"
    theirs.save_pretrained(shaken)
    config = settings(kind, shaken)
    ours = build_segmenter(config, len(CATEGORIES), seed=0).eval()
    assert ours.head.class_head.out_features == len(CATEGORIES) + 1
    pixels = images()
    with torch.no_grad():
        out, wanted = ours(pixels), theirs(pixel_values=ours._normalised(pixels))
    torch.testing.assert_close(out.mask_logits[-1], wanted.masks_queries_logits, rtol=1e-4, atol=1e-4)
    assert out.mask_logits[-1].std() > 0.1  # not equal because both are flat
    # With their class head, their classes too.
    known = build_segmenter(config, len(LABELS), seed=0).eval()
    known.head.class_head.load_state_dict(theirs.class_predictor.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(known(pixels).class_logits[-1], wanted.class_queries_logits, rtol=1e-4, atol=1e-4)
    another = build_segmenter(config, len(CATEGORIES), seed=1)
    differ = {k for k, v in another.state_dict().items() if not torch.equal(v, ours.state_dict()[k])}
    assert differ == {"head.class_head.weight", "head.class_head.bias"} | {k for k in differ if "mask_token" in k}


def with_its_own_classes(kind: str, folder: Path, image_px: int) -> tuple[Student, Any, torch.Tensor]:
    """A student with the class head of its checkpoint, and what the checkpoint predicts for images of its size."""
    theirs = AutoModelForUniversalSegmentation.from_pretrained(folder).eval()
    segmenter = build_segmenter(settings(kind, folder), len(LABELS), seed=0).eval()
    segmenter.head.class_head.load_state_dict(theirs.class_predictor.state_dict())
    student = Student(segmenter, [Category(i, name) for i, name in enumerate(LABELS)], (image_px, image_px))
    pixels = images(image_px, image_px)
    return student, theirs(pixel_values=segmenter._normalised(pixels)), pixels


@torch.no_grad()
def test_instances_are_those_of_mask2formers_own_post_processing(folders: dict[str, Path]) -> None:
    side = 384  # at which theirs takes the masks, whatever the size of the image
    student, out, pixels = with_its_own_classes("mask2former", folders["mask2former"], side)
    num = out.class_queries_logits.shape[1]
    ready = Mask2FormerImageProcessor().post_process_instance_segmentation(
        out, threshold=0.0, target_sizes=[(side, side)] * 2, return_binary_maps=True
    )
    for found, wanted in zip(student.predict(pixels, max_detections=num), ready):
        order = sorted(range(len(found)), key=lambda k: -wanted["segments_info"][k]["score"])
        assert len(found) == len(wanted["segments_info"]) > 3
        for instance, k in zip(found, order):
            info, mask = wanted["segments_info"][k], wanted["segmentation"][k].numpy()
            assert instance["score"] == pytest.approx(info["score"], abs=1e-4)
            assert instance["label"] == info["label_id"]
            mine = coco_mask.decode({"size": instance["size"], "counts": instance["rle"]})
            assert (mine != mask).mean() < 1e-3


@pytest.mark.parametrize("kind", ["eomt", "eomt_dinov3"])
@torch.no_grad()
def test_instances_are_those_of_eomts_own_post_processing(folders: dict[str, Path], kind: str) -> None:
    student, out, pixels = with_its_own_classes(kind, folders[kind], 64)
    num = out.class_queries_logits.shape[1]
    processor = EomtImageProcessor(size={"shortest_edge": 64, "longest_edge": 64})
    ready = processor.post_process_instance_segmentation(out, target_sizes=[(64, 64)] * 2, threshold=0.0)
    for found, wanted in zip(student.predict(pixels, max_detections=num * len(LABELS)), ready):
        assert len(wanted["segments_info"]) > 3
        mine = [(instance["label"], instance["score"]) for instance in found]
        for info in wanted["segments_info"]:  # of each query the best class; ours has every class of each
            assert any(c == info["label_id"] and abs(score - info["score"]) < 1e-4 for c, score in mine)


@pytest.mark.parametrize("kind", KINDS)
def test_it_overfits_a_few_images_and_comes_back(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    hub = Path(shutil.copytree(folders[kind], tmp_path / "hub"))
    segmenter = build_segmenter(settings(kind, hub), len(CATEGORIES), seed=0)
    before = {k: v.clone() for k, v in segmenter.state_dict().items()}
    batch = make_batch((2, 3, 1, 2, 2, 3, 1, 2), num_labelled=4)
    loss = LOSS.model_copy(update={"lambda_semi": 1.0, "lambda_pxl": 0.05})
    config = TrainConfig(steps=40, lr=2e-3, ema=0, schedule="constant")
    result = train(
        CastNetwork(segmenter, CONTRAST),
        Objective(loss, CONTRAST, proposals=False),
        iter([batch] * 40),
        config,
        RunSettings("f", 0, World()),
    )
    losses = [entry["loss"] for entry in result.curve]
    assert losses[-1] < 0.7 * losses[0]
    moved = {k for k, v in segmenter.state_dict().items() if not torch.equal(v, before[k])}
    assert all(any(k.startswith(part) for k in moved) for part in ("encoder.", "head."))

    Student(segmenter, CATEGORIES, (SIZE, SIZE)).save_pretrained(tmp_path / "student")
    shutil.rmtree(hub)  # the folder of the student says it all
    again = Student.from_pretrained(tmp_path / "student")
    segmenter.eval()
    out, wanted = again(images(48, 80)), segmenter(images(48, 80))
    assert torch.equal(out.mask_logits[-1], wanted.mask_logits[-1])
    assert torch.equal(out.class_logits[-1], wanted.class_logits[-1])
    found = again.predict(images(48, 80))
    assert found == Student(segmenter, CATEGORIES, (SIZE, SIZE)).predict(images(48, 80)) and found[0]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_graph_that_is_exported_is_that_of_any_student(folders: dict[str, Path], kind: str) -> None:
    student = Student(build_segmenter(settings(kind, folders[kind]), 3, seed=0), CATEGORIES, (64, 64)).eval()
    size = torch.tensor([64, 64])
    out = dict(zip(OUTPUTS, Detector(student, 5)(**dict(zip(INPUTS, (images(), size, size))))))
    (mine, _) = student.predict(images(), max_detections=5)
    assert out["masks"].shape == (2, 5, 64, 64)
    seen = [score for score, mask in zip(out["scores"][0].tolist(), out["masks"][0]) if mask.any()]
    assert seen == pytest.approx([i["score"] for i in mine], abs=1e-4)


def test_settings_that_differ_are_named_before_any_weight_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    hub = Path(shutil.copytree(folders["mask2former"], tmp_path / "hub"))
    (hub / "model.safetensors").write_bytes(b"never read")
    wrong = settings("mask2former", hub, num_queries=7, decoder="fpn")
    for check in (check_start, load_start):
        with pytest.raises(ValueError, match=r"expected decoder=msdeform \(fpn\), num_queries=10 \(7\)$") as error:
            check(wrong)
        assert str(hub) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"expected encoder.name=.*swin-t.* \(resnet50\)$"):
        check_start(settings("mask2former", hub, encoder={"name": "resnet50"}))
    check_start(settings("mask2former", hub))
    with pytest.raises(ValueError, match="the weights cannot be loaded"):
        load_start(settings("mask2former", hub))


def test_what_is_no_whole_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^checkpoint: no folder '/nowhere/at all'"):
        check_start(settings("eomt", Path("/nowhere/at all")))
    with pytest.raises(ValueError, match=r"'hub': no published weights are known for encoder 'dinov2-s' with head"):
        check_start(settings("eomt", Path("hub"), encoder={"name": "dinov2-s"}))
    other = write_mask_transformer(tmp_path / "maskformer", "maskformer", LABELS)
    with pytest.raises(ValueError, match="holds a model of type 'maskformer': expected a whole segmentation model"):
        check_start(settings("eomt", other))
    hub = Path(shutil.copytree(folders["mask2former"], tmp_path / "hub"))
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(config | {"pre_norm": True}))
    with pytest.raises(ValueError, match=r"variant of mask2former is not supported: pre_norm=True \(expected False\)"):
        check_start(settings("mask2former", hub))
    hub = Path(shutil.copytree(folders["eomt"], tmp_path / "eomt"))
    Mask2FormerImageProcessor(image_mean=[0.5] * 3).save_pretrained(hub)
    with pytest.raises(ValueError, match=r"image_mean is \[0.5, 0.5, 0.5\]: expected \[0.485, 0.456, 0.406\]"):
        load_start(settings("eomt", hub))
    with pytest.raises(
        ValueError, match=r"teacher.checkpoint is 'x/y' and teacher.kind sam3: .*teacher.sam3.checkpoint"
    ):
        TeacherConfig(kind="sam3", checkpoint="x/y")


def test_the_weights_of_transformers_own_loss_may_be_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    hub = Path(shutil.copytree(folders["eomt_dinov3"], tmp_path / "hub"))
    weights = load_file(hub / "model.safetensors")
    assert weights.pop("criterion.empty_weight") is not None
    save_file(weights, hub / "model.safetensors", metadata={"format": "pt"})
    assert load_start(settings("eomt_dinov3", hub)).tensors
    del weights["query.weight"]
    save_file(weights, hub / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of its model: query.weight"):
        load_start(settings("eomt_dinov3", hub))


# Parameters of the published models, in 10^6, where they could be looked up; with the class head of their own classes.
PUBLISHED_PARAMETERS = {
    ("eomt-dinov3-s", 133): 23.4,  # LightlyTrain's documentation, panoptic segmentation on COCO
    ("eomt-dinov3-l", 133): 315.1,
}


@pytest.mark.parametrize(("name", "num_classes"), PUBLISHED_PARAMETERS)
def test_published_sizes(name: str, num_classes: int) -> None:
    model = outline(ModelConfig(**STUDENT_PRESETS[name]), num_classes)
    assert count_parameters(model) / 1e6 == pytest.approx(PUBLISHED_PARAMETERS[name, num_classes], rel=0.005)


def test_published_students_name_their_weights() -> None:
    for name in (n for n in STUDENT_PRESETS if n not in ("paper", "released")):
        recipe = build_recipe("cityscapes", "full", {"student": name})
        student = recipe.student
        assert student.source == PUBLISHED_SEGMENTERS[student.encoder.name, student.head]
        assert student.checkpoint == "hub" and student.encoder.source == ""
        assert isinstance(outline(student, 8), Segmenter) and student.without_weights().source == ""
    for own in ("", "models/mine"):
        student = build_recipe("shapes", "smoke", [f"student.checkpoint={own}", "student=eomt-l"]).student
        assert student.source == own and student.num_queries == 200
