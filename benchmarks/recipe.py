"""Training recipes against each other and against peers on real mammograms, on equal terms: one command, resumable, CPU or CUDA.

python benchmarks/recipe.py WORK [--images 13000] [--size 128x64] [--variants ...] [--weights FILE] [--json FILE]

Every variant sees the same number of training images in each of 5 patient-wise folds (stratified by cancer, site and machine), at the same
size; the last epoch's weights score the fold that was left out, so that nothing was chosen on it. The table has out-of-fold AUROC with
intervals from resampled patients; macro F1 at a threshold chosen on the other folds; and the same models on MIAS films, without retraining.
A second start does only what is missing: a finished (variant, fold) is a file in WORK. DenseNet121 and ResNet-18 are MONAI's. All
networks compute in bfloat16. With published weights of a ViT-S/14, such as DINOv2's, there are rows that do not start from scratch: frozen,
and fine-tuned by `vitmodel train --config rsna`, with its own sizes and number of images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from vitmodel.data.dataset import read_crop
from vitmodel.data.manifest import breast_ids, read_manifest, read_table, usable_rows
from vitmodel.data.samplers import EpochSampler
from vitmodel.data.splits import assign_folds
from vitmodel.data.transforms import Augmentation
from vitmodel.metrics.bootstrap import Interval, percentile_limits, resample
from vitmodel.metrics.metrics import RankedUnits, compute_metrics
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.metrics.threshold import choose_threshold
from vitmodel.model.architecture import PRESETS
from vitmodel.model.mae import MaskedAutoencoder
from vitmodel.model.packed_attention import features
from vitmodel.model.packed_batch import pack_images
from vitmodel.model.vit import ViT
from vitmodel.model.weights import fit_weights, load_weights
from vitmodel.phantoms.dataset import crop_phantom, sample_phantom
from vitmodel.reports.panel import contact_grid
from vitmodel.scoring.predictor import Predictor
from vitmodel.training.losses import AUXILIARY_TARGETS, AuxiliaryHeads, bce
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
AUXILIARY = ["density", "invasive", "view", "age"]
PHANTOM_POOL = 2000


@dataclass(frozen=True)
class Variant:
    """What one row of the table does differently."""

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
    """Height x width of what published weights see."""
    flags: tuple[str, ...] = ()
    """Of `vitmodel train`, beside those of vitmodel/recipes/rsna.yaml."""


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
    "age": Variant("the same, told the patient's age", network="train", flags=ONCE),
    "larger": Variant("published ViT-S/14, fine-tuned at 336x168", network="train", size=LARGE, flags=(*PIXELS, *ONCE)),
    "larger_twice": Variant("the same, flip averaging", network="train", size=LARGE, flags=PIXELS),
    "both": Variant("at 336x168, told the age", network="train", size=LARGE, flags=ONCE),
    "both_twice": Variant("the same, flip averaging: vitmodel/recipes/rsna.yaml", network="train", size=LARGE),
}
PUBLISHED = ("frozen", "train")
"""Networks that start from published weights."""


@dataclass
class Budget:
    """What every variant gets."""

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
    crops: np.ndarray  # N H W uint8
    extra: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def labels(self) -> np.ndarray:
        return self.table["cancer"].to_numpy(np.float32)

    def rows(self, chosen: np.ndarray) -> Data:
        return Data(self.table[chosen].reset_index(drop=True), self.crops[chosen])


def load(name: str, budget: Budget) -> Data:
    """The crops of a shared subset, made by ETL where they are missing."""
    folder = budget.work / f"{name}_{budget.size}"
    if not (folder / "manifest.csv").exists():
        etl(ETLConfig(source=DATA / name, out=folder, size=budget.size, jobs=1))
    table = usable_rows(read_manifest(folder / "manifest.csv")).dropna(subset=["cancer"]).reset_index(drop=True)
    return Data(table, np.stack([read_crop(path) for path in table["path"]]))


def network(variant: Variant, budget: Budget) -> nn.Module:
    if variant.network == "vit":
        pool = "cls" if variant.original else "mean"
        preset = PRESETS[budget.model]
        return ViT(replace(preset, image_size=budget.size, stem=variant.stem, pool=pool, drop_path=variant.drop_path))  # type: ignore[arg-type]
    from monai.networks.nets import DenseNet121, resnet18

    if variant.network == "densenet121":
        return DenseNet121(spatial_dims=2, in_channels=1, out_channels=1)
    return resnet18(spatial_dims=2, n_input_channels=1, num_classes=1)


def ours(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return Augmentation.sample(STRONG, rng).apply(crop)


def random_resized_crop(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The original recipe's: a part of 8 to 100 % of the area at an aspect of 3/4 to 4/3, resized to the whole, and a flip."""
    height, width = crop.shape
    for _ in range(10):
        area, aspect = height * width * rng.uniform(0.08, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if w <= width and h <= height:
            break
    else:
        h, w = height, width
    y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
    part = cv2.resize(crop[y : y + h, x : x + w], (width, height), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(part[:, ::-1]) if rng.random() < 0.5 else part


def batches(
    data: Data, images: int, way: str, change: Callable[[np.ndarray, np.random.Generator], np.ndarray], seed: int
) -> Any:
    """`images` draws in batches: crops B 1 H W in [0, 1] and rows B."""
    sampler = EpochSampler(data.labels.tolist(), seed, way, BATCH)  # type: ignore[arg-type]
    draws: list[Any] = []
    while len(draws) < images:
        draws += list(sampler)
    for start in range(0, images // BATCH * BATCH, BATCH):
        group = draws[start : start + BATCH]
        crops = [
            change(data.crops[draw.row].astype(np.float32) / 255, np.random.default_rng(draw.seed)) for draw in group
        ]
        yield torch.from_numpy(np.stack(crops))[:, None], np.array([draw.row for draw in group])


def optimise(
    model: nn.Module,
    stream: Any,
    loss_of: Callable[[Tensor, np.ndarray], Tensor],
    images: int,
    variant: Variant,
    budget: Budget,
    what: str,
) -> AveragedModel:
    """Train; the exponential moving average of the weights (the last weights for the original recipe)."""
    model.to(budget.device).train()
    if variant.original:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(parameter_groups(model, variant.lr, 0.05, variant.layer_decay), fused=True)
    steps = images // BATCH
    rates = [group["lr"] for group in optimizer.param_groups]
    average = AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.0 if variant.original else EMA), use_buffers=True
    )
    for step, (crops, rows) in enumerate(progress(stream, what, total=steps, unit="step")):
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
    """Phantoms, rendered once and kept in WORK: half with a cancer; brightness tells nothing."""
    path = budget.work / f"phantoms_{budget.size}.npy"
    if not path.exists():
        drawn_at = Size(round(budget.size.height * 1.5), budget.size.height)
        views = (
            sample_phantom(derive_seed("pool", number), bool(number % 2), 0.5, drawn_at)
            for number in range(PHANTOM_POOL)
        )
        crops = np.stack([crop_phantom(view, budget.size) for view in progress(views, "phantoms", total=PHANTOM_POOL)])
        with atomic_path(path) as temporary:
            np.save(temporary, crops)
    crops = np.load(path)
    return Data(pd.DataFrame({"cancer": np.arange(len(crops)) % 2.0}), crops)


def pretrain(variant: Variant, train: Data, fold: int, budget: Budget) -> dict[str, Tensor]:
    """The body's weights from phantoms (once for all folds) or from the training folds without their labels; kept in WORK."""
    name = "phantoms" if variant.pretrained == "phantoms" else f"mae_{fold}"
    path = budget.work / f"pretrained_{name}.pt"
    if not path.exists():
        torch.manual_seed(0)
        model = network(replace(variant, drop_path=0.0), budget)
        assert isinstance(model, ViT)
        free = replace(variant, layer_decay=1.0)
        if variant.pretrained == "phantoms":
            pool = phantom_pool(budget)
            held = np.arange(len(pool)) >= 0.9 * len(pool)
            labels, seen = torch.from_numpy(pool.labels[~held]), pool.rows(~held)

            def loss(crops: Tensor, rows: np.ndarray) -> Tensor:
                return bce()(model(crops).squeeze(-1).float(), labels[rows].to(crops.device)).mean()

            average = optimise(
                model,
                batches(seen, budget.pretraining, "natural", ours, 0),
                loss,
                budget.pretraining,
                free,
                budget,
                name,
            )
            auroc = RankedUnits(
                ScoredUnits(pool.labels[held], expit(score(average, pool.crops[held], budget)), np.arange(held.sum())),
                0.5,
            )
            print(f"phantoms: AUROC on {held.sum()} held out {auroc.metric_values()['auroc']:.3f}")
            state = average.module.state_dict()
        else:
            painter = MaskedAutoencoder(model)

            def paint(crops: Tensor, rows: np.ndarray) -> Tensor:
                return painter(pack_images(list(crops), model.config.patch)).mean()

            stream = batches(train, budget.pretraining, "natural", ours, fold)
            state = optimise(painter, stream, paint, budget.pretraining, free, budget, name).module.encoder.state_dict()  # type: ignore[union-attr]
        with atomic_path(path) as temporary:
            torch.save({key: value.cpu() for key, value in state.items() if not key.startswith("head")}, temporary)
    return torch.load(path, weights_only=True)


def fit(variant: Variant, train: Data, fold: int, budget: Budget, what: str) -> AveragedModel:
    torch.manual_seed(derive_seed("fit", fold))
    model = network(variant, budget)
    if variant.pretrained:
        model.load_state_dict(pretrain(variant, train, fold, budget), strict=False)
    labels = torch.from_numpy(train.labels)
    heads = AuxiliaryHeads(PRESETS[budget.model].dim, AUXILIARY).to(budget.device) if variant.auxiliary else None
    targets = (
        torch.stack([AUXILIARY_TARGETS[name].encode(train.table[name].tolist()) for name in AUXILIARY], dim=1)
        if heads
        else None
    )
    whole = nn.ModuleDict({"model": model} | ({"heads": heads} if heads else {}))

    def loss(crops: Tensor, rows: np.ndarray) -> Tensor:
        wanted = labels[rows].to(crops.device)
        if heads is None or targets is None:
            return bce()(model(crops).squeeze(-1).float(), wanted).mean()
        assert isinstance(model, ViT)
        read = model.pool(model.encode(model.embed(crops))).float()
        extra = heads(read, targets[rows].to(crops.device))
        return bce()(model.head(read).squeeze(-1).float(), wanted).mean() + 0.1 * extra.sum(dim=1).mean()

    way, change = ("natural", random_resized_crop) if variant.original else ("balanced", ours)
    return optimise(whole, batches(train, budget.images, way, change, fold), loss, budget.images, variant, budget, what)


def score(model: AveragedModel, crops: np.ndarray, budget: Budget) -> np.ndarray:
    """Logits of crops N H W: N."""
    network = model.module["model"] if isinstance(model.module, nn.ModuleDict) else model.module
    network.eval()
    parts = torch.from_numpy(crops).split(128)
    with torch.inference_mode(), torch.autocast(budget.device.type, torch.bfloat16):
        return torch.cat(
            [network(part[:, None].to(budget.device).float() / 255).squeeze(-1).float().cpu() for part in parts]
        ).numpy()


def frozen_features(name: str, budget: Budget) -> np.ndarray:
    """What a published ViT-S/14 sees in the crops of a subset at 224x112, the mean of its tokens, computed once: N D."""
    path = budget.work / f"frozen_{name}.npy"
    if not path.exists():
        data = load(name, replace(budget, size=SMALL))
        config = replace(PRESETS["vit_small14"], image_size=SMALL, pool="mean")
        model = ViT(config).to(budget.device).eval()
        assert budget.weights is not None
        print(fit_weights(model, load_weights(budget.weights)))
        seen = []
        with torch.inference_mode(), torch.autocast(budget.device.type, torch.bfloat16):
            for part in progress(list(torch.from_numpy(data.crops).split(32)), f"features of {name}"):
                images = part[:, None].to(budget.device).float() / 255
                seen.append(features(model, pack_images(list(images), config.patch)).float().cpu())
        with atomic_path(path) as temporary:
            np.save(temporary, torch.cat(seen).numpy())
    return np.load(path)


def probe(train: np.ndarray, dataset: str, data: Data, budget: Budget) -> tuple[np.ndarray, np.ndarray, int]:
    """A logistic regression on frozen features, fitted on the rows `train`: logits of all rows and of the films; parameters."""
    seen, films = frozen_features(dataset, budget), frozen_features("mias_512", budget)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=500)).fit(
        seen[train], data.labels[train]
    )
    return model.decision_function(seen), model.decision_function(films), seen.shape[1] + 1


def tune(name: str, dataset: str, data: Data, budget: Budget) -> tuple[np.ndarray, np.ndarray, int]:
    """All folds by `vitmodel train`, unless done: logits out of fold of all rows, of the films by all models; parameters of one."""
    folder, splits, said = budget.work / name, budget.work / "folds.csv", budget.work / f"{name}_mias.csv"
    crops, films = (load(each, replace(budget, size=VARIANTS[name].size)) for each in (dataset, "mias_512"))
    if not (folder / "package").exists():
        data.table[["patient_id", "fold"]].drop_duplicates().to_csv(splits, index=False)
        manifest = Path(crops.table["path"].iloc[0]).parents[2] / "manifest.csv"
        arguments = [
            "--config",
            str(RECIPE),
            "--weights",
            str(budget.weights),
            "--folds",
            str(FOLDS),
            "--splits",
            str(splits),
        ]
        if vitmodel(["train", str(manifest), str(folder), *arguments, *VARIANTS[name].flags, "--resume"]):
            raise SystemExit(1)
    predictor = Predictor(PredictorConfig(package=folder / "package", device=budget.device.type))
    if not said.exists():
        with atomic_path(said) as temporary:
            predictor.score_images(films.table).to_csv(temporary, index=False)
    tables = (
        read_table(path, ["image_id", "score"]).set_index("image_id") for path in (folder / "out_of_fold.csv", said)
    )
    own, of_films = (table["score"].astype(float) for table in tables)
    parameters = sum(parameter.numel() for parameter in predictor.ensemble.model.parameters())
    return (
        logit(own[data.table["image_id"]].to_numpy()),
        logit(of_films[films.table["image_id"]].to_numpy()),
        parameters,
    )


def run(name: str, fold: int, dataset: str, data: Data, films: Data, budget: Budget) -> None:
    """One variant on one fold, unless it is done."""
    path = budget.work / "results" / f"{name}_{fold}.json"
    if path.exists():
        return
    held_out = (data.table["fold"] == fold).to_numpy()
    began, cpu = time.perf_counter(), time.process_time()
    if VARIANTS[name].network == "frozen":
        logits, on_films, parameters = probe(~held_out, dataset, data, budget)
        logits = logits[held_out]
    elif VARIANTS[name].network == "train":
        logits, on_films, parameters = tune(name, dataset, data, budget)
        logits = logits[held_out]
    else:
        model = fit(VARIANTS[name], data.rows(~held_out), fold, budget, f"{name} fold {fold}")
        logits, on_films = (score(model, crops, budget) for crops in (data.crops[held_out], films.crops))
        parameters = sum(parameter.numel() for parameter in model.module.parameters())
    result = {
        "rows": np.flatnonzero(held_out).tolist(),
        "logits": logits.tolist(),
        "films": on_films.tolist(),
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - cpu,
        "parameters": parameters,
    }
    write_atomic(path, json.dumps(result))


@dataclass(frozen=True)
class Scores:
    """The out-of-fold scores of a variant and those of MIAS."""

    rows: np.ndarray
    logits: np.ndarray
    folds: list[int]
    films: np.ndarray
    parameters: int
    cpu_s: float


def collect(name: str, budget: Budget) -> Scores | None:
    done = {fold: budget.work / "results" / f"{name}_{fold}.json" for fold in range(FOLDS)}
    found = {fold: json.loads(path.read_text()) for fold, path in done.items() if path.exists()}
    if not found:
        return None
    rows, logits = (np.concatenate([each[key] for each in found.values()]) for key in ("rows", "logits"))
    films = np.mean([each["films"] for each in found.values()], axis=0)
    first = next(iter(found.values()))
    return Scores(
        rows.astype(int),
        logits,
        list(found),
        films,
        first["parameters"],
        float(np.mean([each["cpu_s"] for each in found.values()])),
    )


def to_breasts(data: Data, scores: Scores) -> tuple[ScoredUnits, np.ndarray]:
    """One row per breast, its score the mean over its views; and the fold of each."""
    table = data.table.iloc[scores.rows].assign(
        score=expit(scores.logits), breast=breast_ids(data.table).iloc[scores.rows]
    )
    breasts = table.groupby("breast").agg({"cancer": "max", "score": "mean", "patient_id": "first", "fold": "first"})
    return ScoredUnits(breasts.cancer, breasts.score, breasts.patient_id), breasts.fold.to_numpy()


def decisions(sample: ScoredUnits, folds: np.ndarray) -> np.ndarray:
    """Calls at the threshold with the best macro F1 on the other folds; with one fold alone, at 0.5."""
    called = np.zeros(len(folds))
    for fold in np.unique(folds):
        others = folds != fold
        threshold = choose_threshold(sample.labels[others], sample.scores[others], "macro_f1") if others.any() else 0.5
        called[~others] = sample.scores[~others] >= threshold
    return called


def counts(labels: np.ndarray, called: np.ndarray) -> np.ndarray:
    """What each breast adds to the table of decisions, tp, fp, fn and tn: 4 N."""
    return np.stack([labels * called, (1 - labels) * called, labels * (1 - called), (1 - labels) * (1 - called)])


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """The mean of both classes' F1, from sums of `counts`: 4 B -> B."""
    tp, fp, fn, tn = sums
    return tp / np.maximum(2 * tp + fp + fn, 1e-9) + tn / np.maximum(2 * tn + fp + fn, 1e-9)


def interval(rows: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], patients: np.ndarray) -> Interval:
    low, high = percentile_limits(resample(rows, lambda sums: [statistic(sums)], patients, 2000, 0))
    return Interval(float(statistic(rows.sum(axis=1))), float(low[0]), float(high[0]))


def report(data: Data, films: Data, budget: Budget) -> list[dict[str, Any]]:
    """A row per variant that has any fold. The difference in macro F1 to the original recipe is on the breasts that both scored."""
    lines: list[dict[str, Any]] = []
    base = collect("original", budget)
    for name, variant in VARIANTS.items():
        scores = collect(name, budget)
        if scores is None:
            continue
        table = data.table.iloc[scores.rows]
        images = ScoredUnits(table.cancer, expit(scores.logits), table.patient_id)
        breasts, folds = to_breasts(data, scores)
        called = decisions(breasts, folds)
        line: dict[str, Any] = {
            "variant": name, "note": variant.note, "folds": len(scores.folds), "millions": scores.parameters / 1e6, "cpu_s": scores.cpu_s,
            "auroc_image": compute_metrics(images, 0.5).intervals["auroc"],
            "auroc_breast": compute_metrics(breasts, 0.5).intervals["auroc"],
            "macro_f1": interval(counts(breasts.labels, called), macro_f1, breasts.patients),
            "mias": compute_metrics(ScoredUnits(films.labels, expit(scores.films), films.table.patient_id), 0.5).intervals["auroc"],
        }  # fmt: skip
        if base is not None and base.folds == scores.folds and name != "original":
            both = np.concatenate(
                [counts(breasts.labels, called), counts(breasts.labels, decisions(*to_breasts(data, base)))]
            )
            line["gain"] = interval(both, lambda sums: macro_f1(sums[:4]) - macro_f1(sums[4:]), breasts.patients)
        lines.append(line)
    return lines


def show(lines: list[dict[str, Any]]) -> None:
    print(
        "| recipe | M par. | folds | CPU s/fold | AUROC image | AUROC breast (views averaged) | macro F1 | gain over original | MIAS |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for line in lines:
        cells = [line["note"], f"{line['millions']:.1f}", line["folds"], f"{line['cpu_s']:.0f}"]
        cells += [line[key] for key in ("auroc_image", "auroc_breast", "macro_f1")] + [
            line.get("gain", ""),
            line["mias"],
        ]
        print("| " + " | ".join(map(str, cells)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--dataset", choices=["rsna_crop256", "rsna_640"], default="rsna_crop256")
    parser.add_argument("--images", type=int, default=13_000, help="training images per fold")
    parser.add_argument("--pretraining", type=int, default=26_000, help="images of a pretraining")
    parser.add_argument("--size", type=Size.parse, default=Size(128, 64))
    parser.add_argument("--model", choices=list(PRESETS), default="vit_micro")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(FOLDS)))
    parser.add_argument(
        "--weights", type=Path, help="published weights of a ViT-S/14, for the rows that start from them"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    parser.add_argument("--table", action="store_true", help="train nothing, only show what there is")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        cv2.setNumThreads(arguments.threads)
    budget = Budget(
        arguments.images,
        arguments.pretraining,
        arguments.size,
        arguments.model,
        torch.device(arguments.device),
        arguments.work,
        arguments.weights,
    )
    budget.work.mkdir(parents=True, exist_ok=True)
    settings = to_json({key: getattr(arguments, key) for key in ("dataset", "images", "pretraining", "size", "model")})
    mark = budget.work / "settings.json"
    if mark.exists() and mark.read_text() != settings:
        parser.error(f"{mark} has other settings; name another folder")
    write_atomic(mark, settings)
    data, films = load(arguments.dataset, budget), load("mias_512", budget)
    data.table = assign_folds(data.table, FOLDS, seed=0)
    augmented = [
        ours(crop.astype(np.float32) / 255, np.random.default_rng(number))
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
