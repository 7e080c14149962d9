"""Find the label table of a release that is also recognised by the names of its images, or say that it is missing."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from vitmodel.releases.source import Source

logger = logging.getLogger(__name__)


def find_label_table(source: Source, *names: str) -> Path | None:
    """Return the first of the tables called one of `names` in the source, above it or in a folder next to it."""
    return source.find_table(*names) or Source(source.root, with_neighbours=True).find_table(*names)


def has_image_named(source: Source, pattern: re.Pattern[str]) -> bool:
    """Return whether the source is a folder with an image whose path contains `pattern`."""
    return source.root.is_dir() and any(pattern.search(file) for file in source.images)


def warn_missing_table(source: Source, table: str, unknown: str, address: str) -> None:
    """Warn that a release's table is missing, what is unknown without it, and where to get it."""
    logger.warning(
        "%s: %s is missing, so %s are unknown; get it from %s and put it in this folder",
        source.root,
        table,
        unknown,
        address,
    )
