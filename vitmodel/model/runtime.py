"""A ViT, or the mean of several, as ONNX: exported in 32 bits, quantized to 8, run by ONNX Runtime or OpenVINO. Knows no package.

The graph takes what a pack holds, so that air is left out here too: images B C H W, all of the size that the model was built for, and the
numbers of the patches to look at, kept B N, counted row by row -> logits B K. B and N are free, so a dense image keeps all patches.

Eight bits: static, weights by channel and symmetric, activations by tensor, for the inputs of all matrices but the patch embedding, the
head, and those of the first quarter of the blocks; attention itself, norms and sums stay in 32 bits. The first blocks of published ViTs
have channels, and make values, many times as large as others, which eight bits per tensor cannot hold (docs/LOG.md).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from vitmodel.model.packing import Pack
from vitmodel.model.vit import ViT
from vitmodel.utils import UsageError, VitmodelError, atomic_path

WEIGHTS = "vitmodel.weights_sha256"  # the metadata that ties a file to the package it was made of


class KeptPatches(nn.Module):
    """What is exported: the mean logits of ViTs that look at some patches of each image."""

    def __init__(self, models: Sequence[ViT]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, images: Tensor, kept: Tensor) -> Tensor:
        return torch.stack([self._look(cast(ViT, model), images, kept) for model in self.models]).mean(dim=0)

    @staticmethod
    def _look(model: ViT, images: Tensor, kept: Tensor) -> Tensor:
        tokens = model.embed(images)  # B R+h*w D
        prefix = torch.arange(model.config.prefix).expand(kept.shape[0], -1)
        chosen = torch.cat([prefix, model.config.prefix + kept], dim=1)  # B R+N
        tokens = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2]))
        return model.head(model.pool(model.encode(tokens)))


def export_onnx(models: Sequence[ViT], path: Path, weights: str) -> None:
    """Write `models`, alike but for their weights, to `path` in 32 bits, marked with the SHA-256 of their `weights`.

    Raises UsageError where the extra is not installed.
    """
    _need("onnx", "onnxscript")
    config = models[0].config
    (h, w), channels = config.grid, config.channels
    example = torch.zeros(2, channels, *config.image_size), torch.arange(max(2, h * w - 1)).expand(2, -1)
    batch, patches = torch.export.Dim("batch"), torch.export.Dim("patches")
    with atomic_path(path) as temporary:
        with _quiet():
            torch.onnx.export(
                KeptPatches(models).eval(), example, temporary, input_names=["images", "kept"], output_names=["logits"],
                dynamic_shapes={"images": {0: batch}, "kept": {0: batch, 1: patches}}, external_data=False, verbose=False,
            )  # fmt: skip
        _mark(temporary, weights)


def quantize(models: Sequence[ViT], path: Path, packs: Sequence[Pack], weights: str) -> None:
    """As `export_onnx`, but with 8-bit matrices; the ranges of activations are those that `packs` show."""
    onnx, quantization, shapes = _need("onnx", "onnxruntime.quantization", "onnxruntime.quantization.shape_inference")

    with atomic_path(path) as temporary, tempfile.TemporaryDirectory() as scratch:
        exported, ready = Path(scratch) / "exported.onnx", Path(scratch) / "ready.onnx"
        export_onnx(models, exported, weights)
        with _quiet():
            shapes.quant_pre_process(exported, ready, skip_symbolic_shape=True)
            graph = onnx.load(ready).graph
            constant = {tensor.name for tensor in graph.initializer}
            matrices = [node.name for node in graph.node if node.op_type in ("MatMul", "Gemm") and constant.intersection(node.input)]
            each = len(matrices) // len(models)
            spared = [name for number, name in enumerate(matrices) if number % each < each / 4 or number % each == each - 1]
            quantization.quantize_static(
                ready, temporary, Reader(packs), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
                nodes_to_exclude=spared,
                activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
            )  # fmt: skip
        _mark(temporary, weights)


class Reader:
    """Packs, as ONNX Runtime's quantizer asks for them."""

    def __init__(self, packs: Sequence[Pack]) -> None:
        self.inputs = (inputs for pack in packs for inputs in graph_inputs(pack))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.inputs, None)


def graph_inputs(pack: Pack) -> Iterator[dict[str, np.ndarray]]:
    """What the graph takes, for each image of a pack by itself."""
    for image, kept in zip(pack.images, pack.kept, strict=True):
        yield {"images": image[None].numpy(), "kept": kept[None].numpy()}


def load_onnx(path: Path, runtime: str, weights: str) -> Callable[[Pack], Tensor]:
    """The network of an ONNX file, run by `runtime` (onnx, openvino) with as many threads as torch uses: a pack of I images -> I K.

    Raises UsageError where the file is missing, was made of other weights, or the extra is not installed; VitmodelError where it is broken.
    """
    if not path.is_file():
        raise UsageError(f"{path}: is missing; `vitmodel export {path.parent} {path}` with its --precision makes it")
    try:
        found = {entry.key: entry.value for entry in _need("onnx")[0].load(path).metadata_props}
        if found.get(WEIGHTS) != weights:
            raise UsageError(f"{path}: was made of other weights than the package's; make it anew by `vitmodel export`")
        run = {"onnx": _onnxruntime, "openvino": _openvino}[runtime](path)
    except VitmodelError:
        raise
    except Exception as error:
        raise VitmodelError(f"{path}: {runtime} cannot load it ({error}); make it anew by `vitmodel export`") from error
    return lambda pack: torch.from_numpy(np.concatenate([run(inputs) for inputs in graph_inputs(pack)]))


def _onnxruntime(path: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    (onnxruntime,) = _need("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]


def _openvino(path: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    (openvino,) = _need("openvino")
    # without the hint it picks bfloat16 where the processor knows it, which is neither exact nor fast
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(path, "CPU", options)
    return lambda inputs: compiled(inputs)[0]


def _need(*modules: str) -> list[Any]:
    """The modules of the extra `export`. Raises UsageError where one is not installed."""
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError as error:
        raise UsageError(f"runtime: {error.name} is not installed; pip install 'vitmodel[export]'") from None


def _mark(path: Path, weights: str) -> None:
    (onnx,) = _need("onnx")
    graph = onnx.load(path)
    onnx.helper.set_model_props(graph, {WEIGHTS: weights})
    onnx.save(graph, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that exporter and quantizer give on their own internals."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
