"""Published label lists: which images a paper's D_l (or D_u) held, read as their authors publish them."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa

from cast_ray.common.paths import is_uri
from cast_ray.common.text_files import decode_text, parse_json, read_file
from cast_ray.contracts.records import decode_image_id
from cast_ray.data.formats.cityscapes import frame_name

_AMBIGUOUS = -1
_ENOUGH_NAMED = 3
_NAME_SHOWN = 100
"""Characters of a name in a message: a file of another kind can be one line of a million."""


@dataclass(frozen=True)
class LabelList:
    """A list as read: names of images, or positions by percentage and seed; sha256 is the file's."""

    file: str
    sha256: str
    names: tuple[str, ...] = ()
    positions: dict[str, dict[str, list[int]]] | None = None


def read_list(file: str) -> LabelList:
    """Reads a label list in any of the forms they are published in.

    Names, one a line or a JSON list of them: of image files, of Cityscapes label maps (Guided Distillation's perc_5.txt
    holds `bremen_000041_000019_gtFine_instanceIds.png`), or image ids; blank lines and lines that start with # are
    passed over. A COCO JSON: its images (Soft Teacher's and Guided Distillation's subsets of
    `instances_train2017.json`). A JSON object percentage -> seed -> positions (unbiased-teacher's
    COCO_supervision.txt), each the place of an image among those with at least one object that is no crowd, in the
    order of their ids.

    Args:
        file: local path or URI; what it holds decides, not its name.

    Raises:
        ValueError: unreadable, empty or of no such form; the message names the file.
    """
    name = f"data.label_list: {file}"
    content = read_file(file, name)
    sha256 = hashlib.sha256(content).hexdigest()
    text = decode_text(content, name)
    if text.lstrip().startswith(("{", "[")):
        return _read_json(file, sha256, text)
    lines = [line.strip() for line in text.splitlines()]
    names = tuple(line for line in lines if line and not line.startswith("#"))
    if not names:
        raise ValueError(f"data.label_list: {file} names no image")
    return LabelList(file, sha256, names)


def _read_json(file: str, sha256: str, text: str) -> LabelList:
    expected = "expected names of images, a COCO JSON, or percentage -> seed -> positions"
    try:
        value = parse_json(text, f"data.label_list: {file}")
    except ValueError as error:
        raise ValueError(f"{error}: {expected}") from None
    if isinstance(value, list) and value and all(type(name) in (str, int) for name in value):
        return LabelList(file, sha256, tuple(str(name) for name in value))
    if isinstance(value, dict) and isinstance(value.get("images"), list):
        names = [image.get("file_name") for image in value["images"] if isinstance(image, dict)]
        known = tuple(name for name in names if isinstance(name, str))
        if known and len(known) == len(value["images"]):
            return LabelList(file, sha256, known)
    if isinstance(value, dict) and value and all(_are_positions(seeds) for seeds in value.values()):
        return LabelList(file, sha256, positions=value)
    raise ValueError(f"data.label_list: {file}: {expected}")


def _are_positions(seeds: Any) -> bool:
    if not isinstance(seeds, dict) or not seeds:
        return False
    return all(isinstance(p, list) and all(type(i) is int and i >= 0 for i in p) for p in seeds.values())


def listed_rows(
    records: pa.Table,
    chosen: LabelList,
    fraction: float,
    seed: int,
    *,
    annotated: Sequence[str] | None,
    unusable: Iterable[str],
) -> np.ndarray:
    """The rows of the training images that a list holds.

    Args:
        records: training images: image_id and uri.
        chosen: a list, as `read_list` returns it.
        fraction, seed: which of the lists in a file of positions.
        annotated: image ids that positions count (DatasetSplits.annotated).
        unusable: ids and file names of images that were skipped: the list may hold them.

    Returns:
        int64 [n], rising.

    Raises:
        ValueError: the list holds images that the dataset has not, fits several images or was made for another
            annotation file; the message names the list.
    """
    ids = records.column("image_id").to_pylist()
    bad = set(unusable)
    if chosen.positions is not None:
        row_of = {identifier: row for row, identifier in enumerate(ids)}
        if annotated is None:
            raise ValueError(
                f"{chosen.file}: holds positions, which count the images of a COCO annotation file with ids of one type"
            )
        wanted = [annotated[p] for p in _positions(chosen, fraction, seed, annotated)]
        named = [(str(decode_image_id(i)), row_of.get(i)) for i in wanted]
    else:
        names = _NameTable(ids, records.column("uri").to_pylist(), chosen.file)
        named = [(name, names.find(name)) for name in chosen.names]
    missing = [name for name, row in named if row is None and not bad & set(_forms_of(name))]
    if missing:
        raise ValueError(
            f"{chosen.file}: {len(missing)} of its {len(named)} images are no training images of the dataset: "
            f"{', '.join(name[:_NAME_SHOWN] for name in missing[:_ENOUGH_NAMED])}"
        )
    return np.unique(np.array([row for _, row in named if row is not None], dtype=np.int64))


def _positions(chosen: LabelList, fraction: float, seed: int, annotated: Sequence[str]) -> list[int]:
    assert chosen.positions is not None
    percentages = {key: float(key) for key in chosen.positions if _is_number(key)}
    key = next((key for key, percent in percentages.items() if abs(percent - 100 * fraction) < 1e-9), None)
    if key is None:
        raise ValueError(
            f"{chosen.file}: no list for data.label_fraction={fraction}: expected {', '.join(chosen.positions)} percent"
        )
    seeds = chosen.positions[key]
    if str(seed) not in seeds:
        raise ValueError(
            f"{chosen.file}: {key} percent has no seed {seed}: expected data.split_seed {', '.join(seeds)}"
        )
    positions = seeds[str(seed)]
    if len(positions) != int(float(key) / 100 * len(annotated)) or max(positions, default=0) >= len(annotated):
        raise ValueError(
            f"{chosen.file}: {len(positions)} positions for {key} percent: made for another annotation file than the "
            f"dataset's with {len(annotated)} annotated images"
        )
    return positions


def _is_number(text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        return False


class _NameTable:
    """Rows by every form in which a list may name an image."""

    def __init__(self, ids: list[str], uris: list[str], file: str):
        self.file = file
        self.rows: dict[str, int] = {}
        for row, (identifier, uri) in enumerate(zip(ids, uris)):
            path = unquote(uri) if is_uri(uri) else uri
            for form in {str(decode_image_id(identifier)), *_forms_of(path)}:
                self.rows[form] = row if self.rows.get(form, row) == row else _AMBIGUOUS

    def find(self, name: str) -> int | None:
        found = [self.rows[form] for form in _forms_of(name) if form in self.rows]
        if found and found[0] == _AMBIGUOUS:
            raise ValueError(
                f"{self.file}: {name[:_NAME_SHOWN]!r} fits several images: expected the folder before the name, or ids"
            )
        return found[0] if found else None


def _forms_of(name: str) -> list[str]:
    """Returns the whole name, and what is left of it without folders, ending and Cityscapes' kind of file."""
    folder, base = posixpath.split(name)
    beside = posixpath.join(posixpath.basename(folder), base)
    return list(dict.fromkeys([name, beside, base, posixpath.splitext(base)[0], frame_name(base)]))


def forms_of_skipped(skipped: Iterable[dict[str, str]]) -> set[str]:
    """Every name by which a list may hold a training image that was skipped."""
    chosen = [s for s in skipped if s["kind"] == "image" and s.get("split", "train") == "train"]
    return {form for s in chosen for form in (s["id"], *_forms_of(s["file"]))}
