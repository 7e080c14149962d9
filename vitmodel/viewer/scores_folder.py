"""Read the folder that `vitmodel predict` or `evaluate` wrote into exams."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vitmodel.data.columns import COLUMNS
from vitmodel.data.manifest import read_manifest
from vitmodel.data.tables import read_table
from vitmodel.errors import UsageError
from vitmodel.jobs.journal import JOURNAL, read_journal
from vitmodel.viewer.exams import BreastEntry, Exam, ImageEntry, short_key, to_interval

METRICS = "metrics.json"
"""Name of the metrics in an output folder of `evaluate`."""
BREAST_COLUMNS = {
    "prediction_id", "patient_id", "exam_id", "laterality", "score", "probability", "decision", "n_images", "views",
    "status", "reason", "probability_low", "probability_high",
}  # fmt: skip
"""Columns of breast_scores.csv that have a field of their own; all others are further outputs."""
IMAGE_COLUMNS = {
    "image_id", "patient_id", "exam_id", "laterality", "view", "score", "probability", "breast_score",
    "breast_probability", "decision", "status", "reason", "remark", "source_sha256", "typicality", "grey_mean",
    "grey_contrast", "breast_height_mm", "breast_share", "machine_id",
}  # fmt: skip
"""Columns of scores.csv that are no further output of the model."""
NO_INPUTS = {column.name for column in COLUMNS if column.role != "input"} - {"dataset", "site_id", "machine_id"}
"""Columns of a manifest that are no input of a network, or that have a field of their own."""


def read_scores_folder(folder: Path) -> list[Exam]:
    """Return the exams of a folder of scores, in the order of breast_scores.csv.

    Images are found by the paths in the journal of `predict`, or in the manifest that `evaluate` measured.

    Args:
        folder: The output folder of `vitmodel predict` or `evaluate`.

    Raises:
        UsageError: The folder has no tables of scores.
    """
    images, breasts = (_read(folder / name) for name in ("scores.csv", "breast_scores.csv"))
    records = _records(folder)
    keys = images["source_sha256"].fillna(images["image_id"])
    return make_exams(images, breasts, [records.get(key, {}) for key in keys])


def make_exams(images: pd.DataFrame, breasts: pd.DataFrame, entries: Sequence[Mapping[str, Any]]) -> list[Exam]:
    """Return the exams of tables of scores, in the order of the breasts.

    Args:
        images: Table of images, N rows.
        breasts: Table of breasts.
        entries: The N entries of the journal of `predict`; an empty one = the file of the image is unknown.
    """
    images, breasts = _normalize(images), _normalize(breasts)
    by_exam: dict[tuple[str, str], list[ImageEntry]] = {}
    for number, (row, entry) in enumerate(zip(images.to_dict("records"), entries, strict=True)):
        by_exam.setdefault(_exam_of(row), []).append(_image(row, entry, number))
    breasts_by_exam: dict[tuple[str, str], list[BreastEntry]] = {exam: [] for exam in by_exam}
    for row in breasts.to_dict("records"):
        breasts_by_exam.setdefault(_exam_of(row), []).append(_breast(row))
    return [
        Exam(patient, exam, tuple(by_exam.get((patient, exam), ())), tuple(found))
        for (patient, exam), found in breasts_by_exam.items()
    ]


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise UsageError(
            f"{path.parent}: has no {path.name}; name the output folder of `vitmodel predict` or `evaluate`"
        )
    return read_table(path)


def _normalize(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of scores with exam ids, and with empty texts for what is unknown."""
    table = table.astype(object).where(table.notna(), "")
    return table if "exam_id" in table else table.assign(exam_id="")


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what is known of images by their SHA-256 or, where it is unknown, by their id.

    This is the journal of `predict`, whose keys end with the image's id, or else the manifest of `evaluate`.
    """
    result = {}
    if not (folder / JOURNAL).exists():
        with contextlib.suppress(UsageError):  # without the manifest, exams are shown without their images
            manifest = read_evaluated_manifest(folder)
            for record in manifest.astype(object).where(manifest.notna(), None).to_dict("records"):
                known = {name: value for name, value in record.items() if name not in NO_INPUTS and value is not None}
                result[record["source_sha256"] or record["image_id"]] = {"record": record, "inputs": known}
    for entry in read_journal(folder / JOURNAL).values():
        digest = entry.get("record", {}).get("source_sha256")
        result[digest or Path(entry["key"]).stem] = entry
    return result


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the content of metrics.json.

    Raises:
        UsageError: The folder has none, or it cannot be read.
    """
    try:
        facts = json.loads((folder / METRICS).read_text())
        return {"manifest": facts["manifest"], "label": facts["label"], "threshold": facts["breast"]["threshold"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{folder}: has no {METRICS} of `vitmodel evaluate`") from None


def read_evaluated_manifest(folder: Path) -> pd.DataFrame:
    """Return the manifest that `vitmodel evaluate` measured.

    Raises:
        UsageError: The folder is not of `evaluate`, or the manifest is no longer where it was.
    """
    return read_manifest(read_facts(folder)["manifest"])


def _exam_of(row: Mapping[str, str]) -> tuple[str, str]:
    return row["patient_id"], row["exam_id"]


def _number(value: str | float) -> float | None:
    return None if value == "" else float(value)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _image(row: Mapping[str, str], entry: Mapping[str, Any], number: int) -> ImageEntry:
    """Return the image of a row of scores.csv and its entry of the journal."""
    record = entry.get("record", {})
    spacing = record.get("spacing_row"), record.get("spacing_column")
    box = [record.get(f"box_{name}") for name in ("x0", "y0", "x1", "y1")]
    return ImageEntry(
        key=short_key("image", str(number), row["image_id"]),
        image_id=row["image_id"],
        side=row["laterality"],
        view=row["view"],
        path=record.get("source_path") or entry.get("key"),
        status=row["status"],  # type: ignore[arg-type]
        reason=row["reason"],
        remark=row["remark"],
        probability=_number(row["probability"]),
        rows=_whole(record.get("source_height")),
        columns=_whole(record.get("source_width")),
        spacing=None if None in spacing else spacing,
        chest_wall=record.get("chest_wall_side") or "",
        voi=record.get("voi") or "",
        preprocessing=record.get("preprocessing") or "",
        region=entry.get("region") or (),
        box=None if None in box else tuple(map(int, box)),  # type: ignore[arg-type]
        machine=row.get("machine_id", ""),
        typicality=_number(row.get("typicality", "")),
        outputs={name: value for name, value in row.items() if name not in IMAGE_COLUMNS and value != ""},
        inputs=entry.get("inputs", {}),
    )


def _breast(row: Mapping[str, str]) -> BreastEntry:
    """Return the breast of a row of breast_scores.csv."""
    decision = _number(row["decision"])
    low, high = (_number(row.get(f"probability_{name}", "")) for name in ("low", "high"))
    return BreastEntry(
        side=row["laterality"],
        probability=_number(row["probability"]),
        is_positive=None if decision is None else bool(decision),
        status=row["status"],
        reason=row["reason"],
        views=row["views"],
        outputs={name: value for name, value in row.items() if name not in BREAST_COLUMNS and value != ""},
        interval=to_interval(low, high),
    )
