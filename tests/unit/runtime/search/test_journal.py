"""A study whose journal lies in an object store."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from rich.console import Console
from s3_server import S3Server

from cast_ray.cli import report, search
from cast_ray.common.paths import below, read_bytes
from cast_ray.common.results_folder import ResultsFolder, open_results
from cast_ray.plan.search import load_search
from cast_ray.publish.search import SearchRun
from cast_ray.runtime.search import journal
from cast_ray.runtime.search.journal import claim_study, is_stored
from cast_ray.runtime.search.study import closing_storage, distribution, open_storage, open_study
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.claims import Presence


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def study(server: S3Server, request: pytest.FixtureRequest) -> str:
    return server.uri(f"runs/{abs(hash(request.node.name))}/study.journal")


def values(study: str) -> list[float]:
    try:
        found = optuna.load_study(study_name="mine", storage=open_storage(study))
    except KeyError:  # nothing has been written yet
        return []
    return [trial.value for trial in found.get_trials(states=(optuna.trial.TrialState.COMPLETE,))]  # type: ignore[misc]


def test_what_is_in_an_object_store() -> None:
    assert is_stored("s3://bucket/study.journal") and is_stored("gs://b/x")
    assert not any(map(is_stored, ("sqlite:///study.db", "postgresql://host/db", "runs/x/study.journal", "s3")))


def test_a_study_is_continued(study: str) -> None:
    for number in range(2):
        storage = open_storage(study)
        with closing_storage(storage):
            made = optuna.create_study(storage=storage, study_name="mine", load_if_exists=True)
            made.tell(made.ask(), float(number))
        assert made.trials[number].value == number  # it is read after it was closed, for the report
        assert values(study) == [float(i) for i in range(number + 1)]


def test_a_killed_command_leaves_its_trials(
    study: str, server: S3Server, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    monkeypatch.setattr(journal, "WRITE_EVERY_S", 0.05)
    storage = open_storage(study)
    made = optuna.create_study(storage=storage, study_name="mine")
    made.tell(made.ask(), 1.0)
    wait_until(lambda: values(study) == [1.0], "the journal was not written back", 60)  # it is not closed
    server.reset()
    made.tell(made.ask(), 2.0)
    wait_until(lambda: values(study) == [1.0, 2.0], "the journal was not written back", 60)
    assert server.requests["PUT"] <= 4  # one for all that came within a pause, not one for each line
    with closing_storage(storage):
        pass
    assert read_bytes(study).endswith(b"\n")


def test_one_command_at_a_time_writes_it(server: S3Server, study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "DEAD_AFTER_S", 0.1)
    monkeypatch.setattr(journal, "LOOK_S", 0.05)
    store, output = ArtifactStore(server.uri("storage")), io.StringIO()
    console: Any = Console(file=output)
    with Presence(store, "search.py losses") as first, Presence(store, "search.py losses") as second:
        claim_study(study, store, first, console)
        claim_study(server.uri("runs/other/study.journal"), store, second, console)
        claim_study("runs/x/study.journal", store, second, console)  # Optuna's own lock is enough there
        assert output.getvalue() == ""
        with pytest.raises(ValueError, match=r"written by another command \(.*: search.py losses\)"):
            claim_study(study, store, second, console)
        assert "another command has this search's study" in output.getvalue()
    with Presence(store, "search.py losses") as third:
        claim_study(study, store, third, console)  # those before it have ended


def test_where_a_study_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, away = ResultsFolder("runs", tmp_path), ResultsFolder("s3://b/runs", tmp_path)
    out = tmp_path / "mine"

    def place(storage: str, results: ResultsFolder = here) -> str:
        return search._study(out, storage, "mine", results)

    assert place("storage") == str(out / "study.journal")
    assert place("s3://b/storage") == place("s3://b/storage", away) == "s3://b/storage/runs/mine/study.journal"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # the head's container is gone after `ray down`
    assert place("/shared/storage") == "/shared/storage/runs/mine/study.journal"
    out.mkdir()
    (out / "study.journal").write_text("")  # of an earlier version, which is continued
    assert place("s3://b/storage") == str(out / "study.journal")
    assert place("s3://b/storage", away) == "s3://b/storage/runs/mine/study.journal"  # what is here is a copy


def test_the_report_of_a_search_is_rebuilt_from_there(
    server: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = server.uri("searches")
    spec = load_search("losses").model_copy(update={"num_trials": 1, "samplers": ("tpe",), "scheduler": "none"})
    place = below(runs, "mine", "study.journal")
    with open_results(runs) as results:
        SearchRun("mine", spec, place, {"scale": "smoke"}).write(results.path / "mine")
        results.send()
    storage = open_storage(place)
    with closing_storage(storage):
        made = open_study(storage, "mine-tpe", spec, {})
        trial = made.ask({key: distribution(domain) for key, domain in spec.domains().items()})
        trial.set_user_attr("status", "done")
        made.tell(trial, [12.5] * len(spec.objectives))
    assert report.main([below(runs, "mine")]) == 0
    page = below(runs, "mine", "report.html")
    printed = capsys.readouterr().out
    assert f"Report: {page}" in printed and "cast-ray ablate best.yaml" in printed and b"12.5" in read_bytes(page)
    assert read_bytes(below(runs, "mine", "best.yaml")) and read_bytes(place)
    assert report.main([below(runs, "mine"), "--out", str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy/best.yaml").is_file()
