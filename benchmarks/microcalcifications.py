"""Who sees a cluster of microcalcifications a few pixels wide, at which input height? A table and a curve; resumable, CPU or CUDA.

python benchmarks/microcalcifications.py WORK [--operations 6] [--heights 256 512 1024 2048] [--ways ...] [--json FILE] [--plot FILE]

Phantoms as `vitmodel.phantoms.specks` draws them, 2048 pixels high: neither brightness nor the number of spots tells a cancer, only that
clustered spots are sharp. Every way is the same small ViT (patch 16, convolutional stem) from scratch, at every height with the same number
of operations in its training (TFLOP, recomputation counted), so that a way that costs more per image sees fewer images:

- resized    the crop at that height, all patches
- packed     the same without patches of air
- segments   the crop at that height in segments of 96 pixels, 4 per image and step, those with the cluster known (`lesions`)
- unboxed    segments without knowing where the cluster is: image labels alone

Intervals (95 %) are of 2,000 resamplings of patients, one image each. Localisation: how often the segment that the image's summary
attends to most shows the cluster, beside the segment next to the breast's middle and one by chance. A finished (way, height) is a file in
WORK.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import joblib
import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit
from torch import Tensor
from vit import operations

from vitmodel.config import SegmentsConfig, Size
from vitmodel.metrics.bootstrap import percentile_limits, resample
from vitmodel.metrics.metrics import compute_metrics
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.model import segments
from vitmodel.model.architecture import PRESETS, NetworkConfig, ViTConfig
from vitmodel.model.network import Network
from vitmodel.model.packed_batch import ImageMetadata, PackedBatch, pack_images
from vitmodel.phantoms.specks import sample_specks
from vitmodel.training.optimizer import parameter_groups, warmup_cosine
from vitmodel.utils import atomic_path, derive_seed, progress, to_json, write_atomic

FULL = 2048
SEGMENTS = SegmentsConfig(segments=96, segment_overlap=32, segment_context=256, segment_budget=4096, segment_samples=4)
BATCH = 8
LR = 3e-3
WAYS = ("resized", "packed", "segments", "unboxed")


def write_phantom(path: Path, seed: int) -> None:
    cv2.setNumThreads(1)
    drawn = sample_specks(seed, cancer=seed % 2 == 1, height=FULL)
    with atomic_path(path) as temporary:
        np.savez(temporary, image=np.rint(drawn.image * 255).astype(np.uint8), box=drawn.box, mm=drawn.mm_per_pixel)


class Phantoms:
    """The phantoms of WORK by seed; odd seeds have a cancer."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        todo = [seed for seed in range(count) if not self.path(seed).exists()]
        jobs = (joblib.delayed(write_phantom)(self.path(seed), seed) for seed in todo)
        list(progress(joblib.Parallel(n_jobs=1, return_as="generator")(jobs), "phantoms", total=len(todo)))

    def path(self, seed: int) -> Path:
        return self.folder / f"{seed}.npz"

    def read(self, seed: int, height: int, flip: bool = False) -> tuple[Tensor, Tensor, ImageMetadata]:
        """The crop at `height` (1 H W), the cluster's box on it (1 4) and its scale."""
        with np.load(self.path(seed)) as file:
            image, box, mm = file["image"], file["box"], float(file["mm"])
        scale = height / FULL
        if scale < 1:
            size = max(16, round(image.shape[1] * scale)), height
            resized = cv2.resize(image.astype(np.float32), size, interpolation=cv2.INTER_AREA)
            image = np.where(resized > 0, np.clip(np.rint(resized), 1, 255), 0)
        pixels, box = (
            torch.from_numpy(image.astype(np.float32) / 255)[None],
            torch.tensor(box * scale, dtype=torch.float32)[None],
        )
        if flip:
            pixels, box = (
                pixels.flip(1),
                torch.stack([box[:, 0], height - box[:, 3], box[:, 2], height - box[:, 1]], dim=1),
            )
        return pixels, box, ImageMetadata(mm_per_pixel=mm / scale)


def stem_operations(config: ViTConfig, pixels: int) -> float:
    """Multiplications and additions of the convolutional stem; it sees air, too."""
    widths = [config.channels, *(config.dim // 2**i for i in reversed(range(config.patch.bit_length() - 1)))]
    convolutions = sum(18 * a * b * pixels / 4 ** (n + 1) for n, (a, b) in enumerate(itertools.pairwise(widths)))
    return convolutions + 2 * config.dim**2 * pixels / config.patch**2


def cost(config: ViTConfig, images: PackedBatch) -> float:
    """Operations of a forward pass."""
    return sum(operations(config, length) for length in images.sequence_lengths(config.num_prefix_tokens)) + sum(
        stem_operations(config, math.prod(image.shape[-2:])) for image in images.images
    )


def build(way: str, height: int, device: torch.device) -> Network:
    torch.manual_seed(0)
    segmented = way in ("segments", "unboxed")
    size = Size(96, 96) if segmented else Size(height, height // 2)
    vit = replace(PRESETS["vit_micro"], stem="conv", image_size=size)
    return Network(NetworkConfig(vit=vit, segments=SEGMENTS if segmented else None)).to(device)


def draws(count: int) -> Iterator[tuple[int, bool]]:
    """Training phantoms in random order for ever, as many with as without a cancer, every other time upside down."""
    rng = np.random.default_rng(derive_seed("draws"))
    while True:
        even, odd = (rng.permutation(np.arange(start, count, 2)) for start in (0, 1))
        yield from ((int(seed), bool(rng.integers(2))) for seed in np.stack([even, odd], 1).ravel())


def train(
    way: str, height: int, phantoms: Phantoms, count: int, budget: float, device: torch.device
) -> tuple[Network, dict[str, Any]]:
    """Train until the operations are spent."""
    model = build(way, height, device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, LR, 0.05), lr=LR, fused=True)
    spent, images, steps, start, recent = 0.0, 0, 0, time.process_time(), []
    order = draws(count)
    while spent < budget:
        torch.manual_seed(derive_seed("step", steps))
        chosen = [next(order) for _ in range(BATCH)]
        pixels, boxes, metadata = zip(*(phantoms.read(seed, height, flip) for seed, flip in chosen), strict=True)
        labels = torch.tensor([float(seed % 2) for seed, _ in chosen], device=device)
        batch = pack_images(pixels, 16, air=way == "resized", metadata=metadata).to(device)
        if model.segments is None:
            features, extra, done = model.features(batch), 0.0, 3 * cost(model.config.vit, batch)
        else:
            known = boxes if way == "segments" else [torch.empty(0, 4)] * BATCH
            reading = model.encode_segments(batch, known)
            features, done = reading.features, sum(4 * cost(model.config.vit, parts.pack) for parts in reading.parts)
            # a sharp cluster is a lesion; where it is blurred its place is looked at, too, and taught as none
            extra = segments.segment_losses(reading, labels, known).mean()
        loss = F.binary_cross_entropy_with_logits(model.trunk.head(features)[:, 0], labels)
        recent = [*recent[-19:], loss.item()]
        optimizer.zero_grad()
        (loss + extra).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LR * warmup_cosine(spent / budget, 0.1)
        optimizer.step()
        spent, images, steps = spent + done, images + BATCH, steps + 1
        if steps % 20 == 0:
            print(f"  {way} {height}: {images} images, {spent / budget:.0%}, loss {np.mean(recent):.3f}", flush=True)
    return model.eval(), {"images": images, "loss": float(np.mean(recent)), "cpu_seconds": time.process_time() - start}


def interval(values: np.ndarray) -> list[float]:
    """The mean of one value per patient, and its limits."""
    drawn = resample(
        np.stack([values, np.ones_like(values)]),
        lambda sums: (sums[0] / sums[1])[None],
        np.arange(len(values)),
        2000,
        0,
    )
    return [float(values.mean()), *(float(limit[0]) for limit in percentile_limits(drawn))]


def auroc(labels: np.ndarray, scores: np.ndarray) -> list[float]:
    """AUROC and its limits."""
    found = compute_metrics(ScoredUnits(labels, expit(scores), np.arange(len(labels))), 0.5, 2000).intervals["auroc"]
    return [found.value, found.low, found.high]


def locate(reading: segments.SegmentsOutput, box: Tensor) -> dict[str, float]:
    """Whether each way to choose one segment finds the cluster."""
    (parts,), (attention,), (scores,), (logits,) = reading.parts, reading.attention, reading.scores, reading.logits
    shown = parts.contains_lesion(box)
    (view,) = parts.pack.grids[:1]
    kept = (
        torch.stack([parts.pack.patch_indices[0] // view[1], parts.pack.patch_indices[0] % view[1]], 1).float().mean(0)
    )
    middle = (kept + 0.5) / torch.tensor(view) * torch.tensor(parts.grid)
    middles = (parts.boxes_in_patches[1:, :2] + parts.boxes_in_patches[1:, 2:]) / 2
    chosen = {
        "attention": attention[1:].argmax(),
        "segment's own logit": logits[1:].argmax(),
        "view's score": scores.argmax(),
        "middle of the breast": (middles - middle).square().sum(1).argmin(),
    }
    return {name: float(shown[number]) for name, number in chosen.items()} | {"chance": float(shown.mean())}


def test(
    model: Network, way: str, height: int, phantoms: Phantoms, seeds: range, device: torch.device
) -> dict[str, Any]:
    """AUROC on held-out phantoms, and where the model looked."""
    logits: dict[str, list[float]] = {}
    found: dict[str, list[float]] = {}
    tops = {"all": 0} if model.segments is None or height < FULL else {"all": 0, "8": 8, "4": 4, "2": 2}
    for seed in seeds:
        pixels, box, metadata = phantoms.read(seed, height)
        image = pack_images([pixels], 16, air=way == "resized", metadata=[metadata]).to(device)
        with torch.inference_mode():
            for name, top in tops.items():
                if model.segments is not None:
                    model.segments.config = replace(SEGMENTS, segment_top=top)
                    reading = model.encode_segments(image)
                    if seed % 2 and name == "all":
                        for how, hit in locate(reading, box).items():
                            found.setdefault(how, []).append(hit)
                features = model.features(image) if model.segments is None else reading.features
                logits.setdefault(name, []).append(float(model.trunk.head(features)[0, 0]))
    labels = np.array([seed % 2 for seed in seeds], float)
    results: dict[str, Any] = {
        "auroc": {name: auroc(labels, np.array(values)) for name, values in logits.items()},
        "images": len(seeds),
    }
    if found:
        results["hits"] = {how: interval(np.array(values)) for how, values in found.items()}
        paired = np.array(found["attention"]) - np.array(found["middle of the breast"])
        results["hits"]["attention minus middle"] = interval(paired)
    return results


def plot(results: dict[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for place, way in enumerate(WAYS):
        points = sorted(
            (int(key.split()[1]), entry["test"]["auroc"]["all"])
            for key, entry in results.items()
            if key.split()[0] == way
        )
        if points:
            heights, (values, low, high) = (
                np.array([h for h, _ in points]),
                np.array([interval for _, interval in points]).T,
            )
            beside = heights * 1.03 ** (place - 1.5)  # so that no interval hides another
            axes.errorbar(beside, values, yerr=[values - low, high - values], fmt="o-", capsize=3, label=way)
    axes.axhline(0.5, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := [256, 512, 1024, FULL], [str(height) for height in ticks])
    axes.set(
        xlabel="input height, pixels",
        ylabel="AUROC on held-out phantoms",
        ylim=(0, 1.02),
        title="Clusters of specks a few pixels wide",
    )
    axes.legend(loc="lower left")
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--operations", type=float, default=6.0, help="of each training, TFLOP")
    parser.add_argument("--heights", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--phantoms", type=int, default=800, help="to train on")
    parser.add_argument(
        "--test", type=int, default=200, help="held out; the dense one at full height sees a quarter of them"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    parser.add_argument("--plot", type=Path, default=Path("microcalcifications.png"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    phantoms = Phantoms(arguments.work / "phantoms", arguments.phantoms + arguments.test)
    results: dict[str, Any] = {}
    for height in arguments.heights:
        for way in arguments.ways:
            if way == "unboxed" and height < FULL:
                continue
            file = arguments.work / f"{way}-{height}-{arguments.operations:g}.json"
            if not file.exists():
                model, course = train(way, height, phantoms, arguments.phantoms, arguments.operations * 1e12, device)
                count = arguments.test // (
                    4 if way == "resized" and height == FULL else 1
                )  # a dense image of full size takes seconds
                seeds = range(arguments.phantoms, arguments.phantoms + count)
                write_atomic(
                    file, to_json({"train": course, "test": test(model, way, height, phantoms, seeds, device)})
                )
            results[f"{way} {height}"] = entry = json.loads(file.read_text())
            images = entry["train"]["images"]
            for name, (value, low, high) in entry["test"]["auroc"].items():
                print(
                    f"{way:9} {height:5}  {images:6} images seen, {name:>3} parts read  AUROC {value:.3f} ({low:.3f} to {high:.3f})"
                )
            for how, (value, low, high) in entry["test"].get("hits", {}).items():
                print(f"{'':18}{how:24} shows the cluster: {value:.3f} ({low:.3f} to {high:.3f})")
    plot(results, arguments.plot)
    if arguments.json:
        write_atomic(arguments.json, to_json({"operations": arguments.operations * 1e12, "results": results}))


if __name__ == "__main__":
    main()
