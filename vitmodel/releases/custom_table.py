"""Read the user's own table: a CSV file or spreadsheet with an image, or a breast, and its patient in each row.

Columns and values may have other names than the manifest's (`vocabulary`). A table without a column of files is joined
to the DICOM headers of the images next to it, by patient and side.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from vitmodel.data.columns import COLUMNS
from vitmodel.data.manifest import as_manifest, resolve_paths
from vitmodel.data.tables import UNKNOWN_WORDS, read_table
from vitmodel.errors import UsageError
from vitmodel.pixels.side_and_view import find_side_and_view
from vitmodel.releases import dicom_folder
from vitmodel.releases.files import image_stem, make_unique
from vitmodel.releases.listing import is_dicom_name
from vitmodel.releases.own_labels import join_labels, merge_rows
from vitmodel.releases.own_paths import resolve_own_paths
from vitmodel.releases.source import Source
from vitmodel.releases.vocabulary import COLUMN_SYNONYMS, UNKNOWN, VALUE_READERS, column_key, fold

logger = logging.getLogger(__name__)

EXPECTED_FILES = (
    "a CSV file or spreadsheet with the columns patient_id and path, or patient_id and a label of each breast; "
    "other columns of the manifest are optional"
)
IMAGES_OF_EXAM = 4
"""Number of images of a screening exam."""
MAX_PROBLEMS = 20
"""Number of problems that one message lists."""
ROUNDED_NUMBER = re.compile(r"\d[.,]\d+[eE]\+\d+")
"""A number in scientific notation, as a spreadsheet rounds long ids."""
TARGETS = tuple(column.name for column in COLUMNS if column.role == "target")
HEADER_COLUMNS = ("laterality", "view", "age", "machine_id", "implant")
"""Columns that are taken from DICOM headers where the table leaves them empty."""
EXAMPLE = "--columns patient_id=PID,cancer=Diagnosis"


def find_listings(source: Source) -> list[Path]:
    """Return the tables of the source that list images or breasts, or the source itself if it is a table."""
    if source.is_file:
        return source.tables
    tables = source.tables
    if source.with_neighbours:  # only the folder above: a folder next to the images may be another project
        tables = [path for path in tables if path.parent == source.root.parent]
    columns = {path: _manifest_columns(source, path) for path in tables}
    with_paths = [path for path, names in columns.items() if {"patient_id", "path"} <= names]
    if with_paths:
        return with_paths
    return [path for path, names in columns.items() if "patient_id" in names and names & set(TARGETS)]


def _manifest_columns(source: Source, path: Path) -> set[str]:
    """Return the manifest's names of a table's columns."""
    names = sorted(source.header(path))
    try:
        renamed = rename_columns(names, source.columns)
    except UsageError:  # the columns that the user states are in another table
        return set()
    return {renamed.get(name, name) for name in names}


def detect(source: Source) -> bool:
    """Return whether the source is a table or contains a table of images or breasts."""
    listings = find_listings(source)
    return len(listings) == 1 if source.with_neighbours else bool(listings)


def read(source: Source, dataset: str = "listing") -> pd.DataFrame:
    """Return the table as a manifest with one row per image.

    Args:
        source: The table, or a folder that contains a single one.
        dataset: Value of the column `dataset`, if the table lacks it. A missing `image_id` is the file's name.

    Raises:
        UsageError: The folder contains several tables, or the table is not valid. The message lists all problems.
    """
    listings = find_listings(source)
    if len(listings) != 1:
        names = ", ".join(path.name for path in listings)
        raise UsageError(
            f"{source.root}: found {len(listings)} tables of images ({names}); pass one of them as the source"
        )
    path = listings[0]
    table = read_table(path)
    renamed = rename_columns(list(table.columns), source.columns)
    _log_renamed(path, renamed)
    table = table.rename(columns=renamed)
    if "patient_id" not in table:
        raise UsageError(
            f"{path}: no column has the patient; the file has {', '.join(table.columns)}; rename one to patient_id, or "
            f"say which it is, for example {EXAMPLE}"
        )
    table = _read_values(table, path)
    if "path" in table:
        own_paths = resolve_own_paths(table.path, source, path)
        table = _merge_findings(resolve_paths(table, path.parent).assign(path=own_paths), path)
        table = _fill_from_headers(table)
    else:
        table = _join_headers(table, source, path)
    blank = pd.Series("", index=table.index)
    paths = table.path.astype(object).fillna("")
    defaults = {
        "image_id": make_unique(paths.map(image_stem), paths, source.folder),
        "laterality": blank,
        "view": blank,
        "dataset": blank + dataset,
    }
    missing = {column: values for column, values in defaults.items() if column not in table}
    return as_manifest(table.assign(**missing), str(path))


def rename_columns(names: list[str], given: Mapping[str, str]) -> dict[str, str]:
    """Return column of the table -> column of the manifest, for the columns that have another name.

    Args:
        names: Columns of the table.
        given: Column of the manifest -> column of the table, as the user states with --columns.

    Raises:
        UsageError: A given column is not in the table.
    """
    renamed = {}
    for target, name in given.items():
        if name not in names:
            raise UsageError(f"--columns {target}={name}: the table has no column {name!r}; it has {', '.join(names)}")
        renamed[name] = target
    by_key = {column_key(name): name for name in reversed(names) if name not in renamed}
    targets = [column.name for column in COLUMNS]
    for target in targets:
        if target in names or target in given:
            continue
        synonyms = (target, *COLUMN_SYNONYMS.get(target, ()))
        own = next((by_key[key] for key in map(column_key, synonyms) if key in by_key), None)
        if own is not None and own not in renamed and own not in targets:
            renamed[own] = target
    return renamed


def _log_renamed(path: Path, renamed: Mapping[str, str]) -> None:
    if not renamed:
        logger.info("%s: read as the table of the images", path)
    else:
        pairs = ", ".join(f"{name} as {target}" for name, target in renamed.items())
        logger.info("%s: read %s; if a column is something else, say so, for example %s", path, pairs, EXAMPLE)


def _read_values(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Return the table with the manifest's values for the words in it; raise UsageError with all problems."""
    problems: list[str] = []
    values = {}
    for column in ("patient_id", "image_id", "exam_id"):
        if column in table:
            problems += _find_rounded_ids(table[column], column)
    for column, (read_value, allowed) in VALUE_READERS.items():
        if column not in table:
            continue
        words = {word: None if fold(word) in UNKNOWN else read_value(word) for word in table[column].dropna().unique()}
        wrong = [word for word, value in words.items() if value is None and fold(word) not in UNKNOWN]
        problems += [_describe(table[column], column, word, f"is not {allowed}") for word in wrong]
        values[column] = table[column].map(words, na_action="ignore")
        _log_words(path, column, words)
    if "view" in table and "laterality" not in table:
        sides = table["view"].map(lambda word: find_side_and_view(word).side or np.nan, na_action="ignore")
        values |= {"laterality": sides} if sides.notna().any() else {}
    empty = table.patient_id.isna() | (table.patient_id.str.strip() == "") | _stand_for_unknown(table.patient_id, path)
    if empty.any():
        problems.append(
            f"column patient_id, row {int(np.argmax(empty)) + 1}: the value is empty; {int(empty.sum())} rows in all"
        )
    if problems:
        shown = problems[:MAX_PROBLEMS]
        if len(problems) > MAX_PROBLEMS:
            shown.append(f"and {len(problems) - MAX_PROBLEMS} more problems")
        raise UsageError(
            f"{path}: correct these values, or leave them empty if they are unknown:\n  " + "\n  ".join(shown)
        )
    return table.assign(**values)


def _stand_for_unknown(patients: pd.Series, path: Path) -> pd.Series:
    """Return which patients are a word such as NA that means unknown there, because it has more rows than any patient.

    In fewer rows the word is the name of a patient; a warning says so.
    """
    is_word = patients.isin(UNKNOWN_WORDS)
    if not is_word.any():
        return is_word
    words = ", ".join(sorted(patients[is_word].unique()))
    others = patients[~is_word].value_counts()
    if is_word.sum() > max(IMAGES_OF_EXAM, others.max() if len(others) else 0):
        return is_word
    logger.warning(
        "%s: column patient_id: %s is read as the name of a patient in %d rows; leave the cell empty if she is unknown",
        path,
        words,
        int(is_word.sum()),
    )
    return pd.Series(False, index=patients.index)


def _log_words(path: Path, column: str, words: Mapping[str, str | None]) -> None:
    """Log how the words of a flag or a side were read, unless they are the manifest's own."""
    read = [f"{word} = {value}" for word, value in words.items() if value is not None and word != value]
    if read and column in ("cancer", "laterality"):
        logger.info("%s: column %s: read %s", path, column, ", ".join(read[:MAX_PROBLEMS]))


def _describe(values: pd.Series, column: str, word: str, problem: str) -> str:
    rows = np.flatnonzero(values == word)
    more = f" (and in {len(rows) - 1} more rows)" if len(rows) > 1 else ""
    return f"column {column}, row {rows[0] + 1}: the value {problem}{more}"  # which may be a misplaced name


def _find_rounded_ids(values: pd.Series, column: str) -> list[str]:
    """Return a problem for each id that a spreadsheet has rounded, so that several patients may have become one."""
    rounded = [word for word in values.dropna().unique() if ROUNDED_NUMBER.fullmatch(word.strip())]
    problem = "is an id that a spreadsheet has rounded to {}; export the table again with this column as text"
    # a rounded number is no longer the id of a patient, so it may be shown
    return [_describe(values, column, word, problem.format(word.strip())) for word in rounded]


def _merge_findings(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Return one row per image: targets are those of its worst finding, other columns those of its first row."""
    repeated = table.path.notna() & table.path.duplicated(keep=False)
    if not repeated.any():
        return table
    for column in ("patient_id", "laterality", "view"):
        if column in table:
            values = table[repeated].groupby("path")[column].nunique()
            if (values > 1).any():
                file = values.index[values > 1][0]
                raise UsageError(f"{path}: column {column}: the rows of image {file} differ; correct them")
    return merge_rows(table, ["path"], path, "findings of the same images")


def _fill_from_headers(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with empty sides, views, ages and machines filled in from the images' DICOM headers."""
    known = table.reindex(columns=[*table, *(name for name in HEADER_COLUMNS if name not in table)])
    incomplete = known[["laterality", "view", "age", "machine_id"]].isna().any(axis=1)
    rows = known.index[incomplete & known.path.map(lambda file: isinstance(file, str) and is_dicom_name(file))]
    if rows.empty:
        return table
    headers = pd.DataFrame(dicom_folder.read_headers(known.path[rows].tolist()), index=rows)
    for column in set(HEADER_COLUMNS) & set(headers):
        known[column] = known[column].astype(object).where(known[column].notna(), headers[column])
    return known


def _join_headers(table: pd.DataFrame, source: Source, path: Path) -> pd.DataFrame:
    """Return the images next to a table of patients or breasts, each with the labels of its patient and side.

    Raises:
        UsageError: There is no image, or no image belongs to a patient of the table.
    """
    files = source.images_of_table
    if not files:
        raise UsageError(
            f"{path}: no column has the image files, and there is no image below {source.image_folder}; add a column "
            "path, or say where the images are with --images FOLDER"
        )
    images = dicom_folder.read_files(files, source.image_folder).dropna(axis=1, how="all")
    ids = table.patient_id.str.strip()
    known = set(ids)
    by_folder = images.path.map(lambda file: next((part for part in Path(file).parts if part in known), None))
    images["patient_id"] = images.patient_id.where(images.patient_id.isin(known) | by_folder.isna(), by_folder)
    if not ids.isin(images.patient_id).any():  # a spreadsheet drops leading zeros
        without_zeros = {patient.lstrip("0"): patient for patient in images.patient_id.unique()}
        ids = ids.map(lambda patient: without_zeros.get(patient.lstrip("0"), patient))
    return join_labels(table.assign(patient_id=ids), images, path)
