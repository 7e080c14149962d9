"""Everything that learns: augmentation, training, search, pretraining, the versions, leaving a site out."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from vitmodel.config.base import Size, require
from vitmodel.config.choices import LossName
from vitmodel.config.scoring import DecisionConfig


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
class SegmentsConfig:
    """How a large image is read in parts; travels in the model package."""

    segments: int = 0
    """Read each image in overlapping squares of this many pixels, where there is tissue, and small as a whole; 0 = as it is."""
    segment_overlap: int = 64
    """Pixels that neighbouring segments share, at least."""
    segment_context: int = 512
    """Longer side in pixels of the small view of the whole."""
    segment_budget: int = 4096
    """Tokens of segments that are encoded at once, at most; with segments it bounds the memory, in place of TOKENS."""
    segment_top: int = 0
    """Read this many segments, those that the small view finds most telling; 0 = all."""
    segment_samples: int = 0
    """Training: segments per image and step, those with a known lesion among them, the others by chance; 0 = as in prediction."""

    def __post_init__(self) -> None:
        for name in ("segments", "segment_overlap", "segment_top", "segment_samples"):
            require(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("segment_context", "segment_budget"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
        require(not self.segments or self.segment_overlap < self.segments, "segment_overlap", "must be smaller than a segment")


@dataclass(frozen=True, kw_only=True)
class IntegrationConfig:
    """Images of different sources, and those of one exam: learned apart, then integrated."""

    fusion: bool = False
    """Read the images of a patient together: items are exams, losses are per image, breast and patient, figures per breast."""
    asymmetry: bool = True
    """With FUSION: each breast is seen beside the other one."""
    view_dropout: float = 0.1
    """With FUSION, in training: chance that an image is left out of its exam; one of each labelled breast stays."""
    sources: str = ""
    """Columns of the manifest whose values are learned apart, such as view,machine_id: each value has small parts of the network."""
    source_images: int = 20
    """Training images that a value needs for parts of its own; rarer and unknown values share theirs."""
    source_dropout: float = 0.1
    """Training: chance that an image passes as one of an unknown source, for each of SOURCES, so that a new machine can be read."""

    def __post_init__(self) -> None:
        for name in ("view_dropout", "source_dropout"):
            require(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
        require(self.source_images >= 1, "source_images", "must be at least 1")
        require(self.fusion or self.asymmetry, "asymmetry", "is that of --fusion, which is off")

    @property
    def columns(self) -> tuple[str, ...]:
        """The names in SOURCES."""
        return tuple(dict.fromkeys(filter(None, (name.strip() for name in self.sources.split(",")))))


AUTO = -1
FROM_SCRATCH = {"epochs": 30, "lr": 3e-4, "layer_decay": 1.0, "batch_size": 32, "freeze": 0, "flip_average": False}
# the best of benchmarks/recipe.py, see dev/LOG.md; but for sampling: there every other image had a cancer
FROM_WEIGHTS = {"epochs": 6, "lr": 1e-4, "layer_decay": 0.75, "batch_size": 16, "freeze": 1, "flip_average": True}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every training has in common: the network and how its weights are changed."""

    model: Literal[
        "vit_micro", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_small8", "vit_base8", "vit_small14", "vit_base14",
        "vit_large14", "vit_small14_reg4", "vit_base14_reg4", "vit_large14_reg4",
    ] = "vit_small"  # fmt: skip
    """Preset of width, depth and heads, patch 16; 8 is for DINO's weights, 14 for DINOv2's, 14_reg4 for those with registers."""
    pool: Literal["cls", "mean", "attention"] = "mean"
    """What the head reads: the class token, the mean of all tokens, or an attention over them."""
    stem: Literal["linear", "conv"] = "linear"
    """Patch embedding: one linear map per patch, or early convolutions."""
    drop_path: float = 0.1
    """Stochastic depth: rate at the last block."""
    epochs: int = AUTO
    """Passes over the training set; -1 = 6 from given weights, 30 from scratch."""
    batch_size: int = AUTO
    """Images, or with FUSION exams, per step, at most; over all devices. -1 = 16 from given weights, 32 from scratch."""
    tokens: int = 16384
    """Tokens (patches that are looked at) per step and device, at most; 13 or so crops of 1024x512. It bounds the memory."""
    packed: bool = True
    """Leave out patches that show air alone; the package remembers it."""
    accumulate: int = 1
    """Steps whose gradients are averaged before the weights change."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or gradient descent with a momentum of 0.9."""
    lr: float = AUTO
    """Peak learning rate; -1 = 1e-4 from given weights, 3e-4 from scratch."""
    weight_decay: float = 0.05
    """Weight decay on weight matrices; decoupled in AdamW."""
    layer_decay: float = AUTO
    """Factor of the learning rate from each layer to the one below, 1 = all learn alike; -1 = 0.75 from given weights, 1 from scratch."""
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
    """Arithmetic of training's matrices; auto = fp32 on a CPU; on a GPU bf16 where it computes with that, else fp16."""
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
        for name, value in (FROM_WEIGHTS if getattr(self, "weights", None) else FROM_SCRATCH).items():
            if getattr(self, name, value) in (AUTO, None):
                object.__setattr__(self, name, value)
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

    @property
    def idles(self) -> bool:
        """Whether some weights get no gradient in some steps, which several processes must know of."""
        return False

    @property
    def most_tokens(self) -> int:
        """Tokens per step and device, at most."""
        return self.tokens


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DecisionConfig, IntegrationConfig, SegmentsConfig, TrainingConfig):
    """Train a Vision Transformer on a manifest's crops; write a run folder with checkpoints, curves and a model package."""

    manifest: Path
    """manifest.csv as `vitmodel etl` wrote it; several, with commas between them, are merged, and what one does not know stays unknown."""
    run: Path
    """Run folder to write; the model package is RUN/package."""
    weights: Path | None = None
    """Start from these weights: a timm, Hugging Face or Google file, a checkpoint, or a model package (a previous best)."""
    freeze: int = AUTO
    """Epochs at the start in which the head alone learns, on features of the weights; as many as EPOCHS = a linear probe. -1 = 1 from
    given weights, else 0."""
    loss: LossName = "bce"
    """Binary cross entropy, focal loss (gamma 2), or the mean of BCE and 1 - probabilistic F1."""
    smoothing: float = 0.0
    """Positives are taught as 1 - SMOOTHING; negatives as 0."""
    auxiliary: tuple[Literal["birads", "density", "invasive", "biopsy", "difficult_negative_case", "view", "age"], ...] = ()
    """Columns that the features must tell, too, where they are known, such as [density,age]; the package has no heads for them."""
    auxiliary_weight: float = 0.1
    """Weight of each such loss beside the main one."""
    sampling: Literal["natural", "positive", "balanced"] = "balanced"
    """What an epoch shows: each image once; the same with a cancer in every batch; or cancers and negatives equally often."""
    checkpointing: bool = False
    """Activation checkpointing: keep each block's input alone and compute the rest again on the way back; a quarter slower."""
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
    """Validation figure that picks the best epoch: AUROC or macro F1, per image, with FUSION per breast. With FOLDS the last epoch is
    taken."""
    patience: int = 10
    """Stop after this many epochs without a better figure; 0 = never."""
    flip_average: bool | None = None
    """Score by the mean logit of each image and the same upside down: what calibration is fitted on, and what the package does from then
    on; twice the work. Left out, it is so with given weights. The figures of single epochs are those of the image alone."""

    def __post_init__(self) -> None:
        for part in (TrainingConfig, SegmentsConfig, IntegrationConfig, DecisionConfig):
            part.__post_init__(self)
        for name in ("patience", "freeze", "auxiliary_weight"):
            require(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("val", "test", "smoothing", "ema"):
            require(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
        require(not self.ema or self.strategy == "ddp", "ema", "needs --strategy ddp, where each device holds the whole model")
        require(self.folds == 0 or self.folds >= 2, "folds", "is 0 (none) or at least 2")
        require(self.folds == 0 or self.devices * self.nodes == 1, "folds", "are trained one after another by one process: use --devices 1")
        require(self.val > 0, "val", "must be above 0: the best epoch, calibration and threshold need patients that were not trained on")
        require(self.val + self.test < 1, "val", "and test together must leave patients for training")

    @property
    def most_tokens(self) -> int:
        """Tokens per step and device, at most; with segments their own budget bounds the memory instead."""
        return sys.maxsize if self.segments else self.tokens

    @property
    def idles(self) -> bool:
        return bool(self.freeze or self.auxiliary)

    @property
    def segmenting(self) -> SegmentsConfig | None:
        """The part that travels with the model; None = images are read as they are."""
        return SegmentsConfig(**{field.name: getattr(self, field.name) for field in fields(SegmentsConfig)}) if self.segments else None


@dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainConfig):
    """Search for a good recipe: many short trainings, bad ones stopped early; the flags of `train` are what all of them share."""

    trials: int = 30
    """Trainings in all; with RESUME, those that RUN has already count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.trials >= 1, "trials", "must be at least 1")
        require(self.folds == 0, "folds", "are not for tuning, which chooses on the validation split")
        require(self.devices * self.nodes == 1, "devices", "must be 1: trials are trained one after another by one process")


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

    @property
    def idles(self) -> bool:
        return self.manifest is not None  # the head, where pixels are painted


@dataclass(frozen=True, kw_only=True)
class VersionsConfig:
    """Train the original recipe's three versions and ours on one patient-wise split; write a table and a picture of their curves."""

    source: Path
    """Release folder, folder of images, or a manifest with labels."""
    out: Path
    """Folder for crops, whole images, one run per version, versions.md and versions.png."""
    recipes: Path | None = None
    """Folder with backbone.yaml, v2.yaml and v3.yaml, recipes of `vitmodel train`; none = the packaged ones."""
    ours: Path = Path("rsna")
    """Recipe to compare them with, trained on the crops: a YAML file or the name of a packaged recipe."""
    weights: Path | None = None
    """Weights that the backbone starts from, such as jx_vit_base_patch16_224_in21k.pth; none = from scratch."""
    our_weights: Path | None = None
    """Weights that ours starts from, such as DINOv2's ViT-S/14; none = from scratch."""
    size: Size = Size(224, 224)
    """Height x width in pixels of the original's images, whole or cropped."""
    our_size: Size = Size(336, 168)
    """Height x width in pixels of our crops."""
    jobs: int = 0
    """Parallel workers that read images; 0 = one per core."""

    def __post_init__(self) -> None:
        require(self.jobs >= 0, "jobs", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class LeaveOutConfig:
    """Train without each site (machine, data set) in turn and measure on it: OUT/<by>-<value>/ and OUT/summary.json."""

    manifest: Path
    """manifest.csv as `vitmodel etl` wrote it, or several with commas between them; their splits are not used."""
    out: Path
    """Folder for a manifest, a run and a report of each."""
    by: Literal["site_id", "machine_id", "dataset"] = "machine_id"
    """Column whose values are left out one after the other. All images of a patient who has one are left out."""
    train: str = ""
    """Flags of `vitmodel train`, such as '--model vit_tiny --epochs 5'."""
    evaluate: str = ""
    """Flags of `vitmodel evaluate`."""
