"""The command `drift`: compare the images of one or several runs with those that a model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from vitmodel.config import DriftConfig
from vitmodel.data.drift import large_drift_messages, measure_drift, read_scored_images, reference_from_json
from vitmodel.errors import UsageError
from vitmodel.model.package import read_config
from vitmodel.reports.drift import drift_table, write_drift_report
from vitmodel.utils import NOT_A_MEDICAL_DEVICE


def drift(config: DriftConfig) -> None:
    """Compare the runs with the training set and print what differs."""
    measure_runs(config)


def measure_runs(config: DriftConfig, say: Callable[[str], object] = print) -> pd.DataFrame:
    """Write OUT/drift.html, drift.png and drift.csv, and return the table of the latter.

    The command line and `vitmodel.drift` share this function.

    Args:
        config: The package, the score tables in the order of time, and the output folder.
        say: Called with each message of the run.

    Raises:
        UsageError: The package has no distributions, or a table is no scores.csv.
    """
    stored = read_config(config.package)[2].get("reference")
    if not stored:
        raise UsageError(
            f"{config.package}: stores no distributions of its training images, because an earlier version wrote it; "
            "train it again"
        )
    reference = reference_from_json(stored)
    runs = {}
    for name, path in zip(run_names(config.scores), config.scores, strict=True):
        found = measure_drift(reference, read_scored_images(path))
        if not found:
            raise UsageError(f"{path}: no image has a crop, so that nothing can be compared; see its column reason")
        runs[name] = found
        for message in large_drift_messages(found) or ["no large drift"]:
            say(f"{name}: {message}")
    write_drift_report(config.out, runs, str(config.package))
    say(f"report: {config.out / 'drift.html'}\n{NOT_A_MEDICAL_DEVICE}")
    return drift_table(runs)


def run_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each score table: the shortest end of its path, without scores.csv, that no other one has."""
    parts = [path.absolute().parts[1:] for path in paths]
    if all(words[-1] == "scores.csv" for words in parts):
        parts = [words[:-1] or words for words in parts]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(words[-length:]) for words in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError("scores: a table is named twice; name each one once")
