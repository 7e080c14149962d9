"""Is a calibration fitted to validation patients right on others? Calibration slopes on a hold-out, by simulation.

The logits of a training are simulated: after each epoch, validation and hold-out patients get logits whose separation
of the classes rises and whose scale grows, with noise that is partly the patient's own and partly that of the epoch.
The epoch with the largest validation AUROC is selected. Calibrations are fitted to the validation logits of that epoch
(`selected`), to those of the epoch that the other parts of the patients choose (`cross N`), and, as the ideal, to
as many new patients (`fresh`). A calibration slope of 1 on the hold-out is right; below 1, probabilities are too extreme.

    python benchmarks/calibration.py [--runs 200]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from vitmodel.metrics import calibration
from vitmodel.metrics.crossfit import cross_select, patient_folds
from vitmodel.metrics.scored_units import FloatArray, ScoredUnits, to_logit

HOLD_OUT = 4000
"""Number of patients of the hold-out."""
EPOCHS = 30


@dataclass(frozen=True)
class Setting:
    """A kind of training."""

    patients: int
    """Number of validation patients, half of them with a cancer."""
    separation: float
    """Distance of the classes at the end, in standard deviations within a class."""
    shared: float
    """Share of the variance that is the patient's own, the same after each epoch."""


def simulate(setting: Setting, seed: int) -> tuple[FloatArray, FloatArray, Callable[[int, int], FloatArray]]:
    """Return labels and logits `(E, N)` of the validation patients, and a function that draws new logits at an epoch.

    Half of the new patients are positive.
    """
    rng = np.random.default_rng(seed)
    rise = 1 - np.exp(-np.arange(1, EPOCHS + 1) / 5)
    separation = setting.separation * rise + rng.normal(0, 0.1, EPOCHS)
    scale = 0.2 + 0.15 * np.arange(EPOCHS)

    def draw(labels: FloatArray) -> FloatArray:
        own = rng.normal(size=len(labels)) * np.sqrt(setting.shared)
        noise = rng.normal(size=(EPOCHS, len(labels))) * np.sqrt(1 - setting.shared)
        return scale[:, None] * (separation[:, None] * (labels - 0.5) + own + noise)

    labels = np.arange(setting.patients) % 2.0
    return labels, draw(labels), lambda epoch, count: draw(np.arange(count) % 2.0)[epoch]


def slopes(setting: Setting, seed: int) -> dict[str, float]:
    """Return the calibration slope on the hold-out by the way of fitting."""
    labels, logits, draw = simulate(setting, seed)

    def auroc(values: FloatArray, chosen: NDArray[np.bool_]) -> float:
        return float(roc_auc_score(labels[chosen], values[chosen]))

    everyone = np.ones(len(labels), dtype=bool)
    epoch = int(np.argmax([auroc(values, everyone) for values in logits]))
    patients = ScoredUnits(labels, np.zeros(len(labels)), np.arange(len(labels)))
    fitted_to = {"selected": logits[epoch]}
    for parts in (2, 5):
        fitted_to[f"cross {parts}"] = cross_select(logits, patient_folds(patients, parts, seed), auroc)
    fitted_to["fresh"] = draw(epoch, setting.patients)
    outcome = np.arange(HOLD_OUT) % 2.0
    new_logits = draw(epoch, HOLD_OUT)
    result = {}
    for name, values in fitted_to.items():
        predicted = to_logit(calibration.fit("platt", labels, values).apply(new_logits))
        design = np.stack([predicted, np.ones(HOLD_OUT)])
        result[name] = float(calibration.logistic_regression(design, design @ outcome, np.ones(HOLD_OUT))[0])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="simulated trainings of each kind")
    runs = parser.parse_args().runs
    print("slope on the hold-out: mean (95 % interval of the mean); share of runs below 0.8")
    for setting in (Setting(60, 1.0, 0.7), Setting(100, 1.0, 0.7), Setting(300, 1.0, 0.7), Setting(100, 0.5, 0.7)):
        found = [slopes(setting, seed) for seed in range(runs)]
        print(f"{setting}")
        for name in found[0]:
            values = np.array([slope[name] for slope in found])
            half = 1.96 * values.std(ddof=1) / np.sqrt(runs)
            mean = values.mean()
            print(f"  {name:9} {mean:.2f} ({mean - half:.2f} to {mean + half:.2f}); {100 * (values < 0.8).mean():.0f} %")


if __name__ == "__main__":
    main()
