"""Artifacts of stages on any pyarrow filesystem: a directory per fingerprint, its manifest written last.

    <storage>/artifacts/<stage>-<fingerprint>/...files..., manifest.json
    <storage>/checkpoints/<fingerprint>.json      where an unfinished train stage can continue

An artifact without a manifest does not exist: readers look for the manifest only, and a writer that died leaves files
that the next writer overwrites.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet

from cast_ray.stages.graph import Stage

MANIFEST = "manifest.json"


def open_uri(uri: str) -> tuple[pa.fs.FileSystem, str]:
    """Filesystem and path of a local path or URI (s3://, gs://, file://, hdfs://)."""
    if "://" not in uri:
        return pa.fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    return pa.fs.FileSystem.from_uri(uri)


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A folder's files on this machine: the folder itself where it is local, else a temporary copy."""
    fs, path = open_uri(uri)
    if isinstance(fs, pa.fs.LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        pa.fs.copy_files(path, folder, source_filesystem=fs, destination_filesystem=pa.fs.LocalFileSystem())
        yield Path(folder)


class ArtifactStore:
    """Reads and commits artifacts below one storage path. Cheap to build; safe to pickle."""

    def __init__(self, storage: str):
        self.storage = storage if "://" in storage else str(Path(storage).expanduser().resolve())

    def __reduce__(self):
        return ArtifactStore, (self.storage,)

    @property
    def _fs(self) -> tuple[pa.fs.FileSystem, str]:
        return open_uri(self.storage)

    def check_writable(self) -> None:
        """Raises ValueError when the storage path cannot be written."""
        try:
            self.write_json("writable.json", {"checked": time.time()})
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"storage path {self.storage!r} cannot be written: {error}") from None

    def uri(self, *parts: str) -> str:
        return "/".join([self.storage.rstrip("/"), *parts])

    def artifact(self, key: str) -> str:
        """URI of an artifact's directory."""
        return self.uri("artifacts", key)

    def has(self, key: str) -> bool:
        fs, root = self._fs
        return fs.get_file_info(f"{root}/artifacts/{key}/{MANIFEST}").type == pa.fs.FileType.File

    def stored_fingerprints(self) -> set[str]:
        """Fingerprints of every committed artifact (one listing)."""
        fs, root = self._fs
        selector = pa.fs.FileSelector(f"{root}/artifacts", recursive=True, allow_not_found=True)
        return {
            info.path.split("/")[-2].rsplit("-", 1)[-1]
            for info in fs.get_file_info(selector)
            if info.base_name == MANIFEST
        }

    def holds(self, key: str, name: str) -> bool:
        """Whether an artifact has a file of that name."""
        fs, root = self._fs
        return fs.get_file_info(f"{root}/artifacts/{key}/{name}").type == pa.fs.FileType.File

    def read_bytes(self, key: str, name: str) -> bytes:
        fs, root = self._fs
        with fs.open_input_file(f"{root}/artifacts/{key}/{name}") as file:
            return file.read()

    def read_json(self, key: str, name: str) -> Any:
        return json.loads(self.read_bytes(key, name))

    def write_bytes(self, path: str, data: bytes) -> None:
        """Writes one file below the storage path. Local files appear whole or not at all."""
        fs, root = self._fs
        target = f"{root}/{path}"
        fs.create_dir(target.rsplit("/", 1)[0], recursive=True)
        partial = f"{target}.{os.getpid()}.partial" if isinstance(fs, pa.fs.LocalFileSystem) else target
        with fs.open_output_stream(partial) as file:
            file.write(data)
        if partial != target:
            fs.move(partial, target)

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, json.dumps(value, indent=1).encode())

    def add(self, stage: Stage, name: str, data: bytes) -> None:
        """Writes one file of an artifact that is not yet committed."""
        self.write_bytes(f"artifacts/{stage.key}/{name}", data)

    def add_folder(self, stage: Stage, folder: Path) -> None:
        """Copies the files of a local folder into an artifact that is not yet committed, without reading them whole."""
        fs, root = self._fs
        target = f"{root}/artifacts/{stage.key}"
        fs.create_dir(target, recursive=True)
        pa.fs.copy_files(str(folder), target, source_filesystem=pa.fs.LocalFileSystem(), destination_filesystem=fs)

    @contextmanager
    def local_folder(self, key: str) -> Iterator[Path]:
        """An artifact as a local folder, see `local_copy`."""
        with local_copy(self.artifact(key)) as folder:
            yield folder

    def commit(self, stage: Stage, facts: dict[str, Any]) -> None:
        """Makes an artifact exist: writes its manifest (stage, parents, config, `facts`) as the last file."""
        manifest = {
            "stage": stage.name,
            "kind": stage.kind,
            "fingerprint": stage.fingerprint,
            "parents": stage.parents,
            "config": stage.config,
            "steps": stage.steps,
            "committed": time.time(),
            **facts,
        }
        self.add(stage, MANIFEST, json.dumps(manifest, indent=1).encode())

    def manifest(self, key: str) -> dict[str, Any]:
        return self.read_json(key, MANIFEST)

    def read_table(self, key: str, name: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file, or a folder of them, inside an artifact."""
        fs, root = self._fs
        return pa.parquet.read_table(f"{root}/artifacts/{key}/{name}", filesystem=fs, columns=columns)

    def note_checkpoint(self, fingerprint: str, uri: str, step: int) -> None:
        """Remembers where an unfinished train stage can continue, whichever row or run continues it."""
        self.write_json(f"checkpoints/{fingerprint}.json", {"uri": uri, "step": step})

    def find_checkpoint(self, fingerprint: str) -> dict[str, Any] | None:
        note = self.find_bytes(f"checkpoints/{fingerprint}.json")
        return json.loads(note) if note else None

    def forget_run(self, run_name: str, fingerprints: list[str]) -> None:
        """Deletes a finished run's checkpoints and the notes that lead to them: the artifacts have replaced them."""
        fs, root = self._fs
        for fingerprint in fingerprints:
            path = f"{root}/checkpoints/{fingerprint}.json"
            if fs.get_file_info(path).type == pa.fs.FileType.File:
                fs.delete_file(path)
        if fs.get_file_info(f"{root}/train/{run_name}").type == pa.fs.FileType.Directory:
            fs.delete_dir(f"{root}/train/{run_name}")

    def find_bytes(self, path: str) -> bytes | None:
        """One file below the storage path, or None when there is none."""
        fs, root = self._fs
        try:
            with fs.open_input_file(f"{root}/{path}") as file:
                return file.read()
        except FileNotFoundError:
            return None
