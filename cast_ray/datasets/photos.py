"""Image files that a user names: files, folders and patterns, local or in an object store."""

from __future__ import annotations

import glob
import os
import posixpath
from collections.abc import Sequence

from pyarrow import fs

from cast_ray.datasets.paths import is_uri, resolve

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".jp2")


def find_images(sources: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """Paths or URIs of the images that `sources` name, each once, in the order given, folders sorted.

    Args:
        sources: files (taken whatever they are called), folders (every image below them) or glob patterns.
        exclude: local folders of which no image is taken.

    Raises:
        ValueError: a source that names nothing.
    """
    found: dict[str, None] = {}
    for source in sources:
        paths = _below_uri(source) if is_uri(source) else _local(source)
        inside = [path for path in paths if _is_below(path, exclude)]
        paths = [path for path in paths if path not in set(inside)] if inside else paths
        if not paths:
            if inside:
                raise ValueError(f"no image in {source!r}: what is in {', '.join(exclude)} is not read")
            raise ValueError(f"no image in {source!r}: expected a file, a folder of {', '.join(SUFFIXES)} or a pattern")
        found.update(dict.fromkeys(paths))
    return list(found)


def output_names(paths: Sequence[str]) -> list[str]:
    """A name for each image, relative to the folder that holds them all: `b/3` of `a/b/3.jpg`, unique without suffix.

    Where two would be equal (`3.jpg` and `3.png`), both keep their suffix.
    """
    # Without .., which would leave the folder, and without the empty part of s3://, which commonpath drops.
    whole = [p.replace("://", "/", 1) if is_uri(p) else os.path.abspath(p) for p in paths]
    folders = [posixpath.dirname(p) for p in whole]
    shared = posixpath.commonpath(folders) if len({posixpath.isabs(f) for f in folders}) == 1 else ""
    relative = [p[len(shared) :].lstrip("/") for p in whole]
    stems = [posixpath.splitext(p)[0] for p in relative]
    seen: dict[str, int] = {}
    for stem in stems:
        seen[stem] = seen.get(stem, 0) + 1
    return [stem if seen[stem] == 1 else name for stem, name in zip(stems, relative)]


def _local(source: str) -> list[str]:
    path = os.path.expanduser(source)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        files = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
        return sorted(f for f in files if _is_image(f))
    return sorted(f for f in glob.glob(path, recursive=True) if os.path.isfile(f) and _is_image(f))


def _below_uri(source: str) -> list[str]:
    filesystem, path = resolve(source)
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.File:
        return [source]
    if info.type != fs.FileType.Directory:
        return []
    scheme = source[: len(source) - len(path)] if source.endswith(path) else source.partition("://")[0] + "://"
    listed = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    return sorted(scheme + i.path for i in listed if i.type == fs.FileType.File and _is_image(i.path))


def _is_below(path: str, folders: Sequence[str]) -> bool:
    real = os.path.realpath(path)
    return not is_uri(path) and any(real.startswith(os.path.realpath(folder) + os.sep) for folder in folders)


def _is_image(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)
