"""Checkpoints of Ray Train on an object store: the same files, and no request for a folder."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow.fs
from s3_server import BUCKET, S3Server

from cast_ray.runtime.worker.train_storage import train_storage


def test_a_folder_of_this_machine_is_named_as_it_is(tmp_path: Path) -> None:
    assert train_storage(str(tmp_path)) == {"storage_path": str(tmp_path)}
    assert train_storage(f"file://{tmp_path}") == {"storage_path": f"file://{tmp_path}"}


def test_files_are_copied_there_and_back_without_folders(tmp_path: Path) -> None:
    local = pyarrow.fs.LocalFileSystem()
    saved, loaded = tmp_path / "saved", tmp_path / "loaded"
    saved.mkdir()
    (saved / "train_state.pt").write_bytes(b"state")
    with S3Server() as server:
        storage = train_storage(server.uri("storage/train"))
        filesystem = pickle.loads(pickle.dumps(storage["storage_filesystem"]))  # as Train sends it to its workers
        place = f"{storage['storage_path']}/run/checkpoint"
        server.reset()
        filesystem.create_dir(place)
        pyarrow.fs.copy_files(str(saved), place, source_filesystem=local, destination_filesystem=filesystem)
        assert server.requests == {"PUT": 1}
        assert filesystem.get_file_info(place).type == pyarrow.fs.FileType.Directory
        loaded.mkdir()
        pyarrow.fs.copy_files(place, str(loaded), source_filesystem=filesystem, destination_filesystem=local)
        assert (loaded / "train_state.pt").read_bytes() == b"state"
        filesystem.delete_dir(place)
        assert filesystem.get_file_info(f"{place}/train_state.pt").type == pyarrow.fs.FileType.NotFound
        found = server.filesystem().get_file_info(pyarrow.fs.FileSelector(f"{BUCKET}/storage", recursive=True))
        assert [info.path for info in found if info.is_file] == []
