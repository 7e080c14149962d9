"""What 32 and 8 bits by other runtimes do to the ranking of a trained package: each fold's model on the patients whom it did not see.

python benchmarks/bits.py RUN [--images 64] [--threads N] [--json FILE]

RUN is that of `vitmodel train --folds K` without sources, segments or fusion. Each model is exported by itself, in 8 bits with ranges that
crops of the other folds show. Prints the AUROC per image, its change against torch with a paired interval over patients, and how far the
logits move.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import expit
from torch import Tensor

from vitmodel.config import PredictorConfig
from vitmodel.data.manifest import read_manifest
from vitmodel.data.rows import to_manifest_rows
from vitmodel.metrics.compare import compare
from vitmodel.metrics.metrics import compute_metrics
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.model.onnx import ViTGraph, export_onnx, image_inputs, load_onnx, quantize
from vitmodel.model.packed_attention import forward
from vitmodel.model.packed_batch import PackedBatch
from vitmodel.model.vit import ViT
from vitmodel.scoring.predictor import Predictor
from vitmodel.utils import progress, to_json, write_atomic

WAYS = ("torch", "onnx fp32", "onnx int8", "openvino int8")


def ways_of(model: ViT, calibration: list[PackedBatch], folder: Path) -> dict[str, Callable[[PackedBatch], Tensor]]:
    """One model by all of WAYS."""
    export_onnx(ViTGraph([model]), folder / "fp32.onnx", "")
    quantize(ViTGraph([model]), folder / "int8.onnx", image_inputs(calibration), "")
    runs = {way: load_onnx(folder / f"{way.split()[1]}.onnx", way.split()[0], "") for way in WAYS[1:]}
    return {"torch": lambda images: forward(model, images)} | runs


def score(run: Path, images: int) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """The rows that have a fold, and their logits out of fold by all of WAYS."""
    predictor = Predictor(PredictorConfig(package=run / "package", device="cpu", flip=False))
    if predictor.ensemble.model.sources or predictor.ensemble.model.exam or predictor.ensemble.model.segments:
        raise SystemExit(
            f"{run}: has sources, segments or fusion, which no ONNX file holds; its ViT alone is not the model"
        )
    table = read_manifest(run / "manifest.csv")
    table = table[table["fold"].notna()].reset_index(drop=True)
    rows = to_manifest_rows(table)
    logits = {way: np.full(len(table), np.nan) for way in WAYS}
    for fold, network in enumerate(predictor.ensemble.packages[0].models):
        own = np.flatnonzero(table["fold"] == fold)
        others = np.flatnonzero(table["fold"] != fold)
        others = others[np.linspace(0, len(others) - 1, images).round().astype(int)]
        calibration = [
            crop for crop in (predictor.stream.load(rows[place]).pack for place in others) if crop is not None
        ]
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            ways = ways_of(network.trunk, calibration, Path(folder))
            for place in progress(own, f"fold {fold}"):
                if (crop := predictor.stream.load(rows[place]).pack) is not None:
                    for name, way in ways.items():
                        logits[name][place] = way(crop).item()
    return table, logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=64, help="crops that each model in 8 bits is calibrated on")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    table, logits = score(arguments.run, arguments.images)
    read = np.isfinite(logits["torch"])
    samples = {
        name: ScoredUnits(
            table["cancer"].to_numpy(float)[read], expit(each[read]), table["patient_id"].to_numpy()[read]
        )
        for name, each in logits.items()
    }
    lines = {}
    print(f"{read.sum()} images of {table['patient_id'][read].nunique()} patients")
    print("| way | AUROC | change | logits' change, mean and at most |\n|---|---|---|---|")
    for name, sample in samples.items():
        auroc = compute_metrics(sample, 0.5).intervals["auroc"]
        change = compare(samples["torch"], sample, (0.5, 0.5)).differences["auroc"]
        apart = np.abs(logits[name] - logits["torch"])[read]
        lines[name] = {
            "auroc": vars(auroc),
            "change": vars(change),
            "mean": float(apart.mean()),
            "most": float(apart.max()),
        }
        print(
            f"| {name} | {auroc} | {change.value:.4f} ({change.low:.4f} to {change.high:.4f}) | {apart.mean():.2g}, {apart.max():.2g} |"
        )
    if arguments.json:
        write_atomic(arguments.json, to_json(lines))


if __name__ == "__main__":
    main()
