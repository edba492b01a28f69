"""The only configuration: one frozen, strict recipe per run.

A recipe is built from a preset (`cast_ray/presets/<name>.yaml`), one of that preset's scales and dotted overrides
(`loss.lambda_pxl=0.2`). Unknown keys and bad values are refused with the key's full path and the nearest known key.
Everything that can change a result is here; `plan/graph.py` cuts it into the part each stage's fingerprint covers.
"""

from cast_ray.recipe.build import (
    CHOSEN_FIRST,
    SCALES,
    Recipe,
    apply_override,
    build_recipe,
    parse_overrides,
    preset_names,
    recipe_keys,
)
from cast_ray.recipe.data import DataConfig, ShapesConfig
from cast_ray.recipe.input_size import InputSize
from cast_ray.recipe.labels import LabelsConfig
from cast_ray.recipe.losses import CONTRASTIVE_PRESETS, ContrastiveConfig, LossConfig
from cast_ray.recipe.models import STUDENT_PRESETS, EncoderConfig, ModelConfig
from cast_ray.recipe.runtime import Precision, RuntimeConfig
from cast_ray.recipe.stages import EvaluationConfig, PseudoConfig, StagesConfig, TrainConfig
from cast_ray.recipe.teachers import GroundedSamConfig, InferenceConfig, PromptConfig, Sam3Config, TeacherConfig

__all__ = [
    "CHOSEN_FIRST",
    "CONTRASTIVE_PRESETS",
    "ContrastiveConfig",
    "DataConfig",
    "EncoderConfig",
    "EvaluationConfig",
    "LabelsConfig",
    "GroundedSamConfig",
    "InferenceConfig",
    "InputSize",
    "LossConfig",
    "ModelConfig",
    "Precision",
    "PromptConfig",
    "PseudoConfig",
    "Recipe",
    "RuntimeConfig",
    "SCALES",
    "STUDENT_PRESETS",
    "Sam3Config",
    "ShapesConfig",
    "StagesConfig",
    "TeacherConfig",
    "TrainConfig",
    "apply_override",
    "build_recipe",
    "parse_overrides",
    "preset_names",
    "recipe_keys",
]
