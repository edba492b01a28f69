"""From the samples of one optimiser step to one buffer, across processes, and to tensors on the worker's device.

A step of eight 512x1024 images is about 30 MB, so that copying it is the main cost: everything is laid into one buffer
once, and read in place on the other side. Masks travel as bits and are unpacked on the device. What nobody knows (truth
maps of D_u, ignore regions of images without any) does not travel at all.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from cast_ray.contracts.records import Batch, Targets

ALIGNMENT = 64
CPU = torch.device("cpu")


Parts = Mapping[str, Sequence[np.ndarray]]
"""Arrays by name, each in parts of one dtype that follow each other along the first dim."""


UNKNOWN = {"truth_instance": -1, "truth_class": -1}
"""What padding is filled with, where not with 0."""
NOT_OF_PIXELS = ("labels", "weights")


def pad_to_largest(samples: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Samples of `views.make_sample` with all pixels padded, below and right, to the largest height and width.

    Padding is black, no object, not valid, and its truth is unknown; samples of one size are returned as they are.
    """
    sizes = [sample["valid"].shape for sample in samples]
    largest = (max(height for height, _ in sizes), max(width for _, width in sizes))
    return [s if size == largest else _padded(s, size, largest) for s, size in zip(samples, sizes)]


def _padded(sample: dict[str, np.ndarray], size: tuple[int, ...], wanted: tuple[int, int]) -> dict[str, np.ndarray]:
    added = [(0, wanted[0] - size[0]), (0, wanted[1] - size[1])]
    padded = {
        name: array
        if name in NOT_OF_PIXELS
        else np.pad(array, [(0, 0)] * (array.ndim - 2) + added, constant_values=UNKNOWN.get(name, 0))
        for name, array in sample.items()
    }
    if sample["strong"] is sample["weak"]:  # by which `collate` knows that no term looks at it
        padded["strong"] = padded["weak"]
    return padded


def collate(samples: list[dict[str, np.ndarray]], num_labelled: int) -> Parts:
    """One optimiser step of one worker as a few flat arrays, masks as bits; see `pad_to_largest` for mixed sizes.

    Args:
        samples: samples that `views.make_sample` made, labelled images first.
        num_labelled: how many are labelled.

    Returns:
        weak, strong: uint8 [B, 3, H, W] (no `strong` where it is the weak view); truth_instance, truth_class: int16
        [K, H, W] of the images in truth_images, the others' are unknown; valid: packed bits uint8 [B, ceil(HW/8)];
        masks: packed bits uint8 [sum N, ceil(HW/8)]; labels, weights: [sum N]; num_instances: int64 [B]; ignore: packed
        bits of the images in ignore_images; num_labelled: int64 [1]; of the images in soft_images, where there are any:
        class_probs float32 [sum N, C+1], mask_probs uint8 [sum N, H/4, W/4].
    """
    assert samples and 0 <= num_labelled <= len(samples)
    samples = pad_to_largest(samples)
    with_ignore = [i for i, sample in enumerate(samples) if sample["ignore"].any()]
    with_truth = [i for i, sample in enumerate(samples) if (sample["truth_class"] >= 0).any()]
    parts = {
        "weak": [s["weak"][None] for s in samples],
        "valid": [_pack(s["valid"][None]) for s in samples],
        "masks": [_pack(s["masks"]) for s in samples],
        "labels": [s["labels"] for s in samples],
        "weights": [s["weights"] for s in samples],
        "num_instances": [np.array([len(s["labels"]) for s in samples], dtype=np.int64)],
        "ignore": [_pack(samples[i]["ignore"][None]) for i in with_ignore] or [_pack(samples[0]["ignore"][None][:0])],
        "ignore_images": [np.array(with_ignore, dtype=np.int64)],
        "truth_images": [np.array(with_truth, dtype=np.int64)],
        "num_labelled": [np.array([num_labelled], dtype=np.int64)],
    }
    with_soft = [i for i, sample in enumerate(samples) if "mask_probs" in sample]
    if with_soft:
        parts["soft_images"] = [np.array(with_soft, dtype=np.int64)]
        for name in ("class_probs", "mask_probs"):
            parts[name] = [samples[i][name] for i in with_soft]
    if any(s["strong"] is not s["weak"] for s in samples):
        parts["strong"] = [s["strong"][None] for s in samples]
    for name in ("truth_instance", "truth_class"):
        if with_truth:
            parts[name] = [samples[i][name][None] for i in with_truth]
    return parts


def join(parts: Parts) -> dict[str, np.ndarray]:
    """The arrays of a collated step, each in one piece."""
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}


def to_buffer(parts: Parts) -> np.ndarray:
    """Arrays end to end in one buffer, uint8 [bytes]; `from_buffer` reads them in place."""
    shapes = {n: (sum(map(len, pieces)), *pieces[0].shape[1:]) for n, pieces in parts.items()}
    outline = [(name, parts[name][0].dtype.str, shape) for name, shape in shapes.items()]
    header = pickle.dumps(outline)
    offsets = _offsets(len(header), outline)
    buffer = np.empty(offsets[-1], dtype=np.uint8)
    buffer[:8] = np.array([len(header)]).view(np.uint8)
    buffer[8 : 8 + len(header)] = np.frombuffer(header, np.uint8)
    for offset, (name, dtype, shape) in zip(offsets, outline):
        np.concatenate(parts[name], out=np.ndarray(shape, dtype, buffer, offset))
    return buffer


def from_buffer(buffer: Any) -> dict[str, np.ndarray]:
    """The arrays of `to_buffer`, without a copy: as writable as the buffer is, which they keep alive."""
    view = memoryview(buffer).cast("B")
    size = int.from_bytes(view[:8], "little")
    outline = pickle.loads(view[8 : 8 + size])
    offsets = _offsets(size, outline)
    return {name: np.ndarray(shape, dtype, view, offset) for offset, (name, dtype, shape) in zip(offsets, outline)}


def _offsets(header_bytes: int, outline: list[tuple[str, str, tuple[int, ...]]]) -> list[int]:
    """Returns where each array starts, behind the header and its length, and where the last one ends."""
    sizes = [np.dtype(dtype).itemsize * math.prod(shape) for _, dtype, shape in outline]
    return [-(-end // ALIGNMENT) * ALIGNMENT for end in accumulate(sizes, _aligned_sum, initial=8 + header_bytes)]


def _aligned_sum(end: int, size: int) -> int:
    return -(-end // ALIGNMENT) * ALIGNMENT + size


def to_batch(arrays: dict[str, np.ndarray], device: torch.device = CPU) -> Batch:
    """The tensors of a collated step on a device.

    On the CPU the images share memory with the arrays, read-only ones of the object store included: nobody may write to
    a batch. To a GPU they go through pinned memory, without waiting, and masks as bits.
    """
    num_images, _, height, width = arrays["weak"].shape
    weak = _tensor(arrays["weak"], device)
    masks = _unpack(arrays["masks"], height, width, device)
    ignore = dict(zip(arrays["ignore_images"].tolist(), _unpack(arrays["ignore"], height, width, device)))
    counts = arrays["num_instances"].tolist()
    assert len(counts) == num_images and sum(counts) == len(masks)
    labels, weights = _tensor(arrays["labels"], device), _tensor(arrays["weights"], device)
    soft = _soft(arrays, counts, device)
    targets = [
        Targets(m, lab, wei, ignore.get(index), *soft.get(index, ()))
        for index, (m, lab, wei) in enumerate(zip(masks.split(counts), labels.split(counts), weights.split(counts)))
    ]
    return Batch(
        weak=weak,
        strong=_tensor(arrays["strong"], device) if "strong" in arrays else weak,
        valid=_unpack(arrays["valid"], height, width, device),
        targets=targets,
        num_labelled=int(arrays["num_labelled"][0]),
        truth_instance=_truth(arrays, "truth_instance", device),
        truth_class=_truth(arrays, "truth_class", device),
    )


def _soft(
    arrays: dict[str, np.ndarray], counts: list[int], device: torch.device
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Image -> class_probs and mask_probs of its instances, of the images that have soft targets."""
    if "soft_images" not in arrays:
        return {}
    images = arrays["soft_images"].tolist()
    sizes = [counts[i] for i in images]
    both = (_tensor(arrays[name], device).split(sizes) for name in ("class_probs", "mask_probs"))
    return dict(zip(images, zip(*both)))


def _truth(arrays: dict[str, np.ndarray], name: str, device: torch.device) -> torch.Tensor:
    """int16 [B, H, W], -1 where unknown."""
    num_images, _, height, width = arrays["weak"].shape
    known = arrays["truth_images"]
    if len(known) == num_images:
        return _tensor(arrays[name], device)
    if len(known) == 0:
        return torch.full((1, 1, 1), -1, dtype=torch.int16, device=device).expand(num_images, height, width)
    truth = torch.full((num_images, height, width), -1, dtype=torch.int16, device=device)
    truth[_tensor(known, device)] = _tensor(arrays[name], device)
    return truth


def _pack(masks: np.ndarray) -> np.ndarray:
    return np.packbits(masks.reshape(len(masks), math.prod(masks.shape[1:])), axis=1)


def _unpack(bits: np.ndarray, height: int, width: int, device: torch.device) -> torch.Tensor:
    """bool [n, H, W] of packed bits [n, ceil(HW/8)]."""
    if device.type == "cpu":
        masks = torch.from_numpy(np.unpackbits(bits, axis=1, count=height * width).view(bool))
    else:
        masks = unpack_bits(_tensor(bits, device), height * width)
    return masks.reshape(len(bits), height, width)


def unpack_bits(bits: torch.Tensor, count: int) -> torch.Tensor:
    """numpy's unpackbits along the last dim, on any device: uint8 [n, ceil(count/8)] -> bool [n, count]."""
    places = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=bits.device)
    return (bits[..., None] & places).ne(0).flatten(1)[:, :count]


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.from_dlpack(array)  # unlike from_numpy without a warning of read-only memory
    pinned = torch.empty(array.shape, dtype=torch.from_numpy(array[:0].copy()).dtype, pin_memory=device.type == "cuda")
    pinned.numpy()[...] = array
    return pinned.to(device, non_blocking=True)
