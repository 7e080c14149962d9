"""Nothing that a DICOM header states, such as a misplaced name, reaches the screen or de-identified results.

The tables have the ids, sides and machines of the headers, and etl_report.html counts images by them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from test_serve import running

MARKER = "QZMARKERZQ"
HARMLESS = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge", "PatientAddress", "PatientComments"),
    *("OtherPatientNames", "EthnicGroup", "Occupation", "AdditionalPatientHistory", "InstitutionName", "StationName"),
    *("InstitutionAddress", "ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName", "AccessionNumber"),
    *("StudyID", "StudyDescription", "SeriesDescription", "ProtocolName", "ImageComments", "Manufacturer"),
    *("ManufacturerModelName", "DeviceSerialNumber", "StudyDate", "StudyTime", "ContentDate", "IssuerOfPatientID"),
    *("RequestedProcedureDescription", "DerivationDescription", "AcquisitionDeviceProcessingDescription"),
)
"""Tags whose text is misplaced in one file."""
NEEDED = (
    *("Modality", "PhotometricInterpretation", "VOILUTFunction", "WindowCenter", "WindowWidth", "RescaleSlope"),
    *("RescaleIntercept", "ImagerPixelSpacing", "PixelSpacing", "ImageLaterality", "ViewPosition", "BodyPartExamined"),
    *("SpecificCharacterSet", "SOPClassUID", "NumberOfFrames", "LossyImageCompressionRatio", "PresentationIntentType"),
    *("ImageType", "PatientOrientation", "StudyInstanceUID", "SOPInstanceUID", "InstanceNumber"),
)
"""Tags that decoding or results read; each is wrong in a file of its own."""


def plant(dataset: Dataset, keyword: str) -> None:
    """Set the bytes of a tag to the marker, whatever its type of value."""
    tag = Tag(tag_for_keyword(keyword))
    value = MARKER.encode()
    dataset[tag] = RawDataElement(tag, dictionary_VR(keyword), len(value), value, 0, False, True)


@pytest.fixture(scope="module")
def planted(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of mammograms with the marker in one tag each, or in all harmless ones."""
    folder = tmp_path_factory.mktemp("planted")
    paths = sorted((release / "train_images").rglob("*.dcm"))
    original = next(path for path in paths if b"MLO" in path.read_bytes()[:4000])
    for number, keywords in enumerate([HARMLESS, *((keyword,) for keyword in NEEDED)]):
        dataset = dcmread(original)
        for keyword in keywords:
            plant(dataset, keyword)
        if keywords == HARMLESS:
            block = dataset.private_block(0x0019, "VENDOR", create=True)
            block.add_new(0x01, "LO", MARKER)
            item = Dataset()
            item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = MARKER, MARKER, MARKER
            dataset.ViewCodeSequence = [item]
        dataset.save_as(folder / f"{number:02d}.dcm")
    return folder


def run_command(*words: str | Path) -> str:
    """Run vitmodel in a process of its own, as users do, and return all that it prints."""
    command = [sys.executable, "-m", "vitmodel.cli", *map(str, words)]
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_no_header_value_reaches_the_screen_or_deidentified_results(planted: Path, run: Path, tmp_path: Path) -> None:
    assert len(HARMLESS) + len(NEEDED) > 40
    said = run_command("etl", planted, tmp_path / "crops", "--size", "64x32", "--jobs", "1")
    flags = ("--dicom", "--deidentify", "secret", "--explain", "gradient", "--jobs", "1")
    said += run_command("predict", run / "package", planted, tmp_path / "out", *flags)
    assert MARKER not in said, [line for line in said.splitlines() if MARKER in line]
    files = list((tmp_path / "out" / "dicom").iterdir())
    assert len(files) >= 4  # results of one source UID replace each other
    for path in files:
        assert MARKER.encode() not in path.read_bytes(), dcmread(path)


@pytest.mark.slow
def test_no_header_value_reaches_log_metrics_or_page_of_the_server(planted: Path, run: Path, tmp_path: Path) -> None:
    httpx = pytest.importorskip("httpx")
    with running(run / "package", tmp_path) as (server, process):
        files = [("files", (path.name, path.read_bytes())) for path in sorted(planted.iterdir())]
        answer = httpx.post(f"{server.url}/scores", files=files, timeout=120)
        assert answer.status_code == 200
        assert len(answer.json()["images"]) == len(files)
        shown = "".join(httpx.get(server.url + place).text for place in ("/", "/metrics", "/readyz", "/model"))
        process.terminate()
        said, _ = process.communicate(timeout=60)
    assert "requests" in shown
    assert MARKER not in shown
    logged = server.log.read_text()
    assert "/scores" in logged
    assert MARKER not in said + logged
