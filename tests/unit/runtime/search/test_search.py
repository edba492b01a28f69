"""Searches without Ray: what a spec refuses, what becomes of a trial in its study, how a search continues."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from cast_ray.plan.ablation import load_table
from cast_ray.plan.graph import Stage, plan
from cast_ray.plan.search import RUNG_METRIC, SearchSpec, load_search, search_names
from cast_ray.publish.search import SearchRun, best_table, rebuild_search_report, write_search_report
from cast_ray.runtime.search.run import SearchRequest, StudySearch, _Search
from cast_ray.runtime.search.study import best_trials, make_sampler, num_ended, open_storage, open_study, reap
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.claims import Presence
from cast_ray.runtime.store.pruning import prune
from cast_ray.runtime.sweep.row_driver import RUNG_STEP
from cast_ray.runtime.sweep.run import check_still_stored

GOOD: dict[str, Any] = {
    "title": "t",
    "objectives": {"student/mask_ap": "max"},
    "space": {
        "loss.lambda_pxl": {"low": 0.01, "high": 1.0, "log": True},
        "contrastive.num_negatives": {"low": 16, "high": 64},
        "contrastive.sampler": {"choices": ["uniform", "fusion"]},
    },
}
POINT = {"loss.lambda_pxl": 0.1, "contrastive.num_negatives": 64, "contrastive.sampler": "fusion"}
TWO = {"objectives": {"student/mask_ap": "max", "student/latency_ms": "min"}}


def spec_of(**changes: Any) -> SearchSpec:
    return SearchSpec.model_validate({"name": "mine", **GOOD, **changes})


def study_of(storage: Any, spec: SearchSpec, **identity: Any) -> optuna.Study:
    return open_study(storage, "mine-tpe", spec, identity)


@pytest.fixture(params=["journal", "sqlite"])
def storage(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    url = f"sqlite:///{tmp_path}/study.db" if request.param == "sqlite" else str(tmp_path / "runs" / "study.journal")
    return lambda: open_storage(url)  # opened anew, as by another command


def searcher(storage: Any, spec: SearchSpec, holder: str = "me", **changes: Any) -> StudySearch:
    study = study_of(storage, spec)
    options = {
        "propose": lambda number, point: SimpleNamespace(name=f"t{number}", point=point),
        "spent": lambda name: 12.0,
    }
    sampler = make_sampler("tpe", 0, spec.num_trials, len(study.trials))
    return StudySearch(spec, study, storage, sampler, holder, **(options | changes))  # type: ignore[arg-type]


def ended(search: StudySearch, trial_id: str, **result: Any) -> optuna.trial.FrozenTrial:
    assert search.suggest(trial_id) is not None
    search.on_trial_complete(trial_id, result or None)
    return search.study.trials[-1]


def test_the_shipped_searches_load() -> None:
    assert {"losses", "labels", "latency"} <= set(search_names())
    for name in search_names():
        assert load_search(name).name == name


def test_a_point_is_a_recipe_row() -> None:
    recipe = spec_of(base={"loss.lambda_semi": 0.5}).recipe(POINT, seed=3, overrides={"loss.lambda_pxl": "0.7"})
    assert (recipe.loss.lambda_pxl, recipe.loss.lambda_semi, recipe.seed) == (0.1, 0.5, 3)
    assert (recipe.contrastive.num_negatives, recipe.contrastive.sampler) == (64, "fusion")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "pbt"}, "pbt is refused: .*Ray Train V2 leaves empty"),
        ({"scheduler": "hyperband"}, "hyperband is refused"),
        ({"scheduler": "median"}, "expected asha or none"),
        ({**TWO, "scheduler": "asha"}, "asha ranks by one objective"),
        ({"space": {"loss.lambda_pxI": {"low": 0, "high": 1}}}, "unknown recipe key .* did you mean 'loss.lambda_pxl'"),
        ({"space": {"loss.lambda_pxl": {"low": -1, "high": 1}}}, "loss.lambda_pxl: .*greater than or equal to 0"),
        ({"space": {"loss.lambda_pxl": {"low": 1, "high": 1}}}, "expected choices, or low below high"),
        ({"space": {"loss.lambda_pxl": {"low": 0, "high": 1, "log": True}}}, "log: expected low above 0"),
        ({"space": {"loss.lambda_pxl": {"lo": 0, "high": 1}}}, "unknown key 'lo': did you mean 'low'"),
        ({"space": {"loss.lambda_pxl": {"choices": [1], "high": 1}}}, "either choices or low and high"),
        ({"start": [{"loss.lambda_pxl": 0.1}]}, "start: expected a value of each key .* contrastive.num_negatives"),
        ({"objectives": {"student/mask_ap": "more"}}, "objectives"),
        ({"objectives": {"student/mask": "max"}}, "objectives: unknown metric .* did you mean 'student/mask_ap'"),
        ({"objectives": {"student/latency": "min"}}, "objectives: .* did you mean 'student/latency_ms'"),
        ({"samplers": ["tpe", "tpe"]}, "expected different ones"),
        ({"num_trials": 0}, "num_trials"),
        ({"num_trials": True}, "num_trials: expected a number, not true or false"),
        ({"seed": 2**63}, "seed: .*less than 9223372036854775808"),
        ({"seed": -1}, "seed: .*greater than or equal to 0"),
        ({"space": {"loss.lambda_pxl": {"low": 0, "high": math.inf}}}, "space, loss.lambda_pxl: high.*finite number"),
        ({"space": {"loss.lambda_pxl": {"low": False, "high": 1}}}, "space, loss.lambda_pxl: low: expected a number"),
        ({"space": {"loss.lambda_pxl": {"choices": [math.nan]}}}, "space, loss.lambda_pxl: .*finite number"),
    ],
)
def test_a_wrong_search_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    with pytest.raises(ValueError, match=message) as caught:
        load_search(path)
    assert "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_start_points_are_tried_once_however_often_the_command_is_run(storage: Any) -> None:
    spec = spec_of(start=[POINT])
    for _ in range(3):
        study_of(storage(), spec)
    waiting = study_of(storage(), spec).get_trials(states=(TrialState.WAITING,))
    assert [t.system_attrs["fixed_params"] for t in waiting] == [POINT]
    trial = ended(searcher(storage(), spec), "a", status="done", **{"student/mask_ap": 20.0})
    assert trial.params == POINT and trial.values == [20.0]
    study_of(storage(), spec)
    assert len(study_of(storage(), spec).trials) == 1


def test_a_study_of_another_search_is_refused(storage: Any) -> None:
    study_of(storage(), spec_of(), seed=0)
    study_of(storage(), spec_of(num_trials=99, title="longer"), seed=0)  # extended
    with pytest.raises(ValueError, match="made with another space: expected the same, or another --name"):
        study_of(storage(), spec_of(space={"loss.lambda_pxl": {"low": 0.1, "high": 0.2}}), seed=0)
    with pytest.raises(ValueError, match="made with another seed"):
        study_of(storage(), spec_of(), seed=1)


def test_what_changes_no_result_is_no_other_search(storage: Any) -> None:
    study_of(storage(), spec_of(), overrides={"loss.lambda_semi": "1", "runtime.max_failures": "1"})
    study_of(storage(), spec_of(), overrides={"loss.lambda_semi": "1", "stages.distill.accumulate": "2"})
    with pytest.raises(ValueError, match="made with another overrides"):
        study_of(storage(), spec_of(), overrides={"loss.lambda_semi": "2"})


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_an_undefined_objective_ends_its_trial(storage: Any, value: float | None) -> None:
    trial = ended(searcher(storage(), spec_of()), "a", status="done", **{"student/mask_ap": value})
    assert trial.state == TrialState.FAIL and trial.user_attrs["status"] == "failed"
    assert "student/mask_ap" in trial.user_attrs["error"] and trial.user_attrs["device_s"] == 12.0


def test_failed_lost_and_several_objectives(storage: Any) -> None:
    spec = spec_of(**TWO)
    search = searcher(storage(), spec)
    failed = ended(search, "a", status="failed", error="SegmentFailed: out of memory")
    lost = ended(search, "b")
    half = ended(search, "c", status="done", **{"student/mask_ap": 20.0})
    done = ended(search, "d", status="done", **{"student/mask_ap": 20.0, "student/latency_ms": 3.0})
    assert [t.state for t in (failed, lost, half)] == [TrialState.FAIL] * 3
    assert failed.user_attrs["error"].endswith("out of memory") and "latency" in half.user_attrs["error"]
    assert done.values == [20.0, 3.0] and done.user_attrs["row"] == "t3"
    assert num_ended(search.study) == 4 and not search.study.get_trials(states=(TrialState.RUNNING,))


def test_a_trial_stopped_at_a_rung_is_pruned_there_and_never_the_best(storage: Any) -> None:
    search = searcher(storage(), spec_of())
    assert search.suggest("a") is not None
    for step, ap in ((10, 90.0), (20, 95.0), (20, 95.0)):  # a retried driver reports a rung again
        search.on_trial_result("a", {RUNG_STEP: step, RUNG_METRIC: ap, "training_iteration": 1})
    search.on_trial_result("a", {"distill/loss": 1.0, "training_iteration": 2})  # a curve, without the objective
    search.on_trial_complete("a", {RUNG_STEP: 20, RUNG_METRIC: 95.0})
    done = ended(search, "b", status="done", **{"student/mask_ap": 20.0})
    pruned = search.study.trials[0]
    assert pruned.state == TrialState.PRUNED and pruned.intermediate_values == {10: 90.0, 20: 95.0}
    assert [t.number for t in best_trials(search.study)] == [done.number]


def test_interrupted_trials_are_tried_again(storage: Any) -> None:
    spec = spec_of()
    first = searcher(storage(), spec, holder="dead")
    for trial_id in "ab":
        first.suggest(trial_id)
    second = searcher(storage(), spec, holder="alive")
    second.suggest("c")
    points = [t.params for t in first.study.trials[:2]]
    assert reap(study_of(storage(), spec), lambda holder: holder == "alive") == 2
    assert reap(study_of(storage(), spec), lambda holder: holder == "alive") == 0
    third = searcher(storage(), spec)
    again = [ended(third, trial_id, status="stopped", error="the budget is spent") for trial_id in "de"]
    assert [t.params for t in third.study.trials[3:5]] == points and again[0].state != TrialState.COMPLETE
    fourth = searcher(storage(), spec)
    assert ended(fourth, "f", status="done", **{"student/mask_ap": 1.0}) and num_ended(fourth.study) == 1
    assert [t.params for t in best_trials(fourth.study)] == points[:1]


def test_a_point_without_a_valid_recipe_is_ended_and_another_asked_for(storage: Any) -> None:
    tries = itertools.count()

    def propose(number: int, point: dict[str, Any]) -> Any:
        if next(tries) < 2:
            raise ValueError("hidden_dim is 40: expected a multiple of num_heads")
        return SimpleNamespace(name=f"t{number}")

    search = searcher(storage(), spec_of(), propose=propose)
    assert search.suggest("a") == {"row": "t2"}
    assert [t.state for t in search.study.trials] == [TrialState.FAIL, TrialState.FAIL, TrialState.RUNNING]
    assert "num_heads" in search.study.trials[0].user_attrs["error"]


def test_a_stage_that_is_pruned_before_a_point_needs_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`store gc --older-than` while a search runs removes what no live plan names: nothing may take it for stored."""
    store, spec = ArtifactStore(str(tmp_path)), spec_of()
    points = [POINT | {"loss.lambda_pxl": value} for value in (0.1, 0.2)]
    rows = [plan(spec.recipe(point), "0" * 64) for point in points]
    shared = {s.key: s for s in rows[0].stages if s.kind == "train" and s in rows[1].stages}
    own = next(s for s in rows[1].stages if s.kind == "train" and s.key not in shared)
    for stage in (*shared.values(), own):
        store.commit(stage, {})
    context = SimpleNamespace(table="mine-tpe")
    planner = Mock(store=store, warnings=[], fingerprints=Mock(return_value=set()))
    planner.plan = lambda recipe, *, row, **_: (context, plan(recipe, "0" * 64, row=row))
    monkeypatch.setattr("cast_ray.runtime.search.run.ray.get", lambda value: value)
    monkeypatch.setattr("cast_ray.runtime.search.run.Job.packed", lambda job: b"")
    broker = Mock()
    request = SearchRequest(spec, "shapes", "demo", {}, 0, "mine", "", str(tmp_path), None, None)
    with Presence(store, "search") as presence:
        search = _Search(request, planner, presence, None, Mock())  # type: ignore[arg-type]
        search.broker = broker
        propose = search._proposer("tpe")
        propose(0, points[0])
        (_, stored), _ = broker.load.remote.call_args
        assert set(stored) == {stage.fingerprint for stage in shared.values()}
        prune(store, 0.0, False, "gc")  # of the second point's stages nobody has left word
        assert not store.has(own.key) and all(map(store.has, shared))
        propose(1, points[1])
        (_, stored), _ = broker.load.remote.call_args
        assert stored == [] and own.fingerprint not in search.stored
        store.commit(own, {})
        prune(store, 0.0, False, "gc")
        assert store.has(own.key)


def test_a_teacher_that_is_pruned_while_a_point_is_planned_is_imported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, spec = ArtifactStore(str(tmp_path)), spec_of()
    teacher = Stage("foundation", "train", {}, {}, "f" * 20)

    def planned(recipe: Any, *, row: str, **_: Any) -> Any:
        if planner.forget_foundations.called:
            store.commit(teacher, {})
        return SimpleNamespace(table="mine-tpe"), plan(recipe, "0" * 64, row=row, foundation=teacher.fingerprint)

    planner = Mock(store=store, warnings=[], fingerprints=Mock(return_value=set()), plan=planned)
    monkeypatch.setattr("cast_ray.runtime.search.run.ray.get", lambda value: value)
    monkeypatch.setattr("cast_ray.runtime.search.run.Job.packed", lambda job: b"")
    request = SearchRequest(spec, "shapes", "demo", {}, 0, "mine", "", str(tmp_path), None, None)
    with Presence(store, "search") as presence:
        search = _Search(request, planner, presence, None, Mock())  # type: ignore[arg-type]
        search.broker = Mock()
        search._proposer("tpe")(0, POINT)
        (_, stored), _ = search.broker.load.remote.call_args
    assert stored == [teacher.fingerprint] and len(search.rows) == 1


def test_what_gc_took_while_a_sweep_was_planned_is_said() -> None:
    check_still_stored({"a"}, {"a", "b"})
    with pytest.raises(ValueError, match=r"`store gc` has removed 1 artifacts .*\(c\): run it again"):
        check_still_stored({"a", "c"}, {"a", "b"})


def test_tune_may_pickle_its_settings(storage: Any) -> None:
    assert pickle.loads(pickle.dumps(searcher(storage(), spec_of()))) == "mine-tpe"


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_a_sampler_made_again_does_not_repeat_itself(kind: str) -> None:
    study = optuna.create_study()
    found = []
    for known in (0, 0, 5):
        study.sampler = make_sampler(kind, 7, 12, known)
        found.append(study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}).params["x"])
    assert found[0] == found[1] != found[2]


def test_the_report_and_the_table_to_go_on_with(storage: Any, tmp_path: Path) -> None:
    spec = spec_of(num_trials=6)
    search = searcher(storage(), spec)
    for i in range(6):
        ended(search, str(i), status="done", **{"student/mask_ap": 10.0 + i})
    other = open_study(storage(), "mine-random", spec, {})
    studies = {"tpe": study_of(storage(), spec), "random": other}
    out = tmp_path / "out"
    report = write_search_report(SearchRun("mine", spec, "", {"preset": "shapes", "scale": "smoke"}), studies, out)
    page = (out / "report.md").read_text()
    assert "| tpe | 6 | 6 | 0 | 0 | 0.02 | 15.0 |" in page and "| random | 0 |" in page
    assert {p.name for p in out.glob("*.png")} == {"progress.png", "importances.png"}
    html = report.html.read_text()
    assert "Not complete: 6 of 12 trials" in html and html.count('<svg role="img"') == 2
    assert not report.is_complete and 'id="mine-all-trials"' in html
    everything = json.loads((out / "report.json").read_text())
    assert [t["values"] for t in everything["studies"]["tpe"]] == [[10.0 + i] for i in range(6)]
    assert report.best is not None
    table = load_table(report.best)
    best = studies["tpe"].best_trial.params
    recipe = table.row_recipe("best")
    assert table.rows["best"] == best and recipe.scale == "smoke"
    assert recipe.loss.lambda_pxl == pytest.approx(best["loss.lambda_pxl"])


def test_the_front_of_two_objectives(storage: Any, tmp_path: Path) -> None:
    spec = spec_of(**TWO)
    search = searcher(storage(), spec)
    for i, (ap, latency) in enumerate([(10, 1), (20, 2), (15, 3), (30, 4), (5, 5)]):
        metrics = {"student/mask_ap": float(ap), "student/latency_ms": float(latency)}
        model = "NVIDIA L4" if i else "NVIDIA A10G"
        devices = {"computed_on": ["NVIDIA L4"], "measured_on": {"student/latency_ms": model}}
        ended(search, str(i), status="done", **devices, **metrics)
    report = write_search_report(SearchRun("mine", spec, ""), {"tpe": search.study}, tmp_path)
    page = report.html.read_text()
    assert "Points that no other beats" in page
    assert "WARNING: latencies of unlike devices do not compare: NVIDIA A10G, NVIDIA L4." in page
    assert "device-hours add up" not in page
    assert (tmp_path / "pareto.png").is_file() and report.best is not None
    assert list(load_table(report.best).rows) == ["base", "front 1", "front 2", "front 3"]
    rows = best_table(spec, search.study.best_trials, {})["rows"]
    assert len(rows) == 4
    latency_first = spec_of(objectives={"student/latency_ms": "min", "student/mask_ap": "max"})
    assert best_table(latency_first, [], {})["metric"] == "student/mask_ap"
    assert best_table(spec_of(objectives={"student/latency_ms": "min"}), [], {})["metric"] == "final/mask_ap"


def test_the_report_is_written_again_from_a_copy_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    spec = spec_of(num_trials=5, samplers=("tpe",))
    journal = open_storage(str(folder / "study.journal"))
    search = searcher(journal, spec)
    for i in range(4):
        ended(search, str(i), status="done", **{"student/mask_ap": 10.0 + i})
    ended(search, "4", status="failed", error="ValueError: <b>no</b>")
    SearchRun("mine", spec, str(folder / "study.journal"), {"scale": "smoke"}, {"command": "search"}).write(folder)
    copy = tmp_path / "elsewhere"
    folder.rename(copy)
    report = rebuild_search_report(copy)
    html = report.html.read_text()
    assert report.is_complete and report.state == "5 of 5 trials, 1 FAILED"
    assert "ValueError: &lt;b&gt;no&lt;/b&gt;" in html and "<code>search</code>" in html
    assert report.best is not None and load_table(report.best).row_recipe("best").scale == "smoke"
    (copy / "study.journal").unlink()
    with pytest.raises(ValueError, match="journal of the search"):
        rebuild_search_report(copy)


def test_no_point_is_proposed_beside_one_that_waits_for_room(storage: Any) -> None:
    """On a cluster a search grows with it: the next point is asked for when the last one has found room."""
    asked: list[list[str]] = []
    answers = [True, False, True]

    def is_waiting(names: Collection[str]) -> bool:
        asked.append(list(names))
        return answers.pop(0)

    search = searcher(storage(), spec_of(), is_waiting=is_waiting)
    first = search.suggest("a")
    assert first is not None and search.suggest("b") is None
    second = search.suggest("b")
    assert second is not None
    search.on_trial_complete("a", {"status": "failed"})
    assert search.suggest("c") is None
    assert asked == [[first["row"]], [first["row"]], [second["row"]]]  # of those that have not ended
