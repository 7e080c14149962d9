"""Which images a model has seen, without naming a patient. Written into the package by training, read by evaluation."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import pandas as pd

BYTES = 8  # of each image's SHA-256: enough to tell a million images apart


def fingerprint(table: pd.DataFrame, label: str) -> dict[str, Any]:
    """Counts per split, one hash of all sources with their labels and splits, and the short hashes of the images outside `test`."""
    rows = table.sort_values("source_sha256")[["source_sha256", label, "split"]]
    splits = {
        name: {"images": len(part), "patients": part["patient_id"].nunique(), "positive_images": int(part[label].sum())}
        for name, part in table.groupby("split")
    }
    return {
        "sha256": hashlib.sha256(rows.to_csv(index=False).encode()).hexdigest(),
        "splits": splits,
        "seen_images": base64.b64encode(b"".join(sorted(_short(table[table["split"] != "test"])))).decode(),
    }


def count_seen(table: pd.DataFrame, *trainings: dict[str, Any]) -> int:
    """How many images of `table` any of the models was trained, calibrated or tuned on, by the fingerprints of their `trainings`."""
    seen = set().union(*(_seen(data) for data in trainings))
    return sum(digest in seen for digest in _short(table))


def _seen(data: dict[str, Any]) -> set[bytes]:
    digests = base64.b64decode(data["seen_images"])
    return {digests[start : start + BYTES] for start in range(0, len(digests), BYTES)}


def _short(table: pd.DataFrame) -> list[bytes]:
    return [bytes.fromhex(digest)[:BYTES] for digest in table["source_sha256"].dropna()]
