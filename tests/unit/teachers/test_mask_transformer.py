"""Universal-segmentation checkpoints as teachers: labels, equal to transformers, trained, saved, reloaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teacher_scenes import CATEGORIES, CONTRAST, CROP, changed, random_images, run_steps
from tiny_checkpoints import write_mask_transformer
from transformers import AutoModelForUniversalSegmentation

from cast_ray.contracts.records import Category
from cast_ray.recipe import InputSize, PromptConfig, TeacherConfig
from cast_ray.teachers.mask_transformer import CHECKPOINT, MaskTransformerTeacher, match_labels
from cast_ray.teachers.protocol import load_teacher, save_teacher

KINDS = ("mask2former", "maskformer", "eomt", "eomt_dinov3")
PLAIN = ("eomt", "eomt_dinov3")
LABELS = ("person", "sky", "dog", "Traffic-Light")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("checkpoints")
    return {kind: write_mask_transformer(home / kind, kind, LABELS) for kind in KINDS}


def classes(*names: str) -> list[Category]:
    return [Category(number, name) for number, name in enumerate(names)]


def make_teacher(folder: Path, categories: Any = CATEGORIES, **changes: Any) -> MaskTransformerTeacher:
    config = TeacherConfig(kind="mask2former", **changes)
    return MaskTransformerTeacher.load({CHECKPOINT: folder}, config, categories, CROP).eval()  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS)
def test_predicts_what_the_checkpoint_does(folders: dict[str, Path], kind: str) -> None:
    teacher = make_teacher(folders[kind])
    images = random_images(2, (64, 64))
    model = AutoModelForUniversalSegmentation.from_pretrained(folders[kind]).eval()
    with torch.no_grad():
        out = model(pixel_values=(images.float() - teacher.segmenter.pixel_mean) / teacher.segmenter.pixel_std)
        mine = teacher.segmenter(images)
    theirs = out.class_queries_logits.softmax(-1)
    wanted = torch.stack([theirs[..., 0], theirs[..., 3], theirs[..., 2], theirs[..., 1] + theirs[..., 4]], -1)
    torch.testing.assert_close(mine.class_logits[-1].softmax(-1), wanted)
    torch.testing.assert_close(mine.mask_logits[-1], out.masks_queries_logits)
    assert len(mine.class_logits) == len(mine.mask_logits) == {"maskformer": 1}.get(kind, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_and_masks_cover_the_image_edge_to_edge(folders: dict[str, Path], kind: str) -> None:
    segmenter = make_teacher(folders[kind]).segmenter
    images = random_images(2, (48, 80))
    with torch.no_grad():
        out, encoded = segmenter(images), segmenter.encode(images)
    assert {s: x.shape[1] for s, x in out.features.items()} == segmenter.feature_dims
    for stride, features in out.features.items():
        torch.testing.assert_close(features, encoded[stride])
        if kind not in PLAIN:  # which see a square
            assert features.shape[-2:] == (max(1, round(48 / stride)), max(1, round(80 / stride)))
    if kind not in PLAIN:
        assert out.mask_logits[-1].shape[-2:] == (12, 20)


@pytest.mark.parametrize("kind", ["mask2former", "maskformer"])
def test_native_images_are_resized_once_by_the_checkpoints_own_processor(folders: dict[str, Path], kind: str) -> None:
    config = TeacherConfig(kind="mask2former")
    teacher = MaskTransformerTeacher.load({CHECKPOINT: folders[kind]}, config, CATEGORIES, InputSize("native")).eval()
    assert isinstance(teacher, MaskTransformerTeacher)
    images = random_images(1, (48, 80))
    wanted = teacher.segmenter.processor(images=list(images), return_tensors="pt")["pixel_values"]
    pixels = teacher.segmenter._pixels(images)
    assert pixels.shape == wanted.shape == (1, 3, 800, 1344)
    torch.testing.assert_close(pixels, wanted, rtol=0, atol=0.03)
    with torch.no_grad():
        assert teacher.segmenter(images).mask_logits[-1].shape[-2:] == (200, 336)
    (found,) = teacher.predict(images)
    assert all(i["size"] == [48, 80] for i in found)


@pytest.mark.parametrize("kind", KINDS)
def test_trains_saves_and_reloads(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    teacher = make_teacher(folders[kind])
    before = copy.deepcopy(teacher.state_dict())
    losses = run_steps(teacher, CONTRAST.model_copy(update={"feature_stride": 16}), steps=30)
    assert np.isfinite(losses).all() and losses[-1] < 0.8 * losses[0]
    names = changed(before, teacher.state_dict())
    assert any("embeddings" in n for n in names) and any("class_predictor" in n for n in names)
    save_teacher(teacher.eval(), tmp_path)
    assert load_teacher(tmp_path).predict(random_images()) == teacher.predict(random_images())


def test_the_backbone_has_its_own_rate(folders: dict[str, Path]) -> None:
    for kind in KINDS:
        segmenter = make_teacher(folders[kind]).segmenter
        inside = {id(p) for layer in segmenter.encoder_layers() for p in layer}
        names = {name for name, p in segmenter.named_parameters() if id(p) in inside}
        assert names and not any("class_predictor" in n or "decoder" in n for n in names)


def test_classes_find_their_labels_by_name_or_synonym() -> None:
    id2label = dict(enumerate(LABELS))
    config = PromptConfig(synonyms={"rider": ("person", "dog")})
    assert match_labels(id2label, classes("rider", "traffic light"), config) == [[0, 2], [3]]
    with pytest.raises(ValueError, match=r"no label for class 'persons': .*nearest: person"):
        match_labels(id2label, classes("persons"), PromptConfig())
    with pytest.raises(ValueError, match="'person' stands for both 'person' and 'rider'"):
        match_labels(id2label, classes("person", "rider"), config)


def test_classes_of_one_name_need_labels_of_their_own(folders: dict[str, Path], tmp_path: Path) -> None:
    dogs = [Category(0, "dog"), Category(7, "dog")]
    with pytest.raises(ValueError, match=r"'dog' stands for both 'dog \(id 0\)' and 'dog \(id 7\)'.*synonyms"):
        match_labels(dict(enumerate(LABELS)), dogs, PromptConfig())
    assert match_labels(dict(enumerate(LABELS)), dogs, PromptConfig(synonyms={"dog (id 7)": ("sky",)})) == [[2], [1]]
    # words that say the same twice are no second class
    assert match_labels({0: "dog"}, dogs[:1], PromptConfig(synonyms={"dog": ("dog", "Dog")})) == [[0]]
    new = [Category(0, "person"), Category(3, "unicorn"), Category(4, "unicorn")]
    teacher = make_teacher(folders["mask2former"], new, mask_transformer={"unknown_classes": "add"})
    assert teacher.segmenter.labels_of == [[0], [len(LABELS)], [len(LABELS) + 1]]
    save_teacher(teacher, tmp_path)
    assert load_teacher(tmp_path).segmenter.labels_of == teacher.segmenter.labels_of  # type: ignore[union-attr]


def test_a_class_without_a_label_gets_a_row_where_asked(folders: dict[str, Path], tmp_path: Path) -> None:
    categories = [Category(0, "person"), Category(1, "unicorn")]
    with pytest.raises(ValueError, match="no label for class 'unicorn'"):
        make_teacher(folders["mask2former"], categories)
    old = make_teacher(folders["mask2former"], categories[:1]).segmenter.model.class_predictor
    teacher = make_teacher(folders["mask2former"], categories, mask_transformer={"unknown_classes": "add"})
    head = teacher.segmenter.model.class_predictor
    assert head.out_features == old.out_features + 1
    assert torch.equal(head.weight[: len(LABELS)], old.weight[: len(LABELS)]) and torch.equal(
        head.weight[-1], old.weight[-1]
    )
    save_teacher(teacher, tmp_path)
    again = load_teacher(tmp_path)
    assert again.predict(random_images()) == teacher.predict(random_images())
