"""What a table knows of its images beside their pixels, as a network is told it: sources, view, breast, exam. Knows no pixels.

A patient's images are one exam. The values that a network knows apart are learned from training rows alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd

from vitmodel.data.manifest import COLUMNS, breast_ids
from vitmodel.data.subgroups import age_band
from vitmodel.errors import UsageError
from vitmodel.model.architecture import NetworkConfig, Vocabulary
from vitmodel.model.packed_batch import ImageMetadata

logger = logging.getLogger(__name__)

FORBIDDEN_SOURCES = {column.name for column in COLUMNS if column.role == "target" or column.kind == "path"} | {
    "image_id",
    "patient_id",
}
"""Columns that tell the answer or the patient, and are therefore no source."""


def check_sources(table: pd.DataFrame, columns: Sequence[str], name: str) -> None:
    """Raises UsageError where a column is none of the table's (`name`), must not be an input, or is empty."""
    possible = [
        str(column)
        for column in table
        if column not in FORBIDDEN_SOURCES and column_values(table, column).notna().any()
    ]
    for column in columns:
        if column in FORBIDDEN_SOURCES:
            raise UsageError(f"sources: {column} tells the answer, or who the patient is, and is never an input")
        if column not in possible:
            problem = "is empty in all rows" if column in table else "is no column"
            raise UsageError(f"sources: {column} {problem} of {name}; there are {', '.join(possible)}")


def find_mixed_exams(table: pd.DataFrame) -> pd.Series:
    """By row, of images that cannot all be of one breast or of one patient, why; other rows are left out. Of RSNA's 1,720 none is."""
    of_breasts, of_patients = (
        table["chest_wall_side"].groupby(breast_ids(table)),
        table["age"].groupby(table["patient_id"]),
    )
    sentences = pd.Series("", index=table.index)
    sentences[of_breasts.transform("nunique") > 1] = (
        "the breast has its chest wall at both sides: laterality may name both breasts as one"
    )
    sentences[of_patients.transform("nunique") > 1] = (
        "the patient has several ages: patient_id may name two patients, or two exams, as one"
    )
    return sentences[sentences != ""]


def check_exams(table: pd.DataFrame, name: str) -> None:
    """Raises UsageError naming the rows whose breast is not known, for fusion would take both breasts for one; warns of mixed exams."""
    for _, rows in find_mixed_exams(table).groupby(table["patient_id"]):
        images = ", ".join(table.loc[rows.index, "image_id"])
        logger.warning("fusion: %s: images %s: %s; mend the column", name, images, rows.iloc[0])
    lost = table.loc[table["laterality"] == "", "image_id"]
    if len(lost):
        shown = ", ".join(lost.head(5)) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        raise UsageError(
            f"fusion: {name}: column laterality is empty for image {shown}; fill it in, or leave these rows out"
        )


def column_values(table: pd.DataFrame, column: str) -> pd.Series:
    """Of each row the value as text, ages by decade, NaN where it is unknown; a column that the table lacks is unknown."""
    if column not in table:
        return pd.Series(np.nan, index=table.index, dtype=object)
    each = age_band(table[column]) if column == "age" else table[column]
    return each.where(each != "").map(Vocabulary.text, na_action="ignore")


def build_vocabulary(column: str, trainings: Sequence[pd.DataFrame], min_count: int) -> Vocabulary:
    """The values that at least `min_count` images have in each of several training tables (one, or those of folds); says so aloud."""
    each = [column_values(table, column).value_counts() for table in trainings]
    counts = pd.concat(each, axis=1).fillna(0).min(axis=1).astype(int)
    apart = sorted(counts.index[counts >= min_count])
    rest = sum(len(table) for table in trainings) // len(trainings) - int(counts[apart].sum())
    print(
        f"{column}: learned apart {', '.join(f'{value} ({counts[value]} images)' for value in apart) or 'none'}; shared by {rest} others"
    )
    return Vocabulary(column, tuple(apart))


def image_metadata(table: pd.DataFrame, config: NetworkConfig) -> list[ImageMetadata]:
    """Of each row what the network asks for."""
    columns = [
        vocabulary_indices(table, vocabulary) for vocabulary in (config.sources.columns if config.sources else ())
    ]
    sources = list(zip(*columns, strict=True)) if columns else [()] * len(table)
    if config.exam is None:
        return [ImageMetadata(sources=each) for each in sources]
    breasts, exams = pd.factorize(breast_ids(table))[0], pd.factorize(table["patient_id"])[0]
    views = vocabulary_indices(table, config.exam.views)
    return [
        ImageMetadata(sources=each, view=view, breast=int(breast), exam=int(exam))
        for each, view, breast, exam in zip(sources, views, breasts, exams, strict=True)
    ]


def vocabulary_indices(table: pd.DataFrame, vocabulary: Vocabulary) -> list[int]:
    """The index of each row's value; 0 = unknown or not known apart."""
    return [vocabulary.index(value) for value in column_values(table, vocabulary.column)]


def describe_unseen_sources(table: pd.DataFrame, config: NetworkConfig) -> list[str]:
    """Of each row a sentence on the sources that the network did not learn apart; empty = none."""
    sentences = [""] * len(table)
    for vocabulary in config.sources.columns if config.sources else ():
        for row, value in enumerate(column_values(table, vocabulary.column)):
            if not vocabulary.index(value):
                what = "is not known" if pd.isna(value) else f"{value} was not learned apart"
                sentences[row] += ("; " if sentences[row] else "") + f"{vocabulary.column} {what}"
    return sentences
