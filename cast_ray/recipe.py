"""The only configuration: one frozen, strict recipe per run.

A recipe is built from a preset (`cast_ray/presets/<name>.yaml`), one of that preset's scales and dotted overrides
(`loss.lambda_pxl=0.2`). Unknown keys and bad values are refused with the key's full path and the nearest known key.
Everything that can change a result is here; `stages/graph.py` cuts it into the part each stage's fingerprint covers.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCALES = ("smoke", "demo", "full")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


class ShapesConfig(_Part):
    """How many scenes the embedded `shapes` dataset holds."""

    num_source: int = Field(1500, ge=8)
    """Scenes in the source style, all labelled: what the "foundation" teacher is pre-trained on."""
    num_train: int = Field(500, ge=8)
    """Scenes in the target style, split into labelled and unlabelled by `label_fraction`."""
    num_val: int = Field(200, ge=4)
    seed: int = 0
    """Seed of the drawing, apart from the recipe's own seed: all seeds of a sweep see the same scenes."""


class DataConfig(_Part):
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


class EncoderConfig(_Part):
    """One encoder by registry name, with what its builder takes."""

    name: str = "convnext"
    widths: tuple[int, ...] = (16, 32, 64, 128)
    depths: tuple[int, ...] = (1, 1, 1, 1)
    stem_stride: int = Field(4, ge=1)
    """Stride of the first stage; each further one halves. 2 suits images of 64 px, 4 is the usual."""
    checkpoint: str = ""
    """Folder or hub name for `from_pretrained`; empty: random weights."""


class ModelConfig(_Part):
    """A mask-classification segmenter: encoder, decoder, masked-attention head."""

    encoder: EncoderConfig = EncoderConfig()
    decoder: str = "dpt"
    hidden_dim: int = Field(48, ge=8)
    num_queries: int = Field(16, ge=1)
    num_layers: int = Field(3, ge=1)
    """Masked-attention layers."""
    num_heads: int = Field(4, ge=1)
    feedforward_dim: int = Field(128, ge=8)
    proposals: bool = True
    """Initialise the queries from dense location-assigned proposals (else learnt queries, as in Mask2Former)."""


class TrainConfig(_Part):
    """Optimisation of one stage. Batch sizes are global: they do not change with the number of workers."""

    steps: int = Field(400, ge=0)
    batch_labelled: int = Field(8, ge=1)
    batch_unlabelled: int = Field(8, ge=0)
    """Unlabelled images added to every step where the row uses them; never swapped for labelled ones."""
    lr: float = Field(2e-3, gt=0)
    encoder_lr_factor: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["hold-decay", "poly", "constant"] = "hold-decay"
    decay_fraction: float = Field(0.3, ge=0, le=1)
    """Last share of the steps over which hold-decay falls linearly to 0."""
    poly_power: float = 0.9
    ema: float = Field(0.995, ge=0, lt=1)
    """Decay of the weight average that is evaluated and handed on; 0: the raw weights."""
    checkpoint_every_steps: int = Field(200, ge=1)


class StagesConfig(_Part):
    """The six steps of CAST and which of them a row takes."""

    foundation: str = ""
    """Folder of a saved teacher (`model.json`, `model.safetensors`) to use as theta_T0 instead of `pretrain`."""
    pretrain: TrainConfig = TrainConfig(steps=1000, batch_unlabelled=0)
    """theta_T0 of the embedded experiment: the teacher trained on the source style, in place of a foundation model."""
    adapt: TrainConfig = TrainConfig(steps=300, batch_unlabelled=0)
    """1a: theta_T0 -> theta_T' on D_l."""
    selftrain: TrainConfig = TrainConfig(steps=300)
    """1c: theta_T0 -> theta_T'' on D_l + D_u."""
    distill: TrainConfig = TrainConfig(steps=400)
    """2b: student -> theta_s* on D_l + D_u."""
    refine: TrainConfig = TrainConfig(steps=100, batch_unlabelled=0, lr=5e-4)
    """3: theta_s* -> theta_s-dagger on D_l."""
    use_adapt: bool = True
    """False: the teacher labels D_u as theta_T0 (paper table "stages")."""
    use_distill: bool = True
    """False: the student is trained on D_l only."""
    use_refine: bool = True


class LossConfig(_Part):
    """J = L_sup + lambda_semi L_semi + lambda_pxl L_pxl and the weights inside the set loss."""

    lambda_semi: float = Field(1.0, ge=0)
    """Weight of the pseudo-label loss of the student. The teacher's own (1c) is 1 where this is above 0."""
    lambda_pxl: float = Field(0.1, ge=0)
    class_weight: float = Field(2.0, ge=0)
    mask_weight: float = Field(5.0, ge=0)
    dice_weight: float = Field(5.0, ge=0)
    no_object_weight: float = Field(0.1, ge=0)
    cost_class: float = Field(2.0, ge=0)
    """Class cost of the matcher (transformers' Mask2FormerLoss hard-codes 1)."""
    cost_mask: float = Field(5.0, ge=0)
    cost_dice: float = Field(5.0, ge=0)
    num_points: int = Field(12544, ge=1)
    oversample_ratio: float = Field(3.0, ge=1)
    importance_ratio: float = Field(0.75, ge=0, le=1)
    exact: bool = True
    """Mask2Former's point sampling; False: faster, coarser matching points and uniform loss points."""
    proposal_weight: float = Field(1.0, ge=0)
    """Weight of the dense proposals' auxiliary loss (models with `proposals` only)."""
    pseudo_weighting: Literal["hard", "score"] = "hard"
    """Weight of a pseudo-label: 1, or the teacher's score."""


class ContrastiveConfig(_Part):
    """L_pxl. The defaults are the paper's column of the method; `contrastive=released` is the authors' code."""

    kind: Literal["cast", "supervised", "pc2seg", "infonce", "none"] = "cast"
    """cast, or a rival: class-supervised pixel contrast, debiased pixel contrast, plain cross-view InfoNCE."""
    sampler: Literal["uniform", "mask", "class", "fusion", "oracle"] = "fusion"
    scope: Literal["batch", "same-image", "cross-image"] = "batch"
    """Where negatives may lie: any pixel of the batch, the anchor's image only, the other images only."""
    estimator: Literal["sampled", "expectation"] = "sampled"
    normalise: Literal["l2", "sum"] = "l2"
    """How y is normalised before the inner product."""
    num_negatives: int = Field(64, ge=1)
    """R, drawn for each anchor."""
    num_anchors: int = Field(1024, ge=1)
    """Anchors drawn per image (all pixels when the map has fewer)."""
    pool_size: int = Field(4096, ge=1)
    """Candidate pixels of the batch from which negatives are drawn: bounds memory (anchors x pool)."""
    replacement: bool = True
    """Draw the R negatives with replacement (released: without, by Gumbel top-k)."""
    temperature: float = Field(0.1, gt=0)
    """T at the first step."""
    temperature_end: float | None = Field(None, gt=0)
    """T at `temperature_steps` (linear); None: constant."""
    temperature_steps: int = Field(90_000, ge=1)
    hinge: float | None = None
    """max(0, s- - hinge) on the negative similarities after dividing by T; None: no hinge."""
    strong_grad: bool = True
    """Whether gradients flow into the strong view's projection."""
    head: Literal["shared", "frozen", "ema"] = "shared"
    """The strong view's projection head: the same, a frozen copy of the initial one, or a moving average."""
    head_ema: float = Field(0.99, ge=0, lt=1)
    feature_stride: int = Field(8, ge=1)
    """Stride of the encoder map that is projected (0-cost rule: the coarsest map with a stride not above this)."""
    projection_dims: tuple[int, ...] = (128, 128)
    """Widths of the MLP after the encoder's own; the last is D."""
    projection_bias: bool = True
    gather: bool = False
    """All-gather the candidate pool across Train workers, so that a local batch of 1 still has negatives."""
    diagnostics_every_steps: int = Field(20, ge=1)


CONTRASTIVE_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        "sampler": "class",
        "scope": "cross-image",
        "normalise": "sum",
        "num_negatives": 200,
        "replacement": False,
        "temperature": 0.3,
        "temperature_end": 0.07,
        "hinge": 0.5,
        "strong_grad": False,
        "head": "frozen",
        "feature_stride": 32,
        "projection_dims": (128, 128, 128),
        "projection_bias": False,
    },
}


class PseudoConfig(_Part):
    """From teacher predictions to pseudo-labels (1b, 2a)."""

    score_threshold: float = Field(0.3, ge=0, le=1)
    max_per_image: int = Field(100, ge=1)
    min_area_px: int = Field(12, ge=0)
    non_overlapping: bool = True
    """Paint the masks in falling score order; a pixel belongs to the first that takes it."""


class EvaluationConfig(_Part):
    max_detections: int = Field(100, ge=1)
    batch: int = Field(16, ge=1)
    num_images: int | None = Field(None, ge=1)
    """Evaluate on the first so many validation images (None: all)."""


class RuntimeConfig(_Part):
    """Where and how wide it runs. Nothing here enters a fingerprint: it must not change a result."""

    num_workers: int = Field(1, ge=1)
    use_gpu: bool = False
    cpus_per_worker: float = Field(0.5, gt=0)
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    num_labellers: int = Field(1, ge=1)
    cpus_per_labeller: float = Field(0.5, gt=0)
    cpus_per_read: float = Field(0.2, gt=0)
    """Of one decoding task; a stream runs two at a time."""
    stream_memory_mb: int = Field(256, ge=16)
    """Object-store memory of one worker's stream: how far it may read ahead of training."""
    max_concurrent_stages: int = Field(0, ge=0)
    """Worker groups and labelling jobs at a time; 0: as many as the cluster's resources hold."""
    max_failures: int = Field(3, ge=0)
    """Times a stage's workers are restarted from the last checkpoint before its row fails."""


class Recipe(_Part):
    """Everything a run needs; see each part."""

    preset: str
    scale: Literal["smoke", "demo", "full"]
    seed: int = 0
    data: DataConfig = DataConfig()
    teacher: ModelConfig = ModelConfig()
    student: ModelConfig = ModelConfig()
    stages: StagesConfig = StagesConfig()
    loss: LossConfig = LossConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    pseudo: PseudoConfig = PseudoConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _batches_fill_workers(self) -> Recipe:
        for name in ("pretrain", "adapt", "selftrain", "distill", "refine"):
            stage: TrainConfig = getattr(self.stages, name)
            for field in ("batch_labelled", "batch_unlabelled"):
                size, workers = getattr(stage, field), self.runtime.num_workers
                if size % workers:
                    raise ValueError(
                        f"stages.{name}.{field} is {size}: expected a multiple of runtime.num_workers ({workers})"
                    )
        return self


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("cast_ray") / "presets"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def build_recipe(preset: str, scale: str = "demo", overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a preset at a scale, with dotted overrides applied last.

    Args:
        preset: a name from `preset_names()`.
        scale: smoke, demo or full.
        overrides: dotted key -> value; string values are read as YAML (`"1e-3"`, `"[64, 64]"`, `"true"`).

    Raises:
        ValueError: unknown preset, scale or key (the message names the nearest known one) or a bad value (the message
            names the key and what was expected).
    """
    if preset not in preset_names():
        raise ValueError(f"unknown preset {preset!r}{_nearest(preset, preset_names())}")
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}: expected one of {', '.join(SCALES)}")
    text = (resources.files("cast_ray") / "presets" / f"{preset}.yaml").read_text()
    spec = yaml.safe_load(text)
    tree: dict[str, Any] = {"preset": preset, "scale": scale}
    _merge(tree, spec.get("recipe", {}))
    _merge(tree, spec.get("scales", {}).get(scale, {}))
    for key, value in (overrides or {}).items():
        apply_override(tree, key, value)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["a.b=c", ...]` as a mapping. Raises ValueError for a pair without `=`."""
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {pair!r}: expected key=value, for example loss.lambda_pxl=0.2")
        parsed[key.strip()] = value
    return parsed


def apply_override(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets one dotted key in a nested mapping; `contrastive=NAME` expands a named column of the method.

    Raises:
        ValueError: the key is not a recipe field; the message names the nearest one.
    """
    if key == "contrastive":
        if value not in CONTRASTIVE_PRESETS:
            raise ValueError(f"contrastive={value!r}{_nearest(str(value), list(CONTRASTIVE_PRESETS))}")
        tree["contrastive"] = {**tree.get("contrastive", {}), **CONTRASTIVE_PRESETS[value]}
        return
    known = recipe_keys()
    if key not in known or key in ("preset", "scale"):
        raise ValueError(
            f"unknown recipe key {key!r}{_nearest(key, [k for k in known if k not in ('preset', 'scale')])}"
        )
    if isinstance(value, str):
        value = _parse_scalar(key, value)
    node = tree
    *path, leaf = key.split(".")
    for part in path:
        node = node.setdefault(part, {})
    node[leaf] = value


def recipe_keys() -> list[str]:
    """Every dotted key of a recipe, leaves only."""
    return list(_leaf_keys(Recipe, ""))


def _leaf_keys(model: type[BaseModel], prefix: str):
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _leaf_keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def _parse_scalar(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:  # YAML 1.1 reads 1e-3 as a string
            return float(value)
        except ValueError:
            return value
    if value is None and text.strip() == "":
        return ""
    return value


def _merge(tree: dict[str, Any], update: Mapping[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, Mapping):
            _merge(tree.setdefault(key, {}), value)
        else:
            tree[key] = value


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f": did you mean {close[0]!r}?" if close else f": expected one of {', '.join(known[:12])}"


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown recipe key {key!r}{_nearest(key, recipe_keys())}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {message} (got {problem['input']!r})" if key else message)
    return "; ".join(lines)
