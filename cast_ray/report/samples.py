"""The worst and best validation images of a run's rows, as its folder keeps them (`publish/samples.py` draws them)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cast_ray.report.blocks import Sample, Samples

SAMPLES = "samples.json"
NUM_EACH = 3
"""Worst images, and as many best ones."""
MAX_PAGE_BYTES = 2_500_000
"""Most bytes that the pictures of one page take."""


def read_samples(folders: Mapping[str, tuple[int, Path]]) -> Samples | None:
    """The worst and best images of a page's rows, as many as fit on it: the first of each row, then the second, ...

    Args:
        folders: row -> seed and folder of the result whose images are shown.
    """
    per_row: dict[str, list[Sample]] = {}
    legend: dict[str, str] = {}
    unreadable = []
    for row, (seed, folder) in folders.items():
        if (folder / SAMPLES).is_file():
            try:
                content = json.loads((folder / SAMPLES).read_text())
                per_row[row] = [
                    Sample(row, seed, s["kind"], s["image_id"], s["score"], tuple((n, uri) for n, uri in s["panels"]))
                    for s in content["samples"]
                ]
                legend |= dict(content["legend"])
            except (OSError, ValueError, KeyError, TypeError):
                unreadable.append(row)
    left, chosen = MAX_PAGE_BYTES, set()
    for place in range(2 * NUM_EACH):
        # worst, best, second worst, ...: a page of many rows still shows both ends of each
        for row, samples in per_row.items():
            worst, best = ([s for s in samples if s.kind == kind] for kind in ("worst", "best"))
            candidates = (worst, best)[place % 2][place // 2 : place // 2 + 1]
            for sample in candidates:
                left -= sum(len(uri) for _, uri in sample.panels)
                if left > 0:
                    chosen.add((row, sample.kind, sample.image_id))
    shown = tuple(s for samples in per_row.values() for s in samples if (s.row, s.kind, s.image_id) in chosen)
    if not shown:
        return None
    total = sum(map(len, per_row.values()))
    caption = "Worst and best validation images of each row by its student's panoptic quality (PQ, percent)"
    if len(shown) < total:
        caption += f"; {total - len(shown)} of {total} left out to keep the page small"
    if unreadable:
        caption += f"; {SAMPLES} cannot be read of {', '.join(unreadable)}"
    return Samples(caption, shown, tuple(legend.items()))
