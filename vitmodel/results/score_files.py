"""Scores as files: per image, breast and patient, and Kaggle's submission. Knows no image and no model."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vitmodel.utils import atomic_path, import_extra, write_atomic


def write_score_files(
    images: pd.DataFrame,
    breasts: pd.DataFrame,
    patients: pd.DataFrame,
    out: Path,
    parquet: bool = False,
    jsonl: bool = False,
) -> None:
    """The tables of a Predictor as OUT/NAME.csv and, if asked for, .parquet and .jsonl (one JSON object a line, null = unknown).

    submission.csv is Kaggle's: breasts in the order of their source; a refused breast has an empty cell there, never a made-up number.
    Raises UsageError where pyarrow, which Parquet needs, is not installed.
    """
    tables = {"scores": images, "breast_scores": breasts, "patient_scores": patients}
    for name, table in tables.items():
        _write_csv(table, out / f"{name}.csv")
        if jsonl:
            write_atomic(out / f"{name}.jsonl", table.to_json(orient="records", lines=True))
        if parquet:
            import_extra("pyarrow", "parquet", "parquet")
            with atomic_path(out / f"{name}.parquet") as temporary:
                table.to_parquet(temporary, index=False)
    _write_csv(
        breasts[["prediction_id", "probability"]].rename(columns={"probability": "cancer"}), out / "submission.csv"
    )


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)
