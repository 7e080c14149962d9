"""Tables are read as people save them: separators, encodings, spreadsheets."""

from __future__ import annotations

import zipfile
from pathlib import Path

import openpyxl
import pandas as pd
import pytest
import xlwt

from vitmodel.data.tables import read_header, read_table, sheet_names
from vitmodel.errors import UsageError

ROWS = [["Größe", "id, short", "n"], ["wahr", "007", "1.5"], ["", "5000000000000001", "2"]]
EXPECTED = pd.DataFrame([["wahr", "007", "1.5"], [None, "5000000000000001", "2"]], columns=ROWS[0])


def check(path: Path) -> None:
    """Check that the file holds `ROWS`."""
    assert read_header(path) == ROWS[0]
    table = read_table(path, ["n"])
    assert table.astype(object).where(table.notna(), None).equals(EXPECTED.astype(object))


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_text_tables_of_any_separator_and_encoding_are_read(
    tmp_path: Path, separator: str, encoding: str, newline: str
) -> None:
    lines = [separator.join(f'"{cell}"' if "," in cell else cell for cell in row) for row in ROWS]
    path = tmp_path / "table.csv"
    path.write_bytes((newline.join([*lines, separator * 2]) + newline).encode(encoding))  # the last row is empty
    check(path)
    path.write_bytes((f"sep={separator}" + newline + newline.join(lines)).encode(encoding))
    check(path)


@pytest.mark.parametrize("suffix", [".xlsx", ".strict.xlsx", ".xls"])
def test_spreadsheets_are_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"table{suffix}"
    cells = [ROWS[0], ["wahr", "007", 1.5], ["", 5000000000000001, 2]]
    if suffix == ".xls":
        old_book = xlwt.Workbook()
        for name in ("First", "Second"):
            sheet = old_book.add_sheet(name)
            for row, values in enumerate(cells):
                for column, value in enumerate(values):
                    sheet.write(row, column, value)
        old_book.save(str(path))
    else:
        book = openpyxl.Workbook()
        book.active.title = "First"
        for values in cells:
            book.active.append(values)
        book.create_sheet("Second").append(["other"])
        book.save(path)
    if suffix == ".strict.xlsx":
        make_strict(path)
    check(path)
    assert sheet_names(path) == ["First", "Second"]
    with pytest.raises(UsageError, match=r"sheet 'Third' is missing; the file has First, Second"):
        read_table(path, sheet="Third")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UsageError, match=r"as a spreadsheet: .*; save it as CSV"):
        read_table(path)
    assert read_header(path) == []


def make_strict(path: Path) -> None:
    """Rewrite a workbook with the namespaces of strict Office Open XML (ISO/IEC 29500-1)."""
    with zipfile.ZipFile(path) as book:
        members = {name: book.read(name) for name in book.namelist()}
    namespaces = {
        b"http://schemas.openxmlformats.org/spreadsheetml/2006/main": b"http://purl.oclc.org/ooxml/spreadsheetml/main",
        b"http://schemas.openxmlformats.org/officeDocument/2006/": b"http://purl.oclc.org/ooxml/officeDocument/",
    }
    with zipfile.ZipFile(path, "w") as book:
        for name, content in members.items():
            for transitional, strict in namespaces.items():
                content = content.replace(transitional, strict)
            book.writestr(name, content)


def test_words_for_unknown_are_empty_except_in_ids(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("patient_id,age,path\nNA,NA,a.png\nnull,NaN,b.png\n")
    table = read_table(path)
    assert table.patient_id.tolist() == ["NA", "null"]
    assert table.age.isna().all()
