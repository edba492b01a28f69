"""Image files in folders: the one walk for pools of a dataset and for what a user names on a command line."""

from __future__ import annotations

import glob
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from pyarrow import fs

from cast_ray.common.paths import absolute, is_uri, resolve
from cast_ray.data.reading.images import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES
from cast_ray.data.reading.listing import Listing, child, is_hidden, is_text

OVERLAYS = "overlays"
"""Folder of the drawn images in the output folder of `label` and `predict`; it is never read as input."""
INSTANCES, RESULTS, IMAGES = "instances.json", "results.json", "images.json"
"""Files of the output folder: of `label`, and the two of `predict`."""
_WRITTEN_BESIDE = ({INSTANCES}, {RESULTS, IMAGES}, {"unfinished.jsonl"})
"""Files beside the drawn images, any of these sets: of `label`, of `predict`, of either while it is not finished."""
_LEFT_OUT_OVERLAYS = f"folders of drawn results ({OVERLAYS})"
_USUAL = ", ".join(IMAGE_SUFFIXES[:4])


@dataclass
class FoundImages:
    """Image files, and what was left out beside them.

    paths: as they were reached, each file once. left_out: suffix of the files that are no images, or a kind of files or
    folders -> how many; `describe_left_out` says it in words.
    """

    paths: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def is_image(name: str) -> bool:
    """Whether a file is called as images are that can be read."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_overlays(listing: Listing, folder: str, name: str) -> bool:
    """Whether a folder holds what `label` or `predict` drew: its name and the files beside it say so.

    Args:
        listing: files of a folder, for relative paths.
        folder: below it, or an absolute path or URI.
        name: name of the folder in question, which lies in `folder`.
    """
    return name == OVERLAYS and any(files <= set(listing.files(folder)) for files in _WRITTEN_BESIDE)


def images_below(listing: Listing, folder: str, exclude: Iterable[str] = ()) -> FoundImages:
    """Finds every image file in a folder and in the folders below it.

    Links are followed, each file is taken once (a link gives way to the file itself), hidden names, the folders of
    other programs (`listing.is_hidden`) and drawn results (`is_overlays`) are left out, and whatever is left out is
    counted.

    Args:
        listing: files of a folder, for relative paths.
        folder: below it, or an absolute path or URI.
        exclude: folders that are not entered.

    Returns:
        Paths sorted, each below `folder`.
    """
    found = FoundImages()
    links: list[str] = []
    for place in listing.walk(folder, exclude, lambda place, name: not is_overlays(listing, place, name)):
        for name, entry in listing.entries(place).items():
            if not is_text(name):
                found.left_out["names that are not UTF-8"] += 1
            elif entry.kind == "folder":
                if is_hidden(name):
                    found.left_out[f"folders called {name}"] += 1
                elif is_overlays(listing, place, name):
                    found.left_out[_LEFT_OUT_OVERLAYS] += 1
            elif is_hidden(name):
                found.left_out["hidden files"] += 1
            elif not entry.is_file:
                found.left_out["broken links" if entry.is_link else "special files"] += 1
            elif not is_image(name):
                found.left_out[_suffix(name)] += 1
            else:
                (links if entry.is_link else found.paths).append(child(place, name))
    if links:
        known = {listing.real(path) for path in found.paths}
        for path in sorted(links):
            if (real := listing.real(path)) in known:
                found.left_out["links to images that were found"] += 1
            else:
                known.add(real)
                found.paths.append(path)
    found.paths.sort()
    return found


def find_photos(sources: Sequence[str], exclude: Iterable[str] = ()) -> FoundImages:
    """Finds the images that a user names: files, folders and patterns, local or in an object store.

    Args:
        sources: files (taken whatever they are called), folders (see `images_below`) or glob patterns.
        exclude: local folders or URIs that are not entered, for example that of the results.

    Returns:
        Paths or URIs, each once, in the order given, folders sorted.

    Raises:
        ValueError: a source that names no image; the message says what was found there instead.
    """
    taken: dict[str, None] = {}
    left_out: Counter[str] = Counter()
    exclude = [absolute(folder) for folder in exclude]
    for source in sources:
        found = _named(source if is_uri(source) else os.path.expanduser(source), exclude)
        if not found.paths:
            reasons = [f"left out: {describe_left_out(found.left_out)}"] if found.left_out else []
            reasons += [f"what is in {', '.join(exclude)} is not read"] if exclude else []
            instead = f" ({'; '.join(reasons)})" if reasons else ""
            raise ValueError(
                f"no image in {source!r}{instead}: expected a file, a folder of images ({_USUAL}, ...) or a pattern"
            )
        taken.update(dict.fromkeys(found.paths))
        left_out += found.left_out
    return FoundImages(list(taken), left_out)


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """What was left out, in words: `.heic: 4 (cannot be read: convert to JPEG or PNG), .txt: 1, hidden files: 2`."""
    parts = []
    for what, number in sorted(left_out.items(), key=lambda item: (item[0] not in UNREADABLE_SUFFIXES, item[0])):
        advice = " (cannot be read: convert to JPEG or PNG)" if what in UNREADABLE_SUFFIXES else ""
        parts.append(f"{what}: {number:,}{advice}")
    return ", ".join(parts)


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


def _named(source: str, exclude: Sequence[str]) -> FoundImages:
    filesystem, path = resolve(source)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.File:
        return FoundImages([] if _is_inside(source, exclude) else [source])
    if kind == fs.FileType.Directory:
        root = absolute(source)
        found = images_below(Listing(root), root, exclude)
        found.paths = [_as_written(path, root, source) for path in found.paths]
        return found
    return FoundImages() if is_uri(source) else _matching(source, exclude)


def _is_inside(path: str, folders: Sequence[str]) -> bool:
    """Whether a local file lies in one of some local folders, links followed; a URI lies in none."""
    real = os.path.realpath(path)
    return not is_uri(path) and any(real.startswith(os.path.realpath(folder) + os.sep) for folder in folders)


def _matching(pattern: str, exclude: Sequence[str]) -> FoundImages:
    """The images that a local pattern fits, by the rules of `images_below`."""
    found = FoundImages()
    best: dict[str, str] = {}
    listing, overlays = Listing(absolute(".")), set[str]()
    matches = [(path, os.path.realpath(path)) for path in _fitting(pattern) if os.path.isfile(path)]
    # the file itself before links to it, then the shortest path
    for path, real in sorted(matches, key=lambda m: (os.path.abspath(m[0]) != m[1], m[0].count(os.sep), m[0])):
        if _is_inside(real, exclude):
            continue
        if not is_text(path):
            found.left_out["names that are not UTF-8"] += 1
        elif any(is_hidden(part) and part not in pattern for part in path.split(os.sep)):
            found.left_out["hidden files"] += 1
        elif OVERLAYS not in pattern.split(os.sep) and (drawn := _overlays_above(listing, path)):
            overlays.add(drawn)
        elif not is_image(path):
            found.left_out[_suffix(path)] += 1
        elif real in best:
            found.left_out["links to images that were found"] += 1
        else:
            best[real] = path
    if overlays:
        found.left_out[_LEFT_OUT_OVERLAYS] = len(overlays)
    found.paths = sorted(best.values())
    return found


def _overlays_above(listing: Listing, path: str) -> str:
    """The folder of drawn results that a file lies in, however deep; empty where it lies in none."""
    place = os.path.dirname(path)
    while name := os.path.basename(place):
        if is_overlays(listing, os.path.dirname(place), name):
            return place
        place = os.path.dirname(place)
    return ""


def _fitting(pattern: str) -> Iterable[str]:
    """The paths that a pattern fits; for `**` from `Listing.walk`: glob's own walk repeats what links lead back to."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return glob.glob(pattern)
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base = os.sep.join(parts[:first]) or (os.sep if pattern.startswith(os.sep) else "")
    root = absolute(base or ".")
    listing = Listing(root)
    found = (f"{place}{os.sep}{name}" for place in listing.walk(root) for name in listing.files(place))
    return [
        os.path.join(base, relative)
        for relative in (path[len(root) :].lstrip(os.sep) for path in found)
        if _fits(relative.split(os.sep), parts[first:])
    ]


def _fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path fit those of a pattern, in which `**` stands for any number of folders."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_fits(path[start:], pattern[1:]) for start in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:])


def _as_written(path: str, root: str, source: str) -> str:
    """A path below an absolute folder, below that folder as the user wrote it."""
    return source.rstrip("/") + path[len(root.rstrip("/")) :]


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower() or "files without suffix"
