"""A transcoded copy shows what its original shows, and ETL from copies gives the crops of the originals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread, uid
from test_dicom import VALUE_CASES, ramp, show, write

from vitmodel.commands.etl import etl
from vitmodel.config import ETLConfig, Size
from vitmodel.data.manifest import read_manifest
from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.dicom import DicomFile
from vitmodel.pixels.transcoding import transcode


def copy_of(path: Path) -> Path:
    content = transcode(path)
    assert content is not None
    copy = path.with_name("copy.dcm")
    copy.write_bytes(content)
    return copy


@pytest.mark.parametrize("case", [case for case in VALUE_CASES if "big endian" not in case])
def test_a_copy_shows_what_its_original_shows(case: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", **VALUE_CASES[case])
    copy = copy_of(path)
    np.testing.assert_array_equal(show(copy), show(path))
    np.testing.assert_array_equal(
        dcmread(copy).pixel_array, dcmread(path).pixel_array
    )  # by OpenJPEG, as pydicom has it
    assert DicomFile(copy).header.voi == DicomFile(path).header.voi


def test_overlays_in_high_bits_and_large_private_values(tmp_path: Path) -> None:
    tags: dict[str, Any] = {"BitsStored": 12, "WindowCenter": 2000, "WindowWidth": 1500}
    path = write(tmp_path / "a.dcm", ramp() | 0x8000, **tags)
    dataset = dcmread(path)
    dataset.add_new(0x60000010, "US", 40)
    dataset.add_new(0x60000102, "US", 15)
    dataset.private_block(0x0009, "VENDOR", create=True).add_new(0x10, "OB", bytes(3 << 20))
    dataset.save_as(path)
    copy = copy_of(path)
    np.testing.assert_array_equal(show(copy), show(path))
    assert copy.stat().st_size < 1 << 20


def test_what_needs_no_copy_or_cannot_have_one(tmp_path: Path) -> None:
    assert transcode(copy_of(write(tmp_path / "a.dcm"))) is None
    assert transcode(write(tmp_path / "b.dcm", syntax=uid.ExplicitVRBigEndian)) is None
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    with pytest.raises(ImageRefusedError):
        transcode(tmp_path / "c.png")


def test_etl_from_copies_gives_the_crops_of_the_originals(release: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    config = ETLConfig(source=release, out=first, size=Size(64, 32), exact=True, jobs=1, transcode="htj2k")
    assert etl(config) == 0
    listed, copies = read_manifest(first / "manifest.csv"), read_manifest(first / "htj2k" / "manifest.csv")
    assert copies["cancer"].equals(listed["cancer"])
    copied = copies["path"].str.startswith(str(first))
    assert (copied == (listed["status"] != "refused")).all()
    assert (
        etl(ETLConfig(source=first / "htj2k" / "manifest.csv", out=second, size=Size(64, 32), exact=True, jobs=1)) == 0
    )
    again = read_manifest(second / "manifest.csv")
    assert again["status"].tolist() == listed["status"].tolist()
    for one, other in zip(listed.loc[copied, "path"], again.loc[copied, "path"], strict=True):
        assert Path(one).read_bytes() == Path(other).read_bytes()

    lost = Path(copies.loc[copied, "path"].iloc[0])
    lost.unlink()
    assert etl(config) == 0
    assert lost.exists()
