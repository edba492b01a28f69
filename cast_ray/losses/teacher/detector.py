"""Set loss of a text-prompted detector: tokens by focal loss, boxes by L1 and generalised IoU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import (
    box_convert,
    generalized_box_iou,
    generalized_box_iou_loss,
    masks_to_boxes,
    sigmoid_focal_loss,
)

from cast_ray.contracts.records import Targets
from cast_ray.recipe import GroundedSamConfig

ALPHA, GAMMA = 0.25, 2.0

Term = tuple[Tensor, Tensor]


@dataclass
class QueryDetections:
    """What a detector predicts, once before its decoder and after each of its layers.

    token_logits: L tensors [B, Q, T], -inf past the prompt; boxes: L tensors [B, Q, 4] (centre x, centre y, width,
    height, in 0..1 of the image); token_map: float [B, C, T], 1 where a token stands for a class, rows of 0 for classes
    that were not asked for.
    """

    token_logits: list[Tensor]
    boxes: list[Tensor]
    token_map: Tensor


def detection_loss(found: QueryDetections, targets: Sequence[Targets], config: GroundedSamConfig) -> dict[str, Term]:
    """Class and box terms of the matched queries, summed over all predictions.

    With query k matched to instance g of weight w_g, s_kt the logit of token t, y_kt = 1 where t stands for g's class:
    class = sum_k w_k sum_t focal(s_kt, y_kt) (w_k = 1 for unmatched queries), box = sum_g w_g |b_k - b_g|_1,
    giou = sum_g w_g (1 - GIoU(b_k, b_g)), each over the number of instances, whatever their weights.

    Args:
        found: of B images.
        targets: of the same images; boxes are those of the visible masks. Instances of classes that were not asked for
            are left out.
        config: weights of the matching costs.

    Returns:
        {"class", "box", "giou"} -> per image (sum [B], count [B]), float32. An image without instances counts as one:
        its tokens are all negative.

    Source: Liu et al. 2023 (Grounding DINO); MM-Grounding-DINO's weights. Equal to transformers'
    `GroundingDinoForObjectDetectionLoss` on the decoder's predictions. Deviations: no denoising queries, which
    transformers' models do not have; the first prediction is the encoder's best proposals themselves, where
    transformers takes the learnt queries' classes and boxes without gradient, so that its encoder heads never learn.
    """
    sums: dict[str, list[Tensor]] = {"class": [], "box": [], "giou": []}
    counts: list[Tensor] = []
    for b, target in enumerate(targets):
        height, width = target.masks.shape[-2:]
        asked = found.token_map[b, target.labels].any(-1)
        weights = target.weights[asked].float()
        terms = _terms_of_image(
            torch.stack([logits[b].float() for logits in found.token_logits]),
            torch.stack([boxes[b].float() for boxes in found.boxes]),
            boxes_of(target.masks[asked], (height, width)),
            found.token_map[b, target.labels[asked]],
            weights,
            config,
        )
        for name, value in zip(sums, terms):
            sums[name].append(value)
        counts.append(weights.new_tensor(max(1, len(weights))))
    count = torch.stack(counts)
    return {name: (torch.stack(values), count) for name, values in sums.items()}


def boxes_of(masks: Tensor, image_px: tuple[int, int]) -> Tensor:
    """Boxes round masks: float [N, 4], centre x, centre y, width and height in 0..1 of the image.

    Args:
        masks: bool [N, H, W], none empty.
        image_px: H, W.
    """
    if not len(masks):
        return masks.new_zeros((0, 4), dtype=torch.float32)
    corners = masks_to_boxes(masks).float()
    corners[:, 2:] += 1  # the last pixel belongs to the box
    height, width = image_px
    return box_convert(corners / corners.new_tensor([width, height, width, height]), "xyxy", "cxcywh")


def _terms_of_image(
    logits_LQT: Tensor,
    boxes_LQ4: Tensor,
    truth_N4: Tensor,
    tokens_NT: Tensor,
    weights_N: Tensor,
    config: GroundedSamConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    query_LK, instance_LK = match_boxes(logits_LQT, boxes_LQ4, truth_N4, tokens_NT, config)
    layer_L1 = torch.arange(len(logits_LQT), device=logits_LQT.device)[:, None]
    valid_T = logits_LQT[0, 0].isfinite()
    wanted_LQT = torch.zeros_like(logits_LQT)
    wanted_LQT[layer_L1, query_LK] = (tokens_NT[instance_LK] > 0).to(wanted_LQT)
    weight_LQ = torch.ones_like(logits_LQT[..., 0])
    weight_LQ[layer_L1, query_LK] = weights_N[instance_LK]
    focal_LQT = sigmoid_focal_loss(logits_LQT[..., valid_T], wanted_LQT[..., valid_T], alpha=ALPHA, gamma=GAMMA)
    class_sum = (focal_LQT.sum(2) * weight_LQ).sum()
    matched, goal, weight = boxes_LQ4[layer_L1, query_LK], truth_N4[instance_LK], weights_N[instance_LK]
    box_sum = ((matched - goal).abs().sum(2) * weight).sum()
    misfit = generalized_box_iou_loss(_corners(matched), _corners(goal))
    return class_sum, box_sum, (misfit * weight).sum()


@torch.no_grad()
def match_boxes(
    logits_LQT: Tensor, boxes_LQ4: Tensor, truth_N4: Tensor, tokens_NT: Tensor, config: GroundedSamConfig
) -> tuple[Tensor, Tensor]:
    """The assignment of least cost of each prediction: (query int64 [L, K], instance int64 [L, K]), K = min(Q, N).

    The class cost is the focal loss as a positive less the focal loss as a negative, mean over the class's tokens.

    Raises:
        ValueError: logits or boxes that are not finite.
    """
    probability = logits_LQT.sigmoid()
    positive = ALPHA * (1 - probability) ** GAMMA * -(probability + 1e-8).log()
    negative = (1 - ALPHA) * probability**GAMMA * -(1 - probability + 1e-8).log()
    share_NT = tokens_NT / tokens_NT.sum(1, keepdim=True).clamp(min=1)
    cost_LQN = config.cost_class * ((positive - negative) @ share_NT.T)
    cost_LQN += config.cost_box * torch.cdist(boxes_LQ4, truth_N4.expand(len(boxes_LQ4), -1, -1), p=1)
    overlap = generalized_box_iou(_corners(boxes_LQ4.flatten(0, 1)), _corners(truth_N4))
    cost = (cost_LQN - config.cost_giou * overlap.view_as(cost_LQN)).cpu().numpy()
    if not np.isfinite(cost).all():
        raise ValueError("detection loss: the detector's logits or boxes are not finite")
    pairs = [linear_sum_assignment(of_layer) for of_layer in cost]
    query, instance = np.stack([q for q, _ in pairs]), np.stack([i for _, i in pairs])
    return torch.from_numpy(query).to(logits_LQT.device), torch.from_numpy(instance).to(logits_LQT.device)


def _corners(boxes_x4: Tensor) -> Tensor:
    return box_convert(boxes_x4, "cxcywh", "xyxy")
