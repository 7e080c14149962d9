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

from collections.abc import Callable
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
from vitmodel.pixels.codestream import read_codestream_header
from vitmodel.pixels.pixel_format import NATIVE_SYNTAXES, PixelFormat


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
