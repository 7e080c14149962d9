"""What the node reads from the header of a received object, and why some objects are not scored."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Any

from pydicom import Dataset, dcmread

from vitmodel.errors import ImageRefusedError, InvalidObjectError
from vitmodel.node.models import UID_LENGTH
from vitmodel.pixels.dicom_header import FOR_PROCESSING_CLASSES, check_modality
from vitmodel.pixels.functional_groups import promote_functional_groups
from vitmodel.pixels.identity import identify
from vitmodel.pixels.tags import TagReader
from vitmodel.results.evidence import MANUFACTURER

UID_PATTERN = re.compile(r"[0-9]+(\.[0-9]+)*")
"""A DICOM UID (PS3.5, section 9.1), except that components may have leading zeros, which some archives write."""


def is_uid(text: str) -> bool:
    """Return whether `text` is a UID and therefore safe as a file name."""
    return len(text) <= UID_LENGTH and UID_PATTERN.fullmatch(text) is not None


@dataclass(frozen=True, kw_only=True)
class ObjectFacts:
    """The header of a received object, as far as the node needs it."""

    sop_uid: str
    study_uid: str
    series_uid: str
    sop_class: str
    syntax: str
    patient_id: str
    issuer: str
    study_date: str
    accession: str
    laterality: str
    view: str
    ignored: str
    """Why the object is not scored; empty = it is."""


def read_facts(content: bytes) -> ObjectFacts:
    """Return the facts about a DICOM file.

    Raises:
        InvalidObjectError: The file cannot be read, or one of its UIDs is missing or no UID.
    """
    try:
        dataset = dcmread(io.BytesIO(content), stop_before_pixels=True)
    except Exception as error:
        raise InvalidObjectError(f"the data set cannot be read ({type(error).__name__})") from error
    tags = TagReader(dataset, [])
    uids = {
        keyword: tags.text(keyword)
        for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID")
    }
    for keyword, uid in uids.items():
        if not is_uid(uid):
            raise InvalidObjectError(f"{keyword} is missing or no UID")
    sop_class = uids["SOPClassUID"]
    ignored = why_ignored(dataset, tags, sop_class)
    with contextlib.suppress(Exception):  # pydicom's exceptions for damaged bytes have no common type
        promote_functional_groups(dataset)
    identity = identify(tags)
    return ObjectFacts(
        sop_uid=uids["SOPInstanceUID"],
        study_uid=uids["StudyInstanceUID"],
        series_uid=uids["SeriesInstanceUID"],
        sop_class=sop_class,
        syntax=_syntax(dataset),
        patient_id=identity.patient_id[:64],
        issuer=identity.issuer[:64],
        study_date=tags.text("StudyDate")[:8],
        accession=identity.accession[:64],
        laterality=identity.laterality if identity.laterality in ("L", "R") else "",
        view=identity.view[:16],
        ignored=ignored,
    )


def why_ignored(dataset: Dataset, tags: TagReader, sop_class: str) -> str:
    """Return why an object is not scored, or '' if it is.

    Only what is no view for reading is left out here. The scoring gives the reason for a mammogram that it refuses.
    """
    if tags.text("Manufacturer") == MANUFACTURER:
        return "own result"
    try:
        check_modality(tags, sop_class)
    except ImageRefusedError:
        return f"modality {_safe(tags.code('Modality')) or 'unknown'}"
    if "Rows" not in dataset:
        return "no image"
    if tags.code("QualityControlImage") == "YES":
        return "quality control"
    if tags.code("PresentationIntentType") == "FOR PROCESSING" or sop_class in FOR_PROCESSING_CLASSES:
        return "for processing"
    return ""


def _syntax(dataset: Any) -> str:
    return str(getattr(dataset.file_meta, "TransferSyntaxUID", ""))[:UID_LENGTH]


def _safe(code: str) -> str:
    """Return a code string if it is one: a damaged header could hold anything in its place."""
    return code if re.fullmatch(r"[A-Z0-9_]{1,16}", code) else ""
