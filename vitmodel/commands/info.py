"""The command `info`: print a summary of a model package or a manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vitmodel.config import InfoConfig
from vitmodel.errors import UsageError
from vitmodel.hub.names import is_package_name

COUNTED_COLUMNS = (
    *("dataset", "status", "reason", "cancer", "laterality", "view"),
    *("site_id", "machine_id", "split", "preprocessing"),
)


def info(config: InfoConfig) -> None:
    """Print a summary of TARGET. Raises UsageError if it is neither a package nor a manifest."""
    if (config.target / "config.json").is_file() or is_package_name(config.target):
        print(describe_package(config.target))
    elif config.target.is_file():
        print(describe_manifest(config.target))
    else:
        raise UsageError(
            f"{config.target} is neither a model package (a folder with config.json) nor a manifest; "
            "name a package, such as RUN/package, or a manifest.csv"
        )


def describe_package(folder: Path) -> str:
    """Return the number of parameters, preprocessing, decision, data, versions and model card of a package."""
    from vitmodel.model.package import load_models
    from vitmodel.model.shared_package import find_package

    folder, _ = find_package(folder)
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
    path = folder / "MODEL_CARD.md"
    card = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "MODEL_CARD.md is missing"
    return f"{folder}: {count / 1e6:.1f} M parameters\n{json.dumps(shown, indent=2)}\n\n{card}"


def describe_manifest(path: Path) -> str:
    """Return counts of images, breasts and patients, and of the values of the columns in `COUNTED_COLUMNS`."""
    from vitmodel.data.manifest import breast_ids, read_manifest

    table = read_manifest(path)
    lines = [
        f"{path}: {len(table)} images, {breast_ids(table).nunique()} breasts, {table.patient_id.nunique()} patients"
    ]
    for column in COUNTED_COLUMNS:
        values = table[column].fillna("unknown").replace("", "unknown")
        if (values != "unknown").any():
            counts = ", ".join(f"{value}: {count}" for value, count in values.value_counts().items())
            lines.append(f"  {column:<14} {counts}")
    return "\n".join(lines)
