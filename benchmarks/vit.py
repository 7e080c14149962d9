"""How fast the ViT is, dense and packed, beside its peers, and what leaving out air and bits is worth on real crops. Prints tables.

python benchmarks/vit.py [PART ...] [--json FILE]

Every way is timed in turn, A B A B, and ratios are medians over the rounds, since the machine may be shared. With one thread the clock is
the process' own CPU time, else the wall's. timm, transformers, ONNX Runtime and OpenVINO take part where they can be imported. A part
that is run alone adds its numbers to those that FILE holds.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision_stub import torchvision_stub

from vitmodel.config import Preprocessing, Size
from vitmodel.data.dataset import to_tensor
from vitmodel.model.architecture import PRESETS, ViTConfig
from vitmodel.model.onnx import ViTGraph, export_onnx, image_inputs, load_onnx, quantize
from vitmodel.model.packed_attention import forward
from vitmodel.model.packed_batch import PackedBatch, pack_images
from vitmodel.model.vit import ViT
from vitmodel.pixels.preprocessing import preprocess
from vitmodel.utils import atomic_path, to_json, write_atomic

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
DENSE = 2048  # rows of the largest image that `growth` also times dense
Way = Callable[[], Any]


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def ours(preset: str, size: Size) -> ViT:
    torch.manual_seed(0)
    return ViT(replace(PRESETS[preset], image_size=size, pool="cls"))


def timm_like(model: ViT) -> Any:
    """timm's model with the same weights."""
    with torchvision_stub():
        from timm.models.vision_transformer import VisionTransformer

    config = model.config
    peer = VisionTransformer(
        img_size=config.image_size,
        in_chans=1,
        num_classes=1,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
    )
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, config.dim), state["pos_embed"].flatten(1, 2)], dim=1)
    peer.load_state_dict(state)
    probe = torch.rand(1, 1, *config.image_size)
    with torch.inference_mode():
        assert torch.allclose(peer.eval()(probe), model.eval()(probe), atol=1e-5)
    return peer


def transformers_like(config: ViTConfig, attention: str) -> Any:
    import transformers

    settings: Any = transformers.ViTConfig(  # type: ignore[call-arg]
        hidden_size=config.dim, num_hidden_layers=config.depth, num_attention_heads=config.heads, intermediate_size=config.hidden,
        image_size=tuple(config.image_size), patch_size=config.patch, num_channels=1, num_labels=1)  # fmt: skip
    settings._attn_implementation = attention
    return transformers.ViTForImageClassification(settings).eval()


def exported(model: ViT, images: PackedBatch, calibration: PackedBatch | None = None) -> dict[str, Way]:
    """The runtimes that take ONNX, in 32 bits and, where there are crops to calibrate on, in 8."""
    if not (has("onnxscript") and has("onnxruntime")):
        return {}
    ways: dict[str, Way] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {"fp32": Path(folder) / "fp32.onnx"}
        export_onnx(ViTGraph([model]), paths["fp32"], "")
        if calibration is not None:
            paths["int8"] = Path(folder) / "int8.onnx"
            quantize(ViTGraph([model]), paths["int8"], image_inputs(calibration), "")
        for runtime, name in (("onnx", "ONNX Runtime"), ("openvino", "OpenVINO")):
            if has(runtime.replace("onnx", "onnxruntime")):
                ways |= {
                    f"{name} {bits}": partial(load_onnx(path, runtime, ""), images) for bits, path in paths.items()
                }
    return ways


def measure(ways: dict[str, Way], rounds: int, clock: Callable[[], float], warm: bool = True) -> dict[str, list[float]]:
    """Seconds of each way in each round; the ways take turns, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + warm):
        for name, way in ways.items():
            start = clock()
            way()
            seconds[name].append(clock() - start)
    return {name: values[warm:] for name, values in seconds.items()}


def table(
    title: str, seconds: dict[str, list[float]], reference: str, ideal: dict[str, float] | None = None
) -> dict[str, Any]:
    """Print and return the medians, and how many times faster than the reference each way is."""
    print(f"\n{title}")
    result = {}
    for name, values in seconds.items():
        ratio = statistics.median(base / value for base, value in zip(seconds[reference], values, strict=True))
        best = (ideal or {}).get(name)
        suffix = f"   ideal by operations {best:.2f}x, reached {ratio / best:.2f} of it" if best else ""
        print(f"  {name:22} {1e3 * statistics.median(values):9.1f} ms   {ratio:5.2f}x {reference}{suffix}")
        result[name] = {"seconds": statistics.median(values), f"times {reference}": ratio, "ideal": best}
    return {title: result}


def step_of(model: torch.nn.Module, logits: Way, fused: bool = True) -> Way:
    """One training step, AdamW included."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=fused)

    def step() -> None:
        optimizer.zero_grad()
        logits().float().square().mean().backward()
        optimizer.step()

    return step


def quiet(way: Way) -> Way:
    """Without gradients."""

    def run() -> None:
        with torch.inference_mode():
            way()

    return run


def dense(preset: str, size: Size, batch: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Forward pass and training step beside the peers."""
    model, images = ours(preset, size), torch.rand(batch, 1, *size)
    models: dict[str, Any] = {"ours": model}
    if has("timm"):
        models = {"timm": timm_like(model)} | models
    forwards = {name: quiet(partial(each, images)) for name, each in models.items()}
    if has("transformers"):
        for kind in ("eager", "sdpa"):
            peer = transformers_like(model.config, kind)
            forwards[f"transformers {kind}"] = quiet(partial(peer, images))
    forwards |= exported(model.eval(), pack_images(list(images), model.config.patch, air=True))
    reference = next(iter(models))
    title = f"{preset}, {batch} images of {size}, dense"
    results = table(f"{title}, forward", measure(forwards, rounds, clock), reference)
    steps = {name: step_of(each.train(), partial(each, images)) for name, each in models.items()}
    return results | table(f"{title}, training step", measure(steps, max(1, rounds // 2), clock), reference)


def operations(config: ViTConfig, tokens: int) -> float:
    """Multiplications and additions of one image in the blocks: matrices grow with its tokens, attention with their square."""
    return config.depth * (tokens * (8 * config.dim**2 + 4 * config.dim * config.hidden) + 4 * tokens**2 * config.dim)


def ideal(config: ViTConfig, images: PackedBatch) -> float:
    """How many times fewer operations the kept patches need than all."""
    every = sum(operations(config, config.num_prefix_tokens + h * w) for h, w in images.grids)
    return every / sum(operations(config, length) for length in images.sequence_lengths(config.num_prefix_tokens))


@functools.cache
def crops(source: str, size: Size, count: int) -> list[Tensor]:
    """Some real crops, spread over the release."""
    files = sorted(path for path in (DATA / source).rglob("*") if path.suffix in (".dcm", ".jpg", ".png"))
    return [
        to_tensor(preprocess(path, Preprocessing(size=size)).crop) for path in files[:: len(files) // count][:count]
    ]


def packed(preset: str, source: str, size: Size, count: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """The masks of real crops: dense against packed, in time and in memory."""
    model, batch = ours(preset, size), crops(source, size, count)
    some, images = pack_images(batch, model.config.patch), torch.stack(batch)
    least = ideal(model.config, some)
    kept = sum(some.sequence_lengths(0)) / sum(h * w for h, w in some.grids)
    logits: dict[str, tuple[torch.nn.Module, Way]] = {"ours dense": (model, lambda: model(images))}
    if has("timm"):
        peer = timm_like(model)
        logits = {"timm": (peer, lambda: peer(images))} | logits
    logits["ours packed"] = (model, lambda: forward(model, some))
    reference = next(iter(logits))
    title = f"{preset}, {count} crops of {source} at {size}, {kept:.0%} of the patches kept"
    model.eval()
    forwards = {name: quiet(way) for name, (_, way) in logits.items()}
    results = table(f"{title}, forward", measure(forwards, rounds, clock), reference, {"ours packed": least})
    steps = {name: step_of(each.train(), way) for name, (each, way) in logits.items()}
    results |= table(
        f"{title}, training step", measure(steps, max(1, rounds // 2), clock), reference, {"ours packed": least}
    )
    return results


def memory(preset: str, source: str, size: Size, count: int) -> dict[str, Any]:
    """Gigabytes that a forward and backward pass of some real crops takes, each way in a process of its own."""
    names = ["ours dense", "ours packed", "ours packed, checkpointing"]
    peaks = {
        name: peak_memory(preset, source, size, count, name) for name in (["timm", *names] if has("timm") else names)
    }
    title = f"{preset}, {count} crops of {source} at {size}, peak memory of a training step"
    print(f"\n{title}: " + ", ".join(f"{name} {value:.2f} GB" for name, value in peaks.items()))
    return {title: peaks}


def peak_memory(preset: str, source: str, size: Size, count: int, way: str) -> float:
    """Gigabytes by which one forward and backward pass grow a fresh process that holds model and images."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_one_step, args=(sender, preset, source, size, count, way))
    process.start()
    grown = receiver.recv()
    process.join()
    return grown


def _one_step(sender: Any, preset: str, source: str, size: Size, count: int, way: str) -> None:
    torch.set_num_threads(1)
    model, batch = ours(preset, size), crops(source, size, count)
    peer = timm_like(model) if way == "timm" else model
    some, images = pack_images(batch, model.config.patch), torch.stack(batch)
    before = _highest_memory()
    model.gradient_checkpointing = way.endswith("checkpointing")
    (forward(model, some) if way.startswith("ours packed") else peer(images)).square().mean().backward()
    sender.send(_highest_memory() - before)


def _highest_memory() -> float:
    """The most gigabytes that this process ever held (Linux). Unlike `getrusage`, it does not begin with the parent's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def growth(height: int, known: dict[str, Any], file: Path, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds of one forward pass of ViT-S on a crop of `height`, beside those of other heights that are `known`; draws all of them."""
    size = Size(height, height * 13 // 16 // 16 * 16)
    model, batch = ours("vit_small", size).eval(), crops("rsna_dicom", size, 1)
    some, images = pack_images(batch, 16), torch.stack(batch)
    ways = {"ours packed": quiet(partial(forward, model, some))}
    if height <= DENSE:
        ways["ours dense"] = quiet(partial(model, images))
        if has("timm"):
            ways["timm"] = quiet(partial(timm_like(model), images))
    else:
        print(f"growth: dense at {size} would take minutes a pass and is left out")
    seconds = {name: dict(points) for name, points in known.get("growth", {}).items()}
    for name, values in measure(ways, 1, clock, warm=height <= DENSE).items():
        seconds.setdefault(name, {})[str(size)] = statistics.median(values)
        print(
            f"growth, {name} at {size}, {some.sequence_lengths(1)[0]} of {1 + math.prod(some.grids[0])} tokens: {statistics.median(values):.2f} s"
        )
    draw_growth(seconds, file)
    return {"growth": seconds}


def draw_growth(seconds: dict[str, dict[str, float]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in sorted(seconds.items()):
        found = sorted(
            (size.height * size.width / 1e6, value)
            for size, value in ((Size.parse(size), value) for size, value in points.items())
        )
        axes.loglog(*zip(*found, strict=True), "o-", label=name)
    axes.set(xlabel="image area, megapixels", ylabel="seconds of a forward pass", title="ViT-S/16, one mammogram")
    axes.legend()
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def cuda(preset: str, size: Size, count: int, rounds: int) -> dict[str, Any]:
    """16 bits on a CUDA device: ours dense and packed and timm, the dense ones compiled; tokens/s and share of the measured matrix rate."""

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    def cast(way: Way) -> Way:
        def run() -> Any:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return way()

        return run

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / statistics.median(measure({"matmul": lambda: a @ a}, 10, clock)["matmul"])
    model, batch = ours(preset, size), crops("rsna_dicom", size, 8) * (count // 8)
    peer = timm_like(model).cuda() if has("timm") else None
    model = model.cuda()
    some, images = pack_images(batch, model.config.patch).to("cuda"), torch.stack(batch).cuda()
    fast: Any = torch.compile(model)
    blocks = copy.deepcopy(model)
    for block in blocks.blocks:
        block.compile(dynamic=True)  # as `--compile` does
    ways: dict[str, tuple[torch.nn.Module, Way]] = {"ours dense": (model, lambda: fast(images))}
    if peer is not None:
        timm: Any = torch.compile(peer)
        ways = {"timm": (peer, lambda: timm(images))} | ways
    ways |= {
        "ours packed": (model, lambda: forward(model, some)),
        "ours packed, compiled": (blocks, lambda: forward(blocks, some)),
    }
    config, least = model.config, ideal(model.config, some)
    full = pack_images(batch, config.patch, air=True)
    results: dict[str, Any] = {"matrix rate, TFLOP/s": rate / 1e12}
    title = f"CUDA bf16, {preset}, {len(batch)} crops at {size}"
    for kind, factor, prepare in (("forward", 1, lambda _, way: quiet(way)), ("training step", 3, step_of)):
        seconds = measure({name: prepare(each, cast(way)) for name, (each, way) in ways.items()}, rounds, clock)
        results |= table(
            f"{title}, {kind}",
            seconds,
            next(iter(ways)),
            dict.fromkeys(("ours packed", "ours packed, compiled"), least),
        )
        for name, values in seconds.items():
            lengths = (some if name.startswith("ours packed") else full).sequence_lengths(config.num_prefix_tokens)
            median = statistics.median(values)
            share = factor * sum(operations(config, length) for length in lengths) / median / rate
            print(f"  {name:22} {sum(lengths) / median:12.0f} tokens/s   {share:.0%} of the matrix rate")
    return results


def runtimes(preset: str, size: Size, count: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """From crops to logits by every runtime, packed, in 32 and in 8 bits, against dense timm; the crops that calibrate are others."""
    model, batch = ours(preset, size).eval(), crops("rsna_dicom", size, 8)
    images, others = pack_images(batch[:count], model.config.patch), pack_images(batch[count:], model.config.patch)
    ways: dict[str, Way] = {"torch": lambda: forward(model, pack_images(batch[:count], model.config.patch))}
    if has("timm"):
        ways = {"timm": partial(timm_like(model), torch.stack(batch[:count]))} | ways
    ways |= exported(model, images, others)
    with torch.inference_mode():
        exact = forward(model, images)
    for name, way in ways.items():
        if name.endswith(("fp32", "int8")):
            print(f"  {name}: logits differ by {(way() - exact).abs().max():.1e} at most")
    seconds = measure({name: quiet(way) for name, way in ways.items()}, rounds, clock)
    return table(f"{preset}, {count} crops at {size}, packed (timm dense), forward", seconds, next(iter(ways)))


def options(preset: str, images: list[Tensor], rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """What fused AdamW, checkpointing and bf16 are worth in a training step of packed images, and bf16 in a forward pass."""
    model = ours(preset, Size(*images[0].shape[-2:])).train()
    some = pack_images(images, model.config.patch)

    def logits(checkpoint: bool = False, bf16: bool = False) -> Tensor:
        model.gradient_checkpointing = checkpoint
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            return forward(model, some)

    steps = {
        "fp32, fused AdamW": step_of(model, logits),
        "AdamW not fused": step_of(model, logits, fused=False),
        "checkpointing": step_of(model, partial(logits, checkpoint=True)),
        "bf16": step_of(model, partial(logits, bf16=True)),
    }
    title = f"{preset}, {len(images)} images of {model.config.image_size}, packed"
    results = table(f"{title}, training step", measure(steps, rounds, clock), "fp32, fused AdamW")
    forwards = {"fp32": quiet(logits), "bf16": quiet(partial(logits, bf16=True))}
    return results | table(f"{title}, forward", measure(forwards, rounds, clock), "fp32")


def part(name: str, known: dict[str, Any], arguments: argparse.Namespace, clock: Callable[[], float]) -> dict[str, Any]:
    """One of PARTS; `known` are the numbers so far."""
    square, tall, large = Size(224, 224), Size(1024, 512), Size(2048, 1024)
    if name.startswith("dense"):
        preset = "vit_small" if "small" in name else "vit_base"
        return dense(preset, square, 4, 7, clock) if "224" in name else dense(preset, tall, 1, 3, clock)
    if name == "cuda" and not torch.cuda.is_available():
        print("\ncuda: no CUDA device here, 16-bit speed was not measured")
        return {}
    if not DATA.is_dir():
        print(f"\n{name}: real crops are not at hand, {DATA} is absent")
        return {}
    if name == "packed-1024":
        return packed("vit_small", "rsna_dicom", tall, 2, 5, clock)
    if name == "packed-2048":
        return packed("vit_small", "rsna_dicom", large, 1, 1, clock)
    if name.startswith("memory"):
        return memory("vit_small", "rsna_dicom", *((tall, 2) if "1024" in name else (large, 1)))
    if name == "runtimes":
        return runtimes("vit_small", tall, 4, 5, clock)
    if name == "options":
        small = crops("rsna_dicom", Size(128, 64), 8) * 2
        return options("vit_tiny", small, 9, clock) | options("vit_small", crops("rsna_dicom", tall, 1), 5, clock)
    if name.startswith("growth"):
        return growth(int(name.removeprefix("growth-")), known, arguments.plot, clock)
    return cuda("vit_small", tall, 32, 9) | cuda("vit_base", tall, 32, 9)


PARTS = [
    *("dense-small-224", "dense-base-224", "dense-small-1024", "dense-base-1024"),
    *("packed-1024", "packed-2048", "memory-1024", "memory-2048", "options", "runtimes"),
    *("growth-512", "growth-1024", "growth-2048", "growth-3072", "growth-4096", "cuda"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts",
        nargs="*",
        choices=[[], *PARTS],
        metavar="PART",
        help=f"what to measure: {', '.join(PARTS)}; default: all",
    )
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch and the runtimes")
    parser.add_argument(
        "--plot", type=Path, default=Path("vit_growth.png"), help="where the part growth draws time against area"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for module in ("timm", "transformers", "onnxruntime", "openvino"):
        if not has(module):
            print(f"{module} cannot be imported and takes no part")
    results: dict[str, Any] = {"torch": torch.__version__, "threads": arguments.threads}
    if arguments.json and arguments.json.exists():
        results = json.loads(arguments.json.read_text()) | results
    for name in arguments.parts or PARTS:
        results |= part(name, results, arguments, time.process_time if arguments.threads == 1 else time.perf_counter)
        if arguments.json:
            write_atomic(arguments.json, to_json(results))


if __name__ == "__main__":
    main()
