"""The embedded teacher: a segmenter trained by the same stages as the student, larger and on more data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cast_ray.models.postprocess import to_instances
from cast_ray.models.segmenter import Segmenter


class ExpertTeacher:
    """Labels images by a trained `Segmenter`, in place of the method's detector and promptable segmenter."""

    def __init__(self, segmenter: Segmenter, image_px: tuple[int, int], max_detections: int = 100):
        self.segmenter = segmenter.eval()
        self.image_px = image_px
        self.max_detections = max_detections

    @torch.inference_mode()
    def predict(
        self,
        images: torch.Tensor,
        image_hw: Sequence[tuple[int, int]] | None = None,
        resized_hw: Sequence[tuple[int, int]] | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Instances of each image at its own size.

        Args:
            images: uint8 [B, 3, H, W], resized and padded to `image_px`.
            image_hw: B original sizes, pixels; None: as given.
            resized_hw: B sizes inside the padding, pixels; None: no padding.

        Returns:
            Per image, in falling score order, dicts as from `to_instances`.
        """
        device = self.segmenter.pixel_mean.device
        given: list[tuple[int, int]] = [(images.shape[-2], images.shape[-1])] * len(images)
        predictions = self.segmenter(images.to(device))
        return to_instances(predictions, image_hw or given, resized_hw or given, self.image_px, self.max_detections)
