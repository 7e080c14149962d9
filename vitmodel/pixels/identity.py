"""Read whom and what an image file shows, independently of whether its pixels can be used."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from vitmodel.pixels.dicom_reading import read_dataset
from vitmodel.pixels.functional_groups import promote_functional_groups
from vitmodel.pixels.side_and_view import read_side_and_view
from vitmodel.pixels.tags import TagReader

DATE_TAGS = ("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate")
MACHINE_TAGS = ("DeviceSerialNumber", "StationName", "ManufacturerModelName")


@dataclass(frozen=True)
class ImageIdentity:
    """The patient, exam and image of a file according to its header; '' and None mark unknown values.

    Attributes:
        patient_id: DICOM PatientID.
        issuer: Who issued the PatientID; ids of two issuers are of two patients.
        patient_name: DICOM PatientName, to distinguish patients with the same id. Never shown.
        birth_date: DICOM PatientBirthDate, for the same purpose. Never shown.
        study_id: DICOM StudyInstanceUID.
        accession: DICOM AccessionNumber.
        exam_date: Date of the study or, if it is unknown, of the series or image.
        image_id: DICOM SOPInstanceUID.
        kind: SOP class and presentation intent: the same view is often stored for processing and for presentation.
        laterality: L or R.
        view: One of the views of the manifest.
        machine_id: Serial number, station name or model of the machine.
        implant: 1 with and 0 without an implant.
        age: Age of the patient in years.
    """

    patient_id: str = ""
    issuer: str = ""
    patient_name: str = ""
    birth_date: str = ""
    study_id: str = ""
    accession: str = ""
    exam_date: str = ""
    image_id: str = ""
    kind: str = ""
    laterality: str = ""
    view: str = ""
    machine_id: str = ""
    implant: int | None = None
    age: float | None = None


def read_identity(path: Path | str) -> ImageIdentity:
    """Return what the header of a file says about its patient, exam and image, even if the image is refused.

    A picture, a missing file and a file whose header cannot be read have an empty identity.
    """
    try:
        dataset = read_dataset(Path(path))
    except Exception:  # noqa: BLE001 (no header may end the run; the image is refused when it is cropped)
        return ImageIdentity()
    with contextlib.suppress(Exception):  # pydicom's exceptions for damaged bytes have no common type
        promote_functional_groups(dataset)
    with contextlib.suppress(Exception):
        return identify(TagReader(dataset, []))
    return ImageIdentity()


def identify(tags: TagReader) -> ImageIdentity:
    """Return the identity that a header states; tags that are absent or invalid stay unknown."""
    laterality, view = read_side_and_view(tags)
    return ImageIdentity(
        patient_id=tags.text("PatientID"),
        issuer=_read_issuer(tags),
        patient_name=tags.text("PatientName"),
        birth_date=tags.text("PatientBirthDate"),
        study_id=tags.text("StudyInstanceUID"),
        accession=tags.text("AccessionNumber"),
        exam_date=next(filter(None, map(tags.text, DATE_TAGS)), ""),
        image_id=tags.text("SOPInstanceUID"),
        kind=f"{tags.text('SOPClassUID')} {tags.code('PresentationIntentType')}",
        laterality=laterality,
        view=view,
        machine_id=next(filter(None, map(tags.text, MACHINE_TAGS)), ""),
        implant={"YES": 1, "NO": 0}.get(tags.code("BreastImplantPresent")),
        age=read_age(tags),
    )


def _read_issuer(tags: TagReader) -> str:
    """Return the issuer of the PatientID, by its name or its universal id (PS3.3 C.7.1.1)."""
    qualifiers = [item.text("UniversalEntityID") for item in tags.items("IssuerOfPatientIDQualifiersSequence")]
    return next(filter(None, (tags.text("IssuerOfPatientID"), *qualifiers)), "")


def read_age(tags: TagReader) -> float | None:
    """Return PatientAge in years; None if it is unknown."""
    match = re.fullmatch(r"(\d{1,3})([YMWD])", tags.code("PatientAge"))
    if not match or not int(match[1]):  # de-identification writes 000Y
        return None
    return int(match[1]) / {"Y": 1, "M": 12, "W": 52.18, "D": 365.25}[match[2]]
