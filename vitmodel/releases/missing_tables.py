"""Recognise the images of a release whose table of labels is missing, and say where to get the table."""

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
            logger.warning(
                "%s: these are images of %s, but %s is missing, so they have no labels; get it from %s and put it into "
                "this folder",
                source.root,
                release.release,
                release.table,
                release.origin,
            )
