"""Take the bytes of the single frame out of the pixel data of a DICOM file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from pydicom import uid

from vitmodel.archives import open_source
from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.codestream import find_end
from vitmodel.pixels.dicom_reading import MAX_HEADER_BYTES, has_pixel_data_tag, read_dataset
from vitmodel.pixels.pixel_format import PixelFormat

ITEM = b"\xfe\xff\x00\xe0"
DELIMITER = b"\xfe\xff\xdd\xe0"
OPEN_PIXEL_DATA = re.compile(rb"\xe0\x7f\x10\x00(?:O[BW]\x00\x00)?\xff\xff\xff\xff(?=\xfe\xff\x00\xe0)")
"""Start of pixel data of undefined length."""


def read_frame(path: Path, pixel_format: PixelFormat) -> tuple[bytes, str]:
    """Return the bytes of the frame and the transfer syntax in which they are stored, mostly the stated one.

    Raises:
        ImageRefusedError: The pixels are missing, cut short or stored in another way than the header states.
    """
    expected = pixel_format.frame_bytes
    # A codec that fails to compress needs little more than 1 x.
    element = read_dataset(path, 2 * expected).get_item("PixelData")
    data = getattr(element, "value", None) or b""
    if not data and uid.UID(pixel_format.syntax).is_encapsulated:
        data = _read_open_pixel_data(path, 2 * expected)
    if not data:
        if has_pixel_data_tag(path):
            raise ImageRefusedError("unreadable", "the file is cut short in its pixel data; copy it again")
        raise ImageRefusedError("no_pixels", "the file has no pixel data, or is cut short before it; copy it again")
    if uid.UID(pixel_format.syntax).is_encapsulated:
        if not data.startswith(ITEM) and len(data) - expected in (0, 1):  # the second is the byte of an even length
            return data[:expected], uid.ExplicitVRLittleEndian
        return _join_fragments(data, pixel_format.syntax), pixel_format.syntax
    if len(data) < expected:
        if data.startswith(ITEM):
            raise ImageRefusedError(
                "bad_header",
                f"TransferSyntaxUID is {uid.UID(pixel_format.syntax).name}, but the pixels are compressed; "
                "export the image again",
            )
        raise ImageRefusedError(
            "unreadable", f"the file is cut short: it has {len(data)} of {expected} bytes of pixels; copy it again"
        )
    in_words = pixel_format.bits_allocated == 8 and element is not None and element.VR == "OW"
    if in_words and pixel_format.syntax == uid.ExplicitVRBigEndian:
        data = np.frombuffer(data, np.uint16).byteswap().tobytes()  # bytes are stored in words (PS3.5 D.1)
    return data[:expected], pixel_format.syntax


def _join_fragments(data: bytes, syntax: str) -> bytes:
    """Return the stream in encapsulated pixel data of one frame (PS3.5 A.4), up to its end marker.

    All fragments belong to the frame, whatever the offset table says. Encoders and archives pad frames with more than
    the one byte that makes their length even; RLE has no end marker and needs none.

    Raises:
        ImageRefusedError: The items are damaged or cut short.
    """
    fragments = []
    position = 0
    while position + 8 <= len(data) and data[position : position + 4] != DELIMITER:
        start, size = position + 8, int.from_bytes(data[position + 4 : position + 8], "little")
        position = start + size
        if data[start - 8 : start - 4] != ITEM or position > len(data):
            raise ImageRefusedError(
                "unreadable",
                f"the compressed pixels are cut short or damaged: there is no whole item at byte {start - 8}; "
                "copy the file again",
            )
        fragments.append(data[start:position])
    stream = b"".join(fragments[1:])  # the first item is the offset table
    return stream if syntax == uid.RLELossless else stream[: find_end(stream) or None]


def _read_open_pixel_data(path: Path, limit: int) -> bytes:
    """Return encapsulated pixel data without the delimiter at its end, b"" if there is none in the file."""
    with open_source(path) as file:
        content = file.read(MAX_HEADER_BYTES + limit)
    starts = [match.end() for match in OPEN_PIXEL_DATA.finditer(content)]  # those of icons come first
    return content[starts[-1] :] if starts else b""
