"""Open pictures of mammograms: greyscale, one page, read as brighter = denser.

The formats are PNG, JPEG, TIFF, JPEG 2000, BMP and PGM.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from pathlib import Path

import cv2
import imagecodecs
import numpy as np

from vitmodel.archives import open_source
from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.colour import are_equal
from vitmodel.pixels.header import ImageHeader
from vitmodel.pixels.pgm import decode_pgm
from vitmodel.pixels.picture_header import END_MARKERS, HEAD_BYTES, PictureHeader, read_picture_header
from vitmodel.pixels.picture_range import GreyRange, own_range, percentile_range, range_of_bits, significant_bits
from vitmodel.pixels.pixel_format import MAX_PIXELS
from vitmodel.pixels.verdict import ImageWarning

MAX_BYTES_PER_VALUE = 6
"""Most bytes that a value needs: five digits and a space in a PGM file."""


class RasterFile:
    """A picture as an `ImageFile`.

    A wrong polarity is not detected here but in `crop.find_breast`, from the surroundings of the breast.

    Args:
        path: A PNG, JPEG, TIFF, JPEG 2000, BMP or PGM file.
        picture_range: Which values are black and white: auto, full, percentile or LOW:HIGH, see
            `config.Preprocessing.picture_range`.

    Raises:
        ImageRefusedError: The file is missing, damaged, cut short or too large.
    """

    levels = 0

    def __init__(self, path: Path | str, picture_range: str = "auto") -> None:
        self.path = Path(path)
        self.picture_range = picture_range
        self.decoder = "opencv"
        try:
            with open_source(self.path) as file:
                picture = read_picture_header(file)
                size = file.seek(0, io.SEEK_END)
                marker = END_MARKERS.get(picture.format, b"")
                check_size(picture, size)
                file.seek(max(0, size - 4096))
                complete = marker in file.read()
                if not complete:  # something else may follow the picture
                    file.seek(0)
                    complete = marker in file.read()[4:]
        except FileNotFoundError:
            raise ImageRefusedError("missing_file", f"{path} does not exist; correct the path") from None
        except OSError as error:
            raise ImageRefusedError(
                "unreadable", f"{path} cannot be read ({error.strerror}); check its permissions"
            ) from None
        if not complete:
            raise ImageRefusedError(
                "unreadable", "the picture is cut short: its end marker is missing; copy the file again"
            )
        self._picture = picture
        warnings = []
        if picture.format == "JPEG":
            warnings.append(ImageWarning("lossy", "the picture is a JPEG, compressed with loss"))
        if self._turned:
            warnings.append(
                ImageWarning(
                    "assumed_values",
                    f"the file states the orientation {picture.orientation}; the picture was turned accordingly",
                )
            )
        swapped = picture.orientation in (5, 6, 7, 8)
        self.header = ImageHeader(
            rows=picture.columns if swapped else picture.rows,
            columns=picture.rows if swapped else picture.columns,
            bits=picture.bits,
            photometric="MONOCHROME1" if picture.white_is_zero else "MONOCHROME2",
            transfer_syntax="",
            voi="full",
            warnings=tuple(warnings),
        )

    @property
    def _turned(self) -> bool:
        """Whether the file states an orientation in which its rows are not as stored."""
        return 2 <= self._picture.orientation <= 8

    def read_stored(self, level: int = 0) -> np.ndarray:
        """Return the picture as uint8, uint16 or float32 `(H, W)`; `level` must be 0.

        Raises:
            ImageRefusedError: The picture is damaged, in colour or has several pages.
        """
        if level:
            raise ValueError(f"level must be 0, not {level}: a picture has no reduced resolutions")
        return self._pixels

    def to_grey(self, stored: np.ndarray) -> np.ndarray:
        """Return values of the picture, or averages of them, as float32 in [0, 1]."""
        low, high = self._range
        values = stored.astype(np.float32)
        if low:
            values -= np.float32(low)
        grey = np.clip(values / (high - low), 0, 1)
        return 1 - grey if self._picture.white_is_zero else grey

    def use_own_range(self) -> str:
        """Show the range of the picture's own values and return it as text; '' if the user chose another range."""
        own = own_range(self._pixels) if self.picture_range == "auto" else None
        if own is None or own == self._range:
            return ""
        self._set_range(own, f"range {own}")
        return str(own)

    @property
    def needs_bits(self) -> bool:
        """Whether the file has 16 bits per pixel and does not state how many of them its values use."""
        return self._picture.bits == 16 and not 0 < self._picture.maximum < 65535

    @functools.cached_property
    def maximum(self) -> float:
        """The largest value of the picture."""
        return float(self._pixels.max())

    @functools.cached_property
    def _pixels(self) -> np.ndarray:
        """The decoded picture, upright, `(H, W)`."""
        picture = self._picture
        pixels, self.decoder = decode_picture(self.path, picture)
        if pixels.ndim == 3 and pixels.shape[1:] == (picture.rows, picture.columns):  # one plane after the other
            pixels = np.moveaxis(pixels, 0, 2)
        if pixels.shape[:2] != (picture.rows, picture.columns):
            raise ImageRefusedError(
                "bad_header",
                f"the picture has {pixels.shape[0]} x {pixels.shape[1]} pixels, "
                f"but its header states {picture.rows} x {picture.columns}; save it again",
            )
        grey = turn_upright(single_channel(to_supported_type(pixels)), picture.orientation)
        self._set_initial_range(grey)
        return grey

    def _set_initial_range(self, pixels: np.ndarray) -> None:
        """Choose the range as requested."""
        picture = self._picture
        full = GreyRange(0, picture.maximum) if picture.maximum else type_range(pixels)
        maximum = float(pixels.max())
        requested = GreyRange.parse(self.picture_range)
        if requested is not None:
            self._set_range(requested, str(requested))
        elif self.picture_range == "percentile":
            chosen = percentile_range(pixels)
            self._set_range(chosen, f"percentile {chosen}")
        elif self.picture_range == "full" or pixels.dtype == np.uint8:
            self._set_range(full, "full")
        else:
            in_use = range_of_bits(significant_bits(maximum)) if pixels.dtype == np.uint16 else full
            chosen = GreyRange(full.low, min(full.high, in_use.high))
            self._set_range(chosen, str(chosen))

    def _set_range(self, chosen: GreyRange, name: str) -> None:
        """Show the values of the range `chosen` from black to white."""
        self._range = chosen
        self.header = dataclasses.replace(self.header, voi=name)


def check_size(picture: PictureHeader, size: int) -> None:
    """Refuse a picture that is larger than any mammogram, or a file of `size` bytes that is larger than its picture.

    Raises:
        ImageRefusedError: The picture or the file is too large.
    """
    values = picture.rows * picture.columns * picture.channels
    if values > MAX_PIXELS:
        raise ImageRefusedError(
            "too_large",
            f"the picture has {picture.rows} x {picture.columns} pixels of {picture.channels} values, "
            f"more than {MAX_PIXELS} in total; save it at a lower resolution",
        )
    if size > HEAD_BYTES + MAX_BYTES_PER_VALUE * values:
        raise ImageRefusedError(
            "too_large",
            f"the file has {size} bytes, far more than its {picture.rows} x {picture.columns} picture needs; "
            "save it again",
        )


def decode_picture(path: Path, picture: PictureHeader) -> tuple[np.ndarray, str]:
    """Return the pixels of a picture `(H, W)` or `(H, W, C)`, and the name of the decoder.

    The order of colour channels does not matter, because they have to be equal.

    Raises:
        ImageRefusedError: The picture is damaged, or no decoder can read it.
    """
    decoder = "opencv"
    with open_source(path) as file:
        content = file.read()
    try:
        if picture.format == "PGM":
            return decode_pgm(content), "numpy"
        if picture.format == "TIFF":
            decoder = "libtiff"
            return imagecodecs.tiff_decode(content, index=picture.page, asrgb=picture.palette), decoder
        if picture.format == "JPEG 2000":
            decoder = "openjpeg"
            return imagecodecs.jpeg2k_decode(content), decoder
        if picture.format == "JPEG" and picture.bits > 8:
            decoder = "libjpeg-turbo"
            return imagecodecs.jpeg8_decode(content), decoder
        # UNCHANGED also ignores the orientation in an EXIF tag, which `turn_upright` applies
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except Exception as error:  # noqa: BLE001 (the codecs raise anything on damaged bytes)
        reason = error.err if isinstance(error, cv2.error) else error
        raise ImageRefusedError(
            "undecodable",
            f"{decoder} cannot decode the {picture.format} picture ({reason}); save it as an uncompressed PNG or TIFF",
        ) from None
    if pixels is None:
        raise ImageRefusedError(
            "undecodable", "OpenCV cannot decode the picture: it is damaged or cut short; copy the file again"
        )
    return pixels, decoder


def to_supported_type(pixels: np.ndarray) -> np.ndarray:
    """Return pixels of any number type as uint8 or uint16, or as float32 if their values need it.

    Raises:
        ImageRefusedError: The type is not a number, or a value is not finite.
    """
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype.kind not in "iuf":
        raise ImageRefusedError(
            "undecodable", f"the pixel type of the picture is {pixels.dtype}; save it with 8 or 16 bits per pixel"
        )
    if not np.isfinite(pixels).all():
        raise ImageRefusedError(
            "undecodable", "the picture has values that are not finite numbers; save it with 8 or 16 bits per pixel"
        )
    if pixels.dtype.kind in "iu" and pixels.min() >= 0 and pixels.max() <= 65535:
        return pixels.astype(np.uint16)
    return pixels.astype(np.float32)


def type_range(pixels: np.ndarray) -> GreyRange:
    """Return the range of the type of integers; of floats [0, 1] if they are fractions, else that of their values."""
    if pixels.dtype.kind == "u":
        return GreyRange(0, int(np.iinfo(pixels.dtype).max))
    low, high = float(pixels.min()), float(pixels.max())
    if low >= 0 and high <= 1:
        return GreyRange(0, 1)
    return GreyRange(low, high if high > low else low + 1)


def single_channel(pixels: np.ndarray) -> np.ndarray:
    """Return the grey channel of an image whose colour channels agree; pixels that are fully transparent become 0.

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
    first, grey, last = channels[:3] if len(channels) > 2 else channels[:1] * 3
    alpha = channels[-1] if len(channels) in (2, 4) else None
    if alpha is not None and not alpha.all():
        first, grey, last = (np.where(alpha == 0, 0, channel).astype(channel.dtype) for channel in (first, grey, last))
    if not are_equal(first, grey, last):
        raise ImageRefusedError(
            "colour", "the picture is in colour: its red, green and blue differ; save the original in greyscale"
        )
    return grey


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return the picture as viewers show it (TIFF 6.0 and EXIF, tag 274).

    Args:
        pixels: The picture as stored, `(H, W)`.
        orientation: 1 to 8; other values leave the picture as it is.
    """
    if not 2 <= orientation <= 8:
        return pixels
    if orientation >= 5:
        pixels = pixels.T
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
