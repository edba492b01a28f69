"""ADE20K as downloaded, in either of its two encodings, with the 100 classes of the instance benchmark.

The Places challenge (2017), also unpacked into ADEChallengeData2016 beside SceneParsing's own files:
    <root>/images/{training,validation}/ADE_train_00000001.jpg
    <root>/annotations_instance/{training,validation}/ADE_train_00000001.png    R = class 1..100, G = instance

The full dataset (2021_17_01):
    <root>/images/ADE/{training,validation}/<scene>/.../ADE_train_00000001.jpg
    the same folder, ADE_train_00000001_seg.png    class = R // 10 * 256 + G of 3,688, B = instance

Classes are numbered 1..100 in both, as in the challenge.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from cast_ray.contracts.records import Category
from cast_ray.data.formats.coco import Progress
from cast_ray.data.formats.instance_maps import encode_regions, instance
from cast_ray.data.reading.index import DatasetIndex, Skipped, index_extra, pair_maps
from cast_ray.data.reading.listing import Listing, open_listing
from cast_ray.recipe import DataConfig

# Name of class 1, 2, ... 100 = its numbers in the full dataset (the challenge's list and its category mapping).
_CLASSES = """
bed=165; windowpane=3055; cabinet=350; person=1831; door=774,783; table=2684; curtain=687; chair=471; car=401;
painting=1735; sofa=2473; shelf=2329; mirror=1564; armchair=57; seat=2272; fence=907; desk=724;
wardrobe=2985,533; lamp=1395; bathtub=155; railing=2053; cushion=689; box=266; column=581; signboard=2380;
chest of drawers=491; counter=627; sink=2388; fireplace=943; refrigerator=2096; stairs=2530; case=420;
pool table=1948; pillow=1869; screen door=2251; bookcase=239; coffee table=571; toilet=2793; flower=978;
book=236; bench=181; countertop=629; stove=2598; palm=1744; kitchen island=1374; computer=591;
swivel chair=2679; boat=223; arcade machine=47; bus=327; towel=2821; light=1451; truck=2880; chandelier=480;
awning=77; streetlight=2616; booth=246,247; television receiver=2733; airplane=14; apparel=38; pole=1936;
bannister=120; ottoman=1702; bottle=249; van=2928; ship=2337; fountain=1023; washer=2989; plaything=1930;
stool=2586; barrel=131; basket=146; bag=95; minibike=1563; oven=1708; ball=103; food=1002; step=2569;
trade name=2833; microwave=1551; pot=1981; animal=29; bicycle=187; dishwasher=747; screen=2254; sculpture=2262;
hood=1260; sconce=2243; vase=2932; traffic light=2836; tray=2850; ashcan=64; fan=894; plate=1919; monitor=1583;
bulletin board=318; radiator=2046; glass=1098; clock=530; flag=954
"""

_ROOTS = ("", "ADEChallengeData2016", "ADE20K_2021_17_01")
"""Where the images may lie, so that the folder above an unpacked archive is a root too."""

_SPLITS = {"train": "training", "val": "validation"}


def _read_classes() -> tuple[tuple[Category, ...], dict[int, int]]:
    categories, numbers = [], {}
    for identifier, entry in enumerate(_CLASSES.replace("\n", " ").split(";"), start=1):
        name, _, full = entry.strip().partition("=")
        categories.append(Category(identifier, name))
        numbers.update({int(number): identifier for number in full.split(",")})
    return tuple(categories), numbers


CATEGORIES, _FULL_CLASSES = _read_classes()


def index(config: DataConfig, progress: Progress | None = None) -> DatasetIndex:
    """Lists the images and label maps; neither is read.

    Raises:
        ValueError: one line naming the folder that is missing or of neither layout.
    """
    listing = open_listing(config.root, "ADE20K (images and annotations_instance)")
    for base in _ROOTS:
        if listing.folders(posixpath.join(base, "annotations_instance"), "training"):
            pair, decode = partial(_pair_challenge, listing, base), decode_challenge
            break
        if listing.folders(posixpath.join(base, "images/ADE"), "training"):
            pair, decode = partial(_pair_full, listing, base), decode_full
            break
    else:
        raise ValueError(
            f"{listing.root}: neither annotations_instance/training (Places challenge) nor images/ADE/training (full "
            "dataset): expected ADE20K as downloaded"
        )
    splits: dict[str, pa.Table] = {}
    skipped: list[Skipped] = []
    for split, folder in _SPLITS.items():
        images, masks = pair(folder)
        if not images.keys() & masks.keys():
            raise ValueError(f"{listing.root}: no image with its label map in {folder}: expected ADE20K as downloaded")
        splits[split], bad = pair_maps(listing, split, images, masks)
        skipped += bad
    extra, left_out = index_extra(listing, config, "ADE20K")
    return DatasetIndex(
        splits | extra, CATEGORIES, listing, skipped, sources=_SPLITS, decode_map=decode, left_out=left_out
    )


def decode_challenge(map_HWC: np.ndarray) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The instances of a challenge map (R class, G instance), and (instance, reason) of those without a class.

    Raises:
        ValueError: the map has no colour channels.
    """
    red, green, _ = _channels(map_HWC)
    regions = encode_regions(np.where(green > 0, red * 256 + green, 0))
    regions.pop(0, None)
    instances, unknown = [], []
    for value, rle in regions.items():
        label, number = divmod(value, 256)
        if 1 <= label <= len(CATEGORIES):
            instances.append(instance(label, rle))
        else:
            unknown.append((str(number), f"class {label}: expected 1..{len(CATEGORIES)}"))
    return instances, unknown


def decode_full(map_HWC: np.ndarray) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The instances of the 100 classes in a map of the full dataset (class R // 10 * 256 + G, B instance).

    Raises:
        ValueError: the map has no colour channels.
    """
    red, green, blue = _channels(map_HWC)
    regions = encode_regions((red // 10 * 256 + green) * 256 + blue)
    found = [(_FULL_CLASSES.get(value // 256), rle) for value, rle in regions.items()]
    return [instance(label, rle) for label, rle in found if label is not None], []


def _channels(map_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if map_HWC.ndim != 3:
        raise ValueError("label map without colour channels: expected RGB")
    red, green, blue = np.moveaxis(map_HWC[..., :3].astype(np.int32), -1, 0)
    return red, green, blue


def _pair_challenge(listing: Listing, base: str, folder: str) -> tuple[dict[str, str], dict[str, str]]:
    """Stem -> path of the images and of the label maps."""
    images, masks = (posixpath.join(base, kind, folder) for kind in ("images", "annotations_instance"))
    return (
        {posixpath.splitext(n)[0]: f"{images}/{n}" for n in listing.files(images, "*.jpg")},
        {posixpath.splitext(n)[0]: f"{masks}/{n}" for n in listing.files(masks, "*.png")},
    )


def _pair_full(listing: Listing, base: str, folder: str) -> tuple[dict[str, str], dict[str, str]]:
    images: dict[str, str] = {}
    masks: dict[str, str] = {}
    for scene in _scenes(listing, posixpath.join(base, "images/ADE", folder)):
        images |= {n.removesuffix(".jpg"): f"{scene}/{n}" for n in listing.files(scene, "*.jpg")}
        masks |= {n.removesuffix("_seg.png"): f"{scene}/{n}" for n in listing.files(scene, "*_seg.png")}
    return images, masks


def _scenes(listing: Listing, folder: str) -> Iterator[str]:
    """The folders of images; not those that hold the amodal masks of one image, of which there are 27,000."""
    return listing.walk(folder, enter=lambda place, name: listing.file(f"{place}/{name}.jpg") is None)
