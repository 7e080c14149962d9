"""Measure the time and memory of encoding large images in segments, against other ways. Prints tables and writes JSON.

python benchmarks/segments.py [PART ...] [--threads 2] [--json FILE]

- growth     CPU seconds and peak memory of a training step of vit_micro on one image of 512 to 6000 pixels' height, by
             way, and the exponents with which they grow with the number of pixels
- beside     vit_small on one image of 2048x1024, half of it tissue: forward pass, training step and peak memory, by way
- large      a training step of vit_small on 4096x3328 with all segments, including AdamW
- cuda       the largest image for a training step of vit_small in 8, 24 and 80 GB

The ways are `dense` (full attention over all patches), `packed` (patches of air dropped), `windows` (packed; attention
within 256x256 pixels in all blocks), `windows+4` (the same, with full attention in every third block), `segments` (all
segments of 256 pixels with an overlap of 32) and `top 8` (the 8 best segments). Every measurement runs in a process of
its own, whose peak resident memory includes Python, weights, optimiser and step. Images are noise within half an
ellipse. The benchmark is resumable: numbers in FILE are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitmodel.config import SegmentsConfig, Size
from vitmodel.model import packed_attention
from vitmodel.model.architecture import PRESETS, NetworkConfig
from vitmodel.model.network import Network
from vitmodel.model.packed_attention import PackedLayout
from vitmodel.model.packed_batch import PackedBatch, pack_images
from vitmodel.utils import to_json, write_atomic

SEGMENTS = SegmentsConfig(segments=256, segment_overlap=32, segment_context=512, segment_budget=2048)
WAYS = ("dense", "packed", "windows", "windows+4", "segments", "top 8")
WINDOW = 16  # patches
MAX_HEIGHT = {"dense": 2048, "packed": 3072, "segments": 6000}
"""Largest height at which growth is measured; beyond it, full attention takes minutes."""
HEIGHTS = (512, 1024, 2048, 3072, 4096, 6000)
GIGABYTES = (8, 24, 80)


def breast(size: Size) -> Tensor:
    """Return noise in half an ellipse at the left, which fills about half of the image `(1, H, W)`."""
    rows, columns = np.ogrid[: size.height, : size.width]
    inside = ((rows / size.height - 0.5) / 0.48) ** 2 + (columns / size.width / 0.67) ** 2 < 1
    noise = np.random.default_rng(0).random(size, np.float32) + np.float32(1e-3)
    noise[~inside] = 0
    return torch.from_numpy(noise)[None]


def windowed(model: Network, image: PackedBatch, every: int) -> Tensor:
    """Return the logits of one image with window attention, and full attention in every `every`-th block (0 = none)."""
    trunk = model.trunk
    ((_, width),) = image.grids
    (kept,) = image.patch_indices
    window = kept // width // WINDOW * width + kept % width // WINDOW
    order = window.argsort(stable=True)
    _, counts = window.unique(return_counts=True)
    tokens = packed_attention.embed(trunk, image)
    prefix = trunk.config.num_prefix_tokens
    tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix:][:, order]], dim=1)
    windows = PackedLayout([prefix, *counts.tolist()], tokens.device)
    full = PackedLayout([tokens.shape[1]], tokens.device)
    for index, block in enumerate(trunk.blocks):
        tokens = block(tokens, full if every and index % every == every - 1 else windows)
    return trunk.head(trunk.pool(trunk.norm(tokens)))


def build(
    way: str, preset: str, size: Size, config: SegmentsConfig = SEGMENTS
) -> tuple[Network, Callable[[PackedBatch], Tensor]]:
    """Return the network of a way, and a function that computes the logits of a packed batch."""
    torch.manual_seed(0)
    segments = {"segments": config, "top 8": replace(config, segment_top=8)}.get(way)
    grid = Size(config.segments, config.segments) if segments else size
    model = Network(NetworkConfig(vit=replace(PRESETS[preset], image_size=grid), segments=segments))
    if way.startswith("windows"):
        return model, lambda image: windowed(model, image, 3 if way == "windows+4" else 0)
    return model, lambda images: model(images).images


def step(model: Network, logits: Callable[[PackedBatch], Tensor], images: PackedBatch) -> Callable[[], None]:
    """Return a function that runs one training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        logits(images).float().square().mean().backward()
        optimizer.step()

    return run


def measure(way: str, preset: str, size: Size, threads: int, warm: bool) -> dict[str, float]:
    """Measure the seconds of a forward pass and a training step, and the peak memory in GB after each."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    size = Size(*(math.ceil(side / 16) * 16 for side in size))
    model, logits = build(way, preset, size)
    results = {"base GB": peak()}
    images = pack_images([breast(size)], 16, air=way == "dense")
    results["tokens"] = float(sum(images.sequence_lengths(1)))

    def forward() -> None:
        with torch.inference_mode():
            logits(images)

    for name, work in (("forward", forward), ("step", step(model, logits, images))):
        if warm:
            work()
        start = clock()
        work()
        results[name] = clock() - start
        results[f"{name} GB"] = peak()
    return results


def peak() -> float:
    """Return the peak resident memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure_in_process(*arguments: object) -> dict[str, float]:
    """Run `measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps([str(argument) for argument in arguments])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def exponent(values: dict[str, float]) -> float:
    """Return the exponent with which values grow with the number of pixels, over the largest three sizes."""
    sizes = [Size.parse(size) for size in values][-3:]
    pixels = [size.height * size.width for size in sizes]
    return float(np.polyfit(np.log(pixels), np.log(list(values.values())[-3:]), 1)[0])


def growth(results: dict[str, Any], threads: int, save: Callable[[], None]) -> None:
    """Measure time and memory against the image size."""
    for way, max_height in MAX_HEIGHT.items():
        points = results.setdefault("growth", {}).setdefault(way, {})
        for height in HEIGHTS:
            size = Size(height, round(height * 13 / 16))
            if height <= max_height:
                if str(size) not in points:
                    points[str(size)] = measure_in_process(way, "vit_micro", size, threads, False)
                    save()
                point = points[str(size)]
                memory = f"{point['step GB']:6.2f} GB, before the image {point['base GB']:.2f}"
                print(f"growth {way:9} {size!s:10} {point['step']:7.1f} s {memory}")
        time_exponent = exponent({size: point["step"] for size, point in points.items()})
        memory_exponent = exponent({size: point["step GB"] - point["base GB"] for size, point in points.items()})
        print(
            f"growth {way:9} time ~ pixels^{time_exponent:.2f}, "
            f"memory in addition to Python and the network ~ pixels^{memory_exponent:.2f}"
        )


def beside(results: dict[str, Any], threads: int, save: Callable[[], None]) -> None:
    """Compare all ways at one size."""
    by_way = results.setdefault("beside", {})
    for way in WAYS:
        if way not in by_way:
            by_way[way] = measure_in_process(way, "vit_small", Size(2048, 1024), threads, False)
            save()
        point = by_way[way]
        times = f"forward {point['forward']:6.2f} s   step {point['step']:6.2f} s"
        print(f"beside {way:10} {times}   {point['step GB']:5.2f} GB")


def large(results: dict[str, Any], threads: int, save: Callable[[], None]) -> None:
    """Measure a training step on an image of full size."""
    if "large" not in results:
        results["large"] = measure_in_process("segments", "vit_small", Size(4096, 3328), threads, False)
        save()
    point = results["large"]
    times = f"forward {point['forward']:.1f} s, training step {point['step']:.1f} s"
    print(f"large: 4096x3328, {times}, peak {point['step GB']:.2f} GB")


def cuda(results: dict[str, Any], threads: int, save: Callable[[], None]) -> None:
    """Find the largest image that fits in the memory of a GPU."""
    if not torch.cuda.is_available():
        print("cuda: no CUDA device here; the largest image per GPU was not measured")
        return
    total = torch.cuda.get_device_properties(0).total_memory / 1e9
    for gigabytes in (size for size in GIGABYTES if size <= total):
        torch.cuda.set_per_process_memory_fraction(gigabytes / total)
        for way in ("dense", "packed", "segments"):
            largest, height = "none", 1024
            while height <= 32768:
                size = Size(height, height * 13 // 16)
                if not fits(way, size, replace(SEGMENTS, segment_budget=2048 * gigabytes)):
                    break
                largest, height = str(size), height * 5 // 4 // 256 * 256
            results.setdefault("cuda", {})[f"{way} in {gigabytes} GB"] = largest
            print(f"cuda: the largest image of {way} in {gigabytes} GB is {largest}")
            save()


def fits(way: str, size: Size, config: SegmentsConfig) -> bool:
    """Return whether a training step in 16 bits fits in memory."""
    try:
        model, logits = build(way, "vit_small", size, config)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            step(model.cuda(), logits, pack_images([breast(size)], 16, air=way == "dense").to("cuda"))()
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


PARTS = {"growth": growth, "beside": beside, "large": large, "cuda": cuda}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts",
        nargs="*",
        choices=[[], *PARTS],
        metavar="PART",
        help=f"what to measure: {', '.join(PARTS)}; default: all",
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of PyTorch; 1 measures CPU time, a larger number wall time"
    )
    parser.add_argument("--json", type=Path, help="file of the numbers; those that it contains are not measured again")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, preset, size, threads, warm = json.loads(arguments.measure)
        print(json.dumps(measure(way, preset, Size.parse(size), int(threads), warm == "True")))
        return
    results: dict[str, Any] = {"threads": arguments.threads}
    if arguments.json and arguments.json.exists():
        results = json.loads(arguments.json.read_text())

    def save() -> None:
        if arguments.json:
            write_atomic(arguments.json, to_json(results))

    for name in arguments.parts or PARTS:
        PARTS[name](results, arguments.threads, save)


if __name__ == "__main__":
    main()
