"""A teacher asked several times: mirrored answers lie where the image has them, and a vote fuses them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from cast_ray.contracts.instance import Instance, Instances, SourcedInstance
from cast_ray.contracts.records import Category
from cast_ray.models.segmenter import build_segmenter
from cast_ray.plan.graph import plan
from cast_ray.recipe import EncoderConfig, ModelConfig, PseudoConfig, build_recipe
from cast_ray.teachers.expert import ExpertTeacher
from cast_ray.teachers.fusion import vote
from cast_ray.teachers.protocol import Teacher
from cast_ray.teachers.voting import predict_by_vote

CATEGORIES = [Category(1, "bright")]


class Bright(Teacher):
    """Finds the bright pixels inside the padding as one instance, as an image of any size shows them."""

    kind = "bright"

    def __init__(self, score: float = 0.8):
        from cast_ray.recipe import TeacherConfig

        super().__init__(TeacherConfig(), CATEGORIES, (32, 48))
        self.score, self.seen = score, []
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def find(
        self, images: Any, image_hw: Any, resized_hw: Any, max_detections: int, min_score: float
    ) -> list[Instances]:
        self.seen.append((tuple(images.shape), [tuple(size) for size in resized_hw]))
        found = []
        for image, own, (h, w) in zip(images, image_hw, resized_hw):
            inside = image[:1, :h, :w].float()[None]
            whole = torch.nn.functional.interpolate(inside, tuple(own), mode="bilinear", antialias=True)[0, 0] > 127
            rle = coco_mask.encode(np.asfortranarray(whole.numpy().astype(np.uint8)))["counts"]
            instance: Instance = {"label": 0, "score": self.score, "rle": rle, "size": list(own), "mask_quality": 0.9}
            found.append([instance] if whole.any() else [])
        return found

    def save_weights(self, folder: Any) -> None:
        raise NotImplementedError

    @classmethod
    def load(cls, *_: Any) -> Teacher:
        raise NotImplementedError


def scene() -> tuple[torch.Tensor, list[tuple[int, int]], list[tuple[int, int]]]:
    """Two images in a frame of 32 x 48, the second with padding, each with a bright patch near its left edge."""
    images = torch.zeros((2, 3, 32, 48), dtype=torch.uint8)
    images[0, :, 4:20, 4:16] = 255
    images[1, :, 8:16, 0:12] = 255
    return images, [(64, 96), (32, 40)], [(32, 48), (32, 40)]


def dense(instance: Instance) -> np.ndarray:
    return coco_mask.decode({"size": instance["size"], "counts": instance["rle"]}).astype(bool)


def test_asked_once_it_is_what_the_teacher_predicts() -> None:
    images, own, inside = scene()
    assert predict_by_vote(Bright(), images, own, inside, PseudoConfig()) == Bright().predict(images, own, inside)


@pytest.mark.parametrize("scales", [(1.0,), (2.0,), (1.0, 1.5)])
@pytest.mark.parametrize("flip", [False, True])
def test_answers_lie_where_the_image_has_them(scales: tuple[float, ...], flip: bool) -> None:
    images, own, inside = scene()
    teacher = Bright()
    found = predict_by_vote(teacher, images, own, inside, PseudoConfig(vote_flip=flip, vote_scales=scales))
    once = Bright().predict(images, own, inside)
    for (mine,), (alone,) in zip(found, once):
        assert (dense(mine) ^ dense(alone)).sum() <= 0.12 * dense(alone).sum()
        assert mine["score"] == pytest.approx(0.8) and "source" not in mine  # all agree
    shapes = [shape[2:] for shape, _ in teacher.seen]
    assert shapes == [(round(32 * s), round(48 * s)) for s in scales for _ in range(1 + flip)]
    assert [sizes[1] for _, sizes in teacher.seen] == [
        (round(32 * s), round(40 * s)) for s in scales for _ in range(1 + flip)
    ]


def test_what_one_answer_alone_has_counts_for_less() -> None:
    class Fickle(Bright):
        def find(self, *arguments: Any) -> list[Instances]:
            found = super().find(*arguments)
            return found if len(self.seen) == 1 else [[] for _ in found]

    images, own, inside = scene()
    ((first,), _) = predict_by_vote(Fickle(), images, own, inside, PseudoConfig(vote_flip=True))
    assert first["score"] == pytest.approx(0.4)
    assert (dense(first) == dense(Bright().predict(images, own, inside)[0][0])).all()


def test_a_segmenters_votes_are_those_of_asking_by_hand() -> None:
    config = ModelConfig(
        encoder=EncoderConfig(name="conv", widths=(8, 8, 8, 8), stem_stride=2),
        hidden_dim=16,
        num_queries=4,
        num_layers=1,
    )
    teacher = ExpertTeacher(build_segmenter(config, 2, 0), [Category(i, str(i)) for i in range(2)], (32, 32))
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    sizes = [(32, 32)] * 2
    found = predict_by_vote(teacher, images, sizes, sizes, PseudoConfig(vote_flip=True, vote_iou=0.5))
    straight, mirrored = teacher.predict(images), teacher.predict(images.flip(-1))
    for mine, a, b in zip(found, straight, mirrored):
        back: Instances = [
            {**i, "rle": coco_mask.encode(np.asfortranarray(dense(i)[:, ::-1].astype(np.uint8)))["counts"]} for i in b
        ]
        answers: list[SourcedInstance] = [{**i, "source": 0} for i in a]
        answers += [{**i, "source": 1} for i in back]
        assert mine == vote(answers, 0.5, 2)


def test_votes_belong_to_the_labels_identity_only_where_there_are_any() -> None:
    def labels(**pseudo: Any) -> str:
        recipe = build_recipe("shapes", "smoke", {f"pseudo.{k}": v for k, v in pseudo.items()})
        return plan(recipe, "h").roles["label-adapted"].fingerprint

    assert labels() == labels(vote_iou=0.5) == labels(vote_scales="[1.0]")
    changes: list[dict[str, Any]] = [
        dict(vote_flip=True),
        dict(vote_flip=True, vote_iou=0.5),
        dict(vote_scales="[1, 2]"),
    ]
    assert len({labels(), *(labels(**change) for change in changes)}) == 4
    with pytest.raises(ValueError, match=r"pseudo\.vote_scales: expected different scales above 0"):
        labels(vote_scales="[1, 0]")


def test_a_vote_has_no_query_whose_beliefs_it_could_tell() -> None:
    images, own, inside = scene()

    class Sure(Bright):
        def find(self, *arguments: Any) -> list[Instances]:
            beliefs: Any = {"class_probs": [0.9, 0.1], "mask_probs": b""}
            return [[i | beliefs for i in found] for found in super().find(*arguments)]

    assert "class_probs" in predict_by_vote(Sure(), images, own, inside, PseudoConfig())[0][0]
    assert "class_probs" not in predict_by_vote(Sure(), images, own, inside, PseudoConfig(vote_flip=True))[0][0]
