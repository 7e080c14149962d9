"""Auxiliary heads become outputs: tables, runtimes, ensembles and the report; packages without heads are unchanged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
import torch
from fixture_types import MakeOnce
from safetensors.torch import load_file
from scipy.special import softmax

import vitmodel
from vitmodel.cli import main
from vitmodel.config import PredictorConfig, SegmentsConfig, Size
from vitmodel.config.auxiliary import AUXILIARY_TARGETS
from vitmodel.data.manifest import breast_ids, read_manifest, write_manifest
from vitmodel.errors import VitmodelError
from vitmodel.metrics.multiclass import SoftmaxCalibration
from vitmodel.model.architecture import ExamConfig, NetworkConfig, SourcesConfig, ViTConfig, Vocabulary
from vitmodel.model.network import Network
from vitmodel.model.package import load_package, save_package
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.tables import is_duplicate

NAMES = ("density", "view", "invasive", "age")
COLUMNS = [
    *("density_A", "density_B", "density_C", "density_D", "density"),
    *("view_CC", "view_MLO", "predicted_view", "invasive_probability", "predicted_age"),
]
BREAST_COLUMNS = [name for name in COLUMNS if "view" not in name]


@pytest.fixture(scope="module")
def labelled(crops: Path, make_once: MakeOnce) -> Path:
    """Return a manifest with densities by patient, of which some are unknown."""

    def make(folder: Path) -> None:
        table = read_manifest(crops / "manifest.csv")
        number = table["patient_id"].astype("category").cat.codes
        table["density"] = number.map(lambda code: [*"ABCD", None][code % 5])
        write_manifest(table, folder / "manifest.csv")

    return make_once("labelled_crops", make) / "manifest.csv"


@pytest.fixture(scope="module")
def auxiliary_run(labelled: Path, flags: list[str], make_once: MakeOnce) -> Path:
    """Return a finished run with auxiliary heads. Do not write to it."""

    def make(folder: Path) -> None:
        heads = ["--auxiliary", f"[{','.join(NAMES)}]", "--flip-average"]
        assert main(["train", str(labelled), str(folder), *flags, *heads]) == 0

    return make_once("auxiliary_run", make)


@pytest.fixture(scope="module")
def package(auxiliary_run: Path, make_once: MakeOnce) -> Path:
    """Return the run's package with heads whose outputs differ visibly between images. Do not write to it."""

    def make(folder: Path) -> None:
        network, config = load_package(auxiliary_run / "package")
        assert network.auxiliary is not None
        torch.manual_seed(0)
        torch.nn.init.normal_(network.auxiliary.weight, std=0.5)
        save_package(folder / "package", network, config, "card")

    return make_once("auxiliary_package", make) / "package"


def test_predictions_are_in_the_tables_of_images_and_breasts(package: Path, labelled: Path, tmp_path: Path) -> None:
    assert main(["predict", str(package), str(labelled), str(tmp_path)]) == 1  # a crop is refused
    images = pd.read_csv(tmp_path / "scores.csv")
    breasts = pd.read_csv(tmp_path / "breast_scores.csv", dtype={"patient_id": str})
    assert images.columns[-len(COLUMNS) :].tolist() == COLUMNS
    assert breasts.columns[-len(BREAST_COLUMNS) :].tolist() == BREAST_COLUMNS
    truth = read_manifest(labelled)
    assert images["view"].fillna("").tolist() == truth["view"].tolist(), "the column of the manifest must stay"
    for table in (images, breasts):
        refused = table["probability"].isna()
        assert refused.sum() < len(table)
        assert table.loc[refused, "density"].isna().all()
        scored = table[~refused]
        probabilities = scored[["density_A", "density_B", "density_C", "density_D"]].to_numpy()
        np.testing.assert_allclose(probabilities.sum(axis=1), 1)
        assert scored["density"].tolist() == [*np.array([*"ABCD"])[probabilities.argmax(axis=1)]]
        assert scored["density_A"].std() > 0.01
        assert scored["invasive_probability"].between(0, 1).all()
    result = vitmodel.load(package, progress=False).predict(labelled)
    np.testing.assert_allclose(result.breasts["density_B"], breasts["density_B"], atol=1e-6)


def test_a_breast_has_the_calibrated_mean_of_its_images(package: Path, labelled: Path) -> None:
    table = read_manifest(labelled)
    predictor = Predictor(PredictorConfig(package=package, jobs=1))
    records, outputs = predictor.predict_logits(predictor.attach(table))
    tables = predictor.tables(table, records, outputs)
    fitted = json.loads((package / "config.json").read_text())["auxiliary"]["density"]
    used = (tables.images["probability"].notna() & ~is_duplicate(tables.images)).to_numpy()
    assert used.sum() > 10
    means = pd.DataFrame(outputs[used, 1:5, 0]).groupby(breast_ids(table[used]).to_numpy()).mean()
    expected = softmax(fitted["slope"] * means.to_numpy() + np.array(fitted["biases"]), axis=1)
    breasts = tables.breasts.set_index("prediction_id").loc[means.index]
    np.testing.assert_allclose(breasts[["density_A", "density_B", "density_C", "density_D"]], expected)


@pytest.mark.nightly
def test_exported_models_give_the_same_predictions(package: Path, labelled: Path, tmp_path: Path) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(module, reason="ONNX needs the extra `export`")
    folder = tmp_path / "package"
    shutil.copytree(package, folder)
    table = read_manifest(labelled)
    config = PredictorConfig(package=folder, jobs=1)
    expected = Predictor(config).score(table)
    assert main(["export", str(folder), str(folder / "model.fp32.onnx")]) == 0
    runtimes: tuple[Literal["onnx", "openvino"], ...] = ("onnx", "openvino")
    for runtime in runtimes:
        tables = Predictor(replace(config, runtime=runtime, precision="fp32")).score(table)
        for level in ("images", "breasts"):
            numbers = getattr(expected, level).select_dtypes(float)
            pd.testing.assert_frame_equal(getattr(tables, level)[numbers.columns], numbers, atol=1e-4)
    assert expected.images["predicted_age"].std() > 0.1


def test_flips_are_averaged(package: Path, labelled: Path) -> None:
    predictor = Predictor(PredictorConfig(package=package, jobs=1))
    assert predictor.ensemble.flip
    row = predictor.attach(read_manifest(labelled).query("status != 'refused'").head(1))
    pack = predictor.stream.load(row.rows[0], row.metadata[0]).pack
    assert pack is not None
    (both,) = predictor.ensemble.logits([pack])
    with torch.inference_mode():
        image, flip = predictor.ensemble.packages[0].logits(pack)
    np.testing.assert_allclose(both[:, 0], (image + flip) / 2, atol=1e-6)
    assert np.abs(image - flip)[1:].max() > 1e-4


def test_an_ensemble_averages_the_packages_that_have_a_head(
    package: Path, run: Path, labelled: Path, tmp_path: Path
) -> None:
    """The other packages have the heads in another order, or none."""
    network, config = load_package(package)
    targets = tuple(AUXILIARY_TARGETS[name] for name in ("age", "density"))
    other = Network(replace(network.config, auxiliary=targets)).eval()
    config["auxiliary"] = {"age": None, "density": SoftmaxCalibration(0.5, (1.0, 0.0, 0.0, -1.0), 9).to_dict()}
    save_package(tmp_path / "other", other, config, "card")
    without, config = load_package(run / "package")
    save_package(tmp_path / "without", without, config | {"flip": True}, "card")
    table = read_manifest(labelled)
    folders = (package, tmp_path / "other", tmp_path / "without")
    first, second, third = (Predictor(PredictorConfig(package=folder, jobs=1)).score(table) for folder in folders)
    together = Predictor(PredictorConfig(package=folders[2], ensemble=folders[:2], jobs=1)).score(table)
    for level in ("images", "breasts"):
        one, two, all_three = (getattr(tables, level) for tables in (first, second, together))
        for column in ("density_A", "predicted_age"):
            np.testing.assert_allclose(all_three[column], (one[column] + two[column]) / 2)
        np.testing.assert_allclose(all_three["invasive_probability"], one["invasive_probability"])
        assert "density" not in getattr(third, level)


def test_a_package_without_heads_has_the_tensors_and_columns_of_before(run: Path, crops: Path, tmp_path: Path) -> None:
    config = json.loads((run / "package" / "config.json").read_text())
    assert "auxiliary" not in config
    assert "auxiliary" not in config["architecture"]
    assert not [name for name in load_file(run / "package" / "model.safetensors") if "auxiliary" in name]
    tables = Predictor(PredictorConfig(package=run / "package", jobs=1)).score(read_manifest(crops / "manifest.csv"))
    assert tables.images.columns[-1] == "machine_id"
    assert tables.breasts.columns[-1] == "probability_high"


def test_calibration_uses_validation_patients_only(auxiliary_run: Path) -> None:
    config = json.loads((auxiliary_run / "package" / "config.json").read_text())
    validation = read_manifest(auxiliary_run / "manifest.csv").query("split == 'val'")
    known = validation[validation["density"].notna()]
    assert 0 < len(known) < len(validation)
    assert config["auxiliary"]["density"]["units"] == breast_ids(known).nunique()
    assert config["auxiliary"]["view"]["units"] == validation["view"].isin(["CC", "MLO"]).sum()
    assert config["auxiliary"]["age"] is None
    card = (auxiliary_run / "package" / "MODEL_CARD.md").read_text()
    assert f"| density | {breast_ids(known).nunique()} per breast |" in card


def test_the_report_measures_the_outputs_on_known_values(
    package: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitmodel.commands.evaluate.MAX_ERRORS", 1)
    shutil.copytree(package, tmp_path / "package")
    options = ["--split", "all", "--replicates", "100", "--no-audit"]
    assert main(["evaluate", str(tmp_path / "package"), str(labelled), str(tmp_path / "out"), *options]) == 0
    measured = json.loads((tmp_path / "out" / "metrics.json").read_text())["auxiliary"]
    breasts = pd.read_csv(tmp_path / "out" / "breast_scores.csv").set_index("prediction_id")
    truth = read_manifest(labelled)
    truth = truth["density"].groupby(breast_ids(truth)).max().dropna()
    scored = breasts.loc[truth.index].query("probability == probability")
    agreement = (scored["density"] == truth[scored.index]).mean()
    assert measured["density"]["units"] == len(scored)
    assert measured["density"]["intervals"]["accuracy"]["value"] == pytest.approx(agreement)
    assert np.sum(measured["density"]["confusion"]) == len(scored)
    assert set(measured["density"]["intervals"]) == {"macro_auroc", "accuracy", "quadratic_kappa"}
    assert "quadratic_kappa" not in measured["view"]["intervals"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Further outputs</h2>" in page
    assert page.count("number of units and fraction of the row.") >= 2
    assert "| density |" in (tmp_path / "package" / "MODEL_CARD.md").read_text()


@torch.no_grad()
def test_heads_read_the_features_of_each_image_in_every_network(package: Path, labelled: Path, tmp_path: Path) -> None:
    """Segments, sources and fusion change the features; two models of one package are averaged."""
    torch.manual_seed(0)
    config = NetworkConfig(
        vit=ViTConfig(image_size=Size(32, 32), dim=32, depth=2, heads=2),
        sources=SourcesConfig(columns=(Vocabulary("view", ("CC", "MLO")),), every=1),
        segments=SegmentsConfig(segments=32, segment_overlap=16, segment_context=32, segment_budget=20),
        exam=ExamConfig(views=Vocabulary("view", ("CC", "MLO"))),
        auxiliary=(AUXILIARY_TARGETS["density"], AUXILIARY_TARGETS["age"]),
    )
    networks = [Network(config).eval() for _ in range(2)]
    contents = load_package(package)[1] | {"flip": False, "auxiliary": {"density": None, "age": None}}
    contents["decision"]["aggregate"] = "fusion"
    save_package(tmp_path, networks, contents, "card")
    predictor = Predictor(PredictorConfig(package=tmp_path, jobs=1))
    table = read_manifest(labelled).query("status != 'refused'").head(6)
    rows = predictor.attach(table)
    images = predictor.score(table).images
    packs = [predictor.stream.load(*pair).pack for pair in zip(rows.rows, rows.metadata, strict=True)]
    for number, pack in enumerate(packs):
        assert pack is not None
        of_networks = [network.auxiliary(network.features(pack))[0] for network in networks]  # type: ignore[misc]
        outputs = torch.stack(of_networks).mean(dim=0)
        expected = outputs[:4].softmax(dim=0).numpy()
        found = images.iloc[number][["density_A", "density_B", "density_C", "density_D"]].to_numpy(float)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert images.iloc[number]["predicted_age"] == pytest.approx(58 + 12 * outputs[4].item(), abs=1e-3)


def test_a_package_whose_calibration_of_a_head_is_missing_is_refused(package: Path, tmp_path: Path) -> None:
    network, config = load_package(package)
    del config["auxiliary"]
    save_package(tmp_path, network, config, "card")
    with pytest.raises(VitmodelError, match=r"'auxiliary' is missing"):
        Predictor(PredictorConfig(package=tmp_path))
