"""Studies as exams of the reading room: from the files and rows of a job or, before it is scored, from the objects."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitmodel.errors import UsageError
from vitmodel.node.models import Instance, Job, Study
from vitmodel.viewer.exams import BreastEntry, Exam, ImageEntry, Status, to_interval
from vitmodel.viewer.scores_folder import read_scores_folder

JOB_MARK, OBJECT_MARK = "j", "o"
"""First letters of the keys of images: of a job, which never change, and of an object that is not scored."""


def image_place(key: str) -> tuple[int | None, str]:
    """Return the number of the job or the SOP Instance UID in the key of an image; (None, "") if it is no key."""
    number = key[1:].partition("-")[0]
    if key.startswith(JOB_MARK) and number.isascii() and number.isdecimal():
        return int(number), ""
    return None, key[1:] if key.startswith(OBJECT_MARK) else ""


def scored_exam(study: Study, job: Job, folder: Path) -> Exam:
    """Return the exam of a scored job, with what `predict` wrote or, without these files, with its row's scores.

    Args:
        study: The study.
        job: One of its jobs that was scored.
        folder: The node's folder.
    """
    try:
        parts = read_scores_folder(folder / "jobs" / str(job.id))
    except UsageError:
        return summarize(study, job)
    images = [image for part in parts for image in part.images]
    keyed = tuple(replace(image, key=f"{JOB_MARK}{job.id}-{number}") for number, image in enumerate(images))
    return _exam(study, keyed, [breast for part in parts for breast in part.breasts])


def summarize(study: Study, job: Job) -> Exam:
    """Return the exam of a scored job as its row has it: without files, but with all that the worklist shows."""
    scores: dict[str, list[dict[str, Any]]] = json.loads(job.scores)
    images = tuple(
        ImageEntry(
            key=f"{JOB_MARK}{job.id}-{number}",
            image_id=row.get("image_id") or "",
            side=row["laterality"] or "",
            view=row["view"] or "",
            path=None,
            status=row["status"],
            reason=row["reason"] or "",
            remark="",
            probability=row["probability"],
            machine=row.get("machine_id") or "",
        )
        for number, row in enumerate(scores["images"])
    )
    breasts = [
        BreastEntry(
            side=row["laterality"] or "",
            probability=row["probability"],
            is_positive=None if row["decision"] is None else bool(row["decision"]),
            status=row["status"],
            reason=row["reason"] or "",
            views=row.get("views") or "",
            interval=to_interval(row.get("probability_low"), row.get("probability_high")),
        )
        for row in scores["breasts"]
    ]
    return _exam(study, images, breasts)


def unscored_exam(study: Study, instances: Iterable[Instance], folder: Path, *, is_waiting: bool = True) -> Exam:
    """Return the exam of a study without scores.

    Args:
        study: The study.
        instances: Its objects.
        folder: The node's folder.
        is_waiting: Whether it may still be scored; otherwise its images count as refused.
    """
    status: Status = "waiting" if is_waiting else "refused"
    images = tuple(
        ImageEntry(
            key=f"{OBJECT_MARK}{instance.sop_uid}",
            image_id=instance.sop_uid,
            side=instance.laterality,
            view=instance.view,
            path=str(folder / instance.path),
            status=status,
            reason="",
            remark="" if is_waiting else study.reason,
        )
        for instance in instances
        if not instance.ignored
    )
    sides = sorted({image.side for image in images}, reverse=True)
    breasts = [BreastEntry(side, None, None, status, "", _views(images, side)) for side in sides]
    return replace(_exam(study, images, breasts), is_explainable=False)


def _exam(study: Study, images: tuple[ImageEntry, ...], breasts: Sequence[BreastEntry]) -> Exam:
    return Exam(study.patient_id, study.study_uid, images, tuple(breasts), key=study.study_uid)


def _views(images: Iterable[ImageEntry], side: str) -> str:
    return ";".join(image.view for image in images if image.side == side and image.view)
