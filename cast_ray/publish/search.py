"""The report of a search: samplers at equal budget, best points, Pareto front, importances, a table of the best points.

Made from the run folder's `search.json` (what was asked for) and the studies, which hold all that is known of a trial.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.markdown import Markdown

from cast_ray.common.files import write_atomically
from cast_ray.common.paths import is_uri
from cast_ray.contracts.row_result import RowResult
from cast_ray.plan.metrics import is_latency
from cast_ray.plan.search import SearchSpec
from cast_ray.report.blocks import Article, Column, Figure, Grid, Panel, Section, Series, Words, section
from cast_ray.report.exports import markdown_page
from cast_ray.report.metrics import format_value, label_of
from cast_ray.report.notes import context_of, progress_of
from cast_ray.report.write import write_page
from cast_ray.runtime.search.study import ENDED, best_trials, open_storage
from cast_ray.runtime.sweep.row_results import SweepContext

SEARCH = "search.json"
"""File of a run folder that says which search its studies belong to."""
NUM_BEST = 5
MAX_LINES = 500
"""Most lines of the table of all trials on a page; `report.json` has all."""
MIN_IMPORTANCE_TRIALS = 4
STATUS = {"done": "done", "pruned": "stopped early", "failed": "FAILED", "stopped": "interrupted"}

Studies = Mapping[str, optuna.Study]
"""By sampler."""


@dataclass(frozen=True)
class SearchRun:
    """What a search was asked for. study: database URL, or journal file relative to the run folder.

    recipe: preset, scale and the user's overrides that all trials share, for `best.yaml`.
    """

    name: str
    spec: SearchSpec
    study: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    context: Mapping[str, str] = field(default_factory=dict)

    def write(self, out: Path) -> None:
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content |= {"spec": self.spec.model_dump(mode="json"), "study": _inside(self.study, out)}
        write_atomically(out / SEARCH, json.dumps(content, indent=1, default=list) + "\n")

    @staticmethod
    def read(out: Path) -> SearchRun:
        """The plan in a run folder; raises ValueError where its file is not one."""
        try:
            content = json.loads((out / SEARCH).read_text())
            return SearchRun(**content | {"spec": SearchSpec.model_validate(content["spec"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{out / SEARCH}: not the plan of a search: {error}") from None


@dataclass(frozen=True)
class SearchReport:
    """What was written. best: a table of the best points, for `cast-ray ablate`; None: no trial has finished."""

    article: Article
    state: str
    html: Path
    best: Path | None
    is_complete: bool


def context_of_search(context: SweepContext, recipe: Mapping[str, Any]) -> dict[str, str]:
    """What is searched, where and on which data, in words."""
    base = RowResult(
        table=context.table,
        row="base",
        seed=0,
        status="done",
        recipe=dict(recipe),
        command=context.command,
        code_version=context.code_version,
        hardware=context.hardware,
        dataset=context.dataset,
    )
    return context_of([base])


def rebuild_search_report(out: Path, refresh_s: int | None = None) -> SearchReport:
    """Writes the report of a search's run folder again, from its study alone.

    Raises:
        ValueError: the folder's plan cannot be read, or its study is gone.
    """
    plan = SearchRun.read(out)
    path = out / plan.study
    if "://" not in plan.study and not path.is_file():
        raise ValueError(f"{path}: expected the journal of the search's study")
    storage = open_storage(plan.study if "://" in plan.study else str(path))
    known = {study.study_name for study in optuna.get_all_study_summaries(storage)}
    names: dict[str, str] = {sampler: f"{plan.name}-{sampler}" for sampler in plan.spec.samplers}
    if not known & set(names.values()):
        raise ValueError(f"{plan.study}: no study of {plan.name}")
    studies = {s: optuna.load_study(study_name=n, storage=storage) for s, n in names.items() if n in known}
    return write_search_report(plan, studies, out, refresh_s)


def write_search_report(plan: SearchRun, studies: Studies, out: Path, refresh_s: int | None = None) -> SearchReport:
    """Writes `report.html`, `report.md`, `report.json`, `best.yaml` and the figures into `out`."""
    spec = plan.spec
    article = search_article(plan, studies)
    trials = [trial for study in studies.values() for trial in study.trials]
    ended = sum(trial.user_attrs.get("status") in ENDED for trial in trials)
    expected = max(spec.num_trials * len(spec.samplers), ended)
    failed = sum(trial.user_attrs.get("status") == "failed" for trial in trials)
    out.mkdir(parents=True, exist_ok=True)
    pending = expected - ended
    state = progress_of(expected, pending, failed, refresh_s, "trials")
    html = write_page(out, [article], state, refresh_s if pending else None)
    write_atomically(out / "report.md", markdown_page([article]))
    write_atomically(out / "report.json", json.dumps(_plain(spec, studies), indent=1) + "\n")
    best = None
    if front := _front(spec, studies):
        best = out / "best.yaml"
        table = yaml.safe_dump(best_table(spec, front, plan.recipe), sort_keys=False, allow_unicode=True)
        write_atomically(best, table)
    return SearchReport(article, state[0].partition(";")[0], html, best, not pending)


def watch_search(
    out: Path,
    console: Console,
    every_s: float,
    at: Callable[[Path], str] = str,
    on_written: Callable[[], None] = lambda: None,
    stopped: threading.Event | None = None,
) -> SearchReport:
    """Writes the report of a search again whenever a trial is new, until all have ended; `stopped` ends it before.

    Args:
        at: what a user knows a file by, see `ResultsFolder.at`.
        on_written: called after every report.
    """
    stopped = stopped or threading.Event()
    told = ""
    while True:
        report = rebuild_search_report(out, refresh_s=max(1, round(every_s)))
        if report.state != told:
            on_written()
            console.print(f"{report.state}: {at(report.html)}", highlight=False, soft_wrap=True)
            told = report.state
        if report.is_complete or stopped.wait(every_s):
            return report


def show_search(report: SearchReport, console: Console, at: Callable[[Path], str] = str) -> int:
    """Prints what a search has found and where it lies; returns the command's exit code.

    Args:
        at: what a user knows a file by, see `ResultsFolder.at`.
    """
    shown = dataclasses.replace(report.article, title="", context={}, sections=report.article.sections[:1])
    console.print(Markdown(markdown_page([shown]).removeprefix("# \n")))
    console.print(f"\nReport: {at(report.html)}", soft_wrap=True, highlight=False)
    if report.best is not None:
        place = at(report.best)
        best = report.best.name if is_uri(place) else place  # a table is read from this machine
        console.print(f"Continue with: cast-ray ablate {best} --seeds 0 1 2", soft_wrap=True, highlight=False)
    return 0 if report.best is not None else 1


def search_article(plan: SearchRun, studies: Studies) -> Article:
    """Makes the whole report of a search."""
    spec = plan.spec
    results = [_samplers(spec, studies), _failures(studies), _verdict(spec, studies), _unlike(studies)]
    made = [
        section("Results", [*results, _best(spec, studies)]),
        section("Pareto front", [_front_figure(spec, studies)]),
        section("Best so far", [_progress(spec, studies)]),
        section("Importances", [_importances(spec, studies)]),
        section("All trials", [_all_trials(spec, studies)]),
        section("Space", [_space(spec)]),
    ]
    sections: list[Section] = [each for each in made if each is not None]
    return Article(spec.name, spec.title, plan.context, sections)


def best_table(spec: SearchSpec, front: Sequence[FrozenTrial], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The base recipe and the best points as a table that `cast-ray ablate` runs, for example on more seeds.

    Early stopping validates beside training; the table does not, which changes no weight. Nor does it measure latency:
    rows of a search for that alone are compared by AP.
    """
    names = ["best"] if len(front) == 1 else [f"front {i + 1}" for i in range(len(front))]
    return {
        "title": f"{spec.title}: the best of the search",
        "metric": next((name for name in spec.objectives if not is_latency(name)), "final/mask_ap"),
        "baseline": "base",
        "base": {**spec.base, **recipe},
        "rows": {"base": {}, **{name: dict(trial.params) for name, trial in zip(names, front)}},
    }


def _front(spec: SearchSpec, studies: Studies) -> list[FrozenTrial]:
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


def _row(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get("row") or trial.number)


def _values(spec: SearchSpec, trial: FrozenTrial) -> list[str]:
    return [format_value(name, value) for name, value in zip(spec.objectives, trial.values or ())]


def _params(spec: SearchSpec, trial: FrozenTrial) -> list[str]:
    values = [trial.params.get(key, "") for key in spec.space]
    return [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]


def _samplers(spec: SearchSpec, studies: Studies) -> Grid:
    """One line a sampler: trials by what became of them, device-hours, the best value or the points on the front."""
    several = len(spec.objectives) > 1
    front = _front(spec, studies)
    body = []
    for sampler, study in studies.items():
        status = [trial.user_attrs.get("status") for trial in study.trials]
        mine = {_row(trial) for trial in _finished(study)}
        best = [text for trial in best_trials(study) for text in _values(spec, trial)] or [""]
        counts = [sum(s in ENDED for s in status), *(status.count(s) for s in ENDED)]
        hours = sum(map(_device_s, study.trials)) / 3600
        found = str(sum(_row(trial) in mine for trial in front)) if several else best[0]
        body.append((sampler, *map(str, counts), f"{hours:.2g}", found))
    names = ("trials", "finished", "stopped early", "failed", "device-hours")
    last = f"of the {len(front)} on the front" if several else f"best {label_of(next(iter(spec.objectives)))}"
    columns = (Column("sampler", False), *map(Column, names), Column(last))
    return Grid("Trials of each sampler", columns, tuple(body))


def _failures(studies: Studies) -> Words | None:
    failed = [t for study in studies.values() for t in study.trials if t.user_attrs.get("status") == "failed"]
    lines = tuple(f"{_row(trial)}: {trial.user_attrs.get('error', 'unknown')}" for trial in failed[:NUM_BEST])
    more = (f"and {len(failed) - NUM_BEST} more",) if len(failed) > NUM_BEST else ()
    return Words(lines + more, "failed") if failed else None


def _verdict(spec: SearchSpec, studies: Studies) -> Words | None:
    """How the samplers compare at the smallest device-time that all of them have spent."""
    paths = {sampler: _best_so_far(spec, study) for sampler, study in studies.items()}
    if len(studies) < 2 or len(spec.objectives) > 1 or not all(paths.values()):
        return None
    budget = min(path[-1][0] for path in paths.values())
    at = {}
    for sampler, path in paths.items():
        within = [value for hours, value in path if hours <= budget + 1e-12]
        if not within:
            return None
        at[sampler] = within[-1]
    metric = next(iter(spec.objectives))
    values = ", ".join(f"{sampler} {format_value(metric, value)}" for sampler, value in at.items())
    line = f"At equal budget ({budget:.2g} device-hours each): {values}. One study each: a difference may be luck."
    return Words((line,), "list")


def _unlike(studies: Studies) -> Words | None:
    """Warns where trials ran on unlike devices, whose hours and latencies do not compare."""
    trials = [trial for study in studies.values() for trial in study.trials]
    computed = {device for trial in trials for device in trial.user_attrs.get("computed_on") or ()}
    measured = {device for trial in trials for device in (trial.user_attrs.get("measured_on") or {}).values()}
    lines = []
    if len(computed) > 1:
        lines.append(f"WARNING: device-hours add up those of unlike devices: {', '.join(sorted(computed))}.")
    if len(measured) > 1:
        lines.append(f"WARNING: latencies of unlike devices do not compare: {', '.join(sorted(measured))}.")
    return Words(tuple(lines), "list") if lines else None


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


def _best(spec: SearchSpec, studies: Studies) -> Grid | Words:
    """The best points with their keys."""
    if len(spec.objectives) > 1:
        chosen, caption = _front(spec, studies), "Points that no other beats in all objectives"
    else:
        sign = 1.0 if next(iter(spec.objectives.values())) == "max" else -1.0
        everything = [trial for study in studies.values() for trial in _finished(study)]
        chosen = sorted(everything, key=lambda trial: -sign * trial.values[0])[:NUM_BEST]
        caption = "Best points"
    if not chosen:
        return Words(("No trial has finished.",))
    columns = (Column("row", False), *(Column(label_of(name)) for name in spec.objectives), *map(Column, spec.space))
    body = tuple((_row(t), *_values(spec, t), *_params(spec, t)) for t in chosen)
    return Grid(caption, columns, body, tuple(line[0] for line in body))


def _all_trials(spec: SearchSpec, studies: Studies) -> Grid | None:
    trials = [trial for study in studies.values() for trial in study.trials if trial.params]
    if not trials:
        return None
    body = []
    for trial in trials:
        values = _values(spec, trial) if trial.state == TrialState.COMPLETE else [""] * len(spec.objectives)
        status = STATUS.get(trial.user_attrs.get("status", ""), trial.state.name.lower())
        body.append((_row(trial), status, *values, *_params(spec, trial), f"{_device_s(trial) / 60:.2g}"))
    columns = (Column("row", False), Column("status", False), *(Column(label_of(name)) for name in spec.objectives))
    columns += (*map(Column, spec.space), Column("device-minutes"))
    marks = tuple("failed" if line[1] == STATUS["failed"] else "" for line in body)
    return Grid("All trials", columns, tuple(body), tuple(line[0] for line in body), marks).first(MAX_LINES)


def _space(spec: SearchSpec) -> Grid:
    body = []
    for key, domain in spec.domains().items():
        values = ", ".join(map(str, domain.choices)) or f"{domain.low:g} to {domain.high:g}"
        kind = "choices" if domain.choices else "integers" if domain.is_integer else "numbers"
        body.append((key, values, f"{kind}, logarithmic" if domain.log else kind))
    return Grid("What is searched", (Column("key", False), Column("values", False), Column("as", False)), tuple(body))


def _progress(spec: SearchSpec, studies: Studies) -> Figure | None:
    """Best value so far of each sampler over the device-time spent, for one objective."""
    if len(spec.objectives) > 1:
        return None
    lines = []
    for i, (sampler, study) in enumerate(studies.items()):
        if path := _best_so_far(spec, study):
            x, y = _stairs(path)
            lines.append(Series(sampler, x, y, colour=i))
    if not lines:
        return None
    panel = Panel(f"best {label_of(next(iter(spec.objectives)))}", "device-hours spent", tuple(lines))
    return Figure("progress", "Best value so far of each sampler, by device-time spent", (panel,))


def _stairs(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A curve that keeps each value until the next point."""
    corners = [points[0]]
    for (_, before), (x, y) in itertools.pairwise(points):
        corners += [(x, before), (x, y)]
    xs, ys = zip(*corners)
    return xs, ys


def _importances(spec: SearchSpec, studies: Studies) -> Figure | None:
    """Each key's share in what makes trials good, over all samplers' finished trials."""
    together = optuna.create_study(directions=list(next(iter(studies.values())).directions))
    for study in studies.values():
        together.add_trials(_finished(study))
    if len(together.trials) < MIN_IMPORTANCE_TRIALS:
        return None
    panels = []
    for i, (name, goal) in enumerate(spec.objectives.items()):
        with warnings.catch_warnings():  # that it takes less for better, which `_loss` sees to
            warnings.simplefilter("ignore", UserWarning)
            shares = optuna.importance.get_param_importances(together, target=partial(_loss, i, goal))
        bars = Series("importance", tuple(shares), tuple(100 * share for share in shares.values()))
        panels.append(Panel(f"importance for {label_of(name)}, %", "", (bars,), kind="bars", names=tuple(shares)))
    caption = f"How much each key matters (PED-ANOVA over {len(together.trials)} finished trials)"
    return Figure("importances", caption, tuple(panels))


def _front_figure(spec: SearchSpec, studies: Studies) -> Figure | None:
    """All finished trials of two objectives and the line through those that none beats in both."""
    if len(spec.objectives) != 2 or not any(map(_finished, studies.values())):
        return None
    first, second = spec.objectives
    series = []
    for i, (sampler, study) in enumerate(studies.items()):
        if trials := _finished(study):
            x, y = (tuple(trial.values[place] for trial in trials) for place in (1, 0))
            series.append(Series(sampler, x, y, colour=i, has_markers=True, has_line=False))
    front = sorted((trial.values[1], trial.values[0]) for trial in _front(spec, studies))
    x, y = _stairs(front)
    panel = Panel(
        f"{label_of(first)} against {label_of(second)}",
        label_of(second),
        (*series, Series("Pareto front", x, y, colour=len(studies))),
        y_label=label_of(first),
    )
    return Figure("pareto", "Finished trials, and the line through those that no other beats in both", (panel,))


def _plain(spec: SearchSpec, studies: Studies) -> dict[str, Any]:
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


def _inside(study: str, out: Path) -> str:
    """A journal file's path from the run folder, so that a copy of the folder finds its own; an URL as it is."""
    path = Path(study)
    if "://" in study or not path.resolve().is_relative_to(out.resolve()):
        return study if "://" in study else str(path.resolve())
    return str(path.resolve().relative_to(out.resolve()))
