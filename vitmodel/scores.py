"""Tables of scores: groups, decisions, doubts and what is said of them on the screen. Knows no model."""

from __future__ import annotations

import pandas as pd

from vitmodel.measure.sample import aggregate


def by_group(scores: pd.Series, groups: pd.Series, how: str) -> pd.Series:
    """One score per group by its id, from the scores of its members and the group of each."""
    ids, values = aggregate(scores, groups, how) if len(scores) else ([], [])
    return pd.Series(values, index=ids, dtype=float)


def decide(probability: pd.Series, threshold: float) -> pd.Series:
    """1 at or above the threshold, 0 below, NaN where there is no probability."""
    return (probability >= threshold).astype(float).where(probability.notna())


def has_reason(images: pd.DataFrame, code: str) -> pd.Series:
    """Which rows of scores or of a manifest have this code of `pixels/verdict.py` among their reasons."""
    return images["reason"].fillna("").str.split(";").map(lambda codes: code in codes)


def is_duplicate(images: pd.DataFrame) -> pd.Series:
    """Which rows of `tabulate` are copies of an earlier image of the same breast."""
    return has_reason(images, "duplicate")


def doubt(images: pd.DataFrame, code: str, sentences: pd.Series) -> None:
    """Warn of the images that `sentences` has in its index, by a code of `WARNED` and what it says of each."""
    rows = sentences.index
    for column, texts, between in (("reason", [code] * len(rows), ";"), ("remark", sentences.tolist(), "; ")):
        pairs = zip(images.loc[rows, column], texts, strict=True)
        images.loc[rows, column] = [f"{old}{between}{text}" if isinstance(old, str) else text for old, text in pairs]
    images.loc[rows, "status"] = "warned"


def say_recropped(table: pd.DataFrame, made: str) -> None:
    """On the screen, how many of the table's crops are not used because they were made otherwise than the model's (`made`)."""
    other = (table["preprocessing"].notna() & (table["preprocessing"] != made)).sum()
    if other:
        print(f"{other} of {len(table)} crops were not made as the model's: these images are cropped anew from their sources")


def say_fallbacks(images: pd.DataFrame) -> None:
    """Print how many images were read as of an unknown source, and how many could not be told left from right where that matters."""
    if unseen := int(has_reason(images, "unseen_source").sum()):
        print(f"{unseen} of {len(images)} images are of a source that was not learned apart, and were read by the parts that all share")
    if sideless := int(has_reason(images, "no_laterality").sum()):
        print(f"{sideless} of {len(images)} images have no laterality: all such of a patient were read as one breast")
