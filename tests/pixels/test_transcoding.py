"""Tests that transcoded copies show the same as their originals, and that ETL from copies gives the same crops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread, uid
from test_dicom import VALUE_CASES, ramp, read_grey, write_dicom

from vitmodel.commands.etl import etl
from vitmodel.config import ETLConfig, Size
from vitmodel.data.manifest import read_manifest
from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.dicom import DicomFile
from vitmodel.pixels.transcoding import transcode


def write_copy(path: Path) -> Path:
    """Write the HTJ2K copy of a file next to it and return its path."""
    content = transcode(path)
    assert content is not None
    copy = path.with_name("copy.dcm")
    copy.write_bytes(content)
    return copy


@pytest.mark.parametrize("case", [case for case in VALUE_CASES if "big endian" not in case])
def test_a_copy_shows_what_its_original_shows(case: str, tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", **VALUE_CASES[case])
    copy = write_copy(path)
    np.testing.assert_array_equal(read_grey(copy), read_grey(path))
    # pydicom decodes HTJ2K with OpenJPEG.
    np.testing.assert_array_equal(dcmread(copy).pixel_array, dcmread(path).pixel_array)
    assert DicomFile(copy).header.voi == DicomFile(path).header.voi


def test_a_copy_keeps_the_image_under_overlays_and_drops_large_private_values(tmp_path: Path) -> None:
    tags: dict[str, Any] = {"BitsStored": 12, "WindowCenter": 2000, "WindowWidth": 1500}
    path = write_dicom(tmp_path / "a.dcm", ramp() | 0x8000, **tags)
    dataset = dcmread(path)
    dataset.add_new(0x60000010, "US", 40)
    dataset.add_new(0x60000102, "US", 15)
    dataset.private_block(0x0009, "VENDOR", create=True).add_new(0x10, "OB", bytes(3 << 20))
    dataset.save_as(path)
    copy = write_copy(path)
    np.testing.assert_array_equal(read_grey(copy), read_grey(path))
    assert copy.stat().st_size < 1 << 20


def test_files_that_need_no_copy_or_cannot_have_one(tmp_path: Path) -> None:
    assert transcode(write_copy(write_dicom(tmp_path / "a.dcm"))) is None
    assert transcode(write_dicom(tmp_path / "b.dcm", syntax=uid.ExplicitVRBigEndian)) is None
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    with pytest.raises(ImageRefusedError):
        transcode(tmp_path / "c.png")


def test_etl_from_copies_gives_the_crops_of_the_originals(release: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    second = tmp_path / "second"
    config = ETLConfig(source=release, out=first, size=Size(64, 32), exact=True, jobs=1, transcode="htj2k")
    assert etl(config) == 0
    originals = read_manifest(first / "manifest.csv")
    copies = read_manifest(first / "htj2k" / "manifest.csv")
    assert copies["cancer"].equals(originals["cancer"])
    copied = copies["path"].str.startswith(str(first))
    assert (copied == (originals["status"] != "refused")).all()
    source = first / "htj2k" / "manifest.csv"
    assert etl(ETLConfig(source=source, out=second, size=Size(64, 32), exact=True, jobs=1)) == 0
    from_copies = read_manifest(second / "manifest.csv")
    assert from_copies["status"].tolist() == originals["status"].tolist()
    for crop, crop_of_copy in zip(originals.loc[copied, "path"], from_copies.loc[copied, "path"], strict=True):
        assert Path(crop).read_bytes() == Path(crop_of_copy).read_bytes()

    deleted = Path(copies.loc[copied, "path"].iloc[0])
    deleted.unlink()
    assert etl(config) == 0
    assert deleted.exists()
