"""Compare which models detect a cluster of microcalcifications a few pixels wide at which input height.

python benchmarks/microcalcifications.py WORK [--operations 6] [--heights 256 512 1024 2048] [--ways ...] [--json FILE]
                                         [--plot FILE]

The images are the phantoms of `vitmodel.phantoms.specks`, 2048 pixels high: a cancer is revealed only by sharp spots in
the cluster, not by brightness or the number of spots. Every variant (way) is the same small ViT (patch 16,
convolutional stem) trained from scratch. At every height it is trained with the same number of operations (TFLOP,
including recomputation), so that a variant with a higher cost per image sees fewer images:

- resized    the crop at that height, all patches
- packed     the same without patches of air
- segments   the crop at that height in segments of 96 pixels, 4 per image and step, including those with the cluster
- unboxed    segments whose relation to the cluster is unknown: image labels only

The 95 % intervals are from 2,000 resamplings of patients with one image each. Localisation is how often the segment
with the highest attention from the image's summary shows the cluster; the baselines are the segment closest to the
centre of the breast and a random one. Prints a table and draws a curve. The benchmark runs on CPU or CUDA and is
resumable: each finished (way, height) is a file in WORK.
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
    """Write the phantom of a seed with its box and scale; odd seeds have a cancer."""
    cv2.setNumThreads(1)
    phantom = sample_specks(seed, cancer=seed % 2 == 1, height=FULL)
    image = np.rint(phantom.image * 255).astype(np.uint8)
    with atomic_path(path) as temporary:
        np.savez(temporary, image=image, box=phantom.box, mm=phantom.mm_per_pixel)


class Phantoms:
    """The phantoms in WORK by seed; odd seeds have a cancer."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        missing = [seed for seed in range(count) if not self.path(seed).exists()]
        jobs = (joblib.delayed(write_phantom)(self.path(seed), seed) for seed in missing)
        list(progress(joblib.Parallel(n_jobs=1, return_as="generator")(jobs), "phantoms", total=len(missing)))

    def path(self, seed: int) -> Path:
        return self.folder / f"{seed}.npz"

    def read(self, seed: int, height: int, flip: bool = False) -> tuple[Tensor, Tensor, ImageMetadata]:
        """Return the crop at `height`, `(1, H, W)`, the box of the cluster on it, `(1, 4)`, and the scale."""
        with np.load(self.path(seed)) as file:
            image, box, mm = file["image"], file["box"], float(file["mm"])
        scale = height / FULL
        if scale < 1:
            size = max(16, round(image.shape[1] * scale)), height
            resized = cv2.resize(image.astype(np.float32), size, interpolation=cv2.INTER_AREA)
            image = np.where(resized > 0, np.clip(np.rint(resized), 1, 255), 0)
        pixels = torch.from_numpy(image.astype(np.float32) / 255)[None]
        box = torch.tensor(box * scale, dtype=torch.float32)[None]
        if flip:
            pixels, box = (
                pixels.flip(1),
                torch.stack([box[:, 0], height - box[:, 3], box[:, 2], height - box[:, 1]], dim=1),
            )
        return pixels, box, ImageMetadata(mm_per_pixel=mm / scale)


def stem_operations(config: ViTConfig, pixels: int) -> float:
    """Return the multiplications and additions of the convolutional stem, which processes air as well."""
    widths = [config.channels, *(config.dim // 2**i for i in reversed(range(config.patch.bit_length() - 1)))]
    convolutions = sum(18 * a * b * pixels / 4 ** (n + 1) for n, (a, b) in enumerate(itertools.pairwise(widths)))
    return convolutions + 2 * config.dim**2 * pixels / config.patch**2


def cost(config: ViTConfig, images: PackedBatch) -> float:
    """Return the operations of a forward pass."""
    blocks = sum(operations(config, length) for length in images.sequence_lengths(config.num_prefix_tokens))
    stem = sum(stem_operations(config, math.prod(image.shape[-2:])) for image in images.images)
    return blocks + stem


def build(way: str, height: int, device: torch.device) -> Network:
    torch.manual_seed(0)
    segmented = way in ("segments", "unboxed")
    size = Size(96, 96) if segmented else Size(height, height // 2)
    vit = replace(PRESETS["vit_micro"], stem="conv", image_size=size)
    return Network(NetworkConfig(vit=vit, segments=SEGMENTS if segmented else None)).to(device)


def draws(count: int) -> Iterator[tuple[int, bool]]:
    """Yield an endless random order of training phantoms, half of them with a cancer, as seed and whether to flip."""
    rng = np.random.default_rng(derive_seed("draws"))
    while True:
        even, odd = (rng.permutation(np.arange(start, count, 2)) for start in (0, 1))
        yield from ((int(seed), bool(rng.integers(2))) for seed in np.stack([even, odd], 1).ravel())


def train(
    way: str, height: int, phantoms: Phantoms, count: int, budget: float, device: torch.device
) -> tuple[Network, dict[str, Any]]:
    """Train one variant until `budget` operations are spent; return the model and its numbers."""
    model = build(way, height, device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, LR, 0.05), lr=LR, fused=True)
    start = time.process_time()
    spent = 0.0
    images = 0
    steps = 0
    recent: list[float] = []
    order = draws(count)
    while spent < budget:
        torch.manual_seed(derive_seed("step", steps))
        drawn = [next(order) for _ in range(BATCH)]
        pixels, boxes, metadata = zip(*(phantoms.read(seed, height, flip) for seed, flip in drawn), strict=True)
        labels = torch.tensor([float(seed % 2) for seed, _ in drawn], device=device)
        batch = pack_images(pixels, 16, air=way == "resized", metadata=metadata).to(device)
        extra: Tensor | float = 0.0
        if model.segments is None:
            features = model.features(batch)
            step_operations = 3 * cost(model.config.vit, batch)
        else:
            known_boxes = boxes if way == "segments" else [torch.empty(0, 4)] * BATCH
            output = model.encode_segments(batch, known_boxes)
            features = output.features
            step_operations = sum(4 * cost(model.config.vit, parts.pack) for parts in output.parts)
            # A sharp cluster is a lesion; the box of a blurred cluster is also sampled, and trained as negative.
            extra = segments.segment_losses(output, labels, known_boxes).mean()
        loss = F.binary_cross_entropy_with_logits(model.trunk.head(features)[:, 0], labels)
        recent = [*recent[-19:], loss.item()]
        optimizer.zero_grad()
        (loss + extra).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LR * warmup_cosine(spent / budget, 0.1)
        optimizer.step()
        spent += step_operations
        images += BATCH
        steps += 1
        if steps % 20 == 0:
            print(f"  {way} {height}: {images} images, {spent / budget:.0%}, loss {np.mean(recent):.3f}", flush=True)
    return model.eval(), {"images": images, "loss": float(np.mean(recent)), "cpu_seconds": time.process_time() - start}


def interval(values: np.ndarray) -> list[float]:
    """Return the mean of one value per patient and its 95 % interval."""
    rows = np.stack([values, np.ones_like(values)])
    replicates = resample(rows, lambda sums: (sums[0] / sums[1])[None], np.arange(len(values)), 2000, 0)
    return [float(values.mean()), *(float(limit[0]) for limit in percentile_limits(replicates))]


def auroc(labels: np.ndarray, scores: np.ndarray) -> list[float]:
    """Return the AUROC and its 95 % interval."""
    units = ScoredUnits(labels, expit(scores), np.arange(len(labels)))
    estimate = compute_metrics(units, 0.5, 2000).intervals["auroc"]
    return [estimate.value, estimate.low, estimate.high]


def locate(output: segments.SegmentsOutput, box: Tensor) -> dict[str, float]:
    """Return by criterion whether the segment that it selects shows the cluster."""
    (parts,), (attention,), (scores,), (logits,) = output.parts, output.attention, output.scores, output.logits
    shows_cluster = parts.contains_lesion(box)
    grid = parts.pack.grids[0]
    kept = parts.pack.patch_indices[0]
    mean_position = torch.stack([kept // grid[1], kept % grid[1]], 1).float().mean(0)
    breast_centre = (mean_position + 0.5) / torch.tensor(grid) * torch.tensor(parts.grid)
    centres = (parts.boxes_in_patches[1:, :2] + parts.boxes_in_patches[1:, 2:]) / 2
    selected = {
        "attention": attention[1:].argmax(),
        "segment's own logit": logits[1:].argmax(),
        "view's score": scores.argmax(),
        "middle of the breast": (centres - breast_centre).square().sum(1).argmin(),
    }
    hits = {name: float(shows_cluster[index]) for name, index in selected.items()}
    return hits | {"chance": float(shows_cluster.mean())}


def test(
    model: Network, way: str, height: int, phantoms: Phantoms, seeds: range, device: torch.device
) -> dict[str, Any]:
    """Measure the AUROC on held-out phantoms and the localisation of the cluster."""
    logits: dict[str, list[float]] = {}
    hits: dict[str, list[float]] = {}
    tops = {"all": 0}
    if model.segments is not None and height >= FULL:
        tops |= {"8": 8, "4": 4, "2": 2}
    for seed in seeds:
        pixels, box, metadata = phantoms.read(seed, height)
        image = pack_images([pixels], 16, air=way == "resized", metadata=[metadata]).to(device)
        with torch.inference_mode():
            for name, top in tops.items():
                if model.segments is not None:
                    model.segments.config = replace(SEGMENTS, segment_top=top)
                    output = model.encode_segments(image)
                    features = output.features
                    if seed % 2 and name == "all":
                        for criterion, hit in locate(output, box).items():
                            hits.setdefault(criterion, []).append(hit)
                else:
                    features = model.features(image)
                logits.setdefault(name, []).append(float(model.trunk.head(features)[0, 0]))
    labels = np.array([seed % 2 for seed in seeds], float)
    results: dict[str, Any] = {
        "auroc": {name: auroc(labels, np.array(values)) for name, values in logits.items()},
        "images": len(seeds),
    }
    if hits:
        results["hits"] = {criterion: interval(np.array(values)) for criterion, values in hits.items()}
        paired = np.array(hits["attention"]) - np.array(hits["middle of the breast"])
        results["hits"]["attention minus middle"] = interval(paired)
    return results


def plot(results: dict[str, Any], file: Path) -> None:
    """Draw the AUROC with intervals against the input height, one curve per way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for index, way in enumerate(WAYS):
        entries = {int(key.split()[1]): entry for key, entry in results.items() if key.split()[0] == way}
        if entries:
            heights = np.array(sorted(entries))
            values, low, high = np.array([entries[height]["test"]["auroc"]["all"] for height in heights]).T
            shifted = heights * 1.03 ** (index - 1.5)  # so that no interval hides another
            axes.errorbar(shifted, values, yerr=[values - low, high - values], fmt="o-", capsize=3, label=way)
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
    parser.add_argument("--operations", type=float, default=6.0, help="budget of each training in TFLOP")
    parser.add_argument("--heights", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--phantoms", type=int, default=800, help="number of training phantoms")
    parser.add_argument(
        "--test", type=int, default=200, help="number of held-out phantoms; `resized` at full height uses a quarter"
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
                model, training = train(way, height, phantoms, arguments.phantoms, arguments.operations * 1e12, device)
                # A dense image of full size takes seconds.
                count = arguments.test // 4 if way == "resized" and height == FULL else arguments.test
                seeds = range(arguments.phantoms, arguments.phantoms + count)
                tested = test(model, way, height, phantoms, seeds, device)
                write_atomic(file, to_json({"train": training, "test": tested}))
            results[f"{way} {height}"] = entry = json.loads(file.read_text())
            images = entry["train"]["images"]
            for name, (value, low, high) in entry["test"]["auroc"].items():
                estimate = f"AUROC {value:.3f} ({low:.3f} to {high:.3f})"
                print(f"{way:9} {height:5}  {images:6} training images, {name:>3} segments used  {estimate}")
            for criterion, (value, low, high) in entry["test"].get("hits", {}).items():
                print(f"{'':18}{criterion:24} shows the cluster: {value:.3f} ({low:.3f} to {high:.3f})")
    plot(results, arguments.plot)
    if arguments.json:
        write_atomic(arguments.json, to_json({"operations": arguments.operations * 1e12, "results": results}))


if __name__ == "__main__":
    main()
