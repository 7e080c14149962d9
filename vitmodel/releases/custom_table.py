"""Any table of one's own: a CSV file that names an image file and its patient in each row; a manifest is one, too."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vitmodel.data.manifest import as_manifest, read_table, resolve_paths
from vitmodel.errors import UsageError
from vitmodel.releases.files import csv_header, image_stem, tables_with_columns

EXPECTED_FILES = (
    "a CSV file with the columns patient_id and path (or image_path); the manifest's other columns where they are known"
)


def find_listings(root: Path) -> list[Path]:
    """The listings in the folder `source`, or `source` itself, if it is a table at all."""
    if root.is_file():
        return tables_with_columns(root, ())
    return [path for path in tables_with_columns(root, ["patient_id"]) if {"path", "image_path"} & csv_header(path)]


def detect(root: Path) -> bool:
    return bool(find_listings(root))


def read(root: Path, dataset: str = "listing") -> pd.DataFrame:
    """The listing as a manifest; image_id is the file's name where no column tells it, and so for `dataset`. Raises UsageError."""
    found = find_listings(root)
    if len(found) != 1:
        raise UsageError(
            f"{root}: {len(found)} tables could be meant ({', '.join(path.name for path in found)}); name one as the source"
        )
    path = "image_path" if "image_path" in csv_header(found[0]) else "path"
    table = read_table(found[0], ["patient_id", path]).rename(columns={path: "path", "BIRADS": "birads"})
    table = resolve_paths(table, found[0].parent)
    blank = pd.Series("", index=table.index)
    defaults = {
        "image_id": table.path.map(image_stem, na_action="ignore"),
        "laterality": blank,
        "view": blank,
        "dataset": blank + dataset,
    }
    return as_manifest(
        table.assign(**{column: values for column, values in defaults.items() if column not in table}), str(found[0])
    )
