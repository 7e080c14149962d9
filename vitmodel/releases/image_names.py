"""Recognise a release without its label table by the names of its images, and say what is missing."""

from __future__ import annotations

import logging
import re

from vitmodel.releases.source import Source

logger = logging.getLogger(__name__)


def has_image_named(source: Source, pattern: re.Pattern[str], *words: str) -> bool:
    """Return whether the source is a folder with an image whose path contains `pattern`.

    Args:
        source: The source.
        pattern: The pattern.
        words: Texts of which one is in every path with the pattern; searching for them first is much faster.
    """
    if not source.is_folder:
        return False
    candidates = (file for file in source.images if any(word in file for word in words))
    return any(pattern.search(file) for file in candidates)


def warn_missing_table(source: Source, table: str, unknown: str, address: str) -> None:
    """Warn that a release's table is missing, what is unknown without it, and where to get it."""
    logger.warning(
        "%s: cannot find %s, so %s are unknown; get what is missing from %s and put it in this folder",
        source.root,
        table,
        unknown,
        address,
    )
