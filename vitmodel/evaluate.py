"""Stage: model package + manifest -> metrics.json and report.html. Knows no network: the Predictor gives the scores."""

if __name__ == "__main__":  # run as a file: the command line runs this stage under its own name, with the checkout on the path
    import sys

    sys.path[0] = __file__.rsplit("/", 2)[0]
    from vitmodel.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))

import datetime

import pandas as pd

from vitmodel import __version__
from vitmodel.config import EvaluateConfig
from vitmodel.data.fingerprint import count_seen
from vitmodel.data.manifest import breast_ids, read_manifest
from vitmodel.measure.metrics import measure
from vitmodel.measure.report import Level, Report, write_report
from vitmodel.measure.sample import Sample
from vitmodel.predictor import Predictor
from vitmodel.results.tables import write_scores
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, UsageError, sha256_file, to_json, write_atomic


def evaluate(config: EvaluateConfig) -> None:
    """Score the chosen rows, measure them against their labels, write metrics.json, report.html and the score tables."""
    table, split = choose_rows(read_manifest(config.manifest), config)
    predictor = Predictor(config)
    label = predictor.package["label"]
    if table[label].isna().all():
        raise UsageError(f"{config.manifest}: column {label} is empty on the {len(table)} rows to measure on ({split})")
    images = predictor.score_images(table)
    levels = measure_levels(images, table[label], predictor, config)
    seen = count_seen(table, predictor.package["data"])
    if seen:
        print(f"{seen} of {len(table)} images were seen in training or validation: these figures flatter the model")
    breasts = predictor.score_breasts(images)
    write_scores(images, breasts, predictor.score_patients(breasts), config.out)
    facts = {"package": str(config.package), "manifest": str(config.manifest), "split": split, "seen_images": seen}
    write_atomic(config.out / "metrics.json", to_json(facts | {level.name: level.metrics.to_dict() for level in levels}))
    write_report(config.out / "report.html", compose_report(config, predictor, levels, images, split, seen))
    for level in levels:
        print(f"AUROC per {level.name}: {level.metrics.intervals['auroc']}, {level.metrics.units} with {level.metrics.positives} positive")
    print(f"report: {config.out / 'report.html'}\n{NOT_A_MEDICAL_DEVICE}")


def choose_rows(table: pd.DataFrame, config: EvaluateConfig) -> tuple[pd.DataFrame, str]:
    """The rows to measure on, and the name of that choice. Raises UsageError where there are none."""
    split = config.split
    if split == "auto":
        split = "test" if (table["split"] == "test").any() else "all"
    chosen = table if split == "all" else table[table["split"] == split]
    if chosen.empty:
        known = ", ".join(sorted(table["split"].dropna().unique())) or "none"
        raise UsageError(f"split: {config.manifest} has no rows with split {split!r}; it has {known}")
    return chosen, split


def measure_levels(images: pd.DataFrame, labels: pd.Series, predictor: Predictor, config: EvaluateConfig) -> list[Level]:
    """Metrics per image, breast (as the package aggregates) and patient (the worse breast), on calibrated probabilities."""
    scored = images["probability"].notna()
    if not scored.any():
        raise UsageError(f"{config.manifest}: all {len(images)} images were refused, nothing can be measured; the manifest has the reasons")
    rows = images[scored]
    image = Sample(labels[scored].to_numpy(), rows["probability"].to_numpy(), rows["patient_id"].to_numpy())
    breast = image.aggregate(breast_ids(rows), predictor.aggregation)
    samples = {"image": image, "breast": breast, "patient": breast.aggregate(breast.patients, "max")}
    units = {"image": len(images), "breast": breast_ids(images).nunique(), "patient": images["patient_id"].nunique()}
    return [
        Level(name, sample, measure(sample, predictor.threshold, config.replicates, config.seed), refused=units[name] - len(sample.labels))
        for name, sample in samples.items()
    ]


def compose_report(
    config: EvaluateConfig, predictor: Predictor, levels: list[Level], images: pd.DataFrame, split: str, seen: int
) -> Report:
    """All that the report shows beside the figures."""
    package = predictor.package
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    history: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, points in package["history"].items():
        stage, _, figure = name.rpartition("/")
        if figure in ("loss", "auroc", "macro_f1", "pf1"):
            history.setdefault(figure, {})[stage] = points
    architecture = predictor.model.config
    return Report(
        title=f"Breast cancer scores of {config.package}",
        command=f"vitmodel evaluate {config.package} {config.manifest} {config.out} --split {config.split} "
        f"--replicates {config.replicates} --seed {config.seed}",
        created=f"{now}, vitmodel {__version__}",
        levels=levels,
        plotted=next(level for level in levels if level.name == "breast"),
        method={
            "Rows": f"split {split}, {len(images)} images",
            "Images that the model has seen": f"{seen} (these figures flatter the model)" if seen else "none",
            "Breast": f"{predictor.aggregation} of its images",
            "Patient": "the breast with the higher probability",
            "Calibration": f"{package['calibration']['method']}, fitted on the validation patients",
            "Threshold": f"{predictor.threshold:.4f}, best {package['decision']['objective']} per breast on the validation patients",
            "Intervals": f"{config.replicates} bootstrap replicates over patients, seed {config.seed}",
        },
        model={
            "Architecture": f"ViT, {architecture.depth} blocks, dim {architecture.dim}, patch {architecture.patch}",
            "Weights (SHA-256)": sha256_file(config.package / "model.safetensors"),
            "Preprocessing": package["preprocessing"],
            "Trained on": "; ".join(
                f"{name}: {counts['patients']} patients, {counts['images']} images, {counts['positive_images']} positive"
                for name, counts in package["data"]["splits"].items()
            ),
            "Training data (SHA-256)": package["data"]["sha256"],
        },
        data={"Manifest": str(config.manifest), "Manifest (SHA-256)": sha256_file(config.manifest)},
        refusals=images.loc[images["status"] == "refused", "reason"].value_counts().to_dict(),
        history=history,
    )
