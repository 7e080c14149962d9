"""The section of the model card that reports an evaluation."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vitmodel.config.auxiliary import AuxiliaryTarget
from vitmodel.metrics.metrics import Metrics
from vitmodel.metrics.multiclass import MULTICLASS_METRICS, AuxiliaryMetrics
from vitmodel.reports.evaluation import Audit, EvaluationReport

EVALUATION_HEADING = "## Evaluation"
CARD_METRICS = {
    "AUROC": "auroc",
    "AUPRC": "auprc",
    "pF1": "pf1",
    "Sensitivity": "sensitivity",
    "Specificity": "specificity",
    "PPV": "precision",
    "Brier score": "brier",
    "Calibration slope": "calibration_slope",
}
"""Title and name of each metric on the card."""
PREVALENCE_METRICS = ("AUPRC", "pF1", "PPV")
"""Titles of the metrics that are repeated at another prevalence."""


def add_evaluation_section(card: str, report: EvaluationReport) -> str:
    """Return a model card with the section of this evaluation, in place of an earlier one or at the end."""
    before, _, after = card.partition(f"{EVALUATION_HEADING}\n")
    next_heading = re.search(r"^## ", after, re.MULTILINE)
    rest = f"\n{after[next_heading.start() :]}" if next_heading else ""
    return f"{before.rstrip()}\n\n{evaluation_section(report)}{rest}"


def evaluation_section(report: EvaluationReport) -> str:
    """Return the section in Markdown: data, metrics, subgroups, leakage audit and limitations."""
    lines = [EVALUATION_HEADING, "", f"{report.created}, by `{report.command}`.", ""]
    lines += [f"- {name}: {value}" for name, value in {**report.method, **report.data}.items()]
    lines += ["", *_metrics_lines(report)]
    if report.at_prevalence:
        prevalence, metrics = report.at_prevalence
        shown = ", ".join(f"{title} {metrics.intervals[CARD_METRICS[title]]}" for title in PREVALENCE_METRICS)
        lines += [f"At a prevalence of {100 * prevalence:.1f} %, per {report.headline.name}: {shown}.", ""]
    if report.subgroups:
        lines += _subgroup_lines(report)
    if report.auxiliary:
        found = report.auxiliary.items()
        lines += [*AUXILIARY_TABLE, *(auxiliary_row(target, metrics) for target, metrics in found), ""]
    if report.audit:
        lines += _audit_lines(report.audit)
    lines += [f"- {limit}" for limit in report.limits]
    return "\n".join(lines) + "\n"


def _metrics_lines(report: EvaluationReport) -> list[str]:
    """Return the table of metrics with one column per level."""
    levels = report.levels
    lines = [_row("", *(f"per {level.name}" for level in levels)), _row(*["---"] * (len(levels) + 1))]
    lines.append(_row("units (positive)", *(_counts(level.metrics) for level in levels)))
    for title, name in CARD_METRICS.items():
        lines.append(_row(title, *(str(level.metrics.intervals[name]) for level in levels)))
    explanation = "Values are given with 95 % bootstrap intervals over patients. Decisions use the package's threshold."
    return [*lines, "", explanation, ""]


def _subgroup_lines(report: EvaluationReport) -> list[str]:
    """Return the table of subgroups."""
    lines = [f"Per {report.headline.name}, by subgroup:", ""]
    lines += [_row("subgroup", "units (positive)", "AUROC", "sensitivity", "specificity"), _row(*["---"] * 5)]
    for group in report.subgroups:
        if group.metrics:
            values = _values(group.metrics, ("auroc", "sensitivity", "specificity"))
            lines.append(_row(f"{group.attribute}: {group.value}", _counts(group.metrics), *values))
    return [*lines, ""]


def _audit_lines(audit: Audit) -> list[str]:
    """Return the results of the leakage audit."""
    links = ", ".join(f"{count} {kind}" for kind, count in audit.links.items())
    lines = [f"Found in more than one split: {links}.", ""]
    for baseline in audit.baselines:
        lines += [f"{baseline.name}, without pixels: AUROC {baseline.metrics.intervals['auroc']}.", ""]
    return lines


def auxiliary_row(target: AuxiliaryTarget, metrics: AuxiliaryMetrics | None) -> str:
    """Return the row of `AUXILIARY_TABLE` for an auxiliary output; `metrics` is None if no value is known."""
    intervals = metrics.intervals if metrics else {}
    known = f"{metrics.units if metrics else 0} per {target.level}"
    return _row(target.name, known, *(str(intervals.get(name, "")) for name in MULTICLASS_METRICS))


def _counts(metrics: Metrics) -> str:
    return f"{metrics.units} ({metrics.positives})"


def _values(metrics: Metrics, names: Sequence[str]) -> list[str]:
    return [str(metrics.intervals[name]) for name in names]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


AUXILIARY_TABLE = (
    _row("output", "known values", *MULTICLASS_METRICS.values()),
    _row(*["---"] * (2 + len(MULTICLASS_METRICS))),
)
"""Head of the table of auxiliary outputs."""
