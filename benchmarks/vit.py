"""Measure the speed of the ViT, dense and packed, against its peers, and the effect of dropping air and of fewer bits.

python benchmarks/vit.py [PART ...] [--json FILE]

All variants are timed in turn (A B A B), and ratios are medians over the rounds, because the machine may be shared.
With one thread the clock is the CPU time of the process, otherwise wall time. timm, transformers, ONNX Runtime and
OpenVINO take part if they can be imported. A part that is run alone adds its numbers to those in FILE. Prints tables.
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
MAX_DENSE_HEIGHT = 2048  # height of the largest image that `growth` also times dense
Run = Callable[[], Any]


def has(module: str) -> bool:
    """Return whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def ours(preset: str, size: Size) -> ViT:
    """Return our ViT with random weights and a class token."""
    torch.manual_seed(0)
    return ViT(replace(PRESETS[preset], image_size=size, pool="cls"))


def timm_like(model: ViT) -> Any:
    """Return timm's model with the same weights."""
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
    """Return the model of transformers with the same architecture."""
    import transformers

    settings: Any = transformers.ViTConfig(  # type: ignore[call-arg]
        hidden_size=config.dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=config.hidden,
        image_size=tuple(config.image_size),
        patch_size=config.patch,
        num_channels=1,
        num_labels=1,
    )
    settings._attn_implementation = attention
    return transformers.ViTForImageClassification(settings).eval()


def exported(model: ViT, images: PackedBatch, calibration: PackedBatch | None = None) -> dict[str, Run]:
    """Return runs of the runtimes for ONNX with 32 bits and, given crops for the calibration, with 8 bits."""
    if not (has("onnxscript") and has("onnxruntime")):
        return {}
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {"fp32": Path(folder) / "fp32.onnx"}
        export_onnx(ViTGraph([model]), paths["fp32"], "")
        if calibration is not None:
            paths["int8"] = Path(folder) / "int8.onnx"
            quantize(ViTGraph([model]), paths["int8"], image_inputs(calibration), "")
        for runtime, name in (("onnx", "ONNX Runtime"), ("openvino", "OpenVINO")):
            if has(runtime.replace("onnx", "onnxruntime")):
                for bits, path in paths.items():
                    runs[f"{name} {bits}"] = partial(load_onnx(path, runtime, ""), images)
    return runs


def measure(runs: dict[str, Run], rounds: int, clock: Callable[[], float], warm: bool = True) -> dict[str, list[float]]:
    """Return the seconds of each run in each round; the runs take turns, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + warm):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: values[warm:] for name, values in seconds.items()}


def table(
    title: str, seconds: dict[str, list[float]], reference: str, ideal: dict[str, float] | None = None
) -> dict[str, Any]:
    """Print and return the median seconds of each run, and its speed relative to the reference.

    Args:
        title: Title of the table.
        seconds: Seconds by run and round.
        reference: Name of the run to compare with.
        ideal: By run, the relative speed that its number of operations would give.
    """
    print(f"\n{title}")
    result = {}
    for name, values in seconds.items():
        ratio = statistics.median(base / value for base, value in zip(seconds[reference], values, strict=True))
        best = (ideal or {}).get(name)
        suffix = f"   ideal by operations {best:.2f}x, of which {ratio / best:.0%} is reached" if best else ""
        print(f"  {name:22} {1e3 * statistics.median(values):9.1f} ms   {ratio:5.2f}x {reference}{suffix}")
        result[name] = {"seconds": statistics.median(values), f"times {reference}": ratio, "ideal": best}
    return {title: result}


def training_step(model: torch.nn.Module, logits: Run, fused: bool = True) -> Run:
    """Return a run of one training step, including AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=fused)

    def step() -> None:
        optimizer.zero_grad()
        logits().float().square().mean().backward()
        optimizer.step()

    return step


def without_gradients(run: Run) -> Run:
    """Return a run in inference mode."""

    def inference() -> None:
        with torch.inference_mode():
            run()

    return inference


def dense(preset: str, size: Size, batch: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Compare forward pass and training step with the peers."""
    model = ours(preset, size)
    images = torch.rand(batch, 1, *size)
    models: dict[str, Any] = {"ours": model}
    if has("timm"):
        models = {"timm": timm_like(model)} | models
    forwards = {name: without_gradients(partial(network, images)) for name, network in models.items()}
    if has("transformers"):
        for kind in ("eager", "sdpa"):
            peer = transformers_like(model.config, kind)
            forwards[f"transformers {kind}"] = without_gradients(partial(peer, images))
    forwards |= exported(model.eval(), pack_images(list(images), model.config.patch, air=True))
    reference = next(iter(models))
    title = f"{preset}, {batch} images of {size}, dense"
    results = table(f"{title}, forward", measure(forwards, rounds, clock), reference)
    steps = {name: training_step(network.train(), partial(network, images)) for name, network in models.items()}
    return results | table(f"{title}, training step", measure(steps, max(1, rounds // 2), clock), reference)


def operations(config: ViTConfig, tokens: int) -> float:
    """Return the multiplications and additions of one image in the blocks.

    Those of the matrices grow with the number of tokens, those of attention with its square.
    """
    return config.depth * (tokens * (8 * config.dim**2 + 4 * config.dim * config.hidden) + 4 * tokens**2 * config.dim)


def ideal(config: ViTConfig, images: PackedBatch) -> float:
    """Return the operations of all patches divided by those of the kept patches."""
    dense = sum(operations(config, config.num_prefix_tokens + h * w) for h, w in images.grids)
    return dense / sum(operations(config, length) for length in images.sequence_lengths(config.num_prefix_tokens))


@functools.cache
def crops(source: str, size: Size, count: int) -> list[Tensor]:
    """Return real crops from files that are spread over the release."""
    files = sorted(path for path in (DATA / source).rglob("*") if path.suffix in (".dcm", ".jpg", ".png"))
    selected = files[:: len(files) // count][:count]
    return [to_tensor(preprocess(path, Preprocessing(size=size)).crop) for path in selected]


def packed(preset: str, source: str, size: Size, count: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Compare dense and packed runs on the masks of real crops."""
    model = ours(preset, size)
    batch = crops(source, size, count)
    pack = pack_images(batch, model.config.patch)
    images = torch.stack(batch)
    best = {"ours packed": ideal(model.config, pack)}
    kept = sum(pack.sequence_lengths(0)) / sum(h * w for h, w in pack.grids)
    logits: dict[str, tuple[torch.nn.Module, Run]] = {"ours dense": (model, lambda: model(images))}
    if has("timm"):
        peer = timm_like(model)
        logits = {"timm": (peer, lambda: peer(images))} | logits
    logits["ours packed"] = (model, lambda: forward(model, pack))
    reference = next(iter(logits))
    title = f"{preset}, {count} crops of {source} at {size}, {kept:.0%} of the patches kept"
    model.eval()
    forwards = {name: without_gradients(run) for name, (_, run) in logits.items()}
    results = table(f"{title}, forward", measure(forwards, rounds, clock), reference, best)
    steps = {name: training_step(network.train(), run) for name, (network, run) in logits.items()}
    seconds = measure(steps, max(1, rounds // 2), clock)
    return results | table(f"{title}, training step", seconds, reference, best)


def memory(preset: str, source: str, size: Size, count: int) -> dict[str, Any]:
    """Measure the GB of a forward and backward pass of real crops, each variant in a process of its own."""
    names = ["ours dense", "ours packed", "ours packed, checkpointing"]
    if has("timm"):
        names = ["timm", *names]
    peaks = {name: peak_memory(preset, source, size, count, name) for name in names}
    title = f"{preset}, {count} crops of {source} at {size}, peak memory of a training step"
    print(f"\n{title}: " + ", ".join(f"{name} {value:.2f} GB" for name, value in peaks.items()))
    return {title: peaks}


def peak_memory(preset: str, source: str, size: Size, count: int, variant: str) -> float:
    """Return the GB by which a forward and backward pass increase the peak of a process with model and images."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_one_step, args=(sender, preset, source, size, count, variant))
    process.start()
    increase = receiver.recv()
    process.join()
    return increase


def _one_step(sender: Any, preset: str, source: str, size: Size, count: int, variant: str) -> None:
    """Run one forward and backward pass and send the increase of the peak memory."""
    torch.set_num_threads(1)
    model = ours(preset, size)
    batch = crops(source, size, count)
    peer = timm_like(model) if variant == "timm" else model
    pack = pack_images(batch, model.config.patch)
    images = torch.stack(batch)
    before = _peak_memory_of_process()
    model.gradient_checkpointing = variant.endswith("checkpointing")
    logits = forward(model, pack) if variant.startswith("ours packed") else peer(images)
    logits.square().mean().backward()
    sender.send(_peak_memory_of_process() - before)


def _peak_memory_of_process() -> float:
    """Return the peak memory of this process in GB (Linux); unlike `getrusage`, it does not include the parent's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def growth(height: int, earlier: dict[str, Any], file: Path, clock: Callable[[], float]) -> dict[str, Any]:
    """Measure one forward pass of ViT-S on a crop of `height`, and draw it with the heights in `earlier` results."""
    size = Size(height, height * 13 // 16 // 16 * 16)
    model = ours("vit_small", size).eval()
    batch = crops("rsna_dicom", size, 1)
    pack = pack_images(batch, 16)
    images = torch.stack(batch)
    runs = {"ours packed": without_gradients(partial(forward, model, pack))}
    if height <= MAX_DENSE_HEIGHT:
        runs["ours dense"] = without_gradients(partial(model, images))
        if has("timm"):
            runs["timm"] = without_gradients(partial(timm_like(model), images))
    else:
        print(f"growth: dense at {size} is not measured because a pass takes minutes")
    seconds = {name: dict(points) for name, points in earlier.get("growth", {}).items()}
    tokens = f"{pack.sequence_lengths(1)[0]} of {1 + math.prod(pack.grids[0])} tokens"
    for name, values in measure(runs, 1, clock, warm=height <= MAX_DENSE_HEIGHT).items():
        seconds.setdefault(name, {})[str(size)] = statistics.median(values)
        print(f"growth, {name} at {size}, {tokens}: {statistics.median(values):.2f} s")
    draw_growth(seconds, file)
    return {"growth": seconds}


def draw_growth(seconds: dict[str, dict[str, float]], file: Path) -> None:
    """Draw the seconds of a forward pass against the image area."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in sorted(seconds.items()):
        curve = sorted((math.prod(Size.parse(size)) / 1e6, value) for size, value in points.items())
        axes.loglog(*zip(*curve, strict=True), "o-", label=name)
    axes.set(xlabel="image area, megapixels", ylabel="seconds of a forward pass", title="ViT-S/16, one mammogram")
    axes.legend()
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def cuda(preset: str, size: Size, count: int, rounds: int) -> dict[str, Any]:
    """Compare ours (dense and packed) and timm with 16 bits on a CUDA device; the dense models are compiled.

    Also prints tokens per second and the fraction of the measured rate of matrix multiplication.
    """

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    def in_bf16(run: Run) -> Run:
        def autocast_run() -> Any:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return run()

        return autocast_run

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / statistics.median(measure({"matmul": lambda: a @ a}, 10, clock)["matmul"])
    model = ours(preset, size)
    batch = crops("rsna_dicom", size, 8) * (count // 8)
    peer = timm_like(model).cuda() if has("timm") else None
    model = model.cuda()
    pack = pack_images(batch, model.config.patch).to("cuda")
    images = torch.stack(batch).cuda()
    compiled: Any = torch.compile(model)
    compiled_blocks = copy.deepcopy(model)
    for block in compiled_blocks.blocks:
        block.compile(dynamic=True)  # as `--compile` does
    runs: dict[str, tuple[torch.nn.Module, Run]] = {"ours dense": (model, lambda: compiled(images))}
    if peer is not None:
        timm: Any = torch.compile(peer)
        runs = {"timm": (peer, lambda: timm(images))} | runs
    runs |= {
        "ours packed": (model, lambda: forward(model, pack)),
        "ours packed, compiled": (compiled_blocks, lambda: forward(compiled_blocks, pack)),
    }
    config = model.config
    best = dict.fromkeys(("ours packed", "ours packed, compiled"), ideal(config, pack))
    full = pack_images(batch, config.patch, air=True)
    results: dict[str, Any] = {"matrix rate, TFLOP/s": rate / 1e12}
    title = f"CUDA bf16, {preset}, {len(batch)} crops at {size}"
    kinds: tuple[tuple[str, int, Callable[[torch.nn.Module, Run], Run]], ...] = (
        ("forward", 1, lambda _, run: without_gradients(run)),
        ("training step", 3, training_step),
    )
    for kind, factor, prepare in kinds:
        prepared = {name: prepare(network, in_bf16(run)) for name, (network, run) in runs.items()}
        seconds = measure(prepared, rounds, clock)
        results |= table(f"{title}, {kind}", seconds, next(iter(runs)), best)
        for name, values in seconds.items():
            lengths = (pack if name.startswith("ours packed") else full).sequence_lengths(config.num_prefix_tokens)
            median = statistics.median(values)
            share = factor * sum(operations(config, length) for length in lengths) / median / rate
            print(f"  {name:22} {sum(lengths) / median:12.0f} tokens/s   {share:.0%} of the matrix rate")
    return results


def runtimes(preset: str, size: Size, count: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Compare the runtimes from crops to logits, packed, with 32 and 8 bits, against dense timm.

    The 8-bit models are calibrated on other crops.
    """
    model = ours(preset, size).eval()
    batch = crops("rsna_dicom", size, 8)
    images = pack_images(batch[:count], model.config.patch)
    calibration = pack_images(batch[count:], model.config.patch)
    runs: dict[str, Run] = {"torch": lambda: forward(model, pack_images(batch[:count], model.config.patch))}
    if has("timm"):
        runs = {"timm": partial(timm_like(model), torch.stack(batch[:count]))} | runs
    runs |= exported(model, images, calibration)
    with torch.inference_mode():
        exact = forward(model, images)
    for name, run in runs.items():
        if name.endswith(("fp32", "int8")):
            print(f"  {name}: logits differ by at most {(run() - exact).abs().max():.1e}")
    seconds = measure({name: without_gradients(run) for name, run in runs.items()}, rounds, clock)
    return table(f"{preset}, {count} crops at {size}, packed (timm dense), forward", seconds, next(iter(runs)))


def options(preset: str, images: list[Tensor], rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Measure the effect of fused AdamW, checkpointing and bf16 on a training step, and of bf16 on a forward pass."""
    model = ours(preset, Size(*images[0].shape[-2:])).train()
    pack = pack_images(images, model.config.patch)

    def logits(checkpoint: bool = False, bf16: bool = False) -> Tensor:
        model.gradient_checkpointing = checkpoint
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            return forward(model, pack)

    steps = {
        "fp32, fused AdamW": training_step(model, logits),
        "AdamW not fused": training_step(model, logits, fused=False),
        "checkpointing": training_step(model, partial(logits, checkpoint=True)),
        "bf16": training_step(model, partial(logits, bf16=True)),
    }
    title = f"{preset}, {len(images)} images of {model.config.image_size}, packed"
    results = table(f"{title}, training step", measure(steps, rounds, clock), "fp32, fused AdamW")
    forwards = {"fp32": without_gradients(logits), "bf16": without_gradients(partial(logits, bf16=True))}
    return results | table(f"{title}, forward", measure(forwards, rounds, clock), "fp32")


def measure_part(
    name: str, earlier: dict[str, Any], arguments: argparse.Namespace, clock: Callable[[], float]
) -> dict[str, Any]:
    """Measure one of `PARTS`; `earlier` contains the results so far."""
    square = Size(224, 224)
    tall = Size(1024, 512)
    large = Size(2048, 1024)
    if name.startswith("dense"):
        preset = "vit_small" if "small" in name else "vit_base"
        return dense(preset, square, 4, 7, clock) if "224" in name else dense(preset, tall, 1, 3, clock)
    if name == "cuda" and not torch.cuda.is_available():
        print("\ncuda: no CUDA device here; 16-bit speed was not measured")
        return {}
    if not DATA.is_dir():
        print(f"\n{name}: not measured because the real images are missing at {DATA}")
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
        return growth(int(name.removeprefix("growth-")), earlier, arguments.plot, clock)
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
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch and the runtimes")
    parser.add_argument("--plot", type=Path, default=Path("vit_growth.png"), help="picture drawn by the parts growth-*")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for module in ("timm", "transformers", "onnxruntime", "openvino"):
        if not has(module):
            print(f"{module} is not installed and is not measured")
    results: dict[str, Any] = {"torch": torch.__version__, "threads": arguments.threads}
    if arguments.json and arguments.json.exists():
        results = json.loads(arguments.json.read_text()) | results
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    for name in arguments.parts or PARTS:
        results |= measure_part(name, results, arguments, clock)
        if arguments.json:
            write_atomic(arguments.json, to_json(results))


if __name__ == "__main__":
    main()
