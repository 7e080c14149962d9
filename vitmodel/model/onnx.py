"""Export networks to ONNX in 32 bits, quantize them to 8 bits, and run them with ONNX Runtime or OpenVINO.

There are two kinds of graph:

- `ViTGraph` is a whole ViT, or the mean of several. It takes images `(B, C, H, W)` of the size that the model was built
  for and `kept` `(B, N)`, the row-major indices of the patches to encode, and returns logits `(B, K)`. B and N are
  free, so that air patches are left out here too; for a dense image all patches are kept.
- `EncoderGraph` is for crops of many sizes and for networks that are more than a ViT (segments, sources, exams). It
  holds only the blocks; PyTorch computes the small remainder.

8-bit quantization is static: weights per channel and symmetric, activations per tensor. It covers the inputs of all
matrices except the patch embedding, the head, and the first quarter of the blocks; attention itself, norms and sums
stay in 32 bits. The first blocks of published ViTs have channels, and produce values, many times larger than others,
which 8 bits per tensor cannot represent (dev/LOG.md).
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

WEIGHTS_HASH_KEY = "vitmodel.weights_sha256"  # metadata entry that ties a graph to the package it was exported from


class ViTGraph(nn.Module):
    """ONNX graph of one or several ViTs: their mean logits for images of which only some patches are encoded.

    Args:
        models: The ViTs, all of one configuration.
        auxiliary: The auxiliary heads of each ViT, whose outputs follow the logits; empty if they have none.
    """

    output = "logits"

    def __init__(self, models: Sequence[ViT], auxiliary: Sequence[nn.Linear] = ()) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.heads = nn.ModuleList([model.head for model in models])
        if auxiliary:
            heads = zip(models, auxiliary, strict=True)
            self.heads = nn.ModuleList([_joined_layer(model.head, further) for model, further in heads])
        self.count = len(models)

    def example_inputs(self) -> tuple[dict[str, Tensor], dict[str, dict[int, Dim]]]:
        """Return example inputs for tracing, and which of their dimensions are free."""
        config = cast(ViT, self.models[0]).config
        rows, columns = config.grid
        batch = Dim("batch")
        kept = torch.arange(max(2, rows * columns - 1)).expand(2, -1)
        images = torch.zeros(2, config.channels, *config.image_size)
        return {"images": images, "kept": kept}, {"images": {0: batch}, "kept": {0: batch, 1: Dim("patches")}}

    def forward(self, images: Tensor, kept: Tensor) -> Tensor:
        """Return the mean logits `(B, K)` for images `(B, C, H, W)` and patch indices `(B, N)`."""
        pairs = zip(self.models, self.heads, strict=True)
        return torch.stack([head(self._features(cast(ViT, model), images, kept)) for model, head in pairs]).mean(dim=0)

    @staticmethod
    def _features(model: ViT, images: Tensor, kept: Tensor) -> Tensor:
        tokens = model.embed(images)  # (B, R + rows * columns, D) with R prefix tokens
        prefix = torch.arange(model.config.num_prefix_tokens).expand(kept.shape[0], -1)
        chosen = torch.cat([prefix, model.config.num_prefix_tokens + kept], dim=1)  # (B, R + N)
        tokens = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2]))
        return model.pool(model.encode(tokens))


def _joined_layer(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """Return one linear layer with the outputs of two; quantization then finds one last matrix per model."""
    layer = nn.Linear(first.in_features, first.out_features + second.out_features)
    layer.weight = nn.Parameter(torch.cat([first.weight, second.weight]))
    layer.bias = nn.Parameter(torch.cat([first.bias, second.bias]))
    return layer


class EncoderGraph(nn.Module):
    """ONNX graph of the blocks of any other network, for the tokens of one image or segment and the image's sources."""

    output = "encoded"
    count = 1

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.trunk = network.trunk
        self.sources = network.sources

    def example_inputs(self) -> tuple[dict[str, Tensor], dict[str, dict[int, Dim]]]:
        """Return example inputs for tracing, and which of their dimensions are free."""
        config = self.trunk.config
        inputs = {"tokens": torch.zeros(1, config.num_prefix_tokens + 3, config.dim)}
        if self.sources is not None:
            inputs["sources"] = torch.zeros(len(self.sources.tokens), dtype=torch.long)
        return inputs, {name: {1: Dim("length", min=2)} if name == "tokens" else {} for name in inputs}

    def forward(self, tokens: Tensor, sources: Tensor | None = None) -> Tensor:
        """Return the encoded tokens `(1, T, D)` of tokens `(1, T, D)` and the indices of C source values `(C,)`."""
        if self.sources is None or sources is None:
            return self.trunk.encode(tokens, DENSE_LAYOUT)
        return self.trunk.encode(tokens, SingleImageSourceLayout(self.sources, list(sources.split(1))))


class SingleImageSourceLayout(SequenceLayout):
    """Token layout of a single image that passes through the adapters of its own sources.

    Each source value is a tensor of one number, so that it can be an input of the graph.
    """

    def __init__(self, sources: SourceAdapters, values: list[Tensor]) -> None:
        self.sources = sources
        self.values: Any = values

    def prepare_block_input(self, number: int, x: Tensor) -> Tensor:
        if number == 0:
            class_token = x[:, :1] + self.sources.class_token_offset(self.values)[None].to(x.dtype)
            x = torch.cat([class_token, x[:, 1:]], dim=1)
        offset = self.sources.block_input_offset(number, x[0], [x.shape[1]], self.values)
        return x if offset is None else x + offset[None]


def export_onnx(graph: ViTGraph | EncoderGraph, path: Path, weights: str) -> None:
    """Write `graph` to `path` in 32 bits.

    Args:
        graph: The graph to export.
        path: The .onnx file.
        weights: SHA-256 of the package's tensors; stored in the file's metadata.

    Raises:
        UsageError: The extra `export` is not installed.
    """
    _import_extras("onnx", "onnxscript")
    inputs, free = graph.example_inputs()
    with atomic_path(path) as temporary:
        with _quiet():
            torch.onnx.export(
                graph.eval(),
                tuple(inputs.values()),
                temporary,
                input_names=list(inputs),
                output_names=[graph.output],
                dynamic_shapes=free,
                external_data=False,
                verbose=False,
            )
        _write_weights_hash(temporary, weights)


def quantize(graph: ViTGraph | EncoderGraph, path: Path, inputs: Iterable[GraphInputs], weights: str) -> None:
    """Write `graph` to `path` with 8-bit matrices.

    Args:
        graph: The graph to quantize.
        path: The .onnx file.
        inputs: Calibration inputs, from which the ranges of activations are taken.
        weights: SHA-256 of the package's tensors; stored in the file's metadata.

    Raises:
        UsageError: The extra `export` is not installed.
    """
    onnx, quantization, shapes = _import_extras(
        "onnx", "onnxruntime.quantization", "onnxruntime.quantization.shape_inference"
    )

    with atomic_path(path) as temporary, tempfile.TemporaryDirectory() as scratch:
        exported = Path(scratch) / "exported.onnx"
        ready = Path(scratch) / "ready.onnx"
        export_onnx(graph, exported, weights)
        with _quiet():
            shapes.quant_pre_process(exported, ready, skip_symbolic_shape=True)
            excluded = _nodes_kept_in_32_bits(onnx.load(ready).graph, graph.count)
            quantization.quantize_static(
                ready,
                temporary,
                CalibrationDataReader(inputs),
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                nodes_to_exclude=excluded,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
            )
        _write_weights_hash(temporary, weights)


def _nodes_kept_in_32_bits(onnx_graph: Any, count: int) -> list[str]:
    """Return the names of the matrix products of the first quarter of each of `count` models, and of its last one."""
    constants = {tensor.name for tensor in onnx_graph.initializer}
    matrices = [
        node.name
        for node in onnx_graph.node
        if node.op_type in ("MatMul", "Gemm") and constants.intersection(node.input)
    ]
    per_model = len(matrices) // count
    return [
        name
        for number, name in enumerate(matrices)
        if number % per_model < per_model / 4 or number % per_model == per_model - 1
    ]


class CalibrationDataReader:
    """Calibration inputs in the interface of ONNX Runtime's quantizer."""

    def __init__(self, inputs: Iterable[GraphInputs]) -> None:
        self.inputs = iter(inputs)

    def get_next(self) -> GraphInputs | None:
        return next(self.inputs, None)


def image_inputs(packs: Iterable[PackedBatch]) -> Iterator[GraphInputs]:
    """Yield the inputs of `ViTGraph` for each image of the packs."""
    for pack in packs:
        for image, kept in zip(pack.images, pack.patch_indices, strict=True):
            yield {"images": image[None].numpy(), "kept": kept[None].numpy()}


def token_inputs(tokens: Tensor, layout: PackedLayout) -> Iterator[GraphInputs]:
    """Yield the inputs of `EncoderGraph` for each image in a row of tokens `(1, T, D)`."""
    for number, image in enumerate(tokens.split(layout.lengths, dim=1)):
        inputs = {"tokens": image.numpy()}
        if isinstance(layout, SourceAdaptedLayout):
            inputs["sources"] = np.array([values[number] for values in layout.values])
        yield inputs


def record_encoder_inputs(network: Network, packs: Iterable[PackedBatch]) -> Iterator[GraphInputs]:
    """Yield the inputs that the blocks of `network` receive while it encodes `packs`."""
    recorded: list[GraphInputs] = []

    def encode(tokens: Tensor, layout: PackedLayout) -> Tensor:
        recorded.extend(token_inputs(tokens, layout))
        return network.trunk.encode(tokens, layout)

    recording_network = network.with_encoder(encode)
    for pack in packs:
        with torch.inference_mode():
            recording_network.features(pack)
        yield from recorded
        recorded.clear()


def load_onnx(path: Path, runtime: str, weights: str) -> Callable[[PackedBatch], Tensor]:
    """Return a function that runs a `ViTGraph` file: a pack of I images -> logits `(I, K)`.

    Args:
        path: The .onnx file.
        runtime: "onnx" or "openvino".
        weights: SHA-256 of the package's tensors, which must be that of the file.

    Raises:
        UsageError: The file is missing or of other weights, or the extra `export` is not installed.
        VitmodelError: The file is damaged.
    """
    run = _load(path, runtime, weights)
    return lambda pack: torch.from_numpy(np.concatenate([run(inputs) for inputs in image_inputs([pack])]))


def load_encoder(path: Path, runtime: str, weights: str) -> Callable[[Tensor, PackedLayout], Tensor]:
    """Return a function that runs an `EncoderGraph` file and replaces `ViT.encode`.

    It takes a row of tokens `(1, T, D)` and its layout, and returns the encoded tokens `(1, T, D)`. Arguments and
    errors are those of `load_onnx`.
    """
    run = _load(path, runtime, weights)
    return lambda tokens, layout: torch.from_numpy(
        np.concatenate([run(inputs) for inputs in token_inputs(tokens, layout)], axis=1)
    )


def _load(path: Path, runtime: str, weights: str) -> Callable[[GraphInputs], np.ndarray]:
    """Return a function that runs a graph with `runtime`, using as many threads as torch. Raise as `load_onnx` does."""
    if not path.is_file():
        raise UsageError(f"{path}: is missing; `vitmodel export {path.parent} {path}` with its --precision creates it")
    try:
        metadata = {entry.key: entry.value for entry in _import_extras("onnx")[0].load(path).metadata_props}
        if metadata.get(WEIGHTS_HASH_KEY) != weights:
            raise UsageError(
                f"{path}: was exported from other weights than the package's; export it again with `vitmodel export`"
            )
        return {"onnx": _onnxruntime, "openvino": _openvino}[runtime](path)
    except VitmodelError:
        raise
    except Exception as error:
        raise VitmodelError(
            f"{path}: {runtime} cannot load it ({error}); export it again with `vitmodel export`"
        ) from error


def _onnxruntime(path: Path) -> Callable[[GraphInputs], np.ndarray]:
    (onnxruntime,) = _import_extras("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]


def _openvino(path: Path) -> Callable[[GraphInputs], np.ndarray]:
    (openvino,) = _import_extras("openvino")
    # Without the hint it uses bfloat16 on processors that support it, which is neither exact nor fast.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(path, "CPU", options)
    return lambda inputs: compiled(inputs)[0]


def _import_extras(*modules: str) -> list[Any]:
    """Return modules of the extra `export`. Raise UsageError if one is not installed."""
    return [import_extra(module, "export", "runtime") for module in modules]


def _write_weights_hash(path: Path, weights: str) -> None:
    """Store the SHA-256 `weights` in the metadata of an .onnx file."""
    (onnx,) = _import_extras("onnx")
    graph = onnx.load(path)
    onnx.helper.set_model_props(graph, {WEIGHTS_HASH_KEY: weights})
    onnx.save(graph, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the messages of exporter and quantizer about their own internals."""
    previous_level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous_level)
