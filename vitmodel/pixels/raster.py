"""PNG, JPEG and TIFF pictures of mammograms: grey, one page, 8 or 16 bits, taken as brighter = denser. Knows no crop."""

from __future__ import annotations

import functools
import io
import struct
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.decoding import MAX_PIXELS, read_jpeg_header
from vitmodel.pixels.header import ImageHeader
from vitmodel.pixels.verdict import ImageWarning

HEAD_BYTES = 1 << 20
"""Enough for the size to be found in; a JPEG's may stand behind a colour profile and a thumbnail."""
PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
"""By colour type; a palette becomes three."""
CHANNEL_TOLERANCE = 2
"""By how many of 255 grey levels the channels of a grey JPEG may differ after its colour transform."""


class RasterFile:
    """One picture as an `ImageFile`. A wrong polarity is not known here: the breast's surroundings tell it."""

    levels = 0
    decoder = "opencv"

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                rows, columns, bits, samples = read_size(file)
                file.seek(0)
                head = file.read(2)
                size = file.seek(0, io.SEEK_END)
                file.seek(max(0, size - 4096))
                tail = file.read()
        except FileNotFoundError:
            raise ImageRefusedError("missing_file", f"{path} does not exist") from None
        except OSError as error:
            raise ImageRefusedError("unreadable", f"{path} cannot be read: {error.strerror}") from None
        if rows * columns * samples > MAX_PIXELS:
            raise ImageRefusedError("too_large", f"the picture is {rows} x {columns} with {samples} values a pixel")
        if size > HEAD_BYTES + 4 * rows * columns * samples:  # twice what it needs without any compression
            raise ImageRefusedError(
                "too_large", f"the file has {size} bytes, many times those of its {rows} x {columns} picture"
            )
        if {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}.get(head, b"") not in tail:
            raise ImageRefusedError("unreadable", "the picture is cut short: its end marker is missing")
        warnings = (ImageWarning("lossy", "the picture is a JPEG"),) if head == b"\xff\xd8" else ()
        self.header = ImageHeader(
            rows, columns, bits, photometric="MONOCHROME2", transfer_syntax="", voi="full", warnings=warnings
        )

    def read_stored(self, level: int = 0) -> np.ndarray:
        """The picture as uint8 or uint16, H W; only `level` 0. Raises ImageRefusedError."""
        if level:
            raise ValueError(f"level {level} is not 0")
        return self._pixels

    def to_grey(self, stored: np.ndarray) -> np.ndarray:
        """Values of the picture, whole or averaged, as float32 in [0, 1] of its type's range."""
        return np.clip(stored.astype(np.float32) / np.iinfo(self._pixels.dtype).max, 0, 1)

    @functools.cached_property
    def _pixels(self) -> np.ndarray:
        try:  # UNCHANGED also leaves the orientation that a camera's EXIF tag asks for alone
            pixels = cv2.imread(str(self.path), cv2.IMREAD_UNCHANGED)
            pages = cv2.imcount(str(self.path))
        except cv2.error as error:
            raise ImageRefusedError("undecodable", f"OpenCV cannot decode the picture: {error.err}") from None
        if pixels is None:
            raise ImageRefusedError("undecodable", "OpenCV cannot decode the picture: it is damaged or cut short")
        if pages > 1:
            raise ImageRefusedError("multi_frame", f"the file holds {pages} pictures")
        if pixels.dtype not in (np.uint8, np.uint16):
            raise ImageRefusedError("undecodable", f"the picture's values are {pixels.dtype}, not 8 or 16 bits")
        if pixels.shape[:2] != (self.header.rows, self.header.columns):
            raise ImageRefusedError(
                "bad_header",
                f"the picture is {pixels.shape[:2]}, its header says {self.header.rows, self.header.columns}",
            )
        return single_channel(pixels)


def single_channel(pixels: np.ndarray) -> np.ndarray:
    """H W [C] as H W where the colour channels agree; an alpha channel does not count. Raises ImageRefusedError."""
    if pixels.ndim == 2:
        return pixels
    blue, green, red = cv2.split(pixels)[:3] if pixels.shape[2] > 2 else [cv2.split(pixels)[0]] * 3
    tolerance = CHANNEL_TOLERANCE * np.iinfo(pixels.dtype).max // 255
    if max(cv2.absdiff(green, blue).max(), cv2.absdiff(green, red).max()) > tolerance:
        raise ImageRefusedError("colour", "the picture's red, green and blue differ")
    return green


def read_size(file: BinaryIO) -> tuple[int, int, int, int]:
    """Rows, columns, bits of a channel and channels from a file's header. Raises ImageRefusedError."""
    head = file.read(HEAD_BYTES)
    try:
        if head.startswith(b"\x89PNG"):
            width, height, bits, colour = struct.unpack_from(">IIBB", head, 16)
            return height, width, max(bits, 8), PNG_CHANNELS[colour]
        if head.startswith(b"\xff\xd8"):
            frame = read_jpeg_header(head + file.read(4 * MAX_PIXELS))
            return frame.rows, frame.columns, frame.precision, frame.components
        return read_tiff_size(file)
    except (ValueError, IndexError, KeyError, struct.error):
        raise ImageRefusedError("unreadable", "the picture's header cannot be read") from None


def read_tiff_size(file: BinaryIO) -> tuple[int, int, int, int]:
    """The same of a TIFF's first directory (TIFF 6.0, section 2). Raises KeyError and struct.error."""
    file.seek(0)
    order = "<" if file.read(4).startswith(b"II") else ">"
    file.seek(*struct.unpack(order + "I", file.read(4)))
    (count,) = struct.unpack(order + "H", file.read(2))
    fields = {}
    for _ in range(count):
        tag, kind, number = struct.unpack(order + "HHI", file.read(8))
        value = file.read(4)
        if number == 1:
            (fields[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), value)
    return fields[257], fields[256], max(fields.get(258, 8), 8), fields.get(277, 1)
