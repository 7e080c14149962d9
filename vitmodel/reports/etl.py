"""The ETL's report, one self-contained HTML file: what became of every image of a manifest. Knows neither stage nor configuration.

The page follows from the manifest and the files it names, so running the ETL again writes the same bytes. It shows no patient ids.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydicom.uid import UID

from vitmodel import __version__
from vitmodel.data.manifest import breast_ids, find_duplicates, usable_rows
from vitmodel.errors import UsageError
from vitmodel.pixels.verdict import REFUSAL_REASONS, WARNING_REASONS
from vitmodel.reports.contact_sheet import contact_sheet, explode_codes, sample_by_reason
from vitmodel.reports.page import render_page
from vitmodel.utils import write_atomic

STATUSES = ("ok", "warned", "refused")
MAX_ENTRIES = 48
MAX_REFUSALS = 50
MAX_GROUPS = 40  # most sites or machines that get a line of their own
MAX_VALUES = 8  # most values of a property of the sources that do
HISTOGRAM_BINS = 25
VOI_NAME_PATTERN = (
    r"^(\w+) \S+/\S+ (\d+/\d+)$"  # <function> <center>/<width> <which>/<of how many>, as pixels/voi.py names it
)


def write_etl_report(path: Path | str, manifest: pd.DataFrame, jobs: int = 0) -> None:
    """Write the report on `manifest`, as the ETL made it (absolute paths, a status in every row), to `path`.

    `jobs` threads (0 = one per core) read the few sources that the contact sheet shows. Raises UsageError where a row has no status,
    VitmodelError where `path` cannot be written.
    """
    if manifest["status"].isna().any():
        raise UsageError("status: empty in the manifest; its images have not been through `vitmodel etl`")
    used, refused = usable_rows(manifest), manifest[manifest["status"] == "refused"]
    cards = contact_sheet(sample_by_reason(used, MAX_ENTRIES), jobs)
    page = render_page(
        "etl.html.j2",
        title="ETL report",
        subtitle=f"{', '.join(count_values(manifest['dataset']).index)} · vitmodel {__version__}",
        manifest=manifest,
        used=used,
        verdicts={verdict: int((manifest["status"] == verdict).sum()) for verdict in STATUSES},
        breasts=breast_ids(manifest).nunique(),
        copies=find_duplicates(manifest),
        reasons=summarize_reasons(manifest),
        refused=refused,
        refusals=sample_by_reason(refused, MAX_REFUSALS),
        groups={"site": count_by_status(manifest, "site_id"), "machine": count_by_status(manifest, "machine_id")},
        sides=summarize_sides(used),
        cards=[(group, list(members)) for group, members in itertools.groupby(cards, key=lambda card: card.row.group)],
        histograms=box_histograms(used),
        properties={title: count_values(values) for title, values in image_properties(used).items()}
        if len(used)
        else {},
        preprocessing=[format_settings(text) for text in manifest["preprocessing"].dropna().unique()],
        sentences=redact_message,
        share=format_percentage,
    )
    write_atomic(path, page)


def merge_rare_values(values: pd.Series, most: int) -> pd.Series:
    """`values` as text: 'unknown' where there is none, and all but the `most` most frequent as 'other (<n> values)'."""
    text = values.where(values.notna(), "unknown").astype(str)
    frequent = text.value_counts().index
    rare = frequent[most:]
    return text.where(~text.isin(rare), f"other ({len(rare)} values)") if len(rare) > 1 else text


def count_values(values: pd.Series, most: int = MAX_VALUES) -> pd.Series:
    """How many images have each value, the most frequent first."""
    return merge_rare_values(values, most).value_counts()


def count_by_status(manifest: pd.DataFrame, column: str) -> pd.DataFrame:
    """The number of images and of each verdict per value of `column`."""
    counts = pd.crosstab(merge_rare_values(manifest[column], MAX_GROUPS), manifest["status"]).reindex(
        columns=STATUSES, fill_value=0
    )
    return counts.assign(images=counts.sum(axis=1)).sort_values("images", ascending=False, kind="stable")


def summarize_reasons(manifest: pd.DataFrame) -> pd.DataFrame:
    """Per reason: its code (the index), verdict, meaning, number of images, and three of their ids. Refusals first, then by frequency."""
    codes = explode_codes(manifest)
    codes = codes[codes != ""]
    found = manifest["image_id"].loc[codes.index].groupby(codes.to_numpy(), sort=False)
    table = pd.DataFrame({"images": found.size(), "examples": found.agg(lambda ids: ", ".join(ids.head(3)))})
    table["verdict"] = ["refused" if code in REFUSAL_REASONS else "warned" for code in table.index]
    table["meaning"] = [
        (REFUSAL_REASONS | WARNING_REASONS).get(code, "not a reason of this version of vitmodel")
        for code in table.index
    ]
    return table.sort_values(["verdict", "images"], ascending=[True, False], kind="stable")


def summarize_sides(used: pd.DataFrame) -> pd.DataFrame:
    """Per machine: whether the side seen in the pixels is the stated one, where both are known.

    Columns: images compared, `mirrored` of them (the chest wall of a left breast at the right edge, or the reverse), their patients,
    and those of whom `all` or only `some` images are mirrored. Unmirrored, a left breast has its chest wall at the left edge.
    """
    known = used[used["laterality"].isin(["L", "R"]) & used["chest_wall_side"].notna()]
    mirrored = (known["laterality"] == "L") != (known["chest_wall_side"] == "left")
    patients = mirrored.groupby(
        [merge_rare_values(known["machine_id"], MAX_GROUPS).rename("machine"), known["patient_id"]]
    ).agg(["size", "sum"])
    counts = pd.DataFrame({
        "images": patients["size"],
        "mirrored": patients["sum"],
        "patients": 1,
        "all": patients["sum"] == patients["size"],
        "some": patients["sum"].between(1, patients["size"] - 1),
    })  # fmt: skip
    return counts.groupby("machine").sum().sort_values(["mirrored", "images"], ascending=False)


def image_properties(used: pd.DataFrame) -> dict[str, pd.Series]:
    """What the sources are and how they were read, a value per image."""
    size = used["source_height"].map("{:.0f}".format) + " × " + used["source_width"].map("{:.0f}".format)
    spacing = (used["spacing_row"].map("{:.4g}".format) + " × " + used["spacing_column"].map("{:.4g}".format)).where(
        used["spacing_row"].notna()
    )
    return {
        "Size, rows × columns": size,
        "Spacing, rows × columns, mm": spacing,
        "View": used["view"].replace("", np.nan),
        "Stated side": used["laterality"].replace("", np.nan),
        "Chest wall seen at": used["chest_wall_side"],
        "Photometric interpretation": used["photometric"],
        "Transfer syntax": used["transfer_syntax"].map(lambda uid: UID(uid).name, na_action="ignore"),
        "Decoder": used["decoder"],
        "Reductions at decoding": used["decode_level"].map("{:.0f}".format, na_action="ignore"),
        "VOI, which of how many": used["voi"].str.replace(VOI_NAME_PATTERN, r"\1 \2", regex=True),
    }


@dataclass(frozen=True)
class BoxHistogram:
    """A distribution over equal bins from 0 to `top`."""

    title: str
    unit: str
    top: float
    counts: list[int]
    median: float
    middle: tuple[float, float]
    """5 % and 95 % quantiles."""
    ends: tuple[tuple[float, str], tuple[float, str]]
    """Smallest and largest value, each with its image id."""


def box_histograms(used: pd.DataFrame) -> list[BoxHistogram]:
    """Height, width and area of the crop boxes, in millimetres where a spacing is known and as percentages of the source."""
    ids = used["image_id"]
    height, width = used["box_y1"] - used["box_y0"], used["box_x1"] - used["box_x0"]
    relative_height, relative_width = height / used["source_height"], width / used["source_width"]
    return [
        histogram(title, unit, values[values.notna()], ids)
        for title, unit, values in (
            ("Height", "mm", height * used["spacing_row"]),
            ("Width", "mm", width * used["spacing_column"]),
            ("Height", "% of the image", 100 * relative_height),
            ("Width", "% of the image", 100 * relative_width),
            ("Area", "% of the image", 100 * relative_height * relative_width),
        )
        if values.notna().any()
    ]


def histogram(title: str, unit: str, values: pd.Series, ids: pd.Series) -> BoxHistogram:
    """The distribution of `values`, at least one, all known; percentages up to 100, others up to the next multiple of 50."""
    top = 100.0 if unit.startswith("%") else 50 * float(np.ceil(values.max() / 50))
    low, median, high = values.quantile([0.05, 0.5, 0.95])
    least, largest = ((float(values[row]), str(ids[row])) for row in (values.idxmin(), values.idxmax()))
    counts = np.histogram(values, HISTOGRAM_BINS, (0, top))[0].tolist()
    return BoxHistogram(title, unit, top, counts, median, (low, high), (least, largest))


def format_settings(preprocessing: str) -> str:
    """The column `preprocessing` in words, such as: size 1024x512, bits 8."""
    return ", ".join(f"{name} {value}" for name, value in json.loads(preprocessing).items())


def redact_message(row: Any) -> str:
    """What was remarked on an image, without the path of its file, in which there may be a patient's id."""
    return "" if pd.isna(row.remark) else row.remark.replace(str(row.source_path), "the file")


def format_percentage(part: int, whole: int) -> str:
    """`part` of `whole` in percent, where only nothing is 0 % and only all is 100 %."""
    if part in (0, whole):
        return "100 %" if part else "0 %"
    return f"{min(max(100 * part / whole, 0.1), 99.9):.1f} %"
