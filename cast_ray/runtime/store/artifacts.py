"""Artifacts of stages on any pyarrow filesystem: a directory per fingerprint, its manifest written last.

    <storage>/artifacts/<kind>-<fingerprint>/<attempt>/...files...
    <storage>/artifacts/<kind>-<fingerprint>/manifest.json      says which attempt counts
    <storage>/checkpoints/<fingerprint>.json                    where an unfinished train stage can continue

An artifact without a manifest does not exist: readers find an artifact's files through the manifest only, and a writer
that died leaves an attempt that nobody reads. Writers never share a folder, so that two that make the same stage at the
same time (see `claims.py`) cannot spoil each other's files: whichever manifest is written last names one whole attempt.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet

from cast_ray.common.files import PARTIAL, write_atomically
from cast_ray.common.paths import absolute, resolve
from cast_ray.contracts.manifest import Manifest, manifest_class, read_manifest
from cast_ray.plan.graph import Stage, fingerprint_of

MANIFEST = "manifest.json"
OBJECT_STORES = ("s3", "gcs", "abfs")
"""Where folders are only a way of speaking, and making one costs a request."""
NUM_READERS = 16
"""Small files read at a time: an object store answers in tens of milliseconds, whatever the size."""

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A folder's files on this machine: the folder itself where it is local, else a temporary copy."""
    fs, path = resolve(absolute(uri))
    if isinstance(fs, pa.fs.LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        pa.fs.copy_files(path, folder, source_filesystem=fs, destination_filesystem=pa.fs.LocalFileSystem())
        yield Path(folder)


def read_each(read: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`read` of each item, many at a time, in order."""
    with ThreadPoolExecutor(NUM_READERS) as pool:
        return list(pool.map(read, items))


@dataclass
class Listed:
    """One artifact as a listing of the store shows it."""

    key: str
    num_bytes: int = 0
    committed: float | None = None
    """When its manifest was written, by the filesystem's clock (seconds since 1970); None: there is no manifest."""
    changed: float = 0.0
    """When its newest file was written, by the same clock."""

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.key)


def committed(listed: Mapping[str, Listed]) -> set[str]:
    """Fingerprints of the artifacts of a listing that exist."""
    return {artifact.fingerprint for artifact in listed.values() if artifact.committed is not None}


class ArtifactStore:
    """Reads and commits artifacts below one storage path. Cheap to build; safe to pickle.

    Args:
        storage: local path or URI.
        attempt: folder that this store's files go to; copies sent to the workers of one stage share it.
    """

    def __init__(self, storage: str, attempt: str | None = None):
        self.storage = storage if "://" in storage else str(Path(storage).expanduser().resolve())
        self.attempt = attempt or uuid.uuid4().hex[:8]
        self._adding: set[str] = set()
        self._committed: dict[str, str] = {}

    def __reduce__(self) -> tuple[type[ArtifactStore], tuple[str, str]]:
        return ArtifactStore, (self.storage, self.attempt)

    def new_attempt(self) -> ArtifactStore:
        """The same store with a folder of its own to write to."""
        return ArtifactStore(self.storage)

    @property
    def _fs(self) -> tuple[pa.fs.FileSystem, str]:
        return resolve(absolute(self.storage))

    def check_writable(self) -> None:
        """Raises ValueError when the storage path cannot be written."""
        try:
            self.write_json("writable.json", {"checked": time.time()})
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"storage path {self.storage!r} cannot be written: {error}") from None

    def now(self) -> float:
        """The time by the clock that dates this store's files."""
        self.check_writable()
        fs, root = self._fs
        return fs.get_file_info(f"{root}/writable.json").mtime.timestamp()

    def uri(self, *parts: str) -> str:
        return "/".join([self.storage.rstrip("/"), *parts])

    def artifact(self, key: str) -> str:
        """URI of the folder with an artifact's files: the committed attempt's, else this store's own."""
        return self.uri(self._folder(key))

    def _folder(self, key: str) -> str:
        if key not in self._adding and key not in self._committed:
            manifest = self.find_manifest(key)
            if manifest is not None:
                self._committed[key] = manifest.attempt
        attempt = self._committed.get(key, self.attempt) if key not in self._adding else self.attempt
        return f"artifacts/{key}/{attempt}" if attempt else f"artifacts/{key}"

    def has(self, key: str) -> bool:
        fs, root = self._fs
        return fs.get_file_info(f"{root}/artifacts/{key}/{MANIFEST}").type == pa.fs.FileType.File

    def list_artifacts(self) -> dict[str, Listed]:
        """Every artifact by key, committed or not (one listing)."""
        fs, root = self._fs
        prefix = len(f"{root}/artifacts/")
        found: dict[str, Listed] = {}
        for info in fs.get_file_info(pa.fs.FileSelector(f"{root}/artifacts", recursive=True, allow_not_found=True)):
            if info.type != pa.fs.FileType.File:
                continue
            key, _, name = info.path[prefix:].partition("/")
            listed = found.setdefault(key, Listed(key))
            listed.num_bytes += info.size or 0
            written = info.mtime.timestamp() if info.mtime is not None else 0.0
            listed.changed = max(listed.changed, written)
            if name == MANIFEST:
                listed.committed = written
        return found

    def stored_fingerprints(self) -> set[str]:
        """Fingerprints of every committed artifact (one listing)."""
        return committed(self.list_artifacts())

    def holds(self, key: str, name: str) -> bool:
        """Whether an artifact has a file of that name."""
        fs, root = self._fs
        return fs.get_file_info(f"{root}/{self._folder(key)}/{name}").type == pa.fs.FileType.File

    def read_bytes(self, key: str, name: str) -> bytes:
        fs, root = self._fs
        with fs.open_input_file(f"{root}/{self._folder(key)}/{name}") as file:
            return file.read()

    def read_json(self, key: str, name: str) -> Any:
        return json.loads(self.read_bytes(key, name))

    def find_file(self, key: str, name: str) -> bytes | None:
        """A file of an artifact that not every one has; None where it has not."""
        try:
            return self.read_bytes(key, name)
        except FileNotFoundError:
            return None

    def write_bytes(self, path: str, data: bytes) -> None:
        """Writes one file below the storage path, which appears whole or not at all (object stores do so anyway)."""
        fs, root = self._fs
        target = f"{root}/{path}"
        if isinstance(fs, pa.fs.LocalFileSystem):
            write_atomically(target, data)
            return
        if fs.type_name not in OBJECT_STORES:
            fs.create_dir(target.rsplit("/", 1)[0], recursive=True)
        with fs.open_output_stream(target) as file:
            file.write(data)

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, json.dumps(value, indent=1).encode())

    def add(self, stage: Stage, name: str, data: bytes) -> None:
        """Writes one file of an artifact that this store's attempt has not yet committed."""
        self._adding.add(stage.key)
        self.write_bytes(f"artifacts/{stage.key}/{self.attempt}/{name}", data)

    @contextlib.contextmanager
    def open_to_add(self, stage: Stage, name: str) -> Iterator[Any]:
        """One file of an artifact that is not yet committed, to be written bit by bit."""
        self._adding.add(stage.key)
        fs, root = self._fs
        path = f"{root}/{self._folder(stage.key)}/{name}"
        fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
        with fs.open_output_stream(path) as file:
            yield file

    @contextlib.contextmanager
    def read_stream(self, stage: Stage, name: str) -> Iterator[Any]:
        """A file of an artifact, also of one that is not yet committed, open for reading line by line."""
        fs, root = self._fs
        with fs.open_input_stream(f"{root}/{self._folder(stage.key)}/{name}") as file, io.BufferedReader(file) as lines:
            yield lines

    def add_folder(self, stage: Stage, folder: Path) -> None:
        """Copies the files of a local folder into an artifact that is not yet committed, without reading them whole."""
        self._adding.add(stage.key)
        fs, root = self._fs
        target = f"{root}/{self._folder(stage.key)}"
        fs.create_dir(target, recursive=True)
        pa.fs.copy_files(str(folder), target, source_filesystem=pa.fs.LocalFileSystem(), destination_filesystem=fs)

    @contextlib.contextmanager
    def local_folder(self, key: str) -> Iterator[Path]:
        """An artifact as a local folder, see `local_copy`."""
        with local_copy(self.artifact(key)) as folder:
            yield folder

    def discard(self, stage: Stage, name: str) -> None:
        """Removes one file of an artifact that is not yet committed."""
        self.delete(f"{self._folder(stage.key)}/{name}")

    def commit(self, stage: Stage, facts: dict[str, Any]) -> bool:
        """Makes an artifact exist: writes its manifest as the last file.

        Args:
            facts: fields of the manifest beside those that the stage itself gives, and whatever else it tells.

        Returns:
            False when somebody else has committed it meanwhile: theirs counts, this attempt is thrown away.
        """
        self._adding.discard(stage.key)
        if self.has(stage.key):
            if self._folder(stage.key) != f"artifacts/{stage.key}/{self.attempt}":
                self.delete(f"artifacts/{stage.key}/{self.attempt}")
            return False
        kind = manifest_class(stage.kind)
        manifest = kind(
            schema_version=kind.VERSION,
            stage=stage.name,
            kind=stage.kind,
            fingerprint=stage.fingerprint,
            attempt=self.attempt,
            parents=stage.parents,
            config=stage.config,
            steps=stage.steps,
            committed=time.time(),
            **facts,
        )
        self.write_bytes(f"artifacts/{stage.key}/{MANIFEST}", manifest.to_json().encode())
        return True

    def manifest(self, key: str) -> Manifest:
        """What an artifact is.

        Raises:
            FileNotFoundError: it is not committed.
            ValueError: its manifest cannot be read, see `contracts.manifest.read_manifest`.
        """
        manifest = self.find_manifest(key)
        if manifest is None:
            raise FileNotFoundError(f"no artifact {self.uri('artifacts', key)}")
        return manifest

    def find_manifest(self, key: str) -> Manifest | None:
        """The same, or None where the artifact is not committed."""
        path = f"artifacts/{key}/{MANIFEST}"
        found = self.find_bytes(path)
        return read_manifest(found, self.uri(path)) if found else None

    def readable_manifest(self, key: str) -> Manifest | None:
        """The same for overviews of a whole store: None also where it cannot be read, so that it hides no other."""
        try:
            return self.find_manifest(key)
        except ValueError:
            return None

    def read_table(self, key: str, name: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file, or a folder of them, inside an artifact."""
        fs, root = self._fs
        return pa.parquet.read_table(f"{root}/{self._folder(key)}/{name}", filesystem=fs, columns=columns)

    def open_dataset(self, key: str, name: str) -> pa.dataset.Dataset:
        """A folder of Parquet files inside an artifact, to be read piece by piece."""
        fs, root = self._fs
        return pa.dataset.dataset(f"{root}/{self._folder(key)}/{name}", filesystem=fs, format="parquet")

    def read_tables(self, paths: list[str]) -> list[pa.Table]:
        """Parquet files below the storage path, several at a time."""
        fs, root = self._fs
        return read_each(lambda path: pa.parquet.read_table(f"{root}/{path}", filesystem=fs), paths)

    def note_checkpoint(self, fingerprint: str, uri: str, step: int) -> None:
        """Remembers where an unfinished train stage can continue, whichever row or run continues it.

        Args:
            uri: `<storage>/train/<run>/<checkpoint>`; earlier runs of the stage stay in the note until it is finished.
        """
        before = self.find_checkpoint(fingerprint)
        runs = [*(before["runs"] if before else []), uri.split("/")[-2]]
        note = {"uri": uri, "step": step, "runs": list(dict.fromkeys(runs))}
        self.write_json(f"checkpoints/{fingerprint}.json", note)

    def find_checkpoint(self, fingerprint: str) -> dict[str, Any] | None:
        note = self.find_bytes(f"checkpoints/{fingerprint}.json")
        return json.loads(note) if note else None

    def forget_run(self, run_name: str, fingerprints: list[str]) -> None:
        """Deletes a finished run's checkpoints, those of interrupted runs before it and the notes that lead to them.

        The artifacts have replaced them.
        """
        runs = {run_name}
        for fingerprint in fingerprints:
            runs |= set((self.find_checkpoint(fingerprint) or {}).get("runs", []))
            self.delete(f"checkpoints/{fingerprint}.json")
        for run in runs:
            self.delete(f"train/{run}")

    def find_bytes(self, path: str) -> bytes | None:
        """One file below the storage path, or None when there is none."""
        fs, root = self._fs
        try:
            with fs.open_input_file(f"{root}/{path}") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def list_names(self, path: str) -> list[str]:
        """Names of the files and folders directly below a path; none where there is no such folder."""
        fs, root = self._fs
        found = fs.get_file_info(pa.fs.FileSelector(f"{root}/{path}", allow_not_found=True))
        return [info.base_name for info in found if not info.base_name.endswith(PARTIAL)]

    def changed(self, path: str) -> float | None:
        """When a file was last written, by the filesystem's clock; None when there is none."""
        fs, root = self._fs
        info = fs.get_file_info(f"{root}/{path}")
        return info.mtime.timestamp() if info.type == pa.fs.FileType.File and info.mtime else None

    def delete(self, path: str) -> None:
        """Removes a file or folder below the storage path, if there is one."""
        fs, root = self._fs
        kind = fs.get_file_info(f"{root}/{path}").type
        with contextlib.suppress(FileNotFoundError):
            if kind == pa.fs.FileType.File:
                fs.delete_file(f"{root}/{path}")
            elif kind == pa.fs.FileType.Directory:
                fs.delete_dir(f"{root}/{path}")

    def delete_artifact(self, key: str) -> None:
        """Removes an artifact, its manifest first: from then on it does not exist."""
        self.delete(f"artifacts/{key}/{MANIFEST}")
        self.delete(f"artifacts/{key}")
