"""JPEG and PNG files of which only the upper rows are decoded: a decoder that is told of fewer rows stops early.

Both formats store an image from top to bottom, so the rows below a crop need not be decoded. The height in the file's
header is replaced by the number of rows that are wanted; every pixel above it comes out as from the whole file.
"""

from __future__ import annotations

import struct
import zlib

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_HEADER_END = 33  # signature, and the chunk IHDR with its length, 13 bytes and checksum
_JPEG_START = b"\xff\xd8"
_SEQUENTIAL_FRAMES = (0xC0, 0xC1)  # baseline and extended Huffman coding
_OTHER_FRAMES = (*range(0xC2, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_SCAN = 0xDA


def first_rows(content: bytes, num_rows: int) -> bytes | None:
    """The file of an image's first rows, or None where the rows of a file cannot be told apart.

    Those are other formats, interlaced or animated PNG, and JPEG that is progressive or has more than one scan.

    Args:
        content: an image file.
        num_rows: how many rows are wanted.

    Returns:
        a file of the same width with at least `num_rows` rows, the first of which are those of `content`.
    """
    if content.startswith(_PNG_SIGNATURE):
        return _first_rows_of_png(content, num_rows)
    if content.startswith(_JPEG_START):
        return _first_rows_of_jpeg(content, num_rows)
    return None


def _first_rows_of_png(content: bytes, num_rows: int) -> bytes | None:
    if len(content) < _PNG_HEADER_END or content[8:16] != b"\0\0\0\rIHDR":
        return None
    height, interlaced = int.from_bytes(content[20:24], "big"), content[28]
    if interlaced or num_rows >= height or b"acTL" in content[: content.find(b"IDAT")]:
        return None
    header = content[12:20] + struct.pack(">I", num_rows) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[_PNG_HEADER_END:]


def _first_rows_of_jpeg(content: bytes, num_rows: int) -> bytes | None:
    position, frame = 2, 0
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker, length = content[position + 1], int.from_bytes(content[position + 2 : position + 4], "big")
        if marker in _SEQUENTIAL_FRAMES and not frame:
            frame = position + 4
        elif marker in _OTHER_FRAMES or marker in _SEQUENTIAL_FRAMES:
            return None
        elif marker == _SCAN:
            break
        position += 2 + length
    # Of a frame: bits a sample, height, width, and for each of its components 3 bytes; of a scan: how many it has.
    if not frame or position + 5 > len(content) or content[position + 4] != content[frame + 5]:
        return None
    height, num_components = int.from_bytes(content[frame + 1 : frame + 3], "big"), content[frame + 5]
    block_rows = 8 * max((content[frame + 7 + 3 * i] & 15 for i in range(num_components)), default=1)
    # One row of blocks more than is wanted: colours of half the size are smoothed across its border.
    decoded = (-(-num_rows // block_rows) + 1) * block_rows
    if decoded >= height:
        return None
    return content[: frame + 1] + struct.pack(">H", decoded) + content[frame + 3 :]
