"""The evaluation as one self-contained HTML file, for paper and phone. Knows what to show, not how it was computed."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from vitmodel.measure import figures
from vitmodel.measure.metrics import METRICS, Metrics, Sample
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, write_atomic

LIMITS = (
    "Metrics hold for patients, machines and readers like those of this data set, and for its prevalence; another site needs its own evaluation.",
    "Intervals are 95 % percentile intervals over patients drawn with replacement. They show chance in who was examined, "
    "not bias in how, and are too narrow where a value sits at its bound or positives are few.",
    "Cancers that were missed at the time of reading and not found later count as negatives: labels are not the truth of histology for every breast.",
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
    plotted: str
    """The name of the level that the curves show."""
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
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))  # fmt: skip
    level = next(level for level in report.levels if level.name == report.plotted)
    page = template.render(
        report=report,
        level=level,
        groups=METRICS,
        figures=_pictures(level),
        history={name: _inline(figures.history(name, splits)) for name, splits in report.history.items()},
        warning=NOT_A_MEDICAL_DEVICE,
        undefined=math.isnan,
        number=_number,
    )
    write_atomic(path, page)


def _pictures(level: Level) -> list[tuple[str, str]]:
    """Caption and picture of each figure; the curves need both classes."""
    sample, metrics = level.sample.known(), level.metrics
    pictures = [
        (
            "Receiver operating characteristic. The dot is the operating point with its 95 % intervals.",
            lambda: figures.roc(sample, metrics),
        ),
        ("Precision and recall. The dot is the operating point with its 95 % intervals.", lambda: figures.precision_recall(sample, metrics)),
        ("Reliability, in bins of equally many scores, with Wilson’s 95 % intervals.", lambda: figures.reliability(sample, metrics)),
        ("Scores by class, each as a fraction of its class.", lambda: figures.histogram(sample, metrics)),
        ("Confusion matrix at the threshold.", lambda: figures.confusion(metrics)),
    ]
    one_class = metrics.positives in (0, metrics.units)
    return [(caption, _inline(draw())) for caption, draw in pictures[3 if one_class else 0 :]]


def _inline(svg: str) -> str:
    """An image's address that holds the image."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}".replace("-", "−")
