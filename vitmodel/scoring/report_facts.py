"""Facts about the packages, the data and the scoring method, as the evaluation report states them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from vitmodel.config import EvaluateConfig
from vitmodel.metrics.crossfit import OUT_OF_FOLD, SELECTED_EPOCH, ScoreOrigin, describe_origin
from vitmodel.metrics.threshold import describe_objective
from vitmodel.model.package import TENSORS_FILE
from vitmodel.model.weight_source import describe_source
from vitmodel.scoring.evaluation import AGGREGATE_NAMES, Evaluation
from vitmodel.scoring.loaded_package import LoadedPackage
from vitmodel.scoring.predictor import Predictor
from vitmodel.utils import sha256_file


def uses_own_aggregation(config: EvaluateConfig, predictor: Predictor) -> bool:
    """Return whether breasts are scored as the package does, so that its calibration applies to them."""
    return config.aggregate in ("package", predictor.ensemble.aggregation)


def describe_data(config: EvaluateConfig, table: pd.DataFrame) -> dict[str, str]:
    """Return the path and hash of the manifest, and the number of evaluated rows of each release."""
    counts = table["dataset"].fillna("unnamed").value_counts()
    return {
        "Manifest": str(config.manifest),
        "Manifest (SHA-256)": sha256_file(config.manifest),
        "Measured rows": ", ".join(f"{name} {count}" for name, count in counts.items()),
    }


def describe_label(label: str, trained_on: str) -> str:
    """Return the rule of the true labels and, if it differs, that which the model was trained on."""
    if label == trained_on:
        return label
    return f"{label}; the model was trained on {trained_on}, for which its calibration and threshold are"


def fallbacks(images: pd.DataFrame, sentences: list[str]) -> dict[str, list[str]]:
    """Return the ids of the scored images that used the shared adapters, by the reason.

    Args:
        images: Table of images.
        sentences: Per image, which of its sources was not seen in training; empty = all were.
    """
    scored = images[["image_id"]].assign(sentence=sentences)[images["probability"].notna()]
    return scored[scored["sentence"] != ""].groupby("sentence")["image_id"].agg(list).to_dict()


def describe_method(
    config: EvaluateConfig, predictor: Predictor, evaluation: Evaluation, observed: float, corrected: bool
) -> dict[str, str]:
    """Return how scores became probabilities and decisions.

    Args:
        config: The options of the command.
        predictor: The loaded packages.
        evaluation: The measured rows.
        observed: Share of positive breasts among those measured.
        corrected: Whether the report has a table of metrics at `config.prevalence`.
    """
    ensemble = predictor.ensemble
    mean = ", the mean over the packages" if config.ensemble else ""
    correction = "not corrected"
    if config.prevalence and corrected:
        correction = f"corrected to {100 * config.prevalence:.1f} % in a separate table"
    facts = {
        "Breast": describe_breast_score(config, predictor, evaluation),
        "Patient": f"{AGGREGATE_NAMES[evaluation.patient_aggregate]} of her breasts' probabilities",
        "Prevalence": f"{100 * ensemble.prevalence:.1f} % of the {ensemble.calibration_level}s that calibration was "
        f"fitted on{mean}, {100 * observed:.1f} % of the breasts measured here; {correction}",
        "Decision": f"positive from {ensemble.threshold:.4f}{mean}",
        "Intervals": f"{config.replicates} bootstrap replicates over patients, seed {config.seed}",
    }
    return facts | per_package(predictor, describe_fit)


def describe_breast_score(config: EvaluateConfig, predictor: Predictor, evaluation: Evaluation) -> str:
    """Return how the score of a breast is made from its images."""
    ensemble = predictor.ensemble
    own = uses_own_aggregation(config, predictor)
    if own and ensemble.fused:
        return "fusion of all images of its exam by the network"
    aggregate = AGGREGATE_NAMES[evaluation.aggregate]
    if own and ensemble.calibrates_breasts:
        return f"{aggregate} of its images, then calibrated"
    if own:
        return f"{aggregate} of its images' probabilities"
    fitted = AGGREGATE_NAMES[ensemble.aggregation]
    return f"{aggregate} of its images' probabilities; threshold and calibration are those of the package's {fitted}"


def per_package(predictor: Predictor, describe: Callable[[LoadedPackage], dict[str, str]]) -> dict[str, str]:
    """Return the facts about the package; with several packages, each fact's name starts with the package's number."""
    descriptions = [describe(member) for member in predictor.ensemble.packages]
    if len(descriptions) == 1:
        return descriptions[0]
    facts: dict[str, str] = {}
    for number, description in enumerate(descriptions, 1):
        facts |= {f"Package {number}: {name}": value for name, value in description.items()}
    return facts


def describe_fit(member: LoadedPackage) -> dict[str, str]:
    """Return how calibration and threshold were fitted, and on which patients."""
    decision = member.package["decision"]
    calibration = member.calibration
    patients = "the validation patients"
    if len(member.models) > 1:
        patients = f"patients of the folds that its {len(member.models)} models did not see"
    objective = describe_objective(decision["objective"], decision.get("sensitivity", np.nan))
    origin = member.package.get("fitted_to")
    if origin is None:  # older versions
        origin = ScoreOrigin(OUT_OF_FOLD if len(member.models) > 1 else SELECTED_EPOCH).to_dict()
    return {
        "Calibration": f"{calibration.method.capitalize()}, fitted to the {member.calibration_level}s of {patients}, "
        f"{100 * calibration.prevalence:.1f} % of them positive. {describe_origin(origin)}"
        f"{_describe_band(member)}",
        "Threshold": f"{member.threshold:.4f}, chosen per {decision['level']} on {patients}, for: {objective}",
    }


def _describe_band(member: LoadedPackage) -> str:
    """Return a sentence on what calibration intervals come from; '' without them."""
    band = member.calibration_band
    if band is None:
        return ""
    return f" Calibration intervals: 95 % over {band.patients} patients with {band.positives} positives, resampled."


def describe_package(member: LoadedPackage) -> dict[str, str]:
    """Return what the package is and what it was trained on."""
    package = member.package
    architecture = member.models[0].config.vit
    return {
        "Folder": str(member.folder),
        **({"Name": str(member.hub_name)} if member.hub_name else {}),
        "Architecture": f"ViT, {architecture.depth} blocks, dim {architecture.dim}, patch {architecture.patch}",
        "Weights (SHA-256)": sha256_file(member.folder / TENSORS_FILE),
        **({"Initial weights": describe_source(package["weights"])} if "weights" in package else {}),
        "Preprocessing": package["preprocessing"],
        "Trained on": "; ".join(
            f"{name}: {counts['patients']} patients, {counts['images']} images, {counts['positive_images']} positive"
            for name, counts in package["data"]["splits"].items()
        ),
        "Training data (SHA-256)": package["data"]["sha256"],
        "Versions at training": ", ".join(f"{name} {version}" for name, version in package["versions"].items()),
    }


def training_curves(history: dict[str, list[tuple[int, float]]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return the training curves: metric -> split, followed by the fold if there are folds -> (epoch, value).

    Args:
        history: Points by `split/metric`, or by `split/metric/fold` in a package of folds.
    """
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, points in history.items():
        split, *rest = name.split("/")
        if rest and rest[0] in ("loss", "auroc", "macro_f1", "pf1"):
            metric, *fold = rest
            curves.setdefault(metric, {})[" ".join([split, *fold])] = points
    return curves


def describe_typicality(images: pd.DataFrame, atypical: float) -> str:
    """Return a sentence on the typicality of scored and of atypical images; '' if it is unknown.

    Args:
        images: Table of images.
        atypical: Typicality below which images are atypical.
    """
    typicality = images["typicality"].dropna()
    if typicality.empty:
        return ""
    refused = int((typicality < atypical).sum())
    return (
        f"The typicality of {(typicality < 0.01).mean():.1%} of {len(typicality):,} images is below 0.01, where 1 % is "
        f"expected of images like those of the training; {refused:,} are below {atypical:g} and count as atypical."
    )
