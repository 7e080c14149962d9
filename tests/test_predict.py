"""Prediction and evaluation: one road for every caller, a failed image is never scored, tables in the order of their source."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vitmodel.cli import main
from vitmodel.config import PredictorConfig
from vitmodel.data.fingerprint import count_seen
from vitmodel.data.manifest import breast_ids, read_manifest, usable, write_manifest
from vitmodel.data.releases import read_release
from vitmodel.predictor import Predictor


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor(PredictorConfig(package=run / "package", jobs=1))


def test_batched_is_one_by_one(run: Path, predictor: Predictor, crops: Path) -> None:
    table = read_manifest(crops / "manifest.csv").head(12)
    alone = Predictor(replace(predictor.config, tokens=9))
    np.testing.assert_allclose(predictor.score_images(table)["score"], alone.score_images(table)["score"], atol=1e-6)


def test_a_crop_of_etl_and_its_source_get_the_same_score(predictor: Predictor, release: Path, crops: Path) -> None:
    """The package cuts as training did, whatever way an image comes."""
    cropped = read_manifest(crops / "manifest.csv")
    sources = read_release(release)
    pd.testing.assert_frame_equal(predictor.score_images(cropped), predictor.score_images(sources))
    other = cropped.assign(preprocessing=cropped["preprocessing"].str.replace("64x32", "128x64"), path="unread")
    pd.testing.assert_frame_equal(predictor.score_images(cropped), predictor.score_images(other))


def test_a_refused_image_is_never_scored(predictor: Predictor, crops: Path) -> None:
    images = predictor.score_images(read_manifest(crops / "manifest.csv"))
    refused = images["status"] == "refused"
    assert refused.any()
    assert images.loc[refused, ["score", "probability", "decision"]].isna().all(axis=None)
    assert images.loc[~refused, ["score", "probability", "decision"]].notna().all(axis=None)
    assert images.loc[refused, ["reason", "remark"]].notna().all(axis=None)


def test_a_breast_is_the_mean_of_its_usable_images(predictor: Predictor, crops: Path) -> None:
    images = predictor.score_images(read_manifest(crops / "manifest.csv"))
    breasts = predictor.score_breasts(images)
    assert breasts["prediction_id"].tolist() == list(dict.fromkeys(breast_ids(images)))
    expected = images.groupby(breast_ids(images), sort=False)["probability"].mean()  # skips NaN
    np.testing.assert_allclose(breasts["probability"], expected)
    assert (breasts["n_images"].to_numpy() == images.groupby(breast_ids(images), sort=False).size().to_numpy()).all()


def test_a_breast_without_a_usable_image_is_refused(predictor: Predictor, crops: Path) -> None:
    table = read_manifest(crops / "manifest.csv")
    lost = breast_ids(table) == breast_ids(table).iloc[0]
    breasts = predictor.score_breasts(predictor.score_images(table.assign(status=table["status"].mask(lost, "refused"))))
    assert breasts["status"].iloc[0] == "refused"
    assert np.isnan(breasts["probability"].iloc[0])
    assert breasts["probability"].iloc[1:].notna().all()


def test_submission_has_the_breasts_of_the_test_table_in_order(run: Path, release: Path, tmp_path: Path) -> None:
    assert main(["predict", str(run / "package"), str(release / "test.csv"), str(tmp_path)]) == 0
    submission, wanted = pd.read_csv(tmp_path / "submission.csv"), pd.read_csv(release / "sample_submission.csv")
    assert submission["prediction_id"].tolist() == wanted["prediction_id"].tolist()
    assert submission["cancer"].between(0, 1).all()
    assert len(pd.read_csv(tmp_path / "scores.csv")) == len(pd.read_csv(release / "test.csv"))


def test_refused_inputs_show_in_the_exit_status(run: Path, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(run / "package"), str(release), str(tmp_path)]) == 1
    assert "refused: image" in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path / "scores.csv")) == len(pd.read_csv(release / "train.csv"))


def test_evaluation_measures_the_test_patients_at_three_levels(run: Path, tmp_path: Path) -> None:
    arguments = [str(run / "package"), str(run / "manifest.csv"), str(tmp_path), "--replicates", "100"]
    assert main(["evaluate", *arguments]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    table = read_manifest(run / "manifest.csv").query("split == 'test'")
    assert (found["split"], found["seen_images"]) == ("test", 0)
    assert found["image"]["units"] == len(table)
    assert found["breast"]["units"] == breast_ids(table).nunique()
    assert found["patient"]["units"] == table["patient_id"].nunique()
    report = (tmp_path / "report.html").read_text()
    assert "not a medical device" in report
    assert f"{found['breast']['intervals']['auroc']['value']:.3f}" in report


def test_measuring_on_seen_images_is_said_aloud(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(run / "package"), str(run / "manifest.csv"), str(tmp_path), "--split", "train", "--replicates", "100"]
    assert main(["evaluate", *arguments]) == 0
    images = len(read_manifest(run / "manifest.csv").query("split == 'train'"))
    assert f"{images} of {images} images were seen" in capsys.readouterr().out


def test_seen_images_are_told_by_their_bytes(run: Path, predictor: Predictor) -> None:
    table = read_manifest(run / "manifest.csv")
    assert count_seen(table, predictor.package["data"]) == (table["split"] != "test").sum()


@pytest.mark.parametrize(
    ("change", "status", "named"),
    [
        (lambda table: table.assign(cancer=np.nan), 2, "cancer"),
        (lambda table: table.assign(split="train"), 2, "test"),
        (lambda table: table.assign(status="refused"), 2, "refused"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    change, status: int, named: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_manifest(change(read_manifest(run / "manifest.csv")), tmp_path / "manifest.csv")
    arguments = [str(run / "package"), str(tmp_path / "manifest.csv"), str(tmp_path / "out"), "--split", "test"]
    assert main(["evaluate", *arguments]) == status
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda package: shutil.rmtree(package), "package"),
        (lambda package: (package / "model.safetensors").write_bytes(b"torn"), "model.safetensors"),
        (lambda package: (package / "config.json").write_text((package / "config.json").read_text().replace(": 1,", ": 99,", 1)), "99"),
    ],
)
def test_a_spoiled_package_is_named(spoil, named: str, run: Path, crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "package"
    shutil.copytree(run / "package", package)
    spoil(package)
    assert main(["predict", str(package), str(crops / "manifest.csv"), str(tmp_path / "out")]) in (1, 2)
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_info_tells_what_a_package_and_a_manifest_hold(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(run / "package")]) == 0
    assert "not a medical device" in capsys.readouterr().out
    assert main(["info", str(run / "manifest.csv")]) == 0
    assert f"{len(usable(read_manifest(run / 'manifest.csv')))} images" in capsys.readouterr().out
    assert main(["info", str(run)]) == 2


def test_real_files_of_the_challenge_are_all_scored(run: Path, shared_data: Path, tmp_path: Path) -> None:
    assert main(["predict", str(run / "package"), str(shared_data / "rsna_dicom"), str(tmp_path)]) == 0
    assert pd.read_csv(tmp_path / "scores.csv")["status"].tolist() == ["ok"] * 8
