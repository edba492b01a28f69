"""CAST: semi-supervised knowledge distillation for instance segmentation, as a Ray ablation system.

The public names below are loaded when they are first used, so that `import cast_ray` loads neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cast_ray.common.version import VERSION as __version__

if TYPE_CHECKING:
    from cast_ray.evaluation.matches import load_matches
    from cast_ray.inference.labeller import load_teacher
    from cast_ray.models.student import Student
    from cast_ray.recipe import Recipe, build_recipe

__all__ = ["__version__", "Recipe", "Student", "build_recipe", "load_matches", "load_teacher"]

_HOMES = {
    "Recipe": "cast_ray.recipe",
    "Student": "cast_ray.models.student",
    "build_recipe": "cast_ray.recipe",
    "load_matches": "cast_ray.evaluation.matches",
    "load_teacher": "cast_ray.inference.labeller",
}


def __getattr__(name: str) -> Any:
    """Loads a public name from the module that holds it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Lists the public names along with those that are loaded."""
    return sorted({*globals(), *__all__})
