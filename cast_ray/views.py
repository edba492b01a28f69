"""From one image and its record to a weak and a strong view of equal geometry, and from samples to a batch.

Everything a sample needs at random comes from its own seed: the same seed gives the same sample in any process, and no
global generator is touched. The functions leave torch's thread count alone: set it to 1 in a process that makes
samples, since images of this size are not worth a second thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as functional
from pycocotools import mask as mask_utils
from scipy.ndimage import gaussian_filter

from cast_ray.recipe import DataConfig
from cast_ray.records import Batch, ClassMap, Targets

MIN_VISIBLE_PX = 4
"""Instances with fewer pixels left in the crop are dropped (their pixels are unknown, not background)."""

STRONG_JITTER = (0.4, 0.4, 0.4, 0.1)
STRONG_GRAYSCALE = 0.2
STRONG_BLUR_PX = 5
STRONG_BLUR_SIGMA = (0.1, 2.0)


@dataclass(frozen=True)
class _Geometry:
    """A window of the source image, the place of the crop it is resized to, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    out_top: int
    out_left: int
    out_height: int
    out_width: int
    mirrored: bool

    def place(self) -> tuple[slice, slice]:
        return (
            slice(self.out_top, self.out_top + self.out_height),
            slice(self.out_left, self.out_left + self.out_width),
        )


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

    Weak: resize by `data.scale_jitter` of the fitted size, random crop or random place on padding, mirroring, light
    jitter of brightness, contrast and saturation. Strong: the weak view with ColorJitter .4/.4/.4/.1 in random order,
    grayscale with p .2 and Gaussian blur k 5 sigma .1-2.

    Args:
        image_HWC: uint8 [h, w, 3] of the row's height and width.
        row: a record (RECORD_SCHEMA as Python values). An optional key `truth_instances` holds the ground truth where
            `instances` are pseudo-labels; without it the truth maps are drawn from `instances`.
        class_map: category ids to labels.
        data: crop size and strength of the weak view.
        seed: of this sample, any non-negative integer.
        use_instances: whether `instances` become targets.
        truth: whether the truth maps are known; they are -1 everywhere where not.
        strong: False where no loss looks at the strong view: it is then the weak one, at a third of the cost.

    Returns:
        weak, strong: uint8 [3, H, W], 0 on padding; valid: bool [H, W]; masks: bool [N, H, W]; labels: int64 [N];
        weights: float32 [N]; ignore: bool [H, W], crowd regions; truth_instance, truth_class: int16 [H, W], numbered as
        `masks` where these are the truth. Smaller instances lie over larger ones in the truth maps; crowds, padding and
        dropped slivers are -1.

    Raises:
        ValueError: the image has another size than its record, or an instance a category outside the class map.
    Source: CAST (arXiv 2505.21904), views of the contrastive term.
    Deviations: the weak jitter leaves the hue alone; the paper does not say how strong it is.
    """
    height, width = image_HWC.shape[:2]
    if (height, width) != (row["height"], row["width"]):
        raise ValueError(
            f"{row['uri']}: {width} x {height} pixels, but its record says {row['width']} x {row['height']}"
        )
    rng = np.random.default_rng(seed)
    geometry = _random_geometry(height, width, data, rng)
    window = _take_window(image_HWC, geometry)
    weak = _jitter(window, (data.color_jitter,) * 3 + (0.0,), rng)

    crop = data.image_px
    valid = np.zeros(crop, dtype=bool)
    valid[geometry.place()] = True
    ignore = np.zeros(crop, dtype=bool)
    masks = np.zeros((0, *crop), dtype=bool)
    labels, weights = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    truth_instance, truth_class = np.full((2, *crop), -1, dtype=np.int16)
    truth_rows = row.get("truth_instances")
    if use_instances or (truth and truth_rows is None):
        cropped = _Cropped(row["instances"], row, class_map, geometry, crop)
        if use_instances:
            masks, labels, weights, ignore = cropped.masks, cropped.labels, cropped.weights, cropped.crowd
    if truth:
        if truth_rows is not None:
            cropped = _Cropped(truth_rows, row, class_map, geometry, crop)
        truth_instance, truth_class = cropped.truth_maps(valid, len(class_map))
    weak_pixels = _paste(weak, geometry, crop)
    return {
        "weak": weak_pixels,
        "strong": _paste(_strengthen(weak, rng), geometry, crop) if strong else weak_pixels,
        "valid": valid,
        "masks": masks,
        "labels": labels,
        "weights": weights,
        "ignore": ignore,
        "truth_instance": truth_instance,
        "truth_class": truth_class,
    }


def collate(samples: list[dict[str, np.ndarray]], num_labelled: int) -> dict[str, np.ndarray]:
    """One optimiser step of one worker as a few flat arrays, masks as bits, fit for pickling or Arrow binary.

    Args:
        samples: of `make_sample`, labelled images first.
        num_labelled: how many are labelled.

    Returns:
        weak, strong: uint8 [B, 3, H, W]; truth_instance, truth_class: int16 [B, H, W]; valid: packed bits uint8
        [B, ceil(HW/8)]; masks: packed bits uint8 [sum N, ceil(HW/8)]; labels, weights: [sum N]; num_instances: int64
        [B]; ignore: packed bits of the images in ignore_images int64 [K]; num_labelled: int64 [1].
    """
    assert samples and 0 <= num_labelled <= len(samples)
    with_ignore = [index for index, sample in enumerate(samples) if sample["ignore"].any()]
    stacked = {n: np.stack([s[n] for s in samples]) for n in ("weak", "strong", "truth_instance", "truth_class")}
    pixels = samples[0]["valid"].size
    ignore = [samples[index]["ignore"] for index in with_ignore]
    return {
        **stacked,
        "valid": _pack(np.stack([s["valid"] for s in samples]), pixels),
        "masks": _pack(np.concatenate([s["masks"] for s in samples]), pixels),
        "labels": np.concatenate([s["labels"] for s in samples]),
        "weights": np.concatenate([s["weights"] for s in samples]),
        "num_instances": np.array([len(s["labels"]) for s in samples], dtype=np.int64),
        "ignore": _pack(np.stack(ignore) if ignore else np.zeros((0, pixels), dtype=bool), pixels),
        "ignore_images": np.array(with_ignore, dtype=np.int64),
        "num_labelled": np.array([num_labelled], dtype=np.int64),
    }


def to_batch(arrays: dict[str, np.ndarray]) -> Batch:
    """The tensors of a collated step: images share memory with writable arrays, masks are unpacked to bool.

    Args:
        arrays: of `collate`, possibly read-only (as Arrow and Ray hand them out): then they are copied.
    """
    num_images, _, height, width = arrays["weak"].shape
    masks = _unpack(arrays["masks"], height, width)
    ignore = dict(zip(arrays["ignore_images"].tolist(), _unpack(arrays["ignore"], height, width)))
    counts = arrays["num_instances"].tolist()
    assert len(counts) == num_images and sum(counts) == len(masks)
    labels, weights = _tensor(arrays["labels"]), _tensor(arrays["weights"])
    targets = [
        Targets(m, lab, wei, ignore.get(index))
        for index, (m, lab, wei) in enumerate(zip(masks.split(counts), labels.split(counts), weights.split(counts)))
    ]
    return Batch(
        weak=_tensor(arrays["weak"]),
        strong=_tensor(arrays["strong"]),
        valid=_unpack(arrays["valid"], height, width),
        targets=targets,
        num_labelled=int(arrays["num_labelled"][0]),
        truth_instance=_tensor(arrays["truth_instance"]),
        truth_class=_tensor(arrays["truth_class"]),
    )


def fit_image(image_HWC: np.ndarray, image_px: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """The view for evaluation and labelling: the whole image, resized to fit and padded at the bottom and right.

    Args:
        image_HWC: uint8 [h, w, 3].
        image_px: (H, W) of the result, pixels.

    Returns:
        uint8 [3, H, W], 0 on padding, and the (height, width) the image has inside it: crop masks to it, then resize
        them to (h, w).
    """
    height, width = image_HWC.shape[:2]
    size = _scaled(height, width, min(image_px[0] / height, image_px[1] / width), image_px)
    fitted = _resize(_channels_first(image_HWC), size).numpy()
    if size == tuple(image_px):
        return fitted, size
    padded = np.zeros((3, *image_px), dtype=np.uint8)
    padded[:, : size[0], : size[1]] = fitted
    return padded, size


def _random_geometry(height: int, width: int, data: DataConfig, rng: np.random.Generator) -> _Geometry:
    """The window is cut before resizing, so that pixels outside the crop are never resized."""
    crop_height, crop_width = data.image_px
    scale = min(crop_height / height, crop_width / width) * rng.uniform(*data.scale_jitter)
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
    )


def _scaled(height: int, width: int, scale: float, limit: tuple[int, int]) -> tuple[int, int]:
    return min(limit[0], max(1, round(height * scale))), min(limit[1], max(1, round(width * scale)))


def _take_window(image_HWC: np.ndarray, g: _Geometry) -> torch.Tensor:
    """float32 [3, out_height, out_width] in 0..1."""
    cut = image_HWC[g.top : g.top + g.height, g.left : g.left + g.width]
    window = _resize(_channels_first(cut), (g.out_height, g.out_width))
    if g.mirrored:
        window = window.flip(-1)
    return window.float() / 255


def _channels_first(image_HWC: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image_HWC.transpose(2, 0, 1)))


def _resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return image if tuple(image.shape[-2:]) == size else functional.resize(image, list(size), antialias=True)


def _jitter(image: torch.Tensor, strength: tuple[float, ...], rng: np.random.Generator) -> torch.Tensor:
    """torchvision's ColorJitter with its factors and order from `rng`; float images in 0..1."""
    factors = 1 + np.array(strength) * rng.uniform(-1, 1, 4)
    for operation in rng.permutation(4).tolist():
        if strength[operation] == 0:
            continue
        factor = max(0.0, float(factors[operation]))
        if operation == 0:
            image = functional.adjust_brightness(image, factor)
        elif operation == 1:
            image = functional.adjust_contrast(image, factor)
        elif operation == 2:
            image = functional.adjust_saturation(image, factor)
        else:
            image = functional.adjust_hue(image, float(factors[operation]) - 1)
    return image


def _strengthen(weak: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    strong = _jitter(weak, STRONG_JITTER, rng)
    if rng.random() < STRONG_GRAYSCALE:
        strong = functional.rgb_to_grayscale(strong, num_output_channels=3)
    sigma = rng.uniform(*STRONG_BLUR_SIGMA)
    # equal to torchvision's gaussian_blur within 1e-6, in half the time, and fit for images narrower than the kernel
    blurred = gaussian_filter(strong.numpy(), (0, sigma, sigma), radius=STRONG_BLUR_PX // 2, mode="mirror")
    return torch.from_numpy(blurred)


def _paste(image: torch.Tensor, g: _Geometry, crop: tuple[int, int]) -> np.ndarray:
    pixels = (image * 255).round_().clamp_(0, 255).to(torch.uint8).numpy()
    if pixels.shape[1:] == tuple(crop):
        return pixels
    padded = np.zeros((3, *crop), dtype=np.uint8)
    rows, columns = g.place()
    padded[:, rows, columns] = pixels
    return padded


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
        height, width = row["height"], row["width"]
        dense = np.zeros((len(instances), *crop), dtype=bool)
        if instances:
            rles = [{"size": [height, width], "counts": i["rle"]} for i in instances]
            planes = mask_utils.decode(rles).transpose(2, 1, 0)  # [N, w, h]: pycocotools' own order in memory
            rows = g.top + (np.arange(g.out_height) * 2 + 1) * g.height // (2 * g.out_height)
            columns = g.left + (np.arange(g.out_width) * 2 + 1) * g.width // (2 * g.out_width)
            if g.mirrored:
                columns = columns[::-1]
            out_rows, out_columns = g.place()
            dense[:, out_rows, out_columns] = planes[:, columns][:, :, rows].transpose(0, 2, 1)
        crowd = np.array([i["is_crowd"] for i in instances], dtype=bool)
        visible = dense.sum((1, 2))
        kept = ~crowd & (visible >= MIN_VISIBLE_PX)
        self.crowd = dense[crowd].any(0)
        self.masks = dense[kept]
        self.labels = np.array(
            [_label(i["category_id"], class_map, row) for i, k in zip(instances, kept) if k], dtype=np.int64
        )
        self.weights = np.array([i["score"] for i, k in zip(instances, kept) if k], dtype=np.float32)
        self._areas = visible[kept]
        self._slivers = dense[~crowd & ~kept].any(0)

    def truth_maps(self, valid: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
        instance, label = np.zeros(valid.shape, dtype=np.int16), np.full(valid.shape, num_classes, dtype=np.int16)
        unknown = self.crowd | self._slivers | ~valid
        instance[unknown], label[unknown] = -1, -1
        for index in np.argsort(-self._areas, kind="stable").tolist():
            instance[self.masks[index]] = index + 1
            label[self.masks[index]] = self.labels[index]
        return instance, label


def _label(category_id: int, class_map: ClassMap, row: dict[str, Any]) -> int:
    try:
        return class_map.label(category_id)
    except KeyError:
        raise ValueError(f"{row['uri']}: category {category_id} is not in the class list {class_map.names()}") from None


def _pack(masks: np.ndarray, pixels: int) -> np.ndarray:
    return np.packbits(masks.reshape(len(masks), pixels), axis=1)


def _unpack(bits: np.ndarray, height: int, width: int) -> torch.Tensor:
    masks = np.unpackbits(bits, axis=1, count=height * width).view(bool)
    return torch.from_numpy(masks.reshape(len(bits), height, width))


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())
