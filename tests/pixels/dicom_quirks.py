"""DICOM files as real exporters write them, each with one deviation from the plainest file."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from pydicom import Dataset, uid
from pydicom.encaps import encapsulate, encapsulate_extended
from test_dicom import ramp, write_dicom

GREY = ramp(0, 255, "u1")
WIDE = ramp()
RGB = np.repeat(GREY[..., None], 3, axis=2)
NEUTRAL = np.full_like(GREY, 128)
JPEG = bytes(imagecodecs.jpeg8_encode(WIDE, lossless=True, predictor=1, bitspersample=12))
JPEG_LS = bytes(imagecodecs.jpegls_encode(WIDE))
J2K = bytes(imagecodecs.jpeg2k_encode(WIDE, reversible=True, codecformat="j2k", bitspersample=12))
JP2 = bytes(imagecodecs.jpeg2k_encode(WIDE, reversible=True, codecformat="jp2", bitspersample=12))
DELIMITER = b"\xfe\xff\xdd\xe0" + bytes(4)
Write = Callable[[Path], Path]


def items(*fragments: bytes, offsets: bytes = b"") -> bytes:
    """Return encapsulated pixel data of these fragments, as they are."""
    return b"".join(b"\xfe\xff\x00\xe0" + len(part).to_bytes(4, "little") + part for part in (offsets, *fragments))


def encapsulated(data: bytes, syntax: str = uid.JPEGLosslessSV1, **tags: Any) -> Write:
    return lambda path: write_dicom(path, WIDE, syntax, **({"PixelData": data} | tags))


def native(pixels: np.ndarray = WIDE, syntax: str = uid.ExplicitVRLittleEndian, **tags: Any) -> Write:
    return lambda path: write_dicom(path, pixels, syntax, **tags)


def colour(data: bytes, photometric: str, planar: int = 0, **tags: Any) -> Write:
    tags = {"SamplesPerPixel": 3, "PhotometricInterpretation": photometric, "PlanarConfiguration": planar} | tags
    return native(GREY, PixelData=data, **tags)


def patched(write: Write, change: Callable[[bytes], bytes]) -> Write:
    """Return a function that writes a file and changes its bytes."""

    def write_patched(path: Path) -> Path:
        content = write(path).read_bytes()
        changed = change(content)
        assert changed != content
        path.write_bytes(changed)
        return path

    return write_patched


def rle(planes: list[bytes], offsets: list[int] | None = None) -> bytes:
    """Return an RLE frame of these planes, each stored as literal runs."""
    segments = []
    for plane in planes:
        runs = b"".join(bytes([len(run) - 1]) + run for run in (plane[n : n + 128] for n in range(0, len(plane), 128)))
        segments.append(runs + b"\0" * (len(runs) % 2))
    starts = [64 + sum(map(len, segments[:n])) for n in range(len(segments))] if offsets is None else offsets
    return struct.pack("<16I", len(planes), *starts, *[0] * (15 - len(starts))) + b"".join(segments)


HIGH_PLANE, LOW_PLANE = (WIDE >> 8).astype("u1").tobytes(), (WIDE & 255).astype("u1").tobytes()
RLE = rle([HIGH_PLANE, LOW_PLANE])


def with_rle(frame: bytes, **tags: Any) -> Write:
    return encapsulated(items(frame), uid.RLELossless, **tags)


def palette(entries: np.ndarray, bits: int, first: int = 0) -> Write:
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name in ("Red", "Green", "Blue"):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = ("US", [len(entries), first, bits])
        tags[f"{name}PaletteColorLookupTableData"] = ("OW", entries.tobytes())
    return native(GREY, **tags)


def icon() -> Dataset:
    item = Dataset()
    item.Rows = item.Columns = 2
    item.PixelData = b"\0\1\2\3"
    item["PixelData"].VR = "OB"
    return item


def without_preamble(content: bytes) -> bytes:
    """Return the data set alone, without preamble and group 2."""
    return content[132 + 12 + int.from_bytes(content[140:144], "little") :]


def replace_vr(keyword_bytes: bytes, old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(keyword_bytes + old, keyword_bytes + new)


ROWS = b"\x28\0\x10\0"
PIXELS = b"\xe0\x7f\x10\0"
ODD = ramp(0, 255, "u1").ravel()[: 13 * 15].reshape(13, 15)
EXTENDED = encapsulate_extended([JPEG])
THIRD = len(JPEG) // 3 & ~1

QUIRKS: Mapping[str, Write] = {
    "one fragment, empty offset table": encapsulated(items(JPEG + b"\0" * (len(JPEG) % 2))),
    "one fragment, offset table": encapsulated(encapsulate([JPEG])),
    "a wrong offset table": encapsulated(items(JPEG, offsets=struct.pack("<I", 1234))),
    "an offset table of too many frames": encapsulated(items(JPEG, offsets=struct.pack("<3I", 0, 50, 100))),
    "three fragments": encapsulated(items(JPEG[:THIRD], JPEG[THIRD : 2 * THIRD], JPEG[2 * THIRD :])),
    "fragments of odd length": encapsulated(items(JPEG[:201], JPEG[201:502], JPEG[502:])),
    "an empty fragment at the end": encapsulated(items(JPEG, b"")),
    "an empty fragment at the start": encapsulated(items(b"", JPEG)),
    "an extended offset table": encapsulated(
        EXTENDED[0], ExtendedOffsetTable=EXTENDED[1], ExtendedOffsetTableLengths=EXTENDED[2]
    ),
    "no sequence delimiter": patched(encapsulated(items(JPEG)), lambda content: content.removesuffix(DELIMITER)),
    "zeros after the file": patched(encapsulated(items(JPEG)), lambda content: content + bytes(500)),
    "trailing padding": native(DataSetTrailingPadding=bytes(100)),
    "zeros after the end marker": encapsulated(items(JPEG + bytes(64))),
    "spaces after the end marker": encapsulated(items(JPEG + b" " * 64)),
    "garbage after the end marker": encapsulated(items(JPEG + bytes(range(1, 255)))),
    "the end marker twice": encapsulated(items(JPEG + b"\xff\xd9")),
    "no end marker": encapsulated(items(JPEG[:-2])),
    "JPEG-LS without end marker": encapsulated(items(JPEG_LS[:-2]), uid.JPEGLSLossless),
    "JPEG 2000 without end marker": encapsulated(items(J2K[:-2]), uid.JPEG2000Lossless),
    "garbage after JPEG-LS": encapsulated(items(JPEG_LS + bytes(range(1, 101))), uid.JPEGLSLossless),
    "garbage after JPEG 2000": encapsulated(items(J2K + bytes(range(1, 101))), uid.JPEG2000Lossless),
    "fill bytes before markers": encapsulated(items(JPEG[:2] + b"\xff\xff" + JPEG[2:])),
    "zeros before the stream": encapsulated(items(bytes(2) + JPEG)),
    "half of a stream": encapsulated(items(JPEG[: len(JPEG) // 2])),
    "JP2 in place of a codestream": encapsulated(items(JP2), uid.JPEG2000Lossless),
    "lossless J2K under the lossy syntax": encapsulated(items(J2K), uid.JPEG2000),
    "JPEG-LS under the lossy syntax": encapsulated(items(JPEG_LS), uid.JPEGLSNearLossless),
    "lossless JPEG under process 14": encapsulated(items(JPEG), uid.JPEGLossless),
    "lossless JPEG under extended": encapsulated(items(JPEG), uid.JPEGExtended12Bit),
    "JPEG-LS under lossless JPEG": encapsulated(items(JPEG_LS), uid.JPEGLosslessSV1),
    "J2K under lossless JPEG": encapsulated(items(J2K), uid.JPEGLosslessSV1),
    "JPEG under a native syntax": patched(
        encapsulated(items(JPEG)),
        lambda content: content.replace(b"1.2.840.10008.1.2.4.70", b"1.2.840.10008.1.2.1\0\0\0"),
    ),
    "native under lossless JPEG": patched(
        native(), lambda content: content.replace(b"\x14\x001.2.840.10008.1.2.1\0", b"\x16\x001.2.840.10008.1.2.4.70")
    ),
    "RLE": with_rle(RLE),
    "RLE with bytes after it": with_rle(RLE + b"\1\2\3\4"),
    "RLE of one segment too few": with_rle(rle([HIGH_PLANE])),
    "RLE of one segment too many": with_rle(rle([HIGH_PLANE, LOW_PLANE, LOW_PLANE])),
    "RLE with a wrong second offset": with_rle(rle([HIGH_PLANE, LOW_PLANE], [64, 80])),
    "RLE with a segment that is too long": with_rle(rle([HIGH_PLANE + bytes(50), LOW_PLANE + bytes(50)])),
    "RLE with a segment that is too short": with_rle(rle([HIGH_PLANE[:-100], LOW_PLANE[:-100]])),
    "explicit": native(),
    "implicit": native(syntax=uid.ImplicitVRLittleEndian),
    "deflated": native(syntax=uid.DeflatedExplicitVRLittleEndian),
    "big endian": native(syntax=uid.ExplicitVRBigEndian),
    "big endian, 8 bits in words": native(
        GREY, uid.ExplicitVRBigEndian, PixelData=("OW", GREY.view("<u2").astype(">u2").tobytes())
    ),
    "big endian, 8 bits in bytes": native(GREY, uid.ExplicitVRBigEndian, PixelData=("OB", GREY.tobytes())),
    "16 bits in bytes": native(PixelData=("OB", WIDE.tobytes())),
    "pixels of VR UN": native(PixelData=("UN", WIDE.tobytes())),
    "an odd number of bytes": native(ODD, PixelData=("OB", ODD.tobytes() + b"\0")),
    "an odd length": patched(
        native(ODD, PixelData=("OB", ODD.tobytes() + b"\0")),
        lambda content: content[:-1].replace(PIXELS + b"OB\0\0\xc4", PIXELS + b"OB\0\0\xc3"),
    ),
    "one byte too many": native(PixelData=WIDE.tobytes() + b"\0"),
    "a thousand bytes too many": native(PixelData=WIDE.tobytes() + bytes(1000)),
    "cut short": patched(native(), lambda content: content[:-1000]),
    "signed": native(ramp(-2048, 2047, "i2")),
    "signed, 12 bits without sign extension": native((ramp(-2048, 2047, "i2") & 4095).astype("i2")),
    "10 bits": native(ramp(0, 1023), BitsStored=10),
    "16 bits": native(ramp(0, 65535), BitsStored=16),
    "bits at the top of the word": native(WIDE << 4, HighBit=15),
    "bits in the middle of the word": native(WIDE << 2, HighBit=13),
    "BitsAllocated 32": native(WIDE.astype("u4"), BitsStored=32),
    "BitsAllocated 12": native(BitsAllocated=12, PixelData=bytes(40 * 52 * 3 // 2)),
    "BitsAllocated 1": native(BitsAllocated=1, BitsStored=1, PixelData=bytes(40 * 52 // 8)),
    "RGB": colour(RGB.tobytes(), "RGB"),
    "RGB in planes": colour(np.moveaxis(RGB, -1, 0).tobytes(), "RGB", 1),
    "YBR in planes": colour(np.stack([GREY, NEUTRAL, NEUTRAL]).tobytes(), "YBR_FULL", 1),
    "colours": colour(np.dstack([GREY, NEUTRAL, 255 - GREY]).tobytes(), "RGB"),
    "palette of 8 bits": palette(np.arange(255, -1, -1, dtype="u1"), 8),
    "palette of 16 bits": palette(np.arange(255, -1, -1, dtype="u2") * 257, 16),
    "palette of 8 bits in words": palette(np.arange(255, -1, -1, dtype="u2"), 8),
    "palette that starts at 16": palette(np.arange(240, dtype="u1"), 8, 16),
    "an icon before the pixels": native(IconImageSequence=[icon()]),
    "no preamble": patched(native(), lambda content: content[128:]),
    "no meta information": patched(native(syntax=uid.ImplicitVRLittleEndian), without_preamble),
    "explicit without meta information": patched(native(), without_preamble),
    "a wrong length of group 2": patched(native(), lambda content: content[:140] + b"\x10\0\0\0" + content[144:]),
    "implicit under the explicit syntax": patched(
        native(syntax=uid.ImplicitVRLittleEndian),
        lambda content: content.replace(b"UI\x12\x001.2.840.10008.1.2\0", b"UI\x14\x001.2.840.10008.1.2.1\0").replace(
            content[140:144], (int.from_bytes(content[140:144], "little") + 2).to_bytes(4, "little"), 1
        ),
    ),
    "explicit under the implicit syntax": patched(
        native(),
        lambda content: content.replace(b"UI\x14\x001.2.840.10008.1.2.1\0", b"UI\x14\x001.2.840.10008.1.2\0\0\0"),
    ),
    "Rows of VR SS": patched(native(), replace_vr(ROWS, b"US", b"SS")),
    "NumberOfFrames 1": native(NumberOfFrames=1),
    "NumberOfFrames 0": native(NumberOfFrames=0),
    "NumberOfFrames 2": native(NumberOfFrames=2, PixelData=WIDE.tobytes() * 2),
    "SamplesPerPixel missing": native(SamplesPerPixel=None),
    "a syntax that does not exist": patched(
        native(), lambda content: content.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0")
    ),
}
