"""Read the user's own table: a CSV file with an image file and its patient in each row, such as a manifest."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vitmodel.data.manifest import as_manifest, resolve_paths
from vitmodel.data.tables import read_table
from vitmodel.errors import UsageError
from vitmodel.releases.files import image_stem
from vitmodel.releases.source import Source

EXPECTED_FILES = (
    "a CSV file with the columns patient_id and path (or image_path); other columns of the manifest are optional"
)


def find_listings(source: Source) -> list[Path]:
    """Return the tables of the source that list images, or the source itself if it is a table."""
    if source.is_file:
        return source.tables
    with_patients = source.tables_with_columns(["patient_id"])
    return [path for path in with_patients if {"path", "image_path"} & source.header(path)]


def detect(source: Source) -> bool:
    """Return whether the source is a table or contains a table of images."""
    return bool(find_listings(source))


def read(source: Source, dataset: str = "listing") -> pd.DataFrame:
    """Return the table as a manifest.

    Args:
        source: The table, or a folder that contains a single one.
        dataset: Value of the column `dataset`, if the table lacks it. A missing `image_id` is the file's name.

    Raises:
        UsageError: The folder contains several tables, or the table is not valid.
    """
    listings = find_listings(source)
    if len(listings) != 1:
        names = ", ".join(path.name for path in listings)
        raise UsageError(
            f"{source.root}: found {len(listings)} tables of images ({names}); pass one of them as the source"
        )
    listing = listings[0]
    path_column = "image_path" if "image_path" in source.header(listing) else "path"
    table = read_table(listing, ["patient_id", path_column]).rename(columns={path_column: "path", "BIRADS": "birads"})
    table = resolve_paths(table, listing.parent)
    blank = pd.Series("", index=table.index)
    defaults = {
        "image_id": table.path.map(image_stem, na_action="ignore"),
        "laterality": blank,
        "view": blank,
        "dataset": blank + dataset,
    }
    missing = {column: values for column, values in defaults.items() if column not in table}
    return as_manifest(table.assign(**missing), str(listing))
