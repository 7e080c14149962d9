"""Tests of DICOM files that hold a grey image in an unusual way: as colour, shifted, padded, or with a narrow LUT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from pydicom import dcmread, uid
from pydicom.encaps import encapsulate
from pydicom.pixels import pixel_array
from test_dicom import WINDOW, lut, ramp, read_grey, refusal, write_dicom

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.dicom import DicomFile

GREY = ramp(0, 255, "u1")
RGB = np.repeat(GREY[..., None], 3, axis=2)
NEUTRAL = np.full_like(GREY, 128)
YBR = np.dstack([GREY, NEUTRAL, NEUTRAL])
SUBSAMPLED = np.concatenate([GREY.reshape(40, 26, 2), np.full((40, 26, 2), 128, "u1")], axis=2)
PLANES = np.ascontiguousarray(np.moveaxis(RGB, -1, 0))


def write_colour(
    path: Path, photometric: str, data: bytes, syntax: str = uid.ExplicitVRLittleEndian, **tags: Any
) -> Path:
    """Write a DICOM file of three samples per pixel and return its path."""
    tags = {"PlanarConfiguration": 0, "SamplesPerPixel": 3, "PhotometricInterpretation": photometric} | tags
    return write_dicom(path, GREY, syntax, PixelData=data, **tags)


@pytest.mark.parametrize(
    ("photometric", "pixels", "planar"),
    [("RGB", RGB, 0), ("RGB", PLANES, 1), ("YBR_FULL", YBR, 0), ("YBR_FULL_422", SUBSAMPLED, 0)],
)
def test_uncompressed_grey_in_colour_is_read(photometric: str, pixels: np.ndarray, planar: int, tmp_path: Path) -> None:
    path = write_colour(tmp_path / "a.dcm", photometric, pixels.tobytes(), PlanarConfiguration=planar)
    np.testing.assert_allclose(read_grey(path), GREY / 255, atol=1e-6)
    colour = pixel_array(path, raw=False)  # pydicom converts YBR to RGB
    assert np.abs(colour.astype(int) - RGB).max() <= 1


@pytest.mark.parametrize(
    ("syntax", "photometric", "stream"),
    [
        (uid.JPEGBaseline8Bit, "YBR_FULL_422", imagecodecs.jpeg8_encode(RGB, level=98)),
        (uid.JPEGLosslessSV1, "RGB", imagecodecs.jpeg8_encode(RGB, lossless=True, predictor=1)),
        (uid.JPEGLSLossless, "RGB", imagecodecs.jpegls_encode(RGB)),
        (uid.JPEGLSLossless, "YBR_FULL", imagecodecs.jpegls_encode(YBR)),
        (uid.JPEG2000Lossless, "YBR_RCT", imagecodecs.jpeg2k_encode(RGB, reversible=True, codecformat="j2k")),
    ],
)
def test_compressed_grey_in_colour_is_read(syntax: str, photometric: str, stream: bytes, tmp_path: Path) -> None:
    path = write_colour(tmp_path / "a.dcm", photometric, encapsulate([bytes(stream)]), syntax)
    np.testing.assert_allclose(read_grey(path), GREY / 255, atol=0.02 if syntax == uid.JPEGBaseline8Bit else 1e-6)


def test_rle_of_three_planes_is_read(tmp_path: Path) -> None:
    path = write_colour(tmp_path / "a.dcm", "RGB", RGB.tobytes())
    dataset = dcmread(path)
    dataset.compress(uid.RLELossless, generate_instance_uid=False)
    dataset.save_as(path)
    np.testing.assert_allclose(read_grey(path), GREY / 255, atol=1e-6)


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_real_colours_are_refused(photometric: str, tmp_path: Path) -> None:
    coloured = np.dstack([GREY, NEUTRAL, 255 - GREY])
    with pytest.raises(ImageRefusedError) as error:
        read_grey(write_colour(tmp_path / "a.dcm", photometric, coloured.tobytes()))
    assert error.value.code == "colour"


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_is_read_if_it_is_grey(bits: int, tmp_path: Path) -> None:
    entries = np.arange(255, -1, -1)
    tables = {"Red": entries, "Green": entries, "Blue": entries}

    def tags(tables: dict[str, np.ndarray]) -> dict[str, Any]:
        values: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
        for name, table in tables.items():
            data = table.astype("u1") if bits == 8 else (table * 257).astype("<u2")
            values[f"{name}PaletteColorLookupTableDescriptor"] = ("US", [256, 0, bits])
            values[f"{name}PaletteColorLookupTableData"] = ("OW", data.tobytes())
        return values

    path = write_dicom(tmp_path / "a.dcm", GREY, **tags(tables))
    np.testing.assert_allclose(read_grey(path), 1 - GREY / 255, atol=1e-6)
    path = write_dicom(tmp_path / "a.dcm", GREY, **tags({**tables, "Blue": np.roll(entries, 50)}))
    assert refusal(path).code == "colour"


@pytest.mark.parametrize("signed", [False, True])
def test_bits_at_the_top_of_the_word_are_shifted_down(signed: bool, tmp_path: Path) -> None:
    values = ramp(-2048, 2047, "i2") if signed else ramp()
    stored = (values.astype("i4") << 4).astype(values.dtype)
    path = write_dicom(tmp_path / "a.dcm", stored, HighBit=15, **WINDOW)
    np.testing.assert_array_equal(DicomFile(path).read_stored(), values)
    path = write_dicom(tmp_path / "a.dcm", values, HighBit=15, **WINDOW)
    if not signed:  # the header is wrong: the values need no shift
        np.testing.assert_array_equal(DicomFile(path).read_stored(), values)


def test_a_lut_of_fewer_bits_than_it_states_spans_the_whole_range(tmp_path: Path) -> None:
    entries = list(range(4096))
    file = DicomFile(write_dicom(tmp_path / "a.dcm", VOILUTSequence=[lut(0, entries, 16)]))
    np.testing.assert_allclose(file.to_grey(file.read_stored()), ramp() / 4095, atol=1e-6)
    assert "12 bits are assumed" in file.header.warnings[0].message
    half = [entry // 2 for entry in entries]  # one unused bit is no reason to doubt the descriptor
    np.testing.assert_allclose(
        read_grey(write_dicom(tmp_path / "a.dcm", VOILUTSequence=[lut(0, half, 12)])), ramp() // 2 / 4095, atol=1e-6
    )


@pytest.mark.parametrize("padding", [1, 9, 64])
@pytest.mark.parametrize(
    ("syntax", "stream"),
    [
        (uid.JPEGLosslessSV1, imagecodecs.jpeg8_encode(ramp(), lossless=True, predictor=1, bitspersample=12)),
        (uid.JPEGLSLossless, imagecodecs.jpegls_encode(ramp())),
        (uid.JPEG2000Lossless, imagecodecs.jpeg2k_encode(ramp(), reversible=True, codecformat="j2k", bitspersample=12)),
    ],
)
def test_zeros_after_the_end_marker_are_ignored(padding: int, syntax: str, stream: bytes, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", ramp(), syntax, PixelData=encapsulate([bytes(stream) + bytes(padding)]))
    np.testing.assert_array_equal(DicomFile(path).read_stored(), ramp())
    path = write_dicom(tmp_path / "a.dcm", ramp(), syntax, PixelData=encapsulate([bytes(stream)[:-2] + bytes(padding)]))
    with pytest.raises(ImageRefusedError, match="end marker is missing"):
        DicomFile(path).read_stored()
