"""On four real photographs a tiny teacher learns the annotations by heart, and a tiny student the teacher's labels."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from cast_ray.contracts.instance import Instance
from cast_ray.contracts.records import Batch, Category, Targets
from cast_ray.data.reading.images import read_image
from cast_ray.data.views import fit_image
from cast_ray.engine.loop import RunSettings, TrainResult, train
from cast_ray.engine.objective import Objective
from cast_ray.engine.world import World
from cast_ray.models.cast_network import CastNetwork
from cast_ray.models.segmenter import Segmenter, build_segmenter
from cast_ray.models.student import Student
from cast_ray.recipe import EncoderConfig, LossConfig, ModelConfig, PseudoConfig, TrainConfig
from cast_ray.teachers.expert import ExpertTeacher
from cast_ray.teachers.pseudo_labels import pseudo_labels

NUM_PHOTOS, SIZE = 4, (96, 96)
TEACHER = ModelConfig(
    encoder=EncoderConfig(name="conv", widths=(24, 48, 96, 192), depths=(1, 1, 2, 1), stem_stride=2),
    hidden_dim=64,
    num_queries=20,
    num_layers=3,
)
# The paper's kind of student: a plain ViT, DPT, learnt queries.
STUDENT = ModelConfig(
    encoder=EncoderConfig(name="vit", widths=(16, 32, 64, 128), depths=(1, 1, 2, 2), stem_stride=2),
    hidden_dim=48,
    num_queries=20,
    num_layers=3,
    proposals=False,
)
LOSS = LossConfig(num_points=576, lambda_semi=0)


@pytest.fixture(scope="module")
def photos(
    coco128: Path,
) -> tuple[torch.Tensor, list[tuple[int, int]], list[tuple[int, int]], list[Targets], list[Category]]:
    """Fitted pixels, sizes, sizes inside the padding, annotations and the classes that occur."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(coco128 / "instances.json"))
    annotations = {i: coco.loadAnns(coco.getAnnIds(i, iscrowd=False)) for i in sorted(coco.imgs)}
    large = {
        i: [a for a in found if a["area"] > 0.02 * coco.imgs[i]["height"] * coco.imgs[i]["width"]]
        for i, found in annotations.items()
    }
    chosen = [i for i, found in large.items() if 2 <= len(found) <= 4][:NUM_PHOTOS]
    used = sorted({a["category_id"] for i in chosen for a in large[i]})
    pixels, sizes, inside, targets = [], [], [], []
    for i in chosen:
        image = read_image(str(coco128 / "images" / coco.imgs[i]["file_name"]))
        fitted, size = fit_image(image, SIZE)
        masks = torch.from_numpy(np.stack([coco.annToMask(a) for a in large[i]])).float()
        shrunk = F.interpolate(masks[None], size=size, mode="area")[0] > 0.5
        padded = F.pad(shrunk, (0, SIZE[1] - size[1], 0, SIZE[0] - size[0]))
        labels = torch.tensor([used.index(a["category_id"]) for a in large[i]])
        pixels.append(torch.from_numpy(fitted))
        sizes.append(image.shape[:2])
        inside.append(size)
        targets.append(Targets(padded, labels, torch.ones(len(labels))))
    names = [Category(c, coco.cats[c]["name"]) for c in used]
    return torch.stack(pixels), sizes, inside, targets, names


def batch_of(pixels: torch.Tensor, inside: list[tuple[int, int]], targets: list[Targets]) -> Batch:
    valid = torch.zeros(len(pixels), *SIZE, dtype=torch.bool)
    for row, (height, width) in zip(valid, inside):
        row[:height, :width] = True
    unknown = torch.full((len(pixels), *SIZE), -1, dtype=torch.int16)
    return Batch(pixels, pixels, valid, targets, len(pixels), unknown, unknown)


def learn(config: ModelConfig, num_classes: int, batch: Batch, steps: int, lr: float) -> tuple[Segmenter, TrainResult]:
    network = CastNetwork(build_segmenter(config, num_classes, seed=0), None)
    result = train(
        network,
        Objective(LOSS, None, proposals=config.proposals),
        iter([batch] * steps),
        TrainConfig(steps=steps, lr=lr, ema=0.99, warmup_steps=20),
        RunSettings("f", 0, World()),
    )
    return network.segmenter.eval(), result


def share_found(wanted: Sequence[Sequence[Any]], found: Sequence[Sequence[Instance]], iou: float) -> float:
    """Share of the wanted instances that some found one of their class and a score above .5 overlaps by `iou`."""
    hits = []
    for labels, instances in zip(wanted, found):
        sure = [i for i in instances if i["score"] > 0.5]
        for label in labels:
            rivals = [{"size": i["size"], "counts": i["rle"]} for i in sure if i["label"] == label["label"]]
            own = [{"size": label["size"], "counts": label["rle"]}]
            hits.append(bool(rivals) and float(coco_mask.iou(rivals, own, [0]).max()) >= iou)
    assert hits
    return sum(hits) / len(hits)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_student_learns_a_teachers_labels_of_real_photos_by_heart(photos: Any, tmp_path: Path) -> None:
    pixels, sizes, inside, truth, categories = photos
    teacher, _ = learn(TEACHER, len(categories), batch_of(pixels, inside, truth), steps=300, lr=1e-3)
    predicted = ExpertTeacher(teacher, categories, SIZE).predict(pixels, sizes, inside)
    labels = [pseudo_labels(instances, PseudoConfig(score_threshold=0.5, min_area_px=1000)) for instances in predicted]
    annotated = [
        [
            {
                "label": int(c),
                "size": list(SIZE),
                "rle": coco_mask.encode(np.asfortranarray(m.numpy().astype(np.uint8)))["counts"],
            }
            for m, c in zip(t.masks, t.labels)
        ]
        for t in truth
    ]
    at_crop = ExpertTeacher(teacher, categories, SIZE).predict(pixels)
    assert share_found(annotated, at_crop, iou=0.5) >= 0.8  # the teacher knows the annotations
    assert min(len(found) for found in labels) >= 1

    targets = []
    for found, size in zip(labels, inside):
        masks = np.stack([coco_mask.decode({"size": i["size"], "counts": i["rle"]}) for i in found])
        shrunk = F.interpolate(torch.from_numpy(masks).float()[None], size=size, mode="area")[0] > 0.5
        padded = F.pad(shrunk, (0, SIZE[1] - size[1], 0, SIZE[0] - size[0]))
        targets.append(Targets(padded, torch.tensor([i["label"] for i in found]), torch.ones(len(found))))
    batch = batch_of(pixels, inside, targets)
    student, result = learn(STUDENT, len(categories), batch, steps=500, lr=1e-3)
    assert result.curve[-1]["loss"] < 0.2 * result.curve[0]["loss"]

    Student(student, categories, SIZE).save_pretrained(tmp_path)
    saved = Student.from_pretrained(tmp_path)
    answers = saved.predict(pixels, sizes, inside)
    assert share_found(labels, answers, iou=0.5) >= 0.8
    # Untrained, nothing of it is there.
    blank = Student(build_segmenter(STUDENT, len(categories), 0), categories, SIZE).eval()
    assert share_found(labels, blank.predict(pixels, sizes, inside), iou=0.5) < 0.2
