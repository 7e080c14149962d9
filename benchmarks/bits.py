"""Measure how other runtimes with 32 and 8 bits change the ranking of a trained package.

python benchmarks/bits.py RUN [--images 64] [--threads N] [--json FILE]

RUN is a run of `vitmodel train --folds K` without sources, segments or fusion. Each fold's model is exported separately
and scores the patients it has not seen; the ranges for 8 bits are calibrated on crops of the other folds. Prints the
AUROC per image, its change from PyTorch with a paired interval over patients, and the change of the logits.
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

RUNTIMES = ("torch", "onnx fp32", "onnx int8", "openvino int8")


def load_runtimes(
    model: ViT, calibration: list[PackedBatch], folder: Path
) -> dict[str, Callable[[PackedBatch], Tensor]]:
    """Return functions that compute the logits of one model with each of `RUNTIMES`."""
    export_onnx(ViTGraph([model]), folder / "fp32.onnx", "")
    quantize(ViTGraph([model]), folder / "int8.onnx", image_inputs(calibration), "")
    functions: dict[str, Callable[[PackedBatch], Tensor]] = {"torch": lambda images: forward(model, images)}
    for name in RUNTIMES[1:]:
        runtime, bits = name.split()
        functions[name] = load_onnx(folder / f"{bits}.onnx", runtime, "")
    return functions


def score(run: Path, images: int) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Return the rows that belong to a fold, and their out-of-fold logits by runtime."""
    predictor = Predictor(PredictorConfig(package=run / "package", device="cpu", flip=False))
    model = predictor.ensemble.model
    if model.sources or model.exam or model.segments:
        raise SystemExit(
            f"{run}: its model has sources, segments or fusion, which an ONNX file cannot contain; "
            "choose a run that was trained without them"
        )
    table = read_manifest(run / "manifest.csv")
    table = table[table["fold"].notna()].reset_index(drop=True)
    rows = to_manifest_rows(table)
    logits = {name: np.full(len(table), np.nan) for name in RUNTIMES}
    for fold, network in enumerate(predictor.ensemble.packages[0].models):
        own = np.flatnonzero(table["fold"] == fold)
        others = np.flatnonzero(table["fold"] != fold)
        others = others[np.linspace(0, len(others) - 1, images).round().astype(int)]
        packs = (predictor.stream.load(rows[index]).pack for index in others)
        calibration = [pack for pack in packs if pack is not None]
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            functions = load_runtimes(network.trunk, calibration, Path(folder))
            for index in progress(own, f"fold {fold}"):
                if (pack := predictor.stream.load(rows[index]).pack) is not None:
                    for name, function in functions.items():
                        logits[name][index] = function(pack).item()
    return table, logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "--images", type=int, default=64, help="number of crops on which each 8-bit model is calibrated"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = PyTorch's default")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    table, logits = score(arguments.run, arguments.images)
    scored = np.isfinite(logits["torch"])
    labels = table["cancer"].to_numpy(float)[scored]
    patients = table["patient_id"].to_numpy()[scored]
    units = {name: ScoredUnits(labels, expit(values[scored]), patients) for name, values in logits.items()}
    results = {}
    print(f"{scored.sum()} images of {table['patient_id'][scored].nunique()} patients")
    print("| runtime | AUROC | change | change of the logits, mean and maximum |\n|---|---|---|---|")
    for name, sample in units.items():
        auroc = compute_metrics(sample, 0.5).intervals["auroc"]
        change = compare(units["torch"], sample, (0.5, 0.5)).differences["auroc"]
        error = np.abs(logits[name] - logits["torch"])[scored]
        results[name] = {
            "auroc": vars(auroc),
            "change": vars(change),
            "mean": float(error.mean()),
            "most": float(error.max()),
        }
        interval = f"{change.value:.4f} ({change.low:.4f} to {change.high:.4f})"
        print(f"| {name} | {auroc} | {interval} | {error.mean():.2g}, {error.max():.2g} |")
    if arguments.json:
        write_atomic(arguments.json, to_json(results))


if __name__ == "__main__":
    main()
