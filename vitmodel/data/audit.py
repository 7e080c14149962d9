"""The search for leaks: what links two splits, and how well ids or metadata alone tell the label. Knows no model of images."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd

from vitmodel.data.manifest import breast_ids, find_leaks
from vitmodel.utils import sha256_file

ACQUISITION_COLUMNS = (
    *("age", "implant", "site_id", "machine_id", "dataset", "view", "laterality"),
    *("source_height", "source_width", "spacing_row", "photometric", "transfer_syntax"),
)
AUDIT_FOLDS = 5
MAX_CATEGORIES = 255
"""The most that a tree's categorical feature may have."""


def find_links(table: pd.DataFrame) -> pd.DataFrame:
    """What links two splits: patients, source files, and crops with the same pixels; columns as in `manifest.leaks`."""
    pixels = table.assign(source_sha256=crop_digests(table))
    copies = find_leaks(pixels).query("kind == 'source_sha256'").assign(kind="crop")
    return pd.concat([find_leaks(table), copies], ignore_index=True)


def crop_digests(table: pd.DataFrame) -> pd.Series:
    """The SHA-256 of the crop files' bytes, where another crop has as many bytes; NaN elsewhere.

    ETL writes all PNGs with one encoder, so that crops with the same pixels have the same bytes. Files of different bytes can give
    them: one image exported twice, or with another header.
    """
    made = table[table["preprocessing"].notna() & (table["status"] != "refused")]
    sizes = pd.Series(
        {row: os.path.getsize(path) for row, path in made["path"].items() if os.path.isfile(path)}, dtype=float
    )
    alike = sizes[sizes.duplicated(keep=False)]
    return pd.Series({row: sha256_file(table.at[row, "path"]) for row in alike.index}, dtype=object).reindex(
        table.index
    )


def id_features(table: pd.DataFrame) -> pd.DataFrame:
    """Ids as numbers (or, where they are not, their rank), and the order of the rows: nothing that a patient's breast decides."""
    features = {"order of the rows": np.arange(len(table))}
    for column in ("patient_id", "image_id"):
        numbers = pd.to_numeric(table[column], errors="coerce")
        features[column] = (table[column].rank(method="dense") if numbers.isna().any() else numbers).to_numpy()
    return pd.DataFrame(features, index=table.index)


def metadata_features(table: pd.DataFrame) -> pd.DataFrame:
    """Age, implant, how the image was taken, and how many images its breast has; no target and no pixel."""
    breasts = breast_ids(table)
    return table[list(ACQUISITION_COLUMNS)].assign(**{"images of the breast": breasts.map(breasts.value_counts())})


BASELINE_FEATURES = {"Ids alone": id_features, "Metadata alone": metadata_features}


def fit_baseline(table: pd.DataFrame, label: str, name: str, seed: int = 0) -> tuple[np.ndarray, str]:
    """A probability for each row (N) by boosted trees on one of `BASELINE_FEATURES`, each fitted to other patients (5 folds); and the feature
    that they lean on most: the one whose shuffling costs the most AUROC.

    NaN throughout where a class has fewer than two patients, or nothing varies. Rows with an unknown label are scored, but nothing is
    fitted to them.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold

    features = BASELINE_FEATURES[name](table)
    text = [column for column in features if features[column].dtype == object]
    for column in text:
        features[column] = features[column].astype("category").cat.codes.where(features[column].notna())
    categorical = np.array([column in text and features[column].nunique() < MAX_CATEGORIES for column in features])
    truth = table[label].to_numpy()
    patients = table["patient_id"].to_numpy()
    folds = min(AUDIT_FOLDS, *(len(np.unique(patients[truth == value])) for value in (0, 1)))
    scores = np.full(len(table), np.nan)
    shuffled = {column: scores.copy() for column in features}
    if folds < 2:
        return scores, ""
    generator = np.random.default_rng(seed)
    values = features.to_numpy(dtype=float)
    for fit, score in StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(
        values, np.nan_to_num(truth), patients
    ):
        known = fit[np.isfinite(truth[fit])]
        telling = np.array([len(np.unique(column[np.isfinite(column)])) > 1 for column in values[known].T])
        if not telling.any():
            return np.full(len(table), np.nan), ""
        trees = HistGradientBoostingClassifier(
            max_iter=60, categorical_features=categorical[telling], random_state=seed
        )
        trees.fit(values[known][:, telling], truth[known])
        scores[score] = trees.predict_proba(values[score][:, telling])[:, 1]
        for place, column in enumerate(features):
            mixed = values[score].copy()
            mixed[:, place] = generator.permutation(mixed[:, place])
            shuffled[column][score] = trees.predict_proba(mixed[:, telling])[:, 1]
    labelled = np.isfinite(truth)
    return scores, min(shuffled, key=lambda column: roc_auc_score(truth[labelled], shuffled[column][labelled]))
