"""The manifest, a table with one row per image: reading, checking, writing and merging it, and the search for leaks.

A row is never dropped: an image that cannot be used stays, with its status and reason. Unknown values are NaN (empty in
the file), never 0. Only ids, laterality, view and path, which are always text, use '' instead.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vitmodel.data.columns import COLUMNS, PATH_COLUMNS, REQUIRED_COLUMNS, ManifestColumn
from vitmodel.data.tables import read_table, write_csv
from vitmodel.errors import UsageError

logger = logging.getLogger(__name__)

BOOLEAN_TEXT = {"true": "1", "false": "0"}
CORRECT_OR_EMPTY = "correct it, or leave it empty if it is unknown"


def as_manifest(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return `frame` as a manifest: all of `COLUMNS`, typed and checked (unknown = NaN), then its other columns.

    Args:
        frame: A table with at least the required columns.
        name: Name of the table in messages.

    Raises:
        UsageError: The table is not valid. The message names the column and the first wrong row, counted from 1 below
            the header.
    """
    missing = [column for column in REQUIRED_COLUMNS if column not in frame]
    if missing:
        raise UsageError(f"{name}: column {missing[0]} is missing; a manifest needs {', '.join(REQUIRED_COLUMNS)}")
    typed = {
        column.name: convert_column(frame[column.name], column, name)
        if column.name in frame
        else _unknown(column, frame)
        for column in COLUMNS
    }
    extra = {str(column): frame[column] for column in frame if column not in typed}
    table = pd.DataFrame(typed | extra).reset_index(drop=True)
    check_manifest(table, name)
    return table


def _unknown(column: ManifestColumn, frame: pd.DataFrame) -> pd.Series:
    """Return a column that the table `frame` lacks."""
    is_text = column.kind in ("text", "path")
    blank = "" if is_text and column.role == "id" else np.nan
    return pd.Series(blank, index=frame.index, dtype=object if is_text else float)


def convert_column(values: pd.Series, column: ManifestColumn, name: str) -> pd.Series:
    """Return the values of a column in the type of its kind; numbers and flags are float."""
    if column.kind in ("text", "path"):
        return _text(values, blank="" if column.role == "id" else np.nan)
    if pd.api.types.is_numeric_dtype(values):
        return values.astype(float)
    text = _text(values, blank=np.nan)
    digits = text.map(lambda value: BOOLEAN_TEXT.get(value.lower(), value), na_action="ignore")
    numbers = pd.to_numeric(digits, errors="coerce")
    invalid = text.notna() & numbers.isna()
    _refuse(invalid, text, f"{name}: column {column.name}", f"is not a number; {CORRECT_OR_EMPTY}")
    return numbers.astype(float)


def _text(values: pd.Series, blank: str | float) -> pd.Series:
    """Return the values as stripped text, with `blank` for empty ones."""
    text = values.astype(object).map(lambda value: str(value).strip(), na_action="ignore").astype(object)
    return text.where(text.notna() & (text != ""), blank)


def check_manifest(table: pd.DataFrame, name: str) -> None:
    """Check a typed table.

    Args:
        table: A table with all of `COLUMNS`.
        name: Name of the table in messages.

    Raises:
        UsageError: The table is empty, an image id is empty or repeated, a patient is empty, a file is in two rows, or
            a value is not allowed in its column. The message names the column and the first wrong row.
    """
    if table.empty:
        raise UsageError(f"{name}: the table has no rows; add a row for each image")
    for id_column in ("image_id", "patient_id"):
        _refuse(table[id_column] == "", table[id_column], f"{name}: column {id_column}", "is empty; fill it in")
    repeated_ids = table.image_id.duplicated()
    _refuse(repeated_ids, table.image_id, f"{name}: column image_id", "is also in an earlier row; make ids unique")
    for column in COLUMNS:
        values = table[column.name]
        where = f"{name}: column {column.name}"
        if column.kind == "flag":
            invalid = values.notna() & ~values.isin([0, 1])
            _refuse(invalid, values, where, f"is neither 0 nor 1; {CORRECT_OR_EMPTY}")
        if column.choices:
            allowed = ", ".join(choice or "empty" for choice in column.choices)
            invalid = values.notna() & ~values.isin(column.choices)
            _refuse(invalid, values, where, f"is not one of {allowed}; correct it")
        if column.kind == "path":
            repeated = values.notna() & (values != "") & values.duplicated()
            _refuse(repeated, values, where, "is also in an earlier row; keep one row per file")
    without_path = (table.path == "") & (table.status != "refused")
    _refuse(without_path, table.path, f"{name}: column path", "is empty; only refused images may have no path")


def _refuse(invalid: pd.Series, values: pd.Series, where: str, problem: str) -> None:
    """Raise UsageError for the first row in which `invalid` is true, if any."""
    rows = np.flatnonzero(invalid)
    if len(rows):
        raise UsageError(f"{where}, row {rows[0] + 1}: {values.iloc[rows[0]]!r} {problem}")


def read_manifest(path: Path | str) -> pd.DataFrame:
    """Return the manifest in the file `path` as a typed, checked table with absolute paths; extra columns are text.

    Raises:
        UsageError: The file cannot be read, or is not a valid manifest.
    """
    path = Path(path)
    return as_manifest(resolve_paths(read_table(path, REQUIRED_COLUMNS), path.parent), str(path))


def read_manifests(paths: Sequence[Path | str]) -> pd.DataFrame:
    """Return the manifests in `paths` as one table.

    Raises:
        UsageError: A manifest cannot be read, or two of them do not fit together.
    """
    tables = [read_manifest(path) for path in paths]
    return tables[0] if len(tables) == 1 else merge_manifests(tables)


def resolve_paths(table: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Return `table` with its path columns, which are relative to `folder`, made absolute."""
    root = os.path.abspath(folder)

    def absolute(path: Any) -> str:
        return os.path.normpath(os.path.join(root, str(path).strip()))

    columns = [column for column in PATH_COLUMNS if column in table]
    return table.assign(**{column: table[column].map(absolute, na_action="ignore") for column in columns})


def write_manifest(table: pd.DataFrame, path: Path | str) -> None:
    """Write a manifest to `path` as CSV, atomically; paths below the file's folder are written relative to it."""
    folder = os.path.join(os.path.abspath(Path(path).parent), "")
    text = table.copy()
    for column in PATH_COLUMNS:
        text[column] = text[column].str.removeprefix(folder)
    for name, numbers in text.select_dtypes("number").items():
        if (numbers.dropna() % 1 == 0).all():  # write 1, not 1.0, for people who edit the file
            text[name] = numbers.astype("Int64")
    write_csv(text, path)


def usable_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows whose image was not refused."""
    return table[table.status != "refused"]


def prediction_ids(table: pd.DataFrame) -> pd.Series:
    """Return Kaggle's prediction_id of each row: <patient>_<L or R>, or <patient> if the side is unknown.

    The exams of a patient share it; `breast_ids` separates them.
    """
    return (table.patient_id + "_" + table.laterality).str.removesuffix("_")


def exam_ids(table: pd.DataFrame) -> pd.Series:
    """Return each row's exam: <patient> exam <exam_id>, or <patient> if `exam_id` is empty or not a column."""
    return add_exam(table.patient_id, table)


def breast_ids(table: pd.DataFrame) -> pd.Series:
    """Return each row's breast in its exam: the prediction_id, followed by the exam if it is known.

    It is the unit of a breast score: images of two exams never share it.
    """
    return add_exam(prediction_ids(table), table)


def add_exam(ids: pd.Series, table: pd.DataFrame) -> pd.Series:
    """Return the ids, each followed by " exam " and the row's `exam_id` where that is known."""
    if "exam_id" not in table:
        return ids
    exams = table.exam_id.fillna("").astype(str)
    ids = ids.str.replace(" exam(?= |$)", "  exam", regex=True)  # no id equals the key of another exam
    return ids.where(exams == "", ids + " exam " + exams)


def is_repeated_file(table: pd.DataFrame) -> pd.Series:
    """Return whether each row has the same image as an earlier usable row of its breast.

    The same image is the same file, byte for byte, or the same `instance_uid`: a file that was sent again with another
    header. Such an image must not count twice in the breast's score.
    """
    usable = usable_rows(table)
    repeated = pd.Series(False, index=table.index)
    for column in ("source_sha256", "instance_uid"):
        if column in usable:
            known = usable.dropna(subset=[column])
            images = pd.DataFrame({"breast": breast_ids(known), "image": known[column]})
            repeated |= images.duplicated().reindex(table.index, fill_value=False)
    return repeated


def merge_manifests(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return several releases as one manifest.

    An image or patient id that two releases (values of `dataset`) share gets the release's name as a prefix. The number
    of rows with the same file is logged.

    Raises:
        UsageError: One release has the same image twice.
    """
    table = pd.concat([part.astype(object) for part in tables], ignore_index=True)
    release = table.dataset.fillna("unnamed")
    for column in ("image_id", "patient_id"):
        shared_ids = release.groupby(table[column]).nunique() > 1
        is_shared = table[column].map(shared_ids)
        table[column] = table[column].where(~is_shared, release + "-" + table[column])
    merged = as_manifest(table, "the merged table")
    copies = find_duplicates(merged)
    if len(copies):
        logger.warning(
            "%d images of the merged table are copies of %d files", len(copies), copies.source_sha256.nunique()
        )
    return merged


def find_duplicates(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows whose source file has the same bytes as another row's, with copies next to each other."""
    hashed = table[table.source_sha256.notna()]
    return hashed[hashed.source_sha256.duplicated(keep=False)].sort_values(["source_sha256", "image_id"])


def find_leaks(table: pd.DataFrame, by: str = "split") -> pd.DataFrame:
    """Find the patients and files (by their bytes) that are in more than one part of the data.

    Args:
        table: A manifest.
        by: Column of the parts: split or fold.

    Returns:
        One row per leak with the columns kind (patient_id or source_sha256), value, parts (such as 'test, train') and
        images (their number). Empty if there is none.
    """
    leaks = []
    for kind in ("patient_id", "source_sha256"):
        parts = table.dropna(subset=[kind, by]).groupby(kind)[by]
        for value in parts.nunique().loc[lambda count: count > 1].index:
            group = parts.get_group(value)
            leaks.append((kind, value, ", ".join(sorted(map(str, group.unique()))), len(group)))
    return pd.DataFrame(leaks, columns=["kind", "value", "parts", "images"])
