"""Patients, exams and images are separated by the DICOM hierarchy, names of files and folders last."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydicom import Dataset, FileMetaDataset, uid

from vitmodel.data.manifest import is_repeated_file
from vitmodel.releases import dicom_folder
from vitmodel.releases.files import folder_patients
from vitmodel.releases.inputs import read_inputs
from vitmodel.releases.source import Source

MG = "1.2.840.10008.5.1.4.1.1.1.2"
BORN = {"PatientBirthDate": "19500101"}


def write(path: Path, seed: int = 0, **tags: Any) -> str:
    """Write a small mammogram; each file has a study and an instance of its own unless `tags` state them."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.StudyInstanceUID = MG, uid.generate_uid(), uid.generate_uid()
    ds.PatientID, ds.Modality, ds.ImageLaterality, ds.ViewPosition = "7", "MG", "L", "CC"
    ds.PresentationIntentType = "FOR PRESENTATION"
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit = 7
    ds.PixelData = pixels.tobytes()
    ds["PixelData"].VR = "OB"
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return str(path)


def read(root: Path) -> pd.DataFrame:
    """Return the manifest of a folder, with file names as index."""
    table = dicom_folder.read(Source(root))
    return table.set_index(table.path.map(lambda path: Path(path).stem))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"IssuerOfPatientID": "A"}, {"IssuerOfPatientID": "B"}, ["A-7", "B-7"]),
        ({"PatientBirthDate": "19500101"}, {"PatientBirthDate": "19600101"}, ["7", "7-2"]),
        ({"PatientName": "Alpha^Anna"}, {"PatientName": "Beta^Berta"}, ["7", "7-2"]),
        ({"PatientName": "Alpha^Anna"}, {"PatientName": "Beta^Anna"}, ["7"]),
        ({"PatientName": "Case001"}, {"PatientName": "Case002"}, ["7"]),
        ({"PatientName": "Alpha^Anna"}, {"PatientName": "Anonymous^Patient"}, ["7"]),
        ({"PatientName": "A^A", **BORN}, {"PatientName": "B^B", **BORN}, ["7"]),
    ],
)
def test_an_id_of_two_persons_is_two_patients_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: dict[str, str], second: dict[str, str], expected: list[str]
) -> None:
    for name, tags in (("a", first), ("b", second)):
        write(tmp_path / f"{name}1.dcm", StudyInstanceUID=f"1.{ord(name)}", **tags)
        write(tmp_path / f"{name}2.dcm", StudyInstanceUID=f"1.{ord(name)}", ViewPosition="MLO", **tags)
    table = read(tmp_path)
    assert list(dict.fromkeys(table.patient_id)) == expected
    assert table.patient_id["a1"] == table.patient_id["a2"]
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == (len(expected) > 1)
    assert all(name in "".join(warned) for name in ("a1.dcm", "b1.dcm") if len(expected) > 1)
    assert not any(word in caplog.text for word in ("Anna", "Berta", "1950"))


@pytest.mark.parametrize("patient", ["", "ANONYMOUS", "0000"])
def test_without_a_patient_each_study_is_one(tmp_path: Path, patient: str) -> None:
    for study in ("1.1", "1.2"):
        for view in ("CC", "MLO"):
            write(tmp_path / f"{study}-{view}.dcm", PatientID=patient, StudyInstanceUID=study, ViewPosition=view)
    assert read(tmp_path).patient_id.tolist() == ["1.1", "1.1", "1.2", "1.2"]


def test_the_suffix_of_a_second_person_is_no_other_patients_id(tmp_path: Path) -> None:
    for name, tags in (("a", BORN), ("b", {"PatientBirthDate": "19600101"}), ("c", {"PatientID": "7-2"})):
        write(tmp_path / f"{name}.dcm", **tags)
    assert read(tmp_path).patient_id.nunique() == 3


def test_a_file_without_a_patient_belongs_to_the_patient_of_its_study(tmp_path: Path) -> None:
    write(tmp_path / "a.dcm", StudyInstanceUID="1.1")
    write(tmp_path / "b.dcm", StudyInstanceUID="1.1", PatientID="")
    assert read(tmp_path).patient_id.tolist() == ["7", "7"]


def test_folders_of_series_are_no_patients() -> None:
    folders = ["p1/study1/series1", "p1/study2/series1", "p2/L", "study3/series1", "study4/series1", "a/p3", "b/p3"]
    names = ["p1", "p1", "p2", "study3", "study4", "a-p3", "b-p3"]
    assert folder_patients([f"/data/{folder}/x.png" for folder in folders], Path("/data")) == names
    assert folder_patients([f"/data/{folder}/x.png" for folder in folders], Path("/")) == names


def test_two_studies_of_a_patient_are_two_exams(tmp_path: Path) -> None:
    for study, date in (("1.1", "20180101"), ("1.2", "20240101")):
        for view in ("CC", "MLO"):
            write(tmp_path / f"{date}{view}.dcm", StudyInstanceUID=study, StudyDate=date, ViewPosition=view)
    assert read(tmp_path).exam_id.tolist() == ["1.1", "1.1", "1.2", "1.2"]


@pytest.mark.parametrize(
    ("first", "second", "exams"),
    [
        ({"StudyDate": "20180101"}, {"StudyDate": "20180101"}, 1),
        ({"StudyDate": "20180101"}, {"StudyDate": "20180102"}, 2),
        ({"StudyDate": "20180101", "PatientAge": "050Y"}, {"StudyDate": "20180101", "PatientAge": "056Y"}, 2),
        ({"StudyDate": "19000101"}, {"StudyDate": "19000101"}, 2),
        ({"AccessionNumber": "5"}, {"AccessionNumber": "5"}, 1),
        ({"AccessionNumber": "5"}, {"AccessionNumber": "6"}, 2),
        ({}, {}, 2),
        ({}, {"ViewPosition": "MLO"}, 1),
        ({"PatientAge": "050Y"}, {"ViewPosition": "MLO", "PatientAge": "056Y"}, 2),
    ],
)
def test_images_with_studies_of_their_own_are_one_exam_only_where_the_header_says_so(
    tmp_path: Path, first: dict[str, str], second: dict[str, str], exams: int
) -> None:
    write(tmp_path / "a.dcm", **first)
    write(tmp_path / "b.dcm", **second)
    assert read(tmp_path).exam_id.nunique() == exams


def test_an_instance_that_was_sent_twice_counts_once_unless_its_pixels_differ(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "a.dcm", SOPInstanceUID="1.5", StudyInstanceUID="1.1")
    write(tmp_path / "b.dcm", SOPInstanceUID="1.5", StudyInstanceUID="1.1", InstitutionName="X")
    table = read(tmp_path).assign(status="ok")
    assert is_repeated_file(table).to_dict() == {"a": False, "b": True}
    assert not caplog.records
    write(tmp_path / "c.dcm", seed=1, SOPInstanceUID="1.5", StudyInstanceUID="1.1")
    assert not is_repeated_file(read(tmp_path).assign(status="ok")).any()
    assert "shared by files with different pixels" in caplog.text


def test_a_refused_image_keeps_what_its_header_says(tmp_path: Path) -> None:
    write(tmp_path / "raw.dcm", PresentationIntentType="FOR PROCESSING", PatientAge="061Y")
    write(tmp_path / "report.dcm", Modality="SR", ViewPosition="MLO")
    paths = [str(tmp_path / "raw.dcm"), str(tmp_path / "report.dcm")]
    for table in (read(tmp_path), read_inputs(paths, "auto")):
        assert table.patient_id.tolist() == ["7", "7"]
        assert table["view"].tolist() == ["CC", "MLO"]
        assert table.age.iloc[0] == 61


def test_folders_that_are_read_one_by_one_do_not_merge_patients_and_exams(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1.dcm", IssuerOfPatientID="A")
    write(tmp_path / "b" / "1.dcm", IssuerOfPatientID="B")
    write(tmp_path / "2018" / "1.dcm", PatientID="8", StudyDate="20180101", StudyInstanceUID="1.1")
    write(tmp_path / "2024" / "1.dcm", PatientID="8", StudyDate="20240101", StudyInstanceUID="1.2")
    table = read_inputs([str(tmp_path / name) for name in ("a", "b", "2018", "2024")], "auto")
    assert table.patient_id.tolist() == ["A-7", "B-7", "8", "8"]
    assert table.exam_id.tolist() == ["", "", "1.1", "1.2"]


def test_files_of_a_study_of_several_patients_are_marked(tmp_path: Path) -> None:
    write(tmp_path / "a.dcm", StudyInstanceUID="1.2.3", PatientID="7")
    write(tmp_path / "b.dcm", StudyInstanceUID="1.2.3", PatientID="8")
    write(tmp_path / "c.dcm", StudyInstanceUID="1.2.4", PatientID="8")
    assert read(tmp_path).shared_study.to_dict() == {"a": 1, "b": 1, "c": 0}
