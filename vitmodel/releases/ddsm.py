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
from vitmodel.releases.files import image_stem
from vitmodel.releases.source import Source

EXPECTED_FILES = "films of DDSM as .LJPEG files, which are not read but named in a message"


def detect(source: Source) -> bool:
    """Return whether the source has an LJPEG file without a converted copy of the same name."""
    return bool(_ljpeg_films(source))


def _ljpeg_films(source: Source) -> set[str]:
    """Return the names of the LJPEG files that have no converted copy, such as C_0029_1.LEFT_CC."""
    files = [str(source.root)] if source.is_file else source.files
    names = [os.path.basename(file) for file in files if ".ljpeg" in file.lower()]
    films = {name[: name.lower().index(".ljpeg")] for name in names if ".ljpeg" in name.lower()}
    return films - set(map(image_stem, source.images)) if films else films


def read(source: Source) -> pd.DataFrame:
    """Raise UsageError: the films must be converted first."""
    raise UsageError(
        f"{source.root}: {len(_ljpeg_films(source))} films are LJPEG files of DDSM, which cannot be decoded; convert "
        "them to 16-bit PNG files of the same names with the program jpeg of DDSM, or use CBIS-DDSM "
        "(doi.org/10.7937/K9/TCIA.2016.7O02S9CY) or Mini-DDSM (kaggle.com/datasets/cheddad/miniddsm2), "
        "which have the same films with labels"
    )
