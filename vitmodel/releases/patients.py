"""Tell patients, exams and images apart by the DICOM hierarchy: issuer and PatientID, study, SOP instance.

Names of files and folders decide only where the hierarchy is silent. Every collision is a warning that names both
sides; no patient's name or birth date is shown.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pandas as pd

from vitmodel.pixels.dicom import DicomFile
from vitmodel.pixels.identity import ImageIdentity

logger = logging.getLogger(__name__)
Key = TypeVar("Key", bound=Hashable)

MAX_SHOWN = 5
"""Number of collisions of one kind that the log describes."""
PLACEHOLDER = re.compile(
    r"|[0x*?._-]+|(the )?(anon(ymous|ymized|ymised|ymisiert|ym|yme)?|unknown|none|null|nan|n/?a|removed"
    r"|redacted|deleted|de-?identified|no[ _-]?(id|name)|patient([ _-]?id)?|test|unbekannt|inconnu|desconocido)"
    r"[ _^-]*(patient|id)?",
    re.IGNORECASE,
)
"""Values that de-identification writes in place of a PatientID or AccessionNumber: they identify nobody."""
PLACEHOLDER_DATES = {"00010101", "11111111", "18000101", "19000101", "19010101", "19700101", "20000101"}


@dataclass(frozen=True)
class IdentifiedFile:
    """A file, what its header says, and the patient that its name or folder suggests."""

    path: str
    identity: ImageIdentity
    name: str

    @property
    def study(self) -> str:
        """The study, or the file itself where the study is unknown."""
        return self.identity.study_id or self.path

    @property
    def has_patient(self) -> bool:
        """Whether the PatientID identifies somebody."""
        return PLACEHOLDER.fullmatch(self.identity.patient_id) is None

    @property
    def exam_date(self) -> str:
        """The date of the exam, '' if it is unknown or a placeholder."""
        return "" if self.identity.exam_date in PLACEHOLDER_DATES else self.identity.exam_date

    @property
    def accession(self) -> str:
        """The AccessionNumber, '' if it is unknown or a placeholder."""
        return "" if PLACEHOLDER.fullmatch(self.identity.accession) else self.identity.accession


def resolve(files: Sequence[IdentifiedFile]) -> pd.DataFrame:
    """Return the columns patient_id, exam_id and instance_uid of the files."""
    instances = resolve_instances(files)
    patients = resolve_patients(files)
    exams = resolve_exams(files, patients, instances)
    return pd.DataFrame({"patient_id": patients, "exam_id": exams, "instance_uid": instances})


def resolve_patients(files: Sequence[IdentifiedFile]) -> list[str]:
    """Return the patient of each file: one patient per issuer and PatientID, and per study where the id says nothing.

    An id that several issuers share gets the issuer as a prefix. Two persons with the same id, told apart by birth date
    or name, get a number as a suffix.
    """
    patients = [""] * len(files)
    by_id = _group(range(len(files)), lambda row: files[row].identity.patient_id if files[row].has_patient else "")
    unknown = by_id.pop("", [])
    notes: list[str] = []
    for patient, rows in by_id.items():
        for row, label in zip(rows, _labels_of_id(patient, [files[row] for row in rows], notes), strict=True):
            patients[row] = f"{label}-{patient}" if label != patient and label in by_id else label
    _warn("a PatientID is shared by several patients, who are kept apart", notes)
    _warn_of_shared_studies(files, patients)
    _fill_unknown(files, patients, unknown)
    return patients


def _labels_of_id(patient: str, files: Sequence[IdentifiedFile], notes: list[str]) -> list[str]:
    """Return the patient of each of the files that share a PatientID, and add a note if they are several patients."""
    issuer_of_study = {file.study: file.identity.issuer for file in files if file.identity.issuer}
    issuers = [issuer_of_study.get(file.study, "") for file in files]
    several = len(set(issuers) - {""}) > 1
    labels = [f"{issuer}-{patient}" if several and issuer else patient for issuer in issuers]
    persons: dict[str, list[_Person]] = defaultdict(list)
    person_of_study: dict[tuple[str, str], int] = {}
    for number, file in enumerate(files):
        known = persons[labels[number]]
        key = (labels[number], file.study)
        if key not in person_of_study:
            person_of_study[key] = _find_person(known, file.identity)
        if person_of_study[key]:
            labels[number] += f"-{person_of_study[key] + 1}"
    first_files: dict[str, str] = {}
    for label, file in zip(labels, files, strict=True):
        first_files.setdefault(label, file.path)
    if len(first_files) > 1:
        notes.append(", ".join(first_files.values()))
    return labels


@dataclass
class _Person:
    """What is known of a person: birth date and words of the name."""

    birth_date: str
    words: set[str] = field(default_factory=set)

    def differs_from(self, other: _Person) -> bool:
        """Return whether two persons cannot be the same."""
        if self.birth_date and other.birth_date:
            return not (self.birth_date.startswith(other.birth_date) or other.birth_date.startswith(self.birth_date))
        return bool(self.words and other.words) and self.words.isdisjoint(other.words)


def _find_person(persons: list[_Person], identity: ImageIdentity) -> int:
    """Return the index of the person whom the identity may be, who is added if there is none."""
    words = {word for word in re.findall(r"\w+", identity.patient_name.casefold()) if not PLACEHOLDER.fullmatch(word)}
    if any(character.isdigit() for word in words for character in word):  # a pseudonym may differ between studies
        words = set()
    birth_date = re.sub(r"\D", "", identity.birth_date)
    new = _Person("" if birth_date in PLACEHOLDER_DATES else birth_date, words)
    for number, person in enumerate(persons):
        if not person.differs_from(new):
            person.birth_date = person.birth_date or new.birth_date
            person.words |= new.words
            return number
    persons.append(new)
    return len(persons) - 1


def _fill_unknown(files: Sequence[IdentifiedFile], patients: list[str], unknown: Sequence[int]) -> None:
    """Fill in the patients of the files whose PatientID says nothing.

    It is the patient of the study's other files, else the name of the file or folder where it stands for one study
    only, else the StudyInstanceUID.
    """
    patient_of_study = _unique_patients(files, patients)
    taken = set(patients) - {""}
    groups = Groups(unknown)
    groups.join(lambda row: files[row].study)
    groups.join(lambda row: files[row].accession and (files[row].accession, files[row].exam_date))
    units = groups.members()
    units_of_name: dict[str, set[int]] = defaultdict(set)
    units_of_id: dict[str, set[int]] = defaultdict(set)
    for number, rows in enumerate(units):
        for row in rows:
            units_of_name[files[row].name].add(number)
            units_of_id[files[row].identity.patient_id].add(number)
    by_study = []
    for number, rows in enumerate(units):
        first = files[rows[0]]
        stated = first.identity.patient_id
        names = {files[row].name for row in rows}
        if first.study in patient_of_study:
            label = patient_of_study[first.study]
        elif stated and units_of_id[stated] == {number} and stated not in taken:
            label = stated
        elif len(names) == 1 and (not first.identity.study_id or units_of_name[first.name] == {number}):
            label = first.name
        else:
            label = first.study
            by_study.append(f"the study of {first.path}")
        for row in rows:
            patients[row] = label
    _warn(
        "the PatientID is empty or a placeholder, so each study counts as a patient of its own; if several studies are "
        "of one woman, state the patients in a table of your own",
        by_study,
    )


def _unique_patients(files: Sequence[IdentifiedFile], patients: Sequence[str]) -> dict[str, str]:
    """Return study -> patient, for the studies of which one patient is known."""
    known: dict[str, set[str]] = defaultdict(set)
    for file, patient in zip(files, patients, strict=True):
        if patient and file.identity.study_id:
            known[file.study].add(patient)
    return {study: next(iter(several)) for study, several in known.items() if len(several) == 1}


def _warn_of_shared_studies(files: Sequence[IdentifiedFile], patients: Sequence[str]) -> None:
    first_files: dict[str, dict[str, str]] = defaultdict(dict)
    for file, patient in zip(files, patients, strict=True):
        if patient and file.identity.study_id:
            first_files[file.study].setdefault(patient, file.path)
    notes = [", ".join(list(of_study.values())[:2]) for of_study in first_files.values() if len(of_study) > 1]
    _warn("a StudyInstanceUID is shared by several patients, who are kept apart by their ids", notes)


def resolve_exams(files: Sequence[IdentifiedFile], patients: Sequence[str], instances: Sequence[str]) -> list[str]:
    """Return the exam of each file: the first StudyInstanceUID of its exam, '' where the patient has one exam.

    Studies of one patient on the same date, or of unknown date with the same AccessionNumber or a common image, are one
    exam, because de-identification may give each image a study of its own.

    Args:
        files: The files.
        patients: The patient of each file.
        instances: The SOPInstanceUID of each file, '' unless it identifies the image.
    """
    exams = [""] * len(files)
    notes = []
    for rows in _group(range(len(files)), lambda row: patients[row]).values():
        studied = [row for row in rows if files[row].identity.study_id]
        clusters = _exams_of_patient([files[row] for row in studied], [instances[row] for row in studied])
        if len(clusters) > 1 and _are_views_of_one_exam([[files[studied[n]] for n in group] for group in clusters]):
            first, second = (files[studied[group[0]]].path for group in clusters[:2])
            notes.append(f"{first}, {second}")
            continue
        for group in clusters if len(clusters) > 1 else ():
            for number in group:
                exams[studied[number]] = files[studied[group[0]]].study
    _warn("different views without a date, each in a study of its own, are taken as one exam", notes)
    return exams


def _exams_of_patient(files: Sequence[IdentifiedFile], instances: Sequence[str]) -> list[list[int]]:
    """Return the positions of the files of each exam of one patient."""
    dates = {file.study: file.exam_date for file in files if file.exam_date}
    ages: dict[str, set[float | None]] = defaultdict(set)
    for file in files:
        ages[dates.get(file.study, "")].add(file.identity.age)

    def date_key(row: int) -> Hashable:
        date = dates.get(files[row].study)
        several_ages = len(ages[date or ""] - {None}) > 1  # the date of all exams may be a made-up one
        return (date, files[row].identity.age) if date and several_ages else date

    groups = Groups(range(len(files)))
    groups.join(lambda row: files[row].study)
    groups.join(lambda row: instances[row])
    groups.join(date_key)
    groups.join(lambda row: files[row].accession if files[row].study not in dates else "")
    return groups.members()


def _are_views_of_one_exam(exams: Sequence[Sequence[IdentifiedFile]]) -> bool:
    """Return whether each of the undated exams has a single view, none of them twice, and no age differs."""
    files = [file for exam in exams for file in exam]
    views = {(file.identity.laterality, file.identity.view, file.identity.kind) for file in files}
    ages = {file.identity.age for file in files} - {None}
    return (
        not any(file.exam_date or file.accession for file in files)
        and all(len({file.identity.image_id for file in exam}) == 1 for exam in exams)
        and len(views) == len(exams)
        and all(side and view for side, view, _ in views)
        and len(ages) < 2
    )


def resolve_instances(files: Sequence[IdentifiedFile]) -> list[str]:
    """Return the SOPInstanceUID of each file; '' if it is unknown, or shared by files with different pixels."""
    instances = [file.identity.image_id for file in files]
    notes = []
    for instance, rows in _group(range(len(files)), lambda row: instances[row]).items():
        if len(rows) == 1 or not instance:
            continue
        if not _have_same_pixels([files[row].path for row in rows]):
            for row in rows:
                instances[row] = ""
            notes.append(f"{files[rows[0]].path}, {files[rows[1]].path}")
    _warn("a SOPInstanceUID is shared by files with different pixels, which all count", notes)
    return instances


def _have_same_pixels(paths: Sequence[str]) -> bool:
    """Return whether all DICOM images that can be read have the same pixels, compressed in the same way or not."""
    frames = _digests(paths, lambda file: file.frame)
    return len(frames) < 2 or len(_digests(paths, lambda file: file.read_stored().tobytes())) < 2


def _digests(paths: Sequence[str], content: Callable[[DicomFile], bytes]) -> set[bytes]:
    """Return the hashes of a content of the files, without files from which it cannot be read."""
    digests = set()
    for path in paths:
        with contextlib.suppress(Exception):  # refused when it is cropped, with its reason
            digests.add(hashlib.sha256(content(DicomFile(path, for_processing="log"))).digest())
    return digests


class Groups:
    """Groups of rows that grow together where rows share a key (union-find)."""

    def __init__(self, rows: Iterable[int]) -> None:
        self._parent = {row: row for row in rows}

    def join(self, key: Callable[[int], Hashable]) -> None:
        """Join the rows whose key is equal; None and '' join nothing."""
        first: dict[Hashable, int] = {}
        for row in self._parent:
            value = key(row)
            if value:
                self._parent[self._root(row)] = self._root(first.setdefault(value, row))

    def members(self) -> list[list[int]]:
        """Return the rows of each group, in order of first appearance."""
        return list(_group(self._parent, self._root).values())

    def _root(self, row: int) -> int:
        while self._parent[row] != row:
            row = self._parent[row]
        return row


def _group(rows: Iterable[int], key: Callable[[int], Key]) -> dict[Key, list[int]]:
    """Return the rows of each key, in order of first appearance."""
    groups: dict[Key, list[int]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _warn(what: str, notes: Sequence[str]) -> None:
    """Log a warning on the collisions of one kind, if there are any."""
    if notes:
        more = f"; and {len(notes) - MAX_SHOWN} more" if len(notes) > MAX_SHOWN else ""
        logger.warning("%s: %s%s", what, "; ".join(notes[:MAX_SHOWN]), more)
