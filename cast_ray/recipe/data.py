"""Which images, which labels, and how the drawn ones are made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cast_ray.common.registry import check_name
from cast_ray.recipe.input_size import InputSize, Resize
from cast_ray.recipe.part import CHANGES_NO_RESULT, OFF_BY_DEFAULT, Part, Seed


class ShapesConfig(Part):
    """Which scenes are drawn, and how many."""

    layout: Annotated[Literal["scattered", "crowded"], OFF_BY_DEFAULT] = "scattered"
    """scattered: 64 px, two to five shapes of four classes, some of which overlap. crowded: 128 px, four to six large
    discs of one colour that touch, so that telling objects of one class apart is the whole difficulty."""
    num_source: int = Field(1500, ge=8)
    """Scenes in the source style, all labelled: what the "foundation" teacher is pre-trained on."""
    num_train: int = Field(500, ge=8)
    """Scenes in the target style, split into labelled and unlabelled by `label_fraction`."""
    num_val: int = Field(200, ge=4)
    """Scenes in the target style that models are evaluated on."""
    seed: Seed = 0
    """Seed of the drawing, apart from the recipe's own seed: all seeds of a sweep see the same scenes."""


class DataConfig(Part):
    """Which images, which of them keep their labels, and the size they are cropped to."""

    format: str = "shapes"
    """How the dataset lies on disk: shapes, coco, cityscapes, ade20k, yolo, labelme, label_maps (one PNG or TIFF of
    object numbers for each image) or mask_files (one mask file for each object), or `MODULE:FUNCTION`, a reader of your
    own, which Python must be able to import here and in Ray's workers. See `examples/own_dataset.py`."""
    root: str = ""
    """Folder of the dataset. Empty for `shapes`: drawn into the storage path."""
    annotations: str = ""
    """COCO JSON of the training images, or the YAML file of a YOLO dataset, relative to root; empty: found by its usual
    names."""
    val_annotations: str = ""
    """COCO JSON of the validation images; empty: found, else a `val_fraction` of the images is held out."""
    crowds: Annotated[Literal["ignore", "objects"], OFF_BY_DEFAULT] = "ignore"
    """What annotations of a COCO file with `iscrowd` 1 are. ignore: regions of many objects, as COCO means it. objects:
    single objects, in exports of CVAT, datumaro and supervision, which write every mask that is no polygon so."""
    val_fraction: float = Field(0.25, gt=0, lt=1)
    """Share of the training images that is held out for evaluation where there is no validation file."""
    image_dir: str = ""
    """Folder of the training images; empty: found by the usual names of the format's tools. For labelme, label_maps and
    mask_files the folder of the split, with what belongs to its images."""
    val_image_dir: str = ""
    """Folder of the validation images; empty: found, as `image_dir`."""
    extra_annotations: str = ""
    """COCO JSON whose images are the extra unlabelled pool; empty: found (image_info_unlabeled*.json)."""
    extra_image_dir: str = ""
    """Folder of the extra unlabelled pool, as an absolute path, a URI or a path below `root`; empty: found (Cityscapes'
    train_extra, COCO's unlabeled2017)."""
    licence: Annotated[str, CHANGES_NO_RESULT] = ""
    """Licence of the images and labels: an SPDX identifier (CC-BY-4.0), the name of a dataset whose terms are known
    (coco, nuclei) or words of your own. Empty: that of the dataset which `format` is the layout of, or what a README.md
    in `root` says, else unknown. Plan, model card and report show it."""
    verify: Annotated[Literal["full", "header", "none"], CHANGES_NO_RESULT] = "full"
    """What is read of every image, once for a dataset: all of it, its head (the size), or nothing.

    `full` finds truncated files and makes the dataset's hash one of all bytes. With `header` and `none` the sizes of
    files and images stand for their content: a file that is rewritten with as many bytes, and a copy of an image under
    another name, are not noticed.
    """
    max_image_pixels: Annotated[int, CHANGES_NO_RESULT] = Field(178_956_970, ge=1)
    """Larger images are taken for decompression bombs and skipped."""
    max_bad_fraction: Annotated[float, CHANGES_NO_RESULT] = Field(0.01, ge=0, le=1)
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
    split_seed: Seed | None = None
    """Seed of the choice of labelled images; None: the recipe's own, so that each seed has its own D_l."""
    unlabelled_pool: Literal["rest", "extra", "both"] = "rest"
    """D_u: training images that keep no label, the dataset's extra unlabelled images, or both."""
    unlabelled_fraction: float = Field(1.0, gt=0, le=1)
    """Share of those that D_u holds: smaller shares are inside larger ones."""
    num_unlabelled: int | None = Field(None, ge=0)
    """At most this many unlabelled images (None: no limit)."""
    drop_empty: Annotated[bool, OFF_BY_DEFAULT] = False
    """Leave labelled images without an object out of D_l, as the published recipes do. D_u keeps its images without
    objects: which these are is hidden. `label_fraction` counts the images before they are left out."""
    image_px: tuple[int, int] = (64, 64)
    """Height and width of the training crops, pixels."""
    train_resize: Annotated[Resize, OFF_BY_DEFAULT] = "fit"
    """Size of a training image before `scale_jitter`: `fit` (the largest that fits into `image_px`, so that the jitter
    is relative to the crop), `native` (its own size), or [S, L]: the short side has S pixels times the jitter, the long
    side at most L."""
    scale_jitter: tuple[float, float] = (0.8, 1.25)
    """Range of the random factor of the weak view's size, relative to `train_resize`."""
    scale_steps: Annotated[int | None, OFF_BY_DEFAULT] = Field(None, ge=2)
    """Draw that factor from so many evenly spaced values of the range, its ends included; None: from all of it."""
    whole_images: Annotated[bool, OFF_BY_DEFAULT] = False
    """Train on whole images of `train_resize`, without jitter, instead of on crops; those of a step are padded to the
    largest of them. Teachers from published checkpoints are trained so, see `teacher.image_px`."""
    inference_resize: Annotated[Resize, OFF_BY_DEFAULT] = "fit"
    """Size of an image for evaluation, validation, prediction and the labels of an expert: `fit` (fitted into
    `image_px` and padded), `native` (its own size), or [S, L]: the short side has S pixels, the long side at most L.
    A trained model is saved with it."""
    flip: bool = True
    """Mirror a training image with probability 0.5."""
    color: Annotated[Literal["jitter", "ssd"], OFF_BY_DEFAULT] = "jitter"
    """Colours of the weak view. jitter: brightness, contrast and saturation by up to `color_jitter`. ssd: those of SSD
    (Liu et al. 2016) as Mask2Former has them: brightness +-32 of 255, contrast and saturation times .5 to 1.5, hue +-18
    of 180, each with probability .5."""
    color_jitter: float = Field(0.1, ge=0)
    """Strength of the weak view's colour jitter (`color=jitter`); the strong view's is fixed by the paper
    (.4/.4/.4/.1)."""
    copy_paste: Annotated[float, OFF_BY_DEFAULT] = Field(0.0, ge=0, le=1)
    """Probability that an image of the student (2b) gets instances of a random labelled image pasted over it; both are
    crops of one size, so not with `whole_images`."""
    shapes: ShapesConfig = ShapesConfig()

    @property
    def inference_size(self) -> InputSize:
        """The size at which a model trained on these crops sees whole images."""
        return InputSize(self.inference_resize, self.image_px)

    @field_validator("format")
    @classmethod
    def _is_known_or_of_ones_own(cls, value: str) -> str:
        check_name("datasets", value)
        return value

    @field_validator("train_resize", "inference_resize", mode="before")
    @classmethod
    def _is_a_rule_of_size(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            is_rule = len(value) == 2 and all(isinstance(side, int) for side in value) and 0 < value[0] <= value[1]
        else:
            is_rule = value in ("fit", "native")
        if not is_rule:
            raise ValueError("expected fit, native or [S, L], pixels of the short side and most of the long side")
        return value

    @model_validator(mode="after")
    def _crop_and_jitter_are_positive(self) -> DataConfig:
        if min(self.image_px) < 1:
            raise ValueError(f"data.image_px is {list(self.image_px)}: expected a height and a width of 1 or more")
        if self.copy_paste and self.whole_images:
            raise ValueError(
                f"data.copy_paste is {self.copy_paste} and data.whole_images true: instances are pasted between "
                "crops of one size; expected one of the two"
            )
        if not 0 < self.scale_jitter[0] <= self.scale_jitter[1]:
            raise ValueError(f"data.scale_jitter is {list(self.scale_jitter)}: expected a range above 0, low end first")
        return self

    @model_validator(mode="after")
    def _crowds_are_those_of_coco(self) -> DataConfig:
        if self.crowds != "ignore" and self.format != "coco" and ":" not in self.format:
            raise ValueError(
                f"data.crowds is {self.crowds} and data.format {self.format}: expected data.format=coco, whose files "
                "have iscrowd"
            )
        return self

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
