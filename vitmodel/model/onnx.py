"""Networks as ONNX: exported in 32 bits, quantized to 8, run by ONNX Runtime or OpenVINO. Knows no package.

A graph is one of two. `ViTGraph` is all of a ViT, or the mean of several: images B C H W, all of the size that the model was built for,
and the numbers of the patches to look at, kept B N, counted row by row -> logits B K. B and N are free, so a dense image keeps all
patches, and air is left out here too. `EncoderGraph` is for crops of many sizes and for networks that are more than a ViT (segments, sources,
exams): it is the blocks alone, and PyTorch does what little lies around them.

Eight bits: static, weights by channel and symmetric, activations by tensor, for the inputs of all matrices but the patch embedding, the
head, and those of the first quarter of the blocks; attention itself, norms and sums stay in 32 bits. The first blocks of published ViTs
have channels, and make values, many times as large as others, which eight bits per tensor cannot hold (dev/LOG.md).
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from vitmodel.errors import UsageError, VitmodelError
from vitmodel.model.fusion import SourceAdaptedLayout, SourceAdapters
from vitmodel.model.network import Network
from vitmodel.model.packed_attention import PackedLayout
from vitmodel.model.packed_batch import PackedBatch
from vitmodel.model.vit import DENSE_LAYOUT, SequenceLayout, ViT
from vitmodel.utils import atomic_path, import_extra

GraphInputs = dict[str, np.ndarray]

WEIGHTS_HASH_KEY = "vitmodel.weights_sha256"  # the metadata that ties a file to the package it was made of


class ViTGraph(nn.Module):
    """What is exported of ViTs: their mean logits of images of which they look at some patches."""

    output = "logits"

    def __init__(self, models: Sequence[ViT]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.count = len(models)

    def example_inputs(self) -> tuple[dict[str, Tensor], dict[str, dict[int, Dim]]]:
        """Inputs, and which of their dimensions are free."""
        config = cast(ViT, self.models[0]).config
        (h, w), batch = config.grid, Dim("batch")
        kept = torch.arange(max(2, h * w - 1)).expand(2, -1)
        images = torch.zeros(2, config.channels, *config.image_size)
        return {"images": images, "kept": kept}, {"images": {0: batch}, "kept": {0: batch, 1: Dim("patches")}}

    def forward(self, images: Tensor, kept: Tensor) -> Tensor:
        return torch.stack([self._logits(cast(ViT, model), images, kept) for model in self.models]).mean(dim=0)

    @staticmethod
    def _logits(model: ViT, images: Tensor, kept: Tensor) -> Tensor:
        tokens = model.embed(images)  # B R+h*w D
        prefix = torch.arange(model.config.num_prefix_tokens).expand(kept.shape[0], -1)
        chosen = torch.cat([prefix, model.config.num_prefix_tokens + kept], dim=1)  # B R+N
        tokens = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2]))
        return model.head(model.pool(model.encode(tokens)))


class EncoderGraph(nn.Module):
    """What is exported of any other network: what its blocks make of the tokens of one image, or part of one, with its sources."""

    output = "encoded"
    count = 1

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.trunk = network.trunk
        self.sources = network.sources

    def example_inputs(self) -> tuple[dict[str, Tensor], dict[str, dict[int, Dim]]]:
        """Inputs, and which of their dimensions are free."""
        config = self.trunk.config
        inputs = {"tokens": torch.zeros(1, config.num_prefix_tokens + 3, config.dim)}
        if self.sources is not None:
            inputs["sources"] = torch.zeros(len(self.sources.tokens), dtype=torch.long)
        return inputs, {name: {1: Dim("length", min=2)} if name == "tokens" else {} for name in inputs}

    def forward(
        self, tokens: Tensor, sources: Tensor | None = None
    ) -> Tensor:  # 1 T D, and C numbers of values -> 1 T D
        if self.sources is None or sources is None:
            return self.trunk.encode(tokens, DENSE_LAYOUT)
        return self.trunk.encode(tokens, SingleImageSourceLayout(self.sources, list(sources.split(1))))


class SingleImageSourceLayout(SequenceLayout):
    """One image in a row of tokens, which passes through the parts of its own sources; each value is a tensor of one number."""

    def __init__(self, sources: SourceAdapters, values: list[Tensor]) -> None:
        self.sources = sources
        self.values: Any = values

    def prepare_block_input(self, number: int, x: Tensor) -> Tensor:
        if number == 0:
            x = torch.cat([x[:, :1] + self.sources.class_token_offset(self.values)[None].to(x.dtype), x[:, 1:]], dim=1)
        added = self.sources.block_input_offset(number, x[0], [x.shape[1]], self.values)
        return x if added is None else x + added[None]


def export_onnx(graph: ViTGraph | EncoderGraph, path: Path, weights: str) -> None:
    """Write `graph` to `path` in 32 bits, marked with the SHA-256 of its `weights`. Raises UsageError where the extra is not installed."""
    _import_extras("onnx", "onnxscript")
    inputs, free = graph.example_inputs()
    with atomic_path(path) as temporary:
        with _quiet():
            torch.onnx.export(
                graph.eval(), tuple(inputs.values()), temporary, input_names=list(inputs), output_names=[graph.output],
                dynamic_shapes=free, external_data=False, verbose=False,
            )  # fmt: skip
        _write_weights_hash(temporary, weights)


def quantize(graph: ViTGraph | EncoderGraph, path: Path, inputs: Iterable[GraphInputs], weights: str) -> None:
    """As `export_onnx`, but with 8-bit matrices; the ranges of activations are those that `inputs` cause."""
    onnx, quantization, shapes = _import_extras(
        "onnx", "onnxruntime.quantization", "onnxruntime.quantization.shape_inference"
    )

    with atomic_path(path) as temporary, tempfile.TemporaryDirectory() as scratch:
        exported, ready = Path(scratch) / "exported.onnx", Path(scratch) / "ready.onnx"
        export_onnx(graph, exported, weights)
        with _quiet():
            shapes.quant_pre_process(exported, ready, skip_symbolic_shape=True)
            nodes = onnx.load(ready).graph
            constant = {tensor.name for tensor in nodes.initializer}
            matrices = [
                node.name
                for node in nodes.node
                if node.op_type in ("MatMul", "Gemm") and constant.intersection(node.input)
            ]
            each = len(matrices) // graph.count
            spared = [
                name for number, name in enumerate(matrices) if number % each < each / 4 or number % each == each - 1
            ]
            quantization.quantize_static(
                ready, temporary, CalibrationDataReader(inputs), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
                nodes_to_exclude=spared,
                activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
            )  # fmt: skip
        _write_weights_hash(temporary, weights)


class CalibrationDataReader:
    """A graph's inputs, as ONNX Runtime's quantizer asks for them."""

    def __init__(self, inputs: Iterable[GraphInputs]) -> None:
        self.inputs = iter(inputs)

    def get_next(self) -> GraphInputs | None:
        return next(self.inputs, None)


def image_inputs(packs: Iterable[PackedBatch]) -> Iterator[GraphInputs]:
    """What `ViTGraph` takes, for each image by itself."""
    for pack in packs:
        for image, kept in zip(pack.images, pack.patch_indices, strict=True):
            yield {"images": image[None].numpy(), "kept": kept[None].numpy()}


def token_inputs(tokens: Tensor, layout: PackedLayout) -> Iterator[GraphInputs]:
    """What `EncoderGraph` takes, for each image of a row of tokens (1 T D) by itself."""
    for number, image in enumerate(tokens.split(layout.lengths, dim=1)):
        inputs = {"tokens": image.numpy()}
        if isinstance(layout, SourceAdaptedLayout):
            inputs["sources"] = np.array([values[number] for values in layout.values])
        yield inputs


def record_encoder_inputs(network: Network, packs: Iterable[PackedBatch]) -> Iterator[GraphInputs]:
    """What the blocks of `network` are given where it looks at `packs`."""
    seen: list[GraphInputs] = []

    def encode(tokens: Tensor, layout: PackedLayout) -> Tensor:
        seen.extend(token_inputs(tokens, layout))
        return network.trunk.encode(tokens, layout)

    watched = network.with_encoder(encode)
    for pack in packs:
        with torch.inference_mode():
            watched.features(pack)
        yield from seen
        seen.clear()


def load_onnx(path: Path, runtime: str, weights: str) -> Callable[[PackedBatch], Tensor]:
    """The ViTs of a file of `ViTGraph`: a pack of I images -> I K. Raises as `_load` does."""
    run = _load(path, runtime, weights)
    return lambda pack: torch.from_numpy(np.concatenate([run(inputs) for inputs in image_inputs([pack])]))


def load_encoder(path: Path, runtime: str, weights: str) -> Callable[[Tensor, PackedLayout], Tensor]:
    """The blocks of a file of `EncoderGraph`, in place of `ViT.encode`: a row of tokens and its layout -> 1 T D. Raises as `_load` does."""
    run = _load(path, runtime, weights)
    return lambda tokens, layout: torch.from_numpy(
        np.concatenate([run(inputs) for inputs in token_inputs(tokens, layout)], axis=1)
    )


def _load(path: Path, runtime: str, weights: str) -> Callable[[GraphInputs], np.ndarray]:
    """A graph, run by `runtime` (onnx, openvino) with as many threads as torch uses.

    Raises UsageError where the file is missing, was made of other weights, or the extra is not installed; VitmodelError where it is broken.
    """
    if not path.is_file():
        raise UsageError(f"{path}: is missing; `vitmodel export {path.parent} {path}` with its --precision makes it")
    try:
        found = {entry.key: entry.value for entry in _import_extras("onnx")[0].load(path).metadata_props}
        if found.get(WEIGHTS_HASH_KEY) != weights:
            raise UsageError(f"{path}: was made of other weights than the package's; make it anew by `vitmodel export`")
        return {"onnx": _onnxruntime, "openvino": _openvino}[runtime](path)
    except VitmodelError:
        raise
    except Exception as error:
        raise VitmodelError(f"{path}: {runtime} cannot load it ({error}); make it anew by `vitmodel export`") from error


def _onnxruntime(path: Path) -> Callable[[GraphInputs], np.ndarray]:
    (onnxruntime,) = _import_extras("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]


def _openvino(path: Path) -> Callable[[GraphInputs], np.ndarray]:
    (openvino,) = _import_extras("openvino")
    # without the hint it picks bfloat16 where the processor knows it, which is neither exact nor fast
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(path, "CPU", options)
    return lambda inputs: compiled(inputs)[0]


def _import_extras(*modules: str) -> list[Any]:
    """The modules of the extra `export`. Raises UsageError where one is not installed."""
    return [import_extra(module, "export", "runtime") for module in modules]


def _write_weights_hash(path: Path, weights: str) -> None:
    (onnx,) = _import_extras("onnx")
    graph = onnx.load(path)
    onnx.helper.set_model_props(graph, {WEIGHTS_HASH_KEY: weights})
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
