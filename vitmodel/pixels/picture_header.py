"""Read the header of a picture file (PNG, JPEG, TIFF, JPEG 2000, BMP, PGM) without decoding it."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import BinaryIO, Literal

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.codestream import marker_segments, read_jpeg2000_header, read_jpeg_header
from vitmodel.pixels.pgm import read_pgm_header
from vitmodel.pixels.pixel_format import MAX_PIXELS
from vitmodel.pixels.tiff import (
    PALETTE,
    TIFF_STARTS,
    WHITE_IS_ZERO,
    read_exif_orientation,
    read_tiff_page,
)

HEAD_BYTES = 1 << 20
"""Bytes in which the size is searched; in a JPEG it may follow a colour profile and a thumbnail."""
PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
"""Number of channels of each PNG colour type; a palette is decoded to three."""
CODESTREAM_START = b"\xff\x4f\xff\x51"
"""First two markers of a JPEG 2000 codestream, which a JP2 file contains after its boxes."""

PictureFormat = Literal["PNG", "JPEG", "TIFF", "JPEG 2000", "BMP", "PGM"]
STARTS: dict[PictureFormat, tuple[bytes, ...]] = {
    "PNG": (b"\x89PNG",),
    "JPEG": (b"\xff\xd8\xff",),
    "TIFF": TIFF_STARTS,
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", CODESTREAM_START),
    "BMP": (b"BM",),
    "PGM": tuple(kind + space for kind in (b"P2", b"P5") for space in (b" ", b"\n", b"\r", b"\t", b"#")),
}
"""First bytes of each format."""
END_MARKERS: dict[PictureFormat, bytes] = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "JPEG 2000": b"\xff\xd9"}
"""End marker of the formats that have one."""
UNSUPPORTED_STARTS = {
    b"\x93NUMPY": "a NumPy array",
    b"GIF8": "a GIF picture",
    b"\xff\x0a": "a JPEG XL picture",
    b"\0\0\0\x0cJXL ": "a JPEG XL picture",
    b"II\xbc": "a JPEG XR picture",
    b"8BPS": "a Photoshop document",
    b"v/1\x01": "an OpenEXR picture",
    b"%PDF": "a PDF document",
    b"SIMPLE  =": "a FITS image",
    b"ObjectType =": "a MetaImage",
    b"NDims =": "a MetaImage",
    b"NRRD": "an NRRD image",
    b"\x89HDF": "an HDF5 file",
    b"\x5c\x01\0\0": "a NIfTI image",
    b"\0\0\x01\x5c": "a NIfTI image",
    b"P1\n": "a bitmap of Netpbm (PBM)",
    b"P3\n": "a colour picture of Netpbm (PPM)",
    b"P4\n": "a bitmap of Netpbm (PBM)",
    b"P6\n": "a colour picture of Netpbm (PPM)",
    b"P7\n": "a picture of Netpbm (PAM)",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a compressed file (gzip)",
}
"""First bytes of known formats that are not read."""


@dataclass(frozen=True)
class PictureHeader:
    """The header of a picture file.

    Attributes:
        format: The file format.
        rows: Height in pixels as stored.
        columns: Width in pixels as stored.
        bits: Bits per channel, at least 8.
        channels: Number of channels.
        orientation: How viewers turn the picture (TIFF 6.0 and EXIF, tag 274): 1 = as stored.
        page: Number of the page in a TIFF file.
        white_is_zero: Whether small values are bright.
        maximum: The value that is shown white, if the file states it; else 0.
        palette: Whether the values are indices of a palette (of a TIFF file; other formats are decoded to colours).
    """

    format: PictureFormat
    rows: int
    columns: int
    bits: int
    channels: int
    orientation: int = 1
    page: int = 0
    white_is_zero: bool = False
    maximum: int = 0
    palette: bool = False


def picture_format(start: bytes) -> PictureFormat | None:
    """Return the format of a picture file from its first bytes; None if it is not a supported picture."""
    return next((name for name, starts in STARTS.items() if start.startswith(starts)), None)


def unsupported_format(start: bytes) -> str:
    """Return the name of a known format that is not read, from the first bytes of the file; '' if it is unknown."""
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "a WebP picture"
    if start[4:12] in (b"ftypheic", b"ftypmif1", b"ftypavif", b"ftypheix"):
        return "a HEIF picture"
    return next((name for magic, name in UNSUPPORTED_STARTS.items() if start.startswith(magic)), "")


def read_picture_header(file: BinaryIO) -> PictureHeader:
    """Return the header of a picture file.

    Raises:
        ImageRefusedError: The header is damaged, or the file contains several pictures.
    """
    file.seek(0)
    head = file.read(HEAD_BYTES)
    try:
        match picture_format(head):
            case "PNG":
                return _png_header(head)
            case "JPEG":
                return _jpeg_header(head, file)
            case "JPEG 2000":
                frame = read_jpeg2000_header(head[head.index(CODESTREAM_START) :])
                return PictureHeader("JPEG 2000", frame.rows, frame.columns, max(frame.precision, 8), frame.components)
            case "BMP":
                return _bmp_header(head)
            case "PGM":
                pgm = read_pgm_header(head)
                return PictureHeader(
                    "PGM", pgm.rows, pgm.columns, 8 if pgm.maximum < 256 else 16, 1, maximum=pgm.maximum
                )
            case _:
                return _tiff_header(file)
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        reason = f" ({error})" if isinstance(error, ValueError) else ""
        raise ImageRefusedError(
            "unreadable", f"the header of the picture is damaged or cut short{reason}; copy the file again"
        ) from None


def _png_header(head: bytes) -> PictureHeader:
    """Return the header of a PNG file; the orientation is in the eXIf chunk before the pixels, if there is one."""
    width, height, bits, colour = struct.unpack_from(">IIBB", head, 16)
    orientation = 1
    position = 33
    while position + 8 <= len(head):
        length, name = struct.unpack_from(">I4s", head, position)
        if name == b"eXIf":
            orientation = read_exif_orientation(head[position + 8 : position + 8 + length])
        elif name == b"acTL" and length >= 4:
            (frames,) = struct.unpack_from(">I", head, position + 8)
            if frames > 1:
                raise ImageRefusedError("multi_frame", f"the file contains {frames} pictures instead of one; split it")
        elif name == b"IDAT":
            break
        position += length + 12
    return PictureHeader("PNG", height, width, max(bits, 8), PNG_CHANNELS[colour], orientation)


def _jpeg_header(head: bytes, file: BinaryIO) -> PictureHeader:
    """Return the header of a JPEG file, of which `head` has been read."""
    frame = read_jpeg_header(head + file.read(4 * MAX_PIXELS))
    orientation = 1
    for marker, payload in marker_segments(head):
        if marker == 0xE1 and bytes(payload[:6]) == b"Exif\0\0":
            orientation = read_exif_orientation(bytes(payload[6:]))
        if marker == 0xDA or orientation != 1:
            break
    return PictureHeader("JPEG", frame.rows, frame.columns, frame.precision, frame.components, orientation)


def _bmp_header(head: bytes) -> PictureHeader:
    """Return the header of a BMP file."""
    if struct.unpack_from("<I", head, 14)[0] == 12:  # BITMAPCOREHEADER of OS/2
        width, height = struct.unpack_from("<HH", head, 18)
    else:
        width, height = struct.unpack_from("<ii", head, 18)  # a negative height stores the top row first
    return PictureHeader("BMP", abs(height), abs(width), 8, 3)


def _tiff_header(file: BinaryIO) -> PictureHeader:
    """Return the header of a TIFF file.

    Raises:
        ImageRefusedError: The pixels of the page are cut short.
    """
    page = read_tiff_page(file)
    if page.end > file.seek(0, io.SEEK_END):
        raise ImageRefusedError("unreadable", "the picture is cut short: its last strips are missing; copy it again")
    return PictureHeader(
        "TIFF",
        page.rows,
        page.columns,
        max(page.bits, 8),
        page.samples,
        page.orientation,
        page.number,
        white_is_zero=page.photometric == WHITE_IS_ZERO,
        palette=page.photometric == PALETTE,
    )
