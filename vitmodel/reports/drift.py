"""The drift report: how the images of one or several runs differ from those of the training set."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from vitmodel.data.appearance import CATEGORIES
from vitmodel.data.drift import ColumnDrift, large_drift_messages
from vitmodel.data.tables import write_csv
from vitmodel.metrics.stability import LARGE
from vitmodel.reports import figures
from vitmodel.reports.figures import DriftPanel
from vitmodel.reports.page import render_page
from vitmodel.utils import write_atomic

Runs = Mapping[str, Sequence[ColumnDrift]]
"""Name of each run, in order -> its drift."""


def drift_panels(runs: Runs) -> list[DriftPanel]:
    """Return what the figures of each column show."""
    columns: dict[str, dict[str, ColumnDrift]] = {}
    for name, drift in runs.items():
        for column in drift:
            columns.setdefault(column.column, {})[name] = column
    panels: list[DriftPanel] = []
    for found in columns.values():
        first = next(iter(found.values()))
        training = _shares(first.reference)
        shares = {
            name: _shares(found[name].observed) if name in found else np.full(len(training), np.nan) for name in runs
        }
        total = np.nansum([training, *shares.values()], axis=0)
        shown = (total > 0) | (first.column not in CATEGORIES)
        names = [name for name, is_shown in zip(first.bins, shown, strict=True) if is_shown]
        panels.append((first.title, names, training[shown], {name: values[shown] for name, values in shares.items()}))
    return panels


def _shares(counts: Sequence[int]) -> np.ndarray:
    return np.array(counts) / max(1, sum(counts))


def drift_table(runs: Runs) -> pd.DataFrame:
    """Return one row per run and column: the stability index, what chance gives, the verdict and the numbers."""
    rows = [
        {
            "run": name,
            "column": column.column,
            "index": column.stability.index,
            "by_chance": column.stability.chance,
            "chance_limit": column.stability.limit,
            "verdict": column.stability.verdict,
            "images": sum(column.observed),
            "patients": column.patients,
            "training_images": sum(column.reference),
        }
        for name, drift in runs.items()
        for column in drift
    ]
    return pd.DataFrame(rows)


def write_drift_report(out: Path, runs: Runs, package: str) -> None:
    """Write OUT/drift.csv, drift.png and drift.html.

    Args:
        out: The folder; it is created if needed.
        runs: The drift of each run.
        package: Name of the package for the title.

    Raises:
        VitmodelError: A file cannot be written.
    """
    table = drift_table(runs)
    write_csv(table, out / "drift.csv")
    panels = drift_panels(runs)
    picture = figures.to_pixels(figures.drift_overview(panels))
    write_atomic(out / "drift.png", cv2.imencode(".png", picture[..., ::-1])[1].tobytes())
    pictures = [_svg(figures.distribution(*panel)) for panel in panels]
    if len(runs) > 1:
        titles = {column.column: column.title for drift in runs.values() for column in drift}
        indices = table.pivot(index="run", columns="column", values="index").reindex(list(runs))
        lines = {titles[str(column)]: indices[column].tolist() for column in indices}
        pictures.insert(0, _svg(figures.stability(list(runs), lines, LARGE)))
    page = render_page(
        "drift.html.j2",
        title=f"Drift of the images against {package}",
        subtitle=", ".join(runs),
        runs={name: large_drift_messages(list(drift)) for name, drift in runs.items()},
        rows=list(table.itertuples(index=False)),
        figures=pictures,
    )
    write_atomic(out / "drift.html", page)


def _svg(figure: figures.Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(figures.to_svg(figure).encode()).decode()
