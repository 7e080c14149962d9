"""Evaluation of scored images: metrics by level, thresholds, prevalence, subgroups and an audit for leakage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from vitmodel.data import audit as leakage
from vitmodel.data.manifest import breast_ids, exam_ids
from vitmodel.data.subgroups import subgroups
from vitmodel.errors import UsageError
from vitmodel.metrics.calibration import CALIBRATIONS, to_prevalence
from vitmodel.metrics.compare import compare
from vitmodel.metrics.crossfit import cross_fitted_probabilities, cross_fitted_thresholds, patient_folds
from vitmodel.metrics.metrics import Metrics, compute_metrics
from vitmodel.metrics.scored_units import FloatArray, ScoredUnits, mean_logits
from vitmodel.metrics.threshold import describe_objective
from vitmodel.reports.evaluation import Audit, Baseline, CrossFitted, Level, SubgroupMetrics

LEVELS = ("image", "breast", "patient")
PLOTTED_LEVEL = "breast"
OBJECTIVES = ("f1", "pf1", "sensitivity")
"""What the cross-fitted thresholds are chosen for."""
AGGREGATE_NAMES = {
    "mean": "mean",
    "mean_logit": "mean log-odds",
    "max": "largest",
    "noisy_or": "noisy-or",
    "fusion": "fusion",
}
"""Aggregation rule -> its name in reports."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Images with a probability, and the settings of their evaluation."""

    table: pd.DataFrame
    """The N rows of the manifest whose image has a probability."""
    probability: FloatArray
    """Probability of each image, `(N,)`."""
    label: str
    """Column of the manifest with the true labels."""
    aggregate: str
    """How image probabilities are combined per breast, unless `breast_logits` is given."""
    patient_aggregate: str
    """How breast probabilities are combined per patient."""
    threshold: float
    """Smallest probability that is called positive."""
    replicates: int
    """Number of bootstrap replicates over patients."""
    seed: int
    """Random seed of the bootstrap and of the cross-fitting folds."""
    breast_logits: FloatArray | None = None
    """Logits of each image's breast by each of M packages, `(N, M)`, if breasts are calibrated as a whole. Their mean
    over a breast's images is calibrated and replaces the aggregate of the images' probabilities."""
    calibrate: Callable[[FloatArray], FloatArray] | None = None
    """Maps the logits of M packages, `(N, M)`, to probabilities, `(N,)`."""
    measured: Callable[[], object] = lambda: None
    """Called after each set of metrics, to show progress."""

    @property
    def measurements(self) -> int:
        """The number of sets of metrics in a report, if all of them can be computed."""
        per_breast = len(OBJECTIVES) + len(CALIBRATIONS) + len(leakage.BASELINE_FEATURES)
        return len(LEVELS) + per_breast + len(subgroups(self.table, self.label)[0])

    def scored_units(
        self, level: str, rows: np.ndarray | slice = slice(None), scores: FloatArray | None = None
    ) -> ScoredUnits:
        """Return the units of a level with their labels and scores.

        A unit of the level "breast" is a breast in one exam. A patient's score and label are the largest of her exams'.

        Args:
            level: "image", "breast" or "patient".
            rows: Mask `(N,)` of the images to use.
            scores: Scores `(N,)` to use in place of the probabilities.
        """
        table = self.table[rows]
        images = ScoredUnits(
            table[self.label].to_numpy(),
            (self.probability if scores is None else scores)[rows],
            table["patient_id"].to_numpy(),
        )
        if level == "image":
            return images
        ids = breast_ids(table).to_numpy()
        breasts = images.aggregate(ids, self.aggregate)
        if self.breast_logits is not None and self.calibrate is not None and scores is None:
            breasts = replace(breasts, scores=self.calibrate(mean_logits(self.breast_logits[rows], ids)))
        if level == "breast":
            return breasts
        first_image = np.unique(ids, return_index=True)[1]
        exams = breasts.aggregate(exam_ids(table).to_numpy()[first_image], self.patient_aggregate)
        return exams.aggregate(exams.patients, "max")

    def compute_metrics(
        self, units: ScoredUnits, threshold: float | FloatArray | None = None, prevalence: float | None = None
    ) -> Metrics:
        """Return the metrics of the units at a threshold, by default that of the model."""
        chosen = self.threshold if threshold is None else threshold
        metrics = compute_metrics(units, chosen, self.replicates, self.seed, prevalence)
        self.measured()
        return metrics

    def levels(self, totals: Mapping[str, int]) -> list[Level]:
        """Return the metrics per image, breast and patient.

        Args:
            totals: Level -> number of its units, including those whose images were refused.
        """
        result = []
        for name in LEVELS:
            units = self.scored_units(name)
            result.append(Level(name, units, self.compute_metrics(units), totals[name] - len(units.labels)))
        return result

    def folds(self) -> int:
        """Return the number of folds of patients for cross-fitting; 0 if there are too few patients."""
        try:
            return int(patient_folds(self.scored_units(PLOTTED_LEVEL).labelled(), seed=self.seed).max()) + 1
        except UsageError:
            return 0

    def thresholds(self, sensitivity: float) -> list[CrossFitted]:
        """Return the metrics of decisions at cross-fitted thresholds; empty if there are too few patients."""
        units = self.scored_units(PLOTTED_LEVEL).labelled()
        result = []
        for objective in OBJECTIVES:
            try:
                chosen = cross_fitted_thresholds(units, objective, sensitivity, self.seed)
            except UsageError:  # one class, or one patient of a class; the report then says so
                return []
            name = describe_objective(objective, sensitivity)
            span = (float(chosen.min()), float(chosen.max()))
            result.append(CrossFitted(name[0].upper() + name[1:], span, self.compute_metrics(units, chosen)))
        return result

    def recalibrated(self) -> dict[str, Metrics]:
        """Return the metrics after each method of calibration, cross-fitted; empty if there are too few patients."""
        units = self.scored_units(PLOTTED_LEVEL).labelled()
        try:
            fitted = {method: cross_fitted_probabilities(units, method, self.seed) for method in CALIBRATIONS}
        except UsageError:
            return {}
        return {
            method: self.compute_metrics(ScoredUnits(units.labels, scores, units.patients))
            for method, scores in fitted.items()
        }

    def at_prevalence(self, fitted: float, wanted: float) -> Metrics | None:
        """Return the metrics at another prevalence; None if a class is missing.

        Args:
            fitted: Prevalence at which the probabilities were calibrated.
            wanted: Prevalence of the metrics.
        """
        units = self.scored_units(PLOTTED_LEVEL).labelled()
        if len(np.unique(units.labels)) < 2:
            return None
        scores = to_prevalence(units.scores, fitted, wanted)
        threshold = float(to_prevalence(self.threshold, fitted, wanted))
        return self.compute_metrics(ScoredUnits(units.labels, scores, units.patients), threshold, prevalence=wanted)

    def subgroups(self) -> tuple[list[SubgroupMetrics], list[str]]:
        """Return the metrics of all subgroups, and the reasons why some attributes have none.

        A subgroup's breasts are scored by its own images alone, or by fusion.
        """
        groups, omitted = subgroups(self.table, self.label)
        result = []
        for group in groups:
            units = self.scored_units(PLOTTED_LEVEL, group.mask)
            result.append(SubgroupMetrics(group.attribute, group.value, self._if_labelled(units)))
        return result, omitted

    def _if_labelled(self, units: ScoredUnits) -> Metrics | None:
        """Return the metrics; None if no label is known."""
        return self.compute_metrics(units) if np.isfinite(units.labels).any() else None

    def audit(self, whole: pd.DataFrame) -> Audit:
        """Return the leaks between the splits of a manifest, and baselines from ids or metadata alone.

        The baselines are fitted to other patients of the manifest and evaluated on the same units as the model.

        Args:
            whole: The manifest with all its splits.
        """
        links = leakage.find_links(whole)
        names = {"patient_id": "patients", "source_sha256": "source files", "crop": "crops of the same pixels"}
        counts = {names[kind]: int((links["kind"] == kind).sum()) for kind in names}
        examples = [f"{names[row.kind]}: {row.images} images in {row.parts}" for row in links.head(5).itertuples()]
        return Audit(counts, examples, self._baselines(whole))

    def _baselines(self, whole: pd.DataFrame) -> list[Baseline]:
        """Return the baselines that can be fitted; none if the evaluated units have one class only."""
        evaluated = whole["image_id"].isin(self.table["image_id"]).to_numpy()
        model = self.scored_units(PLOTTED_LEVEL).labelled()
        if len(np.unique(model.labels)) < 2:
            return []
        baselines = []
        for name in leakage.BASELINE_FEATURES:
            scores, strongest = leakage.fit_baseline(whole, self.label, name, self.seed)
            if np.isnan(scores).any():
                continue
            other = self.scored_units(PLOTTED_LEVEL, scores=scores[evaluated]).labelled()
            try:
                compared = compare(other, model, (self.threshold, self.threshold), self.replicates, self.seed)
            except UsageError:  # too few patients for DeLong's test
                continue
            baselines.append(Baseline(name, self.compute_metrics(other), compared, strongest))
        return baselines

    def errors(self, count: int) -> list[int]:
        """Return the positions of wrongly called images, the most confident ones first.

        Args:
            count: Largest number of images. Half of them are missed positives, if there are enough of both kinds.
        """
        truth = self.table[self.label].to_numpy()
        distance = self.probability - self.threshold
        order = np.argsort(-np.abs(distance), kind="stable")
        missed = [int(row) for row in order if truth[row] == 1 and distance[row] < 0]
        false_alarms = [int(row) for row in order if truth[row] == 0 and distance[row] >= 0]
        share = max(count - len(false_alarms), min(count // 2, len(missed)))
        return missed[:share] + false_alarms[: count - min(share, len(missed))]


def join_known(row: Sequence[object]) -> str:
    """Return the known parts of a caption, separated by commas."""
    return ", ".join(str(part) for part in row if pd.notna(part) and part != "")
