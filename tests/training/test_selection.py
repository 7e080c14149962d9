"""Calibration and threshold are fitted to validation scores that did not choose their epoch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from vitmodel.cli import main
from vitmodel.config import TrainConfig
from vitmodel.metrics import calibration
from vitmodel.metrics.crossfit import ScoreOrigin, describe_origin
from vitmodel.metrics.scored_units import to_logit
from vitmodel.training.selection import match_scale, scores_to_fit

CONFIG = TrainConfig(manifest=Path("manifest.csv"), run=Path("run"))


def validation_rows(labels: np.ndarray) -> pd.DataFrame:
    """Return one image per patient."""
    names = [f"p{number}" for number in range(len(labels))]
    return pd.DataFrame({"patient_id": names, "laterality": "L", "exam_id": None, "cancer": labels})


def simulated_epochs(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return logits of 20 epochs that separate the classes equally well, `(20, N)`, so that chance chooses one.

    The right slope is 1: the classes are normal with variance 1, at a distance of 1.
    """
    return np.random.default_rng(seed).normal(labels - 0.5, 1, size=(20, len(labels)))


def test_the_slope_of_a_chosen_epoch_is_too_large_and_that_of_cross_selected_scores_is_not() -> None:
    """A fitted slope of 1 is right here, because all epochs are equally good on new patients."""
    labels = np.arange(60) % 2.0
    slopes = []
    for seed in range(20):
        logits = simulated_epochs(labels, seed)
        aurocs = [(a[labels == 1, None] > a[labels == 0]).mean() for a in logits]
        selected = logits[int(np.argmax(aurocs))]
        units, origin = scores_to_fit(validation_rows(labels), selected, dict(enumerate(logits)), CONFIG)
        assert (origin.kind, len(units.labels)) == ("cross_selected", 10 * len(labels))
        cross_selected = calibration.Platt.fit(units.labels, to_logit(units.scores))
        slopes.append((calibration.Platt.fit(labels, selected).slope, cross_selected.slope))
    (before, after), errors = np.mean(slopes, axis=0), np.std(slopes, axis=0) / np.sqrt(len(slopes))
    assert before > 1.4, "chance made the chosen epoch look better than it is"
    assert abs(after - 1) < 2 * errors[1]


def test_one_epoch_is_fitted_to_as_it_is() -> None:
    labels = np.arange(8) % 2.0
    logits = np.linspace(-1, 1, 8)
    units, origin = scores_to_fit(validation_rows(labels), logits, {0: logits}, CONFIG)
    assert origin == ScoreOrigin("only_epoch")
    np.testing.assert_allclose(np.sort(to_logit(units.scores)), logits)


@pytest.mark.parametrize(
    ("labels", "epochs", "reason"),
    [
        ([1, 0, 0, 0, 0], (0, 1), "1 patients with a positive"),
        ([1, 1, 0, 0, 0], (1, 2), "an older version"),
        ([1, 1, 0, 0, 0], (), "an older version"),
    ],
)
def test_without_halves_or_epochs_the_chosen_epoch_is_used_and_the_reason_given(
    labels: list[float], epochs: tuple[int, ...], reason: str
) -> None:
    logits = np.linspace(-1, 1, 5)
    rows = validation_rows(np.array(labels, float))
    units, origin = scores_to_fit(rows, logits, dict.fromkeys(epochs, logits), CONFIG)
    assert origin.kind == "selected_epoch"
    assert reason in origin.note
    assert reason in describe_origin(origin.to_dict())
    np.testing.assert_allclose(np.sort(to_logit(units.scores)), logits)


def test_unreadable_images_stay_without_a_score() -> None:
    labels = np.arange(40) % 2.0
    logits = simulated_epochs(labels, 1)
    logits[:, 3] = np.nan
    units, _ = scores_to_fit(validation_rows(labels), logits[0], dict(enumerate(logits)), CONFIG)
    assert len(units.labels) == 10 * 39
    assert "p3" not in units.patients


def test_epochs_are_brought_to_one_scale() -> None:
    target = np.array([0.0, 2.0, np.nan])
    logits = np.array([[100.0, 300.0, np.nan], [5.0, 5.0, np.nan]])
    np.testing.assert_allclose(match_scale(logits, target), [[0, 2, np.nan], [1, 1, np.nan]])


def test_a_run_records_how_it_was_fitted(run: Path) -> None:
    config = json.loads((run / "package" / "config.json").read_text())
    assert config["fitted_to"] == {"kind": "cross_selected", "divisions": 10, "note": ""}
    assert "10 random divisions" in " ".join((run / "package" / "MODEL_CARD.md").read_text().split())
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    validation = pd.read_csv(run / "validation.csv")
    assert list(checkpoint["validation_logits"]) == [0, 1, 2]
    assert all(logits.shape == (1, len(validation)) for logits in checkpoint["validation_logits"].values())


def test_flipped_images_count_in_every_epoch(crops: Path, tmp_path: Path, flags: list[str]) -> None:
    """The logits that are kept of the last epoch are those of the finished package, which averages flips."""
    folder = tmp_path / "run"
    assert main(["train", str(crops / "manifest.csv"), str(folder), *flags, "--epochs", "1", "--flip-average"]) == 0
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    logits = checkpoint["validation_logits"][0]
    scores = pd.read_csv(folder / "validation.csv")["score"]
    assert len(logits) == 2
    assert not torch.equal(logits[0], logits[1])
    np.testing.assert_allclose(to_logit(scores), logits.mean(dim=0), atol=1e-5)
