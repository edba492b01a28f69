"""From the samples of one optimiser step to one buffer, across processes, and to tensors on the worker's device.

A step of eight 512x1024 images is some 30 MB, so copies are what it costs: images are stacked once, laid end to end
with everything else once, and read in place on the other side. Masks travel as bits and are unpacked on the device.
What nobody knows (truth maps of D_u, ignore regions of images without any) does not travel at all.
"""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import torch

from cast_ray.records import Batch, Targets

ALIGNMENT = 64
CPU = torch.device("cpu")


def collate(samples: list[dict[str, np.ndarray]], num_labelled: int) -> dict[str, np.ndarray]:
    """One optimiser step of one worker as a few flat arrays, masks as bits.

    Args:
        samples: of `views.make_sample`, labelled images first.
        num_labelled: how many are labelled.

    Returns:
        weak, strong: uint8 [B, 3, H, W] (without `strong` where it is the weak view); truth_instance, truth_class:
        int16 [K, H, W] of the images in truth_images, the others' are unknown; valid: packed bits uint8
        [B, ceil(HW/8)]; masks: packed bits uint8 [sum N, ceil(HW/8)]; labels, weights: [sum N]; num_instances: int64
        [B]; ignore: packed bits of the images in ignore_images; num_labelled: int64 [1].
    """
    assert samples and 0 <= num_labelled <= len(samples)
    pixels = samples[0]["valid"].size
    with_ignore = [i for i, sample in enumerate(samples) if sample["ignore"].any()]
    with_truth = [i for i, sample in enumerate(samples) if (sample["truth_class"] >= 0).any()]
    arrays = {
        "weak": np.stack([s["weak"] for s in samples]),
        "valid": _pack(np.stack([s["valid"] for s in samples]), pixels),
        "masks": np.concatenate([_pack(s["masks"], pixels) for s in samples]),
        "labels": np.concatenate([s["labels"] for s in samples]),
        "weights": np.concatenate([s["weights"] for s in samples]),
        "num_instances": np.array([len(s["labels"]) for s in samples], dtype=np.int64),
        "ignore": _pack(np.array([samples[i]["ignore"] for i in with_ignore], dtype=bool), pixels),
        "ignore_images": np.array(with_ignore, dtype=np.int64),
        "truth_images": np.array(with_truth, dtype=np.int64),
        "num_labelled": np.array([num_labelled], dtype=np.int64),
    }
    if any(s["strong"] is not s["weak"] for s in samples):
        arrays["strong"] = np.stack([s["strong"] for s in samples])
    for name in ("truth_instance", "truth_class"):
        if with_truth:
            arrays[name] = np.stack([samples[i][name] for i in with_truth])
    return arrays


def to_buffer(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Arrays end to end in one buffer, uint8 [bytes], each where it can be read in place."""
    parts: list[pickle.PickleBuffer] = []
    outline = pickle.dumps(arrays, protocol=5, buffer_callback=parts.append)
    blocks = [memoryview(outline), *(part.raw() for part in parts)]
    sizes = np.array([block.nbytes for block in blocks], dtype=np.int64)
    starts = _starts(sizes)
    buffer = np.empty(starts[-1], dtype=np.uint8)
    buffer[: 8 + sizes.nbytes] = np.array([len(sizes), *sizes]).view(np.uint8)
    for start, block in zip(starts, blocks):
        buffer[start : start + block.nbytes] = block
    return buffer


def from_buffer(buffer: Any) -> dict[str, np.ndarray]:
    """The arrays of `to_buffer`, without a copy: as writable as the buffer is, and alive as long as they are."""
    view = memoryview(buffer).cast("B")
    count = int.from_bytes(view[:8], "little")
    sizes = np.frombuffer(view[8 : 8 * (count + 1)], dtype=np.int64)
    outline, *parts = [view[start : start + size] for start, size in zip(_starts(sizes), sizes.tolist())]
    return pickle.loads(outline, buffers=parts)


def _starts(sizes: np.ndarray) -> list[int]:
    """Where each block starts, behind their number and sizes, and where the last one ends."""
    starts = np.cumsum([8 * (len(sizes) + 1), *sizes]) + ALIGNMENT * np.arange(1, len(sizes) + 2)
    return (starts - starts % ALIGNMENT).tolist()


def to_batch(arrays: dict[str, np.ndarray], device: torch.device = CPU) -> Batch:
    """The tensors of a collated step on a device.

    On the CPU images share memory with writable arrays; read-only ones, as Arrow and Ray hand them out, are copied. To
    a GPU they go through pinned memory, without waiting, and masks as bits.
    """
    num_images, _, height, width = arrays["weak"].shape
    weak = _tensor(arrays["weak"], device)
    masks = _unpack(arrays["masks"], height, width, device)
    ignore = dict(zip(arrays["ignore_images"].tolist(), _unpack(arrays["ignore"], height, width, device)))
    counts = arrays["num_instances"].tolist()
    assert len(counts) == num_images and sum(counts) == len(masks)
    labels, weights = _tensor(arrays["labels"], device), _tensor(arrays["weights"], device)
    targets = [
        Targets(m, lab, wei, ignore.get(index))
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


def _pack(masks: np.ndarray, pixels: int) -> np.ndarray:
    return np.packbits(masks.reshape(len(masks), pixels), axis=1)


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
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    pinned = torch.empty(array.shape, dtype=torch.from_numpy(array[:0].copy()).dtype, pin_memory=device.type == "cuda")
    pinned.numpy()[...] = array
    return pinned.to(device, non_blocking=True)
