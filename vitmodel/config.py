"""One frozen dataclass per stage; a field is a flag and a YAML key, its docstring the --help text. Knows no stage."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vitmodel.utils import UsageError


class Size(NamedTuple):
    """Height and width in pixels, written as in `1024x512`."""

    height: int
    width: int

    @classmethod
    def parse(cls, text: str | Size) -> Size:
        """`HxW` or `N` (a square) as a size. Raises ValueError."""
        if isinstance(text, Size):
            return text
        parts = str(text).lower().split("x")
        if len(parts) > 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"a size is HEIGHTxWIDTH in pixels, such as 1024x512, not {text!r}")
        return cls(int(parts[0]), int(parts[-1]))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def require(condition: bool, field: str, problem: str) -> None:
    """Refuse an impossible value by the name of its field. Raises UsageError."""
    if not condition:
        raise UsageError(f"{field}: {problem}")


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """Write a synthetic, RSNA-shaped mammography release: seeded phantoms as DICOM with labels and lesion boxes."""

    out: Path
    """Folder to write the release to."""
    patients: int = 40
    """Number of patients; four images each."""
    seed: int = 0
    """Every pixel follows from the seed."""
    size: Size = Size(2048, 1664)
    """Image height x width in pixels."""
    difficulty: float = 0.5
    """0 = large, bright lesions; 1 = small, faint ones."""
    positives: float = 0.3
    """Fraction of patients with a cancer (in one breast, seldom in both)."""
    faults: bool = False
    """Also write a few files that are broken on purpose."""
    jobs: int = 0
    """Worker processes; 0 = one per core."""

    def __post_init__(self) -> None:
        require(self.patients > 0, "patients", "must be at least 1")
        require(min(self.size) >= 128, "size", "must be at least 128x128 pixels")
        require(0 <= self.difficulty <= 1, "difficulty", "must lie between 0 and 1")
        require(0 <= self.positives <= 1, "positives", "must lie between 0 and 1")
        require(self.jobs >= 0, "jobs", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From a file's pixels to a model's input; travels in the model package so that prediction repeats training."""

    size: Size = Size(1024, 512)
    """Height x width of the crop in pixels; the breast keeps its aspect and is padded with air."""
    mm_per_pixel: float | None = None
    """Crop at this scale instead, as large as each breast is; images of unknown pixel spacing are refused. SIZE is then what the
    model's positions are learned for."""
    bits: Literal[8, 16] = 8
    """Bits per pixel of the crop."""
    voi: int = 1
    """Which of several stored VOI LUTs or windows to use, counted from 1; the manifest names the one that was used."""
    for_processing: Literal["refuse", "log"] = "refuse"
    """Raw detector data (FOR PROCESSING): refuse it, or show the inverted logarithm."""
    exact: bool = False
    """Decode at full resolution even where a lower JPEG 2000 level covers the size."""

    def __post_init__(self) -> None:
        require(min(self.size) >= 16, "size", "must be at least 16x16 pixels")
        scale_is_sane = self.mm_per_pixel is None or 0.02 <= self.mm_per_pixel <= 2
        require(scale_is_sane, "mm_per_pixel", "must lie between 0.02 and 2 (a mammogram has 0.05 to 0.1)")
        require(self.voi >= 1, "voi", "is counted from 1")

    def to_json(self) -> str:
        """One line that names every field; stands in the manifest beside each crop and in the package."""
        values = {field.name: getattr(self, field.name) for field in fields(Preprocessing)}
        return json.dumps(values | {"size": str(self.size)})

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        """The inverse of `to_json`. Raises UsageError where a field is unknown to this version."""
        values = json.loads(text)
        unknown = sorted(set(values) - {field.name for field in fields(Preprocessing)})
        require(not unknown, "preprocessing", f"fields unknown to this version of vitmodel: {', '.join(unknown)}")
        return Preprocessing(**values | {"size": Size.parse(values["size"])})


@dataclass(frozen=True, kw_only=True)
class ETLConfig(Preprocessing):
    """Crop, orient and resize every mammogram of an archive; write PNGs and manifest.csv, one row per image, refused ones too.

    Running it again does only what is missing or changed.
    """

    source: Path
    """Release folder, folder of images, one file, or a manifest."""
    out: Path
    """Folder for the crops and manifest.csv."""
    dataset: str = "auto"
    """Which release SOURCE is (rsna, vindr, class_folders, dicom_folder, ...); auto = decided from its files."""
    jobs: int = 0
    """Parallel workers; 0 = one per core."""
    backend: Literal["threads", "processes", "dask"] = "threads"
    """What a worker is. A file that kills or hangs its decoder costs a process no more than that file."""
    transcode: Literal["none", "htj2k"] = "none"
    """Also keep a lossless HTJ2K copy of each DICOM below OUT/htj2k; its manifest.csv is a source that later runs read much faster."""
    scheduler: str = ""
    """Address of the dask scheduler, such as tcp://host:8786; empty = a local cluster. Only with backend dask."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.jobs >= 0, "jobs", "must not be negative")
        require(not self.scheduler or self.backend == "dask", "scheduler", "needs --backend dask")

    @property
    def preprocessing(self) -> Preprocessing:
        """The part that travels with a trained model."""
        return Preprocessing(**{field.name: getattr(self, field.name) for field in fields(Preprocessing)})


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of training crops that leave a mammogram a mammogram; 0 switches one off."""

    flip: float = 0.5
    """Probability of turning the crop upside down."""
    mirror: float = 0.0
    """Probability of mirroring it left to right; a crop has its chest wall at the left, so this is for whole images."""
    area: float = 1.0
    """Smallest share of the image to cut out, at an aspect of 3/4 to 4/3 of its own, and enlarge to the whole; 1 = cut nothing."""
    rotate: float = 10.0
    """Largest rotation in degrees."""
    scale: float = 0.1
    """Largest relative change of size."""
    shift: float = 0.04
    """Largest shift as a fraction of height and width."""
    gamma: float = 0.2
    """Largest change of the logarithm of gamma."""
    contrast: float = 0.15
    """Largest relative change of contrast."""
    noise: float = 0.01
    """Largest standard deviation of Gaussian noise on tissue, in units of the grey range."""
    elastic: float = 0.0
    """Largest elastic displacement as a fraction of the width."""
    window: float = 0.0
    """Largest shift of the grey that becomes black, and of the one that becomes white, in units of the grey range."""
    blur: float = 0.0
    """Largest standard deviation of a Gaussian blur in pixels."""
    holes: int = 0
    """Largest number of square holes, filled with the mean of the tissue."""
    hole: float = 0.15
    """Side of a hole as a fraction of the width."""

    def __post_init__(self) -> None:
        for name in ("flip", "mirror"):
            require(0 <= getattr(self, name) <= 1, f"augment.{name}", "is a probability between 0 and 1")
        require(0 < self.area <= 1, "augment.area", "must lie above 0, at most 1")
        for name in ("rotate", "scale", "shift", "gamma", "contrast", "noise", "elastic", "window", "blur", "holes"):
            require(getattr(self, name) >= 0, f"augment.{name}", "must not be negative")
        require(self.scale < 1, "augment.scale", "must be below 1")
        require(self.contrast < 1, "augment.contrast", "must be below 1")
        require(self.window < 0.5, "augment.window", "must be below 0.5")
        require(0 < self.hole <= 1, "augment.hole", "must lie above 0, at most 1")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every training has in common: the network and how its weights are changed."""

    model: Literal["vit_micro", "vit_tiny", "vit_small", "vit_base", "vit_large"] = "vit_small"
    """Preset of width, depth and heads, patch 16."""
    pool: Literal["cls", "mean", "attention"] = "mean"
    """What the head reads: the class token, the mean of all tokens, or an attention over them."""
    stem: Literal["linear", "conv"] = "linear"
    """Patch embedding: one linear map per patch, or early convolutions."""
    drop_path: float = 0.1
    """Stochastic depth: rate at the last block."""
    epochs: int = 30
    """Passes over the training set."""
    batch_size: int = 32
    """Images per step, at most; over all devices."""
    tokens: int = 16384
    """Tokens (patches that are looked at) per step and device, at most; 13 or so crops of 1024x512. It bounds the memory."""
    packed: bool = True
    """Leave out patches that show air alone; the package remembers it."""
    accumulate: int = 1
    """Steps whose gradients are averaged before the weights change."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or gradient descent with a momentum of 0.9."""
    lr: float = 3e-4
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Weight decay on weight matrices; decoupled in AdamW."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each layer to the one below it; 1 = all learn alike."""
    warmup: float = 0.1
    """Fraction of the training over which the learning rate rises; then it falls as a cosine to 1 %."""
    clip: float = 1.0
    """Largest norm of the gradient; a longer one is shortened to it. 0 = no limit."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of training crops."""
    seed: int = 0
    """Splits, initial weights, order and augmentation follow from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    devices: int = 1
    """How many of them, on this machine; one process each."""
    nodes: int = 1
    """Machines, each with that many devices; start the same command on each with torchrun or SLURM."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """What several devices hold: a copy of the model each, or (CUDA only) a shard of it."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass; auto = bf16 where the GPU has it, else fp16; fp32 on a CPU."""
    compile: bool = False
    """Compile the blocks with torch.compile: slower to start, faster on a GPU."""
    workers: int = 2
    """Processes that load crops; 0 = none beside the training process."""
    unreadable: int = 10
    """Stop when more crops than this cannot be read; until then they are named and left out."""
    nonfinite: int = 10
    """Stop after this many steps whose loss or gradient is not finite; until then they are named and left out."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases; auto = online where an API key is set, else offline."""
    resume: bool = False
    """Go on from RUN's last checkpoint, to the same weights as a run that was not interrupted."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "tokens", "accumulate", "devices", "nodes"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("workers", "weight_decay", "clip", "unreadable", "nonfinite"):
            require(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("warmup", "drop_path"):
            require(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
        require(0 < self.layer_decay <= 1, "layer_decay", "must be above 0 and at most 1")
        require(self.lr > 0, "lr", "must be above 0")
        processes = self.devices * self.nodes
        require(self.batch_size % processes == 0, "batch_size", f"must be a multiple of the {processes} processes that share it")
        require(self.strategy == "ddp" or self.device != "cpu", "strategy", "fsdp needs --device cuda")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainingConfig):
    """Train a Vision Transformer on a manifest's crops; write a run folder with checkpoints, curves and a model package."""

    manifest: Path
    """manifest.csv as `vitmodel etl` wrote it."""
    run: Path
    """Run folder to write; the model package is RUN/package."""
    weights: Path | None = None
    """Start from these weights: a timm, Hugging Face or Google file, a checkpoint, or a model package (a previous best)."""
    freeze: int = 0
    """Epochs at the start in which the head alone learns, on features of the weights; as many as EPOCHS = a linear probe."""
    loss: Literal["bce", "focal", "pf1"] = "bce"
    """Binary cross entropy, focal loss (gamma 2), or the mean of BCE and 1 - probabilistic F1."""
    smoothing: float = 0.0
    """Positives are taught as 1 - SMOOTHING; negatives as 0."""
    auxiliary: tuple[Literal["birads", "density", "invasive", "biopsy", "difficult_negative_case", "view", "age"], ...] = ()
    """Columns that the features must tell, too, where they are known, such as [density,age]; the package has no heads for them."""
    auxiliary_weight: float = 0.1
    """Weight of each such loss beside the main one."""
    sampling: Literal["natural", "positive", "balanced"] = "balanced"
    """What an epoch shows: each image once; the same with a cancer in every batch; or cancers and negatives equally often."""
    ema: float = 0.0
    """Decay per step of an exponential moving average of the weights, which is then validated and packaged, such as 0.999; 0 = none."""
    val: float = 0.15
    """Fraction of patients for validation: early stopping, calibration and threshold."""
    test: float = 0.15
    """Fraction of patients held out for `vitmodel evaluate`."""
    folds: int = 0
    """Cross-validation: train this many models, each on all folds but one, and package them as an ensemble; VAL and TEST are not used."""
    splits: Path | None = None
    """CSV file of patient_id and split (or, with FOLDS, fold), such as an edited RUN/splits.csv, in place of drawn ones."""
    monitor: Literal["auroc", "f1"] = "auroc"
    """Validation figure that picks the best epoch: image-level AUROC or macro F1. With FOLDS the last epoch is taken."""
    patience: int = 10
    """Stop after this many epochs without a better figure; 0 = never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patience", "freeze", "auxiliary_weight"):
            require(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("val", "test", "smoothing", "ema"):
            require(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
        require(not self.ema or self.strategy == "ddp", "ema", "needs --strategy ddp, where each device holds the whole model")
        require(self.folds == 0 or self.folds >= 2, "folds", "is 0 (none) or at least 2")
        require(self.folds == 0 or self.devices * self.nodes == 1, "folds", "are trained one after another by one process: use --devices 1")
        require(self.val > 0, "val", "must be above 0: the best epoch, calibration and threshold need patients that were not trained on")
        require(self.val + self.test < 1, "val", "and test together must leave patients for training")


@dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainConfig):
    """Search for a good recipe: many short trainings, bad ones stopped early; the flags of `train` are what all of them share."""

    trials: int = 30
    """Trainings in all; with RESUME, those that RUN has already count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.trials >= 1, "trials", "must be at least 1")
        require(self.folds == 0, "folds", "are not for tuning, which chooses on the validation split")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Teach a Vision Transformer without labels, or on phantoms, and write a package for `vitmodel train --weights`."""

    run: Path
    """Run folder to write; the package is RUN/package."""
    manifest: Path | None = None
    """Unlabelled crops to learn from, by masked autoencoding; without one the model learns to find cancers in phantoms made on the fly."""
    ratio: float = 0.75
    """Masked autoencoding: share of the tissue's patches to hide."""
    size: Size = Size(1024, 512)
    """Phantoms: height x width of the crop in pixels."""
    phantoms: int = 5000
    """Phantoms: number per epoch, no two alike."""
    difficulty: float = 0.5
    """Phantoms: 0 = large, bright lesions; else anything from that to small, faint ones (1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.ratio < 1, "ratio", "must lie between 0 and 1")
        require(self.phantoms >= 2, "phantoms", "must be at least 2")
        require(0 <= self.difficulty <= 1, "difficulty", "must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class VersionsConfig:
    """Train the original recipe's three versions and ours on one patient-wise split; write a table and a picture of their curves."""

    source: Path
    """Release folder, folder of images, or a manifest with labels."""
    out: Path
    """Folder for crops, whole images, one run per version, versions.md and versions.png."""
    recipes: Path = Path("configs/versions")
    """Folder with backbone.yaml, v2.yaml and v3.yaml, recipes of `vitmodel train`."""
    ours: Path = Path("configs/rsna.yaml")
    """Recipe to compare them with, trained on the crops."""
    weights: Path | None = None
    """Weights that the backbone, and ours, start from; none = from scratch."""
    size: Size = Size(224, 224)
    """Height x width in pixels of the original's images, whole or cropped."""
    our_size: Size = Size(1024, 512)
    """Height x width in pixels of our crops."""
    jobs: int = 0
    """Parallel workers that read images; 0 = one per core."""

    def __post_init__(self) -> None:
        require(self.jobs >= 0, "jobs", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """How a model package is run; shared by evaluate, predict and serve."""

    package: Path
    """Model package: a folder with model.safetensors and config.json, such as RUN/package."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs."""
    tokens: int = 16384
    """Tokens (patches that are looked at) per forward pass, at most. It bounds the memory; a larger image is refused."""
    jobs: int = 0
    """Threads that decode images; 0 = one per core."""
    ensemble: list[Path] = field(default_factory=list)
    """Further packages, trained alike, such as those of other folds; give the flag once for each. Scores are the mean."""
    flip: bool = False
    """Average over each image and the same upside down: twice the time in the network."""
    runtime: Literal["torch", "onnx", "openvino"] = "torch"
    """What runs the network; onnx and openvino take PACKAGE/model.PRECISION.onnx, which `vitmodel export` writes, and run on the CPU."""
    precision: Literal["fp32", "int8"] = "fp32"
    """Arithmetic of the network's matrices; int8 needs runtime onnx or openvino."""

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "tokens", "must be at least 1")
        require(self.jobs >= 0, "jobs", "must not be negative")
        require(self.precision == "fp32" or self.runtime != "torch", "precision", "int8 needs --runtime onnx or --runtime openvino")
        require(self.device != "cuda" or self.runtime == "torch", "device", "cuda needs --runtime torch")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(PredictorConfig):
    """Measure a model package on a manifest: metrics.json and report.html, per image, breast and patient, with 95 % intervals.

    Its results also go into the package's MODEL_CARD.md.
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
    aggregate: Literal["package", "mean", "max", "noisy_or"] = "package"
    """A breast's probability from its images'; package = as the package decides, for which its threshold was chosen."""
    patient_aggregate: Literal["max", "mean", "noisy_or"] = "max"
    """A patient's probability from her breasts'."""
    sensitivity: float = 0.9
    """Sensitivity that one of the cross-fitted thresholds is chosen for."""
    prevalence: float | None = None
    """Report the figures at this fraction of positives too, such as 0.021 in screening; None = only as measured."""
    audit: bool = True
    """Look for leaks: patients and pixels in two splits, and what ids or metadata alone tell."""
    card: bool = True
    """Write the results into the package's MODEL_CARD.md."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.replicates >= 100, "replicates", "must be at least 100 for a 95 % interval")
        require(0 < self.sensitivity <= 1, "sensitivity", "must be above 0, at most 1")
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
    aggregate: Literal["mean", "max", "noisy_or"] = "mean"
    """A unit's score from its images'."""
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
class LeaveOutConfig:
    """Train without each site (machine, data set) in turn and measure on it: OUT/<by>-<value>/ and OUT/summary.json."""

    manifest: Path
    """manifest.csv as `vitmodel etl` wrote it; its splits are not used."""
    out: Path
    """Folder for a manifest, a run and a report of each."""
    by: Literal["site_id", "machine_id", "dataset"] = "machine_id"
    """Column whose values are left out one after the other. All images of a patient who has one are left out."""
    train: str = ""
    """Flags of `vitmodel train`, such as '--model vit_tiny --epochs 5'."""
    evaluate: str = ""
    """Flags of `vitmodel evaluate`."""


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
    explain: Literal["rollout", "gradient", "occlusion", "integrated"] | None = None
    """Heat map of each image in OUT/overlays: attention rollout, gradient-weighted attention, occlusion or integrated gradients."""
    dicom: bool = False
    """DICOM results of DICOM images in OUT/dicom: a structured report per study; with a heat map, also its overlay and parametric map."""
    deidentify: str = ""
    """Take the patient's identity out of the DICOM results by dicognito. The value is its secret seed: images that are anonymised with
    the same seed fit the results. The tables keep the ids, as a key. Empty = keep the identity."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.source), "source", "names nothing to score")
        require(not self.deidentify or self.dicom, "deidentify", "concerns DICOM results; add --dicom")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model package's network as an ONNX file: images and the numbers of the patches to look at -> logits, any batch."""

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


def to_command(verb: str, config: Any) -> str:
    """The command line that gives `config`: what has no default by its place, and every flag that differs from its default."""
    import shlex

    words, flags = ["vitmodel", verb], []
    for each in fields(config):
        value, flag = getattr(config, each.name), "--" + each.name.replace("_", "-")
        values = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        if each.default is MISSING and each.default_factory is MISSING:
            words += values
        elif isinstance(value, bool) and value != each.default:
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif value != each.default:
            flags += [word for item in values for word in (flag, item)]
    return shlex.join(words + flags)


def to_yaml(verb: str, config: Any, path: Path) -> str:
    """`config` as a YAML recipe that `vitmodel VERB --config path` runs again."""
    import yaml

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path | Size) else value

    return f"# vitmodel {verb} --config {path}\n" + yaml.safe_dump(plain(config), sort_keys=False)
