"""Stage: model package + manifest -> metrics.json and report.html. Knows no network: the Predictor gives the scores."""

if __name__ == "__main__":  # run as a file: the command line runs this stage under its own name, with the checkout on the path
    import sys

    sys.path[0] = __file__.rsplit("/", 2)[0]
    from vitmodel.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))

import datetime
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import pandas as pd

from vitmodel import __version__
from vitmodel.config import EvaluateConfig, to_command
from vitmodel.data.dataset import to_tensor
from vitmodel.data.fingerprint import describe_seen, was_seen
from vitmodel.data.manifest import breast_ids, read_manifest
from vitmodel.data.rows import Row, rows_of
from vitmodel.data.splits import choose_rows
from vitmodel.evaluation import PLOTTED, WORDS, Evaluation, describe
from vitmodel.exams import about_images, unseen_sources
from vitmodel.measure.card import evaluated
from vitmodel.measure.report import Case, Report, write_report
from vitmodel.measure.threshold import purpose
from vitmodel.member import Member
from vitmodel.model.explain import gradient
from vitmodel.model.package import CARD, TENSORS
from vitmodel.model.packs import About
from vitmodel.predictor import Predictor
from vitmodel.results.overlay import blend
from vitmodel.results.tables import write_scores
from vitmodel.scores import is_duplicate, say_fallbacks, say_recropped
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, UsageError, VitmodelError, sha256_file, to_json, write_atomic

METHOD = "gradient"
"""Of the heat maps: attention that speaks for the label, a forward and a backward pass each."""
ERRORS = 24
"""How many of the most confident errors the report shows."""


def evaluate(config: EvaluateConfig) -> None:
    """Score the chosen rows, measure them against their labels, write metrics.json, report.html, the score tables and the model card."""
    whole = read_manifest(config.manifest)
    table, split = choose_rows(whole, config.split, str(config.manifest))
    predictor = Predictor(config)
    check(table, predictor, config, split)
    records, logits = predictor.look_at(table)
    images = predictor.tabulate(table, records, logits)
    scored = images["probability"].notna() & ~is_duplicate(images)
    if not scored.any():
        raise UsageError(f"{config.manifest}: all {len(images)} images were refused, nothing can be measured; the manifest has the reasons")
    breasts = predictor.score_breasts(images)
    write_scores(images, breasts, predictor.score_patients(breasts), config.out)
    say_fallbacks(images)
    seen = was_seen(images[scored], *(member.package["data"] for member in predictor.members))
    for sentence in describe_seen(seen):
        print(sentence)
    own = config.aggregate in ("package", predictor.aggregation)
    usual = "mean_logit" if predictor.fused else predictor.aggregation  # fusion aggregates no scores, such as those of a baseline
    evaluation = Evaluation(
        table=table[scored],
        probability=images.loc[scored, "probability"].to_numpy(),
        label=predictor.package["label"],
        aggregate=usual if own else config.aggregate,
        patient_aggregate=predictor.patient_aggregation if config.patient_aggregate == "package" else config.patient_aggregate,
        threshold=predictor.threshold,
        replicates=config.replicates,
        seed=config.seed,
        pooled=logits[scored, -1] if own and predictor.pools else None,
        calibrate=predictor.probability,
    )
    report = compose_report(config, predictor, evaluation, whole, table, images, split, seen)
    ensemble = [str(folder) for folder in config.ensemble]
    counts = {"seen_images": int(seen.sum()), "unhashed_images": int(seen.isna().sum())}
    facts = {"package": str(config.package), "ensemble": ensemble, "manifest": str(config.manifest), "split": split} | counts
    write_atomic(config.out / "metrics.json", to_json(facts | report.to_dict()))
    write_report(config.out / "report.html", report)
    for level in report.levels:
        print(f"AUROC per {level.name}: {level.metrics.intervals['auroc']}, {level.metrics.units} with {level.metrics.positives} positive")
    for found in report.audit.baselines if report.audit else ():
        print(f"{found.name}, AUROC per {report.plotted.name}: {found.metrics.intervals['auroc']}, most telling: {found.telling}")
    for sentence in report.missing.values():
        print(sentence)
    if config.card and config.ensemble:
        print("no model card is written: these are the figures of several packages together")
    elif config.card:
        write_card(config, report)
    print(f"report: {config.out / 'report.html'}\n{NOT_A_MEDICAL_DEVICE}")


def check(table: pd.DataFrame, predictor: Predictor, config: EvaluateConfig, split: str) -> None:
    """Say aloud what cannot be measured or costs time. Raises UsageError where there is nothing to measure against."""
    label = predictor.package["label"]
    if label not in table or table[label].isna().all():
        raise UsageError(f"{config.manifest}: column {label} is empty on the {len(table)} rows to measure on ({split})")
    if not (table[label] == 1).any():
        print(f"no row of {config.manifest} ({split}) has {label}: ranking, sensitivity and pF1 are not defined on it")
    say_recropped(table, predictor.package["preprocessing"])


def compose_report(
    config: EvaluateConfig,
    predictor: Predictor,
    evaluation: Evaluation,
    whole: pd.DataFrame,
    table: pd.DataFrame,
    images: pd.DataFrame,
    split: str,
    seen: pd.Series,
) -> Report:
    """All that the report shows: what was measured, and how it came about."""
    package = predictor.package
    once = table[~is_duplicate(images)]
    units = {"image": len(once), "breast": breast_ids(once).nunique(), "patient": once["patient_id"].nunique()}
    levels = evaluation.levels(units)
    plotted = next(level for level in levels if level.name == PLOTTED)
    groups, undivided = evaluation.subgroups()
    at_home = evaluation.elsewhere(predictor.prevalence, config.prevalence) if config.prevalence else None
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return Report(
        title=f"{evaluation.label.capitalize()} scores of {' and '.join(map(str, (config.package, *config.ensemble)))}",
        command=to_command("evaluate", config),
        created=f"{now}, vitmodel {__version__}",
        levels=levels,
        plotted=plotted,
        label=evaluation.label,
        method=describe_method(config, predictor, evaluation, plotted.metrics.positives / plotted.metrics.units, at_home is not None)
        | {
            "Rows": f"split {split}, {len(table)} images",
            "Left out": f"{len(table) - len(once)} byte for byte copies of another image of their breast",
            "Images that the model has seen": "; ".join(describe_seen(seen)) or "none",
        },
        model=per_package(predictor, describe_package),
        data={
            "Manifest": str(config.manifest),
            "Manifest (SHA-256)": sha256_file(config.manifest),
            "Measured rows": ", ".join(f"{name} {count}" for name, count in table["dataset"].fillna("unnamed").value_counts().items()),
        },
        refusals=images.loc[images["status"] == "refused", "reason"].value_counts().to_dict(),
        fell_back=fallbacks(images, unseen_sources(table, predictor.model.config)),
        history={} if config.ensemble else training_curves(package["history"]),
        folds=evaluation.folds(),
        thresholds=evaluation.thresholds(config.sensitivity),
        recalibrated=evaluation.recalibrated(),
        elsewhere=(config.prevalence, at_home) if config.prevalence and at_home else None,
        subgroups=groups,
        undivided=undivided,
        audit=evaluation.audit(whole) if config.audit else None,
        errors=list(confident_errors(predictor, evaluation)),
        heat=gradient.unit,
    )


def fallbacks(images: pd.DataFrame, sentences: list[str]) -> dict[str, list[str]]:
    """The images that were read by the shared parts of the network, by what was not learned apart; `sentences` has one per row."""
    read = images[["image_id"]].assign(sentence=sentences)[images["probability"].notna()]
    return read[read["sentence"] != ""].groupby("sentence")["image_id"].agg(list).to_dict()


def describe_method(config: EvaluateConfig, predictor: Predictor, evaluation: Evaluation, observed: float, moved: bool) -> dict[str, str]:
    """How scores became probabilities and decisions; `moved` = there is a table of them at the prevalence that was asked for."""
    corrected = (
        f"; corrected to {100 * config.prevalence:.1f} % in a table of its own" if config.prevalence and moved else "; not corrected"
    )
    own = config.aggregate in ("package", predictor.aggregation)
    caution = "" if own else f"; threshold and calibration are those of the package's {WORDS[predictor.aggregation]}"
    made = f"{WORDS[evaluation.aggregate]} of its images" + (", then calibrated" if own and predictor.pools else "' probabilities")
    mean = ", the mean over the packages" if config.ensemble else ""
    facts = {
        "Breast": "fusion of all images of its exam by the network" if own and predictor.fused else f"{made}{caution}",
        "Patient": f"{WORDS[evaluation.patient_aggregate]} of her breasts' probabilities",
        "Prevalence": f"{100 * predictor.prevalence:.1f} % of the {predictor.calibrated}s that calibration was fitted on{mean}, "
        f"{100 * observed:.1f} % of the breasts measured here{corrected}",
        "Decision": f"positive from {predictor.threshold:.4f}{mean}",
        "Intervals": f"{config.replicates} bootstrap replicates over patients, seed {config.seed}",
    }
    return facts | per_package(predictor, describe_fit)


def per_package(predictor: Predictor, describe: Callable[[Member], dict[str, str]]) -> dict[str, str]:
    """What there is to say of the package; of several, each one's by a name of its own."""
    facts = [describe(member) for member in predictor.members]
    if len(facts) == 1:
        return facts[0]
    return {f"Package {number}: {name}": value for number, each in enumerate(facts, 1) for name, value in each.items()}


def describe_fit(member: Member) -> dict[str, str]:
    """What was fitted to the model's scores, and on whom."""
    decision, count = member.package["decision"], len(member.models)
    patients = "the validation patients" if count == 1 else f"patients of the folds that its {count} models did not see"
    wanted = purpose(decision["objective"], decision.get("sensitivity", np.nan))
    return {
        "Calibration": f"{member.calibration.method.capitalize()}, fitted to the {member.calibrated}s of {patients}, "
        f"{100 * member.calibration.prevalence:.1f} % of them positive",
        "Threshold": f"{member.threshold:.4f}, chosen per {decision['level']} on {patients}, for: {wanted}",
    }


def describe_package(member: Member) -> dict[str, str]:
    """What the package is and what it was made from."""
    package, architecture = member.package, member.models[0].config.vit
    return {
        "Folder": str(member.folder),
        "Architecture": f"ViT, {architecture.depth} blocks, dim {architecture.dim}, patch {architecture.patch}",
        "Weights (SHA-256)": sha256_file(member.folder / TENSORS),
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


def confident_errors(predictor: Predictor, evaluation: Evaluation) -> Iterator[Case]:
    """The images whose score is farthest from their label: the crops that the model looked at, plain and with their heat maps."""
    wrong = evaluation.errors(ERRORS)
    rows = evaluation.table.iloc[wrong]
    known = about_images(rows, predictor.model.config)
    for row, probability, place, about in zip(rows.itertuples(), evaluation.probability[wrong], rows_of(rows), known, strict=True):
        age = np.nan if np.isnan(row.age) else f"age {row.age:.0f}"
        density = np.nan if pd.isna(row.density) else f"density {row.density}"
        shown = describe([f"{row.laterality} {row.view}".strip(), age, density])
        yield Case(row.image_id, float(probability), int(getattr(row, evaluation.label)), shown, *picture(predictor, place, about))


def picture(predictor: Predictor, row: Row, about: About) -> tuple[np.ndarray, np.ndarray]:
    """A crop (H W uint8) and the same below its heat map (H W 3 uint8)."""
    loaded = predictor.load(row, about)
    assert loaded.cropped.crop is not None  # it has a score
    crop = (255 * to_tensor(loaded.cropped.crop)[0].numpy()).astype(np.uint8)
    low, high = gradient.scale
    share = np.clip((np.nan_to_num(predictor.explain(loaded, METHOD), nan=low) - low) / (high - low), 0, 1).astype(np.float32)
    share = cv2.resize(share, crop.shape[::-1], interpolation=cv2.INTER_LINEAR) * (crop > 0)
    return crop, blend(cv2.cvtColor(crop, cv2.COLOR_GRAY2RGB), share)


def write_card(config: EvaluateConfig, report: Report) -> None:
    """Put the results into the package's model card; a package that cannot be changed stays as it is, and that is said."""
    card = config.package / CARD
    try:
        write_atomic(card, evaluated(card.read_text(encoding="utf-8") if card.is_file() else "", report))
    except VitmodelError as error:
        print(f"the model card stays as it was: {error}")
