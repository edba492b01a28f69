"""What lies in a dataset's folders, each listed once, and whether anything there has changed since."""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from typing import Literal, NamedTuple
from urllib.parse import unquote

from pyarrow import fs

from cast_ray.common.paths import absolute, is_uri, join, real, resolve
from cast_ray.common.text import first_line

_NOT_THE_USERS = frozenset(
    {"@eadir", "@recycle", "#recycle", "$recycle.bin", "__macosx", "lost+found", "system volume information"}
)
"""Folders, in lower case, that storage devices and file systems fill: thumbnails, deleted files, metadata."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out of every listing: `.x`, `._x.jpg` and folders of other programs (@eaDir)."""
    return name.startswith(".") or name.lower() in _NOT_THE_USERS


def is_text(name: str) -> bool:
    """Whether a file name is whole Unicode text.

    Disks may hold names in other encodings, and JSON half a character: neither can be written into a table.
    """
    return not any("\ud800" <= character <= "\udfff" for character in name)


class Entry(NamedTuple):
    """What lies under a name in a folder.

    kind: file, folder or other (a broken link, a device), of what a link leads to; size: bytes, 0 unless a file; times:
    ns, whatever the file store gives to tell that the file was written again; is_link: symbolic.
    """

    kind: Literal["file", "folder", "other"]
    size: int = 0
    times: tuple[int, ...] = ()
    is_link: bool = False

    @property
    def is_file(self) -> bool:
        return self.kind == "file"


class Listing:
    """Folders below a dataset's root (or elsewhere, as absolute paths or URIs), listed when first asked for.

    Folders are listed whole instead of asking for each file: 118,000 requests to an object store would take an hour.
    """

    def __init__(self, root: str):
        self.root = root
        self._folders: dict[str, dict[str, Entry]] = {}

    def uri(self, path: str) -> str:
        """Returns the address of a file or folder, given its path below root, an absolute path or a URI."""
        return path if is_uri(path) or posixpath.isabs(path) else join(self.root, path)

    def entries(self, folder: str) -> dict[str, Entry]:
        """Name -> what it is, of everything directly in a folder, sorted; empty where there is no such folder.

        Raises:
            ValueError: the folder is there and cannot be listed.
        """
        folder = _normal(folder)
        if folder not in self._folders:
            filesystem, path = resolve(self.uri(folder))
            try:
                is_local = isinstance(filesystem, fs.LocalFileSystem)
                listed = _list_local(path or ".") if is_local else _list_remote(filesystem, path)
            except (FileNotFoundError, NotADirectoryError):
                listed = {}
            except OSError as error:
                raise ValueError(f"{folder or self.root}: cannot be listed ({first_line(error)})") from None
            self._folders[folder] = dict(sorted(listed.items()))
        return self._folders[folder]

    def file(self, path: str) -> Entry | None:
        """One file by its path below root (or absolute), if it is one."""
        folder, name = posixpath.split(path)
        found = self.entries(folder).get(unquote(name) if is_uri(path) else name)
        return found if found is not None and found.is_file else None

    def files(self, folder: str, pattern: str = "*") -> list[str]:
        """Names of the files in a folder that are not hidden, sorted."""
        return [n for n, i in self._visible(folder) if i.is_file and fnmatch(n, pattern)]

    def folders(self, folder: str, pattern: str = "*") -> list[str]:
        """Names of the folders in a folder that are not hidden, sorted."""
        return [n for n, i in self._visible(folder) if i.kind == "folder" and fnmatch(n, pattern)]

    def _visible(self, folder: str) -> Iterable[tuple[str, Entry]]:
        return ((n, i) for n, i in self.entries(folder).items() if not is_hidden(n) and is_text(n))

    def walk(
        self, folder: str, exclude: Iterable[str] = (), enter: Callable[[str, str], bool] = lambda folder, name: True
    ) -> Iterator[str]:
        """Yields a folder and every folder below it that is not hidden, each once, parents first.

        Linked folders are followed. A folder that is reached in several ways keeps the path without links where there
        is one, so that a link to a folder above it does not repeat anything.

        Args:
            folder: below root, or an absolute path or URI.
            exclude: folders that are not entered, however they are reached.
            enter: called with a folder and the name of a folder in it; False: it is not entered.
        """
        entered = {self.real(place) for place in exclude}
        waiting = [folder]
        while waiting:
            links: list[str] = []
            stack = waiting[::-1]
            while stack:
                place = stack.pop()
                if (known := self.real(place)) in entered:
                    continue
                entered.add(known)
                yield place
                for name in reversed(self.folders(place)):
                    if enter(place, name):
                        (links if self.entries(place)[name].is_link else stack).append(child(place, name))
            waiting = sorted(links)

    def real(self, path: str) -> str:
        """`paths.real` of a path below root."""
        return real(self.uri(path))

    @property
    def seen(self) -> list[str]:
        """The folders that were looked at."""
        return sorted(self._folders)

    def state(self) -> str:
        """A hash of names, sizes and times of all that lies in the seen folders: another one when a file changes.

        On local disks the time of a file's last change of any kind counts too: unlike the time of writing, which rsync
        and cp -p set to what it was, no program can set it. An object store tells when an object was written, which for
        S3 is to the second.
        """
        digest = hashlib.sha256()
        for folder in self.seen:
            for name, entry in self._folders[folder].items():
                facts = (entry.size, *entry.times) if entry.is_file else (entry.kind,)
                digest.update(repr((folder, name, *facts)).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def open_listing(given: str, what: str) -> Listing:
    """The listing of `data.root` as the user wrote it.

    Raises:
        ValueError: it is empty or not a folder; the message says that `what` was expected.
    """
    if not given:
        raise ValueError(f"data.root is empty: expected the folder of {what} (--set data.root=DIR)")
    root = absolute(given)
    filesystem, path = resolve(root)
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise ValueError(f"data.root: {given} cannot be read ({first_line(error)})") from None
    if info.type != fs.FileType.Directory:
        state = "is a file" if info.type == fs.FileType.File else "does not exist"
        raise ValueError(f"data.root: {given} {state}: expected the folder of {what}")
    return Listing(root)


def child(folder: str, name: str) -> str:
    """Path of a file or folder in a folder that is a path or a URI; `name` is never percent-encoded."""
    return join(folder, name) if is_uri(folder) else posixpath.join(folder, name)


def _list_local(folder: str) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            is_link = entry.is_symlink()
            try:
                status = entry.stat()
            except OSError:  # it leads nowhere or in a circle, or is gone
                found[entry.name] = Entry("other", is_link=is_link)
                continue
            if stat.S_ISREG(status.st_mode):
                times = (status.st_mtime_ns, status.st_ctime_ns)
                found[entry.name] = Entry("file", status.st_size, times, is_link)
            else:
                kind: Literal["folder", "other"] = "folder" if stat.S_ISDIR(status.st_mode) else "other"
                found[entry.name] = Entry(kind, is_link=is_link)
    return found


def _list_remote(filesystem: fs.FileSystem, folder: str) -> dict[str, Entry]:
    listed = filesystem.get_file_info(fs.FileSelector(folder.rstrip("/") or "/", allow_not_found=True))
    return {
        info.base_name: Entry("file", info.size, (info.mtime_ns or 0,)) if info.is_file else Entry("folder")
        for info in listed
    }


def _normal(folder: str) -> str:
    if is_uri(folder):
        return folder.rstrip("/")
    normal = posixpath.normpath(folder) if folder else ""
    return "" if normal == "." else normal


def state_of(root: str, folders: Iterable[str]) -> str:
    """`Listing.state` of the same folders now."""
    listing = Listing(root)
    for folder in folders:
        listing.entries(folder)
    return listing.state()
