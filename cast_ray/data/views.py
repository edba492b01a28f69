"""From one image and its record to a weak and a strong view of equal geometry.

Everything a sample needs at random comes from its own seed: the same seed gives the same sample in any process, and no
global generator is touched. Images stay 8-bit [h, w, 3] from the decoder to the end: OpenCV's 8-bit colour and blur
kernels take a tenth of the time of torchvision's on floats (`benchmarks/streams.py`). Masks are cut out of their run
lengths: one that lies outside the crop costs nothing, and none is ever drawn at the image's size.

The functions leave thread counts alone: call `use_one_thread` in a process that makes samples, since images of this
size are not worth a second thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
import torchvision.transforms.v2.functional as functional

from cast_ray.contracts.records import ClassMap, rle_runs
from cast_ray.contracts.soft_targets import grid_hw, sample_probabilities
from cast_ray.recipe import DataConfig, InputSize

MIN_VISIBLE_PX = 4
"""Instances with fewer pixels left in the crop are dropped (their pixels are unknown, not background)."""

STRONG_JITTER = (0.4, 0.4, 0.4, 0.1)
STRONG_GRAYSCALE = 0.2
STRONG_BLUR_PX = 5
STRONG_BLUR_SIGMA = (0.1, 2.0)

SSD_BRIGHTNESS = 32
"""Levels of 255 that are added or taken away."""
SSD_FACTOR = (0.5, 1.5)
"""Range of the factors of contrast and of saturation."""
SSD_HUE = 18
"""Steps of 2 degrees, OpenCV's."""
SSD_PROBABILITY = 0.5
"""Probability of each of the four changes."""

GREY_OF_RGB = np.array([0.299, 0.587, 0.114])


def use_one_thread() -> None:
    """Keeps this process's image kernels on one core each: processes are what runs in parallel."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


@dataclass(frozen=True)
class _Geometry:
    """A window of the source image, the place of the canvas it is resized to, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    out_top: int
    out_left: int
    out_height: int
    out_width: int
    mirrored: bool
    canvas: tuple[int, int]

    def source(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def place(self) -> tuple[slice, slice]:
        return (
            slice(self.out_top, self.out_top + self.out_height),
            slice(self.out_left, self.out_left + self.out_width),
        )


def window_of(row: dict[str, Any], data: DataConfig, seed: int) -> tuple[int, int, int, int]:
    """The part of an image that `make_sample` looks at with the same arguments: top, left, height, width in pixels."""
    g = _random_geometry(row["height"], row["width"], data, np.random.default_rng(seed))
    return g.top, g.left, g.height, g.width


def make_sample(
    image_HWC: np.ndarray,
    row: dict[str, Any],
    class_map: ClassMap,
    data: DataConfig,
    seed: int,
    *,
    use_instances: bool,
    truth: bool,
    strong: bool = True,
) -> dict[str, np.ndarray]:
    """The weak and strong view of one image with its targets at crop size.

    Weak: resize to `data.train_resize` times a random factor of `data.scale_jitter`, random crop or random place on
    padding (or, with `data.whole_images`, the whole image without jitter), mirroring, colours of `data.color`. Strong:
    the weak view with ColorJitter .4/.4/.4/.1 in random order, grayscale with p .2 and Gaussian blur k 5 sigma .1-2.

    Args:
        image_HWC: uint8 [h, w, 3], the whole image or what `window_of` says.
        row: a record (RECORD_SCHEMA as Python values). An optional key `truth_instances` holds the ground truth where
            `instances` are pseudo-labels; without it the truth maps are drawn from `instances`.
        class_map: category ids to labels.
        data: crop size and strength of the weak view, whose height and width are H and W below; with
            `data.whole_images` these are the resized image's own.
        seed: seed of this sample, 0 or more.
        use_instances: whether `instances` become targets.
        truth: whether the truth maps are known; they are -1 everywhere where not.
        strong: False where no loss looks at the strong view: it is then the weak one, at a third of the cost.

    Returns:
        weak, strong: uint8 [3, H, W], 0 on padding; valid: bool [H, W]; masks: bool [N, H, W]; labels: int64 [N];
        of soft pseudo-labels class_probs: float32 [N, C+1] and mask_probs: uint8 [N, H/4, W/4], see `Targets`;
        weights: float32 [N]; ignore: bool [H, W], crowd regions; truth_instance, truth_class: int16 [H, W], numbered as
        `masks` where these are the truth. Smaller instances lie over larger ones in the truth maps; crowds, padding and
        dropped slivers are -1.

    Raises:
        ValueError: the image has neither the size of its record nor that of the window, or an instance has a category
            outside the class map.

    Source: CAST (arXiv 2505.21904), views of the contrastive term.
    Deviations: the paper does not say how strong the weak view's colours change; `data.color` offers the released
    code's, and a weaker jitter that leaves the hue alone. An image smaller than the crop lies at a random place on
    padding of 0, where detectron2 has it above and left on grey. Colours are rounded to 8 bits after each operation,
    as in torchvision's transforms of PIL images.
    """
    height, width = image_HWC.shape[:2]
    rng = np.random.default_rng(seed)
    geometry = _random_geometry(row["height"], row["width"], data, rng)
    if (height, width) == (row["height"], row["width"]):
        image_HWC = image_HWC[geometry.source()]
    elif (height, width) != (geometry.height, geometry.width):
        raise ValueError(
            f"{row['uri']}: {width} x {height} pixels, but its record says {row['width']} x {row['height']}"
        )
    weak_HWC = _show_window(image_HWC, geometry)
    if data.color == "ssd":
        weak_HWC = _ssd_colours(weak_HWC, rng)
    else:
        weak_HWC = _jitter(weak_HWC, (data.color_jitter,) * 3 + (0.0,), rng)

    crop = geometry.canvas
    valid = np.zeros(crop, dtype=bool)
    valid[geometry.place()] = True
    ignore = np.zeros(crop, dtype=bool)
    masks = np.zeros((0, *crop), dtype=bool)
    labels, weights = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    truth_instance, truth_class = np.full((2, *crop), -1, dtype=np.int16)
    soft: dict[str, np.ndarray] = {}
    truth_rows = row.get("truth_instances")
    if use_instances or (truth and truth_rows is None):
        cropped = _Cropped(row["instances"], row, class_map, geometry, crop)
        if use_instances:
            masks, labels, weights, ignore = cropped.masks, cropped.labels, cropped.weights, cropped.crowd
            soft = cropped.soft_targets(geometry)
    if truth:
        if truth_rows is not None:
            cropped = _Cropped(truth_rows, row, class_map, geometry, crop)
        truth_instance, truth_class = cropped.truth_maps(valid, len(class_map))
    weak = _paste(weak_HWC, geometry, crop)
    return {
        "weak": weak,
        "strong": _paste(_strengthen(weak_HWC, rng), geometry, crop) if strong else weak,
        "valid": valid,
        "masks": masks,
        "labels": labels,
        "weights": weights,
        "ignore": ignore,
        "truth_instance": truth_instance,
        "truth_class": truth_class,
        **soft,
    }


def fit_image(image_HWC: np.ndarray, input_size: InputSize | tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """The view for evaluation and labelling: the whole image, resized and, where images are fitted into a size, padded
    at the bottom and right.

    Args:
        image_HWC: uint8 [h, w, 3].
        input_size: size at which the model sees whole images; (H, W) in pixels: fitted into it.

    Returns:
        uint8 [3, H, W], 0 on padding, and the (height, width) the image has inside it: crop masks to it, then resize
        them to (h, w).
    """
    rule, (height, width) = InputSize.of(input_size), image_HWC.shape[:2]
    size, canvas = rule.inside(height, width), rule.padded(height, width)
    fitted = _resize(image_HWC, size).transpose(2, 0, 1)
    if size == canvas:
        return np.ascontiguousarray(fitted), size
    padded = np.zeros((3, *canvas), dtype=np.uint8)
    padded[:, : size[0], : size[1]] = fitted
    return padded, size


def _random_geometry(height: int, width: int, data: DataConfig, rng: np.random.Generator) -> _Geometry:
    """The window is cut before resizing, so that pixels outside the crop are never resized."""
    if data.whole_images:
        out = InputSize(data.train_resize, data.image_px).inside(height, width)
        return _Geometry(0, 0, height, width, 0, 0, *out, bool(rng.random() < 0.5) and data.flip, canvas=out)
    crop_height, crop_width = data.image_px
    scale = _random_scale(height, width, data, rng)
    window = (min(height, max(1, round(crop_height / scale))), min(width, max(1, round(crop_width / scale))))
    out = _scaled(*window, scale, data.image_px)
    corner = rng.random(4)
    return _Geometry(
        top=int(corner[0] * (height - window[0] + 1)),
        left=int(corner[1] * (width - window[1] + 1)),
        height=window[0],
        width=window[1],
        out_top=int(corner[2] * (crop_height - out[0] + 1)),
        out_left=int(corner[3] * (crop_width - out[1] + 1)),
        out_height=out[0],
        out_width=out[1],
        mirrored=bool(rng.random() < 0.5) and data.flip,
        canvas=data.image_px,
    )


def _random_scale(height: int, width: int, data: DataConfig, rng: np.random.Generator) -> float:
    """The factor by which an image is resized before it is cropped: that of `train_resize` times the jitter."""
    if data.scale_steps is None:
        factor = float(rng.uniform(*data.scale_jitter))
    else:
        factor = float(rng.choice(np.linspace(*data.scale_jitter, data.scale_steps)))
    if data.train_resize == "native":
        return factor
    if data.train_resize == "fit":
        return min(data.image_px[0] / height, data.image_px[1] / width) * factor
    short, long = data.train_resize
    return min(short * factor / min(height, width), long / max(height, width))


def _scaled(height: int, width: int, scale: float, limit: tuple[int, int]) -> tuple[int, int]:
    return min(limit[0], max(1, round(height * scale))), min(limit[1], max(1, round(width * scale)))


def _show_window(window_HWC: np.ndarray, g: _Geometry) -> np.ndarray:
    # Whole rows of a copy: of a slice torchvision's kernel makes planes, which cost more to turn back.
    window = _resize(np.ascontiguousarray(window_HWC), (g.out_height, g.out_width))
    return cv2.flip(window, 1) if g.mirrored else window


def _resize(image_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear with antialiasing; torchvision's kernel for interleaved colours takes and gives them without a copy."""
    if image_HWC.shape[:2] == size:
        return image_HWC
    resized = functional.resize(torch.from_numpy(image_HWC).permute(2, 0, 1), list(size), antialias=True)
    return np.ascontiguousarray(resized.permute(1, 2, 0).numpy())


def _jitter(image_HWC: np.ndarray, strength: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """torchvision's ColorJitter with its factors and order from `rng`."""
    changes = np.array(strength) * rng.uniform(-1, 1, 4)
    for operation in rng.permutation(4).tolist():
        if strength[operation] == 0:
            continue
        factor = max(0.0, 1 + float(changes[operation]))
        if operation == 0:
            image_HWC = _scale_levels(image_HWC, factor, 0.0)
        elif operation == 1:
            mean = cv2.mean(cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY))[0]
            image_HWC = _scale_levels(image_HWC, factor, (1 - factor) * mean)
        elif operation == 2:
            image_HWC = cv2.transform(image_HWC, factor * np.eye(3) + (1 - factor) * GREY_OF_RGB)
        else:
            hsv = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2HSV_FULL)
            hsv[..., 0] += np.uint8(round(256 * float(changes[operation])) % 256)  # a full turn is 256, and wraps
            image_HWC = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return image_HWC


def _ssd_colours(image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """SSD's changes of colour: brightness, then contrast either before or after saturation and hue, each with p .5.

    Source: Liu et al. 2016 (SSD), as Mask2Former's recipes and the released code of CAST have them.
    """

    def happens() -> bool:
        return bool(rng.random() < SSD_PROBABILITY)

    def contrast(image: np.ndarray) -> np.ndarray:
        return _scale_levels(image, float(rng.uniform(*SSD_FACTOR)), 0.0) if happens() else image

    if happens():
        image_HWC = _scale_levels(image_HWC, 1.0, float(rng.uniform(-SSD_BRIGHTNESS, SSD_BRIGHTNESS)))
    contrast_first = bool(rng.random() < 0.5)
    if contrast_first:
        image_HWC = contrast(image_HWC)
    saturation = float(rng.uniform(*SSD_FACTOR)) if happens() else None
    hue = int(rng.integers(-SSD_HUE, SSD_HUE + 1)) if happens() else None
    if saturation is not None or hue is not None:
        hsv = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2HSV)
        if saturation is not None:
            hsv[..., 1] = _scale_levels(hsv[..., 1], saturation, 0.0)
        if hue is not None:
            hsv[..., 0] = (hsv[..., 0].astype(np.int16) + hue) % 180
        image_HWC = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image_HWC if contrast_first else contrast(image_HWC)


def _scale_levels(image_HWC: np.ndarray, gain: float, offset: float) -> np.ndarray:
    levels = np.rint(np.arange(256) * gain + offset).clip(0, 255)
    return cv2.LUT(image_HWC, levels.astype(np.uint8))


def _strengthen(weak_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    strong = _jitter(weak_HWC, STRONG_JITTER, rng)
    if rng.random() < STRONG_GRAYSCALE:
        strong = cv2.cvtColor(cv2.cvtColor(strong, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    sigma = rng.uniform(*STRONG_BLUR_SIGMA)
    # mirrored without repeating the border pixel, as torchvision's
    return cv2.GaussianBlur(strong, (STRONG_BLUR_PX, STRONG_BLUR_PX), sigma, borderType=cv2.BORDER_REFLECT_101)


def _paste(image_HWC: np.ndarray, g: _Geometry, crop: tuple[int, int]) -> np.ndarray:
    whole = image_HWC.shape[:2] == tuple(crop)
    canvas = np.empty((3, *crop), dtype=np.uint8) if whole else np.zeros((3, *crop), dtype=np.uint8)
    for plane, values in zip(canvas, cv2.split(image_HWC)):
        plane[g.place()] = values
    return canvas


class _MaskCutter:
    """Cuts column-major run lengths to a crop: which crop pixels show which source pixel is the nearest-pixel rule.

    A run boundary at source (row, column) falls behind all crop pixels that show something before it, so two small
    tables turn boundaries into crop positions. Columns of the source that the crop shows several times (enlarged) are
    cut once and repeated.
    """

    def __init__(self, g: _Geometry, height: int, width: int):
        self.g, self.height, self.width = g, height, width
        rows = g.top + (np.arange(g.out_height) * 2 + 1) * g.height // (2 * g.out_height)
        columns = g.left + (np.arange(g.out_width) * 2 + 1) * g.width // (2 * g.out_width)
        shown, self.times = np.unique(columns, return_counts=True)
        self.rows_before = np.searchsorted(rows, np.arange(height))
        self.shown_before = np.searchsorted(shown, np.arange(width + 1))
        self.is_shown = np.diff(self.shown_before, append=len(shown)).astype(bool)
        self.columns_before = np.searchsorted(columns, np.arange(width + 1))

    def cut(self, counts: bytes) -> tuple[slice, np.ndarray]:
        """The crop's columns that a mask touches, and the mask there: bool [out_height, columns]."""
        runs = rle_runs(counts)
        bounds = np.cumsum(runs)[:-1]
        if len(bounds) == 0:
            return slice(0, 0), np.zeros((self.g.out_height, 0), dtype=bool)
        columns, rows = np.divmod(bounds, self.height)
        first, last = columns[0], (columns[-1] if rows[-1] else columns[-1] - 1)
        if len(bounds) % 2:  # the last run is the mask's
            last = self.width - 1
        start, stop = self.shown_before[first], self.shown_before[last + 1]
        before = self.shown_before[columns] * self.g.out_height
        before += np.where(self.is_shown[columns], self.rows_before[rows], 0)
        before = np.concatenate([[0], before - start * self.g.out_height, [(stop - start) * self.g.out_height]])
        inside = np.arange(len(runs)) % 2 == 1
        strip_WH = np.repeat(inside, np.diff(before)).reshape(stop - start, self.g.out_height)
        left, right = int(self.columns_before[first]), int(self.columns_before[last + 1])
        if right - left > stop - start:
            strip_WH = np.repeat(strip_WH, self.times[start:stop], axis=0)
        if self.g.mirrored:
            left, right = self.g.out_width - right, self.g.out_width - left
            strip_WH = strip_WH[::-1]
        return slice(left, right), strip_WH.T


class _Cropped:
    """The instances of a record at crop size."""

    def __init__(
        self,
        instances: list[dict[str, Any]],
        row: dict[str, Any],
        class_map: ClassMap,
        g: _Geometry,
        crop: tuple[int, int],
    ):
        instances = [i for i in instances if not i["is_crowd"] or i["category_id"] in class_map]
        cutter = _MaskCutter(g, row["height"], row["width"])
        self._rows, self._first_column = g.place()[0], g.out_left
        self.crowd, self._slivers = np.zeros((2, *crop), dtype=bool)
        kept = []
        for instance in instances:
            columns, strip = cutter.cut(instance["rle"])
            visible = int(np.count_nonzero(strip))
            if instance["is_crowd"]:
                self._place(self.crowd, columns)[strip] = True
            elif visible < MIN_VISIBLE_PX:
                self._place(self._slivers, columns)[strip] = True
            else:
                kept.append((instance, columns, strip, visible))
        self.labels = np.array([_label(i["category_id"], class_map, row) for i, *_ in kept], dtype=np.int64)
        self.weights = np.array([i["score"] for i, *_ in kept], dtype=np.float32)
        self.masks = np.zeros((len(kept), *crop), dtype=bool)
        for mask, (_, columns, strip, _) in zip(self.masks, kept):
            self._place(mask, columns)[...] = strip
        self._kept = kept
        self._image_hw, self._crop = (row["height"], row["width"]), crop

    def _place(self, canvas: np.ndarray, columns: slice) -> np.ndarray:
        return canvas[self._rows, self._first_column + columns.start : self._first_column + columns.stop]

    def soft_targets(self, g: _Geometry) -> dict[str, np.ndarray]:
        """class_probs and mask_probs of the instances, where all of them tell what a teacher believed."""
        kept = [instance for instance, *_ in self._kept]
        if not kept or any(i.get("mask_probs") is None for i in kept):
            return {}
        # The middle of each cell of a grid over the crop, in pixels of the crop's window, then of the image.
        inside = [(np.arange(n) + 0.5) * side / n for n, side in zip(grid_hw(self._crop), self._crop)]
        y, x = inside[0] - g.out_top, inside[1] - g.out_left
        if g.mirrored:
            x = g.out_width - x
        y, x = g.top + y * g.height / g.out_height, g.left + x * g.width / g.out_width
        return {
            "class_probs": np.array([i["class_probs"] for i in kept], dtype=np.float32),
            "mask_probs": np.stack([sample_probabilities(i["mask_probs"], self._image_hw, y, x) for i in kept]),
        }

    def truth_maps(self, valid: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
        instance = np.zeros(valid.shape, dtype=np.int16)
        instance[self.crowd | self._slivers | ~valid] = -1
        areas = np.array([visible for *_, visible in self._kept])
        for index in np.argsort(-areas, kind="stable").tolist():
            _, columns, strip, _ = self._kept[index]
            self._place(instance, columns)[strip] = index + 1
        label_of = np.array([num_classes, *self.labels, -1], dtype=np.int16)  # instance -1 takes the last
        return instance, label_of.take(instance, mode="wrap")


def _label(category_id: int, class_map: ClassMap, row: dict[str, Any]) -> int:
    try:
        return class_map.label(category_id)
    except KeyError:
        raise ValueError(f"{row['uri']}: category {category_id} is not in the class list {class_map.names()}") from None
