"""One teacher asked several times about an image, mirrored and at several scales: what most answers agree on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from cast_ray.contracts.instance import Instance, Instances, SourcedInstance, rle_of
from cast_ray.contracts.soft_targets import BELIEFS
from cast_ray.recipe import PseudoConfig
from cast_ray.teachers.fusion import vote
from cast_ray.teachers.protocol import Teacher


def predict_by_vote(
    teacher: Teacher,
    images: torch.Tensor,
    image_hw: Sequence[tuple[int, int]],
    resized_hw: Sequence[tuple[int, int]],
    config: PseudoConfig,
) -> list[Instances]:
    """Instances of each image at its own size, from `vote_scales`, with `vote_flip` each of them mirrored too.

    The answers are fused by `fusion.vote`: of those of one class that overlap by at least `vote_iou`, the mask is the
    majority's by score, and the score their sum divided by the number of times that the teacher was asked. With one
    scale of 1 and no flip it is what the teacher predicts, of at least `score_threshold`.

    Args:
        images, image_hw, resized_hw: see `Teacher.predict`.
    """
    asked = list(product(config.vote_scales, (False, True) if config.vote_flip else (False,)))
    if asked == [(1.0, False)]:
        return teacher.predict(images, image_hw, resized_hw, min_score=config.score_threshold)
    pooled: list[list[SourcedInstance]] = [[] for _ in image_hw]
    for source, (scale, mirrored) in enumerate(asked):
        seen, sizes = _seen(images, resized_hw, scale, mirrored)
        for mine, found in zip(pooled, teacher.predict(seen, image_hw, sizes)):
            for instance in found:
                answer: SourcedInstance = {**instance, "source": source}
                for belief in BELIEFS:  # of one answer alone
                    answer.pop(belief, None)  # type: ignore[misc]
                if mirrored:
                    answer["rle"] = _mirrored(instance)
                mine.append(answer)
    return [vote(instances, config.vote_iou, len(asked)) for instances in pooled]


def _seen(
    images: torch.Tensor, resized_hw: Sequence[tuple[int, int]], scale: float, mirrored: bool
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """The images at a scale, each mirrored inside its padding, and their sizes inside it."""
    height, width = (max(1, round(side * scale)) for side in images.shape[-2:])
    sizes = [(min(height, max(1, round(h * scale))), min(width, max(1, round(w * scale)))) for h, w in resized_hw]
    seen = images.new_zeros((len(images), images.shape[1], height, width))
    for canvas, image, before, (h, w) in zip(seen, images, resized_hw, sizes):
        content = image[:, : before[0], : before[1]]
        if (h, w) != tuple(before):
            content = F.interpolate(content[None].float(), (h, w), mode="bilinear", antialias=True)[0].round()
        canvas[:, :h, :w] = (content.flip(-1) if mirrored else content).to(canvas.dtype)
    return seen, sizes


def _mirrored(instance: Instance) -> bytes:
    mask_HW = coco_mask.decode(rle_of(instance))
    return coco_mask.encode(np.asfortranarray(mask_HW[:, ::-1]))["counts"]
