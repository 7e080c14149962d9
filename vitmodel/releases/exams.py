"""Separate a patient's exams by study, date and accession number, and find images that were sent twice."""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

from vitmodel.pixels.dicom import DicomFile
from vitmodel.releases.identified_files import Groups, IdentifiedFile, group_rows, warn_of_collisions


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
    for rows in group_rows(range(len(files)), lambda row: patients[row]).values():
        studied = [row for row in rows if files[row].identity.study_id]
        clusters = _exams_of_patient([files[row] for row in studied], [instances[row] for row in studied])
        if len(clusters) > 1 and _are_views_of_one_exam([[files[studied[n]] for n in group] for group in clusters]):
            first, second = (files[studied[group[0]]].path for group in clusters[:2])
            notes.append(f"{first}, {second}")
            continue
        for group in clusters if len(clusters) > 1 else ():
            for number in group:
                exams[studied[number]] = files[studied[group[0]]].study
    warn_of_collisions("different views without a date, each in a study of its own, are taken as one exam", notes)
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
    for instance, rows in group_rows(range(len(files)), lambda row: instances[row]).items():
        if len(rows) == 1 or not instance:
            continue
        if not _have_same_pixels([files[row].path for row in rows]):
            for row in rows:
                instances[row] = ""
            notes.append(f"{files[rows[0]].path}, {files[rows[1]].path}")
    warn_of_collisions("a SOPInstanceUID is shared by files with different pixels, which all count", notes)
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
