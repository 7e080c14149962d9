"""Attributes that DICOM results take from their source image: patient, study and references.

Results get new UIDs of their own, and no function here writes to a source file.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom import Dataset
from pydicom.datadict import dictionary_VR
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, DigitalXRayImageStorageForPresentation, UID_dictionary, generate_uid
from pydicom.valuerep import DA, TM

from vitmodel.config.labels import CANCER
from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.dicom_reading import read_dataset
from vitmodel.utils import import_extra

# highdicom warns about person names with a single component and prints them, but logs must not contain names.
warnings.filterwarnings("ignore", module=r"highdicom\.")
logging.getLogger("highdicom").setLevel(logging.CRITICAL)

Deidentifier = Callable[[Dataset], None]

MANUFACTURER = "vitmodel"
TYPE_2_KEYWORDS = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName"),
)  # type 2 attributes of patient and study (PS3.3 C.7.1.1, C.7.2.1): required, but may be empty

DEIDENTIFIED_KEYWORDS = (
    *("SpecificCharacterSet", "SOPInstanceUID", "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID"),
    *(
        "FrameOfReferenceUID",
        "Modality",
        "SamplesPerPixel",
        "Rows",
        "Columns",
        "PixelSpacing",
        "ImagerPixelSpacing",
        "IssuerOfPatientID",
        *TYPE_2_KEYWORDS,
    ),
)
"""Attributes that de-identified results may use. Any other may have a patient's name in the wrong place."""

SEXES = {"F": "F", "M": "M", "W": "F", "O": "O"}
"""First letter of a PatientSex -> its value (PS3.3 C.7.1.1); W is German and other values are unknown."""
UTF_8 = "ISO_IR 192"
PLAIN_CHARACTER_SETS = ("ISO_IR 100", UTF_8)


@dataclass(frozen=True, kw_only=True)
class Software:
    """The software and model that computed a result."""

    version: str
    """Version of vitmodel."""
    model: str
    """Architecture of the model."""
    serial: str
    """First digits of the SHA-256 of the model's weights."""
    label: str = CANCER
    """Label rule that the model predicts."""
    parameters: tuple[str, ...] = ()
    """Other settings that influence the result, one `name: value` each."""

    def uid(self, kind: str, *sources: str) -> UID:
        """Return the UID of a result, derived from its kind, the software and the UIDs of its sources.

        The same result therefore has the same UID wherever it is computed.
        """
        return generate_uid(
            entropy_srcs=[MANUFACTURER, kind, self.version, self.model, self.serial, *self.parameters, *sources]
        )


def read_source_header(path: Path | str, deidentify: Deidentifier | None = None) -> Dataset:
    """Return the header of a source image in the form to which results refer.

    Attributes that the standard requires and the file lacks are left empty or derived.

    Args:
        path: DICOM file of the source image.
        deidentify: Function that removes the patient's identity from the header in place; None = keep it.

    Raises:
        ImageRefusedError: The file is no DICOM object, or it has no SOP Instance UID to which a result could refer.
    """
    header = read_dataset(Path(path))
    meta = header.file_meta if hasattr(header, "file_meta") else Dataset()
    instance_uid = header.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID")
    if not instance_uid:
        raise ImageRefusedError("bad_header", "the file has no SOP Instance UID to which a DICOM result could refer")
    header.SOPInstanceUID = instance_uid
    stated = str(header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID"))
    header.SOPClassUID = stated if stated in UID_dictionary else DigitalXRayImageStorageForPresentation
    for keyword in TYPE_2_KEYWORDS:
        if not _is_valid(header, keyword):
            header.add_new(keyword, dictionary_VR(keyword), "")
    header.PatientSex = SEXES.get(str(header.PatientSex).strip().upper()[:1], "")
    _decode_text(header)
    header.setdefault("Modality", "MG")
    if not header.get("StudyInstanceUID"):
        patient_or_image = str(header.PatientID) or instance_uid
        header.StudyInstanceUID = generate_uid(entropy_srcs=[MANUFACTURER, "study", patient_or_image])
    if not header.get("SeriesInstanceUID"):
        header.SeriesInstanceUID = generate_uid(entropy_srcs=[MANUFACTURER, "series", str(header.StudyInstanceUID)])
    if deidentify is not None:
        orientation = header.get("PatientOrientation")
        header = _only(header, DEIDENTIFIED_KEYWORDS)
        if orientation and all(re.fullmatch("[APRLHF]{1,3}", str(axis)) for axis in orientation):
            header.PatientOrientation = orientation
        deidentify(header)
        header.pop("InstanceNumber", None)  # the RSNA release stores the image id there, and dicognito keeps it
    return header


def instance_number(source: Dataset) -> int:
    """Return the number of an image within its series; results have the number of their source."""
    return int(source.get("InstanceNumber") or 1)


def _only(header: Dataset, keywords: Sequence[str]) -> Dataset:
    """Return a data set with the named attributes alone, those of them whose values can be read."""
    kept = Dataset()
    kept.file_meta = getattr(header, "file_meta", FileMetaDataset())
    for keyword in keywords:
        with contextlib.suppress(Exception):  # pydicom raises anything on damaged values
            if keyword in header:
                kept[keyword] = header[keyword]
    return kept


def _decode_text(header: Dataset) -> None:
    """Rewrite a header's text in UTF-8, unless its character set is one that results can have as it is.

    Files state several character sets at once (all Japanese and Korean ones do), or misspell them.
    """
    if "SpecificCharacterSet" not in header or header.SpecificCharacterSet in PLAIN_CHARACTER_SETS:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of character sets that it corrects or replaces
        header.decode()
        for element in header:
            if element.VR == "PN" and element.value:
                element.value = str(element.value)
    header.SpecificCharacterSet = UTF_8


def _is_valid(header: Dataset, keyword: str) -> bool:
    """Return whether the attribute is present and, if its type is date or time, valid or empty; 00000000 is invalid."""
    value = header.get(keyword)
    value_type = {"DA": DA, "TM": TM}.get(dictionary_VR(keyword))
    try:
        return value is not None and (value_type is None or value == "" or value_type(value) is not None)
    except ValueError:
        return False


def make_deidentifier(seed: str) -> Deidentifier:
    """Return a function that de-identifies a header in place with dicognito.

    Args:
        seed: Secret seed. Sources anonymised with the same seed get the same new names and UIDs.

    Raises:
        UsageError: dicognito is not installed.
    """
    anonymizer = import_extra("dicognito.anonymizer", "dicom", "deidentify")
    return anonymizer.Anonymizer(seed=seed).anonymize
