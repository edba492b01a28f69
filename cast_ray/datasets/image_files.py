"""Where the images of a COCO annotation file are, and which of them cannot be used."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from typing import Any, TypeGuard

from cast_ray.datasets.coco_document import printable
from cast_ray.datasets.index import Skipped, describe
from cast_ray.datasets.listing import Listing, child
from cast_ray.datasets.paths import is_uri


def image_dirs_of(given: str, annotation_file: str, split: str) -> list[str]:
    """Folders (or patterns) below root where the images of a split usually are, the likeliest first."""
    if given:
        return [given]
    beside = "" if is_uri(annotation_file) else posixpath.dirname(annotation_file)
    return list(dict.fromkeys([f"{split}*", "images", f"images/{split}*", "", beside]))


def find_images(
    listing: Listing, images: list[dict[str, Any]], image_dirs: Sequence[str], max_pixels: int, split: str, file: str
) -> tuple[list[tuple[int, str, int]], list[Skipped]]:
    """(index in the file, path, bytes) of every usable image, and the others with their reason.

    Args:
        listing: of the dataset's folder; no image outside it is taken, but from an absolute image folder.
        images: the entries of the annotation file.
        image_dirs: folders that may hold the images, relative to the dataset's folder or one absolute path or URI; the
            one that holds most of them is taken.
        max_pixels: larger images are left out.
        split, file: for messages.

    Raises:
        ValueError: there is no usable image; the message gives the first reasons.
    """
    folder = _image_dir(listing, [image.get("file_name") for image in images], image_dirs)
    found, skipped = [], []
    for index, image in enumerate(images):
        name = image.get("file_name")
        path, size = "", 0
        reason = _bad_size(image, max_pixels)
        if not _is_file_name(name):
            reason = f"file_name is {name!r}: expected the name of a file"
        elif not reason:
            path = _path_of(folder, name)
            entry = listing.file(path) if path else None
            if not path:
                reason = "file_name leaves the dataset's folder"
            elif entry is None:
                reason = "the file is missing"
            elif not (size := entry.size):
                reason = "the file is empty"
        if reason:
            facts = {"id": str(image["id"]), "file": printable(name), "reason": reason}
            skipped.append({"split": split, "kind": "image", **facts})
        else:
            found.append((index, path, size))
    if not found:
        raise ValueError(f"{file}: no usable image of {len(images)}: {describe(skipped)}")
    return found, skipped


def _path_of(folder: str, name: str) -> str:
    """The image's path, normal; empty where it would leave the dataset's folder."""
    if posixpath.isabs(name) or is_uri(name):
        return ""
    outside = is_uri(folder) or posixpath.isabs(folder)
    path = posixpath.normpath(name if outside else posixpath.join(folder, name))
    if path == ".." or path.startswith("../"):
        return ""
    return child(folder, path) if outside else path


def _is_file_name(name: Any) -> TypeGuard[str]:
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in name)  # JSON can hold half a character


def _bad_size(image: dict[str, Any], max_pixels: int) -> str:
    for name in ("height", "width"):
        if type(image.get(name)) is not int or image[name] < 1:
            return f"{name} is {str(image.get(name))[:40]}: expected a number of pixels"
    if image["height"] * image["width"] > max_pixels:
        return f"{image['width']} x {image['height']} pixels, at most {max_pixels} are read (data.max_image_pixels)"
    return ""


def _image_dir(listing: Listing, names: list[Any], image_dirs: Sequence[str]) -> str:
    """The folder that the file names are relative to: of those given, the first that holds most of a sample."""
    usable = [n for n in names if _is_file_name(n)]
    sample = usable[:: max(1, len(usable) // 16)][:16]
    best, most = "", -1
    for folder in (f for pattern in image_dirs for f in _expand(listing, pattern)):
        paths = [_path_of(folder, name) for name in sample]
        hits = sum(bool(path) and listing.file(path) is not None for path in paths)
        if hits > most:
            best, most = folder, hits
        if hits == len(sample):
            break
    return best


def _expand(listing: Listing, pattern: str) -> list[str]:
    if "*" not in pattern:
        return [pattern]
    folder, name = posixpath.split(pattern)
    return [posixpath.join(folder, n) for n in listing.folders(folder, name)]
