"""Stage: model package + manifest -> metrics.json and report.html. Knows no network: the Predictor gives the scores."""

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import pandas as pd

from vitmodel import __version__
from vitmodel.config import EvaluateConfig, to_command
from vitmodel.data.dataset import to_tensor
from vitmodel.data.exams import describe_unseen_sources
from vitmodel.data.fingerprint import describe_training_overlap, seen_in_training
from vitmodel.data.manifest import breast_ids, read_manifest
from vitmodel.data.rows import ManifestRow
from vitmodel.data.splits import select_split
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.metrics.threshold import describe_objective
from vitmodel.model.explain import gradient
from vitmodel.model.package import CARD_FILE, TENSORS_FILE
from vitmodel.model.packed_batch import ImageMetadata
from vitmodel.reports.evaluation import ErrorCase, EvaluationReport, write_report
from vitmodel.reports.model_card import add_evaluation_section
from vitmodel.results.overlay import blend_heat_map
from vitmodel.results.score_files import write_score_files
from vitmodel.scoring.evaluation import AGGREGATE_NAMES, PLOTTED_LEVEL, Evaluation, join_known
from vitmodel.scoring.loaded_package import LoadedPackage
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.stream import ScoringRows
from vitmodel.scoring.tables import fallback_messages, is_duplicate, recropping_messages
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, sha256_file, to_json, write_atomic

HEATMAP_METHOD = "gradient"
"""Of the heat maps: attention that speaks for the label, a forward and a backward pass each."""
MAX_ERRORS = 24
"""How many of the most confident errors the report shows."""


@dataclass(frozen=True, kw_only=True)
class ScoredManifest:
    """The manifest, the rows of it that are evaluated and their scores."""

    whole: pd.DataFrame
    split: str
    rows: ScoringRows
    images: pd.DataFrame
    """The table of images, one row per row of `rows`."""
    logits: np.ndarray
    """`(N, L, M)`."""
    used: pd.Series
    """Which rows are measured: those with a score, except copies."""
    seen: pd.Series
    """Which of them the model was trained on; NaN = unknown."""


def evaluate(config: EvaluateConfig) -> None:
    """Measure a package on a manifest and print the result."""
    evaluate_package(config)


def evaluate_package(config: EvaluateConfig, say: Callable[[str], object] = print) -> EvaluationReport:
    """Score the chosen rows, measure them against their labels and return the report.

    Writes metrics.json, report.html, the score tables and the model card. The command line and `vitmodel.evaluate` share this function.

    Args:
        config: Packages, manifest, output folder and options.
        say: Called with each message of the run.

    Raises:
        UsageError: The chosen rows have no labels, or none of their images could be scored.
    """
    whole = read_manifest(config.manifest)
    table, split = select_split(whole, config.split, str(config.manifest))
    predictor = Predictor(config)
    for message in check_measurable(table, predictor, config, split):
        say(message)
    rows = predictor.attach(table)
    records, logits = predictor.predict_logits(rows)
    tables = predictor.tables(table, records, logits)
    images = tables.images
    used = images["probability"].notna() & ~is_duplicate(images)
    if not used.any():
        raise UsageError(
            f"{config.manifest}: all {len(images)} images were refused, nothing can be measured; the manifest has the reasons"
        )
    write_score_files(*tables, config.out)
    for message in fallback_messages(images):
        say(message)
    seen = seen_in_training(images[used], *(member.package["data"] for member in predictor.ensemble.packages))
    for message in describe_training_overlap(seen):
        say(message)
    scored = ScoredManifest(whole=whole, split=split, rows=rows, images=images, logits=logits, used=used, seen=seen)
    report = compose_report(config, predictor, evaluation_of(config, predictor, scored), scored)
    ensemble = [str(folder) for folder in config.ensemble]
    counts = {"seen_images": int(seen.sum()), "unhashed_images": int(seen.isna().sum())}
    facts = {
        "package": str(config.package),
        "ensemble": ensemble,
        "manifest": str(config.manifest),
        "split": split,
    } | counts
    write_atomic(config.out / "metrics.json", to_json(facts | report.to_dict()))
    write_report(config.out / "report.html", report)
    for level in report.levels:
        say(
            f"AUROC per {level.name}: {level.metrics.intervals['auroc']}, {level.metrics.units} with {level.metrics.positives} positive"
        )
    for found in report.audit.baselines if report.audit else ():
        say(
            f"{found.name}, AUROC per {report.headline.name}: {found.metrics.intervals['auroc']}, most telling: {found.telling}"
        )
    for message in report.missing_sections.values():
        say(message)
    if config.card and config.ensemble:
        say("no model card is written: these are the figures of several packages together")
    elif config.card:
        for message in update_model_card(config, report):
            say(message)
    say(f"report: {config.out / 'report.html'}\n{NOT_A_MEDICAL_DEVICE}")
    return report


def evaluation_of(config: EvaluateConfig, predictor: Predictor, scored: ScoredManifest) -> Evaluation:
    """Return the scored rows with how their scores are aggregated, as the configuration or else the package decides."""
    ensemble = predictor.ensemble
    own = config.aggregate in ("package", ensemble.aggregation)
    usual = (
        "mean_logit" if ensemble.fused else ensemble.aggregation
    )  # fusion aggregates no scores, such as those of a baseline
    return Evaluation(
        table=scored.rows.table[scored.used],
        probability=scored.images.loc[scored.used, "probability"].to_numpy(),
        label=ensemble.package["label"],
        aggregate=usual if own else config.aggregate,
        patient_aggregate=ensemble.patient_aggregation
        if config.patient_aggregate == "package"
        else config.patient_aggregate,
        threshold=ensemble.threshold,
        replicates=config.replicates,
        seed=config.seed,
        breast_logits=scored.logits[scored.used, -1] if own and ensemble.calibrates_breasts else None,
        calibrate=ensemble.probability,
    )


def check_measurable(table: pd.DataFrame, predictor: Predictor, config: EvaluateConfig, split: str) -> list[str]:
    """Return messages on what cannot be measured or costs time. Raises UsageError if there is no label to measure against."""
    label = predictor.ensemble.package["label"]
    if label not in table or table[label].isna().all():
        raise UsageError(f"{config.manifest}: column {label} is empty on the {len(table)} rows to measure on ({split})")
    messages = []
    if not (table[label] == 1).any():
        messages.append(
            f"no row of {config.manifest} ({split}) has {label}: ranking, sensitivity and pF1 are not defined on it"
        )
    return messages + recropping_messages(table, predictor.ensemble.package["preprocessing"])


def compose_report(
    config: EvaluateConfig, predictor: Predictor, evaluation: Evaluation, scored: ScoredManifest
) -> EvaluationReport:
    """Return the content of the report: what was measured, and how it came about."""
    ensemble = predictor.ensemble
    table = scored.rows.table
    images = scored.images
    once = table[~is_duplicate(images)]
    units = {"image": len(once), "breast": breast_ids(once).nunique(), "patient": once["patient_id"].nunique()}
    levels = evaluation.levels(units)
    plotted = next(level for level in levels if level.name == PLOTTED_LEVEL)
    groups, undivided = evaluation.subgroups()
    at_home = evaluation.at_prevalence(ensemble.prevalence, config.prevalence) if config.prevalence else None
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return EvaluationReport(
        title=f"{evaluation.label.capitalize()} scores of {' and '.join(map(str, (config.package, *config.ensemble)))}",
        command=to_command("evaluate", config),
        created=f"{now}, vitmodel {__version__}",
        levels=levels,
        headline=plotted,
        label=evaluation.label,
        method=describe_method(
            config, predictor, evaluation, plotted.metrics.positives / plotted.metrics.units, at_home is not None
        )
        | {
            "Rows": f"split {scored.split}, {len(table)} images",
            "Left out": f"{len(table) - len(once)} byte for byte copies of another image of their breast",
            "Images that the model has seen": "; ".join(describe_training_overlap(scored.seen)) or "none",
        },
        model=per_package(predictor, describe_package),
        data={
            "Manifest": str(config.manifest),
            "Manifest (SHA-256)": sha256_file(config.manifest),
            "Measured rows": ", ".join(
                f"{name} {count}" for name, count in table["dataset"].fillna("unnamed").value_counts().items()
            ),
        },
        refusals=images.loc[images["status"] == "refused", "reason"].value_counts().to_dict(),
        shared_adapter_images=fallbacks(images, describe_unseen_sources(table, ensemble.model.config)),
        history={} if config.ensemble else training_curves(ensemble.package["history"]),
        folds=evaluation.folds(),
        thresholds=evaluation.thresholds(config.sensitivity),
        recalibrated=evaluation.recalibrated(),
        at_prevalence=(config.prevalence, at_home) if config.prevalence and at_home else None,
        subgroups=groups,
        skipped_attributes=undivided,
        audit=evaluation.audit(scored.whole) if config.audit else None,
        errors=list(confident_errors(predictor, evaluation, scored.rows.take(np.flatnonzero(scored.used).tolist()))),
        heat_map_legend=gradient.unit,
    )


def fallbacks(images: pd.DataFrame, sentences: list[str]) -> dict[str, list[str]]:
    """The images that were read by the shared parts of the network, by what was not learned apart; `sentences` has one per row."""
    read = images[["image_id"]].assign(sentence=sentences)[images["probability"].notna()]
    return read[read["sentence"] != ""].groupby("sentence")["image_id"].agg(list).to_dict()


def describe_method(
    config: EvaluateConfig, predictor: Predictor, evaluation: Evaluation, observed: float, moved: bool
) -> dict[str, str]:
    """How scores became probabilities and decisions; `moved` = there is a table of them at the prevalence that was asked for."""
    corrected = (
        f"; corrected to {100 * config.prevalence:.1f} % in a table of its own"
        if config.prevalence and moved
        else "; not corrected"
    )
    ensemble = predictor.ensemble
    own = config.aggregate in ("package", ensemble.aggregation)
    caution = (
        "" if own else f"; threshold and calibration are those of the package's {AGGREGATE_NAMES[ensemble.aggregation]}"
    )
    made = f"{AGGREGATE_NAMES[evaluation.aggregate]} of its images" + (
        ", then calibrated" if own and ensemble.calibrates_breasts else "' probabilities"
    )
    mean = ", the mean over the packages" if config.ensemble else ""
    facts = {
        "Breast": "fusion of all images of its exam by the network" if own and ensemble.fused else f"{made}{caution}",
        "Patient": f"{AGGREGATE_NAMES[evaluation.patient_aggregate]} of her breasts' probabilities",
        "Prevalence": f"{100 * ensemble.prevalence:.1f} % of the {ensemble.calibration_level}s that calibration was fitted on{mean}, "
        f"{100 * observed:.1f} % of the breasts measured here{corrected}",
        "Decision": f"positive from {ensemble.threshold:.4f}{mean}",
        "Intervals": f"{config.replicates} bootstrap replicates over patients, seed {config.seed}",
    }
    return facts | per_package(predictor, describe_fit)


def per_package(predictor: Predictor, describe: Callable[[LoadedPackage], dict[str, str]]) -> dict[str, str]:
    """What there is to say of the package; of several, each one's by a name of its own."""
    facts = [describe(member) for member in predictor.ensemble.packages]
    if len(facts) == 1:
        return facts[0]
    return {f"Package {number}: {name}": value for number, each in enumerate(facts, 1) for name, value in each.items()}


def describe_fit(member: LoadedPackage) -> dict[str, str]:
    """What was fitted to the model's scores, and on whom."""
    decision, count = member.package["decision"], len(member.models)
    patients = "the validation patients" if count == 1 else f"patients of the folds that its {count} models did not see"
    wanted = describe_objective(decision["objective"], decision.get("sensitivity", np.nan))
    return {
        "Calibration": f"{member.calibration.method.capitalize()}, fitted to the {member.calibration_level}s of {patients}, "
        f"{100 * member.calibration.prevalence:.1f} % of them positive",
        "Threshold": f"{member.threshold:.4f}, chosen per {decision['level']} on {patients}, for: {wanted}",
    }


def describe_package(member: LoadedPackage) -> dict[str, str]:
    """What the package is and what it was made from."""
    package, architecture = member.package, member.models[0].config.vit
    return {
        "Folder": str(member.folder),
        "Architecture": f"ViT, {architecture.depth} blocks, dim {architecture.dim}, patch {architecture.patch}",
        "Weights (SHA-256)": sha256_file(member.folder / TENSORS_FILE),
        "Preprocessing": package["preprocessing"],
        "Trained on": "; ".join(
            f"{name}: {counts['patients']} patients, {counts['images']} images, {counts['positive_images']} positive"
            for name, counts in package["data"]["splits"].items()
        ),
        "Training data (SHA-256)": package["data"]["sha256"],
        "Versions at training": ", ".join(f"{name} {version}" for name, version in package["versions"].items()),
    }


def training_curves(history: dict[str, list[tuple[int, float]]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Figure -> split (and fold) -> points, of the figures that say how training went; a package of folds names them split/figure/fold."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, points in history.items():
        split, *figure = name.split("/")
        if figure and figure[0] in ("loss", "auroc", "macro_f1", "pf1"):
            curves.setdefault(figure[0], {})[" ".join([split, *figure[1:]])] = points
    return curves


def confident_errors(predictor: Predictor, evaluation: Evaluation, rows: ScoringRows) -> Iterator[ErrorCase]:
    """Yield the images whose score is farthest from their label, with their crops plain and below their heat maps."""
    wrong = evaluation.errors(MAX_ERRORS)
    chosen = rows.take(wrong)
    columns = zip(chosen.table.itertuples(), evaluation.probability[wrong], chosen.rows, chosen.metadata, strict=True)
    for row, probability, place, about in columns:
        age = np.nan if np.isnan(row.age) else f"age {row.age:.0f}"
        density = np.nan if pd.isna(row.density) else f"density {row.density}"
        shown = join_known([f"{row.laterality} {row.view}".strip(), age, density])
        yield ErrorCase(
            row.image_id,
            float(probability),
            int(getattr(row, evaluation.label)),
            shown,
            *crop_and_overlay(predictor, place, about),
        )


def crop_and_overlay(predictor: Predictor, row: ManifestRow, about: ImageMetadata) -> tuple[np.ndarray, np.ndarray]:
    """A crop (H W uint8) and the same below its heat map (H W 3 uint8)."""
    loaded = predictor.stream.load(row, about)
    assert loaded.cropped.crop is not None  # it has a score
    crop = (255 * to_tensor(loaded.cropped.crop)[0].numpy()).astype(np.uint8)
    low, high = gradient.scale
    share = np.clip(
        (np.nan_to_num(predictor.explain(loaded, HEATMAP_METHOD), nan=low) - low) / (high - low), 0, 1
    ).astype(np.float32)
    share = cv2.resize(share, crop.shape[::-1], interpolation=cv2.INTER_LINEAR) * (crop > 0)
    return crop, blend_heat_map(cv2.cvtColor(crop, cv2.COLOR_GRAY2RGB), share)


def update_model_card(config: EvaluateConfig, report: EvaluationReport) -> list[str]:
    """Add the results to the package's model card; return a message if the package cannot be changed."""
    card = config.package / CARD_FILE
    try:
        write_atomic(card, add_evaluation_section(card.read_text(encoding="utf-8") if card.is_file() else "", report))
    except VitmodelError as error:
        return [f"the model card stays as it was: {error}"]
    return []
