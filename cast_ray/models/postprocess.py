"""From query logits to instances at the image's own size."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from cast_ray.contracts.instance import Instance, Instances, Rle
from cast_ray.contracts.records import Predictions
from cast_ray.contracts.soft_targets import mask_probabilities

CHUNK_PIXELS = 1 << 24
"""Float pixels held at once while masks are brought to an image's size (64 MiB)."""


@torch.inference_mode()
def predict_instances(
    segmenter: Callable[[torch.Tensor], Predictions],
    images: torch.Tensor,
    image_hw: Sequence[tuple[int, int]] | None = None,
    resized_hw: Sequence[tuple[int, int]] | None = None,
    max_detections: int = 100,
    min_score: float = 0.0,
    soft: bool = False,
) -> list[Instances]:
    """Instances of each image at its own size.

    Args:
        segmenter: a segmenter in evaluation mode.
        images: uint8 [B, 3, H, W] on its device, resized and padded to one size.
        image_hw: B original sizes, pixels; None: as given.
        resized_hw: B sizes inside the padding, pixels; None: no padding.
        max_detections: most instances of an image.
        min_score: least score of an instance, see `to_instances`.
        soft: see `to_instances`.

    Returns:
        As `to_instances`.
    """
    crop = (images.shape[-2], images.shape[-1])
    given = [crop] * len(images)
    return to_instances(
        segmenter(images), image_hw or given, resized_hw or given, crop, max_detections, min_score, soft
    )


def groups_of_equal_size(sizes: Sequence[Hashable], limit: int | None = None) -> list[list[int]]:
    """Positions in groups of one size each, in the order in which the sizes come first.

    Images that pass through a model together must have one size; padding smaller ones would let an image's result
    depend on the images beside it.

    Args:
        sizes: heights and widths of the images, pixels.
        limit: most images of a group; None: no limit.
    """
    by_size: dict[Hashable, list[int]] = {}
    for position, size in enumerate(sizes):
        by_size.setdefault(size, []).append(position)
    step = limit or max(len(sizes), 1)
    return [group[start : start + step] for group in by_size.values() for start in range(0, len(group), step)]


def predict_in_groups(
    predict: Callable[..., list[Instances]],
    images: Sequence[np.ndarray],
    image_hw: Sequence[tuple[int, int]],
    resized_hw: Sequence[tuple[int, int]],
    max_detections: int | None,
    batch: int | None = None,
    *,
    min_score: float = 0.0,
) -> list[Instances]:
    """Finds the instances of images of any sizes; images of equal size pass through the model together.

    Args:
        predict: the function of a teacher or a student that predicts on images [B, 3, H, W].
        images: B of uint8 [3, H, W].
        image_hw, resized_hw, max_detections, min_score: see `predict`.
        batch: most images of one forward pass; None: no limit.

    Returns:
        As `predict`, in the order of the images.
    """
    found: list[Instances] = [[] for _ in images]
    for group in groups_of_equal_size([image.shape for image in images], batch):
        pixels = torch.from_numpy(np.stack([images[i] for i in group]))
        sizes = [[sizes[i] for i in group] for sizes in (image_hw, resized_hw)]
        for i, instances in zip(group, predict(pixels, *sizes, max_detections, min_score)):
            found[i] = instances
    return found


@torch.no_grad()
def to_instances(
    predictions: Predictions | tuple[torch.Tensor, torch.Tensor],
    image_hw: Sequence[tuple[int, int]],
    resized_hw: Sequence[tuple[int, int]],
    image_px: tuple[int, int],
    max_detections: int,
    min_score: float = 0.0,
    soft: bool = False,
) -> list[Instances]:
    """Mask2Former's instance inference: the best `max_detections` of query x class, masks as RLE.

    score = P(class) * mean mask probability inside the mask. Masks may overlap, and one query may appear with several
    classes. Empty masks are left out.

    Args:
        predictions: predictions for B images, or their final (class_logits [B, Q, C+1], mask_logits [B, Q, h, w]).
        image_hw: B original sizes, pixels; fewer where the last images only fill up the batch: those give nothing.
        resized_hw: their heights and widths after the resize into the crop; the rest of the crop, below and right, is
            padding.
        image_px: height and width of the crop, pixels.
        max_detections: most instances of an image.
        min_score: least score of an instance. A mask whose P(class) lies below it cannot reach it and is not brought to
            the image's size, which takes most of the time on large images; the others are the same as without a limit.
        soft: also tell what the query believes: class_probs (C+1 floats, no-object last) and mask_probs (bytes, see
            `soft_targets.mask_probabilities`).

    Returns:
        Per image, in falling score order; mask_quality is the mean mask probability inside the mask.

    Source: Cheng et al. 2022, `instance_inference`. Deviations: sizes of any image are handled one image and one chunk
    of queries at a time.
    """
    if isinstance(predictions, Predictions):
        class_logits, mask_logits = predictions.class_logits[-1], predictions.mask_logits[-1]
    else:
        class_logits, mask_logits = predictions
    probabilities_BQC = class_logits.float().softmax(-1)
    return [
        _instances_of_image(
            probabilities_BQC[b], mask_logits[b], image_hw[b], resized_hw[b], image_px, max_detections, min_score, soft
        )
        for b in range(len(image_hw))
    ]


def _instances_of_image(
    all_probabilities_QC: torch.Tensor,
    mask_logits_QHW: torch.Tensor,
    image_hw: tuple[int, int],
    resized_hw: tuple[int, int],
    image_px: tuple[int, int],
    max_detections: int,
    min_score: float,
    soft: bool,
) -> Instances:
    probabilities_QC = all_probabilities_QC[:, :-1]
    num_classes = probabilities_QC.shape[1]
    top, index = probabilities_QC.flatten().topk(min(max_detections, probabilities_QC.numel()))
    reach = can_reach(top, min_score)
    top, index = top[reach], index[reach]
    query, label = index // num_classes, index % num_classes
    used_K = query.unique()
    encoded, quality = encode_masks(
        mask_logits_QHW[used_K],
        lambda logits_KHW: to_image_size(logits_KHW[None], image_hw, resized_hw, image_px)[0],
        max(image_px[0] * image_px[1], image_hw[0] * image_hw[1]),
    )
    beliefs: list[tuple[list[float], bytes]] = []
    if soft:
        stored = mask_probabilities(mask_logits_QHW[used_K], image_hw, resized_hw, image_px)
        beliefs = list(zip(all_probabilities_QC[used_K].tolist(), stored))
    place = {q: k for k, q in enumerate(used_K.tolist())}
    instances: Instances = []
    for probability, q, c in zip(top.tolist(), query.tolist(), label.tolist()):
        k = place[q]
        if quality[k] > 0 and not probability * quality[k] < min_score:
            instance: Instance = {
                "label": c,
                "score": probability * quality[k],
                "rle": encoded[k]["counts"],
                "size": list(encoded[k]["size"]),
                "mask_quality": quality[k],
            }
            if soft:
                instance["class_probs"], instance["mask_probs"] = beliefs[k]
            instances.append(instance)
    return sorted(instances, key=lambda instance: -instance["score"])


def can_reach(upper: torch.Tensor, min_score: float) -> torch.Tensor:
    """Which scores may be at least `min_score`, when each is `upper` times a mask's quality of at most 1: bool.

    A mean that is computed in single precision may lie a little above 1. What is not a number may be anything.
    """
    return ~(upper < min_score * (1 - 1e-3))


def encode_masks(
    mask_logits_KHW: torch.Tensor, to_image: Callable[[torch.Tensor], torch.Tensor], num_pixels: int
) -> tuple[list[Rle], list[float]]:
    """Masks at an image's size as RLE, a few at a time.

    Args:
        mask_logits_KHW: mask logits of one image, any float dtype.
        to_image: float32 [k, h, w] -> [k, height, width] at the image's size.
        num_pixels: the largest size that `to_image` makes on its way.

    Returns:
        COCO RLEs, and the mean mask probability inside each mask (0 of an empty one).
    """
    encoded: list[Rle] = []
    quality: list[float] = []
    for part_KHW in mask_logits_KHW.split(max(1, CHUNK_PIXELS // num_pixels)) if len(mask_logits_KHW) else ():
        logits_KHW = to_image(part_KHW.float())
        inside_KHW = logits_KHW > 0
        quality += mask_quality(logits_KHW, inside_KHW).tolist()
        encoded += coco_mask.encode(np.asfortranarray(inside_KHW.permute(1, 2, 0).to(torch.uint8).cpu().numpy()))
    return encoded, quality


def mask_quality(logits: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Mean mask probability inside each mask, 0 of an empty one.

    It depends on the size at which the mask is taken, so that two scores are only equal at the same size.

    Args:
        logits: float32 [..., H, W], at the size of the image.
        inside: bool [..., H, W], the masks.

    Returns:
        float32 [...].
    """
    return (logits.sigmoid() * inside).sum((-2, -1)) / inside.sum((-2, -1)).clamp(min=1)


def to_image_size(
    logits_BKHW: torch.Tensor, image_hw: tuple[int, int], resized_hw: tuple[int, int], image_px: tuple[int, int]
) -> torch.Tensor:
    """Brings mask logits to the image's size: to the crop's size, padding cut off, then to the image.

    Args:
        logits_BKHW: float32.
        image_hw, resized_hw, image_px: size of the image itself, inside the padding, and of the crop, pixels.

    Returns:
        float32 [B, K, *image_hw].
    """
    logits = F.interpolate(logits_BKHW, size=image_px, mode="bilinear", align_corners=False)
    logits = logits[..., : resized_hw[0], : resized_hw[1]]
    # A graph that is exported gets its sizes when it runs; between equal sizes the resize changes nothing.
    if torch.compiler.is_exporting() or tuple(resized_hw) != tuple(image_hw):
        logits = F.interpolate(logits, size=image_hw, mode="bilinear", align_corners=False)
    return logits
