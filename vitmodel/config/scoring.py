"""Everything that scores: prediction, evaluation, comparison, export; the demo and info."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vitmodel.config.base import require, require_apart
from vitmodel.config.choices import ExplanationName


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """How a model package is run; shared by evaluate, predict and serve."""

    package: Path
    """Model package: a folder with model.safetensors and config.json, such as RUN/package."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs."""
    tokens: int = 16384
    """Tokens (patches that are looked at) per forward pass, at most. It bounds the memory; a larger image is refused."""
    segment_budget: int = 0
    """Tokens of segments at once, at most, which bounds the memory of a model that reads segments; 0 = as it was trained."""
    jobs: int = 0
    """Threads that decode images; 0 = one per core."""
    ensemble: list[Path] = field(default_factory=list)
    """Further packages, trained alike, such as those of other folds; give the flag once for each. Scores are the mean."""
    flip: bool | None = None
    """Average over each image and the same upside down, twice the time in the network; none = as PACKAGE was calibrated."""
    runtime: Literal["torch", "onnx", "openvino"] = "torch"
    """What runs the network; onnx and openvino take PACKAGE/model.PRECISION.onnx, which `vitmodel export` writes, and run on the CPU."""
    precision: Literal["fp32", "int8"] = "fp32"
    """Arithmetic of the network's matrices; int8 needs runtime onnx or openvino."""

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "tokens", "must be at least 1")
        require(self.segment_budget >= 0, "segment_budget", "must not be negative")
        require(self.jobs >= 0, "jobs", "must not be negative")
        require(self.precision == "fp32" or self.runtime != "torch", "precision", "int8 needs --runtime onnx or --runtime openvino")
        require(self.device != "cuda" or self.runtime == "torch", "device", "cuda needs --runtime torch")


@dataclass(frozen=True, kw_only=True)
class WantedConfig:
    """What a threshold is chosen to reach; shared by train and evaluate."""

    sensitivity: float = 0.9
    """Wanted sensitivity: `evaluate` cross-fits a threshold for it, too; `train` chooses the package's for it where OBJECTIVE says so."""

    def __post_init__(self) -> None:
        require(0 < self.sensitivity <= 1, "sensitivity", "must be above 0, at most 1")


@dataclass(frozen=True, kw_only=True)
class DecisionConfig(WantedConfig):
    """How a package makes probabilities and decisions of its scores, both fitted per breast on patients that it did not learn from."""

    calibration: Literal["platt", "temperature", "isotonic"] = "platt"
    """From scores to probabilities: slope and intercept; slope alone, which keeps the prevalence that SAMPLING shows; or any rising curve,
    for hundreds of positives."""
    objective: Literal["f1", "pf1", "sensitivity"] = "f1"
    """What the threshold is best for: F1; the expected F1, half of its largest where probabilities are right; or the highest specificity
    with the wanted SENSITIVITY."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = self.objective == "sensitivity" or self.sensitivity == WantedConfig.sensitivity
        require(wanted, "sensitivity", "is for --objective sensitivity")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(WantedConfig, PredictorConfig):
    """Measure a model package on a manifest: metrics.json and report.html, per image, breast and patient, with 95 % intervals.

    Its results also go into the package's MODEL_CARD.md, but for those of an ensemble.
    """

    manifest: Path
    """manifest.csv with labels."""
    out: Path
    """Folder for metrics.json, report.html and the scores."""
    split: str = "auto"
    """Rows to measure on: a value of the column `split`, or all; auto = test where the manifest has one, else all."""
    replicates: int = 2000
    """Bootstrap replicates of patients for the intervals."""
    seed: int = 0
    """Seed of the bootstrap and of the folds."""
    aggregate: Literal["package", "mean", "mean_logit", "max", "noisy_or"] = "package"
    """A breast's probability from its images'; package = as the package decides, for which its threshold was chosen."""
    patient_aggregate: Literal["package", "max", "mean", "noisy_or"] = "package"
    """A patient's probability from her breasts'; package = the larger one or, with the fusion of exams, noisy-or, as it was trained."""
    prevalence: float | None = None
    """Report the figures at this fraction of positives too, such as 0.021 in screening; None = only as measured."""
    audit: bool = True
    """Look for leaks: patients and pixels in two splits, and what ids or metadata alone tell."""
    card: bool = True
    """Write the results into the package's MODEL_CARD.md."""

    def __post_init__(self) -> None:
        for part in (PredictorConfig, WantedConfig):
            part.__post_init__(self)
        require(self.replicates >= 100, "replicates", "must be at least 100 for a 95 % interval")
        require(self.prevalence is None or 0 < self.prevalence < 1, "prevalence", "must lie between 0 and 1, exclusive")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare models on the same units: paired 95 % intervals of every difference, and DeLong's test of the AUROC.

    Each model is a package or a score file: scores.csv, breast_scores.csv or a submission.
    """

    models: list[Path]
    """Model packages or score files; all are compared with the first."""
    manifest: Path
    """manifest.csv with labels."""
    out: Path | None = None
    """Folder for comparison.json; none = print only."""
    split: str = "auto"
    """Rows to compare on: a value of the column `split`, or all; auto = test where the manifest has one, else all."""
    label: str = "cancer"
    """Column of the manifest that holds the truth."""
    level: Literal["image", "breast", "patient"] = "breast"
    """What is compared."""
    aggregate: Literal["mean", "mean_logit", "max", "noisy_or"] = "mean_logit"
    """A breast's score from its images' in a score file, a patient's being the larger of her breasts'; a package has its own way."""
    replicates: int = 2000
    """Bootstrap replicates of patients for the intervals."""
    seed: int = 0
    """Seed of the bootstrap and of the folds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where packages run."""
    tokens: int = 16384
    """Tokens (patches that are looked at) per forward pass of a package, at most."""
    jobs: int = 0
    """Threads that decode images; 0 = one per core."""

    def __post_init__(self) -> None:
        require(len(self.models) >= 2, "models", "must be at least two packages or score files")
        require(self.replicates >= 100, "replicates", "must be at least 100 for a 95 % interval")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(PredictorConfig):
    """Score mammograms with a model package: one row per image, breast and patient; heat maps and DICOM results by flag."""

    source: list[str]
    """What to score, one or more of: image, folder, zip, DICOMDIR, release folder or table, manifest; - reads such names from standard
    input, one a line."""
    out: Path
    """Folder for the score tables."""
    dataset: str = "auto"
    """Which release a folder or table of SOURCE is; auto = decided from its files."""
    resume: bool = False
    """Keep what an earlier run into OUT has scored with the same package and flags; score the rest."""
    parquet: bool = False
    """Also write each table as Parquet."""
    jsonl: bool = False
    """Also write each table as JSON lines."""
    explain: ExplanationName | None = None
    """Heat map of each image in OUT/overlays: integrated gradients, occlusion, gradient-weighted attention, or attention rollout, which
    shows where attention goes and not what speaks for cancer."""
    dicom: bool = False
    """DICOM results of DICOM images in OUT/dicom: a structured report per study; with a heat map, also its overlay and parametric map."""
    deidentify: str = ""
    """Take the patient's identity out of the DICOM results by dicognito. The value is its secret seed: images that are anonymised with
    the same seed fit the results. The tables keep the ids, as a key. Empty = keep the identity."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.source), "source", "names nothing to score")
        require_apart(self.out, self.source)
        require(not self.deidentify or self.dicom, "deidentify", "concerns DICOM results; add --dicom")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(PredictorConfig):
    """Score mammograms over HTTP: POST images to /scores, or drop them on the page at /. Uploads are deleted once they are scored.

    There is no login: whoever reaches the port may use it.
    """

    host: str = "127.0.0.1"
    """Address to listen at; 127.0.0.1 = this machine alone, 0.0.0.0 = every network that it is in."""
    port: int = 8000
    """Port to listen at; 0 = any free one."""
    upload_limit: int = 2000
    """Megabytes of a request, at most, and of a zip once it is unpacked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.port <= 65535, "port", "must lie between 0 and 65535")
        require(self.upload_limit >= 1, "upload_limit", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model package's network as an ONNX file.

    It takes images and the numbers of the patches to look at, and gives logits, for any batch. For crops of many sizes, and with sources,
    segments or fusion, it takes the tokens of one image and gives what the blocks make of them, in a file per model.
    """

    package: Path
    """Model package: a folder with model.safetensors and config.json, such as RUN/package."""
    out: Path
    """File to write; `--runtime onnx` and `openvino` look for PACKAGE/model.fp32.onnx or PACKAGE/model.int8.onnx."""
    precision: Literal["fp32", "int8"] = "fp32"
    """Arithmetic of the matrices."""
    calibration: Path | None = None
    """Manifest of crops that show which values occur, such as RUN/manifest.csv; needed for int8. Its split `test` is left out."""
    images: int = 64
    """Number of these crops to look at."""

    def __post_init__(self) -> None:
        require(self.images >= 1, "images", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole road on synthetic mammograms: synth, etl, train, evaluate, predict."""

    out: Path = Path("demo")
    """Folder for everything that the demo writes; an earlier demo there is replaced."""


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Print what a model package or a manifest holds."""

    target: Path
    """Model package folder or manifest.csv."""
