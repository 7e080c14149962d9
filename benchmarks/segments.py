"""What reading large images in segments costs in time and memory, beside other ways to read them. Prints tables, writes JSON; resumable.

python benchmarks/segments.py [PART ...] [--threads 2] [--json FILE]

- growth     seconds of CPU and peak memory of a training step of vit_micro on one image of 512 to 6000 pixels' height, by way, and the
             exponents with which they grow with the number of pixels
- beside     vit_small on one image of 2048x1024, half of it tissue: forward pass, training step, peak memory, by way
- large      a training step of vit_small on 4096x3328 with all its segments, AdamW included
- cuda       the largest image that a training step of vit_small takes in 8, 24 and 80 GB

Ways: `dense` (all patches attend to all), `packed` (patches of air dropped), `windows` (packed; attention within 256x256 pixels in all
blocks), `windows+4` (the same, every third block attends to everything), `segments` (all of them, 256 pixels, overlap 32), `top 8`. Every
measurement has a process of its own, whose peak resident memory is that of Python, weights, optimiser and step together. Images are noise
within half an ellipse.
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
MOST = {
    "dense": 2048,
    "packed": 3072,
    "segments": 6000,
}  # height up to which growth is measured: beyond, full attention takes minutes
HEIGHTS = (512, 1024, 2048, 3072, 4096, 6000)
GIGABYTES = (8, 24, 80)


def breast(size: Size) -> Tensor:
    """Noise in half an ellipse at the left, about half of the image: 1 H W."""
    rows, columns = np.ogrid[: size.height, : size.width]
    inside = ((rows / size.height - 0.5) / 0.48) ** 2 + (columns / size.width / 0.67) ** 2 < 1
    noise = np.random.default_rng(0).random(size, np.float32) + np.float32(1e-3)
    noise[~inside] = 0
    return torch.from_numpy(noise)[None]


def windowed(model: Network, image: PackedBatch, every: int) -> Tensor:
    """Logits of one image whose tokens attend within windows and, in every `every`-th block (0 = none), to everything."""
    trunk, ((_, width),), (kept,) = model.trunk, image.grids, image.patch_indices
    place = kept // width // WINDOW * width + kept % width // WINDOW
    order = place.argsort(stable=True)
    _, counts = place.unique(return_counts=True)
    tokens = packed_attention.embed(trunk, image)
    prefix = trunk.config.num_prefix_tokens
    tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix:][:, order]], dim=1)
    windows, whole = (
        PackedLayout(lengths, tokens.device) for lengths in ([prefix, *counts.tolist()], [tokens.shape[1]])
    )
    for number, block in enumerate(trunk.blocks):
        tokens = block(tokens, whole if every and number % every == every - 1 else windows)
    return trunk.head(trunk.pool(trunk.norm(tokens)))


def build(
    way: str, preset: str, size: Size, config: SegmentsConfig = SEGMENTS
) -> tuple[Network, Callable[[PackedBatch], Tensor]]:
    """The network of a way, and what makes logits of a pack."""
    torch.manual_seed(0)
    segments = {"segments": config, "top 8": replace(config, segment_top=8)}.get(way)
    grid = Size(config.segments, config.segments) if segments else size
    model = Network(NetworkConfig(vit=replace(PRESETS[preset], image_size=grid), segments=segments))
    if way.startswith("windows"):
        return model, lambda image: windowed(model, image, 3 if way == "windows+4" else 0)
    return model, lambda images: model(images).images


def step(model: Network, logits: Callable[[PackedBatch], Tensor], images: PackedBatch) -> Callable[[], None]:
    """A training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        logits(images).float().square().mean().backward()
        optimizer.step()

    return run


def measure(way: str, preset: str, size: Size, threads: int, warm: bool) -> dict[str, float]:
    """Seconds of a forward pass and of a training step, and the process' peak memory after each, in GB."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    size = Size(*(math.ceil(side / 16) * 16 for side in size))
    model, logits = build(way, preset, size)
    found = {"base GB": peak()}
    images = pack_images([breast(size)], 16, air=way == "dense")
    found["tokens"] = float(sum(images.sequence_lengths(1)))

    def forward() -> None:
        with torch.inference_mode():
            logits(images)

    for name, work in (("forward", forward), ("step", step(model, logits, images))):
        if warm:
            work()
        start = clock()
        work()
        found[name] = clock() - start
        found[f"{name} GB"] = peak()
    return found


def peak() -> float:
    """The most memory that this process has held, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def apart(*arguments: object) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps([str(argument) for argument in arguments])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def exponent(values: dict[str, float]) -> float:
    """With which power of the number of pixels the values of sizes grow, over the largest three."""
    sizes = [Size.parse(size) for size in values][-3:]
    return float(
        np.polyfit(np.log([size.height * size.width for size in sizes]), np.log(list(values.values())[-3:]), 1)[0]
    )


def growth(results: dict[str, Any], threads: int, save: Callable[[], None]) -> None:
    for way, most in MOST.items():
        points = results.setdefault("growth", {}).setdefault(way, {})
        for height in HEIGHTS:
            size = Size(height, round(height * 13 / 16))
            if height <= most:
                if str(size) not in points:
                    points[str(size)] = apart(way, "vit_micro", size, threads, False)
                    save()
                each = points[str(size)]
                print(
                    f"growth {way:9} {size!s:10} {each['step']:7.1f} s {each['step GB']:6.2f} GB, before the image {each['base GB']:.2f}"
                )
        seconds = exponent({size: each["step"] for size, each in points.items()})
        memory = exponent({size: each["step GB"] - each["base GB"] for size, each in points.items()})
        print(f"growth {way:9} time ~ pixels^{seconds:.2f}, memory beyond Python and the network ~ pixels^{memory:.2f}")


def beside(results: dict[str, Any], threads: int, save: Callable[[], None]) -> None:
    found = results.setdefault("beside", {})
    for way in WAYS:
        if way not in found:
            found[way] = apart(way, "vit_small", Size(2048, 1024), threads, False)
            save()
        each = found[way]
        print(
            f"beside {way:10} forward {each['forward']:6.2f} s   step {each['step']:6.2f} s   {each['step GB']:5.2f} GB"
        )


def large(results: dict[str, Any], threads: int, save: Callable[[], None]) -> None:
    if "large" not in results:
        results["large"] = apart("segments", "vit_small", Size(4096, 3328), threads, False)
        save()
    each = results["large"]
    print(
        f"large: 4096x3328, forward {each['forward']:.1f} s, training step {each['step']:.1f} s, peak {each['step GB']:.2f} GB"
    )


def cuda(results: dict[str, Any], threads: int, save: Callable[[], None]) -> None:
    if not torch.cuda.is_available():
        print("cuda: no CUDA device here, the largest image per GPU was not measured")
        return
    total = torch.cuda.get_device_properties(0).total_memory / 1e9
    for gigabytes in (each for each in GIGABYTES if each <= total):
        torch.cuda.set_per_process_memory_fraction(gigabytes / total)
        for way in ("dense", "packed", "segments"):
            largest, height = "none", 1024
            while height <= 32768:
                size = Size(height, height * 13 // 16)
                if not fits(way, size, replace(SEGMENTS, segment_budget=2048 * gigabytes)):
                    break
                largest, height = str(size), height * 5 // 4 // 256 * 256
            results.setdefault("cuda", {})[f"{way} in {gigabytes} GB"] = largest
            print(f"cuda: {way} takes {largest} in {gigabytes} GB")
            save()


def fits(way: str, size: Size, config: SegmentsConfig) -> bool:
    """Whether a training step in 16 bits ends without running out of memory."""
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
        "--threads", type=int, default=1, help="of PyTorch; with 1 the clock is the process' CPU time, else the wall's"
    )
    parser.add_argument("--json", type=Path, help="where the numbers go; what it holds is not measured again")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, preset, size, threads, warm = json.loads(arguments.measure)
        print(json.dumps(measure(way, preset, Size.parse(size), int(threads), warm == "True")))
        return
    known = arguments.json and arguments.json.exists()
    results: dict[str, Any] = json.loads(arguments.json.read_text()) if known else {"threads": arguments.threads}

    def save() -> None:
        if arguments.json:
            write_atomic(arguments.json, to_json(results))

    for name in arguments.parts or PARTS:
        PARTS[name](results, arguments.threads, save)


if __name__ == "__main__":
    main()
