"""From a frame's bytes to its stored pixels, for every transfer syntax, at a resolution level. Knows no meaning of any pixel.

The first decoder of a syntax is the fast one; one after it is the fallback. A golden table in the tests holds them, and peers
that this package does not use, to the same pixels.

Why no others: on frames damaged at random gdcm aborts the process (JPEG), OpenJPH crashes or hangs (HTJ2K) and imagecodecs
returns its half-filled images, imagecodecs' own decoder crashes (RLE); pydicom unpacks runs far beyond the stated size (RLE).
Those used here survived 8,000 mutants each. OpenJPH, two to four times as fast as OpenJPEG, writes our HTJ2K copies and reads nothing.

Known disagreements:
- Damage in the middle of a JPEG stream: libjpeg fills what is missing with grey, without an error that Python can see. A stream
  that is cut short has lost its end marker, which is checked here for every codec.
- JPEG Extended with 12 bits: libjpeg-turbo and DCMTK read it, gdcm and Pillow do not.
- Lossy HTJ2K: OpenJPH and OpenJPEG round differently, by 2 of 65535 at most.
- Sign: JPEG and RLE carry none, and JPEG 2000 encoders often write signed pixels as unsigned. The header's sign counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import imagecodecs
import numpy as np
import openjpeg as pylibjpeg_openjpeg
import rle as pylibjpeg_rle
from jpeg_ls import decode_buffer as pyjpegls_decode
from pydicom import uid
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels import openjpeg

Bytes = bytes | memoryview

MAX_PIXELS = 100_000_000
"""More than any mammogram: film of 24 x 30 cm scanned at 30 um has 80 million."""
MAX_CODESTREAM_HEADER = 1 << 20
"""Bytes in which a codestream's main header must lie."""
MAX_BLOCKS = 500_000
"""Of JPEG 2000: precincts and code blocks cost OpenJPEG up to 1.4 kB each, and the header alone can ask for 25 million of them."""
MAX_SCANS = 32
"""Of a JPEG: progressive ones have a dozen; each costs a pass over the whole image, though it may say nothing in a few bytes."""


@dataclass(frozen=True)
class PixelFormat:
    """How the header says that pixels are stored (PS3.3 C.7.6.3)."""

    syntax: str
    rows: int
    columns: int
    bits_allocated: int = 16
    bits_stored: int = 12
    signed: bool = False
    photometric: str = "MONOCHROME2"
    overlay_bits: bool = False
    """Overlay planes lie in the unused high bits (retired from the standard, found in old files)."""

    @property
    def dtype(self) -> np.dtype:
        """The type of stored values: int or uint of 8 or 16 bits."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.bits_allocated // 8}")

    @property
    def unsigned_dtype(self) -> np.dtype:
        """The unsigned type of the same size."""
        return np.dtype(f"u{self.bits_allocated // 8}")


class CodestreamHeader(NamedTuple):
    """What a compressed frame says about itself."""

    rows: int
    columns: int
    components: int
    precision: int
    signed: bool = False
    levels: int = 0
    """Resolution levels that a decoder may leave out."""
    blocks: int = 0
    """Pieces of JPEG 2000, see `count_blocks`."""


class Decoder(NamedTuple):
    """A named way from bytes to H W values of any integer type; `supports_levels` says that it can leave out resolution levels itself."""

    name: str
    decode: Callable[[bytes, PixelFormat, int], np.ndarray]
    supports_levels: bool = False


def pydicom_decoder(plugin: str) -> Callable[[bytes, PixelFormat, int], np.ndarray]:
    """One of pydicom's decoders of compressed frames by the name of its plugin."""

    def decode(frame: bytes, pixel_format: PixelFormat, level: int) -> np.ndarray:
        options: dict[str, Any] = {
            "rows": pixel_format.rows,
            "columns": pixel_format.columns,
            "number_of_frames": 1,
            "samples_per_pixel": 1,
            "bits_allocated": pixel_format.bits_allocated,
            "bits_stored": pixel_format.bits_stored,
            "pixel_representation": int(pixel_format.signed),
            "photometric_interpretation": pixel_format.photometric,
            "pixel_keyword": "PixelData",
            "pixel_vr": "OW" if pixel_format.bits_allocated > 8 else "OB",
            "decoding_plugin": plugin,
        }
        return get_decoder(uid.UID(pixel_format.syntax)).as_array(encapsulate([frame]), raw=True, **options)[0]

    return decode


def native(frame: bytes, pixel_format: PixelFormat, level: int) -> np.ndarray:
    """Uncompressed pixels; pydicom would wrap values that a wrong BitsStored does not foresee."""
    dtype = pixel_format.unsigned_dtype.newbyteorder(">" if pixel_format.syntax == uid.ExplicitVRBigEndian else "<")
    return np.frombuffer(frame, dtype).reshape(pixel_format.rows, pixel_format.columns)


def rle(frame: bytes, pixel_format: PixelFormat, level: int) -> np.ndarray:
    """RLE by pylibjpeg-rle. Raises ValueError."""
    try:
        data = pylibjpeg_rle.decode_pixel_data(
            frame,
            version=2,
            rows=pixel_format.rows,
            columns=pixel_format.columns,
            bits_allocated=pixel_format.bits_allocated,
        )
    except BaseException as error:  # its Rust code panics on damage, and that is deliberately no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from None
    return np.frombuffer(data, pixel_format.unsigned_dtype.newbyteorder("<")).reshape(
        pixel_format.rows, pixel_format.columns
    )


def jpegls(frame: bytes, pixel_format: PixelFormat, level: int) -> np.ndarray:
    """JPEG-LS by pyjpegls."""
    data, info = pyjpegls_decode(frame)
    return np.frombuffer(data, "<u2" if info["bits_per_sample"] > 8 else "u1").reshape(info["height"], info["width"])


NATIVE = (Decoder("numpy", native),)
RLE = (Decoder("pylibjpeg-rle", rle),)
JPEG = (Decoder("libjpeg-turbo", lambda frame, pixel_format, level: imagecodecs.jpeg8_decode(frame)),)
JPEG_LS = (
    Decoder("charls", lambda frame, pixel_format, level: imagecodecs.jpegls_decode(frame)),
    Decoder("pyjpegls", jpegls),
)
OPENJPEG = Decoder("openjpeg", lambda frame, pixel_format, level: openjpeg.decode(frame, level), supports_levels=True)
PYLIBJPEG_OPENJPEG = Decoder("pylibjpeg-openjpeg", lambda frame, pixel_format, level: pylibjpeg_openjpeg.decode(frame))
J2K = (OPENJPEG, PYLIBJPEG_OPENJPEG)
HTJ2K = (uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)

DECODERS: dict[str, tuple[Decoder, ...]] = {
    uid.ImplicitVRLittleEndian: NATIVE,
    uid.ExplicitVRLittleEndian: NATIVE,
    uid.DeflatedExplicitVRLittleEndian: NATIVE,
    uid.ExplicitVRBigEndian: NATIVE,
    uid.RLELossless: RLE,
    uid.JPEGBaseline8Bit: JPEG,
    uid.JPEGExtended12Bit: JPEG,
    uid.JPEGLossless: JPEG,
    uid.JPEGLosslessSV1: JPEG,
    uid.JPEGLSLossless: JPEG_LS,
    uid.JPEGLSNearLossless: JPEG_LS,
    uid.JPEG2000Lossless: J2K,
    uid.JPEG2000: J2K,
    **dict.fromkeys(HTJ2K, J2K),
}
GIL_BOUND_SYNTAXES = (uid.RLELossless,)
"""Syntaxes whose decoder keeps the interpreter's lock: two threads are 1.4 times as fast as one there, 1.7 to 2 times elsewhere."""


def grid_offset(level: int) -> float:
    """How far, in reduced pixels, a reduced image lies right of and below where 2^level x 2^level areas would put it.

    Sample k of the wavelet's low band at `level` lies on full-size pixel k * 2^level exactly (ITU-T T.800 Annex F), not at the
    middle of an area. With pixel k's centre at k + 0.5: x_reduced = x_full / 2^level + grid_offset(level).
    """
    return 0.5 - 0.5 / 2**level


def available_levels(frame: bytes, pixel_format: PixelFormat) -> int:
    """How many resolution levels `decode` may leave out of this frame. Raises ImageRefusedError."""
    if DECODERS[pixel_format.syntax] is not J2K or openjpeg.load_library() is None:
        return 0
    stream = read_codestream_header(frame, pixel_format)
    return stream.levels if stream.signed == pixel_format.signed else 0  # -1 written as 65535 would be averaged with 0


def decode(frame: bytes, pixel_format: PixelFormat, level: int = 0) -> tuple[np.ndarray, str]:
    """A frame's bit patterns, unsigned H W at 2^-level of the size, rounded up, and the decoder's name. Raises ImageRefusedError."""
    decoders = DECODERS[pixel_format.syntax]
    if decoders is not NATIVE and decoders is not RLE:
        read_codestream_header(frame, pixel_format)
    problems = []
    for decoder in decoders:
        try:
            return decode_with(decoder, frame, pixel_format, level), decoder.name
        except Exception as error:  # noqa: BLE001 - the decoder boundary: C libraries and their wrappers raise anything on damaged bytes
            problems.append(f"{decoder.name}: {error}")
    raise ImageRefusedError(
        "undecodable", f"no decoder can read the {uid.UID(pixel_format.syntax).name} pixels ({'; '.join(problems)})"
    )


def decode_with(decoder: Decoder, frame: bytes, pixel_format: PixelFormat, level: int = 0) -> np.ndarray:
    """`decode` by one decoder, whatever it raises."""
    step = 1 << level
    pixels = decoder.decode(frame, pixel_format, level)
    if level and not decoder.supports_levels:  # put the full image on the grid of the reduced one, see grid_offset
        pixels = cv2.blur(np.ascontiguousarray(pixels), (step + 1, step + 1))[::step, ::step]
    expected = -(-pixel_format.rows // step), -(-pixel_format.columns // step)
    if pixels.shape != expected:
        raise ValueError(f"{pixels.shape} pixels, not {expected}")
    patterns = pixels.astype(pixel_format.unsigned_dtype, copy=False)
    precision = (
        pixel_format.bits_allocated
        if DECODERS[pixel_format.syntax] in (NATIVE, RLE)
        else read_codestream_header(frame, pixel_format).precision
    )
    if precision == pixel_format.bits_allocated:
        return patterns
    return np.bitwise_and(patterns, (1 << precision) - 1, out=patterns if patterns.flags.writeable else None)


def to_stored_values(patterns: np.ndarray, pixel_format: PixelFormat) -> tuple[np.ndarray, str]:
    """Bit patterns as stored values of the header's type, and a sentence on what was assumed, '' for nothing.

    Unused high bits are undefined in old files: sign-extended or not, holding overlays, or used after all (a wrong BitsStored).
    """
    if pixel_format.bits_stored == pixel_format.bits_allocated or patterns.size == 0:
        return patterns.view(pixel_format.dtype), ""
    limit = 1 << pixel_format.bits_stored
    if pixel_format.overlay_bits:
        patterns = patterns & (limit - 1)
    if not pixel_format.signed:
        largest = int(patterns.max())
        return (
            patterns,
            f"values reach {largest} though BitsStored is {pixel_format.bits_stored}; they are kept"
            if largest >= limit
            else "",
        )
    values = patterns.view(pixel_format.dtype)
    half = limit // 2
    if -half <= values.min() and values.max() < half:
        return values, ""
    if patterns.max() < limit:  # two's complement of BitsStored bits
        return (patterns ^ half).view(pixel_format.dtype) - pixel_format.dtype.type(half), ""
    return (
        values,
        f"values reach {values.min()} and {values.max()} though BitsStored is {pixel_format.bits_stored}; they are kept",
    )


def read_codestream_header(frame: bytes, pixel_format: PixelFormat) -> CodestreamHeader:
    """The header of a JPEG, JPEG-LS or JPEG 2000 stream, checked against the file's. Raises ImageRefusedError."""
    try:
        start = frame.find(
            b"\xff\x4f\xff\x51", 0, MAX_CODESTREAM_HEADER
        )  # within a JP2 file's boxes where an encoder left them
        stream = (
            read_jpeg2000_header(memoryview(frame)[start : start + MAX_CODESTREAM_HEADER])
            if start >= 0
            else read_jpeg_header(frame)
        )
    except (IndexError, ValueError):
        raise ImageRefusedError("undecodable", "the compressed pixels have no readable header") from None
    if b"\xff\xd9" not in frame[-8:]:  # libjpeg would fill the rest with grey and say nothing
        raise ImageRefusedError("undecodable", "the compressed pixels are cut short: their end marker is missing")
    if stream.components != 1:
        raise ImageRefusedError("colour", f"the compressed pixels have {stream.components} components")
    if (stream.rows, stream.columns) != (pixel_format.rows, pixel_format.columns):
        said = f"Rows x Columns say {pixel_format.rows} x {pixel_format.columns}"
        raise ImageRefusedError("bad_header", f"{said}, the compressed pixels {stream.rows} x {stream.columns}")
    if stream.precision > pixel_format.bits_allocated:
        raise ImageRefusedError(
            "bad_header",
            f"BitsAllocated is {pixel_format.bits_allocated}, the compressed pixels have {stream.precision} bits",
        )
    if stream.blocks > MAX_BLOCKS:
        raise ImageRefusedError("too_large", f"the compressed pixels are cut into more than {MAX_BLOCKS} blocks")
    return stream


def marker_segments(frame: Bytes) -> Iterator[tuple[int, Bytes]]:
    """Marker and payload of each segment after the start-of-image marker, up to the entropy-coded data."""
    at = 2
    while frame[at] == 0xFF:
        marker, size = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4])
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        yield marker, frame[at + 4 : at + 2 + size]
        at += 2 + max(size, 2)


def read_jpeg_header(frame: bytes) -> CodestreamHeader:
    """The frame header (SOF) of a JPEG or JPEG-LS stream (ITU-T T.81 B.2.2, T.87 C.2.2). Raises ValueError."""
    for marker, payload in marker_segments(frame):
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            repeats = (
                payload[5] > 1 or marker & 3 == 2
            )  # of one component, only a progressive image has more than one scan
            # the marker of a scan cannot stand within one, where FF is followed by a number below 0x80 or by D0-D7
            if repeats and frame.count(b"\xff\xda") > MAX_SCANS:
                raise ImageRefusedError("too_large", f"the JPEG has more than {MAX_SCANS} scans")
            return CodestreamHeader(int.from_bytes(payload[1:3]), int.from_bytes(payload[3:5]), payload[5], payload[0])
        if marker == 0xDA:
            break
    raise ValueError("no frame header")


def read_jpeg2000_header(frame: Bytes) -> CodestreamHeader:
    """The SIZ and COD segments of a JPEG 2000 main header (ITU-T T.800 A.5.1, A.6.1). Raises ValueError."""
    stream = None
    for marker, payload in marker_segments(frame):
        if marker == 0x51:
            x1, y1, x0, y0 = (int.from_bytes(payload[at : at + 4]) for at in (2, 6, 10, 14))
            depth, components = payload[36], int.from_bytes(payload[34:36])
            stream = CodestreamHeader(y1 - y0, x1 - x0, components, (depth & 0x7F) + 1, depth > 0x7F)
            moved = bool(x0 or y0)
        elif marker == 0x52 and stream is not None:
            # an image that does not start at 0 has another grid: no levels
            return stream._replace(levels=0 if moved else payload[5], blocks=count_blocks(stream, payload))
        elif marker == 0x90:
            break
    raise ValueError("no SIZ or COD segment")


def count_blocks(stream: CodestreamHeader, cod: Bytes) -> int:
    """About how many precincts or code blocks the COD segment `cod` cuts the image into, at all of its resolution levels."""
    levels, sizes = cod[5], cod[10:] if cod[0] & 1 else b""
    count = 0
    for level in range(levels + 1):  # 0 = the smallest image
        width, height = (min(cod[at] + 2, 15) for at in (6, 7))  # exponents of 2
        if sizes:
            width, height = min(width, sizes[level] & 15), min(height, sizes[level] >> 4)
        pixels = (stream.rows >> (levels - level)) * (stream.columns >> (levels - level))
        count += pixels >> (width + height)
    return count
