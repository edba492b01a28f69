"""The student as one graph from pixels to detections, for runtimes other than PyTorch."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from cast_ray.common.files import replaced_together
from cast_ray.common.version import VERSION
from cast_ray.contracts.instance import SCORE_THRESHOLD
from cast_ray.models.postprocess import mask_quality, to_image_size
from cast_ray.models.student import Student
from cast_ray.recipe import InputSize

ExportPrecision = Literal["fp32", "fp16", "int8"]
INPUTS = ("images", "inside_hw", "image_hw")
OUTPUTS = ("boxes", "labels", "scores", "masks")
OPSET = 20
MAX_SIDE_PX = 1 << 16
"""Longest side of an image, as a limit that the exporter is told."""


class Detector(nn.Module):
    """Images in, the best K of query x class out, at the images' own size: Mask2Former's inference in tensors alone.

    It computes what `to_instances` computes, with the same scores: the quality of a mask is taken at the image's own
    size, without the padding.

    Args:
        student: its segmenter is shared.
        max_detections: K, at most Q x C.
    """

    def __init__(self, student: Student, max_detections: int = 100):
        super().__init__()
        segmenter = student.segmenter
        self.segmenter = segmenter
        self.num_detections = min(max_detections, segmenter.config.num_queries * segmenter.num_classes)

    def forward(
        self, images: torch.Tensor, inside_hw: torch.Tensor, image_hw: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Detections of a batch of images of one size.

        Args:
            images: uint8 [B, 3, H, W], RGB, fitted into H x W: resized with their aspect kept, 0 below and right.
            inside_hw: int64 [2], height and width that the images have inside the padding, pixels.
            image_hw: int64 [2], height and width of the images themselves, pixels: the size of the masks.

        Returns:
            boxes float32 [B, K, 4] (x0, y0, x1, y1, pixels; 0 of an empty mask), labels int64 [B, K] (0..C-1), scores
            float32 [B, K] in falling order (0 of an empty mask), masks bool [B, K, *image_hw]. As `to_instances`, but
            that empty masks stay.
        """
        predictions = self.segmenter(images)
        probabilities_BQC = predictions.class_logits[-1].float().softmax(-1)[..., :-1]
        mask_logits = predictions.mask_logits[-1].float()
        crop = (int(images.shape[-2]), int(images.shape[-1]))
        inside, size = _sides(inside_hw, crop), _sides(image_hw, (MAX_SIDE_PX, MAX_SIDE_PX))
        num_classes = probabilities_BQC.shape[2]
        # Chosen by class alone, as Mask2Former does, then ranked by the product.
        top_BK, index_BK = probabilities_BQC.flatten(1).topk(self.num_detections)
        query_BK = index_BK // num_classes
        chosen = mask_logits.gather(1, query_BK[..., None, None].expand(-1, -1, *mask_logits.shape[2:]))
        logits = to_image_size(chosen, size, inside, crop)
        masks = logits > 0
        scores_BK, order_BK = (top_BK * mask_quality(logits, masks)).sort(dim=1, descending=True)
        masks = masks.gather(1, order_BK[..., None, None].expand(-1, -1, *size))
        return _boxes(masks), (index_BK % num_classes).gather(1, order_BK), scores_BK, masks


def _sides(size: torch.Tensor, most: tuple[int, int]) -> tuple[int, int]:
    """Height and width out of a tensor, which an exported graph learns when it runs; at least 1 and at most `most`."""
    height, width = size[0].item(), size[1].item()
    for side, limit in ((height, most[0]), (width, most[1])):
        torch._check(side >= 1)
        torch._check(side <= limit)
    return height, width  # type: ignore[return-value]


def _boxes(inside_BKHW: torch.Tensor) -> torch.Tensor:
    """float32 [B, K, 4] round the True pixels, right and lower edge exclusive; 0 where there are none."""
    rows, columns = inside_BKHW.any(3).int(), inside_BKHW.any(2).int()

    def ends(line: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        length = line.shape[2]
        place = torch.arange(1, length + 1, device=line.device, dtype=torch.int32)
        stop = (line * place).amax(2)
        return length + 1 - (line * (length + 1 - place)).amax(2) - 1, stop

    (y0, y1), (x0, x1) = ends(rows), ends(columns)
    found = (y1 > 0).float()
    return torch.stack([x0, y0, x1, y1], dim=-1).float() * found[..., None]


def export_onnx(
    student: Student,
    path: str | Path,
    max_detections: int = 100,
    image_px: tuple[int, int] | None = None,
    precision: ExportPrecision = "fp32",
    calibration: Sequence[dict[str, np.ndarray]] = (),
) -> dict[str, str]:
    """Writes a student as an ONNX model: `Detector`'s inputs and outputs, and its facts in the model's metadata.

    The batch size is free, height and width of `images` are not. A file that was there before is replaced at the end.

    Args:
        student: on the CPU.
        path: path of the file that is written.
        max_detections: K.
        image_px: H, W, pixels; None: the size that the student fits images into.
        precision: of weights and activations, see `reduce_precision`; what makes scores, boxes and masks of the
            network's outputs stays float32.
        calibration: the model's inputs by name, for each image from which int8 takes the ranges of the activations.

    Returns:
        The model's metadata, see `metadata`.

    Raises:
        ValueError: a package is not installed, `image_px` is needed, because the student sees images at sizes of their
            own, or int8 has no image to calibrate on.
    """
    size = export_size(student, image_px)
    if precision == "int8" and not calibration:
        raise ValueError("precision int8: expected images to calibrate on, for example unlabelled training images")
    try:
        import onnx  # noqa: F401 - both are what torch.onnx writes with
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'cast_ray[export]'") from None
    facts = metadata(student, size, max_detections, precision)
    with replaced_together(path) as file:
        program = _graph(student, size, max_detections)
        program.model.metadata_props.update(facts)
        program.save(str(file))
        if precision != "fp32":
            from cast_ray.models.export_precision import reduce_precision

            reduce_precision(file, precision, calibration, facts)
    return facts


def export_size(student: Student, image_px: tuple[int, int] | None) -> tuple[int, int]:
    """Returns the height and width of an exported model's images, pixels.

    Raises:
        ValueError: the student sees images at sizes of their own, and none is named.
    """
    if image_px is None and not student.input_size.is_fixed:
        raise ValueError(
            f"this student sees images {student.input_size}, an exported model has one size: name it by --image-px "
            "H W, for example 1024 2048 for Cityscapes"
        )
    return image_px or student.image_px


def metadata(
    student: Student, image_px: tuple[int, int], max_detections: int, precision: ExportPrecision
) -> dict[str, str]:
    """What an exported file says of itself: each value is JSON.

    class_names and category_ids: C, by label. image_px: height and width that images are fitted into. preprocessing: as
    in the `config.json` of a student; resize and padding are the caller's, normalisation is inside the model.
    score_threshold: least score that `cast-ray predict` keeps by default; mask_threshold: mask probability above which
    a pixel is inside. max_detections, precision, cast_ray_version, and licences where they are known.
    """
    preprocessing = student.config()["preprocessing"] | {
        "resize": f"{InputSize.of(image_px)}, aspect kept, bilinear with antialias",
        "pad": "below and right, with 0",
        "normalisation": "inside the model, which takes uint8",
    }
    facts: dict[str, Any] = {
        "class_names": student.class_names,
        "category_ids": [category.id for category in student.categories],
        "image_px": list(image_px),
        "preprocessing": preprocessing,
        "score_threshold": SCORE_THRESHOLD,
        "mask_threshold": 0.5,
        "max_detections": max_detections,
        "precision": precision,
        "cast_ray_version": VERSION,
    }
    if student.licences:
        facts["licences"] = student.licences.published().plain()
    return {name: json.dumps(value) for name, value in facts.items()}


def _graph(student: Student, image_px: tuple[int, int], max_detections: int) -> torch.onnx.ONNXProgram:
    for name in ("onnxscript", "onnx_ir"):  # each constant that they do not fold
        logging.getLogger(name).setLevel(logging.ERROR)
    size = torch.tensor(image_px)
    with _plain_attention(student):
        program = torch.onnx.export(
            Detector(student, max_detections).eval(),
            # One tensor for both sizes would become one input.
            (torch.zeros(2, 3, *image_px, dtype=torch.uint8), size, size.clone()),
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}, "inside_hw": None, "image_hw": None},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program


@contextmanager
def _plain_attention(student: Student) -> Iterator[None]:
    """Attention written out: torch's fused form breaks a view of Swin's when it is taken apart for export."""
    backbone = getattr(student.segmenter.encoder, "backbone", None)
    if not isinstance(backbone, PreTrainedModel):
        yield
        return
    before = backbone.config._attn_implementation
    backbone.set_attn_implementation("eager")
    try:
        yield
    finally:
        backbone.set_attn_implementation(before)
