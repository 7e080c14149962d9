"""Search a manifest for leaks: links between two splits, and how well ids or metadata alone predict the label."""

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
"""The most categories that scikit-learn's HistGradientBoostingClassifier allows for a feature."""


def find_links(table: pd.DataFrame) -> pd.DataFrame:
    """Return what two splits share: patients, source files and crops with the same pixels.

    Returns:
        The columns of `manifest.find_leaks`, where `kind` is patient_id, source_sha256 or crop.
    """
    pixels = table.assign(source_sha256=crop_digests(table))
    copies = find_leaks(pixels).query("kind == 'source_sha256'").assign(kind="crop")
    return pd.concat([find_leaks(table), copies], ignore_index=True)


def crop_digests(table: pd.DataFrame) -> pd.Series:
    """Return the SHA-256 of each crop file whose size in bytes equals that of another crop; NaN for other rows.

    ETL writes all PNGs with one encoder, so crops with the same pixels have the same bytes. Different source files can
    give the same crop: an image that was exported twice, or with another header.
    """
    crops = table[table["preprocessing"].notna() & (table["status"] != "refused")]
    files = crops["path"][crops["path"].map(os.path.isfile).astype(bool)]
    sizes = files.map(os.path.getsize)
    same_size = files[sizes.duplicated(keep=False)]
    return same_size.map(sha256_file).astype(object).reindex(table.index)


def id_features(table: pd.DataFrame) -> pd.DataFrame:
    """Return the ids as numbers and the order of the rows, none of which should depend on the label.

    A column of ids that are not all numbers is replaced by their ranks.
    """
    features = {"order of the rows": np.arange(len(table))}
    for column in ("patient_id", "image_id"):
        numbers = pd.to_numeric(table[column], errors="coerce")
        features[column] = (table[column].rank(method="dense") if numbers.isna().any() else numbers).to_numpy()
    return pd.DataFrame(features, index=table.index)


def metadata_features(table: pd.DataFrame) -> pd.DataFrame:
    """Return age, implant, the acquisition parameters and the breast's number of images; no targets and no pixels."""
    breasts = breast_ids(table)
    return table[list(ACQUISITION_COLUMNS)].assign(**{"images of the breast": breasts.map(breasts.value_counts())})


BASELINE_FEATURES = {"Ids alone": id_features, "Metadata alone": metadata_features}


def fit_baseline(table: pd.DataFrame, label: str, name: str, seed: int = 0) -> tuple[np.ndarray, str]:
    """Predict the label from ids or metadata alone, with boosted trees fitted to other patients (5 folds).

    Args:
        table: A manifest. Rows with an unknown label are scored, but not used for fitting.
        label: Column of the label, 0 or 1.
        name: A key of `BASELINE_FEATURES`.
        seed: Seed of the folds, the trees and the permutations.

    Returns:
        The probability of each row, `(N,)`, and the most important feature: of those with several values, the one whose
        permutation costs the most AUROC. All probabilities are NaN and the feature is empty if a class has fewer than
        two patients or no feature varies.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold

    features = BASELINE_FEATURES[name](table)
    values, categorical = _encode(features)
    labels = table[label].to_numpy()
    patients = table["patient_id"].to_numpy()
    folds = min(AUDIT_FOLDS, *(len(np.unique(patients[labels == value])) for value in (0, 1)))
    scores = np.full(len(table), np.nan)
    permuted_scores = {column: scores.copy() for column in features}
    if folds < 2:
        return scores, ""
    generator = np.random.default_rng(seed)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for other_rows, score_rows in splitter.split(values, np.nan_to_num(labels), patients):
        fit_rows = other_rows[np.isfinite(labels[other_rows])]
        varying = _varying_columns(values[fit_rows])
        if not varying.any():
            return np.full(len(table), np.nan), ""
        trees = HistGradientBoostingClassifier(
            max_iter=60, categorical_features=categorical[varying], random_state=seed
        )
        trees.fit(values[fit_rows][:, varying], labels[fit_rows])
        scores[score_rows] = trees.predict_proba(values[score_rows][:, varying])[:, 1]
        for index, column in enumerate(features):
            permuted = values[score_rows].copy()
            permuted[:, index] = generator.permutation(permuted[:, index])
            permuted_scores[column][score_rows] = trees.predict_proba(permuted[:, varying])[:, 1]
    labelled = np.isfinite(labels)
    candidates = [column for column, varies in zip(features, _varying_columns(values), strict=True) if varies]

    def permuted_auroc(column: str) -> float:
        return roc_auc_score(labels[labelled], permuted_scores[column][labelled])

    return scores, min(candidates, key=permuted_auroc)


def _encode(features: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the features as numbers, `(N, F)`, and which of them are categorical, `(F,)`.

    Text becomes category codes. Text with too many values for the trees is treated as a number.
    """
    text = [column for column in features if features[column].dtype == object]
    encoded = features.copy()
    for column in text:
        encoded[column] = features[column].astype("category").cat.codes.where(features[column].notna())
    categorical = [column in text and encoded[column].nunique() < MAX_CATEGORIES for column in features]
    return encoded.to_numpy(dtype=float), np.array(categorical)


def _varying_columns(values: np.ndarray) -> np.ndarray:
    """Return which columns of `values`, `(N, F)`, have more than one finite value: `(F,)`."""
    return np.array([len(np.unique(column[np.isfinite(column)])) > 1 for column in values.T])
