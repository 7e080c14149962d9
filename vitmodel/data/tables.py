"""Read tables of text cells as people save them: CSV files of any separator and encoding, and spreadsheets.

`write_csv` writes every table that holds text of a sender. A spreadsheet runs cells that begin with `=`, `+`, `-`, `@`,
a tab or a carriage return as formulas; such a cell gets an apostrophe in front, which `read_table` removes again.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from vitmodel.archives import open_source
from vitmodel.errors import RefusedError, UsageError
from vitmodel.utils import atomic_path

TEXT_TABLE_SUFFIXES = (".csv", ".tsv")
SPREADSHEET_SUFFIXES = (".xlsx", ".xlsm", ".xls", ".ods")
TABLE_SUFFIXES = TEXT_TABLE_SUFFIXES + SPREADSHEET_SUFFIXES
SEPARATORS = (",", ";", "\t")
UNKNOWN_WORDS = (
    *("NA", "N/A", "n/a", "#N/A", "#NA", "<NA>", "NaN", "nan", "-NaN", "-nan", "NULL", "null", "None", "#NULL!"),
)
ID_NAME = re.compile(r"id$|patient", re.IGNORECASE)
"""Names of columns of ids."""
FORMULA = re.compile(r"'*[=+\-@\t\r]")
"""Start of a cell that a spreadsheet could run, with the apostrophes that disarm it."""
PLAIN_NUMBER = re.compile(r"'*-\d+(\.\d+)?")
"""Negative numbers as text, which a spreadsheet reads as numbers."""
BLOCK = 1 << 20


def disarm(cell: object) -> object:
    """Return a cell as it is written: text that a spreadsheet could run gets an apostrophe in front."""
    return f"'{cell}" if isinstance(cell, str) and _is_formula(cell) else cell


def rearm(cell: object) -> object:
    """Return the cell that `disarm` wrote."""
    return cell[1:] if isinstance(cell, str) and cell.startswith("'") and _is_formula(cell) else cell


def _is_formula(cell: str) -> bool:
    return bool(FORMULA.match(cell)) and not PLAIN_NUMBER.fullmatch(cell)


def write_csv(table: pd.DataFrame, path: Path | str) -> None:
    """Write a table without its index as CSV, atomically, so that no spreadsheet runs a cell.

    `read_table` returns the same text. Numbers stay numbers.

    Args:
        table: The table.
        path: The file.

    Raises:
        VitmodelError: The file cannot be written.
    """
    texts = table.select_dtypes(["object", "string", "category"])
    safe = table.assign(**{name: texts[name].astype(object).map(disarm) for name in texts})
    safe = safe.rename(columns=disarm)
    has_return = any("\r" in cell for name in texts for cell in texts[name] if isinstance(cell, str))
    quoting = csv.QUOTE_NONNUMERIC if has_return else csv.QUOTE_MINIMAL  # the csv module leaves "\r" unquoted
    with atomic_path(path) as temporary:
        safe.to_csv(temporary, index=False, errors="backslashreplace", quoting=quoting)


class TextFormat(NamedTuple):
    """How a CSV file is written."""

    encoding: str
    separator: str
    skipped_lines: int
    """Lines before the header: 1 for the line `sep=;` that Excel may write, else 0."""


def is_spreadsheet(path: Path) -> bool:
    """Return whether a file has the suffix of a spreadsheet."""
    return path.suffix.lower() in SPREADSHEET_SUFFIXES


def read_table(
    path: Path | str, needed: Sequence[str] = (), sheet: str | None = None, columns: Collection[str] | None = None
) -> pd.DataFrame:
    """Return a table whose cells are all text, or NaN if empty.

    The separator of a CSV file may be a comma, a semicolon or a tab. Its encoding is UTF-8, with or without a byte
    order mark, or UTF-16 with one, else Windows-1252. Empty rows are dropped.

    Args:
        path: A CSV file or a spreadsheet (xlsx, xls, ods), recognised by its suffix, in a folder or in an archive.
        needed: Columns that it must have.
        sheet: Name of the sheet of a spreadsheet; None = the first one.
        columns: Columns to read where a CSV file has them; None = all. Use it for tables with hundreds of columns.

    Raises:
        UsageError: The file cannot be read, is not a table, or lacks a needed column or the sheet.
    """
    path = Path(path)
    table = _read_sheet(path, sheet) if is_spreadsheet(path) else _read_text(path, columns)
    table = _blank_unknown(table.rename(columns=str)).dropna(how="all", ignore_index=True)
    missing = [column for column in needed if column not in table]
    if missing:
        raise UsageError(f"{path}: column {missing[0]} is missing; the file has {', '.join(table.columns)}")
    return table


def _blank_unknown(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with words such as NA as NaN, except in columns of ids, where they may be somebody's id."""
    names = [name for name in table if not ID_NAME.search(name)]
    return table.assign(**{name: table[name].mask(table[name].isin(UNKNOWN_WORDS)) for name in names})


def read_header(path: Path) -> list[str]:
    """Return the column names of a table, or none if it cannot be read: reading the table will report that."""
    try:
        if is_spreadsheet(path):
            return list(_read_sheet(path, None, rows=0).columns.map(str))
        text_format = detect_format(path)
        with _open_text(path, text_format.encoding) as file:
            lines = csv.reader(file, delimiter=text_format.separator)
            for _ in range(text_format.skipped_lines):
                next(lines, None)
            return [str(rearm(name.strip())) for name in next(lines, [])]
    except (OSError, RefusedError, csv.Error, UsageError):
        return []


def sheet_names(path: Path) -> list[str]:
    """Return the names of a spreadsheet's sheets.

    Raises:
        UsageError: The file cannot be read.
    """
    with _open_spreadsheet(path) as book:
        return [str(name) for name in book.sheet_names]


def detect_format(path: Path) -> TextFormat:
    """Return how the CSV file `path` is written; the separator is the one that gives its header the most columns.

    Raises:
        OSError: The file cannot be read.
    """
    encoding = _detect_encoding(path)
    with _open_text(path, encoding) as file:
        header = file.readline()
        has_separator_line = header.lower().startswith("sep=") and len(header.strip()) <= 5
        if has_separator_line:
            return TextFormat(encoding, header[4:5].strip("\r\n") or "\t", 1)
    counts = {separator: len(next(csv.reader([header], delimiter=separator), [])) for separator in SEPARATORS}
    return TextFormat(encoding, max(SEPARATORS, key=lambda separator: counts[separator]), 0)


def _detect_encoding(path: Path) -> str:
    with open_source(path) as file:
        start = file.read(4)
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        file.seek(0)
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            while block := file.read(BLOCK):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "cp1252"
    return "utf-8-sig"


def _open_text(path: Path, encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_source(path), encoding=encoding, errors="replace", newline="")


def _read_text(path: Path, columns: Collection[str] | None) -> pd.DataFrame:
    try:
        text_format = detect_format(path)
        with open_source(path) as file:
            table = pd.read_csv(
                file,
                sep=text_format.separator,
                dtype=str,
                keep_default_na=False,
                na_values=[""],
                usecols=None if columns is None else lambda name: rearm(name) in columns,
                encoding=text_format.encoding,
                encoding_errors="replace",  # Windows-1252 leaves five bytes undefined
                skiprows=text_format.skipped_lines,
            )
        return table.assign(**{name: table[name].map(rearm) for name in table}).rename(columns=rearm)
    except RefusedError as refusal:
        raise UsageError(f"cannot read {path}: {refusal.message}") from refusal
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    except ValueError as error:  # base class of pandas' EmptyDataError and ParserError
        raise UsageError(f"{path} is not a table of comma-separated values: {error}; save it as CSV") from error


def _read_sheet(path: Path, sheet: str | None, rows: int | None = None) -> pd.DataFrame:
    with _open_spreadsheet(path) as book:
        if sheet is not None and sheet not in book.sheet_names:
            raise UsageError(
                f"{path}: sheet {sheet!r} is missing; the file has {', '.join(map(str, book.sheet_names))}"
            )
        return pd.read_excel(book, sheet_name=sheet or 0, dtype=str, nrows=rows, keep_default_na=False, na_values=[""])


@contextlib.contextmanager
def _open_spreadsheet(path: Path) -> Iterator[pd.ExcelFile]:
    """Open a spreadsheet; raise UsageError if it, or later one of its sheets, cannot be read."""
    from python_calamine import CalamineError

    try:
        with open_source(path) as file, pd.ExcelFile(file, engine="calamine") as book:
            yield book
    except RefusedError as refusal:
        raise UsageError(f"cannot read {path}: {refusal.message}") from refusal
    except (OSError, ValueError, CalamineError) as error:
        problem = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read {path} as a spreadsheet: {problem}; save it as CSV") from error
