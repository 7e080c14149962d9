"""Decode a frame's bytes to stored pixel values, for every transfer syntax and at a chosen resolution level.

The first decoder of a syntax is the fastest one; the next one is the fallback. A golden table in the tests checks that
these decoders, and independent ones that this package does not use, give the same pixels.

Decoders that were rejected, because of randomly damaged frames: gdcm aborts the process (JPEG); OpenJPH crashes or
hangs, and imagecodecs returns the half-filled images it leaves (HTJ2K); the decoder of imagecodecs crashes (RLE);
pydicom unpacks runs far beyond the declared size (RLE). Each decoder used here survived 8,000 damaged frames. OpenJPH
is two to four times as fast as OpenJPEG; it only encodes our HTJ2K copies and never decodes.

Known differences between decoders:

- Damage in the middle of a JPEG stream: libjpeg fills the missing part with grey, without an error that Python can see.
  A truncated stream has lost its end marker, which is checked here for every codec.
- JPEG Extended with 12 bits: libjpeg-turbo and DCMTK read it, gdcm and Pillow do not.
- Lossy HTJ2K: OpenJPH and OpenJPEG round differently, by at most 2 of 65535.
- Sign: JPEG and RLE do not store it, and JPEG 2000 encoders often write signed pixels as unsigned. The sign stated in
  the DICOM header is used.
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
"""More pixels than any mammogram has: a film of 24 x 30 cm scanned at 30 um has 80 million."""
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


@dataclass(frozen=True)
class PixelFormat:
    """The storage format of the pixels as stated in the DICOM header (PS3.3 C.7.6.3)."""

    syntax: str
    rows: int
    columns: int
    bits_allocated: int = 16
    bits_stored: int = 12
    signed: bool = False
    photometric: str = "MONOCHROME2"
    overlay_bits: bool = False
    """Whether the unused high bits contain overlay planes (retired from the standard, found in old files)."""
    shift: int = 0
    """Number of bits below the lowest bit of a value: HighBit + 1 - BitsStored."""
    samples: int = 1
    """Samples per pixel: 1, or 3 for grey stored as colour."""
    planar: bool = False
    """Whether each colour channel is stored as a plane of its own."""

    @property
    def dtype(self) -> np.dtype:
        """Type of the stored values: int or uint of 8 or 16 bits."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.bits_allocated // 8}")

    @property
    def frame_bytes(self) -> int:
        """Bytes of an uncompressed frame; YBR_FULL_422 has two differences of colour for two pixels."""
        samples = 2 if self.subsampled else self.samples
        return self.rows * self.columns * samples * self.bits_allocated // 8

    @property
    def subsampled(self) -> bool:
        """Whether an uncompressed frame has its pixels as Y Y Cb Cr (PS3.3 C.7.6.3.1.2)."""
        return self.photometric == "YBR_FULL_422" and self.syntax in NATIVE_SYNTAXES

    @property
    def unsigned_dtype(self) -> np.dtype:
        """Unsigned type of the same size."""
        return np.dtype(f"u{self.bits_allocated // 8}")


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


class Decoder(NamedTuple):
    """A named decoder of one frame.

    Attributes:
        name: Name of the library.
        decode: Function of frame, pixel format and level that returns values of any integer type, `(H, W)`.
        supports_levels: Whether the decoder itself can skip resolution levels.
    """

    name: str
    decode: Callable[[bytes, PixelFormat, int], np.ndarray]
    supports_levels: bool = False


def pydicom_decoder(plugin: str) -> Callable[[bytes, PixelFormat, int], np.ndarray]:
    """Return the decoding function of a pydicom plugin for compressed frames."""

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
    """Return uncompressed pixels; pydicom would wrap values that exceed a wrong BitsStored."""
    dtype = pixel_format.unsigned_dtype.newbyteorder(">" if pixel_format.syntax == uid.ExplicitVRBigEndian else "<")
    values = np.frombuffer(frame, dtype)
    if pixel_format.subsampled:
        pairs = values.reshape(pixel_format.rows, pixel_format.columns // 2, 4)
        differences = np.repeat(pairs[..., 2:], 2, axis=1)
        return np.dstack([pairs[..., :2].reshape(pixel_format.rows, pixel_format.columns), differences])
    return reshape_samples(values, pixel_format, pixel_format.planar)


def reshape_samples(values: np.ndarray, pixel_format: PixelFormat, planar: bool) -> np.ndarray:
    """Return a flat array as `(H, W)` or, with three samples per pixel, as `(H, W, 3)`."""
    shape = (pixel_format.rows, pixel_format.columns)
    if pixel_format.samples == 1:
        return values.reshape(shape)
    if planar:
        return np.moveaxis(values.reshape(pixel_format.samples, *shape), 0, -1)
    return values.reshape(*shape, pixel_format.samples)


def rle(frame: bytes, pixel_format: PixelFormat, level: int) -> np.ndarray:
    """Decode RLE with pylibjpeg-rle.

    Raises:
        ValueError: The frame is damaged.
    """
    try:
        data = pylibjpeg_rle.decode_pixel_data(
            frame,
            version=2,
            rows=pixel_format.rows,
            columns=pixel_format.columns,
            bits_allocated=pixel_format.bits_allocated,
        )
    except BaseException as error:  # its Rust code panics on damage, which is deliberately not an Exception
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from None
    values = np.frombuffer(data, pixel_format.unsigned_dtype.newbyteorder("<"))
    return reshape_samples(values, pixel_format, planar=True)


def jpegls(frame: bytes, pixel_format: PixelFormat, level: int) -> np.ndarray:
    """Decode JPEG-LS with pyjpegls."""
    data, info = pyjpegls_decode(frame)
    return np.frombuffer(data, "<u2" if info["bits_per_sample"] > 8 else "u1").reshape(info["height"], info["width"])


def jpeg2000_colour(frame: bytes, pixel_format: PixelFormat, level: int) -> np.ndarray:
    """Decode JPEG 2000 with three components at full resolution; the colours are converted to RGB."""
    return imagecodecs.jpeg2k_decode(frame)


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
J2K_COLOUR = (Decoder("openjpeg", jpeg2000_colour),)
"""Decoders of JPEG 2000 with three components."""
NATIVE_SYNTAXES = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
)
HTJ2K = (uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)

DECODERS: dict[str, tuple[Decoder, ...]] = {
    **dict.fromkeys(NATIVE_SYNTAXES, NATIVE),
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
"""Syntaxes whose decoder holds the interpreter lock.

Two threads are 1.4 times as fast as one for these syntaxes, and 1.7 to 2 times for others.
"""


def grid_offset(level: int) -> float:
    """Return how far a reduced image is shifted to the right and down against averages over 2^level x 2^level pixels.

    The unit is a pixel of the reduced image. Sample k of the wavelet's low band at `level` lies exactly on full-size
    pixel k * 2^level (ITU-T T.800 Annex F), not in the middle of an area. With the centre of pixel k at k + 0.5:
    x_reduced = x_full / 2^level + grid_offset(level).
    """
    return 0.5 - 0.5 / 2**level


def available_levels(frame: bytes, pixel_format: PixelFormat) -> int:
    """Return the number of resolution levels of this frame that `decode` can skip.

    Raises:
        ImageRefusedError: The header of the compressed frame is unreadable or contradicts the DICOM header.
    """
    if DECODERS[pixel_format.syntax] is not J2K or pixel_format.samples > 1 or openjpeg.load_library() is None:
        return 0
    stream = read_codestream_header(frame, pixel_format)
    if stream.signed != pixel_format.signed:  # -1, stored as 65535, would be averaged with 0
        return 0
    return stream.levels


def decode(frame: bytes, pixel_format: PixelFormat, level: int = 0) -> tuple[np.ndarray, str]:
    """Return the bit patterns of a frame and the name of the decoder.

    Args:
        frame: The bytes of one frame.
        pixel_format: The storage format stated in the DICOM header.
        level: Number of resolution levels to skip.

    Returns:
        Unsigned values `(H, W)` or, with three samples per pixel, `(H, W, 3)`, where H and W are Rows and Columns
        divided by 2^level and rounded up; the decoder's name.

    Raises:
        ImageRefusedError: The frame is damaged, contradicts its header or cannot be decoded.
    """
    decoders = DECODERS[pixel_format.syntax]
    if decoders is J2K and pixel_format.samples > 1:
        decoders = J2K_COLOUR
    if decoders is not NATIVE and decoders is not RLE:
        read_codestream_header(frame, pixel_format)
    problems = []
    for decoder in decoders:
        try:
            return decode_with(decoder, frame, pixel_format, level), decoder.name
        except Exception as error:  # noqa: BLE001 (C libraries and their wrappers raise anything on damaged bytes)
            problems.append(f"{decoder.name}: {error}")
    raise ImageRefusedError(
        "undecodable",
        f"the {uid.UID(pixel_format.syntax).name} pixels cannot be decoded ({'; '.join(problems)}); "
        "export the image again",
    )


def decode_with(decoder: Decoder, frame: bytes, pixel_format: PixelFormat, level: int = 0) -> np.ndarray:
    """Return the bit patterns of a frame as given by one decoder, see `decode`.

    Raises:
        Exception: Whatever the decoder raises.
    """
    step = 1 << level
    pixels = decoder.decode(frame, pixel_format, level)
    if level and not decoder.supports_levels:  # sample the full image on the grid of the reduced one, see grid_offset
        pixels = cv2.blur(np.ascontiguousarray(pixels), (step + 1, step + 1))[::step, ::step]
    expected = -(-pixel_format.rows // step), -(-pixel_format.columns // step)
    if pixels.shape[:2] != expected or pixels.shape[2:] != (() if pixel_format.samples == 1 else (3,)):
        raise ValueError(f"the decoded image has shape {pixels.shape} instead of {expected}")
    patterns = pixels.astype(pixel_format.unsigned_dtype, copy=False)
    if DECODERS[pixel_format.syntax] in (NATIVE, RLE):
        return patterns
    precision = read_codestream_header(frame, pixel_format).precision
    if precision == pixel_format.bits_allocated:
        return patterns
    return np.bitwise_and(patterns, (1 << precision) - 1, out=patterns if patterns.flags.writeable else None)


def to_stored_values(patterns: np.ndarray, pixel_format: PixelFormat) -> tuple[np.ndarray, str]:
    """Return `patterns` as stored values of the header's type, and a message about what was assumed ('' = nothing).

    Unused high bits are undefined in old files: they may be sign-extended or not, contain overlays, or be part of the
    value (wrong BitsStored).
    """
    if pixel_format.bits_stored == pixel_format.bits_allocated or patterns.size == 0:
        return patterns.view(pixel_format.dtype), ""
    limit = 1 << pixel_format.bits_stored
    if pixel_format.shift and patterns.max() >= limit:  # if they are smaller, HighBit is wrong
        patterns = (patterns >> pixel_format.shift) & (limit - 1)
    if pixel_format.overlay_bits:
        patterns = patterns & (limit - 1)
    if not pixel_format.signed:
        largest = int(patterns.max())
        if largest < limit:
            return patterns, ""
        return (
            patterns,
            f"values reach {largest}, more than BitsStored {pixel_format.bits_stored} allows; they are kept",
        )
    values = patterns.view(pixel_format.dtype)
    half = limit // 2
    if -half <= values.min() and values.max() < half:
        return values, ""
    if patterns.max() < limit:  # two's complement of BitsStored bits
        return (patterns ^ half).view(pixel_format.dtype) - pixel_format.dtype.type(half), ""
    extremes = f"values lie in {values.min()}..{values.max()}"
    return values, f"{extremes}, more than BitsStored {pixel_format.bits_stored} allows; they are kept"


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
    if b"\xff\xd9" not in frame[-8:]:  # libjpeg would silently fill the rest with grey
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
    start = frame.find(b"\xff\x4f\xff\x51", 0, MAX_CODESTREAM_HEADER)  # some encoders keep the boxes of a JP2 file
    if start < 0:
        return read_jpeg_header(frame)
    return read_jpeg2000_header(memoryview(frame)[start : start + MAX_CODESTREAM_HEADER])


def marker_segments(frame: Bytes) -> Iterator[tuple[int, Bytes]]:
    """Yield marker and payload of each segment after the start-of-image marker, up to the entropy-coded data."""
    position = 2
    while frame[position] == 0xFF:
        marker = frame[position + 1]
        size = int.from_bytes(frame[position + 2 : position + 4])
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        yield marker, frame[position + 4 : position + 2 + size]
        position += 2 + max(size, 2)


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
        if marker == 0xDA:
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
        elif marker == 0x90:
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
