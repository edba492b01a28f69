"""The embedded teacher: a segmenter trained by the same stages as the student, larger and on more data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cast_ray.contracts.instance import Instances
from cast_ray.contracts.records import Category
from cast_ray.models.cast_network import CastNetwork, TrainedNetwork
from cast_ray.models.postprocess import predict_instances
from cast_ray.models.segmenter import Segmenter, build_segmenter
from cast_ray.recipe import ContrastiveConfig, InputSize, TeacherConfig
from cast_ray.teachers.protocol import Teacher

WEIGHTS = "model.safetensors"


class ExpertTeacher(Teacher):
    """Labels images by a trained `Segmenter`, in place of the method's detector and promptable segmenter."""

    kind = "expert"

    def __init__(self, segmenter: Segmenter, categories: Sequence[Category], input_size: InputSize | tuple[int, int]):
        super().__init__(TeacherConfig(**segmenter.config.model_dump()), categories, input_size)
        self.segmenter = segmenter.eval()

    def find(
        self,
        images: torch.Tensor,
        image_hw: Sequence[tuple[int, int]],
        resized_hw: Sequence[tuple[int, int]],
        max_detections: int,
        min_score: float,
    ) -> list[Instances]:
        return predict_instances(self.segmenter, images, image_hw, resized_hw, max_detections, min_score, self.is_soft)

    def for_training(self, contrastive: ContrastiveConfig | None) -> tuple[TrainedNetwork, None]:
        return CastNetwork(self.segmenter, contrastive), None

    @property
    def trained(self) -> nn.Module:
        return self.segmenter

    def save_weights(self, folder: Path) -> None:
        (folder / "segmenter").mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.segmenter.state_dict().items()}
        save_file(tensors, folder / "segmenter" / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def parts(cls, config: TeacherConfig) -> dict[str, str]:
        return {"teacher": "segmenter"}

    @classmethod
    def load(
        cls,
        folders: dict[str, Path],
        config: TeacherConfig,
        categories: Sequence[Category],
        input_size: InputSize | tuple[int, int],
    ) -> ExpertTeacher:
        segmenter = build_segmenter(config.segmenter, len(categories), seed=0)
        path = folders["teacher"] / WEIGHTS
        try:
            segmenter.load_state_dict(load_file(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: the weights do not fit the teacher: {str(error).splitlines()[0]}") from None
        return cls(segmenter, categories, input_size)
