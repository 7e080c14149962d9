"""Recognise the originals of DDSM (University of South Florida, 1999), which no common decoder reads.

The films are LJPEG files (a lossless JPEG of 1993) next to .ics and .OVERLAY files. They must be converted first;
CBIS-DDSM and Mini-DDSM are converted copies with labels, which vitmodel reads.

Heath M, Bowyer K, Kopans D, Moore R, Kegelmeyer WP: The Digital Database for Screening Mammography. Proc 5th Int
Workshop on Digital Mammography, 2001, 212-218. Free of charge with citation.
"""

from __future__ import annotations

import os

import pandas as pd

from vitmodel.errors import UsageError
from vitmodel.releases.source import Source

EXPECTED_FILES = "films of DDSM as .LJPEG files, which are not read but named in a message"


def detect(source: Source) -> bool:
    """Return whether the source has LJPEG files and no image that can be read."""
    if source.root.is_file():
        return _is_ljpeg(str(source.root))
    return any(map(_is_ljpeg, source.files)) and not source.images


def _is_ljpeg(file: str) -> bool:
    return ".ljpeg" in os.path.basename(file).lower()


def read(source: Source) -> pd.DataFrame:
    """Raise UsageError: the films must be converted first."""
    count = sum(map(_is_ljpeg, source.files))
    raise UsageError(
        f"{source.root}: the {count} films are LJPEG files of DDSM, which cannot be decoded; convert them to 16-bit PNG "
        "with the release's own program, or use CBIS-DDSM (doi:10.7937/K9/TCIA.2016.7O02S9CY) or Mini-DDSM "
        "(kaggle.com/datasets/cheddad/miniddsm2), which hold the same films with labels"
    )
