"""The command `leave-out`: for each site, machine or data set, train without it and evaluate on it.

This measures how well a model works where it was not trained.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pandas as pd

from vitmodel.config import LeaveOutConfig, listed
from vitmodel.config.labels import target_name
from vitmodel.data.labels import add_label, explain_missing
from vitmodel.data.manifest import read_manifests, usable_rows, write_manifest
from vitmodel.data.splits import hold_out_group
from vitmodel.errors import UsageError
from vitmodel.jobs.journal import removed_if_refused
from vitmodel.jobs.steps import run_step
from vitmodel.releases.files import safe_file_name
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, to_json, write_atomic

MIN_PATIENTS = 2
"""Minimum number of patients of each class for a value to be left out and measured on."""


def leave_one_out(config: LeaveOutConfig) -> None:
    """Run `vitmodel train` and `vitmodel evaluate` once for each value and write OUT/summary.json.

    Values that an earlier run has finished are not trained again.

    Raises:
        UsageError: Too few values can be left out.
        VitmodelError: A step failed; names its command.
    """
    table = read_manifests(config.manifest)
    values = select_values(add_label(table, config.label, listed(config.manifest)), config)
    results: dict[str, Any] = {}
    for value in values:
        folder = config.out / safe_file_name(f"{config.by}-{value}")
        metrics = folder / "report" / "metrics.json"
        if not metrics.exists():
            run(table, value, folder, config)
        report = json.loads(metrics.read_text())
        if report["label"] != config.label:
            raise UsageError(
                f"{metrics}: was measured with --label {report['label']}, not {config.label}; choose another folder OUT"
            )
        breast = report["breast"]
        results[value] = {
            "units": breast["units"],
            "positives": breast["positives"],
            "patients": breast["patients"],
            "auroc": breast["intervals"]["auroc"],
        }
    facts = {"by": config.by, "label": config.label, "train": config.train}
    write_atomic(config.out / "summary.json", to_json(facts | {"left_out": results}))
    print(f"\nAUROC per breast on a {config.by} that was not used in training")
    for value, result in results.items():
        auroc = result["auroc"]
        interval = f" ({auroc['low']:.3f} to {auroc['high']:.3f})" if auroc["low"] is not None else ""
        print(f"  {value:<12} {auroc['value']:.3f}{interval}, {result['positives']} of {result['units']} positive")
    print(f"summary: {config.out / 'summary.json'}\n{NOT_A_MEDICAL_DEVICE}")


def select_values(table: pd.DataFrame, config: LeaveOutConfig) -> list[str]:
    """Return the values to leave out, one after the other.

    Raises UsageError if fewer than two values are known, or none has enough patients to be measured on.
    """
    labelled = usable_rows(table).dropna(subset=[config.label, config.by])
    if labelled.empty:
        raise UsageError(
            f"{listed(config.manifest)}: no usable row with a known {config.by} has a known label: "
            f"{explain_missing(usable_rows(table), config.label)}"
        )
    values = sorted(labelled[config.by].unique())
    if len(values) < 2:
        raise UsageError(
            f"{listed(config.manifest)}: column {config.by} has {len(values)} known values, but two are needed; "
            "choose another column with --by"
        )
    target = target_name(config.label)
    patients = labelled.groupby([config.by, config.label])["patient_id"].nunique()
    counts = patients.unstack(fill_value=0).reindex(columns=[0.0, 1.0], fill_value=0)
    chosen = [value for value in values if counts.loc[value].min() >= MIN_PATIENTS]
    for value in values:
        if value not in chosen:
            print(
                f"{config.by} {value} is skipped: it has fewer than {MIN_PATIENTS} patients with {target}, "
                f"or fewer than {MIN_PATIENTS} without"
            )
    if not chosen:
        raise UsageError(
            f"{listed(config.manifest)}: no {config.by} has {MIN_PATIENTS} patients with {target} and "
            f"{MIN_PATIENTS} without; choose another column with --by"
        )
    return chosen


def run(table: pd.DataFrame, value: str, folder: Path, config: LeaveOutConfig) -> None:
    """Train without the rows of `value` and evaluate on them, by the commands that a user would type.

    If the training is refused before its first step, `folder` is removed again.

    Raises:
        VitmodelError: A step failed; names its command.
    """
    manifest = folder / "manifest.csv"
    trained = folder / "run"
    with removed_if_refused(folder, results=trained.name):
        write_manifest(hold_out_group(table, config.by, value), manifest)
        resume = ["--resume"] if (trained / "train.yaml").exists() else []
        run_step("train", manifest, trained, "--label", config.label, *shlex.split(config.train), *resume)
        run_step(
            "evaluate", trained / "package", trained / "manifest.csv", folder / "report", *shlex.split(config.evaluate)
        )
