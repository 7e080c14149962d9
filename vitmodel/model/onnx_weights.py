"""Read the weights of a Vision Transformer from an ONNX graph, under the names of the modules it was made from.

Exporters keep few names: the matrix of a linear layer becomes a transposed constant such as `onnx::MatMul_1234` or
`val_27`, equal tensors are stored once, and position embeddings may be cut into the class token's and the patches'. The
module is read from the node that uses a constant instead: its name (`/encoder/layer.0/mlp/fc1/MatMul`, by the exporter
of TorchScript) or its metadata (by that of torch.export).
"""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitmodel.errors import UsageError, VitmodelError
from vitmodel.utils import import_extra

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
"""Key of a node's metadata: the modules around it, from the outermost to the operation."""
PARAMETER = re.compile(r"[A-Za-z_][\w.]*(weight|bias|gamma|lambda1|_token|_tokens|pos_embed|position_embeddings)")
"""Names of parameters; those that an exporter makes up are others."""
EMBEDDINGS = ("cls_token", "pos_embed", "position_embeddings", "reg_token", "register_tokens", "dist_token")
"""Parameters that no module of their own holds."""
SCALE_SCOPE = re.compile(r"(.*\.)?(ls\d|layer_scale\d)")
QUANTIZED = {"DequantizeLinear", "MatMulInteger", "QLinearMatMul", "QLinearConv", "DynamicQuantizeLinear"}
"""Operations of graphs whose weights have 8 bits."""


@dataclass(frozen=True)
class OnnxWeights:
    """What a graph states about a Vision Transformer."""

    tensors: dict[str, Tensor]
    """Name of each parameter -> its value."""
    unused_names: list[str]
    """Constants of the graph that are no parameters, such as masks."""
    eps: float | None
    """Constant that the layer norms add to the variance; None = not stated."""
    antialias: bool | None
    """Whether position embeddings are resized with antialiasing; None = the graph does not resize them."""


def read_onnx(path: Path) -> OnnxWeights:
    """Return the weights in an ONNX file.

    Raises:
        UsageError: The extra `export` is not installed, or the weights have 8 bits.
        VitmodelError: The file is damaged, or its external data are missing or lie outside its folder.
    """
    onnx = import_extra("onnx", "export", f"--weights {path.name}")
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf raises its own classes
        raise VitmodelError(f"{path}: damaged or not an ONNX file; download or write it again") from error
    operations = {node.op_type for node in graph.node}
    if operations & QUANTIZED:
        raise UsageError(f"{path}: its weights have 8 bits; use the graph in 32 or 16 bits, usually model.onnx")
    return _Graph(path, onnx, graph).read()


@dataclass
class _Graph:
    """A graph while its weights are collected."""

    path: Path
    onnx: Any
    graph: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)
    consumed: set[str] = field(default_factory=set)
    """Names of the constants whose module is known."""

    def read(self) -> OnnxWeights:
        for node in self.graph.node:
            self._read_node(node)
        for name in (*self._constants, *self._aliases):
            if name not in self.consumed and PARAMETER.fullmatch(name):
                self._store(name, name)
        anonymous = self._embeddings()
        used = {self._origin(name) for name in self.consumed} | anonymous
        unused = [
            f"{name} {tuple(constant.dims)}"
            for name, constant in self._constants.items()
            if name not in used and self._is_float(constant) and math.prod(constant.dims) > 1
        ]
        return OnnxWeights(self.tensors, unused, self._eps(), self._antialias())

    @cached_property
    def _constants(self) -> dict[str, Any]:
        """Name of each constant -> its value as the file stores it."""
        result = {constant.name: constant for constant in self.graph.initializer}
        for node in self._nodes("Constant"):
            result.update((node.output[0], attribute.t) for attribute in node.attribute if attribute.name == "value")
        return result

    @cached_property
    def _aliases(self) -> dict[str, str]:
        """Other names of constants, because equal tensors are stored once."""
        return {node.output[0]: node.input[0] for node in self._nodes("Identity")}

    @cached_property
    def _consumers(self) -> dict[str, list[Any]]:
        """Name of each value -> the nodes that use it."""
        result: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                result.setdefault(name, []).append(node)
        return result

    def _nodes(self, operation: str) -> Iterator[Any]:
        return (node for node in self.graph.node if node.op_type == operation)

    def _origin(self, name: str) -> str:
        """Return the name under which the constant `name` is stored."""
        while name in self._aliases:
            name = self._aliases[name]
        return name

    def _constant(self, name: str) -> Any | None:
        return self._constants.get(self._origin(name))

    def _is_float(self, constant: Any) -> bool:
        types = self.onnx.TensorProto
        return constant.data_type in (types.FLOAT, types.FLOAT16, types.BFLOAT16, types.DOUBLE)

    def _read_node(self, node: Any) -> None:
        """Store the parameters that a node uses under the name of its module."""
        scope = _scope(node)
        if node.op_type == "MatMul" and len(node.input) == 2:
            self._read_linear(node, scope)
        elif scope and node.op_type in ("LayerNormalization", "Conv"):
            for name, part in zip(node.input[1:], ("weight", "bias"), strict=False):
                self._store(f"{scope}.{part}", name)
        elif scope and node.op_type == "Gemm":
            transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            self._store(f"{scope}.weight", node.input[1], transpose=not transposed)
            if len(node.input) > 2:
                self._store(f"{scope}.bias", node.input[2])
        elif scope and node.op_type == "Mul" and SCALE_SCOPE.fullmatch(scope):
            for name in node.input:
                self._store(f"{scope}.{'lambda1' if 'layer_scale' in scope else 'gamma'}", name)

    def _read_linear(self, node: Any, scope: str | None) -> None:
        """Store a transposed matrix, and the bias that the next node adds."""
        matrix = self._constant(node.input[1])
        if matrix is None or len(matrix.dims) != 2:
            return  # attention
        additions = [other for other in self._consumers.get(node.output[0], []) if other.op_type == "Add"]
        biases = [name for other in additions for name in other.input if self._is_vector(name, matrix.dims[1])]
        if scope is None and biases and biases[0].endswith(".bias"):
            scope = biases[0].removesuffix(".bias")
        if scope is None:
            return
        self._store(f"{scope}.weight", node.input[1], transpose=True)
        if biases:
            self._store(f"{scope}.bias", biases[0])

    def _is_vector(self, name: str, length: int) -> bool:
        constant = self._constant(name)
        return constant is not None and list(constant.dims) == [length]

    def _store(self, parameter: str, name: str, transpose: bool = False) -> None:
        constant = self._constant(name)
        if constant is None or not self._is_float(constant):
            return
        tensor = self._value(constant)
        self.tensors.setdefault(parameter, tensor.T.contiguous() if transpose else tensor)
        self.consumed.add(name)

    def _value(self, constant: Any) -> Tensor:
        """Return the value of a constant.

        Raises:
            VitmodelError: It lies in a file that is missing or too short, or outside the folder.
        """
        if constant.data_location == self.onnx.TensorProto.EXTERNAL:
            constant.raw_data = self._external_bytes(constant)
            constant.data_location = self.onnx.TensorProto.DEFAULT
        try:
            array = self.onnx.numpy_helper.to_array(constant)
        except (ValueError, TypeError) as error:
            raise VitmodelError(f"{self.path}: {constant.name} is damaged ({error}); download it again") from error
        return torch.from_numpy(np.array(array, dtype=np.float32))

    def _external_bytes(self, constant: Any) -> bytes:
        """Return the bytes of a constant in a file next to the graph."""
        place = {entry.key: entry.value for entry in constant.external_data}
        location = place.get("location", "")
        if not location or Path(location).name != location:
            raise VitmodelError(
                f"{self.path}: its data are in {location!r}, which is not a file next to it; export it again"
            )
        data = self.path.with_name(location)
        try:
            with data.open("rb") as file:
                file.seek(int(place.get("offset", 0)))
                return file.read(int(place.get("length", -1)))
        except (OSError, ValueError) as error:
            raise VitmodelError(f"{self.path}: its data in {data} cannot be read ({error}); copy both files") from error

    def _embeddings(self) -> set[str]:
        """Name the constants of the class token and the positions that have lost their names; return theirs."""
        patch = next((name for name in self.tensors if re.search(r"patch_embed.*\.proj\w*\.weight$", name)), None)
        if patch is None:
            return set()
        width = self.tensors[patch].shape[0]
        prefix = re.sub(r"(embeddings\.patch_embeddings\.projection|patch_embed\.proj)\.weight$", "", patch)
        siblings = re.sub(r"(patch_embeddings\.projection|patch_embed\.proj)\.weight$", "", patch)
        for name in list(self.tensors):  # an exported wrapper has a prefix that the names of nodes may lack
            if (last := name.rpartition(".")[2]) in EMBEDDINGS:
                self.tensors[siblings + last] = self.tensors.pop(name)
        used = {self._origin(name) for name in self.consumed}
        rows = {  # of one or several tokens
            name: constant
            for name, constant in self._constants.items()
            if name not in used and self._is_float(constant) and len(constant.dims) == 3
            and constant.dims[0] == 1 and constant.dims[2] == width
        }  # fmt: skip
        single = [name for name in rows if rows[name].dims[1] == 1]
        several = sorted((name for name in rows if rows[name].dims[1] > 1), key=lambda name: rows[name].dims[1])
        found: dict[str, list[str]] = {}
        if not self._has("pos_embed", "position_embeddings") and several:
            # The positions of the patches; that of the class token may be a constant of its own.
            lacks_class_token = not self._has("cls_token")
            found["pos_embed"] = [*(single[-1:] if len(single) > lacks_class_token else []), several.pop()]
        if not self._has("reg_token", "register_tokens") and len(several) == 1:
            found["reg_token"] = several
        if not self._has("cls_token"):
            found["cls_token"] = [name for name in single if name not in found.get("pos_embed", [])][:1]
        for parameter, names in found.items():
            if names:
                self.tensors[prefix + parameter] = torch.cat([self._value(rows[name]) for name in names], dim=1)
        return {name for names in found.values() for name in names}

    def _has(self, *parameters: str) -> bool:
        return any(name.endswith(parameters) for name in self.tensors)

    def _eps(self) -> float | None:
        """Return the constant of the layer norms, if all have the same."""
        values = set()
        for node in self._nodes("LayerNormalization"):
            stated = [attribute.f for attribute in node.attribute if attribute.name == "epsilon"]
            values.add(float(f"{stated[0] if stated else 1e-5:.3g}"))  # stored in 32 bits
        return values.pop() if len(values) == 1 else None

    def _antialias(self) -> bool | None:
        resizes = list(self._nodes("Resize"))
        if not resizes:
            return None
        return any(attribute.name == "antialias" and attribute.i for node in resizes for attribute in node.attribute)


def _scope(node: Any) -> str | None:
    """Return the module that a node belongs to, or None if the exporter did not record it."""
    for entry in node.metadata_props:
        if entry.key == SCOPES_KEY:
            scopes = ast.literal_eval(entry.value)
            return scopes[-2] if len(scopes) > 1 and scopes[-2] else None
    if not node.name.startswith("/"):
        return None
    parts = node.name.strip("/").split("/")[:-1]
    # A sequence of modules appears twice: /blocks/blocks.0/attn.
    kept = [
        part
        for part, after in itertools.zip_longest(parts, parts[1:], fillvalue="")
        if part and not after.startswith(f"{part}.")
    ]
    return ".".join(kept) or None
