"""Scored images and their manifest -> all that a report says: levels, thresholds, prevalence, subgroups, audit. Knows no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from vitmodel.data import audit as leakage
from vitmodel.data.manifest import breast_ids
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
AGGREGATE_NAMES = {
    "mean": "mean",
    "mean_logit": "mean log-odds",
    "max": "largest",
    "noisy_or": "noisy-or",
    "fusion": "fusion",
}
"""How each way to aggregate is called."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Images with a probability, and how they are judged."""

    table: pd.DataFrame
    """The manifest's rows whose image has a probability."""
    probability: FloatArray
    """Of each of them (N)."""
    label: str
    """The manifest's column that holds the truth."""
    aggregate: str
    """How a breast's images make its probability, where they do."""
    patient_aggregate: str
    """How a patient's breasts make hers."""
    threshold: float
    replicates: int
    seed: int
    breast_logits: FloatArray | None = None
    """Where a breast is calibrated as a whole: what each of M packages says of each image's breast, as logits (N M). Their mean over the
    images is the breast's, in place of what the images' probabilities make."""
    calibrate: Callable[[FloatArray], FloatArray] | None = None
    """From the logits of M packages (N M) to probabilities (N)."""

    def scored_units(
        self, level: str, rows: np.ndarray | slice = slice(None), scores: FloatArray | None = None
    ) -> ScoredUnits:
        """The units of a level, of all images or of those in `rows` (N), by their probability or by other `scores` (N)."""
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
        return breasts if level == "breast" else breasts.aggregate(breasts.patients, self.patient_aggregate)

    def compute_metrics(
        self, sample: ScoredUnits, threshold: float | FloatArray | None = None, prevalence: float | None = None
    ) -> Metrics:
        return compute_metrics(
            sample, self.threshold if threshold is None else threshold, self.replicates, self.seed, prevalence
        )

    def levels(self, units: Mapping[str, int]) -> list[Level]:
        """Metrics per image, breast and patient; `units` says how many there are with the refused ones."""
        samples = {level: self.scored_units(level) for level in LEVELS}
        return [
            Level(name, sample, self.compute_metrics(sample), units[name] - len(sample.labels))
            for name, sample in samples.items()
        ]

    def folds(self) -> int:
        """Into how many parts the patients are dealt for cross-fitting; 0 where there are too few of them for that."""
        try:
            return int(patient_folds(self.scored_units(PLOTTED_LEVEL).labelled(), seed=self.seed).max()) + 1
        except UsageError:
            return 0

    def thresholds(self, sensitivity: float) -> list[CrossFitted]:
        """What decisions at cross-fitted thresholds reach; empty where there are too few patients for that."""
        sample = self.scored_units(PLOTTED_LEVEL).labelled()
        found = []
        for objective in ("f1", "pf1", "sensitivity"):
            try:
                chosen = cross_fitted_thresholds(sample, objective, sensitivity, self.seed)
            except UsageError:  # one class, or one patient of a class: the report then says that none could be chosen
                return []
            name = describe_objective(objective, sensitivity)
            found.append(
                CrossFitted(
                    name[0].upper() + name[1:],
                    (float(chosen.min()), float(chosen.max())),
                    self.compute_metrics(sample, chosen),
                )
            )
        return found

    def recalibrated(self) -> dict[str, Metrics]:
        """The probabilities after each method of calibration, cross-fitted; empty where there are too few patients for that."""
        sample = self.scored_units(PLOTTED_LEVEL).labelled()
        try:
            fitted = {method: cross_fitted_probabilities(sample, method, self.seed) for method in CALIBRATIONS}
        except UsageError:
            return {}
        return {
            method: self.compute_metrics(ScoredUnits(sample.labels, scores, sample.patients))
            for method, scores in fitted.items()
        }

    def at_prevalence(self, fitted: float, wanted: float) -> Metrics | None:
        """The metrics at another prevalence than the one that the probabilities were `fitted` at; None where a class is missing."""
        sample = self.scored_units(PLOTTED_LEVEL).labelled()
        if len(np.unique(sample.labels)) < 2:
            return None
        scores, threshold = (
            to_prevalence(sample.scores, fitted, wanted),
            float(to_prevalence(self.threshold, fitted, wanted)),
        )
        return self.compute_metrics(ScoredUnits(sample.labels, scores, sample.patients), threshold, prevalence=wanted)

    def subgroups(self) -> tuple[list[SubgroupMetrics], list[str]]:
        """Every subgroup's metrics, its breasts scored by its own images alone or by fusion, and why some attributes make none."""
        groups, silent = subgroups(self.table, self.label)
        return [
            SubgroupMetrics(group.attribute, group.value, self._if_known(self.scored_units(PLOTTED_LEVEL, group.mask)))
            for group in groups
        ], silent

    def _if_known(self, sample: ScoredUnits) -> Metrics | None:
        return self.compute_metrics(sample) if np.isfinite(sample.labels).any() else None

    def audit(self, whole: pd.DataFrame) -> Audit:
        """Leaks in the `whole` manifest, and baselines that are fitted to other patients of it, judged on the same units as the model."""
        found = leakage.find_links(whole)
        names = {"patient_id": "patients", "source_sha256": "source files", "crop": "crops of the same pixels"}
        counts = {names[kind]: int((found["kind"] == kind).sum()) for kind in names}
        examples = [f"{names[row.kind]}: {row.images} images in {row.parts}" for row in found.head(5).itertuples()]
        here = whole["image_id"].isin(self.table["image_id"]).to_numpy()
        baselines = []
        model = self.scored_units(PLOTTED_LEVEL).labelled()
        for name in leakage.BASELINE_FEATURES if len(np.unique(model.labels)) == 2 else ():
            scores, telling = leakage.fit_baseline(whole, self.label, name, self.seed)
            if np.isnan(scores).any():
                continue
            other = self.scored_units(PLOTTED_LEVEL, scores=scores[here]).labelled()
            try:
                compared = compare(other, model, (self.threshold, self.threshold), self.replicates, self.seed)
            except UsageError:  # too few patients for DeLong's test
                continue
            baselines.append(Baseline(name, self.compute_metrics(other), compared, telling))
        return Audit(counts, examples, baselines)

    def errors(self, count: int) -> list[int]:
        """Positions of the images that were called wrong, the most confident first: half of them missed positives, if there are as many."""
        truth, distance = self.table[self.label].to_numpy(), self.probability - self.threshold
        order = np.argsort(-np.abs(distance), kind="stable")
        missed = [int(row) for row in order if truth[row] == 1 and distance[row] < 0]
        false = [int(row) for row in order if truth[row] == 0 and distance[row] >= 0]
        share = max(count - len(false), min(count // 2, len(missed)))
        return missed[:share] + false[: count - min(share, len(missed))]


def join_known(row: Sequence[object]) -> str:
    """The parts of a caption that are known."""
    return ", ".join(str(part) for part in row if pd.notna(part) and part != "")
