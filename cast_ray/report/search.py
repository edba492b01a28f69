"""The report of a search: best points, samplers at equal budget, importances, Pareto front, a table to go on with."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import optuna
import yaml
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from cast_ray.report.metrics import label_of
from cast_ray.runtime.study import best_trials
from cast_ray.stages.search_spec import SearchSpec

matplotlib.use("Agg")

COLOURS = {"tpe": "#0072B2", "random": "#999999"}
NUM_BEST = 5


@dataclass(frozen=True)
class SearchReport:
    """What was written."""

    markdown: Path
    best: Path | None
    """A table of the best points, for ablate.py; None: no trial has finished."""
    text: str


def write_search_report(
    spec: SearchSpec, studies: Mapping[str, optuna.Study], out: Path, recipe: Mapping[str, Any]
) -> SearchReport:
    """Writes `search.md`, `search.json`, `best.yaml` and the figures into `out`.

    Args:
        studies: by sampler.
        recipe: preset, scale and the user's overrides that all trials share, for `best.yaml`.
    """
    out.mkdir(parents=True, exist_ok=True)
    figures = {}
    if _draw_progress(spec, studies, out / "progress.png"):
        figures["Best value so far, by device-time spent"] = "progress.png"
    if _draw_importances(spec, studies, out / "importances.png"):
        figures["How much each key matters (PED-ANOVA over all samplers' finished trials)"] = "importances.png"
    if len(spec.objectives) == 2 and _draw_front(spec, studies, out / "pareto.png"):
        figures["Pareto front"] = "pareto.png"
    lines = [*_summary(spec, studies), "", *_best_rows(spec, studies), ""]
    page = [f"# {spec.title}", "", *lines]
    for caption, file in figures.items():
        page += [f"## {caption}", "", f"![{caption}]({file})", ""]
    markdown = out / "search.md"
    markdown.write_text("\n".join(page))
    (out / "search.json").write_text(json.dumps(_plain(spec, studies), indent=1) + "\n")
    best = None
    if front := _front(spec, studies):
        best = out / "best.yaml"
        best.write_text(yaml.safe_dump(best_table(spec, front, recipe), sort_keys=False, allow_unicode=True))
    return SearchReport(markdown, best, "\n".join(lines))


def best_table(spec: SearchSpec, front: Sequence[FrozenTrial], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The base recipe and the best points as a table that ablate.py runs, for example on more seeds.

    Early stopping validates beside training; the table does not, which changes no weight.
    """
    names = ["best"] if len(front) == 1 else [f"front {i + 1}" for i in range(len(front))]
    return {
        "title": f"{spec.title}: the best of the search",
        "metric": next(iter(spec.objectives)),
        "baseline": "base",
        "base": {**spec.base, **recipe},
        "rows": {"base": {}, **{name: dict(trial.params) for name, trial in zip(names, front)}},
    }


def _front(spec: SearchSpec, studies: Mapping[str, optuna.Study]) -> list[FrozenTrial]:
    """The best trials of all samplers together."""
    candidates = [trial for study in studies.values() for trial in best_trials(study)]
    signs = [1.0 if goal == "max" else -1.0 for goal in spec.objectives.values()]

    def score(trial: FrozenTrial) -> list[float]:
        return [sign * value for sign, value in zip(signs, trial.values)]

    def is_beaten(trial: FrozenTrial) -> bool:
        mine = score(trial)
        others = [score(other) for other in candidates if other is not trial]
        return any(all(a >= b for a, b in zip(other, mine)) and other != mine for other in others)

    kept: dict[str, FrozenTrial] = {}
    for trial in candidates:
        if not is_beaten(trial):
            kept.setdefault(json.dumps(trial.params, sort_keys=True), trial)
    front = sorted(kept.values(), key=lambda trial: score(trial), reverse=True)
    return front[:1] if len(signs) == 1 else front


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(states=(TrialState.COMPLETE,))


def _loss(index: int, goal: str, trial: FrozenTrial) -> float:
    """An objective with less being better, as PED-ANOVA takes it."""
    return trial.values[index] if goal == "min" else -trial.values[index]


def _device_s(trial: FrozenTrial) -> float:
    return float(trial.user_attrs.get("device_s", 0.0))


def _summary(spec: SearchSpec, studies: Mapping[str, optuna.Study]) -> list[str]:
    """One line a sampler: trials by what became of them, device-hours, the best value."""
    columns = [
        "sampler",
        "trials",
        "finished",
        "stopped early",
        "failed",
        "device-hours",
        *map(label_of, spec.objectives),
    ]
    rows = []
    for sampler, study in studies.items():
        status = [trial.user_attrs.get("status") for trial in study.trials]
        best = best_trials(study)
        found = [f"{trial.values[0]:.2f}" for trial in best] if len(spec.objectives) == 1 else [f"{len(best)} points"]
        rows.append(
            [
                sampler,
                str(sum(s in ("done", "pruned", "failed") for s in status)),
                *(str(status.count(s)) for s in ("done", "pruned", "failed")),
                f"{sum(map(_device_s, study.trials)) / 3600:.2f}",
                *(found + [""] * (len(spec.objectives) - len(found)) if found else [""] * len(spec.objectives)),
            ]
        )
    lines = _markdown(columns, rows)
    if len(studies) > 1 and len(spec.objectives) == 1:
        lines += ["", *_verdict(spec, studies)]
    return lines


def _verdict(spec: SearchSpec, studies: Mapping[str, optuna.Study]) -> list[str]:
    """How the samplers compare at the smallest device-time that all of them have spent."""
    paths = {sampler: _best_so_far(spec, study) for sampler, study in studies.items()}
    if not all(paths.values()):
        return []
    budget = min(path[-1][0] for path in paths.values())
    at = {}
    for sampler, path in paths.items():
        within = [value for hours, value in path if hours <= budget + 1e-12]
        if not within:
            return []
        at[sampler] = within[-1]
    values = ", ".join(f"{sampler} {value:.2f}" for sampler, value in at.items())
    return [f"At equal budget ({budget:.2f} device-hours each): {values}. One study each: a difference may be luck."]


def _best_so_far(spec: SearchSpec, study: optuna.Study) -> list[tuple[float, float]]:
    """(device-hours spent, best value) after each trial, in the order in which trials ended."""
    sign = 1.0 if next(iter(spec.objectives.values())) == "max" else -1.0
    path: list[tuple[float, float]] = []
    spent, best = 0.0, None
    ended = [t for t in study.trials if t.datetime_complete is not None]
    for trial in sorted(ended, key=lambda t: t.datetime_complete):  # type: ignore[arg-type, return-value]
        spent += _device_s(trial) / 3600
        if trial.state == TrialState.COMPLETE and (best is None or sign * trial.values[0] > sign * best):
            best = trial.values[0]
        if best is not None:
            path.append((spent, best))
    return path


def _best_rows(spec: SearchSpec, studies: Mapping[str, optuna.Study]) -> list[str]:
    """The best points with their keys."""
    if len(spec.objectives) > 1:
        chosen = _front(spec, studies)
    else:
        sign = 1.0 if next(iter(spec.objectives.values())) == "max" else -1.0
        everything = [trial for study in studies.values() for trial in _finished(study)]
        chosen = sorted(everything, key=lambda trial: -sign * trial.values[0])[:NUM_BEST]
    columns = ["row", *map(label_of, spec.objectives), *spec.space]
    rows = [
        [
            trial.user_attrs.get("row", ""),
            *(f"{v:.2f}" for v in trial.values),
            *(_short(trial.params[k]) for k in spec.space),
        ]
        for trial in chosen
    ]
    return _markdown(columns, rows) if rows else ["No trial has finished."]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in columns[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]


def _plain(spec: SearchSpec, studies: Mapping[str, optuna.Study]) -> dict[str, Any]:
    """All trials as plain data."""
    return {
        "title": spec.title,
        "objectives": spec.objectives,
        "space": spec.space,
        "studies": {
            sampler: [
                {
                    "number": trial.number,
                    "status": trial.user_attrs.get("status", trial.state.name.lower()),
                    "params": trial.params,
                    "values": trial.values,
                    "rungs": trial.intermediate_values,
                    **{k: trial.user_attrs.get(k) for k in ("row", "device_s", "error")},
                }
                for trial in study.trials
            ]
            for sampler, study in studies.items()
        },
    }


def _draw_progress(spec: SearchSpec, studies: Mapping[str, optuna.Study], path: Path) -> bool:
    """Best value so far of each sampler; False where there is nothing or more than one objective."""
    paths = {sampler: _best_so_far(spec, study) for sampler, study in studies.items()}
    if len(spec.objectives) > 1 or not any(paths.values()):
        return False
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for sampler, points in paths.items():
        if points:
            hours, values = zip(*points)
            axes.step(hours, values, where="post", color=COLOURS[sampler], label=sampler)
            axes.plot(hours, values, ".", color=COLOURS[sampler])
    axes.set_xlabel("device-hours spent")
    axes.set_ylabel(f"best {label_of(next(iter(spec.objectives)))}")
    axes.legend(frameon=False)
    _finish(figure, path)
    return True


def _draw_importances(spec: SearchSpec, studies: Mapping[str, optuna.Study], path: Path) -> bool:
    """Bars of each objective's importances; False with too few finished trials."""
    together = optuna.create_study(directions=list(next(iter(studies.values())).directions))
    for study in studies.values():
        together.add_trials(_finished(study))
    if len(together.trials) < 4:
        return False
    figure = Figure(figsize=(6, 1.2 + 0.4 * len(spec.space) * len(spec.objectives)), layout="constrained")
    panels = figure.subplots(len(spec.objectives), 1, squeeze=False)[:, 0]
    for i, (axes, (name, goal)) in enumerate(zip(panels, spec.objectives.items())):
        with warnings.catch_warnings():  # that it takes less for better, which `_loss` sees to
            warnings.simplefilter("ignore", UserWarning)
            shares = optuna.importance.get_param_importances(together, target=partial(_loss, i, goal))
        keys = list(reversed(shares))
        axes.barh(keys, [shares[key] for key in keys], color=COLOURS["tpe"])
        axes.set_xlim(0, 1)
        axes.set_title(f"importance for {label_of(name)} ({len(together.trials)} trials)", fontsize=10)
    _finish(figure, path)
    return True


def _draw_front(spec: SearchSpec, studies: Mapping[str, optuna.Study], path: Path) -> bool:
    """All finished trials of two objectives and the line through those that none beats in both."""
    if not any(map(_finished, studies.values())):
        return False
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    (first, second) = spec.objectives
    for sampler, study in studies.items():
        if trials := _finished(study):
            values = [trial.values for trial in trials]
            axes.plot(
                [v[1] for v in values], [v[0] for v in values], "o", color=COLOURS[sampler], label=sampler, alpha=0.7
            )
    front = sorted(_front(spec, studies), key=lambda trial: trial.values[1])
    axes.step(
        [t.values[1] for t in front], [t.values[0] for t in front], where="post", color="#D55E00", label="Pareto front"
    )
    axes.set_xlabel(label_of(second))
    axes.set_ylabel(label_of(first))
    axes.legend(frameon=False)
    _finish(figure, path)
    return True


def _finish(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
