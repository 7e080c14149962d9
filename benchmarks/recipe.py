"""Compare training recipes and peers on real mammograms under equal conditions. Resumable, on CPU or CUDA.

python benchmarks/recipe.py WORK [--images 13000] [--size 128x64] [--variants ...] [--weights FILE] [--json FILE]

Every variant is trained on the same number of images in each of 5 patient-wise folds (stratified by cancer, site and
machine) at the same size. The weights of the last epoch score the fold that was left out, so that nothing is selected
on it. The table contains the out-of-fold AUROC with intervals from resampled patients, macro F1 at a threshold chosen
on the other folds, and the AUROC of the same models on MIAS films without retraining. A finished (variant, fold) is a
file in WORK; a second start only computes what is missing. DenseNet121 and ResNet-18 are MONAI's. All networks compute
in bfloat16.

With published weights of a ViT-S/14, such as DINOv2's, the table has rows that do not start from scratch: frozen, and
fine-tuned by `vitmodel train --config rsna` with its own sizes and number of images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vitmodel.cli import main as vitmodel
from vitmodel.commands.etl import etl
from vitmodel.config import AugmentConfig, ETLConfig, PredictorConfig, Size
from vitmodel.config.auxiliary import AUXILIARY_TARGETS
from vitmodel.data.dataset import read_crop
from vitmodel.data.manifest import breast_ids, read_manifest, usable_rows
from vitmodel.data.samplers import EpochSampler
from vitmodel.data.splits import assign_folds
from vitmodel.data.tables import read_table
from vitmodel.data.transforms import Augmentation
from vitmodel.metrics.bootstrap import Interval, percentile_limits, resample
from vitmodel.metrics.metrics import RankedUnits, compute_metrics
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.metrics.threshold import choose_threshold
from vitmodel.model.architecture import PRESETS
from vitmodel.model.mae import MaskedAutoencoder
from vitmodel.model.network import AuxiliaryHeads
from vitmodel.model.packed_attention import features
from vitmodel.model.packed_batch import pack_images
from vitmodel.model.vit import ViT
from vitmodel.model.weights import fit_weights, load_weights
from vitmodel.phantoms.dataset import crop_phantom, sample_phantom
from vitmodel.reports.panel import contact_grid
from vitmodel.scoring.predictor import Predictor
from vitmodel.training.losses import auxiliary_losses, bce
from vitmodel.training.optimizer import parameter_groups, warmup_cosine
from vitmodel.utils import atomic_path, derive_seed, progress, to_json, write_atomic

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
RECIPE = ROOT / "vitmodel" / "recipes" / "rsna.yaml"
FOLDS = 5
BATCH = 32
SMALL, LARGE = Size(224, 112), Size(336, 168)
PIXELS = ("--sources", "")
ONCE = ("--no-flip-average",)
EMA = 0.99
STRONG = AugmentConfig(rotate=15, scale=0.15, shift=0.06, gamma=0.25, contrast=0.2, window=0.05, elastic=0.04)
AUXILIARY = [AUXILIARY_TARGETS[name] for name in ("density", "invasive", "view", "age")]
PHANTOM_POOL = 2000


@dataclass(frozen=True)
class Variant:
    """Settings of one row of the table."""

    note: str
    network: str = "vit"
    stem: str = "conv"
    pretrained: str = ""
    auxiliary: bool = False
    original: bool = False
    lr: float = 1e-3
    layer_decay: float = 1.0
    drop_path: float = 0.1
    size: Size = SMALL
    """Height x width of the input of published weights."""
    flags: tuple[str, ...] = ()
    """Flags of `vitmodel train` in addition to vitmodel/recipes/rsna.yaml."""


VARIANTS = {
    "original": Variant(
        "original recipe: SGD 0.003, cross entropy, class token, RandomResizedCrop + flip", stem="linear", original=True
    ),
    "vit": Variant("our ViT, linear stem", stem="linear"),
    "conv": Variant("+ conv stem"),
    "mae": Variant("+ masked autoencoding on the training folds", pretrained="mae", layer_decay=0.8),
    "phantoms": Variant("+ phantom pretraining", pretrained="phantoms", layer_decay=0.8),
    "auxiliary": Variant(
        "+ phantom pretraining, auxiliary heads", pretrained="phantoms", auxiliary=True, layer_decay=0.8
    ),
    "resnet18": Variant("MONAI ResNet-18 from scratch", network="resnet18"),
    "densenet121": Variant("MONAI DenseNet121 from scratch", network="densenet121"),
    "frozen": Variant("published ViT-S/14, frozen, logistic regression on its mean token", network="frozen"),
    "tuned": Variant("published ViT-S/14, fine-tuned at 224x112", network="train", flags=(*PIXELS, *ONCE)),
    "age": Variant("the same with the patient's age as input", network="train", flags=ONCE),
    "larger": Variant("published ViT-S/14, fine-tuned at 336x168", network="train", size=LARGE, flags=(*PIXELS, *ONCE)),
    "larger_twice": Variant("the same, flip averaging", network="train", size=LARGE, flags=PIXELS),
    "both": Variant("at 336x168 with the age as input", network="train", size=LARGE, flags=ONCE),
    "both_twice": Variant("the same, flip averaging: vitmodel/recipes/rsna.yaml", network="train", size=LARGE),
}
PUBLISHED = ("frozen", "train")
"""Networks that start from published weights."""


@dataclass
class Budget:
    """Settings shared by all variants."""

    images: int
    """Training images per fold."""
    pretraining: int
    """Images of a pretraining."""
    size: Size
    model: str
    device: torch.device
    work: Path
    weights: Path | None = None
    """Published weights of a ViT-S/14."""


@dataclass
class Data:
    """Crops in memory and their table."""

    table: pd.DataFrame
    crops: np.ndarray
    """`(N, H, W)` uint8."""

    def __len__(self) -> int:
        return len(self.table)

    @property
    def labels(self) -> np.ndarray:
        return self.table["cancer"].to_numpy(np.float32)

    def rows(self, mask: np.ndarray) -> Data:
        """Return the rows selected by a boolean mask `(N,)`."""
        return Data(self.table[mask].reset_index(drop=True), self.crops[mask])


def load(name: str, budget: Budget) -> Data:
    """Return the crops of a shared subset, made by ETL if they are missing."""
    folder = budget.work / f"{name}_{budget.size}"
    if not (folder / "manifest.csv").exists():
        etl(ETLConfig(source=DATA / name, out=folder, size=budget.size, jobs=1))
    table = usable_rows(read_manifest(folder / "manifest.csv")).dropna(subset=["cancer"]).reset_index(drop=True)
    return Data(table, np.stack([read_crop(path) for path in table["path"]]))


def build_network(variant: Variant, budget: Budget) -> nn.Module:
    """Return the untrained network of a variant."""
    if variant.network == "vit":
        pool = "cls" if variant.original else "mean"
        preset = PRESETS[budget.model]
        options = {"image_size": budget.size, "stem": variant.stem, "pool": pool, "drop_path": variant.drop_path}
        return ViT(replace(preset, **options))  # type: ignore[arg-type]
    from monai.networks.nets import DenseNet121, resnet18

    if variant.network == "densenet121":
        return DenseNet121(spatial_dims=2, in_channels=1, out_channels=1)
    return resnet18(spatial_dims=2, n_input_channels=1, num_classes=1)


def augment(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a crop with our strong augmentation."""
    return Augmentation.sample(STRONG, rng).apply(crop)


def random_resized_crop(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a crop with the augmentation of the original recipe.

    It takes a part of 8 to 100 % of the area with an aspect ratio of 3/4 to 4/3, resizes it to the whole and flips it
    at random.
    """
    height, width = crop.shape
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w = round(np.sqrt(area * aspect))
        h = round(np.sqrt(area / aspect))
        if w <= width and h <= height:
            break
    else:
        h, w = height, width
    y = rng.integers(height - h + 1)
    x = rng.integers(width - w + 1)
    part = cv2.resize(crop[y : y + h, x : x + w], (width, height), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(part[:, ::-1]) if rng.random() < 0.5 else part


def batches(
    data: Data,
    images: int,
    sampling: str,
    transform: Callable[[np.ndarray, np.random.Generator], np.ndarray],
    seed: int,
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Yield about `images` samples in batches: crops `(B, 1, H, W)` in [0, 1] and their rows `(B,)`."""
    sampler = EpochSampler(data.labels.tolist(), seed, sampling, BATCH)  # type: ignore[arg-type]
    requests: list[Any] = []
    while len(requests) < images:
        requests += list(sampler)
    for start in range(0, images // BATCH * BATCH, BATCH):
        batch = requests[start : start + BATCH]
        crops = []
        for request in batch:
            crop = data.crops[request.row].astype(np.float32) / 255
            crops.append(transform(crop, np.random.default_rng(request.seed)))
        yield torch.from_numpy(np.stack(crops))[:, None], np.array([request.row for request in batch])


def optimise(
    model: nn.Module,
    stream: Iterator[tuple[Tensor, np.ndarray]],
    loss_of: Callable[[Tensor, np.ndarray], Tensor],
    images: int,
    variant: Variant,
    budget: Budget,
    title: str,
) -> AveragedModel:
    """Train a model and return the moving average of its weights (the last weights for the original recipe)."""
    model.to(budget.device).train()
    if variant.original:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(parameter_groups(model, variant.lr, 0.05, variant.layer_decay), fused=True)
    steps = images // BATCH
    rates = [group["lr"] for group in optimizer.param_groups]
    decay = 0.0 if variant.original else EMA
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for step, (crops, rows) in enumerate(progress(stream, title, total=steps, unit="step")):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * warmup_cosine(step / steps, 0.0 if variant.original else 0.1)
        with torch.autocast(budget.device.type, torch.bfloat16):
            loss = loss_of(crops.to(budget.device), rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
    return average


def phantom_pool(budget: Budget) -> Data:
    """Return phantoms, half with a cancer, rendered once and kept in WORK; brightness does not reveal the label."""
    path = budget.work / f"phantoms_{budget.size}.npy"
    if not path.exists():
        view_size = Size(round(budget.size.height * 1.5), budget.size.height)
        views = (
            sample_phantom(derive_seed("pool", number), bool(number % 2), 0.5, view_size)
            for number in range(PHANTOM_POOL)
        )
        crops = np.stack([crop_phantom(view, budget.size) for view in progress(views, "phantoms", total=PHANTOM_POOL)])
        with atomic_path(path) as temporary:
            np.save(temporary, crops)
    crops = np.load(path)
    return Data(pd.DataFrame({"cancer": np.arange(len(crops)) % 2.0}), crops)


def pretrain(variant: Variant, train: Data, fold: int, budget: Budget) -> dict[str, Tensor]:
    """Return pretrained weights without the head, which are kept in WORK.

    They are from phantoms (once for all folds) or from the training folds without labels.
    """
    name = "phantoms" if variant.pretrained == "phantoms" else f"mae_{fold}"
    path = budget.work / f"pretrained_{name}.pt"
    if not path.exists():
        torch.manual_seed(0)
        model = build_network(replace(variant, drop_path=0.0), budget)
        assert isinstance(model, ViT)
        variant = replace(variant, layer_decay=1.0)
        if variant.pretrained == "phantoms":
            state = pretrain_on_phantoms(model, variant, budget, name)
        else:
            state = pretrain_mae(model, variant, train, fold, budget, name)
        with atomic_path(path) as temporary:
            torch.save({key: value.cpu() for key, value in state.items() if not key.startswith("head")}, temporary)
    return torch.load(path, weights_only=True)


def pretrain_on_phantoms(model: ViT, variant: Variant, budget: Budget, title: str) -> dict[str, Tensor]:
    """Return the weights of a model trained to classify phantoms; a tenth of them is held out to print the AUROC."""
    pool = phantom_pool(budget)
    held_out = np.arange(len(pool)) >= 0.9 * len(pool)
    labels = torch.from_numpy(pool.labels[~held_out])

    def loss(crops: Tensor, rows: np.ndarray) -> Tensor:
        return bce()(model(crops).squeeze(-1).float(), labels[rows].to(crops.device)).mean()

    stream = batches(pool.rows(~held_out), budget.pretraining, "natural", augment, 0)
    average = optimise(model, stream, loss, budget.pretraining, variant, budget, title)
    scores = expit(score(average, pool.crops[held_out], budget))
    units = ScoredUnits(pool.labels[held_out], scores, np.arange(held_out.sum()))
    auroc = RankedUnits(units, 0.5).metric_values()["auroc"]
    print(f"phantoms: AUROC {auroc:.3f} on {held_out.sum()} held-out phantoms")
    return average.module.state_dict()


def pretrain_mae(model: ViT, variant: Variant, train: Data, fold: int, budget: Budget, title: str) -> dict[str, Tensor]:
    """Return the weights of a model trained by masked autoencoding on the training folds."""
    autoencoder = MaskedAutoencoder(model)

    def loss(crops: Tensor, rows: np.ndarray) -> Tensor:
        return autoencoder(pack_images(list(crops), model.config.patch)).mean()

    stream = batches(train, budget.pretraining, "natural", augment, fold)
    average = optimise(autoencoder, stream, loss, budget.pretraining, variant, budget, title)
    return average.module.encoder.state_dict()  # type: ignore[union-attr]


def fit(variant: Variant, train: Data, fold: int, budget: Budget, title: str) -> AveragedModel:
    """Train a variant on the training rows of one fold."""
    torch.manual_seed(derive_seed("fit", fold))
    model = build_network(variant, budget)
    if variant.pretrained:
        model.load_state_dict(pretrain(variant, train, fold, budget), strict=False)
    labels = torch.from_numpy(train.labels)
    heads: AuxiliaryHeads | None = None
    targets: Tensor | None = None
    modules = {"model": model}
    if variant.auxiliary:
        heads = AuxiliaryHeads(PRESETS[budget.model].dim, AUXILIARY).to(budget.device)
        encoded = [torch.tensor(target.encode(train.table[target.name].tolist())) for target in AUXILIARY]
        targets = torch.stack(encoded, dim=1)
        modules["heads"] = heads

    def loss(crops: Tensor, rows: np.ndarray) -> Tensor:
        batch_labels = labels[rows].to(crops.device)
        if heads is None or targets is None:
            return bce()(model(crops).squeeze(-1).float(), batch_labels).mean()
        assert isinstance(model, ViT)
        pooled = model.pool(model.encode(model.embed(crops))).float()
        auxiliary = auxiliary_losses(AUXILIARY, heads(pooled).float(), targets[rows].to(crops.device))
        return bce()(model.head(pooled).squeeze(-1).float(), batch_labels).mean() + 0.1 * auxiliary.sum(dim=1).mean()

    sampling, transform = ("natural", random_resized_crop) if variant.original else ("balanced", augment)
    stream = batches(train, budget.images, sampling, transform, fold)
    return optimise(nn.ModuleDict(modules), stream, loss, budget.images, variant, budget, title)


def score(model: AveragedModel, crops: np.ndarray, budget: Budget) -> np.ndarray:
    """Return the logits `(N,)` of crops `(N, H, W)`."""
    network = model.module["model"] if isinstance(model.module, nn.ModuleDict) else model.module
    network.eval()
    logits = []
    with torch.inference_mode(), torch.autocast(budget.device.type, torch.bfloat16):
        for part in torch.from_numpy(crops).split(128):
            images = part[:, None].to(budget.device).float() / 255
            logits.append(network(images).squeeze(-1).float().cpu())
    return torch.cat(logits).numpy()


def frozen_features(name: str, budget: Budget) -> np.ndarray:
    """Return the mean tokens `(N, D)` of a published ViT-S/14 for the crops of a subset at 224x112, computed once."""
    path = budget.work / f"frozen_{name}.npy"
    if not path.exists():
        data = load(name, replace(budget, size=SMALL))
        config = replace(PRESETS["vit_small14"], image_size=SMALL, pool="mean")
        model = ViT(config).to(budget.device).eval()
        assert budget.weights is not None
        print(fit_weights(model, load_weights(budget.weights)))
        tokens = []
        with torch.inference_mode(), torch.autocast(budget.device.type, torch.bfloat16):
            for part in progress(list(torch.from_numpy(data.crops).split(32)), f"features of {name}"):
                images = part[:, None].to(budget.device).float() / 255
                tokens.append(features(model, pack_images(list(images), config.patch)).float().cpu())
        with atomic_path(path) as temporary:
            np.save(temporary, torch.cat(tokens).numpy())
    return np.load(path)


@dataclass(frozen=True)
class FoldResult:
    """Scores of a variant on one fold or on all of them."""

    logits: np.ndarray
    """Out-of-fold logits of the rows."""
    films: np.ndarray
    """Logits of the MIAS films."""
    parameters: int
    """Number of trained parameters."""


def probe(train: np.ndarray, dataset: str, data: Data, budget: Budget) -> FoldResult:
    """Fit a logistic regression to frozen features on the rows `train`; return the logits of all rows."""
    tokens = frozen_features(dataset, budget)
    films = frozen_features("mias_512", budget)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=500))
    model.fit(tokens[train], data.labels[train])
    return FoldResult(model.decision_function(tokens), model.decision_function(films), tokens.shape[1] + 1)


def tune(name: str, dataset: str, data: Data, budget: Budget) -> FoldResult:
    """Train all folds with `vitmodel train`, unless done; return the logits of all rows."""
    folder = budget.work / name
    splits = budget.work / "folds.csv"
    film_scores = budget.work / f"{name}_mias.csv"
    budget = replace(budget, size=VARIANTS[name].size)
    crops = load(dataset, budget)
    films = load("mias_512", budget)
    if not (folder / "package").exists():
        data.table[["patient_id", "fold"]].drop_duplicates().to_csv(splits, index=False)
        manifest = Path(crops.table["path"].iloc[0]).parents[2] / "manifest.csv"
        arguments = ["--config", str(RECIPE), "--weights", str(budget.weights)]
        arguments += ["--folds", str(FOLDS), "--splits", str(splits)]
        if vitmodel(["train", str(manifest), str(folder), *arguments, *VARIANTS[name].flags, "--resume"]):
            raise SystemExit(1)
    predictor = Predictor(PredictorConfig(package=folder / "package", device=budget.device.type))
    if not film_scores.exists():
        with atomic_path(film_scores) as temporary:
            predictor.score_images(films.table).to_csv(temporary, index=False)
    parameters = sum(parameter.numel() for parameter in predictor.ensemble.model.parameters())
    return FoldResult(
        read_logits(folder / "out_of_fold.csv", data.table), read_logits(film_scores, films.table), parameters
    )


def read_logits(path: Path, table: pd.DataFrame) -> np.ndarray:
    """Return the logits of the images of `table` from a score file."""
    scores = read_table(path, ["image_id", "score"]).set_index("image_id")["score"].astype(float)
    return logit(scores[table["image_id"]].to_numpy())


def run(name: str, fold: int, dataset: str, data: Data, films: Data, budget: Budget) -> None:
    """Train and score one variant on one fold, unless it is done."""
    path = budget.work / "results" / f"{name}_{fold}.json"
    if path.exists():
        return
    held_out = (data.table["fold"] == fold).to_numpy()
    wall_start = time.perf_counter()
    cpu_start = time.process_time()
    if VARIANTS[name].network == "frozen":
        result = probe(~held_out, dataset, data, budget)
        result = replace(result, logits=result.logits[held_out])
    elif VARIANTS[name].network == "train":
        result = tune(name, dataset, data, budget)
        result = replace(result, logits=result.logits[held_out])
    else:
        model = fit(VARIANTS[name], data.rows(~held_out), fold, budget, f"{name} fold {fold}")
        parameters = sum(parameter.numel() for parameter in model.module.parameters())
        logits = score(model, data.crops[held_out], budget)
        result = FoldResult(logits, score(model, films.crops, budget), parameters)
    numbers = {
        "rows": np.flatnonzero(held_out).tolist(),
        "logits": result.logits.tolist(),
        "films": result.films.tolist(),
        "wall_s": time.perf_counter() - wall_start,
        "cpu_s": time.process_time() - cpu_start,
        "parameters": result.parameters,
    }
    write_atomic(path, json.dumps(numbers))


@dataclass(frozen=True)
class Scores:
    """Out-of-fold scores of a variant, and its scores of the MIAS films."""

    rows: np.ndarray
    """Rows of the table that are scored, fold by fold."""
    logits: np.ndarray
    """Out-of-fold logits of these rows."""
    folds: list[int]
    """The finished folds."""
    films: np.ndarray
    """Logits of the films, averaged over the folds."""
    parameters: int
    """Parameters of one model."""
    cpu_s: float
    """Mean CPU seconds per fold."""


def collect(name: str, budget: Budget) -> Scores | None:
    """Return the scores of the finished folds of a variant, or None if there are none."""
    paths = {fold: budget.work / "results" / f"{name}_{fold}.json" for fold in range(FOLDS)}
    results = {fold: json.loads(path.read_text()) for fold, path in paths.items() if path.exists()}
    if not results:
        return None
    first = next(iter(results.values()))
    return Scores(
        rows=np.concatenate([result["rows"] for result in results.values()]).astype(int),
        logits=np.concatenate([result["logits"] for result in results.values()]),
        folds=list(results),
        films=np.mean([result["films"] for result in results.values()], axis=0),
        parameters=first["parameters"],
        cpu_s=float(np.mean([result["cpu_s"] for result in results.values()])),
    )


def to_breasts(data: Data, scores: Scores) -> tuple[ScoredUnits, np.ndarray]:
    """Return the breasts, scored by the mean over their views, and the fold of each."""
    breast = breast_ids(data.table).iloc[scores.rows]
    table = data.table.iloc[scores.rows].assign(score=expit(scores.logits), breast=breast)
    breasts = table.groupby("breast").agg({"cancer": "max", "score": "mean", "patient_id": "first", "fold": "first"})
    return ScoredUnits(breasts.cancer, breasts.score, breasts.patient_id), breasts.fold.to_numpy()


def decisions(sample: ScoredUnits, folds: np.ndarray) -> np.ndarray:
    """Return decisions (0 or 1) at the threshold with the best macro F1 on the other folds, or at 0.5 with one fold."""
    positive = np.zeros(len(folds))
    for fold in np.unique(folds):
        others = folds != fold
        threshold = choose_threshold(sample.labels[others], sample.scores[others], "macro_f1") if others.any() else 0.5
        positive[~others] = sample.scores[~others] >= threshold
    return positive


def confusion_counts(labels: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Return the contributions `(4, N)` of breasts to the true and false positives and false and true negatives."""
    negative = 1 - positive
    return np.stack([labels * positive, (1 - labels) * positive, labels * negative, (1 - labels) * negative])


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Return the mean F1 of both classes, `(B,)`, from sums `(4, B)` of `confusion_counts`."""
    tp, fp, fn, tn = sums
    return tp / np.maximum(2 * tp + fp + fn, 1e-9) + tn / np.maximum(2 * tn + fp + fn, 1e-9)


def interval(rows: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], patients: np.ndarray) -> Interval:
    """Return a statistic of summed rows with its 95 % interval over resampled patients."""
    low, high = percentile_limits(resample(rows, lambda sums: [statistic(sums)], patients, 2000, 0))
    return Interval(float(statistic(rows.sum(axis=1))), float(low[0]), float(high[0]))


def report(data: Data, films: Data, budget: Budget) -> list[dict[str, Any]]:
    """Return a row per variant with a finished fold.

    The gain in macro F1 over the original recipe is computed if both have the same folds, on the breasts that both
    scored.
    """
    lines: list[dict[str, Any]] = []
    base = collect("original", budget)
    for name, variant in VARIANTS.items():
        scores = collect(name, budget)
        if scores is None:
            continue
        table = data.table.iloc[scores.rows]
        images = ScoredUnits(table.cancer, expit(scores.logits), table.patient_id)
        breasts, folds = to_breasts(data, scores)
        mias = ScoredUnits(films.labels, expit(scores.films), films.table.patient_id)
        own_counts = confusion_counts(breasts.labels, decisions(breasts, folds))
        line: dict[str, Any] = {
            "variant": name,
            "note": variant.note,
            "folds": len(scores.folds),
            "millions": scores.parameters / 1e6,
            "cpu_s": scores.cpu_s,
            "auroc_image": compute_metrics(images, 0.5).intervals["auroc"],
            "auroc_breast": compute_metrics(breasts, 0.5).intervals["auroc"],
            "macro_f1": interval(own_counts, macro_f1, breasts.patients),
            "mias": compute_metrics(mias, 0.5).intervals["auroc"],
        }
        if base is not None and base.folds == scores.folds and name != "original":
            base_counts = confusion_counts(breasts.labels, decisions(*to_breasts(data, base)))
            both = np.concatenate([own_counts, base_counts])
            line["gain"] = interval(both, lambda sums: macro_f1(sums[:4]) - macro_f1(sums[4:]), breasts.patients)
        lines.append(line)
    return lines


def show(lines: list[dict[str, Any]]) -> None:
    """Print the table as Markdown."""
    print(
        "| recipe | M par. | folds | CPU s/fold | AUROC image | AUROC breast (views averaged) | macro F1 "
        "| gain over original | MIAS |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for line in lines:
        cells = [line["note"], f"{line['millions']:.1f}", line["folds"], f"{line['cpu_s']:.0f}"]
        cells += [line[key] for key in ("auroc_image", "auroc_breast", "macro_f1")]
        cells += [line.get("gain", ""), line["mias"]]
        print("| " + " | ".join(map(str, cells)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--dataset", choices=["rsna_crop256", "rsna_640"], default="rsna_crop256")
    parser.add_argument("--images", type=int, default=13_000, help="training images per fold")
    parser.add_argument("--pretraining", type=int, default=26_000, help="training images of a pretraining")
    parser.add_argument("--size", type=Size.parse, default=Size(128, 64))
    parser.add_argument("--model", choices=list(PRESETS), default="vit_micro")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(FOLDS)))
    parser.add_argument(
        "--weights", type=Path, help="published weights of a ViT-S/14 for the rows that start from them"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = PyTorch's default")
    parser.add_argument("--table", action="store_true", help="do not train; only print the table of finished folds")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        cv2.setNumThreads(arguments.threads)
    budget = Budget(
        images=arguments.images,
        pretraining=arguments.pretraining,
        size=arguments.size,
        model=arguments.model,
        device=torch.device(arguments.device),
        work=arguments.work,
        weights=arguments.weights,
    )
    budget.work.mkdir(parents=True, exist_ok=True)
    settings = to_json({key: getattr(arguments, key) for key in ("dataset", "images", "pretraining", "size", "model")})
    settings_file = budget.work / "settings.json"
    if settings_file.exists() and settings_file.read_text() != settings:
        parser.error(f"WORK: {settings_file} has different settings; choose another folder")
    write_atomic(settings_file, settings)
    data = load(arguments.dataset, budget)
    films = load("mias_512", budget)
    data.table = assign_folds(data.table, FOLDS, seed=0)
    augmented = [
        augment(crop.astype(np.float32) / 255, np.random.default_rng(number))
        for number, crop in enumerate(data.crops[:32])
    ]
    write_atomic(budget.work / "augmented.png", cv2.imencode(".png", contact_grid(augmented))[1].tobytes())
    if not arguments.table:
        for fold in arguments.folds:
            for name in arguments.variants:
                if VARIANTS[name].network not in PUBLISHED or arguments.weights:
                    run(name, fold, arguments.dataset, data, films, budget)
    lines = report(data, films, budget)
    show(lines)
    if arguments.json:
        rows = [
            {key: vars(value) if isinstance(value, Interval) else value for key, value in line.items()}
            for line in lines
        ]
        write_atomic(arguments.json, to_json({"settings": json.loads(settings), "rows": rows}))


if __name__ == "__main__":
    main()
