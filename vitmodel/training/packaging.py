"""Package a trained model: out-of-sample scores, calibration, threshold and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from vitmodel.config import Preprocessing, TrainConfig, to_yaml
from vitmodel.config.auxiliary import AUXILIARY_TARGETS, output_slices
from vitmodel.config.labels import CANCER, target_name
from vitmodel.data.drift import Reference, fit_reference, reference_to_json
from vitmodel.data.fingerprint import Fingerprint
from vitmodel.data.manifest import breast_ids
from vitmodel.data.tables import write_csv
from vitmodel.metrics import calibration
from vitmodel.metrics.auxiliary import AuxiliaryOutput, AuxiliaryUnits, measure
from vitmodel.metrics.calibration_band import CalibrationBand
from vitmodel.metrics.crossfit import ScoreOrigin, describe_origin
from vitmodel.metrics.multiclass import Bootstrap
from vitmodel.metrics.scored_units import ScoredUnits, to_logit
from vitmodel.metrics.threshold import choose_threshold, describe_objective
from vitmodel.model.network import Network
from vitmodel.model.package import save_package
from vitmodel.model.typicality import Typicality
from vitmodel.model.weight_source import WeightsSource, describe_source
from vitmodel.model.weights import WeightReport
from vitmodel.reports.model_card import AUXILIARY_TABLE, auxiliary_row
from vitmodel.training.module import History
from vitmodel.training.trainer import system_info
from vitmodel.utils import NOT_A_MEDICAL_DEVICE

AGGREGATE = "mean_logit"
"""How the logits of a breast's images are combined. Calibration and threshold hold for this combination."""

CARD_REPLICATES = 1000
"""Number of bootstrap replicates for the intervals on the model card."""


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
    write_csv(rows[columns].assign(score=expit(logits)), path)


@dataclass(frozen=True, eq=False)
class OutOfSample:
    """What the networks predict for patients that they were not trained on."""

    breasts: ScoredUnits
    """Breasts with raw scores, on which calibration and threshold are fitted."""
    origin: ScoreOrigin
    """Where these scores come from."""
    auxiliary: Mapping[str, AuxiliaryUnits]
    """The outputs of each auxiliary head, by target."""


@dataclass(frozen=True, eq=False)
class Look:
    """What the training images look like, with which a package judges other images."""

    typicalities: Sequence[Typicality]
    """Typicality of each model; empty if there are too few images."""
    reference: Reference
    """Distributions of the training and validation images."""

    @classmethod
    def fit(cls, typicalities: Sequence[Typicality | None], images: pd.DataFrame) -> Look:
        """Return the look of a table of images, the columns of `data.drift.TITLES` and patient_id."""
        known = [typicality for typicality in typicalities if typicality is not None]
        return cls(known if len(known) == len(typicalities) else [], fit_reference(images))


def auxiliary_units(rows: pd.DataFrame, outputs: np.ndarray, names: Sequence[str]) -> dict[str, AuxiliaryUnits]:
    """Return the units of each auxiliary target: images, or breasts with the mean outputs of their images.

    Args:
        rows: Rows of the manifest, one per image.
        outputs: Outputs of the auxiliary heads for each row, `(N, A)`; NaN for unreadable images, which are left out.
        names: The targets in the order of the outputs.
    """
    is_readable = np.isfinite(outputs).all(axis=1)
    rows = rows[is_readable]
    result = {}
    for target, columns in output_slices([AUXILIARY_TARGETS[name] for name in names]):
        labels = np.array(target.encode(rows[target.name].tolist()))
        images = AuxiliaryUnits(labels, outputs[is_readable][:, columns], rows["patient_id"].to_numpy())
        result[target.name] = images.breasts(breast_ids(rows)) if target.level == "breast" else images
    return result


def fit_auxiliary(units: Mapping[str, AuxiliaryUnits]) -> tuple[dict[str, Any], list[str]]:
    """Calibrate the auxiliary outputs.

    Returns:
        The calibration of each target for config.json, None = not calibrated, and a row of the model card for each.
    """
    fitted: dict[str, Any] = {}
    lines = []
    for name, known in units.items():
        target = AUXILIARY_TARGETS[name]
        output = AuxiliaryOutput.fit(target, known)
        fitted[name] = output.calibration and output.calibration.to_dict()
        predicted = output.predict(known.outputs)
        metrics = measure(target, known.labels, predicted, known.patients, Bootstrap(CARD_REPLICATES))
        lines.append(auxiliary_row(target, metrics))
    return fitted, lines


def write_package(
    config: TrainConfig,
    models: Sequence[Network],
    out_of_sample: OutOfSample,
    data: Fingerprint,
    preprocessing: Preprocessing,
    history: History,
    reached: str,
    look: Look,
    weights: Mapping[str, Any] | None = None,
) -> None:
    """Fit calibration and threshold, and write the package and its model card.

    Args:
        config: Settings of the training.
        models: The trained model, or the models of all folds.
        out_of_sample: What the models predict for patients that they were not trained on.
        data: Fingerprint of the training data.
        preprocessing: Preprocessing of the crops.
        history: Logged metrics.
        reached: Sentence about the performance that was reached; printed and quoted in the model card.
        look: What the training images look like.
        weights: Where the initial weights come from and what was done with their tensors; None = random weights.
    """
    breasts = out_of_sample.breasts
    logits = to_logit(breasts.scores)
    calibrator = calibration.fit(config.calibration, breasts.labels, logits)
    band = CalibrationBand.fit(config.calibration, breasts)
    threshold = choose_threshold(breasts.labels, calibrator.apply(logits), config.objective, config.sensitivity)
    decision = {"level": "breast", "aggregate": "fusion" if config.fusion else AGGREGATE, "threshold": threshold}
    auxiliary, auxiliary_lines = fit_auxiliary(out_of_sample.auxiliary)
    system = system_info()
    contents = {
        "label": config.label,
        "preprocessing": preprocessing.to_json(),
        "packed": config.packed,
        "flip": config.flip_average,
        "calibration": calibrator.to_dict() | {"level": "breast"},
        **({"calibration_band": band.to_dict()} if band else {}),
        "decision": decision | {"objective": config.objective, "sensitivity": config.sensitivity},
        "fitted_to": out_of_sample.origin.to_dict(),
        **({"auxiliary": auxiliary} if auxiliary else {}),
        "data": data,
        "reference": reference_to_json(look.reference),
        "history": history,
        **({"weights": weights} if weights else {}),
        "training": to_yaml("train", config, config.run / "train.yaml"),
        "versions": system["versions"],
        "code_sha256": system["code_sha256"],
    }
    card = model_card(config, contents, reached, auxiliary_lines)
    save_package(config.run / "package", models, contents, card, look.typicalities)
    print(f"{reached}\npackage: {config.run / 'package'}")


def model_card(config: TrainConfig, contents: dict[str, Any], reached: str, auxiliary_lines: Sequence[str] = ()) -> str:
    """Return MODEL_CARD.md: what the model is, what it was trained on, and what it must not be used for.

    Args:
        config: Settings of the training.
        contents: Contents of config.json.
        reached: Sentence about the performance that was reached.
        auxiliary_lines: A row of the table of auxiliary outputs for each of them.
    """
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
    outputs = ""
    if auxiliary_lines:
        table = "\n".join([*AUXILIARY_TABLE, *auxiliary_lines])
        outputs = (
            f"Further outputs, fitted to and measured on {where}, which is optimistic\n"
            f"(95 % intervals over patients):\n\n{table}\n\n{_describe_auxiliary_calibration(contents)}\n\n"
        )
    target = target_name(config.label)
    start = _describe_weights(contents["weights"]) if "weights" in contents else ""
    return f"""# {config.model}: {"breast cancer" if config.label == CANCER else target} score from a mammogram

**{NOT_A_MEDICAL_DEVICE}**

{kind}.
The positive class is {target}{"" if config.label == CANCER else f", by the label rule `{config.label}`"}.
The probability of a breast is {score}, calibrated
({contents["calibration"]["method"]}) on the breasts of {where}. The decision threshold is
{contents["decision"]["threshold"]:.4f}, chosen on the same patients for: {objective}.
{describe_origin(contents["fitted_to"])}

| split | patients | images | images with {target} |
|---|---|---|---|
{splits}

{reached[0].upper()}{reached[1:]}. {caution}
Prevalence and machines differ between sites: check calibration and threshold before using the model elsewhere.

{outputs}{start}```yaml
{contents["training"]}```
"""


def record_weights(source: WeightsSource | None, report: WeightReport | None) -> dict[str, Any] | None:
    """Return the entry of config.json on the initial weights; None = random weights."""
    return source.to_dict() | report.to_dict() if source and report else None


def _describe_weights(weights: Mapping[str, Any]) -> str:
    """Return where the initial weights come from, how many tensors were used, and which ones were not as they are."""
    counts = ", ".join(f"{count} {action}" for action, count in weights["tensors"].items() if count)
    changed = [(action, f"`{tensor}`", note) for action, tensor, note in weights["table"] if action != "loaded"]
    rows = "".join(f"| {' | '.join(row)} |\n" for row in [("action", "tensor", "note"), ("---",) * 3, *changed])
    return f"Initial weights: {describe_source(weights)}.\nTensors: {counts}.\n\n{rows if changed else ''}\n"


def _describe_auxiliary_calibration(contents: dict[str, Any]) -> str:
    """Return a sentence on which auxiliary outputs are calibrated."""
    fitted = contents["auxiliary"]
    missing = [name for name in fitted if fitted[name] is None and not AUXILIARY_TARGETS[name].scale]
    sentence = "Their probabilities are calibrated by a temperature and a bias per class."
    return f"{sentence} Not calibrated: {', '.join(missing)}." if missing else sentence
