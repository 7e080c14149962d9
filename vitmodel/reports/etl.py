"""The ETL report: one self-contained HTML file on the result for every image of a manifest.

The page depends only on the manifest and the files it names, so that repeating the ETL writes the same bytes. It
shows no patient ids.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from pydicom.uid import UID

from vitmodel import __version__
from vitmodel.data.manifest import breast_ids, find_duplicates, usable_rows
from vitmodel.errors import UsageError
from vitmodel.pixels.verdict import REFUSAL_REASONS, WARNING_REASONS
from vitmodel.reports.contact_sheet import (
    ContactSheetEntry,
    contact_sheet,
    explode_codes,
    redact_message,
    refused_thumbnails,
    sample_by_reason,
)
from vitmodel.reports.page import render_page
from vitmodel.utils import write_atomic

STATUSES = ("ok", "warned", "refused")
MAX_ENTRIES = 48
"""Maximum number of images on the contact sheet."""
MAX_REFUSALS = 50
"""Maximum number of refused images that are listed."""
MAX_GROUPS = 40
"""Maximum number of sites or machines with a table row of their own; the others are merged."""
MAX_VALUES = 8
"""Maximum number of values of a source property with a table row of their own; the others are merged."""
MIRRORED_SHARE = 0.9
"""Share of the images of a release or machine from which it counts as mirrored as a whole; some sides are uncertain."""
MIN_MIRRORED = 4
"""Minimum number of images of a release or machine that counts as mirrored as a whole."""
HISTOGRAM_BINS = 25
VOI_NAME_PATTERN = r"^(\w+) \S+/\S+ (\d+/\d+)$"
"""A VOI's name as in pixels/voi.py: "<function> <center>/<width> <number>/<count>"."""


def write_etl_report(path: Path | str, manifest: pd.DataFrame, jobs: int = 0) -> None:
    """Write the report on a manifest.

    Args:
        path: The HTML file to write.
        manifest: The manifest as the ETL made it: absolute paths, a status in every row.
        jobs: Number of threads that read the images of the contact sheet; 0 = one per core.

    Raises:
        UsageError: A row has no status.
        VitmodelError: The file cannot be written.
    """
    missing = int(manifest["status"].isna().sum())
    if missing:
        raise UsageError(f"column 'status': empty in {missing} rows of the manifest; run `vitmodel etl` on its images")
    manifest, mirrored = fold_mirrored(manifest)
    used = usable_rows(manifest)
    refused = manifest[manifest["status"] == "refused"]
    refusals = sample_by_reason(refused, MAX_REFUSALS)
    cards = contact_sheet(sample_by_reason(used, MAX_ENTRIES), jobs)
    datasets = ", ".join(count_values(manifest["dataset"]).index)
    page = render_page(
        "etl.html.j2",
        title="ETL report",
        subtitle=f"{datasets} · vitmodel {__version__}",
        manifest=manifest,
        used=used,
        verdicts={verdict: int((manifest["status"] == verdict).sum()) for verdict in STATUSES},
        breasts=breast_ids(manifest).nunique(),
        copies=find_duplicates(manifest),
        reasons=summarize_reasons(manifest),
        mirrored=mirrored,
        refused=refused,
        refusals=refusals.assign(picture=refused_thumbnails(refusals, jobs)),
        groups={"site": count_by_status(manifest, "site_id"), "machine": count_by_status(manifest, "machine_id")},
        sides=summarize_sides(used),
        cards=_group_entries(cards),
        histograms=box_histograms(used),
        properties=_count_properties(used),
        preprocessing=[format_settings(text) for text in manifest["preprocessing"].dropna().unique()],
        message=redact_message,
        share=format_percentage,
    )
    write_atomic(path, page)


def _group_entries(entries: list[ContactSheetEntry]) -> list[tuple[str, list[ContactSheetEntry]]]:
    """Return consecutive entries with the same reason code, as (code, entries)."""
    groups = itertools.groupby(entries, key=lambda entry: entry.row.group)
    return [(code, list(members)) for code, members in groups]


def _count_properties(used: pd.DataFrame) -> dict[str, pd.Series]:
    """Return the value counts of each source property by title; empty without used images."""
    if used.empty:
        return {}
    return {title: count_values(values) for title, values in image_properties(used).items()}


def merge_rare_values(values: pd.Series, most: int) -> pd.Series:
    """Return values as text, with missing ones as 'unknown' and rare ones merged.

    All but the `most` most frequent values become 'other (<n> values)', unless only one would be merged.
    """
    text = values.where(values.notna(), "unknown").astype(str)
    frequent = text.value_counts().index
    rare = frequent[most:]
    if len(rare) <= 1:
        return text
    return text.where(~text.isin(rare), f"other ({len(rare)} values)")


def count_values(values: pd.Series, most: int = MAX_VALUES) -> pd.Series:
    """Return the number of images with each value, the most frequent first; see `merge_rare_values`."""
    return merge_rare_values(values, most).value_counts()


def count_by_status(manifest: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the number of images, in total and by status, for each value of a column."""
    values = merge_rare_values(manifest[column], MAX_GROUPS)
    counts = pd.crosstab(values, manifest["status"]).reindex(columns=STATUSES, fill_value=0)
    return counts.assign(images=counts.sum(axis=1)).sort_values("images", ascending=False, kind="stable")


def summarize_reasons(manifest: pd.DataFrame) -> pd.DataFrame:
    """Return one row per reason code, refusals first, then by falling frequency.

    Returns:
        A table indexed by code with the columns `images` (their number), `examples` (three image ids), `verdict`
        (`refused` or `warned`) and `meaning`.
    """
    codes = explode_codes(manifest)
    codes = codes[codes != ""]
    image_ids = manifest["image_id"].loc[codes.index].groupby(codes.to_numpy(), sort=False)
    table = pd.DataFrame({"images": image_ids.size(), "examples": image_ids.agg(lambda ids: ", ".join(ids.head(3)))})
    meanings = REFUSAL_REASONS | WARNING_REASONS
    table["verdict"] = ["refused" if code in REFUSAL_REASONS else "warned" for code in table.index]
    table["meaning"] = [meanings.get(code, "this version of vitmodel does not know the code") for code in table.index]
    return table.sort_values(["verdict", "images"], ascending=[True, False], kind="stable")


def fold_mirrored(manifest: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Replace the warnings `laterality_mismatch` of a release or machine that is mirrored as a whole by one sentence.

    Args:
        manifest: The manifest as the ETL made it.

    Returns:
        The manifest as it is shown to the user, and a sentence for each mirrored release and each mirrored machine of
        another release. An image without another warning is shown as ok. The file keeps the code in every row.
    """
    mirrored = _is_mirrored(usable_rows(manifest))
    folded = pd.Series(False, index=manifest.index)
    sentences = []
    for kind, names in (
        ("release", manifest["dataset"]),
        ("machine", _name_machines(manifest)),
    ):
        rest = mirrored[~folded.loc[mirrored.index]]
        counts = rest.groupby(names.loc[rest.index]).agg(["sum", "size"])
        counts = counts[(counts["sum"] >= MIN_MIRRORED) & (counts["sum"] >= MIRRORED_SHARE * counts["size"])]
        is_mirrored = mirrored.reindex(manifest.index, fill_value=False).astype(bool)
        folded |= names.isin(counts.index) & is_mirrored
        sentences += [
            f"{name}: {number} of {total} images are mirrored against their stated side, so that the whole {kind} is; "
            "the crops follow the pixels, and the rows keep the code laterality_mismatch"
            for name, number, total in counts.itertuples()
        ]
    codes = explode_codes(manifest[folded])
    others = codes[codes != "laterality_mismatch"].groupby(level=0).agg(";".join).reindex(codes.index.unique())
    shown = manifest.copy()
    shown.loc[folded, "reason"] = others
    shown.loc[folded & shown["reason"].isna(), "status"] = "ok"
    return shown, sentences


def _name_machines(manifest: pd.DataFrame) -> pd.Series:
    """Return the release and the machine of each image as text; NaN where the machine is unknown."""
    pairs = zip(manifest["dataset"], manifest["machine_id"], strict=True)
    return pd.Series([f"{release}, machine {machine}" for release, machine in pairs], index=manifest.index).where(
        manifest["machine_id"].notna()
    )


def _is_mirrored(used: pd.DataFrame) -> pd.Series:
    """Return whether each image is mirrored, for those with a known laterality and chest wall."""
    compared = used[used["laterality"].isin(["L", "R"]) & used["chest_wall_side"].notna()]
    return (compared["laterality"] == "L") != (compared["chest_wall_side"] == "left")


def summarize_sides(used: pd.DataFrame) -> pd.DataFrame:
    """Count, per machine, the images whose chest wall is at the other edge than their stated laterality implies.

    An image is mirrored if the chest wall of a left breast is at the right edge, or that of a right breast at the
    left edge. Images with an unknown laterality or chest wall are left out.

    Returns:
        A table indexed by machine with the columns `images` (compared), `mirrored`, `patients`, `all` (patients with
        all images mirrored) and `some` (patients with some images mirrored).
    """
    mirrored = _is_mirrored(used)
    compared = used.loc[mirrored.index]
    machine = merge_rare_values(compared["machine_id"], MAX_GROUPS).rename("machine")
    per_patient = mirrored.groupby([machine, compared["patient_id"]]).agg(["size", "sum"])
    counts = pd.DataFrame(
        {
            "images": per_patient["size"],
            "mirrored": per_patient["sum"],
            "patients": 1,
            "all": per_patient["sum"] == per_patient["size"],
            "some": per_patient["sum"].between(1, per_patient["size"] - 1),
        }
    )
    return counts.groupby("machine").sum().sort_values(["mirrored", "images"], ascending=False)


def image_properties(used: pd.DataFrame) -> dict[str, pd.Series]:
    """Return properties of the source images and of their decoding by title, one value per image."""
    size = used["source_height"].map("{:.0f}".format) + " × " + used["source_width"].map("{:.0f}".format)
    spacing = used["spacing_row"].map("{:.4g}".format) + " × " + used["spacing_column"].map("{:.4g}".format)
    spacing = spacing.where(used["spacing_row"].notna())
    return {
        "Size, rows × columns": size,
        "Pixel spacing, rows × columns, mm": spacing,
        "View": used["view"].replace("", np.nan),
        "Stated laterality": used["laterality"].replace("", np.nan),
        "Chest wall found at": used["chest_wall_side"],
        "Photometric interpretation": used["photometric"],
        "Transfer syntax": used["transfer_syntax"].map(lambda uid: UID(uid).name, na_action="ignore"),
        "Decoder": used["decoder"],
        "Resolution levels skipped at decoding": used["decode_level"].map("{:.0f}".format, na_action="ignore"),
        "VOI transform, used / stored": used["voi"].str.replace(VOI_NAME_PATTERN, r"\1 \2", regex=True),
    }


@dataclass(frozen=True)
class BoxHistogram:
    """A distribution over equally wide bins from 0 to `top`."""

    title: str
    unit: str
    top: float
    """Upper end of the last bin, in `unit`."""
    counts: list[int]
    """Number of images in each bin."""
    median: float
    middle: tuple[float, float]
    """The 5 % and 95 % quantiles."""
    ends: tuple[tuple[float, str], tuple[float, str]]
    """The smallest and the largest value, each with its image id."""


def box_histograms(used: pd.DataFrame) -> list[BoxHistogram]:
    """Return histograms of the crop boxes' height, width and area.

    They are in millimetres where the pixel spacing is known, and in percent of the source image.
    """
    height = used["box_y1"] - used["box_y0"]
    width = used["box_x1"] - used["box_x0"]
    relative_height = height / used["source_height"]
    relative_width = width / used["source_width"]
    measures = (
        ("Height", "mm", height * used["spacing_row"]),
        ("Width", "mm", width * used["spacing_column"]),
        ("Height", "% of the image", 100 * relative_height),
        ("Width", "% of the image", 100 * relative_width),
        ("Area", "% of the image", 100 * relative_height * relative_width),
    )
    return [
        histogram(title, unit, values[values.notna()], used["image_id"])
        for title, unit, values in measures
        if values.notna().any()
    ]


def histogram(title: str, unit: str, values: pd.Series, ids: pd.Series) -> BoxHistogram:
    """Return the histogram of at least one value.

    Args:
        title: What is measured.
        unit: Its unit. The bins end at 100 for percentages, otherwise at the next multiple of 50.
        values: The values, without NaN.
        ids: Image ids, by the index of `values`.
    """
    top = 100.0 if unit.startswith("%") else 50 * float(np.ceil(values.max() / 50))
    low, median, high = values.quantile([0.05, 0.5, 0.95])
    smallest, largest = ((float(values[row]), str(ids[row])) for row in (values.idxmin(), values.idxmax()))
    counts = np.histogram(values, HISTOGRAM_BINS, (0, top))[0].tolist()
    return BoxHistogram(title, unit, top, counts, median, (low, high), (smallest, largest))


def format_settings(preprocessing: str) -> str:
    """Return a value of the column `preprocessing` as text, such as "size 1024x512, bits 8"."""
    return ", ".join(f"{name} {value}" for name, value in json.loads(preprocessing).items())


def format_percentage(part: int, whole: int) -> str:
    """Return `part` of `whole` in percent; only 0 is shown as 0 % and only `whole` as 100 %."""
    if part == 0:
        return "0 %"
    if part == whole:
        return "100 %"
    return f"{min(max(100 * part / whole, 0.1), 99.9):.1f} %"
