"""The patient's identity as the PACS has it when results are sent: corrections made since must reach them."""

from __future__ import annotations

from collections.abc import Mapping

from pydicom import Dataset
from pydicom.datadict import dictionary_VR

IDENTITY_KEYWORDS = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "AccessionNumber", "StudyID", "ReferringPhysicianName"),
)
"""Attributes of the patient and study that results share with the study's images (PS3.3 C.7.1.1 and C.7.2.1)."""
UTF_8 = "ISO_IR 192"

Identity = Mapping[str, str]
"""Keyword -> value."""


def identity_of(answer: Dataset) -> dict[str, str]:
    """Return the identity in a PACS's answer to a query at study level; attributes that it lacks are left out."""
    answer.decode()  # its character set is its own
    found = {}
    for keyword in IDENTITY_KEYWORDS:
        if keyword in answer:
            found[keyword] = "" if answer[keyword].is_empty else str(answer[keyword].value)
    return found


def apply_identity(result: Dataset, identity: Identity) -> None:
    """Write an identity into a result, in place. Attributes that the identity lacks are left as they are."""
    result.decode()
    result.SpecificCharacterSet = UTF_8  # another one might lack the letters of the corrected name
    for keyword, value in identity.items():
        if value or keyword in result:
            result.add_new(keyword, dictionary_VR(keyword), value)


def query_keys(study_uid: str) -> Dataset:
    """Return the keys of a query for one study's identity."""
    keys = Dataset()
    keys.QueryRetrieveLevel = "STUDY"
    keys.SpecificCharacterSet = UTF_8
    keys.StudyInstanceUID = study_uid
    for keyword in IDENTITY_KEYWORDS:
        keys.add_new(keyword, dictionary_VR(keyword), "")
    return keys
