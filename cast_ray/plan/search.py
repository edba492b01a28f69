"""What a search varies, between which values, towards what: read from `sweeps/search/<name>.yaml`.

A point of the space is a row of recipe overrides, as in a table: its stages, their fingerprints and what is shared
follow from the recipe alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from cast_ray.common.text import nearest
from cast_ray.plan.ablation import DEFAULT_PRESET, DEFAULT_SCALE, resolve_recipe
from cast_ray.plan.metrics import check_objective, why_missing
from cast_ray.plan.yaml_files import explain, read_spec, shipped_folder
from cast_ray.recipe import CHOSEN_FIRST, Recipe
from cast_ray.recipe.part import Seed, StrictModel

SEARCH_DIR = shipped_folder("searches", "search")
RUNG_METRIC = "val/mask_ap"
"""What trials are stopped early by: AP on the validation images while the stage trains (percent)."""
REFUSED_SCHEDULERS = {
    "pbt": "its trials copy each other's weights through Tune's checkpoints, which Ray Train V2 leaves empty: it would "
    "run and exploit nothing",
    "pb2": "as pbt, it copies weights through Tune's checkpoints, which Ray Train V2 leaves empty",
    "hyperband": "it pauses trials, which kills their workers each time; asha stops them instead",
}


class Domain(StrictModel):
    """The values of one recipe key: a range (of integers where both ends are) or choices."""

    low: float | int | None = None
    high: float | int | None = None
    log: bool = False
    """Uniform in the logarithm."""
    choices: tuple[Any, ...] = ()

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Domain:
        if self.choices:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("expected either choices or low and high")
            return self
        if self.low is None or self.high is None or not self.low < self.high:
            raise ValueError(f"expected choices, or low below high, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log: expected low above 0, got {self.low}")
        return self

    @property
    def is_integer(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def ends(self) -> list[Any]:
        """Values at the border, for validation: all choices, or both ends."""
        return list(self.choices) or [self.low, self.high]


class EarlyStopping(StrictModel):
    """ASHA on one train stage: at each rung the best 1/`reduction` of the trials continue, and the others stop."""

    stage: Literal["distill"] = "distill"
    reduction: int = Field(2, ge=2)
    rungs: int = Field(2, ge=1)
    """Rungs before the end, at 1/reduction, 1/reduction^2, ... of the stage's steps."""

    def first_rung(self, steps: int) -> int:
        """Steps at the lowest rung, which is also how often the stage is validated."""
        return max(1, steps // self.reduction**self.rungs)


class SearchSpec(StrictModel):
    """One search: space, objectives, samplers, length."""

    name: str
    title: str
    objectives: dict[str, Literal["max", "min"]] = Field(min_length=1)
    """Metric of a row -> whether more or less of it is better; several: the Pareto front is sought."""
    space: dict[str, dict[str, Any]] = Field(min_length=1)
    """Recipe key -> its domain."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Dotted recipe key -> value of all trials; also `preset` and `scale`, where the command names none."""
    samplers: tuple[Literal["tpe", "random"], ...] = Field(("tpe", "random"), min_length=1)
    """Each is a study of its own with `num_trials` trials, so that they can be compared at equal budget."""
    num_trials: int = Field(16, ge=1)
    start: tuple[dict[str, Any], ...] = ()
    """Points tried first by every sampler, for example the published values."""
    scheduler: str = "none"
    """asha: stop trials early by `early_stopping`; none: run all to their end."""
    early_stopping: EarlyStopping = EarlyStopping()
    seed: Seed = 0
    """Seed of the samplers."""

    @model_validator(mode="after")
    def _is_sound(self) -> SearchSpec:
        self.domains()
        for name in self.objectives:
            try:
                check_objective(name)
            except ValueError as error:
                raise ValueError(f"objectives: {error}") from None
        if self.scheduler in REFUSED_SCHEDULERS:
            raise ValueError(f"scheduler: {self.scheduler} is refused: {REFUSED_SCHEDULERS[self.scheduler]}")
        if self.scheduler not in ("asha", "none"):
            raise ValueError(f"scheduler: expected asha or none, got {self.scheduler!r}")
        if self.scheduler == "asha" and len(self.objectives) > 1:
            raise ValueError("scheduler: asha ranks by one objective, this search has several: expected none")
        if len(set(self.samplers)) != len(self.samplers):
            raise ValueError(f"samplers: expected different ones, got {', '.join(self.samplers)}")
        for point in self.start:
            if missing := sorted(set(point) ^ set(self.space)):
                raise ValueError(f"start: expected a value of each key of the space and no other: {', '.join(missing)}")
        for where, point in self._probes():
            try:
                self.recipe(point)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        return self

    def _probes(self) -> list[tuple[str, dict[str, Any]]]:
        """Points whose recipes must be valid: the base, each domain's ends, the start."""
        ends = [(f"space, {key}", {key: value}) for key, domain in self.domains().items() for value in domain.ends()]
        return [("base", {}), *ends, *(("start", point) for point in self.start)]

    def domains(self) -> dict[str, Domain]:
        """Recipe key -> domain; raises ValueError naming the key of a malformed one."""
        domains = {}
        for key, spec in self.space.items():
            try:
                domains[key] = Domain.model_validate(spec)
            except ValidationError as error:
                raise ValueError(f"space, {key}: {explain(error, Domain)}") from None
        return domains

    @property
    def preset(self) -> str:
        return self.base.get("preset", DEFAULT_PRESET)

    @property
    def scale(self) -> str:
        return self.base.get("scale", DEFAULT_SCALE)

    def recipe(
        self,
        point: Mapping[str, Any],
        preset: str | None = None,
        scale: str | None = None,
        seed: int = 0,
        overrides: Mapping[str, Any] | None = None,
    ) -> Recipe:
        """The recipe of one point; arguments as `Table.row_recipe`. With asha its stage is validated at the rungs.

        Raises:
            ValueError: a bad value, or a trial that would end without one of the objectives.
        """
        base = {key: value for key, value in self.base.items() if key not in CHOSEN_FIRST}
        base = {**base, **(overrides or {}), "seed": seed}
        preset, scale = preset or self.preset, scale or self.scale
        recipe = resolve_recipe(preset, scale, base, point)
        if self.scheduler == "asha":
            steps = getattr(recipe.stages, self.early_stopping.stage).steps
            every = {"evaluation.every_steps": self.early_stopping.first_rung(steps)}
            recipe = resolve_recipe(preset, scale, {**base, **every}, point)
        for name in self.objectives:
            if reason := why_missing(name, recipe):
                raise ValueError(f"a trial would end without its objective {name}: {reason}")
        return recipe


def search_names() -> list[str]:
    """Names of the searches in `sweeps/search`."""
    return sorted(path.stem for path in SEARCH_DIR.glob("*.yaml"))


def load_search(name_or_path: str | Path) -> SearchSpec:
    """A search by name, or from a YAML file of your own.

    Raises:
        ValueError: no such search (the message names the nearest), or the file is not one (the message names the file
            and the key).
    """
    path = SEARCH_DIR / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"unknown search {str(name_or_path)!r}{nearest(str(name_or_path), search_names())}")
    return read_spec(path, SearchSpec, "title, objectives and space")
