"""What is kept of files that were read lately."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cast_ray.data.reading import recent_files
from cast_ray.data.reading.recent_files import FORGOTTEN_S, RecentFiles, SharedFiles, remove_forgotten


def test_what_a_process_keeps_is_bounded() -> None:
    recent = RecentFiles(10)
    for name, content in (("a", b"1234"), ("b", b"1234"), ("c", b"12"), ("a", b"1234"), ("d", b"1"), ("e", b"1" * 11)):
        recent.put(name, content)
    assert recent.get("b") is None and recent.get("e") is None
    assert [recent.get(name) for name in "acd"] == [b"1234", b"12", b"1"] and recent.num_bytes == 7


def test_processes_share_a_folder_until_it_is_full(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    first, second = (SharedFiles(folder, max_bytes=10) for _ in range(2))
    assert first.get("s3://b/a") is None
    first.put("s3://b/a", b"12345")
    assert second.get("s3://b/a") == b"12345" and folder.stat().st_mode & 0o077 == 0
    second.put("s3://b/b", b"1234")
    second.put("s3://b/c", b"12345")  # what is there stays: it is as likely to be read again
    assert [first.get(f"s3://b/{name}") for name in "abc"] == [b"12345", b"1234", None]
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert first.get("s3://b/a") is None
    first.put("s3://b/a", b"1")  # it is made again


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    shared = SharedFiles(tmp_path / "link")
    shared.put("s3://b/a", b"1")
    assert list((tmp_path / "theirs").iterdir()) == []


def test_little_of_a_full_disk_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=50))
    shared = SharedFiles(tmp_path / "shared")
    shared.put("s3://b/a", b"1234")
    shared.put("s3://b/b", b"1234")
    assert shared.get("s3://b/a") == b"1234" and shared.get("s3://b/b") is None


def test_folders_of_jobs_that_are_over_go(tmp_path: Path) -> None:
    for name, age_s in (("images-old", 2 * FORGOTTEN_S), ("images-new", 0.0), ("other-old", 2 * FORGOTTEN_S)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    remove_forgotten(tmp_path, "images-")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images-new", "other-old"]
