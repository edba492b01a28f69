"""The size at which models see whole images: the rule, batches of mixed sizes, and models that are saved with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cast_ray.contracts.records import Category, ClassMap
from cast_ray.data.batches import collate, join, pad_to_largest, to_batch
from cast_ray.data.views import fit_image, make_sample
from cast_ray.inference.predictor import Predictor
from cast_ray.models.postprocess import groups_of_equal_size, predict_in_groups
from cast_ray.models.segmenter import build_segmenter
from cast_ray.models.student import CONFIG, WEIGHTS, Student
from cast_ray.plan.graph import input_size_of, plan
from cast_ray.recipe import DataConfig, EncoderConfig, InputSize, ModelConfig, build_recipe
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.models import load_student, save_model

CATEGORIES = (Category(3, "disc"), Category(7, "square"))
VIT = ModelConfig(
    encoder=EncoderConfig(name="vit", widths=(8, 16, 32, 64), depths=(1, 1, 1, 1), stem_stride=2),
    hidden_dim=16,
    num_queries=5,
    num_layers=1,
    feedforward_dim=16,
    proposals=False,
)


@pytest.mark.parametrize(
    ("rule", "image", "inside", "padded"),
    [
        (InputSize("fit", (32, 64)), (100, 100), (32, 32), (32, 64)),
        (InputSize("fit", (64, 64)), (16, 32), (32, 64), (64, 64)),
        (InputSize("native"), (37, 51), (37, 51), (37, 51)),
        (InputSize((630, 2560)), (1260, 1680), (630, 840), (630, 840)),
        (InputSize((630, 2560)), (1680, 1260), (840, 630), (840, 630)),
        (InputSize((630, 2560)), (100, 1000), (256, 2560), (256, 2560)),  # the long side decides
        (InputSize((8, 8)), (1, 400), (1, 8), (1, 8)),
    ],
)
def test_the_rule_of_size(rule: InputSize, image: tuple[int, int], inside: Any, padded: Any) -> None:
    assert (rule.inside(*image), rule.padded(*image)) == (inside, padded)
    pixels, size = fit_image(np.full((*image, 3), 9, np.uint8), rule)
    assert (pixels.shape, size) == ((3, *padded), inside)
    assert (pixels[:, : inside[0], : inside[1]] == 9).all() and pixels.sum() == 27 * inside[0] * inside[1]
    assert InputSize.read(json.loads(json.dumps(rule.part()))) == rule


@pytest.mark.parametrize("field", ["train_resize", "inference_resize"])
@pytest.mark.parametrize("value", ["nativ", "[630]", "[0, 5]", "[9, 5]", "[1, 2, 3]", "7", "[1.5, 3]"])
def test_a_bad_size_is_one_line(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"^data\.{field}: expected fit, native or \[S, L\][^\n]*\(got .*\)$"):
        build_recipe("shapes", "smoke", {f"data.{field}": value})


def test_images_of_one_size_go_together_and_every_image_once() -> None:
    sizes = [(1, 2), (3, 4), (1, 2), (1, 2), (5, 6)]
    assert groups_of_equal_size(sizes) == [[0, 2, 3], [1], [4]]
    assert groups_of_equal_size(sizes, 2) == [[0, 2], [3], [1], [4]]
    assert groups_of_equal_size([]) == []


def test_an_images_instances_do_not_depend_on_the_images_beside_it() -> None:
    student = Student(build_segmenter(VIT, 2, 0), CATEGORIES, (32, 48), input_size=InputSize("native")).eval()
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (3, *size), dtype=np.uint8) for size in ((32, 48), (50, 30), (32, 48), (64, 64))]
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    together = predict_in_groups(student.predict, images, sizes, sizes, 5)
    for image, size, found in zip(images, sizes, together):
        (alone,) = predict_in_groups(student.predict, [image], [size], [size], 5)
        assert [i["label"] for i in found] == [i["label"] for i in alone] and found[0]["size"] == list(size)
        assert [i["score"] for i in found] == pytest.approx([i["score"] for i in alone], rel=1e-4)


@pytest.mark.parametrize("name", ["vit", "dinov2-s"])
def test_a_vit_takes_images_larger_than_its_crops(name: str) -> None:
    """Positions are interpolated: twice the image has four times the tokens, and the masks follow."""
    config = VIT.model_copy(update={"encoder": VIT.encoder.model_copy(update={"name": name})})
    segmenter = build_segmenter(config, 2, 0).eval()
    with torch.no_grad():
        for size in ((28, 56), (56, 112), (70, 42)):
            masks = segmenter(torch.zeros(1, 3, *size, dtype=torch.uint8)).mask_logits[-1]
            ratio = size[0] / masks.shape[-2], size[1] / masks.shape[-1]
            assert ratio[0] == pytest.approx(ratio[1], rel=0.1) and ratio[0] <= 4.5


@pytest.mark.parametrize("size", [InputSize("native"), InputSize((40, 200)), InputSize("fit", (32, 48))])
def test_a_student_is_saved_with_its_size(size: InputSize, tmp_path: Path) -> None:
    student = Student(build_segmenter(VIT, 2, 0), CATEGORIES, (32, 48), input_size=size).eval()
    student.save_pretrained(tmp_path)
    again = Student.from_pretrained(tmp_path)
    assert again.input_size == size and again.image_px == (32, 48)
    assert str(size) in (tmp_path / "README.md").read_text()
    assert str(size) in json.loads((tmp_path / CONFIG).read_text())["preprocessing"]["resize"]


def test_a_student_of_the_version_before_is_fitted_as_it_was(tmp_path: Path) -> None:
    files = Student(build_segmenter(VIT, 2, 0), CATEGORIES, (32, 48)).eval().files()
    config = json.loads(files[CONFIG])
    del config["input_size"]
    old = Student.from_files(json.dumps(config).encode(), files[WEIGHTS], "old")
    assert old.input_size == InputSize("fit", (32, 48))


def test_a_trained_student_predicts_at_its_recipes_size(tmp_path: Path) -> None:
    recipe = build_recipe("shapes", "smoke", {"data.inference_resize": "native", "data.image_px": "[32, 48]"})
    stage, store = plan(recipe, "0" * 64).roles["distill"], ArtifactStore(str(tmp_path / "storage"))
    save_model(store, stage, build_segmenter(VIT, 2, 0), CATEGORIES)
    store.commit(stage, {})
    student = load_student(store, stage.key)
    assert student.input_size == InputSize("native")
    seen: list[tuple[int, ...]] = []
    student.segmenter.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    Predictor(student, threshold=0, max_detections=5)._predict([np.zeros((50, 70, 3), np.uint8)] * 2)
    assert seen == [(2, 3, 50, 70)]


def test_a_student_of_another_size_is_another_artifact() -> None:
    """It is saved with its size, so that rows of different sizes cannot share the file."""
    fitted, native = (
        plan(build_recipe("shapes", "smoke", overrides), "0" * 64).roles
        for overrides in ({}, {"data.inference_resize": "native"})
    )
    assert fitted["distill"].fingerprint != native["distill"].fingerprint
    assert input_size_of(fitted["student"]) == input_size_of(fitted["distill"]) == InputSize("fit", (64, 64))
    assert input_size_of(native["student"]) == input_size_of(native["label-teacher"]) == InputSize("native")


def test_labels_are_made_one_by_one_where_sizes_differ() -> None:
    of = {key: build_recipe("shapes", "smoke", {"data.inference_resize": key}).label_batch for key in ("fit", "native")}
    assert of == {"fit": 8, "native": 1}
    assert build_recipe("shapes", "smoke", {"data.inference_resize": "native", "labels.batch": 4}).label_batch == 4


def test_whole_images_of_a_step_are_padded_to_the_largest() -> None:
    data = DataConfig(whole_images=True, train_resize="native", flip=False, color_jitter=0)
    rng, samples = np.random.default_rng(0), []
    for number, size in enumerate(((20, 30), (40, 10))):
        image = rng.integers(1, 256, (*size, 3), dtype=np.uint8)
        row = {"uri": "a.png", "height": size[0], "width": size[1], "instances": []}
        samples.append(make_sample(image, row, ClassMap(CATEGORIES), data, number, use_instances=True, truth=True))
        np.testing.assert_array_equal(samples[-1]["weak"], image.transpose(2, 0, 1))
    assert pad_to_largest(samples[:1])[0] is samples[0]
    batch = to_batch(join(collate(samples, 1)))
    assert batch.weak.shape == (2, 3, 40, 30)
    for b, (height, width), sample in zip(range(2), ((20, 30), (40, 10)), samples):
        assert batch.valid[b].sum() == height * width and batch.valid[b, :height, :width].all()
        np.testing.assert_array_equal(batch.weak[b, :, :height, :width].numpy(), sample["weak"])
        outside = ~batch.valid[b]
        assert not batch.weak[b][:, outside].any() and (batch.truth_class[b][outside] == -1).all()


def test_a_step_without_a_strong_view_stays_without_when_it_is_padded() -> None:
    data = DataConfig(whole_images=True, train_resize="native")
    samples = [
        make_sample(
            np.zeros((*size, 3), np.uint8),
            {"uri": "a.png", "height": size[0], "width": size[1], "instances": []},
            ClassMap(CATEGORIES),
            data,
            0,
            use_instances=True,
            truth=False,
            strong=False,
        )
        for size in ((20, 30), (40, 10))
    ]
    assert "strong" not in collate(samples, 1)
