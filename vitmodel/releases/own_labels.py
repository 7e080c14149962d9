"""Merge the rows of the user's own table that describe one image or breast, and join labels to DICOM headers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vitmodel.errors import UsageError

logger = logging.getLogger(__name__)

JOIN_COLUMNS = ("exam_id", "laterality", "view")
"""Columns by which a label is joined to an image where the table states them, as well as by patient."""
WORST_OF_ROWS = frozenset(("cancer", "invasive", "biopsy", "birads"))
"""Columns of which the largest value of several rows counts; without a side in the table they hold for both breasts."""
LISTS = frozenset(("lesions", "findings", "finding_boxes"))
MAX_ROWS = 5
"""Number of rows that a warning names."""


def merge_rows(table: pd.DataFrame, keys: Sequence[str], path: Path, what: str) -> pd.DataFrame:
    """Return one row per value of `keys`: the worst finding counts, other values are those of the first row.

    Args:
        table: Rows; those of which a key is unknown are not merged.
        keys: Columns that identify what a row is about.
        path: The table, for the log.
        what: What rows with the same keys have in common, for the log.
    """
    repeated = table[list(keys)].notna().all(axis=1) & table.duplicated(list(keys), keep=False)
    if not repeated.any():
        return table
    groups = table[repeated].groupby(list(keys), sort=False)
    merged = groups.first()
    for column in set(table) & WORST_OF_ROWS:
        merged[column] = groups[column].max()
    for column in set(table) & LISTS:
        merged[column] = groups[column].agg(lambda cells: ";".join(dict.fromkeys(cells.dropna())) or np.nan)
    message = "%s: %d rows are merged into %d, because they are %s: the worst one counts"
    logger.warning(message, path, int(repeated.sum()), len(merged), what)
    return pd.concat([table[~repeated], merged.reset_index()[list(table)]], ignore_index=True)


def join_labels(table: pd.DataFrame, images: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Return the images with the labels of the table's row of the same patient and, where stated, exam, side and view.

    A row that does not state what other rows state, for example a side, holds for images only if all images that it
    may mean agree in that. Images without a row have no labels.

    Args:
        table: Labels of patients or breasts, unknown = NaN.
        images: The images as their headers describe them, unknown = ''.
        path: The table, for messages.

    Raises:
        UsageError: No image belongs to a row.
    """
    keys = ["patient_id", *(name for name in JOIN_COLUMNS if name in table and table[name].notna().any())]
    _warn_of_labels_per_patient(table, keys, images, path)
    stated = table[keys].notna()
    complete = stated.all(axis=1)
    exact = merge_rows(table[complete], keys, path, f"of the same {' and '.join(keys)}")
    rows = pd.concat([exact, table[~complete]], ignore_index=True)
    described = _fill_single_exams(images[keys], table)
    row_of_image = _find_rows(described, rows.iloc[: len(exact)], keys)
    for pattern, part in rows.iloc[len(exact) :].groupby([rows[key].notna() for key in keys]):
        known = [key for key, is_known in zip(keys, pattern, strict=True) if is_known]
        silent = [key for key in keys if key not in known]
        agree = (described.groupby(known)[silent].transform("nunique") == 1).all(axis=1)
        found = _find_rows(described[agree], part.drop_duplicates(known, keep=False), known)
        row_of_image = row_of_image.fillna(found)
    matched = int(row_of_image.notna().sum())
    if not matched:
        raise UsageError(f"{path}: no image has the {' and '.join(keys)} of a row; add a column path")
    logger.info("%s: %d of %d images have a row of the same %s", path, matched, len(images), " and ".join(keys))
    _warn_of_incomplete_rows(stated, len(set(row_of_image.dropna()) - set(range(len(exact)))), path)
    labels = rows[[name for name in rows if name not in images]].reindex(row_of_image)
    return images.join(labels.set_axis(images.index))


def _find_rows(images: pd.DataFrame, rows: pd.DataFrame, keys: list[str]) -> pd.Series:
    """Return the index of the row with the same keys for each image, NaN if there is none; keys of rows are unique."""
    row_of_image = images[keys].merge(rows[keys].assign(row=rows.index), how="left", on=keys)["row"]
    return row_of_image.set_axis(images.index).where((images[keys[1:]] != "").all(axis=1))


def _fill_single_exams(images: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Return the images with the table's exam of each patient who has a single one in both.

    The headers give an exam no id if it is the patient's only one.
    """
    if "exam_id" not in images:
        return images
    exams = table.groupby("patient_id").exam_id
    single = exams.first()[exams.nunique() == 1]
    return images.assign(exam_id=images.exam_id.where(images.exam_id != "", images.patient_id.map(single).fillna("")))


def _warn_of_labels_per_patient(table: pd.DataFrame, keys: list[str], images: pd.DataFrame, path: Path) -> None:
    """Warn if the table states no side, so that both breasts have the label of the patient."""
    labels = sorted(WORST_OF_ROWS & set(table))
    if labels and "laterality" not in keys and set(images.laterality) != {""}:
        logger.warning(
            "%s: no column has the side, so %s of a patient holds for both breasts, also for a healthy one; add a "
            "column laterality with L or R",
            path,
            " and ".join(labels),
        )


def _warn_of_incomplete_rows(stated: pd.DataFrame, used: int, path: Path) -> None:
    """Warn of rows that do not state what other rows state; `used` of them could be joined nevertheless."""
    incomplete = stated[~stated.all(axis=1)]
    if incomplete.empty:
        return
    columns = " or ".join(name for name in incomplete if not incomplete[name].all())
    shown = ", ".join(str(row + 1) for row in incomplete.index[:MAX_ROWS])
    logger.warning(
        "%s: column %s is empty in %d rows (row %s%s); %d of them hold for images that agree in it, the labels of the "
        "others are left out; fill in the column",
        path,
        columns,
        len(incomplete),
        shown,
        ", ..." if len(incomplete) > MAX_ROWS else "",
        used,
    )
