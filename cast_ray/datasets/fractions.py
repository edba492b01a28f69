"""Which images keep their labels: nested label fractions."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pyarrow as pa


def split(
    records: pa.Table, fraction: float, seed: int, num_unlabelled: int | None, min_labelled: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Divides the training images into labelled and unlabelled ones.

    Images are ordered by sha256(seed, image_id). The first round(fraction * N) are labelled, so every smaller fraction
    is inside every larger one, and an added image moves the border by at most one place. Unlabelled images are taken
    from the end of the same order, so with a `num_unlabelled` that fits, all fractions share one D_u.

    Args:
        records: training images, RECORD_SCHEMA.
        fraction: |D_l| / (|D_l| + |D_u|), in (0, 1].
        seed: another seed, another order.
        num_unlabelled: at most this many unlabelled images; None: all of the rest.
        min_labelled: how many labelled images the run needs: one for each worker.

    Returns:
        Row indices int64 [|D_l|] and int64 [|D_u|], disjoint, each in the order of the hash.

    Raises:
        ValueError: the fraction lies outside (0, 1] or gives fewer than `min_labelled` labelled images.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"label fraction is {fraction}: expected above 0 and at most 1")
    num_images = records.num_rows
    num_labelled = math.floor(fraction * num_images + 0.5)
    if num_labelled < min_labelled:
        raise ValueError(
            f"label fraction {fraction} of {num_images} images gives {num_labelled} labelled images: "
            f"expected at least 1 per worker ({min_labelled})"
        )
    keys = [hashlib.sha256(f"{seed}\n{i}".encode()).digest() for i in records.column("image_id").to_pylist()]
    order = np.array(sorted(range(num_images), key=keys.__getitem__), dtype=np.int64)
    labelled, rest = order[:num_labelled], order[num_labelled:]
    if num_unlabelled is not None:
        rest = rest[max(0, len(rest) - num_unlabelled) :]
    return labelled, rest
