"""The evaluation as one self-contained HTML file, for paper and phone. Knows what to show, not how it was computed."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from vitmodel.measure import figures
from vitmodel.measure.metrics import METRICS, Metrics
from vitmodel.measure.sample import Sample
from vitmodel.utils import render_page, write_atomic

LIMITS = (
    "The metrics hold for patients, machines and readers like those of this data set, at its prevalence; another site needs its own.",
    "The intervals are the middle 95 % over patients drawn with replacement. They show chance in who was examined, not bias in how, "
    "and are too narrow where a value sits at its bound or positives are few.",
    "A label is what was known when the data were released: a cancer found later, or never, counts as a negative.",
    "Units with an unknown label and refused images are left out of every metric and counted above; leaving them out may favour the model.",
)


@dataclass(frozen=True)
class Level:
    """The scores of one level, `image`, `breast` or `patient`, and what was measured on them."""

    name: str
    sample: Sample
    metrics: Metrics
    """`measure(sample, ...)`."""
    refused: int = 0
    """Units with no score, because all their images were refused."""


@dataclass(frozen=True)
class Report:
    """All that `write_report` shows; the stage that evaluates fills it in."""

    title: str
    command: str
    """The exact command that gave these numbers."""
    created: str
    """When, with the time zone, and with which version."""
    levels: Sequence[Level]
    """At least one; they become the columns of the tables."""
    plotted: Level
    """The one of them that the headline and the curves show."""
    method: Mapping[str, object]
    """How scores came about: split, aggregation, calibration, where the threshold was chosen, bootstrap replicates and seed."""
    model: Mapping[str, object]
    """The model package: name, architecture, hash, preprocessing, what it was trained on."""
    data: Mapping[str, object]
    """The manifest: path, hash, split, release."""
    refusals: Mapping[str, int] = field(default_factory=dict)
    """Reason -> number of images refused for it."""
    history: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]] = field(default_factory=dict)
    """Metric -> split (train, val) -> (epoch, value); empty where the package has no training history."""
    limits: Sequence[str] = LIMITS


def write_report(path: Path | str, report: Report) -> None:
    """Write `report` to `path` as HTML with its style and figures inside, or leave what was there. Raises VitmodelError."""
    page = render_page(
        "measure/report.html.j2",
        title=report.title,
        subtitle=report.created,
        report=report,
        groups=METRICS,
        figures=_pictures(report.plotted),
        history={name: _inline(figures.history(name, splits)) for name, splits in report.history.items()},
        undefined=math.isnan,
        number=_number,
    )
    write_atomic(path, page)


def _pictures(level: Level) -> list[tuple[str, str]]:
    """Caption and picture of each figure; the curves need both classes."""
    sample, metrics = level.sample.known(), level.metrics
    pictures = []
    if 0 < metrics.positives < metrics.units:
        pictures += [
            ("Receiver operating characteristic; the dot is the threshold, with 95 % intervals.", figures.roc(sample, metrics)),
            ("Precision and recall; the dot is the threshold, with 95 % intervals.", figures.precision_recall(sample, metrics)),
            ("Reliability in bins of equally many scores, with Wilson’s 95 % intervals.", figures.reliability(sample, metrics)),
        ]
    pictures += [
        ("Scores by class, each as a fraction of its class.", figures.histogram(sample, metrics)),
        ("Confusion matrix at the threshold.", figures.confusion(metrics.confusion, metrics.threshold)),
    ]
    return [(caption, _inline(figure)) for caption, figure in pictures]


def _inline(figure: Figure) -> str:
    """An image's address that holds the image."""
    return "data:image/svg+xml;base64," + base64.b64encode(figures.to_svg(figure).encode()).decode()


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}".replace("-", "−")
