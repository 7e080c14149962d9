"""GDCM judges containers: what it reads whole, we read with equal pixels, or refuse for a true reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dicom_quirks import QUIRKS, WIDE

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.dicom import DicomFile

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")

READ_WITH_GDCM = """
import sys, gdcm
for path in sys.argv[1:]:
    reader = gdcm.ImageReader()
    reader.SetFileName(path)
    buffer = reader.GetImage().GetBuffer() if reader.Read() else None
    with open(path + ".gdcm", "wb") as file:
        file.write((buffer or "").encode("utf-8", "surrogateescape"))
"""
REFUSALS = {
    "no end marker": ("undecodable", "their end marker is missing"),
    "JPEG-LS without end marker": ("undecodable", "their end marker is missing"),
    "JPEG 2000 without end marker": ("undecodable", "their end marker is missing"),
    "half of a stream": ("undecodable", "their end marker is missing"),
    "zeros before the stream": ("undecodable", "no readable header"),
    "JPEG-LS under lossless JPEG": ("undecodable", "JPEG Lossless.* cannot be decoded .*Unsupported marker"),
    "J2K under lossless JPEG": ("undecodable", "JPEG Lossless.* cannot be decoded .*Not a JPEG file"),
    "JPEG under a native syntax": ("bad_header", "Explicit VR Little Endian, but the pixels are compressed"),
    "RLE of one segment too few": ("undecodable", "RLE Lossless pixels cannot be decoded"),
    "RLE of one segment too many": ("undecodable", "RLE Lossless pixels cannot be decoded"),
    "RLE with a wrong second offset": ("undecodable", "RLE Lossless pixels cannot be decoded"),
    "RLE with a segment that is too long": ("undecodable", "RLE Lossless pixels cannot be decoded"),
    "RLE with a segment that is too short": ("undecodable", "RLE Lossless pixels cannot be decoded"),
    "cut short": ("unreadable", "it has 3160 of 4160 bytes of pixels"),
    "BitsAllocated 32": ("bad_header", "BitsAllocated is 32, not 8 or 16"),
    "BitsAllocated 12": ("bad_header", "BitsAllocated is 12, not 8 or 16"),
    "BitsAllocated 1": ("bad_header", "BitsAllocated is 1, not 8 or 16"),
    "colours": ("colour", "red, green and blue differ"),
    "no preamble": ("not_an_image", "neither DICOM nor"),
    "NumberOfFrames 2": ("multi_frame", "NumberOfFrames is 2"),
    "a syntax that does not exist": ("undecodable", r"transfer syntax \(unknown\) is not supported"),
}
"""Quirk -> the reason code and what the message must say; all other quirks are read."""
UNREAD_BY_GDCM = {
    "an empty fragment at the end",
    "an empty fragment at the start",
    "zeros after the file",
    "palette of 8 bits in words",
    "palette that starts at 16",
    "explicit under the implicit syntax",
    "Rows of VR SS",
}
"""Quirks that we read and GDCM refuses or aborts at, in addition to `REFUSALS`."""
CUT_BY_GDCM = {"bits at the top of the word", "bits in the middle of the word"}
"""Quirks of which GDCM keeps only the lowest BitsStored bits, whatever HighBit says."""


@pytest.fixture(scope="module")
def quirks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the files, each with GDCM's pixels next to it; none where it aborts its process."""
    folder = tmp_path_factory.mktemp("quirks")
    files = {name: write(folder / f"{number}.dcm") for number, (name, write) in enumerate(QUIRKS.items())}
    waiting = list(map(str, files.values()))
    while waiting:
        subprocess.run([sys.executable, "-c", READ_WITH_GDCM, *waiting], capture_output=True, check=False)
        done = [path for path in waiting if Path(path + ".gdcm").exists()]
        waiting = waiting[len(done) + 1 :]
    return files


@pytest.mark.parametrize("name", QUIRKS)
def test_what_gdcm_reads_is_read_with_equal_pixels_or_refused_for_a_true_reason(
    name: str, quirks: dict[str, Path]
) -> None:
    path = quirks[name]
    if name in REFUSALS:
        code, message = REFUSALS[name]
        with pytest.raises(ImageRefusedError, match=message) as error:
            DicomFile(path).read_stored()
        assert error.value.code == code
        return
    file = DicomFile(path)
    values = file.read_stored()
    pixels = path.with_name(path.name + ".gdcm")
    content = pixels.read_bytes() if pixels.exists() else b""
    assert (not content) == (name in UNREAD_BY_GDCM)
    if name in CUT_BY_GDCM:
        np.testing.assert_array_equal(values, WIDE)
    elif content:
        np.testing.assert_array_equal(values, _stored_values(np.frombuffer(content, file.pixel_format.dtype), file))


def _stored_values(pixels: np.ndarray, file: DicomFile) -> np.ndarray:
    """Return GDCM's pixels, which keep planes and palette indices, as stored values."""
    form = file.pixel_format
    if form.samples == 3:
        channels = (3, form.rows, form.columns) if form.planar else (form.rows, form.columns, 3)
        pixels = pixels.reshape(channels)
        pixels = pixels if form.planar else np.moveaxis(pixels, -1, 0)
        return pixels[0]
    pixels = pixels.reshape(form.rows, form.columns)
    return pixels if file.palette is None else file.palette.entries[pixels]


def test_a_wrong_syntax_of_uncompressed_pixels_is_warned_of(quirks: dict[str, Path]) -> None:
    file = DicomFile(quirks["native under lossless JPEG"])
    file.read_stored()
    assert any("the pixels are not compressed" in warning.message for warning in file.header.warnings)
