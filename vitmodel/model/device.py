"""Choice of the device and, on a CPU, of the library for matrix products, by measured speed (dev/LOG.md)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vitmodel.errors import UsageError


def resolve_device(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Return the device to compute on; "auto" is CUDA if it is available, else the CPU.

    Raises:
        UsageError: `wanted` is not a choice, or CUDA is wanted but not available.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device: {wanted!r} is not a choice; choose from auto, cpu, cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: no CUDA device is available; use --device cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


@functools.cache
def cpu_capabilities() -> Mapping[str, Any]:
    """Return PyTorch's description of this CPU, empty for versions of PyTorch that have none."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


@functools.cache
def mkl_is_slow() -> bool:
    """Return whether the CPU is by AMD with AVX-512, where MKL's float32 products take twice as long as oneDNN's."""
    return (
        "AMD" in cpu_capabilities().get("cpu_name", "")
        and cpu_capabilities().get("avx512_f", False)
        and torch.backends.mkldnn.is_available()
    )


def linear(x: Tensor, *layers: nn.Linear) -> Tensor:
    """Apply linear layers in sequence, with a GELU between them, by the fastest library for matrix products.

    PyTorch uses MKL for float32 on every CPU; this function uses oneDNN where it is faster. Compiled code keeps the
    compiler's choice.

    Args:
        x: Input `(..., D)`.
        *layers: Linear layers, each with a bias.

    Returns:
        Output `(..., D')` of the last layer.
    """
    not_float32_on_cpu = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    if torch.compiler.is_compiling() or not_float32_on_cpu or not mkl_is_slow():
        for index, layer in enumerate(layers):
            x = layer(F.gelu(x) if index else x)
        return x
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    output: Tensor = _OneDNN.apply(x, *parameters)
    return output


class _OneDNN(torch.autograd.Function):
    """`linear` with tensors in oneDNN's format.

    Plain autograd would keep every tensor in both formats for the backward pass; this keeps the input of each layer
    once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        activations = [x.to_mkldnn()]  # input of each layer, before the GELU, then the output of the last layer
        for index, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
            layer_input = F.gelu(activations[-1]) if index else activations[-1]
            activations.append(F.linear(layer_input, weight, bias))
        ctx.save_for_backward(x, *parameters, *activations[1:-1])
        return activations[-1].to_dense()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        layers = (len(saved) + 1) // 3  # a weight and a bias per layer, and an activation between layers
        weights = saved[: 2 * layers : 2]
        activations = [x.to_mkldnn(), *saved[2 * layers :]]
        upstream = gradient.contiguous().to_mkldnn()
        gradients: list[Tensor | None] = []
        for index in reversed(range(layers)):
            layer_input = F.gelu(activations[index]) if index else activations[index]
            mask = [index > 0 or ctx.needs_input_grad[0], *ctx.needs_input_grad[1 + 2 * index : 3 + 2 * index]]
            upstream, *of_parameters = torch.ops.aten.mkldnn_linear_backward(
                layer_input, upstream, weights[index], mask
            )
            gradients[:0] = [part if needed else None for part, needed in zip(of_parameters, mask[1:], strict=True)]
            if index:
                upstream = torch.ops.aten.gelu_backward(upstream, activations[index])
        return upstream.to_dense() if ctx.needs_input_grad[0] else None, *gradients
