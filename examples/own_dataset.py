"""A dataset format of your own: images with a mask file beside each, in which every object has a grey value.

    DIR/train/<name>.png    DIR/train/<name>_mask.png
    DIR/val/<name>.png      DIR/val/<name>_mask.png

A mask file has one 8-bit or 16-bit channel: 0 is background, 1, 2, 3, ... are the objects. All are of one class here.

Run these in the folder that holds this file, so that Python finds the module `own_dataset`:

    cast-ray inspect DIR --format own_dataset:index
    cast-ray ablate losses --preset nuclei --set data.format=own_dataset:index --set data.root=DIR

On a cluster every node must be able to import the module: submit the folder as a Ray job's working directory, or put
the module on PYTHONPATH of all nodes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from cast_ray.contracts.records import Category
from cast_ray.data.formats.instance_maps import encode_regions, instance
from cast_ray.data.reading.index import DatasetIndex, pair_maps
from cast_ray.data.reading.listing import open_listing
from cast_ray.recipe import DataConfig

THING = Category(1, "thing")
MASK = "_mask.png"


def index(config: DataConfig, progress: Callable[[int, int], None] | None = None) -> DatasetIndex:
    """Lists the images and their mask files; cast_ray reads, checks and hashes both afterwards.

    Args:
        config: the recipe's `data` part; `root` is the folder or URI that the user named.
        progress: called with (images done, images in all) by readers that take long; this one does not.
    """
    listing = open_listing(config.root, "own_dataset (train and val)")  # works on object stores as well
    splits, skipped = {}, []
    for split in ("train", "val"):
        files = listing.files(split, "*.png")
        images = {name.removesuffix(".png"): f"{split}/{name}" for name in files if not name.endswith(MASK)}
        masks = {name.removesuffix(MASK): f"{split}/{name}" for name in files if name.endswith(MASK)}
        splits[split], without_pair = pair_maps(listing, split, images, masks)  # the rest is reported, not fatal
        skipped += without_pair
    sources = {split: split for split in splits}  # for messages
    return DatasetIndex(splits, (THING,), listing, skipped, sources=sources, decode_map=decode)


def decode(map_HW: np.ndarray) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Returns the objects of one mask file, and (id, reason) for those that cannot be used (none here).

    Raises:
        ValueError: the file has colour channels; its image is then left out and the reason reported.
    """
    if map_HW.ndim != 2:
        raise ValueError(f"mask of {map_HW.shape[2]} channels: expected one")
    regions = encode_regions(map_HW)  # value -> run lengths
    return [instance(THING.id, rle) for value, rle in regions.items() if value > 0], []
