"""A study whose journal lies in an object store."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import optuna
import pytest
from rich.console import Console
from s3_server import S3Server

from cast_ray.common.paths import read_bytes
from cast_ray.runtime.search import journal
from cast_ray.runtime.search.journal import claim_study, is_stored
from cast_ray.runtime.search.study import closing_storage, open_storage
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
