"""Images that are unlike those of the training: refused, or scored with a warning, by every way to score."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import vitmodel
from vitmodel.cli import main
from vitmodel.config import PredictorConfig
from vitmodel.data.manifest import read_manifest
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.model.package import TYPICALITY_FILE, load_typicalities
from vitmodel.model.package_check import record_file, seal
from vitmodel.scoring.predictor import Predictor


def shifted(package: Path, folder: Path) -> Path:
    """Return a copy of a package that finds every image less typical."""
    copy = shutil.copytree(package, folder / "package")
    tensors = load_file(copy / TYPICALITY_FILE)
    tensors["0.centre"] -= 0.1
    save_file(tensors, copy / TYPICALITY_FILE)
    record_file(copy, TYPICALITY_FILE)
    return copy


@pytest.fixture
def table(crops: Path) -> pd.DataFrame:
    """Return the usable rows of the crops."""
    rows = read_manifest(crops / "manifest.csv")
    return rows[rows["status"] != "refused"].reset_index(drop=True)


def test_a_training_stores_the_typicality_of_its_model(run: Path, table: pd.DataFrame) -> None:
    assert len(load_typicalities(run / "package")) == 1
    images = Predictor(PredictorConfig(package=run / "package", jobs=1)).score(table).images
    assert images["typicality"].between(0, 1, inclusive="right").all()
    assert images["typicality"].nunique() > 20
    assert not (images["reason"] == "atypical").any()


def test_typicality_does_not_depend_on_other_images_or_on_flip_averaging(run: Path, table: pd.DataFrame) -> None:
    predictor = Predictor(PredictorConfig(package=run / "package", jobs=1))
    together = predictor.score(table).images["typicality"]
    flipped = Predictor(PredictorConfig(package=run / "package", jobs=1, flip=True, tokens=60)).score(table[:9]).images
    np.testing.assert_allclose(flipped["typicality"], together[:9], rtol=1e-3)


def test_atypical_images_are_refused_with_their_typicality(run: Path, table: pd.DataFrame) -> None:
    limit = 0.5
    plain = Predictor(PredictorConfig(package=run / "package", jobs=1, atypical=0)).score(table).images
    images = Predictor(PredictorConfig(package=run / "package", jobs=1, atypical=limit)).score(table).images
    atypical = plain["typicality"] < limit
    assert 0 < atypical.sum() < len(table)
    assert (images["reason"].fillna("").str.contains("atypical") == atypical).all()
    assert images.loc[atypical, ["score", "probability", "breast_score", "decision"]].isna().all(axis=None)
    assert (images.loc[atypical, "status"] == "refused").all()
    assert images.loc[atypical, "remark"].str.contains("below --atypical 0.5").all()
    np.testing.assert_allclose(images["typicality"], plain["typicality"])
    np.testing.assert_allclose(images.loc[~atypical, "score"], plain.loc[~atypical, "score"], rtol=1e-5)


def test_keep_atypical_scores_them_with_a_warning(run: Path, table: pd.DataFrame) -> None:
    config = PredictorConfig(package=run / "package", jobs=1, atypical=0.5, keep_atypical=True)
    images = Predictor(config).score(table).images
    warned = images["reason"].fillna("").str.split(";").map(lambda codes: "kept_atypical" in codes)
    assert (warned == (images["typicality"] < 0.5)).all()
    assert images.loc[warned, "probability"].notna().all()
    assert (images.loc[warned, "status"] == "warned").all()


def test_an_ensemble_has_the_geometric_mean(run: Path, table: pd.DataFrame, tmp_path: Path) -> None:
    other = shifted(run / "package", tmp_path)
    alone = [
        Predictor(PredictorConfig(package=folder, jobs=1, atypical=0)).score(table).images["typicality"]
        for folder in (run / "package", other)
    ]
    config = PredictorConfig(package=run / "package", ensemble=(other,), jobs=1, atypical=0)
    found = Predictor(config).score(table).images["typicality"]
    np.testing.assert_allclose(found, np.sqrt(alone[0] * alone[1]), rtol=1e-6)


def test_a_package_without_typicality_scores_as_before_and_says_so(
    run: Path, crops: Path, table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = shutil.copytree(run / "package", tmp_path / "package")
    (old / TYPICALITY_FILE).unlink()
    document = json.loads((old / "config.json").read_text())
    del document["reference"]
    seal(old, document)
    images = Predictor(PredictorConfig(package=old, jobs=1)).score(table).images
    expected = Predictor(PredictorConfig(package=run / "package", jobs=1)).score(table).images
    np.testing.assert_allclose(images["score"], expected["score"])
    assert images["typicality"].isna().all()
    main(["predict", str(old), str(crops / "manifest.csv"), str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "typicality is unavailable" in said
    assert "drift is not measured" in said
    assert main(["drift", str(old), str(tmp_path / "out" / "scores.csv"), "--out", str(tmp_path / "drift")]) == 2


def test_a_damaged_file_names_itself(run: Path, tmp_path: Path) -> None:
    package = shutil.copytree(run / "package", tmp_path / "package")
    (package / TYPICALITY_FILE).write_bytes(b"\x08")
    with pytest.raises(VitmodelError, match=TYPICALITY_FILE):
        load_typicalities(package)
    save_file({"0.mean": torch.zeros(2, 3)}, package / TYPICALITY_FILE)
    with pytest.raises(VitmodelError, match=TYPICALITY_FILE):
        load_typicalities(package)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"atypical": 1.0}, "atypical: must be at least 0 and below 1"),
        ({"atypical": 0.01, "runtime": "onnx"}, "atypical: has no effect here: it needs --runtime torch"),
        ({"atypical": 0.0, "keep_atypical": True}, "keep_atypical: has no effect here"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        PredictorConfig(package=Path("package"), **options)  # type: ignore[arg-type]


def test_noise_that_passes_for_a_breast_is_less_typical_than_mammograms(run: Path, table: pd.DataFrame) -> None:
    """Crops of noise go straight to the network, past the checks of the shape."""
    predictor = Predictor(PredictorConfig(package=run / "package", jobs=1, atypical=0))
    mammograms = predictor.score(table).images["typicality"]
    crop = cv2.imread(table["path"][0], cv2.IMREAD_UNCHANGED)
    noise = np.random.default_rng(0).integers(1, 256, crop.shape).astype(np.uint8)
    row = predictor.attach(table[:1]).rows[0]
    loaded = predictor.stream.load(row)
    assert loaded.pack is not None
    image = torch.from_numpy(noise / 255.0).float()[None]
    typicality = predictor.ensemble.judge([replace(loaded.pack, images=(image,))])[1]
    assert typicality[0] < mammograms.quantile(0.05)


def test_the_api_takes_the_options(run: Path, crops: Path) -> None:
    model = vitmodel.load(run / "package", atypical=0.5, progress=False)
    assert "atypical" in model.predict(crops / "manifest.csv").refused["reason"].tolist()


def test_a_resumed_run_scores_again_with_another_limit(
    run: Path, crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def predict(*flags: str) -> None:
        main(["predict", str(run / "package"), str(crops / "manifest.csv"), str(tmp_path), "--resume", *flags])

    predict("--atypical", "0.5")
    before = pd.read_csv(tmp_path / "scores.csv")
    predict("--atypical", "0.5")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "scores.csv"), before)
    assert "images are scored already" in capsys.readouterr().out
    predict()
    assert pd.read_csv(tmp_path / "scores.csv")["score"].notna().sum() > before["score"].notna().sum()
