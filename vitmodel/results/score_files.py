"""Score tables as files: per image, breast and patient, and Kaggle's submission."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vitmodel.data.tables import write_csv
from vitmodel.utils import atomic_path, import_extra, write_atomic


def write_score_files(
    images: pd.DataFrame,
    breasts: pd.DataFrame,
    patients: pd.DataFrame,
    out: Path,
    parquet: bool = False,
    jsonl: bool = False,
) -> None:
    """Write the tables of a `Predictor` as CSV and optionally in other formats, and Kaggle's submission.csv.

    submission.csv lists the breasts in the order of their source. A breast with several exams has the largest of its
    probabilities, as its label is "cancer at any time". A refused breast has an empty cell, never an invented number.

    Ids that a spreadsheet would run as a formula get an apostrophe in front (`write_csv`). Kaggle has no such ids.

    Args:
        images: One row per image, written to scores.csv.
        breasts: One row per breast and exam, written to breast_scores.csv.
        patients: One row per patient, written to patient_scores.csv.
        out: Folder of the files.
        parquet: Whether to write each table as Parquet as well.
        jsonl: Whether to write each table as JSON Lines as well (one object per line, null = unknown).

    Raises:
        UsageError: `parquet` is set and pyarrow is not installed.
    """
    tables = {"scores": images, "breast_scores": breasts, "patient_scores": patients}
    for name, table in tables.items():
        write_csv(table, out / f"{name}.csv")
        if jsonl:
            write_atomic(out / f"{name}.jsonl", table.to_json(orient="records", lines=True))
        if parquet:
            import_extra("pyarrow", "parquet", "parquet")
            with atomic_path(out / f"{name}.parquet") as temporary:
                table.to_parquet(temporary, index=False)
    submission = breasts.groupby("prediction_id", sort=False)["probability"].max().rename("cancer").reset_index()
    write_csv(submission, out / "submission.csv")
