"""THE table: one row per image, its columns, types and checks, merging, and the audit for leaks. Knows no release and no pixels.

A row is never dropped: an image that cannot be used stays with its status and reason. What is not known is NaN (empty in the file),
never 0; only ids, laterality, view and path, which are always text, use '' instead.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from vitmodel.errors import UsageError
from vitmodel.utils import atomic_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ManifestColumn:
    """One column: `kind` tells how it is read, `role` what it may be used for (a target never becomes a model's input)."""

    name: str
    kind: Literal["text", "number", "flag", "path"]
    role: Literal["id", "input", "target", "provenance"]
    meaning: str
    required: bool = False
    choices: tuple[str, ...] = ()


COLUMNS: tuple[ManifestColumn, ...] = (
    ManifestColumn("image_id", "text", "id", "unique name of the image", required=True),
    ManifestColumn(
        "patient_id",
        "text",
        "id",
        "the patient, unique across the releases of the table; never an input",
        required=True,
    ),
    ManifestColumn("laterality", "text", "id", "side of the breast", required=True, choices=("L", "R", "")),
    ManifestColumn(
        "view", "text", "id", "projection: CC, MLO, ML, LM, LMO, AT, XCCL ... (DICOM PS3.16 CID 4014)", required=True
    ),
    ManifestColumn(
        "path",
        "path",
        "id",
        "the image to use; relative to the manifest's folder in the file, absolute in memory",
        required=True,
    ),
    ManifestColumn("dataset", "text", "provenance", "the release that the image comes from"),
    ManifestColumn(
        "split", "text", "provenance", "part of the data that all images of the patient belong to: train, val, test"
    ),
    ManifestColumn("fold", "number", "provenance", "cross-validation fold of the patient, from 0"),
    ManifestColumn("cancer", "flag", "target", "1 = cancer in this breast (by pathology), 0 = none"),
    ManifestColumn("invasive", "flag", "target", "1 = the cancer is invasive"),
    ManifestColumn("biopsy", "flag", "target", "1 = the breast was biopsied"),
    ManifestColumn("birads", "number", "target", "BI-RADS assessment, 0 to 6; 4A, 4B and 4C count as 4"),
    ManifestColumn("density", "text", "target", "breast density, ACR category", choices=("A", "B", "C", "D")),
    ManifestColumn("difficult_negative_case", "flag", "target", "1 = a negative that was hard to tell"),
    ManifestColumn(
        "lesions", "text", "target", "boxes of proven cancers in source pixels, x0 y0 x1 y1 each, separated by ';'"
    ),
    ManifestColumn("age", "number", "input", "years"),
    ManifestColumn("implant", "flag", "input", "1 = the breast has an implant"),
    ManifestColumn("site_id", "text", "provenance", "the hospital"),
    ManifestColumn("machine_id", "text", "provenance", "the device"),
    ManifestColumn("source_path", "path", "provenance", "the file as released"),
    ManifestColumn("source_sha256", "text", "provenance", "SHA-256 of that file's bytes"),
    ManifestColumn("status", "text", "provenance", "verdict on the image", choices=("ok", "warned", "refused")),
    ManifestColumn("reason", "text", "provenance", "codes of pixels/verdict.py, separated by ';'"),
    ManifestColumn("remark", "text", "provenance", "the reasons' sentences, with their particulars"),
    ManifestColumn("source_height", "number", "provenance", "rows of the source image"),
    ManifestColumn("source_width", "number", "provenance", "columns of the source image"),
    ManifestColumn("box_x0", "number", "provenance", "crop box in source pixels: left, inclusive"),
    ManifestColumn("box_y0", "number", "provenance", "top, inclusive"),
    ManifestColumn("box_x1", "number", "provenance", "right, exclusive"),
    ManifestColumn("box_y1", "number", "provenance", "bottom, exclusive"),
    ManifestColumn("spacing_row", "number", "provenance", "distance of the source's rows in mm"),
    ManifestColumn("spacing_column", "number", "provenance", "distance of the source's columns in mm"),
    ManifestColumn("flipped", "flag", "provenance", "1 = mirrored to bring the chest wall to its canonical side"),
    ManifestColumn(
        "chest_wall_side",
        "text",
        "provenance",
        "side of the chest wall in the source's pixels",
        choices=("left", "right"),
    ),
    ManifestColumn("photometric", "text", "provenance", "PhotometricInterpretation of the source"),
    ManifestColumn("transfer_syntax", "text", "provenance", "TransferSyntaxUID of the source"),
    ManifestColumn("voi", "text", "provenance", "the values-of-interest transform that was used"),
    ManifestColumn("decoder", "text", "provenance", "what decoded the pixels"),
    ManifestColumn("decode_level", "number", "provenance", "resolution reductions at decoding; 0 = full size"),
    ManifestColumn("preprocessing", "text", "provenance", "how the crop was made, as config.Preprocessing writes it"),
)
REQUIRED_COLUMNS = tuple(column.name for column in COLUMNS if column.required)
PATH_COLUMNS = tuple(column.name for column in COLUMNS if column.kind == "path")
BOOLEAN_TEXT = {"true": "1", "false": "0"}


def as_manifest(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """`frame` with all of COLUMNS, typed and checked (unknown = NaN); other columns follow as they are. `name` stands in messages.

    Raises UsageError naming the column and the first offending row, counted from 1 below the header.
    """
    missing = [column for column in REQUIRED_COLUMNS if column not in frame]
    if missing:
        raise UsageError(f"{name}: column {missing[0]} is missing; a manifest needs {', '.join(REQUIRED_COLUMNS)}")
    unknown = pd.Series(np.nan, index=frame.index)
    typed = {column.name: _typed(frame.get(column.name, unknown), column, name) for column in COLUMNS}
    extra = {str(column): frame[column] for column in frame if column not in typed}
    table = pd.DataFrame(typed | extra).reset_index(drop=True)
    check_manifest(table, name)
    return table


def _typed(values: pd.Series, column: ManifestColumn, name: str) -> pd.Series:
    if column.kind in ("text", "path"):
        return _text(values, blank="" if column.role == "id" else np.nan)
    if pd.api.types.is_numeric_dtype(values):
        return values.astype(float)
    text = _text(values, blank=np.nan)
    numbers = pd.to_numeric(
        text.map(lambda value: BOOLEAN_TEXT.get(value.lower(), value), na_action="ignore"), errors="coerce"
    )
    _refuse(text.notna() & numbers.isna(), text, f"{name}: column {column.name}", "is not a number")
    return numbers.astype(float)


def _text(values: pd.Series, blank: str | float) -> pd.Series:
    text = values.astype(object).map(lambda value: str(value).strip(), na_action="ignore").astype(object)
    return text.where(text.notna() & (text != ""), blank)


def check_manifest(table: pd.DataFrame, name: str) -> None:
    """Refuse an empty table, empty or repeated image ids, empty patients, one file in two rows, and values outside a column's range.

    Raises UsageError naming the column and the first offending row.
    """
    if table.empty:
        raise UsageError(f"{name}: the table has no rows")
    for id_column in ("image_id", "patient_id"):
        _refuse(table[id_column] == "", table[id_column], f"{name}: column {id_column}", "is empty")
    _refuse(table.image_id.duplicated(), table.image_id, f"{name}: column image_id", "stands in an earlier row, too")
    for column in COLUMNS:
        values, where = table[column.name], f"{name}: column {column.name}"
        if column.kind == "flag":
            _refuse(
                values.notna() & ~values.isin([0, 1]),
                values,
                where,
                "is neither 0 nor 1 (leave it empty where it is unknown)",
            )
        if column.choices:
            allowed = ", ".join(choice or "empty" for choice in column.choices)
            _refuse(values.notna() & ~values.isin(column.choices), values, where, f"is none of {allowed}")
        if column.kind == "path":
            _refuse(
                values.notna() & (values != "") & values.duplicated(), values, where, "stands in an earlier row, too"
            )
    lost = (table.path == "") & (table.status != "refused")
    _refuse(lost, table.path, f"{name}: column path", "is empty, which only a refused image may be")


def _refuse(bad: pd.Series, values: pd.Series, where: str, problem: str) -> None:
    rows = np.flatnonzero(bad)
    if len(rows):
        raise UsageError(f"{where}, row {rows[0] + 1}: {values.iloc[rows[0]]!r} {problem}")


def read_manifest(path: Path | str) -> pd.DataFrame:
    """The manifest in `path` as a typed, checked table with absolute paths; extra columns as text. Raises UsageError."""
    path = Path(path)
    return as_manifest(resolve_paths(read_table(path, REQUIRED_COLUMNS), path.parent), str(path))


def read_manifests(paths: Sequence[Path | str]) -> pd.DataFrame:
    """Return the manifests in `paths` as one table.

    Raises:
        UsageError: A manifest cannot be read, or two of them do not fit together.
    """
    tables = [read_manifest(path) for path in paths]
    return tables[0] if len(tables) == 1 else merge_manifests(tables)


def read_table(path: Path | str, needed: Sequence[str] = (), separator: str = ",") -> pd.DataFrame:
    """A CSV file with every cell as text and NaN where it is empty. Raises UsageError naming the file, or the needed column it lacks."""
    try:
        table = pd.read_csv(path, sep=separator, dtype=str, encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # the mother of pandas' EmptyDataError and ParserError, and of UnicodeDecodeError
        raise UsageError(f"{path} is not a table of comma-separated values: {str(error).strip()}") from error
    missing = [column for column in needed if column not in table]
    if missing:
        raise UsageError(f"{path}: column {missing[0]} is missing; the file has {', '.join(map(str, table.columns))}")
    return table


def resolve_paths(table: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """`table` with its path columns, which are relative to `folder`, made absolute."""
    root = os.path.abspath(folder)

    def absolute(path: Any) -> str:
        return os.path.normpath(os.path.join(root, str(path).strip()))

    return table.assign(
        **{column: table[column].map(absolute, na_action="ignore") for column in PATH_COLUMNS if column in table}
    )


def write_manifest(table: pd.DataFrame, path: Path | str) -> None:
    """Write `table` to `path` as CSV, whole or not at all; what lies below that folder is written relative to it."""
    folder = os.path.join(os.path.abspath(Path(path).parent), "")
    text = table.copy()
    for column in PATH_COLUMNS:
        text[column] = text[column].str.removeprefix(folder)
    for name, numbers in text.select_dtypes("number").items():
        if (numbers.dropna() % 1 == 0).all():  # 1 and not 1.0, for people who edit the file
            text[name] = numbers.astype("Int64")
    with atomic_path(path) as temporary:
        text.to_csv(temporary, index=False)


def usable_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows whose image was not refused."""
    return table[table.status != "refused"]


def breast_ids(table: pd.DataFrame) -> pd.Series:
    """The breast of each row, <patient>_<L or R> as Kaggle's prediction_id; where the side is unknown, the patient."""
    return (table.patient_id + "_" + table.laterality).str.removesuffix("_")


def is_repeated_file(table: pd.DataFrame) -> pd.Series:
    """Which rows hold the same file, byte for byte, as an earlier usable row of the same breast, where it would count twice."""
    known = usable_rows(table).dropna(subset=["source_sha256"])
    files = pd.DataFrame({"breast": breast_ids(known), "file": known.source_sha256})
    return files.duplicated().reindex(table.index, fill_value=False)


def merge_manifests(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Several releases as one table; an image or patient id that two of them use is told apart by its dataset's name in front.

    Raises UsageError where one release (one `dataset`) brings the same image twice. Files that several rows share are counted in the log.
    """
    table = pd.concat([part.astype(object) for part in tables], ignore_index=True)
    release = table.dataset.fillna("unnamed")
    for column in ("image_id", "patient_id"):
        shared = release.groupby(table[column]).nunique() > 1
        clash = table[column].map(shared)
        table[column] = table[column].where(~clash, release + "-" + table[column])
    merged = as_manifest(table, "the merged table")
    copies = find_duplicates(merged)
    if len(copies):
        logger.warning(
            "%d images of the merged table are copies of %d files", len(copies), copies.source_sha256.nunique()
        )
    return merged


def find_duplicates(table: pd.DataFrame) -> pd.DataFrame:
    """The rows whose source file has the same bytes as another row's, copies side by side."""
    known = table[table.source_sha256.notna()]
    return known[known.source_sha256.duplicated(keep=False)].sort_values(["source_sha256", "image_id"])


def find_leaks(table: pd.DataFrame, by: str = "split") -> pd.DataFrame:
    """What links two parts of the data: every patient and every file (by its bytes) that stands in more than one value of `by`.

    Returns the columns kind (patient_id or source_sha256), value, parts (such as 'test, train') and images (their number); empty = clean.
    """
    found = []
    for kind in ("patient_id", "source_sha256"):
        parts = table.dropna(subset=[kind, by]).groupby(kind)[by]
        for value in parts.nunique().loc[lambda count: count > 1].index:
            group = parts.get_group(value)
            found.append((kind, value, ", ".join(sorted(map(str, group.unique()))), len(group)))
    return pd.DataFrame(found, columns=["kind", "value", "parts", "images"])
