"""Which images, which labels, and how the drawn ones are made."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

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
    """Which images, which of them keep their labels, and the size they are cropped to."""

    format: Literal["shapes", "coco", "cityscapes", "ade20k"] = "shapes"
    root: str = ""
    """Folder of the dataset. Empty for `shapes`: drawn into the storage path."""
    annotations: str = ""
    """COCO JSON of the training images, relative to root; empty: found by its usual names."""
    val_annotations: str = ""
    """COCO JSON of the validation images; empty: found, else a `val_fraction` of the images is held out."""
    val_fraction: float = Field(0.25, gt=0, lt=1)
    image_dir: str = ""
    """Folder of the training images; empty: found by the usual names of COCO, CVAT, FiftyOne and Roboflow."""
    val_image_dir: str = ""
    extra_annotations: str = ""
    """COCO JSON whose images are the extra unlabelled pool; empty: found (image_info_unlabeled*.json)."""
    extra_image_dir: str = ""
    """Folder of the extra unlabelled pool; empty: found (Cityscapes' train_extra, COCO's unlabeled2017)."""
    verify: Literal["full", "header", "none"] = "full"
    """What is read of every image, once for a dataset: all of it, its head (the size), or nothing.

    `full` finds truncated files and makes the dataset's hash one of all bytes. With `header` and `none` the sizes of
    files and images stand for their content: a file that is rewritten with as many bytes, and a copy of an image under
    another name, are not noticed.
    """
    max_image_pixels: int = Field(178_956_970, ge=1)
    """Larger images are taken for decompression bombs and skipped."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """The run stops before training when more than this share of a split's images or annotations is unusable."""
    label_family: Literal["nested", "per-class", "list"] = "nested"
    """How the labelled images are chosen: by a hash of their ids, so with `min_per_class` of each class, or listed."""
    label_fraction: float = Field(0.04, gt=0, le=1)
    """|D_l| / (|D_l| + |D_u|) before `unlabelled_fraction` and the extra pool; a list of names has its own."""
    min_per_class: int = Field(1, ge=1)
    """Family `per-class`: labelled images that hold each class, as far as the dataset has them."""
    label_list: str = ""
    """Family `list`: file that names the labelled images, one a line, or a JSON of published COCO splits."""
    unlabelled_list: str = ""
    """Family `list`: file that names D_u; empty: all that are not labelled."""
    split_seed: int | None = None
    """Seed of the choice of labelled images; None: the recipe's own, so that each seed has its own D_l."""
    unlabelled_pool: Literal["rest", "extra", "both"] = "rest"
    """D_u: training images that keep no label, the dataset's extra unlabelled images, or both."""
    unlabelled_fraction: float = Field(1.0, gt=0, le=1)
    """Share of those that D_u holds: smaller shares are inside larger ones."""
    num_unlabelled: int | None = Field(None, ge=0)
    """At most this many unlabelled images (None: no limit)."""
    image_px: tuple[int, int] = (64, 64)
    """Crop height and width in pixels, for training and (long side) for inference."""
    scale_jitter: tuple[float, float] = (0.8, 1.25)
    """Range of the random resize of the weak view, relative to the fitted size."""
    flip: bool = True
    color_jitter: float = Field(0.1, ge=0)
    """Strength of the weak view's colour jitter; the strong view's is fixed by the paper (.4/.4/.4/.1)."""
    copy_paste: float = Field(0.0, ge=0, le=1)
    """Probability that an image of the student (2b) gets instances of a random labelled image pasted over it."""
    shapes: ShapesConfig = ShapesConfig()

    @model_validator(mode="after")
    def _lists_belong_to_their_family(self) -> DataConfig:
        if self.label_family == "list" and not self.label_list:
            raise ValueError("data.label_list is empty: expected a file that names the labelled images")
        for field in ("label_list", "unlabelled_list"):
            if self.label_family != "list" and getattr(self, field):
                raise ValueError(f"data.{field} is given: expected data.label_family=list")
        if self.unlabelled_list and self.unlabelled_pool != "rest":
            raise ValueError("data.unlabelled_list names D_u: expected data.unlabelled_pool=rest")
        return self
