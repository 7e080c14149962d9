"""Cells of CSV files that a spreadsheet would run are written as text and read back unchanged."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitmodel.data.tables import read_header, read_table, write_csv

# No NUL, which no CSV reader accepts, and no lone surrogates, which UTF-8 lacks.
CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
CELLS = st.text(CHARACTERS, min_size=1, max_size=12)
STARTS = st.sampled_from(["", "=", "+", "-", "@", "\t", "\r", "'", "''=", "'-1", "-0.5", "=cmd|' /C calc'!A0"])


@settings(max_examples=60)
@given(cells=st.lists(st.tuples(STARTS, CELLS).map("".join), min_size=1, max_size=5))
def test_any_text_is_read_back_unchanged_and_no_cell_is_a_formula(
    cells: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "formula.csv"
    write_csv(pd.DataFrame({"image_id": cells}), path)
    assert read_table(path)["image_id"].tolist() == cells
    with path.open(newline="", encoding="utf-8") as file:
        written = [row[0] for row in csv.reader(file)]
    for cell in written:
        assert not cell.startswith(("=", "+", "@", "\t", "\r"))
        if cell.startswith("-"):
            float(cell)


def test_numbers_and_column_names_keep_their_meaning(tmp_path: Path) -> None:
    table = pd.DataFrame({"=own": ["a"], "score": [-0.5], "text": ["-0.5"], "unknown": [float("nan")]})
    write_csv(table, tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == "'=own,score,text,unknown\na,-0.5,-0.5,\n"
    assert read_table(tmp_path / "table.csv").columns.tolist() == table.columns.tolist()
    assert read_header(tmp_path / "table.csv") == table.columns.tolist()


def test_ids_of_kaggle_are_written_as_they_are(tmp_path: Path) -> None:
    write_csv(pd.DataFrame({"prediction_id": ["10008_L", "0_R"], "cancer": [0.25, 1e-9]}), tmp_path / "submission.csv")
    assert (tmp_path / "submission.csv").read_text() == "prediction_id,cancer\n10008_L,0.25\n0_R,1e-09\n"
