"""Image files whose pixels say which image they are, their records, and the loop that a stream must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from cast_ray.contracts.records import RECORD_SCHEMA, Batch, Category, ClassMap, encode_image_id
from cast_ray.data.batches import collate, join, to_batch
from cast_ray.data.formats.segmentations import encode_mask
from cast_ray.data.reading.images import read_image
from cast_ray.data.sampling import view_seed, worker_slots
from cast_ray.data.views import make_sample
from cast_ray.recipe import DataConfig

CATEGORIES = (Category(2, "disc"), Category(7, "square"))
SIZE = (24, 32)
DATA = DataConfig(image_px=SIZE)
STILL = DataConfig(image_px=SIZE, scale_jitter=(1.0, 1.0), flip=False, color_jitter=0)


def write_images(folder: Path, count: int) -> pa.Table:
    """Image i is grey of level i, with one instance of its own size."""
    rows = []
    for i in range(count):
        path = folder / f"image {i}.png"
        Image.fromarray(np.full((*SIZE, 3), i, dtype=np.uint8)).save(path)
        mask = np.zeros(SIZE, dtype=bool)
        mask[2 : 6 + i % 9, 3:20] = True
        instance = {"category_id": (2, 7)[i % 2], "rle": encode_mask(mask), "score": 1.0, "is_crowd": False}
        rows.append([encode_image_id(i), str(path), *SIZE, [instance]])
    return pa.Table.from_pylist([dict(zip(RECORD_SCHEMA.names, row)) for row in rows], schema=RECORD_SCHEMA)


def loop(
    table: pa.Table,
    labelled: np.ndarray,
    unlabelled: np.ndarray,
    labels: list[list[dict[str, Any]]] | None,
    data: DataConfig,
    *,
    batch_labelled: int,
    batch_unlabelled: int,
    steps: int,
    seed: int,
) -> list[Batch]:
    """Every step of one worker, read and made one after the other."""
    records = table.to_pylist()
    sides = ((labelled, batch_labelled, 0), (unlabelled, batch_unlabelled, batch_labelled))
    plan = [worker_slots(len(indices), size, 0, steps, seed, 0, 1) for indices, size, _ in sides]
    batches = []
    for step in range(steps):
        samples = []
        for (indices, _, first_slot), slots in zip(sides, plan):
            known = first_slot == 0
            for i, position in enumerate(slots[step]):
                row = dict(records[indices[position]])
                if not known:
                    row |= {"truth_instances": row["instances"], "instances": labels[position] if labels else []}
                samples.append(
                    make_sample(
                        read_image(row["uri"]),
                        row,
                        ClassMap(CATEGORIES),
                        data,
                        view_seed(seed, step, first_slot + i),
                        use_instances=known or labels is not None,
                        truth=known,
                    )
                )
        batches.append(to_batch(join(collate(samples, batch_labelled))))
    return batches


def assert_same(found: Batch, wanted: Batch, images: slice | list[int] = slice(None)) -> None:
    """Equal bit for bit; `images`: of `wanted`, where `found` is one worker's share of it."""
    for name in ("weak", "strong", "valid", "truth_instance", "truth_class"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)[images]), name
    targets = wanted.targets[images] if isinstance(images, slice) else [wanted.targets[i] for i in images]
    assert len(found.targets) == len(targets)
    for mine, theirs in zip(found.targets, targets):
        for name in ("masks", "labels", "weights"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        assert mine.ignore is None and theirs.ignore is None
