"""From image files to the instances in them: a model with its settings, in whichever process calls it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cast_ray.common.outages import is_outage
from cast_ray.contracts.instance import Instance, Instances
from cast_ray.contracts.records import Category
from cast_ray.data.reading.images import ImageError, read_image
from cast_ray.data.views import fit_image
from cast_ray.engine.world import pick_device
from cast_ray.evaluation.coco_results import coco_result
from cast_ray.inference.result_files import DRAWN_BY
from cast_ray.models.autocast import require_precision
from cast_ray.models.drawing import draw_instances
from cast_ray.models.postprocess import predict_in_groups
from cast_ray.models.student import Student
from cast_ray.recipe import InputSize, Precision

NUM_THREADS = 4
"""Threads that read and draw the images of a batch beside the model."""


class InstanceModel(Protocol):
    """What finds instances in images: a student or a teacher."""

    categories: tuple[Category, ...]
    input_size: InputSize
    precision: Precision

    @property
    def class_names(self) -> list[str]: ...

    @property
    def colours(self) -> list[tuple[int, int, int]]: ...

    @property
    def device(self) -> torch.device: ...

    def predict(
        self,
        images: torch.Tensor,
        image_hw: Sequence[tuple[int, int]],
        resized_hw: Sequence[tuple[int, int]],
        max_detections: int,
        min_score: float,
    ) -> list[Instances]: ...


class Chosen(NamedTuple):
    """The instances of an image that are kept, and the mean score of those among which they were chosen (0: none)."""

    instances: Sequence[Instance]
    mean_score: float


NOTHING = Chosen([], 0.0)


class Predictor:
    """A model with its settings: image files in, rows out.

    Args:
        model: on its device.
        threshold: least score of an instance.
        max_detections: at most so many per image.
        amp: precision; auto: the model's own, which for a student of a run is that of its table.
        overlays: whether rows carry the drawn image.
    """

    def __init__(
        self, model: InstanceModel, *, threshold: float, max_detections: int, amp: str = "auto", overlays: bool = True
    ):
        self.model, self.threshold, self.max_detections = model, threshold, max_detections
        self.overlays = overlays
        if amp != "auto":
            model.precision = cast(Precision, amp)
        require_precision(model.precision, model.device, "--amp")
        self.threads = ThreadPoolExecutor(NUM_THREADS)

    def __call__(self, paths: Sequence[str]) -> list[dict[str, Any]]:
        """Finds the instances of several images: one row per path, in order.

        Returns:
            path; height, width (pixels, 0 of a bad image); error ("" or why the image was skipped); results (JSON of
            COCO results without an image_id); overlay (PNG bytes, b"" without); mean_score (see `Chosen`).
        """
        read = list(self.threads.map(read_or_reason, paths))
        good = [image for image in read if isinstance(image, np.ndarray)]
        found = iter(self._predict(good) if good else [])
        work = [
            (path, image, next(found) if isinstance(image, np.ndarray) else NOTHING) for path, image in zip(paths, read)
        ]
        return list(self.threads.map(self._row, work))

    def _predict(self, images: list[np.ndarray]) -> list[Chosen]:
        fitted = [fit_image(image, self.model.input_size) for image in images]
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        inside = [size for _, size in fitted]
        found = predict_in_groups(
            self.ask,
            [pixels for pixels, _ in fitted],
            sizes,
            inside,
            self.max_detections,
            min_score=self.threshold,
        )
        return [self.choose(instances) for instances in found]

    def ask(
        self,
        images: torch.Tensor,
        image_hw: Sequence[tuple[int, int]],
        resized_hw: Sequence[tuple[int, int]],
        max_detections: int,
        min_score: float,
    ) -> list[Instances]:
        """Returns the model's instances, as `Teacher.predict` does."""
        return self.model.predict(images, image_hw, resized_hw, max_detections, min_score)

    def choose(self, instances: Instances) -> Chosen:
        """Returns the instances of an image that are kept."""
        kept = [i for i in instances if i["score"] >= self.threshold]
        return Chosen(kept, mean_score(kept))

    def _row(self, work: tuple[str, np.ndarray | str, Chosen]) -> dict[str, Any]:
        path, image, (instances, score) = work
        row = {"path": path, "height": 0, "width": 0, "error": "", "results": "[]", "overlay": b"", "mean_score": score}
        if isinstance(image, str):
            return row | {"error": image}
        overlay = b""
        if self.overlays:
            buffer = io.BytesIO()
            names, colours = self.model.class_names, self.model.colours
            drawn = draw_instances(Image.fromarray(image), instances, names, colours)
            drawn_by = PngInfo()
            drawn_by.add_text(*DRAWN_BY)
            drawn.save(buffer, "PNG", compress_level=1, pnginfo=drawn_by)
            overlay = buffer.getvalue()
        results = json.dumps([coco_result(i, self.model.categories) for i in instances])
        height, width = image.shape[:2]
        return row | {"height": height, "width": width, "results": results, "overlay": overlay}


def mean_score(instances: Sequence[Instance]) -> float:
    """Returns the mean score of an image's instances, 0 without any."""
    return float(np.mean([i["score"] for i in instances])) if instances else 0.0


def in_batches(predictor: Predictor, paths: Sequence[str], batch: int) -> Iterator[dict[str, Any]]:
    """Gives the rows of all images in order, `batch` of them at a time through the model."""
    for start in range(0, len(paths), batch):
        yield from predictor(paths[start : start + batch])


def read_or_reason(path: str) -> np.ndarray | str:
    """Returns the pixels of an image, or why it has none, without the path."""
    try:
        return read_image(path)
    except ImageError as error:
        return error.reason
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and is_outage(error):  # not the image's fault, and the next one's fate too
            raise
        return str(error)


def make_predictor(config: bytes, weights: bytes, device: str, **settings: Any) -> Predictor:
    """Makes a predictor from the contents of a student's files; Ray's workers call it."""
    torch.set_num_threads(1)
    student = Student.from_files(config, weights, source="student").to(pick_device(device))
    return Predictor(student, **settings)
