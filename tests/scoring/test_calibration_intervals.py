"""Calibration intervals of breasts: in the tables, over an ensemble, and absent where a package stores no band."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vitmodel.config import PredictorConfig
from vitmodel.metrics.calibration_band import CalibrationBand
from vitmodel.metrics.scored_units import to_logit
from vitmodel.model.package_check import CONFIG_FILE, seal
from vitmodel.releases.inputs import read_inputs
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.tables import INTERVAL


@pytest.fixture(scope="module")
def table(release: Path) -> pd.DataFrame:
    """Return three patients, and a breast whose only file is missing."""
    rows = read_inputs([str(release)], "auto").iloc[:12]
    missing = rows.iloc[[0]].assign(patient_id="gone", image_id="gone", path=str(release / "gone.dcm"))
    return pd.concat([rows, missing], ignore_index=True)


@pytest.fixture(scope="module")
def without_band(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the package as an earlier version would have written it."""
    package = Path(shutil.copytree(run / "package", tmp_path_factory.mktemp("old") / "package"))
    document = json.loads((package / CONFIG_FILE).read_text())
    del document["calibration_band"], document["integrity"]
    seal(package, document)
    return package


def breasts_of(table: pd.DataFrame, package: Path, *others: Path) -> pd.DataFrame:
    return Predictor(PredictorConfig(package=package, ensemble=others)).score(table).breasts


def test_a_breast_has_the_interval_of_its_logit(run: Path, table: pd.DataFrame) -> None:
    breasts = breasts_of(table, run / "package")
    band = CalibrationBand.from_dict(json.loads((run / "package" / CONFIG_FILE).read_text())["calibration_band"])
    expected = band.limits(to_logit(breasts["score"]), breasts["probability"])
    np.testing.assert_allclose(breasts[INTERVAL], expected, rtol=1e-5)
    scored = breasts[breasts["probability"].notna()]
    assert (scored["probability_low"] < scored["probability"]).all()
    assert (scored["probability_high"] > scored["probability"]).all()
    refused = breasts["probability"].isna()
    assert refused.any()
    assert breasts.loc[refused, INTERVAL].isna().all(axis=None)


def test_an_ensemble_has_the_mean_of_the_intervals(run: Path, table: pd.DataFrame) -> None:
    alone, twice = breasts_of(table, run / "package"), breasts_of(table, run / "package", run / "package")
    np.testing.assert_allclose(twice[INTERVAL], alone[INTERVAL], rtol=1e-6)


def test_a_package_without_a_band_gives_no_interval(run: Path, without_band: Path, table: pd.DataFrame) -> None:
    breasts = breasts_of(table, without_band)
    assert not {*INTERVAL} & {*breasts}
    assert not {*INTERVAL} & {*breasts_of(table, run / "package", without_band)}
    with_interval = breasts_of(table, run / "package").drop(columns=INTERVAL)
    pd.testing.assert_frame_equal(breasts, with_interval)
