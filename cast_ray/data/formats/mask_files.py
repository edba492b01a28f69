"""A folder for each image with one mask file for each object, as in the 2018 Data Science Bowl.

    <root>[/stage1_train]/<id>/images/<id>.png
    <root>[/stage1_train]/<id>/masks/<any name>.png     black, and white where the object is

Validation images lie in a folder `val`, `valid` or `validation` of the same layout; without one, some of the training
images are held out. All objects are of one class, `object`, and may overlap.
"""

from __future__ import annotations

import posixpath
from itertools import islice

from cast_ray.contracts.records import Category
from cast_ray.data.formats.coco import Progress
from cast_ray.data.formats.instance_maps import instance
from cast_ray.data.formats.label_maps import EXACT_SUFFIXES, THING
from cast_ray.data.formats.segmentations import encode_mask
from cast_ray.data.reading.images import IMAGE_SUFFIXES, ImageError, read_mask
from cast_ray.data.reading.index import (
    TRAIN_FOLDERS,
    DatasetIndex,
    ReadOutcome,
    Skipped,
    hold_out,
    index_extra,
    index_table,
    split_folders,
)
from cast_ray.data.reading.listing import Listing, child, open_listing
from cast_ray.recipe import DataConfig

CATEGORIES: tuple[Category, ...] = (THING,)
_TRAIN_FOLDERS = ("stage1_train", *TRAIN_FOLDERS)
_EXPECTED = "no masks found: expected <id>/images/<id>.png and <id>/masks/*.png (2018 Data Science Bowl)"
_LOOKED_AT = 20
"""Folders that are opened to recognise the layout: a few images may lack their masks."""


def index(config: DataConfig, progress: Progress | None = None) -> DatasetIndex:
    """Lists the images and the folders of their masks; neither is read.

    Raises:
        ValueError: one line naming the folder that is missing or of another layout.
    """
    listing = open_listing(config.root, "images with one mask file for each object")
    splits, skipped, sources = {}, list[Skipped](), {}
    for split, folder in split_folders(listing, config, is_layout, _EXPECTED, _TRAIN_FOLDERS).items():
        rows = []
        for identifier in listing.folders(folder):
            place = posixpath.join(folder, identifier)
            image, masks, reason = _image_of(listing, place)
            if reason:
                facts = {"id": identifier, "file": image or place, "reason": reason}
                skipped.append({"split": split, "kind": "image", **facts})
            else:
                rows.append((identifier, image, masks))
        sources[split] = folder or listing.root
        splits[split] = index_table(listing, split, rows)
    if "val" not in splits:
        splits = hold_out(splits["train"], config, sources["train"])
    extra, left_out = index_extra(listing, config, "a folder of mask files")
    return DatasetIndex(
        splits | extra,
        CATEGORIES,
        listing,
        skipped,
        sources=sources,
        read_instances=read_masks,
        left_out=left_out,
    )


def is_layout(listing: Listing, folder: str) -> bool:
    """Returns whether a folder holds folders with `images` and `masks`."""
    places = (posixpath.join(folder, name) for name in islice(listing.folders(folder), _LOOKED_AT))
    return any({"images", "masks"} <= set(listing.folders(place)) for place in places)


def read_masks(folder: str, image_hw: tuple[int, int]) -> ReadOutcome:
    """Reads the mask files of one image.

    Args:
        folder: path or URI of its `masks`.
        image_hw: height and width that each mask must have.

    Raises:
        OSError: the file store failed.
    """
    instances, unknown = [], []
    for name in _exact(Listing(folder), ""):
        try:
            mask = read_mask(child(folder, name), image_hw)
        except ImageError as error:
            unknown.append((name, error.reason))
            continue
        if mask.any():
            instances.append(instance(THING.id, encode_mask(mask)))
        else:
            unknown.append((name, "mask covers no pixel"))
    return instances, unknown


def _image_of(listing: Listing, place: str) -> tuple[str, str, str]:
    """The only image in the folder of an image, the folder of its masks, and why it cannot be used."""
    images, masks = posixpath.join(place, "images"), posixpath.join(place, "masks")
    names = [n for n in listing.files(images) if n.lower().endswith(IMAGE_SUFFIXES)]
    if len(names) != 1:
        return "", masks, f"{len(names)} images in {images}: expected one"
    image = posixpath.join(images, names[0])
    if "masks" not in listing.folders(place):
        return image, masks, "it has no folder masks (unlabelled images: data.extra_image_dir)"
    if listing.files(masks) and not _exact(listing, masks):
        return image, masks, f"no mask in {masks}: expected files of {', '.join(EXACT_SUFFIXES)}"
    return image, masks, ""


def _exact(listing: Listing, folder: str) -> list[str]:
    return [n for n in listing.files(folder) if n.lower().endswith(EXACT_SUFFIXES)]
