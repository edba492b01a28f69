"""What lies in a dataset's folders, each listed once, and whether anything there has changed since."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterable
from fnmatch import fnmatch
from urllib.parse import unquote

from pyarrow import fs

from cast_ray.datasets.paths import absolute, first_line, is_uri, join, resolve


class Listing:
    """Folders below a dataset's root (or elsewhere, as absolute paths or URIs), listed when first asked for.

    Folders are listed whole instead of asking for each file: 118,000 requests to an object store would take an hour.
    """

    def __init__(self, root: str):
        self.root = root
        self._folders: dict[str, dict[str, fs.FileInfo]] = {}

    def uri(self, path: str) -> str:
        """Where a file or folder is, given its path below root, an absolute path or a URI."""
        return path if is_uri(path) or posixpath.isabs(path) else join(self.root, path)

    def entries(self, folder: str) -> dict[str, fs.FileInfo]:
        """Name -> what it is, of everything directly in a folder; empty where there is no such folder."""
        folder = _normal(folder)
        if folder not in self._folders:
            filesystem, path = resolve(self.uri(folder))
            try:
                listed = filesystem.get_file_info(fs.FileSelector(path.rstrip("/") or "/", allow_not_found=True))
            except NotADirectoryError:
                listed = []
            except OSError as error:
                raise ValueError(f"{folder or self.root}: cannot be listed ({first_line(error)})") from None
            self._folders[folder] = {i.base_name: i for i in sorted(listed, key=lambda i: i.base_name)}
        return self._folders[folder]

    def file(self, path: str) -> fs.FileInfo | None:
        """One file by its path below root (or absolute), if it is one."""
        folder, name = posixpath.split(path)
        found = self.entries(folder).get(unquote(name) if is_uri(path) else name)
        return found if found is not None and found.is_file else None

    def files(self, folder: str, pattern: str = "*") -> list[str]:
        """Names of the files in a folder, sorted."""
        return [n for n, i in self.entries(folder).items() if i.is_file and fnmatch(n, pattern)]

    def folders(self, folder: str, pattern: str = "*") -> list[str]:
        """Names of the folders in a folder, sorted."""
        found = self.entries(folder).items()
        return [n for n, i in found if i.type == fs.FileType.Directory and fnmatch(n, pattern)]

    def walk(self, folder: str) -> Iterable[str]:
        """A folder and every folder below it, parents first."""
        yield folder
        for name in self.folders(folder):
            yield from self.walk(child(folder, name))

    @property
    def seen(self) -> list[str]:
        """The folders that were looked at."""
        return sorted(self._folders)

    def state(self) -> str:
        """A hash of names, sizes and times of all that lies in the seen folders: another one when a file changes."""
        digest = hashlib.sha256()
        for folder in self.seen:
            for name, info in self._folders[folder].items():
                facts = (info.size, info.mtime_ns) if info.is_file else ("folder",)
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
