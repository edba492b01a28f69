"""A student that is made in milliseconds."""

from __future__ import annotations

from cast_ray.contracts.records import Category
from cast_ray.models.segmenter import build_segmenter
from cast_ray.models.student import Student
from cast_ray.recipe import EncoderConfig, ModelConfig

TINY = ModelConfig(
    encoder=EncoderConfig(name="conv", widths=(8, 8, 16, 16), stem_stride=2),
    hidden_dim=16,
    num_queries=5,
    num_layers=1,
    feedforward_dim=16,
)


def make_student(categories: tuple[Category, ...], seed: int = 0) -> Student:
    """A student with random weights that fits images into 32 x 48 pixels."""
    return Student(build_segmenter(TINY, len(categories), seed), categories, (32, 48)).eval()
