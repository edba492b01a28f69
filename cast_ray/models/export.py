"""The student as one graph from pixels to detections, for runtimes other than PyTorch."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from cast_ray.common.files import PARTIAL
from cast_ray.models.student import Student

OUTPUTS = ("boxes", "labels", "scores", "masks")
OPSET = 20


class Detector(nn.Module):
    """Images in, the best K of query x class out, at the images' own size: Mask2Former's inference in tensors alone.

    Args:
        student: its segmenter is shared.
        max_detections: K, at most Q x C.
    """

    def __init__(self, student: Student, max_detections: int = 100):
        super().__init__()
        segmenter = student.segmenter
        self.segmenter = segmenter
        self.num_detections = min(max_detections, segmenter.config.num_queries * segmenter.num_classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Detections of a batch.

        Args:
            images: uint8 [B, 3, H, W], RGB.

        Returns:
            boxes float32 [B, K, 4] (x0, y0, x1, y1, pixels; 0 of an empty mask), labels int64 [B, K] (0..C-1), scores
            float32 [B, K] in falling order (0 of an empty mask), masks bool [B, K, H, W]. As `to_instances` where the
            image fills the crop, but that empty masks stay.
        """
        predictions = self.segmenter(images)
        probabilities_BQC = predictions.class_logits[-1].float().softmax(-1)[..., :-1]
        size = [int(images.shape[-2]), int(images.shape[-1])]
        logits = F.interpolate(predictions.mask_logits[-1].float(), size=size, mode="bilinear", align_corners=False)
        inside_BQHW = logits > 0
        area_BQ = inside_BQHW.sum((2, 3))
        quality_BQ = (logits.sigmoid() * inside_BQHW).sum((2, 3)) / area_BQ.clamp(min=1)
        num_classes = probabilities_BQC.shape[2]
        # Chosen by class alone, as Mask2Former does, then ranked by the product.
        top_BK, index_BK = probabilities_BQC.flatten(1).topk(self.num_detections)
        query_BK = index_BK // num_classes
        scores_BK, order_BK = (top_BK * quality_BQ.gather(1, query_BK)).sort(dim=1, descending=True)
        query_BK, labels_BK = query_BK.gather(1, order_BK), (index_BK % num_classes).gather(1, order_BK)
        places = query_BK[..., None, None].expand(-1, -1, *size)
        boxes_BQ4 = _boxes(inside_BQHW)
        boxes_BK4 = boxes_BQ4.gather(1, query_BK[..., None].expand(-1, -1, 4))
        return boxes_BK4, labels_BK, scores_BK, inside_BQHW.gather(1, places)


def _boxes(inside_BQHW: torch.Tensor) -> torch.Tensor:
    """float32 [B, Q, 4] round the True pixels, right and lower edge exclusive; 0 where there are none."""
    rows, columns = inside_BQHW.any(3).int(), inside_BQHW.any(2).int()

    def ends(line: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        length = line.shape[2]
        place = torch.arange(1, length + 1, device=line.device, dtype=torch.int32)
        stop = (line * place).amax(2)
        return length + 1 - (line * (length + 1 - place)).amax(2) - 1, stop

    (y0, y1), (x0, x1) = ends(rows), ends(columns)
    found = (y1 > 0).float()
    return torch.stack([x0, y0, x1, y1], dim=-1).float() * found[..., None]


def export_onnx(
    student: Student, path: str | Path, max_detections: int = 100, image_px: tuple[int, int] | None = None
) -> dict[str, str]:
    """Writes a student as an ONNX model: images uint8 [batch, 3, H, W] in, `Detector`'s outputs out.

    The batch size is free, height and width are not. Class names, input size and, where they are known, the licences
    that the student inherits are in the model's metadata, as JSON.

    Args:
        student: on the CPU.
        path: path of the file that is written.
        max_detections: K.
        image_px: H, W, pixels; None: the size that the student fits images into.

    Returns:
        The model's metadata.

    Raises:
        ValueError: onnx is not installed, or `image_px` is needed, because the student sees images at sizes of their
            own.
    """
    if image_px is None and not student.input_size.is_fixed:
        raise ValueError(
            f"this student sees images {student.input_size}, an ONNX model has one size: name it by --image-px H W, "
            "for example 1024 2048 for Cityscapes"
        )
    height, width = image_px or student.image_px
    try:
        import onnx  # noqa: F401 - both are what torch.onnx writes with
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'cast_ray[export]'") from None
    for name in ("onnxscript", "onnx_ir"):  # each constant that they do not fold
        logging.getLogger(name).setLevel(logging.ERROR)
    detector = Detector(student, max_detections).eval()
    example = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    with _plain_attention(student):
        program = torch.onnx.export(
            detector,
            (example,),
            input_names=["images"],
            output_names=list(OUTPUTS),
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    facts = {"class_names": json.dumps(student.class_names), "image_px": json.dumps([height, width])}
    if student.licences:
        facts["licences"] = json.dumps(student.licences.published().plain())
    program.model.metadata_props.update(facts)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Weights of more than 2 GB become a second file, which the model names: both are written elsewhere, then moved.
    with tempfile.TemporaryDirectory(dir=path.parent, suffix=PARTIAL) as folder:
        program.save(str(Path(folder) / path.name))
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.with_name(file.name))
    return facts


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
