"""Read the header of a JPEG, JPEG-LS or JPEG 2000 stream, and check it before a decoder sees the stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.pixel_format import PixelFormat

Bytes = bytes | memoryview

START_OF_JPEG2000 = b"\xff\x4f\xff\x51"
START_OF_SCAN = 0xDA
START_OF_TILE = 0x90
END_OF_STREAM = b"\xff\xd9"

MAX_CODESTREAM_HEADER = 1 << 20
"""Bytes at the start of a frame that must contain the main header of the codestream."""
MAX_BLOCKS = 500_000
"""Most precincts or code blocks of a JPEG 2000 image.

Each costs OpenJPEG up to 1.4 kB, and a header alone can request 25 million of them.
"""
MAX_SCANS = 32
"""Most scans of a JPEG image; progressive images have a dozen.

Each costs a pass over the whole image, even if it is empty and only a few bytes long.
"""


class CodestreamHeader(NamedTuple):
    """The header of a compressed frame."""

    rows: int
    columns: int
    components: int
    precision: int
    signed: bool = False
    levels: int = 0
    """Number of resolution levels that a decoder can skip."""
    blocks: int = 0
    """Approximate number of precincts or code blocks of JPEG 2000, see `count_blocks`."""


def read_codestream_header(frame: bytes, pixel_format: PixelFormat) -> CodestreamHeader:
    """Return the header of a JPEG, JPEG-LS or JPEG 2000 stream after checking it against the DICOM header.

    Raises:
        ImageRefusedError: The header is unreadable, the stream is cut short, or the two headers contradict each other.
    """
    try:
        stream = _parse_codestream_header(frame)
    except (IndexError, ValueError):
        raise ImageRefusedError(
            "undecodable", "the compressed pixels have no readable header; export the image again"
        ) from None
    if not find_end(frame):  # libjpeg would silently fill the rest with grey
        raise ImageRefusedError(
            "undecodable", "the compressed pixels are cut short: their end marker is missing; copy the file again"
        )
    if stream.components != pixel_format.samples:
        raise ImageRefusedError(
            "colour",
            f"the compressed pixels have {stream.components} components, "
            f"but SamplesPerPixel is {pixel_format.samples}; export the image again",
        )
    if (stream.rows, stream.columns) != (pixel_format.rows, pixel_format.columns):
        raise ImageRefusedError(
            "bad_header",
            f"Rows x Columns is {pixel_format.rows} x {pixel_format.columns}, "
            f"but the compressed image is {stream.rows} x {stream.columns}; export the image again",
        )
    if stream.precision > pixel_format.bits_allocated:
        raise ImageRefusedError(
            "bad_header",
            f"BitsAllocated is {pixel_format.bits_allocated}, "
            f"but the compressed pixels have {stream.precision} bits; export the image again",
        )
    if stream.blocks > MAX_BLOCKS:
        raise ImageRefusedError(
            "too_large", f"the compressed pixels have more than {MAX_BLOCKS} blocks; compress them with larger blocks"
        )
    return stream


def _parse_codestream_header(frame: bytes) -> CodestreamHeader:
    """Return the unchecked header of a JPEG, JPEG-LS or JPEG 2000 stream.

    Raises:
        IndexError: The header is cut short.
        ValueError: There is no header.
    """
    start = _find_codestream(frame)
    if frame[start : start + 4] != START_OF_JPEG2000:
        return read_jpeg_header(frame)
    return read_jpeg2000_header(memoryview(frame)[start : start + MAX_CODESTREAM_HEADER])


def _find_codestream(frame: bytes) -> int:
    """Return where the codestream starts: some encoders keep the boxes of a JP2 file before it."""
    return max(0, frame.find(START_OF_JPEG2000, 0, MAX_CODESTREAM_HEADER))


def find_end(frame: bytes) -> int:
    """Return the length of a stream up to and with its end marker, 0 if it has none.

    The end marker cannot occur in the coded data, but before it: a thumbnail may have one of its own.
    """
    start = _find_codestream(frame)
    with contextlib.suppress(IndexError):
        for marker, _, position in _segments(memoryview(frame)[start:]):
            if marker in (START_OF_SCAN, START_OF_TILE):
                end = frame.rfind(END_OF_STREAM, start + position)
                return 0 if end < 0 else end + len(END_OF_STREAM)
    return 0


def marker_segments(frame: Bytes) -> Iterator[tuple[int, Bytes]]:
    """Yield marker and payload of each segment after the start-of-image marker, up to the entropy-coded data."""
    for marker, payload, _ in _segments(frame):
        yield marker, payload


def _segments(frame: Bytes) -> Iterator[tuple[int, Bytes, int]]:
    """Yield marker, payload and end of each segment."""
    position = 2
    while frame[position] == 0xFF:
        marker = frame[position + 1]
        size = int.from_bytes(frame[position + 2 : position + 4])
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        start = position + 4
        position += 2 + max(size, 2)
        yield marker, frame[start : start + size - 2], position


def read_jpeg_header(frame: bytes) -> CodestreamHeader:
    """Return the frame header (SOF) of a JPEG or JPEG-LS stream (ITU-T T.81 B.2.2, T.87 C.2.2).

    Raises:
        ValueError: There is no frame header.
        ImageRefusedError: The image has too many scans.
    """
    for marker, payload in marker_segments(frame):
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            # An image of one component has more than one scan only if it is progressive.
            has_scans = payload[5] > 1 or marker & 3 == 2
            # The marker of a scan cannot occur inside a scan, where FF is followed by a byte below 0x80 or by D0-D7.
            if has_scans and frame.count(b"\xff\xda") > MAX_SCANS:
                raise ImageRefusedError(
                    "too_large", f"the JPEG image has more than {MAX_SCANS} scans; save it as a baseline JPEG"
                )
            return CodestreamHeader(int.from_bytes(payload[1:3]), int.from_bytes(payload[3:5]), payload[5], payload[0])
        if marker == START_OF_SCAN:
            break
    raise ValueError("the stream has no frame header")


def read_jpeg2000_header(frame: Bytes) -> CodestreamHeader:
    """Return the content of the SIZ and COD segments of a JPEG 2000 main header (ITU-T T.800 A.5.1, A.6.1).

    Raises:
        ValueError: A segment is missing.
    """
    stream = None
    for marker, payload in marker_segments(frame):
        if marker == 0x51:
            x1, y1, x0, y0 = (int.from_bytes(payload[start : start + 4]) for start in (2, 6, 10, 14))
            components = int.from_bytes(payload[34:36])
            depth = payload[36]
            stream = CodestreamHeader(y1 - y0, x1 - x0, components, (depth & 0x7F) + 1, depth > 0x7F)
            has_offset = bool(x0 or y0)
        elif marker == 0x52 and stream is not None:
            levels = 0 if has_offset else payload[5]  # an image that does not start at 0 has a different grid
            return stream._replace(levels=levels, blocks=count_blocks(stream, payload))
        elif marker == START_OF_TILE:
            break
    raise ValueError("the stream has no SIZ or no COD segment")


def count_blocks(stream: CodestreamHeader, cod: Bytes) -> int:
    """Return the approximate number of precincts or code blocks at all resolution levels from the COD segment `cod`."""
    levels = cod[5]
    sizes = cod[10:] if cod[0] & 1 else b""
    count = 0
    for level in range(levels + 1):  # 0 = the smallest image
        width, height = (min(cod[index] + 2, 15) for index in (6, 7))  # exponents of 2
        if sizes:
            width = min(width, sizes[level] & 15)
            height = min(height, sizes[level] >> 4)
        pixels = (stream.rows >> (levels - level)) * (stream.columns >> (levels - level))
        count += pixels >> (width + height)
    return count
