"""Files of an object store that were read lately: in the memory of a process, and shared by the processes of a node.

A small dataset is thus fetched once by every node instead of by every process in every epoch. Of a large one, what has
been kept is as good a part as any other, because every epoch reads all of it: nothing is removed for something newer.
"""

from __future__ import annotations

import os
import shutil
import stat
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from cast_ray.common.digest import digest_of
from cast_ray.common.files import write_atomically

RECENT_BYTES = 32 << 20
"""Most bytes that a process keeps in its memory."""
SHARED_BYTES, SHARED_PART = 2 << 30, 0.1
"""Most bytes that the processes of a node keep on its disk, and most of the disk's free space."""
COUNT_EVERY = 64
"""Files that a process adds between two looks at what the others have added."""
FORGOTTEN_S = 6 * 3600.0


class RecentFiles:
    """The bytes of the files that were read last, up to a size; safe to use from threads."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.files: OrderedDict[str, bytes] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, uri: str) -> bytes | None:
        with self.lock:
            if uri in self.files:
                self.files.move_to_end(uri)
            return self.files.get(uri)

    def put(self, uri: str, content: bytes) -> None:
        if len(content) > self.max_bytes:
            return
        with self.lock:
            self.num_bytes += len(content) - len(self.files.pop(uri, b""))
            self.files[uri] = content
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= len(self.files.popitem(last=False)[1])


class SharedFiles:
    """Copies of files in a folder of this machine, made and read by any number of processes of one user.

    Args:
        folder: belongs to files that do not change meanwhile, such as those of one sweep.
        max_bytes: when so many are there, nothing is added any more.
    """

    def __init__(self, folder: Path, max_bytes: int = SHARED_BYTES):
        self.folder, self.max_bytes = folder, max_bytes
        self.num_added, self.num_bytes = 0, 0

    def get(self, uri: str) -> bytes | None:
        try:
            return self._path(uri).read_bytes()
        except OSError:
            return None

    def put(self, uri: str, content: bytes) -> None:
        with suppress(OSError):  # a full disk, or a folder that somebody has removed, costs a request later
            if self.num_added % COUNT_EVERY == 0:
                self._count()
            self.num_added += 1
            self.num_bytes += len(content)
            if self.num_bytes <= self.max_bytes:
                write_atomically(self._path(uri), content)

    def _path(self, uri: str) -> Path:
        return self.folder / digest_of(uri)

    def _count(self) -> None:
        """Looks at what is there, and at the space that is left for more."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        facts = self.folder.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():  # somebody else's, who could replace images
            raise PermissionError(str(self.folder))
        self.num_bytes = sum(entry.stat().st_size for entry in os.scandir(self.folder))
        self.max_bytes = min(self.max_bytes, self.num_bytes + int(SHARED_PART * shutil.disk_usage(self.folder).free))


def remove_forgotten(parent: Path, prefix: str) -> None:
    """Removes shared folders to which nothing was added for hours: their processes are gone, or have added what they
    could and fetch it again."""
    for folder in parent.glob(f"{prefix}*"):
        with suppress(OSError):
            if folder.stat().st_uid == os.getuid() and time.time() - folder.stat().st_mtime > FORGOTTEN_S:
                shutil.rmtree(folder)
