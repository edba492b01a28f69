"""The Cityscapes preset at Cityscapes' own size: what training, evaluation and teachers see of 1024 x 2048 images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from dataset_folders import write_png
from torch import nn

from cast_ray.contracts.records import ClassMap, DatasetSplits, Predictions
from cast_ray.data import views
from cast_ray.data.reading.images import read_image
from cast_ray.data.reading.reader import load
from cast_ray.data.views import make_sample
from cast_ray.evaluation.detections import Detections, Truth
from cast_ray.evaluation.measures import match_images, metrics_of
from cast_ray.plan.graph import input_size_of, plan
from cast_ray.recipe import DataConfig, InputSize, ModelConfig, build_recipe
from cast_ray.runtime.data import pictures as picture_stream
from cast_ray.runtime.data.pictures import PICTURE_SCHEMA, Pictures
from cast_ray.runtime.worker.measuring import predict
from cast_ray.teachers.expert import ExpertTeacher

HEIGHT, WIDTH = 1024, 2048
STRIDE = 8
"""Of the perfect masks, in pixels of what the model is given."""
OBJECTS = {  # label of Cityscapes -> colour channel, top, left, height, width: a whole number of strides each
    "person": (24, 0, 160, 320, 24, 8),
    "car": (26, 1, 480, 640, 16, 16),
    "bicycle": (33, 2, 800, 1600, 24, 24),
}
RECIPE = build_recipe("cityscapes", "full")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetSplits:
    """Two training frames and one to validate, each with the three objects on black."""
    root: Path = tmp_path_factory.mktemp("cityscapes")
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    values = np.full((HEIGHT, WIDTH), 7, dtype=np.uint16)
    for label, channel, top, left, height, width in OBJECTS.values():
        pixels[top : top + height, left : left + width, channel] = 255
        values[top : top + height, left : left + width] = 1000 * label
    for split, city, count in (("train", "aachen", 2), ("val", "lindau", 1)):
        for i in range(count):
            frame = f"{city}/{city}_{i:06d}_000019"
            write_png(root / f"leftImg8bit/{split}/{frame}_leftImg8bit.png", pixels)
            write_png(root / f"gtFine/{split}/{frame}_gtFine_instanceIds.png", values)
    return load(DataConfig(format="cityscapes", root=str(root)))[0]


def test_crops_have_sixteen_scales_of_the_native_size() -> None:
    """Short side 512, 614.4, ..., 2048 px of an image of 1024, each as often: 480 draws, 30 of each expected."""
    rng = np.random.default_rng(0)
    scales = []
    for _ in range(480):
        g = views._random_geometry(HEIGHT, WIDTH, RECIPE.data, rng)
        assert g.canvas == (512, 1024)
        assert g.out_height >= 511 and g.out_width >= 1023  # no padding but what rounding to whole pixels leaves
        scales.append(g.out_height / g.height)
    found, counts = np.unique(np.round(scales, 1), return_counts=True)
    np.testing.assert_allclose(found, np.arange(5, 21) / 10)
    np.testing.assert_allclose(scales, np.round(scales, 1), rtol=5e-3)  # a window has whole pixels
    assert counts.min() >= 12 and counts.max() <= 54


def test_objects_in_crops_have_these_scales(dataset: DatasetSplits) -> None:
    row = dataset.train.to_pylist()[0]
    image, classes = read_image(row["uri"]), ClassMap(dataset.categories)
    seen = []
    for seed in range(60):
        sample = make_sample(image, row, classes, RECIPE.data, seed, use_instances=True, truth=False, strong=False)
        assert sample["weak"].shape == (3, 512, 1024)
        for mask, label in zip(sample["masks"], sample["labels"]):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            is_whole = rows[0] > 0 and rows[-1] < 511 and columns[0] > 0 and columns[-1] < 1023
            if is_whole and classes.names()[label] == "bicycle":  # 24 x 24 pixels
                seen.append(len(rows) / 24)
    assert len(seen) > 5 and min(seen) < 0.9 and max(seen) > 1.2
    assert all(min(abs(s - k / 10) for k in range(5, 21)) <= 1.5 / 24 for s in seen)


class PerfectMasks(nn.Module):
    """Knows the objects by their colours: mask logits of STRIDE whose sign changes at the objects' very edges."""

    def __init__(self) -> None:
        super().__init__()
        self.config = ModelConfig()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, images: torch.Tensor) -> Predictions:
        inside_BQHW = (images > 127).float()
        logits = 20 * (2 * F.avg_pool2d(inside_BQHW, STRIDE) - 1)
        labels = torch.tensor([0, 2, 7])  # person, car and bicycle of the eight classes
        classes = torch.full((len(images), 3, 9), -20.0)
        classes[:, torch.arange(3), labels] = 20.0
        return Predictions([classes], [logits], {}, {})


def measured(dataset: DatasetSplits, size: InputSize, metric: str) -> dict[str, Any]:
    """AP of perfect masks, by the very functions that evaluation runs."""
    rows = dataset.val.to_pylist()
    fitted = [picture_stream._fit_image(i, row, size) for i, row in enumerate(rows)]
    batch = Pictures.of(pa.Table.from_pylist(fitted, schema=PICTURE_SCHEMA))
    teacher = ExpertTeacher(PerfectMasks(), dataset.categories, size)  # type: ignore[arg-type]
    found = predict(teacher, batch.pixels, batch.image_hw, batch.resized_hw, 100, 4)
    assert [i["size"] for i in found[0]] == [[HEIGHT, WIDTH]] * len(found[0])
    classes, settings = ClassMap(dataset.categories), RECIPE.evaluation.model_copy(update={"metric": metric})
    truth = [Truth.of(row, classes) for row in rows]
    matches = match_images(truth, [Detections.of(f) for f in found], len(classes), settings)
    return metrics_of(matches, dataset.categories)


def ceiling(height: int, width: int, stride: int) -> float:
    """AP in percent of one object's perfect mask of a stride, whose pixels the object fills or leaves empty.

    Bilinear upsampling weighs the object's value at a pixel d strides inside its edge with .5 + d (at most 1), and with
    the product at a corner; where that is below a half the pixel is lost. The mask then passes every threshold up to
    its IoU.
    """
    near = np.minimum(0.5 + (np.arange(stride // 2) + 0.5) / stride, 1)
    lost = int((np.multiply.outer(near, near) < 0.5).sum())
    iou = 1 - 4 * lost / (height * width)
    return 100 * float(np.mean([iou >= threshold for threshold in np.arange(50, 100, 5) / 100]))


@pytest.mark.parametrize("metric", ["cityscapes", "coco"])
def test_perfect_masks_reach_the_ceiling_of_the_native_size(dataset: DatasetSplits, metric: str) -> None:
    native = measured(dataset, RECIPE.data.inference_size, metric)
    expected = {name: ceiling(height, width, STRIDE) for name, (*_, height, width) in OBJECTS.items()}
    assert expected == {"person": 80.0, "car": 90.0, "bicycle": 100.0}
    assert {name: native["per_class"][name] for name in expected} == pytest.approx(expected)
    assert native["mask_ap"] == pytest.approx(90)
    half = measured(dataset, InputSize("fit", (512, 1024)), metric)
    assert half["mask_ap"] < 65  # what evaluation at the crop's size would have cost


def test_evaluation_labels_and_prediction_are_native_and_the_crop_is_not() -> None:
    row = plan(RECIPE, "0" * 64, foundation="f" * 20)
    assert tuple(row.roles["distill"].config["data"]["image_px"]) == (512, 1024)
    for name, stage in row.roles.items():
        assert input_size_of(stage).resize == "native", name
        assert input_size_of(stage).padded(HEIGHT, WIDTH) == (HEIGHT, WIDTH)


def test_the_published_teacher_is_trained_on_whole_native_images(dataset: DatasetSplits) -> None:
    row = plan(RECIPE, "0" * 64, foundation="f" * 20)
    part = row.roles["adapt"].config["data"]
    data = DataConfig(**RECIPE.data.model_dump() | part)
    record = dataset.train.to_pylist()[0]
    image, classes = read_image(record["uri"]), ClassMap(dataset.categories)
    sample = make_sample(image, record, classes, data, 3, use_instances=True, truth=True)
    assert sample["weak"].shape == (3, HEIGHT, WIDTH) and sample["valid"].all()
    sizes = sorted((len(np.flatnonzero(m.any(1))), len(np.flatnonzero(m.any(0)))) for m in sample["masks"])
    assert sizes == sorted((height, width) for _, _, _, _, height, width in OBJECTS.values())
