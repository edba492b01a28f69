"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from cast_ray.common.files import PARTIAL, replaced, write_atomically
from cast_ray.common.paths import write_bytes
from cast_ray.runtime.store.artifacts import ArtifactStore


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_atomically(path, "old")
    with replaced(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.parent == path.parent and partial.name.endswith(PARTIAL)
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), replaced(path) as partial:
        partial.write_text("half of")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_every_writer_of_local_files_leaves_the_old_content_where_the_new_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(str(tmp_path))
    write_bytes(str(tmp_path / "dataset"), b"old")
    store.write_bytes("artifact", b"old")

    def fail(*_: object) -> None:
        raise OSError("stopped before the rename")

    monkeypatch.setattr("cast_ray.common.files.os.replace", fail)
    for write in (lambda: write_bytes(str(tmp_path / "dataset"), b"new"), lambda: store.write_bytes("artifact", b"n")):
        with pytest.raises(OSError, match="before the rename"):
            write()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"dataset": b"old", "artifact": b"old"}
