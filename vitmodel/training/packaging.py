"""Package a trained model: out-of-sample scores, calibration, threshold and the model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from vitmodel.config import Preprocessing, TrainConfig, to_yaml
from vitmodel.config.labels import CANCER, target_name
from vitmodel.data.fingerprint import Fingerprint
from vitmodel.data.manifest import breast_ids
from vitmodel.metrics import calibration
from vitmodel.metrics.scored_units import ScoredUnits, to_logit
from vitmodel.metrics.threshold import choose_threshold, describe_objective
from vitmodel.model.network import Network
from vitmodel.model.package import save_package
from vitmodel.training.module import History
from vitmodel.training.trainer import system_info
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, atomic_path

AGGREGATE = "mean_logit"
"""How the logits of a breast's images are combined. Calibration and threshold hold for this combination."""


def aggregate_breasts(rows: pd.DataFrame, logits: np.ndarray, label: str) -> ScoredUnits:
    """Return the breasts of the rows, scored by the mean logit of their images.

    Args:
        rows: Rows of the manifest, one per image.
        logits: Logit of each row; NaN for unreadable images, which are left out. With exam fusion all images of a
            breast have the logit of the breast.
        label: Column of the label.
    """
    is_readable = np.isfinite(logits)
    rows = rows[is_readable]
    images = ScoredUnits(rows[label].to_numpy(), expit(logits[is_readable]), rows["patient_id"].to_numpy())
    return images.aggregate(breast_ids(rows), AGGREGATE)


def write_table(rows: pd.DataFrame, logits: np.ndarray, label: str, path: Path) -> None:
    """Write out-of-sample scores and labels as CSV: raw scores before calibration, empty for unreadable images."""
    columns = ["image_id", "patient_id", "laterality", "view", "fold", label]
    with atomic_path(path) as temporary:
        rows[columns].assign(score=expit(logits)).to_csv(temporary, index=False)


def write_package(
    config: TrainConfig,
    models: Sequence[Network],
    breasts: ScoredUnits,
    data: Fingerprint,
    preprocessing: Preprocessing,
    history: History,
    reached: str,
) -> None:
    """Fit calibration and threshold, and write the package and its model card.

    Args:
        config: Settings of the training.
        models: The trained model, or the models of all folds.
        breasts: Breasts with out-of-sample raw scores, on which calibration and threshold are fitted.
        data: Fingerprint of the training data.
        preprocessing: Preprocessing of the crops.
        history: Logged metrics.
        reached: Sentence about the performance that was reached; printed and quoted in the model card.
    """
    logits = to_logit(breasts.scores)
    calibrator = calibration.fit(config.calibration, breasts.labels, logits)
    threshold = choose_threshold(breasts.labels, calibrator.apply(logits), config.objective, config.sensitivity)
    decision = {"level": "breast", "aggregate": "fusion" if config.fusion else AGGREGATE, "threshold": threshold}
    system = system_info()
    contents = {
        "label": config.label,
        "preprocessing": preprocessing.to_json(),
        "packed": config.packed,
        "flip": config.flip_average,
        "calibration": calibrator.to_dict() | {"level": "breast"},
        "decision": decision | {"objective": config.objective, "sensitivity": config.sensitivity},
        "data": data,
        "history": history,
        "training": to_yaml("train", config, config.run / "train.yaml"),
        "versions": system["versions"],
        "code_sha256": system["code_sha256"],
    }
    save_package(config.run / "package", models, contents, model_card(config, contents, reached))
    print(f"{reached}\npackage: {config.run / 'package'}")


def model_card(config: TrainConfig, contents: dict[str, Any], reached: str) -> str:
    """Return MODEL_CARD.md: what the model is, what it was trained on, and what it must not be used for."""
    splits = "\n".join(
        f"| {name} | {counts['patients']} | {counts['images']} | {counts['positive_images']} |"
        for name, counts in contents["data"]["splits"].items()
    )
    if config.folds:
        kind = (
            f"An ensemble of {config.folds} Vision Transformers, one per fold, "
            f"that gives the mean of their logits per cropped mammogram"
        )
        where = "patients of the fold that each member was not trained on"
        caution = "This is the performance of single members; the ensemble itself was not measured on any patient."
    else:
        kind = "A Vision Transformer that gives one logit per cropped mammogram"
        where = "validation patients"
        caution = (
            "This figure also selected the epoch and is therefore optimistic; for figures on patients\n"
            "that were not used in training, run `vitmodel evaluate`."
        )
    score = (
        "the logit of the breast from the fusion of all images of the exam"
        if config.fusion
        else "the mean logit of its images"
    )
    objective = describe_objective(config.objective, config.sensitivity)
    target = target_name(config.label)
    return f"""# {config.model}: {"breast cancer" if config.label == CANCER else target} score from a mammogram

**{NOT_A_MEDICAL_DEVICE}**

{kind}.
The positive class is {target}{"" if config.label == CANCER else f", by the label rule `{config.label}`"}.
The probability of a breast is {score}, calibrated
({contents["calibration"]["method"]}) on the breasts of {where}. The decision threshold is
{contents["decision"]["threshold"]:.4f}, chosen on the same patients for: {objective}.

| split | patients | images | images with {target} |
|---|---|---|---|
{splits}

{reached[0].upper()}{reached[1:]}. {caution}
Prevalence and machines differ between sites: check calibration and threshold before using the model elsewhere.

```yaml
{contents["training"]}```
"""
