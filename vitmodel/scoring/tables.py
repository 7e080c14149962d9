"""Tables of scores per image, breast and patient, and messages on warnings in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from vitmodel.data.appearance import NUMBERS
from vitmodel.data.cropping import ProvenanceRecord
from vitmodel.data.exams import describe_unseen_sources, find_mixed_exams
from vitmodel.data.manifest import breast_ids, exam_ids, is_repeated_file, prediction_ids
from vitmodel.metrics.scored_units import aggregate, mean_logits
from vitmodel.pixels.verdict import WARNING_REASONS
from vitmodel.scoring.ensemble import Ensemble

ID_COLUMNS = ["image_id", "patient_id", "laterality", "view"]
APPEARANCE = ["typicality", *NUMBERS]
IMAGE_SCORES = ["score", "probability"]
BREAST_SCORES = ["breast_score", "breast_probability"]
INTERVAL = ["probability_low", "probability_high"]
"""Columns of the calibration interval of a breast's probability."""


class ScoreTables(NamedTuple):
    """The scores of one run."""

    images: pd.DataFrame
    breasts: pd.DataFrame
    patients: pd.DataFrame


def image_table(
    table: pd.DataFrame,
    records: Sequence[ProvenanceRecord],
    logits: Sequence[np.ndarray] | np.ndarray,
    ensemble: Ensemble,
) -> pd.DataFrame:
    """Return one row of scores per row of the manifest `table`.

    The columns are the ids (with exam_id if any exam is known), score (raw, 0 to 1), probability (calibrated),
    breast_score and breast_probability (of the breast in its exam, from all its usable images), decision, status,
    reason, remark, source_sha256, typicality (0 to 1), those of `data.appearance`, which `vitmodel drift` compares, and
    those of the auxiliary outputs. A refused image has NaN scores: it is never
    scored. Warnings are added for copies of an image, unseen sources, missing laterality and mixed exams.

    Args:
        table: The manifest's N rows.
        records: The verdict on each row.
        logits: The outputs for each row, `(N, L + A, M)`: its logits and its auxiliary outputs.
        ensemble: The packages that computed the logits.
    """
    by_row = np.reshape(np.asarray(logits, dtype=float), (len(table), ensemble.outputs, len(ensemble.packages)))
    scored = np.isfinite(by_row[:, 0]).all(axis=1)
    scores = table[ID_COLUMNS].copy()
    if (table["exam_id"] != "").any():
        scores.insert(2, "exam_id", table["exam_id"])
    for column in (*IMAGE_SCORES, *BREAST_SCORES):
        scores[column] = np.nan
    scores.loc[scored, IMAGE_SCORES] = ensemble.calibrate(by_row[scored, 0])
    scores["decision"] = apply_threshold(scores["probability"], ensemble.threshold)
    for column in ("status", "reason", "remark", "source_sha256"):
        scores[column] = pd.Series([record.get(column) for record in records], index=table.index, dtype=object)
    for column in APPEARANCE:
        scores[column] = pd.Series([record.get(column) for record in records], index=table.index, dtype=float)
    scores["machine_id"] = table["machine_id"]
    warn_of_metadata(scores, table, records, ensemble)
    copies = is_repeated_file(scores.assign(instance_uid=table["instance_uid"]))
    add_warning(scores, "duplicate", pd.Series(WARNING_REASONS["duplicate"], index=table.index)[copies])
    used = scored & ~copies.to_numpy()
    if used.any():
        image_scores = scores.loc[used, IMAGE_SCORES].to_numpy()
        scores.loc[used, BREAST_SCORES] = ensemble.breast_scores(
            image_scores, by_row[used, ensemble.levels - 1], breast_ids(scores[used])
        )
    sideless = exam_ids(scores)[(scores["laterality"] == "") & (scores["status"] != "refused") & ~copies]
    ambiguous = sideless.index[sideless.duplicated(keep=False)]
    add_warning(scores, "no_laterality", pd.Series(WARNING_REASONS["no_laterality"], index=ambiguous))
    return scores.join(ensemble.auxiliary.columns(by_row[scored, ensemble.levels :], "image", table.index[scored]))


def warn_of_metadata(
    scores: pd.DataFrame, table: pd.DataFrame, records: Sequence[ProvenanceRecord], ensemble: Ensemble
) -> None:
    """Add the warnings on unseen sources, on exams that mix breasts or patients, and on studies of several patients."""
    usable = scores["status"] != "refused"
    shared = usable & (table["shared_study"] == 1)
    add_warning(scores, "shared_study", pd.Series(WARNING_REASONS["shared_study"], index=table.index)[shared])
    unseen = pd.Series(describe_unseen_sources(table, ensemble.model.config), index=table.index)
    add_warning(scores, "unseen_source", unseen[(unseen != "") & usable])
    walls = pd.Series([record.get("chest_wall_side") for record in records], index=table.index, dtype=object)
    mixed = find_mixed_exams(table.assign(chest_wall_side=walls.fillna(table["chest_wall_side"])))
    add_warning(scores, "mixed_exam", mixed[usable])


def breast_table(images: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return one row per breast and exam from the rows of `image_table`, in order of first appearance.

    The column exam_id is present if any exam is known. The exams of a breast share their prediction_id.
    Refused images and copies are counted in n_images but do not contribute to the score. A breast with a
    single view gets the warning one_view.
    """
    images = images.assign(breast=breast_ids(images), prediction_id=prediction_ids(images))
    groups = images.groupby("breast", sort=False)
    exam = ["exam_id"] if "exam_id" in images else []
    breasts = groups[["prediction_id", "patient_id", *exam, "laterality"]].first()
    used = images[images["probability"].notna() & ~is_duplicate(images)]
    for column in IMAGE_SCORES:
        breasts[column] = used.groupby("breast")[f"breast_{column}"].first()
    breasts["decision"] = apply_threshold(breasts["probability"], threshold)
    breasts["n_images"] = groups.size()
    views = used.groupby("breast")["view"]
    breasts["views"] = views.agg(lambda names: ";".join(sorted(set(names) - {""})))
    # Several images with an unknown view ("") may show different views.
    alone = (views.size() == 1) | ((views.nunique() == 1) & (views.first() != ""))
    one_view = alone.reindex(breasts.index, fill_value=False)
    codes = groups["reason"].agg(lambda reasons: ";".join(reasons.dropna()))
    codes = (codes + ";" + one_view.map({True: "one_view", False: ""})).str.strip(";")
    usable = groups["probability"].count()
    doubtful = (usable < breasts["n_images"]) | (codes != "")
    breasts["status"] = np.select([usable == 0, doubtful], ["refused", "warned"], "ok")
    breasts["reason"] = codes.map(lambda text: ";".join(dict.fromkeys(text.split(";"))) or None)
    return breasts.reset_index(drop=True)


def add_auxiliary(
    breasts: pd.DataFrame, images: pd.DataFrame, logits: Sequence[np.ndarray] | np.ndarray, ensemble: Ensemble
) -> pd.DataFrame:
    """Return a table of breasts with the columns of the auxiliary outputs, from the images that are used for scores.

    Args:
        breasts: The rows of `breast_table`.
        images: The N rows of `image_table`.
        logits: The outputs for each image, `(N, L + A, M)`.
        ensemble: The packages that computed the outputs.
    """
    by_row = np.reshape(np.asarray(logits, dtype=float), (len(images), ensemble.outputs, len(ensemble.packages)))
    used = (images["probability"].notna() & ~is_duplicate(images)).to_numpy()
    outputs, ids = ensemble.auxiliary.breast_outputs(by_row[used, ensemble.levels :], breast_ids(images[used]))
    columns = ensemble.auxiliary.columns(outputs, "breast", ids)
    return breasts.join(columns.reindex(breast_ids(breasts)).set_axis(breasts.index))


def add_intervals(
    breasts: pd.DataFrame, images: pd.DataFrame, logits: Sequence[np.ndarray] | np.ndarray, ensemble: Ensemble
) -> pd.DataFrame:
    """Return a table of breasts with the calibration interval of each probability, if the packages have one.

    The arguments are those of `add_auxiliary`.
    """
    if not ensemble.has_intervals:
        return breasts
    by_row = np.reshape(np.asarray(logits, dtype=float), (len(images), ensemble.outputs, len(ensemble.packages)))
    used = (images["probability"].notna() & ~is_duplicate(images)).to_numpy()
    if not used.any():
        return breasts.assign(**dict.fromkeys(INTERVAL, np.nan))
    ids = breast_ids(images[used])
    limits = ensemble.probability_limits(mean_logits(by_row[used, ensemble.levels - 1], ids))
    columns = pd.DataFrame(limits, np.unique(ids), INTERVAL)
    return breasts.join(columns.reindex(breast_ids(breasts)).set_axis(breasts.index))


def patient_table(breasts: pd.DataFrame, threshold: float, aggregation: str) -> pd.DataFrame:
    """Return one row per patient from the rows of `breast_table`.

    Breast scores are combined per exam; a patient's score is the largest of her exams'. A breast of an exam without a
    score is counted in n_breasts and sets the patient's status to "warned": it is not assumed to be
    healthy.

    Args:
        breasts: The rows of `breast_table`.
        threshold: Smallest probability that is called positive.
        aggregation: How the breast scores of an exam are combined: "max", or "noisy_or", with which exam fusion is
            trained.
    """
    groups = breasts.groupby("patient_id", sort=False)
    patients = groups.size().to_frame("n_breasts")
    scored = breasts[breasts["probability"].notna()]
    patient_of_exam = scored["patient_id"].groupby(exam_ids(scored)).first()
    for position, column in enumerate(IMAGE_SCORES):
        by_exam = aggregate_by_group(scored[column], exam_ids(scored), aggregation)
        patients.insert(position, column, by_exam.groupby(patient_of_exam).max())
    patients.insert(2, "decision", apply_threshold(patients["probability"], threshold))
    usable = groups["probability"].count()
    doubtful = (usable < patients["n_breasts"]) | (groups["reason"].count() > 0)
    patients["status"] = np.select([usable == 0, doubtful], ["refused", "warned"], "ok")
    return patients.reset_index()


def aggregate_by_group(scores: pd.Series, groups: pd.Series, how: str) -> pd.Series:
    """Return one score per group, indexed by its id."""
    ids, values = aggregate(scores, groups, how) if len(scores) else ([], [])
    return pd.Series(values, index=ids, dtype=float)


def apply_threshold(probability: pd.Series, threshold: float) -> pd.Series:
    """Return 1 at or above the threshold, 0 below it, NaN without a probability."""
    return (probability >= threshold).astype(float).where(probability.notna())


def has_code(images: pd.DataFrame, code: str) -> pd.Series:
    """Return a mask of the rows, of scores or of a manifest, whose reasons include a code of `pixels/verdict.py`."""
    return images["reason"].fillna("").str.split(";").map(lambda codes: code in codes)


def is_duplicate(images: pd.DataFrame) -> pd.Series:
    """Return a mask of the rows of `image_table` that are copies of an earlier image of the same breast."""
    return has_code(images, "duplicate")


def add_warning(images: pd.DataFrame, code: str, messages: pd.Series) -> None:
    """Add a warning to some images, in place.

    Args:
        images: The table to change.
        code: A code of `WARNING_REASONS`.
        messages: The message for each image to warn of; its index selects the rows of `images`.
    """
    rows = messages.index
    _append(images, "reason", pd.Series(code, index=rows), ";")
    _append(images, "remark", messages, "; ")
    images.loc[rows, "status"] = "warned"


def _append(images: pd.DataFrame, column: str, texts: pd.Series, separator: str) -> None:
    """Append the texts to the values of a column, in the rows of their index."""
    pairs = zip(images.loc[texts.index, column], texts, strict=True)
    images.loc[texts.index, column] = [
        f"{old}{separator}{text}" if isinstance(old, str) else text for old, text in pairs
    ]


def recropping_messages(table: pd.DataFrame, made: str) -> list[str]:
    """Return a message if crops of the table cannot be used.

    Args:
        table: A manifest.
        made: The preprocessing of the model, as its package stores it; crops made otherwise are not used.
    """
    other = int((table["preprocessing"].notna() & (table["preprocessing"] != made)).sum())
    if not other:
        return []
    return [
        f"{other} of {len(table)} crops have another preprocessing than the model: "
        "these images are cropped again from their sources"
    ]


def fallback_messages(images: pd.DataFrame) -> list[str]:
    """Return messages on images of unseen sources and on missing laterality."""
    messages = []
    unseen = int(has_code(images, "unseen_source").sum())
    if unseen:
        messages.append(
            f"{unseen} of {len(images)} images used the shared adapters: their source was not seen in training"
        )
    sideless = int(has_code(images, "no_laterality").sum())
    if sideless:
        messages.append(
            f"{sideless} of {len(images)} images have no laterality: those of a patient were read as one breast"
        )
    return messages
