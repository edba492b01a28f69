"""Detections and ground truth of one image, as the matchers read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pycocotools import mask as coco_mask

from cast_ray.contracts.instance import Instance, Rle, rle_of
from cast_ray.contracts.records import Category, ClassMap, decode_image_id, mask_areas, object_areas

VOID_LABEL = -1
"""Label of an ignore region that belongs to no class."""


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found on one image: labels int64 [D], scores float64 [D], D RLEs ({"size", "counts"})."""

    labels: np.ndarray
    scores: np.ndarray
    rles: list[Rle]

    @classmethod
    def of(cls, instances: Sequence[Instance]) -> Detections:
        """Reads instances as a teacher or `to_instances` gives them."""
        return cls(
            np.array([i["label"] for i in instances], dtype=np.int64),
            np.array([i["score"] for i in instances], dtype=np.float64),
            [rle_of(i) for i in instances],
        )


def single_precision(instances: Sequence[Instance]) -> list[Instance]:
    """Rounds the scores of instances to single precision.

    A score is single precision wherever it goes, so that the results file and what is stored of the matches rank alike.
    """
    return [{**i, "score": float(np.float32(i["score"]))} for i in instances]


@dataclass(frozen=True, eq=False)
class Truth:
    """The ground truth of one image: labels int64 [G], crowd bool [G], G RLEs.

    mask_areas: float64 [G], pixels of the masks; areas: float64 [G], those by which objects are small, medium or large
    (see `object_areas`).
    """

    labels: np.ndarray
    crowd: np.ndarray
    mask_areas: np.ndarray
    areas: np.ndarray
    rles: list[Rle]

    @classmethod
    def of(cls, row: dict[str, Any], classes: ClassMap) -> Truth:
        """Reads the instances and ignore regions of a record; instances of other classes are left out."""
        labels, crowd, annotated = [], [], []
        rles: list[Rle] = []
        for instance in row["instances"]:
            try:
                label = classes.label(instance["category_id"])
            except KeyError:
                if not instance["is_crowd"]:
                    continue
                label = VOID_LABEL
            labels.append(label)
            crowd.append(instance["is_crowd"])
            annotated.append(instance.get("area"))  # records of older versions have none
            rles.append({"size": [row["height"], row["width"]], "counts": instance["rle"]})
        masks = mask_areas(rles)
        return cls(
            np.array(labels, dtype=np.int64), np.array(crowd, dtype=bool), masks, object_areas(annotated, masks), rles
        )


def overlaps(detections: Detections, truth: Truth) -> np.ndarray:
    """IoU of all pairs, with a crowd the share of the detection inside it: float64 [D, G]."""
    if not detections.rles or not truth.rles:
        return np.zeros((len(detections.rles), len(truth.rles)))
    return coco_mask.iou(detections.rles, truth.rles, truth.crowd.astype(np.uint8))


class Overlapping(NamedTuple):
    """Masks of several images: image and label int64 [N], images rising, and N RLEs."""

    image: np.ndarray
    label: np.ndarray
    rles: list[Rle]


def overlaps_of_pairs(
    found: Overlapping, objects: Overlapping, crowd_G: np.ndarray, d: np.ndarray, g: np.ndarray
) -> np.ndarray:
    """IoU, as in `overlaps`, of pairs of a detection and an object of the same image and class: float64 [P].

    Both are compared image by image. pycocotools compares all masks of a call with each other, except those of canvases
    of different sizes: each class gets a canvas of its own, wider on the right by its label, with the same pixels.

    Args:
        crowd_G: bool [G].
        d, g: int64 [P], rows of `found`, rising, and of `objects`.
    """
    iou = np.zeros(len(d))
    chosen_D, place_D = np.unique(d, return_inverse=True)
    chosen_G, place_G = np.unique(g, return_inverse=True)
    images = np.unique(found.image[d])
    canvases = [
        _canvases([masks.rles[i] for i in chosen.tolist()], masks.label[chosen].tolist())
        for masks, chosen in ((found, chosen_D), (objects, chosen_G))
    ]
    starts, stops = (
        [
            np.searchsorted(column, images, side).tolist()
            for column in (found.image[d], found.image[chosen_D], objects.image[chosen_G])
        ]
        for side in ("left", "right")
    )
    crowd = crowd_G[chosen_G].astype(np.uint8)
    for (p, a, c), (q, b, e) in zip(zip(*starts), zip(*stops)):
        compared = coco_mask.iou(canvases[0][a:b], canvases[1][c:e], crowd[c:e])
        iou[p:q] = compared[place_D[p:q] - a, place_G[p:q] - c]
    return iou


def _canvases(rles: list[Rle], labels: list[int]) -> list[Rle]:
    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    canvases: list[Rle] = []
    for rle, label in zip(rles, labels):
        height, width = rle["size"]
        size = (height, width + label)
        canvases.append({"size": sizes.setdefault(size, size), "counts": rle["counts"]})
    return canvases


def intersections(detections: Detections, detection_areas: np.ndarray, rles: list[Rle]) -> np.ndarray:
    """Common pixels of all pairs: float64 [D, G], whole numbers."""
    if not detections.rles or not rles:
        return np.zeros((len(detections.rles), len(rles)))
    shares = coco_mask.iou(detections.rles, rles, np.ones(len(rles), dtype=np.uint8))
    return np.rint(shares * detection_areas[:, None])


class ResultsByImage(Sequence[Detections]):
    """COCO results grouped by image; the detections of an image are made when they are asked for.

    Args:
        ground_truth: RECORD_SCHEMA; an image for each of its rows.
        results: COCO results, as dicts or as `read_results` reads them.
        categories: the dataset's classes.

    Raises:
        ValueError: a score that is not finite, an image or category id that the ground truth does not have, or a mask
            whose size is not its image's.
    """

    def __init__(
        self, ground_truth: pa.Table, results: Sequence[dict[str, Any]] | pa.Table, categories: Sequence[Category]
    ):
        number = {decode_image_id(i): row for row, i in enumerate(ground_truth.column("image_id").to_pylist())}
        label_of = {c.id: label for label, c in enumerate(categories)}
        # Equal sizes are one tuple: what holds nothing but texts and such tuples is no work for the garbage collector.
        known: dict[tuple[int, int], tuple[int, int]] = {}
        sides = (ground_truth.column(name).to_pylist() for name in ("height", "width"))
        self._sizes = [known.setdefault(size, size) for size in zip(*sides)]
        columns = _columns_of(results)
        rows = np.fromiter((number.get(i, -1) for i in columns.image_ids), np.int64)
        self._labels = np.fromiter((label_of.get(i, -1) for i in columns.category_ids), np.int64)
        self._scores = columns.scores
        sizes = np.array([*self._sizes, (-1, -1)])
        bad = ~np.isfinite(self._scores) | (rows < 0) | (self._labels < 0) | (sizes[rows] != columns.sizes).any(1)
        if bad.any():
            self._refuse(int(bad.argmax()), columns, rows, sorted(label_of))
        self._counts = columns.counts
        self._order = np.argsort(rows, kind="stable")
        self._bounds = np.searchsorted(rows[self._order], np.arange(len(self._sizes) + 1)).tolist()

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, row: int) -> Detections: ...
    @overload
    def __getitem__(self, row: slice) -> list[Detections]: ...
    def __getitem__(self, row: int | slice) -> Detections | list[Detections]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        chosen = self._order[self._bounds[row] : self._bounds[row + 1]]
        size = self._sizes[row]
        rles: list[Rle] = [{"size": size, "counts": counts} for counts in self._counts.take(chosen)]
        return Detections(self._labels[chosen], self._scores[chosen], rles)

    def _refuse(self, i: int, columns: _Columns, rows: np.ndarray, known: list[int]) -> None:
        image_id, score, size = columns.image_ids[i], float(self._scores[i]), columns.sizes[i].tolist()
        if not math.isfinite(score):
            raise ValueError(f"results[{i}].score is {score} (image {image_id!r}): expected a finite number")
        if rows[i] < 0:
            raise ValueError(f"results[{i}].image_id is {image_id!r}: not an image of the ground truth")
        if self._labels[i] < 0:
            raise ValueError(f"results[{i}].category_id is {columns.category_ids[i]!r}: expected one of {known[:12]}")
        raise ValueError(
            f"results[{i}].segmentation.size is {size} (image {image_id!r}): expected {list(self._sizes[rows[i]])}"
        )


class _Columns(NamedTuple):
    """N results: image ids, category ids, scores float64 [N], sizes int64 [N, 2] (-1 for what is no size), counts."""

    image_ids: list[int | str]
    category_ids: list[int]
    scores: np.ndarray
    sizes: np.ndarray
    counts: _Counts | _Listed


class _Counts:
    """The counts of N results, cut out of the column that holds them when they are asked for."""

    def __init__(self, column: pa.ChunkedArray):
        self._texts: list[memoryview] = []
        bounds = [np.zeros((0, 2), dtype=np.int64)]
        for chunk in column.cast(pa.large_binary()).chunks:
            _, offsets, data = chunk.buffers()
            ends = np.frombuffer(offsets, np.int64, len(chunk) + 1, 8 * chunk.offset)
            self._texts.append(memoryview(data or b""))
            bounds.append(np.stack([ends[:-1], ends[1:]], axis=1))
        self._bounds = np.concatenate(bounds)
        self._chunk = np.repeat(np.arange(len(self._texts)), [len(b) for b in bounds[1:]])

    def take(self, rows: np.ndarray) -> list[bytes]:
        chosen = zip(self._chunk[rows].tolist(), *self._bounds[rows].T.tolist())
        return [self._texts[chunk][start:stop].tobytes() for chunk, start, stop in chosen]


class _Listed:
    """The same of results that are dicts; their counts may be text, which pycocotools takes as well."""

    def __init__(self, counts: list[bytes]):
        self._counts = counts

    def take(self, rows: np.ndarray) -> list[bytes]:
        return [self._counts[i] for i in rows.tolist()]


def _columns_of(results: Sequence[dict[str, Any]] | pa.Table) -> _Columns:
    if isinstance(results, pa.Table):
        sizes, counts = (pc.struct_field(results.column("segmentation"), name) for name in ("size", "counts"))
        ids = results.column("image_id")
        whole = pc.all(pc.equal(pc.list_value_length(sizes), 2), min_count=0).as_py() and not sizes.null_count
        return _Columns(
            ids.to_numpy().tolist() if pa.types.is_integer(ids.type) else ids.to_pylist(),
            results.column("category_id").to_numpy().tolist(),
            results.column("score").to_numpy(),
            pc.list_flatten(sizes).to_numpy().reshape(-1, 2) if whole else _sizes_of(sizes.to_pylist()),
            _Counts(counts),
        )
    segmentations = [result["segmentation"] for result in results]
    return _Columns(
        [result["image_id"] for result in results],
        [result["category_id"] for result in results],
        np.array([result["score"] for result in results], dtype=np.float64),
        _sizes_of([segmentation["size"] for segmentation in segmentations]),
        _Listed([segmentation["counts"] for segmentation in segmentations]),
    )


def _sizes_of(sizes: Sequence[Any]) -> np.ndarray:
    pairs = [size if size is not None and len(size) == 2 else (-1, -1) for size in sizes]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def tie_order(image_ids: Sequence[str]) -> np.ndarray:
    """Place of each image where scores are equal: int64 [I]. pycocotools takes images in the order of their ids."""
    ids = [decode_image_id(i) for i in image_ids]
    order = sorted(range(len(ids)), key=lambda i: (isinstance(ids[i], str), ids[i]))
    place = np.empty(len(ids), dtype=np.int64)
    place[order] = np.arange(len(ids))
    return place
