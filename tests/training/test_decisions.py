"""A package applies the calibration and threshold chosen in training, per breast, in every command and runtime."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.calibration import _sigmoid_calibration
from sklearn.isotonic import IsotonicRegression

from vitmodel.cli import main
from vitmodel.config import TrainConfig
from vitmodel.data.manifest import breast_ids, read_manifest
from vitmodel.errors import UsageError
from vitmodel.metrics.calibration import platt_targets
from vitmodel.model.package_check import seal

TRAINING = ["--model", "vit_micro", "--epochs", "1", "--tokens", "96", "--workers", "0", "--wandb", "off"]
RUNTIMES = [
    "torch",
    *(
        ["onnx", "openvino"]
        if all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime", "openvino")))
        else []
    ),
]


def reference_probabilities(method: str, labels: np.ndarray, logits: np.ndarray, new_logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of `new_logits` after scikit-learn's or SciPy's fit to `labels` and `logits`."""
    if method == "platt":
        slope, intercept = _sigmoid_calibration(logits, labels)
        return expit(-slope * new_logits - intercept)
    if method == "temperature":
        targets = platt_targets(labels)

        def loss(slope: float) -> float:
            losses = targets * np.log(expit(slope * logits)) + (1 - targets) * np.log(expit(-slope * logits))
            return -float(np.mean(losses))

        return expit(max(minimize_scalar(loss, bounds=(-50, 50), method="bounded").x, 1e-3) * new_logits)
    lowest = 1 / (len(labels) + 2)
    isotonic = IsotonicRegression(y_min=lowest, y_max=1 - lowest, out_of_bounds="clip")
    return isotonic.fit(logits, labels).predict(new_logits)


@pytest.mark.parametrize(
    ("method", "objective", "split", "runtimes"),
    [
        ("platt", ["--objective", "pf1"], ["--val", "0.4", "--test", "0.2"], RUNTIMES),
        ("temperature", ["--objective", "f1"], ["--val", "0.4", "--test", "0.2"], ["torch"]),
        ("isotonic", ["--objective", "sensitivity", "--sensitivity", "0.75"], ["--folds", "2"], ["torch"]),
    ],
)
def test_every_runtime_gives_the_reference_probabilities(
    method: str, objective: list[str], split: list[str], runtimes: list[str], crops: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    package = run / "package"
    flags = [*TRAINING, "--calibration", method, *objective, *split]
    assert main(["train", str(crops / "manifest.csv"), str(run), *flags]) == 0
    config = json.loads((package / "config.json").read_text())
    assert (config["calibration"]["method"], config["decision"]["objective"]) == (method, objective[1])
    file = "out_of_fold.csv" if "--folds" in split else "validation.csv"
    scores = pd.read_csv(run / file, dtype={"patient_id": str})
    scores = scores.assign(logit=logit(scores["score"]))
    breasts = scores.groupby(breast_ids(scores)).agg({"cancer": "max", "logit": "mean"})
    own = reference_probabilities(method, *breasts.to_numpy().T, breasts["logit"].to_numpy())
    positives = np.sort(own[breasts["cancer"] == 1])
    if objective[1] == "sensitivity":
        assert (positives >= config["decision"]["threshold"]).mean() >= 0.75
    if objective[1] == "pf1":
        expected = [2 * own[own >= cut].sum() / ((own >= cut).sum() + own.sum()) for cut in own]
        assert config["decision"]["threshold"] == pytest.approx(max(expected) / 2, rel=1e-3)
    if len(runtimes) > 1:
        assert main(["export", str(package), str(package / "model.fp32.onnx")]) == 0
    for runtime in runtimes:
        main(["predict", str(package), str(crops / "manifest.csv"), str(tmp_path / runtime), "--runtime", runtime])
        images = pd.read_csv(tmp_path / runtime / "scores.csv", dtype={"patient_id": str})
        usable = images[(images["status"] != "refused") & ~images["reason"].fillna("").str.contains("duplicate")]
        pooled = logit(usable["score"]).groupby(breast_ids(usable)).mean()
        predicted = pd.read_csv(tmp_path / runtime / "breast_scores.csv").set_index("prediction_id")["probability"]
        expected = reference_probabilities(method, *breasts.to_numpy().T, pooled.to_numpy())
        np.testing.assert_allclose(predicted[pooled.index], expected, rtol=2e-3)
        expected = reference_probabilities(method, *breasts.to_numpy().T, logit(usable["score"]))
        np.testing.assert_allclose(usable["probability"], expected, rtol=2e-3)


def test_evaluation_calibrates_the_mean_logit_of_a_breast(run: Path, tmp_path: Path) -> None:
    """The calibration curve bends between the logits of a breast's images: their mean must be taken before it."""
    config = json.loads((run / "package" / "config.json").read_text())
    table = read_manifest(run / "manifest.csv").query("split == 'test'")
    package = tmp_path / "package"
    package.mkdir()
    for file in ("model.safetensors", "MODEL_CARD.md"):
        (package / file).write_bytes((run / "package" / file).read_bytes())
    for name, curve in (("plain", {}), ("bent", {"method": "isotonic", "prevalence": 0.5})):
        if curve:
            middle = float(np.median(logit(pd.read_csv(tmp_path / "plain" / "scores.csv")["score"])))
            curve |= {
                "level": "breast",
                "logits": [middle - 0.2, middle, middle + 0.2],
                "probabilities": [0.1, 0.2, 0.9],
            }
        seal(package, config | ({"calibration": curve} if curve else {}))
        flags = ["--replicates", "100", "--no-audit", "--no-card"]
        assert main(["evaluate", str(package), str(run / "manifest.csv"), str(tmp_path / name), *flags]) == 0
    images = pd.read_csv(tmp_path / "bent" / "scores.csv", dtype={"patient_id": str})
    breasts = pd.read_csv(tmp_path / "bent" / "breast_scores.csv").set_index("prediction_id")["probability"]
    pooled = logit(images["score"]).groupby(breast_ids(images)).mean()
    np.testing.assert_allclose(
        breasts[pooled.index], np.interp(pooled, curve["logits"], curve["probabilities"]), rtol=1e-6
    )
    calibrated_before_pooling = expit(logit(images["probability"]).groupby(breast_ids(images)).mean())
    assert np.abs(breasts[pooled.index] - calibrated_before_pooling).max() > 0.01
    labels = table["cancer"].groupby(breast_ids(table)).max()
    measured = json.loads((tmp_path / "bent" / "metrics.json").read_text())["breast"]["intervals"]
    assert measured["brier"]["value"] == pytest.approx(((breasts - labels) ** 2).mean())


def test_sensitivity_without_its_objective_is_refused() -> None:
    with pytest.raises(UsageError, match="sensitivity: has no effect here: it needs --objective sensitivity"):
        TrainConfig(manifest=Path("m.csv"), run=Path("run"), sensitivity=0.95)
