"""The embedded teacher: a segmenter trained by the same stages as the student, larger and on more data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cast_ray.models.postprocess import predict_instances
from cast_ray.models.segmenter import Segmenter


class ExpertTeacher:
    """Labels images by a trained `Segmenter`, in place of the method's detector and promptable segmenter."""

    def __init__(self, segmenter: Segmenter, image_px: tuple[int, int], max_detections: int = 100):
        self.segmenter = segmenter.eval()
        self.image_px = image_px
        self.max_detections = max_detections

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
        images = images.to(self.segmenter.pixel_mean.device)
        return predict_instances(self.segmenter, images, image_hw, resized_hw, self.max_detections)
