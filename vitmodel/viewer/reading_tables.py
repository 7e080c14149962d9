"""Readings as tables: labels for `vitmodel etl`, and one row per reader and breast to analyse reader studies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from vitmodel.viewer.exams import Exam
from vitmodel.viewer.readings import BreastReading, Reading

LABEL_COLUMNS = (
    "image_id", "patient_id", "exam_id", "laterality", "view", "path", "birads", "finding_boxes", "reader", "stored",
)  # fmt: skip
STUDY_COLUMNS = (
    "reader", "position", "patient_id", "exam_id", "laterality", "birads_unaided", "birads_aided", "agrees", "boxes",
    "note", "stored", "seconds", "active_seconds", "probability", "decision", "truth",
)  # fmt: skip


def label_table(exams: Iterable[Exam], readings: Sequence[Reading]) -> pd.DataFrame:
    """Return the latest reading of each reader as labels, one row per reader and image with a known file.

    `vitmodel etl` reads the table. Boxes are findings, because no pathology proves them; `cancer` is not a column for
    the same reason. Several readers of an image are rows of it; of these, `etl` takes the worst BI-RADS.

    Args:
        exams: The exams that were shown.
        readings: The readings in the order of storing.
    """
    by_exam = {exam.ids: exam for exam in exams}
    latest = {(reading.reader, *reading.exam): reading for reading in readings if reading.exam in by_exam}
    rows = [row for reading in latest.values() for row in _label_rows(by_exam[reading.exam], reading)]
    return pd.DataFrame(rows, columns=list(LABEL_COLUMNS))


def _label_rows(exam: Exam, reading: Reading) -> Iterator[dict[str, Any]]:
    for image in exam.images:
        boxes = [box.box for box in reading.boxes if box.image_id == image.image_id]
        birads = reading.breasts.get(image.side, BreastReading()).birads
        if not image.path or not (birads or boxes):
            continue
        yield {
            "image_id": image.image_id,
            "patient_id": exam.patient_id,
            "exam_id": exam.exam_id,
            "laterality": image.side,
            "view": image.view,
            "path": image.path,
            "birads": birads,
            "finding_boxes": ";".join(" ".join(f"{number:g}" for number in box) for box in boxes),
            "reader": reading.reader,
            "stored": reading.stored,
        }


def study_table(
    exams: Iterable[Exam], readings: Sequence[Reading], truth: Mapping[str, Mapping[str, float]]
) -> pd.DataFrame:
    """Return one row per reader, exam and breast, for the analysis of several readers and cases.

    `birads_unaided` is the first reading while the scores were hidden, and `stored` and both times are its own;
    `birads_aided` is the latest one with the scores in view. A breast that was only read with them has no unaided one.

    Args:
        exams: The exams that were shown.
        readings: The readings in the order of storing.
        truth: Key of the exam -> side -> label, which becomes the column `truth`; without an entry it is empty.
    """
    by_exam = {exam.ids: exam for exam in exams}
    groups: dict[tuple[str, ...], list[Reading]] = {}
    for reading in readings:
        if reading.exam in by_exam:
            groups.setdefault((reading.reader, *reading.exam), []).append(reading)
    rows = []
    positions: dict[str, int] = {}
    for (reader, *_), group in groups.items():
        positions[reader] = positions.get(reader, 0) + 1
        exam = by_exam[group[0].exam]
        for row in _study_rows(exam, group):
            label = truth.get(exam.key, {}).get(row["laterality"])
            rows.append({"reader": reader, "position": positions[reader], **row, "truth": label})
    return pd.DataFrame(rows, columns=list(STUDY_COLUMNS))


def _study_rows(exam: Exam, group: Sequence[Reading]) -> Iterator[dict[str, Any]]:
    """Yield the breasts of an exam from the readings of one reader."""
    unaided = next((reading for reading in group if reading.is_blinded), None)
    aided = next((reading for reading in reversed(group) if not reading.is_blinded), None)
    timed = unaided or group[0]
    for breast in exam.breasts:
        first, last = (
            reading.breasts.get(breast.side, BreastReading()) if reading else BreastReading()
            for reading in (unaided, aided)
        )
        images = {image.image_id for image in exam.images if image.side == breast.side}
        yield {
            "patient_id": exam.patient_id,
            "exam_id": exam.exam_id,
            "laterality": breast.side,
            "birads_unaided": first.birads,
            "birads_aided": last.birads,
            "agrees": None if last.agrees is None else int(last.agrees),
            "boxes": sum(box.image_id in images for box in timed.boxes),
            "note": timed.note,
            "stored": timed.stored,
            "seconds": timed.seconds,
            "active_seconds": timed.active_seconds,
            "probability": breast.probability,
            "decision": None if breast.is_positive is None else int(breast.is_positive),
        }
