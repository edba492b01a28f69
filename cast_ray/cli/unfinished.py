"""What a command over many images has finished so far, so that the same command resumes after it was stopped."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from cast_ray.common.files import PARTIAL

JOURNAL = "unfinished.jsonl"
KEPT = ("path", "height", "width", "results", "mean_score")
"""What is kept of an image's row, see `inference.predictor.Predictor`."""
MAX_SHOWN = 30
"""Characters of a setting that an error message shows."""


class FinishedImages:
    """The images that a command has finished, as lines of a file in its output folder.

    The file's first line holds the settings that decide what is found in an image. Each further line is written when an
    image is finished, so that a killed process loses no more than the images it was working on. An image counts as
    finished while its file has the size and time that it had then (images of an object store: always).

    Use it as a context manager. The file stays when the block fails and is deleted by `remove`.

    Args:
        out: the output folder; it is made.
        settings: name of each setting -> its value, as JSON has it.
        names: path or URI of every image, in order -> the name of what is written for it.

    Raises:
        ValueError: an unfinished run of other settings lies in the folder, or another process is writing to it.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], names: Mapping[str, str]):
        self.path, self.names = out / JOURNAL, names
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._places: dict[str, int] = {}

    def __enter__(self) -> FinishedImages:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = self.path.open("a+b")
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self._places:  # nothing that could be resumed
            self.path.unlink(missing_ok=True)
        self._file.close()

    @property
    def missing(self) -> list[str]:
        """Paths of the images that are not finished, in order."""
        return [path for path in self.names if path not in self._places]

    def add(self, row: Mapping[str, Any]) -> None:
        """Notes that an image is finished. What else was written for it must be on disk before."""
        kept = {key: row[key] for key in KEPT} | {"name": self.names[row["path"]], "file": _file_state(row["path"])}
        self._places[row["path"]] = self._append(kept)

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(place among all images, counted from 1; row) of every finished image, in order."""
        for number, path in enumerate(self.names, 1):
            if path in self._places:
                self._file.seek(self._places[path])
                yield number, json.loads(self._file.readline())

    def remove(self) -> None:
        """Deletes the file: the command's results are written."""
        self.path.unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except BlockingIOError:
            raise ValueError(f"--out {self.path.parent}: another process is writing its results there") from None
        except OSError:  # a filesystem without locks
            pass

    def _read(self) -> None:
        """Reads what an earlier process left; what it was writing when it was killed is cut off."""
        for leftover in self.path.parent.glob(f".*{PARTIAL}"):
            leftover.unlink()
        self._file.seek(0)
        entries: list[tuple[int, dict[str, Any]]] = []
        place = 0
        for line in self._file:
            if (entry := _parsed(line)) is None:
                break
            entries.append((place, entry if not entries else {key: entry[key] for key in ("path", "name", "file")}))
            place += len(line)
        if len(entries) > 1:
            self._check(entries[0][1]["settings"])
            self._file.truncate(place)
        else:
            self._file.truncate(0)
            self._append({"settings": self.settings})
        for place, entry in entries[1:]:
            path = entry["path"]
            if self.names.get(path) == entry["name"] and _file_state(path) == entry["file"]:
                self._places[path] = place

    def _check(self, before: dict[str, Any]) -> None:
        names = [n for n in {**before, **self.settings} if before.get(n) != self.settings.get(n)]
        if names:
            changes = ", ".join(_change(name, before.get(name), self.settings.get(name)) for name in names)
            raise ValueError(
                f"--out {self.path.parent}: an unfinished run with other settings lies there ({changes}): finish it "
                f"with its own settings, choose another --out, or delete {self.path} to start anew"
            )

    def _append(self, entry: Mapping[str, Any]) -> int:
        """Writes a line and gives its place in the file."""
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        return place


def weights_digest(model: nn.Module) -> str:
    """A digest of all weights and buffers of a model, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The content of a whole line; None of one that was being written."""
    with suppress(ValueError):
        if line.endswith(b"\n") and isinstance(entry := json.loads(line), dict):
            return entry
    return None


def _file_state(path: str) -> list[int] | None:
    """Size and time of a local file; None of others."""
    try:
        status = os.stat(os.path.expanduser(path))
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _change(name: str, before: Any, now: Any) -> str:
    texts = [json.dumps(value) for value in (before, now)]
    return f"{name}: {texts[0]}, now {texts[1]}" if max(map(len, texts)) <= MAX_SHOWN else name
