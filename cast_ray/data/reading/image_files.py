"""Where the images of a COCO annotation file are, how large they are, and which of them cannot be used."""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from typing import Any, NamedTuple, TypeGuard
from urllib.parse import parse_qs, unquote

from cast_ray.common.paths import is_uri
from cast_ray.data.formats.coco_document import printable, shown, whole_number
from cast_ray.data.reading.images import ImageError, check_image
from cast_ray.data.reading.index import Skipped
from cast_ray.data.reading.listing import Listing, child, is_text

_DIR_KEYS = {"val": "data.val_image_dir", "extra": "data.extra_image_dir"}
_UNKNOWN_SIZES = (0, -1)  # tools that do not know an image's size write these, null, or nothing
_NUM_READERS = 16
_UPLOAD = re.compile(r"^[0-9a-f]{8}-")


class FoundImage(NamedTuple):
    """A usable image of an annotation file: its id there, its path (see `Listing.uri`), its size in pixels."""

    id: int | str
    path: str
    num_bytes: int
    height: int
    width: int


def image_dirs_of(given: str, annotation_file: str, split: str) -> list[str]:
    """Folders (or patterns) below root where the images of a split usually are, the likeliest first."""
    if given:
        return [given]
    beside = "" if is_uri(annotation_file) else posixpath.dirname(annotation_file)
    usual = [f"{split}*", "images", f"images/{split}*", "", beside]
    exported = ["data", posixpath.join(beside, "data"), posixpath.join(beside, "images"), "images/default"]
    return list(dict.fromkeys([*usual, *exported]))  # the second half: exports of FiftyOne and CVAT


def find_images(
    listing: Listing, images: list[dict[str, Any]], image_dirs: Sequence[str], max_pixels: int, split: str, file: str
) -> tuple[list[FoundImage], list[Skipped]]:
    """Every usable image in the order of the file, and the others with their reason.

    An image whose name is not in the folder is looked for by what is left of the name when a different case, back
    slashes, percent-encoding and leading folders of another machine are passed over, if only one file fits it, and the
    file fits no other image. An image without `height` or `width` has the size of its file, whose header is read.

    Args:
        listing: files of the dataset's folder; images outside it are only taken from an absolute image folder.
        images: the entries of the annotation file.
        image_dirs: folders that may hold the images, relative to the dataset's folder or one absolute path or URI; the
            one that holds most of them is taken.
        max_pixels: larger images are left out.
        split, file: names of the split and of its annotation file, for messages.

    Raises:
        OSError: the file store failed while a header was read.
    """
    place = _find_place(listing, [image.get("file_name") for image in images], image_dirs, split)
    located = place.locate([image.get("file_name") for image in images])
    reasons: dict[int, str] = {}
    sizes: dict[int, tuple[int | None, int | None]] = {}
    for index, (image, (path, reason)) in enumerate(zip(images, located)):
        entry = listing.file(path) if path else None
        try:
            sizes[index] = _given_size(image, max_pixels)
            if reason or entry is None:
                reasons[index] = reason
            elif not entry.size:
                reasons[index] = "the file is empty"
        except ValueError as error:
            reasons[index] = str(error) if entry is not None else reason
    unknown = [index for index, size in sizes.items() if None in size and index not in reasons]
    read = _read_sizes([listing.uri(located[index][0]) for index in unknown], max_pixels)
    for index, size in zip(unknown, read):
        if isinstance(size, str):
            reasons[index] = size
        elif any(given not in (None, actual) for given, actual in zip(sizes[index], size)):
            reasons[index] = f"{size[1]} x {size[0]} pixels: expected the height or width that the annotation file says"
        else:
            sizes[index] = size
    found, skipped = [], []
    for index, image in enumerate(images):
        if index in reasons:
            facts = {"id": str(image["id"]), "file": printable(image.get("file_name")), "reason": reasons[index]}
            skipped.append({"split": split, "kind": "image", **facts})
            continue
        path, (height, width) = located[index][0], sizes[index]
        entry = listing.file(path)
        assert entry is not None and height is not None and width is not None
        found.append(FoundImage(image["id"], path, entry.size, height, width))
    return found, skipped


class _Place:
    """The folder that the file names of a split are relative to."""

    def __init__(self, listing: Listing, folder: str, looked_in: str):
        self.listing, self.folder, self.looked_in = listing, folder, looked_in
        self._alike: dict[str, dict[str, list[str]]] = {}

    def locate(self, names: Sequence[Any]) -> list[tuple[str, str]]:
        """(path, "") of the file of each name, or ("", why there is none)."""
        exact = [self.exact(name) if _is_file_name(name) else "" for name in names]
        near = {i: self.alike(names[i]) for i, path in enumerate(exact) if not path and _is_file_name(names[i])}
        wanted_by: dict[str, set[str]] = {}
        for i, path in enumerate(exact):
            wanted_by.setdefault(path or near.get(i, ""), set()).add(str(names[i]))
        located = []
        for i, (name, path) in enumerate(zip(names, exact)):
            if not path and (other := near.get(i, "")):
                if len(wanted_by[other]) > 1:
                    located.append(("", f"the file is missing: the nearest, {other}, is that of several images"))
                else:
                    located.append((other, ""))
            else:
                located.append((path, "" if path else self._why_missing(name)))
        return located

    def exact(self, name: str) -> str:
        """The path of the file of exactly this name; empty where there is none, or outside the folder."""
        path = _path_of(self.folder, name)
        return path if path and self.listing.file(path) is not None else ""

    def alike(self, name: str) -> str:
        """Returns the path of the only file whose name equals this one or its last parts; empty if there is no such
        file. Of an address, what stands around the path is passed over, see `name_forms`."""
        return next((path for form in name_forms(name) if (path := self._by_last_parts(form))), "")

    def _by_last_parts(self, name: str) -> str:
        parts = name.replace("\\", "/").split("/")
        if ".." in parts:
            parts = parts[len(parts) - parts[::-1].index("..") :]
        parts = [part for part in parts if part not in ("", ".")]
        paths = (self._below_folder(parts[start:]) for start in range(len(parts)))
        return next((path for path in paths if path), "")

    def _below_folder(self, parts: Sequence[str]) -> str:
        path = self.folder
        for number, part in enumerate(parts, start=1):
            entries = self.listing.entries(path)
            same = [part] if part in entries else self._names_alike(path).get(name_key(part), [])
            if len(same) != 1:
                return ""
            path = child(path, same[0])
            if entries[same[0]].is_file:
                return path if number == len(parts) else ""
        return ""

    def _names_alike(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._alike:
            found = self._alike[folder] = {}
            for name in self.listing.entries(folder):
                found.setdefault(name_key(name), []).append(name)
        return self._alike[folder]

    def _why_missing(self, name: Any) -> str:
        if not _is_file_name(name):
            return f"file_name is {name!r}: expected the name of a file"
        missing = f"the file is missing{self.looked_in}"
        return missing if _path_of(self.folder, name) else f"file_name leaves the dataset's folder, and {missing}"


def _find_place(listing: Listing, names: list[Any], image_dirs: Sequence[str], split: str) -> _Place:
    """Finds the first of the given folders that holds most of a sample of the names."""
    usable = [n for n in names if _is_file_name(n)]
    sample = usable[:: max(1, len(usable) // 16)][:16]
    key = _DIR_KEYS.get(split, "data.image_dir")
    looked_in = f": looked in {', '.join(d or '.' for d in image_dirs)} (name the folder by {key})"
    places = [_Place(listing, f, looked_in) for pattern in image_dirs for f in _expand(listing, pattern)]
    best, most = places[0] if places else _Place(listing, "", looked_in), 0
    for match in (_Place.exact, _Place.alike):
        for place in places:
            hits = sum(bool(match(place, name)) for name in sample)
            if hits > most:
                best, most = place, hits
            if hits == len(sample):
                break
        if most:
            best.looked_in = f" in {best.folder or listing.root} (another folder is named by {key})"
            break
    return best


def _path_of(folder: str, name: str) -> str:
    """The image's path, normal; empty where it would leave the dataset's folder."""
    if posixpath.isabs(name) or is_uri(name):
        return ""
    outside = is_uri(folder) or posixpath.isabs(folder)
    path = posixpath.normpath(name if outside else posixpath.join(folder, name))
    if path == ".." or path.startswith("../"):
        return ""
    return child(folder, path) if outside else path


def name_forms(name: str) -> Iterator[str]:
    """A name, and the paths that it means if it is an address or the name of an upload, as Label Studio writes them.

    `/data/local-files/?d=photos/x.jpg` means photos/x.jpg, `https://host/x.jpg?signature=...` means x.jpg, and an
    upload `1a2b3c4d-x.jpg` was x.jpg before Label Studio gave it a name.
    """
    yield name
    path, mark, query = name.partition("?")
    if mark:
        yield from parse_qs(query).get("d", [])
        yield path
    folder, name = posixpath.split(path.replace("\\", "/"))
    if original := _UPLOAD.sub("", name):
        yield posixpath.join(folder, original)


def name_key(name: str) -> str:
    """Equal for names that differ in case, percent-encoding or the form of accents alone."""
    return unicodedata.normalize("NFC", unquote(name)).casefold()


def _is_file_name(name: Any) -> TypeGuard[str]:
    return isinstance(name, str) and bool(name) and "\0" not in name and is_text(name)


def _given_size(image: dict[str, Any], max_pixels: int) -> tuple[int | None, int | None]:
    """(height, width) of the annotation file, None where it does not say. Raises ValueError with the reason to skip."""
    size: list[int | None] = []
    for name in ("height", "width"):
        value = image.get(name)
        number = whole_number(value)
        if value is None or number in _UNKNOWN_SIZES:
            size.append(None)
        elif number is None or number < 1:
            raise ValueError(f"{name} is {shown(value)}: expected a whole number of pixels")
        else:
            size.append(number)
    height, width = size
    if height is not None and width is not None and height * width > max_pixels:
        raise ValueError(f"{width} x {height} pixels, at most {max_pixels} are read (data.max_image_pixels)")
    return height, width


def _read_sizes(uris: Sequence[str], max_pixels: int) -> list[tuple[int, int] | str]:
    """(height, width) of each file by its header, or why it cannot be used."""

    def read(uri: str) -> tuple[int, int] | str:
        try:
            return check_image(uri, None, max_pixels, decode=False)[0]
        except ImageError as error:
            return error.reason

    if not uris:
        return []
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        return list(pool.map(read, uris))


def _expand(listing: Listing, pattern: str) -> list[str]:
    """The folders that fit a pattern, those that fit it in another case last."""
    if "*" not in pattern:
        return [pattern]
    folder, name = posixpath.split(pattern)
    names = [n for n in listing.folders(folder) if fnmatch(n.lower(), name.lower())]
    return [posixpath.join(folder, n) for n in sorted(names, key=lambda n: not fnmatch(n, name))]
