"""Loss of a box-prompted segmenter: focal and dice of each mask, and how well it predicts its own IoU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from cast_ray.contracts.records import Targets

Term = tuple[Tensor, Tensor]


def prompted_mask_loss(
    mask_logits: Tensor, predicted_iou: Tensor, instance: Tensor, targets: Sequence[Targets]
) -> dict[str, Term]:
    """Terms of masks that were prompted by the boxes of known instances.

    With m the logits, g the instance's mask and w its weight: mask_focal = w mean_p focal(m_p, g_p),
    mask_dice = w (1 - (2 sum_p s g + 1) / (sum_p s + sum_p g + 1)), s = sigmoid(m), and
    mask_iou = w |predicted IoU - IoU(m > 0, g)|, each over the number of masks, whatever their weights.

    Args:
        mask_logits: [B, M, h, w], whose pixels cover the image edge to edge.
        predicted_iou: [B, M], 0..1.
        instance: [B, M], index of the instance in the image's target; -1: no mask in this place.
        targets: B targets; g is their mask shrunk to h x w, its values the share of each pixel that it covers.

    Returns:
        {"mask_focal", "mask_dice", "mask_iou"} -> per image (sum [B], count [B]), float32.

    Source: SAM's loss (Kirillov et al. 2023) with SAM2's error of the IoU (absolute). Deviations: computed at the
    decoder's own size, a quarter of the image's side.
    """
    sums: dict[str, list[Tensor]] = {"mask_focal": [], "mask_dice": [], "mask_iou": []}
    counts = []
    for b, target in enumerate(targets):
        used_M = instance[b] >= 0
        chosen = instance[b][used_M].long()
        logits_MP = mask_logits[b][used_M].float().flatten(1)
        size = (mask_logits.shape[-2], mask_logits.shape[-1])
        truth_MP = logits_MP.detach()
        if len(chosen):
            truth_MP = F.interpolate(target.masks[chosen].float()[:, None], size=size, mode="area").flatten(1)
        weight_M = target.weights[chosen].float()
        focal_M = sigmoid_focal_loss(logits_MP, truth_MP).mean(1)
        share_MP = logits_MP.sigmoid()
        dice_M = 1 - (2 * (share_MP * truth_MP).sum(1) + 1) / (share_MP.sum(1) + truth_MP.sum(1) + 1)
        error_M = (predicted_iou[b][used_M].float() - _iou(logits_MP, truth_MP)).abs()
        # Nothing but attached: DDP wants a gradient on every worker.
        attached = (mask_logits[b].flatten()[:1].float().sum() + predicted_iou[b].float().sum()) * 0
        for name, values_M in zip(sums, (focal_M, dice_M, error_M)):
            sums[name].append((values_M * weight_M).sum() + attached)
        counts.append(weight_M.new_tensor(len(weight_M)))
    count = torch.stack(counts)
    return {name: (torch.stack(values), count) for name, values in sums.items()}


@torch.no_grad()
def _iou(logits_MP: Tensor, truth_MP: Tensor) -> Tensor:
    found, wanted = logits_MP > 0, truth_MP > 0.5
    union = (found | wanted).sum(1)
    return (found & wanted).sum(1) / union.clamp(min=1)
