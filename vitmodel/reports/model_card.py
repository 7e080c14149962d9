"""The model card's chapter on how good the model is, written from an evaluation. Knows no package."""

from __future__ import annotations

import re

from vitmodel.reports.evaluation import EvaluationReport

EVALUATION_HEADING = "## Evaluation"
CARD_METRICS = {"AUROC": "auroc", "AUPRC": "auprc", "pF1": "pf1", "Sensitivity": "sensitivity", "Specificity": "specificity", "PPV": "precision",
         "Brier score": "brier", "Calibration slope": "calibration_slope"}  # fmt: skip


def add_evaluation_section(card: str, report: EvaluationReport) -> str:
    """`card` with the chapter of this evaluation in place of an earlier one, else at its end."""
    before, _, after = card.partition(f"{EVALUATION_HEADING}\n")
    rest = re.search(r"^## ", after, re.MULTILINE)
    return f"{before.rstrip()}\n\n{evaluation_section(report)}" + (f"\n{after[rest.start() :]}" if rest else "")


def evaluation_section(report: EvaluationReport) -> str:
    """The chapter in Markdown: what was measured on whom, where it differs by subgroup, what was found in search of leaks, its limits."""
    names = [level.name for level in report.levels]
    lines = [EVALUATION_HEADING, "", f"{report.created}, by `{report.command}`.", ""]
    lines += [*(f"- {name}: {value}" for name, value in {**report.method, **report.data}.items()), ""]
    lines += _row("", *(f"per {name}" for name in names)), _row(*["---"] * (len(names) + 1))
    lines += [
        _row("units (positive)", *(f"{level.metrics.units} ({level.metrics.positives})" for level in report.levels))
    ]
    lines += [
        _row(title, *(str(level.metrics.intervals[name]) for level in report.levels))
        for title, name in CARD_METRICS.items()
    ]
    lines += [
        "",
        "Values with 95 % intervals over patients drawn with replacement; decisions at the package's threshold.",
        "",
    ]
    if report.at_prevalence:
        prevalence, metrics = report.at_prevalence
        shown = ", ".join(
            f"{title} {metrics.intervals[name]}"
            for title, name in CARD_METRICS.items()
            if name in ("precision", "pf1", "auprc")
        )
        lines += [f"At a prevalence of {100 * prevalence:.1f} %, per {report.headline.name}: {shown}.", ""]
    if report.subgroups:
        lines += [
            f"Per {report.headline.name}, by subgroup:",
            "",
            _row("subgroup", "units (positive)", "AUROC", "sensitivity", "specificity"),
        ]
        lines += [_row(*["---"] * 5)]
        for group in report.subgroups:
            if found := group.metrics:
                values = [str(found.intervals[name]) for name in ("auroc", "sensitivity", "specificity")]
                lines += [_row(f"{group.attribute}: {group.value}", f"{found.units} ({found.positives})", *values)]
        lines += [""]
    if report.audit:
        linked = ", ".join(f"{count} {kind}" for kind, count in report.audit.links.items())
        lines += [f"In more than one split: {linked}.", ""]
        lines += [f"{b.name} reach an AUROC of {b.metrics.intervals['auroc']}.\n" for b in report.audit.baselines]
    lines += [f"- {limit}" for limit in report.limits]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
