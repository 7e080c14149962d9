"""Open pictures of mammograms (PNG, JPEG, TIFF, JPEG 2000, BMP, PGM): greyscale, one page, 8 or 16 bits.

They are read as brighter = denser.
"""

from __future__ import annotations

import functools
import io
import struct
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.decoding import MAX_PIXELS, read_jpeg2000_header, read_jpeg_header
from vitmodel.pixels.header import ImageHeader
from vitmodel.pixels.pgm import decode_pgm, read_pgm_header
from vitmodel.pixels.verdict import ImageWarning

HEAD_BYTES = 1 << 20
"""Bytes in which the size is searched; in a JPEG it may follow a colour profile and a thumbnail."""
PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
"""Number of channels of each PNG colour type; a palette is decoded to three."""
JP2_SIGNATURE = b"\0\0\0\x0cjP  \r\n\x87\n"
CODESTREAM_START = b"\xff\x4f\xff\x51"
"""First two markers of a JPEG 2000 codestream, which a JP2 file contains after its boxes."""
PICTURE_STARTS = (
    *(b"\x89PNG", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM", JP2_SIGNATURE, CODESTREAM_START),
    *(kind + space for kind in (b"P2", b"P5") for space in (b" ", b"\n", b"\r", b"\t", b"#")),
)
"""First bytes of the supported picture files."""
END_MARKERS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}
"""End marker of the formats that have one, by their first two bytes."""
CHANNEL_TOLERANCE = 2
"""Greatest difference of the channels of a grey JPEG after its colour transform, in grey levels of 255."""


class RasterFile:
    """A picture as an `ImageFile`.

    A wrong polarity is not detected here but in `crop.find_breast`, from the surroundings of the breast.

    Args:
        path: A PNG, JPEG, TIFF, JPEG 2000, BMP or PGM file.

    Raises:
        ImageRefusedError: The file is missing, damaged, cut short or too large.
    """

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
            raise ImageRefusedError("missing_file", f"{path} does not exist; correct the path") from None
        except OSError as error:
            raise ImageRefusedError(
                "unreadable", f"{path} cannot be read ({error.strerror}); check its permissions"
            ) from None
        if rows * columns * samples > MAX_PIXELS:
            raise ImageRefusedError(
                "too_large",
                f"the picture has {rows} x {columns} pixels of {samples} values, more than {MAX_PIXELS} in total; "
                "save it at a lower resolution",
            )
        if size > HEAD_BYTES + 6 * rows * columns * samples:  # the values as text, as in PGM: five digits and a space
            raise ImageRefusedError(
                "too_large",
                f"the file has {size} bytes, far more than its {rows} x {columns} picture needs; save it again",
            )
        if END_MARKERS.get(head, b"") not in tail:
            raise ImageRefusedError(
                "unreadable", "the picture is cut short: its end marker is missing; copy the file again"
            )
        lossy = ImageWarning("lossy", "the picture is a JPEG, compressed with loss")
        warnings = (lossy,) if head == b"\xff\xd8" else ()
        self._format = head
        self.header = ImageHeader(
            rows, columns, bits, photometric="MONOCHROME2", transfer_syntax="", voi="full", warnings=warnings
        )

    def read_stored(self, level: int = 0) -> np.ndarray:
        """Return the picture as uint8 or uint16 `(H, W)`; `level` must be 0.

        Raises:
            ImageRefusedError: The picture is damaged, in colour or has several pages.
        """
        if level:
            raise ValueError(f"level must be 0, not {level}: a picture has no reduced resolutions")
        return self._pixels

    def to_grey(self, stored: np.ndarray) -> np.ndarray:
        """Return values of the picture, or averages of them, as float32 in [0, 1]."""
        return np.clip(stored.astype(np.float32) / self._white, 0, 1)

    @functools.cached_property
    def _white(self) -> int:
        """The value that is shown white: the greatest one that the header of a PGM file, or else the type, allows."""
        if self._format in (b"P2", b"P5"):
            with self.path.open("rb") as file:
                return read_pgm_header(file.read(HEAD_BYTES)).maximum
        return int(np.iinfo(self._pixels.dtype).max)

    @functools.cached_property
    def _pixels(self) -> np.ndarray:
        """The decoded picture, `(H, W)`."""
        try:  # UNCHANGED also ignores the orientation in an EXIF tag
            if self._format in (b"P2", b"P5"):
                return decode_pgm(self.path.read_bytes())
            pixels = cv2.imread(str(self.path), cv2.IMREAD_UNCHANGED)
            pages = cv2.imcount(str(self.path))
        except ValueError as error:
            raise ImageRefusedError("undecodable", f"the picture cannot be read: {error}; save it again") from None
        except cv2.error as error:
            raise ImageRefusedError(
                "undecodable", f"OpenCV cannot decode the picture ({error.err}); save it again"
            ) from None
        if pixels is None:
            raise ImageRefusedError(
                "undecodable", "OpenCV cannot decode the picture: it is damaged or cut short; copy the file again"
            )
        if pages > 1:
            raise ImageRefusedError("multi_frame", f"the file contains {pages} pictures instead of one; split it")
        if pixels.dtype not in (np.uint8, np.uint16):
            raise ImageRefusedError(
                "undecodable",
                f"the pixel type of the picture is {pixels.dtype}; save it with unsigned integers of 8 or 16 bits",
            )
        if pixels.shape[:2] != (self.header.rows, self.header.columns):
            raise ImageRefusedError(
                "bad_header",
                f"the picture has {pixels.shape[0]} x {pixels.shape[1]} pixels, "
                f"but its header states {self.header.rows} x {self.header.columns}; save it again",
            )
        return single_channel(pixels)


def single_channel(pixels: np.ndarray) -> np.ndarray:
    """Return the grey channel of an image whose colour channels agree; an alpha channel is ignored.

    Args:
        pixels: The image, `(H, W)` or `(H, W, C)`.

    Returns:
        The grey values `(H, W)`.

    Raises:
        ImageRefusedError: The colour channels differ.
    """
    if pixels.ndim == 2:
        return pixels
    channels = list(cv2.split(pixels))
    blue, green, red = channels[:3] if len(channels) > 2 else channels[:1] * 3
    tolerance = CHANNEL_TOLERANCE * np.iinfo(pixels.dtype).max // 255
    if max(cv2.absdiff(green, blue).max(), cv2.absdiff(green, red).max()) > tolerance:
        raise ImageRefusedError(
            "colour", "the picture is in colour: its red, green and blue differ; save the original in greyscale"
        )
    return green


def read_size(file: BinaryIO) -> tuple[int, int, int, int]:
    """Return rows, columns, bits per channel and number of channels from the header of a file.

    Raises:
        ImageRefusedError: The header is damaged.
    """
    head = file.read(HEAD_BYTES)
    try:
        if head.startswith(b"\x89PNG"):
            width, height, bits, colour = struct.unpack_from(">IIBB", head, 16)
            return height, width, max(bits, 8), PNG_CHANNELS[colour]
        if head.startswith(b"\xff\xd8"):
            frame = read_jpeg_header(head + file.read(4 * MAX_PIXELS))
            return frame.rows, frame.columns, frame.precision, frame.components
        if head.startswith((b"P2", b"P5")):
            pgm = read_pgm_header(head)
            return pgm.rows, pgm.columns, 8 if pgm.maximum < 256 else 16, 1
        if head.startswith((JP2_SIGNATURE, CODESTREAM_START)):
            frame = read_jpeg2000_header(head[head.index(CODESTREAM_START) :])
            return frame.rows, frame.columns, max(frame.precision, 8), frame.components
        if head.startswith(b"BM"):
            return read_bmp_size(head)
        return read_tiff_size(file)
    except (ValueError, IndexError, KeyError, struct.error):
        raise ImageRefusedError(
            "unreadable", "the header of the picture is damaged or cut short; copy the file again"
        ) from None


def read_bmp_size(head: bytes) -> tuple[int, int, int, int]:
    """Return the same as `read_size` from the header of a BMP file.

    Raises:
        struct.error: The file is cut short.
    """
    if struct.unpack_from("<I", head, 14)[0] == 12:  # BITMAPCOREHEADER of OS/2
        width, height = struct.unpack_from("<HH", head, 18)
    else:
        width, height = struct.unpack_from("<ii", head, 18)  # a negative height stores the top row first
    return abs(height), abs(width), 8, 3


def read_tiff_size(file: BinaryIO) -> tuple[int, int, int, int]:
    """Return the same as `read_size` from the first directory of a TIFF file (TIFF 6.0, section 2).

    Raises:
        KeyError: The directory does not state the size.
        struct.error: The file is cut short.
    """
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
