"""Cityscapes as downloaded: leftImg8bit and gtFine, no conversion step.

    <root>/leftImg8bit/{train,val}/<city>/<city>_<seq>_<frame>_leftImg8bit.png
    <root>/gtFine/{train,val}/<city>/<city>_<seq>_<frame>_gtFine_instanceIds.png
    <root>/leftImg8bit/train_extra/<city>/...     19,998 images of the unlabelled pool, where they are

A pixel of instanceIds is 1000 * class + instance, or the class alone (below 1000): then it belongs to no instance, or
to a group of objects that nobody could tell apart. Groups of the 8 classes become ignore regions, labels that the
benchmark does not evaluate ignore regions of no class.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cast_ray.contracts.records import Category
from cast_ray.data.formats.coco import Progress
from cast_ray.data.formats.instance_maps import encode_regions, instance
from cast_ray.data.reading.index import DatasetIndex, Skipped, index_pool, pair_maps
from cast_ray.data.reading.listing import Listing, open_listing
from cast_ray.recipe import DataConfig

CATEGORIES = (
    Category(24, "person"),
    Category(25, "rider"),
    Category(26, "car"),
    Category(27, "truck"),
    Category(28, "bus"),
    Category(31, "train"),
    Category(32, "motorcycle"),
    Category(33, "bicycle"),
)
"""The classes of the instance benchmark with the dataset's own ids (cityscapesScripts, helpers/labels.py)."""

VOID_IDS = frozenset({*range(7), 9, 10, 14, 15, 16, 18, 29, 30})
"""Labels that the benchmark leaves out (`ignoreInEval`): its AP does not count detections that lie mostly on them."""

_LABEL_IDS = range(34)
_SEPARATE_IDS = range(24, 34)  # caravans (29) and trailers (30) are told apart but not evaluated
_THING_IDS = frozenset(c.id for c in CATEGORIES)
_IMAGES, _MASKS, _EXTRA = "leftImg8bit", "gtFine", "leftImg8bit/train_extra"
_SUFFIX = re.compile(r"_(leftImg8bit|gtFine|gtCoarse)[^/]*$")


def index(config: DataConfig, progress: Progress | None = None) -> DatasetIndex:
    """Lists the images and label maps; neither is read.

    Raises:
        ValueError: one line naming the folder that is missing or holds no images.
    """
    listing = open_listing(config.root, "Cityscapes (leftImg8bit and gtFine)")
    splits: dict[str, pa.Table] = {}
    skipped: list[Skipped] = []
    left_out: Mapping[str, int] = {}
    for split in ("train", "val"):
        images = _frames(listing, f"{_IMAGES}/{split}", "*_leftImg8bit.*")
        masks = _frames(listing, f"{_MASKS}/{split}", "*_gtFine_instanceIds.png")
        splits[split], bad = pair_maps(listing, split, images, masks)
        skipped += bad
    if config.unlabelled_pool != "rest":
        splits["extra"], left_out = index_pool(listing, config.extra_image_dir or _EXTRA, frame_name)
    sources = {split: f"{_MASKS}/{split}" for split in ("train", "val")}
    return DatasetIndex(
        splits,
        CATEGORIES,
        listing,
        skipped,
        sources=sources,
        decode_map=decode_map,
        left_out=left_out,
        refuse_ignored=label_ids_alone,
    )


def frame_name(file: str) -> str:
    """`<city>_<seq>_<frame>` of any file name of Cityscapes: what its files of one frame have in common."""
    name = posixpath.basename(file)
    return _SUFFIX.sub("", name) if _SUFFIX.search(name) else posixpath.splitext(name)[0]


def decode_map(map_HW: np.ndarray) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The instances of an instanceIds map, groups and void as ignore regions, and (value, reason) of unknown values.

    A single caravan (29000) is no void, a group of them (29) is: as in cityscapesScripts.

    Raises:
        ValueError: the map is no instanceIds map.
    """
    if map_HW.ndim != 2:
        raise ValueError(f"label map of {map_HW.shape[2]} channels: expected 16-bit grey")
    instances, unknown = [], []
    for value, rle in encode_regions(map_HW).items():
        label = value // 1000 if value >= 1000 else value
        if label not in (_SEPARATE_IDS if value >= 1000 else _LABEL_IDS):
            unknown.append((str(value), f"pixel value {value}: no label of Cityscapes"))
        elif label in _THING_IDS or value in VOID_IDS:
            instances.append(instance(label, rle, is_crowd=value < 1000))
    return instances, unknown


def label_ids_alone(ids: Sequence[int]) -> str:
    """Says that a split's maps hold label ids where instance ids belong: its only regions of the classes are groups."""
    return (
        f"in *_gtFine_instanceIds.png the classes are there by their label ids alone ({', '.join(map(str, ids))}), as "
        f"in *_gtFine_labelIds.png: expected 1000 * class + instance ({ids[0]}000, {ids[0]}001, ...), as the files of "
        "gtFine_trainvaltest.zip hold it and cityscapesScripts' json2instanceImg writes it"
    )


def _frames(listing: Listing, folder: str, pattern: str) -> dict[str, str]:
    """Frame -> path of the files of a split, which has a folder for each city."""
    found = {
        frame_name(name): f"{folder}/{city}/{name}"
        for city in listing.folders(folder)
        for name in listing.files(f"{folder}/{city}", pattern)
    }
    if not found:
        raise ValueError(
            f"{listing.root}: no {folder}/<city>/{pattern}: expected Cityscapes as downloaded (leftImg8bit, gtFine)"
        )
    return found
