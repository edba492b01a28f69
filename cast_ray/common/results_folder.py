"""The folder that a command writes its results to: on this machine, or in an object store.

Reports, drawings and event files are written by code that knows local files only. A folder in an object store is
therefore kept as a temporary copy on this machine: what is needed is fetched, and what is new or changed is sent.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pyarrow import ArrowException
from pyarrow import fs as pafs

from cast_ray.common.digest import digest_of
from cast_ray.common.files import PARTIAL, write_atomically
from cast_ray.common.outages import patiently
from cast_ray.common.paths import absolute, below, is_uri, read_object, resolve, write_object
from cast_ray.common.text import first_line

NUM_AT_A_TIME = 16
"""Files that are fetched or sent at a time."""


class ResultsFolder:
    """A folder of results.

    place: path or URI, as the user knows it; path: the same on this machine.
    """

    def __init__(self, place: str, path: Path):
        self.place, self.path = place, path
        self._known: dict[str, tuple[int, int]] = {}
        """Name of each file that is equal here and there -> its size and time here."""

    @property
    def is_remote(self) -> bool:
        """Whether `path` is a copy of what lies at `place`."""
        return is_uri(self.place)

    def at(self, path: Path) -> str:
        """Path or URI by which the user finds one of its files or folders."""
        return below(self.place, path.relative_to(self.path).as_posix()) if self.is_remote else str(path)

    def names(self) -> list[str]:
        """Names of the files and folders directly in it.

        Raises:
            ValueError: the object store cannot be read.
        """
        if not self.is_remote:
            return sorted(os.listdir(self.path)) if self.path.is_dir() else []
        return sorted({info.base_name for info in self._list("", recursive=False)})

    def fetch(self, folders: Iterable[str], is_wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Brings files of an object store to this machine; those that are here stay as they are.

        Args:
            folders: names of folders directly in it; an empty name is all that is in it.
            is_wanted: called with the base name of each file.

        Raises:
            ValueError: the object store cannot be read.
        """
        if not self.is_remote:
            return
        filesystem, root = resolve(self.place)
        infos = [info for folder in folders for info in self._list(folder, recursive=True) if info.is_file]
        wanted = {info.path[len(root.rstrip("/")) + 1 :]: info.path for info in infos if is_wanted(info.base_name)}

        def fetch(name: str) -> None:
            write_atomically(self.path / name, read_object(filesystem, wanted[name]))
            self._known[name] = self._state(name)

        self._each(fetch, [name for name in wanted if not (self.path / name).exists()], "read")

    def send(self) -> None:
        """Copies what is new or changed here to the object store.

        Raises:
            ValueError: the object store cannot be written.
        """
        if not self.is_remote:
            return
        filesystem, root = resolve(self.place)
        files = (path for path in self.path.rglob("*") if path.is_file() and not path.name.endswith(PARTIAL))
        states = {name: self._state(name) for name in (path.relative_to(self.path).as_posix() for path in files)}

        def send(name: str) -> None:
            write_object(filesystem, f"{root.rstrip('/')}/{name}", (self.path / name).read_bytes())
            self._known[name] = states[name]

        self._each(send, [name for name, state in states.items() if self._known.get(name) != state], "written")

    def _list(self, folder: str, recursive: bool) -> list[pafs.FileInfo]:
        filesystem, root = resolve(self.place)
        selector = pafs.FileSelector(
            f"{root.rstrip('/')}/{folder}".rstrip("/"), allow_not_found=True, recursive=recursive
        )
        try:
            return filesystem.get_file_info(selector)
        except (OSError, ArrowException) as error:
            raise ValueError(f"{self.place}: cannot be read: {first_line(error)}") from None

    def _each(self, move: Callable[[str], None], names: list[str], what: str) -> None:
        try:
            with ThreadPoolExecutor(NUM_AT_A_TIME) as pool:
                list(pool.map(move, names))
        except (OSError, ArrowException) as error:
            raise ValueError(f"{self.place}: cannot be {what}: {first_line(error)}") from None

    def _state(self, name: str) -> tuple[int, int]:
        status = (self.path / name).stat()
        return status.st_size, status.st_mtime_ns


def copy_results(place: str, folder: Path) -> None:
    """Copies a folder, at a path or URI, to this machine.

    Raises:
        ValueError: it cannot be read, or `folder` holds something already.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: expected a folder that is missing or empty, to copy {place} to")
    try:
        filesystem, path = resolve(absolute(place))
        if filesystem.get_file_info(path).type != pafs.FileType.Directory:
            raise ValueError(f"{place}: no such folder")
        folder.mkdir(parents=True, exist_ok=True)
        local = pafs.LocalFileSystem()
        copy = partial(pafs.copy_files, path, str(folder), source_filesystem=filesystem, destination_filesystem=local)
        patiently(copy)
    except (OSError, ArrowException) as error:
        raise ValueError(f"{place}: cannot be copied to {folder}: {first_line(error)}") from None


@contextmanager
def open_resumed_results(place: str) -> Iterator[ResultsFolder]:
    """Gives the folder at a path or URI, as the last block that failed on this machine has left it.

    The copy of a folder in an object store is deleted when a block ends without an error.

    Raises:
        ValueError: whatever the block raises, with a word on where the copy is.
    """
    if not is_uri(place):
        yield ResultsFolder(place, Path(place))
        return
    place = place.rstrip("/")
    folder = Path(tempfile.gettempdir()) / f"cast_ray-results-{os.getuid()}-{digest_of(place)}"
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        yield ResultsFolder(place, folder)
    except ValueError as error:
        raise ValueError(f"{error} ({folder} is the copy of {place} on this machine)") from error
    shutil.rmtree(folder)


@contextmanager
def open_results(place: str) -> Iterator[ResultsFolder]:
    """Gives the folder at a path or URI; nothing is fetched or sent by itself.

    Raises:
        ValueError: whatever the block raises, with URIs in place of the paths of their copies.
    """
    if not is_uri(place):
        yield ResultsFolder(place, Path(place))
        return
    place = place.rstrip("/")
    with tempfile.TemporaryDirectory(prefix="cast_ray-results-", ignore_cleanup_errors=True) as folder:
        try:
            yield ResultsFolder(place, Path(folder))
        except ValueError as error:
            if folder not in str(error):
                raise
            raise ValueError(str(error).replace(folder, place)) from error
