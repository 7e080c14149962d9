"""Options of the verbs that train one network: pretrain, train and tune."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from vitmodel.config.augmentation import AugmentConfig
from vitmodel.config.base import Config, Needs, Size, require
from vitmodel.config.choices import LossName
from vitmodel.config.fine_tuning import AUTO, FROM_SCRATCH, FineTuningConfig, automatic_default
from vitmodel.config.integration import IntegrationConfig, SegmentsConfig
from vitmodel.config.labels import CANCER, LabelRule
from vitmodel.config.scoring import DecisionConfig

SCRATCH_MODEL = "vit_small"
"""Size of a network that starts from random weights."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """Options of all trainings: the network, the optimisation and the hardware."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input and output": ("resume",),
        "model": ("model", "pool", "stem", "drop_path", "packed"),
        "optimisation": (
            "epochs", "batch_size", "accumulate", "optimizer", "lr", "weight_decay", "layer_decay", "warmup", "clip",
            "seed",
        ),
        "hardware": ("tokens", "device", "devices", "nodes", "strategy", "precision", "compile", "workers"),
        "logging": ("unreadable", "nonfinite", "wandb"),
    }  # fmt: skip
    NEEDS: ClassVar[Mapping[str, Needs]] = {
        "strategy": Needs("--devices or --nodes above 1", lambda config: config.devices * config.nodes > 1),
    }
    DEFAULTS: ClassVar[Mapping[str, str]] = {
        name: automatic_default(name, weights=False) for name in ("epochs", "batch_size", "lr", "layer_decay")
    } | {"model": SCRATCH_MODEL}

    model: Literal[
        "auto", "vit_micro", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_small8", "vit_base8", "vit_small14",
        "vit_base14", "vit_large14", "vit_small14_reg4", "vit_base14_reg4", "vit_large14_reg4",
    ] = "auto"  # fmt: skip
    """Size of the network: width, depth, heads and patch size. The patch has 16 pixels; names with 8 are for DINO's
    weights, with 14 for DINOv2's, and with 14_reg4 for those with registers. auto = the default."""
    pool: Literal["cls", "mean", "attention"] = "mean"
    """What the head reads: the class token, the mean of all patch tokens, or an attention pool over them."""
    stem: Literal["linear", "conv"] = "linear"
    """Patch embedding: one linear map per patch, or a stack of convolutions."""
    drop_path: float = 0.1
    """Stochastic depth: drop rate of the last block; it rises linearly from 0."""
    epochs: int = AUTO
    """Number of passes over the training set. -1 = the default."""
    batch_size: int = AUTO
    """Largest number of images (with --fusion, exams) per step, over all devices. -1 = the default."""
    tokens: int = 16384
    """Largest number of tokens (patches of tissue) per step and device, about 13 crops of 1024x512. It bounds the
    memory."""
    packed: bool = True
    """Leave out patches that show only air. The package stores the choice."""
    accumulate: int = 1
    """Number of steps whose gradients are averaged before the weights change."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or stochastic gradient descent with momentum 0.9."""
    lr: float = AUTO
    """Peak learning rate. -1 = the default."""
    weight_decay: float = 0.05
    """Weight decay of weight matrices; decoupled in AdamW."""
    layer_decay: float = AUTO
    """Factor of the learning rate from each layer to the one below; 1 = the same rate everywhere. -1 = the default."""
    warmup: float = 0.1
    """Fraction of the training in which the learning rate rises; then it falls as a cosine to 1 % of the peak."""
    clip: float = 1.0
    """Largest gradient norm; longer gradients are scaled down. 0 = no limit."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of training crops."""
    seed: int = 0
    """Random seed of splits, initial weights, order and augmentation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. auto = the GPU if there is one."""
    devices: int = 1
    """Number of devices on this machine, one process each."""
    nodes: int = 1
    """Number of machines with DEVICES devices each. Start the same command on each machine with torchrun or SLURM."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """What each device holds: ddp = a copy of the model; fsdp (CUDA only) = a shard of it."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the matrix products. auto = fp32 on a CPU; on a GPU bf16 if it supports that, else fp16."""
    compile: bool = False
    """Compile the blocks with torch.compile: slower start, faster steps on a GPU."""
    workers: int = 2
    """Number of processes that load crops. 0 = load them in the training process."""
    unreadable: int = 10
    """Largest number of crops that cannot be read before training stops. Up to it they are logged and left out."""
    nonfinite: int = 10
    """Number of steps with a loss or gradient that is not finite after which training stops. Until then they are
    logged and skipped."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Logging to Weights & Biases. auto = online if an API key is set, else offline."""
    resume: bool = False
    """Continue from the last checkpoint in RUN. The result equals that of an uninterrupted run."""

    def _resolve(self) -> None:
        super()._resolve()
        for name, value in self._default_values().items():
            if getattr(self, name, value) in (AUTO, None):
                object.__setattr__(self, name, value)
        if self.model == "auto" and getattr(self, "weights", None) is None:
            object.__setattr__(self, "model", SCRATCH_MODEL)

    def _default_values(self) -> dict[str, Any]:
        """Return the values that replace `AUTO`."""
        return FROM_SCRATCH

    def _default(self, name: str) -> Any:
        return self._default_values().get(name, super()._default(name))

    def _check(self) -> None:
        super()._check()
        for name in ("epochs", "batch_size", "tokens", "accumulate", "devices", "nodes"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("workers", "weight_decay", "clip", "unreadable", "nonfinite"):
            require(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("warmup", "drop_path"):
            require(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
        require(0 < self.layer_decay <= 1, "layer_decay", "must be above 0 and at most 1")
        require(self.lr > 0, "lr", "must be above 0")
        processes = self.devices * self.nodes
        require(
            self.batch_size % processes == 0,
            "batch_size",
            f"must be a multiple of the {processes} processes that share it",
        )
        require(self.strategy == "ddp" or self.device != "cpu", "strategy", "fsdp needs --device cuda")

    @property
    def idles(self) -> bool:
        """Return whether some weights get no gradient in some steps, which DDP must be told in advance."""
        return False

    @property
    def most_tokens(self) -> int:
        """Return the largest number of tokens per step and device."""
        return self.tokens


WITHOUT_FOLDS = Needs("a validation split (--folds has none)", lambda config: config.folds == 0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(FineTuningConfig, DecisionConfig, IntegrationConfig, SegmentsConfig, TrainingConfig):
    """Train a Vision Transformer on the crops of a manifest.

    Write a run folder with checkpoints, curves and a model package.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input and output": ("manifest", "run", "label", "val", "test", "folds", "splits"),
        "model": ("weights",),
        "optimisation": ("sampling", "ema"),
        "loss and validation": (
            "loss",
            "smoothing",
            "auxiliary",
            "auxiliary_weight",
            "monitor",
            "patience",
            "flip_average",
        ),
        "hardware": ("checkpointing",),
    }
    NEEDS: ClassVar[Mapping[str, Needs]] = {
        "auxiliary_weight": Needs("--auxiliary", lambda config: bool(config.auxiliary)),
        "val": WITHOUT_FOLDS,
        "test": WITHOUT_FOLDS,
        "monitor": WITHOUT_FOLDS,
        "patience": WITHOUT_FOLDS,
        "tokens": Needs(
            "images that are read whole (with --segments use --segment-budget)", lambda config: not config.segments
        ),
    }
    DEFAULTS: ClassVar[Mapping[str, str]] = {name: automatic_default(name, weights=True) for name in FROM_SCRATCH} | {
        "model": f"that of --weights, else {SCRATCH_MODEL}"
    }

    manifest: tuple[Path, ...]
    """manifest.csv as written by `vitmodel etl`. Several are merged; columns that one of them lacks are unknown
    there."""
    run: Path
    """Run folder to write. The model package is RUN/package."""
    weights: Path | None = None
    """Initial weights: a timm, Hugging Face, Google or ONNX file, a checkpoint, a model package, or a name: one that
    `vitmodel weights` lists, org/name or hf:org/name@revision. none = random weights."""
    loss: LossName = "bce"
    """Loss: bce = binary cross entropy; focal = focal loss with gamma 2; pf1 = mean of bce and 1 - probabilistic F1."""
    smoothing: float = 0.0
    """Label smoothing of positives: their target is 1 - SMOOTHING. The target of negatives stays 0."""
    auxiliary: tuple[
        Literal["birads", "density", "invasive", "biopsy", "difficult_negative_case", "view", "age"], ...
    ] = ()
    """Columns of the manifest to predict as well, where they are known. Their predictions are in the score tables."""
    auxiliary_weight: float = 0.1
    """Weight of each auxiliary loss; the main loss has weight 1."""
    sampling: Literal["natural", "positive", "balanced"] = "balanced"
    """Composition of an epoch: natural = each image once; positive = the same, with a cancer in every batch; balanced =
    cancers and negatives equally often."""
    checkpointing: bool = False
    """Activation checkpointing: store only the input of each block and recompute the rest; about 25 % slower, less
    memory."""
    ema: float = 0.0
    """Decay per step of an exponential moving average of the weights, such as 0.999; the average is validated and
    packaged. 0 = off."""
    val: float = 0.15
    """Fraction of patients in the validation set, for early stopping, calibration and threshold."""
    test: float = 0.15
    """Fraction of patients in the test set, for `vitmodel evaluate`."""
    folds: int = 0
    """Number of cross-validation folds: train one model per left-out fold and package all as an ensemble. 0 = no
    cross-validation."""
    splits: Path | None = None
    """CSV file with the columns patient_id and split (with --folds, fold), such as an edited RUN/splits.csv. none =
    draw them."""
    monitor: Literal["auroc", "f1"] = "auroc"
    """Validation metric that selects the best epoch: AUROC or macro F1, per image or, with --fusion, per breast."""
    patience: int = 10
    """Number of epochs without improvement after which training stops. 0 = never."""
    flip_average: bool | None = None
    """Average the logits of each image and of its upside-down copy, in calibration and later in prediction; doubles the
    time. Metrics of single epochs use the image alone."""
    label: str = CANCER
    """What is positive: a column of 0 and 1, a comparison such as birads>=4 or density>=C, or positive:negative such as
    birads>=4:<=2, where all between is unknown. Of several rules, separated by commas, the first one known for a row
    counts. BI-RADS 0 is unknown."""

    def _resolve(self) -> None:
        super()._resolve()
        object.__setattr__(self, "label", LabelRule.parse(self.label).text)
        object.__setattr__(self, "auxiliary", tuple(dict.fromkeys(self.auxiliary)))

    def _check(self) -> None:
        super()._check()
        require(bool(self.manifest), "manifest", "is empty; name at least one manifest.csv")
        for name in ("patience", "auxiliary_weight"):
            require(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("val", "test", "smoothing", "ema"):
            require(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
        require(
            not self.ema or self.strategy == "ddp",
            "ema",
            "needs --strategy ddp, where each device holds the whole model",
        )
        require(
            not self.lora or self.strategy == "ddp", "lora", "needs --strategy ddp, where each device holds all weights"
        )
        require(
            not self.find_lr or self.devices * self.nodes == 1, "find_lr", "is measured by one process: use --devices 1"
        )
        require(self.folds == 0 or self.folds >= 2, "folds", "must be 0 (none) or at least 2")
        one_process = self.devices * self.nodes == 1
        require(
            self.folds == 0 or one_process, "folds", "are trained one after another by one process: use --devices 1"
        )
        require(
            self.val > 0,
            "val",
            "must be above 0: epoch, calibration and threshold are chosen on patients outside training",
        )
        require(self.val + self.test < 1, "val", "and test together must be below 1, to leave patients for training")

    @property
    def most_tokens(self) -> int:
        """Return the largest number of tokens per step and device; with segments their own budget bounds the memory."""
        return sys.maxsize if self.segments else self.tokens

    @property
    def idles(self) -> bool:
        """Return whether some weights get no gradient in some steps: a frozen backbone, or heads of unknown targets."""
        return bool(self.freeze or self.auxiliary)

    @property
    def segmenting(self) -> SegmentsConfig | None:
        """Return the part that the model package stores; None where images are read whole."""
        if not self.segments:
            return None
        return SegmentsConfig(**{field.name: getattr(self, field.name) for field in fields(SegmentsConfig)})


SEARCHED = ("weight_decay", "layer_decay", "drop_path", "smoothing", "loss", "ema")
"""Options whose values `vitmodel tune` chooses; it also chooses augment.elastic, and lr near the given value."""
SEARCHED_BY_TUNE = Needs("`vitmodel train` (tune searches it)", lambda config: False)


@dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainConfig):
    """Search for good hyperparameters: many short trainings, unpromising ones stopped early.

    The options of `train` apply to all trials.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"input and output": ("trials",)}
    NEEDS: ClassVar[Mapping[str, Needs]] = dict.fromkeys((*SEARCHED, "find_lr"), SEARCHED_BY_TUNE)

    trials: int = 30
    """Total number of trainings; with --resume, those already in RUN count."""

    def _check(self) -> None:
        super()._check()
        require(self.trials >= 1, "trials", "must be at least 1")
        require(self.folds == 0, "folds", "cannot be used with tune, which chooses on the validation split")
        require(
            self.devices * self.nodes == 1, "devices", "must be 1: trials are trained one after another by one process"
        )
        elastic = self.augment.elastic == AugmentConfig().elastic
        require(
            elastic, "augment.elastic", f"has no effect here: it needs {SEARCHED_BY_TUNE.text}; otherwise leave it out"
        )


WITH_MANIFEST = Needs("--manifest", lambda config: bool(config.manifest))
ON_PHANTOMS = Needs("phantoms, which --manifest replaces", lambda config: not config.manifest)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Pretrain a Vision Transformer without labels, or on phantoms; write a package for `vitmodel train --weights`."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input and output": ("run", "manifest", "size", "phantoms", "difficulty"),
        "loss and validation": ("ratio",),
    }
    NEEDS: ClassVar[Mapping[str, Needs]] = {
        "ratio": WITH_MANIFEST,
        "size": ON_PHANTOMS,
        "phantoms": ON_PHANTOMS,
        "difficulty": ON_PHANTOMS,
    }

    run: Path
    """Run folder to write. The package is RUN/package."""
    manifest: tuple[Path, ...] = ()
    """Manifest of unlabelled crops for masked autoencoding. none = learn to find cancers in phantoms made on the
    fly."""
    ratio: float = 0.75
    """Masked autoencoding: fraction of the tissue patches to hide."""
    size: Size = Size(1024, 512)
    """Phantoms: height and width of the crop in pixels."""
    phantoms: int = 5000
    """Phantoms: number per epoch. No two are alike."""
    difficulty: float = 0.5
    """Phantoms: 0 = large and bright lesions; above 0, a mixture from these to small and faint ones (1)."""

    def _check(self) -> None:
        super()._check()
        require(0 < self.ratio < 1, "ratio", "must lie between 0 and 1")
        require(self.phantoms >= 2, "phantoms", "must be at least 2")
        require(0 <= self.difficulty <= 1, "difficulty", "must lie between 0 and 1")

    @property
    def idles(self) -> bool:
        """Return whether some weights get no gradient: masked autoencoding does not train the head."""
        return bool(self.manifest)
