"""The evaluation as one self-contained HTML file, for paper and phone. Knows what to show, not how it was computed."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure

from vitmodel.metrics.bootstrap import Interval
from vitmodel.metrics.compare import Comparison
from vitmodel.metrics.curve_data import CurveData
from vitmodel.metrics.metrics import METRICS, Metrics
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.reports import figures
from vitmodel.reports.page import render_page
from vitmodel.utils import write_atomic

PICTURE_HEIGHT = 512
"""Of an error's crop in the report, in pixels, at most."""
LIMITS = (
    "The metrics hold for patients, machines and readers like those of this data set, at its prevalence; another site needs its own.",
    "The intervals are the middle 95 % over patients drawn with replacement. They show chance in who was examined, not bias in how, "
    "and are too narrow where a value sits at its bound or positives are few.",
    "A label is what was known when the data were released: a cancer found later, or never, counts as a negative.",
    "Units with an unknown label and refused images are left out of every metric and counted above; leaving them out may favour the model.",
    "Many subgroups are looked at and nothing is corrected for that: of 20 intervals one is expected to miss.",
)


@dataclass(frozen=True)
class Level:
    """The scores of one level, `image`, `breast` or `patient`, and what was measured on them."""

    name: str
    sample: ScoredUnits
    metrics: Metrics
    """`measure(sample, ...)`."""
    refused: int = 0
    """Units with no score, because all their images were refused."""


@dataclass(frozen=True)
class SubgroupMetrics:
    """A subgroup, measured at the plotted level; `metrics` is None where none of its units has a known label."""

    attribute: str
    value: str
    metrics: Metrics | None


@dataclass(frozen=True)
class CrossFitted:
    """Decisions at thresholds that were chosen on other patients of the same data."""

    purpose: str
    thresholds: tuple[float, float]
    """The lowest and the highest of the folds'."""
    metrics: Metrics


@dataclass(frozen=True)
class Baseline:
    """What scores without an image reach, and how the model stands against them (model - baseline)."""

    name: str
    metrics: Metrics
    model: Comparison
    telling: str
    """The feature that it leans on most."""


@dataclass(frozen=True)
class Audit:
    """What was found in search of leaks."""

    links: Mapping[str, int]
    """Patients, source files and crops that stand in more than one split -> how many."""
    examples: Sequence[str]
    """Some of them, in words."""
    baselines: Sequence[Baseline]


@dataclass(frozen=True)
class ErrorCase:
    """An image whose score was far from its label."""

    image_id: str
    score: float
    label: int
    description: str
    """What is known of it, for the page alone: side, view, age, density."""
    crop: np.ndarray
    """H W, uint8 or uint16."""
    overlay: np.ndarray | None = None
    """The crop with its heat map, H W 3 uint8."""


@dataclass(frozen=True)
class EvaluationReport:
    """All that `write_report` shows; the stage that evaluates fills it in."""

    title: str
    command: str
    """The exact command that gave these numbers."""
    created: str
    """When, with the time zone, and with which version."""
    levels: Sequence[Level]
    """At least one; they become the columns of the tables."""
    headline: Level
    """The one of them that the headline and the curves show."""
    label: str
    """What a positive unit has, such as: cancer."""
    method: Mapping[str, object]
    """How scores came about: split, aggregation, calibration, where the threshold was chosen, bootstrap replicates and seed."""
    model: Mapping[str, object]
    """The model package: name, architecture, hash, preprocessing, what it was trained on."""
    data: Mapping[str, object]
    """The manifest: path, hash, split, release."""
    refusals: Mapping[str, int] = field(default_factory=dict)
    """Reason -> number of images refused for it."""
    shared_adapter_images: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """What of their source was not learned apart, in words -> the ids of the images that were read by the parts that all share."""
    history: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]] = field(default_factory=dict)
    """Metric -> split (train, val) and, after a space, fold -> (epoch, value); empty where the package has no training history."""
    folds: int = 0
    """Into how many parts the patients were dealt to cross-fit the following."""
    thresholds: Sequence[CrossFitted] = ()
    recalibrated: Mapping[str, Metrics] = field(default_factory=dict)
    """Method -> the plotted level after calibration on other patients of the same data."""
    at_prevalence: tuple[float, Metrics] | None = None
    """Another prevalence, and the plotted level's metrics at it."""
    subgroups: Sequence[SubgroupMetrics] = ()
    skipped_attributes: Sequence[str] = ()
    """Why an attribute makes no subgroups, in words."""
    audit: Audit | None = None
    errors: Sequence[ErrorCase] = ()
    heat_map_legend: str = ""
    """What the colours of the errors' heat maps stand for; empty = there are none."""
    limits: Sequence[str] = LIMITS

    @cached_property
    def curve_data(self) -> CurveData:
        """The points of the figures of scores."""
        return CurveData.from_units(self.headline.sample, self.headline.metrics.threshold)

    @property
    def missing_sections(self) -> dict[str, str]:
        """What other patients of the data could not be asked for, in words, by the section that stands empty for it."""
        needed = f"that takes two patients with {self.label} and two without"
        found = {
            "thresholds": (self.thresholds, f"No threshold could be chosen by cross-fitting: {needed}."),
            "recalibrated": (self.recalibrated, f"No calibration could be cross-fitted: {needed}."),
            "baselines": (
                self.audit is None or self.audit.baselines,
                f"No scores without an image could be fitted: {needed}, and ids or metadata that vary.",
            ),
        }
        return {section: sentence for section, (there, sentence) in found.items() if not there}

    def to_dict(self) -> dict[str, Any]:
        """Every number of the report, for JSON."""
        return {
            "command": self.command,
            "created": self.created,
            "label": self.label,
            **{level.name: level.metrics.to_dict() | {"refused": level.refused} for level in self.levels},
            "method": dict(self.method),
            "model": dict(self.model),
            "data": dict(self.data),
            "refusals": dict(self.refusals),
            "fell_back": dict(self.shared_adapter_images),
            "folds": self.folds,
            "cross_fitted": [vars(each) | {"metrics": each.metrics.to_dict()} for each in self.thresholds],
            "recalibrated": {method: metrics.to_dict() for method, metrics in self.recalibrated.items()},
            "elsewhere": self.at_prevalence
            and {"prevalence": self.at_prevalence[0], "metrics": self.at_prevalence[1].to_dict()},
            "subgroups": [vars(each) | {"metrics": each.metrics and each.metrics.to_dict()} for each in self.subgroups],
            "undivided": list(self.skipped_attributes),
            "audit": self.audit and asdict(self.audit),
            "plotted": self.headline.name,
            "drawn": asdict(self.curve_data),
            # by its id alone: what else is known of a patient stays on the page, which holds her images anyway
            "errors": [{name: getattr(case, name) for name in ("image_id", "score", "label")} for case in self.errors],
            "history": self.history,
            "limits": list(self.limits),
        }


def write_report(path: Path | str, report: EvaluationReport) -> None:
    """Write `report` to `path` as HTML with its style and figures inside, or leave what was there. Raises VitmodelError."""
    page = render_page(
        "evaluation.html.j2",
        title=report.title,
        subtitle=report.created,
        report=report,
        groups=METRICS,
        figures=_pictures(report),
        decisions=_decisions(report),
        calibrations=_calibrations(report),
        mixed=_mixed(report),
        subgroups={group.attribute: _subgroups(report, group.attribute) for group in report.subgroups},
        leaks=_leaks(report),
        outdone=_outdone(report),
        forest=[_inline(figure) for figure in _forests(report)],
        errors=[_error(case, report.label) for case in report.errors],
        history={name: _inline(figures.history(name, splits)) for name, splits in report.history.items()},
        undefined=math.isnan,
        number=_number,
    )
    write_atomic(path, page)


TableRow = tuple[str | Interval, ...]
"""A table's line: its heading and its cells."""


def _decisions(report: EvaluationReport) -> list[TableRow]:
    names = ("sensitivity", "specificity", "precision", "f1", "recall_rate")
    own = report.headline.metrics
    rows: list[TableRow] = [("The package’s own", _number(own.threshold), *(own.intervals[name] for name in names))]
    for each in report.thresholds:
        least, most = map(_number, each.thresholds)
        rows.append(
            (
                each.purpose,
                least if least == most else f"{least} to {most}",
                *(each.metrics.intervals[name] for name in names),
            )
        )
    return rows


def _calibrations(report: EvaluationReport) -> list[TableRow]:
    names = ("brier", "log_loss", "ece", "calibration_slope", "calibration_intercept")
    found = {"As the package gives them": report.headline.metrics} | {
        k.capitalize(): v for k, v in report.recalibrated.items()
    }
    return [(title, *(metrics.intervals[name] for name in names)) for title, metrics in found.items()]


def _mixed(report: EvaluationReport) -> list[TableRow]:
    """What depends on the prevalence, and the two that do not."""
    if report.at_prevalence is None:
        return []
    here, there = report.headline.metrics, report.at_prevalence[1]
    names = ("auprc", "sensitivity", "specificity", "precision", "npv", "f1", "recall_rate", "pf1", "brier", "ece")
    titles = {name: title for group in METRICS.values() for name, title in group.items()}
    rows: list[TableRow] = [("Threshold", _number(here.threshold), _number(there.threshold))]
    return rows + [(titles[name], here.intervals[name], there.intervals[name]) for name in names]


def _subgroups(report: EvaluationReport, attribute: str) -> list[TableRow]:
    rows: list[TableRow] = []
    for group in report.subgroups:
        if group.attribute == attribute and group.metrics:
            values = (group.metrics.intervals[name] for name in ("auroc", "sensitivity", "specificity"))
            rows.append((group.value, f"{group.metrics.positives:,} of {group.metrics.units:,}", *values))
        elif group.attribute == attribute:
            rows.append((group.value, "no known label", "–", "–", "–"))
    return rows


def _leaks(report: EvaluationReport) -> list[TableRow]:
    rows: list[TableRow] = [("This model", report.headline.metrics.intervals["auroc"], "", "", "")]
    for each in report.audit.baselines if report.audit else ():
        p = "< 0.001" if each.model.p_value < 0.001 else _number(each.model.p_value)
        rows.append((each.name, each.metrics.intervals["auroc"], each.model.differences["auroc"], p, each.telling))
    return rows


def _outdone(report: EvaluationReport) -> list[str]:
    """Said aloud: baselines that rank surely better than the model."""
    return [
        f"{each.name} ranks these better than the model does, by {each.telling}: their images are not needed to tell their labels."
        for each in (report.audit.baselines if report.audit else ())
        if each.model.differences["auroc"].high < 0
    ]


def _forests(report: EvaluationReport) -> list[Figure]:
    """The subgroups whose AUROC has an interval: a point alone would look certain."""
    groups = [
        group for group in report.subgroups if group.metrics and not math.isnan(group.metrics.intervals["auroc"].low)
    ]
    return (
        [figures.forest([(g.attribute, g.value, g.metrics) for g in groups if g.metrics], report.headline.metrics)]
        if groups
        else []
    )


def _picture(image: np.ndarray) -> str:
    """An image's address that holds the image as PNG, small enough that a page of them can be sent; 16 bits become 8."""
    scale = min(1.0, PICTURE_HEIGHT / image.shape[0])
    size = max(1, round(image.shape[1] * scale)), round(image.shape[0] * scale)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    eight = np.rint(small * (255 / np.iinfo(image.dtype).max)).astype(np.uint8)
    file = cv2.imencode(".png", eight if eight.ndim == 2 else cv2.cvtColor(eight, cv2.COLOR_RGB2BGR))[1]
    return "data:image/png;base64," + base64.b64encode(file.tobytes()).decode()


def _error(case: ErrorCase, label: str) -> tuple[str, list[str]]:
    """Caption and pictures."""
    kind = f"{label} missed" if case.label else f"no {label}, but called"
    caption = f"{kind.capitalize()}, score {case.score:.3f}; {case.description}; image {case.image_id}"
    return caption, [_picture(image) for image in (case.crop, case.overlay) if image is not None]


def _pictures(report: EvaluationReport) -> list[tuple[str, str]]:
    """Caption and picture of each figure of scores."""
    curve_data, metrics, label = report.curve_data, report.headline.metrics, report.label
    pictures = []
    if curves := curve_data.curves:
        roc, precision_recall = (
            figures.roc(curves.roc, metrics),
            figures.precision_recall(curves.precision_recall, metrics),
        )
        reliability = figures.reliability(curves.reliability, metrics, label)
        pictures += [
            ("Receiver operating characteristic; the dot is the threshold, with 95 % intervals.", roc),
            ("Precision and recall; the dot is the threshold, with 95 % intervals.", precision_recall),
            ("Reliability in bins of equally many scores, with Wilson’s 95 % intervals.", reliability),
            (
                "Decision curve: net benefit of acting on the score, on everyone, on no one.",
                figures.decision_curve(curves.decision_curve, metrics),
            ),
        ]
    pictures += [
        ("Scores by class, each as a fraction of its class.", figures.histogram(curve_data.histogram, metrics, label)),
        ("Confusion matrix at the threshold.", figures.confusion(metrics.confusion, metrics.threshold, label)),
    ]
    return [(caption, _inline(figure)) for caption, figure in pictures]


def _inline(figure: Figure) -> str:
    """An image's address that holds the image."""
    return "data:image/svg+xml;base64," + base64.b64encode(figures.to_svg(figure).encode()).decode()


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:z.3f}".replace("-", "−")
