"""Detections matched to ground truth, as small arrays: all that average precision is computed from.

A worker matches each batch as it arrives and keeps about 20 bytes a detection; masks never leave it. The arrays of all
workers are joined at the end, stored with the evaluation, and give the AP of any sample of its images in milliseconds.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import numpy as np

from cast_ray.evaluation import precision

Metric = Literal["coco", "cityscapes"]

_COLUMNS = ("image", "label", "score", "matched", "ignored", "num_truth")
NUM_THRESHOLDS = 10
"""IoU thresholds .50, .55, .. .95: bits 0..9 of the masks below."""


@dataclass(frozen=True, eq=False)
class DetectionMatches:
    """N detections on I images of C classes, for A ranges of object size (the first: all sizes).

    Rows are sorted by label and falling score; of equal scores the earlier image comes first, in it the earlier row.

    Args:
        metric: whose rules matched them, and make AP of them.
        image: int32 [N], row number of the image.
        label: int16 [N], 0..C-1.
        score: float64 [N].
        matched: uint16 [N, A], bit t: took an object at IoU threshold t.
        ignored: uint16 [N, A], bit t: counts neither as right nor as wrong there.
        num_truth: uint16 [I, C, A], objects to find.
    """

    metric: Metric
    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    matched: np.ndarray
    ignored: np.ndarray
    num_truth: np.ndarray

    @property
    def num_images(self) -> int:
        return len(self.num_truth)

    @property
    def is_consistent(self) -> bool:
        """Whether the shapes of the arrays fit each other."""
        columns = (self.image, self.label, self.score)
        if self.num_truth.ndim != 3 or any(column.shape != (len(self.score),) for column in columns):
            return False
        return self.matched.shape == self.ignored.shape == (len(self.score), self.num_truth.shape[2])

    @property
    def num_classes(self) -> int:
        return self.num_truth.shape[1]

    def mask_ap(self, image_counts: np.ndarray | None = None) -> float:
        """Average precision over IoU thresholds and classes, in percent; nan where there is nothing to find.

        Args:
            image_counts: int [I], how often each image is drawn, as in a bootstrap sample; None: once each. The result
                is exactly that of a dataset in which each image is followed by its copies.
        """
        if image_counts is None:
            image_counts = np.ones(self.num_images, dtype=np.int64)
        image_counts = np.asarray(image_counts)
        if image_counts.shape != (self.num_images,) or image_counts.dtype.kind not in "iu" or (image_counts < 0).any():
            raise ValueError(
                f"image_counts is {image_counts.dtype} {list(image_counts.shape)}: expected counts from 0 up of "
                f"{self.num_images} images"
            )
        of_class = self.ranking(0)
        if self.metric == "cityscapes":
            ap_CT = precision.cityscapes_ap(of_class, image_counts)
            return float(np.nanmean(ap_CT) * 100) if np.isfinite(ap_CT).any() else math.nan
        precision_TRC, _ = precision.coco_precision(of_class, image_counts)
        known = precision_TRC[precision_TRC > -1]
        return float(known.mean() * 100) if known.size else math.nan

    def ranking(self, area: int) -> precision.Ranking:
        """The rows of each class in one size range, prepared for counting."""
        if area not in self._rankings:
            self._rankings[area] = precision.Ranking(
                self.image,
                self.label,
                self.score,
                self.matched[:, area],
                self.ignored[:, area],
                self.num_truth[..., area],
            )
        return self._rankings[area]

    @cached_property
    def _rankings(self) -> dict[int, precision.Ranking]:
        return {}

    def save(self, target: str | Path | BinaryIO) -> None:
        """Writes a compressed .npz file."""
        single = self.score.astype(np.float32)
        # Half the size where nothing is lost: scores of evaluations are single precision.
        score = single if np.array_equal(single, self.score) else self.score
        columns = {name: getattr(self, name) for name in _COLUMNS if name != "score"}
        np.savez_compressed(target, metric=np.array(self.metric), score=score, **columns)

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes."""
        buffer = io.BytesIO()
        self.save(buffer)
        return buffer.getvalue()


def load_matches(source: str | Path | bytes | BinaryIO) -> DetectionMatches:
    """Reads what `DetectionMatches.save` wrote.

    Raises:
        ValueError: the file is no such file; one line that says what was expected and what was found.
    """
    expected = f"{_name(source)}: expected a file of matches, as runs/<name>/<row>/matches-<role>.npz"
    try:
        content = io.BytesIO(source) if isinstance(source, bytes) else source
        with zipfile.ZipFile(content) as archive:  # before numpy, which takes any other file for a pickle
            missing = [name for name in (*_COLUMNS, "metric") if f"{name}.npy" not in archive.namelist()]
        if missing:
            raise ValueError(f"{expected}, found an archive without {', '.join(missing)}")
        if not isinstance(content, str | Path):
            content.seek(0)
        with np.load(content, allow_pickle=False) as arrays:
            columns = {name: arrays[name] for name in _COLUMNS}
            metric = str(arrays["metric"])
    except zipfile.BadZipFile:
        raise ValueError(f"{expected}, found another kind of file, or a part of one") from None
    except FileNotFoundError:
        raise ValueError(f"{expected}, found no file") from None
    except OSError as error:
        raise ValueError(f"{expected}, found what cannot be read: {error.strerror or error}") from None
    except (EOFError, zlib.error):
        raise ValueError(f"{expected}, found one that is damaged") from None
    except ValueError as error:
        raise (error if str(error).startswith(expected) else ValueError(f"{expected}, found other arrays")) from None
    matches = DetectionMatches(metric, **columns | {"score": columns["score"].astype(np.float64)})  # type: ignore[arg-type]
    if metric not in get_args(Metric) or not matches.is_consistent:
        raise ValueError(f"{expected}, found arrays that do not belong together")
    return matches


def join(
    parts: Sequence[DetectionMatches],
    images: Sequence[np.ndarray],
    tie_order: np.ndarray | None = None,
    num_images: int = 0,
) -> DetectionMatches:
    """The matches of disjoint sets of images as one.

    Args:
        parts: one or more sets of matches, all by the same metric and of the same classes.
        images: for each part, int [its number of images], the row numbers of its images in the whole.
        tie_order: int [I], place of each image where scores are equal; None: the row number.
        num_images: I; 0: as many as the parts hold.
    """
    num_images = num_images or sum(len(rows) for rows in images)
    image = np.concatenate([rows[part.image] for part, rows in zip(parts, images)]).astype(np.int32)
    label, score = (np.concatenate([getattr(p, name) for p in parts]) for name in ("label", "score"))
    place = image if tie_order is None else tie_order[image]
    order = np.lexsort((place, -score, label))  # stable: detections of one image stay as they came
    num_truth = np.zeros((num_images, *parts[0].num_truth.shape[1:]), dtype=np.uint16)
    for part, rows in zip(parts, images):
        num_truth[rows] = part.num_truth
    return DetectionMatches(
        parts[0].metric,
        image[order],
        label[order],
        score[order],
        np.concatenate([p.matched for p in parts])[order],
        np.concatenate([p.ignored for p in parts])[order],
        num_truth,
    )


def _name(source: str | Path | bytes | BinaryIO) -> str:
    return str(source) if isinstance(source, str | Path) else "matches"
