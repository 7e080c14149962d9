"""Apply a label rule (`config/labels.py`) to a manifest. All commands that read labels do it here."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from vitmodel.config import did_you_mean
from vitmodel.config.labels import CANCER, GRADES, LabelRule, LabelTerm
from vitmodel.data.columns import COLUMNS, ManifestColumn
from vitmodel.data.manifest import convert_column
from vitmodel.errors import UsageError

KNOWN_COLUMNS = {column.name: column for column in COLUMNS}
EXAMPLES = LabelRule.parse("birads>=4,density>=C").terms
"""Terms on graded columns that messages propose."""
MAX_PROPOSALS = 8


def add_label(table: pd.DataFrame, rule: str, name: str) -> pd.DataFrame:
    """Return `table` with a column named after the rule, the label: 1, 0 or NaN = unknown.

    A rule that is only the name of a column replaces the column by its values as numbers.

    Args:
        table: A manifest.
        rule: Text of the rule, as `LabelRule.text` spells it.
        name: Name of the table in messages.

    Raises:
        UsageError: The rule is malformed, or needs a column that the table lacks or that cannot be a label.
    """
    return table.assign(**{rule: apply_rule(table, LabelRule.parse(rule), name)})


def without_label(table: pd.DataFrame, rule: str) -> pd.DataFrame:
    """Return `table` without the column that `add_label` added, for writing; a label that is a column is kept."""
    terms = LabelRule.parse(rule).terms
    return table if terms == (LabelTerm(rule),) else table.drop(columns=rule)


def apply_rule(table: pd.DataFrame, rule: LabelRule, name: str) -> pd.Series:
    """Return the label of each row: that of the first term that is known for the row, else NaN.

    Args:
        table: A manifest.
        rule: The rule.
        name: Name of the table in messages.

    Raises:
        UsageError: A column is missing or cannot be a label.
    """
    label = pd.Series(np.nan, index=table.index)
    for term in rule.terms:
        _check_column(table, term.column, name)
        label = label.fillna(_apply_term(table, term, name))
    return label


def _check_column(table: pd.DataFrame, column: str, name: str) -> None:
    """Raise UsageError unless the column exists and shows what an image or patient is, rather than where it is from."""
    known = KNOWN_COLUMNS.get(column)
    if known is not None and (known.role in ("id", "provenance") or known.kind == "path"):
        raise UsageError(
            f"label: {column} identifies an image or states where it comes from, which must not be learned; "
            f"{_advice(table)}"
        )
    if column not in table:
        advice = did_you_mean(column, map(str, table)) or _advice(table)
        raise UsageError(f"label: {column} is not a column of {name}; {advice}")


def _apply_term(table: pd.DataFrame, term: LabelTerm, name: str) -> pd.Series:
    """Return the label by one term. BI-RADS 0, an incomplete assessment, is unknown."""
    values = _numbers(table, term, name)
    if term.positive is None:
        is_number = term.column in KNOWN_COLUMNS and KNOWN_COLUMNS[term.column].kind == "number"
        if is_number or not values.dropna().isin([0, 1]).all():
            raise UsageError(
                f"label: {name}: column {term.column} holds numbers, but a flag is 0 or 1; "
                f"compare it, for example {term.column}>=4"
            )
        return values
    positive = term.positive.holds(values)
    negative = term.negative.holds(values) if term.negative else ~positive
    return positive.astype(float).where((positive | negative) & values.notna())


def _numbers(table: pd.DataFrame, term: LabelTerm, name: str) -> pd.Series:
    """Return the values of a term's column as numbers: grades count from 0, unknown is NaN."""
    known = KNOWN_COLUMNS.get(term.column, ManifestColumn(term.column, "number", "target", ""))
    is_grade = known.choices == tuple(GRADES)
    if is_grade or (term.positive and term.positive.is_grade):
        if not is_grade or term.positive is None or not term.positive.is_grade:
            columns = ", ".join(column.name for column in COLUMNS if column.choices == tuple(GRADES))
            raise UsageError(
                f"label: {term} cannot be computed; columns of grades ({columns}), and only they, are compared with "
                f"{', '.join(GRADES)}: write for example density>=C"
            )
        return table[term.column].map(GRADES.index, na_action="ignore").astype(float)
    if known.kind == "text":
        raise UsageError(f"label: column {term.column} is text, not numbers; {_advice(table)}")
    values = convert_column(table[term.column], known, f"label: {name}")
    if "birads" in re.sub(r"[^a-z]", "", term.column.lower()):
        values = values.where(values != 0)
    return values


def _advice(table: pd.DataFrame) -> str:
    """Return how to choose a label that the table has."""
    rules = possible_rules(table)
    if not rules:
        return f"fill in a column of 0 and 1, such as {CANCER}"
    flags = ", ".join(f"--label '{rule}'" for rule in rules)
    return f"choose a label that it has: {flags}"


def possible_rules(table: pd.DataFrame) -> list[str]:
    """Return rules by which the table has positive and negative rows, those of the manifest's own columns first."""
    flags = [column.name for column in COLUMNS if column.role == "target" and column.kind == "flag"]
    extra = [str(column) for column in table if column not in KNOWN_COLUMNS]
    terms = [LabelTerm(column) for column in flags] + list(EXAMPLES) + [LabelTerm(column) for column in extra]
    return [str(term) for term in terms if term.column in table and _divides(table, term)][:MAX_PROPOSALS]


def _divides(table: pd.DataFrame, term: LabelTerm) -> bool:
    """Return whether the term is known to hold for some rows and not to hold for others."""
    try:
        return LabelRule.parse(str(term)).terms == (term,) and _apply_term(table, term, "").nunique() == 2
    except UsageError:  # an extra column that is no flag, or whose name is no rule
        return False


def explain_missing(table: pd.DataFrame, rule: str) -> str:
    """Return that no row has a label by `rule`, and which labels the table has."""
    return f"`{rule}` is empty; {_advice(table)}"


def proven_lesions(table: pd.DataFrame, rule: str) -> pd.Series:
    """Return the column `lesions` where it agrees with the label, else NaN.

    Its boxes are proven cancers. Other findings in the image, which the rule may call positive, have no box.
    """
    if rule == CANCER:
        return table["lesions"]
    agrees = (table[CANCER] == 1) & (table[rule] == 1) & (CANCER in LabelRule.parse(rule).flags)
    return table["lesions"].where(agrees)
