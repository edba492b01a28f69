"""Label maps beside images, as Cellpose and StarDist have them: each pixel is 0 or the number of its object.

StarDist:
    <root>[/train]/images/x.tif
    <root>[/train]/masks/x.tif

Cellpose:
    <root>[/train]/x.png or x_img.png
    <root>[/train]/x_masks.png or x_cp_masks.png

Validation images lie in a folder `val`, `valid` or `validation` of the same layout; without one, some of the training
images are held out. A folder `test` is not read. All objects are of one class, `object`.
"""

from __future__ import annotations

import posixpath
import re

import numpy as np

from cast_ray.contracts.records import Category
from cast_ray.data.formats.coco import Progress
from cast_ray.data.formats.instance_maps import encode_regions, instance
from cast_ray.data.reading.images import IMAGE_SUFFIXES
from cast_ray.data.reading.index import (
    DatasetIndex,
    ReadOutcome,
    Skipped,
    by_stem,
    hold_out,
    index_extra,
    pair_maps,
    split_folders,
)
from cast_ray.data.reading.listing import Listing, open_listing
from cast_ray.recipe import DataConfig

THING = Category(1, "object")
"""The only class of a format that does not say what its objects are."""
EXACT_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
"""What files are called whose pixels come back as they were written; JPEG invents values at the edges of objects."""
_EXPECTED = (
    "no label map found: expected images/ and masks/ with files of equal names (StarDist) or x.png beside x_masks.png "
    "(Cellpose)"
)
_MASK = re.compile(r"_(cp_)?masks$")


def index(config: DataConfig, progress: Progress | None = None) -> DatasetIndex:
    """Lists the images and label maps; neither is read.

    Raises:
        ValueError: one line naming the folder that is missing or of neither layout.
    """
    listing = open_listing(config.root, "images and label maps")
    splits, skipped, sources = {}, list[Skipped](), {}
    for split, folder in split_folders(listing, config, is_layout, _EXPECTED).items():
        sources[split] = folder or listing.root
        images, maps = _pairs(listing, folder)
        by_image = by_stem(images, lambda stem: stem.removesuffix("_img"))
        splits[split], bad = pair_maps(listing, split, by_image, by_stem(maps, lambda stem: _MASK.sub("", stem)))
        skipped += bad
    if "val" not in splits:
        splits = hold_out(splits["train"], config, sources["train"])
    extra, left_out = index_extra(listing, config, "a folder of label maps")
    return DatasetIndex(
        splits | extra, (THING,), listing, skipped, sources=sources, decode_map=decode, left_out=left_out
    )


def is_layout(listing: Listing, folder: str) -> bool:
    """Returns whether a folder holds images with label maps in one of the two layouts."""
    return bool(_pairs(listing, folder)[1])


def decode(map_HW: np.ndarray) -> ReadOutcome:
    """The objects of a label map: one for each value but 0.

    Raises:
        ValueError: the map has colour channels, or is a mask of all objects together.
    """
    if map_HW.ndim != 2:
        raise ValueError(f"{map_HW.shape[2]} channels: expected grey, 0 or the number of the object in each pixel")
    regions = encode_regions(map_HW)
    regions.pop(0, None)
    if map_HW.dtype == np.uint8 and list(regions) == [255]:
        raise ValueError("its only value is 255, a mask of all objects together: expected a number for each object")
    return [instance(THING.id, rle) for rle in regions.values()], []


def _pairs(listing: Listing, folder: str) -> tuple[list[str], list[str]]:
    """Paths of the images and of the label maps; both are empty where the folder is of neither layout."""
    base = posixpath.dirname(folder) if posixpath.basename(folder) == "images" else folder
    images = _files(listing, posixpath.join(base, "images"), IMAGE_SUFFIXES)
    maps = _files(listing, posixpath.join(base, "masks"), EXACT_SUFFIXES)
    if images and maps:
        return images, maps
    maps = [p for p in _files(listing, folder, EXACT_SUFFIXES) if _MASK.search(posixpath.splitext(p)[0])]
    return ([p for p in _files(listing, folder, IMAGE_SUFFIXES) if p not in set(maps)] if maps else []), maps


def _files(listing: Listing, folder: str, suffixes: tuple[str, ...]) -> list[str]:
    return [posixpath.join(folder, n) for n in listing.files(folder) if n.lower().endswith(suffixes)]
