"""The breasts of an evaluation with their labels: metrics at any threshold, the ROC curve and the errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from vitmodel.config.labels import target_name
from vitmodel.data.labels import add_label
from vitmodel.errors import UsageError
from vitmodel.metrics.bootstrap import Interval
from vitmodel.metrics.curve import Curve
from vitmodel.metrics.metrics import Confusion, RankedUnits, compute_decisions
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.utils import import_extra
from vitmodel.viewer.exams import Exam
from vitmodel.viewer.figures import Figures
from vitmodel.viewer.room import ReadingRoom
from vitmodel.viewer.scores_folder import read_evaluated_manifest, read_facts

if TYPE_CHECKING:
    from fastapi import APIRouter

SHOWN = {
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "recall_rate": "Recall rate",
    "precision": "PPV",
    "npv": "NPV",
}
"""Metric -> its title on the page."""
REPLICATES = 2000
"""Number of bootstrap replicates over patients, as in the report by default."""
MAX_ERRORS = 100
"""Number of errors that the page lists."""


class Error(NamedTuple):
    """A breast on the wrong side of the threshold."""

    exam: Exam
    side: str
    probability: float
    is_missed: bool
    """True for a positive below the threshold, False for a negative at or above it."""


@dataclass(frozen=True, eq=False)
class EvaluatedScores:
    """Breasts that have both a probability and a known label."""

    units: ScoredUnits
    breasts: Sequence[tuple[Exam, str]]
    """Exam and side of each unit."""
    threshold: float
    """Threshold of the model."""
    label: str
    """Rule of the label."""

    @property
    def target(self) -> str:
        """What a positive label means, in words."""
        return target_name(self.label)

    @property
    def truth(self) -> dict[str, dict[str, float]]:
        """Key of the exam -> side -> label."""
        result: dict[str, dict[str, float]] = {}
        for (exam, side), label in zip(self.breasts, self.units.labels, strict=True):
            result.setdefault(exam.key, {})[side] = float(label)
        return result

    def at(self, threshold: float) -> tuple[Confusion, dict[str, Interval]]:
        """Return the confusion matrix and the metrics at a threshold, with intervals over patients."""
        return compute_decisions(self.units, threshold, REPLICATES)

    def curve(self) -> Curve | None:
        """Return the ROC curve; None if a class is missing."""
        if len(np.unique(self.units.labels)) < 2:
            return None
        return RankedUnits(self.units, threshold=1.0).curve()

    @cached_property
    def figures(self) -> Figures:
        """The figures that are the same at every threshold."""
        return Figures.of(self.units, self.breasts, self.curve())

    def errors(self, threshold: float) -> list[Error]:
        """Return the errors at a threshold, the largest ones first."""
        called = self.units.scores >= threshold
        wrong = np.flatnonzero(called != (self.units.labels == 1))
        order = wrong[np.argsort(-np.abs(self.units.scores[wrong] - threshold), kind="stable")]
        result = []
        for row in order[:MAX_ERRORS]:
            exam, side = self.breasts[row]
            result.append(Error(exam, side, float(self.units.scores[row]), bool(self.units.labels[row] == 1)))
        return result


def read_evaluation(folder: Path, exams: Sequence[Exam]) -> EvaluatedScores:
    """Return the breasts of an output folder of `vitmodel evaluate` with their labels.

    A breast's label is the largest of its images'.

    Args:
        folder: The folder.
        exams: Its exams.

    Raises:
        UsageError: The folder is not of `evaluate`, or the manifest with the labels is no longer where it was.
    """
    facts = read_facts(folder)
    manifest = add_label(read_evaluated_manifest(folder), facts["label"], facts["manifest"])
    labels: Mapping[str, float] = dict(zip(manifest["image_id"], manifest[facts["label"]], strict=True))
    rows = []
    for exam in exams:
        for breast in exam.breasts:
            images = [image for image in exam.images if image.side == breast.side and image.probability is not None]
            label = pd.Series([labels.get(image.image_id, np.nan) for image in images], dtype=float).max()
            if breast.probability is not None and pd.notna(label):
                rows.append((exam, breast.side, label, breast.probability))
    if not rows:
        raise UsageError(f"{folder}: no scored breast has a known label in {facts['manifest']}")
    measured, sides, known, scores = zip(*rows, strict=True)
    units = ScoredUnits(np.array(known), np.array(scores), np.array([exam.patient_id for exam in measured]))
    return EvaluatedScores(units, list(zip(measured, sides, strict=True)), facts["threshold"], facts["label"])


def make_evaluation_router(room: ReadingRoom, scores: EvaluatedScores) -> APIRouter:
    """Return the route of the evaluation page. It shows labels and scores, so a blinded reading does not have it."""
    import_extra("fastapi", "serve", "view")
    from fastapi import APIRouter, HTTPException
    from fastapi.responses import HTMLResponse

    from vitmodel.viewer.pages import make_environment

    router = APIRouter()
    template = make_environment().get_template("evaluation.html.j2")
    curve = scores.curve()
    points = (
        []
        if curve is None
        else list(zip(*(map(float, part) for part in (curve.thresholds, curve.fpr, curve.tpr)), strict=True))
    )

    @router.get("/evaluation", response_class=HTMLResponse)
    def show_evaluation(threshold: float = scores.threshold) -> str:
        if room.mode.blind:
            raise HTTPException(403, "a blinded reading has no evaluation page")
        if not 0 <= threshold <= 1:
            raise HTTPException(422, "threshold: must lie between 0 and 1")
        confusion, metrics = scores.at(threshold)
        return template.render(
            base="",
            room=room,
            scores=scores,
            threshold=threshold,
            confusion=confusion,
            metrics=[(title, metrics[name]) for name, title in SHOWN.items()],
            errors=scores.errors(threshold),
            limit=MAX_ERRORS,
            points=points[1:],  # the first threshold is infinite
            figures=scores.figures,
            counts=(int(scores.units.labels.sum()), int((scores.units.labels == 0).sum())),
        )

    return router
