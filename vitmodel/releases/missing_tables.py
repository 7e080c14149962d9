"""Recognise the images of a release whose table of labels is missing, and say where to get the table.

An adapter that can read its images without the table has a function `detect_images`; for the others, `MISSING_TABLES`
lists what their paths look like.
"""

from __future__ import annotations

import logging
import os
import re
from typing import NamedTuple

from vitmodel.releases.source import Source

logger = logging.getLogger(__name__)


class MissingTable(NamedTuple):
    """A release that is recognised by the paths of its images."""

    release: str
    images: str
    """Regular expression of an image's path with '/' between its folders, searched anywhere in it."""
    table: str
    origin: str
    """Where the table is published."""


MISSING_TABLES = (
    MissingTable(
        "CMMD",
        r"/D[12]-\d{4}/.*\.dcm$",
        "CMMD_clinicaldata_revision.xlsx",
        "https://www.cancerimagingarchive.net/collection/cmmd/",
    ),
    MissingTable(
        "VinDr-Mammo",
        r"/[0-9a-f]{32}/[0-9a-f]{32}\.\w+$",
        "breast-level_annotations.csv",
        "https://physionet.org/content/vindr-mammo/",
    ),
    MissingTable(
        "INbreast",
        r"/\d+_[0-9a-f]{16}_MG_[LR]_\w+_ANON\.dcm$",
        "INbreast.csv or INbreast.xls",
        "the release's main folder",
    ),
    MissingTable("mini-MIAS", r"/mdb\d{3}([lr][smlx])?\.pgm$", "Info.txt", "http://peipa.essex.ac.uk/pix/mias/"),
    MissingTable(
        "EMBED",
        r"/cohort_\d+/\d+/[\d.]+/[\d.]+\.dcm$",
        "EMBED_OpenData_clinical.csv and EMBED_OpenData_metadata.csv",
        "s3://embed-dataset-open/tables/",
    ),
    MissingTable(
        "RSNA Screening Mammography",
        r"/train_images[^/]*/\d+/\d+\.\w+$",
        "train.csv",
        "https://www.kaggle.com/competitions/rsna-breast-cancer-detection/data",
    ),
)


def warn_of_missing_table(source: Source) -> None:
    """Warn if the images are those of a release whose table of labels was not found."""
    paths = [file.replace(os.sep, "/") for file in source.images]
    for release in MISSING_TABLES:
        pattern = re.compile(release.images)
        if any(pattern.search(path) for path in paths):
            warn_missing_table(source, f"{release.table} of {release.release}", "all labels", release.origin)


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
