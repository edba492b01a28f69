"""Which images keep their labels: nested fractions, fractions with every class, published lists."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cast_ray.contracts.records import instance_rows
from cast_ray.data.splits.label_lists import LabelList, listed_rows
from cast_ray.recipe import DataConfig


@dataclass(frozen=True)
class LabelSplit:
    """D_l and D_u: rows of the training images int64 [n] each; N + i stands for row i of the extra pool.

    facts: how they were chosen and how many there are, for the result.
    """

    labelled: np.ndarray
    unlabelled: np.ndarray
    facts: dict[str, Any]


@dataclass(frozen=True)
class LabelSource:
    """What a choice may need beside the records: see `label_lists.listed_rows` and `DatasetSplits`."""

    label_list: LabelList | None = None
    unlabelled_list: LabelList | None = None
    annotated: Sequence[str] | None = None
    unusable: Iterable[str] = ()
    extra_ids: Sequence[str] = ()


def label_index(records: pa.Table) -> pa.Table:
    """What a choice reads of training records: image_id, uri and category_ids, the classes with an object in it."""
    instances = records.column("instances")
    flat, rows = pc.list_flatten(instances), instance_rows(instances)
    objects = ~pc.struct_field(flat, "is_crowd").to_numpy().astype(bool)
    categories = pc.struct_field(flat, "category_id").to_numpy()
    pairs = np.unique(np.stack([rows[objects], categories[objects]], 1), axis=0).astype(np.int64)
    ends = np.cumsum(np.bincount(pairs[:, 0], minlength=records.num_rows))
    offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
    classes = pa.ListArray.from_arrays(offsets, pa.array(pairs[:, 1], pa.int64()))
    return records.select(["image_id", "uri"]).append_column("category_ids", classes)


def mark_copies(index: pa.Table, same_as: np.ndarray, in_val: np.ndarray) -> pa.Table:
    """Adds to a label index which images `split` keeps out of D_u, see `copies`; both [N], in its order."""
    return index.append_column("same_as", pa.array(same_as)).append_column("in_val", pa.array(in_val))


def split(
    records: pa.Table,
    config: DataConfig,
    seed: int,
    source: LabelSource = LabelSource(),
    min_labelled: int = 1,
) -> LabelSplit:
    """Divides the training images into labelled and unlabelled ones.

    Images are ordered by sha256(seed, image_id).

    - `nested`: the first round(fraction * N) are labelled, so every smaller fraction is inside every larger one, and an
      added image moves the border by at most one place.
    - `per-class`: as `nested`, but before the rest come the first images in that order that bring every class, the
      rarest first, to `min_per_class` images (or all it has). Nested too; the fraction stays what it says.
    - `list`: the images of `label_list`; of a file of positions, those of this fraction and seed.

    D_u never holds a copy of a labelled or of a validation image where the records are marked (`mark_copies`); the
    facts then count those left out, `num_copies`.

    With `drop_empty`, labelled images without an object of a class are then left out; they do not go to D_u either.

    D_u are the other training images, the extra pool's or both, in the same order; with `unlabelled_fraction` or
    `num_unlabelled`, the last so many, so that all label fractions that leave as many share one D_u.

    Args:
        records: training images as `label_index` describes them, marked or not.
        config: how to choose.
        seed: seed of the run; `data.split_seed` replaces it if it is set.
        source: lists and pools that the choice reads.
        min_labelled: how many labelled images the run needs: one for each worker.

    Raises:
        ValueError: too few images for the fraction, or a list that does not fit the dataset.
    Deviations: unbiased-teacher also leaves images without objects out of D_u; here they are in it, because which
    these are is known from the hidden truth alone.
    """
    seed = seed if config.split_seed is None else config.split_seed
    num_images = records.num_rows
    order = _hash_order([*records.column("image_id").to_pylist(), *source.extra_ids], seed)
    labelled, chosen = _choose_labelled(records, order[order < num_images], config, seed, source)
    too_few = f"expected at least 1 per worker ({min_labelled})"
    if len(labelled) < min_labelled:
        raise ValueError(f"{chosen} {len(labelled)} labelled images: {too_few}")
    unlabelled, num_copies = _choose_unlabelled(records, order, labelled, config, seed, source)
    num_chosen = len(labelled)
    if config.drop_empty:  # after D_u was chosen, so that they do not go there
        labelled = labelled[_has_object(records, labelled)]
        if len(labelled) < min_labelled:
            raise ValueError(
                f"{chosen} {num_chosen} labelled images, of which {num_chosen - len(labelled)} have no object and are "
                f"left out: {too_few}, or data.drop_empty=false; `cast-ray inspect` shows what the annotations hold "
                "and why"
            )
    named = source.label_list is not None and source.label_list.positions is None
    facts = {
        "family": config.label_family,
        "fraction": num_chosen / num_images if named else config.label_fraction,
        "seed": seed,
        "num_labelled": len(labelled),
        "num_with_objects": int(_has_object(records, labelled).sum()),
        "num_unlabelled": len(unlabelled),
        "num_extra": int((unlabelled >= num_images).sum()),
    }
    if num_copies:
        facts["num_copies"] = num_copies
    if config.drop_empty:
        facts["num_empty"] = num_chosen - len(labelled)
    if config.label_family == "per-class":
        facts["min_per_class"] = config.min_per_class
    for name in ("label_list", "unlabelled_list"):
        if (chosen_list := getattr(source, name)) is not None:
            facts |= {name: chosen_list.file, f"{name}_sha256": chosen_list.sha256}
    return LabelSplit(labelled, unlabelled, facts)


def _choose_labelled(
    records: pa.Table, order: np.ndarray, config: DataConfig, seed: int, source: LabelSource
) -> tuple[np.ndarray, str]:
    """D_l before images without objects are left out, and what has chosen it, for an error message.

    Args:
        order: rows of the training images in the order of their hashes.
    """
    if config.label_family == "list":
        assert source.label_list is not None
        return _listed(records, source.label_list, config, seed, source), f"{source.label_list.file} names"
    num_labelled = math.floor(config.label_fraction * len(order) + 0.5)
    if config.label_family == "per-class":
        order = _classes_first(records, order, config, num_labelled)
    return order[:num_labelled], f"label fraction {config.label_fraction} of {len(order)} images gives"


def _choose_unlabelled(
    records: pa.Table, order: np.ndarray, labelled: np.ndarray, config: DataConfig, seed: int, source: LabelSource
) -> tuple[np.ndarray, int]:
    """D_u, and how many copies of labelled or validation images are left out of it.

    Args:
        order: rows of the training images and of the extra pool, in the order of their hashes.
        labelled: rows of D_l.
    """
    num_images = records.num_rows
    if source.unlabelled_list is not None:
        pool = _listed(records, source.unlabelled_list, config, seed, source)
    else:
        pools = {"rest": (0, num_images), "extra": (num_images, len(order)), "both": (0, len(order))}
        pool = np.arange(*pools[config.unlabelled_pool])
    taken = np.zeros(len(order), dtype=bool)
    taken[pool] = True
    taken[labelled] = False
    copies = _copies(records, labelled) & taken[:num_images]
    taken[:num_images] &= ~copies
    unlabelled = order[taken[order]]
    num_unlabelled = math.floor(config.unlabelled_fraction * len(unlabelled) + 0.5)
    if config.num_unlabelled is not None:
        num_unlabelled = min(num_unlabelled, config.num_unlabelled)
    return unlabelled[len(unlabelled) - num_unlabelled :], int(copies.sum())


def _has_object(records: pa.Table, rows: np.ndarray) -> np.ndarray:
    """bool [n]: which of these training images hold an object that is no ignore region."""
    return pc.list_value_length(records.column("category_ids")).to_numpy()[rows] > 0


def _copies(records: pa.Table, labelled: np.ndarray) -> np.ndarray:
    """bool [N]: which training images are the same as a labelled or a validation image."""
    if "same_as" not in records.column_names:
        return np.zeros(records.num_rows, dtype=bool)
    same_as = records.column("same_as").to_numpy()
    return np.isin(same_as, same_as[labelled]) | records.column("in_val").to_numpy()


def _hash_order(ids: Sequence[str], seed: int) -> np.ndarray:
    keys = [hashlib.sha256(f"{seed}\n{i}".encode()).digest() for i in ids]
    return np.array(sorted(range(len(ids)), key=keys.__getitem__), dtype=np.int64)


def _listed(records: pa.Table, chosen: LabelList, config: DataConfig, seed: int, source: LabelSource) -> np.ndarray:
    return listed_rows(
        records, chosen, config.label_fraction, seed, annotated=source.annotated, unusable=source.unusable
    )


def _classes_first(records: pa.Table, order: np.ndarray, config: DataConfig, num_labelled: int) -> np.ndarray:
    """The order with the images in front that bring each class to `min_per_class`."""
    classes = records.column("category_ids").combine_chunks()
    rows, present = pc.list_parent_indices(classes).to_numpy(), classes.flatten().to_numpy()
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    holders = {c: rows[present == c] for c in np.unique(present).tolist()}
    front = np.zeros(len(order), dtype=bool)
    for rows_of_class in sorted(holders.values(), key=len):
        lacking = min(config.min_per_class, len(rows_of_class)) - front[rows_of_class].sum()
        others = rows_of_class[~front[rows_of_class]]
        front[others[np.argsort(place[others])][: max(0, lacking)]] = True
    if front.sum() > num_labelled:
        raise ValueError(
            f"data.min_per_class={config.min_per_class} of {len(holders)} classes needs {front.sum()} labelled images, "
            f"data.label_fraction {config.label_fraction} of {len(order)} gives {num_labelled}"
        )
    return np.concatenate([order[front[order]], order[~front[order]]])
