"""Stage: print what a model package or a manifest holds. Changes nothing."""

import json
from pathlib import Path
from typing import Any

from vitmodel.config import InfoConfig
from vitmodel.errors import UsageError


def info(config: InfoConfig) -> None:
    """Print a summary of TARGET. Raises UsageError where it is neither a package nor a manifest."""
    if (config.target / "config.json").is_file():
        print(describe_package(config.target))
    elif config.target.is_file():
        print(describe_manifest(config.target))
    else:
        raise UsageError(f"{config.target} is neither a model package (a folder with config.json) nor a manifest")


def describe_package(folder: Path) -> str:
    """Architecture, preprocessing, decision, data and versions, then the model card."""
    from vitmodel.model.package import load_models

    models, package = load_models(folder)
    count = sum(parameter.numel() for model in models for parameter in model.parameters())
    shown: dict[str, Any] = {
        key: package[key] for key in ("label", "preprocessing", "decision", "versions") if key in package
    }
    shown["calibration"] = {
        name: f"{len(value)} points" if isinstance(value, list) else value
        for name, value in package.get("calibration", {}).items()
    }
    shown["data"] = package.get("data", {}).get("splits", {})
    return f"{folder}: {count / 1e6:.1f} M parameters\n{json.dumps(shown, indent=2)}\n\n{(folder / 'MODEL_CARD.md').read_text()}"


def describe_manifest(path: Path) -> str:
    """Counts of images, patients, breasts, labels, verdicts, views, sites, machines and splits."""
    from vitmodel.data.manifest import breast_ids, read_manifest

    table = read_manifest(path)
    lines = [
        f"{path}: {len(table)} images, {breast_ids(table).nunique()} breasts, {table.patient_id.nunique()} patients"
    ]
    for column in (
        "dataset",
        "status",
        "reason",
        "cancer",
        "laterality",
        "view",
        "site_id",
        "machine_id",
        "split",
        "preprocessing",
    ):
        values = table[column].fillna("unknown").replace("", "unknown")
        if (values != "unknown").any():
            counts = ", ".join(f"{value}: {count}" for value, count in values.value_counts().items())
            lines.append(f"  {column:<14} {counts}")
    return "\n".join(lines)
