"""The store on an S3-compatible server: what it holds is what was written, and each operation sends few requests."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs
from s3_server import BUCKET, S3Server

from cast_ray.common.paths import below, in_few_requests, write_bytes
from cast_ray.data.reading import images
from cast_ray.data.reading.images import read_image
from cast_ray.data.reading.recent_files import RecentFiles, SharedFiles
from cast_ray.plan.graph import Stage
from cast_ray.runtime.data import splits
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.claims import Claims, Presence
from cast_ray.runtime.store.past_stages import PATH, note_past, past_manifests
from cast_ray.runtime.store.pruning import find_prunable, prune

STAGE = Stage("distill", "train", {}, {}, "a" * 20, steps=4)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def store(server: S3Server, request: pytest.FixtureRequest) -> ArtifactStore:
    store = ArtifactStore(server.uri(f"stores/{abs(hash(request.node.name))}"))
    server.reset()
    return store


def test_a_server_begins_empty(server: S3Server, store: ArtifactStore) -> None:
    store.write_bytes("x", b"")
    with S3Server() as second:
        assert ArtifactStore(second.uri("stores")).list_names("") == [] and not second.filesystem().get_file_info(
            fs.FileSelector(BUCKET, recursive=True)
        )


def test_a_small_file_is_one_request(store: ArtifactStore, server: S3Server) -> None:
    store.write_json("runs/x/result.json", {})
    store.write_bytes("claims/stages/me.json", b"")  # an empty one, too
    assert server.requests == {"PUT": 2}
    store.add(STAGE, "curves.json", b"{}")
    with store.open_to_add(STAGE, "results.json") as file:
        file.write(b"[]")
    assert server.requests == {"PUT": 4}


def test_looking_for_what_is_not_there_is_one_request(store: ArtifactStore, server: S3Server) -> None:
    assert not store.has(STAGE.key) and store.find_manifest(STAGE.key) is None
    assert server.requests == {"HEAD": 2}
    store.commit(STAGE, {})
    server.reset()
    assert ArtifactStore(store.storage).has(STAGE.key)
    assert server.requests == {"HEAD": 1}
    server.reset()
    for each in (store, pickle.loads(pickle.dumps(store))):  # they know what it has committed
        assert each.has(STAGE.key) and each.find_manifest(STAGE.key) is not None
    assert server.requests == {}


def test_a_small_table_is_opened_by_fetching_it(store: ArtifactStore, server: S3Server) -> None:
    content = io.BytesIO()
    pq.write_table(pa.table({"position": list(range(9))}), content, row_group_size=4)
    store.add(STAGE, "labels/labels.parquet", content.getvalue())
    server.reset()
    opened = store.open_dataset(STAGE.key, "labels/labels.parquet")
    assert server.requests.total() <= 3  # how large it is, and pyarrow's two to read it
    server.reset()
    pieces = [piece for file in opened.get_fragments() for piece in file.split_by_row_group()]
    assert [sum(batch.num_rows for batch in piece.to_batches()) for piece in pieces] == [4, 4, 1]
    assert opened.to_table(filter=pc.field("position") == 7).num_rows == 1
    assert server.requests == {}


def test_a_store_is_told_from_other_files_by_one_request(store: ArtifactStore, server: S3Server) -> None:
    store.check_writable()
    store.commit(STAGE, {})
    server.reset()
    assert store.exists()
    assert server.requests == {"LIST": 1}
    foreign, missing = (ArtifactStore(server.uri(f"stores/{name}")) for name in ("foreign", "missing"))
    write_bytes(below(foreign.storage, "photos", "1.png"), b"")
    server.reset()
    with pytest.raises(ValueError, match="holds other files"):
        foreign.exists()
    assert server.requests == {"LIST": 1}
    server.reset()
    assert not missing.exists()
    assert server.requests == {"LIST": 1}


def test_claims_and_presence(store: ArtifactStore, server: S3Server) -> None:
    with Presence(store, "ablate.py losses") as presence:
        presence.need([STAGE.fingerprint])
        claims = Claims(store, presence.holder.id)
        server.reset()
        assert claims.take([STAGE.key]) == ([STAGE.key], {})
        assert server.requests == {"PUT": 1, "LIST": 1}
        assert ArtifactStore(store.storage).list_names("claims/stages") == [f"{presence.holder.id}.json"]
        server.reset()
        claims.finished([STAGE.key])
        assert server.requests == {}  # a claim on what is stored costs nothing to give up
        claims.give_back([STAGE.key])
        assert server.requests == {"PUT": 1}
    assert store.list_names("claims/stages") == store.list_names("claims/plans") == []


def test_pruning(store: ArtifactStore) -> None:
    store.add(STAGE, "curves.json", b"{}")
    store.commit(STAGE, {})
    store.write_bytes("labels/b/1", b"x")
    assert find_prunable(store).leftovers == ("labels/b",)
    prune(store, None, True, "test")  # no result names it
    assert store.list_names("labels") == [] and not store.has(STAGE.key)


def test_the_cost_of_earlier_stages_is_one_file(store: ArtifactStore, server: S3Server) -> None:
    """A sweep must not list a store of many artifacts to estimate what it will cost."""
    assert past_manifests(store) == []
    stages = [Stage("distill", "train", {}, {}, f"{i:020d}", steps=4) for i in range(3)]
    for stage in stages[:2]:
        store.commit(stage, {"stage_seconds": 2.0})
    assert {m.fingerprint for m in past_manifests(store)} == {s.fingerprint for s in stages[:2]}  # of an old store
    note_past(store, [s.key for s in stages])  # the third has not run
    server.reset()
    assert {m.fingerprint for m in past_manifests(store)} == {s.fingerprint for s in stages[:2]}
    assert server.requests == {"HEAD": 1, "GET": 1}
    store.write_bytes(PATH, b"[{")
    assert len(past_manifests(store)) == 2


def test_an_image_is_fetched_once(
    store: ArtifactStore, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(np.full((4, 5, 3), 7, np.uint8)).save(tmp_path / "a.png")
    uri = store.uri("images", "a.png")
    write_bytes(uri, (tmp_path / "a.png").read_bytes())
    server.reset()
    for _ in range(3):
        assert read_image(uri, (4, 5)).tolist() == np.full((4, 5, 3), 7).tolist()
    assert server.requests == {"HEAD": 1, "GET": 1}
    monkeypatch.setattr(images, "shared", SharedFiles(tmp_path / "shared"))
    for _ in range(2):  # processes of one node
        monkeypatch.setattr(images, "_recent", RecentFiles(100))
        assert read_image(uri, (4, 5)).max() == 7
    assert server.requests == {"HEAD": 2, "GET": 2}


def test_a_split_is_read_once(store: ArtifactStore, server: S3Server) -> None:
    part = {"fraction": 0.5}
    path = f"splits/{splits.split_key('hash', part)}.json"
    store.write_json(path, {"facts": {"seed": 0}, "labelled": [1, 2], "unlabelled": [0]})
    server.reset()
    for _ in range(3):
        assert splits.stored_split(ArtifactStore(store.storage), "hash", part).labelled.tolist() == [1, 2]
    assert server.requests == {"HEAD": 1, "GET": 1}


def test_options_stay_at_the_end_of_a_uri() -> None:
    assert below("s3://b/store/?region=x", "train", "run") == "s3://b/store/train/run?region=x"
    assert below("/a?b", "c") == "/a?b/c"  # a local folder of that name
    assert in_few_requests("s3://b/x") == "s3://b/x?allow_delayed_open=true"
    assert in_few_requests("s3://b/x?region=y") == "s3://b/x?region=y&allow_delayed_open=true"
    assert in_few_requests("s3://b/x?allow_delayed_open=false") == "s3://b/x?allow_delayed_open=false"
    assert in_few_requests("gs://b/x") == "gs://b/x" and in_few_requests("/a/b") == "/a/b"


def test_a_checkpoint_is_noted_with_its_run(store: ArtifactStore) -> None:
    store.note_checkpoint("f", store.uri("train", "first-run", "f-00000004"), 4)
    store.note_checkpoint("f", store.uri("train", "second-run", "f-00000008"), 8)
    note = store.find_checkpoint("f")
    assert note is not None and note["runs"] == ["first-run", "second-run"]
    store.forget_checkpoints(["f", "g"], but="second-run")
    assert store.find_checkpoint("f") is None
