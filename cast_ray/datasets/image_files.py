"""Where the images of a COCO annotation file are, and which of them cannot be used."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any, TypeGuard

from pyarrow import fs

from cast_ray.datasets.paths import is_uri, resolve

MAX_IMAGE_PIXELS = 178_956_970


def image_dirs_of(given: str, annotation_file: str, split: str) -> list[str]:
    """Folders (or patterns) below root where the images of a split usually are, the likeliest first."""
    if given:
        return [given]
    beside = "" if is_uri(annotation_file) else posixpath.dirname(annotation_file)
    return list(dict.fromkeys([f"{split}*", "images", f"images/{split}*", "", beside]))


def find_images(
    root: str, images: list[dict[str, Any]], image_dirs: Sequence[str], file: str
) -> tuple[list[tuple[int, str, int]], list[dict[str, str]]]:
    """(index in the file, path below root, bytes) of every usable image, and the others with their reason."""
    names = [image.get("file_name") for image in images]
    folder, files = _list_images(root, names, image_dirs)
    found, skipped = [], []
    for index, (image, name) in enumerate(zip(images, names)):
        size = 0
        path = ""
        reason = _bad_size(image)
        if not _is_file_name(name):
            reason = f"file_name is {name!r}: expected the name of a file"
        elif not reason:
            path = posixpath.normpath(posixpath.join(folder, name))
            if posixpath.isabs(name) or is_uri(name) or path == ".." or path.startswith("../"):
                reason = "file_name leaves the dataset's folder"
            elif path not in files:
                reason = "the file is missing"
            elif not (size := files[path]):
                reason = "the file is empty"
        if reason:
            skipped.append({"kind": "image", "id": str(image["id"]), "file": _printable(name), "reason": reason})
        else:
            found.append((index, path, size))
    if not found:
        raise ValueError(f"{file}: no usable image of {len(images)}: {_reasons(skipped)}")
    return found, skipped


def _is_file_name(name: Any) -> TypeGuard[str]:
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in name)  # JSON can hold half a character


def _bad_size(image: dict[str, Any]) -> str:
    for name in ("height", "width"):
        if type(image.get(name)) is not int or image[name] < 1:
            return f"{name} is {str(image.get(name))[:40]}: expected a number of pixels"
    if image["height"] * image["width"] > MAX_IMAGE_PIXELS:
        return f"{image['width']} x {image['height']} pixels, at most {MAX_IMAGE_PIXELS} are read"
    return ""


def _printable(name: Any) -> str:
    return str(name).encode("utf-8", "replace").decode()


def _list_images(root: str, names: list[Any], image_dirs: Sequence[str]) -> tuple[str, dict[str, int]]:
    """The folder below root that the file names are relative to, and path below root -> bytes of what lies there.

    Folders are listed once instead of asking for each file: 118,000 requests to an object store would take an hour.
    """
    filesystem, base = resolve(root)
    usable = [n for n in names if _is_file_name(n) and not posixpath.isabs(n)]
    probe = usable[:: max(1, len(usable) // 16)][:16]
    folders = [f for pattern in image_dirs for f in _expand(filesystem, base, pattern)]
    best, hits = folders[0] if folders else "", -1
    for folder in folders:
        paths = [posixpath.normpath(posixpath.join(base, folder, name)) for name in probe]
        score = sum(info.is_file for info in filesystem.get_file_info(paths)) if paths else 0
        if score > hits:
            best, hits = folder, score
    wanted = {posixpath.normpath(posixpath.join(best, posixpath.dirname(name))) for name in usable}
    files: dict[str, int] = {}
    for folder in sorted(wanted):
        if folder == ".." or folder.startswith(("../", "/")):
            continue
        selector = fs.FileSelector(posixpath.normpath(posixpath.join(base, folder)), allow_not_found=True)
        for info in filesystem.get_file_info(selector):
            if info.is_file:
                files[posixpath.normpath(posixpath.join(folder, info.base_name))] = info.size
    return best, files


def _expand(filesystem: fs.FileSystem, base: str, pattern: str) -> list[str]:
    if "*" not in pattern:
        return [pattern]
    folder, name = posixpath.split(pattern)
    selector = fs.FileSelector(posixpath.join(base, folder), allow_not_found=True)
    listed = filesystem.get_file_info(selector)
    found = sorted(i.base_name for i in listed if i.type == fs.FileType.Directory and fnmatch(i.base_name, name))
    return [posixpath.join(folder, n) for n in found]


def check_bad(skipped: list[dict[str, str]], kind: str, total: int, max_bad_fraction: float, file: str) -> None:
    """Refuses a file of which too large a share was skipped."""
    if len(skipped) > max_bad_fraction * total:
        raise ValueError(
            f"{file}: {len(skipped)} of {total} {kind} skipped, above data.max_bad_fraction={max_bad_fraction}: "
            f"{_reasons(skipped)}"
        )


def _reasons(skipped: list[dict[str, str]]) -> str:
    return "; ".join(f"{s['kind']} {s['id']} ({s['file'][:80]}): {s['reason']}" for s in skipped[:3])
