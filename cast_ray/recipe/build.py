"""A recipe from a preset, a scale and dotted overrides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ValidationError, field_validator, model_validator

from cast_ray.common.text import nearest
from cast_ray.recipe.data import DataConfig
from cast_ray.recipe.input_size import InputSize
from cast_ray.recipe.labels import FIXED_SIZE_BATCH, LabelsConfig
from cast_ray.recipe.losses import ContrastiveConfig, LossConfig
from cast_ray.recipe.models import BATCH_NORM_DECODERS, DRAWS_BY_WORKER, ModelConfig
from cast_ray.recipe.part import CHANGES_NO_RESULT, Part, Seed
from cast_ray.recipe.runtime import RuntimeConfig
from cast_ray.recipe.stages import EvaluationConfig, PseudoConfig, StagesConfig, TrainConfig
from cast_ray.recipe.strict_yaml import NotYamlError, read_yaml
from cast_ray.recipe.teachers import TeacherConfig
from cast_ray.recipe.variants import in_order, is_variant, variant_fields, variant_names

SCALES = ("smoke", "demo", "full")
CHOSEN_FIRST = ("preset", "scale")
"""Fields of a recipe that say what overrides are applied to, so that no override can set them."""


class Recipe(Part):
    """Everything a run needs; see each part."""

    preset: str
    """Name of the preset that the fields started from, see `cast_ray/presets/`."""
    scale: Literal["smoke", "demo", "full"]
    """Scale of the preset: smoke (a few steps), demo or full."""
    seed: Seed = 0
    """Seed of the label split, the initial weights, and the order of images and their views."""
    init_seed: Seed | None = None
    """Seed of the initial weights alone; None: `seed`."""
    order_seed: Seed | None = None
    """Seed of the order of images, their views and sampled points alone; None: `seed`."""
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: ModelConfig = ModelConfig()
    stages: StagesConfig = StagesConfig()
    loss: LossConfig = LossConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    pseudo: PseudoConfig = PseudoConfig()
    labels: LabelsConfig = LabelsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    checkpoint_licences: Annotated[tuple[str, ...], CHANGES_NO_RESULT] = ()
    """Licences of checkpoints of your own, each as NAME=LICENCE: the folder or hub name as another field has it, and an
    SPDX identifier or words. Of a checkpoint that is not here, `recipe/licences.py` or the README.md of its folder says
    it, else it is unknown."""

    @property
    def learns_from_teacher(self) -> bool:
        """Whether the student learns from a teacher's labels: L_semi of step 2b."""
        return self.loss.lambda_semi > 0 and self.stages.use_distill

    @field_validator("checkpoint_licences")
    @classmethod
    def _name_a_checkpoint_and_a_licence(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            name, _, licence = each.rpartition("=")
            if not name.strip() or not licence.strip():
                raise ValueError(f"expected NAME=LICENCE, for example models/mine=Apache-2.0, found {each!r}")
        return value

    @property
    def needs_foundation(self) -> bool:
        """Whether theta_T0 is imported: a saved teacher, or published checkpoints."""
        return bool(self.stages.foundation) or self.teacher.kind != "expert"

    def input_size(self, by_teacher: bool) -> InputSize:
        """The size at which the teacher, or the student, sees whole images: for labels, evaluation and prediction."""
        if by_teacher and self.teacher.image_px is not None:
            return InputSize.of(self.teacher.image_px)
        if by_teacher and self.teacher.kind != "expert":
            return InputSize("native")
        return self.data.inference_size

    @property
    def label_batch(self) -> int:
        """Images of a teacher's forward pass over D_u; see `labels.batch`."""
        if self.labels.batch is not None:
            return self.labels.batch
        return FIXED_SIZE_BATCH if self.input_size(by_teacher=True).is_fixed else 1

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

    @property
    def worker_counts(self) -> list[int]:
        """How many workers a train stage may have, largest first: those of an elastic run must divide all batches."""
        sizes = [size for stage in self._train_stages for size in (stage.batch_labelled, stage.batch_unlabelled)]
        counts = range(self.runtime.num_workers, self.runtime.least_workers - 1, -1)
        return [count for count in counts if not any(size % count for size in sizes)]

    @property
    def _train_stages(self) -> list[TrainConfig]:
        return [getattr(self.stages, name) for name in ("pretrain", "adapt", "selftrain", "distill", "refine")]

    @model_validator(mode="after")
    def _elastic_runs_draw_by_image(self) -> Recipe:
        if not self.runtime.is_elastic:
            return self
        is_expert = self.teacher.kind == "expert"
        is_tuned = self.stages.adapt.steps > 0 or self.stages.selftrain.steps > 0
        contrast = self.contrastive
        drawn = {f"teacher.kind={self.teacher.kind} draws prompts or dropped paths": not is_expert and is_tuned}
        models: dict[str, ModelConfig] = {"student": self.student} | ({"teacher": self.teacher} if is_expert else {})
        for part, model in models.items():
            drawn[f"{part}.encoder.name={model.encoder.name} drops paths"] = model.encoder.name in DRAWS_BY_WORKER
            drawn[f"{part}.head=eomt draws which queries see all patches"] = model.head == "eomt"
        drawn["contrastive.gather=false takes negatives of the own worker"] = (
            self.loss.lambda_pxl > 0 and not contrast.gather and contrast.scope != "same-image"
        )
        if reasons := [reason for reason, holds in drawn.items() if holds]:
            raise ValueError(
                f"runtime.min_workers={self.runtime.min_workers}: {reasons[0]} for each worker apart, so results would "
                "depend on the number of workers; expected runtime.min_workers=0"
            )
        return self

    @model_validator(mode="after")
    def _selected_labellers_exist(self) -> Recipe:
        runtime = self.runtime
        if runtime.labeller_selector and not runtime.num_labellers and self.labels.mode != "online":
            raise ValueError(
                "runtime.labeller_selector is set, and the workers that train also label, on nodes of "
                "runtime.worker_selector: expected runtime.num_labellers of at least 1, or labels.mode=online"
            )
        return self

    @model_validator(mode="after")
    def _batch_norm_sees_a_whole_step(self) -> Recipe:
        for part, model, stages in (
            ("student", self.student, ("distill", "refine")),
            ("teacher", self.teacher, ("pretrain", "adapt", "selftrain") if self.teacher.kind == "expert" else ()),
        ):
            for name in stages if model.decoder in BATCH_NORM_DECODERS and model.head != "eomt" else ():
                parts = getattr(self.stages, name).accumulate
                if parts > 1:
                    raise ValueError(
                        f"stages.{name}.accumulate is {parts} and {part}.decoder {model.decoder}: its batch norm needs "
                        f"all images of a step at once, expected stages.{name}.accumulate=1"
                    )
        return self

    @model_validator(mode="after")
    def _oracle_knows_every_image(self) -> Recipe:
        if self.contrastive.sampler == "oracle" and self.data.unlabelled_pool != "rest":
            raise ValueError(
                f"contrastive.sampler is oracle, data.unlabelled_pool {self.data.unlabelled_pool}: the extra pool "
                "has no ground truth, expected data.unlabelled_pool=rest"
            )
        return self

    @model_validator(mode="after")
    def _teacher_can_be_adapted(self) -> Recipe:
        if self.teacher.kind == "ensemble" and self.stages.use_adapt:
            raise ValueError(
                "teacher.kind is ensemble and stages.use_adapt is true: an ensemble is not fine-tuned as a whole; "
                "expected use_adapt=false, or adapt each member in its own run and name the adapted teachers' "
                "folders in teacher.ensemble.members"
            )
        return self

    @model_validator(mode="after")
    def _soft_targets_are_of_crops(self) -> Recipe:
        if self.loss.soft_targets != "off" and self.data.whole_images:
            raise ValueError(
                f"loss.soft_targets is {self.loss.soft_targets} and data.whole_images true: probabilities of images "
                "of several sizes are not padded to each other; expected one of the two"
            )
        return self

    @model_validator(mode="after")
    def _balanced_thresholds_see_all_images(self) -> Recipe:
        if self.pseudo.class_thresholds == "balanced" and self.labels.mode == "online":
            raise ValueError(
                "pseudo.class_thresholds is balanced and labels.mode online: the thresholds need the predictions on "
                "all of D_u; expected labels.mode=offline, or pseudo.class_thresholds=fixed"
            )
        return self

    @model_validator(mode="after")
    def _refreshed_labels_are_online(self) -> Recipe:
        if self.labels.refresh_steps and self.labels.mode != "online":
            raise ValueError(
                f"labels.refresh_steps is {self.labels.refresh_steps}: expected labels.mode=online with it, since "
                "labels that are written before training cannot be refreshed"
            )
        return self


@cache
def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("cast_ray") / "presets"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def build_recipe(
    preset: str, scale: str = "demo", overrides: Mapping[str, Any] | Sequence[str] | None = None
) -> Recipe:
    """The recipe of a preset at a scale, with dotted overrides applied last.

    Args:
        preset: a name from `preset_names()`.
        scale: smoke, demo or full.
        overrides: dotted key -> value; string values are read as YAML (`"1e-3"`, `"[64, 64]"`, `"true"`). Or the same
            as a list of `"key=value"`, as after --set.

    Raises:
        ValueError: unknown preset, scale or key (the message names the nearest known one) or a bad value (the message
            names the key and what was expected).
        TypeError: overrides of another form.
    """
    overrides = _as_mapping(overrides)
    if preset not in preset_names():
        raise ValueError(f"unknown preset {preset!r}{nearest(str(preset), preset_names())}")
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}: expected one of {', '.join(SCALES)}")
    spec = _preset(preset)
    tree: dict[str, Any] = {"preset": preset, "scale": scale}
    _merge(tree, spec.get("recipe", {}))
    _merge(tree, spec.get("scales", {}).get(scale, {}))
    for key, value in overrides.items():
        apply_override(tree, key, value)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def _as_mapping(overrides: Any) -> Mapping[str, Any]:
    """Overrides as dotted key -> value, from any of the forms that `build_recipe` takes."""
    if overrides is None:
        return {}
    is_list = isinstance(overrides, list | tuple)
    keys = overrides if is_list or isinstance(overrides, Mapping) else [overrides]
    if (not is_list and not isinstance(overrides, Mapping)) or not all(isinstance(key, str) for key in keys):
        raise TypeError(
            "overrides: expected dotted keys with their values, {'loss.lambda_pxl': 0.2}, or a list of 'key=value', "
            f"got {overrides!r}"
        )
    return parse_overrides(overrides) if is_list else overrides


@cache
def _preset(name: str) -> dict[str, Any]:
    path = resources.files("cast_ray") / "presets" / f"{name}.yaml"
    try:
        return read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["a.b=c", ...]` as a mapping, named variants before single fields. Raises ValueError for a pair without `=`."""
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {pair!r}: expected key=value, for example loss.lambda_pxl=0.2")
        parsed[key.strip()] = value
    return {key: parsed[key] for key in in_order(parsed)}


def apply_override(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets one dotted key in a nested mapping.

    `contrastive=NAME` and `student=NAME` set all fields of a named variant, `variant=NAME` those of both.

    Raises:
        ValueError: the key is not a recipe field; the message names the nearest one.
    """
    if is_variant(key):
        if value not in variant_names(key):
            raise ValueError(f"{key}={value!r}{nearest(str(value), variant_names(key))}")
        _merge(tree, variant_fields(key, value))
        return
    if key in CHOSEN_FIRST:
        raise ValueError(
            f"{key} is chosen before anything is overridden: expected the option --{key}, {key!r} in the `base` of a "
            f"table or search, or the argument `{key}` of build_recipe"
        )
    known = [k for k in recipe_keys() if k not in CHOSEN_FIRST]
    if key not in known:
        raise ValueError(f"unknown recipe key {key!r}{nearest(key, known)}")
    if isinstance(value, str):
        value = _parse_scalar(key, value)
    node = tree
    *path, leaf = key.split(".")
    for part in path:
        node = node.setdefault(part, {})
    node[leaf] = value


@cache
def recipe_keys() -> list[str]:
    """Every dotted key of a recipe, leaves only."""
    return list(_leaf_keys(Recipe, ""))


def _leaf_keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _leaf_keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def _parse_scalar(key: str, text: str) -> Any:
    try:
        value = read_yaml(text)
    except NotYamlError:
        return text
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return "" if value is None and text.strip() == "" else value


def _merge(tree: dict[str, Any], update: Mapping[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, Mapping):
            _merge(tree.setdefault(key, {}), value)
        else:
            tree[key] = value


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown recipe key {key!r}{nearest(key, recipe_keys())}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            whole_part = isinstance(problem["input"], Mapping)  # of several fields, which the message names
            lines.append(message if whole_part else f"{key}: {message} (got {problem['input']!r})")
    return "; ".join(lines)
