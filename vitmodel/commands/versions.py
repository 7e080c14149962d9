"""The command `versions`: train the original recipe's three versions and ours on one split, and compare them.

The split is by patient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from vitmodel.config import Preprocessing, Size, VersionsConfig
from vitmodel.config.recipes import RECIPES, recipe_path
from vitmodel.data.manifest import read_manifest, usable_rows, write_manifest
from vitmodel.data.splits import SPLIT_FRACTIONS, assign_splits
from vitmodel.data.tables import read_table
from vitmodel.errors import UsageError
from vitmodel.jobs.parallel import parallel_map
from vitmodel.jobs.steps import run_step
from vitmodel.metrics.metrics import Metrics, compute_metrics
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.model.package import load_package
from vitmodel.model.weight_source import find_weights
from vitmodel.pixels.open import open_as_cropped
from vitmodel.releases.files import safe_file_name
from vitmodel.scoring.tables import has_code
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, write_atomic

METRIC_COLUMNS = {"macro F1": "macro_f1", "recall": "sensitivity", "precision": "precision", "AUROC": "auroc"}
"""Column of versions.md -> name of its metric."""
CURVES = {"loss": "loss", "macro F1": "macro_f1", "AUROC": "auroc"}
"""Panel of versions.png -> name of its metric in the training history."""


def versions(config: VersionsConfig) -> None:
    """Train all versions, and write OUT/versions.md and OUT/versions.png. A second run resumes.

    Raises:
        UsageError: A recipe or a file of weights does not exist.
        VitmodelError: A step failed; names its command.
    """
    check_files(config)
    write_images(config)
    trainings = training_arguments(config)
    for name, arguments in trainings.items():
        if not (config.out / name / "package").exists():
            run_step("train", *arguments, "--run", config.out / name, "--resume")
    metrics = {name: validation_metrics(config.out / name) for name in trainings}
    histories = {name: load_package(config.out / name / "package")[1]["history"] for name in trainings}
    text = format_table(metrics)
    write_atomic(config.out / "versions.md", text)
    write_picture(histories, config.out / "versions.png")
    print(f"{text}\n{config.out / 'versions.png'}\n{NOT_A_MEDICAL_DEVICE}")


def write_images(config: VersionsConfig) -> None:
    """Write the crops of the original recipe and of ours, and the whole images, all with the same split by patient."""
    crops = config.out / "crops" / "manifest.csv"
    our_crops = config.out / "our_crops" / "manifest.csv"
    for manifest, size in ((crops, config.size), (our_crops, config.our_size)):
        run_step("etl", config.source, manifest.parent, "--size", size, "--workers", config.workers)
    assign_common_splits(crops, our_crops)
    if not (config.out / "whole" / "manifest.csv").exists():
        write_whole_images(read_manifest(crops), config)


def training_arguments(config: VersionsConfig) -> dict[str, list[str | Path]]:
    """Return each version's arguments of `vitmodel train`, in the order of training."""
    out = config.out
    recipes = config.recipes or RECIPES / "versions"
    weights: list[str | Path] = ["--weights", config.weights] if config.weights else []
    our_weights: list[str | Path] = ["--weights", config.our_weights] if config.our_weights else []
    crops = out / "crops" / "manifest.csv"
    our_crops = out / "our_crops" / "manifest.csv"
    whole = out / "whole" / "manifest.csv"
    return {
        "backbone": [whole, "--config", recipes / "backbone.yaml", *weights],
        "v2": [whole, "--config", recipes / "v2.yaml", "--weights", out / "backbone" / "package"],
        "v3": [crops, "--config", recipes / "v3.yaml", "--weights", out / "v2" / "package"],
        "ours": [our_crops, "--config", config.ours, *our_weights],
    }


def check_files(config: VersionsConfig) -> None:
    """Raise UsageError if a recipe or file of weights does not exist.

    Without this check, it would be noticed only after hours of cropping, when the first training starts. Weights on the
    hub are downloaded here.
    """
    folder = config.recipes or RECIPES / "versions"
    for name in ("backbone.yaml", "v2.yaml", "v3.yaml"):
        if not (folder / name).is_file():
            raise UsageError(
                f"recipes: {folder / name} does not exist; name the folder of the three recipes with --recipes"
            )
    recipe_path(config.ours, "ours")
    for flag, weights in (("weights", config.weights), ("our_weights", config.our_weights)):
        if weights is not None:
            find_weights(weights, flag)


def assign_common_splits(*manifests: Path) -> None:
    """Split the patients of the first manifest, and write this split into all manifests."""
    first = assign_splits(read_manifest(manifests[0]), SPLIT_FRACTIONS)
    split_by_patient = first.dropna(subset=["split"]).drop_duplicates("patient_id").set_index("patient_id")["split"]
    for manifest in manifests:
        table = read_manifest(manifest)
        write_manifest(table.assign(split=table["patient_id"].map(split_by_patient)), manifest)


def write_whole_images(table: pd.DataFrame, config: VersionsConfig) -> None:
    """Write the whole images of `table`, burned-in markers included, resized to SIZE without keeping the aspect ratio.

    This is what the original recipe did.
    """
    folder = config.out / "whole"
    rows = usable_rows(table)
    paths = [str(folder / "images" / f"{safe_file_name(name)}.png") for name in rows["image_id"]]
    images = list(zip(rows["source_path"], has_code(rows, "inverted"), paths, rows["voi"], strict=True))
    list(parallel_map(lambda image: write_resized(*image, config.size), images, "whole", config.workers))
    written = rows.assign(path=paths, preprocessing=Preprocessing(size=config.size).to_json())
    write_manifest(written, folder / "manifest.csv")


def write_resized(source: str, inverted: bool, path: str, voi: str | None, size: Size) -> None:
    """Write one whole image as an 8-bit PNG; invert it if its polarity is wrong."""
    file = open_as_cropped(source, Preprocessing(size=size), voi)
    grey = file.to_grey(cv2.resize(file.read_stored(), (size.width, size.height), interpolation=cv2.INTER_AREA))
    if inverted:
        grey = 1 - grey
    image = np.rint(255 * grey).astype(np.uint8)
    write_atomic(path, cv2.imencode(".png", image)[1].tobytes())


def validation_metrics(folder: Path) -> Metrics:
    """Return a run's metrics on its validation images at the threshold 0.5, with intervals over patients."""
    scores = read_table(folder / "validation.csv", ["patient_id", "cancer", "score"]).dropna(subset=["score"])
    sample = ScoredUnits(scores["cancer"].astype(float), scores["score"].astype(float), scores["patient_id"].to_numpy())
    return compute_metrics(sample, threshold=0.5)


def format_table(versions_metrics: dict[str, Metrics]) -> str:
    """Return the metrics of each version as a Markdown table with a row per version."""
    lines = [
        "# Versions",
        "",
        "Per image, on the validation patients, on whom each version's epoch was chosen too. 95 % intervals by",
        "resampling patients. Decisions at the threshold 0.5.",
        "",
        f"| version | {' | '.join(METRIC_COLUMNS)} | patients |",
        f"|---|{'---|' * (len(METRIC_COLUMNS) + 1)}",
    ]
    for name, metrics in versions_metrics.items():
        cells = [str(metrics.intervals[key]) for key in METRIC_COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {metrics.patients} |")
    return "\n".join([*lines, "", NOT_A_MEDICAL_DEVICE, ""])


def write_picture(histories: dict[str, dict[str, Any]], path: Path) -> None:
    """Write the validation curves of all versions, with one panel per metric."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(CURVES), 3.2), layout="constrained", dpi=120)
    panels = figure.subplots(1, len(CURVES))
    for axes, (name, key) in zip(panels, CURVES.items(), strict=True):
        for version, history in histories.items():
            epochs, values = zip(*history[f"val/{key}"], strict=True)
            axes.plot(np.array(epochs) + 1, values, marker=".", label=version)
        axes.set(title=f"validation {name}", xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path)
