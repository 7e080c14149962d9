"""The band of a calibration: its width against theory, its units of resampling, and what it is stored as."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.special import expit, logit

from vitmodel.metrics import calibration
from vitmodel.metrics.calibration_band import CalibrationBand
from vitmodel.metrics.scored_units import ScoredUnits, to_logit
from vitmodel.utils import to_json


def draw_units(patients: int, per_patient: int = 1) -> ScoredUnits:
    """Return units whose logits are too extreme by a factor of 2; those of one patient are alike."""
    rng = np.random.default_rng(1)
    logits = np.repeat(rng.normal(-1, 3, patients), per_patient)
    labels = np.repeat((rng.random(patients) < expit(logits[::per_patient] / 2)).astype(float), per_patient)
    return ScoredUnits(labels, expit(logits), np.repeat(np.arange(patients), per_patient))


def test_the_band_of_platt_scaling_is_as_wide_as_the_information_of_its_fit() -> None:
    """Independent reference: standard errors of logistic regression from the inverse of its Fisher information."""
    units = draw_units(1500)
    band = CalibrationBand.fit("platt", units, replicates=400)
    assert band is not None
    fitted = calibration.fit("platt", units.labels, to_logit(units.scores))
    design = np.stack([to_logit(units.scores), np.ones(1500)])
    variance = fitted.apply(design[0]) * (1 - fitted.apply(design[0]))
    covariance = np.linalg.inv((design * variance) @ design.T)
    at = np.array([-4.0, -1.0, 0.0, 2.0])
    points = np.stack([at, np.ones(4)])
    errors = np.sqrt(np.einsum("in,ij,jn->n", points, covariance, points))
    probabilities = fitted.apply(at)
    low, high = band.limits(at, probabilities).T
    np.testing.assert_allclose(logit(high) - logit(low), 2 * 1.96 * errors, rtol=0.2)
    assert (low < probabilities).all()
    assert (probabilities < high).all()
    assert (band.patients, band.positives) == (1500, units.labels.sum())


def test_more_breasts_of_the_same_patients_do_not_narrow_the_band() -> None:
    at = np.array([0.5])
    bands = [CalibrationBand.fit("platt", draw_units(200, count), replicates=200) for count in (1, 4)]
    one, four = (np.ptp(band.limits(at, expit(at / 2))) for band in bands if band)
    assert one == pytest.approx(four, rel=0.05)


@pytest.mark.parametrize("method", list(calibration.CALIBRATIONS))
def test_an_interval_contains_the_probability_at_every_logit(method: str) -> None:
    units = draw_units(60)
    band = CalibrationBand.fit(method, units, replicates=100)
    assert band is not None
    at = np.linspace(-40, 40, 81)
    probabilities = calibration.fit(method, units.labels, to_logit(units.scores)).apply(at)
    low, high = band.limits(at, probabilities).T
    assert ((low >= 0) & (low <= probabilities) & (probabilities <= high) & (high <= 1)).all()
    assert np.isnan(band.limits([np.nan], [np.nan])).all()


def test_a_band_is_the_same_after_json() -> None:
    band = CalibrationBand.fit("platt", draw_units(40), replicates=50)
    assert band is not None
    assert CalibrationBand.from_dict(json.loads(to_json(band.to_dict()))) == band


def test_a_single_positive_patient_gives_no_band() -> None:
    units = ScoredUnits(np.eye(1, 20)[0], np.linspace(0.1, 0.9, 20), np.arange(20))
    assert CalibrationBand.fit("platt", units, replicates=50) is None
