"""Tests of decoders: equal pixels, the stated grid at each resolution level, and no half-decoded images."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
from pydicom import uid

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels import decoding, openjpeg
from vitmodel.pixels.decoding import DECODERS, Decoder
from vitmodel.pixels.pixel_format import PixelFormat

ROWS, COLUMNS = 23, 30
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "decoders.json").read_text())
FRAMES = [
    (
        PixelFormat(row["syntax"], ROWS, COLUMNS, row["allocated"], row["stored"], row["signed"], row["photometric"]),
        base64.b64decode(row["frame"]),
        row["sha256"],
    )
    for row in GOLDEN
]
NAMES = [
    f"{row['name']}, {row['stored']} of {row['allocated']} bits, {'signed' if row['signed'] else 'unsigned'}"
    for row in GOLDEN
]
GDCM = Decoder("gdcm", decoding.pydicom_decoder("gdcm"))
OPENJPH = Decoder(
    "openjph", lambda frame, pixel_format, level: imagecodecs.htj2k_decode(frame, skipres=level), supports_levels=True
)
PEERS: dict[str, Decoder] = dict.fromkeys(uid.JPEGTransferSyntaxes, GDCM)
PEERS[uid.RLELossless] = Decoder("pydicom", decoding.pydicom_decoder("pydicom"))
PEERS |= dict.fromkeys((uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K), OPENJPH)
ROUNDING = 2
"""Tolerance, of 65535: OpenJPH and OpenJPEG round the irreversible wavelet of lossy HTJ2K differently."""


def decode_stored(decoder: Decoder, frame: bytes, pixel_format: PixelFormat, level: int = 0) -> np.ndarray:
    """Return the stored values of a frame by one decoder."""
    return decoding.to_stored_values(decoding.decode_with(decoder, frame, pixel_format, level), pixel_format)[0]


@pytest.mark.parametrize(("pixel_format", "frame", "golden"), FRAMES, ids=NAMES)
def test_all_decoders_give_the_golden_pixels(pixel_format: PixelFormat, frame: bytes, golden: str) -> None:
    for decoder in DECODERS[pixel_format.syntax]:
        pixels = decode_stored(decoder, frame, pixel_format)
        assert pixels.dtype == pixel_format.dtype
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == golden, decoder.name


@pytest.mark.parametrize(("pixel_format", "frame", "golden"), [entry for entry in FRAMES if entry[0].syntax in PEERS])
def test_independent_decoders_give_the_same_pixels(pixel_format: PixelFormat, frame: bytes, golden: str) -> None:
    if pixel_format.syntax == uid.JPEGExtended12Bit and pixel_format.bits_stored == 12:
        pytest.skip("gdcm does not read it; the golden pixels come from DCMTK")
    pixels = decode_stored(DECODERS[pixel_format.syntax][0], frame, pixel_format).astype(int)
    expected = decode_stored(PEERS[pixel_format.syntax], frame, pixel_format).astype(int)
    assert np.abs(pixels - expected).max() <= (ROUNDING if pixel_format.syntax == uid.HTJ2K else 0)


def test_the_golden_table_covers_every_syntax() -> None:
    assert {pixel_format.syntax for pixel_format, _, _ in FRAMES} == set(DECODERS)


@pytest.mark.parametrize(("pixel_format", "frame", "golden"), FRAMES, ids=NAMES)
def test_truncated_frames_are_refused(pixel_format: PixelFormat, frame: bytes, golden: str) -> None:
    for fraction in (0.0, 0.2, 0.6, 0.95):
        with pytest.raises(ImageRefusedError):
            decoding.decode(frame[: int(fraction * len(frame))], pixel_format)


def ramp(rows: int, columns: int) -> np.ndarray:
    """Return a smooth 12-bit image whose values identify the position."""
    row, column = np.mgrid[:rows, :columns]
    return (1500 + row * 3 + column * 5).astype(np.uint16)


def jpeg2000(image: np.ndarray, resolutions: int) -> bytes:
    """Return a lossless codestream of 12 bits."""
    return bytes(
        imagecodecs.jpeg2k_encode(image, codecformat="j2k", bitspersample=12, reversible=True, resolutions=resolutions)
    )


@pytest.mark.parametrize(("rows", "columns"), [(257, 190), (64, 64), (101, 333)])
@pytest.mark.parametrize("syntax", [uid.JPEG2000Lossless, uid.HTJ2KLossless])
def test_reduced_sample_k_lies_on_pixel_k_times_2_to_the_level(syntax: str, rows: int, columns: int) -> None:
    image = ramp(rows, columns)
    pixel_format = PixelFormat(syntax, rows, columns)
    if syntax == uid.JPEG2000Lossless:
        frame = jpeg2000(image, 4)
    else:
        frame = bytes(imagecodecs.htj2k_encode(image, reversible=True, resolutions=4))
    levels = decoding.available_levels(frame, pixel_format)
    assert levels >= 3
    for level in range(1, levels + 1):
        step = 2**level
        inside = np.s_[2:-2, 2:-2]  # the wavelet mirrors the image at its border
        for decoder in DECODERS[syntax]:
            reduced = decoding.decode_with(decoder, frame, pixel_format, level)
            np.testing.assert_allclose(
                reduced[inside].astype(int), image[::step, ::step][inside], atol=2, err_msg=decoder.name
            )


def test_grid_offset_undoes_the_shift() -> None:
    """A reduced image resampled by the offset equals the area averages of the full image."""
    image = ramp(256, 192)
    frame = jpeg2000(image, 6)
    level = 2
    pixel_format = PixelFormat(uid.JPEG2000Lossless, 256, 192)
    reduced, _ = decoding.decode(frame, pixel_format, level)
    offset = decoding.grid_offset(level)
    matrix = np.array([[1, 0, offset], [0, 1, offset]])  # from the grid of the areas to the reduced grid
    shifted = cv2.warpAffine(
        reduced.astype(np.float32), matrix, (48, 64), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    )
    areas = cv2.resize(image.astype(np.float32), (48, 64), interpolation=cv2.INTER_AREA)
    inside = np.s_[2:-2, 2:-2]
    np.testing.assert_allclose(shifted[inside], areas[inside], atol=1)
    assert np.abs(reduced[inside] - areas[inside]).min() > 5  # without the offset the images differ


def test_openjpeg_is_found() -> None:
    assert openjpeg.library_version().startswith("2.")


def test_skipping_more_levels_than_the_stream_has_fails() -> None:
    image = ramp(64, 64)
    frame = jpeg2000(image, 3)
    pixel_format = PixelFormat(uid.JPEG2000Lossless, 64, 64)
    assert decoding.available_levels(frame, pixel_format) == 2
    with pytest.raises(ValueError, match="header"):
        openjpeg.decode(frame, 5)


@pytest.mark.parametrize("syntax", [uid.JPEG2000Lossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless])
def test_a_codestream_that_contradicts_the_header_is_refused_before_decoding(
    syntax: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixel_format, frame, _ = next(entry for entry in FRAMES if entry[0].syntax == syntax and entry[0].bits_stored == 12)
    monkeypatch.setitem(decoding.DECODERS, syntax, (Decoder("never", lambda *_: pytest.fail("the frame was decoded")),))
    position = frame.index(ROWS.to_bytes(2 if syntax != uid.JPEG2000Lossless else 4))
    huge = frame[:position] + b"\xff" * 2 + frame[position + 2 :]
    with pytest.raises(ImageRefusedError, match="Rows x Columns") as caught:
        decoding.decode(huge, pixel_format)
    assert caught.value.code == "bad_header"


@pytest.mark.parametrize(
    ("values", "signed", "overlay", "expected", "assumed"),
    [
        ([0, 4095], False, False, [0, 4095], False),
        ([0x8000 + 5, 4095], False, True, [5, 4095], False),
        ([5000, 1], False, False, [5000, 1], True),
        ([0xFFF, 5], True, False, [-1, 5], False),  # two's complement of 12 bits
        ([0xFFFF, 5], True, False, [-1, 5], False),  # sign-extended to 16
        ([0x8000, 5], True, False, [-32768, 5], True),
    ],
)
def test_unused_high_bits_are_ignored_or_kept_with_a_warning(
    values: list[int], signed: bool, overlay: bool, expected: list[int], assumed: bool
) -> None:
    pixel_format = PixelFormat(uid.ExplicitVRLittleEndian, 1, 2, 16, 12, signed, overlay_bits=overlay)
    pixels, message = decoding.to_stored_values(np.array([values], np.uint16), pixel_format)
    assert pixels.tolist() == [expected]
    assert pixels.dtype == pixel_format.dtype
    assert bool(message) == assumed
