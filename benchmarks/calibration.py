"""Is a calibration fitted to validation patients right on others? Calibration slopes on a hold-out, by simulation.

The logits of a training are simulated: after each epoch, validation and hold-out patients get logits whose separation
of the classes rises and whose scale grows, with noise that is partly the patient's own and partly that of the epoch.
The epoch with the largest validation AUROC is selected. Calibrations are fitted to the validation logits of that epoch
(`selected`), to those that `vitmodel train` uses (`cross-selected`), and, as the ideal, to as many new patients
(`new patients`). A calibration slope of 1 on the hold-out is right; below 1, probabilities are too extreme.

    python benchmarks/calibration.py [--runs 40]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit

from vitmodel.config import TrainConfig
from vitmodel.metrics import calibration
from vitmodel.metrics.metrics import RankedUnits
from vitmodel.metrics.scored_units import FloatArray, ScoredUnits, to_logit
from vitmodel.training.selection import scores_to_fit

HOLD_OUT = 3000
"""Number of patients of the hold-out."""
EPOCHS = 20


@dataclass(frozen=True)
class Setting:
    """A kind of training. Each patient has one image, and each epoch's noise is 30 % of the variance."""

    patients: int
    """Number of validation patients."""
    positives: float
    """Share of patients with a cancer."""
    separation: float
    """Distance of the classes at the end, in standard deviations within a class."""


SETTINGS = (Setting(60, 0.5, 1.0), Setting(100, 0.5, 1.0), Setting(300, 0.1, 1.0))


class Training:
    """A simulated training, from which labels and logits of any patients can be drawn."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting = setting
        self.rng = np.random.default_rng(seed)
        rise = 1 - np.exp(-np.arange(1, EPOCHS + 1) / 5)
        self.separation = setting.separation * rise + self.rng.normal(0, 0.1, EPOCHS)
        self.scale = 0.2 + 0.2 * np.arange(EPOCHS)

    def draw(self, patients: int) -> tuple[FloatArray, FloatArray]:
        """Return the labels of new patients, `(N,)`, and their logits after each epoch, `(E, N)`."""
        labels = (np.arange(patients) < self.setting.positives * patients).astype(float)
        own = self.rng.normal(size=patients) * np.sqrt(0.7)
        noise = self.rng.normal(size=(EPOCHS, patients)) * np.sqrt(0.3)
        return labels, self.scale[:, None] * (self.separation[:, None] * (labels - 0.5) + own + noise)


def auroc(labels: FloatArray, logits: FloatArray) -> float:
    units = ScoredUnits(labels, expit(logits), np.arange(len(labels)))
    return float(RankedUnits(units, threshold=0.5).metric_values()["auroc"])


def slopes(setting: Setting, seed: int) -> dict[str, float]:
    """Return the calibration slope on the hold-out for each way of fitting."""
    training = Training(setting, seed)
    labels, logits = training.draw(setting.patients)
    epoch = int(np.argmax([auroc(labels, values) for values in logits]))
    names = [f"p{number}" for number in range(setting.patients)]
    rows = pd.DataFrame({"patient_id": names, "laterality": "L", "exam_id": None, "cancer": labels})
    config = TrainConfig(manifest=Path("manifest.csv"), run=Path("run"), seed=seed)
    cross_selected, _ = scores_to_fit(rows, logits[epoch], dict(enumerate(logits)), config)
    new_labels, new_patients = training.draw(setting.patients)
    outcome, hold_out = training.draw(HOLD_OUT)
    fitted = {
        "selected": calibration.fit("platt", labels, logits[epoch]),
        "cross-selected": calibration.fit("platt", cross_selected.labels, to_logit(cross_selected.scores)),
        "new patients": calibration.fit("platt", new_labels, new_patients[epoch]),
    }
    result = {}
    for name, calibrator in fitted.items():
        design = np.stack([to_logit(calibrator.apply(hold_out[epoch])), np.ones(HOLD_OUT)])
        result[name] = float(calibration.logistic_regression(design, design @ outcome, np.ones(HOLD_OUT))[0])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40, help="simulated trainings of each kind")
    runs = parser.parse_args().runs
    print("calibration slope on the hold-out: mean (95 % interval of the mean), median, runs below 0.8")
    for setting in SETTINGS:
        found = pd.DataFrame([slopes(setting, seed) for seed in range(runs)])
        print(setting)
        for name, values in found.items():
            mean, half = values.mean(), 1.96 * values.std() / np.sqrt(runs)
            below = f"{100 * (values < 0.8).mean():.0f} %"
            print(f"  {name:15} {mean:.2f} ({mean - half:.2f} to {mean + half:.2f}), {values.median():.2f}, {below}")


if __name__ == "__main__":
    main()
