"""Turn the columns of a table into the metadata that a network takes: sources, view, breast and exam.

The images of a patient with the same `exam_id` are one exam. The vocabularies of values are built from
training rows only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd

from vitmodel.data.columns import COLUMNS
from vitmodel.data.manifest import breast_ids, exam_ids
from vitmodel.data.subgroups import age_band
from vitmodel.errors import UsageError
from vitmodel.model.architecture import NetworkConfig, Vocabulary
from vitmodel.model.packed_batch import ImageMetadata

logger = logging.getLogger(__name__)

FORBIDDEN_SOURCES = {column.name for column in COLUMNS if column.role == "target" or column.kind == "path"} | {
    "image_id",
    "exam_id",
    "patient_id",
}
"""Columns that reveal the label or the patient, and therefore must not be a source."""


def check_sources(table: pd.DataFrame, columns: Sequence[str], name: str, label: Sequence[str] = ()) -> None:
    """Raise UsageError if a column cannot be a source.

    Args:
        table: The manifest.
        columns: Columns that the user chose as sources.
        name: Name of the manifest in messages.
        label: Columns that make the label. A column named after one of them, such as birads_text, is refused, too.

    Raises:
        UsageError: A column reveals the label or the patient, is not in the table, or is empty.
    """
    prefixes = tuple(f"{column}_" for column in label)
    forbidden = {str(column) for column in table if column in label or str(column).startswith(prefixes)}
    forbidden |= FORBIDDEN_SOURCES
    allowed = [str(column) for column in table if column not in forbidden]
    possible = [column for column in allowed if column_values(table, column).notna().any()]
    for column in columns:
        if column in forbidden:
            raise UsageError(
                f"sources: {column} reveals the label or the patient, so it must not be an input; remove it"
            )
        if column not in possible:
            problem = "is empty in all rows" if column in table else "is not a column"
            raise UsageError(f"sources: {column} {problem} of {name}; choose among {', '.join(possible)}")


def find_mixed_exams(table: pd.DataFrame) -> pd.Series:
    """Return a message for each row whose images cannot belong to one breast or exam.

    The result has only these rows. It is empty for RSNA's 1,720 images.
    """
    walls_per_breast = table["chest_wall_side"].groupby(breast_ids(table)).transform("nunique")
    ages_per_exam = table["age"].groupby(exam_ids(table)).transform("nunique")
    messages = pd.Series("", index=table.index)
    messages[walls_per_breast > 1] = (
        "images of the breast have the chest wall at different sides: laterality may give both breasts the same side"
    )
    messages[ages_per_exam > 1] = (
        "images of the patient state several ages: patient_id may give two patients, or two exams, the same id"
    )
    return messages[messages != ""]


def check_exams(table: pd.DataFrame, name: str) -> None:
    """Raise UsageError if a row has no laterality; warn of exams that mix breasts or patients.

    Without laterality, fusion would treat both breasts as one. `name` is the manifest's name in messages.
    """
    for _, messages in find_mixed_exams(table).groupby(exam_ids(table)):
        images = ", ".join(table.loc[messages.index, "image_id"])
        logger.warning("fusion: %s: images %s: %s; correct the column", name, images, messages.iloc[0])
    without_side = table.loc[table["laterality"] == "", "image_id"]
    if len(without_side):
        shown = ", ".join(without_side.head(5))
        if len(without_side) > 5:
            shown += f" and {len(without_side) - 5} more"
        raise UsageError(
            f"fusion: {name}: column laterality is empty for image {shown}; fill it in or remove these rows"
        )


def column_values(table: pd.DataFrame, column: str) -> pd.Series:
    """Return a column's values as text, ages by decade, and NaN where unknown or if the table lacks the column."""
    if column not in table:
        return pd.Series(np.nan, index=table.index, dtype=object)
    values = age_band(table[column]) if column == "age" else table[column]
    return values.where(values != "").map(Vocabulary.text, na_action="ignore")


def build_vocabulary(column: str, trainings: Sequence[pd.DataFrame], min_count: int) -> Vocabulary:
    """Return the values that get parameters of their own, and print them.

    Args:
        column: Column of the tables.
        trainings: Training tables, one or one per fold.
        min_count: Number of images that must have the value in each of the tables.
    """
    counts_per_training = [column_values(table, column).value_counts() for table in trainings]
    counts = pd.concat(counts_per_training, axis=1).fillna(0).min(axis=1).astype(int)
    values = sorted(counts.index[counts >= min_count])
    shared = sum(len(table) for table in trainings) // len(trainings) - int(counts[values].sum())
    described = ", ".join(f"{value} ({counts[value]} images)" for value in values) or "no value"
    print(f"{column}: own parameters for {described}; shared parameters for {shared} other images")
    return Vocabulary(column, tuple(values))


def image_metadata(table: pd.DataFrame, config: NetworkConfig) -> list[ImageMetadata]:
    """Return, for each row, the metadata that the network takes."""
    vocabularies = config.sources.columns if config.sources else ()
    columns = [vocabulary_indices(table, vocabulary) for vocabulary in vocabularies]
    sources = list(zip(*columns, strict=True)) if columns else [()] * len(table)
    if config.exam is None:
        return [ImageMetadata(sources=indices) for indices in sources]
    breasts, _ = pd.factorize(breast_ids(table))
    exams, _ = pd.factorize(exam_ids(table))
    views = vocabulary_indices(table, config.exam.views)
    return [
        ImageMetadata(sources=indices, view=view, breast=int(breast), exam=int(exam))
        for indices, view, breast, exam in zip(sources, views, breasts, exams, strict=True)
    ]


def vocabulary_indices(table: pd.DataFrame, vocabulary: Vocabulary) -> list[int]:
    """Return the index of each row's value; 0 = unknown or not in the vocabulary."""
    return [vocabulary.index(value) for value in column_values(table, vocabulary.column)]


def describe_unseen_sources(table: pd.DataFrame, config: NetworkConfig) -> list[str]:
    """Return, for each row, a message about its sources that use the network's shared parameters; "" if none does."""
    messages: list[list[str]] = [[] for _ in range(len(table))]
    for vocabulary in config.sources.columns if config.sources else ():
        for row, value in enumerate(column_values(table, vocabulary.column)):
            if not vocabulary.index(value):
                problem = "is unknown" if pd.isna(value) else f"{value} has no parameters of its own"
                messages[row].append(f"{vocabulary.column} {problem}")
    return ["; ".join(row_messages) for row_messages in messages]
