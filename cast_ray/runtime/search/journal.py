"""A study's journal in an object store, which cannot append to a file: a copy on this machine that is written back.

<storage>/runs/<name>/study.journal

One command at a time may write it, because whoever writes it back writes it whole (`claim_study`).
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend
from rich.console import Console

from cast_ray.common.digest import digest_of
from cast_ray.common.paths import read_bytes, write_bytes
from cast_ray.common.text import first_line
from cast_ray.runtime.store.artifacts import ArtifactStore
from cast_ray.runtime.store.claims import DEAD_AFTER_S, Claims, Presence, find_holder

logger = logging.getLogger(__name__)

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss")
"""Schemes of URIs in object stores; a study at any other URI is in a database."""
WRITE_EVERY_S = 2.0
"""Least pause between two writes: what a killed command has not written back is lost, and its points are proposed
anew."""
LOOK_S = 1.0


def is_stored(study: str) -> bool:
    """Whether a study's journal lies in an object store."""
    return study.partition("://")[0] in SCHEMES and "://" in study


class StoredJournal(JournalFileBackend):
    """A journal file of Optuna at a URI.

    Raises:
        OSError: the object store cannot be read.
    """

    def __init__(self, uri: str):
        self.uri = uri
        self._folder = tempfile.TemporaryDirectory(prefix="cast_ray-study-", ignore_cleanup_errors=True)
        self._path = Path(self._folder.name) / "study.journal"
        with contextlib.suppress(FileNotFoundError):  # a new study
            self._path.write_bytes(read_bytes(uri))
        super().__init__(str(self._path))
        self._appending = threading.Lock()
        self._changed, self._closing = threading.Event(), threading.Event()
        self._writer: threading.Thread | None = None

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with self._appending:  # whole lines are written back
            super().append_logs(logs)
        self._changed.set()
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_back, daemon=True)
            self._writer.start()

    def close(self) -> None:
        """Writes back what is new; nothing may be added afterwards.

        Raises:
            OSError: the object store cannot be written.
        """
        self._closing.set()
        if self._writer is not None:
            self._writer.join()
        if self._changed.is_set():
            self._write()

    def _write_back(self) -> None:
        while not self._closing.wait(WRITE_EVERY_S):
            if not self._changed.is_set():
                continue
            try:
                self._write()
            except OSError as error:
                logger.warning("%s could not be written, it is tried again: %s", self.uri, first_line(error))

    def _write(self) -> None:
        self._changed.clear()
        with self._appending:
            content = self._path.read_bytes()
        try:
            write_bytes(self.uri, content)
        except OSError:
            self._changed.set()
            raise


def claim_study(study: str, store: ArtifactStore, presence: Presence, console: Console) -> None:
    """Makes this command the only one that writes a study in an object store, until its presence ends.

    Raises:
        ValueError: another command has it.
    """
    if not is_stored(study):
        return
    claims, key = Claims(store, presence.holder.id), f"study-{digest_of(study)}"
    deadline = None
    while True:
        taken, others = claims.take([key])
        if taken:
            return
        if deadline is None:
            deadline = time.monotonic() + DEAD_AFTER_S + 2 * LOOK_S
            console.print(f"another command has this search's study; {DEAD_AFTER_S:.0f} s to see whether it is alive")
        if time.monotonic() > deadline:
            break
        time.sleep(LOOK_S)
    holder = find_holder(store, others[key])
    who = f"{holder.user} on {holder.host}: {holder.command}" if holder is not None else "unknown"
    raise ValueError(
        f"{study} is written by another command ({who}): a study in an object store takes one at a time; wait for it, "
        "choose another --name, or give a database by --study"
    )
