"""The evaluation report: one self-contained HTML file for screen, phone and print."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from matplotlib.figure import Figure

from vitmodel.config.auxiliary import AuxiliaryTarget
from vitmodel.config.labels import PATHOLOGY_NAMES, target_name, target_title
from vitmodel.data.drift import ColumnDrift, large_drift_messages
from vitmodel.metrics.bootstrap import Interval
from vitmodel.metrics.compare import Comparison
from vitmodel.metrics.curve_data import CurveData
from vitmodel.metrics.metrics import METRICS, Metrics
from vitmodel.metrics.multiclass import MULTICLASS_METRICS, AuxiliaryMetrics
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.pixels.verdict import REFUSAL_REASONS
from vitmodel.reports import figures
from vitmodel.reports.drift import drift_panels
from vitmodel.reports.page import render_page
from vitmodel.utils import write_atomic

PICTURE_HEIGHT = 512
"""Maximum height of an error's crop in the report, in pixels."""
LABEL_LIMIT = (
    "Labels reflect what was known when the data were released: a cancer found later, or never, counts as a negative."
)
LIMITS = (
    "The metrics hold for patients, machines and readers like those in this data set, and at its prevalence. "
    "Every other site needs its own evaluation.",
    "The intervals contain the middle 95 % of values over patients drawn with replacement. They show the effect of "
    "chance in the choice of patients, not of bias in their selection, and they are too narrow where a value is at its "
    "bound or there are few positives.",
    LABEL_LIMIT,
    "Units with an unknown label and refused images are excluded from every metric and counted above. Excluding them "
    "may favour the model.",
    "There are many subgroups and no correction for multiple comparisons: 1 in 20 intervals is expected to miss the "
    "true value.",
)


def limits_of(label: str) -> tuple[str, ...]:
    """Return the limits of a report on `label`; those on a label other than pathology say what it does not show."""
    if label in PATHOLOGY_NAMES:
        return LIMITS
    other = f"The label {label} is no pathology: the metrics show how well the model agrees with it, not whether it "
    return tuple(other + "finds cancer." if limit == LABEL_LIMIT else limit for limit in LIMITS)


TableRow = tuple[str | Interval, ...]
"""A table row: its heading, then its cells."""


@dataclass(frozen=True)
class Level:
    """The scores and metrics of one level: `image`, `breast` or `patient`."""

    name: str
    sample: ScoredUnits
    metrics: Metrics
    """The result of `compute_metrics(sample, ...)`."""
    refused: int = 0
    """Number of units without a score, because all their images were refused."""


class RefusedImage(NamedTuple):
    """A refused image and its picture."""

    reason: str
    image_id: str
    message: str
    """What is wrong with this image."""
    picture: str
    """Data URL of a thumbnail; empty if nothing can be shown."""


@dataclass(frozen=True)
class SubgroupMetrics:
    """The metrics of a subgroup at the level of the headline; None if none of its units has a known label."""

    attribute: str
    value: str
    metrics: Metrics | None


@dataclass(frozen=True)
class CrossFitted:
    """Decisions at thresholds that were chosen on other patients of the same data."""

    purpose: str
    """What the thresholds were chosen for."""
    thresholds: tuple[float, float]
    """The lowest and the highest threshold of the folds."""
    metrics: Metrics


@dataclass(frozen=True)
class Baseline:
    """Scores computed without pixels, and the model's difference from them (model - baseline)."""

    name: str
    metrics: Metrics
    model: Comparison
    top_feature: str
    """The baseline's most important feature."""


@dataclass(frozen=True)
class Audit:
    """The results of the leakage audit."""

    links: Mapping[str, int]
    """Number of patients, source files and crops that occur in more than one split."""
    examples: Sequence[str]
    """Examples of them, as text."""
    baselines: Sequence[Baseline]


@dataclass(frozen=True)
class ErrorCase:
    """An image whose decision is wrong and whose score is far from the threshold."""

    image_id: str
    score: float
    label: int
    description: str
    """Side, view, age and density where known. It appears on the page only, not in the JSON file."""
    crop: np.ndarray
    """`(H, W)`, uint8 or uint16."""
    overlay: np.ndarray | None = None
    """The crop with its heat map, `(H, W, 3)` uint8."""


@dataclass(frozen=True)
class EvaluationReport:
    """The content of an evaluation report."""

    title: str
    command: str
    """The exact command that produced these numbers."""
    created: str
    """Date and time with time zone, and the version of vitmodel."""
    levels: Sequence[Level]
    """The columns of the tables, at least one."""
    headline: Level
    """The level of the headline, the figures and the later sections."""
    label: str
    """The rule of the true labels, such as cancer or birads>=4."""
    method: Mapping[str, object]
    """How the scores were made: split, aggregation, calibration, choice of the threshold, bootstrap settings."""
    model: Mapping[str, object]
    """The model package: name, architecture, hash, preprocessing, training data."""
    data: Mapping[str, object]
    """The manifest: path, hash, split, release."""
    drift: Sequence[ColumnDrift] = ()
    """What the images look like, compared with the training set."""
    typicality_sentence: str = ""
    """How typical the model finds the images; empty if it is unknown."""
    refusals: Mapping[str, int] = field(default_factory=dict)
    """Number of refused images per reason."""
    refused: Sequence[RefusedImage] = ()
    """Examples of the refused images, the rarest reason first."""
    shared_adapter_images: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Ids of the images that used the shared adapters, by a sentence on the source that was not seen in training."""
    history: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]] = field(default_factory=dict)
    """Training curves: metric -> split ("train", "val", of a fold "val fold_0") -> (epoch, value); empty if unknown."""
    folds: int = 0
    """Number of folds for cross-fitting."""
    thresholds: Sequence[CrossFitted] = ()
    recalibrated: Mapping[str, Metrics] = field(default_factory=dict)
    """Metrics of the headline's level after calibration on other patients of the same data, by calibration method."""
    at_prevalence: tuple[float, Metrics] | None = None
    """Another prevalence, and the metrics of the headline's level at it."""
    subgroups: Sequence[SubgroupMetrics] = ()
    skipped_attributes: Sequence[str] = ()
    """For each attribute without subgroups, the reason as text."""
    auxiliary: Mapping[AuxiliaryTarget, AuxiliaryMetrics | None] = field(default_factory=dict)
    """The agreement of the auxiliary outputs with the manifest; None if no value is known."""
    audit: Audit | None = None
    errors: Sequence[ErrorCase] = ()
    heat_map_legend: str = ""
    """What the colours of the errors' heat maps show; empty if there are none."""
    limits: Sequence[str] = LIMITS

    @property
    def target(self) -> str:
        """The name of the positive class."""
        return target_name(self.label)

    @cached_property
    def curve_data(self) -> CurveData:
        """The points of the figures."""
        return CurveData.from_units(self.headline.sample, self.headline.metrics.threshold)

    @property
    def missing_sections(self) -> dict[str, str]:
        """The sections that cannot be computed from these data, each with the reason as a sentence."""
        needs = f"at least two patients with {self.target} and two without"
        sections = {}
        if not self.thresholds:
            sections["thresholds"] = f"No cross-fitted thresholds: they need {needs}."
        if not self.recalibrated:
            sections["recalibrated"] = f"No cross-fitted calibration: it needs {needs}."
        if self.audit is not None and not self.audit.baselines:
            sections["baselines"] = f"No baselines without pixels: they need {needs}, and ids or metadata that vary."
        return sections

    def to_dict(self) -> dict[str, Any]:
        """Return every number of the report as plain values for JSON."""
        levels = {level.name: level.metrics.to_dict() | {"refused": level.refused} for level in self.levels}
        cross_fitted = [vars(chosen) | {"metrics": chosen.metrics.to_dict()} for chosen in self.thresholds]
        recalibrated = {method: metrics.to_dict() for method, metrics in self.recalibrated.items()}
        elsewhere = None
        if self.at_prevalence:
            prevalence, metrics = self.at_prevalence
            elsewhere = {"prevalence": prevalence, "metrics": metrics.to_dict()}
        subgroups = [vars(group) | {"metrics": group.metrics and group.metrics.to_dict()} for group in self.subgroups]
        # Errors are identified by image id only. Other facts on a patient stay on the page, which shows images anyway.
        errors = [{name: getattr(case, name) for name in ("image_id", "score", "label")} for case in self.errors]
        return {
            "command": self.command,
            "created": self.created,
            "label": self.label,
            **levels,
            "method": dict(self.method),
            "model": dict(self.model),
            "data": dict(self.data),
            "drift": [column.to_dict() for column in self.drift],
            "refusals": dict(self.refusals),
            "fell_back": dict(self.shared_adapter_images),
            "folds": self.folds,
            "cross_fitted": cross_fitted,
            "recalibrated": recalibrated,
            "elsewhere": elsewhere,
            "subgroups": subgroups,
            "undivided": list(self.skipped_attributes),
            "auxiliary": {target.name: found and found.to_dict() for target, found in self.auxiliary.items()},
            "audit": self.audit and asdict(self.audit),
            "plotted": self.headline.name,
            "drawn": asdict(self.curve_data),
            "errors": errors,
            "history": self.history,
            "limits": list(self.limits),
        }


def write_report(path: Path | str, report: EvaluationReport) -> None:
    """Write a report as one HTML file that contains its style and figures; an existing file is kept on failure.

    Raises:
        VitmodelError: The file cannot be written.
    """
    page = render_page(
        "evaluation.html.j2",
        title=report.title,
        subtitle=report.created,
        report=report,
        title_of_target=target_title(report.label),
        groups=METRICS,
        titles=_metric_titles(),
        figures=_captioned_figures(report),
        decisions=_decision_rows(report),
        calibrations=_calibration_rows(report),
        at_prevalence=_prevalence_rows(report),
        subgroups={group.attribute: _subgroup_rows(report, group.attribute) for group in report.subgroups},
        auxiliary=_auxiliary_rows(report),
        auxiliary_titles=list(MULTICLASS_METRICS.values()),
        auxiliary_figures=_auxiliary_figures(report),
        baselines=_baseline_rows(report),
        audit_warnings=_audit_warnings(report),
        forest=[_svg_url(figure) for figure in _forest_figures(report)],
        drift=[_svg_url(figures.distribution(*panel)) for panel in drift_panels({"Evaluated images": report.drift})],
        drift_warnings=large_drift_messages(list(report.drift)),
        meanings=REFUSAL_REASONS,
        errors=[_captioned_error(case, report.label) for case in report.errors],
        history={name: _svg_url(figures.history(name, splits)) for name, splits in report.history.items()},
        undefined=math.isnan,
        number=_format_number,
    )
    write_atomic(path, page)


def _metric_titles() -> dict[str, str]:
    """Return the title of every metric by name."""
    titles: dict[str, str] = {}
    for group in METRICS.values():
        titles |= group
    return titles


def _select(metrics: Metrics, names: Sequence[str]) -> list[Interval]:
    """Return the named metrics in order."""
    return [metrics.intervals[name] for name in names]


def _decision_rows(report: EvaluationReport) -> list[TableRow]:
    """Return the decisions at the package's and at the cross-fitted thresholds."""
    names = ("sensitivity", "specificity", "precision", "f1", "recall_rate")
    metrics = report.headline.metrics
    rows: list[TableRow] = [("The package’s threshold", _format_number(metrics.threshold), *_select(metrics, names))]
    for chosen in report.thresholds:
        low, high = map(_format_number, chosen.thresholds)
        thresholds = low if low == high else f"{low} to {high}"
        rows.append((chosen.purpose, thresholds, *_select(chosen.metrics, names)))
    return rows


def _calibration_rows(report: EvaluationReport) -> list[TableRow]:
    """Return the calibration metrics of the package's and of the recalibrated probabilities."""
    names = ("brier", "log_loss", "ece", "calibration_slope", "calibration_intercept")
    rows: list[TableRow] = [("The package’s calibration", *_select(report.headline.metrics, names))]
    for method, metrics in report.recalibrated.items():
        rows.append((method.capitalize(), *_select(metrics, names)))
    return rows


def _prevalence_rows(report: EvaluationReport) -> list[TableRow]:
    """Return the metrics that depend on the prevalence, with sensitivity and specificity, which do not."""
    if report.at_prevalence is None:
        return []
    observed = report.headline.metrics
    shifted = report.at_prevalence[1]
    names = ("auprc", "sensitivity", "specificity", "precision", "npv", "f1", "recall_rate", "pf1", "brier", "ece")
    titles = _metric_titles()
    rows: list[TableRow] = [("Threshold", _format_number(observed.threshold), _format_number(shifted.threshold))]
    return rows + [(titles[name], observed.intervals[name], shifted.intervals[name]) for name in names]


def _subgroup_rows(report: EvaluationReport, attribute: str) -> list[TableRow]:
    """Return the metrics of each subgroup of an attribute."""
    rows: list[TableRow] = []
    for group in report.subgroups:
        if group.attribute == attribute and group.metrics:
            values = _select(group.metrics, ("auroc", "sensitivity", "specificity"))
            rows.append((group.value, f"{group.metrics.positives:,} of {group.metrics.units:,}", *values))
        elif group.attribute == attribute:
            rows.append((group.value, "no known label", "–", "–", "–"))
    return rows


def _auxiliary_rows(report: EvaluationReport) -> list[TableRow]:
    """Return the metrics of each auxiliary output."""
    rows: list[TableRow] = []
    for target, metrics in report.auxiliary.items():
        known = f"{metrics.units:,} per {target.level}" if metrics else "no known value"
        intervals = metrics.intervals if metrics else {}
        rows.append((target.title, known, *(intervals.get(name, "") for name in MULTICLASS_METRICS)))
    return rows


def _auxiliary_figures(report: EvaluationReport) -> list[tuple[str, str]]:
    """Return the caption and the data URL of the confusion matrix of each auxiliary output with classes."""
    captioned = []
    for target, metrics in report.auxiliary.items():
        if metrics and metrics.classes:
            caption = f"{target.title} per {target.level}: number of units and fraction of the row."
            captioned.append((caption, _svg_url(figures.class_confusion(metrics, target.title))))
    return captioned


def _baseline_rows(report: EvaluationReport) -> list[TableRow]:
    """Return the AUROC of the model and of the baselines without pixels."""
    rows: list[TableRow] = [("This model", report.headline.metrics.intervals["auroc"], "", "", "")]
    for baseline in report.audit.baselines if report.audit else ():
        comparison = baseline.model
        p_value = "< 0.001" if comparison.p_value < 0.001 else _format_number(comparison.p_value)
        auroc = baseline.metrics.intervals["auroc"]
        rows.append((baseline.name, auroc, comparison.differences["auroc"], p_value, baseline.top_feature))
    return rows


def _audit_warnings(report: EvaluationReport) -> list[str]:
    """Return a warning for each baseline whose AUROC is higher than the model's, with an interval that excludes 0."""
    return [
        f"{baseline.name} rank these units better than the model does, mainly by {baseline.top_feature}: "
        "on these data the label can be predicted without the images."
        for baseline in (report.audit.baselines if report.audit else ())
        if baseline.model.differences["auroc"].high < 0
    ]


def _forest_figures(report: EvaluationReport) -> list[Figure]:
    """Return the forest plot, in a list, or an empty list if no subgroup has an interval.

    Subgroups without an interval are left out: a point alone would look certain.
    """
    groups = [
        (group.attribute, group.value, group.metrics)
        for group in report.subgroups
        if group.metrics and not math.isnan(group.metrics.intervals["auroc"].low)
    ]
    return [figures.forest(groups, report.headline.metrics)] if groups else []


def _png_url(image: np.ndarray) -> str:
    """Return an image as a data URL in PNG format, with 8 bits and at most `PICTURE_HEIGHT` pixels high.

    This keeps the page small enough to be sent by e-mail.
    """
    scale = min(1.0, PICTURE_HEIGHT / image.shape[0])
    width = max(1, round(image.shape[1] * scale))
    height = round(image.shape[0] * scale)
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    pixels = np.rint(small * (255 / np.iinfo(image.dtype).max)).astype(np.uint8)
    file = cv2.imencode(".png", pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1]
    return "data:image/png;base64," + base64.b64encode(file.tobytes()).decode()


def _captioned_error(case: ErrorCase, label: str) -> tuple[str, list[str]]:
    """Return the caption of an error and the data URLs of its pictures."""
    kind = f"{target_title(label)} missed" if case.label else f"No {target_name(label)}, but called positive"
    caption = f"{kind}, score {case.score:.3f}; {case.description}; image {case.image_id}"
    return caption, [_png_url(image) for image in (case.crop, case.overlay) if image is not None]


def _captioned_figures(report: EvaluationReport) -> list[tuple[str, str]]:
    """Return the caption and the data URL of each figure."""
    data = report.curve_data
    metrics = report.headline.metrics
    label = report.label
    captioned: list[tuple[str, Figure]] = []
    if curves := data.curves:
        captioned += [
            (
                "Receiver operating characteristic (ROC). The dot marks the threshold, with 95 % intervals.",
                figures.roc(curves.roc, metrics),
            ),
            (
                "Precision and recall. The dot marks the threshold, with 95 % intervals.",
                figures.precision_recall(curves.precision_recall, metrics),
            ),
            (
                "Reliability, in bins with equal numbers of scores and with Wilson’s 95 % intervals.",
                figures.reliability(curves.reliability, metrics, label),
            ),
            (
                "Decision curve: net benefit of acting on the score, on everyone and on no one.",
                figures.decision_curve(curves.decision_curve, metrics),
            ),
        ]
    captioned += [
        ("Scores by class, as fractions of the class.", figures.histogram(data.histogram, metrics, label)),
        ("Confusion matrix at the threshold.", figures.confusion(metrics.confusion, metrics.threshold, label)),
    ]
    return [(caption, _svg_url(figure)) for caption, figure in captioned]


def _svg_url(figure: Figure) -> str:
    """Return a figure as a data URL in SVG format."""
    return "data:image/svg+xml;base64," + base64.b64encode(figures.to_svg(figure).encode()).decode()


def _format_number(value: float) -> str:
    """Return a number with three decimals and a typographic minus sign; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:z.3f}".replace("-", "−")
