"""Which images, which labels, and how the drawn ones are made."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cast_ray.recipe.part import Part


class ShapesConfig(Part):
    """How many scenes the embedded `shapes` dataset holds."""

    num_source: int = Field(1500, ge=8)
    """Scenes in the source style, all labelled: what the "foundation" teacher is pre-trained on."""
    num_train: int = Field(500, ge=8)
    """Scenes in the target style, split into labelled and unlabelled by `label_fraction`."""
    num_val: int = Field(200, ge=4)
    seed: int = 0
    """Seed of the drawing, apart from the recipe's own seed: all seeds of a sweep see the same scenes."""


class DataConfig(Part):
    """Which images, which labels, and the size they are cropped to."""

    format: Literal["shapes", "coco"] = "shapes"
    root: str = ""
    """Folder of the dataset. Empty for `shapes`: drawn into the storage path."""
    annotations: str = ""
    """COCO JSON of the training images, relative to root; empty: found by its usual names."""
    val_annotations: str = ""
    """COCO JSON of the validation images; empty: found, else a `val_fraction` of the images is held out."""
    val_fraction: float = Field(0.25, gt=0, lt=1)
    image_dir: str = ""
    val_image_dir: str = ""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """The run stops before training when more than this share of images or annotations is unusable."""
    label_fraction: float = Field(0.04, gt=0, le=1)
    """|D_l| / (|D_l| + |D_u|)."""
    num_unlabelled: int | None = Field(None, ge=0)
    """At most this many unlabelled images (None: all of the rest)."""
    image_px: tuple[int, int] = (64, 64)
    """Crop height and width in pixels, for training and (long side) for inference."""
    scale_jitter: tuple[float, float] = (0.8, 1.25)
    """Range of the random resize of the weak view, relative to the fitted size."""
    flip: bool = True
    color_jitter: float = Field(0.1, ge=0)
    """Strength of the weak view's colour jitter; the strong view's is fixed by the paper (.4/.4/.4/.1)."""
    shapes: ShapesConfig = ShapesConfig()
