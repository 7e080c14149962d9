"""Measure how long the intervals of an evaluation take on a table as large as the RSNA release.

They cover all metrics, with 2,000 replicates of patients. The peer is a loop over replicates that calls scikit-learn
for five of the metrics, timed on a few replicates. Prints a table.

python benchmarks/evaluate.py [--json FILE]
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.metrics as peer
from scipy.special import expit

from vitmodel.metrics.metrics import METRICS, compute_metrics
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.utils import to_json, write_atomic

IMAGES, PATIENTS, REPLICATES = 54_706, 11_913, 2_000
LOOPED = 10  # number of replicates in the peer's loop


def screening(prevalence: float, seed: int = 0) -> ScoredUnits:
    """Return images of patients like those of RSNA's release; no two images have the same score."""
    rng = np.random.default_rng(seed)
    patients = np.sort(rng.integers(PATIENTS, size=IMAGES))
    labels = (rng.random(IMAGES) < prevalence).astype(float)
    return ScoredUnits(labels, expit(rng.normal(2 * labels - 4, 1.5)), patients)


def loop(sample: ScoredUnits, threshold: float) -> float:
    """Return the seconds per replicate of scikit-learn's AUROC, average precision, Brier score, F1 and recall."""
    rng = np.random.default_rng(0)
    rows = np.split(np.arange(IMAGES), np.flatnonzero(np.diff(sample.patients)) + 1)
    start = time.perf_counter()
    for _ in range(LOOPED):
        drawn = np.concatenate([rows[patient] for patient in rng.integers(len(rows), size=len(rows))])
        labels, scores = sample.labels[drawn], sample.scores[drawn]
        for metric in (peer.roc_auc_score, peer.average_precision_score, peer.brier_score_loss):
            metric(labels, scores)
        for metric in (peer.f1_score, peer.recall_score):
            metric(labels, scores >= threshold)
    return (time.perf_counter() - start) / LOOPED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for name, prevalence in (("2.1 % positive, as in screening", 0.021), ("half positive: the longest curve", 0.5)):
        sample = screening(prevalence)
        start = time.perf_counter()
        compute_metrics(sample, threshold=0.1, replicates=REPLICATES)
        seconds = time.perf_counter() - start
        looped = loop(sample, threshold=0.1)
        results[name] = {
            f"seconds for {sum(map(len, METRICS.values()))} metrics, {REPLICATES:,} replicates": seconds,
            "milliseconds a replicate": 1e3 * seconds / REPLICATES,
            "milliseconds a replicate, loop over scikit-learn, 5 metrics": 1e3 * looped,
            "times as fast": looped * REPLICATES / seconds,
        }
    results["memory"] = {"peak MB of the process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    print(f"{IMAGES:,} images of {PATIENTS:,} patients")
    for title, numbers in results.items():
        print(title)
        for name, value in numbers.items():
            print(f"  {name:62} {value:.2f}")
    if arguments.json:
        write_atomic(arguments.json, to_json(results))


if __name__ == "__main__":
    main()
