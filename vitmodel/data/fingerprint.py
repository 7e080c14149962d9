"""Which images a model has seen, without naming a patient. Written into the package by training, read by evaluation."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import pandas as pd

HASH_BYTES = 8  # of each image's SHA-256: enough to tell a million images apart

Fingerprint = dict[str, Any]


def fingerprint(table: pd.DataFrame, label: str) -> Fingerprint:
    """Counts per split, one hash of all sources with their labels, splits and folds, and the short hashes of the images outside `test`."""
    columns = ["source_sha256", label, "split", "fold"]
    rows = table[columns].sort_values(columns)
    splits = {
        name: {"images": len(part), "patients": part["patient_id"].nunique(), "positive_images": int(part[label].sum())}
        for name, part in table.groupby("split")
    }
    learned = table.loc[table["split"] != "test", "source_sha256"].dropna().map(_short)
    return {
        "sha256": hashlib.sha256(rows.to_csv(index=False).encode()).hexdigest(),
        "splits": splits,
        "seen_images": base64.b64encode(b"".join(sorted(learned))).decode(),
    }


def seen_in_training(table: pd.DataFrame, *trainings: Fingerprint) -> pd.Series:
    """Whether any of the models was trained, calibrated or tuned on each image of `table`, by the fingerprints of their `trainings`;
    NA = the image's hash is missing, so that nobody can tell."""
    seen = set().union(*(_seen(data) for data in trainings))
    known = table["source_sha256"].astype(object)
    return known.map(lambda digest: _short(digest) in seen, na_action="ignore").astype("boolean")


def describe_training_overlap(seen: pd.Series, model: str = "the model") -> list[str]:
    """What `seen_in_training` found that a reader must know, in sentences."""
    count, unknown = int(seen.sum()), int(seen.isna().sum())
    sentences = {
        f"{count} of {len(seen)} images were seen by {model} in training or validation: its figures are flattered": count,
        f"whether {model} has seen {unknown} of {len(seen)} images is not known: they have no hash": unknown,
    }
    return [sentence for sentence, said in sentences.items() if said]


def _seen(data: Fingerprint) -> set[bytes]:
    digests = base64.b64decode(data["seen_images"])
    return {digests[start : start + HASH_BYTES] for start in range(0, len(digests), HASH_BYTES)}


def _short(digest: str) -> bytes:
    return bytes.fromhex(digest)[:HASH_BYTES]
