"""Stage: train without one site or machine, measure on it, in turn: a model where it has never been. Knows no step's inside."""

import json
import shlex
from pathlib import Path
from typing import Any

import pandas as pd

from vitmodel.config import LeaveOutConfig, listed
from vitmodel.data.manifest import read_manifests, usable_rows, write_manifest
from vitmodel.data.splits import hold_out_group
from vitmodel.errors import UsageError
from vitmodel.jobs.journal import removed_if_refused
from vitmodel.jobs.steps import run_step
from vitmodel.releases.files import safe_file_name
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, to_json, write_atomic

LABEL = "cancer"
MIN_PATIENTS = 2
"""Patients of each class that a value needs, to be measured on."""


def leave_one_out(config: LeaveOutConfig) -> None:
    """Run `vitmodel train` and `vitmodel evaluate` once for each value; what was finished earlier is kept. Writes OUT/summary.json."""
    table = read_manifests(config.manifest)
    values = select_values(table, config)
    found: dict[str, Any] = {}
    for value in values:
        folder = config.out / safe_file_name(f"{config.by}-{value}")
        metrics = folder / "report" / "metrics.json"
        if not metrics.exists():
            run(table, value, folder, config)
        breast = json.loads(metrics.read_text())["breast"]
        found[value] = {name: breast[name] for name in ("units", "positives", "patients")} | {
            "auroc": breast["intervals"]["auroc"]
        }
    write_atomic(config.out / "summary.json", to_json({"by": config.by, "train": config.train, "left_out": found}))
    print(f"\nAUROC per breast on a {config.by} that training never saw")
    for value, row in found.items():
        limits = "{value:.3f} ({low:.3f} to {high:.3f})" if row["auroc"]["low"] is not None else "{value:.3f}"
        print(f"  {value:<12} {limits.format(**row['auroc'])}, {row['positives']} of {row['units']} positive")
    print(f"summary: {config.out / 'summary.json'}\n{NOT_A_MEDICAL_DEVICE}")


def select_values(table: pd.DataFrame, config: LeaveOutConfig) -> list[str]:
    """Return the values to leave out, one after the other.

    Raises UsageError if fewer than two values are known, or none has enough patients to be measured on.
    """
    known = usable_rows(table).dropna(subset=[LABEL, config.by])
    values = sorted(known[config.by].unique())
    if len(values) < 2:
        raise UsageError(
            f"{listed(config.manifest)}: column {config.by} has {len(values)} known values, but two are needed; choose another with --by"
        )
    counts = (
        known.groupby([config.by, LABEL])["patient_id"]
        .nunique()
        .unstack(fill_value=0)
        .reindex(columns=[0.0, 1.0], fill_value=0)
    )
    chosen = [value for value in values if counts.loc[value].min() >= MIN_PATIENTS]
    for value in values:
        if value not in chosen:
            print(
                f"{config.by} {value} is not left out: it has fewer than {MIN_PATIENTS} patients with {LABEL}, or without"
            )
    if not chosen:
        raise UsageError(
            f"{listed(config.manifest)}: no {config.by} has {MIN_PATIENTS} patients with {LABEL} and as many without"
        )
    return chosen


def run(table: pd.DataFrame, value: str, folder: Path, config: LeaveOutConfig) -> None:
    """Train without the rows of `value` and evaluate on them, by the commands that a user would type.

    If the training is refused before its first step, `folder` is removed again. Raises VitmodelError with the command that failed.
    """
    manifest = folder / "manifest.csv"
    trained = folder / "run"
    with removed_if_refused(folder, results=trained.name):
        write_manifest(hold_out_group(table, config.by, value), manifest)
        resume = ["--resume"] if (trained / "train.yaml").exists() else []
        run_step("train", manifest, trained, *shlex.split(config.train), *resume)
        run_step(
            "evaluate", trained / "package", trained / "manifest.csv", folder / "report", *shlex.split(config.evaluate)
        )
