"""Read the mini-MIAS films (1994; https://doi.org/10.17863/CAM.105113).

Licence: for research, see the file Licence.txt of the release (MIAS v1.21: CC BY 2.0 UK).

Layout: the films mdb001.pgm, mdb002.pgm, ... and Info.txt in their folder or near it; or a CSV table with image_path,
severity (N, B, M) and density_FGD.

A film with an odd number shows the left breast, the next one the right breast of the same woman, as the names of the
full release (mdb001lm, mdb002rm) tell; both are MLO. The films are mirrored: the chest wall of a left breast is at the
right edge. Background tissue is given as F (fatty), G (glandular) or D (dense). These three classes do not map to the
four of the ACR, so `density` is NaN and `density_FGD` is kept.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pandas as pd

from vitmodel.archives import open_source
from vitmodel.data import lesions
from vitmodel.data.manifest import as_manifest
from vitmodel.errors import RefusedError, UsageError
from vitmodel.releases import custom_table
from vitmodel.releases.dicom_folder import image_size
from vitmodel.releases.files import get_or_default, image_stem
from vitmodel.releases.missing_tables import MissingTable
from vitmodel.releases.source import Source

logger = logging.getLogger(__name__)

EXPECTED_FILES = "mdb001.pgm ... and Info.txt, or a CSV file with image_path, severity and density_FGD"
MISSING_TABLE = MissingTable(
    "Info.txt of mini-MIAS",
    "http://peipa.essex.ac.uk/pix/mias/",
    re.compile(r"/mdb\d{3}([lr][smlx])?\.pgm$"),
)
TABLE_COLUMNS = ("image_path", "patient_id", "severity", "density_FGD")
INFO_NAME = "Info.txt"
FINDING = re.compile(
    r"(?P<film>mdb\d{3})\s+(?P<density_FGD>[FGD])\s+(?P<finding>CALC|CIRC|SPIC|MISC|ARCH|ASYM|NORM)"
    r"(\s+(?P<severity>[BM]))?(\s+(?P<x>\d+)\s+(?P<y>\d+)\s+(?P<radius>\d+))?(\s+\*NOTE.*)?\s*",
    re.IGNORECASE,
)
FILM_NAME = re.compile(r"(mdb\d{3})([lr][smlx])?", re.IGNORECASE)
CANCER = {"M": 1.0, "B": 0.0, "N": 0.0}


def detect(source: Source) -> bool:
    """Return whether the source has films and Info.txt, or a table with the columns of mini-MIAS."""
    return bool(source.tables_with_columns(TABLE_COLUMNS) or (_films(source) and _info(source)))


def read(source: Source) -> pd.DataFrame:
    """Return a manifest with one row per film, where `cancer` means malignant.

    The box of each circle is in `lesions` if the finding is malignant and in `finding_boxes` if it is benign.

    Raises:
        UsageError: The folder contains several tables, or the table is not valid.
    """
    info = _info(source)
    if info is not None and not source.tables_with_columns(TABLE_COLUMNS):
        return _read_info(source, info)
    table = custom_table.read(source, dataset="mias")
    boxes = table.rename(columns={"y_top_left": "y"}).reindex(columns=["severity", "x", "y", "radius"])
    return table.assign(cancer=table.severity.map(CANCER), lesions=_boxes(boxes[boxes.severity == "M"]))


def _info(source: Source) -> Path | None:
    """Return the release's Info.txt, or the source itself if it is that file."""
    return source.root if source.root.name.lower() == INFO_NAME.lower() else source.find_file(INFO_NAME)


def _films(source: Source) -> dict[str, str]:
    """Return the file of each film; the released PGM file wins over a copy in another format."""
    files = sorted(source.images, key=lambda file: file.lower().endswith(".pgm"))
    matches = ((FILM_NAME.fullmatch(image_stem(file)), file) for file in files)
    return {match[1].lower(): file for match, file in matches if match}


def _read_info(source: Source, info: Path) -> pd.DataFrame:
    """Return the manifest of the films in Info.txt, which has a line per finding."""
    findings = _findings(info)
    severity = findings.severity.fillna("N")
    by_film = findings.assign(rank=severity.map({"N": 0, "B": 1, "M": 2}), severity=severity).groupby("film")
    films = by_film.density_FGD.first().to_frame()
    films["severity"] = by_film["rank"].max().map({0: "N", 1: "B", 2: "M"})
    films["findings"] = by_film.finding.agg(lambda names: ";".join(sorted(set(names) - {"NORM"})))
    films = films.reset_index()
    number = films.film.str[3:].astype(int)
    files = _films(source)
    circles = _from_the_top(findings, files)
    frame = pd.DataFrame(
        {
            "image_id": films.film,
            "patient_id": ((number + 1) // 2).map("mias{:03d}".format),
            "laterality": number.map(lambda value: "L" if value % 2 else "R"),
            "view": "MLO",
            "path": get_or_default(films.film, files, str(source.folder) + os.sep + films.film + ".pgm"),
            "dataset": "mias",
            "cancer": films.severity.map(CANCER),
            "lesions": films.film.map(_boxes_by_film(circles[circles.severity == "M"])),
            "findings": films.findings,
            "finding_boxes": films.film.map(_boxes_by_film(circles[circles.severity == "B"])),
            "density_FGD": films.density_FGD,
            "severity": films.severity,
        }
    )
    return as_manifest(frame, str(info))


def _findings(info: Path) -> pd.DataFrame:
    """Return the lines of Info.txt as a table: film, density_FGD, finding, severity, x, y, radius.

    Raises:
        UsageError: The file cannot be read, or has no line about a film.
    """
    try:
        with open_source(info) as file:
            lines = file.read().decode("latin-1").splitlines()
    except (RefusedError, OSError) as error:
        raise UsageError(f"cannot read {info}: {error}; check the path") from error
    matches = [match for line in lines if (match := FINDING.fullmatch(line.strip()))]
    if not matches:
        raise UsageError(f"{info} has no line such as 'mdb001 G CIRC B 535 425 197'; download it again")
    table = pd.DataFrame([match.groupdict() for match in matches])
    for name in ("x", "y", "radius"):
        table[name] = pd.to_numeric(table[name])
    return table.assign(film=table.film.str.lower(), severity=table.severity.str.upper())


def _from_the_top(findings: pd.DataFrame, files: dict[str, str]) -> pd.DataFrame:
    """Return the findings with a circle whose film exists, with `y` counted from the top as in pixels.

    If a circle's centre is outside its film, the films are resized copies, and no circle is returned.
    """
    circles = findings[findings.x.notna() & findings.film.isin(files)]
    sizes = {film: size for film in circles.film.unique() if (size := image_size(files[film]))}
    width = circles.film.map({film: size[1] for film, size in sizes.items()})
    height = circles.film.map({film: size[0] for film, size in sizes.items()})
    is_inside = (circles.x < width) & (circles.y < height)
    if not (is_inside | width.isna()).all():
        logger.warning("circles of findings are left out, because the films have another size than the release's")
        return circles.iloc[:0]
    return circles.assign(y=height - circles.y)[is_inside]


def _boxes_by_film(circles: pd.DataFrame) -> dict[str, str]:
    """Return the bounding boxes of the circles of each film, as text."""
    return _boxes(circles).groupby(circles.film).agg(";".join).to_dict()


def _boxes(circles: pd.DataFrame) -> pd.Series:
    """Return the bounding box of each circle (x, y, radius), as text; circles with unknown numbers are left out."""
    x, y, radius = (pd.to_numeric(circles[name], errors="coerce") for name in ("x", "y", "radius"))
    corners = pd.concat([x - radius, y - radius, x + radius, y + radius], axis=1).dropna()
    texts = [lesions.boxes_to_text([row]) for row in corners.to_numpy()]
    return pd.Series(texts, index=corners.index, dtype=object)
