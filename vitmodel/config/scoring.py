"""Options of the verbs that score (predict, evaluate, compare, export), and of demo and info."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from vitmodel.config.base import Config, Needs, require, require_apart
from vitmodel.config.choices import DicomKind, ExplanationName
from vitmodel.config.labels import LabelRule


@dataclass(frozen=True, kw_only=True)
class PredictorConfig(Config):
    """How a model package runs; shared by predict, serve and evaluate."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input and output": ("package", "implausible", "atypical", "keep_atypical"),
        "model": ("ensemble", "flip"),
        "hardware": ("device", "runtime", "precision", "tokens", "segment_budget", "workers"),
    }
    NEEDS: ClassVar[Mapping[str, Needs]] = {
        "atypical": Needs("--runtime torch", lambda config: config.runtime == "torch"),
        "keep_atypical": Needs(
            "--runtime torch and --atypical above 0", lambda config: config.runtime == "torch" and config.atypical > 0
        ),
    }

    package: Path
    """Model package: a folder with model.safetensors and config.json, or hf:org/name on the hub."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the network. auto = the GPU if there is one."""
    tokens: int = 16384
    """Largest number of tokens (patches of tissue) per forward pass. It bounds the memory; a larger image is
    refused."""
    segment_budget: int = 0
    """Largest number of tokens encoded at once by a model that was trained with --segments; it bounds the memory.
    0 = the value of the training."""
    workers: int = 0
    """Number of threads that decode images. 0 = one per core."""
    ensemble: tuple[Path, ...] = ()
    """Further model packages with the same preprocessing, such as those of other folds. Scores are averaged."""
    flip: bool | None = None
    """Average the scores of each image and of its upside-down copy, which doubles the time in the network. none = as
    PACKAGE was calibrated."""
    implausible: Literal["package", "refuse", "warn"] = "package"
    """Treatment of images in which nothing looks like a breast in a screening mammogram: refuse them, or score them
    with a warning. package = as in the training of PACKAGE."""
    atypical: float = 0.001
    """Typicality below which an image is refused: the share of validation images that the network finds less like the
    training images. 0 = refuse none. Needs a package with typicality, and --runtime torch."""
    keep_atypical: bool = False
    """Score atypical images with a warning instead of refusing them."""
    runtime: Literal["torch", "onnx", "openvino"] = "torch"
    """Library that runs the network. onnx and openvino run PACKAGE/model.PRECISION.onnx, written by `vitmodel export`,
    on the CPU."""
    precision: Literal["fp32", "int8"] = "fp32"
    """Arithmetic of the matrix products. int8 needs --runtime onnx or openvino."""

    def _check(self) -> None:
        super()._check()
        require(0 <= self.atypical < 1, "atypical", "must be at least 0 and below 1")
        require(self.tokens >= 1, "tokens", "must be at least 1")
        require(self.segment_budget >= 0, "segment_budget", "must not be negative")
        require(self.workers >= 0, "workers", "must not be negative")
        onnx = self.runtime != "torch"
        require(self.precision == "fp32" or onnx, "precision", "int8 needs --runtime onnx or --runtime openvino")
        require(self.device != "cuda" or self.runtime == "torch", "device", "cuda needs --runtime torch")


@dataclass(frozen=True, kw_only=True)
class WantedConfig(Config):
    """The sensitivity that a threshold must reach; shared by train and evaluate."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"decision": ("sensitivity",)}

    sensitivity: float = 0.9
    """Target sensitivity of a threshold: `evaluate` also reports a cross-fitted threshold for it; `train` uses it with
    --objective sensitivity."""

    def _check(self) -> None:
        super()._check()
        require(0 < self.sensitivity <= 1, "sensitivity", "must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class DecisionConfig(WantedConfig):
    """How scores become probabilities and decisions. Both are fitted per breast on patients outside the training
    set."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"decision": ("calibration", "objective")}
    NEEDS: ClassVar[Mapping[str, Needs]] = {
        "sensitivity": Needs("--objective sensitivity", lambda config: config.objective == "sensitivity"),
    }

    calibration: Literal["platt", "temperature", "isotonic"] = "platt"
    """Map from scores to probabilities: platt = slope and intercept; temperature = slope only, which keeps the
    prevalence that SAMPLING shows; isotonic = any increasing curve, for hundreds of positives."""
    objective: Literal["f1", "pf1", "sensitivity"] = "f1"
    """Criterion of the threshold: f1 = largest F1; pf1 = largest expected F1, for calibrated probabilities; sensitivity
    = highest specificity that reaches SENSITIVITY."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(WantedConfig, PredictorConfig):
    """Evaluate a model package on a manifest: metrics.json and report.html with 95 % intervals.

    Metrics are per image, breast and patient. The results are also written to the package's MODEL_CARD.md, except those
    of an ensemble.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input and output": ("manifest", "out", "split", "label"),
        "decision": ("aggregate", "patient_aggregate"),
        "report": ("replicates", "seed", "prevalence", "audit", "card"),
    }

    manifest: Path
    """manifest.csv with labels."""
    out: Path
    """Output folder for metrics.json, report.html and the scores."""
    split: str = "auto"
    """Rows to evaluate: a value of the column `split`, or all. auto = test if the manifest has a test split, else
    all."""
    replicates: int = 2000
    """Number of bootstrap replicates over patients for the intervals."""
    seed: int = 0
    """Random seed of the bootstrap and of the cross-fitting folds."""
    aggregate: Literal["package", "mean", "mean_logit", "max", "noisy_or"] = "package"
    """How image probabilities are combined per breast. package = as stored in the package; its threshold was chosen
    for that."""
    patient_aggregate: Literal["package", "max", "mean", "noisy_or"] = "package"
    """How breast probabilities are combined per patient. package = the maximum or, for a model trained with --fusion,
    noisy-or."""
    prevalence: float | None = None
    """Also report the metrics at this fraction of positives, such as 0.021 in screening. none = only as measured."""
    audit: bool = True
    """Check for leakage: patients or pixels in two splits, and how well ids or metadata alone predict the label."""
    card: bool = True
    """Write the results to the package's MODEL_CARD.md."""
    label: str | None = None
    """Rule for the true labels, as in `vitmodel train --label`. none = the rule that PACKAGE was trained with."""

    def _resolve(self) -> None:
        super()._resolve()
        object.__setattr__(self, "label", self.label and LabelRule.parse(self.label).text)

    def _check(self) -> None:
        super()._check()
        require(self.replicates >= 100, "replicates", "must be at least 100 for a 95 % interval")
        require(self.prevalence is None or 0 < self.prevalence < 1, "prevalence", "must lie between 0 and 1, exclusive")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Config):
    """Compare models on the same images, breasts or patients.

    All differences have paired 95 % intervals; AUROCs are compared with DeLong's test.

    Each model is a package or a score file: scores.csv, breast_scores.csv or a submission.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input and output": ("models", "manifest", "out", "split", "label"),
        "decision": ("level", "aggregate"),
        "report": ("replicates", "seed"),
        "hardware": ("device", "tokens", "workers"),
    }
    NEEDS: ClassVar[Mapping[str, Needs]] = {
        "aggregate": Needs("--level breast or --level patient", lambda config: config.level != "image"),
    }

    models: tuple[Path, ...]
    """Model packages (folders, or hf:org/name) or score files. All are compared with the first."""
    manifest: Path
    """manifest.csv with labels."""
    out: Path | None = None
    """Output folder for comparison.json. none = print only."""
    split: str = "auto"
    """Rows to compare on: a value of the column `split`, or all. auto = test if the manifest has a test split, else
    all."""
    label: str | None = None
    """Rule for the true labels, as in `vitmodel train --label`. none = the rule that the first package was trained
    with, or cancer if there is no package."""
    level: Literal["image", "breast", "patient"] = "breast"
    """Unit of the comparison."""
    aggregate: Literal["mean", "mean_logit", "max", "noisy_or"] = "mean_logit"
    """How the image scores of a score file are combined per breast; a patient's score is the maximum of the breasts.
    Packages use their own rule."""
    replicates: int = 2000
    """Number of bootstrap replicates over patients for the intervals."""
    seed: int = 0
    """Random seed of the bootstrap and of the cross-fitting folds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the packages' networks. auto = the GPU if there is one."""
    tokens: int = 16384
    """Largest number of tokens (patches of tissue) per forward pass of a package. It bounds the memory."""
    workers: int = 0
    """Number of threads that decode images. 0 = one per core."""

    def _resolve(self) -> None:
        super()._resolve()
        object.__setattr__(self, "label", self.label and LabelRule.parse(self.label).text)

    def _check(self) -> None:
        super()._check()
        require(len(self.models) >= 2, "models", "must be at least two packages or score files")
        require(self.replicates >= 100, "replicates", "must be at least 100 for a 95 % interval")
        require(self.tokens >= 1, "tokens", "must be at least 1")
        require(self.workers >= 0, "workers", "must not be negative")


def check_dicom_kinds(dicom: tuple[str, ...], explain: str | None) -> None:
    """Raise UsageError if `dicom` names kinds of results that are made from heat maps and there are none."""
    if explain is None:
        unmade = "sc" if dicom == ("sc",) else ", ".join(sorted({"seg", "pm", "cad"} & set(dicom)))
        require(not unmade, "dicom", f"{unmade} is made from heat maps; add --explain METHOD, or leave it out")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(PredictorConfig):
    """Score mammograms with a model package: one row per image, breast and patient.

    Heat maps and DICOM results are optional.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input and output": ("source", "out", "dataset", "resume"),
        "report": ("parquet", "jsonl", "explain", "dicom", "deidentify"),
    }
    NEEDS: ClassVar[Mapping[str, Needs]] = {"deidentify": Needs("--dicom", lambda config: bool(config.dicom))}
    SWITCHES: ClassVar[Mapping[str, tuple[str, ...]]] = {"dicom": ("sr", "sc")}

    source: tuple[str, ...]
    """What to score: images, folders, zips, tars, DICOMDIRs, release folders or tables, manifests. - reads such
    names from standard input, one per line."""
    out: Path
    """Output folder for the score tables."""
    dataset: str = "auto"
    """Kind of release that a folder or table of SOURCE is. auto = detected from its files."""
    resume: bool = False
    """Keep the scores of an earlier run with the same package and flags in OUT, and score the rest."""
    parquet: bool = False
    """Also write each table as Parquet."""
    jsonl: bool = False
    """Also write each table as JSON lines."""
    explain: ExplanationName | None = None
    """Write a heat map of each image to OUT/overlays: integrated = integrated gradients; occlusion; gradient =
    gradient-weighted attention; rollout = attention rollout, which shows attention and not evidence for cancer."""
    dicom: tuple[DicomKind, ...] = ()
    """Write DICOM results for DICOM images to OUT/dicom: sr = structured reports, outlines on images for viewers and
    text on each study for people; sc = each heat map as a picture, if --explain is given; gsps = the outlines as a
    presentation state per image. Only with --explain: seg = the region where the heat map is highest; pm = the heat
    map's values; cad = a mammography CAD report per study. Without a value: sr,sc."""
    deidentify: str = ""
    """Remove the patient's identity from the DICOM results with dicognito. The value is the secret seed; images
    anonymised with the same seed match the results. The score tables keep the ids. none = keep the identity."""

    def _check(self) -> None:
        super()._check()
        require(bool(self.source), "source", "is empty; name at least one image, folder or table to score")
        require_apart(self.out, self.source)
        check_dicom_kinds(self.dicom, self.explain)

    def _resolve(self) -> None:
        super()._resolve()
        object.__setattr__(self, "dicom", tuple(kind for kind in get_args(DicomKind) if kind in self.dicom))


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Write the network of a model package as an ONNX file.

    Inputs are images and the indices of their tissue patches, outputs are logits, for any batch size. For models with
    crops of many sizes, sources, segments or fusion, the file holds only the blocks, from the input tokens of one image
    to its output tokens; there is one file per model.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input and output": ("package", "out"),
        "model": ("precision", "calibration", "images"),
    }
    NEEDS: ClassVar[Mapping[str, Needs]] = {
        "calibration": Needs("--precision int8", lambda config: config.precision == "int8"),
        "images": Needs("--precision int8", lambda config: config.precision == "int8"),
    }

    package: Path
    """Model package: a folder with model.safetensors and config.json, or hf:org/name on the hub."""
    out: Path
    """Output file. --runtime onnx and openvino look for PACKAGE/model.fp32.onnx or PACKAGE/model.int8.onnx."""
    precision: Literal["fp32", "int8"] = "fp32"
    """Arithmetic of the matrix products."""
    calibration: Path | None = None
    """Manifest of crops for the value ranges of int8, such as RUN/manifest.csv; required for int8. Its test split is
    left out."""
    images: int = 64
    """Number of crops from CALIBRATION to use."""

    def _check(self) -> None:
        super()._check()
        require(self.images >= 1, "images", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """Run the whole pipeline on synthetic mammograms: synth, etl, train, evaluate, predict."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"input and output": ("out",)}

    out: Path = Path("demo")
    """Output folder. An earlier demo in it is replaced."""


@dataclass(frozen=True, kw_only=True)
class DriftConfig(Config):
    """Compare the images of runs of predict or evaluate with those of the training.

    Writes drift.html, drift.png and drift.csv: the distributions of typicality, grey values, breast size, view, side
    and machine, with a population stability index per run and column.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"input and output": ("package", "scores", "out")}

    package: Path
    """Model package: a folder with model.safetensors and config.json, such as RUN/package."""
    scores: tuple[Path, ...]
    """One or several scores.csv, in the order of time."""
    out: Path = Path("drift")
    """Output folder."""

    def _check(self) -> None:
        super()._check()
        require(bool(self.scores), "scores", "is empty; name at least one scores.csv")


@dataclass(frozen=True, kw_only=True)
class InfoConfig(Config):
    """Print the contents of a model package or of a manifest."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"input and output": ("target",)}

    target: Path
    """Model package (a folder, or hf:org/name) or manifest.csv."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Config):
    """Check that a model package is complete, unchanged and usable, and print what was checked."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"input and output": ("package",)}

    package: Path
    """Model package: a folder with model.safetensors and config.json, such as RUN/package."""
