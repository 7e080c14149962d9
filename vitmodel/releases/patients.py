"""Separate patients, exams and images by the DICOM hierarchy: issuer and PatientID, study, SOP instance.

Names of files and folders decide only where the hierarchy is silent. Every collision is a warning that names both
sides; no patient's name or birth date is shown.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from vitmodel.pixels.identity import ImageIdentity
from vitmodel.releases.exams import resolve_exams, resolve_instances
from vitmodel.releases.identified_files import (
    PLACEHOLDER,
    PLACEHOLDER_DATES,
    Groups,
    IdentifiedFile,
    group_rows,
    warn_of_collisions,
)


def resolve(files: Sequence[IdentifiedFile]) -> pd.DataFrame:
    """Return the columns patient_id, exam_id, instance_uid and shared_study of the files."""
    instances = resolve_instances(files)
    patients = resolve_patients(files)
    exams = resolve_exams(files, patients, instances)
    shared = find_shared_studies(files, patients)
    columns = {"patient_id": patients, "exam_id": exams, "instance_uid": instances, "shared_study": shared}
    return pd.DataFrame(columns)


def resolve_patients(files: Sequence[IdentifiedFile]) -> list[str]:
    """Return the patient of each file: one patient per issuer and PatientID, and per study where the id says nothing.

    An id that several issuers share gets the issuer as a prefix. Two persons with the same id, distinguished by birth
    date or name, get a number as a suffix.
    """
    patients = [""] * len(files)
    by_id = group_rows(range(len(files)), lambda row: files[row].identity.patient_id if files[row].has_patient else "")
    unknown = by_id.pop("", [])
    notes: list[str] = []
    for patient, rows in by_id.items():
        for row, label in zip(rows, _labels_of_id(patient, [files[row] for row in rows], notes), strict=True):
            patients[row] = f"{label}-{patient}" if label != patient and label in by_id else label
    warn_of_collisions("a PatientID is shared by several patients, who are kept apart", notes)
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

    It is the patient of the study's other files, else the name of the file or folder where only one study
    has it, else the StudyInstanceUID.
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
    warn_of_collisions(
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


def find_shared_studies(files: Sequence[IdentifiedFile], patients: Sequence[str]) -> list[float]:
    """Return for each file whether several patients have its StudyInstanceUID, 1 or 0, and warn of such studies."""
    first_files: dict[str, dict[str, str]] = defaultdict(dict)
    for file, patient in zip(files, patients, strict=True):
        if file.has_patient and file.identity.study_id:
            first_files[file.study].setdefault(patient, file.path)
    notes = [", ".join(list(of_study.values())[:2]) for of_study in first_files.values() if len(of_study) > 1]
    warn_of_collisions("a StudyInstanceUID is shared by several patients, who are kept apart by their ids", notes)
    return [float(len(first_files.get(file.study, {})) > 1) for file in files]
