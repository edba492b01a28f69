"""`store gc`: what goes, what stays, and that nothing goes that a live sweep needs."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from report_scenes import result
from rich.console import Console

from cast_ray.cli import store as store_command
from cast_ray.plan.graph import Stage
from cast_ray.runtime.store.artifacts import MARK, ArtifactStore
from cast_ray.runtime.store.claims import Presence, live_sweeps
from cast_ray.runtime.store.pruning import SILENT_S, find_prunable, prune

OLD_S = 10 * 86400


def stage(name: str) -> Stage:
    return Stage("distill", "train", {}, {}, name * 20, steps=4)


def commit(store: ArtifactStore, name: str, age_s: float = 0.0) -> Stage:
    store.add(stage(name), "model.safetensors", b"12345")
    store.commit(stage(name), {})
    return aged(store, name, age_s)


def aged(store: ArtifactStore, name: str, age_s: float) -> Stage:
    then = store.now() - age_s
    for path in Path(store.storage, "artifacts", stage(name).key).rglob("*"):
        os.utime(path, (then, then))
    return stage(name)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "storage"))


def keys(store: ArtifactStore) -> set[str]:
    return set(store.list_names("artifacts"))


def test_unfinished_artifacts_go_and_finished_ones_stay(store: ArtifactStore) -> None:
    commit(store, "a")
    store.add(stage("b"), "model.safetensors", b"half")
    assert find_prunable(store).unfinished == ()  # somebody may be writing it
    aged(store, "b", 2 * SILENT_S)
    assert [a.key for a in find_prunable(store).unfinished] == [stage("b").key]
    prune(store, None, False, "test")
    assert keys(store) == {stage("a").key} and store.has(stage("a").key)


def test_finished_ones_go_by_age_and_use(store: ArtifactStore) -> None:
    for name, age_s in (("a", OLD_S), ("b", OLD_S), ("c", 0)):
        commit(store, name, age_s)
    stages = [{"name": "a", "kind": "train", "fingerprint": stage("a").fingerprint}]
    store.write_json("runs/x/losses__sup__s0/result.json", result("sup", stages=stages))

    def planned(older_s: float | None, unused: bool) -> set[str]:
        return {a.fingerprint[0] for a in find_prunable(store, older_s, unused).artifacts}

    assert planned(None, False) == set()
    assert planned(OLD_S / 2, False) == {"a", "b"}
    assert planned(None, True) == {"b", "c"}
    assert planned(OLD_S / 2, True) == {"b"}
    prune(store, OLD_S / 2, True, "test")
    assert keys(store) == {stage("a").key, stage("c").key}


def test_a_result_that_cannot_be_read_stops_the_pruning_of_what_is_unused(store: ArtifactStore) -> None:
    commit(store, "a", OLD_S)
    store.write_bytes("runs/x/losses__sup__s0/result.json", b'{"stages": [')
    with pytest.raises(ValueError, match=r"losses__sup__s0/result.json: cannot be read, so that nothing says"):
        find_prunable(store, None, True)
    assert [a.key for a in find_prunable(store, OLD_S / 2, False).artifacts] == [stage("a").key]


def test_the_data_and_the_foundation_of_a_result_are_in_use(store: ArtifactStore) -> None:
    for name in "abc":
        commit(store, name, OLD_S)
    used = result("sup", stages=[], given=[stage("a").fingerprint], dataset={"artifact": stage("b").key})
    store.write_json("runs/x/main__CAST__s0/result.json", used)
    assert [a.key for a in find_prunable(store, None, True).artifacts] == [stage("c").key]


def test_what_a_live_sweep_needs_stays(store: ArtifactStore) -> None:
    for name in "ab":
        commit(store, name, OLD_S)
    store.add(stage("c"), "model.safetensors", b"half")
    aged(store, "c", 2 * SILENT_S)
    store.note_checkpoint(stage("c").fingerprint, store.uri("train", "run-of-c", "00000004"), 4)
    for path in ("train/run-of-c/state", "train/other/state", "tune/x/state"):
        store.write_bytes(path, b"")
    with Presence(store, "ablate.py losses") as presence:
        presence.need([stage("a").fingerprint, stage("c").fingerprint])
        pruning = prune(store, 0, False, "test")
        assert pruning.in_use == {presence.holder: 2}
        assert keys(store) == {stage("a").key, stage("c").key}
        assert store.find_checkpoint(stage("c").fingerprint) is not None
        assert set(store.list_names("train")) == {"run-of-c", "other"}  # of which sweep cannot be told
    prune(store, 0, False, "test")
    assert keys(store) == set()
    assert store.list_names("train") == store.list_names("tune") == store.list_names("checkpoints") == []


def test_a_fresh_unfinished_artifact_stays_while_somebody_is_at_work(store: ArtifactStore) -> None:
    store.add(stage("b"), "model.safetensors", b"half")
    with Presence(store, "ablate.py losses") as presence:
        presence.need(["other"])
        assert find_prunable(store).unfinished == ()
        aged(store, "b", 2 * SILENT_S)
        assert [a.key for a in find_prunable(store).unfinished] == [stage("b").key]


def test_while_a_sweep_plans_every_artifact_stays(store: ArtifactStore, capsys: pytest.CaptureFixture[str]) -> None:
    """It has said that it is there, but not yet what it needs: it may be reading just the artifact that is so old."""
    commit(store, "a", OLD_S)
    store.add(stage("b"), "model.safetensors", b"half")
    aged(store, "b", OLD_S)
    with Presence(store, "ablate.py losses") as presence:
        pruning = prune(store, 0, True, "test")
        assert pruning.planning == (presence.holder,) and pruning.num_bytes == 0
        assert keys(store) == {stage("a").key, stage("b").key}
        assert store_command.main(["gc", "--yes", "--older-than", "0", "--storage", store.storage]) == 0
        assert "kept         every artifact: a command of" in capsys.readouterr().out
        presence.need([stage("b").fingerprint])
        prune(store, 0, True, "test")
        assert keys(store) == {stage("b").key}


def test_what_dead_sweeps_left_beside_the_artifacts_goes(store: ArtifactStore) -> None:
    mine, theirs = stage("a").fingerprint, stage("b").fingerprint
    for folder in ("labels", "refresh", "validations"):
        for fingerprint in (mine, theirs):
            store.write_bytes(f"{folder}/{fingerprint}/1", b"x")
    store.write_bytes("claims/stages/dead.json", b"")
    store.write_json("claims/plans/dead.json", {"fingerprints": [theirs]})
    with Presence(store, "ablate.py losses") as presence:
        presence.need([mine])
        prune(store, None, False, "test")
        for folder in ("labels", "refresh", "validations"):
            assert store.list_names(folder) == [mine]
        assert store.list_names("claims/stages") == []
        assert store.list_names("claims/plans") == [f"{presence.holder.id}.json"]
    prune(store, None, False, "test")
    assert [name for f in ("labels", "refresh", "validations") for name in store.list_names(f)] == []


@pytest.mark.parametrize("command", ["run_sweep", "run_search"])
def test_a_sweep_is_seen_from_before_it_reads_its_data(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """`store gc` in the middle of the reading of a dataset: nothing of it may go, however long the reading takes."""
    seen = []

    def plan(*_: object, **__: object) -> None:
        store.add(stage("d"), "train.parquet/00000.parquet", b"12 rows")
        aged(store, "d", 2 * SILENT_S)
        prune(store, 0, True, "test")
        seen.append(store.list_names(f"artifacts/{stage('d').key}/{store.attempt}"))
        raise ValueError("enough")

    if command == "run_sweep":
        from cast_ray.runtime.sweep import run as module
        from cast_ray.runtime.sweep.run import SweepRequest

        request: Any = SweepRequest((), store.storage, None, None)
    else:
        from cast_ray.runtime.search import run as module  # type: ignore[no-redef]

        request = SimpleNamespace(spec=None, storage=store.storage, recipe=lambda point: None, name="x")
    monkeypatch.setattr(module, "RowPlanner", plan)
    with pytest.raises(ValueError, match="enough"):
        getattr(module, command)(request, Console(file=io.StringIO()))
    assert seen == [["train.parquet"]] and live_sweeps(store, SILENT_S) == {}


def test_attempts_beside_the_one_that_counts_go(store: ArtifactStore) -> None:
    late = store.new_attempt()
    late.add(stage("a"), "model.safetensors", b"late")
    commit(store, "a")
    prune(store, None, False, "test")
    names = set(store.list_names(f"artifacts/{stage('a').key}"))
    assert names == {"manifest.json", store.attempt}
    assert store.read_bytes(stage("a").key, "model.safetensors") == b"12345"


def test_the_command_lists_shows_and_prunes(store: ArtifactStore, capsys: pytest.CaptureFixture[str]) -> None:
    commit(store, "a", OLD_S)
    commit(store, "b")

    def run(*arguments: str) -> str:
        assert store_command.main([*arguments, "--storage", store.storage]) == 0
        return capsys.readouterr().out

    listing = run("ls")
    assert listing.index(stage("b").key) < listing.index(stage("a").key)  # newest first
    assert "2 artifacts" in listing and "10 d" in listing
    assert {a["key"] for a in json.loads(run("ls", "--json"))} == {stage("a").key, stage("b").key}
    assert '"fingerprint": "' + "a" * 20 in run("show", "aaaa")
    assert "nothing is deleted without --yes" in run("gc", "--older-than", "5d")
    assert keys(store) == {stage("a").key, stage("b").key}
    assert "pruned" in run("gc", "--older-than", "5d", "--yes")
    assert keys(store) == {stage("b").key}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "zzzz"], "expected one artifact, found none"),
        (["gc", "--older-than", "soon"], "--older-than 'soon': expected a number of days"),
        (["gc", "--older-than=-1d"], "--older-than '-1d': expected a number of days"),
        (["gc", "--older-than", "nan"], "--older-than 'nan': expected a number of days"),
    ],
)
def test_bad_input_of_the_command(
    store: ArtifactStore, capfd: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    commit(store, "a")
    assert store_command.main([*arguments, "--storage", store.storage]) == 2
    assert words in capfd.readouterr().err


def test_no_store_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert store_command.main(["ls", "--storage", str(tmp_path / "none")]) == 2
    assert "no store at" in capfd.readouterr().err


@pytest.mark.parametrize("arguments", [["ls"], ["gc"], ["gc", "--yes"], ["show", "x"]])
def test_other_files_are_no_store(tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    photos = [tmp_path / "train" / "1.png", tmp_path / "checkpoints" / "best.pt", tmp_path / "artifacts" / "model.pt"]
    for path in photos:  # names of folders that stores have too, whose content `gc` would remove
        path.parent.mkdir()
        path.write_bytes(b"x")
    assert store_command.main([*arguments, "--storage", str(tmp_path)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: storage path '{tmp_path}' holds other files (artifacts, checkpoints, train): ")
    assert all(path.is_file() for path in photos) and len(list(tmp_path.rglob("*"))) == 6


def test_what_a_store_is(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "lost+found").mkdir()
    store = ArtifactStore(str(tmp_path))
    assert not store.exists()
    commit(store, "a")
    assert store.exists()
    (tmp_path / MARK).unlink()  # as in a copy of its artifacts alone
    assert store.exists()
    store.check_writable()
    (tmp_path / "notes.txt").touch()
    assert store.exists()
    with pytest.raises(ValueError, match=r"notes\.txt' cannot be written: "):
        ArtifactStore(str(tmp_path / "notes.txt")).check_writable()
