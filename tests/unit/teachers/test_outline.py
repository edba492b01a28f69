"""Teachers at their published size without weights."""

from __future__ import annotations

import os

import pytest
import torch

from cast_ray.evaluation.efficiency import count_gmacs, count_parameters
from cast_ray.recipe import GroundedSamConfig, TeacherConfig
from cast_ray.recipe.teachers import MaskTransformerConfig
from cast_ray.teachers.outline import outline_teacher

SMALL = GroundedSamConfig(detector="org/detector_tiny_all", segmenter="org/hiera-small")


def image(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.zeros((1, 3, height, width), dtype=torch.uint8, device="meta")


def test_the_papers_teacher_has_the_papers_parameters() -> None:
    teacher = outline_teacher(TeacherConfig(kind="grounded_sam"), 8)
    assert count_parameters(teacher) / 1e6 == pytest.approx(568, rel=0.02)  # the paper; SAM2 without its video memory
    assert {p.device.type for p in teacher.parameters()} == {"meta"}


def test_names_tell_the_size_and_images_are_resized_by_the_models() -> None:
    teacher = outline_teacher(TeacherConfig(kind="grounded_sam", grounded_sam=SMALL), 8)
    parts = [count_parameters(teacher.get_submodule(name)) / 1e6 for name in ("detector", "segmenter")]
    assert 150 < parts[0] < 200 and 35 < parts[1] < 50
    once = count_gmacs(teacher, image())
    assert 300 < once < 1000 and count_gmacs(teacher, image(128, 128)) == pytest.approx(once, rel=1e-3)
    assert "TRANSFORMERS_DISABLE_TORCH_CHECK" not in os.environ


def test_a_mask_transformer_grows_with_the_image() -> None:
    part = MaskTransformerConfig(checkpoint="/models/mask2former-swin-tiny-coco-instance/")
    teacher = outline_teacher(TeacherConfig(kind="mask2former", mask_transformer=part), 8)
    assert count_parameters(teacher) / 1e6 == pytest.approx(47, abs=1)
    assert count_gmacs(teacher, image(256, 256)) > 5 * count_gmacs(teacher, image())


@pytest.mark.parametrize("kind", ["expert", "sam3", "ensemble"])
def test_other_kinds_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind}: expected grounded_sam or mask2former"):
        outline_teacher(TeacherConfig(kind=kind), 8)
