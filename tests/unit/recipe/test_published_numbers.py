"""Every number of the published experiments beside where it was published: a preset that drifts fails here.

Each entry names a field of the recipe, its value and its source: the paper's section (arXiv 2505.21904 and 2604.03841)
or the key of the released configuration (the authors' detectron2 fork) with its value in words. `OURS` are the values
that nobody published, each with the reason for it; docs/fidelity.md says the same in prose.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import pytest
import yaml

from cast_ray.recipe import CONTRASTIVE_PRESETS, SCALES, Recipe, build_recipe, preset_names


class Published(NamedTuple):
    """One number: dotted field of the recipe, value, and where it stands."""

    field: str
    value: Any
    source: str


SHARED = (
    Published("data.label_fraction", 0.1, "paper, main table: 10 % of the images are labelled (5 and 30 % in another)"),
    Published("data.scale_jitter", (0.5, 2.0), "released, INPUT.MIN_SIZE_TRAIN: from .5 to 2.0 times the test size"),
    Published("data.scale_steps", 16, "released, INPUT.MIN_SIZE_TRAIN: 16 values, one chosen"),
    Published("data.color", "ssd", "released, INPUT.COLOR_AUG_SSD: on"),
    Published("data.drop_empty", True, "released, DATALOADER.FILTER_EMPTY_ANNOTATIONS: on"),
    Published("data.flip", True, "released, INPUT.RANDOM_FLIP: horizontal"),
    Published("stages.images_per_step", "total", "released, SOLVER.IMS_PER_BATCH: 8 in every run"),
    Published("stages.distill.batch_labelled", 4, "released, SOLVER.IMS_PER_BATCH: half of 8 where D_u takes part"),
    Published("stages.distill.batch_unlabelled", 4, "released, SOLVER.IMS_PER_BATCH: half of 8"),
    Published("stages.refine.batch_labelled", 8, "released, SOLVER.IMS_PER_BATCH: 8"),
    Published("stages.distill.encoder_lr_factor", 0.1, "released, SOLVER.BACKBONE_MULTIPLIER: .1"),
    Published("stages.distill.clip_norm", 0.01, "released, SOLVER.CLIP_GRADIENTS: full model at .01"),
    Published("stages.distill.decay_biases", True, "released: as Mask2Former, only norms and embeddings are exempt"),
    Published("stages.distill.schedule", "poly", "released, SOLVER.LR_SCHEDULER_NAME: warm-up poly"),
    Published("stages.distill.poly_power", 0.9, "released, SOLVER.POLY_LR_POWER: .9"),
    Published("stages.distill.warmup_steps", 0, "released, SOLVER.WARMUP_ITERS: none"),
    Published("stages.distill.ema", 0, "released: the raw weights are evaluated"),
    Published("student.encoder.name", "dinov2-s", "paper, student: DINOv2-S encoder"),
    Published("student.encoder.checkpoint", "hub", "paper, student: pretrained weights of DINOv2"),
    Published("student.decoder", "dpt", "paper, student: DPT decoder"),
    Published("student.num_queries", 100, "released, MODEL.MASK_FORMER.NUM_OBJECT_QUERIES: 100"),
    Published(
        "student.num_layers", 9, "released, MODEL.MASK_FORMER.DEC_LAYERS: 10, of which one is the loss of the queries"
    ),
    Published("student.num_heads", 8, "released, MODEL.MASK_FORMER.NHEADS: 8"),
    Published("student.feedforward_dim", 2048, "released, MODEL.MASK_FORMER.DIM_FEEDFORWARD: 2048"),
    Published("student.proposals", False, "released: learnt queries, as in Mask2Former"),
    Published("loss.num_points", 12544, "released, MODEL.MASK_FORMER.TRAIN_NUM_POINTS: 12544"),
    Published("loss.oversample_ratio", 3.0, "released, MODEL.MASK_FORMER.OVERSAMPLE_RATIO: 3"),
    Published("loss.importance_ratio", 0.75, "released, MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO: .75"),
    Published("loss.class_weight", 2.0, "released, MODEL.MASK_FORMER.CLASS_WEIGHT: 2"),
    Published("loss.mask_weight", 5.0, "released, MODEL.MASK_FORMER.MASK_WEIGHT: 5"),
    Published("loss.dice_weight", 5.0, "released, MODEL.MASK_FORMER.DICE_WEIGHT: 5"),
    Published("loss.no_object_weight", 0.1, "released, MODEL.MASK_FORMER.NO_OBJECT_WEIGHT: .1"),
    Published("loss.lambda_pxl", 0.1, "released: .1; paper: swept over .01, .1, .2 and .5"),
    Published("loss.lambda_semi", 1.0, "paper, step 1c: 1"),
    Published("pseudo.score_threshold", 0.3, "paper, pseudo-labels: boxes with a score above .3"),
    Published("pseudo.max_per_image", 100, "paper, pseudo-labels: at most 100"),
    Published("pseudo.non_overlapping", True, "paper, pseudo-labels: painted, the first takes a pixel"),
    Published("teacher.kind", "grounded_sam", "paper, teacher: MM-Grounding-DINO and SAM2.1"),
    Published("teacher.inference.score_threshold", 0.3, "paper, pseudo-labels: .3"),
    Published("teacher.inference.max_detections", 100, "paper, pseudo-labels: at most 100"),
    Published("teacher.grounded_sam.detector", "openmmlab-community/mm_grounding_dino_large_all", "paper: Swin-L"),
    Published("teacher.grounded_sam.segmenter", "facebook/sam2.1-hiera-large", "paper: SAM2.1-L"),
    Published("teacher.grounded_sam.segmenter_lr_factor", 0.1, "paper, teacher: SAM2 at 5e-6, the detector at 5e-5"),
    Published("teacher.grounded_sam.mask_focal_weight", 20.0, "paper, teacher: 20 focal + dice"),
    Published("teacher.grounded_sam.mask_dice_weight", 1.0, "paper, teacher: 20 focal + dice"),
    *(
        published
        for stage in ("adapt", "selftrain")
        for published in (
            Published(f"stages.{stage}.lr", 5e-5, "paper, teacher: AdamW at 5e-5"),
            Published(f"stages.{stage}.weight_decay", 0.01, "paper, teacher: weight decay .01"),
            Published(f"stages.{stage}.clip_norm", 0.1, "paper, teacher: clipped at .1"),
            Published(f"stages.{stage}.encoder_lr_factor", 0.1, "paper, teacher: backbone at a tenth"),
        )
    ),
)
CITYSCAPES = (
    Published("data.image_px", (512, 1024), "released, INPUT.CROP.SIZE: 512 x 1024"),
    Published("data.train_resize", (1024, 4096), "released, INPUT: multiples of 1024, MAX_SIZE_TRAIN 4096"),
    Published(
        "data.inference_resize", "native", "released, INPUT.MIN_SIZE_TEST 1024, MAX_SIZE_TEST 2048: the files' size"
    ),
    Published("evaluation.metric", "cityscapes", "released, DATASETS.TEST: Cityscapes' own instance AP"),
    Published("stages.distill.lr", 5e-5, "released, SOLVER.BASE_LR: 5e-5"),
    Published("stages.distill.weight_decay", 0.1, "released, SOLVER.WEIGHT_DECAY: .1"),
    Published("stages.distill.steps", 90_000, "released, SOLVER.MAX_ITER: 90,000"),
    Published("stages.adapt.steps", 1_000, "paper, teacher: 1,000 iterations"),
    Published("stages.selftrain.steps", 1_000, "paper, teacher: 1,000 iterations"),
)
ADE20K = (
    Published("data.image_px", (630, 630), "released, INPUT.CROP.SIZE: 630 x 630"),
    Published("data.train_resize", (630, 2560), "released, INPUT: multiples of 630, MAX_SIZE_TRAIN 2560"),
    Published("data.inference_resize", (630, 2560), "released, INPUT.MIN_SIZE_TEST 630, MAX_SIZE_TEST 2560"),
    Published("evaluation.metric", "coco", "released, DATASETS.TEST: COCO AP"),
    Published("stages.distill.lr", 1e-4, "released, SOLVER.BASE_LR: 1e-4"),
    Published("stages.distill.weight_decay", 0.05, "released, SOLVER.WEIGHT_DECAY: .05"),
    Published("stages.distill.steps", 160_000, "released, SOLVER.MAX_ITER: 160,000"),
    Published("stages.adapt.steps", 10_000, "paper, teacher: 10,000 iterations"),
    Published("stages.selftrain.steps", 10_000, "paper, teacher: 10,000 iterations"),
)
PUBLISHED = {"cityscapes": SHARED + CITYSCAPES, "ade20k": SHARED + ADE20K}
"""Preset at scale `full` -> its published values."""

CONTRAST = {
    "paper": (
        Published("contrastive.kind", "cast", "paper, equation of L_pxl: instance-aware pixel contrast"),
        Published("contrastive.sampler", "fusion", "paper, negatives: P_m and F_c together (table of samplers)"),
        Published("contrastive.normalise", "l2", "paper, negatives: y over its length"),
        Published("contrastive.scope", "batch", "paper, negatives: any pixel of the batch"),
        Published("contrastive.gather", True, "paper, negatives: of the whole batch, whichever worker holds it"),
        Published("contrastive.estimator", "sampled", "paper, equation of L_pxl: R negatives are drawn"),
        Published("contrastive.temperature_end", None, "paper, equation of L_pxl: T is one number"),
        Published("contrastive.hinge", None, "paper, equation of L_pxl: no hinge"),
        Published("contrastive.strong_grad", True, "paper: both views are projected by the network in training"),
        Published("contrastive.head", "shared", "paper: one MLP projects both views"),
    ),
    "released": (
        Published("contrastive.kind", "cast", "released, the pixel loss"),
        Published("contrastive.sampler", "class", "released, y: class probabilities alone"),
        Published("contrastive.normalise", "sum", "released, y: divided by its sum"),
        Published("contrastive.scope", "cross-image", "released: negatives of the other images only"),
        Published("contrastive.gather", False, "released: of one process's own images"),
        Published("contrastive.estimator", "sampled", "released: negatives are drawn"),
        Published("contrastive.num_negatives", 200, "released, number of negatives: 200"),
        Published("contrastive.replacement", False, "released: Gumbel top-k, without replacement"),
        Published("contrastive.num_anchors", None, "released: every pixel is an anchor"),
        Published("contrastive.pool_size", None, "released: every pixel may be a negative"),
        Published("contrastive.temperature", 0.3, "released, temperature: from .3"),
        Published("contrastive.temperature_end", 0.07, "released, temperature: to .07, linear"),
        Published("contrastive.temperature_steps", 90_000, "released, temperature: over 90,000 steps"),
        Published("contrastive.hinge", 0.5, "released: max(0, s - .5) after dividing by T"),
        Published("contrastive.strong_grad", False, "released: no gradient through the strong view"),
        Published("contrastive.head", "frozen", "released: the strong view's head is a copy of the initial one"),
        Published("contrastive.feature_stride", None, "released: the coarsest encoder map, stride 28"),
        Published("contrastive.projection_dims", (128, 128, 128), "released, head: 768-128-128-128"),
        Published("contrastive.projection_bias", False, "released, head: without biases"),
    ),
}
"""Named variant of the contrastive term -> its published values."""

OURS = {
    "data.format": "names the dataset",
    "student.hidden_dim": "256 as in Mask2Former; the released 384 belongs to the released student as a whole",
    "contrastive.feature_stride": "the paper does not name the map; stride 16 is the patch grid itself",
    "evaluation.batch": "changes no result",
    "stages.pretrain.steps": "theta_T0 is downloaded",
    "stages.adapt.batch_labelled": "nobody says how many images the teacher sees in a step: the student's 8",
    "stages.selftrain.batch_labelled": "as adapt, half of each",
    "stages.selftrain.batch_unlabelled": "as adapt, half of each",
    "stages.adapt.ema": "published teachers are not averaged",
    "stages.selftrain.ema": "published teachers are not averaged",
    "stages.adapt.accumulate": "changes no result",
    "stages.selftrain.accumulate": "changes no result",
    "stages.distill.checkpoint_every_steps": "changes no result",
    "stages.refine.steps": "step 3 has no published length",
    "stages.refine.lr": "step 3 has no published rate: a tenth of step 2b's",
    **{
        f"stages.refine.{name}": "as step 2b"
        for name in (
            "weight_decay",
            "decay_biases",
            "clip_norm",
            "encoder_lr_factor",
            "schedule",
            "poly_power",
            "ema",
            "checkpoint_every_steps",
        )
    },
    "teacher.prompt.synonyms": "the paper asks for the names alone",
}
"""Field that a preset sets and nobody published -> why it has its value."""


def value_of(recipe: Recipe, field: str) -> Any:
    node: Any = recipe
    for name in field.split("."):
        node = getattr(node, name)
    return node


@cache
def fields_set_by(preset: str) -> frozenset[str]:
    """Dotted fields that the preset's own file sets for scale `full`."""
    spec = yaml.safe_load((resources.files("cast_ray") / "presets" / f"{preset}.yaml").read_text())

    def walk(node: Any, prefix: str) -> list[str]:
        if not isinstance(node, dict) or prefix == "teacher.prompt.synonyms.":
            return [prefix.removesuffix(".")]
        return [field for name, value in node.items() for field in walk(value, f"{prefix}{name}.")]

    return frozenset(walk(spec["recipe"], "")) | frozenset(walk(spec["scales"].get("full") or {}, "")) - {""}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_has_the_published_values(preset: str) -> None:
    recipe = build_recipe(preset, "full")
    drifted = [
        f"{field} is {value_of(recipe, field)!r}, published {value!r} ({source})"
        for field, value, source in PUBLISHED[preset]
        if value_of(recipe, field) != value
    ]
    assert not drifted


@pytest.mark.parametrize("variant", CONTRAST)
def test_a_variant_of_the_contrast_has_the_published_values(variant: str) -> None:
    recipe = build_recipe("cityscapes", "full", {"contrastive": variant})
    drifted = [f"{p.field}: {p.source}" for p in CONTRAST[variant] if value_of(recipe, p.field) != p.value]
    assert not drifted
    named = {p.field.removeprefix("contrastive.") for p in CONTRAST[variant]}
    assert named == set(CONTRASTIVE_PRESETS[variant]), "a value without a source, or a source without a value"


@pytest.mark.parametrize("preset", PUBLISHED)
def test_every_value_that_a_preset_sets_has_a_source_or_a_reason(preset: str) -> None:
    published = {p.field for p in PUBLISHED[preset]}
    assert fields_set_by(preset) - published - OURS.keys() == set()
    assert not published & OURS.keys()


@pytest.mark.parametrize("preset", PUBLISHED)
def test_refinement_fine_tunes_at_a_tenth_of_the_rate(preset: str) -> None:
    stages = build_recipe(preset, "full").stages
    assert stages.refine.lr == pytest.approx(stages.distill.lr / 10)
    rest = {"lr", "steps", "batch_labelled", "batch_unlabelled"}
    assert stages.refine.model_dump(exclude=rest) == stages.distill.model_dump(exclude=rest)


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("scale", SCALES)
def test_no_preset_refines_at_more_than_a_tenth(preset: str, scale: str) -> None:
    stages = build_recipe(preset, scale).stages
    assert stages.refine.lr <= stages.distill.lr / 10 * (1 + 1e-9)
