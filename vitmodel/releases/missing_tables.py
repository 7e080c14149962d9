"""Recognise the images of a release whose table of labels is missing, and say where to get the table."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass

import pandas as pd

from vitmodel.data.manifest import as_manifest
from vitmodel.releases.source import Source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MissingTable:
    """A release's table of labels, and what the release's images look like where it is missing.

    Attributes:
        table: Name of the table and the release.
        origin: Where the table is published.
        images: Pattern of an image's path with '/' between its folders, searched anywhere in it.
        words: Texts of which one is in every path with the pattern; searching for them first is much faster.
        unknown: What is unknown without the table.
        reads_names: Whether the adapter reads the images without the table, by their names, so that masks are not read
            as films.
    """

    table: str
    origin: str
    images: re.Pattern[str]
    words: tuple[str, ...] = ()
    unknown: str = "all labels"
    reads_names: bool = False

    def has_images_in(self, source: Source) -> bool:
        """Return whether the source is a folder with an image of the release."""
        if not source.is_folder:
            return False
        paths = (file.replace(os.sep, "/") for file in source.images)
        candidates = (path for path in paths if not self.words or any(word in path for word in self.words))
        return any(self.images.search(path) for path in candidates)

    def warn(self, source: Source) -> None:
        """Warn that the table is missing, what is unknown without it, and where to get it."""
        logger.warning(
            "%s: cannot find %s, so %s are unknown; get what is missing from %s and put it in this folder",
            source.root,
            self.table,
            self.unknown,
            self.origin,
        )


def read_names(files: dict[str, str], pattern: re.Pattern[str], source: Source, dataset: str) -> pd.DataFrame:
    """Return a manifest without labels by the names of the images.

    Args:
        files: Name of an image -> its file.
        pattern: Pattern of a name with the groups patient, side and view.
        source: The source, for messages.
        dataset: Value of the column `dataset`.
    """
    names = pd.Series(list(files), dtype=object)
    parts = names.str.extract(pattern)
    frame = pd.DataFrame(
        {
            "image_id": names,
            "patient_id": parts.patient.fillna(names),
            "laterality": parts.side.fillna("").str.upper(),
            "view": parts["view"].fillna("").str.upper(),
            "path": names.map(files),
            "dataset": dataset,
        }
    )
    return as_manifest(frame, str(source.root))
