"""Record which images a model has seen, without storing a patient id.

Training writes the fingerprint into the package; evaluation reads it.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import pandas as pd

HASH_BYTES = 8  # of each image's SHA-256: enough to distinguish a million images

Fingerprint = dict[str, Any]


def fingerprint(table: pd.DataFrame, label: str) -> Fingerprint:
    """Return the fingerprint of a training table.

    Args:
        table: A manifest with splits.
        label: Column of the label.

    Returns:
        `splits`: counts of images, patients and positive images per split. `datasets`: number of images of each
        release. `sha256`: one hash of all sources with
        their labels, splits and folds. `seen_images`: the first 8 bytes of the SHA-256 of each image outside the split
        test, sorted, in base64.
    """
    columns = ["source_sha256", label, "split", "fold"]
    rows = table[columns].sort_values(columns)
    splits = {
        name: {"images": len(part), "patients": part["patient_id"].nunique(), "positive_images": int(part[label].sum())}
        for name, part in table.groupby("split")
    }
    seen = table.loc[table["split"] != "test", "source_sha256"].dropna().map(_short_hash)
    return {
        "sha256": hashlib.sha256(rows.to_csv(index=False).encode()).hexdigest(),
        "splits": splits,
        "datasets": table["dataset"].dropna().value_counts().to_dict(),
        "seen_images": base64.b64encode(b"".join(sorted(seen))).decode(),
    }


def seen_in_training(table: pd.DataFrame, *trainings: Fingerprint) -> pd.Series:
    """Return whether any of the models was trained, calibrated or tuned on each image of `table`.

    Args:
        table: A manifest.
        *trainings: The models' fingerprints.

    Returns:
        A series of True, False or NA (the image has no hash, so it is unknown).
    """
    seen = set().union(*(_seen_hashes(training) for training in trainings))
    digests = table["source_sha256"].astype(object)
    return digests.map(lambda digest: _short_hash(digest) in seen, na_action="ignore").astype("boolean")


def describe_training_overlap(seen: pd.Series, model: str = "the model") -> list[str]:
    """Return warnings about the images that `seen_in_training` found to be seen or unknown."""
    count = int(seen.sum())
    unknown = int(seen.isna().sum())
    messages = []
    if count:
        messages.append(
            f"{count} of {len(seen)} images were seen by {model} in training or validation: "
            "its metrics are too optimistic"
        )
    if unknown:
        messages.append(
            f"{unknown} of {len(seen)} images have no hash: whether {model} has seen them in training is unknown"
        )
    return messages


def _seen_hashes(training: Fingerprint) -> set[bytes]:
    digests = base64.b64decode(training["seen_images"])
    return {digests[start : start + HASH_BYTES] for start in range(0, len(digests), HASH_BYTES)}


def _short_hash(digest: str) -> bytes:
    return bytes.fromhex(digest)[:HASH_BYTES]
