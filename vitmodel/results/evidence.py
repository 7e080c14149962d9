"""What a result carries over from its source: patient, study and references, with new UIDs of its own. Never writes to a source."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydicom import Dataset
from pydicom.datadict import dictionary_VR
from pydicom.uid import UID, DigitalXRayImageStorageForPresentation, generate_uid
from pydicom.valuerep import DA, TM

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.dicom_reading import read_dataset
from vitmodel.utils import import_extra

# highdicom warns of person names of one part, and prints them; no name belongs into a log.
warnings.filterwarnings("ignore", module=r"highdicom\.")

Deidentifier = Callable[[Dataset], None]

MANUFACTURER = "vitmodel"
TYPE_2_KEYWORDS = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName"),
)  # type 2 of patient and study (PS3.3 C.7.1.1, C.7.2.1): must be there, may be empty


@dataclass(frozen=True, kw_only=True)
class Software:
    """What computed a result."""

    version: str
    """Of vitmodel."""
    model: str
    """The model's architecture."""
    serial: str
    """The first digits of its weights' SHA-256."""
    parameters: tuple[str, ...] = ()
    """What else decided the result, one `name: value` each."""

    def uid(self, kind: str, *sources: str) -> UID:
        """A new UID that follows from kind, software and the UIDs of its sources: the same result is known by the same name anywhere."""
        return generate_uid(
            entropy_srcs=[MANUFACTURER, kind, self.version, self.model, self.serial, *self.parameters, *sources]
        )


def read_source_header(path: Path | str, deidentify: Deidentifier | None = None) -> Dataset:
    """The header of a source image as results refer to it; what the standard demands and the file lacks is empty or derived.

    Raises ImageRefusedError where the file is no DICOM object, or has no SOP Instance UID that a result could refer to.
    """
    header = read_dataset(Path(path))
    meta = header.file_meta if hasattr(header, "file_meta") else Dataset()
    name = header.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID")
    if not name:
        raise ImageRefusedError(
            "bad_header", "the file has no SOP Instance UID, so that no DICOM result can refer to it"
        )
    header.SOPInstanceUID = name
    header.SOPClassUID = (
        header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or DigitalXRayImageStorageForPresentation
    )
    for keyword in TYPE_2_KEYWORDS:
        if not _is_valid(header, keyword):
            header.add_new(keyword, dictionary_VR(keyword), "")
    header.setdefault("Modality", "MG")
    if not header.get("StudyInstanceUID"):
        header.StudyInstanceUID = generate_uid(entropy_srcs=[MANUFACTURER, "study", str(header.PatientID) or name])
    if not header.get("SeriesInstanceUID"):
        header.SeriesInstanceUID = generate_uid(entropy_srcs=[MANUFACTURER, "series", str(header.StudyInstanceUID)])
    if deidentify is not None:
        deidentify(header)
        header.pop("InstanceNumber", None)  # the RSNA release keeps the image's id there, and dicognito leaves it
    return header


def _is_valid(header: Dataset, keyword: str) -> bool:
    """Whether the attribute is there and, where it is a date or time, is one: 00000000 is not."""
    value, kind = header.get(keyword), {"DA": DA, "TM": TM}.get(dictionary_VR(keyword))
    try:
        return value is not None and (kind is None or value == "" or kind(value) is not None)
    except ValueError:
        return False


def make_deidentifier(seed: str) -> Deidentifier:
    """dicognito with a secret `seed`: whoever anonymises the sources with the same seed gets the same new names and UIDs.

    Raises UsageError where dicognito is not installed.
    """
    anonymizer = import_extra("dicognito.anonymizer", "dicom", "deidentify")
    return anonymizer.Anonymizer(seed=seed).anonymize
