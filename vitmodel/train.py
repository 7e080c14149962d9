"""Stage: manifest -> run folder with checkpoints, curves and a model package. Knows no pixel format."""

if __name__ == "__main__":  # run as a file: the command line runs this stage under its own name, with the checkout on the path
    import sys

    sys.path[0] = __file__.rsplit("/", 2)[0]
    from vitmodel.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))

import functools
import logging
import math
import netrc
import os
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader, Sampler

from vitmodel import __version__
from vitmodel.config import AugmentConfig, Preprocessing, TrainConfig, to_yaml
from vitmodel.data.dataset import CropDataset, Draw, Example, InOrder, Shuffled, crop_size
from vitmodel.data.fingerprint import fingerprint
from vitmodel.data.journal import exclusive
from vitmodel.data.manifest import breast_ids, read_manifest, usable, write_manifest
from vitmodel.data.splits import assign_splits
from vitmodel.learner import AtomicCheckpoints, Batch, Learner, Progress
from vitmodel.measure import calibration
from vitmodel.measure.sample import Sample
from vitmodel.measure.threshold import choose_threshold
from vitmodel.model.architecture import PRESETS
from vitmodel.model.package import save_package
from vitmodel.model.packing import Pack, check_budget, fill, join, pack
from vitmodel.model.vit import ViT
from vitmodel.model.weights import fit_weights, load_weights
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, UsageError, write_atomic

LABEL = "cancer"


def train(config: TrainConfig) -> None:
    """Train on the split `train`, choose the epoch, calibrate and set the threshold on `val`, leave `test` alone; write RUN/package."""
    frame = labelled_crops(config)
    preprocessing = common_preprocessing(frame, config.manifest)
    check_sizes(frame, config)
    with exclusive(config.run):
        checkpoint = start_or_resume(config)
        write_manifest(frame, config.run / "manifest.csv")
        L.seed_everything(config.seed, verbose=False)
        model = build_model(config, preprocessing, frame)
        rows = {name: frame[frame["split"] == name] for name in ("train", "val")}
        train_loader, val_loader = training_batches(rows["train"], config, checkpoint), plain_batches(rows["val"], config)
        learner = Learner(model, config, images=len(rows["train"]), history={})
        trainer, best = build_trainer(config)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")  # advice on hardware and worker counts that the flags already settle
            trainer.fit(learner, train_loader, val_loader, ckpt_path=checkpoint, weights_only=True)
        finish(config, learner, best, frame, val_loader, preprocessing)


def labelled_crops(config: TrainConfig) -> pd.DataFrame:
    """The manifest's usable rows with a known label and a split. Raises UsageError where there is nothing to train on."""
    frame = read_manifest(config.manifest)
    if frame["preprocessing"].isna().all():
        raise UsageError(f"{config.manifest}: its images are not cropped; run `vitmodel etl` on it first")
    frame = usable(frame).dropna(subset=[LABEL])
    if frame.empty:
        raise UsageError(f"{config.manifest}: no row is usable and has a known `{LABEL}`")
    fractions = {"train": 1 - config.val - config.test, "val": config.val, "test": config.test}
    frame = assign_splits(frame, {name: part for name, part in fractions.items() if part > 0}, config.seed)
    for name in ("train", "val"):
        if frame.loc[frame["split"] == name, LABEL].nunique() < 2:
            raise UsageError(f"{config.manifest}: split {name} needs images with and without {LABEL}; mend or empty the column `split`")
    return frame


def common_preprocessing(frame: pd.DataFrame, manifest: Path) -> Preprocessing:
    """The preprocessing that all crops went through. Raises UsageError where they differ."""
    kinds = sorted(frame["preprocessing"].unique())
    if len(kinds) > 1:
        raise UsageError(f"{manifest}: its crops were made in {len(kinds)} ways, {'; '.join(kinds)}; run `vitmodel etl` on all")
    return Preprocessing.from_json(kinds[0])


def check_sizes(frame: pd.DataFrame, config: TrainConfig) -> None:
    """Raises UsageError naming a crop that exceeds the budget of tokens if all of it is tissue: better now than in the tenth epoch."""
    patch, prefix = PRESETS[config.model].patch, PRESETS[config.model].prefix
    for path in frame["path"]:
        height, width = crop_size(path)
        check_budget(path, prefix + math.ceil(height / patch) * math.ceil(width / patch), config.tokens)


def start_or_resume(config: TrainConfig) -> Path | None:
    """Claim RUN for this configuration; the checkpoint to go on from, if any. Raises UsageError where RUN holds another run."""
    recipe, checkpoint = config.run / "train.yaml", config.run / "checkpoints" / "last.ckpt"
    text = to_yaml("train", replace(config, resume=False), recipe)
    if recipe.exists():
        if not config.resume:
            raise UsageError(f"{config.run} holds a run already; go on with --resume or choose another folder")
        changed = [new for old, new in zip(recipe.read_text().splitlines(), text.splitlines(), strict=False) if old != new]
        if changed:
            raise UsageError(f"{recipe} was started with other settings than: {', '.join(changed)}; resume with the same ones")
    write_atomic(recipe, text)
    if not (config.run / "run_id").exists():
        write_atomic(config.run / "run_id", uuid.uuid4().hex + "\n")
    return checkpoint if checkpoint.exists() else None


def build_model(config: TrainConfig, preprocessing: Preprocessing, frame: pd.DataFrame) -> ViT:
    """The preset at the crops' size, with the given weights; the head's bias starts at the prior that the sampler shows."""
    architecture = replace(
        PRESETS[config.model], image_size=preprocessing.size, pool=config.pool, stem=config.stem, drop_path=config.drop_path
    )
    model = ViT(architecture)
    prior = 0.5 if config.balance else float(frame.loc[frame["split"] == "train", LABEL].mean())
    torch.nn.init.constant_(model.head.bias, math.log(prior / (1 - prior)))
    if config.weights is not None:
        print(fit_weights(model, load_weights(config.weights)))
    return model


class Single(NamedTuple):
    """One image on its way into a pack."""

    pack: Pack
    label: torch.Tensor
    row: int


class Batches:
    """Crops, each drawn, loaded and cut into patches by the workers, then packed in the order of the draws. Each iteration is an epoch."""

    def __init__(self, rows: pd.DataFrame, sampler: Sampler[Draw], augment: AugmentConfig | None, config: TrainConfig) -> None:
        dataset = CropDataset(rows["path"].tolist(), rows[LABEL].tolist(), augment)
        cut = functools.partial(to_single, paths=dataset.paths, patch=PRESETS[config.model].patch, air=not config.packed)
        options: dict[str, Any] = {"num_workers": config.workers, "persistent_workers": config.workers > 0}
        self.singles = DataLoader(dataset, batch_size=None, sampler=sampler, collate_fn=cut, **options)
        self.config = config

    def __iter__(self) -> Iterator[Batch]:
        groups = fill(self.singles, self.config.tokens, PRESETS[self.config.model].prefix)
        for packs, labels, rows in (zip(*group, strict=True) for group in groups):
            yield Batch(join(packs), torch.stack(labels), torch.tensor(rows))


def to_single(example: Example, paths: list[str], patch: int, air: bool) -> Single:
    """The image cut into patches, those of air left out unless `air`."""
    return Single(pack([example.image], patch, [paths[example.row]], air), example.label, example.row)


def training_batches(rows: pd.DataFrame, config: TrainConfig, checkpoint: Path | None) -> Batches:
    """Augmented crops in the order of the epoch that comes next."""
    epoch = torch.load(checkpoint, weights_only=True)["epoch"] + 1 if checkpoint else 0
    return Batches(rows, Shuffled(rows[LABEL].tolist(), config.seed, config.balance, epoch), config.augment, config)


def plain_batches(rows: pd.DataFrame, config: TrainConfig) -> Batches:
    """Every crop once, as it is."""
    return Batches(rows, InOrder(len(rows)), None, config)


def build_trainer(config: TrainConfig) -> tuple[L.Trainer, ModelCheckpoint]:
    """Lightning's trainer and the callback that knows the best checkpoint."""
    figure = {"auroc": "val/auroc", "f1": "val/macro_f1"}[config.monitor]
    best = ModelCheckpoint(config.run / "checkpoints", "best", monitor=figure, mode="max", enable_version_counter=False)
    last = ModelCheckpoint(config.run / "checkpoints", "last", enable_version_counter=False)  # after `best`, whose state it holds
    callbacks: list[Callback] = [best, last, LearningRateMonitor("step"), Progress()]
    if config.patience:
        callbacks.append(EarlyStopping(figure, mode="max", patience=config.patience))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = L.Trainer(
        accelerator="cuda" if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()) else "cpu",
        devices=1,
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
        max_epochs=config.epochs,
        logger=build_loggers(config),
        callbacks=callbacks,
        plugins=[AtomicCheckpoints()],
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    return trainer, best


def build_loggers(config: TrainConfig) -> list[Logger]:
    """TensorBoard always, Weights & Biases unless it is off; both get the same names."""
    loggers: list[Logger] = [TensorBoardLogger(config.run, name="", version="tensorboard")]
    if config.wandb != "off":
        offline = config.wandb == "offline" or (config.wandb == "auto" and not has_wandb_key())
        identifier = (config.run / "run_id").read_text().strip()
        os.environ.setdefault("WANDB_SILENT", "true")
        loggers.append(WandbLogger(project="vitmodel", name=config.run.name, id=identifier, save_dir=config.run, offline=offline))
    return loggers


def has_wandb_key() -> bool:
    """Whether an API key is set in the environment or was stored by `wandb login`."""
    try:
        stored = netrc.netrc().authenticators("api.wandb.ai")
    except (OSError, netrc.NetrcParseError):
        stored = None
    return bool(os.environ.get("WANDB_API_KEY") or stored)


def finish(
    config: TrainConfig,
    learner: Learner,
    best: ModelCheckpoint,
    frame: pd.DataFrame,
    val: Batches,
    preprocessing: Preprocessing,
) -> None:
    """Write the package of the best epoch, calibrated on the validation patients."""
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    learner.load_state_dict(state)
    rows = frame[frame["split"] == "val"]
    logits = validation_logits(learner, val)
    fitted = calibration.fit("platt", rows[LABEL], logits)
    breasts = Sample(rows[LABEL].to_numpy(), fitted.apply(logits), rows["patient_id"].to_numpy()).aggregate(breast_ids(rows), "mean")
    threshold = choose_threshold(breasts.labels, breasts.scores, "f1")
    package = config.run / "package"
    contents = {
        "label": LABEL,
        "preprocessing": preprocessing.to_json(),
        "packed": config.packed,
        "calibration": fitted.to_dict(),
        "decision": {"level": "breast", "aggregate": "mean", "objective": "f1", "threshold": threshold},
        "data": fingerprint(frame, LABEL),
        "history": learner.history,
        "training": to_yaml("train", config, config.run / "train.yaml"),
        "versions": {"vitmodel": __version__} | {name: version(name) for name in ("torch", "numpy", "opencv-python-headless", "pydicom")},
    }
    assert best.best_model_score is not None
    reached = f"{best.monitor} {best.best_model_score:.4f}"
    save_package(package, learner.model, contents, model_card(config, contents, reached))
    print(f"best {reached}\npackage: {package}")


def validation_logits(learner: Learner, batches: Batches) -> np.ndarray:
    """Logits of the images in the order of their table."""
    learner.eval().cpu()
    with torch.inference_mode():
        logits, rows = zip(*((learner(batch.pack).float(), batch.row) for batch in batches), strict=True)
    return torch.cat(logits)[torch.cat(rows).argsort()].numpy()


def model_card(config: TrainConfig, contents: dict[str, Any], reached: str) -> str:
    """MODEL_CARD.md: what the model is, what it saw, and what it must not be used for."""
    splits = "\n".join(
        f"| {name} | {counts['patients']} | {counts['images']} | {counts['positive_images']} |"
        for name, counts in contents["data"]["splits"].items()
    )
    return f"""# {config.model}: breast cancer score from a mammogram

**{NOT_A_MEDICAL_DEVICE}**

A Vision Transformer that gives one logit per cropped mammogram; the breast's probability is the mean over its images, calibrated on
validation patients ({contents["calibration"]["method"]}). Decision threshold {contents["decision"]["threshold"]:.4f}, chosen for the best
{contents["decision"]["objective"]} on the same patients.

| split | patients | images | cancer images |
|---|---|---|---|
{splits}

Best {reached}. It picked the epoch, so it flatters the model; figures on patients that played
no part come from `vitmodel evaluate`. Prevalence and machines elsewhere differ: calibration and threshold do not carry over unchecked.

```yaml
{contents["training"]}```
"""
