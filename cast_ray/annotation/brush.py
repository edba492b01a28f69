"""Label Studio's run lengths of a brush mask: the pixels of an RGBA image, row by row, as a stream of bits.

    32 bits: number of values (4 for each pixel); 5 bits: bits of a value - 1; 4 times 4 bits: four sizes of counts - 1
    then blocks: 1 bit: whether one value is repeated; 2 bits: which size the count has; the count - 1; one value, or as
    many values as the count says

Source: package rle-pack of thi.ng/umbrella, which Label Studio's frontend uses, and `brush.py` of label-studio-sdk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_CHANNELS = 4
_COUNT_BITS = (3, 4, 8, 16)
_VALUE_BITS = 8


def encode_brush(mask: np.ndarray) -> list[int]:
    """Encodes a mask bool [H, W] as Label Studio's `rle`: bytes as numbers, 255 in all channels inside the mask."""
    pixels = mask.ravel()
    starts = np.concatenate([[0], np.flatnonzero(pixels[1:] != pixels[:-1]) + 1])
    lengths = np.diff(starts, append=len(pixels)) * _CHANNELS
    bits = [f"{len(pixels) * _CHANNELS:032b}{_VALUE_BITS - 1:05b}", *(f"{size - 1:04b}" for size in _COUNT_BITS)]
    for value, length in zip(pixels[starts].tolist(), lengths.tolist()):
        word = "1" * _VALUE_BITS if value else "0" * _VALUE_BITS
        while length:
            count = min(length, 1 << _COUNT_BITS[-1])
            kind, size = next((k, s) for k, s in enumerate(_COUNT_BITS) if count <= 1 << s)
            bits.append(f"1{kind:02b}{count - 1:0{size}b}{word}")
            length -= count
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def decode_brush(rle: Any, height: int, width: int) -> np.ndarray:
    """Decodes Label Studio's `rle` into a mask bool [H, W]: where the alpha channel is not 0.

    Raises:
        ValueError: it is no such list, ends too early, or is of an image of another size.
    """
    bits = _bits_of(rle)
    place = 0

    def read(size: int) -> int:
        nonlocal place
        place += size
        if place > len(bits):
            raise ValueError("brush RLE is cut off")
        return int(bits[place - size : place], 2)

    num_values = read(32)
    if num_values != height * width * _CHANNELS:
        raise ValueError(f"brush RLE of {num_values // _CHANNELS} pixels: expected {width} x {height}")
    value_bits = read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    is_set = np.zeros(num_values, dtype=bool)
    done = 0
    while done < num_values:
        is_run = read(1)
        end = done + read(sizes[read(2)]) + 1
        if end > num_values:
            raise ValueError("brush RLE holds more values than it says")
        if is_run:
            is_set[done:end] = read(value_bits) > 0
        else:
            is_set[done:end] = [read(value_bits) > 0 for _ in range(end - done)]
        done = end
    return is_set.reshape(height, width, _CHANNELS)[..., -1]


def _bits_of(rle: Sequence[Any]) -> str:
    if not isinstance(rle, list) or not rle or not all(type(byte) is int and 0 <= byte < 256 for byte in rle):
        raise ValueError("brush RLE is no list of bytes (0 to 255)")
    return f"{int.from_bytes(bytes(rle), 'big'):0{8 * len(rle)}b}"
