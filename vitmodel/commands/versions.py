"""Stage: the original recipe's three versions and ours, trained on one patient-wise split, side by side. Knows verbs and figures."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from vitmodel.config import Preprocessing, Size, VersionsConfig
from vitmodel.config.recipes import RECIPES, recipe_path
from vitmodel.data.manifest import read_manifest, read_table, usable_rows, write_manifest
from vitmodel.data.splits import SPLIT_FRACTIONS, assign_splits
from vitmodel.errors import UsageError
from vitmodel.jobs.parallel import parallel_map
from vitmodel.jobs.steps import run_step
from vitmodel.metrics.metrics import Metrics, compute_metrics
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.model.package import load_package
from vitmodel.pixels.open import open_image
from vitmodel.releases.files import safe_file_name
from vitmodel.scoring.tables import has_code
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, write_atomic

FIGURES = {"macro F1": "macro_f1", "recall": "sensitivity", "precision": "precision", "AUROC": "auroc"}
CURVES = {"loss": "loss", "macro F1": "macro_f1", "AUROC": "auroc"}


def versions(config: VersionsConfig) -> None:
    """Write OUT/versions.md and OUT/versions.png; running it again resumes.

    Raises UsageError if a recipe or a file of weights is missing, VitmodelError with the command that failed.
    """
    check_files(config)
    crops, ours, whole = (config.out / name / "manifest.csv" for name in ("crops", "our_crops", "whole"))
    for manifest, size in ((crops, config.size), (ours, config.our_size)):
        run_step("etl", config.source, manifest.parent, "--size", size, "--jobs", config.jobs)
    assign_common_splits(crops, ours)
    if not whole.exists():
        write_whole_images(read_manifest(crops), config)
    recipes = config.recipes or RECIPES / "versions"
    weights, our_weights = (["--weights", path] if path else [] for path in (config.weights, config.our_weights))
    steps = {
        "backbone": [whole, "--config", recipes / "backbone.yaml", *weights],
        "v2": [whole, "--config", recipes / "v2.yaml", "--weights", config.out / "backbone" / "package"],
        "v3": [crops, "--config", recipes / "v3.yaml", "--weights", config.out / "v2" / "package"],
        "ours": [ours, "--config", config.ours, *our_weights],
    }
    for name, arguments in steps.items():
        if not (config.out / name / "package").exists():
            run_step("train", *arguments, "--run", config.out / name, "--resume")
    found = {name: validation_metrics(config.out / name) for name in steps}
    text = format_table(found)
    write_atomic(config.out / "versions.md", text)
    write_picture(
        {name: load_package(config.out / name / "package")[1]["history"] for name in steps}, config.out / "versions.png"
    )
    print(f"{text}\n{config.out / 'versions.png'}\n{NOT_A_MEDICAL_DEVICE}")


def check_files(config: VersionsConfig) -> None:
    """Raise UsageError naming a recipe or weights that do not exist: images are cropped for hours before the first training reads them."""
    folder = config.recipes or RECIPES / "versions"
    for name in ("backbone.yaml", "v2.yaml", "v3.yaml"):
        if not (folder / name).is_file():
            raise UsageError(
                f"recipes: {folder / name} does not exist; name the folder with the three recipes by --recipes"
            )
    recipe_path(config.ours, "ours")
    for flag, weights in (("weights", config.weights), ("our_weights", config.our_weights)):
        if weights is not None and not weights.exists():
            raise UsageError(f"{flag}: {weights} does not exist; correct --{flag.replace('_', '-')} or leave it out")


def assign_common_splits(*manifests: Path) -> None:
    """Give all manifests the same split by patient, that of the first one."""
    first = assign_splits(read_manifest(manifests[0]), SPLIT_FRACTIONS)
    parts = first.dropna(subset=["split"]).drop_duplicates("patient_id").set_index("patient_id")["split"]
    for manifest in manifests:
        table = read_manifest(manifest)
        write_manifest(table.assign(split=table["patient_id"].map(parts)), manifest)


def write_whole_images(table: pd.DataFrame, config: VersionsConfig) -> None:
    """The images of `table` whole, burned-in markers and all, squashed to SIZE as the original recipe did."""
    folder = config.out / "whole"
    rows = usable_rows(table)
    paths = [str(folder / "images" / f"{safe_file_name(name)}.png") for name in rows["image_id"]]
    images = list(zip(rows["source_path"], has_code(rows, "inverted"), paths, strict=True))
    list(parallel_map(lambda image: write_resized(*image, config.size), images, "whole", config.jobs))
    written = rows.assign(path=paths, preprocessing=Preprocessing(size=config.size).to_json())
    write_manifest(written, folder / "manifest.csv")


def write_resized(source: str, inverted: bool, path: str, size: Size) -> None:
    """Write one whole image as an 8-bit PNG, turned right where its polarity was found to be wrong."""
    file = open_image(Path(source))
    grey = file.to_grey(cv2.resize(file.read_stored(), (size.width, size.height), interpolation=cv2.INTER_AREA))
    write_atomic(
        path, cv2.imencode(".png", np.rint(255 * (1 - grey if inverted else grey)).astype(np.uint8))[1].tobytes()
    )


def validation_metrics(folder: Path) -> Metrics:
    """What a run reached on its validation images at the threshold 0.5, with intervals over patients."""
    scores = read_table(folder / "validation.csv", ["patient_id", "cancer", "score"]).dropna(subset=["score"])
    sample = ScoredUnits(scores["cancer"].astype(float), scores["score"].astype(float), scores["patient_id"].to_numpy())
    return compute_metrics(sample, threshold=0.5)


def format_table(found: dict[str, Metrics]) -> str:
    """Markdown: a row per version."""
    rows = [
        f"| {name} | {' | '.join(str(metrics.intervals[key]) for key in FIGURES.values())} | {metrics.patients} |"
        for name, metrics in found.items()
    ]
    head = f"| version | {' | '.join(FIGURES)} | patients |\n|---|{'---|' * (len(FIGURES) + 1)}"
    return (
        "# Versions\n\nPer image on the validation patients, who also chose each version's epoch; 95 % intervals by resampling patients;\n"
        "called at 0.5.\n\n" + "\n".join([head, *rows]) + f"\n\n{NOT_A_MEDICAL_DEVICE}\n"
    )


def write_picture(histories: dict[str, dict[str, Any]], path: Path) -> None:
    """The validation curves of all versions, one panel per figure."""
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
