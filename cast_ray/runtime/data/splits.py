"""Which images of a sweep's dataset are labelled and unlabelled: chosen once, before anything runs, kept in the store.

<storage>/splits/<key>.json    rows of the record tables, and how they were chosen
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow.compute as pc

from cast_ray.common.digest import digest_of
from cast_ray.data.splits.folds import fold_of
from cast_ray.data.splits.fractions import LabelSplit, split
from cast_ray.plan.graph import split_part
from cast_ray.plan.reads import needs_unlabelled, num_folds_of
from cast_ray.recipe import Recipe
from cast_ray.runtime.data.dataset import LABEL_INDEX, StoredDataset
from cast_ray.runtime.store.artifacts import ArtifactStore


def split_key(content_hash: str, part: dict[str, Any]) -> str:
    """Name of a stored choice of images; `part`: of a stage, see `graph.split_part`."""
    return digest_of([content_hash, part])


def store_splits(dataset: StoredDataset, recipes: Iterable[Recipe], store: ArtifactStore) -> list[str]:
    """Chooses the labelled and unlabelled images of every recipe, once, where the lists can be read.

    Returns:
        A sentence for each choice whose labelled images hold no object, though the training images do.

    Raises:
        ValueError: a fraction or list leaves too few images for a recipe's workers, or does not fit the dataset.
    """
    records = store.read_table(dataset.key, f"{LABEL_INDEX}.parquet")
    done: set[str] = set()
    warnings: dict[str, None] = {}
    has_objects = bool(pc.max(pc.list_value_length(records.column("category_ids"))).as_py())
    for recipe in recipes:
        data, workers = recipe.data, recipe.runtime.num_workers
        is_read = needs_unlabelled(recipe)
        parts = [split_part(recipe, dataset.hashes(data), unlabelled=u) for u in (False, True)]
        keys = [split_key(dataset.content_hash, part) for part in parts]
        once = f"{keys[1]} {workers} {is_read}"
        if once in done:
            continue
        done.add(once)
        chosen = split(records, data, recipe.seed, dataset.source_of(data, store), workers)
        if has_objects and not chosen.facts["num_with_objects"]:
            warnings[_no_object(chosen.facts)] = None
        _check_folds(recipe, chosen)
        if is_read and len(chosen.unlabelled) < workers:
            raise ValueError(
                f"data.label_fraction {data.label_fraction} of {dataset.num_images['train']} images leaves "
                f"{len(chosen.unlabelled)} unlabelled images{_without_copies(chosen.facts)}: expected at least 1 per "
                f"worker ({workers}), or data.unlabelled_pool=both"
            )
        for key, unlabelled in zip(keys, (chosen.unlabelled[:0], chosen.unlabelled)):
            rows = {"labelled": chosen.labelled.tolist(), "unlabelled": unlabelled.tolist()}
            facts = dict(chosen.facts)
            if not len(unlabelled):
                facts |= {"num_unlabelled": 0, "num_extra": 0}
                facts.pop("num_copies", None)
            store.write_json(f"splits/{key}.json", {"facts": facts} | rows)
    return list(warnings)


def _check_folds(recipe: Recipe, chosen: LabelSplit) -> None:
    """Raises ValueError where D_l cannot be cut into the folds that a recipe asks for."""
    num_folds, num_labelled = num_folds_of(recipe), len(chosen.labelled)
    if num_folds <= 1:
        return
    workers = recipe.runtime.num_workers
    if num_labelled < num_folds or num_labelled - math.ceil(num_labelled / num_folds) < workers:
        raise ValueError(
            f"pseudo.precision_folds is {num_folds}, and D_l has {num_labelled} images: expected an image for each "
            f"fold, and outside of it at least 1 for each worker ({workers}). Take a larger data.label_fraction or "
            "fewer folds"
        )


def _without_copies(facts: dict[str, Any]) -> str:
    number = facts.get("num_copies")
    return f" ({number:,} more are copies of labelled or validation images, which D_u never holds)" if number else ""


def _no_object(facts: dict[str, Any]) -> str:
    chosen = facts["label_list"] if "label_list" in facts else f"data.label_fraction={facts['fraction']:g}"
    return (
        f"No object in the {facts['num_labelled']:,} labelled images ({chosen}, seed {facts['seed']}): "
        "nothing can be learnt from them. Choose more images, another data.split_seed, or data.label_family=per-class, "
        "which takes images with objects first."
    )


def stored_split(store: ArtifactStore, content_hash: str, part: dict[str, Any]) -> LabelSplit:
    """Returns the images of a stage, as `store_splits` chose them; rows past the training images are the extra pool's.

    Folds of D_l follow from the choice of the row (`folds.fold_of`) and are not stored.

    Raises:
        ValueError: the choice is not in the store; names its file.
    """
    of_row = {name: value for name, value in part.items() if name != "fold"}
    chosen = _read_split(store.storage, split_key(content_hash, of_row))
    return fold_of(chosen, part["fold"]) if "fold" in part else chosen


@lru_cache(maxsize=8)
def _read_split(storage: str, key: str) -> LabelSplit:
    """Kept because all rows of a table ask for the same few, whose files name every image of the dataset. Equal keys
    are equal choices, so that what is kept is never out of date."""
    store, path = ArtifactStore(storage), f"splits/{key}.json"
    content = store.find_bytes(path)
    if content is None:
        raise ValueError(
            f"{store.uri(path)}: this choice of labelled and unlabelled images is not in the store; planning its row "
            "again writes it"
        )
    chosen = json.loads(content)
    labelled, unlabelled = (np.array(chosen[name], dtype=np.int64) for name in ("labelled", "unlabelled"))
    for rows in (labelled, unlabelled):
        rows.setflags(write=False)
    return LabelSplit(labelled, unlabelled, chosen["facts"])
