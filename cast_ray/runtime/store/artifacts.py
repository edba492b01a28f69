"""Artifacts of stages on any pyarrow filesystem: a directory per fingerprint, its manifest written last.

    <storage>/artifacts/<kind>-<fingerprint>/<attempt>/...files...
    <storage>/artifacts/<kind>-<fingerprint>/manifest.json      says which attempt counts
    <storage>/checkpoints/<fingerprint>.json                    where an unfinished train stage can continue

An artifact without a manifest does not exist: readers find an artifact's files through the manifest only, which names
them, and a writer that died leaves an attempt that nobody reads. Writers never share a folder, so that two that make
the same stage at the same time (see `claims.py`) cannot spoil each other's files: whichever manifest is written last
names one whole attempt.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet

from cast_ray.common.files import MAX_NAMED, PARTIAL, write_atomically
from cast_ray.common.outages import patiently, without_patience
from cast_ray.common.paths import absolute, below, make_folder, resolve
from cast_ray.common.text import first_line, first_of
from cast_ray.contracts.manifest import Manifest, manifest_class, read_manifest
from cast_ray.plan.graph import Kind, Stage, fingerprint_of
from cast_ray.runtime.metrics import store_request

if TYPE_CHECKING:
    import pyarrow.dataset

MANIFEST = "manifest.json"
MARK = "writable.json"
"""The file that every run writes into its store first: a folder with it is a store."""
NUM_READERS = 16
"""Small files read at a time: an object store answers in tens of milliseconds, whatever the size."""

READ_AHEAD_BYTES = 4 << 20
"""What one request brings of a file that is read line by line."""
SMALL_TABLE_BYTES = 32 << 20
"""Parquet files up to this size are fetched whole: their reader sends several requests for each."""

_KEY = re.compile(rf"({'|'.join(get_args(Kind))})-\w+")

T = TypeVar("T")
R = TypeVar("R")


def _unpickled(storage: str, attempt: str, carried: Mapping[str, Manifest]) -> ArtifactStore:
    return ArtifactStore(storage, attempt).carry(carried)


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A folder's files on this machine: the folder itself where it is local, else a temporary copy."""
    fs, path = resolve(absolute(uri))
    if isinstance(fs, pa.fs.LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = pa.fs.LocalFileSystem()
        patiently(lambda: pa.fs.copy_files(path, folder, source_filesystem=fs, destination_filesystem=local))
        yield Path(folder)


def read_each(read: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`read` of each item, many at a time, in order."""
    with ThreadPoolExecutor(NUM_READERS) as pool:
        return list(pool.map(read, items))


def _fetch_table(fs: pa.fs.FileSystem, path: str, columns: list[str] | None = None) -> pa.Table:
    """A small Parquet file of an object store, fetched whole."""
    return pa.parquet.read_table(pa.BufferReader(_fetch(fs, path)), columns=columns)


def _fetch(fs: pa.fs.FileSystem, path: str) -> pa.Buffer:
    with fs.open_input_file(path) as file:
        return file.read_buffer()


class LostFilesError(RuntimeError):
    """Files of an artifact have gone before it was committed: making it again is the only remedy."""


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


def committed_fingerprints(listed: Mapping[str, Listed]) -> set[str]:
    """Returns the fingerprints of the artifacts of a listing that are committed."""
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
        self._added: dict[str, set[str]] = {}
        """Key of each artifact that is being made -> names of the files that this object has written."""
        self._carried: dict[str, Manifest] = {}
        self._committed: dict[str, Manifest] = {}
        """Key -> manifest of each artifact that was read or committed. It never changes, and the presence of a sweep
        keeps it in the store."""

    def __reduce__(self) -> tuple[Callable[..., ArtifactStore], tuple[str, str, dict[str, Manifest]]]:
        return _unpickled, (self.storage, self.attempt, self._carried)

    def new_attempt(self) -> ArtifactStore:
        """Returns the same store with a separate folder to write to."""
        return ArtifactStore(self.storage).carry(self._carried)

    def carry(self, manifests: Mapping[str, Manifest]) -> ArtifactStore:
        """Adds manifests, by key, of artifacts that copies of this store will read; other processes need not ask for
        them. Returns this store."""
        self._carried |= manifests
        self._committed |= manifests
        return self

    @property
    def _fs(self) -> tuple[pa.fs.FileSystem, str]:
        return resolve(absolute(self.storage))

    def exists(self) -> bool:
        """Whether there is a store at the storage path; False where the path is missing or empty.

        It costs one listing.

        Raises:
            ValueError: something else is there: a file, or a folder of other files.
        """
        try:
            with without_patience():
                found = self.list_names("")
            names = [n for n in found if not n.startswith(".") and n != "lost+found"]
            if not names or MARK in names:
                return bool(names)
            # A store that was copied in part, or made by other means than a run.
            if "artifacts" in names and any(_KEY.fullmatch(name) for name in self.list_names("artifacts")):
                return True
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"storage path {self.storage!r} cannot be read: {first_line(error)}") from None
        raise ValueError(
            f"storage path {self.storage!r} holds other files ({first_of(sorted(names), MAX_NAMED)}): expected a "
            "folder that is missing, empty or the --storage of earlier runs"
        )

    def check_writable(self) -> None:
        """Raises ValueError when the storage path cannot be written; leaves the mark by which a store is known."""
        try:
            with without_patience():
                self.write_json(MARK, {"checked": time.time()})
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"storage path {self.storage!r} cannot be written: {error}") from None

    def now(self) -> float:
        """The time by the clock that dates this store's files."""
        self.check_writable()
        written = self.changed(MARK)
        assert written is not None  # it has just been written
        return written

    def uri(self, *parts: str) -> str:
        return below(self.storage, *parts)

    def artifact(self, key: str) -> str:
        """URI of the folder with an artifact's files: the committed attempt's, else this store's own."""
        return self.uri(self._folder(key))

    def _folder(self, key: str) -> str:
        if key in self._added:
            return f"artifacts/{key}/{self.attempt}"
        if key not in self._committed and self.find_manifest(key) is None:
            return f"artifacts/{key}/{self.attempt}"
        attempt = self._committed[key].attempt
        return f"artifacts/{key}/{attempt}" if attempt else f"artifacts/{key}"

    def _files(self, key: str, name: str) -> str | list[str]:
        """Path of a file of an artifact, or those of all files in a folder of it: the ones that its manifest names, so
        that one which has been lost is an error and not a part of the data that is silently missing."""
        _, root = self._fs
        folder = f"{root}/{self._folder(key)}"
        named = self._committed[key].files if key in self._committed and key not in self._added else {}
        parts = sorted(file for file in named if file.startswith(f"{name}/"))
        return [f"{folder}/{part}" for part in parts] or f"{folder}/{name}"

    def has(self, key: str) -> bool:
        """Whether an artifact is committed; without a request where this object has read or written its manifest."""
        return key in self._committed or self._is_file(f"artifacts/{key}/{MANIFEST}")

    @store_request
    def _is_file(self, path: str) -> bool:
        """Whether there is a file. Opening it is one request to an object store; asking what a path is takes two where
        there is no file, since it may be a folder."""
        fs, root = self._fs
        try:
            fs.open_input_file(f"{root}/{path}").close()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    @store_request
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

    def holds(self, key: str, name: str) -> bool:
        """Whether an artifact has a file of that name."""
        return self._is_file(f"{self._folder(key)}/{name}")

    @store_request
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

    @store_request
    def write_bytes(self, path: str, data: bytes) -> None:
        """Writes one file below the storage path, which appears whole or not at all (object stores do so anyway)."""
        fs, root = self._fs
        target = f"{root}/{path}"
        if isinstance(fs, pa.fs.LocalFileSystem):
            write_atomically(target, data)
            return
        make_folder(fs, target.rsplit("/", 1)[0])
        with fs.open_output_stream(target) as file:
            file.write(data)

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, json.dumps(value, indent=1).encode())

    def add(self, stage: Stage, name: str, data: bytes) -> None:
        """Writes one file of an artifact that this store's attempt has not yet committed."""
        self.note_added(stage, {name})
        self.write_bytes(f"artifacts/{stage.key}/{self.attempt}/{name}", data)

    def added(self, stage: Stage) -> frozenset[str]:
        """Names of the files that this object has added to an artifact that is not yet committed."""
        return frozenset(self._added.get(stage.key, ()))

    def note_added(self, stage: Stage, names: Iterable[str]) -> None:
        """Tells of files that a copy of this store has added elsewhere, so that `commit` looks for them."""
        self._added.setdefault(stage.key, set()).update(names)

    @contextlib.contextmanager
    def open_to_add(self, stage: Stage, name: str) -> Iterator[Any]:
        """One file of an artifact that is not yet committed, to be written bit by bit."""
        self.note_added(stage, {name})
        fs, root = self._fs
        path = f"{root}/{self._folder(stage.key)}/{name}"
        make_folder(fs, path.rsplit("/", 1)[0])
        with fs.open_output_stream(path) as file:
            yield file

    @contextlib.contextmanager
    def read_stream(self, stage: Stage, name: str) -> Iterator[Any]:
        """A file of an artifact, also of one that is not yet committed, open for reading line by line."""
        fs, root = self._fs
        with (
            fs.open_input_stream(f"{root}/{self._folder(stage.key)}/{name}") as file,
            io.BufferedReader(file, READ_AHEAD_BYTES) as lines,
        ):
            yield lines

    @store_request
    def add_folder(self, stage: Stage, folder: Path) -> None:
        """Copies the files of a local folder into an artifact that is not yet committed, without reading them whole."""
        self.note_added(stage, {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()})
        fs, root = self._fs
        target = f"{root}/{self._folder(stage.key)}"
        make_folder(fs, target)
        pa.fs.copy_files(str(folder), target, source_filesystem=pa.fs.LocalFileSystem(), destination_filesystem=fs)

    @contextlib.contextmanager
    def local_folder(self, key: str) -> Iterator[Path]:
        """An artifact as a local folder, see `local_copy`."""
        with local_copy(self.artifact(key)) as folder:
            yield folder

    def discard(self, stage: Stage, name: str) -> None:
        """Removes one file of an artifact that is not yet committed."""
        self.delete_file(f"{self._folder(stage.key)}/{name}")
        self._added.get(stage.key, set()).discard(name)

    def commit(self, stage: Stage, facts: dict[str, Any]) -> bool:
        """Makes an artifact exist: writes its manifest as the last file.

        Args:
            facts: fields of the manifest beside those that the stage itself gives, and whatever else it tells.

        Returns:
            False when somebody else has committed it meanwhile: theirs counts, this attempt is thrown away.

        Raises:
            LostFilesError: a file that was added is not there any more.
        """
        added = self._added.pop(stage.key, set())
        found, own = self._list_files(f"artifacts/{stage.key}"), f"{self.attempt}/"
        if MANIFEST in found:
            if self._folder(stage.key) != f"artifacts/{stage.key}/{self.attempt}":
                self.delete_folder(f"artifacts/{stage.key}/{self.attempt}")
            return False
        files = {name.removeprefix(own): size for name, size in found.items() if name.startswith(own)}
        if lost := sorted(added - files.keys()):
            raise LostFilesError(
                f"{stage.name}: {len(lost)} of the {len(added)} files written to "
                f"{self.uri('artifacts', stage.key, self.attempt)} have been removed ({lost[0]}): only `store gc` "
                "may delete files there; run the same command again"
            )
        kind = manifest_class(stage.kind)
        manifest = kind(
            schema_version=kind.VERSION,
            stage=stage.name,
            kind=stage.kind,
            fingerprint=stage.fingerprint,
            attempt=self.attempt,
            files=dict(sorted(files.items())),
            parents=stage.parents,
            config=stage.config,
            steps=stage.steps,
            committed=time.time(),
            **facts,
        )
        self.write_bytes(f"artifacts/{stage.key}/{MANIFEST}", manifest.to_json().encode())
        self.carry({stage.key: manifest})  # the next stage reads these files
        return True

    @store_request
    def _list_files(self, path: str) -> dict[str, int]:
        """Name relative to a folder below the storage path -> bytes, of all files in it."""
        fs, root = self._fs
        folder = f"{root}/{path}"
        found = fs.get_file_info(pa.fs.FileSelector(folder, recursive=True, allow_not_found=True))
        files = (i for i in found if i.type == pa.fs.FileType.File and not i.base_name.endswith(PARTIAL))
        return {info.path[len(folder) + 1 :]: info.size for info in files}

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
        """Returns the manifest of an artifact, or None if the artifact is not committed."""
        if key in self._committed:
            return self._committed[key]
        path = f"artifacts/{key}/{MANIFEST}"
        found = self.find_bytes(path)
        if not found:
            return None
        manifest = read_manifest(found, self.uri(path))
        self._committed[key] = manifest  # the artifact's files are read next, more often than not
        return manifest

    def find_manifests(self, keys: Iterable[str]) -> dict[str, Manifest]:
        """Key -> manifest of those artifacts that exist, several read at a time."""
        wanted = list(dict.fromkeys(keys))
        found = zip(wanted, read_each(self.find_manifest, wanted))
        return {key: manifest for key, manifest in found if manifest is not None}

    def readable_manifest(self, key: str) -> Manifest | None:
        """The same for overviews of a whole store: None also where it cannot be read, so that it hides no other."""
        try:
            return self.find_manifest(key)
        except ValueError:
            return None

    @store_request
    def read_table(self, key: str, name: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file, or a folder of them, inside an artifact."""
        files, fs = self._files(key, name), self._fs[0]
        sizes = self._committed[key].files if key in self._committed and key not in self._added else {}
        if isinstance(fs, pa.fs.LocalFileSystem) or not 0 < self._size_of(name, sizes) <= SMALL_TABLE_BYTES:
            return pa.parquet.read_table(files, filesystem=fs, columns=columns)
        paths = [files] if isinstance(files, str) else files
        return pa.concat_tables(read_each(lambda path: _fetch_table(fs, path, columns), paths))

    @staticmethod
    def _size_of(name: str, sizes: Mapping[str, int]) -> int:
        """Bytes of a file, or of all files of a folder, of an artifact; 0 where its manifest does not say it."""
        return sum(size for file, size in sizes.items() if file == name or file.startswith(f"{name}/"))

    @store_request
    def open_dataset(self, key: str, name: str) -> pyarrow.dataset.Dataset:
        """A Parquet file, or a folder of them, inside an artifact, to be read piece by piece.

        Small ones of an object store are fetched whole: a reader sends several requests for each piece.
        """
        from pyarrow import dataset  # loads pandas, which most users of a store do without

        files, fs = self._files(key, name), self._fs[0]
        if not isinstance(fs, pa.fs.LocalFileSystem):
            paths = [files] if isinstance(files, str) else files
            infos = fs.get_file_info(paths)
            are_files = all(info.type == pa.fs.FileType.File for info in infos)
            if are_files and sum(info.size for info in infos) <= SMALL_TABLE_BYTES:
                parquet = dataset.ParquetFileFormat()
                pieces = read_each(lambda path: parquet.make_fragment(_fetch(fs, path)), paths)
                return dataset.FileSystemDataset(pieces, pieces[0].physical_schema, parquet)
        return dataset.dataset(files, filesystem=fs, format="parquet")

    @store_request
    def read_tables(self, paths: list[str]) -> list[pa.Table]:
        """Parquet files below the storage path, several at a time."""
        fs, root = self._fs
        if isinstance(fs, pa.fs.LocalFileSystem):
            return read_each(lambda path: pa.parquet.read_table(f"{root}/{path}", filesystem=fs), paths)
        return read_each(lambda path: _fetch_table(fs, f"{root}/{path}"), paths)

    def note_checkpoint(self, fingerprint: str, uri: str, step: int) -> None:
        """Remembers where an unfinished train stage can continue, whichever row or run continues it.

        Args:
            uri: `<storage>/train/<run>/<checkpoint>`; earlier runs of the stage stay in the note until it is finished.
        """
        before = self.find_checkpoint(fingerprint)
        runs = [*(before["runs"] if before else []), uri.partition("?")[0].split("/")[-2]]
        note = {"uri": uri, "step": step, "runs": list(dict.fromkeys(runs))}
        self.write_json(f"checkpoints/{fingerprint}.json", note)

    def find_checkpoint(self, fingerprint: str) -> dict[str, Any] | None:
        note = self.find_bytes(f"checkpoints/{fingerprint}.json")
        return json.loads(note) if note else None

    def forget_checkpoints(self, fingerprints: Iterable[str], but: str) -> None:
        """Deletes the notes of finished stages' checkpoints and the interrupted runs that they lead to.

        The artifacts have replaced them.

        Args:
            but: run that stays: the one that has finished them, which may still be at work for other stages.
        """
        runs: set[str] = set()
        for fingerprint in fingerprints:
            if (note := self.find_checkpoint(fingerprint)) is not None:
                runs |= set(note["runs"])
                self.delete_file(f"checkpoints/{fingerprint}.json")
        for run in runs - {but}:
            self.forget_run(run)

    def forget_run(self, run: str) -> None:
        """Deletes the checkpoints of a run of Ray Train that has ended."""
        self.delete_folder(f"train/{run}")

    def forget_interrupted(self, runs: Iterable[str]) -> None:
        """Deletes those of these runs, all ended in the middle, from which no unfinished stage could continue."""
        notes = [self.find_checkpoint(name.removesuffix(".json")) for name in self.list_names("checkpoints")]
        kept = {run for note in notes if note is not None for run in note["runs"]}
        for run in set(runs) - kept:
            self.forget_run(run)

    @store_request
    def find_bytes(self, path: str) -> bytes | None:
        """One file below the storage path, or None when there is none."""
        fs, root = self._fs
        try:
            with fs.open_input_file(f"{root}/{path}") as file:
                return file.read()
        except FileNotFoundError:
            return None

    @store_request
    def list_names(self, path: str) -> list[str]:
        """Names of the files and folders directly below a path; none where there is no such folder."""
        fs, root = self._fs
        found = fs.get_file_info(pa.fs.FileSelector(f"{root}/{path}", allow_not_found=True))
        return [info.base_name for info in found if not info.base_name.endswith(PARTIAL)]

    @store_request
    def changed(self, path: str) -> float | None:
        """Returns when a file was last written, by the filesystem's clock; None if there is no such file."""
        fs, root = self._fs
        info = fs.get_file_info(f"{root}/{path}")
        return info.mtime.timestamp() if info.type == pa.fs.FileType.File and info.mtime else None

    @store_request
    def delete_file(self, path: str) -> None:
        """Removes one file below the storage path, if it is there; cheaper than `delete`, which asks what it is."""
        fs, root = self._fs
        with contextlib.suppress(FileNotFoundError):
            fs.delete_file(f"{root}/{path}")

    @store_request
    def delete_folder(self, path: str) -> None:
        """Removes a folder below the storage path, if it is there; cheaper than `delete`, too."""
        fs, root = self._fs
        with contextlib.suppress(FileNotFoundError):
            fs.delete_dir(f"{root}/{path}")

    @store_request
    def delete(self, path: str) -> None:
        """Removes a file or folder below the storage path, if it exists."""
        fs, root = self._fs
        kind = fs.get_file_info(f"{root}/{path}").type
        if kind == pa.fs.FileType.File:
            self.delete_file(path)
        elif kind == pa.fs.FileType.Directory:
            self.delete_folder(path)

    def delete_artifact(self, key: str) -> None:
        """Removes an artifact, its manifest first: from then on it does not exist."""
        self._committed.pop(key, None)
        self._carried.pop(key, None)
        self.delete_file(f"artifacts/{key}/{MANIFEST}")
        self.delete_folder(f"artifacts/{key}")
