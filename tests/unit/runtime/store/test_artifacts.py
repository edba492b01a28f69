"""The artifact store: the manifest decides whether an artifact exists."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from cast_ray.plan.graph import Stage
from cast_ray.runtime.store.artifacts import ArtifactStore, LostFilesError, committed_fingerprints

STAGE = Stage("distill", "train", {"seed": 0}, {"init": "p" * 20}, "a" * 20, steps=4)
OTHER = Stage("student", "evaluate", {}, {"model": "a" * 20}, "b" * 20)


@pytest.fixture(params=["path", "uri"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> ArtifactStore:
    folder = tmp_path / "a store"
    return ArtifactStore(str(folder) if request.param == "path" else f"file://{tmp_path}/store")


def test_without_manifest_an_artifact_does_not_exist(store: ArtifactStore) -> None:
    assert not store.has(STAGE.key)
    store.add(STAGE, "model.safetensors", b"weights")
    store.add(STAGE, "labels/part-0.parquet", b"rows")
    assert not store.has(STAGE.key) and committed_fingerprints(store.list_artifacts()) == set()
    store.commit(STAGE, {"seconds": 1.5})
    assert store.has(STAGE.key) and committed_fingerprints(store.list_artifacts()) == {STAGE.fingerprint}
    assert not store.has(OTHER.key)


def test_a_file_is_written_and_read_piece_by_piece(store: ArtifactStore) -> None:
    with store.open_to_add(STAGE, "results.jsonl") as file:
        for k in range(3):
            file.write(b"%d\n" % k)
    with store.read_stream(STAGE, "results.jsonl") as file:
        assert list(file) == [b"0\n", b"1\n", b"2\n"]
    store.discard(STAGE, "results.jsonl")
    assert store.find_file(STAGE.key, "results.jsonl") is None
    store.discard(STAGE, "results.jsonl")  # again: nothing to do


def test_a_folder_is_deleted(store: ArtifactStore) -> None:
    store.write_json("validations/x/1.json", {})
    store.delete("validations/x")
    assert store.find_bytes("validations/x/1.json") is None
    store.delete("validations/x")


def test_a_half_written_artifact_is_overwritten(store: ArtifactStore) -> None:
    store.add(STAGE, "model.safetensors", b"half of the wei")
    store.add(STAGE, "model.safetensors", b"all")
    store.commit(STAGE, {})
    assert store.read_bytes(STAGE.key, "model.safetensors") == b"all"


def test_a_manifest_that_was_being_written_does_not_count(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    folder = tmp_path / "artifacts" / STAGE.key
    folder.mkdir(parents=True)
    (folder / "manifest.json.4711.partial").write_text('{"stage": "dist')
    assert not store.has(STAGE.key) and committed_fingerprints(store.list_artifacts()) == set()
    store.commit(STAGE, {})
    assert store.has(STAGE.key)


def test_writers_of_one_artifact_do_not_share_files(store: ArtifactStore) -> None:
    """Two make the same stage: what a reader gets is one's files, whole, whichever commits first or last."""
    first, second = store.new_attempt(), store.new_attempt()
    first.add(STAGE, "model.safetensors", b"first")
    second.add(STAGE, "model.safetensors", b"second")
    assert first.commit(STAGE, {})
    second.add(STAGE, "curves.json", b"{}")
    assert store.read_bytes(STAGE.key, "model.safetensors") == b"first"
    assert not second.commit(STAGE, {})  # its files are gone, the first's are not
    assert store.read_bytes(STAGE.key, "model.safetensors") == b"first"
    assert set(store.list_names(f"artifacts/{STAGE.key}")) == {"manifest.json", first.attempt}
    assert not first.commit(STAGE, {}) and store.read_bytes(STAGE.key, "model.safetensors") == b"first"


def test_a_reader_stays_with_the_attempt_it_found(store: ArtifactStore) -> None:
    """Both saw no manifest and wrote theirs: the later one counts, and who read the earlier one can go on."""
    first, second = store.new_attempt(), store.new_attempt()
    for attempt in (first, second):
        attempt.add(STAGE, "model.safetensors", attempt.attempt.encode())
        attempt.add(STAGE, "curves.json", attempt.attempt.encode())
    first.commit(STAGE, {})
    reader = store.new_attempt()
    assert reader.read_bytes(STAGE.key, "model.safetensors") == first.attempt.encode()
    later = store.manifest(STAGE.key).model_copy(update={"attempt": second.attempt})
    store.write_bytes(f"artifacts/{STAGE.key}/manifest.json", later.to_json().encode())
    assert reader.read_bytes(STAGE.key, "curves.json") == first.attempt.encode()
    assert store.new_attempt().read_bytes(STAGE.key, "curves.json") == second.attempt.encode()


def test_workers_of_one_attempt_read_what_the_others_wrote(store: ArtifactStore) -> None:
    other = pickle.loads(pickle.dumps(store))
    other.add(STAGE, "results-001.json", b"[1]")
    store.add(STAGE, "results-000.json", b"[0]")
    assert store.read_json(STAGE.key, "results-001.json") == [1]
    with pytest.raises(FileNotFoundError):
        store.new_attempt().read_json(STAGE.key, "results-001.json")


def test_artifacts_without_attempts_are_read(store: ArtifactStore) -> None:
    """As they were written before there were attempts."""
    store.write_bytes(f"artifacts/{STAGE.key}/model.safetensors", b"old")
    store.write_json(f"artifacts/{STAGE.key}/manifest.json", {"stage": "distill", "kind": "train"})
    assert store.read_bytes(STAGE.key, "model.safetensors") == b"old"


def test_a_listing_tells_finished_from_unfinished(store: ArtifactStore) -> None:
    store.add(STAGE, "model.safetensors", b"12345")
    listed = store.list_artifacts()[STAGE.key]
    assert (listed.fingerprint, listed.num_bytes, listed.committed) == (STAGE.fingerprint, 5, None)
    store.commit(STAGE, {})
    listed = store.list_artifacts()[STAGE.key]
    assert listed.committed == listed.changed and abs(listed.changed - store.now()) < 60


def test_local_files_appear_whole(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    store.write_bytes("runs/a/result.json", b"1")
    store.write_bytes("runs/a/result.json", b"22")
    assert [p.name for p in (tmp_path / "runs" / "a").iterdir()] == ["result.json"]
    assert (tmp_path / "runs" / "a" / "result.json").read_bytes() == b"22"


def test_the_manifest_says_what_was_made(store: ArtifactStore) -> None:
    store.commit(STAGE, {"seconds": 1.5, "resumed_at_step": None})
    manifest = store.manifest(STAGE.key)
    wanted = {
        "stage": "distill",
        "kind": "train",
        "fingerprint": STAGE.fingerprint,
        "parents": STAGE.parents,
        "config": STAGE.config,
        "steps": 4,
        "seconds": 1.5,
        "resumed_at_step": None,
    }
    assert {key: getattr(manifest, key) for key in wanted} == wanted and (manifest.committed or 0) > 0


def test_a_commit_looks_whether_its_files_are_there(store: ArtifactStore, tmp_path: Path) -> None:
    store.add(STAGE, "train.parquet/00000.parquet", b"8 rows")
    store.add(STAGE, "train.parquet/00001.parquet", b"4 rows")
    with store.open_to_add(STAGE, "results.json") as file:
        file.write(b"[]")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "card.json").write_text("{}")
    store.add_folder(STAGE, tmp_path / "model")
    store.delete(f"artifacts/{STAGE.key}/{store.attempt}/train.parquet/00000.parquet")
    words = r"distill: 1 of the 4 files written to .* have been removed \(train.parquet/00000.parquet\)"
    with pytest.raises(LostFilesError, match=words):
        store.commit(STAGE, {})
    assert not store.has(STAGE.key)
    # What another process has added is looked for, too, where it was told of; what was taken back is not missed.
    again = store.new_attempt()
    again.add(OTHER, "part.jsonl", b"")
    again.discard(OTHER, "part.jsonl")
    again.note_added(OTHER, {"labels.parquet"})
    with pytest.raises(LostFilesError, match="1 of the 1 files"):
        again.commit(OTHER, {})


def test_a_file_that_was_lost_later_is_an_error_not_fewer_rows(store: ArtifactStore) -> None:
    for part, numbers in enumerate(([1, 2], [3])):
        buffer = io.BytesIO()
        pa.parquet.write_table(pa.table({"x": numbers}), buffer)
        store.add(STAGE, f"train.parquet/{part:05d}.parquet", buffer.getvalue())
    store.commit(STAGE, {})
    reader = store.new_attempt()
    assert list(store.manifest(STAGE.key).files) == ["train.parquet/00000.parquet", "train.parquet/00001.parquet"]
    assert reader.read_table(STAGE.key, "train.parquet").column("x").to_pylist() == [1, 2, 3]
    assert reader.open_dataset(STAGE.key, "train.parquet").count_rows() == 3
    store.delete(f"artifacts/{STAGE.key}/{store.attempt}/train.parquet/00001.parquet")
    with pytest.raises(FileNotFoundError):
        reader.read_table(STAGE.key, "train.parquet")


def test_every_committed_fingerprint_is_listed(store: ArtifactStore) -> None:
    assert committed_fingerprints(store.list_artifacts()) == set()
    for stage in (STAGE, OTHER):
        store.commit(stage, {})
    store.write_json("runs/manifest.json", {})
    assert committed_fingerprints(store.list_artifacts()) == {STAGE.fingerprint, OTHER.fingerprint}


def test_tables_in_one_file_or_several(store: ArtifactStore) -> None:
    table = pa.table({"position": [0, 1, 2], "score": [0.5, 0.25, 1.0]})
    for name, part in (("train.parquet", table), ("labels/1.parquet", table[:2]), ("labels/2.parquet", table[2:])):
        buffer = io.BytesIO()
        pa.parquet.write_table(part, buffer)
        store.add(STAGE, name, buffer.getvalue())
    assert store.read_table(STAGE.key, "train.parquet").equals(table)
    assert store.read_table(STAGE.key, "labels").sort_by("position").equals(table)
    assert store.read_table(STAGE.key, "train.parquet", columns=["score"]).column_names == ["score"]


def test_checkpoint_notes(store: ArtifactStore) -> None:
    assert store.find_checkpoint(STAGE.fingerprint) is None
    uris = [store.uri("train", "run-1", "a-4"), store.uri("train", "run-1", "a-8"), store.uri("train", "run-2", "a-9")]
    for step, uri in zip((4, 8, 9), uris):
        store.note_checkpoint(STAGE.fingerprint, uri, step)
    note = store.find_checkpoint(STAGE.fingerprint)
    assert note == {"uri": uris[-1], "step": 9, "runs": ["run-1", "run-2"]}
    assert store.find_checkpoint(OTHER.fingerprint) is None
    assert not store.has(STAGE.key)
    for run in ("run-1", "run-2", "another"):
        store.write_bytes(f"train/{run}/state", b"")
    store.forget_interrupted(["run-2", "another"])  # the stage may still continue from the first
    assert sorted(store.list_names("train")) == ["run-1", "run-2"]
    store.forget_checkpoints([STAGE.fingerprint, OTHER.fingerprint], but="run-2")  # which goes on with other stages
    assert store.list_names("train") == ["run-2"] and store.find_checkpoint(STAGE.fingerprint) is None
    store.forget_interrupted(["run-2"])
    assert store.list_names("train") == []


def test_a_store_travels_by_its_path(store: ArtifactStore) -> None:
    store.commit(STAGE, {})
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.storage, copy.attempt) == (store.storage, store.attempt) and copy.has(STAGE.key)


def test_what_was_committed_travels_with_a_store_and_is_forgotten_with_the_artifact(store: ArtifactStore) -> None:
    store.add(STAGE, "curves.json", b"[1]")
    store.commit(STAGE, {})
    copy = pickle.loads(pickle.dumps(store))
    store.delete_file(f"artifacts/{STAGE.key}/manifest.json")
    for each in (store, copy, copy.new_attempt()):  # none of them looks again
        assert each.has(STAGE.key) and each.read_json(STAGE.key, "curves.json") == [1]
    assert not ArtifactStore(store.storage).has(STAGE.key)
    copy.delete_artifact(STAGE.key)
    assert not copy.has(STAGE.key) and copy.find_manifest(STAGE.key) is None


def test_paths_below_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ArtifactStore("storage").storage == str(tmp_path / "storage")
    assert ArtifactStore("s3://bucket/run/").uri("tune", "x") == "s3://bucket/run/tune/x"
    assert ArtifactStore("storage").uri("tune", "x") == f"{tmp_path}/storage/tune/x"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_path_that_cannot_be_written(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"storage path '.*file/below' cannot be written"):
        ArtifactStore(f"{scheme}{tmp_path}/file/below").check_writable()
    ArtifactStore(f"{scheme}{tmp_path}/new/below").check_writable()


def test_a_storage_uri_that_is_none() -> None:
    with pytest.raises(ValueError, match="cannot be written: nonsense"):
        ArtifactStore("nonsense://bucket/x").check_writable()
