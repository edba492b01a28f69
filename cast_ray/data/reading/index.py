"""A dataset's images by name: what a format's reader finds before any mask file or pixel is read."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cast_ray.contracts.records import RECORD_SCHEMA, Category, encode_image_id
from cast_ray.data.reading.listing import Listing
from cast_ray.data.reading.photos import describe_left_out, images_below
from cast_ray.recipe import DataConfig

INDEX_SCHEMA = pa.schema(
    [
        *RECORD_SCHEMA,  # height and width may be null: read from the file; instances null: none known, or in mask_uri
        ("split", pa.string()),
        ("file", pa.string()),  # the image below the dataset's folder, for messages
        ("num_bytes", pa.int64()),
        ("mask_uri", pa.string()),  # label map, text file or folder of the instances; null: `instances` is final
    ]
)

TRAIN_FOLDERS = ("train", "training", "")
VAL_FOLDERS = ("val", "valid", "validation")
"""Usual folders of the images of formats whose tools prescribe none."""

Skipped = dict[str, str]
"""An image or annotation that cannot be used: split, kind (image, annotation), id, file, reason."""


class HeldOut(NamedTuple):
    """The annotations of validation images that were held out of the training images.

    The training split counts them too, because they come from its annotation file.

    num_annotations: how many, unusable ones included; skipped: the unusable ones.
    """

    num_annotations: int
    skipped: Sequence[Skipped]


ReadOutcome = tuple[list[dict[str, Any]], list[tuple[str, str]]]
"""The instances of an image (INSTANCE_TYPE as dicts), and (id, reason) of those that cannot be used."""

DecodeMap = Callable[[np.ndarray], ReadOutcome]
"""A label map [H, W(, 3)] -> its instances; it raises ValueError with the reason why a map cannot be used."""

ReadInstances = Callable[[str, tuple[int, int]], ReadOutcome]
"""`mask_uri` of an image and its (height, width) -> its instances; it raises ValueError as DecodeMap does."""


@dataclass(frozen=True)
class DatasetIndex:
    """What a format's reader hands over; `reading` makes records of it.

    splits: train, val and, where there is one, source or extra -> INDEX_SCHEMA. num_annotations: split -> how many its
    annotation files hold, unusable ones included (0 where they are in label maps and counted when these are read).
    sources: split -> the file or folder of its annotations, for messages. content_hash: of a dataset that vouches for
    its own files, which are then not read again. annotated: image ids that the positions of published COCO label lists
    count, see `label_lists`. all_ignored_hint: one sentence that says what probably happened in a dataset of this
    format where every annotation of a split is an ignore region, see `data_report`. left_out: what was not taken from
    the folder of the extra pool, see `photos.FoundImages`. refuse_ignored: of a format in which a split whose objects
    are all ignore regions is a mistake: the ids of their classes -> why it is refused. held_out: of a dataset without
    validation files of its own. decode_map or read_instances: how the instances behind a `mask_uri` are read, of a
    format with one label map, or with another file or a folder for each image. warnings: sentences for the data report.
    """

    splits: dict[str, pa.Table]
    categories: tuple[Category, ...]
    listing: Listing
    skipped: list[Skipped] = field(default_factory=list)
    num_annotations: dict[str, int] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    decode_map: DecodeMap | None = None
    content_hash: str = ""
    annotated: tuple[str, ...] | None = None
    all_ignored_hint: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)
    refuse_ignored: Callable[[Sequence[int]], str] | None = None
    held_out: HeldOut | None = None
    read_instances: ReadInstances | None = None
    warnings: Sequence[str] = ()

    def num_images(self, split: str) -> int:
        """Images of a split, unusable ones included."""
        bad = sum(s["split"] == split and s["kind"] == "image" for s in self.skipped)
        return self.splits[split].num_rows + bad


def index_table(listing: Listing, split: str, rows: Sequence[tuple[str, str, str | None]]) -> pa.Table:
    """INDEX_SCHEMA rows of images of unknown size: (image id, path below root, path of its label map or None)."""
    sizes = [getattr(listing.file(path), "size", 0) for _, path, _ in rows]
    unknown = pa.nulls(len(rows), pa.int32())
    return pa.Table.from_arrays(
        [
            pa.array([encode_image_id(identifier) for identifier, _, _ in rows], pa.string()),
            pa.array([listing.uri(path) for _, path, _ in rows], pa.string()),
            unknown,
            unknown,
            pa.nulls(len(rows), INDEX_SCHEMA.field("instances").type),
            pa.array([split] * len(rows), pa.string()),
            pa.array([path for _, path, _ in rows], pa.string()),
            pa.array(sizes, pa.int64()),
            pa.array([listing.uri(m) if m is not None else None for _, _, m in rows], pa.string()),
        ],
        schema=INDEX_SCHEMA,
    )


def pair_maps(
    listing: Listing, split: str, images: dict[str, str], masks: dict[str, str]
) -> tuple[pa.Table, list[Skipped]]:
    """A split of images with their label maps, and those that lack the other.

    Args:
        images: image id -> path below root.
        masks: image id -> path of its label map.
    """
    skipped = []
    for identifier in sorted(images.keys() ^ masks.keys()):
        is_image = identifier in images
        file = images[identifier] if is_image else masks[identifier]
        facts = {"id": identifier, "file": file, "reason": f"its {'label map' if is_image else 'image'} is missing"}
        skipped.append({"split": split, "kind": "image", **facts})
    rows = [(i, images[i], masks[i]) for i in sorted(images.keys() & masks.keys())]
    return index_table(listing, split, rows), skipped


def index_pool(
    listing: Listing, folder: str, stem: Callable[[str], str] | None = None
) -> tuple[pa.Table, Mapping[str, int]]:
    """Lists all image files below a folder as images without labels, and counts what is left out.

    Args:
        folder: below root, or an absolute path or URI.
        stem: file name -> image id; None: the path below `folder`.

    Returns:
        INDEX_SCHEMA rows of split extra, and `FoundImages.left_out`.

    Raises:
        ValueError: there is no image file; the message says what there is instead.
    """
    folder = folder.rstrip("/") or folder
    found = images_below(listing, folder)
    if not found.paths:
        instead = f" (left out: {describe_left_out(found.left_out)})" if found.left_out else ""
        raise ValueError(
            f"data.unlabelled_pool: no image below {folder} in {listing.root}{instead}: expected a folder of images in "
            "data.extra_image_dir, as an absolute path or a path below data.root"
        )
    named = [(stem(path) if stem else path.removeprefix(f"{folder}/"), path, None) for path in found.paths]
    return index_table(listing, "extra", named), found.left_out


def index_extra(listing: Listing, config: DataConfig, what: str) -> tuple[dict[str, pa.Table], Mapping[str, int]]:
    """Lists the extra pool, if the recipe uses one, of a format that has no usual folder for it.

    Args:
        what: name of the format, for the message.

    Returns:
        The split `extra` or nothing, and `FoundImages.left_out`.

    Raises:
        ValueError: the recipe names no folder.
    """
    if config.unlabelled_pool == "rest":
        return {}, {}
    if not config.extra_image_dir:
        raise ValueError(f"data.unlabelled_pool: {what} has no extra images: name a folder by data.extra_image_dir")
    table, left_out = index_pool(listing, config.extra_image_dir)
    return {"extra": table}, left_out


def by_stem(paths: Iterable[str], strip: Callable[[str], str] = lambda stem: stem) -> dict[str, str]:
    """Returns file name without suffix -> path, of the files that other files are to be paired with.

    Args:
        paths: of files.
        strip: takes away what the tool appends to the stem.

    Raises:
        ValueError: two files differ in their suffix alone, so that nobody can tell which of them is meant.
    """
    found: dict[str, str] = {}
    for path in paths:
        stem = strip(posixpath.splitext(posixpath.basename(path))[0])
        if stem in found:
            raise ValueError(f"{found[stem]} and {path} have one name: expected one file of the name {stem}")
        found[stem] = path
    return found


def split_folders(
    listing: Listing,
    config: DataConfig,
    is_layout: Callable[[Listing, str], bool],
    expected: str,
    train_folders: Sequence[str] = TRAIN_FOLDERS,
) -> dict[str, str]:
    """Returns the folder of split train and, where there is one, of val: those that the recipe names, else usual ones.

    Args:
        listing: of the dataset's folder.
        config: `image_dir` and `val_image_dir` name the folders.
        is_layout: whether a folder holds images of the format.
        expected: what was looked for, for the message.
        train_folders: usual folders of the training images.

    Raises:
        ValueError: there are no training images, or a folder that the recipe names holds none.
    """
    folders = {}
    for split, given, usual in (
        ("train", config.image_dir, train_folders),
        ("val", config.val_image_dir, VAL_FOLDERS),
    ):
        folder = next((f for f in ([given] if given else usual) if is_layout(listing, f)), None)
        if folder is None and (given or split == "train"):
            raise ValueError(f"{posixpath.join(listing.root, given)}: {expected}")
        if folder is not None:
            folders[split] = folder
    return folders


def hold_out(table: pa.Table, config: DataConfig, source: str) -> dict[str, pa.Table]:
    """Splits the images of a dataset without validation images: train and val.

    The images whose sha256(image id) lies in the lowest `val_fraction` are held out, at least one and never all, so
    that the choice survives added images.

    Args:
        table: INDEX_SCHEMA.
        source: file or folder of the images, for the message.

    Raises:
        ValueError: there are fewer than two images.
    """
    if table.num_rows < 2:
        raise ValueError(
            f"{source}: {table.num_rows} usable image: expected at least 2, one of them for validation (or images for "
            "validation in a folder of their own)"
        )
    digests = [hashlib.sha256(i.encode()).digest()[:8] for i in table.column("image_id").to_pylist()]
    place = np.array([int.from_bytes(d, "big") / 2**64 for d in digests])
    held = place < config.val_fraction
    held[place.argmin()] = True
    held[place.argmax()] = False
    kept, val = table.filter(pa.array(~held)), table.filter(pa.array(held))
    column = table.schema.get_field_index("split")
    return {"train": kept, "val": val.set_column(column, "split", pa.array(["val"] * val.num_rows))}


def describe(skipped: Sequence[Skipped], most: int = 3) -> str:
    """The first few skipped images or annotations with their reasons."""
    return "; ".join(f"{s['kind']} {s['id']} ({s['file'][:80]}): {s['reason']}" for s in skipped[:most])
